// SPDX-License-Identifier: GPL-2.0-only

//! Safe abstractions over kernel interfaces that the kernel crate does not have yet.
//!
//! The only home of FFI in the driver. Nothing here knows what pmem is: each file could become a
//! file of `rust/kernel/`.

pub(crate) mod attribute;
pub(crate) mod badblocks;
mod bindings;
pub(crate) mod bio;
pub(crate) mod compat;
pub(crate) mod config;
pub(crate) mod cpu;
pub(crate) mod dax;
#[cfg(PMEM_DAX_BUS)]
pub(crate) mod daxbus;
pub(crate) mod debugfs;
pub(crate) mod disk;
pub(crate) mod global;
pub(crate) mod hotplug;
#[cfg(CONFIG_KUNIT = "y")]
pub(crate) mod kunit;
pub(crate) mod mapping;
pub(crate) mod mc;
pub(crate) mod numa;
pub(crate) mod param;
pub(crate) mod pci;
pub(crate) mod percpu;
pub(crate) mod platform;
pub(crate) mod random;
pub(crate) mod region;
pub(crate) mod tier;
#[cfg(CONFIG_VIRTIO)]
pub(crate) mod virtio;
pub(crate) mod workqueue;
