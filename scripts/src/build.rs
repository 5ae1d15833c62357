// SPDX-License-Identifier: GPL-2.0-only

//! Builds pmem.ko for a kernel.

use crate::flavour::Flavour;
use crate::kernel::Kernel;
use crate::module;
use crate::progress::Progress;
use crate::root::Root;
use anyhow::Result;
use std::path::PathBuf;

/// Builds pmem.ko for a kernel.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Debian's kernel of this release (as `uname -r` says it): 7.3.4+deb13-amd64, for example.
    #[arg(long, value_name = "RELEASE", conflicts_with_all = ["flavour", "kdir"])]
    kernel: Option<String>,

    /// One of the kernels that the tests use. `builtin` is a kernel with the driver in it.
    #[arg(long, value_enum, default_value_t = Flavour::Cloud)]
    flavour: Flavour,

    /// Your own kernel's tree, configured with CONFIG_RUST=y and built.
    #[arg(long, value_name = "DIR", env = "KDIR", conflicts_with = "flavour")]
    kdir: Option<PathBuf>,
}

/// Builds the module, and says where it is and how to load it.
pub fn run(args: &Args) -> Result<()> {
    let progress = Progress::new();
    let root = Root::ensure(&progress)?;
    let kernel = match (&args.kernel, &args.kdir) {
        (Some(release), _) => Kernel::from_release(release, &root, &progress)?,
        (None, Some(kdir)) => Kernel::from_kdir(kdir, &root)?,
        (None, None) => Kernel::ensure(args.flavour, &root, &progress)?,
    };
    if kernel.flavour == Some(Flavour::Builtin) {
        println!("{}", kernel.image.unwrap_or_default().display());
        println!("\nThe driver is in this kernel. Boot it with: pmem.pmem_start=4G pmem.pmem_size=2G memmap=2G$4G");
        return Ok(());
    }
    let module = module::build(&kernel, &root, &progress)?;
    println!("{}", module.ko.display());
    println!(
        "\nFor Linux {release}. Reserve memory with memmap=2G$4G on its command line (in GRUB: memmap=2G\\\\\\$4G), \
         then:\n    insmod pmem.ko pmem_start=4G pmem_size=2G",
        release = kernel.release
    );
    Ok(())
}
