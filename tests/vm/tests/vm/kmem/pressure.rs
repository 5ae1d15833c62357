// SPDX-License-Identifier: GPL-2.0-only

//! Writes when memory is short: none is lost, none hangs, and none fails as long as there is a page.

use super::{groups, load_movable, ram, said, set_state, take_down, Hog, PAGE, TOO_MUCH};
use anyhow::{ensure, Result};
use std::time::Duration;
use vm_tests::{boot, has_kasan, load, stock, End, MIB};
use xtask::vm::Vm;

/// So small that it is full soon.
const SMALL: &str = "kmem_start=4G kmem_size=128M kmem_format=blk";

/// The blocks of such a disk, and its spare pages.
const BLOCKS: u64 = 32638;
const SPARE: u64 = 64;

/// Longer than anything here takes, if it ends at all.
const GUARD: Duration = Duration::from_secs(300);

/// How many processes that had memory the kernel has killed for want of it.
fn killed(vm: &Vm) -> Result<u32> {
    let count = vm.sh("dmesg | grep -c 'Out of memory: Killed process.*pmem-guest' || true")?;
    Ok(count.trim().parse()?)
}

/// Memory that processes use is the disk's as soon as it needs it, also when the kernel has none left for anybody.
#[test]
fn writes_succeed_beside_processes_that_run_out_of_memory() -> Result<()> {
    boot(stock()?, |vm| {
        load_movable(vm, SMALL)?;
        groups(vm)?;
        vm.sh(
            "printf 'label: gpt\\nstart=1MiB, size=48MiB\\nstart=49MiB\\n' | sfdisk -q /dev/kmem1
             mkfs.ext4 -q -F /dev/kmem1p1; mkdir -p /mnt/a; mount /dev/kmem1p1 /mnt/a",
        )?;
        // New blocks and old ones, past the page cache and through it.
        vm.sh_for(
            &format!(
                "cd /tmp
                 {TOO_MUCH}
                 for round in 1 2 3; do
                     fio --verify=crc32c --verify_fatal=1 --do_verify=1 --loops=2 --output=report --randseed=$round \\
                         --name=disk --filename=/dev/kmem1p2 --direct=1 --rw=randwrite --bsrange=4k-64k --size=24m \\
                         --name=files --directory=/mnt/a --nrfiles=4 --rw=randwrite --bs=4k --size=12m --fsync=64 \\
                         || {{ cat report; exit 1; }}
                     rm /mnt/a/*.*; fstrim /mnt/a; blkdiscard /dev/kmem1p2
                 done
                 touch stop
                 wait"
            ),
            GUARD,
        )?;
        let killed = killed(vm)?;
        ensure!(killed >= 3, "only {killed} processes ran out of memory");
        vm.sh("umount /mnt/a; e2fsck -fn /dev/kmem1p1")?;
        take_down(vm)
    })
}

/// Writes the first `mib` MiB of /tmp/x to the same place on the disk, from the MiB `from` on, and returns whether
/// there was room.
fn write(vm: &Vm, from: u64, mib: u64) -> Result<bool> {
    let script = format!(
        "dd if=/tmp/x of=/dev/kmem1 bs=1M skip={from} seek={from} count={mib} oflag=direct"
    );
    let ran = vm.run_for(&["sh", "-c", &script], GUARD)?;
    ensure!(
        ran.end == End::Exit(0) || ran.stderr.contains("No space left on device"),
        "{ran:?}"
    );
    Ok(ran.end == End::Exit(0))
}

/// Looks at the first `mib` MiB of the disk.
fn compare(vm: &Vm, mib: u64) -> Result<()> {
    vm.sh(&format!(
        "pmem-guest compare /tmp/x /dev/kmem1 {}",
        mib * MIB
    ))
    .map(drop)
}

/// Writes while there is room for a few blocks, and no more. Returns whether there was more: then nothing is said of the
/// rest.
fn finds_room(vm: &Vm) -> Result<bool> {
    ensure!(write(vm, 0, 4)?, "some is free");
    if write(vm, 4, 236)? {
        return Ok(true);
    }
    // Old blocks can be written all the time.
    for _ in 0..3 {
        ensure!(write(vm, 0, 4)?, "a block that had a page needs no more");
    }
    compare(vm, 4)?;
    // Who must not wait is told so, and does not need to for an old block.
    let said = vm.sh(
        "cd /tmp; xfs_io -d -c 'pwrite -V 1 -N -b 4k -i x 0 64k' /dev/kmem1
         n=60000
         while xfs_io -d -c \"pwrite -V 1 -N -b 4k $((n * 4096)) 4k\" /dev/kmem1 >/dev/null 2>error; do
             n=$((n + 1)); [ $n -lt 61000 ] || { echo room; exit; }
         done
         grep -q 'Resource temporarily unavailable' error",
    )?;
    Ok(said.lines().any(|line| line == "room"))
}

/// Processes that stay have their memory moved to another node, and do not notice; when there is no room there either,
/// a write fails, and does not hang.
#[test]
fn memory_of_processes_is_moved_as_long_as_there_is_room() -> Result<()> {
    // KASAN and what else that kernel has keep 280 MiB of it for themselves.
    let ram = if has_kasan()? { 1280 } else { 896 };
    boot(stock()?.ram(ram * MIB), |vm| {
        load_movable(vm, "kmem_start=4G kmem_size=256M kmem_format=blk")?;
        groups(vm)?;
        vm.sh("pmem-guest fill /tmp/x 251658240 1")?;
        let hog = Hog::fill(vm, 1, 0x1234_5678_9abc_def1)?;
        ensure!(write(vm, 0, 240)?, "there was room in node 0: {}", said(vm));
        compare(vm, 240)?;
        hog.end()?;
        vm.sh("blkdiscard /dev/kmem1")?;

        // And now there is not. KASAN keeps what is freed, so that even a request for the disk, or the name of a file, needs
        // new memory then, for which the kernel ends a process, and there is room again.
        if has_kasan()? {
            return take_down(vm);
        }
        for tries in 1.. {
            let before = killed(vm)?;
            let hogs = [Hog::fill(vm, 1, 1)?, Hog::fill(vm, 0, 2)?];
            let room = finds_room(vm)?;
            let killed = killed(vm)? - before;
            for hog in hogs {
                hog.kill()?;
            }
            if !room {
                break;
            }
            // An object of the kernel's own may have needed a page: who had one for it was killed.
            ensure!(
                killed > 0 && tries < 5,
                "more than there is has found room, in try {tries}, {killed} processes were killed: {}",
                said(vm)
            );
            vm.sh("blkdiscard /dev/kmem1")?;
        }
        ensure!(write(vm, 0, 240)?, "there is room again");
        compare(vm, 240)?;
        take_down(vm)
    })
}

/// Writes the first `blocks` blocks of the disk, and compares them.
fn fill(vm: &Vm, blocks: u64, seed: u64) -> Result<()> {
    vm.sh_for(
        &format!(
            "pmem-guest fill /tmp/x {size} {seed}
             dd if=/tmp/x of=/dev/kmem1 bs=64k oflag=direct
             pmem-guest compare /tmp/x /dev/kmem1 {size}",
            size = blocks * PAGE
        ),
        GUARD,
    )
    .map(drop)
}

/// In a zone for everybody the kernel's own objects keep some pages for good, and nothing else keeps any.
#[test]
fn a_disk_can_be_nearly_full_among_memory_of_the_kernel() -> Result<()> {
    boot(stock()?, |vm| {
        vm.write("/sys/devices/system/memory/auto_online_blocks", b"online")?;
        load(vm, SMALL)?;
        assert_eq!(ram(vm)?, BLOCKS);
        // Far more than a machine needs that does nothing else; watermarks of the zone would keep more.
        let most = BLOCKS - BLOCKS / 200;
        for seed in [1, 2] {
            fill(vm, most, seed)?;
        }
        vm.sh("blkdiscard /dev/kmem1")?;
        assert_eq!(ram(vm)?, BLOCKS);
        Ok(())
    })
}

/// The last block can be written, too, and a full disk can be overwritten, online or offline.
#[test]
fn a_disk_can_be_full() -> Result<()> {
    boot(stock()?, |vm| {
        load_movable(vm, SMALL)?;
        assert_eq!(ram(vm)?, BLOCKS);
        for (seed, state) in (1..).zip(["online", "online", "offline"]) {
            set_state(vm, state)?;
            fill(vm, BLOCKS, seed)?;
            // What is left of the spare pages.
            ensure!(ram(vm)? <= SPARE, "there is room for more");
        }
        vm.sh_for("blkdiscard /dev/kmem1; dd if=/tmp/x of=/dev/kmem1 bs=64k oflag=direct; blkdiscard /dev/kmem1", GUARD)?;
        set_state(vm, "online")?;
        assert_eq!(ram(vm)?, BLOCKS);
        take_down(vm)
    })
}
