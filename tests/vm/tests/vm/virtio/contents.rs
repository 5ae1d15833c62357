// SPDX-License-Identifier: GPL-2.0-only

//! What is in a device: file systems with DAX, and the host's file.

use super::{machine, serve, EXT4, LONG, SIZE, XFS};
use anyhow::{ensure, Context, Result};
use std::fs::File;
use std::os::unix::fs::FileExt;
use vm_tests::{boot, cut, Persistent, MIB};
use xtask::vm::Vm;

/// Programs that look for persistent memory, and the block layer, go by these.
#[test]
fn the_disk_says_what_it_is() -> Result<()> {
    let memory = Persistent::new(64 * MIB)?;
    boot(machine(&memory)?, |vm| {
        serve(vm)?;
        let says = |file: &str, what: &str| -> Result<()> {
            let said = vm.text(&format!("/sys/block/pmem0/{file}"))?;
            ensure!(said.trim() == what, "{file}: {said:?}, not {what:?}");
            Ok(())
        };
        // What is written is durable after a flush, and not before.
        says("queue/write_cache", "write back")?;
        says("queue/fua", "1")?;
        says("queue/dax", "1")?;
        says("size", &(64 * MIB / 512).to_string())?;
        says("pmem/provider", "virtio")?;
        says("pmem/durability", "durable after a flush")?;
        says("pmem/size", &(64 * MIB).to_string())?;
        Ok(())
    })
}

/// All ways to write a file, with DAX; the file system is whole afterwards.
fn use_it(vm: &Vm, mkfs: &str, check: &str) -> Result<()> {
    serve(vm)?;
    vm.sh_for(
        &format!("{mkfs}; mkdir -p /mnt/a; mount -o dax=always /dev/pmem0 /mnt/a"),
        LONG,
    )?;
    let mounts = vm.sh("grep /mnt/a /proc/mounts")?;
    ensure!(mounts.contains("dax=always"), "{mounts}");
    // Without a flush nothing is durable, so a program that means to do without must be told.
    let ran = vm.try_sh("pmem-guest mmap-sync /mnt/a/no 4096 1")?;
    ensure!(ran.stderr.contains("os error 95"), "MAP_SYNC: {ran:?}");
    let files = [1, 511, 4096, 1 << 20, 33_333_333];
    for (n, len) in (1..).zip(files) {
        vm.sh(&format!(
            "pmem-guest fill /mnt/a/fill{n} {len} {n}
             pmem-guest mmap-msync /mnt/a/msync{n} {len} {n}
             pmem-guest mmap-verify /mnt/a/fill{n} {len} {n}
             pmem-guest verify /mnt/a/msync{n} {len} {n}"
        ))?;
    }
    for sync in ["--fsync=3", "--fdatasync=2", "--sync=dsync", "--sync=sync"] {
        vm.sh_for(
            &format!(
                "fio --name=x --directory=/mnt/a --size=4m --rw=randwrite --bsrange=1k-16k --ioengine=psync \\
                     --numjobs=2 {sync} --verify=crc32c --verify_fatal=1 >/tmp/fio || {{ cat /tmp/fio; exit 1; }}"
            ),
            LONG,
        )?;
    }
    vm.sh_for(
        &format!("umount /mnt/a; {check}; mount -o dax=always /dev/pmem0 /mnt/a"),
        LONG,
    )?;
    for (n, len) in (1..).zip(files) {
        vm.sh(&format!(
            "pmem-guest verify /mnt/a/fill{n} {len} {n}
             pmem-guest mmap-verify /mnt/a/msync{n} {len} {n}"
        ))?;
    }
    vm.sh("umount /mnt/a").map(drop)
}

#[test]
fn ext4_with_dax() -> Result<()> {
    let memory = Persistent::new(SIZE)?;
    boot(machine(&memory)?, |vm| {
        use_it(vm, EXT4, "e2fsck -fn /dev/pmem0")
    })
}

#[test]
fn xfs_with_dax() -> Result<()> {
    let memory = Persistent::new(SIZE)?;
    boot(machine(&memory)?, |vm| {
        use_it(vm, XFS, "xfs_repair -n /dev/pmem0")
    })
}

