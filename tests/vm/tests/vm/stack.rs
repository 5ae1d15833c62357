// SPDX-License-Identifier: GPL-2.0-only

//! What is put on top of disks besides file systems: swap, device mapper, RAID, another machine.

use anyhow::{ensure, Context, Result};
use std::time::Duration;
use vm_tests::{boot, debian, has_kasan, load, stock, unload, MIB};
use xtask::vm::Vm;

const EAGAIN: i32 = 11;

/// What takes minutes of an emulated CPU.
const LONG: Duration = Duration::from_secs(300);

/// Who uses a disk keeps the driver.
fn unload_is_refused(vm: &Vm) -> Result<()> {
    let refused = vm.rmmod("pmem")?;
    assert_eq!(refused.map_err(|error| error.errno), Err(EAGAIN));
    Ok(())
}

/// A machine that runs out of memory must not find other bytes in what it had put aside.
#[test]
fn swap() -> Result<()> {
    // KASAN keeps what was freed, and all bios of a swap-out among it while memory is short: it needs more to begin with.
    let (ram, files) = match has_kasan()? {
        false => (512 * MIB, "1 2 3"),
        true => (1024 * MIB, "1 2 3 4 5 6 7"),
    };
    boot(stock()?.ram(ram), |vm| {
        load(vm, "pmem_start=4G pmem_size=1G pmem_count=2")?;
        vm.sh(
            "for n in 0 1; do mkswap -L swap$n /dev/pmem$n; swapon -p 1 /dev/pmem$n; done
             grep -c '^/dev/pmem[01] ' /proc/swaps | grep -qx 2",
        )?;
        unload_is_refused(vm)?;
        // Of 512 MiB the kernel and the programs take more than a half.
        vm.sh_for(
            &format!(
                "mkdir -p /mnt/ram; mount -t tmpfs -o size=1G none /mnt/ram
                 pmem-guest fill /mnt/ram/0 20000000 7
                 for n in {files}; do pmem-guest fill /mnt/ram/$n 100000000 $n; done"
            ),
            LONG,
        )?;
        vm.sh_for(
            &format!("for n in {files}; do pmem-guest verify /mnt/ram/$n 100000000 $n; done"),
            LONG,
        )?;
        let counted = |name: &str| -> Result<u64> {
            let text = vm.text("/proc/vmstat")?;
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            Ok(line.context("no such counter")?.trim().parse()?)
        };
        for name in ["pswpout ", "pswpin "] {
            let pages = counted(name)?;
            ensure!(pages > 10_000, "{name}{pages}");
        }
        // Equal priorities: both are used.
        for n in 0..2 {
            let used = vm.sh(&format!(
                "grep '^/dev/pmem{n} ' /proc/swaps | tr -s ' \\t' ' ' | cut -d' ' -f4"
            ))?;
            ensure!(used.trim().parse::<u64>()? > 20_000, "pmem{n}: {used} KiB");
        }
        // All that is on the first one goes to the second.
        vm.sh_for(
            "swapoff /dev/pmem0; pmem-guest verify /mnt/ram/2 100000000 2",
            LONG,
        )?;
        vm.sh_for(
            "rm /mnt/ram/[1-7]; swapoff -a; pmem-guest verify /mnt/ram/0 20000000 7",
            LONG,
        )?;
        unload(vm)
    })
}

/// The `dmsetup` of a guest without udev.
const DM: &str = "export DM_DISABLE_UDEV=1; mkdir -p /mnt/a";

/// A logical volume over two disks, with DAX through both.
fn linear(vm: &Vm) -> Result<()> {
    load(vm, "pmem_start=4G pmem_size=512M pmem_count=2")?;
    vm.sh_for(
        &format!(
            "{DM}
             printf '0 524288 linear /dev/pmem1 0\\n524288 524288 linear /dev/pmem0 0\\n' | dmsetup create both
             test $(blockdev --getsize64 /dev/mapper/both) = 536870912
             mkfs.ext4 -q -F -b 4096 /dev/mapper/both; mount -o dax=always /dev/mapper/both /mnt/a
             grep -q '/mnt/a .*dax=always' /proc/mounts
             for n in 1 2 3 4; do pmem-guest mmap-sync /mnt/a/$n 90000000 $n; done"
        ),
        LONG,
    )?;
    unload_is_refused(vm)?;
    vm.sh_for(
        &format!(
            "{DM}
             umount /mnt/a; e2fsck -fn /dev/mapper/both; dmsetup remove both"
        ),
        LONG,
    )?;
    unload(vm)?;
    // Another table, another load: the data is where the first one put it.
    load(vm, "pmem_start=4G pmem_size=512M")?;
    vm.sh_for(
        &format!(
            "{DM}
             printf '0 524288 linear /dev/pmem0 524288\\n524288 524288 linear /dev/pmem0 0\\n' | dmsetup create both
             mount -o dax=never /dev/mapper/both /mnt/a
             for n in 1 2 3 4; do pmem-guest verify /mnt/a/$n 90000000 $n; done
             umount /mnt/a; dmsetup remove both"
        ),
        LONG,
    )?;
    unload(vm)
}

