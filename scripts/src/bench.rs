// SPDX-License-Identifier: GPL-2.0-only

//! `cargo xtask bench`: the driver beside the kernel's own.

pub mod calls;
pub mod fio;
mod iopmem;
mod kmem;
mod load;
mod plot;
mod pmem;
pub mod table;
mod virtio;

use crate::flavour::Flavour;
use crate::progress::Progress;
use crate::root::Root;
use crate::vm::{Accelerator, Builder, Setup, Vm};
use crate::{exec, repo};
use anyhow::{bail, ensure, Context, Result};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;
use table::Row;

/// How long a measurement takes by the guest's clock when that counts instructions. There is little that the result
/// varies with, so that it need not be long.
const COUNTED: Duration = Duration::from_millis(500);

/// How long such a machine may take to boot: its one CPU runs far less than an instruction a nanosecond.
const BOOT: Duration = Duration::from_secs(300);

/// Measure, side by side with the kernel's own drivers.
///
/// Boots a VM for each table, in which the driver and what it is compared with take turns. Nothing is asserted. The
/// speed of an emulated machine is not that of memory, but of the work that a driver makes of a request; with
/// --instructions it is counted. How fast memory is, --native tells.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Measure the copying core on this machine's memory instead, without a VM: pmem-core's benchmark.
    #[arg(long, conflicts_with_all = ["table", "instructions", "seconds", "rounds", "only", "json", "plots"])]
    native: bool,
    /// Only this table; may be given again.
    #[arg(long, value_enum, value_name = "TABLE")]
    table: Vec<Which>,
    /// Count instructions, not time: emulate a machine of one CPU whose clock counts them. The same each time, but for
    /// a part in a hundred.
    #[arg(long, conflicts_with = "seconds")]
    instructions: bool,
    /// Show the functions of each system call as well, with --table calls.
    #[arg(long)]
    profile: bool,
    /// The kernel of the table calls: Debian's for virtual machines unless told otherwise.
    #[arg(long, value_enum, default_value_t = Flavour::Cloud)]
    flavour: Flavour,
    /// Seconds of each measurement.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// How often the sides of a row take turns [default: 2, or 1 with --instructions]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// Only the rows whose title contains this.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Write all that was measured to this file as JSON, too.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw what was measured, too: SVG files in this directory.
    #[arg(long, value_name = "DIR")]
    plots: Option<PathBuf>,
    /// Arguments for the benchmark, with --native.
    #[arg(last = true, requires = "native", value_name = "ARGUMENTS")]
    arguments: Vec<String>,
}

/// The tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Which {
    /// Single system calls, instruction by instruction: in the driver, in its copy, in all of the kernel.
    Calls,
    /// Disks of ranges that are storage alone, beside nd_pmem, brd and null_blk.
    Pmem,
    /// How long it takes until there is a disk, and how much memory, by size, beside nd_pmem.
    Load,
    /// A range that is RAM and storage at once, beside dax/kmem and brd.
    Kmem,
    /// Disks of virtio-pmem devices, which the host makes durable, beside virtio_pmem and nd_pmem.
    Virtio,
    /// The disk of a PCI BAR, beside a program that has such a BAR mapped, and brd.
    Iopmem,
}

/// How to measure.
struct Plan {
    /// For how long, where that can be chosen.
    time: Duration,
    rounds: u32,
    /// Whether instructions are counted.
    counted: bool,
    /// What titles of rows contain.
    only: String,
    /// The kernel of the table that has any.
    flavour: Flavour,
    /// Whether to show functions.
    profile: bool,
}

impl Plan {
    fn has(&self, title: &str) -> bool {
        title.contains(&self.only)
    }

    /// A machine to measure in.
    fn builder<'a>(&self, setup: &'a Setup, progress: &'a Progress) -> Builder<'a> {
        let vm = setup.vm(progress).name("bench");
        if self.counted {
            // The clock is that of all CPUs, so that what another one does would count as well.
            vm.accelerator(Accelerator::Counted)
                .cpus(1)
                .boot_timeout(BOOT)
        } else {
            vm
        }
    }

    /// What the numbers are of.
    fn machine(&self, vm: &Vm) -> Machine {
        let how = match (self.counted, vm.accelerator()) {
            (true, _) => "Instructions of all that runs: the kernel, the driver, and the program that asks. Ratios of less than 1 are ahead.".to_owned(),
            (false, accelerator) => {
                let emulated = match accelerator {
                    Accelerator::Kvm => "",
                    _ => "\nEmulated: this compares the work that drivers make of a request, not the speed of memory.",
                };
                format!(
                    "{} rounds of {} s. Ratios of more than 1 are ahead, and of less than 1 where time is compared.{emulated}",
                    self.rounds,
                    self.time.as_secs()
                )
            }
        };
        Machine::new(vm, how)
    }
}

/// What was measured in.
#[derive(Debug, Clone, Serialize)]
struct Machine {
    /// The kernel's release.
    kernel: String,
    accelerator: String,
    /// The host's CPUs.
    host: String,
    /// How it was measured.
    how: String,
}

