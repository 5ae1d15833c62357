// SPDX-License-Identifier: GPL-2.0-only

//! Ranges that firmware, or `memmap=nn!ss` on the kernel's command line, says are persistent memory:
//! those of type 12 in the e820 table.
//!
//! The kernel makes one platform device of them all, which its driver `nd_e820` takes. Where it has,
//! the ranges are its own.

use super::{
    Found,
    Unusable, //
};
use crate::{
    kapi::{
        param::string_params,
        platform,
        region, //
    },
    pmem_core::{
        memmap::Config,
        range::{
            self,
            PhysRange,
            Split, //
        }, //
    },
};
use kernel::prelude::*;

string_params! {
    "pmem";

    PMEM_E820: "pmem_e820" = c"0",
        "Also make a disk of each range that firmware or memmap=nn!ss says is persistent memory, unless nd_e820 has them: 0 or 1. Default: 0";
}

/// The name of the platform device.
const DEVICE: &CStr = c"e820_pmem";

/// Claims all ranges of type 12, one disk each, but for those that somebody else serves.
///
/// # Errors
///
/// `ENODEV`: there are none, which is logged; `ENOMEM`.
pub(super) fn find(config: &Config<'_>, found: &mut KVec<Found>) -> Result {
    if !config.e820() {
        return Ok(());
    }
    let ranges = region::legacy_persistent_memory()?;
    if ranges.is_empty() {
        pr_err!("pmem_e820=1: firmware names no persistent memory (e820 type 12); name some on the kernel's command line, for example memmap=2G!4G, or give ranges with pmem_start\n");
        return Err(ENODEV);
    }
    let is_taken = platform::is_bound(DEVICE);
    for (start, size) in ranges {
        // A resource is never empty, and does not wrap.
        let Ok(whole) = PhysRange::new(start, size) else {
            continue;
        };
        if is_taken {
            pr_warn!("{}: left to the kernel's driver nd_e820\n", whole);
        } else if let Some(other) = found.iter().find(|other| other.range.overlaps(&whole)) {
            pr_warn!(
                "{}: left alone, as {} is served for pmem_start\n",
                whole,
                other.range
            );
        } else {
            serve(whole, config, found)?;
        }
    }
    if is_taken {
        pr_warn!("to have the ranges of nd_e820 here, boot with module_blacklist=nd_e820, or write e820_pmem to /sys/bus/platform/drivers/e820_pmem/unbind before\n");
    }
    Ok(())
}

/// Claims as much of `whole` as one disk can have, or logs why not.
fn serve(whole: PhysRange, config: &Config<'_>, found: &mut KVec<Found>) -> Result {
    let (range, split) = match fit(whole) {
        Ok(fitting) => fitting,
        Err(error) => {
            pr_warn!("{}: left alone: {}\n", whole, error);
            return Ok(());
        }
    };
    if range.start() != whole.start() {
        pr_info!("{}: served from {:#x} on\n", whole, range.start());
    }
    match super::claim(range) {
        Ok(region) => Ok(found.push(
            Found {
                provider: "e820",
                range,
                region,
                split,
                mode: config.found_mode(),
            },
            GFP_KERNEL,
        )?),
        Err(Unusable::Failed(error)) => Err(error),
        Err(unusable) => {
            pr_warn!("{}: left alone: {}\n", whole, unusable);
            Ok(())
        }
    }
}

/// The largest part of `whole` that a disk can have.
fn fit(whole: PhysRange) -> Result<(PhysRange, Split), range::Error> {
    let one = |range| Ok((range, range::split(range, 1)?));
    match one(whole) {
        Err(range::Error::Misaligned {
            nearest: Some(nearest),
            ..
        }) => one(nearest),
        result => result,
    }
}

#[kernel::macros::kunit_tests(pmem_e820)]
mod tests {
    use super::*;

    /// Firmware aligns as it likes.
    #[test]
    fn a_disk_has_what_is_aligned() -> Result {
        const MIB: u64 = 1 << 20;

        for (start, size, fitting) in [
            (4 * MIB, 4 * MIB, Some((4 * MIB, 4 * MIB))),
            (3 * MIB, 4 * MIB, Some((4 * MIB, 2 * MIB))),
            (3 * MIB, 6 * MIB, Some((4 * MIB, 4 * MIB))),
            (3 * MIB, 2 * MIB, None),
            (4 * MIB, MIB, None),
            (4 * MIB, 5 * MIB, Some((4 * MIB, 4 * MIB))),
        ] {
            let whole = PhysRange::new(start, size).map_err(|_| EINVAL)?;
            let disk = fit(whole).ok().and_then(|(_, split)| split.get(0));
            let disk = disk.map(|disk| (disk.start(), disk.size()));
            assert_eq!(disk, fitting);
        }
        Ok(())
    }
}
