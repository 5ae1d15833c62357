// SPDX-License-Identifier: GPL-2.0-only

//! The durability core: writes bytes so that they survive a loss of power.
//!
//! A [`Machine`] has the primitive operations of one architecture. [`Persist`] makes of them what a
//! driver needs, by one algorithm, which is the same in the kernel, in host tests on real memory,
//! and in the model of a cache that can lose power.
//!
//! | step | what it does | durable |
//! |---|---|---|
//! | [`copy`](Persist::copy), [`zero`](Persist::zero) | stores bytes past the cache, and those that cannot go past it through it, and writes their lines back | after a fence |
//! | [`store_u64`](Persist::store_u64) | stores a value at once through the cache, and writes its line back | after a fence |
//! | [`write_back`](Persist::write_back), [`flush`](Persist::flush) | writes lines back that others stored to | after a fence |
//! | [`fence`](Persist::fence) | waits for all of these of this CPU | yes |

#![allow(
    unsafe_code,
    reason = "stores to memory that no Rust object owns are what it is for"
)]

pub mod generic;
#[cfg(not(CONFIG_RUST))]
pub mod model;
mod slice;
#[cfg(target_arch = "x86_64")]
pub mod x86_64;

pub use self::slice::VolatileSlice;

/// The machine of the architecture that this is built for.
#[cfg(not(target_arch = "x86_64"))]
pub type Native = generic::Generic;
/// The machine of the architecture that this is built for.
#[cfg(target_arch = "x86_64")]
pub type Native = x86_64::X86_64;

/// The bytes of a cache line, which is what is written back at a time.
///
/// A machine with longer lines writes each back more than once, which is correct.
pub const LINE: usize = 64;

/// The bytes of a granule: what is aligned to them and stored at once is durable at once or not at
/// all.
pub const GRANULE: usize = 8;

/// How the CPUs cache a range that is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// Write-back: what is stored is in the cache until its line is written back.
    WriteBack,
    /// Write-through: what is stored goes to the memory, and what is read is cached.
    WriteThrough,
    /// Write-combining: not cached; what is stored is collected, and then goes to the memory.
    WriteCombining,
    /// Not cached, and each store goes to the memory as it is.
    Uncached,
}

impl Cache {
    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::WriteBack,
        Self::WriteThrough,
        Self::WriteCombining,
        Self::Uncached,
    ];

    /// Its short name, as in `pmem_cache=`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::WriteBack => "wb",
            Self::WriteThrough => "wt",
            Self::WriteCombining => "wc",
            Self::Uncached => "uc",
        }
    }
}

impl Default for Cache {
    /// What is fastest on this architecture and can be made durable there.
    fn default() -> Self {
        if Native::DURABLE {
            Self::WriteBack
        } else {
            Self::WriteThrough
        }
    }
}

/// How bytes get into a range that is cached write-back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CopyPolicy {
    /// What is best for the length, on this CPU.
    #[default]
    Auto,
    /// Past the cache.
    NonTemporal,
    /// Through the cache, and each line is written back.
    WriteBack,
}

impl CopyPolicy {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Auto, Self::NonTemporal, Self::WriteBack];

    /// Its short name, as in `pmem_copy=`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::NonTemporal => "nt",
            Self::WriteBack => "wb",
        }
    }
}

/// What bytes are stored.
#[derive(Clone, Copy, Debug)]
pub enum Source {
    /// Those in memory from this address.
    Memory(*const u8),
    /// Zeros.
    Zeros,
}

impl Source {
    /// What is left after `bytes` of it.
    #[inline(always)]
    pub const fn skip(self, bytes: usize) -> Self {
        match self {
            Self::Memory(addr) => Self::Memory(addr.wrapping_add(bytes)),
            Self::Zeros => Self::Zeros,
        }
    }
}

