// SPDX-License-Identifier: GPL-2.0-only

//! The blocks of a kmem range in a memory that can lose power, while pages that are given back are
//! written to at once, as by a process that got them.
//!
//! After each step of each operation, the images that a power loss could leave are looked at: the
//! scan finds no fault in the index, no entry names a page that was given back, and each block has
//! all of its data, of before or after the operations that are under way. With a part of the order
//! left out, the same checks must find what is lost.

use pmem_core::{
    kmem::{
        bitmap::Bitmap,
        blocks::{
            Blocks,
            Error,
            Locks,
            Need,
            NoPage,
            Pages, //
        },
        layout::Layout,
        scan::{
            hold_metadata,
            scan, //
        },
        Block,
        Page,
        PAGE_SIZE, //
    },
    medium::{
        Medium,
        Unreadable, //
    },
    persist::{
        model::{
            Cpu,
            Memory, //
        },
        Cache,
        CopyPolicy,
        Machine,
        Persist,
        Source,
        VolatileSlice,
        Way,
        LINE, //
    },
};
use proptest::prelude::*;
use std::{
    cell::{
        Cell,
        RefCell, //
    },
    collections::{
        BTreeMap,
        BTreeSet,
        VecDeque, //
    },
    sync::atomic::AtomicU64,
};

const PAGE: usize = PAGE_SIZE as usize;

/// How many images of a power loss are looked at after a step, where there are too many to look at
/// all.
const IMAGES: usize = 6;

/// How many there can be to look at all.
const ALL_IMAGES: usize = 16;

/// What a process writes to its pages, with a number: no data of a block.
const JUNK: u64 = 1 << 63;

/// What no step may lead to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    /// The scan of an image finds a fault.
    Scan,
    /// In an image, an entry names a page that was given back.
    NamesFree,
    /// In an image, a block has data that it cannot have.
    Data,
    /// A read gives what it cannot give.
    Read,
    /// Another CPU can see an entry, or get a lock, before it sees the data that was stored first.
    Order,
    /// The pages that are put back are not the caller's.
    Put,
    /// Pages are lost.
    Lost,
}

/// What is wrong with the machine, or with the locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flaw {
    None,
    /// A write does not wait until its data is durable.
    DataFence,
    /// A write does not wait until its entries are durable.
    EntryFence,
    /// A discard does not wait until its entries are durable.
    DiscardFence,
    /// A fence does not wait.
    NoFence,
    /// Entries are not written back.
    NoFlush,
    /// A CPU writes back those entries alone that it has stored itself.
    OwnFlush,
    /// A lock keeps nobody out.
    NoLock,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Write { may_wait: bool },
    Discard,
    Read,
}

/// An operation on `count` blocks from `first` on.
#[derive(Clone, Copy, Debug)]
struct Op {
    kind: Kind,
    first: u64,
    count: u64,
}

impl Op {
    const fn new(kind: Kind, first: u64, count: u64) -> Self {
        Self { kind, first, count }
    }

    const fn write(first: u64, count: u64) -> Self {
        Self::new(Kind::Write { may_wait: true }, first, count)
    }

    const fn discard(first: u64, count: u64) -> Self {
        Self::new(Kind::Discard, first, count)
    }

    const fn read(first: u64, count: u64) -> Self {
        Self::new(Kind::Read, first, count)
    }
}

/// Data that a block had, has or may get, in all granules of the page; 0 without a page.
#[derive(Clone, Copy, Debug)]
struct Version {
    tag: u64,
    begin: u64,
    /// When the operation was complete, if it is.
    end: Option<u64>,
}

/// An image of a power loss.
struct Image<'a>(&'a [u8]);

impl Medium for Image<'_> {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Unreadable> {
        let offset = offset as usize;
        buf.copy_from_slice(&self.0[offset..offset + buf.len()]);
        Ok(())
    }
}

impl Image<'_> {
    /// The pages that the scan finds in use, and whether it finds a fault.
    fn scan(&self, layout: &Layout) -> (BTreeSet<u64>, bool) {
        let words = Bitmap::words(layout.pages()).unwrap();
        let words: Vec<AtomicU64> = (0..words).map(|_| AtomicU64::new(0)).collect();
        let held = Bitmap::new(&words);

        hold_metadata(layout, held);
        let scan = scan(self, layout, held, None);
        let pages = layout.data().filter(|&page| held.test(page)).collect();
        (pages, scan.faults != 0)
    }

    fn page(&self, page: u64) -> impl Iterator<Item = u64> + '_ {
        granules(&self.0[page as usize * PAGE..][..PAGE])
    }

    /// The data of `block`, if its entry names a page.
    fn block(&self, layout: &Layout, block: u64) -> Option<impl Iterator<Item = u64> + '_> {
        let entry = layout.entry_offset(Block(block)).unwrap() as usize;
        let page = granules(&self.0[entry..entry + 8]).next().unwrap();

        (page != 0).then(|| self.page(page))
    }
}

fn granules(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes
        .chunks_exact(8)
        .map(|granule| u64::from_le_bytes(granule.try_into().unwrap()))
}

