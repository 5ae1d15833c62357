// SPDX-License-Identifier: GPL-2.0-only

//! What the CPUs of a virtual machine did to a range of its physical memory, in the order in which they did it, and
//! the file that it is kept in.
//!
//! A log is for a machine that executes one instruction at a time: one with one CPU, or whose CPUs take turns. What
//! devices write to memory is not in it.
//!
//! # The file
//!
//! A header of 24 bytes, then events. Numbers are little-endian, or LEB128 where it says so; those with a sign are
//! zigzag.
//!
//! | bytes | header |
//! |---|---|
//! | 8 | `PMEMLOG1` |
//! | 8 | the first physical address of the range |
//! | 8 | how many bytes the range has |
//!
//! An event begins with a byte whose lower three bits say what it is. All are of the CPU that the last "CPU" named, at
//! first 0.
//!
//! | bits 0 to 2 | what | bits 3 to 7 | what follows |
//! |---|---|---|---|
//! | 0 | store | 3: whether it is non-temporal; 4: whether it begins where the last one ended; 5 to 7: binary logarithm of the length, or 7 | the length, if it was 7: a byte; else, without bit 4, how far from the end of the last one it begins: signed LEB128; the bytes |
//! | 1 | write-back | 3 and 4: which instruction; 5: whether it is the line after the last one | without bit 5, how many lines from the last one: signed LEB128 |
//! | 2 | fence | 3 to 5: its kind | |
//! | 3 | mark | | a byte |
//! | 4 | lost | 3: whether it was a write-back | the virtual address, LEB128 |
//! | 5 | CPU | | its number, LEB128 |
//! | 7 | end | | how many events there were, LEB128 |
//!
//! A file without an end is one that was cut off.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::ops::{Deref, Range};
use std::path::Path;

/// Bytes of a cache line.
pub const LINE: u64 = 64;

const MAGIC: &[u8; 8] = b"PMEMLOG1";

/// What a CPU did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// It stored bytes in the range.
    Store {
        /// Which CPU.
        cpu: u32,
        /// The physical address of the first byte.
        address: u64,
        /// The bytes, all in the range.
        bytes: Bytes,
        /// Through the cache or past it.
        how: How,
    },
    /// It told the cache to write a line of the range back. That has begun, and is done after a fence.
    WriteBack {
        /// Which CPU.
        cpu: u32,
        /// The physical address of the line's first byte: a multiple of [`LINE`].
        line: u64,
        /// By which instruction.
        how: WriteBack,
    },
    /// It executed an instruction that waits for earlier ones. A fence that follows one of the same kind and CPU, with
    /// nothing in between but other fences, is left out.
    Fence {
        /// Which CPU.
        cpu: u32,
        /// By which instruction.
        kind: Fence,
    },
    /// A program said where it is, see [`crate::mark`]. That orders nothing here.
    Mark {
        /// Which CPU.
        cpu: u32,
        /// The byte.
        value: u8,
    },
    /// A store or a write-back whose physical address is not known, and which may be to the range: what was recorded
    /// proves nothing.
    Lost {
        /// Which CPU.
        cpu: u32,
        /// What is lost.
        what: Lost,
        /// The virtual address.
        address: u64,
    },
}

/// How a store gets to memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// Through the cache, which keeps it.
    Cached,
    /// Past the cache: `movnti` and the like.
    NonTemporal,
}

/// An instruction that writes a line back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteBack {
    /// `clwb`.
    Clwb,
    /// `clflushopt`.
    Clflushopt,
    /// `clflush`.
    Clflush,
}

/// An instruction that waits for earlier ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fence {
    /// `sfence`.
    Sfence,
    /// `mfence`.
    Mfence,
    /// One with a `lock` prefix, or `xchg` with memory.
    Locked,
    /// One that serializes (Intel SDM, volume 3, "Serializing Instructions"): `cpuid`, `iret`, `wrmsr`, `invlpg`, moves to
    /// control registers, and the like.
    Serializing,
}

