// SPDX-License-Identifier: GPL-2.0-only

//! Which pages of a range are what.
//!
//! | pages, of `N` | NONE | BLK |
//! |---|---|---|
//! | 0 | superblock | superblock |
//! | 1 ..= `I` | RAM | index |
//! | `I` + 1 ..= `N` - 2 | RAM | pages of data, each of which is RAM as long as it has none |
//! | `N` - 1 | second copy of the superblock | second copy of the superblock |
//!
//! NONE has no index, so that `I` is 0.

use super::{
    Block,
    Page,
    ENTRIES_PER_PAGE,
    ENTRY_SIZE,
    PAGE_SIZE, //
};
use core::{
    fmt,
    ops::Range, //
};

/// The pages of the two superblocks.
const SUPERBLOCKS: u64 = 2;

/// How many spare pages there are at least, if the range is not too small for a disk.
const SPARE_MIN: u64 = 64;

/// How many spare pages are enough, however large the range is.
const SPARE_MAX: u64 = 1024;

/// A range of this many pages for each spare page.
const PAGES_PER_SPARE: u64 = 1024;

/// The fewest pages of a range of format NONE.
const NONE_MIN: u64 = SUPERBLOCKS;

/// The fewest pages of a range of format BLK: a page of the index and one block.
const BLK_MIN: u64 = SUPERBLOCKS + SPARE_MIN + 2;

/// The most pages of a range: its size in bytes has 64 bits.
const MAX: u64 = u64::MAX / PAGE_SIZE;

/// Why a range cannot have a layout.
///
/// Displays as what is wrong and what would be right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The range has not enough pages.
    TooSmall {
        /// Its pages.
        pages: u64,
        /// How many it needs.
        smallest: u64,
    },
    /// The range has more pages than there are addresses.
    TooLarge {
        /// Its pages.
        pages: u64,
    },
    /// Numbers of pages that a superblock gives do not fit together.
    Parts {
        /// Pages of the range.
        pages: u64,
        /// Pages of the index.
        index_pages: u64,
        /// Blocks of the disk.
        blocks: u64,
        /// Spare pages.
        spare_pages: u64,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::TooSmall { pages, smallest } => write!(
                f,
                "a range of {pages} pages of 4096 bytes is too small; the smallest has {smallest}"
            ),
            Self::TooLarge { pages } => write!(
                f,
                "a range of {pages} pages of 4096 bytes is too large; the largest has {MAX}"
            ),
            Self::Parts {
                pages,
                index_pages,
                blocks,
                spare_pages,
            } => write!(
                f,
                "{index_pages} pages of index, {blocks} blocks and {spare_pages} spare pages do \
                 not make a range of {pages} pages"
            ),
        }
    }
}

impl core::error::Error for Error {}

/// Which pages of a range are what.
///
/// # Invariants
///
/// - The size of `pages` pages in bytes fits in 64 bits.
/// - Either `index_pages`, `blocks` and `spare_pages` are zero, and `pages` is at least 2; or
///   `blocks` and `spare_pages` are not zero, `index_pages` is the fewest that have an entry for
///   each of the blocks, and all of these and 2 add up to `pages`.
///
/// # Examples
///
/// ```
/// use pmem_core::kmem::{layout::Layout, Block, Page};
///
/// let layout = Layout::blk((1 << 30) / 4096)?;
/// assert_eq!(layout.blocks(), 261_375);
/// assert_eq!(layout.data(), 512..262_143);
/// assert_eq!(layout.copy(), Page(262_143));
/// assert_eq!(layout.entry_offset(Block(512)), Some(2 * 4096));
/// # Ok::<(), pmem_core::kmem::layout::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    pages: u64,
    index_pages: u64,
    blocks: u64,
    spare_pages: u64,
}

impl Layout {
    /// The layout of a range of so many pages, of which none has data.
    ///
    /// # Errors
    ///
    /// [`Error::TooSmall`] or [`Error::TooLarge`].
    pub const fn none(pages: u64) -> Result<Self, Error> {
        if pages < NONE_MIN {
            return Err(Error::TooSmall {
                pages,
                smallest: NONE_MIN,
            });
        }

        Self::from_parts(pages, 0, 0, 0)
    }

