// SPDX-License-Identifier: GPL-2.0-only

//! When the host is asked to flush, and what becomes of a flush that fails.

use super::{counter, machine, serve, LONG};
use anyhow::{ensure, Context, Result};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};
use vm_tests::{boot, Persistent, MIB};
use xtask::vm::{Fault, Vm};

/// How many flushes the host has begun; each has ended, as who asked for it has the answer.
fn flushed(vm: &Vm) -> Result<u64> {
    let flushes = vm.flushes()?;
    ensure!(
        flushes.iter().all(|flush| flush.ended.is_some()),
        "{flushes:?}"
    );
    Ok(flushes.len() as u64)
}

/// An fsync that the host never hears of is a lie; one that makes it flush twice costs twice.
#[test]
fn the_host_flushes_when_it_has_to() -> Result<()> {
    let memory = Persistent::new(64 * MIB)?;
    boot(machine(&memory)?.watch_flushes(), |vm| {
        serve(vm)?;
        // Readers of a new disk, such as the partition scan, need no flush.
        ensure!(flushed(vm)? == 0, "{:?}", vm.flushes()?);
        for (script, flushes) in [
            (
                "dd of=/dev/pmem0 if=/dev/zero bs=4k count=4 oflag=direct",
                0..=0,
            ),
            (
                "dd if=/dev/pmem0 of=/dev/null bs=4k count=4 iflag=direct",
                0..=0,
            ),
            ("sync /dev/pmem0", 1..=1),
            (
                "dd of=/dev/pmem0 if=/dev/zero bs=4k count=1 conv=fsync",
                1..=1,
            ),
            (
                "dd of=/dev/pmem0 if=/dev/zero bs=4k count=1 oflag=direct conv=fsync",
                1..=1,
            ),
            // FUA, and the flush of who does not know of FUA.
            ("xfs_io -d -c 'pwrite -V 1 -D 0 4k' /dev/pmem0", 1..=2),
            ("xfs_io -c 'pwrite -V 1 -D 0 4k' /dev/pmem0", 1..=2),
            (
                "blkdiscard -z -o 4096 -l 4096 /dev/pmem0; sync /dev/pmem0",
                1..=2,
            ),
        ] {
            let before = (flushed(vm)?, counter(vm, "host_flushes")?);
            vm.sh(&format!("({script}) 2>/dev/null"))?;
            let after = (flushed(vm)?, counter(vm, "host_flushes")?);
            let (host, guest) = (after.0 - before.0, after.1 - before.1);
            ensure!(flushes.contains(&host), "{script}: {host} flushes");
            ensure!(
                host == guest,
                "{script}: {host} flushes, the driver says {guest}"
            );
        }
        Ok(())
    })
}

/// The blocks of a file that end a transaction of ext4's journal.
fn commits(file: &File) -> Result<usize> {
    const MAGIC: [u8; 8] = [0xc0, 0x3b, 0x39, 0x98, 0, 0, 0, 2];
    let mut found = 0;
    for at in (0..file.metadata()?.len()).step_by(4096) {
        let mut start = [0; 8];
        file.read_exact_at(&mut start, at)?;
        found += usize::from(start == MAGIC);
    }
    Ok(found)
}

