// SPDX-License-Identifier: GPL-2.0-only

//! Ranges that are RAM and storage at once.

mod concurrency;
mod contents;
mod corruption;
mod instances;
mod limits;
mod memory;
mod notifiers;
mod power;
mod pressure;
mod refusals;

use anyhow::{bail, ensure, Context, Result};
use std::time::{SystemTime, UNIX_EPOCH};
use vm_tests::{load, unload, MIB};
use xtask::vm::{Errno, Vm};

const EAGAIN: i32 = 11;
const EBUSY: i32 = 16;
const EINVAL: i32 = 22;

const PAGE: u64 = 4096;

/// The whole second node, as a disk.
const BLK: &str = "kmem_start=4G kmem_size=1G kmem_format=blk";

/// The pages of that range, and what becomes of them: the superblocks, the index, and the spare ones are not RAM, so
/// that there is one page of RAM for each block.
const PAGES: u64 = 1 << 18;
const INDEX: u64 = 511;
const SPARE: u64 = 256;
const BLOCKS: u64 = PAGES - 2 - INDEX - SPARE;

/// Where the attributes of the range are.
pub(super) const DEVICE: &str = "/sys/devices/faux/kmem1";

/// What chooses all that is random; by default the time.
const SEED: &str = "PMEM_SEED";

/// A number that the user may give.
fn variable(name: &str, default: u64) -> Result<u64> {
    match std::env::var(name) {
        Ok(text) if !text.is_empty() => text.parse().with_context(|| format!("{name}={text}")),
        _ => Ok(default),
    }
}

/// Numbers that are the same for the same seed: xorshift.
struct Random(u64);

impl Random {
    /// Of the seed that the user gives, or of one that is printed.
    fn from_env() -> Result<Self> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros();
        let seed = variable(SEED, now as u64)?;
        eprintln!("{SEED}={seed}");
        Ok(Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1))
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// Lets memory that is added be for what can be moved away again. By default it would serve the kernel's own objects
/// as well, and could not be taken back from those.
pub(super) fn prepare(vm: &Vm) -> Result<()> {
    vm.write(
        "/sys/devices/system/memory/auto_online_blocks",
        b"online_movable",
    )
}

/// Loads the driver with memory that can be taken back.
fn load_movable(vm: &Vm, params: &str) -> Result<()> {
    prepare(vm)?;
    load(vm, params)
}

fn attribute(vm: &Vm, name: &str) -> Result<String> {
    Ok(vm.text(&format!("{DEVICE}/{name}"))?.trim().to_owned())
}

/// Asks for another state. The kernel's refusal is the inner result.
fn try_state(vm: &Vm, state: &str) -> Result<Result<(), Errno>> {
    match vm.write(&format!("{DEVICE}/state"), state.as_bytes()) {
        Ok(()) => Ok(Ok(())),
        Err(error) => Ok(Err(error.downcast::<Errno>()?)),
    }
}

/// Changes the state, and looks whether it has changed.
fn set_state(vm: &Vm, state: &str) -> Result<()> {
    try_state(vm, state)?.with_context(|| format!("{}\ncannot be {state}", said(vm)))?;
    let now = attribute(vm, "state")?;
    ensure!(now == state, "it is {now}, not {state}");
    Ok(())
}

/// Takes the range down, and unloads the driver.
fn take_down(vm: &Vm) -> Result<()> {
    set_state(vm, "unplugged")?;
    unload(vm)
}

/// What the driver has logged, in one piece.
fn said(vm: &Vm) -> String {
    vm_tests::log(vm).unwrap_or_default().join("\n")
}

/// Forgets what was logged.
fn forget(vm: &Vm) -> Result<()> {
    vm.sh("dmesg -c >/dev/null").map(drop)
}

/// A line of a node's `meminfo`, in pages; 0 if there is no such node.
fn meminfo(vm: &Vm, node: u32, field: &str) -> Result<u64> {
    let text = vm.sh(&format!(
        "cat /sys/devices/system/node/node{node}/meminfo 2>/dev/null || true"
    ))?;
    if text.is_empty() {
        return Ok(0);
    }
    let kib: u64 = text
        .lines()
        .find_map(|line| {
            line.split_once(&format!(" {field}:"))?
                .1
                .split_whitespace()
                .next()
        })
        .with_context(|| format!("no {field} in {text}"))?
        .parse()?;
    Ok(kib * 1024 / PAGE)
}

