// SPDX-License-Identifier: GPL-2.0-only

//! Sizes and counts as people write them: `"512MiB"`, `"2GiB"`, `"1GB"`, `"4096B"`, `"4G"`.
//!
//! | written | means | from |
//! |---|---|---|
//! | `4096`, `4096B` | bytes | |
//! | `4K` `4M` `4G` `4T` `4P` `4E`, or in lower case | powers of 1024 | `memparse()`, `lib/cmdline.c` |
//! | `4KiB` `4MiB` `4GiB` `4TiB` `4PiB` `4EiB` | powers of 1024 | IEC 80000-13 |
//! | `4kB` `4MB` `4GB` `4TB` `4PB` `4EB` | powers of 1000 | SI |
//! | `0x100000000`, `0x4G` | hexadecimal, with any of these units but `B`, `E` and those in E | `memparse()` |
//!
//! What could be read in two ways is decided as follows.
//!
//! - In a hexadecimal number, `B` and `E` are digits: `0x1B` is 27 bytes and `0xE` is 14.
//! - `KB` is refused: it is 1000 bytes to some and 1024 to others.
//! - A leading `0` changes nothing: `010` is ten, although `memparse()` reads it as octal. Nobody
//!   writes a size in octal, and those who pad a number with zeros mean the number.
//! - Case counts in units of more than one letter: `mb` and `Gib` are refused.
//!
//! A newline, as sysfs adds it, and other white space are ignored at the end, and nowhere else.

use core::fmt;

/// A size in bytes that [`Display`](fmt::Display)s exactly, in the largest binary unit that
/// divides it.
///
/// What it displays, [`parse`] reads back as the same size.
///
/// # Examples
///
/// ```
/// use pmem_core::size::Size;
///
/// assert_eq!(Size(2 << 30).to_string(), "2GiB");
/// assert_eq!(Size(513).to_string(), "513B");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(
    /// Bytes.
    pub u64,
);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(&str, u32); 6] = [
            ("EiB", 60),
            ("PiB", 50),
            ("TiB", 40),
            ("GiB", 30),
            ("MiB", 20),
            ("KiB", 10),
        ];

        // Zero has 64 trailing zeros, and would be a number of exbibytes.
        let zeros = if self.0 == 0 {
            0
        } else {
            self.0.trailing_zeros()
        };
        let (unit, shift) = UNITS
            .into_iter()
            .find(|&(_, shift)| shift <= zeros)
            .unwrap_or(("B", 0));

        write!(f, "{}{unit}", self.0 >> shift)
    }
}

/// Why a text is not a size or a count.
///
/// Displays as what is wrong and what to write instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// There is no text.
    Empty,
    /// There is no number in front: `"G"`, `"0x"`.
    NoDigits(Excerpt),
    /// There is a sign: `"-1G"`, `"+1G"`.
    Sign(Excerpt),
    /// There is a decimal point: `"1.5G"`.
    Fraction(Excerpt),
    /// There is white space or a separator in front or in the middle: `"1 GiB"`, `"1_000"`.
    Separator(Excerpt),
    /// The number is followed by letters that are no unit: `"1gb"`. Carries the letters.
    UnknownUnit(Excerpt),
    /// The unit is `KB`.
    AmbiguousUnit(Excerpt),
    /// A size is followed by something else: `"4G@16G"`. Carries what follows.
    Trailing(Excerpt),
    /// The size does not fit in 64 bits.
    Overflow(Excerpt),
    /// A count has a unit or is followed by something else: `"2K"`.
    NotACount(Excerpt),
    /// The count does not fit in 32 bits.
    CountOverflow(Excerpt),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => write!(
                f,
                "nothing is given; write a number of bytes or, for example, 512MiB"
            ),
            Self::NoDigits(text) => write!(
                f,
                "{text} does not start with a number; write, for example, 512MiB or 0x20000000"
            ),
            Self::Sign(text) => write!(f, "{text} has a sign; write the number alone"),
            Self::Fraction(text) => write!(
                f,
                "{text} is a fraction; write a whole number of a smaller unit, as 1536M for 1.5G"
            ),
            Self::Separator(text) => write!(
                f,
                "{text} has a space or a separator in it; write number and unit in one, as 1536MiB"
            ),
            Self::UnknownUnit(unit) => write!(
                f,
                "{unit} is not a unit; write B, K to E or KiB to EiB (powers of 1024), \
                 or kB to EB (powers of 1000)"
            ),
            Self::AmbiguousUnit(text) => write!(
                f,
                "KB in {text} can be read in two ways; write KiB for 1024 bytes or kB for 1000"
            ),
            Self::Trailing(rest) => write!(f, "{rest} follows the size; remove it"),
            Self::Overflow(text) => write!(
                f,
                "{text} is too large; the most is 18446744073709551615 bytes, below 16EiB"
            ),
            Self::NotACount(text) => write!(
                f,
                "{text} is not a count; write a whole number without a unit"
            ),
            Self::CountOverflow(text) => {
                write!(f, "{text} is too large; the most is {}", u32::MAX)
            }
        }
    }
}

