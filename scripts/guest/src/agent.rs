// SPDX-License-Identifier: GPL-2.0-only

//! Process 1: sets the guest up, then answers the host's requests until the machine stops.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pmem_guest::{Answer, Bytes, Call, End, Ran, Reply, Request, Run, EARLY_MODULES, PORT};
use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::fs::{memfd_create, MemfdFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{mount, MountFlags};
use rustix::process::{kill_process_group, pidfd_open, wait, Pid, PidfdFlags, Signal, WaitOptions};
use rustix::pty::{grantpt, openpt, ptsname, unlockpt, OpenptFlags};
use rustix::system::{uname, RebootCommand};
use rustix::termios::{tcsetwinsize, Winsize};

const PATH: &str = "/usr/bin:/usr/sbin:/usr/lib/busybox";

/// Mounts what a system has, says that it is ready, and serves. Never returns: when it cannot go on it
/// says why on the console and powers off, which the host notices.
pub fn main() -> ! {
    if let Err(error) = setup().and_then(|()| load_early()).and_then(|()| serve()) {
        eprintln!("pmem-guest: {error}");
    }
    power_off()
}

fn setup() -> io::Result<()> {
    for (source, target, kind) in [
        ("proc", "/proc", "proc"),
        ("sysfs", "/sys", "sysfs"),
        ("devtmpfs", "/dev", "devtmpfs"),
        ("devpts", "/dev/pts", "devpts"),
        ("tmpfs", "/dev/shm", "tmpfs"),
        ("tmpfs", "/tmp", "tmpfs"),
        ("tmpfs", "/run", "tmpfs"),
        ("debugfs", "/sys/kernel/debug", "debugfs"),
        ("tracefs", "/sys/kernel/tracing", "tracefs"),
    ] {
        fs::create_dir_all(target).ok();
        match mount(source, target, kind, MountFlags::empty(), None) {
            // A kernel without debugfs or tracefs is one to be tested as well.
            Err(error) if !target.starts_with("/sys/kernel/") => {
                return Err(within(&format!("mount {target}"), error.into()));
            }
            _ => {}
        }
    }
    std::env::set_current_dir("/root").or_else(|_| std::env::set_current_dir("/"))
}

/// Loads what the port needs.
fn load_early() -> io::Result<()> {
    let early = fs::read_to_string(EARLY_MODULES).map_err(|error| within(EARLY_MODULES, error))?;
    for module in early.lines() {
        insmod(module, "").map_err(|error| within(module, error))?;
    }
    Ok(())
}

/// Says that the guest is ready, and answers requests. As a service of a system's, this is all that it does.
pub fn serve() -> io::Result<()> {
    let mut lines = BufReader::new(port()?);
    answer(
        lines.get_ref(),
        0,
        Reply::Ready {
            kernel: uname().release().to_string_lossy().into_owned(),
        },
    )?;
    let mut line = String::new();
    loop {
        line.clear();
        if lines.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let Call { id, request } = match serde_json::from_str(&line) {
            Ok(call) => call,
            Err(error) => {
                eprintln!("pmem-guest: not understood: {error}: {line:?}");
                continue;
            }
        };
        if let Request::Shell { rows, cols, term } = request {
            let shell = Shell::new(rows, cols, &term)?;
            answer(lines.get_ref(), id, Reply::Done)?;
            return shell.relay(lines.get_ref());
        }
        let reply = perform(request).unwrap_or_else(|error| Reply::Errno {
            errno: error.errno,
            text: error.text,
        });
        reap();
        let answer = encode(id, reply)?;
        match lines.get_mut().write_all(&answer) {
            // What was run has bound the port's driver anew.
            Err(error) if error.raw_os_error() == Some(Errno::NODEV.raw_os_error()) => {
                lines = BufReader::new(port()?);
                lines.get_mut().write_all(&answer)?;
            }
            written => written?,
        }
    }
}

/// Opens the port, which appears a moment after its driver.
fn port() -> io::Result<File> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        for entry in fs::read_dir("/sys/class/virtio-ports")
            .into_iter()
            .flatten()
        {
            let path = entry?.path();
            let name = fs::read_to_string(path.join("name")).unwrap_or_default();
            if let (true, Some(device)) = (name.trim() == PORT, path.file_name()) {
                let device = Path::new("/dev").join(device);
                return OpenOptions::new()
                    .read(true)
                    .write(true)
                    .open(&device)
                    .map_err(|error| within(&device.display().to_string(), error));
            }
        }
        if Instant::now() > deadline {
            return Err(io::Error::other(format!(
                "there is no virtio port called {PORT}"
            )));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn within(what: &str, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

fn encode(id: u64, reply: Reply) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(&Answer { id, reply })?;
    line.push(b'\n');
    Ok(line)
}

fn answer(mut port: &File, id: u64, reply: Reply) -> io::Result<()> {
    port.write_all(&encode(id, reply)?)
}

struct Failure {
    errno: i32,
    text: String,
}

trait Context<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Failure>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Failure> {
        self.map_err(|error| {
            let error = error.into();
            Failure {
                errno: error.raw_os_error().unwrap_or(Errno::IO.raw_os_error()),
                text: format!("{}: {error}", what()),
            }
        })
    }
}

fn perform(request: Request) -> Result<Reply, Failure> {
    match request {
        Request::Ping => Ok(Reply::Done),
        Request::Run(run) => {
            let name = run.argv.join(" ");
            execute(run).map(Reply::Ran).context(|| name)
        }
        Request::Write { path, data, append } => OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(!append)
            .append(append)
            .open(&path)
            .and_then(|mut file| file.write_all(&data.0))
            .context(|| format!("write {path}"))
            .map(|()| Reply::Done),
        Request::Read { path, offset, len } => read(&path, offset, len)
            .context(|| format!("read {path}"))
            .map(|data| Reply::Data(Bytes(data))),
        Request::Insmod { path, params } => insmod(&path, &params)
            .context(|| format!("insmod {path} {params}"))
            .map(|()| Reply::Done),
        Request::Rmmod { name } => CString::new(name.as_str())
            .map_err(io::Error::from)
            .and_then(|name| {
                Ok(rustix::system::delete_module(
                    &name,
                    OFlags::NONBLOCK.bits() as i32,
                )?)
            })
            .context(|| format!("rmmod {name}"))
            .map(|()| Reply::Done),
        Request::PowerOff => power_off(),
        // Answered by the caller, who owns the port.
        Request::Shell { .. } => Ok(Reply::Done),
    }
}

fn read(path: &str, offset: u64, len: u64) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let mut data = Vec::new();
    if offset > 0 {
        file.seek(SeekFrom::Start(offset))?;
    }
    file.take(len).read_to_end(&mut data)?;
    Ok(data)
}

