// SPDX-License-Identifier: GPL-2.0-only

//! virtio-pmem devices: ranges of a host's memory, in guests. The host makes them durable when it is
//! asked to.
//!
//! | what | where |
//! |---|---|
//! | first byte, length | bytes 0 and 8 of the configuration space, little-endian numbers of 64 bits; or shared memory region 0, with the feature bit 0 |
//! | a request to make all durable | little-endian 0, of 32 bits |
//! | its answer | little-endian number of 32 bits: 0 when it is done |
//!
//! Devices come and go at any time, so that disks of them take the first numbers that are free.
//!
//! Documents: the virtio specification, PMEM device;
//! [`include/uapi/linux/virtio_pmem.h`](srctree/include/uapi/linux/virtio_pmem.h)

#[cfg(CONFIG_KUNIT = "y")]
mod tests;

use crate::{
    device::{
        Directory,
        Host,
        Options,
        PmemDevice, //
    },
    kapi::{
        compat::{
            id_array,
            new_spinlock_irq,
            SpinLockIrq, //
        },
        debugfs::Dir,
        disk::{
            self,
            Disk, //
        },
        param::string_params,
        region::Region,
        virtio::{
            self,
            Buffer,
            Device,
            DeviceId,
            IdTable,
            Queue,
            Unsent, //
        },
        workqueue::ReclaimQueue, //
    },
    pmem_core::{
        memmap::{
            Config,
            StructPages, //
        },
        persist::{
            Cache,
            CpuFeatures,
            Persist, //
        },
        range::{
            PhysRange,
            DISK_ALIGN, //
        },
        size::Size, //
    },
    reserve::Place, //
};
use kernel::{
    impl_has_work,
    new_condvar,
    new_mutex,
    new_work,
    prelude::*,
    str::CString,
    sync::{
        Arc,
        ArcBorrow,
        CondVar,
        CondVarTimeoutResult,
        Mutex,
        SetOnce, //
    },
    time::msecs_to_jiffies,
    workqueue::{
        Work,
        WorkItem, //
    }, //
};

string_params! {
    "pmem";

    PMEM_VIRTIO: "pmem_virtio" = c"1",
        "Make a disk of each virtio-pmem device that no other driver has: 0 or 1. Default: 1";
}

/// The device type, `VIRTIO_ID_PMEM`.
const ID: u32 = 27;

/// The range is shared memory region 0.
const F_SHMEM_REGION: u32 = 0;

/// That shared memory region.
const REGION: u8 = 0;

/// Where the configuration space has the range.
const START: u32 = 0;
const SIZE: u32 = 8;

/// The request: make all durable.
const FLUSH: [u8; 4] = 0u32.to_le_bytes();

/// What the host has not written: no answer that it could give.
const UNANSWERED: [u8; 4] = u32::MAX.to_le_bytes();

/// How long the host may take for a flush of a device that goes, in milliseconds. It may have to write
/// a lot; but if it does not answer any more, nobody must wait for ever.
const PATIENCE_MS: u32 = 30_000;

type Flush = Buffer<[u8; 4], [u8; 4]>;

/// The registration of the driver.
pub(super) type Registration = virtio::Registration<VirtioPmem>;

/// The value of `pmem_virtio`.
pub(super) fn param() -> Result<&'static str> {
    PMEM_VIRTIO.get()
}

/// How disks are to be made.
pub(super) struct Context {
    options: Options,
    persist: Persist,
    struct_pages: StructPages,
    /// Whether a header may be lost.
    force: bool,
    /// The first number that a disk may have.
    first: u32,
    debugfs: Arc<Dir>,
}

impl Context {
    /// What `config` says of such devices, unless that is to leave them alone.
    pub(super) fn new(config: &Config<'_>, cpu: CpuFeatures, debugfs: &Arc<Dir>) -> Option<Self> {
        // A host's memory is to be mapped as the host has it.
        let cache = Cache::WriteBack;
        config.virtio().then(|| Context {
            options: Options {
                logical_block_size: config.logical_block_size(),
                cache,
                provider: "virtio",
            },
            persist: Persist::for_cache(cpu, cache, config.copy()),
            struct_pages: config.found_mode().struct_pages,
            force: config.memmap_force(),
            first: config.first(),
            debugfs: debugfs.clone(),
        })
    }

    /// Registers the driver: disks of the devices that are there already are made at once.
    ///
    /// # Errors
    ///
    /// Those of [`virtio::Registration::new`].
    pub(super) fn register(self, module: &'static ThisModule) -> Result<Pin<KBox<Registration>>> {
        KBox::pin_init(Registration::new(c"pmem", self, module), GFP_KERNEL)
    }
}

