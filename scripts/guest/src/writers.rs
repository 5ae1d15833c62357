// SPDX-License-Identifier: GPL-2.0-only

//! Writers that know what a power loss may leave of what they wrote.
//!
//! Each says in a log, on a disk of its own, what it is about to do, and when that was done. After a power loss, what
//! was done must be there, and what was under way may be there or not: of a block all or nothing, unless the disk says
//! otherwise.
//!
//! | area of the log | what is in it |
//! |---|---|
//! | 0 | what there was when the writers began |
//! | 1, 2, ... | what each of them has done since |
//!
//! An area is a list of records of a sector each, which have the number of the round in them: older ones, and one that
//! the power loss interrupted, end the list.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{fallocate, FallocateFlags, OFlags};
use serde_json::json;

use crate::aligned::Aligned;
use pmem_guest::Random;

const BLOCK: usize = 4096;
const SECTOR: usize = 512;

/// The bytes of an area.
const AREA: u64 = 8 << 20;

/// The most blocks that are written at once: more than the driver takes at once, and more often some.
const RUN: u64 = 64;
const SHORT: u64 = 8;

/// What is stored at once, and so never torn.
const WORD: usize = 8;

/// How many files there are at most, and how long the longest is.
const FILES: usize = 40;
const FILE: u64 = 200_000;

/// What is about to be done, or was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Record {
    /// Whether it was done.
    done: bool,
    /// The first block, or the number of the file.
    first: u64,
    /// How many blocks, or bytes.
    len: u64,
    /// What is in it; 0 if that is nothing.
    tag: u64,
}

impl Record {
    fn encode(self, round: u64, number: u64) -> [u8; SECTOR] {
        let mut sector = [0; SECTOR];
        let words = [
            round,
            number,
            self.done.into(),
            self.first,
            self.len,
            self.tag,
        ];
        for (to, word) in sector.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        let sum = words.iter().fold(1, |sum, &word| mix(sum ^ word));
        sector[48..56].copy_from_slice(&sum.to_le_bytes());
        sector
    }

    fn decode(sector: &[u8], round: u64, number: u64) -> Option<Self> {
        let word = |n: usize| {
            let bytes = sector.get(n * 8..)?.first_chunk()?;
            Some(u64::from_le_bytes(*bytes))
        };
        let record = Self {
            done: word(2)? == 1,
            first: word(3)?,
            len: word(4)?,
            tag: word(5)?,
        };
        (record.encode(round, number) == sector).then_some(record)
    }
}

fn mix(word: u64) -> u64 {
    let word = (word ^ (word >> 31)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    word ^ (word >> 29)
}

fn direct(path: &str) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlags::DIRECT.bits() as i32)
        .open(path)
}

/// A log that is written: an area of it.
struct Area {
    file: File,
    at: u64,
    end: u64,
    round: u64,
    number: u64,
    sector: Aligned,
}

impl Area {
    fn new(file: File, area: u64, round: u64) -> Self {
        Self {
            file,
            // The first sector of the log has the number of the round.
            at: area * AREA + SECTOR as u64,
            end: (area + 1) * AREA,
            round,
            number: 0,
            sector: Aligned::new(SECTOR),
        }
    }

    /// Whether it can say of one more thing that it is about to be done, and that it was.
    fn has_room(&self) -> bool {
        self.at + 2 * SECTOR as u64 <= self.end
    }

    /// Adds a record, durably.
    fn add(&mut self, record: Record) -> io::Result<()> {
        if self.at >= self.end {
            return Err(io::Error::other("the log is full"));
        }
        let sector = self.sector.bytes_mut();
        sector.copy_from_slice(&record.encode(self.round, self.number));
        self.file.write_all_at(sector, self.at)?;
        self.at += SECTOR as u64;
        self.number += 1;
        Ok(())
    }
}

/// The number of the round in a log.
fn round(log: &File) -> io::Result<u64> {
    let mut sector = Aligned::new(SECTOR);
    log.read_exact_at(sector.bytes_mut(), 0)?;
    let word = sector.bytes().first_chunk().copied().unwrap_or_default();
    Ok(u64::from_le_bytes(word))
}