/// A range, all who use it, and what they know of it.
struct World {
    memory: Memory,
    layout: Layout,
    atomic: bool,
    copy: CopyPolicy,
    flaw: Flaw,
    /// How many free pages are for blocks that have one already.
    reserve: usize,
    free: RefCell<Vec<Page>>,
    /// Pages that processes keep.
    kept: usize,
    versions: RefCell<Vec<Vec<Version>>>,
    now: Cell<u64>,
    /// The operations that are under way, each in the middle of the one before; what it has done.
    running: RefCell<Vec<Running>>,
    locked: Cell<bool>,
    /// How many points there were at which another CPU could act.
    points: Cell<usize>,
    /// What other CPUs do, and at which point.
    others: RefCell<VecDeque<(usize, Op)>>,
    /// At how many points power may be lost at one.
    check_every: usize,
    /// The point at which the image is kept that a power loss leaves.
    crash_at: Option<usize>,
    crash: RefCell<Option<Vec<u8>>>,
    /// The first fault of each kind.
    faults: RefCell<BTreeMap<Fault, String>>,
}

struct Running {
    op: Op,
    /// The pages that it has taken since it put some back.
    pages: usize,
    fences: usize,
    /// Whether it has stored past the cache and not fenced, so that others may not see it yet.
    is_streaming: bool,
    /// Whether it has done so under a lock: to a page that others find, too.
    is_streaming_locked: bool,
    /// The lines with entries that it has stored and not fenced.
    lines: BTreeSet<usize>,
}

impl World {
    /// A disk of so many blocks and spare pages, in a range that is found as `image`, or as new.
    fn new(layout: Layout, image: Option<&[u8]>, flaw: Flaw, atomic: bool, kept: usize) -> Self {
        let new: Vec<u8> = (0..layout.size() / 8)
            .flat_map(|granule| {
                let is_data = layout.is_data(Page(granule * 8 / PAGE_SIZE));
                if is_data { JUNK | granule } else { 0 }.to_le_bytes()
            })
            .collect();
        let image = Image(image.unwrap_or(&new));

        let (held, _) = image.scan(&layout);
        let mut free: Vec<Page> = layout
            .data()
            .filter(|page| !held.contains(page))
            .map(Page)
            .collect();
        let kept = kept.min(free.len());
        free.truncate(free.len() - kept);

        let versions = (0..layout.blocks()).map(|block| {
            let tag = image.block(&layout, block).map_or(0, |mut data| {
                let tag = data.next().unwrap();
                assert!(data.all(|granule| granule == tag));
                tag
            });
            vec![Version {
                tag,
                begin: 0,
                end: Some(0),
            }]
        });

        Self {
            memory: Memory::boot(image.0),
            layout,
            atomic,
            copy: CopyPolicy::Auto,
            flaw,
            reserve: 1,
            free: RefCell::new(free),
            kept,
            versions: RefCell::new(versions.collect()),
            now: Cell::new(1 << 32),
            running: RefCell::default(),
            locked: Cell::default(),
            points: Cell::default(),
            others: RefCell::default(),
            check_every: 1,
            crash_at: None,
            crash: RefCell::default(),
            faults: RefCell::default(),
        }
    }

    fn tick(&self) -> u64 {
        self.now.set(self.now.get() + 1);
        self.now.get()
    }

    fn fault(&self, fault: Fault, what: impl FnOnce() -> String) {
        let mut faults = self.faults.borrow_mut();
        let running: Vec<Op> = self.running.borrow().iter().map(|run| run.op).collect();
        faults
            .entry(fault)
            .or_insert_with(|| format!("{} while {running:?}", what()));
    }

    /// The data that `block` can have now: what no complete operation has come after.
    fn possible(&self, block: u64) -> BTreeSet<u64> {
        let versions = &self.versions.borrow()[block as usize];
        let is_past = |version: &Version| {
            versions.iter().any(|later| {
                later.end.is_some() && version.end.is_some_and(|end| end < later.begin)
            })
        };

        versions
            .iter()
            .filter(|version| !is_past(version))
            .map(|version| version.tag)
            .collect()
    }

    /// The data of `block` as CPUs see it.
    fn seen(&self, block: u64) -> Vec<u64> {
        let image = self.memory.read(0, self.memory.len());
        let image = Image(&image);

        image
            .block(&self.layout, block)
            .map_or_else(|| vec![0], |data| data.collect())
    }

    /// Looks at what a power loss could leave now.
    fn check(&self) {
        let in_flight = self.memory.in_flight();
        let limit = match 1_usize.checked_shl(in_flight as u32) {
            Some(ways) if ways <= ALL_IMAGES => ALL_IMAGES,
            _ => IMAGES,
        };
        let possible: Vec<_> = (0..self.layout.blocks())
            .map(|n| self.possible(n))
            .collect();

        for image in self.memory.crash_images(limit, self.tick()) {
            self.check_image(&Image(&image), &possible);
        }
    }

