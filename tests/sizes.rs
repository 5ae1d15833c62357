// SPDX-License-Identifier: GPL-2.0-only

//! Sizes as an administrator writes them: each is read as what was meant, or refused with a remedy.

use pmem_core::size::{
    list,
    parse,
    parse_count,
    Error,
    Size, //
};
use proptest::prelude::*;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;
const PIB: u64 = 1 << 50;
const EIB: u64 = 1 << 60;

#[test]
fn good() {
    const GOOD: [(&str, u64); 52] = [
        // Bytes.
        ("0", 0),
        ("1", 1),
        ("4096", 4096),
        ("2147483648", 2 * GIB),
        ("18446744073709551615", u64::MAX),
        ("0B", 0),
        ("4096B", 4096),
        // A leading zero does not make it octal.
        ("00", 0),
        ("010", 10),
        ("0777", 777),
        ("0512M", 512 * MIB),
        // As memparse() of the kernel.
        ("1K", KIB),
        ("1k", KIB),
        ("512M", 512 * MIB),
        ("512m", 512 * MIB),
        ("4G", 4 * GIB),
        ("4g", 4 * GIB),
        ("0G", 0),
        ("2T", 2 * TIB),
        ("2t", 2 * TIB),
        ("3P", 3 * PIB),
        ("3p", 3 * PIB),
        ("15E", 15 * EIB),
        ("15e", 15 * EIB),
        // IEC.
        ("1KiB", KIB),
        ("512MiB", 512 * MIB),
        ("2GiB", 2 * GIB),
        ("2TiB", 2 * TIB),
        ("16383PiB", 16383 * PIB),
        ("15EiB", 15 * EIB),
        ("16777215TiB", 16777215 * TIB),
        // SI.
        ("1kB", 1000),
        ("1MB", 1_000_000),
        ("1GB", 1_000_000_000),
        ("1TB", 1_000_000_000_000),
        ("1PB", 1_000_000_000_000_000),
        ("18EB", 18_000_000_000_000_000_000),
        // Hexadecimal, where B and E are digits.
        ("0x0", 0),
        ("0x100000000", 4 * GIB),
        ("0X100000000", 4 * GIB),
        ("0xffffffffffffffff", u64::MAX),
        ("0xFfFf", 65535),
        ("0x1B", 27),
        ("0xE", 14),
        ("0x1e", 30),
        ("0x4G", 4 * GIB),
        ("0x10MiB", 16 * MIB),
        ("0x10kB", 16_000),
        // As sysfs and shells end it.
        ("2GiB\n", 2 * GIB),
        ("2GiB\r\n", 2 * GIB),
        ("4G  ", 4 * GIB),
        ("4G\t\n", 4 * GIB),
    ];

    for (text, bytes) in GOOD {
        assert_eq!(parse(text), Ok(bytes), "{text:?}");
    }
}

#[test]
fn bad() {
    /// What the message has to say.
    const EMPTY: &str = "nothing is given";
    const NUMBER: &str = "does not start with a number";
    const SIGN: &str = "has a sign";
    const FRACTION: &str = "is a fraction";
    const SEPARATOR: &str = "has a space or a separator in it";
    const UNIT: &str = "is not a unit";
    const LARGE: &str = "is too large";
    const FOLLOWS: &str = "follows the size";
    const BAD: [(&str, &str); 52] = [
        ("", EMPTY),
        ("\n", EMPTY),
        ("  \t", EMPTY),
        ("G", NUMBER),
        ("GiB", NUMBER),
        ("0x", NUMBER),
        ("0xG", NUMBER),
        ("x10", NUMBER),
        ("@4G", NUMBER),
        ("all", NUMBER),
        ("\u{661}G", NUMBER),
        ("\0", NUMBER),
        ("-1", SIGN),
        ("-1G", SIGN),
        ("+1G", SIGN),
        ("0x-1", SIGN),
        ("1.5G", FRACTION),
        ("1.", FRACTION),
        (".5G", FRACTION),
        ("0x1.8p3", FRACTION),
        (" 1G", SEPARATOR),
        ("\n1G", SEPARATOR),
        ("1 G", SEPARATOR),
        ("1\u{a0}GiB", SEPARATOR),
        ("1,000", SEPARATOR),
        ("1_000", SEPARATOR),
        ("1'000", SEPARATOR),
        ("1KB", "KiB for 1024 bytes or kB for 1000"),
        ("0x4KB", "KiB for 1024 bytes or kB for 1000"),
        ("1kb", UNIT),
        ("1Kb", UNIT),
        ("1mb", UNIT),
        ("1gb", UNIT),
        ("1Gb", UNIT),
        ("1gib", UNIT),
        ("1GIB", UNIT),
        ("1Gi", UNIT),
        ("1GiBs", UNIT),
        ("1Gx", UNIT),
        ("1ZiB", UNIT),
        ("1b", UNIT),
        ("1bytes", UNIT),
        ("1BB", UNIT),
        ("0x1EiB", UNIT),
        ("4G@16G", FOLLOWS),
        ("2G$4G", FOLLOWS),
        ("1G1", FOLLOWS),
        ("1e9", FOLLOWS),
        ("1G\0", FOLLOWS),
        ("18446744073709551616", LARGE),
        ("16E", LARGE),
        ("0x10000000000000000", LARGE),
    ];

    for (text, says) in BAD {
        let error = parse(text).expect_err(text).to_string();
        assert!(error.contains(says), "{text:?}: {error}");
    }
}

