// SPDX-License-Identifier: GPL-2.0-only

//! I/O memory: bios of a device whose memory is behind a bus.
//!
//! What is stored is posted: it is on its way when a write bio completes, and the bus keeps it in order.
//! PREFLUSH and FUA wait until it has got there, by a load from the device. So the disk has a write
//! cache, and what a flush does is the same whether the memory keeps its contents without power or not:
//! other devices, which read it themselves, then find what was written, too.
//!
//! A device that is gone answers with all ones, and nobody says that it does. So when that is what is
//! read last, it is asked for in another way.

use super::PmemDevice;
use crate::{
    kapi::{
        bio::{
            self,
            Bio,
            Status, //
        },
        mapping::Mapping, //
    },
    pmem_core::persist::{
        words::{
            Answer,
            Words, //
        },
        VolatileSlice,
        GRANULE, //
    }, //
};
use kernel::{
    macros::kunit_tests,
    prelude::*,
    sync::Arc, //
};

/// The way to the device that has the memory. What it does must not sleep.
pub(crate) trait Link: Send + Sync {
    /// Whether it is known that there is no device any more. Cheap.
    fn is_down(&self) -> bool;

    /// Asks whether there is a device.
    fn answers(&self) -> bool;
}

/// What a device with I/O memory needs besides the memory.
pub(crate) struct Io {
    /// How it is accessed.
    pub(crate) words: Words,
    /// Whether it is there.
    pub(crate) link: Arc<dyn Link>,
    /// Whether it keeps its contents without power, as the administrator says.
    pub(crate) persistent: bool,
    /// Whether it is to have struct pages, and so DAX.
    pub(crate) pages: bool,
}

impl Io {
    /// What is said of a write's durability.
    pub(super) fn durability(&self) -> &'static str {
        if self.persistent {
            "durable after a flush"
        } else {
            "volatile"
        }
    }

    /// Fails if an answer, or that there is none, shows that the device is gone.
    #[inline]
    fn check(&self, answer: Option<Answer>) -> Result<(), Status> {
        match answer {
            Some(Answer::Device) => Ok(()),
            Some(Answer::AllOnes) if self.link.answers() => Ok(()),
            _ => Err(Status::IOERR),
        }
    }

    /// Waits until the device has what this CPU wrote before, and what others did whose write is done.
    pub(super) fn drain(&self, mapping: &Mapping) -> Result<(), Status> {
        if self.link.is_down() {
            return Err(Status::IOERR);
        }
        let window = mapping.slice(0, GRANULE as u64).ok_or(Status::IOERR)?;
        self.check(self.words.drain(window, 0))
    }

    fn read(&self, window: VolatileSlice<'_>, bio: &Bio) -> Result<(), Status> {
        let mut offset: u64 = 0;
        let mut answer = Some(Answer::Device);
        for segment in bio.segments() {
            answer = self.words.read(window, offset, segment);
            if answer.is_none() {
                break;
            }
            offset = offset.wrapping_add(segment.len() as u64);
        }
        self.check(answer)
    }

    fn write(&self, window: VolatileSlice<'_>, bio: &Bio) -> Result<(), Status> {
        let mut offset: u64 = 0;
        for segment in bio.segments() {
            if !self.words.write(window, offset, segment) {
                return Err(Status::IOERR);
            }
            offset = offset.wrapping_add(segment.len() as u64);
        }
        self.words.fence();
        Ok(())
    }

    /// Zeroes `window`, whole granules.
    pub(super) fn zero(&self, window: VolatileSlice<'_>) -> Result<(), Status> {
        let zeroed = self.words.zero(window, 0, window.len() as u64);
        self.words.fence();
        if zeroed {
            Ok(())
        } else {
            Err(Status::IOERR)
        }
    }
}