/// The primitive operations of a machine.
///
/// In each, `dst` is valid for writes of all the bytes that are stored, and memory that is a source
/// is valid for reads of as many. Others may read and write both at the same time, as a user may
/// with pages under I/O, and they may overlap: then it is not said which bytes are stored, and
/// nothing else is lost. So implementations touch this memory by assembly or volatile accesses.
pub trait Machine: Copy {
    /// Whether what is stored and written back here is durable after a [`fence`](Self::fence).
    const DURABLE: bool;

    /// The instructions in use, for a log.
    fn name(self) -> &'static str;

    /// Stores `len` bytes, fewer than [`GRANULE`], through the cache: they are not durable until
    /// their line is written back.
    ///
    /// # Safety
    ///
    /// `dst` and `src` must be valid, as said at the [trait](Self).
    unsafe fn store(self, dst: *mut u8, src: Source, len: usize);

    /// Stores one granule, whose bytes are those of `value`, through the cache and by one access:
    /// another CPU sees all of it or nothing, and only after what this one stored through the cache
    /// before. It is not durable until its line is written back.
    ///
    /// # Safety
    ///
    /// `dst` must be valid, as said at the [trait](Self), and a multiple of [`GRANULE`].
    unsafe fn store_granule(self, dst: *mut u8, value: u64);

    /// Stores 4 bytes past the cache.
    ///
    /// # Safety
    ///
    /// `dst` and `src` must be valid, as said at the [trait](Self), and `dst` must be a multiple of
    /// 4.
    unsafe fn stream_half(self, dst: *mut u8, src: Source);

    /// Stores `granules` times [`GRANULE`] bytes past the cache.
    ///
    /// # Safety
    ///
    /// `dst` and `src` must be valid, as said at the [trait](Self), and `dst` must be a multiple of
    /// [`GRANULE`].
    unsafe fn stream(self, dst: *mut u8, src: Source, granules: usize);

    /// Starts to write back the line that has the byte at `addr`.
    ///
    /// # Safety
    ///
    /// `addr` must be in mapped memory.
    unsafe fn write_back(self, addr: *const u8);

    /// Waits until all that this CPU stored past the cache or wrote back before is durable.
    fn fence(self);
}

/// What a CPU can do beyond its architecture's first model.
///
/// The kernel fills it in from `boot_cpu_has()`, which obeys `clearcpuid=`; a program or a test by
/// [`detect`](Self::detect).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuFeatures {
    /// x86: CLWB, which writes a line back and may keep it in the cache (`X86_FEATURE_CLWB`).
    pub clwb: bool,
    /// x86: CLFLUSHOPT, which writes a line back and evicts it (`X86_FEATURE_CLFLUSHOPT`).
    pub clflushopt: bool,
}

impl CpuFeatures {
    /// Asks the CPU that this runs on.
    pub fn detect() -> Self {
        Native::detect()
    }
}

/// Stores bytes in persistent memory and makes them durable.
///
/// # Examples
///
/// ```
/// use pmem_core::persist::{CpuFeatures, Persist};
///
/// let persist = Persist::new(CpuFeatures::detect());
/// let mut media = [0; 100];
///
/// // SAFETY: Both are valid for 100 bytes.
/// unsafe { persist.copy(media.as_mut_ptr(), [7; 100].as_ptr(), 100) };
/// persist.fence();
///
/// assert_eq!(media, [7; 100]);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Persist<M = Native> {
    machine: M,
}

impl Persist {
    /// Chooses how to do it on the CPUs of this machine, all of which have these features.
    pub const fn new(cpu: CpuFeatures) -> Self {
        Self {
            machine: Native::new(cpu),
        }
    }
}

impl<M: Machine> Persist<M> {
    /// Does it by the operations of `machine`.
    pub const fn on(machine: M) -> Self {
        Self { machine }
    }

    /// Whether what is stored is durable after a fence, if the memory is persistent. If not, the
    /// architecture has no known way to write its caches back.
    pub const fn is_durable(&self) -> bool {
        M::DURABLE
    }

