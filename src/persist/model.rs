// SPDX-License-Identifier: GPL-2.0-only

//! A persistent memory behind a cache that can lose power, to test what is written with
//! [`Persist`](super::Persist).
//!
//! A [`Memory`] is a [`Machine`]: code under test writes to it by `Persist::on(&memory)`, at
//! addresses from [`Memory::addr`]. The model has each store in one of these states:
//!
//! | state | reached by | after a power loss |
//! |---|---|---|
//! | dirty | a store through the cache | there or not: a line may be evicted at any time |
//! | on its way | a store past the cache; a write-back of its line | there or not |
//! | durable | a fence after that, of the same CPU | there |
//!
//! Stores are cut into aligned granules of 8 bytes, and each of these is there or not by itself,
//! also in one line, and whatever the order of the stores: real machines keep some of the order that
//! the model gives up, so what survives here survives there. A store that is there hides the older
//! ones to the same bytes.
//!
//! That is for memory that is cached write-back. To a CPU that has it [mapped](Cpu::mapped) with
//! another mode, no store is dirty: each is on its way at once.
//!
//! Memory that is [behind a bus](Memory::behind_bus) has one more state: a fence only makes a store
//! posted, and a load [through all](Bus::load_through), by any CPU, makes durable what is.
//!
//! The memory itself is the machine of one CPU, and [`Memory::cpu`] gives those of others. All see
//! the same bytes, but a fence of one does not wait for what another has put on its way.
//!
//! Of what could be found after a power loss, [`Memory::crash_images`] makes all or many. A test
//! boots each with [`Memory::boot`], or looks at its bytes.
//!
//! The model only exists on the host. It panics if it is used wrongly, as tests do.

extern crate std;

use super::{
    words::Bus,
    Cache,
    Machine,
    Source,
    VolatileSlice,
    Way,
    GRANULE,
    LINE, //
};
use core::cell::{
    RefCell,
    UnsafeCell, //
};
use std::{
    boxed::Box,
    vec,
    vec::Vec, //
};

/// A line of what CPUs see.
#[repr(align(64))]
struct Line {
    _bytes: UnsafeCell<[u8; LINE]>,
}

/// A store of a granule, or of some of its bytes, that is not durable.
#[derive(Clone, Copy, Debug)]
struct Store {
    /// The granule's number.
    granule: usize,
    /// Its bytes; meaningless where `mask` is not set.
    bytes: [u8; GRANULE],
    /// Which of these are stored.
    mask: [bool; GRANULE],
    /// The CPUs that have put it on its way, a bit each: a fence of one of them makes it durable.
    on_its_way: u32,
    /// Whether it is out of the CPUs and on the bus, where no fence waits for it.
    is_posted: bool,
}

impl Store {
    /// Stores it to `image`.
    fn apply(&self, image: &mut [u8]) {
        let place = image.iter_mut().skip(self.granule * GRANULE);
        for ((place, &byte), &stored) in place.zip(&self.bytes).zip(&self.mask) {
            if stored {
                *place = byte;
            }
        }
    }
}

/// What would be there after a power loss, and what might.
#[derive(Clone, Debug)]
struct Media {
    durable: Vec<u8>,
    /// In the order of the program.
    in_flight: Vec<Store>,
    is_behind_bus: bool,
}

impl Media {
    /// Makes durable what the CPU of this bit has put on its way, or just posted behind a bus.
    fn fence(&mut self, cpu: u32) {
        if self.is_behind_bus {
            for store in &mut self.in_flight {
                store.is_posted |= store.on_its_way & cpu != 0;
            }
        } else {
            self.settle(|store| store.on_its_way & cpu != 0);
        }
    }

    /// Makes durable the stores that are `done`.
    fn settle(&mut self, done: impl Fn(&Store) -> bool) {
        let mut left: Vec<Store> = Vec::new();

        for store in &self.in_flight {
            let becomes_durable = done(store);
            // What is older cannot come back where it was overwritten.
            for older in left
                .iter_mut()
                .filter(|older| older.granule == store.granule)
            {
                for (older, &stored) in older.mask.iter_mut().zip(&store.mask) {
                    *older &= !(stored && becomes_durable);
                }
            }
            if becomes_durable {
                store.apply(&mut self.durable);
            } else {
                left.push(*store);
            }
        }
        left.retain(|store| store.mask.contains(&true));
        self.in_flight = left;
    }
}

