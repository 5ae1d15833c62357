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

use core::fmt;

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

/// Bytes of the medium could not be read: it has an error there, or ends before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// Where the bytes begin, in bytes from the start of the range.
    pub offset: u64,
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the medium cannot be read at byte {:#x}", self.offset)
    }
}

impl core::error::Error for Unreadable {}

/// A medium as it is read before anybody changes it: the range in a kernel, an image in a file.
pub trait Medium {
    /// The size in bytes.
    fn size(&self) -> u64;

    /// Reads the bytes from `offset` on to all of `buf`.
    ///
    /// # Errors
    ///
    /// [`Unreadable`]: the medium has an error there, or ends before.
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Unreadable>;
}

impl Medium for &[u8] {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Unreadable> {
        let bytes = usize::try_from(offset)
            .ok()
            .and_then(|offset| self.get(offset..)?.get(..buf.len()))
            .ok_or(Unreadable { offset })?;
        for (to, from) in buf.iter_mut().zip(bytes) {
            *to = *from;
        }
        Ok(())
    }
}

impl<T: Medium + ?Sized> Medium for &T {
    fn size(&self) -> u64 {
        (**self).size()
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Unreadable> {
        (**self).read(offset, buf)
    }
}
