// SPDX-License-Identifier: GPL-2.0-only

//! Power losses at any moment: what was written is there, and no block is a mix of old and new.

use super::{count, load_movable, ram, set_state, take_down, variable, Random, PAGE};
use anyhow::{ensure, Context, Result};
use std::ops::AddAssign;
use std::thread;
use std::time::Duration;
use vm_tests::{boot, cut, pmemctl, stock, Persistent, MIB};
use xtask::vm::{Builder, Vm};

/// How often the power is lost.
const CUTS: &str = "PMEM_POWER_CUTS";

/// The range, and behind it two disks for logs of what was done.
const RANGE: u64 = 384 * MIB;
const LOAD: &str = "kmem_start=4G kmem_size=384M pmem_start=4480M pmem_size=128M pmem_count=2";

/// Partitions for files and for blocks, and logs of nothing.
const MAKE: &str =
    "printf 'label: gpt\\nstart=1MiB, size=64MiB\\nstart=65MiB\\n' | sfdisk -q /dev/kmem1
     mkfs.ext4 -q -F /dev/kmem1p1
     pmem-guest blocks-begin /dev/pmem0; pmem-guest blocks-begin /dev/pmem1";

/// The blocks of the disk that are written at random: few, so that they are written again and again.
const BLOCKS: u32 = 384;

/// The longest time that the writers have until the power is lost, in microseconds, if nothing else is waited for.
const LONGEST: u64 = 1_200_000;

/// The image is in order; returns how many pages have data.
fn check(memory: &Persistent) -> Result<u64> {
    let (code, text) = pmemctl::check(&memory.path(), RANGE)?;
    ensure!(code == 0, "pmemctl check: {code}: {text}");
    pmemctl::mapped(&text)
}

/// What writers have done, what of it was under way when the power was lost, in how many of these in the middle, and
/// what was left: blocks or files, old, new, or a mix.
#[derive(Debug, Default)]
struct Tally {
    done: u64,
    begun: u64,
    parts: u64,
    old: u64,
    new: u64,
    mixed: u64,
}

impl Tally {
    /// Of what `pmem-guest` prints.
    fn parse(line: &str) -> Result<Self> {
        Ok(Self {
            done: count(line, "done")?,
            begun: count(line, "begun")?,
            parts: count(line, "parts")?,
            old: count(line, "old")?,
            new: count(line, "new")?,
            mixed: count(line, "mixed")?,
        })
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.done += other.done;
        self.begun += other.begun;
        self.parts += other.parts;
        self.old += other.old;
        self.new += other.new;
        self.mixed += other.mixed;
    }
}

/// What all rounds have done.
#[derive(Debug, Default)]
struct Total {
    blocks: Tally,
    files: Tally,
    /// How often the range went offline or came back.
    toggled: u64,
}

/// A range that loses power again and again.
struct Subject {
    /// Whether a block is written whole or not at all.
    atomic: bool,
    /// How many blocks the disk has.
    blocks: u64,
    total: Total,
}

impl Subject {
    fn load(&self, vm: &Vm, format: &str) -> Result<()> {
        let atomic = u8::from(self.atomic);
        load_movable(vm, &format!("{LOAD} kmem_atomic={atomic} {format}"))
    }

    /// Looks at what the last round has left, of which `mapped` pages have data, and mounts the file system.
    fn verify(&mut self, vm: &Vm, mapped: u64, options: &str) -> Result<()> {
        self.load(vm, "")?;
        // No page is lost: those without data are RAM.
        let (ram, blocks) = (ram(vm)?, self.blocks);
        ensure!(
            ram + mapped == blocks,
            "{ram} pages are RAM and {mapped} have data, of {blocks}"
        );
        let torn = if self.atomic { "" } else { "torn" };
        let said = vm.sh(&format!(
            "pmem-guest blocks-check /dev/kmem1p2 /dev/pmem0 {BLOCKS} {torn}
             mkdir -p /mnt/a; mount -o {options} /dev/kmem1p1 /mnt/a
             pmem-guest files-check /mnt/a /dev/pmem1"
        ))?;
        let (of_blocks, of_files) = said.trim().split_once('\n').context("nothing is said")?;
        self.total.blocks += Tally::parse(of_blocks)?;
        self.total.files += Tally::parse(of_files)?;
        Ok(())
    }

