// SPDX-License-Identifier: GPL-2.0-only

//! States that a power failure could leave at any moment: a little of what `cargo xtask crash` does.

use anyhow::{ensure, Context, Result};
use vm_tests::{alone, flavour, setup, PROGRESS};
use xtask::crash::{self, Limits, Mutation, Report, Rules, Run, Workload};
use xtask::vm::Setup;

/// Records a workload, and looks at so many states.
fn look(name: &str, setup: &Setup, mutation: Option<Mutation>, states: usize) -> Result<Report> {
    let run = Run {
        workload: Workload::find(name).with_context(|| format!("no workload {name}"))?,
        length: 20,
        mutation,
    };
    let limits = Limits {
        states,
        images: 2,
        seed: 5,
        // A flush that is missing is found, also where one of the kernel's locks would hide it.
        rules: Rules { strict: true },
        deadline: None,
        losses: 1,
    };
    alone(|| run.run(setup, &limits, &PROGRESS)).map(|(report, _)| report)
}

/// Fails if something is lost, or if too little was looked at to know.
fn nothing_is_lost(report: &Report, checked: usize) -> Result<()> {
    if let Some(loss) = report.lost.first() {
        anyhow::bail!("after event {}: {}", loss.events, loss.why);
    }
    ensure!(report.checked >= checked, "too few states: {report:?}");
    Ok(())
}

#[test]
fn acknowledged_blocks_are_in_each_state() -> Result<()> {
    let report = look("raw-direct", setup(flavour()?)?, None, 300)?;
    nothing_is_lost(&report, 150)
}

/// A driver whose writes do not wait loses them in some state: else the others would prove nothing.
#[test]
fn a_fence_that_is_missing_is_found() -> Result<()> {
    let mutation = Some(Mutation::Fence);
    let setup = crash::setup(flavour()?, mutation, &PROGRESS)?;
    let report = look("raw-direct", &setup, mutation, 300)?;
    ensure!(!report.lost.is_empty(), "nothing is found: {report:?}");
    Ok(())
}

#[test]
fn synced_files_are_in_each_state() -> Result<()> {
    let report = look("ext4-dax", setup(flavour()?)?, None, 16)?;
    ensure!(report.mounted > 0, "none was mounted: {report:?}");
    nothing_is_lost(&report, 8)
}
