// SPDX-License-Identifier: GPL-2.0-only

//! What an instruction does that matters to persistent memory, told from its bytes: QEMU shows stores, but not which
//! of them go past the cache, nor the instructions that have no effect where there is no cache.
//!
//! All are taken to be executed in 64-bit mode.

use crate::record::{Fence, How, WriteBack};
use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};

/// What an instruction does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Effect {
    /// How its stores get to memory, if it has any.
    pub stores: How,
    /// What else it does, before its stores.
    pub action: Option<Action>,
}

/// What an instruction does besides storing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// It waits for earlier ones.
    Fence(Fence),
    /// It writes a line back: the one that has this byte.
    WriteBack(WriteBack, Memory),
    /// It writes so many bytes to an I/O port, the lowest of `rax`.
    Out(Port, u8),
}

/// An I/O port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Port {
    /// This one.
    Immediate(u8),
    /// The one whose number is in `dx`.
    Dx,
}

/// Where an instruction's operand is in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory(Instruction);

impl Memory {
    /// Its virtual address. `register` is to give the value of a register by the name that a debugger has for it, such as
    /// `rax` or `gs_base`; if it cannot, neither can this.
    pub fn address(&self, mut register: impl FnMut(&'static str) -> Option<u64>) -> Option<u64> {
        self.0.virtual_address(0, 0, |of, _, _| match of {
            Register::ES | Register::CS | Register::SS | Register::DS => Some(0),
            of => register(name(of)?),
        })
    }
}

fn name(register: Register) -> Option<&'static str> {
    Some(match register {
        Register::FS => "fs_base",
        Register::GS => "gs_base",
        _ => match register.full_register() {
            Register::RAX => "rax",
            Register::RBX => "rbx",
            Register::RCX => "rcx",
            Register::RDX => "rdx",
            Register::RSI => "rsi",
            Register::RDI => "rdi",
            Register::RBP => "rbp",
            Register::RSP => "rsp",
            Register::R8 => "r8",
            Register::R9 => "r9",
            Register::R10 => "r10",
            Register::R11 => "r11",
            Register::R12 => "r12",
            Register::R13 => "r13",
            Register::R14 => "r14",
            Register::R15 => "r15",
            _ => return None,
        },
    })
}

/// Tells what the instruction of these bytes does, which is at the virtual address `pc`.
pub fn effect(bytes: &[u8], pc: u64) -> Effect {
    let instruction = Decoder::with_ip(64, bytes, pc, DecoderOptions::NONE).decode();
    Effect {
        stores: stores(&instruction),
        action: action(&instruction),
    }
}

fn stores(instruction: &Instruction) -> How {
    match instruction.mnemonic() {
        Mnemonic::Movnti
        | Mnemonic::Movntq
        | Mnemonic::Movntdq
        | Mnemonic::Movntps
        | Mnemonic::Movntpd
        | Mnemonic::Movntss
        | Mnemonic::Movntsd
        | Mnemonic::Vmovntdq
        | Mnemonic::Vmovntps
        | Mnemonic::Vmovntpd
        | Mnemonic::Maskmovq
        | Mnemonic::Maskmovdqu
        | Mnemonic::Vmaskmovdqu
        // Direct stores combine as those do.
        | Mnemonic::Movdiri
        | Mnemonic::Movdir64b => How::NonTemporal,
        _ => How::Cached,
    }
}

fn action(instruction: &Instruction) -> Option<Action> {
    let write_back = |how| Action::WriteBack(how, Memory(*instruction));
    Some(match instruction.mnemonic() {
        _ if instruction.has_lock_prefix() => Action::Fence(Fence::Locked),
        Mnemonic::Xchg if has_memory(instruction) => Action::Fence(Fence::Locked),
        Mnemonic::Sfence => Action::Fence(Fence::Sfence),
        Mnemonic::Mfence => Action::Fence(Fence::Mfence),
        Mnemonic::Clwb => write_back(WriteBack::Clwb),
        Mnemonic::Clflushopt => write_back(WriteBack::Clflushopt),
        Mnemonic::Clflush => write_back(WriteBack::Clflush),
        Mnemonic::Out => {
            let port = match instruction.op0_kind() {
                OpKind::Immediate8 => Port::Immediate(instruction.immediate8()),
                _ => Port::Dx,
            };
            Action::Out(port, instruction.op1_register().size() as u8)
        }
        _ if is_serializing(instruction) => Action::Fence(Fence::Serializing),
        _ => return None,
    })
}

