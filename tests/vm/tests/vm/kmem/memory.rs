// SPDX-License-Identifier: GPL-2.0-only

//! How much RAM there is: all but what data takes, to the page.

use super::{
    attribute, load_movable, meminfo, prepare, ram, set_state, take_down, BLK, BLOCKS, PAGE, PAGES,
};
use anyhow::{ensure, Result};
use vm_tests::{boot, load, stock, Trace};
use xtask::vm::{Vm, PMEM_KO};

/// Who wants RAM alone gets it, and gets rid of it again.
#[test]
fn format_none_is_ram_but_for_its_superblocks() -> Result<()> {
    boot(stock()?, |vm| {
        // What a first load leaves in any case, such as a taint, is there before the first look.
        vm.insmod(PMEM_KO, "pmem_virtio=0 iopmem=0")?.unwrap_err();
        prepare(vm)?;
        let before = Trace::of(vm)?;
        assert_eq!(meminfo(vm, 1, "MemTotal")?, 0);

        load(vm, "kmem_start=4G kmem_size=1G kmem_format=none")?;
        assert_eq!(ram(vm)?, PAGES - 2);
        let free = meminfo(vm, 1, "MemFree")?;
        ensure!(free > PAGES - 4096, "only {free} pages are free");
        assert_eq!(attribute(vm, "format")?, "none");
        assert_eq!(vm.sh("ls /sys/block")?.trim(), "");

        take_down(vm)?;
        assert_eq!(meminfo(vm, 1, "MemTotal")?, 0);
        Trace::of(vm)?.check(&before)
    })
}

/// Does `script`, and looks how many pages fewer are RAM then.
fn cost(vm: &Vm, script: &str) -> Result<i64> {
    let before = ram(vm)?;
    vm.sh(script)?;
    Ok(before as i64 - ram(vm)? as i64)
}

