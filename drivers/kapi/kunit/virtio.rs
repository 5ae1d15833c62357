// SPDX-License-Identifier: GPL-2.0-only

//! A virtio device whose host is the test.
//!
//! It is on the kernel's own virtio bus, with a ring of the kernel's own, and any driver can have it.
//! Only the transport is here, what PCI is for others. The test does by hand what a host does: it looks
//! at the ring for requests, and answers them when, how and as often as it likes, or does not.
//!
//! The ring is a split one, see [Virtual I/O Device (VIRTIO) Version 1.3](
//! https://docs.oasis-open.org/virtio/virtio/v1.3/virtio-v1.3.html), 2.7. The addresses in it are
//! physical ones, as `VIRTIO_F_ACCESS_PLATFORM` is not offered.
//!
//! C headers: [`include/linux/virtio_config.h`](srctree/include/linux/virtio_config.h),
//! [`include/linux/virtio_ring.h`](srctree/include/linux/virtio_ring.h)

use super::super::{
    bindings,
    compat::{
        new_spinlock_irq,
        SpinLockIrq, //
    }, //
};
use core::{
    iter,
    mem::zeroed,
    ops::Deref,
    ptr::NonNull,
    slice,
    sync::atomic::{
        AtomicBool,
        AtomicI32,
        AtomicU16,
        AtomicU32,
        AtomicU64,
        Ordering, //
    },
};
use kernel::{
    error::to_result,
    ffi::{
        c_int,
        c_uint,
        c_void, //
    },
    page,
    prelude::*,
    sync::Arc,
    types::Opaque,
};

/// Bits of the device's status.
pub(crate) mod status {
    /// The bus has seen the device.
    pub(crate) const ACKNOWLEDGE: u32 = 1;
    /// A driver wants it.
    pub(crate) const DRIVER: u32 = 1 << 1;
    /// The driver uses it.
    pub(crate) const DRIVER_OK: u32 = 1 << 2;
    /// The features are agreed on.
    pub(crate) const FEATURES_OK: u32 = 1 << 3;
    /// The device has failed.
    pub(crate) const NEEDS_RESET: u32 = 1 << 6;
    /// The driver has failed.
    pub(crate) const FAILED: u32 = 1 << 7;
    /// What a device has whose driver uses it.
    pub(crate) const IN_USE: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
}

/// Feature: a request can be one descriptor of the ring, which names a table of others.
pub(crate) const INDIRECT: u64 = 1 << 28;
/// Feature: each side says from which index on it wants to be notified.
pub(crate) const EVENT_IDX: u64 = 1 << 29;
/// Feature that all these devices offer: they are as the standard has them from its version 1 on.
pub(crate) const VERSION_1: u64 = 1 << 32;

/// The number of descriptors of the ring. Without [`INDIRECT`], a request with an answer takes two.
pub(crate) const DESCRIPTORS: u32 = 4;

/// Flags of a descriptor.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const TABLE: u16 = 4;

/// What a device is.
#[derive(Clone, Copy, Default)]
pub(crate) struct Setup {
    /// The device type.
    pub(crate) device: u32,
    /// The features that it offers besides [`VERSION_1`].
    pub(crate) features: u64,
    /// The configuration space, little-endian, if there is one.
    pub(crate) config: Option<[u64; 2]>,
    /// The physical address and the length in bytes of shared memory region 0, if there is one.
    pub(crate) shared_memory: Option<(u64, u64)>,
}

/// A descriptor of the ring, little-endian.
#[repr(C)]
#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// An entry of the used ring, little-endian.
#[repr(C)]
struct UsedEntry {
    id: u32,
    len: u32,
}

/// Bytes of the ring before the entries of the available and of the used part: flags and index.
const HEADER: usize = 4;

fn virt(address: u64) -> *mut u8 {
    // SAFETY: Computes an address.
    unsafe { bindings::pmem_helper_phys_to_virt(address).cast() }
}

/// What the host was asked.
pub(crate) struct Request {
    /// The descriptor that it begins with.
    pub(crate) id: u16,
    /// What the driver has written.
    pub(crate) bytes: KVec<u8>,
    /// How many bytes the driver has room for.
    pub(crate) room: usize,
}

/// A request that the host has and has not answered.
struct Pending {
    id: u16,
    /// Where the answer goes: address and length in bytes.
    room: KVec<(*mut u8, usize)>,
}

/// The ring, as the host sees it.
///
/// # Invariants
///
/// `queue` is valid. Unless `is_forgotten`, what its descriptors name between the driver's index and
/// the host's is memory that the driver keeps for the host, and so is that of `pending`.
struct Ring {
    queue: NonNull<bindings::virtqueue>,
    descriptors: u64,
    available: u64,
    used: u64,
    /// How many requests the host has taken, and how many it has given back.
    taken: u16,
    given: u16,
    pending: KVec<Pending>,
    /// Whether the device was reset after the ring was made, or the host has answered what it does not
    /// have.
    is_forgotten: bool,
}

// SAFETY: A queue belongs to no thread, only to who has the lock.
unsafe impl Send for Ring {}

impl Ring {
    /// # Safety
    ///
    /// `queue` is valid, and in use by nobody, until what is returned is dropped.
    unsafe fn new(queue: NonNull<bindings::virtqueue>) -> Self {
        // SAFETY: By the function's contract.
        unsafe {
            // INVARIANT: Nothing is in it yet.
            Ring {
                queue,
                descriptors: bindings::virtqueue_get_desc_addr(queue.as_ptr()),
                available: bindings::virtqueue_get_avail_addr(queue.as_ptr()),
                used: bindings::virtqueue_get_used_addr(queue.as_ptr()),
                taken: 0,
                given: 0,
                pending: KVec::new(),
                is_forgotten: false,
            }
        }
    }

    /// Takes the next request.
    fn take(&mut self) -> Result<Option<Request>> {
        if self.is_forgotten {
            return Ok(None);
        }
        let available = virt(self.available);
        // SAFETY: By the type invariants the ring is valid: flags, the index, and an entry for each
        // descriptor.
        let id = unsafe {
            let index = AtomicU16::from_ptr(available.add(2).cast()).load(Ordering::Acquire);
            if u16::from_le(index) == self.taken {
                return Ok(None);
            }
            let at = usize::from(self.taken) % DESCRIPTORS as usize;
            u16::from_le(available.add(HEADER).cast::<u16>().add(at).read_volatile())
        };
        let mut request = Request {
            id,
            bytes: KVec::new(),
            room: 0,
        };
        let mut room = KVec::new();
        let (mut table, mut len) = (virt(self.descriptors).cast::<Descriptor>(), DESCRIPTORS);
        let mut next = u32::from(id);
        // It ends before, or is a circle.
        for _ in 0..=DESCRIPTORS {
            if next >= len {
                return Err(EINVAL);
            }
            // SAFETY: By the type invariants, and there are `len` of them.
            let descriptor = unsafe { table.add(next as usize).read_volatile() };
            let flags = u16::from_le(descriptor.flags);
            let memory = virt(u64::from_le(descriptor.address));
            let size = u32::from_le(descriptor.len) as usize;
            if flags & TABLE != 0 {
                (table, len) = (memory.cast(), (size / size_of::<Descriptor>()) as u32);
                next = 0;
                continue;
            }
            if flags & WRITE != 0 {
                room.push((memory, size), GFP_ATOMIC)?;
                request.room = request.room.saturating_add(size);
            } else {
                // SAFETY: By the type invariants the driver does not write to it meanwhile.
                let bytes = unsafe { slice::from_raw_parts(memory, size) };
                request.bytes.extend_from_slice(bytes, GFP_ATOMIC)?;
            }
            if flags & NEXT == 0 {
                // INVARIANT: The driver keeps it until it is given back, or forgotten.
                self.pending.push(Pending { id, room }, GFP_ATOMIC)?;
                self.taken = self.taken.wrapping_add(1);
                self.want_notification();
                return Ok(Some(request));
            }
            next = u16::from_le(descriptor.next).into();
        }
        Err(EINVAL)
    }