    fn check_image(&self, image: &Image<'_>, possible: &[BTreeSet<u64>]) {
        let (held, fault) = image.scan(&self.layout);
        if fault {
            self.fault(Fault::Scan, || "a scan finds a fault".into());
            return;
        }
        let free = self.free.borrow();
        if let Some(page) = free.iter().find(|page| held.contains(&page.0)) {
            self.fault(Fault::NamesFree, || format!("an entry names free {page:?}"));
        }

        for (block, possible) in (0..).zip(possible) {
            let data = image.block(&self.layout, block);
            let is_possible = match data {
                None => possible.contains(&0),
                Some(data) => {
                    let tags: BTreeSet<u64> = data.collect();
                    tags.is_subset(possible)
                        && !tags.contains(&0)
                        && (tags.len() == 1 || !self.atomic)
                }
            };
            if !is_possible {
                self.fault(Fault::Data, || {
                    let data = image.block(&self.layout, block);
                    let tags: BTreeSet<u64> = data.into_iter().flatten().collect();
                    format!("block {block} has {tags:x?}, but can have {possible:x?}")
                });
            }
        }
    }

    /// This CPU stores past the cache.
    fn stream(&self) {
        let mut running = self.running.borrow_mut();
        let run = running.last_mut().unwrap();

        run.is_streaming = true;
        run.is_streaming_locked |= self.locked.get();
    }

    /// Others see the next step of this CPU at once, and may see what is `late` only after it.
    fn check_order(&self, late: impl FnOnce(&Running) -> bool) {
        let is_late = late(self.running.borrow().last().unwrap());
        if is_late {
            self.fault(Fault::Order, || "data can be seen late".into());
        }
    }

    /// A point of an operation at which power may be lost and another CPU may act.
    fn point(&self, is_changed: bool) {
        let point = self.points.get();
        self.points.set(point + 1);
        if is_changed && point % self.check_every == 0 {
            self.check();
        }
        if self.crash_at == Some(point) {
            let image = self.memory.crash_images(IMAGES, point as u64).last();
            self.crash.replace(image);
        }

        if self.locked.get() && self.flaw != Flaw::NoLock {
            return;
        }
        let mut others = self.others.borrow_mut();
        if others.front().is_some_and(|&(at, _)| at <= point) {
            let (_, op) = others.pop_front().unwrap();
            drop(others);
            let locked = self.locked.replace(false);
            // It may fail, as pages are kept by the operation in whose middle it is.
            let _ = self.run(op);
            self.locked.set(locked);
        }
    }

    fn blocks(&self) -> Blocks<'_, Self, Watched<'_>> {
        let cpu = self.running.borrow().len() - 1;
        let machine = Watched {
            world: self,
            cpu: self.memory.cpu(cpu as u32),
        };

        Blocks::new(
            self.memory.slice(),
            self.layout,
            Persist::mapped(machine, Cache::WriteBack, self.copy),
            self,
            self.atomic,
        )
        .unwrap()
    }

    /// Runs `op` on the next CPU.
    fn run(&self, op: Op) -> Result<(), Error> {
        self.running.borrow_mut().push(Running {
            op,
            pages: 0,
            fences: 0,
            is_streaming: false,
            is_streaming_locked: false,
            lines: BTreeSet::new(),
        });
        let blocks = op.first..op.first + op.count;
        // The tags of a write are those that follow.
        let begin = self.now.get() + 1;
        let tag = |block| match op.kind {
            Kind::Write { .. } => begin + (block - op.first),
            _ => 0,
        };
        self.now.set(begin + op.count);
        if !matches!(op.kind, Kind::Read) {
            for block in blocks.clone() {
                self.versions.borrow_mut()[block as usize].push(Version {
                    tag: tag(block),
                    begin,
                    end: None,
                });
            }
        }

        let result = match op.kind {
            Kind::Write { may_wait } => {
                let mut data = blocks.clone().map(tag);
                self.blocks().write(
                    Block(op.first),
                    op.count,
                    may_wait,
                    self,
                    |page, persist| {
                        assert_eq!(page.len(), PAGE);
                        let half = [data.next().unwrap(); PAGE / 16].map(u64::to_le_bytes);
                        let (first, second) = page.split_at(PAGE / 2).unwrap();
                        persist.write_bytes(first, half.as_flattened());
                        persist.write_bytes(second, half.as_flattened());
                    },
                )
            }
            Kind::Discard => self
                .blocks()
                .discard(Block(op.first), op.count, self)
                .map(|_| ()),
            Kind::Read => blocks.clone().try_for_each(|block| self.read(block)),
        };

        if result.is_ok() {
            let end = Some(self.tick());
            for block in blocks {
                for version in &mut self.versions.borrow_mut()[block as usize] {
                    if version.begin == begin {
                        version.end = end;
                    }
                }
            }
        }
        self.running.borrow_mut().pop();
        if self.running.borrow().is_empty() {
            self.settle();
        }
        result
    }

    fn read(&self, block: u64) -> Result<(), Error> {
        let (data, possible) = self.blocks().read(Block(block), |page| {
            self.point(false);
            let mut data = vec![0; PAGE];
            assert!(page.is_none_or(|page| page.read(&mut data)));
            // It counts what could be read under the lock.
            (data, self.possible(block))
        })?;

        let tags: BTreeSet<u64> = granules(&data).collect();
        if tags.len() != 1 || !tags.is_subset(&possible) {
            self.fault(Fault::Read, || {
                format!("block {block} reads {tags:x?}, not of {possible:x?}")
            });
        }
        Ok(())
    }

