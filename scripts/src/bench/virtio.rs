// SPDX-License-Identifier: GPL-2.0-only

//! The disks of virtio-pmem devices, beside those of the kernel's own driver for them.
//!
//! A machine has two devices, each of a file on the same disk of the host's. The kernel's driver takes both as they are
//! found, and has to let go of one, which the module then takes.

use super::table::{Measured, Row, Unit};
use super::{fio, Part, Plan, Table};
use crate::flavour::Flavour;
use crate::progress::Progress;
use crate::vm::{Fault, Persistent, Setup, Vm, GIB, MIB, PMEM_KO};
use anyhow::{ensure, Context, Result};
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

/// What a slow host takes for a flush, beside what its disk takes: as one that writes to another machine.
const SLOW: Duration = Duration::from_millis(5);

/// Of each disk.
const SIZE: u64 = 256 * MIB;

/// What to measure.
#[derive(Debug, Clone, Copy)]
enum Work {
    /// A fio job on the disk which asks the host for nothing.
    Memory(&'static str),
    /// A fio job on the disk which waits for the host.
    Durable(&'static str),
    /// That many threads on the disk, each of which writes 4 KiB and makes that durable, over and over.
    Disk(u32),
    /// The same on ext4 without a page cache, each on a file of its own.
    Ext4(u32),
    /// As [`Work::Disk`], on a host that takes [`SLOW`] longer for each flush.
    Slow(u32),
}

impl Work {
    /// Whether time passes in which the guest does nothing.
    fn waits(self) -> bool {
        !matches!(self, Self::Memory(_))
    }

    /// Whether it is for the slow host.
    fn is_slow(self) -> bool {
        matches!(self, Self::Slow(_))
    }
}

const ROWS: &[(&str, Unit, Work)] = &[
    (
        "4 KiB random read, psync",
        Unit::Operations,
        Work::Memory("--rw=randread --bs=4k --ioengine=psync"),
    ),
    (
        "4 KiB random write, psync",
        Unit::Operations,
        Work::Memory("--rw=randwrite --bs=4k --ioengine=psync"),
    ),
    (
        "4 KiB random read, io_uring depth 32",
        Unit::Operations,
        Work::Memory("--rw=randread --bs=4k --ioengine=io_uring --iodepth=32"),
    ),
    (
        "4 KiB random write, io_uring depth 32",
        Unit::Operations,
        Work::Memory("--rw=randwrite --bs=4k --ioengine=io_uring --iodepth=32"),
    ),
    (
        "4 KiB random write, O_DSYNC",
        Unit::Waits,
        Work::Durable("--rw=randwrite --bs=4k --ioengine=psync --sync=dsync"),
    ),
    (
        "4 KiB write and fsync, 1 thread",
        Unit::Waits,
        Work::Disk(1),
    ),
    (
        "4 KiB write and fsync, 4 threads",
        Unit::Waits,
        Work::Disk(4),
    ),
    (
        "4 KiB write and fsync, 16 threads",
        Unit::Waits,
        Work::Disk(16),
    ),
    (
        "4 KiB write and fsync, 64 threads",
        Unit::Waits,
        Work::Disk(64),
    ),
    (
        "ext4: 4 KiB write and fsync, 1 thread",
        Unit::Waits,
        Work::Ext4(1),
    ),
    (
        "ext4: 4 KiB write and fsync, 4 threads",
        Unit::Waits,
        Work::Ext4(4),
    ),
    (
        "ext4: 4 KiB write and fsync, 16 threads",
        Unit::Waits,
        Work::Ext4(16),
    ),
    (
        "ext4: 4 KiB write and fsync, 64 threads",
        Unit::Waits,
        Work::Ext4(64),
    ),
    (
        "slow host: 4 KiB write and fsync, 1 thread",
        Unit::Waits,
        Work::Slow(1),
    ),
    (
        "slow host: 4 KiB write and fsync, 4 threads",
        Unit::Waits,
        Work::Slow(4),
    ),
    (
        "slow host: 4 KiB write and fsync, 16 threads",
        Unit::Waits,
        Work::Slow(16),
    ),
    (
        "slow host: 4 KiB write and fsync, 64 threads",
        Unit::Waits,
        Work::Slow(64),
    ),
];

/// A job of the threads that write and make it durable.
const FSYNC: &str = "--rw=randwrite --bs=4k --ioengine=psync --fsync=1";

/// The drivers.
const NAMES: [&str; 2] = ["pmem", "nd_pmem"];

/// A driver and its disk.
struct Side {
    name: &'static str,
    disk: String,
}

/// The titles of all rows, or if instructions are `counted`, of those for which that says something.
pub fn titles(counted: bool) -> impl Iterator<Item = &'static str> {
    rows(counted).map(|&(title, ..)| title)
}

fn rows(counted: bool) -> impl Iterator<Item = &'static (&'static str, Unit, Work)> {
    ROWS.iter()
        .filter(move |(_, _, work)| !counted || !work.waits())
}