    /// Asks to be notified of the next request. That matters with [`EVENT_IDX`] alone.
    fn want_notification(&self) {
        // SAFETY: By the type invariants; this follows the entries of the used ring.
        unsafe {
            let entries = virt(self.used).add(HEADER).cast::<UsedEntry>();
            let event = entries.add(DESCRIPTORS as usize).cast::<u16>();
            AtomicU16::from_ptr(event).store(self.taken.to_le(), Ordering::Release);
        }
    }

    /// Writes `response` where the answer to request `id` goes.
    fn write(&mut self, id: u16, response: &[u8]) -> Result {
        let mut pending = self.pending.iter().filter(|pending| pending.id == id);
        let mut rest = response;
        for &(memory, size) in &pending.next().ok_or(ENOENT)?.room {
            let (now, later) = rest.split_at_checked(size).unwrap_or((rest, &[]));
            // SAFETY: By the type invariants it is the driver's memory of at least this length, which
            // it does not use meanwhile.
            unsafe { memory.copy_from_nonoverlapping(now.as_ptr(), now.len()) };
            rest = later;
        }
        Ok(())
    }

    /// Looks at the driver's memory no more.
    fn forget(&mut self) {
        self.pending.clear();
        self.is_forgotten = true;
    }

    /// Puts an entry into the used ring.
    fn give(&mut self, id: u32, len: u32) {
        // INVARIANT: The driver gets its memory back; if it was not pending, who knows which.
        match self
            .pending
            .iter()
            .position(|pending| u32::from(pending.id) == id)
        {
            Some(at) => drop(self.pending.remove(at)),
            None => self.forget(),
        }
        let used = virt(self.used);
        let at = usize::from(self.given) % DESCRIPTORS as usize;
        self.given = self.given.wrapping_add(1);
        let entry = UsedEntry {
            id: id.to_le(),
            len: len.to_le(),
        };
        // SAFETY: As in `take()`.
        unsafe {
            let entries = used.add(HEADER).cast::<UsedEntry>();
            entries.add(at).write_volatile(entry);
            AtomicU16::from_ptr(used.add(2).cast()).store(self.given.to_le(), Ordering::Release);
        }
    }

    /// Answers all requests with zeros.
    fn answer_all(&mut self) {
        while let Ok(Some(_)) = self.take() {}
        while let Some((id, room)) = self.pending.first().map(|first| {
            (
                first.id,
                first.room.iter().map(|&(_, size)| size).sum::<usize>(),
            )
        }) {
            for &(memory, size) in self.pending.iter().take(1).flat_map(|first| &first.room) {
                // SAFETY: As in `write()`.
                unsafe { memory.write_bytes(0, size) };
            }
            self.give(id.into(), room as u32);
        }
    }

    /// Interrupts the driver.
    fn interrupt(&self) {
        // SAFETY: By the type invariants. Interrupts are off, as the lock is held.
        unsafe { bindings::vring_interrupt(0, self.queue.as_ptr().cast()) };
    }
}

/// The host of a device, which stays when the device goes.
#[pin_data]
pub(crate) struct Host {
    setup: Setup,
    status: AtomicU32,
    features: AtomicU64,
    notifications: AtomicU32,
    is_released: AtomicBool,
    refuses_features: AtomicBool,
    queue_error: AtomicI32,
    is_deaf: AtomicBool,
    is_late: AtomicBool,
    fails_early: AtomicBool,
    /// Interrupts come with the lock held. So what the driver does in one must do without it.
    #[pin]
    ring: SpinLockIrq<Option<Ring>>,
}

impl Host {
    /// What the device is.
    pub(crate) fn setup(&self) -> Setup {
        self.setup
    }

    /// The device's status, see [`status`].
    pub(crate) fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// The features that the driver has taken.
    pub(crate) fn features(&self) -> u64 {
        self.features.load(Ordering::SeqCst)
    }

    /// How often the driver has notified the host of requests.
    pub(crate) fn notifications(&self) -> u32 {
        self.notifications.load(Ordering::SeqCst)
    }

    /// Whether the driver has a queue.
    pub(crate) fn has_queue(&self) -> bool {
        self.ring.lock().is_some()
    }

    /// Whether nobody uses the device any more, and its memory is freed.
    pub(crate) fn is_released(&self) -> bool {
        self.is_released.load(Ordering::SeqCst)
    }

    /// Whether the host refuses whatever features a driver takes.
    pub(crate) fn refuse_features(&self, refuses: bool) {
        self.refuses_features.store(refuses, Ordering::SeqCst);
    }

    /// With which error no queue can be made, if with one.
    pub(crate) fn refuse_queue(&self, error: Option<Error>) {
        let error = error.map_or(0, Error::to_errno);
        self.queue_error.store(error, Ordering::SeqCst);
    }

    /// Whether it cannot be notified, and so sees no requests.
    pub(crate) fn be_deaf(&self, is_deaf: bool) {
        self.is_deaf.store(is_deaf, Ordering::SeqCst);
    }

    /// Whether it answers at the last moment: all requests when it is told to forget them, and with what
    /// makes no sense after that.
    pub(crate) fn be_late(&self, is_late: bool) {
        self.is_late.store(is_late, Ordering::SeqCst);
    }

    /// Whether the device needs a reset as soon as a driver is about to use it.
    pub(crate) fn fail_early(&self, fails: bool) {
        self.fails_early.store(fails, Ordering::SeqCst);
    }

    /// Takes the next request, if there is one. Before the driver is ready, none is looked for.
    ///
    /// # Errors
    ///
    /// - `EINVAL`: the ring makes no sense.
    /// - `ENOMEM`.
    pub(crate) fn request(&self) -> Result<Option<Request>> {
        let hears = !self.is_deaf.load(Ordering::SeqCst);
        match &mut *self.ring.lock() {
            Some(ring) if hears && self.status() & status::DRIVER_OK != 0 => ring.take(),
            _ => Ok(None),
        }
    }

    /// Answers `request` by `response`, of which `len` bytes are said to be written, and interrupts the
    /// driver.
    ///
    /// # Errors
    ///
    /// - `ENODEV`: the driver has no queue.
    /// - `ENOENT`: the request is answered, or was forgotten.
    pub(crate) fn answer(&self, request: &Request, response: &[u8], len: u32) -> Result {
        let mut guard = self.ring.lock();
        let ring = Option::as_mut(&mut guard).ok_or(ENODEV)?;
        ring.write(request.id, response)?;
        ring.give(request.id.into(), len);
        ring.interrupt();
        Ok(())
    }

