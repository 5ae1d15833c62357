// SPDX-License-Identifier: GPL-2.0-only

//! Block I/O requests as a bio-based driver gets them.
//!
//! C header: [`include/linux/bio.h`](srctree/include/linux/bio.h)

use super::{
    bindings,
    compat, //
};
use crate::pmem_core::{
    extent::{
        self,
        Sector, //
    },
    persist::VolatileSlice, //
};
use core::{
    marker::PhantomData,
    mem::ManuallyDrop,
    ptr::{
        null_mut,
        NonNull, //
    }, //
};
use kernel::ffi::c_ulong;

/// What a bio asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Op {
    /// Copy from the device to the bio's segments.
    Read,
    /// Copy from the bio's segments, which may be none, to the device.
    Write,
    /// Make all completed writes durable.
    Flush,
    /// Forget a range of the device.
    Discard,
    /// Zero a range of the device.
    WriteZeroes,
    /// Any other operation, by its `REQ_OP_` number.
    Other(u32),
}

/// What most bios ask for: what can be served at once, without a look at anything else.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Common {
    /// As [`Op::Read`].
    Read,
    /// As [`Op::Write`].
    Write,
    /// To make all completed writes durable, and nothing else.
    Flush,
}

/// How a bio ended.
///
/// C header: `blk_status_t` in [`include/linux/blk_types.h`](srctree/include/linux/blk_types.h)
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Status(bindings::blk_status_t);

impl Status {
    /// Done.
    pub(crate) const OK: Self = Status(bindings::BLK_STS_OK as bindings::blk_status_t);
    /// The device or its medium failed.
    pub(crate) const IOERR: Self = Status(bindings::PMEM_CONST_BLK_STS_IOERR);
    /// There is no room for the data.
    pub(crate) const NOSPC: Self = Status(bindings::PMEM_CONST_BLK_STS_NOSPC);
    /// The bio may not sleep, and would have to.
    pub(crate) const AGAIN: Self = Status(bindings::PMEM_CONST_BLK_STS_AGAIN);
    /// The device does not do this.
    pub(crate) const NOTSUPP: Self = Status(bindings::PMEM_CONST_BLK_STS_NOTSUPP);
}

/// A bio that was handed to the driver and is not completed yet.
///
/// It is completed exactly once: by [`Bio::end`] or, if it is lost on the way, with an error when
/// it is dropped.
///
/// # Invariants
///
/// Points to a `struct bio` that was passed to `submit_bio()`, and on which `bio_endio()` was not
/// called.
pub(crate) struct Bio(NonNull<bindings::bio>);

// SAFETY: A bio belongs to the driver from submission to completion, in whatever context.
unsafe impl Send for Bio {}

impl Bio {
    /// Takes over a bio.
    ///
    /// # Safety
    ///
    /// `bio` was passed to the driver's `submit_bio()`, and nobody else completes it.
    #[inline]
    pub(super) unsafe fn from_raw(bio: NonNull<bindings::bio>) -> Self {
        // INVARIANT: By the function's contract.
        Bio(bio)
    }

    #[inline]
    fn raw(&self) -> &bindings::bio {
        // SAFETY: By the type invariant; the block layer does not change the fields that are read
        // here while the driver has the bio.
        unsafe { self.0.as_ref() }
    }

    /// The operation.
    #[inline]
    pub(crate) fn op(&self) -> Op {
        match self.raw().bi_opf & bindings::PMEM_CONST_REQ_OP_MASK {
            bindings::req_op_REQ_OP_READ => Op::Read,
            bindings::req_op_REQ_OP_WRITE => Op::Write,
            bindings::req_op_REQ_OP_FLUSH => Op::Flush,
            bindings::req_op_REQ_OP_DISCARD => Op::Discard,
            bindings::req_op_REQ_OP_WRITE_ZEROES => Op::WriteZeroes,
            other => Op::Other(other),
        }
    }

    /// What the bio asks for, unless it is more than one thing or is rare. What only says how, such as
    /// [`is_fua`](Self::is_fua), is not looked at.
    #[inline(always)]
    pub(crate) fn common(&self) -> Option<Common> {
        match (self.is_preflush(), self.op()) {
            (true, Op::Write) if self.size() == 0 => Some(Common::Flush),
            (false, Op::Write) => Some(Common::Write),
            (false, Op::Read) => Some(Common::Read),
            _ => None,
        }
    }

    /// Whether what was completed before is to be durable before this bio begins.
    #[inline]
    pub(crate) fn is_preflush(&self) -> bool {
        self.raw().bi_opf & bindings::PMEM_CONST_REQ_PREFLUSH != 0
    }

