// SPDX-License-Identifier: GPL-2.0-only

//! Lets the kernel print what `src/` can display.

use crate::pmem_core::{
    iopmem,
    kmem::{
        layout, params,
        scan::EntryFault,
        superblock::{
            Format,
            Place,
            ProbeError,
            Repair,
            Uuid, //
        },
    },
    memmap,
    range::{
        self,
        PhysRange, //
    },
    reserve,
    size::Size, //
};
use kernel::fmt;

macro_rules! display {
    ($($type:ty),* $(,)?) => {$(
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                core::fmt::Display::fmt(self, f)
            }
        }
    )*};
}

display!(
    EntryFault,
    Format,
    iopmem::NoPages,
    iopmem::Unusable,
    layout::Error,
    memmap::Error<'_>,
    params::Error<'_>,
    PhysRange,
    Place,
    ProbeError,
    range::Error,
    Repair,
    Size,
    Uuid,
    reserve::Erase,
    reserve::Fault,
    reserve::Place,
    reserve::Refusal,
);
