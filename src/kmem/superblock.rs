// SPDX-License-Identifier: GPL-2.0-only

//! The superblock: what a range is, in two copies of which one can be lost.
//!
//! 128 bytes at the start of the first and of the last page, little-endian. The rest of these pages
//! is zero, and is not looked at.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic |
//! | 8 | 4 | type: 0 NONE, 1 BLK |
//! | 12 | 8 | pages of the index |
//! | 20 | 8 | blocks of the disk |
//! | 28 | 4 | version: 1 |
//! | 32 | 16 | UUID, in the order in which it is printed (RFC 9562) |
//! | 48 | 8 | pages of the range |
//! | 56 | 8 | spare pages |
//! | 64 | 4 | bytes of a page: 4096 |
//! | 68 | 4 | state: 0 clean, 1 in use |
//! | 72 | 8 | generation: of two valid copies, the greater one counts |
//! | 80 | 44 | zero |
//! | 124 | 4 | CRC32C of all before |
//!
//! The format that was proposed for Linux in 2022 has the magic and the first fields alone, so that
//! a range with it is recognized, and left alone.
//!
//! [`format`] and [`update`] write the copies so that a power loss at any time leaves at least one
//! that is valid, or none that looks as if it were one.

use super::{
    super::{
        medium::{
            array,
            crc32c,
            put,
            Medium,
            Unreadable, //
        },
        persist::{
            Machine,
            Persist,
            VolatileSlice,
            GRANULE, //
        },
        size::Size, //
    },
    layout::{
        self,
        Layout, //
    },
    Page,
    PAGE_SIZE, //
};
use core::fmt;

/// The bytes of a superblock.
pub const SIZE: usize = 128;

/// What a superblock starts with: a granule, which is durable at once or not at all.
const MAGIC: u64 = 0x4b4d_454d_5045_5253;

/// The version of the format.
const VERSION: u32 = 1;

/// Where the fields are, in bytes.
mod offset {
    pub(super) const MAGIC: usize = 0;
    pub(super) const TYPE: usize = 8;
    pub(super) const INDEX_PAGES: usize = 12;
    pub(super) const BLOCKS: usize = 20;
    pub(super) const VERSION: usize = 28;
    pub(super) const UUID: usize = 32;
    pub(super) const PAGES: usize = 48;
    pub(super) const SPARE_PAGES: usize = 56;
    pub(super) const PAGE_SIZE: usize = 64;
    pub(super) const STATE: usize = 68;
    pub(super) const GENERATION: usize = 72;
    pub(super) const ZERO: usize = 80;
    pub(super) const CHECKSUM: usize = 124;
}

/// How the pages of a range are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Format {
    /// All but the superblocks is RAM.
    None = 0,
    /// There is a disk; what has no data of it is RAM.
    Blk = 1,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Blk => "blk",
        })
    }
}

/// Whether somebody uses the range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum State {
    /// Its last user left it in order.
    Clean = 0,
    /// It has a user, or its last one lost power.
    InUse = 1,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Clean => "clean",
            Self::InUse => "in use",
        })
    }
}

/// The UUID of a range, which it gets when it is formatted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uuid(pub [u8; 16]);

impl Uuid {
    /// A UUID of version 4 of random bytes, of which it keeps 122 bits.
    pub const fn from_random(bytes: [u8; 16]) -> Self {
        const VERSION: u128 = 0xf << 76;
        const VARIANT: u128 = 0b11 << 62;

        let uuid = u128::from_be_bytes(bytes) & !(VERSION | VARIANT);
        let uuid = uuid | (4 << 76) | (0b10 << 62);
        Self(uuid.to_be_bytes())
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            let dash = if matches!(i, 4 | 6 | 8 | 10) { "-" } else { "" };
            write!(f, "{dash}{byte:02x}")?;
        }
        Ok(())
    }
}

/// What a superblock says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Which pages are what.
    pub layout: Layout,
    /// The name of the range.
    pub uuid: Uuid,
    /// Whether somebody uses it.
    pub state: State,
    /// How often it was written. Of two valid copies, the greater one counts.
    pub generation: u64,
}

