// SPDX-License-Identifier: GPL-2.0-only

//! System calls, one by one, each marked for a plugin in QEMU that counts what the kernel executes for it.

use std::fs::OpenOptions;
use std::hint::spin_loop;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use rustix::fs::OFlags;

use crate::aligned::Aligned;

/// How far from each other the blocks begin that are accessed: what a call does must not depend on which one it is.
const STRIDE: u64 = 1 << 20;

/// How many different blocks are accessed.
const BLOCKS: u64 = 8;

/// Makes `count` calls on `path`, without the page cache: `read`, `write`, `dsync` (a write that is durable) or `fsync`, of
/// `len` bytes where there are some.
pub fn repeat(path: &str, op: &str, len: usize, count: usize) -> io::Result<()> {
    let mut flags = OFlags::DIRECT;
    if op == "dsync" {
        flags |= OFlags::DSYNC;
    }
    let disk = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags.bits() as i32)
        .open(path)?;
    let mut buffer = Aligned::new(len);
    // No page of it is touched for the first time by a call.
    buffer.bytes_mut().fill(0x5a);
    // Nor is there a block that was never written.
    for n in 0..BLOCKS {
        disk.write_all_at(buffer.bytes(), n * STRIDE)?;
    }
    for n in 0..count as u64 {
        let at = n % BLOCKS * STRIDE;
        // This is `pause`, by which the plugin knows the call that comes next.
        spin_loop();
        match op {
            "read" => disk.read_exact_at(buffer.bytes_mut(), at)?,
            "write" | "dsync" => disk.write_all_at(buffer.bytes(), at)?,
            "fsync" => disk.sync_all()?,
            _ => return Err(io::Error::other(format!("no call {op:?}"))),
        }
    }
    Ok(())
}
