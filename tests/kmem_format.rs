// SPDX-License-Identifier: GPL-2.0-only

//! The format of a range that is memory and storage at once: what is written is read back, whatever
//! is damaged is found, and a loss of power at any time leaves what was there or what is new. What
//! goes wrong here loses somebody's disk.

#[path = "support/watched.rs"]
mod watched;

use pmem_core::{
    kmem::{
        bitmap::Bitmap,
        layout::{
            self,
            Layout, //
        },
        scan::{
            hold_metadata,
            scan,
            EntryFault,
            Kind,
            Scan, //
        },
        superblock::{
            self,
            decode,
            format,
            probe,
            update,
            Fault,
            Format,
            Found,
            Place,
            ProbeError,
            Repair,
            State,
            Superblock,
            Uuid, //
        },
        Block,
        Page, //
    },
    medium::{
        crc32c,
        Medium,
        Unreadable, //
    },
    persist::{model::Memory, Persist},
};
use proptest::prelude::*;
use std::{
    cell::{
        RefCell, //
    },
    collections::{
        BTreeMap,
        BTreeSet, //
    },
    sync::{
        atomic::AtomicU64,
        LazyLock, //
    },
};
use watched::{
    each_power_loss,
    Watched, //
};

const PAGE: usize = 4096;

/// The most pages that have addresses.
const MAX: u64 = u64::MAX / 4096;

/// The bytes of a superblock.
const SIZE: usize = superblock::SIZE;

/// Random numbers, the same for the same seed: SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() >> 8) as usize % end
    }

    fn of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len())]
    }
}

