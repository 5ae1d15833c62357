// SPDX-License-Identifier: GPL-2.0-only

//! The pages of a range that have no data: most are with the page allocator, some wait here to be
//! written to.
//!
//! A write needs a page before it gives one back, so that a few are kept, also when the rest of the
//! range is full: [`Layout::spare_pages`]. While memory is short they go to writes that replace a
//! block, which put another one back at once; half of them is for nothing else. A write of a block
//! that had no page waits for a page if need be: memory that processes use is then moved to other
//! nodes, as it is when a memory block goes offline, and if there is none, the page allocator has to
//! do without the last free pages of the node, which it does not give away for being asked.
//!
//! A page that a write replaces goes to a small stack of the CPU, from where the next write takes it:
//! who overwrites blocks shares nothing with other CPUs.
//!
//! What is waited for never waits for the write: pages are moved by a worker, it only moves those of
//! processes, which need no I/O, and the wait ends.
//!
//! [`Layout::spare_pages`]: crate::pmem_core::kmem::layout::Layout::spare_pages

use crate::{
    kapi::{
        cpu,
        hotplug::{
            Effort,
            Exchange,
            Kind,
            Memory,
            PageStack, //
        },
        workqueue::ReclaimQueue, //
    },
    pmem_core::kmem::{
        blocks::{
            Need,
            NoPage,
            Pages, //
        },
        layout::Layout,
        Page, //
    },
};
use kernel::{
    impl_has_work, new_mutex, new_spinlock, new_work,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        Mutex,
        SpinLock, //
    },
    time::{
        delay::fsleep,
        Delta,
        Instant,
        Monotonic, //
    },
    workqueue::{
        Work,
        WorkItem, //
    },
};

/// How long a write waits between two looks for a page.
const PAUSE: Delta = Delta::from_millis(1);

/// How long it waits after the last page that anybody got or gave back, in milliseconds: some more
/// than it takes CPUs to empty their lists of free pages of a node that is not theirs.
const PATIENCE: i64 = 4000;

/// How often it looks, at most: half a minute in all.
const LOOKS: u32 = 30_000;

/// How many stacks CPUs have; with more CPUs than that, some share one.
const SLOTS: usize = 64;

/// How many pages are on such a stack at most.
const SLOT: u64 = 8;

/// How many pages the worker takes at once: it should not move much more than is wanted.
const GATHER: u64 = 64;

/// How many pages are taken back from the system at once: 128 MiB.
const TAKE: u64 = 1 << 15;

/// How many at least, when one of more could not be moved: 2 MiB, which the kernel isolates as a
/// whole.
const TAKE_LEAST: u64 = 1 << 9;

/// How often these are tried, after pauses each of which is twice as long as the last: a second in all.
const TRIES: u32 = 10;

/// The stack of a CPU, in a cache line of its own.
#[pin_data]
#[repr(align(64))]
struct Slot {
    #[pin]
    stack: SpinLock<PageStack>,
}

/// The pages that have no data.
#[pin_data]
pub(super) struct Pool {
    memory: Arc<Memory>,
    queue: Arc<ReclaimQueue>,
    /// How many pages are kept for writes.
    spare: i64,
    /// How many are kept now: all while nothing is shared with the system.
    keep: Atomic<i64>,
    #[pin]
    stack: SpinLock<PageStack>,
    #[pin]
    slots: [Slot; SLOTS],
    /// Where to look next for pages of processes.
    #[pin]
    cursor: Mutex<Page>,
    /// How often the worker went through all of the range without a page.
    in_vain: Atomic<i64>,
    born: Instant<Monotonic>,
    /// When somebody got or gave back a page that may be for who waits.
    progress: Atomic<i64>,
    #[pin]
    worker: Work<Pool>,
}

impl_has_work! {
    impl HasWork<Self> for Pool { self.worker }
}

