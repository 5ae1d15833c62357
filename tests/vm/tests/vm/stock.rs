// SPDX-License-Identifier: GPL-2.0-only

//! Other kernels, and other drivers.

use anyhow::{ensure, Result};
use vm_tests::{boot, load, log, machine, wanted, Trace, Use, GIB, MIB, UPPER};
use xtask::flavour::Flavour;
use xtask::vm::PMEM_KO;

const EBUSY: i32 = 16;

/// Debian's kernel for ordinary machines, where file systems are modules.
#[test]
fn debian_amd64() -> Result<()> {
    if !wanted(Flavour::Amd64)? {
        return Ok(());
    }
    boot(machine(Flavour::Amd64)?.module("ext4").packed(), |vm| {
        ensure!(
            vm.kernel().ends_with("deb13-amd64"),
            "this is {}",
            vm.kernel()
        );
        load(vm, "pmem_start=4G pmem_size=1GiB pmem_count=2")?;
        vm.sh(
            "mkfs.ext4 -q -F -b 4096 /dev/pmem1; mkdir -p /mnt/a; mount -o dax=always /dev/pmem1 /mnt/a
             pmem-guest mmap-sync /mnt/a/x 10000000 1
             umount /mnt/a; e2fsck -fn /dev/pmem1; mount -o dax=always /dev/pmem1 /mnt/a
             pmem-guest verify /mnt/a/x 10000000 1; umount /mnt/a",
        )?;
        vm_tests::unload(vm)
    })
}

/// The kernel's own nd_pmem has disks of the same names.
#[test]
fn beside_nd_pmem() -> Result<()> {
    if !wanted(Flavour::Test)? {
        return Ok(());
    }
    let machine = machine(Flavour::Test)?
        .upper(2 * GIB)
        .range(Use::Reserved, UPPER, GIB)
        .range(Use::Protected, UPPER + GIB, 512 * MIB)
        .module("nd_pmem")
        .module("nd_e820");
    boot(machine, |vm| {
        vm.sh("for i in $(seq 100); do test -b /dev/pmem0 && break; sleep 0.1; done; test -b /dev/pmem0")?;
        vm.insmod(PMEM_KO, "pmem_virtio=0 iopmem=0")?.unwrap_err();
        let before = Trace::of(vm)?;
        let refused = vm.insmod(PMEM_KO, "pmem_start=4G pmem_size=1GiB")?;
        // Not EEXIST, which the module loader keeps for a module that is loaded twice.
        assert_eq!(refused.map_err(|error| error.errno), Err(EBUSY));
        let said = log(vm)?;
        ensure!(
            said.iter()
                .any(|line| line.contains("pmem0") && line.contains("pmem_first=")),
            "{said:#?}"
        );
        Trace::of(vm)?.check(&before)?;

        // What is nd_pmem's must stay so.
        let taken = vm.insmod(PMEM_KO, "pmem_start=5G pmem_size=512MiB pmem_first=1")?;
        assert_eq!(taken.map_err(|error| error.errno), Err(EBUSY));
        Trace::of(vm)?.check(&before)?;

        load(vm, "pmem_start=4G pmem_size=1GiB pmem_first=1")?;
        for (n, disk) in (1..).zip(["pmem0", "pmem1"]) {
            vm.sh(&format!(
                "mkfs.ext4 -q -F -b 4096 /dev/{disk}; mkdir -p /mnt/{disk}; mount -o dax=always /dev/{disk} /mnt/{disk}
                 pmem-guest mmap-sync /mnt/{disk}/x 10000000 {n}"
            ))?;
        }
        for (n, disk) in (1..).zip(["pmem0", "pmem1"]) {
            vm.sh(&format!(
                "pmem-guest verify /mnt/{disk}/x 10000000 {n}; umount /mnt/{disk}"
            ))?;
        }
        vm_tests::unload(vm)
    })
}

/// All disks or none, also when only a name in the middle is taken. The kernel's own complaint about names, with a
/// stack, does not show.
#[test]
fn a_name_taken_in_the_middle_is_refused_before_anything_is_added() -> Result<()> {
    if !wanted(Flavour::Test)? {
        return Ok(());
    }
    let machine = machine(Flavour::Test)?
        .range(Use::Reserved, UPPER, 512 * MIB)
        .range(Use::Protected, UPPER + 512 * MIB, 256 * MIB)
        .range(Use::Protected, UPPER + 768 * MIB, 256 * MIB)
        .module("nd_pmem")
        .module("nd_e820");
    boot(machine, |vm| {
        vm.sh(
            "for i in $(seq 100); do test -b /dev/pmem1 && break; sleep 0.1; done; test -b /dev/pmem1
             echo namespace0.0 >/sys/bus/nd/drivers/nd_pmem/unbind; test ! -e /dev/pmem0",
        )?;
        // What the first load of a module leaves.
        vm.insmod(PMEM_KO, "pmem_virtio=0 iopmem=0")?.unwrap_err();
        let before = Trace::of(vm)?;
        let refused = vm.insmod(PMEM_KO, "pmem_start=4G pmem_size=512MiB pmem_count=3")?;
        assert_eq!(refused.map_err(|error| error.errno), Err(EBUSY));
        let said = log(vm)?;
        ensure!(
            said.last()
                .is_some_and(|line| line.starts_with("pmem1: the name is taken")),
            "{said:#?}"
        );
        let dmesg = vm.dmesg()?;
        ensure!(
            !dmesg.contains("duplicate filename") && !dmesg.contains("pmem0: 1"),
            "{dmesg}"
        );
        Trace::of(vm)?.check(&before)?;

        load(
            vm,
            "pmem_start=4G pmem_size=512MiB pmem_count=3 pmem_first=2",
        )?;
        vm_tests::unload(vm)
    })
}
