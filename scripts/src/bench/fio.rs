// SPDX-License-Identifier: GPL-2.0-only

//! fio's jobs in a guest, and what came of them.

use crate::vm::Vm;
use anyhow::{Context, Result};
use serde::Deserialize;
use std::time::Duration;

/// The clock of /proc/stat, which is the same on every x86 kernel.
const TICKS_PER_SECOND: f64 = 100.0;

/// What fio and the kernel say of a job.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    /// Operations a second.
    pub iops: f64,
    /// Bytes a second.
    pub bandwidth: f64,
    /// Operations a second of CPU time, that of all processes and of the kernel's workers.
    pub iops_per_cpu: f64,
}

#[derive(Deserialize)]
struct Report {
    jobs: Vec<Job>,
}

#[derive(Deserialize)]
struct Job {
    error: i64,
    job_runtime: u64,
    read: Direction,
    write: Direction,
}

#[derive(Deserialize)]
struct Direction {
    total_ios: u64,
    iops: f64,
    bw_bytes: u64,
}

/// Runs fio with `options` on `target` for `time`.
pub fn run(vm: &Vm, target: &str, options: &str, time: Duration) -> Result<Measured> {
    // The CPUs' times are read just before and after the job, so that fio's start does not count. fio redirects
    // the output of such commands to files of its own.
    let seconds = time.as_secs().max(1);
    let output = vm.sh_for(
        &format!(
            "cd /tmp; fio --name=job --filename={target} {options} --time_based --runtime={seconds} \\
             --exec_prerun='cat /proc/stat' --exec_postrun='cat /proc/stat' \\
             --output-format=json --output=report >/dev/null
             head -n 1 job.prerun.txt; head -n 1 job.postrun.txt; cat report"
        ),
        time + Duration::from_secs(120),
    )?;
    measured(&output).with_context(|| format!("fio's report is not understood: {output:.400}"))
}

fn measured(output: &str) -> Result<Measured> {
    let mut parts = output.splitn(3, '\n');
    let before = busy(parts.next().unwrap_or_default())?;
    let after = busy(parts.next().unwrap_or_default())?;
    let text = parts.next().unwrap_or_default();
    // fio may warn before it reports.
    let json = text.find('{').map_or(text, |start| &text[start..]);
    let report: Report = serde_json::from_str(json)?;
    let job = report.jobs.first().context("no job")?;
    anyhow::ensure!(job.error == 0, "the job ended with error {}", job.error);
    anyhow::ensure!(job.job_runtime > 0, "the job did not run");
    let ios = job.read.total_ios + job.write.total_ios;
    let cpu = (after - before) / TICKS_PER_SECOND;
    Ok(Measured {
        iops: job.read.iops + job.write.iops,
        bandwidth: (job.read.bw_bytes + job.write.bw_bytes) as f64,
        iops_per_cpu: ios as f64 / cpu,
    })
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

    fn report(error: i64) -> String {
        format!(
            "{}\n{}\nnote: something\n{{\"jobs\":[{{\"error\":{error},\"job_runtime\":2000,\
             \"read\":{{\"total_ios\":0,\"iops\":0.0,\"bw_bytes\":0}},\
             \"write\":{{\"total_ios\":4000,\"iops\":2000.5,\"bw_bytes\":8194048}}}}]}}",
            STAT[0], STAT[1]
        )
    }

    #[test]
    fn a_report_is_read() {
        let m = measured(&report(0)).unwrap();
        assert_eq!((m.iops, m.bandwidth), (2000.5, 8194048.0));
        // 200 ticks are 2 s.
        assert_eq!(m.iops_per_cpu, 2000.0);
    }

    #[test]
    fn a_job_that_failed_has_no_numbers() {
        assert!(measured(&report(5)).is_err());
        assert!(measured("cpu  1\n").is_err());
    }
}
