// SPDX-License-Identifier: GPL-2.0-only

//! What the disk says of itself, and whether that is so.

use super::{load_movable, take_down, BLOCKS, PAGE};
use anyhow::Result;
use vm_tests::{boot, stock, End};
use xtask::vm::Vm;

const LOAD: &str = "kmem_start=4G kmem_size=1G kmem_format=blk";

/// What `statx(2)` says of atomic writes: the smallest, the largest, and of how many segments.
fn atomic_write_units(vm: &Vm) -> Result<Vec<u64>> {
    // STATX_WRITE_ATOMIC
    let text =
        vm.sh("xfs_io -c 'statx -r -m 0x10fff' /dev/kmem1 | grep atomic_write | sed 's/.* = //'")?;
    Ok(text.lines().map(str::parse).collect::<Result<_, _>>()?)
}

/// Databases that trust what is promised here do without a journal, and file systems without flushes.
#[test]
fn queue_limits() -> Result<()> {
    boot(stock()?, |vm| {
        for (params, unit) in [
            (LOAD.to_owned(), 4096),
            (format!("{LOAD} kmem_atomic=0"), 0),
        ] {
            load_movable(vm, &params)?;
            for (file, value) in [
                ("logical_block_size", 4096),
                ("physical_block_size", 4096),
                ("discard_granularity", 4096),
                ("atomic_write_unit_min_bytes", unit),
                ("atomic_write_unit_max_bytes", unit),
                ("atomic_write_max_bytes", unit),
                ("fua", 0),
                ("dax", 0),
                ("rotational", 0),
            ] {
                let found = vm.text(&format!("/sys/block/kmem1/queue/{file}"))?;
                assert_eq!(found.trim(), value.to_string(), "{file}, {params}");
            }
            // Nothing to flush: a write is durable when it is done.
            let cache = vm.text("/sys/block/kmem1/queue/write_cache")?;
            assert_eq!(cache.trim(), "write through");
            for file in ["discard_max_bytes", "write_zeroes_max_bytes"] {
                let found: u64 = vm
                    .text(&format!("/sys/block/kmem1/queue/{file}"))?
                    .trim()
                    .parse()?;
                assert!(found >= 1 << 20, "{file} is {found}");
            }
            let segments = u64::from(unit != 0);
            assert_eq!(atomic_write_units(vm)?, [unit, unit, segments], "{params}");
            // What is written, with which flag (-A is RWF_ATOMIC, -N RWF_NOWAIT, -D RWF_DSYNC), and what it gives.
            for (flags, len, fault) in [
                ("-A", 4096, (unit == 0).then_some("not supported")),
                ("-A -D", 4096, (unit == 0).then_some("not supported")),
                (
                    "-A",
                    8192,
                    Some(if unit == 0 {
                        "not supported"
                    } else {
                        "Invalid argument"
                    }),
                ),
                ("-N", 4096, None),
                ("-N", 65536, None),
                ("-D", 4096, None),
                ("", 512, Some("Invalid argument")),
                ("", 4608, Some("Invalid argument")),
            ] {
                let script =
                    format!("xfs_io -d -c 'pwrite -V 1 {flags} -b {len} 65536 {len}' /dev/kmem1");
                let ran = vm.try_sh(&script)?;
                match fault {
                    None => assert_eq!(ran.end, End::Exit(0), "{script}: {ran:?}"),
                    Some(fault) => assert!(ran.stderr.contains(fault), "{script}: {ran:?}"),
                }
            }
            take_down(vm)?;
        }
        Ok(())
    })
}

#[test]
fn the_end_of_the_disk_is_its_end() -> Result<()> {
    boot(stock()?, |vm| {
        load_movable(vm, LOAD)?;
        let last = BLOCKS - 1;
        vm.sh(&format!(
            "pmem-guest fill /tmp/x 4096 1; dd if=/tmp/x of=/dev/kmem1 bs=4096 seek={last} oflag=direct 2>/dev/null
             dd if=/dev/kmem1 of=/tmp/y bs=4096 skip={last} iflag=direct 2>/dev/null; cmp /tmp/x /tmp/y"
        ))?;
        let beyond = vm.try_sh(&format!(
            "dd if=/tmp/x of=/dev/kmem1 bs=4096 seek={BLOCKS} oflag=direct"
        ))?;
        assert!(beyond.stderr.contains("No space left"), "{}", beyond.stderr);
        let size = vm.sh("blockdev --getsize64 /dev/kmem1")?;
        assert_eq!(size.trim().parse::<u64>()?, BLOCKS * PAGE);
        take_down(vm)
    })
}
