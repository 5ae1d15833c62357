// SPDX-License-Identifier: GPL-2.0-only

//! A range that is RAM and storage at once, beside the kernel's `dax/kmem`, which makes RAM of one, and `brd`, whose
//! disk takes memory as it is written.

use super::table::{Measured, Row, Unit};
use super::{fio, Plan, Table};
use crate::flavour::Flavour;
use crate::progress::Progress;
use crate::vm::{Setup, Use, Vm, GIB, MIB, PMEM_KO, UPPER};
use anyhow::{ensure, Context, Result};
use serde::Deserialize;

/// Of the memory that is a device-dax instance.
const RANGE: u64 = GIB;

/// Of the part of a disk that is measured, and of the whole of brd's.
const DISK: u64 = 64 * MIB;

/// How often what takes milliseconds is done in a round.
const TIMES: u32 = 5;

/// The instance.
const INSTANCE: &str = "dax0.0";

/// Its drivers.
const BUS: &str = "/sys/bus/dax/drivers";

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    /// This driver; `atomic` is its parameter.
    Kmem { atomic: bool },
    /// The driver kmem of the dax bus.
    DaxKmem,
    /// The RAM disk.
    Brd,
}

impl Side {
    /// Its disk.
    fn disk(self) -> &'static str {
        match self {
            Self::Brd => "/dev/ram0",
            _ => "/dev/kmem1",
        }
    }

    /// The attribute that says whether the range is RAM, and what it says then. It is `unplugged` else.
    fn state(self) -> (&'static str, &'static str) {
        match self {
            Self::DaxKmem => ("/sys/bus/dax/devices/dax0.0/state", "online_movable"),
            _ => ("/sys/devices/faux/kmem1/state", "online"),
        }
    }
}

/// What to measure.
#[derive(Debug, Clone, Copy)]
enum Work {
    /// Memory without data becomes RAM.
    Plug,
    /// And goes.
    Unplug,
    /// A fio job on blocks that have memory.
    Fio(&'static str),
    /// A write of each block, none of which has memory.
    First,
    /// A discard of blocks, which have memory or not.
    Discard { written: bool },
}

const KMEM: Side = Side::Kmem { atomic: true };

type Part = (
    [&'static str; 2],
    [Side; 2],
    &'static [(&'static str, Unit, Work)],
);

const PARTS: &[Part] = &[
    (
        ["kmem", "dax/kmem"],
        [KMEM, Side::DaxKmem],
        &[
            ("hand over a range without data", Unit::Time, Work::Plug),
            ("unplug it", Unit::Time, Work::Unplug),
        ],
    ),
    (
        ["kmem", "brd"],
        [KMEM, Side::Brd],
        &[
            (
                "4 KiB random read, psync",
                Unit::Operations,
                Work::Fio("--rw=randread --bs=4k --ioengine=psync"),
            ),
            (
                "4 KiB random write, psync",
                Unit::Operations,
                Work::Fio("--rw=randwrite --bs=4k --ioengine=psync"),
            ),
            (
                "4 KiB random read, io_uring depth 32",
                Unit::Operations,
                Work::Fio("--rw=randread --bs=4k --ioengine=io_uring --iodepth=32"),
            ),
            (
                "4 KiB random write, io_uring depth 32",
                Unit::Operations,
                Work::Fio("--rw=randwrite --bs=4k --ioengine=io_uring --iodepth=32"),
            ),
            (
                "first write of each block, 4 KiB, psync",
                Unit::Operations,
                Work::First,
            ),
            (
                "discard of 64 MiB, written",
                Unit::Time,
                Work::Discard { written: true },
            ),
            (
                "discard of 64 MiB, empty",
                Unit::Time,
                Work::Discard { written: false },
            ),
        ],
    ),
    (
        ["atomic", "in place"],
        [KMEM, Side::Kmem { atomic: false }],
        &[
            (
                "4 KiB random write of kmem, psync",
                Unit::Operations,
                Work::Fio("--rw=randwrite --bs=4k --ioengine=psync"),
            ),
            (
                "4 KiB random write of kmem, io_uring depth 32",
                Unit::Operations,
                Work::Fio("--rw=randwrite --bs=4k --ioengine=io_uring --iodepth=32"),
            ),
        ],
    ),
];

/// The titles of all rows.
pub fn titles() -> impl Iterator<Item = &'static str> {
    PARTS
        .iter()
        .flat_map(|(.., rows)| rows.iter().map(|&(title, ..)| title))
}

