// SPDX-License-Identifier: GPL-2.0-only

//! Drivers of the dax bus, on which device-dax instances are.
//!
//! Its header is in the kernel's source alone, so that a build against installed headers has no
//! such driver: `PMEM_DAX_BUS` says whether it has.
//!
//! C headers: `drivers/dax/bus.h`, `drivers/dax/dax-private.h`

use super::{
    bindings,
    compat::ModuleMetadata, //
};
use kernel::{
    error::to_result,
    prelude::*,
    types::{
        ForeignOwnable,
        Opaque, //
    }, //
};

/// A driver of device-dax instances that are bound to it by name, through its `new_id` in sysfs.
pub(crate) trait Driver: Sized + Send + Sync + 'static {
    /// The module that must stay loaded while an instance is bound.
    type Module: ModuleMetadata;
    /// What a bound instance is.
    type Data: ForeignOwnable + Send;

    /// Binds an instance.
    ///
    /// # Errors
    ///
    /// What the write to `new_id` or `bind` is to give.
    fn probe(&self, instance: &Instance) -> Result<Self::Data>;

    /// Unbinds an instance. It cannot fail.
    fn remove(&self, data: Self::Data);
}

/// A device-dax instance.
#[repr(transparent)]
pub(crate) struct Instance(Opaque<bindings::dev_dax>);

impl Instance {
    /// Its only range of physical addresses, the first and the last byte, or nothing if it has
    /// several.
    pub(crate) fn range(&self) -> Option<(u64, u64)> {
        let mut range = bindings::range::default();
        // SAFETY: The instance is being bound, so that its ranges do not change.
        unsafe { bindings::pmem_helper_dev_dax_range(self.0.get(), &mut range) }
            .then_some((range.start, range.end))
    }
}

/// A driver that is registered.
pub(crate) struct Registration<T: Driver> {
    inner: Pin<KBox<Inner<T>>>,
}

#[repr(C)]
struct Inner<T> {
    // The first, so that a pointer to it is one to all of this.
    raw: Opaque<bindings::dax_device_driver>,
    driver: T,
}

// SAFETY: The C object is the driver core's, which has locks of its own.
unsafe impl<T: Driver> Send for Registration<T> {}

// SAFETY: As for `Send`.
unsafe impl<T: Driver> Sync for Registration<T> {}

impl<T: Driver> Registration<T> {
    /// Registers `driver` as `name`.
    ///
    /// # Errors
    ///
    /// `EBUSY`: the name is taken; `ENOMEM`.
    pub(crate) fn new(name: &'static CStr, driver: T) -> Result<Self> {
        let raw = bindings::dax_device_driver {
            // Instances do not ask for this type: none is bound but by its name.
            type_: bindings::dax_driver_type_DAXDRV_FSDEV_TYPE,
            probe: Some(Self::probe),
            remove: Some(Self::remove),
            drv: pin_init::zeroed(),
            ids: pin_init::zeroed(),
        };
        let inner = KBox::pin(
            Inner {
                raw: Opaque::new(raw),
                driver,
            },
            GFP_KERNEL,
        )?;
        // SAFETY: Pinned, and unregistered before it is freed.
        to_result(unsafe {
            bindings::__dax_driver_register(
                inner.raw.get(),
                T::Module::THIS_MODULE.as_ptr(),
                name.as_char_ptr(),
            )
        })?;
        Ok(Registration { inner })
    }

    /// # Safety
    ///
    /// Called by the dax bus for an instance that is bound to a driver of `new()`.
    unsafe fn driver<'a>(dev_dax: *mut bindings::dev_dax) -> &'a T {
        // SAFETY: By the function's contract; `raw` comes first.
        unsafe {
            let raw = bindings::pmem_helper_dev_dax_driver(dev_dax);
            &(*raw.cast::<Inner<T>>()).driver
        }
    }

    /// # Safety
    ///
    /// As for [`driver`](Self::driver).
    unsafe extern "C" fn probe(dev_dax: *mut bindings::dev_dax) -> c_int {
        // SAFETY: By the function's contract; `Instance` is transparent.
        let (driver, instance) = unsafe { (Self::driver(dev_dax), &*dev_dax.cast::<Instance>()) };
        match driver.probe(instance) {
            Ok(data) => {
                // SAFETY: The instance is bound; `remove()` takes the data back.
                unsafe {
                    bindings::pmem_helper_dev_set_drvdata(
                        bindings::pmem_helper_dev_dax_device(dev_dax),
                        data.into_foreign().cast(),
                    )
                };
                0
            }
            Err(error) => error.to_errno(),
        }
    }

    /// # Safety
    ///
    /// As for [`driver`](Self::driver), and `probe()` has succeeded.
    unsafe extern "C" fn remove(dev_dax: *mut bindings::dev_dax) {
        // SAFETY: By the function's contract; the data was set by `probe()`, and is taken once.
        unsafe {
            let device = bindings::pmem_helper_dev_dax_device(dev_dax);
            let data = T::Data::from_foreign(bindings::pmem_helper_dev_get_drvdata(device).cast());
            bindings::pmem_helper_dev_set_drvdata(device, core::ptr::null_mut());
            Self::driver(dev_dax).remove(data);
        }
    }
}

impl<T: Driver> Drop for Registration<T> {
    fn drop(&mut self) {
        // SAFETY: Was registered. Waits until no instance is bound.
        unsafe { bindings::dax_driver_unregister(self.inner.raw.get()) };
    }
}