/// Measures the rows that `plan` has.
pub fn table(plan: &Plan, progress: &Progress) -> Result<Table> {
    let rows: Vec<_> = rows(plan.counted)
        .filter(|(title, ..)| plan.has(title))
        .collect();
    let setup = Setup::new(Flavour::Test, progress)?;
    let mut table = Vec::new();
    let mut about = None;
    for slow in [false, true] {
        let rows: Vec<_> = rows
            .iter()
            .filter(|(.., work)| work.is_slow() == slow)
            .collect();
        if rows.is_empty() {
            continue;
        }
        let files = [Persistent::on_disk(SIZE)?, Persistent::on_disk(SIZE)?];
        let step = progress.step("boot, give each driver a device, fill them");
        let (vm, sides) = prepare(&setup, plan, &files, slow, progress)?;
        let fsync = fsync(&files[0])?;
        step.done();

        let step = progress.count(
            "measure",
            rows.len() as u64 * u64::from(plan.rounds) * sides.len() as u64,
        );
        for &&&(title, unit, work) in &rows {
            let mut all = vec![Measured::default(); sides.len()];
            // In turns, so that what else the host does meanwhile is shared.
            for _ in 0..plan.rounds {
                for (side, sum) in sides.iter().zip(&mut all) {
                    step.note(&format!("{title}: {}", side.name));
                    *sum += measure(&vm, &side.disk, work, plan.time)?;
                    step.tick();
                }
            }
            table.push(Row {
                title,
                unit,
                sides: all.into_iter().map(Some).collect(),
            });
        }
        step.done();
        vm.check_clean()?;
        about.get_or_insert((plan.machine(&vm), fsync));
        vm.power_off()?;
    }
    let (machine, fsync) = about.context("there are no rows")?;
    Ok(Table {
        machine,
        about: format!(
            "{} devices of {} MiB, each a file of the host's, where a write of 4 KiB and its fsync take {:.2} ms;\n\
             on the slow host {} ms more. Ratios are pmem / the kernel's virtio_pmem and nd_pmem.",
            NAMES.len(),
            SIZE / MIB,
            fsync.as_secs_f64() * 1e3,
            SLOW.as_millis()
        ),
        parts: vec![Part {
            columns: NAMES.into(),
            rows: table,
        }],
    })
}

