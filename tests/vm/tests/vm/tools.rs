// SPDX-License-Identifier: GPL-2.0-only

//! What administrators' tools say of a disk, and benchmarks do with it.

use anyhow::{ensure, Context, Result};
use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;
use vm_tests::{boot, load, setup, stock, unload, wanted, MIB, PROGRESS};
use xtask::flavour::Flavour;
use xtask::vm::Vm;
use xtask::{picture, repo};

/// What takes minutes of an emulated CPU.
const LONG: Duration = Duration::from_secs(300);

const UUID: &str = "0f1e2d3c-4b5a-4978-8796-a5b4c3d2e1f0";

/// `KEY="value"` of each line.
fn pairs(text: &str) -> Vec<BTreeMap<String, String>> {
    let pairs = |line: &str| {
        let mut words = line.split('"');
        let mut pairs = BTreeMap::new();
        while let (Some(key), Some(value)) = (words.next(), words.next()) {
            let key = key.trim().trim_end_matches('=');
            pairs.insert(key.to_owned(), value.to_owned());
        }
        pairs
    };
    text.lines().map(pairs).collect()
}

/// Installers and administrators find disks by these.
#[test]
fn lsblk_and_blkid() -> Result<()> {
    boot(stock()?.module("xfs"), |vm| {
        load(
            vm,
            "pmem_start=4G pmem_size=1000M pmem_count=2 pmem_lbs=4096",
        )?;
        vm.sh(&format!(
            "printf 'label: gpt\\nstart=2MiB, size=384MiB, name=logs\\n' | sfdisk -q /dev/pmem1
             mkfs.ext4 -q -F -b 4096 -L data -U {UUID} /dev/pmem0
             mkfs.xfs -q -f -m reflink=0 -L logs /dev/pmem1p1"
        ))?;
        let columns = "NAME,KNAME,TYPE,SIZE,PHY-SEC,LOG-SEC,ROTA,RO,RM,DAX,DISC-MAX,MODEL";
        let disks = pairs(&vm.sh(&format!("lsblk -b -P -o {columns}"))?);
        for (name, kind, size) in [
            ("pmem0", "disk", 500 * MIB),
            ("pmem1", "disk", 500 * MIB),
            ("pmem1p1", "part", 384 * MIB),
        ] {
            let disk = disks
                .iter()
                .find(|disk| disk.get("NAME").is_some_and(|n| n == name))
                .with_context(|| format!("no {name} in {disks:#?}"))?;
            for (column, value) in [
                ("KNAME", name),
                ("TYPE", kind),
                ("SIZE", &size.to_string()),
                ("PHY-SEC", "4096"),
                ("LOG-SEC", "4096"),
                ("ROTA", "0"),
                ("RO", "0"),
                ("RM", "0"),
                ("DAX", "1"),
                ("DISC-MAX", "0"),
                ("MODEL", ""),
            ] {
                assert_eq!(disk[column], value, "{column} of {name}: {disk:#?}");
            }
        }
        for (disk, label, kind) in [("pmem0", "data", "ext4"), ("pmem1p1", "logs", "xfs")] {
            let found =
                pairs(&vm.sh(&format!("blkid -p -o full /dev/{disk} | sed 's/^[^:]*://'"))?);
            let found = found.first().context("nothing found")?;
            assert_eq!(found["LABEL"], label, "{found:#?}");
            assert_eq!(found["TYPE"], kind, "{found:#?}");
            // Found by its label, and mounted by it.
            let path = vm.sh(&format!("blkid -c /dev/null -L {label}"))?;
            assert_eq!(path.trim(), format!("/dev/{disk}"));
            vm.sh(&format!(
                "mkdir -p /mnt/{label}; mount -o dax=always LABEL={label} /mnt/{label}
                 test $(findmnt -n -o SOURCE /mnt/{label}) = /dev/{disk}; umount /mnt/{label}"
            ))?;
        }
        let path = vm.sh(&format!("blkid -c /dev/null -U {UUID}"))?;
        assert_eq!(path.trim(), "/dev/pmem0");
        vm.sh(&format!(
            "mount UUID={UUID} /mnt/data; umount /mnt/data
             test $(blockdev --getsize64 /dev/pmem0) = {}
             test $(blockdev --getss /dev/pmem0) = 4096",
            500 * MIB
        ))?;
        unload(vm)
    })
}

