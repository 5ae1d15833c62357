// SPDX-License-Identifier: GPL-2.0-only

//! What is read from a range before anybody changes it, and the records that are found there: fields at
//! fixed offsets, little-endian, with a checksum.

use core::fmt;

/// Bytes of the medium could not be read: it has an error there, or ends before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// Where the bytes begin, in bytes from the start of the range.
    pub offset: u64,
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the medium cannot be read at byte {:#x}", self.offset)
    }
}

impl core::error::Error for Unreadable {}

/// A medium as it is read before anybody changes it: the range in a kernel, an image in a file.
pub trait Medium {
    /// The size in bytes.
    fn size(&self) -> u64;

    /// Reads the bytes from `offset` on to all of `buf`.
    ///
    /// # Errors
    ///
    /// [`Unreadable`]: the medium has an error there, or ends before.
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Unreadable>;
}

impl Medium for &[u8] {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Unreadable> {
        let bytes = usize::try_from(offset)
            .ok()
            .and_then(|offset| self.get(offset..)?.get(..buf.len()))
            .ok_or(Unreadable { offset })?;
        for (to, from) in buf.iter_mut().zip(bytes) {
            *to = *from;
        }
        Ok(())
    }
}

impl<T: Medium + ?Sized> Medium for &T {
    fn size(&self) -> u64 {
        (**self).size()
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Unreadable> {
        (**self).read(offset, buf)
    }
}

/// The CRC32C (Castagnoli) of `bytes`.
pub fn crc32c(bytes: &[u8]) -> u32 {
    /// The polynomial, its lowest power in the highest bit.
    const POLYNOMIAL: u32 = 0x82f6_3b78;

    // A record is short, and is rarely read: bit by bit, without a table.
    !bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (POLYNOMIAL & (crc & 1).wrapping_neg())
        })
    })
}

/// Stores the bytes of a field of a record, as far as it has room.
pub fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    for (to, &from) in bytes.iter_mut().skip(at).zip(value) {
        *to = from;
    }
}

/// The bytes of a field of a record; zeros if it is not all there.
pub fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes
        .get(at..)
        .and_then(|bytes| bytes.first_chunk())
        .copied()
        .unwrap_or([0; N])
}
