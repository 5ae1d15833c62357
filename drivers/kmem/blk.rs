// SPDX-License-Identifier: GPL-2.0-only

//! Format BLK: a disk whose blocks take pages of the range when they are written, and give them
//! back to the system when they are discarded.
//!
//! In which order things become durable, and what happens when many CPUs use one block, is said at
//! [`blocks`](crate::pmem_core::kmem::blocks).

use super::{
    pool::{
        ForDiscards,
        ForWrites,
        Pool, //
    },
    Contents,
    Faults,
    Format,
    Instance,
    Setting, //
};
use crate::{
    kapi::{
        bio::{
            self,
            Bio,
            Segments,
            Status, //
        },
        disk::{
            self,
            Disk,
            Features,
            Limits,
            Prepared, //
        },
        hotplug::Memory,
        mc, //
    },
    pmem_core::{
        extent::{
            Extent,
            Sector, //
        },
        kmem::{
            bitmap::Bitmap,
            blocks::{
                self,
                Blocks,
                Locks, //
            },
            layout::{
                self,
                Layout, //
            },
            scan,
            superblock,
            Block,
            ENTRY_SIZE,
            PAGE_SIZE, //
        },
        medium::{
            Medium,
            Unreadable, //
        },
        persist::{
            Persist,
            VolatileSlice, //
        },
    },
    LocalModule, //
};
use kernel::{
    new_spinlock,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        SpinLock,
        SpinLockGuard, //
    },
};

/// The most that one bio discards: some ten milliseconds. The block layer splits what is longer.
const MAX_DISCARD: u64 = 256 << 20;

/// How many locks the blocks share.
const STRIPES: usize = 256;

pub(super) struct Blk;

impl Format for Blk {
    fn kind(&self) -> superblock::Format {
        superblock::Format::Blk
    }

    fn layout(&self, pages: u64) -> Result<Layout, layout::Error> {
        Layout::blk(pages)
    }

    fn probe(&self, name: &CStr, medium: &dyn Medium, layout: &Layout) -> Result<Contents> {
        let mut contents = Contents::new(layout)?;
        let found = scan::scan(&medium, layout, contents.held(), None);
        if found.faults == 0 {
            contents.keep_spare(layout)?;
            return Ok(contents);
        }

        for fault in found.first.iter().flatten() {
            pr_err!("{}: {}\n", name, fault);
        }
        pr_err!(
            "{}: {} fault(s) in the index: the disk is read-only, and none of the range is RAM; copy what is readable, then format the range\n",
            name,
            found.faults
        );
        // Once more, to know all that must not be read. No page may be overwritten, whatever it is.
        let pieces = layout.index_pages().saturating_mul(PAGE_SIZE) / scan::PIECE as u64;
        let faults = Faults {
            disputed: super::bits(layout.pages())?,
            unreadable: super::bits(pieces)?,
        };
        let again = Contents::new(layout)?;
        let medium = Noting {
            medium,
            unreadable: Bitmap::new(&faults.unreadable),
        };
        let disputed = Bitmap::new(&faults.disputed);
        scan::scan(&medium, layout, again.held(), Some(disputed));
        contents.hold_all();
        contents.faults = Some(faults);
        Ok(contents)
    }

    fn start(
        &self,
        setting: &Setting,
        memory: Arc<Memory>,
        layout: Layout,
        contents: Contents,
    ) -> Result<KBox<dyn Instance>> {
        let read_only = contents.faults.is_some();
        let node = memory.node();
        let pool = Pool::new(memory, setting.shared.queue.clone(), &layout)?;
        for &page in &contents.spare {
            pool.push(page, 1);
        }
        let served = pool.clone();
        let disk = Arc::pin_init(
            pin_init!(BlkDisk {
                pool: served,
                layout,
                persist: setting.shared.persist,
                atomic: setting.shared.atomic,
                faults: contents.faults,
                closing: Atomic::new(false),
                stripes <- Stripes::new(),
            }),
            GFP_KERNEL,
        )?;
        let mut limits = Limits {
            logical_block_size: PAGE_SIZE as u32,
            physical_block_size: PAGE_SIZE as u32,
            features: Features::SYNCHRONOUS | Features::NOWAIT,
            read_only,
            ..Limits::default()
        };
        if !read_only {
            limits.max_discard_sectors = Sector::containing(MAX_DISCARD).0 as u32;
            limits.max_write_zeroes_sectors = limits.max_discard_sectors;
            limits.discard_granularity = PAGE_SIZE as u32;
            if setting.shared.atomic {
                limits.features = limits.features | Features::ATOMIC_WRITES;
                limits.atomic_write_unit = PAGE_SIZE as u32;
            }
        }
        // Nothing must fail once the disk was shown, see `Prepared::add()`.
        let running = KBox::<Running>::new_uninit(GFP_KERNEL)?;
        // Fewer than the pages of the range.
        let capacity = Sector::containing(layout.blocks().wrapping_mul(PAGE_SIZE));
        let disk = Prepared::new(
            fmt!("{}", &*setting.name),
            capacity,
            &limits,
            node,
            disk,
            None,
        )?
        .add()?;
        let running: KBox<Running> = KBox::write(running, Running { pool, disk });
        Ok(running)
    }
}

