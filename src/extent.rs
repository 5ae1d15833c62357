// SPDX-License-Identifier: GPL-2.0-only

//! Extents: which bytes of a disk a request is about, checked against the disk's size.
//!
//! A request says where it starts in sectors (`bi_sector`) or in pages (`pgoff` of the DAX
//! operations), and the memory that it is about has page frame numbers. Each of these has a type
//! here. A plain [`u64`] is always a number of bytes.

use core::fmt;

/// How far a sector number is shifted to be a byte offset: `SECTOR_SHIFT`, `include/linux/blk_types.h`.
pub const SECTOR_SHIFT: u32 = 9;

/// The bytes of a sector, whatever the logical block size of a disk is.
pub const SECTOR_SIZE: u64 = 1 << SECTOR_SHIFT;

/// How far a page number is shifted to be a byte offset.
///
/// Persistent memory is handed out in pages of 4 KiB on each architecture that has any.
pub const PAGE_SHIFT: u32 = 12;

/// The bytes of a page.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;

/// A sector number: an offset in a disk, in units of 512 bytes (`sector_t`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sector(pub u64);

impl Sector {
    /// The sector that has the byte at `offset` in it; for the size of a disk, its capacity in
    /// whole sectors.
    #[inline]
    pub const fn containing(offset: u64) -> Self {
        Self(offset >> SECTOR_SHIFT)
    }
}

/// An offset in a disk, in units of pages (`pgoff` of `struct dax_operations`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PageOffset(pub u64);

impl PageOffset {
    /// The page that has the byte at `offset` in it.
    #[inline]
    pub const fn containing(offset: u64) -> Self {
        Self(offset >> PAGE_SHIFT)
    }
}

/// A page frame number: a physical address in units of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pfn(pub u64);

impl Pfn {
    /// The page frame that has the physical address `addr` in it.
    #[inline]
    pub const fn containing(addr: u64) -> Self {
        Self(addr >> PAGE_SHIFT)
    }
}

/// An extent reaches beyond the end of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// Of sectors.
    Sectors {
        /// Where the extent starts.
        sector: Sector,
        /// Its size in bytes.
        len: u64,
        /// The size of the disk in bytes.
        disk: u64,
    },
    /// Of pages.
    Pages {
        /// Where the extent starts.
        pgoff: PageOffset,
        /// Its size in pages.
        nr_pages: u64,
        /// The size of the disk in bytes.
        disk: u64,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Sectors { sector, len, disk } => write!(
                f,
                "{len} bytes at sector {} reach beyond the end of the disk at sector {}",
                sector.0,
                Sector::containing(disk).0
            ),
            Self::Pages {
                pgoff,
                nr_pages,
                disk,
            } => write!(
                f,
                "{nr_pages} pages at page {} reach beyond the end of the disk at page {}",
                pgoff.0,
                PageOffset::containing(disk).0
            ),
        }
    }
}

impl core::error::Error for Error {}

/// Bytes of a disk, all of which exist.
///
/// # Invariants
///
/// `offset + len` is at most the size of the disk that the extent was made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    offset: u64,
    len: u64,
}

impl Extent {
    /// The `len` bytes from `sector` of a disk of `disk` bytes.
    ///
    /// # Errors
    ///
    /// [`Error::Sectors`] if the disk does not have all of them.
    ///
    /// # Examples
    ///
    /// ```
    /// use pmem_core::extent::{Extent, Sector};
    ///
    /// let extent = Extent::from_sectors(Sector(8), 4096, 1 << 20)?;
    /// assert_eq!(extent.offset(), 4096);
    ///
    /// assert!(Extent::from_sectors(Sector(2047), 4096, 1 << 20).is_err());
    /// assert!(Extent::from_sectors(Sector(u64::MAX), 4096, 1 << 20).is_err());
    /// # Ok::<(), pmem_core::extent::Error>(())
    /// ```
    #[inline]
    pub const fn from_sectors(sector: Sector, len: u64, disk: u64) -> Result<Self, Error> {
        match Self::new(sector.0, SECTOR_SHIFT, len, disk) {
            Some(extent) => Ok(extent),
            None => Err(Error::Sectors { sector, len, disk }),
        }
    }

