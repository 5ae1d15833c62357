// SPDX-License-Identifier: GPL-2.0-only

//! What the guest does while what reaches its memory is recorded.
//!
//! Steps are chosen at random, the same for the same seed. Those on file systems are short sequences, each on files of
//! its own, that end with something that makes files durable: most bugs of file systems and disks at power failures
//! need no more than three operations to be seen.

use super::tree::Names;
use crate::vm::{Random, MIB};
use pmem_guest::script::{Allocate, Step, Then, Way};

/// A file system on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// ext4.
    Ext4,
    /// XFS.
    Xfs,
}

/// What a workload is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// The disk's own blocks.
    Blocks,
    /// The blocks of a range that is RAM and storage at once, while it is `offline`: nobody else then writes to it.
    Kmem,
    /// Files.
    Files {
        /// Of which file system.
        kind: Kind,
        /// Whether they are in the memory itself.
        dax: bool,
    },
}

/// What the steps are chosen from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Steps {
    Direct,
    Kmem,
    Buffered,
    Sequences,
    MapSync,
}

/// Something to do.
#[derive(Debug, Clone, Copy)]
pub struct Workload {
    /// What it is called.
    pub name: &'static str,
    /// What it does.
    pub about: &'static str,
    /// What it is about.
    pub subject: Subject,
    /// Parameters of the module, beside where the disk is.
    pub parameters: &'static str,
    /// Bytes of the disk, which is all of the persistent memory.
    pub size: u64,
    steps: Steps,
}

const fn files(kind: Kind, dax: bool) -> Subject {
    Subject::Files { kind, dax }
}

/// All there are.
pub const ALL: [Workload; 10] = [
    Workload {
        name: "raw-direct",
        about: "O_DIRECT, from odd buffers, and zeroes: durable when they are done",
        subject: Subject::Blocks,
        parameters: "",
        size: 8 * MIB,
        steps: Steps::Direct,
    },
    Workload {
        name: "raw-cached",
        about: "the same with pmem_copy=wb, through the cache",
        subject: Subject::Blocks,
        parameters: "pmem_copy=wb",
        size: 8 * MIB,
        steps: Steps::Direct,
    },
    Workload {
        name: "raw-buffered",
        about: "writes of any bytes through the page cache; fsync, fdatasync, O_DSYNC",
        subject: Subject::Blocks,
        parameters: "",
        size: 8 * MIB,
        steps: Steps::Buffered,
    },
    Workload {
        name: "kmem",
        about: "blocks of RAM and storage at once: writes, zeroes, discards",
        subject: Subject::Kmem,
        parameters: "",
        size: 128 * MIB,
        steps: Steps::Kmem,
    },
    Workload {
        name: "ext4",
        about: "sequences of operations on files of ext4",
        subject: files(Kind::Ext4, false),
        parameters: "",
        size: 32 * MIB,
        steps: Steps::Sequences,
    },
    Workload {
        name: "ext4-dax",
        about: "the same with DAX, and stores to mappings",
        subject: files(Kind::Ext4, true),
        parameters: "",
        size: 32 * MIB,
        steps: Steps::Sequences,
    },
    Workload {
        name: "ext4-map-sync",
        about:
            "stores to mappings, with MAP_SYNC and write-backs by the program itself, or fdatasync",
        subject: files(Kind::Ext4, true),
        parameters: "",
        size: 32 * MIB,
        steps: Steps::MapSync,
    },
    Workload {
        name: "xfs",
        about: "sequences of operations on files of XFS",
        subject: files(Kind::Xfs, false),
        parameters: "",
        size: 64 * MIB,
        steps: Steps::Sequences,
    },
    Workload {
        name: "xfs-dax",
        about: "the same with DAX, and stores to mappings",
        subject: files(Kind::Xfs, true),
        parameters: "",
        size: 64 * MIB,
        steps: Steps::Sequences,
    },
    Workload {
        name: "xfs-map-sync",
        about:
            "stores to mappings, with MAP_SYNC and write-backs by the program itself, or fdatasync",
        subject: files(Kind::Xfs, true),
        parameters: "",
        size: 64 * MIB,
        steps: Steps::MapSync,
    },
];

