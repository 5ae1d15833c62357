// SPDX-License-Identifier: GPL-2.0-only

//! The durability core: on real memory it stores the bytes it was given and no other, by each way
//! that this CPU has; and in a memory that can lose power, what is fenced is there after a loss,
//! and nothing is said of what is not.

use pmem_core::persist::{
    generic::Generic,
    model::Memory,
    CpuFeatures,
    Machine,
    Persist,
    Source,
    GRANULE,
    LINE, //
};
use proptest::prelude::*;

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

/// Each way to write a line back that this CPU has.
fn native() -> Vec<Persist> {
    let all = CpuFeatures::detect();
    let no_clwb = CpuFeatures { clwb: false, ..all };
    let mut ways = vec![all, no_clwb, CpuFeatures::default()];

    ways.dedup();
    ways.into_iter().map(Persist::new).collect()
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
    // How lines are written back matters to the edges alone, which all ways have in common.
    copies_exactly(native()[0]);
}

#[test]
fn copies_on_real_memory_by_the_generic_machine() {
    copies_exactly(Persist::on(Generic));
}

#[test]
fn zeroes_on_real_memory() {
    for persist in native() {
        zeroes_exactly(persist);
    }
    zeroes_exactly(Persist::on(Generic));
}

#[test]
fn copies_with_each_way_to_write_back() {
    let data = data::<512>();

    for persist in native() {
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
fn says_what_it_does() {
    let persist = |clwb, clflushopt| Persist::new(CpuFeatures { clwb, clflushopt });

    #[cfg(target_arch = "x86_64")]
    {
        assert_eq!(persist(true, true).name(), "movnti+clwb");
        assert_eq!(persist(true, false).name(), "movnti+clwb");
        assert_eq!(persist(false, true).name(), "movnti+clflushopt");
        assert_eq!(persist(false, false).name(), "movnti+clflush");
        assert!(persist(false, false).is_durable());
    }
    assert_eq!(Persist::on(Generic).name(), "generic");
    assert!(!Persist::on(Generic).is_durable());
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
        let mut media = vec![GUARD; to + len + LINE];
        let persist = native()[0];

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
    /// The fence does not wait.
    NoFence,
    /// What should go past the cache goes through it.
    NoStream,
}

/// A memory with a flaw.
#[derive(Clone, Copy)]
struct Flawed<'a>(&'a Memory, Flaw);

impl Machine for Flawed<'_> {
    const DURABLE: bool = true;

    fn name(self) -> &'static str {
        "flawed"
    }

    unsafe fn store(self, dst: *mut u8, src: Source, len: usize) {
        // SAFETY: By the safety contract of this function.
        unsafe { self.0.store(dst, src, len) }
    }

    unsafe fn store_granule(self, dst: *mut u8, value: u64) {
        // SAFETY: By the safety contract of this function.
        unsafe { self.0.store_granule(dst, value) }
    }

    unsafe fn stream_half(self, dst: *mut u8, src: Source) {
        // SAFETY: By the safety contract of this function.
        unsafe {
            match self.1 {
                Flaw::NoStream => self.0.store(dst, src, 4),
                _ => self.0.stream_half(dst, src),
            }
        }
    }

    unsafe fn stream(self, dst: *mut u8, src: Source, granules: usize) {
        // SAFETY: By the safety contract of this function.
        unsafe {
            match self.1 {
                Flaw::NoStream => self.0.store(dst, src, granules * GRANULE),
                _ => self.0.stream(dst, src, granules),
            }
        }
    }

    unsafe fn write_back(self, addr: *const u8) {
        // SAFETY: By the safety contract of this function; there is a line after each that is
        // written here.
        unsafe {
            match self.1 {
                Flaw::NoWriteBack => {}
                Flaw::WrongLine => self.0.write_back(addr.wrapping_add(LINE)),
                _ => self.0.write_back(addr),
            }
        }
    }

    fn fence(self) {
        if self.1 != Flaw::NoFence {
            self.0.fence();
        }
    }
}

