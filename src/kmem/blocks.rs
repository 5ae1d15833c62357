// SPDX-License-Identifier: GPL-2.0-only

//! The index at work: reads, writes and discards of blocks, in an order that survives a loss of
//! power at any time.
//!
//! # Order
//!
//! A block that is written gets a new page. For each batch of blocks:
//!
//! | step | what it does | what a power loss leaves of the block |
//! |---|---|---|
//! | 1 | takes pages and stores the data there, past the cache | the old data |
//! | 2 | fence: the data is durable | the old data |
//! | 3 | stores the page in the entry, at once, under the lock of the block; writes the lines of the entries back | the old data or the new, never a mix |
//! | 4 | fence: the entry is durable | the new data |
//! | 5 | gives back the page that the entry had before | the new data |
//!
//! - Step 3 before 2 would let an entry name a page that has only a part of the data.
//! - Step 5 before 4 would let somebody else write to a page that an entry names after all.
//!
//! A discard is the same without 1 and 2, with zero for the page. If writes need not be atomic, a
//! block that has a page is overwritten there, under its lock: a power loss can leave a mix of its
//! old and new data, but none of anything else.
//!
//! # Many CPUs at once
//!
//! Operations on one block have a result as if each was done at one moment between its start and its
//! end: a write or a discard when it stores the entry, a write in place and a read when they have
//! the lock. And what was done then, is durable at the end:
//!
//! - *A read sees one write.* It holds the lock from the load of the entry to the end of the copy,
//!   and the page has all of the data before an entry names it. A write in place holds the lock,
//!   too, and fences before it unlocks, as stores past the cache may be seen after it otherwise.
//! - *No page is in use after it was given back.* Who reads or writes in a page that an entry names
//!   holds the lock; who replaces it in the entry had the lock after them, and those who get the
//!   lock later do not find it there any more.
//! - *A page is given back once.* Only who takes it out of its entry gives it back, and that is one,
//!   as load and store of the entry are under the lock. No other entry names it: a page that is
//!   taken is nobody else's.
//! - *A page that was given back is not found after a power loss.* Let two writers race: one
//!   replaces page A by B, then the other B by C. The first gives back A, the other B, each after its
//!   own fence, which follows its own write-back of the line, which follows its store. So at that
//!   time the media have its store or a later one: B or C when A is given back, C when B is. They do
//!   not go back, as all stores to one line reach the media in the order in which CPUs see them.
//! - *What is found as it should be is durable, too.* A discard of a block that has no page, and a
//!   write in place, store nothing in the entry, but may have seen what another CPU has stored and
//!   not made durable yet. So they write its line back as well.
//!
//! A read may see a write that is not at its end yet, and that a power loss undoes, as with each
//! disk.

use super::{
    super::persist::{
        Machine,
        Native,
        Persist,
        VolatileSlice,
        GRANULE, //
    },
    bitmap::Bitmap,
    layout::Layout,
    Block,
    Page,
    ENTRY_SIZE,
    PAGE_SIZE, //
};
use core::{
    fmt,
    ops::Range, //
};

/// How many blocks of a write share their fences.
pub const WRITE_BATCH: usize = 32;

/// How many blocks of a discard share a fence.
pub const DISCARD_BATCH: usize = 64;

/// In an entry, and in a batch: no page. Page 0 has the superblock.
const NONE: Page = Page(0);

/// Why blocks were not read, written or discarded.
///
/// Displays as what is wrong and what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// There is no page for the data.
    NoSpace,
    /// There is no page for the data that can be had without waiting.
    WouldBlock,
    /// The entry of a block names a page that is not its own.
    Corrupt {
        /// The block.
        block: Block,
        /// The page that its entry names.
        page: Page,
    },
    /// The disk does not have all of the blocks.
    OutOfRange {
        /// The first of them.
        first: Block,
        /// How many they are.
        count: u64,
        /// How many the disk has.
        blocks: u64,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NoSpace => write!(
                f,
                "no page is free for the data; discard blocks, or free memory"
            ),
            Self::WouldBlock => write!(
                f,
                "no page is free for the data at once; try again, and wait for it"
            ),
            Self::Corrupt { block, page } => write!(
                f,
                "the index names page {} for block {}, which is no page of data or another \
                 block's, too; format the range and restore the disk",
                page.0, block.0
            ),
            Self::OutOfRange {
                first,
                count,
                blocks,
            } => write!(
                f,
                "{count} blocks from block {} reach beyond the end of the disk at block {blocks}",
                first.0
            ),
        }
    }
}

