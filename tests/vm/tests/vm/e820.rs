// SPDX-License-Identifier: GPL-2.0-only

//! Ranges that firmware, or `memmap=nn!ss`, says are persistent memory.

use anyhow::{ensure, Result};
use vm_tests::{boot, load, log, machine, stock, unload, wanted, Trace, Use, MIB, UPPER};
use xtask::flavour::Flavour;
use xtask::vm::{Vm, PMEM_KO};

const EBUSY: i32 = 16;
const ENODEV: i32 = 19;

/// The disks, in the order of their numbers: name, start, MiB and provider.
fn disks(vm: &Vm) -> Result<Vec<(String, u64, u64, String)>> {
    let text = vm.sh(
        "cd /sys/block; for disk in $(ls -d pmem* 2>/dev/null | sort -V); do
             test ! -e $disk/pmem || echo $disk $(($(cat $disk/pmem/start))) $(cat $disk/pmem/size $disk/pmem/provider)
         done",
    )?;
    text.lines()
        .map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            ensure!(words.len() == 4, "{text}");
            Ok((
                words[0].to_owned(),
                words[1].parse()?,
                words[2].parse::<u64>()? / MIB,
                words[3].to_owned(),
            ))
        })
        .collect()
}

fn says(vm: &Vm, text: &str) -> Result<()> {
    let said = log(vm)?;
    ensure!(
        said.iter().any(|line| line.contains(text)),
        "no {text:?} in {said:#?}"
    );
    Ok(())
}

fn disk(name: &str, start: u64, mib: u64, provider: &str) -> (String, u64, u64, String) {
    (name.to_owned(), start, mib, provider.to_owned())
}

/// One disk for each range, after those of `pmem_start`, and of what is aligned in it.
#[test]
fn a_disk_for_each_range_of_type_12() -> Result<()> {
    let machine = stock()?
        .range(Use::Reserved, UPPER, 256 * MIB)
        .range(Use::Protected, UPPER + 512 * MIB, 128 * MIB)
        .range(Use::Protected, UPPER + 701 * MIB, 7 * MIB)
        .range(Use::Protected, UPPER + 768 * MIB, 256 * MIB);
    boot(machine, |vm| {
        load(vm, "pmem_e820=1")?;
        assert_eq!(
            disks(vm)?,
            [
                disk("pmem0", UPPER + 512 * MIB, 128, "e820"),
                disk("pmem1", UPPER + 702 * MIB, 6, "e820"),
                disk("pmem2", UPPER + 768 * MIB, 256, "e820"),
            ]
        );
        says(vm, "served from 0x12be00000 on")?;
        let iomem = vm.text("/proc/iomem")?;
        ensure!(iomem.contains("  130000000-13fffffff : pmem"), "{iomem}");
        vm.sh(
            "mkfs.ext4 -q -F -b 4096 /dev/pmem2; mkdir -p /mnt/a; mount -o dax=always /dev/pmem2 /mnt/a
             pmem-guest mmap-sync /mnt/a/x 10000000 1; umount /mnt/a",
        )?;
        unload(vm)?;
        let before = Trace::of(vm)?;
        assert_eq!(disks(vm)?, []);

        load(
            vm,
            "pmem_start=4G pmem_size=256M pmem_count=2 pmem_e820=1 pmem_first=3",
        )?;
        assert_eq!(
            disks(vm)?,
            [
                disk("pmem3", UPPER, 128, "memmap"),
                disk("pmem4", UPPER + 128 * MIB, 128, "memmap"),
                disk("pmem5", UPPER + 512 * MIB, 128, "e820"),
                disk("pmem6", UPPER + 702 * MIB, 6, "e820"),
                disk("pmem7", UPPER + 768 * MIB, 256, "e820"),
            ]
        );
        vm.sh(
            "mount -o dax=always /dev/pmem7 /mnt/a; pmem-guest verify /mnt/a/x 10000000 1
             umount /mnt/a",
        )?;
        unload(vm)?;

        // In both lists, and in a part of it.
        load(
            vm,
            "pmem_start=4864M pmem_size=64M pmem_e820=1 pmem_cache=wt",
        )?;
        assert_eq!(
            disks(vm)?,
            [
                disk("pmem0", UPPER + 768 * MIB, 64, "memmap"),
                disk("pmem1", UPPER + 512 * MIB, 128, "e820"),
                disk("pmem2", UPPER + 702 * MIB, 6, "e820"),
            ]
        );
        says(
            vm,
            "[mem 0x130000000-0x13fffffff]: left alone, as [mem 0x130000000-0x133ffffff] is served for pmem_start",
        )?;
        assert_eq!(vm.text("/sys/block/pmem2/pmem/cache")?, "wt\n");
        unload(vm)?;

        let refused = vm.insmod(PMEM_KO, "pmem_e820=1 pmem_first=4294967294")?;
        assert_eq!(refused.map_err(|error| error.errno), Err(22));
        says(vm, "pmem_first plus all of pmem_count is more than")?;
        Trace::of(vm)?.check(&before)
    })
}

