// SPDX-License-Identifier: GPL-2.0-only

//! A range and its states.
//!
//! | state | memory | pages without data | disk |
//! |---|---|---|---|
//! | `online` | added | RAM | there |
//! | `offline` | added | kept by the driver | there |
//! | `unplugged` | removed | nobody's | gone |
//!
//! The attribute `state` moves a range from each to each other. Until it is unplugged, the module
//! stays loaded. What does not work leaves the range in the state in which it was.

use super::{
    Contents,
    Format,
    Instance,
    Setting,
    Shared, //
};
use crate::{
    kapi::{
        attribute::{
            self,
            Attributes, //
        },
        compat::this_module,
        hotplug::{
            self,
            Memory,
            Window, //
        },
        mc::Checked,
        numa::Node,
        random,
        region, //
    },
    pmem_core::{
        kmem::{
            bitmap::Bitmap,
            layout::Layout,
            superblock::{
                self,
                Place,
                ProbeError,
                State,
                Superblock,
                Uuid, //
            },
            Page,
            PAGE_SIZE, //
        },
        persist::VolatileSlice,
        range::PhysRange,
        size::Size, //
    },
    LocalModule, //
};
use core::sync::atomic::AtomicU64;
use kernel::{
    new_mutex,
    prelude::*,
    str::CString,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        Mutex,
        MutexGuard, //
    },
};

/// Claims `range` for memory of its node.
///
/// # Errors
///
/// Each is logged.
///
/// - `EINVAL`: the range is not whole memory blocks, or beyond what can be memory, or of no node.
/// - `EBUSY`: it is System RAM, or claimed by another driver, or its node has other memory.
/// - `ENOMEM`.
pub(super) fn claim(range: PhysRange) -> Result<Memory> {
    let block = hotplug::memory_block_size();
    if (range.start() | range.size()) % block.max(1) != 0 {
        pr_err!(
            "{}: memory is added in blocks of {}; change kmem_start and kmem_size to multiples of it\n",
            range,
            Size(block)
        );
        return Err(EINVAL);
    }
    let (first, last) = region::mappable();
    if range.start() < first || range.last() > last {
        pr_err!(
            "{}: outside of what can be memory of this machine, {:#x}-{:#x}; change kmem_start or kmem_size\n",
            range,
            first,
            last
        );
        return Err(EINVAL);
    }
    if region::meets_system_ram(range.start(), range.size())? {
        pr_err!(
            "{}: meets System RAM; reserve it on the kernel's command line: memmap={:#x}${:#x}\n",
            range,
            range.size(),
            range.start()
        );
        return Err(EBUSY);
    }
    let Some(node) = Node::target_of_phys(range.start()) else {
        pr_err!(
            "{}: firmware says no NUMA node for it, and it needs one of its own\n",
            range
        );
        return Err(EINVAL);
    };
    check_node(node)?;
    Memory::claim(range.start(), range.size(), node, c"System RAM (pmem)").inspect_err(|_| {
        pr_err!(
            "{}: claimed by another driver, see /proc/iomem; change kmem_start or kmem_size\n",
            range
        )
    })
}

/// Refuses a node that has memory.
///
/// The page allocator can be asked for pages of a node, not for those of a range: it could give
/// other memory of the node as long as there is any.
///
/// # Errors
///
/// `EBUSY`, which is logged.
fn check_node(node: Node) -> Result {
    match node.present_pages() {
        0 => Ok(()),
        pages => {
            pr_err!(
                "node {} has {} of other memory, and a range needs a node of its own; choose a range of another node\n",
                node.id(),
                Size(pages.saturating_mul(PAGE_SIZE))
            );
            Err(EBUSY)
        }
    }
}

/// One bit a node: those of which there is a range.
static NODES: [AtomicU64; 16] = [const { AtomicU64::new(0) }; 16];

/// The only range of a node.
struct NodeClaim(Node);

impl NodeClaim {
    fn new(node: Node) -> Result<Self> {
        match u64::try_from(node.id()) {
            Ok(bit) if !Bitmap::new(&NODES).set(bit) => Ok(NodeClaim(node)),
            _ => Err(EBUSY),
        }
    }
}

impl Drop for NodeClaim {
    fn drop(&mut self) {
        if let Ok(bit) = u64::try_from(self.0.id()) {
            Bitmap::new(&NODES).clear(bit);
        }
    }
}

/// A range that is RAM and storage at once.
#[pin_data]
pub(super) struct Range {
    setting: Setting,
    #[pin]
    state: Mutex<Inner>,
    /// Whether users may change the state.
    admits: Atomic<bool>,
    _node: NodeClaim,
}