fn has_memory(instruction: &Instruction) -> bool {
    instruction.op_kinds().any(|kind| kind == OpKind::Memory)
}

/// Whether it is one of those that the SDM lists. `wrmsr` is not among them here, as it does not serialize for each
/// register, nor are exceptions and interrupts.
fn is_serializing(instruction: &Instruction) -> bool {
    match instruction.mnemonic() {
        Mnemonic::Cpuid
        | Mnemonic::Iret
        | Mnemonic::Iretd
        | Mnemonic::Iretq
        | Mnemonic::Rsm
        | Mnemonic::Serialize
        | Mnemonic::Invd
        | Mnemonic::Wbinvd
        | Mnemonic::Invlpg
        | Mnemonic::Invpcid
        | Mnemonic::Invept
        | Mnemonic::Invvpid
        | Mnemonic::Lgdt
        | Mnemonic::Lidt
        | Mnemonic::Lldt
        | Mnemonic::Ltr => true,
        Mnemonic::Mov => {
            let to = instruction.op0_register();
            to.is_dr() || to.is_cr() && to != Register::CR8
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn effect(bytes: &[u8]) -> Effect {
        super::effect(bytes, 0xffff_ffff_8100_0000)
    }

    #[test]
    fn non_temporal_stores() {
        for bytes in [
            // movnti [rdi], eax; movnti [rdi+8], rax
            &b"\x0f\xc3\x07"[..],
            b"\x48\x0f\xc3\x47\x08",
            // movntdq, movntps, movntpd, movntq
            b"\x66\x0f\xe7\x07",
            b"\x0f\x2b\x07",
            b"\x66\x0f\x2b\x07",
            b"\x0f\xe7\x07",
            // vmovntdq [rdi], ymm0; [rdi], zmm0
            b"\xc5\xfd\xe7\x07",
            b"\x62\xf1\x7d\x48\xe7\x07",
            // maskmovdqu xmm0, xmm1
            b"\x66\x0f\xf7\xc1",
            // movdiri [rdi], rax; movdir64b rdi, [rsi]
            b"\x48\x0f\x38\xf9\x07",
            b"\x66\x0f\x38\xf8\x3e",
        ] {
            let non_temporal = Effect {
                stores: How::NonTemporal,
                action: None,
            };
            assert_eq!(effect(bytes), non_temporal, "{bytes:02x?}");
        }
    }

    #[test]
    fn what_is_nothing_special() {
        for bytes in [
            // mov [rdi], rax; movdqa [rdi], xmm0; rep stosq; movntdqa xmm0, [rdi], which loads
            &b"\x48\x89\x07"[..],
            b"\x66\x0f\x7f\x07",
            b"\xf3\x48\xab",
            b"\x66\x0f\x38\x2a\x07",
            // lfence; xchg ax, ax; xchg rax, rbx; add [rdi], rax
            b"\x0f\xae\xe8",
            b"\x66\x90",
            b"\x48\x93",
            b"\x48\x01\x07",
            // mov rax, cr3; mov cr8, rax; rdmsr; wrmsr; outsb
            b"\x0f\x20\xd8",
            b"\x44\x0f\x22\xc0",
            b"\x0f\x32",
            b"\x0f\x30",
            b"\x6e",
            // Nothing, and the beginning of something.
            b"",
            b"\x66\x0f\xae",
        ] {
            let nothing = Effect {
                stores: How::Cached,
                action: None,
            };
            assert_eq!(effect(bytes), nothing, "{bytes:02x?}");
        }
    }

    #[test]
    fn fences() {
        for (bytes, kind) in [
            (&b"\x0f\xae\xf8"[..], Fence::Sfence),
            (b"\x0f\xae\xf0", Fence::Mfence),
            // lock add [rdi], rax; lock or byte [rsp], 0; lock cmpxchg16b [rdi]
            (b"\xf0\x48\x01\x07", Fence::Locked),
            (b"\xf0\x80\x0c\x24\x00", Fence::Locked),
            (b"\xf0\x48\x0f\xc7\x0f", Fence::Locked),
            // xchg [rdi], rax, which is locked without saying so
            (b"\x48\x87\x07", Fence::Locked),
            // cpuid; iretq; invlpg [rdi]; mov cr3, rax; mov dr7, rax; serialize
            (b"\x0f\xa2", Fence::Serializing),
            (b"\x48\xcf", Fence::Serializing),
            (b"\x0f\x01\x3f", Fence::Serializing),
            (b"\x0f\x22\xd8", Fence::Serializing),
            (b"\x0f\x23\xf8", Fence::Serializing),
            (b"\x0f\x01\xe8", Fence::Serializing),
        ] {
            let fence = Effect {
                stores: How::Cached,
                action: Some(Action::Fence(kind)),
            };
            assert_eq!(effect(bytes), fence, "{bytes:02x?}");
        }
    }

    #[test]
    fn write_backs_and_where() {
        let register = |name: &str| {
            Some(match name {
                "rax" => 0x1000,
                "rdi" => 0xffff_8880_0000_0000,
                "r12" => 0x30,
                "rsp" => 0x7000,
                "gs_base" => 0xffff_0000_0000,
                "rbx" => 0xf_ffff_ffff,
                _ => return None,
            })
        };
        for (bytes, how, address) in [
            // clwb [rdi]; clwb [rdi + r12*4 + 0x12]
            (
                &b"\x66\x0f\xae\x37"[..],
                WriteBack::Clwb,
                Some(0xffff_8880_0000_0000),
            ),
            (
                b"\x66\x42\x0f\xae\x74\xa7\x12",
                WriteBack::Clwb,
                Some(0xffff_8880_0000_00d2),
            ),
            // clflushopt [rax - 0x40]; clflush [rsp]
            (b"\x66\x0f\xae\x78\xc0", WriteBack::Clflushopt, Some(0xfc0)),
            (b"\x0f\xae\x3c\x24", WriteBack::Clflush, Some(0x7000)),
            // As alternatives have it, with a prefix that is one of addresses.
            (b"\x3e\x0f\xae\x38", WriteBack::Clflush, Some(0x1000)),
            // clflush gs:[rax]; clflush [ebx]; clflush [rip + 0x10]
            (
                b"\x65\x0f\xae\x38",
                WriteBack::Clflush,
                Some(0xffff_0000_1000),
            ),
            (b"\x67\x0f\xae\x3b", WriteBack::Clflush, Some(0xffff_ffff)),
            (
                b"\x0f\xae\x3d\x10\x00\x00\x00",
                WriteBack::Clflush,
                Some(0xffff_ffff_8100_0017),
            ),
            // clflush [r9], which has no value
            (b"\x41\x0f\xae\x39", WriteBack::Clflush, None),
        ] {
            let effect = effect(bytes);
            let Some(Action::WriteBack(is, memory)) = effect.action else {
                panic!("{bytes:02x?}: {effect:?}");
            };
            assert_eq!(
                (is, memory.address(register)),
                (how, address),
                "{bytes:02x?}"
            );
        }
    }

    #[test]
    fn ports() {
        for (bytes, port, len) in [
            // out dx, al; out dx, ax; out dx, eax; out 0x5e, al
            (&b"\xee"[..], Port::Dx, 1),
            (b"\x66\xef", Port::Dx, 2),
            (b"\xef", Port::Dx, 4),
            (b"\xe6\x5e", Port::Immediate(0x5e), 1),
        ] {
            let out = Action::Out(port, len);
            assert_eq!(effect(bytes).action, Some(out), "{bytes:02x?}");
        }
    }
}
