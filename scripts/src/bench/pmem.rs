// SPDX-License-Identifier: GPL-2.0-only

//! The disks of ranges that are storage alone, beside those of `nd_pmem` and `brd`.

use super::table::{Measured, Row, Unit};
use super::{fio, Part, Plan, Table};
use crate::flavour::Flavour;
use crate::progress::Progress;
use crate::vm::{Builder, Setup, Use, Vm, GIB, MIB, PMEM_KO, UPPER};
use anyhow::{ensure, Context, Result};
use serde::Deserialize;
use std::time::Duration;

/// Of each disk.
const SIZE: u64 = 512 * MIB;

/// What to measure.
#[derive(Debug, Clone, Copy)]
enum Work {
    /// A fio job on the disk.
    Fio(&'static str),
    /// A fio job of so many threads on the disk.
    Threads(u32, &'static str),
    /// So many threads on ext4 with DAX where the disk has it, each of which writes 4 KiB of a file of its own and makes
    /// that durable, over and over.
    Fsync(u32),
    /// `pmem-guest bench-mmap` on a file, `read` or `write`.
    Mmap(&'static str),
}

const ROWS: &[(&str, Unit, Work)] = &[
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
        "4 KiB random read, io_uring depth 1",
        Unit::Operations,
        Work::Fio("--rw=randread --bs=4k --ioengine=io_uring --iodepth=1"),
    ),
    (
        "4 KiB random write, io_uring depth 1",
        Unit::Operations,
        Work::Fio("--rw=randwrite --bs=4k --ioengine=io_uring --iodepth=1"),
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
        "4 KiB random write, O_DSYNC",
        Unit::Operations,
        Work::Fio("--rw=randwrite --bs=4k --ioengine=psync --sync=dsync"),
    ),
    (
        "4 KiB random write, fsync each",
        Unit::Operations,
        Work::Fio("--rw=randwrite --bs=4k --ioengine=psync --fsync=1"),
    ),
    (
        "512 B random read, psync",
        Unit::Operations,
        Work::Fio("--rw=randread --bs=512 --ioengine=psync"),
    ),
    (
        "512 B random write, psync",
        Unit::Operations,
        Work::Fio("--rw=randwrite --bs=512 --ioengine=psync"),
    ),
    (
        "4 KiB random read, psync, 4 threads",
        Unit::Waits,
        Work::Threads(4, "--rw=randread --bs=4k --ioengine=psync"),
    ),
    (
        "4 KiB random write, psync, 4 threads",
        Unit::Waits,
        Work::Threads(4, "--rw=randwrite --bs=4k --ioengine=psync"),
    ),
    (
        "ext4: 4 KiB write and fsync, 1 thread",
        Unit::Waits,
        Work::Fsync(1),
    ),
    (
        "ext4: 4 KiB write and fsync, 4 threads",
        Unit::Waits,
        Work::Fsync(4),
    ),
    (
        "ext4: 4 KiB write and fsync, 16 threads",
        Unit::Waits,
        Work::Fsync(16),
    ),
    (
        "64 KiB random read",
        Unit::Bandwidth,
        Work::Fio("--rw=randread --bs=64k --ioengine=psync"),
    ),
    (
        "64 KiB random write",
        Unit::Bandwidth,
        Work::Fio("--rw=randwrite --bs=64k --ioengine=psync"),
    ),
    (
        "1 MiB sequential read",
        Unit::Bandwidth,
        Work::Fio("--rw=read --bs=1m --ioengine=psync"),
    ),
    (
        "1 MiB sequential write",
        Unit::Bandwidth,
        Work::Fio("--rw=write --bs=1m --ioengine=psync"),
    ),
    (
        "4 KiB random read, DAX mapping",
        Unit::Operations,
        Work::Mmap("read"),
    ),
    (
        "4 KiB random write, DAX mapping",
        Unit::Operations,
        Work::Mmap("write"),
    ),
];

/// A job of the threads that write and make it durable.
const FSYNC: &str =
    "--rw=randwrite --bs=4k --ioengine=psync --fsync=1 --size=1m --fallocate=none --overwrite=1 \
                     --norandommap --randrepeat=0";

/// A driver, and its disk.
pub(super) struct Driver {
    pub(super) name: &'static str,
    pub(super) disk: &'static str,
    pub(super) dax: bool,
}

const DRIVERS: [Driver; 4] = [
    Driver {
        name: "pmem",
        disk: "pmem1",
        dax: true,
    },
    Driver {
        name: "nd_pmem",
        disk: "pmem0",
        dax: true,
    },
    Driver {
        name: "brd",
        disk: "ram0",
        dax: false,
    },
    Driver {
        name: "null_blk",
        disk: "nullb0",
        dax: false,
    },
];

/// Waits until nd_pmem has its disk.
pub(super) const WAIT: &str =
    "for i in $(seq 300); do test -b /dev/pmem0 && break; sleep 0.1; done; test -b /dev/pmem0";

/// The titles of all rows.
pub fn titles() -> impl Iterator<Item = &'static str> {
    ROWS.iter().map(|&(title, ..)| title)
}

/// Measures the rows that `plan` has.
pub fn table(plan: &Plan, progress: &Progress) -> Result<Table> {
    let rows: Vec<_> = ROWS.iter().filter(|(title, ..)| plan.has(title)).collect();
    let setup = Setup::new(Flavour::Test, progress)?;
    let step = progress.step("boot, load the drivers, touch all of their memory");
    let (vm, drivers) = prepare(plan.builder(&setup, progress), true)?;
    step.done();

    let step = progress.count(
        "measure",
        rows.len() as u64 * u64::from(plan.rounds) * drivers.len() as u64,
    );
    let mut table = Vec::new();
    for &&(title, unit, work) in &rows {
        let mut sides = vec![None::<Measured>; drivers.len()];
        // In turns, so that what else the host does meanwhile is shared.
        for _ in 0..plan.rounds {
            for (driver, side) in drivers.iter().zip(&mut sides) {
                step.note(&format!("{title}: {}", driver.name));
                if let Some(measured) = measure(&vm, driver, work, plan.time)? {
                    *side.get_or_insert_default() += measured;
                }
                step.tick();
            }
        }
        table.push(Row { title, unit, sides });
    }
    step.done();
    vm.check_clean()?;
    let about = format!(
        "{} disks of {} MiB, ratios are pmem / the other.",
        drivers.len(),
        SIZE / MIB
    );
    let table = Table {
        machine: plan.machine(&vm),
        about,
        parts: vec![Part {
            columns: drivers.iter().map(|driver| driver.name).collect(),
            rows: table,
        }],
    };
    vm.power_off()?;
    Ok(table)
}

/// Boots, and gives each driver a disk, which is written once if `fill` says so.
pub(super) fn prepare(builder: Builder<'_>, fill: bool) -> Result<(Vm, &'static [Driver])> {
    let vm = builder
        .ram(2 * GIB)
        .upper(2 * SIZE)
        .range(Use::Reserved, UPPER, SIZE)
        .range(Use::Protected, UPPER + SIZE, SIZE)
        .module("nd_pmem")
        .module("nd_e820")
        .module("brd")
        .module("null_blk")
        .start()?;
    // nd_pmem has taken pmem0. The parameters of the others are their own: brd makes 16 disks of 64 MiB by itself.
    vm.sh(&format!(
        "{WAIT}
         rmmod brd && insmod /modules/brd.ko rd_nr=1 rd_size={}
         rmmod null_blk && insmod /modules/null_blk.ko nr_devices=1 gb=1 bs=512 queue_mode=2 memory_backed=1",
        SIZE >> 10
    ))?;
    vm.insmod(
        PMEM_KO,
        &format!("pmem_start={UPPER:#x} pmem_size={SIZE} pmem_first=1"),
    )??;
    for driver in &DRIVERS {
        let sys = vm.text(&format!("/sys/block/{}/size", driver.disk))?;
        ensure!(
            sys.trim().parse::<u64>()? * 512 > SIZE - 32 * MIB,
            "/dev/{} is smaller than it should be",
            driver.disk
        );
        if !fill {
            continue;
        }
        // The first touch of a page costs the host more than all the others.
        vm.sh(&format!(
            "dd if=/dev/zero of=/dev/{} bs=1M count={} oflag=direct 2>/dev/null",
            driver.disk,
            (SIZE - 32 * MIB) / MIB
        ))?;
    }
    Ok((vm, &DRIVERS))
}

fn measure(vm: &Vm, driver: &Driver, work: Work, time: Duration) -> Result<Option<Measured>> {
    let device = format!("/dev/{}", driver.disk);
    match work {
        Work::Fio(options) => {
            let options = format!("--direct=1 --norandommap --randrepeat=0 {options}");
            fio::run(vm, &device, &options, time).map(Some)
        }
        Work::Threads(threads, options) => {
            let options = format!("--direct=1 --norandommap --randrepeat=0 {options}");
            fio::threads(vm, &device, &options, threads, time).map(Some)
        }
        Work::Fsync(threads) => {
            // Nothing is left to be initialized or allocated while it is measured.
            vm.sh(&format!(
                "mkfs.ext4 -q -F -b 4096 -E lazy_itable_init=0,lazy_journal_init=0 {device}
                 mkdir -p /mnt/bench && mount {} {device} /mnt/bench",
                if driver.dax { "-o dax=always" } else { "" }
            ))?;
            let measured = fio::threads(vm, "/mnt/bench", FSYNC, threads, time);
            vm.sh("umount /mnt/bench")?;
            measured.map(Some)
        }
        Work::Mmap(_) if !driver.dax => Ok(None),
        Work::Mmap(op) => {
            let output = vm.sh_for(
                &format!(
                    "mkfs.ext4 -q -F {device} && mkdir -p /mnt/bench && mount -o dax=always {device} /mnt/bench
                     pmem-guest bench-mmap /mnt/bench/file {} {op} {}
                     umount /mnt/bench",
                    128 * MIB,
                    time.as_secs().max(1)
                ),
                time + Duration::from_secs(120),
            )?;
            let mmap: Mmap = serde_json::from_str(&output).context("bench-mmap printed no JSON")?;
            Ok(Some(Measured {
                operations: mmap.ops as f64,
                bytes: mmap.ops as f64 * 4096.0,
                seconds: mmap.seconds,
                // One thread, and no kernel.
                cpu_seconds: Some(mmap.seconds),
                instructions: None,
            }))
        }
    }
}

#[derive(Deserialize)]
struct Mmap {
    ops: u64,
    seconds: f64,
}
