// SPDX-License-Identifier: GPL-2.0-only

//! Debian 13 as an administrator has it: systemd, two of Debian's signed kernels, the headers of one of them, and our
//! packages, installed by apt; on a disk that boots in a VM.
//!
//! DKMS builds the module while the packages are installed, from what the headers lack and apt fetches. Everything runs
//! natively; emulated it would take an hour.

use super::{image, memory};
use crate::apt::Mirrors;
use crate::deb::Packages;
use crate::progress::Progress;
use crate::root::Root;
use crate::{apt, cache, exec};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// What is installed, beside the kernels.
const PACKAGES: &[&str] = &[
    "attr",
    "ca-certificates",
    "dbus",
    "dkms",
    "e2fsprogs",
    "fio",
    "grub-pc",
    "initramfs-tools",
    "kmod",
    "mokutil",
    "procps",
    "systemd-sysv",
    "udev",
    "zstd",
];

/// Of the disk.
const SIZE: &str = "8G";

/// Where the file system is on the disk: behind the boot loader.
const OFFSET: u64 = 1 << 20;

/// Its label.
const LABEL: &str = "system";

/// The service that does what the host asks for. It starts early, so that a boot that does not end well can be looked at.
const SERVICE: &str = "\
[Unit]
DefaultDependencies=no
After=systemd-udev-trigger.service
Conflicts=shutdown.target
[Service]
ExecStart=/usr/bin/pmem-guest serve
Restart=always
StandardOutput=journal+console
[Install]
WantedBy=sysinit.target
";

/// A system, as it is after the installation. Nobody writes to it.
#[derive(Debug, Clone)]
pub struct System {
    dir: PathBuf,
}

impl System {
    /// Finds the system in the cache, or installs it: some minutes, and 4 GB. `with_headers` is the release of the
    /// kernel that the module is built for, `without` another one's.
    pub fn ensure(
        packages: &Packages,
        with_headers: &str,
        without: &str,
        root: &Root,
        progress: &Progress,
    ) -> Result<Self> {
        let agent = image::agent(progress)?;
        let kernels = [
            // What the kernels need of backports.
            format!("linux-base/{}-backports", Root::SUITE),
            format!("linux-image-{with_headers}"),
            format!("linux-headers-{with_headers}"),
            format!("linux-image-{without}"),
        ];
        let mut parts = vec![include_bytes!("system.rs").to_vec()];
        for file in [&packages.dkms, &packages.pmemctl, &agent] {
            parts.push(fs::read(file).with_context(|| format!("cannot read {}", file.display()))?);
        }
        parts.extend(kernels.iter().map(|name| name.clone().into_bytes()));
        let dir = cache::create()?.join("system").join(cache::key(&parts));
        if !dir.exists() {
            let _lock = cache::Lock::take("system", progress)?;
            if !dir.exists() {
                cache::publish(&dir, |partial| {
                    install(packages, &agent, &kernels, partial, root, progress)
                })?;
            }
        }
        Ok(Self { dir })
    }

    /// A disk to boot from and to write to, as the system is after the installation.
    pub fn disk(&self) -> Result<Disk> {
        let parent = cache::create()?.join("vm");
        fs::create_dir_all(&parent)
            .with_context(|| format!("cannot create {}", parent.display()))?;
        let dir = memory::scratch(&parent, "system")?;
        let mut copy = Command::new("cp");
        copy.args(["--sparse=always", "--reflink=auto"])
            .arg(self.dir.join("disk"))
            .arg(dir.path().join("disk"));
        exec::stdout(&mut copy)?;
        Ok(Disk {
            path: dir.path().join("disk"),
            _dir: dir,
        })
    }

    /// The kernel of this release, to be started without the disk's boot loader.
    pub fn kernel(&self, release: &str) -> PathBuf {
        self.dir.join("boot").join(format!("vmlinuz-{release}"))
    }

    /// Its initramfs.
    pub fn initrd(&self, release: &str) -> PathBuf {
        self.dir.join("boot").join(format!("initrd.img-{release}"))
    }

    /// What the command line has to have when the boot loader does not write it.
    pub const COMMAND_LINE: &'static str = "root=LABEL=system rw console=ttyS0";

