// SPDX-License-Identifier: GPL-2.0-only

//! The kernels that we know how to get.

use std::fmt;

/// A kernel to build for, and to boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, clap::ValueEnum)]
pub enum Flavour {
    /// Debian's kernel for virtual machines, unmodified.
    Cloud,
    /// Debian's general kernel, unmodified.
    Amd64,
    /// A small kernel of our own: KUnit, and the C drivers to compare with.
    Test,
    /// The same, with the driver linked in.
    Builtin,
    /// The same, with the sanitizers. Slow.
    Debug,
}

impl Flavour {
    /// All of them.
    pub const ALL: [Flavour; 5] = [
        Flavour::Cloud,
        Flavour::Amd64,
        Flavour::Test,
        Flavour::Builtin,
        Flavour::Debug,
    ];

    /// As it is written on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Flavour::Cloud => "cloud",
            Flavour::Amd64 => "amd64",
            Flavour::Test => "test",
            Flavour::Builtin => "builtin",
            Flavour::Debug => "debug",
        }
    }

    /// How many times as long as in the others things take in it.
    pub fn slowness(self) -> u32 {
        match self {
            Flavour::Debug => 10,
            _ => 1,
        }
    }

    /// Whether Debian built it.
    pub fn is_stock(self) -> bool {
        matches!(self, Flavour::Cloud | Flavour::Amd64)
    }
}

impl fmt::Display for Flavour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