    /// The `nr_pages` pages from page `pgoff` of a disk of `disk` bytes.
    ///
    /// # Errors
    ///
    /// [`Error::Pages`] if the disk does not have all of them.
    ///
    /// # Examples
    ///
    /// ```
    /// use pmem_core::extent::{Extent, PageOffset};
    ///
    /// let extent = Extent::from_pages(PageOffset(512), 512, 4 << 20)?;
    /// assert_eq!((extent.offset(), extent.len()), (2 << 20, 2 << 20));
    ///
    /// assert!(Extent::from_pages(PageOffset(512), 513, 4 << 20).is_err());
    /// # Ok::<(), pmem_core::extent::Error>(())
    /// ```
    #[inline]
    pub const fn from_pages(pgoff: PageOffset, nr_pages: u64, disk: u64) -> Result<Self, Error> {
        // What has more pages than the disk is refused before its bytes are counted.
        if nr_pages <= disk >> PAGE_SHIFT {
            if let Some(extent) = Self::new(pgoff.0, PAGE_SHIFT, nr_pages << PAGE_SHIFT, disk) {
                return Ok(extent);
            }
        }
        Err(Error::Pages {
            pgoff,
            nr_pages,
            disk,
        })
    }

    /// The `len` bytes from `index << shift`, if they are within `disk` bytes.
    #[inline(always)]
    const fn new(index: u64, shift: u32, len: u64, disk: u64) -> Option<Self> {
        if index > disk >> shift {
            return None;
        }

        // No bit is shifted out, as none of the disk's size would be. So it is at most that size.
        let offset = index << shift;
        if len > disk.wrapping_sub(offset) {
            return None;
        }
        // INVARIANT: `offset + len` is at most `offset + (disk - offset)`.
        Some(Self { offset, len })
    }

    /// Where it starts in the disk, in bytes.
    #[inline]
    pub const fn offset(&self) -> u64 {
        self.offset
    }

    /// Its size in bytes, which may be zero.
    #[inline]
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes.
    #[inline]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where it ends in the disk, in bytes, exclusive.
    #[inline]
    pub const fn end(&self) -> u64 {
        // By the invariants, this does not overflow.
        self.offset.wrapping_add(self.len)
    }
}

#[cfg_attr(CONFIG_RUST, kernel::macros::kunit_tests(pmem_extent))]
#[cfg(any(test, CONFIG_KUNIT = "y"))]
mod tests {
    use super::*;

    /// The most bytes that `loff_t`, and so a disk, can have.
    const LARGEST: u64 = i64::MAX as u64;

    #[test]
    fn sectors() {
        // Sector, bytes, bytes of the disk, whether the disk has them.
        const CASES: [(u64, u64, u64, bool); 14] = [
            (0, 4096, 4096, true),
            (0, 4097, 4096, false),
            (7, 512, 4096, true),
            (7, 513, 4096, false),
            (8, 0, 4096, true),
            (8, 1, 4096, false),
            (9, 0, 4096, false),
            (0, 0, 0, true),
            (1, 0, 513, true),
            (1, 2, 513, false),
            (u64::MAX, 512, LARGEST, false),
            (u64::MAX >> 9, 512, u64::MAX, false),
            (1, u64::MAX, u64::MAX, false),
            ((LARGEST >> 9) - 1, 512, LARGEST, true),
        ];

        for (sector, len, disk, fits) in CASES {
            let sector = Sector(sector);
            match Extent::from_sectors(sector, len, disk) {
                Ok(extent) => {
                    assert!(fits);
                    assert_eq!(extent.offset(), sector.0 * 512);
                    assert_eq!(extent.len(), len);
                }
                Err(error) => {
                    assert!(!fits);
                    assert_eq!(error, Error::Sectors { sector, len, disk });
                }
            }
        }
    }

    #[test]
    fn pages() {
        // Page, number of pages, bytes of the disk, whether the disk has them.
        const CASES: [(u64, u64, u64, bool); 8] = [
            (0, 1, 4096, true),
            (0, 2, 4096, false),
            (1, 0, 4096, true),
            (1, 1, 4096, false),
            (511, 1, 2 << 20, true),
            (0, u64::MAX, u64::MAX, false),
            (0, (1 << 52) + 1, 4096, false),
            (u64::MAX, 1, LARGEST, false),
        ];

        for (pgoff, nr_pages, disk, fits) in CASES {
            let pgoff = PageOffset(pgoff);
            match Extent::from_pages(pgoff, nr_pages, disk) {
                Ok(extent) => {
                    assert!(fits);
                    assert_eq!(extent.offset(), pgoff.0 * 4096);
                    assert_eq!(extent.end(), (pgoff.0 + nr_pages) * 4096);
                }
                Err(error) => {
                    assert!(!fits);
                    assert_eq!(
                        error,
                        Error::Pages {
                            pgoff,
                            nr_pages,
                            disk
                        }
                    );
                }
            }
        }
    }

    #[test]
    fn numbers_of_an_address() {
        assert_eq!(Sector::containing(0x1_0000_01ff), Sector(0x80_0000));
        assert_eq!(PageOffset::containing(4095), PageOffset(0));
        assert_eq!(Pfn::containing(0x1_0000_1000), Pfn(0x10_0001));
    }
}
