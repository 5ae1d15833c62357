// SPDX-License-Identifier: GPL-2.0-only

//! Directories of debugfs.
//!
//! The kernel crate's own have files without an owner: who has one open when the module is unloaded
//! closes it with code that is gone. Here an open file keeps the module.
//!
//! C header: [`include/linux/debugfs.h`](srctree/include/linux/debugfs.h)

use super::{
    attribute::Attributes,
    bindings,
    compat::ModuleMetadata, //
};
use core::marker::PhantomData;
use kernel::{
    page::PAGE_SIZE,
    prelude::*,
    sync::Arc,
    uaccess::{
        UserPtr,
        UserSlice, //
    }, //
};

/// A directory. That it could not be made is no error, as debugfs has it: then it has no files.
///
/// # Invariants
///
/// What `debugfs_create_dir()` has returned, and not removed.
pub(crate) struct Dir {
    dentry: *mut bindings::dentry,
    // Goes later: it would take this one with it.
    _parent: Option<Arc<Dir>>,
}

// SAFETY: A dentry has locks of its own.
unsafe impl Send for Dir {}

// SAFETY: As for `Send`.
unsafe impl Sync for Dir {}

impl Dir {
    /// Makes a directory called `name`, in the root of debugfs or in `parent`.
    pub(crate) fn new(name: &CStr, parent: Option<Arc<Dir>>) -> Self {
        let dentry = parent
            .as_ref()
            .map_or(core::ptr::null_mut(), |dir| dir.dentry);
        // SAFETY: The name is copied; the parent is there or an error, which is passed on.
        let dentry =
            unsafe { bindings::pmem_helper_debugfs_create_dir(name.as_char_ptr(), dentry) };
        // INVARIANT: Just made.
        Dir {
            dentry,
            _parent: parent,
        }
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        // SAFETY: By the type invariant. Waits until nobody is in one of its files.
        unsafe { bindings::pmem_helper_debugfs_remove(self.dentry) };
    }
}

/// What a file of a directory finds.
struct Entry<T> {
    data: *const T,
    index: usize,
}

/// A directory with a file for each attribute of `T`, whose code is in the module `M`.
pub(crate) struct Files<T: Attributes, M: ModuleMetadata> {
    // In the order in which they go: nobody is in a file any more when its entry goes.
    _dir: Dir,
    _entries: KVec<Entry<T>>,
    _data: Arc<T>,
    _module: PhantomData<M>,
}

// SAFETY: The entries point to the data, which can be shared, and do not change.
unsafe impl<T: Attributes, M: ModuleMetadata> Send for Files<T, M> {}

// SAFETY: As for `Send`.
unsafe impl<T: Attributes, M: ModuleMetadata> Sync for Files<T, M> {}

impl<T: Attributes, M: ModuleMetadata> Files<T, M> {
    const OPS: &'static bindings::file_operations = &bindings::file_operations {
        owner: M::THIS_MODULE.as_ptr(),
        open: Some(Self::open),
        read: Some(bindings::seq_read),
        write: Some(Self::write),
        llseek: Some(bindings::seq_lseek),
        release: Some(bindings::single_release),
        ..pin_init::zeroed()
    };

    /// Makes a directory called `name` in `parent`, with the files of `data`, for root alone.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(name: &CStr, parent: Arc<Dir>, data: Arc<T>) -> Result<Self> {
        let mut entries = KVec::with_capacity(T::LIST.len(), GFP_KERNEL)?;
        for index in 0..T::LIST.len() {
            let entry = Entry {
                data: Arc::as_ptr(&data),
                index,
            };
            entries.push(entry, GFP_KERNEL)?;
        }
        let dir = Dir::new(name, Some(parent));
        for (entry, (name, writable)) in entries.iter().zip(T::LIST) {
            // SAFETY: The name is copied; the directory is there or an error, which is passed on.
            // The entry and the data go after the file, and `OPS` with the module, which an open
            // file keeps.
            unsafe {
                bindings::pmem_helper_debugfs_create_file(
                    name.as_char_ptr(),
                    if *writable { 0o600 } else { 0o400 },
                    dir.dentry,
                    (&raw const *entry).cast_mut().cast(),
                    Self::OPS,
                )
            };
        }
        Ok(Files {
            _dir: dir,
            _entries: entries,
            _data: data,
            _module: PhantomData,
        })
    }

    /// # Safety
    ///
    /// Called by debugfs, for a file of `new()` that is there.
    unsafe extern "C" fn open(inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
        // SAFETY: By the function's contract; the inode has the entry.
        unsafe {
            let entry = (*inode).i_private;
            bindings::single_open(file, Some(Self::show), entry)
        }
    }

    /// # Safety
    ///
    /// Called by `seq_read()`, for a file that [`open`](Self::open) has opened and that is there.
    unsafe extern "C" fn show(seq: *mut bindings::seq_file, _: *mut c_void) -> c_int {
        // SAFETY: By the function's contract: the entry and its data go after the file.
        let (data, index) = unsafe {
            let entry = &*(*seq).private.cast::<Entry<T>>();
            (&*entry.data, entry.index)
        };
        match data.show(index) {
            Ok(text) => {
                for part in [text.to_bytes(), b"\n"] {
                    // SAFETY: The bytes are copied. What has no room is asked for again.
                    unsafe { bindings::seq_write(seq, part.as_ptr().cast(), part.len()) };
                }
                0
            }
            Err(error) => error.to_errno(),
        }
    }

    /// # Safety
    ///
    /// Called by debugfs, for a file that [`open`](Self::open) has opened and that is there.
    unsafe extern "C" fn write(
        file: *mut bindings::file,
        text: *const c_char,
        count: usize,
        _: *mut bindings::loff_t,
    ) -> isize {
        // SAFETY: By the function's contract: `single_open()` has set the private data. The entry
        // and its data go after the file.
        let (data, index) = unsafe {
            let seq = (*file).private_data.cast::<bindings::seq_file>();
            let entry = &*(*seq).private.cast::<Entry<T>>();
            (&*entry.data, entry.index)
        };
        let store = || -> Result {
            if count > PAGE_SIZE {
                return Err(E2BIG);
            }
            let mut bytes = KVec::new();
            UserSlice::new(UserPtr::from_ptr(text.cast_mut().cast()), count)
                .reader()
                .read_all(&mut bytes, GFP_KERNEL)?;
            let text = core::str::from_utf8(&bytes).map_err(|_| EINVAL)?;
            data.store(index, text.strip_suffix('\n').unwrap_or(text))
        };
        match store() {
            Ok(()) => count as isize,
            Err(error) => error.to_errno() as isize,
        }
    }
}
