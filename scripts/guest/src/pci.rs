// SPDX-License-Identifier: GPL-2.0-only

//! The configuration space of PCI functions, behind their drivers' backs.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;

use serde_json::json;

/// Where the list of capabilities begins.
const CAPABILITIES: u64 = 0x34;

/// The capability of PCI Express, and in it the slot's control register and its status.
const EXPRESS: u8 = 0x10;
const SLOT_CONTROL: u64 = 0x18;
const SLOT_STATUS: u64 = 0x1a;

/// Of the slot's control: the light of its power, of which this is off, and its power, of which this is off.
const LIGHT: u16 = 0x300;
const POWER: u16 = 0x400;

/// Of the slot's status: whether there is something in it.
const PRESENT: u16 = 0x40;

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

/// Sets the slot behind `port`: `off`, without power and light, as if nobody needed what is in it; `dead`, without power;
/// or `on`. `show` says what it is.
pub fn slot(port: &str, what: &str) -> io::Result<()> {
    let config = Config::open(port)?;
    let express = config.capabilities(EXPRESS)?;
    let &(at, _) = express
        .first()
        .ok_or_else(|| io::Error::other(format!("{port} is not of PCI Express")))?;
    let control = config.word(at + SLOT_CONTROL)?;
    let lit = control & !(LIGHT | POWER) | 0x100;
    let new = match what {
        "off" => control | LIGHT | POWER,
        "dead" => lit | POWER,
        "on" => lit,
        "show" => {
            let status = config.word(at + SLOT_STATUS)?;
            println!(
                "{}",
                json!({
                    "power": control & POWER == 0,
                    "present": status & PRESENT != 0,
                    "control": control,
                    "status": status,
                })
            );
            return Ok(());
        }
        _ => return Err(io::Error::other(format!("{what:?} is nothing of a slot's"))),
    };
    config
        .file
        .write_all_at(&new.to_le_bytes(), at + SLOT_CONTROL)
}
