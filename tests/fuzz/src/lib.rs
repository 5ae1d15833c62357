// SPDX-License-Identifier: GPL-2.0-only

//! All that the driver parses, from arbitrary bytes.
//!
//! Each function is a target of a fuzzer: it makes an input of the bytes, has it parsed, and panics if the result breaks
//! a promise. The fuzzer's own programs are in `libfuzzer`; without them, the tests here call the same functions.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::sync::atomic::AtomicU64;

use pmem_core::extent::{Extent, PageOffset, Sector};
use pmem_core::iopmem::{self, Bar};
use pmem_core::kmem::bitmap::Bitmap;
use pmem_core::kmem::scan::{hold_metadata, scan, Scan};
use pmem_core::kmem::superblock::{self, Place, Superblock};
use pmem_core::kmem::{self, PAGE_SIZE};
use pmem_core::medium::{crc32c, Medium, Unreadable};
use pmem_core::memmap::{self, StructPages};
use pmem_core::range::{split, PhysRange, DISK_ALIGN};
use pmem_core::reserve;
use pmem_core::size::{self, Size};

/// A target: its name, and what it does.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: [Target; 8] = [
    ("sizes", sizes),
    ("ranges", ranges),
    ("extents", extents),
    ("parameters", parameters),
    ("kmem_parameters", kmem_parameters),
    ("bars", bars),
    ("superblocks", superblocks),
    ("headers", headers),
];

/// Takes values from the front of what a fuzzer gives; zeros when there is no more.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let (now, later) = self.0.split_at(N.min(self.0.len()));
        self.0 = later;
        let mut bytes = [0; N];
        bytes[..now.len()].copy_from_slice(now);
        bytes
    }

    fn byte(&mut self) -> u8 {
        u8::from_le_bytes(self.bytes())
    }

    fn number(&mut self) -> u64 {
        u64::from_le_bytes(self.bytes())
    }

    /// A number of any magnitude, many of them at a power of two.
    fn magnitude(&mut self) -> u64 {
        let (number, shift) = (self.number(), self.byte());
        number >> (shift % 64) << (shift / 4)
    }

    /// Text up to a NUL.
    fn text(&mut self) -> String {
        let end = self.0.iter().position(|&byte| byte == 0);
        let (now, later) = self.0.split_at(end.unwrap_or(self.0.len()));
        self.0 = later.get(1..).unwrap_or_default();
        String::from_utf8_lossy(now).into_owned()
    }
}

/// A line for the log.
fn check_line(text: &str) {
    assert!(!text.is_empty() && !text.contains('\n'), "{text:?}");
}

/// Sizes and counts, as users write them.
pub fn sizes(data: &[u8]) {
    let text = Input(data).text();
    match size::parse(&text) {
        Ok(bytes) => assert_eq!(size::parse(&Size(bytes).to_string()), Ok(bytes)),
        Err(error) => check_line(&error.to_string()),
    }
    match size::parse_count(&text) {
        Ok(count) => assert_eq!(size::parse(&text), Ok(count.into()), "{text:?}"),
        Err(error) => check_line(&error.to_string()),
    }
    assert_eq!(size::list(&text).count(), text.matches(',').count() + 1);
}

/// Disjoint, in order, aligned, equal, and nothing but the end left over.
fn check_split(range: PhysRange, count: u32) {
    match split(range, count) {
        Ok(split) => {
            assert_eq!(split.count(), count);
            let size = u128::from(split.disk_size()) * u128::from(count);
            assert_eq!(size + u128::from(split.left_over()), range.size().into());
            assert!(split.disk_size() > 0 && split.disk_size() % DISK_ALIGN == 0);
            for index in [0, 1, count / 2, count.wrapping_sub(1), count, u32::MAX] {
                let disk = split.get(index);
                assert_eq!(disk.is_some(), index < count);
                if let Some(disk) = disk {
                    assert_eq!(disk.size(), split.disk_size());
                    assert!(disk.start() >= range.start() && disk.last() <= range.last());
                    assert_eq!(disk.start() - range.start(), u64::from(index) * disk.size());
                }
            }
        }
        Err(error) => check_line(&error.to_string()),
    }
}