#[test]
fn firmware_that_names_no_range() -> Result<()> {
    boot(stock()?, |vm| {
        for params in ["pmem_e820=1", "pmem_e820=1 pmem_start=4G pmem_size=512M"] {
            let refused = vm.insmod(PMEM_KO, params)?;
            assert_eq!(
                refused.map_err(|error| error.errno),
                Err(ENODEV),
                "{params}"
            );
            says(vm, "memmap=2G!4G")?;
            assert_eq!(disks(vm)?, []);
        }
        Ok(())
    })
}

/// The administrator says who has the ranges, and both drivers leave the other's alone.
#[test]
fn beside_nd_e820() -> Result<()> {
    if !wanted(Flavour::Test)? {
        return Ok(());
    }
    let machine = machine(Flavour::Test)?
        .range(Use::Reserved, UPPER, 256 * MIB)
        .range(Use::Protected, UPPER + 512 * MIB, 256 * MIB)
        .module("nd_pmem")
        .module("nd_e820");
    boot(machine, |vm| {
        let nd = "/sys/bus/platform/drivers/e820_pmem";
        let wait = "for i in $(seq 100); do test -b /dev/pmem0 && break; sleep 0.1; done; test -b /dev/pmem0";
        vm.sh(wait)?;
        vm.insmod(PMEM_KO, "pmem_virtio=0 iopmem=0")?.unwrap_err();
        let before = Trace::of(vm)?;

        let refused = vm.insmod(PMEM_KO, "pmem_e820=1 pmem_first=5")?;
        assert_eq!(refused.map_err(|error| error.errno), Err(EBUSY));
        says(
            vm,
            "[mem 0x120000000-0x12fffffff]: left to the kernel's driver nd_e820",
        )?;
        says(vm, "module_blacklist=nd_e820")?;
        says(vm, "no range is left")?;
        Trace::of(vm)?.check(&before)?;
        load(vm, "pmem_e820=1 pmem_start=4G pmem_size=256M pmem_first=5")?;
        assert_eq!(disks(vm)?, [disk("pmem5", UPPER, 256, "memmap")]);
        unload(vm)?;
        Trace::of(vm)?.check(&before)?;

        vm.sh(&format!(
            "echo e820_pmem >{nd}/unbind; test ! -e /dev/pmem0"
        ))?;
        load(vm, "pmem_e820=1")?;
        let ours = [disk("pmem0", UPPER + 512 * MIB, 256, "e820")];
        assert_eq!(disks(vm)?, ours);
        vm.sh("pmem-guest fill /tmp/x 1048576 7; dd if=/tmp/x of=/dev/pmem0 bs=64k oflag=direct 2>/dev/null")?;
        // It takes the device, but not the memory.
        vm.sh(&format!(
            "echo e820_pmem >{nd}/bind; sleep 1; cmp -n 1048576 /tmp/x /dev/pmem0"
        ))?;
        assert_eq!(disks(vm)?, ours);
        unload(vm)?;
        vm.sh(&format!(
            "echo e820_pmem >{nd}/unbind; echo e820_pmem >{nd}/bind
             {wait}
             cmp -n 1048576 /tmp/x /dev/pmem0"
        ))?;
        assert_eq!(disks(vm)?, []);
        Ok(())
    })
}
