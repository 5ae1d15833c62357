// SPDX-License-Identifier: GPL-2.0-only

//! The parameters that say which reserved ranges to use, as an administrator writes them.
//!
//! | parameter    | one element for each range          | default |
//! |--------------|-------------------------------------|---------|
//! | `pmem_start` | address of its first byte           | none    |
//! | `pmem_size`  | its length                          | none    |
//! | `pmem_count` | how many disks it is split into     | 1       |
//! | `pmem_lbs`   | (one for all) logical block size    | 512     |
//! | `pmem_first` | (one for all) number of first disk  | 0       |
//!
//! A `pmem_count` of one element counts for each range.

use super::{
    range::{self, PhysRange, Split},
    size,
};
use core::fmt;

/// The values of the parameters.
#[derive(Clone, Copy, Debug)]
pub struct Params<'a> {
    /// `pmem_start`.
    pub start: &'a str,
    /// `pmem_size`.
    pub size: &'a str,
    /// `pmem_count`.
    pub count: &'a str,
    /// `pmem_lbs`.
    pub lbs: &'a str,
    /// `pmem_first`.
    pub first: &'a str,
}

/// Why the parameters are refused.
///
/// Displays as the parameter with its value, what is wrong with it, and what would be right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error<'a> {
    /// No range is given.
    NoRange,
    /// An element is not a size or a number.
    Number {
        /// The parameter's name.
        param: &'static str,
        /// The element.
        value: &'a str,
        /// What is wrong with it.
        error: size::Error,
    },
    /// Two lists are not of one length.
    Length {
        /// The parameter's name.
        param: &'static str,
        /// How many elements it has.
        elements: usize,
        /// How many ranges `pmem_start` gives.
        ranges: usize,
    },
    /// A range, or its split into disks, is impossible.
    Range {
        /// Element of `pmem_start`.
        start: &'a str,
        /// Element of `pmem_size`.
        size: &'a str,
        /// Element of `pmem_count`.
        count: &'a str,
        /// What is wrong with it.
        error: range::Error,
    },
    /// Two ranges have addresses in common.
    Overlap(PhysRange, PhysRange),
    /// The logical block size is not one that is offered.
    LogicalBlockSize(&'a str),
    /// There are more disks than numbers for them.
    TooManyDisks,
}

impl fmt::Display for Error<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NoRange => write!(
                f,
                "no range is given; reserve one with memmap= and name it, for example \
                 pmem_start=4G pmem_size=2GiB"
            ),
            Self::Number {
                param,
                value,
                error,
            } => write!(f, "{param}={}: {error}", value.escape_default()),
            Self::Length {
                param,
                elements,
                ranges,
            } => write!(
                f,
                "{param} has {elements} element(s), but pmem_start gives {ranges} range(s); \
                 write one for each, separated by commas"
            ),
            Self::Range {
                start,
                size,
                count,
                error,
            } => write!(
                f,
                "pmem_start={} pmem_size={} pmem_count={}: {error}",
                start.trim_end(),
                size.trim_end(),
                count.trim_end()
            ),
            Self::Overlap(one, other) => write!(
                f,
                "ranges {one} and {other} overlap; change pmem_start or pmem_size"
            ),
            Self::LogicalBlockSize(value) => write!(
                f,
                "pmem_lbs={}: not a logical block size that is offered; write 512 or 4096",
                value.escape_default()
            ),
            Self::TooManyDisks => write!(
                f,
                "pmem_first plus all of pmem_count is more than {}; lower one of them",
                u32::MAX
            ),
        }
    }
}

impl core::error::Error for Error<'_> {}

/// Parameters that were found to be in order.
///
/// # Invariants
///
/// `ranges` of the same parameters gives no error; no two ranges overlap; the numbers of the disks
/// fit in 32 bits.
#[derive(Clone, Copy, Debug)]
pub struct Config<'a> {
    params: Params<'a>,
    logical_block_size: u32,
    first: u32,
}

impl<'a> Config<'a> {
    /// Checks the parameters.
    ///
    /// # Errors
    ///
    /// The first fault, see [`Error`].
    ///
    /// # Examples
    ///
    /// ```
    /// use pmem_core::memmap::{Config, Params};
    ///
    /// let params = Params {
    ///     start: "4G,16G",
    ///     size: "2GiB,8GiB",
    ///     count: "1,4",
    ///     lbs: "512",
    ///     first: "0",
    /// };
    /// let disks: u32 = Config::new(params)?.ranges().map(|(_, split)| split.count()).sum();
    /// assert_eq!(disks, 5);
    ///
    /// let error = Config::new(Params { size: "2GiB", ..params }).unwrap_err();
    /// assert_eq!(
    ///     error.to_string(),
    ///     "pmem_size has 1 element(s), but pmem_start gives 2 range(s); \
    ///      write one for each, separated by commas"
    /// );
    /// # Ok::<(), pmem_core::memmap::Error<'_>>(())
    /// ```
    pub fn new(params: Params<'a>) -> Result<Self, Error<'a>> {
        if params.start.trim_end().is_empty() && params.size.trim_end().is_empty() {
            return Err(Error::NoRange);
        }

        let logical_block_size = match size::parse(params.lbs) {
            Ok(512) => 512,
            Ok(4096) => 4096,
            _ => return Err(Error::LogicalBlockSize(params.lbs)),
        };
        let first = size::parse_count(params.first).map_err(|error| Error::Number {
            param: "pmem_first",
            value: params.first,
            error,
        })?;

        let lengths = |list| size::list(list).count();
        let ranges = lengths(params.start);
        for (param, elements) in [
            ("pmem_size", lengths(params.size)),
            ("pmem_count", lengths(params.count)),
        ] {
            let one_for_all = param == "pmem_count" && elements == 1;
            if elements != ranges && !one_for_all {
                return Err(Error::Length {
                    param,
                    elements,
                    ranges,
                });
            }
        }

        let mut disks = first;
        for (i, item) in parse(params).enumerate() {
            let (range, split) = item?;
            for (other, _) in parse(params).take(i).flatten() {
                if range.overlaps(&other) {
                    return Err(Error::Overlap(other, range));
                }
            }
            disks = disks
                .checked_add(split.count())
                .ok_or(Error::TooManyDisks)?;
        }

        // INVARIANT: All of it was just checked.
        Ok(Config {
            params,
            logical_block_size,
            first,
        })
    }

    /// The ranges, in the order of the parameters, and how each is split into disks.
    pub fn ranges(&self) -> impl Iterator<Item = (PhysRange, Split)> + 'a {
        parse(self.params).flatten()
    }

