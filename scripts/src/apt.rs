// SPDX-License-Identifier: GPL-2.0-only

//! Debian's archive: which mirror the host uses, and packages of one version.

use crate::exec;
use crate::progress::Progress;
use crate::root::Root;
use anyhow::{bail, Context, Result};
use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

/// The keys that the archive is signed with, on the host and in the build root.
pub const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// What Debian calls its releases in a sources list, without `-updates` and the like.
const RELEASES: &[&str] = &[
    "bullseye",
    "bookworm",
    "trixie",
    "forky",
    "sid",
    "oldoldstable",
    "oldstable",
    "stable",
    "testing",
    "unstable",
];

/// Where packages come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirrors {
    /// The archive.
    pub archive: String,
    /// The security archive, if we know one.
    pub security: Option<String>,
}

impl Mirrors {
    /// Takes the mirrors from `PMEM_MIRROR`, or from the host's apt configuration.
    pub fn find() -> Result<Mirrors> {
        if let Ok(value) = env::var("PMEM_MIRROR") {
            return Self::from_variable(&value);
        }
        // apt reads all of its configuration itself, so that we need not know its formats.
        let format = "$(SITE)|$(RELEASE)|$(COMPONENT)|$(CREATED_BY)|$(ORIGIN)";
        let targets = exec::stdout(Command::new("apt-get").args([
            "indextargets",
            "--format",
            format,
        ]))
        .context(
            "cannot read apt's configuration; set PMEM_MIRROR to the address of a Debian archive",
        )?;
        Self::from_targets(&targets).context(
            "the host's apt configuration has no Debian archive; set PMEM_MIRROR to the address of one",
        )
    }

    /// Reads `ARCHIVE [SECURITY]`.
    fn from_variable(value: &str) -> Result<Mirrors> {
        let mut words = value
            .split_whitespace()
            .map(|word| word.trim_end_matches('/').to_string());
        let mirrors = Mirrors {
            archive: words.next().unwrap_or_default(),
            security: words.next(),
        };
        let addresses = std::iter::once(&mirrors.archive).chain(&mirrors.security);
        if let Some(bad) = addresses.into_iter().find(|address| !is_address(address)) {
            bail!(
                "PMEM_MIRROR: {bad:?} is not the http address of a Debian archive \
                 (and, after a space, of its security archive if there is one)"
            );
        }
        Ok(mirrors)
    }

    /// Reads the output of `apt-get indextargets`: `site|release|component|kind|origin` a line.
    fn from_targets(targets: &str) -> Option<Mirrors> {
        let mut archive = None;
        let mut security = None;
        for line in targets.lines() {
            let mut fields = line.split('|');
            let mut next = || fields.next().unwrap_or_default();
            let (site, release, component, kind, origin) = (next(), next(), next(), next(), next());
            // Others use Debian's names of releases, too; few call their component `main`. The signature
            // is what counts in the end.
            if component != "main" || kind != "Packages" || !is_address(site) {
                continue;
            }
            // apt leaves a variable that it has no value for as it is.
            let known = !origin.is_empty() && !origin.starts_with('$');
            if known && origin != "Debian" {
                continue;
            }
            let (name, part) = release.split_once(['-', '/']).unwrap_or((release, ""));
            if !RELEASES.contains(&name) {
                continue;
            }
            let found = match part {
                "" => &mut archive,
                "security" => &mut security,
                _ => continue,
            };
            let site = site.trim_end_matches('/').to_string();
            let better = known || site.ends_with("/debian") || site.ends_with("/debian-security");
            match found {
                Some((_, true)) => {}
                Some((_, false)) if !better => {}
                slot => *slot = Some((site, better)),
            }
        }
        Some(Mirrors {
            archive: archive?.0,
            security: security.map(|(site, _)| site),
        })
    }

    /// A sources list for `suite`.
    pub fn sources(&self, suite: &str) -> String {
        let archive = ["", "-updates", "-backports"].map(|part| (&self.archive, part));
        let security = self.security.iter().map(|site| (site, "-security"));
        archive
            .into_iter()
            .chain(security)
            .map(|(site, part)| format!("deb [signed-by={KEYRING}] {site} {suite}{part} main\n"))
            .collect::<Vec<_>>()
            .concat()
    }
}

fn is_address(text: &str) -> bool {
    ["http://", "https://"].iter().any(|scheme| {
        text.strip_prefix(scheme)
            .is_some_and(|rest| !rest.is_empty())
    })
}

/// The host's settings of apt that say how the mirror is reached, such as a proxy, in the syntax of apt.conf.
fn host_options() -> Result<Vec<String>> {
    match exec::stdout(Command::new("apt-config").arg("dump")) {
        Ok(dump) => Ok(network_options(&dump)),
        // A host without apt has PMEM_MIRROR and its proxy in the environment.
        Err(_) => Ok(Vec::new()),
    }
}