    /// Says that the request that begins with descriptor `id` is answered by `len` bytes, whether that is
    /// true or not, and interrupts the driver. If the host does not have that one, it takes no more.
    ///
    /// # Errors
    ///
    /// `ENODEV`: the driver has no queue.
    pub(crate) fn pretend(&self, id: u32, len: u32) -> Result {
        let mut guard = self.ring.lock();
        let ring = Option::as_mut(&mut guard).ok_or(ENODEV)?;
        ring.give(id, len);
        ring.interrupt();
        Ok(())
    }

    /// Interrupts the driver.
    ///
    /// # Errors
    ///
    /// `ENODEV`: the driver has no queue.
    pub(crate) fn interrupt(&self) -> Result {
        self.ring.lock().as_ref().ok_or(ENODEV)?.interrupt();
        Ok(())
    }

    fn set_status(&self, status: u32) {
        self.status.store(status, Ordering::SeqCst);
    }
}

/// The device, as the bus has it.
#[repr(C)]
struct Transport {
    device: Opaque<bindings::virtio_device>,
    host: Arc<Host>,
}

/// The functions of the transport.
///
/// All are called by the virtio core, with the device of a [`Transport`] that lives.
impl Transport {
    const CONFIG: &'static bindings::virtio_config_ops = &bindings::virtio_config_ops {
        get: Some(Self::get),
        ..*Self::NO_CONFIG
    };

    const NO_CONFIG: &'static bindings::virtio_config_ops = &bindings::virtio_config_ops {
        get_status: Some(Self::get_status),
        set_status: Some(Self::set_status),
        reset: Some(Self::reset),
        find_vqs: Some(Self::find_vqs),
        del_vqs: Some(Self::del_vqs),
        get_features: Some(Self::get_features),
        finalize_features: Some(Self::finalize_features),
        get_shm_region: Some(Self::get_shm_region),
        // SAFETY: It has functions alone, which may be none.
        ..unsafe { zeroed() }
    };

    /// # Safety
    ///
    /// See above.
    unsafe fn host<'a>(device: *mut bindings::virtio_device) -> &'a Arc<Host> {
        // SAFETY: By the function's contract it is the first field of one that lives.
        unsafe { &(*device.cast::<Self>()).host }
    }

    /// # Safety
    ///
    /// See above; `buffer` has `len` bytes.
    unsafe extern "C" fn get(
        device: *mut bindings::virtio_device,
        offset: c_uint,
        buffer: *mut c_void,
        len: c_uint,
    ) {
        // SAFETY: By the function's contract.
        let (host, buffer) = unsafe {
            let buffer = slice::from_raw_parts_mut(buffer.cast::<u8>(), len as usize);
            (Self::host(device), buffer)
        };
        let config = host.setup.config.unwrap_or_default();
        let bytes = config.iter().flat_map(|word| word.to_le_bytes());
        // What is beyond reads as that of a device which is not there.
        let bytes = Iterator::chain(bytes, iter::repeat(0xff));
        for (to, from) in buffer.iter_mut().zip(bytes.skip(offset as usize)) {
            *to = from;
        }
    }

    /// # Safety
    ///
    /// See above.
    unsafe extern "C" fn get_status(device: *mut bindings::virtio_device) -> u8 {
        // SAFETY: By the function's contract.
        unsafe { Self::host(device) }.status() as u8
    }

    /// # Safety
    ///
    /// See above.
    unsafe extern "C" fn set_status(device: *mut bindings::virtio_device, status: u8) {
        // SAFETY: By the function's contract.
        let host = unsafe { Self::host(device) };
        let mut status = u32::from(status);
        if host.refuses_features.load(Ordering::SeqCst) {
            status &= !status::FEATURES_OK;
        }
        if status & status::DRIVER_OK != 0 && host.fails_early.load(Ordering::SeqCst) {
            host.set_status(status | status::NEEDS_RESET);
            // SAFETY: By the function's contract.
            unsafe { bindings::virtio_config_changed(device) };
        } else {
            host.set_status(status);
        }
    }

    /// # Safety
    ///
    /// See above.
    unsafe extern "C" fn reset(device: *mut bindings::virtio_device) {
        // SAFETY: By the function's contract.
        let host = unsafe { Self::host(device) };
        let mut guard = host.ring.lock();
        if let Some(ring) = &mut *guard {
            if host.is_late.load(Ordering::SeqCst) && !ring.is_forgotten {
                ring.answer_all();
                ring.interrupt();
            }
            ring.forget();
        }
        host.set_status(0);
    }

    /// # Safety
    ///
    /// See above; there is room for `count` queues, which are to be as `infos` says.
    unsafe extern "C" fn find_vqs(
        device: *mut bindings::virtio_device,
        count: c_uint,
        queues: *mut *mut bindings::virtqueue,
        infos: *mut bindings::virtqueue_info,
        _affinity: *mut bindings::irq_affinity,
    ) -> c_int {
        // SAFETY: By the function's contract.
        let host = unsafe { Self::host(device) };
        let error = host.queue_error.load(Ordering::SeqCst);
        if error != 0 {
            return error;
        }
        if count != 1 || host.has_queue() {
            return EINVAL.to_errno();
        }
        // SAFETY: By the function's contract.
        let queue = unsafe {
            let info = &*infos;
            bindings::vring_create_virtqueue(
                0,
                DESCRIPTORS,
                page::PAGE_SIZE as c_uint,
                device,
                true,
                false,
                info.ctx,
                Some(Self::notify),
                info.callback,
                info.name,
            )
        };
        let Some(queue) = NonNull::new(queue) else {
            return ENOMEM.to_errno();
        };
        // SAFETY: Just made, and `del_vqs()` drops the ring before.
        *host.ring.lock() = Some(unsafe { Ring::new(queue) });
        // SAFETY: By the function's contract there is room for one.
        unsafe { *queues = queue.as_ptr() };
        0
    }

    /// # Safety
    ///
    /// See above.
    unsafe extern "C" fn del_vqs(device: *mut bindings::virtio_device) {
        // SAFETY: By the function's contract.
        let host = unsafe { Self::host(device) };
        let ring = {
            let mut guard = host.ring.lock();
            if host.is_late.load(Ordering::SeqCst) {
                if let Some(ring) = &mut *guard {
                    ring.give(u32::MAX, 0);
                    ring.interrupt();
                }
            }
            guard.take()
        };
        if let Some(ring) = ring {
            // SAFETY: `find_vqs()` has made it. No interrupt uses it from now on.
            unsafe { bindings::vring_del_virtqueue(ring.queue.as_ptr()) };
        }
    }

    /// # Safety
    ///
    /// See above.
    unsafe extern "C" fn get_features(device: *mut bindings::virtio_device) -> u64 {
        // SAFETY: By the function's contract.
        unsafe { Self::host(device) }.setup.features | VERSION_1
    }

    /// # Safety
    ///
    /// See above.
    unsafe extern "C" fn finalize_features(device: *mut bindings::virtio_device) -> c_int {
        // SAFETY: By the function's contract.
        unsafe {
            bindings::vring_transport_features(device);
            let features = bindings::pmem_helper_virtio_features(device);
            Self::host(device)
                .features
                .store(features, Ordering::SeqCst);
        }
        0
    }

    /// # Safety
    ///
    /// See above; `region` is valid.
    unsafe extern "C" fn get_shm_region(
        device: *mut bindings::virtio_device,
        region: *mut bindings::virtio_shm_region,
        id: u8,
    ) -> bool {
        // SAFETY: By the function's contract.
        let host = unsafe { Self::host(device) };
        match host.setup.shared_memory {
            Some((addr, len)) if id == 0 => {
                // SAFETY: By the function's contract.
                unsafe { *region = bindings::virtio_shm_region { addr, len } };
                true
            }
            _ => false,
        }
    }

    /// # Safety
    ///
    /// See above; the device is that of `queue`. Called with whatever lock the driver has.
    unsafe extern "C" fn notify(queue: *mut bindings::virtqueue) -> bool {
        // SAFETY: By the function's contract.
        let host = unsafe { Self::host((*queue).vdev) };
        host.notifications.fetch_add(1, Ordering::SeqCst);
        !host.is_deaf.load(Ordering::SeqCst)
    }

    /// # Safety
    ///
    /// See above; it is the last call.
    unsafe extern "C" fn release(device: *mut bindings::device) {
        // SAFETY: By the function's contract it is that of `Simulated::new()`, and nobody has it any
        // more.
        let transport = unsafe {
            let device = bindings::pmem_helper_virtio_of(device);
            KBox::from_raw(device.cast::<Self>())
        };
        transport.host.is_released.store(true, Ordering::SeqCst);
    }
}