impl PmemDevice {
    /// Serves `bio`, which is for I/O memory.
    pub(super) fn serve_io(&self, io: &Io, bio: &Bio) -> Result<(), Status> {
        if io.link.is_down() {
            return Err(Status::IOERR);
        }
        if bio.is_preflush() {
            self.counters.count_flush();
            io.drain(&self.mapping)?;
        }
        match bio.op() {
            bio::Op::Read => {
                let window = self.window(bio)?;
                self.counters.count_read(bio.size());
                if self.media.is_suspect() {
                    self.before_read(bio)?;
                }
                io.read(window, bio)
            }
            // A flush alone, which is done.
            bio::Op::Write if bio.size() == 0 => Ok(()),
            op @ (bio::Op::Write | bio::Op::WriteZeroes) => {
                let window = self.window(bio)?;
                let write = || match op {
                    bio::Op::WriteZeroes => {
                        self.counters.count_write_zeroes();
                        io.zero(window)
                    }
                    _ => {
                        self.counters.count_write(bio.size());
                        io.write(window, bio)
                    }
                };
                if self.media.is_suspect() {
                    self.repair(self.extent(bio)?, !bio.is_nowait(), |_| write())?;
                } else {
                    write()?;
                }
                if bio.is_fua() {
                    io.drain(&self.mapping)?;
                }
                Ok(())
            }
            bio::Op::Flush => {
                self.counters.count_flush();
                io.drain(&self.mapping)
            }
            bio::Op::Discard | bio::Op::Other(_) => Err(Status::NOTSUPP),
        }
    }
}

/// The range of [`tests`](super::tests), as if it were memory of a device.
#[kunit_tests(pmem_io)]
mod tests {
    use super::{
        super::{
            tests::{
                pattern,
                region,
                SIZE, //
            },
            Options, //
        },
        *, //
    };
    use crate::{
        kapi::{
            disk::Disk,
            kunit::{
                self,
                buffer, //
            },
            numa::Node, //
        },
        pmem_core::{
            extent::Sector,
            persist::{
                Cache,
                CopyPolicy,
                CpuFeatures,
                Persist, //
            },
            range::PhysRange, //
        }, //
    };
    use core::sync::atomic::{
        AtomicBool,
        AtomicU32,
        Ordering, //
    };

    /// A device that can be taken away.
    struct Slot {
        known: AtomicBool,
        there: AtomicBool,
        asked: AtomicU32,
    }

    impl Link for Slot {
        fn is_down(&self) -> bool {
            self.known.load(Ordering::Relaxed)
        }

        fn answers(&self) -> bool {
            self.asked.fetch_add(1, Ordering::Relaxed);
            self.there.load(Ordering::Relaxed)
        }
    }

    /// Calls `check` with a disk for each mode, with struct pages and without.
    fn with_disks(check: impl Fn(&Disk<PmemDevice>, &Slot) -> Result) -> Result {
        for cache in [Cache::WriteCombining, Cache::Uncached, Cache::WriteBack] {
            for pages in [true, false] {
                let Some(region) = region()? else {
                    return Ok(());
                };
                let range = PhysRange::new(region.start(), SIZE).map_err(|_| EINVAL)?;
                let cpu = CpuFeatures::default();
                let slot = Slot {
                    known: AtomicBool::new(false),
                    there: AtomicBool::new(true),
                    asked: AtomicU32::new(0),
                };
                let slot = Arc::new(slot, GFP_KERNEL)?;
                let io = Io {
                    words: Words::new(cpu),
                    link: slot.clone(),
                    persistent: false,
                    pages,
                };
                let options = Options {
                    logical_block_size: 512,
                    cache,
                    provider: "kunit",
                };
                let persist = Persist::for_cache(cpu, cache, CopyPolicy::Auto);
                let name = fmt!("pmem_kunit");
                let disk = PmemDevice::prepare_io(
                    name,
                    region,
                    range,
                    Node::of_phys(range.start()),
                    persist,
                    options,
                    io,
                )?;
                let disk = disk.add()?;
                assert_eq!(disk.data().mapping.has_pages(), pages);
                check(&disk, &slot)?;
                drop(disk);
                kunit::close_files();
            }
        }
        Ok(())
    }

    #[test]
    fn reads_what_was_written_and_no_more() -> Result {
        with_disks(|disk, _| {
            for (sector, len) in [(0, 512), (1, 1024), (7, 4096), (13, 65536), (16383, 512)] {
                let around = Sector(sector & !7);
                disk.submit_wait_range(kunit::WRITE_ZEROES, around, 4096)?;
                disk.submit_wait(kunit::WRITE, Sector(sector), &mut pattern(len)?)?;
                let mut data = buffer(0xa5, len)?;
                disk.submit_wait(kunit::READ, Sector(sector), &mut data)?;
                assert!(*data == *pattern(len)?);

                let mut page = buffer(0xa5, 4096)?;
                disk.submit_wait(kunit::WRITE, Sector(sector), &mut buffer(0xff, 512)?)?;
                disk.submit_wait(kunit::READ, around, &mut page)?;
                let first = (sector - around.0) as usize * 512;
                assert!(page.iter().take(first).all(|&byte| byte == 0));
                let own = page.iter().skip(first).take(512);
                assert!(own.clone().count() == 512 && own.into_iter().all(|&byte| byte == 0xff));
            }
            Ok(())
        })
    }