impl core::error::Error for Error {}

/// What a page is taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Need {
    /// Whether the block has a page already, which comes back when this one is in its place. It is
    /// a hint: if somebody discards the block meanwhile, that has brought it back, and nothing comes.
    pub replaces: bool,
    /// Whether to wait for a page if none is free. Who may wait holds no other page, and no lock: a
    /// wait for pages that others put back comes to an end.
    pub may_wait: bool,
}

/// Why no page was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoPage {
    /// There is none.
    NoSpace,
    /// There is none without waiting.
    WouldBlock,
}

impl From<NoPage> for Error {
    fn from(reason: NoPage) -> Self {
        match reason {
            NoPage::NoSpace => Self::NoSpace,
            NoPage::WouldBlock => Self::WouldBlock,
        }
    }
}

/// Where pages come from, and where they go.
pub trait Pages {
    /// Takes a page of data that nobody else uses, whatever is in it.
    ///
    /// # Errors
    ///
    /// [`NoPage`]. If the caller holds pages, it puts back what it can, and tries once more.
    fn take(&self, need: Need) -> Result<Page, NoPage>;

    /// Puts back pages that no entry names, also not after a power loss. Whoever gets them next may
    /// write to them at once.
    fn put(&self, pages: impl Iterator<Item = Page>);
}

/// Locks of blocks.
///
/// Blocks may share a lock: a thread holds one at a time, for no longer than a page is copied, and
/// does not sleep, take pages or put them back meanwhile.
pub trait Locks {
    /// Unlocks when it is dropped.
    type Guard<'a>
    where
        Self: 'a;

    /// Locks `block`, of which there is one lock.
    fn lock(&self, block: Block) -> Self::Guard<'_>;
}

/// The blocks of a disk, in a range of format BLK.
///
/// It is a view: each request may make its own. See the [module](self) for what is said of power
/// losses, and of many at once.
///
/// # Examples
///
/// ```
/// use pmem_core::{
///     kmem::{blocks::*, layout::Layout, Block, Page},
///     persist::{model::Memory, Persist},
/// };
/// use std::{cell::RefCell, sync::{Mutex, MutexGuard}};
///
/// struct Free(RefCell<Vec<Page>>);
///
/// impl Pages for Free {
///     fn take(&self, _need: Need) -> Result<Page, NoPage> {
///         self.0.borrow_mut().pop().ok_or(NoPage::NoSpace)
///     }
///
///     fn put(&self, pages: impl Iterator<Item = Page>) {
///         self.0.borrow_mut().extend(pages);
///     }
/// }
///
/// struct OneLock(Mutex<()>);
///
/// impl Locks for OneLock {
///     type Guard<'a> = MutexGuard<'a, ()>;
///
///     fn lock(&self, _block: Block) -> Self::Guard<'_> {
///         self.0.lock().unwrap()
///     }
/// }
///
/// let layout = Layout::blk(100)?;
/// let memory = Memory::new(layout.size() as usize);
/// let free = Free(RefCell::new(layout.data().map(Page).collect()));
/// let lock = OneLock(Mutex::new(()));
/// let blocks = Blocks::new(memory.slice(), layout, Persist::on(&memory), &lock, true).unwrap();
///
/// blocks.write(Block(5), 2, true, &free, |page, persist| persist.write_bytes(page, &[7; 4096]))?;
/// assert_eq!(blocks.read(Block(6), |page| page.is_some()), Ok(true));
/// assert_eq!(memory.in_flight(), 0);
///
/// assert_eq!(blocks.discard(Block(0), layout.blocks(), &free), Ok(2));
/// assert_eq!(blocks.read(Block(6), |page| page.is_some()), Ok(false));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Invariants
///
/// `medium` has all pages of `layout`, and its address is a multiple of [`GRANULE`].
#[derive(Debug)]
pub struct Blocks<'a, L, M = Native> {
    medium: VolatileSlice<'a>,
    layout: Layout,
    persist: Persist<M>,
    locks: &'a L,
    atomic: bool,
    disputed: Option<Bitmap<'a>>,
}