/// Copies and zeroes all lengths up to 150 at all alignments, each in a new memory with `flaw`.
/// Calls `check` with the memory, the offset, the length, and what fences.
fn each_put(flaw: Flaw, mut check: impl FnMut(&Memory, usize, usize, Persist<Flawed<'_>>)) {
    let data = data::<150>();

    for len in 0..=150 {
        for to in LINE..2 * LINE {
            let memory = Memory::boot(&[GUARD; 5 * LINE]);
            let persist = Persist::on(Flawed(&memory, flaw));
            // SAFETY: Both have `len` bytes.
            unsafe { persist.copy(memory.addr(to), data.0.as_ptr(), len) };
            assert_eq!(memory.read(to, len), data.0[..len]);
            check(&memory, to, len, persist);

            let memory = Memory::boot(&[GUARD; 5 * LINE]);
            let persist = Persist::on(Flawed(&memory, flaw));
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
fn lost(flaw: Flaw) -> Vec<(usize, usize)> {
    let mut lost = Vec::new();

    each_put(flaw, |memory, to, len, persist| {
        persist.fence();
        if loses(memory) {
            lost.push((to % LINE, len));
        }
    });
    lost
}

#[test]
fn after_a_fence_all_is_durable() {
    assert_eq!(lost(Flaw::None), []);
}

#[test]
fn before_a_fence_nothing_is_promised() {
    each_put(Flaw::None, |memory, _, len, _| {
        // The worst image has not a byte of it, and the best has all.
        assert_eq!(memory.durable(), [GUARD; 5 * LINE]);
        assert_eq!(loses(memory), len != 0);
        let seen = memory.read(0, memory.len());
        assert!(memory.crash_images(IMAGES, 1).any(|image| image == seen));
    });
}

#[test]
fn whole_granules_are_there_or_not() {
    each_put(Flaw::None, |memory, to, len, _| {
        let seen = memory.read(0, memory.len());

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

#[test]
fn an_edge_that_is_not_written_back_is_caught() {
    // An edge is what is neither a whole granule nor an aligned half of one.
    let is_edge = |at: usize, len| len != 0 && !(len == 4 && at % 4 == 0);
    let has_edge = |to: usize, len: usize| {
        let head = (to.next_multiple_of(GRANULE) - to).min(len);
        is_edge(to, head) || is_edge(0, (len - head) % GRANULE)
    };

    let lost = lost(Flaw::NoWriteBack);
    for len in 0..=150 {
        for to in 0..LINE {
            assert_eq!(
                lost.contains(&(to, len)),
                has_edge(to, len),
                "{len} bytes to {to}"
            );
        }
    }
}

#[test]
fn other_flaws_are_caught() {
    assert!(lost(Flaw::WrongLine).contains(&(1, 20)));

    for flaw in [Flaw::NoFence, Flaw::NoStream] {
        let lost = lost(flaw);

        assert!(
            lost.contains(&(0, 8)) && lost.contains(&(0, 128)),
            "{flaw:?}"
        );
    }
}

#[test]
fn write_back_makes_the_stores_of_others_durable() {
    for len in 1..=150 {
        for to in LINE..2 * LINE {
            for flaw in [Flaw::None, Flaw::NoWriteBack, Flaw::NoFence] {
                let memory = Memory::boot(&[GUARD; 5 * LINE]);
                let persist = Persist::on(Flawed(&memory, flaw));

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
    for at in (LINE..3 * LINE).step_by(GRANULE) {
        for flaw in [
            Flaw::None,
            Flaw::NoWriteBack,
            Flaw::WrongLine,
            Flaw::NoFence,
        ] {
            for is_cached in [false, true] {
                let memory = Memory::boot(&[GUARD; 5 * LINE]);
                let persist = Persist::on(Flawed(&memory, flaw));
                let line = memory.slice().range(at as u64 / 64 * 64, 64).unwrap();

                if is_cached {
                    assert!(persist.store_u64_cached(line, at as u64 % 64, 7));
                    persist.flush(line);
                } else {
                    assert!(persist.store_u64(line, at as u64 % 64, 7));
                }
                persist.fence();

                assert_eq!(memory.slice().load_u64(at as u64), Some(7));
                assert_eq!(memory.in_flight(), usize::from(flaw != Flaw::None));
                assert_eq!(loses(&memory), flaw != Flaw::None, "{flaw:?}");
            }
        }
    }
}
