// SPDX-License-Identifier: GPL-2.0-only

//! The scan: reads the index of a range once, to know which pages have data.

use super::{
    super::medium::Medium,
    bitmap::Bitmap,
    layout::Layout,
    Block,
    Page,
    ENTRIES_PER_PAGE,
    ENTRY_SIZE,
    PAGE_SIZE, //
};
use core::fmt;

/// How many faults are kept, for a log.
pub const FAULTS: usize = 8;

/// The bytes that are read at a time.
///
/// They are a sector, which is what goes bad at once, and are not too many for a kernel's stack.
pub const PIECE: usize = 512;

/// The entries in a piece.
const ENTRIES_PER_PIECE: u64 = PIECE as u64 / ENTRY_SIZE;

/// What is wrong with an entry of the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It names a page that cannot have data.
    NotData,
    /// It names a page that an entry before it names.
    Twice,
    /// It is beyond the last block, and not zero.
    NoBlock,
    /// It cannot be read, nor can the others in its sector.
    Unreadable,
}

/// A fault of an entry of the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryFault {
    /// The block of the entry.
    pub block: Block,
    /// The page that it names; zero if it is not known.
    pub page: u64,
    /// What is wrong with it.
    pub kind: Kind,
}

impl fmt::Display for EntryFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            block: Block(block),
            page,
            kind,
        } = *self;

        match kind {
            Kind::NotData => write!(f, "block {block}: page {page} cannot have data"),
            Kind::Twice => write!(f, "block {block}: page {page} has data of another block"),
            Kind::NoBlock => write!(
                f,
                "block {block}: page {page}, but the disk has no such block"
            ),
            Kind::Unreadable => write!(
                f,
                "block {block} and those in the same {PIECE} bytes of the index: cannot be read"
            ),
        }
    }
}

/// What a [`scan`] found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scan {
    /// The pages that have data.
    pub mapped: u64,
    /// The faults: one for an entry, or for a sector that cannot be read.
    pub faults: u64,
    /// The sectors of the index that cannot be read. They can name any page, so that none of the
    /// range may be given to others.
    pub unreadable: u64,
    /// The first of the faults.
    pub first: [Option<EntryFault>; FAULTS],
}

impl Scan {
    fn fault(&mut self, block: Block, page: u64, kind: Kind) {
        if let Some(free) = self.first.iter_mut().find(|fault| fault.is_none()) {
            *free = Some(EntryFault { block, page, kind });
        }
        // It counts entries, of which there are fewer.
        self.faults = self.faults.wrapping_add(1);
    }
}

/// Sets the bits of the pages of the superblocks and of the index in `held`.
pub fn hold_metadata(layout: &Layout, held: Bitmap<'_>) {
    for page in 0..=layout.index_pages() {
        held.set_alone(page);
    }
    held.set_alone(layout.copy().0);
}

/// Reads the index, and sets the bit of each page that an entry names in `held`.
///
/// `held` has a bit for each page of the range, all of pages of data are clear, and nobody else has
/// it yet. The bit of a page that is named twice is set in `disputed`, too, if that is given: it
/// cannot be known whose data it has, and it must not be given back as long as one block keeps it.
pub fn scan(
    medium: &impl Medium,
    layout: &Layout,
    held: Bitmap<'_>,
    disputed: Option<Bitmap<'_>>,
) -> Scan {
    let mut scan = Scan::default();
    let mut piece = [0; PIECE];
    // By the invariants of a layout, none of these wraps: all entries are in the range.
    let entries = layout.index_pages().wrapping_mul(ENTRIES_PER_PAGE);

    for first in (0..entries).step_by(ENTRIES_PER_PIECE as usize) {
        let offset = PAGE_SIZE.wrapping_add(first.wrapping_mul(ENTRY_SIZE));
        if medium.read(offset, &mut piece).is_err() {
            scan.unreadable = scan.unreadable.wrapping_add(1);
            scan.fault(Block(first), 0, Kind::Unreadable);
            continue;
        }
        // Most of an index is empty.
        if entries_of(&piece).fold(0, |any, page| any | page) == 0 {
            continue;
        }

        for (block, page) in (first..).zip(entries_of(&piece)) {
            if page == 0 {
                continue;
            }
            if block >= layout.blocks() {
                scan.fault(Block(block), page, Kind::NoBlock);
            } else if !layout.is_data(Page(page)) {
                scan.fault(Block(block), page, Kind::NotData);
            } else if held.set_alone(page) {
                scan.fault(Block(block), page, Kind::Twice);
                if let Some(disputed) = disputed {
                    disputed.set_alone(page);
                }
            } else {
                scan.mapped = scan.mapped.wrapping_add(1);
            }
        }
    }
    scan
}

