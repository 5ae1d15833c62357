// SPDX-License-Identifier: GPL-2.0-only

//! That a recording has all that CPUs do to memory, as they do it.

use anyhow::{ensure, Context, Result};
use pmem_trace::domain::{Domain, Rules};
use pmem_trace::record::{Bytes, Event, Fence, How, Log, WriteBack, LINE};
use std::fs;
use std::path::Path;
use vm_tests::{boot, load, stock, Persistent, Random, MIB, UPPER};
use xtask::vm::Vm;

/// The first physical address of BAR 0.
fn place(vm: &Vm) -> Result<u64> {
    let text = vm.text(&format!("/sys/bus/pci/devices/{}/resource", vm.bar(0)))?;
    let line = text.lines().nth(2).context("there is no BAR 2")?;
    let start = line.split_whitespace().next().unwrap_or_default();
    Ok(u64::from_str_radix(start.trim_start_matches("0x"), 16)?)
}

/// A CPU that executes the programs of `pmem-guest access`, on memory that begins with `image`.
struct Cpu {
    start: u64,
    image: Vec<u8>,
    values: Random,
    events: Vec<Event>,
}

impl Cpu {
    fn new(start: u64, image: Vec<u8>) -> Self {
        Self {
            start,
            image,
            values: Random::new(1),
            events: Vec::new(),
        }
    }

    /// Stores in as many pieces as there are pages.
    fn store(&mut self, at: usize, bytes: &[u8], how: How) {
        let (head, tail) = bytes.split_at(bytes.len().min(4096 - at % 4096));
        self.image[at..at + bytes.len()].copy_from_slice(bytes);
        for (at, bytes) in [(at, head), (at + head.len(), tail)] {
            if !bytes.is_empty() {
                self.events.push(Event::Store {
                    cpu: 0,
                    address: self.start + at as u64,
                    bytes: Bytes::new(bytes).unwrap(),
                    how,
                });
            }
        }
    }

    fn word(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.image[at..at + 8].try_into().unwrap())
    }

    fn fence(&mut self, kind: Fence) {
        self.events.push(Event::Fence { cpu: 0, kind });
    }

    fn write_back(&mut self, at: usize, how: WriteBack) {
        let line = (self.start + at as u64) / LINE * LINE;
        self.events.push(Event::WriteBack { cpu: 0, line, how });
    }

    fn execute(&mut self, name: &str, at: usize) {
        if name == "mark" {
            let value = at as u8;
            self.events.push(Event::Mark { cpu: 0, value });
            return;
        }
        let value = self.values.next();
        let bytes = value.to_le_bytes();
        let old = match name {
            "add" | "add-unlocked" | "xadd" | "cmpxchg" => self.word(at),
            _ => 0,
        };
        let (cached, past) = (How::Cached, How::NonTemporal);
        let twice = [bytes, bytes].concat();
        match name {
            "store1" => self.store(at, &bytes[..1], cached),
            "store2" => self.store(at, &bytes[..2], cached),
            "store4" => self.store(at, &bytes[..4], cached),
            "store8" => self.store(at, &bytes, cached),
            "store16" => self.store(at, &twice, cached),
            "movbe" => self.store(at, &value.to_be_bytes(), cached),
            "movnti4" => self.store(at, &bytes[..4], past),
            "movnti" => self.store(at, &bytes, past),
            "movntdq" => self.store(at, &twice, past),
            "vmovntdq" => {
                self.store(at, &twice, past);
                self.store(at + 16, &twice, past);
            }
            "add-unlocked" => self.store(at, &old.wrapping_add(value).to_le_bytes(), cached),
            "add" | "xadd" => {
                self.fence(Fence::Locked);
                self.store(at, &old.wrapping_add(value).to_le_bytes(), cached);
            }
            "xchg" => {
                self.fence(Fence::Locked);
                self.store(at, &bytes, cached);
            }
            "cmpxchg" => {
                self.fence(Fence::Locked);
                // What is not replaced is stored once more.
                let new = if old == 0 { value } else { old };
                self.store(at, &new.to_le_bytes(), cached);
            }
            "stosq" => (0..8).for_each(|n| self.store(at + 8 * n, &bytes, cached)),
            "movsb" => (0..32).for_each(|n| self.store(at + n, &bytes[n % 8..][..1], cached)),
            "clwb" => self.write_back(at, WriteBack::Clwb),
            "clflushopt" => self.write_back(at, WriteBack::Clflushopt),
            "clflush" => self.write_back(at, WriteBack::Clflush),
            "sfence" => self.fence(Fence::Sfence),
            "mfence" => self.fence(Fence::Mfence),
            "cpuid" => self.fence(Fence::Serializing),
            name if name.starts_with("load") => {}
            other => panic!("no instruction {other}"),
        }
    }
}