/// Ranges, whether they overlap, and how they are split.
pub fn ranges(data: &[u8]) {
    let mut input = Input(data);
    let mut made = Vec::new();
    for _ in 0..2 {
        let (start, size) = (input.magnitude(), input.magnitude());
        match PhysRange::new(start, size) {
            Ok(range) => {
                assert!(size > 0);
                assert_eq!(
                    u128::from(range.last()),
                    u128::from(start) + u128::from(size) - 1
                );
                check_split(range, input.number() as u32);
                check_split(range, u32::from(input.byte()));
                made.push(range);
            }
            Err(error) => {
                assert!(size == 0 || start.checked_add(size - 1).is_none());
                check_line(&error.to_string());
            }
        }
    }
    if let [a, b] = made[..] {
        let apart = a.last() < b.start() || b.last() < a.start();
        assert_eq!(a.overlaps(&b), !apart);
        assert_eq!(b.overlaps(&a), !apart);
    }
}

/// Parts of disks: those of bios, and those of DAX.
pub fn extents(data: &[u8]) {
    let mut input = Input(data);
    let (at, len, disk) = (input.magnitude(), input.magnitude(), input.magnitude());
    for (unit, made, len) in [
        (
            512,
            Extent::from_sectors(Sector(at), len, disk),
            u128::from(len),
        ),
        (
            4096,
            Extent::from_pages(PageOffset(at), len, disk),
            u128::from(len) * 4096,
        ),
    ] {
        let start = u128::from(at) * unit;
        match made {
            Ok(extent) => {
                assert_eq!(
                    (u128::from(extent.offset()), u128::from(extent.len())),
                    (start, len)
                );
                assert!(extent.end() <= disk);
            }
            // All that is on the disk is accepted.
            Err(error) => {
                assert!(start + len > disk.into(), "{at} {len} {disk}");
                check_line(&error.to_string());
            }
        }
    }
}

/// The parameters of `memmap=` ranges and of devices.
pub fn parameters(data: &[u8]) {
    let mut input = Input(data);
    let given = input.number() as u16;
    let texts: [String; 12] = std::array::from_fn(|_| input.text());
    let mut params = memmap::Params::default();
    let fields: [&mut &str; 12] = [
        &mut params.start,
        &mut params.size,
        &mut params.count,
        &mut params.lbs,
        &mut params.first,
        &mut params.cache,
        &mut params.memmap,
        &mut params.memmap_force,
        &mut params.copy,
        &mut params.e820,
        &mut params.virtio,
        &mut params.iopmem,
    ];
    // With all of them arbitrary, none would come far.
    for (n, (field, text)) in fields.into_iter().zip(&texts).enumerate() {
        if given & (1 << n) != 0 {
            *field = text;
        }
    }
    let config = match memmap::Config::new(params) {
        Ok(config) => config,
        Err(error) => return check_line(&error.to_string()),
    };
    let ranges: Vec<_> = config.ranges().collect();
    for (n, (range, split, mode)) in ranges.iter().enumerate() {
        assert!(split.count() > 0);
        assert_eq!(split.disk_size() % DISK_ALIGN, 0);
        assert!(
            mode.struct_pages == StructPages::Ram
                || mode.cache == pmem_core::persist::Cache::WriteBack
        );
        assert!(ranges[..n].iter().all(|(other, ..)| !other.overlaps(range)));
    }
    let disks: u64 = ranges
        .iter()
        .map(|(_, split, _)| u64::from(split.count()))
        .sum();
    assert!(u64::from(config.first()) + disks <= u64::from(u32::MAX));
    assert!([512, 4096].contains(&config.logical_block_size()));
}

