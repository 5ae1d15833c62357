// SPDX-License-Identifier: GPL-2.0-only

//! Memory that is added to the system while it runs, of which some pages are held back.
//!
//! A page of such memory is in one of these states:
//!
//! | state | struct page | whose |
//! |---|---|---|
//! | held, fresh | `PageOffline()`, one reference, dirty | the driver's, since the memory was onlined |
//! | held, taken | `PageOffline()`, one reference | the driver's, which has allocated it |
//! | released | whatever the page allocator makes of it | the system's |
//!
//! A held page is not counted as memory (`MemTotal`), is not dumped, and is skipped when its memory
//! block goes offline: the driver then lets its reference go. A fresh one was never in the page
//! allocator, and gets there through `generic_online_page()`. All of this is how the kernel wants
//! it of drivers, see `PageOffline()` in `include/linux/page-flags.h`.
//!
//! Which pages are held is in a bitmap of the driver's: the struct pages are new whenever a memory
//! block comes online, also when it comes back because another one could not go offline.
//!
//! C headers: [`include/linux/memory_hotplug.h`](srctree/include/linux/memory_hotplug.h),
//! [`include/linux/memory.h`](srctree/include/linux/memory.h)

use super::{
    bindings,
    compat,
    mapping::check_struct_pages,
    numa::Node,
    region::Region,
    tier::Slow, //
};
use crate::pmem_core::{
    kmem::{
        bitmap::Bitmap,
        Page, //
    },
    persist::VolatileSlice, //
};
use core::{
    cell::Cell,
    marker::PhantomPinned,
    mem::ManuallyDrop,
    ops::{
        Deref,
        Range, //
    },
    ptr::{
        null_mut,
        NonNull, //
    },
    sync::atomic::AtomicU64, //
};
use kernel::{
    container_of,
    error::to_result,
    page::PAGE_SHIFT,
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Relaxed,
            Release, //
        },
        new_mutex,
        Arc,
        Mutex, //
    },
    types::Opaque, //
};

/// The bytes in a memory block, the unit in which memory is added and removed.
pub(crate) fn memory_block_size() -> u64 {
    // SAFETY: Computed once by the architecture.
    unsafe { bindings::memory_block_size_bytes() as u64 }
}

/// Whether memory that is added goes online by itself (`auto_online_blocks` in
/// `/sys/devices/system/memory`). If not, it is of no use to a driver.
///
/// Where that cannot be known before, [`Memory::plug`] finds out.
pub(crate) fn goes_online() -> bool {
    compat::default_online_type() != Some(bindings::mmop_MMOP_OFFLINE)
}

/// The memory that comes online right now, null if it is none of ours.
///
/// Set and read by one task, which has `mem_hotplug_lock` for writing: from `MEM_GOING_ONLINE` to
/// `MEM_ONLINE`, and so by the page callback in between.
static COMING_ONLINE: Atomic<*mut Inner> = Atomic::<*mut Inner>::new(null_mut());

/// The system's only page callback, shared by all memory of a driver.
#[pin_data]
pub(crate) struct Callback {
    #[pin]
    users: Mutex<usize>,
}

impl Callback {
    /// Makes one that is not in use.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new() -> Result<Arc<Self>> {
        Arc::pin_init(pin_init!(Callback { users <- new_mutex!(0) }), GFP_KERNEL)
    }

    /// Directs pages that come online to us, for the first user.
    fn get(&self) -> Result {
        let mut users = self.users.lock();
        if *users == 0 {
            // SAFETY: The callback is a function of this module, which does not go as long as
            // there are users.
            to_result(unsafe { bindings::set_online_page_callback(Some(online_page)) })
                .map_err(|_| EBUSY)?;
        }
        *users = users.wrapping_add(1);
        Ok(())
    }

    /// Undoes [`Callback::get`].
    fn put(&self) {
        let mut users = self.users.lock();
        *users = users.wrapping_sub(1);
        if *users == 0 {
            // SAFETY: Was set by `get()`. It cannot fail, as nobody else can have replaced it.
            unsafe { bindings::restore_online_page_callback(Some(online_page)) };
        }
    }
}

