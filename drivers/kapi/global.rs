// SPDX-License-Identifier: GPL-2.0-only

//! Values that callbacks find which get no pointer of their driver's.

use super::compat::synchronize_rcu;
use core::{
    marker::PhantomData,
    ptr::{
        null_mut,
        NonNull, //
    },
    sync::atomic::{
        AtomicPtr,
        Ordering, //
    }, //
};
use kernel::{
    prelude::*,
    sync::{
        rcu,
        Arc, //
    }, //
};

/// A static that has a value from [`Global::provide`] on, until what that returns is dropped.
///
/// # Invariants
///
/// The pointer is null, or one of `Arc::into_raw()` whose reference is given back only after a grace
/// period of RCU in which it is null.
pub(crate) struct Global<T: 'static> {
    value: AtomicPtr<T>,
    _value: PhantomData<Arc<T>>,
}

/// Has the value of a [`Global`] there as long as it lives.
pub(crate) struct Provided<T: Send + Sync + 'static>(&'static Global<T>);

// SAFETY: It gives out references to a value that can be shared, and drops it on any thread.
unsafe impl<T: Send + Sync> Sync for Global<T> {}

impl<T: Send + Sync + 'static> Global<T> {
    /// One without a value.
    pub(crate) const fn new() -> Self {
        // INVARIANT: It is null.
        Global {
            value: AtomicPtr::new(null_mut()),
            _value: PhantomData,
        }
    }

    /// Gives it a value.
    ///
    /// # Errors
    ///
    /// - `EBUSY`: it has one.
    /// - `ENOMEM`.
    /// - Those of `value`.
    pub(crate) fn provide(&'static self, value: impl PinInit<T, Error>) -> Result<Provided<T>> {
        let value = Arc::into_raw(Arc::pin_init(value, GFP_KERNEL)?).cast_mut();
        // INVARIANT: Its reference is given back by `Provided::drop()`.
        let stored =
            self.value
                .compare_exchange(null_mut(), value, Ordering::Release, Ordering::Relaxed);
        if stored.is_err() {
            // SAFETY: It was not stored, and so is ours alone.
            drop(unsafe { Arc::from_raw(value) });
            return Err(EBUSY);
        }
        Ok(Provided(self))
    }

    /// The value, if there is one.
    pub(crate) fn get(&self) -> Option<Arc<T>> {
        let guard = rcu::read_lock();
        let value = NonNull::new(self.value.load(Ordering::Acquire))?;
        // SAFETY: By the type invariant there is a reference, which is not given back before the
        // guard is; the one that is made of it is our own.
        let value = unsafe {
            let borrowed = core::mem::ManuallyDrop::new(Arc::from_raw(value.as_ptr()));
            Arc::clone(&borrowed)
        };
        drop(guard);
        Some(value)
    }
}

impl<T: Send + Sync> Drop for Provided<T> {
    fn drop(&mut self) {
        let value = self.0.value.swap(null_mut(), Ordering::AcqRel);
        // Whoever has read the pointer has a reference of its own after that.
        synchronize_rcu();
        if !value.is_null() {
            // SAFETY: By the type invariant the reference is there, and no more to be found.
            drop(unsafe { Arc::from_raw(value) });
        }
    }
}

#[kernel::macros::kunit_tests(pmem_global)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_value_as_long_as_it_is_provided() -> Result {
        static GLOBAL: Global<Arc<u32>> = Global::new();

        let value = Arc::new(7, GFP_KERNEL)?;
        for _ in 0..2 {
            assert!(GLOBAL.get().is_none());
            let provided = GLOBAL.provide(Ok(value.clone()))?;
            assert_eq!(GLOBAL.get().map(|found| **found), Some(7));
            assert!(matches!(GLOBAL.provide(Ok(value.clone())), Err(EBUSY)));
            assert_eq!(GLOBAL.get().map(|found| **found), Some(7));

            // Who has found it keeps it.
            let found = GLOBAL.get().ok_or(EINVAL)?;
            drop(provided);
            assert!(GLOBAL.get().is_none());
            assert_eq!(**found, 7);
        }
        // Nobody else has it any more.
        assert_eq!(Arc::into_unique_or_drop(value).map(|value| *value), Some(7));
        Ok(())
    }
}
