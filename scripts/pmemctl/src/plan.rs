// SPDX-License-Identifier: GPL-2.0-only

//! `pmemctl plan`: which range to reserve, and what to write where.

use crate::config::{Change, File};
use crate::memmap::{self, Bytes, Kind, KASLR_RANGES};
use crate::memory::{common, nodes, span, Map, OfNode};
use crate::system::System;
use anyhow::{bail, ensure, Result};
use indicatif::HumanBytes;
use pmem_core::range::{split, PhysRange, DISK_ALIGN};
use pmem_core::size::Size;
use serde::Serialize;
use std::fmt::Write;

/// Below, firmware tables, the PCI hole, and what can only address 32 bits have their place.
const LOWEST: u64 = 4 << 30;

/// What a range is aligned to if it is as large: the largest page of a mapping.
const HUGE: u64 = 1 << 30;

/// The least RAM that must be left: what Debian asks for.
const LEAST_RAM: u64 = 512 << 20;

/// Of how many bytes of a range one is for struct pages.
const STRUCT_PAGES: u64 = 64;

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    /// In bytes.
    pub(crate) size: u64,
    pub(crate) count: u32,
    pub(crate) node: Option<u32>,
}

/// What is proposed.
#[derive(Debug, Serialize)]
pub(crate) struct Plan {
    start: u64,
    size: u64,
    count: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    node: Option<u32>,
    /// For the kernel's command line, as it must arrive.
    memmap: String,
    grub: String,
    /// For modprobe.
    options: String,
    /// Of the RAM that the system has now, in bytes: all, and what is left.
    ram: u64,
    ram_left: u64,
    /// Of that, what struct pages take.
    struct_pages: u64,
    notes: Vec<String>,
}

impl Plan {
    /// Finds a range that works.
    pub(crate) fn new(system: &System, wanted: Wanted) -> Result<Self> {
        ensure!(
            wanted.size != 0 && wanted.size % DISK_ALIGN == 0,
            "{} is not a multiple of {}, as disks are; take {}",
            Size(wanted.size),
            Size(DISK_ALIGN),
            Size(wanted.size.next_multiple_of(DISK_ALIGN).max(DISK_ALIGN)),
        );
        let map = Map::read(system)?;
        let nodes = nodes(system);
        let places = places(&map, &nodes, wanted.node);
        let Some(range) = choose(&places, wanted.size) else {
            bail!("{}", nothing_fits(&places, &nodes, wanted));
        };
        split(range, wanted.count)?;

        let ram = map.ram();
        let ram_left = ram.saturating_sub(wanted.size);
        let struct_pages = wanted.size / STRUCT_PAGES;
        ensure!(
            ram_left.saturating_sub(struct_pages) >= LEAST_RAM,
            "{} of the {} of RAM would leave the system {}, and {} of that would be struct pages; at least {} must be \
             left, so ask for less",
            Size(wanted.size),
            HumanBytes(ram),
            HumanBytes(ram_left),
            HumanBytes(struct_pages),
            HumanBytes(LEAST_RAM),
        );

        let memmap = memmap::reserve(range);
        let mut options = format!(
            "options pmem pmem_start={} pmem_size={}",
            Bytes(range.start()),
            Bytes(range.size())
        );
        if wanted.count != 1 {
            let _ = write!(options, " pmem_count={}", wanted.count);
        }
        Ok(Self {
            start: range.start(),
            size: range.size(),
            count: wanted.count,
            node: nodes
                .iter()
                .find(|of| of.range.overlaps(&range))
                .map(|of| of.node),
            grub: memmap::for_grub_defaults(&memmap),
            memmap,
            options,
            ram,
            ram_left,
            struct_pages,
            notes: notes(system, &map, ram, ram_left),
        })
    }

