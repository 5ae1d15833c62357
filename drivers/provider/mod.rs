// SPDX-License-Identifier: GPL-2.0-only

//! Providers: each finds ranges of persistent memory, and claims them.
//!
//! They do not know each other. Here is what they have in common: the parameters are read, disks
//! are made of the ranges of all providers, numbered in the order of [`PROVIDERS`], and all of them
//! come up or none. Ranges of devices come and go later, each for itself.

mod e820;
mod memmap;
mod pci;
#[cfg(CONFIG_VIRTIO)]
mod virtio;

/// What a kernel without virtio has of it.
#[cfg(not(CONFIG_VIRTIO))]
mod virtio {
    use super::*;

    pub(super) enum Context {}
    pub(super) enum Registration {}

    impl Context {
        pub(super) fn new(_: &Config<'_>, _: CpuFeatures, _: &Arc<Dir>) -> Option<Self> {
            None
        }

        pub(super) fn register(self, _: &'static ThisModule) -> Result<Pin<KBox<Registration>>> {
            match self {}
        }
    }

    pub(super) fn param() -> Result<&'static str> {
        Ok("0")
    }
}

use crate::{
    device::{
        Directory,
        Options,
        PmemDevice, //
    },
    kapi::{
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
            Config,
            Error as Fault,
            Mode,
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
    fmt,
    prelude::*,
    sync::Arc, //
};

string_params! {
    "pmem";

    PMEM_LBS: "pmem_lbs" = c"512",
        "Logical block size in bytes, 512 or 4096. Default: 512. Example: 4096";
    PMEM_CACHE: "pmem_cache" = c"",
        "How each range is mapped, or one word for all: wb (with DAX), wt, wc or uc (without). Default: wb. Example: wb,wc";
    PMEM_MEMMAP: "pmem_memmap" = c"ram",
        "Where the struct pages of each range are, or one word for all: ram, or dev (on the range itself, whose disks are smaller by 1/64). Default: ram. Example: ram,dev";
    PMEM_MEMMAP_FORCE: "pmem_memmap_force" = c"0",
        "Destroy the header of a range whose struct pages were on it, and are to be in RAM: 0 or 1. Default: 0";
    PMEM_COPY: "pmem_copy" = c"auto",
        "How bytes get into a range that is mapped wb: nt (past the cache), wb (through it, with a write-back of each line) or auto. Default: auto";
    PMEM_FIRST: "pmem_first" = c"0",
        "Number of the first disk, the N of /dev/pmemN. Default: 0. Example: 1";
}

/// What a provider does: it adds the ranges that it finds, and logs why if it fails.
type Find = fn(&Config<'_>, &mut KVec<Found>) -> Result;

/// All there are.
static PROVIDERS: [Find; 2] = [memmap::find, e820::find];

/// A range that a provider has claimed.
struct Found {
    /// The provider's name, as users see it.
    provider: &'static str,
    range: PhysRange,
    region: Arc<Region>,
    split: Split,
    mode: Mode,
}

/// The disks of all ranges, and their directories of debugfs, which go first.
pub(crate) type Disks = KVec<(Directory, Disk<PmemDevice>)>;

/// Devices that become disks as they come, if there are to be some.
pub(crate) struct Devices {
    _virtio: Option<Pin<KBox<virtio::Registration>>>,
    _pci: Option<Pin<KBox<pci::Registration>>>,
}

/// Disks that are complete, and that nobody sees yet.
pub(crate) struct Prepared {
    disks: KVec<PreparedDisk>,
    /// Whether somebody asked for some.
    asked: bool,
    later: Later,
}

/// How to make disks of devices that come later.
#[derive(Default)]
pub(crate) struct Later {
    virtio: Option<virtio::Context>,
    pci: Option<pci::Context>,
}

struct PreparedDisk {
    number: u32,
    range: PhysRange,
    disk: disk::Prepared<PmemDevice>,
    debugfs: Directory,
}

/// Makes disks of the ranges that the parameters ask for: of all of them, or of none.
///
/// # Errors
///
/// Each is logged.
///
/// - `EINVAL`: a parameter is wrong.
/// - `EBUSY`: a range is System RAM, or claimed by another driver; or the name of a disk is taken.
/// - `ENODEV`: firmware was asked for ranges, and names none.
/// - `ENXIO`: a range is beyond what the CPU can map.
/// - `ENOMEM`.
pub(crate) fn prepare() -> Result<Prepared> {
    let mut prepared = Prepared {
        disks: KVec::new(),
        asked: false,
        later: Later::default(),
    };
    let config = match Config::new(Params {
        start: text("pmem_start", memmap::PMEM_START.get())?,
        size: text("pmem_size", memmap::PMEM_SIZE.get())?,
        count: text("pmem_count", memmap::PMEM_COUNT.get())?,
        e820: text("pmem_e820", e820::PMEM_E820.get())?,
        virtio: text("pmem_virtio", virtio::param())?,
        iopmem: text("iopmem", pci::param())?,
        lbs: text("pmem_lbs", PMEM_LBS.get())?,
        first: text("pmem_first", PMEM_FIRST.get())?,
        cache: text("pmem_cache", PMEM_CACHE.get())?,
        memmap: text("pmem_memmap", PMEM_MEMMAP.get())?,
        memmap_force: text("pmem_memmap_force", PMEM_MEMMAP_FORCE.get())?,
        copy: text("pmem_copy", PMEM_COPY.get())?,
    }) {
        Ok(config) => config,
        Err(Fault::NoRange) => return Ok(prepared),
        Err(fault) => {
            pr_err!("{}\n", fault);
            return Err(EINVAL);
        }
    };
    prepared.asked = config.asks();
    let cpu = CpuFeatures {
        clwb: cpu::has_clwb(),
        clflushopt: cpu::has_clflushopt(),
    };
    let debugfs = Arc::new(Dir::new(c"pmem", None), GFP_KERNEL)?;
    prepared.later = Later {
        virtio: virtio::Context::new(&config, cpu, &debugfs),
        pci: pci::Context::new(&config, cpu, &debugfs)?,
    };

    let mut ranges = KVec::new();
    for find in PROVIDERS {
        find(&config, &mut ranges)?;
    }
    if ranges.is_empty() {
        return Ok(prepared);
    }

    // All are looked at before one is written to.
    let mut places = KVec::new();
    let mut number = Some(config.first());
    for found in ranges {
        tell_left_over(found.range, &found.split);
        for range in found.split.disks() {
            let this = number.ok_or(EINVAL).inspect_err(|_| {
                pr_err!("{}\n", Fault::TooManyDisks);
            })?;
            let place = Place::check(
                fmt!("pmem{}", this),
                found.region.clone(),
                range,
                found.mode.struct_pages,
                found.mode.cache,
                config.memmap_force(),
            )?;
            let options = Options {
                logical_block_size: config.logical_block_size(),
                cache: found.mode.cache,
                provider: found.provider,
            };
            places.push((this, place, options), GFP_KERNEL)?;
            number = this.checked_add(1);
        }
    }

    let mut warned = false;
    for (number, place, options) in places {
        let range = place.range();
        let persist = Persist::for_cache(cpu, options.cache, config.copy());
        if !persist.is_durable() && !warned {
            pr_warn!("unable to guarantee persistence of writes\n");
            warned = true;
        }
        let disk = PmemDevice::prepare(fmt!("pmem{}", number), place, persist, options, None)
            .map_err(|error| explain(error, number, range))?;
        let debugfs = PmemDevice::debugfs(disk.data(), debugfs.clone(), fmt!("pmem{}", number))?;
        let disk = PreparedDisk {
            number,
            range,
            disk,
            debugfs,
        };
        prepared.disks.push(disk, GFP_KERNEL)?;
    }
    Ok(prepared)
}

impl Prepared {
    /// Whether there are none, nor will be: who has asked for some does not wait for others.
    pub(crate) fn is_empty(&self) -> bool {
        self.disks.is_empty() && (self.asked || self.later.is_nothing())
    }

    /// The error for who wanted disks, when there are none. It is logged, too.
    pub(crate) fn explain_empty(&self) -> Error {
        if self.asked {
            // Why each range was left alone is logged already.
            pr_err!("no range is left to make a disk of\n");
            return EBUSY;
        }
        pr_err!("{}\n", Fault::NoRange);
        EINVAL
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
    pub(crate) fn add(self) -> Result<(Disks, Later)> {
        let mut disks = KVec::with_capacity(self.disks.len(), GFP_KERNEL)?;
        for prepared in self.disks {
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
        Ok((disks, self.later))
    }
}

impl Later {
    fn is_nothing(&self) -> bool {
        self.virtio.is_none() && self.pci.is_none()
    }

    /// Begins to make disks of devices. A disk may be there when this returns, so that it is the last
    /// thing that may fail, and it does not when `committed` says that it is too late for that.
    ///
    /// # Errors
    ///
    /// Each is logged.
    ///
    /// - `EBUSY`: there is a driver of this name.
    /// - `ENOMEM`.
    pub(crate) fn begin(self, module: &'static ThisModule, committed: bool) -> Result<Devices> {
        // Who has it built in may want nothing.
        if cfg!(MODULE) && !self.is_nothing() && !committed {
            pr_info!(
                "no range is given; devices become disks when they come: {}\n",
                match (&self.virtio, &self.pci) {
                    (Some(_), Some(_)) => "virtio-pmem, and PCI functions that iopmem is bound to",
                    (Some(_), None) => "virtio-pmem",
                    _ => "PCI functions that iopmem is bound to",
                }
            );
        }
        let tell = |what, error: &Error| {
            pr_err!(
                "no {} are served: the driver cannot be registered ({:?})\n",
                what,
                error
            );
        };
        let virtio = self.virtio.map(|context| context.register(module));
        let virtio = virtio
            .transpose()
            .inspect_err(|error| tell("virtio-pmem devices", error));
        let pci = self.pci.map(|context| context.register(module));
        let pci = pci
            .transpose()
            .inspect_err(|error| tell("PCI functions", error));
        match (virtio, pci) {
            // Where one of them is registered, there may be a disk.
            (Err(error), Err(_) | Ok(None)) | (Ok(None), Err(error)) if !committed => Err(error),
            (virtio, pci) => Ok(Devices {
                _virtio: virtio.unwrap_or_default(),
                _pci: pci.unwrap_or_default(),
            }),
        }
    }
}

fn text<'a>(param: &str, value: Result<&'a str>) -> Result<&'a str> {
    value.inspect_err(|_| pr_err!("{}: not UTF-8 text; write a number and a unit\n", param))
}

/// Why a range cannot be served.
enum Unusable {
    /// It is not between these two, the first and the last byte that can be mapped.
    Unmappable(u64, u64),
    SystemRam,
    Claimed,
    /// The kernel has failed.
    Failed(Error),
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unmappable(first, last) => write!(
                f,
                "outside of what this machine can map, {first:#x}-{last:#x}"
            ),
            Self::SystemRam => f.write_str("meets System RAM"),
            Self::Claimed => f.write_str("claimed by another driver, see /proc/iomem"),
            Self::Failed(error) => write!(f, "failed ({error:?})"),
        }
    }
}

impl Unusable {
    fn errno(&self) -> Error {
        match *self {
            Self::Unmappable(..) => ENXIO,
            Self::SystemRam | Self::Claimed => EBUSY,
            Self::Failed(error) => error,
        }
    }
}

impl<T: Into<Error>> From<T> for Unusable {
    fn from(error: T) -> Self {
        Self::Failed(error.into())
    }
}

/// Claims `range`, if it is neither System RAM nor claimed by somebody else.
fn claim(range: PhysRange) -> Result<Arc<Region>, Unusable> {
    let (first, last) = region::mappable();
    if range.start() < first || range.last() > last {
        return Err(Unusable::Unmappable(first, last));
    }
    if region::meets_system_ram(range.start(), range.size())? {
        return Err(Unusable::SystemRam);
    }
    let region =
        Region::new(range.start(), range.size(), c"pmem").map_err(|_| Unusable::Claimed)?;
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
