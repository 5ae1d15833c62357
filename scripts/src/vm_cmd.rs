// SPDX-License-Identifier: GPL-2.0-only

//! `cargo xtask vm`: boot a VM with the module and get a shell in it.

use crate::flavour::Flavour;
use crate::progress::{time, Progress};
use crate::vm::{Setup, GIB, MIB, PMEM_KO};
use anyhow::{ensure, Result};
use pmem_core::size;
use std::io::{stdin, IsTerminal};

/// Boot a VM with the module and get a shell in it.
///
/// The module is /pmem.ko in the guest. The memory from 4 GiB on is reserved for it, unless the kernel's arguments
/// say `memmap=` themselves. The VM and what was in its memory are gone when the shell ends.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The kernel to boot.
    #[arg(long, value_enum, default_value_t = Flavour::Cloud)]
    flavour: Flavour,
    /// Size of the memory from 4 GiB on, the second NUMA node, such as 2GiB.
    #[arg(long, value_name = "SIZE", default_value = "2GiB", value_parser = mebibytes)]
    memory: u64,
    /// Size of the ordinary memory; at most 2 GiB.
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = mebibytes)]
    ram: u64,
    /// Number of CPUs.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: u32,
    /// A module of the kernel's to load at boot, such as xfs. May be given again.
    #[arg(long, value_name = "NAME")]
    module: Vec<String>,
    /// Arguments for the kernel's command line.
    #[arg(last = true, value_name = "KERNEL ARGUMENTS")]
    kernel: Vec<String>,
}

/// A size of whole MiB.
fn mebibytes(text: &str) -> Result<u64, String> {
    match size::parse(text) {
        Ok(bytes) if bytes > 0 && bytes % MIB == 0 => Ok(bytes),
        Ok(_) => Err("must be one or more whole MiB".into()),
        Err(error) => Err(error.to_string()),
    }
}

/// Carries the command out.
pub fn run(args: &Args) -> Result<()> {
    ensure!(
        stdin().is_terminal(),
        "a shell needs a terminal; `cargo xtask run --no-shell` shows the driver at work without one"
    );
    let progress = Progress::new();
    let setup = Setup::new(args.flavour, &progress)?;
    let mut vm = setup
        .vm(&progress)
        .name("shell")
        .ram(args.ram)
        .upper(args.memory)
        .cpus(args.cpus)
        .packed();
    if args
        .kernel
        .iter()
        .any(|argument| argument.starts_with("memmap="))
    {
        vm = vm.no_ranges();
    }
    for argument in &args.kernel {
        vm = vm.cmdline(argument);
    }
    // Debian's has them as modules.
    for module in ["ext4"]
        .into_iter()
        .chain(args.module.iter().map(String::as_str))
    {
        vm = vm.module(module);
    }
    let step = progress.step("boot");
    let vm = vm.start()?;
    step.done();
    progress.line(&format!(
        "\nLinux {}, {}, booted in {}. Ctrl-D powers it off.",
        vm.kernel(),
        vm.accelerator(),
        time(vm.boot_time())
    ));
    if setup.module.is_some() {
        progress.line(&format!(
            "Try: insmod {PMEM_KO} pmem_start=4G pmem_size={}MiB && lsblk && dmesg | tail\n\
             or:  insmod {PMEM_KO} kmem_start=4G kmem_size={}MiB kmem_format=blk && lsblk && numastat -m\n",
            args.memory.min(2 * GIB) / MIB,
            // Whole memory blocks.
            (args.memory / MIB) & !127
        ));
    }
    vm.shell()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_whole_mebibytes() {
        assert_eq!(mebibytes("2GiB"), Ok(2 * GIB));
        for bad in ["0", "1", "1.5GiB", "1kB", ""] {
            assert!(mebibytes(bad).is_err(), "{bad:?}");
        }
    }
}
