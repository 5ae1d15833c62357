// SPDX-License-Identifier: GPL-2.0-only

//! fio's jobs in a guest, and what came of them.

use super::table::Measured;
use crate::vm::Vm;
use anyhow::{ensure, Context, Result};
use serde::Deserialize;
use std::time::Duration;

/// The clock of /proc/stat, which is the same on every x86 kernel.
const TICKS_PER_SECOND: f64 = 100.0;

/// What fio's start and the guest's clock may add to a job.
const SLACK: Duration = Duration::from_secs(120);

#[derive(Deserialize)]
struct Report {
    jobs: Vec<Job>,
}

#[derive(Deserialize)]
struct Job {
    error: i64,
    read: Direction,
    write: Direction,
    trim: Direction,
}

#[derive(Deserialize)]
struct Direction {
    total_ios: u64,
    io_bytes: u64,
    /// In milliseconds.
    runtime: u64,
    clat_ns: Latency,
}

/// How long the system calls took, in nanoseconds.
#[derive(Deserialize)]
struct Latency {
    mean: f64,
}

/// Runs fio with `options` on `target` for `time`, and measures also what CPUs do meanwhile, those of all processes and
/// of the kernel's workers.
pub fn run(vm: &Vm, target: &str, options: &str, time: Duration) -> Result<Measured> {
    // The CPUs' times are read just before and after the job, so that fio's start does not count. fio redirects
    // the output of such commands to files of its own.
    let output = vm.sh_for(
        &format!(
            "cd /tmp; fio --name=job --filename={target} {options} --time_based --runtime={}ms \\
             --exec_prerun='cat /proc/stat' --exec_postrun='cat /proc/stat' \\
             --output-format=json --output=report >/dev/null
             head -n 1 job.prerun.txt; head -n 1 job.postrun.txt; cat report",
            time.as_millis().max(1)
        ),
        time + SLACK,
    )?;
    timed(&output).with_context(|| not_understood(&output))
}

/// Runs `threads` of fio's at once with `options` for `time`: on a device or file, which they share, or, if `target` is a
/// directory, on a file each. What CPUs do meanwhile is not measured, as the threads do not begin at once.
pub fn threads(
    vm: &Vm,
    target: &str,
    options: &str,
    threads: u32,
    time: Duration,
) -> Result<Measured> {
    let output = vm.sh_for(
        &format!(
            "cd /tmp; test -d {target} && on=directory || on=filename
             fio --name=job --$on={target} {options} --thread --numjobs={threads} --group_reporting \\
             --time_based --runtime={}ms --output-format=json",
            time.as_millis().max(1)
        ),
        time + SLACK,
    )?;
    measured(&output).with_context(|| not_understood(&output))
}

/// Runs fio with `options` on `target` until it is done.
pub fn once(vm: &Vm, target: &str, options: &str) -> Result<Measured> {
    let output = report(vm, target, options)?;
    measured(&output).with_context(|| not_understood(&output))
}

/// Discards the first `bytes` of `target` in one system call.
pub fn discard(vm: &Vm, target: &str, bytes: u64) -> Result<Measured> {
    let options = format!("--rw=trim --ioengine=psync --bs={bytes} --size={bytes}");
    let output = report(vm, target, &options)?;
    discarded(&output, bytes).with_context(|| not_understood(&output))
}

fn report(vm: &Vm, target: &str, options: &str) -> Result<String> {
    vm.sh_for(
        &format!("cd /tmp; fio --name=job --filename={target} {options} --output-format=json"),
        SLACK,
    )
}

fn not_understood(output: &str) -> String {
    format!("fio's report is not understood: {output:.400}")
}

fn timed(output: &str) -> Result<Measured> {
    let mut parts = output.splitn(3, '\n');
    let before = busy(parts.next().unwrap_or_default())?;
    let after = busy(parts.next().unwrap_or_default())?;
    Ok(Measured {
        cpu_seconds: Some((after - before) / TICKS_PER_SECOND),
        ..measured(parts.next().unwrap_or_default())?
    })
}

