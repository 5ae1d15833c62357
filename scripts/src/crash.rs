// SPDX-License-Identifier: GPL-2.0-only

//! `cargo xtask crash`: looks for what a power failure at any moment could lose.
//!
//! A guest does a workload on a disk of the driver's, and says before each step that it begins, and afterwards that it is
//! done. Meanwhile QEMU records each store, write-back and fence. From that record, a model of the persistence of
//! x86-64 says in what states a power failure could have left the memory at each moment. In each of them, what was
//! acknowledged must be there, and nothing may be there that was never written.
//!
//! | module | what it does |
//! |---|---|
//! | `workload` | what the guest does |
//! | `recording` | has it done, and keeps what was recorded |
//! | `explore` | chooses moments and states |
//! | `disk`, `tree` | what must be there, and what may be: of a disk, of files |
//! | `kmem` | the disk of a range that is RAM and storage at once |
//! | `check` | looks into images of file systems, on the host and in a guest |
//! | `mutation` | drivers with a fault, which must be found |

mod check;
mod disk;
mod explore;
mod kmem;
mod mutation;
mod recording;
mod tree;
mod workload;

pub use explore::{Limits, Loss, Report};
pub use mutation::Mutation;
pub use pmem_trace::domain::Rules;
pub use workload::Workload;

use crate::flavour::Flavour;
use crate::progress::{time, Progress};
use crate::repo;
use crate::vm::Setup;
use anyhow::{bail, ensure, Context, Result};
use check::Checker;
use pmem_trace::domain::Patch;
use pmem_trace::record::Event;
use recording::{Case, Recording};
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Look for what a power failure at any moment could lose.
///
/// A guest writes, and QEMU records what reaches its persistent memory. From that record, images are made as a power
/// failure could have left them at any moment, and checked: what was acknowledged is there, and nothing that was never
/// written. Exits with 1 if something is lost, after it has said how to look at that again.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Only this workload; may be given again. `--list` has them.
    #[arg(long, value_name = "NAME")]
    workload: Vec<String>,

    /// Say which workloads there are.
    #[arg(long)]
    list: bool,

    /// About how many operations a workload has.
    #[arg(long, value_name = "N", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..))]
    length: u32,

    /// How many states of each workload to check: 1000 of blocks and 100 of ext4, unless told otherwise. Those of XFS are
    /// the images.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    states: Option<u32>,

    /// How many states of each file system to have a guest mount.
    #[arg(long, value_name = "N", default_value_t = 20)]
    images: u32,

    /// What chooses operations, moments and states.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,

    /// Trust SFENCE and MFENCE alone, as if locked instructions did not wait for stores. A flush of the driver's that is
    /// missing is often hidden by one of the kernel's locks.
    #[arg(long)]
    strict: bool,

    /// Leave something out of the driver, which is to be found. Implies `--strict`, and the workload that needs it.
    #[arg(long, value_enum, value_name = "WHAT")]
    mutate: Option<Mutation>,

    /// Begin no new state after so many minutes.
    #[arg(long, value_name = "N")]
    minutes: Option<u64>,

    /// The kernel to boot.
    #[arg(long, value_enum, default_value_t = Flavour::Cloud)]
    flavour: Flavour,

    /// Look again at a state that was kept.
    #[arg(long, value_name = "DIRECTORY", conflicts_with_all = ["workload", "mutate", "minutes", "list"])]
    replay: Option<PathBuf>,
}

/// A state that was kept, beside its recording.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    strict: bool,
    events: usize,
    /// Physical addresses, and bytes.
    patches: Vec<(u64, Vec<u8>)>,
    why: String,
}

/// The files of a state that was kept.
const STATE: &str = "state.json";
const IMAGE: &str = "image";

