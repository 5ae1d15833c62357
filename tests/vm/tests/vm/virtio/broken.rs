// SPDX-License-Identifier: GPL-2.0-only

//! Hosts that do not answer, and devices that say that they are broken.

use super::{bind, machine, serve, unbind, DRIVER, LONG, START};
use anyhow::{ensure, Context, Result};
use std::time::{Duration, Instant};
use vm_tests::{boot, unload, End, Persistent, Trace, MIB};
use xtask::vm::{Fault, Vm};

/// The PCI device of number 0.
const PCI: &str = "0000:01:00.0";

/// The bit of a virtio device's status by which it says that it is broken.
const NEEDS_RESET: u8 = 0x40;

/// How many programs wait for a flush.
const WAITERS: usize = 6;

/// Longer than any test.
const NEVER: Duration = Duration::from_secs(3600);

/// How long a driver waits for a flush while its device goes, and then some.
const PATIENCE: Duration = Duration::from_secs(60);

/// Starts programs that sync the disk, and waits until the host has begun `flushes` flushes.
fn start_waiters(vm: &Vm, flushes: usize) -> Result<()> {
    vm.sh(&format!(
        "rm -f /tmp/waiter*
         for i in $(seq {WAITERS}); do
             ( if sync /dev/pmem0 2>/tmp/error$i; then echo good; else cat /tmp/error$i; fi >/tmp/part$i
               mv /tmp/part$i /tmp/waiter$i ) &
         done"
    ))?;
    wait_for_flushes(vm, flushes)?;
    vm.sh("sleep 1; ! ls /tmp/waiter* 2>/dev/null").map(drop)
}

