// SPDX-License-Identifier: GPL-2.0-only

//! What was measured, and the tables that it makes.

use serde::Serialize;
use std::fmt::Write as _;
use std::ops::AddAssign;

/// What was measured of one side of a row, in all rounds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Measured {
    /// How many operations there were.
    pub operations: f64,
    /// How many bytes they had.
    pub bytes: f64,
    /// What they took, by the clock.
    pub seconds: f64,
    /// What they took of CPUs, if that is known.
    pub cpu_seconds: Option<f64>,
    /// What one took, if it was counted.
    pub instructions: Option<Instructions>,
}

/// Instructions of a system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Instructions {
    /// Those of the driver, except for those that copy.
    pub module: u64,
    /// Those that copy the data, where they are known: in the driver, or in a function of the kernel's for it.
    pub copy: u64,
    /// All that the kernel executes, these and those included.
    pub call: u64,
}

impl Measured {
    /// Operations a second.
    pub fn iops(&self) -> f64 {
        self.operations / self.seconds
    }

    /// Bytes a second.
    pub fn bandwidth(&self) -> f64 {
        self.bytes / self.seconds
    }
}

impl AddAssign for Measured {
    fn add_assign(&mut self, other: Self) {
        // Nothing was measured yet.
        if self.operations == 0.0 {
            *self = other;
            return;
        }
        self.operations += other.operations;
        self.bytes += other.bytes;
        self.seconds += other.seconds;
        self.cpu_seconds = self.cpu_seconds.zip(other.cpu_seconds).map(|(a, b)| a + b);
    }
}

/// What a row is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unit {
    /// Many small operations: how many there are in a second.
    Operations,
    /// Small operations that wait for something else: how many there are in a second, and what each takes of CPUs.
    Waits,
    /// Operations whose size does not matter: how many bytes there are in a second.
    Bandwidth,
    /// One operation: how long it takes.
    Time,
    /// How many bytes something takes.
    Memory,
    /// A system call: which instructions it takes.
    Call,
}

/// A number of a row, which has a part of the table of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Quantity {
    Operations,
    OperationsOfCpu,
    Waits,
    Bandwidth,
    Milliseconds,
    MillisecondsOfCpu,
    Instructions,
    MillionInstructions,
    Mebibytes,
    ModuleInstructions,
    CopyInstructions,
    CallInstructions,
}

impl Quantity {
    /// In the order in which they are shown.
    const TIMED: &[Self] = &[
        Self::Operations,
        Self::OperationsOfCpu,
        Self::Waits,
        Self::Bandwidth,
        Self::Milliseconds,
        Self::MillisecondsOfCpu,
        Self::Mebibytes,
        Self::ModuleInstructions,
        Self::CopyInstructions,
        Self::CallInstructions,
    ];
    const COUNTED: &[Self] = &[
        Self::Instructions,
        Self::MillionInstructions,
        Self::ModuleInstructions,
        Self::CopyInstructions,
        Self::CallInstructions,
    ];

