// SPDX-License-Identifier: GPL-2.0-only

//! What a power failure may leave of writes to a disk.
//!
//! What was acknowledged is there. Each unit of a write that is under way, or that nobody has made durable, is the old
//! one, or the new one, or that of a write in between. A unit is what the disk promises to be whole: 8 aligned bytes, or
//! a block.

use pmem_guest::script::{content, Allocate, Step, Way};
use std::collections::BTreeMap;
use std::ops::Range;

/// What memory has all or nothing of.
pub const WORD: usize = 8;

/// What is compared at once.
const PIECE: usize = 4096;

/// What must be on a disk, and what may be.
#[derive(Debug, Clone)]
pub struct Disk {
    /// Bytes of a unit.
    unit: usize,
    /// What must be there.
    sure: Vec<u8>,
    /// What the program sees.
    seen: Vec<u8>,
    /// What units may be instead of what they must be, in the order in which they were written.
    may: BTreeMap<usize, Vec<Box<[u8]>>>,
}

impl Disk {
    /// A disk with this content, of units of so many bytes: a power of two of at most 4096.
    pub fn new(content: Vec<u8>, unit: usize) -> Self {
        Self {
            unit,
            seen: content.clone(),
            sure: content,
            may: BTreeMap::new(),
        }
    }

    /// A step begins: any part of it may be there.
    pub fn begin(&mut self, step: &Step) {
        let Some(range) = bytes_of(step) else {
            return;
        };
        let Some(seen) = self.seen.get_mut(range.clone()) else {
            return;
        };
        match step {
            Step::Write { seed, len, .. } => seen.copy_from_slice(&content(*seed, *len)),
            _ => seen.fill(0),
        }
        for unit in self.units(&range) {
            if let Some(seen) = self.seen.get(self.bytes(unit)) {
                self.may.entry(unit).or_default().push(seen.into());
            }
        }
    }

    /// A step is done: what it says is there.
    pub fn done(&mut self, step: &Step) {
        match step {
            Step::Fsync { .. } | Step::Fdatasync { .. } | Step::Sync => {
                let all = 0..self.sure.len();
                self.settle(all);
            }
            Step::Write {
                way: Way::Buffered,
                dsync: false,
                ..
            } => {}
            _ => {
                if let Some(range) = bytes_of(step) {
                    self.settle(range);
                }
            }
        }
    }

    fn units(&self, bytes: &Range<usize>) -> Range<usize> {
        bytes.start / self.unit..bytes.end.div_ceil(self.unit)
    }

    fn bytes(&self, unit: usize) -> Range<usize> {
        unit * self.unit..(unit + 1) * self.unit
    }

    fn settle(&mut self, range: Range<usize>) {
        let units = self.units(&range);
        let settled: Vec<usize> = self.may.range(units).map(|(&unit, _)| unit).collect();
        for unit in settled {
            self.may.remove(&unit);
            let bytes = self.bytes(unit);
            if let (Some(sure), Some(seen)) =
                (self.sure.get_mut(bytes.clone()), self.seen.get(bytes))
            {
                sure.copy_from_slice(seen);
            }
        }
    }

    /// Whether a power failure may have left this.
    ///
    /// # Errors
    ///
    /// What is lost.
    pub fn check(&self, image: &[u8]) -> Result<(), String> {
        if image.len() != self.sure.len() {
            return Err(format!(
                "it has {} bytes, not {}",
                image.len(),
                self.sure.len()
            ));
        }
        let mut lost = 0u64;
        let mut first = None;
        let pieces = image.chunks(PIECE).zip(self.sure.chunks(PIECE));
        for (piece, (found, sure)) in pieces.enumerate() {
            if found == sure {
                continue;
            }
            let units = found
                .chunks_exact(self.unit)
                .zip(sure.chunks_exact(self.unit));
            for (n, (found, sure)) in units.enumerate() {
                let unit = piece * (PIECE / self.unit) + n;
                let may = self.may.get(&unit).map_or(&[][..], Vec::as_slice);
                if found != sure && may.iter().all(|may| **may != *found) {
                    lost += 1;
                    first.get_or_insert_with(|| describe(self.bytes(unit).start, found, sure, may));
                }
            }
        }
        match first {
            None => Ok(()),
            Some(first) => Err(format!(
                "{lost} units of {} bytes are lost; {first}",
                self.unit
            )),
        }
    }
}

/// The first word that is none of those that it may be, or that is old where another one is new.
fn describe(at: usize, found: &[u8], sure: &[u8], may: &[Box<[u8]>]) -> String {
    let last = may.last().map_or(sure, |last| last);
    let words = found
        .chunks(WORD)
        .zip(sure.chunks(WORD))
        .zip(last.chunks(WORD));
    let differs = |((found, _), last): &((&[u8], &[u8]), &[u8])| found != last;
    let Some((n, ((found, sure), last))) = words.enumerate().find(|(_, all)| differs(all)) else {
        return format!("the one at {at:#x}");
    };
    let instead = match may {
        [] => String::new(),
        _ => format!(" or, with all of it, {last:02x?}"),
    };
    format!(
        "at {:#x} is {found:02x?}, and must be {sure:02x?}{instead}",
        at + n * WORD
    )
}

