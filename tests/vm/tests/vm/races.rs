// SPDX-License-Identifier: GPL-2.0-only

//! Everything that comes and goes, at once: the module, its devices, who uses them, and who looks.

use crate::{iopmem, kmem};
use anyhow::{Context, Result};
use std::time::Duration;
use vm_tests::{boot, load, stock, Persistent, Trace, MIB};
use xtask::vm::PMEM_KO;

/// How often the module is loaded, and unloaded as soon as nobody uses it.
const LOADS: u32 = 8;

/// Longer than it takes to end.
const GUARD: Duration = Duration::from_secs(300);

const LOAD: &str =
    "pmem_start=4G pmem_size=64M pmem_count=2 kmem_start=4224M kmem_size=128M kmem_format=blk pmem_first=8";

/// What is done over and over while the module comes and goes. Most of the time something is not there, or is in use,
/// and the last command fails; sometimes it does not.
fn actions(function: &str) -> Vec<String> {
    let state = format!("{}/state", kmem::DEVICE);
    vec![
        format!("sleep 0.1; echo {function} >/sys/bus/pci/drivers/iopmem/unbind"),
        format!(
            "sleep 0.1; cd /sys/bus/pci/drivers/iopmem
             echo {id} >new_id; echo {function} >bind; echo {id} >remove_id; [ -e {function} ]",
            id = iopmem::ID
        ),
        "sleep 0.2
         for device in /sys/bus/virtio/devices/*; do
             grep -q 0x001b $device/device || continue
             echo ${device##*/} >/sys/bus/virtio/drivers/pmem/unbind
             echo ${device##*/} >/sys/bus/virtio/drivers/pmem/bind
         done; [ -b /dev/pmem10 ]"
            .to_owned(),
        "sleep 0.2; n=0
         for disk in /dev/pmem9 /dev/pmem10 /dev/iopmem0 /dev/kmem1; do
             [ -b $disk ] || continue
             xfs_io -d -c 'pwrite -b 64k 0 256k' -c fsync -c 'pread -b 64k 0 256k' $disk && n=1
         done; [ $n = 1 ]"
            .to_owned(),
        format!(
            "cat /sys/block/*/pmem/* /sys/block/*/badblocks /sys/kernel/debug/pmem/*/* {device}/*; cat {device}/ram",
            device = kmem::DEVICE
        ),
        "cat /sys/module/pmem/parameters/*; sleep 0.05; echo '1 1' >/sys/kernel/debug/pmem/pmem9/inject_error".to_owned(),
        format!("sleep 0.1; echo offline >{state}; echo online >{state}"),
        "sleep 0.3; n=0
         [ -b /dev/pmem8 ] && mkfs.ext4 -q -F -b 4096 /dev/pmem8 && mount -o dax=always /dev/pmem8 /mnt/a &&
             pmem-guest mmap-msync /mnt/a/x 100000 1 && n=1
         umount /mnt/a; [ $n = 1 ]"
            .to_owned(),
    ]
}

#[test]
fn all_comes_and_goes_at_once() -> Result<()> {
    let (memory, bar) = (Persistent::new(64 * MIB)?, Persistent::new(64 * MIB)?);
    let machine = stock()?.cpus(4).virtio_pmem(&memory).bar(&bar);
    boot(machine, |vm| {
        kmem::prepare(vm)?;
        vm.sh("mkdir -p /mnt/a")?;
        let gone = || {
            vm.sh_for(
                &format!(
                    "umount /mnt/a 2>/dev/null || true; grep -q '^pmem ' /proc/modules || exit 0
                     echo unplugged >{}/state; rmmod pmem",
                    kmem::DEVICE
                ),
                GUARD,
            )
            .map(drop)
        };
        // The kernel keeps a node that had other memory than RAM when that went, and file systems keep caches.
        load(vm, LOAD)?;
        vm.sh("mkfs.ext4 -q -F -b 4096 /dev/pmem8; mount -o dax=always /dev/pmem8 /mnt/a")?;
        gone()?;
        let trace = Trace::of(vm)?;
        let actions = actions(&vm.bar(0));
        let loops = actions.iter().enumerate().map(|(n, action)| {
            format!(
                "( set +e; until [ -e /tmp/stop ]; do
                     if [ -e /tmp/pause ]; then sleep 0.1; continue; fi
                     ( {action} ) && touch /tmp/did{n}
                 done ) >/dev/null 2>&1 &\n"
            )
        });
        // The range that is memory goes before the module. If somebody always has a disk open, all pause at last.
        vm.sh_for(
            &format!(
                "rm -f /tmp/stop /tmp/pause; {loops}
                 is_there() {{ grep -q '^pmem ' /proc/modules; }}
                 go() {{ echo unplugged >{device}/state; rmmod pmem; sleep 0.05; }}
                 ( set +e; n=0
                   while [ $n -lt {LOADS} ]; do
                       insmod {PMEM_KO} {LOAD} && n=$((n + 1))
                       sleep 2
                       for i in 1 2 3 4 5 6 7 8 9 10; do is_there && go; done
                       touch /tmp/pause; while is_there; do go; done; rm /tmp/pause
                   done ) >/dev/null 2>&1
                 touch /tmp/stop; wait",
                loops = loops.collect::<String>(),
                device = kmem::DEVICE
            ),
            GUARD,
        )?;

        // Each was done at least once.
        for (n, action) in actions.iter().enumerate() {
            vm.sh(&format!("rm /tmp/did{n}"))
                .with_context(|| format!("it was never done: {action}"))?;
        }

        // It goes, and works once more.
        gone()?;
        Trace::of(vm)?.check(&trace)?;
        load(vm, LOAD)?;
        vm.sh("for disk in /dev/pmem8 /dev/pmem9 /dev/kmem1; do dd if=$disk of=/dev/null bs=1M count=4 iflag=direct; done")?;
        gone()?;
        Trace::of(vm)?.check(&trace)
    })
}
