// SPDX-License-Identifier: GPL-2.0-only

//! `cargo xtask bench`: the driver beside the kernel's own.

pub mod fio;

use crate::flavour::Flavour;
use crate::progress::Progress;
use crate::root::Root;
use crate::vm::{Accelerator, Setup, Use, Vm, GIB, MIB, PMEM_KO, UPPER};
use crate::{exec, repo};
use anyhow::{bail, ensure, Context, Result};
use fio::Measured;
use serde::Deserialize;
use std::fmt::Write as _;
use std::process::Command;
use std::time::Duration;

/// Of each disk.
const SIZE: u64 = 512 * MIB;

/// Measure, side by side with the kernel's own drivers.
///
/// Boots one VM in which pmem, nd_pmem and brd have a disk each of the same size, and takes turns. Nothing is
/// asserted. An emulated machine counts instructions rather than times them: it tells how much work a driver makes
/// of a request, not how fast memory is. For that there is --native.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Measure the copying core on this machine's memory instead, without a VM: pmem-core's benchmark.
    #[arg(long, conflicts_with_all = ["seconds", "rounds", "only"])]
    native: bool,
    /// Seconds of each measurement.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// How often the drivers take turns in each row.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Only the rows whose title contains this.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Arguments for the benchmark, with --native.
    #[arg(last = true, requires = "native", value_name = "ARGUMENTS")]
    arguments: Vec<String>,
}

/// What a row's numbers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unit {
    /// Thousands of operations a second, and of those a CPU second.
    Operations,
    /// GB a second.
    Bandwidth,
}

