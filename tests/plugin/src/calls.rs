// SPDX-License-Identifier: GPL-2.0-only

//! Shows a [`Counter`] what a CPU executes.

use pmem_trace::calls::{Counter, Instruction, KERNEL};
use qemu_plugin::error::Result;
use qemu_plugin::TranslationBlock;
use std::os::unix::net::UnixListener;
use std::thread;

static COUNTER: Counter = Counter::new();

/// Answers on `socket`.
pub fn serve(socket: &str) -> Result<()> {
    let listener = UnixListener::bind(socket)?;
    thread::Builder::new()
        .name("pmem-calls".into())
        .spawn(move || COUNTER.serve(&listener))?;
    Ok(())
}

/// Has the counter see what `block` executes: each instruction of the kernel's, and of a program that there is one. Blocks
/// that were translated before it is asked for are not seen, so that QEMU has to translate them anew.
pub fn watch(block: &TranslationBlock<'_>) {
    if !COUNTER.is_on() {
        return;
    }
    if block.vaddr() < KERNEL {
        block.register_execute_callback(|_cpu| COUNTER.program());
    }
    for instruction in block.instructions() {
        let pc = instruction.vaddr();
        let kind = Instruction::decode(&instruction.data());
        if pc >= KERNEL {
            let streams = kind == Instruction::Stream;
            instruction.register_execute_callback(move |_cpu| COUNTER.execute(pc, streams));
            continue;
        }
        match kind {
            Instruction::Mark => instruction.register_execute_callback(|_cpu| COUNTER.mark()),
            Instruction::Call => instruction.register_execute_callback(|_cpu| COUNTER.call()),
            _ => {}
        }
    }
}
