// SPDX-License-Identifier: GPL-2.0-only

//! Runs every test.

mod matrix;
mod tally;

use crate::flavour::Flavour;
use crate::kernel::{self, Kernel};
use crate::progress::{self, Progress};
use crate::root::Root;
use crate::vm::{Setup, PMEM_KO};
use crate::{crates, deb, docs, exec, host, module, repo, rust_analyzer};
use anyhow::{bail, ensure, Context, Result};
use clap::ValueEnum;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};
use tally::Tally;
use walkdir::WalkDir;

/// Says to the VM tests which kernels to boot: names of flavours, separated by commas.
pub const FLAVOURS_VARIABLE: &str = "PMEM_FLAVOURS";

/// The environment variable that has VM tests run that take very long, if it is set.
const FULL_VARIABLE: &str = "PMEM_FULL";

/// Whether VM tests that take very long are to run.
pub fn is_full() -> bool {
    std::env::var_os(FULL_VARIABLE).is_some()
}

/// Says to the VM tests for how many minutes to soak.
pub const SOAK_VARIABLE: &str = "PMEM_SOAK";

/// The kernels that the VM tests boot.
const FLAVOURS: [Flavour; 4] = [
    Flavour::Cloud,
    Flavour::Amd64,
    Flavour::Test,
    Flavour::Builtin,
];

/// Runs every test: format, lints, documents, host, KUnit and VM tests.
///
/// Kernels are fetched and built on the first run, which takes about a quarter of an hour on two cores.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Run the host and VM tests with this in their names, and nothing else.
    filter: Option<String>,

    /// Run this stage alone; may be given again.
    #[arg(long, value_enum, value_name = "STAGE")]
    only: Vec<Stage>,

    /// Build and boot this kernel alone; may be given again.
    #[arg(long, value_enum)]
    flavour: Vec<Flavour>,

    /// Look for faults that no result shows: boot the kernel with KASAN, lockdep, kmemleak and fault injection, and run
    /// KUnit and the VM tests in it. It takes hours where VMs are emulated.
    #[arg(long, conflicts_with = "flavour")]
    debug: bool,

    /// Build the module for the newest kernel of Debian's in each series that it is for, of both flavours, and run VM
    /// tests in each: those that touch every part of the driver, or those with FILTER in their names.
    #[arg(long, conflicts_with_all = ["only", "flavour", "debug", "soak"])]
    matrix: bool,

    /// Write and verify for so long, and nothing else: files, disks, RAM and storage at once, while memory is short.
    #[arg(long, value_name = "MINUTES", conflicts_with_all = ["filter", "only"])]
    soak: Option<u32>,

    /// Also run what takes very long: the packages, installed on a system that boots by its own boot loader.
    #[arg(long)]
    full: bool,

    /// How many VMs to run at once. One for each CPU and 8 at most, unless told otherwise.
    #[arg(long, short, value_parser = clap::value_parser!(u16).range(1..))]
    jobs: Option<u16>,
}

/// A part of the tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Stage {
    /// rustfmt, on everything.
    Fmt,
    /// clippy, as cargo and as Kbuild run it, and the build without warnings.
    Clippy,
    /// Tests that need no kernel, and the examples in the documentation.
    Host,
    /// The documents, as HTML and as manual pages, without a warning.
    Docs,
    /// Every kernel, and the module for it.
    Build,
    /// The suites in the module, run by the kernel.
    Kunit,
    /// Tests that boot a VM and act in it.
    Vm,
}

impl Stage {
    fn name(self) -> String {
        self.to_possible_value()
            .map(|value| value.get_name().to_string())
            .unwrap_or_default()
    }

    fn title(self) -> &'static str {
        match self {
            Stage::Fmt => "format",
            Stage::Clippy => "lints",
            Stage::Host => "host tests and doctests",
            Stage::Docs => "documents",
            Stage::Build => "kernels and modules",
            Stage::Kunit => "KUnit suites in the kernel",
            Stage::Vm => "VM tests",
        }
    }
}

/// What became of a stage.
struct Outcome {
    stage: Stage,
    tally: Tally,
    time: Duration,
}

