// SPDX-License-Identifier: GPL-2.0-only

//! The few programs that the host itself must have.

use crate::apt::KEYRING;
use crate::progress::Progress;
use crate::{crates, exec, repo};
use anyhow::{bail, Result};
use std::env;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

/// Something that the host must have.
struct Need {
    /// A program in the search path, or a file.
    what: &'static str,
    /// The Debian package that has it.
    package: &'static str,
    /// Whether it matters to ordinary users only.
    unprivileged: bool,
}

const fn need(what: &'static str, package: &'static str) -> Need {
    Need {
        what,
        package,
        unprivileged: false,
    }
}

/// To enter the build root.
const RUNTIME: &[Need] = &[need("bwrap", "bubblewrap")];

/// To make it.
const ALL: &[Need] = &[
    need("bwrap", "bubblewrap"),
    need("mmdebstrap", "mmdebstrap"),
    need("tar", "tar"),
    need(KEYRING, "debian-archive-keyring"),
    Need {
        what: "newuidmap",
        package: "uidmap",
        unprivileged: true,
    },
];

/// Installs what is missing to make the build root.
pub fn ensure(progress: &Progress) -> Result<()> {
    install(&missing(ALL), progress)
}

/// Installs what is missing to enter the build root.
pub fn ensure_runtime(progress: &Progress) -> Result<()> {
    install(&missing(RUNTIME), progress)
}

/// Installs clippy, which neither rustup's minimal profile nor Debian's cargo comes with.
pub fn ensure_clippy(progress: &Progress) -> Result<()> {
    let mut version = crates::cargo("clippy");
    version.arg("--version");
    if exec::stdout(&mut version).is_ok() {
        return Ok(());
    }
    if !find_program("rustup") {
        return install(&["rust-clippy"], progress);
    }
    let step = progress.step("host: rustup component add clippy");
    let mut rustup = Command::new("rustup");
    rustup
        .args(["component", "add", "clippy"])
        .current_dir(repo::dir());
    exec::run(&mut rustup, "rustup", &step)?;
    step.done();
    Ok(())
}

fn missing(needs: &[Need]) -> Vec<&'static str> {
    let user = !is_root();
    needs
        .iter()
        .filter(|need| user || !need.unprivileged)
        .filter(|need| !is_there(need.what))
        .map(|need| need.package)
        .collect()
}

fn is_there(what: &str) -> bool {
    if what.starts_with('/') {
        Path::new(what).exists()
    } else {
        find_program(what)
    }
}

/// Whether there is a program called `name` in the search path.
fn find_program(name: &str) -> bool {
    env::var_os("PATH").is_some_and(|path| {
        env::split_paths(&path).any(|dir| {
            dir.join(name)
                .metadata()
                .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
        })
    })
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn install(packages: &[&str], progress: &Progress) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    let list = packages.join(" ");
    let advice = format!("Install them and try again, on Debian with: apt-get install {list}");
    if !find_program("apt-get") {
        bail!("the host lacks {list}. {advice}");
    }
    let step = progress.step(&format!("host: install {list}"));
    // Fresh images come without package lists. That some list cannot be fetched may not matter.
    let _ = exec::try_run(&mut apt_get(&["update"])?, "host-apt-update", &step)?;
    let mut arguments = vec!["install", "--yes", "--no-install-recommends"];
    arguments.extend(packages);
    let (installed, output) = exec::try_run(&mut apt_get(&arguments)?, "host-apt-install", &step)?;
    if !installed {
        bail!(
            "{}\n{advice}",
            exec::failure("apt-get install", &output.text, &output.log)
        );
    }
    step.done();
    Ok(())
}

/// apt-get with root's rights.
fn apt_get(arguments: &[&str]) -> Result<Command> {
    let mut command = if is_root() {
        Command::new("apt-get")
    } else if find_program("sudo") {
        // Nobody could type a password while a bar is moving.
        let mut sudo = Command::new("sudo");
        sudo.args(["--non-interactive", "apt-get"]);
        sudo
    } else {
        bail!("this needs root: apt-get {}", arguments.join(" "));
    };
    command
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive");
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_looked_for_in_the_path() {
        assert!(find_program("sh"));
        assert!(!find_program("no-such-program-here"));
        assert!(is_there("/"));
    }
}