/// A memory group: the memory blocks that are one device.
///
/// # Invariants
///
/// Is registered.
struct Group(c_int);

impl Drop for Group {
    fn drop(&mut self) {
        // SAFETY: By the type invariant. No memory block is left in it: `Memory` sees to that.
        unsafe { bindings::memory_group_unregister(self.0) };
    }
}

/// A claimed range that can be added to the system's memory, and removed again.
///
/// While it is added, dropping it leaks it: the memory stays, and so does the module.
pub(crate) struct Memory {
    plugged: Option<Plugged>,
    node: Node,
    name: &'static CStr,
    // All of these go when the memory has gone, in this order.
    tier: ManuallyDrop<Slow>,
    group: ManuallyDrop<Group>,
    region: ManuallyDrop<Region>,
}

impl Memory {
    /// Claims the `size` bytes at `start` as memory of `node`; `name` is that of the memory in
    /// `/proc/iomem`, `System RAM (driver)`.
    ///
    /// # Errors
    ///
    /// - `EINVAL`: the range is not a multiple of memory blocks.
    /// - `EBUSY`: a part of the range is claimed already.
    /// - `ENOMEM`.
    pub(crate) fn claim(start: u64, size: u64, node: Node, name: &'static CStr) -> Result<Self> {
        let block = memory_block_size();
        if size == 0 || (start | size) & (block.wrapping_sub(1)) != 0 {
            return Err(EINVAL);
        }
        start.checked_add(size).ok_or(EINVAL)?;
        let region = Region::new(start, size, name)?;
        // SAFETY: Registers a record of its own.
        let group = unsafe {
            bindings::memory_group_register_static(node.id(), (size >> PAGE_SHIFT) as c_ulong)
        };
        if group < 0 {
            return Err(Error::from_errno(group));
        }
        // INVARIANT: Just registered.
        let group = Group(group);
        Ok(Memory {
            plugged: None,
            node,
            name,
            tier: ManuallyDrop::new(Slow::new(node)?),
            group: ManuallyDrop::new(group),
            region: ManuallyDrop::new(region),
        })
    }

    /// The range.
    pub(crate) fn region(&self) -> &Region {
        &self.region
    }

    /// The node that it is memory of.
    pub(crate) fn node(&self) -> Node {
        self.node
    }

