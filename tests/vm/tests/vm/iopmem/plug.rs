// SPDX-License-Identifier: GPL-2.0-only

//! Devices that go and come while they are used.

use super::{bind, serve, unbind, wait, DRIVER, LONG, SIZE};
use crate::lifecycle::check_leaks;
use anyhow::{ensure, Context, Result};
use std::fs;
use vm_tests::{boot, stock, unload, End, Persistent, Trace, MIB};
use xtask::vm::{Builder, Vm};

/// How a device is taken.
///
/// Those that QEMU takes are of machines with one CPU: when it emulates more, it may die of an access to another device at
/// the moment when one goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// The driver is unbound from it.
    Unbind,
    /// The machine asks the guest for it.
    Unplug,
    /// It is pulled out of its slot: the guest finds that it has gone.
    Pull,
}

impl Way {
    /// A machine with devices of these memories, or with ports for them.
    fn machine(self, memories: &[Persistent]) -> Result<Builder<'_>> {
        let machine = stock()?.upper(0).module("xfs");
        Ok(match self {
            Way::Unbind => memories.iter().fold(machine, Builder::bar),
            Way::Unplug => memories.iter().fold(machine.cpus(1), Builder::bar),
            Way::Pull => memories
                .iter()
                .fold(machine.cpus(1).native_hotplug(), Builder::bar_later),
        })
    }

    /// Loads the driver, and leaves it without devices.
    fn serve(self, vm: &Vm, count: usize) -> Result<()> {
        serve(vm, "")?;
        match self {
            Way::Unbind => (0..count).try_for_each(|n| unbind(vm, &vm.bar(n))),
            _ => Ok(()),
        }
    }

    /// Gives the driver device `n`, and waits for its disk, which is the only one.
    fn give(self, vm: &Vm, n: usize) -> Result<()> {
        match self {
            Way::Unbind => bind(vm, &vm.bar(n))?,
            _ => vm.plug_bar(n)?,
        }
        wait(vm, "iopmem0")
    }

    /// Takes device `n`.
    fn take(self, vm: &Vm, n: usize) -> Result<()> {
        match self {
            Way::Unbind => unbind(vm, &vm.bar(n)),
            Way::Unplug => vm.unplug_bar(n, LONG),
            Way::Pull => {
                vm.pull_bar(n)?;
                // The guest has to find out, and gives a slot that has lost its device some time.
                vm.sh_for(
                    &format!(
                        "for i in $(seq 600); do test -e /sys/bus/pci/devices/{} || break; sleep 0.1; done
                         sleep 2",
                        vm.bar(n)
                    ),
                    LONG,
                )
                .map(drop)
            }
        }
    }
}

/// Programs that read and write the disk itself, until it is gone. All of what they do must end. fio takes its time to
/// begin, and none of them may make a file where the disk has been.
const RAW: &str = "\
    rm -f /tmp/end* /tmp/running
    ( while xfs_io -d -c 'pwrite -b 64k 1m 4m' -c 'pread -b 16k 1m 4m' /dev/iopmem0; do :; done
      echo 1 >/tmp/end1 ) >/dev/null 2>&1 &
    ( while xfs_io -c 'pwrite 0 1m' -c fsync /dev/iopmem0; do :; done
      echo 1 >/tmp/end2 ) >/dev/null 2>&1 &
    ( set +e
      fio --name=x --filename=/dev/iopmem0 --direct=1 --rw=randrw --bsrange=512-64k --blockalign=512 --size=8m \\
          --offset=8m --ioengine=io_uring --iodepth=8 --fsync=8 --time_based --runtime=300 \\
          --allow_file_create=0 --exec_prerun='touch /tmp/running'
      echo 1 >/tmp/end3 ) >/dev/null 2>&1 &
    for i in $(seq 200); do test -e /tmp/running && break; sleep 0.1; done
    test -e /tmp/running";

