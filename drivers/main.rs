// SPDX-License-Identifier: GPL-2.0-only

//! Disks and DAX devices in persistent memory.

mod device;
mod display;
mod kapi;
mod kmem;
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
    _memmap: provider::memmap::Disks,
    _kmem: kmem::Kmem,
}

impl kernel::Module for Pmem {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        let memmap = provider::memmap::prepare()?;
        let kmem = kmem::prepare()?;
        // Who loads the module wants something of it; who has it built in may not.
        if cfg!(MODULE) && memmap.is_empty() && kmem.is_empty() {
            pr_err!("{}\n", pmem_core::memmap::Error::NoRange);
            return Err(EINVAL);
        }

        // With the first disk or memory that is added it is too late to fail.
        let memmap = memmap.add()?;
        let kmem = kmem.online(!memmap.is_empty())?;
        Ok(Pmem {
            _memmap: memmap,
            _kmem: kmem,
        })
    }
}