    /// Adds the range to the system's memory, except for the pages that are set in `held`, one bit
    /// a page. Until it is removed, `module` stays loaded.
    ///
    /// # Errors
    ///
    /// Nothing has changed then.
    ///
    /// - `EINVAL`: `held` has too few bits, or the kernel refuses the range.
    /// - `EEXIST`: it is added already.
    /// - `EBUSY`: another driver, such as virtio-mem, has the system's page callback.
    /// - `EAGAIN`: added memory does not go online by itself, or not all of it did.
    /// - `ENODEV`: the module is being unloaded.
    /// - `ENOMEM`.
    pub(crate) fn plug(
        &mut self,
        held: KVVec<AtomicU64>,
        callback: Arc<Callback>,
        module: &'static ThisModule,
    ) -> Result {
        if self.plugged.is_some() {
            return Err(EEXIST);
        }
        self.region.open_for_memory(true);
        match self.try_plug(held, callback, module) {
            Ok(plugged) => self.plugged = Some(plugged),
            Err(error) => {
                self.region.open_for_memory(false);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Removes the memory from the system, if it is there. What is in held pages stays there.
    ///
    /// # Errors
    ///
    /// The memory is as it was then: pages that are not held are in use or free.
    ///
    /// - `EBUSY`: a page that is in use cannot be moved.
    /// - `EINTR`: a signal came.
    /// - `ENOMEM`.
    pub(crate) fn unplug(&mut self) -> Result {
        if let Some(plugged) = &self.plugged {
            plugged.inner.remove()?;
            self.plugged = None;
            self.region.open_for_memory(false);
        }
        Ok(())
    }

    fn try_plug(
        &self,
        held: KVVec<AtomicU64>,
        callback: Arc<Callback>,
        module: &'static ThisModule,
    ) -> Result<Plugged> {
        let pages = self.region.size() >> PAGE_SHIFT;
        if Bitmap::new(&held).len() < pages {
            return Err(EINVAL);
        }
        if !goes_online() {
            return Err(EAGAIN);
        }
        check_struct_pages(self.region.size())?;
        let inner = KBox::pin(
            Inner {
                // The chain keeps what it needs in here.
                notifier: Opaque::new(bindings::notifier_block {
                    notifier_call: Some(notify),
                    ..Default::default()
                }),
                first: self.region.start() >> PAGE_SHIFT,
                pages,
                node: self.node.id(),
                // SAFETY: Only computes the address at which the memory will be mapped.
                base: unsafe { bindings::pmem_helper_phys_to_virt(self.region.start()) }.cast(),
                held,
                online: Atomic::new(0),
                movable: Atomic::new(false),
                removing: Atomic::new(false),
                let_go: Atomic::new(false),
                _pin: PhantomPinned,
            },
            GFP_KERNEL,
        )?;
        let plugged = Plugged {
            inner: Registered::new(inner)?,
            _callback: CallbackUse::new(callback)?,
            _module: ModuleUse::new(module)?,
        };

        // SAFETY: The range is claimed by `self`; the name is in this module, which stays loaded
        // as long as the memory is there.
        to_result(unsafe {
            bindings::add_memory_driver_managed(
                self.group.0,
                self.region.start(),
                self.region.size(),
                self.name.as_char_ptr(),
                bindings::PMEM_CONST_MHP_NID_IS_MGID,
            )
        })?;
        if plugged.inner.is_partial() {
            // What did come online can go again, unless somebody was quick to use it for something
            // that cannot move. Then it has to stay.
            match plugged.inner.remove() {
                Ok(()) => return Err(EAGAIN),
                Err(_) => pr_err!(
                    "memory at {:#x}: a part did not go online, and the rest cannot be removed\n",
                    self.region.start()
                ),
            }
        }
        Ok(plugged)
    }
}

/// A claimed range that is no memory, mapped write-back cacheable.
///
/// # Invariants
///
/// The range of `memory` is mapped at `addr` until `memunmap()`.
pub(crate) struct Window<'a> {
    addr: NonNull<u8>,
    memory: &'a Memory,
}

impl<'a> Window<'a> {
    /// Maps the range of `memory`, which cannot be added meanwhile.
    ///
    /// # Errors
    ///
    /// - `EEXIST`: it is added already.
    /// - `ENOMEM`: no memory or no addresses for the mapping.
    pub(crate) fn new(memory: &'a Memory) -> Result<Self> {
        if memory.plugged.is_some() {
            return Err(EEXIST);
        }
        // SAFETY: Nobody else has a mapping that this one could conflict with, as the range is
        // claimed.
        let addr = unsafe {
            bindings::memremap(
                memory.region.start(),
                usize::try_from(memory.region.size())?,
                bindings::PMEM_CONST_MEMREMAP_WB,
            )
        };
        Ok(Window {
            // INVARIANT: Just mapped.
            addr: NonNull::new(addr.cast()).ok_or(ENOMEM)?,
            memory,
        })
    }

    /// All of it.
    pub(crate) fn slice(&self) -> VolatileSlice<'_> {
        // SAFETY: By the type invariant; 64-bit only, so that the size fits.
        unsafe { VolatileSlice::new(self.addr.as_ptr(), self.memory.region.size() as usize) }
    }
}

impl Drop for Window<'_> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant.
        unsafe { bindings::memunmap(self.addr.as_ptr().cast()) };
    }
}

/// A use of the [`Callback`].
struct CallbackUse(Arc<Callback>);

impl CallbackUse {
    fn new(callback: Arc<Callback>) -> Result<Self> {
        callback.get()?;
        Ok(CallbackUse(callback))
    }
}

impl Drop for CallbackUse {
    fn drop(&mut self) {
        self.0.put();
    }
}

