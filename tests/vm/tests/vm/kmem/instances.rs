// SPDX-License-Identifier: GPL-2.0-only

//! Ranges that are device-dax instances.

use super::{attribute, load_movable, set_state, try_state, unload, EBUSY};
use anyhow::{ensure, Result};
use vm_tests::{boot, stock, Use, GIB, UPPER};
use xtask::vm::{Builder, Vm};

/// A machine whose second node is an NVDIMM to its kernel.
fn machine() -> Result<Builder<'static>> {
    let drivers = ["nd_pmem", "nd_e820", "dax_pmem", "device_dax", "kmem"];
    Ok(drivers
        .into_iter()
        .fold(stock()?.range(Use::Protected, UPPER, GIB), Builder::module))
}

/// Makes an instance of it that no driver has.
fn make(vm: &Vm) -> Result<()> {
    vm.sh(
        "ndctl create-namespace -f -e namespace0.0 -m devdax >/dev/null
         echo dax0.0 >/sys/bus/dax/drivers/device_dax/unbind",
    )
    .map(drop)
}

/// An administrator binds an instance as to the kernel's own driver, and finds the data again when it is bound the next
/// time.
#[test]
fn an_instance_is_bound_and_unbound() -> Result<()> {
    boot(machine()?, |vm| {
        load_movable(vm, "kmem_dax=1 kmem_format=blk")?;
        make(vm)?;
        vm.sh("echo dax0.0 >/sys/bus/dax/drivers/pmem/new_id")?;
        assert_eq!(attribute(vm, "state")?, "online");
        assert_eq!(attribute(vm, "format")?, "blk");
        vm.sh(
            "mkfs.ext4 -q -F /dev/kmem1; mkdir -p /mnt/a; mount /dev/kmem1 /mnt/a
             pmem-guest fill /mnt/a/file 20000000 1",
        )?;
        let refused = try_state(vm, "unplugged")?.err().map(|error| error.errno);
        assert_eq!(refused, Some(EBUSY));
        vm.sh("umount /mnt/a; echo dax0.0 >/sys/bus/dax/drivers/pmem/unbind")?;
        ensure!(
            !vm.text("/proc/partitions")?.contains("kmem1"),
            "the disk is still there"
        );
        ensure!(
            !vm.text("/proc/iomem")?.contains("System RAM (pmem)"),
            "the memory is still there"
        );
        unload(vm)?;

        // What is there wins.
        load_movable(vm, "kmem_dax=1 kmem_format=none")?;
        vm.sh("echo dax0.0 >/sys/bus/dax/drivers/pmem/new_id
             mount /dev/kmem1 /mnt/a; pmem-guest verify /mnt/a/file 20000000 1
             umount /mnt/a")?;
        set_state(vm, "unplugged")?;
        vm.sh("echo dax0.0 >/sys/bus/dax/drivers/pmem/unbind")?;
        unload(vm)
    })
}

/// The kernel's own drivers get instances as before, unless one is bound to ours by its name.
#[test]
fn no_instance_is_taken_unasked() -> Result<()> {
    boot(machine()?, |vm| {
        load_movable(vm, "kmem_dax=1 kmem_format=blk")?;
        make(vm)?;
        let bound = vm.sh("ls /sys/bus/dax/drivers/pmem")?;
        ensure!(!bound.contains("dax0.0"), "{bound}");
        vm.sh("echo dax0.0 >/sys/bus/dax/drivers/device_dax/bind")?;
        unload(vm)
    })
}
