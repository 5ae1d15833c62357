// SPDX-License-Identifier: GPL-2.0-only

//! kmem-persist: ranges whose pages are RAM as long as they have no data.
//!
//! A [`Range`] is claimed, read, and added to the system's memory but for the pages that its format
//! keeps. The superblock in its first page says which format that is.
//!
//! | file | what is there |
//! |---|---|
//! | this | parameters, and what a format has to do |
//! | `range` | a range and its states: online, offline, unplugged |
//! | `pool` | pages without data: with the system, or kept for writes |
//! | `none`, `blk` | the formats |
//! | `instance` | ranges that are device-dax instances |

mod blk;
#[cfg(PMEM_DAX_BUS)]
mod instance;
mod none;
mod pool;
mod range;

use self::{
    pool::Pool,
    range::Range, //
};
#[cfg(PMEM_DAX_BUS)]
use crate::kapi::daxbus;
use crate::{
    kapi::{
        attribute,
        cpu,
        hotplug::{
            Callback,
            Memory, //
        },
        numa::Node,
        param::string_params,
        workqueue::ReclaimQueue, //
    },
    pmem_core::{
        kmem::{
            bitmap::Bitmap,
            layout::{
                self,
                Layout, //
            },
            params::{
                Config,
                Params, //
            },
            scan,
            superblock,
            Page, //
        },
        medium::Medium,
        persist::{
            CpuFeatures,
            Persist, //
        },
    },
};
use core::sync::atomic::AtomicU64;
#[cfg(PMEM_DAX_BUS)]
use kernel::sync::atomic::Atomic;
use kernel::{
    macros::kunit_tests,
    prelude::*,
    str::CString,
    sync::Arc, //
};

string_params! {
    "pmem";

    KMEM_START: "kmem_start" = c"",
        "Physical address of each range that is to be RAM and storage at once, in bytes or with a unit, separated by commas. Example: 4G,16G";
    KMEM_SIZE: "kmem_size" = c"",
        "Size of each range, in bytes or with a unit. Example: 2GiB,8GiB";
    KMEM_FORMAT: "kmem_format" = c"",
        "Format of ranges that have none, none (RAM alone) or blk (a disk, /dev/kmem<node>), one for each range or one for all. Example: blk";
    KMEM_FORMAT_FORCE: "kmem_format_force" = c"0",
        "Format ranges that have a format, too, and lose what is on them: 0 or 1. Default: 0";
    KMEM_ATOMIC: "kmem_atomic" = c"1",
        "Write blocks of 4 KiB so that a power loss leaves all of each or none: 0 or 1. Default: 1";
    KMEM_SCRUB: "kmem_scrub" = c"0",
        "Zero what was RAM when a range is unplugged: 0 or 1. Default: 0";
    KMEM_DAX: "kmem_dax" = c"0",
        "Take device-dax instances that are bound to the driver pmem of the dax bus: 0 or 1. Default: 0";
}

/// A way to use the pages of a range.
trait Format: Sync {
    /// Its type in the superblock.
    fn kind(&self) -> superblock::Format;

    /// Its layout of a range of `pages` pages that is formatted.
    ///
    /// # Errors
    ///
    /// The range is too small.
    fn layout(&self, pages: u64) -> Result<Layout, layout::Error>;

    /// Reads a range that is no memory yet, to know which pages have data.
    ///
    /// # Errors
    ///
    /// `ENOMEM`. What is wrong with the medium is logged, and limits what is done with it.
    fn probe(&self, name: &CStr, medium: &dyn Medium, layout: &Layout) -> Result<Contents>;

    /// Starts to serve a range that is memory now, but for the pages that `contents` holds.
    ///
    /// # Errors
    ///
    /// `EEXIST`: the name of the disk is taken; `ENOMEM`.
    fn start(
        &self,
        setting: &Setting,
        memory: Arc<Memory>,
        layout: Layout,
        contents: Contents,
    ) -> Result<KBox<dyn Instance>>;
}

/// A range that a format serves. It stops when this is dropped; the memory stays.
trait Instance: Send + Sync {
    /// The pages without data.
    fn pool(&self) -> &Arc<Pool>;

    /// Sees to it that nobody uses what is served, and nobody will, or returns `false`.
    fn close(&self) -> bool;

    /// Undoes [`close`](Self::close).
    fn reopen(&self);
}

/// All there are.
static FORMATS: [&dyn Format; 2] = [&none::None, &blk::Blk];

