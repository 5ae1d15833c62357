// SPDX-License-Identifier: GPL-2.0-only

//! x86-64: MOVNTI past the cache, MOV through it, CLWB or its elders to write a line back, SFENCE.
//!
//! In memory that is not cached write-back, MOVNTI is the right store, too, and SFENCE is all that is
//! needed after it (Intel SDM, volume 1, "Caching of Temporal vs. Non-Temporal Data", and volume 3,
//! "Memory Cache Control"):
//!
//! | mode | MOVNTI | MOV, for edges |
//! |---|---|---|
//! | write-through | past the cache, collected in a write-combining buffer; a cached line is dropped | to the memory as well as to the cache |
//! | write-combining | collected in a write-combining buffer | the same |
//! | uncached | as MOV: the hint is ignored | to the memory, each in order |
//!
//! SFENCE waits until the write-combining buffers and the store buffer are empty. It is needed in each
//! of the three: a store that has retired may still be in one of them.
//!
//! All by assembly in general purpose registers: vector registers would need the kernel's FPU
//! bracket, which costs more than it gains.

use super::{
    words::Bus,
    CpuFeatures,
    Machine,
    Source,
    Way, //
};
use core::arch::asm;

/// Copies granules by this instruction, each by one store.
///
/// CPUs were seen to put one MOVNTI a cycle into their write-combining buffers, and to be busy with
/// just that, in any order of loads and stores, with and without prefetches. So the loop is made for
/// few instructions: 18 a line. With four lines a step they would be 17, but sources beyond the L1
/// cache slower. The stores are in ascending order, so that each buffer is full before the next is
/// opened. Stores through the cache, by MOV, do not mind.
///
/// Each granule of the source is read by one load, too, which is aligned if the source is.
macro_rules! copy_granules {
    ($store:literal, $dst:expr, $src:expr, $granules:expr) => {
        asm!(
            "sub {left}, 16",
            "jb 3f",
            // Two lines.
            "2:",
            ".irp line, 0, 64",
            "mov {a}, [{src} + \\line]",
            "mov {b}, [{src} + \\line + 8]",
            "mov {c}, [{src} + \\line + 16]",
            "mov {d}, [{src} + \\line + 24]",
            concat!($store, " [{dst} + \\line], {a}"),
            concat!($store, " [{dst} + \\line + 8], {b}"),
            concat!($store, " [{dst} + \\line + 16], {c}"),
            concat!($store, " [{dst} + \\line + 24], {d}"),
            "mov {a}, [{src} + \\line + 32]",
            "mov {b}, [{src} + \\line + 40]",
            "mov {c}, [{src} + \\line + 48]",
            "mov {d}, [{src} + \\line + 56]",
            concat!($store, " [{dst} + \\line + 32], {a}"),
            concat!($store, " [{dst} + \\line + 40], {b}"),
            concat!($store, " [{dst} + \\line + 48], {c}"),
            concat!($store, " [{dst} + \\line + 56], {d}"),
            ".endr",
            "add {src}, 128",
            "add {dst}, 128",
            "sub {left}, 16",
            "jae 2b",
            // What is left, by four granules and by one.
            "3:",
            "add {left}, 12",
            "jnc 5f",
            "4:",
            "mov {a}, [{src}]",
            "mov {b}, [{src} + 8]",
            "mov {c}, [{src} + 16]",
            "mov {d}, [{src} + 24]",
            concat!($store, " [{dst}], {a}"),
            concat!($store, " [{dst} + 8], {b}"),
            concat!($store, " [{dst} + 16], {c}"),
            concat!($store, " [{dst} + 24], {d}"),
            "add {src}, 32",
            "add {dst}, 32",
            "sub {left}, 4",
            "jae 4b",
            "5:",
            "add {left}, 4",
            "jz 7f",
            "6:",
            "mov {a}, [{src}]",
            concat!($store, " [{dst}], {a}"),
            "add {src}, 8",
            "add {dst}, 8",
            "dec {left}",
            "jnz 6b",
            "7:",
            src = inout(reg) $src => _,
            dst = inout(reg) $dst => _,
            left = inout(reg) $granules => _,
            a = out(reg) _,
            b = out(reg) _,
            c = out(reg) _,
            d = out(reg) _,
            options(nostack),
        )
    };
}