/// Keeps a module loaded.
///
/// # Invariants
///
/// Holds a reference.
struct ModuleUse(&'static ThisModule);

impl ModuleUse {
    fn new(module: &'static ThisModule) -> Result<Self> {
        // SAFETY: The pointer is that of a module, or null for the kernel itself.
        if unsafe { bindings::try_module_get(module.as_ptr()) } {
            // INVARIANT: Just got.
            Ok(ModuleUse(module))
        } else {
            Err(ENODEV)
        }
    }
}

impl Drop for ModuleUse {
    fn drop(&mut self) {
        // SAFETY: By the type invariant.
        unsafe { bindings::module_put(self.0.as_ptr()) };
    }
}

/// What the page callback and the notifier know of a range.
struct Inner {
    notifier: Opaque<bindings::notifier_block>,
    /// Page frame number of the first page.
    first: u64,
    pages: u64,
    node: c_int,
    /// Where the memory is mapped.
    base: *mut u8,
    held: KVVec<AtomicU64>,
    /// The pages in memory blocks that are online.
    online: Atomic<i64>,
    /// Whether some of them are in `ZONE_MOVABLE`.
    movable: Atomic<bool>,
    /// Whether it is us who take the memory offline.
    removing: Atomic<bool>,
    /// Whether the references to held pages of the memory block in question are gone.
    let_go: Atomic<bool>,
    _pin: PhantomPinned,
}

// SAFETY: The notifier block is the chain's, which has a lock; `base` is only computed with.
unsafe impl Send for Inner {}

// SAFETY: As for `Send`; everything else is atomic or never changes.
unsafe impl Sync for Inner {}

impl Inner {
    fn held(&self) -> Bitmap<'_> {
        Bitmap::new(&self.held)
    }

    /// Whether some of it is not online, as the kernel had no memory to do that.
    fn is_partial(&self) -> bool {
        self.online.load(Relaxed) as u64 != self.pages
    }

    /// The struct page of `page`.
    ///
    /// It is valid as long as the memory is there, which callers know, and `page` is in the range.
    fn page(&self, page: u64) -> *mut bindings::page {
        // SAFETY: Computes an address.
        unsafe { bindings::pmem_helper_pfn_to_page(self.first.wrapping_add(page) as c_ulong) }
    }

    /// The number of the page frame `pfn` in the range, if it is there.
    fn number(&self, pfn: u64) -> Option<u64> {
        pfn.checked_sub(self.first).filter(|&n| n < self.pages)
    }

    /// The pages of `count` page frames from `pfn` on that are in the range.
    fn overlap(&self, pfn: u64, count: u64) -> Range<u64> {
        let end = pfn
            .saturating_add(count)
            .min(self.first.saturating_add(self.pages));
        let start = pfn.max(self.first);
        start.saturating_sub(self.first)..end.saturating_sub(self.first)
    }

    /// Pages that come online: releases those that are not held.
    fn come_online(&self, pages: Range<u64>) {
        // SAFETY: Coming online, its struct page is initialized.
        let zone = unsafe { bindings::pmem_helper_page_zonenum(self.page(pages.start)) };
        if zone == bindings::zone_type_ZONE_MOVABLE {
            self.movable.store(true, Relaxed);
        }

        for (page, count) in self.held().ones(pages.clone()) {
            // SAFETY: As above; nobody else knows the pages.
            unsafe {
                bindings::pmem_helper_kasan_unpoison_pages(self.page(page), count as c_ulong)
            };
            for page in page..page.wrapping_add(count) {
                // SAFETY: As above; nobody else knows the page. A mark for `release()`.
                unsafe { bindings::pmem_helper_set_page_dirty(self.page(page)) };
            }
        }
        for (mut page, mut count) in self.held().zeros(pages) {
            while count != 0 {
                let order = self
                    .first
                    .wrapping_add(page)
                    .trailing_zeros()
                    .min(count.ilog2())
                    .min(bindings::PMEM_CONST_MAX_PAGE_ORDER);
                // SAFETY: `2^order` pages that come online, aligned to their number, and not held.
                unsafe { bindings::generic_online_page(self.page(page), order) };
                page = page.wrapping_add(1 << order);
                count = count.wrapping_sub(1 << order);
            }
        }
    }

    /// Lets the references to held pages go, or gets them again.
    fn let_go(&self, pages: Range<u64>, go: bool) {
        for (page, count) in self.held().ones(pages) {
            for page in page..page.wrapping_add(count) {
                let page = self.page(page);
                // SAFETY: A held page has one reference, ours; nobody frees or takes pages of the
                // range while we remove it. One that was let go and is still `PageOffline()` is
                // still ours.
                unsafe {
                    if !go {
                        bindings::pmem_helper_page_ref_inc(page);
                    } else if !bindings::pmem_helper_page_ref_dec_and_test(page) {
                        pr_warn!("a held page has a reference that is not ours\n");
                    }
                }
            }
        }
    }

    /// Marks pages as held that were just allocated.
    fn hold(&self, pages: Range<u64>) {
        for page in pages {
            // SAFETY: Allocated, and not known to anybody but the caller.
            unsafe { bindings::pmem_helper_set_page_offline(self.page(page)) };
            self.held().set(page);
        }
    }

    /// Takes all of it offline and removes it, or leaves it as it is.
    fn remove(&self) -> Result {
        self.removing.store(true, Release);
        // SAFETY: The memory was added by us, in this size.
        let ret = to_result(unsafe {
            bindings::offline_and_remove_memory(self.first << PAGE_SHIFT, self.pages << PAGE_SHIFT)
        });
        self.removing.store(false, Release);
        ret
    }
}

