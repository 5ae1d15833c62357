// SPDX-License-Identifier: GPL-2.0-only

//! The reserve of disks whose struct pages are on their own range: a range that was used in one way
//! is not used in the other, whatever is damaged. What goes wrong here loses somebody's disk.

#[path = "support/watched.rs"]
mod watched;

use pmem_core::{
    medium::{
        Medium,
        Unreadable, //
    },
    persist::{
        model::Memory,
        Persist,
        VolatileSlice, //
    },
    reserve::{
        check_dev,
        check_ram,
        decode,
        erase,
        write,
        Fault,
        Place,
        Refusal,
        Reserve,
        Write,
        HEADERS,
        SIZE,
        STRUCT_PAGE_SIZE, //
    },
};
use proptest::prelude::*;
use watched::Watched;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// The smallest range that has a reserve.
const RANGE: u64 = 6 * MIB;
const PAGE: usize = 4096;

/// A range with these bytes at its start, and zeroes after them.
#[derive(Clone)]
struct Range {
    start: Vec<u8>,
    /// The pages that cannot be read.
    bad: Vec<u64>,
}

impl Range {
    fn new(start: impl Into<Vec<u8>>) -> Self {
        Self {
            start: start.into(),
            bad: Vec::new(),
        }
    }

    /// One with a header for `range` bytes.
    fn with_header(range: u64) -> Self {
        let mut start = vec![0; HEADERS as usize];
        let header = Reserve::of(range).unwrap().encode();
        start[..SIZE].copy_from_slice(&header);
        start[PAGE..][..SIZE].copy_from_slice(&header);
        Self::new(start)
    }

    fn dev(&self) -> Result<(Reserve, Option<Write>), Refusal> {
        check_dev(self, RANGE, STRUCT_PAGE_SIZE)
    }

    fn ram(&self) -> Result<(), Refusal> {
        check_ram(self, false).map(|erase| assert_eq!(erase, None))
    }
}

