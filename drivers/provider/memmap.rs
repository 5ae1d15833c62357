// SPDX-License-Identifier: GPL-2.0-only

//! Ranges that the administrator reserved, usually with `memmap=` on the kernel's command line, and
//! names in the module's parameters.

use super::{
    Found,
    Unusable, //
};
use crate::{
    kapi::{
        config,
        param::string_params, //
    },
    pmem_core::memmap::Config, //
};
use kernel::prelude::*;

string_params! {
    "pmem";

    PMEM_START: "pmem_start" = config::BLK_DEV_RUST_PMEM_START,
        "Physical address of each reserved range, in bytes or with a unit (K, M, G, T, KiB to TiB, kB to TB), separated by commas. Example: 4G,16G";
    PMEM_SIZE: "pmem_size" = config::BLK_DEV_RUST_PMEM_SIZE,
        "Size of each range, in bytes or with a unit. Example: 2GiB,8GiB";
    PMEM_COUNT: "pmem_count" = config::BLK_DEV_RUST_PMEM_COUNT,
        "Number of equal disks that each range is split into, or one number for all. Default: 1. Example: 1,4";
}

/// Claims the ranges that the parameters name: all of them.
///
/// # Errors
///
/// Each is logged.
///
/// - `EBUSY`: a range is System RAM, or claimed by another driver.
/// - `ENXIO`: a range is beyond what the CPU can map.
/// - `ENOMEM`.
pub(super) fn find(config: &Config<'_>, found: &mut KVec<Found>) -> Result {
    for (range, split, mode) in config.ranges() {
        let region = super::claim(range).map_err(|unusable| {
            match unusable {
                Unusable::SystemRam => pr_err!(
                    "{}: {}; reserve it on the kernel's command line: memmap={:#x}${:#x}\n",
                    range,
                    unusable,
                    range.size(),
                    range.start()
                ),
                Unusable::Failed(_) => pr_err!("{}: {}\n", range, unusable),
                _ => pr_err!("{}: {}; change pmem_start or pmem_size\n", range, unusable),
            }
            unusable.errno()
        })?;
        found.push(
            Found {
                provider: "memmap",
                range,
                region,
                split,
                mode,
            },
            GFP_KERNEL,
        )?;
    }
    Ok(())
}
