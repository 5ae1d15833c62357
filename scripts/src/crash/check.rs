// SPDX-License-Identifier: GPL-2.0-only

//! Looks at images of file systems: on the host, where its tools can, and in a guest that mounts them.

use super::recording::{load, mount, write_sparse, PATIENCE};
use super::tree::Tree;
use super::workload::{Kind, Subject, Workload, MOUNTED};
use crate::progress::Progress;
use crate::vm::{Persistent, Setup, Vm};
use anyhow::{Context, Result};
use pmem_guest::script::Entry;
use pmem_guest::Bytes;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Output, Stdio};
use tempfile::TempDir;
use walkdir::WalkDir;

/// Whether there are tools that recover such a file system and look inside without a kernel.
pub(super) fn looks_inside(kind: Kind) -> bool {
    kind == Kind::Ext4
}

/// Looks at images.
pub struct Checker<'a> {
    setup: &'a Setup,
    progress: &'a Progress,
    workload: &'static Workload,
    dir: TempDir,
    /// A guest, and the memory that it has: from when one is needed on.
    guest: Option<(Vm, Persistent)>,
    mounted: usize,
}

impl<'a> Checker<'a> {
    /// Of such a workload's images.
    pub fn new(
        setup: &'a Setup,
        workload: &'static Workload,
        progress: &'a Progress,
    ) -> Result<Self> {
        Ok(Self {
            setup,
            progress,
            workload,
            dir: tempfile::tempdir().context("no directory for images")?,
            guest: None,
            mounted: 0,
        })
    }

    /// How many images were mounted.
    pub fn mounted(&self) -> usize {
        self.mounted
    }

    /// Whether `image` has the files of `tree`, and is in order. With `mounts`, a guest looks, too.
    pub fn check(&mut self, image: &[u8], mounts: bool, tree: &Tree) -> Result<Result<(), String>> {
        let Subject::Files { kind, dax } = self.workload.subject else {
            return Ok(Ok(()));
        };
        if looks_inside(kind) {
            let found = self.inside(image)?;
            if let Err(why) = found.and_then(|entries| tree.check(&entries)) {
                return Ok(Err(why));
            }
        }
        if !mounts {
            return Ok(Ok(()));
        }
        let found = self.mount(image, kind, dax)?;
        Ok(found.and_then(|entries| tree.check(&entries)))
    }

    fn run(&self, program: &str, arguments: &[&str], dir: &Path) -> Result<Output> {
        let mut command = self
            .setup
            .root
            .enter()
            .bind(dir, dir)
            .chdir(dir)
            .command(program);
        command.args(arguments).stdin(Stdio::null());
        command
            .output()
            .with_context(|| format!("cannot run {program}"))
    }

    /// Recovers an ext4 by its journal, checks it, and reads its files.
    fn inside(&self, image: &[u8]) -> Result<Result<Vec<Entry>, String>> {
        let (path, files) = (self.dir.path().join("image"), self.dir.path().join("files"));
        write_sparse(&path, image)?;
        crate::cache::remove(&files)?;
        fs::create_dir(&files)?;
        let script = "e2fsck -E journal_only -p image >log 2>&1 || [ $? = 1 ] || { cat log; exit 1; }
            e2fsck -fn image >log 2>&1 || {
                # A file that is being removed or cut is on a list: who mounts it goes on with that.
                dumpe2fs -h image 2>/dev/null | grep -qE 'orphan_present|First orphan inode' || { cat log; exit 1; }
                e2fsck -fp image >log 2>&1 || [ $? = 1 ] || { cat log; exit 1; }
                e2fsck -fn image >log 2>&1 || { cat log; exit 1; }
            }
            debugfs -R 'rdump / files' image >log 2>&1 || { cat log; exit 1; }";
        let output = self.run("sh", &["-c", script], self.dir.path())?;
        if !output.status.success() {
            return Ok(Err(format!(
                "e2fsck: {}",
                String::from_utf8_lossy(&output.stdout)
                    .trim()
                    .replace('\n', " | ")
            )));
        }
        list(&files).map(Ok)
    }

    /// Has a guest mount the image and read its files; the file system must be in order then.
    fn mount(&mut self, image: &[u8], kind: Kind, dax: bool) -> Result<Result<Vec<Entry>, String>> {
        if self.guest.is_none() {
            let memory = Persistent::new(self.workload.size)?;
            let vm = self
                .setup
                .vm(self.progress)
                .name(format!("crash-check-{}", self.workload.name))
                .persistent(&memory)
                .boot_timeout(PATIENCE)
                .module("ext4")
                .module("xfs")
                .start()?;
            self.guest = Some((vm, memory));
        }
        let Some((vm, memory)) = &self.guest else {
            return Ok(Err("no guest".into()));
        };
        self.mounted += 1;
        put(&memory.path(), image)?;
        load(vm, self.workload)?;
        let mounted = vm.try_sh(&mount(kind, dax))?;
        if mounted.end != crate::vm::End::Exit(0) {
            let log = vm.sh("dmesg | tail -n 8")?;
            vm.rmmod("pmem")?.context("the driver does not unload")?;
            return Ok(Err(format!(
                "it cannot be mounted: {} | {}",
                mounted.stderr.trim(),
                log.trim().replace('\n', " | ")
            )));
        }
        let entries = vm.sh(&format!("pmem-guest tree {MOUNTED} && umount {MOUNTED}"))?;
        vm.rmmod("pmem")?.context("the driver does not unload")?;
        vm.check_clean()?;
        let (program, arguments) = match kind {
            Kind::Ext4 => ("e2fsck", ["-f", "-n", "memory"]),
            Kind::Xfs => ("xfs_repair", ["-n", "-f", "memory"]),
        };
        let output = self.run(program, &arguments, memory.dir())?;
        if !output.status.success() {
            let text = [output.stdout, output.stderr].concat();
            return Ok(Err(format!(
                "{program}, after it was mounted: {}",
                String::from_utf8_lossy(&text).trim().replace('\n', " | ")
            )));
        }
        Ok(Ok(serde_json::from_str(&entries)?))
    }
}

/// Makes the file have these bytes, and writes no others.
fn put(path: &Path, bytes: &[u8]) -> Result<()> {
    const PIECE: usize = 1 << 16;
    let write = || -> std::io::Result<()> {
        let file = File::options().read(true).write(true).open(path)?;
        let mut there = vec![0; PIECE];
        for (n, piece) in bytes.chunks(PIECE).enumerate() {
            let at = (n * PIECE) as u64;
            let there = &mut there[..piece.len()];
            file.read_exact_at(there, at)?;
            if there != piece {
                file.write_all_at(piece, at)?;
            }
        }
        Ok(())
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// The files in a directory of the host's.
fn list(dir: &Path) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    for entry in WalkDir::new(dir).min_depth(1) {
        let entry = entry?;
        entries.push(Entry {
            path: entry.path().strip_prefix(dir)?.display().to_string(),
            file: match entry.file_type().is_dir() {
                true => None,
                false => Some(Bytes(fs::read(entry.path())?)),
            },
        });
    }
    Ok(entries)
}
