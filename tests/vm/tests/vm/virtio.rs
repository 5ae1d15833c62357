// SPDX-License-Identifier: GPL-2.0-only

//! virtio-pmem: memory that the host makes durable when it is asked to.

mod contents;
mod flushes;

use anyhow::{Context, Result};
use std::time::Duration;
use vm_tests::{load, stock, Persistent, MIB};
use xtask::vm::{Builder, Vm};

/// What XFS takes at least.
const SIZE: u64 = 384 * MIB;

/// What takes minutes of an emulated CPU.
const LONG: Duration = Duration::from_secs(300);

const EXT4: &str = "mkfs.ext4 -q -F -b 4096 /dev/pmem0";
const XFS: &str = "mkfs.xfs -q -f -m reflink=0 /dev/pmem0";

/// A machine with one device, and no other memory that the driver could have.
fn machine(memory: &Persistent) -> Result<Builder<'_>> {
    Ok(stock()?.upper(0).module("xfs").virtio_pmem(memory))
}

/// Loads the driver, which has then found the devices that are there.
fn serve(vm: &Vm) -> Result<()> {
    load(vm, "")
}

/// A counter of pmem0's in debugfs.
fn counter(vm: &Vm, name: &str) -> Result<u64> {
    let text = vm.text(&format!("/sys/kernel/debug/pmem/pmem0/{name}"))?;
    text.trim()
        .parse()
        .with_context(|| format!("{name}: {text:?}"))
}
