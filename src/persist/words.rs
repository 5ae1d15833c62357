// SPDX-License-Identifier: GPL-2.0-only

//! Memory behind a bus, such as a BAR of a PCI device: each access is one of 8 bytes, and aligned.
//!
//! Such a device may have no byte enables, or split what is narrow or crosses a boundary. So
//! [`Words`] loads and stores whole granules of [`GRANULE`] bytes and nothing else:
//!
//! | step | how | on the device |
//! |---|---|---|
//! | [`write`](Words::write), [`zero`](Words::zero) | whole granules are stored past the cache; of the first and the last, the bytes that are not meant are loaded and stored again | after a drain |
//! | [`read`](Words::read) | granules are loaded, and of the first and the last, the bytes that are meant are kept | |
//! | [`fence`](Words::fence) | waits until all that this CPU stored is out of it, and on its way | after a drain, of any CPU |
//! | [`drain`](Words::drain) | as a fence; then it loads from the device, which no store overtakes on the way there | yes |
//!
//! To store a part of a granule, the rest is loaded and stored again, and what others store to it in
//! between is lost. That is right for block I/O. The window of an access is what one bio is about,
//! whole sectors. So two bios have no granule in common. The segments of one bio may meet within a
//! granule, as those of direct I/O may have odd lengths; one CPU does one after the other. And what
//! others store in the window meanwhile, by a mapping, the bio is about to overwrite in any case.
//!
//! No line gets dirty, however the memory is mapped. If that is [write-combining](super::Cache), the
//! CPU may put granules that are stored one after the other into one burst, of whole granules.

use super::{
    parts,
    CpuFeatures,
    Machine,
    Native,
    Source,
    VolatileSlice,
    Way,
    GRANULE, //
};

/// A [`Machine`] that also loads from memory behind a bus.
///
/// As there, others may access all of the memory at the same time, and then it is not said which
/// bytes are loaded.
pub trait Bus: Machine {
    /// Copies `granules` times [`GRANULE`] bytes from `src` to `dst`. Each granule of `src` is loaded
    /// by one access, and nothing else is.
    ///
    /// The first is loaded when all that this CPU loaded before has come: who has seen that another
    /// CPU [fenced](Machine::fence) what it stored will load that or newer bytes.
    ///
    /// # Safety
    ///
    /// - `src` must be valid for reads of all these bytes, and a multiple of [`GRANULE`].
    /// - `dst` must be valid for writes of as many.
    unsafe fn load_granules(self, dst: *mut u8, src: *const u8, granules: usize);

    /// Loads one granule from the memory itself and by one access, after all that this CPU loaded and
    /// stored before, by any of the operations: it asks the memory when the loads have their bytes
    /// and the stores are [out of the CPU](Machine::fence), and no cache answers.
    ///
    /// # Safety
    ///
    /// `src` must be valid for reads of [`GRANULE`] bytes, and a multiple of [`GRANULE`].
    unsafe fn load_through(self, src: *const u8) -> u64;
}

/// What the granule that was loaded last says of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a device that is gone answers with all ones"]
pub enum Answer {
    /// It has a bit that is zero, which only a device can have sent; or nothing was to be loaded.
    Device,
    /// It is all ones. That is what a bus gives if no device answers, and what the memory may have:
    /// whether the device is there has to be found out in another way.
    AllOnes,
}

impl Answer {
    const fn new(granule: u64) -> Self {
        match granule {
            u64::MAX => Self::AllOnes,
            _ => Self::Device,
        }
    }
}

/// Accesses memory behind a bus by whole granules.
///
/// Each function takes the window of the memory that it is about, for which see the
/// [module](self): what is accessed is in it, also where only a part of a granule is meant. Its
/// address and its length must be multiples of [`GRANULE`].
///
/// # Examples
///
/// ```
/// use pmem_core::persist::{words::Words, CpuFeatures, VolatileSlice};
///
/// let words = Words::new(CpuFeatures::detect());
/// let mut device = [u64::MAX; 64];
/// let mut data = [7; 3];
///
/// // SAFETY: Each is there until the end, and nothing else refers to it until then.
/// let (window, data) = unsafe {
///     (
///         VolatileSlice::new(device.as_mut_ptr().cast(), 512),
///         VolatileSlice::new(data.as_mut_ptr(), 3),
///     )
/// };
/// assert!(words.write(window, 7, data));
/// assert!(words.drain(window, 0).is_some());
///
/// assert_eq!(u64::from_be(device[0]), 0xffff_ffff_ffff_ff07);
/// assert_eq!(u64::from_be(device[1]), 0x0707_ffff_ffff_ffff);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Words<M = Native> {
    machine: M,
}

