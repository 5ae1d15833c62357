// SPDX-License-Identifier: GPL-2.0-only

//! Kernels of our own, from Debian's source: small, and with what tests need.
//!
//! The configuration is the fragments in `scripts/flavours` onto allnoconfig.

use super::config::Config;
use super::debian::Pin;
use super::{make_arguments, Flavour, Kernel, Tools, BUILD, SOURCE};
use crate::progress::Progress;
use crate::root::{Enter, Root};
use crate::{cache, exec, repo};
use anyhow::{bail, ensure as check, Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use walkdir::WalkDir;

/// Where the driver is in a kernel's tree.
const DRIVER: &str = "drivers/block/pmem";

/// About how many lines the build of a kernel prints.
const KERNEL_LINES: u64 = 2_300;
/// The same when only the driver changed.
const BUILTIN_LINES: u64 = 100;

/// The fragments that make up a flavour.
fn fragments(flavour: Flavour) -> &'static [&'static str] {
    match flavour {
        Flavour::Builtin => &["base", "test", "builtin"],
        Flavour::Debug => &["base", "test", "debug"],
        _ => &["base", "test"],
    }
}

/// What `flavour` asks for.
fn wanted(flavour: Flavour) -> Result<Config> {
    let mut text = String::new();
    for name in fragments(flavour) {
        let path = repo::dir()
            .join("scripts/flavours")
            .join(format!("{name}.config"));
        text += &fs::read_to_string(&path)
            .with_context(|| format!("cannot read {}", path.display()))?;
    }
    Ok(Config::parse(&text))
}

/// Where the kernel of `flavour` with this configuration is in the cache.
fn directory_of(pin: &Pin, flavour: Flavour, config: &Config, root: &Root) -> PathBuf {
    let key = cache::key([config.text()]);
    cache::dir()
        .join("kernels")
        .join(format!("{}{key}", prefix(pin, flavour, root)))
}

/// How the names begin of kernels that differ in their configuration alone.
fn prefix(pin: &Pin, flavour: Flavour, root: &Root) -> String {
    let key = cache::key([pin.version.as_str(), root.compilers()]);
    format!("{flavour}-{key}-")
}

/// A build tree of the same source and the same compilers with another configuration, to start from: make sees
/// what differs.
fn seed(pin: &Pin, flavour: Flavour, root: &Root) -> Option<PathBuf> {
    let prefix = prefix(pin, flavour, root);
    let kernels = fs::read_dir(cache::dir().join("kernels")).ok()?;
    kernels
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_none())
        .map(|path| path.join("build"))
        .find(|build| build.exists())
}

/// Where the kernel of `flavour` is in the cache.
pub(super) fn directory(pin: &Pin, flavour: Flavour, root: &Root) -> Result<PathBuf> {
    Ok(directory_of(pin, flavour, &wanted(flavour)?, root))
}

/// The kernel of `flavour`, built if it is not in the cache.
pub(super) fn ensure(
    pin: &Pin,
    flavour: Flavour,
    root: &Root,
    progress: &Progress,
) -> Result<Kernel> {
    let source = pin.source(root, progress)?;
    let config = wanted(flavour)?;
    let path = directory_of(pin, flavour, &config, root);
    if !path.exists() {
        let _lock = cache::Lock::take(&format!("kernel-{flavour}"), progress)?;
        if !path.exists() {
            let step = progress.count(&format!("build kernel {flavour}"), KERNEL_LINES);
            cache::publish_resumable(&path, |partial| {
                let build = partial.join("build");
                if let (false, Some(seed)) = (build.exists(), seed(pin, flavour, root)) {
                    let copy = partial.join("copy");
                    cache::remove(&copy)?;
                    copy_tree(&seed, &copy)?;
                    fs::rename(&copy, &build)?;
                }
                fs::create_dir_all(&build)?;
                let enter = || root.enter().ro_bind(&source, SOURCE).bind(&build, BUILD);
                configure(&config, flavour, &build, &enter, &step)?;
                compile(flavour, partial, &enter, &step)
            })?;
            step.done();
        }
    }
    open(flavour, &path, source)
}

/// The kernel with the driver linked in, up to date with the repository.
///
/// Its build tree starts as a copy of [`Flavour::Test`]'s, seen at the same place, so that only what differs is
/// compiled. Its source is the common one, with a patched copy of `drivers/block` over the original.
pub(super) fn ensure_builtin(pin: &Pin, root: &Root, progress: &Progress) -> Result<Kernel> {
    let flavour = Flavour::Builtin;
    let seed = ensure(pin, Flavour::Test, root, progress)?;
    let config = wanted(flavour)?;
    let path = directory_of(pin, flavour, &config, root);
    let _lock = cache::Lock::take(&format!("kernel-{flavour}"), progress)?;
    if !path.exists() {
        let step = progress.step("copy kernel test");
        cache::publish(&path, |partial| {
            copy_tree(&seed.build, &partial.join("build"))?;
            patch_block(&seed.source, &partial.join("block"))
        })?;
        step.done();
    }

    let block = path.join("block");
    let stamp = path.join("built");
    let files = sources()?;
    let content = content_key(&files)?;
    if fs::read_to_string(&stamp).ok().as_deref() != Some(content.as_str()) {
        cache::remove(&stamp)?;
        let step = progress.count("build kernel builtin", BUILTIN_LINES);
        mirror(repo::dir(), &files, &block.join("pmem"))?;
        let build = path.join("build");
        let enter = || {
            let block_inside = Path::new(SOURCE).join("drivers/block");
            root.enter()
                .ro_bind(&seed.source, SOURCE)
                .ro_bind(&block, block_inside)
                .bind(&build, BUILD)
        };
        configure(&config, flavour, &build, &enter, &step)?;
        compile(flavour, &path, &enter, &step)?;
        fs::write(&stamp, content)?;
        step.done();
    }
    open(flavour, &path, seed.source)
}

