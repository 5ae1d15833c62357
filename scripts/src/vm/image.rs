// SPDX-License-Identifier: GPL-2.0-only

//! What is in a guest: an initramfs of two archives.
//!
//! The first has the programs of the build root that tests use, and the libraries they need: it is the same for
//! every kernel, and cached. The second has the agent, the kernel's modules and what else one machine asks for.

use super::cpio::Archive;
use crate::crates;
use crate::kernel::Kernel;
use crate::progress::Progress;
use crate::root::Root;
use crate::{cache, exec};
use anyhow::{bail, ensure, Context, Result};
use pmem_guest::EARLY_MODULES;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Mutex, PoisonError};

/// The build root's programs that guests have, beside busybox.
const PROGRAMS: &[&str] = &[
    // busybox's own shell would prefer busybox's own programs to these.
    "/usr/bin/bash",
    "/usr/bin/chrt",
    "/usr/bin/dash",
    "/usr/bin/daxctl",
    "/usr/bin/fio",
    "/usr/bin/findmnt",
    "/usr/bin/iostat",
    "/usr/bin/lsblk",
    "/usr/bin/mount",
    "/usr/bin/ndctl",
    "/usr/bin/numactl",
    "/usr/bin/numastat",
    "/usr/bin/umount",
    "/usr/sbin/blkdiscard",
    "/usr/sbin/blkid",
    "/usr/sbin/dmsetup",
    "/usr/sbin/e2fsck",
    "/usr/sbin/kexec",
    "/usr/sbin/mdadm",
    "/usr/sbin/mkfs.ext4",
    "/usr/sbin/mkfs.xfs",
    "/usr/sbin/mkswap",
    "/usr/sbin/sfdisk",
    "/usr/sbin/swapoff",
    "/usr/sbin/swapon",
    "/usr/sbin/wipefs",
    "/usr/sbin/xfs_io",
    "/usr/sbin/xfs_repair",
];

/// Files that those programs read.
const FILES: &[&str] = &["/etc/mke2fs.conf"];

/// Where busybox's own versions of programs are: after the real ones in the agent's `PATH`.
const APPLETS: &str = "usr/lib/busybox";

/// Where a machine's kernel modules are.
const MODULES: &str = "/modules";

/// The parts that all guests of one build root share.
#[derive(Debug, Clone)]
pub struct Image {
    base: PathBuf,
    agent: PathBuf,
}

impl Image {
    /// Finds them in the cache, or makes them.
    pub fn ensure(root: &Root, progress: &Progress) -> Result<Self> {
        Ok(Self {
            base: base(root, progress)?,
            agent: agent(progress)?,
        })
    }