/// The format of type `kind`.
fn format(kind: superblock::Format) -> Result<&'static dyn Format> {
    FORMATS
        .iter()
        .find(|format| format.kind() == kind)
        .copied()
        .ok_or(EINVAL)
}

/// What a range has on it.
struct Contents {
    /// One bit a page: those that the system must not get.
    held: KVVec<AtomicU64>,
    /// Those of them that have no data.
    spare: KVec<Page>,
    /// What is wrong with it. Then the range is read-only, and all of its pages are held.
    faults: Option<Faults>,
}

/// What must not be read of a range.
struct Faults {
    /// One bit a page: those that two blocks claim.
    disputed: KVVec<AtomicU64>,
    /// One bit for each [`scan::PIECE`] of the index: those that cannot be read.
    unreadable: KVVec<AtomicU64>,
}

impl Contents {
    /// Nothing but the superblocks and the index.
    fn new(layout: &Layout) -> Result<Self> {
        let held = bits(layout.pages())?;
        scan::hold_metadata(layout, Bitmap::new(&held));
        Ok(Contents {
            held,
            spare: KVec::new(),
            faults: None,
        })
    }

    fn held(&self) -> Bitmap<'_> {
        Bitmap::new(&self.held)
    }

    /// Holds pages without data, to have some when the system has none.
    fn keep_spare(&mut self, layout: &Layout) -> Result {
        let count = layout.spare_pages() as usize;
        let mut spare = KVec::with_capacity(count, GFP_KERNEL)?;
        'full: for (first, len) in self.held().zeros(layout.data()) {
            for page in first..first.wrapping_add(len) {
                if spare.push_within_capacity(Page(page)).is_err() || spare.len() > count {
                    break 'full;
                }
            }
        }
        spare.truncate(count);
        for page in &spare {
            self.held().set(page.0);
        }
        self.spare = spare;
        Ok(())
    }

    /// Holds all pages.
    fn hold_all(&self) {
        for word in &self.held {
            word.store(u64::MAX, core::sync::atomic::Ordering::Relaxed);
        }
    }
}

/// `count` bits that are clear.
fn bits(count: u64) -> Result<KVVec<AtomicU64>> {
    let words = Bitmap::words(count).ok_or(EINVAL)?;
    let mut bits = KVVec::with_capacity(words, GFP_KERNEL)?;
    for _ in 0..words {
        // There is room for all of them.
        let _ = bits.push_within_capacity(AtomicU64::new(0));
    }
    Ok(bits)
}

/// What all ranges share.
#[derive(Clone)]
struct Shared {
    /// Whether a block is written to another page.
    atomic: bool,
    /// Whether what was RAM is zeroed.
    scrub: bool,
    persist: Persist,
    queue: Arc<ReclaimQueue>,
    callback: Arc<Callback>,
}

/// What a range is to be.
struct Setting {
    /// `kmem<node>`.
    name: CString,
    node: Node,
    /// The format that it gets if it has none.
    format: Option<superblock::Format>,
    shared: Shared,
}

/// Ranges that are claimed, and in order as far as can be seen.
pub(crate) struct Prepared {
    ranges: KVec<Arc<Range>>,
    /// Room for a device for each of them.
    devices: KVec<attribute::Device<Range>>,
    #[cfg(PMEM_DAX_BUS)]
    driver: Option<instance::Driver>,
}

/// The ranges, each with a device for its attributes.
pub(crate) struct Kmem {
    #[cfg(PMEM_DAX_BUS)]
    _driver: Option<daxbus::Registration<instance::Driver>>,
    _ranges: KVec<attribute::Device<Range>>,
}

