// SPDX-License-Identifier: GPL-2.0-only

//! What is at which physical address, and on which NUMA node.

use crate::system::System;
use anyhow::{Context, Result};
use pmem_core::range::PhysRange;
use std::iter::Peekable;
use std::vec::IntoIter;

/// How the kernel calls what it hands out.
pub(crate) const SYSTEM_RAM: &str = "System RAM";

/// A range with a name, and what is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Area {
    pub(crate) range: PhysRange,
    pub(crate) name: String,
    pub(crate) inner: Vec<Area>,
}

/// All that is known of the physical addresses.
#[derive(Clone, Debug)]
pub(crate) struct Map {
    areas: Vec<Area>,
    /// Whether it is the map that firmware gave, as only root may see the kernel's.
    pub(crate) of_firmware: bool,
}

impl Map {
    /// Reads `/proc/iomem`, or where that shows no addresses, `/sys/firmware/memmap`.
    pub(crate) fn read(system: &System) -> Result<Self> {
        let text = system
            .read("/proc/iomem")
            .context("/proc/iomem cannot be read")?;
        let areas = parse(&text);
        if !areas.is_empty() {
            return Ok(Self {
                areas,
                of_firmware: false,
            });
        }
        let areas = firmware(system);
        if areas.is_empty() {
            anyhow::bail!("/proc/iomem shows addresses to root alone; run this as root");
        }
        Ok(Self {
            areas,
            of_firmware: true,
        })
    }

    /// The ranges of that name, wherever they are.
    pub(crate) fn named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Area> {
        self.all().filter(move |area| area.name == name)
    }

    /// Each area, one that is in another after it.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Area> {
        let mut next: Vec<&Area> = self.areas.iter().rev().collect();
        std::iter::from_fn(move || {
            let area = next.pop()?;
            next.extend(area.inner.iter().rev());
            Some(area)
        })
    }

    /// The bytes of RAM that the kernel has.
    pub(crate) fn ram(&self) -> u64 {
        self.areas
            .iter()
            .filter(|area| area.name == SYSTEM_RAM)
            .map(|area| area.range.size())
            .fold(0, u64::saturating_add)
    }

    /// RAM in which there is nothing that must stay where it is, in order.
    pub(crate) fn free(&self) -> Vec<PhysRange> {
        let ram = self.areas.iter().filter(|area| area.name == SYSTEM_RAM);
        ram.flat_map(|area| {
            let taken = area.inner.iter().map(|inner| inner.range);
            without(area.range, taken)
        })
        .collect()
    }
}

/// What is left of `range` without those that are `taken`, which are in order.
fn without(range: PhysRange, taken: impl Iterator<Item = PhysRange>) -> Vec<PhysRange> {
    let mut left = Vec::new();
    let mut first = Some(range.start());
    for hole in taken {
        let Some(start) = first else { break };
        left.extend(span(start, hole.start().checked_sub(1)));
        first = hole.last().checked_add(1).map(|next| next.max(start));
    }
    left.extend(first.and_then(|start| span(start, Some(range.last()))));
    left
}

/// The range from `first` to `last`, if there is anything in it.
pub(crate) fn span(first: u64, last: Option<u64>) -> Option<PhysRange> {
    let size = last?.checked_sub(first)?.checked_add(1)?;
    PhysRange::new(first, size).ok()
}

/// What both have.
pub(crate) fn common(one: PhysRange, other: PhysRange) -> Option<PhysRange> {
    let last = one.last().min(other.last());
    span(one.start().max(other.start()), Some(last))
}

/// No tree of the kernel is as deep.
const DEEPEST: usize = 64;

/// Reads the kernel's tree of resources. It is empty if all addresses are 0, as they are to those who are not root.
fn parse(text: &str) -> Vec<Area> {
    let lines: Vec<(usize, Area)> = text.lines().filter_map(line).collect();
    if lines.iter().all(|(_, area)| area.range.last() == 0) {
        return Vec::new();
    }
    let mut lines = lines.into_iter().peekable();
    nest(&mut lines, 0)
}

/// Takes the areas that are at least `depth` deep.
fn nest(lines: &mut Peekable<IntoIter<(usize, Area)>>, depth: usize) -> Vec<Area> {
    let mut areas = Vec::new();
    while let Some((at, mut area)) = lines.next_if(|(at, _)| *at >= depth) {
        area.inner = nest(lines, at + 1);
        areas.push(area);
    }
    areas
}

/// Reads `  100000000-23fffffff : System RAM`: how deep it is, and what.
fn line(text: &str) -> Option<(usize, Area)> {
    let depth = text.len() - text.trim_start_matches(' ').len();
    let (range, name) = text.trim_start_matches(' ').split_once(" : ")?;
    let (first, last) = range.split_once('-')?;
    let hex = |text| u64::from_str_radix(text, 16).ok();
    let area = Area {
        range: span(hex(first)?, hex(last))?,
        name: name.to_owned(),
        inner: Vec::new(),
    };
    Some(((depth / 2).min(DEEPEST), area))
}

