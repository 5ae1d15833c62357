// SPDX-License-Identifier: GPL-2.0-only

//! Disks that take bios directly, without a request queue of their own.
//!
//! C header: [`include/linux/blkdev.h`](srctree/include/linux/blkdev.h)

use super::{
    attribute::{
        Attributes,
        Group, //
    },
    badblocks::Badblocks,
    bindings,
    bio::Bio,
    compat::ModuleMetadata,
    dax,
    numa::Node, //
};
use crate::pmem_core::extent::Sector;
use core::{
    ops::BitOr,
    ptr::{
        null,
        null_mut,
        NonNull, //
    }, //
};
use kernel::{
    device::Device,
    error::{
        from_err_ptr,
        to_result, //
    },
    fmt,
    prelude::*,
    static_lock_class,
    str::CString,
    sync::{
        aref::ARef,
        Arc, //
    }, //
};

/// What a disk does with its bios.
pub(crate) trait Operations: Send + Sync + 'static {
    /// The module that must stay loaded while the disk is open.
    type Module: ModuleMetadata;

    /// Serves `bio`, and completes it now or later.
    ///
    /// Runs in the context of the submitter, on any number of CPUs at once. It must not sleep
    /// when the bio has `REQ_NOWAIT` and the disk has [`Features::NOWAIT`].
    fn submit_bio(&self, bio: Bio);

    /// Decides whether the disk may be opened.
    ///
    /// # Errors
    ///
    /// What `open(2)` is to give.
    fn open(&self) -> Result {
        Ok(())
    }

    /// The list of the disk's bad sectors, if it has one.
    fn badblocks(&self) -> Option<&Badblocks> {
        None
    }
}

/// Features that a disk advertises.
///
/// C header: `blk_features_t` in [`include/linux/blkdev.h`](srctree/include/linux/blkdev.h)
#[derive(Clone, Copy)]
pub(crate) struct Features(bindings::blk_features_t);

impl Features {
    /// Completed writes may be lost with the power until a flush: flushes are sent.
    pub(crate) const WRITE_CACHE: Self = Features(bindings::PMEM_CONST_BLK_FEAT_WRITE_CACHE);
    /// A write can ask to be durable when it completes.
    pub(crate) const FUA: Self = Features(bindings::PMEM_CONST_BLK_FEAT_FUA);
    /// Bios complete before `submit_bio()` returns.
    pub(crate) const SYNCHRONOUS: Self = Features(bindings::PMEM_CONST_BLK_FEAT_SYNCHRONOUS);
    /// Bios can be submitted from where sleeping is not allowed.
    pub(crate) const NOWAIT: Self = Features(bindings::PMEM_CONST_BLK_FEAT_NOWAIT);
    /// File systems can access the memory of the disk directly.
    pub(crate) const DAX: Self = Features(bindings::PMEM_CONST_BLK_FEAT_DAX);
    /// Writes of [`Limits::atomic_write_unit`] are done wholly or not at all, whatever happens.
    pub(crate) const ATOMIC_WRITES: Self = Features(bindings::PMEM_CONST_BLK_FEAT_ATOMIC_WRITES);
}

impl BitOr for Features {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Features(self.0 | other.0)
    }
}

/// What a disk promises, and what it asks of its bios.
///
/// By default it only reads and writes, in sectors of 512 bytes.
#[derive(Clone, Copy)]
pub(crate) struct Limits {
    /// The smallest and the alignment of all I/O, in bytes: a power of two, 512 to `PAGE_SIZE`.
    pub(crate) logical_block_size: u32,
    /// What file systems should align to, in bytes: a power of two.
    pub(crate) physical_block_size: u32,
    /// The largest read or write, in sectors.
    pub(crate) max_hw_sectors: u32,
    /// The largest `REQ_OP_WRITE_ZEROES`, in sectors; 0 for none.
    pub(crate) max_write_zeroes_sectors: u32,
    /// The largest `REQ_OP_DISCARD`, in sectors; 0 for none.
    pub(crate) max_discard_sectors: u32,
    /// The unit of discards, in bytes.
    pub(crate) discard_granularity: u32,
    /// The size of an atomic write, in bytes: a power of two.
    pub(crate) atomic_write_unit: u32,
    /// See [`Features`].
    pub(crate) features: Features,
    /// Whether the disk can only be read.
    pub(crate) read_only: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            logical_block_size: 512,
            physical_block_size: 512,
            max_hw_sectors: u32::MAX,
            max_write_zeroes_sectors: 0,
            max_discard_sectors: 0,
            discard_granularity: 0,
            atomic_write_unit: 0,
            features: Features(0),
            read_only: false,
        }
    }
}

