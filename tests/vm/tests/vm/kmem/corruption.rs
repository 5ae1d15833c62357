// SPDX-License-Identifier: GPL-2.0-only

//! Media that are damaged: the driver refuses them, or what can be read of them is read-only, and nothing is written.

use super::{attribute, forget, meminfo, prepare, ram, said, take_down, variable, Random, EINVAL};
use anyhow::{ensure, Context, Result};
use pmem_core::kmem::bitmap::Bitmap;
use pmem_core::kmem::layout::Layout;
use pmem_core::kmem::scan::{hold_metadata, scan};
use pmem_core::kmem::superblock::{self, Format};
use pmem_core::medium::crc32c;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicU64;
use vm_tests::{boot, load, stock, End, Persistent, MIB};
use xtask::vm::{Vm, PMEM_KO};

/// How many media are damaged.
const MEDIA: &str = "PMEM_DAMAGED_MEDIA";

const SIZE: u64 = 128 * MIB;
const PAGES: u64 = SIZE / 4096;
const LOAD: &str = "kmem_start=4G kmem_size=128M";

/// The blocks that have data: the first ones.
const DATA: u64 = 2048;

/// A medium that is damaged, or is not yet.
struct Medium<'a> {
    bytes: Vec<u8>,
    random: &'a mut Random,
    layout: Layout,
}

impl Medium<'_> {
    fn entry(&self, block: u64) -> u64 {
        let at = 4096 + block as usize * 8;
        self.bytes[at..]
            .first_chunk()
            .map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        let at = at as usize;
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// One of the copies of the superblock, or both.
    fn copies(&mut self) -> Vec<u64> {
        match self.random.below(4) {
            0 => vec![0],
            1 => vec![SIZE - 4096],
            _ => vec![0, SIZE - 4096],
        }
    }

    /// Damages a superblock.
    fn damage_superblock(&mut self) {
        let how = self.random.below(5);
        for at in self.copies() {
            match how {
                // Bits, anywhere.
                0 => {
                    for _ in 0..=self.random.below(8) {
                        let bit = self.random.below(128 * 8);
                        self.bytes[(at + bit / 8) as usize] ^= 1 << (bit % 8);
                    }
                }
                // Something else.
                1 => {
                    let bytes: Vec<u8> = (0..16)
                        .flat_map(|_| self.random.next().to_le_bytes())
                        .collect();
                    self.put(at, &bytes);
                }
                // Nothing but the magic, as the proposal of 2022 has it.
                2 => self.put(at + 28, &[0; 100]),
                3 => self.put(at, &[0; 8]),
                // A field, with a checksum that is right.
                _ => {
                    let field = self.random.below(30) * 4;
                    let value = match self.random.below(3) {
                        0 => u32::MAX,
                        1 => self.random.below(5) as u32,
                        _ => self.random.next() as u32,
                    };
                    self.put(at + field, &value.to_le_bytes());
                    let sum = crc32c(&self.bytes[at as usize..at as usize + 124]);
                    self.put(at + 124, &sum.to_le_bytes());
                }
            }
        }
    }

    /// Damages entries of the index.
    fn damage_index(&mut self) {
        for _ in 0..=self.random.below(20) {
            let entries = self.layout.index_pages() * 512;
            let block = match self.random.below(8) {
                // Beyond the last block.
                0 => {
                    self.layout.blocks()
                        + self.random.below((entries - self.layout.blocks()).max(1))
                }
                1 => self.random.below(self.layout.blocks()),
                _ => self.random.below(DATA),
            };
            let page = match self.random.below(7) {
                0 => self.random.next(),
                1 => self.random.below(PAGES),
                // Of the index, and the superblocks.
                2 => 1 + self.random.below(self.layout.index_pages()),
                3 => PAGES - 1,
                4 => PAGES + self.random.below(PAGES),
                // Another block's.
                _ => {
                    let other = self.random.below(DATA);
                    self.entry(other)
                }
            };
            if block < entries {
                self.put(4096 + block * 8, &page.to_le_bytes());
            }
        }
    }

    /// Damages something.
    fn damage(&mut self) {
        match self.random.below(5) {
            0 | 1 => self.damage_superblock(),
            2 | 3 => self.damage_index(),
            _ => {
                self.damage_superblock();
                self.damage_index();
            }
        }
    }
}

/// What is to be done with a medium.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Refused,
    ReadOnly,
    InOrder,
}