/// Stores granules of zeros by this instruction, each by one store.
macro_rules! zero_granules {
    ($store:literal, $dst:expr, $granules:expr) => {
        asm!(
            "sub {left}, 8",
            "jb 3f",
            "2:",
            ".irp granule, 0, 8, 16, 24, 32, 40, 48, 56",
            concat!($store, " [{dst} + \\granule], {zero}"),
            ".endr",
            "add {dst}, 64",
            "sub {left}, 8",
            "jae 2b",
            "3:",
            "add {left}, 8",
            "jz 5f",
            "4:",
            concat!($store, " [{dst}], {zero}"),
            "add {dst}, 8",
            "dec {left}",
            "jnz 4b",
            "5:",
            dst = inout(reg) $dst => _,
            left = inout(reg) $granules => _,
            zero = in(reg) 0_u64,
            options(nostack),
        )
    };
}

/// How a line is written back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WriteBack {
    Clwb,
    Clflushopt,
    Clflush,
}

/// An x86-64 CPU.
#[derive(Clone, Copy, Debug)]
pub struct X86_64 {
    write_back: WriteBack,
}

impl X86_64 {
    /// Chooses the best way to write a line back that the CPU has.
    pub const fn new(cpu: CpuFeatures) -> Self {
        let write_back = if cpu.clwb {
            WriteBack::Clwb
        } else if cpu.clflushopt {
            WriteBack::Clflushopt
        } else {
            WriteBack::Clflush
        };

        Self { write_back }
    }

    /// Asks the CPU that this runs on (CPUID leaf 7).
    pub fn detect() -> CpuFeatures {
        use core::arch::x86_64::{
            __cpuid,
            __cpuid_count, //
        };

        const LEAF: u32 = 7;

        #[allow(unused_unsafe, reason = "later compilers have them as safe functions")]
        // SAFETY: Each x86-64 CPU has CPUID, and the leaf is only asked for if there is one.
        let features = unsafe {
            if __cpuid(0).eax < LEAF {
                return CpuFeatures::default();
            }
            __cpuid_count(LEAF, 0).ebx
        };

        CpuFeatures {
            clflushopt: features & (1 << 23) != 0,
            clwb: features & (1 << 24) != 0,
        }
    }
}

impl Machine for X86_64 {
    const DURABLE: bool = true;

