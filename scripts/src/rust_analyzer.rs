// SPDX-License-Identifier: GPL-2.0-only

//! `cargo xtask rust-analyzer`: what an editor must know of the module.
//!
//! The module is no cargo package: it is compiled by Kbuild, in the build root, with the kernel's own crates. The kernel
//! describes these in a `rust-project.json`, by paths inside of the build root. Here they become the host's, and the module
//! joins them, with what Kbuild compiled it with. The rest of the repository is a cargo workspace, which editors know.

use crate::flavour::Flavour;
use crate::kernel::{self, Kernel};
use crate::progress::Progress;
use crate::root::Root;
use crate::{cache, exec, module, repo};
use anyhow::{ensure, Context, Result};
use serde_json::{json, Value};
use std::fs::{self, Permissions};
use std::os::unix::fs::{symlink, PermissionsExt};
use std::path::{Path, PathBuf};

/// Tell an editor of the module: write rust-project.json for rust-analyzer.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The kernel whose crates the editor sees.
    #[arg(long, value_enum, default_value_t = Flavour::Cloud)]
    flavour: Flavour,
}

/// Writes the file, and says how an editor comes to know of it.
pub fn run(args: &Args) -> Result<()> {
    ensure!(
        args.flavour != Flavour::Builtin,
        "the driver is a part of that kernel; take another flavour"
    );
    let progress = Progress::new();
    let root = Root::ensure(&progress)?;
    let kernel = Kernel::ensure(args.flavour, &root, &progress)?;
    let project = project(&kernel, &root, &progress)?;
    println!("{}", project.display());
    let compiler = exec::stdout(root.command("rustc").arg("-V"))?;
    let version = compiler.split(' ').nth(1).unwrap_or_default();
    println!(
        "\nThe kernel's crates are those of rustc {version}, and want the rust-analyzer of that release:\n    \
         rustup toolchain install {version} --profile minimal --component rust-analyzer\n    \
         rustup which --toolchain {version} rust-analyzer\n\n\
         Open {drivers} in a window of its own, with these settings and the path that was printed:\n    \
         \"rust-analyzer.server.path\": \"...\",\n    \
         \"rust-analyzer.linkedProjects\": [\"{project}\"]",
        drivers = repo::dir().join("drivers").display(),
        project = project.display(),
    );
    Ok(())
}

/// Writes `rust-project.json` for `kernel`, checks it, and returns where it is.
pub fn project(kernel: &Kernel, root: &Root, progress: &Progress) -> Result<PathBuf> {
    // With it, there are the bindings, and a record of how it was compiled.
    let ko = module::build(kernel, root, progress)?.ko;
    let objects = ko.parent().context("a file is in a directory")?;

    let step = progress.step("rust-project.json");
    let out = repo::target().join("rust-analyzer");
    let generated = out.join("kernel");
    fs::create_dir_all(&generated)
        .with_context(|| format!("cannot create {}", generated.display()))?;
    // An external module of no files: nothing but the kernel's crates.
    let mut make = kernel.make(root);
    make.arg(format!("M={}", generated.display()))
        .arg("rust-analyzer");
    exec::run(&mut make, "rust-analyzer", &step)?;
    let text = fs::read_to_string(generated.join("rust-project.json"))
        .context("the kernel has written no rust-project.json")?;
    let mut project: Value = serde_json::from_str(&text)?;

    let moved = [
        (Path::new(kernel::SOURCE), kernel.source.as_path()),
        (Path::new(kernel::BUILD), kernel.build.as_path()),
        (Path::new("/usr"), &root.path().join("usr")),
    ];
    map_paths(&mut project, &moved);
    complete_core(&mut project)?;
    let command = fs::read_to_string(objects.join("drivers/.main.o.cmd"))
        .context("Kbuild has not recorded how the module is compiled")?;
    let bindings = objects.join("drivers/kapi/bindings_generated.rs");
    add_module(&mut project, &command, &bindings)?;
    let sysroot = out.join("sysroot");
    make_sysroot(root, &sysroot)?;
    project["sysroot"] = json!(sysroot);
    check(&project)?;

    let path = out.join("rust-project.json");
    fs::write(&path, serde_json::to_vec_pretty(&project)?)
        .with_context(|| format!("cannot write {}", path.display()))?;
    step.done();
    Ok(path)
}