/// The journal of ext4 ends a transaction by a block with PREFLUSH and FUA: what the transaction has must be durable
/// before the block is there, or a power failure between them makes garbage of the file system. While a slow host
/// flushes for the first time the block is not there, and it is when it flushes again.
#[test]
fn a_journal_is_durable_before_its_commit_block() -> Result<()> {
    let memory = Persistent::new(64 * MIB)?;
    let file = File::open(memory.path())?;
    let slow = Fault::Delay(Duration::from_millis(1000));
    boot(machine(&memory)?.flush_fault(slow, 1, None), |vm| {
        serve(vm)?;
        vm.sh_for(
            // No other writer: neither the background initialization of the inode tables nor times of access.
            "mkfs.ext4 -q -F -b 4096 -J size=4 -E lazy_itable_init=0,lazy_journal_init=0 /dev/pmem0
             mkdir -p /mnt/a; mount -o dax=always,noatime /dev/pmem0 /mnt/a
             touch /mnt/a/x; sync; sleep 6; sync",
            LONG,
        )?;
        let before = vm.flushes()?.len();
        let commits_before = commits(&file)?;
        vm.sh(
            "(echo hello >>/mnt/a/x; xfs_io -c fsync /mnt/a/x; touch /tmp/done) >/dev/null 2>&1 &",
        )?;
        // The state of the flushes, and the commit blocks at that time.
        let state = || -> Result<(usize, bool)> {
            let flushes = vm.flushes()?;
            let under_way = flushes.last().is_some_and(|flush| flush.ended.is_none());
            Ok((flushes.len() - before, under_way))
        };
        let mut seen = Vec::new();
        let started = Instant::now();
        while started.elapsed() < Duration::from_secs(60) {
            let at = state()?;
            let new = commits(&file)? - commits_before;
            if state()? == at {
                seen.push((at, new));
            }
            if at == (2, false) {
                break;
            }
            thread::sleep(Duration::from_millis(20));
        }
        vm.sh("for i in $(seq 100); do test -e /tmp/done && exit 0; sleep 0.1; done; exit 1")?;
        seen.dedup();
        let of = |state| seen.iter().filter(move |(at, _)| *at == state);
        ensure!(
            of((1, true)).count() > 0 && of((1, true)).all(|&(_, new)| new == 0),
            "while the host flushes for the first time: {seen:?}"
        );
        ensure!(
            of((2, true)).count() > 0
                && of((2, true)).next_back().is_some_and(|&(_, new)| new == 1),
            "while the host flushes again: {seen:?}"
        );
        ensure!(vm.flushes()?.len() == before + 2, "{:?}", vm.flushes()?);
        Ok(())
    })
}

/// With many programs that sync at once, a host that takes milliseconds must not be asked once for each.
#[test]
fn programs_that_sync_at_once_share_flushes() -> Result<()> {
    const JOBS: u64 = 16;
    const SYNCS: u64 = 25;
    let memory = Persistent::new(64 * MIB)?;
    let slow = Fault::Delay(Duration::from_millis(40));
    boot(machine(&memory)?.flush_fault(slow, 1, None), |vm| {
        serve(vm)?;
        let before = (
            flushed(vm)?,
            counter(vm, "flushes")?,
            counter(vm, "host_flushes")?,
        );
        vm.sh_for(
            &format!(
                "fio --name=x --filename=/dev/pmem0 --rw=randwrite --bs=4k --size=1m --number_ios={SYNCS} --fsync=1 \\
                     --ioengine=psync --direct=1 --numjobs={JOBS} --offset_increment=1m --end_fsync=0 >/tmp/fio \\
                     || {{ cat /tmp/fio; exit 1; }}"
            ),
            LONG,
        )?;
        let host = flushed(vm)? - before.0;
        let asked = counter(vm, "flushes")? - before.1;
        let sent = counter(vm, "host_flushes")? - before.2;
        // fio ends without the last one.
        ensure!(
            asked >= JOBS * (SYNCS - 1),
            "{asked} flushes were asked for"
        );
        ensure!(sent == host, "{host} flushes, the driver says {sent}");
        ensure!(
            host <= asked / 4,
            "{host} flushes for {asked} that were asked for"
        );
        // One after the other, each asks the host.
        ensure!(host >= SYNCS - 1, "{host} flushes for {SYNCS} rounds");
        Ok(())
    })
}

/// Runs `sync` of the disk `count` times, one after the other, and says which fail.
fn syncs(vm: &Vm, count: u64) -> Result<Vec<u64>> {
    let failed = vm.sh(&format!(
        "for i in $(seq {count}); do sync /dev/pmem0 2>/tmp/error || {{ grep -q 'Input/output' /tmp/error; echo $i; }}; done"
    ))?;
    failed
        .lines()
        .map(|line| line.parse().with_context(|| failed.clone()))
        .collect()
}

/// The host's disk is full or broken: who syncs then must know, and who syncs later must not suffer.
#[test]
fn a_flush_that_fails_fails_its_fsync() -> Result<()> {
    let memory = Persistent::new(64 * MIB)?;
    let machine = machine(&memory)?.flush_fault(Fault::Fail, 3, Some(4));
    boot(machine, |vm| {
        serve(vm)?;
        let failed = syncs(vm, 6)?;
        ensure!(failed == [3, 4], "of 6 syncs these fail: {failed:?}");
        let host: Vec<_> = vm.flushes()?.iter().map(|flush| flush.failed).collect();
        ensure!(host == [false, false, true, true, false, false], "{host:?}");
        Ok(())
    })
}

