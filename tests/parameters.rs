// SPDX-License-Identifier: GPL-2.0-only

//! The module's parameters as a line: a wrong one names itself and what would be right, a right one
//! gives the disks that were asked for.

use pmem_core::{
    iopmem,
    memmap::{
        Config,
        Mode,
        Params,
        StructPages, //
    },
    persist::{
        Cache,
        CopyPolicy, //
    },
};
use proptest::prelude::*;

const MIB: u64 = 1 << 20;

/// Lines that are refused, with what is said.
const WRONG: &str = include_str!("parameters/wrong.txt");

/// Lines that are accepted, with what they ask for.
const RIGHT: &str = include_str!("parameters/right.txt");

/// Splits a line as the kernel does: at spaces, but not at those in double quotes around a value.
fn words(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quoted = false;
    for c in line.chars() {
        match c {
            '"' => quoted = !quoted,
            ' ' if !quoted => words.push(String::new()),
            _ => words.last_mut().unwrap().push(c),
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

/// Reads a line that was split, as it stands behind `insmod pmem.ko`.
fn params(words: &[String]) -> (Params<'_>, iopmem::Params<'_>) {
    let mut params = Params::default();
    let mut iopmem = iopmem::Params::default();
    for word in words {
        let (name, value) = word.split_once('=').unwrap();
        *match name {
            "pmem_start" => &mut params.start,
            "pmem_size" => &mut params.size,
            "pmem_count" => &mut params.count,
            "pmem_lbs" => &mut params.lbs,
            "pmem_first" => &mut params.first,
            "pmem_cache" => &mut params.cache,
            "pmem_memmap" => &mut params.memmap,
            "pmem_memmap_force" => &mut params.memmap_force,
            "pmem_copy" => &mut params.copy,
            "pmem_e820" => &mut params.e820,
            "pmem_virtio" => &mut params.virtio,
            "iopmem" => &mut params.iopmem,
            "iopmem_bar" => &mut iopmem.bar,
            "iopmem_cache" => &mut iopmem.cache,
            "iopmem_dax" => &mut iopmem.dax,
            "iopmem_p2pdma" => &mut iopmem.p2pdma,
            "iopmem_persistent" => &mut iopmem.persistent,
            _ => panic!("no parameter {name}"),
        } = value;
    }
    (params, iopmem)
}

/// What is said of a line.
fn message(line: &str) -> Option<String> {
    let words = words(line);
    let (params, iopmem) = params(&words);
    let error = Config::new(params).err();
    let error = error.or_else(|| iopmem::Config::new(iopmem).err());
    error.map(|error| error.to_string())
}

/// The lines of a file that are no comments, each split at its bars.
fn table(text: &str) -> impl Iterator<Item = Vec<&str>> {
    text.lines()
        .filter(|line| !line.starts_with('#') && !line.is_empty())
        .map(|line| line.split('|').map(str::trim).collect())
}

#[test]
fn wrong_lines_name_the_fault() {
    let mut template = "";
    let mut faults = Vec::new();
    let mut lines = 0;
    for row in table(WRONG) {
        let (line, fields) = row.split_first().unwrap();
        if let Some(text) = line.strip_prefix("! ") {
            template = text;
            continue;
        }
        assert_eq!(template.matches("{}").count(), fields.len(), "{line}");
        let mut expected = template.to_owned();
        for field in fields {
            let unquoted = field.strip_prefix('"').and_then(|f| f.strip_suffix('"'));
            expected = expected.replacen("{}", unquoted.unwrap_or(field), 1);
        }
        let said = message(line).unwrap_or_else(|| "accepted".into());
        if said != expected || !said.chars().all(|c| matches!(c, ' '..='~')) {
            faults.push(format!("{line}\n  says  {said}\n  not   {expected}\n"));
        }
        lines += 1;
    }
    assert!(faults.is_empty(), "{}", faults.concat());
    assert!(lines >= 200, "the table has {lines} lines");
}

#[test]
fn wrong_units_are_named() {
    /// What is written for a unit and is none, with the letter of a multiple in the place of `_`.
    const MISSPELLED: [&str; 17] = [
        "_b", "_i", "_I", "_ib", "_Ib", "_IB", "_bi", "_Bi", "_BI", "_it", "_bit", "_bytes", "_o",
        "_io", "__", "B_", "i_",
    ];
    const LETTERS: [&str; 12] = ["K", "M", "G", "T", "P", "E", "k", "m", "g", "t", "p", "e"];

    for (form, letter) in MISSPELLED
        .iter()
        .flat_map(|form| LETTERS.map(|letter| (form, letter)))
        // Of bytes in lower case, only kB is right.
        .chain(["m", "g", "t", "p", "e"].map(|letter| (&"_B", letter)))
        .chain(["k", "m", "g", "t", "p", "e"].map(|letter| (&"_iB", letter)))
    {
        let unit = form.replace('_', letter);
        for (line, fault) in [
            (
                format!("pmem_start=4{unit} pmem_size=2G"),
                format!("pmem_start=4{unit}"),
            ),
            (
                format!("pmem_start=4G pmem_size=2{unit}"),
                format!("pmem_size=2{unit}"),
            ),
        ] {
            let expected = format!(
                "{fault}: \"{unit}\" is not a unit; write B, K to E or KiB to EiB (powers of 1024), \
                 or kB to EB (powers of 1000)"
            );
            assert_eq!(message(&line), Some(expected), "{line}");
        }
    }
}

#[test]
fn sizes_are_too_large_from_the_first_that_does_not_fit_in_64_bits() {
    /// The first number of each unit that is 2^64 bytes or more.
    const FIRST: [(&str, &str, &str); 14] = [
        ("", "18446744073709551615", "18446744073709551616"),
        ("B", "18446744073709551615", "18446744073709551616"),
        ("K", "18014398509481983", "18014398509481984"),
        ("M", "17592186044415", "17592186044416"),
        ("G", "17179869183", "17179869184"),
        ("T", "16777215", "16777216"),
        ("P", "16383", "16384"),
        ("E", "15", "16"),
        ("kB", "18446744073709551", "18446744073709552"),
        ("MB", "18446744073709", "18446744073710"),
        ("GB", "18446744073", "18446744074"),
        ("TB", "18446744", "18446745"),
        ("PB", "18446", "18447"),
        ("EB", "18", "19"),
    ];

    for (unit, last, first) in FIRST {
        let binary = matches!(unit, "K" | "M" | "G" | "T" | "P" | "E");
        let spellings = match binary {
            true => vec![unit.to_owned(), unit.to_lowercase(), format!("{unit}iB")],
            false => vec![unit.to_owned()],
        };
        for unit in spellings {
            for (before, after) in [
                ("pmem_start=4G pmem_size=", ""),
                ("pmem_start=", " pmem_size=2G"),
            ] {
                let (param, _) = before
                    .rsplit_once(' ')
                    .map_or((before, ""), |(_, p)| (p, ""));
                let line = format!("{before}{first}{unit}{after}");
                let expected = format!(
                    "{param}{first}{unit}: \"{first}{unit}\" is too large; \
                     the most is 18446744073709551615 bytes, below 16EiB"
                );
                assert_eq!(message(&line), Some(expected), "{line}");

                // It is read, whatever else may be wrong with it.
                let line = format!("{before}{last}{unit}{after}");
                let said = message(&line).unwrap_or_default();
                assert!(!said.contains("too large"), "{line}: {said}");
            }
        }
    }
}

#[test]
fn a_space_in_front_of_a_size_is_refused_and_one_behind_it_is_not() {
    for space in [" ", "\t", "\n", "\r\n", "\u{b}", "\u{c}", " \n"] {
        let before = format!("{space}2G");
        let behind = format!("2G{space}");
        let with = |size| Params {
            start: "4G",
            size,
            ..Params::default()
        };
        // A vertical tab is none of the white space of ASCII that text ends with.
        assert_eq!(
            Config::new(with(&behind)).is_ok(),
            space != "\u{b}",
            "{behind:?}"
        );
        let said = Config::new(with(&before)).unwrap_err().to_string();
        let shown = before.escape_default();
        assert_eq!(
            said,
            format!(
                "pmem_size={shown}: \"{shown}\" has a space or a separator in it; \
                 write number and unit in one, as 1536MiB"
            )
        );
    }
}

#[test]
fn a_message_stays_on_its_line() {
    let params = Params {
        start: "4G\n[12.0] EXT4-fs error",
        size: "2G",
        ..Params::default()
    };
    let message = Config::new(params).unwrap_err().to_string();
    assert!(!message.contains('\n'), "{message}");
}

/// What a line asks for, as `parameters/right.txt` has it.
fn asked_for(config: &Config<'_>, iopmem: iopmem::Config) -> String {
    let served_io = || {
        let mut text = iopmem.bar.map_or(String::new(), |bar| format!(":bar{bar}"));
        text += &format!(":{}", iopmem.cache.name());
        if iopmem.dax {
            text += ":dax";
        }
        if iopmem.p2pdma != 0 {
            text += &format!(":p2pdma{}", iopmem.p2pdma / MIB);
        }
        if iopmem.persistent {
            text += ":persistent";
        }
        text
    };
    let served = |mode: Mode| {
        let cache = (mode.cache != Cache::default()).then(|| mode.cache.name());
        let pages = (mode.struct_pages != StructPages::Ram).then(|| mode.struct_pages.name());
        let words = [cache, pages].into_iter().flatten();
        words
            .map(|word| format!(":{word}"))
            .collect::<Vec<_>>()
            .concat()
    };

    let ranges = config.ranges().map(|(range, split, mode)| {
        let first = split.get(0).unwrap();
        assert_eq!(first.start(), range.start());
        assert_eq!((first.start() % MIB, first.size() % MIB), (0, 0));
        format!(
            "{}+{}*{}{}",
            first.start() / MIB,
            first.size() / MIB,
            split.count(),
            served(mode)
        )
    });
    let mut text = ranges.collect::<Vec<_>>().join(" ");
    let others = [
        (
            config.e820(),
            format!("e820{}", served(config.found_mode())),
        ),
        (
            config.virtio(),
            format!("virtio{}", served(config.found_mode())),
        ),
        (config.iopmem(), format!("iopmem{}", served_io())),
        (config.first() != 0, format!("first={}", config.first())),
        (
            config.logical_block_size() != 512,
            format!("lbs={}", config.logical_block_size()),
        ),
        (
            config.copy() != CopyPolicy::Auto,
            format!("copy={}", config.copy().name()),
        ),
    ];
    let others: Vec<_> = others
        .into_iter()
        .filter_map(|(differs, text)| differs.then_some(text))
        .collect();
    if !others.is_empty() {
        text = format!("{text} | {}", others.join(" "));
    }
    text
}

#[test]
fn right_lines_give_what_they_ask_for() {
    let mut faults = Vec::new();
    let mut lines = 0;
    for row in table(RIGHT) {
        let (line, expected) = row.split_first().unwrap();
        let expected = expected.join(" | ");
        let words = words(line);
        let (params, iopmem) = params(&words);
        let given = match (Config::new(params), iopmem::Config::new(iopmem)) {
            (Ok(config), Ok(iopmem)) => asked_for(&config, iopmem),
            (Err(error), _) | (_, Err(error)) => error.to_string(),
        };
        if given != expected {
            faults.push(format!("{line}\n  gives {given}\n  not   {expected}\n"));
        }
        lines += 1;
    }
    assert!(faults.is_empty(), "{}", faults.concat());
    assert!(lines >= 90, "the table has {lines} lines");
}

proptest! {
    #[test]
    fn no_text_panics(
        start in ".{0,40}", size in ".{0,40}", count in ".{0,20}", lbs in ".{0,8}", first in ".{0,12}",
    ) {
        let params = Params { start: &start, size: &size, count: &count, lbs: &lbs, first: &first, ..Params::default() };
        if let Err(error) = Config::new(params) {
            prop_assert!(!error.to_string().is_empty());
        }
    }

    #[test]
    fn accepted_ranges_never_overlap(
        ranges in prop::collection::vec((0..64_u64, 1..16_u64), 1..6),
    ) {
        let list = |values: &mut dyn Iterator<Item = u64>| {
            values.map(|v| format!("{}M", v * 2)).collect::<Vec<_>>().join(",")
        };
        let start = list(&mut ranges.iter().map(|r| r.0));
        let size = list(&mut ranges.iter().map(|r| r.1));
        let params = Params { start: &start, size: &size, ..Params::default() };

        let mut sorted = ranges.clone();
        sorted.sort_unstable();
        let overlap = sorted.windows(2).any(|pair| pair[0].0 + pair[0].1 > pair[1].0);
        prop_assert_eq!(Config::new(params).is_err(), overlap);
    }
}
