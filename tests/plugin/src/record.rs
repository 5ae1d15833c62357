// SPDX-License-Identifier: GPL-2.0-only

//! Stores, write-backs, fences and marks, in the order in which CPUs that take turns execute them.

use pmem_trace::instruction::{effect, Action, Memory, Port};
use pmem_trace::mark::Marks;
use pmem_trace::record::{How, WriteBack};
use pmem_trace::{paging, Place, Recorder, Reply, Request};
use qemu_plugin::error::{Error, Result};
use qemu_plugin::{
    qemu_plugin_get_registers, CallbackFlags, Instruction, MemRW, MemValue, MemoryInfo,
    RegisterDescriptor, VCPUIndex,
};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

static RECORDER: Recorder = Recorder::new();

static MARKS: Marks = Marks::new();

/// The guest's memory, if there is something to record.
static RAM: OnceLock<File> = OnceLock::new();

/// The CPUs' registers, which are the same for all.
static REGISTERS: OnceLock<BTreeMap<String, RegisterDescriptor<'static>>> = OnceLock::new();

/// Bytes of the longest instruction.
const LONGEST: usize = 15;

/// The smallest page.
const PAGE: u64 = 4096;

/// Allows for recordings. `ram` is the file that is the guest's memory.
pub fn enable(ram: &str) -> Result<()> {
    let file = File::open(ram)?;
    RAM.set(file)
        .map_err(|_| Error::BoxedError("the argument ram=FILE is there twice".into()))
}

/// A CPU is there, which has registers.
pub fn init() -> Result<()> {
    if RAM.get().is_some() && REGISTERS.get().is_none() {
        let registers = qemu_plugin_get_registers()?.into_iter();
        let registers = registers.map(|register| (register.name.clone(), register));
        // Another CPU may have been faster.
        REGISTERS.set(registers.collect()).ok();
    }
    Ok(())
}

pub fn answer(request: Request) -> Reply {
    match RAM.get() {
        Some(_) => RECORDER.answer(request),
        None => Reply::Refused("the argument ram=FILE is missing".into()),
    }
}

/// Has QEMU call when `instruction` does something that can be recorded.
pub fn instrument(instruction: &Instruction<'_>) {
    if RAM.get().is_none() {
        return;
    }
    let mut bytes = [0; LONGEST];
    let len = instruction.read_data(&mut bytes);
    let effect = effect(&bytes[..len.min(LONGEST)], instruction.vaddr());
    let how = effect.stores;
    instruction.register_memory_access_callback(
        move |cpu, access, address| store(cpu, &access, address, how),
        MemRW::QEMU_PLUGIN_MEM_W,
    );
    let reads = CallbackFlags::QEMU_PLUGIN_CB_R_REGS;
    match effect.action {
        None => {}
        Some(Action::Fence(kind)) => instruction.register_execute_callback(move |cpu| {
            if RECORDER.is_recording() {
                RECORDER.fence(cpu, kind);
            }
        }),
        Some(Action::WriteBack(how, memory)) => instruction
            .register_execute_callback_flags(move |cpu| write_back(cpu, how, memory), reads),
        Some(Action::Out(port, bytes)) => {
            instruction.register_execute_callback_flags(move |cpu| out(cpu, port, bytes), reads);
        }
    }
}

/// A store to the virtual `address`.
fn store(cpu: VCPUIndex, access: &MemoryInfo<'_>, address: u64, how: How) {
    if !RECORDER.is_recording() {
        return;
    }
    let len = 1u64 << access.size_shift();
    let place = |address| Place {
        address,
        physical: access.hwaddr(address).map(|physical| physical.hwaddr()),
    };
    let first = place(address);
    let in_page = len.min(PAGE - address % PAGE);
    let is_ours = |place: Place, len| {
        place
            .physical
            .is_none_or(|start| RECORDER.may_have(start, len))
    };
    // Nearly all stores of a guest are elsewhere.
    if in_page == len && !is_ours(first, len) {
        return;
    }
    let bytes = value(access);
    let (head, tail) = bytes.split_at((in_page as usize).min(bytes.len()));
    RECORDER.store(cpu, first, head, how);
    if !tail.is_empty() {
        // The next page may be anywhere.
        let rest = place(address.wrapping_add(in_page));
        RECORDER.store(cpu, rest, tail, how);
    }
}

/// The bytes that are stored.
fn value(access: &MemoryInfo<'_>) -> Vec<u8> {
    let mut bytes = match access.value() {
        MemValue::U8(value) => value.to_le_bytes().to_vec(),
        MemValue::U16(value) => value.to_le_bytes().to_vec(),
        MemValue::U32(value) => value.to_le_bytes().to_vec(),
        MemValue::U64(value) => value.to_le_bytes().to_vec(),
        MemValue::U128(value) => value.to_le_bytes().to_vec(),
    };
    // As of `movbe`.
    if access.big_endian() {
        bytes.reverse();
    }
    bytes
}

fn write_back(cpu: VCPUIndex, how: WriteBack, memory: Memory) {
    if !RECORDER.is_recording() {
        return;
    }
    let address = memory.address(register);
    let place = Place {
        address: address.unwrap_or(0),
        physical: address.and_then(physical),
    };
    RECORDER.write_back(cpu, place, how);
}

/// The physical address of a virtual one of the CPU that asks, by its page tables.
fn physical(address: u64) -> Option<u64> {
    let ram = RAM.get()?;
    let read = |at| {
        let mut entry = [0; 8];
        ram.read_exact_at(&mut entry, at).ok()?;
        Some(u64::from_le_bytes(entry))
    };
    paging::translate(register("cr3")?, register("cr4")?, address, read).ok()
}

fn out(cpu: VCPUIndex, port: Port, bytes: u8) {
    if !RECORDER.is_recording() {
        return;
    }
    let port = match port {
        Port::Immediate(port) => Some(port.into()),
        Port::Dx => register("rdx").map(|value| value as u16),
    };
    let mark = || MARKS.out(port?, register("rax")? as u32, bytes);
    if let Some(value) = mark() {
        RECORDER.mark(cpu, value);
    }
}

/// The value of a register of the CPU that asks.
fn register(name: &str) -> Option<u64> {
    let bytes = REGISTERS.get()?.get(name)?.read().ok()?;
    let mut value = [0; 8];
    let len = bytes.len().min(value.len());
    value[..len].copy_from_slice(&bytes[..len]);
    Some(u64::from_le_bytes(value))
}
