// SPDX-License-Identifier: GPL-2.0-only

//! Devices whose host is the test: what hosts can do, and QEMU does not.

/// Devices whose host is the test, in the range that the tests of [`device`](crate::device) have, too.
#[kernel::macros::kunit_tests(pmem_virtio)]
mod suite {
    use super::super::*;
    use crate::{
        device::tests::{
            start,
            SIZE, //
        },
        kapi::{
            compat::EPROTO,
            kunit::{
                self,
                block::{
                    self,
                    BlockDevice,
                    Submitted, //
                },
                buffer,
                virtio::{
                    status,
                    Request,
                    Setup,
                    Simulated,
                    VERSION_1,
                    WAYS, //
                }, //
            }, //
        },
        pmem_core::extent::Sector, //
    };
    use kernel::time::{
        delay::fsleep,
        Delta,
        Instant,
        Monotonic, //
    };

    /// The name of the driver.
    const NAME: &CStr = c"pmem";
    /// What the host answers when it is done.
    const DONE: [u8; 4] = [0; 4];
    /// A flush, and no more.
    const ONLY: u32 = kunit::WRITE | kunit::PREFLUSH;

    /// A device that is a disk. The disk is closed before the device goes.
    struct Served {
        disk: BlockDevice,
        device: Simulated,
        name: CString,
    }

    /// The name that the next disk gets.
    fn next_name() -> Result<CString> {
        let mut number = 0;
        loop {
            let name = CString::try_from_fmt(fmt!("pmem{}", number))?;
            if !block::exists(&name)? {
                return Ok(name);
            }
            number += 1;
        }
    }

    fn setup(start: u64, size: u64) -> Setup {
        Setup {
            device: ID,
            config: Some([start, size]),
            ..Setup::default()
        }
    }

    impl Served {
        fn with(setup: Setup) -> Result<Self> {
            let name = next_name()?;
            let device = Simulated::new(setup)?;
            let disk = BlockDevice::open(&name)?;
            Ok(Served { disk, device, name })
        }

        /// A device in the range of the tests, unless there is none, or no driver.
        fn new() -> Result<Option<Self>> {
            let Some(start) = usable()? else {
                return Ok(None);
            };
            Self::with(setup(start, SIZE)).map(Some)
        }

        fn flush(&self) -> Result<Submitted> {
            self.disk.submit(ONLY, Sector(0), buffer(0, 0)?)
        }

        /// What the host is asked now. It must not be asked anything but to flush, nor twice.
        fn asked(&self) -> Result<Option<Request>> {
            let Some(request) = self.device.request()? else {
                return Ok(None);
            };
            if request.bytes[..] != FLUSH || request.room != 4 || self.device.request()?.is_some() {
                return Err(EPROTO);
            }
            Ok(Some(request))
        }

        /// The same when the host is asked soon.
        fn is_asked(&self) -> Result<Request> {
            for _ in 0..1000 {
                if let Some(request) = self.asked()? {
                    return Ok(request);
                }
                fsleep(Delta::from_millis(10));
            }
            Err(ETIMEDOUT)
        }

        /// Answers that all is durable.
        fn done(&self, request: &Request) -> Result {
            self.device.answer(request, &DONE, 4)
        }

        fn write(&self, byte: u8) -> Result {
            let data = buffer(byte, 4096)?;
            self.disk.submit_wait(kunit::WRITE, Sector(8), data)?;
            Ok(())
        }

        /// The first byte that [`Served::write`] writes.
        fn read(&self) -> Result<u8> {
            let data = self
                .disk
                .submit_wait(kunit::READ, Sector(8), buffer(0xee, 4096)?)?;
            data.first().copied().ok_or(EINVAL)
        }

        /// Whether a flush is asked for, and is done when the host says so.
        fn works(&self) -> Result<bool> {
            let flush = self.flush()?;
            let request = self.is_asked()?;
            let early = flush.ended().is_some();
            self.done(&request)?;
            Ok(!early && flush.wait() == Some(Ok(())) && self.asked()?.is_none())
        }

