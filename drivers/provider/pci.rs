// SPDX-License-Identifier: GPL-2.0-only

//! PCI functions that have memory in a BAR: iopmem.
//!
//! The driver is for one ID that nothing else has, and for whatever an administrator binds to it, by
//! `new_id` or `driver_override`. Functions come and go at any time, and each is one disk, `iopmemN`, with
//! the first number that is free.

use crate::{
    device::{
        Directory,
        Io,
        Link,
        Options,
        PmemDevice, //
    },
    kapi::{
        compat::{
            pci_device_table,
            IdInfo, //
        },
        debugfs::Dir,
        disk::Disk,
        global::{
            Global,
            Provided, //
        },
        numa::Node,
        param::string_params,
        pci::{
            self as function,
            Enabled,
            Resource, //
        },
        region::{
            self,
            Region, //
        }, //
    },
    pmem_core::{
        iopmem::{
            self,
            Bar,
            Config,
            NoPages,
            Unusable, //
        },
        memmap,
        persist::{
            words::Words,
            CopyPolicy,
            CpuFeatures,
            Persist, //
        },
        size::Size, //
    },
};
use kernel::{
    device::Core,
    driver,
    id_pool::IdPool,
    new_mutex,
    pci,
    prelude::*,
    sync::{
        aref::ARef,
        Arc,
        Mutex, //
    }, //
};

string_params! {
    "pmem";

    IOPMEM: "iopmem" = c"1",
        "Make a disk of a BAR of each PCI function that the driver iopmem is bound to: 0 or 1. Default: 1";
    IOPMEM_BAR: "iopmem_bar" = c"",
        "The BAR, 0 to 5. By default 4 if it is memory, else the largest that is. Example: 2";
    IOPMEM_CACHE: "iopmem_cache" = c"wc",
        "How the BAR is mapped for the disk: wc, uc or wb. Default: wc";
    IOPMEM_DAX: "iopmem_dax" = c"1",
        "Have struct pages for the BAR, and so DAX: 0 or 1. Default: 1";
    IOPMEM_P2PDMA: "iopmem_p2pdma" = c"0",
        "How much of the end of the BAR is p2pdma memory, and not the disk's. Default: 0. Example: 64MiB";
    IOPMEM_PERSISTENT: "iopmem_persistent" = c"0",
        "The memory keeps its contents without power: 0 or 1. Default: 0";
}

/// The name of the driver, and of its disks.
const NAME: &CStr = c"iopmem";

// One that the vendor has given to no product.
pci_device_table!(
    IDS,
    @none,
    [pci::DeviceId::from_id(pci::Vendor::MICROSEMI, 0xf115)]
);

/// What probes find.
static SHARED: Global<Shared> = Global::new();

/// The value of `iopmem`.
pub(super) fn param() -> Result<&'static str> {
    IOPMEM.get()
}

/// How disks are to be made.
pub(super) struct Context {
    config: Config,
    options: Options,
    persist: Persist,
    words: Words,
    debugfs: Arc<Dir>,
}

#[pin_data]
struct Shared {
    context: Context,
    /// The numbers of disks.
    #[pin]
    numbers: Mutex<IdPool>,
}

/// The number of a disk, which is nobody else's.
struct Number {
    shared: Arc<Shared>,
    number: usize,
}

impl Number {
    /// Takes the first one that is free.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    fn new(shared: Arc<Shared>) -> Result<Self> {
        let mut numbers = shared.numbers.lock();
        loop {
            if let Some(id) = numbers.find_unused_id(0) {
                let number = id.acquire();
                drop(numbers);
                return Ok(Number { shared, number });
            }
            let more = numbers.grow_request().ok_or(ENOMEM)?;
            numbers.grow(more.realloc(GFP_KERNEL)?);
        }
    }
}

impl Drop for Number {
    fn drop(&mut self) {
        self.shared.numbers.lock().release_id(self.number);
    }
}

/// The registration of the driver.
#[pin_data]
pub(super) struct Registration {
    // Goes first.
    #[pin]
    driver: driver::Registration<pci::Adapter<Iopmem>>,
    shared: Provided<Shared>,
}

impl Context {
    /// What the parameters say of such functions, unless that is to leave them alone.
    ///
    /// # Errors
    ///
    /// `EINVAL`: a parameter is wrong, which is logged.
    pub(super) fn new(
        ranges: &memmap::Config<'_>,
        cpu: CpuFeatures,
        debugfs: &Arc<Dir>,
    ) -> Result<Option<Self>> {
        let text = super::text;
        let config = Config::new(iopmem::Params {
            bar: text("iopmem_bar", IOPMEM_BAR.get())?,
            cache: text("iopmem_cache", IOPMEM_CACHE.get())?,
            dax: text("iopmem_dax", IOPMEM_DAX.get())?,
            p2pdma: text("iopmem_p2pdma", IOPMEM_P2PDMA.get())?,
            persistent: text("iopmem_persistent", IOPMEM_PERSISTENT.get())?,
        })
        .map_err(|fault| {
            pr_err!("{}\n", fault);
            EINVAL
        })?;
        Ok(ranges.iopmem().then(|| Context {
            config,
            options: Options {
                logical_block_size: ranges.logical_block_size(),
                cache: config.cache,
                provider: "pci",
            },
            persist: Persist::for_cache(cpu, config.cache, CopyPolicy::Auto),
            words: Words::new(cpu),
            debugfs: debugfs.clone(),
        }))
    }

