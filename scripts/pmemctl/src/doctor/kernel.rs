// SPDX-License-Identifier: GPL-2.0-only

//! Whether the kernel can have the module, and whether it is loaded.

use super::Findings;
use crate::config::{loaded_at_boot, Modprobe, MODULE};
use crate::system::System;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What says which kernels the module is for.
const KBUILD: &str = include_str!("../../../../Kbuild");

/// Where the modules of each kernel are.
const MODULES: &str = "/lib/modules";

pub(super) fn examine(system: &System, findings: &mut Findings) {
    let release = system.release().unwrap_or_default();
    let loaded = system.exists(format!("/sys/module/{MODULE}"));
    if loaded {
        findings.ok(format!("the module is loaded (kernel {release})"));
    } else {
        match file_of(system, &release) {
            Some(file) => may_load(system, &file, findings),
            None => no_module(system, &release, findings),
        }
    }
    if let Some(path) = Modprobe::read(system).blacklisted {
        findings.problem(
            format!("{} keeps modprobe from loading the module", path.display()),
            format!("remove the line of {MODULE} there"),
        );
    }
    match loaded_at_boot(system) {
        Some(path) => findings.ok(format!("{} has it loaded at boot", path.display())),
        None => findings.note(format!(
            "nothing has the module loaded at boot; echo {MODULE} >/etc/modules-load.d/{MODULE}.conf does"
        )),
    }
    for line in complaints(system) {
        findings.note(format!("the log says: {line}"));
    }
}

/// The series of kernels that the module is for.
fn kernels() -> Vec<&'static str> {
    let list = KBUILD
        .lines()
        .find_map(|line| line.strip_prefix("pmem-kernels := "));
    list.unwrap_or_default().split_whitespace().collect()
}

/// The module's file for the kernel `release`.
fn file_of(system: &System, release: &str) -> Option<PathBuf> {
    let dir = Path::new(MODULES).join(release);
    let list = system.read(dir.join("modules.dep"))?;
    let of_line = |line: &str| {
        let path = Path::new(line.split_once(':')?.0);
        let name = path.file_name()?.to_str()?;
        (name.split_once(".ko")?.0 == MODULE).then(|| dir.join(path))
    };
    list.lines().find_map(of_line)
}

/// The module is not there for this kernel: says why that may be.
fn no_module(system: &System, release: &str, findings: &mut Findings) {
    let others: Vec<String> = system
        .names(MODULES)
        .into_iter()
        .filter(|other| other != release && file_of(system, other).is_some())
        .collect();
    if !others.is_empty() {
        return findings.problem(
            format!(
                "the module is there for {}, but the kernel that runs is {release}: a module fits the one kernel that \
                 it was built for",
                others.join(", ")
            ),
            format!("apt install linux-headers-{release}; dkms autoinstall -k {release}\nor boot the other kernel"),
        );
    }
    let kernels = kernels();
    let is_known = kernels.iter().any(|known| {
        release
            .strip_prefix(known)
            .is_some_and(|rest| rest.starts_with('.'))
    });
    if !is_known {
        return findings.problem(
            format!("the kernel that runs is {release}, and the module is for Linux {}", kernels.join(" and ")),
            "on Debian 13, from backports: apt install -t trixie-backports linux-image-amd64 linux-headers-amd64; \
             then boot it",
        );
    }
    let config = [
        format!("/boot/config-{release}"),
        format!("{MODULES}/{release}/config"),
        format!("{MODULES}/{release}/build/.config"),
    ];
    let config = config.iter().find_map(|path| system.read(path));
    if config.is_some_and(|text| !text.lines().any(|line| line == "CONFIG_RUST=y")) {
        return findings.problem(
            format!("the kernel {release} was built without Rust (CONFIG_RUST), so that it cannot have the module"),
            "boot one that has it, as Debian's have",
        );
    }
    findings.problem(
        format!("the module is not there for the kernel {release}"),
        format!(
            "apt install pmem-dkms linux-headers-{release}\n\
             if they are: dkms status; dkms install pmem/VERSION -k {release} says what it lacks"
        ),
    );
}

/// The module is there and not loaded: says whether the kernel would take it.
fn may_load(system: &System, file: &Path, findings: &mut Findings) {
    findings.ok(format!("the module is {}", file.display()));
    let enforced = system
        .value("/sys/module/module/parameters/sig_enforce")
        .is_some_and(|value| value == "Y");
    let lockdown = system
        .value("/sys/kernel/security/lockdown")
        .is_some_and(|value| !value.contains("[none]"));
    let signer = signer(system, file);
    let why = match (enforced, lockdown) {
        (true, _) => "module.sig_enforce",
        (false, true) => "lockdown, as under Secure Boot",
        (false, false) => {
            return findings.problem(
                "the module is not loaded",
                "modprobe pmem; if that fails, dmesg | grep pmem: says why",
            )
        }
    };
    match signer {
        Some(signer) => findings.problem(
            format!("the module is not loaded; it is signed by \"{signer}\", and the kernel takes only keys that it knows ({why})"),
            "mokutil --import /var/lib/dkms/mok.pub enrolls the key of DKMS, at the next boot; then modprobe pmem",
        ),
        None => findings.problem(
            format!("the module is not signed, and the kernel takes no such module ({why})"),
            "mokutil --import /var/lib/dkms/mok.pub enrolls the key of DKMS, at the next boot; \
             dkms build --force pmem/VERSION && dkms install --force pmem/VERSION signs it",
        ),
    }
}

/// Who has signed a module.
fn signer(system: &System, file: &Path) -> Option<String> {
    let output = Command::new("modinfo")
        .args(["-F", "signer"])
        .arg(system.path(file))
        .output()
        .ok()?;
    let signer = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    (!signer.is_empty()).then_some(signer)
}

/// What the module, or the kernel of it, complained about since boot, as far as the log can be read.
fn complaints(system: &System) -> Vec<String> {
    /// Lines of a lower level are errors and warnings.
    const NOTICE: u32 = 5;
    /// The last of them.
    const MOST: usize = 3;
    let text = log(system);
    let mut found: Vec<String> = Vec::new();
    for record in text.lines() {
        let Some((head, message)) = record.split_once(';') else {
            continue;
        };
        let level = head
            .split(',')
            .next()
            .and_then(|prefix| prefix.parse::<u32>().ok())
            .map(|prefix| prefix % 8);
        // That modules from elsewhere taint the kernel is no complaint.
        let is_ours = (message.starts_with("pmem: ") && !message.contains("taint"))
            || message.starts_with("Loading of ");
        if is_ours && level.is_some_and(|level| level < NOTICE) {
            found.push(message.to_owned());
        }
    }
    found.dedup();
    found.split_off(found.len().saturating_sub(MOST))
}

/// The kernel's log, in records of `/dev/kmsg`.
fn log(system: &System) -> String {
    const O_NONBLOCK: i32 = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    let open = std::fs::File::options()
        .read(true)
        .custom_flags(O_NONBLOCK)
        .open(system.path("/dev/kmsg"));
    let Ok(mut file) = open else {
        return String::new();
    };
    let mut text = String::new();
    // A read gives one record.
    let mut record = [0; 8192];
    while let Ok(length @ 1..) = file.read(&mut record) {
        text += &String::from_utf8_lossy(record.get(..length).unwrap_or_default());
    }
    text
}