    /// Whether the bio is to be durable when it is completed.
    #[inline]
    pub(crate) fn is_fua(&self) -> bool {
        self.raw().bi_opf & bindings::PMEM_CONST_REQ_FUA != 0
    }

    /// What [`is_preflush`](Self::is_preflush) asks for is done.
    #[inline]
    pub(crate) fn clear_preflush(&mut self) {
        // SAFETY: By the type invariant the bio is ours, and `self` is borrowed alone.
        unsafe { self.0.as_mut().bi_opf &= !bindings::PMEM_CONST_REQ_PREFLUSH };
    }

    /// Whether the bio must not sleep.
    #[inline]
    pub(crate) fn is_nowait(&self) -> bool {
        self.raw().bi_opf & bindings::PMEM_CONST_REQ_NOWAIT != 0
    }

    /// Whether what is zeroed is to keep its place on the medium.
    #[inline]
    pub(crate) fn is_nounmap(&self) -> bool {
        self.raw().bi_opf & bindings::PMEM_CONST_REQ_NOUNMAP != 0
    }

    /// Where the bio begins on the disk (not on the partition).
    #[inline]
    pub(crate) fn sector(&self) -> Sector {
        Sector(self.raw().bi_iter.bi_sector)
    }

    /// Length in bytes.
    #[inline]
    pub(crate) fn size(&self) -> u32 {
        self.raw().bi_iter.bi_size
    }

    /// The memory of the bio, one item for each run of physically contiguous pages.
    #[inline]
    pub(crate) fn segments(&self) -> Segments<'_> {
        let bio = self.raw();
        Segments {
            vec: bio.bi_io_vec,
            left: bio.bi_iter.bi_size,
            idx: bio.bi_iter.bi_idx,
            skip: compat::bvec_offset(&bio.bi_iter),
            _bio: PhantomData,
        }
    }

    /// Whether the queue asks for I/O accounting (`queue/iostats` in sysfs).
    #[inline]
    pub(crate) fn is_accounted(&self) -> bool {
        // SAFETY: By the type invariant; a submitted bio has a block device, which has a queue for as
        // long as the bio lives.
        let features = unsafe { (*(*self.raw().bi_bdev).bd_queue).limits.features };
        features & bindings::PMEM_CONST_BLK_FEAT_IO_STAT != 0
    }

    /// Begins I/O accounting, if the queue asks for it.
    #[inline]
    pub(crate) fn start_accounting(&self) -> Option<Accounting> {
        if !self.is_accounted() {
            return None;
        }
        // SAFETY: By the type invariant.
        Some(Accounting(unsafe {
            bindings::bio_start_io_acct(self.0.as_ptr())
        }))
    }

    /// Ends what [`Bio::start_accounting`] began.
    #[inline]
    pub(crate) fn end_accounting(&self, accounting: Accounting) {
        // SAFETY: By the type invariant; `accounting` came from this bio's device.
        unsafe {
            bindings::bio_end_io_acct_remapped(self.0.as_ptr(), accounting.0, self.raw().bi_bdev)
        };
    }

    /// Completes the bio with `status`.
    #[inline]
    pub(crate) fn end(self, status: Status) {
        let bio = ManuallyDrop::new(self).0.as_ptr();
        // SAFETY: By the type invariant the bio is ours to complete, and `self` is gone after this.
        unsafe {
            if status != Status::OK {
                (*bio).bi_status = status.0;
            }
            bindings::bio_endio(bio);
        }
    }
}

impl Drop for Bio {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the bio is ours to complete, and `self` is gone after this.
        unsafe {
            self.0.as_mut().bi_status = Status::IOERR.0;
            bindings::bio_endio(self.0.as_ptr());
        }
    }
}

/// Bios in the order in which they were added, in a list that takes no memory of its own.
///
/// # Invariants
///
/// `ends` are the first and the last of bios that are linked by `bi_next`, the last one's being null.
/// The list has what a [`Bio`] has of each.
#[derive(Default)]
pub(crate) struct List {
    ends: Option<(NonNull<bindings::bio>, NonNull<bindings::bio>)>,
}

// SAFETY: As for `Bio`.
unsafe impl Send for List {}

impl List {
    /// Whether there is none.
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.ends.is_none()
    }

    /// Takes the first one.
    pub(crate) fn pop(&mut self) -> Option<Bio> {
        let (mut first, last) = self.ends?;
        // SAFETY: By the type invariants it is a bio of ours.
        let next = unsafe { core::mem::replace(&mut first.as_mut().bi_next, null_mut()) };
        // INVARIANT: The others stay linked.
        self.ends = NonNull::new(next).map(|next| (next, last));
        // INVARIANT: By the type invariants.
        Some(Bio(first))
    }

    /// Adds those of `later` at the end.
    pub(crate) fn append(&mut self, later: Self) {
        // INVARIANT: Its bios are in this list from now on.
        let later = ManuallyDrop::new(later);
        let Some((first, last)) = later.ends else {
            return;
        };
        // INVARIANT: The last one of these is followed by the first one of those.
        self.ends = match self.ends {
            None => Some((first, last)),
            Some((head, mut tail)) => {
                // SAFETY: By the type invariants it is a bio of ours.
                unsafe { tail.as_mut().bi_next = first.as_ptr() };
                Some((head, last))
            }
        };
    }
}