/// CRC32C by a table, which is not how the driver does it.
fn reference_crc(bytes: &[u8]) -> u32 {
    static TABLE: LazyLock<Vec<u32>> = LazyLock::new(|| {
        let step = |c: u32| (c >> 1) ^ if c & 1 != 0 { 0x82f6_3b78 } else { 0 };
        (0..256).map(|i| (0..8).fold(i, |c, _| step(c))).collect()
    });
    !bytes.iter().fold(!0, |crc, &byte| {
        (crc >> 8) ^ TABLE[(crc as u8 ^ byte) as usize]
    })
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn words(bits: u64) -> Vec<AtomicU64> {
    (0..Bitmap::words(bits).unwrap())
        .map(|_| AtomicU64::new(0))
        .collect()
}

/// The numbers of the bits that are set.
fn members(words: &[AtomicU64]) -> BTreeSet<u64> {
    let bitmap = Bitmap::new(words);
    bitmap
        .ones(0..bitmap.len())
        .flat_map(|(first, len)| first..first + len)
        .collect()
}

#[test]
fn checksums_are_castagnoli() {
    // RFC 3720, appendix B.4, and the check value that catalogues of CRCs give.
    let ascending: Vec<u8> = (0..32).collect();
    let descending: Vec<u8> = (0..32).rev().collect();
    let read: [u8; 48] = [
        0x01, 0xc0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x14, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0,
        0x14, 0, 0, 0, 0x18, 0x28, 0, 0, 0, 0, 0, 0, 0, 0x02, 0, 0, 0, 0, 0, 0, 0,
    ];
    let vectors: [(&[u8], u32); 7] = [
        (b"", 0),
        (b"123456789", 0xe306_9283),
        (&[0; 32], 0x8a91_36aa),
        (&[0xff; 32], 0x62a8_ab43),
        (&ascending, 0x46dd_794e),
        (&descending, 0x113f_db5c),
        (&read, 0xd996_3a56),
    ];
    for (bytes, crc) in vectors {
        assert_eq!(crc32c(bytes), crc, "{bytes:x?}");
        assert_eq!(reference_crc(bytes), crc, "{bytes:x?}");
    }
}

fn layouts() -> impl Strategy<Value = Layout> {
    let pages = prop_oneof![68..5000_u64, 68..MAX + 1, Just(MAX)];
    prop_oneof![
        pages.clone().prop_map(|pages| Layout::blk(pages).unwrap()),
        pages.prop_map(|pages| Layout::none(pages).unwrap()),
        (1..100_000_u64, 1..2000_u64).prop_map(|(blocks, spare)| {
            let index = blocks.div_ceil(512);
            Layout::from_parts(2 + index + blocks + spare, index, blocks, spare).unwrap()
        }),
    ]
}

fn superblocks() -> impl Strategy<Value = Superblock> {
    (layouts(), any::<[u8; 16]>(), any::<bool>(), any::<u64>()).prop_map(
        |(layout, uuid, in_use, generation)| Superblock {
            layout,
            uuid: Uuid(uuid),
            state: if in_use { State::InUse } else { State::Clean },
            generation,
        },
    )
}

proptest! {
    #[test]
    fn superblocks_are_read_as_they_were_written(superblock in superblocks()) {
        let bytes = superblock.encode();
        prop_assert_eq!(decode(&bytes), Ok(superblock));
        prop_assert_eq!(u32_at(&bytes, 124), reference_crc(&bytes[..124]));
        prop_assert_eq!(superblock.format() == Format::None, superblock.layout.blocks() == 0);
    }

    #[test]
    fn no_superblock_panics(mut bytes in any::<[u8; SIZE]>(), magic: bool, seal: bool) {
        if magic {
            bytes[..8].copy_from_slice(b"SREPMEMK");
        }
        if seal {
            let crc = reference_crc(&bytes[..124]);
            bytes[124..].copy_from_slice(&crc.to_le_bytes());
        }
        if let Err(fault) = decode(&bytes) {
            prop_assert!(!fault.to_string().is_empty());
        }
    }

    #[test]
    fn sealed_fields_are_checked(
        superblock in superblocks(),
        at in prop::sample::select(&[8_usize, 12, 20, 28, 48, 56, 64, 68][..]),
        value: u32,
    ) {
        let mut bytes = superblock.encode();
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        let crc = reference_crc(&bytes[..124]);
        bytes[124..].copy_from_slice(&crc.to_le_bytes());
        prop_assert_eq!(decode(&bytes).ok(), reference_decode(&bytes));
    }

    #[test]
    fn a_layout_uses_each_page_once(pages in prop_oneof![68..3000_u64, 68..MAX + 1]) {
        let layout = Layout::blk(pages).unwrap();
        let data = layout.data();

        prop_assert_eq!(layout.pages(), pages);
        prop_assert_eq!(data.start, 1 + layout.index_pages());
        prop_assert_eq!(data.end, layout.copy().0);
        prop_assert_eq!(data.end - data.start, layout.blocks() + layout.spare_pages());
        prop_assert!((64..=1025).contains(&layout.spare_pages()));

        // The index has an entry for each block, and none of its pages has none.
        prop_assert!(layout.blocks() <= layout.index_pages() * 512);
        prop_assert!(layout.blocks() > (layout.index_pages() - 1) * 512);
        let last = Block(layout.blocks() - 1);
        prop_assert!(layout.entry_offset(last).unwrap() < data.start * 4096);

        // Not one more fits beside the spare pages.
        let spare = (pages / 1024).clamp(64, 1024);
        let blocks = layout.blocks() + 1;
        prop_assert!(2 + spare + blocks + blocks.div_ceil(512) > pages);
    }

    #[test]
    fn a_bitmap_is_a_set(
        len in 1..6_usize,
        operations in prop::collection::vec((any::<bool>(), 0..400_u64), 0..300),
        from in 0..400_u64,
        to in 0..400_u64,
        fill: bool,
    ) {
        let words: Vec<_> = (0..len).map(|_| AtomicU64::new(if fill { u64::MAX } else { 0 })).collect();
        let bitmap = Bitmap::new(&words);
        let mut set = vec![fill; len * 64];

        for (value, bit) in operations {
            match set.get_mut(bit as usize) {
                None if value => prop_assert!(bitmap.set(bit)),
                None => prop_assert!(!bitmap.clear(bit)),
                Some(place) => {
                    let old = if value { bitmap.set(bit) } else { bitmap.clear(bit) };
                    prop_assert_eq!(old, std::mem::replace(place, value));
                    prop_assert_eq!(bitmap.test(bit), value);
                }
            }
        }
        for value in [false, true] {
            let mut runs: Vec<(u64, u64)> = Vec::new();
            for bit in (from..to).filter(|&bit| set.get(bit as usize) == Some(&value)) {
                match runs.last_mut() {
                    Some((first, len)) if *first + *len == bit => *len += 1,
                    _ => runs.push((bit, 1)),
                }
            }
            let found = if value { bitmap.ones(from..to) } else { bitmap.zeros(from..to) };
            prop_assert_eq!(found.collect::<Vec<_>>(), runs);
        }
    }
}

#[test]
fn each_flipped_bit_is_found() {
    for layout in [Layout::none(2), Layout::blk(68), Layout::blk(1 << 28)] {
        let superblock = Superblock::new(layout.unwrap(), Uuid::from_random([0x5a; 16]));
        for bit in 0..SIZE * 8 {
            let mut bytes = superblock.encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            match decode(&bytes) {
                Err(Fault::Magic(_)) => assert!(bit < 64),
                Err(Fault::Checksum { found, computed }) => {
                    assert!(bit >= 64);
                    assert_ne!(found, computed);
                }
                other => panic!("bit {bit}: {other:?}"),
            }
        }
    }
}

#[test]
fn each_lost_granule_is_found() {
    // A page that is written halfway when the power is lost: any granules are old, any are new.
    let layout = Layout::blk(68).unwrap();
    let old = Superblock {
        generation: 0xffff,
        ..Superblock::new(layout, Uuid([7; 16]))
    };
    for new in [
        old.next(State::InUse),
        old.next(State::Clean),
        Superblock::new(Layout::none(68).unwrap(), Uuid([8; 16])),
    ] {
        let (from, to) = (old.encode(), new.encode());
        let changed: Vec<usize> = (0..SIZE)
            .step_by(8)
            .filter(|&at| from[at..at + 8] != to[at..at + 8])
            .collect();
        assert!(changed.len() >= 2);
        for way in 0_u32..1 << changed.len() {
            let mut bytes = from;
            for (i, &at) in changed.iter().enumerate() {
                if (way >> i) & 1 != 0 {
                    bytes[at..at + 8].copy_from_slice(&to[at..at + 8]);
                }
            }
            match decode(&bytes) {
                Ok(superblock) => assert_eq!(superblock, if way == 0 { old } else { new }),
                Err(fault) => assert!(matches!(fault, Fault::Checksum { .. }), "{fault}"),
            }
        }
    }
}

#[test]
fn messages_name_the_remedy() {
    let fault = Fault::Checksum {
        found: 1,
        computed: 0xabcd_ef01,
    };
    let cases = [
        (
            ProbeError::Unformatted,
            "there is no superblock; kmem_format=none or kmem_format=blk formats the range",
        ),
        (
            ProbeError::Damaged { primary: fault, second: Fault::Magic(0) },
            "there is no valid superblock (primary: its checksum is 0x00000001, that of its bytes \
             is 0xabcdef01; second: there is none); kmem_format with kmem_format_force=1 formats \
             the range anew and loses its data",
        ),
        (
            ProbeError::Damaged { primary: Fault::Proposed, second: Fault::Proposed },
            "there is no valid superblock (primary: it is of the format that was proposed in 2022, \
             which has no checksum; second: it is of the format that was proposed in 2022, which \
             has no checksum); kmem_format with kmem_format_force=1 formats the range anew and \
             loses its data",
        ),
        (
            ProbeError::Damaged { primary: Fault::Magic(0x1234), second: Fault::Pages(1 << 18) },
            "there is no valid superblock (primary: there is none, but 0x0000000000001234; second: \
             it is of another range of 1GiB that ends here); kmem_format with kmem_format_force=1 \
             formats the range anew and loses its data",
        ),
        (
            ProbeError::Size { range: 1 << 18, superblock: 1 << 19 },
            "the superblock is of a range of 2GiB, this one has 1GiB; give kmem_size=2147483648",
        ),
        (
            ProbeError::TooSmall { size: 4096 },
            "a range of 4KiB has no room for two superblocks; give a larger kmem_size",
        ),
    ];
    for (error, message) in cases {
        assert_eq!(error.to_string(), message);
    }

    assert_eq!(
        Layout::blk(67).unwrap_err().to_string(),
        "a range of 67 pages of 4096 bytes is too small; the smallest has 68"
    );
    assert_eq!(
        layout::Error::Parts {
            pages: 9,
            index_pages: 1,
            blocks: 2,
            spare_pages: 3
        }
        .to_string(),
        "1 pages of index, 2 blocks and 3 spare pages do not make a range of 9 pages"
    );
    assert_eq!(
        Uuid(*b"\x01\x23\x45\x67\x89\xab\xcd\xef\x01\x23\x45\x67\x89\xab\xcd\xef").to_string(),
        "01234567-89ab-cdef-0123-456789abcdef"
    );
    assert_eq!(format!("{} {}", Format::None, Format::Blk), "none blk");
    assert_eq!(
        format!("{}, {}", State::Clean, State::InUse),
        "clean, in use"
    );
    let entry = |kind| {
        EntryFault {
            block: Block(5),
            page: 9,
            kind,
        }
        .to_string()
    };
    assert_eq!(entry(Kind::NotData), "block 5: page 9 cannot have data");
    assert_eq!(
        entry(Kind::Twice),
        "block 5: page 9 has data of another block"
    );
    assert_eq!(
        entry(Kind::NoBlock),
        "block 5: page 9, but the disk has no such block"
    );
    assert_eq!(
        entry(Kind::Unreadable),
        "block 5 and those in the same 512 bytes of the index: cannot be read"
    );
}

// What a loss of power leaves.

/// A range with a disk, on which some blocks have data.
fn disk(pages: u64, random: &mut Random) -> Vec<u8> {
    let layout = Layout::blk(pages).unwrap();
    let superblock = Superblock {
        generation: 3,
        ..Superblock::new(layout, Uuid::from_random([1; 16]))
    };
    let mut image = vec![0; pages as usize * PAGE];
    let mut free: Vec<u64> = layout.data().collect();

    for block in (0..layout.blocks()).filter(|block| block % 3 != 1) {
        let page = free.swap_remove(random.below(free.len()));
        let at = layout.entry_offset(Block(block)).unwrap() as usize;
        image[at..at + 8].copy_from_slice(&page.to_le_bytes());
    }
    for page in [Page(0), layout.copy()] {
        let at = layout.page_offset(page).unwrap() as usize;
        image[at..at + SIZE].copy_from_slice(&superblock.encode());
    }
    image
}

/// The bytes of the index.
fn index<'a>(image: &'a [u8], layout: &Layout) -> &'a [u8] {
    &image[PAGE..][..layout.index_pages() as usize * PAGE]
}

