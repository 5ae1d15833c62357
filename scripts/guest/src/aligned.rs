// SPDX-License-Identifier: GPL-2.0-only

//! Memory for O_DIRECT.

/// What the buffer is aligned to.
const ALIGNMENT: usize = 4096;

/// Bytes at an address that is a multiple of 4096.
pub struct Aligned {
    bytes: Vec<u8>,
    skip: usize,
    len: usize,
}

impl Aligned {
    /// `len` zeros.
    pub fn new(len: usize) -> Self {
        let bytes = vec![0; len + ALIGNMENT];
        let address = bytes.as_ptr().addr();
        Self {
            skip: address.next_multiple_of(ALIGNMENT) - address,
            bytes,
            len,
        }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[self.skip..self.skip + self.len]
    }

    /// The bytes, to be stored to.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.skip..self.skip + self.len]
    }
}
