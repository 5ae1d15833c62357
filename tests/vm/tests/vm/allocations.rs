// SPDX-License-Identifier: GPL-2.0-only

//! Allocations that fail: each of those of a load, of a probe, of a format and of I/O, one after the other.
//!
//! The debug kernel fails the nth allocation that a system call asks for. The call is made again and again, with another
//! one each time. Whatever becomes of it, an error or not, the driver must have left nothing when it is gone, and the next
//! call must find all in order.

use anyhow::{ensure, Context, Result};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use vm_tests::{boot, load, machine, unload, wanted, End, Persistent, Trace, MIB};
use xtask::flavour::Flavour;
use xtask::vm::{Builder, Vm, PMEM_KO};

const ENOMEM: i32 = 12;

/// What takes minutes of an emulated CPU.
const LONG: Duration = Duration::from_secs(300);

/// Between the answer of the program and the kernel's log.
const SEPARATOR: &str = "--------";

/// More allocations than any call asks for.
const FAR: u32 = 1_000_000;

/// Set, it has each allocation fail that there is, which takes hours of an emulated CPU.
const ALL: &str = "PMEM_FAIL_ALL";

/// A function of the kernel's that does not survive a failure: it makes page tables of the kernel's own mapping of
/// memory, and uses what it is given unseen.
const PAGE_TABLES: &str = "init_memory_mapping";

/// Another one: it has KASAN's shadow of memory that comes, and frees it twice when that is short of memory.
const SHADOW: &str = "kasan_mem_notifier";

/// How many faults are told of a walk.
const TOLD: usize = 8;

/// The debug kernel, if it is wanted.
fn debug() -> Result<Option<Builder<'static>>> {
    match wanted(Flavour::Debug)? {
        true => Ok(Some(machine(Flavour::Debug)?.cpus(1))),
        false => Ok(None),
    }
}

/// The same with memory at 4 GiB whose page tables are there already, as another driver has some of the same GiB, and the
/// disk pmem0: those of [`PAGE_TABLES`] never fail.
fn debug_mapped() -> Result<Option<Builder<'static>>> {
    Ok(debug()?.map(|machine| {
        machine
            .cmdline("memmap=64M!4992M")
            .module("nd_pmem")
            .module("nd_e820")
    }))
}

/// Has all allocations be ones that may fail, but for those that debugging makes for itself and those below the function
/// `fatal` of the kernel's, and has the log say who asked.
fn prepare(vm: &Vm, fatal: &str) -> Result<()> {
    vm.sh_for(
        "cd /sys/kernel/debug
         for fault in failslab fail_page_alloc; do
             echo N >$fault/ignore-gfp-wait
             echo 2 >$fault/verbose
             echo 32 >$fault/stacktrace-depth
         done
         echo N >fail_page_alloc/ignore-gfp-highmem
         echo 0 >fail_page_alloc/min-order
         for cache in /sys/kernel/slab/*/failslab; do echo 1 >$cache 2>/dev/null || true; done
         for cache in /sys/kernel/slab/*kmemleak*/failslab /sys/kernel/slab/debug_objects_cache/failslab; do
             echo 0 >$cache 2>/dev/null || true
         done
         echo Y >failslab/cache-filter
         # Locks are not what this is about, and to prove them right takes half of the time.
         echo 0 >/proc/sys/kernel/prove_locking
         # The console is slow, and what is said is read from the log.
         dmesg -n 1
         grep -v '\\[' /proc/kallsyms | cut -d' ' -f1,3 | sort >/tmp/symbols",
        LONG,
    )?;
    limit(vm, "reject", fatal)
}

/// Lets allocations fail alone that are (`require`) or are not (`reject`) made below `function` of the kernel's.
fn limit(vm: &Vm, how: &str, function: &str) -> Result<()> {
    vm.sh_for(
        &format!(
            "place() {{ # 1 for its start or 2 for its end
                 echo 0x$(grep -A1 ' {function}$' /tmp/symbols | sed -n \"$1s/ .*//p\")
             }}
             for fault in failslab fail_page_alloc; do
                 place 1 >/sys/kernel/debug/$fault/{how}-start
                 place 2 >/sys/kernel/debug/$fault/{how}-end
             done"
        ),
        LONG,
    )
    .map(drop)
}

