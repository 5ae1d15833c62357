// SPDX-License-Identifier: GPL-2.0-only

//! Where this repository and its build products are.

use anyhow::Result;
use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use walkdir::WalkDir;

/// The root of the repository.
pub fn dir() -> &'static Path {
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR"));
    scripts.parent().unwrap_or(scripts)
}

/// Cargo's target directory, where the module's build directories are, too.
pub fn target() -> PathBuf {
    match env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => dir_relative_to_repo(Path::new(&dir)),
        None => dir().join("target"),
    }
}

fn dir_relative_to_repo(path: &Path) -> PathBuf {
    dir().join(path)
}

/// What the module is built from, as seen from the root of the repository. What a build in the source tree has left is
/// none of it.
pub fn module_sources() -> Result<Vec<PathBuf>> {
    let is_source = |path: &Path| {
        let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
        let source = [".rs", ".c", ".h"].iter().any(|end| name.ends_with(end));
        source && name != "bindings_generated.rs" && !name.ends_with(".mod.c")
    };
    let mut files = vec![PathBuf::from("Kbuild"), PathBuf::from("Kconfig")];
    for directory in ["drivers", "src"] {
        files.extend(
            files_in(directory)?
                .into_iter()
                .filter(|path| is_source(path)),
        );
    }
    Ok(files)
}

/// The files below `directory`, all as seen from the root of the repository.
pub fn files_in(directory: &str) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in WalkDir::new(dir().join(directory)).sort_by_file_name() {
        let entry = entry?;
        if entry.file_type().is_file() {
            files.push(entry.path().strip_prefix(dir())?.to_owned());
        }
    }
    Ok(files)
}
