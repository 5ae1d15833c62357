// SPDX-License-Identifier: GPL-2.0-only

//! Memory behind a bus: whatever part of a window is written, zeroed or read, the bytes are right and
//! no others change, and each access is a load or a store of one aligned granule in the window, made
//! when it has to be; and what is drained is on the device, while what is only fenced may not be.

use pmem_core::persist::{
    generic::Generic,
    model::{
        Cpu,
        Memory, //
    },
    words::{
        Answer,
        Bus,
        Words, //
    },
    Cache,
    CpuFeatures,
    Machine,
    Native,
    Source,
    VolatileSlice,
    Way,
    GRANULE, //
};
use proptest::prelude::*;
use std::{
    cell::RefCell,
    fmt::Debug,
    ops::Range, //
};

/// What is beside the bytes that are written.
const GUARD: u8 = 0xa5;

/// Bytes that differ from their neighbours, and from [`GUARD`] and zero.
fn data(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 127 + 1) as u8).collect()
}

/// All of `bytes`.
fn slice(bytes: &mut [u8]) -> VolatileSlice<'_> {
    // SAFETY: They are there as long as they are borrowed, and nobody refers to them meanwhile.
    unsafe { VolatileSlice::new(bytes.as_mut_ptr(), bytes.len()) }
}

/// The memory of a device, which begins at a multiple of a granule, as a page does.
struct Device(Vec<u64>);

impl Device {
    /// Guards, at least `len`.
    fn new(len: usize) -> Self {
        Self(vec![u64::from_ne_bytes([GUARD; 8]); len.div_ceil(GRANULE)])
    }

    fn addr(&mut self) -> *mut u8 {
        self.0.as_mut_ptr().cast()
    }

    /// These bytes of it, which may be written to as long as nothing else uses it.
    fn window(&mut self, bytes: Range<usize>) -> VolatileSlice<'_> {
        assert!(bytes.start <= bytes.end && bytes.end <= self.0.len() * GRANULE);
        // SAFETY: They are there as long as they are borrowed, and nobody refers to them meanwhile.
        unsafe { VolatileSlice::new(self.addr().wrapping_add(bytes.start), bytes.len()) }
    }

    fn bytes(&self) -> Vec<u8> {
        self.0
            .iter()
            .flat_map(|granule| granule.to_ne_bytes())
            .collect()
    }
}

/// An access to a granule of the device, by its number; or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Load(usize),
    LoadThrough(usize),
    Store(usize),
    Fence,
}

/// A machine that notes how it accesses a device, and allows nothing but granules.
#[derive(Clone, Copy, Debug)]
struct Recorder<'a, M> {
    machine: M,
    /// Where the device is.
    addr: usize,
    len: usize,
    log: &'a RefCell<Vec<Access>>,
}

impl<M> Recorder<'_, M> {
    fn note(self, addr: *const u8, granules: usize, access: fn(usize) -> Access) {
        let offset = addr.addr().wrapping_sub(self.addr);

        assert!(addr.addr() % GRANULE == 0, "offset {offset} is not aligned");
        assert!(
            offset <= self.len && granules <= (self.len - offset) / GRANULE,
            "{granules} granules at {offset} are not all in the device"
        );
        let first = offset / GRANULE;
        self.log
            .borrow_mut()
            .extend((first..first + granules).map(access));
    }

    /// What is in RAM is accessed as it comes, and so the device must not be.
    fn assert_ram(self, addr: *const u8, len: usize) {
        let start = addr.addr();

        assert!(start + len <= self.addr || self.addr + self.len <= start);
    }
}

impl<M: Machine> Machine for Recorder<'_, M> {
    const DURABLE: bool = M::DURABLE;

    fn name(self, way: Way) -> &'static str {
        self.machine.name(way)
    }

    unsafe fn store(self, _: *mut u8, _: Source, len: usize) {
        panic!("a store of {len} bytes");
    }

    unsafe fn store_granule(self, _: *mut u8, _: u64) {
        panic!("a store through the cache");
    }

    unsafe fn store_granules(self, _: *mut u8, _: Source, _: usize) {
        panic!("stores through the cache");
    }

    unsafe fn stream_half(self, _: *mut u8, _: Source) {
        panic!("a store of 4 bytes");
    }

    unsafe fn stream(self, dst: *mut u8, src: Source, granules: usize) {
        if let Source::Memory(src) = src {
            self.assert_ram(src, granules * GRANULE);
        }
        self.note(dst, granules, Access::Store);
        // SAFETY: By the safety contract of this function.
        unsafe { self.machine.stream(dst, src, granules) }
    }

    unsafe fn write_back(self, _: *const u8) {
        panic!("a line is written back, where none gets dirty");
    }

    fn fence(self) {
        self.log.borrow_mut().push(Access::Fence);
        self.machine.fence();
    }
}

