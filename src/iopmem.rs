// SPDX-License-Identifier: GPL-2.0-only

//! PCI functions whose memory is to be a disk: how an administrator wants it, and what their BARs allow.
//!
//! | parameter           | for all functions                             | default |
//! |---------------------|-----------------------------------------------|---------|
//! | `iopmem_bar`        | the BAR, 0 to 5                               | 4 if it is memory, else the largest that is |
//! | `iopmem_cache`      | how the disk has it mapped: wc, uc, wb        | wc      |
//! | `iopmem_dax`        | whether it gets struct pages, and so DAX      | 1       |
//! | `iopmem_p2pdma`     | how much of its end is p2pdma memory instead  | 0       |
//! | `iopmem_persistent` | whether it keeps its contents without power   | 0       |
//!
//! Document: PCI Local Bus Specification 3.0, 6.2.5, "Base Addresses"

use super::{
    memmap::{
        switch,
        word,
        Error, //
    },
    persist::Cache,
    range::{
        PhysRange,
        DISK_ALIGN, //
    },
    size::{
        self,
        Size, //
    }, //
};
use core::fmt;

/// The BARs of a function.
pub const BARS: usize = 6;

/// The BAR that is used by default, if it is memory.
const DEFAULT: usize = 4;

/// The values of the parameters.
#[derive(Clone, Copy, Debug)]
pub struct Params<'a> {
    /// `iopmem_bar`.
    pub bar: &'a str,
    /// `iopmem_cache`.
    pub cache: &'a str,
    /// `iopmem_dax`.
    pub dax: &'a str,
    /// `iopmem_p2pdma`.
    pub p2pdma: &'a str,
    /// `iopmem_persistent`.
    pub persistent: &'a str,
}

impl Default for Params<'_> {
    fn default() -> Self {
        Self {
            bar: "",
            cache: Cache::WriteCombining.name(),
            dax: "1",
            p2pdma: "0",
            persistent: "0",
        }
    }
}

/// How the memory of functions is to be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// The BAR that was asked for, less than [`BARS`].
    pub bar: Option<usize>,
    /// How it is mapped.
    pub cache: Cache,
    /// Whether it is to have DAX.
    pub dax: bool,
    /// How many bytes at its end are p2pdma memory, a multiple of [`DISK_ALIGN`].
    pub p2pdma: u64,
    /// Whether it keeps its contents without power.
    pub persistent: bool,
}

impl Config {
    /// Checks the parameters.
    ///
    /// # Errors
    ///
    /// [`Error::Word`], [`Error::Number`] or [`Error::P2pdma`], for the first parameter that is wrong.
    ///
    /// # Examples
    ///
    /// ```
    /// use pmem_core::iopmem::{Config, Params};
    ///
    /// let config = Config::new(Params { bar: "2", ..Params::default() })?;
    /// assert_eq!(config.bar, Some(2));
    ///
    /// let error = Config::new(Params { bar: "6", ..Params::default() }).unwrap_err();
    /// assert_eq!(error.to_string(), "iopmem_bar=6: unknown; write 0, 1, 2, 3, 4 or 5");
    /// # Ok::<(), pmem_core::memmap::Error<'_>>(())
    /// ```
    pub fn new(params: Params<'_>) -> Result<Self, Error<'_>> {
        let bar = if params.bar.trim_end().is_empty() {
            None
        } else {
            let bars: [(&str, usize); BARS] =
                [("0", 0), ("1", 1), ("2", 2), ("3", 3), ("4", 4), ("5", 5)];
            Some(word("iopmem_bar", params.bar, "0, 1, 2, 3, 4 or 5", bars)?)
        };
        let p2pdma = match size::parse(params.p2pdma) {
            Ok(size) if size % DISK_ALIGN == 0 => size,
            Ok(_) => return Err(Error::P2pdma(params.p2pdma)),
            Err(error) => {
                return Err(Error::Number {
                    param: "iopmem_p2pdma",
                    value: params.p2pdma,
                    error,
                })
            }
        };
        let caches = [Cache::WriteCombining, Cache::Uncached, Cache::WriteBack];

        Ok(Self {
            bar,
            cache: word(
                "iopmem_cache",
                params.cache,
                "wc, uc or wb",
                caches.map(|cache| (cache.name(), cache)),
            )?,
            dax: switch("iopmem_dax", params.dax)?,
            p2pdma,
            persistent: switch("iopmem_persistent", params.persistent)?,
        })
    }
}

/// What a BAR is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bar {
    /// There is none of this number, or it is the upper half of a 64-bit one.
    #[default]
    None,
    /// I/O ports.
    Ports,
    /// Memory that has no address, as there was no room for it. Nobody knows how large it is.
    Unassigned,
    /// Memory.
    Memory {
        /// Address of its first byte, as the CPU sees it.
        start: u64,
        /// Its length in bytes.
        size: u64,
    },
}

