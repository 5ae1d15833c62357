// SPDX-License-Identifier: GPL-2.0-only

//! Many CPUs at once on the same blocks of a kmem range: on real memory, with the real machine, and
//! with pages that are written to as soon as they are given back.

use pmem_core::{
    kmem::{
        blocks::{
            Blocks,
            Error,
            Locks,
            Need,
            NoPage,
            Pages, //
        },
        layout::Layout,
        Block,
        Page,
        PAGE_SIZE, //
    },
    persist::{
        generic::Generic,
        CpuFeatures,
        Persist,
        VolatileSlice,
        GRANULE, //
    },
};
use std::{
    alloc,
    collections::BTreeSet,
    sync::{
        atomic::{
            AtomicU64,
            Ordering, //
        },
        Barrier,
        Condvar,
        Mutex,
        MutexGuard, //
    },
    thread,
    time::{
        Duration,
        Instant, //
    },
};

const PAGE: usize = PAGE_SIZE as usize;

/// What a process writes to its pages: no data of a block.
const JUNK: u64 = u64::MAX;

const THREADS: u64 = 6;

/// How long each of the tests runs.
const TIME: Duration = Duration::from_secs(1);

/// How long a thread waits for a page at most, where all that work put theirs back soon.
const PATIENCE: Duration = Duration::from_secs(30);

/// Memory of a range, of zeros.
struct Range {
    addr: *mut u8,
    layout: alloc::Layout,
}

// SAFETY: Its memory is given out as `VolatileSlice` alone, for which it does not matter who writes
// to it.
unsafe impl Sync for Range {}

impl Range {
    fn new(layout: &Layout) -> Self {
        let layout = alloc::Layout::from_size_align(layout.size() as usize, PAGE).unwrap();
        // SAFETY: It has bytes, as each range has.
        let addr = unsafe { alloc::alloc_zeroed(layout) };
        assert!(!addr.is_null());

        Self { addr, layout }
    }

    fn slice(&self) -> VolatileSlice<'_> {
        // SAFETY: The memory is there as long as it is borrowed, and nobody refers to it.
        unsafe { VolatileSlice::new(self.addr, self.layout.size()) }
    }
}

impl Drop for Range {
    fn drop(&mut self) {
        // SAFETY: It was allocated with this layout.
        unsafe { alloc::dealloc(self.addr, self.layout) };
    }
}

/// A few locks for all blocks.
struct Stripes([Mutex<()>; 3]);

impl Locks for Stripes {
    type Guard<'a> = MutexGuard<'a, ()>;

    fn lock(&self, block: Block) -> Self::Guard<'_> {
        self.0[block.0 as usize % self.0.len()].lock().unwrap()
    }
}

/// The free pages, which a process writes to.
struct Pool<'a> {
    memory: &'a Range,
    layout: Layout,
    free: Mutex<Vec<Page>>,
    returned: Condvar,
}

impl Pool<'_> {
    fn scribble(&self, page: Page) {
        let offset = self.layout.page_offset(page).unwrap();
        let memory = self.memory.slice().range(offset, PAGE_SIZE).unwrap();
        // By volatile stores, through the cache.
        Persist::on(Generic).write_bytes(memory, &[0xff; PAGE]);
    }
}

impl Pages for Pool<'_> {
    fn take(&self, need: Need) -> Result<Page, NoPage> {
        let mut free = self.free.lock().unwrap();
        loop {
            match free.pop() {
                Some(page) => return Ok(page),
                // Who waits has no page, so that those who have them put them back.
                None if need.may_wait => {
                    let (lock, waited) = self.returned.wait_timeout(free, PATIENCE).unwrap();
                    assert!(!waited.timed_out(), "no page comes back");
                    free = lock;
                }
                None => return Err(NoPage::WouldBlock),
            }
        }
    }

    fn put(&self, pages: impl Iterator<Item = Page>) {
        for page in pages {
            self.scribble(page);
            let mut free = self.free.lock().unwrap();
            assert!(!free.contains(&page), "{page:?} is put back twice");
            free.push(page);
            self.returned.notify_one();
        }
    }
}

/// Random numbers, the same for the same seed: xorshift.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 32) % end
    }
}