    /// Nothing is under way: what is seen must be durable, and no page be lost.
    fn settle(&self) {
        for block in 0..self.layout.blocks() {
            let possible = self.possible(block);
            let seen = self.seen(block);
            let tag = seen[0];
            if !possible.contains(&tag) || seen.iter().any(|&granule| granule != tag) {
                self.fault(Fault::Read, || {
                    format!("block {block} has {tag:x} after all, not of {possible:x?}")
                });
            }
            self.versions.borrow_mut()[block as usize] = vec![Version {
                tag,
                begin: 0,
                end: Some(0),
            }];
        }
        self.check();

        let image = self.memory.read(0, self.memory.len());
        let (held, _) = Image(&image).scan(&self.layout);
        let known = held.len() + self.free.borrow().len() + self.kept;
        if known as u64 != self.layout.blocks() + self.layout.spare_pages() {
            self.fault(Fault::Lost, || format!("{known} pages are left"));
        }
    }

    /// A process writes to a free page, in a few places, and the lines stay in the cache until they
    /// are evicted, if ever.
    fn scribble(&self, page: Page) {
        let start = self.layout.page_offset(page).unwrap() as usize;
        for granule in [0, 1 + self.tick() as usize % 510, 511] {
            let junk = JUNK | self.tick();
            self.memory.write(start + granule * 8, &junk.to_le_bytes());
        }
    }

    #[track_caller]
    fn is_in_order(&self) {
        assert_eq!(*self.faults.borrow(), BTreeMap::new());
    }
}

impl Pages for World {
    fn take(&self, need: Need) -> Result<Page, NoPage> {
        self.point(false);

        let mut running = self.running.borrow_mut();
        let run = running.last_mut().unwrap();
        assert!(!self.locked.get() || self.flaw == Flaw::NoLock);
        if need.may_wait {
            assert_eq!(run.pages, 0, "who waits must not have what others wait for");
        }

        let mut free = self.free.borrow_mut();
        let reserve = if need.replaces { 0 } else { self.reserve };
        if free.len() <= reserve {
            return Err(match run.op.kind {
                Kind::Write { may_wait: false } => NoPage::WouldBlock,
                _ => NoPage::NoSpace,
            });
        }
        run.pages += 1;
        // The last that came back, so that it is in use again at once.
        Ok(free.pop().unwrap())
    }

    fn put(&self, pages: impl Iterator<Item = Page>) {
        assert!(!self.locked.get() || self.flaw == Flaw::NoLock);
        let image = self.memory.read(0, self.memory.len());
        let (held, _) = Image(&image).scan(&self.layout);

        for page in pages {
            let mut free = self.free.borrow_mut();
            if held.contains(&page.0) || free.contains(&page) || !self.layout.is_data(page) {
                drop(free);
                self.fault(Fault::Put, || format!("{page:?} is put back"));
            } else {
                free.push(page);
                drop(free);
                self.scribble(page);
            }
        }
        self.running.borrow_mut().last_mut().unwrap().pages = 0;
        self.point(true);
    }
}

struct Guard<'a>(&'a World);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.0.locked.set(false);
        if !std::thread::panicking() {
            self.0.check_order(|run| run.is_streaming_locked);
            self.0.point(false);
        }
    }
}

impl Locks for World {
    type Guard<'a> = Guard<'a>;

    fn lock(&self, _block: Block) -> Guard<'_> {
        self.point(false);
        assert!(!self.locked.replace(true), "one lock at a time");
        Guard(self)
    }
}

/// A CPU that is looked at after each step, with a flaw.
#[derive(Clone, Copy)]
struct Watched<'a> {
    world: &'a World,
    cpu: Cpu<'a>,
}

impl Machine for Watched<'_> {
    const DURABLE: bool = true;

    fn name(self, _way: Way) -> &'static str {
        "watched"
    }

    unsafe fn store(self, dst: *mut u8, src: Source, len: usize) {
        // SAFETY: By the safety contract of this function.
        unsafe { self.cpu.store(dst, src, len) };
        self.world.point(true);
    }

    unsafe fn store_granule(self, dst: *mut u8, value: u64) {
        self.world.check_order(|run| run.is_streaming);
        // SAFETY: By the safety contract of this function.
        unsafe { self.cpu.store_granule(dst, value) };
        if let Some(run) = self.world.running.borrow_mut().last_mut() {
            run.lines.insert(dst.addr() / LINE);
        }
        self.world.point(true);
    }

    unsafe fn store_granules(self, dst: *mut u8, src: Source, granules: usize) {
        // SAFETY: By the safety contract of this function.
        unsafe { self.cpu.store_granules(dst, src, granules) };
        self.world.point(true);
    }

    unsafe fn stream_half(self, dst: *mut u8, src: Source) {
        // SAFETY: By the safety contract of this function.
        unsafe { self.cpu.stream_half(dst, src) };
        self.world.stream();
        self.world.point(true);
    }

    unsafe fn stream(self, dst: *mut u8, src: Source, granules: usize) {
        // SAFETY: By the safety contract of this function.
        unsafe { self.cpu.stream(dst, src, granules) };
        self.world.stream();
        self.world.point(true);
    }

    unsafe fn write_back(self, addr: *const u8) {
        let is_skipped = match self.world.flaw {
            Flaw::NoFlush => true,
            Flaw::OwnFlush => {
                let running = self.world.running.borrow();
                !running
                    .last()
                    .unwrap()
                    .lines
                    .contains(&(addr.addr() / LINE))
            }
            _ => false,
        };
        if !is_skipped {
            // SAFETY: By the safety contract of this function.
            unsafe { self.cpu.write_back(addr) };
        }
        self.world.point(true);
    }

    fn fence(self) {
        let mut running = self.world.running.borrow_mut();
        let run = running.last_mut().unwrap();
        run.lines.clear();
        run.is_streaming = false;
        run.is_streaming_locked = false;
        // Of a write that is atomic, each second is for the entries.
        let is_for_data = run.fences % 2 == 0;
        run.fences += 1;
        let is_skipped = match (self.world.flaw, run.op.kind) {
            (Flaw::NoFence, _) | (Flaw::DiscardFence, Kind::Discard) => true,
            (Flaw::DataFence, Kind::Write { .. }) => is_for_data,
            (Flaw::EntryFence, Kind::Write { .. }) => !is_for_data,
            _ => false,
        };
        drop(running);

        if !is_skipped {
            self.cpu.fence();
        }
        self.world.point(true);
    }
}

