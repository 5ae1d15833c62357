// SPDX-License-Identifier: GPL-2.0-only

//! `memmap=` on the kernel's command line: what it says, and how it is written where.

use crate::memory::span;
use pmem_core::range::PhysRange;
use std::fmt;

/// How many `memmap=` ranges the kernel can keep its random position clear of; with more it has none.
/// `MAX_MEMMAP_REGIONS` in `arch/x86/boot/compressed/kaslr.c`.
pub(crate) const KASLR_RANGES: usize = 4;

/// What an element of `memmap=` makes of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `SIZE$START`: nobody's.
    Reserved,
    /// `SIZE!START`: persistent memory.
    Persistent,
    /// `SIZE@START`: RAM.
    Ram,
    /// `SIZE#START`: tables of the firmware.
    Acpi,
    /// `SIZE%START-FROM+TO`: of another type.
    Changed,
    /// `SIZE` alone: there is no RAM from there on.
    Limit,
    /// It means nothing.
    Nonsense,
}

/// An element of `memmap=`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry<'a> {
    /// As it stands.
    pub(crate) text: &'a str,
    pub(crate) kind: Kind,
    /// What it is about; with [`Kind::Limit`], all from there on.
    pub(crate) range: Option<PhysRange>,
}

/// The elements of all `memmap=` options of a kernel's command line, read as the kernel reads them.
pub(crate) fn entries(command_line: &str) -> impl Iterator<Item = Entry<'_>> {
    options(command_line)
        .filter_map(|option| option.strip_prefix("memmap="))
        .flat_map(|list| list.split(','))
        .filter(|text| *text != "exactmap")
        .map(entry)
}

/// The options on a kernel's command line that are for the kernel.
pub(crate) fn options(command_line: &str) -> impl Iterator<Item = &str> {
    command_line
        .split_whitespace()
        .take_while(|option| *option != "--")
}

fn entry(text: &str) -> Entry<'_> {
    let read = || {
        let (size, rest) = memparse(text)?;
        let mut rest = rest.chars();
        let kind = match rest.next() {
            Some('$') => Kind::Reserved,
            Some('!') => Kind::Persistent,
            Some('@') => Kind::Ram,
            Some('#') => Kind::Acpi,
            Some('%') => Kind::Changed,
            _ => return Some((Kind::Limit, span(size, Some(u64::MAX)))),
        };
        let (start, _) = memparse(rest.as_str())?;
        Some((kind, PhysRange::new(start, size).ok()))
    };
    let (kind, range) = read().unwrap_or((Kind::Nonsense, None));
    Entry { text, kind, range }
}

/// Reads a number as `memparse()` does: decimal, octal (`0`) or hexadecimal (`0x`), and a unit. Gives what follows, too.
fn memparse(text: &str) -> Option<(u64, &str)> {
    let hex = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
    let (radix, digits) = match hex {
        Some(digits) => (16, digits),
        None if text.starts_with('0') => (8, text),
        None => (10, text),
    };
    let end = digits
        .find(|c: char| !c.is_digit(radix))
        .unwrap_or(digits.len());
    let (number, rest) = digits.split_at(end);
    let number = u64::from_str_radix(number, radix).ok()?;
    let shift = match rest.chars().next() {
        Some('K' | 'k') => 10,
        Some('M' | 'm') => 20,
        Some('G' | 'g') => 30,
        Some('T' | 't') => 40,
        Some('P' | 'p') => 50,
        Some('E' | 'e') => 60,
        _ => return Some((number, rest)),
    };
    Some((number.checked_mul(1 << shift)?, rest.get(1..)?))
}

/// A number of bytes as the kernel's command line has it: with the largest unit that leaves a whole number.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bytes(pub(crate) u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(40, "T"), (30, "G"), (20, "M"), (10, "K")];
        let whole = |&(shift, _): &(u32, _)| self.0 != 0 && self.0.trailing_zeros() >= shift;
        match units.iter().find(|unit| whole(unit)) {
            Some((shift, unit)) => write!(f, "{}{unit}", self.0 >> shift),
            None => write!(f, "{}", self.0),
        }
    }
}

/// The option that reserves `range`.
pub(crate) fn reserve(range: PhysRange) -> String {
    format!("memmap={}${}", Bytes(range.size()), Bytes(range.start()))
}

/// An option as it is written in double quotes in `/etc/default/grub`: a shell reads that, and GRUB what is left.
pub(crate) fn for_grub_defaults(option: &str) -> String {
    option.replace('$', r"\\\$")
}

/// An option as GRUB's prompt and `grub.cfg` have it.
pub(crate) fn for_grub(option: &str) -> String {
    option.replace('$', r"\$")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn all(line: &str) -> Vec<(Kind, Option<(u64, u64)>)> {
        entries(line)
            .map(|e| (e.kind, e.range.map(|r| (r.start(), r.size()))))
            .collect()
    }

    #[test]
    fn a_command_line_is_read_as_the_kernel_reads_it() {
        const G: u64 = 1 << 30;
        assert_eq!(
            all("root=/dev/sda memmap=2G$4G,0x1000#0x3000 quiet memmap=1g!010 -- memmap=1G$1G"),
            [
                (Kind::Reserved, Some((4 * G, 2 * G))),
                (Kind::Acpi, Some((0x3000, 0x1000))),
                (Kind::Persistent, Some((8, G))),
            ]
        );
        // What GRUB leaves of 2G$4G when nothing or one backslash is before the $.
        assert_eq!(
            all("memmap=2GG"),
            [(Kind::Limit, Some((2 * G, u64::MAX - 2 * G + 1)))]
        );
        assert_eq!(
            all("memmap=exactmap,64M@1M,big,1G$,0$1G"),
            [
                (Kind::Ram, Some((1 << 20, 64 << 20))),
                (Kind::Nonsense, None),
                (Kind::Nonsense, None),
                (Kind::Reserved, None),
            ]
        );
    }

    #[test]
    fn bytes_are_written_as_the_kernel_reads_them() {
        for (bytes, text) in [
            (0, "0"),
            (1023, "1023"),
            (4 << 30, "4G"),
            (3 << 29, "1536M"),
            (5 << 40, "5T"),
        ] {
            assert_eq!(Bytes(bytes).to_string(), text);
            assert_eq!(memparse(text), Some((bytes, "")));
        }
    }

    /// What `/etc/default/grub` gives to a shell is what `grub.cfg` wants.
    #[test]
    fn a_shell_makes_of_the_defaults_what_grub_wants() {
        let option = reserve(PhysRange::new(4 << 30, 2 << 30).unwrap());
        assert_eq!(option, "memmap=2G$4G");
        let script = format!(
            "LINE=\"{}\"; printf %s \"$LINE\"",
            for_grub_defaults(&option)
        );
        let output = Command::new("sh").args(["-c", &script]).output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), for_grub(&option));
    }
}
