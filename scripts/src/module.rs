// SPDX-License-Identifier: GPL-2.0-only

//! Builds `pmem.ko`.
//!
//! The source tree stays clean: what is built goes to `target/kbuild/<kernel>`.

use crate::kernel::Kernel;
use crate::progress::Progress;
use crate::root::Root;
use crate::{cache, exec, repo};
use anyhow::{bail, Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

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
    let mut command = kernel.make(root);
    command
        .arg(format!("M={}", tree.display()))
        .arg(format!("MO={}", out.display()));
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
