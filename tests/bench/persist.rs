// SPDX-License-Identifier: GPL-2.0-only

//! How fast the durability core copies into cold memory, against what else there is.
//!
//! | side | what it is |
//! |---|---|
//! | ours | `Persist::copy` and `Persist::fence` |
//! | kernel | the method of `__memcpy_flushcache()` (`arch/x86/lib/usercopy_64.c`): four loads and four MOVNTI of 8 bytes a step, and SFENCE |
//! | libpmem | `pmem_memcpy_persist()`, which may use vector registers |
//!
//! and by which policy it should copy:
//!
//! | side | what it is |
//! |---|---|
//! | nt | ours, past the cache: `CopyPolicy::NonTemporal` |
//! | wb | through the cache: `CopyPolicy::WriteBack`, with the best way to write a line back that the CPU has |
//! | wb-opt | the same with CLFLUSHOPT, which evicts the line |
//!
//! Each copy goes to a random slot of a region that is larger than the caches, in huge pages as in
//! the kernel's own mapping; its source is in the cache, as what a program just wrote is. Criterion
//! measures one side after the other. The tables at the end come from rounds in which the sides take
//! turns, so that a change of the machine's mood meets them all: they have medians, and medians of the
//! ratios within a round. The last of them is about a region that is in the cache, as far as the
//! sides leave it there.

#[cfg(not(target_arch = "x86_64"))]
fn main() {
    println!("skipped: there is no machine for this architecture to measure");
}

