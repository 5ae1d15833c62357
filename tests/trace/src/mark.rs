// SPDX-License-Identifier: GPL-2.0-only

//! Marks: how a program in the guest says where it is, in the order of what the CPUs do.
//!
//! It writes a byte to a register of the PCI function 00:00.0, at [`REGISTER`] in its file `config` in sysfs. The kernel
//! writes it by I/O ports, which the plugin sees (PCI Local Bus Specification, "Configuration Mechanism"). The function
//! is QEMU's host bridge, for which the register has no meaning: Intel calls it scratchpad data. So a mark stores
//! nothing to the memory that is recorded, and needs no device and no file that a kernel may lack, as `/dev/port`.

use std::sync::atomic::{AtomicU32, Ordering};

/// The register.
pub const REGISTER: u8 = 0xdc;

/// The port that says which register is meant, and the first one of its contents.
const ADDRESS: u16 = 0xcf8;
const DATA: u16 = 0xcfc;

/// The register, as it is written to the first port: that one is enabled, bus 0, device 0, function 0.
const MARK: u32 = (1 << 31) | REGISTER as u32;

/// Finds marks among what is written to I/O ports.
#[derive(Debug, Default)]
pub struct Marks {
    address: AtomicU32,
}

impl Marks {
    /// Has seen nothing yet.
    pub const fn new() -> Self {
        Self {
            address: AtomicU32::new(0),
        }
    }

    /// A CPU writes `bytes` bytes to a port, the lowest of `value`. Returns the mark, if it is one. The kernel has one
    /// CPU at a time do this.
    pub fn out(&self, port: u16, value: u32, bytes: u8) -> Option<u8> {
        match (port, bytes) {
            (ADDRESS, 4) => {
                self.address.store(value, Ordering::Relaxed);
                None
            }
            (DATA, 1) if self.address.load(Ordering::Relaxed) == MARK => Some(value as u8),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_a_byte_to_one_register() {
        let marks = Marks::new();
        assert_eq!(marks.out(0xcfc, 7, 1), None);
        assert_eq!(marks.out(0xcf8, 0x8000_00dc, 4), None);
        assert_eq!(marks.out(0xcfc, 0x1234, 1), Some(0x34));
        assert_eq!(marks.out(0xcfc, 8, 1), Some(8));
        // Neither to a part of it, nor more of it, nor elsewhere.
        for (port, bytes) in [(0xcfd, 1), (0xcfc, 2), (0xcfc, 4), (0xcf8, 1), (0x5e, 1)] {
            assert_eq!(marks.out(port, 9, bytes), None, "{port:#x}");
        }
        for register in [0x8000_00d8, 0xdc, 0x8000_08dc, 0x8001_00dc] {
            assert_eq!(marks.out(0xcf8, register, 4), None);
            assert_eq!(marks.out(0xcfc, 10, 1), None, "{register:#x}");
        }
    }
}
