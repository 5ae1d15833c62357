// SPDX-License-Identifier: GPL-2.0-only

//! `pmemctl`: shows and checks a range that is memory and storage at once, while nobody uses it.

#![forbid(unsafe_code)]

mod image;
mod report;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use image::Image;
use pmem_core::size;
use report::{Report, Status};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

/// The exit code of wrong arguments, as fsck has it.
const USAGE: u8 = 16;

/// Shows and checks a range that is memory and storage at once (kmem), in an image or a device.
#[derive(Parser)]
#[command(name = "pmemctl", version, after_help = AFTER_HELP)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const AFTER_HELP: &str = "\
Nothing is ever written. While the driver uses the range, what is found may be wrong.

Exit codes, as those of fsck:
   0  in order
   4  there are faults
   8  it cannot be read, or it is not such a range
  16  wrong arguments";

#[derive(Subcommand)]
enum Command {
    /// Check the superblocks and the index.
    Check(Range),
    /// Show what both superblocks say, and how many blocks have data.
    Show(Range),
}

#[derive(Args)]
struct Range {
    /// A file or a device that has the range.
    image: PathBuf,
    /// Where the range starts in it, in bytes or with a unit.
    #[arg(long, value_name = "OFFSET", default_value = "0", value_parser = size::parse)]
    start: u64,
    /// The size of the range, in bytes or with a unit; else it is all from its start on.
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    size: Option<u64>,
    /// Print JSON, for scripts.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // There is nowhere else to say it.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { USAGE } else { 0 });
        }
    };

    match run(&cli.command) {
        Ok(status) => ExitCode::from(status as u8),
        Err(error) => {
            eprintln!("pmemctl: {error:#}");
            ExitCode::from(Status::Error as u8)
        }
    }
}

fn run(command: &Command) -> Result<Status> {
    let (range, is_check) = match command {
        Command::Check(range) => (range, true),
        Command::Show(range) => (range, false),
    };

    let report = Image::open(&range.image, range.start, range.size)
        .and_then(|image| Report::new(&image))
        .with_context(|| range.image.display().to_string());
    let report = match report {
        Err(error) if range.json => Report::failed(&error),
        other => other?,
    };

    let status = if is_check {
        report.status
    } else {
        report.status_of_superblock
    };
    let text = match (range.json, is_check) {
        (true, _) => serde_json::to_string_pretty(&report)? + "\n",
        (false, true) => report.check(),
        (false, false) => report.show(),
    };
    std::io::stdout()
        .write_all(text.as_bytes())
        .context("the report cannot be written")?;
    Ok(status)
}
