// SPDX-License-Identifier: GPL-2.0-only

//! O_DIRECT in all the shapes that a disk takes, and between a disk and a mapping.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use pmem_guest::Random;
use rustix::fs::{fallocate, FallocateFlags, OFlags};
use rustix::io::{preadv, pwritev};

use crate::aligned::Aligned;
use crate::mapping::Mapping;

/// The most sectors of one request.
const SECTORS: u64 = 96;

/// The most parts of one request.
const PARTS: u64 = 9;

/// How far parts of a request are from each other in memory at most.
const GAP: u64 = 3000;

/// A disk, with what it wants of requests.
struct Disk {
    file: File,
    /// What offsets and lengths are multiples of.
    sector: u64,
    /// What addresses, and lengths of parts, are multiples of.
    step: u64,
}

impl Disk {
    fn open(path: &str) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(OFlags::DIRECT.bits() as i32)
            .open(path)?;
        let name = Path::new(path).file_name().unwrap_or_default();
        let queue = Path::new("/sys/block").join(name).join("queue");
        let limit = |limit: &str| -> io::Result<u64> {
            let text = std::fs::read_to_string(queue.join(limit))?;
            text.trim().parse().map_err(io::Error::other)
        };
        Ok(Self {
            file,
            sector: limit("logical_block_size")?,
            step: limit("dma_alignment")? + 1,
        })
    }

    /// Where in a buffer the parts of a request of `len` bytes are.
    fn parts(&self, random: &mut Random, len: usize) -> Vec<Range<usize>> {
        let step = self.step;
        let mut left = len as u64 / step;
        let mut at = 0;
        let mut parts = Vec::new();
        for n in (0..=random.next() % PARTS).rev() {
            at += random.next() % (GAP / step + 2) * step;
            let len = match n {
                0 => left,
                _ => random.next() % (left + 1),
            };
            if len > 0 {
                parts.push(at as usize..(at + len * step) as usize);
            }
            at += len * step;
            left -= len;
        }
        parts
    }
}

/// The requests that cover `bytes`, each of some sectors, in two rounds, so that each has neighbours that were there
/// before.
fn requests(random: &mut Random, sector: u64, bytes: u64) -> Vec<Range<u64>> {
    let mut all = Vec::new();
    let mut at = 0;
    while at < bytes {
        let sectors = random.next() % SECTORS + 1;
        // Most are small.
        let sectors = if random.next() % 4 == 0 {
            sectors
        } else {
            sectors % 5 + 1
        };
        let end = (at + sectors * sector).min(bytes);
        all.push(at..end);
        at = end;
    }
    let (even, odd): (Vec<_>, Vec<_>) = all.into_iter().enumerate().partition(|(n, _)| n % 2 == 0);
    odd.into_iter()
        .chain(even)
        .map(|(_, request)| request)
        .collect()
}

/// Memory for the parts of any request.
fn buffer(disk: &Disk) -> Aligned {
    Aligned::new((SECTORS * disk.sector + (PARTS + 1) * (GAP + 2 * disk.step)) as usize)
}

fn all_of(done: usize, request: &Range<u64>) -> io::Result<()> {
    if done as u64 == request.end - request.start {
        Ok(())
    } else {
        Err(io::Error::other(format!("{done} bytes of {request:?}")))
    }
}

/// Writes what `seed` makes to the first `bytes` of a disk.
pub fn write(path: &str, bytes: usize, seed: u64) -> io::Result<()> {
    let disk = Disk::open(path)?;
    let mut data = vec![0; bytes];
    Random::new(seed).bytes(&mut data);
    let mut random = Random::new(seed + 1);
    let mut buffer = buffer(&disk);
    for request in requests(&mut random, disk.sector, bytes as u64) {
        let mut from = &data[request.start as usize..request.end as usize];
        let parts = disk.parts(&mut random, from.len());
        for part in &parts {
            let (now, later) = from.split_at(part.len());
            buffer.bytes_mut()[part.clone()].copy_from_slice(now);
            from = later;
        }
        let slices: Vec<_> = parts
            .into_iter()
            .map(|part| IoSlice::new(&buffer.bytes()[part]))
            .collect();
        all_of(pwritev(&disk.file, &slices, request.start)?, &request)?;
    }
    Ok(())
}

