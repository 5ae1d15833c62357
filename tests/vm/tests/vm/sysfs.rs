// SPDX-License-Identifier: GPL-2.0-only

//! What an administrator sees of a disk: attributes, uevents, counters.

use anyhow::{ensure, Context, Result};
use std::collections::BTreeMap;
use vm_tests::{boot, load, log, stock, unload, Trace, Use, MIB, UPPER};
use xtask::vm::Vm;

const LOAD: &str = "pmem_start=4G,4352M pmem_size=256M,256M pmem_cache=wb,wt";

/// The files of a directory, and what they say.
fn files(vm: &Vm, dir: &str) -> Result<BTreeMap<String, String>> {
    let text = vm.sh(&format!("cd {dir}; grep '' *"))?;
    text.lines()
        .map(|line| {
            let (name, value) = line.split_once(':').context("not a file and its line")?;
            Ok((name.to_owned(), value.to_owned()))
        })
        .collect()
}

/// The instructions that the log names for `disk`, the last time that it was there.
fn instructions(vm: &Vm, disk: &str) -> Result<String> {
    let said = log(vm)?;
    said.iter()
        .rfind(|line| line.starts_with(disk))
        .and_then(|line| Some(line.rsplit_once('(')?.1.strip_suffix(')')?.to_owned()))
        .with_context(|| format!("no instructions for {disk}: {said:#?}"))
}

/// Scripts and udev rules read them: each is one value, in a form that does not change.
#[test]
fn attributes_say_what_a_disk_is() -> Result<()> {
    // A node with no memory but ours would be offline.
    boot(stock()?.range(Use::Reserved, UPPER, 512 * MIB), |vm| {
        let before = Trace::of(vm)?;
        let check = |disk: &str, start: &str, mib: u64, cache: &str, memmap: &str| -> Result<()> {
            let expected = [
                ("cache", cache),
                ("copy", &instructions(vm, disk)?),
                ("durability", "durable at completion"),
                ("memmap", memmap),
                ("node", "1"),
                ("provider", "memmap"),
                ("size", &(mib * MIB).to_string()),
                ("start", start),
            ];
            let expected = expected.map(|(name, value)| (name.to_owned(), value.to_owned()));
            let seen = files(vm, &format!("/sys/block/{disk}/pmem"))?;
            assert_eq!(seen, BTreeMap::from(expected), "{disk}");
            Ok(())
        };
        load(vm, LOAD)?;
        check("pmem0", "0x100000000", 256, "wb", "ram")?;
        check("pmem1", "0x110000000", 256, "wt", "none")?;
        let modes = vm.sh("cd /sys/block/pmem0/pmem; stat -c %a * | sort -u")?;
        assert_eq!(modes, "444\n");
        unload(vm)?;
        Trace::of(vm)?.check(&before)?;

        load(
            vm,
            "pmem_start=4352M pmem_size=200M pmem_cache=uc pmem_count=2 pmem_first=7",
        )?;
        check("pmem7", "0x110000000", 100, "uc", "none")?;
        check("pmem8", "0x116400000", 100, "uc", "none")?;
        unload(vm)?;
        load(
            vm,
            "pmem_start=4352M pmem_size=256M pmem_memmap=dev pmem_first=8",
        )?;
        check("pmem8", "0x110000000", 256, "wb", "dev")?;
        // Who has a file open when the disk goes reads an error, not memory that is freed.
        vm.sh("exec 3</sys/block/pmem8/pmem/provider && rmmod pmem && ! cat <&3 2>/dev/null")?;
        Trace::of(vm)?.check(&before)
    })
}

/// What the guest runs for each uevent.
const ON_UEVENT: &str = r#"#!/bin/sh
case $DEVPATH in
*/block/pmem*)
    echo "$ACTION ${DEVPATH##*/} $(cat /sys$DEVPATH/pmem/provider 2>/dev/null) ${PMEM_PROVIDER-none}" >>/tmp/events
    ;;
*)
    test -z "$PMEM_PROVIDER" || echo "$ACTION $DEVPATH" >>/tmp/events
    ;;
esac
"#;

