// SPDX-License-Identifier: GPL-2.0-only

//! `pmemctl bench`: a quick look at how fast a disk is read. Nothing is written.

use anyhow::{bail, ensure, Context, Result};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::{Deserialize, Serialize};
use std::fmt::Write;
use std::io::ErrorKind;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// What is measured: a title, and fio's options.
const ROWS: [(&str, &[&str]); 5] = [
    (
        "4 KiB random, 1 thread",
        &["--rw=randread", "--bs=4k", "--ioengine=psync"],
    ),
    (
        "4 KiB random, 4 threads",
        &[
            "--rw=randread",
            "--bs=4k",
            "--ioengine=psync",
            "--numjobs=4",
        ],
    ),
    (
        "64 KiB random, 1 thread",
        &["--rw=randread", "--bs=64k", "--ioengine=psync"],
    ),
    (
        "1 MiB sequential, 1 thread",
        &["--rw=read", "--bs=1m", "--ioengine=psync"],
    ),
    (
        "1 MiB sequential, 4 threads",
        &[
            "--rw=read",
            "--bs=1m",
            "--ioengine=psync",
            "--numjobs=4",
            "--offset_increment=25%",
        ],
    ),
];

/// What was measured.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    what: &'static str,
    reads_per_second: f64,
    bytes_per_second: f64,
    /// In nanoseconds.
    mean_latency: f64,
    /// In nanoseconds; of a hundred reads, one takes longer.
    p99_latency: Option<u64>,
}

#[derive(Deserialize)]
struct Report {
    jobs: Vec<Job>,
}

#[derive(Deserialize)]
struct Job {
    error: i64,
    read: Read,
}

#[derive(Deserialize)]
struct Read {
    iops: f64,
    bw_bytes: f64,
    clat_ns: Latency,
}

#[derive(Deserialize)]
struct Latency {
    mean: f64,
    percentile: Option<std::collections::BTreeMap<String, u64>>,
}

/// Reads the disk at `device` in each way for `time`.
pub(crate) fn run(device: &Path, time: Duration) -> Result<Vec<Row>> {
    // Opened here, so that the error is ours and tells what to do.
    std::fs::File::open(device)
        .with_context(|| format!("{} cannot be opened", device.display()))?;
    let bar = ProgressBar::with_draw_target(Some(ROWS.len() as u64), ProgressDrawTarget::stderr());
    bar.set_style(
        ProgressStyle::with_template("{wide_bar} {msg}").unwrap_or(ProgressStyle::default_bar()),
    );
    let mut rows = Vec::new();
    for (what, options) in ROWS {
        bar.set_message(what);
        bar.tick();
        let output = fio(device, options, time)?;
        rows.push(row(what, &output)?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(rows)
}

/// fio's report.
fn fio(device: &Path, options: &[&str], time: Duration) -> Result<String> {
    // fio takes a colon in a name for the end of it.
    let name = device.display().to_string().replace(':', "\\:");
    let output = Command::new("fio")
        .args(["--name=bench", "--readonly", "--direct=1", "--time_based"])
        .args(["--allow_file_create=0", "--thread", "--group_reporting"])
        .args([
            "--output-format=json",
            &format!("--runtime={}ms", time.as_millis()),
        ])
        .arg(format!("--filename={name}"))
        .args(options)
        .stdin(Stdio::null())
        .output();
    let output = match output {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            bail!("fio is not there, which measures: apt install fio")
        }
        other => other.context("fio cannot be run")?,
    };
    ensure!(
        output.status.success(),
        "fio failed: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn row(what: &'static str, output: &str) -> Result<Row> {
    // Notes may come before.
    let json = output
        .find('{')
        .and_then(|at| output.get(at..))
        .unwrap_or_default();
    let report: Report = serde_json::from_str(json).context("fio's report is not understood")?;
    let [job] = report.jobs.as_slice() else {
        bail!("fio reports {} jobs, not one", report.jobs.len());
    };
    ensure!(job.error == 0, "fio met error {}", job.error);
    let latency = &job.read.clat_ns;
    Ok(Row {
        what,
        reads_per_second: job.read.iops,
        bytes_per_second: job.read.bw_bytes,
        mean_latency: latency.mean,
        p99_latency: latency
            .percentile
            .as_ref()
            .and_then(|all| all.get("99.000000").copied()),
    })
}

/// As text.
pub(crate) fn show(rows: &[Row]) -> String {
    let mut text = format!(
        "{:<28}{:>12}{:>10}{:>12}{:>12}\n",
        "READS", "PER SECOND", "GB/S", "MEAN", "99 %"
    );
    let micro = |nanoseconds: f64| format!("{:.1} us", nanoseconds / 1e3);
    for row in rows {
        let p99 = row.p99_latency.map(|time| micro(time as f64));
        let _ = writeln!(
            text,
            "{:<28}{:>12.0}{:>10.2}{:>12}{:>12}",
            row.what,
            row.reads_per_second,
            row.bytes_per_second / 1e9,
            micro(row.mean_latency),
            p99.unwrap_or_default()
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read() {
        let report = r#"note: something
            {"jobs": [{"error": 0, "read": {"iops": 1000.5, "bw_bytes": 4098048,
             "clat_ns": {"mean": 950.5, "percentile": {"99.000000": 1208}}}, "write": {}}]}"#;
        let row = row("x", report).unwrap();
        assert_eq!(row.p99_latency, Some(1208));
        assert!(show(&[row]).contains("1000"));
    }
}
