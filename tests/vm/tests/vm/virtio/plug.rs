// SPDX-License-Identifier: GPL-2.0-only

//! Devices that come and go while they are used.

use super::{bind, serve, unbind, DRIVER, EXT4, LONG, SIZE, XFS};
use crate::lifecycle::check_leaks;
use anyhow::{ensure, Context, Result};
use vm_tests::{boot, stock, unload, Persistent, MIB};
use xtask::vm::{Builder, Vm};

/// How often devices are unplugged between two looks at the memory; a multiple of the number of devices.
const ROUNDS: i64 = 99;

/// How a device is taken from a machine.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Its slot is switched off, on a machine with one CPU: QEMU, when it emulates CPUs, may die of an access to another
    /// device at the moment when one goes (`iotlb_to_section: Assertion ...`), or lose a CPU's timer.
    Slot,
    /// The driver is unbound from it, which is the same to the driver.
    Driver,
}

impl Way {
    /// Gives the machine device `n`, and waits for its disk, which is the only one.
    fn give(self, vm: &Vm, n: usize) -> Result<()> {
        match self {
            Way::Slot => {
                vm.plug(n)?;
                vm.sh("for i in $(seq 300); do test -b /dev/pmem0 && exit 0; sleep 0.05; done; exit 1")
                    .map(drop)
            }
            Way::Driver => bind(vm, DRIVER, &name(vm, n)?),
        }
    }

    /// Takes device `n`.
    fn take(self, vm: &Vm, n: usize) -> Result<()> {
        match self {
            Way::Slot => vm.unplug(n, LONG),
            Way::Driver => {
                let name = name(vm, n)?;
                vm.sh_for(
                    &format!("echo {name} >/sys/bus/virtio/drivers/{DRIVER}/unbind"),
                    LONG,
                )
                .map(drop)
            }
        }
    }
}

/// The name of device `n` on the virtio bus.
fn name(vm: &Vm, n: usize) -> Result<String> {
    let name = vm.sh(&format!(
        "cd /sys/bus/pci/devices/0000:{:02x}:00.0; echo virtio*",
        n + 1
    ))?;
    Ok(name.trim().to_owned())
}

/// Programs that write the disk itself, until it is gone. All of what they do must end.
const RAW: &str = "\
    touch /tmp/up1 /tmp/up2
    ( while xfs_io -d -c 'pwrite -b 64k 1m 4m' /dev/pmem0; do :; done
      rm /tmp/up1 ) >/dev/null 2>&1 &
    ( while xfs_io -c 'pwrite 0 1m' -c fsync /dev/pmem0; do :; done
      rm /tmp/up2 ) >/dev/null 2>&1 &";

/// Programs that write files, one of them by a mapping: its memory goes while the program stores to it.
const FILES: &str = "\
    touch /tmp/up1 /tmp/up2
    ( i=0; while echo x >/mnt/a/new$((i % 50)) && xfs_io -c fsync /mnt/a/new$((i % 50)); do i=$((i + 1)); done
      rm /tmp/up1 ) >/dev/null 2>&1 &
    ( ( echo 'mmap -rw 0 1m'; yes 'mwrite 0 1m' ) | xfs_io /mnt/a/mapped || true
      rm /tmp/up2 ) >/dev/null 2>&1 &";

/// A device goes while it is used: the programs end, with errors and signals, and nothing else does.
fn round(vm: &Vm, way: Way, n: usize) -> Result<()> {
    way.give(vm, n)?;
    let (prepare, programs, clean) = match n {
        0 => ("", RAW, ""),
        _ => (
            // What the last round has left: synced before the device went, so that it is whole.
            "mount -o dax=always /dev/pmem0 /mnt/a
             pmem-guest verify /mnt/a/kept 1000000 7",
            FILES,
            "umount /mnt/a",
        ),
    };
    vm.sh(&format!("{prepare}\n{programs}\nsleep 0.5"))?;
    way.take(vm, n)?;
    vm.sh_for(
        &format!(
            "for i in $(seq 600); do test -e /tmp/up1 || test -e /tmp/up2 || break; sleep 0.05; done
             test ! -e /tmp/up1; test ! -e /tmp/up2
             {clean}
             test ! -e /dev/pmem0"
        ),
        LONG,
    )
    .map(drop)
}

