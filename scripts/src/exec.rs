// SPDX-License-Identifier: GPL-2.0-only

//! Runs programs: what they print goes to a log file, its latest line to the user, its end into the error.

use crate::cache;
use crate::progress::Step;
use anyhow::{bail, Context, Result};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// How many of the last lines of a failed program are shown.
const TAIL: usize = 30;

/// What a program printed on both streams.
#[derive(Debug)]
pub struct Output {
    /// All of it.
    pub text: String,
    /// The file that holds it.
    pub log: PathBuf,
}

/// The file in the cache that keeps the log called `name`.
pub fn log_path(name: &str) -> Result<PathBuf> {
    let dir = cache::create()?.join("logs");
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    Ok(dir.join(format!("{name}.log")))
}

/// Runs `command` to its end. Its output is kept in the log called `name`, and its latest line is shown in
/// `step`; if it fails, the error has the end of its output and the log's path.
pub fn run(command: &mut Command, name: &str, step: &Step) -> Result<Output> {
    let log = log_path(name)?;
    let mut output = Output {
        text: String::new(),
        log,
    };
    if run_into(command, step, &mut output)? {
        Ok(output)
    } else {
        bail!("{}", failure(name, &output.text, &output.log))
    }
}

/// As [`run`], for a program whose failure is an answer: returns whether it succeeded.
pub fn try_run(command: &mut Command, name: &str, step: &Step) -> Result<(bool, Output)> {
    let log = log_path(name)?;
    let mut output = Output {
        text: String::new(),
        log,
    };
    let success = run_into(command, step, &mut output)?;
    Ok((success, output))
}

fn run_into(command: &mut Command, step: &Step, output: &mut Output) -> Result<bool> {
    let mut log = File::create(&output.log)
        .with_context(|| format!("cannot write {}", output.log.display()))?;
    writeln!(log, "$ {command:?}")?;
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    command
        .stdin(Stdio::null())
        .stdout(write.try_clone()?)
        .stderr(write);
    let mut child = spawn(command)?;
    // The command holds our copies of the pipe's end; while it does, the pipe never ends.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut reader = BufReader::new(File::from(read));
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line)? > 0 {
        log.write_all(&line)?;
        let text = String::from_utf8_lossy(&line);
        step.tick();
        step.note(&text);
        output.text.push_str(&text);
        line.clear();
    }
    Ok(child.wait()?.success())
}

/// Starts `command`; if its program is missing, the error says which.
pub fn spawn(command: &mut Command) -> Result<std::process::Child> {
    command
        .spawn()
        .with_context(|| format!("cannot run {}", command.get_program().to_string_lossy()))
}

/// Runs `command` and returns what it wrote to standard output.
pub fn stdout(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {}", command.get_program().to_string_lossy()))?;
    if !output.status.success() {
        bail!(
            "{} failed ({}):\n{}",
            command.get_program().to_string_lossy(),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The message of a program that failed.
pub fn failure(name: &str, text: &str, log: &Path) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let tail = lines[lines.len().saturating_sub(TAIL)..].join("\n    ");
    format!(
        "{name} failed. Its last lines:\n    {tail}\nAll of it is in {}",
        log.display()
    )
}
