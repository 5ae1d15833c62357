// SPDX-License-Identifier: GPL-2.0-only

//! Disks as their users have them: found by name, opened, and sent bios that end some time.
//!
//! C header: [`include/linux/blkdev.h`](srctree/include/linux/blkdev.h)

use super::{
    super::{
        bindings,
        compat::EALREADY, //
    },
    close_files,
    Buffer, //
};
use crate::pmem_core::extent::Sector;
use core::{
    ptr::{
        null,
        null_mut,
        NonNull, //
    },
    sync::atomic::{
        AtomicI32,
        AtomicU32,
        Ordering, //
    },
};
use kernel::{
    error::{
        from_err_ptr,
        to_result, //
    },
    ffi::c_uint,
    prelude::*,
    static_lock_class,
    time::{
        delay::fsleep,
        Delta, //
    },
    types::Opaque,
};

/// How long [`Submitted::wait`] waits at most, in steps of 10 ms.
const STEPS: u32 = 3000;

/// The number of the disk called `name`, if there is one.
fn find(name: &CStr) -> Result<Option<bindings::dev_t>> {
    let mut limits: bindings::queue_limits = pin_init::zeroed();
    // SAFETY: `limits` is initialized, and the lock class is a static.
    let other = from_err_ptr(unsafe {
        bindings::__blk_alloc_disk(
            &mut limits,
            bindings::NUMA_NO_NODE,
            static_lock_class!().as_ptr(),
        )
    })?;
    // SAFETY: The class of all disks is not exported, but each has it. Of what is found there is a
    // reference, which is given back.
    unsafe {
        let device = bindings::class_find_device(
            (*(*other).part0).bd_device.class,
            null(),
            name.as_char_ptr().cast(),
            Some(bindings::device_match_name),
        );
        bindings::put_disk(other);
        if device.is_null() {
            return Ok(None);
        }
        let number = (*device).devt;
        bindings::put_device(device);
        Ok(Some(number))
    }
}

/// Returns whether there is a disk called `name`.
///
/// # Errors
///
/// `ENOMEM`.
pub(crate) fn exists(name: &CStr) -> Result<bool> {
    Ok(find(name)?.is_some())
}

/// A disk that is open.
///
/// # Invariants
///
/// The file of a block device that is open.
pub(crate) struct BlockDevice(NonNull<bindings::file>);

impl BlockDevice {
    /// Opens the disk called `name`, to read and write.
    ///
    /// # Errors
    ///
    /// - `ENODEV`: there is none.
    /// - `ENOMEM`.
    pub(crate) fn open(name: &CStr) -> Result<Self> {
        let number = find(name)?.ok_or(ENODEV)?;
        let mode = bindings::PMEM_CONST_BLK_OPEN_READ | bindings::PMEM_CONST_BLK_OPEN_WRITE;
        // SAFETY: Nobody holds it, so that there is nobody to call.
        let file = from_err_ptr(unsafe {
            bindings::bdev_file_open_by_dev(number, mode, null_mut(), null())
        })?;
        // INVARIANT: Just opened.
        Ok(BlockDevice(NonNull::new(file).ok_or(ENODEV)?))
    }

    fn bdev(&self) -> *mut bindings::block_device {
        // SAFETY: By the type invariant.
        unsafe { bindings::file_bdev(self.0.as_ptr()) }
    }

    /// Length in sectors.
    pub(crate) fn sectors(&self) -> Sector {
        // SAFETY: By the type invariant.
        Sector(unsafe { (*self.bdev()).bd_nr_sectors })
    }

    /// Whether it has DAX; and if so, whether a mapping can be durable without the kernel, as
    /// `MAP_SYNC` wants it.
    pub(crate) fn dax(&self) -> Option<bool> {
        let mut start = 0;
        // SAFETY: By the type invariant. Without a holder it is only looked up, and the reference is
        // given back.
        unsafe {
            let dax = bindings::fs_dax_get_by_bdev(self.bdev(), &mut start, null_mut(), null());
            if dax.is_null() {
                return None;
            }
            let synchronous = bindings::dax_synchronous(dax);
            bindings::fs_put_dax(dax, null_mut());
            Some(synchronous)
        }
    }

