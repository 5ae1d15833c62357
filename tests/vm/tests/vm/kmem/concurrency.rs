// SPDX-License-Identifier: GPL-2.0-only

//! Many at once: on the same blocks, and on the range itself.

use super::{attribute, groups, load_movable, ram, said, take_down, try_state, Hog, EAGAIN, EBUSY};
use crate::lifecycle::check_leaks;
use anyhow::{ensure, Result};
use std::time::{Duration, Instant};
use vm_tests::{boot, pmemctl, stock, Persistent, MIB};
use xtask::vm::PMEM_KO;

const SIZE: u64 = 128 * MIB;
const LOAD: &str = "kmem_start=4G kmem_size=128M";

/// The CPUs where many work at once, and how many pages each keeps at most.
const CPUS: u64 = 4;
const KEPT: u64 = 8;

/// Longer than anything here takes, if it ends at all.
const GUARD: Duration = Duration::from_secs(300);

/// A read has one write: no mix of two, no page that is somebody else's by now, whoever discards and writes it
/// meanwhile; and no page is lost over it.
#[test]
fn blocks_that_many_use_at_once_are_whole() -> Result<()> {
    let memory = Persistent::new(SIZE)?;
    boot(stock()?.persistent(&memory).cpus(CPUS as u32), |vm| {
        load_movable(vm, &format!("{LOAD} kmem_format=blk"))?;
        groups(vm)?;
        let blocks = ram(vm)?;
        // Processes get and give back the pages that the disk does not use.
        let churn = "( echo 0 >/sys/fs/cgroup/node1/cgroup.procs
              while [ ! -e /tmp/stop ]; do pmem-guest hog 90000000 81985529216486895 /; done ) &";
        vm.sh_for(
            &format!(
                "{churn}
                 pmem-guest blocks-race /dev/kmem1 16 5
                 pmem-guest blocks-race /dev/kmem1 2000 5
                 touch /tmp/stop; wait; rm /tmp/stop"
            ),
            GUARD,
        )?;
        // And with requests of every size and kind.
        vm.sh_for(
            &format!(
                "{churn}
                 cd /tmp; fio --filename=/dev/kmem1 --direct=1 --size=16m --time_based --runtime=6 --bsrange=4k-128k \\
                     --ioengine=io_uring --iodepth=8 --group_reporting --output=report \\
                     --name=readwrite --numjobs=2 --rw=randrw --name=trim --rw=randtrim --name=trimwrite --rw=randtrimwrite \\
                     --name=sync --ioengine=psync --rw=randwrite --name=buffered --direct=0 --offset=20m --rw=randrw --fsync=100 \\
                     || {{ cat report; exit 1; }}
                 touch /tmp/stop; wait"
            ),
            GUARD,
        )?;
        let ram = ram(vm)?;
        take_down(vm)?;
        let (code, text) = pmemctl::check(&memory.path(), SIZE)?;
        ensure!(code == 0, "pmemctl check: {code}: {text}");
        let mapped = pmemctl::mapped(&text)?;
        // CPUs keep a few pages for their next writes.
        ensure!(
            (blocks - CPUS * KEPT..=blocks).contains(&(ram + mapped)),
            "{ram} pages were RAM and {mapped} have data, of {blocks}"
        );
        Ok(())
    })
}

/// The range goes only when nobody uses it, and going online and offline does not disturb who does.
#[test]
fn states_change_beside_io() -> Result<()> {
    boot(stock()?, |vm| {
        load_movable(vm, &format!("{LOAD} kmem_format=blk"))?;
        let blocks = ram(vm)?;
        vm.sh(
            "cd /tmp; ram=$(cat /sys/devices/faux/kmem1/ram)
             ( fio --name=verify --filename=/dev/kmem1 --direct=1 --rw=randwrite --bsrange=4k-32k --size=32m \
                 --verify=crc32c --verify_fatal=1 --do_verify=1 --time_based --runtime=12 --output=report; echo $? >end ) &
             until [ $(cat /sys/devices/faux/kmem1/ram) -lt $ram ]; do sleep 0.05; done",
        )?;
        let (started, mut changes) = (Instant::now(), 0);
        while started.elapsed() < Duration::from_secs(8) {
            let error = try_state(vm, "unplugged")?.expect_err("it was unplugged below fio");
            assert_eq!(error.errno, EBUSY, "{error}");
            let error = vm.rmmod("pmem")?.expect_err("the driver was unloaded");
            assert_eq!(error.errno, EAGAIN, "{error}");
            for state in ["offline", "online"] {
                // A page may be on its way to a write just when it is to be taken.
                if try_state(vm, state)?.is_ok() {
                    assert_eq!(attribute(vm, "state")?, state);
                    changes += 1;
                }
            }
        }
        ensure!(changes >= 4, "only {changes} changes: {}", said(vm));
        vm.sh("cd /tmp; until [ -e end ]; do sleep 0.1; done; [ $(cat end) = 0 ] || { cat report; exit 1; }")?;
        vm.sh("blkdiscard /dev/kmem1")?;
        let ram = ram(vm)?;
        ensure!(
            (blocks - 2 * KEPT..=blocks).contains(&ram),
            "{ram} of {blocks} pages are RAM"
        );
        take_down(vm)
    })
}

/// A leak, or a page that is counted wrongly, shows when it happens fifty times.
#[test]
fn fifty_times_offline_unplugged_and_reloaded() -> Result<()> {
    boot(stock()?, |vm| {
        load_movable(vm, &format!("{LOAD} kmem_format=blk"))?;
        let blocks = ram(vm)?;
        take_down(vm)?;
        check_leaks(vm, 50, |n| {
            vm.sh_for(
                &format!(
                    "state=/sys/devices/faux/kmem1/state; n=0
                     while [ $n -lt {n} ]; do
                         n=$((n + 1))
                         insmod {PMEM_KO} {LOAD}
                         [ ! -e /tmp/x ] || pmem-guest compare /tmp/x /dev/kmem1 2097152
                         echo offline >$state
                         pmem-guest fill /tmp/x 2097152 $n
                         dd if=/tmp/x of=/dev/kmem1 bs=256k oflag=direct 2>/dev/null
                         echo online >$state
                         pmem-guest compare /tmp/x /dev/kmem1 2097152
                         echo unplugged >$state
                         echo online >$state
                         [ $(cat /sys/devices/faux/kmem1/ram) = {ram} ]
                         echo unplugged >$state
                         rmmod pmem
                     done",
                    ram = (blocks - 512) * 4096
                ),
                GUARD,
            )
            .map(drop)
        })
    })
}

/// Two that want to take the range down at once, and one that reads the attributes.
#[test]
fn states_that_many_ask_for_at_once() -> Result<()> {
    boot(stock()?, |vm| {
        load_movable(vm, &format!("{LOAD} kmem_format=blk"))?;
        groups(vm)?;
        let hog = Hog::start(vm, 1, 40 * MIB, 3)?;
        vm.sh_for(
            "state=/sys/devices/faux/kmem1/state
             for first in online offline unplugged; do
                 ( n=0; while [ $n -lt 15 ]; do n=$((n + 1)); echo $first >$state 2>/dev/null || true; done ) &
             done
             ( n=0; while [ $n -lt 200 ]; do n=$((n + 1)); cat /sys/devices/faux/kmem1/* >/dev/null 2>&1 || true; done ) &
             wait",
            GUARD,
        )?;
        hog.end()?;
        super::set_state(vm, "online")?;
        take_down(vm)
    })
}
