// SPDX-License-Identifier: GPL-2.0-only

//! Drivers of virtio devices that have one virtqueue.
//!
//! A device is taken in two steps. [`Driver::probe`] looks at it, and gets the queue; the host does not
//! serve that before [`Driver::start`], from which on all may be in use. Whatever a driver keeps of its
//! queue is harmless when the device is gone: the queue then refuses.
//!
//! C headers: [`include/linux/virtio.h`](srctree/include/linux/virtio.h),
//! [`include/linux/virtio_config.h`](srctree/include/linux/virtio_config.h)

use super::{
    bindings,
    compat::{
        new_spinlock_irq,
        SpinLockIrq, //
    }, //
};
use core::{
    marker::PhantomData,
    mem::{
        offset_of,
        zeroed, //
    },
    ptr::{
        null,
        NonNull, //
    },
    sync::atomic::{
        AtomicPtr,
        Ordering, //
    },
};
use kernel::{
    device_id::{
        self,
        RawDeviceId, //
    },
    error::{
        from_err_ptr,
        from_result,
        to_result, //
    },
    ffi::{
        c_int,
        c_uint, //
    },
    impl_has_work, new_work,
    prelude::*,
    sync::{
        Arc,
        ArcBorrow, //
    },
    transmute::{
        AsBytes,
        FromBytes, //
    },
    types::Opaque,
    workqueue::{
        self,
        Work,
        WorkItem, //
    },
};

/// Which devices a driver is for: their type, of any vendor.
///
/// C header: [`include/linux/device-id/virtio.h`](srctree/include/linux/device-id/virtio.h)
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct DeviceId {
    device: u32,
    vendor: u32,
}

const _: () = {
    assert!(size_of::<DeviceId>() == size_of::<bindings::virtio_device_id>());
    assert!(offset_of!(DeviceId, device) == offset_of!(bindings::virtio_device_id, device));
    assert!(offset_of!(DeviceId, vendor) == offset_of!(bindings::virtio_device_id, vendor));
};

impl DeviceId {
    /// The device type that `VIRTIO_ID_*` of
    /// [`include/uapi/linux/virtio_ids.h`](srctree/include/uapi/linux/virtio_ids.h) names.
    pub(crate) const fn new(device: u32) -> Self {
        DeviceId {
            device,
            vendor: bindings::VIRTIO_DEV_ANY_ID,
        }
    }
}

// SAFETY: It is its own raw type, which has the layout of the C struct.
unsafe impl RawDeviceId for DeviceId {
    type RawType = Self;
}

/// The devices that a driver is for.
pub(crate) type IdTable = &'static dyn device_id::IdTable<DeviceId, ()>;