/// Begins the next round, with `state` in the log.
fn begin(path: &str, state: impl IntoIterator<Item = Record>) -> io::Result<()> {
    let log = direct(path)?;
    let next = round(&log)? + 1;
    let mut area = Area::new(log.try_clone()?, 0, next);
    for record in state {
        area.add(record)?;
    }
    let mut sector = Aligned::new(SECTOR);
    sector.bytes_mut()[..8].copy_from_slice(&next.to_le_bytes());
    log.write_all_at(sector.bytes(), 0)
}

/// Reads the areas of a log.
fn read(path: &str) -> io::Result<Vec<Vec<Record>>> {
    let log = direct(path)?;
    let round = round(&log)?;
    let areas = fs::read_to_string(format!(
        "/sys/class/block/{}/size",
        path.trim_start_matches("/dev/")
    ))?;
    let areas = areas.trim().parse::<u64>().unwrap_or(0) * 512 / AREA;
    let mut read = Vec::new();
    let mut piece = Aligned::new(1 << 16);
    for area in 0..areas {
        let mut records = Vec::new();
        let mut at = area * AREA + SECTOR as u64;
        'area: while at < (area + 1) * AREA {
            let len = piece.bytes().len().min(((area + 1) * AREA - at) as usize);
            let bytes = &mut piece.bytes_mut()[..len];
            log.read_exact_at(bytes, at)?;
            for sector in bytes.chunks(SECTOR) {
                match Record::decode(sector, round, records.len() as u64) {
                    Some(record) => records.push(record),
                    None => break 'area,
                }
            }
            at += len as u64;
        }
        read.push(records);
    }
    Ok(read)
}

/// How many operations the areas have that were done, and how many that were under way.
fn count(areas: &[Vec<Record>]) -> (usize, usize) {
    let written = areas.get(1..).unwrap_or_default();
    let done = written.iter().flatten().filter(|record| record.done);
    let last = written.iter().filter_map(|records| records.last());
    (done.count(), last.filter(|record| !record.done).count())
}

/// What a writer does that has filled its area.
fn wait_for_the_power_loss() -> ! {
    loop {
        thread::park();
    }
}

/// What is in a block with this tag: words of which each has a place and a tag where it belongs.
fn content(block: u64, tag: u64, to: &mut [u8]) {
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
    if tag == 0 {
        return to.fill(0);
    }
    let mut word = mix(mix(tag) ^ block);
    let mut words = to.chunks_exact_mut(WORD);
    for to in &mut words {
        to.copy_from_slice(&word.to_le_bytes());
        word = word.wrapping_add(STEP);
    }
    for (to, byte) in words.into_remainder().iter_mut().zip(word.to_le_bytes()) {
        *to = byte;
    }
}

/// Whether each word of `data` is that of one of the tags.
fn is_mix(block: u64, tags: &[u64], data: &[u8]) -> bool {
    let contents: Vec<_> = tags
        .iter()
        .map(|&tag| {
            let mut bytes = vec![0; data.len()];
            content(block, tag, &mut bytes);
            bytes
        })
        .collect();
    (0..data.len()).step_by(WORD).all(|at| {
        let word = at..(at + WORD).min(data.len());
        contents
            .iter()
            .any(|content| content[word.clone()] == data[word.clone()])
    })
}

/// Starts the log of `count` blocks that are zero.
pub fn blocks_begin(log: &str) -> io::Result<()> {
    begin(log, [])
}

