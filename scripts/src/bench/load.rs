// SPDX-License-Identifier: GPL-2.0-only

//! How long it takes from the load of a driver until there is its disk, and how much memory is less then, by the size
//! of the disk: nearly all of both are the struct pages.

use super::table::{Measured, Row, Unit};
use super::{pmem, Part, Plan, Table};
use crate::flavour::Flavour;
use crate::progress::Progress;
use crate::vm::{Setup, Use, Vm, GIB, MIB, PMEM_KO, UPPER};
use anyhow::{Context, Result};
use serde::Deserialize;

/// Sizes of disks, and the titles of their rows.
const SIZES: [(u64, &str, &str); 3] = [
    (128 * MIB, "load, 128 MiB", "memory, 128 MiB"),
    (GIB, "load, 1 GiB", "memory, 1 GiB"),
    (4 * GIB, "load, 4 GiB", "memory, 4 GiB"),
];

/// The module, with the struct pages in RAM and on the range, and the kernel's driver.
const COLUMNS: [&str; 3] = ["pmem", "nd_pmem", "on range"];

/// The titles of all rows.
pub fn titles() -> impl Iterator<Item = &'static str> {
    SIZES.iter().flat_map(|&(_, load, memory)| [load, memory])
}

/// Measures the rows that `plan` has.
pub(super) fn table(plan: &Plan, progress: &Progress) -> Result<Table> {
    // Ours tests the module when it is loaded.
    let setup = Setup::new(Flavour::Cloud, progress)?;
    let mut rows = Vec::new();
    let mut machine = None;
    for (size, load, memory) in SIZES {
        if !plan.has(load) && !plan.has(memory) {
            continue;
        }
        let step = progress.step(&format!("boot, {load}"));
        let vm = plan
            .builder(&setup, progress)
            .ram(2 * GIB)
            .upper(2 * size)
            .range(Use::Reserved, UPPER, size)
            .range(Use::Protected, UPPER + size, size)
            .module("nd_pmem")
            .module("nd_e820")
            .start()?;
        vm.sh(pmem::WAIT)?;
        let mut sides = [Measured::default(); COLUMNS.len()];
        for _ in 0..plan.rounds {
            for (n, sum) in sides.iter_mut().enumerate() {
                *sum += measure(&vm, n, size)?;
            }
        }
        for (title, unit) in [(load, Unit::Time), (memory, Unit::Memory)] {
            if plan.has(title) {
                let mut sides: Vec<_> = sides.into_iter().map(Some).collect();
                for side in sides.iter_mut().flatten().filter(|_| unit == Unit::Memory) {
                    // Each time.
                    side.bytes /= side.operations;
                }
                rows.push(Row { title, unit, sides });
            }
        }
        step.done();
        vm.check_clean()?;
        machine.get_or_insert_with(|| plan.machine(&vm));
        vm.power_off()?;
    }
    Ok(Table {
        machine: machine.context("there are no rows")?,
        about: "Until there is a disk in /dev; memory is what was free before and is not then. Ratios are pmem / the other: \
                the\nkernel's driver, and pmem with struct pages on the range (pmem_memmap=dev)."
            .into(),
        parts: vec![Part {
            columns: COLUMNS.to_vec(),
            rows,
        }],
    })
}

/// Loads a driver that is not loaded, and unloads it. `column` says which.
fn measure(vm: &Vm, column: usize, size: u64) -> Result<Measured> {
    let ours = |memmap: &str| {
        let params =
            format!("pmem_start={UPPER:#x} pmem_size={size} pmem_first=1 pmem_memmap={memmap}");
        (PMEM_KO, params, "/dev/pmem1", "pmem")
    };
    let (module, params, disk, name) = match column {
        // The header of the other one is in the way.
        0 => ours("ram pmem_memmap_force=1"),
        1 => (
            "/modules/nd_pmem.ko",
            String::new(),
            "/dev/pmem0",
            "nd_pmem",
        ),
        _ => ours("dev"),
    };
    // It is loaded at boot.
    let output = vm.sh(&format!(
        "if test {name} = nd_pmem; then rmmod nd_pmem; fi
         sync; echo 3 >/proc/sys/vm/drop_caches
         pmem-guest time-load {module} '{params}' {disk}"
    ))?;
    let loaded: Loaded = serde_json::from_str(&output).context("time-load printed no JSON")?;
    if column == 0 {
        // Struct pages go where there is nothing.
        vm.sh(&format!("blkdiscard -z -o 0 -l {} {disk}", size / 32))?;
    }
    if column != 1 {
        vm.rmmod(name)??;
    }
    Ok(Measured {
        operations: 1.0,
        bytes: loaded.bytes as f64,
        seconds: loaded.ns as f64 / 1e9,
        cpu_seconds: None,
        instructions: None,
    })
}

#[derive(Deserialize)]
struct Loaded {
    ns: u64,
    bytes: u64,
}
