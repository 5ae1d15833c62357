// SPDX-License-Identifier: GPL-2.0-only

//! The disk of a PCI BAR, beside a program that has such a BAR mapped and copies by itself, and `brd`.
//!
//! A machine has two BARs of the same kind: the module has one, the program the other one, as nobody may map what a
//! driver has.

use super::table::{Measured, Row, Unit};
use super::{fio, Part, Plan, Table};
use crate::flavour::Flavour;
use crate::progress::Progress;
use crate::vm::{Persistent, Setup, Vm, GIB, MIB, PMEM_KO};
use anyhow::{ensure, Context, Result};
use serde::Deserialize;
use std::time::Duration;

/// Of each BAR and disk.
const SIZE: u64 = 256 * MIB;

/// The module's disk.
const DISK: &str = "iopmem0";

/// Where the driver of BARs is.
const DRIVER: &str = "/sys/bus/pci/drivers/iopmem";

/// How a BAR is mapped.
struct Mode {
    /// What the module calls it.
    cache: &'static str,
    /// What it is in sysfs, for programs.
    resource: &'static str,
    columns: [&'static str; 3],
    rows: [(&'static str, Work); 6],
}

/// Random accesses.
#[derive(Debug, Clone, Copy)]
struct Work {
    write: bool,
    /// Bytes of each.
    block: u64,
}

const fn read(block: u64) -> Work {
    Work {
        write: false,
        block,
    }
}

const fn write(block: u64) -> Work {
    Work { write: true, block }
}

const MODES: [Mode; 2] = [
    Mode {
        cache: "wc",
        resource: "resource2_wc",
        columns: ["pmem", "mapping", "brd"],
        rows: [
            ("write-combining: 4 KiB read", read(4096)),
            ("write-combining: 64 KiB read", read(64 << 10)),
            ("write-combining: 1 MiB read", read(MIB)),
            ("write-combining: 4 KiB write", write(4096)),
            ("write-combining: 64 KiB write", write(64 << 10)),
            ("write-combining: 1 MiB write", write(MIB)),
        ],
    },
    Mode {
        cache: "uc",
        resource: "resource2",
        columns: ["pmem", "mapping", "brd"],
        rows: [
            ("uncached: 4 KiB read", read(4096)),
            ("uncached: 64 KiB read", read(64 << 10)),
            ("uncached: 1 MiB read", read(MIB)),
            ("uncached: 4 KiB write", write(4096)),
            ("uncached: 64 KiB write", write(64 << 10)),
            ("uncached: 1 MiB write", write(MIB)),
        ],
    },
];

/// The titles of all rows.
pub fn titles() -> impl Iterator<Item = &'static str> {
    MODES
        .iter()
        .flat_map(|mode| mode.rows.iter().map(|&(title, _)| title))
}

/// Measures the rows that `plan` has.
pub fn table(plan: &Plan, progress: &Progress) -> Result<Table> {
    let setup = Setup::new(Flavour::Test, progress)?;
    let memories = [Persistent::new(SIZE)?, Persistent::new(SIZE)?];
    let step = progress.step("boot, touch all memory");
    let vm = plan
        .builder(&setup, progress)
        .ram(2 * GIB)
        .upper(0)
        .bar(&memories[0])
        .bar(&memories[1])
        .module("brd")
        .start()?;
    // Its parameters are its own: it makes 16 disks by itself.
    vm.sh(&format!(
        "rmmod brd
         insmod /modules/brd.ko rd_nr=1 rd_size={}
         fio --name=fill --filename=/dev/ram0 --rw=write --bs=1m --ioengine=psync >/dev/null",
        SIZE >> 10
    ))?;
    step.done();

    let count = titles().filter(|title| plan.has(title)).count() as u64;
    let step = progress.count(
        "measure",
        count * u64::from(plan.rounds) * MODES[0].columns.len() as u64,
    );
    let mut parts = Vec::new();
    for mode in &MODES {
        let rows: Vec<_> = mode
            .rows
            .iter()
            .filter(|(title, _)| plan.has(title))
            .collect();
        if rows.is_empty() {
            continue;
        }
        serve(&vm, mode)?;
        let mut table = Vec::new();
        for &&(title, work) in &rows {
            let mut sides = [None::<Measured>; 3];
            // In turns, so that what else the host does meanwhile is shared.
            for _ in 0..plan.rounds {
                for (n, (side, column)) in sides.iter_mut().zip(mode.columns).enumerate() {
                    step.note(&format!("{title}: {column}"));
                    *side.get_or_insert_default() += match n {
                        0 => disk(&vm, DISK, work, plan.time),
                        1 => mapping(&vm, mode, work, plan.time),
                        _ => disk(&vm, "ram0", work, plan.time),
                    }?;
                    step.tick();
                }
            }
            table.push(Row {
                title,
                unit: Unit::Bandwidth,
                sides: sides.into(),
            });
        }
        vm.rmmod("pmem")??;
        parts.push(Part {
            columns: mode.columns.to_vec(),
            rows: table,
        });
    }
    step.done();
    vm.check_clean()?;
    let table = Table {
        machine: plan.machine(&vm),
        about: format!(
            "BARs and a disk of {} MiB, random accesses, ratios are pmem / the other. A mapping is a program's own, of the\n\
             BAR itself: it copies words of 8 bytes.",
            SIZE / MIB
        ),
        parts,
    };
    vm.power_off()?;
    Ok(table)
}

/// Loads the module, and gives it the first BAR alone.
fn serve(vm: &Vm, mode: &Mode) -> Result<()> {
    vm.insmod(PMEM_KO, &format!("iopmem_cache={}", mode.cache))??;
    let (ours, theirs) = (vm.bar(0), vm.bar(1));
    vm.sh(&format!(
        "echo iopmem >/sys/bus/pci/devices/{ours}/driver_override
         test -e {DRIVER}/{ours} || echo {ours} >{DRIVER}/bind
         test ! -e {DRIVER}/{theirs}
         echo 1 >/sys/bus/pci/devices/{theirs}/enable
         fio --name=fill --filename=/dev/{DISK} --rw=write --bs=1m --ioengine=psync >/dev/null"
    ))?;
    let cache = vm.text(&format!("/sys/block/{DISK}/pmem/cache"))?;
    ensure!(cache.trim() == mode.cache, "it is mapped by {cache}");
    // The first touch of a page costs the host more than all the others.
    mapping(vm, mode, write(SIZE), Duration::from_millis(1)).map(drop)
}

fn disk(vm: &Vm, disk: &str, work: Work, time: Duration) -> Result<Measured> {
    let options = format!(
        "--direct=1 --norandommap --randrepeat=0 --ioengine=psync --rw=rand{} --bs={}",
        work.name(),
        work.block
    );
    fio::run(vm, &format!("/dev/{disk}"), &options, time)
}

fn mapping(vm: &Vm, mode: &Mode, work: Work, time: Duration) -> Result<Measured> {
    let output = vm.sh_for(
        &format!(
            "pmem-guest bench-bar /sys/bus/pci/devices/{}/{} {SIZE} {} {} {}",
            vm.bar(1),
            mode.resource,
            work.name(),
            work.block,
            time.as_millis().max(1)
        ),
        time + Duration::from_secs(120),
    )?;
    let copies: Copies = serde_json::from_str(&output).context("bench-bar printed no JSON")?;
    Ok(Measured {
        operations: copies.ops as f64,
        bytes: (copies.ops * work.block) as f64,
        seconds: copies.seconds,
        // One thread, and no kernel.
        cpu_seconds: Some(copies.seconds),
        instructions: None,
    })
}

impl Work {
    fn name(self) -> &'static str {
        if self.write {
            "write"
        } else {
            "read"
        }
    }
}

#[derive(Deserialize)]
struct Copies {
    ops: u64,
    seconds: f64,
}
