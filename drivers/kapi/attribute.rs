// SPDX-License-Identifier: GPL-2.0-only

//! A device that is nothing but a few attributes in sysfs, under `/sys/devices/faux`.
//!
//! C headers: [`include/linux/device/faux.h`](srctree/include/linux/device/faux.h),
//! [`include/linux/device.h`](srctree/include/linux/device.h)

use super::bindings;
use core::ptr::{
    null,
    null_mut,
    NonNull, //
};
use kernel::{
    page::PAGE_SIZE,
    prelude::*,
    str::CString,
    sync::Arc, //
};

/// The attributes of a device.
pub(crate) trait Attributes: Send + Sync + 'static {
    /// Their names, and whether each can be written, by root. At most [`MAX`].
    const LIST: &'static [(&'static CStr, bool)];

    /// The value of the attribute at `index` of [`LIST`](Self::LIST), without a newline.
    ///
    /// # Errors
    ///
    /// What `read(2)` is to give.
    fn show(&self, index: usize) -> Result<CString>;

    /// Sets it to `value`, which has no newline.
    ///
    /// # Errors
    ///
    /// What `write(2)` is to give.
    fn store(&self, index: usize, value: &str) -> Result;
}

/// The most attributes of a device.
pub(crate) const MAX: usize = 8;

/// What sysfs knows of a device's attributes.
struct Table {
    attributes: [bindings::device_attribute; MAX],
    // Ends with null.
    pointers: [*mut bindings::attribute; MAX + 1],
    group: bindings::attribute_group,
    groups: [*const bindings::attribute_group; 2],
}

/// A registered device with attributes of `T`.
///
/// # Invariants
///
/// `device` is registered, its attributes are those of `table`, and its driver data is `data`, or
/// not set yet.
pub(crate) struct Device<T: Attributes> {
    device: NonNull<bindings::faux_device>,
    _table: KBox<Table>,
    // Lives until nobody is in an attribute any more.
    #[cfg_attr(not(PMEM_DAX_BUS), expect(dead_code, reason = "only kept alive"))]
    data: Arc<T>,
}

// SAFETY: The device core has locks of its own; `T` can be shared.
unsafe impl<T: Attributes> Send for Device<T> {}

// SAFETY: As for `Send`.
unsafe impl<T: Attributes> Sync for Device<T> {}

impl<T: Attributes> Device<T> {
    /// Registers a device called `name`, with the attributes of `data`.
    ///
    /// # Errors
    ///
    /// - `ENODEV`: the name is taken.
    /// - `ENOMEM`.
    pub(crate) fn new(name: &CStr, data: Arc<T>) -> Result<Self> {
        let mut table = KBox::new(
            Table {
                attributes: [pin_init::zeroed(); MAX],
                pointers: [null_mut(); MAX + 1],
                group: pin_init::zeroed(),
                groups: [null(); 2],
            },
            GFP_KERNEL,
        )?;
        {
            // All of it is plain data; the pointers into it are why it is pinned.
            let table = &mut *table;
            for ((attribute, pointer), (name, writable)) in table
                .attributes
                .iter_mut()
                .zip(&mut table.pointers)
                .zip(T::LIST)
            {
                attribute.attr.name = name.as_char_ptr();
                attribute.attr.mode = if *writable { 0o644 } else { 0o444 };
                attribute.__bindgen_anon_1.show = Some(Self::show);
                if *writable {
                    attribute.__bindgen_anon_2.store = Some(Self::store);
                }
                // SAFETY: Initializes the lock class that debugging wants for attributes that are
                // not static.
                unsafe { bindings::pmem_helper_sysfs_attr_init(&mut attribute.attr) };
                *pointer = &mut attribute.attr;
            }
            table.group.__bindgen_anon_2.attrs = table.pointers.as_mut_ptr();
            table.groups = [&table.group, null()];
        }

        // SAFETY: The name is copied. The table is pinned, and outlives the device: it is dropped
        // after `drop()`.
        let device = unsafe {
            bindings::faux_device_create_with_groups(
                name.as_char_ptr(),
                null_mut(),
                null(),
                table.groups.as_ptr().cast_mut(),
            )
        };
        let device = NonNull::new(device).ok_or(ENODEV)?;
        // SAFETY: The device is registered. `data` lives until nobody is in an attribute any more.
        unsafe {
            bindings::pmem_helper_dev_set_drvdata(
                &raw mut (*device.as_ptr()).dev,
                Arc::as_ptr(&data).cast_mut().cast(),
            )
        };
        // INVARIANT: Just done.
        Ok(Device {
            device,
            _table: table,
            data,
        })
    }

    /// What the attributes are of.
    #[cfg(PMEM_DAX_BUS)]
    pub(crate) fn data(&self) -> &Arc<T> {
        &self.data
    }

    /// The data of `device` and which of its attributes `attribute` is.
    ///
    /// # Safety
    ///
    /// They are those of a call of `show` or `store` by the device core.
    unsafe fn find<'a>(
        device: *mut bindings::device,
        attribute: *mut bindings::device_attribute,
    ) -> Result<(&'a T, usize)> {
        // SAFETY: By the type invariant, and as the device core waits for calls in flight before
        // the device is gone. A reader can be quicker than `new()`.
        let data = unsafe {
            bindings::pmem_helper_dev_get_drvdata(device)
                .cast::<T>()
                .as_ref()
        };
        // SAFETY: By the function's contract.
        let name = unsafe { CStr::from_char_ptr((*attribute).attr.name) };
        let index = T::LIST.iter().position(|(other, _)| *other == name);
        data.zip(index).ok_or(ENODEV)
    }

    /// # Safety
    ///
    /// Called by the device core, for a device of `new()`.
    unsafe extern "C" fn show(
        device: *mut bindings::device,
        attribute: *mut bindings::device_attribute,
        page: *mut c_char,
    ) -> isize {
        // SAFETY: By the function's contract.
        let found = unsafe { Self::find(device, attribute) };
        let text = found.and_then(|(data, index)| data.show(index));
        match text {
            Ok(text) => {
                let len = text.to_bytes().len().min(PAGE_SIZE - 2);
                // SAFETY: `page` has `PAGE_SIZE` bytes.
                unsafe {
                    page.cast::<u8>()
                        .copy_from_nonoverlapping(text.as_char_ptr().cast(), len);
                    page.add(len).write(b'\n' as c_char);
                    page.add(len + 1).write(0);
                }
                (len + 1) as isize
            }
            Err(error) => error.to_errno() as isize,
        }
    }

    /// # Safety
    ///
    /// As for [`show`](Self::show).
    unsafe extern "C" fn store(
        device: *mut bindings::device,
        attribute: *mut bindings::device_attribute,
        text: *const c_char,
        count: usize,
    ) -> isize {
        // SAFETY: By the function's contract; `kernfs` terminates what is written with NUL.
        let result = unsafe {
            Self::find(device, attribute).and_then(|(data, index)| {
                let text = CStr::from_char_ptr(text).to_str().map_err(|_| EINVAL)?;
                data.store(index, text.strip_suffix('\n').unwrap_or(text))
            })
        };
        match result {
            Ok(()) => count as isize,
            Err(error) => error.to_errno() as isize,
        }
    }
}

impl<T: Attributes> Drop for Device<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant. Waits for reads and writes of attributes.
        unsafe { bindings::faux_device_destroy(self.device.as_ptr()) };
    }
}
