// SPDX-License-Identifier: GPL-2.0-only

//! The durability core: on real memory it stores the bytes it was given and no other, by each way
//! that this CPU has; and in a memory that can lose power, what is fenced is there after a loss,
//! and nothing is said of what is not. Both by each policy, and for each mode of the range.

use pmem_core::persist::{
    generic::Generic,
    model::{
        Cpu,
        Memory, //
    },
    Cache,
    CopyPolicy,
    CpuFeatures,
    Machine,
    Persist,
    Source,
    VolatileSlice,
    Way,
    GRANULE,
    LINE, //
};
use proptest::prelude::*;
use std::{
    collections::BTreeSet,
    sync::atomic::{
        AtomicBool,
        AtomicU64,
        Ordering, //
    }, //
};

/// The longest of the copies that are tried in full, in bytes: more than four lines and a half, so
/// that each loop of the copy is entered, left and passed by.
const LONGEST: usize = 300;

/// What is beside the bytes that are written.
const GUARD: u8 = 0xa5;

#[repr(align(64))]
struct Lines<const SIZE: usize>([u8; SIZE]);

/// Bytes that differ from their neighbours, and from [`GUARD`] and zero.
fn data<const SIZE: usize>() -> Lines<SIZE> {
    Lines(std::array::from_fn(|i| (i % 127 + 1) as u8))
}

/// Each mode and policy that there is a way of its own for. That all others have one of these ways,
/// [`the_mode_and_the_policy_choose_the_way`] checks.
const MODES: [(Cache, CopyPolicy); 3] = [
    (Cache::WriteBack, CopyPolicy::NonTemporal),
    (Cache::WriteBack, CopyPolicy::WriteBack),
    (Cache::Uncached, CopyPolicy::Auto),
];

/// Each way that this CPU has, by this mode and policy.
fn native((cache, copy): (Cache, CopyPolicy)) -> Vec<Persist> {
    let all = CpuFeatures::detect();
    let no_clwb = CpuFeatures { clwb: false, ..all };
    let mut ways = vec![all, no_clwb, CpuFeatures::default()];

    ways.dedup();
    ways.into_iter()
        .map(|cpu| Persist::for_cache(cpu, cache, copy))
        .collect()
}

/// For all lengths up to [`LONGEST`] and all alignments, calls `put` to store at an address from
/// another, and checks that this stores as `copy_from_slice` does.
fn stores_exactly(froms: usize, put: impl Fn(*mut u8, *const u8, usize), expected: &[u8]) {
    let mut media = Lines([GUARD; 512]);
    let mut reference = [GUARD; 512];

    for len in 0..=LONGEST {
        for to in LINE..2 * LINE {
            for from in 0..froms {
                let expected = &expected[from..from + len];
                reference[to..to + len].copy_from_slice(expected);

                put(media.0[to..].as_mut_ptr(), expected.as_ptr(), len);

                assert_eq!(media.0, reference, "{len} bytes from {from} to {to}");
                media.0[to..to + len].fill(GUARD);
                reference[to..to + len].fill(GUARD);
            }
        }
    }
}

fn copies_exactly<M: Machine>(persist: Persist<M>) {
    let data = data::<512>();

    stores_exactly(
        LINE,
        // SAFETY: `stores_exactly` gives addresses of `len` bytes.
        |dst, src, len| unsafe {
            persist.copy(dst, src, len);
            persist.fence();
        },
        &data.0,
    );
}

fn zeroes_exactly<M: Machine>(persist: Persist<M>) {
    stores_exactly(
        1,
        // SAFETY: `stores_exactly` gives addresses of `len` bytes.
        |dst, _, len| unsafe {
            persist.zero(dst, len);
            persist.fence();
        },
        &[0; 512],
    );
}

#[test]
fn copies_on_real_memory() {
    // How lines are written back has no effect on the bytes: the test after the next has all ways.
    for mode in MODES {
        copies_exactly(native(mode)[0]);
    }
}

#[test]
fn copies_on_real_memory_by_the_generic_machine() {
    for (cache, copy) in MODES {
        copies_exactly(Persist::mapped(Generic, cache, copy));
    }
}

#[test]
fn zeroes_on_real_memory() {
    for (cache, copy) in MODES {
        for persist in native((cache, copy)) {
            zeroes_exactly(persist);
        }
        zeroes_exactly(Persist::mapped(Generic, cache, copy));
    }
}

