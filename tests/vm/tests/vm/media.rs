// SPDX-License-Identifier: GPL-2.0-only

//! Bad memory: what fails, who is told, and what makes it good again.

use anyhow::{ensure, Context, Result};
use vm_tests::{boot, boot_dirty, load, stock, unload, End};
use xtask::vm::Vm;

const LOAD: &str = "pmem_start=4G pmem_size=512MiB";
const BADBLOCKS: &str = "/sys/block/pmem0/badblocks";
const INJECT: &str = "/sys/kernel/debug/pmem/pmem0/inject_error";
const SIGBUS: i32 = 7;

const NONE: [u64; 0] = [];

const MKFS_EXT4: &str = "mkfs.ext4 -q -F -b 4096 /dev/pmem0";
const MKFS_XFS: &str = "mkfs.xfs -q -f -m rmapbt=1,reflink=0 /dev/pmem0";

/// Writes to a file as a shell does, and returns whether it was accepted.
fn accepts(vm: &Vm, text: &str, path: &str) -> Result<bool> {
    Ok(vm.try_sh(&format!("printf -- '{text}' >{path}"))?.end == End::Exit(0))
}

fn inject(vm: &Vm, text: &str) -> Result<()> {
    ensure!(accepts(vm, text, INJECT)?, "{text} was not accepted");
    Ok(())
}

/// Writes what /tmp/x has at the same place. `flags` are those of `xfs_io`: `-d` for O_DIRECT.
fn write(flags: &str, to: &str, at: u64, len: u64) -> String {
    format!("xfs_io {flags} -c 'pwrite -q -b {len} -i /tmp/x -s {at} {at} {len}' -c fsync {to}")
}

/// Which of the first 64 sectors of the disk cannot be read.
fn bad_sectors(vm: &Vm) -> Result<Vec<u64>> {
    numbers(&vm.sh("pmem-guest read-sectors /dev/pmem0 64")?)
}

fn numbers(text: &str) -> Result<Vec<u64>> {
    text.split_whitespace().map(|n| Ok(n.parse()?)).collect()
}

#[test]
fn bad_sectors_fail_alone_and_are_listed() -> Result<()> {
    boot(stock()?, |vm| {
        load(vm, LOAD)?;
        vm.sh("pmem-guest fill /tmp/x 32768 5; dd if=/tmp/x of=/dev/pmem0 bs=4k oflag=direct 2>/dev/null")?;
        assert_eq!(bad_sectors(vm)?, NONE);
        inject(vm, "20 3\\n")?;
        inject(vm, "40")?;
        assert_eq!(vm.text(INJECT)?, "20 3\n40 1\n");
        assert_eq!(vm.text(BADBLOCKS)?, "");

        // Who polls is told with the first error.
        vm.sh(&format!(
            "pmem-guest poll {BADBLOCKS} 60 >/tmp/poll & echo $! >/tmp/pid
             while ! grep -q ready /tmp/poll; do sleep 0.05; done"
        ))?;
        assert_eq!(bad_sectors(vm)?, [20, 21, 22, 40]);
        let polled = vm.sh("while [ -d /proc/$(cat /tmp/pid) ] && ! grep -q Z /proc/$(cat /tmp/pid)/status; do sleep 0.05; done; cat /tmp/poll")?;
        ensure!(polled.starts_with("ready\n20 "), "{polled:?}");
        assert_eq!(vm.text(BADBLOCKS)?, "20 3\n40 1\n");
        assert_eq!(vm.text(INJECT)?.trim(), "");
        ensure!(vm.dmesg()?.contains("media errors, the first in sector 20"));

        // A part of the sectors is overwritten, and the rest stays bad.
        vm.sh(&write("-d", "/dev/pmem0", 21 * 512, 512))?;
        assert_eq!(vm.text(BADBLOCKS)?, "20 1\n22 1\n40 1\n");
        assert_eq!(bad_sectors(vm)?, [20, 22, 40]);
        // A larger write, and one through the page cache.
        vm.sh(&write("-d", "/dev/pmem0", 0, 16384))?;
        assert_eq!(vm.text(BADBLOCKS)?, "40 1\n");
        vm.sh(&write("", "/dev/pmem0", 5 * 4096, 4096))?;
        assert_eq!(vm.text(BADBLOCKS)?, "");
        assert_eq!(bad_sectors(vm)?, NONE);
        vm.sh(
            "dd if=/dev/pmem0 of=/tmp/y bs=32k count=1 iflag=direct 2>/dev/null; cmp /tmp/x /tmp/y",
        )?;

        // Each failed read and each sector that is good again was counted.
        let count = |name| vm.text(&format!("/sys/kernel/debug/pmem/pmem0/{name}"));
        assert_eq!(count("media_errors")?, "7\n");
        assert_eq!(count("cleared")?, "4\n");

        // Zeroes make it good, too; what was not known to be bad as well.
        inject(vm, "300\\n")?;
        vm.sh("blkdiscard -f -z -o 151552 -l 4096 /dev/pmem0")?;
        assert_eq!(vm.text(INJECT)?.trim(), "");
        assert_eq!(bad_sectors(vm)?, NONE);
        Ok(())
    })
}