impl<M: Bus> Bus for Recorder<'_, M> {
    unsafe fn load_granules(self, dst: *mut u8, src: *const u8, granules: usize) {
        self.assert_ram(dst, granules * GRANULE);
        self.note(src, granules, Access::Load);
        // SAFETY: By the safety contract of this function.
        unsafe { self.machine.load_granules(dst, src, granules) }
    }

    unsafe fn load_through(self, src: *const u8) -> u64 {
        self.note(src, 1, Access::LoadThrough);
        // SAFETY: By the safety contract of this function.
        unsafe { self.machine.load_through(src) }
    }
}

/// Calls `act` with what accesses `bytes` of `device` and that window, and returns how they were
/// accessed.
fn recorded<M: Bus>(
    machine: M,
    device: &mut Device,
    bytes: Range<usize>,
    act: impl FnOnce(Words<Recorder<'_, M>>, VolatileSlice<'_>),
) -> Vec<Access> {
    let log = RefCell::new(Vec::new());
    let recorder = Recorder {
        machine,
        addr: device.addr().addr() + bytes.start,
        len: bytes.len(),
        log: &log,
    };

    act(Words::on(recorder), device.window(bytes));
    log.into_inner()
}

/// The granules that have a byte of the `len` at `offset`, each with whether all of its bytes are
/// among them.
fn granules(offset: usize, len: usize) -> Vec<(usize, bool)> {
    let is_meant = |byte| (offset..offset + len).contains(&byte);

    (0..(offset + len).div_ceil(GRANULE))
        .map(|granule| {
            let meant = (granule * GRANULE..(granule + 1) * GRANULE).filter(|&byte| is_meant(byte));
            (granule, meant.count())
        })
        .filter(|&(_, meant)| meant != 0)
        .map(|(granule, meant)| (granule, meant == GRANULE))
        .collect()
}

/// A store changes each granule once, and loads those before of which it has not all bytes, and no
/// others.
fn stores(offset: usize, len: usize) -> Vec<Access> {
    granules(offset, len)
        .into_iter()
        .flat_map(|(granule, is_whole)| {
            let load = (!is_whole).then_some(Access::LoadThrough(granule));
            load.into_iter().chain([Access::Store(granule)])
        })
        .collect()
}

/// A read loads each granule once, and the last one from the device itself.
fn loads(offset: usize, len: usize) -> Vec<Access> {
    let mut loads: Vec<_> = granules(offset, len)
        .into_iter()
        .map(|(granule, _)| Access::Load(granule))
        .collect();

    if let Some(last) = loads.last_mut() {
        if let Access::Load(granule) = *last {
            *last = Access::LoadThrough(granule);
        }
    }
    loads
}

/// Writes, reads and zeroes `bytes` at `offset` of a window, to or from memory that begins at `ram` of
/// a granule.
fn accesses<M: Bus + Debug>(
    machine: M,
    window: Range<usize>,
    offset: usize,
    ram: usize,
    bytes: &[u8],
) {
    let len = bytes.len();
    let what = format!("{machine:?}: {len} bytes at {offset} of {window:?}, {ram} in memory");
    let mut device = Device::new(window.end + 16);
    let at = window.start + offset;
    let mut expected = device.bytes();

    // Both neighbours in memory differ from the bytes, lest they be taken for these.
    let mut src = Device::new(ram + len + 16);
    put(bytes, &mut src, ram);
    let log = recorded(machine, &mut device, window.clone(), |words, window| {
        let src = src.window(ram..ram + len);
        assert!(words.write(window, offset as u64, src), "{what}");
        words.fence();
    });
    expected[at..at + len].copy_from_slice(bytes);
    assert_eq!(device.bytes(), expected, "{what}");
    assert_eq!(
        log,
        [stores(offset, len), vec![Access::Fence]].concat(),
        "{what}"
    );

    let mut dst = Device::new(ram + len + 16);
    let log = recorded(machine, &mut device, window.clone(), |words, window| {
        let answer = words.read(window, offset as u64, dst.window(ram..ram + len));
        assert!(answer.is_some(), "{what}");
    });
    assert_eq!(dst.bytes(), src.bytes(), "{what}");
    assert_eq!(device.bytes(), expected, "{what}");
    assert_eq!(log, loads(offset, len), "{what}");

    let log = recorded(machine, &mut device, window, |words, window| {
        assert!(words.zero(window, offset as u64, len as u64), "{what}");
    });
    expected[at..at + len].fill(0);
    assert_eq!(device.bytes(), expected, "{what}");
    assert_eq!(log, stores(offset, len), "{what}");
}

