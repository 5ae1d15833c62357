// SPDX-License-Identifier: GPL-2.0-only

//! Extents: a request is accepted just if the disk has all of its bytes.

use pmem_core::extent::{
    Error,
    Extent,
    PageOffset,
    Sector,
    PAGE_SIZE,
    SECTOR_SIZE, //
};
use proptest::prelude::*;

#[test]
fn messages_say_where_the_disk_ends() {
    let error = Extent::from_sectors(Sector(2047), 4096, 1 << 20).unwrap_err();
    assert_eq!(
        error.to_string(),
        "4096 bytes at sector 2047 reach beyond the end of the disk at sector 2048"
    );

    let error = Extent::from_pages(PageOffset(255), 2, 1 << 20).unwrap_err();
    assert_eq!(
        error.to_string(),
        "2 pages at page 255 reach beyond the end of the disk at page 256"
    );
}

/// Numbers of all magnitudes.
fn number() -> impl Strategy<Value = u64> {
    (any::<u64>(), 0..64_u32).prop_map(|(number, shift)| number >> shift)
}

/// A number near to where a disk ends, in units of `unit`, or any.
fn near(disk: u64, unit: u64) -> impl Strategy<Value = u64> {
    let end = disk / unit;
    prop_oneof![end.saturating_sub(3)..=end.saturating_add(3), number()]
}

proptest! {
    #[test]
    fn sectors(
        (sector, len, disk) in number()
            .prop_flat_map(|disk| (near(disk, SECTOR_SIZE), near(disk, 1), Just(disk)))
    ) {
        let offset = u128::from(sector) * u128::from(SECTOR_SIZE);
        let fits = offset + u128::from(len) <= u128::from(disk);
        let sector = Sector(sector);

        match Extent::from_sectors(sector, len, disk) {
            Ok(extent) => {
                prop_assert!(fits);
                prop_assert_eq!(u128::from(extent.offset()), offset);
                prop_assert_eq!(extent.len(), len);
                prop_assert!(extent.end() <= disk);
            }
            Err(error) => {
                prop_assert!(!fits);
                prop_assert_eq!(error, Error::Sectors { sector, len, disk });
            }
        }
    }

    #[test]
    fn small_requests_near_the_end(sector in 0..20_u64, len in 0..9000_u64, disk in 0..9000_u64) {
        prop_assert_eq!(
            Extent::from_sectors(Sector(sector), len, disk).is_ok(),
            sector * SECTOR_SIZE + len <= disk
        );
    }

    #[test]
    fn pages(
        (pgoff, nr_pages, disk) in number()
            .prop_flat_map(|disk| (near(disk, PAGE_SIZE), near(disk, PAGE_SIZE), Just(disk)))
    ) {
        let offset = u128::from(pgoff) * u128::from(PAGE_SIZE);
        let len = u128::from(nr_pages) * u128::from(PAGE_SIZE);
        let fits = offset + len <= u128::from(disk);
        let pgoff = PageOffset(pgoff);

        match Extent::from_pages(pgoff, nr_pages, disk) {
            Ok(extent) => {
                prop_assert!(fits);
                prop_assert_eq!(u128::from(extent.offset()), offset);
                prop_assert_eq!(u128::from(extent.len()), len);
            }
            Err(error) => {
                prop_assert!(!fits);
                prop_assert_eq!(error, Error::Pages { pgoff, nr_pages, disk });
            }
        }
    }
}