/// A driver, and what it has of one device.
pub(crate) trait Driver: Send + Sync + Sized + 'static {
    /// What is sent to the host.
    type Request: AsBytes + Send;
    /// What it answers.
    type Response: FromBytes + Copy + Send;

    /// What is common to all devices.
    type Context: Send + Sync;

    /// The devices that it is for.
    const ID_TABLE: IdTable;
    /// The features that it knows, by their bits.
    const FEATURES: &'static [u32];
    /// The name of the queue, in `/proc/interrupts`.
    const QUEUE: &'static CStr;

    /// Gives up features that the device offers, and that it could not keep.
    ///
    /// # Errors
    ///
    /// Those with which the device is not taken.
    fn validate(device: &mut Device) -> Result;

    /// Looks at a device. Nothing that is sent is served before [`Driver::start`].
    ///
    /// # Errors
    ///
    /// Those with which the device is not taken.
    fn probe(
        context: &Self::Context,
        device: &Device,
        queue: Queue<Self::Request, Self::Response>,
    ) -> Result<impl PinInit<Self, Error>>;

    /// Begins to use the device.
    ///
    /// # Errors
    ///
    /// Those with which the device is not taken; [`Driver::unbind`] comes next.
    fn start(this: ArcBorrow<'_, Self>, context: &Self::Context, device: &Device) -> Result;

    /// The host has answered, or the queue is broken. Runs with interrupts off, also before
    /// [`Driver::start`], and until [`Driver::unbind`] and [`Driver::pause`] have returned.
    fn notified(&self);

    /// The host must not answer this one any more: the device was reset. One that does all the same
    /// writes to the buffer, wherever that is then.
    fn returned(&self, buffer: KBox<Buffer<Self::Request, Self::Response>>);

    /// The device says that it does nothing until it is reset. May sleep.
    fn needs_reset(&self);

    /// The host is about to be asked to forget what it was sent, as the machine is suspended or the
    /// device is reset: nothing that is sent is served before [`Driver::resume`].
    fn pause(&self);

    /// The device is usable again after [`Driver::pause`].
    fn resume(&self);

    /// Ends all use of the device, which still works, unless it is gone.
    fn unbind(this: ArcBorrow<'_, Self>);
}

/// A virtio device, while a driver is given it.
#[repr(transparent)]
pub(crate) struct Device(Opaque<bindings::virtio_device>);

impl Device {
    /// # Safety
    ///
    /// `device` is valid for as long as the result is used, and nobody changes its features meanwhile.
    unsafe fn from_raw<'a>(device: *mut bindings::virtio_device) -> &'a mut Self {
        // SAFETY: By the function's contract; the type is transparent.
        unsafe { &mut *device.cast() }
    }

    fn as_raw(&self) -> *mut bindings::virtio_device {
        self.0.get()
    }

    /// Its name on the virtio bus.
    pub(crate) fn name(&self) -> &CStr {
        // SAFETY: The device is valid, and its name does not change while a driver has it.
        unsafe { CStr::from_char_ptr(bindings::pmem_helper_virtio_name(self.as_raw())) }
    }

    /// Whether driver and device both have `feature`, a bit.
    pub(crate) fn has_feature(&self, feature: u32) -> bool {
        // SAFETY: The device is valid; any number will do.
        unsafe { bindings::pmem_helper_virtio_has_feature(self.as_raw(), feature) }
    }

    /// Gives up `feature`, a bit, which only [`Driver::validate`] can do.
    pub(crate) fn clear_feature(&mut self, feature: u32) {
        // SAFETY: As above.
        unsafe { bindings::pmem_helper_virtio_clear_feature(self.as_raw(), feature) };
    }

    /// Reads the little-endian number of 64 bits at byte `offset` of the configuration space, in one
    /// piece: not while the host changes it.
    ///
    /// # Errors
    ///
    /// `ENODEV`: there is no configuration space.
    pub(crate) fn config_le64(&self, offset: u32) -> Result<u64> {
        let mut value = 0;
        // SAFETY: The device is valid, and so is `value`.
        to_result(unsafe {
            bindings::pmem_helper_virtio_cread_le64(self.as_raw(), offset, &mut value)
        })?;
        Ok(value)
    }

    /// The physical address and the length in bytes of the shared memory region `id`, if there is one.
    pub(crate) fn shared_memory(&self, id: u8) -> Option<(u64, u64)> {
        let mut region = bindings::virtio_shm_region { addr: 0, len: 0 };
        // SAFETY: The device is valid, and so is `region`.
        let found =
            unsafe { bindings::pmem_helper_virtio_shm_region(self.as_raw(), &mut region, id) };
        found.then_some((region.addr, region.len))
    }
}

/// A request that can be sent, and room for what the host answers.
pub(crate) struct Buffer<O, I> {
    request: O,
    unanswered: I,
    response: Writable<I>,
}

/// What the host writes, which shares no cache line with what others do. That is for architectures
/// on which the cache is not coherent with devices.
#[repr(C, align(128))]
struct Writable<I>(I);

impl<O: AsBytes, I: FromBytes + Copy> Buffer<O, I> {
    /// Makes one. Until the host has written a response, that is `unanswered`, each time that it is
    /// sent. Does not sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(request: O, unanswered: I) -> Result<KBox<Self>> {
        let buffer = Buffer {
            request,
            unanswered,
            response: Writable(unanswered),
        };
        Ok(KBox::new(buffer, GFP_ATOMIC)?)
    }

    /// Gives a buffer up that the host may yet write to: its memory is nobody's any more, and is not
    /// reported as leaked.
    pub(crate) fn abandon(buffer: KBox<Self>) {
        let buffer: *const Self = KBox::leak(buffer);
        // SAFETY: It is where an allocation begins, and nobody frees that.
        unsafe { bindings::pmem_helper_kmemleak_not_leak(buffer.cast()) };
    }
}

