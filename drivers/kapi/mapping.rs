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
use crate::pmem_core::{
    extent::{
        Extent,
        Pfn,
        PAGE_SIZE, //
    },
    persist::{
        Cache,
        VolatileSlice, //
    }, //
};
use core::ptr::{
    null_mut,
    NonNull, //
};
use kernel::{
    error::{
        from_err_ptr,
        from_result,
        to_result, //
    },
    ffi::{
        c_int,
        c_ulong, //
    },
    prelude::*,
    sync::Arc,
    types::Opaque, //
};

/// What memory management says of a failure, to hand on as it is.
#[derive(Clone, Copy)]
pub(crate) struct FailureFlags(pub(super) c_int);

#[cfg(CONFIG_KUNIT = "y")]
impl FailureFlags {
    /// Nothing is said.
    pub(crate) const NONE: Self = FailureFlags(0);
}

/// Who is told that memory of a mapping has failed.
pub(crate) trait Failures: Send + Sync {
    /// The `len` bytes at `offset` of the mapping, which are whole pages, cannot be read any more.
    ///
    /// Called while the range is being mapped, while it is, and while it is being unmapped; may
    /// sleep. When it returns, the kernel may unmap the pages from its own address space.
    ///
    /// # Errors
    ///
    /// - `EOPNOTSUPP`: memory management is to kill the processes that have mapped the pages.
    /// - Others: the failure could not be dealt with, which is logged.
    fn memory_failure(&self, offset: u64, len: u64, flags: FailureFlags) -> Result;
}

/// What `memremap_pages()` gets.
///
/// # Invariants
///
/// The `owner` of `map` is this.
struct Pagemap {
    map: Opaque<bindings::dev_pagemap>,
    /// Where the mapping starts, after the room for struct pages.
    start: u64,
    failures: Arc<dyn Failures>,
}

impl Pagemap {
    const OPS: &'static bindings::dev_pagemap_ops = &bindings::dev_pagemap_ops {
        memory_failure: Some(Self::memory_failure),
        ..pin_init::zeroed()
    };

    /// # Safety
    ///
    /// Called by memory management on the `map` of a `Pagemap`, which lives until
    /// `memunmap_pages()` has waited for this.
    unsafe extern "C" fn memory_failure(
        map: *mut bindings::dev_pagemap,
        pfn: c_ulong,
        count: c_ulong,
        flags: c_int,
    ) -> c_int {
        // SAFETY: By the function's contract and the type invariant.
        let this = unsafe { &*(*map).owner.cast::<Self>() };
        from_result(|| {
            let offset = (pfn as u64)
                .checked_mul(PAGE_SIZE)
                .and_then(|phys| phys.checked_sub(this.start))
                .ok_or(ENXIO)?;
            let len = (count as u64).checked_mul(PAGE_SIZE).ok_or(ENXIO)?;
            this.failures
                .memory_failure(offset, len, FailureFlags(flags))?;
            Ok(0)
        })
    }
}