/// Runs `program`, whose words are `INSTRUCTION@OFFSET`, in the guest and on a CPU of the test's own.
fn execute(vm: &Vm, cpu: &mut Cpu, file: &str, program: &str) -> Result<()> {
    let words = program.split_whitespace();
    let accesses: Vec<String> = words.clone().map(|word| format!("'{word}*1'")).collect();
    let len = cpu.image.len();
    vm.sh(&format!(
        "pmem-guest access {file} {len} {}",
        accesses.join(" ")
    ))?;
    for word in words {
        let (name, at) = word.split_once('@').context("no place")?;
        cpu.execute(name, at.parse()?);
    }
    Ok(())
}

fn read(log: &Path) -> Result<Vec<Event>> {
    let events: std::io::Result<_> = Log::open(log)?.collect();
    Ok(events?)
}

/// Fails unless `events` are the expected ones. In between, the kernel may have executed fences as well.
fn compare(events: &[Event], expected: &[Event]) -> Result<()> {
    let mut left = expected.iter();
    let mut next = left.next();
    for (n, event) in events.iter().enumerate() {
        if Some(event) == next {
            next = left.next();
        } else {
            ensure!(
                matches!(event, Event::Fence { .. }),
                "event {n} is {event:?}, not {next:?}"
            );
        }
    }
    ensure!(next.is_none(), "{next:?} is missing");
    Ok(())
}

/// Has the image what all stores of the log make of it, in their order.
fn replay(image: &mut [u8], start: u64, events: &[Event]) {
    for event in events {
        if let Event::Store { address, bytes, .. } = event {
            let at = (address - start) as usize;
            image[at..at + bytes.len()].copy_from_slice(bytes);
        }
    }
}

/// Says where two images differ first.
fn same(what: &str, is: &[u8], wanted: &[u8]) -> Result<()> {
    ensure!(is.len() == wanted.len(), "{what}: {} bytes", is.len());
    let first = is.iter().zip(wanted).position(|(a, b)| a != b);
    let count = is.iter().zip(wanted).filter(|(a, b)| a != b).count();
    ensure!(
        first.is_none(),
        "{what}: {count} bytes differ, the first at {first:#x?}"
    );
    Ok(())
}

/// A program stores in all ways that a CPU has, writes back and fences, and exactly that is recorded, with the values.
/// If one were not, a driver that omits it would pass, or one that does it would fail.
#[test]
fn each_instruction_is_recorded_as_it_is() -> Result<()> {
    const PROGRAM: &str = "
        mark@1 store1@5 store2@6 store2@71 store4@136 store4@202 store8@256 store8@317 mark@2
        store16@384 store16@456 movbe@512 movnti@576 movnti@645 movnti4@712 movntdq@768 vmovntdq@832
        clwb@256 clwb@319 clflushopt@832 clflush@4095 sfence@0 mfence@0 cpuid@0 mark@255
        add-unlocked@256 add@256 add@1020 xadd@1088 xadd@1088 xchg@1152 cmpxchg@1216 cmpxchg@1216 cmpxchg@1222
        stosq@1280 stosq@1350 movsb@1473 load8@1280 load16@1350 clwb@1280 sfence@0
        store8@4092 store16@8184 movnti@12283 stosq@16380 movsb@20470 clwb@4096 clwb@4095 mark@0
    ";
    let memory = Persistent::new(MIB)?;
    let machine = stock()?.upper(0).bar(&memory).cpus(1).record_writes();
    boot(machine, |vm| {
        let device = format!("/sys/bus/pci/devices/{}", vm.bar(0));
        vm.sh(&format!("echo 1 >{device}/enable"))?;
        let start = place(vm)?;
        let mut image = vec![0; MIB as usize];
        // Mapped uncached, and write-combining: it makes no difference to QEMU.
        for file in ["resource2", "resource2_wc"] {
            let mut cpu = Cpu::new(start, image.clone());
            vm.record(start..start + MIB)?;
            execute(vm, &mut cpu, &format!("{device}/{file}"), PROGRAM)?;
            let events = read(&vm.recorded()?)?;
            compare(&events, &cpu.events).context(file)?;
            replay(&mut image, start, &events);
            same("the log", &image, &cpu.image)?;
            same("the host's file", &fs::read(memory.path())?, &image)?;
        }

        // What is beside the range is not recorded; what is half in it is, by half.
        vm.record(start + 4096..start + 8192)?;
        vm.sh(&format!(
            "pmem-guest access {device}/resource2 {MIB} \
             store8@4088*1 store8@4092*1 clwb@4095*1 store8@8188*1 clwb@8191*1 clwb@8192*1 store8@8192*1"
        ))?;
        let mut values = Random::new(1);
        let mut bytes = || values.next().to_le_bytes();
        let (_, second, _, fourth) = (bytes(), bytes(), bytes(), bytes());
        let store = |at, bytes| Event::Store {
            cpu: 0,
            address: start + at,
            bytes: Bytes::new(bytes).unwrap(),
            how: How::Cached,
        };
        let expected = [
            store(4096, &second[4..]),
            store(8188, &fourth[..4]),
            Event::WriteBack {
                cpu: 0,
                line: start + 8128,
                how: WriteBack::Clwb,
            },
        ];
        compare(&read(&vm.recorded()?)?, &expected)
    })
}

