// SPDX-License-Identifier: GPL-2.0-only

//! The parameters that say which reserved ranges to use, as an administrator writes them.
//!
//! | parameter    | one element for each range          | default |
//! |--------------|-------------------------------------|---------|
//! | `pmem_start` | address of its first byte           | none    |
//! | `pmem_size`  | its length                          | none    |
//! | `pmem_count` | how many disks it is split into     | 1       |
//! | `pmem_lbs`   | (one for all) logical block size    | 512     |
//! | `pmem_cache` | how it is mapped: wb, wt, wc, uc    | wb      |
//! | `pmem_memmap` | where its struct pages are: ram, dev | ram    |
//! | `pmem_memmap_force` | (one for all) whether ram may destroy a header | 0 |
//! | `pmem_copy`  | (one for all) auto, nt or wb        | auto    |
//! | `pmem_e820`  | (one for all) whether ranges of the firmware are used, too | 0 |
//! | `pmem_virtio` | (one for all) whether virtio-pmem devices are used, too | 1 |
//! | `iopmem`     | (one for all) whether PCI functions are used, too, see [`iopmem`](super::iopmem) | 1 |
//! | `pmem_first` | (one for all) number of first disk  | 0       |
//!
//! Where there may be one element for each range, a single one counts for each, but for `pmem_start`
//! and `pmem_size`. Where the CPU has no way to write its cache back, `pmem_cache` is wt by default.

use super::{
    persist::{
        Cache,
        CopyPolicy, //
    },
    range::{
        self,
        PhysRange,
        Split, //
    },
    size,
};
use core::fmt;

/// Where the struct pages of a range are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StructPages {
    /// In ordinary memory, 1/64 of the size of the range.
    #[default]
    Ram,
    /// On the range itself.
    Dev,
}

impl StructPages {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Ram, Self::Dev];

    /// Its name, as in `pmem_memmap=`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ram => "ram",
            Self::Dev => "dev",
        }
    }
}

/// How a range is to be served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mode {
    /// How it is mapped.
    pub cache: Cache,
    /// Where its struct pages are, if it has some.
    pub struct_pages: StructPages,
}

/// The values of the parameters; by default no range, and no devices.
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
    /// `pmem_cache`.
    pub cache: &'a str,
    /// `pmem_memmap`.
    pub memmap: &'a str,
    /// `pmem_memmap_force`.
    pub memmap_force: &'a str,
    /// `pmem_copy`.
    pub copy: &'a str,
    /// `pmem_e820`.
    pub e820: &'a str,
    /// `pmem_virtio`.
    pub virtio: &'a str,
    /// `iopmem`.
    pub iopmem: &'a str,
}

