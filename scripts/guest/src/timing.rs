// SPDX-License-Identifier: GPL-2.0-only

//! How long one system call takes.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::time::Instant;

use rustix::time::{clock_gettime, ClockId};
use serde_json::json;

/// Writes `text` to an attribute at `path`, and prints how long that took, and how long this process ran meanwhile, as
/// JSON.
pub fn write(path: &str, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).open(path)?;
    let (cpu, start) = (cpu_ns(), Instant::now());
    // An attribute takes all of it at once, or none.
    let written = file.write(text.as_bytes());
    let (ns, cpu_ns) = (start.elapsed().as_nanos() as u64, cpu_ns() - cpu);
    written?;
    println!("{}", json!({ "ns": ns, "cpu_ns": cpu_ns }));
    Ok(())
}

/// What this process has run, in nanoseconds.
fn cpu_ns() -> u64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}