impl Superblock {
    /// That of a range that is about to be formatted.
    pub const fn new(layout: Layout, uuid: Uuid) -> Self {
        Self {
            layout,
            uuid,
            state: State::Clean,
            generation: 1,
        }
    }

    /// How the pages are used.
    pub const fn format(&self) -> Format {
        if self.layout.blocks() == 0 {
            Format::None
        } else {
            Format::Blk
        }
    }

    /// The one that follows it, with another state.
    #[must_use]
    pub const fn next(&self, state: State) -> Self {
        Self {
            state,
            // It takes longer than the range lives, unless somebody wrote the last there: then the
            // primary one counts of two.
            generation: self.generation.saturating_add(1),
            ..*self
        }
    }

    /// Its bytes on the medium.
    pub fn encode(&self) -> [u8; SIZE] {
        let mut bytes = [0; SIZE];
        let layout = &self.layout;

        put(&mut bytes, offset::MAGIC, &MAGIC.to_le_bytes());
        put(
            &mut bytes,
            offset::TYPE,
            &(self.format() as u32).to_le_bytes(),
        );
        put(
            &mut bytes,
            offset::INDEX_PAGES,
            &layout.index_pages().to_le_bytes(),
        );
        put(&mut bytes, offset::BLOCKS, &layout.blocks().to_le_bytes());
        put(&mut bytes, offset::VERSION, &VERSION.to_le_bytes());
        put(&mut bytes, offset::UUID, &self.uuid.0);
        put(&mut bytes, offset::PAGES, &layout.pages().to_le_bytes());
        put(
            &mut bytes,
            offset::SPARE_PAGES,
            &layout.spare_pages().to_le_bytes(),
        );
        put(
            &mut bytes,
            offset::PAGE_SIZE,
            &(PAGE_SIZE as u32).to_le_bytes(),
        );
        put(
            &mut bytes,
            offset::STATE,
            &(self.state as u32).to_le_bytes(),
        );
        put(
            &mut bytes,
            offset::GENERATION,
            &self.generation.to_le_bytes(),
        );

        let checksum = checksum(&bytes).to_le_bytes();
        put(&mut bytes, offset::CHECKSUM, &checksum);
        bytes
    }
}

/// Reads a superblock.
///
/// # Errors
///
/// What is wrong with it first, in the order of [`Fault`].
pub fn decode(bytes: &[u8; SIZE]) -> Result<Superblock, Fault> {
    let u32_at = |at| u32::from_le_bytes(array(bytes, at));
    let u64_at = |at| u64::from_le_bytes(array(bytes, at));

    let magic = u64_at(offset::MAGIC);
    if magic != MAGIC {
        return Err(Fault::Magic(magic));
    }

    let found = u32_at(offset::CHECKSUM);
    let computed = checksum(bytes);
    let version = u32_at(offset::VERSION);
    if found != computed {
        return Err(match (version, found) {
            (0, 0) => Fault::Proposed,
            _ => Fault::Checksum { found, computed },
        });
    }
    if version != VERSION {
        return Err(Fault::Version(version));
    }

    let format = match u32_at(offset::TYPE) {
        0 => Format::None,
        1 => Format::Blk,
        other => return Err(Fault::Type(other)),
    };
    let page_size = u32_at(offset::PAGE_SIZE);
    if u64::from(page_size) != PAGE_SIZE {
        return Err(Fault::PageSize(page_size));
    }
    let state = match u32_at(offset::STATE) {
        0 => State::Clean,
        1 => State::InUse,
        other => return Err(Fault::State(other)),
    };
    let layout = Layout::from_parts(
        u64_at(offset::PAGES),
        u64_at(offset::INDEX_PAGES),
        u64_at(offset::BLOCKS),
        u64_at(offset::SPARE_PAGES),
    )
    .map_err(Fault::Layout)?;

    let superblock = Superblock {
        layout,
        uuid: Uuid(array(bytes, offset::UUID)),
        state,
        generation: u64_at(offset::GENERATION),
    };
    if superblock.format() != format {
        return Err(Fault::Type(format as u32));
    }
    Ok(superblock)
}

