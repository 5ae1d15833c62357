// SPDX-License-Identifier: GPL-2.0-only

//! Small programs: shared mappings of DAX files, and users of memory.

use std::fs::{File, OpenOptions};
use std::hint::black_box;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use pmem_guest::Random;
use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::fs::{fallocate, FallocateFlags, OFlags};
use serde_json::json;

use crate::agent;
use crate::aligned::Aligned;
use crate::calls;
use crate::direct;
use crate::faults;
use crate::mapping::{Instruction, Mapping};
use crate::mark::Marks;
use crate::pci;
use crate::steps;
use crate::timing;
use crate::virtio;
use crate::window;
use crate::writers;

const USAGE: &str = "\
usage: pmem-guest PROGRAM ...
  serve                             do what the host asks for, as a service of an installed system
  fill FILE BYTES SEED              write pseudo-random bytes and fsync
  mmap-sync FILE BYTES SEED         store through MAP_SYNC, write back cache lines, no system call
  mmap-msync FILE BYTES SEED        store through a shared mapping, then msync
  verify FILE BYTES SEED            compare the file, by read(2), with what SEED makes
  mmap-verify FILE BYTES SEED       compare the file, by a mapping, with what SEED makes
  pmd FILE                          map 2 MiB, touch every page, print the faults taken, as JSON
  odirect-from-dax FROM TO BYTES    write FROM's mapping to TO with O_DIRECT
  odirect-into-dax FROM TO BYTES    read FROM with O_DIRECT into a mapping of TO
  direct-write DISK BYTES SEED      write pseudo-random bytes with O_DIRECT, in requests and buffers of odd shapes
  direct-verify DISK BYTES SEED     compare the disk with what SEED makes, in other requests and buffers
  odirect-through DISK MEMORY BYTES SEED
                                    read DISK with O_DIRECT into memory that a file gives who maps it, compare that with
                                    what SEED makes, and write what SEED+1 makes from there to DISK, behind it
  bench-mmap FILE BYTES read|write SECONDS
                                    random 4 KiB accesses through a mapping, as JSON
  bench-bar RESOURCE BYTES read|write BLOCK MILLISECONDS
                                    copy blocks at random places of a mapped PCI BAR, word by word, as JSON
  calls DISK read|write|dsync|fsync BYTES COUNT
                                    make system calls without the page cache, each marked for QEMU's plugin
  hog BYTES WORD UNTIL              take memory, store WORD everywhere in it, keep it until the file UNTIL is there,
                                    and look whether the WORDs are, too
  compare FILE DISK BYTES           compare the first BYTES of both
  blocks-begin LOG                  say in LOG that blocks are zero
  blocks-write DISK LOG COUNT THREADS SEED
                                    write, zero and discard COUNT blocks until killed, and say so in LOG
  blocks-check DISK LOG COUNT [torn]
                                    after a power loss, compare them with LOG; `torn` allows for a mix of old and new
  blocks-race DISK COUNT SECONDS    write, discard and read COUNT blocks on many threads, and look what is read
  files-write DIR LOG SEED          write, sync and remove files until killed, and say so in LOG
  files-check DIR LOG               after a power loss, compare them with LOG
  differing FILE DISK BLOCKS        print the numbers of blocks that are not the same in both, or cannot be read
  census DISK WORD                  count pages that are zero, have a WORD, or neither, as JSON
  slabs                             have all slab caches give back what they keep for later, and print /proc/slabinfo
  poll FILE SECONDS                 wait until a file in sysfs says that it has changed, and print it
  mmap-read FILE PAGE               read a page of a mapping
  access FILE BYTES INSTRUCTION@OFFSET*COUNT ...
                                    execute instructions on a mapping: load1 to load8, store1 to store8, load16,
                                    store16, movbe, movnti, movnti4, movntdq, vmovntdq, add-unlocked, add, xadd, xchg,
                                    cmpxchg, stosq, movsb, clwb, clflushopt, clflush, sfence, mfence, cpuid;
                                    mark@BYTE*COUNT says BYTE to a host that records the machine
  mark BYTE                         say BYTE to a host that records the machine
  functions ADDRESS ...             print which of the kernel's functions these are in, a line each
  poison FILE PAGE                  say that the memory of a page of a mapping has failed
  read-pages FILE                   print which pages of 4 KiB cannot be read by read(2)
  read-sectors DISK COUNT           print which of the first sectors cannot be read with O_DIRECT
  script FILE [marks]               do the steps in FILE, and tell a recorder where it is
  tree DIR                          print all files of DIR, as JSON
  fail-nth N CALL ...               have the Nth allocation of a system call fail, and print whether there was one and the
                                    call's error, as JSON. Calls: insmod FILE PARAMETERS, rmmod NAME, write FILE TEXT,
                                    read FILE, disk-write DISK OFFSET BYTES SEED, disk-read DISK OFFSET BYTES SEED,
                                    disk-discard DISK OFFSET BYTES, disk-sync DISK, mount DISK DIR TYPE OPTIONS,
                                    umount DIR
  slot-pull PORT                    pull out what is in the slot behind a PCIe port of QEMU's
  virtio-status PCI-DEVICE          print the status of a virtio device
  virtio-set PCI-DEVICE FIELD=VALUE ...
                                    write its fields behind its driver's back: status, queue, enable, desc, driver,
                                    device, notify
  time-write ATTRIBUTE TEXT         write an attribute, and print how long that took, as JSON
  time-load MODULE PARAMETERS FILE  load a module, and print how long it took until there was FILE, and how much memory
                                    it took, as JSON
