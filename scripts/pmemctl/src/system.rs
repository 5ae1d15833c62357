// SPDX-License-Identifier: GPL-2.0-only

//! The files by which a system tells of itself: those of `/proc`, `/sys` and `/etc`.

use std::fs;
use std::path::{Path, PathBuf};

/// A system: this one, or a copy of its files in a directory.
#[derive(Clone, Debug)]
pub(crate) struct System {
    root: PathBuf,
}

impl System {
    /// The system whose `/` is `root`.
    pub(crate) fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Where the file is that the system calls `path`.
    pub(crate) fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    pub(crate) fn exists(&self, path: impl AsRef<Path>) -> bool {
        self.path(path).exists()
    }

    /// A text file, if it is there and can be read. What is no UTF-8 in it is replaced.
    pub(crate) fn read(&self, path: impl AsRef<Path>) -> Option<String> {
        let bytes = fs::read(self.path(path)).ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The only line of a file, as sysfs has them.
    pub(crate) fn value(&self, path: impl AsRef<Path>) -> Option<String> {
        Some(self.read(path)?.trim_end().to_owned())
    }

    /// The names in a directory, in order; none if there is no such directory.
    pub(crate) fn names(&self, dir: impl AsRef<Path>) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.path(dir))
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        names.sort();
        names
    }

    /// The release of the kernel that runs, as `uname -r` says.
    pub(crate) fn release(&self) -> Option<String> {
        self.value("/proc/sys/kernel/osrelease")
    }

    /// The kernel's command line.
    pub(crate) fn command_line(&self) -> String {
        self.value("/proc/cmdline").unwrap_or_default()
    }
}
