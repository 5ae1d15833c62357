// SPDX-License-Identifier: GPL-2.0-only

//! Ranges that the administrator reserved, usually with `memmap=` on the kernel's command line, and
//! names in the module's parameters.

use crate::{
    device::{
        Directory,
        Options,
        PmemDevice, //
    },
    kapi::{
        config,
        cpu,
        debugfs::Dir,
        disk::{
            self,
            Disk, //
        },
        param::string_params,
        region::{
            self,
            Region, //
        }, //
    },
    pmem_core::{
        memmap::{
            self,
            Config,
            Params, //
        },
        persist::{
            CpuFeatures,
            Persist, //
        },
        range::{
            PhysRange,
            Split, //
        },
        size::Size, //
    },
    reserve::Place, //
};
use kernel::{
    prelude::*,
    sync::Arc, //
};

string_params! {
    "pmem";

    PMEM_START: "pmem_start" = config::BLK_DEV_RUST_PMEM_START,
        "Physical address of each reserved range, in bytes or with a unit (K, M, G, T, KiB to TiB, kB to TB), separated by commas. Example: 4G,16G";
    PMEM_SIZE: "pmem_size" = config::BLK_DEV_RUST_PMEM_SIZE,
        "Size of each range, in bytes or with a unit. Example: 2GiB,8GiB";
    PMEM_COUNT: "pmem_count" = config::BLK_DEV_RUST_PMEM_COUNT,
        "Number of equal disks that each range is split into, or one number for all. Default: 1. Example: 1,4";
    PMEM_LBS: "pmem_lbs" = c"512",
        "Logical block size in bytes, 512 or 4096. Default: 512. Example: 4096";
    PMEM_CACHE: "pmem_cache" = c"",
        "How each range is mapped, or one word for all: wb (with DAX), wt, wc or uc (without). Default: wb. Example: wb,wc";
    PMEM_MEMMAP: "pmem_memmap" = c"ram",
        "Where the struct pages of each range are, or one word for all: ram, or dev (on the range itself, whose disks are smaller by 1/64). Default: ram. Example: ram,dev";
    PMEM_MEMMAP_FORCE: "pmem_memmap_force" = c"0",
        "Destroy the header of a range whose struct pages were on it, and are to be in RAM: 0 or 1. Default: 0";
    PMEM_FIRST: "pmem_first" = c"0",
        "Number of the first disk, the N of /dev/pmemN. Default: 0. Example: 1";
}

/// The disks of all ranges, and their directories of debugfs, which go first.
pub(crate) type Disks = KVec<(Directory, Disk<PmemDevice>)>;

/// Disks that are complete, and that nobody sees yet.
pub(crate) struct Prepared(KVec<PreparedDisk>);

struct PreparedDisk {
    number: u32,
    range: PhysRange,
    disk: disk::Prepared<PmemDevice>,
    debugfs: Directory,
}

/// Makes disks of the ranges that the parameters name: of all of them, or of none.
///
/// # Errors
///
/// Each is logged.
///
/// - `EINVAL`: a parameter is wrong.
/// - `EBUSY`: a range is System RAM, or claimed by another driver.
/// - `ENXIO`: a range is beyond what the CPU can map.
/// - `ENOMEM`.
pub(crate) fn prepare() -> Result<Prepared> {
    let config = match Config::new(Params {
        start: text("pmem_start", PMEM_START.get())?,
        size: text("pmem_size", PMEM_SIZE.get())?,
        count: text("pmem_count", PMEM_COUNT.get())?,
        lbs: text("pmem_lbs", PMEM_LBS.get())?,
        first: text("pmem_first", PMEM_FIRST.get())?,
        cache: text("pmem_cache", PMEM_CACHE.get())?,
        memmap: text("pmem_memmap", PMEM_MEMMAP.get())?,
        memmap_force: text("pmem_memmap_force", PMEM_MEMMAP_FORCE.get())?,
        ..Params::default()
    }) {
        Ok(config) => config,
        Err(memmap::Error::NoRange) => return Ok(Prepared(KVec::new())),
        Err(error) => {
            pr_err!("{}\n", error);
            return Err(EINVAL);
        }
    };

    let persist = Persist::new(CpuFeatures {
        clwb: cpu::has_clwb(),
        clflushopt: cpu::has_clflushopt(),
    });
    if !persist.is_durable() {
        pr_warn!("unable to guarantee persistence of writes\n");
    }

    // All are looked at before one is written to.
    let mut places = KVec::new();
    let mut number = config.first();
    for (range, split, mode) in config.ranges() {
        let region = claim(range)?;
        tell_left_over(range, &split);
        for part in split.disks() {
            let place = Place::check(
                fmt!("pmem{}", number),
                region.clone(),
                part,
                mode.struct_pages,
                mode.cache,
                config.memmap_force(),
            )?;
            places.push((number, mode, place), GFP_KERNEL)?;
            // The sum was checked with the parameters.
            number = number.wrapping_add(1);
        }
    }

    let debugfs = Arc::new(Dir::new(c"pmem", None), GFP_KERNEL)?;
    let mut prepared = KVec::with_capacity(places.len(), GFP_KERNEL)?;
    for (number, mode, place) in places {
        let part = place.range();
        let options = Options {
            logical_block_size: config.logical_block_size(),
            cache: mode.cache,
            provider: "memmap",
        };
        let disk = PmemDevice::prepare(fmt!("pmem{}", number), place, persist, options)
            .map_err(|error| explain(error, number, part))?;
        let debugfs = PmemDevice::debugfs(disk.data(), debugfs.clone(), fmt!("pmem{}", number))?;
        let disk = PreparedDisk {
            number,
            range: part,
            disk,
            debugfs,
        };
        prepared.push(disk, GFP_KERNEL)?;
    }

    Ok(Prepared(prepared))
}

