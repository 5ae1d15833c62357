// SPDX-License-Identifier: GPL-2.0-only

//! What the host does when a guest asks it to flush the memory of a virtio-pmem device.
//!
//! QEMU answers by `fsync(2)` of the memory's file. So strace, which starts QEMU, has the times of all flushes, and can
//! have them fail or take long.

use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where strace writes, in the machine's directory.
pub(super) const LOG: &str = "flushes";

/// What becomes of flushes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// They fail, and nothing is flushed.
    Fail,
    /// They begin, and wait that long before anything is flushed.
    Delay(Duration),
}

/// Which flushes have a fault; all are counted from the machine's start, from 1.
#[derive(Debug, Clone, Copy)]
pub(super) struct Faulty {
    pub fault: Fault,
    pub first: u64,
    /// None if it is all from the first on.
    pub last: Option<u64>,
}

impl Faulty {
    /// As an option of strace's.
    fn inject(&self) -> String {
        let fault = match self.fault {
            Fault::Fail => "error=EIO".to_owned(),
            Fault::Delay(time) => format!("delay_enter={}", time.as_micros()),
        };
        let last = match self.last {
            Some(last) => format!("..{last}"),
            None => "+".to_owned(),
        };
        format!("inject=fsync:{fault}:when={}{last}", self.first)
    }
}

/// strace's arguments, QEMU's name and its arguments that make this work follow.
pub(super) fn arguments(faulty: Option<Faulty>, files: &[PathBuf]) -> Vec<String> {
    let mut args: Vec<String> = [
        "--follow-forks",
        // Other system calls are not slowed down.
        "--seccomp-bpf",
        "--absolute-timestamps=unix,us",
        "--syscall-times=us",
        "--decode-fds=path",
        "--quiet=all",
        "--signal=none",
        "--output",
        LOG,
        "--trace=fsync",
    ]
    .map(str::to_owned)
    .into();
    for file in files {
        args.extend(["-P".to_owned(), file.display().to_string()]);
    }
    if let Some(faulty) = faulty {
        args.extend(["-e".to_owned(), faulty.inject()]);
    }
    args
}

/// QEMU's arguments: strace counts the calls of each thread apart, so there must be one thread that makes them all.
pub(super) const ONE_THREAD: [&str; 2] = [
    "-object",
    "main-loop,id=main-loop,thread-pool-min=1,thread-pool-max=1",
];

/// A flush of the host's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flush {
    /// The memory's file.
    pub file: PathBuf,
    /// When it began, since 1970.
    pub began: Duration,
    /// When it ended, if it has.
    pub ended: Option<Duration>,
    /// Whether it failed.
    pub failed: bool,
}

/// Reads what strace has written. Its last line may not be whole.
pub(super) fn parse(log: &str) -> Result<Vec<Flush>> {
    let mut flushes: Vec<(&str, Flush)> = Vec::new();
    for line in log.lines() {
        let parsed = (|| {
            let (thread, rest) = line.split_once(' ')?;
            let (time, call) = rest.trim_start().split_once(' ')?;
            let time = seconds(time)?;
            if let Some(rest) = call.strip_prefix("fsync(") {
                let (_, rest) = rest.split_once('<')?;
                let (file, rest) = rest.split_once('>')?;
                let flush = Flush {
                    file: Path::new(file).into(),
                    began: time,
                    ended: took(rest).map(|took| time + took),
                    failed: rest.contains("= -1 "),
                };
                flushes.push((thread, flush));
            } else if let Some(rest) = call.strip_prefix("<... fsync resumed>") {
                let (_, flush) = flushes.iter_mut().rev().find(|(of, _)| *of == thread)?;
                flush.ended = Some(flush.began + took(rest)?);
                flush.failed = rest.contains("= -1 ");
            }
            Some(())
        })();
        parsed.with_context(|| format!("strace wrote {line:?}"))?;
    }
    Ok(flushes.into_iter().map(|(_, flush)| flush).collect())
}

fn seconds(text: &str) -> Option<Duration> {
    let (whole, part) = text.split_once('.')?;
    Some(Duration::from_secs(whole.parse().ok()?) + Duration::from_micros(part.parse().ok()?))
}

/// How long a call took that ends so: `) = 0 (DELAYED) <2.000131>`.
fn took(rest: &str) -> Option<Duration> {
    let (_, time) = rest.trim_end().strip_suffix('>')?.rsplit_once('<')?;
    seconds(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_as_strace_reads_them() {
        let faulty = |fault, first, last| Faulty { fault, first, last }.inject();
        assert_eq!(
            faulty(Fault::Fail, 3, Some(3)),
            "inject=fsync:error=EIO:when=3..3"
        );
        assert_eq!(
            faulty(Fault::Delay(Duration::from_millis(5)), 1, None),
            "inject=fsync:delay_enter=5000:when=1+"
        );
    }

    /// A flush that is not seen makes a driver that sends none look right.
    #[test]
    fn every_flush_is_seen() {
        let log = "\
8     1795282304.108717 fsync(3</tmp/a>) = 0 <0.000021>
8     1795282304.109097 fsync(3</tmp/a>) = -1 EIO (Input/output error) (INJECTED) <0.000031>
8     1795282305.000000 fsync(3</tmp/a> <unfinished ...>
9     1795282305.500000 fsync(4</tmp/b>) = 0 (DELAYED) <2.000000>
8     1795282306.000000 <... fsync resumed>) = 0 (DELAYED) <1.000000>
8     1795282307.000000 fsync(3</tmp/a>";
        let flushes = parse(log).unwrap();
        let seen: Vec<_> = flushes
            .iter()
            .map(|flush| {
                (
                    flush.file.display().to_string(),
                    flush.ended.map(|ended| (ended - flush.began).as_micros()),
                    flush.failed,
                )
            })
            .collect();
        let row = |file: &str, took, failed| (file.to_owned(), took, failed);
        assert_eq!(
            seen,
            [
                row("/tmp/a", Some(21), false),
                row("/tmp/a", Some(31), true),
                row("/tmp/a", Some(1_000_000), false),
                row("/tmp/b", Some(2_000_000), false),
                row("/tmp/a", None, false),
            ]
        );
        assert!(parse("8 1.0 fsync(garbage").is_err());
    }
}
