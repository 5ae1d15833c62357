// SPDX-License-Identifier: GPL-2.0-only

//! Disks: how many, how large, what they say of themselves, and what they refuse.

use anyhow::{ensure, Result};
use vm_tests::{boot, load, log, stock, unload, Use, GIB, MIB, UPPER};
use xtask::vm::Vm;

fn sectors(vm: &Vm, disk: &str) -> Result<u64> {
    Ok(vm
        .text(&format!("/sys/block/{disk}/size"))?
        .trim()
        .parse()?)
}

fn disks(vm: &Vm) -> Result<Vec<String>> {
    let names = vm.sh("cd /sys/block && ls -d pmem* 2>/dev/null | sort -V || true")?;
    Ok(names.lines().map(str::to_owned).collect())
}

/// Disks that share a byte would destroy each other's file systems.
#[test]
fn one_two_and_seven_disks_are_equal_aligned_and_apart() -> Result<()> {
    boot(stock()?, |vm| {
        for (count, mib) in [(1, 1024), (2, 512), (7, 146)] {
            vm.sh("dmesg -c >/dev/null")?;
            load(
                vm,
                &format!("pmem_start=4G pmem_size=1GiB pmem_count={count}"),
            )?;
            let names: Vec<String> = (0..count).map(|n| format!("pmem{n}")).collect();
            assert_eq!(disks(vm)?, names);
            for name in &names {
                assert_eq!(sectors(vm, name)?, mib * MIB / 512, "{name} of {count}");
            }
            let said = log(vm)?;
            for (n, name) in (0..).zip(&names) {
                let start = UPPER + n * mib * MIB;
                let range = format!("[mem {:#010x}-{:#010x}]", start, start + mib * MIB - 1);
                ensure!(
                    said.iter()
                        .any(|line| line.starts_with(name.as_str()) && line.contains(&range)),
                    "{name} is not said to be at {range}: {said:#?}"
                );
            }
            let left = said
                .iter()
                .filter(|line| line.contains("left over"))
                .count();
            assert_eq!(left, usize::from(count == 7), "{said:#?}");

            // Each edge of each disk has its own content.
            for n in 0..count {
                let last = mib * 256 - 1;
                for (at, seed) in [(0, 2 * n + 1), (last, 2 * n + 2)] {
                    vm.sh(&format!(
                        "pmem-guest fill /tmp/x 4096 {seed}; dd if=/tmp/x of=/dev/pmem{n} bs=4096 seek={at} conv=notrunc,fsync 2>/dev/null"
                    ))?;
                }
            }
            vm.sh("echo 3 >/proc/sys/vm/drop_caches")?;
            for n in 0..count {
                let last = mib * 256 - 1;
                for (at, seed) in [(0, 2 * n + 1), (last, 2 * n + 2)] {
                    vm.sh(&format!(
                        "dd if=/dev/pmem{n} of=/tmp/x bs=4096 skip={at} count=1 2>/dev/null; pmem-guest verify /tmp/x 4096 {seed}"
                    ))?;
                }
            }
            unload(vm)?;
            assert_eq!(disks(vm)?, [""; 0]);
        }
        Ok(())
    })
}

#[test]
fn several_ranges_in_one_load() -> Result<()> {
    let machine =
        stock()?
            .range(Use::Reserved, UPPER, GIB)
            .range(Use::Reserved, 512 * MIB, 64 * MIB);
    boot(machine, |vm| {
        load(
            vm,
            "pmem_start=4G,512M,4608M pmem_size=256M,64M,512M pmem_count=1,2,3 pmem_first=5",
        )?;
        let sizes = [256, 32, 32, 170, 170, 170];
        assert_eq!(
            disks(vm)?,
            ["pmem5", "pmem6", "pmem7", "pmem8", "pmem9", "pmem10"]
        );
        for (n, mib) in (5..).zip(sizes) {
            assert_eq!(
                sectors(vm, &format!("pmem{n}"))?,
                mib * MIB / 512,
                "pmem{n}"
            );
            vm.sh(&format!(
                "mkfs.ext4 -q -F -b 4096 /dev/pmem{n}; e2fsck -fn /dev/pmem{n}"
            ))?;
        }
        let iomem = vm.text("/proc/iomem")?;
        for range in [
            "100000000-10fffffff",
            "20000000-23ffffff",
            "120000000-13fffffff",
        ] {
            assert!(iomem.contains(&format!("{range} : pmem")), "{iomem}");
        }
        Ok(())
    })
}