impl Words {
    /// Does it on the CPUs of this machine, all of which have these features.
    pub const fn new(cpu: CpuFeatures) -> Self {
        Self::on(Native::new(cpu))
    }
}

impl<M: Bus> Words<M> {
    /// Does it by the operations of `machine`.
    pub const fn on(machine: M) -> Self {
        Self { machine }
    }

    /// The instruction that stores, for a log: `"movnti"`.
    pub fn name(&self) -> &'static str {
        self.machine.name(Way::NoDirtyLines)
    }

    /// Copies all of `src` to `offset` of `window`, where it is after a [`drain`](Self::drain).
    ///
    /// Stores nothing and returns `false` if the window has not all these bytes, or if it is not made
    /// of whole granules. If others write meanwhile, it is not said which bytes are stored.
    #[must_use = "nothing is stored if it returns false"]
    pub fn write(&self, window: VolatileSlice<'_>, offset: u64, src: VolatileSlice<'_>) -> bool {
        let Some(dst) = part(window, offset, src.len() as u64) else {
            return false;
        };
        // SAFETY: By the type invariants of `src`, which has as many bytes as `dst`, which is a part
        // of a window of whole granules.
        unsafe { self.put(dst, Source::Memory(src.as_ptr())) };
        true
    }

    /// Stores `len` bytes of zeros at `offset` of `window`, where they are after a
    /// [`drain`](Self::drain).
    ///
    /// Stores nothing and returns `false` as [`write`](Self::write) does.
    #[must_use = "nothing is stored if it returns false"]
    pub fn zero(&self, window: VolatileSlice<'_>, offset: u64, len: u64) -> bool {
        let Some(dst) = part(window, offset, len) else {
            return false;
        };
        // SAFETY: `dst` is a part of a window of whole granules; zeros are always valid.
        unsafe { self.put(dst, Source::Zeros) };
        true
    }

    /// Copies the bytes at `offset` of `window` to all of `dst`. They are those that any CPU wrote
    /// before a [`fence`](Self::fence), or newer ones.
    ///
    /// The last granule is loaded when all others have come: if it is the device that answers, they
    /// are the device's, too, as long as one that is gone does not come back.
    ///
    /// Copies nothing and returns nothing if the window has not all these bytes, or if it is not made
    /// of whole granules.
    #[must_use = "nothing may be read, or by no device"]
    pub fn read(
        &self,
        window: VolatileSlice<'_>,
        offset: u64,
        dst: VolatileSlice<'_>,
    ) -> Option<Answer> {
        let len = dst.len();
        let src = part(window, offset, len as u64)?.as_ptr().cast_const();
        let dst = dst.as_ptr();
        if len == 0 {
            return Some(Answer::Device);
        }

        // The last byte is the last of `last` that are meant of its granule.
        let end = src.addr().wrapping_add(len);
        let last = (end.wrapping_sub(1) % GRANULE).wrapping_add(1).min(len);
        let rest = len.wrapping_sub(last);
        let (head, granules, _) = parts(src, rest);

        // SAFETY: `dst` is valid for `len` bytes by the type invariants. What is before the last
        // granule ends where that begins, so it has a head, if it has one, that ends with its
        // granule, and then whole granules: the three add up to `len`. The window is made of whole
        // granules, so it is valid for all of each that has one of the bytes.
        unsafe {
            if head != 0 {
                let mut granule = [0; GRANULE];
                let (first, at) = granule_of(src);
                self.machine.load_granules(granule.as_mut_ptr(), first, 1);
                keep(dst, granule, at, head);
            }
            if granules != 0 {
                self.machine.load_granules(
                    dst.wrapping_add(head),
                    src.wrapping_add(head),
                    granules,
                );
            }
            let (granule, at) = granule_of(src.wrapping_add(rest));
            let granule = self.machine.load_through(granule);
            keep(dst.wrapping_add(rest), granule.to_ne_bytes(), at, last);

            Some(Answer::new(granule))
        }
    }

    /// Waits until all that this CPU wrote or zeroed before is out of it, on its way to the device,
    /// where a [`drain`](Self::drain) on any CPU will then wait for it.
    #[inline]
    pub fn fence(&self) {
        self.machine.fence();
    }

    /// Waits until the device has all that this CPU wrote or zeroed before, and all that others did
    /// before a [`fence`](Self::fence). It does so by a load of the granule at `offset` of `window`,
    /// which only has to be in the same device.
    ///
    /// A bus is free to post stores: they are done, to the CPU, while they are on their way. But a
    /// request to read does not overtake them (PCI Express Base Specification, "Transaction
    /// Ordering": a non-posted request never passes a posted one). So once there is an answer,
    /// they have been there.
    ///
    /// Loads nothing and returns nothing if the window has no such granule: if its address is not a
    /// multiple of [`GRANULE`], too.
    #[must_use = "there may be no device"]
    pub fn drain(&self, window: VolatileSlice<'_>, offset: u64) -> Option<Answer> {
        let granule = window.granule(offset)?;
        // SAFETY: It is a part of the window, and was found aligned.
        Some(Answer::new(unsafe { self.machine.load_through(granule) }))
    }

    /// Stores the bytes of `src` to all of `dst`.
    ///
    /// # Safety
    ///
    /// `src` must be valid for reads of as many bytes as `dst` has, and each granule that `dst` has a
    /// byte of must be valid as `dst` is.
    unsafe fn put(&self, dst: VolatileSlice<'_>, src: Source) {
        let len = dst.len();
        let dst = dst.as_ptr();
        let (head, granules, tail) = parts(dst, len);
        let rest = len.wrapping_sub(tail);

        // SAFETY: The three add up to `len` bytes, for which both are valid. The head is a part of
        // one granule, and ends with it, if it is not all there is. So the granules begin at a
        // multiple of `GRANULE`, if there are any, and the tail is the beginning of the granule
        // after them.
        unsafe {
            self.merge(dst, src, head);
            if granules != 0 {
                self.machine
                    .stream(dst.wrapping_add(head), src.skip(head), granules);
            }
            self.merge(dst.wrapping_add(rest), src.skip(rest), tail);
        }
    }

    /// Stores `len` bytes at `dst`, which are a part of one granule, by a store of all of it.
    ///
    /// # Safety
    ///
    /// If `len` is not zero, `src` must be valid for reads of `len` bytes, which must all have their
    /// place in the granule that has the byte at `dst`, and that must be valid for reads and writes.
    unsafe fn merge(&self, dst: *mut u8, src: Source, len: usize) {
        if len == 0 {
            return;
        }
        let (granule, at) = granule_of(dst);

        // A plain load could miss what was just stored to the other part of the granule, if that is
        // still in a write-combining buffer.
        // SAFETY: By the safety contract of this function.
        let mut bytes = unsafe { self.machine.load_through(granule) }.to_ne_bytes();
        for (i, byte) in bytes.iter_mut().skip(at).take(len).enumerate() {
            *byte = match src.skip(i) {
                // SAFETY: By the safety contract of this function, as `i` is less than `len`.
                Source::Memory(src) => unsafe { src.read_volatile() },
                Source::Zeros => 0,
            };
        }
        // SAFETY: By the safety contract of this function; `bytes` is one granule.
        unsafe {
            self.machine
                .stream(granule.cast_mut(), Source::Memory(bytes.as_ptr()), 1)
        };
    }
}