";

const PAGE: usize = 4096;
const HUGE: usize = 2 << 20;

/// Runs the program that `args` name.
pub fn run(args: &[String]) -> io::Result<()> {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        ["serve"] => agent::serve(),
        ["fill", file, len, seed] => fill(file, number(len)?, number(seed)? as u64),
        ["mmap-sync", file, len, seed] => store(file, number(len)?, number(seed)? as u64, true),
        ["mmap-msync", file, len, seed] => store(file, number(len)?, number(seed)? as u64, false),
        ["verify", file, len, seed] => {
            let mut data = Vec::new();
            File::open(file)?.read_to_end(&mut data)?;
            verify(&data, number(len)?, number(seed)? as u64)
        }
        ["mmap-verify", file, len, seed] => {
            let len = number(len)?;
            let file = OpenOptions::new().read(true).write(true).open(file)?;
            let have = file.metadata()?.len();
            if have != len as u64 {
                return Err(io::Error::other(format!("{have} bytes, not {len}")));
            }
            verify(
                Mapping::new(&file, len, false)?.bytes(),
                len,
                number(seed)? as u64,
            )
        }
        ["pmd", file] => pmd(file),
        ["odirect-from-dax", from, to, len] => odirect(from, to, number(len)?),
        ["odirect-into-dax", from, to, len] => direct::into_mapping(from, to, number(len)?),
        ["odirect-through", disk, memory, len, seed] => {
            direct::through(disk, memory, number(len)?, number(seed)? as u64)
        }
        ["direct-write", disk, len, seed] => {
            direct::write(disk, number(len)?, number(seed)? as u64)
        }
        ["direct-verify", disk, len, seed] => {
            direct::verify(disk, number(len)?, number(seed)? as u64)
        }
        ["bench-bar", resource, len, op @ ("read" | "write"), block, time] => window::bench(
            resource,
            number(len)?,
            *op == "write",
            number(block)?,
            Duration::from_millis(number(time)? as u64),
        ),
        ["bench-mmap", file, len, op @ ("read" | "write"), seconds] => bench(
            file,
            number(len)?,
            *op == "write",
            Duration::from_secs(number(seconds)? as u64),
        ),
        ["calls", disk, op, len, count] => calls::repeat(disk, op, number(len)?, number(count)?),
        ["hog", len, word, until] => hog(number(len)?, number(word)? as u64, until),
        ["compare", file, disk, len] => compare(file, disk, number(len)?),
        ["blocks-begin", log] => writers::blocks_begin(log),
        ["blocks-write", disk, log, count, threads, seed] => writers::blocks_write(
            disk,
            log,
            number(count)? as u64,
            number(threads)? as u64,
            number(seed)? as u64,
        ),
        ["blocks-check", disk, log, count] => {
            writers::blocks_check(disk, log, number(count)? as u64, false)
        }
        ["blocks-check", disk, log, count, "torn"] => {
            writers::blocks_check(disk, log, number(count)? as u64, true)
        }
        ["blocks-race", disk, count, seconds] => writers::blocks_race(
            disk,
            number(count)? as u64,
            Duration::from_secs(number(seconds)? as u64),
        ),
        ["files-write", dir, log, seed] => writers::files_write(dir, log, number(seed)? as u64),
        ["files-check", dir, log] => writers::files_check(dir, log),
        ["differing", file, disk, blocks] => differing(file, disk, number(blocks)?),
        ["census", disk, word] => census(disk, number(word)? as u64),
        ["slabs"] => slabs(),
        ["poll", file, seconds] => poll_file(file, number(seconds)?),
        ["mmap-read", file, page] => {
            black_box(map(file)?.bytes()[number(page)? * PAGE]);
            Ok(())
        }
        ["access", file, len, accesses @ ..] => access(file, number(len)?, accesses),
        ["mark", value] => Marks::open()?.mark(byte(value)?),
        ["functions", addresses @ ..] => functions(addresses),
        ["poison", file, page] => {
            let (mut mapping, at) = (map(file)?, number(page)? * PAGE);
            mapping.poison(at, PAGE)?;
            // Rust's own handler of SIGBUS lets the first one pass.
            black_box(mapping.bytes()[at]);
            Ok(())
        }
        ["read-pages", file] => {
            let file = File::open(file)?;
            let pages = file.metadata()?.len().div_ceil(PAGE as u64) as usize;
            unreadable(&file, PAGE, pages)
        }
        ["read-sectors", disk, count] => {
            let disk = OpenOptions::new()
                .read(true)
                .custom_flags(OFlags::DIRECT.bits() as i32)
                .open(disk)?;
            unreadable(&disk, 512, number(count)?)
        }
        ["script", file] => steps::run(file, false),
        ["script", file, "marks"] => steps::run(file, true),
        ["tree", dir] => steps::tree(dir),
        ["fail-nth", nth, call @ ..] => faults::fail_nth(number(nth)?, call),
        ["slot-pull", port] => pci::pull(port),
        ["virtio-status", device] => virtio::status(device),
        ["virtio-set", device, fields @ ..] => virtio::set(device, fields),
        ["time-write", attribute, text] => timing::write(attribute, text),
        ["time-load", module, params, file] => timing::load(module, params, file),
        ["help" | "--help" | "-h"] => {
            print!("{USAGE}");
            Ok(())
        }
        _ => Err(io::Error::other(format!("not understood\n{USAGE}"))),
    }
}