/// The checksum of a superblock.
fn checksum(bytes: &[u8; SIZE]) -> u32 {
    crc32c(bytes.get(..offset::CHECKSUM).unwrap_or_default())
}

/// Why a copy of the superblock is not valid.
///
/// Displays as what is wrong with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It could not be read.
    Unreadable(Unreadable),
    /// It starts with something else: there is none.
    Magic(u64),
    /// It is of the format that was proposed in 2022, which has no version and no checksum.
    Proposed,
    /// Its checksum is wrong.
    Checksum {
        /// The one that it has.
        found: u32,
        /// The one of its bytes.
        computed: u32,
    },
    /// Its version is not known.
    Version(u32),
    /// Its type is not known, or not that of its layout.
    Type(u32),
    /// Its pages have another size in bytes.
    PageSize(u32),
    /// Its state is not known.
    State(u32),
    /// It gives no possible layout.
    Layout(layout::Error),
    /// It is the second copy of a range of this many pages, which is another one that ends here.
    Pages(u64),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Unreadable(error) => error.fmt(f),
            Self::Magic(0) => write!(f, "there is none"),
            Self::Magic(found) => write!(f, "there is none, but {found:#018x}"),
            Self::Proposed => write!(
                f,
                "it is of the format that was proposed in 2022, which has no checksum"
            ),
            Self::Checksum { found, computed } => write!(
                f,
                "its checksum is {found:#010x}, that of its bytes is {computed:#010x}"
            ),
            Self::Version(found) => {
                write!(
                    f,
                    "its version is {found}, the one that is known is {VERSION}"
                )
            }
            Self::Type(found) => write!(f, "type {found} is not known, or not that of its layout"),
            Self::PageSize(found) => {
                write!(
                    f,
                    "its pages have {found} bytes, those here have {PAGE_SIZE}"
                )
            }
            Self::State(found) => write!(f, "state {found} is not known"),
            Self::Layout(error) => error.fmt(f),
            Self::Pages(pages) => write!(
                f,
                "it is of another range of {} that ends here",
                Size(pages.saturating_mul(PAGE_SIZE))
            ),
        }
    }
}

impl core::error::Error for Fault {}

/// Which copy of the superblock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The one in the first page.
    Primary,
    /// The one in the last page.
    Second,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Primary => "primary superblock",
            Self::Second => "second superblock",
        })
    }
}

/// Why a copy of the superblock is to be written again.
///
/// Displays as what is wrong with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// A power loss came between the two, so that it is that of before: it is valid, but the other
    /// one counts.
    Stale {
        /// Its generation.
        generation: u64,
    },
    /// A power loss came while it was written.
    Interrupted,
    /// Something else happened to it.
    Damaged(Fault),
}

impl fmt::Display for Repair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stale { generation } => {
                write!(f, "it is an older one, of generation {generation}")
            }
            Self::Interrupted => write!(f, "it was being written when the power was lost"),
            Self::Damaged(fault) => fault.fmt(f),
        }
    }
}

/// What [`probe`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// The superblock that counts.
    pub superblock: Superblock,
    /// The copy that is not the same, which the next [`update`] is to repair, and why.
    pub repair: Option<(Place, Repair)>,
}

/// Why a range cannot be used as it is.
///
/// Displays as what is wrong and what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProbeError {
    /// It has no superblock.
    Unformatted,
    /// No copy of its superblock is valid.
    Damaged {
        /// What is wrong with the primary one.
        primary: Fault,
        /// What is wrong with the second copy.
        second: Fault,
    },
    /// Its superblock is that of a range of another size.
    Size {
        /// The pages of the range.
        range: u64,
        /// The pages of the superblock's range.
        superblock: u64,
    },
    /// It has no room for the two superblocks.
    TooSmall {
        /// Its size in bytes.
        size: u64,
    },
}