/// Measures the rows that `plan` has.
pub fn table(plan: &Plan, progress: &Progress) -> Result<Table> {
    let setup = Setup::new(Flavour::Cloud, progress)?;
    let step = progress.step("boot, make a device-dax instance");
    let mut bench = Bench::new(&setup, plan, progress)?;
    step.done();

    let count = titles().filter(|title| plan.has(title)).count() as u64;
    let step = progress.count("measure", count * u64::from(plan.rounds) * 2);
    let mut parts = Vec::new();
    for (columns, sides, rows) in PARTS {
        let mut table = Vec::new();
        for &(title, unit, work) in rows.iter().filter(|(title, ..)| plan.has(title)) {
            let mut sums = [Measured::default(); 2];
            // In turns, so that what else the host does meanwhile is shared.
            for _ in 0..plan.rounds {
                for ((&side, sum), name) in sides.iter().zip(&mut sums).zip(columns) {
                    step.note(&format!("{title}: {name}"));
                    *sum += bench.measure(side, work)?;
                    step.tick();
                }
            }
            table.push(Row {
                title,
                unit,
                sides: sums.map(Some).to_vec(),
            });
        }
        parts.push(super::Part {
            columns: columns.to_vec(),
            rows: table,
        });
    }
    step.done();
    let Bench { vm, size, .. } = bench;
    vm.check_clean()?;
    let table = Table {
        machine: plan.machine(&vm),
        about: format!(
            "A range of {} MiB, of whose disk {} MiB are used; brd's has {} MiB.",
            size / MIB,
            DISK / MIB,
            DISK / MIB
        ),
        parts,
    };
    vm.power_off()?;
    Ok(table)
}

/// The machine, in which one driver at a time has the instance.
struct Bench<'a> {
    vm: Vm,
    plan: &'a Plan,
    /// Whose the instance is.
    owner: Option<Side>,
    /// How much of it becomes RAM.
    size: u64,
}

/// What `pmem-guest time-write` says.
#[derive(Deserialize)]
struct Took {
    ns: u64,
    cpu_ns: u64,
}

impl<'a> Bench<'a> {
    fn new(setup: &Setup, plan: &'a Plan, progress: &Progress) -> Result<Self> {
        let mut vm = plan
            .builder(setup, progress)
            .ram(2 * GIB)
            .upper(RANGE)
            .range(Use::Protected, UPPER, RANGE);
        for module in [
            "nd_pmem",
            "nd_e820",
            "dax_pmem",
            "device_dax",
            "kmem",
            "brd",
        ] {
            vm = vm.module(module);
        }
        let vm = vm.start()?;
        // The kernel tests its ciphers while nobody waits for them. The parameters of brd are its own: it makes 16
        // disks by itself.
        vm.sh(&format!(
            "while grep -qs cryptomgr_test /proc/[0-9]*/comm; do sleep 0.1; done
             ndctl create-namespace -f -e namespace0.0 -m devdax >/dev/null
             echo {INSTANCE} >{BUS}/device_dax/unbind
             echo online_movable >/sys/devices/system/memory/auto_online_blocks
             rmmod brd && insmod /modules/brd.ko rd_nr=1 rd_size={}",
            DISK >> 10
        ))?;
        let mut bench = Self {
            vm,
            plan,
            owner: None,
            size: 0,
        };
        bench.bind(KMEM)?;
        let iomem = bench.vm.text("/proc/iomem")?;
        bench.size = added(&iomem).context("/proc/iomem shows no memory of the driver")?;
        Ok(bench)
    }

    /// Gives the instance to `side`, if that wants it.
    fn bind(&mut self, side: Side) -> Result<()> {
        if side == Side::Brd || self.owner == Some(side) {
            return Ok(());
        }
        match self.owner.take() {
            Some(Side::Kmem { .. }) => {
                self.vm.sh(&format!("echo {INSTANCE} >{BUS}/pmem/unbind"))?;
                self.vm.rmmod("pmem")??;
            }
            Some(owner) => {
                let (state, _) = owner.state();
                self.vm.sh(&format!(
                    "echo unplugged >{state}
                     echo {INSTANCE} >{BUS}/kmem/remove_id
                     echo {INSTANCE} >{BUS}/kmem/unbind"
                ))?;
            }
            None => {}
        }
        let driver = match side {
            Side::Kmem { atomic } => {
                let params = format!(
                    "kmem_dax=1 kmem_format=blk kmem_atomic={}",
                    u8::from(atomic)
                );
                self.vm.insmod(PMEM_KO, &params)??;
                "pmem"
            }
            _ => "kmem",
        };
        // This also binds what has the identifier.
        let (state, online) = side.state();
        self.vm.sh(&format!(
            "echo {INSTANCE} >{BUS}/{driver}/new_id
             test $(cat {state}) = {online}"
        ))?;
        self.owner = Some(side);
        Ok(())
    }

