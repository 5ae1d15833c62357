// SPDX-License-Identifier: GPL-2.0-only

//! What is in a BAR: requests of all shapes, file systems with DAX, and the host's file.

use super::{attribute, compare, machine, pattern, place, says, serve, EXT4, LONG, SIZE, XFS};
use crate::dax::is_mapped_by_a_pmd;
use anyhow::{ensure, Context, Result};
use std::fs;
use vm_tests::{boot, cut, log, unload, Persistent, Trace, MIB};
use xtask::vm::Vm;

/// Programs that look for persistent memory, and the block layer, go by these.
#[test]
fn the_disk_says_what_it_is() -> Result<()> {
    let memory = Persistent::new(64 * MIB)?;
    boot(machine(&memory)?, |vm| {
        serve(vm, "")?;
        let (function, size) = (vm.bar(0), (64 * MIB).to_string());
        let start = place(vm, &function)?;
        says(
            vm,
            &[
                ("size", &(64 * MIB / 512).to_string()),
                // What is written is on its way to the device until a flush.
                ("queue/write_cache", "write back"),
                ("queue/fua", "1"),
                ("queue/dax", "1"),
                ("queue/rotational", "0"),
                ("pmem/provider", "pci"),
                ("pmem/cache", "wc"),
                ("pmem/memmap", "ram"),
                ("pmem/durability", "volatile"),
                ("pmem/size", &size),
                ("pmem/start", &format!("{start:#x}")),
            ],
        )?;
        let device = vm.sh("basename $(readlink -f /sys/block/iopmem0/device)")?;
        ensure!(device.trim() == function, "it is of {device}");
        let said = log(vm)?;
        let range = format!("[mem {start:#x}-{:#x}]", start + 64 * MIB - 1);
        ensure!(
            said.iter().any(|line| line.contains("iopmem0")
                && line.contains("64MiB")
                && line.contains(&range)),
            "no line has {range}: {said:#?}"
        );
        // Nobody else may have the memory now.
        let iomem = vm.text("/proc/iomem")?;
        ensure!(
            iomem.contains(&format!("{start:08x}-{:08x} : ", start + 64 * MIB - 1)),
            "{iomem}"
        );
        unload(vm)
    })
}

/// Two jobs, each on its own half, write and verify all of it at random.
fn fio(vm: &Vm, options: &str) -> Result<()> {
    vm.sh_for(
        &format!(
            "cd /tmp; fio --name=verify --filename=/dev/iopmem0 --offset_increment=50% --numjobs=2 --rw=randwrite \\
                 --verify=crc32c --verify_fatal=1 --do_verify=1 --group_reporting --output=report {options} \\
                 || {{ cat report; exit 1; }}"
        ),
        LONG,
    )
    .map(drop)
}

#[test]
fn requests_of_every_size_are_verified() -> Result<()> {
    let memory = Persistent::new(128 * MIB)?;
    boot(machine(&memory)?, |vm| {
        serve(vm, "")?;
        for engine in [
            "psync --direct=1",
            "io_uring --direct=1 --iodepth=16",
            "psync",
        ] {
            for (bs, size) in [
                ("512", "1m"),
                ("1k", "2m"),
                ("4k", "8m"),
                ("68k", "17m"),
                ("1m", "32m"),
            ] {
                fio(vm, &format!("--ioengine={engine} --bs={bs} --size={size}"))?;
            }
        }
        // Requests of mixed sizes, that begin and end within pages.
        for options in [
            "--ioengine=psync --direct=1",
            "--ioengine=libaio --direct=1 --iodepth=8 --fsync=16",
            "--ioengine=psync --direct=1 --sync=dsync",
            "--ioengine=psync --fdatasync=2",
        ] {
            fio(
                vm,
                &format!("{options} --bsrange=512-64k --bs_unaligned=0 --blockalign=512 --size=8m"),
            )?;
        }
        unload(vm)
    })
}

/// Whatever parts a request has in memory, and wherever they begin, the device has what was written, and its neighbours
/// have not changed.
#[test]
fn requests_of_odd_shapes_are_the_file_of_the_host() -> Result<()> {
    const LEN: u64 = 16 * MIB;
    let memory = Persistent::new(LEN)?;
    boot(machine(&memory)?, |vm| {
        for (seed, params) in [(10, ""), (20, "iopmem_cache=uc"), (30, "pmem_lbs=4096")] {
            serve(vm, params)?;
            vm.sh_for(
                &format!("pmem-guest direct-write /dev/iopmem0 {LEN} {seed}"),
                LONG,
            )?;
            // A flush: what is on its way arrives.
            vm.sh("sync /dev/iopmem0")?;
            compare(&memory, seed, LEN).with_context(|| params.to_owned())?;
            fs::write(memory.path(), pattern(seed + 5, LEN))?;
            vm.sh_for(
                &format!("pmem-guest direct-verify /dev/iopmem0 {LEN} {}", seed + 5),
                LONG,
            )?;
            unload(vm)?;
        }
        Ok(())
    })
}