/// Replaces the first part of each string in `value` that is a path below one of `moved`.
fn map_paths(value: &mut Value, moved: &[(&Path, &Path)]) {
    match value {
        Value::String(text) => {
            let path = moved.iter().find_map(|(from, to)| {
                let rest = Path::new(text.as_str()).strip_prefix(from).ok()?;
                // Joining nothing would add a slash.
                Some(match rest.as_os_str().is_empty() {
                    true => to.to_path_buf(),
                    false => to.join(rest),
                })
            });
            if let Some(path) = path {
                *text = path.to_string_lossy().into_owned();
            }
        }
        Value::Array(values) => {
            for value in values {
                map_paths(value, moved);
            }
        }
        Value::Object(values) => {
            for value in values.values_mut() {
                map_paths(value, moved);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// Lets `core` have its parts that are beside it: the intrinsics of CPUs.
fn complete_core(project: &mut Value) -> Result<()> {
    let crates = project["crates"].as_array_mut();
    let core = crates
        .into_iter()
        .flatten()
        .find(|krate| krate["display_name"] == "core")
        .context("the kernel has no crate core")?;
    let sources = Path::new(core["root_module"].as_str().unwrap_or_default())
        .parent()
        .context("the crate core has no root")?;
    let library = sources.ancestors().nth(2).unwrap_or(sources);
    core["source"] = json!({
        "include_dirs": [sources, library.join("stdarch/crates/core_arch/src")],
        "exclude_dirs": [],
    });
    Ok(())
}

/// Adds the crate of the module, which `command` compiles.
fn add_module(project: &mut Value, command: &str, bindings: &Path) -> Result<()> {
    let crates = project["crates"]
        .as_array_mut()
        .context("rust-project.json has no crates")?;
    let (line, _) = command
        .split_once("\n\n")
        .context("the command that compiles the module is not understood")?;
    // Not to be changed, and not to be looked through for errors.
    for krate in crates.iter_mut() {
        krate["is_workspace_member"] = json!(false);
    }
    let find = |name: &str| {
        crates
            .iter()
            .position(|krate| krate["display_name"] == name)
            .with_context(|| format!("the kernel has no crate {name}"))
    };
    let mut deps = Vec::new();
    for name in std::iter::once("core").chain(values_of(line, "--extern")) {
        deps.push(json!({"crate": find(name)?, "name": name}));
    }
    ensure!(
        deps.len() > 1,
        "the module is compiled with no crate of the kernel's"
    );
    // What the kernel's configuration is, all of its crates have.
    let mut cfg = crates[find("kernel")?]["cfg"].clone();
    let all = cfg
        .as_array_mut()
        .context("the crate kernel has no configuration")?;
    all.extend(values_of(line, "--cfg").map(Value::from));
    let kernel = &crates[find("kernel")?];
    let module = json!({
        "display_name": "pmem",
        "root_module": repo::dir().join("drivers/main.rs"),
        "is_workspace_member": true,
        "deps": deps,
        "cfg": cfg,
        "edition": kernel["edition"],
        "env": {
            "OBJTREE": kernel["env"]["OBJTREE"],
            "PMEM_BINDINGS": bindings,
            "RUST_MODFILE": kernel["env"]["RUST_MODFILE"],
        },
        "source": {
            // `src` is a module of it, by a path attribute.
            "include_dirs": [
                repo::dir().join("drivers"),
                repo::dir().join("src"),
                bindings.parent(),
            ],
            "exclude_dirs": [],
        },
    });
    crates.push(module);
    Ok(())
}

/// The words that follow `option` in a command.
fn values_of<'a>(command: &'a str, option: &'a str) -> impl Iterator<Item = &'a str> {
    let mut words = command.split_whitespace();
    std::iter::from_fn(move || {
        words.find(|word| *word == option)?;
        words.next()
    })
}

/// Makes a toolchain of the build root's, which expands the kernel's macros: only the compiler that built them can load
/// them. Its programs run outside of the build root, by its own loader and with its own libraries.
fn make_sysroot(root: &Root, sysroot: &Path) -> Result<()> {
    let usr = root.path().join("usr");
    let libraries = usr.join("lib/x86_64-linux-gnu");
    cache::remove(sysroot)?;
    for program in ["bin/rustc", "libexec/rust-analyzer-proc-macro-srv"] {
        let script = sysroot.join(program);
        let directory = script.parent().context("a program is in a directory")?;
        fs::create_dir_all(directory)
            .with_context(|| format!("cannot create {}", directory.display()))?;
        let text = format!(
            "#!/bin/sh\nexec '{}' --library-path '{}' '{}' \"$@\"\n",
            libraries.join("ld-linux-x86-64.so.2").display(),
            libraries.display(),
            usr.join(program).display(),
        );
        fs::write(&script, text)
            .and_then(|()| fs::set_permissions(&script, Permissions::from_mode(0o755)))
            .with_context(|| format!("cannot write {}", script.display()))?;
    }
    symlink(usr.join("lib"), sysroot.join("lib")).context("cannot link the libraries")?;
    let said = exec::stdout(std::process::Command::new(sysroot.join("bin/rustc")).arg("-V"))?;
    ensure!(
        said.starts_with("rustc "),
        "the build root's rustc says {said:?}"
    );
    Ok(())
}

/// Checks that all files and directories exist that the project names.
fn check(project: &Value) -> Result<()> {
    let crates = project["crates"].as_array().map_or(&[][..], Vec::as_slice);
    let strings = |value: &Value| -> Vec<PathBuf> {
        let list = value.as_array().into_iter().flatten();
        list.filter_map(Value::as_str).map(PathBuf::from).collect()
    };
    let mut paths = vec![PathBuf::from(
        project["sysroot"].as_str().unwrap_or_default(),
    )];
    for krate in crates {
        let root_module = krate["root_module"].as_str();
        paths.push(root_module.context("a crate has no root")?.into());
        paths.extend(krate["proc_macro_dylib_path"].as_str().map(PathBuf::from));
        paths.extend(krate["env"]["PMEM_BINDINGS"].as_str().map(PathBuf::from));
        paths.extend(strings(&krate["source"]["include_dirs"]));
    }
    for path in paths {
        ensure!(
            path.exists(),
            "rust-project.json names {}, which does not exist",
            path.display()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMAND: &str = "savedcmd_drivers/main.o := OBJTREE=/kernel/build rustc --edition=2021 --cfg PMEM_DAX_BUS \
                           --cfg MODULE @/kernel/build/include/generated/rustc_cfg --extern pin_init --extern kernel \
                           -o drivers/main.o drivers/main.rs\n\nsource_drivers/main.o := main.rs --cfg NO\n";

    fn kernels() -> Value {
        json!({
            "crates": [
                {"display_name": "core", "root_module": "/usr/lib/rustlib/src/rust/library/core/src/lib.rs"},
                {"display_name": "pin_init", "root_module": "/kernel/src/rust/pin-init/src/lib.rs"},
                {
                    "display_name": "kernel",
                    "root_module": "/kernel/src/rust/kernel/lib.rs",
                    "cfg": ["CONFIG_RUST"],
                    "edition": "2021",
                    "env": {"OBJTREE": "/kernel/build", "RUST_MODFILE": "/kernel/srcs"},
                    "source": {"include_dirs": ["/kernel/build/rust"]},
                },
            ],
            "sysroot": "/usr",
        })
    }

    #[test]
    fn paths_of_the_build_root_become_the_hosts() {
        let mut project = kernels();
        let moved = [
            (Path::new("/kernel/src"), Path::new("/cache/source")),
            (Path::new("/kernel/build"), Path::new("/cache/kernel/build")),
            (Path::new("/usr"), Path::new("/cache/root/usr")),
        ];
        map_paths(&mut project, &moved);
        let [core, _, kernel] = project["crates"].as_array().unwrap().as_slice() else {
            panic!();
        };
        assert_eq!(
            core["root_module"],
            "/cache/root/usr/lib/rustlib/src/rust/library/core/src/lib.rs"
        );
        assert_eq!(kernel["root_module"], "/cache/source/rust/kernel/lib.rs");
        assert_eq!(kernel["env"]["OBJTREE"], "/cache/kernel/build");
        // The beginning of a word is not a part of a path.
        assert_eq!(kernel["env"]["RUST_MODFILE"], "/kernel/srcs");
        assert_eq!(
            kernel["source"]["include_dirs"][0],
            "/cache/kernel/build/rust"
        );
        assert_eq!(project["sysroot"], "/cache/root/usr");

        complete_core(&mut project).unwrap();
        let library = "/cache/root/usr/lib/rustlib/src/rust/library";
        assert_eq!(
            project["crates"][0]["source"]["include_dirs"],
            json!([
                format!("{library}/core/src"),
                format!("{library}/stdarch/crates/core_arch/src")
            ])
        );
    }

    #[test]
    fn the_module_is_known_as_kbuild_compiles_it() {
        let mut project = kernels();
        add_module(&mut project, COMMAND, Path::new("/out/bindings.rs")).unwrap();
        let module = &project["crates"][3];
        assert_eq!(
            module["cfg"],
            json!(["CONFIG_RUST", "PMEM_DAX_BUS", "MODULE"])
        );
        assert_eq!(
            module["deps"],
            json!([
                {"crate": 0, "name": "core"},
                {"crate": 1, "name": "pin_init"},
                {"crate": 2, "name": "kernel"},
            ])
        );
        assert_eq!(module["env"]["PMEM_BINDINGS"], "/out/bindings.rs");
        assert_eq!(module["env"]["OBJTREE"], "/kernel/build");
        let members = project["crates"].as_array().unwrap().iter();
        let members: Vec<_> = members.map(|krate| &krate["is_workspace_member"]).collect();
        assert_eq!(members, [false, false, false, true]);

        let unknown = COMMAND.replace("--extern kernel", "--extern zerocopy");
        let error = add_module(&mut kernels(), &unknown, Path::new("/out")).unwrap_err();
        assert_eq!(error.to_string(), "the kernel has no crate zerocopy");
    }

    #[test]
    fn a_path_that_leads_nowhere_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("lib.rs");
        fs::write(&file, "").unwrap();
        let mut project = json!({
            "crates": [{"root_module": file, "source": {"include_dirs": [dir.path()]}}],
            "sysroot": dir.path(),
        });
        check(&project).unwrap();
        for pointer in [
            "/crates/0/root_module",
            "/crates/0/source/include_dirs/0",
            "/sysroot",
        ] {
            let was = project.pointer(pointer).cloned().unwrap();
            *project.pointer_mut(pointer).unwrap() = json!(dir.path().join("nothing"));
            let error = check(&project).unwrap_err().to_string();
            assert!(error.ends_with("nothing, which does not exist"), "{error}");
            *project.pointer_mut(pointer).unwrap() = was;
        }
    }
}
