// SPDX-License-Identifier: GPL-2.0-only

//! Providers: each finds ranges of persistent memory and makes devices of them.

pub(crate) mod memmap;
