// SPDX-License-Identifier: GPL-2.0-only

//! Disks whose struct pages are on their own range: `pmem_memmap=dev`.

use crate::dax::is_mapped_by_a_pmd;
use anyhow::{bail, ensure, Context, Result};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::time::Duration;
use vm_tests::{boot, free, has_kasan, load, log, stock, unload, Persistent, Trace, GIB, MIB};
use xtask::vm::{Vm, PMEM_KO};

const EINVAL: i32 = 22;

/// The size of a disk in bytes.
fn size(vm: &Vm, disk: &str) -> Result<u64> {
    let sectors = vm.text(&format!("/sys/block/{disk}/size"))?;
    Ok(sectors.trim().parse::<u64>()? * 512)
}

/// What the driver has logged since this was asked for the last time.
fn said(vm: &Vm) -> Result<String> {
    let said = log(vm)?.join("\n");
    vm.sh("dmesg -c >/dev/null")?;
    Ok(said)
}

/// Loads the driver, which must refuse, and say all of `needles`.
fn refused(vm: &Vm, params: &str, needles: &[&str]) -> Result<()> {
    said(vm)?;
    let Err(error) = vm.insmod(PMEM_KO, params)? else {
        unload(vm).ok();
        bail!("{params:?} was accepted: {}", said(vm)?);
    };
    let said = said(vm)?;
    ensure!(error.errno == EINVAL, "{params:?}: {error}: {said}");
    for needle in needles {
        ensure!(
            said.contains(needle),
            "{params:?}: {needle:?} is not in {said:?}"
        );
    }
    Ok(())
}

