// SPDX-License-Identifier: GPL-2.0-only

//! What the tests in virtual machines share.
//!
//! Each test boots a machine of its own, which takes some seconds, and there are never more machines than CPUs. A
//! test fails if the guest's kernel complains of anything, whatever else the test looks at; the guest's console is
//! then kept in `target/vm`.

#![forbid(unsafe_code)]

pub mod pmemctl;

use anyhow::{ensure, Context, Error, Result};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;
use xtask::flavour::Flavour;
use xtask::kernel::{series, Series, KERNEL_VARIABLE};
use xtask::progress::Progress;
use xtask::test::FLAVOURS_VARIABLE;
use xtask::vm::{Builder, Setup, Vm, PMEM_KO};

pub use xtask::vm::{End, Persistent, Random, Use, GIB, MIB, UPPER};

/// Where steps are shown.
pub static PROGRESS: LazyLock<Progress> = LazyLock::new(Progress::plain);

/// The kernel and the module, found once.
pub fn setup(flavour: Flavour) -> Result<&'static Setup> {
    static SETUPS: LazyLock<Mutex<HashMap<Flavour, &'static Setup>>> =
        LazyLock::new(Mutex::default);
    let mut setups = lock(&SETUPS);
    if let Some(setup) = setups.get(&flavour) {
        return Ok(setup);
    }
    let setup = Box::leak(Box::new(Setup::new(flavour, &PROGRESS)?));
    setups.insert(flavour, setup);
    Ok(setup)
}

/// A machine that is called as the test is, with 1 GiB reserved at 4 GiB.
pub fn machine(flavour: Flavour) -> Result<Builder<'static>> {
    let name = thread::current()
        .name()
        .unwrap_or("test")
        .replace("::", "-");
    Ok(setup(flavour)?.vm(&PROGRESS).name(name))
}

/// The flavours that `PMEM_FLAVOURS` names; by default all that Debian or we build for tests.
fn flavours() -> Result<Vec<Flavour>> {
    match std::env::var(FLAVOURS_VARIABLE) {
        Ok(names) if !names.is_empty() => names
            .split(',')
            .map(|name| {
                let known = Flavour::ALL
                    .into_iter()
                    .find(|flavour| flavour.name() == name);
                known.with_context(|| {
                    format!("{FLAVOURS_VARIABLE} has {name:?}, which is no flavour")
                })
            })
            .collect(),
        _ => Ok(vec![
            Flavour::Cloud,
            Flavour::Amd64,
            Flavour::Test,
            Flavour::Builtin,
        ]),
    }
}

/// Whether the tests that are about `flavour` are to run.
pub fn wanted(flavour: Flavour) -> Result<bool> {
    let wanted = flavours()?.contains(&flavour);
    if !wanted {
        eprintln!("skipped: {FLAVOURS_VARIABLE} does not name {flavour}");
    }
    Ok(wanted)
}

/// Whether the kernels are of the newest series: what is said of a single version is said of that.
pub fn newest() -> Result<bool> {
    let series = series()?;
    let newest = series == Series::newest();
    if !newest {
        eprintln!("skipped: {KERNEL_VARIABLE} chooses Linux {series}");
    }
    Ok(newest)
}

/// The kernel of tests that any will do for: the first one that loads the driver as a module, Debian's for virtual
/// machines unless `PMEM_FLAVOURS` says otherwise.
pub fn flavour() -> Result<Flavour> {
    let loads = flavours()?
        .into_iter()
        .find(|&flavour| flavour != Flavour::Builtin);
    Ok(loads.unwrap_or(Flavour::Cloud))
}

/// Whether the kernel has KASAN, whose shadow takes an eighth of the machine's memory, and of what is mapped as I/O memory is.
pub fn has_kasan() -> Result<bool> {
    Ok(flavour()? == Flavour::Debug)
}

/// A machine with the kernel of [`flavour`].
pub fn stock() -> Result<Builder<'static>> {
    Ok(machine(flavour()?)?.module("ext4"))
}

