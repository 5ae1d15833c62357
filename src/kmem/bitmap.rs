// SPDX-License-Identifier: GPL-2.0-only

//! A set of pages, a bit each, that is changed by many at once.
//!
//! Each bit is changed and read by itself, with no order to other memory ([`Relaxed`]): who goes on
//! to use the page of a bit got it by a lock or from an allocator, and these give the order.

use core::{
    fmt,
    ops::Range,
    sync::atomic::{
        AtomicU64,
        Ordering::Relaxed, //
    },
};

/// The bits of a word.
const WORD: u64 = u64::BITS as u64;

/// A set of bits in words that somebody else owns.
///
/// It has all bits of the words, which may be more than were asked of [`words`](Self::words).
///
/// # Examples
///
/// ```
/// use pmem_core::kmem::bitmap::Bitmap;
///
/// let words = [0, u64::MAX, 0].map(Into::into);
/// let bitmap = Bitmap::new(&words);
///
/// assert!(!bitmap.set(128));
/// assert!(bitmap.zeros(10..192).eq([(10, 54), (129, 63)]));
/// assert!(bitmap.ones(10..192).eq([(64, 65)]));
/// ```
#[derive(Clone, Copy)]
pub struct Bitmap<'a>(&'a [AtomicU64]);

impl fmt::Debug for Bitmap<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bits", self.len())
    }
}

impl<'a> Bitmap<'a> {
    /// How many words have so many bits, or [`None`] if an address space has not as many.
    #[inline]
    pub fn words(bits: u64) -> Option<usize> {
        usize::try_from(bits.div_ceil(WORD)).ok()
    }

    /// The bits of these words.
    #[inline]
    pub const fn new(words: &'a [AtomicU64]) -> Self {
        Self(words)
    }

    /// The number of bits.
    #[inline]
    pub const fn len(&self) -> u64 {
        // No slice has as many words that this wraps.
        (self.0.len() as u64).wrapping_mul(WORD)
    }

    /// Whether it has no bits.
    #[inline]
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The word that has `bit`, and the bit in it.
    #[inline]
    fn word(&self, bit: u64) -> Option<(&'a AtomicU64, u64)> {
        let word = self.0.get(usize::try_from(bit / WORD).ok()?)?;

        Some((word, 1 << (bit % WORD)))
    }

    /// Sets `bit` and returns what it was. Beyond the end, all count as set, and stay so.
    #[inline]
    pub fn set(&self, bit: u64) -> bool {
        self.word(bit)
            .is_none_or(|(word, mask)| word.fetch_or(mask, Relaxed) & mask != 0)
    }

    /// Sets `bit` as [`set`](Self::set) does, but loses what others change in its word meanwhile.
    ///
    /// It is for the time when nobody else has the bitmap yet, and has no locked instruction.
    #[inline]
    pub(super) fn set_alone(&self, bit: u64) -> bool {
        self.word(bit).is_none_or(|(word, mask)| {
            let old = word.load(Relaxed);
            word.store(old | mask, Relaxed);
            old & mask != 0
        })
    }

    /// Clears `bit` and returns what it was. Beyond the end, nothing is cleared: it returns
    /// `false`.
    #[inline]
    pub fn clear(&self, bit: u64) -> bool {
        self.word(bit)
            .is_some_and(|(word, mask)| word.fetch_and(!mask, Relaxed) & mask != 0)
    }

    /// Whether `bit` is set. Beyond the end, all count as set.
    #[inline]
    pub fn test(&self, bit: u64) -> bool {
        self.word(bit)
            .is_none_or(|(word, mask)| word.load(Relaxed) & mask != 0)
    }

