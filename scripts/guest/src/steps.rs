// SPDX-License-Identifier: GPL-2.0-only

//! Does the steps of a script, and shows what is there after a power loss.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use pmem_guest::script::{content, Allocate, Entry, Mark, Step, Then, Way};
use pmem_guest::Bytes;
use rustix::fs::{fallocate, FallocateFlags, OFlags};

use crate::aligned::Aligned;
use crate::mapping::Mapping;
use crate::mark::Marks;

/// The disks that are open, with their flags: closing one would write back what is not written yet.
type Disks = HashMap<(String, u32), File>;

/// Does the steps in `script`, a file with JSON. With `marks`, says so.
pub fn run(script: &str, marks: bool) -> io::Result<()> {
    let steps: Vec<Step> = serde_json::from_slice(&fs::read(script)?)?;
    let marks = match marks {
        true => Some(Marks::open()?),
        false => None,
    };
    let mark = |mark: Mark| match &marks {
        Some(marks) => marks.mark(mark.byte()),
        None => Ok(()),
    };
    let mut disks = Disks::new();
    for (n, step) in steps.iter().enumerate() {
        mark(Mark::Begin(n))?;
        perform(step, &mut disks)
            .map_err(|error| io::Error::other(format!("step {n}, {step:?}: {error}")))?;
        mark(Mark::Done(n))?;
    }
    Ok(())
}

fn with_file<T>(
    path: &str,
    flags: OFlags,
    disks: &mut Disks,
    with: impl FnOnce(&File) -> io::Result<T>,
) -> io::Result<T> {
    let open = || {
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags.bits() as i32)
            .open(path)
    };
    let key = (path.to_owned(), flags.bits());
    if let Some(disk) = disks.get(&key) {
        return with(disk);
    }
    let file = open()?;
    let done = with(&file)?;
    if file.metadata()?.file_type().is_block_device() {
        disks.insert(key, file);
    }
    Ok(done)
}

fn perform(step: &Step, disks: &mut Disks) -> io::Result<()> {
    match step {
        Step::Create { path } => {
            OpenOptions::new().write(true).create_new(true).open(path)?;
            Ok(())
        }
        Step::Directory { path } => fs::create_dir(path),
        Step::Write {
            path,
            at,
            len,
            seed,
            way,
            dsync,
        } => {
            let mut flags = match dsync {
                true => OFlags::DSYNC,
                false => OFlags::empty(),
            };
            let bytes = content(*seed, *len);
            match way {
                Way::Buffered => {
                    with_file(path, flags, disks, |file| file.write_all_at(&bytes, *at))
                }
                Way::Direct(skip) => {
                    flags |= OFlags::DIRECT;
                    let skip = *skip as usize;
                    let mut buffer = Aligned::new(skip + bytes.len());
                    let from = &mut buffer.bytes_mut()[skip..];
                    from.copy_from_slice(&bytes);
                    with_file(path, flags, disks, |file| file.write_all_at(from, *at))
                }
            }
        }
        Step::Store {
            path,
            at,
            len,
            seed,
            then,
        } => {
            let file = OpenOptions::new().read(true).write(true).open(path)?;
            let (at, bytes) = (*at as usize, content(*seed, *len));
            let end = at + bytes.len();
            let mut mapping = Mapping::new(&file, end, *then == Then::WriteBack)?;
            mapping.bytes_mut()[at..end].copy_from_slice(&bytes);
            match then {
                Then::Nothing => Ok(()),
                Then::Msync => mapping.msync(),
                Then::WriteBack => {
                    mapping.persist_range(at..end);
                    Ok(())
                }
            }
        }
        Step::Allocate {
            path,
            at,
            len,
            what,
        } => {
            let how = match what {
                Allocate::Extend => FallocateFlags::empty(),
                Allocate::Keep => FallocateFlags::KEEP_SIZE,
                Allocate::Zero => FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
                Allocate::Punch => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            };
            with_file(path, OFlags::empty(), disks, |file| {
                Ok(fallocate(file, how, *at, *len)?)
            })
        }
        Step::Truncate { path, len } => OpenOptions::new().write(true).open(path)?.set_len(*len),
        Step::Rename { from, to } => fs::rename(from, to),
        Step::Link { from, to } => fs::hard_link(from, to),
        Step::Unlink { path } => fs::remove_file(path),
        Step::Fsync { path } if Path::new(path).is_dir() => File::open(path)?.sync_all(),
        Step::Fsync { path } => with_file(path, OFlags::empty(), disks, File::sync_all),
        Step::Fdatasync { path } => with_file(path, OFlags::empty(), disks, File::sync_data),
        Step::Sync => {
            rustix::fs::sync();
            Ok(())
        }
    }
}

/// Prints all files and directories in `dir`, as JSON.
pub fn tree(dir: &str) -> io::Result<()> {
    let mut entries = Vec::new();
    list(Path::new(dir), Path::new(dir), &mut entries)?;
    println!("{}", serde_json::to_string(&entries)?);
    Ok(())
}

fn list(root: &Path, dir: &Path, to: &mut Vec<Entry>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let is_dir = path.is_dir();
        let relative = path.strip_prefix(root).map_err(io::Error::other)?;
        to.push(Entry {
            path: relative.display().to_string(),
            file: match is_dir {
                true => None,
                false => Some(Bytes(fs::read(&path)?)),
            },
        });
        if is_dir {
            list(root, &path, to)?;
        }
    }
    Ok(())
}
