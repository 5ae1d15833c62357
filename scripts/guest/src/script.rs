// SPDX-License-Identifier: GPL-2.0-only

//! What a guest does to files and disks, step by step, while what reaches its memory is recorded.
//!
//! The guest says where it is: a [`Mark`] before each step and one when it is done.

use crate::Random;
use serde::{Deserialize, Serialize};

/// A step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// Make an empty file that is not there.
    Create {
        /// The file's path.
        path: String,
    },
    /// Make a directory.
    Directory {
        /// Its path.
        path: String,
    },
    /// Write to a file or a disk.
    Write {
        /// Its path.
        path: String,
        /// The first byte.
        at: u64,
        /// How many bytes.
        len: u64,
        /// What they are, see [`content`].
        seed: u64,
        /// By which way.
        way: Way,
        /// Whether it is done when it is durable (`O_DSYNC`).
        dsync: bool,
    },
    /// Store to a mapping of a file, in which the file has the bytes already.
    Store {
        /// Its path.
        path: String,
        /// The first byte.
        at: u64,
        /// How many bytes.
        len: u64,
        /// What they are, see [`content`].
        seed: u64,
        /// What is done to make them durable.
        then: Then,
    },
    /// `fallocate(2)`.
    Allocate {
        /// The path of a file or a disk.
        path: String,
        /// The first byte.
        at: u64,
        /// How many bytes.
        len: u64,
        /// What is to be there.
        what: Allocate,
    },
    /// `ftruncate(2)`.
    Truncate {
        /// The file's path.
        path: String,
        /// Its size from now on.
        len: u64,
    },
    /// `rename(2)`.
    Rename {
        /// The path that goes.
        from: String,
        /// The path that comes, or is replaced.
        to: String,
    },
    /// `link(2)`.
    Link {
        /// A file's path.
        from: String,
        /// One more.
        to: String,
    },
    /// `unlink(2)`.
    Unlink {
        /// The path that goes.
        path: String,
    },
    /// `fsync(2)` of a file, a directory or a disk.
    Fsync {
        /// Its path.
        path: String,
    },
    /// `fdatasync(2)`.
    Fdatasync {
        /// The path of a file or a disk.
        path: String,
    },
    /// `sync(2)`.
    Sync,
}

/// How a write goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// As usual.
    Buffered,
    /// With `O_DIRECT`, from memory that begins so many bytes behind the start of a page.
    Direct(u64),
}

/// What makes stores to a mapping durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Then {
    /// Nothing.
    Nothing,
    /// `msync(2)`.
    Msync,
    /// The program itself writes the cache lines back, in a mapping with `MAP_SYNC`.
    WriteBack,
}

/// What `fallocate(2)` is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Allocate {
    /// The file gets room, and is as long as that at least.
    Extend,
    /// The file gets room, and keeps its size.
    Keep,
    /// Zeroes, and the file or the disk keeps its size and its room.
    Zero,
    /// Zeroes without room.
    Punch,
}

/// Where a guest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    /// It begins a step.
    Begin(usize),
    /// A step is done.
    Done(usize),
}

impl Mark {
    /// What is written: the number of the step goes round.
    pub fn byte(self) -> u8 {
        let (step, done) = match self {
            Self::Begin(step) => (step, 0),
            Self::Done(step) => (step, 1),
        };
        (step % 128 * 2 + done) as u8
    }
}

/// The bytes of a write.
pub fn content(seed: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    Random::new(seed).bytes(&mut bytes);
    bytes
}

/// A file or a directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its path, relative to what was listed.
    pub path: String,
    /// What is in a file.
    pub file: Option<crate::Bytes>,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Were two marks in a row the same, one that is missing would not be noticed.
    #[test]
    fn marks_next_to_each_other_differ() {
        let marks: Vec<u8> = (0..400)
            .flat_map(|step| [Mark::Begin(step).byte(), Mark::Done(step).byte()])
            .collect();
        for near in marks.windows(5) {
            for (n, mark) in near.iter().enumerate() {
                assert!(!near[n + 1..].contains(mark), "{near:?}");
            }
        }
    }
}
