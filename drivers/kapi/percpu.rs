// SPDX-License-Identifier: GPL-2.0-only

//! Counters that each CPU has for itself, so that counting costs an instruction and shares no cache
//! line.
//!
//! C header: [`include/linux/percpu.h`](srctree/include/linux/percpu.h)

use super::bindings;
use kernel::prelude::*;

/// The bytes of a counter.
const SIZE: usize = size_of::<u64>();

/// What a CPU's counters are aligned to, in bytes: a cache line.
const ALIGN: usize = 64;

/// `N` counters a CPU. All begin at zero, and wrap.
///
/// # Invariants
///
/// Per-CPU memory of `N` counters, allocated and not freed. It is what C calls `__percpu`: not an
/// address, but what is added to the base of a CPU's memory.
pub(crate) struct Counters<const N: usize>(usize);

impl<const N: usize> Counters<N> {
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: Allocates; it is zero.
        match unsafe { bindings::pmem_helper_percpu_alloc(const { N * SIZE }, ALIGN) } {
            0 => Err(ENOMEM),
            // INVARIANT: Just allocated.
            percpu => Ok(Counters(percpu)),
        }
    }

    /// Adds `n` to counter `I` of this CPU, whatever else runs on it.
    #[inline(always)]
    pub(crate) fn add<const I: usize>(&self, n: u64) {
        const { assert!(I < N) };
        // SAFETY: By the type invariant, and just checked.
        unsafe { add::<I>(self.0, n) }
    }

    /// Adds 1 to counter `I` of this CPU.
    #[inline(always)]
    pub(crate) fn increment<const I: usize>(&self) {
        const { assert!(I < N) };
        // SAFETY: By the type invariant, and just checked.
        unsafe { increment::<I>(self.0) }
    }

    /// What all CPUs have counted in counter `I`. What is counted meanwhile may be in it or not.
    pub(crate) fn sum<const I: usize>(&self) -> u64 {
        const { assert!(I < N) };
        // SAFETY: By the type invariant, and just checked.
        unsafe { bindings::pmem_helper_percpu_sum(self.0.wrapping_add(const { I * SIZE })) }
    }
}

impl<const N: usize> Drop for Counters<N> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant; this is the only place that frees it.
        unsafe { bindings::pmem_helper_percpu_free(self.0) };
    }
}

/// Adds `n` to counter `I` of this CPU.
///
/// # Safety
///
/// `percpu` is per-CPU memory of more than `I` counters.
#[inline(always)]
#[cfg(all(target_arch = "x86_64", CONFIG_SMP, not(CONFIG_UML)))]
unsafe fn add<const I: usize>(percpu: usize, n: u64) {
    // SAFETY: By the function's contract. The base of this CPU's memory is that of the segment GS.
    // One instruction is done on one CPU, and an interrupt comes before or after it.
    unsafe {
        core::arch::asm!(
            "add qword ptr gs:[{percpu} + {offset}], {n}",
            percpu = in(reg) percpu,
            offset = const I * SIZE,
            n = in(reg) n,
            options(nostack),
        )
    };
}

/// Adds 1 to counter `I` of this CPU.
///
/// # Safety
///
/// As for [`add`].
#[inline(always)]
#[cfg(all(target_arch = "x86_64", CONFIG_SMP, not(CONFIG_UML)))]
unsafe fn increment<const I: usize>(percpu: usize) {
    // SAFETY: As in `add()`.
    unsafe {
        core::arch::asm!(
            "inc qword ptr gs:[{percpu} + {offset}]",
            percpu = in(reg) percpu,
            offset = const I * SIZE,
            options(nostack),
        )
    };
}

/// Adds `n` to counter `I` of this CPU.
///
/// # Safety
///
/// `percpu` is per-CPU memory of more than `I` counters.
#[inline(always)]
#[cfg(not(all(target_arch = "x86_64", CONFIG_SMP, not(CONFIG_UML))))]
unsafe fn add<const I: usize>(percpu: usize, n: u64) {
    // SAFETY: By the function's contract.
    unsafe { bindings::pmem_helper_percpu_add(percpu.wrapping_add(const { I * SIZE }), n) };
}

/// Adds 1 to counter `I` of this CPU.
///
/// # Safety
///
/// As for [`add`].
#[inline(always)]
#[cfg(not(all(target_arch = "x86_64", CONFIG_SMP, not(CONFIG_UML))))]
unsafe fn increment<const I: usize>(percpu: usize) {
    // SAFETY: By the function's contract.
    unsafe { add::<I>(percpu, 1) };
}

#[kernel::macros::kunit_tests(pmem_percpu)]
mod tests {
    use super::*;

    #[test]
    fn each_counter_counts_for_itself() -> Result {
        let counters = Counters::<8>::new()?;
        let all = |counters: &Counters<8>| {
            [
                counters.sum::<0>(),
                counters.sum::<1>(),
                counters.sum::<6>(),
                counters.sum::<7>(),
            ]
        };
        assert!(all(&counters) == [0; 4]);
        for _ in 0..1000 {
            counters.increment::<0>();
            counters.add::<1>(4096);
            counters.add::<7>(u64::from(u32::MAX));
        }
        assert!(all(&counters) == [1000, 4_096_000, 0, 1000 * u64::from(u32::MAX)]);
        counters.add::<7>(u64::MAX);
        assert!(counters.sum::<7>() == 1000 * u64::from(u32::MAX) - 1);

        // What the compiler's own instructions add is added to the same place.
        // SAFETY: It is counter 6.
        unsafe { bindings::pmem_helper_percpu_add(counters.0.wrapping_add(6 * SIZE), 5) };
        counters.increment::<6>();
        assert!(all(&counters) == [1000, 4_096_000, 6, 1000 * u64::from(u32::MAX) - 1]);
        Ok(())
    }
}