        /// Whether a flush fails at once.
        fn fails(&self) -> Result<bool> {
            Ok(self.flush()?.ended() == Some(Err(EIO)) && self.asked()?.is_none())
        }

        /// The device goes as `go` says, and the disk with it. Whether nothing is left of it.
        fn end(self, go: impl FnOnce(Simulated)) -> Result<bool> {
            let Served { disk, device, name } = self;
            let host = device.host();
            let setup = host.setup();
            let is_shared = host.features() & (1 << F_SHMEM_REGION) != 0;
            go(device);
            let is_gone = !block::exists(&name)? && !host.has_queue();
            drop(disk);
            let [start, size] = setup.config.unwrap_or_default();
            let config = Some((start, size)).filter(|_| !is_shared);
            let (start, size) = config.or(setup.shared_memory).ok_or(EINVAL)?;
            Ok(is_gone && host.is_released() && is_free(start, size))
        }
    }

    /// The first byte of the range of the tests, unless there is none, or no driver.
    fn usable() -> Result<Option<u64>> {
        // A device that cannot be served shows whether there is a driver.
        let device = Simulated::new(Setup {
            device: ID,
            ..Setup::default()
        })?;
        if device.bind(NAME) == Err(ENOENT) {
            kunit::skip();
            return Ok(None);
        }
        start()
    }

    /// Whether nobody claims the range.
    fn is_free(start: u64, size: u64) -> bool {
        Region::new(start, size, c"pmem_kunit").is_ok()
    }

    /// Some flushes, of which the host is asked for the first, and those which wait for the next.
    fn several(served: &Served) -> Result<(Request, Submitted, KVec<Submitted>)> {
        let first = served.flush()?;
        let request = served.is_asked()?;
        let mut others = KVec::new();
        for i in 0..5 {
            let flush = match i {
                0 => served.disk.submit(ONLY, Sector(16), buffer(0x11, 4096)?)?,
                1 => served.disk.submit(
                    kunit::WRITE | kunit::FUA,
                    Sector(24),
                    buffer(0x22, 4096)?,
                )?,
                _ => served.flush()?,
            };
            others.push(flush, GFP_KERNEL)?;
        }
        Ok((request, first, others))
    }

    /// Whether all have ended so, each once.
    fn all_end(flushes: &[Submitted], result: Result) -> bool {
        flushes.iter().all(|flush| flush.wait() == Some(result))
    }

    fn none_has_ended(flushes: &[Submitted]) -> bool {
        flushes.iter().all(|flush| flush.ended().is_none())
    }

    #[test]
    fn a_device_becomes_a_disk() -> Result {
        let Some(start) = usable()? else {
            return Ok(());
        };
        let region = 1 << F_SHMEM_REGION;
        let config = Some([start, SIZE]);
        let shared_memory = Some((start, SIZE));
        let setups = [
            (0, config, None, 0),
            (0, config, Some((1 << 60, 4096)), 0),
            (region, None, shared_memory, region),
            (region, Some([1, 1]), shared_memory, region),
            (region, config, None, 0),
        ];
        for (features, config, shared_memory, taken) in setups {
            let served = Served::with(Setup {
                device: ID,
                features,
                config,
                shared_memory,
            })?;
            assert_eq!(served.device.status(), status::IN_USE);
            assert_eq!(served.device.features(), taken | VERSION_1);
            assert_eq!(served.disk.sectors().0, Sector::containing(SIZE).0);
            // DAX without MAP_SYNC.
            assert_eq!(served.disk.dax(), Some(false));
            assert!(!is_free(start, SIZE));
            for byte in [0x5a, 0xa5] {
                served.write(byte)?;
                assert_eq!(served.read()?, byte);
            }
            assert!(served.asked()?.is_none());
            assert!(served.works()?);
            assert!(served.end(drop)?);
            assert!(is_free(start, SIZE));
        }
        Ok(())
    }