/// The smallest layout with so many blocks and spare pages.
fn layout(blocks: u64, spare: u64) -> Layout {
    Layout::from_parts(2 + 1 + blocks + spare, 1, blocks, spare).unwrap()
}

/// A disk of two blocks and two spare pages.
fn small(flaw: Flaw, atomic: bool) -> World {
    World::new(layout(2, 2), None, flaw, atomic, 0)
}

/// Writes, overwrites and discards, one after the other. Returns what is found to be wrong.
fn faults_of_one_cpu(flaw: Flaw, atomic: bool) -> BTreeSet<Fault> {
    faults_by_policy(CopyPolicy::NonTemporal, flaw, atomic)
}

/// The same, with copies by this policy.
fn faults_by_policy(copy: CopyPolicy, flaw: Flaw, atomic: bool) -> BTreeSet<Fault> {
    let mut world = small(flaw, atomic);
    world.copy = copy;
    for op in [
        Op::write(0, 2),
        Op::write(0, 1),
        Op::write(1, 1),
        Op::discard(0, 1),
        Op::write(0, 2),
        Op::discard(0, 2),
        Op::discard(0, 2),
        Op::read(0, 2),
    ] {
        world.run(op).unwrap();
    }

    world.faults.take().into_keys().collect()
}

#[test]
fn a_power_loss_leaves_the_old_or_the_new_data() {
    for atomic in [true, false] {
        for copy in CopyPolicy::ALL {
            assert_eq!(faults_by_policy(copy, Flaw::None, atomic), [].into());
        }
    }
}

#[test]
fn a_write_that_does_not_wait_for_its_data_is_caught() {
    for copy in CopyPolicy::ALL {
        let faults = faults_by_policy(copy, Flaw::DataFence, true);

        assert_eq!(faults, [Fault::Data].into());
    }
}

#[test]
fn a_copy_through_the_cache_that_is_not_written_back_is_caught() {
    let faults = faults_by_policy(CopyPolicy::WriteBack, Flaw::NoFlush, true);

    assert!(faults.contains(&Fault::Data));
}

#[test]
fn pages_that_are_given_back_too_early_are_caught() {
    for flaw in [Flaw::EntryFence, Flaw::DiscardFence, Flaw::NoFlush] {
        let faults = faults_of_one_cpu(flaw, true);

        assert!(
            faults.is_superset(&[Fault::Data, Fault::NamesFree].into()),
            "{flaw:?}: {faults:?}"
        );
    }
}

#[test]
fn a_write_in_place_that_is_not_durable_is_caught() {
    let faults = faults_of_one_cpu(Flaw::NoFence, false);

    assert!(faults.contains(&Fault::Data));
}

#[test]
fn a_page_that_is_named_twice_is_caught() {
    let world = World::new(layout(2, 1), None, Flaw::NoFlush, true, 0);

    // The blocks swap their pages, and of either the old entry may be found.
    for op in [
        Op::write(0, 1),
        Op::write(1, 1),
        Op::discard(0, 2),
        Op::write(0, 1),
        Op::write(1, 1),
    ] {
        world.run(op).unwrap();
    }
    assert!(world.faults.borrow().contains_key(&Fault::Scan));
}

/// Runs `op` with `other` in its middle, at each point where another CPU can act. Returns what is
/// found to be wrong.
fn faults_of_two_cpus(
    flaw: Flaw,
    atomic: bool,
    before: &[Op],
    op: Op,
    other: Op,
) -> BTreeMap<Fault, String> {
    let mut faults = BTreeMap::new();

    for delay in 0.. {
        let world = small(flaw, atomic);
        for &op in before {
            world.run(op).unwrap();
        }
        let at = world.points.get() + delay;
        world.others.borrow_mut().push_back((at, other));
        world.run(op).unwrap();

        faults.append(&mut world.faults.borrow_mut());
        if !world.others.borrow().is_empty() {
            break;
        }
    }
    faults
}