impl Prepared {
    /// Whether there are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Shows the disks to users.
    ///
    /// With the first one it is too late to fail, see [`disk::Prepared::add`]: one that cannot be
    /// added after that is left out, which is logged.
    ///
    /// # Errors
    ///
    /// Those of the first disk, which is logged.
    ///
    /// - `EBUSY`: its name is taken.
    /// - `ENOMEM`.
    pub(crate) fn add(self) -> Result<Disks> {
        let mut disks = KVec::with_capacity(self.0.len(), GFP_KERNEL)?;
        for prepared in self.0 {
            let PreparedDisk {
                number,
                range,
                disk,
                debugfs,
            } = prepared;
            match disk.add() {
                Ok(disk) => {
                    PmemDevice::announce(&disk, fmt!("pmem{}", number), range);
                    // There is room for all of them.
                    let _ = disks.push_within_capacity((debugfs, disk));
                }
                Err(error) => {
                    let error = explain(error, number, range);
                    if disks.is_empty() {
                        return Err(error);
                    }
                }
            }
        }
        Ok(disks)
    }
}

fn text<'a>(param: &str, value: Result<&'a str>) -> Result<&'a str> {
    value.inspect_err(|_| pr_err!("{}: not UTF-8 text; write a number and a unit\n", param))
}

/// Claims `range`, if it is neither System RAM nor claimed by somebody else.
fn claim(range: PhysRange) -> Result<Arc<Region>> {
    let (first, last) = region::mappable();
    if range.start() < first || range.last() > last {
        pr_err!(
            "{}: outside of what this machine can map, {:#x}-{:#x}; change pmem_start or pmem_size\n",
            range,
            first,
            last
        );
        return Err(ENXIO);
    }
    if region::meets_system_ram(range.start(), range.size())? {
        pr_err!(
            "{}: meets System RAM; reserve it on the kernel's command line: memmap={:#x}${:#x}\n",
            range,
            range.size(),
            range.start()
        );
        return Err(EBUSY);
    }
    let region = Region::new(range.start(), range.size(), c"pmem").inspect_err(|_| {
        pr_err!(
            "{}: claimed by another driver, see /proc/iomem; change pmem_start or pmem_size\n",
            range
        )
    })?;
    Ok(Arc::new(region, GFP_KERNEL)?)
}

fn tell_left_over(range: PhysRange, split: &Split) {
    if split.left_over() != 0 {
        pr_info!(
            "{}: {} at the end left over by {} disk(s) of {}\n",
            range,
            Size(split.left_over()),
            split.count(),
            Size(split.disk_size())
        );
    }
}

/// Logs why the disk `number` could not be made of `range`, and returns the error for it.
fn explain(error: Error, number: u32, range: PhysRange) -> Error {
    match error {
        EEXIST => {
            pr_err!(
                "pmem{}: the name is taken by another driver; choose other numbers with pmem_first=\n",
                number
            );
            // To a loader, EEXIST means that the module is loaded already.
            return EBUSY;
        }
        ENOMEM => pr_err!(
            "pmem{}: not enough memory to map {}; struct pages take 1/64 of its size in RAM, but for pmem_memmap=dev, and for pmem_cache=wt, wc and uc\n",
            number,
            range
        ),
        _ => pr_err!("pmem{}: cannot map {} ({:?})\n", number, range, error),
    }
    error
}