    /// What DKMS said while it built the module.
    pub fn log(&self) -> Result<String> {
        let path = self.dir.join("install.log");
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    }
}

/// A copy of a system's disk. It is gone when this is dropped.
#[derive(Debug)]
pub struct Disk {
    path: PathBuf,
    _dir: TempDir,
}

impl Disk {
    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Installs the system into `to`.
fn install(
    packages: &Packages,
    agent: &Path,
    kernels: &[String],
    to: &Path,
    root: &Root,
    progress: &Progress,
) -> Result<()> {
    let put = |name: &str, text: &str| {
        let path = to.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        Ok::<PathBuf, anyhow::Error>(path)
    };
    let service = put("pmem-guest.service", SERVICE)?;
    let fstab = put(
        "fstab",
        &format!("LABEL={LABEL} / ext4 errors=remount-ro 0 1\n"),
    )?;
    // Read before those that others write.
    let grub = put(
        "00-console.cfg",
        "GRUB_CMDLINE_LINUX=\"console=ttyS0\"\nGRUB_CMDLINE_LINUX_DEFAULT=\"\"\nGRUB_TIMEOUT=0\nGRUB_TERMINAL=serial\n",
    )?;
    let mirrors = Mirrors::find()?;
    let sources = put("sources.list", &mirrors.sources(Root::SUITE))?;
    let archive = to.join("tree.tar");

    let include: Vec<String> = PACKAGES
        .iter()
        .map(|&name| name.to_owned())
        .chain(kernels.iter().cloned())
        .collect();
    let put_in =
        |file: &Path, path: &str| format!("--customize-hook=upload '{}' {path}", file.display());
    let step = progress.step("install Debian 13 and the packages");
    let mut mmdebstrap = apt::mmdebstrap(&include)?;
    mmdebstrap
        .arg(put_in(agent, "/usr/bin/pmem-guest"))
        .arg("--customize-hook=chmod 755 \"$1/usr/bin/pmem-guest\"")
        .arg(put_in(&service, "/etc/systemd/system/pmem-guest.service"))
        .arg(put_in(&fstab, "/etc/fstab"))
        .arg("--customize-hook=mkdir -p \"$1/etc/default/grub.d\"")
        .arg(put_in(&grub, "/etc/default/grub.d/00-console.cfg"))
        .arg("--customize-hook=chroot \"$1\" systemctl enable pmem-guest.service")
        .arg(put_in(&packages.dkms, "/root/pmem-dkms.deb"))
        .arg(put_in(&packages.pmemctl, "/root/pmemctl.deb"))
        .arg(
            // With a terminal of its own, what DKMS leaves behind would hold it while it is taken down.
            "--customize-hook=chroot \"$1\" apt-get -o Dpkg::Use-Pty=false install --yes --no-install-recommends \
             /root/pmem-dkms.deb /root/pmemctl.deb >\"$1/root/install.log\" 2>&1 || \
             { cat \"$1/root/install.log\"; cat \"$1\"/var/lib/dkms/pmem/*/build/make.log; exit 1; }",
        )
        .arg(format!("--customize-hook=download /root/install.log '{}'", to.join("install.log").display()))
        .arg(Root::SUITE)
        .arg(&archive)
        .arg(&sources);
    exec::run(&mut mmdebstrap, "system", &step)?;
    step.done();

    let step = progress.step("make a disk of it");
    let script = "set -e; cd \"$1\"\n\
                  tar -xf tree.tar --wildcards './boot/vmlinuz-*' './boot/initrd.img-*'\n\
                  truncate -s \"$2\" disk\n\
                  echo \"$(($3 / 512)),,L,*\" | sfdisk --quiet disk\n\
                  size=$(( ($(stat -c %s disk) - $3) / 1024 ))\n\
                  mke2fs -q -t ext4 -L \"$4\" -d tree.tar -E offset=\"$3\" disk \"${size}k\"\n\
                  rm tree.tar";
    let mut disk = root.command("sh");
    disk.args(["-c", script, "sh"])
        .arg(to)
        .args([SIZE, &OFFSET.to_string(), LABEL]);
    exec::run(&mut disk, "system-disk", &step)?;
    step.done();
    Ok(())
}
