// SPDX-License-Identifier: GPL-2.0-only

//! `pmemctl list`: the disks of the driver's, and the ranges that are RAM and storage at once.

use crate::system::System;
use comfy_table::{presets, ContentArrangement, Table};
use pmem_core::size::Size;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write;

/// Bytes of a sector, in sysfs.
const SECTOR: u64 = 512;

/// What there is.
#[derive(Debug, Serialize)]
pub(crate) struct List {
    pub(crate) disks: Vec<Disk>,
    pub(crate) kmem: Vec<Kmem>,
}

/// A disk.
#[derive(Debug, Serialize)]
pub(crate) struct Disk {
    pub(crate) name: String,
    /// In bytes.
    pub(crate) size: u64,
    /// Who found the range.
    pub(crate) provider: String,
    /// The physical address of the first byte.
    pub(crate) start: Option<u64>,
    /// The length of the range, in bytes: that of the disk, and of struct pages that are on it.
    pub(crate) range_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) node: Option<u32>,
    pub(crate) cache: String,
    pub(crate) durability: String,
    pub(crate) dax: bool,
    /// Where the struct pages are.
    pub(crate) memmap: String,
    /// How many sectors of 512 bytes are known to be bad.
    pub(crate) bad_sectors: u64,
    /// Where it, or a partition of it, is mounted; or who else uses it.
    pub(crate) used_by: Vec<String>,
}

/// A range that is RAM and storage at once.
#[derive(Debug, Serialize)]
pub(crate) struct Kmem {
    pub(crate) name: String,
    pub(crate) node: Option<u32>,
    pub(crate) format: String,
    pub(crate) state: String,
    pub(crate) uuid: String,
    /// Bytes that are with the system now.
    pub(crate) ram: Option<u64>,
    /// Bytes that blocks of the disk hold now.
    pub(crate) data: Option<u64>,
    /// Bytes of the disk, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) disk: Option<u64>,
    pub(crate) used_by: Vec<String>,
}

impl List {
    pub(crate) fn read(system: &System) -> Self {
        let mounts = mounts(system);
        let names = system.names("/sys/block");
        let disks = names
            .iter()
            .filter(|name| system.exists(format!("/sys/block/{name}/pmem/provider")))
            .map(|name| Disk::read(system, name, &mounts))
            .collect();
        const FAUX: &str = "/sys/devices/faux";
        let kmem = system
            .names(FAUX)
            .into_iter()
            .filter(|name| {
                name.starts_with("kmem") && system.exists(format!("{FAUX}/{name}/format"))
            })
            .map(|name| Kmem::read(system, name, &mounts))
            .collect();
        Self { disks, kmem }
    }

    /// As text.
    pub(crate) fn show(&self) -> String {
        let mut text = String::new();
        if !self.disks.is_empty() {
            let mut table = table(&[
                "DISK", "SIZE", "PROVIDER", "START", "NODE", "CACHE", "WRITES", "DAX", "BAD",
                "USED BY",
            ]);
            for disk in &self.disks {
                table.add_row([
                    format!("/dev/{}", disk.name),
                    Size(disk.size).to_string(),
                    disk.provider.clone(),
                    or_dash(disk.start.map(|start| format!("{start:#x}"))),
                    or_dash(disk.node),
                    disk.cache.clone(),
                    disk.durability.clone(),
                    if disk.dax { "yes" } else { "no" }.to_owned(),
                    disk.bad_sectors.to_string(),
                    joined(&disk.used_by),
                ]);
            }
            let _ = writeln!(text, "{}", table.trim_fmt());
        }
        if !self.kmem.is_empty() {
            if !text.is_empty() {
                text.push('\n');
            }
            let mut table = table(&[
                "KMEM", "NODE", "FORMAT", "STATE", "RAM", "DATA", "DISK", "USED BY",
            ]);
            for range in &self.kmem {
                table.add_row([
                    range.name.clone(),
                    or_dash(range.node),
                    range.format.clone(),
                    range.state.clone(),
                    or_dash(range.ram.map(Size)),
                    or_dash(range.data.map(Size)),
                    or_dash(range.disk.map(Size)),
                    joined(&range.used_by),
                ]);
            }
            let _ = writeln!(text, "{}", table.trim_fmt());
        }
        text
    }
}

