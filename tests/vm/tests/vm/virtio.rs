// SPDX-License-Identifier: GPL-2.0-only

//! virtio-pmem: memory that the host makes durable when it is asked to.

mod broken;
mod contents;
mod flushes;
mod plug;
mod refusals;
mod resets;

use anyhow::{Context, Result};
use std::time::Duration;
use vm_tests::{load, stock, Persistent, MIB, UPPER};
use xtask::vm::{Builder, Vm};

/// The driver's name on the virtio bus.
const DRIVER: &str = "pmem";

/// Where the memory of a machine's first device is.
const START: u64 = UPPER;

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

/// Takes the device of `driver` away from it, and returns the device's name on the virtio bus.
fn unbind(vm: &Vm, driver: &str) -> Result<String> {
    let device = vm.sh_for(
        &format!(
            "cd /sys/bus/virtio/drivers/{driver}
             device=$(echo virtio[0-9]*)
             echo $device >unbind
             echo $device"
        ),
        LONG,
    )?;
    Ok(device.trim().to_owned())
}

/// Gives a device of the virtio bus to `driver`, and waits for the disk.
fn bind(vm: &Vm, driver: &str, device: &str) -> Result<()> {
    vm.sh(&format!(
        "echo {device} >/sys/bus/virtio/drivers/{driver}/bind
         for i in $(seq 100); do test -b /dev/pmem0 && exit 0; sleep 0.1; done
         exit 1"
    ))
    .map(drop)
}