/// The parameters of ranges that are RAM and storage at once.
pub fn kmem_parameters(data: &[u8]) {
    let mut input = Input(data);
    let given = input.byte();
    let texts: [String; 7] = std::array::from_fn(|_| input.text());
    let right = ["4G,8G", "2G,2G", "blk", "0", "1", "0", "0"];
    let value = |n: usize| match given & (1 << n) {
        0 => right[n],
        _ => texts[n].as_str(),
    };
    let params = kmem::params::Params {
        start: value(0),
        size: value(1),
        format: value(2),
        force: value(3),
        atomic: value(4),
        scrub: value(5),
        dax: value(6),
    };
    match kmem::params::Config::new(params) {
        Ok(config) => {
            let ranges: Vec<_> = config.ranges().collect();
            for (n, (range, _)) in ranges.iter().enumerate() {
                assert!(ranges[..n].iter().all(|(other, _)| !other.overlaps(range)));
            }
        }
        Err(error) => check_line(&error.to_string()),
    }
}

/// The BARs of a PCI function, and the parameters that choose among them.
pub fn bars(data: &[u8]) {
    let mut input = Input(data);
    let texts: [String; 2] = std::array::from_fn(|_| input.text());
    let params = iopmem::Params {
        bar: &texts[0],
        p2pdma: &texts[1],
        ..iopmem::Params::default()
    };
    let (asked, p2pdma) = match iopmem::Config::new(params) {
        Ok(config) => (config.bar, config.p2pdma),
        Err(error) => {
            check_line(&error.to_string());
            (None, input.magnitude() & !(DISK_ALIGN - 1))
        }
    };
    let mut bars = [Bar::None; iopmem::BARS];
    for bar in &mut bars {
        *bar = match input.byte() % 4 {
            0 => Bar::None,
            1 => Bar::Ports,
            2 => Bar::Unassigned,
            _ => Bar::Memory {
                start: input.magnitude(),
                size: input.magnitude(),
            },
        };
    }
    let block = if input.byte() & 1 == 0 { 512 } else { 4096 };
    match iopmem::choose(&bars, asked, block, p2pdma) {
        Ok(choice) => {
            let Bar::Memory { start, size } = bars[choice.bar] else {
                panic!("{choice:?} of {bars:?}");
            };
            assert!(asked.is_none_or(|asked| asked == choice.bar));
            assert_eq!(choice.disk.start(), start);
            assert!(choice.disk.size() > 0 && choice.disk.size() % u64::from(block) == 0);
            assert!(choice.size() <= size);
            match choice.p2pdma {
                Some((offset, len)) => {
                    assert_eq!((len, offset + len), (p2pdma, size));
                    assert!(choice.disk.size() <= offset);
                    assert_eq!((start + offset) % DISK_ALIGN, 0);
                }
                None => assert_eq!(p2pdma, 0),
            }
            if let Err(why) = iopmem::check_pages(
                choice.disk,
                input.magnitude(),
                (input.magnitude(), input.magnitude()),
            ) {
                check_line(&why.to_string());
            }
        }
        Err(unusable) => check_line(&unusable.to_string()),
    }
}

/// A range of which a few pieces are not zero, and some cannot be read.
struct Image<'a> {
    pages: u64,
    pieces: Vec<(u64, &'a [u8])>,
    bad: BTreeSet<u64>,
}

impl Medium for Image<'_> {
    fn size(&self) -> u64 {
        self.pages * PAGE_SIZE
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Unreadable> {
        let end = offset
            .checked_add(buf.len() as u64)
            .filter(|&end| end <= self.size())
            .ok_or(Unreadable { offset })?;
        if self
            .bad
            .range(offset / 512..end.div_ceil(512))
            .next()
            .is_some()
        {
            return Err(Unreadable { offset });
        }
        buf.fill(0);
        for &(start, bytes) in &self.pieces {
            for (at, &byte) in (start..end.min(start + bytes.len() as u64)).zip(bytes) {
                if let Some(to) = at
                    .checked_sub(offset)
                    .and_then(|at| buf.get_mut(at as usize))
                {
                    *to = byte;
                }
            }
        }
        Ok(())
    }
}

