// SPDX-License-Identifier: GPL-2.0-only

//! The ways to map a BAR, and BARs of sizes that not all ways can have.

use super::{compare, machine, place, says, serve, LONG};
use anyhow::{ensure, Context, Result};
use vm_tests::{boot, log, unload, Persistent, MIB};
use xtask::vm::Vm;

/// The modes, and what the kernel calls them in its list of memory types. What that has for `wb` is up to the firmware,
/// which says that BARs below 4 GiB are not to be cached.
const MODES: [(&str, Option<&str>); 3] = [
    ("wc", Some("write-combining")),
    ("uc", Some("uncached-minus")),
    ("wb", None),
];

/// Reads and writes all of it, which is `len` bytes.
fn use_it(vm: &Vm, memory: &Persistent, len: u64, seed: u64) -> Result<()> {
    vm.sh_for(
        &format!(
            "pmem-guest direct-write /dev/iopmem0 {len} {seed}
             sync /dev/iopmem0
             pmem-guest direct-verify /dev/iopmem0 {len} {seed}"
        ),
        LONG,
    )?;
    compare(memory, seed, len)
}

/// How the kernel has mapped what begins at `start`.
fn types_at(vm: &Vm, start: u64) -> Result<Vec<String>> {
    // "PAT: [mem 0x00000000fd000000-0x00000000fe000000] write-combining"
    let types = vm.text("/sys/kernel/debug/x86/pat_memtype_list")?;
    let at = format!("[mem {start:#018x}-");
    let lines = types.lines().filter(|line| line.contains(&at));
    Ok(lines.map(str::to_owned).collect())
}

/// What the log says of the first disk.
fn line(vm: &Vm) -> Result<String> {
    let said = log(vm)?;
    let line = said.iter().rev().find(|line| line.contains("iopmem0"));
    line.cloned()
        .with_context(|| format!("nothing is said: {said:#?}"))
}

#[test]
fn each_way_to_map_works_with_dax_and_without() -> Result<()> {
    const LEN: u64 = 16 * MIB;
    let memory = Persistent::new(LEN)?;
    boot(machine(&memory)?, |vm| {
        let start = place(vm, &vm.bar(0))?;
        for (n, (mode, name)) in MODES.into_iter().enumerate() {
            for (dax, memmap) in [("1", "ram"), ("0", "none")] {
                serve(vm, &format!("iopmem_cache={mode} iopmem_dax={dax}"))?;
                says(
                    vm,
                    &[
                        ("pmem/cache", mode),
                        ("pmem/memmap", memmap),
                        ("queue/dax", dax),
                        ("queue/write_cache", "write back"),
                        ("queue/fua", "1"),
                    ],
                )?;
                // All mappings of the same memory are of one kind, also the one that comes with struct pages.
                let types = types_at(vm, start)?;
                ensure!(
                    !types.is_empty()
                        && name.is_none_or(|name| types.iter().all(|line| line.ends_with(name))),
                    "{mode}, iopmem_dax={dax}: not {name:?}: {types:?}"
                );
                use_it(vm, &memory, LEN, n as u64 * 10)?;
                vm.sh("mkfs.ext4 -q -F -b 4096 -O ^has_journal /dev/iopmem0; mkdir -p /mnt/a")?;
                let mounted =
                    vm.try_sh("mount -o dax=always /dev/iopmem0 /mnt/a; umount /mnt/a")?;
                ensure!(
                    (mounted.end == vm_tests::End::Exit(0)) == (dax == "1"),
                    "{mode}, iopmem_dax={dax}: {mounted:?}"
                );
                unload(vm)?;
                let types = types_at(vm, start)?;
                ensure!(types.is_empty(), "{mode}: it is still mapped: {types:?}");
            }
        }
        Ok(())
    })
}

/// Pages need whole sections. A BAR that is less is a disk all the same, and who misses DAX finds out why.
#[test]
fn small_bars_are_disks_without_dax() -> Result<()> {
    let memories = [Persistent::new(MIB)?, Persistent::new(4096)?];
    for memory in &memories {
        let size = memory.size();
        boot(machine(memory)?, |vm| {
            serve(vm, "")?;
            says(
                vm,
                &[
                    ("size", &(size / 512).to_string()),
                    ("pmem/memmap", "none"),
                    ("queue/dax", "0"),
                    ("pmem/provider", "pci"),
                ],
            )?;
            let said = log(vm)?;
            ensure!(
                said.iter()
                    .any(|line| line.contains("BAR 2 gets no DAX") && line.contains("2MiB")),
                "it is not said why there is no DAX: {said:#?}"
            );
            use_it(vm, memory, size, 7)?;
            unload(vm)
        })?;
    }
    Ok(())
}

/// Who has pages enough elsewhere asks for none, and is not told that something were wrong.
#[test]
fn sectors_and_pages_are_as_asked_for() -> Result<()> {
    const LEN: u64 = 4 * MIB;
    let memory = Persistent::new(LEN)?;
    boot(machine(&memory)?, |vm| {
        for (params, sector, dax) in [
            ("pmem_lbs=4096", "4096", "1"),
            ("pmem_lbs=512", "512", "1"),
            ("pmem_lbs=4096 iopmem_dax=0", "4096", "0"),
        ] {
            serve(vm, params)?;
            says(
                vm,
                &[("queue/logical_block_size", sector), ("queue/dax", dax)],
            )?;
            ensure!(line(vm)?.contains("4MiB"), "{}", line(vm)?);
            use_it(vm, &memory, LEN, 3)?;
            unload(vm)?;
        }
        Ok(())
    })
}
