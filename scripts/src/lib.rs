// SPDX-License-Identifier: GPL-2.0-only

//! What `cargo xtask` is made of.
//!
//! A fresh machine needs cargo and little else. Everything more comes from a Debian file system in the user's
//! cache directory, so that every host builds and tests with the same tools:
//!
//! | module | what it does |
//! |---|---|
//! | [`host`] | installs the few programs that the host itself must have |
//! | [`root`] | makes the Debian build root and runs commands in it |
//! | [`apt`] | finds the host's Debian mirror; fetches packages of one version |
//! | [`crates`] | builds what the tools need of this workspace |
//! | [`flavour`] | the kernels that we know how to build |
//! | [`kernel`] | fetches or builds one of them |
//! | [`module`] | builds `pmem.ko` for it |
//! | [`vm`] | boots it |
//! | [`test`], [`run`], [`bench`], [`crash`], [`build`], [`docs`], [`picture`], [`deb`], [`rust_analyzer`], [`clean`] | the commands |
//! | [`cache`], [`exec`], [`progress`], [`repo`] | where things are kept, run and shown |

#![forbid(unsafe_code)]

pub mod apt;
pub mod bench;
pub mod build;
pub mod cache;
pub mod clean;
pub mod crash;
pub mod crates;
pub mod deb;
pub mod docs;
pub mod exec;
pub mod flavour;
pub mod host;
pub mod kernel;
pub mod module;
pub mod picture;
pub mod progress;
pub mod repo;
pub mod root;
pub mod run;
pub mod rust_analyzer;
pub mod test;
pub mod vm;
pub mod vm_cmd;
