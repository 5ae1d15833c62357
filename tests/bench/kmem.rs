// SPDX-License-Identifier: GPL-2.0-only

//! How fast the index of a range is scanned, which is what an administrator waits for when a disk
//! comes up.
//!
//! | index | what it is |
//! |---|---|
//! | empty | of a disk that was just formatted |
//! | in order | of a disk that was written once, from its start to its middle |
//! | at random | of a disk half of which was written again and again: any page for any block |
//!
//! It is in memory, as that of a range is. Besides criterion's report, there is the rate in bytes of
//! the range, and the time for 1 TiB that follows from it.

use criterion::{
    BatchSize,
    Criterion,
    Throughput, //
};
use pmem_core::{
    kmem::{
        bitmap::Bitmap,
        layout::Layout,
        scan::{
            hold_metadata,
            scan, //
        },
        PAGE_SIZE, //
    },
    medium::{
        Medium,
        Unreadable, //
    },
    size::Size,
};
use std::{
    hint::black_box,
    sync::atomic::AtomicU64,
    time::{
        Duration,
        Instant, //
    },
};

/// The size of the range in bytes.
const RANGE: u64 = 64 << 30;

/// How often each is measured for the table.
const ROUNDS: usize = 9;

/// The index of a range, without the rest of it.
struct Index(Vec<u8>);

impl Medium for Index {
    fn size(&self) -> u64 {
        RANGE
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Unreadable> {
        let at = (offset - PAGE_SIZE) as usize;
        buf.copy_from_slice(&self.0[at..at + buf.len()]);
        Ok(())
    }
}

impl Index {
    /// The index of a disk, the first blocks of which have these pages.
    fn new(layout: &Layout, pages: &[u64]) -> Self {
        let mut bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        bytes.resize((layout.index_pages() * PAGE_SIZE) as usize, 0);
        Self(bytes)
    }
}

/// Mixes up the order of `pages`, always in the same way.
fn shuffle(pages: &mut [u64]) {
    let mut random = 0x2545_f491_4f6c_dd1d_u64;

    for i in (1..pages.len()).rev() {
        // Xorshift, whose low bits are the worse ones.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        pages.swap(i, (random >> 20) as usize % (i + 1));
    }
}

/// A bitmap for the scan.
fn held(layout: &Layout) -> Vec<AtomicU64> {
    let words = Bitmap::words(layout.pages()).expect("it fits in memory");
    let words: Vec<_> = (0..words).map(|_| AtomicU64::new(0)).collect();
    hold_metadata(layout, Bitmap::new(&words));
    words
}

fn main() {
    let layout = Layout::blk(RANGE / PAGE_SIZE).expect("it is large enough");
    let data: Vec<u64> = layout.data().collect();
    let half = data.len() / 2;
    let mut mixed = data.clone();
    shuffle(&mut mixed);
    let indexes = [
        ("empty", 0, Index::new(&layout, &[])),
        ("in order", half, Index::new(&layout, &data[..half])),
        ("at random", half, Index::new(&layout, &mixed[..half])),
    ];
    drop((data, mixed));

    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3))
        .sample_size(10)
        .configure_from_args();
    let mut group = criterion.benchmark_group("scan");
    group.throughput(Throughput::Elements(layout.blocks()));
    for (name, _, index) in &indexes {
        group.bench_function(*name, |bencher| {
            bencher.iter_batched_ref(
                || held(&layout),
                |words| scan(index, &layout, Bitmap::new(words), None),
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
    criterion.final_summary();

    // Not when cargo only asks whether it runs.
    if !std::env::args().any(|arg| arg == "--bench") {
        return;
    }
    println!(
        "scan of a range of {}, {} entries, medians of {ROUNDS} rounds\n\n{:>10}{:>12}{:>14}{:>12}",
        Size(RANGE),
        layout.blocks(),
        "index",
        "ns/entry",
        "range GiB/s",
        "s/TiB"
    );
    for (name, mapped, index) in &indexes {
        let mut times: Vec<f64> = (0..ROUNDS)
            .map(|_| {
                let words = held(&layout);
                let start = Instant::now();
                let found = black_box(scan(index, &layout, Bitmap::new(&words), None));
                let time = start.elapsed().as_secs_f64();
                assert_eq!((found.mapped, found.faults), (*mapped as u64, 0));
                time
            })
            .collect();
        times.sort_by(f64::total_cmp);
        let time = times[ROUNDS / 2];
        let rate = (RANGE >> 30) as f64 / time;
        println!(
            "{name:>10}{:>12.2}{rate:>14.0}{:>12.2}",
            time * 1e9 / layout.blocks() as f64,
            1024.0 / rate
        );
    }
}