    /// What would have to be written.
    pub(crate) fn changes(&self, system: &System) -> Result<Vec<Change>> {
        const BY: &str = "# Written by pmemctl plan.\n";
        let grub = format!(
            "{BY}GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX {}\"\n",
            self.grub
        );
        let mut files = vec![
            File::new(
                "/etc/modprobe.d/pmem.conf",
                format!("{BY}{}\n", self.options),
            ),
            File::new("/etc/modules-load.d/pmem.conf", format!("{BY}pmem\n")),
        ];
        ensure!(
            system.exists("/etc/default/grub"),
            "there is no /etc/default/grub: this system is not booted by GRUB; write {} to its boot loader's \
             configuration yourself, and the other two files as they are shown without --write",
            self.memmap
        );
        files.push(File::new("/etc/default/grub.d/pmem.cfg", grub));
        files.into_iter().map(|file| file.change(system)).collect()
    }

    /// As text.
    pub(crate) fn show(&self) -> String {
        let mut text = String::new();
        let range = span(self.start, self.start.checked_add(self.size - 1));
        let range = range.map(|range| range.to_string()).unwrap_or_default();
        let node = self.node.map(|node| format!(", NUMA node {node}"));
        let disks = match self.count {
            1 => "1 disk".to_owned(),
            count => format!("{count} disks"),
        };
        let mut line = |title: &str, content: &str| {
            let _ = writeln!(text, "{title:<13} {content}");
        };
        line(
            "range",
            &format!(
                "{} at {range}{}, {disks}",
                Size(self.size),
                node.unwrap_or_default()
            ),
        );
        line(
            "RAM",
            &format!(
                "{} of {} are left, {} of that for struct pages",
                HumanBytes(self.ram_left),
                HumanBytes(self.ram),
                HumanBytes(self.struct_pages)
            ),
        );
        line("kernel", &self.memmap);
        line(
            "GRUB",
            &format!(
                "GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX {}\"    in /etc/default/grub.d/pmem.cfg; then update-grub",
                self.grub
            ),
        );
        line(
            "",
            &format!(
                "{}    at GRUB's prompt and in grub.cfg",
                memmap::for_grub(&self.memmap)
            ),
        );
        line(
            "systemd-boot",
            &format!(
                "{}    in /etc/kernel/cmdline; then kernel-install add-all",
                self.memmap
            ),
        );
        line(
            "QEMU",
            &format!("-append '... {}'    in single quotes", self.memmap),
        );
        line(
            "module",
            &format!("{}    in /etc/modprobe.d/pmem.conf", self.options),
        );
        line("", "pmem    in /etc/modules-load.d/pmem.conf");
        for note in &self.notes {
            line("note", note);
        }
        text
    }
}

/// Where a range can be: free RAM above 4 GiB, of one node each.
fn places(map: &Map, nodes: &[OfNode], wanted: Option<u32>) -> Vec<PhysRange> {
    let above = |range: PhysRange| span(range.start().max(LOWEST), Some(range.last()));
    let free = map.free().into_iter().filter_map(above);
    if nodes.is_empty() {
        return match wanted {
            None | Some(0) => free.collect(),
            Some(_) => Vec::new(),
        };
    }
    let of_node = |of: &&OfNode| wanted.is_none_or(|wanted| of.node == wanted);
    free.flat_map(|range| {
        nodes
            .iter()
            .filter(of_node)
            .filter_map(move |of| common(range, of.range))
    })
    .collect()
}

/// The lowest range of `size` bytes in one of the `places`, aligned to 1 GiB if it is as large and that fits.
fn choose(places: &[PhysRange], size: u64) -> Option<PhysRange> {
    let at = |place: &PhysRange, align: u64| {
        let start = place.start().checked_next_multiple_of(align)?;
        let range = PhysRange::new(start, size).ok()?;
        (range.last() <= place.last()).then_some(range)
    };
    let huge = places.iter().filter(|_| size >= HUGE);
    huge.filter_map(|place| at(place, HUGE))
        .chain(places.iter().filter_map(|place| at(place, DISK_ALIGN)))
        .next()
}

