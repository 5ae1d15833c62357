// SPDX-License-Identifier: GPL-2.0-only

//! The program that looks at ranges on the host.

use anyhow::{ensure, Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use xtask::repo;

/// Builds it, once.
fn program() -> Result<PathBuf> {
    static BUILT: Mutex<Option<PathBuf>> = Mutex::new(None);
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(path) = &*built {
        return Ok(path.clone());
    }
    // A directory of its own: cargo holds the other one's lock while it runs us.
    let target = repo::target().join("tools");
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["build", "--quiet", "--package", "pmemctl", "--target-dir"])
        .arg(&target)
        .current_dir(repo::dir())
        .output()
        .context("cannot run cargo")?;
    ensure!(
        output.status.success(),
        "pmemctl cannot be built:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(built.insert(target.join("debug/pmemctl")).clone())
}

/// Runs `pmemctl check` on the first `size` bytes of `image`, and returns its exit code and what it says.
pub fn check(image: &Path, size: u64) -> Result<(i32, String)> {
    let output = Command::new(program()?)
        .arg("check")
        .args(["--json", "--size", &size.to_string()])
        .arg(image)
        .output()
        .context("cannot run pmemctl")?;
    let code = output.status.code().context("pmemctl was killed")?;
    let text = [output.stdout, output.stderr].concat();
    Ok((code, String::from_utf8_lossy(&text).into_owned()))
}

/// How many pages have data, from what [`check`] says.
pub fn mapped(said: &str) -> Result<u64> {
    let (_, rest) = said
        .split_once("\"mapped\":")
        .with_context(|| said.to_owned())?;
    let digits: String = rest
        .trim_start()
        .chars()
        .take_while(char::is_ascii_digit)
        .collect();
    Ok(digits.parse()?)
}