/// The line of the driver that asked for an allocation, itself or by a function of the kernel's: the innermost function
/// of the driver's in a stack, or of the kernel's if there is none, with the place in it.
fn caller<'a>(mut stack: impl Iterator<Item = &'a str> + Clone) -> Option<&'a str> {
    // What fault injection itself and the allocators have in each.
    let outermost = stack.clone().last();
    stack.find(|frame| frame.contains("[pmem]")).or(outermost)
}

/// What became of a call.
#[derive(Debug, Clone, Copy, Deserialize)]
struct Outcome {
    /// Whether an allocation failed: there were as many.
    failed: bool,
    /// 0 if the call succeeded.
    errno: i32,
}

/// Makes `call` again and again, each time with another one failing of the allocations that it asks for below the
/// function `from` of the kernel's, and `after` each what has to be done before the next. `after` is given what became
/// of it, and the kernel's log.
///
/// Of those in a row that one line of the driver's asks for, the first and the last fail, and a few in between that are
/// met in the search for the last; or all of them, if [`ALL`] is set.
///
/// Returns how many calls ended with an error.
///
/// # Errors
///
/// What `after` found, and what the kernel complained of, with who asked for the allocation that failed.
fn walk(
    vm: &Vm,
    call: &str,
    from: &str,
    mut after: impl FnMut(&Outcome, &str) -> Result<()>,
) -> Result<u32> {
    limit(vm, "require", from)?;
    let (mut refused, mut faults) = (0, Vec::new());
    // Who asked for an allocation that has failed, nobody if there are not as many.
    let mut known: BTreeMap<u32, Option<String>> = BTreeMap::new();
    let mut fail = |nth: u32| -> Result<Option<String>> {
        if let Some(caller) = known.get(&nth) {
            return Ok(caller.clone());
        }
        let output = vm.sh_for(
            &format!(
                "dmesg -c >/dev/null; pmem-guest fail-nth {nth} {call}; echo {SEPARATOR}; dmesg"
            ),
            LONG,
        )?;
        let (answer, log) = output.split_once(SEPARATOR).context("no answer")?;
        let outcome: Outcome = serde_json::from_str(answer)?;
        let caller = outcome
            .failed
            .then(|| caller(stack(log)).unwrap_or_default().to_owned());
        if let Some(caller) = &caller {
            eprintln!("{nth}: errno {}: {caller}", outcome.errno);
        }
        refused += u32::from(outcome.failed && outcome.errno != 0);
        let checked = after(&outcome, log);
        let log = format!("{log}{}", vm.dmesg()?);
        let complaints = complaints(&log);
        let fault = match &checked {
            Err(error) => format!("{nth} failed, {outcome:?}: {error:#}\n{}", who(&log)),
            Ok(()) if complaints.is_empty() => String::new(),
            Ok(()) => format!("{nth} failed, {outcome:?}, the kernel complained:\n{log}"),
        };
        if !fault.is_empty() {
            eprintln!("{fault}");
            faults.push(fault);
        }
        ensure!(
            faults.len() < TOLD && (checked.is_ok() || outcome.failed),
            "{call}: when allocation\n{}",
            faults.join("\n")
        );
        known.insert(nth, caller.clone());
        Ok(caller)
    };
    ensure!(
        fail(FAR)?.is_none(),
        "{call}: more allocations than there can be"
    );
    let mut first = 1;
    while let Some(caller) = fail(first)? {
        let (mut last, mut next) = (first, first + 1);
        let is_same = |other: Option<String>| other.is_some_and(|other| other == caller);
        if std::env::var_os(ALL).is_none() {
            while is_same(fail(next)?) {
                (last, next) = (next, next + 2 * (next - last));
            }
            while next - last > 1 {
                let middle = last + (next - last) / 2;
                match is_same(fail(middle)?) {
                    true => last = middle,
                    false => next = middle,
                }
            }
        }
        first = next;
    }
    let seen: BTreeSet<_> = known.values().flatten().collect();
    eprintln!(
        "{call}: {} allocations of {} places, {} have failed, {refused} calls ended with an error",
        first - 1,
        seen.len(),
        known.len() - 2
    );
    ensure!(
        faults.is_empty(),
        "{call}: when allocation\n{}",
        faults.join("\n")
    );
    Ok(refused)
}

