// SPDX-License-Identifier: GPL-2.0-only

//! Disks and DAX devices in persistent memory.

mod device;
mod display;
mod kapi;
mod kmem;
mod media;
#[expect(
    dead_code,
    unreachable_pub,
    reason = "a library, of which other users need other parts"
)]
#[path = "../src/lib.rs"]
mod pmem_core;
mod provider;
mod reserve;

use kernel::prelude::*;

module! {
    type: Pmem,
    name: "pmem",
    authors: ["The pmem maintainers"],
    description: "Disks and DAX devices in persistent memory",
    license: "GPL",
}

struct Pmem {
    _devices: provider::Devices,
    _disks: provider::Disks,
    _kmem: kmem::Kmem,
}

impl kernel::Module for Pmem {
    fn init(module: &'static ThisModule) -> Result<Self> {
        let disks = provider::prepare()?;
        let kmem = kmem::prepare()?;
        let has_kmem = !kmem.is_empty();
        // Who loads the module wants something of it; who has it built in may not.
        if cfg!(MODULE) && disks.is_empty() && !has_kmem {
            return Err(disks.explain_empty());
        }

        // With the first disk or memory that is added it is too late to fail.
        let (disks, later) = disks.add()?;
        let kmem = kmem.online(!disks.is_empty())?;
        let devices = later.begin(module, !disks.is_empty() || has_kmem)?;
        Ok(Pmem {
            _devices: devices,
            _disks: disks,
            _kmem: kmem,
        })
    }
}