fn insmod(path: &str, params: &str) -> io::Result<()> {
    let file = File::open(path)?;
    let params = CString::new(params)?;
    Ok(rustix::system::finit_module(&file, &params, 0)?)
}

/// Runs a program in a process group of its own. Its output goes to files in memory and not to pipes,
/// so that a child that it leaves in the background does not keep us waiting.
fn execute(run: Run) -> io::Result<Ran> {
    let Some((program, arguments)) = run.argv.split_first() else {
        return Err(Errno::INVAL.into());
    };
    let memory =
        |name: &str| -> io::Result<File> { Ok(memfd_create(name, MemfdFlags::CLOEXEC)?.into()) };
    let (mut stdin, stdout, stderr) = (memory("stdin")?, memory("stdout")?, memory("stderr")?);
    stdin.write_all(&run.stdin.0)?;
    stdin.rewind()?;
    let mut child = Command::new(program)
        .args(arguments)
        .env("PATH", PATH)
        .env("HOME", "/root")
        .envs(run.env)
        .stdin(stdin)
        .stdout(stdout.try_clone()?)
        .stderr(stderr.try_clone()?)
        .process_group(0)
        .spawn()?;
    let end = wait_for(&mut child, Duration::from_millis(run.timeout_ms))?;
    Ok(Ran {
        end,
        stdout: text(&stdout)?,
        stderr: text(&stderr)?,
    })
}

