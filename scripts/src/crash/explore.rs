// SPDX-License-Identifier: GPL-2.0-only

//! Goes through what was recorded, stops here and there, and looks at what a power failure could leave there.

use super::check::Checker;
use super::disk::{Disk, WORD};
use super::kmem;
use super::recording::Recording;
use super::tree::Tree;
use super::workload::{Choose, Subject, AREA};
use crate::vm::{Random, UPPER};
use anyhow::{Context, Error, Result};
use pmem_core::kmem::PAGE_SIZE;
use pmem_guest::script::Step;
use pmem_trace::domain::{Domain, Patch, Rules};
use pmem_trace::record::Event;
use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::hash::{Hash, Hasher};
use std::time::Instant;

/// How much to look at.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// States that are checked, of those that are not the same.
    pub states: usize,
    /// How many of them are mounted in a guest, if they are of a file system.
    pub images: usize,
    /// What chooses among them.
    pub seed: u64,
    /// What makes stores durable.
    pub rules: Rules,
    /// When to stop, however much is left.
    pub deadline: Option<Instant>,
    /// After how many losses to stop.
    pub losses: usize,
}

/// A state in which something is lost.
#[derive(Clone)]
pub struct Loss {
    /// How many events there were before the power failed.
    pub events: usize,
    /// What was there of what was not durable.
    pub patches: Vec<Patch>,
    /// What is lost.
    pub why: String,
    /// The memory.
    pub image: Vec<u8>,
}

impl fmt::Debug for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "after event {}: {}", self.events, self.why)
    }
}

/// What was done and found.
#[derive(Debug, Default)]
pub struct Report {
    /// How many moments were looked at.
    pub points: usize,
    /// States that were generated.
    pub states: usize,
    /// Of these, those that were the same as others.
    pub same: usize,
    /// States that were compared with what must be there.
    pub checked: usize,
    /// States that were mounted in a guest.
    pub mounted: usize,
    /// States in which something is lost.
    pub lost: Vec<Loss>,
    /// Whether time was up.
    pub interrupted: bool,
}

/// What must be there.
enum Oracle {
    Disk(Disk),
    Kmem(Disk),
    Tree(Tree),
}

impl Oracle {
    fn new(recording: &Recording) -> Result<Self> {
        let start = &recording.start;
        Ok(match recording.workload.subject {
            Subject::Blocks => Self::Disk(Disk::new(start.clone(), WORD)),
            Subject::Kmem => {
                let blocks = kmem::blocks(start, AREA).map_err(Error::msg)?;
                Self::Kmem(Disk::new(blocks, PAGE_SIZE as usize))
            }
            Subject::Files { .. } => Self::Tree(Tree::new(&recording.case.setup)),
        })
    }

    fn begin(&mut self, step: &Step) {
        match self {
            Self::Disk(disk) | Self::Kmem(disk) => disk.begin(step),
            Self::Tree(tree) => tree.begin(step),
        }
    }

    fn done(&mut self, step: &Step) {
        match self {
            Self::Disk(disk) | Self::Kmem(disk) => disk.done(step),
            Self::Tree(tree) => tree.done(step),
        }
    }

    fn check(
        &self,
        image: &[u8],
        mounts: bool,
        checker: &mut Option<Checker<'_>>,
    ) -> Result<Result<(), String>> {
        match self {
            Self::Disk(disk) => Ok(disk.check(image)),
            Self::Kmem(disk) => {
                Ok(kmem::blocks(image, AREA).and_then(|blocks| disk.check(&blocks)))
            }
            Self::Tree(tree) => {
                let checker = checker.as_mut().context("nobody looks into file systems")?;
                checker.check(image, mounts, tree)
            }
        }
    }
}

/// The memory, and a number for what is in it.
struct Image {
    bytes: Vec<u8>,
    hash: u64,
}

const LINE: usize = 64;

/// Of how many states one is chosen, if there is time for one.
const SOME: usize = 16;

impl Image {
    fn new(bytes: Vec<u8>) -> Self {
        Self { bytes, hash: 0 }
    }

    fn line(&self, line: usize) -> u64 {
        let mut hasher = DefaultHasher::new();
        line.hash(&mut hasher);
        self.bytes
            .get(line * LINE..(line + 1) * LINE)
            .hash(&mut hasher);
        hasher.finish()
    }

    /// Applies patches, and returns those that undo it.
    fn apply(&mut self, patches: &[Patch]) -> Vec<Patch> {
        let mut undo = Vec::with_capacity(patches.len());
        for patch in patches {
            let at = (patch.address - UPPER) as usize;
            let end = at + patch.bytes.len();
            let lines = at / LINE..end.div_ceil(LINE);
            for line in lines.clone() {
                self.hash ^= self.line(line);
            }
            if let Some(bytes) = self.bytes.get_mut(at..end) {
                undo.push(Patch {
                    address: patch.address,
                    bytes: bytes.to_vec(),
                });
                bytes.copy_from_slice(&patch.bytes);
            }
            for line in lines {
                self.hash ^= self.line(line);
            }
        }
        undo
    }
}