fn probed(image: &[u8]) -> Result<Found, ProbeError> {
    probe(&image)
}

/// The first page, and the rest without the last page, of zeros: a range of two pages or more.
fn copies(pages: usize, primary: &[u8], second: &[u8]) -> Vec<u8> {
    let mut image = vec![0; pages * PAGE];
    image[..primary.len()].copy_from_slice(primary);
    image[(pages - 1) * PAGE..][..second.len()].copy_from_slice(second);
    image
}

#[test]
fn power_loss_while_a_range_is_formatted() {
    const PAGES: u64 = 72;
    let mut random = Random(1);
    let old = disk(PAGES, &mut random);
    let old_found = probed(&old).unwrap();
    let mut damaged = old_found.superblock.encode();
    damaged[40] ^= 1;

    // What is there before: nothing, something else, a disk, one that was not in order.
    let mut garbage = vec![0; old.len()];
    garbage.fill_with(|| random.next() as u8);
    let mut stale = old.clone();
    stale[..SIZE].copy_from_slice(&old_found.superblock.next(State::InUse).encode());
    let mut half = old.clone();
    half[..SIZE].copy_from_slice(&damaged);
    let starts = [vec![0; old.len()], garbage, old, stale, half];

    let uuid = Uuid::from_random([2; 16]);
    for layout in [Layout::none(PAGES), Layout::blk(PAGES)] {
        let new = Superblock::new(layout.unwrap(), uuid);
        for start in &starts {
            let was = probed(start);
            let is_damaged =
                was.is_ok_and(|was| matches!(was.repair, Some((_, Repair::Damaged(_)))));
            let outcomes = RefCell::new(BTreeSet::new());

            let (left, seen) = each_power_loss(
                start,
                150,
                |persist, medium| format(persist, medium, &new).unwrap(),
                |image| match probed(image) {
                    Err(ProbeError::Unformatted) => {
                        outcomes.borrow_mut().insert("none");
                    }
                    Ok(found) if found.superblock.uuid == uuid => {
                        assert_eq!(found.superblock, new);
                        assert!(!matches!(found.repair, Some((_, Repair::Damaged(_)))));
                        assert!(index(image, &new.layout).iter().all(|&byte| byte == 0));
                        outcomes.borrow_mut().insert("new");
                    }
                    Ok(found) => {
                        let layout = was.unwrap().superblock.layout;
                        assert_eq!(found.superblock.layout, layout);
                        assert_eq!(index(image, &layout), index(start, &layout));
                        outcomes.borrow_mut().insert("old");
                    }
                    // One of its copies was damaged before, so that it was its user's wish.
                    Err(ProbeError::Damaged { second, .. }) => {
                        assert!(is_damaged);
                        assert_eq!(second, Fault::Magic(0));
                    }
                    Err(error) => panic!("{error}"),
                },
            );

            assert!(seen > 300, "{seen} images");
            assert_eq!(
                probed(&left),
                Ok(Found {
                    superblock: new,
                    repair: None
                })
            );
            assert!(left[SIZE..PAGE].iter().all(|&byte| byte == 0));
            assert!(left[left.len() - PAGE + SIZE..]
                .iter()
                .all(|&byte| byte == 0));
            let expected = if was.is_ok() {
                vec!["new", "none", "old"]
            } else {
                vec!["new", "none"]
            };
            assert!(outcomes.borrow().iter().eq(&expected));
        }
    }
}