/// Why no BAR of a function can be a disk.
///
/// Displays as what is wrong, and what would be right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unusable {
    /// None is memory.
    NoMemory,
    /// The one that would be used, or that was asked for, has no address.
    NoAddress(usize),
    /// The one that was asked for is not memory.
    Asked(usize, Bar),
    /// It has no room for a block.
    TooSmall {
        /// Its number.
        bar: usize,
        /// Its size in bytes.
        size: u64,
        /// The size of a block in bytes.
        block: u32,
    },
    /// What is to be p2pdma memory leaves nothing, or has no place at its end.
    NoRoom {
        /// Its number.
        bar: usize,
        /// Its size in bytes.
        size: u64,
        /// What was asked for, in bytes.
        p2pdma: u64,
    },
    /// What the function says of it makes no sense.
    Wraps(usize),
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NoMemory => {
                f.write_str("none of its BARs is memory, so that it cannot be a disk; unbind it")
            }
            Self::NoAddress(bar) => write!(
                f,
                "BAR {bar} is memory that has no address; give the bridge above it a larger window, \
                 for example with pci=realloc"
            ),
            Self::Asked(bar, kind) => {
                let kind = match kind {
                    Bar::Ports => "is I/O ports",
                    _ => "is not there",
                };
                write!(
                    f,
                    "iopmem_bar={bar}: it {kind}; name one that is memory, or none"
                )
            }
            Self::TooSmall { bar, size, block } => write!(
                f,
                "BAR {bar} of {} is too small for a block of {}",
                Size(size),
                Size(block.into())
            ),
            Self::NoRoom { bar, size, p2pdma } => write!(
                f,
                "BAR {bar} of {}: iopmem_p2pdma={} needs one that is larger, and whole {}",
                Size(size),
                Size(p2pdma),
                Size(DISK_ALIGN)
            ),
            Self::Wraps(bar) => write!(f, "BAR {bar} goes beyond the last address"),
        }
    }
}

impl core::error::Error for Unusable {}

/// A BAR, and what is made of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Its number, less than [`BARS`].
    pub bar: usize,
    /// The beginning of it, whole blocks.
    pub disk: PhysRange,
    /// What follows and is p2pdma memory: how far from its first byte, and how long, in bytes.
    pub p2pdma: Option<(u64, u64)>,
}

impl Choice {
    /// How many bytes from the first one on are made something of.
    pub fn size(&self) -> u64 {
        match self.p2pdma {
            Some((offset, size)) => offset.saturating_add(size),
            None => self.disk.size(),
        }
    }
}