    fn heading(self) -> &'static str {
        match self {
            Self::Operations => "thousands of operations a second",
            Self::OperationsOfCpu => "thousands of operations a second of CPU time",
            Self::Waits => "operations a second",
            Self::Bandwidth => "GB a second",
            Self::Milliseconds => "milliseconds",
            Self::MillisecondsOfCpu => "milliseconds of CPU time",
            Self::Instructions => "instructions an operation",
            Self::MillionInstructions => "millions of instructions",
            Self::Mebibytes => "MiB",
            Self::ModuleInstructions => "instructions of the driver, without the copy",
            Self::CopyInstructions => "instructions of the copy",
            Self::CallInstructions => "instructions of the whole system call",
        }
    }

    fn digits(self) -> usize {
        match self {
            Self::Waits
            | Self::Instructions
            | Self::ModuleInstructions
            | Self::CopyInstructions
            | Self::CallInstructions => 0,
            Self::Operations | Self::OperationsOfCpu => 1,
            Self::Bandwidth | Self::Mebibytes => 2,
            Self::Milliseconds | Self::MillisecondsOfCpu | Self::MillionInstructions => 3,
        }
    }

    /// Whether rows of `unit` have it.
    fn is_of(self, unit: Unit) -> bool {
        match self {
            Self::Operations | Self::OperationsOfCpu => unit == Unit::Operations,
            Self::Waits => unit == Unit::Waits,
            Self::Bandwidth => unit == Unit::Bandwidth,
            Self::MillisecondsOfCpu => matches!(unit, Unit::Waits | Unit::Time),
            Self::Instructions => matches!(unit, Unit::Operations | Unit::Bandwidth),
            Self::Milliseconds | Self::MillionInstructions => unit == Unit::Time,
            Self::Mebibytes => unit == Unit::Memory,
            Self::ModuleInstructions | Self::CopyInstructions | Self::CallInstructions => {
                unit == Unit::Call
            }
        }
    }

    fn of(self, measured: &Measured) -> Option<f64> {
        let each = |seconds: f64, unit: f64| seconds / measured.operations / unit;
        match self {
            Self::Operations => Some(measured.iops() / 1e3),
            Self::OperationsOfCpu => Some(measured.operations / measured.cpu_seconds? / 1e3),
            Self::Waits => Some(measured.iops()),
            Self::Bandwidth => Some(measured.bandwidth() / 1e9),
            Self::Milliseconds => Some(each(measured.seconds, 1e-3)),
            Self::MillisecondsOfCpu => Some(each(measured.cpu_seconds?, 1e-3)),
            // The clock goes on by a nanosecond with each.
            Self::Instructions => Some(each(measured.seconds, 1e-9)),
            // It also goes on while one operation waits, which is no work.
            Self::MillionInstructions => {
                Some(each(measured.cpu_seconds.unwrap_or(measured.seconds), 1e-3))
            }
            Self::Mebibytes => Some(measured.bytes / f64::from(1 << 20)),
            Self::ModuleInstructions => Some(measured.instructions?.module as f64),
            Self::CopyInstructions => Some(measured.instructions?.copy as f64),
            Self::CallInstructions => Some(measured.instructions?.call as f64),
        }
    }
}

/// A row, with a column for each of what is compared.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// What was done.
    pub title: &'static str,
    /// What its numbers are.
    pub unit: Unit,
    /// What was measured of each.
    pub sides: Vec<Option<Measured>>,
}