#[test]
fn a_format_without_fences_is_caught() {
    let old = disk(72, &mut Random(1));
    let new = Superblock::new(Layout::blk(72).unwrap(), Uuid([2; 16]));
    let memory = Memory::boot(&old);
    let machine = Watched {
        memory: &memory,
        before_fence: None,
    };
    format(&Persist::on(machine), memory.slice(), &new).unwrap();

    assert!(memory
        .crash_images(1000, 0)
        .any(|image| match probed(&image) {
            Ok(found) if found.superblock == new =>
                index(&image, &new.layout).iter().any(|&b| b != 0),
            Ok(found) => index(&image, &found.superblock.layout) != index(&old, &new.layout),
            Err(error) => error != ProbeError::Unformatted,
        }));
}

#[test]
fn power_loss_while_the_superblock_is_updated() {
    const PAGES: usize = 2;
    // Three granules change at a time, so that each way to lose some of them is seen many times.
    const IMAGES: usize = 600;

    let layout = Layout::none(PAGES as u64).unwrap();
    let older = Superblock {
        generation: 9,
        ..Superblock::new(layout, Uuid([1; 16]))
    };
    let old = older.next(State::InUse);
    let new = old.next(State::Clean);
    let (older, valid) = (older.encode(), old.encode());
    let mut torn = valid;
    torn[72..80].copy_from_slice(&11_u64.to_le_bytes());
    let mut damaged = valid;
    damaged[40] ^= 0x10;

    // The copy that is not the one that counts, and whether a power loss can have left it.
    let others: [(&[u8], bool); 5] = [
        (&valid, true),
        (&older, true),
        (&torn, true),
        (&[], true),
        (&damaged, false),
    ];
    for (other, in_order) in others {
        for place in [Place::Primary, Place::Second] {
            let start = match place {
                Place::Primary => copies(PAGES, other, &valid),
                Place::Second => copies(PAGES, &valid, other),
            };
            let found = probed(&start).unwrap();
            assert_eq!(found.superblock, old);
            let repair = found.repair.map(|(place, _)| place);
            assert_eq!(repair, (other != valid).then_some(place));

            let outcomes = RefCell::new(BTreeSet::new());
            let (left, seen) = each_power_loss(
                &start,
                IMAGES,
                |persist, medium| update(persist, medium, &new, repair).unwrap(),
                |image| {
                    let found = probed(image).unwrap();
                    assert!(found.superblock == old || found.superblock == new);
                    if let Some((_, Repair::Damaged(_))) = found.repair {
                        assert!(!in_order, "{found:?}");
                    }
                    outcomes.borrow_mut().insert(found.superblock.generation);
                },
            );
            assert!(seen > 2 * IMAGES, "{seen} images");
            assert_eq!(
                probed(&left),
                Ok(Found {
                    superblock: new,
                    repair: None
                })
            );
            assert!(outcomes.borrow().iter().eq(&[10, 11]));
        }
    }
}