/// Waits until the host has begun so many flushes.
fn wait_for_flushes(vm: &Vm, flushes: usize) -> Result<()> {
    let started = Instant::now();
    while vm.flushes()?.len() < flushes {
        ensure!(
            started.elapsed() < PATIENCE,
            "the host is not asked to flush"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Each program must have failed with EIO, and so have ended.
fn end_waiters(vm: &Vm, within: u64) -> Result<()> {
    let said = vm.sh(&format!(
        "for i in $(seq {within}0); do
             test $(ls /tmp/waiter* 2>/dev/null | wc -l) = {WAITERS} && break
             sleep 0.1
         done
         cat /tmp/waiter*"
    ))?;
    ensure!(
        said.lines().count() == WAITERS
            && said.lines().all(|line| line.contains("Input/output error")),
        "of {WAITERS} programs: {said}"
    );
    Ok(())
}

/// The host's disk hangs. An administrator must be able to take the device away, and no program may hang for ever.
#[test]
fn a_host_that_does_not_answer_can_be_left() -> Result<()> {
    let memory = Persistent::new(64 * MIB)?;
    let machine = machine(&memory)?.flush_fault(Fault::Delay(NEVER), 2, None);
    boot(machine, |vm| {
        serve(vm)?;
        unload(vm)?;
        let before = Trace::of(vm)?;
        serve(vm)?;
        vm.sh("sync /dev/pmem0")?;
        start_waiters(vm, 2)?;
        // What needs no flush goes on.
        vm.sh(
            "dd if=/dev/zero of=/dev/pmem0 bs=4k count=10 oflag=direct 2>/dev/null
               dd if=/dev/pmem0 of=/dev/null bs=4k count=10 iflag=direct 2>/dev/null",
        )?;
        let started = Instant::now();
        unbind(vm, DRIVER)?;
        ensure!(
            started.elapsed() < PATIENCE,
            "it took {} s",
            started.elapsed().as_secs()
        );
        end_waiters(vm, 5)?;
        vm.sh("test ! -e /dev/pmem0")?;
        unload(vm)?;
        Trace::of(vm)?.check(&before)
    })
}

/// With a file system on it, and a file mapped, nobody hangs either.
#[test]
fn a_host_that_does_not_answer_leaves_no_file_system_hanging() -> Result<()> {
    let memory = Persistent::new(64 * MIB)?;
    // Late enough for the file system to be made.
    const FIRST: usize = 40;
    let machine = machine(&memory)?.flush_fault(Fault::Delay(NEVER), FIRST as u64, None);
    boot(machine, |vm| {
        serve(vm)?;
        vm.sh("mkfs.ext4 -q -F -b 4096 -J size=4 /dev/pmem0
             mkdir -p /mnt/a; mount -o dax=always /dev/pmem0 /mnt/a
             pmem-guest fill /mnt/a/x 1000000 1; sync")?;
        let so_far = vm.flushes()?.len();
        // The file system flushes by itself too.
        const SPARE: usize = 6;
        ensure!(so_far < FIRST - SPARE, "{so_far} flushes so far");
        vm.sh(&format!(
            "for i in $(seq {}); do sync /dev/pmem0; done",
            FIRST - SPARE - so_far
        ))?;
        vm.sh("rm -f /tmp/waiter*
             for i in $(seq 6); do
                 ( while echo $i >/mnt/a/$i && sync /mnt/a/$i; do :; done 2>/dev/null
                   touch /tmp/waiter$i ) &
             done")?;
        wait_for_flushes(vm, FIRST)?;
        vm.sh("sleep 2; ! ls /tmp/waiter* 2>/dev/null")?;
        let started = Instant::now();
        unbind(vm, DRIVER)?;
        // The file system may have more than one flush to wait for.
        ensure!(
            started.elapsed() < 3 * PATIENCE,
            "it took {} s",
            started.elapsed().as_secs()
        );
        vm.sh_for(
            "for i in $(seq 300); do test $(ls /tmp/waiter* 2>/dev/null | wc -l) = 6 && break; sleep 0.1; done
             test $(ls /tmp/waiter* | wc -l) = 6; umount /mnt/a",
            LONG,
        )?;
        unload(vm)
    })
}

fn status(vm: &Vm) -> Result<u8> {
    let text = vm.sh(&format!("pmem-guest virtio-status {PCI}"))?;
    u8::from_str_radix(text.trim().trim_start_matches("0x"), 16).context(text)
}

/// Makes garbage of the device's queue, so that it says that it is broken.
fn break_queue(vm: &Vm) -> Result<()> {
    // What the driver has offered to the device is then a number of requests that no queue has room for. It is read
    // from the device's own memory.
    vm.sh(&format!(
        "yes | head -c 4096 | dd of=/dev/pmem0 bs=4k seek=100 oflag=direct 2>/dev/null
         pmem-guest virtio-set {PCI} queue=0 driver={:#x} enable=1 notify=0",
        START + 100 * 4096
    ))?;
    let status = status(vm)?;
    ensure!(status & NEEDS_RESET != 0, "the status is {status:#x}");
    Ok(())
}

/// Reads and writes need no host; a flush fails without asking.
fn serves_all_but_flushes(vm: &Vm) -> Result<()> {
    let asked = vm.flushes()?.len();
    vm.sh("pmem-guest fill /tmp/x 65536 1
           dd if=/tmp/x of=/dev/pmem0 bs=64k oflag=direct 2>/dev/null
           dd if=/dev/pmem0 of=/tmp/y bs=64k count=1 iflag=direct 2>/dev/null
           pmem-guest verify /tmp/y 65536 1")?;
    for _ in 0..3 {
        let ran = vm.try_sh("sync /dev/pmem0")?;
        ensure!(
            ran.end != End::Exit(0) && ran.stderr.contains("Input/output error"),
            "{ran:?}"
        );
    }
    ensure!(vm.flushes()?.len() == asked, "the host was asked to flush");
    Ok(())
}

fn is_good(vm: &Vm) -> Result<()> {
    let asked = vm.flushes()?.len();
    vm.sh(
        "dd if=/dev/pmem0 of=/tmp/y bs=64k count=1 iflag=direct 2>/dev/null
           pmem-guest verify /tmp/y 65536 1
           sync /dev/pmem0",
    )?;
    ensure!(
        vm.flushes()?.len() == asked + 1,
        "the host was not asked to flush"
    );
    Ok(())
}

/// Loads the driver, and breaks the device while the host has its second request: all who wait for it end.
fn break_under_waiters(vm: &Vm) -> Result<()> {
    serve(vm)?;
    vm.sh("sync /dev/pmem0")?;
    start_waiters(vm, 2)?;
    break_queue(vm)?;
    end_waiters(vm, 5)
}

/// A device that says that it is broken does not answer any more: who waits must not wait for ever.
#[test]
fn a_device_that_needs_a_reset_fails_flushes_until_it_has_one() -> Result<()> {
    let memory = Persistent::new(64 * MIB)?;
    let slow = Fault::Delay(Duration::from_secs(20));
    let machine = machine(&memory)?.flush_fault(slow, 2, Some(2));
    boot(machine, |vm| {
        break_under_waiters(vm)?;
        ensure!(
            vm.flushes()?.iter().any(|flush| flush.ended.is_none()),
            "the host has answered meanwhile"
        );
        serves_all_but_flushes(vm)?;
        let started = Instant::now();
        while vm.flushes()?.iter().any(|flush| flush.ended.is_none()) {
            ensure!(
                started.elapsed() < PATIENCE,
                "the host does not end its flush"
            );
            std::thread::sleep(Duration::from_millis(100));
        }
        // A late answer changes nothing.
        serves_all_but_flushes(vm)?;
        let device = unbind(vm, DRIVER)?;
        bind(vm, DRIVER, &device)?;
        is_good(vm)?;
        ensure!(status(vm)? & NEEDS_RESET == 0, "it still needs a reset");
        // Again, and with a reload of the driver.
        break_queue(vm)?;
        serves_all_but_flushes(vm)?;
        unload(vm)?;
        serve(vm)?;
        is_good(vm)
    })
}

/// QEMU answers a request also after the device was reset, and so perhaps in the place of an answer to a later one.
/// A driver that took that for its answer would call durable what is not.
#[test]
fn a_late_answer_is_not_taken_for_another_one() -> Result<()> {
    let memory = Persistent::new(64 * MIB)?;
    let slow = Fault::Delay(Duration::from_secs(12));
    let machine = machine(&memory)?.flush_fault(slow, 2, Some(4));
    boot(machine, |vm| {
        break_under_waiters(vm)?;
        let device = unbind(vm, DRIVER)?;
        bind(vm, DRIVER, &device)?;
        // The second one could be given the answer to the first one.
        for ended in [3, 4] {
            let ran = vm.try_sh("sync /dev/pmem0")?;
            let flushes = vm.flushes()?;
            if ran.end == End::Exit(0) {
                ensure!(
                    flushes
                        .get(ended - 1)
                        .is_some_and(|flush| flush.ended.is_some()),
                    "synced, and the host has not: {flushes:?}"
                );
            } else {
                ensure!(ran.stderr.contains("Input/output error"), "{ran:?}");
            }
        }
        Ok(())
    })
}

/// A device that forgets its driver does not even say so.
#[test]
fn a_device_that_was_reset_can_be_bound_again() -> Result<()> {
    let memory = Persistent::new(64 * MIB)?;
    boot(machine(&memory)?.watch_flushes(), |vm| {
        serve(vm)?;
        vm.sh("pmem-guest fill /tmp/x 65536 1
               dd if=/tmp/x of=/dev/pmem0 bs=64k oflag=direct conv=fsync 2>/dev/null")?;
        let asked = vm.flushes()?.len();
        vm.sh(&format!("pmem-guest virtio-set {PCI} status=0"))?;
        start_waiters(vm, asked)?;
        let started = Instant::now();
        let device = unbind(vm, DRIVER)?;
        ensure!(
            started.elapsed() < PATIENCE,
            "it took {} s",
            started.elapsed().as_secs()
        );
        end_waiters(vm, 5)?;
        bind(vm, DRIVER, &device)?;
        is_good(vm)
    })
}
