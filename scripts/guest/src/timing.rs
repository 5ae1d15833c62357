// SPDX-License-Identifier: GPL-2.0-only

//! How long one system call takes, and what it needs.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

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

/// Loads the module `path`, waits until there is `file`, and prints how long that took, and how much less memory is free
/// then, as JSON.
pub fn load(path: &str, params: &str, file: &str) -> io::Result<()> {
    /// What takes longer has failed.
    const PATIENCE: Duration = Duration::from_secs(60);

    let module = File::open(path)?;
    let params = CString::new(params)?;
    let (free, start) = (free()?, Instant::now());
    rustix::system::finit_module(&module, &params, 0)?;
    while !Path::new(file).exists() {
        if start.elapsed() > PATIENCE {
            return Err(io::Error::other(format!("there is no {file}")));
        }
        thread::yield_now();
    }
    let ns = start.elapsed().as_nanos() as u64;
    let bytes = free.saturating_sub(self::free()?);
    println!("{}", json!({ "ns": ns, "bytes": bytes }));
    Ok(())
}

/// Free memory, in bytes: also what CPUs keep to themselves, which `MemFree` does not have.
fn free() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/zoneinfo")?;
    let pages = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        match words.next()? {
            "nr_free_pages" | "count:" => words.next()?.parse::<u64>().ok(),
            _ => None,
        }
    });
    Ok(pages.sum::<u64>() * 4096)
}

/// What this process has run, in nanoseconds.
fn cpu_ns() -> u64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}