#[test]
fn a_chain_of_power_losses_keeps_the_range() {
    // Each boot finds what the last one left, updates it, and loses power again.
    const PAGES: u64 = 72;
    let mut random = Random(4);
    let start = disk(PAGES, &mut random);
    let layout = Layout::blk(PAGES).unwrap();

    for seed in 0..60 {
        let mut image = start.clone();
        let mut generation = 3;
        for boot in 0..6 {
            let found = probed(&image).unwrap();
            assert!(found.superblock.generation >= generation);
            assert!(found.superblock.generation <= generation + 1);
            generation = found.superblock.generation;
            let new = found
                .superblock
                .next(random.of(&[State::Clean, State::InUse]));
            let lost = RefCell::new(Vec::new());
            let chosen = random.below(9);

            let (left, _) = each_power_loss(
                &image,
                3,
                |persist, medium| {
                    let repair = found.repair.map(|(place, _)| place);
                    update(persist, medium, &new, repair).unwrap();
                },
                |image| lost.borrow_mut().push(image.to_vec()),
            );
            let mut lost = lost.into_inner();
            image = if chosen < lost.len() {
                lost.swap_remove(chosen)
            } else {
                left
            };
            assert_eq!(
                index(&image, &layout),
                index(&start, &layout),
                "{seed} {boot}"
            );
        }
    }
}

