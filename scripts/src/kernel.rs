// SPDX-License-Identifier: GPL-2.0-only

//! Kernels, ready to boot and to build modules for.
//!
//! Kbuild records absolute paths. So that a tree in the cache can be renamed, copied and shared, it is always
//! seen at the same place in the build root: the source at [`SOURCE`], what was built at [`BUILD`].

pub mod config;
mod debian;
mod own;
mod series;

pub use self::series::Series;
pub use crate::flavour::Flavour;
use crate::progress::Progress;
use crate::repo;
use crate::root::{Enter, Root};
use anyhow::{bail, ensure, Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where a kernel's source is in the build root.
pub const SOURCE: &str = "/kernel/src";
/// Where a kernel's build tree is in the build root.
pub const BUILD: &str = "/kernel/build";

/// Says which kernels to take instead of the newest series': those of a series, as `7.2`, or one version of Debian's, as
/// `7.2.12+deb13`.
pub const KERNEL_VARIABLE: &str = "PMEM_KERNEL";

/// A kernel that is there.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// Which one; none for a tree of the user's.
    pub flavour: Option<Flavour>,
    /// What `uname -r` says in it.
    pub release: String,
    /// The image to boot. A tree of the user's may not have one.
    pub image: Option<PathBuf>,
    /// Its `lib/modules/<release>` directory, with modules and `modules.dep`, if it has modules.
    pub modules: Option<PathBuf>,
    /// The tree for `make M=`. Paths recorded in it are those inside the build root: see [`Kernel::make`].
    pub build: PathBuf,
    /// The kernel's source.
    pub source: PathBuf,
    /// What every `make` in the tree must be given.
    variables: Vec<String>,
    /// Whose compilers build for it.
    tools: Tools,
}

/// Whose compilers build for a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tools {
    /// The build root's.
    Root,
    /// The host's, for a tree that was built with them.
    Host,
}

impl Kernel {
    /// Finds the kernel in the cache, or fetches or builds it: of the newest series, unless [`KERNEL_VARIABLE`] says
    /// otherwise. [`Flavour::Builtin`] is brought up to date with the repository.
    ///
    /// # Errors
    ///
    /// Also when an older series is chosen for a kernel of our own: its configuration is that of the newest.
    pub fn ensure(flavour: Flavour, root: &Root, progress: &Progress) -> Result<Kernel> {
        let series = series()?;
        ensure!(
            flavour.is_stock() || series == Series::newest(),
            "{KERNEL_VARIABLE} chooses Linux {series}, of which there are cloud and amd64; {flavour} is built of {} alone",
            Series::newest()
        );
        chosen(root, progress, |pin| match flavour {
            Flavour::Cloud | Flavour::Amd64 => debian::ensure(pin, flavour, root, progress),
            Flavour::Test | Flavour::Debug => own::ensure(pin, flavour, root, progress),
            Flavour::Builtin => own::ensure_builtin(pin, root, progress),
        })
    }

    /// The newest version of Debian's kernels in `series` that the mirror has, as `7.2.12+deb13`.
    pub fn newest(series: Series, root: &Root, progress: &Progress) -> Result<String> {
        Ok(debian::newest_there_is(series, root, progress)?.base)
    }

    /// What `uname -r` says in Debian's kernel of this version and `flavour`.
    pub fn release_of(base: &str, flavour: Flavour) -> String {
        debian::release(base, flavour)
    }

    /// Debian's kernel of this release, such as `7.3.4+deb13-amd64`.
    pub fn from_release(release: &str, root: &Root, progress: &Progress) -> Result<Kernel> {
        let Some((base, flavour)) = debian::parse_release(release) else {
            bail!(
                "{release} is not a kernel that we can fetch: those are Debian 13's own, such as \
                 7.3.4+deb13-amd64. For another kernel, give its configured tree with --kdir"
            );
        };
        let pin = debian::Pin::of_release(&base, release, root, progress)?;
        debian::ensure(&pin, flavour, root, progress)
    }

    /// The user's own tree: configured with Rust, and built at least as far as `modules_prepare`.
    pub fn from_kdir(kdir: &Path, root: &Root) -> Result<Kernel> {
        let build = kdir.canonicalize().with_context(|| {
            format!(
                "{} is not a directory; give a configured kernel tree",
                kdir.display()
            )
        })?;
        let read = |path: &str| {
            fs::read_to_string(build.join(path)).with_context(|| {
                format!(
                    "{} is not a kernel tree to build modules for, as it lacks {path}; configure it with \
                     CONFIG_RUST=y and run `make modules_prepare` in it",
                    build.display()
                )
            })
        };
        let auto = config::Config::parse(&read("include/config/auto.conf")?);
        let release = read("include/config/kernel.release")?.trim().to_string();
        if auto.get("CONFIG_RUST") != Some("y") {
            bail!(
                "{} is configured without CONFIG_RUST=y, which pmem needs",
                build.display()
            );
        }
        let built_with = auto
            .get("CONFIG_RUSTC_VERSION_TEXT")
            .unwrap_or_default()
            .trim_matches('"')
            .to_string();
        let tools = [(Tools::Root, root.command("rustc")), (Tools::Host, Command::new("rustc"))]
            .into_iter()
            .find(|(_, rustc)| rustc_version(rustc).is_some_and(|version| version == built_with))
            .map(|(tools, _)| tools)
            .with_context(|| {
                format!(
                    "{} was built with {built_with}, which is neither the build root's nor the host's rustc; \
                     put that one into PATH",
                    build.display()
                )
            })?;
        let variables = match auto.get("CONFIG_CC_IS_CLANG") {
            Some("y") => vec!["LLVM=1".to_string()],
            _ => {
                let cc = auto
                    .get("CONFIG_CC_VERSION_TEXT")
                    .unwrap_or_default()
                    .trim_matches('"');
                cc.split(' ')
                    .next()
                    .filter(|cc| !cc.is_empty())
                    .map(|cc| format!("CC={cc}"))
                    .into_iter()
                    .collect()
            }
        };
        Ok(Kernel {
            flavour: None,
            release,
            image: Some(build.join("arch/x86/boot/bzImage")).filter(|image| image.exists()),
            modules: None,
            source: build
                .join("source")
                .canonicalize()
                .unwrap_or_else(|_| build.clone()),
            build,
            variables,
            tools,
        })
    }