/// Does what boots machines by itself, one at a time, when there may be one more.
pub fn alone<T>(body: impl FnOnce() -> T) -> T {
    let _permit = Permit::take();
    body()
}

/// A machine with one of Debian's kernels, which have what ours lack; none if `PMEM_FLAVOURS` names neither.
pub fn debian() -> Result<Option<Builder<'static>>> {
    let flavour = flavours()?.into_iter().find(|flavour| flavour.is_stock());
    let Some(flavour) = flavour else {
        eprintln!("skipped: {FLAVOURS_VARIABLE} names no kernel of Debian's");
        return Ok(None);
    };
    Ok(Some(machine(flavour)?.module("ext4")))
}

/// Boots a machine, does `body` in it, and cuts its power.
///
/// # Errors
///
/// `body`'s, or what the kernel complained of or has leaked, with where the console is kept.
pub fn boot(machine: Builder<'_>, body: impl FnOnce(&Vm) -> Result<()>) -> Result<()> {
    boot_dirty(machine, |vm| {
        body(vm)?;
        vm.check_clean()?;
        match vm.kernel().ends_with("-debug") {
            true => check_leaks(vm),
            false => Ok(()),
        }
    })
}

/// As [`boot`], and the power is cut as soon as `body` returns: what has to be durable is durable then, and what is
/// under way stays so. A look for leaks would give it half a minute.
pub fn cut(machine: Builder<'_>, body: impl FnOnce(&Vm) -> Result<()>) -> Result<()> {
    boot_dirty(machine, |vm| {
        body(vm)?;
        vm.check_clean()
    })
}

/// As [`boot`], for a kernel that is expected to complain. `body` looks at what it says.
pub fn boot_dirty(machine: Builder<'_>, body: impl FnOnce(&Vm) -> Result<()>) -> Result<()> {
    let _permit = Permit::take();
    let mut guest = Guest {
        vm: machine.start()?,
        good: false,
    };
    match body(&guest.vm) {
        Ok(()) => {
            guest.good = true;
            Ok(())
        }
        Err(error) => {
            guest.good = true;
            Err(error.context(keep_console(&mut guest.vm)))
        }
    }
}

/// Keeps the console. Returns where, and its end, for who has no more than what a test has printed.
fn keep_console(vm: &mut Vm) -> String {
    let path = vm.keep_console();
    format!(
        "the guest's console is in {}. {}",
        path.display(),
        vm.console_tail()
    )
}

/// Keeps the console when an assertion fails.
struct Guest {
    vm: Vm,
    good: bool,
}

impl Drop for Guest {
    fn drop(&mut self) {
        if !self.good {
            eprintln!("{}", keep_console(&mut self.vm));
        }
    }
}

/// The right to have a machine.
struct Permit;

static MACHINES: Mutex<usize> = Mutex::new(0);
static FREED: Condvar = Condvar::new();

