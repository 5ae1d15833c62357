// SPDX-License-Identifier: GPL-2.0-only

//! Platform devices, as those see them who are not their drivers.
//!
//! C header: [`include/linux/platform_device.h`](srctree/include/linux/platform_device.h)

use super::bindings;
use kernel::prelude::*;

/// Returns whether there is a platform device called `name` that a driver has. Waits for a driver
/// that is taking it or giving it back.
pub(crate) fn is_bound(name: &CStr) -> bool {
    // SAFETY: The name is only compared.
    unsafe { bindings::pmem_helper_platform_is_bound(name.as_char_ptr()) }
}
