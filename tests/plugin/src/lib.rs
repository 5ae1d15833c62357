// SPDX-License-Identifier: GPL-2.0-only

//! A plugin for QEMU that sees each access of a guest's CPUs to memory, and has [`pmem_trace`] count or record them.
//!
//! ```text
//! qemu-system-x86_64 -accel tcg -plugin libpmem_plugin.so,socket=PATH
//! qemu-system-x86_64 -accel tcg,thread=single -plugin libpmem_plugin.so,socket=PATH,ram=FILE
//! ```
//!
//! QEMU shows the accesses of translated code, and those of helpers that act for an instruction as the CPU would:
//! strings, vectors (in pieces of 16 bytes) and atomic instructions, which are a load and a store. It does not show
//! those of `fxsave`, `xsave` and their counterparts, those of devices, and the CPU's own walks of page tables.
//!
//! With `ram=FILE` the plugin can record, too. The file is the guest's memory from the physical address 0 on, where its
//! page tables are: instructions that write lines back are nops to QEMU, which tells no physical address of theirs. The
//! values of stores are right if CPUs take turns: QEMU shows the operand of an atomic instruction, not what it stores,
//! where they do not.
//!
//! With `calls=PATH` instead it sees what system calls execute, and [`pmem_trace::calls`] counts that. A machine is
//! asked for one of both: to see all of it takes time.

#![forbid(unsafe_code)]

mod calls;
mod record;

use pmem_trace::{serve, Kind, Reply, Request, Watcher};
use qemu_plugin::error::{Error, Result};
use qemu_plugin::install::{Args, Info};
use qemu_plugin::plugin::{HasCallbacks, Register};
use qemu_plugin::{register, MemRW, MemoryInfo, PluginId, TranslationBlock, VCPUIndex};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

static WATCHER: Watcher = Watcher::new();

/// Whether system calls are what is counted.
static CALLS: AtomicBool = AtomicBool::new(false);

struct Plugin;

impl HasCallbacks for Plugin {
    fn on_vcpu_init(&mut self, _id: PluginId, _cpu: VCPUIndex) -> Result<()> {
        record::init()
    }

    fn on_translation_block_translate(
        &mut self,
        _id: PluginId,
        block: TranslationBlock<'_>,
    ) -> Result<()> {
        if CALLS.load(Ordering::Relaxed) {
            calls::watch(&block);
            return Ok(());
        }
        for instruction in block.instructions() {
            let pc = instruction.vaddr();
            // CPUs that execute the same instruction share what is called: it must not change what it captures.
            instruction.register_memory_access_callback(
                move |_cpu, access, address| note(pc, &access, address),
                MemRW::QEMU_PLUGIN_MEM_RW,
            );
            record::instrument(&instruction);
        }
        Ok(())
    }
}

/// An access by the instruction at `pc` to the virtual `address`.
fn note(pc: u64, access: &MemoryInfo<'_>, address: u64) {
    if !WATCHER.is_watching() {
        return;
    }
    let kind = match access.is_store() {
        true => Kind::Store,
        false => Kind::Load,
    };
    let size = 1 << access.size_shift();
    let physical = access.hwaddr(address).map(|physical| physical.hwaddr());
    WATCHER.note(kind, physical, size, pc);
}

fn answer(request: Request) -> Reply {
    match request {
        Request::Watch { .. } | Request::Report => WATCHER.answer(request),
        Request::Record { .. } | Request::EndRecord => record::answer(request),
    }
}

impl Register for Plugin {
    fn register(&mut self, _id: PluginId, args: &Args, _info: &Info) -> Result<()> {
        let argument = |name| {
            let mut raw = args.raw.iter();
            raw.find_map(|argument| argument.strip_prefix(name))
        };
        if let Some(socket) = argument("calls=") {
            CALLS.store(true, Ordering::Relaxed);
            return calls::serve(socket);
        }
        let socket = argument("socket=").ok_or_else(|| {
            Error::BoxedError("an argument is missing: socket=PATH or calls=PATH".into())
        })?;
        if let Some(ram) = argument("ram=") {
            record::enable(ram)?;
        }
        let listener = UnixListener::bind(socket)?;
        thread::Builder::new()
            .name("pmem-plugin".into())
            .spawn(move || serve(&listener, answer))?;
        Ok(())
    }
}

register!(Plugin);