/// The pages of a mapped file need not be beside each other: each part of a store is where its page is.
fn from_page_to_page(events: &[Event]) -> Result<()> {
    let value = Random::new(1).next().to_le_bytes();
    let (head, tail) = value.split_at(4);
    let find = |part: &[u8]| {
        events.iter().find_map(|event| match event {
            Event::Store { address, bytes, .. } if **bytes == *part => Some(*address),
            _ => None,
        })
    };
    let head = find(head).context("the head of the store is not in the log")?;
    let tail = find(tail).context("the tail of the store is not in the log")?;
    ensure!(
        (head % 4096, tail % 4096) == (4092, 0) && tail != head + 4,
        "a store is at {head:#x} and {tail:#x}"
    );
    Ok(())
}

/// What a file system, programs and the driver do to persistent memory is all in the log: a replay of the stores makes
/// the host's file. And when all is quiet, each store is durable: by the rules, the file is what a power failure leaves.
#[test]
fn a_disk_is_what_its_log_says() -> Result<()> {
    const SIZE: u64 = 64 * MIB;
    const DAX: &str = "a file system with DAX";
    let memory = Persistent::new(SIZE)?;
    let machine = stock()?.persistent(&memory).cpus(1).record_writes();
    boot(machine, |vm| {
        load(vm, &format!("pmem_start=4G pmem_size={SIZE}B"))?;
        for (what, script) in [
            (
                "raw writes",
                "pmem-guest mark 1
                 pmem-guest fill /tmp/x 200000 7
                 dd if=/tmp/x of=/dev/pmem0 bs=512 seek=3 count=300 oflag=direct 2>/dev/null
                 dd if=/tmp/x of=/dev/pmem0 bs=4096 seek=7 conv=fsync 2>/dev/null
                 pmem-guest mark 2",
            ),
            (
                DAX,
                "mkfs.ext4 -q -b 4096 /dev/pmem0
                 mount -o dax=always /dev/pmem0 /mnt
                 pmem-guest mark 1
                 pmem-guest fill /mnt/a 300001 1
                 pmem-guest mmap-msync /mnt/b 200001 2
                 pmem-guest mmap-sync /mnt/c 100001 3
                 pmem-guest fill /mnt/e 8192 4
                 xfs_io -c 'finsert 4096 4096' /mnt/e
                 dd if=/tmp/x of=/mnt/e bs=4096 count=1 seek=1 conv=notrunc 2>/dev/null
                 pmem-guest access /mnt/e 12288 'store8@4092*1'
                 truncate -s 5000 /mnt/a
                 mv /mnt/b /mnt/d
                 rm /mnt/c
                 umount /mnt
                 pmem-guest mark 2",
            ),
        ] {
            vm.sh("sync")?;
            let mut image = fs::read(memory.path())?;
            let mut durable = image.clone();
            vm.record(UPPER..UPPER + SIZE)?;
            vm.sh(script).context(what)?;
            let events = read(&vm.recorded()?)?;
            let now = fs::read(memory.path())?;
            let marks: Vec<u8> = events
                .iter()
                .filter_map(|event| match event {
                    Event::Mark { value, .. } => Some(*value),
                    _ => None,
                })
                .collect();
            ensure!(marks == [1, 2], "{what}: marks {marks:?}");
            replay(&mut image, UPPER, &events);
            same(&format!("{what}: the log"), &image, &now)?;

            let mut domain = Domain::new(UPPER..UPPER + SIZE, Rules { strict: true });
            for event in &events {
                domain.apply(event)?;
            }
            for patch in domain.durable() {
                patch.apply(&mut durable, UPPER);
            }
            same(&format!("{what}: what is durable"), &durable, &now)?;
            if what == DAX {
                from_page_to_page(&events)?;
            }
        }
        Ok(())
    })
}