/// What could not be sent.
pub(crate) struct Unsent<O, I> {
    /// Why.
    pub(crate) error: Error,
    /// What was to be sent, unless the queue has it, which gives it to [`Driver::returned`].
    pub(crate) buffer: Option<KBox<Buffer<O, I>>>,
}

/// What the host has answered.
pub(crate) struct Used<O, I> {
    /// To be sent again.
    pub(crate) buffer: KBox<Buffer<O, I>>,
    len: u32,
}

impl<O, I: Copy> Used<O, I> {
    /// The answer, or nothing if the host has not written all of it.
    pub(crate) fn response(&self) -> Option<I> {
        (self.len as usize >= size_of::<I>()).then_some(self.buffer.response.0)
    }
}

/// The queue of a device, which refuses while there is none.
pub(crate) struct Queue<O, I> {
    shared: Arc<Shared>,
    _buffers: PhantomData<fn(O) -> I>,
}

/// # Invariants
///
/// The queue is valid while it is there, and what is in it are pointers of `KBox<Buffer<O, I>>` with
/// the types of the one driver that has it.
#[pin_data]
struct Shared {
    #[pin]
    queue: SpinLockIrq<Option<Vq>>,
}

struct Vq(NonNull<bindings::virtqueue>);

// SAFETY: A queue belongs to no thread, only to who has the lock.
unsafe impl Send for Vq {}

impl<O: AsBytes, I: FromBytes + Copy> Queue<O, I> {
    fn from_shared(shared: Arc<Shared>) -> Self {
        Queue {
            shared,
            _buffers: PhantomData,
        }
    }

    /// Sends `buffer` to the host, which answers some time later. Does not sleep.
    ///
    /// # Errors
    ///
    /// - `ENODEV`: the device is gone, or is being reset.
    /// - `EIO`: the queue is broken.
    /// - `ENOSPC`: it is full.
    /// - `ENOMEM`: the buffer cannot be mapped for the device.
    pub(crate) fn send(&self, mut buffer: KBox<Buffer<O, I>>) -> Result<(), Unsent<O, I>> {
        buffer.response.0 = buffer.unanswered;
        let guard = self.shared.queue.lock();
        let Some(Vq(queue)) = &*guard else {
            return Err(Unsent {
                error: ENODEV,
                buffer: Some(buffer),
            });
        };
        let queue = queue.as_ptr();
        let raw = KBox::into_raw(buffer);
        // SAFETY: The buffer is from kmalloc, whose memory devices can access, and stays until the
        // queue gives it back: by the invariants of `Shared` it is valid, and used under its lock.
        let added = to_result(unsafe {
            bindings::pmem_helper_virtqueue_add(
                queue,
                (&raw mut (*raw).request).cast(),
                size_of::<O>() as c_uint,
                (&raw mut (*raw).response.0).cast(),
                size_of::<I>() as c_uint,
                raw.cast(),
            )
        });
        if let Err(error) = added {
            // SAFETY: It was not added, so it is nobody's.
            let buffer = Some(unsafe { KBox::from_raw(raw) });
            return Err(Unsent { error, buffer });
        }
        // SAFETY: As above.
        if unsafe { bindings::virtqueue_kick(queue) } {
            Ok(())
        } else {
            Err(Unsent {
                error: EIO,
                buffer: None,
            })
        }
    }

