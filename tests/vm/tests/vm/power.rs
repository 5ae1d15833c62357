// SPDX-License-Identifier: GPL-2.0-only

//! Power failures: the machine is killed, and another one boots on the same memory.

use anyhow::Result;
use vm_tests::{boot, cut, load, stock, Persistent, GIB};

const LOAD: &str = "pmem_start=4G pmem_size=1GiB pmem_count=2";

fn survives(module: Option<&str>, mkfs: &str, check: &str) -> Result<()> {
    let memory = Persistent::new(GIB)?;
    let machine = || -> Result<_> {
        let machine = stock()?.persistent(&memory);
        Ok(match module {
            Some(name) => machine.module(name),
            None => machine,
        })
    };
    cut(machine()?, |vm| {
        load(vm, LOAD)?;
        vm.sh(&format!(
            "{mkfs} /dev/pmem0; mkdir -p /mnt/a; mount -o dax=always /dev/pmem0 /mnt/a
             pmem-guest fill /mnt/a/fsync 20000000 1
             pmem-guest mmap-msync /mnt/a/msync 20000000 2
             pmem-guest mmap-sync /mnt/a/sync 20000000 3
             xfs_io -c fsync /mnt/a"
        ))?;
        // Synced, and then changed without a sync: old and new are both right, anything else is not.
        vm.sh("echo junk >>/mnt/a/unsynced")?;
        Ok(())
    })?;
    boot(machine()?, |vm| {
        load(vm, LOAD)?;
        vm.sh("mkdir -p /mnt/a; mount -o dax=always /dev/pmem0 /mnt/a")?;
        for (n, name) in [(1, "fsync"), (2, "msync"), (3, "sync")] {
            vm.sh(&format!("pmem-guest verify /mnt/a/{name} 20000000 {n}"))?;
        }
        vm.sh(&format!("umount /mnt/a; {check} /dev/pmem0"))?;
        Ok(())
    })
}

#[test]
fn ext4_files_survive() -> Result<()> {
    survives(None, "mkfs.ext4 -q -F -b 4096", "e2fsck -fn")
}

#[test]
fn xfs_files_survive() -> Result<()> {
    survives(Some("xfs"), "mkfs.xfs -q -f -m reflink=0", "xfs_repair -n")
}

/// A completed write is durable, whether or not a flush follows.
#[test]
fn completed_writes_survive() -> Result<()> {
    let memory = Persistent::new(GIB)?;
    cut(stock()?.persistent(&memory), |vm| {
        load(vm, LOAD)?;
        vm.sh("pmem-guest fill /tmp/x 16777216 5
             dd if=/tmp/x of=/dev/pmem0 bs=64k oflag=direct 2>/dev/null
             dd if=/tmp/x of=/dev/pmem1 bs=1M oflag=direct seek=3 2>/dev/null
             blkdiscard -z -o 1048576 -l 4096 /dev/pmem1")?;
        Ok(())
    })?;
    boot(stock()?.persistent(&memory), |vm| {
        load(vm, LOAD)?;
        vm.sh(
            "dd if=/dev/pmem0 of=/tmp/x bs=1M count=16 2>/dev/null; pmem-guest verify /tmp/x 16777216 5
             dd if=/dev/pmem1 of=/tmp/x bs=1M count=16 skip=3 2>/dev/null; pmem-guest verify /tmp/x 16777216 5",
        )?;
        Ok(())
    })
}
