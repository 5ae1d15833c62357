// SPDX-License-Identifier: GPL-2.0-only

//! The durability core: writes bytes so that they survive a loss of power.
//!
//! A [`Machine`] has the primitive operations of one architecture. [`Persist`] makes of them what a
//! driver needs, by one algorithm, which is the same in the kernel, in host tests on real memory,
//! and in the model of a cache that can lose power.
//!
//! | step | what it does | durable |
//! |---|---|---|
//! | [`copy`](Persist::copy), [`zero`](Persist::zero) | stores bytes, by the [policy](CopyPolicy): past the cache, and those that cannot go past it through it; or all through it. What goes through it is written back | after a fence |
//! | [`store_u64`](Persist::store_u64) | stores a value at once through the cache, and writes its line back | after a fence |
//! | [`write_back`](Persist::write_back), [`flush`](Persist::flush) | writes lines back that others stored to | after a fence |
//! | [`fence`](Persist::fence) | waits for all of these of this CPU | yes |
//!
//! That is for a range that is cached write-back. In a range of another [mode](Cache), no store stays
//! in a cache, so nothing is written back there.
//!
//! Memory behind a bus has [`Words`](words::Words) instead, which accesses it by whole granules alone, and waits
//! until what it wrote has got there.

#![allow(
    unsafe_code,
    reason = "stores to memory that no Rust object owns are what it is for"
)]

pub mod generic;
#[cfg(not(CONFIG_RUST))]
pub mod model;
mod slice;
pub mod words;
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

/// The bytes that are stored through the cache at a time, before their lines are written back: a
/// power of two of lines.
///
/// With shorter steps, copies of 1 KiB were seen to be slower, and with longer ones those of 4 KiB.
const STEP: usize = 16 * LINE;

/// How the CPUs cache a range that is mapped.
///
/// What makes a store durable differs:
///
/// | mode | where a store may be | what is needed |
/// |---|---|---|
/// | write-back | in a dirty line | a store past the cache, or a write-back of the line; and a fence |
/// | write-through, write-combining, uncached | in a buffer of its CPU, on its way to the memory | a fence |
///
/// A write-back of a line would be right in all, and in the last three it would be for nothing: no
/// line is dirty there.
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
///
/// In front of DRAM, [`NonTemporal`](Self::NonTemporal) was measured to be the faster one at each
/// size from 64 B to 64 KiB: by a factor of 1.5 to 3.3 where the lines were in no cache, and of 1.1 to
/// 3.5 where they were. A store through the cache has to read a line that is not there, and to write
/// it back takes longer than to fill a write-combining buffer. CLFLUSHOPT in place of CLWB gave about
/// the same factors in the first case, and larger ones in the second. `cargo bench --bench persist`
/// measures them. So [`Auto`](Self::Auto) is `NonTemporal`, at each size and on each CPU.
///
/// [`WriteBack`](Self::WriteBack) is there for media that are unlike DRAM. Linux' dm-writecache, for
/// one, copies 768 bytes and more through the cache (`memcpy_flushcache_optimized()` in
/// `drivers/md/dm-writecache.c`), since that was measured to be faster there, by up to 1.6. It also
/// leaves what was written in the cache, where the CPU has CLWB, for those who read it soon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CopyPolicy {
    /// What is fastest on most machines: past the cache.
    #[default]
    Auto,
    /// Past the cache. Edges that are not whole granules go through it, and are written back.
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

/// How a [`Persist`] gets bytes into the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Past the cache. What cannot go past it goes through it, and is written back.
    PastCache,
    /// Through the cache, and each line is written back.
    ThroughCache,
    /// As [`PastCache`](Self::PastCache), but no line gets dirty and none is written back.
    NoDirtyLines,
}

