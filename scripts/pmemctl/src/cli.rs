// SPDX-License-Identifier: GPL-2.0-only

//! The command line. The manual page and the shells' completions are made of it, too.

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;
use pmem_core::size;
use std::path::PathBuf;

/// Plans, examines and shows the disks of the persistent-memory driver pmem.
#[derive(Parser)]
#[command(
    name = "pmemctl",
    version,
    max_term_width = 100,
    subcommand_value_name = "COMMAND"
)]
#[command(after_help = list(&SECTIONS[..1]), after_long_help = list(&SECTIONS))]
pub(crate) struct Cli {
    /// Read the files of the system that is in this directory.
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        default_value = "/",
        hide_default_value = true
    )]
    pub(crate) sysroot: PathBuf,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The exit code of wrong arguments, as fsck has it.
pub(crate) const USAGE: u8 = 16;

/// What the help and the manual page say beside the commands: a title, and what is explained.
pub(crate) type Section = (&'static str, &'static [(&'static str, &'static str)]);

pub(crate) const SECTIONS: [Section; 3] = [
    (
        "Exit status",
        // As those of fsck.
        &[
            ("0", "in order"),
            ("4", "there are faults, or problems"),
            ("8", "it cannot be done or read"),
            ("16", "wrong arguments"),
        ],
    ),
    (
        "Files",
        &[
            (
                "/etc/default/grub.d/pmem.cfg",
                "what GRUB adds to the kernel's command line; written by plan --write",
            ),
            (
                "/etc/modprobe.d/pmem.conf",
                "parameters of the module at each boot; written by plan --write",
            ),
            (
                "/etc/modules-load.d/pmem.conf",
                "that the module is loaded at boot; written by plan --write",
            ),
            (
                "/proc/iomem",
                "where memory is; shows addresses to root alone",
            ),
            (
                "/sys/firmware/memmap",
                "the same for others, as firmware said it",
            ),
            ("/sys/block/DISK/pmem", "what list shows of a disk"),
        ],
    ),
    (
        "Examples",
        &[
            (
                "pmemctl plan 8GiB --count 2",
                "where two disks of 4 GiB could be, and what to write to have them",
            ),
            (
                "pmemctl plan 8GiB --write",
                "the same for one disk, and write it",
            ),
            ("pmemctl doctor", "why there is no /dev/pmem0"),
            ("pmemctl list --json", "all disks, for a script"),
            (
                "pmemctl --sysroot /tmp/copy doctor",
                "the faults of another machine, by a copy of its files",
            ),
            (
                "pmemctl check --start 4GiB --size 2GiB node1.img",
                "whether a range that is RAM and storage is in order",
            ),
        ],
    ),
];

/// Sections as the help has them. What is long has a line of its own.
fn list(sections: &[Section]) -> String {
    const LONG: usize = 8;
    let row = |(what, about): &(&str, &str)| match what.len() {
        ..LONG => format!("  {what:LONG$}{about}\n"),
        _ => format!("  {what}\n{:1$}{about}\n", "", LONG + 2),
    };
    let section =
        |(title, rows): &Section| format!("{title}:\n{}", rows.iter().map(row).collect::<String>());
    let all: Vec<String> = sections.iter().map(section).collect();
    all.join("\n").trim_end().to_owned()
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Propose a range of memory for disks, and say what must be written where.
    Plan(Plan),
    /// Find out why there is no /dev/pmem0, and say what helps.
    Doctor {
        /// Print JSON, for scripts.
        #[arg(long)]
        json: bool,
    },
    /// List the disks of the module, and the ranges that are RAM and storage at once.
    List {
        /// Print JSON, for scripts.
        #[arg(long)]
        json: bool,
    },
    /// Check the superblocks and the index of a range that is RAM and storage at once.
    ///
    /// Nothing is written. While the driver uses the range, what is found may be wrong.
    Check(Range),
    /// Show what both superblocks of such a range say, and how many blocks have data.
    Show(Range),
    /// Measure how fast a disk is read. Nothing is written to it.
    Bench(Bench),
    /// Print a script that completes commands in a shell.
    Completions {
        /// The shell.
        shell: Shell,
    },
    /// Write the manual pages to a directory.
    #[command(hide = true)]
    Manual {
        dir: PathBuf,
        /// The date that they say, as 2026-01-31.
        #[arg(long)]
        date: String,
    },
}

#[derive(Args)]
pub(crate) struct Plan {
    /// How much memory, such as 8GiB.
    #[arg(value_parser = size::parse)]
    pub(crate) size: u64,
    /// How many disks to make of it.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) count: u32,
    /// The NUMA node that it is to belong to.
    #[arg(long, value_name = "N")]
    pub(crate) node: Option<u32>,
    /// Write it to /etc/default/grub.d, /etc/modprobe.d and /etc/modules-load.d, after showing what changes.
    #[arg(long)]
    pub(crate) write: bool,
    /// Do not ask before writing.
    #[arg(long, short, requires = "write")]
    pub(crate) yes: bool,
    /// Print JSON, for scripts.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct Range {
    /// A file or a device that has the range.
    pub(crate) image: PathBuf,
    /// Where the range starts in it, in bytes or with a unit.
    #[arg(long, value_name = "OFFSET", default_value = "0", value_parser = size::parse)]
    pub(crate) start: u64,
    /// The size of the range, in bytes or with a unit; else it is all from its start on.
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    pub(crate) size: Option<u64>,
    /// Print JSON, for scripts.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct Bench {
    /// The disk, such as /dev/pmem0.
    pub(crate) device: PathBuf,
    /// How many seconds each line takes.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub(crate) seconds: u32,
    /// Print JSON, for scripts.
    #[arg(long)]
    pub(crate) json: bool,
}