fn measured(output: &str) -> Result<Measured> {
    let job = job(output)?;
    let directions = [&job.read, &job.write];
    let runtime = directions.iter().map(|direction| direction.runtime).max();
    let runtime = runtime.unwrap_or_default();
    ensure!(runtime > 0, "the job did not run");
    let sum = |value: fn(&Direction) -> u64| {
        let sum: u64 = directions.iter().map(|&direction| value(direction)).sum();
        sum as f64
    };
    Ok(Measured {
        operations: sum(|direction| direction.total_ios),
        bytes: sum(|direction| direction.io_bytes),
        seconds: runtime as f64 / 1e3,
        cpu_seconds: None,
        instructions: None,
    })
}

fn discarded(output: &str, bytes: u64) -> Result<Measured> {
    let trim = job(output)?.trim;
    ensure!(
        trim.total_ios == 1 && trim.io_bytes == bytes,
        "the job discarded {} bytes by {} system calls",
        trim.io_bytes,
        trim.total_ios
    );
    Ok(Measured {
        operations: 1.0,
        bytes: bytes as f64,
        // It has milliseconds for the job, of which this is one or less.
        seconds: trim.clat_ns.mean / 1e9,
        cpu_seconds: None,
        instructions: None,
    })
}

fn job(output: &str) -> Result<Job> {
    // fio may warn before it reports.
    let json = output.find('{').map_or(output, |start| &output[start..]);
    let report: Report = serde_json::from_str(json)?;
    let job = report.jobs.into_iter().next().context("no job")?;
    ensure!(job.error == 0, "the job ended with error {}", job.error);
    Ok(job)
}

/// The ticks in which some CPU was busy, from the first line of /proc/stat.
fn busy(line: &str) -> Result<f64> {
    let fields: Vec<f64> = line
        .strip_prefix("cpu ")
        .context("no line of /proc/stat")?
        .split_whitespace()
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    // user nice system idle iowait irq softirq steal; guests are counted in user.
    let all: f64 = fields.iter().take(8).sum();
    let idle: f64 = fields.iter().skip(3).take(2).sum();
    Ok(all - idle)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: [&str; 2] = [
        "cpu  100 0 200 5000 10 0 5 0 0 0",
        "cpu  200 0 290 5010 10 5 10 0 0 0",
    ];

    fn direction(ios: u64, bytes: u64, runtime: u64, mean: f64) -> String {
        format!(
            "{{\"total_ios\":{ios},\"io_bytes\":{bytes},\"runtime\":{runtime},\"clat_ns\":{{\"mean\":{mean:?}}}}}"
        )
    }

    fn report(error: i64, write: &str, trim: &str) -> String {
        let read = direction(0, 0, 0, 0.0);
        format!(
            "note: something\n{{\"jobs\":[{{\"error\":{error},\"read\":{read},\"write\":{write},\"trim\":{trim}}}]}}"
        )
    }

    fn write(error: i64) -> String {
        let report = report(
            error,
            &direction(4000, 16_384_000, 1600, 399.5),
            &direction(0, 0, 0, 0.0),
        );
        format!("{}\n{}\n{report}", STAT[0], STAT[1])
    }

    #[test]
    fn a_report_is_read() {
        let m = timed(&write(0)).unwrap();
        assert_eq!((m.iops(), m.bandwidth()), (2500.0, 10_240_000.0));
        // 200 ticks.
        assert_eq!(m.cpu_seconds, Some(2.0));
    }

    #[test]
    fn a_discard_is_one_system_call() {
        let discard = |ios| {
            let trim = direction(ios, 8192, 0, 2500.5);
            discarded(&report(0, &direction(0, 0, 0, 0.0), &trim), 8192)
        };
        assert_eq!(discard(1).unwrap().seconds, 2500.5e-9);
        assert!(discard(0).is_err());
        assert!(discard(2).is_err());
    }

    #[test]
    fn a_job_that_failed_has_no_numbers() {
        assert!(timed(&write(5)).is_err());
        assert!(timed("cpu  1\n").is_err());
    }
}
