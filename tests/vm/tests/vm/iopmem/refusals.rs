// SPDX-License-Identifier: GPL-2.0-only

//! Functions that cannot be served, and parameters that make no sense.

use super::{bind, machine, place, serve, unbind, DRIVER, ID, LONG};
use anyhow::{ensure, Result};
use vm_tests::{boot, load, log, stock, unload, End, Persistent, Trace, MIB};
use xtask::vm::{Vm, PMEM_KO};

const EBUSY: i32 = 16;
const ENODEV: i32 = 19;
const EINVAL: i32 = 22;

/// Fails if there is a disk.
const NO_DISK: &str = "test -z \"$(ls /dev/iopmem* 2>/dev/null)\"";

/// A line of the log has all of `words`.
fn is_said(vm: &Vm, words: &[&str]) -> Result<()> {
    let said = log(vm)?;
    ensure!(
        said.iter()
            .any(|line| words.iter().all(|&word| line.contains(word))),
        "no line has {words:?}: {said:#?}"
    );
    Ok(())
}

/// The driver is loaded, and refuses `function` with this error.
fn is_refused(vm: &Vm, function: &str, errno: i32) -> Result<()> {
    let ran = vm.try_sh(&format!(
        "echo iopmem >/sys/bus/pci/devices/{function}/driver_override
         pmem-guest time-write {DRIVER}/bind {function}"
    ))?;
    ensure!(
        ran.end != End::Exit(0) && ran.stderr.contains(&format!("(os error {errno})")),
        "{function}: {ran:?}, not error {errno}"
    );
    vm.sh(&format!(
        "test ! -e /sys/bus/pci/devices/{function}/driver
         {NO_DISK}
         echo >/sys/bus/pci/devices/{function}/driver_override"
    ))
    .map(drop)
}

/// A load, to compare with: the first one of a module leaves names.
fn trace(vm: &Vm) -> Result<Trace> {
    load(vm, "")?;
    unload(vm)?;
    Trace::of(vm)
}

/// Parameters, and what must be said of them.
#[test]
fn bad_parameters_name_their_fault() -> Result<()> {
    let memory = Persistent::new(4 * MIB)?;
    boot(machine(&memory)?, |vm| {
        let before = trace(vm)?;
        for (params, words) in [
            ("iopmem_bar=6", ["iopmem_bar=6:", "0, 1, 2, 3, 4 or 5"]),
            ("iopmem_bar=-1", ["iopmem_bar=-1:", "0, 1, 2, 3, 4 or 5"]),
            ("iopmem_bar=x", ["iopmem_bar=x:", "0, 1, 2, 3, 4 or 5"]),
            ("iopmem_cache=wt", ["iopmem_cache=wt:", "wc, uc or wb"]),
            ("iopmem_cache=WC", ["iopmem_cache=WC:", "wc, uc or wb"]),
            ("iopmem_dax=2", ["iopmem_dax=2:", "1 or 0"]),
            ("iopmem_dax=yes", ["iopmem_dax=yes:", "1 or 0"]),
            ("iopmem=2", ["iopmem=2:", "1 or 0"]),
            (
                "iopmem_persistent=maybe",
                ["iopmem_persistent=maybe:", "1 or 0"],
            ),
            ("iopmem_p2pdma=1M", ["iopmem_p2pdma=1M:", "2MiB"]),
            ("iopmem_p2pdma=all", ["iopmem_p2pdma=all:", "number"]),
        ] {
            let refused = vm.insmod(PMEM_KO, params)?;
            ensure!(
                refused.as_ref().map_err(|error| error.errno) == Err(EINVAL),
                "{params}: {refused:?}"
            );
            is_said(vm, &words)?;
            Trace::of(vm)?.check(&before)?;
        }
        Ok(())
    })
}