#[cfg(target_arch = "x86_64")]
fn main() {
    x86_64::main();
}

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use criterion::{
        BenchmarkId,
        Criterion,
        Throughput, //
    };
    use pmem_core::{
        persist::{
            Cache,
            CopyPolicy,
            CpuFeatures,
            Persist, //
        },
        size::Size,
    };
    use std::{
        alloc::{
            alloc,
            handle_alloc_error,
            Layout, //
        },
        arch::asm,
        hint::black_box,
        time::{
            Duration,
            Instant, //
        },
    };

    /// The sizes of the copies in bytes, all multiples of a line.
    const SIZES: [usize; 10] = [64, 128, 256, 512, 768, 1024, 2048, 4096, 16 << 10, 64 << 10];

    /// The size of the cold region in bytes.
    const REGION: usize = 512 << 20;

    /// The size of the part of it that the L2 cache has room for, in bytes.
    const WARM: usize = 256 << 10;

    /// How often each side takes its turn.
    const ROUNDS: usize = 301;

    /// How many bytes it copies in a turn, if these are not more than [`COPIES`].
    const BYTES: usize = 2 << 20;

    /// How many copies it makes in a turn at most.
    const COPIES: usize = 4096;

    /// The size and the alignment of a huge page in bytes.
    const HUGE: usize = 2 << 20;

    /// `pmem_memcpy_persist()` of libpmem.
    type MemcpyPersist = unsafe extern "C" fn(*mut u8, *const u8, usize) -> *mut u8;

    /// Who copies.
    #[derive(Clone, Copy)]
    enum Side {
        Ours(&'static str, Persist),
        Kernel,
        Libpmem(MemcpyPersist),
    }

    impl Side {
        fn name(self) -> &'static str {
            match self {
                Self::Ours(name, _) => name,
                Self::Kernel => "kernel",
                Self::Libpmem(_) => "libpmem",
            }
        }

        /// Copies `len` bytes and waits until they are durable.
        ///
        /// # Safety
        ///
        /// `dst` must be valid for writes and `src` for reads of `len` bytes, a multiple of 32.
        unsafe fn copy(self, dst: *mut u8, src: *const u8, len: usize) {
            // SAFETY: By the safety contract of this function.
            unsafe {
                match self {
                    Self::Ours(_, persist) => {
                        persist.copy(dst, src, len);
                        persist.fence();
                    }
                    Self::Kernel => kernel(dst, src, len),
                    Self::Libpmem(memcpy_persist) => {
                        memcpy_persist(dst, src, len);
                    }
                }
            }
        }
    }

    /// The kernel's method, for lengths without a remainder.
    ///
    /// # Safety
    ///
    /// As for [`Side::copy`].
    unsafe fn kernel(dst: *mut u8, src: *const u8, len: usize) {
        for at in (0..len).step_by(32) {
            // SAFETY: There are 32 bytes at `at`, by the safety contract of this function.
            unsafe {
                asm!(
                    "mov {a}, [{src}]",
                    "mov {b}, [{src} + 8]",
                    "mov {c}, [{src} + 16]",
                    "mov {d}, [{src} + 24]",
                    "movnti [{dst}], {a}",
                    "movnti [{dst} + 8], {b}",
                    "movnti [{dst} + 16], {c}",
                    "movnti [{dst} + 24], {d}",
                    src = in(reg) src.add(at),
                    dst = in(reg) dst.add(at),
                    a = out(reg) _,
                    b = out(reg) _,
                    c = out(reg) _,
                    d = out(reg) _,
                    options(nostack, preserves_flags),
                );
            }
        }
        // SAFETY: It has no effect but order.
        unsafe { asm!("sfence", options(nostack, preserves_flags)) };
    }

    /// `len` bytes that are never freed, in huge pages if there are any, and present.
    fn memory(len: usize, byte: u8) -> *mut u8 {
        let layout = Layout::from_size_align(len, HUGE).expect("it is a small power of two");
        // SAFETY: `len` is not zero.
        let addr = unsafe { alloc(layout) };
        if addr.is_null() {
            handle_alloc_error(layout);
        }

        // Without huge pages, it is slower for all sides.
        // SAFETY: These are whole pages of the memory that was just allocated.
        let _ = unsafe { libc::madvise(addr.cast(), len, libc::MADV_HUGEPAGE) };
        // SAFETY: It was just allocated with this size.
        unsafe { addr.write_bytes(byte, len) };
        addr
    }

    /// Where to copy from, and to.
    struct Bench {
        region: *mut u8,
        /// How many bytes of it are in use.
        size: usize,
        source: *mut u8,
        random: u64,
    }

    impl Bench {
        /// Makes `copies` copies of `len` bytes to random places.
        fn run(&mut self, side: Side, len: usize, copies: usize) -> Duration {
            let start = Instant::now();

            for _ in 0..copies {
                // Xorshift, whose low bits are the worse ones.
                self.random ^= self.random << 13;
                self.random ^= self.random >> 7;
                self.random ^= self.random << 17;
                let slot = (self.random >> 20) as usize % (self.size / len);
                // SAFETY: The slot is in the region. The source has as many bytes as the largest
                // size. All sizes are multiples of 32.
                unsafe { side.copy(self.region.add(slot * len), self.source, len) };
            }
            black_box(start.elapsed())
        }
    }

    /// libpmem, if it is here.
    fn libpmem() -> Option<Side> {
        // SAFETY: libpmem reads its environment and the CPU's features when it is loaded, and does
        // nothing else.
        let library = unsafe { libloading::Library::new("libpmem.so.1") }.ok()?;
        // It is never unloaded, so the function may be kept.
        let library = Box::leak(Box::new(library));
        // SAFETY: This is its type in libpmem.h.
        let symbol = unsafe { library.get::<MemcpyPersist>(b"pmem_memcpy_persist\0") }.ok()?;

        Some(Side::Libpmem(*symbol))
    }

    /// The middle one of `values`.
    fn median(mut values: Vec<f64>) -> f64 {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    }

    pub(super) fn main() {
        let cpu = CpuFeatures::detect();
        let ours = Persist::new(cpu);
        let by = |cpu, policy| Persist::for_cache(cpu, Cache::WriteBack, policy);
        let wb = by(cpu, CopyPolicy::WriteBack);
        let mut policies = vec![
            Side::Ours("nt", by(cpu, CopyPolicy::NonTemporal)),
            Side::Ours("wb", wb),
        ];
        if cpu.clwb && cpu.clflushopt {
            let cpu = CpuFeatures { clwb: false, ..cpu };
            policies.push(Side::Ours("wb-opt", by(cpu, CopyPolicy::WriteBack)));
        }
        let mut sides = vec![Side::Ours("ours", ours), Side::Kernel];
        match libpmem() {
            Some(side) => sides.push(side),
            None => println!("libpmem is skipped: to compare with it, apt-get install libpmem1"),
        }
        let mut bench = Bench {
            region: memory(REGION, 1),
            size: REGION,
            source: memory(HUGE, 2),
            random: 0x2545_f491_4f6c_dd1d,
        };

        let mut criterion = Criterion::default()
            .warm_up_time(Duration::from_millis(200))
            .measurement_time(Duration::from_millis(800))
            .sample_size(30)
            .configure_from_args();
        for len in SIZES {
            let mut group = criterion.benchmark_group("copy+fence");
            group.throughput(Throughput::Bytes(len as u64));
            // By the policy nt, it is ours.
            for &side in sides.iter().chain(policies.iter().skip(1)) {
                let id = BenchmarkId::new(side.name(), Size(len as u64));
                group.bench_function(id, |bencher| {
                    bencher.iter_custom(|copies| bench.run(side, len, copies as usize));
                });
            }
            group.finish();
        }
        criterion.final_summary();

        // Not when cargo only asks whether it runs.
        if std::env::args().any(|arg| arg == "--bench") {
            println!(
                "ours is {}, nt is the same, wb is {}",
                ours.name(),
                wb.name()
            );
            table(&mut bench, &sides, "cold");
            table(&mut bench, &policies, "cold");
            bench.size = WARM;
            table(&mut bench, &policies, "cached");
        }
    }

    /// Measures all sides by turns and prints how they compare.
    fn table(bench: &mut Bench, sides: &[Side], temperature: &str) {
        println!(
            "\ncopy + fence into {} of {temperature} memory, GB/s, medians of {ROUNDS} rounds\n",
            Size(bench.size as u64)
        );
        print!("{:>8}", "size");
        for side in sides {
            print!("{:>10}", side.name());
        }
        for side in &sides[1..] {
            print!("{:>16}", format!("{}/{}", sides[0].name(), side.name()));
        }
        println!();

        for len in SIZES {
            let copies = (BYTES / len).min(COPIES);
            let mut rates = vec![Vec::new(); sides.len()];
            for round in 0..ROUNDS {
                for turn in 0..sides.len() {
                    // Nobody is always the one after the same other.
                    let order = if round % 2 == 0 {
                        turn
                    } else {
                        sides.len() - 1 - turn
                    };
                    let i = (order + round / 2) % sides.len();
                    let time = bench.run(sides[i], len, copies).as_secs_f64();
                    rates[i].push((len * copies) as f64 / time / 1e9);
                }
            }

            print!("{:>8}", Size(len as u64).to_string());
            for rates in &rates {
                print!("{:>10.2}", median(rates.clone()));
            }
            for others in &rates[1..] {
                let ratios = rates[0]
                    .iter()
                    .zip(others)
                    .map(|(ours, other)| ours / other);
                print!("{:>16.3}", median(ratios.collect()));
            }
            println!();
        }
    }
}