    /// Writes until the power is lost, in cut `n`: some of them while pages go to the system and come back.
    fn write(&mut self, vm: &Vm, random: &mut Random, n: u64) -> Result<()> {
        let seed = random.below(1 << 32);
        let (toggle, hog, longest) = if n % 3 == 2 {
            let toggle = "cd /sys/devices/faux/kmem1
                 while :; do
                     for state in offline online; do echo $state >state && echo >>/tmp/toggled || true; done
                 done";
            (toggle, 20_000_000, 2 * LONGEST)
        } else {
            ("true", 200_000_000, LONGEST)
        };
        // Processes use what the disk does not, so that a page that is given back too early is overwritten. They may
        // have other memory, too: while the range goes offline, others were killed for those that may not.
        vm.sh(&format!(
            "touch /tmp/ended /tmp/toggled
             writer() {{ ( pmem-guest \"$@\" || true; echo $1 has ended ) >>/tmp/ended 2>&1 & }}
             writer blocks-write /dev/kmem1p2 /dev/pmem0 {BLOCKS} 3 {seed}
             writer files-write /mnt/a /dev/pmem1 {seed}
             ( while :; do numactl --preferred=1 pmem-guest hog {hog} 12345 / || true; done ) >/dev/null 2>&1 &
             ( {toggle} ) 2>/dev/null &"
        ))?;
        // What must be moved away before the range is offline takes its time: that is cut short in every other of these.
        if n % 6 == 2 {
            vm.sh("until [ -s /tmp/toggled ]; do sleep 0.05; done")?;
        }
        thread::sleep(Duration::from_micros(random.below(longest)));
        // A writer that ends has failed.
        let said = vm.sh("wc -l </tmp/toggled; cat /tmp/ended")?;
        let (toggled, ended) = said.split_once('\n').context("nothing is said")?;
        ensure!(ended.is_empty(), "{ended}");
        self.total.toggled += toggled.trim().parse::<u64>()?;
        Ok(())
    }
}

/// Loses power `cuts` times, and looks each time.
fn lose_power(cuts: u64, atomic: bool) -> Result<()> {
    let mut random = Random::from_env()?;
    let memory = Persistent::new(RANGE + 128 * MIB)?;
    let mut subject = Subject {
        atomic,
        blocks: 0,
        total: Total::default(),
    };
    boot(machine(&memory)?, |vm| {
        subject.load(vm, "kmem_format=blk")?;
        subject.blocks = ram(vm)?;
        vm.sh(MAKE).map(drop)
    })?;
    for n in 0..cuts {
        let mapped = check(&memory)?;
        // What removed files had goes back to the system, or stays.
        let options = ["discard", "nodiscard"][random.below(2) as usize];
        cut(machine(&memory)?, |vm| {
            subject.verify(vm, mapped, options)?;
            subject.write(vm, &mut random, n)
        })
        .with_context(|| format!("before cut {n}"))?;
    }
    let mapped = check(&memory)?;
    boot(machine(&memory)?, |vm| {
        subject.verify(vm, mapped, "nodiscard")?;
        vm.sh("umount /mnt/a; e2fsck -fn /dev/kmem1p1")?;
        set_state(vm, "unplugged")?;
        check(&memory)?;
        set_state(vm, "online")?;
        take_down(vm)
    })?;
    let total = subject.total;
    eprintln!("{cuts} power losses: {total:?}");
    // Else nothing was tested.
    ensure!(
        total.blocks.done >= 50 * cuts && total.files.done >= cuts,
        "the writers have done next to nothing: {total:?}"
    );
    ensure!(
        total.blocks.begun >= cuts / 4 && total.files.begun >= cuts / 4,
        "hardly anything was under way when the power was lost: {total:?}"
    );
    ensure!(
        total.toggled > 0 || cuts < 3,
        "the range has never gone offline: {total:?}"
    );
    ensure!(!atomic || total.blocks.mixed == 0, "{total:?}");
    Ok(())
}

fn machine(memory: &Persistent) -> Result<Builder<'_>> {
    Ok(stock()?.persistent(memory))
}

/// A database or a file system that relies on the disk must find what it was promised.
#[test]
fn nothing_is_lost_or_torn_by_power_losses_at_random_moments() -> Result<()> {
    lose_power(variable(CUTS, 24)?, true)
}

/// Without atomic writes a block may be torn whose write was under way, and no other; the journal of a file system is
/// made for that.
#[test]
fn only_what_was_under_way_is_torn_without_atomic_writes() -> Result<()> {
    lose_power(variable(CUTS, 24)?.div_ceil(8), false)
}

/// The checks above find what a power loss must not leave.
#[test]
fn what_is_lost_torn_or_misplaced_is_found() -> Result<()> {
    boot(stock()?, |vm| {
        load_movable(vm, &format!("{LOAD} kmem_format=blk"))?;
        vm.sh(MAKE)?;
        vm.sh("mkdir -p /mnt/a; mount /dev/kmem1p1 /mnt/a")?;
        let check_blocks = format!("pmem-guest blocks-check /dev/kmem1p2 /dev/pmem0 {BLOCKS}");
        let check_files = "pmem-guest files-check /mnt/a /dev/pmem1";
        let write = |seed: u32| -> Result<Vec<u8>> {
            vm.sh(&format!(
                "pmem-guest blocks-write /dev/kmem1p2 /dev/pmem0 {BLOCKS} 3 {seed} & blocks=$!
                 pmem-guest files-write /mnt/a /dev/pmem1 {seed} & files=$!
                 sleep 2; kill -KILL $blocks $files; wait $blocks $files || true
                 {check_blocks}; {check_files}
                 dd if=/dev/kmem1p2 of=/tmp/{seed} bs=4k count={BLOCKS} iflag=direct"
            ))?;
            vm.read(&format!("/tmp/{seed}"))
        };
        let (before, after) = (write(1)?, write(2)?);
        let mut changed = before
            .chunks(PAGE as usize)
            .zip(after.chunks(PAGE as usize))
            .zip(0..)
            .filter(|((before, after), _)| before != after && after.iter().any(|&byte| byte != 0))
            .map(|(_, block)| block);
        let (a, b): (u64, u64) = changed.next().zip(changed.next()).context("no changes")?;
        let copy = |from: &str, block: u64| {
            format!("dd if=/tmp/{from} of=/dev/kmem1p2 bs=4k skip={block} seek={a} count=1 oflag=direct")
        };
        let sector = a * 8 + 3;
        for damage in [
            copy("1", a),
            copy("2", b),
            format!("blkdiscard -o {} -l 4096 /dev/kmem1p2", a * PAGE),
            format!(
                "cp /tmp/2 /tmp/torn
                 dd if=/tmp/1 of=/tmp/torn bs=512 skip={sector} seek={sector} count=1 conv=notrunc
                 {}",
                copy("torn", a)
            ),
        ] {
            vm.sh(&damage)?;
            // It was not under way, so that it must not be torn in any case.
            for check in [&check_blocks, &format!("{check_blocks} torn")] {
                let ran = vm.try_sh(check)?;
                ensure!(
                    ran.stderr.contains(&format!("block {a} has none of")),
                    "after {damage}: {ran:?}"
                );
            }
            vm.sh(&format!("{}\n{check_blocks}", copy("2", a)))?;
        }

        vm.sh("cd /mnt/a; for name in [0-9]*; do cp $name /tmp/copy; echo $name >/tmp/name; done")?;
        for (damage, fault) in [
            ("echo >>$name", "has changed"),
            ("rm $name", "is not there"),
            ("touch 9", "files are there"),
        ] {
            let path = "name=$(cat /tmp/name); cd /mnt/a";
            vm.sh(&format!("{path}; {damage}"))?;
            let ran = vm.try_sh(check_files)?;
            ensure!(ran.stderr.contains(fault), "after {damage}: {ran:?}");
            vm.sh(&format!(
                "{path}; rm -f 9; cp /tmp/copy $name; {check_files}"
            ))?;
        }
        vm.sh("umount /mnt/a")?;
        take_down(vm)
    })
}
