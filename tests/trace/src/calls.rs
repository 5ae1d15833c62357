// SPDX-License-Identifier: GPL-2.0-only

//! The instructions that system calls take: which the kernel executes, and how often.
//!
//! A program marks a system call by an instruction before it, `pause`, which does nothing and is rare. What a CPU
//! executes in the kernel's half of the address space from then on, until it is back in a program, is what the call
//! takes. Interrupts and other tasks may come in between, and some calls have more to do than others, such as to get
//! memory. So calls are compared, instruction for instruction: most of them are the same, and these are what is told.
//! Where there are two ways that are about as frequent, the shorter one is.
//!
//! ```text
//! host    "begin"
//! plugin  "done"
//!
//! host    "report"
//! plugin  {"calls":{"all":100,"same":98,"instructions":[{"pc":18446744071578845184,"count":1,"streams":false},...]}}
//! ```
//!
//! The machine has one CPU. [`Counter`] is the plugin's side without QEMU, [`ask`] is the host's.

use crate::socket;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The kernel's half of the address space begins here.
pub const KERNEL: u64 = 1 << 63;

/// What the host asks of the plugin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Forget what was counted, and count from now on. Answered by [`Reply::Done`].
    Begin,
    /// Tell what was counted. Answered by [`Reply::Calls`].
    Report,
}

/// What the plugin answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// It was done.
    Done,
    /// What was counted since the last [`Request::Begin`].
    Calls(Calls),
    /// It cannot be done, and why.
    Refused(String),
}

/// An instruction of the kernel's that a call executes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Executed {
    /// Its virtual address.
    pub pc: u64,
    /// How often it is executed. The steps of a string instruction are one.
    pub count: u64,
    /// Whether it stores past the cache: `movnti`.
    pub streams: bool,
}

/// System calls that were counted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Calls {
    /// How many there were.
    pub all: u64,
    /// How many of these executed the very same instructions, each as often.
    pub same: u64,
    /// Which, by address.
    pub instructions: Vec<Executed>,
}

impl Calls {
    /// How many instructions a call takes.
    pub fn count(&self) -> u64 {
        self.instructions
            .iter()
            .map(|executed| executed.count)
            .sum()
    }
}

/// Nothing was asked for.
const OFF: u8 = 0;
/// No call that was marked is under way.
const IDLE: u8 = 1;
/// The next call is to be counted.
const ARMED: u8 = 2;
/// A call is counted.
const COUNTING: u8 = 3;

/// Counts what a CPU executes in system calls that are marked.
#[derive(Debug, Default)]
pub struct Counter {
    /// One of those above.
    phase: AtomicU8,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// What the call under way has executed, in this order, and whether that streams.
    executed: Vec<(u64, bool)>,
    /// Calls that are over, and how many there were of each.
    calls: BTreeMap<Vec<Executed>, u64>,
}

impl Counter {
    /// Counts nothing yet.
    pub const fn new() -> Self {
        Self {
            phase: AtomicU8::new(OFF),
            state: Mutex::new(State {
                executed: Vec::new(),
                calls: BTreeMap::new(),
            }),
        }
    }

