// SPDX-License-Identifier: GPL-2.0-only

//! Where this repository and its build products are.

use std::env;
use std::path::{Path, PathBuf};

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