/// What is on the notifier chain.
struct Registered(Pin<KBox<Inner>>);

impl Registered {
    fn new(inner: Pin<KBox<Inner>>) -> Result<Self> {
        // SAFETY: The block is pinned, and is unregistered before it is freed.
        to_result(unsafe { bindings::register_memory_notifier(inner.notifier.get()) })?;
        Ok(Registered(inner))
    }
}

impl Deref for Registered {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.0
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        // SAFETY: Was registered by `new()`. Waits until no call is in flight.
        unsafe { bindings::unregister_memory_notifier(self.0.notifier.get()) };
    }
}

/// The page callback.
///
/// # Safety
///
/// Called by `online_pages()` with `2^order` pages that come online.
unsafe extern "C" fn online_page(page: *mut bindings::page, order: c_uint) {
    // SAFETY: Not null only between two notifications of `Inner`, which lives until it is
    // unregistered.
    let inner = unsafe { COMING_ONLINE.load(Relaxed).as_ref() };
    if let Some(inner) = inner {
        // SAFETY: By the function's contract.
        let pfn = unsafe { bindings::pmem_helper_page_to_pfn(page) } as u64;
        if let Some(first) = inner.number(pfn) {
            // Memory blocks are ours wholly or not at all.
            inner.come_online(first..first.wrapping_add(1 << order));
            return;
        }
    }
    // SAFETY: By the function's contract; memory of somebody else.
    unsafe { bindings::generic_online_page(page, order) };
}

/// The memory notifier.
///
/// # Safety
///
/// Called by the memory notifier chain with the notifier block of an [`Inner`], and `arg` is a
/// `struct memory_notify`.
unsafe extern "C" fn notify(
    block: *mut bindings::notifier_block,
    action: c_ulong,
    arg: *mut c_void,
) -> c_int {
    // SAFETY: By the function's contract; `Opaque` is transparent.
    let (inner, arg) = unsafe {
        let block = block.cast::<Opaque<bindings::notifier_block>>();
        (
            &*container_of!(block, Inner, notifier),
            &*arg.cast::<bindings::memory_notify>(),
        )
    };
    let pages = inner.overlap(arg.start_pfn as u64, arg.nr_pages as u64);
    if pages.is_empty() {
        return bindings::NOTIFY_DONE as c_int;
    }
    let count = pages.end.saturating_sub(pages.start) as i64;
    match action as bindings::memory_block_state {
        bindings::memory_block_state_MEM_GOING_ONLINE => {
            COMING_ONLINE.store(core::ptr::from_ref(inner).cast_mut(), Relaxed);
        }
        bindings::memory_block_state_MEM_ONLINE => {
            COMING_ONLINE.store(null_mut(), Relaxed);
            inner.online.add(count, Relaxed);
        }
        bindings::memory_block_state_MEM_CANCEL_ONLINE => {
            COMING_ONLINE.store(null_mut(), Relaxed);
        }
        bindings::memory_block_state_MEM_GOING_OFFLINE => {
            if !inner.removing.load(Acquire) {
                pr_info!(
                    "memory at {:#x} cannot go offline alone, only with all of its range\n",
                    (arg.start_pfn as u64) << PAGE_SHIFT
                );
                return (bindings::NOTIFY_STOP_MASK | (bindings::NOTIFY_OK + bindings::EBUSY))
                    as c_int;
            }
            inner.let_go(pages, true);
            inner.let_go.store(true, Relaxed);
        }
        bindings::memory_block_state_MEM_OFFLINE => {
            inner.let_go.store(false, Relaxed);
            inner.online.add(count.wrapping_neg(), Relaxed);
        }
        bindings::memory_block_state_MEM_CANCEL_OFFLINE => {
            // Also comes if we were never asked.
            if inner.let_go.load(Relaxed) {
                inner.let_go(pages, false);
                inner.let_go.store(false, Relaxed);
            }
        }
        _ => {}
    }
    bindings::NOTIFY_OK as c_int
}