impl Pool {
    /// A pool for the range of `memory`, with none of its pages yet. It is filled up on `queue`.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(super) fn new(
        memory: Arc<Memory>,
        queue: Arc<ReclaimQueue>,
        layout: &Layout,
    ) -> Result<Arc<Self>> {
        let spare = layout.spare_pages() as i64;
        Arc::pin_init(
            pin_init!(Pool {
                memory,
                queue,
                spare,
                keep: Atomic::new(*spare),
                stack <- new_spinlock!(PageStack::new()),
                slots <- pin_init::pin_init_array_from_fn(|_| pin_init!(Slot {
                    stack <- new_spinlock!(PageStack::new()),
                })),
                cursor <- new_mutex!(Page(0)),
                in_vain: Atomic::new(0),
                born: Instant::now(),
                progress: Atomic::new(0),
                worker <- new_work!("pmem_kmem_pool"),
            }),
            GFP_KERNEL,
        )
    }

    /// The memory that the pages are of.
    pub(super) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// How many pages wait here.
    pub(super) fn len(&self) -> u64 {
        let stack = self.stack.lock().len();
        let slots = self.slots.iter().map(|slot| slot.stack.lock().len());
        slots.fold(stack, u64::wrapping_add)
    }

    /// The stack of this CPU, which may be another one's when it is used.
    #[inline]
    fn slot(&self) -> Option<&SpinLock<PageStack>> {
        let cpu = cpu::current() as usize;
        self.slots.get(cpu % SLOTS).map(|slot| &slot.stack)
    }

    /// Whether pages without data are with the page allocator.
    pub(super) fn is_shared(&self) -> bool {
        self.keep.load(Relaxed) == self.spare
    }

    /// Takes back all pages that the system has, whoever uses them.
    ///
    /// # Errors
    ///
    /// `EBUSY` or `ENOMEM` if one of them cannot be moved, `EINTR` if the process is being killed:
    /// then all is as it was.
    pub(super) fn take_back(&self) -> Result {
        self.keep.store(i64::MAX, Relaxed);
        let result = self.take_all();
        if result.is_err() {
            self.share();
        }
        result
    }

    fn take_all(&self) -> Result {
        let mut from = Page(0);
        let mut most = TAKE;
        let mut tries = 0;
        while let Some((first, count)) = self.memory.next_released(from, most) {
            match self.memory.exchange().take(first, count, true) {
                Ok(()) => {
                    self.push(first, count);
                    from = Page(first.0.wrapping_add(count));
                    most = TAKE.min(most.wrapping_mul(2));
                    tries = 0;
                }
                Err(EINTR) => return Err(EINTR),
                // A write may have taken one of them, or a reference was there for a moment: less
                // likely of fewer.
                Err(_) if most > TAKE_LEAST => most = TAKE_LEAST.max(most / 8),
                Err(error) => {
                    tries += 1;
                    if tries == TRIES {
                        return Err(if error == ENOMEM { ENOMEM } else { EBUSY });
                    }
                    fsleep(Delta::from_millis(1 << tries));
                }
            }
        }
        // Writes that were on their way may have had pages of the part that was done.
        if self.memory.next_released(Page(0), 1).is_some() {
            return Err(EBUSY);
        }
        Ok(())
    }

    /// Gives pages without data to the page allocator, but for those that are kept for writes.
    pub(super) fn share(&self) {
        self.keep.store(self.spare, Relaxed);
        let system = self.memory.exchange();
        let mut left = (self.len() as i64).saturating_sub(self.spare);
        while left > 0 {
            let Some(page) = self.pop(0) else { break };
            system.release(page);
            left = left.wrapping_sub(1);
        }
    }

    /// Calls `with` for each page that waits here. The disk must not be in use.
    pub(super) fn for_each(&self, mut with: impl FnMut(Page)) {
        let mut done = PageStack::new();
        while let Some(page) = self.pop(0).or_else(|| self.steal()) {
            with(page);
            done.push(&self.memory, page);
        }
        *self.stack.lock() = done;
    }

    /// Keeps `count` pages from `first` on, which are held and have no data.
    pub(super) fn push(&self, first: Page, count: u64) {
        for page in first.0..first.0.wrapping_add(count) {
            self.stack.lock().push(&self.memory, Page(page));
        }
    }

    /// Takes a page, if more than `but` are there.
    #[inline]
    fn pop(&self, but: i64) -> Option<Page> {
        let mut stack = self.stack.lock();
        if stack.len() as i64 <= but {
            return None;
        }
        stack.pop(&self.memory)
    }

    /// Takes a page from the stack of any CPU.
    #[cold]
    fn steal(&self) -> Option<Page> {
        self.slots
            .iter()
            .find_map(|slot| slot.stack.lock().pop(&self.memory))
    }

    /// Takes a page if one is there at once.
    #[inline]
    fn take_now(&self, system: &Exchange<'_>, need: Need) -> Option<Page> {
        if need.replaces {
            self.slot()
                .and_then(|slot| slot.lock().pop(&self.memory))
                .or_else(|| self.pop(0))
                .or_else(|| system.alloc(Effort::NoWait))
                .or_else(|| self.steal())
        } else {
            system
                .alloc(Effort::NoWait)
                .or_else(|| self.pop(self.spare / 2))
        }
    }

    /// Waits for a page.
    ///
    /// There is none if the worker has found nothing in all of the range, and if nobody has got or
    /// given back a page for a while: what is written now may be memory soon, as a page of a file
    /// is when it is clean.
    #[cold]
    fn wait(pool: &Arc<Self>, system: &Exchange<'_>, need: Need) -> Result<Page, NoPage> {
        let in_vain = pool.in_vain.load(Relaxed);
        for _ in 0..LOOKS {
            if let Some(page) = pool
                .take_now(system, need)
                .or_else(|| system.alloc(Effort::Reclaim))
            {
                pool.note_progress();
                return Ok(page);
            }
            // The worker began and ended a round since we came.
            let looked = pool.in_vain.load(Relaxed).wrapping_sub(in_vain) >= 2;
            if looked && pool.now().wrapping_sub(pool.progress.load(Relaxed)) > PATIENCE {
                break;
            }
            let _ = pool.queue.enqueue(pool.clone());
            fsleep(PAUSE);
        }
        Err(NoPage::NoSpace)
    }

    /// Milliseconds since the pool was made.
    fn now(&self) -> i64 {
        self.born.elapsed().as_millis()
    }

    /// Notes that there is a page for who waits for one.
    fn note_progress(&self) {
        self.progress.store(self.now(), Relaxed);
    }

    /// Takes some pages of this kind. Returns whether there were any.
    fn gather(&self, kind: Kind) -> bool {
        let mut cursor = self.cursor.lock();
        let start = *cursor;
        let mut wrapped = false;
        loop {
            match self.memory.next(*cursor, kind) {
                Some((first, _)) if wrapped && first >= start => return false,
                Some((first, count)) => {
                    let count = count.min(GATHER);
                    *cursor = Page(first.0.wrapping_add(count));
                    match self.memory.exchange().take(first, count, false) {
                        Ok(()) => {
                            self.push(first, count);
                            self.note_progress();
                            return true;
                        }
                        // There is no room elsewhere, for the next ones neither.
                        Err(error) if error == ENOMEM => return false,
                        Err(_) => {}
                    }
                }
                None if wrapped => return false,
                None => {
                    wrapped = true;
                    *cursor = Page(0);
                }
            }
        }
    }
}

