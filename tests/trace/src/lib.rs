// SPDX-License-Identifier: GPL-2.0-only

//! How the CPUs of a virtual machine access a range of its physical memory: what a plugin in QEMU counts or records, and
//! the language in which the host asks for it.
//!
//! The plugin listens on a socket of the host's. A connection is one question and its answer, each a line of JSON:
//!
//! ```text
//! host    {"watch":{"start":4261412864,"size":1048576}}
//! plugin  "done"
//!
//! host    "report"
//! plugin  {"accesses":{"counted":[{"kind":"store","size":8,"aligned":true,"pc":18446744072650358784,"count":512}],"lost":0}}
//!
//! host    {"record":{"start":4294967296,"size":1048576,"log":"log"}}
//! plugin  "done"
//!
//! host    "end-record"
//! plugin  {"recorded":{"log":"log","events":1234}}
//! ```
//!
//! [`Watcher`] and [`Recorder`] are the plugin's side without QEMU, [`ask`] is the host's. [`record`] is what is recorded,
//! and [`domain`] what a power failure could leave of it.
//!
//! [`calls`] has the instructions of system calls, which is a language of its own on another socket.

#![forbid(unsafe_code)]

pub mod calls;
pub mod domain;
#[cfg(feature = "instruction")]
pub mod instruction;
pub mod mark;
pub mod paging;
pub mod record;
mod recorder;
mod socket;
mod watcher;

pub use recorder::{Place, Recorder};
pub use watcher::Watcher;

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// What the host asks of the plugin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Forget what was counted, and count accesses to this range from now on. Answered by [`Reply::Done`].
    Watch {
        /// The first physical address.
        start: u64,
        /// How many bytes.
        size: u64,
    },
    /// Tell what was counted, and go on counting. Answered by [`Reply::Accesses`].
    Report,
    /// Record what is done to this range from now on. Answered by [`Reply::Done`].
    Record {
        /// The first physical address.
        start: u64,
        /// How many bytes.
        size: u64,
        /// The file that it is kept in, which must not be there yet; relative to the directory that QEMU runs in.
        log: PathBuf,
    },
    /// Record no more, and end the file. Answered by [`Reply::Recorded`].
    EndRecord,
}

/// What the plugin answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// It was done.
    Done,
    /// What was counted since the last [`Request::Watch`].
    Accesses(Accesses),
    /// The file has what was recorded.
    Recorded {
        /// The file, as it was asked for.
        log: PathBuf,
        /// How many events.
        events: u64,
    },
    /// It cannot be done, and why.
    Refused(String),
}

/// Which way an access goes. An atomic instruction that reads and writes is one of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// From memory to the CPU.
    Load,
    /// From the CPU to memory.
    Store,
}

/// How memory is accessed, wherever and by whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Shape {
    /// Which way.
    pub kind: Kind,
    /// How many bytes: a power of two.
    pub size: u64,
    /// Whether the address is a multiple of the size.
    pub aligned: bool,
}

impl Shape {
    /// An access to an address that is a multiple of `size` bytes.
    pub const fn aligned(kind: Kind, size: u64) -> Self {
        Self {
            kind,
            size,
            aligned: true,
        }
    }

    /// An access to an address that is not a multiple of `size` bytes.
    pub const fn misaligned(kind: Kind, size: u64) -> Self {
        Self {
            kind,
            size,
            aligned: false,
        }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::Load => "load",
            Kind::Store => "store",
        };
        let place = match self.aligned {
            true => "aligned",
            false => "misaligned",
        };
        write!(f, "{kind} of {} bytes, {place}", self.size)
    }
}

/// Accesses of one shape by one instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counted {
    /// Their shape.
    #[serde(flatten)]
    pub shape: Shape,
    /// The virtual address of the instruction in the guest.
    pub pc: u64,
    /// How many there were; at least one.
    pub count: u64,
}

/// Accesses to a range.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accesses {
    /// Those whose address is known, in the order of their shapes.
    pub counted: Vec<Counted>,
    /// How many had a physical address that QEMU could not tell, as the CPU had forgotten it at once: they may be in
    /// the range or not.
    pub lost: u64,
}

impl Accesses {
    /// How many there were of each shape.
    pub fn shapes(&self) -> BTreeMap<Shape, u64> {
        let mut shapes = BTreeMap::new();
        for counted in &self.counted {
            *shapes.entry(counted.shape).or_default() += counted.count;
        }
        shapes
    }

    /// Those that are not as `good` wants them.
    pub fn except(&self, good: impl Fn(&Shape) -> bool) -> Vec<Counted> {
        let bad = self.counted.iter().filter(|counted| !good(&counted.shape));
        bad.copied().collect()
    }
}

/// Asks the plugin that listens on `socket`.
pub fn ask(socket: &Path, request: Request) -> io::Result<Reply> {
    socket::ask(socket, &request)
}

/// Has `answer` reply to who connects, one after the other, for as long as the socket is there.
pub fn serve(listener: &UnixListener, answer: impl Fn(Request) -> Reply) {
    socket::serve(listener, |request| match request {
        Ok(request) => answer(request),
        Err(why) => Reply::Refused(why),
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(shape: Shape, pc: u64, count: u64) -> Counted {
        Counted { shape, pc, count }
    }

    #[test]
    fn lines_are_as_documented() {
        let watch = Request::Watch {
            start: 0xfe00_0000,
            size: 1 << 20,
        };
        assert_eq!(
            serde_json::to_string(&watch).unwrap(),
            r#"{"watch":{"start":4261412864,"size":1048576}}"#
        );
        let reply = Reply::Accesses(Accesses {
            counted: vec![counted(
                Shape::aligned(Kind::Store, 8),
                0xffff_ffff_c0de_0000,
                512,
            )],
            lost: 1,
        });
        let line = serde_json::to_string(&reply).unwrap();
        assert_eq!(
            line,
            r#"{"accesses":{"counted":[{"kind":"store","size":8,"aligned":true,"pc":18446744072650358784,"count":512}],"lost":1}}"#
        );
        assert_eq!(serde_json::from_str::<Reply>(&line).unwrap(), reply);
    }

    #[test]
    fn shapes_are_summed_whoever_made_them() {
        let (load, store) = (
            Shape::misaligned(Kind::Load, 4),
            Shape::aligned(Kind::Store, 8),
        );
        let accesses = Accesses {
            counted: vec![
                counted(load, 0x10, 3),
                counted(store, 0x20, 5),
                counted(store, 0x30, 7),
            ],
            lost: 0,
        };
        assert_eq!(accesses.shapes(), BTreeMap::from([(load, 3), (store, 12)]));
        let good = |shape: &Shape| shape.aligned && shape.size == 8;
        assert_eq!(accesses.except(good), [counted(load, 0x10, 3)]);
        assert_eq!(load.to_string(), "load of 4 bytes, misaligned");
        assert_eq!(store.to_string(), "store of 8 bytes, aligned");
    }
}