/// What memory has as long as it is there, in the order in which it goes.
struct Plugged {
    inner: Registered,
    _callback: CallbackUse,
    _module: ModuleUse,
}

/// How much is done to get a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Effort {
    /// Takes one that is free.
    NoWait,
    /// Reclaims memory once, if it needs no I/O.
    Reclaim,
    /// Takes one that is free, and be it kept for emergencies.
    Reserves,
}

/// Pages that can be taken without I/O.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// Those of processes, not of files: what is in them can be moved.
    Process,
    /// Free ones, also those that the page allocator keeps for emergencies.
    Free,
}

impl Memory {
    fn inner(&self) -> Option<&Inner> {
        self.plugged.as_ref().map(|plugged| &*plugged.inner)
    }

    /// The pages in the range.
    #[inline]
    pub(crate) fn pages(&self) -> u64 {
        self.region.size() >> PAGE_SHIFT
    }

    /// The memory, of which only held pages are the caller's; nothing while it is not added.
    #[inline]
    pub(crate) fn slice(&self) -> Option<VolatileSlice<'_>> {
        let inner = self.inner()?;
        // SAFETY: Mapped write-back until the memory is removed, for which `self` is borrowed
        // mutably. Others may access it, which a `VolatileSlice` allows.
        Some(unsafe { VolatileSlice::new(inner.base, (inner.pages << PAGE_SHIFT) as usize) })
    }

    /// Whether it is in `ZONE_MOVABLE`, at least a part of it.
    pub(crate) fn is_movable(&self) -> bool {
        self.inner()
            .is_some_and(|inner| inner.movable.load(Relaxed))
    }

    /// How many pages are not held.
    pub(crate) fn released(&self) -> u64 {
        self.inner().map_or(0, |inner| {
            inner
                .held()
                .zeros(0..inner.pages)
                .fold(0, |sum, (_, count)| sum.wrapping_add(count))
        })
    }

    /// The first run of pages from `from` on that are not held, at most `most` of them.
    pub(crate) fn next_released(&self, from: Page, most: u64) -> Option<(Page, u64)> {
        let inner = self.inner()?;
        let (page, count) = inner.held().zeros(from.0..inner.pages).next()?;
        Some((Page(page), count.min(most)))
    }

    /// Whether `page` is held.
    pub(crate) fn is_held(&self, page: Page) -> bool {
        self.inner().is_some_and(|inner| inner.held().test(page.0))
    }

    /// Begins to take pages from the page allocator, and to release them to it.
    pub(crate) fn exchange(&self) -> Exchange<'_> {
        Exchange {
            memory: self,
            managed: Cell::new(None),
        }
    }

    /// The first run of pages from `from` on of this kind, at most a few hundred.
    ///
    /// It may not be true any more when this returns.
    pub(crate) fn next(&self, from: Page, kind: Kind) -> Option<(Page, u64)> {
        // What is not online has struct pages that mean nothing.
        let inner = self.inner().filter(|inner| !inner.is_partial())?;
        let end = inner.first.wrapping_add(inner.pages);
        let mut count = 0;
        // SAFETY: The struct pages of the range are there as long as the memory is, which is as
        // long as `self` is not borrowed mutably.
        let pfn = unsafe {
            bindings::pmem_helper_next_pages(
                inner.first.saturating_add(from.0) as c_ulong,
                end as c_ulong,
                kind == Kind::Free,
                &mut count,
            )
        };
        let page = inner.number(pfn as u64)?;
        (count != 0).then_some((Page(page), count as u64))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Some(plugged) = self.plugged.take() {
            pr_err!(
                "memory at {:#x} is still there, and stays\n",
                self.region.start()
            );
            core::mem::forget(plugged);
            return;
        }
        // SAFETY: Each is dropped once, here.
        unsafe {
            ManuallyDrop::drop(&mut self.tier);
            ManuallyDrop::drop(&mut self.group);
            ManuallyDrop::drop(&mut self.region);
        }
    }
}