    /// Two parts may meet in one granule.
    #[test]
    fn parts_of_any_length_follow_each_other() -> Result {
        with_disks(|disk, _| {
            let written = pattern(512)?;
            for lengths in [
                [1, 2, 3, 506],
                [7, 8, 9, 488],
                [500, 4, 4, 4],
                [3, 1, 1, 507],
            ] {
                for opf in [kunit::WRITE, kunit::READ] {
                    disk.submit_wait(kunit::WRITE, Sector(8), &mut buffer(0xee, 1536)?)?;
                    if opf == kunit::READ {
                        disk.submit_wait(kunit::WRITE, Sector(9), &mut pattern(512)?)?;
                    }
                    let mut rest = pattern(512)?;
                    if opf == kunit::READ {
                        rest.iter_mut().for_each(|byte| *byte = 0);
                    }
                    let mut parts = KVec::new();
                    let mut left = &mut rest[..];
                    for length in lengths {
                        let (part, others) = left.split_at_mut_checked(length).ok_or(EINVAL)?;
                        parts.push(part, GFP_KERNEL)?;
                        left = others;
                    }
                    disk.submit_wait_parts(opf, Sector(9), &mut parts)?;
                    drop(parts);
                    assert!(*rest == *written);
                    let mut back = buffer(0, 1536)?;
                    disk.submit_wait(kunit::READ, Sector(8), &mut back)?;
                    assert!(back.iter().skip(512).take(512).eq(written.iter()));
                    assert!(back.iter().take(512).all(|&byte| byte == 0xee));
                    assert!(back.iter().skip(1024).all(|&byte| byte == 0xee));
                }
            }
            Ok(())
        })
    }

    /// A device that nobody knows to be gone is asked for when all that it says is ones.
    #[test]
    fn a_device_that_is_gone_fails_reads_and_flushes() -> Result {
        with_disks(|disk, slot| {
            let flush = kunit::WRITE | kunit::PREFLUSH;
            let fua = kunit::WRITE | kunit::FUA;
            let asked = || slot.asked.swap(0, Ordering::Relaxed);
            disk.submit_wait(kunit::WRITE, Sector(0), &mut buffer(0xff, 4096)?)?;
            asked();

            for there in [true, false] {
                slot.there.store(there, Ordering::Relaxed);
                let expected = if there { Ok(()) } else { Err(EIO) };
                let mut data = buffer(0, 512)?;
                assert_eq!(
                    disk.submit_wait(kunit::READ, Sector(1), &mut data),
                    expected
                );
                assert_eq!(asked(), 1);
                assert_eq!(disk.submit_wait(flush, Sector(0), &mut []), expected);
                assert_eq!(asked(), 1);
                assert_eq!(disk.submit_wait(fua, Sector(64), &mut data), expected);
                assert_eq!(asked(), 1);
                // Nobody waits for these.
                disk.submit_wait(kunit::WRITE, Sector(64), &mut data)?;
                assert_eq!(asked(), 0);
            }

            // Whoever answers with something else is there.
            disk.submit_wait(kunit::WRITE, Sector(0), &mut buffer(0, 512)?)?;
            disk.submit_wait(flush, Sector(0), &mut [])?;
            disk.submit_wait(kunit::READ, Sector(0), &mut buffer(0, 512)?)?;
            assert_eq!(asked(), 0);

            // When it is known, nothing is tried.
            slot.known.store(true, Ordering::Relaxed);
            for opf in [kunit::READ, kunit::WRITE, fua] {
                let mut data = buffer(0, 512)?;
                assert_eq!(disk.submit_wait(opf, Sector(0), &mut data), Err(EIO));
            }
            assert_eq!(disk.submit_wait(flush, Sector(0), &mut []), Err(EIO));
            assert_eq!(asked(), 0);
            Ok(())
        })
    }

    #[test]
    fn dax_zeroes_all_the_pages() -> Result {
        use crate::kapi::dax::Operations;

        with_disks(|disk, _| {
            let mut data = buffer(0xff, 3 * 4096)?;
            disk.submit_wait(kunit::WRITE, Sector(0), &mut data)?;
            disk.data().zero_page_range(1, 1)?;
            disk.submit_wait(kunit::READ, Sector(0), &mut data)?;
            assert!(data
                .iter()
                .enumerate()
                .all(|(i, &byte)| (byte == 0) == (4096..8192).contains(&i)));
            Ok(())
        })
    }
}