/// A medium, of which it is noted which pieces of the index cannot be read.
struct Noting<'a> {
    medium: &'a dyn Medium,
    unreadable: Bitmap<'a>,
}

impl Medium for Noting<'_> {
    fn size(&self) -> u64 {
        self.medium.size()
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Unreadable> {
        self.medium.read(offset, buf).inspect_err(|_| {
            // The index comes after the first page.
            let piece = offset.saturating_sub(PAGE_SIZE) / scan::PIECE as u64;
            self.unreadable.set(piece);
        })
    }
}

struct Running {
    // First, so that nobody writes when the pool goes.
    disk: Disk<BlkDisk>,
    pool: Arc<Pool>,
}

impl Instance for Running {
    fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    fn close(&self) -> bool {
        self.disk.close(|disk| disk.closing.store(true, Relaxed))
    }

    fn reopen(&self) {
        self.disk.data().closing.store(false, Relaxed);
    }
}

/// Locks that blocks share.
#[pin_data]
struct Stripes {
    #[pin]
    locks: [Stripe; STRIPES],
}

/// A lock in a cache line of its own.
#[pin_data]
#[repr(align(64))]
struct Stripe {
    #[pin]
    lock: SpinLock<()>,
}

impl Stripes {
    fn new() -> impl PinInit<Self> {
        pin_init!(Stripes {
            locks <- pin_init::pin_init_array_from_fn(|_| pin_init!(Stripe {
                lock <- new_spinlock!(()),
            })),
        })
    }
}

impl Locks for Stripes {
    type Guard<'a> = Option<SpinLockGuard<'a, ()>>;

    #[inline]
    fn lock(&self, block: Block) -> Self::Guard<'_> {
        // There is one for each remainder.
        let stripe = self.locks.get((block.0 % STRIPES as u64) as usize);
        stripe.map(|stripe| stripe.lock.lock())
    }
}

/// The disk.
#[pin_data]
struct BlkDisk {
    pool: Arc<Pool>,
    layout: Layout,
    persist: Persist,
    /// Whether a block is written to another page.
    atomic: bool,
    /// What must not be read; then the disk is read-only.
    faults: Option<Faults>,
    /// Whether nobody may open the disk any more.
    closing: Atomic<bool>,
    #[pin]
    stripes: Stripes,
}