/// The map that firmware gave, before `memmap=` changed it.
fn firmware(system: &System) -> Vec<Area> {
    const DIR: &str = "/sys/firmware/memmap";
    let entry = |name: &String| {
        let value = |file: &str| system.value(format!("{DIR}/{name}/{file}"));
        let address = |file| {
            let text = value(file)?;
            u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()
        };
        Some(Area {
            range: span(address("start")?, address("end"))?,
            name: value("type")?,
            inner: Vec::new(),
        })
    };
    let mut areas: Vec<Area> = system.names(DIR).iter().filter_map(entry).collect();
    areas.sort_by_key(|area| area.range.start());
    areas
}

/// Memory of a NUMA node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OfNode {
    pub(crate) node: u32,
    pub(crate) range: PhysRange,
}

/// Which RAM belongs to which node, in the order of addresses. Empty on a kernel without NUMA or memory blocks.
pub(crate) fn nodes(system: &System) -> Vec<OfNode> {
    let size = system
        .value("/sys/devices/system/memory/block_size_bytes")
        .and_then(|text| u64::from_str_radix(&text, 16).ok());
    let Some(size) = size else {
        return Vec::new();
    };
    const NODES: &str = "/sys/devices/system/node";
    let mut blocks = Vec::new();
    for name in system.names(NODES) {
        let Some(node) = number(&name, "node") else {
            continue;
        };
        for block in system.names(format!("{NODES}/{name}")) {
            let start = number(&block, "memory").and_then(|n| u64::from(n).checked_mul(size));
            let range = start.and_then(|start| PhysRange::new(start, size).ok());
            blocks.extend(range.map(|range| OfNode { node, range }));
        }
    }
    blocks.sort_by_key(|block| block.range.start());

    let mut joined: Vec<OfNode> = Vec::new();
    for block in blocks {
        match joined.last_mut() {
            Some(last)
                if last.node == block.node
                    && last.range.last().checked_add(1) == Some(block.range.start()) =>
            {
                if let Some(both) = span(last.range.start(), Some(block.range.last())) {
                    last.range = both;
                }
            }
            _ => joined.push(block),
        }
    }
    joined
}

/// The number behind `prefix`.
pub(crate) fn number(name: &str, prefix: &str) -> Option<u32> {
    name.strip_prefix(prefix)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u64, last: u64) -> PhysRange {
        span(first, Some(last)).unwrap()
    }

    #[test]
    fn areas_are_in_others() {
        let areas = parse(
            "00001000-0009fbff : System RAM\n\
             00100000-3fffffff : System RAM\n  \
               01000000-01ffffff : Kernel code\n  \
               02000000-024fffff : Kernel rodata\n\
             e0000000-efffffff : PCI ECAM 0000 [bus 00-ff]\n  \
               e0000000-efffffff : Reserved\n    \
                 e0000000-efffffff : pnp 00:04\n",
        );
        assert_eq!(areas.len(), 3);
        let map = Map {
            areas,
            of_firmware: false,
        };
        assert_eq!(map.all().count(), 7);
        assert_eq!(map.ram(), 0x9ec00 + 0x3ff00000);
        assert_eq!(map.named("pnp 00:04").count(), 1);
        assert_eq!(
            map.free(),
            [
                range(0x1000, 0x9fbff),
                range(0x100000, 0xffffff),
                range(0x2500000, 0x3fffffff)
            ]
        );
    }

    #[test]
    fn addresses_are_hidden_from_users() {
        assert!(parse("00000000-00000000 : Reserved\n00000000-00000000 : System RAM\n").is_empty());
    }

    #[test]
    fn what_is_taken_is_left_out() {
        let whole = range(0x1000, 0x4fff);
        type Ranges = &'static [(u64, u64)];
        let table: [(Ranges, Ranges); 5] = [
            (&[], &[(0x1000, 0x4fff)]),
            (&[(0x1000, 0x4fff)], &[]),
            (&[(0x1000, 0x1fff)], &[(0x2000, 0x4fff)]),
            (&[(0x4000, 0x4fff)], &[(0x1000, 0x3fff)]),
            // Such as a kernel whose data begins in the page in which its code ends.
            (
                &[(0x2000, 0x2fff), (0x2800, 0x37ff)],
                &[(0x1000, 0x1fff), (0x3800, 0x4fff)],
            ),
        ];
        for (taken, left) in table {
            let taken = taken.iter().map(|&(first, last)| range(first, last));
            let left: Vec<PhysRange> = left.iter().map(|&(a, b)| range(a, b)).collect();
            assert_eq!(without(whole, taken), left);
        }
    }
}
