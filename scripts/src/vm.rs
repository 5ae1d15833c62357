// SPDX-License-Identifier: GPL-2.0-only

//! Virtual machines that boot a kernel, do what they are told, and lose power when asked to.
//!
//! A machine has two NUMA nodes: ordinary memory below 4 GiB, and a second node from [`UPPER`] on that the
//! kernel's command line reserves. The second node may be a file that outlives the machine ([`Persistent`]), so that
//! a power failure is the death of QEMU.
//!
//! ```text
//! 0          ram            4 GiB                    4 GiB + upper              the next multiple of 1 GiB
//! | node 0: System RAM |  PCI  | node 1: memmap=upper$4G |                        | virtio-pmem devices |
//! ```
//!
//! PCI devices whose memory is behind a BAR are where the firmware puts them.
//!
//! Its serial port is the console, kept in a file; over a port of its virtio console the agent is told what to do.

mod accel;
mod accesses;
mod bar;
mod calls;
mod channel;
mod console;
mod cpio;
mod flushes;
mod image;
mod memory;
mod monitor;
mod system;
mod virtio;
mod vmlinux;

pub use accel::Accelerator;
pub use calls::{Step, SystemCall};
pub use flushes::{Fault, Flush};
pub use image::{Image, Module};
pub use memory::{memmap, Persistent, Use, GIB, MIB, UPPER};
pub use pmem_guest::{End, Ran, Random};
pub use pmem_trace::calls::Calls;
pub use pmem_trace::{Accesses, Counted, Kind, Shape};
pub use system::System;

use crate::flavour::Flavour;
use crate::kernel::Kernel;
use crate::progress::Progress;
use crate::root::Root;
use crate::{cache, crates, repo};
use anyhow::{bail, ensure, Context, Error, Result};
use channel::{Channel, Silence};
use flushes::Faulty;
use monitor::{Monitor, Pluggable};
use pmem_guest::{Bytes, Call, Reply, Request, Run, PORT};
use std::fmt;
use std::fs::{self, File};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Where the driver's module is in a guest that has one.
pub const PMEM_KO: &str = "/pmem.ko";

/// Where a guest has the kernel that it can start next.
pub const NEXT_KERNEL: &str = "/next/vmlinuz";

/// Where a guest has the initramfs of that kernel.
pub const NEXT_INITRD: &str = "/next/initrd";

/// What a guest needs to hear us.
const EARLY: [&str; 2] = ["virtio_pci", "virtio_console"];

/// How long a guest may take to boot. Emulated on a busy host it takes a quarter of that.
const BOOT: Duration = Duration::from_secs(60);

/// How long a program in the guest may take, unless told otherwise.
const COMMAND: Duration = Duration::from_secs(120);

/// What an answer may take beyond what was asked for.
const SLACK: Duration = Duration::from_secs(30);

/// How often a machine is booted at most until its clock runs right, which it does not in one boot of twelve on a very
/// busy host.
const CLOCKS: u32 = 5;

/// Says how many times as long as usual everything may take, on a host that has much else to do.
const PATIENCE: &str = "PMEM_PATIENCE";

/// What a kernel with sanitizers is told: how long it may be slow before it complains, as emulated on a busy host it
/// looks as if it hung, and not to run all KUnit suites at boot and at each load, which takes it longer than most tests.
const PATIENT: &str = "kunit.enable=0 watchdog_thresh=60 workqueue.watchdog_thresh=300 rcupdate.rcu_cpu_stall_timeout=300 \
                       sysctl.kernel.hung_task_timeout_secs=900";

/// Memory that a host gives without looking whether it has as much. What is more is given as it is touched.
const PROMISED: u64 = 4 * GIB;

/// Of so many system calls one at least is not disturbed: an interrupt comes at another moment each time.
const SAME: u64 = 4;

/// The most that is written in one piece.
const PIECE: usize = 1 << 16;

/// A kernel with the driver for it: what every machine needs.
#[derive(Debug)]
pub struct Setup {
    /// The build root.
    pub root: Root,
    /// The kernel.
    pub kernel: Kernel,
    /// The driver's module, unless the kernel has it built in.
    pub module: Option<crate::module::Module>,
}

impl Setup {
    /// Finds all of it in the cache, or makes it.
    pub fn new(flavour: Flavour, progress: &Progress) -> Result<Self> {
        let root = Root::ensure(progress)?;
        let kernel = Kernel::ensure(flavour, &root, progress)?;
        let module = match flavour {
            Flavour::Builtin => None,
            _ => Some(crate::module::build(&kernel, &root, progress)?),
        };
        Ok(Self {
            root,
            kernel,
            module,
        })
    }

    /// A machine with this kernel, and with the driver at [`PMEM_KO`].
    pub fn vm<'a>(&'a self, progress: &'a Progress) -> Builder<'a> {
        let vm = Builder::new(&self.kernel, &self.root, progress);
        match &self.module {
            Some(module) => vm.file(&module.ko, PMEM_KO),
            None => vm,
        }
    }
}

/// A machine to be.
#[derive(Debug)]
pub struct Builder<'a> {
    kernel: &'a Kernel,
    root: &'a Root,
    progress: &'a Progress,
    name: String,
    ram: u64,
    upper: u64,
    persistent: Option<&'a Persistent>,
    virtio: Vec<virtio::Device<'a>>,
    pci: bar::Devices<'a>,
    traced: bool,
    watched: bool,
    recorded: bool,
    counted: bool,
    faulty: Option<Faulty>,
    ranges: Option<Vec<(Use, u64, u64)>>,
    cpus: u32,
    cmdline: Vec<String>,
    devices: Vec<String>,
    modules: Vec<String>,
    files: Vec<(PathBuf, String)>,
    next_kernel: bool,
    packed: bool,
    disk: Option<Disk<'a>>,
    accelerator: Option<Accelerator>,
    boot_timeout: Duration,
}

/// A disk that has a system to boot.
#[derive(Debug)]
struct Disk<'a> {
    path: &'a Path,
    /// The kernel and its initramfs, where the disk's own boot loader is not to start them.
    kernel: Option<(&'a Path, &'a Path)>,
}

