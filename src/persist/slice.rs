// SPDX-License-Identifier: GPL-2.0-only

//! Memory that no Rust reference may point to, as a safe type.

use super::{
    Machine,
    Persist,
    GRANULE, //
};
use core::{
    fmt,
    marker::PhantomData,
    sync::atomic::{
        AtomicU64,
        Ordering, //
    }, //
};

/// Bytes that others may read and write at any time: a part of a medium, or pages under I/O.
///
/// So it gives out no reference to them, and what is read from them is whatever was there.
///
/// # Invariants
///
/// `addr` is valid for reads and writes of `len` bytes during `'a`, by assembly, atomic or volatile
/// accesses, and others access them in no other way.
#[derive(Clone, Copy)]
pub struct VolatileSlice<'a> {
    addr: *mut u8,
    len: usize,
    _memory: PhantomData<&'a ()>,
}

impl fmt::Debug for VolatileSlice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.len)
    }
}

impl VolatileSlice<'_> {
    /// The `len` bytes at `addr`.
    ///
    /// # Safety
    ///
    /// `addr` must be valid for reads and writes of `len` bytes as long as the result is in use.
    /// No Rust reference to them may be in use at the same time, and what is written by others
    /// meanwhile must be by assembly, atomic or volatile accesses, or by no code of Rust.
    #[inline]
    pub const unsafe fn new(addr: *mut u8, len: usize) -> Self {
        // INVARIANT: By the safety contract of this function.
        Self {
            addr,
            len,
            _memory: PhantomData,
        }
    }

    /// The address of the first byte.
    #[inline]
    pub const fn as_ptr(&self) -> *mut u8 {
        self.addr
    }

    /// Length in bytes.
    #[inline]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    #[inline]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Splits it into its first `mid` bytes and the others, or returns nothing if it has fewer.
    #[inline]
    pub const fn split_at(self, mid: usize) -> Option<(Self, Self)> {
        if mid > self.len {
            return None;
        }
        // INVARIANT: `mid` is at most `len`, so that both are parts of what is valid.
        Some((
            Self { len: mid, ..self },
            Self {
                addr: self.addr.wrapping_add(mid),
                len: self.len.wrapping_sub(mid),
                ..self
            },
        ))
    }

    /// The `len` bytes from `offset` on, or nothing if it does not have all of them.
    #[inline]
    pub fn range(&self, offset: u64, len: u64) -> Option<Self> {
        let offset = usize::try_from(offset).ok()?;
        let len = usize::try_from(len).ok()?;
        let (_, rest) = self.split_at(offset)?;
        let (part, _) = rest.split_at(len)?;

        Some(part)
    }

    /// Copies its first bytes to all of `buf`. If it has fewer, copies none and returns `false`.
    ///
    /// If others write meanwhile, it is not said which bytes are read.
    #[inline]
    pub fn read(&self, buf: &mut [u8]) -> bool {
        if buf.len() > self.len {
            return false;
        }

        let mut src = self.addr.cast_const();
        for part in buf.chunks_mut(GRANULE) {
            if let Ok(granule) = <&mut [u8; GRANULE]>::try_from(&mut *part) {
                // SAFETY: By the type invariants, as `buf` has at most `len` bytes, and as many of
                // them were read as `src` is ahead. An array of bytes has any address.
                *granule = unsafe { src.cast::<[u8; GRANULE]>().read_volatile() };
                src = src.wrapping_add(GRANULE);
                continue;
            }
            for byte in part {
                // SAFETY: As above.
                *byte = unsafe { src.read_volatile() };
                src = src.wrapping_add(1);
            }
        }
        true
    }

    /// Loads the little-endian value of the 8 bytes at `offset` at once, or nothing if their
    /// address is not a multiple of 8, or if it does not have them.
    ///
    /// What another CPU stored before it stored this value, by [`Persist::store_u64`], is seen by
    /// what is read afterwards.
    #[inline]
    pub fn load_u64(&self, offset: u64) -> Option<u64> {
        let granule = self.granule(offset)?;
        // SAFETY: By the type invariants, as it is a part of the slice; it was found aligned.
        let value = unsafe { AtomicU64::from_ptr(granule.cast()) }.load(Ordering::Acquire);

        Some(u64::from_le(value))
    }

    /// The address of the [`GRANULE`] at `offset`, if it is a multiple of its size and the slice has
    /// all of it.
    #[inline]
    pub(super) fn granule(&self, offset: u64) -> Option<*mut u8> {
        let granule = self.range(offset, GRANULE as u64)?.addr;

        (granule.addr() % GRANULE == 0).then_some(granule)
    }
}