/// Memory on the wrong side of a machine is half as fast.
#[test]
fn a_disk_is_on_the_node_of_its_memory() -> Result<()> {
    // A node with no memory but ours would be offline.
    let machine =
        stock()?
            .range(Use::Reserved, UPPER, 512 * MIB)
            .range(Use::Reserved, 512 * MIB, 64 * MIB);
    boot(machine, |vm| {
        assert_eq!(vm.text("/sys/devices/system/node/online")?.trim(), "0-1");
        load(vm, "pmem_start=4G,512M pmem_size=512M,64M")?;
        let said = log(vm)?;
        for (disk, node) in [("pmem0: ", "node 1"), ("pmem1: ", "node 0")] {
            ensure!(
                said.iter()
                    .any(|line| line.starts_with(disk) && line.contains(node)),
                "{disk} is not said to be on {node}: {said:#?}"
            );
        }
        Ok(())
    })
}

/// What the block layer is told decides how requests reach the driver.
#[test]
fn queue_limits() -> Result<()> {
    boot(stock()?, |vm| {
        for lbs in [512, 4096] {
            load(
                vm,
                &format!("pmem_start=4G pmem_size=512MiB pmem_lbs={lbs}"),
            )?;
            let queue = |file: &str| -> Result<String> {
                Ok(vm
                    .text(&format!("/sys/block/pmem0/queue/{file}"))?
                    .trim()
                    .to_owned())
            };
            assert_eq!(queue("logical_block_size")?, lbs.to_string());
            for (file, value) in [
                ("physical_block_size", "4096"),
                ("write_cache", "write back"),
                ("fua", "1"),
                ("dax", "1"),
                ("rotational", "0"),
                ("discard_max_bytes", "0"),
                ("discard_granularity", "0"),
            ] {
                assert_eq!(queue(file)?, value, "{file}");
            }
            // Not a limit, but the largest that a limit can be.
            assert!(queue("max_hw_sectors_kb")?.parse::<u64>()? >= 1 << 20);
            assert!(queue("write_zeroes_max_bytes")?.parse::<u64>()? >= MIB);
            assert_eq!(vm.text("/sys/block/pmem0/ro")?.trim(), "0");
            unload(vm)?;
        }
        Ok(())
    })
}

/// Half a block of a 4096-byte disk must be refused, and what is whole must work.
#[test]
fn blocks_of_4096_bytes() -> Result<()> {
    boot(stock()?, |vm| {
        load(vm, "pmem_start=4G pmem_size=256MiB pmem_lbs=4096")?;
        for (at, len, works) in [
            (0, 512, false),
            (512, 4096, false),
            (0, 4096, true),
            (4096, 8192, true),
            (0, 4608, false),
        ] {
            let ran = vm.try_sh(&format!("xfs_io -d -c 'pwrite -q {at} {len}' /dev/pmem0"))?;
            assert_eq!(
                !ran.stderr.contains("Invalid argument"),
                works,
                "{len} bytes at {at}: {ran:?}"
            );
        }
        vm.sh(
            "mkfs.ext4 -q -F -b 4096 /dev/pmem0; mkdir -p /mnt/a; mount -o dax=always /dev/pmem0 /mnt/a
             pmem-guest fill /mnt/a/x 10000000 1; pmem-guest verify /mnt/a/x 10000000 1
             umount /mnt/a; e2fsck -fn /dev/pmem0",
        )?;
        Ok(())
    })
}

#[test]
fn file_systems_on_partitions() -> Result<()> {
    boot(stock()?, |vm| {
        load(vm, "pmem_start=4G pmem_size=1GiB pmem_count=2")?;
        vm.sh("printf 'label: gpt\\nstart=2MiB, size=128MiB\\nstart=130MiB\\n' | sfdisk -q /dev/pmem0")?;
        vm.sh("printf 'label: dos\\nstart=2MiB, size=64MiB\\n' | sfdisk -q /dev/pmem1")?;
        for (n, part) in (1..).zip(["pmem0p1", "pmem0p2", "pmem1p1"]) {
            vm.sh(&format!(
                "mkfs.ext4 -q -F -b 4096 /dev/{part}; mkdir -p /mnt/{part}; mount -o dax=always /dev/{part} /mnt/{part}
                 pmem-guest mmap-sync /mnt/{part}/x 8388608 {n}"
            ))?;
        }
        for (n, part) in (1..).zip(["pmem0p1", "pmem0p2", "pmem1p1"]) {
            vm.sh(&format!(
                "umount /mnt/{part}; e2fsck -fn /dev/{part}; mount -o dax=always /dev/{part} /mnt/{part}
                 pmem-guest verify /mnt/{part}/x 8388608 {n}; umount /mnt/{part}"
            ))?;
        }
        // The table itself survives a reload.
        unload(vm)?;
        load(vm, "pmem_start=4G pmem_size=1GiB pmem_count=2")?;
        assert_eq!(sectors(vm, "pmem0/pmem0p1")?, 128 * MIB / 512);
        assert_eq!(sectors(vm, "pmem1/pmem1p1")?, 64 * MIB / 512);
        Ok(())
    })
}