/// Why there is no range, and what there would be.
fn nothing_fits(places: &[PhysRange], nodes: &[OfNode], wanted: Wanted) -> String {
    let on = wanted
        .node
        .map(|node| format!(" on node {node}"))
        .unwrap_or_default();
    let has_node = |node| nodes.iter().any(|of| of.node == node);
    if let Some(node) = wanted.node.filter(|&node| node != 0 || !nodes.is_empty()) {
        if !has_node(node) {
            let mut known: Vec<String> = nodes.iter().map(|of| of.node.to_string()).collect();
            known.dedup();
            if known.is_empty() {
                known.push("0".to_owned());
            }
            return format!(
                "no node {node} has RAM; those that have are {}",
                known.join(", ")
            );
        }
    }
    let largest = places
        .iter()
        .filter_map(|place| {
            let start = place.start().checked_next_multiple_of(DISK_ALIGN)?;
            let size = place.last().checked_sub(start)?.checked_add(1)?;
            Some(size / DISK_ALIGN * DISK_ALIGN)
        })
        .max()
        .unwrap_or(0);
    match largest {
        0 => format!("there is no free RAM above 4 GiB{on}; this machine has too little for a range of its own"),
        _ => format!(
            "there is no free RAM of {} in one piece above 4 GiB{on}; the largest has {}",
            Size(wanted.size),
            Size(largest)
        ),
    }
}

/// What else is to be known.
fn notes(system: &System, map: &Map, ram: u64, ram_left: u64) -> Vec<String> {
    let mut notes = Vec::new();
    if map.of_firmware {
        notes.push(
            "as /proc/iomem shows addresses to root alone, this is by the firmware's map, which does not tell where \
             the kernel is; run it as root to be sure"
                .to_owned(),
        );
    }
    if ram_left < ram / 4 {
        notes.push(
            "less than a quarter of the RAM is left; with pmem_memmap=dev the struct pages are on the range".to_owned(),
        );
    }
    let line = system.command_line();
    let reserved = memmap::entries(&line).filter(|entry| entry.kind != Kind::Limit);
    let reserved: Vec<&str> = reserved.map(|entry| entry.text).collect();
    if !reserved.is_empty() {
        notes.push(format!(
            "the kernel has memmap={} already; this is one more",
            reserved.join(",")
        ));
    }
    if reserved.len() >= KASLR_RANGES {
        notes.push(format!(
            "with more than {KASLR_RANGES} memmap= ranges the kernel is not placed at random (KASLR)"
        ));
    }
    notes
}

#[cfg(test)]
mod tests {
    use super::*;

    const G: u64 = 1 << 30;
    const M: u64 = 1 << 20;

    fn range(start: u64, size: u64) -> PhysRange {
        PhysRange::new(start, size).unwrap()
    }

    #[test]
    fn the_lowest_place_is_taken_and_a_gigabyte_is_aligned() {
        let places = [range(4 * G, 512 * M), range(4 * G + 600 * M, 3 * G)];
        let table = [
            (2 * M, Some(4 * G)),
            (512 * M, Some(4 * G)),
            (514 * M, Some(4 * G + 600 * M)),
            (2 * G, Some(5 * G)),
            // Not aligned to 1 GiB, as it would not fit.
            (3 * G, Some(4 * G + 600 * M)),
            (3 * G + 2 * M, None),
        ];
        for (size, start) in table {
            let found = choose(&places, size).map(|range| range.start());
            assert_eq!(found, start, "{size:#x}");
        }
    }

    #[test]
    fn what_is_misaligned_is_cut() {
        let places = [range(4 * G + 4096, 6 * M)];
        assert_eq!(choose(&places, 4 * M), Some(range(4 * G + 2 * M, 4 * M)));
        assert_eq!(choose(&places, 6 * M), None);
    }
}