/// A device on the virtio bus, which goes when this is dropped.
///
/// # Invariants
///
/// `device` is the one of a [`Transport`], and registered.
pub(crate) struct Simulated {
    device: NonNull<bindings::virtio_device>,
    host: Arc<Host>,
}

impl Simulated {
    /// Makes one. If there is a driver for it, that has been asked to take it when this returns, and may
    /// have refused: see [`Simulated::is_bound`].
    ///
    /// # Errors
    ///
    /// Those of `register_virtio_device()`.
    pub(crate) fn new(setup: Setup) -> Result<Self> {
        Self::with(setup, |_| ())
    }

    /// Makes one after `prepare` has been given the host.
    ///
    /// # Errors
    ///
    /// Those of `register_virtio_device()`.
    pub(crate) fn with(setup: Setup, prepare: impl FnOnce(&Host)) -> Result<Self> {
        let host = Arc::pin_init(
            pin_init!(Host {
                setup,
                status: AtomicU32::new(0),
                features: AtomicU64::new(0),
                notifications: AtomicU32::new(0),
                is_released: AtomicBool::new(false),
                refuses_features: AtomicBool::new(false),
                queue_error: AtomicI32::new(0),
                is_deaf: AtomicBool::new(false),
                is_late: AtomicBool::new(false),
                fails_early: AtomicBool::new(false),
                ring <- new_spinlock_irq!(None),
            }),
            GFP_KERNEL,
        )?;
        prepare(&host);
        let transport = Transport {
            device: Opaque::zeroed(),
            host: host.clone(),
        };
        let raw = KBox::into_raw(KBox::new(transport, GFP_KERNEL)?);
        // SAFETY: Just allocated.
        let device = unsafe { (*raw).device.get() };
        let ops = match setup.config {
            Some(_) => Transport::CONFIG,
            None => Transport::NO_CONFIG,
        };
        // SAFETY: The device is zeroed, and complete after the first call. From the second one on
        // `release()` frees it when the last reference is given back, whether this fails or not.
        unsafe {
            bindings::pmem_helper_virtio_simulate(
                device,
                setup.device,
                ops,
                Some(Transport::release),
            );
            if let Err(error) = to_result(bindings::register_virtio_device(device)) {
                bindings::put_device(bindings::pmem_helper_virtio_dev(device));
                return Err(error);
            }
        }
        // INVARIANT: Just registered.
        Ok(Simulated {
            device: NonNull::new(device).ok_or(ENOMEM)?,
            host,
        })
    }

    fn dev(&self) -> *mut bindings::device {
        // SAFETY: By the type invariants.
        unsafe { bindings::pmem_helper_virtio_dev(self.device.as_ptr()) }
    }

    /// The host, which stays when the device goes.
    pub(crate) fn host(&self) -> Arc<Host> {
        self.host.clone()
    }

    /// Whether a driver has it.
    pub(crate) fn is_bound(&self) -> bool {
        // SAFETY: By the type invariants.
        unsafe { bindings::pmem_helper_virtio_is_bound(self.device.as_ptr()) }
    }

    /// Asks the driver called `driver` to take it, as writing to its `bind` in sysfs does.
    ///
    /// # Errors
    ///
    /// - `ENOENT`: there is no such driver on the bus.
    /// - `EBUSY`: a driver has it.
    /// - What the driver says.
    pub(crate) fn bind(&self, driver: &CStr) -> Result {
        // SAFETY: By the type invariants. The tests are one after another, and none unregisters a driver
        // meanwhile.
        to_result(unsafe {
            let driver = bindings::driver_find(driver.as_char_ptr(), (*self.dev()).bus);
            if driver.is_null() {
                return Err(ENOENT);
            }
            bindings::device_driver_attach(driver, self.dev())
        })
    }

    /// Takes it from its driver.
    pub(crate) fn unbind(&self) {
        // SAFETY: By the type invariants.
        unsafe { bindings::device_release_driver(self.dev()) };
    }

    /// Tells the driver that the configuration has changed.
    pub(crate) fn change_config(&self) {
        // SAFETY: By the type invariants.
        unsafe { bindings::virtio_config_changed(self.device.as_ptr()) };
    }

    /// The device fails, and says so.
    pub(crate) fn need_reset(&self) {
        let status = &self.host.status;
        status.fetch_or(status::NEEDS_RESET, Ordering::SeqCst);
        self.change_config();
    }

    /// The queue does nothing any more, as if the device were gone.
    pub(crate) fn break_queue(&self) {
        // SAFETY: By the type invariants.
        unsafe { bindings::virtio_break_device(self.device.as_ptr()) };
    }

    /// The device goes without a warning.
    pub(crate) fn vanish(self) {
        self.break_queue();
    }

    /// The bus is about to reset it.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub(crate) fn reset_prepare(&self) -> Result {
        // SAFETY: By the type invariants.
        to_result(unsafe { bindings::virtio_device_reset_prepare(self.device.as_ptr()) })
    }

    /// The bus has reset it.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub(crate) fn reset_done(&self) -> Result {
        // SAFETY: By the type invariants.
        to_result(unsafe { bindings::virtio_device_reset_done(self.device.as_ptr()) })
    }

    /// The machine is about to be suspended.
    ///
    /// # Errors
    ///
    /// What the driver says.
    #[cfg(CONFIG_PM_SLEEP)]
    pub(crate) fn freeze(&self) -> Result {
        // SAFETY: By the type invariants.
        to_result(unsafe { bindings::virtio_device_freeze(self.device.as_ptr()) })
    }

    /// The machine was suspended.
    ///
    /// # Errors
    ///
    /// What the driver says.
    #[cfg(CONFIG_PM_SLEEP)]
    pub(crate) fn restore(&self) -> Result {
        // SAFETY: By the type invariants.
        to_result(unsafe { bindings::virtio_device_restore(self.device.as_ptr()) })
    }
}

impl Deref for Simulated {
    type Target = Host;