/// A disk that takes more than its data is one of which nobody knows when RAM runs out; and one that gives nothing
/// back is no better than memory that is set aside.
#[test]
fn a_block_is_ram_as_long_as_it_has_no_data() -> Result<()> {
    // What is done, and how many pages it takes.
    const STEPS: &[(&str, i64)] = &[
        // 16 MiB, and the same once more, from the start and at the end.
        ("dd if=/tmp/x of=/dev/kmem1 bs=1M oflag=direct", 4096),
        ("dd if=/tmp/x of=/dev/kmem1 bs=64k oflag=direct", 0),
        (
            "dd if=/tmp/x of=/dev/kmem1 bs=4k seek=257279 oflag=direct",
            4096,
        ),
        // One block; half of what is written is new.
        (
            "dd if=/tmp/x of=/dev/kmem1 bs=4k count=1 seek=100000 oflag=direct",
            1,
        ),
        (
            "dd if=/tmp/x of=/dev/kmem1 bs=1M count=2 seek=15 oflag=direct",
            256,
        ),
        // Through the page cache.
        (
            "dd if=/tmp/x of=/dev/kmem1 bs=4k count=3 seek=200000 conv=fsync",
            3,
        ),
        // Back to RAM: discard, of blocks with and without data, and zeroes that may free.
        ("blkdiscard -o 4096 -l 8192 /dev/kmem1", -2),
        ("blkdiscard -o 0 -l 16384 /dev/kmem1", -2),
        ("xfs_io -d -c 'fpunch 16k 32k' /dev/kmem1", -8),
        ("xfs_io -d -c 'fpunch 0 1m' /dev/kmem1", -244),
        // Zeroes that must not: who asks for them wants to have the room.
        ("xfs_io -d -c 'fzero 0 64k' /dev/kmem1", 16),
        ("blkdiscard -z -o 0 -l 128KiB /dev/kmem1", 16),
        ("blkdiscard -z -o 0 -l 128KiB /dev/kmem1", 0),
        (
            "blkdiscard /dev/kmem1",
            -32 - (4096 + 256 - 256) - 4096 - 1 - 3,
        ),
        ("blkdiscard /dev/kmem1", 0),
    ];
    boot(stock()?, |vm| {
        vm.sh("pmem-guest fill /tmp/x 16777216 1")?;
        load_movable(vm, BLK)?;
        assert_eq!(ram(vm)?, BLOCKS);
        let size: u64 = vm.text("/sys/block/kmem1/size")?.trim().parse()?;
        assert_eq!(size * 512, BLOCKS * PAGE);
        for (script, pages) in STEPS {
            let script = format!("{script} 2>/dev/null");
            assert_eq!(cost(vm, &script)?, *pages, "{script}");
        }
        assert_eq!(ram(vm)?, BLOCKS);

        // What was discarded reads as zeros, and what was not is still there.
        vm.sh("dd if=/tmp/x of=/dev/kmem1 bs=1M oflag=direct 2>/dev/null
             blkdiscard -o 1MiB -l 2MiB /dev/kmem1
             dd if=/dev/zero of=/tmp/x bs=1M seek=1 count=2 conv=notrunc 2>/dev/null
             dd if=/dev/kmem1 of=/tmp/y bs=1M count=16 iflag=direct 2>/dev/null
             pmem-guest compare /tmp/x /dev/kmem1 16777216")?;
        take_down(vm)
    })
}

/// A file takes its blocks, and removing it gives them back, if the file system says so.
#[test]
fn a_file_is_ram_again_when_it_is_removed_and_trimmed() -> Result<()> {
    const FILE: u64 = 100_000_000;
    const FILE_BLOCKS: i64 = FILE.div_ceil(PAGE) as i64;
    boot(stock()?, |vm| {
        load_movable(vm, BLK)?;
        // The blocks of a journal would be written for the first time whenever it comes to them.
        vm.sh("mkfs.ext4 -q -F -b 4096 -O ^has_journal /dev/kmem1; mkdir -p /mnt/a; mount /dev/kmem1 /mnt/a")?;
        let fill = format!("pmem-guest fill /mnt/a/x {FILE} 1; sync");
        let verify =
            format!("echo 3 >/proc/sys/vm/drop_caches; pmem-guest verify /mnt/a/x {FILE} 1");
        let remove = "rm /mnt/a/x; sync; fstrim /mnt/a";
        // The first file brings metadata that stay: bitmaps, the blocks of inodes.
        let first = cost(vm, &fill)?;
        ensure!(
            (FILE_BLOCKS..FILE_BLOCKS + 64).contains(&first),
            "{first} pages for {FILE_BLOCKS} blocks"
        );
        cost(vm, &verify)?;
        cost(vm, remove)?;
        let empty = ram(vm)?;
        for _ in 0..3 {
            assert_eq!(cost(vm, &fill)?, FILE_BLOCKS);
            assert_eq!(cost(vm, &verify)?, 0);
            assert_eq!(cost(vm, remove)?, -FILE_BLOCKS);
            assert_eq!(ram(vm)?, empty);
        }
        vm.sh("umount /mnt/a; e2fsck -fn /dev/kmem1; blkdiscard -f /dev/kmem1")?;
        assert_eq!(ram(vm)?, BLOCKS);
        take_down(vm)
    })
}

/// Offline, the disk is there and none of it is RAM; what is written meanwhile is there when it is online again.
#[test]
fn offline_keeps_the_disk_and_gives_no_ram() -> Result<()> {
    boot(stock()?, |vm| {
        load_movable(vm, BLK)?;
        vm.sh("pmem-guest fill /tmp/x 16777216 1
             dd if=/tmp/x of=/dev/kmem1 bs=1M oflag=direct 2>/dev/null")?;
        set_state(vm, "offline")?;
        assert_eq!(ram(vm)?, 0);
        vm.sh(
            "dd if=/tmp/x of=/dev/kmem1 bs=1M seek=16 oflag=direct 2>/dev/null
             blkdiscard -o 8MiB -l 16MiB /dev/kmem1",
        )?;
        assert_eq!(ram(vm)?, 0);
        set_state(vm, "online")?;
        assert_eq!(ram(vm)?, BLOCKS - 4096);
        vm.sh("pmem-guest compare /tmp/x /dev/kmem1 8388608
             dd if=/dev/kmem1 bs=1M skip=24 count=8 iflag=direct of=/tmp/y 2>/dev/null
             dd if=/tmp/x bs=1M skip=8 2>/dev/null | cmp - /tmp/y")?;
        take_down(vm)
    })
}
