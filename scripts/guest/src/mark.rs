// SPDX-License-Identifier: GPL-2.0-only

//! Marks: how a program says where it is, to a host that records the machine.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;

/// The host bridge's configuration.
const BRIDGE: &str = "/sys/bus/pci/devices/0000:00:00.0/config";

/// A register of the bridge that has no meaning for it, and all for the recorder: the host's `pmem_trace::mark` is its
/// other end.
const REGISTER: u64 = 0xdc;

/// Where marks are made.
#[derive(Debug)]
pub struct Marks(File);

impl Marks {
    /// Needs to be root.
    pub fn open() -> io::Result<Self> {
        let bridge = OpenOptions::new().write(true).open(BRIDGE);
        let bridge =
            bridge.map_err(|error| io::Error::new(error.kind(), format!("{BRIDGE}: {error}")))?;
        Ok(Self(bridge))
    }

    /// Says this byte to the host, after all that this thread has done so far, and before what it does next.
    pub fn mark(&self, value: u8) -> io::Result<()> {
        self.0.write_all_at(&[value], REGISTER)
    }
}