impl Permit {
    fn take() -> Self {
        let limit = thread::available_parallelism().map_or(1, |n| n.get());
        let mut machines = lock(&MACHINES);
        while *machines >= limit {
            machines = FREED.wait(machines).unwrap_or_else(PoisonError::into_inner);
        }
        *machines += 1;
        Permit
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        *lock(&MACHINES) -= 1;
        FREED.notify_one();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Loads the driver.
pub fn load(vm: &Vm, params: &str) -> Result<()> {
    match vm.insmod(PMEM_KO, params)? {
        Ok(()) => Ok(()),
        Err(errno) => {
            Err(Error::new(errno).context(format!("it logged:\n{}", log(vm)?.join("\n"))))
        }
    }
}

/// Unloads the driver.
pub fn unload(vm: &Vm) -> Result<()> {
    vm.rmmod("pmem")?.context("the driver does not unload")
}

/// The pages that are free: also those that CPUs keep for their next allocations, which MemFree of /proc/meminfo leaves
/// out, and of which there are tens of MiB after a large range is gone.
pub fn free_pages(vm: &Vm) -> Result<u64> {
    let pages = vm.sh(
        "awk '$1 == \"pages\" && $2 == \"free\" { n += $3 } $1 == \"count:\" { n += $2 } END { print n }' /proc/zoneinfo",
    )?;
    Ok(pages.trim().parse()?)
}

/// The bytes of free memory, after caches were dropped.
pub fn free(vm: &Vm) -> Result<u64> {
    vm.sh("sync; echo 3 >/proc/sys/vm/drop_caches; sleep 1")?;
    Ok(free_pages(vm)? * 4096)
}

/// Where a kernel tells of memory that nobody has a pointer to any more; the debug kernel does.
const KMEMLEAK: &str = "/sys/kernel/debug/kmemleak";

/// Fails if memory of the kernel's has leaked, as far as the kernel can tell. Takes it half a minute or more.
///
/// It does not report what is younger than five seconds, nor what has changed since it last looked.
pub fn check_leaks(vm: &Vm) -> Result<()> {
    let script = format!(
        "test -e {KMEMLEAK} || exit 0; sleep 5; echo scan >{KMEMLEAK}; echo scan >{KMEMLEAK}; cat {KMEMLEAK}"
    );
    let report = vm.sh_for(&script, Duration::from_secs(300))?;
    ensure!(
        report.is_empty(),
        "memory of the kernel's has leaked:\n{report}"
    );
    Ok(())
}

/// What the driver has logged, without times and the prefix.
pub fn log(vm: &Vm) -> Result<Vec<String>> {
    let dmesg = vm.dmesg()?;
    let lines = dmesg.lines().filter_map(|line| {
        let text = line.split_once("] ").map_or(line, |(_, text)| text);
        text.strip_prefix("pmem: ").map(str::to_owned)
    });
    Ok(lines.collect())
}

/// Where a driver may leave something, and how to look.
const LOOKS: &[(&str, &str)] = &[
    ("/proc/iomem", "cat /proc/iomem"),
    ("/proc/modules", "cut -d' ' -f1 /proc/modules"),
    ("/proc/devices", "cat /proc/devices"),
    ("/proc/partitions", "cat /proc/partitions"),
    (
        "slab caches",
        "tail -n +3 /proc/slabinfo | cut -d' ' -f1 | sort",
    ),
    (
        "/sys",
        "find /sys/block /sys/class /sys/module /sys/devices/virtual /sys/devices/faux /sys/devices/system -maxdepth 3 | sort",
    ),
    (
        "/sys/kernel/debug",
        "find /sys/kernel/debug -maxdepth 2 | sort",
    ),
    ("/dev", "find /dev | sort"),
    (
        "/proc/vmallocinfo",
        "grep -c 'pmem' /proc/vmallocinfo || true",
    ),
];

/// Between the outputs of [`LOOKS`].
const SEPARATOR: &str = "--------";

/// What a driver that was unloaded, or refused to load, must not have changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace(BTreeMap<&'static str, String>);

impl Trace {
    /// Looks at the guest.
    pub fn of(vm: &Vm) -> Result<Self> {
        let all = LOOKS
            .iter()
            .map(|(_, script)| format!("{script}; echo {SEPARATOR};"));
        let output = vm.sh(&all.collect::<String>())?;
        let parts = output.split(SEPARATOR).map(str::to_owned);
        let seen = LOOKS.iter().map(|&(what, _)| what).zip(parts).collect();
        Ok(Self(seen))
    }

    /// Says what differs from `before`.
    pub fn check(&self, before: &Self) -> Result<()> {
        for (what, now) in &self.0 {
            let then = &before.0[what];
            let new: Vec<_> = now
                .lines()
                .filter(|&line| !then.lines().any(|l| l == line))
                .collect();
            let gone: Vec<_> = then
                .lines()
                .filter(|&line| !now.lines().any(|l| l == line))
                .collect();
            ensure!(
                now == then,
                "{what} has changed. New: {new:#?}. Gone: {gone:#?}"
            );
        }
        Ok(())
    }
}