    /// Registers the driver: disks of the functions that are there already are made at once.
    ///
    /// # Errors
    ///
    /// - `EBUSY`: there is a driver of this name.
    /// - `ENOMEM`.
    pub(super) fn register(self, module: &'static ThisModule) -> Result<Pin<KBox<Registration>>> {
        KBox::pin_init(
            try_pin_init!(Registration {
                shared: SHARED.provide(try_pin_init!(Shared {
                    context: self,
                    numbers <- new_mutex!(IdPool::new()),
                }))?,
                driver <- driver::Registration::new(NAME, module),
            }),
            GFP_KERNEL,
        )
    }
}

/// The driver.
pub(super) struct Iopmem;

/// A function, and its disk.
pub(super) struct Bound {
    // In the order in which they go.
    disk: (Directory, Disk<PmemDevice>),
    _enabled: Enabled,
    _number: Number,
}

impl pci::Driver for Iopmem {
    type IdInfo = ();
    type Data<'bound> = Bound;

    const ID_TABLE: pci::IdTable<()> = &IDS;

    fn probe<'bound>(
        device: &'bound pci::Device<Core<'_>>,
        _info: IdInfo<'bound, ()>,
    ) -> impl PinInit<Bound, Error> + 'bound {
        let shared = SHARED.get().ok_or(ENODEV)?;
        let number = Number::new(shared.clone())?;
        shared.context.bind(device, number)
    }

    fn unbind<'bound>(device: &'bound pci::Device<Core<'_>>, this: Pin<&Bound>) {
        // File systems cannot write back any more.
        if function::is_gone(device) {
            this.disk.1.mark_dead();
        }
    }
}

/// The way to a function.
struct Function(ARef<pci::Device>);

impl Link for Function {
    fn is_down(&self) -> bool {
        function::is_gone(&self.0)
    }

    fn answers(&self) -> bool {
        function::is_present(&self.0)
    }
}

impl Context {
    fn bind(&self, device: &pci::Device<Core<'_>>, id: Number) -> Result<Bound> {
        let number = id.number;
        let name = device.as_ref().name();
        let block = self.options.logical_block_size;
        let mut bus_address = [0; iopmem::BARS];
        let mut bars = [Bar::None; iopmem::BARS];
        for ((bar, at), index) in bars.iter_mut().zip(&mut bus_address).zip(0..) {
            *bar = match function::resource(device, index) {
                Resource::None => Bar::None,
                Resource::Ports => Bar::Ports,
                Resource::Unassigned => Bar::Unassigned,
                Resource::Memory { start, size, bus } => {
                    *at = bus;
                    Bar::Memory { start, size }
                }
            };
        }
        let Config { bar, p2pdma, .. } = self.config;
        let choice = iopmem::choose(&bars, bar, block, p2pdma).map_err(|unusable| {
            pr_err!("{}: {}\n", name, unusable);
            match unusable {
                Unusable::NoMemory | Unusable::NoAddress(_) => ENODEV,
                _ => EINVAL,
            }
        })?;
        let (bar, range) = (choice.bar, choice.disk);
        let bus = bus_address.get(bar).copied().unwrap_or_default();

        let enabled = Enabled::new(device).inspect_err(|error| {
            pr_err!("{}: its memory cannot be enabled ({:?})\n", name, error);
        })?;
        let region = Region::new(range.start(), choice.size(), NAME).inspect_err(|_| {
            pr_err!(
                "{}: BAR {}, {}, is claimed by another driver, see /proc/iomem\n",
                name,
                bar,
                range
            );
        })?;
        let region = Arc::new(region, GFP_KERNEL)?;
        if let Some((offset, size)) = choice.p2pdma {
            function::add_p2pdma(device, bar as u32, offset, size).inspect_err(|error| {
                pr_err!(
                    "{}: the last {} of BAR {} cannot be p2pdma memory ({:?}); iopmem_p2pdma=0 does without\n",
                    name,
                    Size(size),
                    bar,
                    error
                );
            })?;
        }

        let pages = if self.config.dax {
            iopmem::check_pages(range, bus, region::mappable())
        } else {
            Err(NoPages::Unasked)
        };
        if let Err(why) = pages {
            pr_info!("{}: BAR {} gets no DAX: {}\n", name, bar, why);
        }

        let explain = |error| {
            match error {
                EEXIST => pr_err!(
                    "{}: iopmem{} is the name of another driver's disk\n",
                    name,
                    number
                ),
                _ => pr_err!("{}: cannot make a disk of {} ({:?})\n", name, range, error),
            }
            error
        };
        let function: &pci::Device = device;
        let io = Io {
            words: self.words,
            link: Arc::new(Function(function.into()), GFP_KERNEL)?,
            persistent: self.config.persistent,
            pages: pages.is_ok(),
        };
        let disk = PmemDevice::prepare_io(
            fmt!("iopmem{}", number),
            region,
            range,
            Node::of_device(device.as_ref()),
            self.persist,
            self.options,
            io,
        )
        .map_err(explain)?;
        let parent: &kernel::device::Device = device.as_ref();
        let disk = disk.with_parent(parent.into());
        let debugfs =
            PmemDevice::debugfs(disk.data(), self.debugfs.clone(), fmt!("iopmem{}", number))?;
        let disk = disk.add().map_err(explain)?;
        pr_info!("{}: BAR {} is iopmem{}\n", name, bar, number);
        PmemDevice::announce(&disk, fmt!("iopmem{}", number), range);
        Ok(Bound {
            disk: (debugfs, disk),
            _enabled: enabled,
            _number: id,
        })
    }
}
