// SPDX-License-Identifier: GPL-2.0-only

//! A range in a file or a device.

use anyhow::{ensure, Context, Result};
use pmem_core::medium::{Medium, Unreadable};
use pmem_core::size::Size;
use std::cell::RefCell;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// How many bytes are read at a time, if all of them can be.
const CHUNK: u64 = 1 << 20;

/// A range in a file or a device, which is only read.
#[derive(Debug)]
pub(crate) struct Image {
    file: File,
    start: u64,
    size: u64,
    ahead: RefCell<Ahead>,
}

/// What was read ahead.
#[derive(Debug, Default)]
struct Ahead {
    /// Where its bytes start in the range.
    offset: u64,
    bytes: Vec<u8>,
    /// Up to where nothing is read ahead, as something before cannot be read.
    none_before: u64,
}

impl Image {
    /// The `size` bytes from `start` of what is at `path`, or all from there on.
    pub(crate) fn open(path: &Path, start: u64, size: Option<u64>) -> Result<Self> {
        let mut file = File::open(path)?;
        ensure!(!file.metadata()?.is_dir(), "it is a directory");
        // A block device has no size in its metadata, but an end. A character device has neither.
        let end = file.seek(SeekFrom::End(0)).unwrap_or(0);
        let room = end.checked_sub(start);

        let size = match size {
            Some(size) => {
                ensure!(
                    end == 0 || room.is_some_and(|room| size <= room),
                    "it has {}; there are no {} from {start:#x} on",
                    Size(end),
                    Size(size)
                );
                size
            }
            None => room.filter(|&room| room != 0).with_context(|| match end {
                0 => "it is empty, or does not say its size; give --size".to_owned(),
                _ => format!("it has {}, so nothing is at {start:#x}", Size(end)),
            })?,
        };
        ensure!(
            start
                .checked_add(size)
                .is_some_and(|end| i64::try_from(end).is_ok()),
            "{} from {start:#x} on go beyond the largest offset of a file",
            Size(size)
        );
        Ok(Self {
            file,
            start,
            size,
            ahead: RefCell::default(),
        })
    }

    /// Where the range starts.
    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    fn read_exact(&self, offset: u64, buf: &mut [u8]) -> Result<(), Unreadable> {
        self.file
            .read_exact_at(buf, self.start + offset)
            .map_err(|_| Unreadable { offset })
    }

    /// Reads `len` bytes ahead from `offset` on, or none.
    fn read_ahead(&self, ahead: &mut Ahead, offset: u64, len: u64) {
        ahead.offset = offset;
        ahead.bytes.resize(len as usize, 0);
        if self.read_exact(offset, &mut ahead.bytes).is_err() {
            ahead.bytes.clear();
            ahead.none_before = offset + len;
        }
    }
}

impl Medium for Image {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Unreadable> {
        let left = self.size.checked_sub(offset).ok_or(Unreadable { offset })?;
        if buf.len() as u64 > left {
            return Err(Unreadable { offset });
        }

        let mut ahead = self.ahead.borrow_mut();
        let mut copy = |ahead: &Ahead| {
            let at = usize::try_from(offset.checked_sub(ahead.offset)?).ok()?;
            buf.copy_from_slice(ahead.bytes.get(at..)?.get(..buf.len())?);
            Some(())
        };
        if copy(&ahead).is_some() {
            return Ok(());
        }
        if offset >= ahead.none_before {
            self.read_ahead(&mut ahead, offset, left.min(CHUNK));
            if copy(&ahead).is_some() {
                return Ok(());
            }
        }
        self.read_exact(offset, buf)
    }
}
