// SPDX-License-Identifier: GPL-2.0-only

//! What is refused, what is said then, and that nothing has changed.

use super::{
    attribute, forget, load_movable, meminfo, prepare, ram, said, set_state, take_down, try_state,
    BLK, BLOCKS, DEVICE, EAGAIN, EBUSY, EINVAL, PAGES,
};
use anyhow::{ensure, Context, Result};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use vm_tests::{boot, load, machine, stock, unload, wanted, Persistent, Trace, Use, MIB, UPPER};
use xtask::flavour::Flavour;
use xtask::vm::{Vm, PMEM_KO};

/// Loads the driver, which must refuse with `errno` and say all of `needles`.
fn refused(vm: &Vm, params: &str, errno: i32, needles: &[&str]) -> Result<()> {
    forget(vm)?;
    let Err(error) = vm.insmod(PMEM_KO, params)? else {
        unload(vm).ok();
        anyhow::bail!("{params:?} was accepted: {}", said(vm));
    };
    let said = said(vm);
    ensure!(
        error.errno == errno,
        "{params:?}: errno {}, not {errno}: {said}",
        error.errno
    );
    for needle in needles {
        ensure!(
            said.contains(needle),
            "{params:?}: {needle:?} is not in {said:?}"
        );
    }
    Ok(())
}

/// A line of parameters, the error, and what the message must say: the parameter, its value, the remedy.
///
/// The machine has System RAM from 0 to 1 GiB but for 256 MiB at 512 MiB, and from 4 GiB to 4.5 GiB, of node 1; what
/// is reserved above that is of the same node.
const BAD: &[(&str, i32, &[&str])] = &[
    (
        "kmem_start=4608M",
        EINVAL,
        &["kmem_size=", "nothing is given"],
    ),
    (
        "kmem_size=512M",
        EINVAL,
        &["kmem_start=", "nothing is given"],
    ),
    (
        "kmem_start=4608M kmem_size=512mb",
        EINVAL,
        &["kmem_size=512mb", "not a unit"],
    ),
    (
        "kmem_start=4608M kmem_size=0",
        EINVAL,
        &["kmem_size=0", "size 0"],
    ),
    (
        "kmem_start=4608M kmem_size=512M kmem_format=ext4",
        EINVAL,
        &["kmem_format=ext4", "none or blk"],
    ),
    (
        "kmem_start=4608M kmem_size=512M kmem_format=blk,blk",
        EINVAL,
        &["kmem_format has 2", "1 range(s)"],
    ),
    (
        "kmem_start=4608M kmem_size=512M kmem_format_force=2",
        EINVAL,
        &["kmem_format_force=2", "1 or 0"],
    ),
    (
        "kmem_start=4608M kmem_size=512M kmem_atomic=maybe",
        EINVAL,
        &["kmem_atomic=maybe", "1 or 0"],
    ),
    (
        "kmem_start=4608M kmem_size=512M kmem_scrub=",
        EINVAL,
        &["kmem_scrub=", "1 or 0"],
    ),
    (
        "kmem_start=4608M,4736M kmem_size=256M,128M kmem_format=blk",
        EINVAL,
        &["overlap", "kmem_start"],
    ),
    // Memory is added in blocks.
    (
        "kmem_start=4609M kmem_size=256M kmem_format=blk",
        EINVAL,
        &["0x120100000", "blocks of 128MiB", "kmem_start", "kmem_size"],
    ),
    (
        "kmem_start=4608M kmem_size=200M kmem_format=blk",
        EINVAL,
        &["blocks of 128MiB", "kmem_start", "kmem_size"],
    ),
    (
        "kmem_start=1P kmem_size=1G kmem_format=blk",
        EINVAL,
        &["0x4000000000000", "outside of what can be memory"],
    ),
    (
        "kmem_start=4608M kmem_size=512M kmem_format_force=1",
        EINVAL,
        &[
            "kmem_format_force=1 without a kmem_format",
            "kmem_format=none",
        ],
    ),
    // What is somebody else's.
    (
        "kmem_start=128M kmem_size=128M kmem_format=blk",
        EBUSY,
        &["System RAM", "memmap=0x8000000$0x8000000"],
    ),
    (
        "kmem_start=4G kmem_size=1G kmem_format=blk",
        EBUSY,
        &["System RAM", "memmap=0x40000000$0x100000000"],
    ),
    (
        "kmem_start=4608M kmem_size=512M kmem_format=blk",
        EBUSY,
        &["node 1 has 512MiB of other memory", "a node of its own"],
    ),
    (
        "kmem_start=512M kmem_size=128M kmem_format=blk",
        EBUSY,
        &["node 0 has", "of other memory", "a node of its own"],
    ),
];