/// Puts `bytes` at `at` of `memory`.
fn put(bytes: &[u8], memory: &mut Device, at: usize) {
    for (i, &byte) in bytes.iter().enumerate() {
        let granule = &mut memory.0[(at + i) / GRANULE];
        let mut changed = granule.to_ne_bytes();
        changed[(at + i) % GRANULE] = byte;
        *granule = u64::from_ne_bytes(changed);
    }
}

fn native() -> Native {
    Native::new(CpuFeatures::detect())
}

#[test]
fn each_part_of_a_window() {
    let data = data(64);

    for offset in 0..=24_usize {
        for len in 0..=64 {
            for ram in 0..GRANULE {
                // The window has not a granule more than it needs, or some.
                for end in [(offset + len).next_multiple_of(GRANULE), 104] {
                    accesses(native(), 16..16 + end, offset, ram, &data[..len]);
                    accesses(Generic, 16..16 + end, offset, ram, &data[..len]);
                }
            }
        }
    }
}

proptest! {
    #[test]
    fn larger_parts(
        bytes in prop::collection::vec(any::<u8>(), 0..10_000),
        start in 0..32_usize,
        offset in 0..2000_usize,
        after in 0..32_usize,
        ram in 0..GRANULE,
    ) {
        let start = start * GRANULE;
        let end = start + (offset + bytes.len()).next_multiple_of(GRANULE) + after * GRANULE;

        accesses(native(), start..end, offset, ram, &bytes);
        accesses(Generic, start..end, offset, ram, &bytes);
    }

    /// A bio's segments may have any lengths. Each is stored when the ones before it are, so that what
    /// they stored to the granule that they share with it is stored again.
    #[test]
    fn segments_one_after_the_other(
        mut segments in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..60),
    ) {
        let all = segments.concat();
        let mut device = Device::new(all.len() + 16);
        let len = all.len().next_multiple_of(GRANULE);

        recorded(native(), &mut device, 8..8 + len, |words, window| {
            let mut offset = 0;
            for segment in &mut segments {
                let src = slice(segment);
                assert!(words.write(window, offset, src));
                offset += src.len() as u64;
            }
        });
        let mut expected = vec![GUARD; device.bytes().len()];
        expected[8..8 + all.len()].copy_from_slice(&all);
        prop_assert_eq!(device.bytes(), expected);

        recorded(native(), &mut device, 8..8 + len, |words, window| {
            let mut offset = 0;
            for segment in &mut segments {
                let was = std::mem::replace(segment, vec![GUARD; segment.len()]);
                assert!(words.read(window, offset, slice(segment)).is_some());
                assert_eq!(*segment, was);
                offset += was.len() as u64;
            }
        });
    }
}

#[test]
fn a_window_that_is_not_made_of_granules_is_refused() {
    for start in 0..=16 {
        for end in start..=32 {
            let is_whole = start % GRANULE == 0 && end % GRANULE == 0;
            let mut device = Device::new(48);
            let mut ram = [0; 8];

            // Also what is itself made of whole granules is refused, as is nothing at all.
            for offset in [0, GRANULE - start % GRANULE] {
                for len in [0, 3, 8] {
                    let is_in = is_whole && offset + len <= end - start;
                    let log = recorded(native(), &mut device, start..end, |words, window| {
                        let ram = slice(&mut ram[..len]);
                        let offset = offset as u64;
                        assert_eq!(words.write(window, offset, ram), is_in);
                        assert_eq!(words.zero(window, offset, len as u64), is_in);
                        assert_eq!(words.read(window, offset, ram).is_some(), is_in);
                    });
                    assert_eq!(log.is_empty(), !is_in || len == 0);
                }
            }
            let changed = device.bytes().iter().any(|&byte| byte != GUARD);
            assert_eq!(changed, is_whole && start != end);
        }
    }
}

