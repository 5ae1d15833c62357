// SPDX-License-Identifier: GPL-2.0-only

//! Memory that no Rust reference may point to, as a safe type.

use super::{
    Machine,
    Persist, //
};
use core::{
    fmt,
    marker::PhantomData, //
};

/// Bytes that others may read and write at any time: a part of a medium, or pages under I/O.
///
/// So it gives out no reference to them, and what is read from them is whatever was there.
///
/// # Invariants
///
/// `addr` is valid for reads and writes of `len` bytes during `'a`, by assembly or volatile
/// accesses.
#[derive(Clone, Copy)]
pub struct VolatileSlice<'a> {
    addr: *mut u8,
    len: usize,
    _memory: PhantomData<&'a ()>,
}

impl fmt::Debug for VolatileSlice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.len)
    }
}

impl VolatileSlice<'_> {
    /// The `len` bytes at `addr`.
    ///
    /// # Safety
    ///
    /// `addr` must be valid for reads and writes of `len` bytes as long as the result is in use.
    /// No Rust reference to them may be in use at the same time.
    #[inline]
    pub const unsafe fn new(addr: *mut u8, len: usize) -> Self {
        // INVARIANT: By the safety contract of this function.
        Self {
            addr,
            len,
            _memory: PhantomData,
        }
    }

    /// The address of the first byte.
    #[inline]
    pub const fn as_ptr(&self) -> *mut u8 {
        self.addr
    }

    /// Length in bytes.
    #[inline]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    #[inline]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Splits it into its first `mid` bytes and the others, or returns nothing if it has fewer.
    #[inline]
    pub const fn split_at(self, mid: usize) -> Option<(Self, Self)> {
        if mid > self.len {
            return None;
        }
        // INVARIANT: `mid` is at most `len`, so that both are parts of what is valid.
        Some((
            Self { len: mid, ..self },
            Self {
                addr: self.addr.wrapping_add(mid),
                len: self.len.wrapping_sub(mid),
                ..self
            },
        ))
    }
}

impl<M: Machine> Persist<M> {
    /// Copies `src` to the beginning of `dst`, durable after a [`fence`](Persist::fence).
    ///
    /// Copies as much as both have. If they overlap, it is not said which bytes are stored.
    #[inline]
    pub fn write(&self, dst: VolatileSlice<'_>, src: VolatileSlice<'_>) {
        let len = if src.len < dst.len { src.len } else { dst.len };
        // SAFETY: By the type invariants. The copy is made by assembly or volatile accesses, to
        // which an overlap is only a concurrent writer.
        unsafe { self.copy(dst.addr, src.addr, len) };
    }

    /// Zeroes `dst`, durable after a [`fence`](Persist::fence).
    #[inline]
    pub fn write_zeroes(&self, dst: VolatileSlice<'_>) {
        // SAFETY: By the type invariant.
        unsafe { self.zero(dst.addr, dst.len) };
    }
}
