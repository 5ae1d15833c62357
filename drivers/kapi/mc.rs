// SPDX-License-Identifier: GPL-2.0-only

//! Copies that survive a machine check.
//!
//! C header: [`include/linux/uaccess.h`](srctree/include/linux/uaccess.h)

use super::bindings;
use crate::pmem_core::persist::VolatileSlice;
use kernel::prelude::*;

/// Copies `from`, which may have bad memory in it, to `to`, which is at least as long.
///
/// # Errors
///
/// - `EIO`: a part of `from` cannot be read, on a machine that can tell.
/// - `EINVAL`: `to` is shorter than `from`, or both are 4 GiB or longer.
#[inline]
pub(crate) fn copy(to: VolatileSlice<'_>, from: VolatileSlice<'_>) -> Result {
    let len = u32::try_from(from.len())?;
    if to.len() < from.len() {
        return Err(EINVAL);
    }
    // SAFETY: By the invariants of `VolatileSlice` both are valid, and their length was checked.
    // The copy is made by assembly, to which an overlap is only a concurrent writer.
    let left =
        unsafe { bindings::copy_mc_to_kernel(to.as_ptr().cast(), from.as_ptr().cast(), len) };
    if left == 0 {
        Ok(())
    } else {
        Err(EIO)
    }
}
