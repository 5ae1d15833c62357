// SPDX-License-Identifier: GPL-2.0-only

//! Peers: an NVMe disk that reads and writes files on a BAR by itself, past the machine's own memory.

use super::{compare, pattern, place, says, serve, wait, DRIVER, EXT4, LONG};
use anyhow::{ensure, Result};
use std::collections::HashSet;
use std::fs;
use std::time::Instant;
use vm_tests::{boot, debian, unload, Persistent, MIB};
use xtask::vm::{Builder, Vm};

/// The BAR.
const SIZE: u64 = 256 * MIB;

/// What is moved.
const LEN: u64 = 16 * MIB;

/// The NVMe disk.
const NVME: &str = "nvme0n1";

/// What a file system has its data in.
const BLOCK: usize = 4096;

/// A machine with a BAR and an NVMe disk, and a kernel that knows such disks.
fn machine<'a>(memory: &'a Persistent, disk: &'a Persistent) -> Result<Option<Builder<'a>>> {
    Ok(debian()?.map(|machine| {
        machine
            .upper(0)
            .module("nvme")
            .bar(memory)
            .nvme(disk)
            .watch_nvme()
    }))
}

/// Bytes that the NVMe disk has moved from or to the BAR itself, and from or to other memory.
fn moved(vm: &Vm, from: usize, start: u64) -> (u64, u64) {
    let accesses = vm.nvme_accesses();
    let (peer, other): (Vec<_>, Vec<_>) = accesses
        .iter()
        .skip(from)
        .partition(|(address, _)| (start..start + SIZE).contains(address));
    let sum = |of: Vec<&(u64, u64)>| of.into_iter().map(|&(_, len)| len).sum();
    (sum(peer), sum(other))
}

fn moves_by_itself(switched: bool) -> Result<()> {
    let (memory, disk) = (Persistent::new(SIZE)?, Persistent::new(64 * MIB)?);
    fs::write(disk.path(), pattern(5, 64 * MIB))?;
    let Some(machine) = machine(&memory, &disk)? else {
        return Ok(());
    };
    let machine = if switched {
        machine.pcie_switch()
    } else {
        machine
    };
    boot(machine, |vm| {
        wait(vm, NVME)?;
        // Both are where we think that they are.
        vm.sh(&format!(
            "test -e /sys/bus/pci/devices/{}/nvme; test -e /sys/bus/pci/devices/{}/resource2_wc",
            vm.nvme(0),
            vm.bar(0)
        ))?;
        serve(vm, "")?;
        let start = place(vm, &vm.bar(0))?;
        vm.sh_for(
            &format!("{EXT4}; mkdir -p /mnt/a; mount -o dax=always /dev/iopmem0 /mnt/a"),
            LONG,
        )?;
        // From the disk to the BAR.
        let before = vm.nvme_accesses().len();
        vm.sh_for(
            &format!("pmem-guest odirect-into-dax /dev/{NVME} /mnt/a/x {LEN}"),
            LONG,
        )?;
        let (peer, other) = moved(vm, before, start);
        ensure!(
            peer >= LEN && other < LEN / 16,
            "{peer} bytes to the BAR, {other} to other memory"
        );
        vm.sh_for(
            &format!("pmem-guest mmap-verify /mnt/a/x {LEN} 5; pmem-guest verify /mnt/a/x {LEN} 5"),
            LONG,
        )?;
        let data = fs::read(memory.path())?;
        let blocks: HashSet<&[u8]> = data.chunks(BLOCK).collect();
        ensure!(
            pattern(5, LEN)
                .chunks(BLOCK)
                .all(|block| blocks.contains(block)),
            "the host's file of the BAR has not all blocks of the disk's"
        );
        drop(blocks);

        // And back.
        vm.sh_for(&format!("pmem-guest mmap-msync /mnt/a/y {LEN} 6"), LONG)?;
        let before = vm.nvme_accesses().len();
        vm.sh_for(
            &format!("pmem-guest odirect-from-dax /mnt/a/y /dev/{NVME} {LEN}"),
            LONG,
        )?;
        let (peer, other) = moved(vm, before, start);
        ensure!(
            peer >= LEN && other < LEN / 16,
            "{peer} bytes from the BAR, {other} from other memory"
        );
        compare(&disk, 6, LEN)?;

        // Many at once, of all sizes, each checked: the buffers of fio are a file on the BAR.
        let before = vm.nvme_accesses().len();
        vm.sh_for(
            &format!(
                "truncate -s 8M /mnt/a/buffer
                 fio --name=x --filename=/dev/{NVME} --direct=1 --rw=randwrite --bsrange=4k-128k --size=16m \\
                     --ioengine=libaio --iodepth=8 --iomem=mmapshared:/mnt/a/buffer \\
                     --verify=crc32c --verify_fatal=1 --do_verify=1 >/tmp/fio || {{ cat /tmp/fio; exit 1; }}"
            ),
            LONG,
        )?;
        let (peer, _) = moved(vm, before, start);
        ensure!(peer >= LEN, "{peer} bytes from and to the BAR");
        vm.sh("umount /mnt/a; e2fsck -fn /dev/iopmem0")?;
        unload(vm)
    })
}

#[test]
fn an_nvme_disk_reads_and_writes_files_on_a_bar() -> Result<()> {
    moves_by_itself(false)
}

#[test]
fn an_nvme_disk_behind_the_same_switch_does() -> Result<()> {
    moves_by_itself(true)
}

