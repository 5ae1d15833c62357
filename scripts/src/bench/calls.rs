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

/// What to do, as `pmem-guest calls` knows it, and with how many bytes.
const ROWS: &[(&str, &str, u64)] = &[
    ("4 KiB read", "read", 4096),
    ("4 KiB write", "write", 4096),
    ("4 KiB write, O_DSYNC", "dsync", 4096),
    ("fsync", "fsync", 0),
    ("64 KiB read", "read", 65536),
    ("64 KiB write", "write", 65536),
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
    for &&(title, op, bytes) in &rows {
        for driver in drivers {
            step.note(&format!("{title}: {}", driver.name));
            calls.push(count(&vm, driver.disk, op, bytes)?);
            step.tick();
        }
    }
    let calls = vm.name_calls(&calls)?;
    let mut table = Vec::new();
    let mut profiles = String::new();
    for ((title, ..), calls) in rows.iter().zip(calls.chunks(drivers.len())) {
        if plan.profile {
            for (driver, call) in drivers.iter().zip(calls) {
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
            sides: calls.iter().map(|call| Some(side(call))).collect(),
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

/// Has the guest call the system over and over: `op` is `read`, `write`, `dsync` or `fsync`, of a `disk` whose driver is
/// loaded, and `bytes` long if it has data.
pub fn count(vm: &Vm, disk: &str, op: &str, bytes: u64) -> Result<Calls> {
    vm.count_calls(&format!(
        "pmem-guest calls /dev/{disk} {op} {bytes} {CALLS}"
    ))
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