impl WorkItem for Pool {
    type Pointer = Arc<Self>;

    /// Fills the pool up.
    fn run(this: Arc<Self>) {
        let system = this.memory.exchange();
        // Not what CPUs have: it is not for who writes a new block.
        while (this.stack.lock().len() as i64) < this.spare {
            let page = system.alloc(Effort::Reclaim);
            if page.is_none() && this.gather(Kind::Process) {
                continue;
            }
            if let Some(page) = page.or_else(|| system.alloc(Effort::Reserves)) {
                this.push(page, 1);
                this.note_progress();
            } else if !this.gather(Kind::Free) {
                // What is left may be in lists of CPUs, which they empty now and then.
                this.in_vain.add(1, Relaxed);
                return;
            }
        }
    }
}

/// The pool as writes see it, which leave it as it was: each page that they put back is one that
/// another one has replaced.
pub(super) struct ForWrites<'a> {
    pool: &'a Arc<Pool>,
    system: Exchange<'a>,
}

impl<'a> ForWrites<'a> {
    #[inline]
    pub(super) fn new(pool: &'a Arc<Pool>) -> Self {
        let system = pool.memory.exchange();
        Self { pool, system }
    }
}

impl Pages for ForWrites<'_> {
    #[inline]
    fn take(&self, need: Need) -> Result<Page, NoPage> {
        let Self { pool, system } = self;
        match pool.take_now(system, need) {
            Some(page) => Ok(page),
            None if need.may_wait => Pool::wait(pool, system, need),
            None => {
                let _ = pool.queue.enqueue(Arc::clone(pool));
                Err(NoPage::WouldBlock)
            }
        }
    }

    #[inline]
    fn put(&self, mut pages: impl Iterator<Item = Page>) {
        let Self { pool, system } = self;
        if let Some(slot) = pool.slot() {
            let mut slot = slot.lock();
            while slot.len() < SLOT {
                let Some(page) = pages.next() else { return };
                slot.push(&pool.memory, page);
            }
        }
        let keep = pool.keep.load(Relaxed);
        for page in pages {
            let mut stack = pool.stack.lock();
            if (stack.len() as i64) < keep {
                stack.push(&pool.memory, page);
            } else {
                drop(stack);
                system.release(page);
            }
        }
    }
}

/// The pool as discards see it, which give all of their pages to the system if the pool is full.
pub(super) struct ForDiscards<'a> {
    pool: &'a Pool,
    system: Exchange<'a>,
}

impl<'a> ForDiscards<'a> {
    pub(super) fn new(pool: &'a Pool) -> Self {
        let system = pool.memory.exchange();
        Self { pool, system }
    }
}

impl Pages for ForDiscards<'_> {
    fn take(&self, _need: Need) -> Result<Page, NoPage> {
        Err(NoPage::NoSpace)
    }

    fn put(&self, pages: impl Iterator<Item = Page>) {
        let Self { pool, system } = self;
        let keep = pool.keep.load(Relaxed);
        let mut missing = keep.saturating_sub(pool.len() as i64);
        pool.note_progress();
        for page in pages {
            if missing > 0 {
                pool.push(page, 1);
                missing = missing.wrapping_sub(1);
            } else {
                system.release(page);
            }
        }
    }
}