/// Claims the ranges that the parameters name: all of them, or none.
///
/// # Errors
///
/// Each is logged.
///
/// - `EINVAL`: a parameter is wrong, or a range is not one that can be memory.
/// - `EBUSY`: a range is claimed by another driver, or its node has other memory.
/// - `ENOMEM`.
pub(crate) fn prepare() -> Result<Prepared> {
    let text = |param: &str, value: Result<&'static str>| {
        value.inspect_err(|_| pr_err!("{}: not UTF-8 text; see modinfo pmem\n", param))
    };
    let config = match Config::new(Params {
        start: text("kmem_start", KMEM_START.get())?,
        size: text("kmem_size", KMEM_SIZE.get())?,
        format: text("kmem_format", KMEM_FORMAT.get())?,
        force: text("kmem_format_force", KMEM_FORMAT_FORCE.get())?,
        atomic: text("kmem_atomic", KMEM_ATOMIC.get())?,
        scrub: text("kmem_scrub", KMEM_SCRUB.get())?,
        dax: text("kmem_dax", KMEM_DAX.get())?,
    }) {
        Ok(config) => config,
        Err(error) => {
            pr_err!("{}\n", error);
            return Err(EINVAL);
        }
    };
    #[cfg(PMEM_DAX_BUS)]
    let dax = config.dax();
    #[cfg(not(PMEM_DAX_BUS))]
    if config.dax() {
        pr_err!("kmem_dax=1: this driver was built without the headers of the dax bus; give ranges with kmem_start, or build it with the kernel's source\n");
        return Err(EINVAL);
    }
    let mut prepared = Prepared {
        ranges: KVec::new(),
        devices: KVec::new(),
        #[cfg(PMEM_DAX_BUS)]
        driver: None,
    };
    if config.is_empty() {
        return Ok(prepared);
    }

    let persist = Persist::new(CpuFeatures {
        clwb: cpu::has_clwb(),
        clflushopt: cpu::has_clflushopt(),
    });
    if !persist.is_durable() {
        pr_warn!("unable to guarantee persistence of writes\n");
    }
    let shared = Shared {
        atomic: config.atomic(),
        scrub: config.scrub(),
        persist,
        queue: Arc::new(ReclaimQueue::new(c"pmem_kmem")?, GFP_KERNEL)?,
        callback: Callback::new()?,
    };
    for (range, format) in config.ranges() {
        let range = Range::new(&shared, range::claim(range)?, format, config.force())?;
        prepared.ranges.push(range, GFP_KERNEL)?;
    }
    prepared
        .devices
        .reserve(prepared.ranges.len(), GFP_KERNEL)?;
    #[cfg(PMEM_DAX_BUS)]
    if dax {
        prepared.driver = Some(instance::Driver {
            shared,
            format: config.instance_format(),
            force: Atomic::new(config.force()),
        });
    }
    Ok(prepared)
}

impl Prepared {
    /// Whether there are none.
    pub(crate) fn is_empty(&self) -> bool {
        #[cfg(PMEM_DAX_BUS)]
        if self.driver.is_some() {
            return false;
        }
        self.ranges.is_empty()
    }

    /// Adds the ranges to the system's memory.
    ///
    /// From then on the module must not go, so that loading it must not fail: a range that cannot be
    /// added when another one was, or when `committed` says that something else was, is left
    /// unplugged.
    ///
    /// # Errors
    ///
    /// That of the first range, which is logged.
    pub(crate) fn online(self, mut committed: bool) -> Result<Kmem> {
        let mut devices = self.devices;
        for range in self.ranges {
            let device = match Range::device(&range) {
                Ok(device) => device,
                Err(_) if committed => continue,
                Err(error) => return Err(error),
            };
            match range.online() {
                Ok(()) => committed = true,
                // What could not be served may have become memory that cannot be removed.
                Err(_) if committed || range.is_plugged() => committed = true,
                // To a loader, EEXIST means that the module is loaded already.
                Err(error) => return Err(if error == EEXIST { EBUSY } else { error }),
            }
            range.admit();
            // There is room for all of them.
            let _ = devices.push_within_capacity(device);
        }
        Ok(Kmem {
            #[cfg(PMEM_DAX_BUS)]
            _driver: self.driver.and_then(|driver| {
                daxbus::Registration::new(c"pmem", driver)
                    .inspect_err(|error| pr_err!("no driver of the dax bus ({:?})\n", error))
                    .ok()
            }),
            _ranges: devices,
        })
    }
}

/// Of ranges in memory that the tests may overwrite: `kmem_kunit_start=`, which only a kernel with
/// KUnit built in has, and whose node has no other memory. Without it the last of these tests are
/// skipped.
#[kunit_tests(pmem_kmem)]
mod tests {
    use super::*;
    use crate::{
        kapi::{
            attribute::Attributes,
            hotplug,
            kunit, //
        },
        pmem_core::{
            range::PhysRange,
            size, //
        },
    };

    string_params! {
        "pmem";

        START: "kmem_kunit_start" = c"",
            "Physical address of one memory block that the KUnit tests may overwrite. Example: 5G";
    }

    /// The attributes of a range, by their places.
    const STATE: usize = 0;
    const FORMAT: usize = 1;
    const RAM: usize = 3;

    fn shared() -> Result<Shared> {
        Ok(Shared {
            atomic: true,
            scrub: true,
            persist: Persist::new(CpuFeatures::default()),
            queue: Arc::new(ReclaimQueue::new(c"pmem_kunit")?, GFP_KERNEL)?,
            callback: Callback::new()?,
        })
    }