    fn measure(&mut self, side: Side, work: Work) -> Result<Measured> {
        self.bind(side)?;
        let disk = side.disk();
        match work {
            Work::Plug | Work::Unplug => {
                if matches!(side, Side::Kmem { .. }) {
                    self.vm.sh(&format!("blkdiscard {disk}"))?;
                }
                self.plug(side, matches!(work, Work::Plug))
            }
            Work::Fio(options) => {
                self.fill(disk, true)?;
                let options =
                    format!("--direct=1 --norandommap --randrepeat=0 --size={DISK} {options}");
                fio::run(&self.vm, disk, &options, self.plan.time)
            }
            Work::First => self.repeat(|bench| {
                bench.fill(disk, false)?;
                let options =
                    format!("--direct=1 --rw=write --bs=4k --ioengine=psync --size={DISK}");
                fio::once(&bench.vm, disk, &options)
            }),
            Work::Discard { written } => self.repeat(|bench| {
                bench.fill(disk, written)?;
                fio::discard(&bench.vm, disk, DISK)
            }),
        }
    }

    /// How often to do what takes milliseconds.
    fn times(&self) -> u32 {
        if self.plan.counted {
            1
        } else {
            TIMES
        }
    }

    fn repeat(&self, measure: impl Fn(&Self) -> Result<Measured>) -> Result<Measured> {
        let mut sum = Measured::default();
        for _ in 0..self.times() {
            sum += measure(self)?;
        }
        Ok(sum)
    }

    /// Writes the part of a disk that is measured, or discards it.
    fn fill(&self, disk: &str, written: bool) -> Result<()> {
        self.vm.sh(&format!("blkdiscard --length {DISK} {disk}"))?;
        if written {
            let options = format!("--direct=1 --rw=write --bs=1m --ioengine=psync --size={DISK}");
            fio::once(&self.vm, disk, &options)?;
        }
        Ok(())
    }

    /// Unplugs the instance and plugs it again, and measures one of both.
    fn plug(&self, side: Side, plug: bool) -> Result<Measured> {
        let (attribute, online) = side.state();
        let set = |state: &str| {
            let output = self
                .vm
                .sh(&format!("pmem-guest time-write {attribute} {state}"))?;
            let took: Took =
                serde_json::from_str(&output).with_context(|| format!("not a time: {output:?}"))?;
            Ok::<_, anyhow::Error>(Measured {
                operations: 1.0,
                bytes: self.size as f64,
                seconds: took.ns as f64 / 1e9,
                cpu_seconds: Some(took.cpu_ns as f64 / 1e9),
                instructions: None,
            })
        };
        let mut sum = Measured::default();
        // The first time does not count: after the other driver, caches are cold.
        for n in 0..=self.times() {
            let unplugged = set("unplugged")?;
            let plugged = set(online)?;
            if n > 0 {
                sum += if plug { plugged } else { unplugged };
            }
        }
        let is = self.vm.text(attribute)?;
        ensure!(is.trim() == online, "{attribute} is {}", is.trim());
        Ok(sum)
    }
}

/// The bytes of the memory that a driver has added. It is there more than once, as what was claimed and what was added.
fn added(iomem: &str) -> Option<u64> {
    iomem
        .lines()
        .filter(|line| line.contains("System RAM ("))
        .filter_map(|line| {
            let (range, _) = line.trim().split_once(" : ")?;
            let (first, last) = range.split_once('-')?;
            let number = |text| u64::from_str_radix(text, 16).ok();
            Some(number(last)?.checked_sub(number(first)?)? + 1)
        })
        .max()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_of_added_memory_is_found() {
        let iomem = "00000000-7fffffff : System RAM\n\
                     100000000-13fffffff : Persistent Memory\n  \
                     100000000-13fffffff : namespace0.0\n    \
                     108000000-13fffffff : dax0.0\n      \
                     108000000-13fffffff : System RAM (pmem)\n        \
                     108000000-13fffffff : System RAM (pmem)\n";
        assert_eq!(added(iomem), Some(896 * MIB));
        assert_eq!(added("0-ff : System RAM (x"), Some(256));
        assert_eq!(added("0-ff : System RAM"), None);
        assert_eq!(added("0-zz : System RAM (x"), None);
    }
}