#[test]
fn copies_with_each_way_to_write_back() {
    let data = data::<512>();

    for persist in MODES.into_iter().flat_map(native) {
        stores_exactly(
            3,
            // SAFETY: `stores_exactly` gives addresses of `len` bytes.
            |dst, src, len| unsafe {
                persist.copy(dst, src, len);
                persist.write_back(dst, len);
                persist.fence();
            },
            &data.0,
        );
    }
}

#[test]
fn others_see_whole_granules_on_real_memory() {
    const GRANULES: usize = 64;
    const COPIES: usize = 20_000;
    let media: Vec<AtomicU64> = (0..GRANULES).map(|_| AtomicU64::new(0)).collect();

    for persist in MODES.into_iter().flat_map(native) {
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    for granule in &media {
                        let value = granule.load(Ordering::Relaxed);
                        let byte = value & 0xff;
                        assert_eq!(value, byte * 0x0101_0101_0101_0101, "torn");
                    }
                }
            });
            // SAFETY: They are there until the scope ends, and accessed as atomics alone.
            let media =
                unsafe { VolatileSlice::new(media.as_ptr().cast_mut().cast(), 8 * GRANULES) };
            // At an odd address, so that no load of a granule is aligned.
            let sources = [1, 2].map(|byte| [byte; 8 * GRANULES + 1]);
            for i in 0..COPIES {
                persist.write_bytes(media, &sources[i % 2][1..]);
                if i % 16 == 0 {
                    persist.write_zeroes(media);
                }
                persist.fence();
            }
            is_over.store(true, Ordering::Relaxed);
            reader.join().unwrap();
        });
    }
}

/// The name of the way by which bytes get into a range of this mode by this policy.
#[cfg(target_arch = "x86_64")]
fn name(cache: Cache, copy: CopyPolicy, clwb: bool, clflushopt: bool) -> &'static str {
    let persist = Persist::for_cache(CpuFeatures { clwb, clflushopt }, cache, copy);

    assert!(persist.is_durable());
    persist.name()
}

#[test]
#[cfg(target_arch = "x86_64")]
fn the_mode_and_the_policy_choose_the_way() {
    // CLWB, CLFLUSHOPT, and the names past the cache and through it.
    const CPUS: [(bool, bool, &str, &str); 4] = [
        (true, true, "movnti+clwb", "mov+clwb"),
        (true, false, "movnti+clwb", "mov+clwb"),
        (false, true, "movnti+clflushopt", "mov+clflushopt"),
        (false, false, "movnti+clflush", "mov+clflush"),
    ];

    for (clwb, clflushopt, past, through) in CPUS {
        for cache in Cache::ALL {
            for copy in CopyPolicy::ALL {
                let expected = match (cache, copy) {
                    (Cache::WriteBack, CopyPolicy::WriteBack) => through,
                    (Cache::WriteBack, _) => past,
                    _ => "movnti",
                };
                assert_eq!(name(cache, copy, clwb, clflushopt), expected);
            }
        }
        let new = Persist::new(CpuFeatures { clwb, clflushopt });
        assert_eq!(new.name(), past);
        assert!(new.is_durable());
    }
}

#[test]
fn an_architecture_without_a_write_back_is_durable_if_no_line_gets_dirty() {
    assert!(!Persist::on(Generic).is_durable());

    for cache in Cache::ALL {
        for copy in CopyPolicy::ALL {
            let persist = Persist::mapped(Generic, cache, copy);

            assert_eq!(persist.name(), "generic");
            assert_eq!(persist.is_durable(), cache != Cache::WriteBack);
        }
    }
}

proptest! {
    #[test]
    fn long_copies_on_real_memory(
        bytes in prop::collection::vec(any::<u8>(), 0..20_000),
        to in 0..LINE,
        from in 0..LINE,
    ) {
        let len = bytes.len().saturating_sub(from);
        let src = &bytes[bytes.len() - len..];
        for mode in MODES {
            let mut media = vec![GUARD; to + len + LINE];
            let persist = native(mode)[0];

            // SAFETY: There is room for `to` bytes and `len` more.
            unsafe { persist.copy(media[to..].as_mut_ptr(), src.as_ptr(), len) };
            persist.fence();

            prop_assert_eq!(&media[to..to + len], src);
            prop_assert!(media[..to].iter().chain(&media[to + len..]).all(|&byte| byte == GUARD));

            // SAFETY: As above.
            unsafe { persist.zero(media[to..].as_mut_ptr(), len) };
            persist.fence();

            prop_assert!(media[to..to + len].iter().all(|&byte| byte == 0));
            prop_assert!(media[..to].iter().chain(&media[to + len..]).all(|&byte| byte == GUARD));
        }
    }
}