impl<'a> Builder<'a> {
    /// A machine with 1 GiB of memory, and 1 GiB at [`UPPER`] that nothing uses.
    pub fn new(kernel: &'a Kernel, root: &'a Root, progress: &'a Progress) -> Self {
        Self {
            kernel,
            root,
            progress,
            name: "vm".into(),
            ram: GIB,
            upper: GIB,
            persistent: None,
            virtio: Vec::new(),
            pci: bar::Devices::default(),
            traced: false,
            watched: false,
            recorded: false,
            counted: false,
            faulty: None,
            ranges: None,
            cpus: 2,
            cmdline: Vec::new(),
            devices: Vec::new(),
            modules: Vec::new(),
            files: Vec::new(),
            next_kernel: false,
            packed: false,
            disk: None,
            accelerator: None,
            boot_timeout: BOOT,
        }
    }

    /// What to call the machine in messages and in its console's file name.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// Bytes of ordinary memory; at most 2 GiB, so that it ends below [`UPPER`].
    pub fn ram(mut self, bytes: u64) -> Self {
        self.ram = bytes;
        self
    }

    /// Bytes of memory at [`UPPER`] that are gone with the machine.
    pub fn upper(mut self, bytes: u64) -> Self {
        self.upper = bytes;
        self
    }

    /// Memory at [`UPPER`] that outlives the machine.
    pub fn persistent(mut self, memory: &'a Persistent) -> Self {
        self.upper = memory.size();
        self.persistent = Some(memory);
        self
    }

    /// Adds a virtio-pmem device with this memory. May be given again: they are numbered from 0 on.
    pub fn virtio_pmem(self, memory: &'a Persistent) -> Self {
        self.virtio_device(memory, None, true)
    }

    /// As [`Builder::virtio_pmem`], with its memory at `address`, which must be one that QEMU has for such devices: it
    /// gives the first of them the first multiple of 1 GiB after all other memory.
    pub fn virtio_pmem_at(self, memory: &'a Persistent, address: u64) -> Self {
        self.virtio_device(memory, Some(address), true)
    }

    /// As [`Builder::virtio_pmem`], but it is not there until [`Vm::plug`].
    pub fn virtio_pmem_later(self, memory: &'a Persistent) -> Self {
        self.virtio_device(memory, None, false)
    }

    fn virtio_device(
        mut self,
        memory: &'a Persistent,
        address: Option<u64>,
        plugged: bool,
    ) -> Self {
        self.virtio.push(virtio::Device {
            memory,
            address,
            plugged,
        });
        self
    }

    /// Adds a PCI device whose BAR 2 is this memory, of a size that is a power of two. May be given again: they are
    /// numbered from 0 on.
    pub fn bar(self, memory: &'a Persistent) -> Self {
        self.bar_device(memory, true)
    }

    /// As [`Builder::bar`], but it is not there until [`Vm::plug_bar`]. With [`Builder::native_hotplug`], as a guest that
    /// is told by ACPI gives ports no more addresses than they had when it booted.
    pub fn bar_later(self, memory: &'a Persistent) -> Self {
        self.bar_device(memory, false)
    }

    fn bar_device(mut self, memory: &'a Persistent, plugged: bool) -> Self {
        self.pci.bars.push(bar::Device { memory, plugged });
        self
    }

    /// Adds an NVMe disk with this content. May be given again.
    pub fn nvme(mut self, content: &'a Persistent) -> Self {
        self.pci.disks.push(content);
        self
    }

    /// Keeps the addresses of the guest's memory that NVMe disks read and write, for [`Vm::nvme_accesses`].
    pub fn watch_nvme(self) -> Self {
        self.qemu(&bar::WATCH)
    }

    /// Has all BARs and NVMe disks behind one PCIe switch. They cannot be plugged in later.
    pub fn pcie_switch(mut self) -> Self {
        self.pci.switched = true;
        self
    }

    /// Has PCIe ports tell the guest themselves that devices come and go, not by ACPI.
    pub fn native_hotplug(self) -> Self {
        self.qemu(&bar::NATIVE)
    }

    /// Keeps the times of the host's flushes of virtio-pmem devices, for [`Vm::flushes`].
    pub fn watch_flushes(mut self) -> Self {
        self.traced = true;
        self
    }

    /// Has flushes of virtio-pmem devices fail or take long: the `first` one of all since the start, which is 1, to the
    /// `last` one, or for ever. Flushes are then done one after the other, also those of different devices.
    pub fn flush_fault(mut self, fault: Fault, first: u64, last: Option<u64>) -> Self {
        self.traced = true;
        self.faulty = Some(Faulty { fault, first, last });
        self
    }

    /// Has QEMU see how the guest's CPUs access memory, for [`Vm::watch`]. The guest is then emulated in any case, and
    /// takes twice the time that others take.
    pub fn watch_accesses(mut self) -> Self {
        self.watched = true;
        self.boot_timeout = self.boot_timeout.max(2 * BOOT);
        self
    }

    /// As [`Builder::watch_accesses`], and has QEMU keep the order of what is done to memory, for [`Vm::record`]. The
    /// guest's CPUs then take turns, and it takes three times the time that others take.
    pub fn record_writes(mut self) -> Self {
        self.recorded = true;
        self.boot_timeout = self.boot_timeout.max(3 * BOOT);
        self.watch_accesses()
    }

    /// Has QEMU see what the guest's CPU executes, for [`Vm::count_calls`], instead of how it accesses memory. The guest
    /// has one CPU then, which is emulated in any case.
    pub fn count_calls(mut self) -> Self {
        self.counted = true;
        self.cpus = 1;
        self.boot_timeout = self.boot_timeout.max(10 * BOOT);
        self
    }

    /// Says what a range of memory is, instead of reserving all from [`UPPER`] on. May be given again.
    pub fn range(mut self, how: Use, start: u64, size: u64) -> Self {
        self.ranges.get_or_insert_default().push((how, start, size));
        self
    }

