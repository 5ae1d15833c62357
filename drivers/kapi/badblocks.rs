// SPDX-License-Identifier: GPL-2.0-only

//! Lists of bad sectors.
//!
//! C header: [`include/linux/badblocks.h`](srctree/include/linux/badblocks.h)

use super::bindings;
use crate::pmem_core::extent::Sector;
use core::{
    ops::Range,
    ptr::NonNull, //
};
use kernel::{
    error::to_result,
    macros::kunit_tests,
    prelude::*,
    sync::SetOnce,
    types::Opaque, //
};

/// The most sectors that the C functions are asked for at once. They count them in an `int`.
const PIECE: u64 = 1 << 30;

/// The beginning of `sectors`, at most [`PIECE`] of them, and the others; or nothing if there are
/// none.
fn piece(sectors: &Range<Sector>) -> Option<(u64, Range<Sector>)> {
    let count = sectors.end.0.checked_sub(sectors.start.0)?.min(PIECE);
    let rest = Sector(sectors.start.0.wrapping_add(count))..sectors.end;
    (count != 0).then_some((count, rest))
}

/// A list of bad sectors: at most 512 runs, each of at most 512 sectors.
///
/// A disk can have one, see [`Operations::badblocks`](super::disk::Operations::badblocks). It is then
/// the file `badblocks` of the disk in sysfs, and root adds sectors by writing to that. So a list
/// can get longer at any time.
///
/// # Invariants
///
/// `list` is initialized.
#[pin_data(PinnedDrop)]
pub(crate) struct Badblocks {
    #[pin]
    list: Opaque<bindings::badblocks>,
    file: SetOnce<File>,
}

// SAFETY: The C object has a lock of its own, and belongs to no thread.
unsafe impl Send for Badblocks {}

// SAFETY: As for `Send`.
unsafe impl Sync for Badblocks {}

impl Badblocks {
    /// Makes a list without sectors.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new() -> impl PinInit<Self, Error> {
        // INVARIANT: Initialized here.
        try_pin_init!(Badblocks {
            list <- Opaque::try_ffi_init(|list: *mut bindings::badblocks| {
                // SAFETY: `list` is valid for writes, pinned, and all zeros are a value of it.
                // `badblocks_init()` does not set each field.
                unsafe {
                    list.write_bytes(0, 1);
                    to_result(bindings::badblocks_init(list, 1))
                }
            }),
            file: SetOnce::new(),
        } ? Error)
    }

    /// How many runs there are.
    #[inline]
    pub(crate) fn runs(&self) -> u32 {
        // SAFETY: By the type invariant. It is changed under a lock by one store, so that what is
        // read is one of the values that it had.
        unsafe { (&raw const (*self.list.get()).count).read_volatile() as u32 }
    }

    /// The first bad sectors of `sectors` that follow each other in one run.
    pub(crate) fn first(&self, sectors: &Range<Sector>) -> Option<Range<Sector>> {
        let mut left = sectors.clone();
        while let Some((count, rest)) = piece(&left) {
            let (mut first, mut bad) = (0, 0);
            // SAFETY: By the type invariant; the C function takes the lock.
            let found = unsafe {
                bindings::badblocks_check(
                    self.list.get(),
                    left.start.0,
                    count,
                    &mut first,
                    &mut bad,
                )
            };
            if found != 0 {
                let start = Sector(first).max(left.start);
                let end = Sector(first.saturating_add(bad)).min(left.end);
                return (start < end).then_some(start..end);
            }
            left = rest;
        }
        None
    }

    /// All runs of bad sectors in `sectors`.
    pub(crate) fn all(&self, sectors: Range<Sector>) -> impl Iterator<Item = Range<Sector>> + '_ {
        let mut left = sectors;
        core::iter::from_fn(move || {
            let run = self.first(&left)?;
            left.start = run.end;
            Some(run)
        })
    }

    /// Adds `sectors`.
    ///
    /// # Errors
    ///
    /// `ENOSPC`: the list is full. Some of them may have been added.
    pub(crate) fn set(&self, sectors: &Range<Sector>) -> Result {
        let mut left = sectors.clone();
        let mut done = true;
        while let Some((count, rest)) = piece(&left).filter(|_| done) {
            // SAFETY: By the type invariant; the C function takes the lock.
            done = unsafe { bindings::badblocks_set(self.list.get(), left.start.0, count, 1) };
            left = rest;
        }
        self.notify();
        if done {
            Ok(())
        } else {
            Err(ENOSPC)
        }
    }

    /// Removes `sectors`, as far as they are in the list.
    ///
    /// # Errors
    ///
    /// `ENOSPC`: the list is full, and one more run would be needed. It has some of them still.
    pub(crate) fn clear(&self, sectors: &Range<Sector>) -> Result {
        if self.first(sectors).is_none() {
            return Ok(());
        }
        let mut left = sectors.clone();
        while let Some((count, rest)) = piece(&left) {
            // SAFETY: By the type invariant; the C function takes the lock.
            unsafe { bindings::badblocks_clear(self.list.get(), left.start.0, count) };
            left = rest;
        }
        self.notify();
        if self.first(sectors).is_some() {
            return Err(ENOSPC);
        }
        Ok(())
    }

    /// Wakes who waits for a change of the file in sysfs.
    fn notify(&self) {
        if let Some(file) = self.file.as_ref() {
            // SAFETY: `File` has a reference; may be called in any context.
            unsafe { bindings::kernfs_notify(file.0.as_ptr()) };
        }
    }

    /// The C object, for a disk.
    pub(super) fn as_ptr(&self) -> *mut bindings::badblocks {
        self.list.get()
    }

    /// Finds the file in sysfs, which is told of changes from then on.
    ///
    /// # Safety
    ///
    /// `disk` was added.
    pub(super) unsafe fn attach(&self, disk: NonNull<bindings::gendisk>) {
        // SAFETY: By the function's contract.
        let file = unsafe { bindings::pmem_helper_disk_badblocks_file(disk.as_ptr()) };
        match NonNull::new(file) {
            // A second call changes nothing, and drops the reference.
            Some(file) => drop(self.file.populate(File(file))),
            None => pr_warn!("no notification of bad blocks\n"),
        }
    }
}

