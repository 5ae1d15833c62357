// SPDX-License-Identifier: GPL-2.0-only

//! `cargo xtask run`: the driver's main job, before a person's eyes.

use crate::bench::{fio, table::Measured};
use crate::flavour::Flavour;
use crate::progress::{time, Progress};
use crate::vm::{Accelerator, Persistent, Setup, Use, Vm, GIB, MIB, PMEM_KO, UPPER};
use anyhow::{bail, ensure, Context, Result};
use pmem_core::size::Size;
use std::fmt::Write as _;
use std::io::{stderr, stdin, BufRead, IsTerminal, Write as _};
use std::time::{Duration, Instant};

/// Of the persistent memory.
const SIZE: u64 = 2 * GIB;
/// Ordinary memory behind it. With none, its NUMA node would be offline, and the kernel would name another one.
const NODE: u64 = 128 * MIB;
/// Disks that it is split into.
const DISKS: usize = 2;
/// Of each file.
const FILE: u64 = 16 * MIB;
/// How long each speed is measured.
const MEASURE: Duration = Duration::from_secs(2);

/// Show the driver at work: in a VM, on Debian's kernel, through a power failure.
///
/// Boots Debian's own kernel, unmodified, on memory that outlives the VM; loads the module, makes ext4 file systems,
/// mounts them with DAX, writes files and syncs them. Then the VM is killed, and another one boots on the same
/// memory: every byte must be there.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The kernel to boot.
    #[arg(long, value_enum, default_value_t = Flavour::Cloud)]
    flavour: Flavour,
    /// Open a shell in the VM at the end, without asking.
    #[arg(long, conflicts_with = "no_shell")]
    shell: bool,
    /// Do not offer a shell in the VM at the end.
    #[arg(long)]
    no_shell: bool,
}

/// A file that was made durable before the power failure.
struct Written {
    path: String,
    how: &'static str,
    before: String,
    after: String,
}

/// Carries the command out.
pub fn run(args: &Args) -> Result<()> {
    ensure!(
        args.flavour != Flavour::Builtin,
        "this shows the module; the built-in driver is shown by the tests, and by `cargo xtask vm --flavour builtin`"
    );
    ensure!(
        !args.shell || stdin().is_terminal(),
        "--shell needs a terminal on standard input"
    );
    let progress = Progress::new();
    let started = Instant::now();
    let setup = Setup::new(args.flavour, &progress)?;
    let memory = Persistent::new(SIZE + NODE)?;

    let vm = boot("boot", &setup, &memory, &progress)?;
    let step = progress.step("load the module, make file systems, mount with DAX");
    load(&vm)?;
    let log = module_log(&vm)?;
    let mut disks = Vec::new();
    for n in 0..DISKS {
        vm.sh(&format!("mkfs.ext4 -q -F /dev/pmem{n}"))?;
        mount(&vm, n)?;
        disks.push(Disk::read(&vm, n, &log)?);
    }
    step.done();

    let step = progress.step("write files and sync them");
    let mut files = write(&vm)?;
    step.done();
    let step = progress.step("measure");
    let speeds = measure(&vm)?;
    step.done();
    vm.check_clean()?;

    let step = progress.step("cut the power");
    let cpus = vm.sh("nproc")?;
    vm.power_cut()?;
    step.done();

    let vm = boot("boot again on the same memory", &setup, &memory, &progress)?;
    let step = progress.step("verify");
    load(&vm)?;
    for n in 0..DISKS {
        mount(&vm, n)?;
    }
    for file in &mut files {
        file.after = checksum(&vm, &file.path)?;
    }
    vm.check_clean()?;
    step.done();

    let summary = Summary {
        vm: &vm,
        stock: args.flavour.is_stock(),
        cpus: cpus.trim(),
        disks: &disks,
        files: &files,
        speeds: &speeds,
    };
    println!("\n{}", summary.text());
    let lost = files
        .iter()
        .filter(|file| file.before != file.after)
        .count();
    if lost > 0 {
        bail!(
            "{lost} of {} files did not survive the power failure",
            files.len()
        );
    }
    println!(
        "Verified: every byte of {} files that was synced before the power failed is there after it. ({})",
        files.len(),
        time(started.elapsed())
    );
    if args.shell || (!args.no_shell && wants_shell()?) {
        println!("The file systems are mounted at /mnt/pmem*. Ctrl-D powers the machine off.\n");
        return vm.shell();
    }
    vm.power_off()
}