    /// The instructions in use, for a log: `"movnti+clwb"`.
    pub fn name(&self) -> &'static str {
        self.machine.name()
    }

    /// Copies `len` bytes from `src` to `dst`, durable after a [`fence`](Self::fence).
    ///
    /// Each aligned granule of 8 bytes that is wholly stored is stored at once, if the copy
    /// [is durable](Self::is_durable) at all.
    ///
    /// # Safety
    ///
    /// - `dst` must be valid for writes of `len` bytes.
    /// - `src` must be valid for reads of `len` bytes.
    ///
    /// Others may access both at the same time, if not by Rust references, and they may overlap: if
    /// what is read changes meanwhile, it is not said which bytes are stored.
    #[inline]
    pub unsafe fn copy(&self, dst: *mut u8, src: *const u8, len: usize) {
        // SAFETY: By the safety contract of this function.
        unsafe { self.put(dst, Source::Memory(src), len) }
    }

    /// Stores `len` bytes of zeros from `dst` on, durable after a [`fence`](Self::fence).
    ///
    /// # Safety
    ///
    /// `dst` must be valid for writes of `len` bytes. Others may access them at the same time, if
    /// not by Rust references.
    #[inline]
    pub unsafe fn zero(&self, dst: *mut u8, len: usize) {
        // SAFETY: By the safety contract of this function; zeros are always valid.
        unsafe { self.put(dst, Source::Zeros, len) }
    }

    /// Writes back the lines of the `len` bytes from `addr`, which are then durable after a
    /// [`fence`](Self::fence).
    ///
    /// # Safety
    ///
    /// `addr` must be valid for reads of `len` bytes.
    #[inline]
    pub unsafe fn write_back(&self, addr: *const u8, len: usize) {
        if len == 0 {
            return;
        }

        // From the start of the first line, so that each step meets one more. The sum does not
        // wrap, as memory does not.
        let ahead = addr.addr() % LINE;
        let first = addr.wrapping_sub(ahead);
        for line in 0..ahead.wrapping_add(len).div_ceil(LINE) {
            // SAFETY: The line has some of the bytes in it, which are mapped.
            unsafe {
                self.machine
                    .write_back(first.wrapping_add(line.wrapping_mul(LINE)))
            };
        }
    }

    /// Waits until all that this CPU copied, zeroed or wrote back before is durable.
    #[inline]
    pub fn fence(&self) {
        self.machine.fence();
    }

    /// Stores `len` bytes at `dst`.
    ///
    /// # Safety
    ///
    /// `dst` and `src` must be valid for `len` bytes, as said at [`Machine`].
    #[inline(always)]
    unsafe fn put(&self, dst: *mut u8, src: Source, len: usize) {
        if (dst.addr() | len) % GRANULE == 0 {
            // SAFETY: By the safety contract of this function; `dst` was just found aligned.
            unsafe { self.machine.stream(dst, src, len / GRANULE) };
        } else {
            // SAFETY: By the safety contract of this function.
            unsafe { self.put_ragged(dst, src, len) };
        }
    }

    /// Stores `len` bytes at `dst`, where the first or the last granule is not whole.
    ///
    /// # Safety
    ///
    /// As for [`put`](Self::put).
    #[inline(never)]
    unsafe fn put_ragged(&self, dst: *mut u8, src: Source, len: usize) {
        let head = (dst.addr().wrapping_neg() % GRANULE).min(len);
        let granules = len.wrapping_sub(head) / GRANULE;
        let tail = len.wrapping_sub(head) % GRANULE;
        let body = granules.wrapping_mul(GRANULE);

        // SAFETY: The three add up to `len` bytes. The head ends at a multiple of `GRANULE`, or it
        // is all there is, and the body ends at another.
        unsafe {
            self.put_fragment(dst, src, head);
            if granules != 0 {
                self.machine
                    .stream(dst.wrapping_add(head), src.skip(head), granules);
            }
            let done = head.wrapping_add(body);
            self.put_fragment(dst.wrapping_add(done), src.skip(done), tail);
        }
    }

    /// Stores `len` bytes at `dst`, which are a part of one granule.
    ///
    /// # Safety
    ///
    /// As for [`put`](Self::put), and no multiple of [`GRANULE`] may be after `dst` and before
    /// `dst + len`.
    #[inline]
    unsafe fn put_fragment(&self, dst: *mut u8, src: Source, len: usize) {
        if len == 4 && dst.addr() % 4 == 0 {
            // SAFETY: By the safety contract of this function; `dst` was just found aligned.
            unsafe { self.machine.stream_half(dst, src) };
        } else if len != 0 {
            // SAFETY: By the safety contract of this function. The bytes are mapped, and one line
            // has all of them, as one granule has.
            unsafe {
                self.machine.store(dst, src, len);
                self.machine.write_back(dst);
            }
        }
    }
}