#[test]
fn memory_that_is_too_short_is_not_touched() {
    let superblock = Superblock::new(Layout::blk(72).unwrap(), Uuid([1; 16]));
    for len in [0, 127, PAGE, 71 * PAGE, 72 * PAGE - 1] {
        let memory = Memory::new(len);
        let persist = Persist::on(&memory);
        let short = superblock::Short {
            len: len as u64,
            needed: 72 * 4096,
        };

        assert_eq!(format(&persist, memory.slice(), &superblock), Err(short));
        for repair in [None, Some(Place::Primary), Some(Place::Second)] {
            assert_eq!(
                update(&persist, memory.slice(), &superblock, repair),
                Err(short)
            );
        }
        assert_eq!(memory.in_flight(), 0);
        assert!(memory.durable().iter().all(|&byte| byte == 0));
        assert!(
            short.to_string().ends_with("of a range of 288KiB"),
            "{short}"
        );
    }
}

// Damage at random.

/// A medium with sectors of 512 bytes that cannot be read.
struct Bad<'a> {
    image: &'a [u8],
    bad: &'a BTreeSet<u64>,
}

impl Bad<'_> {
    fn is_bad(&self, offset: u64, len: usize) -> bool {
        let sectors = offset / 512..=(offset + len as u64 - 1) / 512;
        !self.bad.is_empty() && self.bad.range(sectors).next().is_some()
    }
}

impl Medium for Bad<'_> {
    fn size(&self) -> u64 {
        self.image.size()
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Unreadable> {
        if self.is_bad(offset, buf.len()) {
            return Err(Unreadable { offset });
        }
        self.image.read(offset, buf)
    }
}

/// The superblock, if it is valid, by the table of the format alone.
fn reference_decode(bytes: &[u8]) -> Option<Superblock> {
    let kind = u32_at(bytes, 8);
    let [index, blocks, pages, spare] = [12, 20, 48, 56].map(|at| u128::from(u64_at(bytes, at)));
    let state = u32_at(bytes, 68);
    let layout = match kind {
        0 => index == 0 && blocks == 0 && spare == 0 && pages >= 2,
        1 => {
            1 + index + blocks + spare + 1 == pages
                && blocks >= 1
                && spare >= 1
                && index == blocks.div_ceil(512)
        }
        _ => false,
    };
    let valid = bytes[..8] == *b"SREPMEMK"
        && u32_at(bytes, 124) == reference_crc(&bytes[..124])
        && u32_at(bytes, 28) == 1
        && u32_at(bytes, 64) == 4096
        && state <= 1
        && layout
        && pages * 4096 <= u128::from(u64::MAX);

    valid.then(|| Superblock {
        layout: Layout::from_parts(pages as u64, index as u64, blocks as u64, spare as u64)
            .unwrap(),
        uuid: Uuid(bytes[32..48].try_into().unwrap()),
        state: if state == 0 {
            State::Clean
        } else {
            State::InUse
        },
        generation: u64_at(bytes, 72),
    })
}