/// An administrator who makes a mistake must learn which, and must be able to try again without a reboot.
#[test]
fn bad_parameters_name_their_fault_and_leave_no_trace() -> Result<()> {
    let machine = stock()?
        .range(Use::Reserved, UPPER + 512 * MIB, 512 * MIB)
        .range(Use::Reserved, 512 * MIB, 256 * MIB);
    boot(machine, |vm| {
        vm.insmod(PMEM_KO, "pmem_virtio=0 iopmem=0")?.unwrap_err();
        prepare(vm)?;
        let before = Trace::of(vm)?;
        let mut faults = Vec::new();
        for (params, errno, needles) in BAD {
            if let Err(fault) = refused(vm, params, *errno, needles) {
                faults.push(format!("{fault:#}"));
            }
            Trace::of(vm)?
                .check(&before)
                .with_context(|| format!("after {params:?}"))?;
        }
        ensure!(faults.is_empty(), "{}", faults.join("\n"));
        Ok(())
    })
}

/// Data of somebody who forgot a parameter, or mistyped it, must stay as it is.
#[test]
fn what_has_no_format_is_not_touched() -> Result<()> {
    const SIZE: u64 = 256 * MIB;
    let memory = Persistent::new(SIZE)?;
    // Something else, with something in the places of the superblocks.
    let data: Vec<u8> = (0..SIZE / 8)
        .flat_map(|n| (n | (1 << 63)).to_le_bytes())
        .collect();
    fs::write(memory.path(), &data)?;
    let same = |what: &str| -> Result<()> {
        ensure!(
            fs::read(memory.path())? == data,
            "the range has changed: {what}"
        );
        Ok(())
    };
    boot(stock()?.persistent(&memory), |vm| {
        vm.insmod(PMEM_KO, "pmem_virtio=0 iopmem=0")?.unwrap_err();
        prepare(vm)?;
        let before = Trace::of(vm)?;
        for params in [
            "kmem_start=4G kmem_size=256M",
            "kmem_start=4G kmem_size=128M",
        ] {
            refused(
                vm,
                params,
                EINVAL,
                &["no superblock", "kmem_format=none", "kmem_format=blk"],
            )?;
            same(params)?;
            Trace::of(vm)?
                .check(&before)
                .with_context(|| format!("after {params:?}"))?;
        }
        // A word that is wrong elsewhere must not cost data either.
        refused(
            vm,
            "kmem_start=4G kmem_size=256M kmem_format=blk kmem_scrub=x",
            EINVAL,
            &["kmem_scrub=x"],
        )?;
        same("after kmem_scrub=x")?;
        assert_eq!(meminfo(vm, 1, "MemTotal")?, 0);
        Ok(())
    })
}

/// A format that is there counts, and only who says so twice loses it.
#[test]
fn a_format_is_kept_unless_forced() -> Result<()> {
    boot(stock()?, |vm| {
        load_movable(vm, BLK)?;
        let uuid = attribute(vm, "uuid")?;
        vm.sh("pmem-guest fill /tmp/x 1048576 1; dd if=/tmp/x of=/dev/kmem1 bs=1M oflag=direct 2>/dev/null")?;
        take_down(vm)?;

        for params in [
            "kmem_start=4G kmem_size=1G",
            BLK,
            "kmem_start=4G kmem_size=1G kmem_format=none",
        ] {
            load(vm, params)?;
            assert_eq!(attribute(vm, "format")?, "blk", "{params}");
            assert_eq!(attribute(vm, "uuid")?, uuid, "{params}");
            vm.sh("pmem-guest compare /tmp/x /dev/kmem1 1048576")?;
            take_down(vm)?;
        }
        // A part of it, or more than it.
        for size in ["512M", "896M"] {
            refused(
                vm,
                &format!("kmem_start=4G kmem_size={size} kmem_format=blk"),
                EINVAL,
                &["a range of 1GiB", "kmem_size=1073741824"],
            )?;
        }

        forget(vm)?;
        load(
            vm,
            "kmem_start=4G kmem_size=1G kmem_format=blk kmem_format_force=1",
        )?;
        let said_first = said(vm);
        ensure!(
            said_first.contains(&uuid) && said_first.contains("destroyed"),
            "{said_first}"
        );
        let second = attribute(vm, "uuid")?;
        assert_ne!(second, uuid);
        assert_eq!(ram(vm)?, BLOCKS);
        vm.sh("pmem-guest compare /dev/zero /dev/kmem1 1048576")?;
        // Not once more, when it is plugged again.
        vm.sh("dd if=/tmp/x of=/dev/kmem1 bs=1M oflag=direct 2>/dev/null")?;
        set_state(vm, "unplugged")?;
        set_state(vm, "online")?;
        assert_eq!(attribute(vm, "uuid")?, second);
        vm.sh("pmem-guest compare /tmp/x /dev/kmem1 1048576")?;
        take_down(vm)?;

        forget(vm)?;
        load(
            vm,
            "kmem_start=4G kmem_size=1G kmem_format=none kmem_format_force=1",
        )?;
        let said = said(vm);
        ensure!(
            said.contains(&second) && said.contains("destroyed"),
            "{said}"
        );
        assert_eq!(ram(vm)?, PAGES - 2);
        take_down(vm)?;
        // Of the other format now.
        load(vm, BLK)?;
        assert_eq!(attribute(vm, "format")?, "none");
        take_down(vm)
    })
}

