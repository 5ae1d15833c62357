// SPDX-License-Identifier: GPL-2.0-only

//! Builds `pmem.ko`.
//!
//! The source tree stays clean: what is built goes to `target/kbuild/<kernel>`.

use crate::kernel::{Kernel, Series};
use crate::progress::Progress;
use crate::root::Root;
use crate::{cache, exec, repo};
use anyhow::{bail, ensure, Context, Result};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Has the module built for kernels that it was never tried on, as `make PMEM_FORCE=1` does.
pub const FORCE_VARIABLE: &str = "PMEM_FORCE";

/// About how many lines a build prints.
const LINES: u64 = 10;

/// A module that was built.
#[derive(Debug, Clone)]
pub struct Module {
    /// The file to load.
    pub ko: PathBuf,
}

/// Builds the module for `kernel`.
pub fn build(kernel: &Kernel, root: &Root, progress: &Progress) -> Result<Module> {
    make(kernel, root, progress, Check::No, repo::dir(), "")
}

/// As [`build`], from other sources, below cargo's target directory. Each `name` of such has a build directory of its
/// own.
pub fn build_tree(
    kernel: &Kernel,
    root: &Root,
    progress: &Progress,
    tree: &Path,
    name: &str,
) -> Result<Module> {
    make(kernel, root, progress, Check::No, tree, &format!("-{name}"))
}

/// Builds the module with clippy, as Kbuild does with `CLIPPY=1`. Warnings are errors, of compilers and of modpost.
pub fn clippy(kernel: &Kernel, root: &Root, progress: &Progress) -> Result<()> {
    make(kernel, root, progress, Check::Clippy, repo::dir(), "").map(drop)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Check {
    No,
    Clippy,
}

fn make(
    kernel: &Kernel,
    root: &Root,
    progress: &Progress,
    check: Check,
    tree: &Path,
    which: &str,
) -> Result<Module> {
    let (suffix, title) = match check {
        Check::No => ("", "build"),
        Check::Clippy => ("-clippy", "clippy"),
    };
    let name = format!("{}{which}{suffix}", kernel.name());
    let _lock = cache::Lock::take(&format!("module-{name}"), progress)?;
    let out = repo::target().join("kbuild").join(&name);
    fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    let ko = out.join("pmem.ko");

    let step = progress.count(&format!("{title} pmem.ko for {}", kernel.release), LINES);
    let mut command = command(kernel, root, tree, &out);
    if let Some(force) = std::env::var_os(FORCE_VARIABLE) {
        command.arg(assign(FORCE_VARIABLE, &force));
    }
    if check == Check::Clippy {
        command.args(["CLIPPY=1", "W=e"]);
    }
    let output = exec::run(command.arg("modules"), &format!("module-{name}"), &step)?;
    let warnings = warnings(&output.text);
    if check == Check::Clippy && !warnings.is_empty() {
        // Built again, it would be up to date and say nothing.
        cache::remove(&ko)?;
        cache::remove(&out.join("Module.symvers"))?;
        bail!(
            "the build of pmem.ko warns:\n    {}",
            warnings.join("\n    ")
        );
    }
    step.done();
    Ok(Module { ko })
}

/// `make` for the module in `tree`, with all that it must be given but the targets. What is built goes to `out`.
fn command(kernel: &Kernel, root: &Root, tree: &Path, out: &Path) -> Command {
    let mut command = kernel.make(root);
    command
        .arg(assign("M", tree.as_os_str()))
        .arg(assign("MO", out.as_os_str()));
    command
}

/// A variable for make.
fn assign(name: &str, value: &OsStr) -> OsString {
    let mut text = OsString::from(format!("{name}="));
    text.push(value);
    text
}

/// Kernels that the driver is not for: the numbers that their Makefiles would have.
const STRANGERS: [(u32, u32); 5] = [(7, 4), (7, 1), (7, 30), (6, 12), (8, 3)];

/// Checks that Kbuild refuses kernels that the driver was never tried on, says why, and builds all the same if it has to.
///
/// The tree is that of `kernel`, which claims to be another one.
pub fn check_refusals(kernel: &Kernel, root: &Root, progress: &Progress) -> Result<()> {
    let name = format!("{}-refused", kernel.name());
    let _lock = cache::Lock::take(&format!("module-{name}"), progress)?;
    let out = repo::target().join("kbuild").join(&name);
    fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    let step = progress.step("kernels that pmem.ko is not for");
    let make = |(version, patch): (u32, u32), rest: &[&str]| {
        let mut make = command(kernel, root, repo::dir(), &out);
        make.arg(format!("VERSION={version}"))
            .arg(format!("PATCHLEVEL={patch}"))
            .args(rest);
        exec::try_run(&mut make, &format!("module-{name}"), &step)
    };
    let all: Vec<&str> = Series::all().into_iter().map(Series::name).collect();
    for stranger in STRANGERS {
        let (built, output) = make(stranger, &["modules"])?;
        let says = format!(
            "this is Linux {}.{}, and the driver was tried with {} alone. PMEM_FORCE=1 builds it",
            stranger.0,
            stranger.1,
            all.join(" ")
        );
        ensure!(
            !built && output.text.contains(&says),
            "Linux {}.{} is not refused as it should be, see {}",
            stranger.0,
            stranger.1,
            output.log.display()
        );
        // A part of it will do, which is fast to build.
        for rest in [
            &["PMEM_FORCE=1", "drivers/kapi/helpers.o"] as &[&str],
            &["clean"],
        ] {
            let (done, output) = make(stranger, rest)?;
            ensure!(
                done,
                "{}",
                exec::failure(
                    &format!("make {}", rest.join(" ")),
                    &output.text,
                    &output.log
                )
            );
        }
    }
    step.done();
    Ok(())
}

/// The lines that warn of something that we could mend.
fn warnings(text: &str) -> Vec<&str> {
    text.lines()
        .filter(|line| line.to_ascii_lowercase().contains("warning: "))
        .filter(|line| !line.contains("the compiler differs from the one used to build the kernel"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_are_found() {
        let text = "  LD [M]  pmem.ko\nWARNING: modpost: missing MODULE_DESCRIPTION()\n\
                    warning: the compiler differs from the one used to build the kernel\n\
                    Skipping BTF generation for pmem.ko due to unavailability of vmlinux\n\
                    x.rs:1: warning: unused\n";
        assert_eq!(warnings(text).len(), 2);
    }
}
