// SPDX-License-Identifier: GPL-2.0-only

//! A machine's memory, and what of it outlives the machine.

use crate::cache;
use anyhow::{ensure, Context, Result};
use rustix::fs::statvfs;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// 1 MiB.
pub const MIB: u64 = 1 << 20;
/// 1 GiB.
pub const GIB: u64 = 1 << 30;

/// Where a machine's second memory node begins, always.
pub const UPPER: u64 = 4 * GIB;

/// Memory that survives a machine's power failure: a sparse file, gone when this is dropped.
#[derive(Debug)]
pub struct Persistent {
    dir: TempDir,
    size: u64,
}

impl Persistent {
    /// Makes `size` bytes of zeroes.
    ///
    /// The file is in `/dev/shm` if there is room, as nothing then writes it back to a disk meanwhile; otherwise in
    /// the cache.
    pub fn new(size: u64) -> Result<Self> {
        Self::sparse(size, size)
    }

    /// As [`Persistent::new`], if no more than `used` bytes of it will ever be touched.
    pub fn sparse(size: u64, used: u64) -> Result<Self> {
        let shm = Path::new("/dev/shm");
        if room(shm).min(available_memory()) / 2 > used {
            Self::make(scratch(shm, "pmem-memory")?, size)
        } else {
            Self::in_cache(size, used)
        }
    }

    /// As [`Persistent::new`], but in the cache in any case, which is on a disk: to make it durable takes the time that
    /// it takes.
    pub fn on_disk(size: u64) -> Result<Self> {
        Self::in_cache(size, size)
    }

    fn in_cache(size: u64, used: u64) -> Result<Self> {
        let parent = cache::create()?.join("vm");
        fs::create_dir_all(&parent)
            .with_context(|| format!("cannot create {}", parent.display()))?;
        ensure!(
            room(&parent) > used,
            "{} has no room for the {} MiB of a guest's persistent memory; set XDG_CACHE_HOME to a place that has",
            parent.display(),
            used / MIB
        );
        Self::make(scratch(&parent, "pmem-memory")?, size)
    }

    fn make(dir: TempDir, size: u64) -> Result<Self> {
        let memory = Self { dir, size };
        let path = memory.path();
        File::create(&path)
            .and_then(|file| file.set_len(size))
            .with_context(|| format!("cannot make {}", path.display()))?;
        Ok(memory)
    }

    /// The file.
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("memory")
    }

    /// The directory that has the file and nothing else.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }
}

/// Makes a directory in `parent` that is gone when it is dropped, or, if this process is killed first, when another
/// one makes a directory of the same name.
pub(super) fn scratch(parent: &Path, name: &str) -> Result<TempDir> {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let file = entry.file_name();
        let owner = file
            .to_str()
            .and_then(|file| {
                file.strip_prefix(name)?
                    .strip_prefix('.')?
                    .split('.')
                    .next()
            })
            .and_then(|pid| pid.parse::<u32>().ok());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
            // Another process may be removing it as well.
            fs::remove_dir_all(entry.path()).ok();
        }
    }
    tempfile::Builder::new()
        .prefix(&format!("{name}.{}.", std::process::id()))
        .tempdir_in(parent)
        .with_context(|| format!("cannot make a directory in {}", parent.display()))
}

/// What a directory's file system has room for.
fn room(dir: &Path) -> u64 {
    statvfs(dir)
        .map(|at| at.f_bavail.saturating_mul(at.f_frsize))
        .unwrap_or(0)
}

/// What the host can give without swapping.
fn available_memory() -> u64 {
    fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| {
            let line = text
                .lines()
                .find(|line| line.starts_with("MemAvailable:"))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok()
        })
        .map_or(0, |kib| kib << 10)
}

/// What the kernel's command line says of a range of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// `memmap=size$start`: not to be used.
    Reserved,
    /// `memmap=size!start`: persistent memory of the e820 table's type 12.
    Protected,
}

/// The `memmap=` argument.
pub fn memmap(how: Use, start: u64, size: u64) -> String {
    let sign = match how {
        Use::Reserved => '$',
        Use::Protected => '!',
    };
    format!("memmap={size:#x}{sign}{start:#x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_process_left_is_removed() {
        let parent = tempfile::tempdir().unwrap();
        // No process has this number: it is beyond the largest that Linux gives.
        for name in ["vm.4294967295.x", "vmx.4294967295.x", "vm-4294967295"] {
            fs::create_dir(parent.path().join(name)).unwrap();
        }
        let own = format!("vm.{}.own", std::process::id());
        fs::create_dir(parent.path().join(&own)).unwrap();
        let made = scratch(parent.path(), "vm").unwrap();
        assert!(!parent.path().join("vm.4294967295.x").exists());
        assert!(parent.path().join("vmx.4294967295.x").exists());
        assert!(parent.path().join("vm-4294967295").exists());
        assert!(parent.path().join(&own).exists());
        assert!(made.path().exists());
    }

    #[test]
    fn memmap_is_as_the_kernel_reads_it() {
        assert_eq!(
            memmap(Use::Reserved, UPPER, 2 * GIB),
            "memmap=0x80000000$0x100000000"
        );
        assert_eq!(
            memmap(Use::Protected, GIB, MIB),
            "memmap=0x100000!0x40000000"
        );
    }
}