fn verdict(bytes: &[u8]) -> (Verdict, String) {
    let superblock = match superblock::probe(&bytes) {
        Ok(found) => found.superblock,
        Err(error) => return (Verdict::Refused, error.to_string()),
    };
    if superblock.format() == Format::None {
        return (Verdict::InOrder, "format none".into());
    }
    let bits: Vec<AtomicU64> = (0..PAGES.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
    let held = Bitmap::new(&bits);
    hold_metadata(&superblock.layout, held);
    let found = scan(&bytes, &superblock.layout, held, None);
    match found.faults {
        0 => (Verdict::InOrder, String::new()),
        faults => (Verdict::ReadOnly, format!("{faults} faults")),
    }
}

/// The blocks whose data cannot be told: their entry has changed, or another one has the same page.
fn unsure(before: &Medium<'_>, after: &Medium<'_>) -> BTreeSet<u64> {
    let mut users: BTreeMap<u64, u32> = BTreeMap::new();
    for block in 0..after.layout.blocks() {
        *users.entry(after.entry(block)).or_default() += 1;
    }
    (0..DATA)
        .filter(|&block| {
            before.entry(block) != after.entry(block)
                || users.get(&after.entry(block)).is_some_and(|&n| n > 1)
        })
        .collect()
}

/// Loads the driver, which must do with the medium what `verdict` says.
fn use_it(vm: &Vm, memory: &Persistent, damaged: &[u8], unsure: &BTreeSet<u64>) -> Result<()> {
    let (verdict, why) = verdict(damaged);
    let untouched = |when: &str| -> Result<()> {
        ensure!(
            fs::read(memory.path())? == damaged,
            "the medium was changed {when}"
        );
        Ok(())
    };
    forget(vm)?;
    match (vm.insmod(PMEM_KO, LOAD)?, &verdict) {
        (Err(error), Verdict::Refused) => {
            ensure!(error.errno == EINVAL, "{error}, not EINVAL");
            ensure!(said(vm).contains("kmem1: "), "nothing was said");
            return untouched("although it was refused");
        }
        (Err(error), _) => anyhow::bail!("{error}, but it is {verdict:?} ({why}): {}", said(vm)),
        (Ok(()), Verdict::Refused) => anyhow::bail!("it was not refused, but {why}: {}", said(vm)),
        (Ok(()), _) => {}
    }
    if attribute(vm, "format")? == "blk" {
        let read_only = vm.text("/sys/block/kmem1/ro")?.trim() == "1";
        ensure!(
            read_only == (verdict == Verdict::ReadOnly),
            "read-only: {read_only}, {verdict:?}"
        );
        if read_only {
            ensure!(
                ram(vm)? == 0 && meminfo(vm, 1, "MemTotal")? == 0,
                "some of it is RAM"
            );
            ensure!(said(vm).contains("read-only"), "{}", said(vm));
            let ran = vm.try_sh("dd if=/dev/zero of=/dev/kmem1 bs=4k count=1 oflag=direct")?;
            ensure!(ran.end != End::Exit(0), "it can be written");
            let ran = vm.try_sh("blkdiscard -f /dev/kmem1")?;
            ensure!(ran.end != End::Exit(0), "it can be discarded");
        }
        let differing = vm.sh(&format!("pmem-guest differing /tmp/x /dev/kmem1 {DATA}"))?;
        for block in differing.lines() {
            ensure!(
                unsure.contains(&block.parse()?),
                "block {block} is not what it was"
            );
        }
    }
    take_down(vm)?;
    if verdict == Verdict::ReadOnly {
        untouched("although it was read-only")?;
    }
    Ok(())
}

/// Nobody must lose more to bad media than what is bad, and no medium may bring the kernel down.
#[test]
fn damaged_media_are_refused_or_read_only() -> Result<()> {
    let media = variable(MEDIA, 100)?;
    let mut random = Random::from_env()?;
    let memory = Persistent::new(SIZE)?;
    boot(stock()?.persistent(&memory), |vm| {
        prepare(vm)?;
        load(vm, &format!("{LOAD} kmem_format=blk"))?;
        vm.sh(&format!(
            "pmem-guest fill /tmp/x {} 1; dd if=/tmp/x of=/dev/kmem1 bs=1M oflag=direct 2>/dev/null",
            DATA * 4096
        ))?;
        take_down(vm)?;

        let file = fs::File::options().write(true).open(memory.path())?;
        let good = fs::read(memory.path())?;
        let layout = superblock::probe(&good.as_slice())?.superblock.layout;
        let mut verdicts = BTreeMap::new();
        for n in 0..media {
            let seed = random.next();
            let medium = |random| Medium {
                bytes: good.clone(),
                random,
                layout,
            };
            let (mut one, mut other) = (Random(seed), Random(seed));
            let before = medium(&mut one);
            let mut after = medium(&mut other);
            after.damage();
            file.write_all_at(&after.bytes, 0)?;
            use_it(vm, &memory, &after.bytes, &unsure(&before, &after))
                .with_context(|| format!("medium {n}"))?;
            *verdicts
                .entry(format!("{:?}", verdict(&after.bytes).0))
                .or_insert(0) += 1;
        }
        eprintln!("{verdicts:?}");
        file.write_all_at(&good, 0)?;
        load(vm, LOAD)?;
        vm.sh(&format!(
            "pmem-guest compare /tmp/x /dev/kmem1 {}",
            DATA * 4096
        ))?;
        take_down(vm)
    })
}