impl Way {
    /// What is right in a range with this mode, and wanted by this policy.
    const fn new(cache: Cache, copy: CopyPolicy) -> Self {
        match (cache, copy) {
            (Cache::WriteBack, CopyPolicy::Auto | CopyPolicy::NonTemporal) => Self::PastCache,
            (Cache::WriteBack, CopyPolicy::WriteBack) => Self::ThroughCache,
            (Cache::WriteThrough | Cache::WriteCombining | Cache::Uncached, _) => {
                Self::NoDirtyLines
            }
        }
    }

    /// Whether what is stored through the cache stays there until its line is written back.
    #[inline]
    const fn leaves_dirty_lines(self) -> bool {
        !matches!(self, Self::NoDirtyLines)
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
/// They are described for memory that is cached write-back. If it is mapped with another
/// [mode](Cache), what is stored, by any of them, is durable after a [`fence`](Self::fence).
///
/// In each, `dst` is valid for writes of all the bytes that are stored, and memory that is a source
/// is valid for reads of as many. Others may read and write both at the same time, as a user may
/// with pages under I/O, and they may overlap: then it is not said which bytes are stored, and
/// nothing else is lost. So implementations touch this memory by assembly or volatile accesses.
pub trait Machine: Copy {
    /// Whether what is stored and written back here is durable after a [`fence`](Self::fence), also
    /// in memory that is cached write-back.
    const DURABLE: bool;

    /// The instructions in use where bytes go this way, for a log.
    fn name(self, way: Way) -> &'static str;

    /// Stores `len` bytes, fewer than [`GRANULE`], through the cache: they are not durable until
    /// their line is written back.
    ///
    /// # Safety
    ///
    /// `dst` and `src` must be valid, as said at the [trait](Self).
    unsafe fn store(self, dst: *mut u8, src: Source, len: usize);

    /// Stores one granule, whose bytes are those of `value`, through the cache and by one access:
    /// another CPU sees all of it or nothing, and only after what this one stored through the cache
    /// before (but write-combining memory keeps no order). It is not durable until its line is
    /// written back.
    ///
    /// # Safety
    ///
    /// `dst` must be valid, as said at the [trait](Self), and a multiple of [`GRANULE`].
    unsafe fn store_granule(self, dst: *mut u8, value: u64);

    /// Stores `granules` times [`GRANULE`] bytes through the cache, each granule by one access. They
    /// are not durable until their lines are written back.
    ///
    /// # Safety
    ///
    /// As for [`stream`](Self::stream).
    unsafe fn store_granules(self, dst: *mut u8, src: Source, granules: usize);

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

    /// Waits until all that this CPU stored past the cache or wrote back before is durable, and all
    /// that it stored to memory that is not cached write-back.
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
    way: Way,
}

impl Persist {
    /// Chooses how to do it on the CPUs of this machine, all of which have these features, in a range
    /// that is cached write-back.
    pub const fn new(cpu: CpuFeatures) -> Self {
        Self::for_cache(cpu, Cache::WriteBack, CopyPolicy::Auto)
    }

    /// As [`new`](Self::new), in a range that is mapped with this mode. The policy is for
    /// [`Cache::WriteBack`] alone.
    pub const fn for_cache(cpu: CpuFeatures, cache: Cache, copy: CopyPolicy) -> Self {
        Self::mapped(Native::new(cpu), cache, copy)
    }
}

impl<M: Machine> Persist<M> {
    /// Does it by the operations of `machine`, in a range that is cached write-back.
    pub const fn on(machine: M) -> Self {
        Self::mapped(machine, Cache::WriteBack, CopyPolicy::Auto)
    }

    /// As [`on`](Self::on), in a range that is mapped with this mode. The policy is for
    /// [`Cache::WriteBack`] alone.
    pub const fn mapped(machine: M, cache: Cache, copy: CopyPolicy) -> Self {
        Self {
            machine,
            way: Way::new(cache, copy),
        }
    }

    /// The same, but past the cache whatever the policy is: for memory that is bad, which a store
    /// through the cache would read first.
    #[must_use]
    pub const fn past_cache(self) -> Self {
        let way = match self.way {
            Way::ThroughCache => Way::PastCache,
            way => way,
        };
        Self { way, ..self }
    }

    /// Whether what is stored is durable after a fence, if the memory is persistent. If not, the
    /// architecture has no known way to write its caches back, and they are in the way.
    pub const fn is_durable(&self) -> bool {
        M::DURABLE || !self.way.leaves_dirty_lines()
    }

    /// The instructions in use, for a log: `"movnti+clwb"`.
    pub fn name(&self) -> &'static str {
        self.machine.name(self.way)
    }

    /// Copies `len` bytes from `src` to `dst`, durable after a [`fence`](Self::fence).
    ///
    /// Each aligned granule of 8 bytes that is wholly stored is stored at once, whatever the mode and
    /// the policy, if the copy [is durable](Self::is_durable) at all.
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
    /// [`fence`](Self::fence). In a range that is not cached write-back there are no dirty lines, and
    /// it does nothing.
    ///
    /// # Safety
    ///
    /// `addr` must be valid for reads of `len` bytes.
    #[inline]
    pub unsafe fn write_back(&self, addr: *const u8, len: usize) {
        if len == 0 || !self.way.leaves_dirty_lines() {
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

    /// Waits until all that this CPU copied, zeroed or wrote back before is durable, whatever the
    /// mode of the range: the fence is the same in each.
    #[inline]
    pub fn fence(&self) {
        self.machine.fence();
    }

    /// Writes back the line that has the byte at `addr`, if there can be a dirty one.
    ///
    /// # Safety
    ///
    /// `addr` must be in mapped memory.
    #[inline]
    unsafe fn write_back_line(&self, addr: *const u8) {
        if self.way.leaves_dirty_lines() {
            // SAFETY: By the safety contract of this function.
            unsafe { self.machine.write_back(addr) };
        }
    }

    /// Stores `len` bytes at `dst`.
    ///
    /// # Safety
    ///
    /// `dst` and `src` must be valid for `len` bytes, as said at [`Machine`].
    #[inline(always)]
    unsafe fn put(&self, dst: *mut u8, src: Source, len: usize) {
        if self.way == Way::ThroughCache {
            // SAFETY: By the safety contract of this function.
            unsafe { self.put_through_cache(dst, src, len) };
        } else if (dst.addr() | len) % GRANULE == 0 {
            // SAFETY: By the safety contract of this function; `dst` was just found aligned.
            unsafe { self.machine.stream(dst, src, len / GRANULE) };
        } else {
            // SAFETY: By the safety contract of this function.
            unsafe { self.put_ragged(dst, src, len) };
        }
    }

    /// Stores `len` bytes at `dst` through the cache, and writes their lines back.
    ///
    /// It does so by [`STEP`]s, so that the lines of one are on their way while the next is stored.
    ///
    /// # Safety
    ///
    /// As for [`put`](Self::put).
    #[inline(never)]
    unsafe fn put_through_cache(&self, dst: *mut u8, src: Source, len: usize) {
        let mut done = 0_usize;

        while done < len {
            let dst = dst.wrapping_add(done);
            let src = src.skip(done);
            // A step ends where a line does, so that none is written back twice.
            let step = STEP
                .wrapping_sub(dst.addr() % STEP)
                .min(len.wrapping_sub(done));
            let (head, granules, tail) = parts(dst, step);
            let rest = step.wrapping_sub(tail);

            // SAFETY: The three are the bytes of the step, which are among those of the safety
            // contract of this function. The head ends at a multiple of `GRANULE`, or it is all
            // there is.
            unsafe {
                self.machine.store(dst, src, head);
                if granules != 0 {
                    self.machine
                        .store_granules(dst.wrapping_add(head), src.skip(head), granules);
                }
                self.machine
                    .store(dst.wrapping_add(rest), src.skip(rest), tail);
                self.write_back(dst, step);
            }
            done = done.wrapping_add(step);
        }
    }

    /// Stores `len` bytes at `dst`, where the first or the last granule is not whole.
    ///
    /// # Safety
    ///
    /// As for [`put`](Self::put).
    #[inline(never)]
    unsafe fn put_ragged(&self, dst: *mut u8, src: Source, len: usize) {
        let (head, granules, tail) = parts(dst, len);
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
                self.write_back_line(dst);
            }
        }
    }
}

/// Cuts `len` bytes from `addr` on into the bytes before the first whole granule, the whole granules,
/// and the bytes after them.
#[inline]
fn parts(addr: *const u8, len: usize) -> (usize, usize, usize) {
    let head = (addr.addr().wrapping_neg() % GRANULE).min(len);
    let rest = len.wrapping_sub(head);

    (head, rest / GRANULE, rest % GRANULE)
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

    /// Each way to write a line back that the CPU has, by each policy; and the way without.
    fn native() -> impl Iterator<Item = Persist> {
        let all = CpuFeatures::detect();
        let cpus = [
            all,
            CpuFeatures { clwb: false, ..all },
            CpuFeatures::default(),
        ];

        let write_back = [CopyPolicy::NonTemporal, CopyPolicy::WriteBack]
            .into_iter()
            .flat_map(move |copy| {
                cpus.into_iter()
                    .map(move |cpu| Persist::for_cache(cpu, Cache::WriteBack, copy))
            });
        write_back.chain([Persist::for_cache(all, Cache::Uncached, CopyPolicy::Auto)])
    }

    /// Bad memory must not be read by what overwrites it.
    #[test]
    fn past_the_cache_whatever_the_policy() {
        let cpu = CpuFeatures::detect();

        for copy in CopyPolicy::ALL {
            for cache in Cache::ALL {
                let persist = Persist::for_cache(cpu, cache, copy).past_cache();
                let expected = Persist::for_cache(cpu, cache, CopyPolicy::NonTemporal);
                assert_eq!(persist.way, expected.way);
            }
        }
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

    #[test]
    fn copies_in_several_steps() {
        /// Two steps and a half.
        const LEN: usize = STEP * 5 / 2;

        #[repr(align(64))]
        struct Steps([u8; LEN]);

        // As in `data()`. It is not on the stack, of which the kernel has little.
        static DATA: [u8; LEN] = {
            let mut data = [0; LEN];
            let mut i = 0;
            while i < LEN {
                data[i] = (i % 127 + 1) as u8;
                i += 1;
            }
            data
        };

        for persist in native() {
            for (offset, len) in [
                (0, LEN),
                (1, LEN - 2),
                (STEP - 1, STEP + 2),
                (STEP - 8, 16),
                (STEP, STEP),
            ] {
                let mut media = Steps([GUARD; LEN]);
                let dst = media.0.as_mut_ptr().wrapping_add(offset);
                // SAFETY: Both have `offset + len` bytes at least.
                unsafe { persist.copy(dst, DATA.as_ptr(), len) };
                persist.fence();

                assert!(media.0.iter().enumerate().all(|(i, &byte)| {
                    let expected = match i.checked_sub(offset) {
                        Some(i) if i < len => DATA.get(i).copied(),
                        _ => Some(GUARD),
                    };
                    Some(byte) == expected
                }));
            }
        }
    }

    #[test]
    fn is_durable_where_lines_are_written_back_or_not_dirty() {
        for cache in Cache::ALL {
            for copy in CopyPolicy::ALL {
                let native = Persist::for_cache(CpuFeatures::detect(), cache, copy);
                let generic = Persist::mapped(generic::Generic, cache, copy);

                assert_eq!(
                    native.is_durable(),
                    Native::DURABLE || cache != Cache::WriteBack
                );
                assert_eq!(generic.is_durable(), cache != Cache::WriteBack);
            }
        }
    }
}
