// SPDX-License-Identifier: GPL-2.0-only

//! What a power loss could leave of a change, at each fence of it.

use pmem_core::persist::{
    model::Memory,
    Machine,
    Persist,
    Source,
    VolatileSlice,
    Way, //
};
use std::cell::Cell;

/// A memory that says when it is fenced, with all that a power loss could lose until then, or that
/// is not fenced at all.
#[derive(Clone, Copy)]
pub struct Watched<'a> {
    pub memory: &'a Memory,
    pub before_fence: Option<&'a dyn Fn()>,
}

impl Machine for Watched<'_> {
    const DURABLE: bool = true;

    fn name(self, _way: Way) -> &'static str {
        "watched"
    }

    unsafe fn store(self, dst: *mut u8, src: Source, len: usize) {
        // SAFETY: By the safety contract of this function.
        unsafe { self.memory.store(dst, src, len) }
    }

    unsafe fn store_granule(self, dst: *mut u8, value: u64) {
        // SAFETY: By the safety contract of this function.
        unsafe { self.memory.store_granule(dst, value) }
    }

    unsafe fn store_granules(self, dst: *mut u8, src: Source, granules: usize) {
        // SAFETY: By the safety contract of this function.
        unsafe { self.memory.store_granules(dst, src, granules) }
    }

    unsafe fn stream_half(self, dst: *mut u8, src: Source) {
        // SAFETY: By the safety contract of this function.
        unsafe { self.memory.stream_half(dst, src) }
    }

    unsafe fn stream(self, dst: *mut u8, src: Source, granules: usize) {
        // SAFETY: By the safety contract of this function.
        unsafe { self.memory.stream(dst, src, granules) }
    }

    unsafe fn write_back(self, addr: *const u8) {
        // SAFETY: By the safety contract of this function.
        unsafe { self.memory.write_back(addr) }
    }

    fn fence(self) {
        if let Some(before_fence) = self.before_fence {
            before_fence();
            self.memory.fence();
        }
    }
}

/// Runs `change` on a memory with this image, and `check`s what a power loss could leave at any
/// time, each time up to `limit` images. Returns what is there in the end, and how many were seen.
pub fn each_power_loss(
    image: &[u8],
    limit: usize,
    change: impl Fn(&Persist<Watched<'_>>, VolatileSlice<'_>),
    check: impl Fn(&[u8]),
) -> (Vec<u8>, usize) {
    let memory = Memory::boot(image);
    let seen = Cell::new(0);
    let look = || {
        for image in memory.crash_images(limit, seen.get() as u64) {
            check(&image);
            seen.set(seen.get() + 1);
        }
    };

    let machine = Watched {
        memory: &memory,
        before_fence: Some(&look),
    };
    change(&Persist::on(machine), memory.slice());
    look();
    let left = memory.durable();
    assert_eq!(
        left,
        memory.read(0, memory.len()),
        "not all of it is durable"
    );
    (left, seen.get())
}
