// SPDX-License-Identifier: GPL-2.0-only

//! The kernel without its wrapping. An image unpacks itself when it is booted, which an emulated CPU spends a third of
//! the boot on; QEMU starts what is in it as well, by the PVH boot protocol.

use crate::cache::Lock;
use crate::kernel::Kernel;
use crate::progress::Progress;
use crate::root::Root;
use anyhow::{Context, Result};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;

/// Where the header of an image says how many sectors come before the part for protected mode, less one: its
/// `setup_sects`. This and what follows is in Documentation/arch/x86/boot.rst of the kernel.
const SETUP_SECTS: usize = 0x1f1;
/// `HdrS`.
const MAGIC: usize = 0x202;
/// `payload_offset`, from the part for protected mode on, and `payload_length`.
const PAYLOAD: [usize; 2] = [0x248, 0x24c];

const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
const GZIP: &[u8] = &[0x1f, 0x8b];

/// The kernel's vmlinux, which is kept beside its image.
pub(super) fn ensure(
    kernel: &Kernel,
    image: &Path,
    root: &Root,
    progress: &Progress,
) -> Result<PathBuf> {
    let path = image.with_file_name("vmlinux");
    if !is_newer(&path, image) {
        let _lock = Lock::take("vmlinux", progress)?;
        if !is_newer(&path, image) {
            unpack(image, &path, root)
                .with_context(|| format!("cannot unpack the image of {}", kernel.release))?;
        }
    }
    Ok(path)
}

fn is_newer(path: &Path, image: &Path) -> bool {
    let time = |path: &Path| fs::metadata(path).and_then(|meta| meta.modified()).ok();
    time(path) > time(image)
}

fn unpack(image: &Path, to: &Path, root: &Root) -> Result<()> {
    let content = fs::read(image).with_context(|| format!("cannot read {}", image.display()))?;
    let payload = payload(&content)
        .with_context(|| format!("{} is not an image packed by zstd or gzip", image.display()))?;
    let partial = to.with_extension("partial");
    let file =
        File::create(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
    // The build root's, which knows both formats.
    let mut zstd = root.command("zstd");
    zstd.args(["--decompress", "--quiet", "--stdout"])
        .stdin(Stdio::piped())
        .stdout(file);
    let mut child = crate::exec::spawn(&mut zstd)?;
    let written = match child.stdin.take() {
        Some(mut stdin) => stdin.write_all(payload),
        None => Ok(()),
    };
    let status = child.wait()?;
    written.context("zstd did not take all of it")?;
    anyhow::ensure!(status.success(), "zstd failed: {status}");
    fs::rename(&partial, to).with_context(|| format!("cannot write {}", to.display()))
}

/// The compressed kernel in a bzImage.
fn payload(image: &[u8]) -> Option<&[u8]> {
    let long = |at: usize| -> Option<usize> {
        let bytes = image.get(at..at.checked_add(4)?)?;
        usize::try_from(u32::from_le_bytes(bytes.try_into().ok()?)).ok()
    };
    if image.get(MAGIC..)?.get(..4)? != b"HdrS" {
        return None;
    }
    // 0 means 4, for the sake of loaders older than the field.
    let sectors = match *image.get(SETUP_SECTS)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let [offset, length] = PAYLOAD;
    let start = (sectors + 1) * 512 + long(offset)?;
    let payload = image.get(start..)?.get(..long(length)?)?;
    if payload.starts_with(ZSTD) {
        // The build appends what the size will be, which gzip has in its own format.
        return payload.get(..payload.len().checked_sub(4)?);
    }
    payload.starts_with(GZIP).then_some(payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(setup_sects: u8, payload: &[u8]) -> Vec<u8> {
        let sectors = if setup_sects == 0 { 4 } else { setup_sects };
        let start = (usize::from(sectors) + 1) * 512;
        let mut image = vec![0; start];
        image[SETUP_SECTS] = setup_sects;
        image[MAGIC..MAGIC + 4].copy_from_slice(b"HdrS");
        for (at, value) in PAYLOAD.into_iter().zip([16, payload.len()]) {
            image[at..at + 4].copy_from_slice(&u32::try_from(value).unwrap().to_le_bytes());
        }
        image.extend([0xff; 16]);
        image.extend(payload);
        image.extend([0xee; 64]);
        image
    }

    #[test]
    fn the_payload_is_where_the_header_says() {
        let zstd = [ZSTD, b"kernel", &[6, 0, 0, 0]].concat();
        let gzip = [GZIP, b"kernel", &[6, 0, 0, 0]].concat();
        for sectors in [0, 4, 27] {
            assert_eq!(
                payload(&image(sectors, &zstd)),
                Some(&zstd[..zstd.len() - 4])
            );
            assert_eq!(payload(&image(sectors, &gzip)), Some(&gzip[..]));
        }
    }

    #[test]
    fn what_is_no_image_is_refused() {
        let whole = image(4, &[ZSTD, b"kernel", &[6, 0, 0, 0]].concat());
        // Cut short anywhere before the payload's end.
        for length in 0..whole.len() - 64 {
            assert_eq!(payload(&whole[..length]), None, "{length}");
        }
        assert_eq!(payload(&image(4, b"\x5d\x00\x00\x00lzma")), None);
        let mut other = whole;
        other[MAGIC] = b'h';
        assert_eq!(payload(&other), None);
    }
}