impl Default for Params<'_> {
    fn default() -> Self {
        Self {
            start: "",
            size: "",
            count: "1",
            lbs: "512",
            first: "0",
            cache: "",
            memmap: StructPages::Ram.name(),
            memmap_force: "0",
            copy: CopyPolicy::Auto.name(),
            e820: "0",
            virtio: "0",
            iopmem: "0",
        }
    }
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
    /// What is to be p2pdma memory is not whole huge pages.
    P2pdma(&'a str),
    /// An element is none of the words that are offered.
    Word {
        /// The parameter's name.
        param: &'static str,
        /// The element.
        value: &'a str,
        /// The words, as in a sentence.
        words: &'static str,
    },
    /// Struct pages are to be on a range that has none, by how it is mapped.
    NoStructPages(Cache),
    /// A header is to be destroyed, but each range is one that needs its header.
    Force,
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
            Self::P2pdma(value) => write!(
                f,
                "iopmem_p2pdma={}: not a multiple of {}, of which the kernel makes such memory; \
                 write one, or 0 for none",
                value.escape_default(),
                size::Size(range::DISK_ALIGN)
            ),
            Self::Word {
                param,
                value,
                words,
            } => write!(
                f,
                "{param}={}: unknown; write {words}",
                value.escape_default()
            ),
            Self::NoStructPages(cache) => write!(
                f,
                "pmem_memmap=dev with pmem_cache={}: only a range that is mapped wb has struct \
                 pages; write ram, or change pmem_cache",
                cache.name()
            ),
            Self::Force => write!(
                f,
                "pmem_memmap_force=1 without pmem_memmap=ram: it destroys the header of a range \
                 whose struct pages are to be in RAM again; write ram, or leave it out"
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
    copy: CopyPolicy,
    memmap_force: bool,
    e820: bool,
    virtio: bool,
    iopmem: bool,
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
    ///     ..Params::default()
    /// };
    /// let disks: u32 = Config::new(params)?.ranges().map(|(_, split, _)| split.count()).sum();
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
        let e820 = switch("pmem_e820", params.e820)?;
        let virtio = switch("pmem_virtio", params.virtio)?;
        let iopmem = switch("iopmem", params.iopmem)?;
        if is_nothing(&params) && !e820 && !virtio && !iopmem {
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

        let copy = word(
            "pmem_copy",
            params.copy,
            "auto, nt or wb",
            CopyPolicy::ALL.map(|policy| (policy.name(), policy)),
        )?;

        let nothing = is_nothing(&params);
        let lengths = |list| if nothing { 0 } else { size::list(list).count() };
        let ranges = lengths(params.start);
        for (param, elements) in [
            ("pmem_size", lengths(params.size)),
            ("pmem_count", size::list(params.count).count()),
            ("pmem_cache", size::list(params.cache).count()),
            ("pmem_memmap", size::list(params.memmap).count()),
        ] {
            let one_for_all = param != "pmem_size" && elements == 1;
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
            let (range, split, _) = item?;
            for (other, ..) in parse(params).take(i).flatten() {
                if range.overlaps(&other) {
                    return Err(Error::Overlap(other, range));
                }
            }
            disks = disks
                .checked_add(split.count())
                .ok_or(Error::TooManyDisks)?;
        }

        let memmap_force = switch("pmem_memmap_force", params.memmap_force)?;
        let config = Config {
            params,
            logical_block_size,
            first,
            copy,
            memmap_force,
            e820,
            virtio,
            iopmem,
        };
        let is_in_ram = |mode: Mode| mode.struct_pages == StructPages::Ram;
        let mut any_in_ram = (e820 || virtio) && is_in_ram(config.found_mode());
        for (.., mode) in config.ranges() {
            any_in_ram |= is_in_ram(mode);
        }
        if memmap_force && !any_in_ram {
            return Err(Error::Force);
        }

        // INVARIANT: All of it was just checked.
        Ok(config)
    }

    /// The ranges, in the order of the parameters, how each is split into disks, and how these are
    /// to be served.
    pub fn ranges(&self) -> impl Iterator<Item = (PhysRange, Split, Mode)> + 'a {
        parse(self.params).flatten()
    }

    /// Whether ranges are asked for that are there already.
    pub fn asks(&self) -> bool {
        self.e820 || !is_nothing(&self.params)
    }

    /// Whether ranges of the firmware are used, too.
    pub fn e820(&self) -> bool {
        self.e820
    }

    /// Whether virtio-pmem devices are used, too.
    pub fn virtio(&self) -> bool {
        self.virtio
    }

    /// Whether PCI functions are used, too.
    pub fn iopmem(&self) -> bool {
        self.iopmem
    }

    /// How ranges are to be served that no parameter names: as all others are, if that is one way.
    pub fn found_mode(&self) -> Mode {
        let only = |list: &'a str| Some(list).filter(|list| size::list(list).count() == 1);
        let mode = mode(
            only(self.params.cache).unwrap_or_default(),
            only(self.params.memmap).unwrap_or(StructPages::Ram.name()),
        );
        mode.unwrap_or_default()
    }

    /// Whether the header of a range whose struct pages were on it may be destroyed, if they are to
    /// be in RAM.
    pub fn memmap_force(&self) -> bool {
        self.memmap_force
    }

    /// How bytes get into the ranges.
    pub fn copy(&self) -> CopyPolicy {
        self.copy
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

/// Whether no range is given.
fn is_nothing(params: &Params<'_>) -> bool {
    params.start.trim_end().is_empty() && params.size.trim_end().is_empty()
}

/// Reads whether something is to be.
pub(super) fn switch<'a>(param: &'static str, value: &'a str) -> Result<bool, Error<'a>> {
    word(param, value, "1 or 0", [("1", true), ("0", false)])
}

/// Reads one of `words`, each with what it means; `all` has them as in a sentence.
pub(super) fn word<'a, T, const N: usize>(
    param: &'static str,
    value: &'a str,
    all: &'static str,
    words: [(&str, T); N],
) -> Result<T, Error<'a>> {
    words
        .into_iter()
        .find_map(|(word, meaning)| (word == value.trim_end()).then_some(meaning))
        .ok_or(Error::Word {
            param,
            value,
            words: all,
        })
}

