// SPDX-License-Identifier: GPL-2.0-only

//! Files of configuration: what modprobe is told of the module, and those that are written.

use crate::system::System;
use anyhow::{Context, Result};
use similar::TextDiff;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Where modprobe looks for its configuration. A file hides one of the same name in a later one.
const MODPROBE: [&str; 5] = [
    "/etc/modprobe.d",
    "/run/modprobe.d",
    "/usr/local/lib/modprobe.d",
    "/usr/lib/modprobe.d",
    "/lib/modprobe.d",
];

/// Where systemd looks for modules to load.
const LOAD: [&str; 4] = [
    "/etc/modules-load.d",
    "/run/modules-load.d",
    "/usr/local/lib/modules-load.d",
    "/usr/lib/modules-load.d",
];

/// The name of the module.
pub(crate) const MODULE: &str = "pmem";

/// An option of the module, and who says so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Setting {
    pub(crate) name: String,
    pub(crate) value: String,
    pub(crate) from: PathBuf,
}

/// What modprobe is told of the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Modprobe {
    /// As they are given to the module: of two of the same name, the last counts.
    pub(crate) options: Vec<Setting>,
    /// Who keeps it from being loaded by its alias, or at all.
    pub(crate) blacklisted: Option<PathBuf>,
}

impl Modprobe {
    /// Reads what modprobe reads.
    pub(crate) fn read(system: &System) -> Self {
        let mut found = Self::default();
        for path in files(system, &MODPROBE, "conf") {
            let text = system.read(&path).unwrap_or_default();
            found.add(&text, &path);
        }
        let line = system.command_line();
        for option in crate::memmap::options(&line) {
            if let Some(given) = option.strip_prefix("pmem.") {
                found.option(given, Path::new("/proc/cmdline"));
            }
        }
        found
    }

    /// Adds what a file says.
    fn add(&mut self, text: &str, path: &Path) {
        // A backslash at the end of a line continues it.
        let text = text.replace("\\\n", " ");
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match (words.next(), words.next()) {
                (Some("options"), Some(MODULE)) => {
                    for given in words {
                        self.option(given, path);
                    }
                }
                (Some("blacklist"), Some(MODULE)) => self.blacklisted = Some(path.to_owned()),
                (Some("install"), Some(MODULE)) => self.blacklisted = Some(path.to_owned()),
                _ => {}
            }
        }
    }

    fn option(&mut self, given: &str, path: &Path) {
        let (name, value) = given.split_once('=').unwrap_or((given, ""));
        self.options.push(Setting {
            name: name.replace('-', "_"),
            value: value.trim_matches('"').to_owned(),
            from: path.to_owned(),
        });
    }

    /// The value of an option that is given.
    pub(crate) fn value(&self, name: &str) -> Option<&str> {
        let last = self.options.iter().rfind(|option| option.name == name)?;
        Some(&last.value)
    }
}

/// Which file has the module loaded at boot.
pub(crate) fn loaded_at_boot(system: &System) -> Option<PathBuf> {
    let modules = Some(PathBuf::from("/etc/modules"));
    files(system, &LOAD, "conf")
        .into_iter()
        .chain(modules)
        .find(|path| {
            let text = system.read(path).unwrap_or_default();
            text.lines()
                .any(|line| line.split_whitespace().next() == Some(MODULE))
        })
}

/// The files of `dirs`, in the order of their names. One of an earlier directory hides those of the same name.
fn files(system: &System, dirs: &[&str], extension: &str) -> Vec<PathBuf> {
    let mut found: Vec<(String, PathBuf)> = Vec::new();
    for dir in dirs {
        for name in system.names(dir) {
            let is_one = Path::new(&name).extension().is_some_and(|e| e == extension);
            if is_one && !found.iter().any(|(known, _)| *known == name) {
                let path = Path::new(dir).join(&name);
                found.push((name, path));
            }
        }
    }
    found.sort();
    found.into_iter().map(|(_, path)| path).collect()
}

/// A file to be written.
#[derive(Debug)]
pub(crate) struct File {
    path: PathBuf,
    content: String,
}

/// A file that would change.
#[derive(Debug)]
pub(crate) struct Change {
    file: File,
    before: String,
    place: PathBuf,
}

