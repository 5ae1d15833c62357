// SPDX-License-Identifier: GPL-2.0-only

//! A workload that was recorded: all that is needed to look at the states that a power failure could have left.

use super::workload::{Kind, Subject, Workload, DISK, MOUNTED};
use crate::progress::Progress;
use crate::vm::{Persistent, Setup, Vm, PMEM_KO, UPPER};
use anyhow::{bail, ensure, Context, Result};
use pmem_guest::script::{Mark, Step};
use pmem_trace::domain::{Domain, Patch, Rules};
use pmem_trace::record::{Event, Log};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

/// How long a workload may take. On a busy host it takes a tenth of that.
const WORK: Duration = Duration::from_secs(900);

/// How long a guest may take to boot: what has been done so far is not to be lost to a busy host.
pub(super) const PATIENCE: Duration = Duration::from_secs(400);

/// The script, in the guest.
const SCRIPT: &str = "/tmp/steps";

/// The files of a recording, in its directory: the memory at the start, what reached it, and what was done.
const START: &str = "start";
const LOG: &str = "log";
const CASE: &str = "case.json";

/// What a recording is of, as it is kept.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Case {
    /// The workload's name.
    pub workload: String,
    /// What chose the steps.
    pub seed: u64,
    /// The kernel's release.
    pub kernel: String,
    /// What was left out of the driver, if anything was.
    pub mutation: Option<String>,
    /// Steps that were done, and durable.
    pub setup: Vec<Step>,
    /// Steps that were recorded.
    pub steps: Vec<Step>,
}

/// What was recorded.
#[derive(Debug)]
pub struct Recording {
    /// Of what.
    pub case: Case,
    /// What it is about.
    pub workload: &'static Workload,
    /// The memory when the first step began.
    pub start: Vec<u8>,
    /// What reached the memory from then on, and marks.
    pub events: Vec<Event>,
}