#[test]
fn what_is_not_in_the_window_is_refused() {
    let mut device = Device::new(64);
    let mut ram = data(80);

    // The size of the window, the offset, the length.
    for (size, offset, len) in [
        (0, 0, 1),
        (0, 1, 0),
        (24, 0, 25),
        (24, 1, 24),
        (24, 17, 8),
        (24, 23, 2),
        (24, 24, 1),
        (24, 25, 0),
        (24, 32, 8),
        (24, u64::MAX, 1),
        (24, u64::MAX - 6, 8),
        (24, u64::MAX - 7, 40),
        (24, 1 << 63, 0),
    ] {
        let log = recorded(native(), &mut device, 16..16 + size, |words, window| {
            let ram = slice(&mut ram[..len]);
            assert!(!words.write(window, offset, ram));
            assert!(!words.zero(window, offset, len as u64));
            assert_eq!(words.read(window, offset, ram), None);
        });
        assert_eq!(log, []);
    }
    let log = recorded(native(), &mut device, 16..40, |words, window| {
        assert!(!words.zero(window, 0, u64::MAX));
        assert!(!words.zero(window, 8, u64::MAX - 7));
        assert!(!words.zero(window, u64::MAX, u64::MAX));
    });
    assert_eq!(log, []);
    assert!(device.bytes().iter().all(|&byte| byte == GUARD));
    assert_eq!(ram, data(80));
}

#[test]
fn a_drain_loads_one_granule_from_the_device_after_all_that_was_stored() {
    for offset in 0..=40 {
        let mut device = Device::new(40);
        let mut ram = data(24);
        let is_granule = offset % 8 == 0 && offset < 24;

        let log = recorded(native(), &mut device, 8..32, |words, window| {
            assert!(words.write(window, 0, slice(&mut ram)));
            assert_eq!(words.drain(window, offset).is_some(), is_granule);
        });
        let mut expected = stores(0, 24);
        expected.extend(is_granule.then_some(Access::LoadThrough(offset as usize / GRANULE)));
        assert_eq!(log, expected);
    }
    // A drain has no need of the whole window, but its granule is aligned as all are.
    let mut device = Device::new(40);
    for (offset, answer) in [(3, None), (4, Some(Answer::Device)), (8, None), (20, None)] {
        recorded(native(), &mut device, 8..40, |words, window| {
            let unaligned = window.range(4, 23).unwrap();
            assert_eq!(words.drain(unaligned, offset), answer);
        });
    }
}

#[test]
fn one_bit_of_the_last_granule_tells_of_a_device() {
    for bit in 0..=64 {
        let value = !1_u64.checked_shl(bit).unwrap_or(0);
        let expected = match bit {
            64 => Answer::AllOnes,
            _ => Answer::Device,
        };
        for words in [
            Words::new(CpuFeatures::detect()),
            Words::new(CpuFeatures::default()),
        ] {
            let mut device = Device::new(32);
            device.0[1] = u64::MAX;
            device.0[2] = value;
            let window = device.window(0..32);
            let mut ram = [0; 24];

            assert_eq!(words.drain(window, 16), Some(expected));
            for (offset, len) in [(0, 24), (0, 17), (8, 16), (16, 8), (17, 2), (9, 14)] {
                let dst = slice(&mut ram[..len]);
                assert_eq!(words.read(window, offset, dst), Some(expected));
            }
            // Of the granules before, and of those of which nothing is meant, nothing is told.
            let dst = slice(&mut ram[..3]);
            assert_eq!(words.read(window, 13, dst), Some(Answer::AllOnes));
            assert_eq!(words.read(window, 24, slice(&mut [])), Some(Answer::Device));
        }
    }
}

#[test]
fn the_log_has_the_instruction() {
    #[cfg(target_arch = "x86_64")]
    for (clwb, clflushopt) in [(false, false), (false, true), (true, true)] {
        let words = Words::new(CpuFeatures { clwb, clflushopt });
        assert_eq!(words.name(), "movnti");
    }
    assert_eq!(Words::on(Generic).name(), "generic");
}

/// A page of memory, with pages before and after it that must not be touched.
struct Page {
    addr: *mut u8,
    size: usize,
}