/// The entries in a piece of the index.
fn entries_of(piece: &[u8; PIECE]) -> impl Iterator<Item = u64> + '_ {
    piece.chunks_exact(ENTRY_SIZE as usize).map(|entry| {
        entry
            .first_chunk()
            .map_or(0, |entry| u64::from_le_bytes(*entry))
    })
}

#[cfg_attr(CONFIG_RUST, kernel::macros::kunit_tests(pmem_kmem_scan))]
#[cfg(any(test, CONFIG_KUNIT = "y"))]
mod tests {
    use super::{
        super::super::medium::Unreadable,
        *, //
    };
    use core::sync::atomic::AtomicU64;

    /// An index of one page, most of which is zero.
    struct Index {
        /// The block of the first of the entries that are given.
        first: u64,
        entries: [u64; 4],
        /// A sector that cannot be read.
        bad: Option<u64>,
    }

    impl Medium for Index {
        fn size(&self) -> u64 {
            PAGES * PAGE_SIZE
        }

        fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Unreadable> {
            if self.bad == Some(offset / PIECE as u64) {
                return Err(Unreadable { offset });
            }
            buf.fill(0);
            let first = (offset - PAGE_SIZE) / ENTRY_SIZE;
            for (block, bytes) in (first..).zip(buf.chunks_exact_mut(ENTRY_SIZE as usize)) {
                let entry = block
                    .checked_sub(self.first)
                    .and_then(|at| self.entries.get(at as usize))
                    .copied()
                    .unwrap_or(0);
                for (to, from) in bytes.iter_mut().zip(entry.to_le_bytes()) {
                    *to = from;
                }
            }
            Ok(())
        }
    }

    /// A range of 66 blocks, the data of which is in the pages 2 ..= 131.
    const PAGES: u64 = 133;

    /// The scan of an index with these entries, and the pages held and disputed.
    fn scanned(index: &Index) -> Option<(Scan, [u64; 3], [u64; 3])> {
        let (held, disputed) = ([0; 3].map(AtomicU64::new), [0; 3].map(AtomicU64::new));
        let layout = Layout::blk(PAGES).ok()?;
        let found = scan(
            index,
            &layout,
            Bitmap::new(&held),
            Some(Bitmap::new(&disputed)),
        );

        Some((
            found,
            held.map(AtomicU64::into_inner),
            disputed.map(AtomicU64::into_inner),
        ))
    }

    fn faults<const N: usize>(faults: [(u64, u64, Kind); N]) -> [Option<EntryFault>; FAULTS] {
        let mut first = [None; FAULTS];
        for (to, (block, page, kind)) in first.iter_mut().zip(faults) {
            *to = Some(EntryFault {
                block: Block(block),
                page,
                kind,
            });
        }
        first
    }

    #[test]
    fn metadata_is_held() {
        let words = [0; 3].map(AtomicU64::new);
        if let Ok(layout) = Layout::blk(PAGES) {
            hold_metadata(&layout, Bitmap::new(&words));
        }
        assert!(Bitmap::new(&words).ones(0..192).eq([(0, 2), (132, 1)]));
    }

    #[test]
    fn pages_with_data() {
        let index = Index {
            first: 62,
            entries: [2, 131, 0, 64],
            bad: None,
        };
        let expected = Scan {
            mapped: 3,
            ..Scan::default()
        };
        assert_eq!(scanned(&index), Some((expected, [4, 1, 8], [0; 3])));
    }

    #[test]
    fn wrong_entries() {
        let index = Index {
            first: 63,
            entries: [9, 132, 9, 70],
            bad: None,
        };
        let expected = Scan {
            mapped: 1,
            faults: 3,
            unreadable: 0,
            first: faults([
                (64, 132, Kind::NotData),
                (65, 9, Kind::Twice),
                (66, 70, Kind::NoBlock),
            ]),
        };
        assert_eq!(
            scanned(&index),
            Some((expected, [1 << 9, 0, 0], [1 << 9, 0, 0]))
        );

        let index = Index {
            first: 0,
            entries: [1, u64::MAX, 1 << 63, 3],
            bad: None,
        };
        let expected = Scan {
            mapped: 1,
            faults: 3,
            unreadable: 0,
            first: faults([
                (0, 1, Kind::NotData),
                (1, u64::MAX, Kind::NotData),
                (2, 1 << 63, Kind::NotData),
            ]),
        };
        assert_eq!(scanned(&index), Some((expected, [8, 0, 0], [0; 3])));
    }

    #[test]
    fn sectors_that_cannot_be_read() {
        let index = Index {
            first: 0,
            entries: [2, 3, 4, 5],
            bad: Some(8 + 1),
        };
        let expected = Scan {
            mapped: 4,
            faults: 1,
            unreadable: 1,
            first: faults([(64, 0, Kind::Unreadable)]),
        };
        assert_eq!(scanned(&index), Some((expected, [0x3c, 0, 0], [0; 3])));
    }
}
