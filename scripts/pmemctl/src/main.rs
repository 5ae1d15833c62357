// SPDX-License-Identifier: GPL-2.0-only

//! `pmemctl`: plans, examines and shows the disks of the module `pmem`, and checks images of ranges that are RAM and
//! storage at once.

#![forbid(unsafe_code)]

mod bench;
mod cli;
mod config;
mod doctor;
mod image;
mod list;
mod manual;
mod memmap;
mod memory;
mod plan;
mod report;
mod system;

use anyhow::{bail, Context, Result};
use clap::{CommandFactory, Parser};
use cli::{Cli, Command, USAGE};
use image::Image;
use list::List;
use plan::{Plan, Wanted};
use report::{Report, Status};
use serde::Serialize;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;
use system::System;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // There is nowhere else to say it.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { USAGE } else { 0 });
        }
    };

    match run(&cli) {
        Ok(status) => ExitCode::from(status as u8),
        Err(error) => {
            eprintln!("pmemctl: {error:#}");
            ExitCode::from(Status::Error as u8)
        }
    }
}

fn run(cli: &Cli) -> Result<Status> {
    let system = System::new(&cli.sysroot);
    match &cli.command {
        Command::Plan(plan) => self::plan(&system, plan),
        Command::Doctor { json } => {
            let findings = doctor::examine(&system);
            print(*json, &findings, || findings.show())?;
            Ok(match findings.is_well() {
                true => Status::InOrder,
                false => Status::Faults,
            })
        }
        Command::List { json } => {
            let list = List::read(&system);
            print(*json, &list, || list.show())?;
            if list.disks.is_empty() && list.kmem.is_empty() && !json {
                eprintln!("pmemctl: there are no disks of the module; pmemctl doctor says why");
            }
            Ok(Status::InOrder)
        }
        Command::Check(range) => look(range, Report::check, |report| report.status),
        Command::Show(range) => look(range, Report::show, |report| report.status_of_superblock),
        Command::Bench(bench) => {
            let rows = bench::run(&bench.device, Duration::from_secs(bench.seconds.into()))?;
            print(bench.json, &rows, || bench::show(&rows))?;
            Ok(Status::InOrder)
        }
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "pmemctl", &mut script);
            write(&script)?;
            Ok(Status::InOrder)
        }
        Command::Manual { dir, date } => {
            manual::write(dir, date)?;
            Ok(Status::InOrder)
        }
    }
}

fn plan(system: &System, args: &cli::Plan) -> Result<Status> {
    let plan = Plan::new(
        system,
        Wanted {
            size: args.size,
            count: args.count,
            node: args.node,
        },
    )?;
    print(args.json, &plan, || plan.show())?;
    if !args.write {
        return Ok(Status::InOrder);
    }

    let changes = plan.changes(system)?;
    if !changes.iter().any(config::Change::is_any) {
        eprintln!("pmemctl: all of it is written already");
        return Ok(Status::InOrder);
    }
    let mut diff = String::new();
    for change in &changes {
        diff += &change.diff();
    }
    eprint!("\n{diff}");
    if std::io::stdin().is_terminal() && !args.yes {
        eprint!("\nWrite this? [y/N] ");
        let mut answer = String::new();
        std::io::stdin().read_line(&mut answer)?;
        if !matches!(answer.trim(), "y" | "Y" | "yes") {
            bail!("nothing was written");
        }
    }
    for change in &changes {
        change.write()?;
    }
    eprintln!("pmemctl: written; now update-grub, and boot again");
    Ok(Status::InOrder)
}

/// Looks at a range that is RAM and storage at once.
fn look(
    range: &cli::Range,
    text: impl Fn(&Report) -> String,
    status: impl Fn(&Report) -> Status,
) -> Result<Status> {
    let report = Image::open(&range.image, range.start, range.size)
        .and_then(|image| Report::new(&image))
        .with_context(|| range.image.display().to_string());
    let report = match report {
        Err(error) if range.json => Report::failed(&error),
        other => other?,
    };
    print(range.json, &report, || text(&report))?;
    Ok(status(&report))
}

/// Prints what is to be told, as JSON or as text.
fn print(json: bool, what: &impl Serialize, text: impl FnOnce() -> String) -> Result<()> {
    let text = match json {
        true => serde_json::to_string_pretty(what)? + "\n",
        false => text(),
    };
    write(text.as_bytes())
}

fn write(bytes: &[u8]) -> Result<()> {
    std::io::stdout()
        .write_all(bytes)
        .context("the report cannot be written")
}