    /// A short name that tells this kernel from others.
    pub fn name(&self) -> String {
        match self.flavour {
            Some(_) => self.release.clone(),
            None => format!(
                "{}-{}",
                self.release,
                crate::cache::key([self.build.as_os_str().as_encoded_bytes()])
            ),
        }
    }

    /// Where the tree for `make M=` is seen by [`Kernel::make`].
    pub fn build_inside(&self) -> &Path {
        match self.flavour {
            Some(_) => Path::new(BUILD),
            None => &self.build,
        }
    }

    /// The build root with this kernel's source and build tree in it.
    pub fn enter<'a>(&self, root: &'a Root) -> Enter<'a> {
        match self.flavour {
            Some(_) => root
                .enter()
                .ro_bind(&self.source, SOURCE)
                .bind(&self.build, BUILD),
            None => root
                .enter()
                .ro_bind(&self.source, &self.source)
                .bind(&self.build, &self.build),
        }
    }

    /// `make` in the kernel's tree, with all that it must be given but the targets.
    pub fn make(&self, root: &Root) -> Command {
        let mut command = match self.tools {
            Tools::Root => self.enter(root).command("make"),
            Tools::Host => {
                let mut make = Command::new("make");
                make.current_dir(repo::dir());
                make
            }
        };
        make_arguments(&mut command, self.build_inside(), &self.variables);
        command
    }
}

/// The series of the kernels that [`Kernel::ensure`] takes.
pub fn series() -> Result<Series> {
    let name = chosen_version();
    match &name {
        None => Ok(Series::newest()),
        Some(name) => Series::of(name).with_context(|| unknown(name)),
    }
}

/// Calls `get` with the version that [`KERNEL_VARIABLE`] names, or else with that of the newest series.
fn chosen<T>(
    root: &Root,
    progress: &Progress,
    get: impl Fn(&debian::Pin) -> Result<T>,
) -> Result<T> {
    let series = series()?;
    match chosen_version() {
        Some(base) if base != series.name() => {
            let release = format!("{base}-amd64");
            debian::parse_release(&release).with_context(|| unknown(&base))?;
            get(&debian::Pin::of_release(&base, &release, root, progress)?)
        }
        _ => debian::pinned(series, root, progress, get),
    }
}

fn chosen_version() -> Option<String> {
    std::env::var(KERNEL_VARIABLE)
        .ok()
        .filter(|name| !name.is_empty())
}

fn unknown(name: &str) -> String {
    let series: Vec<&str> = Series::all().into_iter().map(Series::name).collect();
    format!(
        "{KERNEL_VARIABLE} is {name:?}, which is neither one of the series {} nor a version of Debian's in one of \
         them, such as 7.2.12+deb13",
        series.join(", ")
    )
}

/// What the cache has to keep: the directories of the sources and of all kernels, as we would make them now.
pub fn directories(root: &Root) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for series in Series::all() {
        let Some(pin) = debian::pin(series) else {
            continue;
        };
        all.push(pin.source_directory());
        for flavour in Flavour::ALL {
            if flavour.is_stock() {
                all.push(debian::directory(&pin, flavour, root));
            } else if series == Series::newest() {
                all.push(own::directory(&pin, flavour, root)?);
            }
        }
    }
    Ok(all)
}

/// Checks that all that the fragments of `flavour` ask for is granted. Builds nothing.
pub fn check_config(flavour: Flavour, root: &Root, progress: &Progress) -> Result<()> {
    debian::pinned(Series::newest(), root, progress, |pin| {
        own::check_config(pin, flavour, root, progress)
    })
}

fn make_arguments(command: &mut Command, tree: &Path, variables: &[String]) {
    command
        .arg("-C")
        .arg(tree)
        .arg(format!("-j{}", jobs()))
        .args(variables);
    // The same every time, so that what did not change is not linked again.
    command
        .env("KBUILD_BUILD_USER", "pmem")
        .env("KBUILD_BUILD_HOST", "pmem")
        .env("KBUILD_BUILD_TIMESTAMP", "1970-01-01");
}

/// How many things to do at once.
fn jobs() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

fn rustc_version(rustc: &Command) -> Option<String> {
    let mut command = Command::new(rustc.get_program());
    command.args(rustc.get_args()).arg("--version");
    crate::exec::stdout(&mut command)
        .ok()
        .map(|version| version.trim().to_string())
}