/// Records workloads and looks at their states.
pub fn run(args: &Args) -> Result<ExitCode> {
    if args.list {
        for Workload { name, about, .. } in &workload::ALL {
            println!("{name:<14} {about}");
        }
        return Ok(ExitCode::SUCCESS);
    }
    let progress = Progress::new();
    if let Some(dir) = &args.replay {
        return replay(dir, args.flavour, &progress);
    }
    let strict = args.strict || args.mutate.is_some();
    let started = Instant::now();
    let limits = Limits {
        states: 0,
        images: args.images as usize,
        seed: args.seed,
        rules: Rules { strict },
        deadline: args
            .minutes
            .map(|minutes| started + Duration::from_secs(60 * minutes)),
        losses: 3,
    };
    let mut chosen = Vec::new();
    for name in &args.workload {
        let known = Workload::find(name);
        chosen.push(known.with_context(|| {
            format!("there is no workload {name:?}; `cargo xtask crash --list` has them")
        })?);
    }
    if chosen.is_empty() {
        chosen = match args.mutate {
            Some(mutation) => Workload::find(mutation.workload()).into_iter().collect(),
            None => workload::ALL.iter().collect(),
        };
    }
    let setup = setup(args.flavour, args.mutate, &progress)?;
    let mut lost = false;
    for workload in chosen {
        if limits.deadline.is_some_and(|at| Instant::now() >= at) {
            progress.line(&format!("{:<14} left out: time is up", workload.name));
            continue;
        }
        let usual = match workload.is_of_files() {
            true => 100,
            false => 1000,
        };
        let limits = Limits {
            states: args.states.unwrap_or(usual) as usize,
            ..limits
        };
        let subject = Run {
            workload,
            length: args.length as usize,
            mutation: args.mutate,
        };
        let (report, dir) = subject.run(&setup, &limits, &progress)?;
        for (n, loss) in report.lost.iter().enumerate() {
            let kept = keep(&dir, n, loss, strict)?;
            println!(
                "    LOST: {}\n    after event {}; to look at it again: cargo xtask crash --replay {}",
                loss.why,
                loss.events,
                kept.display()
            );
        }
        lost |= !report.lost.is_empty();
    }
    println!(
        "{} ({})",
        match lost {
            true => "something is lost",
            false => "nothing is lost",
        },
        time(started.elapsed())
    );
    Ok(match lost {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    })
}

/// A kernel, and the driver, from which something may be left out.
pub fn setup(flavour: Flavour, mutation: Option<Mutation>, progress: &Progress) -> Result<Setup> {
    ensure!(
        flavour != Flavour::Builtin,
        "the driver has to be a module; take another flavour"
    );
    let mut setup = Setup::new(flavour, progress)?;
    if let Some(mutation) = mutation {
        setup.module = Some(mutation.build(&setup.kernel, &setup.root, progress)?);
    }
    Ok(setup)
}

/// A workload to be recorded and looked at.
#[derive(Debug, Clone, Copy)]
pub struct Run {
    /// Which.
    pub workload: &'static Workload,
    /// About how many operations.
    pub length: usize,
    /// What is left out of the driver of the setup.
    pub mutation: Option<Mutation>,
}

impl Run {
    /// Does so, prints a line of what was done, and returns where the recording is.
    pub fn run(
        &self,
        setup: &Setup,
        limits: &Limits,
        progress: &Progress,
    ) -> Result<(Report, PathBuf)> {
        let Self {
            workload,
            length,
            mutation,
        } = *self;
        let started = Instant::now();
        let script = workload.script(length, limits.seed);
        let mutation = mutation.map(Mutation::name);
        let name = match mutation {
            Some(mutation) => format!("{}-without-{mutation}", workload.name),
            None => workload.name.to_owned(),
        };
        let dir = repo::target()
            .join("crash")
            .join(format!("{name}-{}", limits.seed));
        crate::cache::remove(&dir)?;
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let case = Case {
            workload: workload.name.to_owned(),
            seed: limits.seed,
            kernel: setup.kernel.release.clone(),
            mutation: mutation.map(str::to_owned),
            setup: script.setup,
            steps: script.steps,
        };
        let step = progress.step(&format!("record {name}"));
        let recording = Recording::make(case, setup, &dir, progress)
            .with_context(|| format!("the workload {name} cannot be recorded"))?;
        step.done();

        let step = progress.step(&format!("states of {name}"));
        let mut checker = Some(Checker::new(setup, workload, progress)?);
        let report = explore::explore(&recording, limits, &mut checker, |report| {
            step.note(&format!(
                "{} of {} states checked, {} mounted",
                report.checked, limits.states, report.mounted
            ));
        })?;
        step.done();
        println!("{}", line(&name, &recording, &report, started.elapsed()));
        Ok((report, dir))
    }
}