#[test]
fn what_root_lists_is_bad_until_it_is_overwritten_or_unloaded() -> Result<()> {
    boot(stock()?, |vm| {
        load(vm, LOAD)?;
        for text in ["x", "1 2 3", "1048576", "1048575 2", "-1"] {
            ensure!(!accepts(vm, text, INJECT)?, "{text} was accepted");
        }
        ensure!(vm
            .dmesg()?
            .contains("inject_error: \"1048576\"; write SECTOR [COUNT]"));
        let mode = vm.sh(&format!("stat -c %a {INJECT}"))?;
        assert_eq!(mode.trim(), "600");

        vm.sh(&format!("echo 8 2 >{BADBLOCKS}"))?;
        assert_eq!(bad_sectors(vm)?, [8, 9]);
        vm.sh("xfs_io -d -c 'pwrite -q -b 512 4096 512' /dev/pmem0")?;
        assert_eq!(bad_sectors(vm)?, [9]);
        inject(vm, "30")?;

        // The medium has no record of it.
        unload(vm)?;
        ensure!(!vm
            .try_sh("ls -d /sys/kernel/debug/pmem")?
            .stdout
            .contains("pmem"));
        load(vm, LOAD)?;
        assert_eq!(vm.text(BADBLOCKS)?, "");
        assert_eq!(bad_sectors(vm)?, NONE);
        Ok(())
    })
}

/// Makes a file of 8 pages, and returns its first sector.
fn file(vm: &Vm, params: &str, mkfs: &str) -> Result<u64> {
    load(vm, params)?;
    vm.sh(&format!(
        "{mkfs}; mkdir -p /mnt/a; mount -o dax=always /dev/pmem0 /mnt/a
         pmem-guest fill /mnt/a/x 32768 5; cp /mnt/a/x /tmp/x; sync"
    ))?;
    first_sector(vm)
}

fn first_sector(vm: &Vm) -> Result<u64> {
    let map = vm.sh("xfs_io -c fiemap /mnt/a/x")?;
    // " 0: [0..63]: 66048..66111"
    map.lines()
        .find_map(|line| {
            let blocks = line.split_once("[0..63]: ")?.1;
            blocks.split("..").next()?.parse().ok()
        })
        .with_context(|| format!("not one extent: {map}"))
}

fn bad_pages(vm: &Vm) -> Result<Vec<u64>> {
    numbers(&vm.sh("pmem-guest read-pages /mnt/a/x")?)
}

fn end_of(vm: &Vm, script: &str) -> Result<End> {
    Ok(vm.try_sh(&format!("exec {script}"))?.end)
}

/// The file's third page was bad: it is overwritten, in part and then as a whole.
fn recover(vm: &Vm) -> Result<()> {
    assert_eq!(bad_pages(vm)?, [3]);
    assert_eq!(
        end_of(vm, "pmem-guest mmap-read /mnt/a/x 3")?,
        End::Signal(SIGBUS)
    );
    assert_eq!(end_of(vm, "pmem-guest mmap-read /mnt/a/x 2")?, End::Exit(0));

    let write = |at, len| write("", "/mnt/a/x", at, len);
    ensure!(
        end_of(vm, &write(25 * 512, 512))? != End::Exit(0),
        "a part was written"
    );
    assert_eq!(bad_pages(vm)?, [3]);
    vm.sh(&write(2 * 4096, 4096))?;
    assert_eq!(bad_pages(vm)?, [3]);
    vm.sh(&write(3 * 4096, 4096))?;
    assert_eq!(bad_pages(vm)?, NONE);
    assert_eq!(vm.text(BADBLOCKS)?, "");
    vm.sh("pmem-guest verify /mnt/a/x 32768 5; pmem-guest mmap-verify /mnt/a/x 32768 5")?;
    // And a page of it that is mapped as others are.
    vm.sh("pmem-guest mmap-msync /mnt/a/x 32768 6; pmem-guest verify /mnt/a/x 32768 6")?;
    vm.sh("umount /mnt/a")?;
    Ok(())
}

