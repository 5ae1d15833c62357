// SPDX-License-Identifier: GPL-2.0-only

//! The module's parameters as a line: a wrong one names itself and what would be right, a right one
//! gives the disks that were asked for.

use pmem_core::memmap::{
    Config,
    Params, //
};
use proptest::prelude::*;

const GIB: u64 = 1 << 30;

/// Reads a line as it stands behind `insmod pmem.ko`.
fn params(line: &str) -> Params<'_> {
    let mut params = Params::default();
    for (name, value) in line.split_whitespace().filter_map(|p| p.split_once('=')) {
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
            _ => panic!("no parameter {name}"),
        } = value;
    }
    params
}

/// The first byte and the size of each disk.
fn disks(line: &str) -> Vec<(u64, u64)> {
    Config::new(params(line))
        .unwrap()
        .ranges()
        .flat_map(|(_, split, _)| split.disks().collect::<Vec<_>>())
        .map(|disk| (disk.start(), disk.size()))
        .collect()
}

#[test]
fn wrong_lines_name_the_fault() {
    let no_range = "no range is given; reserve one with memmap= and name it, for example \
                    pmem_start=4G pmem_size=2GiB";
    let elements = |param, n, ranges| {
        format!(
            "{param} has {n} element(s), but pmem_start gives {ranges} range(s); \
             write one for each, separated by commas"
        )
    };
    let lines = [
        ("", no_range.to_owned()),
        ("pmem_count=2", no_range.to_owned()),
        (
            "pmem_start=4G",
            "pmem_size=: nothing is given; write a number of bytes or, for example, 512MiB".into(),
        ),
        (
            "pmem_size=2G",
            "pmem_start=: nothing is given; write a number of bytes or, for example, 512MiB".into(),
        ),
        (
            "pmem_start=4G pmem_size=2Gib",
            "pmem_size=2Gib: \"Gib\" is not a unit; write B, K to E or KiB to EiB \
             (powers of 1024), or kB to EB (powers of 1000)"
                .into(),
        ),
        (
            "pmem_start=-4G pmem_size=2G",
            "pmem_start=-4G: \"-4G\" has a sign; write the number alone".into(),
        ),
        (
            "pmem_start=4G pmem_size=1.5G",
            "pmem_size=1.5G: \"1.5G\" is a fraction; write a whole number of a smaller unit, \
             as 1536M for 1.5G"
                .into(),
        ),
        (
            "pmem_start=4G@2G pmem_size=2G",
            "pmem_start=4G@2G: \"@2G\" follows the size; remove it".into(),
        ),
        (
            "pmem_start=4G pmem_size=99999999999G",
            "pmem_size=99999999999G: \"99999999999G\" is too large; the most is \
             18446744073709551615 bytes, below 16EiB"
                .into(),
        ),
        (
            "pmem_start=4G, pmem_size=2G,2G",
            "pmem_start=: nothing is given; write a number of bytes or, for example, 512MiB".into(),
        ),
        ("pmem_start=4G,8G pmem_size=2G", elements("pmem_size", 1, 2)),
        ("pmem_start=4G pmem_size=2G,2G", elements("pmem_size", 2, 1)),
        (
            "pmem_start=4G,8G pmem_size=2G,2G pmem_count=1,1,1",
            elements("pmem_count", 3, 2),
        ),
        (
            "pmem_start=4G pmem_size=0",
            "pmem_start=4G pmem_size=0 pmem_count=1: size 0 at 0x100000000; \
             a disk needs at least 2MiB"
                .into(),
        ),
        (
            "pmem_start=4G pmem_size=2G pmem_count=0",
            "pmem_start=4G pmem_size=2G pmem_count=0: 0 disks; ask for 1 or more".into(),
        ),
        (
            "pmem_start=4G pmem_size=2G pmem_count=two",
            "pmem_count=two: \"two\" is not a count; write a whole number without a unit".into(),
        ),
        (
            "pmem_start=4G pmem_size=2G pmem_count=2K",
            "pmem_count=2K: \"2K\" is not a count; write a whole number without a unit".into(),
        ),
        (
            "pmem_start=4G pmem_size=8M pmem_count=5",
            "pmem_start=4G pmem_size=8M pmem_count=5: [mem 0x100000000-0x1007fffff] of 8MiB is \
             too small for 5 disks of at least 2MiB; the most is 4"
                .into(),
        ),
        (
            "pmem_start=4097M pmem_size=8M pmem_count=2",
            "pmem_start=4097M pmem_size=8M pmem_count=2: start 0x100100000 is not 2MiB aligned; \
             nearest range that works: pmem_start=0x100200000 pmem_size=4MiB"
                .into(),
        ),
        (
            "pmem_start=0xffffffffffe00000 pmem_size=4M",
            "pmem_start=0xffffffffffe00000 pmem_size=4M pmem_count=1: start 0xffffffffffe00000 \
             with size 4MiB goes beyond the last address; check both against the memory map"
                .into(),
        ),
        (
            "pmem_start=4G,5G pmem_size=2G,2G",
            "ranges [mem 0x100000000-0x17fffffff] and [mem 0x140000000-0x1bfffffff] overlap; \
             change pmem_start or pmem_size"
                .into(),
        ),
        (
            "pmem_start=4G pmem_size=2G pmem_lbs=1000",
            "pmem_lbs=1000: not a logical block size that is offered; write 512 or 4096".into(),
        ),
        (
            "pmem_start=4G pmem_size=2G pmem_lbs=",
            "pmem_lbs=: not a logical block size that is offered; write 512 or 4096".into(),
        ),
        (
            "pmem_start=4G pmem_size=2G pmem_first=-1",
            "pmem_first=-1: \"-1\" has a sign; write the number alone".into(),
        ),
        (
            "pmem_start=4G pmem_size=2G pmem_first=4294967295",
            "pmem_first plus all of pmem_count is more than 4294967295; lower one of them".into(),
        ),
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
    let params = Params {
        start: "4G\n[12.0] EXT4-fs error",
        ..params("pmem_size=2G")
    };
    let message = Config::new(params).unwrap_err().to_string();
    assert!(!message.contains('\n'), "{message}");
}

#[test]
fn right_lines_give_the_disks() {
    assert_eq!(disks("pmem_start=4G pmem_size=2GiB"), [(4 * GIB, 2 * GIB)]);
    assert_eq!(
        disks("pmem_start=0x100000000 pmem_size=2147483648 pmem_count=2"),
        [(4 * GIB, GIB), (5 * GIB, GIB)]
    );
    assert_eq!(
        disks("pmem_start=16G,4G pmem_size=8G,2G pmem_count=2,1 pmem_lbs=4KiB"),
        [(16 * GIB, 4 * GIB), (20 * GIB, 4 * GIB), (4 * GIB, 2 * GIB)]
    );
    assert_eq!(
        disks("pmem_start=4G,8G,12G pmem_size=1G,1G,1G pmem_count=2").len(),
        6
    );
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
