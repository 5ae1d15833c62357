// SPDX-License-Identifier: GPL-2.0-only

//! What differs between the kernels that the driver is for.
//!
//! The driver is written for the newest of them, whose own things these are. What an older one lacks, it
//! has here under the same name.

#[cfg_attr(PMEM_KERNEL_7_2, path = "compat/v7_2.rs")]
#[cfg_attr(not(PMEM_KERNEL_7_2), path = "compat/v7_3.rs")]
mod version;

pub(crate) use self::version::*;