/// What is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lost {
    /// A store.
    Store,
    /// A write-back.
    WriteBack,
}

/// At most 64 bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Bytes {
    len: u8,
    /// Zeroes beyond `len`, so that equal ones are equal.
    bytes: [u8; Self::MAX],
}

impl Bytes {
    /// The most that there can be.
    pub const MAX: usize = 64;

    /// A copy of `bytes`, or `None` if they are too many.
    pub fn new(bytes: &[u8]) -> Option<Self> {
        let mut own = [0; Self::MAX];
        own.get_mut(..bytes.len())?.copy_from_slice(bytes);
        Some(Self {
            len: bytes.len() as u8,
            bytes: own,
        })
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for byte in self.iter() {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl Event {
    /// Which CPU it was.
    pub fn cpu(&self) -> u32 {
        match *self {
            Self::Store { cpu, .. }
            | Self::WriteBack { cpu, .. }
            | Self::Fence { cpu, .. }
            | Self::Mark { cpu, .. }
            | Self::Lost { cpu, .. } => cpu,
        }
    }
}

const STORE: u8 = 0;
const WRITE_BACK: u8 = 1;
const FENCE: u8 = 2;
const MARK: u8 = 3;
const LOST: u8 = 4;
const CPU: u8 = 5;
const END: u8 = 7;

const NON_TEMPORAL: u8 = 1 << 3;
const CONTINUES: u8 = 1 << 4;
const LENGTH: u32 = 5;
const LENGTH_FOLLOWS: u8 = 7;
const NEXT_LINE: u8 = 1 << 5;

/// What an event is told relative to.
#[derive(Debug, Default)]
struct Place {
    cpu: u32,
    /// Behind the last store.
    store: u64,
    /// The last line, in units of [`LINE`].
    line: u64,
}

/// Writes a log.
#[derive(Debug)]
pub struct Writer<W: Write> {
    to: W,
    place: Place,
    events: u64,
    /// The fences since the last event that was none, a bit each.
    fences: u64,
    /// Of one event, so that it is written whole.
    buffer: Vec<u8>,
}

impl<W: Write> Writer<W> {
    /// Begins a log of `range`. It writes little at a time: `to` should have a buffer.
    pub fn new(mut to: W, range: Range<u64>) -> io::Result<Self> {
        to.write_all(MAGIC)?;
        to.write_all(&range.start.to_le_bytes())?;
        to.write_all(&range.end.saturating_sub(range.start).to_le_bytes())?;
        Ok(Self {
            to,
            place: Place {
                store: range.start,
                line: range.start / LINE,
                ..Place::default()
            },
            events: 0,
            fences: 0,
            buffer: Vec::new(),
        })
    }

    /// Adds an event, unless it is a fence that changes nothing.
    pub fn write(&mut self, event: &Event) -> io::Result<()> {
        if let Event::Fence { cpu, kind } = *event {
            // Those of the first 16 CPUs are known.
            let known = 1u64.checked_shl(cpu.saturating_mul(4).saturating_add(kind as u32));
            let known = known.unwrap_or(0);
            if self.fences & known != 0 {
                return Ok(());
            }
            self.fences |= known;
        } else {
            self.fences = 0;
        }
        self.buffer.clear();
        let (buffer, place) = (&mut self.buffer, &mut self.place);
        if event.cpu() != place.cpu {
            place.cpu = event.cpu();
            buffer.push(CPU);
            push_number(buffer, place.cpu.into());
        }
        match *event {
            Event::Store {
                address,
                bytes,
                how,
                ..
            } => {
                let mut tag = STORE;
                if how == How::NonTemporal {
                    tag |= NON_TEMPORAL;
                }
                if address == place.store {
                    tag |= CONTINUES;
                }
                let power = match bytes.len().is_power_of_two() {
                    true => bytes.len().trailing_zeros() as u8,
                    false => LENGTH_FOLLOWS,
                };
                buffer.push(tag | (power << LENGTH));
                if power == LENGTH_FOLLOWS {
                    buffer.push(bytes.len);
                }
                if address != place.store {
                    push_signed(buffer, address.wrapping_sub(place.store) as i64);
                }
                buffer.extend_from_slice(&bytes);
                place.store = address.wrapping_add(bytes.len() as u64);
            }
            Event::WriteBack { line, how, .. } => {
                let tag = WRITE_BACK | ((how as u8) << 3);
                let line = line / LINE;
                if line == place.line.wrapping_add(1) {
                    buffer.push(tag | NEXT_LINE);
                } else {
                    buffer.push(tag);
                    push_signed(buffer, line.wrapping_sub(place.line) as i64);
                }
                place.line = line;
            }
            Event::Fence { kind, .. } => buffer.push(FENCE | ((kind as u8) << 3)),
            Event::Mark { value, .. } => buffer.extend([MARK, value]),
            Event::Lost { what, address, .. } => {
                buffer.push(LOST | ((what as u8) << 3));
                push_number(buffer, address);
            }
        }
        self.events += 1;
        self.to.write_all(buffer)
    }

    /// How many events there are so far.
    pub fn events(&self) -> u64 {
        self.events
    }

    /// Ends the log, and gives back what it was written to.
    pub fn end(mut self) -> io::Result<W> {
        self.buffer.clear();
        self.buffer.push(END);
        push_number(&mut self.buffer, self.events);
        self.to.write_all(&self.buffer)?;
        self.to.flush()?;
        Ok(self.to)
    }
}

fn push_number(to: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        to.push(number as u8 | 0x80);
        number >>= 7;
    }
    to.push(number as u8);
}

fn push_signed(to: &mut Vec<u8>, number: i64) {
    push_number(to, ((number << 1) ^ (number >> 63)) as u64);
}

/// Reads a log: an iterator of its events, in their order. After an error it has no more.
#[derive(Debug)]
pub struct Log<R> {
    from: R,
    range: Range<u64>,
    place: Place,
    events: u64,
    /// Bytes read so far.
    offset: u64,
    is_over: bool,
}

impl Log<BufReader<File>> {
    /// Opens the log in a file.
    pub fn open(path: &Path) -> io::Result<Self> {
        let name =
            |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        let file = File::open(path).map_err(name)?;
        Self::new(BufReader::with_capacity(1 << 20, file)).map_err(name)
    }
}

impl<R: BufRead> Log<R> {
    /// Reads a log from its beginning on.
    pub fn new(from: R) -> io::Result<Self> {
        let mut log = Self {
            from,
            range: 0..0,
            place: Place::default(),
            events: 0,
            offset: 0,
            is_over: false,
        };
        if &log.bytes::<8>()? != MAGIC {
            return Err(log.wrong("no log begins like this"));
        }
        let start = u64::from_le_bytes(log.bytes()?);
        let size = u64::from_le_bytes(log.bytes()?);
        let end = start.checked_add(size);
        log.range = start..end.ok_or_else(|| log.wrong("its range has no end"))?;
        log.place.store = start;
        log.place.line = start / LINE;
        Ok(log)
    }

    /// The physical addresses that the log is about.
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    fn wrong(&self, why: &str) -> io::Error {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("the log is broken before byte {}: {why}", self.offset),
        )
    }

    fn fill(&mut self, to: &mut [u8]) -> io::Result<()> {
        self.from
            .read_exact(to)
            .map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => self.wrong("it was cut off"),
                _ => error,
            })?;
        self.offset += to.len() as u64;
        Ok(())
    }

    fn bytes<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn byte(&mut self) -> io::Result<u8> {
        let [byte] = self.bytes()?;
        Ok(byte)
    }

    fn number(&mut self) -> io::Result<u64> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits {
                break;
            }
            number |= bits << shift;
            if byte < 0x80 {
                return Ok(number);
            }
        }
        Err(self.wrong("a number has more than 64 bits"))
    }

    fn signed(&mut self) -> io::Result<i64> {
        let number = self.number()?;
        Ok((number >> 1) as i64 ^ -((number & 1) as i64))
    }

    /// The next event, or `None` at the end.
    fn event(&mut self) -> io::Result<Option<Event>> {
        loop {
            let tag = self.byte()?;
            let cpu = self.place.cpu;
            let event = match tag & 7 {
                STORE => self.store(tag)?,
                WRITE_BACK => {
                    let how = match (tag >> 3) & 3 {
                        0 => WriteBack::Clwb,
                        1 => WriteBack::Clflushopt,
                        2 => WriteBack::Clflush,
                        _ => return Err(self.wrong("an unknown write-back")),
                    };
                    let lines = match tag & NEXT_LINE {
                        0 => self.signed()?,
                        _ => 1,
                    };
                    self.place.line = self.place.line.wrapping_add(lines as u64);
                    let line = self.place.line.checked_mul(LINE);
                    let line = line.filter(|line| {
                        line.saturating_add(LINE) > self.range.start && *line < self.range.end
                    });
                    let line = line.ok_or_else(|| self.wrong("a line beyond the range"))?;
                    Event::WriteBack { cpu, line, how }
                }
                FENCE => {
                    let kind = match tag >> 3 {
                        0 => Fence::Sfence,
                        1 => Fence::Mfence,
                        2 => Fence::Locked,
                        3 => Fence::Serializing,
                        _ => return Err(self.wrong("an unknown fence")),
                    };
                    Event::Fence { cpu, kind }
                }
                MARK => Event::Mark {
                    cpu,
                    value: self.byte()?,
                },
                LOST => Event::Lost {
                    cpu,
                    what: match tag >> 3 {
                        0 => Lost::Store,
                        1 => Lost::WriteBack,
                        _ => return Err(self.wrong("an unknown loss")),
                    },
                    address: self.number()?,
                },
                CPU => {
                    let cpu = self.number()?;
                    let cpu = u32::try_from(cpu).map_err(|_| self.wrong("a CPU's number"))?;
                    self.place.cpu = cpu;
                    continue;
                }
                END => {
                    if self.number()? != self.events {
                        return Err(self.wrong("events are missing"));
                    }
                    if !self.from.fill_buf()?.is_empty() {
                        return Err(self.wrong("it goes on after its end"));
                    }
                    return Ok(None);
                }
                _ => return Err(self.wrong("an unknown event")),
            };
            self.events += 1;
            return Ok(Some(event));
        }
    }

    fn store(&mut self, tag: u8) -> io::Result<Event> {
        let len = match tag >> LENGTH {
            LENGTH_FOLLOWS => usize::from(self.byte()?),
            power => 1 << power,
        };
        if len == 0 || len > Bytes::MAX {
            return Err(self.wrong("a store's length"));
        }
        if tag & CONTINUES == 0 {
            let far = self.signed()?;
            self.place.store = self.place.store.wrapping_add(far as u64);
        }
        let mut bytes = [0; Bytes::MAX];
        self.fill(&mut bytes[..len])?;
        let address = self.place.store;
        let end = address.checked_add(len as u64);
        let end = end.filter(|end| address >= self.range.start && *end <= self.range.end);
        self.place.store = end.ok_or_else(|| self.wrong("a store beyond the range"))?;
        Ok(Event::Store {
            cpu: self.place.cpu,
            address,
            bytes: Bytes {
                len: len as u8,
                bytes,
            },
            how: match tag & NON_TEMPORAL {
                0 => How::Cached,
                _ => How::NonTemporal,
            },
        })
    }
}

impl<R: BufRead> Iterator for Log<R> {
    type Item = io::Result<Event>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.is_over {
            return None;
        }
        let event = self.event().transpose();
        self.is_over = !matches!(event, Some(Ok(_)));
        event
    }
}