    /// Writes the initramfs of one machine to `to`. The agent loads the modules `early` by itself, `modules` are
    /// there for later. `files` are host files and where they go.
    pub fn write(
        &self,
        to: &Path,
        early: &[Module],
        modules: &[Module],
        files: &[(PathBuf, String)],
    ) -> Result<()> {
        fs::copy(&self.base, to)
            .with_context(|| format!("cannot copy {} to {}", self.base.display(), to.display()))?;
        let file = File::options()
            .append(true)
            .open(to)
            .with_context(|| format!("cannot open {}", to.display()))?;
        let mut archive = Archive::new(BufWriter::new(file));
        let agent = read(&self.agent)?;
        archive.file("init", &agent)?;
        archive.link("usr/bin/pmem-guest", "/init")?;
        let paths: Vec<String> = early.iter().map(Module::path).collect();
        archive.file(EARLY_MODULES, paths.join("\n").as_bytes())?;
        for module in early.iter().chain(modules) {
            archive.file(&module.path(), &module.content)?;
        }
        for (from, path) in files {
            archive.file(path, &read(from)?)?;
        }
        archive.finish()?.flush()?;
        Ok(())
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// The agent, built once a run, statically linked: guests and hosts have different C libraries.
pub(super) fn agent(progress: &Progress) -> Result<PathBuf> {
    static BUILT: Mutex<Option<PathBuf>> = Mutex::new(None);
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    match &*built {
        Some(path) => Ok(path.clone()),
        None => {
            let flags = "-C target-feature=+crt-static -C strip=symbols";
            let results = crates::build("pmem-guest", "guest", flags, "guest agent", progress)?;
            Ok(built.insert(results.join("pmem-guest")).clone())
        }
    }
}

/// The archive of programs and libraries.
fn base(root: &Root, progress: &Progress) -> Result<PathBuf> {
    let mut parts = vec![include_str!("image.rs").to_owned()];
    for program in PROGRAMS.iter().chain(&["/usr/bin/busybox"]).chain(FILES) {
        let path = root.path().join(&program[1..]);
        let meta = fs::metadata(&path).with_context(|| {
            format!("the build root has no {program}; remove it with `cargo xtask clean --all`")
        })?;
        parts.push(format!(
            "{} {} {}",
            path.display(),
            meta.size(),
            meta.mtime()
        ));
    }
    let path = cache::create()?
        .join("guest")
        .join(format!("{}.cpio", cache::key(&parts)));
    if path.exists() {
        return Ok(path);
    }
    let _lock = cache::Lock::take("guest", progress)?;
    if path.exists() {
        return Ok(path);
    }
    let step = progress.step("guest programs");
    let dir = path.parent().context("no cache directory")?;
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let mut partial = tempfile::NamedTempFile::new_in(dir)?;
    write_base(root, &mut partial).context("cannot make the guest's initramfs")?;
    partial
        .persist(&path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    step.done();
    Ok(path)
}

fn write_base(root: &Root, to: impl Write) -> Result<()> {
    let mut archive = Archive::new(BufWriter::new(to));
    for dir in [
        "dev", "etc", "mnt", "proc", "root", "run", "sys", "tmp", "usr", "var",
    ] {
        archive.directory(dir)?;
    }
    for dir in ["bin", "lib", "lib64", "sbin"] {
        archive.directory(&format!("usr/{dir}"))?;
        archive.link(dir, &format!("usr/{dir}"))?;
    }
    let mut files: BTreeSet<String> = FILES.iter().map(|&path| path.to_owned()).collect();
    files.extend(PROGRAMS.iter().map(|&path| path.to_owned()));
    files.insert("/usr/bin/busybox".into());
    files.extend(libraries(root)?);
    for path in &files {
        archive.file(path, &read(&root.path().join(&path[1..]))?)?;
    }
    archive.link("usr/bin/sh", "dash")?;
    archive.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")?;
    archive.link("etc/mtab", "/proc/self/mounts")?;
    for applet in exec::stdout(root.command("busybox").arg("--list"))?.lines() {
        archive.link(&format!("{APPLETS}/{applet}"), "/usr/bin/busybox")?;
    }
    archive.finish()?.flush()?;
    Ok(())
}

/// The libraries of all [`PROGRAMS`], as the build root's own loader finds them.
fn libraries(root: &Root) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    let listing = exec::stdout(root.command("ldd").args(PROGRAMS))?;
    for line in listing
        .lines()
        .filter(|line| line.starts_with(char::is_whitespace))
    {
        ensure!(
            !line.contains("not found"),
            "a library is missing from the build root: {}",
            line.trim()
        );
        // "libm.so.6 => /lib/libm.so.6 (0x..)", "/lib64/ld-linux-x86-64.so.2 (0x..)", "linux-vdso.so.1 (0x..)"
        let path = line.split_once("=> ").map_or(line, |(_, path)| path).trim();
        let path = path.split(' ').next().unwrap_or_default();
        if path.starts_with("/usr/") {
            found.insert(path.to_owned());
        } else if path.starts_with('/') {
            // /lib and /lib64 are links to directories of /usr.
            found.insert(format!("/usr{path}"));
        }
    }
    ensure!(!found.is_empty(), "ldd found no libraries");
    Ok(found)
}

/// A kernel module, to be put into a guest.
#[derive(Debug, Clone)]
pub struct Module {
    /// Its name, with `_` and not `-`.
    pub name: String,
    content: Vec<u8>,
}

impl Module {
    /// Where it is in the guest.
    pub fn path(&self) -> String {
        format!("{MODULES}/{}.ko", self.name)
    }

    /// The modules called `names` and all that they depend on, in the order in which to load them. What is built
    /// into the kernel is left out.
    pub fn resolve(kernel: &Kernel, root: &Root, names: &[String]) -> Result<Vec<Self>> {
        let mut modules: Vec<Self> = Vec::new();
        if names.is_empty() {
            return Ok(modules);
        }
        // A kernel without modules was built with all that we may ask for.
        let Some(dir) = &kernel.modules else {
            return Ok(modules);
        };
        let dep = read_text(&dir.join("modules.dep"))?;
        let builtin = fs::read_to_string(dir.join("modules.builtin")).unwrap_or_default();
        for wanted in names {
            let Some(paths) = load_order(&dep, wanted) else {
                if builtin.lines().any(|path| name(path) == *wanted) {
                    continue;
                }
                bail!("the kernel {} has no module {wanted}", kernel.release);
            };
            for path in paths {
                let name = name(path);
                if !modules.iter().any(|module| module.name == name) {
                    let content = unpack(root, &dir.join(path))?;
                    modules.push(Self { name, content });
                }
            }
        }
        Ok(modules)
    }
}

fn read_text(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// The paths of module `wanted` and what it depends on, in loading order, from the text of `modules.dep`.
fn load_order<'a>(dep: &'a str, wanted: &str) -> Option<Vec<&'a str>> {
    dep.lines().find_map(|line| {
        let (path, needs) = line.split_once(':')?;
        (name(path) == wanted).then(|| {
            // Listed from the nearest to the farthest.
            let needs = needs.split_whitespace().rev();
            needs.chain([path]).collect()
        })
    })
}

fn name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

/// The content of a module's file, which Debian compresses.
fn unpack(root: &Root, path: &Path) -> Result<Vec<u8>> {
    let tool = match path.extension().and_then(|extension| extension.to_str()) {
        Some("ko") => return read(path),
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => bail!(
            "{} is compressed in a way that is not known here",
            path.display()
        ),
    };
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let output = root
        .command(tool)
        .arg("-dc")
        .stdin(file)
        .stderr(Stdio::piped())
        .output()
        .context("cannot run bwrap")?;
    ensure!(
        output.status.success(),
        "cannot unpack {}: {}",
        path.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_loaded_first() {
        let dep = "kernel/fs/xfs/xfs.ko.xz: kernel/lib/libcrc32c.ko.xz\n\
                   kernel/fs/ext4/ext4.ko: kernel/fs/jbd2/jbd2.ko kernel/fs/mbcache.ko kernel/lib/crc-16.ko\n\
                   kernel/lib/crc-16.ko:\n";
        assert_eq!(
            load_order(dep, "ext4").unwrap(),
            [
                "kernel/lib/crc-16.ko",
                "kernel/fs/mbcache.ko",
                "kernel/fs/jbd2/jbd2.ko",
                "kernel/fs/ext4/ext4.ko"
            ]
        );
        assert_eq!(load_order(dep, "crc_16").unwrap(), ["kernel/lib/crc-16.ko"]);
        assert_eq!(load_order(dep, "fs"), None);
        assert_eq!(name("kernel/drivers/nd-pmem.ko.xz"), "nd_pmem");
    }
}
