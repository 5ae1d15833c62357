// SPDX-License-Identifier: GPL-2.0-only

//! Copies between memory and a PCI BAR that is mapped into this process, a word at a time.

use std::fs::OpenOptions;
use std::io;
use std::time::{Duration, Instant};

use pmem_guest::Random;
use serde_json::json;

use crate::mapping::Mapping;

/// Copies blocks of `block` bytes at random places of the BAR `path`, such as `.../resource2_wc`, of which `len` bytes are
/// used, for `time`; says how many, as JSON.
pub fn bench(path: &str, len: usize, write: bool, block: usize, time: Duration) -> io::Result<()> {
    if block == 0 || block % size_of::<u64>() != 0 || block > len {
        return Err(io::Error::other(format!("no blocks of {block} bytes")));
    }
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let mut mapping = Mapping::new(&file, len, false)?;
    let blocks = (len / block) as u64;
    let mut words = vec![0x5a5a_5a5a_5a5a_5a5a_u64; block / size_of::<u64>()];
    let mut random = Random::new(1);
    let (mut ops, start) = (0u64, Instant::now());
    while start.elapsed() < time {
        let at = (random.next() % blocks) as usize * block;
        if write {
            mapping.store_words(at, &words);
        } else {
            mapping.load_words(at, &mut words);
        }
        ops += 1;
    }
    println!(
        "{}",
        json!({ "ops": ops, "seconds": start.elapsed().as_secs_f64() })
    );
    Ok(())
}
