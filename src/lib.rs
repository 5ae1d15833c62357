// SPDX-License-Identifier: GPL-2.0-only

//! The parts of the pmem driver that need no kernel.
//!
//! Cargo builds these files as the crate `pmem-core`, for host tests and benchmarks. The kernel
//! module includes the same files as a module of its own crate:
//!
//! ```ignore
//! #[path = "../src/lib.rs"]
//! pub mod core_;
//! ```
//!
//! So nothing here may name the kernel, `std`, `alloc` or `crate::`, and nothing may panic, whatever
//! a user, a device or a medium hands in. The compiler configuration `CONFIG_RUST`, which Kbuild
//! passes, tells the two builds apart.

#![cfg_attr(not(CONFIG_RUST), no_std)]
#![deny(missing_docs)]
#![deny(unsafe_code)]

pub mod extent;
pub mod flush;
pub mod iopmem;
pub mod kmem;
pub mod medium;
pub mod memmap;
pub mod persist;
pub mod range;
pub mod reserve;
pub mod size;
