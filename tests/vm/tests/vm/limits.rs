// SPDX-License-Identifier: GPL-2.0-only

//! More disks, larger ones, and several loads at once.

use super::lifecycle::check_leaks;
use anyhow::{ensure, Context, Result};
use std::time::Duration;
use vm_tests::{boot, free, has_kasan, load, log, stock, unload, Trace, Use, GIB, MIB, UPPER};
use xtask::vm::{Vm, PMEM_KO};

const ENOMEM: i32 = 12;
const EINVAL: i32 = 22;

/// What takes minutes of an emulated CPU.
const LONG: Duration = Duration::from_secs(400);

/// Writes the first and the last 64 KiB of each disk, all of them differently, and then reads them again.
fn use_both_ends(vm: &Vm, disks: &[(&str, u64)]) -> Result<()> {
    let ends = (1..).zip(
        disks
            .iter()
            .flat_map(|&(disk, size)| [(disk, 0), (disk, size - 65536)]),
    );
    for (seed, (disk, at)) in ends.clone() {
        vm.sh(&format!(
            "pmem-guest fill /tmp/x 65536 {seed}
             dd if=/tmp/x of=/dev/{disk} bs=64k seek={at} oflag=direct,seek_bytes conv=notrunc 2>/dev/null"
        ))?;
    }
    for (seed, (disk, at)) in ends {
        vm.sh(&format!(
            "dd if=/dev/{disk} of=/tmp/x bs=64k count=1 skip={at} iflag=direct,skip_bytes 2>/dev/null
             pmem-guest verify /tmp/x 65536 {seed}"
        ))?;
    }
    Ok(())
}

/// What leaves an object or a page behind for each disk leaves a thousand.
#[test]
fn a_thousand_disks() -> Result<()> {
    boot(stock()?.upper(2 * GIB), |vm| {
        check_leaks(vm, 1000, |n| {
            load(vm, &format!("pmem_start=4G pmem_size=2000M pmem_count={n}"))?;
            let disks = vm.sh("ls -d /sys/block/pmem* | wc -l")?;
            assert_eq!(disks.trim(), n.to_string());
            let size = (2000 * MIB / n as u64) & !(2 * MIB - 1);
            let last = format!("pmem{}", n - 1);
            use_both_ends(vm, &[("pmem0", size), ("pmem1", size), (&last, size)])?;
            vm.sh_for("rmmod pmem", LONG).map(drop)
        })
    })
}

/// One range of 64 GiB (of 16 GiB with KASAN), far more than the machine has RAM, and one below 4 GiB.
#[test]
fn a_large_range_and_a_low_one() -> Result<()> {
    let large = if has_kasan()? { 16 * GIB } else { 64 * GIB };
    let machine = stock()?
        .ram(2 * GIB)
        .upper(large)
        .range(Use::Reserved, UPPER, large)
        .range(Use::Reserved, GIB, 256 * MIB);
    boot(machine, |vm| {
        let before = free(vm)?;
        load(vm, &format!("pmem_start=4G,1G pmem_size={large},256M"))?;
        let struct_pages = before.saturating_sub(free(vm)?);
        assert!(struct_pages > large / 72, "{struct_pages}");
        for (disk, size) in [("pmem0", large), ("pmem1", 256 * MIB)] {
            let sectors = vm.text(&format!("/sys/block/{disk}/size"))?;
            assert_eq!(sectors.trim(), (size / 512).to_string(), "{disk}");
        }
        use_both_ends(vm, &[("pmem0", large), ("pmem1", 256 * MIB)])?;
        vm.sh(
            "mkfs.ext4 -q -F -b 4096 /dev/pmem0; mkdir -p /mnt/a; mount -o dax=always /dev/pmem0 /mnt/a
             pmem-guest mmap-sync /mnt/a/x 33333333 1; pmem-guest verify /mnt/a/x 33333333 1
             umount /mnt/a; e2fsck -fn /dev/pmem0",
        )?;
        unload(vm)?;
        let lost = before.saturating_sub(free(vm)?);
        assert!(lost < 128 * MIB, "{lost} bytes are lost");
        Ok(())
    })
}

