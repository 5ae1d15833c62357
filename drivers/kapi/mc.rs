// SPDX-License-Identifier: GPL-2.0-only

//! Copies that survive a machine check.
//!
//! C header: [`include/linux/uaccess.h`](srctree/include/linux/uaccess.h)

use super::bindings;
use crate::pmem_core::{
    medium::{
        Medium,
        Unreadable, //
    },
    persist::VolatileSlice, //
};
use kernel::prelude::*;

/// Copies `from`, which may have bad memory in it, to `to`, which is at least as long.
///
/// # Errors
///
/// - `EIO`: a part of `from` cannot be read, on a machine that can tell.
/// - `EINVAL`: `to` is shorter than `from`, or both are 4 GiB or longer.
#[inline]
pub(crate) fn copy(to: VolatileSlice<'_>, from: VolatileSlice<'_>) -> Result {
    match copy_readable(to, from)? {
        0 => Ok(()),
        _ => Err(EIO),
    }
}

/// Copies `from` up to the first byte that cannot be read, and returns how many bytes are left.
///
/// # Errors
///
/// `EINVAL`: `to` is shorter than `from`, or both are 4 GiB or longer.
#[inline]
pub(crate) fn copy_readable(to: VolatileSlice<'_>, from: VolatileSlice<'_>) -> Result<usize> {
    let len = u32::try_from(from.len())?;
    if to.len() < from.len() {
        return Err(EINVAL);
    }
    // SAFETY: By the invariants of `VolatileSlice` both are valid, and their length was checked.
    // The copy is made by assembly, to which an overlap is only a concurrent writer.
    let left =
        unsafe { bindings::copy_mc_to_kernel(to.as_ptr().cast(), from.as_ptr().cast(), len) };
    Ok(left as usize)
}

/// Copies the beginning of `from`, which may have bad memory in it, to all of `buf`.
///
/// # Errors
///
/// As for [`copy`].
pub(crate) fn read(from: VolatileSlice<'_>, buf: &mut [u8]) -> Result {
    let (from, _) = from.split_at(buf.len()).ok_or(EINVAL)?;
    // SAFETY: The bytes of `buf` are ours alone until the copy is done.
    let buf = unsafe { VolatileSlice::new(buf.as_mut_ptr(), buf.len()) };
    copy(buf, from)
}

/// Memory that is read before anybody changes it: what is bad of it is an error, not the end.
pub(crate) struct Checked<'a>(pub(crate) VolatileSlice<'a>);

impl Medium for Checked<'_> {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Unreadable> {
        self.0
            .range(offset, buf.len() as u64)
            .and_then(|from| read(from, buf).ok())
            .ok_or(Unreadable { offset })
    }
}

/// Zeroes `to`, through the cache: it is memory that somebody reads next.
#[inline]
pub(crate) fn zero(to: VolatileSlice<'_>) {
    // SAFETY: By the invariants of `VolatileSlice`. `memset()` is assembly or C that the kernel
    // compiles as such, to which an access of others at the same time is only a race.
    unsafe { bindings::memset(to.as_ptr().cast(), 0, to.len()) };
}