impl File {
    pub(crate) fn new(path: impl Into<PathBuf>, content: String) -> Self {
        Self {
            path: path.into(),
            content,
        }
    }

    /// What it would change in `system`.
    pub(crate) fn change(self, system: &System) -> Result<Change> {
        let place = system.path(&self.path);
        let before = match fs::read_to_string(&place) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => {
                return Err(error).with_context(|| format!("{} cannot be read", place.display()))
            }
        };
        Ok(Change {
            file: self,
            before,
            place,
        })
    }
}

impl Change {
    /// Whether there is something to be written.
    pub(crate) fn is_any(&self) -> bool {
        self.before != self.file.content
    }

    /// A unified diff.
    pub(crate) fn diff(&self) -> String {
        let path = self.file.path.display().to_string();
        let old = match self.before.is_empty() {
            true => "/dev/null",
            false => &path,
        };
        TextDiff::from_lines(&self.before, &self.file.content)
            .unified_diff()
            .header(old, &path)
            .to_string()
    }

    /// Writes the file: all of it or nothing.
    pub(crate) fn write(&self) -> Result<()> {
        let write = || -> std::io::Result<()> {
            let dir = self.place.parent().unwrap_or(Path::new("/"));
            fs::create_dir_all(dir)?;
            let mut new = self.place.clone().into_os_string();
            // Neither modprobe nor GRUB nor systemd reads a file of that name.
            new.push(".pmemctl-new");
            let mut file = fs::File::create(&new)?;
            file.write_all(self.file.content.as_bytes())?;
            file.sync_all()?;
            fs::rename(&new, &self.place)
        };
        write().with_context(|| format!("{} cannot be written", self.place.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn system(files: &[(&str, &str)]) -> (tempfile::TempDir, System) {
        let dir = tempfile::tempdir().unwrap();
        let system = System::new(dir.path());
        for (path, text) in files {
            let path = system.path(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        (dir, system)
    }

    #[test]
    fn options_are_read_as_modprobe_reads_them() {
        let (_dir, system) = system(&[
            ("/etc/modprobe.d/b.conf", "options pmem pmem_start=4G \\\n pmem-size=\"1G\"\n# options pmem pmem_count=7\noptions pmemx a=b\n"),
            ("/etc/modprobe.d/c.conf", "options pmem pmem_size=2G\n"),
            ("/usr/lib/modprobe.d/c.conf", "options pmem pmem_size=3G\n"),
            ("/etc/modprobe.d/d.conf.bak", "options pmem pmem_size=4G\n"),
            ("/proc/cmdline", "quiet pmem.pmem_count=2\n"),
        ]);
        let found = Modprobe::read(&system);
        assert_eq!(found.value("pmem_start"), Some("4G"));
        assert_eq!(found.value("pmem_size"), Some("2G"));
        assert_eq!(found.value("pmem_count"), Some("2"));
        assert_eq!(found.value("pmem_first"), None);
        assert_eq!(found.blacklisted, None);
    }

    #[test]
    fn who_blacklists_or_loads_it_is_found() {
        let (_dir, system) = system(&[
            ("/etc/modprobe.d/no.conf", "blacklist pmem\n"),
            ("/etc/modules-load.d/pmem.conf", "# comment\npmem\n"),
        ]);
        assert!(Modprobe::read(&system).blacklisted.is_some());
        assert_eq!(
            loaded_at_boot(&system),
            Some("/etc/modules-load.d/pmem.conf".into())
        );
    }

    #[test]
    fn a_change_is_shown_and_written() {
        let (_dir, system) = system(&[("/etc/a.conf", "one\ntwo\n")]);
        let change = |path: &str, text: &str| {
            let file = File::new(path, text.to_owned());
            file.change(&system).unwrap()
        };
        assert!(!change("/etc/a.conf", "one\ntwo\n").is_any());
        let changed = change("/etc/a.conf", "one\n2\n");
        assert!(changed.diff().contains("-two\n+2\n"), "{}", changed.diff());
        changed.write().unwrap();
        change("/etc/new/b.conf", "three\n").write().unwrap();
        assert_eq!(system.read("/etc/a.conf").unwrap(), "one\n2\n");
        assert_eq!(system.names("/etc/new"), ["b.conf"]);
    }
}
