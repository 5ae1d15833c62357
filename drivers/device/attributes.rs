// SPDX-License-Identifier: GPL-2.0-only

//! What sysfs shows of a disk: `/sys/block/pmemN/pmem/`, which does not change while it is there.

use crate::{
    kapi::{
        attribute,
        numa::Node, //
    },
    pmem_core::range::PhysRange, //
};
use kernel::{
    prelude::*,
    str::CString, //
};

/// The directory's name.
pub(super) const NAME: &CStr = c"pmem";

/// What the files say.
pub(super) struct Attributes {
    pub(super) range: PhysRange,
    pub(super) node: Node,
    /// How it is mapped, as in `pmem_cache=`.
    pub(super) cache: &'static str,
    /// The instructions that make what is written durable.
    pub(super) copy: &'static str,
    /// When a write is durable.
    pub(super) durability: &'static str,
    pub(super) provider: &'static str,
    /// Where the struct pages are.
    pub(super) memmap: &'static str,
}

impl attribute::Attributes for Attributes {
    const LIST: &'static [(&'static CStr, bool)] = &[
        (c"start", false),
        (c"size", false),
        (c"node", false),
        (c"cache", false),
        (c"copy", false),
        (c"durability", false),
        (c"provider", false),
        (c"memmap", false),
    ];

    fn show(&self, index: usize) -> Result<CString> {
        match index {
            0 => CString::try_from_fmt(fmt!("{:#x}", self.range.start())),
            1 => CString::try_from_fmt(fmt!("{}", self.range.size())),
            2 => CString::try_from_fmt(fmt!("{}", self.node.id())),
            3 => CString::try_from_fmt(fmt!("{}", self.cache)),
            4 => CString::try_from_fmt(fmt!("{}", self.copy)),
            5 => CString::try_from_fmt(fmt!("{}", self.durability)),
            6 => CString::try_from_fmt(fmt!("{}", self.provider)),
            7 => CString::try_from_fmt(fmt!("{}", self.memmap)),
            _ => Err(ENODEV),
        }
    }
}
