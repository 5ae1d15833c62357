// SPDX-License-Identifier: GPL-2.0-only

//! The guest's side of `cargo xtask`, one static binary.
//!
//! As `/init` it is process 1 of a virtual machine and does what the host asks over a virtio port. Under
//! its own name it is a few small programs that need what no shell has: shared mappings of DAX files, writers that know
//! what a power loss may leave, users of memory.

mod agent;
mod aligned;
mod calls;
mod direct;
mod faults;
mod mapping;
mod mark;
mod pci;
mod programs;
mod steps;
mod timing;
mod virtio;
mod window;
mod writers;

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::process::id() == 1 {
        agent::main();
    }
    let args: Vec<String> = std::env::args().skip(1).collect();
    match programs::run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pmem-guest: {error}");
            ExitCode::FAILURE
        }
    }
}
