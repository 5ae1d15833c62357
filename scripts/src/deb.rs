// SPDX-License-Identifier: GPL-2.0-only

//! Makes Debian packages: `pmem-dkms`, which builds the module on the machine that it is installed on, and `pmemctl`.

use crate::progress::Progress;
use crate::root::Root;
use crate::{cache, crates, docs, exec, repo};
use anyhow::{ensure, Context, Result};
use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What lintian is not asked for: all of it is for packages that go to Debian's archive.
const NOT_FOR_US: &str =
    "initial-upload-closes-no-bugs,bogus-mail-host,bogus-mail-host-in-debian-changelog";

/// Where kernels come from; their headers bring libraries with them, whose own headers must be of the same version.
const BACKPORTS: &str = "trixie-backports";

/// Make Debian packages: pmem-dkms and pmemctl.
///
/// `pmem-dkms` builds the module for each kernel of the machine that it is installed on, `pmemctl` plans, examines and
/// lists. Both are made in the build root, and lintian has nothing to say about them.
#[derive(clap::Args, Debug)]
pub struct Args {}

/// The packages.
#[derive(Debug, Clone)]
pub struct Packages {
    /// The module's source, which DKMS builds.
    pub dkms: PathBuf,
    /// The program.
    pub pmemctl: PathBuf,
}

/// Makes the packages, and says where they are and how to install them.
pub fn run(_args: &Args) -> Result<()> {
    let progress = Progress::new();
    let root = Root::ensure(&progress)?;
    let packages = make(&root, &progress)?;
    println!("{}", packages.dkms.display());
    println!("{}", packages.pmemctl.display());
    println!(
        "\nOn Debian 13 with a kernel from backports, and the headers of that kernel:\n    \
         apt install {} {} libdw-dev/{BACKPORTS} libelf-dev/{BACKPORTS}",
        packages.dkms.display(),
        packages.pmemctl.display()
    );
    Ok(())
}

/// Makes the packages, and has lintian check them.
pub fn make(root: &Root, progress: &Progress) -> Result<Packages> {
    let version = env!("CARGO_PKG_VERSION");
    let out = repo::target().join("deb");
    fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    let _lock = cache::Lock::take("deb", progress)?;

    let epoch = commit_time()?;
    let program = pmemctl(&out, root, progress)?;
    let stage = out.join(format!("pmem-{version}"));
    cache::remove(&stage)?;
    for path in repo::module_sources()? {
        copy(&repo::dir().join(&path), &stage.join(&path))?;
    }
    for (directory, to) in [
        ("scripts/dkms", "scripts/dkms"),
        ("scripts/debian", "debian"),
    ] {
        for path in repo::files_in(directory)? {
            let name = path.strip_prefix(directory)?;
            copy(&repo::dir().join(&path), &stage.join(to).join(name))?;
        }
    }
    copy(&program, &stage.join("bin/pmemctl"))?;
    let manuals = docs::manuals(epoch, root, progress)?;
    for (section, package) in [("man4", "pmem-dkms"), ("man8", "pmemctl")] {
        let mut list = String::new();
        for page in fs::read_dir(manuals.join(section))? {
            let page = page?.path();
            let name = Path::new("man").join(page.file_name().context("a page has no name")?);
            copy(&page, &stage.join(&name))?;
            list += &format!("{}\n", name.display());
        }
        fs::write(stage.join(format!("debian/{package}.manpages")), list)?;
    }
    let maintainer = maintainer();
    let date = exec::stdout(Command::new("date").args(["-uR", "-d", &format!("@{epoch}")]))?;
    let changelog = format!(
        "pmem ({version}) unstable; urgency=medium\n\n  * See README.md for what it is.\n\n -- {maintainer}  {}\n",
        date.trim()
    );
    fs::write(stage.join("debian/changelog"), changelog)?;
    let control = stage.join("debian/control");
    let text = fs::read_to_string(&control)?;
    fs::write(&control, text.replace("@MAINTAINER@", &maintainer))?;

    let step = progress.step("packages");
    // Which libraries the program needs, dpkg knows by what is installed.
    let mut build = root
        .enter()
        .ro_bind(root.path().join("var/lib/dpkg"), "/var/lib/dpkg")
        .chdir(&stage)
        .command("dpkg-buildpackage");
    build
        .args(["--build=binary", "--no-sign", "--no-check-builddeps"])
        .env("SOURCE_DATE_EPOCH", epoch.to_string());
    exec::run(&mut build, "deb", &step)?;
    step.done();
    let packages = Packages {
        dkms: out.join(format!("pmem-dkms_{version}_all.deb")),
        pmemctl: out.join(format!("pmemctl_{version}_amd64.deb")),
    };
    for package in [&packages.dkms, &packages.pmemctl] {
        ensure!(package.exists(), "{} was not made", package.display());
    }

    let step = progress.step("lintian");
    let mut lintian = root.enter().chdir(&out).command("lintian");
    lintian
        .args([
            "--allow-root",
            "--display-info",
            "--suppress-tags",
            NOT_FOR_US,
        ])
        .args(["--fail-on", "error,warning,info"])
        .args([&packages.dkms, &packages.pmemctl]);
    let (clean, output) = exec::try_run(&mut lintian, "lintian", &step)?;
    ensure!(clean, "lintian says:\n{}", output.text.trim_end());
    step.done();
    Ok(packages)
}

/// Builds the program in the build root, so that it needs no newer C library than Debian 13 has.
fn pmemctl(out: &Path, root: &Root, progress: &Progress) -> Result<PathBuf> {
    let step = progress.step("pmemctl for Debian 13");
    // Where it was built is no one's concern.
    let rustflags = format!(
        "--remap-path-prefix={}=/usr/src/cargo --remap-path-prefix={}=/usr/src/pmem",
        crates::home()?.display(),
        repo::dir().display()
    );
    let results = crates::build_in(root, "pmemctl", &out.join("cargo"), &rustflags, &step)?;
    step.done();
    Ok(results.join("pmemctl"))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let copy = || -> std::io::Result<()> {
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::copy(from, to)?;
        // Whatever the umask of who cloned the repository was.
        let executable = fs::metadata(from)?.permissions().mode() & 0o100 != 0;
        fs::set_permissions(
            to,
            fs::Permissions::from_mode(if executable { 0o755 } else { 0o644 }),
        )
    };
    copy().with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}

/// When the sources were last changed, so that the same sources give the same packages.
fn commit_time() -> Result<u64> {
    let git = exec::stdout(Command::new("git").current_dir(repo::dir()).args([
        "log",
        "-1",
        "--format=%ct",
    ]));
    let time = git.ok().and_then(|time| time.trim().parse().ok());
    time.map_or_else(docs::epoch, Ok)
}

/// Who makes the packages: Debian's variables, or git's.
fn maintainer() -> String {
    let git = |key: &str| {
        let value = exec::stdout(
            Command::new("git")
                .current_dir(repo::dir())
                .args(["config", key]),
        );
        value.ok().map(|value| value.trim().to_string())
    };
    let one = |variable: &str, key: &str, otherwise: &str| {
        env::var(variable)
            .ok()
            .or_else(|| git(key))
            .filter(|value| !value.is_empty())
            .unwrap_or_else(|| otherwise.to_string())
    };
    format!(
        "{} <{}>",
        one("DEBFULLNAME", "user.name", "The pmem maintainers"),
        one("DEBEMAIL", "user.email", "maintainers@localhost")
    )
}
