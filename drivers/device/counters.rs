// SPDX-License-Identifier: GPL-2.0-only

//! What a disk was asked to do since it is there, `<debugfs>/pmem/pmemN/`.

use super::PmemDevice;
use crate::kapi::{
    attribute,
    percpu, //
};
use kernel::{
    prelude::*,
    str::CString, //
};

/// The counters, by their places.
const READS: usize = 0;
const READ_BYTES: usize = 1;
const WRITES: usize = 2;
const WRITTEN_BYTES: usize = 3;
const FLUSHES: usize = 4;
const WRITE_ZEROES: usize = 5;
const MEDIA_ERRORS: usize = 6;
const CLEARED: usize = 7;

/// How often the host was asked.
const HOST_FLUSHES: usize = 8;

/// The file by which root makes sectors bad.
const INJECT_ERROR: usize = 9;

/// Counts what is begun, on each CPU for itself. All of a CPU's counters are in one cache line.
///
/// Accesses through DAX are not counted: they do not come here.
pub(super) struct Counters(percpu::Counters<8>);

impl Counters {
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(super) fn new() -> Result<Self> {
        Ok(Counters(percpu::Counters::new()?))
    }

    /// A read of `bytes` of the medium begins.
    #[inline(always)]
    pub(super) fn count_read(&self, bytes: u32) {
        self.0.increment::<READS>();
        self.0.add::<READ_BYTES>(bytes.into());
    }

    /// A write of `bytes` begins.
    #[inline(always)]
    pub(super) fn count_write(&self, bytes: u32) {
        self.0.increment::<WRITES>();
        self.0.add::<WRITTEN_BYTES>(bytes.into());
    }

    /// A flush is done, of a bio of its own or before a write.
    #[inline(always)]
    pub(super) fn count_flush(&self) {
        self.0.increment::<FLUSHES>();
    }

    /// A `REQ_OP_WRITE_ZEROES` begins.
    pub(super) fn count_write_zeroes(&self) {
        self.0.increment::<WRITE_ZEROES>();
    }

    /// `count` reads have met bad memory, known or not.
    #[cold]
    pub(super) fn add_media_errors(&self, count: u64) {
        self.0.add::<MEDIA_ERRORS>(count);
    }

    /// `count` bad sectors were written anew, and can be read.
    #[cold]
    pub(super) fn add_cleared(&self, count: u64) {
        self.0.add::<CLEARED>(count);
    }
}

/// The counters, and `inject_error`, are the files of a disk's directory of debugfs.
impl attribute::Attributes for PmemDevice {
    const LIST: &'static [(&'static CStr, bool)] = &[
        (c"reads", false),
        (c"read_bytes", false),
        (c"writes", false),
        (c"written_bytes", false),
        (c"flushes", false),
        (c"write_zeroes", false),
        (c"media_errors", false),
        (c"cleared", false),
        (c"host_flushes", false),
        (c"inject_error", true),
    ];

    fn show(&self, index: usize) -> Result<CString> {
        let counters = &self.counters.0;
        let count = match index {
            READS => counters.sum::<READS>(),
            READ_BYTES => counters.sum::<READ_BYTES>(),
            WRITES => counters.sum::<WRITES>(),
            WRITTEN_BYTES => counters.sum::<WRITTEN_BYTES>(),
            FLUSHES => counters.sum::<FLUSHES>(),
            WRITE_ZEROES => counters.sum::<WRITE_ZEROES>(),
            MEDIA_ERRORS => counters.sum::<MEDIA_ERRORS>(),
            CLEARED => counters.sum::<CLEARED>(),
            HOST_FLUSHES => self.flushes.as_ref().map_or(0, |flushes| flushes.sent()),
            INJECT_ERROR => return self.media.latent(),
            _ => return Err(ENODEV),
        };
        CString::try_from_fmt(fmt!("{}", count))
    }

    fn store(&self, index: usize, value: &str) -> Result {
        match index {
            INJECT_ERROR => self.media.inject(value),
            _ => Err(EACCES),
        }
    }
}