/// Pages that go from the page allocator to the driver and back.
///
/// How many pages a zone has is told to the system when this is dropped: that takes it longer than
/// to allocate or to free one.
pub(crate) struct Exchange<'a> {
    memory: &'a Memory,
    /// A page of the zone that pages have come to or gone from, and how many more it has.
    managed: Cell<Option<(NonNull<bindings::page>, i64)>>,
}

impl Exchange<'_> {
    /// Takes a page from the page allocator, and holds it.
    ///
    /// `None` if there is none in the range, which need not mean that there is none at all: the
    /// allocator can be asked for pages of a node alone, and gives up early if so told.
    pub(crate) fn alloc(&self, effort: Effort) -> Option<Page> {
        let inner = self.memory.inner()?;
        let mut gfp = bindings::PMEM_CONST___GFP_THISNODE | bindings::PMEM_CONST___GFP_NOWARN;
        gfp |= match effort {
            Effort::NoWait => {
                bindings::PMEM_CONST_GFP_NOWAIT | bindings::PMEM_CONST___GFP_NOMEMALLOC
            }
            Effort::Reclaim => {
                bindings::PMEM_CONST_GFP_NOIO
                    | bindings::PMEM_CONST___GFP_NORETRY
                    | bindings::PMEM_CONST___GFP_NOMEMALLOC
            }
            Effort::Reserves => {
                bindings::PMEM_CONST_GFP_NOWAIT | bindings::PMEM_CONST___GFP_MEMALLOC
            }
        };
        if inner.movable.load(Relaxed) {
            // Held pages do not move, but do not keep their memory block from going offline.
            gfp |= bindings::PMEM_CONST___GFP_MOVABLE | bindings::PMEM_CONST___GFP_HIGHMEM;
        }
        // SAFETY: The node has been online since the memory was added to it.
        let raw = NonNull::new(unsafe { bindings::pmem_helper_alloc_page_node(inner.node, gfp) })?;
        // SAFETY: Just allocated.
        let pfn = unsafe { bindings::pmem_helper_page_to_pfn(raw.as_ptr()) } as u64;
        let Some(page) = inner.number(pfn) else {
            // Other memory was added to the node since.
            // SAFETY: Just allocated.
            unsafe { bindings::pmem_helper_free_page(raw.as_ptr()) };
            return None;
        };
        inner.hold(page..page.wrapping_add(1));
        self.count(inner.page(page), -1);
        Some(Page(page))
    }

    /// Takes `count` pages from `first` on, whoever uses them: they are moved elsewhere.
    ///
    /// # Errors
    ///
    /// None is taken then.
    ///
    /// - `EINVAL`: not a part of the range.
    /// - `EBUSY`: one of them cannot be moved, or not all of the range is online.
    /// - `ENOMEM`: there is no room elsewhere.
    pub(crate) fn take(&self, first: Page, count: u64, may_do_io: bool) -> Result {
        let inner = self.memory.inner().ok_or(EINVAL)?;
        let end = first.0.checked_add(count).filter(|&end| end <= inner.pages);
        let end = end.ok_or(EINVAL)?;
        if count == 0 {
            return Ok(());
        }
        if inner.is_partial() {
            return Err(EBUSY);
        }
        let gfp = bindings::PMEM_CONST___GFP_NOWARN
            | bindings::PMEM_CONST___GFP_RETRY_MAYFAIL
            | if may_do_io {
                bindings::GFP_KERNEL
            } else {
                bindings::PMEM_CONST_GFP_NOIO
            };
        // SAFETY: The page frames are memory of one node, in memory blocks that are online. (The
        // range may have several zones; then the call fails, which is fine.)
        to_result(unsafe {
            bindings::pmem_helper_alloc_contig_range(
                inner.first.wrapping_add(first.0) as c_ulong,
                inner.first.wrapping_add(end) as c_ulong,
                gfp,
            )
        })?;
        inner.hold(first.0..end);
        self.count(inner.page(first.0), (count as i64).wrapping_neg());
        Ok(())
    }

    /// Releases a page that is held. One that is not is left alone.
    pub(crate) fn release(&self, page: Page) {
        let Some(inner) = self.memory.inner() else {
            return;
        };
        // If not all of the memory is online, this page may be in a part that is not.
        if inner.is_partial() || !inner.held().clear(page.0) {
            return;
        }
        let raw = inner.page(page.0);
        // SAFETY: The page was held, and with its bit it has become ours to release.
        unsafe {
            bindings::pmem_helper_set_page_private(raw, 0);
            if bindings::pmem_helper_test_clear_page_dirty(raw) {
                bindings::generic_online_page(raw, 0);
            } else {
                bindings::pmem_helper_clear_page_offline(raw);
                bindings::pmem_helper_free_page(raw);
                self.count(raw, 1);
            }
        }
    }
    /// Counts `more` pages to the zone of `page`.
    fn count(&self, page: *mut bindings::page, more: i64) {
        let Some(page) = NonNull::new(page) else {
            return;
        };
        // SAFETY: A struct page of the memory, which is there as long as `self.memory` is borrowed.
        let zone = |page: NonNull<_>| unsafe { bindings::pmem_helper_page_zonenum(page.as_ptr()) };
        let counted = match self.managed.get() {
            Some((other, counted)) if zone(other) == zone(page) => counted,
            _ => {
                self.tell();
                0
            }
        };
        self.managed.set(Some((page, counted.wrapping_add(more))));
    }

    /// Tells the system what was counted.
    fn tell(&self) {
        if let Some((page, count)) = self.managed.take().filter(|&(_, count)| count != 0) {
            // SAFETY: The struct page is one of the memory, which is there as long as `self.memory`
            // is borrowed. As many pages of its zone have become memory, or are none any more.
            unsafe { bindings::adjust_managed_page_count(page.as_ptr(), count as c_long) };
        }
    }
}