#[cfg_attr(CONFIG_RUST, kernel::macros::kunit_tests(pmem_persist))]
#[cfg(any(test, CONFIG_KUNIT = "y"))]
mod tests {
    use super::*;

    /// Room for copies of up to three lines at each alignment, in a line of its own.
    #[repr(align(64))]
    struct Media([u8; 320]);

    /// What is beside the bytes that are written.
    const GUARD: u8 = 0xa5;

    /// The bytes that are copied; each differs from its neighbours, and none is [`GUARD`] or zero.
    fn data() -> [u8; 320] {
        core::array::from_fn(|i| (i % 127 + 1) as u8)
    }

    /// Calls `put` on `len` bytes at `offset` of the media, then checks that these are `expected`
    /// and that all others are untouched.
    fn check(offset: usize, len: usize, expected: &[u8], put: impl Fn(*mut u8)) -> bool {
        let mut media = Media([GUARD; 320]);

        put(media.0.as_mut_ptr().wrapping_add(offset));

        media.0.iter().enumerate().all(|(i, &byte)| {
            let expected = match i.checked_sub(offset) {
                Some(i) if i < len => expected.get(i).copied(),
                _ => Some(GUARD),
            };
            Some(byte) == expected
        })
    }

    /// Each way to write a line back that the CPU has.
    fn native() -> impl Iterator<Item = Persist> {
        let all = CpuFeatures::detect();
        let all = [
            all,
            CpuFeatures { clwb: false, ..all },
            CpuFeatures::default(),
        ];
        all.into_iter().map(Persist::new)
    }

    const LENGTHS: [usize; 16] = [0, 1, 3, 4, 7, 8, 9, 12, 31, 63, 64, 65, 72, 127, 128, 192];

    #[test]
    fn copies_the_bytes_and_no_other() {
        let data = data();

        for persist in native() {
            for len in LENGTHS {
                for to in 0..64 {
                    for from in [0, 1, 4, 7, 8] {
                        let src = data.as_ptr().wrapping_add(from);
                        let expected = data.get(from..from + len).unwrap_or_default();
                        assert!(check(to, len, expected, |dst| {
                            // SAFETY: `dst` has 320 - 63 bytes, `src` has 320 - 8.
                            unsafe { persist.copy(dst, src, len) };
                            persist.fence();
                        }));
                    }
                }
            }
        }
    }

    #[test]
    fn zeroes_the_bytes_and_no_other() {
        for persist in native() {
            for len in LENGTHS {
                for to in 0..64 {
                    assert!(check(to, len, &[0; 320], |dst| {
                        // SAFETY: `dst` has 320 - 63 bytes.
                        unsafe { persist.zero(dst, len) };
                        persist.fence();
                    }));
                }
            }
        }
    }

    #[test]
    fn writes_back_without_a_change() {
        let data = data();

        for persist in native() {
            for len in LENGTHS {
                for at in 0..64 {
                    assert!(check(0, 320, &data, |dst| {
                        // SAFETY: `dst` has 320 bytes, and there are 320 - 63 from `at`.
                        unsafe {
                            persist.copy(dst, data.as_ptr(), 320);
                            persist.write_back(dst.wrapping_add(at), len);
                        }
                        persist.fence();
                    }));
                }
            }
        }
    }
}