/// What is done, and what was done before and is durable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Script {
    /// What was done before.
    pub setup: Vec<Step>,
    /// What is recorded.
    pub steps: Vec<Step>,
}

/// The disk, in the guest.
pub const DISK: &str = "/dev/pmem0";

/// The disk of a range that is RAM and storage at once.
const KMEM: &str = "/dev/kmem1";

/// Where the guest mounts it.
pub const MOUNTED: &str = "/mnt/a";

impl Workload {
    /// The one with this name.
    pub fn find(name: &str) -> Option<&'static Self> {
        ALL.iter().find(|workload| workload.name == name)
    }

    /// Whether it is about a file system: each of its states takes about a second.
    pub fn is_of_files(&self) -> bool {
        matches!(self.subject, Subject::Files { .. })
    }

    /// The parameters with which the module is loaded.
    pub fn load(&self) -> String {
        let Self {
            size, parameters, ..
        } = self;
        match self.subject {
            Subject::Kmem => {
                format!("kmem_start=4G kmem_size={size} kmem_format=blk {parameters}")
            }
            _ => format!("pmem_start=4G pmem_size={size} {parameters}"),
        }
    }

    /// What is done: about `length` operations, as `seed` chooses them.
    pub fn script(&self, length: usize, seed: u64) -> Script {
        let mut random = Choose(Random::new(seed ^ 0x6372_6173_6800));
        match self.steps {
            Steps::Direct => direct(&mut random, length, DISK, 512),
            Steps::Kmem => direct(&mut random, length, KMEM, 4096),
            Steps::Buffered => buffered(&mut random, length),
            Steps::MapSync => map_sync(&mut random, length),
            Steps::Sequences => {
                let dax = matches!(self.subject, Subject::Files { dax: true, .. });
                sequences(&mut random, length, dax)
            }
        }
    }
}

/// Makes choices.
pub(super) struct Choose(pub(super) Random);

impl Choose {
    /// A number less than `end`.
    pub(super) fn below(&mut self, end: u64) -> u64 {
        // The lower bits of such a generator are its worst.
        (self.0.next() >> 16) % end.max(1)
    }

    /// Whether what happens once in `n` happens.
    fn once_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// A number for the content of a write.
    fn seed(&mut self) -> u64 {
        self.0.next() >> 8
    }

    fn one<'a, T>(&mut self, of: &'a [T]) -> Option<&'a T> {
        of.get(self.below(of.len() as u64) as usize)
    }
}

/// The part of the disk that is written: so little that writes meet others.
pub(super) const AREA: u64 = 256 << 10;

fn direct(random: &mut Choose, length: usize, disk: &str, sector: u64) -> Script {
    let path = disk.to_owned();
    let sectors = AREA / sector;
    let steps = (0..length).map(|_| {
        let most = if random.once_in(4) { sectors / 3 } else { 17 };
        let count = 1 + random.below(most);
        let at = random.below(sectors - count + 1) * sector;
        let (path, len) = (path.clone(), count * sector);
        if random.once_in(6) {
            let what = match (disk, random.below(3)) {
                (KMEM, 1..) => Allocate::Punch,
                _ => Allocate::Zero,
            };
            return Step::Allocate {
                path,
                at,
                len,
                what,
            };
        }
        Step::Write {
            path,
            at,
            len,
            seed: random.seed(),
            way: Way::Direct(random.below(8) * 512),
            dsync: random.once_in(3),
        }
    });
    Script {
        setup: Vec::new(),
        steps: steps.collect(),
    }
}

