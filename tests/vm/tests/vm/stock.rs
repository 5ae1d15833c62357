// SPDX-License-Identifier: GPL-2.0-only

//! Other kernels, and other drivers.

use anyhow::{ensure, Result};
use vm_tests::{boot, load, log, machine, wanted, Trace, Use, GIB, MIB, UPPER};
use xtask::flavour::Flavour;
use xtask::vm::PMEM_KO;

const EEXIST: i32 = 17;

/// Debian's kernel for ordinary machines, where file systems are modules.
#[test]
fn debian_amd64() -> Result<()> {
    if !wanted(Flavour::Amd64)? {
        return Ok(());
    }
    boot(machine(Flavour::Amd64)?.module("ext4"), |vm| {
        ensure!(
            vm.kernel().ends_with("deb13-amd64"),
            "this is {}",
            vm.kernel()
        );
        load(vm, "pmem_start=4G pmem_size=1GiB pmem_count=2")?;
        vm.sh(
            "mkfs.ext4 -q -F -b 4096 /dev/pmem1 && mkdir -p /mnt/a && mount -o dax=always /dev/pmem1 /mnt/a
             pmem-guest mmap-sync /mnt/a/x 10000000 1
             umount /mnt/a && e2fsck -fn /dev/pmem1 && mount -o dax=always /dev/pmem1 /mnt/a
             pmem-guest verify /mnt/a/x 10000000 1 && umount /mnt/a",
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
        vm.insmod(PMEM_KO, "")?.unwrap_err();
        let before = Trace::of(vm)?;
        let refused = vm.insmod(PMEM_KO, "pmem_start=4G pmem_size=1GiB")?;
        assert_eq!(refused.map_err(|error| error.errno), Err(EEXIST));
        let said = log(vm)?;
        ensure!(
            said.iter()
                .any(|line| line.contains("pmem0") && line.contains("pmem_first=")),
            "{said:#?}"
        );
        Trace::of(vm)?.check(&before)?;

        // What is nd_pmem's must stay so.
        let taken = vm.insmod(PMEM_KO, "pmem_start=5G pmem_size=512MiB pmem_first=1")?;
        assert_eq!(taken.map_err(|error| error.errno), Err(16));
        Trace::of(vm)?.check(&before)?;

        load(vm, "pmem_start=4G pmem_size=1GiB pmem_first=1")?;
        for (n, disk) in (1..).zip(["pmem0", "pmem1"]) {
            vm.sh(&format!(
                "mkfs.ext4 -q -F -b 4096 /dev/{disk} && mkdir -p /mnt/{disk} && mount -o dax=always /dev/{disk} /mnt/{disk}
                 pmem-guest mmap-sync /mnt/{disk}/x 10000000 {n}"
            ))?;
        }
        for (n, disk) in (1..).zip(["pmem0", "pmem1"]) {
            vm.sh(&format!(
                "pmem-guest verify /mnt/{disk}/x 10000000 {n} && umount /mnt/{disk}"
            ))?;
        }
        vm_tests::unload(vm)
    })
}