    fn deref(&self) -> &Host {
        &self.host
    }
}

impl Drop for Simulated {
    fn drop(&mut self) {
        // SAFETY: By the type invariants.
        unsafe { bindings::unregister_virtio_device(self.device.as_ptr()) };
    }
}

/// How a device is made to forget all, and usable again.
type Way = (fn(&Simulated) -> Result, fn(&Simulated) -> Result);

/// All there are.
pub(crate) const WAYS: &[Way] = &[
    (Simulated::reset_prepare, Simulated::reset_done),
    #[cfg(CONFIG_PM_SLEEP)]
    (Simulated::freeze, Simulated::restore),
];

#[kernel::macros::kunit_tests(pmem_virtio_bus)]
mod tests {
    use super::*;
    use crate::{
        kapi::{
            compat::{
                id_array,
                ModuleMetadata, //
            },
            virtio::{
                Buffer,
                Device,
                DeviceId,
                Driver,
                IdTable,
                Queue,
                Registration, //
            }, //
        },
        LocalModule, //
    };
    use core::{
        ptr::null_mut,
        sync::atomic::AtomicPtr, //
    };
    use kernel::{
        device_id::IdArray,
        sync::ArcBorrow,
        time::{
            delay::fsleep,
            Delta, //
        },
        transmute::AsBytes, //
    };

    /// A device type that nobody else has.
    const TYPE: u32 = 0xfff0;
    /// The driver's name.
    const NAME: &CStr = c"pmem_kunit";
    /// Features: of these the driver knows the first two.
    const FIRST: u64 = 1 << 0;
    const SECOND: u64 = 1 << 1;
    const THIRD: u64 = 1 << 2;

    const PLAIN: Setup = Setup {
        device: TYPE,
        features: FIRST,
        config: Some([0x1122_3344_5566_7788, 0x99aa_bbcc_ddee_ff00]),
        shared_memory: None,
    };

    /// How often something has happened in this test.
    #[derive(Default)]
    struct Count(AtomicU32);

    impl Count {
        const fn new() -> Self {
            Count(AtomicU32::new(0))
        }

        fn add(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }

        fn get(&self) -> u32 {
            self.0.load(Ordering::SeqCst)
        }
    }

    /// What has happened, of all devices.
    struct Events {
        probed: Count,
        started: Count,
        notified: Count,
        notified_unbound: Count,
        returned: Count,
        needed_reset: Count,
        paused: Count,
        resumed: Count,
        unbound: Count,
        dropped: Count,
        ordered: Count,
        forgotten: Count,
    }

    static EVENTS: Events = Events {
        probed: Count::new(),
        started: Count::new(),
        notified: Count::new(),
        notified_unbound: Count::new(),
        returned: Count::new(),
        needed_reset: Count::new(),
        paused: Count::new(),
        resumed: Count::new(),
        unbound: Count::new(),
        dropped: Count::new(),
        ordered: Count::new(),
        forgotten: Count::new(),
    };

    impl Events {
        fn all(&self) -> [&Count; 12] {
            [
                &self.probed,
                &self.started,
                &self.notified,
                &self.notified_unbound,
                &self.returned,
                &self.needed_reset,
                &self.paused,
                &self.resumed,
                &self.unbound,
                &self.dropped,
                &self.ordered,
                &self.forgotten,
            ]
        }
    }

    /// What the driver is to do: errors with which it fails, or 0, and other things.
    struct Orders {
        validate: AtomicI32,
        probe: AtomicI32,
        start: AtomicI32,
        /// Whether it gives up the first feature.
        gives_up: AtomicBool,
        /// Whether it sends a request as it starts.
        sends: AtomicBool,
    }

    static ORDERS: Orders = Orders {
        validate: AtomicI32::new(0),
        probe: AtomicI32::new(0),
        start: AtomicI32::new(0),
        gives_up: AtomicBool::new(false),
        sends: AtomicBool::new(false),
    };

    impl Orders {
        fn fail(order: &AtomicI32, error: Error) {
            order.store(error.to_errno(), Ordering::SeqCst);
        }

        fn follow(order: &AtomicI32) -> Result {
            to_result(order.load(Ordering::SeqCst))
        }
    }

    /// A request, which is counted.
    #[repr(C)]
    struct Order([u32; 2]);

    // SAFETY: It has numbers alone, without gaps.
    unsafe impl AsBytes for Order {}

    impl Order {
        fn new(words: [u32; 2]) -> Self {
            EVENTS.ordered.add();
            Order(words)
        }
    }

    impl Drop for Order {
        fn drop(&mut self) {
            EVENTS.forgotten.add();
        }
    }

    type Answer = [u32; 2];

    /// What the driver has seen of its device.
    struct Seen {
        first: bool,
        second: bool,
        config: [Result<u64>; 2],
        shared_memory: [Option<(u64, u64)>; 2],
        is_named: bool,
    }

    #[pin_data(PinnedDrop)]
    struct Tester {
        queue: Queue<Order, Answer>,
        seen: Seen,
        /// How many devices the registration had at this one's.
        before: u32,
        is_unbound: AtomicBool,
        #[pin]
        returned: SpinLockIrq<KVec<KBox<Buffer<Order, Answer>>>>,
    }

    #[pinned_drop]
    impl PinnedDrop for Tester {
        fn drop(self: Pin<&mut Self>) {
            EVENTS.dropped.add();
        }
    }

    impl Tester {
        fn send(&self, words: [u32; 2]) -> Result {
            let sent = self.queue.send(Buffer::new(Order::new(words), [0; 2])?);
            sent.map_err(|unsent| unsent.error)
        }
    }

    static TABLE: IdArray<DeviceId, (), 1> = id_array![DeviceId::new(TYPE)];

    impl Driver for Tester {
        type Request = Order;
        type Response = Answer;
        type Context = Count;

        const ID_TABLE: IdTable = &TABLE;
        const FEATURES: &'static [u32] = &[0, 1];
        const QUEUE: &'static CStr = c"orders";

        fn validate(device: &mut Device) -> Result {
            if ORDERS.gives_up.load(Ordering::SeqCst) {
                device.clear_feature(0);
            }
            Orders::follow(&ORDERS.validate)
        }

        fn probe(
            context: &Count,
            device: &Device,
            queue: Queue<Order, Answer>,
        ) -> Result<impl PinInit<Self, Error>> {
            context.add();
            EVENTS.probed.add();
            Orders::follow(&ORDERS.probe)?;
            let seen = Seen {
                first: device.has_feature(0),
                second: device.has_feature(1),
                config: [device.config_le64(0), device.config_le64(8)],
                shared_memory: [device.shared_memory(0), device.shared_memory(1)],
                is_named: device.name().to_bytes().starts_with(b"virtio"),
            };
            Ok(try_pin_init!(Tester {
                queue,
                seen,
                before: context.get(),
                is_unbound: AtomicBool::new(false),
                returned <- new_spinlock_irq!(KVec::new()),
            }))
        }

        fn start(this: ArcBorrow<'_, Self>, context: &Count, _device: &Device) -> Result {
            EVENTS.started.add();
            if context.get() != this.before {
                return Err(EINVAL);
            }
            if ORDERS.sends.load(Ordering::SeqCst) {
                this.send([5, 6])?;
            }
            Orders::follow(&ORDERS.start)?;
            keep(Some(this.into()));
            Ok(())
        }