/// The disk is the host's file, from its first byte to its last.
#[test]
fn the_disk_is_the_file_of_the_host() -> Result<()> {
    const LEN: u64 = 64 * MIB;
    let memory = Persistent::new(LEN)?;
    boot(machine(&memory)?, |vm| {
        serve(vm, "")?;
        vm.sh_for(&format!("pmem-guest fill /dev/iopmem0 {LEN} 1"), LONG)?;
        compare(&memory, 1, LEN)?;
        fs::write(memory.path(), pattern(2, LEN))?;
        vm.sh_for(&format!("pmem-guest verify /dev/iopmem0 {LEN} 2"), LONG)?;
        // Of a part, the rest stays.
        vm.sh("dd if=/dev/zero of=/dev/iopmem0 bs=512 seek=77 count=3 oflag=direct conv=fsync 2>/dev/null")?;
        let (mut wanted, range) = (pattern(2, LEN), 77 * 512..80 * 512);
        wanted[range].fill(0);
        ensure!(fs::read(memory.path())? == wanted, "others have changed");
        unload(vm)?;
        ensure!(
            fs::read(memory.path())? == wanted,
            "it has changed as the driver went"
        );
        Ok(())
    })
}

/// What is discarded and zeroed by the block layer is zero in the device.
#[test]
fn zeroes_are_zeroes() -> Result<()> {
    const LEN: u64 = 8 * MIB;
    let memory = Persistent::new(LEN)?;
    boot(machine(&memory)?, |vm| {
        serve(vm, "")?;
        vm.sh(&format!(
            "pmem-guest fill /dev/iopmem0 {LEN} 1
             blkdiscard -z -o 1536 -l 1048576 /dev/iopmem0; sync /dev/iopmem0"
        ))?;
        let mut wanted = pattern(1, LEN);
        wanted[1536..1536 + (1 << 20)].fill(0);
        ensure!(fs::read(memory.path())? == wanted, "it is something else");
        Ok(())
    })
}

/// All ways to write a file, with DAX; the file system is whole afterwards.
fn use_it(vm: &Vm, mkfs: &str, check: &str) -> Result<()> {
    load_and_mount(vm, "", mkfs)?;
    let mounts = vm.sh("grep /mnt/a /proc/mounts")?;
    ensure!(mounts.contains("dax=always"), "{mounts}");
    // Stores are on their way to the device until it is read, so a program that means to do without must be told.
    let ran = vm.try_sh("pmem-guest mmap-sync /mnt/a/no 4096 1")?;
    ensure!(ran.stderr.contains("os error 95"), "MAP_SYNC: {ran:?}");
    let files = [1, 511, 4096, 1 << 20, 33_333_333];
    for (n, len) in (1..).zip(files) {
        vm.sh(&format!(
            "pmem-guest fill /mnt/a/fill{n} {len} {n}
             pmem-guest mmap-msync /mnt/a/msync{n} {len} {n}
             pmem-guest mmap-verify /mnt/a/fill{n} {len} {n}
             pmem-guest verify /mnt/a/msync{n} {len} {n}"
        ))?;
    }
    for sync in ["--fsync=3", "--sync=dsync"] {
        vm.sh_for(
            &format!(
                "fio --name=x --directory=/mnt/a --size=4m --rw=randwrite --bsrange=1k-16k --ioengine=psync \\
                     --numjobs=2 {sync} --verify=crc32c --verify_fatal=1 >/tmp/fio || {{ cat /tmp/fio; exit 1; }}"
            ),
            LONG,
        )?;
    }
    // A hole, and the zeroed rest of a block.
    vm.sh(
        "xfs_io -f -c 'pwrite -S 0xff 0 20000' -c 'fpunch 4096 4096' -c 'fzero 9000 100' -c fsync /mnt/a/holes >/dev/null",
    )?;
    vm.sh_for(
        &format!("umount /mnt/a; {check}; mount -o dax=always /dev/iopmem0 /mnt/a"),
        LONG,
    )?;
    for (n, len) in (1..).zip(files) {
        vm.sh(&format!(
            "pmem-guest verify /mnt/a/fill{n} {len} {n}
             pmem-guest mmap-verify /mnt/a/msync{n} {len} {n}"
        ))?;
    }
    for (at, byte) in vm.read("/mnt/a/holes")?.into_iter().enumerate() {
        let zero = (4096..8192).contains(&at) || (9000..9100).contains(&at);
        ensure!(byte == if zero { 0 } else { 0xff }, "byte {at} of holes");
    }
    vm.sh("umount /mnt/a")?;
    unload(vm)
}