/// Has `rounds` take devices while they are used: one without a file system, one with ext4, one with XFS.
fn are_taken(way: Way, rounds: impl FnOnce(&Vm) -> Result<()>) -> Result<()> {
    let memories = [
        Persistent::new(64 * MIB)?,
        Persistent::new(SIZE)?,
        Persistent::new(SIZE)?,
    ];
    let machine = stock()?.upper(0).module("xfs");
    let machine = match way {
        Way::Slot => memories
            .iter()
            .fold(machine.cpus(1), Builder::virtio_pmem_later),
        Way::Driver => memories.iter().fold(machine, Builder::virtio_pmem),
    };
    boot(machine, |vm| {
        serve(vm)?;
        if way == Way::Driver {
            (0..memories.len()).try_for_each(|n| way.take(vm, n))?;
        }
        for (n, mkfs) in [(1, EXT4), (2, XFS)] {
            way.give(vm, n)?;
            vm.sh_for(
                &format!(
                    "{mkfs}; mkdir -p /mnt/a; mount -o dax=always /dev/pmem0 /mnt/a
                     truncate -s 1M /mnt/a/mapped
                     pmem-guest fill /mnt/a/kept 1000000 7
                     umount /mnt/a"
                ),
                LONG,
            )?;
            way.take(vm, n)?;
        }
        rounds(vm)?;
        for (n, check) in [
            (1, "e2fsck -fp /dev/pmem0"),
            (2, "xfs_repair -n /dev/pmem0"),
        ] {
            way.give(vm, n)?;
            vm.sh_for(
                &format!("mount -o dax=always /dev/pmem0 /mnt/a; umount /mnt/a; {check}"),
                LONG,
            )?;
            way.take(vm, n)?;
        }
        unload(vm)
    })
}

/// Storage is taken away from machines that run, and given to them. What is leaked each time adds up.
#[test]
fn devices_are_unplugged_a_hundred_times_while_they_are_used() -> Result<()> {
    are_taken(Way::Slot, |vm| {
        check_leaks(vm, ROUNDS, |rounds| {
            (0..rounds).try_for_each(|i| round(vm, Way::Slot, i as usize % 3))?;
            // The kernel forgets the addresses of the stacks of processes that have ended when a module goes.
            unload(vm)?;
            serve(vm)
        })
    })
}

/// The same with more than one CPU: who uses a device does it while the other CPU takes it away.
#[test]
fn devices_are_unbound_while_they_are_used() -> Result<()> {
    are_taken(Way::Driver, |vm| {
        (0..12).try_for_each(|i| round(vm, Way::Driver, i % 3))
    })
}

/// Several devices, of which each keeps its data while others come and go.
#[test]
fn each_device_is_a_disk() -> Result<()> {
    let memories = [(); 3].map(|()| Persistent::new(64 * MIB));
    let memories = memories.into_iter().collect::<Result<Vec<_>>>()?;
    let machine = stock()?
        .upper(0)
        .virtio_pmem(&memories[0])
        .virtio_pmem(&memories[1])
        .virtio_pmem_later(&memories[2]);
    boot(machine, |vm| {
        serve(vm)?;
        let write = |disk: usize| {
            vm.sh(&format!(
                "for i in $(seq 100); do test -b /dev/pmem{disk} && break; sleep 0.1; done
                 pmem-guest fill /tmp/x 1000000 {disk}
                 dd if=/tmp/x of=/dev/pmem{disk} bs=64k conv=fsync 2>/dev/null"
            ))
        };
        // Of each disk, which one it was at first: numbers depend on the order in which devices come.
        let contents = |disks: &[usize]| -> Result<Vec<usize>> {
            let mut found = Vec::new();
            for disk in disks {
                let of = vm.sh(&format!(
                    "dd if=/dev/pmem{disk} bs=1000 count=1000 of=/tmp/x 2>/dev/null
                     for i in 0 1 2; do pmem-guest verify /tmp/x 1000000 $i 2>/dev/null && echo $i; done; true"
                ))?;
                found.push(
                    of.trim()
                        .parse()
                        .with_context(|| format!("pmem{disk}: {of:?}"))?,
                );
            }
            Ok(found)
        };
        write(0)?;
        write(1)?;
        vm.plug(2)?;
        write(2)?;
        vm.unplug(1, LONG)?;
        vm.sh("test ! -e /dev/pmem1")?;
        ensure!(contents(&[0, 2])? == [0, 2], "others have changed");
        vm.plug(1)?;
        vm.sh("for i in $(seq 100); do test -b /dev/pmem1 && break; sleep 0.1; done; test -b /dev/pmem1")?;
        ensure!(contents(&[0, 1, 2])? == [0, 1, 2], "it has changed");
        unload(vm)?;
        serve(vm)?;
        let mut all = contents(&[0, 1, 2])?;
        all.sort_unstable();
        ensure!(all == [0, 1, 2], "{all:?}");
        Ok(())
    })
}

