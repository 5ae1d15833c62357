// SPDX-License-Identifier: GPL-2.0-only

//! Tests that boot a virtual machine and use the driver in it.

mod allocations;
mod builtin;
mod cache;
mod calls;
mod crash;
mod dax;
mod disks;
mod e820;
mod filesystems;
mod installed;
mod io;
mod iopmem;
mod kexec;
mod kmem;
mod lifecycle;
mod limits;
mod media;
mod memmap;
mod params;
mod power;
mod races;
mod record;
mod soak;
mod stack;
mod stock;
mod suspend;
mod sysfs;
mod tools;
mod trace;
mod virtio;
