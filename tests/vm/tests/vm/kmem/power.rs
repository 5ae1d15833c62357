// SPDX-License-Identifier: GPL-2.0-only

//! Power losses at any moment: what was written is there, and no block is a mix of old and new.

use super::{load_movable, ram, set_state, take_down, variable, Random};
use anyhow::{ensure, Context, Result};
use std::thread;
use std::time::Duration;
use vm_tests::{boot, pmemctl, stock, Persistent, MIB};
use xtask::vm::Vm;

/// How often the power is lost.
const CUTS: &str = "PMEM_POWER_CUTS";

/// The range, and behind it two disks for logs of what was done.
const RANGE: u64 = 384 * MIB;
const LOAD: &str = "kmem_start=4G kmem_size=384M pmem_start=4480M pmem_size=128M pmem_count=2";

/// The blocks of the disk that are written at random: few, so that they are written again and again.
const BLOCKS: u32 = 384;

/// The image is in order; returns how many pages have data.
fn check(memory: &Persistent) -> Result<u64> {
    let (code, text) = pmemctl::check(&memory.path(), RANGE)?;
    ensure!(code == 0, "pmemctl check: {code}: {text}");
    pmemctl::mapped(&text)
}

/// Looks at what the last round has left.
fn verify(vm: &Vm, mapped: u64, blocks: u64) -> Result<()> {
    load_movable(vm, LOAD)?;
    // No page is lost: those without data are RAM.
    let ram = ram(vm)?;
    ensure!(
        ram + mapped == blocks,
        "{ram} pages are RAM and {mapped} have data, of {blocks}"
    );
    vm.sh(&format!(
        "pmem-guest blocks-check /dev/kmem1p2 /dev/pmem0 {BLOCKS}
         mkdir -p /mnt/a && mount /dev/kmem1p1 /mnt/a
         pmem-guest files-check /mnt/a /dev/pmem1"
    ))
    .map(drop)
}

/// A database or a file system that relies on the disk must find what it was promised.
#[test]
fn nothing_is_lost_or_torn_by_power_losses_at_random_moments() -> Result<()> {
    let cuts = variable(CUTS, 50)?;
    let mut random = Random::from_env()?;

    let memory = Persistent::new(RANGE + 128 * MIB)?;
    let machine = || -> Result<_> { Ok(stock()?.persistent(&memory)) };
    let mut blocks = 0;
    boot(machine()?, |vm| {
        load_movable(vm, &format!("{LOAD} kmem_format=blk"))?;
        blocks = ram(vm)?;
        vm.sh(
            "printf 'label: gpt\\nstart=1MiB, size=64MiB\\nstart=65MiB\\n' | sfdisk -q /dev/kmem1
             mkfs.ext4 -q -F /dev/kmem1p1
             pmem-guest blocks-begin /dev/pmem0 && pmem-guest blocks-begin /dev/pmem1",
        )?;
        Ok(())
    })?;
    for cut in 0..cuts {
        let mapped = check(&memory)?;
        let seed = random.below(1 << 32);
        // Also while pages go to the system and come back.
        let toggles = random.below(3) == 0;
        let moment = Duration::from_micros(random.below(1_200_000));
        boot(machine()?, |vm| {
            verify(vm, mapped, blocks)?;
            let toggle = if toggles {
                "while :; do echo offline >/sys/devices/faux/kmem1/state; echo online >/sys/devices/faux/kmem1/state; done"
            } else {
                "true"
            };
            // Processes use what the disk does not, so that a page that is given back too early is overwritten.
            vm.sh(&format!(
                "pmem-guest blocks-write /dev/kmem1p2 /dev/pmem0 {BLOCKS} 3 {seed} &
                 pmem-guest files-write /mnt/a /dev/pmem1 {seed} &
                 ( mkdir -p /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup
                   echo +cpuset >/sys/fs/cgroup/cgroup.subtree_control
                   mkdir /sys/fs/cgroup/a && echo 1 >/sys/fs/cgroup/a/cpuset.mems
                   echo 0 >/sys/fs/cgroup/a/cgroup.procs
                   while :; do pmem-guest hog 200000000 12345 /; done ) &
                 ( {toggle} ) 2>/dev/null &"
            ))?;
            thread::sleep(moment);
            vm.check_clean()
        })
        .with_context(|| format!("before cut {cut}"))?;
    }
    let mapped = check(&memory)?;
    boot(machine()?, |vm| {
        verify(vm, mapped, blocks)?;
        vm.sh("umount /mnt/a && e2fsck -fn /dev/kmem1p1")?;
        set_state(vm, "unplugged")?;
        check(&memory)?;
        set_state(vm, "online")?;
        take_down(vm)
    })
}
