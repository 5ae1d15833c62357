// SPDX-License-Identifier: GPL-2.0-only

//! The reserve: what a disk begins with whose struct pages are on its own range.
//!
//! | bytes of the range | content |
//! |---|---|
//! | 0 to 4095 | the header |
//! | 4096 to 8191 | its second copy |
//! | from 8192 on | struct pages, which the kernel places; they mean nothing after an unload |
//! | from the offset of the data on | the disk that users see |
//!
//! The reserve has 2 MiB, for the header and for the alignment of the struct pages, and 64 bytes for
//! each page of the range, rounded up to 2 MiB. It is a function of the size of the range alone, so
//! that each kernel finds the data at the same place.
//!
//! A copy of the header is 128 bytes, little-endian; the rest of its page is zero:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic: `PMEMRSRV` |
//! | 8 | 4 | version: 1 |
//! | 12 | 4 | bytes of a page: 4096 |
//! | 16 | 8 | bytes of the range of the disk, reserve and data |
//! | 24 | 8 | offset of the data, which is the size of the reserve |
//! | 32 | 8 | bytes of the data |
//! | 40 | 4 | bytes for each struct page: 64 |
//! | 44 | 80 | zero |
//! | 124 | 4 | CRC32C of all before |
//!
//! The header does not change. It is written where all of the reserve is zero, and else again only if
//! one copy is valid and the other one is not. A power loss while it is written leaves a reserve that
//! is taken for blank, or a header.

use super::{
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
    range::DISK_ALIGN,
    size::Size, //
};
use core::fmt;

/// The bytes that are kept for each struct page: those of the kernels that are not built to debug
/// memory.
pub const STRUCT_PAGE_SIZE: u64 = 64;

/// The bytes of both copies of the header, with the rest of their pages.
pub const HEADERS: u64 = 2 * PAGE_SIZE;

/// The bytes of a copy of the header.
pub const SIZE: usize = 128;

const PAGE_SIZE: u64 = super::extent::PAGE_SIZE;

/// What a header starts with: a granule, which is durable at once or not at all.
const MAGIC: u64 = u64::from_le_bytes(*b"PMEMRSRV");

/// The version of the format.
const VERSION: u32 = 1;

/// Where the fields are, in bytes.
mod offset {
    pub(super) const MAGIC: usize = 0;
    pub(super) const VERSION: usize = 8;
    pub(super) const PAGE_SIZE: usize = 12;
    pub(super) const RANGE: usize = 16;
    pub(super) const DATA: usize = 24;
    pub(super) const DATA_SIZE: usize = 32;
    pub(super) const STRUCT_PAGE: usize = 40;
    pub(super) const CHECKSUM: usize = 124;
}

/// How the range of a disk is divided into its reserve and its data.
///
/// Displays as in a sentence.
///
/// # Invariants
///
/// `range`, `data` and `range - data` are multiples of [`DISK_ALIGN`], and not zero.
///
/// # Examples
///
/// ```
/// use pmem_core::reserve::Reserve;
///
/// let reserve = Reserve::of(1 << 30)?;
/// assert_eq!(reserve.size(), 18 << 20);
/// assert_eq!(reserve.to_string(), "a disk of 1GiB with 1006MiB of data from 18MiB on");
/// assert_eq!(
///     Reserve::of(4 << 20).unwrap_err().to_string(),
///     "4MiB are too few for pmem_memmap=dev, which needs at least 6MiB for each disk; write ram, \
///      or ask for larger or fewer disks"
/// );
/// # Ok::<(), pmem_core::reserve::Refusal>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reserve {
    range: u64,
    data: u64,
}

