// SPDX-License-Identifier: GPL-2.0-only

//! What a power failure can leave of what CPUs did to persistent memory: the persistence model of x86-64, for memory
//! that is cached write-back and outlives the machine with all that has reached its memory controllers (ADR).
//!
//! A [`Domain`] is given the events of a log, in their order, and knows of each store what has become of it:
//!
//! | a store is | after | a power failure |
//! |---|---|---|
//! | dirty | `mov` and the like | keeps it or not: a cache evicts lines when it likes |
//! | on its way | a non-temporal store; `clwb`, `clflushopt` or `clflush` of its line | keeps it or not |
//! | durable | a fence after that, by the same CPU | keeps it |
//!
//! (Intel SDM, volume 1, "Cacheability Hint Instructions"; volume 2, `CLWB` and `SFENCE`; volume 3, "Memory Ordering".)
//! `clflush` is not ordered by `sfence` alone on all CPUs, and is by itself on some: here it is as the others are.
//!
//! Of the stores that are not durable, not every subset can be there after a power failure. A store is cut into pieces
//! that each are in one aligned granule of 8 bytes, of which memory has all or nothing, and:
//!
//! - cached pieces of a line are there in the order of the program, so that a line has a prefix of them: a line leaves
//!   the cache as a whole, as it is then
//! - non-temporal pieces are there in any order, in a line, too: the buffers that combine them have no order
//! - pieces of the same granule are there in the order of the program, however they were stored
//! - different lines have nothing to do with each other
//!
//! That is at least what real CPUs can do. They do not do all of it: they also keep the order of a line's non-temporal
//! stores, or write it as a whole.
//!
//! All that a log tells is in the order of its execution: that stores wait in a CPU's buffer where others do not see
//! them is left out, as a fence or a write-back waits for those of the same CPU.

use crate::record::{Event, Fence, How, LINE};
use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::fmt;
use std::ops::Range;

/// Bytes that memory has all or none of.
pub const GRANULE: u64 = 8;

/// The CPUs that a domain can tell apart.
const CPUS: u32 = 64;

const GRANULES: usize = (LINE / GRANULE) as usize;

/// What makes stores durable that are on their way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rules {
    /// `sfence` and `mfence` alone. Otherwise locked instructions do, too, as the SDM has it, and serializing ones do it
    /// for non-temporal stores: those wait for buffers, of which the SDM says nothing as to lines that are written back.
    pub strict: bool,
}

/// Bytes that are written to an image of the memory.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Patch {
    /// Where: a physical address.
    pub address: u64,
    /// What.
    pub bytes: Vec<u8>,
}

impl Patch {
    /// Writes it to an image of the memory from the physical address `start` on. What is beyond the image is left out.
    pub fn apply(&self, image: &mut [u8], start: u64) {
        for (address, &byte) in (self.address..).zip(&self.bytes) {
            let at = address
                .checked_sub(start)
                .and_then(|at| usize::try_from(at).ok());
            if let Some(place) = at.and_then(|at| image.get_mut(at)) {
                *place = byte;
            }
        }
    }
}

/// Why a log proves nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unusable {
    /// The physical address of what this event is about is not known.
    Lost(Event),
    /// There are CPUs with numbers of 64 and more.
    Cpu(u32),
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lost(event) => write!(
                f,
                "QEMU did not know the physical address of something that a CPU did: {event:?}"
            ),
            Self::Cpu(cpu) => write!(
                f,
                "there is a CPU {cpu}; the model has {CPUS}, use fewer of them"
            ),
        }
    }
}

impl Error for Unusable {}

/// A part of a store, in one granule.
#[derive(Debug, Clone, Copy)]
struct Piece {
    /// Its number in the line.
    granule: u8,
    how: How,
    /// Which bytes are stored, a bit each.
    mask: u8,
    /// These; zeroes elsewhere.
    bytes: [u8; GRANULE as usize],
    /// The CPUs whose next fence makes it durable, a bit each.
    on_its_way: u64,
}

