// SPDX-License-Identifier: GPL-2.0-only

//! Initramfs archives: cpio's `newc` format, as Documentation/driver-api/early-userspace/buffer-format.rst in the
//! kernel's tree describes it. Archives that follow each other are unpacked one over the other.

use std::collections::BTreeSet;
use std::io::{self, Write};

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;

/// An archive that is being written. Directories are made as files need them.
#[derive(Debug)]
pub struct Archive<W> {
    to: W,
    entries: u32,
    directories: BTreeSet<String>,
}

impl<W: Write> Archive<W> {
    /// Begins an archive.
    pub fn new(to: W) -> Self {
        Self {
            to,
            entries: 0,
            directories: BTreeSet::new(),
        }
    }

    /// Adds a directory, and those above it.
    pub fn directory(&mut self, path: &str) -> io::Result<()> {
        let path = path.trim_matches('/');
        if path.is_empty() || self.directories.contains(path) {
            return Ok(());
        }
        self.above(path)?;
        self.directories.insert(path.to_owned());
        self.entry(path, DIRECTORY | 0o755, &[])
    }

    /// Adds a file that everyone may execute.
    pub fn file(&mut self, path: &str, data: &[u8]) -> io::Result<()> {
        let path = path.trim_matches('/');
        self.above(path)?;
        self.entry(path, FILE | 0o755, data)
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &str, to: &str) -> io::Result<()> {
        let path = path.trim_matches('/');
        self.above(path)?;
        self.entry(path, LINK | 0o777, to.as_bytes())
    }

    /// Ends the archive.
    pub fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, &[])?;
        Ok(self.to)
    }

    fn above(&mut self, path: &str) -> io::Result<()> {
        match path.rsplit_once('/') {
            Some((directory, _)) => self.directory(directory),
            None => Ok(()),
        }
    }

    fn entry(&mut self, path: &str, mode: u32, data: &[u8]) -> io::Result<()> {
        let size = u32::try_from(data.len())
            .map_err(|_| io::Error::other(format!("{path} is too large for an initramfs")))?;
        self.entries += 1;
        let name = path.len() as u32 + 1;
        let (inode, uid, gid, links, mtime, device) = (self.entries, 0, 0, 1, 0, 0);
        write!(self.to, "070701")?;
        for field in [
            inode, mode, uid, gid, links, mtime, size, device, device, device, device, name, 0,
        ] {
            write!(self.to, "{field:08X}")?;
        }
        self.to.write_all(path.as_bytes())?;
        self.to.write_all(b"\0")?;
        self.pad(110 + name)?;
        self.to.write_all(data)?;
        self.pad(size)
    }

    fn pad(&mut self, written: u32) -> io::Result<()> {
        let n = written.next_multiple_of(4) - written;
        self.to.write_all(&[0; 3][..n as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel refuses an archive with a header that is off by a byte, and then the guest has no `/init`.
    #[test]
    fn headers_are_where_the_sizes_say() {
        let mut archive = Archive::new(Vec::new());
        archive.file("/a/b/c", b"12345").unwrap();
        archive.file("/a/b/d", b"").unwrap();
        archive.link("/a/e", "b/c").unwrap();
        let bytes = archive.finish().unwrap();
        let (mut at, mut seen) = (0, Vec::new());
        while at < bytes.len() {
            assert_eq!(&bytes[at..at + 6], b"070701");
            let field = |n: usize| {
                let start = at + 6 + 8 * n;
                let text = std::str::from_utf8(&bytes[start..start + 8]).unwrap();
                usize::from_str_radix(text, 16).unwrap()
            };
            let (mode, size, name) = (field(1), field(6), field(11));
            let path = std::str::from_utf8(&bytes[at + 110..at + 110 + name - 1]).unwrap();
            let data = (at + 110 + name).next_multiple_of(4);
            seen.push((path, mode, &bytes[data..data + size]));
            at = (data + size).next_multiple_of(4);
        }
        assert_eq!(
            seen,
            [
                ("a", 0o40755, &b""[..]),
                ("a/b", 0o40755, b""),
                ("a/b/c", 0o100755, b"12345"),
                ("a/b/d", 0o100755, b""),
                ("a/e", 0o120777, b"b/c"),
                ("TRAILER!!!", 0, b""),
            ]
        );
    }
}