        fn notified(&self) {
            EVENTS.notified.add();
            if self.is_unbound.load(Ordering::SeqCst) {
                EVENTS.notified_unbound.add();
            }
        }

        fn returned(&self, buffer: KBox<Buffer<Order, Answer>>) {
            EVENTS.returned.add();
            // If it is lost, the test fails, as it is not sent again.
            let _ = self.returned.lock().push(buffer, GFP_ATOMIC);
        }

        fn needs_reset(&self) {
            EVENTS.needed_reset.add();
        }

        fn pause(&self) {
            EVENTS.paused.add();
        }

        fn resume(&self) {
            EVENTS.resumed.add();
            let returned = core::mem::take(&mut *self.returned.lock());
            for buffer in returned {
                // Likewise.
                let _ = self.queue.send(buffer);
            }
        }

        fn unbind(this: ArcBorrow<'_, Self>) {
            EVENTS.unbound.add();
            this.is_unbound.store(true, Ordering::SeqCst);
        }
    }

    /// The driver of the device that was taken last.
    static TAKEN: AtomicPtr<Tester> = AtomicPtr::new(null_mut());

    /// Keeps `tester` for [`taken`], and no other.
    fn keep(tester: Option<Arc<Tester>>) {
        let raw = tester.map_or(null_mut(), |tester| Arc::into_raw(tester).cast_mut());
        let before = TAKEN.swap(raw, Ordering::SeqCst);
        if !before.is_null() {
            // SAFETY: Only `into_raw()` above has put it there, and it is there no more.
            drop(unsafe { Arc::from_raw(before) });
        }
    }

    /// The driver of the device that was taken last. Nobody else keeps it when this is gone.
    fn taken() -> Result<Arc<Tester>> {
        let raw = TAKEN.swap(null_mut(), Ordering::SeqCst);
        if raw.is_null() {
            return Err(ENODEV);
        }
        // SAFETY: As in `keep()`.
        Ok(unsafe { Arc::from_raw(raw) })
    }

    /// The driver, registered, with nothing that has happened, and no orders.
    struct Bench {
        registration: Option<Pin<KBox<Registration<Tester>>>>,
    }

    impl Bench {
        fn new() -> Result<Self> {
            for count in EVENTS.all() {
                count.0.store(0, Ordering::SeqCst);
            }
            for order in [&ORDERS.validate, &ORDERS.probe, &ORDERS.start] {
                order.store(0, Ordering::SeqCst);
            }
            for order in [&ORDERS.gives_up, &ORDERS.sends] {
                order.store(false, Ordering::SeqCst);
            }
            let mut bench = Bench { registration: None };
            bench.register()?;
            Ok(bench)
        }

        fn register(&mut self) -> Result {
            let registration = Registration::new(NAME, Count::new(), &LocalModule::THIS_MODULE);
            self.registration = Some(KBox::pin_init(registration, GFP_KERNEL)?);
            Ok(())
        }

        /// A device, and the driver's side of it.
        fn take(&self, setup: Setup) -> Result<(Simulated, Arc<Tester>)> {
            let device = Simulated::new(setup)?;
            Ok((device, taken()?))
        }
    }

    impl Drop for Bench {
        fn drop(&mut self) {
            self.registration = None;
            keep(None);
        }
    }

    /// Whether `count` is `wanted` soon, and stays so.
    fn becomes(count: &Count, wanted: u32) -> bool {
        for _ in 0..1000 {
            if count.get() == wanted {
                break;
            }
            fsleep(Delta::from_millis(10));
        }
        fsleep(Delta::from_millis(50));
        count.get() == wanted
    }

    /// Whether nothing is left of a device.
    fn is_gone(host: &Host) -> bool {
        host.is_released()
            && !host.has_queue()
            && EVENTS.notified_unbound.get() == 0
            && EVENTS.dropped.get() == EVENTS.probed.get()
            && EVENTS.ordered.get() == EVENTS.forgotten.get()
    }

    fn bytes(words: Answer) -> [u8; 8] {
        let mut bytes = [0; 8];
        let words = words.iter().flat_map(|word| word.to_ne_bytes());
        for (to, from) in bytes.iter_mut().zip(words) {
            *to = from;
        }
        bytes
    }

    #[test]
    fn a_device_is_taken_and_given_back() -> Result {
        let bench = Bench::new()?;
        let features = FIRST | THIRD;
        let (device, tester) = bench.take(Setup { features, ..PLAIN })?;
        let host = device.host();
        assert!(device.is_bound() && device.has_queue());
        assert_eq!(device.status(), status::IN_USE);
        assert_eq!(device.features(), FIRST | VERSION_1);
        assert!(tester.queue.is_usable());
        assert!(tester.seen.first && !tester.seen.second);
        assert!(tester.seen.is_named);
        assert!(tester.seen.config == [Ok(0x1122_3344_5566_7788), Ok(0x99aa_bbcc_ddee_ff00)]);
        assert!(tester.seen.shared_memory == [None, None]);
        assert_eq!(EVENTS.started.get(), 1);
        drop(tester);

        device.unbind();
        assert!(!device.is_bound() && !device.has_queue());
        assert_eq!(device.status(), status::ACKNOWLEDGE);
        assert_eq!(EVENTS.unbound.get(), 1);
        assert_eq!(EVENTS.dropped.get(), 1);
        device.bind(NAME)?;
        assert_eq!(device.bind(NAME), Err(EBUSY));
        assert!(device.is_bound() && !device.is_released());
        drop(taken()?);
        drop(device);
        assert_eq!(EVENTS.unbound.get(), 2);
        assert!(is_gone(&host));
        Ok(())
    }

    #[test]
    fn a_driver_goes_and_comes_back() -> Result {
        let mut bench = Bench::new()?;
        let (one, first) = bench.take(PLAIN)?;
        let (other, second) = bench.take(PLAIN)?;
        assert!(first.before == 1 && second.before == 2);
        first.send([1, 2])?;
        assert!(one.request()?.is_some());
        assert!(other.request()?.is_none());
        bench.registration = None;
        assert_eq!(EVENTS.unbound.get(), 2);
        assert!(!one.is_bound() && !other.is_bound());
        assert!(!one.has_queue() && !other.has_queue());
        drop((first, second));
        assert_eq!(EVENTS.dropped.get(), 2);
        assert_eq!(EVENTS.forgotten.get(), 1);
        assert_eq!(one.bind(NAME), Err(ENOENT));

        bench.register()?;
        assert!(one.is_bound() && other.is_bound());
        assert_eq!(EVENTS.started.get(), 4);
        assert_eq!(bench.register(), Err(EBUSY));
        Ok(())
    }

    #[test]
    fn features_are_given_up() -> Result {
        let bench = Bench::new()?;
        ORDERS.gives_up.store(true, Ordering::SeqCst);
        let features = FIRST | SECOND;
        let (device, tester) = bench.take(Setup { features, ..PLAIN })?;
        assert_eq!(device.features(), SECOND | VERSION_1);
        assert!(!tester.seen.first && tester.seen.second);
        Ok(())
    }