    #[test]
    fn a_disk_comes_back_with_its_data() -> Result {
        let Some(served) = Served::new()? else {
            return Ok(());
        };
        served.write(0x77)?;
        assert_eq!(served.device.bind(NAME), Err(EBUSY));
        let Served { disk, device, name } = served;
        drop(disk);
        device.unbind();
        assert!(!block::exists(&name)?);
        device.bind(NAME)?;
        let disk = BlockDevice::open(&name)?;
        let served = Served { disk, device, name };
        assert_eq!(served.read()?, 0x77);
        assert!(served.works()?);

        // Who has it open does not keep the device.
        served.device.unbind();
        assert_eq!(served.read(), Err(EIO));
        assert_eq!(served.flush()?.wait(), Some(Err(EIO)));
        assert!(served.end(drop)?);
        Ok(())
    }

    #[test]
    fn a_range_that_cannot_be_served_is_refused() -> Result {
        const MIB: u64 = 1 << 20;

        let Some(start) = usable()? else {
            return Ok(());
        };
        let name = next_name()?;
        let ranges = [
            (start, 0, EINVAL),
            (0, 0, EINVAL),
            (start + 4096, 2 * MIB, EINVAL),
            (start, 2 * MIB + 4096, EINVAL),
            (start, 4096, EINVAL),
            (start + 1, SIZE, EINVAL),
            (u64::MAX - 2 * MIB + 1, 4 * MIB, EINVAL),
            (start, u64::MAX, EINVAL),
            (16 * MIB, 2 * MIB, EBUSY),
            (0, start + 2 * MIB, EBUSY),
            (1 << 60, 2 * MIB, ENXIO),
            (start, 1 << 60, ENXIO),
        ];
        for (start, size, error) in ranges {
            let region = 1 << F_SHMEM_REGION;
            for setup in [
                setup(start, size),
                Setup {
                    device: ID,
                    features: region,
                    config: None,
                    shared_memory: Some((start, size)),
                },
            ] {
                let device = Simulated::new(setup)?;
                assert!(!device.is_bound() && !device.has_queue());
                assert_eq!(device.bind(NAME), Err(error));
                assert!(device.status() & status::FAILED != 0);
                assert!(!device.has_queue() && !block::exists(&name)?);
                let host = device.host();
                drop(device);
                assert!(host.is_released());
            }
        }

        // There is nothing that would say where it is.
        let nowhere = Setup {
            device: ID,
            ..Setup::default()
        };
        assert_eq!(Simulated::new(nowhere)?.bind(NAME), Err(ENODEV));
        let region = Setup {
            features: 1 << F_SHMEM_REGION,
            ..nowhere
        };
        assert_eq!(Simulated::new(region)?.bind(NAME), Err(ENODEV));
        assert!(is_free(start, SIZE));
        Ok(())
    }

    #[test]
    fn a_range_is_one_disk() -> Result {
        let Some(served) = Served::new()? else {
            return Ok(());
        };
        let [start, size] = served.device.setup().config.unwrap_or_default();
        for (skip, size) in [(0, size), (0, size / 2), (size / 2, size / 2)] {
            let other = Simulated::new(setup(start + skip, size))?;
            assert!(!other.is_bound());
            assert_eq!(other.bind(NAME), Err(EBUSY));
        }
        assert!(served.works()?);
        assert!(served.end(drop)?);

        // Two halves are two disks.
        let one = Served::with(setup(start, size / 2))?;
        let other = Served::with(setup(start + size / 2, size / 2))?;
        one.write(1)?;
        other.write(2)?;
        assert_eq!(one.read()?, 1);
        let flush = one.flush()?;
        assert!(other.asked()?.is_none());
        assert!(other.works()?);
        assert!(flush.ended().is_none());
        one.done(&one.is_asked()?)?;
        assert_eq!(flush.wait(), Some(Ok(())));
        assert!(one.end(drop)?);
        assert!(other.works()?);
        assert!(other.end(drop)?);
        Ok(())
    }

