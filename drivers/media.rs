// SPDX-License-Identifier: GPL-2.0-only

//! Media errors: what is known to be bad on a disk, and what makes it good again.
//!
//! | list | has | comes from |
//! |---|---|---|
//! | known | sectors | reads that failed, failed pages, root by `badblocks` in sysfs |
//! | pages | whole pages, also in known | `memory_failure()` |
//! | latent | sectors | root by `inject_error` in debugfs, for tests |
//!
//! A bad sector is good again when all of it is overwritten: its lines are stored whole, which gives
//! the memory new data and new check bits. A page that memory management was told of is good again
//! when all of it is overwritten at once: the kernel may have unmapped it, and nobody knows which of
//! its bytes are bad. A write of a part of such a page fails, and touches nothing. A sector is
//! forgotten when its new data is durable, so that a power loss in between does not leave bad memory
//! that is called good.
//!
//! The medium has no record of errors: the lists are empty at load.

use crate::{
    kapi::{
        badblocks::Badblocks,
        bio::Status,
        compat::EHWPOISON,
        dax::Holder,
        mapping::{
            FailureFlags,
            Failures,
            Mapping, //
        }, //
    },
    pmem_core::{
        extent::{
            Extent,
            Sector,
            PAGE_SIZE,
            SECTOR_SIZE, //
        },
        range::PhysRange, //
    }, //
};
use core::ops::Range;
use kernel::{
    fmt,
    prelude::*,
    str::CString,
    sync::Arc, //
};

/// The sectors of a page.
const PER_PAGE: u64 = PAGE_SIZE / SECTOR_SIZE;

/// What is bad on one disk.
#[pin_data]
pub(crate) struct Media {
    #[pin]
    known: Badblocks,
    #[pin]
    pages: Badblocks,
    #[pin]
    latent: Badblocks,
    holder: Arc<Holder>,
    range: PhysRange,
}

/// The sectors that `extent` has bytes of.
fn sectors(extent: Extent) -> Range<Sector> {
    Sector::containing(extent.offset())..Sector(extent.end().div_ceil(SECTOR_SIZE))
}

/// The sectors of all pages that have some of `sectors`.
fn outward(sectors: &Range<Sector>) -> Range<Sector> {
    let start = sectors.start.0 / PER_PAGE * PER_PAGE;
    Sector(start)..Sector(sectors.end.0.div_ceil(PER_PAGE).wrapping_mul(PER_PAGE))
}

/// The sectors of all pages that are wholly in `sectors`.
fn inward(sectors: &Range<Sector>) -> Range<Sector> {
    let start = sectors.start.0.div_ceil(PER_PAGE).wrapping_mul(PER_PAGE);
    Sector(start)..Sector(sectors.end.0 / PER_PAGE * PER_PAGE)
}

