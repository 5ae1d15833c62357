// SPDX-License-Identifier: GPL-2.0-only

//! Debian's own kernels, unmodified.
//!
//! Their headers lack one thing to build a Rust module: the compiled `kernel` crate. It is built from the source
//! package of the same version with the same configuration and compilers, so all of its symbols agree.

use super::config::Config;
use super::{make_arguments, Flavour, Kernel, Series, Tools, BUILD, SOURCE};
use crate::apt::{Archive, Package};
use crate::progress::Progress;
use crate::root::Root;
use crate::{cache, exec};
use anyhow::{bail, Context, Result};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// About how many lines the build of the Rust metadata prints.
const METADATA_LINES: u64 = 310;

/// One version of Debian's kernel. Mirrors keep few of them; we stay with one of each series as long as we have it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Pin {
    /// The release without the flavour: `7.3.4+deb13`.
    pub(super) base: String,
    /// The packages' version: `7.3.4-1~bpo13+1`.
    pub(super) version: String,
}

/// The mirror no longer has this version.
#[derive(Debug)]
struct Rotated(Pin);

impl fmt::Display for Rotated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the mirror has no Linux {} ({}) any more; `cargo xtask clean --all` forgets it, and the newest is \
             taken instead",
            self.0.base, self.0.version
        )
    }
}

impl std::error::Error for Rotated {}

/// Calls `get` with the version of `series` that we stay with, or with a newer one if that is gone from the mirror.
pub(super) fn pinned<T>(
    series: Series,
    root: &Root,
    progress: &Progress,
    get: impl Fn(&Pin) -> Result<T>,
) -> Result<T> {
    if let Some(pin) = pin(series) {
        match get(&pin) {
            Err(error) if error.is::<Rotated>() => progress.line(&format!("{error}")),
            result => return result,
        }
    }
    let pin = newest_of(series, root, progress)?;
    keep(series, &pin, progress)?;
    get(&pin)
}

