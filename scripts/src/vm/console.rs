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
    let lines: Vec<&str> = console.lines().collect();
    (0..lines.len())
        .filter(|&at| {
            let text = message(lines[at]);
            let marked = MARKS.iter().any(|mark| text.contains(mark));
            marked && !harmless(text) && !of_pciehp(&lines[at..])
        })
        .map(|at| lines[at].to_owned())
        .collect()
}

/// Whether a report of lockdep's begins here that is about PCIe hotplug itself: whatever comes into a slot, the function
/// that configures it lets go of the first of two locks while drivers are bound, and takes it again below the second.
fn of_pciehp(report: &[&str]) -> bool {
    let Some((first, rest)) = report.split_first() else {
        return false;
    };
    let mut locks = rest
        .iter()
        .take_while(|line| !line.contains("existing dependency chain"))
        .filter_map(|line| line.split_once("}, at: "));
    let mut taken = |lock: &str| {
        locks
            .next()
            .is_some_and(|(what, place)| what.contains(lock) && place.starts_with("pciehp_"))
    };
    first.contains("possible circular locking dependency")
        && taken("(&ctrl->reset_lock)")
        && taken("(pci_rescan_remove_lock)")
        && locks.next().is_none()
}

/// Whether the kernel has measured its clock against a timer of which it missed a part, as on a busy host: it believes
/// that rather than the one that it says it deviates from. Timeouts then end 3 to 60 times too early.
pub fn clock_is_wrong(console: &str) -> bool {
    console.contains("tsc: PIT calibration deviates from")
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

    /// In a machine whose clock runs fast, whatever takes its time looks like a lockup.
    #[test]
    fn a_wrong_clock_is_seen() {
        let usual = "[    0.028000] tsc: Unable to calibrate against PIT\n";
        let wrong = "[    0.028000] tsc: PIT calibration deviates from HPET: 38906 2593302\n";
        assert!(!clock_is_wrong(usual));
        assert!(clock_is_wrong(&format!("{usual}{wrong}")));
    }

    #[test]
    fn a_report_about_hotplug_itself_is_known() {
        let report = "\
[   13.675018] WARNING: possible circular locking dependency detected
[   13.675772] irq/24-pciehp/38 is trying to acquire lock:
[   13.675907] ffff8880080212d8 (&ctrl->reset_lock){.+.+}-{4:4}, at: pciehp_configure_device+0x17d/0x380
[   13.676785] but task is already holding lock:
[   13.681771] ffffffff82faf6c0 (pci_rescan_remove_lock){+.+.}-{4:4}, at: pciehp_configure_device+0x75/0x380
[   13.682274] the existing dependency chain (in reverse order) is:";
        assert_eq!(complaints(report), [""; 0]);
        let first = report.lines().next().unwrap();
        for (from, to) in [
            ("reset_lock", "other_lock"),
            ("at: pciehp_configure", "at: iopmem_probe"),
            ("(pci_rescan_remove_lock)", "(&x->mutex)"),
            ("possible circular", "possible recursive"),
        ] {
            let other = report.replace(from, to);
            assert_eq!(complaints(&other).len(), 1, "{other}");
        }
        let end = "[   13.7] BUG: KASAN: x";
        assert_eq!(complaints(&format!("{report}\n{end}")), [end]);
        assert_eq!(complaints(&format!("{first}\n{end}")), [first, end]);
    }

    #[test]
    fn the_tail_is_the_end() {
        assert_eq!(tail("a\nb\nc\n", 2), "    b\n    c");
        assert_eq!(tail("", 2), "    (nothing)");
    }
}