/// A `struct gendisk` that is not in `/dev`.
///
/// # Invariants
///
/// Holds a reference that `__blk_alloc_disk()` has given.
struct Allocated(NonNull<bindings::gendisk>);

impl Allocated {
    /// Fails with `EEXIST` if a disk or a partition of this name is there already.
    ///
    /// Who adds a disk finds out, too, but sysfs then complains in the log. Another one may still
    /// take the name between this and that.
    fn check_name(&self, name: &CStr) -> Result {
        // SAFETY: The disk has a device from its allocation on, whose class is that of all disks
        // and partitions: the static itself is not exported. The name is compared with theirs.
        // What is found has a reference, which is given back.
        unsafe {
            let device = &raw const (*(*self.0.as_ptr()).part0).bd_device;
            let found = bindings::class_find_device(
                (*device).class,
                null(),
                name.as_char_ptr().cast(),
                Some(bindings::device_match_name),
            );
            if found.is_null() {
                return Ok(());
            }
            bindings::put_device(found);
        }
        Err(EEXIST)
    }
}

impl Drop for Allocated {
    fn drop(&mut self) {
        // SAFETY: By the type invariant.
        unsafe { bindings::put_disk(self.0.as_ptr()) };
    }
}

/// A disk that is complete, and that nobody sees yet.
///
/// # Invariants
///
/// The private data of `disk` is `data`.
pub(crate) struct Prepared<T: Operations> {
    // In the order in which they go.
    _host: Option<dax::Host<T>>,
    disk: Allocated,
    group: Option<Group>,
    parent: Option<ARef<Device>>,
    data: Arc<T>,
}

// SAFETY: A reference to a C object with locks of its own, and to data that can be shared.
unsafe impl<T: Operations> Send for Prepared<T> {}

// SAFETY: As for `Send`.
unsafe impl<T: Operations> Sync for Prepared<T> {}

