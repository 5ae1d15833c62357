// SPDX-License-Identifier: GPL-2.0-only

//! System calls of which the kernel fails one allocation.
//!
//! A kernel with fault injection has a file for each task, `fail-nth`: after `n` was written to it, the `n`th
//! allocation that the task asks for fails. Read, it says how many of them are left.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use pmem_guest::Random;
use rustix::fs::{fallocate, FallocateFlags, OFlags};
use rustix::mount::{mount, unmount, MountFlags, UnmountFlags};
use serde_json::json;

use crate::aligned::Aligned;

/// Where a task says which of its allocations is to fail.
const NTH: &str = "/proc/thread-self/fail-nth";

type Call = Box<dyn FnMut() -> io::Result<()>>;

/// Has the `nth` allocation of a call fail, and prints whether there was one, and the call's error, as JSON.
pub fn fail_nth(nth: usize, call: &[&str]) -> io::Result<()> {
    let mut call = prepare(call)?;
    let counter = OpenOptions::new().read(true).write(true).open(NTH)?;
    let mut left = [0; 16];

    counter.write_all_at(nth.to_string().as_bytes(), 0)?;
    let result = call();
    let read = counter.read_at(&mut left, 0);
    counter.write_all_at(b"0", 0)?;

    let failed = left[..read?].starts_with(b"0");
    let errno = match result {
        Ok(()) => 0,
        Err(error) => error.raw_os_error().ok_or(error)?,
    };
    println!("{}", json!({ "failed": failed, "errno": errno }));
    Ok(())
}

fn number(text: &str) -> io::Result<u64> {
    text.parse()
        .map_err(|error| io::Error::other(format!("{text:?} is not a number: {error}")))
}

fn disk(path: &str) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlags::DIRECT.bits() as i32)
        .open(path)
}

/// All that a call needs, so that nothing but the call is between arming the kernel and disarming it.
fn prepare(call: &[&str]) -> io::Result<Call> {
    Ok(match *call {
        ["insmod", path, params] => {
            let (file, params) = (File::open(path)?, CString::new(params)?);
            Box::new(move || Ok(rustix::system::finit_module(&file, &params, 0)?))
        }
        ["rmmod", name] => {
            let name = CString::new(name)?;
            let flags = OFlags::NONBLOCK.bits() as i32;
            Box::new(move || Ok(rustix::system::delete_module(&name, flags)?))
        }
        ["write", path, text] => {
            let mut file = OpenOptions::new().write(true).open(path)?;
            let text = text.to_owned();
            Box::new(move || file.write_all(text.as_bytes()))
        }
        ["read", path] => {
            let path = CString::new(path)?;
            Box::new(move || {
                let file = rustix::fs::open(&path, OFlags::RDONLY, rustix::fs::Mode::empty())?;
                let mut buffer = [0u8; 4096];
                rustix::io::read(&file, &mut buffer)?;
                Ok(())
            })
        }
        ["disk-write", path, offset, len, seed] => {
            let (disk, offset) = (disk(path)?, number(offset)?);
            let mut data = Aligned::new(number(len)? as usize);
            Random::new(number(seed)?).bytes(data.bytes_mut());
            Box::new(move || disk.write_all_at(data.bytes(), offset))
        }
        ["disk-read", path, offset, len, seed] => {
            let (disk, offset) = (disk(path)?, number(offset)?);
            let mut data = Aligned::new(number(len)? as usize);
            let mut wanted = vec![0; data.bytes().len()];
            Random::new(number(seed)?).bytes(&mut wanted);
            data.bytes_mut().fill(0xa5);
            Box::new(move || {
                disk.read_exact_at(data.bytes_mut(), offset)?;
                match data.bytes() == wanted {
                    true => Ok(()),
                    // To be told from each error of the kernel's.
                    false => Err(io::Error::other("what was read is not what was written")),
                }
            })
        }
        ["disk-discard", path, offset, len] => {
            let (disk, offset, len) = (disk(path)?, number(offset)?, number(len)?);
            let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            Box::new(move || Ok(fallocate(&disk, how, offset, len)?))
        }
        ["disk-sync", path] => {
            let disk = disk(path)?;
            Box::new(move || disk.sync_all())
        }
        ["mount", what, dir, kind, options] => {
            let [what, dir, kind] = [what, dir, kind].map(str::to_owned);
            let options = CString::new(options)?;
            Box::new(move || {
                let (what, dir, kind) = (what.as_str(), dir.as_str(), kind.as_str());
                Ok(mount(
                    what,
                    dir,
                    kind,
                    MountFlags::empty(),
                    options.as_c_str(),
                )?)
            })
        }
        ["umount", dir] => {
            let dir = dir.to_owned();
            Box::new(move || Ok(unmount(dir.as_str(), UnmountFlags::empty())?))
        }
        _ => {
            return Err(io::Error::other(format!(
                "{call:?} is not a call; see pmem-guest help"
            )))
        }
    })
}