/// The moments to look at, as numbers of events that there were before: the end of each step, each fence that had
/// something to wait for, and others; some of them if they are too many.
fn points(events: &[Event], most: usize, random: &mut Choose) -> BTreeSet<usize> {
    let (mut ends, mut others) = (Vec::new(), Vec::new());
    let (mut stored, mut marks) = (false, 0);
    for (n, event) in events.iter().enumerate() {
        match event {
            Event::Mark { .. } => {
                marks += 1;
                if marks % 2 == 0 {
                    ends.push(n + 1);
                }
            }
            Event::Fence { .. } if stored => {
                stored = false;
                others.push(n);
            }
            Event::Fence { .. } | Event::Lost { .. } => {}
            Event::Store { .. } | Event::WriteBack { .. } => stored = true,
        }
    }
    for _ in 0..others.len() / 2 {
        others.push(1 + random.below(events.len() as u64) as usize);
    }
    let mut chosen = BTreeSet::new();
    for (mut from, most) in [(ends, most.div_ceil(2)), (others, most)] {
        while chosen.len() < most && !from.is_empty() {
            let n = random.below(from.len() as u64) as usize;
            chosen.insert(from.swap_remove(n));
        }
    }
    chosen
}

/// What was recorded, up to a moment: what is durable by then, and what must be.
struct Player<'a> {
    recording: &'a Recording,
    oracle: Oracle,
    domain: Domain,
    /// How many marks there were: one before each step, and one after it.
    marks: usize,
}

impl<'a> Player<'a> {
    fn new(recording: &'a Recording, rules: Rules) -> Result<Self> {
        Ok(Self {
            recording,
            oracle: Oracle::new(recording)?,
            domain: recording.domain(rules),
            marks: 0,
        })
    }

    /// Goes on by an event.
    fn play(&mut self, event: &Event) -> Result<()> {
        self.domain.apply(event)?;
        if let Event::Mark { .. } = event {
            if let Some(step) = self.recording.case.steps.get(self.marks / 2) {
                match self.marks % 2 {
                    0 => self.oracle.begin(step),
                    _ => self.oracle.done(step),
                }
            }
            self.marks += 1;
        }
        Ok(())
    }
}

/// Looks at states of what was recorded. Those of a file system need a `checker`.
pub fn explore(
    recording: &Recording,
    limits: &Limits,
    checker: &mut Option<Checker<'_>>,
    mut note: impl FnMut(&Report),
) -> Result<Report> {
    let mut random = Choose(Random::new(limits.seed ^ 0x7374_6174_6573));
    // What can only be mounted takes seconds for each.
    let (states, few) = match recording.workload.subject {
        Subject::Blocks | Subject::Kmem => (limits.states, false),
        Subject::Files { kind, .. } if super::check::looks_inside(kind) => (limits.states, false),
        Subject::Files { .. } => (limits.images, true),
    };
    let points = points(
        &recording.events,
        states.div_ceil(if few { 1 } else { 2 }),
        &mut random,
    );
    let mut report = Report::default();
    let mut player = Player::new(recording, limits.rules)?;
    let mut image = Image::new(recording.start.clone());
    let mut seen = HashSet::new();
    let mut left = points.len();
    for (n, event) in recording.events.iter().enumerate() {
        player.play(event)?;
        if !points.contains(&(n + 1)) {
            continue;
        }
        report.points += 1;
        image.apply(&player.domain.take_durable());
        // What a moment does not need is for those after it.
        let share = (states.saturating_sub(report.checked)).div_ceil(left.max(1));
        left -= 1;
        let bound = if share == 1 { SOME } else { share };
        let all = player.domain.states(bound, limits.seed ^ n as u64);
        let skip = match share {
            1 => random.below(all.len() as u64) as usize,
            _ => 0,
        };
        for state in all.skip(skip).take(share) {
            report.states += 1;
            let undo = image.apply(&state.patches);
            if seen.insert((image.hash, player.marks)) {
                // Spread over all of them.
                let mounts = report.mounted * states < limits.images * (report.checked + 1);
                let found = player.oracle.check(&image.bytes, mounts, checker)?;
                report.checked += 1;
                report.mounted = checker.as_ref().map_or(0, Checker::mounted);
                if let Err(why) = found {
                    report.lost.push(Loss {
                        events: n + 1,
                        patches: state.patches,
                        why,
                        image: image.bytes.clone(),
                    });
                }
                note(&report);
            } else {
                report.same += 1;
            }
            // The first byte that was there is the last that is put back.
            let undo: Vec<Patch> = undo.into_iter().rev().collect();
            image.apply(&undo);
            if report.lost.len() >= limits.losses {
                return Ok(report);
            }
            if limits.deadline.is_some_and(|at| Instant::now() >= at) {
                report.interrupted = true;
                return Ok(report);
            }
        }
    }
    Ok(report)
}

