// SPDX-License-Identifier: GPL-2.0-only

//! A pmem device: one mapped range of persistent memory, served as a disk and through DAX.
//!
//! When a write bio completes, its data is durable: each is a non-temporal copy and a fence. The
//! disk advertises a write cache all the same, because a DAX mapping has one, the CPU's: `fsync`
//! writes its lines back without a fence, and counts on the flush bio that follows. The block
//! layer drops that bio if there is no write cache. So PREFLUSH is a fence, and FUA adds nothing.
//!
//! Where the range is a host's memory that only the host makes durable, it is asked to: before the
//! data of a bio with PREFLUSH is touched, and after that of one with FUA is written. Nothing that a
//! process can do in the range is durable without, so that the DAX device has no MAP_SYNC, and the
//! CPU's cache, from which the host reads like any other CPU, needs not be written back.
//!
//! A range of memory that is not mapped write-back has no struct pages and no DAX, and then there is no
//! write cache: a write is durable when it completes, and that is all there is to it.
//!
//! Memory of a device behind a bus is [I/O memory](io), which has rules of its own.

mod attributes;
mod counters;
mod flush;
mod io;

use self::{
    attributes::Attributes,
    counters::Counters,
    flush::Flushes, //
};
pub(crate) use self::{
    flush::Host,
    io::{
        Io,
        Link, //
    }, //
};
use crate::{
    kapi::{
        badblocks::Badblocks,
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
        numa::Node,
        region::Region, //
    },
    media::Media,
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
    impl_has_work,
    macros::kunit_tests,
    new_work,
    page,
    prelude::*,
    str::CString,
    sync::Arc,
    workqueue::Work, //
};

const _: () = assert!(extent::PAGE_SIZE == page::PAGE_SIZE as u64);

/// The most that one `REQ_OP_WRITE_ZEROES` zeroes: a few milliseconds. The block layer splits what
/// is longer, and looks for signals and other tasks in between.
const MAX_WRITE_ZEROES: u64 = 32 << 20;

/// The same for I/O memory, where stores are posted one by one.
const MAX_IO_WRITE_ZEROES: u64 = 1 << 20;

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
#[pin_data]
pub(crate) struct PmemDevice {
    mapping: Mapping,
    persist: Persist,
    node: Node,
    cache: Cache,
    /// Where the struct pages are, if there are some.
    struct_pages: Option<StructPages>,
    provider: &'static str,
    counters: Counters,
    media: Arc<Media>,
    /// The flushes that the host is asked for; none where a fence makes writes durable.
    flushes: Option<Pin<KBox<Flushes>>>,
    /// What I/O memory needs; none if it is memory of the machine.
    io: Option<Io>,
    /// Whether there is neither a host to ask nor I/O memory, so that a bio is served by copies and fences.
    is_plain: bool,
    /// Goes on with bios that have waited for a flush.
    #[pin]
    work: Work<PmemDevice>,
}

impl_has_work! {
    impl HasWork<Self> for PmemDevice { self.work }
}

