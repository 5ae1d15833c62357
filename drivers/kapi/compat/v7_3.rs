// SPDX-License-Identifier: GPL-2.0-only

//! What Linux 7.3 has, and an older one lacks.

use crate::kapi::bindings;

#[cfg(CONFIG_KUNIT = "y")]
pub(crate) use kernel::error::code::{
    EALREADY,
    EPROTO, //
};
pub(crate) use kernel::{
    error::code::{
        EHWPOISON,
        EOPNOTSUPP, //
    },
    module::this_module,
    new_spinlock_irq,
    pci_device_table,
    sync::{
        rcu::synchronize_rcu,
        SpinLockIrq, //
    },
    ModuleMetadata, //
};

/// What a probe is told of the entry of the table of IDs.
pub(crate) type IdInfo<'a, T> = Option<&'a T>;

/// A table of IDs without anything that a probe is told.
macro_rules! id_array {
    [$($id:expr),+] => {
        ::kernel::device_id::IdArray::new_without_index([$($id),+])
    };
}
pub(crate) use id_array;

/// What memory that is added becomes by itself, if that can be known.
pub(in crate::kapi) fn default_online_type() -> Option<bindings::mmop> {
    // SAFETY: Reads a setting.
    Some(unsafe { bindings::mhp_get_default_online_type() })
}

/// How much of the segment that is next was done before.
#[inline(always)]
pub(in crate::kapi) fn bvec_offset(iter: &bindings::bvec_iter) -> u32 {
    iter.bi_offset
}