    fn phase(&self) -> u8 {
        self.phase.load(Ordering::Relaxed)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it counts anything. A machine runs faster while it needs not be told.
    pub fn is_on(&self) -> bool {
        self.phase() != OFF
    }

    /// A program executes its mark.
    pub fn mark(&self) {
        if self.phase() == IDLE {
            self.phase.store(ARMED, Ordering::Relaxed);
        }
    }

    /// A program calls the system.
    pub fn call(&self) {
        if self.phase() == ARMED {
            self.state().executed.clear();
            self.phase.store(COUNTING, Ordering::Relaxed);
        }
    }

    /// The kernel executes the instruction at `pc`.
    pub fn execute(&self, pc: u64, streams: bool) {
        if self.phase() != COUNTING {
            return;
        }
        let mut state = self.state();
        // String instructions are executed again for each step, or for many at once.
        if state.executed.last() != Some(&(pc, streams)) {
            state.executed.push((pc, streams));
        }
    }

    /// A program executes something.
    pub fn program(&self) {
        if self.phase() != COUNTING {
            return;
        }
        let mut state = self.state();
        let mut counts: BTreeMap<(u64, bool), u64> = BTreeMap::new();
        for executed in std::mem::take(&mut state.executed) {
            *counts.entry(executed).or_default() += 1;
        }
        let call = counts
            .into_iter()
            .map(|((pc, streams), count)| Executed { pc, count, streams });
        *state.calls.entry(call.collect()).or_default() += 1;
        self.phase.store(IDLE, Ordering::Relaxed);
    }

    /// Does what the host asks for.
    pub fn answer(&self, request: Request) -> Reply {
        let mut state = self.state();
        match request {
            Request::Begin => {
                *state = State::default();
                self.phase.store(IDLE, Ordering::Relaxed);
                Reply::Done
            }
            Request::Report => {
                // Which of two frequent ways is the more frequent one is chance, and which is shorter is not.
                let frequent = state
                    .calls
                    .values()
                    .max()
                    .map_or(0, |most| most.div_ceil(2));
                let most = state
                    .calls
                    .iter()
                    .filter(|(_, &same)| same >= frequent)
                    .min_by_key(|(call, _)| -> u64 {
                        call.iter().map(|executed| executed.count).sum()
                    });
                Reply::Calls(Calls {
                    all: state.calls.values().sum(),
                    same: most.map_or(0, |(_, &same)| same),
                    instructions: most.map_or_else(Vec::new, |(call, _)| call.clone()),
                })
            }
        }
    }

    /// Answers who connects, one after the other, for as long as the socket is there.
    pub fn serve(&self, listener: &UnixListener) {
        socket::serve(listener, |request| match request {
            Ok(request) => self.answer(request),
            Err(why) => Reply::Refused(why),
        });
    }
}

/// Asks the plugin that listens on `socket`.
pub fn ask(socket: &Path, request: Request) -> io::Result<Reply> {
    socket::ask(socket, &request)
}

/// What an instruction is to a [`Counter`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Instruction {
    /// `pause`.
    Mark,
    /// `syscall`.
    Call,
    /// `movnti`.
    Stream,
    /// Any other.
    Other,
}