/// The data of a write: the number of the block, and of the write.
fn tag(block: u64, number: u64) -> u64 {
    (block << 48) | number
}

/// Reads, writes and discards the blocks of a disk, which has so many and spare pages, from many
/// threads at once.
fn run(blocks: u64, spare: u64, atomic: bool) {
    let layout = Layout::from_parts(3 + blocks + spare, 1, blocks, spare).unwrap();
    let memory = Range::new(&layout);
    let locks = Stripes(Default::default());
    let pool = Pool {
        memory: &memory,
        layout,
        free: Mutex::new(layout.data().map(Page).collect()),
        returned: Condvar::new(),
    };
    for page in layout.data() {
        pool.scribble(Page(page));
    }
    let persist = Persist::new(CpuFeatures::detect());
    let disk = || Blocks::new(memory.slice(), layout, persist, &locks, atomic).unwrap();

    let next = AtomicU64::new(1);
    let start = Barrier::new(THREADS as usize);
    let given_back = AtomicU64::new(0);
    let work = |seed: u64| {
        let disk = disk();
        let mut random = Random(seed);
        start.wait();
        let end = Instant::now() + TIME;

        while Instant::now() < end {
            let first = random.below(blocks);
            let count = 1 + random.below(blocks - first);
            match random.below(8) {
                0 => {
                    let count = disk.discard(Block(first), count, &pool).unwrap();
                    given_back.fetch_add(count, Ordering::Relaxed);
                }
                1..=3 => {
                    let mut block = first;
                    let may_wait = random.below(4) != 0;
                    let fill = |page: VolatileSlice<'_>, persist: &Persist| {
                        let data = tag(block, next.fetch_add(1, Ordering::Relaxed));
                        block += 1;
                        persist
                            .write_bytes(page, [data.to_le_bytes(); PAGE / GRANULE].as_flattened());
                    };
                    match disk.write(Block(first), count, may_wait, &pool, fill) {
                        Ok(()) => assert_eq!(block, first + count),
                        Err(error) => assert!(!may_wait && error == Error::WouldBlock, "{error}"),
                    }
                }
                _ => read(&disk, first),
            }
        }
    };
    thread::scope(|scope| {
        for seed in 1..=THREADS {
            let work = &work;
            scope.spawn(move || work(seed));
        }
    });

    // Each page has data of one block, or is free.
    let mut pages: BTreeSet<u64> = BTreeSet::new();
    let free = pool.free.into_inner().unwrap();
    let entries = (0..blocks).map(|block| {
        let entry = layout.entry_offset(Block(block)).unwrap();
        memory.slice().load_u64(entry).unwrap()
    });
    for page in entries
        .filter(|&page| page != 0)
        .chain(free.iter().map(|page| page.0))
    {
        assert!(pages.insert(page), "page {page} is there twice");
    }
    assert!(layout.data().eq(pages));
    for block in 0..blocks {
        read(&disk(), block);
    }
    assert!(next.into_inner() > 100 && given_back.into_inner() > 10);
}

/// Reads `block`, which must have all of the data of one write to it, or none.
fn read(disk: &Blocks<'_, Stripes>, block: u64) {
    let data = disk.read(Block(block), |page| {
        page.map(|page| {
            let mut data = [0; PAGE];
            assert!(page.read(&mut data));
            data
        })
    });

    if let Some(data) = data.unwrap() {
        let mut granules = data
            .chunks_exact(GRANULE)
            .map(|granule| u64::from_le_bytes(granule.try_into().unwrap()));
        let first = granules.next().unwrap();
        assert!(
            first != JUNK && first >> 48 == block,
            "block {block}: {first:x}"
        );
        assert!(granules.all(|granule| granule == first), "block {block}");
    }
}

#[test]
fn few_blocks() {
    run(3, 2, true);
}

#[test]
fn few_blocks_written_in_place() {
    run(3, 2, false);
}

#[test]
fn few_pages_for_more_than_a_batch() {
    // Each thread may have as many pages staged as are free.
    run(70, 1, true);
}

#[test]
fn enough_pages_for_more_than_a_batch() {
    run(70, 300, true);
}
