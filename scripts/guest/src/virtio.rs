// SPDX-License-Identifier: GPL-2.0-only

//! Writes to a virtio device behind its driver's back, through the window in its PCI configuration space that the
//! virtio specification has for firmware (`VIRTIO_PCI_CAP_PCI_CFG`).

use std::io;
use std::os::unix::fs::FileExt;

use crate::pci::Config;

/// A capability of a vendor's own.
const VENDOR: u8 = 9;

/// Kinds of structures of a virtio device.
const COMMON: u8 = 1;
const NOTIFY: u8 = 2;
const WINDOW: u8 = 5;

/// Fields of the common structure: where they are, and how many bytes.
const FIELDS: &[(&str, u32, u32)] = &[
    ("status", 0x14, 1),
    ("queue", 0x16, 2),
    ("enable", 0x1c, 2),
    ("desc", 0x20, 8),
    ("driver", 0x28, 8),
    ("device", 0x30, 8),
];

/// A structure of the device's, as its capability says.
struct Structure {
    /// Where the capability is.
    at: u64,
    bar: u8,
    offset: u32,
}

/// The window to a device.
struct Window {
    config: Config,
    at: u64,
}

impl Window {
    fn open(device: &str) -> io::Result<Self> {
        let config = Config::open(device)?;
        let at = find(&config, WINDOW)?.at;
        Ok(Self { config, at })
    }

    /// Points it at `len` bytes of a structure, and says where they are then.
    fn select(&self, structure: &Structure, offset: u32, len: u32) -> io::Result<u64> {
        let config = &self.config.file;
        config.write_all_at(&[structure.bar], self.at + 4)?;
        let offset = structure.offset + offset;
        config.write_all_at(&offset.to_le_bytes(), self.at + 8)?;
        config.write_all_at(&len.to_le_bytes(), self.at + 12)?;
        Ok(self.at + 16)
    }

    fn write(&self, structure: &Structure, offset: u32, value: &[u8]) -> io::Result<()> {
        for (piece, offset) in value.chunks(4).zip((offset..).step_by(4)) {
            let at = self.select(structure, offset, piece.len() as u32)?;
            self.config.file.write_all_at(piece, at)?;
        }
        Ok(())
    }
}

/// The first structure of this kind.
fn find(config: &Config, kind: u8) -> io::Result<Structure> {
    let capabilities = config.capabilities(VENDOR)?;
    let found = capabilities.iter().find(|(_, bytes)| bytes[3] == kind);
    let &(at, bytes) = found
        .ok_or_else(|| io::Error::other(format!("the device has no structure of kind {kind}")))?;
    Ok(Structure {
        at,
        bar: bytes[4],
        offset: u32::from_le_bytes([8, 9, 10, 11].map(|n| bytes[n])),
    })
}

/// Sets fields in order, each as `FIELD=VALUE`; `notify=QUEUE` is the driver's signal that a queue has something.
pub fn set(device: &str, assignments: &[&str]) -> io::Result<()> {
    let window = Window::open(device)?;
    let common = find(&window.config, COMMON)?;
    for assignment in assignments {
        let odd = || io::Error::other(format!("{assignment:?} is no FIELD=VALUE"));
        let (name, value) = assignment.split_once('=').ok_or_else(odd)?;
        let value = match value.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16),
            None => value.parse(),
        };
        let value = value.map_err(|_| odd())?.to_le_bytes();
        if name == "notify" {
            // Of a device with one queue.
            window.write(&find(&window.config, NOTIFY)?, 0, &value[..2])?;
        } else {
            let &(_, offset, len) = FIELDS
                .iter()
                .find(|(field, ..)| *field == name)
                .ok_or_else(odd)?;
            window.write(&common, offset, &value[..len as usize])?;
        }
    }
    Ok(())
}

/// Prints the device's status.
pub fn status(device: &str) -> io::Result<()> {
    let window = Window::open(device)?;
    let common = find(&window.config, COMMON)?;
    let at = window.select(&common, FIELDS[0].1, 1)?;
    let mut status = [0];
    window.config.file.read_exact_at(&mut status, at)?;
    println!("{:#04x}", status[0]);
    Ok(())
}