    #[test]
    fn without_configuration_but_shared_memory() -> Result {
        let bench = Bench::new()?;
        let (_device, tester) = bench.take(Setup {
            config: None,
            shared_memory: Some((1 << 40, 2 << 20)),
            ..PLAIN
        })?;
        assert!(tester.seen.config == [Err(ENODEV), Err(ENODEV)]);
        assert!(tester.seen.shared_memory == [Some((1 << 40, 2 << 20)), None]);
        Ok(())
    }

    #[test]
    fn what_fails_leaves_nothing_behind() -> Result {
        let _bench = Bench::new()?;
        let device = Simulated::with(PLAIN, |host| host.refuse_features(true))?;
        assert_eq!(device.bind(NAME), Err(ENODEV));
        assert_eq!(EVENTS.probed.get(), 0);
        device.refuse_features(false);

        let errors = [
            (&ORDERS.validate, EDOM),
            (&ORDERS.probe, ENXIO),
            (&ORDERS.start, ENOSPC),
        ];
        for (order, error) in errors {
            Orders::fail(order, error);
            let unbound = EVENTS.unbound.get();
            let fails_to_start = u32::from(error == ENOSPC);
            assert_eq!(device.bind(NAME), Err(error));
            assert!(!device.is_bound() && !device.has_queue());
            assert!(device.status() & status::FAILED != 0);
            assert!(device.status() & status::DRIVER_OK == 0);
            assert_eq!(EVENTS.unbound.get() - unbound, fails_to_start);
            assert_eq!(EVENTS.dropped.get(), fails_to_start);
            order.store(0, Ordering::SeqCst);
        }
        device.refuse_queue(Some(ENOENT));
        assert_eq!(device.bind(NAME), Err(ENOENT));
        device.refuse_queue(None);

        device.bind(NAME)?;
        let tester = taken()?;
        tester.send([1, 2])?;
        assert!(device.request()?.is_some());
        Ok(())
    }

    /// The host may answer what was sent until the device is reset, and does not always stop then.
    #[test]
    fn a_start_that_fails_is_not_notified_later() -> Result {
        let _bench = Bench::new()?;
        ORDERS.sends.store(true, Ordering::SeqCst);
        Orders::fail(&ORDERS.start, ENOSPC);
        let device = Simulated::with(PLAIN, |host| host.be_late(true))?;
        let host = device.host();
        assert!(!device.is_bound());
        assert_eq!(EVENTS.unbound.get(), 1);
        assert_eq!(EVENTS.dropped.get(), 1);
        assert_eq!(EVENTS.notified_unbound.get(), 0);
        drop(device);
        assert_eq!(EVENTS.ordered.get(), EVENTS.forgotten.get());
        assert!(host.is_released());
        Ok(())
    }

    #[test]
    fn answers_reach_the_driver() -> Result {
        let bench = Bench::new()?;
        for features in [0, INDIRECT, EVENT_IDX, INDIRECT | EVENT_IDX] {
            let (device, tester) = bench.take(Setup { features, ..PLAIN })?;
            let notified = EVENTS.notified.get();
            assert_eq!(device.features(), features | VERSION_1);
            assert!(tester.queue.receive().is_none());
            // More often than the ring is long.
            for round in 0..10 {
                tester.send([round, 1])?;
                tester.send([round, 2])?;
                let (Some(one), Some(other)) = (device.request()?, device.request()?) else {
                    return Err(EINVAL);
                };
                assert!(device.request()?.is_none());
                assert!(one.bytes[..] == bytes([round, 1]));
                assert!(other.bytes[..] == bytes([round, 2]));
                assert_eq!(one.room, 8);
                // In another order.
                for (request, answer) in [(&other, [round, 20]), (&one, [round, 10])] {
                    assert!(tester.queue.receive().is_none());
                    device.answer(request, &bytes(answer), 8)?;
                    let used = tester.queue.receive().ok_or(EINVAL)?;
                    assert!(used.response() == Some(answer));
                    assert_eq!(device.answer(request, &[], 0), Err(ENOENT));
                }
            }
            assert_eq!(EVENTS.notified.get() - notified, 20);
            assert!(device.notifications() >= 10);
            assert_eq!(EVENTS.forgotten.get(), EVENTS.ordered.get());
        }
        Ok(())
    }

    #[test]
    fn an_answer_that_is_too_short_is_none() -> Result {
        let bench = Bench::new()?;
        let (device, tester) = bench.take(PLAIN)?;
        let mut buffer = Buffer::new(Order::new([1, 2]), [0; 2])?;
        let whole = [
            (0, false),
            (4, false),
            (7, false),
            (8, true),
            (9, true),
            (u32::MAX, true),
        ];
        for (len, is_whole) in whole {
            tester.queue.send(buffer).map_err(|unsent| unsent.error)?;
            let request = device.request()?.ok_or(EINVAL)?;
            device.answer(&request, &[1; 100], len)?;
            let used = tester.queue.receive().ok_or(EINVAL)?;
            assert_eq!(used.response().is_some(), is_whole);
            // It can be sent again.
            buffer = used.buffer;
        }
        Ok(())
    }

    #[test]
    fn a_full_queue_refuses() -> Result {
        let bench = Bench::new()?;
        for (features, room) in [(0, DESCRIPTORS / 2), (INDIRECT, DESCRIPTORS)] {
            let (device, tester) = bench.take(Setup { features, ..PLAIN })?;
            for _ in 0..room {
                tester.send([1, 2])?;
            }
            assert_eq!(tester.send([3, 4]), Err(ENOSPC));
            let request = device.request()?.ok_or(EINVAL)?;
            device.answer(&request, &[], 0)?;
            assert!(tester.queue.receive().is_some());
            tester.send([5, 6])?;
            assert!(!tester.queue.is_broken());
        }
        assert!(EVENTS.ordered.get() == EVENTS.forgotten.get());
        Ok(())
    }

    #[test]
    fn answers_that_make_no_sense_break_the_queue() -> Result {
        let bench = Bench::new()?;
        // No descriptor; one that is free; one in the middle of a request.
        for id in [DESCRIPTORS, u32::MAX, 2, 1] {
            let (device, tester) = bench.take(PLAIN)?;
            let notified = EVENTS.notified.get();
            tester.send([1, 2])?;
            assert!(device.request()?.is_some());
            device.pretend(id, 8)?;
            assert_eq!(EVENTS.notified.get() - notified, 1);
            assert!(!tester.queue.is_broken());
            assert!(tester.queue.receive().is_none());
            assert!(tester.queue.is_broken());
            assert_eq!(tester.send([3, 4]), Err(EIO));
            assert!(tester.queue.receive().is_none());
            let host = device.host();
            drop((device, tester));
            assert!(is_gone(&host));
        }

        // What was answered is answered once more.
        let (device, tester) = bench.take(PLAIN)?;
        tester.send([1, 2])?;
        let request = device.request()?.ok_or(EINVAL)?;
        device.answer(&request, &[], 8)?;
        device.pretend(request.id.into(), 8)?;
        assert!(tester.queue.receive().is_some());
        assert!(!tester.queue.is_broken());
        assert!(tester.queue.receive().is_none());
        assert!(tester.queue.is_broken());
        Ok(())
    }

