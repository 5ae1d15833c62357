// SPDX-License-Identifier: GPL-2.0-only

//! The default of architectures without a machine of their own: right bytes, and no durability in
//! memory that is cached write-back, as no line is written back.
//!
//! In other memory there is no dirty line, and a barrier is enough.

use super::{
    words::Bus,
    CpuFeatures,
    Machine,
    Source,
    Way, //
};
use core::sync::atomic::{
    fence,
    AtomicU64,
    Ordering, //
};

/// A `T` at any address.
#[repr(C, packed)]
struct Unaligned<T>(T);

/// Stores through the cache and never writes back.
#[derive(Clone, Copy, Debug)]
pub struct Generic;

impl Generic {
    /// There is nothing to choose.
    pub const fn new(_cpu: CpuFeatures) -> Self {
        Self
    }

    /// There is nothing to ask for.
    pub fn detect() -> CpuFeatures {
        CpuFeatures::default()
    }

    /// Stores `count` values of `T` at `dst`.
    ///
    /// # Safety
    ///
    /// `dst` and `src` must be valid, as said at [`Machine`], `dst` must be aligned for `T`, and
    /// zero must be a value of `T`, as each pattern of bits must be.
    #[inline]
    unsafe fn put<T: Default>(dst: *mut u8, src: Source, count: usize) {
        let dst = dst.cast::<T>();

        for i in 0..count {
            let value = match src {
                Source::Zeros => T::default(),
                // SAFETY: By the safety contract of this function, `src` is valid for `count` of
                // `T`, and any address is aligned for `Unaligned`.
                Source::Memory(src) => unsafe {
                    src.cast::<Unaligned<T>>().wrapping_add(i).read_volatile().0
                },
            };
            // SAFETY: By the safety contract of this function.
            unsafe { dst.wrapping_add(i).write_volatile(value) };
        }
    }
}

impl Machine for Generic {
    const DURABLE: bool = false;

    fn name(self, _way: Way) -> &'static str {
        "generic"
    }

    #[inline]
    unsafe fn store(self, dst: *mut u8, src: Source, len: usize) {
        // SAFETY: By the safety contract of this function.
        unsafe { Self::put::<u8>(dst, src, len) }
    }

    #[inline]
    unsafe fn store_granule(self, dst: *mut u8, value: u64) {
        // SAFETY: By the safety contract of this function.
        unsafe { AtomicU64::from_ptr(dst.cast()) }.store(value, Ordering::Release);
    }

    #[inline]
    unsafe fn store_granules(self, dst: *mut u8, src: Source, granules: usize) {
        // SAFETY: By the safety contract of this function.
        unsafe { Self::put::<u64>(dst, src, granules) }
    }

    #[inline]
    unsafe fn stream_half(self, dst: *mut u8, src: Source) {
        // SAFETY: By the safety contract of this function.
        unsafe { Self::put::<u32>(dst, src, 1) }
    }

    #[inline]
    unsafe fn stream(self, dst: *mut u8, src: Source, granules: usize) {
        // SAFETY: By the safety contract of this function.
        unsafe { Self::put::<u64>(dst, src, granules) }
    }

    #[inline]
    unsafe fn write_back(self, _addr: *const u8) {}

    #[inline]
    fn fence(self) {
        // It keeps the order that others see. In memory that is cached write-back, that is all there
        // is to keep.
        fence(Ordering::SeqCst);

        // On Arm, that is a DMB, which waits for nothing. A DSB waits until what was stored to
        // memory that is not cached has got there.
        #[cfg(target_arch = "aarch64")]
        // SAFETY: It has no effect but order.
        unsafe {
            core::arch::asm!("dsb st", options(nostack, preserves_flags));
        }
    }
}

impl Bus for Generic {
    #[inline]
    unsafe fn load_granules(self, dst: *mut u8, src: *const u8, granules: usize) {
        let src = src.cast::<u64>();
        let dst = dst.cast::<Unaligned<u64>>();

        wait_for_loads_and_stores();
        for i in 0..granules {
            // SAFETY: By the safety contract of this function, by which `src` is aligned; any
            // address is for `Unaligned`.
            unsafe {
                let granule = src.wrapping_add(i).read_volatile();
                dst.wrapping_add(i).write_volatile(Unaligned(granule));
            }
        }
    }

    #[inline]
    unsafe fn load_through(self, src: *const u8) -> u64 {
        wait_for_loads_and_stores();
        // SAFETY: By the safety contract of this function.
        let granule = unsafe { src.cast::<u64>().read_volatile() };
        wait_for_loads_and_stores();

        granule
    }
}

/// Keeps the order of all loads and stores, as others see it, and on Arm waits until they are done:
/// those of memory that is not cached have then got there.
#[inline]
fn wait_for_loads_and_stores() {
    fence(Ordering::SeqCst);

    #[cfg(target_arch = "aarch64")]
    // SAFETY: It has no effect but order.
    unsafe {
        core::arch::asm!("dsb sy", options(nostack, preserves_flags));
    }
}
