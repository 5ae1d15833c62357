// SPDX-License-Identifier: GPL-2.0-only

//! Hours of everything at once, on demand: what is written is verified while memory is short, over and over, and the
//! driver is taken down and loaded again in between.

use crate::kmem::{self, TOO_MUCH};
use anyhow::{Context, Result};
use std::time::{Duration, Instant};
use vm_tests::{boot, load, stock, unload, Random, Trace};
use xtask::test::SOAK_VARIABLE;
use xtask::vm::Vm;

/// A DAX file system, a disk, and a range that is RAM and storage at once.
const LOAD: &str =
    "pmem_start=4G pmem_size=640M pmem_count=2 kmem_start=4736M kmem_size=384M kmem_format=blk";

/// How long fio writes and verifies before all is taken down, in seconds.
const ROUND: u64 = 60;

/// Longer than a round takes, if it ends at all.
const GUARD: Duration = Duration::from_secs(900);

fn round(vm: &Vm, n: u64, seed: u64) -> Result<()> {
    kmem::prepare(vm)?;
    load(vm, LOAD)?;
    let (file_system, make) = match n % 2 {
        0 => ("ext4", "mkfs.ext4 -q -F -b 4096"),
        _ => ("xfs", "mkfs.xfs -q -f -m reflink=0"),
    };
    vm.sh_for(
        &format!(
            "mkdir -p /mnt/a; {make} /dev/pmem0 >/dev/null; mount -t {file_system} -o dax=always /dev/pmem0 /mnt/a"
        ),
        GUARD,
    )?;
    vm.sh_for(
        &format!(
            "cd /tmp; rm -f stop
             {TOO_MUCH}
             ( while [ ! -e stop ]; do
                   echo 3 >/proc/sys/vm/drop_caches; echo 1 >/proc/sys/vm/compact_memory; sleep 2
               done ) &
             fio --verify=crc32c --verify_fatal=1 --do_verify=1 --time_based --runtime={ROUND} --randseed={seed} \\
                 --output=report --direct=1 --name=disk --filename=/dev/pmem1 --ioengine=io_uring --iodepth=8 \\
                 --rw=randwrite --bsrange=512-64k --blockalign=512 --size=32m \\
                 --name=synced --filename=/dev/pmem1 --offset=128m --rw=randwrite --bs=4k --sync=dsync --size=8m \\
                 --name=kmem --filename=/dev/kmem1 --rw=randwrite --bsrange=4k-64k --size=64m \\
                 --name=files --directory=/mnt/a --rw=randwrite --bsrange=4k-64k --size=32m --fsync=32 \\
                 --name=mapped --directory=/mnt/a --ioengine=mmap --direct=0 --rw=randwrite --bs=4k --size=16m \\
                 || {{ cat report; exit 1; }}
             touch stop; wait"
        ),
        GUARD,
    )?;
    let check = match file_system {
        "ext4" => "e2fsck -fn",
        _ => "xfs_repair -n",
    };
    vm.sh_for(
        &format!(
            "umount /mnt/a; {check} /dev/pmem0 >/dev/null; blkdiscard /dev/kmem1
             for state in offline online unplugged; do echo $state >{}/state; done",
            kmem::DEVICE
        ),
        GUARD,
    )?;
    unload(vm)?;
    vm.check_clean()
}

/// How long is in `PMEM_SOAK`, in minutes; without it, this does nothing.
#[test]
fn soak() -> Result<()> {
    let minutes: u64 = match std::env::var(SOAK_VARIABLE) {
        Ok(text) => text
            .parse()
            .with_context(|| format!("{SOAK_VARIABLE}={text}"))?,
        Err(_) => {
            eprintln!("skipped: {SOAK_VARIABLE} does not say for how many minutes");
            return Ok(());
        }
    };
    boot(stock()?.module("xfs"), |vm| {
        kmem::groups(vm)?;
        let mut trace = None;
        let (begun, mut random) = (Instant::now(), Random::new(minutes));
        for n in 0.. {
            round(vm, n, random.next() >> 40).with_context(|| format!("in round {n}"))?;
            let so_far = begun.elapsed().as_secs() / 60;
            eprintln!("soak: {} rounds, {so_far} of {minutes} minutes", n + 1);
            // Each file system was there once.
            match &trace {
                None if n == 0 => {}
                None => trace = Some(Trace::of(vm)?),
                Some(trace) => Trace::of(vm)?.check(trace)?,
            }
            if so_far >= minutes {
                return Ok(());
            }
        }
        Ok(())
    })
}