#[test]
fn two_cpus_on_the_same_blocks() {
    let ops = [
        Op::write(0, 1),
        Op::write(0, 2),
        Op::discard(0, 2),
        Op::read(0, 1),
    ];

    for atomic in [true, false] {
        for before in [&[][..], &[Op::write(0, 1)]] {
            for op in ops {
                for other in ops {
                    let faults = faults_of_two_cpus(Flaw::None, atomic, before, op, other);
                    assert_eq!(faults, BTreeMap::new(), "{op:?} {other:?} {before:?}");
                }
            }
        }
    }
}

#[test]
fn what_another_cpu_stored_must_be_written_back_too() {
    let write = Op::write(0, 1);

    // The other finds the new entry, and overwrites the page that it names.
    let faults = faults_of_two_cpus(Flaw::OwnFlush, false, &[], write, write);
    assert!(faults.contains_key(&Fault::Data));

    // The other finds that there is no data any more.
    let discard = Op::discard(0, 1);
    let faults = faults_of_two_cpus(Flaw::OwnFlush, true, &[write], discard, discard);
    assert!(faults.contains_key(&Fault::Data));
}

#[test]
fn a_read_without_a_lock_is_caught() {
    let [write, read] = [Op::write(0, 1), Op::read(0, 1)];

    let faults = faults_of_two_cpus(Flaw::NoLock, true, &[write], read, write);
    assert!(faults.contains_key(&Fault::Read));
}

#[test]
fn a_full_disk_can_be_overwritten_with_one_spare_page() {
    let world = World::new(layout(9, 1), None, Flaw::None, true, 0);

    for first in 0..9 {
        world.run(Op::write(first, 1)).unwrap();
    }
    assert_eq!(world.free.borrow().len(), 1);
    world.run(Op::write(1, 8)).unwrap();
    let no_wait = Kind::Write { may_wait: false };
    world.run(Op::new(no_wait, 0, 4)).unwrap();
    world.is_in_order();
}

#[test]
fn what_has_no_page_is_refused_after_what_has() {
    for (may_wait, error) in [(true, Error::NoSpace), (false, Error::WouldBlock)] {
        // A page for a block, and one to replace it.
        let world = World::new(layout(5, 1), None, Flaw::None, true, 4);
        let write = Kind::Write { may_wait };

        assert_eq!(world.run(Op::new(write, 0, 4)), Err(error));
        assert_eq!(world.seen(0).len(), 512);
        assert_eq!(world.seen(1), [0]);
        world.run(Op::new(write, 0, 1)).unwrap();
        assert_eq!(world.run(Op::new(write, 1, 1)), Err(error));
        world.run(Op::discard(0, 5)).unwrap();
        assert_eq!(world.run(Op::new(write, 3, 2)), Err(error));
        world.is_in_order();
    }
}

#[test]
fn batches() {
    // More blocks than share fences.
    for atomic in [true, false] {
        let mut world = World::new(layout(70, 70), None, Flaw::None, atomic, 0);
        world.check_every = 9;

        world.run(Op::write(1, 2)).unwrap();
        world.run(Op::write(0, 70)).unwrap();
        world.run(Op::discard(0, 70)).unwrap();
        assert!((0..70).all(|block| world.seen(block) == [0]));
        world.is_in_order();
    }
}

/// No lock at all, for one thread.
struct Alone;

impl Locks for Alone {
    type Guard<'a> = ();

    fn lock(&self, _block: Block) {}
}

/// Pages that are given one after the other, without a care.
#[derive(Default)]
struct List {
    next: RefCell<Vec<u64>>,
    put: RefCell<Vec<u64>>,
}

impl Pages for List {
    fn take(&self, _need: Need) -> Result<Page, NoPage> {
        let next = self.next.borrow_mut().pop();
        next.map(Page).ok_or(NoPage::NoSpace)
    }

    fn put(&self, pages: impl Iterator<Item = Page>) {
        self.put.borrow_mut().extend(pages.map(|page| page.0));
    }
}

/// A memory whose index starts with these entries.
fn with_entries(layout: &Layout, entries: &[u64]) -> Memory {
    let memory = Memory::new(layout.size() as usize);
    for (block, entry) in (0..).zip(entries) {
        let offset = layout.entry_offset(Block(block)).unwrap();
        memory.write(offset as usize, &entry.to_le_bytes());
    }
    memory
}

