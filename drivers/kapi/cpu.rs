// SPDX-License-Identifier: GPL-2.0-only

//! The CPU that this runs on, and the features that all have.
//!
//! C header: [`arch/x86/include/asm/cpufeature.h`](srctree/arch/x86/include/asm/cpufeature.h)

use super::bindings;

/// Returns whether the CPU has CLWB: write a line back, and keep it.
pub(crate) fn has_clwb() -> bool {
    // SAFETY: Reads the boot CPU's feature bits, which do not change after boot.
    unsafe { bindings::pmem_helper_cpu_has_clwb() }
}

/// Returns whether the CPU has CLFLUSHOPT: write a line back and drop it, weakly ordered.
pub(crate) fn has_clflushopt() -> bool {
    // SAFETY: As in `has_clwb()`.
    unsafe { bindings::pmem_helper_cpu_has_clflushopt() }
}

/// The number of the CPU that this runs on; it may be another one when the caller looks at it.
#[inline]
pub(crate) fn current() -> u32 {
    // SAFETY: Reads a variable of the CPU.
    unsafe { bindings::pmem_helper_cpu() }
}
