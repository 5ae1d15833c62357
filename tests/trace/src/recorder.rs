// SPDX-License-Identifier: GPL-2.0-only

//! The plugin's side of a recording, without QEMU.

use crate::record::{Bytes, Event, Fence, How, Lost, WriteBack, Writer, LINE};
use crate::{Reply, Request};
use std::fs::File;
use std::io::{self, BufWriter};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Keeps what CPUs do to the range that it is told to record, in a file.
#[derive(Debug, Default)]
pub struct Recorder {
    /// The range once more, for a look at it without the lock. Empty while nothing is recorded.
    start: AtomicU64,
    end: AtomicU64,
    recording: Mutex<Option<Recording>>,
}

#[derive(Debug)]
struct Recording {
    range: Range<u64>,
    log: PathBuf,
    /// Or why the file cannot be written.
    writer: io::Result<Writer<BufWriter<File>>>,
}

/// A part of a store that is in one page, as the CPU has it: at a virtual address, and at a physical one if that is
/// known.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// The virtual address.
    pub address: u64,
    /// The physical address.
    pub physical: Option<u64>,
}

impl Recorder {
    /// Records nothing yet.
    pub const fn new() -> Self {
        Self {
            start: AtomicU64::new(0),
            end: AtomicU64::new(0),
            recording: Mutex::new(None),
        }
    }

    /// Whether there may be something to record. A machine is faster while there is not.
    pub fn is_recording(&self) -> bool {
        self.end.load(Ordering::Relaxed) != 0
    }

    /// Whether any of `len` bytes at the physical address `start` may be in the range.
    pub fn may_have(&self, start: u64, len: u64) -> bool {
        let (from, end) = (&self.start, &self.end);
        start < end.load(Ordering::Relaxed)
            && start.saturating_add(len) > from.load(Ordering::Relaxed)
    }

    /// A CPU has stored `bytes`, all in one page.
    pub fn store(&self, cpu: u32, place: Place, bytes: &[u8], how: How) {
        let Place { address, physical } = place;
        let Some(physical) = physical else {
            let what = Lost::Store;
            return self.write(|_| Some(Event::Lost { cpu, what, address }));
        };
        if !self.may_have(physical, bytes.len() as u64) {
            return;
        }
        self.write(|range| {
            let skipped = range.start.saturating_sub(physical) as usize;
            let address = physical.max(range.start);
            let left = range.end.saturating_sub(address) as usize;
            let bytes = bytes.get(skipped..)?;
            let bytes = Bytes::new(&bytes[..bytes.len().min(left)])?;
            (!bytes.is_empty()).then_some(Event::Store {
                cpu,
                address,
                bytes,
                how,
            })
        });
    }

    /// A CPU writes the line back that has the byte at `place`.
    pub fn write_back(&self, cpu: u32, place: Place, how: WriteBack) {
        let Place { address, physical } = place;
        let Some(physical) = physical else {
            let what = Lost::WriteBack;
            return self.write(|_| Some(Event::Lost { cpu, what, address }));
        };
        let line = physical / LINE * LINE;
        self.write(|range| {
            let is_in = line < range.end && line.saturating_add(LINE) > range.start;
            is_in.then_some(Event::WriteBack { cpu, line, how })
        });
    }

    /// A CPU waits for what it has done.
    pub fn fence(&self, cpu: u32, kind: Fence) {
        self.write(|_| Some(Event::Fence { cpu, kind }));
    }

    /// A program says where it is.
    pub fn mark(&self, cpu: u32, value: u8) {
        self.write(|_| Some(Event::Mark { cpu, value }));
    }

    fn write(&self, event: impl FnOnce(&Range<u64>) -> Option<Event>) {
        let mut recording = self.recording();
        let Some(Recording { range, writer, .. }) = &mut *recording else {
            return;
        };
        let (Some(event), Ok(to)) = (event(range), writer.as_mut()) else {
            return;
        };
        if let Err(error) = to.write(&event) {
            *writer = Err(error);
        }
    }

    /// Does what the host asks for.
    pub fn answer(&self, request: Request) -> Reply {
        match request {
            Request::Record { start, size, log } => match self.begin(start, size, &log) {
                Ok(()) => Reply::Done,
                Err(error) => Reply::Refused(format!("{}: {error}", log.display())),
            },
            Request::EndRecord => match self.end() {
                Ok((log, events)) => Reply::Recorded { log, events },
                Err(error) => Reply::Refused(format!("the log is not whole: {error}")),
            },
            other => Reply::Refused(format!("{other:?} is not for a recorder")),
        }
    }

    fn begin(&self, start: u64, size: u64, log: &Path) -> io::Result<()> {
        let end = start.checked_add(size).filter(|end| *end > start);
        let end = end.ok_or_else(|| {
            io::Error::other(format!("{size} bytes from {start:#x} on are no range"))
        })?;
        let mut recording = self.recording();
        if recording.is_some() {
            return Err(io::Error::other(
                "something is recorded already; end that first",
            ));
        }
        let file = BufWriter::with_capacity(1 << 20, File::create_new(log)?);
        *recording = Some(Recording {
            range: start..end,
            log: log.to_owned(),
            writer: Ok(Writer::new(file, start..end)?),
        });
        self.start.store(start, Ordering::Relaxed);
        self.end.store(end, Ordering::Relaxed);
        Ok(())
    }

    /// Ends the log, and says which it is and how many events it has.
    fn end(&self) -> io::Result<(PathBuf, u64)> {
        let mut recording = self.recording();
        self.end.store(0, Ordering::Relaxed);
        self.start.store(0, Ordering::Relaxed);
        let recording = recording
            .take()
            .ok_or_else(|| io::Error::other("nothing is recorded"))?;
        let writer = recording.writer?;
        let events = writer.events();
        writer.end()?;
        Ok((recording.log, events))
    }