/// The `len` bytes at `offset` of `window`, if it has them and is made of whole granules.
#[inline]
fn part(window: VolatileSlice<'_>, offset: u64, len: u64) -> Option<VolatileSlice<'_>> {
    let is_whole = (window.as_ptr().addr() | window.len()) % GRANULE == 0;

    window.range(offset, len).filter(|_| is_whole)
}

/// The address of the granule that has the byte at `addr`, and where in it the byte is.
#[inline]
fn granule_of(addr: *const u8) -> (*const u8, usize) {
    let at = addr.addr() % GRANULE;

    (addr.wrapping_sub(at), at)
}

/// Stores `len` bytes of `granule` at `dst`, from the one at `at` on.
///
/// # Safety
///
/// `dst` must be valid for writes of `len` bytes.
#[inline]
unsafe fn keep(dst: *mut u8, granule: [u8; GRANULE], at: usize, len: usize) {
    for (i, &byte) in granule.iter().skip(at).take(len).enumerate() {
        // SAFETY: By the safety contract of this function, as `i` is less than `len`.
        unsafe { dst.wrapping_add(i).write_volatile(byte) };
    }
}

#[cfg_attr(CONFIG_RUST, kernel::macros::kunit_tests(pmem_words))]
#[cfg(any(test, CONFIG_KUNIT = "y"))]
mod tests {
    use super::{
        super::generic::Generic,
        *, //
    };

    const SIZE: usize = 320;

    /// What is beside the bytes that are written.
    const GUARD: u8 = 0xa5;

    /// The memory of a device, or what is copied to or from it.
    #[repr(align(64))]
    struct Bytes([u8; SIZE]);

    impl Bytes {
        const fn guards() -> Self {
            Self([GUARD; SIZE])
        }

        /// Each differs from its neighbours, and none is [`GUARD`] or zero.
        fn data() -> Self {
            Self(core::array::from_fn(|i| (i % 127 + 1) as u8))
        }

        fn slice(&mut self) -> VolatileSlice<'_> {
            // SAFETY: They are there as long as they are borrowed, and nobody refers to them
            // meanwhile.
            unsafe { VolatileSlice::new(self.0.as_mut_ptr(), SIZE) }
        }

        /// Whether it has `expected` from `offset` on, and guards everywhere else.
        fn has_just(&self, offset: usize, expected: &[u8]) -> bool {
            let (before, rest) = self.0.split_at_checked(offset).unwrap_or_default();
            let (bytes, after) = rest.split_at_checked(expected.len()).unwrap_or_default();

            bytes == expected && before.iter().chain(after).all(|&byte| byte == GUARD)
        }
    }

    /// Lengths of some granules with edges, and of each loop of a copy.
    const LENGTHS: [usize; 19] = [
        0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 40, 63, 64, 65, 200, 260,
    ];

    /// Whether `write`, `zero` and `read` access the bytes that they are told to, and no others, with
    /// all lengths at the offsets of two granules.
    fn accesses_just_the_bytes<M: Bus>(words: Words<M>) -> bool {
        let mut data = Bytes::data();

        LENGTHS.iter().all(|&len| {
            (0..16).all(|offset| {
                // At an odd address, so that neither side is aligned as the other is.
                let expected = Bytes::data();
                let expected = expected.0.get(3..3 + len).unwrap_or_default();
                let Some(src) = data.slice().range(3, len as u64) else {
                    return false;
                };

                let mut device = Bytes::guards();
                let is_written = words.write(device.slice(), offset, src);
                words.fence();
                let is_written = is_written && device.has_just(offset as usize, expected);

                let mut ram = Bytes::guards();
                let answer = ram
                    .slice()
                    .range(3, len as u64)
                    .and_then(|dst| words.read(device.slice(), offset, dst));
                let is_read = answer == Some(Answer::Device) && ram.has_just(3, expected);

                let mut device = Bytes::guards();
                let is_zeroed = words.zero(device.slice(), offset, len as u64);
                words.fence();
                let zeros = [0; SIZE];
                let zeros = zeros.get(..len).unwrap_or_default();

                is_written && is_read && is_zeroed && device.has_just(offset as usize, zeros)
            })
        })
    }

    #[test]
    fn accesses_the_bytes_and_no_other() {
        assert!(accesses_just_the_bytes(Words::new(CpuFeatures::detect())));
    }

    #[test]
    fn accesses_the_bytes_and_no_other_on_the_generic_machine() {
        assert!(accesses_just_the_bytes(Words::on(Generic)));
    }

    #[test]
    fn segments_that_meet_in_a_granule() {
        let words = Words::new(CpuFeatures::detect());
        let mut data = Bytes::data();

        for len in 1..24 {
            let mut device = Bytes::guards();
            let mut copy = Bytes::guards();

            for offset in (0..SIZE as u64).step_by(len) {
                let len = (SIZE as u64 - offset).min(len as u64);
                let src = data.slice().range(offset, len);
                assert!(src.is_some_and(|src| words.write(device.slice(), offset, src)));
            }
            words.fence();
            assert_eq!(device.0, Bytes::data().0);

            for offset in (0..SIZE as u64).step_by(len) {
                let len = (SIZE as u64 - offset).min(len as u64);
                let dst = copy.slice().range(offset, len);
                let answer = dst.and_then(|dst| words.read(device.slice(), offset, dst));
                assert_eq!(answer, Some(Answer::Device));
            }
            assert_eq!(copy.0, Bytes::data().0);
        }
    }

    #[test]
    fn refuses_what_is_not_in_a_window_of_whole_granules() {
        // Where the window begins and ends, the offset, the length, whether that is accessed.
        const CASES: [(u64, u64, u64, u64, bool); 15] = [
            (0, 64, 0, 64, true),
            (0, 64, 0, 65, false),
            (0, 64, 1, 64, false),
            (0, 64, 64, 0, true),
            (0, 64, 65, 0, false),
            (0, 64, u64::MAX, 2, false),
            (0, 64, 2, u64::MAX, false),
            (0, 0, 0, 0, true),
            (0, 0, 0, 1, false),
            (8, 56, 47, 1, true),
            (8, 56, 48, 1, false),
            (1, 64, 7, 8, false),
            (4, 68, 4, 8, false),
            (0, 63, 0, 8, false),
            (0, 4, 0, 0, false),
        ];
        let words = Words::new(CpuFeatures::detect());

        for (start, end, offset, len, is_accessed) in CASES {
            let mut device = Bytes::guards();
            let Some(window) = device.slice().range(start, end - start) else {
                continue;
            };
            assert_eq!(words.zero(window, offset, len), is_accessed);
            // Longer than there is memory in the test, it is refused there as here.
            let mut ram = Bytes::data();
            if let Some(part) = ram.slice().range(0, len) {
                assert_eq!(words.write(window, offset, part), is_accessed);
                assert_eq!(words.read(window, offset, part).is_some(), is_accessed);
            }
            words.fence();
            assert_eq!(device.has_just(0, &[]), !is_accessed || len == 0);
        }
    }

    #[test]
    fn tells_whether_the_last_granule_is_all_ones() {
        let words = Words::new(CpuFeatures::detect());
        let mut device = Bytes([0xff; SIZE]);
        let mut ram = Bytes::data();
        let mut read = |device: &mut Bytes, offset, len| {
            let dst = ram.slice().range(0, len);
            dst.and_then(|dst| words.read(device.slice(), offset, dst))
        };

        assert_eq!(read(&mut device, 0, 0), Some(Answer::Device));
        for len in 1..=64 {
            for offset in 0..=16 {
                assert_eq!(read(&mut device, offset, len), Some(Answer::AllOnes));
            }
        }

        // The other bytes of the granule count, too, and no other granule does.
        assert!(words.zero(device.slice(), 15, 1));
        words.fence();
        for (offset, len, answer) in [
            (0, 8, Answer::AllOnes),
            (0, 9, Answer::Device),
            (8, 1, Answer::Device),
            (3, 13, Answer::Device),
            (3, 14, Answer::AllOnes),
            (15, 2, Answer::AllOnes),
            (16, 1, Answer::AllOnes),
        ] {
            assert_eq!(read(&mut device, offset, len), Some(answer));
        }

        assert_eq!(words.drain(device.slice(), 0), Some(Answer::AllOnes));
        assert_eq!(words.drain(device.slice(), 8), Some(Answer::Device));
        for offset in [1, 7, 9, SIZE as u64 - 7, SIZE as u64, u64::MAX] {
            assert_eq!(words.drain(device.slice(), offset), None);
        }
    }
}
