// SPDX-License-Identifier: GPL-2.0-only

//! What a guest's kernel executes for a system call.
//!
//! The guest makes the call many times (`pmem-guest calls`), the plugin counts, and the guest tells which functions the
//! instructions are in.

use super::value;
use anyhow::{ensure, Context, Result};
use pmem_trace::calls::{Calls, Executed};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// The plugin's socket, in the machine's directory.
pub(super) const SOCKET: &str = "calls";

/// The CPU: all that QEMU has, also what the clock of [`Accelerator::Counted`](super::Accelerator::Counted) counts too
/// much for, as it is not the clock that counts.
pub(super) const CPU: [&str; 2] = ["-cpu", "max,la57=off"];

/// QEMU's arguments.
pub(super) fn arguments(plugin: &Path) -> [String; 2] {
    [
        "-plugin".into(),
        format!("{},calls={SOCKET}", value(plugin)),
    ]
}

/// A system call, instruction by instruction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SystemCall {
    /// How many such calls there were.
    pub all: u64,
    /// How many of these were as the rest of this says.
    pub same: u64,
    /// What is executed, by address.
    pub steps: Vec<Step>,
}

/// An instruction of a [`SystemCall`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// The instruction, and how often it is executed.
    pub executed: Executed,
    /// The function that it is in.
    pub function: String,
    /// How far from the function's start.
    pub offset: u64,
    /// The module that the function is in.
    pub module: Option<String>,
}

impl SystemCall {
    /// How many instructions of those that `of` chooses are executed.
    pub fn count(&self, of: impl Fn(&Step) -> bool) -> u64 {
        let steps = self.steps.iter().filter(|step| of(step));
        steps.map(|step| step.executed.count).sum()
    }
}

/// The addresses of all instructions of `calls`, each once.
pub(super) fn addresses(calls: &[Calls]) -> BTreeSet<u64> {
    let instructions = calls.iter().flat_map(|calls| &calls.instructions);
    instructions.map(|executed| executed.pc).collect()
}

/// `calls`, with what the guest wrote of `addresses`: a function a line.
pub(super) fn name(
    calls: &[Calls],
    addresses: &BTreeSet<u64>,
    functions: &str,
) -> Result<Vec<SystemCall>> {
    let lines: BTreeMap<u64, &str> = addresses.iter().copied().zip(functions.lines()).collect();
    ensure!(
        functions.lines().count() == addresses.len(),
        "the guest was asked for {} functions and wrote {functions:?}",
        addresses.len()
    );
    let step = |&executed: &Executed| {
        let line = lines.get(&executed.pc).context("a function is missing")?;
        Step::parse(executed, line)
    };
    let named = |calls: &Calls| {
        Ok(SystemCall {
            all: calls.all,
            same: calls.same,
            steps: calls.instructions.iter().map(step).collect::<Result<_>>()?,
        })
    };
    calls.iter().map(named).collect()
}

impl Step {
    /// A line is `FUNCTION+0xOFFSET`, and `[MODULE]` after that if it is of a module.
    fn parse(executed: Executed, line: &str) -> Result<Self> {
        let parse = || {
            let (place, module) = match line.split_once(' ') {
                Some((place, module)) => (place, Some(module.trim_matches(['[', ']']).to_owned())),
                None => (line, None),
            };
            let (function, offset) = place.rsplit_once("+0x")?;
            Some(Self {
                executed,
                function: function.to_owned(),
                offset: u64::from_str_radix(offset, 16).ok()?,
                module,
            })
        };
        parse().with_context(|| format!("{line:?} is not a function of the kernel's"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOW: u64 = 0xffff_ffff_8100_0010;
    const HIGH: u64 = 0xffff_ffff_c000_0020;

    #[test]
    fn each_instruction_has_its_function() {
        let executed = |pc, count| Executed {
            pc,
            count,
            streams: false,
        };
        let calls = [
            vec![executed(LOW, 3), executed(HIGH, 1)],
            vec![executed(HIGH, 7)],
        ];
        let calls = calls.map(|instructions| Calls {
            all: 5,
            same: 4,
            instructions,
        });
        let addresses = addresses(&calls);
        assert_eq!(Vec::from_iter(addresses.clone()), [LOW, HIGH]);
        let functions = "vfs_read+0x10\ncopy<a+b>+0x20 [pmem]\n";
        let named = name(&calls, &addresses, functions).unwrap();
        let [call, other] = &named[..] else {
            panic!("{named:?}");
        };
        assert_eq!(other.count(|step| step.function == "copy<a+b>"), 7);
        assert_eq!((call.all, call.same), (5, 4));
        assert_eq!(call.count(|_| true), 4);
        assert_eq!(call.count(|step| step.module.as_deref() == Some("pmem")), 1);
        let [first, second] = &call.steps[..] else {
            panic!("{call:?}");
        };
        assert_eq!((first.function.as_str(), first.offset), ("vfs_read", 0x10));
        assert_eq!(first.module, None);
        assert_eq!(second.function, "copy<a+b>");
        for wrong in ["vfs_read+0x10\n", "vfs_read+0x10\n0x401000\n"] {
            assert!(name(&calls, &addresses, wrong).is_err(), "{wrong}");
        }
    }
}