/// Who wants none of this says so.
#[test]
fn functions_can_be_left_to_others() -> Result<()> {
    let memory = Persistent::new(4 * MIB)?;
    boot(stock()?.bar(&memory), |vm| {
        let refused = vm.insmod(PMEM_KO, "iopmem=0 pmem_virtio=0")?;
        ensure!(
            refused.map_err(|error| error.errno) == Err(EINVAL),
            "it loads with nothing to do"
        );
        load(vm, "iopmem=0 pmem_start=4G pmem_size=64M")?;
        vm.sh(&format!("test -b /dev/pmem0; test ! -e {DRIVER}"))?;
        unload(vm)?;
        // Without new_id, it takes none that are not known to be such.
        load(vm, "pmem_virtio=0")?;
        vm.sh(&format!(
            "test -d {DRIVER}
             {NO_DISK}
             test ! -e /sys/bus/pci/devices/{}/driver",
            vm.bar(0)
        ))?;
        unload(vm)?;
        // Beside a range.
        serve(vm, "pmem_start=4G pmem_size=64M")?;
        vm.sh("grep -h . /sys/block/pmem0/pmem/provider /sys/block/iopmem0/pmem/provider | tr '\\n' ' ' | grep -q '^memmap pci $'")?;
        unload(vm)
    })
}

/// A parameter may name a BAR that the function does not have, which is no reason to take another one.
#[test]
fn a_bar_that_is_not_there_is_refused() -> Result<()> {
    let memory = Persistent::new(4 * MIB)?;
    boot(machine(&memory)?, |vm| {
        let before = trace(vm)?;
        let function = vm.bar(0);
        for bar in [1, 3, 4, 5] {
            load(vm, &format!("iopmem_bar={bar}"))?;
            is_refused(vm, &function, EINVAL)?;
            is_said(
                vm,
                &[&function, &format!("iopmem_bar={bar}"), "is not there"],
            )?;
            unload(vm)?;
        }
        // Its registers, which are memory, but less of it than a sector.
        load(vm, "iopmem_bar=0")?;
        is_refused(vm, &function, EINVAL)?;
        is_said(vm, &[&function, "BAR 0 of 256B", "too small", "512B"])?;
        unload(vm)?;
        Trace::of(vm)?.check(&before)?;
        // All of it is more than there is of it.
        for share in ["4MiB", "1GiB"] {
            load(vm, &format!("iopmem_p2pdma={share}"))?;
            is_refused(vm, &function, EINVAL)?;
            is_said(vm, &[&function, &format!("iopmem_p2pdma={share}")])?;
            unload(vm)?;
        }
        Trace::of(vm)?.check(&before)?;
        // By its number, it is the one that is chosen without.
        serve(vm, "iopmem_bar=2")?;
        vm.sh("test -b /dev/iopmem0")?;
        unload(vm)
    })
}

/// What there was no room for between a bridge's addresses has none. Of the same function's other BARs, none is meant.
#[test]
fn a_bar_without_an_address_is_refused() -> Result<()> {
    let memory = Persistent::new(64 * MIB)?;
    let machine = stock()?.upper(0).bar_later(&memory);
    boot(machine, |vm| {
        let function = vm.bar(0);
        vm.plug_bar(0)?;
        vm.sh(&format!(
            "for i in $(seq 300); do test -e /sys/bus/pci/devices/{function}/driver_override && exit 0; sleep 0.1; done
             exit 1"
        ))?;
        let before = trace(vm)?;
        for params in ["", "iopmem_bar=2", "iopmem_dax=0"] {
            load(vm, params)?;
            is_refused(vm, &function, ENODEV)?;
            is_said(vm, &[&function, "BAR 2", "has no address", "pci=realloc"])?;
            unload(vm)?;
        }
        Trace::of(vm)?.check(&before)?;
        // As it did not stand in the way of the kernel either, which can take the device back.
        vm.unplug_bar(0, LONG)
    })
}