    /// The runs of bits in `range` that are clear, each as its first bit and its length, in
    /// ascending order. Each is as long as can be in `range`, and none goes beyond the end.
    ///
    /// Bits that others change meanwhile are seen as they were or as they are.
    pub fn zeros(&self, range: Range<u64>) -> Runs<'a> {
        self.runs(range, false)
    }

    /// The runs of bits in `range` that are set, as [`zeros`](Self::zeros) gives the others.
    pub fn ones(&self, range: Range<u64>) -> Runs<'a> {
        self.runs(range, true)
    }

    fn runs(&self, range: Range<u64>, value: bool) -> Runs<'a> {
        Runs {
            bitmap: *self,
            at: range.start,
            end: range.end.min(self.len()),
            value,
        }
    }

    /// The first bit from `at` on and before `end` that is `value`.
    fn find(&self, mut at: u64, end: u64, value: bool) -> Option<u64> {
        while at < end {
            let (word, mask) = self.word(at)?;
            // Those that are sought as ones, without those before `at`.
            let word = word.load(Relaxed);
            let word = if value { word } else { !word };
            let sought = word & mask.wrapping_neg();
            let first = at & !(WORD - 1);
            if sought != 0 {
                let found = first | u64::from(sought.trailing_zeros());
                return (found < end).then_some(found);
            }
            // It does not wrap: the number of bits is a multiple of a word, and fits.
            at = first.saturating_add(WORD);
        }
        None
    }
}

/// Runs of bits; see [`Bitmap::zeros`].
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    bitmap: Bitmap<'a>,
    at: u64,
    end: u64,
    value: bool,
}

impl Iterator for Runs<'_> {
    /// The first bit, and how many there are.
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        let first = self.bitmap.find(self.at, self.end, self.value)?;
        // The first one is in, even if somebody just changed it.
        let end = self
            .bitmap
            .find(first.saturating_add(1), self.end, !self.value)
            .unwrap_or(self.end);

        self.at = end;
        Some((first, end.wrapping_sub(first)))
    }
}

#[cfg_attr(CONFIG_RUST, kernel::macros::kunit_tests(pmem_kmem_bitmap))]
#[cfg(any(test, CONFIG_KUNIT = "y"))]
mod tests {
    use super::*;

    #[test]
    fn bits() {
        let words = [0, 0].map(AtomicU64::new);
        let bitmap = Bitmap::new(&words);

        for bit in [0, 1, 63, 64, 127] {
            assert!(!bitmap.test(bit));
            assert!(!bitmap.set(bit));
            assert!(bitmap.set(bit));
            assert!(bitmap.test(bit));
        }
        assert!(bitmap.ones(0..128).eq([(0, 2), (63, 2), (127, 1)]));
        for bit in [0, 1, 63, 64, 127] {
            assert!(bitmap.clear(bit));
            assert!(!bitmap.clear(bit));
            assert!(!bitmap.set_alone(bit));
            assert!(bitmap.set_alone(bit));
            assert!(bitmap.clear(bit));
        }
        assert!(bitmap.zeros(0..128).eq([(0, 128)]));
    }

    #[test]
    fn beyond_the_end() {
        let words = [0, 0].map(AtomicU64::new);
        let bitmap = Bitmap::new(&words);

        assert_eq!(bitmap.len(), 128);
        for bit in [128, u64::MAX] {
            assert!(bitmap.test(bit));
            assert!(bitmap.set(bit));
            assert!(bitmap.set_alone(bit));
            assert!(!bitmap.clear(bit));
        }
        assert!(bitmap.zeros(100..u64::MAX).eq([(100, 28)]));
        assert!(bitmap.zeros(128..u64::MAX).eq([]));
        assert!(bitmap.ones(0..u64::MAX).eq([]));
        assert!(Bitmap::new(&[]).is_empty());
    }

    #[test]
    fn sizes() {
        for (bits, words) in [(0, 0), (1, 1), (64, 1), (65, 2), (128, 2)] {
            assert_eq!(Bitmap::words(bits), Some(words));
        }
        assert!(Bitmap::words(u64::MAX).is_some());
    }

    #[test]
    fn runs() {
        let words = [0xf0, 0, 0, u64::MAX, 1].map(AtomicU64::new);
        let bitmap = Bitmap::new(&words);

        assert!(bitmap.ones(0..320).eq([(4, 4), (192, 65)]));
        assert!(bitmap.zeros(0..320).eq([(0, 4), (8, 184), (257, 63)]));
        assert!(bitmap.ones(5..200).eq([(5, 2 + 1), (192, 8)]));
        assert!(bitmap.zeros(6..192).eq([(8, 184)]));
        assert!(bitmap.zeros(6..193).eq([(8, 184)]));
        assert!(bitmap.zeros(9..9).eq([]));
        #[expect(clippy::reversed_empty_ranges, reason = "a caller may have one")]
        let reversed = 10..9;
        assert!(bitmap.zeros(reversed).eq([]));
    }
}
