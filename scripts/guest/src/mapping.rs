// SPDX-License-Identifier: GPL-2.0-only

//! A shared mapping of a file: the one place in the guest that needs `unsafe`.

use std::arch::x86_64::{_mm_clflush, _mm_sfence};
use std::fs::File;
use std::io;
use std::ptr::{self, NonNull};

use rustix::mm::{madvise, mmap, msync, munmap, Advice, MapFlags, MsyncFlags, ProtFlags};

/// A file, mapped shared, readable and writable.
///
/// # Invariants
///
/// `start` is mapped for `len` bytes for as long as this lives, and nobody in this process has a
/// reference into it except through `self`. Other processes may not write it: the programs here are
/// the only users of their files.
pub struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

impl Mapping {
    /// Maps `len` bytes of `file` from its start.
    ///
    /// With `sync` the kernel must answer for the file's metadata at every write fault
    /// (`MAP_SYNC`), or this fails with `EOPNOTSUPP`.
    pub fn new(file: &File, len: usize, sync: bool) -> io::Result<Self> {
        let flags = if sync {
            MapFlags::SHARED_VALIDATE | MapFlags::SYNC
        } else {
            MapFlags::SHARED
        };
        // SAFETY: The kernel chooses an address that nothing else uses.
        let start = unsafe {
            mmap(
                ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                flags,
                file,
                0,
            )
        }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        // INVARIANT: The kernel has just mapped `len` bytes there.
        Ok(Self { start, len })
    }

    /// The address, for alignment.
    pub fn address(&self) -> usize {
        self.start.as_ptr() as usize
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: By the invariants they are mapped, and are not written while `self` is borrowed.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    /// The bytes, to be stored to.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: By the invariants they are mapped, and `self` is borrowed by the caller alone.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }

    /// Makes all stores durable as an application of persistent memory does: by writing cache lines
    /// back, without a system call. For mappings with `MAP_SYNC`.
    pub fn persist(&mut self) {
        for line in self.bytes_mut().chunks_mut(64) {
            // SAFETY: Every x86-64 CPU has the instruction, and the line is mapped.
            unsafe { _mm_clflush(line.as_ptr()) };
        }
        // SAFETY: Every x86-64 CPU has the instruction.
        unsafe { _mm_sfence() };
    }

    /// Says that the memory of the pages from `at` on has failed. The kernel then kills who has them
    /// mapped, by `SIGBUS`.
    pub fn poison(&mut self, at: usize, len: usize) -> io::Result<()> {
        let start = self.bytes_mut()[at..at + len].as_mut_ptr();
        // SAFETY: The range is mapped. What becomes of it is that accesses of it fail.
        unsafe { madvise(start.cast(), len, Advice::LinuxHwPoison) }?;
        Ok(())
    }

    /// Makes all stores durable by `msync(2)`.
    pub fn msync(&mut self) -> io::Result<()> {
        // SAFETY: By the invariants the range is mapped.
        unsafe { msync(self.start.as_ptr().cast(), self.len, MsyncFlags::SYNC) }?;
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: By the invariants the range is mapped, and no reference into it outlives `self`.
        unsafe { munmap(self.start.as_ptr().cast(), self.len) }.ok();
    }
}