fn buffered(random: &mut Choose, length: usize) -> Script {
    let path = || DISK.to_owned();
    let mut steps = Vec::new();
    while steps.len() < length {
        for _ in 0..=random.below(4) {
            let most = if random.once_in(4) { 60_000 } else { 5000 };
            let len = 1 + random.below(most);
            steps.push(Step::Write {
                path: path(),
                at: random.below(AREA - len),
                len,
                seed: random.seed(),
                way: Way::Buffered,
                dsync: random.once_in(5),
            });
        }
        steps.push(match random.below(2) {
            0 => Step::Fsync { path: path() },
            _ => Step::Fdatasync { path: path() },
        });
    }
    Script {
        setup: Vec::new(),
        steps,
    }
}

fn map_sync(random: &mut Choose, length: usize) -> Script {
    const SIZE: u64 = 40_000;
    let path = |n: u64| format!("{MOUNTED}/{n}");
    let mut setup = Vec::new();
    for n in 0..2 {
        setup.push(Step::Create { path: path(n) });
        setup.push(Step::Write {
            path: path(n),
            at: 0,
            len: SIZE,
            seed: random.seed(),
            way: Way::Buffered,
            dsync: false,
        });
    }
    // Of this one there are no blocks yet: the faults of the stores make some.
    setup.push(Step::Create { path: path(2) });
    setup.push(Step::Truncate {
        path: path(2),
        len: SIZE,
    });
    setup.push(Step::Sync);
    let mut steps = Vec::new();
    while steps.len() < length {
        let most = if random.once_in(4) { 9000 } else { 300 };
        let len = 1 + random.below(most);
        let file = path(random.below(3));
        let choice = random.below(8);
        steps.push(Step::Store {
            path: file.clone(),
            at: random.below(SIZE - len),
            len,
            seed: random.seed(),
            then: match choice {
                0..=2 => Then::Nothing,
                3 => Then::Msync,
                _ => Then::WriteBack,
            },
        });
        if choice < 2 {
            // Of stores to blocks that are there already, the journal knows nothing: it is but a flush.
            steps.push(Step::Fdatasync { path: file });
        }
    }
    Script { setup, steps }
}

/// Sequences of up to three operations, of which each may be made durable, and the last one is.
fn sequences(random: &mut Choose, length: usize, dax: bool) -> Script {
    let (mut setup, mut steps) = (Vec::new(), Vec::new());
    let mut sequence = 0;
    while steps.len() < length {
        let dir = format!("{MOUNTED}/{sequence}");
        sequence += 1;
        let mut names = Names::default();
        let first = setup.len();
        for path in [dir.clone(), format!("{dir}/d")] {
            setup.push(Step::Directory { path });
        }
        let sizes = [6000, 3000];
        for (name, len) in ["a", "b"].into_iter().zip(sizes) {
            // Some sequences begin without files.
            if random.once_in(3) {
                continue;
            }
            let path = format!("{dir}/{name}");
            setup.push(Step::Create { path: path.clone() });
            setup.push(Step::Write {
                path,
                at: 0,
                len,
                seed: random.seed(),
                way: Way::Buffered,
                dsync: false,
            });
        }
        for step in setup.iter().skip(first) {
            names.apply(step);
        }
        let count = 1 + random.below(3);
        for n in 0..count {
            let step = operation(random, &names, &dir, dax);
            names.apply(&step);
            steps.push(step);
            if n + 1 == count || random.once_in(3) {
                steps.push(persistence(random, &names, &dir));
            }
        }
    }
    setup.push(Step::Sync);
    Script { setup, steps }
}

/// Paths of a sequence: in a directory and in one below.
fn paths(dir: &str) -> [String; 4] {
    ["a", "b", "d/a", "d/b"].map(|name| format!("{dir}/{name}"))
}