/// A device that is pulled out answers nothing any more, not even the driver's farewell.
#[test]
fn a_device_that_was_pulled_out_fails_at_once() -> Result<()> {
    let memory = Persistent::new(64 * MIB)?;
    boot(super::machine(&memory)?, |vm| {
        serve(vm)?;
        vm.sh("mkfs.ext4 -q -F -b 4096 -J size=4 /dev/pmem0
             mkdir -p /mnt/a; mount -o dax=always /dev/pmem0 /mnt/a
             truncate -s 1M /mnt/a/mapped; sync")?;
        vm.sh(FILES)?;
        // To the kernel a device is not there if its configuration space cannot be read: here, because the port that
        // it is behind passes on no accesses of that any more.
        let seconds = vm.sh(
            "sleep 0.5
             port=/sys/bus/pci/devices/$(basename $(dirname $(readlink -f /sys/bus/pci/devices/0000:01:00.0)))
             printf '\\000\\376\\376' | dd of=$port/config bs=1 seek=24 conv=notrunc 2>/dev/null
             before=$(cut -d. -f1 /proc/uptime)
             echo 1 >/sys/bus/pci/devices/0000:01:00.0/remove
             echo $(($(cut -d. -f1 /proc/uptime) - before))",
        )?;
        ensure!(
            seconds.trim().parse::<u64>()? < 10,
            "it took {} s",
            seconds.trim()
        );
        vm.sh_for(
            "for i in $(seq 600); do test -e /tmp/up1 || test -e /tmp/up2 || break; sleep 0.05; done
             test ! -e /tmp/up1; test ! -e /tmp/up2
             umount /mnt/a
             test ! -e /dev/pmem0",
            LONG,
        )?;
        unload(vm)
    })
}

/// An administrator who moves a device to the kernel's own driver and back finds the same data.
#[test]
fn a_device_moves_between_drivers() -> Result<()> {
    const THEIRS: &str = "virtio_pmem";
    let memory = Persistent::new(64 * MIB)?;
    let machine = super::machine(&memory)?.module(THEIRS).module("nd_pmem");
    boot(machine, |vm| {
        // Theirs was there first.
        let device = vm.sh(&format!(
            "for i in $(seq 100); do test -b /dev/pmem0 && break; sleep 0.1; done
             cd /sys/bus/virtio/drivers/{THEIRS}; echo virtio[0-9]*"
        ))?;
        let device = device.trim();
        serve(vm)?;
        vm.sh(&format!(
            "test ! -e /sys/bus/virtio/drivers/{DRIVER}/{device}
             mkfs.ext4 -q -F -b 4096 /dev/pmem0; mkdir -p /mnt/a
             mount -o dax=always /dev/pmem0 /mnt/a
             pmem-guest fill /mnt/a/0 1000000 0; umount /mnt/a"
        ))?;
        for round in 1..=6 {
            let (from, to) = match round % 2 {
                1 => (THEIRS, DRIVER),
                _ => (DRIVER, THEIRS),
            };
            unbind(vm, from)?;
            vm.sh("test ! -e /dev/pmem0")?;
            bind(vm, to, device)?;
            vm.sh(&format!(
                "mount -o dax=always /dev/pmem0 /mnt/a
                 for i in $(seq 0 {}); do pmem-guest verify /mnt/a/$i 1000000 $i; done
                 pmem-guest mmap-msync /mnt/a/{round} 1000000 {round}
                 umount /mnt/a; e2fsck -fn /dev/pmem0",
                round - 1
            ))?;
        }
        unload(vm)
    })
}