    /// The layout of a range of so many pages, with as many blocks as fit.
    ///
    /// # Errors
    ///
    /// [`Error::TooSmall`] or [`Error::TooLarge`].
    pub const fn blk(pages: u64) -> Result<Self, Error> {
        let spare = match pages / PAGES_PER_SPARE {
            few if few < SPARE_MIN => SPARE_MIN,
            many if many > SPARE_MAX => SPARE_MAX,
            pages => pages,
        };
        let Some(room) = pages.checked_sub(SUPERBLOCKS + spare) else {
            return Err(Error::TooSmall {
                pages,
                smallest: BLK_MIN,
            });
        };
        // A page of the index comes with the pages that its entries name. A page beyond the last
        // that is full is too few for a page of index and a block, so it is one more spare page.
        let blocks = room.wrapping_sub(room.div_ceil(ENTRIES_PER_PAGE + 1));
        if blocks == 0 {
            return Err(Error::TooSmall {
                pages,
                smallest: BLK_MIN,
            });
        }
        let index_pages = blocks.div_ceil(ENTRIES_PER_PAGE);
        // None of it wraps: these are parts of `pages`.
        let spare_pages = pages
            .wrapping_sub(SUPERBLOCKS)
            .wrapping_sub(index_pages)
            .wrapping_sub(blocks);

        Self::from_parts(pages, index_pages, blocks, spare_pages)
    }

    /// The layout with these numbers of pages, as a superblock gives them. All but the first are
    /// zero if no page has data.
    ///
    /// # Errors
    ///
    /// [`Error::TooLarge`], or [`Error::Parts`] if they do not fit together.
    pub const fn from_parts(
        pages: u64,
        index_pages: u64,
        blocks: u64,
        spare_pages: u64,
    ) -> Result<Self, Error> {
        if pages > MAX {
            return Err(Error::TooLarge { pages });
        }

        let fits = if index_pages == 0 && blocks == 0 && spare_pages == 0 {
            pages >= NONE_MIN
        } else {
            // The fewest pages of index for zero blocks would be zero.
            blocks != 0
                && spare_pages != 0
                && index_pages == blocks.div_ceil(ENTRIES_PER_PAGE)
                && matches!(sum(index_pages, blocks, spare_pages), Some(sum) if sum == pages)
        };
        if !fits {
            return Err(Error::Parts {
                pages,
                index_pages,
                blocks,
                spare_pages,
            });
        }

        // INVARIANT: All of it was just checked.
        Ok(Self {
            pages,
            index_pages,
            blocks,
            spare_pages,
        })
    }

    /// The pages of the range, at least 2.
    #[inline]
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// The size of the range in bytes.
    #[inline]
    pub const fn size(&self) -> u64 {
        // By the invariants, this does not wrap.
        self.pages.wrapping_mul(PAGE_SIZE)
    }

    /// The pages of the index.
    #[inline]
    pub const fn index_pages(&self) -> u64 {
        self.index_pages
    }

    /// The blocks of the disk, zero if there is none.
    #[inline]
    pub const fn blocks(&self) -> u64 {
        self.blocks
    }

    /// The pages of data beyond the blocks of the disk: so many blocks can have a new page while
    /// they keep the old one, also when the disk is full.
    #[inline]
    pub const fn spare_pages(&self) -> u64 {
        self.spare_pages
    }

    /// The numbers of the pages that can have data, none if there is no disk.
    #[inline]
    pub const fn data(&self) -> Range<u64> {
        if self.blocks == 0 {
            return 0..0;
        }
        // By the invariants, neither wraps, and the first is not beyond the last.
        self.index_pages.wrapping_add(1)..self.pages.wrapping_sub(1)
    }

    /// Whether `page` can have data.
    #[inline]
    pub const fn is_data(&self, page: Page) -> bool {
        let data = self.data();

        data.start <= page.0 && page.0 < data.end
    }

    /// The page with the second copy of the superblock, which is the last.
    #[inline]
    pub const fn copy(&self) -> Page {
        // By the invariants, this does not wrap.
        Page(self.pages.wrapping_sub(1))
    }

    /// Where the entry of `block` in the index is, in bytes from the start of the range, or
    /// [`None`] if the disk has no such block.
    #[inline]
    pub const fn entry_offset(&self, block: Block) -> Option<u64> {
        if block.0 >= self.blocks {
            return None;
        }
        // By the invariants, the entry is in the range, so that this does not wrap.
        Some(PAGE_SIZE.wrapping_add(block.0.wrapping_mul(ENTRY_SIZE)))
    }

    /// Where `page` is, in bytes from the start of the range, or [`None`] if the range has no such
    /// page.
    #[inline]
    pub const fn page_offset(&self, page: Page) -> Option<u64> {
        if page.0 >= self.pages {
            return None;
        }
        // By the invariants, this does not wrap.
        Some(page.0.wrapping_mul(PAGE_SIZE))
    }
}

