// SPDX-License-Identifier: GPL-2.0-only

//! The build root: a Debian 13 file system in the cache, in which everything is compiled and booted.
//!
//! mmdebstrap makes it, bubblewrap enters it. Its files belong to the user who made it, so neither building in
//! it nor removing it needs root. A command in it sees
//!
//! | path | what | |
//! |---|---|---|
//! | `/usr`, `/etc` | the build root's | read only |
//! | `/tmp`, `/run`, `/var/tmp` | empty, gone afterwards | writable |
//! | the repository, at its own path | the host's | read only |
//! | cargo's target directory, at its own path | the host's | writable |
//! | the cache, at its own path | the host's | writable |
//! | `/dev/kvm` | the host's, if there is one | |
//!
//! and no network.

use crate::progress::Progress;
use crate::{apt, cache, exec, host, repo};
use anyhow::{ensure, Context, Result};
use serde::{Deserialize, Serialize};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What a root is for.
#[derive(Debug)]
struct Purpose {
    /// What it is called to the user.
    title: &'static str,
    packages: &'static [&'static str],
    /// The packages whose versions decide whether what was compiled before still fits.
    compilers: &'static [&'static str],
}

/// What everything is compiled and booted in.
const BUILD: Purpose = Purpose {
    title: "build root: Debian 13",
    packages: PACKAGES,
    compilers: &[
        "bindgen", "clang", "gcc-14", "lld", "pahole", "rust-src", "rustc",
    ],
};

/// The Rust that Debian has for its browsers, newer than the one that its kernels are compiled with.
const NEWER_RUST: Purpose = Purpose {
    title: "build root: a newer Rust",
    packages: &["cargo-web", "gcc", "libc6-dev", "rustc-web"],
    compilers: &["cargo-web", "rustc-web"],
};

/// What is installed in the build root.
const PACKAGES: &[&str] = &[
    // The kernel's build.
    "bc",
    "bindgen",
    "bison",
    "clang",
    "cpio",
    "flex",
    "gcc-14",
    "kmod",
    "libc6-dev",
    "libdw-dev",
    "libelf-dev",
    "libssl-dev",
    "lld",
    "llvm",
    "make",
    "openssl",
    "pahole",
    "patch",
    "python3",
    "rsync",
    "rust-clippy",
    "rust-src",
    "rustc",
    "rustfmt",
    "xz-utils",
    "zstd",
    // Guests, and what is run in them.
    "busybox-static",
    "daxctl",
    "dmsetup",
    "e2fsprogs",
    "fdisk",
    "fio",
    "gdisk",
    "kexec-tools",
    // mke2fs reads archives with it.
    "libarchive13t64",
    "mdadm",
    "mount",
    "ndctl",
    "numactl",
    "qemu-system-x86",
    "strace",
    "sysstat",
    "util-linux",
    "xfsprogs",
    // Packages.
    "cargo",
    "debhelper",
    "dh-dkms",
    "lintian",
    // What we measure against.
    "libpmem-dev",
    // The documentation.
    "groff-base",
    "mandoc",
    "python3-sphinx",
];

/// A build root that is complete.
#[derive(Debug, Clone)]
pub struct Root {
    tree: PathBuf,
    info: Info,
}

/// What is remembered of a root.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Info {
    /// A key of the compilers' versions.
    compilers: String,
}

impl Root {
    /// The release of Debian that it is made of.
    pub const SUITE: &'static str = "trixie";

    /// Finds the build root in the cache, or makes it: a minute or so, and 2 GB.
    pub fn ensure(progress: &Progress) -> Result<Root> {
        Self::ensure_for(&BUILD, progress)
    }

    /// As [`Root::ensure`], a root that has nothing but Debian's newest Rust: half a minute, and 1 GB.
    pub fn newer_rust(progress: &Progress) -> Result<Root> {
        Self::ensure_for(&NEWER_RUST, progress)
    }

    fn ensure_for(purpose: &Purpose, progress: &Progress) -> Result<Root> {
        cache::create()?;
        let base = purpose.directory();
        if let Some(root) = Self::open(&base) {
            host::ensure_runtime(progress)?;
            return Ok(root);
        }
        let _lock = cache::Lock::take("root", progress)?;
        if let Some(root) = Self::open(&base) {
            return Ok(root);
        }
        host::ensure(progress)?;
        cache::publish(&base, |partial| make(purpose, partial, progress))?;
        Self::open(&base)
            .with_context(|| format!("the build root in {} is not whole", base.display()))
    }

    /// Where the roots are in the cache, those that there are and those that there may be.
    pub fn directories() -> [PathBuf; 2] {
        [&BUILD, &NEWER_RUST].map(Purpose::directory)
    }

    /// The build root, if it is in the cache.
    pub fn find() -> Option<Root> {
        Self::open(&BUILD.directory())
    }

    fn open(base: &Path) -> Option<Root> {
        let info = fs::read(base.join("info.json")).ok()?;
        Some(Root {
            tree: base.join("tree"),
            info: serde_json::from_slice(&info).ok()?,
        })
    }