/// Reads how a range is to be served.
fn mode<'a>(cache: &'a str, memmap: &'a str) -> Result<Mode, Error<'a>> {
    let cache = if cache.trim_end().is_empty() {
        Cache::default()
    } else {
        word(
            "pmem_cache",
            cache,
            "wb, wt, wc or uc",
            Cache::ALL.map(|cache| (cache.name(), cache)),
        )?
    };
    let struct_pages = word(
        "pmem_memmap",
        memmap,
        "ram or dev",
        StructPages::ALL.map(|place| (place.name(), place)),
    )?;
    if struct_pages == StructPages::Dev && cache != Cache::WriteBack {
        return Err(Error::NoStructPages(cache));
    }
    Ok(Mode {
        cache,
        struct_pages,
    })
}

/// Reads the lists, which are of one length, element by element.
fn parse(
    params: Params<'_>,
) -> impl Iterator<Item = Result<(PhysRange, Split, Mode), Error<'_>>> + '_ {
    let count = if is_nothing(&params) { 0 } else { usize::MAX };
    size::list(params.start)
        .take(count)
        .zip(size::list(params.size))
        .zip(one_or_each(params.count))
        .zip(one_or_each(params.cache))
        .zip(one_or_each(params.memmap))
        .map(|((((start, size), count), cache), memmap)| {
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
            let mode = mode(cache, memmap)?;

            PhysRange::new(first, len)
                .and_then(|range| Ok((range, range::split(range, disks)?, mode)))
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
        cache: "",
        memmap: "ram",
        memmap_force: "0",
        copy: "auto",
        e820: "0",
        virtio: "0",
        iopmem: "0",
    };

    fn disks(params: Params<'_>) -> Option<u64> {
        Some(
            Config::new(params)
                .ok()?
                .ranges()
                .map(|(_, split, _)| u64::from(split.count()))
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

    #[test]
    fn modes_are_for_each_range_or_for_all() {
        let mode = |cache, struct_pages| Mode {
            cache,
            struct_pages,
        };
        let modes = |cache, memmap| -> Option<[Mode; 2]> {
            let params = Params {
                start: "4G,16G",
                size: "2G,8G",
                cache,
                memmap,
                ..GOOD
            };
            let config = Config::new(params).ok()?;
            let mut modes = config.ranges().map(|(_, _, mode)| mode);
            Some([modes.next()?, modes.next()?])
        };
        let default = Mode::default();
        let dev = mode(Cache::WriteBack, StructPages::Dev);
        assert_eq!(modes("", "ram"), Some([default, default]));
        assert_eq!(modes("wb", "dev"), Some([dev, dev]));
        assert_eq!(
            modes("wb,uc", "dev,ram"),
            Some([dev, mode(Cache::Uncached, StructPages::Ram)])
        );
        assert_eq!(modes("wb,uc", "dev"), None);
        assert_eq!(modes("wb,uc,wc", "ram"), None);
        assert_eq!(modes("WB", "ram"), None);
        assert_eq!(modes("wb", "1"), None);
    }

    #[test]
    fn a_header_is_destroyed_for_ram_alone() {
        let forced = |memmap, memmap_force| {
            Config::new(Params {
                start: "4G,16G",
                size: "2G,8G",
                memmap,
                memmap_force,
                ..GOOD
            })
            .map(|config| config.memmap_force())
        };

        assert_eq!(forced("ram", "0"), Ok(false));
        assert_eq!(forced("ram", "1\n"), Ok(true));
        assert_eq!(forced("dev,ram", "1"), Ok(true));
        assert_eq!(forced("dev", "0"), Ok(false));
        assert_eq!(forced("dev", "1"), Err(Error::Force));
        assert!(matches!(forced("ram", "yes"), Err(Error::Word { .. })));
    }

    #[test]
    fn ranges_of_the_firmware_need_no_others() {
        let e820 = Params {
            start: "",
            size: "",
            e820: "1",
            ..GOOD
        };
        let config = Config::new(Params {
            cache: "wc\n",
            ..e820
        });
        assert!(config.is_ok_and(|config| config.e820()
            && config.ranges().count() == 0
            && config.found_mode().cache == Cache::WriteCombining));
        assert!(Config::new(Params { e820: "2", ..e820 }).is_err());
        assert!(Config::new(Params { e820: "0", ..e820 }).is_err());
        assert!(Config::new(Params {
            cache: "wc,wb",
            ..e820
        })
        .is_err());
    }
}
