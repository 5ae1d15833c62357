// SPDX-License-Identifier: GPL-2.0-only

//! What stops a device for a while: suspend to RAM, a reset of its PCI function, a reload of the driver.

use super::{machine, serve, LONG, SIZE, XFS};
use crate::suspend::suspend;
use anyhow::{ensure, Result};
use vm_tests::{boot, debian, unload, Persistent, Trace, MIB};

/// QEMU forgets all of its devices' state when the machine sleeps.
#[test]
fn a_machine_that_was_suspended_flushes_again() -> Result<()> {
    let memory = Persistent::new(SIZE)?;
    let Some(machine) = debian()? else {
        return Ok(());
    };
    let machine = machine
        .upper(0)
        .module("xfs")
        .packed()
        .virtio_pmem(&memory)
        .watch_flushes();
    boot(machine, |vm| {
        serve(vm)?;
        vm.sh_for(
            &format!(
                "{XFS}; mkdir -p /mnt/a; mount -o dax=always /dev/pmem0 /mnt/a
                 pmem-guest fill /mnt/a/x 3333333 1
                 pmem-guest mmap-msync /mnt/a/y 3333333 2
                 ( i=0; while echo $i >/mnt/a/new$((i % 20)) && xfs_io -c fsync /mnt/a/new$((i % 20))
                   do i=$((i + 1)); echo $i >/tmp/count; test -e /tmp/end && break; done
                   echo $? >/tmp/ended ) >/dev/null 2>&1 &"
            ),
            LONG,
        )?;
        suspend(vm)?;
        let asked = vm.flushes()?.len();
        vm.sh_for(
            "before=$(cat /tmp/count)
             for i in $(seq 300); do test $(cat /tmp/count) -gt $((before + 3)) && break; sleep 0.1; done
             touch /tmp/end
             for i in $(seq 300); do test -s /tmp/ended && break; sleep 0.1; done
             test $(cat /tmp/count) -gt $((before + 3))
             test $(cat /tmp/ended) = 0
             pmem-guest verify /mnt/a/x 3333333 1
             pmem-guest mmap-verify /mnt/a/y 3333333 2
             umount /mnt/a; xfs_repair -n /dev/pmem0",
            LONG,
        )?;
        ensure!(
            vm.flushes()?.len() > asked,
            "the host is not asked to flush"
        );
        unload(vm)
    })
}

/// The PCI function is reset under programs that sync: none fails, as what they asked for is sent again.
#[test]
fn a_reset_of_the_function_fails_nobody() -> Result<()> {
    let memory = Persistent::new(64 * MIB)?;
    boot(machine(&memory)?.watch_flushes(), |vm| {
        serve(vm)?;
        vm.sh_for(
            "( fio --name=x --filename=/dev/pmem0 --rw=randwrite --bs=4k --size=4m --fsync=1 --time_based --runtime=10 \\
                   --ioengine=psync --direct=1 --numjobs=4 --offset_increment=4m >/tmp/fio 2>&1
               echo $? >/tmp/ended ) &
             sleep 2
             for i in $(seq 5); do echo 1 >/sys/bus/pci/devices/0000:01:00.0/reset; sleep 0.5; done
             for i in $(seq 600); do test -s /tmp/ended && break; sleep 0.1; done
             test \"$(cat /tmp/ended)\" = 0 || { cat /tmp/fio; exit 1; }",
            LONG,
        )?;
        let asked = vm.flushes()?.len();
        vm.sh("sync /dev/pmem0")?;
        ensure!(vm.flushes()?.len() == asked + 1, "it is not asked to flush");
        unload(vm)
    })
}

/// A reload changes nothing, and leaves nothing.
#[test]
fn data_outlives_twenty_reloads() -> Result<()> {
    let memory = Persistent::new(64 * MIB)?;
    boot(machine(&memory)?, |vm| {
        serve(vm)?;
        vm.sh(
            "mkfs.ext4 -q -F -b 4096 /dev/pmem0; mkdir -p /mnt/a; mount -o dax=always /dev/pmem0 /mnt/a
             pmem-guest fill /mnt/a/x 1000000 1; umount /mnt/a",
        )?;
        unload(vm)?;
        let before = Trace::of(vm)?;
        for _ in 0..20 {
            serve(vm)?;
            vm.sh("mount -o dax=always /dev/pmem0 /mnt/a
                   pmem-guest verify /mnt/a/x 1000000 1
                   pmem-guest fill /mnt/a/x 1000000 1; umount /mnt/a")?;
            unload(vm)?;
        }
        Trace::of(vm)?.check(&before)
    })
}