impl Medium for Range {
    fn size(&self) -> u64 {
        RANGE
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Unreadable> {
        if self.bad.contains(&(offset / PAGE as u64)) {
            return Err(Unreadable { offset });
        }
        let start = self.start.get(offset as usize..).unwrap_or_default();
        let len = start.len().min(buf.len());
        buf[..len].copy_from_slice(&start[..len]);
        buf[len..].fill(0);
        Ok(())
    }
}

fn reserve() -> Reserve {
    Reserve::of(RANGE).unwrap()
}

#[test]
fn a_blank_range_is_used_in_either_way() {
    let blank = Range::new([]);
    assert_eq!(blank.dev(), Ok((reserve(), Some(Write::Header))));
    assert_eq!(blank.ram(), Ok(()));
}

#[test]
fn a_header_is_found_and_refused_for_ram() {
    let range = Range::with_header(RANGE);
    assert_eq!(range.dev(), Ok((reserve(), None)));
    assert_eq!(range.ram(), Err(Refusal::HasHeader(reserve())));
    assert_eq!(
        Refusal::HasHeader(reserve()).to_string(),
        "its header says a disk of 6MiB with 2MiB of data from 4MiB on: its struct pages are on \
         the range; load with pmem_memmap=dev; pmem_memmap=ram with pmem_memmap_force=1 destroys \
         the header"
    );
    let erase = check_ram(&range, true).unwrap().unwrap();
    assert_eq!(
        erase.to_string(),
        "the header of a disk of 6MiB with 2MiB of data from 4MiB on is destroyed, as \
         pmem_memmap_force says; that data is now from byte 4194304 of the disk on"
    );
}

#[test]
fn another_size_is_refused() {
    let found = Reserve::of(GIB).unwrap();
    let expected = reserve();
    let refusal = Refusal::Mismatch { found, expected };
    assert_eq!(Range::with_header(GIB).dev(), Err(refusal));
    assert_eq!(
        refusal.to_string(),
        "its header says a disk of 1GiB with 1006MiB of data from 18MiB on, but this is a disk of \
         6MiB with 2MiB of data from 4MiB on; give the pmem_start, pmem_size and pmem_count that \
         it was made with; pmem_memmap=ram with pmem_memmap_force=1 destroys the header"
    );
}

#[test]
fn what_has_data_is_not_given_a_header() {
    let places = [0, 1, 128, 1080, 4095, 4096, 5000, 8192, 4 * MIB - 1];
    for at in places.map(|at| at as usize) {
        let mut start = vec![0; at + 1];
        start[at] = 0x53;
        let refusal = Refusal::NotBlank {
            at: at as u64,
            expected: reserve(),
        };
        let range = Range::new(start);
        assert_eq!(range.dev(), Err(refusal));
        assert_eq!(range.ram(), Ok(()), "byte {at}");
    }

    // Where the data of the disk would be, anything may be.
    let mut start = vec![0; 4 * MIB as usize + 1];
    start[4 * MIB as usize] = 1;
    assert_eq!(
        Range::new(start).dev(),
        Ok((reserve(), Some(Write::Header)))
    );

    assert_eq!(
        Refusal::NotBlank {
            at: 1080,
            expected: reserve()
        }
        .to_string(),
        "it has no header, and data at byte 0x438, where its struct pages would be; load with \
         pmem_memmap=ram; to lose that data, blkdiscard -z -o 0 -l 4194304 the disk then"
    );
}

#[test]
fn larger_struct_pages_are_refused_and_smaller_ones_fit() {
    for range in [Range::new([]), Range::with_header(RANGE)] {
        let check = |size| check_dev(&range, RANGE, size).map(|(reserve, _)| reserve);
        assert_eq!(check(80), Err(Refusal::StructPages { size: 80 }));
        assert_eq!(check(64), Ok(reserve()));
        assert_eq!(check(56), Ok(reserve()));
    }
    assert!(matches!(
        check_dev(&Range::new([]), 4 * MIB, 64),
        Err(Refusal::TooSmall { .. })
    ));
}

/// A copy that is damaged is written again, with the other one as its witness.
#[test]
fn each_flipped_bit_of_one_copy_is_found() {
    for (place, at) in [(Place::First, 0), (Place::Second, PAGE)] {
        for bit in 0..SIZE * 8 {
            let mut range = Range::with_header(RANGE);
            range.start[at + bit / 8] ^= 1 << (bit % 8);
            match range.dev() {
                Ok((found, Some(Write::Copy(damaged, fault)))) => {
                    assert_eq!((found, damaged), (reserve(), place));
                    assert_eq!(
                        matches!(fault, Fault::Magic(_)),
                        bit < 64,
                        "bit {bit}: {fault}"
                    );
                }
                other => panic!("bit {bit}: {other:?}"),
            }
            assert_eq!(range.ram(), Err(Refusal::HasHeader(reserve())));
        }
    }
}

#[test]
fn each_flipped_bit_of_both_copies_is_refused() {
    for bit in 0..SIZE * 8 {
        let mut range = Range::with_header(RANGE);
        for at in [0, PAGE] {
            range.start[at + bit / 8] ^= 1 << (bit % 8);
        }
        let refusal = range.dev().unwrap_err();
        let (damaged, other) = match refusal {
            Refusal::Damaged { .. } => (true, false),
            Refusal::NotBlank { .. } => (false, true),
            _ => (false, false),
        };
        // Without a magic it is not known that it was a header, but it is not overwritten.
        assert_eq!((damaged, other), (bit >= 64, bit < 64), "{refusal}");
        if damaged {
            assert_eq!(range.ram(), Err(refusal));
            assert!(check_ram(&range, true).unwrap().is_some());
            assert!(refusal.to_string().contains("pmem_memmap_force=1"));
        }
    }
}

/// Two headers that are valid and differ: which one counts is not for us to say.
#[test]
fn copies_that_differ_are_refused() {
    let mut range = Range::with_header(RANGE);
    range.start[PAGE..][..SIZE].copy_from_slice(&Reserve::of(GIB).unwrap().encode());
    let refusal = Refusal::Damaged {
        first: None,
        second: None,
    };
    assert_eq!(range.dev(), Err(refusal));
    assert_eq!(range.ram(), Err(refusal));
}

#[test]
fn what_cannot_be_read_is_not_guessed() {
    let bad = |range: Range, pages: &[u64]| Range {
        bad: pages.to_vec(),
        ..range
    };
    let header = || Range::with_header(RANGE);
    let blank = || Range::new([]);

    for page in [0, 1] {
        let range = bad(header(), &[page]);
        assert!(matches!(
            range.dev(),
            Ok((
                _,
                Some(Write::Copy(_, Fault::Unreadable(Unreadable { .. })))
            ))
        ));
        assert_eq!(range.ram(), Err(Refusal::HasHeader(reserve())));
        // One bad page is what a disk without a header may have, too.
        assert_eq!(bad(blank(), &[page]).ram(), Ok(()));
        assert!(matches!(
            bad(blank(), &[page]).dev(),
            Err(Refusal::Unreadable(_))
        ));
    }
    for range in [header(), blank()] {
        let range = bad(range, &[0, 1]);
        assert!(matches!(range.ram(), Err(Refusal::Unreadable(_))));
        assert!(matches!(range.dev(), Err(Refusal::Unreadable(_))));
        assert!(check_ram(&range, true).unwrap().is_some());
    }
    assert!(matches!(
        bad(blank(), &[700]).dev(),
        Err(Refusal::Unreadable(_))
    ));
    assert_eq!(bad(header(), &[700]).dev(), Ok((reserve(), None)));
}

/// As [`watched::each_power_loss`], on a range with this start.
fn each_power_loss(
    start: &[u8],
    change: impl Fn(&Persist<Watched<'_>>, VolatileSlice<'_>),
    check: impl Fn(Range),
) -> (Range, usize) {
    let check = |image: &[u8]| check(Range::new(image));
    let (left, seen) = watched::each_power_loss(start, 500, change, check);
    (Range::new(left), seen)
}

/// The next load makes a header of it, or has one; never is it somebody else's data.
#[test]
fn power_loss_while_the_header_is_written() {
    let (left, seen) = each_power_loss(
        &[0; HEADERS as usize],
        |persist, medium| assert!(write(persist, medium, &reserve(), Write::Header)),
        |image| {
            let (found, _) = image.dev().unwrap();
            assert_eq!(found, reserve());
            let has_header = matches!(image.ram(), Err(Refusal::HasHeader(_)));
            assert!(has_header || image.ram().is_ok());
        },
    );
    assert_eq!(left.start, Range::with_header(RANGE).start);
    assert!(seen > 500, "{seen}");
}

#[test]
fn power_loss_while_a_copy_is_written_again() {
    for (at, place) in [(0, Place::First), (PAGE, Place::Second)] {
        let mut damaged = Range::with_header(RANGE);
        for byte in [3, 20, 70, 3000] {
            damaged.start[at + byte] ^= 0xff;
        }
        let fault = Fault::Magic(0);
        let (left, _) = each_power_loss(
            &damaged.start,
            |persist, medium| {
                assert!(write(
                    persist,
                    medium,
                    &reserve(),
                    Write::Copy(place, fault)
                ))
            },
            |image| {
                assert_eq!(image.dev().unwrap().0, reserve());
                assert_eq!(image.ram(), Err(Refusal::HasHeader(reserve())));
            },
        );
        assert_eq!(left.start, Range::with_header(RANGE).start);
    }
}

/// A header that is half gone must not be found valid with something else behind it, but forcing it
/// once more must help.
#[test]
fn power_loss_while_the_header_is_erased() {
    let (left, _) = each_power_loss(
        &Range::with_header(RANGE).start,
        |persist, medium| assert!(erase(persist, medium)),
        |image| assert!(check_ram(&image, true).is_ok()),
    );
    assert_eq!(left.start, [0; HEADERS as usize]);
    assert_eq!(left.ram(), Ok(()));
}

/// The check that the tests of power loss see something.
#[test]
fn a_write_without_fences_is_caught() {
    let memory = Memory::boot(&[0; HEADERS as usize]);
    let machine = Watched {
        memory: &memory,
        before_fence: None,
    };
    assert!(write(
        &Persist::on(machine),
        memory.slice(),
        &reserve(),
        Write::Header
    ));
    assert!(memory
        .crash_images(1000, 0)
        .any(|image| Range::new(image).dev().is_err()));
}

#[test]
fn a_medium_that_is_too_short_is_not_written() {
    let memory = Memory::boot(&[7; HEADERS as usize - 8]);
    let persist = Persist::on(Watched {
        memory: &memory,
        before_fence: None,
    });
    let medium = memory.slice();
    assert!(!write(&persist, medium, &reserve(), Write::Header));
    assert!(!erase(&persist, medium));
    assert_eq!(memory.in_flight(), 0);
}

/// What the kernel needs of the room: whole sections of 128 MiB have 2 MiB each, at a multiple of
/// 2 MiB, after the header.
fn needed(start: u64, range: u64) -> u64 {
    const SECTION: u64 = 128 * MIB;
    let first = start.next_multiple_of(SECTION);
    let sections = (start + range).saturating_sub(first) / SECTION;
    if sections == 0 {
        HEADERS
    } else {
        2 * MIB + sections * 2 * MIB
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(
        start in proptest::collection::vec(any::<u8>(), 0..3 * PAGE),
        range in any::<u64>(),
        size in any::<u64>(),
        force in any::<bool>(),
    ) {
        let mut header = [0; SIZE];
        for (to, from) in header.iter_mut().zip(&start) {
            *to = *from;
        }
        let _ = decode(&header);
        let medium = Range::new(start);
        if range < GIB {
            let _ = check_dev(&medium, range, size).map_err(|refusal| refusal.to_string());
        }
        let _ = Reserve::of(range);
        let _ = check_ram(&medium, force).map_err(|refusal| refusal.to_string());
    }

    /// Arbitrary fields with the right checksum, as no other software writes them.
    #[test]
    fn arbitrary_fields_never_panic(fields in any::<[u8; SIZE - 12]>(), range in 3_u64..512) {
        let mut header = Reserve::of(range * 2 * MIB).unwrap().encode();
        header[8..SIZE - 4].copy_from_slice(&fields);
        let sum = pmem_core::medium::crc32c(&header[..SIZE - 4]);
        header[SIZE - 4..].copy_from_slice(&sum.to_le_bytes());
        let fault = decode(&header).unwrap_err();
        let mut start = header.to_vec();
        start.resize(PAGE, 0);
        start.extend(header);
        let refusal = Range::new(start).dev().unwrap_err();
        prop_assert_eq!(refusal, Refusal::Damaged { first: Some(fault), second: Some(fault) });
        prop_assert!(refusal.to_string().contains(&fault.to_string()));
    }

    #[test]
    fn what_is_encoded_is_decoded(range in 3_u64..1 << 40) {
        let reserve = Reserve::of(range * 2 * MIB).unwrap();
        prop_assert_eq!(decode(&reserve.encode()), Ok(reserve));
        prop_assert_eq!(reserve.size() + reserve.data_size(), reserve.range());
        prop_assert_eq!(reserve.size() % (2 * MIB), 0);
        prop_assert!(reserve.data_size() > 0);
    }

    #[test]
    fn struct_pages_fit(start in 0_u64..1 << 20, range in 3_u64..1 << 20) {
        let (start, range) = (start * 2 * MIB, range * 2 * MIB);
        let reserve = Reserve::of(range).unwrap();
        prop_assert!(needed(start, range) <= reserve.size());
    }
}
