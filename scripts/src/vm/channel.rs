// SPDX-License-Identifier: GPL-2.0-only

//! The host's end of the line to the guest's agent.

use anyhow::{bail, Context, Result};
use pmem_guest::{Answer, Call, Reply, Request};
use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::termios::{tcgetattr, tcgetwinsize, tcsetattr, OptionalActions, Termios};
use std::fmt;
use std::io::{stdin, stdout, Read, Stdin, Write};
use std::process::{ChildStdin, ChildStdout};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// Why there is no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Silence {
    /// The machine has ended.
    Ended,
    /// QEMU has, by a bug of its own.
    Crashed,
    /// The time is up.
    TimedOut,
}

impl fmt::Display for Silence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Silence::Ended => "ended",
            Silence::Crashed => "crashed",
            Silence::TimedOut => "timed out",
        })
    }
}

impl std::error::Error for Silence {}

/// A line to the guest's agent.
#[derive(Debug)]
pub struct Channel {
    to: ChildStdin,
    from: Receiver<Vec<u8>>,
    unread: Vec<u8>,
    calls: u64,
}

impl Channel {
    /// A line over the standard streams of QEMU.
    pub fn new(to: ChildStdin, mut from: ChildStdout) -> Self {
        let (send, receive) = channel();
        // Ends when QEMU does, whose exit closes the pipe.
        thread::spawn(move || {
            let mut buffer = vec![0; 1 << 16];
            while let Ok(n @ 1..) = from.read(&mut buffer) {
                if send.send(buffer[..n].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self {
            to,
            from: receive,
            unread: Vec::new(),
            calls: 0,
        }
    }

    /// Waits for the guest's first word, which has its kernel's release.
    pub fn ready(&mut self, timeout: Duration) -> Result<Result<String, Silence>> {
        match self.answer(0, Instant::now() + timeout)? {
            Ok(Reply::Ready { kernel }) => Ok(Ok(kernel)),
            Ok(other) => bail!("the guest began with {other:?}"),
            Err(silence) => Ok(Err(silence)),
        }
    }

    /// Asks, and waits for the answer.
    pub fn call(&mut self, request: Request, timeout: Duration) -> Result<Result<Reply, Silence>> {
        self.calls += 1;
        let id = self.calls;
        if self.send(&Call { id, request }).is_err() {
            return Ok(Err(Silence::Ended));
        }
        self.answer(id, Instant::now() + timeout)
    }

    /// Asks for what is not answered.
    pub fn send(&mut self, call: &Call) -> Result<()> {
        let mut line = serde_json::to_vec(call)?;
        line.push(b'\n');
        self.to
            .write_all(&line)
            .and_then(|()| self.to.flush())
            .context("QEMU does not take input")
    }

    /// Waits until QEMU has ended.
    pub fn ended(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.from.recv_timeout(left) {
                Ok(_) => {}
                Err(RecvTimeoutError::Disconnected) => return true,
                Err(RecvTimeoutError::Timeout) => return false,
            }
        }
    }

    fn answer(&mut self, id: u64, deadline: Instant) -> Result<Result<Reply, Silence>> {
        loop {
            while let Some(line) = self.line() {
                // An answer that came too late for the one who asked is skipped.
                let answer: Answer = serde_json::from_slice(&line).with_context(|| {
                    let line = String::from_utf8_lossy(&line);
                    format!("the guest's agent said something odd: {line:?}")
                })?;
                if answer.id == id {
                    return Ok(Ok(answer.reply));
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match self.from.recv_timeout(left) {
                Ok(chunk) => self.unread.extend(chunk),
                Err(RecvTimeoutError::Disconnected) => return Ok(Err(Silence::Ended)),
                Err(RecvTimeoutError::Timeout) => return Ok(Err(Silence::TimedOut)),
            }
        }
    }

    fn line(&mut self) -> Option<Vec<u8>> {
        let end = self.unread.iter().position(|&byte| byte == b'\n')?;
        let rest = self.unread.split_off(end + 1);
        Some(std::mem::replace(&mut self.unread, rest))
    }

    /// Wires the user's terminal to the guest's shell, until the machine ends.
    pub fn terminal(mut self) -> Result<()> {
        let input = stdin();
        let size = tcgetwinsize(&input).context("standard input is no terminal")?;
        let request = Request::Shell {
            rows: size.ws_row,
            cols: size.ws_col,
            term: std::env::var("TERM").unwrap_or_else(|_| "vt100".into()),
        };
        match self.call(request, Duration::from_secs(10))? {
            Ok(Reply::Done) => {}
            other => bail!("the guest has no shell: {other:?}"),
        }
        let _raw = Raw::new(&input)?;
        let (to, over) = (&mut self.to, &AtomicBool::new(false));
        thread::scope(|scope| {
            scope.spawn(move || copy_input(to, over));
            let mut output = stdout();
            let unread = std::mem::take(&mut self.unread);
            for chunk in std::iter::once(unread).chain(self.from.iter()) {
                if output
                    .write_all(&chunk)
                    .and_then(|()| output.flush())
                    .is_err()
                {
                    break;
                }
            }
            over.store(true, Ordering::Relaxed);
        });
        Ok(())
    }
}

/// Carries what the user types to the guest, without keeping a key that is pressed after the guest ended.
fn copy_input(to: &mut ChildStdin, over: &AtomicBool) {
    let input = stdin();
    let mut buffer = [0; 4096];
    let tick = Timespec {
        tv_sec: 0,
        tv_nsec: 50_000_000,
    };
    while !over.load(Ordering::Relaxed) {
        match poll(&mut [PollFd::new(&input, PollFlags::IN)], Some(&tick)) {
            Ok(0) | Err(_) => continue,
            Ok(_) => {}
        }
        match rustix::io::read(&input, &mut buffer) {
            Ok(n @ 1..) if to.write_all(&buffer[..n]).and_then(|()| to.flush()).is_ok() => {}
            _ => break,
        }
    }
}

/// A terminal that passes every key on, until this is dropped.
struct Raw<'a> {
    terminal: &'a Stdin,
    before: Termios,
}

impl<'a> Raw<'a> {
    fn new(terminal: &'a Stdin) -> Result<Self> {
        let before = tcgetattr(terminal)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(terminal, OptionalActions::Now, &raw)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for Raw<'_> {
    fn drop(&mut self) {
        // If the terminal is gone there is nobody to tell.
        tcsetattr(self.terminal, OptionalActions::Now, &self.before).ok();
    }
}