/// Some bytes of a line.
#[derive(Debug, Clone, Copy)]
struct Content {
    /// Which, a bit each.
    mask: u64,
    bytes: [u8; LINE as usize],
}

impl Content {
    const NONE: Self = Self {
        mask: 0,
        bytes: [0; LINE as usize],
    };

    fn store(&mut self, piece: &Piece) {
        let first = usize::from(piece.granule) * GRANULE as usize;
        let places = self.bytes.iter_mut().skip(first);
        for (n, (place, &byte)) in places.zip(&piece.bytes).enumerate() {
            if piece.mask & (1 << n) != 0 {
                *place = byte;
            }
        }
        self.mask |= u64::from(piece.mask) << first;
    }
}

/// Makes patches of lines, in the order of their numbers; those that touch become one.
fn patches<'a>(lines: impl Iterator<Item = (u64, &'a Content)>) -> Vec<Patch> {
    let mut patches: Vec<Patch> = Vec::new();
    for (line, content) in lines {
        for (n, &byte) in content.bytes.iter().enumerate() {
            if content.mask & (1 << n) == 0 {
                continue;
            }
            let address = line * LINE + n as u64;
            match patches.last_mut() {
                Some(last) if last.address + last.bytes.len() as u64 == address => {
                    last.bytes.push(byte);
                }
                _ => patches.push(Patch {
                    address,
                    bytes: vec![byte],
                }),
            }
        }
    }
    patches
}

/// What of a range of memory is durable, and what is not yet.
#[derive(Debug, Clone)]
pub struct Domain {
    range: Range<u64>,
    rules: Rules,
    /// Lines by their numbers: physical addresses in units of lines.
    durable: BTreeMap<u64, Content>,
    /// The part of `durable` that [`Domain::take_durable`] has not given yet.
    fresh: BTreeMap<u64, Content>,
    /// Pieces that are not durable, by line, in the order of the program.
    pending: BTreeMap<u64, Vec<Piece>>,
    /// For each CPU, lines that have pieces that its fence is for.
    on_their_way: BTreeMap<u32, BTreeSet<u64>>,
}

impl Domain {
    /// Memory at the physical addresses `range` in which all is durable that is there.
    pub fn new(range: Range<u64>, rules: Rules) -> Self {
        Self {
            range,
            rules,
            durable: BTreeMap::new(),
            fresh: BTreeMap::new(),
            pending: BTreeMap::new(),
            on_their_way: BTreeMap::new(),
        }
    }

    /// The physical addresses.
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// Does what a CPU did next.
    pub fn apply(&mut self, event: &Event) -> Result<(), Unusable> {
        let cpu = event.cpu();
        if cpu >= CPUS {
            return Err(Unusable::Cpu(cpu));
        }
        match *event {
            Event::Store {
                address,
                ref bytes,
                how,
                ..
            } => self.store(cpu, address, bytes, how),
            Event::WriteBack { line, .. } => self.write_back(cpu, line / LINE),
            Event::Fence { kind, .. } => self.fence(cpu, kind),
            Event::Mark { .. } => {}
            Event::Lost { .. } => return Err(Unusable::Lost(*event)),
        }
        Ok(())
    }

    fn store(&mut self, cpu: u32, address: u64, bytes: &[u8], how: How) {
        let on_its_way = match how {
            How::Cached => 0,
            How::NonTemporal => 1 << cpu,
        };
        let mut last: Option<(u64, Piece)> = None;
        for (address, &byte) in (address..).zip(bytes) {
            if !self.range.contains(&address) {
                continue;
            }
            let (line, at) = (address / LINE, address % GRANULE);
            let granule = (address % LINE / GRANULE) as u8;
            let (_, piece) = match &mut last {
                Some(last) if last.0 == line && last.1.granule == granule => last,
                other => {
                    if let Some((line, piece)) = other.take() {
                        self.pend(cpu, line, piece);
                    }
                    other.insert((
                        line,
                        Piece {
                            granule,
                            how,
                            mask: 0,
                            bytes: [0; GRANULE as usize],
                            on_its_way,
                        },
                    ))
                }
            };
            piece.mask |= 1 << at;
            if let Some(place) = piece.bytes.get_mut(at as usize) {
                *place = byte;
            }
        }
        if let Some((line, piece)) = last {
            self.pend(cpu, line, piece);
        }
    }

