// SPDX-License-Identifier: GPL-2.0-only

//! What a power failure may leave of files.
//!
//! Names change in an order that journals keep: what is there after a power failure is what there was at one moment,
//! and no earlier one than was made durable. What a file has in it is not ordered like that: each byte may be that of
//! any write since the last one that was made durable, and zero where there was no byte before. Nothing else may be in
//! a file: no other file's data, and nothing that was never written.
//!
//! What makes durable:
//!
//! | step | of the file | of names |
//! |---|---|---|
//! | `fsync` | all | those that the file got and lost |
//! | `fdatasync` | all | |
//! | `O_DSYNC`, `msync`, stores that are written back with `MAP_SYNC` | these bytes | |
//! | `fsync` of a directory | | all in it |
//! | `sync` | all of all files | all |
//!
//! That is what ext4 and XFS do, which is more than POSIX asks for.

use super::workload::MOUNTED;
use pmem_guest::script::{content, Allocate, Entry, Step, Then};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// Directories that a file system has by itself.
const OWN: &str = "lost+found";

/// Files with their names and contents, as a program sees them.
#[derive(Debug, Clone, Default)]
pub struct Names {
    directories: BTreeSet<String>,
    /// Numbers of files by their paths.
    files: BTreeMap<String, usize>,
    contents: Vec<Vec<u8>>,
}

/// What a step touches.
#[derive(Debug, Clone, Default)]
struct Touched {
    /// Directories of which a name comes or goes.
    directories: Vec<String>,
    /// Files that get or lose a name.
    named: Vec<usize>,
    /// A file whose content changes.
    content: Option<usize>,
}

fn parent(path: &str) -> String {
    path.rsplit_once('/').map_or("", |(dir, _)| dir).to_owned()
}

impl Names {
    /// Whether there is a file or a directory.
    pub fn has(&self, path: &str) -> bool {
        self.files.contains_key(path) || self.directories.contains(path)
    }

    /// Bytes of a file; 0 if there is none.
    pub fn size(&self, path: &str) -> u64 {
        self.content(path).map_or(0, |content| content.len() as u64)
    }

    /// Whether two names are of one file.
    pub fn are_same(&self, a: &str, b: &str) -> bool {
        match (self.files.get(a), self.files.get(b)) {
            (Some(a), Some(b)) => a == b,
            _ => a == b,
        }
    }

    fn content(&self, path: &str) -> Option<&Vec<u8>> {
        self.contents.get(*self.files.get(path)?)
    }

    /// Does a step.
    pub fn apply(&mut self, step: &Step) {
        self.touch(step);
    }

    fn touch(&mut self, step: &Step) -> Touched {
        let mut touched = Touched::default();
        match step {
            Step::Directory { path } => {
                self.directories.insert(path.clone());
                touched.directories.push(parent(path));
            }
            Step::Create { path } => {
                let file = self.contents.len();
                self.contents.push(Vec::new());
                self.files.insert(path.clone(), file);
                touched.directories.push(parent(path));
                touched.named.push(file);
            }
            Step::Rename { from, to } => {
                if let Some(file) = self.files.remove(from) {
                    touched.named.push(file);
                    touched.named.extend(self.files.insert(to.clone(), file));
                    touched.directories.extend([parent(from), parent(to)]);
                }
            }
            Step::Link { from, to } => {
                if let Some(&file) = self.files.get(from) {
                    self.files.insert(to.clone(), file);
                    touched.named.push(file);
                    touched.directories.push(parent(to));
                }
            }
            Step::Unlink { path } => {
                touched.named.extend(self.files.remove(path));
                touched.directories.push(parent(path));
            }
            Step::Write {
                path,
                at,
                len,
                seed,
                ..
            }
            | Step::Store {
                path,
                at,
                len,
                seed,
                ..
            } => {
                let bytes = content(*seed, *len);
                touched.content = self.change(path, |content| {
                    let (at, end) = (*at as usize, (*at + *len) as usize);
                    if content.len() < end {
                        content.resize(end, 0);
                    }
                    content[at..end].copy_from_slice(&bytes);
                });
            }
            Step::Allocate {
                path,
                at,
                len,
                what,
            } => {
                let (at, end) = (*at as usize, (*at + *len) as usize);
                touched.content = self.change(path, |content| match what {
                    Allocate::Extend => content.resize(content.len().max(end), 0),
                    Allocate::Keep => {}
                    Allocate::Zero | Allocate::Punch => {
                        let end = end.min(content.len());
                        if let Some(bytes) = content.get_mut(at..end) {
                            bytes.fill(0);
                        }
                    }
                });
            }
            Step::Truncate { path, len } => {
                touched.content = self.change(path, |content| content.resize(*len as usize, 0));
            }
            Step::Fsync { .. } | Step::Fdatasync { .. } | Step::Sync => {}
        }
        touched
    }