/// The BAR that is to be a disk with blocks of `block` bytes, a power of two, but for `p2pdma` bytes at
/// its end. That is BAR `asked`, or one that suits.
///
/// # Errors
///
/// See [`Unusable`].
///
/// # Examples
///
/// ```
/// use pmem_core::iopmem::{choose, Bar};
///
/// let memory = |start, size| Bar::Memory { start, size };
/// let bars = [memory(0xfe00_0000, 4096), Bar::None, memory(4 << 30, 1 << 30), Bar::None, Bar::None, Bar::None];
/// let choice = choose(&bars, None, 512, 0)?;
/// assert_eq!((choice.bar, choice.disk.start(), choice.disk.size()), (2, 4 << 30, 1 << 30));
/// # Ok::<(), pmem_core::iopmem::Unusable>(())
/// ```
pub fn choose(
    bars: &[Bar; BARS],
    asked: Option<usize>,
    block: u32,
    p2pdma: u64,
) -> Result<Choice, Unusable> {
    // What there was no room for is large, and the one that is meant: another one may be registers.
    let size_of = |bar: &Bar| match *bar {
        Bar::Memory { size, .. } => size,
        Bar::Unassigned => u64::MAX,
        Bar::None | Bar::Ports => 0,
    };
    let chosen = match asked {
        Some(bar) => bar,
        None if bars.get(DEFAULT).is_some_and(|bar| size_of(bar) != 0) => DEFAULT,
        // The first of the largest.
        None => bars
            .iter()
            .enumerate()
            .rev()
            .max_by_key(|(_, bar)| size_of(bar))
            .filter(|(_, bar)| size_of(bar) != 0)
            .map(|(bar, _)| bar)
            .ok_or(Unusable::NoMemory)?,
    };
    let (start, size) = match bars.get(chosen).copied().unwrap_or_default() {
        Bar::Memory { start, size } => (start, size),
        Bar::Unassigned => return Err(Unusable::NoAddress(chosen)),
        kind => return Err(Unusable::Asked(chosen, kind)),
    };

    let bar = chosen;
    let left = size
        .checked_sub(p2pdma)
        .filter(|&left| p2pdma == 0 || (left != 0 && (start | size | p2pdma) % DISK_ALIGN == 0));
    let left = left.ok_or(Unusable::NoRoom { bar, size, p2pdma })?;
    let whole = left & !u64::from(block).wrapping_sub(1);
    if whole == 0 {
        return Err(Unusable::TooSmall { bar, size, block });
    }
    // All of it, so that the p2pdma memory does not wrap either.
    PhysRange::new(start, size)
        .and_then(|_| PhysRange::new(start, whole))
        .map(|disk| Choice {
            bar,
            disk,
            p2pdma: (p2pdma != 0).then_some((left, p2pdma)),
        })
        .map_err(|_| Unusable::Wraps(bar))
}

/// Why a BAR has no struct pages, and so its disk no DAX.
///
/// Displays as that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoPages {
    /// They were not asked for.
    Unasked,
    /// The memory is not whole huge pages.
    Ragged(PhysRange),
    /// Devices find it at another address than the CPU, which struct pages cannot tell them.
    Translated {
        /// Where devices find it.
        bus: u64,
        /// Where the CPU does.
        cpu: u64,
    },
    /// The kernel has no place for struct pages of these addresses.
    Unmappable {
        /// The first address that it has.
        first: u64,
        /// The last one.
        last: u64,
    },
}

impl fmt::Display for NoPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Unasked => f.write_str("iopmem_dax=0"),
            Self::Ragged(range) => write!(
                f,
                "{range} does not begin and end at multiples of {}",
                Size(DISK_ALIGN)
            ),
            Self::Translated { bus, cpu } => {
                write!(f, "it is at {bus:#x} on its bus, but at {cpu:#x} for CPUs")
            }
            Self::Unmappable { first, last } => write!(
                f,
                "the kernel has struct pages for {first:#x}-{last:#x} alone"
            ),
        }
    }
}

/// Whether memory at `range`, which devices find at `bus`, can have struct pages, on a machine that
/// has them for the addresses `first` to `last`.
///
/// # Errors
///
/// See [`NoPages`].
pub fn check_pages(range: PhysRange, bus: u64, (first, last): (u64, u64)) -> Result<(), NoPages> {
    if (range.start() | range.size()) % DISK_ALIGN != 0 {
        return Err(NoPages::Ragged(range));
    }
    if bus != range.start() {
        return Err(NoPages::Translated {
            bus,
            cpu: range.start(),
        });
    }
    if range.start() < first || range.last() > last {
        return Err(NoPages::Unmappable { first, last });
    }
    Ok(())
}