/// The pages that the system has as memory of node 1; the driver must say the same.
fn ram(vm: &Vm) -> Result<u64> {
    let (total, ram) = (
        meminfo(vm, 1, "MemTotal")?,
        attribute(vm, "ram")?.parse::<u64>()? / PAGE,
    );
    ensure!(
        total == ram,
        "the system has {total} pages, the driver says {ram}"
    );
    Ok(total)
}

/// A group of processes for each node, whose memory is of that node alone.
pub(super) fn groups(vm: &Vm) -> Result<()> {
    vm.sh(
        "mkdir -p /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup
         echo +cpuset >/sys/fs/cgroup/cgroup.subtree_control
         for node in 0 1; do
             mkdir /sys/fs/cgroup/node$node
             echo $node >/sys/fs/cgroup/node$node/cpuset.mems
         done",
    )
    .map(drop)
}

/// Processes that want more memory of node 1 than there is, one after another, until the file `stop` is there. What starts
/// them is of no group: a kernel with KASAN takes its shadow of a new process's stack from the memory of the group.
pub(super) const TOO_MUCH: &str = "\
    ( while [ ! -e stop ]; do
          ( echo 0 >/sys/fs/cgroup/node1/cgroup.procs; exec pmem-guest hog 100000000000 1 /tmp/never ) >/dev/null 2>&1 || true
      done ) &";

/// A process that has memory of one node, until it is ended.
struct Hog<'a> {
    vm: &'a Vm,
    node: u32,
    pid: u32,
}

impl<'a> Hog<'a> {
    /// Starts one that has `bytes` of `node`, with `word` in all of them.
    fn start(vm: &'a Vm, node: u32, bytes: u64, word: u64) -> Result<Self> {
        let pid = vm
            .sh(&format!(
                "cd /tmp; rm -f end{node} hog{node}; touch hog{node}
                 ( echo 0 >/sys/fs/cgroup/node{node}/cgroup.procs
                   exec pmem-guest hog {bytes} {word} /tmp/end{node} >hog{node} 2>&1 ) &
                 pid=$!
                 until grep -q ready hog{node}; do kill -0 $pid; sleep 0.05; done
                 echo $pid"
            ))?
            .trim()
            .parse()?;
        Ok(Hog { vm, node, pid })
    }

    /// Starts one that has what is free of `node`, but for what the kernel keeps for itself.
    fn fill(vm: &'a Vm, node: u32, word: u64) -> Result<Self> {
        // With huge pages the kernel would keep more the more memory there is, and end the process over it.
        vm.write("/proc/sys/vm/min_free_kbytes", b"4096")?;
        let free = meminfo(vm, node, "MemFree")? * PAGE;
        Self::start(vm, node, free.saturating_sub(36 * MIB), word)
    }

    /// Looks whether its memory is as it was, and ends it. The memory is free when this returns.
    fn end(self) -> Result<()> {
        let Hog { vm, node, pid } = self;
        let said = vm.sh(&format!(
            "[ -e /proc/{pid}/mem ] && touch /tmp/end{node}
             while grep -qs '^State:.[^ZX]' /proc/{pid}/status; do sleep 0.01; done
             cat /tmp/hog{node}"
        ))?;
        ensure!(said.trim() == "ready", "{said}");
        Ok(())
    }

    /// Ends it, if it is there at all. The memory is free when this returns.
    fn kill(self) -> Result<()> {
        let pid = self.pid;
        self.vm
            .sh(&format!(
                "kill -KILL {pid} || true
                 while grep -qs '^State:.[^ZX]' /proc/{pid}/status; do sleep 0.01; done"
            ))
            .map(drop)
    }
}

/// A number in what a program of the guest prints as JSON.
fn count(text: &str, name: &str) -> Result<u64> {
    let Some((_, rest)) = text.split_once(&format!("\"{name}\":")) else {
        bail!("no {name} in {text}");
    };
    let digits = rest.split(|c: char| !c.is_ascii_digit()).next();
    Ok(digits.unwrap_or_default().parse()?)
}

/// What is in the pages of the disk.
#[derive(Debug, PartialEq, Eq)]
struct Census {
    zero: u64,
    word: u64,
    other: u64,
}

/// Reads all of the disk, and counts pages with `word` in them.
fn census(vm: &Vm, word: u64) -> Result<Census> {
    let text = vm.sh(&format!("pmem-guest census /dev/kmem1 {word}"))?;
    Ok(Census {
        zero: count(&text, "zero")?,
        word: count(&text, "word")?,
        other: count(&text, "other")?,
    })
}