/// A device.
#[pin_data]
pub(super) struct VirtioPmem {
    line: Arc<Line>,
    range: PhysRange,
    region: Arc<Region>,
    /// Set before the disk is added.
    device: SetOnce<Arc<PmemDevice>>,
    #[pin]
    disk: Mutex<Option<(Directory, Disk<PmemDevice>)>>,
    queue: ReclaimQueue,
    /// Looks whether the host still answers while the device goes.
    #[pin]
    watch: Work<VirtioPmem>,
    #[pin]
    gone: Mutex<bool>,
    #[pin]
    goes: CondVar,
}

impl_has_work! {
    impl HasWork<Self> for VirtioPmem { self.watch }
}

/// The line to the host.
#[pin_data]
struct Line {
    name: CString,
    queue: Queue<[u8; 4], [u8; 4]>,
    /// The request, while it is not at the host.
    #[pin]
    flush: SpinLockIrq<Option<KBox<Flush>>>,
}

impl Host for Line {
    fn send(&self) -> Result {
        let flush = self.flush.lock().take().ok_or(ENOMEM);
        let sent = flush.and_then(|flush| {
            self.queue.send(flush).map_err(|Unsent { error, buffer }| {
                *self.flush.lock() = buffer;
                error
            })
        });
        sent.inspect_err(|error| {
            pr_err!(
                "{}: the host cannot be asked to flush ({:?}); {}\n",
                &*self.name,
                error,
                BROKEN
            );
        })
    }
}

/// What users are to do when the host cannot be asked any more.
const BROKEN: &str = "flushes fail, until it is reset or bound anew";

/// The range of `device`.
fn range(device: &Device) -> Result<PhysRange> {
    let name = device.name();
    let number = |offset| {
        device.config_le64(offset).inspect_err(|_| {
            pr_err!(
                "{}: the host does not say where its memory is: there is neither a configuration nor shared memory region {}\n",
                name,
                REGION
            );
        })
    };
    let (start, size) = if device.has_feature(F_SHMEM_REGION) {
        device.shared_memory(REGION).ok_or(ENXIO)?
    } else {
        (number(START)?, number(SIZE)?)
    };
    let range = PhysRange::new(start, size).map_err(|error| {
        pr_err!("{}: {}; the host gave that\n", name, error);
        EINVAL
    })?;
    if (start | size) % DISK_ALIGN != 0 {
        pr_err!(
            "{}: {} of {} is not {} aligned; the host must give the device memory that begins and ends at multiples of that\n",
            name,
            range,
            Size(size),
            Size(DISK_ALIGN)
        );
        return Err(EINVAL);
    }
    Ok(range)
}

impl virtio::Driver for VirtioPmem {
    type Request = [u8; 4];
    type Response = [u8; 4];
    type Context = Context;

    const ID_TABLE: IdTable = &id_array![DeviceId::new(ID)];
    const FEATURES: &'static [u32] = &[F_SHMEM_REGION];
    const QUEUE: &'static CStr = c"flush_queue";

    fn validate(device: &mut Device) -> Result {
        if device.has_feature(F_SHMEM_REGION) && device.shared_memory(REGION).is_none() {
            pr_warn!(
                "{}: shared memory region {} is not there; the range is read from the configuration\n",
                device.name(),
                REGION
            );
            device.clear_feature(F_SHMEM_REGION);
        }
        Ok(())
    }

    fn probe(
        _context: &Context,
        device: &Device,
        queue: Queue<[u8; 4], [u8; 4]>,
    ) -> Result<impl PinInit<Self, Error>> {
        let range = range(device)?;
        let region = super::claim(range).map_err(|unusable| {
            pr_err!("{}: {}: {}\n", device.name(), range, unusable);
            unusable.errno()
        })?;
        let flush = Buffer::new(FLUSH, UNANSWERED)?;
        let line = Arc::pin_init(
            try_pin_init!(Line {
                name: CString::try_from_fmt(fmt!("{}", device.name()))?,
                queue,
                flush <- new_spinlock_irq!(Some(flush)),
            }),
            GFP_KERNEL,
        )?;
        let queue = ReclaimQueue::new(c"pmem_virtio")?;
        Ok(try_pin_init!(VirtioPmem {
            line,
            range,
            region,
            device: SetOnce::new(),
            disk <- new_mutex!(None),
            queue,
            watch <- new_work!("pmem_virtio"),
            gone <- new_mutex!(false),
            goes <- new_condvar!(),
        }))
    }