#[test]
fn messages_name_the_value_and_cannot_disturb_a_log() {
    let message = |text| parse(text).unwrap_err().to_string();

    assert_eq!(
        message("1KB"),
        "KB in \"1KB\" can be read in two ways; write KiB for 1024 bytes or kB for 1000"
    );
    assert_eq!(
        message("4G\n<0>panic"),
        "\"\\n<0>panic\" follows the size; remove it"
    );
    let long = "9".repeat(100);
    let message = message(&long);
    assert!(message.starts_with(&format!("\"{}...\" is too large", &long[..30])));
}

#[test]
fn counts() {
    const GOOD: [(&str, u32); 7] = [
        ("0", 0),
        ("1", 1),
        ("007", 7),
        ("7\n", 7),
        ("0x10", 16),
        ("0xB", 11),
        ("4294967295", u32::MAX),
    ];
    for (text, count) in GOOD {
        assert_eq!(parse_count(text), Ok(count), "{text:?}");
    }

    const BAD: [(&str, &str); 12] = [
        ("", "is not a count"),
        ("x", "is not a count"),
        ("-1", "has a sign"),
        ("1.5", "is not a count"),
        ("1 2", "has a space or a separator in it"),
        ("2K", "is not a count"),
        ("2B", "is not a count"),
        ("2x", "is not a count"),
        ("2;", "is not a count"),
        ("4294967296", "the most is 4294967295"),
        ("18446744073709551616", "the most is 4294967295"),
        ("0x100000000", "the most is 4294967295"),
    ];
    for (text, says) in BAD {
        let error = parse_count(text).expect_err(text).to_string();
        assert!(error.contains(says), "{text:?}: {error}");
    }
}

#[test]
fn lists() {
    let sizes = |text| list(text).map(parse).collect::<Vec<_>>();

    assert_eq!(sizes("4G\n"), [Ok(4 * GIB)]);
    assert_eq!(sizes("4G,16G\n"), [Ok(4 * GIB), Ok(16 * GIB)]);
    assert_eq!(sizes(""), [Err(Error::Empty)]);
    assert_eq!(
        sizes("4G,,8G"),
        [Ok(4 * GIB), Err(Error::Empty), Ok(8 * GIB)]
    );
    assert_eq!(sizes(",4G"), [Err(Error::Empty), Ok(4 * GIB)]);
    assert_eq!(sizes("4G,\n"), [Ok(4 * GIB), Err(Error::Empty)]);
}

#[test]
fn sizes_are_shown_in_the_largest_unit_that_divides_them() {
    const SHOWN: [(u64, &str); 9] = [
        (0, "0B"),
        (513, "513B"),
        (4096, "4KiB"),
        (1_000_000, "1000000B"),
        (512 * MIB, "512MiB"),
        (2147483648, "2GiB"),
        (GIB + MIB, "1025MiB"),
        (15 * EIB, "15EiB"),
        (u64::MAX, "18446744073709551615B"),
    ];

    for (bytes, shown) in SHOWN {
        assert_eq!(Size(bytes).to_string(), shown);
    }
}

/// Numbers of all magnitudes, many of them at a power of two.
fn bytes() -> impl Strategy<Value = u64> {
    (any::<u64>(), 0..64_u32, 0..64_u32).prop_map(|(number, right, left)| number >> right << left)
}

proptest! {
    #[test]
    fn what_is_shown_is_read_back(bytes in bytes()) {
        prop_assert_eq!(parse(&Size(bytes).to_string()), Ok(bytes));
    }

    #[test]
    fn decimal_and_hexadecimal_agree(bytes in bytes()) {
        prop_assert_eq!(parse(&format!("{bytes}")), Ok(bytes));
        prop_assert_eq!(parse(&format!("{bytes:#x}\n")), Ok(bytes));
    }

    #[test]
    fn a_unit_multiplies_or_overflows(number in bytes(), unit in 0..15_usize) {
        let (unit, bytes) = [
            ("B", 1), ("K", KIB), ("m", MIB), ("G", GIB), ("t", TIB), ("P", PIB), ("e", EIB),
            ("KiB", KIB), ("MiB", MIB), ("GiB", GIB),
            ("kB", 1_000), ("MB", 1_000_000), ("GB", 1_000_000_000),
            ("TB", 1_000_000_000_000), ("EB", 1_000_000_000_000_000_000),
        ][unit];
        prop_assert_eq!(parse(&format!("{number}{unit}")).ok(), number.checked_mul(bytes));
    }

    #[test]
    fn any_text_is_read_or_refused_in_one_line(text in any::<String>()) {
        for error in [parse(&text).err(), parse_count(&text).err()].into_iter().flatten() {
            prop_assert!(error.to_string().chars().all(|c| matches!(c, ' '..='~')));
        }
    }

    #[test]
    fn text_that_looks_like_a_size_is_read_or_refused(text in "(0x)?[0-9a-fA-F]{0,20}[.,_ ]?[kKMGTPEiB]{0,4}\\s?") {
        if let Ok(bytes) = parse(&text) {
            prop_assert_eq!(parse(&Size(bytes).to_string()), Ok(bytes));
        }
    }

    #[test]
    fn counts_are_read_back(count in any::<u32>()) {
        prop_assert_eq!(parse_count(&count.to_string()), Ok(count));
        prop_assert_eq!(parse_count(&format!("{count:#x}")), Ok(count));
    }

    #[test]
    fn a_list_has_one_element_more_than_commas(text in "[0-9GM,]{0,20}") {
        let elements: Vec<_> = list(&text).collect();
        prop_assert_eq!(elements.len(), text.matches(',').count() + 1);
        prop_assert_eq!(elements.join(","), text);
    }
}
