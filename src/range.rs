// SPDX-License-Identifier: GPL-2.0-only

//! Ranges of physical addresses: their overflow, overlap and alignment, and their split into disks.

use super::size::Size;
use core::fmt;

/// What the start of a disk is aligned to, and what its size is a multiple of, in bytes.
///
/// It is the size of a huge page (PMD), so that file systems can map huge pages of the disk, and of
/// a subsection (`SUBSECTION_SIZE`, `include/linux/mmzone.h`), which is what `memremap_pages()`
/// takes.
pub const DISK_ALIGN: u64 = 2 << 20;

/// Why a range, or a split of it, is refused.
///
/// Displays as what is wrong and what would be right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The size is zero.
    Empty {
        /// The address at which nothing starts.
        start: u64,
    },
    /// The range goes beyond the last 64-bit address.
    Wraps {
        /// The first address.
        start: u64,
        /// The size in bytes.
        size: u64,
    },
    /// A split into no disks.
    ZeroCount,
    /// The start is not a multiple of [`DISK_ALIGN`].
    Misaligned {
        /// The range.
        range: PhysRange,
        /// The largest range inside of it that can be split into as many disks with nothing left
        /// over, if there is one.
        nearest: Option<PhysRange>,
    },
    /// The disks would have size zero.
    TooSmall {
        /// The range.
        range: PhysRange,
        /// The number of disks that was asked for.
        count: u32,
        /// The most disks that it can be split into.
        largest: u32,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let align = Size(DISK_ALIGN);

        match *self {
            Self::Empty { start } => {
                write!(f, "size 0 at {start:#x}; a disk needs at least {align}")
            }
            Self::Wraps { start, size } => write!(
                f,
                "start {start:#x} with size {} goes beyond the last address; \
                 check both against the memory map",
                Size(size)
            ),
            Self::ZeroCount => write!(f, "0 disks; ask for 1 or more"),
            Self::Misaligned { range, nearest } => {
                write!(f, "start {:#x} is not {align} aligned; ", range.start)?;
                match nearest {
                    Some(range) => write!(
                        f,
                        "nearest range that works: pmem_start={:#x} pmem_size={}",
                        range.start,
                        Size(range.size)
                    ),
                    None => write!(f, "no part of {range} works; reserve a larger range"),
                }
            }
            Self::TooSmall {
                range,
                count,
                largest: 0,
            } => write!(
                f,
                "{range} of {} is too small for {count} disks; a disk needs at least {align}",
                Size(range.size)
            ),
            Self::TooSmall {
                range,
                count,
                largest,
            } => write!(
                f,
                "{range} of {} is too small for {count} disks of at least {align}; \
                 the most is {largest}",
                Size(range.size)
            ),
        }
    }
}

impl core::error::Error for Error {}

/// A range of physical addresses.
///
/// Displays as the kernel's `%pR` prints a resource.
///
/// # Invariants
///
/// `size` is not zero, and `start + (size - 1)` is at most [`u64::MAX`].
///
/// # Examples
///
/// ```
/// use pmem_core::range::PhysRange;
///
/// let range = PhysRange::new(4 << 30, 2 << 30)?;
/// assert_eq!(range.last(), 0x17fffffff);
/// assert_eq!(range.to_string(), "[mem 0x100000000-0x17fffffff]");
/// # Ok::<(), pmem_core::range::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PhysRange {
    start: u64,
    size: u64,
}

impl PhysRange {
    /// The `size` bytes from `start`.
    ///
    /// # Errors
    ///
    /// [`Error::Empty`] if there are none, [`Error::Wraps`] if there are not as many addresses.
    pub const fn new(start: u64, size: u64) -> Result<Self, Error> {
        let Some(beyond) = size.checked_sub(1) else {
            return Err(Error::Empty { start });
        };
        if start.checked_add(beyond).is_none() {
            return Err(Error::Wraps { start, size });
        }

        // INVARIANT: Both were just checked.
        Ok(Self { start, size })
    }

    /// The first address.
    pub const fn start(&self) -> u64 {
        self.start
    }

