// SPDX-License-Identifier: GPL-2.0-only

//! What is on the disk: all that was written, nothing that was not.

use super::{
    attribute, census, groups, load_movable, ram, set_state, take_down, Census, Hog, BLK, PAGE,
};
use anyhow::{ensure, Result};
use std::fs;
use vm_tests::{boot, cut, load, stock, Persistent, GIB, MIB};

/// In each word of a process that has a secret.
const SECRET: u64 = 0x7365_6372_6574_2121;

/// Whoever may read the disk must not read the memory of processes.
#[test]
fn memory_of_processes_is_never_on_the_disk() -> Result<()> {
    boot(stock()?, |vm| {
        load_movable(vm, "kmem_start=4G kmem_size=256M kmem_format=blk")?;
        groups(vm)?;
        let blocks = ram(vm)?;
        let nothing = Census {
            zero: blocks,
            word: 0,
            other: 0,
        };
        let hog = Hog::fill(vm, 1, SECRET)?;
        assert_eq!(census(vm, SECRET)?, nothing);
        hog.end()?;
        assert_eq!(census(vm, SECRET)?, nothing);

        // Every seventh block, which gets a page that had the secret.
        vm.sh(
            "cd /tmp; fio --name=write --filename=/dev/kmem1 --direct=1 --rw=write:24k --bs=4k --io_size=32m \\
             --buffer_pattern=0x5a --output=report || { cat report; exit 1; }",
        )?;
        let some = Census {
            zero: blocks - 8192,
            word: 0,
            other: 8192,
        };
        assert_eq!(census(vm, SECRET)?, some);
        // Once more, and discarded, with other pages in between.
        let hog = Hog::fill(vm, 1, SECRET)?;
        assert_eq!(census(vm, SECRET)?, some);
        hog.end()?;
        vm.sh("blkdiscard /dev/kmem1")?;
        assert_eq!(census(vm, SECRET)?, nothing);
        take_down(vm)
    })
}

/// A disk is for file systems.
#[test]
fn file_systems_outlive_an_unplug() -> Result<()> {
    for (module, mkfs, check) in [
        (None, "mkfs.ext4 -q -F", "e2fsck -fn"),
        (Some("xfs"), "mkfs.xfs -q -f", "xfs_repair -n"),
    ] {
        let machine = match module {
            Some(name) => stock()?.module(name),
            None => stock()?,
        };
        boot(machine, |vm| {
            load_movable(vm, BLK)?;
            vm.sh(&format!(
                "{mkfs} /dev/kmem1; mkdir -p /mnt/a; mount /dev/kmem1 /mnt/a
                 mkdir /mnt/a/many; for i in $(seq 300); do echo $i >/mnt/a/many/$i; done"
            ))?;
            for (n, len) in (1..).zip([1, 4095, 4096, 1 << 20, 33_333_333]) {
                vm.sh(&format!(
                    "pmem-guest fill /mnt/a/fill{n} {len} {n}; pmem-guest mmap-msync /mnt/a/map{n} {len} {n}"
                ))?;
            }
            let verify = || -> Result<()> {
                vm.sh("echo 3 >/proc/sys/vm/drop_caches")?;
                for (n, len) in (1..).zip([1, 4095, 4096, 1 << 20, 33_333_333]) {
                    vm.sh(&format!(
                        "pmem-guest verify /mnt/a/fill{n} {len} {n}; pmem-guest mmap-verify /mnt/a/map{n} {len} {n}"
                    ))?;
                }
                assert_eq!(vm.sh("cat /mnt/a/many/* | wc -l")?.trim(), "300");
                Ok(())
            };
            verify()?;
            let uuid = attribute(vm, "uuid")?;
            vm.sh("umount /mnt/a")?;
            set_state(vm, "unplugged")?;
            assert_eq!(vm.sh("ls /sys/block")?.trim(), "");
            set_state(vm, "online")?;
            assert_eq!(attribute(vm, "uuid")?, uuid);
            vm.sh(&format!("{check} /dev/kmem1; mount /dev/kmem1 /mnt/a"))?;
            verify()?;
            vm.sh("umount /mnt/a")?;
            take_down(vm)?;
            // It says itself what it is.
            load(vm, "kmem_start=4G kmem_size=1G")?;
            assert_eq!(attribute(vm, "uuid")?, uuid);
            vm.sh("mount /dev/kmem1 /mnt/a")?;
            verify()?;
            vm.sh("umount /mnt/a")?;
            take_down(vm)
        })?;
    }
    Ok(())
}