impl core::error::Error for Error {}

/// The beginning of a text that somebody handed in, kept for a message.
///
/// Displays in double quotes and in printable ASCII, all else escaped, so that it cannot disturb a
/// log; and with three dots if the text was longer.
///
/// # Invariants
///
/// The first `len` bytes are UTF-8.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Excerpt {
    bytes: [u8; Excerpt::MAX],
    len: u8,
    cut: bool,
}

impl Excerpt {
    /// The most bytes that are kept. A 64-bit number in decimal has 20, and units 3.
    const MAX: usize = 30;

    /// Keeps the beginning of `text`.
    fn new(text: &str) -> Self {
        let kept = (0..=Self::MAX)
            .rev()
            .find_map(|len| text.get(..len.min(text.len())))
            .unwrap_or_default();
        let mut bytes = [0; Self::MAX];
        for (to, from) in bytes.iter_mut().zip(kept.bytes()) {
            *to = from;
        }

        // INVARIANT: `kept` is whole characters, and at most `MAX` bytes of them.
        Self {
            bytes,
            len: kept.len() as u8,
            cut: kept.len() < text.len(),
        }
    }

    /// The part of the text that was kept.
    fn as_str(&self) -> &str {
        // By the invariants, this never falls back.
        self.bytes
            .get(..usize::from(self.len))
            .and_then(|bytes| core::str::from_utf8(bytes).ok())
            .unwrap_or_default()
    }
}

impl fmt::Display for Excerpt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dots = if self.cut { "..." } else { "" };

        write!(f, "\"{}{dots}\"", self.as_str().escape_default())
    }
}

impl fmt::Debug for Excerpt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// How many bytes a unit has, or [`None`] if it is not one.
fn bytes_of_unit(unit: &str) -> Option<u64> {
    Some(match unit {
        "" | "B" => 1,
        "K" | "k" | "KiB" => 1 << 10,
        "M" | "m" | "MiB" => 1 << 20,
        "G" | "g" | "GiB" => 1 << 30,
        "T" | "t" | "TiB" => 1 << 40,
        "P" | "p" | "PiB" => 1 << 50,
        "E" | "e" | "EiB" => 1 << 60,
        "kB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        "PB" => 1_000_000_000_000_000,
        "EB" => 1_000_000_000_000_000_000,
        _ => return None,
    })
}

/// Splits `text` where `predicate` first holds.
fn split_where(text: &str, predicate: impl FnMut(char) -> bool) -> (&str, &str) {
    text.find(predicate)
        .and_then(|at| text.split_at_checked(at))
        .unwrap_or((text, ""))
}

/// Splits `text` into the number in front, [`None`] if it overflows, and the rest.
fn number(text: &str) -> Result<(Option<u64>, &str), Error> {
    let hex = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
    let (radix, text_of_number) = match hex {
        Some(digits) => (16, digits),
        None => (10, text),
    };
    let (digits, rest) = split_where(text_of_number, |c| !c.is_digit(radix));
    let excerpt = Excerpt::new(text);

    match rest.chars().next() {
        _ if text.is_empty() => Err(Error::Empty),
        Some('+' | '-') if digits.is_empty() => Err(Error::Sign(excerpt)),
        Some('.') => Err(Error::Fraction(excerpt)),
        Some(c) if c.is_whitespace() || matches!(c, ',' | '_' | '\'') => {
            Err(Error::Separator(excerpt))
        }
        _ if digits.is_empty() => Err(Error::NoDigits(excerpt)),
        // These are digits of the radix and at least one, so all that can fail is the range.
        _ => Ok((u64::from_str_radix(digits, radix).ok(), rest)),
    }
}

/// Drops the white space at the end that sysfs and shells leave there.
fn without_end(text: &str) -> &str {
    text.trim_end_matches(|c: char| c.is_ascii_whitespace())
}

/// Reads a size, in bytes, from any of the notations in the [module](self)'s table.
///
/// # Errors
///
/// Whatever is not wholly one of these notations is refused; see [`Error`].
///
/// # Examples
///
/// ```
/// use pmem_core::size::{parse, Error};
///
/// assert_eq!(parse("2GiB\n"), Ok(2 << 30));
/// assert_eq!(parse("4G"), Ok(4 << 30));
/// assert_eq!(parse("1GB"), Ok(1_000_000_000));
/// assert_eq!(parse("0x100000000"), Ok(1 << 32));
///
/// assert_eq!(parse(""), Err(Error::Empty));
/// assert_eq!(
///     parse("1.5G").unwrap_err().to_string(),
///     "\"1.5G\" is a fraction; write a whole number of a smaller unit, as 1536M for 1.5G"
/// );
/// ```
pub fn parse(text: &str) -> Result<u64, Error> {
    let text = without_end(text);
    let (number, rest) = number(text)?;
    let (unit, trailing) = split_where(rest, |c| !c.is_ascii_alphabetic());

    let Some(bytes) = bytes_of_unit(unit) else {
        return Err(match unit {
            "KB" => Error::AmbiguousUnit(Excerpt::new(text)),
            _ => Error::UnknownUnit(Excerpt::new(unit)),
        });
    };
    if !trailing.is_empty() {
        return Err(Error::Trailing(Excerpt::new(trailing)));
    }

    number
        .and_then(|number| number.checked_mul(bytes))
        .ok_or_else(|| Error::Overflow(Excerpt::new(text)))
}