impl From<Bio> for List {
    fn from(bio: Bio) -> Self {
        let mut bio = ManuallyDrop::new(bio).0;
        // SAFETY: By the type invariant of `Bio` it is ours. To link it is the driver's, until it is
        // completed.
        unsafe { bio.as_mut().bi_next = null_mut() };
        // INVARIANT: It is linked to no other, and `bio` is gone.
        List {
            ends: Some((bio, bio)),
        }
    }
}

impl Drop for List {
    fn drop(&mut self) {
        while self.pop().is_some() {}
    }
}

/// Where the kernel has the memory of `page` mapped.
///
/// # Safety
///
/// `page` is a struct page, of memory that is mapped.
#[inline(always)]
#[cfg(all(target_arch = "x86_64", CONFIG_SPARSEMEM_VMEMMAP))]
unsafe fn page_address(page: *const bindings::page) -> *mut u8 {
    // As `page_address()`, which C keeps inline: a call would take as long as all of this. The struct
    // pages are one array from `vmemmap_base` on, and all memory is mapped from `page_offset_base` on.
    //
    // SAFETY: Both are constant once the kernel has booted.
    let (pages, memory) = unsafe { (bindings::vmemmap_base, bindings::page_offset_base) };
    let pfn = page.addr().wrapping_sub(pages) / size_of::<bindings::page>();
    core::ptr::with_exposed_provenance_mut((pfn << extent::PAGE_SHIFT).wrapping_add(memory))
}

/// Where the kernel has the memory of `page` mapped.
///
/// # Safety
///
/// `page` is a struct page, of memory that is mapped.
#[inline(always)]
#[cfg(not(all(target_arch = "x86_64", CONFIG_SPARSEMEM_VMEMMAP)))]
unsafe fn page_address(page: *const bindings::page) -> *mut u8 {
    // SAFETY: By the function's contract.
    unsafe { bindings::pmem_helper_page_address(page).cast() }
}

/// The time at which a bio's accounting began.
pub(crate) struct Accounting(c_ulong);

/// The memory of a bio, from [`Bio::segments`].
///
/// # Invariants
///
/// `vec[idx]` is valid while `left` is not 0, and `skip` is less than its length: what
/// `struct bvec_iter` promises.
pub(crate) struct Segments<'a> {
    vec: *const bindings::bio_vec,
    left: u32,
    idx: u32,
    skip: u32,
    _bio: PhantomData<&'a Bio>,
}

impl<'a> Iterator for Segments<'a> {
    type Item = VolatileSlice<'a>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        // SAFETY: By the type invariant.
        let vec = unsafe { &*self.vec.add(self.idx as usize) };
        let skip = self.skip;
        let len = vec.bv_len.wrapping_sub(skip).min(self.left);

        // INVARIANT: All of this element is used, or all of the bio is.
        self.left = self.left.wrapping_sub(len);
        self.idx = self.idx.wrapping_add(1);
        self.skip = 0;

        // SAFETY: A bio's pages are present and stay so until it is completed. The driver depends
        // on 64BIT, which has no highmem, so that they and the pages behind them in one element,
        // which are physically contiguous, are mapped in one piece. The element's offset and
        // length are inside of that piece. They may change under us, as O_DIRECT buffers do,
        // which `VolatileSlice` allows.
        Some(unsafe {
            let base = page_address(vec.bv_page);
            let offset = vec.bv_offset as usize + skip as usize;
            VolatileSlice::new(base.add(offset), len as usize)
        })
    }
}

#[kernel::macros::kunit_tests(pmem_bio)]
mod tests {
    use super::*;
    use kernel::{
        page::Page,
        prelude::*, //
    };

    /// What C has in a header is done anew here.
    #[test]
    fn pages_are_where_the_kernel_says() -> Result {
        for _ in 0..64 {
            let page = Page::alloc_page(GFP_KERNEL)?;
            // SAFETY: It is ours, and not of high memory.
            let (ours, theirs) = unsafe {
                (
                    page_address(page.as_ptr()),
                    bindings::pmem_helper_page_address(page.as_ptr()),
                )
            };
            assert_eq!(ours, theirs.cast());
        }
        Ok(())
    }
}