/// Has us stay with this version of `series`.
fn keep(series: Series, pin: &Pin, progress: &Progress) -> Result<()> {
    let _lock = cache::Lock::take("kernel.json", progress)?;
    let path = cache::dir().join(pin_name(series));
    let temporary = path.with_extension("partial");
    fs::write(&temporary, serde_json::to_vec_pretty(pin)?)
        .and_then(|()| fs::rename(&temporary, &path))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// The newest version of `series` that there is: on the mirror, or if that has none, in the cache.
pub(super) fn newest_there_is(series: Series, root: &Root, progress: &Progress) -> Result<Pin> {
    let ours = pin(series);
    match (newest_of(series, root, progress), ours) {
        (Ok(newest), Some(_)) => Ok(newest),
        (Ok(newest), None) => {
            keep(series, &newest, progress)?;
            Ok(newest)
        }
        (Err(error), Some(ours)) => {
            progress.line(&format!("{error}; {} is taken, which is here", ours.base));
            Ok(ours)
        }
        (Err(error), None) => Err(error),
    }
}

/// The newest version of `series` that the mirror has.
fn newest_of(series: Series, root: &Root, progress: &Progress) -> Result<Pin> {
    let packages = Archive::update(root, progress)?.packages("linux-")?;
    newest(&packages, series.name()).with_context(|| {
        format!(
            "the mirror's {}-backports has no complete Linux {series}; set PMEM_MIRROR to one that has it, or \
             give a configured kernel tree with --kdir",
            Root::SUITE
        )
    })
}

/// The version of `series` that we stay with, if we have one.
pub(super) fn pin(series: Series) -> Option<Pin> {
    pin_in(&cache::dir(), series)
}

/// As [`pin`], with the cache at `dir`.
fn pin_in(dir: &Path, series: Series) -> Option<Pin> {
    // There was one for all once.
    [pin_name(series), "kernel.json".to_string()]
        .iter()
        .filter_map(|name| fs::read(dir.join(name)).ok())
        .filter_map(|json| serde_json::from_slice::<Pin>(&json).ok())
        .find(|pin| Series::of(&pin.base) == Some(series))
}

fn pin_name(series: Series) -> String {
    format!("kernel-{series}.json")
}

/// Splits `7.3.4+deb13-cloud-amd64` into the base and the flavour.
pub(super) fn parse_release(release: &str) -> Option<(String, Flavour)> {
    let (base, flavour) = match release.strip_suffix("-cloud-amd64") {
        Some(base) => (base, Flavour::Cloud),
        None => (release.strip_suffix("-amd64")?, Flavour::Amd64),
    };
    let (version, debian) = base.split_once("+deb13")?;
    let numbers = |text: &str| text.split('.').all(|part| part.parse::<u32>().is_ok());
    // A rebuild in a stable release is 7.3.4+deb13.1.
    let rebuild = debian.is_empty() || debian.strip_prefix('.').is_some_and(numbers);
    let kernel = version.split('.').count() == 3 && numbers(version);
    (kernel && rebuild).then(|| (base.to_string(), flavour))
}

/// What `uname -r` says in the kernel of this version and `flavour`.
pub(super) fn release(base: &str, flavour: Flavour) -> String {
    match flavour {
        Flavour::Cloud => format!("{base}-cloud-amd64"),
        _ => format!("{base}-amd64"),
    }
}

impl Pin {
    /// The version that has `release`.
    pub(super) fn of_release(
        base: &str,
        release: &str,
        root: &Root,
        progress: &Progress,
    ) -> Result<Pin> {
        let pinned = Series::of(base).and_then(pin);
        if let Some(pin) = pinned.filter(|pin| pin.base == base) {
            return Ok(pin);
        }
        let headers =
            Archive::update(root, progress)?.packages(&format!("linux-headers-{release}"))?;
        let newest = headers.iter().max_by_key(|package| version_key(&package.version)).with_context(|| {
            format!("the mirror has no Linux {release}; `apt-cache pkgnames linux-headers-` lists what there is")
        })?;
        Ok(Pin {
            base: base.to_string(),
            version: newest.version.clone(),
        })
    }

    fn release(&self, flavour: Flavour) -> String {
        release(&self.base, flavour)
    }

    fn package(&self, name: String) -> Package {
        Package {
            name,
            version: self.version.clone(),
        }
    }

    /// `linux-source-7.3`.
    fn source_package(&self) -> Package {
        let series: Vec<&str> = self.base.splitn(3, '.').take(2).collect();
        self.package(format!("linux-source-{}", series.join(".")))
    }

    /// What a kernel is made of.
    fn binary_packages(&self, flavour: Flavour) -> Vec<Package> {
        let release = self.release(flavour);
        ["base", "binary-unsigned", "headers", "modules"]
            .map(|part| self.package(format!("linux-{part}-{release}")))
            .to_vec()
    }

    fn download(
        &self,
        packages: &[Package],
        to: &Path,
        root: &Root,
        progress: &Progress,
    ) -> Result<()> {
        let archive = Archive::update(root, progress)?;
        for package in packages {
            if !archive.packages(&package.name)?.contains(package) {
                return Err(Rotated(self.clone()).into());
            }
        }
        archive.download(packages, to, progress)
    }

    /// Where the source is in the cache.
    pub(super) fn source_directory(&self) -> PathBuf {
        cache::dir().join("source").join(&self.version)
    }

    /// The kernel's source, fetched if it is not in the cache.
    pub(super) fn source(&self, root: &Root, progress: &Progress) -> Result<PathBuf> {
        let path = self.source_directory();
        if path.exists() {
            return Ok(path);
        }
        let _lock = cache::Lock::take("source", progress)?;
        if path.exists() {
            return Ok(path);
        }
        let debs = cache::dir().join("source").join("debs");
        cache::remove(&debs)?;
        fs::create_dir_all(&debs)?;
        self.download(&[self.source_package()], &debs, root, progress)?;
        cache::publish(&path, |partial| {
            let step = progress.step(&format!("unpack Linux {}", self.version));
            let script = "set -e; cd \"$1\"\n\
                          dpkg-deb --fsys-tarfile \"$2\"/*.deb | tar -xO --wildcards '*/linux-source-*.tar.xz' |\n\
                          xz -dc -T0 | tar -x --no-same-owner --strip-components=1\n\
                          test -f Makefile";
            let mut command = root.command("bash");
            command
                .args(["-o", "pipefail", "-c", script, "sh"])
                .arg(partial)
                .arg(&debs);
            exec::run(&mut command, "unpack-source", &step)?;
            step.done();
            Ok(())
        })?;
        cache::remove(&debs)?;
        Ok(path)
    }
}

/// The newest version in `series` of which all the packages are there.
fn newest(packages: &[Package], series: &str) -> Option<Pin> {
    let complete = |pin: &Pin| {
        [Flavour::Cloud, Flavour::Amd64]
            .into_iter()
            .flat_map(|flavour| pin.binary_packages(flavour))
            .chain([pin.source_package()])
            .all(|package| packages.contains(&package))
    };
    packages
        .iter()
        .filter_map(|package| {
            let (base, flavour) = parse_release(package.name.strip_prefix("linux-headers-")?)?;
            let in_series = base.strip_prefix(series)?.starts_with('.');
            (in_series && flavour == Flavour::Cloud).then(|| Pin {
                base,
                version: package.version.clone(),
            })
        })
        .filter(complete)
        .max_by_key(|pin| version_key(&pin.version))
}

/// Orders versions of kernel packages: their numbers, in turn.
fn version_key(version: &str) -> Vec<u64> {
    version
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|number| number.parse().ok())
        .collect()
}

