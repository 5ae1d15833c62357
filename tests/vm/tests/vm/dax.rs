// SPDX-License-Identifier: GPL-2.0-only

//! Memory of the disk, mapped into programs.

use anyhow::{ensure, Context, Result};
use vm_tests::{boot, load, stock};
use xtask::vm::Vm;

const MKFS_EXT4: &str = "mkfs.ext4 -q -F -b 4096 -E stride=512,stripe_width=512 /dev/pmem0";
const MKFS_XFS: &str = "mkfs.xfs -q -f -m reflink=0 -d su=2m,sw=1,extszinherit=512 /dev/pmem0";

fn mount(vm: &Vm, mkfs: &str) -> Result<()> {
    load(vm, "pmem_start=4G pmem_size=1GiB")?;
    vm.sh(&format!(
        "{mkfs}; mkdir -p /mnt/a; mount -o dax=always /dev/pmem0 /mnt/a"
    ))
    .map(drop)
}

/// One fault instead of 512, and one entry of the TLB: what huge mappings are for.
pub(crate) fn is_mapped_by_a_pmd(vm: &Vm) -> Result<()> {
    let output = vm.sh(
        "cd /sys/kernel/tracing; echo >trace; echo 1 >events/fs_dax/enable
         pmem-guest pmd /mnt/a/huge
         echo 0 >events/fs_dax/enable; cat trace",
    )?;
    let faults: u64 = output
        .split_once("\"faults\":")
        .and_then(|(_, rest)| rest.split([',', '}']).next()?.parse().ok())
        .with_context(|| format!("no faults in {output}"))?;
    let events = |name: &str, result: &str| {
        output
            .lines()
            .filter(|line| line.contains(name) && line.contains(result))
            .count()
    };
    ensure!(faults <= 4, "2 MiB took {faults} faults:\n{output}");
    ensure!(
        events("dax_pmd_fault_done:", "NOPAGE") >= 1,
        "no PMD was inserted:\n{output}"
    );
    Ok(())
}

#[test]
fn a_pmd_maps_2_mib_of_ext4() -> Result<()> {
    boot(stock()?, |vm| {
        mount(vm, MKFS_EXT4)?;
        is_mapped_by_a_pmd(vm)
    })
}

#[test]
fn a_pmd_maps_2_mib_of_xfs() -> Result<()> {
    boot(stock()?.module("xfs"), |vm| {
        mount(vm, MKFS_XFS)?;
        is_mapped_by_a_pmd(vm)
    })
}

/// MAP_SYNC is a promise; without synchronous DAX the kernel refuses it.
#[test]
fn map_sync_works_with_dax_and_only_with_dax() -> Result<()> {
    boot(stock()?, |vm| {
        mount(vm, MKFS_EXT4)?;
        vm.sh("pmem-guest mmap-sync /mnt/a/x 10000000 1; pmem-guest verify /mnt/a/x 10000000 1")?;
        vm.sh("umount /mnt/a; mount -o dax=never /dev/pmem0 /mnt/a")?;
        let ran = vm.try_sh("pmem-guest mmap-sync /mnt/a/y 4096 1")?;
        ensure!(
            ran.stderr.contains("os error 95"),
            "MAP_SYNC without DAX: {ran:?}"
        );
        Ok(())
    })
}

/// A driver that sends a DAX file to another disk hands the memory's pages to it: they must be real pages.
#[test]
fn o_direct_from_a_dax_mapping() -> Result<()> {
    boot(stock()?, |vm| {
        load(vm, "pmem_start=4G pmem_size=1GiB pmem_count=2")?;
        vm.sh(&format!(
            "{MKFS_EXT4}; mkdir -p /mnt/a; mount -o dax=always /dev/pmem0 /mnt/a"
        ))?;
        vm.sh("pmem-guest fill /mnt/a/x 16777216 7
             pmem-guest odirect-from-dax /mnt/a/x /dev/pmem1 16777216
             dd if=/dev/pmem1 of=/tmp/y bs=1M count=16 iflag=direct 2>/dev/null
             pmem-guest verify /tmp/y 16777216 7")?;
        // And the other way: read(2) with O_DIRECT into a DAX mapping, as fio does with a memory file. The last
        // block stays in it.
        vm.sh(
            "truncate -s 4M /mnt/a/buffer
             fio --name=x --filename=/dev/pmem1 --direct=1 --rw=read --bs=64k --size=4m --ioengine=psync \\
                 --iomem=mmapshared:/mnt/a/buffer >/dev/null
             dd if=/dev/pmem1 of=/tmp/z bs=64k skip=63 count=1 2>/dev/null
             cmp -n 65536 /tmp/z /mnt/a/buffer",
        )?;
        Ok(())
    })
}

/// A file's end must read as zero after it was cut and grown again: `dax_zero_page_range`.
#[test]
fn what_is_cut_off_comes_back_as_zeroes() -> Result<()> {
    boot(stock()?, |vm| {
        mount(vm, MKFS_EXT4)?;
        vm.sh(
            "xfs_io -f -c 'pwrite -q -S 0xff 0 1m' -c 'truncate 5000' -c 'truncate 100000' -c fsync /mnt/a/x
             echo 3 >/proc/sys/vm/drop_caches",
        )?;
        let data = vm.read("/mnt/a/x")?;
        assert_eq!(data.len(), 100_000);
        assert!(data[..5000].iter().all(|&byte| byte == 0xff));
        assert!(data[5000..].iter().all(|&byte| byte == 0));
        Ok(())
    })
}