#[test]
fn entries_that_are_corrupt_are_left_alone() {
    // Pages of data are 2 to 9; 5 is disputed.
    let layout = layout(6, 2);
    let words = [AtomicU64::new(1 << 5)];
    let bad = [1, 10, 5, u64::MAX, 1 << 52];

    for atomic in [true, false] {
        for page in bad {
            let memory = with_entries(&layout, &[2, page, 3, 4]);
            let blocks = Blocks::new(memory.slice(), layout, Persist::on(&memory), &Alone, atomic)
                .unwrap()
                .with_disputed(Bitmap::new(&words));
            let before = memory.read(0, memory.len());
            let pages = List::default();
            pages.next.replace(vec![8, 7, 6]);
            let corrupt = Error::Corrupt {
                block: Block(1),
                page: Page(page),
            };
            let fill = |page: VolatileSlice<'_>, persist: &Persist<&Memory>| {
                persist.write_bytes(page, &[1; PAGE]);
            };

            assert_eq!(blocks.read(Block(1), |_| panic!()), Err::<(), _>(corrupt));
            assert_eq!(blocks.write(Block(1), 3, true, &pages, fill), Err(corrupt));
            assert_eq!(blocks.discard(Block(1), 3, &pages), Err(corrupt));
            assert_eq!(*pages.put.borrow(), []);
            assert_eq!(memory.read(0, memory.len()), before);

            // The blocks before it are written and discarded, those after it not.
            let new = if atomic { 6 } else { 2 };
            let old: &[u64] = if atomic { &[2] } else { &[] };
            assert_eq!(blocks.write(Block(0), 4, true, &pages, fill), Err(corrupt));
            assert_eq!(memory.slice().load_u64(PAGE_SIZE), Some(new));
            assert_eq!(*pages.put.borrow(), old);
            assert_eq!(blocks.discard(Block(0), 4, &pages), Err(corrupt));
            assert_eq!(*pages.put.borrow(), [old, &[new]].concat());
            for (block, entry) in (0..).zip([0, page, 3, 4]) {
                let offset = layout.entry_offset(Block(block)).unwrap();
                assert_eq!(memory.slice().load_u64(offset), Some(entry));
            }
        }
    }
}

#[test]
fn an_entry_that_becomes_corrupt_keeps_its_page() {
    let layout = layout(6, 2);
    let memory = with_entries(&layout, &[2, 3, 4]);
    let blocks = Blocks::new(memory.slice(), layout, Persist::on(&memory), &Alone, true).unwrap();
    let pages = List::default();
    pages.next.replace(vec![8, 7, 6]);

    // While the data is stored, the medium breaks.
    let result = blocks.write(Block(0), 3, true, &pages, |page, persist| {
        persist.write_zeroes(page);
        memory.write(PAGE + 8, &[0xff; 8]);
    });

    let corrupt = Error::Corrupt {
        block: Block(1),
        page: Page(u64::MAX),
    };
    // The first is written before, as is the stage up to the block that cannot be.
    assert_eq!(result, Err(corrupt));
    assert_eq!(memory.slice().load_u64(PAGE_SIZE), Some(6));
    assert_eq!(memory.slice().load_u64(PAGE_SIZE + 8), Some(u64::MAX));
    assert_eq!(*pages.put.borrow(), [2]);

    // Both are staged by then: the page of the second goes back unused.
    memory.write(PAGE + 8, &3_u64.to_le_bytes());
    pages.put.take();
    pages.next.replace(vec![9, 8, 7]);
    let mut count = 0;
    let result = blocks.write(Block(0), 3, true, &pages, |page, persist| {
        persist.write_zeroes(page);
        count += 1;
        if count == 3 {
            memory.write(PAGE + 8, &[0xff; 8]);
        }
    });
    assert_eq!(result, Err(corrupt));
    assert_eq!(*pages.put.borrow(), [6, 8, 4]);
    assert_eq!(memory.slice().load_u64(PAGE_SIZE), Some(7));
    assert_eq!(memory.slice().load_u64(PAGE_SIZE + 16), Some(9));
}

#[test]
fn what_was_discarded_before_a_corrupt_entry_is_durable() {
    let layout = layout(70, 2);
    let memory = with_entries(&layout, &[2, 1]);
    let memory = Memory::boot(&memory.read(0, memory.len()));

    // Another CPU was faster with the first.
    assert!(Persist::on(memory.cpu(1)).store_u64_cached(memory.slice(), PAGE_SIZE, 0));
    let blocks = Blocks::new(memory.slice(), layout, Persist::on(&memory), &Alone, true).unwrap();
    let result = blocks.discard(Block(0), 70, &List::default());

    assert!(matches!(result, Err(Error::Corrupt { .. })));
    assert_eq!(memory.in_flight(), 0);
}

#[test]
fn a_page_that_is_not_the_disks_is_not_written() {
    let layout = layout(6, 2);
    for page in [0, 1, 10, 11, u64::MAX] {
        let memory = Memory::new(layout.size() as usize);
        let blocks =
            Blocks::new(memory.slice(), layout, Persist::on(&memory), &Alone, true).unwrap();
        let pages = List::default();
        pages.next.replace(vec![page]);

        let result = blocks.write(Block(0), 1, true, &pages, |_, _| panic!());
        assert!(matches!(result, Err(Error::Corrupt { .. })));
        assert_eq!(memory.in_flight(), 0);
    }
}

