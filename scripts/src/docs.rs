// SPDX-License-Identifier: GPL-2.0-only

//! Builds the documents: HTML, and the manual pages.
//!
//! What warns does not pass: a reference that leads nowhere, a table that is torn, a page that a pager would show
//! otherwise than it was meant.

use crate::progress::Progress;
use crate::root::Root;
use crate::{cache, exec, repo};
use anyhow::{ensure, Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::UNIX_EPOCH;
use walkdir::WalkDir;

/// Builds the documents: HTML, and the manual pages.
#[derive(clap::Args, Debug)]
pub struct Args {}

/// Builds all, and says where it is.
pub fn run(_: &Args) -> Result<()> {
    let progress = Progress::new();
    let root = Root::ensure(&progress)?;
    let epoch = epoch()?;
    let html = html(epoch, &root, &progress)?;
    let manuals = manuals(epoch, &root, &progress)?;
    lint(&manuals, &root, &progress)?;
    println!("{}", html.join("index.html").display());
    println!("{}", manuals.display());
    println!("\nTo read a page: man -M {} pmem", manuals.display());
    Ok(())
}

/// Where all of it goes.
fn directory() -> PathBuf {
    repo::target().join("docs")
}

/// Builds the documents as HTML, and returns their directory. They are of the time `epoch`, in seconds.
pub fn html(epoch: u64, root: &Root, progress: &Progress) -> Result<PathBuf> {
    sphinx("html", epoch, root, progress)
}

/// Builds all manual pages, and returns the directory that has one for each section, as `man -M` wants it.
pub fn manuals(epoch: u64, root: &Root, progress: &Progress) -> Result<PathBuf> {
    let out = sphinx("man", epoch, root, progress)?;
    let step = progress.step("manual pages of pmemctl");
    let section = out.join("man8");
    fs::create_dir_all(&section).with_context(|| format!("cannot create {}", section.display()))?;
    let mut pmemctl = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let date = exec::stdout(
        root.command("date")
            .args(["--utc", "+%F", "--date"])
            .arg(format!("@{epoch}")),
    )?;
    pmemctl
        .args(["run", "--quiet", "--package", "pmemctl", "--", "manual"])
        .args(["--date", date.trim()])
        .arg(&section)
        .current_dir(repo::dir());
    exec::run(&mut pmemctl, "docs-pmemctl", &step)?;
    step.done();
    Ok(out)
}

/// The time that the documents are of, in seconds: that of `SOURCE_DATE_EPOCH`, as packagers set it, or now.
pub fn epoch() -> Result<u64> {
    match std::env::var("SOURCE_DATE_EPOCH") {
        Ok(text) => text
            .parse()
            .with_context(|| format!("SOURCE_DATE_EPOCH is {text:?}, which is no number")),
        Err(_) => Ok(UNIX_EPOCH.elapsed()?.as_secs()),
    }
}

/// Runs sphinx from scratch, as it says nothing of documents that it knows already.
fn sphinx(builder: &str, epoch: u64, root: &Root, progress: &Progress) -> Result<PathBuf> {
    let step = progress.step(&format!("documents: {builder}"));
    let out = directory().join(builder);
    let doctrees = directory().join(format!("doctrees-{builder}"));
    for dir in [&out, &doctrees] {
        cache::remove(dir)?;
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    let mut command = root.command("sphinx-build");
    command
        .env("SOURCE_DATE_EPOCH", epoch.to_string())
        .args(["-q", "-W", "--keep-going", "-b", builder, "-d"])
        .arg(doctrees)
        .arg(repo::dir().join("Documentation"))
        .arg(&out);
    exec::run(&mut command, &format!("docs-{builder}"), &step)?;
    step.done();
    Ok(out)
}

/// Looks at the manual pages below `dir` by the two programs that show them.
pub fn lint(dir: &Path, root: &Root, progress: &Progress) -> Result<()> {
    let step = progress.step("manual pages: groff, mandoc");
    let mut pages = 0;
    for entry in WalkDir::new(dir).sort_by_file_name() {
        let entry = entry?;
        if !entry.file_type().is_file() {
            continue;
        }
        pages += 1;
        let page = entry.path();
        let mut groff = root.command("groff");
        groff
            .args(["-man", "-Tutf8", "-Kutf8", "-ww", "-z"])
            .arg(page);
        let mut mandoc = root.command("mandoc");
        mandoc.args(["-Tlint", "-Wwarning"]).arg(page);
        for (name, mut command) in [("groff", groff), ("mandoc", mandoc)] {
            // Both exit in their own ways when they warn.
            let (_, output) = exec::try_run(&mut command, &format!("docs-{name}"), &step)?;
            let warnings: Vec<&str> = output.text.lines().filter(|line| matters(line)).collect();
            ensure!(
                warnings.is_empty(),
                "{name} warns of {}:\n{}",
                page.display(),
                warnings.join("\n")
            );
        }
    }
    ensure!(pages > 0, "there are no manual pages in {}", dir.display());
    step.done();
    Ok(())
}

/// Whether what a line warns of can be seen. Sphinx and clap put more space around things than there has to be, which is
/// skipped.
fn matters(warning: &str) -> bool {
    !warning.contains("WARNING: skipping paragraph macro: ")
}
