// SPDX-License-Identifier: GPL-2.0-only

//! virtio-pmem devices: memory of the host's that a guest makes durable by asking the host to flush it.
//!
//! Each is behind a PCIe port of its own, so that it can come and go while the machine runs.

use super::{value, Persistent, GIB};
use anyhow::{ensure, Context, Result};
use qapi::qmp::{self, Event};
use qapi::{Dictionary, Qmp, Stream};
use std::fmt;
use std::io::BufReader;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// QEMU's type of the devices.
const DRIVER: &str = "virtio-pmem-pci";

/// The socket of QEMU's monitor, in the machine's directory.
const SOCKET: &str = "qmp";

/// How long the monitor may take for an answer.
const ANSWER: Duration = Duration::from_secs(30);

/// How often to ask for events.
const TICK: Duration = Duration::from_millis(50);

/// A virtio-pmem device of a machine to be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Device<'a> {
    /// What is in it.
    pub memory: &'a Persistent,
    /// Where in the guest's address space; QEMU chooses if this is `None`.
    pub address: Option<u64>,
    /// Whether the machine boots with it.
    pub plugged: bool,
}

/// The most that `devices` take of a guest's address space, each from a multiple of 1 GiB on.
pub(super) fn room(devices: &[Device<'_>]) -> u64 {
    let each = |device: &Device<'_>| device.memory.size().next_multiple_of(GIB);
    devices.iter().map(each).sum()
}

/// QEMU's arguments.
pub(super) fn arguments(devices: &[Device<'_>]) -> Vec<String> {
    if devices.is_empty() {
        return Vec::new();
    }
    let mut args = vec![
        "-qmp".to_owned(),
        format!("unix:{SOCKET},server=on,wait=off"),
    ];
    let mut push = |name: &str, value: String| args.extend([name.to_owned(), value]);
    for (n, device) in devices.iter().enumerate() {
        let memory = device.memory;
        push(
            "-object",
            format!(
                "memory-backend-file,id=backend{n},share=on,size={},mem-path={}",
                memory.size(),
                value(&memory.path())
            ),
        );
        push(
            "-device",
            format!("pcie-root-port,id=port{n},chassis={},slot={}", n + 1, n + 1),
        );
        if device.plugged {
            let at = match device.address {
                Some(address) => format!(",memaddr={address:#x}"),
                None => String::new(),
            };
            push(
                "-device",
                format!("{DRIVER},id=pmem{n},bus=port{n},memdev=backend{n}{at}"),
            );
        }
    }
    args
}

/// A script that makes a guest let go of device `n`.
///
/// A port is a bus of its own: they are numbered from 1 on, in order.
pub(super) fn switch_off(n: usize) -> String {
    format!(
        "slot=$(grep -lx 0000:{:02x}:00 /sys/bus/pci/slots/*/address)
         echo 0 >${{slot%address}}power",
        n + 1
    )
}

/// QEMU's monitor.
pub(super) struct Monitor {
    qmp: Qmp<Stream<BufReader<UnixStream>, UnixStream>>,
    /// Names of devices that have gone, until somebody asks.
    gone: Vec<String>,
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
        })
    }

    /// Plugs virtio-pmem device `n` in.
    pub fn plug(&mut self, n: usize) -> Result<()> {
        let command = qmp::device_add {
            driver: DRIVER.into(),
            id: Some(format!("pmem{n}")),
            bus: Some(format!("port{n}")),
            arguments: Dictionary::from_iter([("memdev".to_owned(), format!("backend{n}").into())]),
        };
        self.qmp
            .execute(&command)
            .with_context(|| format!("QEMU does not plug in pmem{n}"))?;
        Ok(())
    }

    /// Waits until virtio-pmem device `n` has gone.
    pub fn wait_until_gone(&mut self, n: usize, timeout: Duration) -> Result<()> {
        let name = format!("pmem{n}");
        let deadline = Instant::now() + timeout;
        loop {
            self.qmp.nop().context("QEMU's monitor does not answer")?;
            self.gone
                .extend(self.qmp.events().filter_map(|event| match event {
                    Event::DEVICE_DELETED { data, .. } => data.device,
                    _ => None,
                }));
            if let Some(at) = self.gone.iter().position(|gone| *gone == name) {
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