    #[test]
    fn what_fails_leaves_no_claim() -> Result {
        let Some(start) = usable()? else {
            return Ok(());
        };
        let device = Simulated::with(setup(start, SIZE), |host| host.refuse_features(true))?;
        assert_eq!(device.bind(NAME), Err(ENODEV));
        device.refuse_features(false);
        device.refuse_queue(Some(ENOMEM));
        assert_eq!(device.bind(NAME), Err(ENOMEM));
        device.refuse_queue(None);
        assert!(is_free(start, SIZE));

        let name = next_name()?;
        device.bind(NAME)?;
        let disk = BlockDevice::open(&name)?;
        let served = Served { disk, device, name };
        assert!(served.works()?);
        assert!(served.end(drop)?);
        Ok(())
    }

    #[test]
    fn a_preflush_comes_before_the_data_and_fua_after() -> Result {
        let Some(served) = Served::new()? else {
            return Ok(());
        };
        served.write(1)?;
        let submit = |flags, byte| {
            served
                .disk
                .submit(kunit::WRITE | flags, Sector(8), buffer(byte, 4096)?)
        };

        let bio = submit(kunit::PREFLUSH, 2)?;
        let request = served.is_asked()?;
        fsleep(Delta::from_millis(50));
        assert_eq!(served.read()?, 1);
        assert!(bio.ended().is_none());
        served.done(&request)?;
        assert_eq!(bio.wait(), Some(Ok(())));
        assert_eq!(served.read()?, 2);
        assert!(served.asked()?.is_none());

        let bio = submit(kunit::FUA, 3)?;
        let request = served.is_asked()?;
        assert_eq!(served.read()?, 3);
        assert!(bio.ended().is_none());
        served.done(&request)?;
        assert_eq!(bio.wait(), Some(Ok(())));
        assert!(served.asked()?.is_none());

        let bio = submit(kunit::PREFLUSH | kunit::FUA, 4)?;
        let request = served.is_asked()?;
        fsleep(Delta::from_millis(50));
        assert_eq!(served.read()?, 3);
        served.done(&request)?;
        let request = served.is_asked()?;
        assert_eq!(served.read()?, 4);
        assert!(bio.ended().is_none());
        served.done(&request)?;
        assert_eq!(bio.wait(), Some(Ok(())));

        // What is not to be flushed is not written.
        let bio = submit(kunit::PREFLUSH, 5)?;
        let request = served.is_asked()?;
        served.device.answer(&request, &[1, 0, 0, 0], 4)?;
        assert_eq!(bio.wait(), Some(Err(EIO)));
        assert_eq!(served.read()?, 4);
        // And what is written is not said to be durable.
        let bio = submit(kunit::FUA, 6)?;
        let request = served.is_asked()?;
        served.device.answer(&request, &[1, 0, 0, 0], 4)?;
        assert_eq!(bio.wait(), Some(Err(EIO)));

        // Beyond the end of the disk there is nothing to flush for.
        let end = Sector(Sector::containing(SIZE).0);
        let bio = served
            .disk
            .submit(kunit::WRITE | kunit::FUA, end, buffer(0, 4096)?)?;
        assert_eq!(bio.wait(), Some(Err(EIO)));
        assert!(served.works()?);
        assert!(served.end(drop)?);
        Ok(())
    }

    #[test]
    fn flushes_that_arrive_meanwhile_share_the_next() -> Result {
        let Some(served) = Served::new()? else {
            return Ok(());
        };
        for _ in 0..3 {
            let (request, first, others) = several(&served)?;
            assert!(served.asked()?.is_none());
            assert!(first.ended().is_none() && none_has_ended(&others));
            served.done(&request)?;
            assert_eq!(first.wait(), Some(Ok(())));
            let request = served.is_asked()?;
            assert!(none_has_ended(&others));
            served.done(&request)?;
            assert!(all_end(&others, Ok(())));
            assert!(served.asked()?.is_none());
        }
        assert!(served.end(drop)?);
        Ok(())
    }