/// Looks at one state again: what was there after so many events, with these patches.
pub fn again(
    recording: &Recording,
    rules: Rules,
    events: usize,
    patches: &[Patch],
    checker: &mut Option<Checker<'_>>,
) -> Result<(Vec<u8>, Result<(), String>)> {
    let mut player = Player::new(recording, rules)?;
    for event in recording.events.iter().take(events) {
        player.play(event)?;
    }
    let mut image = Image::new(recording.start.clone());
    image.apply(&player.domain.take_durable());
    image.apply(patches);
    let found = player.oracle.check(&image.bytes, true, checker)?;
    Ok((image.bytes, found))
}

#[cfg(test)]
mod tests {
    use super::super::recording::Case;
    use super::super::Workload;
    use super::*;
    use pmem_guest::script::{content, Mark, Way};
    use pmem_trace::record::{Bytes, Fence, How};

    const LEN: u64 = 1024;

    /// Two writes to a disk, each with what a driver does after it, before it says that the write is done.
    fn recording(how: How, then: &[Event]) -> Recording {
        let cpu = 0;
        let (mut events, mut steps) = (Vec::new(), Vec::new());
        for n in 0..2 {
            let (at, seed) = (n as u64 * 512, n as u64 + 1);
            steps.push(Step::Write {
                path: String::new(),
                at,
                len: LEN,
                seed,
                way: Way::Direct(0),
                dsync: false,
            });
            let value = Mark::Begin(n).byte();
            events.push(Event::Mark { cpu, value });
            for (address, word) in (UPPER + at..).step_by(8).zip(content(seed, LEN).chunks(8)) {
                let bytes = Bytes::new(word).unwrap();
                events.push(Event::Store {
                    cpu,
                    address,
                    bytes,
                    how,
                });
            }
            events.extend(then);
            let value = Mark::Done(n).byte();
            events.push(Event::Mark { cpu, value });
        }
        Recording {
            case: Case {
                workload: String::new(),
                seed: 0,
                kernel: String::new(),
                mutation: None,
                setup: Vec::new(),
                steps,
            },
            workload: Workload::find("raw-direct").unwrap(),
            start: vec![0; 8192],
            events,
        }
    }

    fn look(recording: &Recording, strict: bool) -> Report {
        let limits = Limits {
            states: 100,
            images: 0,
            seed: 1,
            rules: Rules { strict },
            deadline: None,
            losses: 1,
        };
        explore(recording, &limits, &mut None, |_| {}).unwrap()
    }

    /// A driver that forgets something is found, and one that does not is not blamed.
    #[test]
    fn what_is_not_durable_is_lost_in_some_state() {
        let fence = |kind| Event::Fence { cpu: 0, kind };
        let (sfence, locked) = (fence(Fence::Sfence), fence(Fence::Locked));
        let lines = (0..(512 + LEN) / 64).map(|line| Event::WriteBack {
            cpu: 0,
            line: UPPER + line * 64,
            how: pmem_trace::record::WriteBack::Clwb,
        });
        let lines: Vec<Event> = lines.collect();
        let all = [&lines[..], &[sfence]].concat();
        let most = [&lines[..lines.len() - 1], &[sfence]].concat();
        let cases = [
            (How::NonTemporal, &[sfence][..], true, true),
            (How::NonTemporal, &[], false, false),
            (How::NonTemporal, &[locked], true, false),
            (How::Cached, &all, true, true),
            (How::Cached, &most, false, false),
            (How::Cached, &lines, false, false),
            (How::Cached, &[sfence], false, false),
        ];
        for (how, then, good, good_if_strict) in cases {
            let recording = recording(how, then);
            for (strict, good) in [(false, good), (true, good_if_strict)] {
                let report = look(&recording, strict);
                assert_eq!(report.lost.is_empty(), good, "{how:?} {strict} {report:?}");
                let Some(loss) = report.lost.first() else {
                    assert!(report.checked >= 30, "{report:?}");
                    continue;
                };
                let rules = Rules { strict };
                let (image, found) =
                    again(&recording, rules, loss.events, &loss.patches, &mut None).unwrap();
                assert_eq!(image, loss.image);
                assert_eq!(found.unwrap_err(), loss.why);
            }
        }
    }

    /// The same content of the same place has the same number, however it came there.
    #[test]
    fn images_are_told_apart_by_what_is_in_them() {
        let patch = |address, byte| Patch {
            address: UPPER + address,
            bytes: vec![byte; 70],
        };
        let mut image = Image::new(vec![0; 1024]);
        let start = image.hash;
        let undo = image.apply(&[patch(60, 1), patch(300, 2)]);
        let both = image.hash;
        assert_ne!(both, start);
        image.apply(&undo);
        assert_eq!(image.hash, start);
        assert!(image.bytes.iter().all(|&byte| byte == 0));
        image.apply(&[patch(300, 2)]);
        assert_ne!(image.hash, both);
        image.apply(&[patch(60, 3)]);
        assert_ne!(image.hash, both);
        image.apply(&[patch(60, 1)]);
        assert_eq!(image.hash, both);
    }
}