    fn start(this: ArcBorrow<'_, Self>, context: &Context, _device: &Device) -> Result {
        let (number, disk) = this.prepare(context)?;
        this.device.populate(disk.data().clone());
        let debugfs =
            PmemDevice::debugfs(disk.data(), context.debugfs.clone(), fmt!("pmem{}", number))?;
        let disk = disk
            .add()
            .map_err(|error| super::explain(error, number, this.range))?;
        PmemDevice::announce(&disk, fmt!("pmem{}", number), this.range);
        *this.disk.lock() = Some((debugfs, disk));
        Ok(())
    }

    fn notified(&self) {
        while let Some(used) = self.line.queue.receive() {
            let response = used.response();
            if response == Some(UNANSWERED) {
                // The request is at the host yet, see `returned()`; its answer would be the next one's.
                Buffer::abandon(used.buffer);
                self.fail("the host has answered what it was not asked");
                continue;
            }
            let durable = response.map(u32::from_le_bytes) == Some(0);
            *self.line.flush.lock() = Some(used.buffer);
            if !durable {
                pr_err!(
                    "{}: the host could not make data durable; the flushes that it was asked for fail\n",
                    &*self.line.name
                );
            }
            if let Some(device) = self.device.as_ref() {
                PmemDevice::answered(device, durable);
            }
        }
        if self.line.queue.is_broken() {
            self.fail("the queue is broken");
        }
    }

    /// QEMU answers a request also after a reset, when its `fsync` ends: it then writes to the buffer,
    /// and its answer is taken for that to the request that is sent next. So nobody gets this buffer any
    /// more, and the next one is not answered by what is written here.
    fn returned(&self, buffer: KBox<Flush>) {
        Buffer::abandon(buffer);
    }

    fn needs_reset(&self) {
        self.fail("the device needs a reset");
    }

    fn pause(&self) {
        if let Some(device) = self.device.as_ref() {
            device.pause_flushes();
        }
    }

    fn resume(&self) {
        if self.line.flush.lock().is_none() {
            // Without one, flushes fail, and the log says so.
            *self.line.flush.lock() = Buffer::new(FLUSH, UNANSWERED).ok();
        }
        if let Some(device) = self.device.as_ref() {
            device.resume_flushes();
        }
    }

    fn unbind(this: ArcBorrow<'_, Self>) {
        let Some(device) = this.device.as_ref() else {
            return;
        };
        // It is broken, or the device goes while it is reset.
        if !this.line.queue.is_usable() {
            this.fail("the device is gone");
        }
        let _ = this.queue.enqueue(Arc::from(this));
        // File systems write back while the host still answers.
        drop(this.disk.lock().take());
        device.drain_flushes();
        *this.gone.lock() = true;
        this.goes.notify_all();
        this.queue.flush();
        device.fail_flushes();
    }
}

impl VirtioPmem {
    /// Makes a disk with the first number that is free.
    fn prepare(&self, context: &Context) -> Result<(u32, disk::Prepared<PmemDevice>)> {
        let mut next = Some(context.first);
        while let Some(number) = next {
            let place = Place::check(
                fmt!("pmem{}", number),
                self.region.clone(),
                self.range,
                context.struct_pages,
                context.options.cache,
                context.force,
            )?;
            let host: Arc<dyn Host> = self.line.clone();
            match PmemDevice::prepare(
                fmt!("pmem{}", number),
                place,
                context.persist,
                context.options,
                Some(host),
            ) {
                Err(EEXIST) => next = number.checked_add(1),
                Err(error) => return Err(super::explain(error, number, self.range)),
                Ok(disk) => return Ok((number, disk)),
            }
        }
        Err(EBUSY)
    }

    /// Nothing that is sent will be answered any more.
    fn fail(&self, why: &str) {
        pr_err!("{}: {}; {}\n", &*self.line.name, why, BROKEN);
        if let Some(device) = self.device.as_ref() {
            device.fail_flushes();
        }
    }
}

impl WorkItem for VirtioPmem {
    type Pointer = Arc<Self>;

    /// Runs while the device goes.
    fn run(this: Arc<Self>) {
        let Some(device) = this.device.as_ref() else {
            return;
        };
        let mut before = device.in_flight();
        let mut gone = this.gone.lock();
        while !*gone {
            let patience = msecs_to_jiffies(PATIENCE_MS);
            let woken = this.goes.wait_interruptible_timeout(&mut gone, patience);
            if !matches!(woken, CondVarTimeoutResult::Timeout) {
                continue;
            }
            let now = device.in_flight();
            if now.is_some() && now == before {
                this.fail(
                    "the host has not answered a flush for half a minute while the device goes",
                );
                return;
            }
            before = now;
        }
    }
}
