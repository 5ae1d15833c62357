// SPDX-License-Identifier: GPL-2.0-only

//! The parameters of ranges that are memory and storage at once, as an administrator writes them.
//!
//! | parameter           | one element for each range               | default |
//! |---------------------|------------------------------------------|---------|
//! | `kmem_start`        | address of its first byte                | none    |
//! | `kmem_size`         | its length                               | none    |
//! | `kmem_format`       | `none` or `blk` if it is to be formatted | none    |
//! | `kmem_format_force` | (one for all) whether data may be lost   | 0       |
//! | `kmem_atomic`       | (one for all) whether a block is written in full or not at all | 1 |
//! | `kmem_scrub`        | (one for all) whether RAM is zeroed when it is given up | 0 |
//! | `kmem_dax`          | (one for all) whether device-dax instances are taken | 0 |
//!
//! A `kmem_format` of one element counts for each range. What a range has to be aligned to is up to
//! the kernel.

use super::{
    super::{
        memmap::one_or_each,
        range::{
            self,
            PhysRange, //
        },
        size, //
    },
    superblock::Format, //
};
use core::fmt;

/// The values of the parameters.
#[derive(Clone, Copy, Debug)]
pub struct Params<'a> {
    /// `kmem_start`.
    pub start: &'a str,
    /// `kmem_size`.
    pub size: &'a str,
    /// `kmem_format`.
    pub format: &'a str,
    /// `kmem_format_force`.
    pub force: &'a str,
    /// `kmem_atomic`.
    pub atomic: &'a str,
    /// `kmem_scrub`.
    pub scrub: &'a str,
    /// `kmem_dax`.
    pub dax: &'a str,
}

/// Why the parameters are refused.
///
/// Displays as the parameter with its value, what is wrong with it, and what would be right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error<'a> {
    /// An element is not a size.
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
        /// How many ranges `kmem_start` gives.
        ranges: usize,
    },
    /// Data may be lost for a format, but none is given.
    Force,
    /// A range has no bytes.
    Empty {
        /// Element of `kmem_start`.
        start: &'a str,
        /// Element of `kmem_size`.
        size: &'a str,
    },
    /// A range is impossible.
    Range {
        /// Element of `kmem_start`.
        start: &'a str,
        /// Element of `kmem_size`.
        size: &'a str,
        /// What is wrong with it.
        error: range::Error,
    },
    /// Two ranges have addresses in common.
    Overlap(PhysRange, PhysRange),
    /// An element of `kmem_format` is no format.
    Format(&'a str),
    /// A parameter is neither true nor false.
    Bool {
        /// The parameter's name.
        param: &'static str,
        /// Its value.
        value: &'a str,
    },
}

impl fmt::Display for Error<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
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
                "{param} has {elements} element(s), but kmem_start gives {ranges} range(s); \
                 write one for each, separated by commas"
            ),
            Self::Force => write!(
                f,
                "kmem_format_force=1 without a kmem_format; write kmem_format=none or \
                 kmem_format=blk to lose what is on the ranges, or leave it out"
            ),
            Self::Empty { start, size } => write!(
                f,
                "kmem_start={} kmem_size={}: size 0; name the size that is reserved",
                start.trim_end(),
                size.trim_end()
            ),
            Self::Range { start, size, error } => write!(
                f,
                "kmem_start={} kmem_size={}: {error}",
                start.trim_end(),
                size.trim_end()
            ),
            Self::Overlap(one, other) => write!(
                f,
                "ranges {one} and {other} overlap; change kmem_start or kmem_size"
            ),
            Self::Format(value) => write!(
                f,
                "kmem_format={}: not a format; write none or blk, or nothing to use what is there",
                value.escape_default()
            ),
            Self::Bool { param, value } => write!(
                f,
                "{param}={}: neither true nor false; write 1 or 0",
                value.escape_default()
            ),
        }
    }
}

impl core::error::Error for Error<'_> {}

