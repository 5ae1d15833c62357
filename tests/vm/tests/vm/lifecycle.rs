// SPDX-License-Identifier: GPL-2.0-only

//! Loading and unloading.

use anyhow::{ensure, Result};
use std::collections::BTreeMap;
use std::time::Duration;
use vm_tests::{boot, free_pages, load, stock, unload, Trace};
use xtask::vm::{Vm, PMEM_KO};

const EAGAIN: i32 = 11;

/// The memory under a file system must not go away.
#[test]
fn unload_is_refused_while_a_disk_is_open_or_mounted() -> Result<()> {
    boot(stock()?, |vm| {
        load(vm, "pmem_start=4G pmem_size=512MiB pmem_count=2")?;
        let refused = |vm: &Vm, why: &str| -> Result<()> {
            match vm.rmmod("pmem")? {
                Ok(()) => anyhow::bail!("unloaded while {why}"),
                Err(error) => {
                    assert_eq!(error.errno, EAGAIN, "while {why}: {error}");
                    Ok(())
                }
            }
        };
        vm.sh("sleep 600 </dev/pmem1 & echo $! >/tmp/pid")?;
        refused(vm, "pmem1 is open")?;
        // It is a zombie until the command ends, but its files are closed.
        vm.sh("kill -KILL $(cat /tmp/pid); while grep -q '^State:.[^Z]' /proc/$(cat /tmp/pid)/status; do sleep 0.01; done")?;

        vm.sh("mkfs.ext4 -q -F -b 4096 /dev/pmem0; mkdir -p /mnt/a; mount -o dax=always /dev/pmem0 /mnt/a")?;
        refused(vm, "pmem0 is mounted")?;
        vm.sh("pmem-guest fill /mnt/a/x 1000000 1")?;
        refused(vm, "pmem0 is mounted")?;
        vm.sh("pmem-guest verify /mnt/a/x 1000000 1; umount /mnt/a")?;
        unload(vm)
    })
}

/// The entry of [`memory`] that is not a slab cache.
const PAGES: &str = "pages";

/// Objects in use of each slab cache, and the pages in use of all other memory.
fn memory(vm: &Vm) -> Result<BTreeMap<String, i64>> {
    // What the CPUs keep for the next allocation would count as in use.
    let slabs = vm.sh(
        "sync; echo 3 >/proc/sys/vm/drop_caches; sleep 0.2; echo 3 >/proc/sys/vm/drop_caches
         pmem-guest slabs",
    )?;
    let mut active = BTreeMap::new();
    for line in slabs.lines().skip(2) {
        let mut words = line.split_whitespace();
        if let (Some(name), Some(count)) = (words.next(), words.next()) {
            active.insert(name.to_owned(), count.parse()?);
        }
    }
    let meminfo = vm.text("/proc/meminfo")?;
    let kib = |name: &str| -> i64 {
        meminfo
            .lines()
            .find(|line| line.starts_with(name))
            .and_then(|line| line.split_whitespace().nth(1)?.parse().ok())
            .unwrap_or(0)
    };
    let used = kib("VmallocUsed:") + kib("Percpu:") + kib("PageTables:");
    active.insert(PAGES.to_owned(), used / 4 - free_pages(vm)? as i64);
    Ok(active)
}

/// Free memory comes and goes by as many pages, whoever takes them.
const NOISE: i64 = 100;

/// Does `cycles(n)`, which must leave nothing behind: no object of a slab cache, no page, nothing that can be seen.
pub(super) fn check_leaks(vm: &Vm, n: i64, cycles: impl Fn(i64) -> Result<()>) -> Result<()> {
    cycles(3)?;
    let trace = Trace::of(vm)?;
    let mut before = memory(vm)?;
    // What has grown for another reason does not grow by as much again.
    let mut leaking: Option<BTreeMap<String, i64>> = None;
    for _ in 0..3 {
        cycles(n)?;
        Trace::of(vm)?.check(&trace)?;
        let now = memory(vm)?;
        let grown = |(name, count): (&String, &i64)| {
            let growth = count - before.get(name).copied().unwrap_or(0);
            let least = if name == PAGES { n.max(NOISE) } else { n };
            let again = leaking.as_ref().is_none_or(|all| all.contains_key(name));
            (growth >= least && again).then(|| (name.clone(), growth))
        };
        let grown: BTreeMap<String, i64> = now.iter().filter_map(grown).collect();
        before = now;
        let done = grown.is_empty();
        leaking = Some(grown);
        if done {
            break;
        }
    }
    let leaking = leaking.unwrap_or_default();
    ensure!(
        leaking.is_empty(),
        "{n} cycles leave something each time: {leaking:?}"
    );
    Ok(())
}

/// A leak of objects shows when it happens a hundred times, and so does one of the struct pages of 512 MiB, 800 MiB. One of
/// a page each, 400 KiB, is no more than what else comes and goes, and may not show.
#[test]
fn a_hundred_loads_leave_nothing() -> Result<()> {
    const LOAD: &str = "pmem_start=4G pmem_size=512MiB pmem_count=2";
    boot(stock()?, |vm| {
        check_leaks(vm, 100, |n| {
            // With an open in each, so that udev-like users are there, too.
            let script = format!(
                "for i in $(seq {n}); do insmod {PMEM_KO} {LOAD}; dd if=/dev/pmem1 of=/dev/null bs=4k count=1 2>/dev/null; rmmod pmem; done"
            );
            vm.sh_for(&script, Duration::from_secs(300)).map(drop)
        })
    })
}

/// While one load has the range, another one cannot exist: the module is loaded once. But its memory is claimed.
#[test]
fn a_loaded_range_is_claimed() -> Result<()> {
    boot(stock()?, |vm| {
        load(vm, "pmem_start=4G pmem_size=512MiB")?;
        let iomem = vm.text("/proc/iomem")?;
        assert!(iomem.contains("100000000-11fffffff : pmem"), "{iomem}");
        let again = vm.insmod(PMEM_KO, "pmem_start=4608M pmem_size=512MiB")?;
        assert_eq!(again.map_err(|error| error.errno), Err(17));
        unload(vm)?;
        let iomem = vm.text("/proc/iomem")?;
        assert!(!iomem.contains(": pmem"), "{iomem}");
        Ok(())
    })
}

/// Data is not touched by unloading and loading.
#[test]
fn data_outlives_the_module() -> Result<()> {
    boot(stock()?, |vm| {
        load(vm, "pmem_start=4G pmem_size=512MiB")?;
        vm.sh(
            "mkfs.ext4 -q -F -b 4096 /dev/pmem0; mkdir -p /mnt/a; mount -o dax=always /dev/pmem0 /mnt/a
             pmem-guest mmap-msync /mnt/a/x 10000000 9; umount /mnt/a",
        )?;
        unload(vm)?;
        load(vm, "pmem_start=4G pmem_size=512MiB")?;
        vm.sh("mount -o dax=always /dev/pmem0 /mnt/a; pmem-guest verify /mnt/a/x 10000000 9")?;
        Ok(())
    })
}