impl fmt::Display for ProbeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Unformatted => write!(
                f,
                "there is no superblock; kmem_format=none or kmem_format=blk formats the range"
            ),
            Self::Damaged { primary, second } => write!(
                f,
                "there is no valid superblock (primary: {primary}; second: {second}); \
                 kmem_format with kmem_format_force=1 formats the range anew and loses its data"
            ),
            Self::Size { range, superblock } => {
                let bytes = |pages: u64| pages.saturating_mul(PAGE_SIZE);
                write!(
                    f,
                    "the superblock is of a range of {}, this one has {}; give kmem_size={}",
                    Size(bytes(superblock)),
                    Size(bytes(range)),
                    bytes(superblock)
                )
            }
            Self::TooSmall { size } => write!(
                f,
                "a range of {} has no room for two superblocks; give a larger kmem_size",
                Size(size)
            ),
        }
    }
}

impl core::error::Error for ProbeError {}

/// The bytes of a copy of the superblock.
fn bytes(medium: &impl Medium, place: Place) -> Result<[u8; SIZE], Unreadable> {
    let page = match place {
        Place::Primary => 0,
        Place::Second => (medium.size() / PAGE_SIZE).saturating_sub(1),
    };

    let mut bytes = [0; SIZE];
    // It is less than the size, or 0.
    medium.read(page.wrapping_mul(PAGE_SIZE), &mut bytes)?;
    Ok(bytes)
}

/// Reads a copy of the superblock.
///
/// The primary one may be that of a range of another size, which [`probe`] refuses.
///
/// # Errors
///
/// What is wrong with it.
pub fn read(medium: &impl Medium, place: Place) -> Result<Superblock, Fault> {
    let superblock = decode(&bytes(medium, place).map_err(Fault::Unreadable)?)?;
    let pages = superblock.layout.pages();

    match place {
        Place::Second if pages != medium.size() / PAGE_SIZE => Err(Fault::Pages(pages)),
        _ => Ok(superblock),
    }
}

/// Reads both copies of the superblock, and decides which one counts.
///
/// A range of another size than the superblock's has its second copy elsewhere, so that the primary
/// one alone says so.
///
/// # Errors
///
/// [`ProbeError::Unformatted`] if neither starts as a superblock does, and else the other
/// [`ProbeError`]s: none of these ranges may be formatted, unless its user says that it may lose
/// its data.
pub fn probe(medium: &impl Medium) -> Result<Found, ProbeError> {
    use Place::{
        Primary,
        Second, //
    };

    let size = medium.size();
    let range = size / PAGE_SIZE;
    if Layout::none(range).is_err() {
        return Err(ProbeError::TooSmall { size });
    }

    let stale = |old: Superblock| Repair::Stale {
        generation: old.generation,
    };
    let (superblock, repair) = match (read(medium, Primary), read(medium, Second)) {
        (Ok(primary), _) if primary.layout.pages() != range => {
            return Err(ProbeError::Size {
                range,
                superblock: primary.layout.pages(),
            })
        }
        (Ok(primary), Ok(second)) if primary == second => (primary, None),
        (Ok(primary), Ok(second)) if primary.generation < second.generation => {
            (second, Some((Primary, stale(primary))))
        }
        (Ok(primary), Ok(second)) => (primary, Some((Second, stale(second)))),
        (Ok(primary), Err(fault)) => (
            primary,
            Some((Second, why(medium, Second, fault, &primary))),
        ),
        (Err(fault), Ok(second)) => (
            second,
            Some((Primary, why(medium, Primary, fault, &second))),
        ),
        (Err(Fault::Magic(_)), Err(Fault::Magic(_))) => return Err(ProbeError::Unformatted),
        (Err(primary), Err(second)) => return Err(ProbeError::Damaged { primary, second }),
    };

    Ok(Found { superblock, repair })
}