/// Parameters that were found to be in order.
///
/// # Invariants
///
/// `parse` of the same parameters gives no error; no two ranges overlap.
#[derive(Clone, Copy, Debug)]
pub struct Config<'a> {
    params: Params<'a>,
    force: bool,
    atomic: bool,
    scrub: bool,
    dax: bool,
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
    /// use pmem_core::kmem::params::{Config, Params};
    ///
    /// let params = Params {
    ///     start: "4G,16G",
    ///     size: "2GiB,8GiB",
    ///     format: "blk",
    ///     force: "0",
    ///     atomic: "1",
    ///     scrub: "0",
    ///     dax: "0",
    /// };
    /// assert_eq!(Config::new(params)?.ranges().count(), 2);
    ///
    /// let error = Config::new(Params { format: "ext4", ..params }).unwrap_err();
    /// assert_eq!(
    ///     error.to_string(),
    ///     "kmem_format=ext4: not a format; write none or blk, or nothing to use what is there"
    /// );
    /// # Ok::<(), pmem_core::kmem::params::Error<'_>>(())
    /// ```
    pub fn new(params: Params<'a>) -> Result<Self, Error<'a>> {
        let force = flag("kmem_format_force", params.force)?;
        let atomic = flag("kmem_atomic", params.atomic)?;
        let scrub = flag("kmem_scrub", params.scrub)?;
        let dax = flag("kmem_dax", params.dax)?;
        let mut is_given = false;
        for name in size::list(params.format) {
            is_given |= format(name)?.is_some();
        }
        if force && !is_given {
            return Err(Error::Force);
        }

        let nothing = is_nothing(&params);
        let lengths = |list| if nothing { 0 } else { size::list(list).count() };
        let ranges = lengths(params.start);
        for (param, elements) in [
            ("kmem_size", lengths(params.size)),
            ("kmem_format", size::list(params.format).count()),
        ] {
            let one_for_all = param == "kmem_format" && elements == 1;
            if elements != ranges && !one_for_all {
                return Err(Error::Length {
                    param,
                    elements,
                    ranges,
                });
            }
        }

        for (i, item) in parse(params).enumerate() {
            let (range, _) = item?;
            for (other, _) in parse(params).take(i).flatten() {
                if range.overlaps(&other) {
                    return Err(Error::Overlap(other, range));
                }
            }
        }

        // INVARIANT: All of it was just checked.
        Ok(Config {
            params,
            force,
            atomic,
            scrub,
            dax,
        })
    }

    /// Whether nothing is to be memory and storage at once.
    pub fn is_empty(&self) -> bool {
        is_nothing(&self.params) && !self.dax
    }

    /// Whether device-dax instances are taken that are bound to the driver.
    pub fn dax(&self) -> bool {
        self.dax
    }

    /// How an instance is to be formatted, if it is: as all ranges are.
    pub fn instance_format(&self) -> Option<Format> {
        let mut formats = size::list(self.params.format);
        match (formats.next(), formats.next()) {
            (Some(one), None) => format(one).ok().flatten(),
            _ => None,
        }
    }

    /// The ranges, in the order of the parameters, and how each is to be formatted, if it is.
    pub fn ranges(&self) -> impl Iterator<Item = (PhysRange, Option<Format>)> + 'a {
        parse(self.params).flatten()
    }

    /// Whether a range is formatted although it has a superblock, so that its data are lost.
    pub fn force(&self) -> bool {
        self.force
    }

    /// Whether a block is written to another page, so that a power loss leaves all of it or none.
    pub fn atomic(&self) -> bool {
        self.atomic
    }

    /// Whether what was RAM is zeroed when the range is given up.
    pub fn scrub(&self) -> bool {
        self.scrub
    }
}

/// Whether no range is given.
fn is_nothing(params: &Params<'_>) -> bool {
    params.start.trim_end().is_empty() && params.size.trim_end().is_empty()
}

/// Reads a format, or that there is to be none.
fn format(name: &str) -> Result<Option<Format>, Error<'_>> {
    match name.trim_end() {
        "" => Ok(None),
        "none" => Ok(Some(Format::None)),
        "blk" => Ok(Some(Format::Blk)),
        _ => Err(Error::Format(name)),
    }
}

/// Reads the lists, which are of one length, element by element.
fn parse(
    params: Params<'_>,
) -> impl Iterator<Item = Result<(PhysRange, Option<Format>), Error<'_>>> + '_ {
    let count = if is_nothing(&params) { 0 } else { usize::MAX };
    size::list(params.start)
        .take(count)
        .zip(size::list(params.size))
        .zip(one_or_each(params.format))
        .map(|((start, size), format)| {
            let bytes = |param, value| {
                size::parse(value).map_err(|error| Error::Number {
                    param,
                    value,
                    error,
                })
            };
            let first = bytes("kmem_start", start)?;
            let len = bytes("kmem_size", size)?;
            let format = self::format(format)?;
            if len == 0 {
                return Err(Error::Empty { start, size });
            }

            let range =
                PhysRange::new(first, len).map_err(|error| Error::Range { start, size, error })?;
            Ok((range, format))
        })
}