/// Boots, and gives one of the devices to the module, the other one to the kernel's driver.
fn prepare(
    setup: &Setup,
    plan: &Plan,
    files: &[Persistent; 2],
    slow: bool,
    progress: &Progress,
) -> Result<(Vm, [Side; 2])> {
    let mut builder = plan.builder(setup, progress).ram(2 * GIB).upper(0);
    for file in files {
        builder = builder.virtio_pmem(file);
    }
    if slow {
        builder = builder.flush_fault(Fault::Delay(SLOW), 1, None);
    }
    let vm = builder.module("nd_pmem").module("virtio_pmem").start()?;
    let disks = ["pmem0", "pmem1"].map(str::to_owned);
    for disk in &disks {
        wait(&vm, disk)?;
    }
    // The one whose disk has the number that the module's first disk will have.
    let [ours, theirs] = disks;
    vm.sh(&format!(
        "device=$(readlink -f /sys/block/{ours} | grep -o '/virtio[0-9]*/' | tr -d /)
         echo $device >/sys/bus/virtio/drivers/virtio_pmem/unbind"
    ))?;
    vm.insmod(PMEM_KO, "")??;
    wait(&vm, &ours)?;
    let sides = [
        Side {
            name: NAMES[0],
            disk: ours,
        },
        Side {
            name: NAMES[1],
            disk: theirs,
        },
    ];
    // Nobody else gives disks this attribute.
    vm.sh(&format!(
        "grep -qx virtio /sys/block/{}/pmem/provider; readlink -f /sys/block/{} | grep -q '/virtio.*/ndbus'",
        sides[0].disk, sides[1].disk
    ))
    .context("a driver has not the device that it should have")?;
    for Side { disk, .. } in &sides {
        let sectors = vm.text(&format!("/sys/block/{disk}/size"))?;
        ensure!(
            sectors.trim().parse::<u64>()? * 512 > SIZE - 32 * MIB,
            "/dev/{disk} is smaller than it should be"
        );
        // The first touch of a page costs the host more than all the others.
        vm.sh(&format!(
            "fio --name=fill --filename=/dev/{disk} --rw=write --bs=1m --ioengine=psync --end_fsync=1 >/dev/null"
        ))?;
    }
    Ok((vm, sides))
}

/// Waits for a disk.
fn wait(vm: &Vm, disk: &str) -> Result<()> {
    vm.sh(&format!(
        "for i in $(seq 300); do test -b /dev/{disk} && exit; sleep 0.1; done; exit 1"
    ))
    .with_context(|| format!("there is no /dev/{disk}"))?;
    Ok(())
}

/// How long the host takes to make a page durable, in the middle of a few.
fn fsync(file: &Persistent) -> Result<Duration> {
    const TIMES: usize = 21;

    let path = file.dir().join("fsync");
    let test = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(&path)
        .with_context(|| format!("cannot make {}", path.display()))?;
    let mut times = Vec::new();
    // The first one is for the file itself.
    for _ in 0..=TIMES {
        // By then the file has another time of its last change, which is to be durable as well.
        thread::sleep(Duration::from_millis(10));
        let start = Instant::now();
        test.write_all_at(&[1; 4096], 0)?;
        test.sync_all()?;
        times.push(start.elapsed());
    }
    let mut times = times.split_off(1);
    times.sort();
    times
        .get(TIMES / 2)
        .copied()
        .context("nothing was measured")
}

fn measure(vm: &Vm, disk: &str, work: Work, time: Duration) -> Result<Measured> {
    const OPTIONS: &str = "--norandommap --randrepeat=0";

    let device = format!("/dev/{disk}");
    let on_disk = format!("--direct=1 {OPTIONS}");
    let measured = match work {
        Work::Memory(options) | Work::Durable(options) => {
            fio::run(vm, &device, &format!("{on_disk} {options}"), time)
        }
        Work::Disk(threads) | Work::Slow(threads) => {
            fio::threads(vm, &device, &format!("{on_disk} {FSYNC}"), threads, time)
        }
        Work::Ext4(threads) => {
            // Nothing is left to be initialized or allocated while it is measured.
            vm.sh(&format!(
                "mkfs.ext4 -q -F -b 4096 -E lazy_itable_init=0,lazy_journal_init=0 {device}
                 mkdir -p /mnt/bench && mount -o dax=always {device} /mnt/bench"
            ))?;
            let options = format!("--size=1m --fallocate=none --overwrite=1 {OPTIONS} {FSYNC}");
            let measured = fio::threads(vm, "/mnt/bench", &options, threads, time);
            vm.sh("umount /mnt/bench")?;
            measured
        }
    }?;
    // Nothing of this is written back while another is measured.
    vm.sh(&format!("sync {device}"))?;
    Ok(measured)
}
