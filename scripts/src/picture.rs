// SPDX-License-Identifier: GPL-2.0-only

//! `cargo xtask picture`: what the documents show of a terminal, drawn of what programs print in a VM.

use crate::flavour::Flavour;
use crate::progress::Progress;
use crate::repo;
use crate::vm::{Persistent, Setup, GIB, MIB, PMEM_KO};
use anyhow::{ensure, Context, Result};
use std::fs;

/// Where the picture of `pmemctl list` is in the repository.
pub const LIST: &str = "Documentation/pmemctl/list.svg";

const LICENCE: &str = "<!-- SPDX-License-Identifier: GPL-2.0-only -->";

/// Draw what the documents show of a terminal anew.
#[derive(clap::Args, Debug)]
pub struct Args {}

/// Draws it, and says where it is.
pub fn run(_: &Args) -> Result<()> {
    let progress = Progress::new();
    let setup = Setup::new(Flavour::Cloud, &progress)?;
    let path = repo::dir().join(LIST);
    let step = progress.step("pmemctl list");
    let picture = list(&setup, &progress)?;
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)
            .with_context(|| format!("cannot create {}", directory.display()))?;
    }
    fs::write(&path, picture).with_context(|| format!("cannot write {}", path.display()))?;
    step.done();
    println!("{}", path.display());
    Ok(())
}

/// What `pmemctl list` says in a machine with a disk of each kind, of which one is mounted and one has bad sectors.
pub fn list(setup: &Setup, progress: &Progress) -> Result<String> {
    let shared = Persistent::new(GIB)?;
    let board = Persistent::new(256 * MIB)?;
    let vm = setup
        .vm(progress)
        .name("picture")
        .upper(2 * GIB)
        .virtio_pmem(&shared)
        .bar(&board)
        .module("ext4")
        .pmemctl()?
        .start()?;
    vm.insmod(PMEM_KO, "pmem_start=4G pmem_size=2G pmem_count=2")?
        .context("the module does not load")?;
    vm.sh("echo 1af4 1110 >/sys/bus/pci/drivers/iopmem/new_id
         mkfs.ext4 -q -F /dev/pmem0
         mkdir -p /mnt && mount -o dax=always /dev/pmem0 /mnt
         echo 2048 16 >/sys/block/pmem1/badblocks")?;
    let command = "pmemctl list";
    let said = vm.sh(command)?;
    vm.check_clean()?;
    ensure!(
        said.lines().count() == 5,
        "there should be four disks:\n{said}"
    );
    // The prompt of root, as nothing but a terminal shows it.
    let screen = format!("\u{1b}[1m# {command}\u{1b}[0m\n{}", said.trim_end());
    let picture = anstyle_svg::Term::new().render_svg(&screen);
    Ok(format!("{LICENCE}\n{}\n", picture.trim_end()))
}
