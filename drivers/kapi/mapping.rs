// SPDX-License-Identifier: GPL-2.0-only

//! Ranges of physical addresses that the kernel can access: with struct pages or without.
//!
//! C headers: [`include/linux/memremap.h`](srctree/include/linux/memremap.h),
//! [`include/linux/io.h`](srctree/include/linux/io.h)

use super::{
    bindings,
    numa::Node,
    region::Region, //
};
use crate::pmem_core::persist::{
    Cache,
    VolatileSlice, //
};
use core::ptr::NonNull;
use kernel::{
    error::from_err_ptr,
    page::PAGE_SIZE,
    prelude::*,
    sync::Arc,
    types::Opaque, //
};

/// How a range is mapped, and so how the mapping goes.
enum Kind {
    /// By `memremap_pages()`, which has accepted this.
    Pages(Pin<KBox<Opaque<bindings::dev_pagemap>>>),
    /// By `memremap()`.
    Memory,
    /// By `ioremap()`.
    Io,
}

/// The bytes of each of this kernel's struct pages.
pub(crate) const STRUCT_PAGE_SIZE: u64 = size_of::<bindings::page>() as u64;

/// Makes sure that the struct pages of `size` bytes fit in memory that is available, with some to
/// spare for page tables and for who else needs memory meanwhile.
///
/// The kernel does not give back the struct pages that it has made of a range when there is no memory
/// for the others. So this is asked before, which is not exact, and leaves less to that case.
///
/// # Errors
///
/// `ENOMEM`.
pub(super) fn check_struct_pages(size: u64) -> Result {
    let wanted = (size / PAGE_SIZE as u64).saturating_mul(STRUCT_PAGE_SIZE);
    // SAFETY: Reads counters.
    let pages = unsafe { bindings::si_mem_available() };
    let available = u64::try_from(pages)
        .unwrap_or(0)
        .saturating_mul(PAGE_SIZE as u64);
    if wanted.saturating_add(wanted / 8) > available {
        return Err(ENOMEM);
    }
    Ok(())
}

/// Room at the start of a range for its own struct pages.
#[derive(Clone, Copy)]
pub(crate) struct Altmap {
    /// The bytes before the room, which are left alone; a multiple of the page size.
    pub(crate) kept: u64,
    /// The bytes of the range that nobody else uses, those that are kept included.
    pub(crate) size: u64,
}

/// A part of a [`Region`] that is mapped.
///
/// # Invariants
///
/// The `size` bytes at `start` are mapped at `addr`, in the way of `kind`, until that is undone.
pub(crate) struct Mapping {
    kind: Kind,
    addr: NonNull<u8>,
    start: u64,
    size: u64,
    // Released after the mapping is gone: fields are dropped after `drop()`.
    _region: Arc<Region>,
}

// SAFETY: The mapping is global, and its memory is given out as `VolatileSlice` alone.
unsafe impl Send for Mapping {}