/// Why the copy at `place` has this fault, if `valid` is the other one: what [`format`] and
/// [`update`] can leave is told from damage.
fn why(medium: &impl Medium, place: Place, fault: Fault, valid: &Superblock) -> Repair {
    let is_torn = |found: &[u8; SIZE]| {
        found
            .iter()
            .zip(valid.encode())
            .enumerate()
            .all(|(at, (&found, valid))| {
                found == valid
                    || (offset::STATE..offset::ZERO).contains(&at)
                    || at >= offset::CHECKSUM
            })
    };
    let is_interrupted = match fault {
        Fault::Magic(found) => found == 0,
        Fault::Checksum { .. } => bytes(medium, place).is_ok_and(|found| is_torn(&found)),
        _ => false,
    };

    if is_interrupted {
        Repair::Interrupted
    } else {
        Repair::Damaged(fault)
    }
}

/// The memory of a range is shorter than its superblock says. Nothing was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Short {
    /// Its size in bytes.
    pub len: u64,
    /// The size of the superblock's range in bytes.
    pub needed: u64,
}

impl fmt::Display for Short {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} are mapped of a range of {}",
            Size(self.len),
            Size(self.needed)
        )
    }
}

impl core::error::Error for Short {}

/// The parts of a range that are written here.
struct Parts<'a> {
    /// The page of the primary superblock.
    primary: VolatileSlice<'a>,
    index: VolatileSlice<'a>,
    /// The page of the second copy.
    second: VolatileSlice<'a>,
}

impl<'a> Parts<'a> {
    fn new(medium: VolatileSlice<'a>, layout: &Layout) -> Result<Self, Short> {
        let part = |page, pages: u64| {
            medium.range(layout.page_offset(page)?, pages.checked_mul(PAGE_SIZE)?)
        };
        let parts = || {
            Some(Self {
                primary: part(Page(0), 1)?,
                index: part(Page(1), layout.index_pages())?,
                second: part(layout.copy(), 1)?,
            })
        };

        parts().ok_or(Short {
            len: medium.len() as u64,
            needed: layout.size(),
        })
    }

    fn page(&self, place: Place) -> VolatileSlice<'a> {
        match place {
            Place::Primary => self.primary,
            Place::Second => self.second,
        }
    }
}

/// Zeroes the magic of a page, so that there is no superblock any more after a fence.
fn erase<M: Machine>(persist: &Persist<M>, page: VolatileSlice<'_>) {
    persist.write_bytes(page, &[0; GRANULE]);
}

/// Writes `superblock` to a page that has none, or one that does not count: the magic comes when all
/// else is there, so that a power loss leaves all of it, or nothing that counts.
fn create<M: Machine>(persist: &Persist<M>, page: VolatileSlice<'_>, superblock: &Superblock) {
    let mut bytes = superblock.encode();
    let magic: [u8; GRANULE] = array(&bytes, offset::MAGIC);
    put(&mut bytes, offset::MAGIC, &[0; GRANULE]);

    persist.write_bytes(page, &bytes);
    if let Some((_, rest)) = page.split_at(SIZE) {
        persist.write_zeroes(rest);
    }
    persist.fence();
    persist.write_bytes(page, &magic);
    persist.fence();
}

/// Formats a range: makes its index empty, and writes both copies of `superblock`.
///
/// A power loss leaves the range as it was, or without a superblock, or formatted; if one of its
/// copies was damaged, that one may be left alone, so that the range is not formatted by itself.
///
/// # Errors
///
/// [`Short`] if `medium` is not all of the range.
pub fn format<M: Machine>(
    persist: &Persist<M>,
    medium: VolatileSlice<'_>,
    superblock: &Superblock,
) -> Result<(), Short> {
    let parts = Parts::new(medium, &superblock.layout)?;

    // None of the old copies may count once the index is not that of them.
    erase(persist, parts.primary);
    erase(persist, parts.second);
    persist.fence();

    persist.write_zeroes(parts.index);
    persist.fence();

    create(persist, parts.second, superblock);
    create(persist, parts.primary, superblock);
    Ok(())
}

