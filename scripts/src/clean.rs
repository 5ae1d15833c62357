// SPDX-License-Identifier: GPL-2.0-only

//! Removes what was built.

use crate::flavour::Flavour;
use crate::progress::Progress;
use crate::root::Root;
use crate::{cache, kernel, repo};
use anyhow::Result;
use std::fs;

/// Removes what was built.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The build root, the kernels and their sources as well: everything in the cache.
    #[arg(long)]
    all: bool,
}

/// Removes the modules, logs, what interrupted runs left and what earlier versions of this repository used; or the
/// whole cache.
pub fn run(args: &Args) -> Result<()> {
    let progress = Progress::new();
    // Not under another run's feet.
    let mut locks = vec!["root".to_string(), "source".to_string()];
    locks.extend(Flavour::ALL.map(|flavour| format!("kernel-{flavour}")));
    let _locks = locks
        .iter()
        .map(|name| cache::Lock::take(name, &progress))
        .collect::<Result<Vec<_>>>()?;
    cache::remove(&repo::target().join("kbuild"))?;
    let cache = cache::dir();
    if args.all {
        cache::remove(&cache)?;
        progress.line(&format!("removed {} and the modules", cache.display()));
        return Ok(());
    }
    cache::remove(&cache.join("logs"))?;
    let mut keep = Root::directories().to_vec();
    if let Some(root) = Root::find() {
        keep.extend(kernel::directories(&root)?);
    }
    for dir in ["root", "source", "kernels"] {
        for entry in fs::read_dir(cache.join(dir)).into_iter().flatten() {
            let path = entry?.path();
            if !keep.contains(&path) {
                cache::remove(&path)?;
            }
        }
    }
    progress.line(&format!(
        "removed the modules, the logs and what is out of date; the build root and the kernels stay in {} \
         (`cargo xtask clean --all` removes them)",
        cache.display()
    ));
    Ok(())
}