    /// Takes what the host has answered first of what was not taken yet. Does not sleep.
    pub(crate) fn receive(&self) -> Option<Used<O, I>> {
        let guard = self.shared.queue.lock();
        let mut len = 0;
        // SAFETY: By the invariants of `Shared` the queue is valid, and used under its lock.
        let raw = unsafe { bindings::virtqueue_get_buf(guard.as_ref()?.0.as_ptr(), &mut len) };
        if raw.is_null() {
            return None;
        }
        // SAFETY: By the invariants of `Shared` it is a buffer that `send()` has added, and the queue
        // has given it back.
        let buffer = unsafe { KBox::from_raw(raw.cast()) };
        Some(Used { buffer, len })
    }

    /// Whether the queue is there, but does nothing any more: the device is gone, or has written what
    /// makes no sense.
    pub(crate) fn is_broken(&self) -> bool {
        self.look() == Some(false)
    }

    /// Whether the queue is there, and does something.
    pub(crate) fn is_usable(&self) -> bool {
        self.look() == Some(true)
    }

    /// If the queue is there, whether it does something.
    fn look(&self) -> Option<bool> {
        let guard = self.shared.queue.lock();
        guard.as_ref().map(|queue| {
            // SAFETY: By the invariants of `Shared` the queue is valid.
            !unsafe { bindings::virtqueue_is_broken(queue.0.as_ptr()) }
        })
    }
}

/// A device, and the driver that has it.
///
/// # Invariants
///
/// `device` is valid until `end()` has returned.
#[pin_data]
struct Bound<T: Driver> {
    device: NonNull<bindings::virtio_device>,
    shared: Arc<Shared>,
    driver: Arc<T>,
    /// Looks at the device's status.
    #[pin]
    work: Work<Bound<T>>,
}

impl_has_work! {
    impl{T: Driver} HasWork<Bound<T>> for Bound<T> { self.work }
}

// SAFETY: A virtio device belongs to no thread.
unsafe impl<T: Driver> Send for Bound<T> {}

// SAFETY: What it has can be shared.
unsafe impl<T: Driver> Sync for Bound<T> {}

impl<T: Driver> WorkItem for Bound<T> {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        // SAFETY: By the type invariants: `end()` waits for this.
        if unsafe { bindings::pmem_helper_virtio_needs_reset(this.device.as_ptr()) } {
            this.driver.needs_reset();
        }
    }
}

impl<T: Driver> Bound<T> {
    /// Makes the device's queue.
    ///
    /// # Safety
    ///
    /// `device` is valid, and has no queue.
    unsafe fn attach(device: *mut bindings::virtio_device, shared: &Shared) -> Result {
        // SAFETY: By the function's contract. The name is a static.
        let queue = from_err_ptr(unsafe {
            bindings::pmem_helper_virtio_find_vq(
                device,
                Some(Self::notified),
                T::QUEUE.as_char_ptr(),
            )
        })?;
        // INVARIANT: Just made, and empty.
        *shared.queue.lock() = Some(Vq(NonNull::new(queue).ok_or(ENODEV)?));
        Ok(())
    }

