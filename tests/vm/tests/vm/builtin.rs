// SPDX-License-Identifier: GPL-2.0-only

//! The driver, linked into the kernel: Kconfig's defaults, and the command line that overrides them.

use anyhow::{ensure, Result};
use vm_tests::{boot, log, machine, wanted, MIB};
use xtask::flavour::Flavour;
use xtask::vm::Vm;

fn disks(vm: &Vm) -> Result<Vec<(String, u64)>> {
    let names = vm.sh("cd /sys/block && ls -d pmem* 2>/dev/null || true")?;
    names
        .lines()
        .map(|name| {
            let sectors: u64 = vm
                .text(&format!("/sys/block/{name}/size"))?
                .trim()
                .parse()?;
            Ok((name.to_owned(), sectors * 512 / MIB))
        })
        .collect()
}

#[test]
fn kconfig_gives_the_defaults() -> Result<()> {
    if !wanted(Flavour::Builtin)? {
        return Ok(());
    }
    boot(machine(Flavour::Builtin)?, |vm| {
        assert_eq!(disks(vm)?, [("pmem0".to_owned(), 64)]);
        vm.sh(
            "mkfs.ext4 -q -F -b 4096 /dev/pmem0; mkdir -p /mnt/a; mount -o dax=always /dev/pmem0 /mnt/a
             pmem-guest mmap-sync /mnt/a/x 1000000 1; pmem-guest verify /mnt/a/x 1000000 1; umount /mnt/a",
        )?;
        assert_eq!(
            vm.text("/sys/module/pmem/parameters/pmem_start")?.trim(),
            "4G"
        );
        assert_eq!(
            vm.text("/sys/module/pmem/parameters/pmem_size")?.trim(),
            "64M"
        );
        Ok(())
    })
}

#[test]
fn the_command_line_overrides_kconfig() -> Result<()> {
    if !wanted(Flavour::Builtin)? {
        return Ok(());
    }
    let machine = machine(Flavour::Builtin)?
        .cmdline("pmem.pmem_start=4608M")
        .cmdline("pmem.pmem_size=256MiB")
        .cmdline("pmem.pmem_count=2")
        .cmdline("pmem.pmem_first=3");
    boot(machine, |vm| {
        assert_eq!(
            disks(vm)?,
            [("pmem3".to_owned(), 128), ("pmem4".to_owned(), 128)]
        );
        let iomem = vm.text("/proc/iomem")?;
        assert!(iomem.contains("120000000-12fffffff : pmem"), "{iomem}");
        Ok(())
    })
}

/// A machine whose memory was not reserved must boot all the same, and say why there is no disk.
#[test]
fn a_range_that_is_not_reserved_does_not_stop_the_boot() -> Result<()> {
    if !wanted(Flavour::Builtin)? {
        return Ok(());
    }
    boot(machine(Flavour::Builtin)?.no_ranges(), |vm| {
        assert_eq!(disks(vm)?, []);
        let said = log(vm)?;
        ensure!(
            said.iter()
                .any(|line| line.contains("System RAM") && line.contains("memmap=")),
            "{said:#?}"
        );
        Ok(())
    })
}

/// An empty parameter is how to turn a built-in default off.
#[test]
fn nothing_is_asked_and_nothing_is_said() -> Result<()> {
    if !wanted(Flavour::Builtin)? {
        return Ok(());
    }
    let machine = machine(Flavour::Builtin)?
        // The suites have devices of their own, of which the driver says what is wrong with them.
        .cmdline("kunit.enable=0")
        .cmdline("pmem.pmem_start=")
        .cmdline("pmem.pmem_size=");
    boot(machine, |vm| {
        assert_eq!(disks(vm)?, []);
        assert_eq!(log(vm)?, [""; 0]);
        Ok(())
    })
}
