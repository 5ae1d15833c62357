// SPDX-License-Identifier: GPL-2.0-only

//! PCI devices: memory behind a BAR, and NVMe disks that can reach it.
//!
//! Each memory is the BAR 2 of an `ivshmem-plain` device, behind a PCIe port of its own. With a switch, the disks are
//! behind ports of it, too:
//!
//! ```text
//! root complex ─┬─ root port ─── BAR 0             root complex ─── root port ─── switch ─┬─ port ─── BAR 0
//!               ├─ root port ─── BAR 1                                                    ├─ port ─── BAR 1
//!               └─ NVMe disk 0                                                            └─ port ─── NVMe disk 0
//! ```

use super::monitor::Pluggable;
use super::{value, Persistent};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// Devices of the root complex from here on are ours; QEMU gives the others numbers from 1 on.
const FIRST: usize = 0x10;

/// Ports have numbers that are unique in a machine; those of virtio-pmem devices begin with 1.
const SLOT: usize = 0x40;

/// A BAR of a machine to be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Device<'a> {
    /// What is in it.
    pub memory: &'a Persistent,
    /// Whether the machine boots with it.
    pub plugged: bool,
}

/// What a machine has of these.
#[derive(Debug, Clone, Default)]
pub(super) struct Devices<'a> {
    /// BARs.
    pub bars: Vec<Device<'a>>,
    /// What is on NVMe disks.
    pub disks: Vec<&'a Persistent>,
    /// Whether all of them are behind a switch.
    pub switched: bool,
}

/// BAR `n` to QEMU.
pub(super) fn pluggable(n: usize) -> Pluggable {
    Pluggable {
        driver: "ivshmem-plain",
        id: format!("bar{n}"),
        bus: format!("barport{n}"),
        memory: ("memdev", format!("barmem{n}")),
    }
}

/// Where a guest finds the devices, and what is in them.
#[derive(Debug, Clone)]
pub(super) struct Places {
    /// The bus of the first one.
    first: usize,
    /// Files and sizes of BARs.
    bars: Vec<(PathBuf, u64)>,
    switched: bool,
}

impl Places {
    /// Those of `devices`, in a machine with that many virtio-pmem devices, whose ports come first. Each port is a bus.
    pub fn new(devices: &Devices<'_>, virtio: usize) -> Self {
        // A switch is a bus itself, behind that of its root port.
        let before = if devices.switched { 3 } else { 1 };
        Self {
            first: virtio + before,
            bars: devices
                .bars
                .iter()
                .map(|device| (device.memory.path(), device.memory.size()))
                .collect(),
            switched: devices.switched,
        }
    }

    /// The file of BAR `n`, and its size.
    pub fn memory(&self, n: usize) -> Result<(&Path, u64)> {
        let (path, size) = self
            .bars
            .get(n)
            .with_context(|| format!("the machine has no BAR {n}"))?;
        Ok((path, *size))
    }

    /// The function of BAR `n`.
    pub fn bar(&self, n: usize) -> String {
        format!("0000:{:02x}:00.0", self.first + n)
    }

    /// The port of BAR `n`.
    pub fn port(&self, n: usize) -> String {
        if self.switched {
            format!("0000:{:02x}:{n:02x}.0", self.first - 1)
        } else {
            format!("0000:00:{:02x}.0", FIRST + n)
        }
    }

    /// The function of NVMe disk `n`.
    pub fn disk(&self, n: usize) -> String {
        if self.switched {
            format!("0000:{:02x}:00.0", self.first + self.bars.len() + n)
        } else {
            format!("0000:00:{:02x}.0", FIRST + self.bars.len() + n)
        }
    }
}

/// The firmware has large BARs below the last address that there is, where CPUs of AMD with 40 bits of addresses have
/// HyperTransport, so that a guest's kernel gives nothing a place there again. An emulated one can have fewer.
const ADDRESSES: [&str; 2] = ["-global", "max-x86_64-cpu.phys-bits=39"];