/// Runs the stages, each whatever became of those before it, and shows a summary.
pub fn run(args: &Args) -> Result<ExitCode> {
    let suite = Suite {
        args,
        progress: Progress::new(),
    };
    if args.matrix {
        return matrix::run(&suite);
    }
    let outcomes: Vec<Outcome> = suite
        .stages()
        .into_iter()
        .map(|stage| suite.run(stage))
        .collect();

    let lines = outcomes
        .iter()
        .map(|outcome| (outcome.stage.name(), outcome.tally, outcome.time))
        .collect();
    let none = outcomes
        .iter()
        .all(|outcome| outcome.tally == Tally::default());
    if let (Some(filter), true) = (&args.filter, none) {
        bail!("no test has {filter:?} in its name");
    }
    Ok(summary(&suite.progress, lines))
}

/// Shows what became of each thing that has a name.
fn summary(progress: &Progress, lines: Vec<(String, Tally, Duration)>) -> ExitCode {
    progress.heading("summary");
    let width = lines.iter().map(|(name, ..)| name.len()).max();
    let width = width.unwrap_or_default().max(8);
    let mut total = Tally::default();
    for (name, tally, time) in lines {
        let verdict = if tally.failed == 0 { "ok" } else { "FAILED" };
        println!(
            "  {name:<width$} {verdict:<8} {:<24} {}",
            tally.to_string(),
            progress::time(time)
        );
        total += tally;
    }
    println!("{total}");
    if total.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

struct Suite<'a> {
    args: &'a Args,
    progress: Progress,
}

