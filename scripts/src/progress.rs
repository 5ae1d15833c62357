// SPDX-License-Identifier: GPL-2.0-only

//! What the user sees while something slow happens: bars and spinners on a terminal, one line a step in a log.

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::env;
use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// How often a step that takes long says in a log that it is still alive.
const STILL_ALIVE: Duration = Duration::from_secs(60);

/// Where steps are shown. All of it goes to standard error.
#[derive(Debug)]
pub struct Progress {
    bars: Option<MultiProgress>,
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

impl Progress {
    /// Bars if standard error is a terminal and this is not CI, else a log.
    pub fn new() -> Self {
        let ci = env::var_os("CI").is_some_and(|value| !value.is_empty() && value != "false");
        let terminal = std::io::stderr().is_terminal() && !ci;
        Progress {
            bars: terminal.then(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr())),
        }
    }

    /// A log, whatever standard error is.
    pub fn plain() -> Self {
        Progress { bars: None }
    }

    /// Prints a line, above the bars if there are any.
    pub fn line(&self, text: &str) {
        match &self.bars {
            // A terminal that went away is no reason to stop.
            Some(bars) => drop(bars.println(text)),
            None => eprintln!("{text}"),
        }
    }

    /// Prints a heading.
    pub fn heading(&self, text: &str) {
        self.line(&format!("\n== {text}"));
    }

    /// Runs `body` with the terminal to itself, without bars.
    pub fn suspend<T>(&self, body: impl FnOnce() -> T) -> T {
        match &self.bars {
            Some(bars) => bars.suspend(body),
            None => body(),
        }
    }

    /// Starts a step of unknown length.
    pub fn step(&self, title: &str) -> Step {
        self.start(
            title,
            ProgressBar::new_spinner(),
            "{spinner} {prefix}  {elapsed}  {wide_msg}",
        )
    }

    /// Starts a step of about `total` things, such as files to compile.
    pub fn count(&self, title: &str, total: u64) -> Step {
        let style = "{spinner} {prefix}  [{bar:30}] {percent:>3}%  {elapsed}  {wide_msg}";
        self.start(title, ProgressBar::new(total), style)
    }

    /// Starts a download of `total` bytes.
    pub fn bytes(&self, title: &str, total: u64) -> Step {
        let style =
            "{spinner} {prefix}  [{bar:30}] {bytes}/{total_bytes}  {bytes_per_sec}  {wide_msg}";
        self.start(title, ProgressBar::new(total), style)
    }

    fn start(&self, title: &str, bar: ProgressBar, style: &str) -> Step {
        let bar = self.bars.as_ref().map(|bars| {
            let style = ProgressStyle::with_template(style)
                .unwrap_or_else(|_| ProgressStyle::default_spinner())
                .progress_chars("=> ");
            let bar = bars.add(bar.with_style(style).with_prefix(title.to_string()));
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Step {
            title: title.to_string(),
            started: Instant::now(),
            spoke: Mutex::new(Instant::now()),
            multi: self.bars.clone(),
            bar,
            finished: false,
        }
    }
}

/// One step. Dropped without [`Step::done`], it is shown as failed.
#[derive(Debug)]
pub struct Step {
    title: String,
    started: Instant,
    spoke: Mutex<Instant>,
    multi: Option<MultiProgress>,
    bar: Option<ProgressBar>,
    finished: bool,
}

impl Step {
    /// Shows what the step is doing just now.
    pub fn note(&self, text: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(text.trim_end().to_string());
            return;
        }
        let Ok(mut spoke) = self.spoke.lock() else {
            return;
        };
        if spoke.elapsed() >= STILL_ALIVE {
            *spoke = Instant::now();
            eprintln!(
                "  ... {} ({}): {}",
                self.title,
                time(self.started.elapsed()),
                text.trim()
            );
        }
    }

    /// Moves the bar to `position`.
    pub fn position(&self, position: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(position);
        }
    }

    /// Moves the bar by one.
    pub fn tick(&self) {
        if let Some(bar) = &self.bar {
            // The total is a guess, and a full bar that stays full would be a lie.
            if bar.length().is_some_and(|total| bar.position() + 1 < total) {
                bar.inc(1);
            }
        }
    }

    /// How long the step has taken.
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// The step is done.
    pub fn done(mut self) {
        self.end("");
    }

    /// The step is done, and this came of it.
    pub fn done_with(mut self, result: &str) {
        self.end(&format!(": {result}"));
    }

    fn end(&mut self, what: &str) {
        self.finished = true;
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let line = format!("  {}{what} ({})", self.title, time(self.started.elapsed()));
        match &self.multi {
            Some(bars) => drop(bars.println(line)),
            None => eprintln!("{line}"),
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if !self.finished {
            self.end(": failed");
        }
    }
}

/// A duration as people say it: `0.4 s`, `12 s`, `3 min 05 s`.
pub fn time(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..=9 => format!("{:.1} s", duration.as_secs_f64()),
        10..=99 => format!("{seconds} s"),
        _ => format!("{} min {:02} s", seconds / 60, seconds % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_readable() {
        for (millis, text) in [
            (400, "0.4 s"),
            (12_345, "12 s"),
            (99_999, "99 s"),
            (185_000, "3 min 05 s"),
        ] {
            assert_eq!(time(Duration::from_millis(millis)), text);
        }
    }
}
