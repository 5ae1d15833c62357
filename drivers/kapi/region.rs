// SPDX-License-Identifier: GPL-2.0-only

//! Ranges of the physical address space: what is there, and the claim to one.
//!
//! C header: [`include/linux/ioport.h`](srctree/include/linux/ioport.h)

use super::bindings;
use core::ptr::{
    addr_of_mut,
    NonNull, //
};
use kernel::{
    error::to_result,
    prelude::*, //
};

/// Returns whether any byte of the `size` bytes at `start` is System RAM.
pub(crate) fn meets_system_ram(start: u64, size: u64) -> Result<bool> {
    let size = usize::try_from(size)?;
    // SAFETY: Walks the resource tree under its own lock; any range will do.
    let found = unsafe {
        bindings::region_intersects(
            start,
            size,
            bindings::IORESOURCE_SYSTEM_RAM as c_ulong,
            bindings::IORES_DESC_NONE as c_ulong,
        )
    };
    Ok(found != bindings::REGION_DISJOINT as c_int)
}

/// Returns the first and the last byte that the kernel can map and have struct pages for.
pub(crate) fn mappable() -> (u64, u64) {
    // SAFETY: Computed from constants and CPU features.
    let range = unsafe { bindings::mhp_get_pluggable_range(true) };
    (range.start, range.end)
}

/// Returns the ranges that the firmware's memory map says are persistent memory of type 12, or
/// `memmap=nn!ss` on the kernel's command line: the first byte of each, and its length.
///
/// # Errors
///
/// `ENOMEM`.
pub(crate) fn legacy_persistent_memory() -> Result<KVec<(u64, u64)>> {
    /// # Safety
    ///
    /// `found` is the list, and `resource` valid.
    unsafe extern "C" fn add(resource: *mut bindings::resource, found: *mut c_void) -> c_int {
        // SAFETY: By the function's contract; nobody else has the list meanwhile.
        let (resource, found) = unsafe { (&*resource, &mut *found.cast::<KVec<(u64, u64)>>()) };
        let beyond = resource.end.wrapping_sub(resource.start);
        match found.push((resource.start, beyond.wrapping_add(1)), GFP_KERNEL) {
            Ok(()) => 0,
            Err(error) => Error::from(error).to_errno(),
        }
    }

    let mut found = KVec::new();
    // SAFETY: Calls `add()` with the list and copies of resources, without a lock.
    let ret = unsafe {
        bindings::walk_iomem_res_desc(
            bindings::IORES_DESC_PERSISTENT_MEMORY_LEGACY as c_ulong,
            bindings::IORESOURCE_MEM as c_ulong,
            0,
            u64::MAX,
            (&raw mut found).cast(),
            Some(add),
        )
    };
    // It says EINVAL when there is none.
    match to_result(ret) {
        Err(error) if error != EINVAL => Err(error),
        _ => Ok(found),
    }
}

/// A range of physical addresses that nobody else can claim.
///
/// It is shown in `/proc/iomem` under its name. User space may still map it.
///
/// # Invariants
///
/// The range is `resource`, requested by `new()` and not released. It is busy, or open for memory.
pub(crate) struct Region {
    resource: NonNull<bindings::resource>,
    start: u64,
    size: u64,
}

// SAFETY: The resource is in a tree with a lock of its own, and stays there until `drop()`.
unsafe impl Send for Region {}

// SAFETY: As for `Send`.
unsafe impl Sync for Region {}

impl Region {
    /// Claims the `size` bytes at `start` under `name`.
    ///
    /// # Errors
    ///
    /// `EBUSY` when a part of the range is claimed already.
    pub(crate) fn new(start: u64, size: u64, name: &'static CStr) -> Result<Self> {
        // SAFETY: `iomem_resource` is the root of the tree, which has a lock of its own; the name
        // lives as long as this module, which releases the range in `drop()`.
        let resource = unsafe {
            bindings::__request_region(
                addr_of_mut!(bindings::iomem_resource),
                start,
                size,
                name.as_char_ptr(),
                0,
            )
        };
        // INVARIANT: The request was granted.
        Ok(Region {
            resource: NonNull::new(resource).ok_or(EBUSY)?,
            start,
            size,
        })
    }

    /// Lets System RAM be a part of the range, which nobody else can claim all the same; or, when
    /// it is gone, no more.
    pub(super) fn open_for_memory(&self, open: bool) {
        let flags = if open {
            // Without the flags of the parent, which mean something else there.
            bindings::IORESOURCE_SYSTEM_RAM
        } else {
            bindings::IORESOURCE_MEM | bindings::IORESOURCE_BUSY
        };
        // SAFETY: By the type invariant. Who walks the tree meanwhile sees one or the other.
        unsafe { (*self.resource.as_ptr()).flags = flags as c_ulong };
    }

    /// Address of the first byte.
    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    /// Length in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the range was requested, and this is its only release.
        unsafe {
            bindings::__release_region(
                addr_of_mut!(bindings::iomem_resource),
                self.start,
                self.size,
            )
        };
    }
}
