// SPDX-License-Identifier: GPL-2.0-only

//! A kernel that is started by another one, without the firmware: it must leave the ranges alone, and find what was
//! synced.

use anyhow::{ensure, Result};
use std::time::Duration;
use vm_tests::{boot, boot_dirty, debian, load, unload, GIB, MIB, UPPER};
use xtask::vm::{Builder, Vm, NEXT_INITRD, NEXT_KERNEL};

const LOAD: &str = "pmem_start=4G pmem_size=1G pmem_count=2";

/// A machine that can start another kernel.
fn machine() -> Result<Option<Builder<'static>>> {
    Ok(debian()?.map(|machine| machine.ram(2 * GIB).next_kernel()))
}

/// What is another one with each kernel that starts.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// What takes minutes of an emulated CPU.
const LONG: Duration = Duration::from_secs(300);

/// Loads a kernel to be started, as `how` says.
fn load_next(vm: &Vm, how: &str) -> Result<()> {
    vm.sh_for(
        &format!("kexec -s {how} {NEXT_KERNEL} --initrd={NEXT_INITRD} --reuse-cmdline"),
        LONG,
    )
    .map(drop)
}

/// Writes to both disks: one is mounted, and stays so, the other has bytes at both of its ends.
fn fill(vm: &Vm) -> Result<()> {
    load(vm, LOAD)?;
    vm.sh_for(
        "mkfs.ext4 -q -F -b 4096 /dev/pmem0; mkdir -p /mnt/a; mount -o dax=always /dev/pmem0 /mnt/a
         pmem-guest mmap-sync /mnt/a/x 33333333 1
         pmem-guest fill /mnt/a/y 33333333 2
         pmem-guest fill /tmp/z 33554432 3
         for n in 0 480; do dd if=/tmp/z of=/dev/pmem1 bs=1M seek=$n oflag=direct 2>/dev/null; done
         rm /tmp/z",
        LONG,
    )
    .map(drop)
}

/// Looks whether the kernel that runs has let the range alone.
fn verify(vm: &Vm) -> Result<()> {
    let iomem = vm.text("/proc/iomem")?;
    for line in iomem.lines().filter(|line| line.contains("System RAM")) {
        let (_, last) = line.split_once('-').unwrap_or_default();
        let digits: String = last.chars().take_while(char::is_ascii_hexdigit).collect();
        let last = u64::from_str_radix(&digits, 16)?;
        ensure!(last < UPPER, "{iomem}");
    }
    load(vm, LOAD)?;
    vm.sh_for(
        "mkdir -p /mnt/a; mount -o dax=always /dev/pmem0 /mnt/a
         pmem-guest verify /mnt/a/x 33333333 1
         pmem-guest mmap-verify /mnt/a/y 33333333 2
         umount /mnt/a; e2fsck -fn /dev/pmem0
         for n in 0 480; do
             dd if=/dev/pmem1 of=/tmp/z bs=1M count=32 skip=$n iflag=direct 2>/dev/null
             pmem-guest verify /tmp/z 33554432 3
         done",
        LONG,
    )?;
    unload(vm)
}

#[test]
fn the_next_kernel_finds_the_data() -> Result<()> {
    let Some(machine) = machine()? else {
        return Ok(());
    };
    boot(machine, |vm| {
        fill(vm)?;
        load_next(vm, "-l")?;
        let first = vm.text(BOOT_ID)?;
        vm.into_next_kernel("kexec -e")?;
        assert_ne!(vm.text(BOOT_ID)?, first);
        verify(vm)
    })
}

#[test]
fn a_crash_kernel_finds_the_data() -> Result<()> {
    let Some(machine) = machine()? else {
        return Ok(());
    };
    boot_dirty(machine.cmdline("crashkernel=512M"), |vm| {
        fill(vm)?;
        load_next(vm, "-p")?;
        vm.into_next_kernel("echo c >/proc/sysrq-trigger")?;
        // It is the memory that was set aside, and the old kernel's is there as a file.
        let kib = vm.sh("sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo")?;
        let total = kib.trim().parse::<u64>()? << 10;
        ensure!(total < 512 * MIB, "{total}");
        vm.sh("test -e /proc/vmcore")?;
        verify(vm)
    })
}