fn number(text: &str) -> io::Result<usize> {
    text.parse()
        .map_err(|error| io::Error::other(format!("{text:?} is not a number: {error}")))
}

fn byte(text: &str) -> io::Result<u8> {
    text.parse()
        .map_err(|error| io::Error::other(format!("{text:?} is not a byte: {error}")))
}

fn create(path: &str) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
}

fn fill(path: &str, len: usize, seed: u64) -> io::Result<()> {
    let mut data = vec![0; len];
    Random::new(seed).bytes(&mut data);
    let file = create(path)?;
    file.write_all_at(&data, 0)?;
    file.sync_all()
}

fn store(path: &str, len: usize, seed: u64, sync: bool) -> io::Result<()> {
    let file = create(path)?;
    fallocate(&file, FallocateFlags::empty(), 0, len as u64)?;
    let mut mapping = Mapping::new(&file, len, sync)?;
    Random::new(seed).bytes(mapping.bytes_mut());
    if sync {
        mapping.persist();
        Ok(())
    } else {
        mapping.msync()
    }
}

fn verify(data: &[u8], len: usize, seed: u64) -> io::Result<()> {
    let mut wanted = vec![0; len];
    Random::new(seed).bytes(&mut wanted);
    if data.len() != len {
        return Err(io::Error::other(format!("{} bytes, not {len}", data.len())));
    }
    match data.iter().zip(&wanted).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(at) => {
            let wrong = data.iter().zip(&wanted).filter(|(a, b)| a != b).count();
            Err(io::Error::other(format!(
                "{wrong} of {len} bytes are wrong, the first at {at}: {:#04x}, not {:#04x}",
                data[at], wanted[at]
            )))
        }
    }
}