/// What a cache in persistent memory has and the origin has not must be there the next time.
fn writecache(vm: &Vm) -> Result<()> {
    const LOAD: &str = "pmem_start=4G,4352M pmem_size=64M,512M";
    const CREATE: &str =
        "echo '0 1048576 writecache p /dev/pmem1 /dev/pmem0 4096 0' | dmsetup create cached";
    /// Blocks that the cache has, and those that are free.
    fn blocks(vm: &Vm) -> Result<(u64, u64)> {
        let status = vm.sh(&format!("{DM}; dmsetup status cached"))?;
        let words: Vec<&str> = status.split_whitespace().collect();
        let number = |n: usize| -> Result<u64> {
            let word = words.get(n).with_context(|| status.clone())?;
            word.parse().with_context(|| status.clone())
        };
        ensure!(
            words.get(2) == Some(&"writecache") && number(3)? == 0,
            "{status}"
        );
        Ok((number(4)?, number(5)?))
    }
    load(vm, LOAD)?;
    vm.sh_for(
        &format!(
            "{DM}
             dd if=/dev/zero of=/dev/pmem0 bs=4096 count=1 2>/dev/null
             {CREATE}
             mkfs.ext4 -q -F -b 4096 /dev/mapper/cached; mount /dev/mapper/cached /mnt/a
             pmem-guest fill /mnt/a/x 10000000 1
             dmsetup suspend cached; dmsetup resume cached
             pmem-guest fill /mnt/a/y 10000000 2
             umount /mnt/a"
        ),
        LONG,
    )?;
    let (total, free) = blocks(vm)?;
    ensure!(
        total > 10_000 && total - free > 4000,
        "of {total} blocks, {free} are free"
    );
    unload_is_refused(vm)?;
    vm.sh(&format!("{DM}; dmsetup remove cached"))?;
    unload(vm)?;

    load(vm, LOAD)?;
    vm.sh(&format!(
        "{DM}; {CREATE}; mount /dev/mapper/cached /mnt/a
         pmem-guest verify /mnt/a/x 10000000 1; pmem-guest verify /mnt/a/y 10000000 2
         umount /mnt/a; e2fsck -fn /dev/mapper/cached
         dmsetup message cached 0 flush"
    ))?;
    let (total, free) = blocks(vm)?;
    assert_eq!(total, free);
    // All of it is on the origin now.
    vm.sh(&format!(
        "{DM}; dmsetup remove cached; mount -o dax=always /dev/pmem1 /mnt/a
         pmem-guest verify /mnt/a/x 10000000 1; pmem-guest verify /mnt/a/y 10000000 2
         umount /mnt/a"
    ))?;
    unload(vm)
}

#[test]
fn device_mapper() -> Result<()> {
    let Some(machine) = debian()? else {
        return Ok(());
    };
    boot(machine.module("dm_mod").module("dm_writecache"), |vm| {
        linear(vm)?;
        writecache(vm)
    })
}

