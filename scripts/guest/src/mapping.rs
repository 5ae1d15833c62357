// SPDX-License-Identifier: GPL-2.0-only

//! A shared mapping of a file: the one place in the guest that needs `unsafe`.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, _mm_clflush, _mm_mfence, _mm_set1_epi64x, _mm_sfence};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::ptr::{self, NonNull};

use rustix::mm::{madvise, mmap, msync, munmap, Advice, MapFlags, MsyncFlags, ProtFlags};

/// Bytes of a cache line.
const LINE: usize = 64;

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
    /// `movbe` to memory: 8 bytes, the highest first.
    StoreReversed,
    /// `movnti`: 4 or 8 bytes past the caches.
    StoreNonTemporal(usize),
    /// `movntdq`: 16 bytes past the caches. The address is a multiple of 16.
    StreamVector,
    /// `vmovntdq`: 32 bytes past the caches. The address is a multiple of 32.
    StreamLongVector,
    /// `add` to memory: 8 bytes, read and written.
    AddUnlocked,
    /// `lock add`: 8 bytes, read and written.
    Add,
    /// `lock xadd`: 8 bytes, read and written.
    ExchangeAndAdd,
    /// `xchg`: 8 bytes, read and written.
    Exchange,
    /// `lock cmpxchg`: 8 bytes, which are replaced if they are zeroes.
    CompareAndExchange,
    /// `rep stosq`: eight times 8 bytes.
    StoreString,
    /// `rep movsb`: 32 single bytes to memory that are elsewhere, on the stack.
    CopyString,
    /// `clwb`: writes a line back.
    WriteBack,
    /// `clflushopt`: writes a line back, and drops it.
    FlushWeakly,
    /// `clflush`: as that, in order.
    Flush,
    /// `sfence`: no memory.
    StoreFence,
    /// `mfence`: no memory.
    Fence,
    /// `cpuid`, which serializes: no memory.
    Serialize,
}