/// Puts the right checksum at the end of a record.
fn seal(record: &mut [u8]) {
    if let Some(at) = record.len().checked_sub(4) {
        let sum = crc32c(&record[..at]).to_le_bytes();
        record[at..].copy_from_slice(&sum);
    }
}

/// The superblocks and the index of a range.
pub fn superblocks(data: &[u8]) {
    read_range(data);
}

/// Reads a range that is made of `data`, and returns what its index has, if it has superblocks.
fn read_range(data: &[u8]) -> Option<Scan> {
    let mut input = Input(data);
    let how = input.byte();
    let pages = u64::from(u16::from_le_bytes(input.bytes())) % 2000;
    let layout = kmem::layout::Layout::blk(pages).or_else(|_| kmem::layout::Layout::none(pages));
    let mut copies: [[u8; superblock::SIZE]; 2] = [input.bytes(), input.bytes()];
    for (n, copy) in copies.iter_mut().enumerate() {
        // Some are right but for a few fields, or for what the checksum is about.
        if let (Ok(layout), true) = (&layout, how & (1 << n) != 0) {
            let right = Superblock::new(*layout, superblock::Uuid([7; 16])).encode();
            let at = usize::from(copy[0]) % superblock::SIZE;
            let len = usize::from(copy[1]) % 9;
            let changes = *copy;
            *copy = right;
            for (to, from) in copy.iter_mut().skip(at).take(len).zip(&changes[2..]) {
                *to = *from;
            }
        }
        if how & (4 << n) != 0 {
            seal(copy);
        }
        match superblock::decode(copy) {
            Ok(read) => assert_eq!(superblock::decode(&read.encode()), Ok(read)),
            Err(fault) => check_line(&fault.to_string()),
        }
    }
    let bad = (0..how >> 6)
        .map(|_| u64::from(input.bytes::<2>()[0]))
        .collect();
    // Entries of the index as they are, or with small numbers, which are pages that there are.
    let mut index = input.0.to_vec();
    if how & 16 != 0 {
        for entry in index.chunks_mut(8) {
            entry.iter_mut().skip(2).for_each(|byte| *byte = 0);
        }
    }
    let image = Image {
        pages,
        pieces: vec![
            (0, &copies[0]),
            (pages.saturating_sub(1) * PAGE_SIZE, &copies[1]),
            (PAGE_SIZE, &index),
        ],
        bad,
    };
    for place in [Place::Primary, Place::Second] {
        if let Err(fault) = superblock::read(&image, place) {
            check_line(&fault.to_string());
        }
    }
    let found = match superblock::probe(&image) {
        Ok(found) => found,
        Err(error) => {
            check_line(&error.to_string());
            return None;
        }
    };
    if let Some((place, repair)) = found.repair {
        check_line(&format!("{place}: {repair}"));
    }
    let layout = found.superblock.layout;
    assert_eq!(layout.pages(), pages);

    let bits = || -> Vec<AtomicU64> {
        let words = Bitmap::words(pages).unwrap();
        (0..words).map(|_| AtomicU64::new(0)).collect()
    };
    let (held, disputed) = (bits(), bits());
    let (held, disputed) = (Bitmap::new(&held), Bitmap::new(&disputed));
    hold_metadata(&layout, held);
    let scan = scan(&&image, &layout, held, Some(disputed));
    for fault in scan.first.iter().flatten() {
        check_line(&fault.to_string());
    }
    assert_eq!(scan.faults == 0, scan.first[0].is_none());
    // Each page with data is held, and no other.
    let count =
        |bitmap: Bitmap<'_>| -> u64 { bitmap.ones(0..bitmap.len()).map(|(_, len)| len).sum() };
    assert_eq!(count(held), 2 + layout.index_pages() + scan.mapped);
    for (first, len) in disputed.ones(0..disputed.len()) {
        assert!(
            (first..first + len).all(|page| layout.is_data(kmem::Page(page)) && held.test(page))
        );
    }
    Some(scan)
}