    /// The directory that is `/` inside.
    pub fn path(&self) -> &Path {
        &self.tree
    }

    /// The directories of `/usr` to show. Not /usr itself: a repository or a cache may be in /usr/src or
    /// /usr/local, and the place for it could not be made.
    fn usr(&self) -> Vec<PathBuf> {
        let entries = |dir: &str| -> Vec<PathBuf> {
            let found = fs::read_dir(self.tree.join(dir))
                .into_iter()
                .flatten()
                .flatten();
            found
                .map(|entry| Path::new(dir).join(entry.file_name()))
                .collect()
        };
        let parents = [Path::new("usr/src"), Path::new("usr/local")];
        let direct = entries("usr")
            .into_iter()
            .filter(|dir| !parents.contains(&dir.as_path()));
        let mut all: Vec<PathBuf> = direct.chain(entries("usr/src")).collect();
        all.sort();
        all
    }

    /// A short name for this set of compilers. What one set built, another may not be able to use.
    pub fn compilers(&self) -> &str {
        &self.info.compilers
    }

    /// `program`, to be run inside. Add arguments, the environment and so on as usual, but not a working
    /// directory: it starts in the one of [`Enter::chdir`], or in the repository.
    ///
    /// The program is killed when the thread that started it ends.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        self.enter().command(program)
    }

    /// As [`Root::command`], with more of the host to be seen inside.
    pub fn enter(&self) -> Enter<'_> {
        Enter {
            root: self,
            binds: Vec::new(),
            chdir: repo::dir().to_path_buf(),
            apt: false,
        }
    }
}

impl Purpose {
    /// Where its root is in the cache.
    fn directory(&self) -> PathBuf {
        let key = cache::key(std::iter::once(&Root::SUITE).chain(self.packages));
        cache::dir().join("root").join(key)
    }
}

/// How to enter a [`Root`].
#[derive(Debug, Clone)]
pub struct Enter<'a> {
    root: &'a Root,
    binds: Vec<(&'static str, PathBuf, PathBuf)>,
    chdir: PathBuf,
    apt: bool,
}

impl Enter<'_> {
    /// Shows `host` as `inside`, writable. A later bind covers an earlier one.
    pub fn bind(mut self, host: impl Into<PathBuf>, inside: impl Into<PathBuf>) -> Self {
        self.binds.push(("--bind", host.into(), inside.into()));
        self
    }

    /// Shows `host` as `inside`, read only.
    pub fn ro_bind(mut self, host: impl Into<PathBuf>, inside: impl Into<PathBuf>) -> Self {
        self.binds.push(("--ro-bind", host.into(), inside.into()));
        self
    }

    /// Shows the device node `host` at its own path.
    pub fn device(mut self, host: impl Into<PathBuf>) -> Self {
        let host = host.into();
        self.binds.push(("--dev-bind", host.clone(), host));
        self
    }

    /// The working directory, as seen from inside.
    pub fn chdir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.chdir = dir.into();
        self
    }

    /// Lets apt work: as root, with the network, on package lists that it can write.
    pub(crate) fn for_apt(mut self) -> Self {
        self.apt = true;
        self
    }

    /// `program`, to be run inside.
    pub fn command(self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("bwrap");
        command.args(self.arguments());
        command.arg("--").arg(program);
        command.env_clear();
        command.env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        );
        command
            .env("HOME", "/tmp")
            .env("LANG", "C.UTF-8")
            .env("TZ", "UTC");
        if let Some(term) = std::env::var_os("TERM") {
            command.env("TERM", term);
        }
        if self.apt {
            command.envs(apt::proxy_environment());
        }
        command
    }

    fn arguments(&self) -> Vec<OsString> {
        let mut args = Args(Vec::new());
        args.flags(&[
            "--die-with-parent",
            "--unshare-pid",
            "--unshare-ipc",
            "--unshare-uts",
        ]);
        if !self.apt {
            args.flags(&["--unshare-net"]);
        }
        if !rustix::process::geteuid().is_root() {
            args.flags(&["--unshare-user"]);
            if self.apt {
                args.flags(&["--uid", "0", "--gid", "0"]);
            }
        }
        args.flags(&["--tmpfs", "/", "--perms", "1777", "--tmpfs", "/tmp"]);
        args.flags(&["--perms", "1777", "--tmpfs", "/var/tmp", "--tmpfs", "/run"]);
        args.flags(&["--dev", "/dev", "--proc", "/proc"]);
        args.flags(&["--dev-bind-try", "/dev/kvm", "/dev/kvm"]);
        for dir in self.root.usr() {
            args.bind(
                "--ro-bind",
                &self.root.tree.join(&dir),
                &Path::new("/").join(&dir),
            );
        }
        for (target, link) in [
            ("bin", "/bin"),
            ("sbin", "/sbin"),
            ("lib", "/lib"),
            ("lib64", "/lib64"),
        ] {
            args.flags(&["--symlink", &format!("usr/{target}"), link]);
        }
        // apt's mount points below may have to be made first.
        let etc = if self.apt { "--bind" } else { "--ro-bind" };
        args.bind(etc, &self.root.tree.join("etc"), Path::new("/etc"));
        if self.apt {
            for dir in ["var/lib/apt", "var/lib/dpkg", "var/cache/apt"] {
                args.bind(
                    "--bind",
                    &self.root.tree.join(dir),
                    &Path::new("/").join(dir),
                );
            }
            for file in [
                "/etc/resolv.conf",
                "/etc/hosts",
                "/etc/ssl/certs/ca-certificates.crt",
            ] {
                if Path::new(file).exists() {
                    args.bind("--ro-bind", Path::new(file), Path::new(file));
                }
            }
        }
        args.bind("--ro-bind", repo::dir(), repo::dir());
        for dir in [repo::target(), cache::dir()] {
            args.bind("--bind-try", &dir, &dir);
        }
        for (how, host, inside) in &self.binds {
            args.bind(how, host, inside);
        }
        args.flags(&["--chdir"]);
        args.0.push(self.chdir.clone().into());
        args.0
    }
}