impl Instruction {
    /// Looks at the bytes of an instruction.
    pub fn decode(bytes: &[u8]) -> Self {
        match bytes {
            [0xf3, 0x90] => return Self::Mark,
            [0x0f, 0x05] => return Self::Call,
            _ => {}
        }
        // Prefixes: of segments and sizes, then REX.
        let prefix = |byte: &u8| matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67);
        let rest = bytes.iter().position(|byte| !prefix(byte));
        match rest.and_then(|at| bytes.get(at..)) {
            Some([0x40..=0x4f, 0x0f, 0xc3, ..] | [0x0f, 0xc3, ..]) => Self::Stream,
            _ => Self::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PC: u64 = KERNEL + 0x1000;

    fn counting() -> Counter {
        let counter = Counter::new();
        assert_eq!(counter.answer(Request::Begin), Reply::Done);
        assert!(counter.is_on());
        counter
    }

    fn report(counter: &Counter) -> Calls {
        match counter.answer(Request::Report) {
            Reply::Calls(calls) => calls,
            other => panic!("{other:?}"),
        }
    }

    /// A call that is marked, and a program's instruction after it.
    fn call(counter: &Counter, pcs: &[u64]) {
        counter.program();
        counter.mark();
        counter.call();
        for &pc in pcs {
            counter.execute(pc, false);
        }
        counter.program();
    }

    fn executed(pc: u64, count: u64) -> Executed {
        Executed {
            pc,
            count,
            streams: false,
        }
    }

    #[test]
    fn most_calls_are_what_is_told() {
        let counter = counting();
        for _ in 0..3 {
            call(&counter, &[PC, PC + 8, PC, PC + 8]);
        }
        // An interrupt.
        call(&counter, &[PC, PC + 0x100, PC + 8, PC, PC + 8]);
        let calls = report(&counter);
        assert_eq!((calls.all, calls.same), (4, 3));
        assert_eq!(calls.instructions, [executed(PC, 2), executed(PC + 8, 2)]);
        assert_eq!(calls.count(), 4);
        // A report forgets nothing, the next beginning all.
        assert_eq!(report(&counter), calls);
        counter.answer(Request::Begin);
        assert_eq!(report(&counter), Calls::default());
    }

    #[test]
    fn of_about_as_many_the_shorter_ones() {
        let counter = counting();
        for _ in 0..5 {
            call(&counter, &[PC, PC + 4, PC + 8]);
        }
        for _ in 0..2 {
            call(&counter, &[PC]);
        }
        assert_eq!(report(&counter).count(), 3);
        for _ in 0..3 {
            call(&counter, &[PC + 4, PC + 8]);
        }
        assert_eq!(report(&counter).count(), 2);

        let counter = counting();
        call(&counter, &[PC, PC + 4, PC + 8]);
        call(&counter, &[PC + 4, PC + 8]);
        call(&counter, &[PC, PC + 4, PC + 8, PC + 12]);
        assert_eq!(report(&counter).count(), 2);
    }

    #[test]
    fn a_string_instruction_is_one() {
        let counter = counting();
        call(&counter, &[PC, PC + 4, PC + 4, PC + 4, PC + 6]);
        assert_eq!(report(&counter).count(), 3);
    }

    #[test]
    fn what_is_not_marked_is_not_counted() {
        let counter = counting();
        counter.call();
        counter.execute(PC, false);
        counter.program();
        // The mark is for one call.
        call(&counter, &[PC]);
        counter.call();
        counter.execute(PC + 4, false);
        counter.program();
        let calls = report(&counter);
        assert_eq!((calls.all, calls.instructions), (1, vec![executed(PC, 1)]));
    }

    #[test]
    fn nothing_is_counted_before_it_is_asked_for() {
        let counter = Counter::new();
        assert!(!counter.is_on());
        call(&counter, &[PC]);
        assert_eq!(report(&counter), Calls::default());
    }

    /// As objdump has them.
    #[test]
    fn instructions_are_known_by_their_bytes() {
        for (bytes, instruction) in [
            (&[0xf3, 0x90][..], Instruction::Mark),
            (&[0x90], Instruction::Other),
            (&[0x0f, 0x05], Instruction::Call),
            // movnti %r8,(%rdi)
            (&[0x4c, 0x0f, 0xc3, 0x07], Instruction::Stream),
            // movnti %eax,0x10(%rdi)
            (&[0x0f, 0xc3, 0x47, 0x10], Instruction::Stream),
            // movnti %rax,%gs:(%rdi)
            (&[0x65, 0x48, 0x0f, 0xc3, 0x07], Instruction::Stream),
            // mov %rax,(%rdi)
            (&[0x48, 0x89, 0x07], Instruction::Other),
            // A displacement that has the same bytes.
            (
                &[0x48, 0x89, 0x87, 0x0f, 0xc3, 0x00, 0x00],
                Instruction::Other,
            ),
            (&[], Instruction::Other),
            (&[0x48], Instruction::Other),
        ] {
            assert_eq!(Instruction::decode(bytes), instruction, "{bytes:02x?}");
        }
    }

    #[test]
    fn lines_are_as_documented() {
        assert_eq!(serde_json::to_string(&Request::Begin).unwrap(), "\"begin\"");
        let reply = Reply::Calls(Calls {
            all: 100,
            same: 98,
            instructions: vec![executed(0xffff_ffff_8100_0000, 1)],
        });
        let line = serde_json::to_string(&reply).unwrap();
        assert_eq!(
            line,
            r#"{"calls":{"all":100,"same":98,"instructions":[{"pc":18446744071578845184,"count":1,"streams":false}]}}"#
        );
        assert_eq!(serde_json::from_str::<Reply>(&line).unwrap(), reply);
    }
}