impl PmemDevice {
    /// Maps the range of `place`, and makes it a disk called `name`. With `host`, that is who makes
    /// writes durable.
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
        host: Option<Arc<dyn Host>>,
    ) -> Result<Prepared<Self>> {
        place.settle(name, &persist)?;
        let (region, range, altmap) = (place.region(), place.range(), place.altmap());
        let room = altmap.map_or(0, |altmap| altmap.size);
        let data = PhysRange::new(
            range.start().wrapping_add(room),
            range.size().saturating_sub(room),
        );
        let media = Media::new(data.map_err(|_| EINVAL)?)?;
        let node = Node::of_phys(range.start());
        let (start, size) = (range.start(), range.size());
        let mapping = if options.cache == Cache::WriteBack {
            Mapping::with_pages(region, start, size, altmap, node, media.clone())?
        } else {
            Mapping::without_pages(region, start, size, options.cache)?
        };
        let struct_pages = mapping.has_pages().then_some(match altmap {
            None => StructPages::Ram,
            Some(_) => StructPages::Dev,
        });
        let flushes = host.map(Flushes::new).transpose()?;
        let counters = Counters::new()?;
        let device = Arc::pin_init(
            pin_init!(PmemDevice {
                mapping,
                persist,
                node,
                cache: options.cache,
                struct_pages,
                provider: options.provider,
                counters,
                media,
                is_plain: flushes.is_none(),
                flushes,
                io: None,
                work <- new_work!("pmem_flush"),
            }),
            GFP_KERNEL,
        )?;
        Self::disk(name, device, range, options.logical_block_size)
    }

    /// Maps `range` of `region`, I/O memory next to `node`, and makes it a disk called `name`. If it cannot get the
    /// struct pages that it is to have, it is a disk without DAX, which is logged.
    ///
    /// # Errors
    ///
    /// Those of [`Mapping::without_pages`], of [`dax::Device::new`] and of [`Prepared::new`].
    pub(crate) fn prepare_io(
        name: fmt::Arguments<'_>,
        region: Arc<Region>,
        range: PhysRange,
        node: Node,
        persist: Persist,
        options: Options,
        io: Io,
    ) -> Result<Prepared<Self>> {
        let (start, size, cache) = (range.start(), range.size(), options.cache);
        let media = Media::new(range)?;
        let with_pages = || {
            let (region, failures) = (region.clone(), media.clone());
            if cache == Cache::WriteBack {
                Mapping::with_pages(region, start, size, None, node, failures)
            } else {
                Mapping::with_pages_beside(region, start, size, cache, node, failures)
            }
        };
        let mapping = match io.pages.then(with_pages).transpose() {
            Ok(mapping) => mapping,
            Err(error) => {
                pr_warn!(
                    "{}: {}: no struct pages ({:?}), and so no DAX\n",
                    name,
                    range,
                    error
                );
                None
            }
        };
        let mapping = match mapping {
            Some(mapping) => mapping,
            None => Mapping::without_pages(region, start, size, cache)?,
        };
        let struct_pages = mapping.has_pages().then_some(StructPages::Ram);
        let counters = Counters::new()?;
        let device = Arc::pin_init(
            pin_init!(PmemDevice {
                mapping,
                persist,
                node,
                cache,
                struct_pages,
                provider: options.provider,
                counters,
                media,
                flushes: None,
                io: Some(io),
                is_plain: false,
                work <- new_work!("pmem_flush"),
            }),
            GFP_KERNEL,
        )?;
        Self::disk(name, device, range, options.logical_block_size)
    }

    /// Makes the disk of `device`, which is in `range`.
    fn disk(
        name: fmt::Arguments<'_>,
        device: Arc<Self>,
        range: PhysRange,
        logical_block_size: u32,
    ) -> Result<Prepared<Self>> {
        let attributes = Attributes {
            range,
            node: device.node,
            cache: device.cache.name(),
            copy: device.copy(),
            durability: device.durability("durable at completion"),
            provider: device.provider,
            memmap: device.struct_pages.map_or("none", StructPages::name),
        };
        let zeroes = match device.io {
            None => MAX_WRITE_ZEROES,
            Some(_) => MAX_IO_WRITE_ZEROES,
        };
        let mut limits = Limits {
            logical_block_size,
            physical_block_size: page::PAGE_SIZE as u32,
            max_write_zeroes_sectors: Sector::containing(zeroes).0 as u32,
            features: Features::NOWAIT,
            ..Limits::default()
        };
        if device.flushes.is_none() {
            limits.features = limits.features | Features::SYNCHRONOUS;
        }
        // Whether what is stored is durable after a fence, and so what a process does is.
        let synchronous = device.flushes.is_none() && device.io.is_none();
        if !synchronous {
            limits.features = limits.features | Features::WRITE_CACHE | Features::FUA;
        }
        let dax = if device.mapping.has_pages() {
            limits.features =
                limits.features | Features::WRITE_CACHE | Features::FUA | Features::DAX;
            let options = dax::Options {
                write_cache: device.flushes.is_none(),
                synchronous,
            };
            let holder = device.media.holder();
            Some(dax::Device::new(device.clone(), options, holder)?)
        } else {
            None
        };
        let capacity = Sector::containing(device.mapping.size());
        let node = device.node;
        Prepared::new(name, capacity, &limits, node, device, dax)?
            .with_attributes(attributes::NAME, Arc::new(attributes, GFP_KERNEL)?)
    }

    /// When a write is durable; `at_completion` says that it is when it completes.
    fn durability(&self, at_completion: &'static str) -> &'static str {
        match (&self.io, &self.flushes) {
            (Some(io), _) => io.durability(),
            (None, Some(_)) => "durable after a flush",
            (None, None) if self.persist.is_durable() => at_completion,
            (None, None) => "not durable",
        }
    }

    /// The instructions that store what is written.
    fn copy(&self) -> &'static str {
        match &self.io {
            Some(io) => io.words.name(),
            None => self.persist.name(),
        }
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
            match (device.cache, device.struct_pages) {
                (Cache::WriteBack, Some(StructPages::Dev)) => "DAX with struct pages on the range",
                (Cache::WriteBack, Some(StructPages::Ram)) => "DAX",
                (Cache::WriteBack, None) => "write-back without DAX",
                (Cache::WriteThrough, _) => "write-through without DAX",
                (Cache::WriteCombining, None) => "write-combining without DAX",
                (Cache::WriteCombining, Some(_)) => "write-combining with DAX",
                (Cache::Uncached, None) => "uncached without DAX",
                (Cache::Uncached, Some(_)) => "uncached with DAX",
            },
            device.durability("durable"),
            device.copy()
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
        self.slice(self.extent(bio)?).ok_or(Status::IOERR)
    }

    #[inline]
    fn extent(&self, bio: &Bio) -> Result<Extent, Status> {
        Extent::from_sectors(bio.sector(), bio.size().into(), self.mapping.size())
            .map_err(|_| Status::IOERR)
    }

    #[inline]
    fn slice(&self, extent: Extent) -> Option<VolatileSlice<'_>> {
        self.mapping.slice(extent.offset(), extent.len())
    }

    fn pages(&self, page: u64, count: u64) -> Result<Extent> {
        Extent::from_pages(PageOffset(page), count, self.mapping.size()).map_err(|_| ERANGE)
    }

    /// Calls `copy` with each segment of `bio` and its place on `medium`, the part that `bio` is
    /// about.
    #[inline(always)]
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

    /// Reads the data of `bio`, if `check` finds nothing wrong with it.
    #[inline(always)]
    fn read(&self, bio: &Bio, check: impl FnOnce() -> Result<(), Status>) -> Result<(), Status> {
        let medium = self.window(bio)?;
        self.counters.count_read(bio.size());
        check()?;
        Self::transfer(medium, bio, |medium, segment| {
            match mc::copy_readable(segment, medium) {
                Ok(0) => Ok(()),
                Ok(left) => Err(self.failed_read(medium, left)),
                Err(_) => Err(Status::IOERR),
            }
        })
    }

    /// Writes the data of `bio` by `persist`, durable.
    #[inline(always)]
    fn write(&self, bio: &Bio, persist: &Persist) -> Result<(), Status> {
        let medium = self.window(bio)?;
        self.counters.count_write(bio.size());
        Self::transfer(medium, bio, |medium, segment| {
            persist.write(medium, segment);
            Ok(())
        })?;
        persist.fence();
        Ok(())
    }

    /// Zeroes the range of `bio` by `persist`, durable.
    #[inline(always)]
    fn zero(&self, bio: &Bio, persist: &Persist) -> Result<(), Status> {
        let medium = self.window(bio)?;
        self.counters.count_write_zeroes();
        persist.write_zeroes(medium);
        persist.fence();
        Ok(())
    }

    /// Overwrites `extent` by `write`, durable, and makes good what is bad of it.
    #[cold]
    #[inline(never)]
    fn repair(
        &self,
        extent: Extent,
        may_sleep: bool,
        write: impl FnOnce(&Persist) -> Result<(), Status>,
    ) -> Result<(), Status> {
        self.media.before_write(&self.mapping, extent, may_sleep)?;
        write(&self.persist.past_cache())?;
        let cleared = self.media.after_write(&self.mapping, extent)?;
        self.counters.add_cleared(cleared);
        Ok(())
    }

    #[cold]
    #[inline(never)]
    fn before_read(&self, bio: &Bio) -> Result<(), Status> {
        self.media.before_read(self.extent(bio)?).inspect_err(|_| {
            self.counters.add_media_errors(1);
        })
    }

    /// Tells the media that of `medium` the last `left` bytes were not read, as the first of them is
    /// bad.
    #[cold]
    #[inline(never)]
    fn failed_read(&self, medium: VolatileSlice<'_>, left: usize) -> Status {
        let read = medium.len().wrapping_sub(left) as u64;
        let offset = self.mapping.offset_of(medium).wrapping_add(read);
        self.media.failed_read(Sector::containing(offset));
        self.counters.add_media_errors(1);
        Status::IOERR
    }

    // These take the bio first: it is then in the register where `bio_endio()` wants it.

    /// Serves `bio`, whatever it asks for and whatever the device is.
    #[inline(never)]
    fn submit(bio: Bio, device: &Self) {
        if let Some(flushes) = &device.flushes {
            if bio.is_preflush() {
                device.counters.count_flush();
                return flushes.arrive(bio, true);
            }
        }
        let status = match (device.account_and_serve(&bio), &device.flushes) {
            (Ok(()), Some(flushes)) if bio.is_fua() => return flushes.arrive(bio, true),
            (Ok(()), _) => Status::OK,
            (Err(status), _) => status,
        };
        bio.end(status);
    }

    /// Serves `bio`, which reads from memory of the machine.
    #[inline(never)]
    fn submit_read(bio: Bio, device: &Self) {
        if device.media.is_suspect() {
            return Self::submit(bio, device);
        }
        let status = device.read(&bio, || Ok(())).err().unwrap_or(Status::OK);
        bio.end(status);
    }

    /// Serves `bio`, which writes to memory of the machine that a fence makes durable.
    #[inline(never)]
    fn submit_write(bio: Bio, device: &Self) {
        if device.media.is_suspect() {
            return Self::submit(bio, device);
        }
        let status = device
            .write(&bio, &device.persist)
            .err()
            .unwrap_or(Status::OK);
        bio.end(status);
    }

    #[inline]
    fn account_and_serve(&self, bio: &Bio) -> Result<(), Status> {
        let accounting = bio.start_accounting();
        let result = match &self.io {
            None => self.serve(bio),
            Some(io) => self.serve_io(io, bio),
        };
        if let Some(accounting) = accounting {
            bio.end_accounting(accounting);
        }
        result
    }

    #[inline]
    fn serve(&self, bio: &Bio) -> Result<(), Status> {
        if bio.is_preflush() {
            self.persist.fence();
            self.counters.count_flush();
        }
        match bio.op() {
            bio::Op::Read => self.read(bio, || {
                if self.media.is_suspect() {
                    self.before_read(bio)?;
                }
                Ok(())
            }),
            // A flush alone, which is done.
            bio::Op::Write if bio.size() == 0 => Ok(()),
            op @ (bio::Op::Write | bio::Op::WriteZeroes) if self.media.is_suspect() => {
                let extent = self.extent(bio)?;
                self.repair(extent, !bio.is_nowait(), |persist| match op {
                    bio::Op::WriteZeroes => self.zero(bio, persist),
                    _ => self.write(bio, persist),
                })
            }
            bio::Op::Write => self.write(bio, &self.persist),
            bio::Op::WriteZeroes => self.zero(bio, &self.persist),
            bio::Op::Flush if self.flushes.is_none() => {
                self.persist.fence();
                self.counters.count_flush();
                Ok(())
            }
            bio::Op::Flush | bio::Op::Discard | bio::Op::Other(_) => Err(Status::NOTSUPP),
        }
    }
}

