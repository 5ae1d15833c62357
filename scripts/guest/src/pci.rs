// SPDX-License-Identifier: GPL-2.0-only

//! The configuration space of PCI functions, behind their drivers' backs.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;

/// Where the list of capabilities begins.
const CAPABILITIES: u64 = 0x34;

/// The capability of PCI Express, and in it the slot's control register.
const EXPRESS: u8 = 0x10;
const SLOT_CONTROL: u64 = 0x18;

/// Of that: the light of the slot's power, of which this is off, and its power, of which this is off.
const LIGHT: u16 = 0x300;
const POWER: u16 = 0x400;

/// The configuration space of a function.
pub struct Config {
    /// Its file.
    pub file: File,
}

impl Config {
    /// That of `function`, such as `0000:01:00.0`.
    pub fn open(function: &str) -> io::Result<Self> {
        let path = format!("/sys/bus/pci/devices/{function}/config");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(|error| io::Error::new(error.kind(), format!("{path}: {error}")))?;
        Ok(Self { file })
    }

    /// Where its capabilities are that have the number `id`, in the order of their list, with their first bytes.
    pub fn capabilities(&self, id: u8) -> io::Result<Vec<(u64, [u8; 16])>> {
        let mut bytes = [0; 256];
        self.file.read_exact_at(&mut bytes, 0)?;
        let byte = |at: u64| bytes.get(at as usize).copied().unwrap_or_default();
        let mut found = Vec::new();
        let mut at = u64::from(byte(CAPABILITIES));
        // A list that is a loop ends, too.
        for _ in 0..bytes.len() {
            if at == 0 {
                break;
            }
            if byte(at) == id {
                found.push((at, std::array::from_fn(|n| byte(at + n as u64))));
            }
            at = u64::from(byte(at + 1));
        }
        Ok(found)
    }

    fn word(&self, at: u64) -> io::Result<u16> {
        let mut bytes = [0; 2];
        self.file.read_exact_at(&mut bytes, at)?;
        Ok(u16::from_le_bytes(bytes))
    }
}

/// Pulls out what is in the slot behind `port`.
///
/// QEMU takes it away when the slot has neither power nor light. Who drives the port must not have seen that, only that
/// there is nothing in it any more: it runs when this ends.
pub fn pull(port: &str) -> io::Result<()> {
    let config = Config::open(port)?;
    let express = config.capabilities(EXPRESS)?;
    let &(at, _) = express
        .first()
        .ok_or_else(|| io::Error::other(format!("{port} is not of PCI Express")))?;
    let control = config.word(at + SLOT_CONTROL)?;
    for control in [control | LIGHT | POWER, control] {
        config
            .file
            .write_all_at(&control.to_le_bytes(), at + SLOT_CONTROL)?;
    }
    Ok(())
}