    /// Makes the device forget what it was sent, and takes its queue away, if there is one.
    ///
    /// That is taken from the driver first, so that nobody notifies the host while it resets the device.
    /// The host may interrupt until it has, and one that does as it likes until the queue is no more.
    ///
    /// # Safety
    ///
    /// `device` is valid, and `shared` has its queue. What was [`Self::set`] lives until this returns.
    unsafe fn detach(device: *mut bindings::virtio_device, shared: &Shared, driver: Option<&T>) {
        let queue = shared.queue.lock().take();
        // SAFETY: By the function's contract. Callbacks that have taken an answer have ended then.
        unsafe {
            bindings::virtio_reset_device(device);
            bindings::pmem_helper_virtio_synchronize_cbs(device);
        }
        let Some(queue) = queue else {
            return;
        };
        loop {
            // SAFETY: By the function's contract; nobody else has the queue.
            let raw = unsafe { bindings::virtqueue_detach_unused_buf(queue.0.as_ptr()) };
            if raw.is_null() {
                break;
            }
            // SAFETY: By the invariants of `Shared`; the host does not know it any more.
            let buffer = unsafe { KBox::from_raw(raw.cast()) };
            if let Some(driver) = driver {
                driver.returned(buffer);
            }
        }
        // SAFETY: By the function's contract. Its only queue is used no more. No callback runs when this
        // returns.
        unsafe { bindings::pmem_helper_virtio_del_vqs(device) };
    }

    /// What `probe()` has made of a device, or nothing before it is that far.
    ///
    /// # Safety
    ///
    /// `device` is valid, and its driver is `T`, and stays so while the result is used.
    unsafe fn of<'a>(device: *mut bindings::virtio_device) -> Option<ArcBorrow<'a, Self>> {
        // SAFETY: By the function's contract. Interrupts may come before the pointer is set.
        let bound = unsafe {
            AtomicPtr::from_ptr(bindings::pmem_helper_virtio_priv(device)).load(Ordering::Acquire)
        };
        // SAFETY: It is null, or points to what lives until the queue is no more, which waits for
        // callbacks.
        (!bound.is_null()).then(|| unsafe { ArcBorrow::from_raw(bound.cast::<Self>()) })
    }

    /// # Safety
    ///
    /// As for [`Self::of`]. `bound` is null, or lives until [`Self::detach`] has returned.
    unsafe fn set(device: *mut bindings::virtio_device, bound: *const Self) {
        // SAFETY: By the function's contract.
        unsafe {
            AtomicPtr::from_ptr(bindings::pmem_helper_virtio_priv(device))
                .store(bound.cast_mut().cast(), Ordering::Release)
        };
    }

    /// # Safety
    ///
    /// Called by the transport with the queue of `attach()`.
    unsafe extern "C" fn notified(queue: *mut bindings::virtqueue) {
        // SAFETY: By the function's contract; `detach()` waits for this.
        if let Some(bound) = unsafe { Self::of((*queue).vdev) } {
            bound.driver.notified();
        }
    }

    /// Takes a device.
    ///
    /// # Safety
    ///
    /// `device` is valid, and a driver is being bound to it.
    unsafe fn probe(
        device: *mut bindings::virtio_device,
        context: &T::Context,
    ) -> Result<Arc<Self>> {
        let shared = Arc::pin_init(
            pin_init!(Shared { queue <- new_spinlock_irq!(None) }),
            GFP_KERNEL,
        )?;
        // SAFETY: By the function's contract. There is nothing yet that a callback could use.
        unsafe {
            Self::set(device, null());
            Self::attach(device, &shared)?;
        }
        // SAFETY: By the function's contract.
        let bound = unsafe { Self::prepare(device, &shared, context) };
        let result = bound.and_then(|bound| {
            // SAFETY: By the function's contract.
            let given = unsafe { Device::from_raw(device) };
            match T::start(bound.driver.as_arc_borrow(), context, given) {
                Ok(()) => Ok(bound),
                Err(error) => {
                    // SAFETY: By the function's contract.
                    unsafe { bound.end() };
                    Err(error)
                }
            }
        });
        if result.is_err() {
            // SAFETY: By the function's contract.
            unsafe { Self::detach(device, &shared, None) };
        }
        result
    }