/// How many blocks have data is said, whoever has the pages of the others.
#[test]
fn blocks_with_data_are_counted() -> Result<()> {
    boot(stock()?, |vm| {
        load_movable(vm, BLK)?;
        let blocks = || -> Result<u64> { Ok(attribute(vm, "data")?.parse::<u64>()? / PAGE) };
        assert_eq!(blocks()?, 0);
        for (script, count) in [
            ("dd if=/dev/urandom of=/dev/kmem1 bs=4k seek=7 count=1000 oflag=direct 2>/dev/null", 1000),
            ("dd if=/dev/urandom of=/dev/kmem1 bs=4k seek=500 count=1000 oflag=direct 2>/dev/null", 1493),
            ("blkdiscard -o $((507 * 4096)) -l $((93 * 4096)) /dev/kmem1", 1400),
        ] {
            vm.sh(script)?;
            assert_eq!(blocks()?, count, "{script}");
        }
        for state in ["offline", "online", "offline"] {
            set_state(vm, state)?;
            assert_eq!(blocks()?, 1400, "{state}");
        }
        set_state(vm, "unplugged")?;
        assert_eq!(blocks()?, 0);
        set_state(vm, "online")?;
        assert_eq!(blocks()?, 1400);
        take_down(vm)
    })
}

/// What was synced is there after a power loss, and the range says that it was in use.
#[test]
fn files_outlive_a_power_loss() -> Result<()> {
    let memory = Persistent::new(GIB)?;
    cut(stock()?.persistent(&memory), |vm| {
        load_movable(vm, BLK)?;
        vm.sh(
            "mkfs.ext4 -q -F /dev/kmem1; mkdir -p /mnt/a; mount /dev/kmem1 /mnt/a
             pmem-guest fill /mnt/a/fsync 20000000 1
             pmem-guest mmap-msync /mnt/a/msync 20000000 2
             xfs_io -c fsync /mnt/a
             echo junk >>/mnt/a/unsynced",
        )?;
        Ok(())
    })?;
    boot(stock()?.persistent(&memory), |vm| {
        load_movable(vm, "kmem_start=4G kmem_size=1G")?;
        let log = super::said(vm);
        assert!(log.contains("was in use"), "{log}");
        vm.sh("mkdir -p /mnt/a; mount /dev/kmem1 /mnt/a
             pmem-guest verify /mnt/a/fsync 20000000 1
             pmem-guest verify /mnt/a/msync 20000000 2
             umount /mnt/a; e2fsck -fn /dev/kmem1")?;
        take_down(vm)
    })
}

/// How many pages of the file have `SECRET` in them.
fn secret_pages(memory: &Persistent) -> Result<usize> {
    let bytes = fs::read(memory.path())?;
    let word = SECRET.to_ne_bytes();
    let secret = |page: &&[u8]| page.chunks_exact(64).any(|line| line[..8] == word);
    Ok(bytes.chunks_exact(4096).filter(secret).count())
}

/// Memory of processes outlives the power, unless it is zeroed; and data must not be zeroed with it.
#[test]
fn scrubbing_leaves_no_memory_of_processes() -> Result<()> {
    const SIZE: u64 = 128 * MIB;
    let memory = Persistent::new(SIZE)?;
    boot(stock()?.persistent(&memory), |vm| {
        groups(vm)?;
        for scrub in [1, 0] {
            load_movable(
                vm,
                &format!("kmem_start=4G kmem_size=128M kmem_format=blk kmem_scrub={scrub}"),
            )?;
            vm.sh("pmem-guest fill /tmp/x 16777216 1; dd if=/tmp/x of=/dev/kmem1 bs=1M oflag=direct 2>/dev/null")?;
            // One is gone when the range is taken down, the other is moved away.
            Hog::start(vm, 1, 60 * MIB, SECRET)?.end()?;
            let hog = Hog::start(vm, 1, 20 * MIB, SECRET)?;
            ensure!(
                secret_pages(&memory)? > 10_000,
                "the secret is not found at all"
            );
            set_state(vm, "unplugged")?;
            let left = secret_pages(&memory)?;
            // It is said that it stays there otherwise.
            ensure!(
                (left == 0) == (scrub == 1),
                "{left} pages with kmem_scrub={scrub}"
            );
            hog.end()?;
            set_state(vm, "online")?;
            vm.sh("pmem-guest compare /tmp/x /dev/kmem1 16777216")?;
            take_down(vm)?;
        }
        Ok(())
    })
}
