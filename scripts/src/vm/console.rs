// SPDX-License-Identifier: GPL-2.0-only

//! What a guest's kernel prints when something is wrong.

/// How the lines begin that report a fault of the kernel's, after the time.
const MARKS: &[&str] = &[
    "BUG:",
    "WARNING:",
    "Oops:",
    "Kernel panic",
    "general protection fault",
    "kernel BUG at",
    "divide error",
    "invalid opcode",
    "Unable to handle",
    "UBSAN:",
    "KASAN:",
    "KCSAN:",
    "INFO: task",
    "INFO: possible",
    "INFO: suspicious",
    "INFO: rcu",
    "rcu: INFO:",
    "INFO: trying to register non-static key",
    "WARNING: possible",
    "rust_kernel: panicked",
    "panicked at",
    "kmemleak:",
    "refcount_t:",
    "list_add corruption",
    "list_del corruption",
    "Bad page state",
    "------------[ cut here ]",
];

/// The lines of `console` in which the kernel reports a fault.
pub fn complaints(console: &str) -> Vec<String> {
    console
        .lines()
        .filter(|line| {
            let text = message(line);
            MARKS.iter().any(|mark| text.contains(mark)) && !harmless(text)
        })
        .map(str::to_owned)
        .collect()
}

/// Of kmemleak only a report of leaks matters.
fn harmless(text: &str) -> bool {
    text.contains("kmemleak:") && !text.contains("new suspected memory leaks")
}

/// A line without its time.
fn message(line: &str) -> &str {
    line.strip_prefix('[')
        .and_then(|rest| rest.split_once("] "))
        .map_or(line, |(_, text)| text)
}

/// The last `n` lines, indented.
pub fn tail(text: &str, n: usize) -> String {
    let lines: Vec<&str> = text.trim_end().lines().collect();
    let tail = &lines[lines.len().saturating_sub(n)..];
    if tail.is_empty() {
        return "    (nothing)".into();
    }
    format!("    {}", tail.join("\n    "))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A splat that is not seen makes every test of a broken driver pass.
    #[test]
    fn faults_are_seen() {
        for line in [
            "[    5.123456] BUG: kernel NULL pointer dereference, address: 0000000000000000",
            "[    5.123456] WARNING: CPU: 1 PID: 77 at mm/memremap.c:123 memremap_pages+0x1/0x2 [pmem]",
            "[    5.123456] Oops: Oops: 0000 [#1] SMP NOPTI",
            "[    5.123456] Kernel panic - not syncing: Attempted to kill init!",
            "[    5.123456] WARNING: possible circular locking dependency detected",
            "[    5.123456] BUG: KASAN: slab-use-after-free in x",
            "[    5.123456] rust_kernel: panicked at drivers/device.rs:3:4:",
            "[    5.123456] kmemleak: 3 new suspected memory leaks (see /sys/kernel/debug/kmemleak)",
            "[    5.123456] ------------[ cut here ]------------",
        ] {
            assert_eq!(complaints(line), [line]);
        }
    }

    #[test]
    fn ordinary_lines_are_not_faults() {
        for line in [
            "[    5.123456] pmem: loading out-of-tree module taints kernel.",
            "[    5.123456] pmem: module verification failed: signature and/or required key missing - tainting kernel",
            "[    5.123456] EXT4-fs (pmem0): mounted filesystem with ordered data mode",
            "[    5.123456] kmemleak: Kernel memory leak detector initialized",
            "[    5.123456] debug: ignoring loglevel setting.",
        ] {
            assert_eq!(complaints(line), [""; 0], "{line}");
        }
    }

    #[test]
    fn the_tail_is_the_end() {
        assert_eq!(tail("a\nb\nc\n", 2), "    b\n    c");
        assert_eq!(tail("", 2), "    (nothing)");
    }
}
