// SPDX-License-Identifier: GPL-2.0-only

//! Devices that cannot be served, and loads that serve none.

use super::{machine, serve, DRIVER, LONG, START};
use anyhow::{ensure, Result};
use vm_tests::{boot, load, log, stock, unload, Persistent, Trace, GIB, MIB};
use xtask::vm::{Builder, Vm, PMEM_KO};

const EINVAL: i32 = 22;

/// A machine whose first device cannot be served, and its second one can.
fn with_a_good_one<'a>(
    bad: &'a Persistent,
    address: u64,
    good: &'a Persistent,
) -> Result<Builder<'a>> {
    Ok(stock()?
        .upper(0)
        .virtio_pmem_at(bad, address)
        .virtio_pmem_at(good, START + 2 * GIB))
}

/// The good device is a disk, the bad one is left alone, with a line in the log that has all of `words`.
fn serves_the_good_one(vm: &Vm, words: &[&str]) -> Result<()> {
    serve(vm)?;
    let said = log(vm)?;
    ensure!(
        said.iter()
            .any(|line| words.iter().all(|&word| line.contains(word))),
        "{words:?}: {said:#?}\n{}",
        vm.dmesg()?
    );
    vm.sh("test $(ls /dev/pmem* | wc -l) = 1
           dd if=/dev/zero of=/dev/pmem0 bs=1M count=1 conv=fsync 2>/dev/null")?;
    let bound = vm.sh(&format!(
        "cd /sys/bus/virtio/drivers/{DRIVER}; echo virtio[0-9]*"
    ))?;
    ensure!(bound.split_whitespace().count() == 1, "{bound}");
    unload(vm)
}

/// A load, to compare with: the first one of a module leaves names.
fn trace(vm: &Vm) -> Result<Trace> {
    serve(vm)?;
    unload(vm)?;
    Trace::of(vm)
}

/// DAX needs whole sections of struct pages.
#[test]
fn a_size_that_is_misaligned_is_refused() -> Result<()> {
    let (bad, good) = (Persistent::new(3 * MIB)?, Persistent::new(64 * MIB)?);
    boot(with_a_good_one(&bad, START, &good)?, |vm| {
        let before = trace(vm)?;
        serves_the_good_one(vm, &["0x100000000", "2MiB aligned"])?;
        Trace::of(vm)?.check(&before)
    })
}

#[test]
fn an_address_that_is_misaligned_is_refused() -> Result<()> {
    let (bad, good) = (Persistent::new(64 * MIB)?, Persistent::new(64 * MIB)?);
    boot(with_a_good_one(&bad, START + MIB, &good)?, |vm| {
        let before = trace(vm)?;
        serves_the_good_one(vm, &["0x100100000", "2MiB aligned"])?;
        Trace::of(vm)?.check(&before)
    })
}

/// Two users of the same memory are one too many, also if the firmware is wrong about it.
#[test]
fn memory_that_is_ram_is_refused() -> Result<()> {
    let (bad, good) = (Persistent::new(256 * MIB)?, Persistent::new(64 * MIB)?);
    let machine = with_a_good_one(&bad, START, &good)?
        // The kernel keeps RAM in blocks of 128 MiB.
        .cmdline(format!("memmap=128M@{:#x}", START + 128 * MIB));
    boot(machine, |vm| {
        let iomem = vm.text("/proc/iomem")?;
        ensure!(
            iomem.contains("108000000-10fffffff : System RAM"),
            "{iomem}"
        );
        let before = trace(vm)?;
        serves_the_good_one(vm, &["0x100000000", "System RAM"])?;
        Trace::of(vm)?.check(&before)
    })
}

/// What another driver has claimed is not taken from it.
#[test]
fn memory_that_is_claimed_is_refused() -> Result<()> {
    let memory = Persistent::new(64 * MIB)?;
    boot(machine(&memory)?, |vm| {
        // The same memory as a range of the parameters', which come first.
        load(vm, "pmem_start=4G pmem_size=64M")?;
        let provider = vm.text("/sys/block/pmem0/pmem/provider")?;
        ensure!(provider.trim() == "memmap", "{provider}");
        let said = log(vm)?;
        ensure!(
            said.iter()
                .any(|line| line.contains("virtio") && line.contains("0x100000000")),
            "{said:#?}"
        );
        vm.sh("test ! -e /dev/pmem1")?;
        unload(vm)
    })
}

/// Who wants the kernel's own driver for virtio-pmem, and this one for ranges, says so.
#[test]
fn devices_can_be_left_to_others() -> Result<()> {
    let memory = Persistent::new(64 * MIB)?;
    boot(stock()?.virtio_pmem(&memory), |vm| {
        // Nothing to do is a mistake.
        let refused = vm.insmod(PMEM_KO, "pmem_virtio=0 iopmem=0")?;
        ensure!(
            refused.map_err(|error| error.errno) == Err(EINVAL),
            "it loads with nothing to do"
        );
        let before = Trace::of(vm)?;
        for bad in ["pmem_virtio=2", "pmem_virtio=-1", "pmem_virtio=yes"] {
            ensure!(vm.insmod(PMEM_KO, bad)?.is_err(), "{bad} is accepted");
        }
        Trace::of(vm)?.check(&before)?;
        load(vm, "pmem_virtio=0 pmem_start=4G pmem_size=64M")?;
        vm.sh(&format!(
            "test -b /dev/pmem0; test ! -e /dev/pmem1; test ! -e /sys/bus/virtio/drivers/{DRIVER}"
        ))?;
        unload(vm)?;
        // Both at once.
        load(vm, "pmem_start=4G pmem_size=64M")?;
        vm.sh_for(
            "for disk in pmem0 pmem1; do
                 mkfs.ext4 -q -F -b 4096 /dev/$disk; mkdir -p /mnt/$disk; mount -o dax=always /dev/$disk /mnt/$disk
                 pmem-guest fill /mnt/$disk/x 1000000 1
             done
             grep -h . /sys/block/pmem*/pmem/provider | sort | tr '\\n' ' ' | grep -q '^memmap virtio $'
             for disk in pmem0 pmem1; do pmem-guest verify /mnt/$disk/x 1000000 1; umount /mnt/$disk; done",
            LONG,
        )?;
        unload(vm)
    })
}