impl<T: Operations> Prepared<T> {
    const OPS: &'static bindings::block_device_operations = &bindings::block_device_operations {
        submit_bio: Some(Self::submit_bio),
        open: Some(Self::open),
        owner: T::Module::THIS_MODULE.as_ptr(),
        ..pin_init::zeroed()
    };

    /// Makes a disk of `capacity` sectors, `/dev/<name>`, that is served by `data` and, when `dax`
    /// is given, accessed through it.
    ///
    /// # Errors
    ///
    /// - `EEXIST`: the name is taken.
    /// - `EINVAL`: the limits contradict each other, or the name is too long.
    /// - `ENOMEM`.
    pub(crate) fn new(
        name: fmt::Arguments<'_>,
        capacity: Sector,
        limits: &Limits,
        node: Node,
        data: Arc<T>,
        dax: Option<dax::Device<T>>,
    ) -> Result<Self> {
        let mut lim: bindings::queue_limits = pin_init::zeroed();
        lim.logical_block_size = limits.logical_block_size;
        lim.physical_block_size = limits.physical_block_size;
        lim.max_hw_sectors = limits.max_hw_sectors;
        lim.max_write_zeroes_sectors = limits.max_write_zeroes_sectors;
        lim.max_hw_discard_sectors = limits.max_discard_sectors;
        lim.discard_granularity = limits.discard_granularity;
        lim.atomic_write_hw_unit_min = limits.atomic_write_unit;
        lim.atomic_write_hw_unit_max = limits.atomic_write_unit;
        lim.atomic_write_hw_max = limits.atomic_write_unit;
        lim.features = limits.features.0;

        // SAFETY: `lim` is initialized, and the lock class is a static.
        let disk = from_err_ptr(unsafe {
            bindings::__blk_alloc_disk(&mut lim, node.id(), static_lock_class!().as_ptr())
        })?;
        // INVARIANT: Just allocated.
        let disk = Allocated(NonNull::new(disk).ok_or(ENOMEM)?);

        let name = CString::try_from_fmt(name)?;
        disk.check_name(&name)?;
        {
            // SAFETY: Nobody else knows the disk yet.
            let disk = unsafe { &mut *disk.0.as_ptr() };
            let bytes = name.to_bytes_with_nul();
            let buffer = disk.disk_name.get_mut(..bytes.len()).ok_or(EINVAL)?;
            for (to, from) in buffer.iter_mut().zip(bytes) {
                *to = *from as c_char;
            }
            disk.fops = Self::OPS;
            disk.private_data = Arc::as_ptr(&data).cast_mut().cast();
            // Only files in sysfs use it, which are gone before `data` is.
            if let Some(list) = data.badblocks() {
                disk.bb = list.as_ptr().cast();
            }
        }
        // SAFETY: The disk is valid.
        unsafe {
            bindings::set_capacity(disk.0.as_ptr(), capacity.0);
            if limits.read_only {
                bindings::set_disk_ro(disk.0.as_ptr(), true);
            }
        }

        let host = match dax {
            // SAFETY: The host is dropped before `disk`: here because it is declared later, in
            // `Prepared` because it is declared earlier.
            Some(device) => Some(unsafe { dax::Host::new(device, disk.0) }?),
            None => None,
        };

        // INVARIANT: Set above.
        Ok(Prepared {
            _host: host,
            disk,
            group: None,
            parent: None,
            data,
        })
    }

    /// Gives the disk the attributes of `data`, in a directory called `name` of its own. They are
    /// there when user space hears of the disk.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn with_attributes(
        mut self,
        name: &'static CStr,
        data: Arc<impl Attributes>,
    ) -> Result<Self> {
        self.group = Some(Group::new(Some(name), data)?);
        Ok(self)
    }

    /// Makes the disk a child of `parent` in sysfs.
    pub(crate) fn with_parent(mut self, parent: ARef<Device>) -> Self {
        self.parent = Some(parent);
        self
    }

    /// What is to serve the disk.
    pub(crate) fn data(&self) -> &Arc<T> {
        &self.data
    }

    /// Shows the disk to users.
    ///
    /// From then on it may be open, by a scan for partitions in the first place, whose file is
    /// closed as late as on the return to user space. The block layer holds a reference to the
    /// module, but that does not keep one whose `init()` fails. So `init()` must not fail any more.
    ///
    /// # Errors
    ///
    /// Nobody has seen the disk then.
    ///
    /// - `EEXIST`: the name is taken.
    /// - `ENOMEM`.
    pub(crate) fn add(self) -> Result<Disk<T>> {
        // SAFETY: `new()` has written the name, with a NUL at its end.
        let name = unsafe { CStr::from_char_ptr((*self.disk.0.as_ptr()).disk_name.as_ptr()) };
        self.disk.check_name(name)?;
        let groups = self.group.as_ref().map_or(null_mut(), Group::as_ptr);
        // The type is transparent.
        let parent = self.parent.as_deref().map_or(null_mut(), |parent| {
            core::ptr::from_ref(parent).cast_mut().cast()
        });
        // SAFETY: By the type invariant the disk is complete. `data` and the group live until
        // `del_gendisk()` has waited for the bios that are in flight, and removed the attributes; so
        // does the parent.
        to_result(unsafe { bindings::device_add_disk(parent, self.disk.0.as_ptr(), groups) })?;
        if let Some(list) = self.data.badblocks() {
            // SAFETY: Just added.
            unsafe { list.attach(self.disk.0) };
        }
        // INVARIANT: Just added.
        Ok(Disk(self))
    }

    /// # Safety
    ///
    /// Called by the block layer, with a bio for a disk of `new()`.
    unsafe extern "C" fn submit_bio(bio: *mut bindings::bio) {
        // SAFETY: By the function's contract the bio is valid, and ours from now on; its disk's
        // private data was set by `new()`, and lives until no bio is in flight.
        let (data, bio) = unsafe {
            let disk = (*(*bio).bi_bdev).bd_disk;
            let data = &*(*disk).private_data.cast::<T>();
            (data, Bio::from_raw(NonNull::new_unchecked(bio)))
        };
        data.submit_bio(bio);
    }

    /// # Safety
    ///
    /// Called by the block layer, with a disk of `new()` that is live.
    unsafe extern "C" fn open(disk: *mut bindings::gendisk, _mode: bindings::blk_mode_t) -> c_int {
        // SAFETY: The disk's private data was set by `new()`, and lives until it is not live.
        let data = unsafe { &*(*disk).private_data.cast::<T>() };
        match data.open() {
            Ok(()) => 0,
            Err(error) => error.to_errno(),
        }
    }
}

