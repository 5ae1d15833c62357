// SPDX-License-Identifier: GPL-2.0-only

//! QEMU's monitor: devices come and go while the machine runs.

use anyhow::{ensure, Context, Result};
use qapi::qmp::{self, Event};
use qapi::{Dictionary, Qmp, Stream};
use std::collections::HashMap;
use std::fmt;
use std::io::BufReader;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// The socket, in the machine's directory.
const SOCKET: &str = "qmp";

/// How long the monitor may take for an answer.
const ANSWER: Duration = Duration::from_secs(30);

/// How often to ask for events.
const TICK: Duration = Duration::from_millis(50);

/// QEMU's arguments for it.
pub(super) fn arguments() -> [String; 2] {
    [
        "-qmp".to_owned(),
        format!("unix:{SOCKET},server=on,wait=off"),
    ]
}

/// A device that can be plugged in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pluggable {
    /// QEMU's type of it.
    pub driver: &'static str,
    /// Its name.
    pub id: String,
    /// The port that it is behind.
    pub bus: String,
    /// The name of its memory, and that of the option that takes it.
    pub memory: (&'static str, String),
}

impl Pluggable {
    /// The value of `-device`.
    pub fn argument(&self) -> String {
        let (option, memory) = &self.memory;
        let (driver, id, bus) = (self.driver, &self.id, &self.bus);
        format!("{driver},id={id},bus={bus},{option}={memory}")
    }
}

/// QEMU's monitor.
pub(super) struct Monitor {
    qmp: Qmp<Stream<BufReader<UnixStream>, UnixStream>>,
    /// Names of devices that have gone, until somebody asks.
    gone: Vec<String>,
    /// For each device that was plugged in with a file, the name of its memory.
    files: HashMap<String, String>,
    /// How many there were.
    made: u64,
}

impl Monitor {
    /// Connects to the machine whose directory this is.
    pub fn connect(dir: &Path) -> Result<Self> {
        let path = dir.join(SOCKET);
        let stream = UnixStream::connect(&path)
            .with_context(|| format!("cannot connect to QEMU's monitor {}", path.display()))?;
        stream.set_read_timeout(Some(ANSWER))?;
        let reader = BufReader::new(stream.try_clone()?);
        let mut qmp = Qmp::new(Stream::new(reader, stream));
        qmp.handshake().context("QEMU's monitor does not answer")?;
        Ok(Self {
            qmp,
            gone: Vec::new(),
            files: HashMap::new(),
            made: 0,
        })
    }

    /// Has QEMU translate all code of the guest's anew as it is executed: it keeps blocks that jump to each other for
    /// others than those that do not, and from now on they do not.
    pub fn translate_anew(&mut self) -> Result<()> {
        let command = qmp::human_monitor_command {
            command_line: "log nochain".into(),
            cpu_index: None,
        };
        let answer = self.qmp.execute(&command)?;
        ensure!(answer.is_empty(), "QEMU does not translate anew: {answer}");
        Ok(())
    }

    /// Plugs a device in.
    pub fn plug(&mut self, device: &Pluggable) -> Result<()> {
        let (option, memory) = &device.memory;
        let command = qmp::device_add {
            driver: device.driver.into(),
            id: Some(device.id.clone()),
            bus: Some(device.bus.clone()),
            arguments: Dictionary::from_iter([((*option).to_owned(), memory.clone().into())]),
        };
        self.qmp
            .execute(&command)
            .with_context(|| format!("QEMU does not plug in {}", device.id))?;
        Ok(())
    }

    /// As [`plug`](Self::plug), with the `size` bytes of the file `path` as its memory. They are mapped anew each time:
    /// QEMU keeps in mind that a mapping was the memory of such a device, and dies if it is that of another one.
    pub fn plug_file(&mut self, device: &Pluggable, path: &Path, size: u64) -> Result<()> {
        if let Some(id) = self.files.remove(&device.id) {
            self.qmp
                .execute(&qmp::object_del { id })
                .with_context(|| format!("QEMU keeps the memory of {}", device.id))?;
        }
        self.made += 1;
        let (option, memory) = &device.memory;
        let id = format!("{memory}.{}", self.made);
        let file = qmp::MemoryBackendFileProperties {
            base: qmp::MemoryBackendProperties {
                dump: None,
                host_nodes: None,
                merge: None,
                policy: None,
                prealloc: None,
                prealloc_context: None,
                prealloc_threads: None,
                reserve: None,
                share: Some(true),
                x_use_canonical_path_for_ramblock_id: None,
                size,
            },
            align: None,
            discard_data: None,
            offset: None,
            pmem: None,
            readonly: None,
            rom: None,
            mem_path: path.display().to_string(),
        };
        let command = qmp::object_add(qmp::ObjectOptions::memory_backend_file {
            id: id.clone(),
            memory_backend_file: file,
        });
        self.qmp
            .execute(&command)
            .with_context(|| format!("QEMU does not map {}", path.display()))?;
        self.files.insert(device.id.clone(), id.clone());
        self.plug(&Pluggable {
            memory: (*option, id),
            ..device.clone()
        })
    }

    /// Asks the guest to let go of a device.
    pub fn unplug(&mut self, device: &Pluggable) -> Result<()> {
        let command = qmp::device_del {
            id: device.id.clone(),
        };
        self.qmp
            .execute(&command)
            .with_context(|| format!("QEMU does not ask for {}", device.id))?;
        Ok(())
    }

    /// Waits until a device has gone.
    pub fn wait_until_gone(&mut self, device: &Pluggable, timeout: Duration) -> Result<()> {
        let name = &device.id;
        let deadline = Instant::now() + timeout;
        loop {
            self.qmp.nop().context("QEMU's monitor does not answer")?;
            self.gone
                .extend(self.qmp.events().filter_map(|event| match event {
                    Event::DEVICE_DELETED { data, .. } => data.device,
                    _ => None,
                }));
            if let Some(at) = self.gone.iter().position(|gone| gone == name) {
                self.gone.remove(at);
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "{name} is still there after {} s",
                timeout.as_secs()
            );
            thread::sleep(TICK);
        }
    }
}

impl fmt::Debug for Monitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Monitor")
            .field("gone", &self.gone)
            .finish_non_exhaustive()
    }
}