/// Memory that stays offline is of no use, and a part of the range cannot go alone: data is in all of it.
#[test]
fn memory_blocks_are_online_all_or_none() -> Result<()> {
    boot(stock()?, |vm| {
        vm.insmod(PMEM_KO, "pmem_virtio=0 iopmem=0")?.unwrap_err();
        let before = Trace::of(vm)?;
        vm.write("/sys/devices/system/memory/auto_online_blocks", b"offline")?;
        refused(
            vm,
            BLK,
            EAGAIN,
            &["stays offline", "online_movable", "auto_online_blocks"],
        )?;
        Trace::of(vm)?.check(&before)?;

        load_movable(vm, BLK)?;
        vm.sh("pmem-guest fill /tmp/x 1048576 1; dd if=/tmp/x of=/dev/kmem1 bs=1M oflag=direct 2>/dev/null")?;
        for block in [32, 35, 39] {
            forget(vm)?;
            let path = format!("/sys/devices/system/memory/memory{block}/state");
            let error = vm
                .write(&path, b"offline")
                .expect_err("a memory block went offline");
            let errno = error
                .downcast_ref()
                .map(|error: &xtask::vm::Errno| error.errno);
            assert_eq!(errno, Some(EBUSY), "{error:#}");
            assert_eq!(vm.text(&path)?.trim(), "online");
            let said = said(vm);
            ensure!(said.contains("only with all of its range"), "{said:?}");
        }
        assert_eq!(ram(vm)?, BLOCKS - 256);
        vm.sh("pmem-guest compare /tmp/x /dev/kmem1 1048576")?;
        // And it is still possible with all of it.
        take_down(vm)
    })
}

/// The module is in use as long as its memory is.
#[test]
fn the_driver_stays_while_its_memory_does() -> Result<()> {
    boot(stock()?, |vm| {
        load_movable(vm, BLK)?;
        let uses = || -> Result<u32> {
            Ok(vm
                .sh("grep '^pmem ' /proc/modules | cut -d' ' -f3")?
                .trim()
                .parse()?)
        };
        for state in ["online", "offline", "online"] {
            set_state(vm, state)?;
            ensure!(uses()? > 0, "no use is counted while it is {state}");
            let error = vm.rmmod("pmem")?.expect_err("the driver was unloaded");
            assert_eq!(error.errno, EAGAIN, "{error}");
        }
        for state in ["", "plugged", "Online", "offlineoffline"] {
            assert!(
                try_state(vm, state)?.is_err() || state.is_empty(),
                "{state:?}"
            );
        }

        // An open disk keeps the memory.
        vm.sh("sleep 600 </dev/kmem1 & echo $! >/tmp/pid")?;
        forget(vm)?;
        let error = try_state(vm, "unplugged")?.expect_err("an open disk has gone");
        assert_eq!(error.errno, EBUSY, "{error}");
        ensure!(said(vm).contains("the disk is in use"), "{}", said(vm));
        set_state(vm, "offline")?;
        try_state(vm, "unplugged")?.expect_err("an open disk has gone");
        assert_eq!(attribute(vm, "state")?, "offline");
        vm.sh("kill -KILL $(cat /tmp/pid); while grep -qs '^State:.[^Z]' /proc/$(cat /tmp/pid)/status; do sleep 0.01; done")?;

        set_state(vm, "unplugged")?;
        assert_eq!(uses()?, 0);
        assert_eq!(attribute(vm, "ram")?, "0");
        // Without a use it can go, from the attribute's own directory too.
        ensure!(
            vm.sh(&format!("ls {DEVICE}"))?.contains("state"),
            "no attributes"
        );
        unload(vm)
    })
}