    /// Lets the driver look at the device, and the host serve its queue.
    ///
    /// # Safety
    ///
    /// As for [`Self::probe`]; `shared` has the queue.
    unsafe fn prepare(
        device: *mut bindings::virtio_device,
        shared: &Arc<Shared>,
        context: &T::Context,
    ) -> Result<Arc<Self>> {
        // SAFETY: By the function's contract.
        let given = unsafe { Device::from_raw(device) };
        let driver = Arc::pin_init(
            T::probe(context, given, Queue::from_shared(shared.clone()))?,
            GFP_KERNEL,
        )?;
        // INVARIANT: By the function's contract.
        let bound = Arc::pin_init(
            pin_init!(Bound {
                device: NonNull::new(device).ok_or(EINVAL)?,
                shared: shared.clone(),
                driver,
                work <- new_work!("virtio_status"),
            }? Error),
            GFP_KERNEL,
        )?;
        // SAFETY: By the function's contract.
        unsafe {
            Self::set(device, &*bound);
            bindings::pmem_helper_virtio_ready(device);
        }
        Ok(bound)
    }

    /// Ends the use of the device, and takes its queue away. No callback finds `self` any more.
    ///
    /// # Safety
    ///
    /// The device is being unbound.
    unsafe fn end(&self) {
        let device = self.device.as_ptr();
        T::unbind(self.driver.as_arc_borrow());
        self.settle();
        // SAFETY: By the function's contract. A callback that has found `self` ends before `detach()`
        // returns.
        unsafe {
            Self::set(device, null());
            Self::detach(device, &self.shared, Some(&self.driver));
        }
    }

    /// Waits for the work.
    fn settle(&self) {
        // SAFETY: The work is initialized; who changes the configuration does not enqueue it any more.
        unsafe { bindings::flush_work(Work::raw_get(&raw const self.work)) };
    }
}

/// `struct virtio_driver`, and what is given to a driver with each device.
#[repr(C)]
struct RawDriver<T: Driver> {
    driver: bindings::virtio_driver,
    context: T::Context,
}

/// The registration of a driver, with which it gets devices. When it is dropped, it loses them.
#[pin_data(PinnedDrop)]
pub(crate) struct Registration<T: Driver> {
    #[pin]
    driver: Opaque<RawDriver<T>>,
}

// SAFETY: It has no methods, and can be dropped by any thread.
unsafe impl<T: Driver> Send for Registration<T> {}

// SAFETY: As for `Send`; the context can be shared.
unsafe impl<T: Driver> Sync for Registration<T> {}

impl<T: Driver> Registration<T> {
    /// Registers a driver called `name`, which gets the devices that no other one has.
    ///
    /// # Errors
    ///
    /// - `EBUSY`: there is a driver of this name.
    /// - `ENOMEM`.
    pub(crate) fn new(
        name: &'static CStr,
        context: T::Context,
        module: &'static ThisModule,
    ) -> impl PinInit<Self, Error> {
        try_pin_init!(Registration {
            driver <- Opaque::try_ffi_init(|raw: *mut RawDriver<T>| {
                // SAFETY: A driver has pointers that may be null, functions that may be none, and
                // numbers.
                let mut driver: bindings::virtio_driver = unsafe { zeroed() };
                driver.driver.name = name.as_char_ptr();
                driver.id_table = T::ID_TABLE.as_ptr().cast();
                driver.feature_table = T::FEATURES.as_ptr();
                driver.feature_table_size = T::FEATURES.len() as c_uint;
                driver.validate = Some(Self::validate);
                driver.probe = Some(Self::probe);
                driver.remove = Some(Self::remove);
                driver.config_changed = Some(Self::config_changed);
                driver.freeze = Some(Self::pause);
                driver.restore = Some(Self::resume);
                driver.reset_prepare = Some(Self::pause);
                driver.reset_done = Some(Self::resume);
                // SAFETY: It can be written, and is pinned until it is unregistered. The tables are
                // statics.
                let registered = to_result(unsafe {
                    raw.write(RawDriver { driver, context });
                    bindings::__register_virtio_driver(raw.cast(), module.as_ptr())
                });
                if registered.is_err() {
                    // SAFETY: Just written, and nobody knows it.
                    unsafe { raw.drop_in_place() };
                }
                registered
            }),
        })
    }
}

