// SPDX-License-Identifier: GPL-2.0-only

//! `cargo xtask`: one command from a fresh machine to a tested persistent-memory driver.

#![forbid(unsafe_code)]

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::process::ExitCode;
use xtask::{bench, build, clean, crash, deb, docs, picture, run, rust_analyzer, test, vm_cmd};

/// Builds, boots, tests and measures the pmem driver.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version, after_help = ENVIRONMENT)]
struct Cli {
    #[command(subcommand)]
    command: Cmd,
}

const ENVIRONMENT: &str = "\
Environment:
  PMEM_MIRROR     a Debian archive, and after a space its security archive, instead of the host's
  XDG_CACHE_HOME  where the build root and the kernels are kept, in pmem/ (10 GB) [~/.cache]
  KDIR            a kernel's tree for `build`, as with --kdir
  PMEM_KERNEL     kernels to take instead of the newest: a series, 7.2, or one version of Debian's, 7.2.12+deb13
  PMEM_FORCE      1 has the module built for kernels that it was never tried with
  CI              no bars, a line a step";

#[derive(Subcommand)]
enum Cmd {
    /// Build pmem.ko for a kernel.
    Build(build::Args),
    /// Show the driver at work: in a VM, on Debian's kernel, through a power failure.
    Run(run::Args),
    /// Run every test: format, lints, documents, host, KUnit and VM tests.
    Test(test::Args),
    /// Boot a VM with the module and get a shell in it.
    Vm(vm_cmd::Args),
    /// Measure, side by side with the kernel's own drivers.
    Bench(bench::Args),
    /// Look for what a power failure at any moment could lose.
    Crash(crash::Args),
    /// Build the documents: HTML, and the manual pages.
    Docs(docs::Args),
    /// Draw what the documents show of a terminal anew.
    Picture(picture::Args),
    /// Tell an editor of the module: write rust-project.json for rust-analyzer.
    RustAnalyzer(rust_analyzer::Args),
    /// Make Debian packages.
    Deb(deb::Args),
    /// Remove what was built.
    Clean(clean::Args),
}

fn main() -> ExitCode {
    match dispatch(&Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error}");
            for cause in error.chain().skip(1) {
                eprintln!("  because: {cause}");
            }
            ExitCode::FAILURE
        }
    }
}

fn dispatch(command: &Cmd) -> Result<ExitCode> {
    match command {
        Cmd::Build(args) => build::run(args)?,
        Cmd::Run(args) => run::run(args)?,
        Cmd::Test(args) => return test::run(args),
        Cmd::Vm(args) => vm_cmd::run(args)?,
        Cmd::Bench(args) => bench::run(args)?,
        Cmd::Crash(args) => return crash::run(args),
        Cmd::Docs(args) => docs::run(args)?,
        Cmd::Picture(args) => picture::run(args)?,
        Cmd::RustAnalyzer(args) => rust_analyzer::run(args)?,
        Cmd::Deb(args) => deb::run(args)?,
        Cmd::Clean(args) => clean::run(args)?,
    }
    Ok(ExitCode::SUCCESS)
}