/// Makes a file of `bytes` in which nothing is stored for zeroes.
pub fn write_sparse(path: &Path, bytes: &[u8]) -> Result<()> {
    const PIECE: usize = 1 << 16;
    let write = || -> std::io::Result<()> {
        let file = File::create(path)?;
        file.set_len(bytes.len() as u64)?;
        for (n, piece) in bytes.chunks(PIECE).enumerate() {
            if piece.iter().any(|&byte| byte != 0) {
                file.write_all_at(piece, (n * PIECE) as u64)?;
            }
        }
        Ok(())
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// Loads the driver, makes what a guest's disk has on it, and mounts that if it is a file system.
fn prepare(vm: &Vm, workload: &Workload) -> Result<()> {
    match workload.subject {
        Subject::Blocks => load(vm, workload),
        Subject::Kmem => {
            vm.sh("echo online_movable >/sys/devices/system/memory/auto_online_blocks")?;
            load(vm, workload)?;
            vm.sh("echo offline >/sys/devices/faux/kmem1/state")
                .map(drop)
        }
        Subject::Files { kind, dax } => {
            load(vm, workload)?;
            vm.sh(&format!("{} {DISK}", make(kind)))?;
            vm.sh(&mount(kind, dax)).map(drop)
        }
    }
}

fn make(kind: Kind) -> &'static str {
    match kind {
        // Nothing is left for the kernel to do by and by.
        Kind::Ext4 => "mkfs.ext4 -q -F -b 4096 -E lazy_itable_init=0,lazy_journal_init=0",
        // The smallest that it makes otherwise has 300 MiB.
        Kind::Xfs => "mkfs.xfs -q -f --unsupported -m reflink=0 -d agcount=2",
    }
}

/// What mounts the disk in a guest.
pub(super) fn mount(kind: Kind, dax: bool) -> String {
    let (kind, dax) = (
        match kind {
            Kind::Ext4 => "ext4",
            Kind::Xfs => "xfs",
        },
        if dax { "always" } else { "never" },
    );
    format!("mkdir -p {MOUNTED} && mount -t {kind} -o dax={dax} {DISK} {MOUNTED}")
}

/// Loads the driver.
pub(super) fn load(vm: &Vm, workload: &Workload) -> Result<()> {
    vm.insmod(PMEM_KO, &workload.load())?
        .context("the module does not load")
}

fn put_script(vm: &Vm, steps: &[Step]) -> Result<()> {
    vm.write(SCRIPT, &serde_json::to_vec(steps)?)
}

impl Recording {
    /// Boots a machine, has it do the steps, and keeps what was recorded in `dir`.
    pub fn make(case: Case, setup: &Setup, dir: &Path, progress: &Progress) -> Result<Self> {
        let workload = find(&case)?;
        let memory = Persistent::new(workload.size)?;
        let range = UPPER..UPPER + workload.size;
        let vm = setup
            .vm(progress)
            .name(format!("crash-{}", workload.name))
            .persistent(&memory)
            .record_writes()
            .cpus(1)
            .boot_timeout(PATIENCE)
            .module("ext4")
            .module("xfs")
            .start()?;
        prepare(&vm, workload)?;
        put_script(&vm, &case.setup)?;
        vm.sh(&format!("pmem-guest script {SCRIPT}; sync"))?;
        put_script(&vm, &case.steps)?;
        // What is stored from here on until the first step begins is in the copy, or in the log, or in both.
        vm.record(range.clone())?;
        let start = fs::read(memory.path())?;
        write_sparse(&dir.join(START), &start)?;
        vm.sh_for(&format!("pmem-guest script {SCRIPT} marks"), WORK)?;
        let log = vm.recorded()?;
        let end = fs::read(memory.path())?;
        vm.check_clean()?;
        fs::copy(&log, dir.join(LOG)).with_context(|| format!("cannot copy {}", log.display()))?;
        drop(vm);
        fs::write(dir.join(CASE), serde_json::to_vec_pretty(&case)?)?;
        let recording = Self::read(dir)?;
        recording.check(&end)?;
        Ok(recording)
    }

    /// Reads what was kept in a directory.
    pub fn read(dir: &Path) -> Result<Self> {
        let read = |name: &str| {
            let path = dir.join(name);
            fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
        };
        let case: Case = serde_json::from_slice(&read(CASE)?)
            .with_context(|| format!("{} is not of this version", dir.join(CASE).display()))?;
        let workload = find(&case)?;
        let mut start = read(START)?;
        let log = Log::open(&dir.join(LOG))?;
        let range = log.range();
        ensure!(
            range == (UPPER..UPPER + start.len() as u64),
            "the log is of {range:x?}, which is not the memory"
        );
        let mut events = Vec::new();
        let mut before = Domain::new(range, Rules::default());
        let mut begun = false;
        for event in log {
            let event = event?;
            begun |= matches!(event, Event::Mark { .. });
            if begun {
                events.push(event);
            } else {
                before.apply(&event)?;
            }
        }
        // Of what was there before, nothing was written for a long time.
        apply_all(&mut before, &mut start);
        let recording = Self {
            case,
            workload,
            start,
            events,
        };
        recording.check_marks()?;
        Ok(recording)
    }

    /// Keeps it in another directory, too, beside the one that it is in.
    pub fn link(from: &Path, to: &Path) -> Result<()> {
        for name in [START, LOG, CASE] {
            fs::hard_link(from.join(name), to.join(name))
                .with_context(|| format!("cannot link {name} in {}", to.display()))?;
        }
        Ok(())
    }

    /// Each step has a mark at its beginning and at its end, in this order, and there is no other.
    fn check_marks(&self) -> Result<()> {
        let expected =
            (0..self.case.steps.len()).flat_map(|n| [Mark::Begin(n).byte(), Mark::Done(n).byte()]);
        let marks = self.events.iter().filter_map(|event| match event {
            Event::Mark { value, .. } => Some(*value),
            _ => None,
        });
        ensure!(
            marks.clone().eq(expected),
            "there are {} marks of {} steps, or others than it should be: {:?}",
            marks.clone().count(),
            self.case.steps.len(),
            marks.take(40).collect::<Vec<_>>()
        );
        Ok(())
    }

    /// All that changed in the memory is in the log: else a state would be one that no power failure leaves.
    fn check(&self, end: &[u8]) -> Result<()> {
        let mut domain = self.domain(Rules::default());
        for event in &self.events {
            domain.apply(event)?;
        }
        let mut image = self.start.clone();
        apply_all(&mut domain, &mut image);
        if let Some(at) = image.iter().zip(end).position(|(a, b)| a != b) {
            let wrong = image.iter().zip(end).filter(|(a, b)| a != b).count();
            bail!(
                "{wrong} bytes of the memory are not as the log has them, the first at {at:#x}: {:#04x}, not {:#04x}",
                end[at],
                image[at]
            );
        }
        Ok(())
    }

    /// A domain in which all is durable that there was at the start.
    pub fn domain(&self, rules: Rules) -> Domain {
        Domain::new(UPPER..UPPER + self.start.len() as u64, rules)
    }
}

fn find(case: &Case) -> Result<&'static Workload> {
    Workload::find(&case.workload).with_context(|| format!("no workload {:?}", case.workload))
}

/// Writes all to the image that has been stored, durable or not.
fn apply_all(domain: &mut Domain, image: &mut [u8]) {
    let durable = domain.take_durable();
    let rest = domain.states(2, 0).last().map(|state| state.patches);
    for patch in durable.iter().chain(rest.iter().flatten()) {
        apply(patch, image);
    }
}

/// Writes a patch to an image of the memory.
pub fn apply(patch: &Patch, image: &mut [u8]) {
    patch.apply(image, UPPER);
}