/// Reads a parameter that is true or false, in the words of `kstrtobool()`, `lib/kstrtox.c`; but a
/// word must be one of these, not just begin as one.
fn flag<'a>(param: &'static str, value: &'a str) -> Result<bool, Error<'a>> {
    const WORDS: [(&str, bool); 12] = [
        ("1", true),
        ("y", true),
        ("yes", true),
        ("t", true),
        ("true", true),
        ("on", true),
        ("0", false),
        ("n", false),
        ("no", false),
        ("f", false),
        ("false", false),
        ("off", false),
    ];

    WORDS
        .into_iter()
        .find(|(word, _)| word.eq_ignore_ascii_case(value.trim_end()))
        .map(|(_, flag)| flag)
        .ok_or(Error::Bool { param, value })
}

#[cfg_attr(CONFIG_RUST, kernel::macros::kunit_tests(pmem_kmem_params))]
#[cfg(any(test, CONFIG_KUNIT = "y"))]
mod tests {
    use super::*;

    const GOOD: Params<'_> = Params {
        start: "4G",
        size: "2GiB",
        format: "",
        force: "0",
        atomic: "1",
        scrub: "0",
        dax: "0",
    };

    const TWO: Params<'_> = Params {
        start: "4G,16G",
        size: "2G,8G",
        ..GOOD
    };

    /// Whether the formats of all ranges are these.
    fn formats(params: Params<'_>, formats: &[Option<Format>]) -> bool {
        Config::new(params).is_ok_and(|config| {
            config
                .ranges()
                .map(|(_, format)| format)
                .eq(formats.iter().copied())
        })
    }

    #[test]
    fn formats_for_each_range_or_for_all() {
        const NONE: Option<Format> = Some(Format::None);
        const BLK: Option<Format> = Some(Format::Blk);
        let of = |format, params| Params { format, ..params };

        assert!(formats(GOOD, &[None]));
        assert!(formats(of("blk\n", GOOD), &[BLK]));
        assert!(formats(TWO, &[None, None]));
        assert!(formats(of("none", TWO), &[NONE, NONE]));
        assert!(formats(of("none,blk", TWO), &[NONE, BLK]));
        assert!(formats(of(",blk", TWO), &[None, BLK]));
        assert!(formats(of("blk,", TWO), &[BLK, None]));
        assert!(!formats(of("blk,", GOOD), &[BLK]));
        for format in ["BLK", "block", "0", " blk", "none;blk"] {
            assert_eq!(
                Config::new(of(format, TWO)).err(),
                Some(Error::Format(format))
            );
        }
    }

    #[test]
    fn flags() {
        for value in ["1", "y", "Y", "yes", "YES", "on", "On\n", "true", "t"] {
            assert_eq!(flag("it", value), Ok(true));
        }
        for value in ["0", "n", "N", "no", "NO", "off", "oFF\n", "false", "F"] {
            assert_eq!(flag("it", value), Ok(false));
        }
        for value in ["", "2", "-1", "10", "o", "yess", " 1", "maybe"] {
            assert_eq!(flag("it", value), Err(Error::Bool { param: "it", value }));
        }
    }

    #[test]
    fn faults_name_the_parameter() {
        let fault = |params| Config::new(params).err();
        let nothing = Params {
            start: "",
            size: "\n",
            ..GOOD
        };
        assert_eq!(fault(nothing), None);
        assert!(matches!(
            fault(Params {
                format: "blk,none",
                ..nothing
            }),
            Some(Error::Length { ranges: 0, .. })
        ));
        assert!(matches!(
            fault(Params { start: "", ..GOOD }),
            Some(Error::Number {
                param: "kmem_start",
                ..
            })
        ));
        assert!(matches!(
            fault(Params {
                size: "1.5G",
                ..GOOD
            }),
            Some(Error::Number {
                param: "kmem_size",
                ..
            })
        ));
        let force = Params { force: "1", ..GOOD };
        assert_eq!(fault(force), Some(Error::Force));
        assert_eq!(
            fault(Params {
                format: "blk",
                ..force
            }),
            None
        );
        assert!(matches!(
            fault(Params { size: "2G", ..TWO }),
            Some(Error::Length {
                param: "kmem_size",
                elements: 1,
                ranges: 2
            })
        ));
        assert!(matches!(
            fault(Params { size: "0", ..GOOD }),
            Some(Error::Empty { .. })
        ));
        assert!(matches!(
            fault(Params {
                start: "0xfffffffffffff000",
                ..GOOD
            }),
            Some(Error::Range { .. })
        ));
        assert!(matches!(
            fault(Params {
                start: "4G,5G",
                ..TWO
            }),
            Some(Error::Overlap(..))
        ));
        for (params, name) in [
            (Params { force: "", ..GOOD }, "kmem_format_force"),
            (Params { atomic: "", ..GOOD }, "kmem_atomic"),
            (Params { scrub: "", ..GOOD }, "kmem_scrub"),
        ] {
            assert_eq!(
                fault(params),
                Some(Error::Bool {
                    param: name,
                    value: ""
                })
            );
        }
    }
}
