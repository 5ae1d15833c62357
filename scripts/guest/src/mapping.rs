// SPDX-License-Identifier: GPL-2.0-only

//! A shared mapping of a file: the one place in the guest that needs `unsafe`.

use std::arch::asm;
use std::arch::x86_64::{_mm_clflush, _mm_sfence};
use std::fs::File;
use std::io;
use std::ptr::{self, NonNull};

use rustix::mm::{madvise, mmap, msync, munmap, Advice, MapFlags, MsyncFlags, ProtFlags};

/// An instruction that accesses memory, with how many bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Instruction {
    /// `mov` from memory: 1, 2, 4 or 8 bytes.
    Load(usize),
    /// `mov` to memory: 1, 2, 4 or 8 bytes.
    Store(usize),
    /// `movdqu` from memory: 16 bytes.
    LoadVector,
    /// `movdqu` to memory: 16 bytes.
    StoreVector,
    /// `movnti`: 8 bytes past the caches.
    StoreNonTemporal,
    /// `lock add`: 8 bytes, read and written.
    Add,
    /// `rep stosq`: eight times 8 bytes.
    StoreString,
    /// `rep movsb`: 32 single bytes to memory that are elsewhere, on the stack.
    CopyString,
}

impl Instruction {
    /// How many bytes are accessed in all, from the address on.
    pub fn len(self) -> usize {
        match self {
            Self::Load(len) | Self::Store(len) => len,
            Self::LoadVector | Self::StoreVector => 16,
            Self::StoreNonTemporal | Self::Add => 8,
            Self::StoreString => 64,
            Self::CopyString => 32,
        }
    }
}

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

    /// Executes `instruction` on the bytes from `at` on: no other instruction, and not twice.
    pub fn execute(&mut self, instruction: Instruction, at: usize) -> io::Result<()> {
        let bytes = at
            .checked_add(instruction.len())
            .and_then(|end| self.bytes_mut().get_mut(at..end));
        let Some(bytes) = bytes else {
            return Err(io::Error::other(format!("{at} is beyond the file's end")));
        };
        let to = bytes.as_mut_ptr();
        let from = [0x5au8; 32];
        // SAFETY: All bytes that these access are in `bytes`, which `self` is borrowed for, or in `from`. None needs an
        // alignment. They change no register that the compiler is not told of, and no stack.
        unsafe {
            match instruction {
                Instruction::Load(1) => {
                    asm!("mov {:l}, [{}]", out(reg_abcd) _, in(reg) to, options(nostack))
                }
                Instruction::Load(2) => {
                    asm!("mov {:x}, [{}]", out(reg) _, in(reg) to, options(nostack))
                }
                Instruction::Load(4) => {
                    asm!("mov {:e}, [{}]", out(reg) _, in(reg) to, options(nostack))
                }
                Instruction::Load(8) => {
                    asm!("mov {:r}, [{}]", out(reg) _, in(reg) to, options(nostack))
                }
                Instruction::Store(1) => {
                    asm!("mov [{}], {:l}", in(reg) to, in(reg_abcd) 1u64, options(nostack))
                }
                Instruction::Store(2) => {
                    asm!("mov [{}], {:x}", in(reg) to, in(reg) 2u64, options(nostack))
                }
                Instruction::Store(4) => {
                    asm!("mov [{}], {:e}", in(reg) to, in(reg) 4u64, options(nostack))
                }
                Instruction::Store(8) => {
                    asm!("mov [{}], {:r}", in(reg) to, in(reg) 8u64, options(nostack))
                }
                Instruction::Load(len) | Instruction::Store(len) => {
                    return Err(io::Error::other(format!("no mov has {len} bytes")))
                }
                Instruction::LoadVector => {
                    asm!("movdqu {}, [{}]", out(xmm_reg) _, in(reg) to, options(nostack))
                }
                Instruction::StoreVector => {
                    asm!("movdqu [{}], {}", in(reg) to, in(xmm_reg) 0f64, options(nostack))
                }
                Instruction::StoreNonTemporal => {
                    asm!("movnti [{}], {}", in(reg) to, in(reg) 8u64, options(nostack))
                }
                Instruction::Add => {
                    asm!("lock add [{}], {}", in(reg) to, in(reg) 1u64, options(nostack))
                }
                Instruction::StoreString => asm!(
                    "rep stosq",
                    inout("rcx") 8u64 => _, inout("rdi") to => _, in("rax") 3u64, options(nostack)
                ),
                Instruction::CopyString => asm!(
                    "rep movsb",
                    inout("rcx") 32u64 => _, inout("rsi") from.as_ptr() => _, inout("rdi") to => _, options(nostack)
                ),
            }
        }
        Ok(())
    }

    /// Stores `words` from offset `at` on, each by one instruction.
    pub fn store_words(&mut self, at: usize, words: &[u64]) {
        let to = &mut self.bytes_mut()[at..][..size_of_val(words)];
        // SAFETY: Any bytes are words.
        let (before, to, after) = unsafe { to.align_to_mut::<u64>() };
        assert!(before.is_empty() && after.is_empty(), "not of whole words");
        for (to, &word) in to.iter_mut().zip(words) {
            // SAFETY: It is a reference.
            unsafe { ptr::from_mut(to).write_volatile(word) };
        }
    }

    /// Loads words from offset `at` on into `words`, each by one instruction.
    pub fn load_words(&self, at: usize, words: &mut [u64]) {
        let from = &self.bytes()[at..][..size_of_val(words)];
        // SAFETY: Any bytes are words.
        let (before, from, after) = unsafe { from.align_to::<u64>() };
        assert!(before.is_empty() && after.is_empty(), "not of whole words");
        for (word, from) in words.iter_mut().zip(from) {
            // SAFETY: It is a reference.
            *word = unsafe { ptr::from_ref(from).read_volatile() };
        }
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