    /// A range that is formatted as `kind` when it is plugged.
    fn range(kind: Option<superblock::Format>) -> Result<Option<Arc<Range>>> {
        let text = START.get()?;
        if text.is_empty() {
            kunit::skip();
            return Ok(None);
        }
        let start = size::parse(text).map_err(|_| EINVAL)?;
        let range = PhysRange::new(start, hotplug::memory_block_size()).map_err(|_| EINVAL)?;
        let force = kind.is_some();
        let range = Range::new(&shared()?, range::claim(range)?, kind, force)?;
        // Not before it is said that it may.
        assert_eq!(range.store(STATE, "online"), Err(EBUSY));
        range.admit();
        Ok(Some(range))
    }

    fn shows(range: &Range, index: usize, text: &str) -> Result<bool> {
        Ok(range.show(index)?.to_bytes() == text.as_bytes())
    }

    fn ram(range: &Range) -> Result<u64> {
        let text = range.show(RAM)?;
        size::parse(text.to_str()?).map_err(|_| EINVAL)
    }

    #[test]
    fn each_type_has_a_format() -> Result {
        for kind in [superblock::Format::None, superblock::Format::Blk] {
            let layout = format(kind)?.layout(1 << 15).map_err(|_| EINVAL)?;
            assert_eq!(layout.pages(), 1 << 15);
            let has_disk = layout.blocks() != 0;
            assert_eq!(has_disk, kind == superblock::Format::Blk);
        }
        Ok(())
    }

    #[test]
    fn spare_pages_are_held_and_have_no_data() -> Result {
        let layout = Layout::blk(1 << 15).map_err(|_| EINVAL)?;
        let data = layout.data();
        let mut contents = Contents::new(&layout)?;
        // Some data, also in the very first page.
        for page in [data.start, data.start + 2, data.end - 1] {
            contents.held().set(page);
        }
        contents.keep_spare(&layout)?;

        assert_eq!(contents.spare.len() as u64, layout.spare_pages());
        assert_eq!(contents.spare.first().copied(), Some(Page(data.start + 1)));
        assert_eq!(contents.spare.get(1).copied(), Some(Page(data.start + 3)));
        assert!(contents
            .spare
            .iter()
            .all(|&page| layout.is_data(page) && contents.held().test(page.0)));
        let free: u64 = contents
            .held()
            .zeros(data.clone())
            .map(|(_, len)| len)
            .sum();
        assert_eq!(free, data.end - data.start - 3 - layout.spare_pages());
        Ok(())
    }

    #[test]
    fn a_range_goes_through_its_states() -> Result {
        for kind in [superblock::Format::None, superblock::Format::Blk] {
            let Some(range) = range(Some(kind))? else {
                return Ok(());
            };
            assert!(shows(&range, STATE, "unplugged")?);
            range.store(STATE, "online")?;
            assert!(shows(&range, STATE, "online")?);
            let layout = format(kind)?
                .layout(hotplug::memory_block_size() / crate::pmem_core::kmem::PAGE_SIZE)
                .map_err(|_| EINVAL)?;
            let kept = 2 + layout.index_pages() + layout.spare_pages();
            let shared = (layout.pages() - kept) * crate::pmem_core::kmem::PAGE_SIZE;
            assert_eq!(ram(&range)?, shared);

            range.store(STATE, "offline")?;
            assert!(shows(&range, STATE, "offline")?);
            assert_eq!(ram(&range)?, 0);
            range.store(STATE, "online")?;
            assert_eq!(ram(&range)?, shared);

            kunit::close_files();
            range.store(STATE, "unplugged")?;
            range.store(STATE, "unplugged")?;
            assert!(shows(&range, STATE, "unplugged")?);
            assert_eq!(ram(&range)?, 0);
            assert_eq!(range.store(STATE, "gone"), Err(EINVAL));

            // What is there wins.
            range.store(STATE, "offline")?;
            let name = if kind == superblock::Format::None {
                "none"
            } else {
                "blk"
            };
            assert!(shows(&range, FORMAT, name)?);
            kunit::close_files();
            range.store(STATE, "unplugged")?;
        }
        Ok(())
    }

    #[test]
    fn a_claim_is_exclusive() -> Result {
        let Some(first) = range(None)? else {
            return Ok(());
        };
        assert_eq!(range(None).err(), Some(EBUSY));
        drop(first);
        assert!(range(None).is_ok());
        Ok(())
    }
}