/// What to measure.
#[derive(Debug, Clone, Copy)]
enum Work {
    /// A fio job on the disk.
    Fio(&'static str),
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

/// A driver, and its disk.
struct Driver {
    name: &'static str,
    disk: &'static str,
    dax: bool,
}

const DRIVERS: [Driver; 3] = [
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
];

/// Carries the command out.
pub fn run(args: &Args) -> Result<()> {
    let progress = Progress::new();
    if args.native {
        return native(&args.arguments, &progress);
    }
    let only = args.only.as_deref().unwrap_or_default();
    let rows: Vec<_> = ROWS
        .iter()
        .filter(|(title, ..)| title.contains(only))
        .collect();
    if rows.is_empty() {
        let titles: Vec<&str> = ROWS.iter().map(|(title, ..)| *title).collect();
        bail!(
            "no row's title contains {only:?}; there are:\n    {}",
            titles.join("\n    ")
        );
    }

    let setup = Setup::new(Flavour::Test, &progress)?;
    let step = progress.step("boot, load the drivers, touch all of their memory");
    let vm = prepare(&setup, &progress)?;
    step.done();

    let step = progress.count(
        "measure",
        rows.len() as u64 * u64::from(args.rounds) * DRIVERS.len() as u64,
    );
    let time = Duration::from_secs(args.seconds);
    let mut table = Vec::new();
    for &&(title, unit, work) in &rows {
        let mut sums = [None::<Sum>; DRIVERS.len()];
        // In turns, so that what else the host does meanwhile is shared.
        for _ in 0..args.rounds {
            for (driver, sum) in DRIVERS.iter().zip(&mut sums) {
                step.note(&format!("{title}: {}", driver.name));
                if let Some(measured) = measure(&vm, driver, work, time)? {
                    sum.get_or_insert_default().add(measured);
                }
                step.tick();
            }
        }
        table.push((title, unit, sums));
    }
    step.done();
    vm.check_clean()?;
    println!("\n{}", report(&vm, args, &table));
    vm.power_off()
}

fn prepare(setup: &Setup, progress: &Progress) -> Result<Vm> {
    let vm = setup
        .vm(progress)
        .name("bench")
        .ram(2 * GIB)
        .upper(2 * SIZE)
        .range(Use::Reserved, UPPER, SIZE)
        .range(Use::Protected, UPPER + SIZE, SIZE)
        .module("nd_pmem")
        .module("nd_e820")
        .module("brd")
        .start()?;
    // nd_pmem has taken pmem0. The parameters of brd are its own: it makes 16 disks of 64 MiB by itself.
    vm.sh(&format!(
        "for i in $(seq 100); do test -b /dev/pmem0 && break; sleep 0.1; done; test -b /dev/pmem0
         rmmod brd && insmod /modules/brd.ko rd_nr=1 rd_size={}",
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
        // The first touch of a page costs the host more than all the others.
        vm.sh(&format!(
            "fio --name=fill --filename=/dev/{} --rw=write --bs=1m --ioengine=psync >/dev/null",
            driver.disk
        ))?;
    }
    Ok(vm)
}

fn measure(vm: &Vm, driver: &Driver, work: Work, time: Duration) -> Result<Option<Measured>> {
    let device = format!("/dev/{}", driver.disk);
    match work {
        Work::Fio(options) => {
            let options = format!("--direct=1 --norandommap --randrepeat=0 {options}");
            fio::run(vm, &device, &options, time).map(Some)
        }
        Work::Mmap(_) if !driver.dax => Ok(None),
        Work::Mmap(op) => {
            let output = vm.sh_for(
                &format!(
                    "mkfs.ext4 -q -F {device} && mkdir -p /mnt/bench && mount -o dax=always {device} /mnt/bench
                     pmem-guest bench-mmap /mnt/bench/file {} {op} {}
                     umount /mnt/bench",
                    128 * MIB,
                    time.as_secs()
                ),
                time + Duration::from_secs(120),
            )?;
            let mmap: Mmap = serde_json::from_str(&output).context("bench-mmap printed no JSON")?;
            let iops = mmap.ops as f64 / mmap.seconds;
            Ok(Some(Measured {
                iops,
                bandwidth: iops * 4096.0,
                // One thread, and no kernel.
                iops_per_cpu: iops,
            }))
        }
    }
}

#[derive(Deserialize)]
struct Mmap {
    ops: u64,
    seconds: f64,
}

#[derive(Debug, Clone, Copy, Default)]
struct Sum {
    iops: f64,
    bandwidth: f64,
    iops_per_cpu: f64,
    rounds: f64,
}

impl Sum {
    fn add(&mut self, measured: Measured) {
        self.iops += measured.iops;
        self.bandwidth += measured.bandwidth;
        self.iops_per_cpu += measured.iops_per_cpu;
        self.rounds += 1.0;
    }
}

fn report(vm: &Vm, args: &Args, table: &[(&str, Unit, [Option<Sum>; DRIVERS.len()])]) -> String {
    let mut out = String::new();
    let mut line = |text: String| {
        // Writing to a string does not fail.
        let _ = writeln!(out, "{}", text.trim_end());
    };
    line(format!(
        "Linux {}, {}; the host has {}",
        vm.kernel(),
        vm.accelerator(),
        cpu()
    ));
    line(format!(
        "{} disks of {} MiB, {} rounds of {} s. Ratios are pmem / the other: more than 1 is ahead.",
        DRIVERS.len(),
        SIZE / MIB,
        args.rounds,
        args.seconds
    ));
    if vm.accelerator() == Accelerator::Tcg {
        line("Emulated: this compares the work that drivers make of a request, not the speed of memory.".into());
    }
    for (unit, heading) in [
        (Unit::Operations, "thousands of operations a second"),
        (
            Unit::Operations,
            "thousands of operations a second of CPU time",
        ),
        (Unit::Bandwidth, "GB a second"),
    ] {
        let per_cpu = heading.contains("CPU");
        let rows: Vec<_> = table.iter().filter(|row| row.1 == unit).collect();
        if rows.is_empty() {
            continue;
        }
        line(String::new());
        line(format!(
            "{heading:<46}{:>10}{:>10}{:>10}{:>12}{:>10}",
            DRIVERS[0].name, DRIVERS[1].name, DRIVERS[2].name, "/ nd_pmem", "/ brd"
        ));
        for (title, _, sums) in rows {
            let values = sums.map(|sum| {
                sum.map(|sum| {
                    let value = match unit {
                        Unit::Bandwidth => sum.bandwidth / 1e9,
                        Unit::Operations if per_cpu => sum.iops_per_cpu / 1e3,
                        Unit::Operations => sum.iops / 1e3,
                    };
                    value / sum.rounds
                })
            });
            let digits = if unit == Unit::Bandwidth { 2 } else { 1 };
            let mut text = format!("  {title:<44}");
            for value in values {
                let _ = match value {
                    Some(value) => write!(text, "{value:>10.digits$}"),
                    None => write!(text, "{:>10}", "-"),
                };
            }
            for (other, width) in [(1, 12), (2, 10)] {
                let ratio = values[0]
                    .zip(values[other])
                    .map(|(ours, theirs)| ours / theirs);
                let _ = match ratio {
                    Some(ratio) => write!(text, "{ratio:>width$.2}"),
                    None => write!(text, "{:>width$}", "-"),
                };
            }
            line(text);
        }
    }
    out
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