#[cfg_attr(CONFIG_RUST, kernel::macros::kunit_tests(pmem_iopmem))]
#[cfg(any(test, CONFIG_KUNIT = "y"))]
mod tests {
    use super::*;

    const NONE: [Bar; BARS] = [Bar::None; BARS];

    const fn memory(size: u64) -> Bar {
        Bar::Memory {
            start: 1 << 32,
            size,
        }
    }

    fn with(list: &[(usize, Bar)]) -> [Bar; BARS] {
        let mut bars = NONE;
        for &(at, bar) in list {
            if let Some(place) = bars.get_mut(at) {
                *place = bar;
            }
        }
        bars
    }

    fn chosen(list: &[(usize, Bar)], asked: Option<usize>) -> Result<usize, Unusable> {
        choose(&with(list), asked, 512, 0).map(|choice| choice.bar)
    }

    #[test]
    fn the_fourth_is_first_and_then_the_largest() {
        let small = memory(4096);
        let large = memory(1 << 30);

        assert_eq!(chosen(&[(0, large), (4, small)], None), Ok(4));
        assert_eq!(chosen(&[(0, small), (2, large)], None), Ok(2));
        assert_eq!(chosen(&[(0, large), (2, small)], None), Ok(0));
        assert_eq!(chosen(&[(1, large), (5, large)], None), Ok(1));
        assert_eq!(chosen(&[(3, small), (4, Bar::Ports)], None), Ok(3));
        assert_eq!(chosen(&[(0, small), (4, large)], Some(0)), Ok(0));
    }

    #[test]
    fn what_is_not_memory_is_refused() {
        assert_eq!(chosen(&[], None), Err(Unusable::NoMemory));
        assert_eq!(chosen(&[(0, Bar::Ports)], None), Err(Unusable::NoMemory));
        for (bar, kind) in [(0, Bar::Ports), (2, Bar::None)] {
            let refused = Unusable::Asked(bar, kind);
            assert_eq!(chosen(&[(0, Bar::Ports)], Some(bar)), Err(refused));
        }
        assert!(chosen(&[(0, memory(4096))], Some(BARS)).is_err());
    }

    /// What is left would be the registers, as a rule.
    #[test]
    fn memory_without_an_address_is_not_passed_over() {
        let registers = (0, memory(4096));
        let lost = |bar| (bar, Bar::Unassigned);
        let refused = |bar| Err(Unusable::NoAddress(bar));

        assert_eq!(chosen(&[registers, lost(2)], None), refused(2));
        assert_eq!(chosen(&[registers, lost(4)], None), refused(4));
        assert_eq!(chosen(&[registers, lost(2)], Some(2)), refused(2));
        assert_eq!(chosen(&[registers, lost(2)], Some(0)), Ok(0));
        assert_eq!(
            chosen(&[registers, lost(2), (4, memory(4096))], None),
            Ok(4)
        );
    }

    #[test]
    fn a_disk_is_whole_blocks() {
        for (size, block, whole) in [
            (4096, 4096, 4096),
            (2048, 4096, 0),
            (2048, 512, 2048),
            (1000, 512, 512),
            (511, 512, 0),
            (16, 512, 0),
            (1 << 40, 4096, 1 << 40),
        ] {
            let choice = choose(&with(&[(0, memory(size))]), None, block, 0);
            if whole == 0 {
                let bar = 0;
                assert_eq!(choice, Err(Unusable::TooSmall { bar, size, block }));
            } else {
                assert!(choice.is_ok_and(|choice| choice.disk.size() == whole));
            }
        }
        let wraps = Bar::Memory {
            start: u64::MAX - 4095,
            size: 8192,
        };
        assert_eq!(chosen(&[(1, wraps)], None), Err(Unusable::Wraps(1)));
    }

