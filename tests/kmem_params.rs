// SPDX-License-Identifier: GPL-2.0-only

//! The `kmem_*` parameters as a line: a wrong one names itself and what would be right, a right one
//! gives the ranges and the formats that were asked for.

use pmem_core::kmem::{
    params::{
        Config,
        Params, //
    },
    superblock::Format,
};
use proptest::prelude::*;

const GIB: u64 = 1 << 30;

/// Reads a line as it stands behind `insmod pmem.ko`.
fn params(line: &str) -> Params<'_> {
    let mut params = Params {
        start: "",
        size: "",
        format: "",
        force: "0",
        atomic: "1",
        scrub: "0",
        dax: "0",
    };
    for (name, value) in line.split_whitespace().filter_map(|p| p.split_once('=')) {
        *match name {
            "kmem_start" => &mut params.start,
            "kmem_size" => &mut params.size,
            "kmem_format" => &mut params.format,
            "kmem_format_force" => &mut params.force,
            "kmem_atomic" => &mut params.atomic,
            "kmem_scrub" => &mut params.scrub,
            "kmem_dax" => &mut params.dax,
            _ => panic!("no parameter {name}"),
        } = value;
    }
    params
}

#[test]
fn wrong_lines_name_the_fault() {
    let elements = |param, n, ranges| {
        format!(
            "{param} has {n} element(s), but kmem_start gives {ranges} range(s); \
             write one for each, separated by commas"
        )
    };
    let flag = |param: &str| format!("{param}: neither true nor false; write 1 or 0");
    let nothing = "nothing is given; write a number of bytes or, for example, 512MiB";
    let lines = [
        (
            "kmem_format=ext4",
            "kmem_format=ext4: not a format; write none or blk, or nothing to use what is there"
                .into(),
        ),
        ("kmem_start=4G", format!("kmem_size=: {nothing}")),
        ("kmem_size=2G", format!("kmem_start=: {nothing}")),
        (
            "kmem_start=4G, kmem_size=2G,2G",
            format!("kmem_start=: {nothing}"),
        ),
        (
            "kmem_start=4G kmem_size=1.5G",
            "kmem_size=1.5G: \"1.5G\" is a fraction; write a whole number of a smaller unit, \
             as 1536M for 1.5G"
                .into(),
        ),
        (
            "kmem_start=-4G kmem_size=2G",
            "kmem_start=-4G: \"-4G\" has a sign; write the number alone".into(),
        ),
        ("kmem_start=4G,8G kmem_size=2G", elements("kmem_size", 1, 2)),
        ("kmem_start=4G kmem_size=2G,2G", elements("kmem_size", 2, 1)),
        (
            "kmem_start=4G,8G kmem_size=2G,2G kmem_format=blk,none,blk",
            elements("kmem_format", 3, 2),
        ),
        (
            "kmem_start=4G kmem_size=2G kmem_format=blk,",
            elements("kmem_format", 2, 1),
        ),
        (
            "kmem_start=4G kmem_size=0",
            "kmem_start=4G kmem_size=0: size 0; name the size that is reserved".into(),
        ),
        (
            "kmem_start=0xffffffffffe00000 kmem_size=4M",
            "kmem_start=0xffffffffffe00000 kmem_size=4M: start 0xffffffffffe00000 with size 4MiB \
             goes beyond the last address; check both against the memory map"
                .into(),
        ),
        (
            "kmem_start=4G,5G kmem_size=2G,2G",
            "ranges [mem 0x100000000-0x17fffffff] and [mem 0x140000000-0x1bfffffff] overlap; \
             change kmem_start or kmem_size"
                .into(),
        ),
        (
            "kmem_start=4G kmem_size=2G kmem_format=block",
            "kmem_format=block: not a format; write none or blk, or nothing to use what is there"
                .into(),
        ),
        (
            "kmem_start=4G,8G kmem_size=2G,2G kmem_format=blk,1",
            "kmem_format=1: not a format; write none or blk, or nothing to use what is there"
                .into(),
        ),
        (
            "kmem_start=4G kmem_size=2G kmem_format_force=maybe",
            flag("kmem_format_force=maybe"),
        ),
        (
            "kmem_start=4G kmem_size=2G kmem_atomic=2",
            flag("kmem_atomic=2"),
        ),
        (
            "kmem_start=4G kmem_size=2G kmem_scrub=",
            flag("kmem_scrub="),
        ),
        ("kmem_dax=both", flag("kmem_dax=both")),
    ];
    for (line, message) in lines {
        match Config::new(params(line)) {
            Ok(_) => panic!("{line}: accepted"),
            Err(error) => assert_eq!(error.to_string(), message, "{line}"),
        }
    }
}

#[test]
fn a_message_stays_on_its_line() {
    let good = params("kmem_start=4G kmem_size=2G");
    let evil = "0\n[12.0] EXT4-fs error";
    for params in [
        Params {
            start: evil,
            ..good
        },
        Params { size: evil, ..good },
        Params {
            format: evil,
            ..good
        },
        Params {
            force: evil,
            ..good
        },
        Params {
            atomic: evil,
            ..good
        },
        Params {
            scrub: evil,
            ..good
        },
        Params { dax: evil, ..good },
    ] {
        let message = Config::new(params).unwrap_err().to_string();
        assert!(!message.contains('\n'), "{message}");
    }
}