/// The headers of ranges that have their struct pages on themselves.
pub fn headers(data: &[u8]) {
    const MOST: u64 = 64 << 20;

    let mut input = Input(data);
    let how = input.byte();
    let range = match how & 32 {
        0 => input.number() % MOST,
        _ => (input.number() % (MOST / DISK_ALIGN) + 1) * DISK_ALIGN,
    };
    let made = reserve::Reserve::of(range);
    if let Ok(made) = made {
        assert_eq!(made.size() + made.data_size(), range);
        assert!(made.data_size() > 0);
    }
    let mut copies: [[u8; reserve::SIZE]; 2] = [input.bytes(), input.bytes()];
    for (n, copy) in copies.iter_mut().enumerate() {
        if let (Ok(made), true) = (&made, how & (1 << n) != 0) {
            let (at, len, changes) = (usize::from(copy[0]), usize::from(copy[1]) % 9, *copy);
            *copy = made.encode();
            for (to, from) in copy
                .iter_mut()
                .skip(at % reserve::SIZE)
                .take(len)
                .zip(&changes[2..])
            {
                *to = *from;
            }
        }
        if how & (4 << n) != 0 {
            seal(copy);
        }
        match reserve::decode(copy) {
            Ok(read) => assert_eq!(reserve::decode(&read.encode()), Ok(read)),
            Err(fault) => check_line(&fault.to_string()),
        }
    }
    let bad = (0..how >> 6).map(|_| u64::from(input.byte())).collect();
    let image = Image {
        pages: range / PAGE_SIZE,
        pieces: vec![
            (0, &copies[0]),
            (PAGE_SIZE, &copies[1]),
            (2 * PAGE_SIZE, input.0),
        ],
        bad,
    };
    if image.size() < reserve::HEADERS {
        return;
    }
    let dev = reserve::check_dev(&image, range, 64);
    let ram = reserve::check_ram(&image, false);
    match (&dev, &ram) {
        // One or the other may have it, but not both, unless there is nothing.
        (Ok((found, write)), Ok(_)) => {
            assert_eq!(
                (Some(*found), *write),
                (made.ok(), Some(reserve::Write::Header))
            );
        }
        (Ok((found, _)), Err(_)) => assert_eq!(Some(*found), made.ok()),
        _ => {}
    }
    for refusal in [dev.err(), ram.err()].into_iter().flatten() {
        check_line(&refusal.to_string());
    }
    if let Ok(Some(erase)) = reserve::check_ram(&image, true) {
        check_line(&erase.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A target that refuses all that it is given finds nothing.
    #[test]
    fn bytes_make_ranges_that_are_in_order_and_some_that_are_not() {
        // Both superblocks right, sealed, 133 pages; then the index.
        let mut data = vec![0b1111, 133, 0];
        data.resize(3 + 2 * superblock::SIZE, 0);
        for entry in [2u64, 131, 0, 64] {
            data.extend(entry.to_le_bytes());
        }
        let right = read_range(&data).unwrap();
        assert_eq!((right.mapped, right.faults), (3, 0));

        for entry in [2u64, 1 << 40] {
            data.extend(entry.to_le_bytes());
        }
        let wrong = read_range(&data).unwrap();
        assert_eq!((wrong.mapped, wrong.faults), (3, 2));

        // Without their checksums, and with one field of each changed.
        data[0] = 0b0011;
        for copy in [3, 3 + superblock::SIZE] {
            data[copy] = 8;
            data[copy + 1] = 4;
        }
        assert_eq!(read_range(&data), None);
    }
}