    /// Logical block size of the disks in bytes, 512 or 4096.
    pub fn logical_block_size(&self) -> u32 {
        self.logical_block_size
    }

    /// The number of the first disk; the others follow.
    pub fn first(&self) -> u32 {
        self.first
    }
}

/// The elements of a list, or its only one again and again.
pub(super) fn one_or_each(list: &str) -> impl Iterator<Item = &str> {
    let mut elements = size::list(list);
    let one_for_all = match (elements.next(), elements.next()) {
        (Some(element), None) => Some(element),
        _ => None,
    };

    size::list(list).chain(core::iter::from_fn(move || one_for_all))
}

/// Reads the lists, which are of one length, element by element.
fn parse<'a>(
    params: Params<'a>,
) -> impl Iterator<Item = Result<(PhysRange, Split), Error<'a>>> + 'a {
    size::list(params.start)
        .zip(size::list(params.size))
        .zip(one_or_each(params.count))
        .map(|((start, size), count)| {
            let bytes = |param, value| {
                size::parse(value).map_err(|error| Error::Number {
                    param,
                    value,
                    error,
                })
            };
            let disks = size::parse_count(count).map_err(|error| Error::Number {
                param: "pmem_count",
                value: count,
                error,
            });
            let first = bytes("pmem_start", start)?;
            let len = bytes("pmem_size", size)?;
            let disks = disks?;

            PhysRange::new(first, len)
                .and_then(|range| Ok((range, range::split(range, disks)?)))
                .map_err(|error| Error::Range {
                    start,
                    size,
                    count,
                    error,
                })
        })
}

#[cfg_attr(CONFIG_RUST, kernel::macros::kunit_tests(pmem_memmap))]
#[cfg(any(test, CONFIG_KUNIT = "y"))]
mod tests {
    use super::*;

    const GOOD: Params<'_> = Params {
        start: "4G",
        size: "2GiB",
        count: "1",
        lbs: "512",
        first: "0",
    };

    fn disks(params: Params<'_>) -> Option<u64> {
        Some(
            Config::new(params)
                .ok()?
                .ranges()
                .map(|(_, split)| u64::from(split.count()))
                .sum(),
        )
    }

    #[test]
    fn counts_for_each_range_or_for_all() {
        let two = Params {
            start: "4G,16G",
            size: "2G,8G",
            ..GOOD
        };
        assert_eq!(disks(GOOD), Some(1));
        assert_eq!(disks(Params { count: "7", ..GOOD }), Some(7));
        assert_eq!(disks(Params { count: "3", ..two }), Some(6));
        assert_eq!(
            disks(Params {
                count: "1,4",
                ..two
            }),
            Some(5)
        );
        assert_eq!(
            disks(Params {
                count: "1,4,1",
                ..two
            }),
            None
        );
        assert_eq!(
            disks(Params {
                count: "1,4",
                ..GOOD
            }),
            None
        );
    }

    #[test]
    fn faults_name_the_parameter() {
        let number = |param, value, error| {
            Some(Error::Number {
                param,
                value,
                error,
            })
        };
        let fault = |params| Config::new(params).err();
        assert_eq!(
            fault(Params {
                start: "",
                size: "\n",
                ..GOOD
            }),
            Some(Error::NoRange)
        );
        assert_eq!(
            fault(Params { start: "", ..GOOD }),
            number("pmem_start", "", size::Error::Empty)
        );
        assert_eq!(
            fault(Params { size: "", ..GOOD }),
            number("pmem_size", "", size::Error::Empty)
        );
        assert!(matches!(
            fault(Params { count: "", ..GOOD }),
            Some(Error::Number {
                param: "pmem_count",
                value: "",
                ..
            })
        ));
        assert_eq!(
            fault(Params {
                lbs: "1000",
                ..GOOD
            }),
            Some(Error::LogicalBlockSize("1000"))
        );
        assert_eq!(
            fault(Params {
                first: "0xffffffff",
                ..GOOD
            }),
            Some(Error::TooManyDisks)
        );
    }

    #[test]
    fn ranges_do_not_overlap() {
        let touching = Params {
            start: "6G,4G",
            size: "2G,2G",
            ..GOOD
        };
        assert_eq!(disks(touching), Some(2));
        assert_eq!(
            disks(Params {
                size: "2G,2050M",
                ..touching
            }),
            None
        );
    }
}
