// SPDX-License-Identifier: GPL-2.0-only

//! What single system calls take of the CPU, instruction by instruction: in the driver, in its copy of the data, and in
//! all of the kernel.
//!
//! A plugin in QEMU sees each instruction, so that the same kernel and module give the same numbers each time.

use super::table::{Instructions, Measured, Row, Unit};
use super::{pmem, Machine, Part, Plan, Table};
use crate::progress::Progress;
use crate::vm::{Calls, Setup, Step, SystemCall, Vm};
use anyhow::Result;
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// How often a call is made: some are disturbed, by interrupts above all.
const CALLS: u32 = 64;

/// What is called.
#[derive(Clone, Copy)]
enum On {
    Disk,
    /// A file of ext4 with DAX, if the disk has that.
    DaxFile,
}

/// What to do with what, as `pmem-guest calls` knows it, and with how many bytes.
const ROWS: &[(&str, On, &str, u64)] = &[
    ("4 KiB read", On::Disk, "read", 4096),
    ("4 KiB write", On::Disk, "write", 4096),
    ("4 KiB write, O_DSYNC", On::Disk, "dsync", 4096),
    ("fsync", On::Disk, "fsync", 0),
    ("64 KiB read", On::Disk, "read", 65536),
    ("64 KiB write", On::Disk, "write", 65536),
    ("4 KiB read, DAX file", On::DaxFile, "read", 4096),
    ("4 KiB write, DAX file", On::DaxFile, "write", 4096),
];

/// Functions of the kernel's that copy for drivers.
const COPIES: &[&str] = &[
    "__memcpy_flushcache",
    "memcpy",
    "__memcpy",
    "clean_cache_range",
];

/// Modules that a driver's work is in: its own, and what it calls for its disks alone.
const MODULES: &[&str] = &["pmem", "nd_pmem", "libnvdimm", "nd_e820", "brd", "null_blk"];

/// The titles of all rows.
pub(super) fn titles() -> impl Iterator<Item = &'static str> {
    ROWS.iter().map(|&(title, ..)| title)
}

/// Measures the rows that `plan` has.
pub(super) fn table(plan: &Plan, progress: &Progress) -> Result<Table> {
    let rows: Vec<_> = ROWS.iter().filter(|(title, ..)| plan.has(title)).collect();
    let setup = Setup::new(plan.flavour, progress)?;
    let step = progress.step("boot, load the drivers");
    let builder = setup.vm(progress).name("bench-calls").count_calls();
    let (vm, drivers) = pmem::prepare(builder, false)?;
    step.done();

    let step = progress.count("count", (rows.len() * drivers.len()) as u64);
    let mut calls = Vec::new();
    for &&(title, on, op, bytes) in &rows {
        for driver in drivers {
            step.note(&format!("{title}: {}", driver.name));
            let disk = format!("/dev/{}", driver.disk);
            calls.push(match on {
                On::Disk => count(&vm, &disk, op, bytes)?,
                On::DaxFile if driver.dax => in_file(&vm, &disk, op, bytes)?,
                On::DaxFile => Calls::default(),
            });
            step.tick();
        }
    }
    let calls = vm.name_calls(&calls)?;
    let mut table = Vec::new();
    let mut profiles = String::new();
    for ((title, ..), calls) in rows.iter().zip(calls.chunks(drivers.len())) {
        if plan.profile {
            for (driver, call) in drivers.iter().zip(calls).filter(|(_, call)| call.all > 0) {
                profiles += &profile(title, driver.name, call);
            }
        }
        let side = |call| Measured {
            instructions: Some(instructions(call)),
            ..Measured::default()
        };
        table.push(Row {
            title,
            unit: Unit::Call,
            sides: calls
                .iter()
                .map(|call| (call.all > 0).then(|| side(call)))
                .collect(),
        });
    }
    step.done();
    vm.check_clean()?;
    let table = Table {
        machine: Machine::new(
            &vm,
            format!(
                "Instructions that a plugin in QEMU has seen, the steps of a string instruction being one. Of {CALLS} calls,\n\
                 those of which most were the same, instruction for instruction. Ratios of less than 1 are ahead."
            ),
        ),
        about: format!("Ratios are pmem / the other.{profiles}"),
        parts: vec![Part {
            columns: drivers.iter().map(|driver| driver.name).collect(),
            rows: table,
        }],
    };
    vm.power_off()?;
    Ok(table)
}

/// Has the guest call the system over and over: `op` is `read`, `write`, `dsync` or `fsync`, of `path`, a disk or a file of
/// some MiB, and `bytes` long if it has data.
pub fn count(vm: &Vm, path: &str, op: &str, bytes: u64) -> Result<Calls> {
    vm.count_calls(&format!("pmem-guest calls {path} {op} {bytes} {CALLS}"))
}

/// The same with a file on a new file system on `disk`, which has DAX.
fn in_file(vm: &Vm, disk: &str, op: &str, bytes: u64) -> Result<Calls> {
    vm.sh(&format!(
        "mkfs.ext4 -q -F -b 4096 -E lazy_itable_init=0,lazy_journal_init=0 {disk}
         mkdir -p /mnt/bench
         mount -o dax=always,noatime {disk} /mnt/bench
         dd if=/dev/zero of=/mnt/bench/file bs=16M count=1 2>/dev/null"
    ))?;
    let calls = count(vm, "/mnt/bench/file", op, bytes);
    vm.sh("umount /mnt/bench")?;
    calls
}

/// Sums a call up.
pub fn instructions(call: &SystemCall) -> Instructions {
    let steps = call.steps.iter().zip(copies(&call.steps));
    let count = |of: &dyn Fn(&Step, bool) -> bool| {
        steps
            .clone()
            .filter(|&(step, copy)| of(step, copy))
            .map(|(step, _)| step.executed.count)
            .sum()
    };
    Instructions {
        module: count(&|step, copy| !copy && is_drivers(step)),
        copy: count(&|_, copy| copy),
        call: count(&|_, _| true),
    }
}

fn is_drivers(step: &Step) -> bool {
    step.module
        .as_deref()
        .is_some_and(|module| MODULES.contains(&module))
}

/// Which of `steps` copy the data: functions of the kernel's that do nothing else, and in a driver the loops that store
/// past the cache, which are instructions in a row that are executed as often as the stores among them.
fn copies(steps: &[Step]) -> Vec<bool> {
    let mut copies = Vec::with_capacity(steps.len());
    for run in
        steps.chunk_by(|a, b| a.function == b.function && a.executed.count == b.executed.count)
    {
        let copy = run.first().is_some_and(|first| {
            let known = first.module.is_none() && COPIES.contains(&first.function.as_str());
            let streams = run.iter().any(|step| step.executed.streams);
            known || streams
        });
        copies.extend(run.iter().map(|_| copy));
    }
    copies
}

/// The functions of a call, those first that take most.
fn profile(title: &str, driver: &str, call: &SystemCall) -> String {
    let mut functions: BTreeMap<(&str, &str), u64> = BTreeMap::new();
    for step in &call.steps {
        let module = step.module.as_deref().unwrap_or("");
        *functions.entry((module, &step.function)).or_default() += step.executed.count;
    }
    let mut functions: Vec<_> = functions.into_iter().collect();
    functions.sort_by_key(|&(_, count)| std::cmp::Reverse(count));
    let mut text = format!(
        "\n\n{title}, {driver}: {} of {} calls the same",
        call.same, call.all
    );
    for ((module, function), count) in functions {
        // Writing to a string does not fail.
        let _ = write!(text, "\n  {count:>7}  {function} {module}");
    }
    text
}