/// The kernel's own warnings that there was no memory, after which it goes on with an error: the function that was
/// short of it, and the place that warns.
const WARNINGS: [(&str, &str); 2] = [
    // It cannot make a new node.
    ("register_node+", " at __add_memory_resource+"),
    // It cannot make struct pages; once.
    ("__add_pages+", " at arch_add_memory+"),
];

/// What the kernel complained of, but for [`WARNINGS`].
fn complaints(log: &str) -> Vec<String> {
    const BEGIN: &str = "[ cut here ]";

    let mut complaints = Vm::complaints_in(log);
    for (short, place) in WARNINGS {
        if !stack(log).any(|frame| frame.starts_with(short)) {
            continue;
        }
        while let Some(at) = complaints.iter().position(|line| line.contains(place)) {
            complaints.remove(at);
            let begin = complaints
                .iter()
                .take(at)
                .rposition(|line| line.contains(BEGIN));
            begin.map(|at| complaints.remove(at));
        }
    }
    complaints
}

/// Who asked for the allocation that failed, from the log.
fn stack(log: &str) -> impl Iterator<Item = &str> + Clone {
    let lines = log
        .lines()
        .map(|line| line.split_once("] ").map_or(line, |(_, text)| text).trim());
    lines
        .skip_while(|&line| line != "<TASK>")
        .skip(1)
        .take_while(|&line| line != "</TASK>")
        .filter(|line| line.contains("+0x") && !line.starts_with("? "))
}

/// Of a log, who asked for the allocation that failed, and what the driver said.
fn who(log: &str) -> String {
    let said = log
        .lines()
        .filter(|line| line.contains("] pmem: "))
        .map(str::to_owned);
    let stack = stack(log).map(|frame| format!("    {frame}"));
    stack.chain(said).collect::<Vec<_>>().join("\n")
}

/// What is looked at after each call; less than a [`Trace`], which takes seconds.
fn glance(vm: &Vm) -> Result<String> {
    vm.sh(
        "cat /proc/iomem; cut -d' ' -f1 /proc/modules
         ls /dev /sys/block /sys/module /sys/devices/faux /sys/kernel/debug /sys/devices/system/memory \\
            /sys/bus/pci/drivers /sys/bus/virtio/drivers",
    )
}

/// Whether a shell script succeeds.
fn holds(vm: &Vm, script: &str) -> Result<bool> {
    Ok(vm.try_sh(script)?.end == End::Exit(0))
}

/// Walks a load with `params`, which makes `disks`. `take_down` is what has to be done before the module can go.
fn walk_load(vm: &Vm, params: &str, disks: &[&str], take_down: &str) -> Result<()> {
    let trace = Trace::of(vm)?;
    let before = glance(vm)?;
    let call = format!("insmod {PMEM_KO} '{params}'");
    let refused = walk(vm, &call, "do_init_module", |outcome, log| {
        if outcome.errno == 0 {
            for disk in disks {
                ensure!(
                    holds(vm, &format!("test -b /dev/{disk}"))?
                        || outcome.failed && log.contains(disk),
                    "there is no {disk}, and nothing was said of it"
                );
            }
            vm.sh_for(take_down, LONG)?;
            unload(vm)?;
        } else {
            ensure!(
                outcome.errno == ENOMEM || log.contains("pmem: "),
                "an error that is not ENOMEM, and nothing was said of it"
            );
        }
        let now = glance(vm)?;
        ensure!(now == before, "this is left: {}", differing(&before, &now));
        Ok(())
    })?;
    ensure!(refused > 0, "{params}: no load has failed");
    Trace::of(vm)?.check(&trace)?;
    vm_tests::check_leaks(vm)
}