/// How many images of a power loss are looked at, where there are too many to look at all.
const IMAGES: usize = 16;

/// What is wrong with a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flaw {
    None,
    /// Lines are not written back, so that the edges of a copy stay in the cache.
    NoWriteBack,
    /// The line after is written back.
    WrongLine,
    /// Of the lines of a copy, which begins in the second line, no other is written back.
    FirstLineOnly,
    /// The fence does not wait.
    NoFence,
    /// What should go past the cache goes through it.
    NoStream,
}

/// A CPU with a flaw.
#[derive(Clone, Copy)]
struct Flawed<'a> {
    memory: &'a Memory,
    cpu: Cpu<'a>,
    flaw: Flaw,
}

/// A [`Persist`] with `flaw`, in `memory` with this mode and policy.
fn flawed(memory: &Memory, (cache, copy): (Cache, CopyPolicy), flaw: Flaw) -> Persist<Flawed<'_>> {
    let machine = Flawed {
        memory,
        cpu: memory.cpu(0).mapped(cache),
        flaw,
    };

    Persist::mapped(machine, cache, copy)
}

impl Machine for Flawed<'_> {
    const DURABLE: bool = true;

    fn name(self, _way: Way) -> &'static str {
        "flawed"
    }

    unsafe fn store(self, dst: *mut u8, src: Source, len: usize) {
        // SAFETY: By the safety contract of this function.
        unsafe { self.cpu.store(dst, src, len) }
    }

    unsafe fn store_granule(self, dst: *mut u8, value: u64) {
        // SAFETY: By the safety contract of this function.
        unsafe { self.cpu.store_granule(dst, value) }
    }

    unsafe fn store_granules(self, dst: *mut u8, src: Source, granules: usize) {
        // SAFETY: By the safety contract of this function.
        unsafe { self.cpu.store_granules(dst, src, granules) }
    }

    unsafe fn stream_half(self, dst: *mut u8, src: Source) {
        // SAFETY: By the safety contract of this function.
        unsafe {
            match self.flaw {
                Flaw::NoStream => self.cpu.store(dst, src, 4),
                _ => self.cpu.stream_half(dst, src),
            }
        }
    }

    unsafe fn stream(self, dst: *mut u8, src: Source, granules: usize) {
        // SAFETY: By the safety contract of this function.
        unsafe {
            match self.flaw {
                Flaw::NoStream => self.cpu.store(dst, src, granules * GRANULE),
                _ => self.cpu.stream(dst, src, granules),
            }
        }
    }

    unsafe fn write_back(self, addr: *const u8) {
        // SAFETY: By the safety contract of this function; there is a line after each that is
        // written here.
        unsafe {
            match self.flaw {
                Flaw::NoWriteBack => {}
                Flaw::WrongLine => self.cpu.write_back(addr.wrapping_add(LINE)),
                Flaw::FirstLineOnly if addr >= self.memory.addr(2 * LINE).cast_const() => {}
                _ => self.cpu.write_back(addr),
            }
        }
    }

    fn fence(self) {
        if self.flaw != Flaw::NoFence {
            self.cpu.fence();
        }
    }
}

