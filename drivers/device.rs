// SPDX-License-Identifier: GPL-2.0-only

//! A pmem device: one mapped range of persistent memory, served as a disk and through DAX.
//!
//! When a write bio completes, its data is durable: each is a non-temporal copy and a fence. The
//! disk advertises a write cache all the same, because a DAX mapping has one, the CPU's: `fsync`
//! writes its lines back without a fence, and counts on the flush bio that follows. The block
//! layer drops that bio if there is no write cache. So PREFLUSH is a fence, and FUA adds nothing.
//!
//! A range that is not mapped write-back has no struct pages and no DAX, and then there is no write
//! cache: a write is durable when it completes, and that is all there is to it.

mod attributes;
mod counters;

use self::{
    attributes::Attributes,
    counters::Counters, //
};
use crate::{
    kapi::{
        bio::{
            self,
            Bio,
            Status, //
        },
        dax,
        debugfs,
        disk::{
            self,
            Disk,
            Features,
            Limits,
            Prepared, //
        },
        mapping::Mapping,
        mc,
        numa::Node, //
    },
    pmem_core::{
        extent::{
            self,
            Extent,
            PageOffset,
            Pfn,
            Sector, //
        },
        memmap::StructPages,
        persist::{
            Cache,
            Persist,
            VolatileSlice, //
        },
        range::PhysRange,
        size::Size, //
    },
    reserve::Place,
    LocalModule, //
};
use kernel::{
    fmt,
    macros::kunit_tests,
    page,
    prelude::*,
    str::CString,
    sync::Arc, //
};

const _: () = assert!(extent::PAGE_SIZE == page::PAGE_SIZE as u64);

/// The most that one `REQ_OP_WRITE_ZEROES` zeroes: a few milliseconds. The block layer splits what
/// is longer, and looks for signals and other tasks in between.
const MAX_WRITE_ZEROES: u64 = 32 << 20;

/// What an administrator can choose for a disk.
#[derive(Clone, Copy)]
pub(crate) struct Options {
    /// Logical block size in bytes, 512 or 4096.
    pub(crate) logical_block_size: u32,
    /// How the range is mapped. A disk has DAX if that is write-back.
    pub(crate) cache: Cache,
    /// Who found the range, in one word.
    pub(crate) provider: &'static str,
}

/// A disk's directory of debugfs.
pub(crate) type Directory = debugfs::Files<PmemDevice, LocalModule>;

/// One mapped range of persistent memory.
pub(crate) struct PmemDevice {
    mapping: Mapping,
    persist: Persist,
    node: Node,
    cache: Cache,
    /// Where the struct pages are, if there are some.
    struct_pages: Option<StructPages>,
    provider: &'static str,
    counters: Counters,
}

impl PmemDevice {
    /// Maps the range of `place`, and makes it a disk called `name`.
    ///
    /// # Errors
    ///
    /// Those of [`Place::settle`], of [`Mapping::with_pages`] or [`Mapping::without_pages`], of
    /// [`dax::Device::new`] and of [`Prepared::new`].
    pub(crate) fn prepare(
        name: fmt::Arguments<'_>,
        place: Place,
        persist: Persist,
        options: Options,
    ) -> Result<Prepared<Self>> {
        place.settle(name, &persist)?;
        let (region, range, altmap) = (place.region(), place.range(), place.altmap());
        let node = Node::of_phys(range.start());
        let Options {
            logical_block_size,
            cache,
            provider,
        } = options;
        let mapping = if cache == Cache::WriteBack {
            Mapping::with_pages(region, range.start(), range.size(), altmap, node)?
        } else {
            Mapping::without_pages(region, range.start(), range.size(), cache)?
        };
        let struct_pages = match (cache, altmap) {
            (Cache::WriteBack, None) => Some(StructPages::Ram),
            (Cache::WriteBack, Some(_)) => Some(StructPages::Dev),
            _ => None,
        };
        let attributes = Attributes {
            range,
            node,
            cache: cache.name(),
            copy: persist.name(),
            is_durable: persist.is_durable(),
            provider,
            memmap: struct_pages.map_or("none", StructPages::name),
        };
        let device = Arc::new(
            PmemDevice {
                mapping,
                persist,
                node,
                cache,
                struct_pages,
                provider,
                counters: Counters::new()?,
            },
            GFP_KERNEL,
        )?;
        let mut limits = Limits {
            logical_block_size,
            physical_block_size: page::PAGE_SIZE as u32,
            max_write_zeroes_sectors: Sector::containing(MAX_WRITE_ZEROES).0 as u32,
            features: Features::SYNCHRONOUS | Features::NOWAIT,
            ..Limits::default()
        };
        let dax = if cache == Cache::WriteBack {
            limits.features =
                limits.features | Features::WRITE_CACHE | Features::FUA | Features::DAX;
            let options = dax::Options {
                write_cache: true,
                synchronous: true,
            };
            Some(dax::Device::new(device.clone(), options)?)
        } else {
            None
        };
        let capacity = Sector::containing(device.mapping.size());
        Prepared::new(name, capacity, &limits, node, device, dax)?
            .with_attributes(attributes::NAME, Arc::new(attributes, GFP_KERNEL)?)
    }