impl Suite<'_> {
    fn stages(&self) -> Vec<Stage> {
        if self.args.soak.is_some() {
            vec![Stage::Vm]
        } else if !self.args.only.is_empty() {
            self.args.only.clone()
        } else if self.args.debug && self.args.filter.is_some() {
            vec![Stage::Vm]
        } else if self.args.debug {
            vec![Stage::Build, Stage::Kunit, Stage::Vm]
        } else if self.args.filter.is_some() {
            vec![Stage::Host, Stage::Vm]
        } else {
            Stage::value_variants().to_vec()
        }
    }

    fn flavours(&self) -> &[Flavour] {
        match self.args.flavour.as_slice() {
            [] if self.args.debug => &[Flavour::Debug],
            [] => &FLAVOURS,
            chosen => chosen,
        }
    }

    fn run(&self, stage: Stage) -> Outcome {
        self.progress.heading(stage.title());
        let started = Instant::now();
        let mut tally = Tally::default();
        let result = match stage {
            Stage::Fmt => self.fmt(),
            Stage::Clippy => self.clippy(&mut tally),
            Stage::Host => self.host(&mut tally),
            Stage::Docs => self.docs(&mut tally),
            Stage::Build => self.build(&mut tally),
            Stage::Kunit => self.kunit(&mut tally),
            Stage::Vm => self.vm(&mut tally),
        };
        match &result {
            // A stage without tests of its own is one.
            Ok(()) if tally == Tally::default() && self.args.filter.is_none() => {
                tally = Tally::of(true);
            }
            Ok(()) => {}
            Err(error) => {
                self.progress.line(&format!("error: {error:#}"));
                if tally.failed == 0 {
                    tally += Tally::of(false);
                }
            }
        }
        Outcome {
            stage,
            tally,
            time: started.elapsed(),
        }
    }

    /// Formats with the build root's rustfmt, the same everywhere.
    fn fmt(&self) -> Result<()> {
        let root = Root::ensure(&self.progress)?;
        let step = self.progress.step("rustfmt");
        let mut rustfmt = root.command("rustfmt");
        rustfmt
            .args(["--check", "--color=never", "--edition=2021"])
            .args(rust_files()?);
        let (formatted, output) = exec::try_run(&mut rustfmt, "rustfmt", &step)?;
        if !formatted {
            bail!(
                "{}\nTo format: cargo fmt --all, and rustfmt drivers/main.rs",
                output.text.trim_end()
            );
        }
        step.done();
        Ok(())
    }

    fn clippy(&self, tally: &mut Tally) -> Result<()> {
        host::ensure_clippy(&self.progress)?;
        let mut cargo = self.cargo_workspace("clippy")?;
        cargo.args(["--all-targets", "--", "--deny", "warnings"]);
        let passed = cargo.status().context("cannot run cargo")?.success();
        *tally += Tally::of(passed);

        let root = Root::ensure(&self.progress)?;
        let mut flavours = vec![self.first(Flavour::Cloud)];
        if self.args.flavour.is_empty() {
            // With what only KUnit needs.
            flavours.push(Flavour::Test);
        }
        for flavour in flavours {
            let kernel = Kernel::ensure(flavour, &root, &self.progress)?;
            module::clippy(&kernel, &root, &self.progress)?;
            *tally += Tally::of(true);
        }
        Ok(())
    }

    fn host(&self, tally: &mut Tally) -> Result<()> {
        let mut test = self.cargo_workspace("test")?;
        test.arg("--no-fail-fast");
        if has_vm_tests() {
            test.args(["--exclude", VM_TESTS]);
        }
        test.args(&self.args.filter);
        count(&mut test, tally)
    }

    fn docs(&self, tally: &mut Tally) -> Result<()> {
        let root = Root::ensure(&self.progress)?;
        let epoch = docs::epoch()?;
        self.note(tally, docs::html(epoch, &root, &self.progress).map(drop));
        let manuals = docs::manuals(epoch, &root, &self.progress)
            .and_then(|manuals| docs::lint(&manuals, &root, &self.progress));
        self.note(tally, manuals);
        Ok(())
    }

    fn build(&self, tally: &mut Tally) -> Result<()> {
        let root = Root::ensure(&self.progress)?;
        for &flavour in self.flavours() {
            let built =
                Kernel::ensure(flavour, &root, &self.progress).and_then(|kernel| match flavour {
                    Flavour::Builtin => Ok(()),
                    _ => module::build(&kernel, &root, &self.progress).map(drop),
                });
            self.note(tally, built);
        }
        let mut flavours = self.flavours().iter();
        if let Some(&flavour) = flavours.find(|&&one| one != Flavour::Builtin) {
            let kernel = Kernel::ensure(flavour, &root, &self.progress)?;
            self.note(
                tally,
                module::check_refusals(&kernel, &root, &self.progress),
            );
            // What an editor is told: all that it names exists.
            self.note(
                tally,
                rust_analyzer::project(&kernel, &root, &self.progress).map(drop),
            );
        }
        if self.args.flavour.is_empty() && !self.args.debug {
            self.note(tally, deb::make(&root, &self.progress).map(drop));
        }
        // It takes long to build, and no test boots it: at least its configuration holds.
        self.note(
            tally,
            kernel::check_config(Flavour::Debug, &root, &self.progress),
        );
        Ok(())
    }

    fn note(&self, tally: &mut Tally, result: Result<()>) {
        *tally += Tally::of(result.is_ok());
        if let Err(error) = result {
            self.progress.line(&format!("error: {error:#}"));
        }
    }

    /// Loads the module in a kernel with KUnit, and has the log read by the kernel's own parser.
    fn kunit(&self, tally: &mut Tally) -> Result<()> {
        let flavour = match self.args.debug {
            true => Flavour::Debug,
            false => Flavour::Test,
        };
        let setup = Setup::new(flavour, &self.progress)?;
        let mut vm = setup
            .vm(&self.progress)
            .name("kunit")
            .cmdline("memhp_default_state=online_movable kunit.enable=1")
            .start()?;
        vm.keep_console();
        let parameters = "pmem_start=4G pmem_size=64M pmem_kunit_start=0x110000000 \
                          kmem_kunit_start=0x120000000";
        vm.insmod_for(PMEM_KO, parameters, SUITES)?
            .context("the module does not load")?;
        let log = exec::log_path("kunit-dmesg")?;
        let dmesg = vm.dmesg()?;
        // The kernel's own suites ran at boot. The parser reads no further than their end.
        let ours = dmesg
            .find("pmem: ")
            .and_then(|at| dmesg.get(at..))
            .context("the module has said nothing")?;
        fs::write(&log, ours).with_context(|| format!("cannot write {}", log.display()))?;
        vm.check_clean()?;

        let step = self.progress.step("kunit.py");
        let script = format!("{}/tools/testing/kunit/kunit.py", kernel::SOURCE);
        let mut parse = setup
            .kernel
            .enter(&setup.root)
            .chdir("/tmp")
            .command("python3");
        parse
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .args([&script, "parse"])
            .arg(&log);
        let (passed, output) = exec::try_run(&mut parse, "kunit", &step)?;
        print!("{}", output.text);
        let read = output.text.lines().find_map(Tally::from_kunit);
        *tally += read.with_context(|| format!("no test results in {}", log.display()))?;
        ensure!(
            passed,
            "KUnit tests failed; the guest's log is {}",
            log.display()
        );
        ensure!(
            tally.passed > 0,
            "no KUnit test ran; the guest's log is {}",
            log.display()
        );
        step.done();
        Ok(())
    }

    fn vm(&self, tally: &mut Tally) -> Result<()> {
        ensure!(has_vm_tests(), "there are no VM tests in tests/vm");
        let mut test = self.vm_tests(self.flavours());
        test.args(&self.args.filter)
            .args(self.args.soak.map(|_| SOAK));
        if self.args.full {
            test.env(FULL_VARIABLE, "1");
        }
        if let Some(minutes) = self.args.soak {
            test.args(["--nocapture"])
                .env(SOAK_VARIABLE, minutes.to_string());
        }
        count(&mut test, tally)
    }

    /// The VM tests in the kernels of `flavours`. Parts of their names can be added.
    fn vm_tests(&self, flavours: &[Flavour]) -> Command {
        let flavours: Vec<&str> = flavours.iter().map(|flavour| flavour.name()).collect();
        let cpus = std::thread::available_parallelism().map_or(1, |n| n.get());
        let jobs = self.args.jobs.map_or(cpus.min(8), usize::from);
        let mut test = cargo("test");
        test.args(["--package", VM_TESTS, "--no-fail-fast"])
            .args(["--", "--test-threads", &jobs.to_string()])
            .env(FLAVOURS_VARIABLE, flavours.join(","));
        test
    }

    /// The host's cargo, for all crates that its Rust is new enough for.
    fn cargo_workspace(&self, command: &str) -> Result<Command> {
        let mut cargo = cargo(command);
        cargo.arg("--workspace");
        for krate in crates::too_new()? {
            self.progress.line(&format!(
                "cargo {command} leaves {} out: it needs Rust {}, and this is {}",
                krate.name,
                krate.rust.unwrap_or_default(),
                crates::host_rust()?
            ));
            cargo.args(["--exclude", &krate.name]);
        }
        Ok(cargo)
    }

    /// `usual`, or if the user chose others, the first of those.
    fn first(&self, usual: Flavour) -> Flavour {
        match self.args.flavour.first() {
            Some(&chosen) if !self.args.flavour.contains(&usual) => chosen,
            _ => usual,
        }
    }
}