impl Drop for Exchange<'_> {
    fn drop(&mut self) {
        self.tell();
    }
}

/// A stack of held pages, linked through their struct pages.
pub(crate) struct PageStack {
    /// One more than the page's number, 0 for none.
    top: u64,
    len: u64,
}

impl PageStack {
    /// An empty one.
    pub(crate) const fn new() -> Self {
        PageStack { top: 0, len: 0 }
    }

    /// How many pages are on it.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Puts `page` on it, which is held in `memory`, as are all others here. Another one is left
    /// alone.
    pub(crate) fn push(&mut self, memory: &Memory, page: Page) {
        let Some(inner) = memory.inner() else { return };
        if !inner.held().test(page.0) {
            return;
        }
        // SAFETY: A held page's `private` is the driver's.
        unsafe { bindings::pmem_helper_set_page_private(inner.page(page.0), self.top as c_ulong) };
        self.top = page.0.wrapping_add(1);
        self.len = self.len.wrapping_add(1);
    }

    /// Takes the page that was put on it last.
    pub(crate) fn pop(&mut self, memory: &Memory) -> Option<Page> {
        let inner = memory.inner()?;
        let page = self.top.checked_sub(1).filter(|&page| page < inner.pages)?;
        // SAFETY: As in `push()`.
        self.top = unsafe { bindings::pmem_helper_page_private(inner.page(page)) } as u64;
        self.len = self.len.wrapping_sub(1);
        Some(Page(page))
    }
}
