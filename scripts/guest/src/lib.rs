// SPDX-License-Identifier: GPL-2.0-only

//! The language that a guest's agent and the host speak.
//!
//! Lines of JSON over a port of a virtio console. (An emulated 16550 carries 2 kB/s.) The agent says [`Reply::Ready`] once, and
//! answers every [`Request`] with one [`Reply`] of the same number, in order:
//!
//! ```text
//! guest  {"id":0,"reply":{"ready":{"kernel":"7.3.4+deb13-cloud-amd64"}}}
//! host   {"id":1,"request":{"run":{"argv":["true"],...}}}
//! guest  {"id":1,"reply":{"ran":{"end":{"exit":0},"stdout":"","stderr":""}}}
//! ```
//!
//! After [`Request::Shell`] has been answered with [`Reply::Done`], the line carries the bytes of a
//! terminal, until the shell ends and the guest powers off.

#![forbid(unsafe_code)]

pub mod script;

use base64::engine::general_purpose::STANDARD;
use base64::Engine as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The port's name, which the guest finds in `/sys/class/virtio-ports/*/name`.
pub const PORT: &str = "pmem.agent";

/// A file of the guest that lists, a path a line, the modules to load before the port can be there.
pub const EARLY_MODULES: &str = "/modules/early";

/// What the host asks of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Answer [`Reply::Done`].
    Ping,
    /// Run a program to its end. Answered by [`Reply::Ran`].
    Run(Run),
    /// Write a file, or append to it. Answered by [`Reply::Done`].
    Write {
        /// The file's path.
        path: String,
        /// What to write.
        data: Bytes,
        /// Whether to append rather than to begin anew.
        append: bool,
    },
    /// Read a part of a file, which is shorter than asked for at the file's end. Answered by
    /// [`Reply::Data`].
    Read {
        /// The file's path.
        path: String,
        /// Where to begin.
        offset: u64,
        /// How many bytes at most.
        len: u64,
    },
    /// Load a module with `finit_module(2)`. Answered by [`Reply::Done`].
    Insmod {
        /// The module's file.
        path: String,
        /// Its parameters, as on a command line.
        params: String,
    },
    /// Unload a module with `delete_module(2)`, without waiting. Answered by [`Reply::Done`].
    Rmmod {
        /// The module's name.
        name: String,
    },
    /// Become a terminal with a shell in it. Answered by [`Reply::Done`], and by nothing after that.
    Shell {
        /// Rows of the host's terminal.
        rows: u16,
        /// Columns of the host's terminal.
        cols: u16,
        /// What kind of terminal it is.
        term: String,
    },
    /// Write everything back and power off. Not answered: the guest is gone.
    PowerOff,
}

/// A program to run in the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// The program, and its arguments.
    pub argv: Vec<String>,
    /// Variables to add to the environment.
    pub env: Vec<(String, String)>,
    /// What it reads on its standard input.
    pub stdin: Bytes,
    /// After how many milliseconds it and its children are killed.
    pub timeout_ms: u64,
}

/// What the guest answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// The guest has booted.
    Ready {
        /// Its kernel's release.
        kernel: String,
    },
    /// It was done.
    Done,
    /// A program ended.
    Ran(Ran),
    /// A part of a file.
    Data(Bytes),
    /// A system call failed.
    Errno {
        /// The error's number.
        errno: i32,
        /// What was attempted, and the error's text.
        text: String,
    },
}

/// How a program ended, and what it wrote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ran {
    /// How it ended.
    pub end: End,
    /// What it wrote to its standard output. What is not UTF-8 is replaced.
    pub stdout: String,
    /// What it wrote to its standard error.
    pub stderr: String,
}

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum End {
    /// It exited with this code.
    Exit(i32),
    /// This signal killed it.
    Signal(i32),
    /// It took too long and was killed.
    Timeout,
}

/// One line from host to guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// Repeated in the answer.
    pub id: u64,
    /// What is asked.
    pub request: Request,
}

/// One line from guest to host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The call's number; 0 for [`Reply::Ready`].
    pub id: u64,
    /// The answer.
    pub reply: Reply,
}

/// Bytes that travel as base64.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        STANDARD
            .decode(text)
            .map(Bytes)
            .map_err(serde::de::Error::custom)
    }
}

/// Xorshift: the same bytes for the same seed, in the guest and on the host.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// A sequence of this seed's.
    pub fn new(seed: u64) -> Self {
        // A state of 0 would stay 0.
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number.
    #[expect(clippy::should_implement_trait, reason = "it does not end")]
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Fills `to`.
    pub fn bytes(mut self, to: &mut [u8]) {
        for word in to.chunks_mut(8) {
            word.copy_from_slice(&self.next().to_le_bytes()[..word.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every request and reply must arrive as it was sent, on one line.
    #[test]
    fn lines_round_trip() {
        let requests = [
            Request::Ping,
            Request::Run(Run {
                argv: vec!["sh".into(), "-c".into(), "echo \"a\nb\"".into()],
                env: vec![("A".into(), "b c".into())],
                stdin: Bytes(vec![0, 10, 255]),
                timeout_ms: 5,
            }),
            Request::Write {
                path: "/tmp/x".into(),
                data: Bytes((0..=255).collect()),
                append: true,
            },
            Request::Shell {
                rows: 24,
                cols: 80,
                term: "xterm".into(),
            },
        ];
        for (id, request) in (1..).zip(requests) {
            let call = Call { id, request };
            let line = serde_json::to_string(&call).unwrap();
            assert!(!line.contains('\n'), "{line}");
            assert_eq!(serde_json::from_str::<Call>(&line).unwrap(), call);
        }
        let answer = Answer {
            id: 7,
            reply: Reply::Ran(Ran {
                end: End::Signal(9),
                stdout: "x\u{fffd}\n".into(),
                stderr: String::new(),
            }),
        };
        let line = serde_json::to_string(&answer).unwrap();
        assert!(!line.contains('\n'), "{line}");
        assert_eq!(serde_json::from_str::<Answer>(&line).unwrap(), answer);
    }
}