/// The lines that are in one and not in the other.
fn differing(before: &str, now: &str) -> String {
    let lines = |a: &str, b: &str, mark: &str| {
        let only = a.lines().filter(|line| !b.lines().any(|l| l == *line));
        only.map(|line| format!("{mark}{line}\n"))
            .collect::<Vec<_>>()
            .concat()
    };
    lines(now, before, "+") + &lines(before, now, "-")
}

/// Memory is short when the driver is loaded.
fn loads_fail_cleanly(loads: &[(&str, &[&str])]) -> Result<()> {
    let Some(machine) = debug_mapped()? else {
        return Ok(());
    };
    boot(machine, |vm| {
        prepare(vm, SHADOW)?;
        crate::kmem::prepare(vm)?;
        for (params, disks) in loads {
            let take_down = match params.starts_with("kmem") {
                true => "echo unplugged >/sys/devices/faux/kmem1/state",
                false => "true",
            };
            walk_load(vm, params, disks, take_down)?;
        }
        Ok(())
    })
}

/// What is formatted and added, and is a disk then.
#[test]
fn a_load_of_ram_and_storage_fails_cleanly() -> Result<()> {
    loads_fail_cleanly(&[(
        "kmem_start=4G kmem_size=128M kmem_format=blk kmem_format_force=1 pmem_virtio=0 iopmem=0",
        &["kmem1"],
    )])
}

/// All disks, or none.
#[test]
fn a_load_of_disks_fails_cleanly() -> Result<()> {
    loads_fail_cleanly(&[(
        "pmem_start=4G pmem_size=64M pmem_count=2 pmem_first=1 pmem_virtio=0 iopmem=0",
        &["pmem1", "pmem2"],
    )])
}

#[test]
fn a_load_in_another_mode_fails_cleanly() -> Result<()> {
    loads_fail_cleanly(&[
        (
            "kmem_start=4G kmem_size=128M kmem_format=none kmem_format_force=1 pmem_virtio=0 iopmem=0",
            &[],
        ),
        (
            "pmem_start=4G pmem_size=128M pmem_first=1 pmem_cache=wt pmem_virtio=0 iopmem=0",
            &["pmem1"],
        ),
        (
            "pmem_start=4G pmem_size=128M pmem_first=1 pmem_memmap=dev pmem_virtio=0 iopmem=0",
            &["pmem1"],
        ),
        ("pmem_virtio=1 iopmem=1", &[]),
    ])
}

/// A device comes and goes.
#[test]
fn probes_fail_cleanly() -> Result<()> {
    let Some(machine) = debug()? else {
        return Ok(());
    };
    let (memory, bar) = (Persistent::new(64 * MIB)?, Persistent::new(64 * MIB)?);
    let machine = machine.upper(0).virtio_pmem(&memory).bar(&bar);
    boot(machine, |vm| {
        prepare(vm, PAGE_TABLES)?;
        load(vm, "")?;
        let function = vm.bar(0);
        vm.sh(&format!(
            "echo {} >/sys/bus/pci/drivers/iopmem/new_id",
            crate::iopmem::ID
        ))?;
        let device = vm.sh("cd /sys/bus/virtio/drivers/pmem; echo virtio[0-9]*")?;
        for (driver, device, disk) in [
            ("pci/drivers/iopmem", function.as_str(), "iopmem0"),
            ("virtio/drivers/pmem", device.trim(), "pmem0"),
        ] {
            let driver = format!("/sys/bus/{driver}");
            let is_bound = || {
                holds(
                    vm,
                    &format!("test -e {driver}/{device} && test -b /dev/{disk}"),
                )
            };
            let bind = || vm.sh(&format!("echo {device} >{driver}/bind"));
            let unbind = || vm.sh_for(&format!("echo {device} >{driver}/unbind"), LONG);
            ensure!(is_bound()?, "there is no {disk}");
            unbind()?;
            let before = glance(vm)?;
            let call = format!("write {driver}/bind {device}");
            let refused = walk(vm, &call, "really_probe", |outcome, log| {
                ensure!(
                    is_bound()? == (outcome.errno == 0),
                    "errno {}, but",
                    outcome.errno
                );
                match outcome.errno {
                    0 => drop(unbind()?),
                    ENOMEM => {}
                    _ => ensure!(log.contains(device), "an error, and nothing was said of it"),
                }
                let now = glance(vm)?;
                ensure!(now == before, "this is left: {}", differing(&before, &now));
                Ok(())
            })?;
            ensure!(refused > 0, "{driver}: no probe has failed");

            // To go needs no memory, or does without.
            bind()?;
            let call = format!("write {driver}/unbind {device}");
            walk(vm, &call, "device_release_driver_internal", |outcome, _| {
                ensure!(outcome.errno == 0 && !is_bound()?, "it is still there");
                let now = glance(vm)?;
                ensure!(now == before, "this is left: {}", differing(&before, &now));
                bind().map(drop)
            })?;
        }
        unload(vm)
    })
}