/// How the bytes of a mapping are reached, and so how that goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Window {
    /// By the mapping that comes with struct pages.
    Pages,
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
    let wanted = (size / PAGE_SIZE).saturating_mul(STRUCT_PAGE_SIZE);
    // SAFETY: Reads counters.
    let pages = unsafe { bindings::si_mem_available() };
    let available = u64::try_from(pages).unwrap_or(0).saturating_mul(PAGE_SIZE);
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
/// The `size` bytes at `start` are mapped at `addr`, in the way of `window`, until that is undone. They
/// have struct pages if there are `pages`, which `memremap_pages()` has accepted.
pub(crate) struct Mapping {
    window: Window,
    pages: Option<Pin<KBox<Pagemap>>>,
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
    /// system; these are in the memory of `node`. `failures` is told when memory of it fails.
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
        failures: Arc<dyn Failures>,
    ) -> Result<Self> {
        let (pages, addr) = map_pages(&region, start, size, altmap, node, failures)?;
        let room = altmap.map_or(0, |altmap| altmap.size);

        // INVARIANT: Just mapped, and `room` is less than `size`.
        Ok(Mapping {
            window: Window::Pages,
            pages: Some(pages),
            addr,
            start: start.wrapping_add(room),
            size: size.wrapping_sub(room),
            _region: region,
        })
    }

    /// Maps the `size` bytes at `start` of `region` as `cache` says, and gives them struct pages as
    /// [`with_pages`](Self::with_pages) does.
    ///
    /// For these the kernel maps them once more, at addresses that nobody gets from here. What it
    /// remembers of a range on x86, its memory type, keeps it from mapping the same bytes in two ways:
    /// both are mapped as `cache` says, or in a way that caches less.
    ///
    /// # Errors
    ///
    /// Those of [`with_pages`](Self::with_pages) and [`without_pages`](Self::without_pages).
    pub(crate) fn with_pages_beside(
        region: Arc<Region>,
        start: u64,
        size: u64,
        cache: Cache,
        node: Node,
        failures: Arc<dyn Failures>,
    ) -> Result<Self> {
        let mut mapping = Self::without_pages(region.clone(), start, size, cache)?;
        let (pages, _) = map_pages(&region, start, size, None, node, failures)?;
        mapping.pages = Some(pages);
        Ok(mapping)
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
            window: match flags {
                Some(_) => Window::Memory,
                None => Window::Io,
            },
            pages: None,
            addr: NonNull::new(addr.cast()).ok_or(ENOMEM)?,
            start,
            size,
            _region: region,
        })
    }

    /// Whether the memory has struct pages.
    pub(crate) fn has_pages(&self) -> bool {
        self.pages.is_some()
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

impl Mapping {
    /// Where `part` begins in the mapping, of which it is a part.
    pub(crate) fn offset_of(&self, part: VolatileSlice<'_>) -> u64 {
        part.as_ptr().addr().wrapping_sub(self.addr.addr().get()) as u64
    }

    /// The frames of the pages that `extent` has bytes of, if there are struct pages.
    fn frames(&self, extent: Extent) -> core::ops::Range<u64> {
        if !self.has_pages() || self.slice(extent.offset(), extent.len()).is_none() {
            return 0..0;
        }
        // The mapping does not reach beyond the last address.
        let first = self.start.wrapping_add(extent.offset());
        let end = self.start.wrapping_add(extent.end());
        Pfn::containing(first).0..end.div_ceil(PAGE_SIZE)
    }

    /// Lets the kernel access the pages of `extent`, from which it may have been kept because their
    /// memory failed. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`: no memory for page tables. Some of the pages may be accessible.
    pub(crate) fn make_accessible(&self, extent: Extent) -> Result {
        for pfn in self.frames(extent) {
            // SAFETY: The page is of this mapping, which is where it would be mapped.
            to_result(unsafe { bindings::pmem_helper_clear_mce_nospec(pfn as c_ulong) })?;
        }
        Ok(())
    }

    /// Takes the mark of failed memory off the pages of `extent`.
    pub(crate) fn clear_poison(&self, extent: Extent) {
        for pfn in self.frames(extent) {
            // SAFETY: It has a struct page, as there are `pages`.
            unsafe { bindings::pmem_helper_clear_page_hwpoison(pfn as c_ulong) };
        }
    }

    /// Keeps the kernel from the pages of `extent`, as it does when their memory has failed.
    ///
    /// Whoever accesses them then faults, unless it is [`mc::copy`](super::mc::copy), so that only
    /// a test of that and of [`make_accessible`](Self::make_accessible) may do this. Returns
    /// whether it was done: on a CPU on which that copy would not survive, it is not.
    #[cfg(CONFIG_KUNIT = "y")]
    pub(crate) fn make_inaccessible(&self, extent: Extent) -> Result<bool> {
        // SAFETY: Looks at CPU features.
        if !unsafe { bindings::pmem_helper_copy_survives_faults() } {
            return Ok(false);
        }
        for pfn in self.frames(extent) {
            // SAFETY: The page is of this mapping, which only tests use that know of it.
            to_result(unsafe { bindings::pmem_helper_set_mce_nospec(pfn as c_ulong) })?;
        }
        Ok(true)
    }
}

impl Mapping {
    /// Takes the pages away from the files that have them in DAX mappings, and waits for who uses
    /// them. Processes that have mapped such a file get SIGBUS from then on.
    ///
    /// The kernel itself does not wait for them when it unmaps the range, and of the file systems not
    /// all take their pages back when their disk goes. None gets a page any more: the DAX device was
    /// killed.
    fn revoke(&self) {
        const PAUSE_MS: u32 = 10;
        const PATIENCE: u32 = 100;

        let first = Pfn::containing(self.start).0;
        // The mapping does not reach beyond the last address.
        let end = self.start.wrapping_add(self.size).div_ceil(PAGE_SIZE);
        let mut rounds: u32 = 0;
        loop {
            let mut used = false;
            let mut next = first;
            while next < end {
                let mut inode = null_mut();
                // SAFETY: All frames of the mapping have struct pages, as there are `pages`, and
                // `inode` can be written.
                let page = unsafe {
                    bindings::pmem_helper_next_dax_page(next as c_ulong, end as c_ulong, &mut inode)
                };
                next = (page as u64).saturating_add(1);
                used |= (page as u64) < end;
                if !inode.is_null() {
                    // SAFETY: There is a reference, which is given back.
                    unsafe {
                        bindings::pmem_helper_break_dax_layout(inode);
                        bindings::iput(inode);
                    }
                }
            }
            if !used {
                return;
            }
            rounds = rounds.saturating_add(1);
            if rounds == PATIENCE {
                pr_warn!("waiting for pages that several files share: unmount their file system\n");
            }
            // SAFETY: Sleeping is allowed here.
            unsafe { bindings::msleep(PAUSE_MS) };
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.has_pages() {
            self.revoke();
        }
        let addr = self.addr.as_ptr().cast();
        // SAFETY: By the type invariant.
        unsafe {
            if let Some(pages) = &self.pages {
                bindings::memunmap_pages(pages.map.get());
            }
            match self.window {
                Window::Pages => {}
                Window::Memory => bindings::memunmap(addr),
                Window::Io => bindings::iounmap(addr),
            }
        }
    }
}

/// Maps the `size` bytes at `start` of `region` with struct pages, see [`Mapping::with_pages`], and
/// returns what keeps them mapped, and where the bytes are that follow the room of `altmap`.
fn map_pages(
    region: &Region,
    start: u64,
    size: u64,
    altmap: Option<Altmap>,
    node: Node,
    failures: Arc<dyn Failures>,
) -> Result<(Pin<KBox<Pagemap>>, NonNull<u8>)> {
    // SAFETY: Computed from constants.
    let align = u64::try_from(unsafe { bindings::memremap_compat_align() })?;
    let last = last(region, start, size)?;
    let room = altmap.map_or(0, |altmap| altmap.size);
    if room >= size {
        return Err(EINVAL);
    }
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
        ops: Pagemap::OPS,
        ..Default::default()
    };
    if let Some(Altmap { kept, size }) = altmap {
        let pages = |bytes: u64| usize::try_from(bytes / PAGE_SIZE);
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
    let pgmap = Pagemap {
        map: Opaque::new(pgmap),
        start: start.wrapping_add(room),
        failures,
    };
    let pgmap = KBox::pin(pgmap, GFP_KERNEL)?;
    // INVARIANT: It is pinned, and nobody else knows it yet.
    // SAFETY: As above.
    unsafe { (*pgmap.map.get()).owner = (&raw const *pgmap).cast_mut().cast() };

    // SAFETY: `pgmap` is initialized, and pinned until `memunmap_pages()`. The range is
    // claimed by `region`, so that nobody else has a mapping that this one could conflict
    // with. `Node` is online. The kernel writes to the room of `altmap` alone, which its owner
    // does not access.
    let addr = from_err_ptr(unsafe { bindings::memremap_pages(pgmap.map.get(), node.id()) })?;
    let addr = addr.cast::<u8>().wrapping_add(usize::try_from(room)?);
    Ok((pgmap, NonNull::new(addr).ok_or(ENOMEM)?))
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