/// Each half of a mirror has all of the data, even what was written while it was away.
#[test]
fn raid1() -> Result<()> {
    let Some(machine) = debian()? else {
        return Ok(());
    };
    boot(machine.module("raid1"), |vm| {
        load(vm, "pmem_start=4G pmem_size=256M pmem_count=2")?;
        vm.sh_for(
            "export MDADM_NO_UDEV=1; mkdir -p /mnt/a
             mdadm --quiet --create /dev/md0 --level=1 --raid-devices=2 --metadata=1.2 --bitmap=internal --run /dev/pmem0 /dev/pmem1
             mdadm --wait /dev/md0 || true
             grep -q 'UU' /proc/mdstat
             mkfs.ext4 -q -F -b 4096 /dev/md0; mount /dev/md0 /mnt/a
             pmem-guest fill /mnt/a/x 20000000 1
             mdadm --quiet /dev/md0 --fail /dev/pmem1 --remove /dev/pmem1
             grep -q 'U_' /proc/mdstat
             pmem-guest fill /mnt/a/y 20000000 2
             mdadm --quiet /dev/md0 --re-add /dev/pmem1
             mdadm --wait /dev/md0 || true
             grep -q 'UU' /proc/mdstat
             pmem-guest fill /mnt/a/z 20000000 3",
            LONG,
        )?;
        unload_is_refused(vm)?;
        vm.sh_for(
            "export MDADM_NO_UDEV=1
             umount /mnt/a
             echo check >/sys/block/md0/md/sync_action
             mdadm --wait /dev/md0 || true
             grep -qx 0 /sys/block/md0/md/mismatch_cnt
             mdadm --quiet --stop /dev/md0",
            LONG,
        )?;
        // From each half alone, that which was away first.
        for half in ["pmem1", "pmem0"] {
            vm.sh_for(
                &format!(
                    "export MDADM_NO_UDEV=1
                     mdadm --quiet --assemble --run --readonly /dev/md0 /dev/{half}
                     e2fsck -fn /dev/md0; mount -o ro /dev/md0 /mnt/a
                     for file in x:1 y:2 z:3; do pmem-guest verify /mnt/a/${{file%:*}} 20000000 ${{file#*:}}; done
                     umount /mnt/a; mdadm --quiet --stop /dev/md0"
                ),
                LONG,
            )?;
        }
        unload(vm)
    })
}

/// Another machine's `fsync` is ours.
#[test]
fn nvme_over_tcp() -> Result<()> {
    let Some(machine) = debian()? else {
        return Ok(());
    };
    let machine = machine
        .module("configfs")
        .module("nvmet_tcp")
        .module("nvme_tcp");
    boot(machine, |vm| {
        load(vm, "pmem_start=4G pmem_size=512M")?;
        vm.sh(
            "ifconfig lo 127.0.0.1 up; mkdir -p /mnt/a
             mount -t configfs none /sys/kernel/config; cd /sys/kernel/config/nvmet
             mkdir subsystems/nqn.pmem; echo 1 >subsystems/nqn.pmem/attr_allow_any_host
             mkdir subsystems/nqn.pmem/namespaces/1
             echo /dev/pmem0 >subsystems/nqn.pmem/namespaces/1/device_path
             echo 1 >subsystems/nqn.pmem/namespaces/1/enable
             mkdir ports/1; cd ports/1
             echo ipv4 >addr_adrfam; echo tcp >addr_trtype; echo 127.0.0.1 >addr_traddr; echo 4420 >addr_trsvcid
             ln -s /sys/kernel/config/nvmet/subsystems/nqn.pmem subsystems/nqn.pmem",
        )?;
        unload_is_refused(vm)?;
        vm.sh_for(
            "printf 'transport=tcp,traddr=127.0.0.1,trsvcid=4420,nqn=nqn.pmem' >/dev/nvme-fabrics
             for i in $(seq 100); do test -b /dev/nvme0n1 && break; sleep 0.1; done
             test $(blockdev --getsize64 /dev/nvme0n1) = 536870912
             mkfs.ext4 -q -F -b 4096 /dev/nvme0n1; mount /dev/nvme0n1 /mnt/a
             pmem-guest fill /mnt/a/x 8388608 1",
            LONG,
        )?;
        // Where the file is, in sectors, as `N: [FIRST..LAST]: FIRST..LAST`; and there it is on our disk, while the
        // other machine has it mounted.
        let extents = vm.sh("xfs_io -r -c fiemap /mnt/a/x | grep '\\[.*\\]: [0-9]'")?;
        let mut bytes = 0;
        for line in extents.lines() {
            let parts: Vec<u64> = line
                .split(|c: char| !c.is_ascii_digit())
                .filter_map(|part| part.parse().ok())
                .collect();
            let &[_, at, last, on_disk, _] = parts.as_slice() else {
                anyhow::bail!("{line}");
            };
            let count = last + 1 - at;
            vm.sh(&format!(
                "dd if=/mnt/a/x of=/tmp/theirs bs=512 skip={at} count={count} 2>/dev/null
                 dd if=/dev/pmem0 of=/tmp/ours bs=512 skip={on_disk} count={count} iflag=direct 2>/dev/null
                 cmp /tmp/theirs /tmp/ours"
            ))?;
            bytes += count * 512;
        }
        assert_eq!(bytes, 8 * MIB, "{extents}");

        vm.sh_for(
            "pmem-guest mmap-msync /mnt/a/y 33333333 2
             umount /mnt/a
             echo 1 >/sys/class/nvme/nvme0/delete_controller
             for i in $(seq 100); do test -b /dev/nvme0n1 || break; sleep 0.1; done
             test ! -b /dev/nvme0n1
             cd /sys/kernel/config/nvmet
             rm ports/1/subsystems/nqn.pmem
             echo 0 >subsystems/nqn.pmem/namespaces/1/enable
             rmdir ports/1 subsystems/nqn.pmem/namespaces/1 subsystems/nqn.pmem
             e2fsck -fn /dev/pmem0
             mount -o dax=always /dev/pmem0 /mnt/a
             pmem-guest verify /mnt/a/x 8388608 1
             pmem-guest mmap-verify /mnt/a/y 33333333 2
             umount /mnt/a",
            LONG,
        )?;
        unload(vm)
    })
}