/// Whether the configuration of `flavour` holds in this source.
pub(super) fn check_config(
    pin: &Pin,
    flavour: Flavour,
    root: &Root,
    progress: &Progress,
) -> Result<()> {
    let source = pin.source(root, progress)?;
    let step = progress.step(&format!("configuration of kernel {flavour}"));
    let build = tempfile::tempdir_in(cache::create()?)?;
    let enter = || {
        root.enter()
            .ro_bind(&source, SOURCE)
            .bind(build.path(), BUILD)
    };
    configure(&wanted(flavour)?, flavour, build.path(), &enter, &step)?;
    step.done();
    Ok(())
}

fn open(flavour: Flavour, path: &Path, source: PathBuf) -> Result<Kernel> {
    let build = path.join("build");
    let release = release(&build)?;
    Ok(Kernel {
        flavour: Some(flavour),
        image: Some(path.join("vmlinuz")),
        modules: Some(path.join("lib/modules").join(&release)),
        build,
        source,
        release,
        variables: vec!["LLVM=1".to_string()],
        tools: Tools::Root,
    })
}

fn release(build: &Path) -> Result<String> {
    let path = build.join("include/config/kernel.release");
    let text =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(text.trim().to_string())
}

fn make(enter: Enter<'_>) -> Command {
    let mut make = enter.command("make");
    make_arguments(
        &mut make,
        Path::new(SOURCE),
        &["LLVM=1".to_string(), format!("O={BUILD}")],
    );
    make
}

/// Writes the configuration, and checks that all we asked for is in it.
fn configure<'a>(
    config: &Config,
    flavour: Flavour,
    build: &Path,
    enter: &impl Fn() -> Enter<'a>,
    step: &crate::progress::Step,
) -> Result<()> {
    fs::write(build.join("wanted.config"), config.text())?;
    let mut command = make(enter());
    command
        .env("KCONFIG_ALLCONFIG", format!("{BUILD}/wanted.config"))
        .arg("allnoconfig");
    exec::run(&mut command, &format!("config-{flavour}"), step)?;
    let unmet = config.unmet(&Config::parse(&fs::read_to_string(build.join(".config"))?));
    if !unmet.is_empty() {
        bail!(
            "the configuration of kernel {flavour} does not hold; correct scripts/flavours/{{{}}}.config:\n    {}",
            fragments(flavour).join(","),
            unmet.join("\n    ")
        );
    }
    Ok(())
}

/// Builds the image and the modules, and installs both in `path`.
fn compile<'a>(
    flavour: Flavour,
    path: &Path,
    enter: &impl Fn() -> Enter<'a>,
    step: &crate::progress::Step,
) -> Result<()> {
    exec::run(
        make(enter()).args(["bzImage", "modules"]),
        &format!("kernel-{flavour}"),
        step,
    )?;
    cache::remove(&path.join("lib"))?;
    let mut install = make(enter().bind(path, "/kernel/out"));
    install.args(["INSTALL_MOD_PATH=/kernel/out", "modules_install"]);
    exec::run(&mut install, &format!("modules-{flavour}"), step)?;
    let build = path.join("build");
    cache::remove(
        &path
            .join("lib/modules")
            .join(release(&build)?)
            .join("build"),
    )?;
    let image = path.join("vmlinuz");
    let new = path.join("vmlinuz.new");
    fs::copy(build.join("arch/x86/boot/bzImage"), &new)?;
    fs::rename(&new, &image)?;
    Ok(())
}

/// Copies a tree with its times, which make looks at.
fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    let status = Command::new("cp")
        .args(["-a", "--reflink=auto"])
        .arg(from)
        .arg(to)
        .status()?;
    check!(
        status.success(),
        "cannot copy {} to {}",
        from.display(),
        to.display()
    );
    Ok(())
}

