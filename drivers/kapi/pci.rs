// SPDX-License-Identifier: GPL-2.0-only

//! What the kernel crate's PCI devices do not have: what their BARs are, the end of their memory, and
//! whether they are still there.
//!
//! C header: [`include/linux/pci.h`](srctree/include/linux/pci.h)

use super::bindings;
use kernel::{
    device::Core,
    error::to_result,
    pci,
    prelude::*,
    sync::aref::ARef, //
};

/// The C object.
fn raw(device: &pci::Device) -> *mut bindings::pci_dev {
    // The type is transparent.
    core::ptr::from_ref(device).cast_mut().cast()
}

/// What a BAR is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Resource {
    /// Nothing.
    None,
    /// I/O ports.
    Ports,
    /// Memory without an address.
    Unassigned,
    /// Memory.
    Memory {
        /// Where CPUs find it.
        start: u64,
        /// Its length in bytes.
        size: u64,
        /// Where devices on its bus find it.
        bus: u64,
    },
}

/// The register of BAR `bar` of `device`.
fn register(device: &pci::Device, bar: u32) -> u32 {
    let offset = bindings::PCI_BASE_ADDRESS_0.wrapping_add(bar.wrapping_mul(4));
    let mut value = 0;
    // SAFETY: The device is valid. Who is gone gives an error, or all ones.
    let ret = unsafe { bindings::pci_read_config_dword(raw(device), offset as c_int, &mut value) };
    if ret == 0 && value != u32::MAX {
        value
    } else {
        0
    }
}

/// Whether BAR `bar` of `device` is memory, as far as its register tells: of memory that has neither
/// more than 32 bits of address nor can be prefetched, it does not.
///
/// The kernel forgets BARs that it has found no address for.
fn is_memory(device: &pci::Device, bar: u32) -> bool {
    const TYPE: u32 = bindings::PCI_BASE_ADDRESS_MEM_TYPE_MASK;
    const LONG: u32 = bindings::PCI_BASE_ADDRESS_MEM_TYPE_64;

    let mut is_upper_half = false;
    for this in 0..bindings::PCI_STD_NUM_BARS {
        let register = if is_upper_half {
            0
        } else {
            register(device, this)
        };
        let is_ports = register & bindings::PCI_BASE_ADDRESS_SPACE_IO != 0;
        if this == bar {
            return !is_ports && register & (TYPE | bindings::PCI_BASE_ADDRESS_MEM_PREFETCH) != 0;
        }
        is_upper_half = !is_ports && register & TYPE == LONG;
    }
    false
}

/// What BAR `bar` of `device` is. More than a device can have are none.
pub(crate) fn resource(device: &pci::Device, bar: u32) -> Resource {
    if bar >= bindings::PCI_STD_NUM_BARS {
        return Resource::None;
    }
    let (mut start, mut size, mut bus) = (0, 0, 0);
    // SAFETY: The device is valid, and so is the number of the BAR.
    let flags = unsafe {
        bindings::pmem_helper_pci_resource(raw(device), bar, &mut start, &mut size, &mut bus)
    };
    let is = |flag: u32| flags & flag as c_ulong != 0;
    if is(bindings::IORESOURCE_IO) {
        Resource::Ports
    } else if is(bindings::IORESOURCE_MEM) && !is(bindings::IORESOURCE_UNSET) && size != 0 {
        Resource::Memory { start, size, bus }
    } else if is(bindings::IORESOURCE_MEM) || is_memory(device, bar) {
        Resource::Unassigned
    } else {
        Resource::None
    }
}

/// A device whose memory can be accessed, until this is dropped.
pub(crate) struct Enabled(ARef<pci::Device>);

impl Enabled {
    /// Has `device` answer to accesses of its memory.
    ///
    /// # Errors
    ///
    /// Those of the PCI core.
    pub(crate) fn new(device: &pci::Device<Core<'_>>) -> Result<Self> {
        device.enable_device_mem()?;
        let device: &pci::Device = device;
        Ok(Enabled(device.into()))
    }
}

impl Drop for Enabled {
    fn drop(&mut self) {
        // SAFETY: The device is valid, and was enabled once for this.
        unsafe { bindings::pci_disable_device(raw(&self.0)) };
    }
}

/// Gives the kernel `size` bytes at `offset` of BAR `bar` of `device`, a multiple of 2 MiB, as p2pdma
/// memory, which anybody can then have. It is the kernel's until the device is unbound, and nobody may
/// access it in another way.
///
/// # Errors
///
/// - `EOPNOTSUPP`: the kernel has no p2pdma.
/// - `EINVAL`: the BAR is not memory, or not as large.
/// - Those of `memremap_pages()`.
pub(crate) fn add_p2pdma(
    device: &pci::Device<Core<'_>>,
    bar: u32,
    offset: u64,
    size: u64,
) -> Result {
    if bar >= bindings::PCI_STD_NUM_BARS {
        return Err(EINVAL);
    }
    // SAFETY: The device is valid, and is being bound, as the context says: what is made for it goes
    // when it is unbound. The number of the BAR was checked; the rest is checked by the function.
    to_result(unsafe {
        bindings::pmem_helper_pci_add_p2pdma(raw(device), bar, usize::try_from(size)?, offset)
    })
}

/// Whether it is known that `device` is gone. Does not sleep.
pub(crate) fn is_gone(device: &pci::Device) -> bool {
    // SAFETY: The device is valid.
    unsafe { bindings::pmem_helper_pci_is_disconnected(raw(device)) }
}

/// Asks `device` whether it is there. Does not sleep.
pub(crate) fn is_present(device: &pci::Device) -> bool {
    // SAFETY: The device is valid.
    unsafe { bindings::pci_device_is_present(raw(device)) }
}