fn wait_for(child: &mut Child, timeout: Duration) -> io::Result<End> {
    let pid = Pid::from_child(child);
    let handle = pidfd_open(pid, PidfdFlags::empty())?;
    let deadline = Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            kill_process_group(pid, Signal::KILL).ok();
            child.wait()?;
            return Ok(End::Timeout);
        }
        match poll(
            &mut [PollFd::new(&handle, PollFlags::IN)],
            Some(&span(left)),
        ) {
            Ok(0) | Err(Errno::INTR) => continue,
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        let status = child.wait()?;
        return Ok(match (status.code(), status.signal()) {
            (Some(code), _) => End::Exit(code),
            (None, signal) => End::Signal(signal.unwrap_or(0)),
        });
    }
}

fn span(of: Duration) -> Timespec {
    Timespec {
        tv_sec: of.as_secs() as i64,
        tv_nsec: of.subsec_nanos().into(),
    }
}

/// Reads what was written so far, without moving the position that a background process writes at.
fn text(file: &File) -> io::Result<String> {
    let mut data = vec![0; file.metadata()?.len() as usize];
    file.read_exact_at(&mut data, 0)?;
    Ok(match String::from_utf8(data) {
        Ok(text) => text,
        Err(error) => String::from_utf8_lossy(error.as_bytes()).into_owned(),
    })
}

/// Takes the orphans that process 1 inherits. Called when no child of our own is alive.
fn reap() {
    while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
}

/// A shell on a pseudo-terminal.
struct Shell {
    child: Child,
    terminal: OwnedFd,
}

impl Shell {
    fn new(rows: u16, cols: u16, term: &str) -> io::Result<Self> {
        let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&terminal)?;
        unlockpt(&terminal)?;
        let name = ptsname(&terminal, Vec::new())?;
        let side = rustix::fs::open(
            name.as_c_str(),
            OFlags::RDWR | OFlags::NOCTTY,
            Mode::empty(),
        )?;
        tcsetwinsize(
            &side,
            Winsize {
                ws_row: rows,
                ws_col: cols,
                ws_xpixel: 0,
                ws_ypixel: 0,
            },
        )?;
        let child = Command::new("busybox")
            .args(["setsid", "-c", "bash", "--noprofile", "--norc"])
            .env("PATH", PATH)
            .env("HOME", "/root")
            .env("TERM", term)
            .env("PS1", r"guest:\w# ")
            .stdin(Stdio::from(side.try_clone()?))
            .stdout(Stdio::from(side.try_clone()?))
            .stderr(Stdio::from(side))
            .spawn()?;
        Ok(Self { child, terminal })
    }

    /// Carries bytes both ways until the shell ends.
    fn relay(mut self, port: &File) -> io::Result<()> {
        let mut buffer = [0; 4096];
        loop {
            let mut ends = [
                PollFd::new(&self.terminal, PollFlags::IN),
                PollFd::from_borrowed_fd(port.as_fd(), PollFlags::IN),
            ];
            match poll(&mut ends, None) {
                Err(Errno::INTR) => continue,
                other => other?,
            };
            let (from_shell, from_host) = (ends[0].revents(), ends[1].revents());
            if from_shell.contains(PollFlags::IN) {
                let n = rustix::io::read(&self.terminal, &mut buffer)?;
                (&mut &*port).write_all(&buffer[..n])?;
            } else if from_shell.intersects(PollFlags::HUP | PollFlags::ERR) {
                self.child.wait()?;
                return Ok(());
            }
            if from_host.contains(PollFlags::IN) {
                let n = rustix::io::read(port, &mut buffer)?;
                let mut rest = &buffer[..n];
                while !rest.is_empty() {
                    let written = rustix::io::write(&self.terminal, rest)?;
                    rest = &rest[written..];
                }
            }
        }
    }
}

fn power_off() -> ! {
    rustix::fs::sync();
    // The last lines of the console are still on their way out of the serial port.
    std::thread::sleep(Duration::from_millis(50));
    if let Err(error) = rustix::system::reboot(RebootCommand::PowerOff) {
        eprintln!("pmem-guest: cannot power off: {error}");
    }
    loop {
        std::thread::park();
    }
}