impl Reserve {
    /// That of a disk in a range of `range` bytes.
    ///
    /// # Errors
    ///
    /// [`Refusal::TooSmall`] if there is no room for data, or `range` is not a multiple of
    /// [`DISK_ALIGN`].
    pub fn of(range: u64) -> Result<Self, Refusal> {
        // Neither overflows: it is a fraction of what fits.
        let room = (range / (PAGE_SIZE / STRUCT_PAGE_SIZE)).next_multiple_of(DISK_ALIGN);
        let data = room.wrapping_add(DISK_ALIGN);
        if range % DISK_ALIGN != 0 || data >= range {
            return Err(Refusal::TooSmall { range });
        }

        // INVARIANT: All are multiples, and it was just checked that there is data.
        Ok(Self { range, data })
    }

    /// The bytes of the whole range.
    pub const fn range(&self) -> u64 {
        self.range
    }

    /// The bytes of the reserve, which is the offset of the data.
    pub const fn size(&self) -> u64 {
        self.data
    }

    /// The bytes of the data.
    pub const fn data_size(&self) -> u64 {
        // By the invariants, this does not wrap.
        self.range.wrapping_sub(self.data)
    }

    /// The bytes of a copy of the header.
    pub fn encode(&self) -> [u8; SIZE] {
        let mut bytes = [0; SIZE];

        put(&mut bytes, offset::MAGIC, &MAGIC.to_le_bytes());
        put(&mut bytes, offset::VERSION, &VERSION.to_le_bytes());
        put(
            &mut bytes,
            offset::PAGE_SIZE,
            &(PAGE_SIZE as u32).to_le_bytes(),
        );
        put(&mut bytes, offset::RANGE, &self.range.to_le_bytes());
        put(&mut bytes, offset::DATA, &self.data.to_le_bytes());
        put(
            &mut bytes,
            offset::DATA_SIZE,
            &self.data_size().to_le_bytes(),
        );
        put(
            &mut bytes,
            offset::STRUCT_PAGE,
            &(STRUCT_PAGE_SIZE as u32).to_le_bytes(),
        );

        let checksum = checksum(&bytes).to_le_bytes();
        put(&mut bytes, offset::CHECKSUM, &checksum);
        bytes
    }
}

impl fmt::Display for Reserve {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "a disk of {} with {} of data from {} on",
            Size(self.range),
            Size(self.data_size()),
            Size(self.data)
        )
    }
}

/// Reads a copy of the header.
///
/// # Errors
///
/// What is wrong with it first, in the order of [`Fault`].
pub fn decode(bytes: &[u8; SIZE]) -> Result<Reserve, Fault> {
    let u32_at = |at| u32::from_le_bytes(array(bytes, at));
    let u64_at = |at| u64::from_le_bytes(array(bytes, at));

    let magic = u64_at(offset::MAGIC);
    if magic != MAGIC {
        return Err(Fault::Magic(magic));
    }
    let (found, computed) = (u32_at(offset::CHECKSUM), checksum(bytes));
    if found != computed {
        return Err(Fault::Checksum { found, computed });
    }
    let version = u32_at(offset::VERSION);
    if version != VERSION {
        return Err(Fault::Version(version));
    }
    let page_size = u32_at(offset::PAGE_SIZE);
    if u64::from(page_size) != PAGE_SIZE {
        return Err(Fault::PageSize(page_size));
    }
    let struct_page = u32_at(offset::STRUCT_PAGE);
    if u64::from(struct_page) != STRUCT_PAGE_SIZE {
        return Err(Fault::StructPage(struct_page));
    }

    let (range, data) = (u64_at(offset::RANGE), u64_at(offset::DATA));
    Reserve::of(range)
        .ok()
        .filter(|it| it.data == data && it.data_size() == u64_at(offset::DATA_SIZE))
        .ok_or(Fault::Layout { range, data })
}

/// The checksum of a header.
fn checksum(bytes: &[u8; SIZE]) -> u32 {
    crc32c(bytes.get(..offset::CHECKSUM).unwrap_or_default())
}

