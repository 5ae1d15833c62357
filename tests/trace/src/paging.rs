// SPDX-License-Identifier: GPL-2.0-only

//! The physical address of a virtual one, by the page tables of x86-64 (Intel SDM, volume 3, "4-Level Paging and
//! 5-Level Paging").

/// Bit of `cr4`: page tables have five levels, not four.
pub const LA57: u64 = 1 << 12;

const PRESENT: u64 = 1;
/// The entry maps a page of 2 MiB or 1 GiB, where it could name a table.
const IS_PAGE: u64 = 1 << 7;
/// The bits of an entry that are an address.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Why there is no physical address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing is there.
    NotPresent,
    /// The entry at this physical address cannot be read.
    Unreadable(u64),
}

/// Translates `address` by the tables that `cr3` and `cr4` say. `read` is to give the 8 bytes at a physical address, as a
/// little-endian number.
pub fn translate(
    cr3: u64,
    cr4: u64,
    address: u64,
    read: impl Fn(u64) -> Option<u64>,
) -> Result<u64, Fault> {
    let levels = if cr4 & LA57 == 0 { 4 } else { 5 };
    let mut table = cr3 & ADDRESS;
    for level in (0..levels).rev() {
        let shift = 12 + 9 * level;
        let at = table | (((address >> shift) & 0x1ff) << 3);
        let entry = read(at).ok_or(Fault::Unreadable(at))?;
        if entry & PRESENT == 0 {
            return Err(Fault::NotPresent);
        }
        let is_page = level == 0 || level <= 2 && entry & IS_PAGE != 0;
        if is_page {
            let within = (1 << shift) - 1;
            return Ok(entry & ADDRESS & !within | address & within);
        }
        table = entry & ADDRESS;
    }
    Err(Fault::NotPresent)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// Attributes that are not the address's: no execution, global, dirty, accessed, written to by users.
    const FLAGS: u64 = (1 << 63) | 0x167;

    fn tables() -> BTreeMap<u64, u64> {
        BTreeMap::from([
            // Of 5 levels at 0x5000, of 4 at 0x1000.
            (0x5000 + 8, 0x1000 | FLAGS),
            (0x1000 + 8 * 273, 0x2000 | FLAGS),
            (0x2000 + 8 * 3, 0x3000 | FLAGS),
            (0x3000 + 8 * 5, 0x4000 | FLAGS),
            (0x4000 + 8 * 7, 0x1_2345_6000 | FLAGS),
            (0x4000 + 8 * 8, 0x1_2345_6000),
            // In large pages, bit 12 says how they are cached.
            (0x3000 + 8 * 6, 0x1_4020_1000 | FLAGS | IS_PAGE),
            (0x2000 + 8 * 4, 0x1_8000_1000 | FLAGS | IS_PAGE),
        ])
    }

    fn at(indices: [u64; 4], within: u64) -> u64 {
        let address = (indices
            .iter()
            .fold(0, |address, index| (address << 9) | index)
            << 12)
            | within;
        // Canonical.
        ((address << 16) as i64 >> 16) as u64
    }

    #[test]
    fn each_size_of_page_is_found() {
        let tables = tables();
        let read = |at| Some(tables.get(&at).copied().unwrap_or(0));
        // The bits of cr3 that are no address do not matter.
        let translate = |address| translate(0x1000 | (1 << 63) | 0xfff, 0, address, read);
        let (mib, gib) = (1 << 20, 1 << 30);
        for (address, physical) in [
            (at([273, 3, 5, 7], 0xabc), Ok(0x1_2345_6abc)),
            (at([273, 3, 6, 0], 0), Ok(0x1_4020_0000)),
            (
                at([273, 3, 6, 0], 2 * mib - 1),
                Ok(0x1_4020_0000 + 2 * mib - 1),
            ),
            (at([273, 4, 0, 0], gib - 1), Ok(0x1_8000_0000 + gib - 1)),
            (at([273, 3, 5, 8], 0), Err(Fault::NotPresent)),
            (at([273, 3, 7, 0], 0), Err(Fault::NotPresent)),
            (at([1, 3, 5, 7], 0), Err(Fault::NotPresent)),
        ] {
            assert_eq!(translate(address), physical, "{address:#x}");
        }
    }

    #[test]
    fn five_levels() {
        let tables = tables();
        let read = |at| Some(tables.get(&at).copied().unwrap_or(0));
        let address = (1 << 48) | at([273, 3, 5, 7], 1) & 0xffff_ffff_ffff;
        assert_eq!(translate(0x5000, LA57, address, read), Ok(0x1_2345_6001));
        assert_eq!(translate(0x1000, 0, address, read), Ok(0x1_2345_6001));
    }

    #[test]
    fn tables_may_be_out_of_reach() {
        let tables = tables();
        let read = |at| tables.get(&at).copied().filter(|_| at < 0x3000);
        let address = at([273, 3, 5, 7], 0);
        assert_eq!(
            translate(0x1000, 0, address, read),
            Err(Fault::Unreadable(0x3000 + 8 * 5))
        );
    }
}