// SAFETY: As for `Send`.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the `size` bytes at `start` of `region` write-back, with struct pages for a DAX file
    /// system; these are in the memory of `node`.
    ///
    /// With `altmap`, they are on the range itself, and the mapping is what follows the room for
    /// them. The kernel puts those of whole sections, 128 MiB, there; those of what is left before
    /// the first and after the last one are in the memory of `node` all the same.
    ///
    /// # Errors
    ///
    /// - `EINVAL`: the range is not inside of `region`, or it or what follows the room is not a
    ///   multiple of what the kernel maps at once, 2 MiB.
    /// - `ENOMEM`: no memory for the struct pages or the page tables.
    /// - `ENXIO`: a part of the range is System RAM.
    pub(crate) fn with_pages(
        region: Arc<Region>,
        start: u64,
        size: u64,
        altmap: Option<Altmap>,
        node: Node,
    ) -> Result<Self> {
        // SAFETY: Computed from constants.
        let align = u64::try_from(unsafe { bindings::memremap_compat_align() })?;
        let last = last(&region, start, size)?;
        let room = altmap.map_or(0, |altmap| altmap.size);
        let rest = size
            .checked_sub(room)
            .filter(|&rest| rest != 0)
            .ok_or(EINVAL)?;
        if altmap.is_some_and(|Altmap { kept, size }| kept >= size) {
            return Err(EINVAL);
        }
        if (start | size | room) & (align.wrapping_sub(1)) != 0 {
            return Err(EINVAL);
        }

        if altmap.is_none() {
            check_struct_pages(size)?;
        }
        let mut pgmap = bindings::dev_pagemap {
            type_: bindings::memory_type_MEMORY_DEVICE_FS_DAX,
            nr_range: 1,
            ..Default::default()
        };
        if let Some(Altmap { kept, size }) = altmap {
            let pages = |bytes: u64| usize::try_from(bytes / PAGE_SIZE as u64);
            pgmap.flags |= bindings::PGMAP_ALTMAP_VALID;
            pgmap.altmap = bindings::vmem_altmap {
                base_pfn: pages(start)?,
                end_pfn: pages(last)?,
                reserve: pages(kept)?,
                free: pages(size.wrapping_sub(kept))?,
                ..Default::default()
            };
        }
        // SAFETY: With `nr_range` 1 this is the member of the union that is in use.
        *unsafe { pgmap.__bindgen_anon_1.range.as_mut() } = bindings::range { start, end: last };
        let pgmap = KBox::pin(Opaque::new(pgmap), GFP_KERNEL)?;

        // SAFETY: `pgmap` is initialized, and pinned until `memunmap_pages()`. The range is
        // claimed by `region`, so that nobody else has a mapping that this one could conflict
        // with. `Node` is online. The kernel writes to the room of `altmap` alone, which its owner
        // does not access.
        let addr = from_err_ptr(unsafe { bindings::memremap_pages(pgmap.get(), node.id()) })?;
        let addr = addr.cast::<u8>().wrapping_add(usize::try_from(room)?);

        // INVARIANT: Just mapped, and `room` is less than `size`.
        Ok(Mapping {
            kind: Kind::Pages(pgmap),
            addr: NonNull::new(addr).ok_or(ENOMEM)?,
            start: start.wrapping_add(room),
            size: rest,
            _region: region,
        })
    }

    /// Maps the `size` bytes at `start` of `region` as `cache` says, without struct pages.
    ///
    /// # Errors
    ///
    /// - `EINVAL`: the range is not inside of `region`.
    /// - `ENOMEM`: no memory for the page tables, or no addresses; or the range is mapped in another
    ///   way already.
    pub(crate) fn without_pages(
        region: Arc<Region>,
        start: u64,
        size: u64,
        cache: Cache,
    ) -> Result<Self> {
        last(&region, start, size)?;
        let flags = match cache {
            Cache::WriteBack => Some(bindings::PMEM_CONST_MEMREMAP_WB),
            Cache::WriteThrough => Some(bindings::PMEM_CONST_MEMREMAP_WT),
            Cache::WriteCombining => Some(bindings::PMEM_CONST_MEMREMAP_WC),
            Cache::Uncached => None,
        };
        // SAFETY: The range is claimed by `region`, so that it is memory of a device, which nobody
        // else has a mapping of that this one could conflict with.
        let addr = unsafe {
            match flags {
                Some(flags) => bindings::memremap(start, usize::try_from(size)?, flags),
                None => bindings::ioremap(start, usize::try_from(size)?),
            }
        };

        // INVARIANT: Just mapped, if it is not null.
        Ok(Mapping {
            kind: match flags {
                Some(_) => Kind::Memory,
                None => Kind::Io,
            },
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

impl Drop for Mapping {
    fn drop(&mut self) {
        let addr = self.addr.as_ptr().cast();
        // SAFETY: By the type invariant.
        unsafe {
            match &self.kind {
                // Waits until nobody has a reference to one of the pages.
                Kind::Pages(pgmap) => bindings::memunmap_pages(pgmap.get()),
                Kind::Memory => bindings::memunmap(addr),
                Kind::Io => bindings::iounmap(addr),
            }
        }
    }
}

/// The last of `size` bytes from `start` on, if all of them are in `region`.
fn last(region: &Region, start: u64, size: u64) -> Result<u64> {
    let last = size
        .checked_sub(1)
        .and_then(|n| start.checked_add(n))
        .ok_or(EINVAL)?;
    // A region has at least one byte and does not wrap.
    let region_last = region.start().wrapping_add(region.size().wrapping_sub(1));
    if start < region.start() || last > region_last {
        return Err(EINVAL);
    }
    Ok(last)
}