    fn recording(&self) -> MutexGuard<'_, Option<Recording>> {
        self.recording
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Log;
    use tempfile::TempDir;

    const START: u64 = 0x1_0000_0000;
    const SIZE: u64 = 0x1000;

    fn recording() -> (TempDir, PathBuf, Recorder) {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let recorder = Recorder::new();
        assert_eq!(recorder.answer(record(&log)), Reply::Done);
        (dir, log, recorder)
    }

    fn record(log: &Path) -> Request {
        Request::Record {
            start: START,
            size: SIZE,
            log: log.to_owned(),
        }
    }

    fn at(physical: u64) -> Place {
        Place {
            address: !physical,
            physical: Some(physical),
        }
    }

    fn read(log: &Path) -> Vec<Event> {
        let events: io::Result<_> = Log::open(log).unwrap().collect();
        events.unwrap()
    }

    #[test]
    fn what_is_in_the_range_is_kept() {
        let (_dir, log, recorder) = recording();
        assert!(recorder.is_recording());
        let end = START + SIZE;
        let bytes = [1, 2, 3, 4, 5, 6, 7, 8];
        let stores = [
            (START - 8, None),
            (START - 7, Some((START, &bytes[7..]))),
            (START + 64, Some((START + 64, &bytes[..]))),
            (end - 8, Some((end - 8, &bytes[..]))),
            (end - 1, Some((end - 1, &bytes[..1]))),
            (end, None),
            (0, None),
            (u64::MAX - 7, None),
        ];
        let mut expected = Vec::new();
        for (address, kept) in stores {
            recorder.store(1, at(address), &bytes, How::NonTemporal);
            expected.extend(kept.map(|(address, bytes)| Event::Store {
                cpu: 1,
                address,
                bytes: Bytes::new(bytes).unwrap(),
                how: How::NonTemporal,
            }));
        }
        for (address, kept) in [
            (START - 1, None),
            (START + 63, Some(START)),
            (end - 1, Some(end - 64)),
            (end, None),
        ] {
            recorder.write_back(0, at(address), WriteBack::Clwb);
            expected.extend(kept.map(|line| Event::WriteBack {
                cpu: 0,
                line,
                how: WriteBack::Clwb,
            }));
        }
        recorder.fence(0, Fence::Sfence);
        recorder.mark(0, 7);
        expected.push(Event::Fence {
            cpu: 0,
            kind: Fence::Sfence,
        });
        expected.push(Event::Mark { cpu: 0, value: 7 });
        let events = expected.len() as u64;
        assert_eq!(
            recorder.answer(Request::EndRecord),
            Reply::Recorded {
                log: log.clone(),
                events
            }
        );
        assert_eq!(read(&log), expected);
        assert!(!recorder.is_recording());
    }

    #[test]
    fn what_has_no_address_is_lost() {
        let (_dir, log, recorder) = recording();
        let unknown = Place {
            address: 0x1234,
            physical: None,
        };
        recorder.store(0, unknown, &[1], How::Cached);
        recorder.write_back(0, unknown, WriteBack::Clflush);
        recorder.answer(Request::EndRecord);
        let lost = [Lost::Store, Lost::WriteBack].map(|what| Event::Lost {
            cpu: 0,
            what,
            address: 0x1234,
        });
        assert_eq!(read(&log), lost);
    }

    #[test]
    fn nothing_is_kept_before_it_is_asked_for_nor_after() {
        let recorder = Recorder::new();
        recorder.mark(0, 1);
        assert!(!recorder.is_recording());
        let refused = |reply: Reply, why: &str| match reply {
            Reply::Refused(text) => assert!(text.contains(why), "{text}"),
            other => panic!("{other:?}"),
        };
        refused(recorder.answer(Request::EndRecord), "nothing is recorded");
        let (_dir, log, recorder) = recording();
        recorder.mark(0, 2);
        // Two at once are not possible, and the attempt changes nothing.
        let other = log.with_extension("other");
        refused(recorder.answer(record(&other)), "already");
        recorder.mark(0, 3);
        recorder.answer(Request::EndRecord);
        recorder.mark(0, 4);
        let marks = [2, 3].map(|value| Event::Mark { cpu: 0, value });
        assert_eq!(read(&log), marks);
        // A log is not overwritten; another one can be begun.
        refused(recorder.answer(record(&log)), "exists");
        assert_eq!(recorder.answer(record(&other)), Reply::Done);
        refused(recorder.answer(Request::Report), "not for a recorder");
    }

    #[test]
    fn what_is_no_range_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let recorder = Recorder::new();
        for (start, size) in [(START, 0), (u64::MAX, 1)] {
            let log = dir.path().join("log");
            let Reply::Refused(why) = recorder.answer(Request::Record { start, size, log }) else {
                panic!("{size} bytes from {start:#x} on were recorded");
            };
            assert!(why.contains(&format!("{start:#x}")), "{why}");
        }
        assert!(!recorder.is_recording());
    }

    /// A full disk must not make a log that looks whole.
    #[test]
    fn a_log_that_cannot_be_written_is_refused() {
        let recorder = Recorder::new();
        let full = File::options().write(true).open("/dev/full").unwrap();
        let writer = Writer::new(BufWriter::new(full), START..START + SIZE).unwrap();
        *recorder.recording() = Some(Recording {
            range: START..START + SIZE,
            log: PathBuf::new(),
            writer: Ok(writer),
        });
        for n in 0..100 {
            recorder.store(0, at(START + 64 * n), &[1; 64], How::Cached);
        }
        let Reply::Refused(why) = recorder.answer(Request::EndRecord) else {
            panic!("the log is said to be whole");
        };
        assert!(why.contains("not whole"), "{why}");
    }
}