/// Where the stock kernel of `flavour` is in the cache.
pub(super) fn directory(pin: &Pin, flavour: Flavour, root: &Root) -> PathBuf {
    let key = cache::key([pin.version.as_str(), root.compilers()]);
    cache::dir()
        .join("kernels")
        .join(format!("{}-{key}", pin.release(flavour)))
}

/// The stock kernel of `flavour`.
pub(super) fn ensure(
    pin: &Pin,
    flavour: Flavour,
    root: &Root,
    progress: &Progress,
) -> Result<Kernel> {
    let source = pin.source(root, progress)?;
    let release = pin.release(flavour);
    let path = directory(pin, flavour, root);
    if !path.exists() {
        let _lock = cache::Lock::take(&format!("kernel-{flavour}"), progress)?;
        if !path.exists() {
            cache::publish(&path, |partial| {
                make(pin, flavour, &source, partial, root, progress)
            })?;
        }
    }
    Ok(Kernel {
        flavour: Some(flavour),
        image: Some(path.join("vmlinuz")),
        modules: Some(path.join("lib/modules").join(&release)),
        build: path.join("build"),
        source,
        variables: variables(&release),
        release,
        tools: Tools::Root,
    })
}

/// The compilers and the release, as Debian's own build records them.
fn variables(release: &str) -> Vec<String> {
    vec![
        "CC=x86_64-linux-gnu-gcc-14".to_string(),
        "CROSS_COMPILE=x86_64-linux-gnu-".to_string(),
        format!("KERNELRELEASE={release}"),
    ]
}