/// Copies and zeroes all lengths up to 150 at all alignments, each in a new memory with `flaw` and
/// with this mode and policy. Calls `check` with the memory, the offset, the length, and what fences.
fn each_put(
    mode: (Cache, CopyPolicy),
    flaw: Flaw,
    mut check: impl FnMut(&Memory, usize, usize, Persist<Flawed<'_>>),
) {
    let data = data::<150>();

    for len in 0..=150 {
        for to in LINE..2 * LINE {
            let memory = Memory::boot(&[GUARD; 5 * LINE]);
            let persist = flawed(&memory, mode, flaw);
            // SAFETY: Both have `len` bytes.
            unsafe { persist.copy(memory.addr(to), data.0.as_ptr(), len) };
            assert_eq!(memory.read(to, len), data.0[..len]);
            check(&memory, to, len, persist);

            let memory = Memory::boot(&[GUARD; 5 * LINE]);
            let persist = flawed(&memory, mode, flaw);
            // SAFETY: It has `len` bytes.
            unsafe { persist.zero(memory.addr(to), len) };
            assert_eq!(memory.read(to, len), [0; 150][..len]);
            check(&memory, to, len, persist);
        }
    }
}

/// Whether a power loss now loses something.
fn loses(memory: &Memory) -> bool {
    let seen = memory.read(0, memory.len());

    memory.crash_images(IMAGES, 1).any(|image| image != seen)
}

/// After a fence: the offsets and lengths of which a power loss loses something.
fn lost(mode: (Cache, CopyPolicy), flaw: Flaw) -> BTreeSet<(usize, usize)> {
    let mut lost = BTreeSet::new();

    each_put(mode, flaw, |memory, to, len, persist| {
        persist.fence();
        if loses(memory) {
            lost.insert((to % LINE, len));
        }
    });
    lost
}

/// All offsets and lengths that [`each_put`] stores something at.
fn all() -> BTreeSet<(usize, usize)> {
    (1..=150)
        .flat_map(|len| (0..LINE).map(move |to| (to, len)))
        .collect()
}

#[test]
fn after_a_fence_all_is_durable() {
    for cache in Cache::ALL {
        for copy in CopyPolicy::ALL {
            // In a mode other than write-back, the model panics if a line is written back.
            assert_eq!(lost((cache, copy), Flaw::None), [].into());
        }
    }
}

#[test]
fn before_a_fence_nothing_is_promised() {
    for mode in MODES {
        each_put(mode, Flaw::None, |memory, _, len, _| {
            // The worst image has not a byte of it, and the best has all.
            assert_eq!(memory.durable(), [GUARD; 5 * LINE]);
            assert_eq!(loses(memory), len != 0);
            let seen = memory.read(0, memory.len());
            assert!(memory.crash_images(IMAGES, 1).any(|image| image == seen));
        });
    }
}

#[test]
fn whole_granules_are_there_or_not() {
    for mode in MODES {
        each_put(mode, Flaw::None, |memory, to, len, _| {
            let seen = memory.read(0, memory.len());

            // None is stored twice.
            let granules = (to + len).div_ceil(GRANULE) - to / GRANULE;
            assert_eq!(memory.in_flight(), if len == 0 { 0 } else { granules });
            for image in memory.crash_images(IMAGES, 2) {
                let whole = to.next_multiple_of(GRANULE)..(to + len) / GRANULE * GRANULE;
                for at in whole.step_by(GRANULE) {
                    let granule = at..at + GRANULE;
                    assert!(
                        image[granule.clone()] == seen[granule.clone()]
                            || image[granule] == [GUARD; GRANULE]
                    );
                }
            }
        });
    }
}

#[test]
fn an_edge_that_is_not_written_back_is_caught() {
    // An edge is what is neither a whole granule nor an aligned half of one.
    let is_edge = |at: usize, len| len != 0 && !(len == 4 && at % 4 == 0);
    let has_edge = |&(to, len): &(usize, usize)| {
        let head = (to.next_multiple_of(GRANULE) - to).min(len);
        is_edge(to, head) || is_edge(0, (len - head) % GRANULE)
    };

    for copy in [CopyPolicy::Auto, CopyPolicy::NonTemporal] {
        assert_eq!(
            lost((Cache::WriteBack, copy), Flaw::NoWriteBack),
            all().into_iter().filter(has_edge).collect()
        );
    }
}

#[test]
fn a_line_that_is_not_written_back_is_caught_if_copies_go_through_the_cache() {
    let mode = (Cache::WriteBack, CopyPolicy::WriteBack);

    for flaw in [Flaw::NoWriteBack, Flaw::WrongLine, Flaw::NoFence] {
        assert_eq!(lost(mode, flaw), all(), "{flaw:?}");
    }
    // One line of several is enough.
    let last_line = |&(to, len): &(usize, usize)| (to + len - 1) / LINE > to / LINE;
    assert_eq!(
        lost(mode, Flaw::FirstLineOnly),
        all().into_iter().filter(last_line).collect()
    );
    // There is nothing that goes past the cache.
    assert_eq!(lost(mode, Flaw::NoStream), [].into());
}

#[test]
fn where_no_line_gets_dirty_a_fence_is_all_that_is_needed() {
    for cache in Cache::ALL
        .into_iter()
        .filter(|&cache| cache != Cache::WriteBack)
    {
        // The policy is for write-back alone.
        let mode = (cache, CopyPolicy::WriteBack);

        for flaw in [Flaw::NoWriteBack, Flaw::NoStream] {
            assert_eq!(lost(mode, flaw), [].into(), "{flaw:?}");
        }
        assert_eq!(lost(mode, Flaw::NoFence), all());
    }
}

#[test]
fn other_flaws_are_caught() {
    let mode = (Cache::WriteBack, CopyPolicy::NonTemporal);
    assert!(lost(mode, Flaw::WrongLine).contains(&(1, 20)));

    for flaw in [Flaw::NoFence, Flaw::NoStream] {
        let lost = lost(mode, flaw);

        assert!(
            lost.contains(&(0, 8)) && lost.contains(&(0, 128)),
            "{flaw:?}"
        );
    }
}

#[test]
fn a_copy_in_several_steps_is_durable_after_a_fence() {
    // Steps are of 1 KiB: a copy has up to four of them, of which the first and the last are short.
    const SIZE: usize = 4096;
    let data = data::<SIZE>();

    for mode in MODES {
        for to in [0, 1, 7, 8, 60, 64, 1000, 1023, 1024] {
            for len in [1, 24, 960, 1016, 1023, 1024, 1025, 2048, 2100, 3000] {
                let memory = Memory::boot(&[GUARD; SIZE + LINE]);
                let persist = flawed(&memory, mode, Flaw::None);

                // SAFETY: Both have `len` bytes.
                unsafe { persist.copy(memory.addr(to), data.0.as_ptr(), len) };
                persist.fence();

                let mut expected = vec![GUARD; SIZE + LINE];
                expected[to..to + len].copy_from_slice(&data.0[..len]);
                assert_eq!(memory.durable(), expected, "{len} bytes to {to}");
                assert_eq!(memory.in_flight(), 0);
            }
        }
    }
}

#[test]
#[should_panic(expected = "is written back, where no line gets dirty")]
fn the_model_tells_of_a_write_back_that_is_for_nothing() {
    let memory = Memory::new(LINE);

    // SAFETY: Both have a byte.
    unsafe { Persist::on(memory.cpu(0).mapped(Cache::Uncached)).copy(memory.addr(0), &7, 1) };
}

#[test]
fn write_back_makes_the_stores_of_others_durable() {
    for len in 1..=150 {
        for to in LINE..2 * LINE {
            for flaw in [Flaw::None, Flaw::NoWriteBack, Flaw::NoFence] {
                let memory = Memory::boot(&[GUARD; 5 * LINE]);
                let mode = (Cache::WriteBack, CopyPolicy::Auto);
                let persist = flawed(&memory, mode, flaw);

                memory.write(to, &data::<150>().0[..len]);
                // SAFETY: The memory has these bytes.
                unsafe { persist.write_back(memory.addr(to), len) };
                persist.fence();

                assert_eq!(loses(&memory), flaw != Flaw::None, "{flaw:?}");
            }
        }
    }
}

#[test]
fn a_value_is_durable_after_a_fence() {
    let flaws = [
        Flaw::None,
        Flaw::NoWriteBack,
        Flaw::WrongLine,
        Flaw::NoFence,
    ];

    for at in (LINE..3 * LINE).step_by(GRANULE) {
        for (mode, flaw) in MODES
            .into_iter()
            .flat_map(|mode| flaws.map(|flaw| (mode, flaw)))
        {
            for is_cached in [false, true] {
                let memory = Memory::boot(&[GUARD; 5 * LINE]);
                let persist = flawed(&memory, mode, flaw);
                let line = memory.slice().range(at as u64 / 64 * 64, 64).unwrap();
                let is_lost = match mode.0 {
                    Cache::WriteBack => flaw != Flaw::None,
                    _ => flaw == Flaw::NoFence,
                };

                if is_cached {
                    assert!(persist.store_u64_cached(line, at as u64 % 64, 7));
                    persist.flush(line);
                } else {
                    assert!(persist.store_u64(line, at as u64 % 64, 7));
                }
                persist.fence();

                assert_eq!(memory.slice().load_u64(at as u64), Some(7));
                assert_eq!(memory.in_flight(), usize::from(is_lost));
                assert_eq!(loses(&memory), is_lost, "{mode:?} {flaw:?}");
            }
        }
    }
}
