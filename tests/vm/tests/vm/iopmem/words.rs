// SPDX-License-Identifier: GPL-2.0-only

//! How the CPUs access a BAR, as QEMU sees it.

use super::{place, serve, LONG};
use anyhow::{ensure, Result};
use vm_tests::{boot, stock, unload, Persistent, MIB};
use xtask::vm::{Accesses, Kind, Shape, Vm};

const LEN: u64 = 8 * MIB;

/// The only shapes that the driver's accesses may have.
fn is_word(shape: &Shape) -> bool {
    shape.aligned && shape.size == 8
}

/// How many words were loaded or stored, of accesses that are all of words.
fn words(vm: &Vm, what: &str, kind: Kind) -> Result<u64> {
    let accesses = vm.accesses()?;
    let others = accesses.except(is_word);
    ensure!(others.is_empty(), "{what}: {}", vm.explain(&others)?);
    Ok(count(&accesses, kind))
}

fn count(accesses: &Accesses, kind: Kind) -> u64 {
    let shapes = accesses.shapes();
    shapes.get(&Shape::aligned(kind, 8)).copied().unwrap_or(0)
}

/// A device that can do nothing else serves the disk, a file system on it, and all that the block layer asks for.
#[test]
fn the_disk_accesses_aligned_words_alone() -> Result<()> {
    let memory = Persistent::new(LEN)?;
    let machine = stock()?.upper(0).bar(&memory).watch_accesses();
    boot(machine, |vm| {
        for params in ["", "iopmem_cache=uc", "iopmem_cache=wb iopmem_dax=0"] {
            let start = place(vm, &vm.bar(0))?;
            vm.watch(start..start + LEN)?;
            serve(vm, params)?;
            let told = |what: &str| format!("{params}: {what}");
            // Who looks for partitions reads.
            let loads = words(vm, &told("a new disk"), Kind::Load)?;
            ensure!(loads >= 512, "{params}: {loads} words were loaded");

            vm.sh("dd if=/dev/zero of=/tmp/x bs=64k count=1 2>/dev/null")?;
            for (what, script, stores, loads) in [
                (
                    "a write",
                    "dd if=/tmp/x of=/dev/iopmem0 bs=64k oflag=direct",
                    8192,
                    0,
                ),
                // Of the write that asks for it, and of the flush that the block layer asks for before it is done.
                (
                    "a write with FUA",
                    "xfs_io -ds -c 'pwrite -q 0 512' /dev/iopmem0",
                    64,
                    1,
                ),
                (
                    "a read",
                    "dd if=/dev/iopmem0 of=/dev/null bs=64k count=1 iflag=direct",
                    0,
                    8192,
                ),
                (
                    "zeroes",
                    "blkdiscard -z -o 4096 -l 65536 /dev/iopmem0",
                    8192,
                    0,
                ),
                ("a flush", "sync /dev/iopmem0", 0, 1),
            ] {
                vm.watch(start..start + LEN)?;
                vm.sh(&format!("{script} 2>/dev/null"))?;
                let done = (
                    words(vm, &told(what), Kind::Store)?,
                    words(vm, &told(what), Kind::Load)?,
                );
                // udev, or who else opens disks, may read.
                ensure!(
                    done.0 == stores && done.1 >= loads && (loads != 0 || done.1 % 64 <= 8),
                    "{params}: {what}: {done:?} words were stored and loaded"
                );
            }

            vm.watch(start..start + LEN)?;
            vm.sh_for(
                &format!(
                    "pmem-guest direct-write /dev/iopmem0 {LEN} 1
                     pmem-guest direct-verify /dev/iopmem0 {LEN} 1
                     mkfs.ext4 -q -F -b 4096 /dev/iopmem0; mkdir -p /mnt/a
                     mount /dev/iopmem0 /mnt/a
                     pmem-guest fill /mnt/a/x 1000003 2
                     umount /mnt/a; mount /dev/iopmem0 /mnt/a
                     pmem-guest verify /mnt/a/x 1000003 2
                     umount /mnt/a"
                ),
                LONG,
            )?;
            let stores = words(
                vm,
                &told("requests of odd shapes, and a file system"),
                Kind::Store,
            )?;
            ensure!(stores > LEN / 8, "{params}: {stores} words were stored");
            unload(vm)?;
        }
        Ok(())
    })
}

/// What the kernel copies for files with DAX is not the driver's, and has any shape.
#[test]
fn files_with_dax_are_accessed_as_the_kernel_does() -> Result<()> {
    let memory = Persistent::new(LEN)?;
    let machine = stock()?.upper(0).bar(&memory).watch_accesses();
    boot(machine, |vm| {
        serve(vm, "")?;
        vm.sh_for(
            "mkfs.ext4 -q -F -b 4096 /dev/iopmem0; mkdir -p /mnt/a
             mount -o dax=always /dev/iopmem0 /mnt/a; echo abc >/mnt/a/x; sync",
            LONG,
        )?;
        let start = place(vm, &vm.bar(0))?;
        vm.watch(start..start + LEN)?;
        vm.sh("printf defgh >>/mnt/a/x; xfs_io -c fsync /mnt/a/x; cat /mnt/a/x")?;
        let others = vm.accesses()?.except(is_word);
        ensure!(!others.is_empty(), "9 bytes are not words");
        let whose = vm.explain(&others)?;
        ensure!(!whose.contains("[pmem]"), "{whose}");
        vm.sh("umount /mnt/a")?;
        unload(vm)
    })
}