    /// Reserves nothing: the memory at [`UPPER`] is ordinary memory as well.
    pub fn no_ranges(mut self) -> Self {
        self.ranges.get_or_insert_default();
        self
    }

    /// The number of CPUs.
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// Adds arguments to the kernel's command line.
    pub fn cmdline(mut self, argument: impl Into<String>) -> Self {
        self.cmdline.push(argument.into());
        self
    }

    /// Adds arguments to QEMU's command line.
    pub fn qemu(mut self, arguments: &[&str]) -> Self {
        self.devices.extend(arguments.iter().map(|&a| a.to_owned()));
        self
    }

    /// Loads a module of the kernel's, with what it depends on, at boot.
    pub fn module(mut self, name: &str) -> Self {
        self.modules.push(name.to_owned());
        self
    }

    /// Puts a file of the host's into the guest.
    pub fn file(mut self, host: impl Into<PathBuf>, guest: &str) -> Self {
        self.files.push((host.into(), guest.to_owned()));
        self
    }

    /// Puts `pmemctl` into the guest.
    pub fn pmemctl(self) -> Result<Self> {
        let flags = "-C target-feature=+crt-static -C strip=symbols";
        let results = crates::build("pmemctl", "guest", flags, "pmemctl", self.progress)?;
        Ok(self.file(results.join("pmemctl"), "/usr/bin/pmemctl"))
    }

    /// Puts the kernel at [`NEXT_KERNEL`] and an initramfs for it at [`NEXT_INITRD`], so that the guest can start it.
    pub fn next_kernel(mut self) -> Self {
        self.next_kernel = true;
        self
    }

    /// Boots the kernel's image as a boot loader does: it unpacks itself, and chooses where in memory the kernel is
    /// (KASLR). Where a guest is emulated, the kernel is otherwise unpacked before, which takes a third off the boot.
    pub fn packed(mut self) -> Self {
        self.packed = true;
        self
    }

    /// Boots the system on a disk, by its own boot loader. It is to run `pmem-guest serve`. The machine's kernel only
    /// says which accelerator works.
    pub fn disk(mut self, path: &'a Path) -> Self {
        self.disk = Some(Disk { path, kernel: None });
        self
    }

    /// As [`Builder::disk`], but starts this kernel of the system's, with the command line of [`Builder::cmdline`].
    pub fn disk_with(mut self, path: &'a Path, kernel: &'a Path, initrd: &'a Path) -> Self {
        self.disk = Some(Disk {
            path,
            kernel: Some((kernel, initrd)),
        });
        self
    }

    /// Uses this accelerator, whatever works best.
    pub fn accelerator(mut self, accelerator: Accelerator) -> Self {
        self.accelerator = Some(accelerator);
        self
    }

    /// How long to wait for the guest.
    pub fn boot_timeout(mut self, timeout: Duration) -> Self {
        self.boot_timeout = timeout;
        self
    }

    /// How many times as long as usual everything may take.
    fn slowness(&self) -> u32 {
        let patience = std::env::var(PATIENCE).ok();
        let patience: u32 = patience.and_then(|text| text.parse().ok()).unwrap_or(1);
        let flavour = self.kernel.flavour.map_or(1, Flavour::slowness);
        flavour.saturating_mul(patience.max(1))
    }

    /// The kernel's command line.
    fn command_line(&self) -> String {
        let mut line = vec![
            // Warnings and worse reach the console; the rest is in dmesg, and costs time to print.
            "console=ttyS0 loglevel=5 panic=-1".to_owned(),
            // A busy host may be late with the ticks that the kernel counts at boot, and panics without.
            "no_timer_check".to_owned(),
        ];
        if self.kernel.flavour.map_or(1, Flavour::slowness) > 1 {
            line.push(PATIENT.to_owned());
        }
        match &self.ranges {
            Some(ranges) => {
                line.extend(
                    ranges
                        .iter()
                        .map(|&(how, start, size)| memmap(how, start, size)),
                );
            }
            None if self.upper > 0 => line.push(memmap(Use::Reserved, UPPER, self.upper)),
            None => {}
        }
        line.extend(self.cmdline.iter().cloned());
        line.join(" ")
    }

    /// QEMU's arguments, apart from the accelerator's.
    fn arguments(&self, dir: &Path, image: &Path, memory: Option<&Persistent>) -> Vec<String> {
        let (ram, upper) = (self.ram, self.upper);
        let mut args: Vec<String> = [
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
            "-chardev",
            "stdio,id=agent,signal=off",
            "-serial",
            "chardev:console",
            "-device",
            "virtio-serial-pci",
        ]
        .map(str::to_owned)
        .into();
        let mut push = |name: &str, value: String| args.extend([name.to_owned(), value]);
        push(
            "-device",
            format!("virtserialport,chardev=agent,name={PORT}"),
        );
        push(
            "-chardev",
            format!("file,id=console,path={}", value(&dir.join("console"))),
        );
        push("-machine", format!("q35,max-ram-below-4g={ram}"));
        push("-smp", self.cpus.to_string());
        let size = (ram + upper) / MIB;
        push(
            "-m",
            match virtio::room(&self.virtio) {
                0 => format!("{size}M"),
                room => format!("{size}M,slots=1,maxmem={}M", size + room / MIB),
            },
        );
        push(
            "-object",
            match memory {
                Some(memory) => format!(
                    "memory-backend-file,id=ram,size={ram},share=on,mem-path={}",
                    value(&memory.path())
                ),
                None => format!("memory-backend-ram,id=ram,size={ram}"),
            },
        );
        push(
            "-numa",
            format!("node,nodeid=0,cpus=0-{},memdev=ram", self.cpus - 1),
        );
        if upper > 0 {
            push(
                "-object",
                match self.persistent {
                    Some(memory) => format!(
                        "memory-backend-file,id=upper,size={upper},share=on,mem-path={}",
                        value(&memory.path())
                    ),
                    None => format!(
                        "memory-backend-ram,id=upper,size={upper}{}",
                        if upper > PROMISED { ",reserve=off" } else { "" }
                    ),
                },
            );
            push("-numa", "node,nodeid=1,memdev=upper".into());
        }
        let initrd = dir.join("initrd");
        let started = match &self.disk {
            None => Some((image, initrd.as_path())),
            Some(disk) => {
                let path = value(disk.path);
                push(
                    "-drive",
                    format!("file={path},format=raw,if=virtio,cache=unsafe"),
                );
                disk.kernel
            }
        };
        if let Some((kernel, initrd)) = started {
            push("-kernel", kernel.display().to_string());
            push("-initrd", initrd.display().to_string());
            push("-append", self.command_line());
        }
        if self.has_monitor() {
            args.extend(monitor::arguments());
        }
        args.extend(virtio::arguments(&self.virtio));
        args.extend(bar::arguments(&self.pci));
        if self.faulty.is_some() {
            args.extend(flushes::ONE_THREAD.map(str::to_owned));
        }
        args.extend(self.devices.iter().cloned());
        args
    }