fn make(
    pin: &Pin,
    flavour: Flavour,
    source: &Path,
    to: &Path,
    root: &Root,
    progress: &Progress,
) -> Result<()> {
    let release = pin.release(flavour);
    let debs = to.join("debs");
    fs::create_dir(&debs)?;
    pin.download(&pin.binary_packages(flavour), &debs, root, progress)?;

    let step = progress.step(&format!("unpack {release}"));
    let script = "set -e; cd \"$1\"; release=$2\n\
                  for deb in debs/*.deb; do dpkg-deb -x \"$deb\" tree; done\n\
                  mkdir -p lib/modules build\n\
                  mv \"tree/usr/lib/modules/$release\" lib/modules/\n\
                  mv \"lib/modules/$release/vmlinuz.unsigned\" vmlinuz\n\
                  rm -f \"lib/modules/$release/build\" \"lib/modules/$release/source\"\n\
                  mv \"tree/usr/src/linux-headers-$release\"/{.config,Module.symvers} build/\n\
                  depmod -b . \"$release\"\n\
                  rm -rf debs tree";
    let mut unpack = root.command("bash");
    unpack.args(["-c", script, "sh"]).arg(to).arg(&release);
    exec::run(&mut unpack, &format!("unpack-{release}"), &step)?;
    step.done();

    let step = progress.count(&format!("Rust metadata of {release}"), METADATA_LINES);
    let mut make = root
        .enter()
        .ro_bind(source, SOURCE)
        .bind(to.join("build"), BUILD)
        .command("make");
    let config = to.join("build/.config");
    let recorded = Config::parse(&fs::read_to_string(&config)?);
    // kbuild removes a Module.symvers that is older than its own vmlinux would be; keep Debian's.
    let symvers = to.join("build/Module.symvers");
    let exports =
        fs::read(&symvers).with_context(|| format!("cannot read {}", symvers.display()))?;
    make_arguments(&mut make, Path::new(SOURCE), &variables(&release));
    make.arg(format!("O={BUILD}"))
        .args(["olddefconfig", "prepare", "modules_prepare"]);
    exec::run(&mut make, &format!("metadata-{release}"), &step)?;
    fs::write(&symvers, exports)?;
    let lost = recorded.unmet(&Config::parse(&fs::read_to_string(&config)?));
    if !lost.is_empty() {
        bail!(
            "Debian built {release} with compilers that the build root does not have, as the configuration \
             changed; `cargo xtask clean --all` makes a new root:\n    {}",
            lost.join("\n    ")
        );
    }
    let built = fs::read_to_string(to.join("build/include/config/kernel.release"))?;
    if built.trim() != release {
        bail!("the tree calls itself {}, not {release}", built.trim());
    }
    step.done();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packages(list: &[(&str, &str)]) -> Vec<Package> {
        let parts = ["base", "binary-unsigned", "headers", "modules"];
        let mut all = Vec::new();
        for (base, version) in list {
            for flavour in ["amd64", "cloud-amd64"] {
                all.extend(parts.map(|part| {
                    (
                        format!("linux-{part}-{base}-{flavour}"),
                        version.to_string(),
                    )
                }));
            }
            let series = base.rsplit_once('.').unwrap().0;
            all.push((format!("linux-source-{series}"), version.to_string()));
        }
        all.into_iter()
            .map(|(name, version)| Package { name, version })
            .collect()
    }

    #[test]
    fn the_newest_complete_version_is_taken() {
        let all = packages(&[
            ("7.2.12+deb13", "7.2.12-1~bpo13+1"),
            ("7.3.4+deb13", "7.3.4-1~bpo13+1"),
            ("7.3.10+deb13", "7.3.10-1~bpo13+1"),
            ("7.30.1+deb13", "7.30.1-1~bpo13+1"),
        ]);
        let pin = newest(&all, "7.3").unwrap();
        assert_eq!(
            (pin.base.as_str(), pin.version.as_str()),
            ("7.3.10+deb13", "7.3.10-1~bpo13+1")
        );

        // The source of the newest is not there (yet, or any more).
        let incomplete: Vec<Package> = all
            .into_iter()
            .filter(|package| {
                package.name != "linux-source-7.3" || !package.version.starts_with("7.3.10")
            })
            .collect();
        assert_eq!(newest(&incomplete, "7.3").unwrap().base, "7.3.4+deb13");
        assert_eq!(newest(&incomplete, "7.4"), None);
    }

    #[test]
    fn a_rebuild_is_newer() {
        let all = packages(&[
            ("7.3.4+deb13", "7.3.4-1~bpo13+1"),
            ("7.3.4+deb13", "7.3.4-2~bpo13+1"),
        ]);
        assert_eq!(newest(&all, "7.3").unwrap().version, "7.3.4-2~bpo13+1");
    }

    /// Each series has its own, and what an earlier version of this program wrote is good for its series.
    #[test]
    fn each_series_has_its_pin() {
        let dir = tempfile::tempdir().unwrap();
        let [old, new] = ["7.2", "7.3"].map(|series| Series::of(series).unwrap());
        let write = |name: &str, base: &str| {
            let pin = Pin {
                base: base.to_string(),
                version: format!("{base}-1"),
            };
            fs::write(dir.path().join(name), serde_json::to_vec(&pin).unwrap()).unwrap();
        };
        let base = |series| pin_in(dir.path(), series).map(|pin| pin.base);

        assert_eq!((base(old), base(new)), (None, None));
        write("kernel.json", "7.3.4+deb13");
        assert_eq!((base(old), base(new)), (None, Some("7.3.4+deb13".into())));
        write(&pin_name(old), "7.2.12+deb13");
        write(&pin_name(new), "7.3.5+deb13");
        assert_eq!(
            (base(old), base(new)),
            (Some("7.2.12+deb13".into()), Some("7.3.5+deb13".into()))
        );
        // One that is damaged is none.
        fs::write(dir.path().join(pin_name(new)), "{").unwrap();
        assert_eq!(base(new), Some("7.3.4+deb13".into()));
    }

    #[test]
    fn releases_are_told_apart() {
        let table = [
            ("7.3.4+deb13-amd64", Some(("7.3.4+deb13", Flavour::Amd64))),
            (
                "7.3.4+deb13-cloud-amd64",
                Some(("7.3.4+deb13", Flavour::Cloud)),
            ),
            (
                "7.3.4+deb13.1-amd64",
                Some(("7.3.4+deb13.1", Flavour::Amd64)),
            ),
            ("7.3.4+deb13-common", None),
            ("7.3.4-pmem-test", None),
            ("7.3.4+deb13-rt-amd64", None),
            ("6.1.0-44-amd64", None),
            ("", None),
        ];
        for (release, expected) in table {
            let expected = expected.map(|(base, flavour)| (base.to_string(), flavour));
            assert_eq!(parse_release(release), expected, "{release}");
        }
    }
}