    /// Tells the log and user space what the disk `name` of `range` is.
    pub(crate) fn announce(disk: &Disk<Self>, name: fmt::Arguments<'_>, range: PhysRange) {
        let device = disk.data();
        pr_info!(
            "{}: {} at {}, node {}, {}, writes {} ({})\n",
            name,
            Size(device.mapping.size()),
            range,
            device.node.id(),
            match device.cache {
                Cache::WriteBack if device.struct_pages == Some(StructPages::Dev) =>
                    "DAX with struct pages on the range",
                Cache::WriteBack => "DAX",
                Cache::WriteThrough => "write-through without DAX",
                Cache::WriteCombining => "write-combining without DAX",
                Cache::Uncached => "uncached without DAX",
            },
            if device.persist.is_durable() {
                "durable"
            } else {
                "not durable"
            },
            device.persist.name()
        );
        let sent = CString::try_from_fmt(fmt!("PMEM_PROVIDER={}", device.provider))
            .and_then(|variable| disk.send_change(&variable));
        if let Err(error) = sent {
            pr_warn!("{}: no uevent with PMEM_PROVIDER ({:?})\n", name, error);
        }
    }

    /// Makes a directory of debugfs, `name` in `parent`, which goes when what is returned is dropped.
    ///
    /// # Errors
    ///
    /// `ENOMEM`. That debugfs itself has failed is no error, by its own rules.
    pub(crate) fn debugfs(
        device: &Arc<Self>,
        parent: Arc<debugfs::Dir>,
        name: fmt::Arguments<'_>,
    ) -> Result<Directory> {
        Directory::new(&CString::try_from_fmt(name)?, parent, device.clone())
    }