impl disk::Operations for PmemDevice {
    type Module = LocalModule;

    #[inline]
    fn submit_bio(&self, bio: Bio) {
        if !self.is_plain || bio.is_accounted() {
            return Self::submit(bio, self);
        }
        match bio.common() {
            Some(bio::Common::Flush) => {
                self.persist.fence();
                self.counters.count_flush();
                bio.end(Status::OK);
            }
            Some(bio::Common::Write) => Self::submit_write(bio, self),
            Some(bio::Common::Read) => Self::submit_read(bio, self),
            None => Self::submit(bio, self),
        }
    }

    fn badblocks(&self) -> Option<&Badblocks> {
        Some(self.media.badblocks())
    }
}

impl dax::Operations for PmemDevice {
    fn direct_access(&self, page: u64, count: u64, recovery: bool) -> Result<dax::Window<'_>> {
        let offset = self.pages(page, 1)?.offset();
        // An extent does not reach beyond the end, nor the mapping beyond the last address.
        let mut len = self.mapping.size().wrapping_sub(offset);
        if self.media.is_suspect() {
            let count = count.min(len / extent::PAGE_SIZE).max(1);
            let good = self.media.accessible(self.pages(page, count)?, recovery)?;
            len = good.wrapping_mul(extent::PAGE_SIZE);
        }
        let memory = self.mapping.slice(offset, len);
        Ok(dax::Window {
            memory: memory.ok_or(ERANGE)?,
            pfn: Pfn::containing(self.mapping.start().wrapping_add(offset)),
        })
    }

    fn zero_page_range(&self, page: u64, count: u64) -> Result {
        let extent = self.pages(page, count)?;
        let memory = self.slice(extent).ok_or(ERANGE)?;
        let zero = |persist: &Persist| match &self.io {
            None => {
                persist.write_zeroes(memory);
                persist.fence();
                Ok(())
            }
            Some(io) => io.zero(memory),
        };
        let done = if self.media.is_suspect() {
            self.repair(extent, true, zero)
        } else {
            zero(&self.persist)
        };
        done.map_err(|_| EIO)
    }

    fn recovery_write(
        &self,
        page: u64,
        offset: u64,
        len: u64,
        copy: impl FnOnce() -> usize,
    ) -> usize {
        let copy = || {
            let written = copy();
            self.persist.fence();
            written
        };
        if !self.media.is_suspect() {
            return copy();
        }
        let end = offset.saturating_add(len);
        let whole = (offset | len) % extent::PAGE_SIZE == 0;
        match self.pages(page, end.div_ceil(extent::PAGE_SIZE)) {
            Ok(pages) => {
                let (written, cleared) = self.media.recover(&self.mapping, pages, whole, copy);
                self.counters.add_cleared(cleared);
                written
            }
            Err(_) => 0,
        }
    }
}