impl BlkDisk {
    #[inline]
    fn blocks(&self) -> Result<Blocks<'_, Stripes>, Status> {
        let medium = self.pool.memory().slice().ok_or(Status::IOERR)?;
        let blocks = Blocks::new(
            medium,
            self.layout,
            self.persist,
            &self.stripes,
            self.atomic,
        )
        .ok_or(Status::IOERR)?;
        Ok(match &self.faults {
            None => blocks,
            Some(faults) => blocks.with_disputed(Bitmap::new(&faults.disputed)),
        })
    }

    /// The blocks that `bio` is about: the first, and how many.
    #[inline]
    fn extent(&self, bio: &Bio) -> Result<(Block, u64), Status> {
        let size = self.layout.blocks().wrapping_mul(PAGE_SIZE);
        let extent = Extent::from_sectors(bio.sector(), bio.size().into(), size)
            .map_err(|_| Status::IOERR)?;
        if (extent.offset() | extent.len()) % PAGE_SIZE != 0 {
            return Err(Status::IOERR);
        }
        Ok((Block(extent.offset() / PAGE_SIZE), extent.len() / PAGE_SIZE))
    }

    fn read(&self, bio: &Bio) -> Result<(), Status> {
        let (first, count) = self.extent(bio)?;
        let blocks = self.blocks()?;
        let mut pieces = Pieces::new(bio);
        for block in first.0..first.0.wrapping_add(count) {
            if let Some(faults) = &self.faults {
                let piece = block.saturating_mul(ENTRY_SIZE) / scan::PIECE as u64;
                if Bitmap::new(&faults.unreadable).test(piece) {
                    return Err(Status::IOERR);
                }
            }
            blocks
                .read(Block(block), |data| {
                    let mut done = 0;
                    while let Some(piece) = pieces.next(PAGE_SIZE.saturating_sub(done)) {
                        match data {
                            Some(data) => {
                                mc::copy(piece, data.range(done, piece.len() as u64).ok_or(EIO)?)?
                            }
                            None => mc::zero(piece),
                        }
                        done = done.wrapping_add(piece.len() as u64);
                    }
                    Ok::<(), Error>(())
                })
                .map_err(status)?
                .map_err(|_| Status::IOERR)?;
        }
        Ok(())
    }

    fn write(&self, bio: &Bio) -> Result<(), Status> {
        let (first, count) = self.extent(bio)?;
        let mut pieces = Pieces::new(bio);
        self.blocks()?
            .write(
                first,
                count,
                !bio.is_nowait(),
                &ForWrites::new(&self.pool),
                |page, persist| {
                    let mut done = 0;
                    while let Some(piece) = pieces.next(PAGE_SIZE.saturating_sub(done)) {
                        if let Some(part) = page.range(done, piece.len() as u64) {
                            persist.write(part, piece);
                        }
                        done = done.wrapping_add(piece.len() as u64);
                    }
                    // A bio has all of its bytes. If not, what was in the page is not for the disk.
                    if let Some(rest) = page.range(done, PAGE_SIZE.saturating_sub(done)) {
                        if !rest.is_empty() {
                            persist.write_zeroes(rest);
                        }
                    }
                },
            )
            .map_err(status)
    }

    fn write_zeroes(&self, bio: &Bio) -> Result<(), Status> {
        if !bio.is_nounmap() {
            return self.discard(bio);
        }
        // Somebody wants the pages, to have room later.
        let (first, count) = self.extent(bio)?;
        self.blocks()?
            .write(
                first,
                count,
                !bio.is_nowait(),
                &ForWrites::new(&self.pool),
                |page, persist| persist.write_zeroes(page),
            )
            .map_err(status)
    }

    fn discard(&self, bio: &Bio) -> Result<(), Status> {
        let (first, count) = self.extent(bio)?;
        self.blocks()?
            .discard(first, count, &ForDiscards::new(&self.pool))
            .map(drop)
            .map_err(status)
    }

    #[inline]
    fn serve(&self, bio: &Bio) -> Result<(), Status> {
        match bio.op() {
            bio::Op::Read => self.read(bio),
            // A flush, which is done: each write was durable when it completed.
            bio::Op::Flush => Ok(()),
            bio::Op::Write if bio.size() == 0 => Ok(()),
            _ if self.faults.is_some() => Err(Status::IOERR),
            bio::Op::Write => self.write(bio),
            bio::Op::WriteZeroes => self.write_zeroes(bio),
            bio::Op::Discard => self.discard(bio),
            bio::Op::Other(_) => Err(Status::NOTSUPP),
        }
    }
}

fn status(error: blocks::Error) -> Status {
    match error {
        blocks::Error::NoSpace => Status::NOSPC,
        blocks::Error::WouldBlock => Status::AGAIN,
        blocks::Error::Corrupt { .. } | blocks::Error::OutOfRange { .. } => Status::IOERR,
    }
}

impl disk::Operations for BlkDisk {
    type Module = LocalModule;

    fn submit_bio(&self, bio: Bio) {
        let accounting = bio.start_accounting();
        let status = match self.serve(&bio) {
            Ok(()) => Status::OK,
            Err(status) => status,
        };
        if let Some(accounting) = accounting {
            bio.end_accounting(accounting);
        }
        bio.end(status);
    }

    fn open(&self) -> Result {
        if self.closing.load(Relaxed) {
            return Err(EBUSY);
        }
        Ok(())
    }
}

/// The memory of a bio, taken in pieces: the border of a block can be in a segment, and that of a
/// segment in a block.
struct Pieces<'a> {
    segments: Segments<'a>,
    rest: Option<VolatileSlice<'a>>,
}

impl<'a> Pieces<'a> {
    #[inline]
    fn new(bio: &'a Bio) -> Self {
        Pieces {
            segments: bio.segments(),
            rest: None,
        }
    }

    /// The next piece, of at most `most` bytes, and at least one if there are any.
    #[inline]
    fn next(&mut self, most: u64) -> Option<VolatileSlice<'a>> {
        if most == 0 {
            return None;
        }
        let segment = self.rest.take().or_else(|| self.segments.next())?;
        let (piece, rest) = segment.split_at(segment.len().min(most as usize))?;
        self.rest = (!rest.is_empty()).then_some(rest);
        Some(piece)
    }
}
