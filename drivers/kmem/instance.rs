// SPDX-License-Identifier: GPL-2.0-only

//! Ranges that are device-dax instances: an administrator binds one to the driver `pmem` of the dax
//! bus, as others are bound to `kmem`.

use super::{
    range::{
        self,
        Range, //
    },
    Shared, //
};
use crate::{
    kapi::{
        attribute,
        daxbus::{
            self,
            Instance, //
        },
        hotplug, //
    },
    pmem_core::{
        kmem::superblock,
        range::PhysRange, //
    },
    LocalModule, //
};
use kernel::{
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    },
};

/// The driver, with what the parameters say of ranges.
pub(super) struct Driver {
    pub(super) shared: Shared,
    /// The format that an instance gets if it has none.
    pub(super) format: Option<superblock::Format>,
    /// Whether the next one gets it if it has one.
    pub(super) force: Atomic<bool>,
}

/// A range that is bound.
pub(super) struct Bound(attribute::Device<Range>);

impl daxbus::Driver for Driver {
    type Module = LocalModule;
    type Data = KBox<Bound>;

    fn probe(&self, instance: &Instance) -> Result<Self::Data> {
        let Some((first, last)) = instance.range() else {
            pr_err!("a device-dax instance of several ranges has no place for a superblock; make one of a single range\n");
            return Err(EINVAL);
        };
        // What is not whole memory blocks is left out, as by the driver kmem.
        let block = hotplug::memory_block_size();
        let align = |addr: u64| addr & !block.wrapping_sub(1);
        let start = first.checked_add(block.wrapping_sub(1)).map(align);
        let end = last.checked_add(1).map(align);
        let range = start
            .zip(end)
            .and_then(|(start, end)| PhysRange::new(start, end.checked_sub(start)?).ok());
        let Some(range) = range else {
            pr_err!(
                "a device-dax instance at {:#x} has no whole memory block\n",
                first
            );
            return Err(EINVAL);
        };
        let range = Range::new(
            &self.shared,
            range::claim(range)?,
            self.format,
            self.force.load(Relaxed),
        )?;
        let bound = KBox::new(Bound(Range::device(&range)?), GFP_KERNEL)?;
        range.online()?;
        self.force.store(false, Relaxed);
        range.admit();
        Ok(bound)
    }

    fn remove(&self, bound: Self::Data) {
        bound.0.data().leave();
    }
}