/// Writes both copies of `superblock`, [the next](Superblock::next) of the one that counts.
///
/// `repair` is the copy that [`probe`] found to be none, or not to count. It comes first, as a power
/// loss while the other one is written would leave none.
///
/// A power loss leaves the old superblock, or the new one.
///
/// # Errors
///
/// [`Short`] if `medium` is not all of the range.
pub fn update<M: Machine>(
    persist: &Persist<M>,
    medium: VolatileSlice<'_>,
    superblock: &Superblock,
    repair: Option<Place>,
) -> Result<(), Short> {
    let parts = Parts::new(medium, &superblock.layout)?;

    if let Some(place) = repair {
        create(persist, parts.page(place), superblock);
    }
    for place in [Place::Primary, Place::Second] {
        if repair != Some(place) {
            persist.write_bytes(parts.page(place), &superblock.encode());
            persist.fence();
        }
    }
    Ok(())
}

#[cfg_attr(CONFIG_RUST, kernel::macros::kunit_tests(pmem_kmem_superblock))]
#[cfg(any(test, CONFIG_KUNIT = "y"))]
mod tests {
    use super::*;

    /// The pages of a small range with a disk.
    const PAGES: u64 = 68;

    /// A superblock of such a range.
    fn superblock() -> Result<Superblock, layout::Error> {
        Ok(Superblock {
            generation: 7,
            ..Superblock::new(Layout::blk(PAGES)?, Uuid::from_random([0xff; 16]))
        })
    }

    /// A medium of two superblocks, and nothing else.
    struct Copies {
        size: u64,
        primary: [u8; SIZE],
        second: [u8; SIZE],
    }

    impl Medium for Copies {
        fn size(&self) -> u64 {
            self.size
        }

        fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Unreadable> {
            let bytes = match offset {
                0 => &self.primary,
                _ if offset == self.size - PAGE_SIZE => &self.second,
                _ => return Err(Unreadable { offset }),
            };
            for (to, from) in buf.iter_mut().zip(bytes) {
                *to = *from;
            }
            Ok(())
        }
    }

    /// What is found if these are the two copies.
    fn probed(primary: [u8; SIZE], second: [u8; SIZE]) -> Result<Found, ProbeError> {
        probe(&Copies {
            size: PAGES * PAGE_SIZE,
            primary,
            second,
        })
    }