#[test]
fn right_lines_give_the_ranges() {
    const NONE: Option<Format> = Some(Format::None);
    const BLK: Option<Format> = Some(Format::Blk);
    // In GiB.
    type Range = (u64, u64, Option<Format>);
    let lines: [(&str, &[Range]); 6] = [
        ("kmem_start=4G kmem_size=2GiB", &[(4, 2, None)]),
        (
            "kmem_start=4G kmem_size=2GiB kmem_format=blk",
            &[(4, 2, BLK)],
        ),
        (
            "kmem_start=0x400000000,4G kmem_size=8G,2147483648 kmem_format=none",
            &[(16, 8, NONE), (4, 2, NONE)],
        ),
        (
            "kmem_start=4G,6G,8G kmem_size=2G,2G,2G kmem_format=blk,,none",
            &[(4, 2, BLK), (6, 2, None), (8, 2, NONE)],
        ),
        (
            "kmem_start=4G,6G kmem_size=2G,2G kmem_format=,blk",
            &[(4, 2, None), (6, 2, BLK)],
        ),
        (
            "kmem_start=4G,6G kmem_size=2G,2G",
            &[(4, 2, None), (6, 2, None)],
        ),
    ];
    for (line, expected) in lines {
        let ranges: Vec<_> = Config::new(params(line))
            .unwrap()
            .ranges()
            .map(|(range, format)| (range.start() / GIB, range.size() / GIB, format))
            .collect();
        assert_eq!(ranges, expected, "{line}");
    }
}

#[test]
fn nothing_is_asked_for_without_a_range_or_an_instance() {
    for (line, is_empty) in [
        ("", true),
        ("kmem_format=blk kmem_scrub=1", true),
        ("kmem_dax=1", false),
        ("kmem_start=4G kmem_size=2G", false),
    ] {
        let config = Config::new(params(line)).unwrap();
        assert_eq!(config.is_empty(), is_empty, "{line}");
        assert_eq!(config.dax(), line.contains("dax"), "{line}");
        assert_eq!(
            config.ranges().count(),
            usize::from(line.contains("start")),
            "{line}"
        );
    }

    let of_an_instance = |format| {
        let line = format!("kmem_dax=1 kmem_start=4G,6G kmem_size=2G,2G kmem_format={format}");
        Config::new(params(&line)).unwrap().instance_format()
    };
    assert_eq!(of_an_instance("blk"), Some(Format::Blk));
    assert_eq!(of_an_instance(""), None);
    // It is not said which of them is that of the instances.
    assert_eq!(of_an_instance("blk,blk"), None);
}

#[test]
fn flags_are_as_the_kernel_reads_them() {
    let config = |line: &str| {
        let config = Config::new(params(line)).unwrap();
        (config.force(), config.atomic(), config.scrub())
    };
    assert_eq!(config("kmem_start=4G kmem_size=2G"), (false, true, false));
    for on in ["1", "y", "Y", "yes", "Yes", "on", "ON"] {
        let line = format!(
            "kmem_start=4G kmem_size=2G kmem_format=blk kmem_format_force={on} kmem_scrub={on}"
        );
        assert_eq!(config(&line), (true, true, true), "{line}");
    }
    for off in ["0", "n", "N", "no", "NO", "off", "Off"] {
        let line = format!("kmem_start=4G kmem_size=2G kmem_atomic={off}");
        assert_eq!(config(&line), (false, false, false), "{line}");
    }
}

proptest! {
    #[test]
    fn no_text_panics(
        start in ".{0,40}", size in ".{0,40}", format in ".{0,20}",
        force in ".{0,8}", atomic in ".{0,8}", scrub in ".{0,8}", dax in ".{0,8}",
    ) {
        let good = params("kmem_start=4G,8G kmem_size=2G,2G");
        for params in [
            Params { start: &start, ..good },
            Params { size: &size, ..good },
            Params { format: &format, ..good },
            Params {
                start: &start,
                size: &size,
                format: &format,
                force: &force,
                atomic: &atomic,
                scrub: &scrub,
                dax: &dax,
            },
        ] {
            match Config::new(params) {
                Ok(config) => prop_assert_eq!(config.ranges().count() == 0, config.is_empty()),
                Err(error) => prop_assert!(!error.to_string().is_empty()),
            }
        }
    }

    #[test]
    fn accepted_ranges_never_overlap(
        ranges in prop::collection::vec((0..64_u64, 1..16_u64), 1..6),
    ) {
        let list = |values: &mut dyn Iterator<Item = u64>| {
            values.map(|v| format!("{}M", v * 128)).collect::<Vec<_>>().join(",")
        };
        let start = list(&mut ranges.iter().map(|r| r.0));
        let size = list(&mut ranges.iter().map(|r| r.1));
        let params = Params { start: &start, size: &size, ..params("") };

        let mut sorted = ranges.clone();
        sorted.sort_unstable();
        let overlap = sorted.windows(2).any(|pair| pair[0].0 + pair[0].1 > pair[1].0);
        prop_assert_eq!(Config::new(params).is_err(), overlap);
    }
}