    /// Whether devices can come and go, or QEMU is told to count.
    fn has_monitor(&self) -> bool {
        !self.virtio.is_empty() || !self.pci.bars.is_empty() || self.counted
    }

    /// Boots the machine, and waits until it does what it is told.
    pub fn start(self) -> Result<Vm> {
        for _ in 0..CLOCKS {
            let vm = self.launch_again_if_silent()?;
            if !console::clock_is_wrong(&vm.console()) {
                return Ok(vm);
            }
            self.progress.line(&format!(
                "{}: the guest's clock runs wrong; booting again",
                self.name
            ));
        }
        bail!(
            "{}: the guest's clock ran wrong in each of {CLOCKS} boots: has this machine much else to do?",
            self.name
        )
    }

    fn launch_again_if_silent(&self) -> Result<Vm> {
        match self.launch() {
            // Emulated on a busy host, a kernel once in a long while stops early in its boot, or QEMU does, when one CPU
            // changes where a device is while another one accesses memory. Whether it boots at all is asked with the
            // accelerator given.
            Err(error)
                if self.accelerator.is_none()
                    && matches!(
                        error.downcast_ref(),
                        Some(Silence::TimedOut | Silence::Crashed)
                    ) =>
            {
                self.progress.line(&format!(
                    "{}: it does not boot; trying once more: {error:#}",
                    self.name
                ));
                self.launch()
            }
            booted => booted,
        }
    }

    /// Writes what the guest starts with into `dir`, and returns the modules that are loaded at boot.
    fn initramfs(&self, dir: &Path, bzimage: &Path) -> Result<Vec<Module>> {
        let early = Module::resolve(self.kernel, self.root, &EARLY.map(str::to_owned))?;
        let mut modules = Module::resolve(self.kernel, self.root, &self.modules)?;
        modules.retain(|module| early.iter().all(|other| other.name != module.name));
        let image = Image::ensure(self.root, self.progress)?;
        let initrd = dir.join("initrd");
        image.write(&initrd, &early, &modules, &self.files)?;
        if self.next_kernel {
            let next = dir.join("next-initrd");
            fs::rename(&initrd, &next)?;
            let mut files = self.files.clone();
            files.push((bzimage.to_owned(), NEXT_KERNEL.into()));
            files.push((next, NEXT_INITRD.into()));
            image.write(&initrd, &early, &modules, &files)?;
        }
        Ok(modules)
    }