/// Why a copy of the header is not valid.
///
/// Displays as what is wrong with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It could not be read.
    Unreadable(Unreadable),
    /// It starts with something else: there is none.
    Magic(u64),
    /// Its checksum is wrong.
    Checksum {
        /// The one that it has.
        found: u32,
        /// The one of its bytes.
        computed: u32,
    },
    /// Its version is not known.
    Version(u32),
    /// Its pages have another size in bytes.
    PageSize(u32),
    /// Its struct pages have another size in bytes.
    StructPage(u32),
    /// It is not how a range of this size is divided.
    Layout {
        /// The bytes of the range.
        range: u64,
        /// The offset of the data.
        data: u64,
    },
}

impl Fault {
    /// Whether there is something that was once a header.
    const fn is_damage(&self) -> bool {
        !matches!(self, Self::Magic(_) | Self::Unreadable(_))
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Unreadable(error) => error.fmt(f),
            Self::Magic(0) => write!(f, "there is none"),
            Self::Magic(found) => write!(f, "there is none, but {found:#018x}"),
            Self::Checksum { found, computed } => write!(
                f,
                "its checksum is {found:#010x}, that of its bytes is {computed:#010x}"
            ),
            Self::Version(found) => write!(
                f,
                "its version is {found}, the one that is known is {VERSION}"
            ),
            Self::PageSize(found) => write!(
                f,
                "its pages have {found} bytes, those here have {PAGE_SIZE}"
            ),
            Self::StructPage(found) => write!(
                f,
                "its struct pages have {found} bytes, those that are known have {STRUCT_PAGE_SIZE}"
            ),
            Self::Layout { range, data } => write!(
                f,
                "a range of {} does not have its data from {} on",
                Size(range),
                Size(data)
            ),
        }
    }
}

impl core::error::Error for Fault {}

/// Which copy of the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The one in the first page.
    First,
    /// The one in the page after it.
    Second,
}

impl Place {
    /// Where it is, in bytes from the start of the range.
    const fn offset(self) -> u64 {
        match self {
            Self::First => 0,
            Self::Second => PAGE_SIZE,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::First => "first copy",
            Self::Second => "second copy",
        })
    }
}

/// Why a range is not used. Nothing was written to it.
///
/// Displays as what is wrong, and what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// There is no room for a reserve and data.
    TooSmall {
        /// The bytes of the range.
        range: u64,
    },
    /// The kernel's struct pages are larger than the room for them.
    StructPages {
        /// The bytes of each.
        size: u64,
    },
    /// There is a header, and struct pages are to be in RAM.
    HasHeader(Reserve),
    /// Something of a header is there, but nothing that is valid; or two that are, and differ.
    Damaged {
        /// What is wrong with the first copy, if it is not valid.
        first: Option<Fault>,
        /// What is wrong with the second one.
        second: Option<Fault>,
    },
    /// The header is that of a range of another size.
    Mismatch {
        /// What it says.
        found: Reserve,
        /// What it would say for this range.
        expected: Reserve,
    },
    /// There is no header, and the place of the reserve is not blank.
    NotBlank {
        /// The first byte that is not zero, from the start of the range.
        at: u64,
        /// What would be written.
        expected: Reserve,
    },
    /// There is no header, and the place of the reserve cannot be read.
    Unreadable(Unreadable),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::TooSmall { range } => write!(
                f,
                "{} are too few for pmem_memmap=dev, which needs at least {} for each disk; write \
                 ram, or ask for larger or fewer disks",
                Size(range),
                Size(3 * DISK_ALIGN)
            ),
            Self::StructPages { size } => write!(
                f,
                "struct pages of this kernel have {size} bytes, and pmem_memmap=dev has room for \
                 {STRUCT_PAGE_SIZE} each; load it in a kernel that is not built to debug memory"
            ),
            Self::HasHeader(reserve) => write!(
                f,
                "its header says {reserve}: its struct pages are on the range; load with \
                 pmem_memmap=dev; pmem_memmap=ram with pmem_memmap_force=1 destroys the header"
            ),
            Self::Damaged { first, second } => {
                write!(f, "no valid header (")?;
                for (place, fault) in [(Place::First, first), (Place::Second, second)] {
                    match fault {
                        Some(fault) => write!(f, "{place}: {fault}")?,
                        None => write!(f, "{place}: differs from the other")?,
                    }
                    if place == Place::First {
                        write!(f, "; ")?;
                    }
                }
                write!(
                    f,
                    "); pmem_memmap=ram with pmem_memmap_force=1 destroys what is left of it"
                )
            }
            Self::Mismatch { found, expected } => write!(
                f,
                "its header says {found}, but this is {expected}; give the pmem_start, pmem_size \
                 and pmem_count that it was made with; pmem_memmap=ram with pmem_memmap_force=1 \
                 destroys the header"
            ),
            Self::NotBlank { at, expected } => write!(
                f,
                "it has no header, and data at byte {at:#x}, where its struct pages would be; load \
                 with pmem_memmap=ram; to lose that data, blkdiscard -z -o 0 -l {} the disk then",
                expected.size()
            ),
            Self::Unreadable(error) => write!(
                f,
                "whether it has a header is not known: {error}; pmem_memmap=ram with \
                 pmem_memmap_force=1 overwrites it"
            ),
        }
    }
}

