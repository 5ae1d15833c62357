// SPDX-License-Identifier: GPL-2.0-only

//! The kernels that the driver is for, each with the tests that it must pass.

use super::{count, has_vm_tests, summary, Suite, Tally};
use crate::flavour::Flavour;
use crate::kernel::{Kernel, Series, KERNEL_VARIABLE};
use crate::module;
use crate::root::Root;
use anyhow::{ensure, Result};
use std::process::ExitCode;
use std::time::Instant;

/// The flavours that Debian builds of each version.
const FLAVOURS: [Flavour; 2] = [Flavour::Cloud, Flavour::Amd64];

/// Parts of the names of the tests: some of each provider and each floor, of those that take no longer than others.
const TESTS: [&str; 26] = [
    "dax::map_sync_works",
    "dax::o_direct_from",
    "disks::one_two_and_seven",
    "disks::zeroing_zeroes",
    "e820::a_disk_for_each",
    "filesystems::ext4_with_dax",
    "filesystems::xfs_with_dax",
    "iopmem::contents::ext4_with_dax",
    "iopmem::contents::the_disk_says",
    "iopmem::plug::numbers_are",
    "kmem::contents::file_systems",
    "kmem::instances::an_instance",
    "kmem::memory::a_block_is",
    "kmem::refusals::memory_blocks",
    "lifecycle::data_outlives",
    "lifecycle::unload_is_refused",
    "media::bad_sectors",
    "media::memory_of_an_ext4_file",
    "memmap::struct_pages_on",
    "params::bad_parameters",
    "stock::debian_amd64",
    "sysfs::",
    "virtio::contents::ext4_with_dax",
    "virtio::flushes::a_flush_that_fails_fails_its_fsync",
    "virtio::flushes::programs_that",
    "virtio::plug::each_device",
];

/// Builds the module for each kernel, runs the tests there, and shows a summary.
pub(super) fn run(suite: &Suite<'_>) -> Result<ExitCode> {
    ensure!(has_vm_tests(), "there are no VM tests in tests/vm");
    let root = Root::ensure(&suite.progress)?;
    let mut lines = Vec::new();
    for series in Series::all() {
        let newest = Kernel::newest(series, &root, &suite.progress);
        for flavour in FLAVOURS {
            let started = Instant::now();
            let mut tally = Tally::default();
            let (name, result) = match &newest {
                Ok(base) => {
                    let release = Kernel::release_of(base, flavour);
                    suite.progress.heading(&format!("Linux {release}"));
                    let result = one(suite, &root, base, flavour, &release, &mut tally);
                    (release, result)
                }
                Err(error) => (
                    format!("{series} {flavour}"),
                    Err(anyhow::anyhow!("{error:#}")),
                ),
            };
            if let Err(error) = result {
                suite.progress.line(&format!("error: {error:#}"));
                if tally.failed == 0 {
                    tally += Tally::of(false);
                }
            }
            lines.push((name, tally, started.elapsed()));
        }
    }
    Ok(summary(&suite.progress, lines))
}

/// Builds the module for Debian's kernel `release`, and runs the tests there.
fn one(
    suite: &Suite<'_>,
    root: &Root,
    base: &str,
    flavour: Flavour,
    release: &str,
    tally: &mut Tally,
) -> Result<()> {
    let kernel = Kernel::from_release(release, root, &suite.progress)?;
    module::build(&kernel, root, &suite.progress)?;
    let mut tests = suite.vm_tests(&[flavour]);
    match &suite.args.filter {
        Some(filter) => tests.arg(filter),
        None => tests.args(TESTS),
    };
    count(tests.env(KERNEL_VARIABLE, base), tally)?;
    ensure!(tally.passed > 0, "no test ran");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repo;
    use std::fs;

    /// A test that has another name now would be missed by nobody.
    #[test]
    fn each_part_of_a_name_is_that_of_a_test() {
        for part in TESTS {
            let (module, test) = part.rsplit_once("::").unwrap();
            let file = repo::dir()
                .join("tests/vm/tests/vm")
                .join(module.replace("::", "/"))
                .with_extension("rs");
            let text = fs::read_to_string(&file).unwrap();
            assert!(text.contains(&format!("#[test]\nfn {test}")), "{part}");
        }
    }
}