    fn pend(&mut self, cpu: u32, line: u64, piece: Piece) {
        if piece.on_its_way != 0 {
            self.on_their_way.entry(cpu).or_default().insert(line);
        }
        self.pending.entry(line).or_default().push(piece);
    }

    fn write_back(&mut self, cpu: u32, line: u64) {
        let Some(pieces) = self.pending.get_mut(&line) else {
            return;
        };
        for piece in pieces.iter_mut().filter(|piece| piece.how == How::Cached) {
            piece.on_its_way |= 1 << cpu;
        }
        self.on_their_way.entry(cpu).or_default().insert(line);
    }

    fn fence(&mut self, cpu: u32, kind: Fence) {
        let (cached, non_temporal) = match kind {
            Fence::Sfence | Fence::Mfence => (true, true),
            _ if self.rules.strict => return,
            Fence::Locked => (true, true),
            Fence::Serializing => (false, true),
        };
        let Some(lines) = self.on_their_way.remove(&cpu) else {
            return;
        };
        let is_for = |piece: &Piece| {
            let kind = match piece.how {
                How::Cached => cached,
                How::NonTemporal => non_temporal,
            };
            kind && piece.on_its_way & (1 << cpu) != 0
        };
        for line in lines {
            let Some(pieces) = self.pending.get_mut(&line) else {
                continue;
            };
            let durable = self.durable.entry(line).or_insert(Content::NONE);
            let fresh = self.fresh.entry(line).or_insert(Content::NONE);
            let done = closed(pieces, is_for);
            let mut done = done.into_iter();
            pieces.retain(|piece| {
                let is_done = done.next().unwrap_or(false);
                if is_done {
                    durable.store(piece);
                    fresh.store(piece);
                }
                !is_done
            });
            // A serializing instruction leaves some.
            if pieces
                .iter()
                .any(|piece| piece.on_its_way & (1 << cpu) != 0)
            {
                self.on_their_way.entry(cpu).or_default().insert(line);
            }
            if pieces.is_empty() {
                self.pending.remove(&line);
            }
        }
    }

    /// What has become durable since the beginning, as patches to the image of the memory at the beginning, in the order
    /// of their addresses. It is in each state.
    pub fn durable(&self) -> Vec<Patch> {
        patches(self.durable.iter().map(|(&line, content)| (line, content)))
    }

    /// As [`Domain::durable`], but only what has become durable since the last call.
    pub fn take_durable(&mut self) -> Vec<Patch> {
        let fresh = std::mem::take(&mut self.fresh);
        patches(fresh.iter().map(|(&line, content)| (line, content)))
    }

    /// What is not durable for certain: the addresses of lines that have some of it, in their order.
    pub fn pending(&self) -> impl Iterator<Item = u64> + '_ {
        self.pending.keys().map(|line| line * LINE)
    }

    /// States in which a power failure could leave the memory now: patches to the image that [`Domain::durable`] has
    /// made. The first has nothing of what is pending, and the last has all; if both are the same, there is one.
    ///
    /// If there are no more than `bound`, it is all of them. Otherwise it is `bound` of them, and at least two, those
    /// between the first and the last at random, which the same `seed` chooses again: some with little of what is
    /// pending, some with most, some with any half. Stores of what is there already make states that are the same.
    pub fn states(&self, bound: usize, seed: u64) -> States<'_> {
        let lines: Vec<Choices<'_>> = self
            .pending
            .iter()
            .map(|(&line, pieces)| Choices::new(line, pieces))
            .collect();
        let total = lines
            .iter()
            .try_fold(1u128, |total, line| total.checked_mul(line.count?));
        let bound = bound.max(2);
        let (is_all, left) = match total.map(usize::try_from) {
            Some(Ok(total)) if total <= bound => (true, total),
            _ => (false, bound),
        };
        States {
            lines,
            is_all,
            next: 0,
            end: left,
            random: Random(seed),
        }
    }
}