/// Executes instructions on a mapping of the first `len` bytes, each as often as it says. What they store are the numbers
/// of [`Random`], one for each.
fn access(path: &str, len: usize, accesses: &[&str]) -> io::Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let mut mapping = Mapping::new(&file, len, false)?;
    let mut values = Random::new(1);
    for access in accesses {
        let parts = access
            .split_once('*')
            .and_then(|(access, count)| Some((access.split_once('@')?, count)));
        let Some(((name, at), count)) = parts else {
            return Err(io::Error::other(format!(
                "{access:?} is not INSTRUCTION@OFFSET*COUNT"
            )));
        };
        let count = number(count)?;
        if name == "mark" {
            let (marks, value) = (Marks::open()?, byte(at)?);
            for _ in 0..count {
                marks.mark(value)?;
            }
            continue;
        }
        let instruction = instruction(name)?;
        let at = number(at)?;
        for _ in 0..count {
            mapping.execute(instruction, at, values.next())?;
        }
    }
    Ok(())
}

fn instruction(name: &str) -> io::Result<Instruction> {
    Ok(match name {
        "load16" => Instruction::LoadVector,
        "store16" => Instruction::StoreVector,
        "movbe" => Instruction::StoreReversed,
        "movnti" => Instruction::StoreNonTemporal(8),
        "movnti4" => Instruction::StoreNonTemporal(4),
        "movntdq" => Instruction::StreamVector,
        "vmovntdq" => Instruction::StreamLongVector,
        "add-unlocked" => Instruction::AddUnlocked,
        "add" => Instruction::Add,
        "xadd" => Instruction::ExchangeAndAdd,
        "xchg" => Instruction::Exchange,
        "cmpxchg" => Instruction::CompareAndExchange,
        "stosq" => Instruction::StoreString,
        "movsb" => Instruction::CopyString,
        "clwb" => Instruction::WriteBack,
        "clflushopt" => Instruction::FlushWeakly,
        "clflush" => Instruction::Flush,
        "sfence" => Instruction::StoreFence,
        "mfence" => Instruction::Fence,
        "cpuid" => Instruction::Serialize,
        _ => match (name.strip_prefix("load"), name.strip_prefix("store")) {
            (Some(len), _) => Instruction::Load(number(len)?),
            (_, Some(len)) => Instruction::Store(number(len)?),
            _ => return Err(io::Error::other(format!("no instruction {name:?}"))),
        },
    })
}

/// Prints the functions of the kernel and its modules that have `addresses`, or the addresses themselves.
fn functions(addresses: &[&str]) -> io::Result<()> {
    /// The kernel's half of the address space.
    const KERNEL: u64 = 1 << 63;

    let hexadecimal = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).ok();
    let addresses: Vec<u64> = addresses
        .iter()
        .map(|text| {
            let wrong = || io::Error::other(format!("{text:?} is not an address"));
            hexadecimal(text).ok_or_else(wrong)
        })
        .collect::<io::Result<_>>()?;
    let text = std::fs::read_to_string("/proc/kallsyms")?;
    let symbol = |line| -> Option<(u64, &str, Option<&str>)> {
        let mut fields = str::split_whitespace(line);
        let (start, kind, name) = (fields.next()?, fields.next()?, fields.next()?);
        matches!(kind, "t" | "T" | "w" | "W").then_some((hexadecimal(start)?, name, fields.next()))
    };
    let mut symbols: Vec<_> = text.lines().filter_map(symbol).collect();
    // Of several with the same address the first one counts.
    symbols.sort_by_key(|&(start, ..)| start);
    symbols.dedup_by_key(|&mut (start, ..)| start);
    for address in addresses {
        let after = symbols.partition_point(|&(start, ..)| start <= address);
        let found = after.checked_sub(1).and_then(|at| symbols.get(at));
        match found.filter(|_| address >= KERNEL) {
            Some((start, name, None)) => println!("{name}+{:#x}", address - start),
            Some((start, name, Some(module))) => {
                println!("{name}+{:#x} {module}", address - start);
            }
            None => println!("{address:#x}"),
        }
    }
    Ok(())
}

/// Faults that needed no I/O, of this process.
fn faults() -> io::Result<u64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    // The second field is a name in parentheses that may hold spaces.
    stat.rsplit_once(')')
        .and_then(|(_, rest)| rest.split_whitespace().nth(7))
        .and_then(|field| field.parse().ok())
        .ok_or_else(|| io::Error::other("/proc/self/stat has no minflt"))
}

