// SPDX-License-Identifier: GPL-2.0-only

//! Ranges and their split into disks: no range wraps, no disk is misaligned, empty, outside of the
//! range or on top of another.

use pmem_core::{
    range::{
        split,
        Error,
        PhysRange,
        DISK_ALIGN, //
    },
    size::parse, //
};
use proptest::prelude::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn range(start: u64, size: u64) -> PhysRange {
    PhysRange::new(start, size).unwrap()
}

#[test]
fn messages_say_what_would_be_right() {
    let messages = [
        (
            PhysRange::new(4 * GIB, 0).unwrap_err(),
            "size 0 at 0x100000000; a disk needs at least 2MiB",
        ),
        (
            PhysRange::new(u64::MAX - 4095, 2 * GIB).unwrap_err(),
            "start 0xfffffffffffff000 with size 2GiB goes beyond the last address; \
             check both against the memory map",
        ),
        (
            split(range(4 * GIB, GIB), 0).unwrap_err(),
            "0 disks; ask for 1 or more",
        ),
        (
            split(range(4 * GIB + MIB, 2 * GIB), 2).unwrap_err(),
            "start 0x100100000 is not 2MiB aligned; \
             nearest range that works: pmem_start=0x100200000 pmem_size=2044MiB",
        ),
        (
            split(range(4 * GIB + MIB, 2 * MIB), 1).unwrap_err(),
            "start 0x100100000 is not 2MiB aligned; \
             no part of [mem 0x100100000-0x1002fffff] works; reserve a larger range",
        ),
        (
            split(range(4 * GIB, 9 * MIB), 5).unwrap_err(),
            "[mem 0x100000000-0x1008fffff] of 9MiB is too small for 5 disks of at least 2MiB; \
             the most is 4",
        ),
        (
            split(range(4 * GIB, MIB), 5).unwrap_err(),
            "[mem 0x100000000-0x1000fffff] of 1MiB is too small for 5 disks; \
             a disk needs at least 2MiB",
        ),
    ];

    for (error, message) in messages {
        assert_eq!(error.to_string(), message);
    }
}

#[test]
fn shown_as_the_kernel_shows_resources() {
    assert_eq!(range(0, 4096).to_string(), "[mem 0x00000000-0x00000fff]");
    assert_eq!(
        range(4 * GIB, 2 * GIB).to_string(),
        "[mem 0x100000000-0x17fffffff]"
    );
}

#[test]
fn the_largest_split() {
    let everything = range(0, u64::MAX);

    let disks = split(everything, u32::MAX).unwrap();
    assert_eq!(disks.disk_size() % DISK_ALIGN, 0);
    assert!(disks
        .get(u32::MAX - 1)
        .is_some_and(|disk| disk.last() < everything.last()));
    assert_eq!(disks.get(u32::MAX), None);

    let disks = split(everything, 1).unwrap();
    assert_eq!(disks.left_over(), DISK_ALIGN - 1);
}

/// Any range, most of them of a size that makes sense, some at the end of the addresses.
fn ranges() -> impl Strategy<Value = PhysRange> {
    let aligned = (0..1_u64 << 20, 1..1_u64 << 16)
        .prop_map(|(start, size)| (start * DISK_ALIGN, size * DISK_ALIGN));
    let pages =
        (0..1_u64 << 30, 1..1_u64 << 20).prop_map(|(start, size)| (start << 12, size << 12));
    let high = (any::<u64>(), 0..64_u32).prop_map(|(size, shift)| {
        let size = (size >> shift).max(1);
        (u64::MAX - size + 1, size)
    });

    prop_oneof![aligned, pages, high].prop_map(|(start, size)| range(start, size))
}

proptest! {
    #[test]
    fn a_range_is_refused_just_if_it_is_empty_or_wraps(start in any::<u64>(), size in any::<u64>()) {
        let end = u128::from(start) + u128::from(size);
        match PhysRange::new(start, size) {
            Ok(range) => {
                prop_assert_eq!(u128::from(range.last()) + 1, end);
                prop_assert_eq!((range.start(), range.size()), (start, size));
            }
            Err(Error::Empty { .. }) => prop_assert_eq!(size, 0),
            Err(Error::Wraps { .. }) => prop_assert!(end > 1 << 64),
            Err(error) => prop_assert!(false, "{error}"),
        }
    }

    #[test]
    fn ranges_overlap_just_if_one_has_an_end_of_the_other(a in ranges(), b in ranges()) {
        let has = |range: &PhysRange, addr| (range.start()..=range.last()).contains(&addr);
        let expected = [a.start(), a.last()].iter().any(|&addr| has(&b, addr))
            || [b.start(), b.last()].iter().any(|&addr| has(&a, addr));

        prop_assert_eq!(a.overlaps(&b), expected);
        prop_assert_eq!(b.overlaps(&a), expected);
    }

    #[test]
    fn disks_are_aligned_disjoint_inside_and_all(range in ranges(), count in 1..40_u32) {
        let Ok(split) = split(range, count) else {
            return Ok(());
        };
        let disks: Vec<_> = split.disks().collect();

        prop_assert_eq!(disks.len(), count as usize);
        prop_assert_eq!(split.count(), count);
        prop_assert!(disks.windows(2).all(|pair| pair[0].last() < pair[1].start()));
        for (i, disk) in disks.iter().enumerate() {
            prop_assert_eq!(split.get(i as u32), Some(*disk));
            prop_assert_eq!(disk.start() % DISK_ALIGN, 0);
            prop_assert_eq!(disk.size(), split.disk_size());
            prop_assert_eq!(disk.size() % DISK_ALIGN, 0);
            prop_assert!(disk.start() >= range.start() && disk.last() <= range.last());
        }
        prop_assert_eq!(split.get(count), None);
        let sum: u64 = disks.iter().map(PhysRange::size).sum();
        prop_assert_eq!(sum + split.left_over(), range.size());
        // No disk could be larger.
        prop_assert!(split.left_over() < u64::from(count) * DISK_ALIGN);
    }

    #[test]
    fn what_a_refusal_proposes_works(range in ranges(), count in 0..40_u32) {
        match split(range, count) {
            Ok(_) => {}
            Err(Error::ZeroCount) => prop_assert_eq!(count, 0),
            Err(Error::TooSmall { largest, .. }) => {
                prop_assert!(largest < count);
                prop_assert_eq!(split(range, largest).is_ok(), largest > 0);
            }
            Err(error @ Error::Misaligned { nearest: Some(nearest), .. }) => {
                prop_assert_eq!(split(nearest, count).unwrap().left_over(), 0);
                prop_assert!(nearest.start() >= range.start() && nearest.last() <= range.last());

                // Pasted from the message, it is the same range.
                let message = error.to_string();
                let (_, proposal) = message.split_once("pmem_start=").unwrap();
                let (start, size) = proposal.split_once(" pmem_size=").unwrap();
                let pasted = PhysRange::new(parse(start).unwrap(), parse(size).unwrap());
                prop_assert_eq!(pasted, Ok(nearest));
            }
            Err(Error::Misaligned { nearest: None, .. }) => {
                let Some(start) = range.start().checked_next_multiple_of(DISK_ALIGN) else {
                    return Ok(());
                };
                let room = range.size().saturating_sub(start - range.start());
                prop_assert!(room < u64::from(count) * DISK_ALIGN);
            }
            Err(error) => prop_assert!(false, "{error}"),
        }
    }
}