/// A persistent memory and the cache in front of it.
///
/// # Examples
///
/// ```
/// use pmem_core::persist::{model::Memory, Persist};
///
/// let memory = Memory::new(64);
/// let persist = Persist::on(&memory);
///
/// // SAFETY: Both are valid for 3 bytes.
/// unsafe { persist.copy(memory.addr(5), b"new".as_ptr(), 3) };
/// assert_eq!(memory.read(5, 3), b"new");
/// assert!(memory.crash_images(100, 0).any(|image| &image[5..8] != b"new"));
///
/// persist.fence();
/// assert!(memory.crash_images(100, 0).all(|image| &image[5..8] == b"new"));
/// ```
pub struct Memory {
    /// What CPUs see.
    lines: Box<[Line]>,
    /// How many of their bytes the memory has.
    len: usize,
    media: RefCell<Media>,
}

impl Memory {
    /// Memory of `len` zeros, all durable.
    pub fn new(len: usize) -> Self {
        Self::boot(&vec![0; len])
    }

    /// The memory as it is found after a power loss that left `image`, all of it durable.
    pub fn boot(image: &[u8]) -> Self {
        let lines = image.chunks(LINE).map(|bytes| {
            let mut line = [0; LINE];
            line[..bytes.len()].copy_from_slice(bytes);
            Line {
                _bytes: UnsafeCell::new(line),
            }
        });

        Self {
            lines: lines.collect(),
            len: image.len(),
            media: RefCell::new(Media {
                durable: image.to_vec(),
                in_flight: Vec::new(),
                is_behind_bus: false,
            }),
        }
    }

    /// The same memory, but behind a bus that posts stores.
    pub fn behind_bus(mut self) -> Self {
        self.media.get_mut().is_behind_bus = true;
        self
    }

    /// The size in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The address of the byte at `offset`, for [`Persist`](super::Persist). The memory starts at
    /// the start of a line.
    ///
    /// What code under test reads there is what CPUs see. It must not write there but by the
    /// [`Machine`] and [`write`](Self::write), as the model would not know of it.
    pub fn addr(&self, offset: usize) -> *mut u8 {
        assert!(offset <= self.len(), "offset {offset} is beyond the end");

        self.lines
            .as_ptr()
            .cast_mut()
            .cast::<u8>()
            .wrapping_add(offset)
    }

    /// All of it, with the rule of [`addr`](Self::addr).
    pub fn slice(&self) -> VolatileSlice<'_> {
        // SAFETY: It is there as long as it is borrowed, and nobody refers to its bytes: they are
        // in cells, of which none is opened. It belongs to one thread, as it is not `Sync`, and so
        // does the slice.
        unsafe { VolatileSlice::new(self.addr(0), self.len) }
    }

    /// The machine of the CPU of this number. The memory is itself that of CPU 0.
    pub fn cpu(&self, number: u32) -> Cpu<'_> {
        let bit = 1_u32.checked_shl(number);

        Cpu {
            memory: self,
            bit: bit.unwrap_or_else(|| panic!("the model has no CPU {number}")),
            is_write_back: true,
        }
    }

    /// Writes `bytes` at `offset` through the cache, as a user does in a mapping: they stay dirty
    /// until their lines are written back.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        self.put(
            self.addr(offset),
            Source::Memory(bytes.as_ptr()),
            bytes.len(),
            0,
        );
    }

    /// The `len` bytes at `offset`, as CPUs see them.
    pub fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        let end = offset.checked_add(len).expect("the range wraps");
        assert!(end <= self.len(), "{offset}..{end} is beyond the end");

        let addr = self.addr(offset);
        (0..len)
            // SAFETY: They are in the memory, as just checked. Nobody writes meanwhile: the memory
            // belongs to one thread, as it is not `Sync`.
            .map(|i| unsafe { addr.wrapping_add(i).read() })
            .collect()
    }

    /// What is durable: the image of a power loss now that loses all that it can lose.
    pub fn durable(&self) -> Vec<u8> {
        self.media.borrow().durable.clone()
    }

    /// How many stores of a granule a power loss now could lose.
    pub fn in_flight(&self) -> usize {
        self.media.borrow().in_flight.len()
    }

    /// What could be found after a power loss now.
    ///
    /// If there are at most `limit` ways to lose some of the stores that are not durable, these are
    /// all images, each way once. Otherwise they are `limit` images: the one without any of these
    /// stores, the one with all, and others that `seed` chooses, with half of them, with all but
    /// one, with only one, and with the first few.
    pub fn crash_images(&self, limit: usize, seed: u64) -> CrashImages {
        let media = self.media.borrow().clone();
        let ways = u32::try_from(media.in_flight.len())
            .ok()
            .and_then(|stores| 1_usize.checked_shl(stores))
            .filter(|&ways| ways <= limit);

        CrashImages {
            media,
            exhaustive: ways.is_some(),
            next: 0,
            end: ways.unwrap_or(limit),
            random: Random(seed),
        }
    }

    /// Stores `len` bytes at `dst`, which are on their way if they go past the cache of a CPU.
    fn put(&self, dst: *mut u8, src: Source, len: usize, on_its_way: u32) {
        let offset = self.offset(dst, len);
        let mut media = self.media.borrow_mut();
        let mut at = offset;

        while at < offset + len {
            let mut store = Store {
                granule: at / GRANULE,
                bytes: [0; GRANULE],
                mask: [false; GRANULE],
                on_its_way,
                is_posted: false,
            };
            while at < offset + len && at / GRANULE == store.granule {
                let byte = match src.skip(at - offset) {
                    // SAFETY: The caller said that the source is valid for `len` bytes.
                    Source::Memory(src) => unsafe { src.read_volatile() },
                    Source::Zeros => 0,
                };
                // SAFETY: This byte is in the memory, as `offset` checked. There are no references
                // to it, and no other thread, as the memory is not `Sync`.
                unsafe { self.addr(at).write(byte) };
                store.bytes[at % GRANULE] = byte;
                store.mask[at % GRANULE] = true;
                at += 1;
            }
            media.in_flight.push(store);
        }
    }

    /// Where `addr` is, if `len` bytes from it are in this memory.
    fn offset(&self, addr: *const u8, len: usize) -> usize {
        addr.addr()
            .checked_sub(self.addr(0).addr())
            .filter(|&offset| offset.checked_add(len).is_some_and(|end| end <= self.len()))
            .unwrap_or_else(|| panic!("{len} bytes at {addr:?} are not in this memory"))
    }
}