/// The kernel's own memory for peers, which has no files, is at the end of the BAR, and the disk before it.
#[test]
fn the_end_of_a_bar_is_p2pdma_memory() -> Result<()> {
    const SHARE: u64 = 32 * MIB;
    let (memory, disk) = (Persistent::new(SIZE)?, Persistent::new(64 * MIB)?);
    fs::write(disk.path(), pattern(5, 64 * MIB))?;
    let Some(machine) = machine(&memory, &disk)? else {
        return Ok(());
    };
    // Behind one switch the kernel knows that they reach each other.
    boot(machine.pcie_switch(), |vm| {
        wait(vm, NVME)?;
        for params in ["", "iopmem_dax=0", ""] {
            serve(vm, &format!("iopmem_p2pdma=32MiB {params}"))?;
            let function = vm.bar(0);
            let start = place(vm, &function)?;
            says(
                vm,
                &[
                    ("size", &((SIZE - SHARE) / 512).to_string()),
                    ("queue/dax", if params.is_empty() { "1" } else { "0" }),
                    ("device/p2pmem/size", &SHARE.to_string()),
                    ("device/p2pmem/available", &SHARE.to_string()),
                ],
            )?;
            vm.sh_for(
                &format!("pmem-guest direct-write /dev/iopmem0 {LEN} 8; sync /dev/iopmem0"),
                LONG,
            )?;
            let before = vm.nvme_accesses().len();
            vm.sh_for(
                &format!(
                    "pmem-guest odirect-through /dev/{NVME} /sys/bus/pci/devices/{function}/p2pmem/allocate {LEN} 5"
                ),
                LONG,
            )?;
            let accesses = vm.nvme_accesses();
            let (share, other): (Vec<_>, Vec<_>) = accesses[before..]
                .iter()
                .partition(|(at, _)| (start + SIZE - SHARE..start + SIZE).contains(at));
            let sum = |of: &[&(u64, u64)]| of.iter().map(|(_, len)| len).sum::<u64>();
            ensure!(
                sum(&share) >= 2 * LEN && sum(&other) < LEN / 16,
                "{} bytes of the BAR's end, {} of other memory",
                sum(&share),
                sum(&other)
            );
            let written = fs::read(disk.path())?;
            ensure!(
                written[LEN as usize..][..LEN as usize] == pattern(6, LEN),
                "the disk has something else"
            );
            // The disk's part has not changed.
            compare(&memory, 8, LEN)?;
            unload(vm)?;
            vm.sh(&format!(
                "test ! -e /sys/bus/pci/devices/{function}/p2pmem/size"
            ))?;
        }
        Ok(())
    })
}

/// Pages that a peer reads and writes must not become something else's: the driver goes when the peer is done.
#[test]
fn a_bar_is_unbound_while_a_peer_uses_it() -> Result<()> {
    const ROUNDS: u64 = 6;
    let (memory, disk) = (Persistent::new(SIZE)?, Persistent::new(64 * MIB)?);
    let Some(machine) = machine(&memory, &disk)? else {
        return Ok(());
    };
    boot(machine, |vm| {
        wait(vm, NVME)?;
        serve(vm, "")?;
        let (function, start) = (vm.bar(0), place(vm, &vm.bar(0))?);
        vm.sh_for(&format!("{EXT4}; mkdir -p /mnt/a"), LONG)?;
        for round in 0..ROUNDS {
            let before = vm.nvme_accesses().len();
            vm.sh_for(
                &format!(
                    "for i in $(seq 100); do test -b /dev/iopmem0 && break; sleep 0.1; done
                     mount -o dax=always /dev/iopmem0 /mnt/a
                     truncate -s 8M /mnt/a/buffer
                     rm -f /tmp/ended
                     ( set +e
                       fio --name=x --filename=/dev/{NVME} --direct=1 --rw=randrw --bs=64k --size=32m --time_based \\
                           --runtime=100 --ioengine=libaio --iodepth=8 --iomem=mmapshared:/mnt/a/buffer
                       echo $? >/tmp/ended ) >/tmp/fio 2>&1 &"
                ),
                LONG,
            )?;
            // It is at work, a little more of it each round.
            let since = Instant::now();
            while moved(vm, before, start).0 <= (1 + round) * MIB {
                ensure!(
                    since.elapsed() < LONG,
                    "round {round}: fio does not move a MiB"
                );
                vm.sh("test ! -e /tmp/ended || { cat /tmp/fio; exit 1; }")?;
            }
            vm.sh_for(
                &format!(
                    "echo {function} >{DRIVER}/unbind
                     test ! -e /dev/iopmem0"
                ),
                LONG,
            )?;
            // Not a byte from here on. fio is killed by SIGBUS, one of its processes.
            let before = vm.nvme_accesses().len();
            vm.sh_for(
                "for i in $(seq 600); do test -s /tmp/ended && break; sleep 0.1; done
                 test $(cat /tmp/ended) != 0
                 umount /mnt/a",
                LONG,
            )?;
            let (peer, _) = moved(vm, before, start);
            ensure!(
                peer == 0,
                "round {round}: {peer} bytes after the driver has gone"
            );
            vm.sh(&format!("echo {function} >{DRIVER}/bind"))?;
        }
        wait(vm, "iopmem0")?;
        vm.sh("e2fsck -fp /dev/iopmem0 || test $? = 1")?;
        unload(vm)
    })
}
