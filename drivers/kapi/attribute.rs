// SPDX-License-Identifier: GPL-2.0-only

//! Attributes of devices in sysfs, and a device that is nothing but a few of them, under
//! `/sys/devices/faux`.
//!
//! C headers: [`include/linux/device.h`](srctree/include/linux/device.h),
//! [`include/linux/sysfs.h`](srctree/include/linux/sysfs.h),
//! [`include/linux/device/faux.h`](srctree/include/linux/device/faux.h)

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
    fn store(&self, _index: usize, _value: &str) -> Result {
        Err(EACCES)
    }
}

/// The most attributes of a device.
pub(crate) const MAX: usize = 8;

/// What sysfs knows of an attribute.
#[repr(C)]
struct Attribute {
    // The first, so that a pointer to it is one to all of this.
    raw: bindings::device_attribute,
    index: usize,
    data: *const c_void,
}

/// What sysfs knows of a group.
struct Table {
    attributes: [Attribute; MAX],
    // Ends with null.
    pointers: [*mut bindings::attribute; MAX + 1],
    group: bindings::attribute_group,
    groups: [*const bindings::attribute_group; 2],
}

/// What attributes are of, whatever it is.
trait Data: Send + Sync {}

impl<T: Attributes> Data for T {}

/// Attributes for a device that is not registered yet.
///
/// # Invariants
///
/// `table` points into itself and to `data`, and does not move.
pub(crate) struct Group {
    table: KBox<Table>,
    // Only kept alive.
    _data: Arc<dyn Data>,
}

// SAFETY: The table does not change, and the data can be shared.
unsafe impl Send for Group {}

// SAFETY: As for `Send`.
unsafe impl Sync for Group {}

impl Group {
    /// The attributes of `data`, in a directory called `name` if there is one, or else beside the
    /// device's own.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new<T: Attributes>(name: Option<&'static CStr>, data: Arc<T>) -> Result<Self> {
        const { assert!(T::LIST.len() <= MAX) };

        let mut table = KBox::new(
            Table {
                attributes: [const {
                    Attribute {
                        raw: pin_init::zeroed(),
                        index: 0,
                        data: null(),
                    }
                }; MAX],
                pointers: [null_mut(); MAX + 1],
                group: pin_init::zeroed(),
                groups: [null(); 2],
            },
            GFP_KERNEL,
        )?;
        {
            // All of it is plain data; the pointers into it are why it does not move.
            let table = &mut *table;
            for (index, ((attribute, pointer), (name, writable))) in table
                .attributes
                .iter_mut()
                .zip(&mut table.pointers)
                .zip(T::LIST)
                .enumerate()
            {
                attribute.index = index;
                attribute.data = Arc::as_ptr(&data).cast();
                let raw = &mut attribute.raw;
                raw.attr.name = name.as_char_ptr();
                raw.attr.mode = if *writable { 0o644 } else { 0o444 };
                raw.__bindgen_anon_1.show = Some(show::<T>);
                if *writable {
                    raw.__bindgen_anon_2.store = Some(store::<T>);
                }
                // SAFETY: Initializes the lock class that debugging wants for attributes that are
                // not static.
                unsafe { bindings::pmem_helper_sysfs_attr_init(&mut raw.attr) };
                // `attr` is the first member of the first one.
                *pointer = (&raw mut *attribute).cast();
            }
            table.group.name = name.map_or(null(), |name| name.as_char_ptr());
            table.group.__bindgen_anon_2.attrs = table.pointers.as_mut_ptr();
            table.groups = [&table.group, null()];
        }
        // INVARIANT: Filled in above.
        Ok(Group { table, _data: data })
    }

    /// What a device is registered with. It must not be registered any more when this is dropped.
    pub(super) fn as_ptr(&self) -> *mut *const bindings::attribute_group {
        self.table.groups.as_ptr().cast_mut()
    }
}

/// The data of `attribute`, and which of its attributes it is.
///
/// # Safety
///
/// It is that of a call of `show` or `store` by the device core, for a device with a [`Group`] of
/// a `T`.
unsafe fn find<'a, T: Attributes>(attribute: *mut bindings::device_attribute) -> (&'a T, usize) {
    // SAFETY: By the function's contract it is the first member of an `Attribute`, whose data is a
    // `T`. Both live as long as the group, and the device core waits for calls in flight before
    // the device is gone.
    unsafe {
        let attribute = &*attribute.cast::<Attribute>();
        (&*attribute.data.cast::<T>(), attribute.index)
    }
}

/// # Safety
///
/// Called by the device core, for a device with a [`Group`] of a `T`.
unsafe extern "C" fn show<T: Attributes>(
    _device: *mut bindings::device,
    attribute: *mut bindings::device_attribute,
    page: *mut c_char,
) -> isize {
    // SAFETY: By the function's contract.
    let (data, index) = unsafe { find::<T>(attribute) };
    match data.show(index) {
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
/// As for [`show`].
unsafe extern "C" fn store<T: Attributes>(
    _device: *mut bindings::device,
    attribute: *mut bindings::device_attribute,
    text: *const c_char,
    count: usize,
) -> isize {
    // SAFETY: By the function's contract; `kernfs` terminates what is written with NUL.
    let (data, index, text) = unsafe {
        let (data, index) = find::<T>(attribute);
        (data, index, CStr::from_char_ptr(text))
    };
    let result = match text.to_str() {
        Ok(text) => data.store(index, text.strip_suffix('\n').unwrap_or(text)),
        Err(_) => Err(EINVAL),
    };
    match result {
        Ok(()) => count as isize,
        Err(error) => error.to_errno() as isize,
    }
}

/// A registered device with attributes of `T`.
///
/// # Invariants
///
/// `device` is registered, with the attributes of `_group`.
pub(crate) struct Device<T: Attributes> {
    device: NonNull<bindings::faux_device>,
    // Lives until nobody is in an attribute any more.
    _group: Group,
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
        let group = Group::new(None, data.clone())?;
        // SAFETY: The name is copied. The group outlives the device: it is dropped after `drop()`.
        let device = unsafe {
            bindings::faux_device_create_with_groups(
                name.as_char_ptr(),
                null_mut(),
                null(),
                group.as_ptr(),
            )
        };
        // INVARIANT: Just registered.
        Ok(Device {
            device: NonNull::new(device).ok_or(ENODEV)?,
            _group: group,
            data,
        })
    }

    /// What the attributes are of.
    #[cfg(PMEM_DAX_BUS)]
    pub(crate) fn data(&self) -> &Arc<T> {
        &self.data
    }
}

impl<T: Attributes> Drop for Device<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant. Waits for reads and writes of attributes.
        unsafe { bindings::faux_device_destroy(self.device.as_ptr()) };
    }
}