/// What [`probe`] has to say, in one word, and the superblock that counts.
fn reference_probe(medium: &Bad<'_>) -> (&'static str, Option<Superblock>) {
    let pages = medium.image.len() / PAGE;
    let read = |page: usize| {
        let bytes = &medium.image[page * PAGE..][..SIZE];
        (!medium.is_bad((page * PAGE) as u64, SIZE)).then_some(bytes)
    };
    let (first, last) = (read(0), read(pages - 1));
    let primary = first.and_then(reference_decode);
    let second = last
        .and_then(reference_decode)
        .filter(|it| it.layout.pages() == pages as u64);
    let is_none = |bytes: Option<&[u8]>| bytes.is_some_and(|bytes| &bytes[..8] != b"SREPMEMK");

    match (primary, second) {
        (Some(primary), _) if primary.layout.pages() != pages as u64 => ("size", None),
        (Some(primary), Some(second)) if second.generation > primary.generation => {
            ("found", Some(second))
        }
        (Some(primary), _) => ("found", Some(primary)),
        (None, Some(second)) => ("found", Some(second)),
        (None, None) if is_none(first) && is_none(last) => ("unformatted", None),
        (None, None) => ("damaged", None),
    }
}

/// Scans, and checks the result entry by entry: which page is held, which is named twice, what is no
/// page or no block at all.
fn check_scan(medium: &Bad<'_>, layout: &Layout) -> Scan {
    let (held, disputed) = (words(layout.pages()), words(layout.pages()));
    let bitmap = Bitmap::new(&held);
    hold_metadata(layout, bitmap);
    let metadata = members(&held);
    let found = scan(medium, layout, bitmap, Some(Bitmap::new(&disputed)));

    let mut named = BTreeSet::new();
    let mut twice = BTreeSet::new();
    let mut faults = Vec::new();
    let mut fault = |block, page, kind| {
        faults.push(EntryFault {
            block: Block(block),
            page,
            kind,
        })
    };
    for block in 0..layout.index_pages() * 512 {
        let at = 4096 + block * 8;
        if medium.is_bad(at, 8) {
            if at % 512 == 0 {
                fault(block, 0, Kind::Unreadable);
            }
            continue;
        }
        let page = u64_at(medium.image, at as usize);
        if page == 0 {
        } else if block >= layout.blocks() {
            fault(block, page, Kind::NoBlock);
        } else if page <= layout.index_pages() || page >= layout.pages() - 1 {
            fault(block, page, Kind::NotData);
        } else if !named.insert(page) {
            twice.insert(page);
            fault(block, page, Kind::Twice);
        }
    }

    assert_eq!(
        metadata,
        (0..=layout.index_pages())
            .chain([layout.pages() - 1])
            .collect()
    );
    assert_eq!(
        members(&held),
        metadata.into_iter().chain(named.iter().copied()).collect()
    );
    assert_eq!(members(&disputed), twice);
    assert_eq!(found.mapped, named.len() as u64);
    assert_eq!(found.faults, faults.len() as u64);
    let unreadable = faults.iter().filter(|fault| fault.kind == Kind::Unreadable);
    assert_eq!(found.unreadable, unreadable.count() as u64);
    let first = faults.into_iter().map(Some).chain([None; 8]).take(8);
    assert!(found.first.into_iter().eq(first));

    // Without the other bitmap, it is the same.
    let again = words(layout.pages());
    assert_eq!(scan(medium, layout, Bitmap::new(&again), None), found);
    found
}