/// The struct pages of 4 GiB are 64 MiB.
#[test]
fn struct_pages_on_the_range_take_no_ram() -> Result<()> {
    const LOAD: &str = "pmem_start=4G pmem_size=4G";
    boot(stock()?.upper(4 * GIB), |vm| {
        // Once without being measured, for what the kernel keeps after the first time.
        load(vm, LOAD)?;
        vm.sh("mkfs.ext4 -q -F -b 4096 /dev/pmem0
             mkdir -p /mnt/a; mount -o dax=always /dev/pmem0 /mnt/a; umount /mnt/a
             blkdiscard -z -o 0 -l 69206016 /dev/pmem0")?;
        unload(vm)?;
        let trace = Trace::of(vm)?;
        let before = free(vm)?;

        load(vm, LOAD)?;
        let ram = before.saturating_sub(free(vm)?);
        ensure!(ram >= 48 * MIB, "in RAM, they took {ram} bytes");
        unload(vm)?;

        said(vm)?;
        load(vm, &format!("{LOAD} pmem_memmap=dev"))?;
        let dev = before.saturating_sub(free(vm)?);
        ensure!(dev <= 8 * MIB, "on the range, they took {dev} bytes");
        let said = said(vm)?;
        for needle in [
            "pmem0: 66MiB of [mem 0x100000000-0x1ffffffff] are reserved for struct pages; the header is written",
            "pmem0: 4030MiB at [mem 0x100000000-0x1ffffffff]",
            "DAX with struct pages on the range",
        ] {
            ensure!(said.contains(needle), "{needle:?} is not in {said:?}");
        }
        assert_eq!(size(vm, "pmem0")?, 4030 * MIB);

        // As good as any other disk: huge pages, too.
        vm.sh(
            "mkfs.ext4 -q -F -b 4096 -E stride=512,stripe_width=512 /dev/pmem0
             mkdir -p /mnt/a; mount -o dax=always /dev/pmem0 /mnt/a
             pmem-guest mmap-sync /mnt/a/x 10000000 1; pmem-guest verify /mnt/a/x 10000000 1",
        )?;
        is_mapped_by_a_pmd(vm)?;
        vm.sh("umount /mnt/a")?;
        unload(vm)?;
        Trace::of(vm)?.check(&trace)?;

        // It is all given back, each time.
        let before = free(vm)?;
        for _ in 0..8 {
            load(vm, &format!("{LOAD} pmem_memmap=dev"))?;
            unload(vm)?;
        }
        let left = before.saturating_sub(free(vm)?);
        ensure!(left <= 6 * MIB, "{left} bytes are not free again");
        Ok(())
    })
}

/// What is on the disks survives all that may happen to it, also that struct pages go to RAM and back.
#[test]
fn files_survive_and_find_their_way_back() -> Result<()> {
    const LOAD: &str = "pmem_start=4G pmem_size=1G pmem_count=2";
    let dev = format!("{LOAD} pmem_memmap=dev");
    let mount = |n| format!("mkdir -p /mnt/{n}; mount -o dax=always /dev/pmem{n} /mnt/{n}");
    let check = |vm: &Vm| -> Result<()> {
        for n in 0..2 {
            assert_eq!(size(vm, &format!("pmem{n}"))?, 502 * MIB);
            vm.sh(&format!(
                "{}; pmem-guest verify /mnt/{n}/fsync 20000000 1{n}
                 pmem-guest verify /mnt/{n}/msync 20000000 2{n}
                 umount /mnt/{n}; e2fsck -fn /dev/pmem{n}",
                mount(n)
            ))?;
        }
        Ok(())
    };

    let memory = Persistent::new(GIB)?;
    boot(stock()?.persistent(&memory), |vm| {
        load(vm, &dev)?;
        for n in 0..2 {
            vm.sh(&format!(
                "mkfs.ext4 -q -F -b 4096 /dev/pmem{n}; {}
                 pmem-guest fill /mnt/{n}/fsync 20000000 1{n}
                 pmem-guest mmap-msync /mnt/{n}/msync 20000000 2{n}
                 umount /mnt/{n}",
                mount(n)
            ))?;
        }
        unload(vm)?;
        said(vm)?;
        load(vm, &dev)?;
        let said = said(vm)?;
        ensure!(!said.contains("written"), "{said}");
        check(vm)?;
        vm.sh(&mount(0)).map(drop)
    })?;

    boot(stock()?.persistent(&memory), |vm| {
        load(vm, &dev)?;
        check(vm)?;
        unload(vm)?;

        // Back to RAM: only if it is forced, and then the data is behind the reserve.
        let header = "a disk of 512MiB with 502MiB of data from 10MiB on";
        refused(
            vm,
            LOAD,
            &[
                "pmem0: [mem 0x100000000-0x11fffffff]",
                header,
                "pmem_memmap=dev",
                "pmem_memmap_force=1",
            ],
        )?;
        load(vm, &format!("{LOAD} pmem_memmap_force=1"))?;
        let said = said(vm)?;
        for n in 0..2 {
            assert_eq!(size(vm, &format!("pmem{n}"))?, 512 * MIB);
            ensure!(
                said.lines()
                    .any(|line| line.starts_with(&format!("pmem{n}: "))
                        && line.contains(header)
                        && line.contains("destroyed")
                        && line.contains("from byte 10485760")),
                "{said}"
            );
        }
        unload(vm)?;
        load(vm, LOAD)?;
        vm.sh("e2fsck -fn '/dev/pmem1?offset=10485760'")?;
        unload(vm)?;

        // And forth: the old struct pages are data now, which only its owner may give up.
        let remedy = "blkdiscard -z -o 0 -l 10485760";
        refused(
            vm,
            &dev,
            &["pmem0: ", "no header", "pmem_memmap=ram", remedy],
        )?;
        load(vm, LOAD)?;
        vm.sh(&format!("{remedy} /dev/pmem0; {remedy} /dev/pmem1"))?;
        unload(vm)?;
        load(vm, &dev)?;
        check(vm)?;
        unload(vm)
    })
}

/// A range that was used in another way, or is damaged, is as it was, to the byte.
#[test]
fn a_refused_range_is_not_touched() -> Result<()> {
    const SIZE: u64 = 256 * MIB;
    const LOAD: &str = "pmem_start=4G pmem_size=256M pmem_memmap=dev";
    const RAM: &str = "pmem_start=4G pmem_size=256M";
    let memory = Persistent::new(SIZE)?;
    let file = File::options().write(true).open(memory.path())?;
    let unchanged = |vm: &Vm, params: &str, needles: &[&str]| -> Result<()> {
        let before = fs::read(memory.path())?;
        refused(vm, params, needles)?;
        ensure!(
            fs::read(memory.path())? == before,
            "{params:?} has changed the range"
        );
        Ok(())
    };

    boot(stock()?.persistent(&memory), |vm| {
        for (params, needles) in [
            (
                "pmem_start=4G pmem_size=4M pmem_memmap=dev",
                &["pmem0: ", "4MiB are too few", "at least 6MiB"][..],
            ),
            (
                "pmem_start=4G pmem_size=256M pmem_memmap=disk",
                &["pmem_memmap=disk", "ram or dev"],
            ),
            (
                "pmem_start=4G pmem_size=256M pmem_memmap=dev pmem_cache=wc",
                &["pmem_memmap=dev with pmem_cache=wc", "write ram"],
            ),
            (
                "pmem_start=4G pmem_size=256M pmem_memmap=dev pmem_memmap_force=1",
                &["pmem_memmap_force=1 without pmem_memmap=ram"],
            ),
            (
                "pmem_start=4G pmem_size=256M pmem_memmap_force=yes",
                &["pmem_memmap_force=yes", "1 or 0"],
            ),
        ] {
            unchanged(vm, params, needles)?;
        }

        // Data in the place of the second disk's reserve: nor is the first disk, which is blank, touched.
        file.write_all_at(b"data", SIZE / 2 + 3 * MIB)?;
        let two = format!("{LOAD} pmem_count=2");
        unchanged(
            vm,
            &two,
            &[
                "pmem1: ",
                "data at byte 0x300000",
                "blkdiscard -z -o 0 -l 4194304",
            ],
        )?;
        load(vm, &format!("{RAM} pmem_count=2"))?;
        vm.sh("blkdiscard -z -o 0 -l 4194304 /dev/pmem1")?;
        unload(vm)?;

        load(vm, &two)?;
        unload(vm)?;
        for cache in ["", " pmem_cache=wt", " pmem_cache=wc", " pmem_cache=uc"] {
            unchanged(
                vm,
                &format!("{RAM} pmem_count=2{cache}"),
                &["pmem0: ", "a disk of 128MiB", "pmem_memmap=dev"],
            )?;
        }
        for params in [
            LOAD.to_owned(),
            format!("{LOAD} pmem_count=3"),
            two.replace("256M", "128M"),
        ] {
            unchanged(
                vm,
                &params,
                &[
                    "pmem0: ",
                    "says a disk of 128MiB",
                    "but this is a disk of",
                    "pmem_count",
                ],
            )?;
        }
        // The reserve of the first disk is found, of which nobody speaks.
        unchanged(
            vm,
            "pmem_start=4G,4224M pmem_size=128M,128M pmem_memmap=dev,ram",
            &["pmem1: ", "a disk of 128MiB", "pmem_memmap=dev"],
        )?;

        // Bits of both copies, in each field.
        let header = fs::read(memory.path())?[..128].to_vec();
        ensure!(header.starts_with(b"PMEMRSRV"), "{header:x?}");
        for at in [0, 7, 8, 12, 16, 24, 33, 40, 44, 100, 124] {
            let flipped = [header[at] ^ (1 << (at % 8))];
            file.write_all_at(&flipped, at as u64)?;
            file.write_all_at(&flipped, at as u64 + 4096)?;
            if at < 8 {
                unchanged(vm, &two, &["pmem0: ", "no header", "data at byte 0x0"])?;
            } else {
                for params in [&two, &format!("{RAM} pmem_count=2")] {
                    unchanged(
                        vm,
                        params,
                        &[
                            "pmem0: ",
                            "no valid header",
                            "checksum",
                            "pmem_memmap_force=1",
                        ],
                    )?;
                }
            }
            // Of one copy: the other one counts, and it is written again.
            file.write_all_at(&header[at..][..1], at as u64)?;
            unchanged(vm, &format!("{RAM} pmem_count=2"), &["a disk of 128MiB"])?;
            load(vm, &two)?;
            let said = said(vm)?;
            ensure!(
                said.contains("pmem0: second copy of the header: ")
                    && said.contains("it is written again"),
                "{said}"
            );
            unload(vm)?;
            let now = fs::read(memory.path())?;
            ensure!(now[..128] == header && now[4096..4224] == header);
        }
        Ok(())
    })
}

/// The struct pages of 64 GiB are 1 GiB, and there is half of that.
#[test]
fn a_disk_whose_struct_pages_are_more_than_all_of_ram() -> Result<()> {
    const LOAD: &str = "pmem_start=4G pmem_size=64G pmem_memmap=dev";
    if has_kasan()? {
        eprintln!("skipped: KASAN leaves too little of so small a machine");
        return Ok(());
    }
    let memory = Persistent::sparse(64 * GIB, 2 * GIB)?;
    let machine = || Ok::<_, anyhow::Error>(stock()?.ram(512 * MIB).persistent(&memory));
    boot(machine()?, |vm| {
        let total = vm.sh("awk '$1 == \"MemTotal:\" { print $2 }' /proc/meminfo")?;
        ensure!(total.trim().parse::<u64>()? < 512 << 10, "{total}");
        let before = free(vm)?;
        load(vm, LOAD)?;
        let used = before.saturating_sub(free(vm)?);
        ensure!(used <= 16 * MIB, "it took {used} bytes");
        assert_eq!(size(vm, "pmem0")?, 64 * GIB - 1026 * MIB);
        vm.sh_for(
            "mkfs.ext4 -q -F -b 4096 -J size=16 -E lazy_itable_init=1,lazy_journal_init=1 /dev/pmem0
             mkdir -p /mnt/a; mount -o dax=always,noinit_itable /dev/pmem0 /mnt/a
             pmem-guest mmap-sync /mnt/a/x 10000000 1
             umount /mnt/a
             pmem-guest fill /tmp/x 1048576 2
             dd if=/tmp/x of=/dev/pmem0 bs=1M seek=64509 oflag=direct 2>/dev/null",
            Duration::from_secs(300),
        )
        .map(drop)
    })?;
    boot(machine()?, |vm| {
        load(vm, LOAD)?;
        vm.sh(
            "mkdir -p /mnt/a; mount -o dax=always,noinit_itable /dev/pmem0 /mnt/a
             pmem-guest verify /mnt/a/x 10000000 1; umount /mnt/a
             dd if=/dev/pmem0 of=/tmp/y bs=1M skip=64509 iflag=direct 2>/dev/null
             pmem-guest verify /tmp/y 1048576 2",
        )?;
        unload(vm).context("all of the struct pages go")
    })
}
