// SPDX-License-Identifier: GPL-2.0-only

//! Device memory with struct pages.
//!
//! C header: [`include/linux/memremap.h`](srctree/include/linux/memremap.h)

use super::{
    bindings,
    numa::Node,
    region::Region, //
};
use crate::pmem_core::persist::VolatileSlice;
use core::ptr::NonNull;
use kernel::{
    error::from_err_ptr,
    prelude::*,
    sync::Arc,
    types::Opaque, //
};

/// A part of a [`Region`], mapped write-back cacheable, with struct pages for a DAX file system.
///
/// # Invariants
///
/// `pgmap` was accepted by `memremap_pages()`; `addr` is where the `size` bytes at `start` are
/// mapped, until `memunmap_pages()`.
pub(crate) struct FsDax {
    pgmap: Pin<KBox<Opaque<bindings::dev_pagemap>>>,
    addr: NonNull<u8>,
    start: u64,
    size: u64,
    // Released after the mapping is gone: fields are dropped after `drop()`.
    _region: Arc<Region>,
}

// SAFETY: The mapping is global, and its memory is given out as `VolatileSlice` alone.
unsafe impl Send for FsDax {}

// SAFETY: As for `Send`.
unsafe impl Sync for FsDax {}

impl FsDax {
    /// Maps the `size` bytes at `start` of `region`; their struct pages are in the memory of
    /// `node`.
    ///
    /// # Errors
    ///
    /// - `EINVAL`: the range is not inside of `region`, or not a multiple of what the kernel maps
    ///   at once, 2 MiB.
    /// - `ENOMEM`: no memory for the struct pages or the page tables.
    /// - `ENXIO`: a part of the range is System RAM.
    pub(crate) fn new(region: Arc<Region>, start: u64, size: u64, node: Node) -> Result<Self> {
        // SAFETY: Computed from constants.
        let align = u64::try_from(unsafe { bindings::memremap_compat_align() })?;
        let last = size
            .checked_sub(1)
            .and_then(|n| start.checked_add(n))
            .ok_or(EINVAL)?;
        // A region has at least one byte and does not wrap.
        let region_last = region.start().wrapping_add(region.size().wrapping_sub(1));
        if start < region.start() || last > region_last || (start | size) & (align - 1) != 0 {
            return Err(EINVAL);
        }

        let mut pgmap = bindings::dev_pagemap {
            type_: bindings::memory_type_MEMORY_DEVICE_FS_DAX,
            nr_range: 1,
            ..Default::default()
        };
        // SAFETY: With `nr_range` 1 this is the member of the union that is in use.
        *unsafe { pgmap.__bindgen_anon_1.range.as_mut() } = bindings::range { start, end: last };
        let pgmap = KBox::pin(Opaque::new(pgmap), GFP_KERNEL)?;

        // SAFETY: `pgmap` is initialized, and pinned until `memunmap_pages()`. The range is
        // claimed by `region`, so that nobody else has a mapping that this one could conflict
        // with. `Node` is online.
        let addr = from_err_ptr(unsafe { bindings::memremap_pages(pgmap.get(), node.id()) })?;

        // INVARIANT: Just accepted.
        Ok(FsDax {
            pgmap,
            addr: NonNull::new(addr.cast()).ok_or(ENOMEM)?,
            start,
            size,
            _region: region,
        })
    }

    /// Physical address of the first byte.
    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    /// Length in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// The `len` bytes at `offset`, or nothing if they are not all inside of the mapping.
    #[inline]
    pub(crate) fn slice(&self, offset: u64, len: u64) -> Option<VolatileSlice<'_>> {
        if offset > self.size || len > self.size - offset {
            return None;
        }
        // SAFETY: By the type invariant, and just checked; 64-bit only, so that both fit.
        Some(unsafe { VolatileSlice::new(self.addr.as_ptr().add(offset as usize), len as usize) })
    }
}

impl Drop for FsDax {
    fn drop(&mut self) {
        // SAFETY: By the type invariant. Waits until nobody has a reference to one of the pages.
        unsafe { bindings::memunmap_pages(self.pgmap.get()) };
    }
}