    fn change(&mut self, path: &str, with: impl FnOnce(&mut Vec<u8>)) -> Option<usize> {
        let file = *self.files.get(path)?;
        with(self.contents.get_mut(file)?);
        Some(file)
    }
}

/// Names that there may be, and by what they came to be so.
#[derive(Debug, Clone)]
struct Version {
    directories: BTreeSet<String>,
    files: BTreeMap<String, usize>,
    touched: Touched,
}

/// What must be there of files, and what may be.
#[derive(Debug, Clone)]
pub struct Tree {
    /// What the program sees.
    now: Names,
    /// Names that there may be: the oldest first, and the last is what the program sees. At least one.
    versions: Vec<Version>,
    /// What files may have in them, in the same order: at least one content each.
    contents: Vec<Vec<Vec<u8>>>,
}

impl Tree {
    /// What `setup` makes, all durable.
    pub fn new(setup: &[Step]) -> Self {
        let mut now = Names::default();
        for step in setup {
            now.apply(step);
        }
        Self {
            versions: vec![Version {
                directories: now.directories.clone(),
                files: now.files.clone(),
                touched: Touched::default(),
            }],
            contents: now.contents.iter().map(|now| vec![now.clone()]).collect(),
            now,
        }
    }

    /// A step begins: it may be done already.
    pub fn begin(&mut self, step: &Step) {
        let touched = self.now.touch(step);
        self.contents.resize(self.now.contents.len(), Vec::new());
        for (may, now) in self.contents.iter_mut().zip(&self.now.contents) {
            if may.is_empty() {
                may.push(now.clone());
            }
        }
        if let Some(file) = touched.content {
            if let (Some(may), Some(now)) =
                (self.contents.get_mut(file), self.now.contents.get(file))
            {
                may.push(now.clone());
            }
        }
        if !touched.directories.is_empty() {
            self.versions.push(Version {
                directories: self.now.directories.clone(),
                files: self.now.files.clone(),
                touched,
            });
        }
    }

    /// A step is done: what it has made durable is there.
    pub fn done(&mut self, step: &Step) {
        match step {
            Step::Sync => {
                for may in &mut self.contents {
                    keep_last(may);
                }
                keep_last(&mut self.versions);
            }
            Step::Fsync { path } if self.now.directories.contains(path) => {
                self.settle(|touched| touched.directories.contains(path));
            }
            Step::Fsync { path } => {
                if let Some(file) = self.settle_content(path) {
                    self.settle(|touched| touched.named.contains(&file));
                }
            }
            Step::Fdatasync { path } => {
                self.settle_content(path);
            }
            Step::Write {
                path,
                at,
                len,
                dsync: true,
                ..
            }
            | Step::Store {
                path,
                at,
                len,
                then: Then::Msync | Then::WriteBack,
                ..
            } => self.settle_bytes(path, *at as usize..(*at + *len) as usize),
            _ => {}
        }
    }

    /// The last change of names that `is_it` says is durable, and those before it.
    fn settle(&mut self, is_it: impl Fn(&Touched) -> bool) {
        let last = self.versions.iter().rposition(|v| is_it(&v.touched));
        self.versions.drain(..last.unwrap_or(0));
    }

    fn settle_content(&mut self, path: &str) -> Option<usize> {
        let file = *self.now.files.get(path)?;
        keep_last(self.contents.get_mut(file)?);
        Some(file)
    }

    fn settle_bytes(&mut self, path: &str, range: Range<usize>) {
        let Some(&file) = self.now.files.get(path) else {
            return;
        };
        let (Some(may), Some(now)) = (self.contents.get_mut(file), self.now.contents.get(file))
        else {
            return;
        };
        let Some(bytes) = now.get(range.clone()) else {
            return;
        };
        for may in may {
            if may.len() < range.end {
                may.resize(range.end, 0);
            }
            may[range.clone()].copy_from_slice(bytes);
        }
    }

    /// Whether a power failure may have left these files.
    ///
    /// # Errors
    ///
    /// What is lost.
    pub fn check(&self, entries: &[Entry]) -> Result<(), String> {
        let (mut directories, mut files) = (BTreeSet::new(), BTreeMap::new());
        for entry in entries.iter().filter(|entry| entry.path != OWN) {
            let path = format!("{MOUNTED}/{}", entry.path);
            match &entry.file {
                None => drop(directories.insert(path)),
                Some(content) => drop(files.insert(path, &content.0[..])),
            }
        }
        let mut why = Vec::new();
        for version in self.versions.iter().rev() {
            match self.check_version(version, &directories, &files) {
                Ok(()) => return Ok(()),
                Err(error) => why.push(error),
            }
        }
        let mut text = why.swap_remove(0);
        if let Some(oldest) = why.pop() {
            text += &format!("; nor is it what was durable before: {oldest}");
        }
        Err(text)
    }