/// Looks at `blocks` blocks of `disk` after a power loss, and begins the next round. With `torn`, a block whose write was
/// under way may be a mix of old and new, and is written again.
pub fn blocks_check(disk: &str, log: &str, blocks: u64, torn: bool) -> io::Result<()> {
    let areas = read(log)?;
    let mut blocks: Vec<Vec<u64>> = vec![vec![0]; blocks as usize];
    for record in areas.iter().flatten() {
        for block in record.first..record.first + record.len {
            let Some(may) = blocks.get_mut(block as usize) else {
                return Err(io::Error::other(format!("the log has block {block}")));
            };
            if record.done {
                *may = vec![record.tag];
            } else {
                may.push(record.tag);
            }
        }
    }
    let disk = direct(disk)?;
    let (mut data, mut wanted) = (Aligned::new(BLOCK), vec![0; BLOCK]);
    let (mut state, mut wrong) = (Vec::new(), Vec::new());
    let (mut old, mut new, mut mixed) = (0, 0, 0);
    for (block, may) in (0..).zip(&blocks) {
        let at = block * BLOCK as u64;
        disk.read_exact_at(data.bytes_mut(), at)?;
        let found = may.iter().position(|&tag| {
            content(block, tag, &mut wanted);
            data.bytes() == wanted
        });
        let mut is = |tag| {
            state.push(Record {
                done: true,
                first: block,
                len: 1,
                tag,
            });
        };
        match found {
            Some(n) => {
                if may.len() > 1 {
                    *(if n == 0 { &mut old } else { &mut new }) += 1;
                }
                is(may[n]);
            }
            None if torn && is_mix(block, may, data.bytes()) => {
                mixed += 1;
                let tag = may[may.len() - 1];
                content(block, tag, data.bytes_mut());
                disk.write_all_at(data.bytes(), at)?;
                is(tag);
            }
            None => {
                // The first word that is not the one of the last write shows how much of it is there.
                content(block, may[may.len() - 1], &mut wanted);
                let same = data.bytes().iter().zip(&wanted).take_while(|(a, b)| a == b);
                wrong.push(format!(
                    "block {block} has none of {may:x?}: {} bytes are those of the last, it begins {:02x?}",
                    same.count(),
                    &data.bytes()[..16]
                ));
            }
        }
    }
    if !wrong.is_empty() {
        return Err(io::Error::other(wrong.join("\n")));
    }
    // How many writes the power loss came in the middle of.
    let written = areas.get(1..).unwrap_or_default();
    let last = written.iter().filter_map(|records| records.last());
    let parts = last
        .filter(|record| {
            let (first, end) = (record.first as usize, (record.first + record.len) as usize);
            let new = state[first..end].iter().filter(|of| of.tag == record.tag);
            !record.done && (1..record.len as usize).contains(&new.count())
        })
        .count();
    begin(log, state)?;
    let (done, begun) = count(&areas);
    println!(
        "{}",
        json!({ "done": done, "begun": begun, "parts": parts, "old": old, "new": new, "mixed": mixed })
    );
    Ok(())
}

/// Writes, zeroes and discards blocks of `disk`, of which there are `count`, until it is killed.
pub fn blocks_write(disk: &str, log: &str, count: u64, threads: u64, seed: u64) -> io::Result<()> {
    let share = count / threads.max(1);
    let (to, ended) = mpsc::channel();
    for n in 0..threads {
        let (disk, log) = (direct(disk)?, direct(log)?);
        let round = round(&log)?;
        let mut area = Area::new(log, n + 1, round);
        let mut random = Random::new(seed * 64 + n);
        let mut write = move || -> io::Result<()> {
            let mut data = Aligned::new(BLOCK * RUN as usize);
            let mut next = 1;
            while area.has_room() {
                let zeroes = match random.next() % 10 {
                    // To the disk both are zeroes: those that need no page, and those that keep theirs.
                    0 | 1 => Some(FallocateFlags::PUNCH_HOLE),
                    2 => Some(FallocateFlags::ZERO_RANGE),
                    _ => None,
                };
                let most = if random.next() % 3 == 0 { RUN } else { SHORT };
                let len = random.next() % most.min(share) + 1;
                let first = n * share + random.next() % (share - len + 1);
                let tag = match zeroes {
                    Some(_) => 0,
                    None => (round << 32) | (n << 24) | next,
                };
                next += 1;
                let (at, bytes) = (first * BLOCK as u64, len * BLOCK as u64);
                let data = &mut data.bytes_mut()[..bytes as usize];
                // Before the write is under way, so that the power is likely to be lost in it.
                for (block, bytes) in (first..).zip(data.chunks_mut(BLOCK)) {
                    content(block, tag, bytes);
                }
                let mut record = Record {
                    done: false,
                    first,
                    len,
                    tag,
                };
                area.add(record)?;
                match zeroes {
                    Some(how) => fallocate(&disk, how | FallocateFlags::KEEP_SIZE, at, bytes)?,
                    None => disk.write_all_at(data, at)?,
                }
                record.done = true;
                area.add(record)?;
            }
            wait_for_the_power_loss()
        };
        let to = to.clone();
        thread::spawn(move || to.send(write()));
    }
    drop(to);
    // None ends unless it fails.
    ended
        .recv()
        .unwrap_or_else(|_| Err(io::Error::other("the writers have panicked")))
}