impl Instruction {
    /// How many bytes are accessed in all, from the address on.
    pub fn len(self) -> usize {
        match self {
            Self::Load(len) | Self::Store(len) | Self::StoreNonTemporal(len) => len,
            Self::LoadVector | Self::StoreVector | Self::StreamVector => 16,
            Self::StoreReversed
            | Self::AddUnlocked
            | Self::Add
            | Self::ExchangeAndAdd
            | Self::Exchange
            | Self::CompareAndExchange => 8,
            Self::StoreString => 64,
            Self::StreamLongVector | Self::CopyString => 32,
            Self::WriteBack | Self::FlushWeakly | Self::Flush => 1,
            Self::StoreFence | Self::Fence | Self::Serialize => 0,
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

    /// Executes `instruction` on the bytes from `at` on: no other instruction, and not twice. What stores, stores the
    /// lowest bytes of `value`, again and again if it is more than 8.
    pub fn execute(&mut self, instruction: Instruction, at: usize, value: u64) -> io::Result<()> {
        let bytes = at
            .checked_add(instruction.len())
            .and_then(|end| self.bytes_mut().get_mut(at..end));
        let Some(bytes) = bytes else {
            return Err(io::Error::other(format!("{at} is beyond the file's end")));
        };
        let to = bytes.as_mut_ptr();
        let alignment = match instruction {
            Instruction::StreamVector => 16,
            Instruction::StreamLongVector => 32,
            _ => 1,
        };
        if to as usize % alignment != 0 {
            return Err(io::Error::other(format!(
                "{instruction:?} wants an address that is a multiple of {alignment}"
            )));
        }
        let mut from = [0u8; 32];
        for word in from.chunks_mut(8) {
            word.copy_from_slice(&value.to_le_bytes());
        }
        // SAFETY: All bytes that these access are in `bytes`, which `self` is borrowed for, or in `from`. Those that
        // need an alignment have it. They change no register that the compiler is not told of, and no stack. Each x86-64
        // CPU has them, or Linux kills this process.
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
                    asm!("mov [{}], {:l}", in(reg) to, in(reg_abcd) value, options(nostack))
                }
                Instruction::Store(2) => {
                    asm!("mov [{}], {:x}", in(reg) to, in(reg) value, options(nostack))
                }
                Instruction::Store(4) => {
                    asm!("mov [{}], {:e}", in(reg) to, in(reg) value, options(nostack))
                }
                Instruction::Store(8) => {
                    asm!("mov [{}], {:r}", in(reg) to, in(reg) value, options(nostack))
                }
                Instruction::StoreReversed => {
                    asm!("movbe [{}], {}", in(reg) to, in(reg) value, options(nostack))
                }
                Instruction::StoreNonTemporal(4) => {
                    asm!("movnti [{}], {:e}", in(reg) to, in(reg) value, options(nostack))
                }
                Instruction::StoreNonTemporal(8) => {
                    asm!("movnti [{}], {:r}", in(reg) to, in(reg) value, options(nostack))
                }
                Instruction::Load(len)
                | Instruction::Store(len)
                | Instruction::StoreNonTemporal(len) => {
                    return Err(io::Error::other(format!("no such mov has {len} bytes")))
                }
                Instruction::LoadVector => {
                    asm!("movdqu {}, [{}]", out(xmm_reg) _, in(reg) to, options(nostack))
                }
                Instruction::StoreVector => {
                    let value = _mm_set1_epi64x(value as i64);
                    asm!("movdqu [{}], {}", in(reg) to, in(xmm_reg) value, options(nostack))
                }
                Instruction::StreamVector => {
                    let value = _mm_set1_epi64x(value as i64);
                    asm!("movntdq [{}], {}", in(reg) to, in(xmm_reg) value, options(nostack))
                }
                Instruction::StreamLongVector => asm!(
                    "vmovq xmm0, {1}",
                    "vpbroadcastq ymm0, xmm0",
                    "vmovntdq [{0}], ymm0",
                    "vzeroupper",
                    in(reg) to, in(reg) value, out("xmm0") _, options(nostack)
                ),
                Instruction::AddUnlocked => {
                    asm!("add [{}], {}", in(reg) to, in(reg) value, options(nostack))
                }
                Instruction::Add => {
                    asm!("lock add [{}], {}", in(reg) to, in(reg) value, options(nostack))
                }
                Instruction::ExchangeAndAdd => {
                    asm!("lock xadd [{}], {}", in(reg) to, inout(reg) value => _, options(nostack))
                }
                Instruction::Exchange => {
                    asm!("xchg [{}], {}", in(reg) to, inout(reg) value => _, options(nostack))
                }
                Instruction::CompareAndExchange => asm!(
                    "lock cmpxchg [{}], {}",
                    in(reg) to, in(reg) value, inout("rax") 0u64 => _, options(nostack)
                ),
                Instruction::StoreString => asm!(
                    "rep stosq",
                    inout("rcx") 8u64 => _, inout("rdi") to => _, in("rax") value, options(nostack)
                ),
                Instruction::CopyString => asm!(
                    "rep movsb",
                    inout("rcx") 32u64 => _, inout("rsi") from.as_ptr() => _, inout("rdi") to => _, options(nostack)
                ),
                Instruction::WriteBack => asm!("clwb [{}]", in(reg) to, options(nostack)),
                Instruction::FlushWeakly => asm!("clflushopt [{}]", in(reg) to, options(nostack)),
                Instruction::Flush => _mm_clflush(to),
                Instruction::StoreFence => _mm_sfence(),
                Instruction::Fence => _mm_mfence(),
                Instruction::Serialize => {
                    __cpuid(0);
                }
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
        self.persist_range(0..self.len);
    }

    /// As [`Mapping::persist`], of these bytes alone.
    pub fn persist_range(&mut self, range: Range<usize>) {
        // The mapping begins with a line.
        let start = range.start / LINE * LINE;
        for line in self.bytes_mut()[start..range.end].chunks_mut(LINE) {
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