/// A write with FUA whose flush fails, has failed.
#[test]
fn a_flush_that_fails_fails_its_write() -> Result<()> {
    let memory = Persistent::new(64 * MIB)?;
    let machine = machine(&memory)?.flush_fault(Fault::Fail, 2, Some(2));
    boot(machine, |vm| {
        serve(vm)?;
        let write = "xfs_io -d -c 'pwrite -V 1 -D 0 4k' /dev/pmem0";
        let flushes = |script: &str| -> Result<(bool, usize)> {
            let before = vm.flushes()?.len();
            let ran = vm.try_sh(script)?;
            let good = ran.end == vm_tests::End::Exit(0);
            ensure!(good || ran.stderr.contains("Input/output error"), "{ran:?}");
            Ok((good, vm.flushes()?.len() - before))
        };
        let (good, _) = flushes("sync /dev/pmem0")?;
        ensure!(good, "the first flush does not fail");
        let (good, n) = flushes(write)?;
        ensure!(
            !good && n >= 1,
            "its flush failed, and it did not ({n} flushes)"
        );
        let (good, _) = flushes(write)?;
        ensure!(good, "the disk has not recovered");
        Ok(())
    })
}

/// A flush that fails is shared by all that wait for it, and by nobody else.
#[test]
fn a_flush_that_fails_fails_all_that_share_it() -> Result<()> {
    let memory = Persistent::new(64 * MIB)?;
    let machine = machine(&memory)?.flush_fault(Fault::Fail, 5, Some(9));
    boot(machine, |vm| {
        serve(vm)?;
        // Eight programs, until the host has flushed more often than it fails.
        let ran = vm.sh_for(
            "for job in 1 2 3 4 5 6 7 8; do
                 ( for i in $(seq 20); do sync /dev/pmem0 2>/dev/null && echo good || echo bad; done >/tmp/$job ) &
             done
             wait; cat /tmp/[1-8]",
            LONG,
        )?;
        let bad = ran.lines().filter(|&line| line == "bad").count();
        ensure!(ran.lines().count() == 160, "{ran}");
        // Five failed, each of them for one at least and for no more than all eight.
        ensure!((5..=40).contains(&bad), "{bad} fail");
        ensure!(syncs(vm, 3)?.is_empty(), "it has not recovered");
        Ok(())
    })
}

/// A journal that cannot be made durable stops the file system, and the disk is good for the next one.
#[test]
fn ext4_stops_when_its_journal_is_not_durable() -> Result<()> {
    let memory = Persistent::new(64 * MIB)?;
    // Late enough for the file system to be made and mounted.
    const FIRST: u64 = 40;
    // One is the journal's, though the kernel may ask for one of its own before.
    let machine = machine(&memory)?.flush_fault(Fault::Fail, FIRST, Some(FIRST + 2));
    boot(machine, |vm| {
        serve(vm)?;
        vm.sh(
            "mkfs.ext4 -q -F -b 4096 -J size=4 -E lazy_itable_init=0,lazy_journal_init=0 /dev/pmem0; mkdir -p /mnt/a
             mount -o dax=always,errors=remount-ro /dev/pmem0 /mnt/a
             pmem-guest fill /mnt/a/before 1000000 1; sync",
        )?;
        let so_far = vm.flushes()?.len() as u64;
        ensure!(so_far < FIRST - 2, "{so_far} flushes so far");
        syncs(vm, FIRST - 1 - so_far)?;
        let ran = vm.try_sh("echo x >/mnt/a/x; xfs_io -c fsync /mnt/a/x")?;
        ensure!(
            ran.stderr.contains("Input/output error") || ran.stderr.contains("Read-only"),
            "{ran:?}\n{}",
            vm.dmesg()?
        );
        vm.sh(
            "umount /mnt/a; for i in 1 2 3; do sync /dev/pmem0 && break; done 2>/dev/null
               e2fsck -fy /dev/pmem0 >/tmp/fsck || test $? = 1
               mount -o dax=always /dev/pmem0 /mnt/a
               pmem-guest verify /mnt/a/before 1000000 1
               pmem-guest fill /mnt/a/after 1000000 2; umount /mnt/a",
        )?;
        Ok(())
    })
}