impl Page {
    fn new() -> Self {
        // SAFETY: It asks for a number.
        let size = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap();
        // SAFETY: It asks for memory that nobody has.
        let addr = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                3 * size,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(addr, libc::MAP_FAILED);
        let addr = addr.cast::<u8>().wrapping_add(size);
        // SAFETY: The page was just mapped.
        let changed =
            unsafe { libc::mprotect(addr.cast(), size, libc::PROT_READ | libc::PROT_WRITE) };
        assert_eq!(changed, 0);

        Self { addr, size }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: They are the three pages that were mapped, and nobody uses them any more.
        unsafe { libc::munmap(self.addr.wrapping_sub(self.size).cast(), 3 * self.size) };
    }
}

/// The instructions themselves touch nothing outside the window: the recorder has only seen what they
/// are told to.
#[test]
fn a_window_may_end_where_memory_does() {
    fn check<M: Bus>(words: Words<M>) {
        let page = Page::new();
        // SAFETY: The page is there until the end, and nobody refers to its bytes.
        let window = unsafe { VolatileSlice::new(page.addr, page.size) };
        let size = page.size as u64;
        let mut bytes = data(page.size);

        for len in (0..=80).chain(page.size - 20..=page.size) {
            for offset in (0..20).flat_map(|at| [at, (size - at).saturating_sub(len as u64)]) {
                if offset + len as u64 > size {
                    continue;
                }
                let bytes = slice(&mut bytes[..len]);
                assert!(words.write(window, offset, bytes));
                assert!(words.read(window, offset, bytes).is_some());
                assert!(words.zero(window, offset, len as u64));
                words.fence();
            }
        }
        assert_eq!(bytes, data(page.size));
    }

    check(Words::new(CpuFeatures::detect()));
    check(Words::on(Generic));
}

/// Calls `check` with a memory behind a bus of which a part was just written or zeroed, by CPU 0 that
/// has it mapped in each way; with what accesses it; and with how many granules were stored since one
/// was last loaded to be changed, which pushes those before to the device, too.
fn each_store(mut check: impl FnMut(&Memory, Words<Cpu<'_>>, usize)) {
    let mut data = data(40);

    for cache in Cache::ALL {
        for offset in 0..=16 {
            for len in 1..=40 {
                for is_zeroed in [false, true] {
                    let memory = Memory::boot(&[GUARD; 64]).behind_bus();
                    let words = Words::on(memory.cpu(0).mapped(cache));

                    assert!(if is_zeroed {
                        words.zero(memory.slice(), offset, len as u64)
                    } else {
                        words.write(memory.slice(), offset, slice(&mut data[..len]))
                    });
                    let accesses = stores(offset as usize, len);
                    let stored = accesses
                        .iter()
                        .rev()
                        .take_while(|access| matches!(access, Access::Store(_)));
                    check(&memory, words, stored.count());
                }
            }
        }
    }
}

#[test]
fn what_is_fenced_may_still_be_on_the_bus() {
    each_store(|memory, words, stored| {
        let seen = memory.read(0, 64);

        words.fence();
        assert_eq!(memory.in_flight(), stored);
        assert_ne!(memory.durable(), seen);
        for image in memory.crash_images(64, 0) {
            for granule in (0..64).step_by(GRANULE).map(|at| at..at + GRANULE) {
                // Also what was stored in part is there or not.
                assert!(
                    image[granule.clone()] == seen[granule.clone()]
                        || image[granule] == [GUARD; GRANULE]
                );
            }
        }
    });
}

#[test]
fn what_is_drained_is_on_the_device() {
    for offset in [0, 56] {
        each_store(|memory, words, _| {
            assert!(words.drain(memory.slice(), offset).is_some());
            assert_eq!(memory.in_flight(), 0);
            assert_eq!(memory.durable(), memory.read(0, 64));
        });
    }
}

#[test]
fn a_drain_on_another_cpu_needs_a_fence_on_this_one() {
    each_store(|memory, words, stored| {
        let other = Words::on(memory.cpu(1));

        assert!(other.drain(memory.slice(), 0).is_some());
        assert_eq!(memory.in_flight(), stored);

        words.fence();
        assert!(other.drain(memory.slice(), 0).is_some());
        assert_eq!(memory.in_flight(), 0);
        assert_eq!(memory.durable(), memory.read(0, 64));
    });
}