    fn name(self, way: Way) -> &'static str {
        match (way, self.write_back) {
            (Way::PastCache, WriteBack::Clwb) => "movnti+clwb",
            (Way::PastCache, WriteBack::Clflushopt) => "movnti+clflushopt",
            (Way::PastCache, WriteBack::Clflush) => "movnti+clflush",
            (Way::ThroughCache, WriteBack::Clwb) => "mov+clwb",
            (Way::ThroughCache, WriteBack::Clflushopt) => "mov+clflushopt",
            (Way::ThroughCache, WriteBack::Clflush) => "mov+clflush",
            (Way::NoDirtyLines, _) => "movnti",
        }
    }

    #[inline]
    unsafe fn store(self, dst: *mut u8, src: Source, len: usize) {
        for i in 0..len {
            let byte = match src {
                // SAFETY: By the safety contract of this function.
                Source::Memory(src) => unsafe { src.wrapping_add(i).read_volatile() },
                Source::Zeros => 0,
            };
            // SAFETY: By the safety contract of this function.
            unsafe { dst.wrapping_add(i).write_volatile(byte) };
        }
    }

    #[inline]
    unsafe fn store_granule(self, dst: *mut u8, value: u64) {
        // Stores become visible in order, and a store within a line as a whole.
        // SAFETY: By the safety contract of this function, the 8 bytes at `dst` may be written.
        unsafe {
            asm!(
                "mov [{dst}], {value}",
                dst = in(reg) dst,
                value = in(reg) value,
                options(nostack, preserves_flags),
            );
        }
    }

    #[inline]
    unsafe fn store_granules(self, dst: *mut u8, src: Source, granules: usize) {
        // SAFETY: It stores as many granules at `dst`, and reads them from `src`, which are valid
        // and aligned by the safety contract of this function.
        unsafe {
            match src {
                Source::Memory(src) => copy_granules!("mov", dst, src, granules),
                Source::Zeros => zero_granules!("mov", dst, granules),
            }
        }
    }

    #[inline]
    unsafe fn stream_half(self, dst: *mut u8, src: Source) {
        let half = match src {
            // SAFETY: By the safety contract of this function; an array of bytes has any address.
            Source::Memory(src) => unsafe { src.cast::<[u8; 4]>().read_volatile() },
            Source::Zeros => [0; 4],
        };
        // SAFETY: By the safety contract of this function, the 4 bytes at `dst` may be written.
        unsafe {
            asm!(
                "movnti [{dst}], {half:e}",
                dst = in(reg) dst,
                half = in(reg) u32::from_ne_bytes(half),
                options(nostack, preserves_flags),
            );
        }
    }

    #[inline]
    unsafe fn stream(self, dst: *mut u8, src: Source, granules: usize) {
        // SAFETY: It stores as many granules at `dst`, and reads them from `src`, which are valid
        // and aligned by the safety contract of this function.
        unsafe {
            match src {
                Source::Memory(src) => copy_granules!("movnti", dst, src, granules),
                Source::Zeros => zero_granules!("movnti", dst, granules),
            }
        }
    }

    #[inline]
    unsafe fn write_back(self, addr: *const u8) {
        // SAFETY: The memory is mapped by the safety contract of this function, and its bytes stay
        // as they are. The instruction is one that the CPU has.
        unsafe {
            match self.write_back {
                WriteBack::Clwb => {
                    asm!("clwb [{}]", in(reg) addr, options(nostack, preserves_flags));
                }
                WriteBack::Clflushopt => {
                    asm!("clflushopt [{}]", in(reg) addr, options(nostack, preserves_flags));
                }
                // Old CPUs of AMD order CLFLUSH by MFENCE alone, so that the fence to come would
                // not wait for it.
                WriteBack::Clflush => {
                    asm!("clflush [{}]", "mfence", in(reg) addr, options(nostack, preserves_flags));
                }
            }
        }
    }

    #[inline]
    fn fence(self) {
        // SAFETY: It has no effect but order.
        unsafe { asm!("sfence", options(nostack, preserves_flags)) };
    }
}

impl Bus for X86_64 {
    #[inline]
    unsafe fn load_granules(self, dst: *mut u8, src: *const u8, granules: usize) {
        // In memory that is write-combining, loads keep no order of their own.
        // SAFETY: LFENCE has no effect but order. Then it reads as many granules from `src`, each by
        // one load, and stores them at `dst`, which are valid by the safety contract of this function.
        unsafe {
            asm!("lfence", options(nostack, preserves_flags));
            copy_granules!("mov", dst, src, granules);
        }
    }

    #[inline]
    unsafe fn load_through(self, src: *const u8) -> u64 {
        let value;

        // The first MFENCE waits for the stores before, and empties the write-combining buffers,
        // which SFENCE does, too. But it also waits for the loads before, and it alone orders the
        // CLFLUSH of old CPUs of AMD.
        //
        // CLFLUSH drops the line, which only matters in a range that is cached. What brings it back
        // from here on, be it this load or a prefetch, has asked for it after the stores had left.
        //
        // The second MFENCE keeps the load from being done before that: CLFLUSH does not order loads,
        // and the CPU may load ahead of time from any memory but an uncached one.
        //
        // After the load nothing is needed: no store that comes later is seen by others before it.
        // SAFETY: The memory is valid for reads by the safety contract of this function, and its
        // bytes stay as they are.
        unsafe {
            asm!(
                "mfence",
                "clflush [{src}]",
                "mfence",
                "mov {value}, [{src}]",
                src = in(reg) src,
                value = out(reg) value,
                options(nostack, preserves_flags),
            );
        }
        value
    }
}
