// SPDX-License-Identifier: GPL-2.0-only

//! Suspend to RAM: the machine stops, and its firmware starts the kernel again where it was.
//!
//! The state `freeze` needs a device that interrupts a CPU that idles. The clock's alarm is none here: on a machine
//! with ACPI, Linux waits for ACPI's event of it, which QEMU raises for a machine that has stopped.

use anyhow::{ensure, Result};
use std::time::Duration;
use vm_tests::{boot, debian, load, unload};
use xtask::vm::Vm;

/// What takes minutes of an emulated CPU.
const LONG: Duration = Duration::from_secs(300);

/// A mounted file system, with a process that has a file of it mapped and stops half-way through its stores; and a
/// disk whose other memory is RAM, with a process that uses it.
fn begin(vm: &Vm) -> Result<()> {
    vm.sh("echo online_movable >/sys/devices/system/memory/auto_online_blocks")?;
    load(
        vm,
        "pmem_start=4608M pmem_size=512M pmem_count=2 kmem_start=4G kmem_size=512M kmem_format=blk",
    )?;
    vm.sh_for(
        "mkfs.ext4 -q -F -b 4096 /dev/pmem0; mkdir -p /mnt/a; mount -o dax=always /dev/pmem0 /mnt/a
         pmem-guest mmap-sync /mnt/a/x 33333333 1
         pmem-guest fill /mnt/a/y 33333333 2
         pmem-guest fill /tmp/z 33554432 3
         for disk in pmem1 kmem1; do dd if=/tmp/z of=/dev/$disk bs=1M oflag=direct 2>/dev/null; done",
        LONG,
    )?;
    vm.sh("cd /tmp; truncate -s 192k /mnt/a/mapped; touch hog mapper
         ( ( echo 'mmap -rw 0 192k'; echo 'mwrite -S 0x61 0 128k'
             until [ -e awake ]; do sleep 0.1; done
             echo 'mwrite -S 0x62 64k 64k'; echo 'msync -s 0 192k' ) | xfs_io /mnt/a/mapped
           echo $? >mapped ) >mapper 2>&1 &
         ( numactl --preferred=1 pmem-guest hog 67108864 12345 /tmp/awake
           echo $? >hogged ) >hog 2>&1 &
         for i in $(seq 100); do
             if grep -q ready hog && [ \"$(dd if=/mnt/a/mapped bs=1 skip=131071 count=1 2>/dev/null | tr '\\0' 0)\" = a ]
             then exit 0; fi
             sleep 0.2
         done
         cat hog mapper; exit 1")
        .map(drop)
}

/// Stops the machine until its clock starts it, and looks whether that was done.
///
/// When Linux wakes up, it asks QEMU whether anybody listens to the agent, before it has room for the reply, which
/// QEMU drops: the agent would wait for ever. So the driver of its port is bound anew.
pub(super) fn suspend(vm: &Vm) -> Result<()> {
    // The alarm must come after everything has stopped.
    let times = vm.sh_for(
        "echo deep >/sys/power/mem_sleep
         echo +30 >/sys/class/rtc/rtc0/wakealarm
         echo mem >/sys/power/state
         cat /sys/power/suspend_stats/success
         cd /sys/bus/virtio/drivers/virtio_console
         for device in virtio*; do echo $device >unbind; echo $device >bind; done",
        LONG,
    )?;
    ensure!(times.trim() == "1", "{times}");
    let dmesg = vm.dmesg()?;
    ensure!(
        dmesg.contains("Waking up from system sleep state S3"),
        "{dmesg}"
    );
    Ok(())
}

/// Goes on with what [`begin`] has begun, and looks at all data.
fn end(vm: &Vm) -> Result<()> {
    let codes = vm.sh("cd /tmp; touch awake
         for i in $(seq 100); do [ -s mapped ] && [ -s hogged ] && break; sleep 0.2; done
         cat mapped hogged")?;
    ensure!(
        codes == "0\n0\n",
        "{codes}\n{}",
        vm.sh("cat /tmp/mapper /tmp/hog")?
    );
    // What was stored before, what was overwritten after, and what was never.
    let data = vm.read("/mnt/a/mapped")?;
    ensure!(data.len() == 192 << 10, "{}", data.len());
    for (part, byte) in data.chunks(64 << 10).zip(*b"ab\0") {
        ensure!(part.iter().all(|&found| found == byte), "{byte}");
    }
    vm.sh_for(
        "pmem-guest verify /mnt/a/x 33333333 1
         pmem-guest mmap-verify /mnt/a/y 33333333 2
         pmem-guest mmap-sync /mnt/a/new 33333333 4
         umount /mnt/a; e2fsck -fn /dev/pmem0
         for disk in pmem1 kmem1; do
             dd if=/dev/$disk of=/tmp/z bs=1M count=32 iflag=direct 2>/dev/null
             pmem-guest verify /tmp/z 33554432 3
             dd if=/tmp/z of=/dev/$disk bs=1M seek=32 oflag=direct 2>/dev/null
         done
         echo unplugged >/sys/devices/faux/kmem1/state",
        LONG,
    )?;
    unload(vm)
}

#[test]
fn a_machine_that_was_suspended_goes_on() -> Result<()> {
    let Some(machine) = debian()? else {
        return Ok(());
    };
    // QEMU resets a machine that was started with a vmlinux when it wakes up.
    boot(machine.packed(), |vm| {
        begin(vm)?;
        suspend(vm)?;
        end(vm)
    })
}