impl<M: Machine> Persist<M> {
    /// Copies `src` to the beginning of `dst`, durable after a [`fence`](Persist::fence).
    ///
    /// Copies as much as both have. If they overlap, it is not said which bytes are stored.
    #[inline]
    pub fn write(&self, dst: VolatileSlice<'_>, src: VolatileSlice<'_>) {
        let len = if src.len < dst.len { src.len } else { dst.len };
        // SAFETY: By the type invariants. The copy is made by assembly or volatile accesses, to
        // which an overlap is only a concurrent writer.
        unsafe { self.copy(dst.addr, src.addr, len) };
    }

    /// Copies `src` to the beginning of `dst`, durable after a [`fence`](Persist::fence).
    ///
    /// Copies as much as both have.
    #[inline]
    pub fn write_bytes(&self, dst: VolatileSlice<'_>, src: &[u8]) {
        let len = if src.len() < dst.len {
            src.len()
        } else {
            dst.len
        };
        // SAFETY: By the type invariants of `dst`; `src` has at least `len` bytes.
        unsafe { self.copy(dst.addr, src.as_ptr(), len) };
    }

    /// Stores `value` at `offset` of `dst`, little-endian and at once, durable after a
    /// [`fence`](Persist::fence). Stores nothing and returns `false` if the address is not a
    /// multiple of 8, or if `dst` does not have the 8 bytes.
    ///
    /// After a power loss, the old value is there or the new one, never a mix.
    ///
    /// What this CPU stored before is seen by a CPU that [loads](VolatileSlice::load_u64) this value.
    /// That does not hold for what went past the cache, without a fence in between, nor for anything
    /// in a range that is mapped write-combining.
    #[inline]
    #[must_use = "nothing is stored if it returns false"]
    pub fn store_u64(&self, dst: VolatileSlice<'_>, offset: u64, value: u64) -> bool {
        let Some(granule) = dst.granule(offset) else {
            return false;
        };
        // SAFETY: By the type invariants, as it is a part of the slice; it was found aligned.
        unsafe {
            self.machine.store_granule(granule, value.to_le());
            self.write_back_line(granule);
        }
        true
    }

    /// Stores as [`store_u64`](Persist::store_u64) does, but leaves the line in the cache, where
    /// more may be stored to it. It is durable after a [`flush`](Persist::flush) and a
    /// [`fence`](Persist::fence), and may be without.
    #[inline]
    #[must_use = "nothing is stored if it returns false"]
    pub fn store_u64_cached(&self, dst: VolatileSlice<'_>, offset: u64, value: u64) -> bool {
        let Some(granule) = dst.granule(offset) else {
            return false;
        };
        // SAFETY: By the type invariants, as it is a part of the slice; it was found aligned.
        unsafe { self.machine.store_granule(granule, value.to_le()) };
        true
    }

    /// Writes back the lines of `dst`: what any CPU stored there before, as far as this one can see
    /// it, is durable after a [`fence`](Persist::fence) of this one.
    #[inline]
    pub fn flush(&self, dst: VolatileSlice<'_>) {
        // SAFETY: By the type invariants.
        unsafe { self.write_back(dst.addr, dst.len) };
    }

    /// Zeroes `dst`, durable after a [`fence`](Persist::fence).
    #[inline]
    pub fn write_zeroes(&self, dst: VolatileSlice<'_>) {
        // SAFETY: By the type invariant.
        unsafe { self.zero(dst.addr, dst.len) };
    }
}

#[cfg_attr(CONFIG_RUST, kernel::macros::kunit_tests(pmem_slice))]
#[cfg(any(test, CONFIG_KUNIT = "y"))]
mod tests {
    use super::{
        super::CpuFeatures,
        *, //
    };