impl core::error::Error for Refusal {}

/// What there is at the start of a range.
enum Found {
    Nothing,
    Header {
        reserve: Reserve,
        repair: Option<(Place, Fault)>,
    },
    Refused(Refusal),
}

/// Looks for a header.
fn find(medium: &impl Medium) -> Found {
    let read = |place: Place| {
        let mut bytes = [0; SIZE];
        medium
            .read(place.offset(), &mut bytes)
            .map_err(Fault::Unreadable)
            .and_then(|()| decode(&bytes))
    };

    let (reserve, repair) = match (read(Place::First), read(Place::Second)) {
        (Ok(first), Ok(second)) if first == second => (first, None),
        (Ok(first), Err(fault)) => (first, Some((Place::Second, fault))),
        (Err(fault), Ok(second)) => (second, Some((Place::First, fault))),
        (Err(Fault::Unreadable(error)), Err(Fault::Unreadable(_))) => {
            return Found::Refused(Refusal::Unreadable(error))
        }
        (Err(first), Err(second)) if !first.is_damage() && !second.is_damage() => {
            return Found::Nothing
        }
        (first, second) => {
            return Found::Refused(Refusal::Damaged {
                first: first.err(),
                second: second.err(),
            })
        }
    };
    Found::Header { reserve, repair }
}

/// What must be written before a disk can come up whose struct pages are on its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// The header, as there is none and the reserve is blank.
    Header,
    /// One copy of it, for this reason.
    Copy(Place, Fault),
}

/// Checks a range whose struct pages are to be on itself: the reserve, and what is to be written.
///
/// `medium` has at least all of the reserve of a range of `range` bytes; `struct_page` is the size of
/// the kernel's.
///
/// # Errors
///
/// All [`Refusal`]s but [`Refusal::HasHeader`].
pub fn check_dev(
    medium: &impl Medium,
    range: u64,
    struct_page: u64,
) -> Result<(Reserve, Option<Write>), Refusal> {
    let expected = Reserve::of(range)?;
    if struct_page > STRUCT_PAGE_SIZE {
        return Err(Refusal::StructPages { size: struct_page });
    }
    match find(medium) {
        Found::Refused(refusal) => Err(refusal),
        Found::Header { reserve, .. } if reserve != expected => Err(Refusal::Mismatch {
            found: reserve,
            expected,
        }),
        Found::Header { repair, .. } => Ok((
            expected,
            repair.map(|(place, fault)| Write::Copy(place, fault)),
        )),
        Found::Nothing => {
            blank(medium, &expected)?;
            Ok((expected, Some(Write::Header)))
        }
    }
}