/// What the README shows of `pmemctl` is what it says.
#[test]
fn the_picture_of_pmemctl_is_what_it_prints() -> Result<()> {
    if !wanted(Flavour::Cloud)? {
        return Ok(());
    }
    let picture = picture::list(setup(Flavour::Cloud)?, &PROGRESS)?;
    let path = repo::dir().join(picture::LIST);
    let shown = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    ensure!(
        shown == picture,
        "to draw {} anew: cargo xtask picture\n{picture}",
        picture::LIST
    );
    Ok(())
}

/// The counters of the block layer: requests and sectors that were read, and that were written.
fn counters(vm: &Vm) -> Result<[u64; 4]> {
    let stat = vm.text("/sys/block/pmem0/stat")?;
    let fields: Vec<u64> = stat
        .split_whitespace()
        .filter_map(|field| field.parse().ok())
        .collect();
    match fields.as_slice() {
        [reads, _, read, _, writes, _, written, ..] => Ok([*reads, *read, *writes, *written]),
        _ => anyhow::bail!("{stat}"),
    }
}

/// Each way in which a program can reach the disk reads back what it wrote, and is counted as what it is.
#[test]
fn engines_of_fio_and_iostat() -> Result<()> {
    boot(stock()?, |vm| {
        load(vm, "pmem_start=4G pmem_size=64M")?;
        vm.sh("echo 1 >/sys/block/pmem0/queue/iostats")?;
        // 16 MiB in blocks of 4 KiB, each written once in an order that is random, and then read.
        let blocks = 16 * MIB / 4096;
        for engine in ["psync", "libaio", "io_uring"] {
            let before = counters(vm)?;
            vm.sh_for(
                &format!(
                    "fio --name=x --filename=/dev/pmem0 --ioengine={engine} --direct=1 --bs=4k --size=16M --rw=randwrite \
                     --iodepth=16 --verify=crc32c --verify_fatal=1 --do_verify=1 --output=/tmp/fio"
                ),
                LONG,
            )?;
            let now = counters(vm)?;
            let grown: Vec<u64> = (0..4).map(|n| now[n] - before[n]).collect();
            assert_eq!(grown, [blocks, 8 * blocks, blocks, 8 * blocks], "{engine}");
        }
        // Through the page cache, and through a mapping of it: the disk has all of it after a sync.
        for engine in ["sync", "mmap"] {
            let before = counters(vm)?;
            vm.sh_for(
                &format!(
                    "fio --name=x --filename=/dev/pmem0 --ioengine={engine} --bs=4k --size=16M --rw=randwrite --end_fsync=1 \
                     --verify=crc32c --verify_fatal=1 --do_verify=0 --output=/tmp/fio
                     echo 3 >/proc/sys/vm/drop_caches
                     fio --name=x --filename=/dev/pmem0 --ioengine=psync --direct=1 --bs=4k --size=16M --rw=randwrite \
                     --verify=crc32c --verify_fatal=1 --verify_only --output=/tmp/fio"
                ),
                LONG,
            )?;
            let now = counters(vm)?;
            // Blocks may go out together, with others, or twice; but all must.
            ensure!(
                now[3] - before[3] >= 8 * blocks,
                "{engine}: {before:?} {now:?}"
            );
        }
        // iostat says the same as the counters.
        let now = counters(vm)?;
        let said = vm.sh("iostat -d -k pmem0 | grep ^pmem0")?;
        let fields: Vec<&str> = said.split_whitespace().collect();
        let &[_, _, _, _, _, read, written, _] = fields.as_slice() else {
            anyhow::bail!("{said}");
        };
        assert_eq!(read, (now[1] / 2).to_string(), "{said}");
        assert_eq!(written, (now[3] / 2).to_string(), "{said}");
        unload(vm)
    })
}
