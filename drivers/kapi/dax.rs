// SPDX-License-Identifier: GPL-2.0-only

//! Direct access to device memory for file systems.
//!
//! C header: [`include/linux/dax.h`](srctree/include/linux/dax.h)

use super::{
    bindings,
    compat::EOPNOTSUPP,
    mapping::FailureFlags, //
};
use crate::pmem_core::{
    extent::Pfn,
    persist::VolatileSlice, //
};
use core::ptr::NonNull;
use kernel::{
    error::{
        from_err_ptr,
        from_result,
        to_result, //
    },
    ffi::{
        c_int,
        c_long,
        c_ulong,
        c_void, //
    },
    new_mutex,
    page::PAGE_SIZE,
    prelude::*,
    sync::{
        Arc,
        Mutex, //
    }, //
};

/// Device memory that can be accessed directly.
pub(crate) struct Window<'a> {
    /// Where the kernel has it mapped, to the end of what is contiguous.
    pub(crate) memory: VolatileSlice<'a>,
    /// The frame of its first page.
    pub(crate) pfn: Pfn,
}

/// What a DAX device does. Page numbers are relative to the device, in units of `PAGE_SIZE`.
pub(crate) trait Operations: Send + Sync {
    /// Returns the memory from page `page` on: at least one page, as much as is contiguous and good.
    /// The caller wants `count` pages; more do no harm.
    ///
    /// For `recovery` the first page may be bad: [`recovery_write`](Self::recovery_write) comes next.
    ///
    /// # Errors
    ///
    /// - `ERANGE`: the page is not on the device.
    /// - `EHWPOISON`: the page is bad.
    fn direct_access(&self, page: u64, count: u64, recovery: bool) -> Result<Window<'_>>;

    /// Zeroes `count` pages from `page` on.
    ///
    /// # Errors
    ///
    /// `ERANGE` when they are not all on the device.
    fn zero_page_range(&self, page: u64, count: u64) -> Result;

    /// Makes bad memory good by overwriting it: `len` bytes at `offset` of page `page`, which
    /// [`direct_access`](Self::direct_access) has given out for recovery.
    ///
    /// `copy` writes them, and returns how many, which is fewer if the source cannot be read. Returns
    /// how many were written and can be read from now on.
    fn recovery_write(
        &self,
        page: u64,
        offset: u64,
        len: u64,
        copy: impl FnOnce() -> usize,
    ) -> usize;
}

/// How a DAX device is to be treated.
#[derive(Clone, Copy)]
pub(crate) struct Options {
    /// Writes that are in the CPU's cache are not durable, so that `fsync` must write them back.
    pub(crate) write_cache: bool,
    /// Nothing besides the CPU's caches must be flushed to make a write durable: `MAP_SYNC` works.
    pub(crate) synchronous: bool,
}

/// The way to the file system that uses a DAX device, while there is one.
///
/// It is there before the device and after it: memory can fail at any time.
///
/// # Invariants
///
/// A device that is there is alive, or being killed.
#[pin_data]
pub(crate) struct Holder {
    #[pin]
    device: Mutex<Option<Dax>>,
}

/// A pointer to a device.
struct Dax(NonNull<bindings::dax_device>);

// SAFETY: A device belongs to no thread.
unsafe impl Send for Dax {}

impl Holder {
    /// A way that leads nowhere yet.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Holder {
            device <- new_mutex!(None),
        })
    }

    /// Tells the file system that the `len` bytes at `offset` of the device have failed. May sleep.
    ///
    /// # Errors
    ///
    /// - `EOPNOTSUPP`: there is none, or it does not deal with failures.
    /// - Others: those of the file system.
    pub(crate) fn notify_failure(&self, offset: u64, len: u64, flags: FailureFlags) -> Result {
        let device = self.device.lock();
        let dax = device.as_ref().ok_or(EOPNOTSUPP)?;
        // SAFETY: By the type invariant; that it is alive is looked at by the C function, for which
        // killing the device waits.
        to_result(unsafe {
            bindings::dax_holder_notify_failure(dax.0.as_ptr(), offset, len, flags.0)
        })
    }
}

/// A DAX device.
///
/// # Invariants
///
/// `dax` is alive until it is dropped, and `holder` leads to it. Its private data is `data`, or none.
pub(crate) struct Device<T> {
    dax: NonNull<bindings::dax_device>,
    holder: Arc<Holder>,
    // Dropped after `drop()`, from which on no operation runs.
    _data: Arc<T>,
}

// SAFETY: A reference to a C object with locks of its own, and to data that can be shared.
unsafe impl<T: Send + Sync> Send for Device<T> {}

// SAFETY: As for `Send`.
unsafe impl<T: Send + Sync> Sync for Device<T> {}