/// Refuses a reserve that is not blank, but for what an interrupted [`write`] left.
fn blank(medium: &impl Medium, expected: &Reserve) -> Result<(), Refusal> {
    const CHUNK: usize = 1024;

    let header = expected.encode();
    let is_header = |at: u64, granule: &[u8]| {
        usize::try_from(at % PAGE_SIZE)
            .ok()
            .filter(|_| at < HEADERS)
            .and_then(|at| header.get(at..)?.get(..GRANULE))
            .is_some_and(|header| header == granule)
    };
    let mut bytes = [0; CHUNK];
    for start in (0..expected.size()).step_by(CHUNK) {
        medium
            .read(start, &mut bytes)
            .map_err(Refusal::Unreadable)?;
        if bytes == [0; CHUNK] {
            continue;
        }
        for (i, granule) in bytes.chunks(GRANULE).enumerate() {
            // Both are less than the size of the reserve.
            let at = start.wrapping_add((i as u64).wrapping_mul(GRANULE as u64));
            if granule != [0; GRANULE] && !is_header(at, granule) {
                let skip = granule.iter().take_while(|&&byte| byte == 0).count();
                return Err(Refusal::NotBlank {
                    at: at.wrapping_add(skip as u64),
                    expected: *expected,
                });
            }
        }
    }
    Ok(())
}

/// Why the place of the header is to be [erased](erase).
///
/// Displays as what is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Erase(Refusal);

impl fmt::Display for Erase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Refusal::HasHeader(reserve) => write!(
                f,
                "the header of {reserve} is destroyed, as pmem_memmap_force says; that data is now \
                 from byte {} of the disk on",
                reserve.size()
            ),
            Refusal::Unreadable(error) => write!(
                f,
                "{error}; its first {} are zeroed, as pmem_memmap_force says",
                Size(HEADERS)
            ),
            _ => write!(
                f,
                "what is left of its header is destroyed, as pmem_memmap_force says"
            ),
        }
    }
}

/// Checks a range whose struct pages are to be in RAM, or that is to have none. `medium` has at least
/// its first [`HEADERS`] bytes.
///
/// With `force`, what it would be refused for is to be erased.
///
/// # Errors
///
/// [`Refusal::HasHeader`], [`Refusal::Damaged`], or [`Refusal::Unreadable`] if neither copy can be
/// read.
pub fn check_ram(medium: &impl Medium, force: bool) -> Result<Option<Erase>, Refusal> {
    let refusal = match find(medium) {
        Found::Nothing => return Ok(None),
        Found::Header { reserve, .. } => Refusal::HasHeader(reserve),
        Found::Refused(refusal) => refusal,
    };

    if force {
        Ok(Some(Erase(refusal)))
    } else {
        Err(refusal)
    }
}

/// Writes what [`check_dev`] asked for. It is durable on return.
///
/// Returns `false`, and writes nothing, if `medium` has less than [`HEADERS`] bytes.
#[must_use]
pub fn write<M: Machine>(
    persist: &Persist<M>,
    medium: VolatileSlice<'_>,
    reserve: &Reserve,
    what: Write,
) -> bool {
    let page = |place: Place| medium.range(place.offset(), PAGE_SIZE);
    let (Some(first), Some(second)) = (page(Place::First), page(Place::Second)) else {
        return false;
    };

    match what {
        Write::Header => {
            create(persist, second, reserve);
            create(persist, first, reserve);
        }
        Write::Copy(Place::First, _) => create(persist, first, reserve),
        Write::Copy(Place::Second, _) => create(persist, second, reserve),
    }
    true
}