    fn launch(&self) -> Result<Vm> {
        ensure!(
            self.ram <= 2 * GIB,
            "a guest has at most 2 GiB of ordinary memory"
        );
        let bzimage = self
            .kernel
            .image
            .as_ref()
            .context("this kernel has no image to boot")?;
        let accelerator = match self.accelerator {
            Some(Accelerator::Kvm) if self.watched || self.counted => {
                bail!("QEMU sees what a guest does where it is emulated, not with KVM")
            }
            Some(Accelerator::Tcg) if self.recorded => Accelerator::InTurns,
            Some(accelerator) => accelerator,
            None if self.recorded => Accelerator::InTurns,
            // By the clock of such a machine a call takes microseconds, so that few are interrupted.
            None if self.counted => Accelerator::Counted,
            None if self.watched => Accelerator::Tcg,
            None => Accelerator::choose(self.kernel, self.root, self.progress)?,
        };
        ensure!(
            !(self.watched && self.counted),
            "QEMU's plugin sees either accesses to memory or system calls"
        );
        let plugin = match (self.watched, self.counted) {
            (false, false) => None,
            _ => Some(accesses::plugin(self.progress)?),
        };
        let parent = cache::create()?.join("vm");
        fs::create_dir_all(&parent)
            .with_context(|| format!("cannot create {}", parent.display()))?;
        let dir = memory::scratch(&parent, "vm")?;
        let modules = match self.disk {
            // It has its own.
            Some(_) => Vec::new(),
            None => self.initramfs(dir.path(), bzimage)?,
        };

        // A tree of the user's may not have what QEMU needs to start a vmlinux.
        let booted = match (self.packed, accelerator, self.kernel.flavour) {
            _ if self.disk.is_some() => bzimage.clone(),
            (true, ..) | (_, Accelerator::Kvm, _) | (.., None) => bzimage.clone(),
            _ => vmlinux::ensure(self.kernel, bzimage, self.root, self.progress)?,
        };

        let path = dir.path().to_owned();
        let started = Instant::now();
        let mut enter = self
            .root
            .enter()
            .chdir(dir.path())
            .ro_bind(&booted, &booted);
        if let Some(memory) = self.persistent {
            enter = enter.bind(memory.dir(), memory.dir());
        }
        let memories = self.virtio.iter().map(|device| device.memory);
        let memories = memories.chain(self.pci.bars.iter().map(|device| device.memory));
        for memory in memories.chain(self.pci.disks.iter().copied()) {
            enter = enter.bind(memory.dir(), memory.dir());
        }
        if let Some(disk) = &self.disk {
            enter = enter.bind(disk.path, disk.path);
        }
        // Where the plugin can read it.
        let memory = match self.recorded {
            true => Some(Persistent::new(self.ram)?),
            false => None,
        };
        if let Some(memory) = &memory {
            enter = enter.bind(memory.dir(), memory.dir());
        }
        const QEMU: &str = "qemu-system-x86_64";
        let mut qemu = if self.traced {
            let files: Vec<PathBuf> = self.virtio.iter().map(|d| d.memory.path()).collect();
            let mut strace = enter.command("strace");
            strace
                .args(flushes::arguments(self.faulty, &files))
                .arg(QEMU);
            strace
        } else {
            enter.command(QEMU)
        };
        if let Some(plugin) = &plugin {
            qemu.args(match self.counted {
                true => calls::arguments(plugin),
                false => accesses::arguments(plugin, memory.as_ref()),
            });
        }
        qemu.args(accelerator.arguments());
        if self.counted {
            qemu.args(calls::CPU);
        }
        qemu.args(self.arguments(dir.path(), &booted, memory.as_ref()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(dir.path().join("qemu"))?);
        let mut child = crate::exec::spawn(&mut qemu)?;
        let (to, from) = child
            .stdin
            .take()
            .zip(child.stdout.take())
            .context("QEMU has no standard streams")?;
        let vm = Vm {
            name: self.name.clone(),
            accelerator,
            boot: Duration::ZERO,
            kernel: String::new(),
            qemu: child,
            channel: Mutex::new(Some(Channel::new(to, from))),
            monitor: Mutex::default(),
            places: bar::Places::new(&self.pci, self.virtio.len()),
            slowness: self.slowness(),
            dir: Some(dir),
            _memory: memory,
            recordings: AtomicU32::new(0),
            kept: None,
            modules: modules.iter().map(Module::path).collect(),
        };
        let vm = vm.booted(started, self.boot_timeout * self.slowness())?;
        if self.has_monitor() {
            // At once: QEMU tells no news to who comes late.
            let monitor = Monitor::connect(&path)?;
            *vm.monitor.lock().unwrap_or_else(PoisonError::into_inner) = Some(monitor);
        }
        Ok(vm)
    }
}

/// A path as the value of an option of QEMU's, where a comma would end it.
fn value(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// A machine. It loses its power when this is dropped.
#[derive(Debug)]
pub struct Vm {
    name: String,
    accelerator: Accelerator,
    boot: Duration,
    kernel: String,
    qemu: Child,
    /// `None` once it has become a terminal.
    channel: Mutex<Option<Channel>>,
    /// `None` without devices that can come and go.
    monitor: Mutex<Option<Monitor>>,
    places: bar::Places,
    /// How many times as long as usual everything may take.
    slowness: u32,
    dir: Option<TempDir>,
    /// Its ordinary memory, if that is a file.
    _memory: Option<Persistent>,
    /// How many logs there are.
    recordings: AtomicU32,
    kept: Option<PathBuf>,
    /// Paths of what is loaded at boot.
    modules: Vec<String>,
}

/// A system call in the guest failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Errno {
    /// The error's number.
    pub errno: i32,
    /// What was attempted, and the error's text.
    pub text: String,
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Errno {}

impl Vm {
    fn booted(mut self, started: Instant, timeout: Duration) -> Result<Self> {
        self.kernel = self.ready("boot", timeout)?;
        self.boot = started.elapsed();
        self.load_modules()?;
        Ok(self)
    }

    /// Waits until the guest's agent has started, and returns its kernel's release.
    fn ready(&self, what: &str, timeout: Duration) -> Result<String> {
        let ready = match self.line().as_mut() {
            Some(channel) => channel.ready(timeout)?,
            None => Err(Silence::Ended),
        };
        ready.map_err(|silence| self.silent(what, silence, timeout))
    }

    fn load_modules(&self) -> Result<()> {
        for path in &self.modules {
            self.insmod(path, "")??;
        }
        Ok(())
    }

    /// Runs a shell script in the guest that ends with the start of another kernel, see [`Builder::next_kernel`], and
    /// waits until that one does what it is told.
    pub fn into_next_kernel(&self, script: &str) -> Result<()> {
        let run = Run {
            argv: ["sh", "-e", "-c", script].map(str::to_owned).into(),
            timeout_ms: (COMMAND * self.slowness).as_millis() as u64,
            ..Run::default()
        };
        if let Some(channel) = self.line().as_mut() {
            channel.send(&Call {
                // Of no other: who waits for an answer would skip it.
                id: u64::MAX,
                request: Request::Run(run),
            })?;
        }
        self.ready(script, (BOOT + COMMAND) * self.slowness)?;
        self.load_modules()
    }

    /// The machine's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What runs the guest's instructions.
    pub fn accelerator(&self) -> Accelerator {
        self.accelerator
    }

    /// How long it took until the guest did what it was told.
    pub fn boot_time(&self) -> Duration {
        self.boot
    }

    /// The kernel's release, as the guest says it.
    pub fn kernel(&self) -> &str {
        &self.kernel
    }

    fn line(&self) -> MutexGuard<'_, Option<Channel>> {
        self.channel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask(&self, request: Request, timeout: Duration) -> Result<Result<Reply, Errno>> {
        let timeout = timeout * self.slowness;
        let what = match &request {
            Request::Run(run) => run.argv.last().cloned().unwrap_or_default(),
            Request::Insmod { path, params } => format!("insmod {path} {params}"),
            Request::Rmmod { name } => format!("rmmod {name}"),
            Request::Read { path, .. } => format!("read {path}"),
            Request::Write { path, .. } => format!("write {path}"),
            _ => "an answer".into(),
        };
        let answer = match self.line().as_mut() {
            Some(channel) => channel.call(request, timeout)?,
            None => Err(Silence::Ended),
        };
        match answer {
            Ok(Reply::Errno { errno, text }) => Ok(Err(Errno { errno, text })),
            Ok(reply) => Ok(Ok(reply)),
            Err(silence) => Err(self.silent(&what, silence, timeout)),
        }
    }

    fn silent(&self, what: &str, silence: Silence, timeout: Duration) -> anyhow::Error {
        let qemu = self.file("qemu");
        let silence = match silence {
            Silence::Ended if qemu.contains("Assertion `") => Silence::Crashed,
            silence => silence,
        };
        let why = match silence {
            Silence::Ended => "the machine stopped".to_owned(),
            Silence::Crashed => "QEMU has crashed".to_owned(),
            Silence::TimedOut => format!("the guest did not answer within {} s", timeout.as_secs()),
        };
        let qemu = if qemu.is_empty() {
            String::new()
        } else {
            format!("\nQEMU said:\n{qemu}")
        };
        let name = &self.name;
        let console = self.console_tail();
        Error::new(silence).context(format!("{name}: {what}: {why}{qemu}\n{console}"))
    }

    /// Runs a program in the guest.
    pub fn run(&self, argv: &[&str]) -> Result<Ran> {
        self.run_for(argv, COMMAND)
    }

    /// Runs a program in the guest, and kills it after `timeout`, or after more if its kernel is slow.
    pub fn run_for(&self, argv: &[&str], timeout: Duration) -> Result<Ran> {
        let run = Run {
            argv: argv.iter().map(|&arg| arg.to_owned()).collect(),
            timeout_ms: (timeout * self.slowness).as_millis() as u64,
            ..Run::default()
        };
        match self.ask(Request::Run(run), timeout + SLACK)?? {
            Reply::Ran(ran) => Ok(ran),
            other => bail!("the guest's agent answered {other:?}"),
        }
    }

    /// Runs a shell script in the guest, which may fail.
    pub fn try_sh(&self, script: &str) -> Result<Ran> {
        self.run(&["sh", "-c", script])
    }

    /// Runs a shell script in the guest, which must succeed, and returns what it wrote.
    pub fn sh(&self, script: &str) -> Result<String> {
        self.sh_for(script, COMMAND)
    }

    /// As [`Vm::sh`], with `timeout`.
    pub fn sh_for(&self, script: &str, timeout: Duration) -> Result<String> {
        let ran = self.run_for(&["sh", "-e", "-c", script], timeout)?;
        let how = match ran.end {
            End::Exit(0) => return Ok(ran.stdout),
            End::Exit(code) => format!("exited with {code}"),
            End::Signal(signal) => format!("was killed by signal {signal}"),
            End::Timeout => {
                format!("was killed after {} s", (timeout * self.slowness).as_secs())
            }
        };
        bail!(
            "{}: in the guest, this {how}:\n    {}\nIt wrote:\n{}\nand to standard error:\n{}\n{}",
            self.name,
            script.trim().replace('\n', "\n    "),
            console::tail(&ran.stdout, 40),
            console::tail(&ran.stderr, 40),
            self.dmesg_tail()
        )
    }

    /// Reads a file of the guest.
    pub fn read(&self, path: &str) -> Result<Vec<u8>> {
        const CHUNK: u64 = 1 << 18;
        let mut data: Vec<u8> = Vec::new();
        loop {
            let request = Request::Read {
                path: path.to_owned(),
                offset: data.len() as u64,
                len: CHUNK,
            };
            match self.ask(request, COMMAND)?? {
                Reply::Data(Bytes(piece)) if piece.is_empty() => return Ok(data),
                Reply::Data(Bytes(piece)) => data.extend(piece),
                other => bail!("the guest's agent answered {other:?}"),
            }
        }
    }

    /// Reads a file of the guest that is text, such as those of /proc and /sys.
    pub fn text(&self, path: &str) -> Result<String> {
        // In one piece: such files may not be read from the middle.
        let request = Request::Read {
            path: path.to_owned(),
            offset: 0,
            len: 1 << 22,
        };
        match self.ask(request, COMMAND)?? {
            Reply::Data(Bytes(data)) => Ok(String::from_utf8_lossy(&data).into_owned()),
            other => bail!("the guest's agent answered {other:?}"),
        }
    }

    /// Writes a file of the guest.
    pub fn write(&self, path: &str, data: &[u8]) -> Result<()> {
        let empty: [&[u8]; 1] = [&[]];
        let pieces = data
            .chunks(PIECE)
            .chain(empty.into_iter().take(usize::from(data.is_empty())));
        for (n, piece) in pieces.enumerate() {
            let request = Request::Write {
                path: path.to_owned(),
                data: Bytes(piece.to_vec()),
                append: n > 0,
            };
            self.ask(request, COMMAND)??;
        }
        Ok(())
    }

    /// Loads a module. The kernel's refusal is the inner result.
    pub fn insmod(&self, path: &str, params: &str) -> Result<Result<(), Errno>> {
        self.insmod_for(path, params, COMMAND)
    }

    /// As [`Vm::insmod`], with `timeout`.
    pub fn insmod_for(
        &self,
        path: &str,
        params: &str,
        timeout: Duration,
    ) -> Result<Result<(), Errno>> {
        let request = Request::Insmod {
            path: path.to_owned(),
            params: params.to_owned(),
        };
        Ok(self.ask(request, timeout)?.map(drop))
    }

    /// Unloads a module. The kernel's refusal is the inner result.
    pub fn rmmod(&self, name: &str) -> Result<Result<(), Errno>> {
        let request = Request::Rmmod {
            name: name.to_owned(),
        };
        Ok(self.ask(request, COMMAND)?.map(drop))
    }

    fn monitor<T>(&self, ask: impl FnOnce(&mut Monitor) -> Result<T>) -> Result<T> {
        let mut monitor = self.monitor.lock().unwrap_or_else(PoisonError::into_inner);
        let monitor = monitor
            .as_mut()
            .context("the machine has no devices that can come and go")?;
        ask(monitor).with_context(|| {
            let said = self.file("qemu");
            format!("{}: QEMU said: {:?}", self.name, console::tail(&said, 5))
        })
    }

    /// Plugs virtio-pmem device number `n` in, which the guest notices by and by.
    pub fn plug(&self, n: usize) -> Result<()> {
        self.monitor(|monitor| monitor.plug(&virtio::pluggable(n)))
    }

    /// Has the guest switch off the slot of virtio-pmem device number `n`, which may take until `timeout`, and waits
    /// until the device has gone. QEMU does not offer to begin this: its `device_del` knows no such devices.
    pub fn unplug(&self, n: usize, timeout: Duration) -> Result<()> {
        self.sh_for(&virtio::switch_off(n), timeout)?;
        self.wait_until_gone(&virtio::pluggable(n), SLACK)
    }

    fn wait_until_gone(&self, device: &Pluggable, timeout: Duration) -> Result<()> {
        self.monitor(|monitor| monitor.wait_until_gone(device, timeout * self.slowness))
    }

    /// Plugs BAR number `n` in, which the guest notices by and by.
    pub fn plug_bar(&self, n: usize) -> Result<()> {
        let (path, size) = self.places.memory(n)?;
        self.monitor(|monitor| monitor.plug_file(&bar::pluggable(n), path, size))
    }

    /// Asks the guest to let go of BAR number `n`, and waits until it has. With [`Builder::native_hotplug`] the guest
    /// begins after five seconds, in which somebody could change his mind.
    pub fn unplug_bar(&self, n: usize, timeout: Duration) -> Result<()> {
        let device = bar::pluggable(n);
        self.monitor(|monitor| monitor.unplug(&device))?;
        self.wait_until_gone(&device, timeout)
    }

    /// Pulls BAR number `n` out of its slot: nobody in the guest was asked. With [`Builder::native_hotplug`], on a machine
    /// with one CPU, the guest is told.
    pub fn pull_bar(&self, n: usize) -> Result<()> {
        // At once: what serves the port's interrupts has priority, too.
        self.sh(&format!(
            "chrt -f 99 pmem-guest slot-pull {}",
            self.bar_port(n)
        ))?;
        self.wait_until_gone(&bar::pluggable(n), SLACK)
    }

    /// The PCI function of BAR number `n`.
    pub fn bar(&self, n: usize) -> String {
        self.places.bar(n)
    }

    /// The PCI function of the port that BAR number `n` is behind.
    pub fn bar_port(&self, n: usize) -> String {
        self.places.port(n)
    }

    /// The PCI function of NVMe disk number `n`.
    pub fn nvme(&self, n: usize) -> String {
        self.places.disk(n)
    }

    /// The guest's memory that NVMe disks have read or written so far, addresses and bytes, see [`Builder::watch_nvme`].
    pub fn nvme_accesses(&self) -> Vec<(u64, u64)> {
        bar::accesses(&self.file("qemu"))
    }

    /// The host's flushes of virtio-pmem devices so far, see [`Builder::watch_flushes`].
    pub fn flushes(&self) -> Result<Vec<Flush>> {
        flushes::parse(&self.file(flushes::LOG)).with_context(|| self.name.clone())
    }

    /// Counts how the guest's CPUs access this range of physical addresses from now on, and forgets what was counted
    /// before. The machine must have been started with [`Builder::watch_accesses`].
    pub fn watch(&self, range: Range<u64>) -> Result<()> {
        let start = range.start;
        let size = range.end.saturating_sub(start);
        match self.ask_plugin(pmem_trace::Request::Watch { start, size })? {
            pmem_trace::Reply::Done => Ok(()),
            other => bail!("{}: QEMU's plugin answered {other:?}", self.name),
        }
    }

    /// What was counted since [`Vm::watch`]: all that there was, or this fails.
    pub fn accesses(&self) -> Result<Accesses> {
        let accesses = match self.ask_plugin(pmem_trace::Request::Report)? {
            pmem_trace::Reply::Accesses(accesses) => accesses,
            other => bail!("{}: QEMU's plugin answered {other:?}", self.name),
        };
        ensure!(
            accesses.lost == 0,
            "{}: QEMU does not know the addresses of {} accesses to memory, which may be in the range",
            self.name,
            accesses.lost
        );
        Ok(accesses)
    }

    /// Records what the guest's CPUs do to this range of physical addresses from now on, and in which order, until
    /// [`Vm::recorded`]. The machine must have been started with [`Builder::record_writes`].
    pub fn record(&self, range: Range<u64>) -> Result<()> {
        let request = pmem_trace::Request::Record {
            start: range.start,
            size: range.end.saturating_sub(range.start),
            log: accesses::log(self.recordings.fetch_add(1, Ordering::Relaxed) + 1).into(),
        };
        match self.ask_plugin(request)? {
            pmem_trace::Reply::Done => Ok(()),
            other => bail!("{}: QEMU's plugin answered {other:?}", self.name),
        }
    }

    /// Ends what [`Vm::record`] began, and returns the path of the log, which [`pmem_trace::record::Log`] reads. The file
    /// is gone with the machine.
    pub fn recorded(&self) -> Result<PathBuf> {
        match self.ask_plugin(pmem_trace::Request::EndRecord)? {
            pmem_trace::Reply::Recorded { log, .. } => {
                let dir = self.dir.as_ref().context("the machine has gone")?;
                Ok(dir.path().join(log))
            }
            other => bail!("{}: QEMU's plugin answered {other:?}", self.name),
        }
    }

    fn ask_plugin(&self, request: pmem_trace::Request) -> Result<pmem_trace::Reply> {
        let dir = self.dir.as_ref().context("the machine has gone")?;
        pmem_trace::ask(&dir.path().join(accesses::SOCKET), request).with_context(|| {
            format!(
                "{}: QEMU does not tell of accesses to memory; it does if the machine has Builder::watch_accesses",
                self.name
            )
        })
    }

    /// Says in a line for each of `counted` how many there were of what shape, and which function of the kernel's, or
    /// of a module's, which is then in brackets, made them. Of programs, it is the address.
    pub fn explain(&self, counted: &[Counted]) -> Result<String> {
        let functions = self.functions(counted.iter().map(|counted| counted.pc))?;
        accesses::explain(counted, &functions)
    }

    /// What [`accesses::lookup`] writes.
    fn functions(&self, addresses: impl Iterator<Item = u64>) -> Result<String> {
        let argv = accesses::lookup(addresses);
        let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
        let ran = self.run(&argv)?;
        ensure!(
            ran.end == End::Exit(0),
            "{}: the guest does not tell functions: {}",
            self.name,
            ran.stderr
        );
        Ok(ran.stdout)
    }

    /// Runs `script`, which runs `pmem-guest calls`, and says what the kernel executes for such a call. The machine must
    /// have been started with [`Builder::count_calls`]. Fails if too few calls are the same.
    pub fn count_calls(&self, script: &str) -> Result<Calls> {
        use pmem_trace::calls::{self as language, Reply, Request};

        let dir = self.dir.as_ref().context("the machine has gone")?;
        let socket = dir.path().join(calls::SOCKET);
        let ask = |request| {
            language::ask(&socket, request).with_context(|| {
                format!(
                    "{}: QEMU does not tell of system calls; it does if the machine has Builder::count_calls",
                    self.name
                )
            })
        };
        match ask(Request::Begin)? {
            Reply::Done => {}
            other => bail!("{}: QEMU's plugin answered {other:?}", self.name),
        }
        self.monitor(Monitor::translate_anew)?;
        self.sh(script)?;
        let calls = match ask(Request::Report)? {
            Reply::Calls(calls) => calls,
            other => bail!("{}: QEMU's plugin answered {other:?}", self.name),
        };
        ensure!(
            calls.same > 0 && SAME * calls.same >= calls.all,
            "{}: {script}: of {} calls that QEMU has seen no more than {} are the same",
            self.name,
            calls.all,
            calls.same
        );
        Ok(calls)
    }

    /// Names the functions that `calls` execute, of all of them at once: the guest has many functions to look through.
    pub fn name_calls(&self, calls: &[Calls]) -> Result<Vec<SystemCall>> {
        let addresses = calls::addresses(calls);
        let functions = self.functions(addresses.iter().copied())?;
        calls::name(calls, &addresses, &functions)
    }

    /// Cuts the power: what the guest had not made durable is lost.
    pub fn power_cut(mut self) -> Result<()> {
        self.kill()
    }

    /// Writes everything back and powers off.
    pub fn power_off(self) -> Result<()> {
        self.ends("power off", Request::PowerOff, SLACK)
    }

    /// Has systemd, in a guest that boots from a disk, stop what runs and power off.
    pub fn shut_down(self) -> Result<()> {
        let timeout = COMMAND * self.slowness;
        let run = Run {
            argv: ["systemctl", "poweroff"].map(str::to_owned).into(),
            timeout_ms: timeout.as_millis() as u64,
            ..Run::default()
        };
        self.ends("systemctl poweroff", Request::Run(run), timeout)
    }

    /// Asks the guest for what ends it, and waits until it has ended.
    fn ends(mut self, what: &str, request: Request, timeout: Duration) -> Result<()> {
        let mut line = self.line();
        if let Some(channel) = line.as_mut() {
            channel.send(&Call { id: 0, request })?;
            if !channel.ended(timeout) {
                drop(line);
                return Err(self.silent(what, Silence::TimedOut, timeout));
            }
        }
        drop(line);
        self.kill()
    }

    /// Kills QEMU, and returns when it is dead.
    fn kill(&mut self) -> Result<()> {
        // bwrap is what we started. QEMU dies with it, and closes its end of the pipe.
        let killed = self.qemu.kill();
        self.qemu.wait().context("cannot wait for QEMU")?;
        killed.context("cannot kill QEMU")?;
        let channel = self.line().take();
        if let Some(channel) = channel {
            ensure!(channel.ended(SLACK), "{}: QEMU does not die", self.name);
        }
        Ok(())
    }

    /// Wires the user's terminal to a shell in the guest, until the user leaves it. The guest then powers off.
    pub fn shell(self) -> Result<()> {
        let channel = self.line().take();
        match channel {
            Some(channel) => channel.terminal(),
            None => bail!("{} is not running", self.name),
        }
    }

    /// The kernel's log.
    pub fn dmesg(&self) -> Result<String> {
        self.sh("dmesg")
    }

    fn dmesg_tail(&self) -> String {
        match self.dmesg() {
            Ok(text) => format!("The guest's log ends:\n{}", console::tail(&text, 25)),
            Err(error) => format!("The guest's log cannot be read: {error:#}"),
        }
    }

    /// What the guest has printed on its console.
    pub fn console(&self) -> String {
        self.file("console")
    }

    /// The last lines of that, for a message.
    pub fn console_tail(&self) -> String {
        format!(
            "The guest's console ends:\n{}",
            console::tail(&self.console(), 40)
        )
    }

    fn file(&self, name: &str) -> String {
        let Some(dir) = &self.dir else {
            return String::new();
        };
        let bytes = fs::read(dir.path().join(name)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).replace('\r', "")
    }

    /// Of `log`, a part of the kernel's log, the lines in which the kernel complains of something.
    pub fn complaints_in(log: &str) -> Vec<String> {
        console::complaints(log)
    }

    /// What the kernel complained of: warnings, oopses, reports of the sanitizers and of lockdep.
    pub fn complaints(&self) -> Vec<String> {
        console::complaints(&self.console())
    }

    /// Fails if the kernel complained of anything.
    pub fn check_clean(&self) -> Result<()> {
        let complaints = self.complaints();
        ensure!(
            complaints.is_empty(),
            "{}: the guest's kernel complained:\n{}",
            self.name,
            complaints.join("\n")
        );
        Ok(())
    }

    /// Keeps the console's file when the machine is gone, and returns its path.
    pub fn keep_console(&mut self) -> PathBuf {
        let path = repo::target()
            .join("vm")
            .join(format!("{}.console", self.name));
        self.kept = Some(path.clone());
        path
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // Both fail only if it is gone already.
        self.qemu.kill().ok();
        self.qemu.wait().ok();
        let channel = self.line().take();
        if let Some(channel) = channel {
            channel.ended(SLACK);
        }
        if let Some(path) = &self.kept {
            if let Some(dir) = path.parent() {
                fs::create_dir_all(dir).ok();
            }
            if let Err(error) = fs::write(path, self.console()) {
                eprintln!("cannot write {}: {error}", path.display());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comma_in_a_path_does_not_end_an_option() {
        assert_eq!(value(Path::new("/a,b/c")), "/a,,b/c");
    }
}