    /// The part of the medium that `bio` is about.
    #[inline]
    fn window(&self, bio: &Bio) -> Result<VolatileSlice<'_>, Status> {
        let extent = Extent::from_sectors(bio.sector(), bio.size().into(), self.mapping.size())
            .map_err(|_| Status::IOERR)?;
        self.slice(extent).ok_or(Status::IOERR)
    }

    #[inline]
    fn slice(&self, extent: Extent) -> Option<VolatileSlice<'_>> {
        self.mapping.slice(extent.offset(), extent.len())
    }

    fn pages(&self, page: u64, count: u64) -> Result<VolatileSlice<'_>> {
        let extent =
            Extent::from_pages(PageOffset(page), count, self.mapping.size()).map_err(|_| ERANGE)?;
        self.slice(extent).ok_or(ERANGE)
    }

    /// Calls `copy` with each segment of `bio` and its place on `medium`, the part that `bio` is
    /// about.
    #[inline]
    fn transfer<'a>(
        mut medium: VolatileSlice<'a>,
        bio: &Bio,
        mut copy: impl FnMut(VolatileSlice<'a>, VolatileSlice<'_>) -> Result<(), Status>,
    ) -> Result<(), Status> {
        for segment in bio.segments() {
            let (part, rest) = medium.split_at(segment.len()).ok_or(Status::IOERR)?;
            copy(part, segment)?;
            medium = rest;
        }
        Ok(())
    }

    #[inline]
    fn serve(&self, bio: &Bio) -> Result<(), Status> {
        if bio.is_preflush() {
            self.persist.fence();
            self.counters.count_flush();
        }
        match bio.op() {
            bio::Op::Read => {
                let medium = self.window(bio)?;
                self.counters.count_read(bio.size());
                Self::transfer(medium, bio, |medium, segment| {
                    mc::copy(segment, medium).map_err(|_| {
                        self.counters.add_media_errors(1);
                        Status::IOERR
                    })
                })
            }
            // A flush alone, which is done.
            bio::Op::Write if bio.size() == 0 => Ok(()),
            bio::Op::Write => {
                let medium = self.window(bio)?;
                self.counters.count_write(bio.size());
                Self::transfer(medium, bio, |medium, segment| {
                    self.persist.write(medium, segment);
                    Ok(())
                })?;
                self.persist.fence();
                Ok(())
            }
            bio::Op::WriteZeroes => {
                let medium = self.window(bio)?;
                self.counters.count_write_zeroes();
                self.persist.write_zeroes(medium);
                self.persist.fence();
                Ok(())
            }
            bio::Op::Flush => {
                self.persist.fence();
                self.counters.count_flush();
                Ok(())
            }
            bio::Op::Discard | bio::Op::Other(_) => Err(Status::NOTSUPP),
        }
    }
}

impl disk::Operations for PmemDevice {
    type Module = LocalModule;

    #[inline]
    fn submit_bio(&self, bio: Bio) {
        let accounting = bio.start_accounting();
        let status = match self.serve(&bio) {
            Ok(()) => Status::OK,
            Err(status) => status,
        };
        if let Some(accounting) = accounting {
            bio.end_accounting(accounting);
        }
        bio.end(status);
    }
}

impl dax::Operations for PmemDevice {
    fn direct_access(&self, page: u64) -> Result<dax::Window<'_>> {
        let size = self.mapping.size();
        let extent = Extent::from_pages(PageOffset(page), 1, size).map_err(|_| ERANGE)?;
        let offset = extent.offset();
        // An extent does not reach beyond the end, nor the mapping beyond the last address.
        let memory = self.mapping.slice(offset, size.wrapping_sub(offset));
        Ok(dax::Window {
            memory: memory.ok_or(ERANGE)?,
            pfn: Pfn::containing(self.mapping.start().wrapping_add(offset)),
        })
    }

    fn zero_page_range(&self, page: u64, count: u64) -> Result {
        self.persist.write_zeroes(self.pages(page, count)?);
        self.persist.fence();
        Ok(())
    }
}

/// A device in a range that the tests may overwrite: `pmem_kunit_start=`, which only a kernel with
/// KUnit built in has. Without it these tests are skipped.
#[kunit_tests(pmem_device)]
mod tests {
    use super::*;
    use crate::kapi::{
        kunit::{
            self,
            buffer, //
        },
        mapping::Altmap,
        numa::Node,
        param::string_params,
        region::Region, //
    };
    use crate::pmem_core::{
        persist::CpuFeatures,
        reserve::Reserve,
        size, //
    };

    string_params! {
        "pmem";

        START: "pmem_kunit_start" = c"",
            "Physical address of 8 MiB that the KUnit tests may overwrite. Example: 5G";
    }

    const SIZE: u64 = 8 << 20;

    fn region() -> Result<Option<Arc<Region>>> {
        let text = START.get()?;
        if text.is_empty() {
            kunit::skip();
            return Ok(None);
        }
        let start = size::parse(text).map_err(|_| EINVAL)?;
        let region = Region::new(start, SIZE, c"pmem_kunit")?;
        Ok(Some(Arc::new(region, GFP_KERNEL)?))
    }