/// Writes, discards and reads the same `count` blocks of `disk` on several threads at once, and looks whether each read
/// has one write: all of it, and nothing else.
pub fn blocks_race(disk: &str, count: u64, time: Duration) -> io::Result<()> {
    const THREADS: u64 = 6;
    let end = Instant::now() + time;
    let workers: Vec<_> = (0..THREADS)
        .map(|n| {
            let disk = direct(disk)?;
            Ok(thread::spawn(move || -> io::Result<(u64, u64)> {
                let mut random = Random::new(n);
                let mut data = Aligned::new(BLOCK);
                let (mut ops, mut zero) = (0, 0);
                while Instant::now() < end {
                    ops += 1;
                    let block = random.next() % count;
                    let at = block * BLOCK as u64;
                    match n {
                        0 | 1 => {
                            let tag = n + 1 + THREADS * ops;
                            let word = ((block << 40) | tag).to_le_bytes();
                            for to in data.bytes_mut().chunks_exact_mut(8) {
                                to.copy_from_slice(&word);
                            }
                            disk.write_all_at(data.bytes(), at)?;
                        }
                        2 => {
                            let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                            fallocate(&disk, how, at, BLOCK as u64)?;
                        }
                        _ => {
                            disk.read_exact_at(data.bytes_mut(), at)?;
                            let (first, rest) = data.bytes().split_at(8);
                            let word = u64::from_le_bytes(first.try_into().unwrap_or_default());
                            if rest.chunks_exact(8).any(|other| other != first) {
                                return Err(io::Error::other(format!(
                                    "block {block} is a mix, from {word:#x} on"
                                )));
                            }
                            match word {
                                0 => zero += 1,
                                word if word >> 40 == block => {}
                                word => {
                                    return Err(io::Error::other(format!(
                                        "block {block} has {word:#x}, which is not its own"
                                    )))
                                }
                            }
                        }
                    }
                }
                Ok((ops, zero))
            }))
        })
        .collect::<io::Result<_>>()?;
    let (mut ops, mut zero) = (Vec::new(), 0);
    for worker in workers {
        let (of_one, zero_of_one) = worker
            .join()
            .map_err(|_| io::Error::other("a thread has panicked"))??;
        ops.push(of_one);
        zero += zero_of_one;
    }
    println!("{}", json!({ "operations": ops, "zero": zero }));
    Ok(())
}

fn path(dir: &str, number: u64) -> PathBuf {
    Path::new(dir).join(number.to_string())
}

/// The files of `dir` that the writer makes.
fn files(dir: &str) -> io::Result<Vec<u64>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        found.extend(name.to_str().and_then(|name| name.parse::<u64>().ok()));
    }
    Ok(found)
}

/// Looks at the files of `dir` after a power loss, removes those that need not be there, and begins the next round.
pub fn files_check(dir: &str, log: &str) -> io::Result<()> {
    let areas = read(log)?;
    // What is done of each file, and what may be instead.
    let mut known: BTreeMap<u64, (Option<Record>, bool)> = BTreeMap::new();
    for record in areas.iter().flatten() {
        let (done, under_way) = known.entry(record.first).or_default();
        if record.done {
            *done = (record.tag != 0).then_some(*record);
        }
        *under_way = !record.done;
    }
    let mut state = Vec::new();
    let (mut old, mut new) = (0, 0);
    for (&number, &(done, under_way)) in &known {
        let path = path(dir, number);
        let fault = |what: &str| Err(io::Error::other(format!("{}: {what}", path.display())));
        let found = match fs::read(&path) {
            Ok(data) => Some(data),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return fault(&error.to_string()),
        };
        if under_way {
            *(if found.is_some() == done.is_some() {
                &mut old
            } else {
                &mut new
            }) += 1;
        }
        match (found, done) {
            (Some(data), Some(record)) => {
                let mut wanted = vec![0; record.len as usize];
                content(number, record.tag, &mut wanted);
                if data != wanted {
                    return fault("it was synced, and has changed");
                }
                state.push(record);
            }
            (None, Some(_)) if !under_way => return fault("it was synced, and is not there"),
            (Some(_), None) if !under_way => return fault("it was removed, and is there"),
            // It was not synced.
            (Some(_), None) => fs::remove_file(&path)?,
            (None, _) => {}
        }
    }
    File::open(dir)?.sync_all()?;
    let (there, wanted) = (files(dir)?.len(), state.len());
    if there != wanted {
        return Err(io::Error::other(format!(
            "{there} files are there, and {wanted} were made"
        )));
    }
    begin(log, state)?;
    let (done, begun) = count(&areas);
    println!(
        "{}",
        json!({ "done": done, "begun": begun, "parts": 0, "old": old, "new": new, "mixed": 0 })
    );
    Ok(())
}

