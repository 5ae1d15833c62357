// SPDX-License-Identifier: GPL-2.0-only

//! KVM where it works, emulation elsewhere.

use super::{Builder, Image};
use crate::cache;
use crate::kernel::Kernel;
use crate::progress::Progress;
use crate::root::Root;
use anyhow::{bail, Context, Result};
use std::fmt;
use std::fs;
use std::path::Path;
use std::time::Duration;

/// A guest that KVM can run has booted long before.
const PATIENCE: Duration = Duration::from_secs(15);

/// How QEMU runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// On the host's CPU.
    Kvm,
    /// By translation: everything works, nothing is as fast as it would be.
    Tcg,
    /// By translation, one CPU at a time, so that there is an order of all that they do.
    InTurns,
    /// By translation, one CPU at a time, and the guest's clocks do not tell the time: they go on by a nanosecond
    /// with each instruction, and while all CPUs wait they skip to what is waited for. A guest that computes measures
    /// how many instructions that takes.
    Counted,
}

impl Accelerator {
    /// Chooses by booting `kernel` once with KVM: a host may have `/dev/kvm` and be unable to run a guest's kernel,
    /// and QEMU then stops without a word. The answer is remembered for this host. `PMEM_ACCEL=kvm` or
    /// `PMEM_ACCEL=tcg` overrides it.
    pub fn choose(kernel: &Kernel, root: &Root, progress: &Progress) -> Result<Self> {
        match std::env::var("PMEM_ACCEL").as_deref() {
            Ok("kvm") => return Ok(Self::Kvm),
            Ok("tcg") => return Ok(Self::Tcg),
            Ok("") | Err(_) => {}
            Ok(other) => bail!("PMEM_ACCEL is {other:?}; it must be kvm or tcg"),
        }
        let usable = fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_ok();
        if !usable {
            return Ok(Self::Tcg);
        }
        let path = cache::create()?.join(format!("kvm-{}", host(root)));
        if let Some(known) = remembered(&path) {
            return Ok(known);
        }
        let _lock = cache::Lock::take("kvm", progress)?;
        if let Some(known) = remembered(&path) {
            return Ok(known);
        }
        // What is wrong with the guest's image is no fault of KVM's.
        Image::ensure(root, progress)?;
        let step = progress.step("trying KVM");
        let attempt = Builder::new(kernel, root, progress)
            .name("kvm-probe")
            .accelerator(Self::Kvm)
            .boot_timeout(PATIENCE)
            .start()
            .and_then(|vm| vm.sh("fio --version"));
        let (answer, text) = match attempt {
            Ok(_) => (Self::Kvm, "kvm"),
            Err(_) => (Self::Tcg, "tcg"),
        };
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        step.done_with(match answer {
            Self::Kvm => "it works",
            _ => "this host cannot run guests with it; they will be emulated",
        });
        Ok(answer)
    }

    /// QEMU's arguments.
    pub fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Kvm => &["-accel", "kvm", "-cpu", "host"],
            // Page tables of five levels only make each walk longer.
            Self::Tcg => &["-accel", "tcg,thread=multi", "-cpu", "max,la57=off"],
            Self::InTurns => &["-accel", "tcg,thread=single", "-cpu", "max,la57=off"],
            Self::Counted => &[
                "-accel",
                "tcg,thread=single",
                "-icount",
                "shift=0,sleep=off",
                "-cpu",
                // Each step of a string instruction counts as one. The kernel copies by bytes where a CPU says that
                // it makes that fast, which no such CPU does byte by byte.
                "max,la57=off,erms=off,fsrm=off",
            ],
        }
    }
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "KVM",
            Self::Tcg => "TCG (emulated)",
            Self::InTurns => "TCG (emulated, one CPU at a time)",
            Self::Counted => "TCG (emulated, its clock counts instructions)",
        })
    }
}

fn remembered(path: &Path) -> Option<Accelerator> {
    match fs::read_to_string(path).ok()?.trim() {
        "kvm" => Some(Accelerator::Kvm),
        "tcg" => Some(Accelerator::Tcg),
        _ => None,
    }
}

/// A key of what the answer depends on: the host's kernel and CPU, and QEMU.
fn host(root: &Root) -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo
        .lines()
        .find(|line| line.starts_with("model name"))
        .unwrap_or_default();
    cache::key([&release, model, &root.path().display().to_string()])
}