fn boot(title: &str, setup: &Setup, memory: &Persistent, progress: &Progress) -> Result<Vm> {
    let step = progress.step(title);
    let vm = setup
        .vm(progress)
        .name("run")
        .persistent(memory)
        .range(Use::Reserved, UPPER, SIZE)
        // Debian's general kernel has it as a module.
        .module("ext4")
        .packed()
        .start()?;
    step.done();
    Ok(vm)
}

fn load(vm: &Vm) -> Result<()> {
    let params = format!("pmem_start=4G pmem_size={} pmem_count={DISKS}", Size(SIZE));
    vm.insmod(PMEM_KO, &params)?.with_context(|| {
        format!(
            "the kernel refused the module:\n{}",
            module_log(vm).unwrap_or_default()
        )
    })
}

/// What the module has logged, without times.
fn module_log(vm: &Vm) -> Result<String> {
    let dmesg = vm.dmesg()?;
    let lines = dmesg.lines().filter_map(|line| {
        let text = line.split_once("] ").map_or(line, |(_, text)| text);
        text.strip_prefix("pmem: ")
    });
    Ok(lines.collect::<Vec<_>>().join("\n"))
}

fn mount(vm: &Vm, disk: usize) -> Result<()> {
    vm.sh(&format!(
        "mkdir -p /mnt/pmem{disk} && mount -o dax=always /dev/pmem{disk} /mnt/pmem{disk}"
    ))
    .map(drop)
}

fn checksum(vm: &Vm, path: &str) -> Result<String> {
    let line = vm.sh(&format!("sha256sum {path} 2>/dev/null || echo missing"))?;
    Ok(line
        .split_whitespace()
        .next()
        .unwrap_or_default()
        .to_owned())
}

fn write(vm: &Vm) -> Result<Vec<Written>> {
    // A different file every time, so that old content cannot pass for new.
    let seed = u64::from(std::process::id());
    let mut files = Vec::new();
    for disk in 0..DISKS {
        for (n, program, how) in [
            (1, "fill", "write, fsync"),
            (2, "mmap-msync", "store to a DAX mapping, msync"),
            (
                3,
                "mmap-sync",
                "store to a MAP_SYNC mapping, no system call",
            ),
        ] {
            let path = format!("/mnt/pmem{disk}/file{n}");
            vm.sh(&format!("pmem-guest {program} {path} {FILE} {}", seed + n))?;
            // The file's own name must be durable, too; its content is already.
            vm.sh(&format!("xfs_io -c fsync /mnt/pmem{disk}"))?;
            let before = checksum(vm, &path)?;
            files.push(Written {
                path,
                how,
                before,
                after: String::new(),
            });
        }
    }
    Ok(files)
}

fn measure(vm: &Vm) -> Result<Vec<(&'static str, bool, Measured)>> {
    let mut speeds = Vec::new();
    for (title, sequential, options) in [
        ("4 KiB random read", false, "--rw=randread --bs=4k"),
        (
            "4 KiB random write, each durable",
            false,
            "--rw=randwrite --bs=4k --sync=dsync",
        ),
        (
            "1 MiB sequential write",
            true,
            "--rw=write --bs=1m --end_fsync=1",
        ),
    ] {
        let options = format!("--ioengine=psync --size=128m {options}");
        speeds.push((
            title,
            sequential,
            fio::run(vm, "/mnt/pmem0/fio", &options, MEASURE)?,
        ));
    }
    vm.sh("rm /mnt/pmem0/fio")?;
    Ok(speeds)
}