/// Which of a line's pieces are there if those are there that `is_for` says.
fn closed(pieces: &[Piece], is_for: impl Fn(&Piece) -> bool) -> Vec<bool> {
    let mut done = vec![false; pieces.len()];
    let (mut cached, mut granules) = (false, 0u8);
    for (done, piece) in done.iter_mut().zip(pieces).rev() {
        let granule = 1 << piece.granule;
        let in_order = cached && piece.how == How::Cached;
        if is_for(piece) || in_order || granules & granule != 0 {
            *done = true;
            cached |= piece.how == How::Cached;
            granules |= granule;
        }
    }
    done
}

/// What can be there of a line's pieces.
///
/// A choice is a number of cached pieces, which are the first ones, and for each granule, how many of its pieces. The
/// cached among these are those that the first number says, so that it leaves a choice of the non-temporal ones between
/// two cached ones.
#[derive(Debug, Clone)]
struct Choices<'a> {
    line: u64,
    pieces: &'a [Piece],
    /// How many there are, unless they are too many for a number.
    count: Option<u128>,
    /// For each number of cached pieces, how many choices there are with fewer, if that is a number.
    before: Vec<Option<u128>>,
}

/// For each granule, from how many to how many of its pieces can be there.
type Bounds = [(usize, usize); GRANULES];

impl<'a> Choices<'a> {
    fn new(line: u64, pieces: &'a [Piece]) -> Self {
        let cached = pieces.iter().filter(|piece| piece.how == How::Cached);
        let mut choices = Self {
            line,
            pieces,
            count: Some(0),
            before: Vec::with_capacity(cached.count() + 1),
        };
        // For each granule, how many of its pieces are non-temporal before the next cached one: first of those before
        // its first cached one.
        let mut between: [Vec<u128>; GRANULES] = Default::default();
        for between in &mut between {
            between.push(0);
        }
        for piece in pieces {
            if let Some(between) = between.get_mut(usize::from(piece.granule)) {
                match (piece.how, between.last_mut()) {
                    (How::NonTemporal, Some(last)) => *last += 1,
                    _ => between.push(0),
                }
            }
        }
        let mut at = [0; GRANULES];
        let product = |at: &[usize; GRANULES]| {
            between
                .iter()
                .zip(at)
                .try_fold(1u128, |product, (between, &at)| {
                    product.checked_mul(between.get(at).map_or(1, |more| more + 1))
                })
        };
        let mut add = |at: &[usize; GRANULES]| {
            choices.before.push(choices.count);
            choices.count = choices
                .count
                .zip(product(at))
                .and_then(|(count, more)| count.checked_add(more));
        };
        add(&at);
        for piece in pieces.iter().filter(|piece| piece.how == How::Cached) {
            if let Some(at) = at.get_mut(usize::from(piece.granule)) {
                *at += 1;
            }
            add(&at);
        }
        choices
    }

    /// From how many to how many pieces of each granule can be there with the first `cached` cached ones.
    fn bounds(&self, cached: usize) -> Bounds {
        let mut bounds = [(0, 0); GRANULES];
        // How many pieces there are, and whether the granule's next cached piece is not there, which ends it.
        let mut seen = [(0, false); GRANULES];
        let mut left = cached;
        for piece in self.pieces {
            let granule = usize::from(piece.granule);
            let (Some(bounds), Some((count, is_over))) =
                (bounds.get_mut(granule), seen.get_mut(granule))
            else {
                continue;
            };
            if *is_over {
                continue;
            }
            match piece.how {
                How::Cached if left == 0 => *is_over = true,
                How::Cached => {
                    left -= 1;
                    *count += 1;
                    *bounds = (*count, *count);
                }
                How::NonTemporal => {
                    *count += 1;
                    bounds.1 = *count;
                }
            }
        }
        bounds
    }

