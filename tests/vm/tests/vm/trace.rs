// SPDX-License-Identifier: GPL-2.0-only

//! That what QEMU tells of a guest's accesses to memory is all of them, and as they are.

use anyhow::{ensure, Context, Result};
use std::collections::BTreeMap;
use std::ops::Range;
use vm_tests::{boot, load, stock, MIB, UPPER};
use xtask::vm::{Kind, Shape, Vm};

/// A device whose BAR 2 is plain memory.
const IVSHMEM: [&str; 4] = [
    "-object",
    "memory-backend-ram,id=bar,share=on,size=1M",
    "-device",
    "ivshmem-plain,memdev=bar",
];

/// The device's directory in sysfs, and the physical range of its BAR.
fn bar(vm: &Vm) -> Result<(String, Range<u64>)> {
    let device = vm.sh("cd /sys/bus/pci/devices
         grep -lx 0x1110 $(grep -lx 0x1af4 */vendor | sed s/vendor/device/)")?;
    let device = device.trim().trim_end_matches("/device");
    let device = format!("/sys/bus/pci/devices/{device}");
    vm.sh(&format!("echo 1 >{device}/enable"))?;
    let resources = vm.text(&format!("{device}/resource"))?;
    let range = (|| {
        let mut fields = resources.lines().nth(2)?.split_whitespace();
        let mut address = || u64::from_str_radix(fields.next()?.strip_prefix("0x")?, 16).ok();
        let (first, last) = (address()?, address()?);
        (first > 0).then_some(first..last + 1)
    })();
    let range = range.with_context(|| format!("{device} has no BAR 2:\n{resources}"))?;
    Ok((device, range))
}

/// What was seen since the last `watch`.
fn seen(vm: &Vm) -> Result<BTreeMap<Shape, u64>> {
    Ok(vm.accesses()?.shapes())
}

/// Programs access a BAR in all ways that a CPU has, and exactly that is seen. If one were not, or as another, a driver
/// that makes it would pass.
#[test]
fn each_access_to_a_bar_is_seen_as_it_is() -> Result<()> {
    let load = |size| Shape::aligned(Kind::Load, size);
    let store = |size| Shape::aligned(Kind::Store, size);
    let misaligned = |kind, size| Shape::misaligned(kind, size);
    let cases: &[(&str, &[(Shape, u64)])] = &[
        ("load1@5*3", &[(load(1), 3)]),
        ("load2@6*4", &[(load(2), 4)]),
        ("load2@7*5", &[(misaligned(Kind::Load, 2), 5)]),
        ("load4@8*6", &[(load(4), 6)]),
        ("load4@10*7", &[(misaligned(Kind::Load, 4), 7)]),
        ("load8@16*8", &[(load(8), 8)]),
        ("load8@20*9", &[(misaligned(Kind::Load, 8), 9)]),
        ("load16@32*10", &[(load(16), 10)]),
        ("load16@40*11", &[(misaligned(Kind::Load, 16), 11)]),
        ("store1@5*3", &[(store(1), 3)]),
        ("store2@6*4", &[(store(2), 4)]),
        ("store2@7*5", &[(misaligned(Kind::Store, 2), 5)]),
        ("store4@8*6", &[(store(4), 6)]),
        ("store4@10*7", &[(misaligned(Kind::Store, 4), 7)]),
        ("store8@16*8", &[(store(8), 8)]),
        ("store8@20*9", &[(misaligned(Kind::Store, 8), 9)]),
        ("store16@32*10", &[(store(16), 10)]),
        ("store16@40*11", &[(misaligned(Kind::Store, 16), 11)]),
        // From one page to the next.
        ("load8@4092*2", &[(misaligned(Kind::Load, 8), 2)]),
        ("store8@4092*3", &[(misaligned(Kind::Store, 8), 3)]),
        ("movnti@64*4", &[(store(8), 4)]),
        ("movnti@68*5", &[(misaligned(Kind::Store, 8), 5)]),
        ("add@128*6", &[(load(8), 6), (store(8), 6)]),
        ("stosq@192*2", &[(store(8), 16)]),
        ("stosq@196*2", &[(misaligned(Kind::Store, 8), 16)]),
        ("movsb@257*2", &[(store(1), 64)]),
    ];
    boot(stock()?.watch_accesses().qemu(&IVSHMEM), |vm| {
        let (device, bar) = bar(vm)?;
        ensure!(
            bar.end - bar.start == MIB,
            "the BAR has {} bytes",
            bar.end - bar.start
        );
        // Mapped uncached, and write-combining: it makes no difference.
        for file in ["resource2", "resource2_wc"] {
            let access = |accesses: &str| {
                vm.sh(&format!(
                    "pmem-guest access {device}/{file} {MIB} {accesses}"
                ))
            };
            for &(accesses, expected) in cases {
                vm.watch(bar.clone())?;
                access(&format!("'{accesses}'"))?;
                let expected = BTreeMap::from_iter(expected.iter().copied());
                let seen = seen(vm)?;
                ensure!(seen == expected, "{file}: {accesses}: {seen:?}");
            }
            // By two CPUs at once.
            vm.watch(bar.clone())?;
            vm.sh(&format!(
                "for cpu in 0 1; do
                     taskset -c $cpu pmem-guest access {device}/{file} {MIB} 'store8@64*10000' &
                     pids=\"$pids $!\"
                 done
                 for pid in $pids; do wait $pid; done"
            ))?;
            let both = seen(vm)?;
            ensure!(both == BTreeMap::from([(store(8), 20_000)]), "{both:?}");
            // What is beside the range is none of ours.
            vm.watch(bar.start + 4096..bar.start + 8192)?;
            access("'store8@4088*2' 'store8@4096*3' 'store4@8188*4' 'store8@8192*5'")?;
            let within = seen(vm)?;
            ensure!(
                within == BTreeMap::from([(store(8), 3), (store(4), 4)]),
                "{within:?}"
            );
        }
        Ok(())
    })
}

/// The accesses of a driver are those of its disk's I/O, and it can be told who makes them.
#[test]
fn accesses_of_the_driver_are_told_by_function() -> Result<()> {
    const SIZE: u64 = 64 << 10;
    boot(stock()?.watch_accesses(), |vm| {
        load(vm, "pmem_start=4G pmem_size=64M")?;
        vm.sh(&format!("pmem-guest fill /tmp/x {SIZE} 1"))?;
        let disk = UPPER..UPPER + 64 * MIB;

        vm.watch(disk.clone())?;
        vm.sh(&format!(
            "dd if=/tmp/x of=/dev/pmem0 bs={SIZE} oflag=direct 2>/dev/null"
        ))?;
        let accesses = vm.accesses()?;
        let granules = |shape: &Shape| *shape == Shape::aligned(Kind::Store, 8);
        let others = accesses.except(granules);
        ensure!(others.is_empty(), "a write: {}", vm.explain(&others)?);
        let stores: u64 = accesses.shapes().values().sum();
        ensure!(stores == SIZE / 8, "{stores} stores");
        let who = vm.explain(&accesses.counted)?;
        ensure!(who.lines().all(|line| line.ends_with(" [pmem]")), "{who}");

        vm.watch(disk)?;
        vm.sh(&format!(
            "dd if=/dev/pmem0 of=/tmp/y bs={SIZE} count=1 iflag=direct 2>/dev/null; cmp /tmp/x /tmp/y"
        ))?;
        let accesses = vm.accesses()?;
        let stores = accesses.except(|shape| shape.kind == Kind::Load);
        ensure!(stores.is_empty(), "a read: {}", vm.explain(&stores)?);
        let shapes = accesses.shapes();
        let bytes: u64 = shapes.iter().map(|(shape, count)| shape.size * count).sum();
        ensure!(bytes == SIZE, "{bytes} bytes are read: {shapes:?}");
        Ok(())
    })
}