fn operation(random: &mut Choose, names: &Names, dir: &str, dax: bool) -> Step {
    let all = paths(dir);
    let (there, free): (Vec<_>, Vec<_>) = all.into_iter().partition(|path| names.has(path));
    let choice = random.below(12);
    let create = |random: &mut Choose| random.one(&free).cloned();
    let Some(path) = random.one(&there).cloned() else {
        let path = create(random).unwrap_or_else(|| format!("{dir}/a"));
        return Step::Create { path };
    };
    let size = names.size(&path);
    let seed = random.seed();
    match choice {
        0 => match create(random) {
            Some(path) => Step::Create { path },
            None => Step::Unlink { path },
        },
        1 => match create(random) {
            Some(to) => Step::Link { from: path, to },
            None => Step::Unlink { path },
        },
        2 => Step::Unlink { path },
        // Of a file that is there, or to a path that is free.
        3 | 4 => {
            let others: Vec<_> = paths(dir)
                .into_iter()
                .filter(|other| !names.are_same(&path, other))
                .collect();
            match random.one(&others).cloned() {
                Some(to) => Step::Rename { from: path, to },
                None => Step::Unlink { path },
            }
        }
        5 => Step::Truncate {
            path,
            len: random.below(9000),
        },
        6 => {
            let what = [
                Allocate::Extend,
                Allocate::Keep,
                Allocate::Zero,
                Allocate::Punch,
            ];
            Step::Allocate {
                at: random.below(size + 1),
                len: 1 + random.below(9000),
                what: *random.one(&what).unwrap_or(&Allocate::Keep),
                path,
            }
        }
        7 | 8 if dax && size > 0 => {
            let at = random.below(size);
            Step::Store {
                path,
                at,
                len: 1 + random.below(size - at),
                seed,
                then: match random.below(2) {
                    0 => Then::Nothing,
                    _ => Then::Msync,
                },
            }
        }
        // Direct writes are of whole blocks.
        9 => Step::Write {
            path,
            at: random.below(3) * 4096,
            len: (1 + random.below(2)) * 4096,
            seed,
            way: Way::Direct(0),
            dsync: random.once_in(3),
        },
        choice => {
            let append = choice == 10;
            Step::Write {
                path,
                at: if append { size } else { random.below(size + 1) },
                len: 1 + random.below(9000),
                seed,
                way: Way::Buffered,
                dsync: random.once_in(4),
            }
        }
    }
}

fn persistence(random: &mut Choose, names: &Names, dir: &str) -> Step {
    let mut there: Vec<_> = paths(dir)
        .into_iter()
        .filter(|path| names.has(path))
        .collect();
    match (random.below(8), random.one(&there).cloned()) {
        (0, _) => Step::Sync,
        (1 | 2, Some(path)) => Step::Fdatasync { path },
        (3, _) | (_, None) => {
            there = vec![dir.to_owned(), format!("{dir}/d")];
            Step::Fsync {
                path: random.one(&there).cloned().unwrap_or_default(),
            }
        }
        (_, Some(path)) => Step::Fsync { path },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_makes_the_same_script() {
        for workload in &ALL {
            let script = workload.script(60, 7);
            assert_eq!(script, workload.script(60, 7), "{}", workload.name);
            assert_ne!(script, workload.script(60, 8), "{}", workload.name);
            assert!(script.steps.len() >= 60);
            assert!(Workload::find(workload.name).is_some());
        }
    }

    /// A step that the guest cannot do ends a run.
    #[test]
    fn each_step_on_files_can_be_done() {
        for seed in 0..40 {
            for workload in ALL
                .iter()
                .filter(|w| matches!(w.subject, Subject::Files { .. }))
            {
                let script = workload.script(40, seed);
                let mut names = Names::default();
                for step in script.setup.iter().chain(&script.steps) {
                    let has = |path: &str| names.has(path);
                    let good = match step {
                        Step::Create { path } | Step::Directory { path } => !has(path),
                        Step::Rename { from, to } => has(from) && !names.are_same(from, to),
                        Step::Link { from, to } => has(from) && !has(to),
                        Step::Store { path, at, len, .. } => {
                            has(path) && at + len <= names.size(path)
                        }
                        Step::Write { path, .. }
                        | Step::Allocate { path, .. }
                        | Step::Truncate { path, .. }
                        | Step::Unlink { path }
                        | Step::Fdatasync { path }
                        | Step::Fsync { path } => has(path),
                        Step::Sync => true,
                    };
                    assert!(good, "{}, seed {seed}: {step:?}", workload.name);
                    names.apply(step);
                }
            }
        }
    }
}