/// A serial port has registers in I/O space, and nothing else.
#[test]
fn a_function_without_memory_is_refused() -> Result<()> {
    const SERIAL: &str = "0000:00:1c.0";
    let machine = stock()?.upper(0).qemu(&[
        "-chardev",
        "null,id=nowhere",
        "-device",
        "pci-serial,chardev=nowhere,addr=0x1c",
    ]);
    boot(machine, |vm| {
        let before = trace(vm)?;
        // Its own driver is built in.
        vm.sh(&format!(
            "cd /sys/bus/pci/devices/{SERIAL}
             test $(cat vendor device | tr -d '\\n') = 0x1b360x0002
             test ! -e driver || echo {SERIAL} >driver/unbind"
        ))?;
        load(vm, "")?;
        is_refused(vm, SERIAL, ENODEV)?;
        is_said(vm, &[SERIAL, "none of its BARs is memory"])?;
        // Also by its identity.
        vm.sh(&format!(
            "echo 1b36 0002 >{DRIVER}/new_id
             {NO_DISK}
             test ! -e /sys/bus/pci/devices/{SERIAL}/driver"
        ))?;
        unload(vm)?;
        load(vm, "iopmem_bar=0")?;
        is_refused(vm, SERIAL, EINVAL)?;
        is_said(vm, &[SERIAL, "iopmem_bar=0", "I/O ports"])?;
        unload(vm)?;
        Trace::of(vm)?.check(&before)
    })
}

/// What another driver has is not taken from it.
#[test]
fn a_function_or_a_bar_of_others_is_refused() -> Result<()> {
    let memories = [Persistent::new(4 * MIB)?, Persistent::new(4 * MIB)?];
    let machine = stock()?.upper(0).bar(&memories[0]).bar(&memories[1]);
    boot(machine, |vm| {
        let before = trace(vm)?;
        let (first, second) = (vm.bar(0), vm.bar(1));
        let start = place(vm, &first)?;
        // The same memory as a range of the parameters', which come first.
        load(vm, &format!("pmem_start={start:#x} pmem_size={}", 4 * MIB))?;
        is_refused(vm, &first, EBUSY)?;
        is_said(
            vm,
            &[&first, &format!("{start:#x}"), "claimed by another driver"],
        )?;
        // The one that nobody has is served.
        vm.sh(&format!(
            "echo {ID} >{DRIVER}/new_id
             test -b /dev/pmem0
             test -b /dev/iopmem0
             test ! -e /dev/iopmem1
             test -e {DRIVER}/{second}; test ! -e {DRIVER}/{first}"
        ))?;
        unload(vm)?;
        Trace::of(vm)?.check(&before)
    })
}

/// Other drivers of the PCI bus and this one take turns.
#[test]
fn a_function_moves_between_drivers() -> Result<()> {
    const OTHER: &str = "/sys/bus/pci/drivers/uio_pci_generic";
    let memory = Persistent::new(4 * MIB)?;
    let Some(machine) = vm_tests::debian()? else {
        return Ok(());
    };
    let machine = machine.upper(0).module("uio_pci_generic").bar(&memory);
    boot(machine, |vm| {
        let function = vm.bar(0);
        vm.sh(&format!("echo {ID} >{OTHER}/new_id"))?;
        let theirs = vm.sh(&format!("test -e {OTHER}/{function} && echo yes || true"))?;
        if theirs.trim() != "yes" {
            // It wants an interrupt, which not all machines give such a device.
            eprintln!("skipped: uio_pci_generic does not take the device");
            return Ok(());
        }
        load(vm, "")?;
        vm.sh(&format!("echo {ID} >{DRIVER}/new_id"))?;
        vm.sh(NO_DISK)?;
        let ran = vm.try_sh(&format!("pmem-guest time-write {DRIVER}/bind {function}"))?;
        ensure!(
            ran.stderr.contains(&format!("(os error {EBUSY})")),
            "{ran:?}"
        );
        for _ in 0..3 {
            vm.sh(&format!("echo {function} >{OTHER}/unbind"))?;
            bind(vm, &function)?;
            vm.sh("test -b /dev/iopmem0")?;
            unbind(vm, &function)?;
            vm.sh(&format!(
                "echo {function} >{OTHER}/bind; test ! -e /dev/iopmem0"
            ))?;
        }
        unload(vm)
    })
}
