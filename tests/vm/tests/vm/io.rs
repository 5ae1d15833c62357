// SPDX-License-Identifier: GPL-2.0-only

//! Requests of every kind and size, checked by fio; and the flushes that durability hangs on.

use anyhow::{ensure, Result};
use std::time::Duration;
use vm_tests::{boot, load, stock};
use xtask::vm::Vm;

/// Two jobs, each on its own half, write and verify all of it at random.
fn verify(vm: &Vm, options: &str) -> Result<()> {
    verify_on(vm, "--filename=/dev/pmem0 --offset_increment=50%", options)
}

fn verify_on(vm: &Vm, target: &str, options: &str) -> Result<()> {
    vm.sh_for(
        &format!(
            "cd /tmp; fio --name=verify {target} --numjobs=2 --rw=randwrite \\
             --verify=crc32c --verify_fatal=1 --do_verify=1 --group_reporting --output=report {options} || {{ cat report; exit 1; }}"
        ),
        Duration::from_secs(240),
    )
    .map(drop)
}

fn sizes(engine: &str) -> Result<()> {
    boot(stock()?, |vm| {
        load(vm, "pmem_start=4G pmem_size=256MiB")?;
        for (bs, size) in [
            ("512", "2m"),
            ("1k", "4m"),
            ("4k", "16m"),
            ("68k", "17m"),
            ("1m", "64m"),
        ] {
            verify(vm, &format!("--ioengine={engine} --bs={bs} --size={size}"))?;
        }
        // Requests of mixed sizes, that begin and end within pages.
        verify(vm, &format!("--ioengine={engine} --bsrange=512-64k --bs_unaligned=0 --blockalign=512 --size=16m"))
    })
}

#[test]
fn verify_psync() -> Result<()> {
    sizes("psync --direct=1")
}

#[test]
fn verify_io_uring() -> Result<()> {
    sizes("io_uring --direct=1 --iodepth=16")
}

#[test]
fn verify_libaio() -> Result<()> {
    sizes("libaio --direct=1 --iodepth=16")
}

/// On files, one for each job: of a block device that it maps, fio 3.39 frees the content by `MADV_REMOVE` and then
/// misses it, and two jobs that map one file fail on tmpfs, too.
#[test]
fn verify_mmap() -> Result<()> {
    boot(stock()?, |vm| {
        load(vm, "pmem_start=4G pmem_size=512MiB")?;
        for dax in ["always", "never"] {
            vm.sh(&format!(
                "mkfs.ext4 -q -F -b 4096 /dev/pmem0; mkdir -p /mnt/a; mount -o dax={dax} /dev/pmem0 /mnt/a"
            ))?;
            for (bs, size) in [("512", "2m"), ("4k", "16m"), ("68k", "17m"), ("1m", "64m")] {
                let options = format!("--ioengine=mmap --bs={bs} --size={size} --end_fsync=1");
                verify_on(vm, "--directory=/mnt/a", &options)?;
                vm.sh("rm /mnt/a/verify*")?;
            }
            vm.sh("umount /mnt/a; e2fsck -fn /dev/pmem0")?;
        }
        Ok(())
    })
}

/// With `fsync` and O_DSYNC in all their forms, requests have flush and FUA set.
#[test]
fn verify_with_flushes() -> Result<()> {
    boot(stock()?, |vm| {
        load(vm, "pmem_start=4G pmem_size=256MiB")?;
        for options in [
            "--ioengine=psync --direct=1 --sync=dsync",
            "--ioengine=psync --direct=1 --sync=sync",
            "--ioengine=psync --direct=1 --fsync=3",
            "--ioengine=psync --fdatasync=2",
            "--ioengine=io_uring --direct=1 --iodepth=8 --fsync=5",
        ] {
            verify(vm, &format!("{options} --bs=4k --size=4m"))?;
        }
        Ok(())
    })
}

/// Traces the bios that reach the driver while `script` runs, and returns their flags.
fn bios(vm: &Vm, disk: &str, script: &str) -> Result<Vec<String>> {
    let device = vm
        .text(&format!("/sys/block/{disk}/dev"))?
        .trim()
        .replace(':', ",");
    let trace = vm.sh(&format!(
        "cd /sys/kernel/tracing; echo >trace; echo 1 >events/block/block_bio_queue/enable
         ( {script} )
         echo 0 >events/block/block_bio_queue/enable; cat trace"
    ))?;
    // "... block_bio_queue: 259,0 WFS 8 + 8 [dd]"
    let lines = trace.lines().filter_map(|line| {
        let (_, rest) = line.split_once("block_bio_queue: ")?;
        let mut words = rest.split(' ');
        (words.next() == Some(&device)).then(|| words.next().unwrap_or_default().to_owned())
    });
    Ok(lines.collect())
}

/// On `fsync` of a DAX mapping the file system writes cache lines back, and the fence that makes them durable is the
/// one of a flush bio. A disk that advertises no write cache never sees that bio.
#[test]
fn fsync_of_a_dax_mapping_sends_a_flush() -> Result<()> {
    boot(stock()?, |vm| {
        load(vm, "pmem_start=4G pmem_size=256MiB")?;
        vm.sh(
            "mkfs.ext4 -q -F -b 4096 /dev/pmem0; mkdir -p /mnt/a; mount -o dax=always /dev/pmem0 /mnt/a
             pmem-guest mmap-msync /mnt/a/x 4096 1; sync",
        )?;
        // The file's blocks are there already: there is no metadata to write, and no journal to flush.
        let seen = bios(
            vm,
            "pmem0",
            "xfs_io -c 'mmap -rw 0 4096' -c 'mwrite -S 0x55 0 4096' -c 'msync -s 0 4096' /mnt/a/x >/dev/null",
        )?;
        // F first is PREFLUSH.
        ensure!(
            seen.iter().any(|flags| flags.starts_with('F')),
            "no flush among {seen:?}"
        );
        Ok(())
    })
}

/// The same contract for requests: O_DSYNC is FUA, fsync is a flush.
#[test]
fn dsync_is_fua_and_fsync_is_a_flush() -> Result<()> {
    boot(stock()?, |vm| {
        load(vm, "pmem_start=4G pmem_size=256MiB")?;
        let write = |flags: &str| {
            format!("dd if=/dev/zero of=/dev/pmem0 bs=4096 count=1 {flags} 2>/dev/null")
        };
        let seen = bios(vm, "pmem0", "xfs_io -d -s -c 'pwrite -q 0 4096' /dev/pmem0")?;
        // "WFS": a write with FUA. A leading F would be a flush of its own.
        ensure!(
            seen.iter()
                .any(|flags| flags.starts_with("WF") || flags.starts_with("FWF")),
            "no FUA among {seen:?}"
        );
        let seen = bios(vm, "pmem0", &write("oflag=direct conv=fsync"))?;
        ensure!(
            seen.iter().any(|flags| flags.starts_with('F')),
            "no flush among {seen:?}"
        );
        let seen = bios(vm, "pmem0", &write("oflag=direct"))?;
        ensure!(
            !seen.is_empty() && seen.iter().all(|flags| !flags.contains('F')),
            "a flush among {seen:?}"
        );
        Ok(())
    })
}