    fn check_version(
        &self,
        version: &Version,
        directories: &BTreeSet<String>,
        files: &BTreeMap<String, &[u8]>,
    ) -> Result<(), String> {
        if let Some(path) = version.directories.symmetric_difference(directories).next() {
            return Err(match directories.contains(path) {
                true => format!("the directory {path} is there"),
                false => format!("the directory {path} is not there"),
            });
        }
        if let Some(path) = files.keys().find(|&path| !version.files.contains_key(path)) {
            return Err(format!("the file {path} is there"));
        }
        for (path, &file) in &version.files {
            let Some(found) = files.get(path) else {
                return Err(format!("the file {path} is not there"));
            };
            let may = self.contents.get(file).map_or(&[][..], Vec::as_slice);
            is_mix(may, found).map_err(|why| format!("the file {path} {why}"))?;
        }
        Ok(())
    }
}

fn keep_last<T>(of: &mut Vec<T>) {
    of.drain(..of.len().saturating_sub(1));
}

/// Whether each byte that is found is one of those that it may be.
fn is_mix(may: &[Vec<u8>], found: &[u8]) -> Result<(), String> {
    let lengths = || may.iter().map(Vec::len);
    let (least, most) = (lengths().min().unwrap_or(0), lengths().max().unwrap_or(0));
    if !(least..=most).contains(&found.len()) {
        let right = match least == most {
            true => format!("{least}"),
            false => format!("{least} to {most}"),
        };
        return Err(format!("has {} bytes, not {right}", found.len()));
    }
    let good = |at: usize, byte: u8| {
        // Where a file grows, there are zeroes first.
        may.iter()
            .any(|may| may.get(at).copied().unwrap_or(0) == byte)
    };
    let mut wrong = (0..).zip(found).filter(|&(at, &byte)| !good(at, byte));
    match wrong.next() {
        None => Ok(()),
        Some((at, byte)) => {
            let right: BTreeSet<u8> = may
                .iter()
                .map(|may| may.get(at).copied().unwrap_or(0))
                .collect();
            Err(format!(
                "has {} wrong bytes of {}, the first at {at}: {byte:#04x}, not {right:02x?}",
                wrong.count() + 1,
                found.len()
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pmem_guest::script::Way;
    use pmem_guest::Bytes;

    fn path(name: &str) -> String {
        format!("{MOUNTED}/{name}")
    }

    fn create(name: &str) -> Step {
        Step::Create { path: path(name) }
    }

    fn write(name: &str, at: u64, len: u64, seed: u64, dsync: bool) -> Step {
        Step::Write {
            path: path(name),
            at,
            len,
            seed,
            way: Way::Buffered,
            dsync,
        }
    }

    fn fsync(name: &str) -> Step {
        Step::Fsync { path: path(name) }
    }

    fn rename(from: &str, to: &str) -> Step {
        Step::Rename {
            from: path(from),
            to: path(to),
        }
    }

    fn found(files: &[(&str, &[u8])]) -> Vec<Entry> {
        let file = |&(name, content): &(&str, &[u8])| Entry {
            path: name.into(),
            file: Some(Bytes(content.into())),
        };
        let own = Entry {
            path: OWN.into(),
            file: None,
        };
        files.iter().map(file).chain([own]).collect()
    }

    fn with(setup: &[Step], steps: &[Step]) -> Tree {
        let mut tree = Tree::new(setup);
        for step in steps {
            tree.begin(step);
            tree.done(step);
        }
        tree
    }

    #[test]
    fn what_is_not_synced_may_be_lost_and_what_is_may_not() {
        let (old, new) = (content(1, 100), content(2, 50));
        let setup = [create("a"), write("a", 0, 100, 1, false)];
        let overwrite = write("a", 50, 50, 2, false);
        let both = [&old[..50], &new[..]].concat();
        let torn = [&old[..50], &new[..20], &old[70..]].concat();
        let cases = [&old[..], &both, &torn];

        let tree = with(&setup, std::slice::from_ref(&overwrite));
        for content in cases {
            assert_eq!(tree.check(&found(&[("a", content)])), Ok(()));
        }
        let mut wrong = old.clone();
        wrong[10] ^= 1;
        assert!(tree.check(&found(&[("a", &wrong)])).is_err());
        assert!(tree.check(&found(&[("a", &old[..99])])).is_err());
        assert!(tree.check(&found(&[])).is_err());
        assert!(tree.check(&found(&[("a", &old), ("b", &[])])).is_err());

        let syncs = [
            fsync("a"),
            Step::Fdatasync { path: path("a") },
            Step::Sync,
            write("a", 50, 50, 2, true),
        ];
        for sync in syncs {
            let tree = with(&setup, &[overwrite.clone(), sync]);
            assert_eq!(tree.check(&found(&[("a", &both)])), Ok(()));
            assert!(tree.check(&found(&[("a", &old)])).is_err());
            assert!(tree.check(&found(&[("a", &torn)])).is_err());
        }
    }

    #[test]
    fn only_these_bytes_are_durable_with_o_dsync() {
        let old = content(1, 100);
        let setup = [create("a"), write("a", 0, 100, 1, false)];
        let tree = with(
            &setup,
            &[write("a", 0, 50, 2, false), write("a", 200, 10, 3, true)],
        );
        let rest = [&old[..], &[0; 100], &content(3, 10)].concat();
        let new = [&content(2, 50)[..], &rest[50..]].concat();
        for content in [&rest, &new] {
            assert_eq!(tree.check(&found(&[("a", content)])), Ok(()));
        }
        assert!(tree.check(&found(&[("a", &old)])).is_err());
        assert!(tree.check(&found(&[("a", &rest[..209])])).is_err());
    }

    #[test]
    fn growth_may_be_zeroes_and_never_junk() {
        let old = content(1, 100);
        let setup = [create("a"), write("a", 0, 100, 1, false)];
        let tree = with(&setup, &[write("a", 100, 100, 2, false)]);
        for len in [100, 150, 200] {
            let mut grown = old.clone();
            grown.resize(len, 0);
            assert_eq!(tree.check(&found(&[("a", &grown)])), Ok(()));
        }
        let mut junk = old.clone();
        junk.resize(200, 0xee);
        assert!(tree.check(&found(&[("a", &junk)])).is_err());
        assert!(tree
            .check(&found(&[("a", &[old, vec![0; 101]].concat())]))
            .is_err());
    }

    #[test]
    fn names_are_those_of_one_moment() {
        let setup = [create("a"), write("a", 0, 9, 1, false), create("b")];
        let (of_a, no) = (content(1, 9), &[][..]);
        let steps = [rename("a", "b"), create("c")];
        let old = found(&[("a", &of_a), ("b", no)]);
        let renamed = found(&[("b", &of_a)]);
        let new = found(&[("b", &of_a), ("c", no)]);
        let tree = with(&setup, &steps);
        for good in [&old, &renamed, &new] {
            assert_eq!(tree.check(good), Ok(()));
        }
        // Both names, neither, and the second step without the first.
        let bad = [
            found(&[("a", &of_a), ("b", &of_a)]),
            found(&[("b", no)]),
            found(&[]),
            found(&[("a", &of_a), ("b", no), ("c", no)]),
        ];
        for bad in &bad {
            assert!(tree.check(bad).is_err(), "{bad:?}");
        }
        // The file's own names are durable with it, and so is what came before.
        let tree = with(&setup, &[&steps[..], &[fsync("b")]].concat());
        assert!(tree.check(&old).is_err());
        assert_eq!(tree.check(&renamed), Ok(()));
        let tree = with(&setup, &[&steps[..], &[fsync("c")]].concat());
        assert!(tree.check(&renamed).is_err());
        assert_eq!(tree.check(&new), Ok(()));
        // A name that is gone stays gone.
        let unlink = Step::Unlink { path: path("b") };
        let tree = with(&setup, &[unlink, Step::Sync]);
        assert!(tree.check(&old).is_err());
        assert_eq!(tree.check(&found(&[("a", &of_a)])), Ok(()));
    }

    #[test]
    fn a_directory_makes_its_names_durable() {
        let setup = [
            Step::Directory { path: path("d") },
            create("d/a"),
            create("b"),
        ];
        let steps = [rename("b", "c"), rename("d/a", "d/b"), fsync("d")];
        let tree = with(&setup, &steps);
        let entries = |names: [&str; 2]| {
            let mut entries = found(&names.map(|name| (name, &[][..])));
            entries.push(Entry {
                path: "d".into(),
                file: None,
            });
            entries
        };
        assert_eq!(tree.check(&entries(["c", "d/b"])), Ok(()));
        assert!(tree.check(&entries(["c", "d/a"])).is_err());
        assert!(tree.check(&entries(["b", "d/b"])).is_err());
    }
}