/// A disk that users see, served by `T`.
///
/// # Invariants
///
/// Was added with `device_add_disk()`.
pub(crate) struct Disk<T: Operations>(Prepared<T>);

impl<T: Operations> Disk<T> {
    /// What serves the disk.
    pub(crate) fn data(&self) -> &Arc<T> {
        &self.0.data
    }

    /// Calls `close` if nobody has the disk open, and returns whether it did. Nobody can open it
    /// meanwhile: if [`Operations::open`] refuses from then on, nobody ever will.
    pub(crate) fn close(&self, close: impl FnOnce(&T)) -> bool {
        let disk = self.0.disk.0.as_ptr();
        // SAFETY: The disk is live. The mutex is unlocked below.
        unsafe {
            bindings::pmem_helper_disk_lock_open(disk);
            let unused = bindings::pmem_helper_disk_openers(disk) == 0;
            if unused {
                close(&self.0.data);
            }
            bindings::pmem_helper_disk_unlock_open(disk);
            unused
        }
    }

    /// Tells user space, by a uevent, that the disk has changed. `variable` comes with it, a name
    /// and a value: `NAME=value`.
    ///
    /// The uevent of a disk that is added can have no variable of the driver's: the block layer
    /// sends it.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn send_change(&self, variable: &CStr) -> Result {
        let mut variables = [variable.as_char_ptr().cast_mut(), null_mut()];
        // SAFETY: The disk is live. The list ends with null, and its strings are only read.
        to_result(unsafe {
            bindings::kobject_uevent_env(
                &raw mut (*(*self.0.disk.0.as_ptr()).part0).bd_device.kobj,
                bindings::kobject_action_KOBJ_CHANGE,
                variables.as_mut_ptr(),
            )
        })
    }

    /// Says that what the disk is made of has gone: bios fail from now on, and file systems shut down
    /// instead of writing back.
    pub(crate) fn mark_dead(&self) {
        // SAFETY: The disk is live.
        unsafe { bindings::blk_mark_disk_dead(self.0.disk.0.as_ptr()) };
    }

    /// The C object, which is live.
    #[cfg(CONFIG_KUNIT = "y")]
    pub(super) fn as_ptr(&self) -> *mut bindings::gendisk {
        self.0.disk.0.as_ptr()
    }
}

impl<T: Operations> Drop for Disk<T> {
    fn drop(&mut self) {
        // File systems on the disk write back, and shut down. The DAX device goes only then: when it
        // goes, XFS looks for the files that use it, in a way that does not end if there is more than
        // one allocation group, unless it has shut down.
        //
        // SAFETY: By the type invariant the disk was added. Waits for the bios that are in flight
        // and fails those that come later.
        unsafe { bindings::del_gendisk(self.0.disk.0.as_ptr()) };
    }
}