struct Inner {
    // In the order in which they go.
    running: Option<Running>,
    /// Nobody else has it unless `running`. It is taken while it changes, and gone for good if it
    /// could neither be removed nor served again.
    memory: Option<Arc<Memory>>,
    /// Whether to format the range whatever is there, once.
    force: bool,
}

/// What is there while a range is plugged.
struct Running {
    instance: KBox<dyn Instance>,
    superblock: Superblock,
    /// Whether the range stays as it was found, which is not in order.
    read_only: bool,
}

impl Running {
    /// How many pages have data, or may have: all of a range that stays as it was found.
    fn data(&self) -> u64 {
        let pages = self.superblock.layout.data();
        let pool = self.instance.pool();
        let free = pool.memory().released().saturating_add(pool.len());
        // What a write has in its hands now is counted as well.
        pages.end.saturating_sub(pages.start).saturating_sub(free)
    }
}

impl Range {
    /// A range of `memory` that is unplugged, and gets `format` if it has none.
    ///
    /// With `force` it does once if it has one.
    ///
    /// # Errors
    ///
    /// - `EBUSY`: there is another range of its node, which is logged.
    /// - `ENOMEM`.
    pub(super) fn new(
        shared: &Shared,
        memory: Memory,
        format: Option<superblock::Format>,
        force: bool,
    ) -> Result<Arc<Self>> {
        let node = memory.node();
        let node_claim = NodeClaim::new(node).inspect_err(|_| {
            pr_err!(
                "{:#x}: node {} has a range already, and has room for one; choose a range of another node\n",
                memory.region().start(),
                node.id()
            )
        })?;
        let setting = Setting {
            name: CString::try_from_fmt(fmt!("kmem{}", node.id()))?,
            node,
            format,
            shared: shared.clone(),
        };
        let memory = Arc::new(memory, GFP_KERNEL)?;
        Arc::pin_init(
            pin_init!(Range {
                setting,
                state <- new_mutex!(Inner {
                    running: None,
                    memory: Some(memory),
                    force,
                }),
                admits: Atomic::new(false),
                _node: node_claim,
            }),
            GFP_KERNEL,
        )
    }

    /// `kmem<node>`.
    pub(super) fn name(&self) -> &CStr {
        &self.setting.name
    }

    /// Makes a device for the attributes of `range`, which says no to who writes to them until
    /// [`admit`](Self::admit). It comes before the range is memory, which cannot go without one.
    ///
    /// # Errors
    ///
    /// Those of [`attribute::Device::new`], which are logged.
    pub(super) fn device(range: &Arc<Self>) -> Result<attribute::Device<Self>> {
        attribute::Device::new(range.name(), range.clone()).inspect_err(|error| {
            pr_err!(
                "{}: left alone, as there can be no attributes of it ({:?})\n",
                range.name(),
                error
            )
        })
    }

    /// Lets users change the state from now on. Before, whoever has made the range may yet drop it.
    pub(super) fn admit(&self) {
        self.admits.store(true, Relaxed);
    }