/// Programs that write files, one of them by a mapping: its memory goes while the program stores to it.
const FILES: &str = "\
    rm -f /tmp/end*
    ( i=0; while echo x >/mnt/a/new$((i % 50)) && xfs_io -c fsync /mnt/a/new$((i % 50)); do i=$((i + 1)); done
      echo 1 >/tmp/end1 ) >/dev/null 2>&1 &
    ( set +e
      ( echo 'mmap -rw 0 1m'; yes 'mwrite 0 1m' ) | xfs_io /mnt/a/mapped
      echo $? >/tmp/end2 ) >/dev/null 2>&1 &
    echo 1 >/tmp/end3";

/// How a shell says that SIGBUS has killed a program.
const BUS_ERROR: &str = "135";

/// Waits until the programs have ended.
fn have_ended(vm: &Vm) -> Result<()> {
    vm.sh_for(
        "for i in $(seq 1200); do test $(ls /tmp/end[123] 2>/dev/null | wc -l) = 3 && exit 0; sleep 0.05; done
         ls /tmp/end*
         for task in /proc/[0-9]*/task/*; do
             grep -qE 'fio|xfs_io|io-' $task/comm && head -n 40 $task/comm $task/stack $task/wchan
         done
         exit 1",
        LONG,
    )
    .map(drop)
}

/// A device goes while it is used: the programs end, with errors and signals, and nothing else does.
fn round(vm: &Vm, way: Way, n: usize) -> Result<()> {
    way.give(vm, n)?;
    let programs = match n {
        0 => RAW,
        _ => {
            // What the last round has left: synced before the device went, so that it is whole.
            vm.sh_for(
                "mount -o dax=always /dev/iopmem0 /mnt/a
                 pmem-guest verify /mnt/a/kept 1000000 7",
                LONG,
            )?;
            FILES
        }
    };
    // They must be at work when it goes.
    vm.sh(&format!("{programs}\nsleep 0.7"))?;
    if n == 0 {
        vm.sh("test ! -e /tmp/end1; test ! -e /tmp/end2; test ! -e /tmp/end3")?;
    } else {
        vm.sh("test ! -e /tmp/end1; test ! -e /tmp/end2")?;
    }
    way.take(vm, n)?;
    have_ended(vm)?;
    if n > 0 {
        let how = vm.sh("cat /tmp/end2; umount /mnt/a")?;
        ensure!(
            how.trim() == BUS_ERROR,
            "who has a file mapped ends with {}",
            how.trim()
        );
    }
    vm.sh("test ! -e /dev/iopmem0").map(drop)
}

/// Has `rounds` take devices while they are used: one without a file system, one with ext4, one with XFS.
fn are_taken(way: Way, rounds: impl FnOnce(&Vm) -> Result<()>) -> Result<()> {
    let memories = [
        Persistent::new(64 * MIB)?,
        Persistent::new(SIZE)?,
        Persistent::new(SIZE)?,
    ];
    boot(way.machine(&memories)?, |vm| {
        if way == Way::Unplug {
            (0..memories.len()).try_for_each(|n| vm.unplug_bar(n, LONG))?;
        }
        way.serve(vm, memories.len())?;
        for (n, mkfs) in [(1, super::EXT4), (2, super::XFS)] {
            way.give(vm, n)?;
            vm.sh_for(
                &format!(
                    "{mkfs}
                     mkdir -p /mnt/a
                     mount -o dax=always /dev/iopmem0 /mnt/a
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
            (1, "e2fsck -fp /dev/iopmem0"),
            (2, "xfs_repair -n /dev/iopmem0"),
        ] {
            way.give(vm, n)?;
            vm.sh_for(
                &format!("mount -o dax=always /dev/iopmem0 /mnt/a; umount /mnt/a; {check}"),
                LONG,
            )?;
            way.take(vm, n)?;
        }
        unload(vm)
    })
}

/// Takes devices `rounds` times, which must leave nothing behind.
fn leave_nothing(way: Way, rounds: i64) -> Result<()> {
    are_taken(way, |vm| {
        check_leaks(vm, rounds, |rounds| {
            (0..rounds).try_for_each(|i| round(vm, way, i as usize % 3))?;
            // The kernel forgets the addresses of the stacks of processes that have ended when a module goes.
            unload(vm)?;
            way.serve(vm, 3)
        })
    })
}

/// The driver is taken from devices that are used. What is leaked each time adds up.
#[test]
fn devices_are_unbound_75_times_while_they_are_used() -> Result<()> {
    leave_nothing(Way::Unbind, 75)
}

/// Devices are taken from a machine that runs, and given to it.
#[test]
fn devices_are_unplugged_21_times_while_they_are_used() -> Result<()> {
    leave_nothing(Way::Unplug, 21)
}

/// Devices are pulled out of a machine that runs, which nobody has told.
#[test]
fn devices_are_pulled_out_six_times_while_they_are_used() -> Result<()> {
    leave_nothing(Way::Pull, 6)
}

/// A PCIe port asks the guest by its attention button: the guest goes on with the device for five seconds, and takes its
/// time then.
#[test]
fn a_device_goes_by_the_button_of_its_port() -> Result<()> {
    let memory = [Persistent::new(64 * MIB)?];
    let machine = Way::Pull.machine(&memory)?;
    boot(machine, |vm| {
        let mut before = None;
        for _ in 0..3 {
            serve(vm, "")?;
            vm.plug_bar(0)?;
            wait(vm, "iopmem0")?;
            vm.sh(&format!("{RAW}\nsleep 1"))?;
            vm.unplug_bar(0, LONG)?;
            have_ended(vm)?;
            vm.sh("test ! -e /dev/iopmem0")?;
            unload(vm)?;
            // The kernel gives the port more addresses when it needs them first.
            let trace = Trace::of(vm)?;
            trace.check(before.get_or_insert_with(|| trace.clone()))?;
        }
        Ok(())
    })
}

/// A device that is gone answers all reads with ones, and nobody says that it has gone: what was written is lost, and a
/// flush must say so. The same ones from a device that is there are its data.
#[test]
fn a_device_that_answers_with_ones_is_asked_whether_it_is_there() -> Result<()> {
    let memory = Persistent::new(4 * MIB)?;
    boot(super::machine(&memory)?, |vm| {
        serve(vm, "")?;
        let commands = [
            "sync /dev/iopmem0",
            "xfs_io -ds -c 'pwrite -q 36k 4k' /dev/iopmem0",
            "dd if=/dev/iopmem0 of=/dev/null bs=4k skip=1 count=1 iflag=direct",
        ];
        let all_do = |good: bool| -> Result<()> {
            for command in commands {
                let ran = vm.try_sh(command)?;
                let is_good = ran.end == End::Exit(0);
                ensure!(
                    is_good == good && (good || ran.stderr.contains("Input/output error")),
                    "{command}: {ran:?}"
                );
            }
            Ok(())
        };
        all_do(true)?;
        fs::write(memory.path(), vec![0xff; 4 << 20])?;
        all_do(true)?;
        let ones = vm.sh(
            "dd if=/dev/iopmem0 bs=4k count=4 iflag=direct 2>/dev/null | tr -d '\\377' | wc -c",
        )?;
        ensure!(ones.trim() == "0", "{ones} bytes are something else");
        // To the kernel a device is not there if its configuration space cannot be read: here, because the port that
        // it is behind passes on no accesses of that for a while.
        let config = format!("/sys/bus/pci/devices/{}/config", vm.bar_port(0));
        vm.sh(&format!(
            "dd if={config} of=/tmp/buses bs=1 skip=24 count=3 2>/dev/null
             printf '\\000\\376\\376' | dd of={config} bs=1 seek=24 conv=notrunc 2>/dev/null"
        ))?;
        all_do(false)?;
        vm.sh(&format!(
            "dd if=/tmp/buses of={config} bs=1 seek=24 conv=notrunc 2>/dev/null"
        ))?;
        all_do(true)?;
        unload(vm)
    })
}

/// The numbers of disks are those that are free, from 0 on.
#[test]
fn numbers_are_given_anew() -> Result<()> {
    let memories = [(); 3].map(|()| Persistent::new(4 * MIB));
    let memories = memories.into_iter().collect::<Result<Vec<_>>>()?;
    let machine = memories.iter().fold(stock()?.upper(0), Builder::bar);
    boot(machine, |vm| {
        serve(vm, "")?;
        // The disk of each function, as far as it has one.
        let disks = || -> Result<String> {
            let functions: Vec<_> = (0..memories.len()).map(|n| vm.bar(n)).collect();
            let said = vm.sh(&format!(
                "for f in {}; do basename $(ls -d /sys/bus/pci/devices/$f/block/* 2>/dev/null || echo none); done",
                functions.join(" ")
            ))?;
            Ok(said.trim().replace('\n', " "))
        };
        let are = |wanted: &str| -> Result<()> {
            let found = disks()?;
            ensure!(found == wanted, "{found}, not {wanted}");
            Ok(())
        };
        are("iopmem0 iopmem1 iopmem2")?;
        let bars = [vm.bar(0), vm.bar(1), vm.bar(2)];
        unbind(vm, &bars[0])?;
        are("none iopmem1 iopmem2")?;
        bind(vm, &bars[0])?;
        are("iopmem0 iopmem1 iopmem2")?;
        unbind(vm, &bars[0])?;
        unbind(vm, &bars[1])?;
        bind(vm, &bars[1])?;
        are("none iopmem0 iopmem2")?;
        bind(vm, &bars[0])?;
        are("iopmem1 iopmem0 iopmem2")?;
        // A disk that somebody has open while its device goes and comes back is another one than the new one.
        vm.sh("sleep 600 </dev/iopmem2 & echo $! >/tmp/pid")?;
        unbind(vm, &bars[2])?;
        bind(vm, &bars[2])?;
        ensure!(
            disks()?.starts_with("iopmem1 iopmem0 iopmem"),
            "{}",
            disks()?
        );
        vm.sh("kill -KILL $(cat /tmp/pid); while grep -q '^State:.[^Z]' /proc/$(cat /tmp/pid)/status; do sleep 0.01; done")?;
        unbind(vm, &bars[2])?;
        bind(vm, &bars[2])?;
        are("iopmem1 iopmem0 iopmem2")?;
        // Each has its own memory.
        for (n, disk) in ["iopmem1", "iopmem0", "iopmem2"].into_iter().enumerate() {
            vm.sh(&format!(
                "pmem-guest direct-write /dev/{disk} {} {n}; sync /dev/{disk}",
                4 * MIB
            ))?;
        }
        for (memory, seed) in memories.iter().zip(0..) {
            super::compare(memory, seed, 4 * MIB)?;
        }
        unload(vm)?;
        serve(vm, "")?;
        are("iopmem0 iopmem1 iopmem2")?;
        unload(vm)
    })
}

/// A function that is reset by its administrator loses nothing: the memory stays, and the driver with it.
#[test]
fn unbinding_leaves_a_function_as_it_was() -> Result<()> {
    let memory = Persistent::new(4 * MIB)?;
    boot(super::machine(&memory)?, |vm| {
        let function = vm.bar(0);
        let look = || -> Result<String> {
            vm.sh(&format!(
                "cd /sys/bus/pci/devices/{function}
                 cat enable resource; head -c 64 config | od -An -tx1; ls"
            ))
        };
        serve(vm, "")?;
        unbind(vm, &function)?;
        let before = look()?;
        for _ in 0..3 {
            bind(vm, &function)?;
            unbind(vm, &function)?;
        }
        let after = look()?;
        ensure!(before == after, "{before}\n{after}");
        vm.sh(&format!("test ! -e {DRIVER}/{function}"))
            .context("it is still there")?;
        unload(vm)
    })
}