/// A mapping by pages takes 512 faults for 2 MiB; one by a PMD takes one.
fn pmd(path: &str) -> io::Result<()> {
    let file = create(path)?;
    // Twice the size, so that an aligned 2 MiB are in it wherever the mapping begins.
    fallocate(&file, FallocateFlags::empty(), 0, 2 * HUGE as u64)?;
    let mut mapping = Mapping::new(&file, 2 * HUGE, false)?;
    let address = mapping.address();
    let skip = address.next_multiple_of(HUGE) - address;
    faults()?;
    let before = faults()?;
    for page in mapping.bytes_mut()[skip..skip + HUGE].chunks_mut(PAGE) {
        page[0] = 1;
        black_box(&page);
    }
    let taken = faults()? - before;
    println!(
        "{}",
        json!({ "address": address, "skip": skip, "faults": taken })
    );
    Ok(())
}

fn odirect(from: &str, to: &str, len: usize) -> io::Result<()> {
    let from = OpenOptions::new().read(true).write(true).open(from)?;
    let mapping = Mapping::new(&from, len, false)?;
    let to = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .custom_flags(OFlags::DIRECT.bits() as i32)
        .open(to)?;
    to.write_all_at(mapping.bytes(), 0)?;
    to.sync_all()
}

fn bench(path: &str, len: usize, write: bool, time: Duration) -> io::Result<()> {
    let file = create(path)?;
    fallocate(&file, FallocateFlags::empty(), 0, len as u64)?;
    let mut mapping = Mapping::new(&file, len, false)?;
    // Faults are not what is measured.
    for page in mapping.bytes_mut().chunks_mut(PAGE) {
        page[0] = 1;
    }
    let pages = (len / PAGE) as u64;
    let mut random = Random::new(1);
    let mut buffer = [0u8; PAGE];
    let (mut ops, start) = (0u64, Instant::now());
    while start.elapsed() < time {
        for _ in 0..64 {
            let at = (random.next() % pages) as usize * PAGE;
            if write {
                mapping.bytes_mut()[at..at + PAGE].copy_from_slice(&buffer);
            } else {
                buffer.copy_from_slice(&mapping.bytes()[at..at + PAGE]);
            }
            black_box(&mut buffer);
        }
        ops += 64;
    }
    println!(
        "{}",
        json!({ "ops": ops, "seconds": start.elapsed().as_secs_f64() })
    );
    Ok(())
}

/// Takes memory, and is the first to go when there is none.
fn hog(len: usize, word: u64, until: &str) -> io::Result<()> {
    std::fs::write("/proc/self/oom_score_adj", "1000")?;
    let mut taken = Vec::new();
    for _ in 0..len / HUGE {
        taken.push(black_box(vec![word; HUGE / size_of::<u64>()]));
    }
    println!("ready");
    while !Path::new(until).exists() {
        std::thread::sleep(Duration::from_millis(20));
    }
    let wrong = taken.iter().flatten().filter(|&&found| found != word);
    match wrong.count() {
        0 => Ok(()),
        wrong => Err(io::Error::other(format!("{wrong} words have changed"))),
    }
}

/// Shrinks all slab caches. An open file of sysfs has an object, which goes a grace period after it is closed, and there is
/// a file for each cache: all of them are open until the objects are counted, so that as many are in use each time.
fn slabs() -> io::Result<()> {
    let mut caches = Vec::new();
    for cache in std::fs::read_dir("/sys/kernel/slab")? {
        let path = cache?.path().join("shrink");
        caches.push(OpenOptions::new().write(true).open(path)?);
    }
    // What was given to kfree_rcu() is free some time after the first.
    for _ in 0..3 {
        for cache in &caches {
            cache.write_all_at(b"1", 0)?;
        }
        std::thread::sleep(Duration::from_millis(300));
    }
    print!("{}", std::fs::read_to_string("/proc/slabinfo")?);
    Ok(())
}