    /// The state, if nobody else is changing it, which may take long.
    fn lock(&self) -> Result<MutexGuard<'_, Inner>> {
        self.state.try_lock().ok_or_else(|| {
            pr_info!("{}: its state is being changed; try again\n", self.name());
            EBUSY
        })
    }

    /// Shares the pages without data with the system.
    ///
    /// # Errors
    ///
    /// Each is logged, and the state is as it was.
    ///
    /// - `EINVAL`: the range has no format, and is to get none; or it has one that is not in order.
    /// - `EBUSY`: another driver has the system's page callback.
    /// - `EAGAIN`: added memory does not go online.
    /// - `EEXIST`: the name of the disk is taken.
    /// - `ENODEV`: the module is being unloaded.
    /// - `ENOMEM`.
    pub(super) fn online(&self) -> Result {
        let mut state = self.lock()?;
        match &state.running {
            Some(running) => running.instance.pool().share(),
            None => self.plug(&mut state)?,
        }
        Ok(())
    }

    /// Takes the pages without data back from the system.
    ///
    /// # Errors
    ///
    /// As for [`online`](Self::online), and `EBUSY`: memory that is in use cannot be moved.
    fn offline(&self) -> Result {
        let mut state = self.lock()?;
        if state.running.is_none() {
            self.plug(&mut state)?;
        }
        self.take_back(&state)
    }

    fn take_back(&self, state: &MutexGuard<'_, Inner>) -> Result {
        let Some(running) = &state.running else {
            return Ok(());
        };
        let result = running.instance.pool().take_back();
        result.inspect_err(|&error| self.tell_in_use(error))
    }

    fn tell_in_use(&self, error: Error) {
        match error {
            EINTR => pr_info!("{}: interrupted while its memory was moved\n", self.name()),
            _ => pr_info!(
                "{}: memory of it is in use and cannot be moved ({:?}); end who uses it, see N{}= in /proc/*/numa_maps, or try again\n",
                self.name(),
                error,
                self.setting.node.id()
            ),
        }
    }

    /// Whether the memory is there, so that the module must not go.
    pub(super) fn is_plugged(&self) -> bool {
        let state = self.state.lock();
        state
            .memory
            .as_ref()
            .is_some_and(|memory| memory.slice().is_some())
    }

    /// Reads the range, formats it if that is asked for, and adds it to the system's memory.
    fn plug(&self, state: &mut Inner) -> Result {
        if let Some(memory) = &state.memory {
            if let Some(slice) = memory.slice() {
                // It could not be served before, nor removed.
                let found = superblock::probe(&Checked(slice)).map_err(|error| {
                    pr_err!("{}: {}\n", self.name(), error);
                    EINVAL
                })?;
                return self.resume(state, found.superblock, true);
            }
        }
        let arc = state.memory.take().ok_or(ENODEV)?;
        let Some(mut memory) = Arc::into_unique_or_drop(arc) else {
            return Err(ENODEV);
        };
        let result = self.add(&mut memory, state.force);
        let memory: Arc<Memory> = Arc::from(memory);
        state.memory = Some(memory.clone());
        let (superblock, contents) = result?;
        state.force = false;
        self.start(state, memory, superblock, contents)
    }

    /// Adds a range to the system's memory whose contents are in order.
    fn add(&self, memory: &mut Memory, force: bool) -> Result<(Superblock, Contents)> {
        check_node(memory.node())?;
        // Before anything is written.
        if !hotplug::goes_online() {
            self.explain(EAGAIN);
            return Err(EAGAIN);
        }
        let window = Window::new(memory).inspect_err(|error| {
            pr_err!(
                "{}: cannot be mapped to read it ({:?})\n",
                self.name(),
                error
            )
        })?;
        let medium = Checked(window.slice());
        let (superblock, repair) = self.find(&medium, window.slice(), force)?;
        let mut contents =
            super::format(superblock.format())?.probe(self.name(), &medium, &superblock.layout)?;
        let superblock = match contents.faults {
            // Nothing on it is touched.
            Some(_) => superblock,
            None => self.mark(window.slice(), &superblock, State::InUse, repair)?,
        };
        drop(window);

        let held = core::mem::take(&mut contents.held);
        if let Err(error) = memory.plug(
            held,
            self.setting.shared.callback.clone(),
            this_module::<LocalModule>(),
        ) {
            self.explain(error);
            if contents.faults.is_none() {
                if let Ok(window) = Window::new(memory) {
                    let _ = self.mark(window.slice(), &superblock, State::Clean, None);
                }
            }
            return Err(error);
        }
        Ok((superblock, contents))
    }

    /// The superblock of the range, of a new format if that is asked for, and which copy of it is
    /// to be repaired.
    fn find(
        &self,
        medium: &Checked<'_>,
        slice: VolatileSlice<'_>,
        force: bool,
    ) -> Result<(Superblock, Option<Place>)> {
        let name = self.name();
        let superblock = match (superblock::probe(medium), self.setting.format) {
            (Ok(found), Some(kind)) if force => {
                pr_warn!(
                    "{}: format {} of UUID {} and all data in it are destroyed, as kmem_format_force says\n",
                    name,
                    found.superblock.format(),
                    found.superblock.uuid
                );
                self.format(slice, kind)?
            }
            (Ok(found), _) => {
                if let Some((place, repair)) = found.repair {
                    pr_warn!("{}: {}: {}; the other one counts\n", name, place, repair);
                }
                if found.superblock.state == State::InUse {
                    pr_info!("{}: it was in use when the machine stopped\n", name);
                }
                return Ok((found.superblock, found.repair.map(|(place, _)| place)));
            }
            (Err(ProbeError::Unformatted), Some(kind)) => self.format(slice, kind)?,
            (Err(error @ (ProbeError::Damaged { .. } | ProbeError::Size { .. })), Some(kind))
                if force =>
            {
                pr_warn!(
                    "{}: {}: destroyed, as kmem_format_force says\n",
                    name,
                    error
                );
                self.format(slice, kind)?
            }
            (Err(error), _) => {
                pr_err!("{}: {}\n", name, error);
                return Err(EINVAL);
            }
        };
        Ok((superblock, None))
    }

    fn format(&self, slice: VolatileSlice<'_>, kind: superblock::Format) -> Result<Superblock> {
        let pages = slice.len() as u64 / PAGE_SIZE;
        let layout: Layout = super::format(kind)?.layout(pages).map_err(|error| {
            pr_err!("{}: {}\n", self.name(), error);
            EINVAL
        })?;
        let superblock = Superblock::new(layout, Uuid::from_random(random::bytes()));
        superblock::format(&self.setting.shared.persist, slice, &superblock).map_err(|_| EINVAL)?;
        pr_info!(
            "{}: formatted as {}, UUID {}\n",
            self.name(),
            kind,
            superblock.uuid
        );
        Ok(superblock)
    }

    /// Writes both copies of the superblock, with another state.
    fn mark(
        &self,
        slice: VolatileSlice<'_>,
        superblock: &Superblock,
        state: State,
        repair: Option<Place>,
    ) -> Result<Superblock> {
        let superblock = superblock.next(state);
        superblock::update(&self.setting.shared.persist, slice, &superblock, repair)
            .map_err(|_| EINVAL)?;
        Ok(superblock)
    }

    /// Serves a range that is memory.
    fn start(
        &self,
        state: &mut Inner,
        memory: Arc<Memory>,
        superblock: Superblock,
        contents: Contents,
    ) -> Result {
        let region = memory.region();
        let (start, size) = (region.start(), region.size());
        let released = memory.released();
        let read_only = contents.faults.is_some();
        let movable = memory.is_movable();
        let format: &dyn Format = super::format(superblock.format())?;
        match format.start(&self.setting, memory, superblock.layout, contents) {
            Ok(instance) => {
                pr_info!(
                    "{}: {} at {:#x}, format {}, {} of it RAM, writes {} ({})\n",
                    self.name(),
                    Size(size),
                    start,
                    superblock.format(),
                    Size(released.saturating_mul(PAGE_SIZE)),
                    if self.setting.shared.persist.is_durable() {
                        "durable"
                    } else {
                        "not durable"
                    },
                    self.setting.shared.persist.name()
                );
                if !movable {
                    pr_info!(
                        "{}: its memory is not for movable pages alone: what else the kernel keeps there can keep it from going offline; online_movable in /sys/devices/system/memory/auto_online_blocks, before the range is online, prevents that\n",
                        self.name()
                    );
                }
                state.running = Some(Running {
                    instance,
                    superblock,
                    read_only,
                });
                Ok(())
            }
            Err(error) => {
                pr_err!("{}: cannot be served ({:?})\n", self.name(), error);
                // Nobody had the time to use it for something that cannot move.
                let _ = self.remove(state, &superblock, read_only);
                Err(error)
            }
        }
    }

    /// Removes the range from the system's memory.
    fn unplug(&self) -> Result {
        let mut state = self.lock()?;
        let Some(running) = &state.running else {
            return Ok(());
        };
        if !running.instance.close() {
            pr_info!(
                "{}: the disk is in use; unmount what is on it, see lsblk\n",
                self.name()
            );
            return Err(EBUSY);
        }
        let was_shared = running.instance.pool().is_shared();
        // What is zeroed must not be anybody's any more.
        if self.setting.shared.scrub {
            if let Err(error) = self.take_back(&state) {
                if let Some(running) = &state.running {
                    running.instance.reopen();
                }
                return Err(error);
            }
        }
        // Whoever looks for pages has its memory, and ends soon, as nobody writes any more.
        self.setting.shared.queue.flush();
        let Some(running) = state.running.take() else {
            return Ok(());
        };
        if self.setting.shared.scrub {
            self.scrub(&running);
        }
        let (superblock, read_only) = (running.superblock, running.read_only);
        drop(running);

        let result = self.remove(&mut state, &superblock, read_only);
        if let Err(error) = result {
            self.tell_in_use(error);
            self.resume(&mut state, superblock, was_shared)?;
        }
        result
    }

    /// Unplugs the range for good, or leaves it as it is until the next boot.
    #[cfg(PMEM_DAX_BUS)]
    pub(super) fn leave(self: &Arc<Self>) {
        if self.unplug().is_err() {
            pr_err!("{}: stays as it is until the next boot\n", self.name());
            core::mem::forget(self.clone());
        }
    }

    /// Zeroes the pages that have no data.
    fn scrub(&self, running: &Running) {
        let pool = running.instance.pool();
        let Some(slice) = pool.memory().slice() else {
            return;
        };
        let persist = &self.setting.shared.persist;
        pool.for_each(|Page(page)| {
            // Both are in the range, so that this does not wrap.
            if let Some(page) = slice.range(page.wrapping_mul(PAGE_SIZE), PAGE_SIZE) {
                persist.write_zeroes(page);
            }
        });
        persist.fence();
    }

    /// Marks a range as clean that nobody serves, and removes it from the system's memory.
    fn remove(&self, state: &mut Inner, superblock: &Superblock, read_only: bool) -> Result {
        let arc = state.memory.take().ok_or(ENODEV)?;
        let Some(mut memory) = Arc::into_unique_or_drop(arc) else {
            return Err(ENODEV);
        };
        if !read_only {
            if let Some(slice) = memory.slice() {
                self.mark(slice, superblock, State::Clean, None)?;
            }
        }
        let result = memory.unplug();
        state.memory = Some(Arc::from(memory));
        result
    }

    /// Serves a range again that could not be removed.
    fn resume(&self, state: &mut Inner, superblock: Superblock, share: bool) -> Result {
        let memory = state.memory.clone().ok_or(ENODEV)?;
        let slice = memory.slice().ok_or(ENODEV)?;
        let mut contents = super::format(superblock.format())?.probe(
            self.name(),
            &Checked(slice),
            &superblock.layout,
        )?;
        let superblock = match contents.faults {
            Some(_) => superblock,
            None => self.mark(slice, &superblock.next(State::Clean), State::InUse, None)?,
        };
        let kept = core::mem::take(&mut contents.held);
        self.start(state, memory.clone(), superblock, contents)?;
        if let Some(running) = &state.running {
            let pool = running.instance.pool();
            for page in 0..memory.pages() {
                if !Bitmap::new(&kept).test(page) && memory.is_held(Page(page)) {
                    pool.push(Page(page), 1);
                }
            }
            if share {
                pool.share();
            } else {
                pool.take_back()?;
            }
        }
        Ok(())
    }

    fn explain(&self, error: Error) {
        let name = self.name();
        match error {
            EBUSY => pr_err!(
                "{}: another driver, such as virtio-mem, decides what happens to memory that comes online; unload it\n",
                name
            ),
            EAGAIN => pr_err!(
                "{}: added memory stays offline; write online_movable to /sys/devices/system/memory/auto_online_blocks\n",
                name
            ),
            ENODEV => pr_info!("{}: the driver is being unloaded\n", name),
            ENOMEM => pr_err!(
                "{}: not enough memory; struct pages take 1/64 of its size in RAM\n",
                name
            ),
            _ => pr_err!("{}: the kernel does not take it as memory ({:?})\n", name, error),
        }
    }
}

