// SPDX-License-Identifier: GPL-2.0-only

//! Whether there is memory for disks, and who has it.

use super::Findings;
use crate::config::Modprobe;
use crate::memmap::{self, entries, Bytes, Entry, Kind, KASLR_RANGES};
use crate::memory::{common, Area, Map, SYSTEM_RAM};
use crate::system::System;
use pmem_core::kmem;
use pmem_core::memmap::{Config, Params};
use pmem_core::range::PhysRange;
use pmem_core::size::Size;

/// How the kernel calls memory of type 12.
const LEGACY: &str = "Persistent Memory (legacy)";

/// How it calls a range that `memmap=...$...` has reserved.
const RESERVED: &str = "Reserved";

/// The `reg` of virtio-pmem devices, in sysfs.
const VIRTIO_PMEM: &str = "0x001b";

pub(super) fn examine(system: &System, findings: &mut Findings) {
    let line = system.command_line();
    let entries: Vec<Entry<'_>> = entries(&line).collect();
    command_line(&entries, findings);
    let swallowed = pending(system, &entries, findings);

    let Some(config) = configured(system, findings) else {
        return;
    };
    let map = match Map::read(system) {
        Ok(map) if !map.of_firmware => map,
        _ => {
            return findings
                .note("who has which memory is shown to root alone; run this as root for the rest")
        }
    };
    for &range in &config.ranges {
        look_at(range, &map, &entries, swallowed, findings);
    }
    legacy(&map, config.e820, findings);
    let waits = config.ranges.is_empty() && !config.e820;
    if waits {
        no_range(&entries, findings);
    }
    virtio(system, findings);
}