#[pinned_drop]
impl PinnedDrop for Badblocks {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariant, and nobody uses it any more.
        unsafe { bindings::badblocks_exit(self.list.get()) };
    }
}

/// A reference to a file in sysfs, which outlives the file.
struct File(NonNull<bindings::kernfs_node>);

// SAFETY: A reference can be put by any thread.
unsafe impl Send for File {}

// SAFETY: As for `Send`; `kernfs_notify()` has a lock of its own.
unsafe impl Sync for File {}

impl Drop for File {
    fn drop(&mut self) {
        // SAFETY: The reference is this one's.
        unsafe { bindings::kernfs_put(self.0.as_ptr()) };
    }
}

#[kunit_tests(pmem_badblocks)]
mod tests {
    use super::*;
    use kernel::sync::Arc;

    fn list() -> Result<Arc<Badblocks>> {
        Arc::pin_init(Badblocks::new(), GFP_KERNEL)
    }

    fn sectors(start: u64, end: u64) -> Range<Sector> {
        Sector(start)..Sector(end)
    }

    #[test]
    fn finds_what_was_added_and_no_more() -> Result {
        let list = list()?;
        assert_eq!(list.runs(), 0);
        assert!(list.first(&sectors(0, 1 << 40)).is_none());

        list.set(&sectors(100, 104))?;
        list.set(&sectors(200, 201))?;
        for (asked, found) in [
            (sectors(0, 100), None),
            (sectors(0, 101), Some(sectors(100, 101))),
            (sectors(102, 300), Some(sectors(102, 104))),
            (sectors(104, 200), None),
            (sectors(104, 1 << 40), Some(sectors(200, 201))),
            (sectors(103, 103), None),
            (sectors(201, 200), None),
        ] {
            assert_eq!(list.first(&asked), found);
        }
        list.clear(&sectors(300, 1 << 33))?;
        list.set(&sectors((5 << 32) - 1, (5 << 32) + 1))?;
        assert_eq!(
            list.first(&sectors(300, 1 << 35)),
            Some(sectors((5 << 32) - 1, (5 << 32) + 1))
        );
        list.clear(&sectors(300, 1 << 35))?;
        let mut all = list.all(sectors(101, 1000));
        assert_eq!(all.next(), Some(sectors(101, 104)));
        assert_eq!(all.next(), Some(sectors(200, 201)));
        assert_eq!(all.next(), None);
        Ok(())
    }

    #[test]
    fn clears_a_part_of_a_run() -> Result {
        let list = list()?;
        list.set(&sectors(8, 16))?;
        list.clear(&sectors(10, 11))?;
        list.clear(&sectors(15, 90))?;
        let mut all = list.all(sectors(0, 1000));
        assert_eq!(all.next(), Some(sectors(8, 10)));
        assert_eq!(all.next(), Some(sectors(11, 15)));
        assert_eq!(all.next(), None);
        list.clear(&sectors(0, 1000))?;
        assert_eq!(list.runs(), 0);
        Ok(())
    }

    /// Runs are of 512 sectors at most, and none may be lost between two of them.
    #[test]
    fn takes_long_ranges() -> Result {
        let list = list()?;
        list.set(&sectors(7, 5000))?;
        let covered: u64 = list
            .all(sectors(0, 10000))
            .map(|run| run.end.0 - run.start.0)
            .sum();
        assert_eq!(covered, 4993);
        list.clear(&sectors(0, 10000))?;
        assert!(list.first(&sectors(0, 10000)).is_none());
        Ok(())
    }

    #[test]
    fn a_full_list_says_so() -> Result {
        let list = list()?;
        for i in 0..512 {
            list.set(&sectors(i * 10, i * 10 + 3))?;
        }
        assert_eq!(list.set(&sectors(9000, 9001)), Err(ENOSPC));
        // One run would become two.
        assert_eq!(list.clear(&sectors(1, 2)), Err(ENOSPC));
        assert_eq!(list.first(&sectors(0, 10)), Some(sectors(0, 3)));
        list.clear(&sectors(0, 3))?;
        list.set(&sectors(9000, 9001))?;
        assert_eq!(list.first(&sectors(5200, 10000)), Some(sectors(9000, 9001)));
        Ok(())
    }
}