/// QEMU's arguments.
pub(super) fn arguments(devices: &Devices<'_>) -> Vec<String> {
    let mut args = Vec::new();
    let mut push = |name: &str, value: String| args.extend([name.to_owned(), value]);
    if !devices.bars.is_empty() {
        push(ADDRESSES[0], ADDRESSES[1].to_owned());
    }
    if devices.switched {
        push(
            "-device",
            format!("pcie-root-port,id=switchport,addr={FIRST:#x},chassis={SLOT},slot={SLOT}"),
        );
        push(
            "-device",
            "x3130-upstream,id=switch,bus=switchport".to_owned(),
        );
    }
    for (n, device) in devices.bars.iter().enumerate() {
        let memory = device.memory;
        let size = memory.size();
        let slot = SLOT + 1 + n;
        push(
            "-device",
            if devices.switched {
                format!("xio3130-downstream,id=barport{n},bus=switch,addr={n:#x},chassis={slot},slot={slot}")
            } else {
                format!(
                    "pcie-root-port,id=barport{n},addr={:#x},chassis={slot},slot={slot}",
                    FIRST + n
                )
            },
        );
        if device.plugged {
            push(
                "-object",
                format!(
                    "memory-backend-file,id=barmem{n},share=on,size={size},mem-path={}",
                    value(&memory.path())
                ),
            );
            push("-device", pluggable(n).argument());
        }
    }
    for (n, disk) in devices.disks.iter().enumerate() {
        push(
            "-drive",
            format!(
                "if=none,id=disk{n},format=raw,discard=unmap,file={}",
                value(&disk.path())
            ),
        );
        let at = devices.bars.len() + n;
        let bus = if devices.switched {
            let slot = SLOT + 1 + at;
            push(
                "-device",
                format!("xio3130-downstream,id=diskport{n},bus=switch,addr={at:#x},chassis={slot},slot={slot}"),
            );
            format!("bus=diskport{n}")
        } else {
            format!("bus=pcie.0,addr={:#x}", FIRST + at)
        };
        push(
            "-device",
            format!("nvme,serial=disk{n},drive=disk{n},{bus}"),
        );
    }
    args
}

/// Makes QEMU tell where NVMe disks read and write the guest's memory.
pub(super) const WATCH: [&str; 2] = ["-trace", "pci_nvme_map_addr"];

/// What a disk has read or written of the guest's memory, in order: addresses and sizes in bytes.
pub(super) fn accesses(said: &str) -> Vec<(u64, u64)> {
    let access = |line: &str| {
        // "pci_nvme_map_addr addr 0x103b6000 len 4096"
        let (_, rest) = line.split_once("pci_nvme_map_addr addr 0x")?;
        let (address, len) = rest.split_once(" len ")?;
        Some((
            u64::from_str_radix(address, 16).ok()?,
            len.trim().parse().ok()?,
        ))
    };
    said.lines().filter_map(access).collect()
}

/// Has ports tell the guest themselves that a device comes or goes, as those of real machines do, not by ACPI.
pub(super) const NATIVE: [&str; 2] = [
    "-global",
    "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off",
];

#[cfg(test)]
mod tests {
    use super::super::MIB;
    use super::*;

    #[test]
    fn accesses_are_read_from_a_trace() {
        let said = "qemu: note\npci_nvme_map_addr addr 0xfe000 len 4096\n17@1.5:pci_nvme_map_addr addr 0x100000000 len 512\n";
        assert_eq!(accesses(said), [(0xfe000, 4096), (0x1_0000_0000, 512)]);
        assert_eq!(accesses("pci_nvme_map_addr addr 0xzz len 1"), []);
    }

    #[test]
    fn places_are_as_the_firmware_numbers_buses() {
        let memory = Persistent::sparse(MIB, 0).unwrap();
        let device = Device {
            memory: &memory,
            plugged: true,
        };
        let mut devices = Devices {
            bars: vec![device; 2],
            disks: vec![&memory],
            switched: false,
        };
        let places = Places::new(&devices, 1);
        assert_eq!(places.bar(1), "0000:03:00.0");
        assert_eq!(places.port(1), "0000:00:11.0");
        assert_eq!(places.disk(0), "0000:00:12.0");
        devices.switched = true;
        let places = Places::new(&devices, 0);
        assert_eq!(places.bar(0), "0000:03:00.0");
        assert_eq!(places.port(1), "0000:02:01.0");
        assert_eq!(places.disk(0), "0000:05:00.0");
    }
}