/// The struct pages of 512 GiB are 8 GiB, which the machine does not have: it must be told so, and lose nothing.
#[test]
fn a_range_whose_struct_pages_do_not_fit() -> Result<()> {
    let machine = stock()?.range(Use::Reserved, 128 * GIB, 512 * GIB);
    boot(machine, |vm| {
        let available = || -> Result<u64> {
            let kib = vm.sh("sed -n 's/^MemAvailable: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo")?;
            Ok(kib.trim().parse::<u64>()? << 10)
        };
        let before = available()?;
        for params in [
            "pmem_start=128G pmem_size=512G",
            // Of which some would fit.
            "pmem_start=128G pmem_size=512G pmem_count=64",
        ] {
            let refused = vm.insmod(PMEM_KO, params)?;
            assert_eq!(refused.map_err(|error| error.errno), Err(ENOMEM));
            let said = log(vm)?;
            ensure!(
                said.iter()
                    .any(|line| line.contains("not enough memory") && line.contains("1/64")),
                "{said:#?}"
            );
            let lost = before.saturating_sub(available()?);
            ensure!(lost < 32 * MIB, "{params}: {lost} bytes are lost");
        }
        // A part of it that fits is none the worse.
        load(vm, "pmem_start=128G pmem_size=2G")?;
        assert_eq!(
            vm.text("/sys/block/pmem0/size")?.trim(),
            (2 * GIB / 512).to_string()
        );
        unload(vm)?;
        if has_kasan()? {
            // Its shadow of the mapping does not fit either.
            return Ok(());
        }
        // Without struct pages all of it does; there is no memory behind it to write to.
        load(vm, "pmem_start=128G pmem_size=512G pmem_cache=wt")?;
        let size = vm.text("/sys/block/pmem0/size")?;
        assert_eq!(size.trim(), (512 * GIB / 512).to_string());
        unload(vm)
    })
}

/// A node that has no memory but what is reserved is offline: its disks are on the nearest that is not. And as many of
/// them can be had as a refusal says.
#[test]
fn the_most_disks_of_a_node_without_memory() -> Result<()> {
    boot(stock()?, |vm| {
        assert_eq!(vm.text("/sys/devices/system/node/online")?.trim(), "0");
        let refused = vm.insmod(PMEM_KO, "pmem_start=4G pmem_size=65M pmem_count=40")?;
        assert_eq!(refused.map_err(|error| error.errno), Err(EINVAL));
        let said = log(vm)?.join("\n");
        let (_, most) = said
            .rsplit_once("the most is ")
            .with_context(|| said.clone())?;
        assert_eq!(most, "32");

        load(
            vm,
            &format!("pmem_start=4G pmem_size=65M pmem_count={most}"),
        )?;
        use_both_ends(vm, &[("pmem0", 2 * MIB), ("pmem31", 2 * MIB)])?;
        let said = log(vm)?;
        let nodes = said.iter().filter(|line| line.contains(", node 0,"));
        assert_eq!(nodes.count(), 32, "{said:#?}");
        unload(vm)
    })
}

/// Of two that load the driver at once, one does, and nothing is left of the other.
#[test]
fn loads_in_a_race() -> Result<()> {
    boot(stock()?, |vm| {
        // From two files: of those that load one file at once, the kernel lets the first one load it, and gives the
        // others its result.
        vm.sh(&format!(
            "cp {PMEM_KO} /tmp/other.ko; echo 0 >/tmp/first; echo 0 >/tmp/second"
        ))?;
        let before = Trace::of(vm)?;
        for _ in 0..10 {
            vm.sh(&format!(
                "set +e
                 insmod {PMEM_KO} pmem_start=4G pmem_size=256M pmem_count=2 2>/tmp/first & first=$!
                 insmod /tmp/other.ko pmem_start=4608M pmem_size=64M pmem_first=7 2>/tmp/second & second=$!
                 wait $first; first=$?
                 wait $second; second=$?
                 test $first = 0 -o $second = 0 && test $first != $second"
            ))?;
            let disks = vm.sh("cd /sys/block; echo pmem*; cat /tmp/first /tmp/second")?;
            let (disks, refusal) = disks.split_once('\n').context("no disks")?;
            let claim = match disks {
                "pmem0 pmem1" => "100000000-10fffffff : pmem",
                "pmem7" => "120000000-123ffffff : pmem",
                other => anyhow::bail!("the disks are {other}"),
            };
            ensure!(refusal.contains("File exists"), "{refusal:?}");
            let iomem = vm.text("/proc/iomem")?;
            assert!(iomem.contains(claim), "{iomem}");
            assert_eq!(iomem.matches(": pmem").count(), 1, "{iomem}");
            unload(vm)?;
        }
        // Loads and unloads in any order.
        vm.sh_for(
            &format!(
                "race() {{ for i in $(seq 10); do insmod $1 pmem_start=4G pmem_size=256M pmem_count=2; rmmod pmem; done; }}
                 race {PMEM_KO} >/dev/null 2>&1 & one=$!
                 race /tmp/other.ko >/dev/null 2>&1 & other=$!
                 for i in $(seq 50); do dd if=/dev/pmem1 of=/dev/null bs=4k count=1 2>/dev/null || true; done
                 wait $one || true; wait $other || true
                 ! grep -q '^pmem ' /proc/modules || rmmod pmem"
            ),
            LONG,
        )?;
        Trace::of(vm)?.check(&before)
    })
}