fn a_page_of_a_file_is_bad(vm: &Vm, mkfs: &str) -> Result<()> {
    let first = file(vm, LOAD, mkfs)?;
    let bad = first + 25;
    inject(vm, &format!("{bad}"))?;
    recover(vm)?;
    unload(vm)
}

#[test]
fn a_page_of_an_ext4_file_is_bad() -> Result<()> {
    boot(stock()?, |vm| a_page_of_a_file_is_bad(vm, MKFS_EXT4))
}

#[test]
fn a_page_of_an_xfs_file_is_bad() -> Result<()> {
    boot(stock()?.module("xfs"), |vm| {
        a_page_of_a_file_is_bad(vm, MKFS_XFS)
    })
}

/// The kernel is told that the memory of a page has failed that two processes have mapped.
fn memory_fails(vm: &Vm, params: &str, mkfs: &str) -> Result<()> {
    let first = file(vm, params, mkfs)?;
    assert_eq!(
        end_of(vm, "pmem-guest poison /mnt/a/x 3")?,
        End::Signal(SIGBUS)
    );
    assert_eq!(vm.text(BADBLOCKS)?, format!("{} 8\n", first + 24));
    recover(vm)?;

    // The file is gone, and its page with it; it is made good by who writes it next.
    vm.sh("mount -o dax=always /dev/pmem0 /mnt/a")?;
    let first = first_sector(vm)?;
    assert_eq!(
        end_of(vm, "pmem-guest poison /mnt/a/x 5")?,
        End::Signal(SIGBUS)
    );
    vm.sh("rm /mnt/a/x; umount /mnt/a")?;
    assert_eq!(vm.text(BADBLOCKS)?, format!("{} 8\n", first + 40));
    vm.sh("blkdiscard -f -z /dev/pmem0")?;
    assert_eq!(vm.text(BADBLOCKS)?, "");
    unload(vm)?;
    load(vm, params)?;
    assert_eq!(bad_sectors(vm)?, NONE);
    Ok(())
}

#[test]
fn memory_of_an_ext4_file_fails() -> Result<()> {
    boot(stock()?, |vm| memory_fails(vm, LOAD, MKFS_EXT4))
}

/// The disk does not begin where the struct pages do.
#[test]
fn memory_fails_with_struct_pages_on_the_range() -> Result<()> {
    boot(stock()?, |vm| {
        let params = format!("{LOAD} pmem_memmap=dev");
        memory_fails(vm, &params, MKFS_EXT4)
    })
}

#[test]
fn memory_of_an_xfs_file_fails() -> Result<()> {
    boot(stock()?.module("xfs"), |vm| {
        memory_fails(vm, LOAD, MKFS_XFS)
    })
}

/// XFS is told, and looks up whose memory it was: without its superblock it shuts down.
#[test]
fn memory_of_the_xfs_superblock_fails() -> Result<()> {
    let machine = stock()?.module("xfs").module("hwpoison_inject");
    boot_dirty(machine, |vm| {
        file(vm, LOAD, MKFS_XFS)?;
        vm.try_sh("echo 0x100000 >/sys/kernel/debug/hwpoison/corrupt-pfn")?;
        assert_eq!(vm.text(BADBLOCKS)?, "0 8\n");
        let log = vm.dmesg()?;
        ensure!(
            log.contains("XFS (pmem0)") && log.contains("Shutting down filesystem"),
            "XFS did not notice: {log}"
        );
        ensure!(
            end_of(vm, "touch /mnt/a/y")? != End::Exit(0),
            "a file was made on it"
        );
        // The disk lives.
        vm.sh(
            "umount /mnt/a; dd if=/dev/pmem0 of=/dev/null bs=4k skip=1 iflag=direct 2>/dev/null",
        )?;
        vm.sh(&format!("wipefs -a /dev/pmem0 || true; blkdiscard -f -z /dev/pmem0; {MKFS_XFS}; mount /dev/pmem0 /mnt/a; umount /mnt/a"))?;
        assert_eq!(vm.text(BADBLOCKS)?, "");
        unload(vm)
    })
}