impl Machine {
    fn new(vm: &Vm, how: String) -> Self {
        Self {
            kernel: vm.kernel().to_owned(),
            accelerator: vm.accelerator().to_string(),
            host: cpu(),
            how,
        }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Linux {}, {}; the host has {}\n{}",
            self.kernel, self.accelerator, self.host, self.how
        )
    }
}

/// A table that was measured.
#[derive(Debug, Serialize)]
struct Table {
    /// What it was measured in.
    machine: Machine,
    /// What was compared.
    about: String,
    /// Rows with the same columns.
    parts: Vec<Part>,
}

/// Rows of a table.
#[derive(Debug, Serialize)]
struct Part {
    /// What is compared.
    columns: Vec<&'static str>,
    rows: Vec<Row>,
}

/// All that was measured, as `--json` has it.
#[derive(Debug, Serialize)]
struct Report {
    /// By name.
    tables: Vec<(Which, Table)>,
}

/// Carries the command out.
pub fn run(args: &Args) -> Result<()> {
    let progress = Progress::new();
    if args.native {
        return native(&args.arguments, &progress);
    }
    let plan = Plan {
        time: if args.instructions {
            COUNTED
        } else {
            Duration::from_secs(args.seconds)
        },
        rounds: args.rounds.unwrap_or(if args.instructions { 1 } else { 2 }),
        counted: args.instructions,
        only: args.only.clone().unwrap_or_default(),
        flavour: args.flavour,
        profile: args.profile,
    };
    let wanted = |which| args.table.is_empty() || args.table.contains(&which);
    let mut titles = Vec::new();
    let mut report = Report { tables: Vec::new() };
    for (which, all, measure) in [
        (
            Which::Calls,
            calls::titles().collect::<Vec<_>>(),
            calls::table as fn(&_, &_) -> _,
        ),
        (Which::Pmem, pmem::titles().collect(), pmem::table),
        (Which::Load, load::titles().collect(), load::table),
        (Which::Kmem, kmem::titles().collect(), kmem::table),
        (
            Which::Virtio,
            virtio::titles(args.instructions).collect(),
            virtio::table,
        ),
        (Which::Iopmem, iopmem::titles().collect(), iopmem::table),
    ] {
        if !wanted(which) {
            continue;
        }
        if all.iter().any(|title| plan.has(title)) {
            let table = measure(&plan, &progress)?;
            show(&table, &plan);
            if let Some(dir) = &args.plots {
                plot::all(dir, &which.to_string(), &table, plan.counted)?;
            }
            report.tables.push((which, table));
        }
        titles.extend(all);
    }
    if report.tables.is_empty() {
        bail!(
            "no row's title contains {:?}; there are:\n    {}",
            plan.only,
            titles.join("\n    ")
        );
    }
    if let Some(path) = &args.json {
        let json = serde_json::to_string_pretty(&report)?;
        fs::write(path, json + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

impl fmt::Display for Which {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.to_possible_value();
        f.write_str(value.as_ref().map_or("", |value| value.get_name()))
    }
}

fn show(table: &Table, plan: &Plan) {
    println!("\n{}\n{}", table.machine, table.about);
    for part in &table.parts {
        print!("{}", table::text(&part.columns, &part.rows, plan.counted));
    }
}

/// The host's CPUs.
fn cpu() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("an unknown CPU", |(_, model)| model);
    let count = std::thread::available_parallelism().map_or(1, |n| n.get());
    format!("{count} x {model}")
}

/// Cargo's message about what it built.
#[derive(Deserialize)]
struct Artifact {
    executable: Option<String>,
    target: Option<Target>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
}

/// Builds pmem-core's benchmark with the host's cargo, and runs it in the build root, which has libpmem.
fn native(arguments: &[String], progress: &Progress) -> Result<()> {
    const NAME: &str = "persist";
    let root = Root::ensure(progress)?;
    let step = progress.step("build the benchmark");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .args([
            "bench",
            "--package",
            "pmem-core",
            "--bench",
            NAME,
            "--no-run",
        ])
        .args(["--message-format", "json-render-diagnostics"])
        .arg("--target-dir")
        .arg(repo::target().join("native"))
        .current_dir(repo::dir());
    let messages = exec::stdout(&mut cargo).context("the benchmark cannot be built")?;
    let executable = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Artifact>(line).ok())
        .filter(|artifact| {
            artifact
                .target
                .as_ref()
                .is_some_and(|target| target.name == NAME)
        })
        .find_map(|artifact| artifact.executable)
        .context("cargo built no benchmark")?;
    step.done();
    let mut bench = root.enter().chdir(repo::target()).command(executable);
    bench
        .arg("--bench")
        .args(arguments)
        .env("CRITERION_HOME", repo::target().join("criterion"));
    println!("{}", cpu());
    let status = progress
        .suspend(|| bench.status())
        .context("cannot run the benchmark")?;
    ensure!(status.success(), "the benchmark failed: {status}");
    Ok(())
}