impl Disk {
    fn read(system: &System, name: &str, mounts: &Mounts) -> Self {
        let of = |path: &str| system.value(format!("/sys/block/{name}/{path}"));
        let text = |path: &str| of(path).unwrap_or_default();
        let hex = |text: String| u64::from_str_radix(text.trim_start_matches("0x"), 16).ok();
        Self {
            name: name.to_owned(),
            size: bytes(system, name).unwrap_or(0),
            provider: text("pmem/provider"),
            start: of("pmem/start").and_then(hex),
            range_size: of("pmem/size").and_then(|text| text.parse().ok()),
            node: of("pmem/node").and_then(|text| text.parse().ok()),
            cache: text("pmem/cache"),
            durability: text("pmem/durability"),
            dax: of("queue/dax").is_some_and(|text| text == "1"),
            memmap: text("pmem/memmap"),
            bad_sectors: bad_sectors(&text("badblocks")),
            used_by: users(system, name, mounts),
        }
    }
}

impl Kmem {
    fn read(system: &System, name: String, mounts: &Mounts) -> Self {
        let of = |file: &str| system.value(format!("/sys/devices/faux/{name}/{file}"));
        Self {
            node: crate::memory::number(&name, "kmem"),
            format: of("format").unwrap_or_default(),
            state: of("state").unwrap_or_default(),
            uuid: of("uuid").unwrap_or_default(),
            ram: of("ram").and_then(|text| text.parse().ok()),
            data: of("data").and_then(|text| text.parse().ok()),
            disk: bytes(system, &name),
            used_by: users(system, &name, mounts),
            name,
        }
    }
}

/// The size of a disk, in bytes.
fn bytes(system: &System, disk: &str) -> Option<u64> {
    let sectors: u64 = system
        .value(format!("/sys/block/{disk}/size"))?
        .parse()
        .ok()?;
    sectors.checked_mul(SECTOR)
}

/// How many sectors the lines of `badblocks` have, a first one and a count each.
fn bad_sectors(text: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.split_once(' ')?.1.parse::<u64>().ok())
        .fold(0, u64::saturating_add)
}

/// The mount points of each device, which is named by its numbers.
type Mounts = BTreeMap<String, Vec<String>>;

fn mounts(system: &System) -> Mounts {
    let mut mounts = Mounts::new();
    let text = system.read("/proc/self/mountinfo").unwrap_or_default();
    for line in text.lines() {
        let mut fields = line.split(' ').skip(2);
        let (device, _root, point) = (fields.next(), fields.next(), fields.next());
        if let (Some(device), Some(point)) = (device, point) {
            let points = mounts.entry(device.to_owned()).or_default();
            points.push(unescaped(point));
        }
    }
    mounts
}

/// A path of the kernel's, in which white space is written as octal numbers.
fn unescaped(path: &str) -> String {
    ["\\040 ", "\\011\t", "\\012\n", "\\134\\"]
        .iter()
        .fold(path.to_owned(), |path, pair| {
            let (code, character) = pair.split_at(4);
            path.replace(code, character)
        })
}

/// Who uses a disk or a partition of it.
fn users(system: &System, disk: &str, mounts: &Mounts) -> Vec<String> {
    let dir = format!("/sys/block/{disk}");
    let partitions = system
        .names(&dir)
        .into_iter()
        .filter(|name| name.starts_with(disk))
        .map(|name| format!("{dir}/{name}"));
    let mut users = Vec::new();
    for device in std::iter::once(dir.clone()).chain(partitions) {
        let numbers = system.value(format!("{device}/dev"));
        let points = numbers.and_then(|numbers| mounts.get(&numbers));
        users.extend(points.into_iter().flatten().cloned());
        users.extend(system.names(format!("{device}/holders")));
    }
    users
}

fn joined(users: &[String]) -> String {
    match users {
        [] => "-".to_owned(),
        users => users.join(" "),
    }
}

fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

/// A table as the tools of util-linux print them.
fn table(titles: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_preset(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(titles.iter().copied());
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_sectors_are_added_up() {
        assert_eq!(bad_sectors(""), 0);
        assert_eq!(bad_sectors("20 3\n66072 8\n"), 11);
    }

    #[test]
    fn mount_points_are_as_they_are() {
        assert_eq!(unescaped("/mnt/a\\040b\\134040"), "/mnt/a b\\040");
    }
}