/// What the kernel's command line says, whatever the module is told.
fn command_line(entries: &[Entry<'_>], findings: &mut Findings) {
    for entry in entries {
        match entry.kind {
            Kind::Limit => findings.problem(
                format!(
                    "memmap={} on the kernel's command line reserves nothing: it has no $, and cuts all RAM off beyond \
                     that address",
                    entry.text
                ),
                format!(
                    "a shell or GRUB has swallowed the $ and what follows: in /etc/default/grub it must be {}\n\
                     as pmemctl plan prints it; then update-grub, and boot again",
                    memmap::for_grub_defaults("memmap=SIZE$START")
                ),
            ),
            Kind::Nonsense => findings.problem(
                format!("memmap={} on the kernel's command line means nothing", entry.text),
                "write memmap=SIZE$START, as pmemctl plan prints it",
            ),
            _ => {}
        }
    }
    let ranges = entries
        .iter()
        .filter(|entry| entry.range.is_some() && entry.kind != Kind::Limit)
        .count();
    if ranges > KASLR_RANGES {
        findings.note(format!(
            "{ranges} memmap= ranges are more than the {KASLR_RANGES} that KASLR can keep clear of: the kernel is not \
             placed at random"
        ));
    }
}

/// Whether an option is configured that the running kernel has not got.
fn pending(system: &System, entries: &[Entry<'_>], findings: &mut Findings) -> bool {
    let dir = "/etc/default/grub.d";
    let mut files: Vec<String> = system
        .names(dir)
        .into_iter()
        .filter(|name| name.ends_with(".cfg"))
        .map(|name| format!("{dir}/{name}"))
        .collect();
    files.insert(0, "/etc/default/grub".to_owned());
    for path in files {
        let text = system.read(&path).unwrap_or_default();
        let is_there = text
            .lines()
            .any(|line| !line.trim_start().starts_with('#') && line.contains("memmap="));
        if is_there && entries.is_empty() {
            findings.problem(
                format!("{path} has a memmap= that the running kernel was not given"),
                "update-grub, and boot again",
            );
            return true;
        }
    }
    false
}

/// What the module is told.
struct Configured {
    ranges: Vec<PhysRange>,
    e820: bool,
}

/// Reads the module's parameters, and checks them as the module does.
fn configured(system: &System, findings: &mut Findings) -> Option<Configured> {
    let modprobe = Modprobe::read(system);
    let loaded = system.exists("/sys/module/pmem/parameters");
    let value = |name: &str| -> Option<String> {
        match loaded {
            true => system.value(format!("/sys/module/pmem/parameters/{name}")),
            false => modprobe.value(name).map(str::to_owned),
        }
    };
    let given = |name: &str, default: &str| value(name).unwrap_or_else(|| default.to_owned());
    let defaults = Params::default();
    let [start, size, count] = [
        ("pmem_start", ""),
        ("pmem_size", ""),
        ("pmem_count", defaults.count),
    ]
    .map(|(name, default)| given(name, default));
    let [lbs, first, cache] = [
        ("pmem_lbs", defaults.lbs),
        ("pmem_first", defaults.first),
        ("pmem_cache", defaults.cache),
    ]
    .map(|(name, default)| given(name, default));
    let [memmap, force, copy] = [
        ("pmem_memmap", defaults.memmap),
        ("pmem_memmap_force", defaults.memmap_force),
        ("pmem_copy", defaults.copy),
    ]
    .map(|(name, default)| given(name, default));
    let e820 = given("pmem_e820", defaults.e820);
    let params = Params {
        start: &start,
        size: &size,
        count: &count,
        lbs: &lbs,
        first: &first,
        cache: &cache,
        memmap: &memmap,
        memmap_force: &force,
        copy: &copy,
        e820: &e820,
        virtio: "1",
        iopmem: "1",
    };
    let from = || match loaded {
        true => "the loaded module".to_owned(),
        false => modprobe
            .options
            .last()
            .map(|setting| setting.from.display().to_string())
            .unwrap_or_default(),
    };
    let config = match Config::new(params) {
        Ok(config) => config,
        Err(error) => {
            findings.problem(
                format!("the module's parameters are refused: {error}"),
                format!("correct them in {}", from()),
            );
            return None;
        }
    };
    let mut ranges: Vec<PhysRange> = config.ranges().map(|(range, ..)| range).collect();

    let [start, size] = ["kmem_start", "kmem_size"].map(|name| given(name, ""));
    if !start.is_empty() {
        let params = kmem::params::Params {
            start: &start,
            size: &size,
            format: "",
            force: "0",
            atomic: "1",
            scrub: "0",
            dax: "0",
        };
        match kmem::params::Config::new(params) {
            Ok(config) => ranges.extend(config.ranges().map(|(range, ..)| range)),
            Err(error) => findings.problem(
                format!("the module's parameters are refused: {error}"),
                format!("correct them in {}", from()),
            ),
        }
    }
    Some(Configured {
        ranges,
        e820: config.e820(),
    })
}

/// Whether a range that the module is told to serve can be served.
fn look_at(
    range: PhysRange,
    map: &Map,
    entries: &[Entry<'_>],
    is_pending: bool,
    findings: &mut Findings,
) {
    let meets = |area: &&Area| area.range.overlaps(&range);
    let parts: Vec<&Area> = map.all().filter(meets).collect();
    let title = format!("{range} of {}", Size(range.size()));
    if parts
        .iter()
        .any(|area| area.name.starts_with("pmem") || area.name.starts_with("kmem"))
    {
        return findings.ok(format!("{title} is the module's"));
    }
    if let Some(area) = parts.iter().find(|area| area.name.starts_with("namespace")) {
        return findings.problem(
            format!(
                "{title} is held by the kernel's own driver, as {}",
                area.name
            ),
            "boot with module_blacklist=nd_e820, or write e820_pmem to \
             /sys/bus/platform/drivers/e820_pmem/unbind before the module is loaded",
        );
    }
    let ram = parts.iter().find(|area| area.name == SYSTEM_RAM);
    if let Some(both) = ram.and_then(|area| common(area.range, range)) {
        let reserved = entries
            .iter()
            .filter(|entry| entry.kind == Kind::Reserved)
            .filter_map(|entry| entry.range)
            .find(|reserved| reserved.overlaps(&range));
        let remedy = match reserved {
            _ if is_pending => return,
            Some(reserved) => format!(
                "memmap= reserves {reserved}, and the module is to have {range}: make them the same, memmap={}${}",
                Bytes(range.size()),
                Bytes(range.start())
            ),
            None => format!(
                "nothing reserves it: give the kernel {}, in /etc/default/grub as {}; update-grub, and boot again",
                memmap::reserve(range),
                memmap::for_grub_defaults(&memmap::reserve(range))
            ),
        };
        return findings.problem(format!("{both} of {title} is RAM of the system"), remedy);
    }
    if let Some(area) = parts.iter().find(|area| area.name == LEGACY) {
        return findings.ok(format!(
            "{title} is what firmware calls persistent memory, {}",
            area.range
        ));
    }
    if parts.iter().any(|area| area.name == RESERVED) {
        return findings.ok(format!("{title} is reserved"));
    }
    match parts.first() {
        Some(area) => findings.problem(
            format!("{title} is \"{}\"", area.name),
            "choose another range: pmemctl plan SIZE proposes one",
        ),
        None => findings.problem(
            format!("there is nothing at {title}"),
            "choose a range of RAM: pmemctl plan SIZE proposes one",
        ),
    }
}

/// Whether somebody else has what firmware calls persistent.
fn legacy(map: &Map, wanted: bool, findings: &mut Findings) {
    for area in map.named(LEGACY) {
        let taken = area
            .inner
            .iter()
            .find(|inner| inner.name.starts_with("namespace"));
        match (taken, wanted) {
            (Some(by), true) => findings.problem(
                format!(
                    "{} is persistent memory, and the kernel's own driver nd_e820 was first to have it, as {}",
                    area.range, by.name
                ),
                "boot with module_blacklist=nd_e820, or write e820_pmem to \
                 /sys/bus/platform/drivers/e820_pmem/unbind before the module is loaded",
            ),
            (Some(_), false) => findings.note(format!(
                "{} is persistent memory that the kernel's own driver has; pmem_e820=1 with \
                 module_blacklist=nd_e820 has it here",
                area.range
            )),
            (None, false) if area.inner.is_empty() => findings.note(format!(
                "{} is persistent memory that nobody has; pmem_e820=1 makes a disk of it",
                area.range
            )),
            (None, _) => {}
        }
    }
}

/// The module is not told of any range.
fn no_range(entries: &[Entry<'_>], findings: &mut Findings) {
    let reserved = entries
        .iter()
        .filter(|entry| entry.kind == Kind::Reserved)
        .find_map(|entry| entry.range);
    match reserved {
        Some(range) => findings.problem(
            format!("{range} is reserved, but the module is not told of it"),
            format!(
                "echo 'options pmem pmem_start={} pmem_size={}' >/etc/modprobe.d/pmem.conf, and load it again",
                Bytes(range.start()),
                Bytes(range.size())
            ),
        ),
        None => findings.note(
            "no memory is reserved on the kernel's command line, and the module is not told of any: there are only \
             the disks of devices; pmemctl plan SIZE proposes a range",
        ),
    }
}

/// Whether the kernel's own driver has the virtio-pmem devices.
fn virtio(system: &System, findings: &mut Findings) {
    const DEVICES: &str = "/sys/bus/virtio/devices";
    for device in system.names(DEVICES) {
        if system
            .value(format!("{DEVICES}/{device}/device"))
            .as_deref()
            != Some(VIRTIO_PMEM)
        {
            continue;
        }
        let driver = std::fs::read_link(system.path(format!("{DEVICES}/{device}/driver"))).ok();
        let driver = driver.and_then(|path| Some(path.file_name()?.to_str()?.to_owned()));
        match driver.as_deref() {
            Some("virtio_pmem") => findings.note(format!(
                "{device} is a virtio-pmem device that the kernel's own driver has; module_blacklist=virtio_pmem \
                 leaves it to this one"
            )),
            Some(driver) => findings.ok(format!("{device} is a virtio-pmem device of {driver}")),
            None => findings.note(format!("{device} is a virtio-pmem device that no driver has")),
        }
    }
}