/// A number of each row that has it.
pub struct Series {
    /// What it is.
    pub heading: &'static str,
    /// How many digits of it to show after the point.
    pub digits: usize,
    /// The rows: their titles, and what each side has.
    pub rows: Vec<(&'static str, Vec<Option<f64>>)>,
}

/// What there is to show of `rows`. `counted` says that the clock counted instructions.
pub fn series(rows: &[Row], counted: bool) -> Vec<Series> {
    let quantities = if counted {
        Quantity::COUNTED
    } else {
        Quantity::TIMED
    };
    let mut all = Vec::new();
    for quantity in quantities {
        let values = |row: &Row| -> Vec<Option<f64>> {
            let sides = row.sides.iter();
            sides.map(|side| quantity.of(side.as_ref()?)).collect()
        };
        let rows: Vec<_> = rows
            .iter()
            .filter(|row| quantity.is_of(row.unit))
            .map(|row| (row.title, values(row)))
            .filter(|(_, values)| values.iter().any(Option::is_some))
            .collect();
        if !rows.is_empty() {
            all.push(Series {
                heading: quantity.heading(),
                digits: quantity.digits(),
                rows,
            });
        }
    }
    all
}

/// A table of `rows` whose columns have these names. `counted` says that the clock counted instructions.
pub fn text(columns: &[&str], rows: &[Row], counted: bool) -> String {
    let mut out = String::new();
    let mut line = |text: String| {
        // Writing to a string does not fail.
        let _ = writeln!(out, "{}", text.trim_end());
    };
    for series in series(rows, counted) {
        line(String::new());
        let mut heading = format!("{:<46}", series.heading);
        for column in columns {
            let _ = write!(heading, "{column:>10}");
        }
        for (other, width) in others(columns.len()) {
            let _ = write!(heading, "{:>width$}", format!("/ {}", columns[other]));
        }
        line(heading);
        for (title, values) in series.rows {
            let mut text = format!("  {title:<44}");
            for value in &values {
                let _ = match value {
                    Some(value) => write!(text, "{value:>10.*}", series.digits),
                    None => write!(text, "{:>10}", "-"),
                };
            }
            for (other, width) in others(values.len()) {
                // Nothing is no measure.
                let ratio = values[0]
                    .zip(values[other])
                    .filter(|&(_, theirs)| theirs != 0.0)
                    .map(|(ours, theirs)| ours / theirs);
                let _ = match ratio {
                    Some(ratio) => write!(text, "{ratio:>width$.2}"),
                    None => write!(text, "{:>width$}", "-"),
                };
            }
            line(text);
        }
    }
    out
}

/// The columns that the first one is compared with, and how wide their ratios are.
fn others(columns: usize) -> impl Iterator<Item = (usize, usize)> {
    (1..columns).map(|other| (other, if other == 1 { 14 } else { 10 }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(operations: f64, seconds: f64, cpu_seconds: Option<f64>) -> Option<Measured> {
        Some(Measured {
            operations,
            bytes: operations * 4096.0,
            seconds,
            cpu_seconds,
            instructions: None,
        })
    }

    fn rows() -> Vec<Row> {
        vec![
            Row {
                title: "read",
                unit: Unit::Operations,
                sides: vec![measured(30e3, 2.0, Some(1.0)), measured(10e3, 1.0, None)],
            },
            Row {
                title: "fsync",
                unit: Unit::Waits,
                sides: vec![
                    measured(500.0, 2.0, Some(0.25)),
                    measured(100.0, 1.0, Some(0.1)),
                ],
            },
            Row {
                title: "plug",
                unit: Unit::Time,
                sides: vec![measured(2.0, 0.1, Some(0.02)), None],
            },
        ]
    }

    fn lines(counted: bool) -> Vec<String> {
        text(&["a", "b"], &rows(), counted)
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect()
    }

    #[test]
    fn a_part_for_each_quantity_that_some_row_has() {
        assert_eq!(
            lines(false),
            [
                "",
                "thousands of operations a second a b / b",
                "read 15.0 10.0 1.50",
                "",
                "thousands of operations a second of CPU time a b / b",
                "read 30.0 - -",
                "",
                "operations a second a b / b",
                "fsync 250 100 2.50",
                "",
                "milliseconds a b / b",
                "plug 50.000 - -",
                "",
                "milliseconds of CPU time a b / b",
                "fsync 0.500 1.000 0.50",
                "plug 10.000 - -",
            ]
        );
    }

    #[test]
    fn what_waits_is_not_counted() {
        assert_eq!(
            lines(true),
            [
                "",
                "instructions an operation a b / b",
                "read 66667 100000 0.67",
                "",
                "millions of instructions a b / b",
                "plug 10.000 - -",
            ]
        );
    }

    #[test]
    fn system_calls_have_three_parts() {
        let instructions = |module, copy, call| {
            Some(Measured {
                instructions: Some(Instructions { module, copy, call }),
                ..Measured::default()
            })
        };
        let rows = [Row {
            title: "fsync",
            unit: Unit::Call,
            sides: vec![instructions(20, 0, 900), instructions(40, 0, 1000)],
        }];
        let text = text(&["a", "b"], &rows, false);
        let lines: Vec<Vec<&str>> = text
            .lines()
            .filter(|line| line.contains("fsync"))
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(
            lines,
            [
                ["fsync", "20", "40", "0.50"],
                ["fsync", "0", "0", "-"],
                ["fsync", "900", "1000", "0.90"],
            ]
        );
    }

    #[test]
    fn rounds_add_up() {
        let mut sum = Measured::default();
        for (seconds, cpu) in [(1.0, Some(0.5)), (3.0, Some(0.25))] {
            sum += measured(100.0, seconds, cpu).unwrap();
        }
        assert_eq!(sum.iops(), 50.0);
        assert_eq!(sum.cpu_seconds, Some(0.75));
    }
}