    #[test]
    fn an_interrupt_without_an_answer_is_nobodys() -> Result {
        let bench = Bench::new()?;
        let (device, tester) = bench.take(PLAIN)?;
        device.interrupt()?;
        tester.send([1, 2])?;
        assert!(device.request()?.is_some());
        device.interrupt()?;
        assert_eq!(EVENTS.notified.get(), 0);
        assert!(tester.queue.receive().is_none());
        assert!(!tester.queue.is_broken());
        Ok(())
    }

    #[test]
    fn a_broken_queue_refuses() -> Result {
        let bench = Bench::new()?;
        let (device, tester) = bench.take(PLAIN)?;
        tester.send([1, 2])?;
        assert!(!tester.queue.is_broken());
        device.break_queue();
        assert!(tester.queue.is_broken() && !tester.queue.is_usable());
        assert_eq!(tester.send([3, 4]), Err(EIO));
        assert!(tester.queue.receive().is_none());
        let host = device.host();
        device.vanish();
        drop(tester);
        assert_eq!(EVENTS.unbound.get(), 1);
        assert!(is_gone(&host));

        // The host cannot be reached.
        let (device, tester) = bench.take(PLAIN)?;
        device.be_deaf(true);
        assert_eq!(tester.send([1, 2]), Err(EIO));
        assert!(tester.queue.is_broken());
        let host = device.host();
        drop((device, tester));
        assert!(is_gone(&host));
        Ok(())
    }

    #[test]
    fn a_queue_outlives_its_device() -> Result {
        let bench = Bench::new()?;
        let (device, tester) = bench.take(PLAIN)?;
        tester.send([1, 2])?;
        device.unbind();
        assert_eq!(tester.send([3, 4]), Err(ENODEV));
        assert!(tester.queue.receive().is_none());
        assert!(!tester.queue.is_broken() && !tester.queue.is_usable());
        drop(device);
        drop(bench);
        assert_eq!(tester.send([3, 4]), Err(ENODEV));
        assert_eq!(EVENTS.forgotten.get(), 2);
        assert_eq!(EVENTS.dropped.get(), 0);
        // What was returned to it.
        drop(tester);
        assert_eq!(EVENTS.forgotten.get(), 3);
        assert_eq!(EVENTS.dropped.get(), 1);
        Ok(())
    }

    #[test]
    fn a_device_that_needs_a_reset_says_so_once() -> Result {
        let bench = Bench::new()?;
        let (device, tester) = bench.take(PLAIN)?;
        device.change_config();
        assert!(becomes(&EVENTS.needed_reset, 0));
        device.need_reset();
        assert!(becomes(&EVENTS.needed_reset, 1));
        drop((device, tester));
        assert!(becomes(&EVENTS.needed_reset, 1));

        // Before the driver can be told.
        let device = Simulated::with(PLAIN, |host| host.fail_early(true))?;
        let host = device.host();
        assert!(device.is_bound());
        assert!(becomes(&EVENTS.needed_reset, 2));
        drop(taken()?);

        // It is said when nobody has it, or it goes at once.
        device.unbind();
        device.need_reset();
        device.fail_early(false);
        device.bind(NAME)?;
        drop(taken()?);
        device.need_reset();
        drop(device);
        let needed = EVENTS.needed_reset.get();
        assert!(becomes(&EVENTS.needed_reset, needed));
        assert!(is_gone(&host));
        Ok(())
    }

    #[test]
    fn after_a_reset_it_begins_anew() -> Result {
        let bench = Bench::new()?;
        for &(prepare, done) in WAYS {
            for is_late in [false, true] {
                let (device, tester) = bench.take(PLAIN)?;
                let before = EVENTS.returned.get();
                tester.send([1, 2])?;
                let request = device.request()?.ok_or(EINVAL)?;
                tester.send([3, 4])?;
                device.be_late(is_late);
                prepare(&device)?;
                device.be_late(false);
                assert!(device.is_bound() && !device.has_queue());
                assert_eq!(device.status(), 0);
                // An answer that was not looked at is none.
                assert_eq!(EVENTS.returned.get() - before, 2);
                assert_eq!(EVENTS.paused.get(), EVENTS.resumed.get() + 1);
                assert_eq!(tester.send([5, 6]), Err(ENODEV));
                assert_eq!(device.answer(&request, &[], 8), Err(ENODEV));

                done(&device)?;
                assert_eq!(device.status(), status::IN_USE);
                assert_eq!(device.features(), FIRST | VERSION_1);
                assert_eq!(device.answer(&request, &[], 8), Err(ENOENT));
                assert_eq!(EVENTS.paused.get(), EVENTS.resumed.get());
                let mut again = 0;
                while let Some(request) = device.request()? {
                    device.answer(&request, &bytes([7, 8]), 8)?;
                    let used = tester.queue.receive().ok_or(EINVAL)?;
                    assert!(used.response() == Some([7, 8]));
                    again += 1;
                }
                assert_eq!(again, 2);
                // It is heard as before.
                let needed = EVENTS.needed_reset.get();
                device.need_reset();
                assert!(becomes(&EVENTS.needed_reset, needed + 1));
                let host = device.host();
                drop((device, tester));
                assert!(is_gone(&host));
            }
        }
        Ok(())
    }

    #[test]
    fn a_device_that_is_not_usable_after_a_reset_says_so() -> Result {
        let bench = Bench::new()?;
        for &(prepare, done) in WAYS {
            let (device, tester) = bench.take(PLAIN)?;
            let needed = EVENTS.needed_reset.get();
            tester.send([1, 2])?;
            prepare(&device)?;
            device.refuse_queue(Some(ENOMEM));
            assert_eq!(done(&device), Err(ENOMEM));
            assert_eq!(EVENTS.needed_reset.get() - needed, 1);
            assert!(device.status() & status::FAILED != 0);
            assert_eq!(tester.send([1, 2]), Err(ENODEV));

            // Once more, and it works.
            prepare(&device)?;
            device.refuse_queue(None);
            done(&device)?;
            assert!(device.request()?.is_some());
            let host = device.host();
            drop((device, tester));
            assert!(is_gone(&host));
        }
        Ok(())
    }

    #[test]
    fn a_device_goes_while_it_is_reset() -> Result {
        let mut bench = Bench::new()?;
        for &(prepare, _) in WAYS {
            let (device, tester) = bench.take(PLAIN)?;
            let unbound = EVENTS.unbound.get();
            tester.send([1, 2])?;
            prepare(&device)?;
            let host = device.host();
            drop(device);
            assert_eq!(EVENTS.unbound.get() - unbound, 1);
            drop(tester);
            assert!(is_gone(&host));

            let (device, tester) = bench.take(PLAIN)?;
            tester.send([1, 2])?;
            prepare(&device)?;
            bench.registration = None;
            assert!(!device.is_bound());
            assert_eq!(EVENTS.unbound.get() - unbound, 2);
            drop(tester);
            assert_eq!(EVENTS.forgotten.get(), EVENTS.ordered.get());
            bench.register()?;
            drop(taken()?);
        }
        Ok(())
    }

    /// A host that answers until it is reset, and interrupts after that.
    #[test]
    fn nobody_is_notified_when_the_driver_is_done() -> Result {
        let bench = Bench::new()?;
        for _ in 0..2 {
            let (device, tester) = bench.take(PLAIN)?;
            tester.send([1, 2])?;
            device.be_late(true);
            let host = device.host();
            drop(device);
            drop(tester);
            assert!(is_gone(&host));
        }
        Ok(())
    }
}