/// Makes a copy of `drivers/block` that knows the driver.
fn patch_block(source: &Path, block: &Path) -> Result<()> {
    copy_tree(&source.join("drivers/block"), block)?;
    let edit = |name: &str, change: &dyn Fn(String) -> Option<String>| -> Result<()> {
        let path = block.join(name);
        let text = change(fs::read_to_string(&path)?)
            .with_context(|| format!("drivers/block/{name} is not what it used to be"))?;
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    };
    edit("Makefile", &|text| {
        Some(text + "\nobj-$(CONFIG_BLK_DEV_RUST_PMEM) += pmem/\n")
    })?;
    edit("Kconfig", &|text| {
        let end = text.rfind("\nendif")?;
        let (menu, rest) = text.split_at(end);
        Some(format!("{menu}\nsource \"{DRIVER}/Kconfig\"\n{rest}"))
    })?;
    fs::create_dir(block.join("pmem"))?;
    Ok(())
}

/// The files that the driver is built from: their paths in the repository.
fn sources() -> Result<Vec<PathBuf>> {
    let mut files = vec![PathBuf::from("Kbuild"), PathBuf::from("Kconfig")];
    for dir in ["drivers", "src"] {
        for entry in WalkDir::new(repo::dir().join(dir)).sort_by_file_name() {
            let entry = entry?;
            let path = entry.path();
            let source = path
                .extension()
                .is_some_and(|ext| ["rs", "c", "h", "S"].iter().any(|e| ext == *e));
            // A build in the source tree leaves these.
            let generated = path.ends_with("bindings_generated.rs")
                || path.to_string_lossy().ends_with(".mod.c");
            if entry.file_type().is_file() && source && !generated {
                files.push(path.strip_prefix(repo::dir())?.to_path_buf());
            }
        }
    }
    Ok(files)
}

fn content_key(files: &[PathBuf]) -> Result<String> {
    let mut parts = Vec::new();
    for file in files {
        parts.push(file.as_os_str().as_encoded_bytes().to_vec());
        parts.push(
            fs::read(repo::dir().join(file))
                .with_context(|| format!("cannot read {}", file.display()))?,
        );
    }
    Ok(cache::key(parts))
}

/// Makes `to` hold these files of `from` and no others, touching only what differs: make looks at times.
fn mirror(from: &Path, files: &[PathBuf], to: &Path) -> Result<()> {
    for file in files {
        let content = fs::read(from.join(file))?;
        let copy = to.join(file);
        if fs::read(&copy).ok().as_ref() != Some(&content) {
            fs::create_dir_all(copy.parent().unwrap_or(to))?;
            fs::write(&copy, content)
                .with_context(|| format!("cannot write {}", copy.display()))?;
        }
    }
    for entry in WalkDir::new(to) {
        let entry = entry?;
        let known = entry
            .path()
            .strip_prefix(to)
            .is_ok_and(|path| files.iter().any(|file| file == path));
        if entry.file_type().is_file() && !known {
            cache::remove(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file that is touched is compiled again; one that is left behind is compiled still.
    #[test]
    fn a_mirror_touches_only_what_differs() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::create_dir_all(from.join("src")).unwrap();
        fs::write(from.join("Kbuild"), "1").unwrap();
        fs::write(from.join("src/a.rs"), "2").unwrap();
        let files = [PathBuf::from("Kbuild"), PathBuf::from("src/a.rs")];
        mirror(&from, &files, &to).unwrap();
        let time = |name: &str| fs::metadata(to.join(name)).unwrap().modified().unwrap();
        let (kbuild, a) = (time("Kbuild"), time("src/a.rs"));

        std::thread::sleep(std::time::Duration::from_millis(20));
        fs::write(from.join("Kbuild"), "1").unwrap();
        fs::write(from.join("src/a.rs"), "3").unwrap();
        fs::write(to.join("src/old.rs"), "4").unwrap();
        mirror(&from, &files, &to).unwrap();
        assert_eq!(time("Kbuild"), kbuild);
        assert_ne!(time("src/a.rs"), a);
        assert_eq!(fs::read_to_string(to.join("src/a.rs")).unwrap(), "3");
        assert!(!to.join("src/old.rs").exists());
    }

    #[test]
    fn the_driver_is_known_in_block() {
        let dir = tempfile::tempdir().unwrap();
        let (source, block) = (dir.path().join("linux"), dir.path().join("block"));
        let original = source.join("drivers/block");
        fs::create_dir_all(&original).unwrap();
        fs::write(original.join("Makefile"), "obj-y += a.o\n").unwrap();
        let kconfig =
            "menuconfig BLK_DEV\nif BLK_DEV\nconfig A\n\tbool\nif A\nendif\n\nendif # BLK_DEV\n";
        fs::write(original.join("Kconfig"), kconfig).unwrap();
        patch_block(&source, &block).unwrap();
        let patched = fs::read_to_string(block.join("Kconfig")).unwrap();
        let driver = patched
            .find("source \"drivers/block/pmem/Kconfig\"")
            .unwrap();
        assert!(
            patched.find("endif\n").unwrap() < driver
                && driver < patched.find("endif # BLK_DEV").unwrap()
        );
        assert!(fs::read_to_string(block.join("Makefile"))
            .unwrap()
            .contains("+= pmem/\n"));
        assert_eq!(
            fs::read_to_string(original.join("Kconfig")).unwrap(),
            kconfig
        );
    }
}
