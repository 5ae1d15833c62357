// SPDX-License-Identifier: GPL-2.0-only

//! What machines need of this workspace, built by the host's cargo on the way.

use crate::progress::Progress;
use crate::{exec, repo};
use anyhow::{Context, Result};
use std::path::PathBuf;
use std::process::Command;

/// The build root's architecture.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds `package` in a directory of its own below the target directory, called `dir`, and returns where the results
/// are. `what` is what to call it to the user.
pub(super) fn build(
    package: &str,
    dir: &str,
    rustflags: &str,
    what: &str,
    progress: &Progress,
) -> Result<PathBuf> {
    // Of its own: cargo holds the other one's lock while it runs us as a test.
    let target = repo::target().join(dir);
    let step = progress.step(what);
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .args([
            "build",
            "--release",
            "--package",
            package,
            "--target",
            TARGET,
        ])
        .arg("--target-dir")
        .arg(&target)
        .current_dir(repo::dir())
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("RUSTFLAGS", rustflags);
    exec::run(&mut cargo, &what.replace(' ', "-"), &step)
        .with_context(|| format!("the {what} cannot be built on this host"))?;
    step.done();
    Ok(target.join(TARGET).join("release"))
}