/// What the kernel has in the memory cannot be moved away. The administrator is told, and nothing breaks.
#[test]
fn memory_that_cannot_move_keeps_it_online() -> Result<()> {
    boot(stock()?, |vm| {
        vm.write("/sys/devices/system/memory/auto_online_blocks", b"online")?;
        load(vm, BLK)?;
        vm.sh("pmem-guest fill /tmp/x 1048576 1; dd if=/tmp/x of=/dev/kmem1 bs=1M oflag=direct 2>/dev/null")?;
        // Pages of page tables and of the slab caches, bound to the node.
        super::groups(vm)?;
        vm.sh("( echo 0 >/sys/fs/cgroup/node1/cgroup.procs
               mkdir -p /tmp/many; cd /tmp/many; for i in $(seq 3000); do echo >$i; done )")?;
        for state in ["offline", "unplugged"] {
            forget(vm)?;
            let Err(error) = try_state(vm, state)? else {
                // Nothing of the kernel's was there.
                set_state(vm, "online")?;
                continue;
            };
            assert_eq!(error.errno, EBUSY, "{error}");
            ensure!(said(vm).contains("cannot be moved"), "{}", said(vm));
            assert_eq!(attribute(vm, "state")?, "online");
        }
        ram(vm)?;
        vm.sh("pmem-guest compare /tmp/x /dev/kmem1 1048576; dd if=/tmp/x of=/dev/kmem1 bs=1M seek=3 oflag=direct 2>/dev/null")?;
        Ok(())
    })
}

/// A range that is refused must not cost the disks that the same command adds.
#[test]
fn disks_come_up_beside_a_range_that_does_not() -> Result<()> {
    boot(stock()?, |vm| {
        prepare(vm)?;
        // They cannot share a byte.
        refused(
            vm,
            "pmem_start=4G pmem_size=512M kmem_start=4480M kmem_size=128M kmem_format=blk",
            EBUSY,
            &["0x118000000", "claimed by another driver", "/proc/iomem"],
        )?;
        load(
            vm,
            "pmem_start=4608M pmem_size=512M kmem_start=4G kmem_size=512M",
        )?;
        ensure!(said(vm).contains("no superblock"), "{}", said(vm));
        assert_eq!(vm.sh("ls /sys/block")?.trim(), "pmem0");
        assert_eq!(attribute(vm, "state")?, "unplugged");
        assert_eq!(meminfo(vm, 1, "MemTotal")?, 0);
        unload(vm)?;

        load(
            vm,
            "pmem_start=4608M pmem_size=512M kmem_start=4G kmem_size=512M kmem_format=blk",
        )?;
        assert_eq!(
            vm.sh("ls /sys/block")?
                .split_whitespace()
                .collect::<Vec<_>>(),
            ["kmem1", "pmem0"]
        );
        for disk in ["kmem1", "pmem0"] {
            vm.sh(&format!(
                "mkfs.ext4 -q -F -b 4096 /dev/{disk}; e2fsck -fn /dev/{disk}"
            ))?;
        }
        take_down(vm)?;
        load(
            vm,
            "pmem_start=4608M pmem_size=512M kmem_start=4G kmem_size=512M",
        )?;
        vm.sh("e2fsck -fn /dev/kmem1; e2fsck -fn /dev/pmem0")?;
        take_down(vm)
    })
}

/// One copy of the superblock is enough, and the other one is written again.
#[test]
fn a_damaged_copy_of_the_superblock_is_repaired() -> Result<()> {
    const SIZE: u64 = 128 * MIB;
    const LAST: u64 = SIZE - 4096;
    let memory = Persistent::new(SIZE)?;
    boot(stock()?.persistent(&memory), |vm| {
        prepare(vm)?;
        load(vm, "kmem_start=4G kmem_size=128M kmem_format=blk")?;
        let uuid = attribute(vm, "uuid")?;
        vm.sh("pmem-guest fill /tmp/x 1048576 1; dd if=/tmp/x of=/dev/kmem1 bs=1M oflag=direct 2>/dev/null")?;
        take_down(vm)?;

        let file = File::options().read(true).write(true).open(memory.path())?;
        let copy = |at: u64| -> Result<[u8; 128]> {
            let mut bytes = [0; 128];
            file.read_exact_at(&mut bytes, at)?;
            Ok(bytes)
        };
        for (at, name) in [(0, "primary superblock"), (LAST, "second superblock")] {
            for (offset, bytes) in [
                (0, &[0; 8][..]),
                (40, &[0xff; 3]),
                (124, &[1, 2, 3, 4]),
                (0, &[0x5a; 128]),
            ] {
                file.write_all_at(bytes, at + offset)?;
                forget(vm)?;
                load(vm, "kmem_start=4G kmem_size=128M")?;
                let said = said(vm);
                ensure!(
                    said.contains(name) && said.contains("the other one counts"),
                    "{said}"
                );
                assert_eq!(attribute(vm, "uuid")?, uuid);
                assert_eq!(copy(0)?, copy(LAST)?, "{name} at {offset}");
                vm.sh("pmem-guest compare /tmp/x /dev/kmem1 1048576")?;
                take_down(vm)?;
                assert_eq!(copy(0)?, copy(LAST)?, "{name} at {offset}");
            }
        }
        // Both: refused, and not formatted by a parameter that is there in every boot.
        for at in [0, LAST] {
            file.write_all_at(&[0x5a; 8], at + 48)?;
        }
        let before = fs::read(memory.path())?;
        for params in [
            "kmem_start=4G kmem_size=128M",
            "kmem_start=4G kmem_size=128M kmem_format=blk",
        ] {
            refused(
                vm,
                params,
                EINVAL,
                &["no valid superblock", "kmem_format_force=1"],
            )?;
            ensure!(
                fs::read(memory.path())? == before,
                "the range has changed after {params}"
            );
        }
        load(
            vm,
            "kmem_start=4G kmem_size=128M kmem_format=blk kmem_format_force=1",
        )?;
        take_down(vm)
    })
}

