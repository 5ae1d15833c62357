// SPDX-License-Identifier: GPL-2.0-only

//! What DKMS is told of a kernel that the module cannot be built for: `scripts/dkms/build check`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

const RUSTC: &str = "rustc 1.85.1 (4eb161250 2025-03-15)";

/// A kernel's headers, and the programs of the system that it is installed on.
struct Machine {
    dir: TempDir,
}

impl Machine {
    /// One that has all that is needed, the crate of its kernel included.
    fn new() -> Self {
        let machine = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        let kconfig = fs::read_to_string(repository().join("Kconfig")).unwrap();
        let mut config = format!(
            "CONFIG_RUSTC_VERSION_TEXT=\"{RUSTC}\"\nCONFIG_CC_VERSION_TEXT=\"gcc-14 (Debian) 14.2.0\"\n"
        );
        for line in kconfig
            .lines()
            .filter(|line| line.starts_with("\tdepends on "))
        {
            for word in
                line.split(|c: char| !c.is_ascii_uppercase() && c != '_' && !c.is_ascii_digit())
            {
                if word.len() > 1 {
                    config += &format!("CONFIG_{word}=y\n");
                }
            }
        }
        machine.write("tree/.config", &config);
        machine.write("tree/rust/libkernel.rmeta", "");
        machine.write("tree/scripts/target.json", "");
        machine.program("rustc", &format!("echo '{RUSTC}'"));
        for program in ["gcc-14", "bindgen", "make"] {
            machine.program(program, "");
        }
        machine.program("dpkg-query", "exit 1");
        machine.program("apt-cache", "exit 1");
        machine
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn program(&self, name: &str, script: &str) {
        self.write(&format!("bin/{name}"), &format!("#!/bin/sh\n{script}\n"));
        let path = self.dir.path().join("bin").join(name);
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn without(self, path: &str) -> Self {
        let path = self.dir.path().join(path);
        fs::remove_file(path).unwrap();
        self
    }

    /// Whether it is to be built, or else why not.
    fn check(&self, release: &str, force: &str) -> Result<(), String> {
        self.run("check", release, force)
    }

    fn run(&self, command: &str, release: &str, force: &str) -> Result<(), String> {
        // Nothing of the host's but what each POSIX system has.
        for program in ["sh", "sed", "tr", "grep", "dirname", "cat", "nproc", "rm"] {
            let to = self.dir.path().join("bin").join(program);
            if !to.exists() {
                let path = ["/usr/bin", "/bin"]
                    .map(|dir| Path::new(dir).join(program))
                    .into_iter()
                    .find(|path| path.exists())
                    .unwrap();
                std::os::unix::fs::symlink(path, to).unwrap();
            }
        }
        let output = Command::new(repository().join("scripts/dkms/build"))
            .args([command, release])
            .arg(self.dir.path().join("tree"))
            .env("PATH", self.dir.path().join("bin"))
            .env("PMEM_DKMS_CACHE", self.dir.path().join("cache"))
            .env("PMEM_FORCE", force)
            .output()
            .unwrap();
        match output.status.code() {
            Some(0) => Ok(()),
            Some(1) => Err(String::from_utf8(output.stderr).unwrap()),
            code => panic!("{code:?}: {output:?}"),
        }
    }

    /// It is not to be built, which is said in these words.
    fn refuses(&self, release: &str, words: &[&str]) {
        let said = self.check(release, "").unwrap_err();
        assert_eq!(said.lines().count(), 1, "{said}");
        for word in words.iter().chain(&[release]) {
            assert!(said.contains(word), "no {word:?} in: {said}");
        }
    }
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

#[test]
fn a_kernel_that_has_everything_is_built_for() {
    assert_eq!(Machine::new().check("7.3.4+deb13-amd64", ""), Ok(()));
    assert_eq!(Machine::new().check("7.2.12+deb13-cloud-amd64", ""), Ok(()));
}

#[test]
fn missing_headers_are_left_to_dkms() {
    let machine = Machine::new().without("tree/.config");
    assert_eq!(machine.check("7.3.4+deb13-amd64", ""), Ok(()));
}

#[test]
fn an_unknown_kernel_is_refused_unless_forced() {
    for release in [
        "7.1.9-amd64",
        "7.4.0+deb13-amd64",
        "7.30.1-amd64",
        "8.3.1-amd64",
    ] {
        Machine::new().refuses(release, &["7.3", "PMEM_FORCE=1", "/etc/default/pmem-dkms"]);
        assert_eq!(Machine::new().check(release, "1"), Ok(()));
    }
}

#[test]
fn a_kernel_without_rust_is_refused() {
    let machine = Machine::new();
    let path = machine.dir.path().join("tree/.config");
    let config = fs::read_to_string(&path).unwrap();
    fs::write(
        &path,
        config
            .replace("CONFIG_RUST=y\n", "")
            .replace("CONFIG_FS_DAX=y\n", ""),
    )
    .unwrap();
    machine.refuses("7.3.4-mine", &["lacks CONFIG_RUST CONFIG_FS_DAX"]);
}

#[test]
fn another_rustc_is_named() {
    let machine = Machine::new();
    machine.program("rustc", "echo 'rustc 1.90.0 (x)'");
    machine.refuses(
        "7.3.4-mine",
        &[RUSTC, "rustc 1.90.0 (x)", "apt install", "rustc-1.85"],
    );
    // The one of the right version may be beside it.
    machine.program("rustc-1.85", &format!("echo '{RUSTC}'"));
    assert_eq!(machine.check("7.3.4-mine", ""), Ok(()));
}

#[test]
fn missing_packages_are_named() {
    let machine = Machine::new().without("bin/gcc-14").without("bin/bindgen");
    machine.refuses("7.3.4-mine", &["apt install gcc-14 bindgen;"]);
}

#[test]
fn source_that_is_nowhere_is_named() {
    let machine = Machine::new().without("tree/rust/libkernel.rmeta");
    machine.program("dpkg-query", "echo 'installed 7.3.4-1~bpo13+1'");
    machine.program(
        "apt-cache",
        "echo 'linux-source-7.3 | 7.3.5-1~bpo13+1 | x Packages'",
    );
    machine.refuses(
        "7.3.4+deb13-amd64",
        &["apt install linux-source-7.3=7.3.4-1~bpo13+1", "apt update"],
    );
    // Only the tools to build the crate with are still missing then.
    machine.program(
        "apt-cache",
        "echo 'linux-source-7.3 | 7.3.4-1~bpo13+1 | x Packages'",
    );
    let said = machine.check("7.3.4+deb13-amd64", "").unwrap_err();
    assert!(said.contains("rust-src bc bison flex"), "{said}");
}

#[test]
fn a_name_that_leads_elsewhere_is_refused() {
    for release in ["../7.3.4", "", "7.3.4/x", ".", "7.3 4"] {
        assert!(Machine::new().check(release, "").is_err(), "{release:?}");
    }
}

#[test]
fn what_was_kept_for_a_kernel_that_is_gone_is_removed() {
    let machine = Machine::new();
    machine.write("cache/7.0.0-gone/rust/libkernel.rmeta", "");
    assert_eq!(machine.run("make", "7.3.4-mine", ""), Ok(()));
    assert!(machine.dir.path().join("cache").exists());
    assert!(!machine.dir.path().join("cache/7.0.0-gone").exists());
}