    #[test]
    fn checksums() {
        // The one that all implementations give, and those of RFC 3720, appendix B.4.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(b""), 0);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    }

    #[test]
    fn bytes_on_the_medium() -> Result<(), layout::Error> {
        let superblock = superblock()?;
        let bytes = superblock.encode();

        assert_eq!(array(&bytes, 0), *b"SREPMEMK");
        assert_eq!(
            array(&bytes, 8),
            [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]
        );
        assert_eq!(array(&bytes, 24), [0, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(array(&bytes, 48), [68, 0, 0, 0, 0, 0, 0, 0, 64]);
        assert_eq!(array(&bytes, 64), [0, 16, 0, 0, 0, 0, 0, 0, 7, 0, 0]);
        assert_eq!(array(&bytes, 80), [0; 44]);
        assert_eq!(decode(&bytes), Ok(superblock));
        Ok(())
    }

    #[test]
    fn faults() -> Result<(), layout::Error> {
        let superblock = superblock()?;
        // Changes bytes; with the right checksum afterwards, or as it was.
        let changed = |at, value: &[u8], seal: bool| {
            let mut bytes = superblock.encode();
            put(&mut bytes, at, value);
            if seal {
                let checksum = checksum(&bytes).to_le_bytes();
                put(&mut bytes, offset::CHECKSUM, &checksum);
            }
            decode(&bytes)
        };

        assert_eq!(decode(&[0; SIZE]), Err(Fault::Magic(0)));
        assert!(matches!(changed(0, b"X", true), Err(Fault::Magic(_))));
        assert!(matches!(
            changed(40, b"X", false),
            Err(Fault::Checksum { .. })
        ));
        assert_eq!(changed(28, &[0; 100], false), Err(Fault::Proposed));
        assert_eq!(changed(28, &[2], true), Err(Fault::Version(2)));
        assert_eq!(changed(8, &[2], true), Err(Fault::Type(2)));
        assert_eq!(changed(8, &[0], true), Err(Fault::Type(0)));
        assert_eq!(changed(65, &[32], true), Err(Fault::PageSize(8192)));
        assert_eq!(changed(68, &[2], true), Err(Fault::State(2)));
        assert!(matches!(changed(48, &[69], true), Err(Fault::Layout(_))));
        Ok(())
    }

    #[test]
    fn the_copy_that_counts() -> Result<(), layout::Error> {
        let old = superblock()?;
        let new = old.next(State::InUse);
        let other = Superblock {
            uuid: Uuid([1; 16]),
            ..old
        };
        let found = |superblock, repair| Ok(Found { superblock, repair });
        let stale = |place| Some((place, Repair::Stale { generation: 7 }));
        let interrupted = |place| Some((place, Repair::Interrupted));
        let (none, [a, b, c]) = ([0; SIZE], [old, new, other].map(|it| it.encode()));

        assert_eq!(probed(none, none), Err(ProbeError::Unformatted));
        assert_eq!(probed([1; SIZE], [2; SIZE]), Err(ProbeError::Unformatted));
        assert_eq!(probed(a, a), found(old, None));
        assert_eq!(probed(b, a), found(new, stale(Place::Second)));
        assert_eq!(probed(a, b), found(new, stale(Place::Primary)));
        assert_eq!(probed(a, c), found(old, stale(Place::Second)));
        assert_eq!(probed(c, a), found(other, stale(Place::Second)));
        assert_eq!(probed(a, none), found(old, interrupted(Place::Second)));
        assert_eq!(probed(none, a), found(old, interrupted(Place::Primary)));

        // A torn update, and damage.
        let mut torn = a;
        put(&mut torn, offset::GENERATION, &[8]);
        assert_eq!(probed(torn, a), found(old, interrupted(Place::Primary)));
        put(&mut torn, offset::UUID, b"X");
        assert!(matches!(
            probed(a, torn),
            Ok(Found {
                repair: Some((Place::Second, Repair::Damaged(_))),
                ..
            })
        ));
        assert!(matches!(
            probed(none, torn),
            Err(ProbeError::Damaged { .. })
        ));
        Ok(())
    }

    #[test]
    fn another_size() -> Result<(), layout::Error> {
        let superblock = superblock()?;
        let found = |size, primary, second| {
            probe(&Copies {
                size,
                primary,
                second,
            })
        };
        let (none, bytes) = ([0; SIZE], superblock.encode());
        let of_another = Err(ProbeError::Size {
            range: 70,
            superblock: PAGES,
        });

        assert_eq!(found(70 * PAGE_SIZE, bytes, none), of_another);
        assert_eq!(found(70 * PAGE_SIZE, bytes, bytes), of_another);
        assert_eq!(
            found(70 * PAGE_SIZE, none, bytes),
            Err(ProbeError::Damaged {
                primary: Fault::Magic(0),
                second: Fault::Pages(PAGES),
            })
        );
        for size in [0, 1, 8191] {
            assert_eq!(
                found(size, bytes, bytes),
                Err(ProbeError::TooSmall { size })
            );
        }
        Ok(())
    }

    #[test]
    fn uuids() {
        assert_eq!(
            Uuid::from_random([0; 16]),
            Uuid([0, 0, 0, 0, 0, 0, 0x40, 0, 0x80, 0, 0, 0, 0, 0, 0, 0])
        );
        let all = Uuid::from_random([0xff; 16]).0;
        assert_eq!(all.iter().map(|byte| byte.count_zeros()).sum::<u32>(), 4);
        assert_eq!((u128::from_be_bytes(all) >> 76) & 0xf, 4);
        assert_eq!((u128::from_be_bytes(all) >> 62) & 3, 2);
    }
}