fn network_options(dump: &str) -> Vec<String> {
    dump.lines()
        .filter(|line| line.starts_with("Acquire::http::") || line.starts_with("Acquire::https::"))
        // A program of the host's is not in the build root.
        .filter(|line| !line.contains("Auto-Detect") && !line.contains("AutoDetect"))
        .filter(|line| !line.ends_with(" \"\";"))
        .map(str::to_string)
        .collect()
}

/// The environment that says how the network is reached.
pub fn proxy_environment() -> Vec<(String, String)> {
    ["http_proxy", "https_proxy", "no_proxy", "all_proxy"]
        .into_iter()
        .filter_map(|name| Some((name.to_string(), env::var(name).ok()?)))
        .collect()
}

/// A package of one version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
}

/// The archive, as seen from the build root, with fresh package lists.
pub struct Archive<'a> {
    root: &'a Root,
    options: Vec<String>,
}

impl<'a> Archive<'a> {
    /// Fetches the package lists.
    pub fn update(root: &'a Root, progress: &Progress) -> Result<Archive<'a>> {
        let mirrors = Mirrors::find()?;
        fs::write(
            root.path().join("etc/apt/sources.list"),
            mirrors.sources(Root::SUITE),
        )
        .context("cannot write the build root's sources.list")?;
        let archive = Archive {
            root,
            options: host_options()?,
        };
        let step = progress.step("package lists");
        exec::run(archive.apt("apt-get").arg("update"), "apt-update", &step).with_context(
            || {
                format!(
                    "cannot reach {}; set PMEM_MIRROR to a Debian archive that can be reached",
                    mirrors.archive
                )
            },
        )?;
        step.done();
        Ok(archive)
    }

    /// All the packages whose name begins with `prefix`, in all the versions there are.
    pub fn packages(&self, prefix: &str) -> Result<Vec<Package>> {
        let names = exec::stdout(self.apt("apt-cache").args(["pkgnames", prefix]))?;
        let names: Vec<&str> = names
            .lines()
            .filter(|name| !name.contains("-dbg"))
            .collect();
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let madison = exec::stdout(self.apt("apt-cache").arg("madison").args(names))?;
        Ok(madison.lines().filter_map(parse_madison).collect())
    }

    /// Downloads `packages` to the directory `to`.
    pub fn download(&self, packages: &[Package], to: &Path, progress: &Progress) -> Result<()> {
        let wanted: Vec<String> = packages
            .iter()
            .map(|package| format!("{}={}", package.name, package.version))
            .collect();
        let enter = || self.root.enter().for_apt().chdir(to);
        let uris = exec::stdout(
            self.configure(enter().command("apt-get"))
                .args(["download", "--print-uris"])
                .args(&wanted),
        )?;
        let total = uris.lines().filter_map(size_of_uri).sum();
        let step = progress.bytes("download", total);
        let mut command = self.configure(enter().command("apt-get"));
        command.arg("download").args(&wanted);
        thread::scope(|scope| {
            let running = scope.spawn(|| exec::run(&mut command, "apt-download", &step));
            while !running.is_finished() {
                step.position(directory_size(to));
                thread::sleep(Duration::from_millis(200));
            }
            running
                .join()
                .unwrap_or_else(|_| bail!("the download stopped"))
        })?;
        step.done_with(&format!("{} MB", total / 1_000_000));
        Ok(())
    }

    fn apt(&self, program: &str) -> Command {
        self.configure(self.root.enter().for_apt().command(program))
    }

    fn configure(&self, mut command: Command) -> Command {
        command.args(["-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3"]);
        for option in &self.options {
            if let Some((name, value)) = option.trim_end_matches(';').split_once(' ') {
                command
                    .arg("-o")
                    .arg(format!("{name}={}", value.trim_matches('"')));
            }
        }
        command
    }
}

/// mmdebstrap, to make an archive of a Debian with these packages, by the host's way to the mirror. What is interrupted is
/// thrown away, so that no file needs to be on the disk at once. The release, where it goes to and the sources come last.
pub fn mmdebstrap(include: &[String]) -> Result<Command> {
    let mut command = Command::new("mmdebstrap");
    command
        .args(["--variant=apt", "--format=tar", "--architectures=amd64"])
        .arg(format!("--include={}", include.join(",")))
        .args([
            "--aptopt=Apt::Install-Recommends \"false\"",
            "--aptopt=Acquire::Retries \"3\"",
        ])
        .args(
            host_options()?
                .iter()
                .map(|option| format!("--aptopt={option}")),
        )
        .arg("--dpkgopt=force-unsafe-io");
    Ok(command)
}

/// Reads a line of `apt-cache madison`: `name | version | where`.
fn parse_madison(line: &str) -> Option<Package> {
    let mut fields = line.split('|').map(str::trim);
    let package = Package {
        name: fields.next()?.to_string(),
        version: fields.next()?.to_string(),
    };
    fields.next()?.ends_with(" Packages").then_some(package)
}

/// Reads the size in a line of `apt-get --print-uris`: `'uri' file size hash`.
fn size_of_uri(line: &str) -> Option<u64> {
    line.strip_prefix('\'')?.split(' ').nth(2)?.parse().ok()
}

fn directory_size(dir: &Path) -> u64 {
    walkdir::WalkDir::new(dir)
        .into_iter()
        .filter_map(|entry| entry.ok()?.metadata().ok())
        .filter(|meta| meta.is_file())
        .map(|meta| meta.len())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mirrors(archive: &str, security: Option<&str>) -> Mirrors {
        Mirrors {
            archive: archive.to_string(),
            security: security.map(str::to_string),
        }
    }

    #[test]
    fn mirrors_are_found_in_the_hosts_configuration() {
        let both = Some(mirrors("http://a/debian", Some("http://a/debian-security")));
        let table: &[(&str, Option<Mirrors>)] = &[
            // A plain Debian, lists fetched.
            (
                "http://a/debian|bookworm|main|Packages|Debian\n\
                 http://a/debian|bookworm-updates|main|Packages|Debian\n\
                 http://a/debian-security|bookworm-security|main|Packages|Debian\n",
                both.clone(),
            ),
            // Lists not fetched yet; a trailing slash.
            (
                "http://a/debian/|trixie|main|Packages|$(ORIGIN)\n\
                 http://a/debian-security/|trixie-security|main|Packages|$(ORIGIN)\n",
                both.clone(),
            ),
            // Strangers that look alike come first.
            (
                "https://x/linux/debian|bookworm|stable|Packages|$(ORIGIN)\n\
                 https://x/debian/12/prod|bookworm|main|Packages|$(ORIGIN)\n\
                 https://x/debian|bookworm|main|Packages|Stranger\n\
                 http://a/debian|bookworm|main|Packages|$(ORIGIN)\n\
                 http://a/debian-security|bookworm-security|main|Packages|$(ORIGIN)\n",
                both,
            ),
            // A mirror with a name of its own, no security archive.
            (
                "https://a/mirror|stable|main|Packages|",
                Some(mirrors("https://a/mirror", None)),
            ),
            // Not an address that the build root could use, other things than package lists, nothing.
            ("file:/srv/debian|trixie|main|Packages|Debian", None),
            ("http://a/debian|trixie|main|DEP-11|Debian", None),
            ("http://a/ubuntu|noble|main|Packages|Ubuntu", None),
            ("http://a/debian|trixie", None),
            ("", None),
        ];
        for (targets, expected) in table {
            assert_eq!(&Mirrors::from_targets(targets), expected, "{targets}");
        }
    }

    #[test]
    fn mirrors_are_read_from_the_environment() {
        assert_eq!(
            Mirrors::from_variable("http://a/d/").unwrap(),
            mirrors("http://a/d", None)
        );
        assert_eq!(
            Mirrors::from_variable("http://a/d https://a/s").unwrap(),
            mirrors("http://a/d", Some("https://a/s"))
        );
        for bad in ["", "a/d", "ftp://a/d", "http://", "http://a/d a/s"] {
            assert!(Mirrors::from_variable(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_security_suite_is_listed_only_where_it_is() {
        let sources = mirrors("http://a/d", None).sources("trixie");
        assert_eq!(sources.lines().count(), 3);
        assert!(sources.contains("] http://a/d trixie-backports main\n"));
        let sources = mirrors("http://a/d", Some("http://a/s")).sources("trixie");
        assert!(sources.ends_with("] http://a/s trixie-security main\n"));
    }

    #[test]
    fn only_settings_of_the_network_are_taken_over() {
        let dump = "APT::Architecture \"amd64\";\nAcquire::http \"\";\nAcquire::http::Proxy \"http://p:3128\";\n\
                    Acquire::http::Proxy-Auto-Detect \"/usr/bin/x\";\nAcquire::https::Timeout \"10\";\n";
        assert_eq!(
            network_options(dump),
            [
                "Acquire::http::Proxy \"http://p:3128\";",
                "Acquire::https::Timeout \"10\";"
            ]
        );
    }

    #[test]
    fn apts_output_is_read() {
        let line = "linux-source-7.3 | 7.3.4-1~bpo13+1 | http://a/debian trixie-backports/main amd64 Packages";
        let package = parse_madison(line).unwrap();
        assert_eq!(
            (package.name.as_str(), package.version.as_str()),
            ("linux-source-7.3", "7.3.4-1~bpo13+1")
        );
        assert_eq!(
            parse_madison("linux | 7.3.4-1 | http://a/debian trixie/main Sources"),
            None
        );
        assert_eq!(
            size_of_uri("'http://a/p/x_1.deb' x_1.deb 1234 SHA256:00"),
            Some(1234)
        );
        assert_eq!(size_of_uri("Get:1 x"), None);
    }
}