    /// The size in bytes, never zero.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// The last address, inclusive.
    pub const fn last(&self) -> u64 {
        // By the invariants, this does not wrap.
        self.start.wrapping_add(self.size.wrapping_sub(1))
    }

    /// Whether there is an address in both.
    pub const fn overlaps(&self, other: &Self) -> bool {
        self.start <= other.last() && other.start <= self.last()
    }
}

impl fmt::Display for PhysRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[mem {:#010x}-{:#010x}]", self.start, self.last())
    }
}

/// A range split evenly into disks.
///
/// # Invariants
///
/// - `count` and `disk_size` are not zero.
/// - The start of `range` and `disk_size` are multiples of [`DISK_ALIGN`].
/// - `count * disk_size + left_over` is the size of `range`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Split {
    range: PhysRange,
    count: u32,
    disk_size: u64,
    left_over: u64,
}

/// Splits `range` evenly into `count` disks.
///
/// Each disk starts at a multiple of [`DISK_ALIGN`], and all have the same size, which is a
/// multiple of it, too. What is [left over](Split::left_over) is at the end.
///
/// # Errors
///
/// [`Error::ZeroCount`], [`Error::Misaligned`] or [`Error::TooSmall`], in this order.
///
/// # Examples
///
/// ```
/// use pmem_core::range::{split, PhysRange};
///
/// let disks = split(PhysRange::new(4 << 30, 2 << 30)?, 3)?;
/// assert_eq!(disks.disk_size(), 682 << 20);
/// assert_eq!(disks.left_over(), 2 << 20);
/// assert!(disks.disks().all(|disk| disk.start() % (2 << 20) == 0));
///
/// let error = split(PhysRange::new((4 << 30) + 4096, 2 << 30)?, 1).unwrap_err();
/// assert_eq!(
///     error.to_string(),
///     "start 0x100001000 is not 2MiB aligned; \
///      nearest range that works: pmem_start=0x100200000 pmem_size=2046MiB"
/// );
/// # Ok::<(), pmem_core::range::Error>(())
/// ```
pub fn split(range: PhysRange, count: u32) -> Result<Split, Error> {
    // The size of a disk and what is left over of `bytes`, none of which can overflow.
    let share = |bytes: u64| {
        let step = u64::from(count) * DISK_ALIGN;
        let size = bytes.checked_div(step)?.checked_mul(DISK_ALIGN)?;
        Some((size, bytes % step))
    };

    let Some((disk_size, left_over)) = share(range.size) else {
        return Err(Error::ZeroCount);
    };
    if range.start % DISK_ALIGN != 0 {
        let nearest = || {
            let start = range.start.checked_next_multiple_of(DISK_ALIGN)?;
            let room = range.size.checked_sub(start.checked_sub(range.start)?)?;
            let (_, left_over) = share(room)?;
            PhysRange::new(start, room.checked_sub(left_over)?).ok()
        };
        return Err(Error::Misaligned {
            range,
            nearest: nearest(),
        });
    }
    if disk_size == 0 {
        return Err(Error::TooSmall {
            range,
            count,
            // It is less than `count`, so it fits.
            largest: u32::try_from(range.size / DISK_ALIGN).unwrap_or(count),
        });
    }

    // INVARIANT: `count` is not zero, as it has a share, and the others were just checked.
    Ok(Split {
        range,
        count,
        disk_size,
        left_over,
    })
}

impl Split {
    /// The number of disks, never zero.
    pub const fn count(&self) -> u32 {
        self.count
    }

    /// The size of each disk in bytes, never zero, and a multiple of [`DISK_ALIGN`].
    pub const fn disk_size(&self) -> u64 {
        self.disk_size
    }

    /// How many bytes at the end of the range belong to no disk.
    pub const fn left_over(&self) -> u64 {
        self.left_over
    }