    #[test]
    fn an_answer_that_is_not_done_fails_those_that_it_is_for() -> Result {
        let Some(served) = Served::new()? else {
            return Ok(());
        };
        let answers: [(&[u8], u32); 7] = [
            (&[1, 0, 0, 0], 4),
            (&[0xff, 0xff, 0xff, 0x7f], 4),
            (&[0, 0, 0, 1], 4),
            (&DONE, 0),
            (&DONE, 1),
            (&DONE, 3),
            (&[], 0),
        ];
        for (answer, len) in answers {
            let (request, first, others) = several(&served)?;
            served.device.answer(&request, answer, len)?;
            assert_eq!(first.wait(), Some(Err(EIO)));
            let request = served.is_asked()?;
            assert!(none_has_ended(&others));
            served.done(&request)?;
            assert!(all_end(&others, Ok(())));

            let (request, first, others) = several(&served)?;
            served.done(&request)?;
            assert_eq!(first.wait(), Some(Ok(())));
            served.device.answer(&served.is_asked()?, answer, len)?;
            assert!(all_end(&others, Err(EIO)));
        }
        // More than there is room for is all of it.
        let flush = served.flush()?;
        served
            .device
            .answer(&served.is_asked()?, &[0; 100], u32::MAX)?;
        assert_eq!(flush.wait(), Some(Ok(())));
        assert!(served.works()?);
        assert!(served.end(drop)?);
        Ok(())
    }

    /// How a device fails while it has a request.
    type Failure = fn(&Served, &Request) -> Result;

    const FAILURES: &[Failure] = &[
        // It gives the answer to another request: what it has written is elsewhere.
        |served, request| served.device.answer(request, &[], 4),
        // It says so.
        |served, _| {
            served.device.need_reset();
            Ok(())
        },
        // It answers what it was not asked, or no longer.
        |served, _| served.device.pretend(17, 4),
        |served, request| served.device.pretend(u32::from(request.id) + 1, 4),
    ];

    #[test]
    fn a_device_that_fails_fails_all_that_wait_once() -> Result {
        let Some(served) = Served::new()? else {
            return Ok(());
        };
        served.write(9)?;
        for fail in FAILURES {
            let (request, first, others) = several(&served)?;
            fail(&served, &request)?;
            assert_eq!(first.wait(), Some(Err(EIO)));
            assert!(all_end(&others, Err(EIO)));
            assert!(served.fails()?);
            // Data can be read and written; that it is durable cannot be said.
            served.write(10)?;
            assert_eq!(served.read()?, 10);
            // Whatever comes later is for nobody.
            let _ = served.done(&request);
            let _ = served.device.interrupt();
            served.device.change_config();
            assert!(served.fails()?);
            assert_eq!(first.ended(), Some(Err(EIO)));
            assert!(all_end(&others, Err(EIO)));

            // A reset makes it good.
            served.device.reset_prepare()?;
            served.device.reset_done()?;
            assert!(served.works()?);
        }
        assert!(served.end(drop)?);
        Ok(())
    }

    /// Nobody waits when it breaks: who comes next finds out.
    #[test]
    fn a_queue_that_breaks_is_good_after_a_reset() -> Result {
        let Some(served) = Served::new()? else {
            return Ok(());
        };
        let failures: [fn(&Simulated) -> Result; 3] = [
            |device| {
                device.break_queue();
                Ok(())
            },
            |device| {
                device.be_deaf(true);
                Ok(())
            },
            |device| device.pretend(0, 4),
        ];
        for fail in failures {
            fail(&served.device)?;
            assert!(served.fails()?);
            assert!(served.fails()?);
            served.device.be_deaf(false);
            served.device.reset_prepare()?;
            served.device.reset_done()?;
            assert!(served.works()?);
        }
        assert!(served.end(drop)?);
        Ok(())
    }