impl<'a, L: Locks, M: Machine> Blocks<'a, L, M> {
    /// The blocks in `medium`, which is the whole range, or nothing if that is smaller than `layout`
    /// or at no multiple of [`GRANULE`].
    ///
    /// Unless `atomic`, a block that has a page is overwritten there.
    ///
    /// All who use the range at the same time must use the same `locks`.
    pub fn new(
        medium: VolatileSlice<'a>,
        layout: Layout,
        persist: Persist<M>,
        locks: &'a L,
        atomic: bool,
    ) -> Option<Self> {
        medium.range(0, layout.size())?;
        if medium.as_ptr().addr() % GRANULE != 0 {
            return None;
        }

        // INVARIANT: Both were just checked.
        Some(Self {
            medium,
            layout,
            persist,
            locks,
            atomic,
            disputed: None,
        })
    }

    /// Refuses blocks whose pages are in this set, by their number: more than one entry names each
    /// of them.
    #[must_use]
    pub fn with_disputed(self, disputed: Bitmap<'a>) -> Self {
        Self {
            disputed: Some(disputed),
            ..self
        }
    }

    /// Calls `read` with the data of `block`, a page long, or with nothing if there is none: the
    /// block reads as zeros. The block is locked meanwhile.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`] or [`Error::Corrupt`]; then `read` is not called.
    #[inline]
    pub fn read<R>(
        &self,
        block: Block,
        read: impl FnOnce(Option<VolatileSlice<'_>>) -> R,
    ) -> Result<R, Error> {
        self.check(block, 1)?;

        let _guard = self.locks.lock(block);
        let data = match self.entry(block)? {
            Some(page) => Some(self.page(block, page)?),
            None => None,
        };
        Ok(read(data))
    }

    /// Writes `count` blocks from `first` on: they are durable when it returns.
    ///
    /// For each of them, in ascending order, it calls `fill` with a page, to store the data of all
    /// of it by the [`Persist`] that it is given, without a fence. `fill` is called once a block at
    /// most, and must not use these blocks.
    ///
    /// It waits for pages if `may_wait`.
    ///
    /// # Errors
    ///
    /// - [`Error::OutOfRange`]: nothing is written.
    /// - [`Error::NoSpace`], [`Error::WouldBlock`], [`Error::Corrupt`]: some of the blocks before
    ///   the one that cannot be written, or all of them, are written. Each has all of its old data
    ///   or all of its new, and what is new is durable.
    #[inline]
    pub fn write(
        &self,
        first: Block,
        count: u64,
        may_wait: bool,
        pages: &impl Pages,
        mut fill: impl FnMut(VolatileSlice<'_>, &Persist<M>),
    ) -> Result<(), Error> {
        let mut stage = Stage::new(first);
        let mut staged = Ok(());

        for number in self.check(first, count)? {
            staged = self.stage(&mut stage, Block(number), may_wait, pages, &mut fill);
            if staged.is_err() {
                break;
            }
            if stage.is_full() {
                self.commit(&mut stage, pages)?;
            }
        }

        // What is staged is written also if a later block cannot be.
        self.commit(&mut stage, pages).and(staged)
    }

    /// Discards `count` blocks from `first` on: they have no data and read as zeros, and so they do
    /// after a power loss when it returns. Returns how many pages this gave back.
    ///
    /// # Errors
    ///
    /// - [`Error::OutOfRange`]: nothing is discarded.
    /// - [`Error::Corrupt`]: the blocks before that one are discarded, and it is as it was.
    pub fn discard(&self, first: Block, count: u64, pages: &impl Pages) -> Result<u64, Error> {
        let mut left = self.check(first, count)?;
        let mut put = 0_u64;

        while !left.is_empty() {
            let batch = left.start
                ..left
                    .end
                    .min(left.start.saturating_add(DISCARD_BATCH as u64));
            left.start = batch.end;

            let mut cleared = [NONE; DISCARD_BATCH];
            let mut result = Ok(());
            for (number, slot) in batch.clone().zip(&mut cleared) {
                match self.clear(Block(number)) {
                    Ok(page) => *slot = page,
                    Err(error) => {
                        result = Err(error);
                        break;
                    }
                }
            }

            self.flush(&batch);
            let count = named(&cleared).count() as u64;
            // Batches without data share the fence of the next with some, or of the last.
            if count != 0 || left.is_empty() || result.is_err() {
                self.persist.fence();
            }
            if count != 0 {
                pages.put(named(&cleared));
            }
            put = put.saturating_add(count);
            result?;
        }
        Ok(put)
    }

    /// Stores the data of `block` in a new page, which is then in `stage`, or in its own.
    #[inline]
    fn stage(
        &self,
        stage: &mut Stage,
        block: Block,
        may_wait: bool,
        pages: &impl Pages,
        fill: &mut impl FnMut(VolatileSlice<'_>, &Persist<M>),
    ) -> Result<(), Error> {
        // Without the lock: another CPU may change it until the new page is in its place.
        let replaces = self.entry(block)?.is_some();
        if replaces && !self.atomic && self.overwrite(block, fill)? {
            stage.push(NONE);
            return Ok(());
        }

        let need = |stage: &Stage| Need {
            replaces,
            may_wait: may_wait && stage.is_empty(),
        };
        let page = match pages.take(need(stage)) {
            // It may be this very stage that keeps the last pages from being free.
            Err(_) if !stage.is_empty() => {
                self.commit(stage, pages)?;
                pages.take(need(stage))?
            }
            taken => taken?,
        };
        // A page that is none of data is not the disk's, so that it is not put back.
        fill(self.page(block, page)?, &self.persist);
        stage.push(page);
        Ok(())
    }

    /// Stores the data of `block` in the page that it has, or returns `false` if it has none.
    #[inline]
    fn overwrite(
        &self,
        block: Block,
        fill: &mut impl FnMut(VolatileSlice<'_>, &Persist<M>),
    ) -> Result<bool, Error> {
        let _guard = self.locks.lock(block);
        let Some(page) = self.entry(block)? else {
            return Ok(false);
        };

        fill(self.page(block, page)?, &self.persist);
        // What went past the cache may be seen after the lock is free, without it.
        self.persist.fence();
        Ok(true)
    }

    /// Puts the pages of `stage` into the entries of their blocks, and gives back those that were
    /// there. When it returns, all of this is durable, and nothing is staged.
    fn commit(&self, stage: &mut Stage, pages: &impl Pages) -> Result<(), Error> {
        if stage.is_empty() {
            return Ok(());
        }

        let blocks = stage.blocks();
        let mut result = Ok(());
        if named(stage.pages()).next().is_some() {
            self.persist.fence();
            for (number, page) in blocks.clone().zip(stage.pages_mut()) {
                if *page != NONE {
                    match self.replace(Block(number), *page) {
                        Ok(old) => *page = old,
                        // Nothing names the new page, which goes back where it came from.
                        Err(error) => result = result.and(Err(error)),
                    }
                }
            }
        }
        // The lines are written back when all entries are stored, as a line has many. This also has
        // those whose page was overwritten; see the module.
        self.flush(&blocks);
        self.persist.fence();

        pages.put(named(stage.pages()));
        stage.clear();
        result
    }

    /// Stores `new` in the entry of `block`, and returns what it was. It is on its way when the line
    /// is written back.
    fn replace(&self, block: Block, new: Page) -> Result<Page, Error> {
        let _guard = self.locks.lock(block);
        let old = self.entry(block)?.unwrap_or(NONE);

        let stored = self
            .layout
            .entry_offset(block)
            .is_some_and(|offset| self.persist.store_u64_cached(self.medium, offset, new.0));
        if stored {
            Ok(old)
        } else {
            Err(self.out_of_range(block, 1))
        }
    }

    /// Takes the page out of the entry of `block`, and returns it. Leaves alone what is [`NONE`].
    fn clear(&self, block: Block) -> Result<Page, Error> {
        // Without the lock, which most blocks of a large discard do not need.
        match self.entry(block)? {
            Some(_) => self.replace(block, NONE),
            None => Ok(NONE),
        }
    }

    /// The page that the entry of `block` names, if it names one.
    #[inline]
    fn entry(&self, block: Block) -> Result<Option<Page>, Error> {
        let entry = self
            .layout
            .entry_offset(block)
            .and_then(|offset| self.medium.load_u64(offset));
        let page = match entry {
            Some(number) => Page(number),
            None => return Err(self.out_of_range(block, 1)),
        };

        if page == NONE {
            Ok(None)
        } else if !self.layout.is_data(page) || self.is_disputed(page) {
            Err(Error::Corrupt { block, page })
        } else {
            Ok(Some(page))
        }
    }

    #[inline]
    fn is_disputed(&self, page: Page) -> bool {
        self.disputed.is_some_and(|disputed| disputed.test(page.0))
    }

    /// The memory of `page`, which is one of data that `block` has or gets.
    #[inline]
    fn page(&self, block: Block, page: Page) -> Result<VolatileSlice<'a>, Error> {
        self.layout
            .page_offset(page)
            .filter(|_| self.layout.is_data(page))
            .and_then(|offset| self.medium.range(offset, PAGE_SIZE))
            .ok_or(Error::Corrupt { block, page })
    }

    /// Writes back the lines of the entries of `blocks`.
    #[inline]
    fn flush(&self, blocks: &Range<u64>) {
        // By the invariant, and as the blocks are those of the disk, this finds them all.
        let entries = self
            .layout
            .entry_offset(Block(blocks.start))
            .zip(
                blocks
                    .end
                    .wrapping_sub(blocks.start)
                    .checked_mul(ENTRY_SIZE),
            )
            .and_then(|(offset, len)| self.medium.range(offset, len));
        if let Some(entries) = entries {
            self.persist.flush(entries);
        }
    }

    /// The numbers of `count` blocks from `first` on, if the disk has all of them.
    #[inline]
    fn check(&self, first: Block, count: u64) -> Result<Range<u64>, Error> {
        match first.0.checked_add(count) {
            Some(end) if end <= self.layout.blocks() => Ok(first.0..end),
            _ => Err(self.out_of_range(first, count)),
        }
    }

    #[cold]
    fn out_of_range(&self, first: Block, count: u64) -> Error {
        Error::OutOfRange {
            first,
            count,
            blocks: self.layout.blocks(),
        }
    }
}

/// Those of `pages` that are some.
fn named(pages: &[Page]) -> impl Iterator<Item = Page> + '_ {
    pages.iter().copied().filter(|&page| page != NONE)
}

/// What is written and not in the index yet: contiguous blocks, so that none is there twice.
///
/// # Invariants
///
/// `len` is at most [`WRITE_BATCH`].
struct Stage {
    /// The first block.
    first: Block,
    /// How many they are.
    len: usize,
    /// Their new pages; [`NONE`] for a block that was overwritten in its own.
    pages: [Page; WRITE_BATCH],
}

impl Stage {
    /// Nothing, before the block `first`.
    #[inline]
    fn new(first: Block) -> Self {
        Self {
            first,
            len: 0,
            pages: [NONE; WRITE_BATCH],
        }
    }

    #[inline]
    fn is_empty(&self) -> bool {
        self.len == 0
    }

    #[inline]
    fn is_full(&self) -> bool {
        self.len == WRITE_BATCH
    }

    /// Adds the page of the next block. It must not be full.
    #[inline]
    fn push(&mut self, page: Page) {
        if let Some(slot) = self.pages.get_mut(self.len) {
            *slot = page;
            // INVARIANT: It was less, as there is such a slot.
            self.len = self.len.wrapping_add(1);
        }
    }

    /// The numbers of the blocks, which do not wrap, as they were checked.
    #[inline]
    fn blocks(&self) -> Range<u64> {
        self.first.0..self.first.0.wrapping_add(self.len as u64)
    }

    #[inline]
    fn pages(&self) -> &[Page] {
        self.pages.get(..self.len).unwrap_or_default()
    }

    #[inline]
    fn pages_mut(&mut self) -> &mut [Page] {
        self.pages.get_mut(..self.len).unwrap_or_default()
    }

    /// Goes on with nothing, before the block after the last.
    #[inline]
    fn clear(&mut self) {
        self.first = Block(self.blocks().end);
        self.len = 0;
    }
}