/// bwrap's arguments.
struct Args(Vec<OsString>);

impl Args {
    fn flags(&mut self, flags: &[&str]) {
        self.0.extend(flags.iter().map(OsString::from));
    }

    fn bind(&mut self, how: &str, host: &Path, inside: &Path) {
        self.0.extend([how.into(), host.into(), inside.into()]);
    }
}

/// Makes a root in `base`.
fn make(purpose: &Purpose, base: &Path, progress: &Progress) -> Result<()> {
    let tree = base.join("tree");
    fs::create_dir(&tree)?;
    let sources = base.join("sources.list");
    let mirrors = apt::Mirrors::find()?;
    fs::write(&sources, mirrors.sources(Root::SUITE))?;

    let step = progress.step(purpose.title);
    let log = exec::log_path("mmdebstrap")?;
    let packages: Vec<String> = purpose
        .packages
        .iter()
        .map(|&name| name.to_owned())
        .collect();
    let mut debootstrap = apt::mmdebstrap(&packages)?
        // It is a root to compile in: without its manuals and translations it is half a gigabyte smaller.
        .args(
            [
                "/usr/share/man/*",
                "/usr/share/locale/*",
                "/usr/share/info/*",
            ]
            .map(exclude),
        )
        .args([Root::SUITE, "-"])
        .arg(&sources)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(File::create(&log)?)
        .spawn()
        .context("cannot run mmdebstrap")?;
    let archive = debootstrap
        .stdout
        .take()
        .context("mmdebstrap has no standard output")?;
    // Through tar, the files belong to us and not to a user of mmdebstrap's namespace.
    let unpacked = Command::new("tar")
        .args([
            "--extract",
            "--no-same-owner",
            "--exclude=./dev/*",
            "--directory",
        ])
        .arg(&tree)
        .stdin(archive)
        .stdout(Stdio::null())
        .stderr(File::options().append(true).open(&log)?)
        .status()
        .context("cannot run tar")?;
    let made = debootstrap.wait()?;
    if !made.success() || !unpacked.success() {
        let text = fs::read_to_string(&log).unwrap_or_default();
        anyhow::bail!(
            "{}\nThe mirror is {}. If that is not a Debian archive that can be reached from here, set \
             PMEM_MIRROR to one that is.",
            exec::failure("mmdebstrap", &text, &log),
            mirrors.archive,
        );
    }

    // Debian's own names for the compilers, which the kernel's recorded build wants.
    let info = Info {
        compilers: compilers(purpose, &tree)?,
    };
    fs::write(base.join("info.json"), serde_json::to_vec_pretty(&info)?)?;
    step.done();
    Ok(())
}

fn exclude(glob: &str) -> String {
    format!("--dpkgopt=path-exclude={glob}")
}

/// A key of the versions of the compilers that are installed in `tree`.
fn compilers(purpose: &Purpose, tree: &Path) -> Result<String> {
    let path = tree.join("var/lib/dpkg/status");
    let status =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let versions: Vec<String> = purpose
        .compilers
        .iter()
        .filter_map(|package| {
            Some(format!(
                "{package} {}",
                installed_version(&status, package)?
            ))
        })
        .collect();
    ensure!(
        versions.len() == purpose.compilers.len(),
        "compilers are missing from the build root"
    );
    Ok(cache::key(versions))
}

/// The version of `package` in dpkg's `status` file.
fn installed_version<'a>(status: &'a str, package: &str) -> Option<&'a str> {
    status
        .split("\n\n")
        .find(|paragraph| {
            paragraph
                .lines()
                .any(|line| line.strip_prefix("Package: ") == Some(package))
        })?
        .lines()
        .find_map(|line| line.strip_prefix("Version: "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_dpkg_status() {
        let status =
            "Package: gcc-14-base\nVersion: 1\n\nPackage: gcc-14\nStatus: ok\nVersion: 14.2.0-19\n";
        assert_eq!(installed_version(status, "gcc-14"), Some("14.2.0-19"));
        assert_eq!(installed_version(status, "clang"), None);
    }
}