/// Writes a copy: the magic comes when all else is there, so that a power loss leaves all of it, or
/// none.
fn create<M: Machine>(persist: &Persist<M>, page: VolatileSlice<'_>, reserve: &Reserve) {
    let mut bytes = reserve.encode();
    let magic: [u8; GRANULE] = array(&bytes, offset::MAGIC);

    // One that is damaged must not count before it is whole.
    persist.write_bytes(page, &[0; GRANULE]);
    persist.fence();
    put(&mut bytes, offset::MAGIC, &[0; GRANULE]);
    persist.write_bytes(page, &bytes);
    if let Some((_, rest)) = page.split_at(SIZE) {
        persist.write_zeroes(rest);
    }
    persist.fence();
    persist.write_bytes(page, &magic);
    persist.fence();
}

/// Zeroes both copies of the header. It is durable on return.
///
/// A power loss meanwhile leaves a header, or what is left of one, or none.
///
/// Returns `false`, and writes nothing, if `medium` has less than [`HEADERS`] bytes.
#[must_use]
pub fn erase<M: Machine>(persist: &Persist<M>, medium: VolatileSlice<'_>) -> bool {
    let Some(headers) = medium.range(0, HEADERS) else {
        return false;
    };

    persist.write_zeroes(headers);
    persist.fence();
    true
}

#[cfg_attr(CONFIG_RUST, kernel::macros::kunit_tests(pmem_reserve))]
#[cfg(any(test, CONFIG_KUNIT = "y"))]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    #[test]
    fn sizes() {
        let of = |range| {
            Reserve::of(range)
                .map(|it| (it.size(), it.data_size()))
                .ok()
        };

        assert_eq!(of(0), None);
        assert_eq!(of(4 * MIB), None);
        assert_eq!(of(6 * MIB), Some((4 * MIB, 2 * MIB)));
        assert_eq!(of(6 * MIB + 4096), None);
        assert_eq!(of(128 * MIB), Some((4 * MIB, 124 * MIB)));
        assert_eq!(of(130 * MIB), Some((6 * MIB, 124 * MIB)));
        assert_eq!(of(GIB), Some((18 * MIB, 1006 * MIB)));
        assert_eq!(of(64 * GIB), Some((1026 * MIB, 64 * GIB - 1026 * MIB)));
        assert!(of(!(DISK_ALIGN - 1)).is_some());
        assert_eq!(of(u64::MAX), None);
    }

    #[test]
    fn bytes_on_the_medium() -> Result<(), Refusal> {
        let reserve = Reserve::of(GIB)?;
        let bytes = reserve.encode();

        assert_eq!(array(&bytes, 0), *b"PMEMRSRV");
        assert_eq!(array(&bytes, 8), [1, 0, 0, 0, 0, 16, 0, 0]);
        assert_eq!(array(&bytes, 16), (1u64 << 30).to_le_bytes());
        assert_eq!(array(&bytes, 24), (18u64 << 20).to_le_bytes());
        assert_eq!(array(&bytes, 32), (1006u64 << 20).to_le_bytes());
        assert_eq!(array(&bytes, 40), [64, 0, 0, 0]);
        assert_eq!(array(&bytes, 44), [0; 80]);
        assert_eq!(decode(&bytes), Ok(reserve));
        Ok(())
    }

    #[test]
    fn faults() -> Result<(), Refusal> {
        let header = Reserve::of(GIB)?.encode();
        // Changes bytes; with the right checksum afterwards, or as it was.
        let changed = |at, value: &[u8], seal: bool| {
            let mut bytes = header;
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
            changed(60, b"X", false),
            Err(Fault::Checksum { .. })
        ));
        assert_eq!(changed(8, &[2], true), Err(Fault::Version(2)));
        assert_eq!(changed(13, &[32], true), Err(Fault::PageSize(8192)));
        assert_eq!(changed(40, &[80], true), Err(Fault::StructPage(80)));
        for (at, value) in [(16, 1), (26, 0x40), (34, 1), (23, 0xff)] {
            assert!(matches!(
                changed(at, &[value], true),
                Err(Fault::Layout { .. })
            ));
        }
        Ok(())
    }
}
