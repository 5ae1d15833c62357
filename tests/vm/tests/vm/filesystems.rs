// SPDX-License-Identifier: GPL-2.0-only

//! File systems with DAX: the page cache is never in between, and the file system is whole afterwards.

use anyhow::Result;
use vm_tests::{boot, load, stock};
use xtask::vm::Vm;

fn use_it(vm: &Vm, mkfs: &str, check: &str) -> Result<()> {
    load(vm, "pmem_start=4G pmem_size=1GiB pmem_count=2")?;
    vm.sh(&format!(
        "{mkfs} /dev/pmem1; mkdir -p /mnt/a; mount -o dax=always /dev/pmem1 /mnt/a"
    ))?;
    let mounts = vm.sh("grep /mnt/a /proc/mounts")?;
    assert!(mounts.contains("dax=always"), "{mounts}");
    // STATX_ATTR_DAX
    let statx =
        vm.sh("touch /mnt/a/x; xfs_io -c 'statx -r' /mnt/a/x | grep 'stat.attributes ='")?;
    let bits = u64::from_str_radix(
        statx.trim().rsplit_once("0x").map_or("", |(_, hex)| hex),
        16,
    )?;
    assert_ne!(bits & 0x20_0000, 0, "{statx}");

    vm.sh("mkdir /mnt/a/many; for i in $(seq 300); do echo $i >/mnt/a/many/$i; done")?;
    for (n, len) in (1..).zip([1, 511, 4096, 1 << 20, 33_333_333]) {
        vm.sh(&format!(
            "pmem-guest fill /mnt/a/fill{n} {len} {n}
             pmem-guest mmap-msync /mnt/a/msync{n} {len} {n}
             pmem-guest mmap-sync /mnt/a/sync{n} {len} {n}
             pmem-guest mmap-verify /mnt/a/fill{n} {len} {n}
             pmem-guest verify /mnt/a/msync{n} {len} {n}"
        ))?;
    }
    // A hole, and the zeroed rest of a block.
    vm.sh(
        "xfs_io -f -c 'pwrite -S 0xff 0 20000' -c 'fpunch 4096 4096' -c 'fzero 9000 100' -c fsync /mnt/a/holes >/dev/null
         umount /mnt/a",
    )?;
    vm.sh(check)?;
    vm.sh("mount -o dax=always /dev/pmem1 /mnt/a")?;
    for (n, len) in (1..).zip([1, 511, 4096, 1 << 20, 33_333_333]) {
        for name in ["fill", "msync", "sync"] {
            vm.sh(&format!("pmem-guest verify /mnt/a/{name}{n} {len} {n}"))?;
        }
    }
    let data = vm.read("/mnt/a/holes")?;
    for (at, &byte) in data.iter().enumerate() {
        let zero = (4096..8192).contains(&at) || (9000..9100).contains(&at);
        assert_eq!(byte, if zero { 0 } else { 0xff }, "byte {at}");
    }
    assert_eq!(data.len(), 20000);
    assert_eq!(vm.sh("cat /mnt/a/many/* | wc -l")?.trim(), "300");
    vm.sh("umount /mnt/a")?;
    Ok(())
}

#[test]
fn ext4_with_dax() -> Result<()> {
    boot(stock()?, |vm| {
        use_it(vm, "mkfs.ext4 -q -F -b 4096", "e2fsck -fn /dev/pmem1")
    })
}

#[test]
fn xfs_with_dax() -> Result<()> {
    boot(stock()?.module("xfs"), |vm| {
        use_it(
            vm,
            "mkfs.xfs -q -f -m reflink=0",
            "xfs_repair -n /dev/pmem1",
        )
    })
}

/// Without DAX, the same disk is an ordinary one.
#[test]
fn ext4_through_the_page_cache() -> Result<()> {
    boot(stock()?, |vm| {
        load(vm, "pmem_start=4G pmem_size=512MiB")?;
        vm.sh(
            "mkfs.ext4 -q -F -b 4096 /dev/pmem0; mkdir -p /mnt/a; mount -o dax=never /dev/pmem0 /mnt/a
             pmem-guest fill /mnt/a/x 33333333 1
             pmem-guest mmap-msync /mnt/a/y 3333333 2
             umount /mnt/a; e2fsck -fn /dev/pmem0; mount -o dax=never /dev/pmem0 /mnt/a
             pmem-guest verify /mnt/a/x 33333333 1
             pmem-guest verify /mnt/a/y 3333333 2
             umount /mnt/a",
        )?;
        Ok(())
    })
}
