// SPDX-License-Identifier: GPL-2.0-only

//! virtio-pmem devices: memory of the host's that a guest makes durable by asking the host to flush it.
//!
//! Each is behind a PCIe port of its own, so that it can come and go while the machine runs.

use super::monitor::Pluggable;
use super::{value, Persistent, GIB};

/// A virtio-pmem device of a machine to be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Device<'a> {
    /// What is in it.
    pub memory: &'a Persistent,
    /// Where in the guest's address space; QEMU chooses if this is `None`.
    pub address: Option<u64>,
    /// Whether the machine boots with it.
    pub plugged: bool,
}

/// The most that `devices` take of a guest's address space, each from a multiple of 1 GiB on.
pub(super) fn room(devices: &[Device<'_>]) -> u64 {
    let each = |device: &Device<'_>| device.memory.size().next_multiple_of(GIB);
    devices.iter().map(each).sum()
}

/// Device `n` to QEMU.
pub(super) fn pluggable(n: usize) -> Pluggable {
    Pluggable {
        driver: "virtio-pmem-pci",
        id: format!("pmem{n}"),
        bus: format!("port{n}"),
        memory: ("memdev", format!("backend{n}")),
    }
}

/// QEMU's arguments.
pub(super) fn arguments(devices: &[Device<'_>]) -> Vec<String> {
    let mut args = Vec::new();
    let mut push = |name: &str, value: String| args.extend([name.to_owned(), value]);
    for (n, device) in devices.iter().enumerate() {
        let memory = device.memory;
        push(
            "-object",
            format!(
                "memory-backend-file,id=backend{n},share=on,size={},mem-path={}",
                memory.size(),
                value(&memory.path())
            ),
        );
        push(
            "-device",
            format!("pcie-root-port,id=port{n},chassis={},slot={}", n + 1, n + 1),
        );
        if device.plugged {
            let at = match device.address {
                Some(address) => format!(",memaddr={address:#x}"),
                None => String::new(),
            };
            push("-device", pluggable(n).argument() + &at);
        }
    }
    args
}

/// A script that makes a guest let go of device `n`.
///
/// A port is a bus of its own: they are numbered from 1 on, in order.
pub(super) fn switch_off(n: usize) -> String {
    format!(
        "slot=$(grep -lx 0000:{:02x}:00 /sys/bus/pci/slots/*/address)
         echo 0 >${{slot%address}}power",
        n + 1
    )
}