    fn disk(logical_block_size: u32) -> Result<Option<Disk<PmemDevice>>> {
        disk_with(logical_block_size, StructPages::Ram, true)
    }

    fn disk_with(
        logical_block_size: u32,
        struct_pages: StructPages,
        force: bool,
    ) -> Result<Option<Disk<PmemDevice>>> {
        let Some(region) = region()? else {
            return Ok(None);
        };
        let range = PhysRange::new(region.start(), region.size()).map_err(|_| EINVAL)?;
        let name = fmt!("pmem_kunit");
        let cache = Cache::WriteBack;
        PmemDevice::prepare(
            name,
            Place::check(name, region, range, struct_pages, cache, force)?,
            Persist::new(CpuFeatures::default()),
            Options {
                logical_block_size,
                cache: Cache::WriteBack,
                provider: "kunit",
            },
        )?
        .add()
        .map(Some)
    }

    /// Returns `len` bytes that differ from their neighbours.
    fn pattern(len: usize) -> Result<kunit::Buffer> {
        let mut data = buffer(0, len)?;
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = (i % 251) as u8;
        }
        Ok(data)
    }

    #[test]
    fn reads_what_was_written_and_no_more() -> Result {
        let Some(disk) = disk(512)? else {
            return Ok(());
        };
        for (sector, len) in [(0, 512), (1, 1024), (7, 4096), (13, 65536), (16383, 512)] {
            let around = Sector(sector & !7);
            disk.submit_wait(kunit::WRITE, Sector(sector), &mut pattern(len)?)?;
            let mut data = buffer(0xa5, len)?;
            disk.submit_wait(kunit::READ, Sector(sector), &mut data)?;
            assert!(*data == *pattern(len)?);

            // The other sectors of the first page.
            let mut page = buffer(0, 4096)?;
            disk.submit_wait_range(kunit::WRITE_ZEROES, around, 4096)?;
            disk.submit_wait(kunit::WRITE, Sector(sector), &mut buffer(0xff, 512)?)?;
            disk.submit_wait(kunit::READ, around, &mut page)?;
            let first = (sector - around.0) as usize * 512;
            assert!(page
                .iter()
                .enumerate()
                .all(|(i, &byte)| (byte == 0xff) == (first..first + 512).contains(&i)));
        }
        Ok(())
    }

    #[test]
    fn flush_and_fua_succeed() -> Result {
        let Some(disk) = disk(512)? else {
            return Ok(());
        };
        let flush = kunit::WRITE | kunit::PREFLUSH;
        disk.submit_wait(flush, Sector(0), &mut [])?;
        for flags in [
            kunit::FUA,
            kunit::PREFLUSH,
            kunit::FUA | kunit::PREFLUSH,
            kunit::NOWAIT,
        ] {
            let mut data = buffer(flags.leading_zeros() as u8, 4096)?;
            disk.submit_wait(kunit::WRITE | flags, Sector(8), &mut data)?;
            let mut back = buffer(0, 4096)?;
            disk.submit_wait(kunit::READ, Sector(8), &mut back)?;
            assert!(*back == *data);
        }
        Ok(())
    }

    #[test]
    fn refuses_what_it_does_not_do() -> Result {
        let Some(disk) = disk(4096)? else {
            return Ok(());
        };
        assert_eq!(
            disk.submit_wait_range(kunit::DISCARD, Sector(0), 4096),
            Err(EOPNOTSUPP)
        );
        let mut data = buffer(0, 4096)?;
        let end = Sector::containing(SIZE);
        for opf in [kunit::READ, kunit::WRITE] {
            assert_eq!(disk.submit_wait(opf, end, &mut data), Err(EIO));
            assert_eq!(
                disk.submit_wait(opf, Sector(end.0 - 1), &mut data),
                Err(EIO)
            );
        }
        Ok(())
    }

    #[test]
    fn dax_gives_the_frames_to_the_end() -> Result {
        use dax::Operations;

        let Some(disk) = disk(512)? else {
            return Ok(());
        };
        let device = disk.data();
        let pages = SIZE / extent::PAGE_SIZE;
        for page in [0, 1, 511, 512, pages - 1] {
            let window = device.direct_access(page)?;
            let phys = device.mapping.start() + page * extent::PAGE_SIZE;
            assert_eq!(window.pfn, Pfn::containing(phys));
            assert_eq!(
                window.memory.len() as u64,
                (pages - page) * extent::PAGE_SIZE
            );
        }
        for page in [pages, pages + 1, u64::MAX] {
            assert!(device.direct_access(page).is_err());
        }
        Ok(())
    }

    #[test]
    fn dax_zeroes_all_the_pages() -> Result {
        use dax::Operations;

        let Some(disk) = disk(512)? else {
            return Ok(());
        };
        let mut data = buffer(0xff, 5 * 4096)?;
        disk.submit_wait(kunit::WRITE, Sector(0), &mut data)?;
        disk.data().zero_page_range(1, 3)?;
        disk.submit_wait(kunit::READ, Sector(0), &mut data)?;
        assert!(data
            .iter()
            .enumerate()
            .all(|(i, &byte)| (byte == 0) == (4096..4 * 4096).contains(&i)));

        let pages = SIZE / extent::PAGE_SIZE;
        for (page, count) in [(pages, 1), (pages - 1, 2), (0, u64::MAX), (u64::MAX, 2)] {
            assert_eq!(disk.data().zero_page_range(page, count), Err(ERANGE));
        }
        Ok(())
    }

    #[test]
    fn struct_pages_on_the_range_leave_the_data_alone() -> Result {
        use dax::Operations;

        let Some(whole) = disk(512)? else {
            return Ok(());
        };
        whole.submit_wait_range(kunit::WRITE_ZEROES, Sector(0), SIZE as u32)?;
        drop(whole);

        let reserve = Reserve::of(SIZE).map_err(|_| EINVAL)?;
        let end = Sector::containing(reserve.data_size());
        let mut data = pattern(65536)?;
        // The header is written once, and found after that.
        for _ in 0..2 {
            let Some(disk) = disk_with(512, StructPages::Dev, false)? else {
                return Ok(());
            };
            let device = disk.data();
            assert_eq!(device.mapping.size(), reserve.data_size());
            let start = device.mapping.start();
            assert_eq!(start % (2 << 20), 0);
            assert_eq!(device.direct_access(0)?.pfn, Pfn::containing(start));
            disk.submit_wait(kunit::WRITE, Sector(end.0 - 128), &mut data)?;
            assert_eq!(disk.submit_wait(kunit::WRITE, end, &mut data), Err(EIO));
        }
        assert!(disk_with(512, StructPages::Ram, false).is_err());

        // The header is given up, and the data is where it was.
        let Some(whole) = disk(512)? else {
            return Ok(());
        };
        let mut back = buffer(0, 65536)?;
        let last = Sector(Sector::containing(SIZE).0 - 128);
        whole.submit_wait(kunit::READ, last, &mut back)?;
        assert!(*back == *pattern(65536)?);
        whole.submit_wait(kunit::READ, Sector(0), &mut back)?;
        assert!(back.iter().take(8192).all(|&byte| byte == 0));
        Ok(())
    }

    #[test]
    fn a_claim_is_exclusive_until_it_is_dropped() -> Result {
        let Some(first) = region()? else {
            return Ok(());
        };
        assert!(Region::new(first.start(), 1, c"pmem_kunit").err() == Some(EBUSY));
        let altmap = |size| Some(Altmap { kept: 4096, size });
        for (skip, size, altmap) in [
            (4096, 2 << 20, None),
            (0, 2 * SIZE, None),
            (0, SIZE, altmap(SIZE)),
            (0, SIZE, altmap(2 * SIZE)),
            (0, SIZE, altmap(1 << 20)),
            (0, SIZE, altmap(0)),
        ] {
            let (start, node) = (first.start() + skip, Node::of_phys(0));
            assert!(Mapping::with_pages(first.clone(), start, size, altmap, node).is_err());
        }
        drop(first);
        assert!(region().is_ok());
        Ok(())
    }
}