/// A rule of udev's can tell the disks of one provider when they appear, and who only listens can, too.
#[test]
fn uevents_come_with_the_attributes_and_the_provider() -> Result<()> {
    boot(stock()?, |vm| {
        vm.write("/tmp/on", ON_UEVENT.as_bytes())?;
        // It listens when the kernel has its socket.
        vm.sh(
            "chmod +x /tmp/on
             >/tmp/events
             uevent /tmp/on >/dev/null 2>&1 &
             for i in $(seq 100); do
                 awk '$2 == 15 && $3 != 0 { found = 1 } END { exit !found }' /proc/net/netlink && exit
                 sleep 0.1
             done
             exit 1",
        )?;
        let seen = |lines: usize| {
            vm.sh(&format!(
                "for i in $(seq 100); do test $(wc -l </tmp/events) -ge {lines} && break; sleep 0.1; done
                 sleep 0.5
                 cat /tmp/events
                 >/tmp/events"
            ))
        };
        load(vm, LOAD)?;
        assert_eq!(
            seen(4)?,
            "add pmem0 memmap none\n\
             change pmem0 memmap memmap\n\
             add pmem1 memmap none\n\
             change pmem1 memmap memmap\n"
        );
        unload(vm)?;
        assert_eq!(seen(2)?, "remove pmem0  none\nremove pmem1  none\n");
        Ok(())
    })
}

fn counters(vm: &Vm, disk: &str) -> Result<BTreeMap<String, u64>> {
    files(vm, &format!("/sys/kernel/debug/pmem/{disk}"))?
        .into_iter()
        // Not a counter.
        .filter(|(name, _)| name != "inject_error")
        .map(|(name, value)| Ok((name, value.parse()?)))
        .collect()
}

/// What `disk` has counted since `start`.
fn grown(vm: &Vm, disk: &str, start: &BTreeMap<String, u64>) -> Result<BTreeMap<String, u64>> {
    let mut now = counters(vm, disk)?;
    for (name, value) in &mut now {
        *value -= start[name];
    }
    Ok(now)
}

/// Each operation is counted once, whatever CPU it is on.
#[test]
fn counters_are_exact() -> Result<()> {
    const NAMES: [&str; 9] = [
        "cleared",
        "flushes",
        "host_flushes",
        "media_errors",
        "read_bytes",
        "reads",
        "write_zeroes",
        "writes",
        "written_bytes",
    ];
    boot(stock()?, |vm| {
        let before = Trace::of(vm)?;
        load(vm, LOAD)?;
        // The scan for partitions reads, and nobody does anything else yet.
        let start = counters(vm, "pmem0")?;
        for name in NAMES {
            let by_scan = ["read_bytes", "reads"].contains(&name);
            assert_eq!(start[name] != 0, by_scan, "{name}: {start:?}");
        }

        // On each CPU, and on both at once.
        for (disk, flushes) in [("pmem0", 2), ("pmem1", 0)] {
            let start = counters(vm, disk)?;
            vm.sh(&format!(
                "io() {{
                     fio --name=x --filename=/dev/{disk} --direct=1 --ioengine=psync --size=64m \"$@\" >/tmp/report || cat /tmp/report
                 }}
                 for cpu in 0 1; do
                     io --cpus_allowed=$cpu --rw=randwrite --bs=4k --number_ios=$((100 + cpu)) --end_fsync=1
                     io --cpus_allowed=$cpu --rw=read --bs=64k --number_ios=$((10 + cpu))
                 done
                 io --cpus_allowed=0,1 --cpus_allowed_policy=split --numjobs=2 --rw=randread --bs=512 --number_ios=20000
                 blkdiscard -f -z -o 4096 -l 64m /dev/{disk}"
            ))?;
            let expected = [
                0,
                flushes,
                0,
                0,
                21 * 65536 + 40_000 * 512,
                21 + 40_000,
                2,
                201,
                201 * 4096,
            ];
            let expected = NAMES.map(str::to_owned).into_iter().zip(expected).collect();
            assert_eq!(grown(vm, disk, &start)?, expected, "{disk}");
        }
        // What is refused is not done.
        let start = counters(vm, "pmem1")?;
        vm.sh("! blkdiscard -f /dev/pmem1 2>/dev/null")?;
        let grown = grown(vm, "pmem1", &start)?;
        ensure!(grown.values().all(|&n| n == 0), "{grown:?}");

        // Whose file is open needs the module to close it.
        vm.sh(
            "exec 3</sys/kernel/debug/pmem/pmem0/reads && ! rmmod pmem 2>/dev/null && grep . <&3",
        )?;
        unload(vm)?;
        vm.sh("test ! -e /sys/kernel/debug/pmem")?;
        Trace::of(vm)?.check(&before)
    })
}
