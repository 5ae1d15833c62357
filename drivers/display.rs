// SPDX-License-Identifier: GPL-2.0-only

//! Lets the kernel print what `src/` can display.

use crate::pmem_core::{
    memmap,
    range::PhysRange,
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

display!(memmap::Error<'_>, PhysRange, Size);
