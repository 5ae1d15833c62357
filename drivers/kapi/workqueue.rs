// SPDX-License-Identifier: GPL-2.0-only

//! Workqueues of a driver's own.
//!
//! C header: [`include/linux/workqueue.h`](srctree/include/linux/workqueue.h)

use super::bindings;
use core::{
    ops::Deref,
    ptr::NonNull, //
};
use kernel::prelude::*;

/// A workqueue that gets a thread also when memory is so short that none can be made.
///
/// # Invariants
///
/// Points to a workqueue that is not destroyed.
pub(crate) struct ReclaimQueue(NonNull<bindings::workqueue_struct>);

// SAFETY: A workqueue has locks of its own.
unsafe impl Send for ReclaimQueue {}

// SAFETY: As for `Send`.
unsafe impl Sync for ReclaimQueue {}

impl ReclaimQueue {
    /// Makes one called `name`, whose items may run on any CPU.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(name: &CStr) -> Result<Self> {
        // SAFETY: The arguments are those that the format asks for.
        let queue = unsafe {
            bindings::alloc_workqueue_noprof(
                c"%s".as_char_ptr(),
                bindings::wq_flags_WQ_UNBOUND | bindings::wq_flags_WQ_MEM_RECLAIM,
                0,
                name.as_char_ptr(),
            )
        };
        // INVARIANT: Just made.
        NonNull::new(queue).map(ReclaimQueue).ok_or(ENOMEM)
    }

    /// Waits until all that was enqueued before is done.
    pub(crate) fn flush(&self) {
        // SAFETY: By the type invariant.
        unsafe { bindings::__flush_workqueue(self.0.as_ptr()) };
    }
}

impl Deref for ReclaimQueue {
    type Target = kernel::workqueue::Queue;

    fn deref(&self) -> &Self::Target {
        // SAFETY: By the type invariant.
        unsafe { kernel::workqueue::Queue::from_raw(self.0.as_ptr()) }
    }
}

impl Drop for ReclaimQueue {
    fn drop(&mut self) {
        // SAFETY: By the type invariant. Waits for what is in it.
        unsafe { bindings::destroy_workqueue(self.0.as_ptr()) };
    }
}
