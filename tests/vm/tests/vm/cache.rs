// SPDX-License-Identifier: GPL-2.0-only

//! Ranges that are mapped in other ways than write-back: disks without DAX.

use anyhow::{ensure, Result};
use vm_tests::{boot, load, stock, unload, Persistent, GIB};

/// The modes, and what the kernel calls them in its list of memory types.
const MODES: [(&str, &str); 3] = [
    ("wt", "write-through"),
    ("wc", "write-combining"),
    ("uc", "uncached-minus"),
];

const LOAD: &str = "pmem_start=4G,4352M,4608M,4864M pmem_size=256M,256M,256M,256M";

/// What was written is there, in each mode, also when the power was lost and the mode is another one then.
#[test]
fn completed_writes_survive_in_each_mode() -> Result<()> {
    let memory = Persistent::new(GIB)?;
    boot(stock()?.persistent(&memory), |vm| {
        load(vm, &format!("{LOAD} pmem_cache=wt,wc,uc,wb"))?;
        vm.sh("mkdir -p /mnt/a && mount -t debugfs none /sys/kernel/debug 2>/dev/null || true")?;
        let types = vm.text("/sys/kernel/debug/x86/pat_memtype_list")?;
        for (n, (mode, name)) in MODES.iter().enumerate() {
            let start = (4 << 30) + (n as u64) * (256 << 20);
            ensure!(
                types
                    .lines()
                    .any(|line| line.contains(name) && line.contains(&format!("{start:x}-"))),
                "{mode}: not {name} at {start:#x}: {types}"
            );
            let queue = |attribute: &str| -> Result<String> {
                Ok(vm
                    .text(&format!("/sys/block/pmem{n}/queue/{attribute}"))?
                    .trim()
                    .to_owned())
            };
            // No DAX, and nothing that a flush would have to write back.
            assert_eq!(queue("dax")?, "0", "{mode}");
            assert_eq!(queue("write_cache")?, "write through", "{mode}");
            ensure!(
                vm.dmesg()?
                    .contains(&format!("pmem{n}: 256MiB at [mem {start:#x}-")),
                "{}",
                vm.dmesg()?
            );
            vm.sh(&format!(
                "mkfs.ext4 -q -F -b 4096 /dev/pmem{n}
                 if mount -o dax=always /dev/pmem{n} /mnt/a 2>/dev/null; then exit 1; fi
                 mount /dev/pmem{n} /mnt/a
                 pmem-guest fill /mnt/a/fsync 2000000 1
                 pmem-guest mmap-msync /mnt/a/msync 2000000 2
                 umount /mnt/a
                 pmem-guest fill /tmp/x 4194304 5
                 dd if=/tmp/x of=/dev/pmem{n} bs=64k seek=3k oflag=direct 2>/dev/null"
            ))?;
        }
        assert_eq!(vm.text("/sys/block/pmem3/queue/dax")?.trim(), "1");
        unload(vm)?;
        // All of the mappings are gone.
        let types = vm.text("/sys/kernel/debug/x86/pat_memtype_list")?;
        ensure!(!types.contains("0x0000000100000000-"), "{types}");
        load(vm, &format!("{LOAD} pmem_cache=uc"))
    })?;
    boot(stock()?.persistent(&memory), |vm| {
        load(vm, &format!("{LOAD} pmem_cache=wc,uc,wb,wt"))?;
        for n in 0..MODES.len() {
            vm.sh(&format!(
                "pmem-guest fill /tmp/x 4194304 5
                 dd if=/dev/pmem{n} of=/tmp/y bs=64k skip=3k count=64 iflag=direct 2>/dev/null
                 cmp /tmp/x /tmp/y
                 mkdir -p /mnt/a; mount /dev/pmem{n} /mnt/a
                 pmem-guest verify /mnt/a/fsync 2000000 1
                 pmem-guest verify /mnt/a/msync 2000000 2
                 umount /mnt/a; e2fsck -fn /dev/pmem{n}"
            ))?;
        }
        unload(vm)
    })
}

/// Sectors and zeroes are right in each mode, and through the cache.
#[test]
fn verification_passes_in_each_mode() -> Result<()> {
    boot(stock()?, |vm| {
        load(vm, &format!("{LOAD} pmem_cache=wt,wc,uc,wb pmem_copy=wb"))?;
        for (n, copy) in ["movnti", "movnti", "movnti", "mov+clwb"]
            .iter()
            .enumerate()
        {
            let instructions = vm.text(&format!("/sys/block/pmem{n}/pmem/copy"))?;
            assert_eq!(instructions.trim(), *copy);
            vm.sh(&format!(
                "fio --name=x --filename=/dev/pmem{n} --direct=1 --rw=randwrite --bsrange=512-16k --bs_unaligned=0 \\
                     --size=2m --verify=crc32c --verify_fatal=1 --do_verify=1 --output=/tmp/report || {{ cat /tmp/report; exit 1; }}
                 blkdiscard -z -o 1536 -l 1048576 /dev/pmem{n}
                 dd if=/dev/pmem{n} bs=512 skip=3 count=2048 iflag=direct 2>/dev/null | cmp -n 1048576 - /dev/zero"
            ))?;
        }
        unload(vm)
    })
}
