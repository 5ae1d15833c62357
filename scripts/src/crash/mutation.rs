// SPDX-License-Identifier: GPL-2.0-only

//! Modules with a fault: what finds no fault has to find these.

use crate::kernel::Kernel;
use crate::module::{self, Module};
use crate::progress::Progress;
use crate::repo;
use crate::root::Root;
use anyhow::{ensure, Context, Result};
use clap::ValueEnum;
use std::fs;
use std::path::Path;

/// What is left out of the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Mutation {
    /// The fence after each write and for each flush.
    Fence,
    /// The fence for a flush alone. Without a journal to be written, whose blocks have fences, DAX needs it.
    Flush,
    /// The instruction that writes a line back.
    WriteBack,
    /// The write-back of the last line of each kilobyte, or less, that is stored through the cache.
    Edge,
}

impl Mutation {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fence => "fence",
            Self::Flush => "flush",
            Self::WriteBack => "write-back",
            Self::Edge => "edge",
        }
    }

    /// A workload that loses something by it.
    pub fn workload(self) -> &'static str {
        match self {
            Self::Fence => "raw-direct",
            Self::Flush => "ext4-map-sync",
            Self::WriteBack | Self::Edge => "raw-cached",
        }
    }

    /// The file, the text in it that is replaced, and by what.
    fn replacement(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::Fence => (
                "src/persist/x86_64.rs",
                "asm!(\"sfence\", options",
                "asm!(\"\", options",
            ),
            Self::Flush => (
                "drivers/device.rs",
                "Some(bio::Common::Flush) => {\n                self.persist.fence();",
                "Some(bio::Common::Flush) => {",
            ),
            Self::WriteBack => (
                "src/persist/x86_64.rs",
                "asm!(\"clwb [{}]\"",
                "asm!(\"# {}\"",
            ),
            Self::Edge => (
                "src/persist/mod.rs",
                "self.write_back(dst, step);",
                "self.write_back(dst, step.wrapping_sub(1) / LINE * LINE);",
            ),
        }
    }

    fn apply(self, text: &str) -> Result<String> {
        let (file, from, to) = self.replacement();
        let count = text.matches(from).count();
        ensure!(
            count == 1,
            "{file} has {count} times {from:?}, and must have it once: the mutation {} is to be written anew",
            self.name()
        );
        Ok(text.replace(from, to))
    }

    /// Builds a module with this fault from a copy of the sources.
    pub fn build(self, kernel: &Kernel, root: &Root, progress: &Progress) -> Result<Module> {
        let name = format!("mutation-{}", self.name());
        let tree = repo::target().join("crash").join(&name);
        let (file, ..) = self.replacement();
        for path in &repo::module_sources()? {
            let from = repo::dir().join(path);
            let mut content =
                fs::read(&from).with_context(|| format!("cannot read {}", from.display()))?;
            if path == Path::new(file) {
                content = self.apply(&String::from_utf8(content)?)?.into_bytes();
            }
            put(&tree.join(path), &content)?;
        }
        module::build_tree(kernel, root, progress, &tree, &name)
    }
}

/// Writes a file, unless it is as it should be: what does not change is not built again.
fn put(path: &Path, content: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|there| there == content) {
        return Ok(());
    }
    let write = || -> std::io::Result<()> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(path, content)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A mutation that changes nothing would be found by nobody, or by who finds faults that are not there.
    #[test]
    fn each_mutation_changes_the_sources() {
        for mutation in Mutation::value_variants() {
            let (file, ..) = mutation.replacement();
            let text = fs::read_to_string(repo::dir().join(file)).unwrap();
            assert_ne!(mutation.apply(&text).unwrap(), text);
            assert!(mutation.apply("").is_err());
            assert!(super::super::Workload::find(mutation.workload()).is_some());
        }
    }
}