/// Reads a disk from its start, past the page cache.
fn read_disk(path: &str, mut with: impl FnMut(&[u8]) -> io::Result<bool>) -> io::Result<()> {
    let disk = OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::DIRECT.bits() as i32)
        .open(path)?;
    let mut buffer = Aligned::new(1 << 20);
    let mut at = 0;
    loop {
        let len = disk.read_at(buffer.bytes_mut(), at)?;
        if len == 0 || !with(&buffer.bytes()[..len])? {
            return Ok(());
        }
        at += len as u64;
    }
}

fn compare(file: &str, disk: &str, len: usize) -> io::Result<()> {
    let mut file = File::open(file)?;
    let mut wanted = vec![0; 1 << 20];
    let mut left = len;
    let mut at = 0;
    read_disk(disk, |data| {
        let n = data.len().min(left);
        file.read_exact(&mut wanted[..n])?;
        if data[..n] != wanted[..n] {
            let differs = data.iter().zip(&wanted).position(|(a, b)| a != b);
            return Err(io::Error::other(format!(
                "they differ at {}",
                at + differs.unwrap_or(0)
            )));
        }
        (at, left) = (at + n, left - n);
        Ok(left > 0)
    })?;
    match left {
        0 => Ok(()),
        left => Err(io::Error::other(format!(
            "the disk ends {left} bytes before"
        ))),
    }
}

fn differing(file: &str, disk: &str, blocks: usize) -> io::Result<()> {
    let file = File::open(file)?;
    let disk = OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::DIRECT.bits() as i32)
        .open(disk)?;
    let (mut wanted, mut found) = (vec![0; PAGE], Aligned::new(PAGE));
    for block in 0..blocks {
        let at = (block * PAGE) as u64;
        file.read_exact_at(&mut wanted, at)?;
        if disk.read_exact_at(found.bytes_mut(), at).is_err() || found.bytes() != wanted {
            println!("{block}");
        }
    }
    Ok(())
}

/// All of a file, mapped.
fn map(path: &str) -> io::Result<Mapping> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let len = file.metadata()?.len();
    Mapping::new(&file, len as usize, false)
}

/// Says which of the first `count` units of `unit` bytes fail with EIO.
fn unreadable(file: &File, unit: usize, count: usize) -> io::Result<()> {
    let mut buffer = Aligned::new(unit);
    for i in 0..count {
        match file.read_at(buffer.bytes_mut(), (i * unit) as u64) {
            Ok(0) => return Err(io::Error::other(format!("it ends at {i}"))),
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => {
                println!("{i}");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Waits as `poll(2)` on an attribute is to be used: after it was read, and for `POLLPRI`.
fn poll_file(path: &str, seconds: usize) -> io::Result<()> {
    let mut file = File::open(path)?;
    file.read_to_end(&mut Vec::new())?;
    println!("ready");
    let mut fds = [PollFd::new(&file, PollFlags::PRI)];
    let timeout = Timespec {
        tv_sec: seconds as i64,
        tv_nsec: 0,
    };
    if poll(&mut fds, Some(&timeout))? == 0 {
        return Err(io::Error::other("it has not changed"));
    }
    print!("{}", std::fs::read_to_string(path)?);
    Ok(())
}

/// What each page of a disk has in it.
fn census(disk: &str, word: u64) -> io::Result<()> {
    let word = word.to_ne_bytes();
    let (mut zero, mut found, mut other) = (0u64, 0u64, 0u64);
    read_disk(disk, |data| {
        for page in data.chunks(PAGE) {
            if page.iter().all(|&byte| byte == 0) {
                zero += 1;
            } else if page.chunks_exact(word.len()).any(|chunk| chunk == word) {
                found += 1;
            } else {
                other += 1;
            }
        }
        Ok(true)
    })?;
    println!("{}", json!({ "zero": zero, "word": found, "other": other }));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A verification that accepts anything would hide every lost write.
    #[test]
    fn verify_sees_every_byte() {
        let mut data = vec![0; 100];
        Random::new(3).bytes(&mut data);
        assert!(verify(&data, 100, 3).is_ok());
        assert!(verify(&data, 100, 4).is_err());
        assert!(verify(&data[..99], 100, 3).is_err());
        for at in 0..data.len() {
            data[at] ^= 0x10;
            assert!(verify(&data, 100, 3).is_err(), "byte {at}");
            data[at] ^= 0x10;
        }
    }
}
