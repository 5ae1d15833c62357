// SPDX-License-Identifier: GPL-2.0-only

//! NUMA nodes.
//!
//! C header: [`include/linux/numa.h`](srctree/include/linux/numa.h)

use super::bindings;
use kernel::device::Device;

/// A NUMA node, or none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Node(i32);

impl Node {
    /// Returns the node that the physical address `start` belongs to or, when that one is offline
    /// (it has no other memory and no CPU), the nearest node that is online.
    pub(crate) fn of_phys(start: u64) -> Self {
        // SAFETY: Reads the tables that firmware described the machine with; any address will do.
        Node(unsafe { bindings::pmem_helper_phys_to_online_node(start) })
    }

    /// Returns the node that `device` is next to or, when that one is offline, the nearest node that is
    /// online.
    pub(crate) fn of_device(device: &Device) -> Self {
        // The type is transparent.
        let device = core::ptr::from_ref(device).cast_mut().cast();
        // SAFETY: The device is valid.
        Node(unsafe { bindings::pmem_helper_dev_to_online_node(device) })
    }

    /// Returns the node that memory at the physical address `start` would belong to, which may be
    /// offline, or nothing if firmware named none.
    pub(crate) fn target_of_phys(start: u64) -> Option<Self> {
        // SAFETY: Reads the tables that firmware described the machine with; any address will do.
        let node = unsafe { bindings::phys_to_target_node(start) };
        // SAFETY: Reads a bitmap, for numbers that it has.
        unsafe { bindings::pmem_helper_node_possible(node) }.then_some(Node(node))
    }

    /// The pages of memory that it has.
    pub(crate) fn present_pages(self) -> u64 {
        // SAFETY: Reads a counter of a node that is possible, or gives 0.
        unsafe { bindings::pmem_helper_node_present_pages(self.0) as u64 }
    }

    /// The number that C uses: -1 is `NUMA_NO_NODE`.
    pub(crate) fn id(self) -> i32 {
        self.0
    }
}