impl Machine for &Memory {
    const DURABLE: bool = true;

    fn name(self, way: Way) -> &'static str {
        self.cpu(0).name(way)
    }

    unsafe fn store(self, dst: *mut u8, src: Source, len: usize) {
        // SAFETY: By the safety contract of this function, as are those below.
        unsafe { self.cpu(0).store(dst, src, len) }
    }

    unsafe fn store_granule(self, dst: *mut u8, value: u64) {
        // SAFETY: See above.
        unsafe { self.cpu(0).store_granule(dst, value) }
    }

    unsafe fn store_granules(self, dst: *mut u8, src: Source, granules: usize) {
        // SAFETY: See above.
        unsafe { self.cpu(0).store_granules(dst, src, granules) }
    }

    unsafe fn stream_half(self, dst: *mut u8, src: Source) {
        // SAFETY: See above.
        unsafe { self.cpu(0).stream_half(dst, src) }
    }

    unsafe fn stream(self, dst: *mut u8, src: Source, granules: usize) {
        // SAFETY: See above.
        unsafe { self.cpu(0).stream(dst, src, granules) }
    }

    unsafe fn write_back(self, addr: *const u8) {
        // SAFETY: See above.
        unsafe { self.cpu(0).write_back(addr) }
    }

    fn fence(self) {
        self.cpu(0).fence();
    }
}

impl Bus for &Memory {
    unsafe fn load_granules(self, dst: *mut u8, src: *const u8, granules: usize) {
        // SAFETY: By the safety contract of this function, as is the one below.
        unsafe { self.cpu(0).load_granules(dst, src, granules) }
    }

    unsafe fn load_through(self, src: *const u8) -> u64 {
        // SAFETY: See above.
        unsafe { self.cpu(0).load_through(src) }
    }
}

/// One of the CPUs in front of a [`Memory`]; see [`Memory::cpu`].
#[derive(Clone, Copy)]
pub struct Cpu<'a> {
    memory: &'a Memory,
    bit: u32,
    /// Whether it caches the memory write-back.
    is_write_back: bool,
}

impl Cpu<'_> {
    /// The same CPU, to which the memory is mapped with this mode.
    ///
    /// If that is not write-back, no line gets dirty: each store is on its way at once, and to write
    /// a line back is a bug of the code under test, as it would be for nothing.
    pub fn mapped(self, cache: Cache) -> Self {
        Self {
            is_write_back: cache == Cache::WriteBack,
            ..self
        }
    }

    /// Stores `len` bytes at `dst`, not past the cache.
    fn put(self, dst: *mut u8, src: Source, len: usize) {
        let on_its_way = if self.is_write_back { 0 } else { self.bit };

        self.memory.put(dst, src, len, on_its_way);
    }
}

