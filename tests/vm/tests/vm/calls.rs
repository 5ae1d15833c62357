// SPDX-License-Identifier: GPL-2.0-only

//! What system calls take of the CPU: no more than it was, and no more than with the kernel's own driver.

use anyhow::{ensure, Result};
use vm_tests::{boot, debian, newest, MIB, UPPER};
use xtask::bench::calls::{count, instructions};
use xtask::bench::table::Instructions;
use xtask::vm::{Use, PMEM_KO};

/// Of each disk.
const SIZE: u64 = 64 * MIB;

/// The module's disk, and that of the kernel's driver.
const DISKS: [&str; 2] = ["pmem1", "pmem0"];

/// Calls: what to do, with how many bytes, and the most instructions that they may take in the module, without the copy
/// and in it.
const CALLS: [(&str, u64, u64, u64); 3] = [
    ("read", 4096, 100, 0),
    ("write", 4096, 110, 1300),
    ("fsync", 0, 20, 0),
];

/// `cargo xtask bench --table calls` in short.
#[test]
fn system_calls_take_few_instructions() -> Result<()> {
    if !newest()? {
        return Ok(());
    }
    let Some(machine) = debian()? else {
        return Ok(());
    };
    let machine = machine
        .upper(2 * SIZE)
        .range(Use::Reserved, UPPER, SIZE)
        .range(Use::Protected, UPPER + SIZE, SIZE)
        .module("nd_pmem")
        .module("nd_e820")
        .count_calls();
    boot(machine, |vm| {
        vm.sh("for i in $(seq 300); do test -b /dev/pmem0 && exit; sleep 0.1; done; exit 1")?;
        vm.insmod(
            PMEM_KO,
            &format!("pmem_start={UPPER:#x} pmem_size={SIZE} pmem_first=1"),
        )??;
        let mut counted = Vec::new();
        for (op, bytes, ..) in CALLS {
            for disk in DISKS {
                counted.push(count(vm, &format!("/dev/{disk}"), op, bytes)?);
            }
        }
        // Once more: it is the same.
        let (op, bytes, ..) = CALLS[1];
        let again = count(vm, &format!("/dev/{}", DISKS[0]), op, bytes)?;
        ensure!(again.count() == counted[2].count(), "{op} differs");

        let named = vm.name_calls(&counted)?;
        for ((op, _, module, copy), sides) in CALLS.into_iter().zip(named.chunks(DISKS.len())) {
            let [ours, theirs]: [Instructions; 2] =
                [instructions(&sides[0]), instructions(&sides[1])];
            println!("{op}: {ours:?}, of nd_pmem {theirs:?}");
            ensure!(
                (1..=module).contains(&ours.module) && ours.copy <= copy,
                "{op}: {ours:?}, not {module} and {copy} at most"
            );
            // It is counted where it is: the copy of a write is the driver's own.
            ensure!((ours.copy > 0) == (op == "write"), "{op}: {ours:?}");
            ensure!(
                ours.call < theirs.call,
                "{op}: {ours:?}, and with nd_pmem {theirs:?}"
            );
        }
        Ok(())
    })
}
