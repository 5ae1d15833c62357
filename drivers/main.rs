// SPDX-License-Identifier: GPL-2.0-only

//! Disks and DAX devices in persistent memory.

mod device;
mod display;
mod kapi;
#[expect(
    dead_code,
    unreachable_pub,
    reason = "a library, of which other users need other parts"
)]
#[path = "../src/lib.rs"]
mod pmem_core;
mod provider;

use kernel::prelude::*;

module! {
    type: Pmem,
    name: "pmem",
    authors: ["The pmem maintainers"],
    description: "Disks and DAX devices in persistent memory",
    license: "GPL",
}

struct Pmem {
    _memmap: provider::memmap::Disks,
}

impl kernel::Module for Pmem {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        Ok(Pmem {
            _memmap: provider::memmap::probe()?,
        })
    }
}