impl Machine for Cpu<'_> {
    const DURABLE: bool = true;

    fn name(self, _way: Way) -> &'static str {
        "model"
    }

    unsafe fn store(self, dst: *mut u8, src: Source, len: usize) {
        self.put(dst, src, len);
    }

    unsafe fn store_granule(self, dst: *mut u8, value: u64) {
        assert!(
            dst.addr() % GRANULE == 0,
            "{dst:?} is not a multiple of {GRANULE}"
        );
        let bytes = value.to_ne_bytes();
        self.put(dst, Source::Memory(bytes.as_ptr()), GRANULE);
    }

    unsafe fn store_granules(self, dst: *mut u8, src: Source, granules: usize) {
        assert!(
            dst.addr() % GRANULE == 0,
            "{dst:?} is not a multiple of {GRANULE}"
        );
        self.put(dst, src, granules * GRANULE);
    }

    unsafe fn stream_half(self, dst: *mut u8, src: Source) {
        assert!(dst.addr() % 4 == 0, "{dst:?} is not a multiple of 4");
        self.memory.put(dst, src, 4, self.bit);
    }

    unsafe fn stream(self, dst: *mut u8, src: Source, granules: usize) {
        assert!(
            dst.addr() % GRANULE == 0,
            "{dst:?} is not a multiple of {GRANULE}"
        );
        self.memory.put(dst, src, granules * GRANULE, self.bit);
    }

    unsafe fn write_back(self, addr: *const u8) {
        assert!(
            self.is_write_back,
            "{addr:?} is written back, where no line gets dirty"
        );
        // The line may begin before the byte and end after the memory.
        let addr = addr.wrapping_sub(addr.addr() % LINE);
        let line = self.memory.offset(addr, 0) / LINE;

        for store in &mut self.memory.media.borrow_mut().in_flight {
            if store.granule * GRANULE / LINE == line {
                store.on_its_way |= self.bit;
            }
        }
    }

    fn fence(self) {
        self.memory.media.borrow_mut().fence(self.bit);
    }
}

impl Bus for Cpu<'_> {
    unsafe fn load_granules(self, dst: *mut u8, src: *const u8, granules: usize) {
        assert!(
            src.addr() % GRANULE == 0,
            "{src:?} is not a multiple of {GRANULE}"
        );
        let offset = self.memory.offset(src, granules * GRANULE);
        let bytes = self.memory.read(offset, granules * GRANULE);
        for (i, byte) in bytes.into_iter().enumerate() {
            // SAFETY: By the safety contract of this function.
            unsafe { dst.wrapping_add(i).write_volatile(byte) };
        }
    }

    unsafe fn load_through(self, src: *const u8) -> u64 {
        let mut granule = [0; GRANULE];

        self.fence();
        // The request to read does not overtake what is posted, by whomever.
        self.memory
            .media
            .borrow_mut()
            .settle(|store| store.is_posted);
        // SAFETY: By the safety contract of this function; `granule` is as long.
        unsafe { self.load_granules(granule.as_mut_ptr(), src, 1) };
        u64::from_ne_bytes(granule)
    }
}

/// What could be found after a power loss; see [`Memory::crash_images`].
#[derive(Clone, Debug)]
pub struct CrashImages {
    media: Media,
    exhaustive: bool,
    next: usize,
    end: usize,
    random: Random,
}

impl Iterator for CrashImages {
    type Item = Vec<u8>;

    fn next(&mut self) -> Option<Vec<u8>> {
        if self.next == self.end {
            return None;
        }

        let way = self.next;
        self.next += 1;

        let stores = self.media.in_flight.len();
        let chosen = self.random.below(stores);
        let mut image = self.media.durable.clone();
        for (i, store) in self.media.in_flight.iter().enumerate() {
            let survives = if self.exhaustive {
                (way >> i) & 1 != 0
            } else {
                match (way, way % 4) {
                    (0, _) => false,
                    (1, _) => true,
                    (_, 0) => self.random.below(2) != 0,
                    (_, 1) => i != chosen,
                    (_, 2) => i == chosen,
                    _ => i < chosen,
                }
            };
            if survives {
                store.apply(&mut image);
            }
        }
        Some(image)
    }
}

/// Random numbers, the same for the same seed: SplitMix64.
#[derive(Clone, Debug)]
struct Random(u64);

impl Random {
    /// A number below `end`, or zero if there is none.
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^= x >> 31;

        // It fits back, as it is less than `end`.
        ((u128::from(x) * end as u128) >> 64) as usize
    }
}