/// A range changes its state, and there are requests.
#[test]
fn changes_and_requests_fail_cleanly() -> Result<()> {
    const STATE: &str = "/sys/devices/faux/kmem1/state";

    let Some(machine) = debug_mapped()? else {
        return Ok(());
    };
    boot(machine, |vm| {
        prepare(vm, SHADOW)?;
        crate::kmem::prepare(vm)?;
        load(
            vm,
            "pmem_start=4G pmem_size=64M pmem_first=1 kmem_start=4224M kmem_size=128M kmem_format=blk",
        )?;
        for disk in ["/dev/pmem1", "/dev/kmem1"] {
            let whole = |seed: u64| {
                let call = format!("fail-nth {FAR} disk-write {disk} 4096 409600 {seed}");
                vm.sh(&format!("pmem-guest {call}"))
            };
            for (call, from) in [
                ("disk-write", "__x64_sys_pwrite64"),
                ("disk-read", "__x64_sys_pread64"),
            ] {
                whole(1)?;
                let call = format!("{call} {disk} 4096 409600 1");
                walk(vm, &call, from, |outcome, _| {
                    ensure!(
                        outcome.errno == 0 || outcome.failed,
                        "an error without a reason"
                    );
                    // An error may leave a part of it; all is there when it is written again.
                    if outcome.errno != 0 {
                        whole(1)?;
                    }
                    let read = vm.sh(&format!(
                        "pmem-guest fail-nth {FAR} disk-read {disk} 4096 409600 1"
                    ))?;
                    ensure!(read.contains("\"errno\":0"), "{read}");
                    Ok(())
                })?;
            }
            let call = format!("disk-discard {disk} 4096 409600");
            walk(vm, &call, "__x64_sys_fallocate", |_, _| whole(1).map(drop))?;
            whole(2)?;
        }
        // What is on the disk stays there, whatever the state, and whatever fails.
        let changes = [
            ("online", "offline"),
            ("offline", "online"),
            ("online", "unplugged"),
            ("unplugged", "online"),
        ];
        for (from, to) in changes {
            vm.sh_for(&format!("echo {from} >{STATE}"), LONG)?;
            let call = format!("write {STATE} {to}");
            walk(vm, &call, "kernfs_fop_write_iter", |outcome, _| {
                let now = vm.text(STATE)?;
                let wanted = if outcome.errno == 0 { to } else { from };
                ensure!(
                    now.trim() == wanted,
                    "errno {}, and it is {now}",
                    outcome.errno
                );
                vm.sh_for(
                    &format!(
                        "echo online >{STATE}
                         pmem-guest fail-nth {FAR} disk-read /dev/kmem1 4096 409600 2 | grep '\"errno\":0'
                         echo {from} >{STATE}"
                    ),
                    LONG,
                )
                .map(drop)
            })?;
        }
        vm.sh_for(&format!("echo unplugged >{STATE}"), LONG)?;
        unload(vm)
    })
}