impl Attributes for Range {
    const LIST: &'static [(&'static CStr, bool)] = &[
        (c"state", true),
        (c"format", false),
        (c"uuid", false),
        (c"ram", false),
        (c"data", false),
    ];

    fn show(&self, index: usize) -> Result<CString> {
        // Who changes it may be at it for long.
        let state = self.state.try_lock().ok_or(EBUSY)?;
        let running = state.running.as_ref();
        match (index, running) {
            (0, None) => CString::try_from_fmt(fmt!("unplugged")),
            (0, Some(running)) => CString::try_from_fmt(fmt!(
                "{}",
                if running.instance.pool().is_shared() {
                    "online"
                } else {
                    "offline"
                }
            )),
            (1, Some(running)) => CString::try_from_fmt(fmt!("{}", running.superblock.format())),
            (2, Some(running)) => CString::try_from_fmt(fmt!("{}", running.superblock.uuid)),
            (3, Some(running)) => CString::try_from_fmt(fmt!(
                "{}",
                running
                    .instance
                    .pool()
                    .memory()
                    .released()
                    .saturating_mul(PAGE_SIZE)
            )),
            (4, Some(running)) => {
                CString::try_from_fmt(fmt!("{}", running.data().saturating_mul(PAGE_SIZE)))
            }
            (3 | 4, None) => CString::try_from_fmt(fmt!("0")),
            (1 | 2, None) => CString::try_from_fmt(fmt!("")),
            _ => Err(ENODEV),
        }
    }

    fn store(&self, index: usize, value: &str) -> Result {
        if !self.admits.load(Relaxed) {
            return Err(EBUSY);
        }
        match (index, value) {
            (0, "online") => self.online(),
            (0, "offline") => self.offline(),
            (0, "unplugged") => self.unplug(),
            _ => {
                pr_info!(
                    "{}: {} is not a state; write online, offline or unplugged\n",
                    self.name(),
                    value.trim()
                );
                Err(EINVAL)
            }
        }
    }
}