/// A disk as any other: O_DIRECT and the page cache, with each way to flush it.
#[test]
fn a_disk_without_a_file_system() -> Result<()> {
    let memory = Persistent::new(64 * MIB)?;
    boot(machine(&memory)?, |vm| {
        serve(vm)?;
        for (direct, sync) in [
            (0, "--fsync=4"),
            (1, "--fsync=4"),
            (0, "--sync=dsync"),
            (1, "--sync=dsync"),
        ] {
            vm.sh_for(
                &format!(
                    "fio --name=x --filename=/dev/pmem0 --size=8m --rw=randwrite --bs=4k --ioengine=psync \\
                         --direct={direct} --numjobs=2 --offset_increment=8m {sync} \\
                         --verify=crc32c --verify_fatal=1 >/tmp/fio || {{ cat /tmp/fio; exit 1; }}"
                ),
                LONG,
            )?;
        }
        Ok(())
    })
}

/// What was synced is there after a power failure, also for who has the kernel's own driver: the layout is the same.
fn survives(mkfs: &str, check: &str) -> Result<()> {
    let memory = Persistent::new(SIZE)?;
    cut(machine(&memory)?, |vm| {
        serve(vm)?;
        vm.sh_for(
            &format!(
                "{mkfs}; mkdir -p /mnt/a; mount -o dax=always /dev/pmem0 /mnt/a
                 pmem-guest fill /mnt/a/fsync 20000000 1
                 pmem-guest mmap-msync /mnt/a/msync 20000000 2
                 xfs_io -c fsync /mnt/a
                 echo junk >/mnt/a/unsynced"
            ),
            LONG,
        )
        .map(drop)
    })?;
    let verify = |vm: &Vm| {
        vm.sh_for(
            &format!(
                "mkdir -p /mnt/a; mount -o dax=always /dev/pmem0 /mnt/a
                 pmem-guest verify /mnt/a/fsync 20000000 1
                 pmem-guest verify /mnt/a/msync 20000000 2
                 umount /mnt/a; {check}"
            ),
            LONG,
        )
    };
    let theirs = machine(&memory)?.module("virtio_pmem").module("nd_pmem");
    boot(theirs, |vm| verify(vm).map(drop))?;
    boot(machine(&memory)?, |vm| {
        serve(vm)?;
        verify(vm).map(drop)
    })
}

#[test]
fn ext4_survives_a_power_failure() -> Result<()> {
    survives(EXT4, "e2fsck -fn /dev/pmem0")
}

#[test]
fn xfs_survives_a_power_failure() -> Result<()> {
    survives(XFS, "xfs_repair -n /dev/pmem0")
}

/// The disk is the host's file: what is synced here is read there, at the same place, and the other way round.
#[test]
fn the_disk_is_the_file_of_the_host() -> Result<()> {
    let memory = Persistent::new(64 * MIB)?;
    let file = File::options().read(true).write(true).open(memory.path())?;
    file.write_all_at(b"from the host", 64 * MIB - 512)?;
    let machine = machine(&memory)?;
    boot(machine, |vm| {
        serve(vm)?;
        let last = vm.sh("dd if=/dev/pmem0 bs=512 skip=131071 2>/dev/null | head -c 13")?;
        ensure!(last == "from the host", "{last:?}");
        for (how, command, at) in [
            ("", "-c fsync", 3),
            ("-d", "", 5),
            ("-s", "", 7),
            ("-ds", "", 9),
        ] {
            vm.sh(&format!(
                "xfs_io {how} -c 'pwrite -q -S {at} {at}k 1k' {command} /dev/pmem0"
            ))?;
            let mut block = [0; 1024];
            file.read_exact_at(&mut block, at * 1024)?;
            ensure!(block.iter().all(|&b| u64::from(b) == at), "{how}{command}");
        }
        let before = file.metadata().context("the file has gone")?.len();
        ensure!(before == 64 * MIB, "the file has grown to {before}");
        Ok(())
    })
}
