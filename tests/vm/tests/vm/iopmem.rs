// SPDX-License-Identifier: GPL-2.0-only

//! iopmem: the memory behind a PCI function's BAR as a disk.
//!
//! The BARs are those of QEMU's `ivshmem-plain` devices, which are files of the host's.

mod contents;
mod modes;
mod peer;
mod plug;
mod refusals;
mod words;

use anyhow::{ensure, Context, Result};
use std::fs;
use std::time::Duration;
use vm_tests::{load, stock, Persistent, Random, MIB};
use xtask::vm::{Builder, Vm};

/// The driver, on the PCI bus.
const DRIVER: &str = "/sys/bus/pci/drivers/iopmem";

/// The identity of QEMU's devices, as `new_id` takes it.
pub(super) const ID: &str = "1af4 1110";

/// The BAR of them that is memory.
const BAR: usize = 2;

/// What XFS takes at least, of the sizes that a BAR can have.
const SIZE: u64 = 512 * MIB;

/// What takes minutes of an emulated CPU.
const LONG: Duration = Duration::from_secs(300);

const EXT4: &str = "mkfs.ext4 -q -F -b 4096 /dev/iopmem0";
const XFS: &str = "mkfs.xfs -q -f -m reflink=0 /dev/iopmem0";

/// A machine with one device, and no other memory that the driver could have.
fn machine(memory: &Persistent) -> Result<Builder<'_>> {
    Ok(stock()?.upper(0).module("xfs").bar(memory))
}

/// Loads the driver, and gives it all devices of QEMU's, those that are there and those that come.
fn serve(vm: &Vm, params: &str) -> Result<()> {
    load(vm, params)?;
    vm.sh(&format!("echo {ID} >{DRIVER}/new_id")).map(drop)
}

/// Waits until there is a disk.
fn wait(vm: &Vm, disk: &str) -> Result<()> {
    vm.sh(&format!(
        "for i in $(seq 300); do test -b /dev/{disk} && exit 0; sleep 0.05; done; exit 1"
    ))
    .with_context(|| format!("there is no /dev/{disk}"))
    .map(drop)
}

/// Takes a function from the driver.
fn unbind(vm: &Vm, function: &str) -> Result<()> {
    vm.sh_for(&format!("echo {function} >{DRIVER}/unbind"), LONG)
        .map(drop)
}

/// Gives a function to the driver.
fn bind(vm: &Vm, function: &str) -> Result<()> {
    vm.sh(&format!("echo {function} >{DRIVER}/bind")).map(drop)
}

/// Where the BAR of a function is in the guest's address space.
fn place(vm: &Vm, function: &str) -> Result<u64> {
    let text = vm.text(&format!("/sys/bus/pci/devices/{function}/resource"))?;
    let line = text.lines().nth(BAR).context("there is no such BAR")?;
    let start = line.split_whitespace().next().unwrap_or_default();
    let start = u64::from_str_radix(start.trim_start_matches("0x"), 16)?;
    ensure!(start > 0, "the firmware gave it no place: {text}");
    Ok(start)
}

/// What an attribute of the first disk says.
fn attribute(vm: &Vm, name: &str) -> Result<String> {
    let text = vm.text(&format!("/sys/block/iopmem0/{name}"))?;
    Ok(text.trim().to_owned())
}

/// Fails unless attributes of the first disk say this.
fn says(vm: &Vm, wanted: &[(&str, &str)]) -> Result<()> {
    for (name, what) in wanted {
        let said = attribute(vm, name)?;
        ensure!(said == *what, "{name}: {said:?}, not {what:?}");
    }
    Ok(())
}

/// The first bytes of what `seed` makes.
fn pattern(seed: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    Random::new(seed).bytes(&mut bytes);
    bytes
}

/// Fails unless the host's file begins with what `seed` makes.
fn compare(memory: &Persistent, seed: u64, len: u64) -> Result<()> {
    let data = fs::read(memory.path())?;
    let wanted = pattern(seed, len);
    let differs = data.iter().zip(&wanted).position(|(a, b)| a != b);
    ensure!(
        data.len() >= wanted.len() && differs.is_none(),
        "of {len} bytes of the host's file, the first that differs is {differs:?}"
    );
    Ok(())
}