/// A disk, as the kernel shows it.
struct Disk {
    name: String,
    bytes: u64,
    queue: String,
    mount: String,
    file_is_dax: bool,
    log: String,
}

impl Disk {
    fn read(vm: &Vm, n: usize, log: &str) -> Result<Self> {
        let name = format!("pmem{n}");
        let sys = |file: &str| -> Result<String> {
            Ok(vm
                .text(&format!("/sys/block/{name}/{file}"))?
                .trim()
                .to_owned())
        };
        let mount = vm.sh(&format!(
            "grep '^/dev/{name} ' /proc/mounts | cut -d' ' -f3,4"
        ))?;
        // STATX_ATTR_DAX: this very file is accessed without the page cache.
        let statx = vm.sh(&format!(
            "touch /mnt/{name}/dax && xfs_io -c 'statx -r' /mnt/{name}/dax | grep 'stat.attributes ='"
        ))?;
        let attributes = statx.rsplit_once("0x").map_or("", |(_, hex)| hex.trim());
        let own = log
            .lines()
            .rfind(|line| line.starts_with(&format!("{name}: ")));
        Ok(Self {
            bytes: sys("size")?.parse::<u64>()? * 512,
            queue: format!(
                "dax {}, {}, fua {}",
                sys("queue/dax")?,
                sys("queue/write_cache")?,
                sys("queue/fua")?
            ),
            mount: mount.trim().to_owned(),
            file_is_dax: u64::from_str_radix(attributes, 16)
                .is_ok_and(|bits| bits & 0x20_0000 != 0),
            log: own.unwrap_or_default().to_owned(),
            name,
        })
    }
}

struct Summary<'a> {
    vm: &'a Vm,
    stock: bool,
    cpus: &'a str,
    disks: &'a [Disk],
    files: &'a [Written],
    speeds: &'a [(&'static str, bool, Measured)],
}

impl Summary<'_> {
    fn text(&self) -> String {
        let mut out = String::new();
        let emulated = self.vm.accelerator() == Accelerator::Tcg;
        let whose = if self.stock {
            "Debian's, unmodified"
        } else {
            "built here"
        };
        let mut line = |title: &str, text: String| {
            // Writing to a string does not fail.
            let _ = writeln!(out, "  {title:<12}{text}");
        };
        line("kernel", format!("Linux {} ({whose})", self.vm.kernel()));
        line(
            "machine",
            format!("{}, {} CPUs", self.vm.accelerator(), self.cpus),
        );
        for disk in self.disks {
            let dax = if disk.file_is_dax {
                "files are DAX (STATX_ATTR_DAX)"
            } else {
                "FILES ARE NOT DAX"
            };
            line(&format!("/dev/{}", disk.name), Size(disk.bytes).to_string());
            line("", format!("the module says: {}", disk.log));
            line("", format!("the queue says: {}", disk.queue));
            line("", format!("mounted as: {}; {dax}", disk.mount));
        }
        let note = if emulated {
            " (emulated, not a measure of the hardware)"
        } else {
            ""
        };
        line("speed", format!("of a file on /dev/pmem0, by fio{note}"));
        for (title, sequential, measured) in self.speeds {
            let number = if *sequential {
                format!("{:.2} GB/s", measured.bandwidth() / 1e9)
            } else {
                format!("{:.0} thousand/s", measured.iops() / 1e3)
            };
            line("", format!("{title:<34}{number:>16}"));
        }
        line("files", "SHA-256 before and after the power failure".into());
        for file in self.files {
            let same = if file.before == file.after {
                "same"
            } else {
                "LOST"
            };
            line(
                "",
                format!(
                    "{}  {}  {:.12} {:.12} {same}   {}",
                    file.path,
                    Size(FILE),
                    file.before,
                    file.after,
                    file.how
                ),
            );
        }
        out
    }
}

fn wants_shell() -> Result<bool> {
    if !stdin().is_terminal() || !stderr().is_terminal() {
        return Ok(false);
    }
    eprint!("A shell in this VM? [y/N] ");
    stderr().flush()?;
    let mut answer = String::new();
    stdin().lock().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
