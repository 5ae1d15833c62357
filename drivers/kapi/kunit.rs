// SPDX-License-Identifier: GPL-2.0-only

//! What tests in the kernel need beyond the kernel crate's `kunit`: a bio, and to be skipped.
//!
//! C header: [`include/kunit/test.h`](srctree/include/kunit/test.h)

pub(crate) mod block;
#[cfg(CONFIG_VIRTIO)]
pub(crate) mod virtio;

use super::{
    bindings,
    disk::{
        Disk,
        Operations, //
    }, //
};
use crate::pmem_core::extent::Sector;
use kernel::{
    error::to_result,
    ffi::c_uint,
    prelude::*, //
};

pub(crate) use bindings::{
    req_op_REQ_OP_DISCARD as DISCARD,
    req_op_REQ_OP_READ as READ,
    req_op_REQ_OP_WRITE as WRITE,
    req_op_REQ_OP_WRITE_ZEROES as WRITE_ZEROES,
    PMEM_CONST_REQ_FUA as FUA,
    PMEM_CONST_REQ_NOWAIT as NOWAIT,
    PMEM_CONST_REQ_PREFLUSH as PREFLUSH, //
};

/// Marks the test that runs as skipped.
pub(crate) fn skip() {
    // SAFETY: Gives the test of this task, or null.
    if let Some(test) = unsafe { bindings::kunit_get_current_test().as_mut() } {
        test.status = bindings::kunit_status_KUNIT_SKIPPED;
    }
}

/// Waits until files that this kernel thread has closed are closed: those of a scan for partitions
/// keep their disk open until then. A process does that on its return to user space.
pub(crate) fn close_files() {
    // SAFETY: May sleep here, and no lock is held that closing a file takes.
    unsafe { bindings::flush_delayed_fput() };
}

/// The most places that a bio of these has data in.
pub(crate) const PARTS: usize = 8;

/// A buffer that can be under I/O.
pub(crate) type Buffer = KVec<u8>;

/// Returns `len` bytes of `byte`.
///
/// # Errors
///
/// `ENOMEM`.
pub(crate) fn buffer(byte: u8, len: usize) -> Result<Buffer> {
    Ok(KVec::from_elem(byte, len, GFP_KERNEL)?)
}

impl<T: Operations> Disk<T> {
    /// Submits a bio with `data` to the disk as a file system would, and waits for it.
    pub(crate) fn submit_wait(&self, opf: c_uint, sector: Sector, data: &mut [u8]) -> Result {
        self.submit(opf, sector, &mut [data], 0)
    }

    /// The same with data in several places, at most [`PARTS`], of any length.
    pub(crate) fn submit_wait_parts(
        &self,
        opf: c_uint,
        sector: Sector,
        parts: &mut [&mut [u8]],
    ) -> Result {
        self.submit(opf, sector, parts, 0)
    }

    /// The same for an operation that has a length, but no data.
    pub(crate) fn submit_wait_range(&self, opf: c_uint, sector: Sector, len: u32) -> Result {
        self.submit(opf, sector, &mut [], len)
    }

    fn submit(&self, opf: c_uint, sector: Sector, parts: &mut [&mut [u8]], len: u32) -> Result {
        if parts.len() > PARTS {
            return Err(EINVAL);
        }
        let mut vecs = [bindings::bio_vec::default(); PARTS];
        let mut bio = bindings::bio::default();
        // SAFETY: The bio, its elements and the data, which is from the slab, outlive the I/O,
        // as `submit_bio_wait()` waits for it. The disk is live as `self` is.
        to_result(unsafe {
            let bdev = (*self.as_ptr()).part0;
            bindings::bio_init(&mut bio, bdev, vecs.as_mut_ptr(), PARTS as u16, opf);
            bio.bi_iter.bi_sector = sector.0;
            bio.bi_iter.bi_size = len;
            for part in parts.iter_mut().filter(|part| !part.is_empty()) {
                bindings::bio_add_virt_nofail(
                    &mut bio,
                    part.as_mut_ptr().cast(),
                    c_uint::try_from(part.len())?,
                );
            }
            let ret = bindings::submit_bio_wait(&mut bio);
            bindings::bio_uninit(&mut bio);
            ret
        })
    }
}