    #[test]
    fn p2pdma_memory_is_at_the_end() {
        const MIB: u64 = 1 << 20;
        let choice = |size, p2pdma| choose(&with(&[(2, memory(size))]), None, 512, p2pdma);

        let disk = PhysRange::new(1 << 32, 6 * MIB);
        assert_eq!(
            choice(8 * MIB, 2 * MIB).map(|it| (Ok(it.disk), it.p2pdma, it.size())),
            Ok((disk, Some((6 * MIB, 2 * MIB)), 8 * MIB))
        );
        assert!(choice(8 * MIB, 0).is_ok_and(|choice| choice.p2pdma.is_none()));
        for (size, p2pdma) in [(8, 8), (8, 10), (1, 2), (7, 2)] {
            let (bar, size, p2pdma) = (2, size * MIB, p2pdma * MIB);
            let refused = Unusable::NoRoom { bar, size, p2pdma };
            assert_eq!(choice(size, p2pdma), Err(refused));
        }
    }

    #[test]
    fn struct_pages_are_for_whole_huge_pages_that_all_see_alike() {
        const ALL: (u64, u64) = (0, u64::MAX);
        let check = |start, size, bus, mappable| {
            PhysRange::new(start, size).map(|range| check_pages(range, bus, mappable))
        };

        let start = 1 << 32;
        assert_eq!(check(start, 2 << 20, start, ALL), Ok(Ok(())));
        assert_eq!(
            check(start, 2 << 20, start, (start, start + (2 << 20) - 1)),
            Ok(Ok(()))
        );
        for (start, size) in [(start, 1 << 20), (start + 4096, 2 << 20), (start, 3 << 20)] {
            assert!(matches!(
                check(start, size, start, ALL),
                Ok(Err(NoPages::Ragged(_)))
            ));
        }
        let translated = NoPages::Translated { bus: 0, cpu: start };
        assert_eq!(check(start, 2 << 20, 0, ALL), Ok(Err(translated)));
        for (first, last) in [(start + 1, u64::MAX), (0, start + (2 << 20) - 2)] {
            let unmappable = NoPages::Unmappable { first, last };
            assert_eq!(
                check(start, 2 << 20, start, (first, last)),
                Ok(Err(unmappable))
            );
        }
    }

    #[test]
    fn parameters_are_words() {
        let config = |bar, cache, dax, persistent| {
            Config::new(Params {
                bar,
                cache,
                dax,
                persistent,
                ..Params::default()
            })
        };

        assert_eq!(
            config("", "wc", "1", "0"),
            Ok(Config {
                bar: None,
                cache: Cache::WriteCombining,
                dax: true,
                p2pdma: 0,
                persistent: false,
            })
        );
        assert_eq!(
            config("5\n", "wb", "0\n", "1"),
            Ok(Config {
                bar: Some(5),
                cache: Cache::WriteBack,
                dax: false,
                p2pdma: 0,
                persistent: true,
            })
        );
        for (bar, cache, dax, persistent, wrong) in [
            ("6", "wc", "1", "0", "iopmem_bar"),
            ("-1", "wc", "1", "0", "iopmem_bar"),
            ("0x1", "wc", "1", "0", "iopmem_bar"),
            ("", "", "1", "0", "iopmem_cache"),
            ("", "wt", "1", "0", "iopmem_cache"),
            ("", "wc", "2", "0", "iopmem_dax"),
            ("", "wc", "1", "yes", "iopmem_persistent"),
        ] {
            assert!(matches!(
                config(bar, cache, dax, persistent),
                Err(Error::Word { param, .. }) if param == wrong
            ));
        }
    }

    #[test]
    fn p2pdma_memory_is_whole_huge_pages() {
        let p2pdma = |p2pdma| {
            Config::new(Params {
                p2pdma,
                ..Params::default()
            })
            .map(|config| config.p2pdma)
        };

        assert_eq!(p2pdma("0"), Ok(0));
        assert_eq!(p2pdma("64M"), Ok(64 << 20));
        assert_eq!(p2pdma("3MiB"), Err(Error::P2pdma("3MiB")));
        assert!(matches!(
            p2pdma("much"),
            Err(Error::Number {
                param: "iopmem_p2pdma",
                ..
            })
        ));
    }
}