    /// The range of the disk of this index, from 0, or [`None`] if there are not as many.
    pub fn get(&self, index: u32) -> Option<PhysRange> {
        if index >= self.count {
            return None;
        }

        // By the invariants, this does not fail, and the disk is a part of the range.
        let offset = u64::from(index).checked_mul(self.disk_size)?;
        PhysRange::new(self.range.start.checked_add(offset)?, self.disk_size).ok()
    }

    /// The ranges of the disks, in ascending order.
    pub fn disks(&self) -> impl Iterator<Item = PhysRange> {
        let split = *self;

        (0..split.count).filter_map(move |index| split.get(index))
    }
}

#[cfg_attr(CONFIG_RUST, kernel::macros::kunit_tests(pmem_range))]
#[cfg(any(test, CONFIG_KUNIT = "y"))]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    #[test]
    fn boundaries() -> Result<(), Error> {
        assert_eq!(PhysRange::new(5, 0), Err(Error::Empty { start: 5 }));
        assert_eq!(PhysRange::new(u64::MAX, 1)?.last(), u64::MAX);
        assert_eq!(PhysRange::new(0, u64::MAX)?.last(), u64::MAX - 1);
        assert_eq!(PhysRange::new(1, u64::MAX)?.last(), u64::MAX);
        for (start, size) in [(2, u64::MAX), (u64::MAX, 2), (u64::MAX, u64::MAX)] {
            assert_eq!(
                PhysRange::new(start, size),
                Err(Error::Wraps { start, size })
            );
        }
        Ok(())
    }

    #[test]
    fn overlap() -> Result<(), Error> {
        let a = PhysRange::new(4 * GIB, 2 * GIB)?;

        assert!(a.overlaps(&a));
        assert!(a.overlaps(&PhysRange::new(6 * GIB - 1, 1)?));
        assert!(a.overlaps(&PhysRange::new(0, 4 * GIB + 1)?));
        assert!(a.overlaps(&PhysRange::new(0, u64::MAX)?));
        assert!(!a.overlaps(&PhysRange::new(6 * GIB, GIB)?));
        assert!(!a.overlaps(&PhysRange::new(0, 4 * GIB)?));
        Ok(())
    }

    #[test]
    fn even_split() -> Result<(), Error> {
        // Size in MiB, count, size of a disk in MiB, left over in MiB.
        const SPLITS: [(u64, u32, u64, u64); 6] = [
            (2048, 1, 2048, 0),
            (2048, 2, 1024, 0),
            (2048, 7, 292, 4),
            (2047, 1, 2046, 1),
            (2, 1, 2, 0),
            (15, 7, 2, 1),
        ];

        for (size, count, disk_size, left_over) in SPLITS {
            let disks = split(PhysRange::new(4 * GIB, size * MIB)?, count)?;

            assert_eq!(disks.disk_size(), disk_size * MIB);
            assert_eq!(disks.left_over(), left_over * MIB);
            assert_eq!(disks.disks().count(), count as usize);
            assert_eq!(disks.get(count), None);
            let mut start = 4 * GIB;
            for disk in disks.disks() {
                assert_eq!(disk, PhysRange::new(start, disk_size * MIB)?);
                start += disk_size * MIB;
            }
        }
        Ok(())
    }

    #[test]
    fn split_refused() -> Result<(), Error> {
        let range = PhysRange::new(4 * GIB, 13 * MIB)?;
        assert_eq!(split(range, 0), Err(Error::ZeroCount));
        assert_eq!(
            split(range, 7),
            Err(Error::TooSmall {
                range,
                count: 7,
                largest: 6
            })
        );

        let range = PhysRange::new(4 * GIB + MIB, 12 * MIB)?;
        let nearest = PhysRange::new(4 * GIB + 2 * MIB, 8 * MIB).ok();
        assert_eq!(split(range, 2), Err(Error::Misaligned { range, nearest }));
        assert_eq!(
            split(range, 6),
            Err(Error::Misaligned {
                range,
                nearest: None
            })
        );

        // There is no aligned address after it.
        let range = PhysRange::new(u64::MAX, 1)?;
        let nearest = None;
        assert_eq!(split(range, 1), Err(Error::Misaligned { range, nearest }));
        Ok(())
    }
}
