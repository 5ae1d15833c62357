// SPDX-License-Identifier: GPL-2.0-only

//! What the tools need of this workspace's own crates, built by cargo on the way.
//!
//! The host's cargo builds them, wherever it can. One of them may need a newer Rust than the host has, as Debian's is not
//! the newest: it is then built in a [`Root`] that has one, of the crates that the host's cargo has fetched.

use crate::progress::{Progress, Step};
use crate::root::Root;
use crate::{exec, repo};
use anyhow::{Context, Result};
use serde::Deserialize;
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The build root's architecture.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The host's cargo, in the repository.
pub fn cargo(command: &str) -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.arg(command).current_dir(repo::dir());
    cargo
}

/// Builds `package` in a directory of its own below the target directory, called `dir`, and returns where the results
/// are. `what` is what to call it to the user.
pub fn build(
    package: &str,
    dir: &str,
    rustflags: &str,
    what: &str,
    progress: &Progress,
) -> Result<PathBuf> {
    // Of its own: cargo holds the other one's lock while it runs us as a test.
    let target = repo::target().join(dir);
    let newer = match too_new()?.iter().any(|krate| krate.name == package) {
        true => Some(Root::newer_rust(progress)?),
        false => None,
    };
    let step = progress.step(what);
    let results = match newer {
        Some(root) => build_in(&root, package, &target, rustflags, &step),
        None => {
            let mut cargo = cargo("build");
            cargo
                .env_remove("CARGO_ENCODED_RUSTFLAGS")
                .env("RUSTFLAGS", rustflags);
            finish(cargo, package, &target, &step)
        }
    };
    let results = results.with_context(|| format!("the {what} cannot be built on this host"))?;
    step.done();
    Ok(results)
}

/// Builds `package` in `root`, by the cargo there, so that the result needs no newer C library than that of `root`.
pub fn build_in(
    root: &Root,
    package: &str,
    target: &Path,
    rustflags: &str,
    step: &Step,
) -> Result<PathBuf> {
    let home = home()?;
    let mut fetch = cargo("fetch");
    exec::run(fetch.arg("--locked"), "fetch", step)?;
    let mut cargo = root.enter().bind(&home, &home).command("cargo");
    cargo
        .args(["build", "--offline", "--locked"])
        .env("CARGO_HOME", &home)
        .env("RUSTFLAGS", rustflags);
    finish(cargo, package, target, step)
}

fn finish(mut cargo: Command, package: &str, target: &Path, step: &Step) -> Result<PathBuf> {
    cargo
        .args(["--release", "--package", package, "--target", TARGET])
        .arg("--target-dir")
        .arg(target);
    exec::run(&mut cargo, package, step)?;
    Ok(target.join(TARGET).join("release"))
}

/// Where cargo keeps what it has fetched.
pub fn home() -> Result<PathBuf> {
    env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")))
        .context("cargo's directory is not known; set CARGO_HOME")
}

/// A crate of this workspace.
#[derive(Debug, Clone, Deserialize)]
pub struct Crate {
    /// Its name.
    pub name: String,
    /// The oldest Rust that compiles it.
    #[serde(rename = "rust_version")]
    pub rust: Option<String>,
}

/// The crates of this workspace that the host's Rust is too old for.
pub fn too_new() -> Result<Vec<Crate>> {
    #[derive(Deserialize)]
    struct Metadata {
        packages: Vec<Crate>,
    }
    let host = host_rust()?;
    let host = version(&host);
    let text =
        exec::stdout(cargo("metadata").args(["--no-deps", "--offline", "--format-version", "1"]))?;
    let metadata: Metadata =
        serde_json::from_str(&text).context("`cargo metadata` is not understood")?;
    Ok(metadata
        .packages
        .into_iter()
        .filter(|krate| krate.rust.as_deref().and_then(version) > host)
        .collect())
}

/// The version of the host's Rust.
pub fn host_rust() -> Result<String> {
    let mut rustc = Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    let text = exec::stdout(rustc.arg("--version").current_dir(repo::dir()))?;
    let number = text.split_whitespace().nth(1);
    Ok(number
        .with_context(|| format!("`rustc --version` says {text:?}"))?
        .to_owned())
}

/// The first two numbers of a version, which say what a Rust compiles.
fn version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split(['.', '-']).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_by_their_numbers() {
        assert_eq!(version("1.85.1"), Some((1, 85)));
        assert!(version("1.100") > version("1.99.2"));
        assert!(version("1.97.0-nightly") > version("1.96"));
        assert_eq!(version("nightly"), None);
    }

    #[test]
    fn what_builds_this_is_new_enough_for_it() {
        let too_new = too_new().unwrap();
        assert!(
            too_new.iter().all(|krate| krate.name != "xtask"),
            "{too_new:?}"
        );
    }
}