impl<T: Operations> Device<T> {
    const OPS: &'static bindings::dax_operations = &bindings::dax_operations {
        direct_access: Some(Self::direct_access),
        zero_page_range: Some(Self::zero_page_range),
        recovery_write: Some(Self::recovery_write),
    };

    /// Creates a DAX device that is served by `data`, and to which `holder` leads.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(data: Arc<T>, options: Options, holder: Arc<Holder>) -> Result<Self> {
        let private = Arc::as_ptr(&data).cast_mut().cast::<c_void>();
        // SAFETY: The table is a static. The private data lives until no operation runs any more,
        // by the order in which `Device` is dropped.
        let dax = from_err_ptr(unsafe { bindings::alloc_dax(private, Self::OPS) })?;
        let pointer = NonNull::new(dax).ok_or(ENOMEM)?;
        // INVARIANT: Just allocated, with `data`.
        *holder.device.lock() = Some(Dax(pointer));
        let device = Device {
            dax: pointer,
            holder,
            _data: data,
        };
        // SAFETY: `dax` is alive; nobody else knows it yet.
        unsafe {
            // Writes go around the cache, and reads survive a machine check.
            bindings::set_dax_nocache(dax);
            bindings::set_dax_nomc(dax);
            bindings::dax_write_cache(dax, options.write_cache);
            if options.synchronous {
                bindings::set_dax_synchronous(dax);
            }
        }
        Ok(device)
    }

    /// Returns the data behind a DAX device, or nothing when it is being killed.
    ///
    /// # Safety
    ///
    /// Called from an operation of `OPS`, which the result does not outlive.
    unsafe fn data<'a>(dax: *mut bindings::dax_device) -> Option<&'a T> {
        // SAFETY: `new()` has set the private data. By the type invariant it is valid until
        // `kill_dax()` has waited for the operation that runs.
        unsafe { bindings::dax_get_private(dax).cast::<T>().as_ref() }
    }

    /// # Safety
    ///
    /// Called by DAX on a device of `new()`; `kaddr` and `pfn` are null or can be written.
    unsafe extern "C" fn direct_access(
        dax: *mut bindings::dax_device,
        page: c_ulong,
        count: c_long,
        mode: bindings::dax_access_mode,
        kaddr: *mut *mut c_void,
        pfn: *mut c_ulong,
    ) -> c_long {
        // SAFETY: By the function's contract.
        let data = unsafe { Self::data(dax) };
        let recovery = mode == bindings::dax_access_mode_DAX_RECOVERY_WRITE;
        let count = u64::try_from(count).unwrap_or(0);
        match data
            .ok_or(ENXIO)
            .and_then(|d| d.direct_access(page as u64, count, recovery))
        {
            Ok(window) => {
                // SAFETY: By the function's contract.
                unsafe {
                    if !kaddr.is_null() {
                        *kaddr = window.memory.as_ptr().cast();
                    }
                    if !pfn.is_null() {
                        *pfn = window.pfn.0 as c_ulong;
                    }
                }
                (window.memory.len() / PAGE_SIZE) as c_long
            }
            Err(e) => e.to_errno() as c_long,
        }
    }

    /// # Safety
    ///
    /// Called by DAX on a device of `new()`.
    unsafe extern "C" fn zero_page_range(
        dax: *mut bindings::dax_device,
        page: c_ulong,
        count: usize,
    ) -> c_int {
        // SAFETY: By the function's contract.
        let data = unsafe { Self::data(dax) };
        from_result(|| {
            data.ok_or(ENXIO)?
                .zero_page_range(page as u64, count as u64)?;
            Ok(0)
        })
    }

    /// Copies around the cache to memory that `direct_access` has given out for recovery.
    ///
    /// # Safety
    ///
    /// Called by DAX, with `bytes` at `addr` that it has from `direct_access`, and a valid `iter`.
    unsafe extern "C" fn recovery_write(
        dax: *mut bindings::dax_device,
        page: c_ulong,
        addr: *mut c_void,
        bytes: usize,
        iter: *mut bindings::iov_iter,
    ) -> usize {
        // SAFETY: By the function's contract.
        let Some(data) = (unsafe { Self::data(dax) }) else {
            return 0;
        };
        let offset = addr.addr() % PAGE_SIZE;
        data.recovery_write(page as u64, offset as u64, bytes as u64, || {
            // SAFETY: By the function's contract.
            unsafe { bindings::_copy_from_iter_flushcache(addr, bytes, iter) }
        })
    }
}

impl<T> Drop for Device<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant `dax` is alive, and `put_dax()` is its last use here.
        // `kill_dax()` waits for the operations that run, and lets no new one begin.
        unsafe {
            bindings::kill_dax(self.dax.as_ptr());
        }
        // INVARIANT: Who tells of a failure has the lock until it is told.
        *self.holder.device.lock() = None;
        // SAFETY: As above.
        unsafe { bindings::put_dax(self.dax.as_ptr()) };
    }
}

/// A DAX device that file systems find through its disk.
///
/// # Invariants
///
/// `disk` is valid and is registered as a host of `device`.
pub(super) struct Host<T> {
    disk: NonNull<bindings::gendisk>,
    // Dropped after `drop()`: no file system finds it any more.
    _device: Device<T>,
}

// SAFETY: The disk is only a key here, and the device can be sent.
unsafe impl<T: Send + Sync> Send for Host<T> {}

// SAFETY: As for `Send`.
unsafe impl<T: Send + Sync> Sync for Host<T> {}

impl<T> Host<T> {
    /// Makes file systems on `disk` find `device`.
    ///
    /// # Safety
    ///
    /// `disk` is valid until the returned host is dropped.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(super) unsafe fn new(device: Device<T>, disk: NonNull<bindings::gendisk>) -> Result<Self> {
        // SAFETY: Both are valid.
        to_result(unsafe { bindings::dax_add_host(device.dax.as_ptr(), disk.as_ptr()) })?;
        // INVARIANT: Just registered.
        Ok(Host {
            disk,
            _device: device,
        })
    }
}

impl<T> Drop for Host<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant.
        unsafe { bindings::dax_remove_host(self.disk.as_ptr()) };
    }
}