    /// Room for a few granules, the first of which is aligned.
    #[repr(align(64))]
    struct Media([u8; 64]);

    /// Calls `check` with a slice of 64 bytes that are 0, 1, 2, ..., and returns them afterwards.
    fn with_media(check: impl FnOnce(VolatileSlice<'_>)) -> [u8; 64] {
        let mut media = Media(core::array::from_fn(|i| i as u8));

        // SAFETY: The bytes are there until the function returns, and nobody refers to them before.
        check(unsafe { VolatileSlice::new(media.0.as_mut_ptr(), 64) });
        media.0
    }

    fn persist() -> Persist {
        Persist::new(CpuFeatures::detect())
    }

    #[test]
    fn parts() {
        // Offset, length, whether there is such a part of 64 bytes.
        const CASES: [(u64, u64, bool); 9] = [
            (0, 64, true),
            (0, 65, false),
            (1, 64, false),
            (63, 1, true),
            (64, 0, true),
            (65, 0, false),
            (0, u64::MAX, false),
            (u64::MAX, 1, false),
            (u64::MAX, u64::MAX, false),
        ];

        with_media(|media| {
            for (offset, len, is_part) in CASES {
                let part = media.range(offset, len);
                assert_eq!(part.is_some(), is_part);
                if let Some(part) = part {
                    assert_eq!(part.len() as u64, len);
                    let ahead = part.as_ptr().addr() - media.as_ptr().addr();
                    assert_eq!(ahead as u64, offset);
                }
            }
        });
    }

    #[test]
    fn reads_the_first_bytes_or_none() {
        with_media(|media| {
            for offset in 0..64 {
                let Some((_, part)) = media.split_at(offset) else {
                    continue;
                };
                for len in 0..=64 {
                    let mut buf = [0xff; 64];
                    let Some(buf) = buf.get_mut(..len) else {
                        continue;
                    };
                    assert_eq!(part.read(buf), len <= 64 - offset);
                    for (i, &byte) in buf.iter().enumerate() {
                        let read = if len <= 64 - offset { offset + i } else { 0xff };
                        assert_eq!(usize::from(byte), read);
                    }
                }
            }
        });
    }

    #[test]
    fn loads_and_stores_aligned_granules_alone() {
        for offset in 0..80 {
            let fits = offset % 8 == 0 && offset < 64;
            let mut loaded = None;

            let media = with_media(|media| {
                loaded = media.load_u64(offset);
                assert_eq!(
                    persist().store_u64(media, offset, 0xf7f6_f5f4_f3f2_f1f0),
                    fits
                );
                persist().fence();
            });

            assert_eq!(loaded.is_some(), fits);
            for (at, &byte) in (0_u64..).zip(&media) {
                let stored = at & !7 == offset;
                assert_eq!(u64::from(byte), if stored { 0xf0 + at % 8 } else { at });
                if let Some(loaded) = loaded.filter(|_| stored) {
                    assert_eq!((loaded >> (8 * (at % 8))) & 0xff, at);
                }
            }
        }

        with_media(|media| {
            assert_eq!(media.load_u64(u64::MAX), None);
            assert!(!persist().store_u64(media, u64::MAX, 1));
            assert!(!persist().store_u64_cached(media, 4, 1));
            assert!(persist().store_u64_cached(media, 56, 1));
            persist().flush(media);
            persist().fence();
            assert_eq!(media.load_u64(56), Some(1));

            // It is the address that counts.
            let unaligned = media.range(4, 16);
            assert_eq!(unaligned.and_then(|part| part.load_u64(0)), None);
            assert!(unaligned.is_some_and(|part| part.load_u64(4).is_some()));
        });
    }

    #[test]
    fn writes_what_both_have() {
        let media = with_media(|media| {
            if let Some(part) = media.range(8, 4) {
                persist().write_bytes(part, &[0xff; 9]);
            }
            persist().write_bytes(media, &[0xfe; 3]);
            persist().fence();
        });

        for (at, &byte) in (0_u8..).zip(&media) {
            assert_eq!(
                byte,
                match at {
                    0..3 => 0xfe,
                    8..12 => 0xff,
                    _ => at,
                }
            );
        }
    }
}