    #[test]
    fn what_waits_is_sent_again_after_a_reset() -> Result {
        let Some(served) = Served::new()? else {
            return Ok(());
        };
        for &(prepare, done) in WAYS {
            for is_late in [false, true] {
                let (_, first, others) = several(&served)?;
                served.device.be_late(is_late);
                prepare(&served.device)?;
                served.device.be_late(false);
                let meanwhile = served.flush()?;
                fsleep(Delta::from_millis(50));
                assert!(first.ended().is_none() && none_has_ended(&others));
                assert!(meanwhile.ended().is_none());
                done(&served.device)?;
                // One request is enough for all of them.
                let request = served.is_asked()?;
                assert!(first.ended().is_none() && none_has_ended(&others));
                served.done(&request)?;
                assert_eq!(first.wait(), Some(Ok(())));
                assert_eq!(meanwhile.wait(), Some(Ok(())));
                assert!(all_end(&others, Ok(())));
                assert!(served.asked()?.is_none());

                // Nobody waits.
                prepare(&served.device)?;
                done(&served.device)?;
                assert!(served.asked()?.is_none());
                assert!(served.works()?);
            }
        }
        assert!(served.end(drop)?);
        Ok(())
    }

    #[test]
    fn a_device_that_does_not_come_back_fails_all_that_wait() -> Result {
        let Some(served) = Served::new()? else {
            return Ok(());
        };
        for &(prepare, done) in WAYS {
            let (_, first, others) = several(&served)?;
            prepare(&served.device)?;
            served.device.refuse_queue(Some(ENOMEM));
            assert_eq!(done(&served.device), Err(ENOMEM));
            assert_eq!(first.wait(), Some(Err(EIO)));
            assert!(all_end(&others, Err(EIO)));
            assert!(served.fails()?);

            prepare(&served.device)?;
            served.device.refuse_queue(None);
            done(&served.device)?;
            assert!(served.works()?);
        }
        assert!(served.end(drop)?);
        Ok(())
    }

    #[test]
    fn a_device_that_vanishes_fails_all_that_wait() -> Result {
        let Some(served) = Served::new()? else {
            return Ok(());
        };
        let [start, size] = served.device.setup().config.unwrap_or_default();
        let (_, first, others) = several(&served)?;
        assert!(served.end(Simulated::vanish)?);
        assert_eq!(first.ended(), Some(Err(EIO)));
        assert!(all_end(&others, Err(EIO)));

        // While it is being reset, there is nobody to wait for.
        let ways: [fn(Simulated); 2] = [drop, Simulated::vanish];
        for go in ways {
            let served = Served::with(setup(start, size))?;
            let (_, first, others) = several(&served)?;
            served.device.reset_prepare()?;
            let before = Instant::<Monotonic>::now();
            assert!(served.end(go)?);
            assert!(before.elapsed().as_millis() < i64::from(PATIENCE_MS));
            assert_eq!(first.ended(), Some(Err(EIO)));
            assert!(all_end(&others, Err(EIO)));
        }
        Ok(())
    }

    #[test]
    fn a_device_goes_when_the_host_has_answered() -> Result {
        let Some(served) = Served::new()? else {
            return Ok(());
        };
        let (request, first, others) = several(&served)?;
        let host = served.device.host();
        // It waits for what it was given when it is dropped.
        let other = ReclaimQueue::new(c"pmem_kunit")?;
        other.try_spawn(GFP_KERNEL, move || {
            fsleep(Delta::from_millis(200));
            // If it is not answered, the test fails, as the bios do.
            let _ = host.answer(&request, &DONE, 4);
            for _ in 0..100 {
                fsleep(Delta::from_millis(10));
                if let Ok(Some(request)) = host.request() {
                    let _ = host.answer(&request, &DONE, 4);
                }
            }
        })?;
        assert!(served.end(drop)?);
        assert_eq!(first.ended(), Some(Ok(())));
        assert!(all_end(&others, Ok(())));
        Ok(())
    }

    /// Takes as long as a host may take.
    #[test]
    fn a_device_goes_when_the_host_does_not_answer() -> Result {
        let Some(served) = Served::new()? else {
            return Ok(());
        };
        let (_, first, others) = several(&served)?;
        assert!(served.end(drop)?);
        assert_eq!(first.ended(), Some(Err(EIO)));
        assert!(all_end(&others, Err(EIO)));
        Ok(())
    }
}