#[test]
fn damage_at_random_is_called_by_its_name() {
    // Two pages of index, the second of which is not full.
    const PAGES: u64 = 66 + 2 + 600;
    const ROUNDS: usize = 10_000;

    let mut random = Random(2022);
    let start = disk(PAGES, &mut random);
    let layout = Layout::blk(PAGES).unwrap();
    let last = start.len() - PAGE;
    let mut image = start.clone();
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();

    for round in 0..ROUNDS {
        let mut bad = BTreeSet::new();
        let mut end = image.len();
        for _ in 0..random.of(&[0, 1, 1, 2, 3, 8]) {
            let copy = random.of(&[0, last]);
            let entry = PAGE + random.below(1024) * 8;
            match random.below(13) {
                0 => image[copy + random.below(SIZE)] ^= 1 << random.below(8),
                1 => image[copy + random.below(SIZE)] = random.next() as u8,
                2 => image[copy..copy + 8].fill(0),
                3 => image[copy..copy + PAGE].fill_with(|| random.next() as u8),
                4 | 5 => {
                    // A field with any value, and the right checksum.
                    let at = copy + random.of(&[8, 12, 20, 28, 32, 48, 56, 64, 68, 72]);
                    let value = random.of(&[0, 1, 2, 3, 64, 600, 601, 668, 669, u64::MAX]);
                    let other = random.next();
                    let value = random.of(&[value, other]).to_le_bytes();
                    let len = random.of(&[1, 4, 8]);
                    image[at..at + len].copy_from_slice(&value[..len]);
                    let crc = reference_crc(&image[copy..copy + 124]);
                    image[copy + 124..copy + 128].copy_from_slice(&crc.to_le_bytes());
                }
                6 => {
                    let page = random.below(PAGES as usize + 3) as u64;
                    image[entry..entry + 8].copy_from_slice(&page.to_le_bytes());
                }
                12 => {
                    // The superblock of another range.
                    let pages = random.of(&[PAGES, PAGES + 1, PAGES * 2, 100]);
                    let layout = random
                        .of(&[Layout::none(pages), Layout::blk(pages)])
                        .unwrap();
                    let generation = random.of(&[0, 3, 4, u64::MAX]);
                    let uuid = Uuid([random.next() as u8; 16]);
                    let other = Superblock {
                        generation,
                        ..Superblock::new(layout, uuid)
                    };
                    image[copy..copy + SIZE].copy_from_slice(&other.encode());
                }
                7 => image.copy_within(entry..entry + 8, PAGE + random.below(1024) * 8),
                8 => image[entry] ^= 1 << random.below(8),
                9 => image[entry..entry + 8].fill_with(|| random.next() as u8),
                10 => {
                    let sectors = [0, last / 512, 8 + random.below(16), random.below(5344)];
                    bad.insert(random.of(&sectors) as u64);
                }
                _ if round % 16 == 0 => end = random.of(&[0, 1, 4096, 8192, last, last + PAGE - 1]),
                _ => image[copy + 28..copy + 128].fill(0),
            }
        }

        let medium = Bad {
            image: &image[..end],
            bad: &bad,
        };
        let found = probe(&medium);
        if end < 2 * PAGE {
            assert_eq!(found, Err(ProbeError::TooSmall { size: end as u64 }));
        } else {
            let (word, superblock) = reference_probe(&medium);
            *seen.entry(word).or_default() += 1;
            match found {
                Ok(found) => assert_eq!((word, Some(found.superblock)), ("found", superblock)),
                Err(ProbeError::Unformatted) => assert_eq!(word, "unformatted"),
                Err(ProbeError::Damaged { .. }) => assert_eq!(word, "damaged"),
                Err(ProbeError::Size { .. }) => assert_eq!(word, "size"),
                Err(error) => panic!("{error}"),
            }
        }
        match found {
            Ok(Found { superblock, repair }) => {
                let scan = check_scan(&medium, &superblock.layout);
                let word = if scan.faults == 0 {
                    "in order"
                } else {
                    "faults"
                };
                *seen.entry(word).or_default() += 1;
                if let Some((place, repair)) = repair {
                    assert!(!format!("{place}: {repair}").contains('\n'));
                }
                for fault in scan.first.into_iter().flatten() {
                    assert!(!fault.to_string().is_empty());
                }
            }
            Err(error) => {
                assert!(!error.to_string().contains('\n'));
                // The index alone, whatever the superblocks are.
                if end == image.len() {
                    check_scan(&medium, &layout);
                }
            }
        }
        // No other page was changed.
        for changed in [0..3 * PAGE, last..last + PAGE] {
            image[changed.clone()].copy_from_slice(&start[changed]);
        }
    }
    assert_eq!(image, start);

    for word in [
        "found",
        "unformatted",
        "damaged",
        "size",
        "in order",
        "faults",
    ] {
        assert!(
            seen.get(word).is_some_and(|&times| times > 40),
            "{word}: {seen:?}"
        );
    }
}