#[test]
fn what_the_disk_does_not_have_is_refused() {
    let layout = layout(6, 2);
    let memory = Memory::new(layout.size() as usize);
    let new = |slice| Blocks::new(slice, layout, Persist::on(&memory), &Alone, true);
    let blocks = new(memory.slice()).unwrap();
    let pages = List::default();

    for (first, count) in [(6, 1), (5, 2), (0, 7), (7, 0), (u64::MAX, 1), (1, u64::MAX)] {
        let first = Block(first);
        let error = Error::OutOfRange {
            first,
            count,
            blocks: 6,
        };
        assert_eq!(blocks.discard(first, count, &pages), Err(error));
        assert_eq!(
            blocks.write(first, count, true, &pages, |_, _| panic!()),
            Err(error)
        );
        if count == 1 {
            assert_eq!(blocks.read(first, |_| panic!()), Err::<(), _>(error));
        }
    }
    assert_eq!(blocks.discard(Block(6), 0, &pages), Ok(0));
    assert_eq!(
        blocks.write(Block(6), 0, true, &pages, |_, _| panic!()),
        Ok(())
    );
    assert_eq!(memory.in_flight(), 0);

    // A range that is too small, or that has no granules.
    assert!(new(memory.slice().range(0, layout.size() - 1).unwrap()).is_none());
    let larger = Memory::new(layout.size() as usize + 8);
    assert!(new(larger.slice().range(4, layout.size()).unwrap()).is_none());
    assert!(new(larger.slice().range(8, layout.size()).unwrap()).is_some());
}

#[test]
fn a_discard_says_how_many_pages_it_gave_back() {
    let world = World::new(layout(70, 1), None, Flaw::None, true, 0);
    for (first, count) in [(0, 3), (63, 2), (69, 1)] {
        world.run(Op::write(first, count)).unwrap();
    }

    let blocks = Blocks::new(
        world.memory.slice(),
        world.layout,
        Persist::on(&world.memory),
        &Alone,
        true,
    )
    .unwrap();
    let pages = List::default();
    assert_eq!(blocks.discard(Block(1), 69, &pages), Ok(5));
    assert_eq!(blocks.discard(Block(0), 70, &pages), Ok(1));
    assert_eq!(blocks.discard(Block(0), 70, &pages), Ok(0));
    assert_eq!(pages.put.borrow().len(), 6);
    assert_eq!(world.memory.read(PAGE, PAGE), [0; PAGE]);
}

#[test]
fn errors_say_what_to_do() {
    let errors = [
        Error::NoSpace,
        Error::WouldBlock,
        Error::Corrupt {
            block: Block(7),
            page: Page(9),
        },
        Error::OutOfRange {
            first: Block(3),
            count: 4,
            blocks: 5,
        },
    ];

    assert_eq!(
        errors.map(|error| error.to_string()),
        [
            "no page is free for the data; discard blocks, or free memory",
            "no page is free for the data at once; try again, and wait for it",
            "the index names page 9 for block 7, which is no page of data or another block's, too; \
             format the range and restore the disk",
            "4 blocks from block 3 reach beyond the end of the disk at block 5",
        ]
    );
}

/// An operation on some of so many blocks.
fn op(blocks: u64) -> impl Strategy<Value = Op> {
    let kind = prop_oneof![
        4 => any::<bool>().prop_map(|may_wait| Kind::Write { may_wait }),
        2 => Just(Kind::Discard),
        1 => Just(Kind::Read),
    ];

    (kind, 0..blocks, 1..=blocks)
        .prop_map(move |(kind, first, count)| Op::new(kind, first, count.min(blocks - first)))
}

/// Blocks of the disk in the random runs.
const BLOCKS: u64 = 4;

proptest! {
    #![proptest_config(ProptestConfig {
        cases: ProptestConfig::default().cases / 2,
        ..ProptestConfig::default()
    })]

    /// Runs operations, and others in their middle, until power is lost at one of the points; then
    /// more of them with what is left.
    #[test]
    fn random_operations_and_a_power_loss(
        ops in prop::collection::vec(op(BLOCKS), 1..8),
        others in prop::collection::vec((0..150_usize, op(BLOCKS)), 0..4),
        ops_after in prop::collection::vec(op(BLOCKS), 1..4),
        spare in 1..3_u64,
        kept in 0..4_usize,
        crash_at in 0..200_usize,
        atomic in prop::bool::weighted(0.7),
        copy in prop::sample::select(&CopyPolicy::ALL),
    ) {
        let layout = layout(BLOCKS, spare);
        let mut world = World::new(layout, None, Flaw::None, atomic, kept);
        world.crash_at = Some(crash_at);
        world.copy = copy;
        // A discard may take away the page that a write counts on to come back.
        let is_alone = others.is_empty();
        let mut others = others;
        others.sort_by_key(|&(at, _)| at);
        world.others.replace(others.into());

        for op in ops {
            let is_present = |block| world.seen(block) != [0];
            let must_fit = is_alone
                && matches!(op.kind, Kind::Write { .. })
                && (op.first..op.first + op.count).all(is_present);
            match world.run(op) {
                Ok(()) => {}
                Err(Error::NoSpace | Error::WouldBlock) => prop_assert!(!must_fit),
                Err(error) => prop_assert!(false, "{}", error),
            }
        }
        world.is_in_order();

        // A write in place may leave a mix, which has no name here.
        let Some(image) = world.crash.take().filter(|_| atomic) else {
            return Ok(());
        };
        let mut world = World::new(layout, Some(&image), Flaw::None, atomic, kept);
        world.copy = copy;
        world.settle();
        for op in ops_after {
            let _ = world.run(op);
        }
        world.is_in_order();
    }
}
