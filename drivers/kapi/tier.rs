// SPDX-License-Identifier: GPL-2.0-only

//! Memory tiers: which memory is slow, so that the kernel demotes to it what is seldom used.
//!
//! C header: [`include/linux/memory-tiers.h`](srctree/include/linux/memory-tiers.h)

use super::{
    bindings,
    numa::Node, //
};
use core::ptr::NonNull;
use kernel::{
    error::from_err_ptr,
    prelude::*,
    types::Opaque, //
};

/// How much slower than DRAM memory of a driver is, unless firmware says: what the kernel assumes of
/// memory from device-dax.
const FACTOR: i32 = 5;

/// A node whose memory is known to be slow.
///
/// # Invariants
///
/// `kind` is in the list `kinds`, and is that of the node.
pub(crate) struct Slow {
    node: Node,
    kind: NonNull<bindings::memory_dev_type>,
    kinds: Pin<KBox<Opaque<bindings::list_head>>>,
}

// SAFETY: The list is ours alone, the kind has a lock of its own.
unsafe impl Send for Slow {}

// SAFETY: As for `Send`.
unsafe impl Sync for Slow {}

impl Slow {
    /// Says so of `node`, before it gets memory.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(node: Node) -> Result<Self> {
        let kinds = KBox::pin(Opaque::new(bindings::list_head::default()), GFP_KERNEL)?;
        let mut distance = bindings::PMEM_CONST_MEMTIER_ADISTANCE_DRAM.saturating_mul(FACTOR);
        // SAFETY: The list is pinned until it is emptied in `drop()`, and nobody else knows it.
        let kind = from_err_ptr(unsafe {
            bindings::INIT_LIST_HEAD(kinds.get());
            bindings::mt_calc_adistance(node.id(), &mut distance);
            bindings::mt_find_alloc_memory_type(distance, kinds.get())
        })?;
        let kind = NonNull::new(kind).ok_or(ENOMEM)?;
        // SAFETY: The node is possible, the kind was just made.
        unsafe { bindings::init_node_memory_type(node.id(), kind.as_ptr()) };
        // INVARIANT: Just done.
        Ok(Slow { node, kind, kinds })
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        // SAFETY: By the type invariant; the list is ours alone.
        unsafe {
            bindings::clear_node_memory_type(self.node.id(), self.kind.as_ptr());
            bindings::mt_put_memory_types(self.kinds.get());
        }
    }
}