#[test]
fn zeroing_zeroes_what_it_is_told_and_no_more() -> Result<()> {
    boot(stock()?, |vm| {
        load(vm, "pmem_start=4G pmem_size=256MiB")?;
        vm.sh("pmem-guest fill /tmp/full 67108864 1
             dd if=/tmp/full of=/dev/pmem0 bs=1M conv=fsync 2>/dev/null")?;
        for (offset, length) in [(512, 512), (4096, 8192), (5120, 1_049_088), (MIB, 40 * MIB)] {
            vm.sh(&format!(
                "blkdiscard -z -o {offset} -l {length} /dev/pmem0
                 dd if=/dev/zero of=/tmp/full bs=512 seek={} count={} conv=notrunc 2>/dev/null
                 echo 3 >/proc/sys/vm/drop_caches
                 cmp -n 67108864 /tmp/full /dev/pmem0",
                offset / 512,
                length / 512
            ))?;
        }
        Ok(())
    })
}

/// A discard that pretends to work would let a file system believe that blocks are zero.
#[test]
fn discard_is_refused_and_changes_nothing() -> Result<()> {
    boot(stock()?, |vm| {
        load(vm, "pmem_start=4G pmem_size=256MiB")?;
        vm.sh("pmem-guest fill /tmp/x 4194304 3; dd if=/tmp/x of=/dev/pmem0 bs=1M conv=fsync 2>/dev/null")?;
        for command in ["blkdiscard /dev/pmem0", "blkdiscard -s /dev/pmem0"] {
            let ran = vm.try_sh(command)?;
            assert_ne!(ran.end, vm_tests::End::Exit(0), "{command}");
            assert!(
                ran.stderr.contains("not supported"),
                "{command}: {}",
                ran.stderr
            );
        }
        vm.sh(
            "echo 3 >/proc/sys/vm/drop_caches
             dd if=/dev/pmem0 of=/tmp/y bs=1M count=4 2>/dev/null; pmem-guest verify /tmp/y 4194304 3",
        )?;
        Ok(())
    })
}

#[test]
fn the_end_of_a_disk_is_its_end() -> Result<()> {
    boot(stock()?, |vm| {
        load(vm, "pmem_start=4G pmem_size=64MiB")?;
        vm.sh(
            "dd if=/dev/urandom of=/dev/pmem0 bs=512 count=1 seek=131071 oflag=direct 2>/dev/null",
        )?;
        let beyond =
            vm.try_sh("dd if=/dev/zero of=/dev/pmem0 bs=512 count=1 seek=131072 oflag=direct")?;
        assert!(beyond.stderr.contains("No space left"), "{}", beyond.stderr);
        let read = vm.sh("dd if=/dev/pmem0 bs=1M skip=63 iflag=direct 2>/dev/null | wc -c")?;
        assert_eq!(read.trim(), MIB.to_string());
        let read = vm.sh("dd if=/dev/pmem0 bs=1M skip=64 iflag=direct 2>/dev/null | wc -c")?;
        assert_eq!(read.trim(), "0");
        Ok(())
    })
}

/// Accounting costs time in every request; who turned it off must not pay.
#[test]
fn requests_are_counted_only_when_asked() -> Result<()> {
    boot(stock()?, |vm| {
        load(vm, "pmem_start=4G pmem_size=64MiB")?;
        let counts = |vm: &Vm| -> Result<(u64, u64)> {
            let stat = vm.text("/sys/block/pmem0/stat")?;
            let fields: Vec<u64> = stat
                .split_whitespace()
                .map(|field| field.parse().unwrap_or(u64::MAX))
                .collect();
            Ok((fields[2], fields[6]))
        };
        let requests = "dd if=/dev/pmem0 of=/dev/null bs=4096 count=10 iflag=direct 2>/dev/null
                        dd if=/dev/zero of=/dev/pmem0 bs=4096 count=20 oflag=direct 2>/dev/null";
        for (on, read, written) in [(1, 80, 160), (0, 0, 0), (1, 80, 160)] {
            vm.sh(&format!("echo {on} >/sys/block/pmem0/queue/iostats"))?;
            let before = counts(vm)?;
            vm.sh(requests)?;
            let after = counts(vm)?;
            assert_eq!(
                (after.0 - before.0, after.1 - before.1),
                (read, written),
                "iostats {on}"
            );
        }
        Ok(())
    })
}