    /// Submits a bio with `data` as a file system would, and does not wait for it.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn submit(&self, opf: c_uint, sector: Sector, data: Buffer) -> Result<Submitted> {
        let len = c_uint::try_from(data.len())?;
        let submission = Submission {
            bio: Opaque::zeroed(),
            vec: Opaque::zeroed(),
            data,
            status: AtomicI32::new(0),
            ends: AtomicU32::new(0),
        };
        let raw = KBox::into_raw(KBox::new(submission, GFP_KERNEL)?);
        // SAFETY: Just allocated, and not freed before the bio has ended. Its data is from the slab,
        // and the disk is open.
        unsafe {
            let bio = (*raw).bio.get();
            bindings::bio_init(bio, self.bdev(), (*raw).vec.get(), 1, opf);
            (*bio).bi_iter.bi_sector = sector.0;
            (*bio).bi_end_io = Some(Submission::end);
            (*bio).bi_private = raw.cast();
            if len != 0 {
                bindings::bio_add_virt_nofail(bio, (*raw).data.as_mut_ptr().cast(), len);
            }
            bindings::submit_bio(bio);
        }
        // INVARIANT: As above.
        Ok(Submitted(NonNull::new(raw).ok_or(ENOMEM)?))
    }

    /// Submits a bio with `data`, and waits for it.
    ///
    /// # Errors
    ///
    /// What the bio ends with. `ETIMEDOUT`: it has not ended.
    pub(crate) fn submit_wait(&self, opf: c_uint, sector: Sector, data: Buffer) -> Result<Buffer> {
        let submitted = self.submit(opf, sector, data)?;
        submitted.wait().ok_or(ETIMEDOUT)??;
        submitted.into_data()
    }
}

impl Drop for BlockDevice {
    fn drop(&mut self) {
        // SAFETY: By the type invariant; this is its only end.
        unsafe { bindings::bdev_fput(self.0.as_ptr()) };
        close_files();
    }
}

struct Submission {
    bio: Opaque<bindings::bio>,
    vec: Opaque<bindings::bio_vec>,
    data: Buffer,
    status: AtomicI32,
    /// How often it has ended.
    ends: AtomicU32,
}

impl Submission {
    /// # Safety
    ///
    /// Called by the block layer when a bio of [`BlockDevice::submit`] ends.
    unsafe extern "C" fn end(bio: *mut bindings::bio) {
        // SAFETY: By the function's contract; it is not freed before this is over.
        let (this, status) = unsafe {
            let this = &*(*bio).bi_private.cast::<Self>();
            (this, bindings::blk_status_to_errno((*bio).bi_status))
        };
        this.status.store(status, Ordering::Relaxed);
        this.ends.fetch_add(1, Ordering::Release);
    }
}

/// A bio that was submitted, and may have ended.
///
/// # Invariants
///
/// Points to what [`BlockDevice::submit`] has allocated.
pub(crate) struct Submitted(NonNull<Submission>);

impl Submitted {
    fn submission(&self) -> &Submission {
        // SAFETY: By the type invariant. It is not changed but for the bio, its data and atomics.
        unsafe { self.0.as_ref() }
    }

    /// How it has ended, if it has.
    pub(crate) fn ended(&self) -> Option<Result> {
        match self.submission().ends.load(Ordering::Acquire) {
            0 => None,
            1 => Some(to_result(self.submission().status.load(Ordering::Relaxed))),
            // Once too often.
            _ => Some(Err(EALREADY)),
        }
    }

    /// The same after it has had the time to end.
    pub(crate) fn wait(&self) -> Option<Result> {
        for _ in 0..STEPS {
            if self.ended().is_some() {
                break;
            }
            fsleep(Delta::from_millis(10));
        }
        self.ended()
    }

    /// Its data.
    fn into_data(mut self) -> Result<Buffer> {
        if self.ended().is_none() {
            return Err(EBUSY);
        }
        // SAFETY: By the type invariant; nobody uses it any more.
        Ok(core::mem::take(unsafe { &mut self.0.as_mut().data }))
    }
}

impl Drop for Submitted {
    fn drop(&mut self) {
        // Of a test that fails it may never end, and then its memory is lost.
        if self.ended().is_none() {
            return;
        }
        // SAFETY: By the type invariant. The bio has ended, so that nobody uses it any more.
        unsafe {
            bindings::bio_uninit((*self.0.as_ptr()).bio.get());
            drop(KBox::from_raw(self.0.as_ptr()));
        }
    }
}