/// A device in a range that the tests may overwrite: `pmem_kunit_start=`, which only a kernel with
/// KUnit built in has. Without it these tests are skipped.
#[kunit_tests(pmem_device)]
pub(crate) mod tests {
    use super::*;
    use crate::kapi::{
        compat::{
            EHWPOISON,
            EOPNOTSUPP, //
        },
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
    use core::cell::Cell;

    string_params! {
        "pmem";

        START: "pmem_kunit_start" = c"",
            "Physical address of 8 MiB that the KUnit tests may overwrite. Example: 5G";
    }

    /// Length of that range in bytes.
    pub(crate) const SIZE: u64 = 8 << 20;

    /// The first byte of the range, unless there is none, and the test is skipped.
    pub(crate) fn start() -> Result<Option<u64>> {
        let text = START.get()?;
        if text.is_empty() {
            kunit::skip();
            return Ok(None);
        }
        Ok(Some(size::parse(text).map_err(|_| EINVAL)?))
    }

    pub(super) fn region() -> Result<Option<Arc<Region>>> {
        let Some(start) = start()? else {
            return Ok(None);
        };
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
            None,
        )?
        .add()
        .map(Some)
    }

    /// Returns `len` bytes that differ from their neighbours.
    pub(super) fn pattern(len: usize) -> Result<kunit::Buffer> {
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
            let window = device.direct_access(page, 1, false)?;
            let phys = device.mapping.start() + page * extent::PAGE_SIZE;
            assert_eq!(window.pfn, Pfn::containing(phys));
            assert_eq!(
                window.memory.len() as u64,
                (pages - page) * extent::PAGE_SIZE
            );
        }
        for page in [pages, pages + 1, u64::MAX] {
            assert!(device.direct_access(page, 1, false).is_err());
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

    /// Whether each of the `count` sectors from `first` on can be read.
    fn readable(disk: &Disk<PmemDevice>, first: u64, count: u64) -> Result<KVec<bool>> {
        let mut readable = KVec::new();
        for sector in first..first + count {
            let read = disk.submit_wait(kunit::READ, Sector(sector), &mut buffer(0, 512)?);
            assert!(read == Ok(()) || read == Err(EIO));
            readable.push(read.is_ok(), GFP_KERNEL)?;
        }
        Ok(readable)
    }

    #[test]
    fn a_bad_sector_fails_until_it_is_overwritten() -> Result {
        let Some(disk) = disk(512)? else {
            return Ok(());
        };
        let media = &disk.data().media;
        disk.submit_wait(kunit::WRITE, Sector(0), &mut pattern(65536)?)?;
        media.inject("10 2\n")?;
        // Nobody knows it yet.
        assert_eq!(media.badblocks().runs(), 0);
        assert_eq!(
            disk.submit_wait(kunit::READ, Sector(0), &mut buffer(0, 65536)?),
            Err(EIO)
        );
        assert_eq!(
            media.badblocks().first(&(Sector(0)..Sector(1000))),
            Some(Sector(10)..Sector(11))
        );
        assert!(readable(&disk, 8, 8)?[..] == [true, true, false, false, true, true, true, true]);

        // Others are written, and then a part of what is bad.
        disk.submit_wait(kunit::WRITE, Sector(0), &mut pattern(5120)?)?;
        disk.submit_wait_range(kunit::WRITE_ZEROES, Sector(12), 2048)?;
        assert!(readable(&disk, 10, 3)?[..] == [false, false, true]);
        disk.submit_wait(kunit::WRITE, Sector(11), &mut buffer(7, 512)?)?;
        let mut data = buffer(0, 512)?;
        disk.submit_wait(kunit::READ, Sector(11), &mut data)?;
        assert!(data.iter().all(|&byte| byte == 7));
        assert!(readable(&disk, 10, 2)?[..] == [false, true]);
        disk.submit_wait_range(kunit::WRITE_ZEROES, Sector(8), 4096)?;
        disk.submit_wait(kunit::READ, Sector(8), &mut buffer(0, 4096)?)?;
        assert!(!media.is_suspect());

        // What was never read is made good, too.
        media.inject("100")?;
        disk.submit_wait(kunit::WRITE, Sector(100), &mut data)?;
        assert!(!media.is_suspect());
        Ok(())
    }

    #[test]
    fn refuses_to_inject_what_is_not_on_the_disk() -> Result {
        let Some(disk) = disk(512)? else {
            return Ok(());
        };
        let media = &disk.data().media;
        for text in [
            "",
            "x",
            "-1",
            "0 0",
            "1 2 3",
            "16384",
            "16383 2",
            "1 18446744073709551615",
        ] {
            assert_eq!(media.inject(text), Err(EINVAL));
        }
        assert!(!media.is_suspect());
        media.inject("16383 1\n")?;
        media.inject("  0   16383 ")?;
        assert!(media.is_suspect());
        Ok(())
    }

    /// A page that memory management was told of, and has taken from the kernel's address space.
    #[test]
    fn a_failed_page_is_made_good_as_a_whole() -> Result {
        use crate::kapi::mapping::{
            FailureFlags,
            Failures, //
        };

        let Some(disk) = disk(512)? else {
            return Ok(());
        };
        let device = disk.data();
        let media = &device.media;
        disk.submit_wait(kunit::WRITE, Sector(0), &mut pattern(16384)?)?;
        // No file system.
        let told = media.memory_failure(4096, 4096, FailureFlags::NONE);
        assert_eq!(told, Err(EOPNOTSUPP));
        device.mapping.make_inaccessible(device.pages(1, 1)?)?;

        assert_eq!(
            media.badblocks().first(&(Sector(0)..Sector(1000))),
            Some(Sector(8)..Sector(16))
        );
        for (sector, len) in [(8, 512), (15, 1024), (0, 8192), (9, 3584)] {
            let (first, mut data) = (Sector(sector), pattern(len)?);
            assert_eq!(disk.submit_wait(kunit::READ, first, &mut data), Err(EIO));
            // Had a part of it been stored, the kernel would have oopsed.
            if len != 8192 {
                assert_eq!(disk.submit_wait(kunit::WRITE, first, &mut data), Err(EIO));
            }
        }
        let opf = kunit::WRITE | kunit::NOWAIT;
        let mut data = pattern(8192)?;
        assert_eq!(disk.submit_wait(opf, Sector(4), &mut data), Err(EAGAIN));
        disk.submit_wait(kunit::WRITE, Sector(4), &mut data)?;
        let mut back = buffer(0, 8192)?;
        disk.submit_wait(kunit::READ, Sector(4), &mut back)?;
        assert!(*back == *data);
        assert!(!media.is_suspect());
        assert_eq!(
            media.memory_failure(SIZE, 4096, FailureFlags::NONE),
            Err(ENXIO)
        );
        Ok(())
    }

    /// The copy meets memory that cannot be read, which nobody knew of.
    #[test]
    fn a_read_finds_bad_memory() -> Result {
        let Some(disk) = disk(512)? else {
            return Ok(());
        };
        let device = disk.data();
        disk.submit_wait(kunit::WRITE, Sector(0), &mut pattern(16384)?)?;
        if !device.mapping.make_inaccessible(device.pages(2, 1)?)? {
            kunit::skip();
            return Ok(());
        }
        assert_eq!(
            disk.submit_wait(kunit::READ, Sector(3), &mut buffer(0, 12288)?),
            Err(EIO)
        );
        assert_eq!(
            disk.submit_wait(kunit::READ, Sector(20), &mut buffer(0, 512)?),
            Err(EIO)
        );
        let mut known = device.media.badblocks().all(Sector(0)..Sector(1000));
        assert_eq!(known.next(), Some(Sector(16)..Sector(17)));
        assert_eq!(known.next(), Some(Sector(20)..Sector(21)));
        assert_eq!(known.next(), None);
        disk.submit_wait(kunit::READ, Sector(0), &mut buffer(0, 8192)?)?;
        disk.submit_wait(kunit::READ, Sector(24), &mut buffer(0, 4096)?)?;
        // It is not the driver that has made it so.
        device.mapping.make_accessible(device.pages(2, 1)?)
    }

    #[test]
    fn dax_keeps_away_from_bad_pages() -> Result {
        use dax::Operations;
        let Some(disk) = disk(512)? else {
            return Ok(());
        };
        let device = disk.data();
        let pages = |page, count, recovery| {
            device
                .direct_access(page, count, recovery)
                .map(|window| window.memory.len() / 4096)
        };
        // In page 5, and at the end.
        device.media.inject("47 1")?;
        device.media.inject("16383 1")?;
        assert_eq!(pages(0, 512, false), Ok(5));
        assert_eq!(pages(3, 1, false), Ok(1));
        assert_eq!(device.media.badblocks().runs(), 0);
        assert_eq!(pages(5, 10, false), Err(EHWPOISON));
        assert_eq!(device.media.badblocks().runs(), 1);
        assert_eq!(pages(5, 10, true), Ok(1));
        assert_eq!(pages(6, 10, false), Ok(10));
        assert_eq!(pages(2040, 100, false), Ok(7));
        assert_eq!(pages(2047, 100, false), Err(EHWPOISON));
        assert_eq!(pages(2048, 100, true), Err(ERANGE));

        // Of a part of a page nothing is written, and what was not written stays bad.
        let copies = Cell::new(0);
        for (offset, len) in [(0, 512), (8, 4096)] {
            let copy = || {
                copies.set(copies.get() + 1);
                len as usize
            };
            assert_eq!(device.recovery_write(5, offset, len, copy), 0);
        }
        assert_eq!(copies.get(), 0);
        assert_eq!(device.recovery_write(5, 0, 4096, || 4095), 4095);
        assert_eq!(pages(5, 10, false), Err(EHWPOISON));
        assert_eq!(device.recovery_write(5, 0, 4096, || 4096), 4096);
        assert_eq!(pages(5, 10, false), Ok(10));
        assert_eq!(device.recovery_write(1, 9, 7, || 7), 7);

        device.zero_page_range(2047, 1)?;
        assert!(!device.media.is_suspect());
        Ok(())
    }

    /// Root adds sectors by sysfs, and they are as bad as others.
    #[test]
    fn what_root_adds_is_bad() -> Result {
        let Some(disk) = disk(512)? else {
            return Ok(());
        };
        let list = disk.data().media.badblocks();
        list.set(&(Sector(3)..Sector(4)))?;
        assert!(readable(&disk, 2, 3)?[..] == [true, false, true]);
        disk.submit_wait(kunit::WRITE, Sector(3), &mut buffer(0, 512)?)?;
        assert!(readable(&disk, 2, 3)?[..] == [true, true, true]);
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
            assert_eq!(
                device.direct_access(0, 1, false)?.pfn,
                Pfn::containing(start)
            );
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
        let range = PhysRange::new(first.start(), first.size()).map_err(|_| EINVAL)?;
        let media = Media::new(range)?;
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
            let (region, failures) = (first.clone(), media.clone());
            assert!(Mapping::with_pages(region, start, size, altmap, node, failures).is_err());
        }
        drop(first);
        assert!(region().is_ok());
        Ok(())
    }
}