/// How long all suites may take, which run while the module is loaded: one of them waits for half a minute.
const SUITES: Duration = Duration::from_secs(400);

/// The VM test that soaks.
const SOAK: &str = "soak::soak";

/// The package of the VM tests.
const VM_TESTS: &str = "vm-tests";

fn has_vm_tests() -> bool {
    repo::dir().join("tests/vm/Cargo.toml").exists()
}

fn cargo(command: &str) -> Command {
    let mut cargo = crates::cargo(command);
    // An error says what it is about; how the test came to return it fills screens. A panic keeps its backtrace.
    cargo.stdin(Stdio::null()).env("RUST_LIB_BACKTRACE", "0");
    cargo
}

/// Runs `test`, shows what it prints, and adds up its results.
fn count(test: &mut Command, tally: &mut Tally) -> Result<()> {
    let mut child = exec::spawn(test.stdout(Stdio::piped()))?;
    let stdout = child
        .stdout
        .take()
        .context("cargo has no standard output")?;
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        if let Some(result) = Tally::from_libtest(&line) {
            *tally += result;
        }
    }
    ensure!(child.wait()?.success(), "cargo test failed");
    Ok(())
}

/// All of the repository's Rust.
fn rust_files() -> Result<Vec<PathBuf>> {
    let skip = [repo::target(), repo::dir().join(".git")];
    let mut files = Vec::new();
    for entry in WalkDir::new(repo::dir())
        .sort_by_file_name()
        .into_iter()
        .filter_entry(|entry| !skip.iter().any(|dir| dir == entry.path()))
    {
        let path = entry?.into_path();
        if path.extension().is_some_and(|ext| ext == "rs")
            && !path.ends_with("bindings_generated.rs")
        {
            files.push(path);
        }
    }
    Ok(files)
}