/// Looks whether that is what is there.
pub fn verify(path: &str, bytes: usize, seed: u64) -> io::Result<()> {
    let disk = Disk::open(path)?;
    let mut data = vec![0; bytes];
    Random::new(seed).bytes(&mut data);
    // Other requests than those that wrote it.
    let mut random = Random::new(seed + 2);
    let mut buffer = buffer(&disk);
    for request in requests(&mut random, disk.sector, bytes as u64) {
        let wanted = &data[request.start as usize..request.end as usize];
        let parts = disk.parts(&mut random, wanted.len());
        // What is between the parts is nobody's, and stays.
        let end = parts.last().map_or(0, |part| part.end);
        buffer.bytes_mut()[..end].fill(0xa5);
        let (mut slices, mut rest, mut at) = (Vec::new(), &mut buffer.bytes_mut()[..end], 0);
        for part in &parts {
            let (_, from) = rest.split_at_mut(part.start - at);
            let (slice, later) = from.split_at_mut(part.len());
            slices.push(IoSliceMut::new(slice));
            (rest, at) = (later, part.end);
        }
        all_of(preadv(&disk.file, &mut slices, request.start)?, &request)?;
        let (mut done, mut at) = (0, 0);
        for part in &parts {
            let found = &buffer.bytes()[part.clone()];
            if let Some(wrong) = found.iter().zip(&wanted[done..]).position(|(a, b)| a != b) {
                return Err(io::Error::other(format!(
                    "byte {} is {:#04x}, not {:#04x}; the request has {parts:?} of {request:?}",
                    request.start as usize + done + wrong,
                    found[wrong],
                    wanted[done + wrong]
                )));
            }
            if let Some(n) = buffer.bytes()[at..part.start]
                .iter()
                .position(|&byte| byte != 0xa5)
            {
                return Err(io::Error::other(format!(
                    "byte {} of memory is not of the request's, and has changed: {parts:?} of {request:?}",
                    at + n
                )));
            }
            (done, at) = (done + part.len(), part.end);
        }
    }
    Ok(())
}

/// Reads the first `bytes` of a disk with O_DIRECT into a mapping of the file `to`, and syncs that.
pub fn into_mapping(from: &str, to: &str, bytes: usize) -> io::Result<()> {
    let from = OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::DIRECT.bits() as i32)
        .open(from)?;
    let to = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(to)?;
    fallocate(&to, FallocateFlags::empty(), 0, bytes as u64)?;
    let mut mapping = Mapping::new(&to, bytes, false)?;
    from.read_exact_at(mapping.bytes_mut(), 0)?;
    mapping.msync()
}

/// Reads the first `bytes` of a disk with O_DIRECT into memory that the file `memory` gives to who maps it, looks whether
/// that is what `seed` makes, and writes what the next seed makes from there to the disk, behind what was read.
pub fn through(disk: &str, memory: &str, bytes: usize, seed: u64) -> io::Result<()> {
    let disk = Disk::open(disk)?;
    let memory = OpenOptions::new().read(true).write(true).open(memory)?;
    let mut mapping = Mapping::new(&memory, bytes, false)?;
    disk.file.read_exact_at(mapping.bytes_mut(), 0)?;
    let mut wanted = vec![0; bytes];
    Random::new(seed).bytes(&mut wanted);
    if mapping.bytes() != wanted {
        return Err(io::Error::other("what was read is not what is on the disk"));
    }
    Random::new(seed + 1).bytes(mapping.bytes_mut());
    disk.file.write_all_at(mapping.bytes(), bytes as u64)?;
    disk.file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A byte that no request covers would be compared with nothing.
    #[test]
    fn requests_cover_each_byte_once() {
        let mut random = Random::new(3);
        for (sector, bytes) in [(512, 512), (512, 1 << 20), (4096, 4096 * 1001)] {
            let mut all = requests(&mut random, sector, bytes);
            all.sort_unstable_by_key(|request| request.start);
            let mut at = 0;
            for request in all {
                assert_eq!(request.start, at);
                assert!(request.end > at && (request.end - at) % sector == 0);
                at = request.end;
            }
            assert_eq!(at, bytes);
        }
    }

    #[test]
    fn parts_are_as_the_disk_wants_them_and_fit() {
        let mut random = Random::new(4);
        for (sector, step) in [(512, 4), (512, 512), (4096, 1), (4096, 4096)] {
            let disk = Disk {
                file: File::open("/dev/null").unwrap(),
                sector,
                step,
            };
            let room = buffer(&disk).bytes().len();
            for n in 0..2000 {
                let len = (n % SECTORS + 1) * sector;
                let parts = disk.parts(&mut random, len as usize);
                let mut at = 0;
                for part in &parts {
                    assert!(part.start >= at && part.start as u64 % step == 0);
                    assert!(!part.is_empty() && part.len() as u64 % step == 0);
                    at = part.end;
                }
                assert!(at <= room);
                assert_eq!(parts.iter().map(Range::len).sum::<usize>() as u64, len);
            }
        }
    }
}