fn load_and_mount(vm: &Vm, params: &str, mkfs: &str) -> Result<()> {
    serve(vm, params)?;
    vm.sh_for(
        &format!("{mkfs}; mkdir -p /mnt/a; mount -o dax=always /dev/iopmem0 /mnt/a"),
        LONG,
    )
    .map(drop)
}

#[test]
fn ext4_with_dax() -> Result<()> {
    let memory = Persistent::new(SIZE)?;
    boot(machine(&memory)?, |vm| {
        use_it(vm, EXT4, "e2fsck -fn /dev/iopmem0")
    })
}

#[test]
fn xfs_with_dax() -> Result<()> {
    let memory = Persistent::new(SIZE)?;
    boot(machine(&memory)?, |vm| {
        use_it(vm, XFS, "xfs_repair -n /dev/iopmem0")
    })
}

/// One entry of the TLB for 2 MiB of a BAR.
#[test]
fn a_pmd_maps_2_mib_of_a_bar() -> Result<()> {
    let memory = Persistent::new(SIZE)?;
    boot(machine(&memory)?, |vm| {
        load_and_mount(
            vm,
            "",
            "mkfs.ext4 -q -F -b 4096 -E stride=512,stripe_width=512 /dev/iopmem0",
        )?;
        is_mapped_by_a_pmd(vm)?;
        vm.sh("umount /mnt/a")?;
        unload(vm)
    })
}

/// A BAR with a battery: what was synced is in it, whatever becomes of the machine.
fn survives(mkfs: &str, check: &str) -> Result<()> {
    const LEN: u64 = 20_000_000;
    let memory = Persistent::new(SIZE)?;
    cut(machine(&memory)?, |vm| {
        load_and_mount(vm, "iopmem_persistent=1", mkfs)?;
        ensure!(
            attribute(vm, "pmem/durability")? == "durable after a flush",
            "{}",
            attribute(vm, "pmem/durability")?
        );
        vm.sh_for(
            &format!(
                "pmem-guest fill /mnt/a/fsync {LEN} 1
                 pmem-guest mmap-msync /mnt/a/msync {LEN} 2
                 xfs_io -c fsync /mnt/a
                 echo junk >/mnt/a/unsynced"
            ),
            LONG,
        )
        .map(drop)
    })?;
    boot(machine(&memory)?, |vm| {
        serve(vm, "iopmem_persistent=1")?;
        vm.sh_for(
            &format!(
                "mkdir -p /mnt/a
                 mount -o dax=always /dev/iopmem0 /mnt/a
                 pmem-guest verify /mnt/a/fsync {LEN} 1
                 pmem-guest verify /mnt/a/msync {LEN} 2
                 umount /mnt/a; {check}"
            ),
            LONG,
        )
        .map(drop)
    })
}

#[test]
fn ext4_survives_a_power_failure() -> Result<()> {
    survives(EXT4, "e2fsck -fn /dev/iopmem0")
}

#[test]
fn xfs_survives_a_power_failure() -> Result<()> {
    survives(XFS, "xfs_repair -n /dev/iopmem0")
}

/// A reload changes nothing, and leaves nothing.
#[test]
fn data_outlives_reloads() -> Result<()> {
    let memory = Persistent::new(64 * MIB)?;
    boot(machine(&memory)?, |vm| {
        load_and_mount(vm, "", EXT4)?;
        vm.sh("pmem-guest fill /mnt/a/x 1000000 1; umount /mnt/a")?;
        unload(vm)?;
        let before = Trace::of(vm)?;
        for params in ["", "iopmem_cache=uc", "iopmem_dax=0", "iopmem_cache=wb", ""] {
            serve(vm, params)?;
            vm.sh("mount /dev/iopmem0 /mnt/a
                   pmem-guest verify /mnt/a/x 1000000 1
                   pmem-guest fill /mnt/a/x 1000000 1; umount /mnt/a")
                .with_context(|| params.to_owned())?;
            unload(vm)?;
        }
        Trace::of(vm)?.check(&before)
    })
}
