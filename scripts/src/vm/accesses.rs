// SPDX-License-Identifier: GPL-2.0-only

//! How a guest's CPUs access its physical memory.
//!
//! QEMU's own plugins see each access of a CPU that is emulated. Ours, the crate `pmem-plugin`, counts those to one range,
//! or records them, and answers over a socket in the machine's directory.

use super::{value, Persistent};
use crate::crates;
use crate::progress::Progress;
use anyhow::{ensure, Result};
use pmem_trace::Counted;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// The plugin's socket, in the machine's directory.
pub(super) const SOCKET: &str = "accesses";

/// The plugin, built once a run. It wants no more of a C library than a program of Rust's does, which the build root's
/// has, also if the host's is newer.
pub(super) fn plugin(progress: &Progress) -> Result<PathBuf> {
    static BUILT: Mutex<Option<PathBuf>> = Mutex::new(None);
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    match &*built {
        Some(path) => Ok(path.clone()),
        None => {
            let results = crates::build("pmem-plugin", "plugin", "", "QEMU plugin", progress)?;
            Ok(built.insert(results.join("libpmem_plugin.so")).clone())
        }
    }
}

/// QEMU's arguments. With `memory`, which is all that the guest has from the physical address 0 on, the plugin can record.
pub(super) fn arguments(plugin: &Path, memory: Option<&Persistent>) -> [String; 2] {
    let mut arguments = format!("{},socket={SOCKET}", value(plugin));
    if let Some(memory) = memory {
        arguments += &format!(",ram={}", value(&memory.path()));
    }
    ["-plugin".into(), arguments]
}

/// The file in the machine's directory that recording number `n` is kept in.
pub(super) fn log(n: u32) -> String {
    format!("log-{n}")
}

/// What the guest runs to tell the functions that have the instructions at `addresses`.
pub(super) fn lookup(addresses: impl Iterator<Item = u64>) -> Vec<String> {
    let addresses = addresses.map(|address| format!("{address:#x}"));
    ["pmem-guest".to_owned(), "functions".to_owned()]
        .into_iter()
        .chain(addresses)
        .collect()
}

/// A line for each of `counted`, with what [`lookup`] wrote: a function a line.
pub(super) fn explain(counted: &[Counted], functions: &str) -> Result<String> {
    let functions: Vec<&str> = functions.lines().collect();
    ensure!(
        functions.len() == counted.len(),
        "the guest was asked for {} functions and wrote {functions:?}",
        counted.len()
    );
    let lines = counted.iter().zip(functions).map(|(counted, function)| {
        let Counted { shape, count, .. } = counted;
        format!("{count} x {shape}, by {function}")
    });
    Ok(lines.collect::<Vec<_>>().join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pmem_trace::{Kind, Shape};

    #[test]
    fn each_access_has_its_function() {
        let counted = [0xffff_ffff_c000_0012, 0x40_1000].map(|pc| Counted {
            shape: Shape::misaligned(Kind::Load, 4),
            pc,
            count: 3,
        });
        assert_eq!(
            lookup(counted.iter().map(|counted| counted.pc)),
            ["pmem-guest", "functions", "0xffffffffc0000012", "0x401000"]
        );
        assert_eq!(
            explain(&counted, "copy+0x2 [pmem]\n0x401000\n").unwrap(),
            "3 x load of 4 bytes, misaligned, by copy+0x2 [pmem]\n\
             3 x load of 4 bytes, misaligned, by 0x401000"
        );
        assert!(explain(&counted, "copy+0x2 [pmem]\n").is_err());
        assert_eq!(explain(&[], "").unwrap(), "");
    }
}
