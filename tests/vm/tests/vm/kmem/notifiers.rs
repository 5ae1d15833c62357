// SPDX-License-Identifier: GPL-2.0-only

//! Others in the kernel have a say when memory goes online or offline, and may say no: before the driver is asked, or
//! after it has begun.

use super::{attribute, load_movable, prepare, ram, said, set_state, take_down, try_state};
use anyhow::{ensure, Result};
use vm_tests::{boot, load, stock, Trace, MIB};
use xtask::vm::{Vm, PMEM_KO};

/// A module of the kernel's that says no when it is told to.
const MODULE: &str = "memory_notifier_error_inject";

const LOAD: &str = "kmem_start=4G kmem_size=256M kmem_format=blk";

/// Has it say no to `event`, with this errno, or not any more.
fn say(vm: &Vm, event: &str, errno: i32) -> Result<()> {
    let path = "/sys/kernel/debug/notifier-error-inject/memory/actions";
    vm.write(
        &format!("{path}/MEM_GOING_{event}/error"),
        format!("{}", -errno).as_bytes(),
    )
}

#[test]
fn memory_that_others_refuse() -> Result<()> {
    boot(stock()?.module(MODULE), |vm| {
        prepare(vm)?;
        vm.sh("pmem-guest fill /tmp/x 4194304 5")?;
        for priority in [1, -1] {
            vm.sh(&format!(
                "rmmod {MODULE}; insmod /modules/{MODULE}.ko priority={priority}"
            ))?;
            let trace = Trace::of(vm)?;
            say(vm, "ONLINE", 12)?;
            let refused = vm.insmod(PMEM_KO, LOAD)?;
            ensure!(
                refused
                    .as_ref()
                    .is_err_and(|error| error.errno == super::EAGAIN),
                "{refused:?}: {}",
                said(vm)
            );
            Trace::of(vm)?.check(&trace)?;

            say(vm, "ONLINE", 0)?;
            load(vm, LOAD)?;
            let blocks = ram(vm)?;
            vm.sh("dd if=/tmp/x of=/dev/kmem1 bs=256k oflag=direct")?;
            say(vm, "OFFLINE", 16)?;
            for _ in 0..2 {
                let refused = try_state(vm, "unplugged")?;
                ensure!(refused.is_err(), "it is unplugged: {}", said(vm));
                assert_eq!(attribute(vm, "state")?, "online");
                // As before: served, with the same pages.
                vm.sh("pmem-guest compare /tmp/x /dev/kmem1 4194304")?;
                ensure!(
                    ram(vm)? + 4 * MIB / super::PAGE >= blocks - super::SPARE,
                    "pages are gone"
                );
                vm.sh("dd if=/tmp/x of=/dev/kmem1 bs=256k oflag=direct conv=notrunc")?;
            }
            // What needs no memory to go offline works.
            set_state(vm, "offline")?;
            set_state(vm, "online")?;
            say(vm, "OFFLINE", 0)?;
            vm.sh("pmem-guest compare /tmp/x /dev/kmem1 4194304; blkdiscard /dev/kmem1")?;
            take_down(vm)?;
            Trace::of(vm)?.check(&trace)?;
        }
        load_movable(vm, LOAD)?;
        take_down(vm)
    })
}