/// Makes and removes files in `dir`, each of them durable, until it is killed.
pub fn files_write(dir: &str, log: &str, seed: u64) -> io::Result<()> {
    let log = direct(log)?;
    let round = round(&log)?;
    let mut area = Area::new(log, 1, round);
    let mut random = Random::new(seed);
    let mut there = files(dir)?;
    let mut data = vec![0; FILE as usize];
    let mut next = 1;
    while area.has_room() {
        let removes = there.len() >= FILES || (!there.is_empty() && random.next() % 3 == 0);
        let mut record = if removes {
            let number = there.swap_remove((random.next() % there.len() as u64) as usize);
            Record {
                done: false,
                first: number,
                len: 0,
                tag: 0,
            }
        } else {
            let tag = (round << 32) | next;
            next += 1;
            Record {
                done: false,
                first: tag,
                len: random.next() % FILE,
                tag,
            }
        };
        let data = &mut data[..record.len as usize];
        content(record.first, record.tag, data);
        area.add(record)?;
        let path = path(dir, record.first);
        if removes {
            fs::remove_file(&path)?;
        } else {
            let file = File::create(&path)?;
            file.write_all_at(data, 0)?;
            file.sync_all()?;
            there.push(record.first);
        }
        File::open(dir)?.sync_all()?;
        record.done = true;
        area.add(record)?;
    }
    wait_for_the_power_loss()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A record that is read although it was torn would be taken for a promise.
    #[test]
    fn records_round_trip_and_nothing_else_does() {
        let record = Record {
            done: true,
            first: 7,
            len: 3,
            tag: 1 << 40,
        };
        let mut sector = record.encode(5, 9);
        assert_eq!(Record::decode(&sector, 5, 9), Some(record));
        assert_eq!(Record::decode(&sector, 4, 9), None);
        assert_eq!(Record::decode(&sector, 5, 8), None);
        for at in 0..SECTOR {
            sector[at] ^= 4;
            assert_eq!(Record::decode(&sector, 5, 9), None, "byte {at}");
            sector[at] ^= 4;
        }
        assert_eq!(Record::decode(&[0; SECTOR], 0, 0), None);
    }

    /// Blocks that look alike would hide one that is in the place of another.
    #[test]
    fn contents_differ() {
        let of = |block, tag| {
            let mut bytes = vec![0; BLOCK];
            content(block, tag, &mut bytes);
            bytes
        };
        assert_eq!(of(3, 0), vec![0; BLOCK]);
        assert_eq!(of(3, 9), of(3, 9));
        assert_ne!(of(3, 9), of(2, 9));
        assert_ne!(of(3, 9), of(3, 8));
        let (a, b) = (of(3, 9), of(3, 8));
        let mut words: Vec<_> = a.chunks(WORD).chain(b.chunks(WORD)).collect();
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), 2 * BLOCK / WORD, "a mix could not be told");
    }

    /// A torn block is not any block.
    #[test]
    fn a_mix_is_of_what_it_may_be() {
        let of = |tag| {
            let mut bytes = vec![0; BLOCK];
            content(3, tag, &mut bytes);
            bytes
        };
        let mut data = of(9);
        data[128..1024].copy_from_slice(&of(8)[128..1024]);
        assert!(is_mix(3, &[8, 9], &data));
        assert!(!is_mix(3, &[9], &data));
        assert!(!is_mix(2, &[8, 9], &data));
        data[500] ^= 1;
        assert!(!is_mix(3, &[8, 9], &data));
        data[496..504].fill(0);
        assert!(!is_mix(3, &[8, 9], &data));
        assert!(is_mix(3, &[0, 8, 9], &data));
    }

    /// What the writers have done is what there was not before.
    #[test]
    fn operations_are_counted() {
        let record = |done| Record {
            done,
            first: 7,
            len: 3,
            tag: 1,
        };
        let [begun, done] = [record(false), record(true)];
        let areas = [
            vec![done; 5],
            vec![begun, done, begun, done],
            vec![begun, done, begun],
            vec![],
        ];
        assert_eq!(count(&areas), (3, 1));
        assert_eq!(count(&[]), (0, 0));
    }
}
