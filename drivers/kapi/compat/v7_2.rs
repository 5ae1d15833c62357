// SPDX-License-Identifier: GPL-2.0-only

//! What Linux 7.2 lacks.

use crate::kapi::bindings;
use core::mem::transmute;
use kernel::{
    prelude::*,
    sync::lock::{
        spinlock::SpinLockBackend,
        Backend,
        Lock, //
    }, //
};

/// The error with this number of C's. Called at build time alone, where a panic is an error of the build.
const fn error(number: u32) -> Error {
    // SAFETY: Any bits are a number.
    let known = unsafe { transmute::<Error, i32>(EINVAL) };
    assert!(known == -(bindings::EINVAL as i32));
    assert!(0 < number && number <= bindings::MAX_ERRNO);
    // SAFETY: As the sizes agree and the first check says, an `Error` is the negative number alone; the
    // second check says that this is one that it can have.
    unsafe { transmute::<i32, Error>(-(number as i32)) }
}

/// Operation not supported.
pub(crate) const EOPNOTSUPP: Error = error(bindings::EOPNOTSUPP);
/// Memory has failed.
pub(crate) const EHWPOISON: Error = error(bindings::EHWPOISON);
/// What has begun has begun before.
#[cfg(CONFIG_KUNIT = "y")]
pub(crate) const EALREADY: Error = error(bindings::EALREADY);
/// The other side does what makes no sense.
#[cfg(CONFIG_KUNIT = "y")]
pub(crate) const EPROTO: Error = error(bindings::EPROTO);

/// A module that knows itself.
pub(crate) trait ModuleMetadata: kernel::ModuleMetadata {
    /// What C calls `THIS_MODULE`.
    const THIS_MODULE: ThisModule;
}

impl ModuleMetadata for crate::LocalModule {
    #[cfg(MODULE)]
    const THIS_MODULE: ThisModule = {
        // SAFETY: The linker has this module's under this name.
        unsafe { ThisModule::from_ptr(&raw mut bindings::__this_module) }
    };

    #[cfg(not(MODULE))]
    const THIS_MODULE: ThisModule = {
        // SAFETY: What is built in has none.
        unsafe { ThisModule::from_ptr(core::ptr::null_mut()) }
    };
}

/// The module `M`.
pub(crate) const fn this_module<M: ModuleMetadata>() -> &'static ThisModule {
    &M::THIS_MODULE
}

/// Waits until those have ended their part of RCU's reading who had begun.
pub(crate) fn synchronize_rcu() {
    // SAFETY: May be called by whoever may sleep, as with the newer kernel's.
    unsafe { bindings::synchronize_rcu() };
}

/// What a probe is told of the entry of the table of IDs.
pub(crate) type IdInfo<'a, T> = &'a T;

/// A table of IDs without anything that a probe is told.
macro_rules! id_array {
    [$($id:expr),+] => {
        ::kernel::device_id::IdArray::new_without_index([$(($id, ())),+])
    };
}
pub(crate) use id_array;

/// A table of PCI IDs without anything that a probe is told.
macro_rules! pci_device_table {
    ($table:ident, @none, [$($id:expr),+ $(,)?]) => {
        ::kernel::pci_device_table!($table, MODULE_TABLE, (), [$(($id, ())),+]);
    };
}
pub(crate) use pci_device_table;

/// What memory that is added becomes by itself: that is not known before.
pub(in crate::kapi) fn default_online_type() -> Option<bindings::mmop> {
    None
}

/// How much of the segment that is next was done before.
#[inline(always)]
pub(in crate::kapi) fn bvec_offset(iter: &bindings::bvec_iter) -> u32 {
    iter.bi_bvec_done
}

/// A spinlock for what interrupts use as well: they are off on this CPU while it is held.
///
/// A guard puts them back to what they were when it was made. So of two, the later one goes first; the
/// newer kernel allows any order.
pub(crate) type SpinLockIrq<T> = Lock<T, SpinLockIrqBackend>;

/// How a [`SpinLockIrq`] is locked.
pub(crate) struct SpinLockIrqBackend;

// SAFETY: One CPU at a time has a `spinlock_t`. `relock()` is `lock()`.
unsafe impl Backend for SpinLockIrqBackend {
    type State = bindings::spinlock_t;
    /// Whether interrupts were on.
    type GuardState = c_ulong;

    #[inline]
    unsafe fn init(
        lock: *mut Self::State,
        name: *const c_char,
        key: *mut bindings::lock_class_key,
    ) {
        // SAFETY: The function's contract is the same.
        unsafe { SpinLockBackend::init(lock, name, key) };
    }

    #[inline]
    unsafe fn lock(lock: *mut Self::State) -> Self::GuardState {
        // SAFETY: By the function's contract it is initialized.
        unsafe { bindings::pmem_helper_spin_lock_irqsave(lock) }
    }

    #[inline]
    unsafe fn try_lock(lock: *mut Self::State) -> Option<Self::GuardState> {
        let mut flags = 0;
        // SAFETY: By the function's contract it is initialized.
        unsafe { bindings::pmem_helper_spin_trylock_irqsave(lock, &mut flags) }.then_some(flags)
    }

    #[inline]
    unsafe fn unlock(lock: *mut Self::State, flags: &Self::GuardState) {
        // SAFETY: By the function's contract it is ours, and the flags are those of when it was taken.
        unsafe { bindings::pmem_helper_spin_unlock_irqrestore(lock, *flags) };
    }

    #[inline]
    unsafe fn assert_is_held(lock: *mut Self::State) {
        // SAFETY: The function's contract is the same.
        unsafe { SpinLockBackend::assert_is_held(lock) };
    }
}

/// Makes a [`SpinLockIrq`] that is a class of its own to lockdep.
macro_rules! new_spinlock_irq {
    ($inner:expr) => {
        $crate::kapi::compat::SpinLockIrq::new(
            $inner,
            ::kernel::optional_name!(),
            ::kernel::static_lock_class!(),
        )
    };
}
pub(crate) use new_spinlock_irq;
