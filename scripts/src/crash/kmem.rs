// SPDX-License-Identifier: GPL-2.0-only

//! The disk that is in the image of a range that is RAM and storage at once.

use pmem_core::kmem::bitmap::Bitmap;
use pmem_core::kmem::layout::Layout;
use pmem_core::kmem::scan::{hold_metadata, scan};
use pmem_core::kmem::superblock::probe;
use pmem_core::kmem::{Block, PAGE_SIZE};
use pmem_core::medium::Medium;
use std::sync::atomic::AtomicU64;

/// The first `bytes` of the disk.
///
/// # Errors
///
/// What is not in order.
pub fn blocks(image: &[u8], bytes: u64) -> Result<Vec<u8>, String> {
    let found = probe(&image).map_err(|error| error.to_string())?;
    let layout = found.superblock.layout;
    check_index(image, &layout)?;
    let mut disk = Vec::with_capacity(bytes as usize);
    for block in 0..bytes / PAGE_SIZE {
        let entry = layout
            .entry_offset(Block(block))
            .ok_or_else(|| format!("the disk has no block {block}"))?;
        let mut page = [0; 8];
        let mut data = [0; PAGE_SIZE as usize];
        let unreadable = |error: pmem_core::medium::Unreadable| error.to_string();
        image.read(entry, &mut page).map_err(unreadable)?;
        match u64::from_le_bytes(page) {
            0 => {}
            page => image
                .read(page.saturating_mul(PAGE_SIZE), &mut data)
                .map_err(unreadable)?,
        }
        disk.extend_from_slice(&data);
    }
    Ok(disk)
}

fn check_index(image: &[u8], layout: &Layout) -> Result<(), String> {
    let words = Bitmap::words(layout.pages()).ok_or("the range is too large")?;
    let words: Vec<AtomicU64> = (0..words).map(|_| AtomicU64::new(0)).collect();
    let held = Bitmap::new(&words);
    hold_metadata(layout, held);
    let scan = scan(&image, layout, held, None);
    match scan.first.iter().flatten().next() {
        None => Ok(()),
        Some(fault) => Err(format!("the index has {} faults: {fault}", scan.faults)),
    }
}
