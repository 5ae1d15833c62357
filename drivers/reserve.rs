// SPDX-License-Identifier: GPL-2.0-only

//! A range that is about to be a disk: whether its start says that it may be used in this way.
//!
//! A disk whose struct pages are on its range begins with a reserve, see
//! [`reserve`](crate::pmem_core::reserve). One that was used so is refused otherwise, and one that
//! was not is not overwritten.

use crate::{
    kapi::{
        mapping::{
            Altmap,
            Mapping,
            STRUCT_PAGE_SIZE, //
        },
        mc::Checked,
        region::Region, //
    },
    pmem_core::{
        memmap::StructPages,
        persist::{
            Cache,
            Persist, //
        },
        range::PhysRange,
        reserve::{
            self,
            Erase,
            Refusal,
            Reserve,
            Write,
            HEADERS, //
        },
        size::Size, //
    },
};
use kernel::{
    fmt,
    prelude::*,
    sync::Arc, //
};

/// What is to be written to a range before it is a disk.
enum Step {
    Nothing,
    Write(Write),
    Erase(Erase),
}

/// The range of a disk, which may be used in the way that was asked for.
pub(crate) struct Place {
    region: Arc<Region>,
    range: PhysRange,
    cache: Cache,
    reserve: Option<Reserve>,
    step: Step,
}

impl Place {
    /// Looks at `range`, a part of `region`, for the disk `name`. Nothing is written yet.
    ///
    /// `force` says that a header may be lost, if struct pages are to be in RAM or there are none.
    ///
    /// # Errors
    ///
    /// - `EINVAL`: it is not to be used in this way, or too small for it, which is logged.
    /// - `EIO`: its start cannot be read, which is logged.
    /// - Those of [`Mapping::without_pages`], which are logged.
    pub(crate) fn check(
        name: fmt::Arguments<'_>,
        region: Arc<Region>,
        range: PhysRange,
        struct_pages: StructPages,
        cache: Cache,
        force: bool,
    ) -> Result<Self> {
        let refuse = |refusal: Refusal| {
            pr_err!("{}: {}: {}\n", name, range, refusal);
            match refusal {
                Refusal::Unreadable(_) => EIO,
                _ => EINVAL,
            }
        };
        let start = |size| {
            Mapping::without_pages(region.clone(), range.start(), size, cache).inspect_err(
                |error| {
                    pr_err!(
                        "{}: cannot map the first {} of {} to look at it ({:?})\n",
                        name,
                        Size(size),
                        range,
                        error
                    )
                },
            )
        };

        let (reserve, step) = match struct_pages {
            StructPages::Ram => {
                let mapping = start(HEADERS)?;
                let medium = Checked(mapping.slice(0, HEADERS).ok_or(EINVAL)?);
                match reserve::check_ram(&medium, force).map_err(refuse)? {
                    Some(erase) => (None, Step::Erase(erase)),
                    None => (None, Step::Nothing),
                }
            }
            StructPages::Dev => {
                let size = Reserve::of(range.size()).map_err(refuse)?.size();
                let mapping = start(size)?;
                let medium = Checked(mapping.slice(0, size).ok_or(EINVAL)?);
                let (reserve, write) =
                    reserve::check_dev(&medium, range.size(), STRUCT_PAGE_SIZE).map_err(refuse)?;
                (Some(reserve), write.map_or(Step::Nothing, Step::Write))
            }
        };
        Ok(Place {
            region,
            range,
            cache,
            reserve,
            step,
        })
    }

    /// The region that the range is a part of.
    pub(crate) fn region(&self) -> Arc<Region> {
        self.region.clone()
    }

    /// The whole range, with its reserve.
    pub(crate) fn range(&self) -> PhysRange {
        self.range
    }

    /// The room for struct pages, if they are to be on the range.
    pub(crate) fn altmap(&self) -> Option<Altmap> {
        self.reserve.map(|reserve| Altmap {
            kept: HEADERS,
            size: reserve.size(),
        })
    }

    /// Writes what the range needs to be used in this way, durably, and tells the log.
    ///
    /// # Errors
    ///
    /// Those of [`Mapping::without_pages`].
    pub(crate) fn settle(&self, name: fmt::Arguments<'_>, persist: &Persist) -> Result {
        if matches!(self.step, Step::Nothing) {
            return Ok(());
        }
        let mapping =
            Mapping::without_pages(self.region(), self.range.start(), HEADERS, self.cache)?;
        let headers = mapping.slice(0, HEADERS).ok_or(EINVAL)?;

        let done = match (&self.step, &self.reserve) {
            (Step::Write(what), Some(reserve)) => {
                match what {
                    Write::Header => pr_info!(
                        "{}: {} of {} are reserved for struct pages; the header is written\n",
                        name,
                        Size(reserve.size()),
                        self.range
                    ),
                    Write::Copy(place, fault) => pr_warn!(
                        "{}: {} of the header: {}; it is written again\n",
                        name,
                        place,
                        fault
                    ),
                }
                reserve::write(persist, headers, reserve, *what)
            }
            (Step::Erase(erase), _) => {
                pr_warn!("{}: {}: {}\n", name, self.range, erase);
                reserve::erase(persist, headers)
            }
            (Step::Nothing | Step::Write(_), _) => true,
        };
        if done {
            Ok(())
        } else {
            Err(EINVAL)
        }
    }
}
