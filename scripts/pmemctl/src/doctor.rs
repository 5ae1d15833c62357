// SPDX-License-Identifier: GPL-2.0-only

//! `pmemctl doctor`: why there is no `/dev/pmem0`, and what helps.
//!
//! It goes the way that a disk goes: a kernel that can have the module, a module that may be loaded, memory that was
//! reserved at boot, parameters that name it, and a driver that has it. Each step that fails is a finding with a
//! remedy.

mod kernel;
mod ranges;

use crate::list::List;
use crate::system::System;
use pmem_core::size::Size;
use serde::Serialize;
use std::fmt::Write;

/// How a finding is to be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Level {
    /// It is as it must be.
    Ok,
    /// It may be wanted.
    Note,
    /// It keeps disks from being there.
    Problem,
}

/// Something that was found.
#[derive(Debug, Serialize)]
pub(crate) struct Finding {
    pub(crate) level: Level,
    pub(crate) what: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) remedy: Option<String>,
}

/// All that was found.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Findings(Vec<Finding>);

impl Findings {
    fn ok(&mut self, what: impl Into<String>) {
        self.push(Level::Ok, what, None);
    }

    fn note(&mut self, what: impl Into<String>) {
        self.push(Level::Note, what, None);
    }

    fn problem(&mut self, what: impl Into<String>, remedy: impl Into<String>) {
        self.push(Level::Problem, what, Some(remedy.into()));
    }

    fn push(&mut self, level: Level, what: impl Into<String>, remedy: Option<String>) {
        self.0.push(Finding {
            level,
            what: what.into(),
            remedy,
        });
    }

    /// Whether nothing keeps disks from being there.
    pub(crate) fn is_well(&self) -> bool {
        self.0.iter().all(|finding| finding.level != Level::Problem)
    }

    /// As text.
    pub(crate) fn show(&self) -> String {
        let mut text = String::new();
        for finding in &self.0 {
            let sign = match finding.level {
                Level::Ok => "ok     ",
                Level::Note => "note   ",
                Level::Problem => "PROBLEM",
            };
            let _ = writeln!(text, "{sign}  {}", finding.what);
            if let Some(remedy) = &finding.remedy {
                for (i, line) in remedy.lines().enumerate() {
                    let arrow = if i == 0 { "->" } else { "  " };
                    let _ = writeln!(text, "     {arrow}  {line}");
                }
            }
        }
        text
    }
}

/// Looks at all there is.
pub(crate) fn examine(system: &System) -> Findings {
    let mut findings = Findings::default();
    kernel::examine(system, &mut findings);
    ranges::examine(system, &mut findings);
    let list = List::read(system);
    for disk in &list.disks {
        findings.ok(format!(
            "/dev/{}: {}, {}{}",
            disk.name,
            Size(disk.size),
            disk.durability,
            if disk.dax { ", DAX" } else { "" }
        ));
        if disk.bad_sectors != 0 {
            findings.note(format!(
                "/dev/{} has {} bad sectors; /sys/block/{}/badblocks lists them, and overwriting repairs them",
                disk.name, disk.bad_sectors, disk.name
            ));
        }
    }
    for range in &list.kmem {
        findings.ok(format!("{}: {}, {}", range.name, range.format, range.state));
    }
    findings
}
