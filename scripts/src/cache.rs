// SPDX-License-Identifier: GPL-2.0-only

//! The cache directory: whatever is slow to make, made once.
//!
//! A cached directory is made under another name and renamed when it is complete, so that it is either there
//! and whole or not there at all, whenever a run is interrupted.

use crate::progress::Progress;
use anyhow::{Context, Result};
use rustix::fs::{flock, FlockOperation};
use sha2::{Digest, Sha256};
use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// `$XDG_CACHE_HOME/pmem` or `~/.cache/pmem`.
pub fn dir() -> PathBuf {
    let absolute = |name: &str| {
        env::var_os(name)
            .map(PathBuf::from)
            .filter(|p| p.is_absolute())
    };
    absolute("XDG_CACHE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
        .unwrap_or_else(env::temp_dir)
        .join("pmem")
}

/// Makes sure that the cache directory exists and that backup programs know what it is.
pub fn create() -> Result<PathBuf> {
    let dir = dir();
    fs::create_dir_all(&dir).with_context(|| {
        format!(
            "cannot create the cache directory {}; set XDG_CACHE_HOME to a place with 10 GB of room",
            dir.display()
        )
    })?;
    let tag = dir.join("CACHEDIR.TAG");
    if !tag.exists() {
        fs::write(&tag, "Signature: 8a477f597d28d172789f06886806bc55\n")
            .with_context(|| format!("cannot write {}", tag.display()))?;
    }
    Ok(dir)
}

/// A short name for the content that `parts` describe.
pub fn key<P: AsRef<[u8]>>(parts: impl IntoIterator<Item = P>) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        let part = part.as_ref();
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    let digest = hash.finalize();
    digest[..6]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect::<Vec<_>>()
        .concat()
}

/// Held while something in the cache is being made; other runs wait.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock called `name`, and says so if it has to wait.
    pub fn take(name: &str, progress: &Progress) -> Result<Lock> {
        let dir = create()?.join("locks");
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let path = dir.join(name);
        let file =
            File::create(&path).with_context(|| format!("cannot open {}", path.display()))?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            progress.line(&format!("waiting for another run that is making {name}"));
            flock(&file, FlockOperation::LockExclusive)
                .with_context(|| format!("cannot lock {}", path.display()))?;
        }
        Ok(Lock { _file: file })
    }
}

/// Makes the directory `path` by calling `make` on a sibling, which becomes `path` when all of it is there.
///
/// The caller holds a [`Lock`]. What an interrupted run left behind is removed first.
pub fn publish(path: &Path, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let partial = partial(path);
    remove(&partial)?;
    fs::create_dir_all(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
    make(&partial)?;
    finish(&partial, path)
}

/// As [`publish`], but what an interrupted run left behind is kept and carried on with.
pub fn publish_resumable(path: &Path, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let partial = partial(path);
    fs::create_dir_all(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
    make(&partial)?;
    finish(&partial, path)
}

fn partial(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".partial");
    path.with_file_name(name)
}

fn finish(partial: &Path, path: &Path) -> Result<()> {
    fs::rename(partial, path)
        .with_context(|| format!("cannot rename {} to {}", partial.display(), path.display()))
}

/// Removes a file or directory if it is there.
pub fn remove(path: &Path) -> Result<()> {
    let result = match fs::symlink_metadata(path) {
        Err(_) => return Ok(()),
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
    };
    result.with_context(|| format!("cannot remove {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_depend_on_where_parts_end() {
        assert_ne!(key(["ab", "c"]), key(["a", "bc"]));
        assert_eq!(key(["ab", "c"]), key(["ab", "c"]));
        assert_eq!(key(["ab"]).len(), 12);
    }

    #[test]
    fn a_failed_make_publishes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("thing");
        assert!(publish(&path, |_| anyhow::bail!("no")).is_err());
        assert!(!path.exists());
        publish(&path, |tmp| Ok(fs::write(tmp.join("file"), "x")?)).unwrap();
        assert_eq!(fs::read_to_string(path.join("file")).unwrap(), "x");
    }
}