impl Media {
    /// The medium of `range`, where nothing is known to be bad.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(range: PhysRange) -> Result<Arc<Self>> {
        let holder = Arc::pin_init(Holder::new(), GFP_KERNEL)?;
        Arc::pin_init(
            try_pin_init!(Media {
                known <- Badblocks::new(),
                pages <- Badblocks::new(),
                latent <- Badblocks::new(),
                holder,
                range,
            }),
            GFP_KERNEL,
        )
    }

    /// The list that users see.
    pub(crate) fn badblocks(&self) -> &Badblocks {
        &self.known
    }

    /// The way to the file system, for the disk's DAX device.
    pub(crate) fn holder(&self) -> Arc<Holder> {
        self.holder.clone()
    }

    /// Whether anything may be bad. If not, nothing else here needs to be asked.
    #[inline]
    pub(crate) fn is_suspect(&self) -> bool {
        self.known.runs() | self.pages.runs() | self.latent.runs() != 0
    }

    /// The first of `sectors` that are bad and known to be.
    fn known(&self, sectors: &Range<Sector>) -> Option<Range<Sector>> {
        let (known, pages) = (self.known.first(sectors), self.pages.first(sectors));
        match (known, pages) {
            (Some(known), Some(pages)) if pages.start < known.start => Some(pages),
            (known, pages) => known.or(pages),
        }
    }

    /// Adds `bad` to what is known.
    fn discover(&self, bad: &Range<Sector>) {
        let first = self.known.runs() == 0;
        let added = self.known.set(bad);
        // Known first: in between it is in both.
        let _ = self.latent.clear(bad);
        if added.is_err() {
            pr_err!(
                "{}: the list of bad sectors is full; it lacks sectors {} to {}\n",
                self.range,
                bad.start.0,
                bad.end.0.wrapping_sub(1)
            );
        } else if first {
            pr_err!(
                "{}: media errors, the first in sector {}; badblocks in sysfs has all that are found\n",
                self.range,
                bad.start.0
            );
        }
    }

    /// Looks whether `extent` can be read, before it is.
    ///
    /// # Errors
    ///
    /// `IOERR`: a sector of it is bad.
    #[cold]
    pub(crate) fn before_read(&self, extent: Extent) -> Result<(), Status> {
        let sectors = sectors(extent);
        if self.known(&sectors).is_some() {
            return Err(Status::IOERR);
        }
        if let Some(latent) = self.latent.first(&sectors) {
            // One sector, as the memory would tell.
            self.failed_read(latent.start);
            return Err(Status::IOERR);
        }
        Ok(())
    }

    /// A read has met bad memory in `sector`.
    #[cold]
    pub(crate) fn failed_read(&self, sector: Sector) {
        self.discover(&(sector..Sector(sector.0.saturating_add(1))));
    }

    /// Makes `extent` ready to be overwritten.
    ///
    /// # Errors
    ///
    /// Nothing may be written then.
    ///
    /// - `IOERR`: a part of a page that has failed as a whole would be overwritten, or no memory.
    /// - `AGAIN`: it must not sleep, and would have to.
    #[cold]
    pub(crate) fn before_write(
        &self,
        mapping: &Mapping,
        extent: Extent,
        may_sleep: bool,
    ) -> Result<(), Status> {
        let sectors = sectors(extent);
        let pages = outward(&sectors);
        if self.pages.first(&pages).is_none() {
            return Ok(());
        }
        let inside = |run: &Range<Sector>| run.start >= sectors.start && run.end <= sectors.end;
        if !self.pages.all(pages.clone()).all(|run| inside(&run)) {
            return Err(Status::IOERR);
        }
        if !may_sleep {
            return Err(Status::AGAIN);
        }
        for run in self.pages.all(pages) {
            let extent = self.extent(&run).ok_or(Status::IOERR)?;
            mapping.make_accessible(extent).map_err(|_| Status::IOERR)?;
        }
        Ok(())
    }

    /// `extent` was overwritten, and its new data is durable. Returns how many bad sectors are good.
    ///
    /// # Errors
    ///
    /// `IOERR`: a list is full, so that the data cannot be read.
    #[cold]
    pub(crate) fn after_write(&self, mapping: &Mapping, extent: Extent) -> Result<u64, Status> {
        let sectors = sectors(extent);
        let bad = [&self.known, &self.latent].map(|list| {
            list.all(sectors.clone())
                .map(|run| run.end.0.wrapping_sub(run.start.0))
                .fold(0, u64::wrapping_add)
        });
        let pages = inward(&sectors);
        for run in self.pages.all(pages.clone()) {
            if let Some(extent) = self.extent(&run) {
                mapping.clear_poison(extent);
            }
        }
        // The list that users see comes last.
        let cleared = self
            .latent
            .clear(&sectors)
            .and(self.pages.clear(&pages))
            .and(self.known.clear(&sectors));
        let [known, latent] = bad;
        cleared.map(|()| known.wrapping_add(latent)).map_err(|_| {
            pr_err!(
                "{}: the list of bad sectors is full; overwrite some of them whole\n",
                self.range
            );
            Status::IOERR
        })
    }

    /// How many pages of `extent` can be accessed directly: those before the first that is bad. If
    /// that is the first one, it is one for `recovery`.
    ///
    /// # Errors
    ///
    /// `EHWPOISON`: the first page is bad.
    #[cold]
    pub(crate) fn accessible(&self, extent: Extent, recovery: bool) -> Result<u64> {
        let all = sectors(extent);
        let known = self.known(&all).map_or(all.end, |bad| bad.start);
        let latent = self.latent.first(&all).map_or(all.end, |bad| bad.start);
        let good = known.min(latent).0.wrapping_sub(all.start.0);
        if good >= PER_PAGE || known.min(latent) == all.end {
            return Ok(good / PER_PAGE);
        }
        if recovery {
            return Ok(1);
        }
        let page = all.start..Sector(all.start.0.wrapping_add(PER_PAGE));
        for bad in self.latent.all(page) {
            self.discover(&bad);
        }
        Err(EHWPOISON)
    }

    /// Overwrites `pages`, which may be bad, by `copy`: all of them if it is to be `whole`. It returns
    /// how many bytes it has written from the first on, and made durable. Returns how many of these
    /// can be read from now on, and how many bad sectors are good.
    ///
    /// If there are bad ones, a part of them is not written at all: some of them would stay bad.
    #[cold]
    pub(crate) fn recover(
        &self,
        mapping: &Mapping,
        pages: Extent,
        whole: bool,
        copy: impl FnOnce() -> usize,
    ) -> (usize, u64) {
        let all = sectors(pages);
        if self.known(&all).is_none() && self.latent.first(&all).is_none() {
            return (copy(), 0);
        }
        if !whole || self.before_write(mapping, pages, true).is_err() {
            return (0, 0);
        }
        let written = copy();
        // A page that was written in part is as bad as before.
        let good = written as u64 / PAGE_SIZE * PAGE_SIZE;
        let good = Extent::from_sectors(all.start, good, pages.end());
        match good.map(|good| self.after_write(mapping, good)) {
            Ok(Ok(cleared)) => (written, cleared),
            _ => (0, 0),
        }
    }

    /// The bytes of `sectors`.
    fn extent(&self, sectors: &Range<Sector>) -> Option<Extent> {
        let len = sectors.end.0.checked_sub(sectors.start.0)?;
        let len = len.checked_mul(SECTOR_SIZE)?;
        Extent::from_sectors(sectors.start, len, self.range.size()).ok()
    }

    fn capacity(&self) -> Sector {
        Sector::containing(self.range.size())
    }

    /// The sectors that `text` names: `SECTOR [COUNT]`.
    fn parse(&self, text: &str) -> Option<Range<Sector>> {
        let mut words = text.split_ascii_whitespace();
        let start: u64 = words.next()?.parse().ok()?;
        let count: u64 = words.next().map_or(Some(1), |word| word.parse().ok())?;
        let end = start.checked_add(count)?;
        (words.next().is_none() && count != 0 && end <= self.capacity().0)
            .then_some(Sector(start)..Sector(end))
    }

    /// The sectors that are bad, and nobody knows: `inject_error` in debugfs.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn latent(&self) -> Result<CString> {
        let mut runs = KVec::new();
        for run in self.latent.all(Sector(0)..self.capacity()) {
            runs.push(run, GFP_KERNEL)?;
        }
        CString::try_from_fmt(fmt!("{}", Runs(&runs)))
    }

    /// Makes the sectors bad that `text` names, `SECTOR [COUNT]`, without telling anybody: for tests.
    ///
    /// # Errors
    ///
    /// - `EINVAL`: it names none of this disk, which is logged.
    /// - `ENOSPC`: there are too many already.
    pub(crate) fn inject(&self, text: &str) -> Result {
        let Some(sectors) = self.parse(text) else {
            pr_err!(
                "{}: inject_error: {:?}; write SECTOR [COUNT], in sectors of 512 bytes below {}\n",
                self.range,
                text.trim_end(),
                self.capacity().0
            );
            return Err(EINVAL);
        };
        self.latent.set(&sectors)
    }
}

/// A line for each run: its first sector, and how many there are.
struct Runs<'a>(&'a [Range<Sector>]);

impl fmt::Display for Runs<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, run) in self.0.iter().enumerate() {
            let separator = if i == 0 { "" } else { "\n" };
            let count = run.end.0.wrapping_sub(run.start.0);
            write!(f, "{separator}{} {count}", run.start.0)?;
        }
        Ok(())
    }
}

impl Failures for Media {
    fn memory_failure(&self, offset: u64, len: u64, flags: FailureFlags) -> Result {
        let pages = Extent::from_sectors(Sector::containing(offset), len, self.range.size());
        let pages = outward(&sectors(pages.map_err(|_| ENXIO)?));
        if self.pages.set(&pages).is_err() {
            pr_err!("{}: the list of failed pages is full\n", self.range);
        }
        self.discover(&pages);
        self.holder.notify_failure(offset, len, flags)
    }
}