#[pinned_drop]
impl<T: Driver> PinnedDrop for Registration<T> {
    fn drop(self: Pin<&mut Self>) {
        let raw = self.driver.get();
        // SAFETY: It is registered. When it is not any more, nobody uses it.
        unsafe {
            bindings::unregister_virtio_driver(raw.cast());
            raw.drop_in_place();
        }
    }
}

/// The functions of the driver.
///
/// All are called by the virtio bus, with a device that is valid and that this driver has, or is about
/// to have. But for `config_changed()`, it calls one at a time for a device.
impl<T: Driver> Registration<T> {
    /// # Safety
    ///
    /// See above; called between a `probe()` without an error and `remove()`.
    unsafe fn bound<'a>(device: *mut bindings::virtio_device) -> &'a Bound<T> {
        // SAFETY: By the function's contract it is what `probe()` has left there.
        unsafe { &*(*bindings::pmem_helper_virtio_priv(device)).cast::<Bound<T>>() }
    }

    /// # Safety
    ///
    /// See above.
    unsafe extern "C" fn validate(device: *mut bindings::virtio_device) -> c_int {
        from_result(|| {
            // SAFETY: By the function's contract.
            T::validate(unsafe { Device::from_raw(device) })?;
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// See above.
    unsafe extern "C" fn probe(device: *mut bindings::virtio_device) -> c_int {
        from_result(|| {
            // SAFETY: By the function's contract. The driver is that of a `RawDriver`.
            let bound = unsafe {
                let raw = bindings::pmem_helper_virtio_driver(device).cast::<RawDriver<T>>();
                Bound::<T>::probe(device, &(*raw).context)
            }?;
            // `remove()` takes it back.
            let _ = Arc::into_raw(bound);
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// See above.
    unsafe extern "C" fn remove(device: *mut bindings::virtio_device) {
        // SAFETY: By the function's contract it is what `probe()` has left there.
        unsafe { Arc::from_raw(Self::bound(device)).end() };
    }

    /// # Safety
    ///
    /// See above.
    unsafe extern "C" fn config_changed(device: *mut bindings::virtio_device) {
        // SAFETY: By the function's contract. The bus does not call this before the end of `probe()`,
        // and not from the beginning of `remove()` on.
        if let Some(bound) = unsafe { Bound::<T>::of(device) } {
            // If it is enqueued already, it has yet to look. What it calls may sleep for long; and the
            // kernel warns of work for `system()`.
            let _ = workqueue::system_long().enqueue(Arc::from(bound));
        }
    }

    /// # Safety
    ///
    /// See above.
    unsafe extern "C" fn pause(device: *mut bindings::virtio_device) -> c_int {
        // SAFETY: By the function's contract.
        let bound = unsafe { Self::bound(device) };
        bound.driver.pause();
        bound.settle();
        // SAFETY: As above.
        unsafe { Bound::<T>::detach(device, &bound.shared, Some(&bound.driver)) };
        0
    }

    /// # Safety
    ///
    /// See above; called after `pause()`.
    unsafe extern "C" fn resume(device: *mut bindings::virtio_device) -> c_int {
        from_result(|| {
            // SAFETY: By the function's contract.
            let bound = unsafe { Self::bound(device) };
            // SAFETY: As above; `pause()` has taken the queue away.
            unsafe { Bound::<T>::attach(device, &bound.shared) }
                .inspect_err(|_| bound.driver.needs_reset())?;
            // SAFETY: As above.
            unsafe { bindings::pmem_helper_virtio_ready(device) };
            bound.driver.resume();
            Ok(0)
        })
    }
}