/// Reads a count: a whole number, decimal or hexadecimal, without a unit.
///
/// # Errors
///
/// Whatever else there is besides white space at the end is refused; see [`Error`].
///
/// # Examples
///
/// ```
/// use pmem_core::size::parse_count;
///
/// assert_eq!(parse_count("7\n"), Ok(7));
/// assert!(parse_count("7K").is_err());
/// ```
pub fn parse_count(text: &str) -> Result<u32, Error> {
    let text = without_end(text);
    let not_a_count = Error::NotACount(Excerpt::new(text));
    let (number, rest) = number(text).map_err(|error| match error {
        // What these say is about sizes.
        Error::Empty | Error::NoDigits(_) | Error::Fraction(_) => not_a_count,
        other => other,
    })?;

    if !rest.is_empty() {
        return Err(not_a_count);
    }

    number
        .and_then(|number| u32::try_from(number).ok())
        .ok_or_else(|| Error::CountOverflow(Excerpt::new(text)))
}

/// Splits a list at its commas.
///
/// Elements are given as they stand, empty ones too: [`parse`] and [`parse_count`] refuse those
/// with [`Error::Empty`], where leaving them out would give sizes to the wrong ranges. An empty
/// text is a list of one empty element.
///
/// # Examples
///
/// ```
/// use pmem_core::size::{list, parse, Error};
///
/// assert!(list("4G,16G\n").map(parse).eq([Ok(4 << 30), Ok(16 << 30)]));
/// assert!(list("4G,").map(parse).eq([Ok(4 << 30), Err(Error::Empty)]));
/// ```
pub fn list(text: &str) -> impl Iterator<Item = &str> + Clone {
    text.split(',')
}

#[cfg_attr(CONFIG_RUST, kernel::macros::kunit_tests(pmem_size))]
#[cfg(any(test, CONFIG_KUNIT = "y"))]
mod tests {
    use super::*;

    #[test]
    fn notations() {
        const GOOD: [(&str, u64); 14] = [
            ("0", 0),
            ("4096", 4096),
            ("4096B\n", 4096),
            ("010", 10),
            ("1k", 1 << 10),
            ("512M", 512 << 20),
            ("4G", 4 << 30),
            ("2GiB", 2 << 30),
            ("1kB", 1_000),
            ("1GB", 1_000_000_000),
            ("0x100000000", 1 << 32),
            ("0x4G", 4 << 30),
            ("0x1B", 27),
            ("0xE", 14),
        ];

        for (text, bytes) in GOOD {
            assert_eq!(parse(text), Ok(bytes));
        }
    }

    #[test]
    fn boundaries() {
        assert_eq!(parse("18446744073709551615"), Ok(u64::MAX));
        assert_eq!(parse("0xffffffffffffffff"), Ok(u64::MAX));
        assert_eq!(parse("15EiB"), Ok(15 << 60));

        for text in ["18446744073709551616", "16E", "19EB", "0x10000000000000000"] {
            assert_eq!(parse(text), Err(Error::Overflow(Excerpt::new(text))));
        }
    }

    #[test]
    fn refused() {
        for text in [
            "", "\n", "G", "0x", "-1", "+1", "1.5G", "1 G", " 1G", "1_000",
        ] {
            assert!(parse(text).is_err());
        }
        for text in ["1KB", "1gb", "1GiBs", "4G@16G", "0x1EiB", "1G\0"] {
            assert!(parse(text).is_err());
        }
    }

    #[test]
    fn counts() {
        assert_eq!(parse_count("7"), Ok(7));
        assert_eq!(parse_count("0x10\n"), Ok(16));
        assert_eq!(parse_count("4294967295"), Ok(u32::MAX));
        assert_eq!(
            parse_count("4294967296"),
            Err(Error::CountOverflow(Excerpt::new("4294967296")))
        );
        assert_eq!(parse_count("2K"), Err(Error::NotACount(Excerpt::new("2K"))));
        assert_eq!(parse_count(""), Err(Error::NotACount(Excerpt::new(""))));
    }

    #[test]
    fn lists_keep_empty_elements() {
        assert!(list("1G,,2G,").eq(["1G", "", "2G", ""]));
        assert!(list("").eq([""]));
    }
}
