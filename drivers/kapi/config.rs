// SPDX-License-Identifier: GPL-2.0-only

//! Strings of the kernel configuration.

use super::bindings;
use kernel::prelude::*;

/// Is called at build time alone, where a panic is an error of the build.
const fn c_str(bytes: &'static [u8]) -> &'static CStr {
    match CStr::from_bytes_with_nul(bytes) {
        Ok(s) => s,
        Err(_) => panic!("a Kconfig string holds a NUL"),
    }
}

/// `CONFIG_BLK_DEV_RUST_PMEM_START`, or its default in an external build.
pub(crate) const BLK_DEV_RUST_PMEM_START: &CStr = c_str(bindings::PMEM_DEFAULT_START);
/// `CONFIG_BLK_DEV_RUST_PMEM_SIZE`, or its default in an external build.
pub(crate) const BLK_DEV_RUST_PMEM_SIZE: &CStr = c_str(bindings::PMEM_DEFAULT_SIZE);
/// `CONFIG_BLK_DEV_RUST_PMEM_COUNT`, or its default in an external build.
pub(crate) const BLK_DEV_RUST_PMEM_COUNT: &CStr = c_str(bindings::PMEM_DEFAULT_COUNT);