/// A device that adds memory when it is asked to; this one is not, and its driver wants the page callback all the same.
const VIRTIO_MEM: &[&str] = &[
    "-m",
    "slots=1,maxmem=8G",
    "-object",
    "memory-backend-ram,id=more,size=1G",
    "-device",
    "virtio-mem-pci,memdev=more,node=0,requested-size=0",
];

/// The kernel has one callback for pages that come online. Who comes second is told so, and who has it is not harmed.
#[test]
fn virtio_mem_and_a_range_exclude_each_other() -> Result<()> {
    if !wanted(Flavour::Cloud)? {
        return Ok(());
    }
    let machine = machine(Flavour::Cloud)?
        .qemu(VIRTIO_MEM)
        .module("virtio_mem");
    boot(machine, |vm| {
        const BOUND: &str = "ls /sys/bus/virtio/drivers/virtio_mem | grep -c ^virtio || true";
        let bound = |wanted: u32| -> Result<()> {
            let found: u32 = vm.sh(BOUND)?.trim().parse()?;
            ensure!(
                found == wanted,
                "virtio_mem has {found} devices: {}",
                vm.dmesg()?
            );
            Ok(())
        };
        bound(1)?;
        vm.insmod(PMEM_KO, "pmem_virtio=0 iopmem=0")?.unwrap_err();
        prepare(vm)?;
        let before = Trace::of(vm)?;
        // Twice: what is there by now is a superblock.
        for params in [BLK, "kmem_start=4G kmem_size=1G"] {
            refused(
                vm,
                params,
                EBUSY,
                &["another driver, such as virtio-mem", "unload it"],
            )?;
            Trace::of(vm)?.check(&before)?;
            assert_eq!(meminfo(vm, 1, "MemTotal")?, 0);
        }

        // What the message says helps.
        let unload_other = || {
            vm.rmmod("virtio_mem")?
                .context("virtio_mem does not unload")
        };
        unload_other()?;
        load(vm, BLK)?;
        vm.sh("pmem-guest fill /tmp/x 1048576 1; dd if=/tmp/x of=/dev/kmem1 bs=1M oflag=direct 2>/dev/null")?;

        // An unplugged range leaves the callback to others.
        set_state(vm, "unplugged")?;
        let load_other = || {
            vm.insmod("/modules/virtio_mem.ko", "")?
                .context("virtio_mem does not load")
        };
        load_other()?;
        bound(1)?;
        let error = try_state(vm, "online")?.expect_err("both have the callback");
        assert_eq!(error.errno, EBUSY, "{error}");
        unload_other()?;
        set_state(vm, "online")?;
        vm.sh("pmem-guest compare /tmp/x /dev/kmem1 1048576")?;

        // And now the other driver loads, but cannot have its device.
        forget(vm)?;
        load_other()?;
        bound(0)?;
        ensure!(
            vm.dmesg()?.contains("probe with driver virtio_mem failed"),
            "{}",
            vm.dmesg()?
        );
        assert_eq!(ram(vm)?, BLOCKS - 256);
        for state in ["offline", "online"] {
            set_state(vm, state)?;
        }
        unload_other()?;
        assert_eq!(ram(vm)?, BLOCKS - 256);
        vm.sh("pmem-guest compare /tmp/x /dev/kmem1 1048576")?;
        take_down(vm)
    })
}