/// The pages of a range with so many of each kind, if there can be as many.
const fn sum(index_pages: u64, blocks: u64, spare_pages: u64) -> Option<u64> {
    let Some(sum) = SUPERBLOCKS.checked_add(index_pages) else {
        return None;
    };
    let Some(sum) = sum.checked_add(blocks) else {
        return None;
    };
    sum.checked_add(spare_pages)
}

#[cfg_attr(CONFIG_RUST, kernel::macros::kunit_tests(pmem_kmem_layout))]
#[cfg(any(test, CONFIG_KUNIT = "y"))]
mod tests {
    use super::*;

    #[test]
    fn chosen() -> Result<(), Error> {
        // Pages of the range, of the index, blocks, spare pages.
        const LAYOUTS: [(u64, u64, u64, u64); 10] = [
            (68, 1, 1, 64),
            (69, 1, 2, 64),
            (66 + 513, 1, 512, 64),
            // A page for the index, and none for its block: one more is spare.
            (66 + 514, 1, 512, 65),
            (66 + 515, 2, 513, 64),
            (66 + 2 * 513, 2, 1024, 64),
            (66 + 2 * 513 + 1, 2, 1024, 65),
            // 1 GiB, 1 TiB, and all that can be addressed.
            (1 << 18, 511, 261_375, 256),
            (1 << 28, 523_264, 267_911_166, 1024),
            (MAX, 8_778_946_642_046, 4_494_820_680_727_423, 1024),
        ];

        for (pages, index_pages, blocks, spare_pages) in LAYOUTS {
            let layout = Layout::blk(pages)?;
            assert_eq!(
                layout,
                Layout::from_parts(pages, index_pages, blocks, spare_pages)?
            );
        }
        Ok(())
    }

    #[test]
    fn too_small_or_too_large() -> Result<(), Error> {
        let small = |pages, smallest| Err(Error::TooSmall { pages, smallest });
        for pages in [0, 1] {
            assert_eq!(Layout::none(pages), small(pages, 2));
        }
        for pages in [0, 1, 65, 66, 67] {
            assert_eq!(Layout::blk(pages), small(pages, 68));
        }
        assert!(Layout::none(2).is_ok());
        assert!(Layout::blk(68).is_ok());

        for pages in [MAX + 1, u64::MAX] {
            assert_eq!(Layout::none(pages), Err(Error::TooLarge { pages }));
            assert_eq!(Layout::blk(pages), Err(Error::TooLarge { pages }));
        }
        assert_eq!(Layout::none(MAX)?.size(), MAX * PAGE_SIZE);
        Ok(())
    }

    #[test]
    fn parts_fit_together() {
        const BAD: [(u64, u64, u64, u64); 10] = [
            (0, 0, 0, 0),
            (1, 0, 0, 0),
            (4, 1, 1, 0),
            (4, 1, 0, 1),
            (4, 0, 1, 1),
            (6, 1, 1, 1),
            (5, 2, 1, 0),
            (2 + 1 + 513 + 1, 1, 513, 1),
            (2 + 2 + 512 + 1, 2, 512, 1),
            (2, u64::MAX / 512, u64::MAX - 511, u64::MAX),
        ];

        for (pages, index_pages, blocks, spare_pages) in BAD {
            let error = Layout::from_parts(pages, index_pages, blocks, spare_pages);
            assert!(matches!(error, Err(Error::Parts { .. })));
        }
        assert!(Layout::from_parts(5, 1, 1, 1).is_ok());
    }

    #[test]
    fn places() -> Result<(), Error> {
        let layout = Layout::blk(66 + 515)?;
        assert_eq!(layout.data(), 3..580);
        for (page, is_data) in [(0, false), (2, false), (3, true), (579, true), (580, false)] {
            assert_eq!(layout.is_data(Page(page)), is_data);
            assert_eq!(layout.page_offset(Page(page)), Some(page * 4096));
        }
        assert_eq!(layout.copy(), Page(580));
        assert_eq!(layout.page_offset(Page(581)), None);
        assert_eq!(layout.page_offset(Page(u64::MAX)), None);
        assert_eq!(layout.entry_offset(Block(0)), Some(4096));
        assert_eq!(layout.entry_offset(Block(512)), Some(8192));
        assert_eq!(layout.entry_offset(Block(513)), None);
        assert_eq!(layout.entry_offset(Block(u64::MAX)), None);

        let layout = Layout::none(581)?;
        for page in [0, 1, 579, 580, u64::MAX] {
            assert!(!layout.is_data(Page(page)));
        }
        assert_eq!(layout.entry_offset(Block(0)), None);
        Ok(())
    }
}