/// The bytes that a step stores.
fn bytes_of(step: &Step) -> Option<Range<usize>> {
    match *step {
        Step::Write { at, len, .. } => Some(at as usize..(at + len) as usize),
        Step::Allocate {
            at,
            len,
            what: Allocate::Zero | Allocate::Punch,
            ..
        } => Some(at as usize..(at + len) as usize),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: usize = 16384;

    fn write(at: u64, len: u64, seed: u64, way: Way) -> Step {
        Step::Write {
            path: String::new(),
            at,
            len,
            seed,
            way,
            dsync: false,
        }
    }

    fn fsync() -> Step {
        let path = String::new();
        Step::Fsync { path }
    }

    fn with(mut image: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
        image[at..at + bytes.len()].copy_from_slice(bytes);
        image
    }

    #[test]
    fn what_is_under_way_is_old_or_new_by_words() {
        let mut disk = Disk::new(vec![7; SIZE], WORD);
        let old = vec![7; SIZE];
        let step = write(512, 1024, 3, Way::Direct(0));
        let new = content(3, 1024);
        disk.begin(&step);
        assert!(disk.check(&old).is_ok());
        assert!(disk.check(&with(old.clone(), 512, &new)).is_ok());
        // A few words of it.
        assert!(disk.check(&with(old.clone(), 520, &new[8..24])).is_ok());
        // Half a word, a word of elsewhere, and what is beside it.
        assert!(disk.check(&with(old.clone(), 520, &new[8..12])).is_err());
        assert!(disk.check(&with(old.clone(), 520, &new[16..24])).is_err());
        assert!(disk.check(&with(old.clone(), 504, &[0; 8])).is_err());
        assert!(disk.check(&with(old.clone(), 1536, &[0; 8])).is_err());

        disk.done(&step);
        let new = with(old.clone(), 512, &new);
        assert!(disk.check(&new).is_ok());
        assert!(disk.check(&old).is_err());
        assert!(disk.check(&with(new.clone(), 1528, &old[..8])).is_err());
        assert!(disk.check(&new[1..]).is_err());
    }

    #[test]
    fn what_is_buffered_is_sure_after_a_sync() {
        let mut disk = Disk::new(vec![0; SIZE], WORD);
        let (a, b) = (
            write(5, 100, 1, Way::Buffered),
            write(60, 100, 2, Way::Buffered),
        );
        let zero = vec![0; SIZE];
        let first = with(zero.clone(), 5, &content(1, 100));
        let both = with(first.clone(), 60, &content(2, 100));
        for step in [&a, &b] {
            disk.begin(step);
            disk.done(step);
        }
        for image in [&zero, &first, &both] {
            assert!(disk.check(image).is_ok());
        }
        let torn = with(both.clone(), 64, &first[64..72]);
        assert!(disk.check(&torn).is_ok());
        disk.begin(&fsync());
        assert!(disk.check(&zero).is_ok());
        disk.done(&fsync());
        assert!(disk.check(&both).is_ok());
        for image in [&zero, &first, &torn] {
            assert!(disk.check(image).is_err());
        }
    }

    #[test]
    fn a_block_that_is_a_unit_is_whole() {
        let mut disk = Disk::new(vec![0; SIZE], 4096);
        let step = write(4096, 8192, 3, Way::Direct(0));
        let new = content(3, 8192);
        disk.begin(&step);
        let old = vec![0; SIZE];
        for range in [0..0, 0..4096, 4096..8192, 0..8192] {
            let image = with(old.clone(), 4096 + range.start, &new[range.clone()]);
            assert!(disk.check(&image).is_ok(), "{range:?}");
        }
        for range in [0..4088, 8..16, 4000..8192] {
            let image = with(old.clone(), 4096 + range.start, &new[range.clone()]);
            assert!(disk.check(&image).is_err(), "{range:?}");
        }
        disk.done(&step);
        assert!(disk.check(&old).is_err());
        assert!(disk.check(&with(old, 4096, &new)).is_ok());
    }

    #[test]
    fn zeroes_are_written_as_well() {
        let mut disk = Disk::new(vec![1; SIZE], WORD);
        let step = Step::Allocate {
            path: String::new(),
            at: 4096,
            len: 512,
            what: Allocate::Zero,
        };
        disk.begin(&step);
        assert!(disk.check(&vec![1; SIZE]).is_ok());
        disk.done(&step);
        assert!(disk.check(&vec![1; SIZE]).is_err());
        assert!(disk.check(&with(vec![1; SIZE], 4096, &[0; 512])).is_ok());
    }
}
