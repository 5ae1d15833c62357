// SPDX-License-Identifier: GPL-2.0-only

//! kmem-persist: a range that is memory and storage at once.
//!
//! Pages that hold data are kept, the others serve as RAM. A superblock in the first page, with a
//! second copy in the last, says how the pages are used:
//!
//! | format | type | pages of data |
//! |---|---|---|
//! | NONE | 0 | none: all but the superblocks is RAM |
//! | BLK | 1 | the blocks of a disk, which an index maps to pages |
//!
//! Everything about the medium is here: parameters, the superblock, the layout, the index, its scan,
//! and the order in which it is changed, so that a loss of power at any time leaves a medium that is
//! in order. Where the pages come from and go to is up to the user of this module.

pub mod bitmap;
pub mod blocks;
pub mod layout;
pub mod params;
pub mod scan;
pub mod superblock;

/// The bytes of a page of the range, which are those of a block too.
pub const PAGE_SIZE: u64 = super::extent::PAGE_SIZE;

/// The entries in a page of the index.
pub const ENTRIES_PER_PAGE: u64 = PAGE_SIZE / ENTRY_SIZE;

/// The bytes of an entry of the index.
pub const ENTRY_SIZE: u64 = 8;

/// The number of a page in the range: 0 is the first, which has the superblock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Page(pub u64);

/// The number of a block of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Block(pub u64);