/// What was done, on two lines.
fn line(name: &str, recording: &Recording, report: &Report, took: Duration) -> String {
    let count = |is_it: fn(&Event) -> bool| recording.events.iter().filter(|e| is_it(e)).count();
    let stores = count(|event| matches!(event, Event::Store { .. }));
    let write_backs = count(|event| matches!(event, Event::WriteBack { .. }));
    let fences = count(|event| matches!(event, Event::Fence { .. }));
    let Report {
        points,
        states,
        same,
        checked,
        mounted,
        lost,
        interrupted,
    } = report;
    format!(
        "{name:<14} {} steps: {stores} stores, {write_backs} write-backs, {fences} fences\n\
         {:<14} {states} states at {points} moments, {same} the same as others; {checked} checked, {mounted} mounted, \
         {} lost{} ({})",
        recording.case.steps.len(),
        "",
        lost.len(),
        if *interrupted { "; time is up" } else { "" },
        time(took)
    )
}

/// Keeps a state in which something is lost, with all that it takes to look at it again.
fn keep(recording: &Path, n: usize, loss: &Loss, strict: bool) -> Result<PathBuf> {
    let mut name = recording.file_name().unwrap_or_default().to_os_string();
    name.push(format!("-lost-{n}"));
    let dir = recording.with_file_name(name);
    crate::cache::remove(&dir)?;
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    Recording::link(recording, &dir)?;
    let kept = Kept {
        strict,
        events: loss.events,
        patches: loss
            .patches
            .iter()
            .map(|patch| (patch.address, patch.bytes.clone()))
            .collect(),
        why: loss.why.clone(),
    };
    fs::write(dir.join(STATE), serde_json::to_vec(&kept)?)?;
    recording::write_sparse(&dir.join(IMAGE), &loss.image)?;
    Ok(dir)
}

/// Looks again at a state that was kept.
fn replay(dir: &Path, flavour: Flavour, progress: &Progress) -> Result<ExitCode> {
    let path = dir.join(STATE);
    let kept = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let kept: Kept = serde_json::from_slice(&kept)
        .with_context(|| format!("{} is not of this version", path.display()))?;
    let recording = Recording::read(dir)?;
    let case = &recording.case;
    println!(
        "{}, seed {}, on {}{}: {} events before the power failure",
        case.workload,
        case.seed,
        case.kernel,
        match &case.mutation {
            Some(mutation) => format!(", without {mutation}"),
            None => String::new(),
        },
        kept.events
    );
    // Reading does not need the driver that wrote.
    let setup = setup(flavour, None, progress)?;
    let mut checker = Some(Checker::new(&setup, recording.workload, progress)?);
    let patches: Vec<Patch> = kept
        .patches
        .into_iter()
        .map(|(address, bytes)| Patch { address, bytes })
        .collect();
    let rules = Rules {
        strict: kept.strict,
    };
    let (image, found) = explore::again(&recording, rules, kept.events, &patches, &mut checker)?;
    if image != fs::read(dir.join(IMAGE))? {
        bail!(
            "{} is not what the log and the state make",
            dir.join(IMAGE).display()
        );
    }
    match found {
        Ok(()) => {
            println!("nothing is lost");
            Ok(ExitCode::SUCCESS)
        }
        Err(why) => {
            println!("LOST: {why}");
            Ok(ExitCode::FAILURE)
        }
    }
}