    /// What a line has that has so many pieces of each granule.
    fn content(&self, counts: [usize; GRANULES]) -> Content {
        let mut left = counts;
        let mut content = Content::NONE;
        for piece in self.pieces {
            if let Some(left @ 1..) = left.get_mut(usize::from(piece.granule)) {
                *left -= 1;
                content.store(piece);
            }
        }
        content
    }

    /// The choice of this number, less than `count`. The first is to have nothing, the last to have all.
    fn nth(&self, n: u128) -> Content {
        let cached = self
            .before
            .partition_point(|before| before.is_some_and(|before| before <= n));
        let cached = cached.saturating_sub(1);
        let before = self.before.get(cached).copied().flatten();
        let mut n = n - before.unwrap_or(0);
        let counts = self.bounds(cached).map(|(least, most)| {
            let choices = (most - least) as u128 + 1;
            let count = least + (n % choices) as usize;
            n /= choices;
            count
        });
        self.content(counts)
    }

    fn nothing(&self) -> Content {
        Content::NONE
    }

    fn all(&self) -> Content {
        self.content([usize::MAX; GRANULES])
    }

    fn random(&self, random: &mut Random) -> Content {
        let cached = random.below(self.before.len() as u64) as usize;
        let counts = self
            .bounds(cached)
            .map(|(least, most)| least + random.below((most - least) as u64 + 1) as usize);
        self.content(counts)
    }
}

/// One way in which a power failure could leave the memory.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct State {
    /// What to write to the image of what is durable, in the order of the addresses.
    pub patches: Vec<Patch>,
}

/// An iterator of states, see [`Domain::states`].
#[derive(Debug, Clone)]
pub struct States<'a> {
    lines: Vec<Choices<'a>>,
    /// Whether all are asked for, by their numbers, or some at random.
    is_all: bool,
    next: usize,
    end: usize,
    random: Random,
}

impl States<'_> {
    /// Whether these are all that there are.
    pub fn is_all(&self) -> bool {
        self.is_all
    }

    fn line(&mut self, line: usize, number: &mut u128, density: u64) -> Content {
        let is_last = self.next + 1 == self.end;
        let Some(choices) = self.lines.get(line) else {
            return Content::NONE;
        };
        if self.is_all {
            let count = choices.count.unwrap_or(1);
            let content = choices.nth(*number % count);
            *number /= count;
            return content;
        }
        if self.next == 0 {
            return choices.nothing();
        }
        if is_last {
            return choices.all();
        }
        match density {
            0 => choices.random(&mut self.random),
            // One line in as many is at random.
            1 | 2 if self.random.below(self.lines.len() as u64) == 0 => {
                choices.random(&mut self.random)
            }
            1 => choices.nothing(),
            2 => choices.all(),
            _ => match self.random.below(2) {
                0 => choices.nothing(),
                _ => choices.all(),
            },
        }
    }
}

impl Iterator for States<'_> {
    type Item = State;

    fn next(&mut self) -> Option<State> {
        if self.next == self.end {
            return None;
        }
        let mut number = self.next as u128;
        let density = self.random.below(4);
        let mut lines = Vec::with_capacity(self.lines.len());
        for n in 0..self.lines.len() {
            let content = self.line(n, &mut number, density);
            if let Some(choices) = self.lines.get(n) {
                lines.push((choices.line, content));
            }
        }
        self.next += 1;
        Some(State {
            patches: patches(lines.iter().map(|(line, content)| (*line, content))),
        })
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = self.end - self.next;
        (left, Some(left))
    }
}

impl ExactSizeIterator for States<'_> {}

/// SplitMix64.
#[derive(Debug, Clone)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number less than `end`; 0 if that is 0.
    fn below(&mut self, end: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(end)) >> 64) as u64
    }
}
