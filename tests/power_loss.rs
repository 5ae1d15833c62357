// SPDX-License-Identifier: GPL-2.0-only

//! The model of a memory that can lose power: each state that a store can be in, and each image
//! that a power loss can leave of it. A state that the model forgot would be a bug that no test of
//! power loss could find.

use pmem_core::persist::{
    model::Memory,
    words::{
        Bus,
        Words, //
    },
    Cache,
    CopyPolicy,
    Persist, //
};
use std::collections::BTreeSet;

/// The first byte of each granule, in all images of a power loss now.
fn images(memory: &Memory) -> BTreeSet<Vec<u8>> {
    memory
        .crash_images(1 << 12, 0)
        .map(|image| image.into_iter().step_by(8).collect())
        .collect()
}

/// How bytes get into the memory; what is then found after a power loss is the same by each. The
/// last has a mapping in which no line gets dirty.
const MODES: [(Cache, CopyPolicy); 3] = [
    (Cache::WriteBack, CopyPolicy::NonTemporal),
    (Cache::WriteBack, CopyPolicy::WriteBack),
    (Cache::WriteCombining, CopyPolicy::Auto),
];

/// Sets the granule of this number to `byte`s, so that just a fence is missing.
fn put(memory: &Memory, (cache, copy): (Cache, CopyPolicy), granule: usize, byte: u8) {
    let persist = Persist::mapped(memory.cpu(0).mapped(cache), cache, copy);
    // SAFETY: Both have 8 bytes.
    unsafe { persist.copy(memory.addr(granule * 8), [byte; 8].as_ptr(), 8) };
}

/// Sets the granule of this number to `byte`s, past the cache.
fn stream(memory: &Memory, granule: usize, byte: u8) {
    put(memory, MODES[0], granule, byte);
}

/// Writes back the line of the granule of this number.
fn write_back(memory: &Memory, granule: usize) {
    // SAFETY: The memory has these bytes.
    unsafe { Persist::on(memory).write_back(memory.addr(granule * 8), 8) };
}

fn fence(memory: &Memory) {
    Persist::on(memory).fence();
}

#[test]
fn a_dirty_line_may_be_evicted_and_a_fence_alone_does_not_help() {
    let memory = Memory::new(16);

    memory.write(0, &[1; 8]);
    assert_eq!(images(&memory), [vec![0, 0], vec![1, 0]].into());

    fence(&memory);
    assert_eq!(images(&memory), [vec![0, 0], vec![1, 0]].into());

    write_back(&memory, 0);
    assert_eq!(images(&memory), [vec![0, 0], vec![1, 0]].into());

    fence(&memory);
    assert_eq!(images(&memory), [vec![1, 0]].into());
    assert_eq!(memory.in_flight(), 0);
}

#[test]
fn what_is_put_needs_just_a_fence_and_keeps_no_order() {
    for mode in MODES {
        let memory = Memory::new(16);

        put(&memory, mode, 0, 1);
        put(&memory, mode, 1, 2);
        assert_eq!(
            images(&memory),
            [vec![0, 0], vec![1, 0], vec![0, 2], vec![1, 2]].into()
        );

        fence(&memory);
        assert_eq!(images(&memory), [vec![1, 2]].into());
    }
}

#[test]
fn a_fence_orders() {
    for [first, second] in MODES.into_iter().flat_map(|a| MODES.map(|b| [a, b])) {
        let memory = Memory::new(16);

        put(&memory, first, 0, 1);
        fence(&memory);
        put(&memory, second, 1, 2);
        assert_eq!(images(&memory), [vec![1, 0], vec![1, 2]].into());
    }
}

#[test]
fn a_line_is_written_back_with_what_others_stored_to_it() {
    // A copy through the cache makes what is beside it durable, too; one past it does not.
    for (mode, images_after) in [
        (MODES[0], BTreeSet::from([vec![0, 2], vec![1, 2]])),
        (MODES[1], BTreeSet::from([vec![1, 2]])),
        (MODES[2], BTreeSet::from([vec![0, 2], vec![1, 2]])),
    ] {
        let memory = Memory::new(16);

        memory.write(0, &[1; 8]);
        put(&memory, mode, 1, 2);
        fence(&memory);
        assert_eq!(images(&memory), images_after);
    }
}

#[test]
fn where_no_line_gets_dirty_each_store_is_on_its_way_at_once() {
    for cache in Cache::ALL {
        let memory = Memory::new(16);
        let persist = Persist::on(memory.cpu(1).mapped(cache));
        let durable = match cache {
            Cache::WriteBack => [0, 0],
            _ => [1, 0],
        };

        assert!(persist.store_u64_cached(memory.slice(), 0, 0x0101_0101_0101_0101));
        assert_eq!(images(&memory), [vec![0, 0], vec![1, 0]].into());

        // The fence of another CPU does not wait for it.
        fence(&memory);
        assert_eq!(images(&memory), [vec![0, 0], vec![1, 0]].into());

        persist.fence();
        assert_eq!(memory.durable()[0], durable[0]);
        assert_eq!(memory.durable()[8], durable[1]);
    }
}

#[test]
fn a_line_is_written_back_as_it_was() {
    let memory = Memory::new(8);

    memory.write(0, &[1; 8]);
    write_back(&memory, 0);
    memory.write(0, &[2; 8]);
    assert_eq!(images(&memory), [vec![0], vec![1], vec![2]].into());

    // What was stored later is still dirty, what was there before is gone.
    fence(&memory);
    assert_eq!(images(&memory), [vec![1], vec![2]].into());
}

#[test]
fn a_line_is_written_back_as_a_whole() {
    let memory = Memory::new(128);

    memory.write(0, &[1; 128]);
    write_back(&memory, 3);
    fence(&memory);

    assert_eq!(memory.in_flight(), 8);
    assert_eq!(memory.durable(), [[1; 64], [0; 64]].concat());
}

#[test]
fn a_fence_waits_for_its_own_cpu() {
    let memory = Memory::new(16);
    let other = Persist::on(memory.cpu(1));

    other.write_bytes(memory.slice(), &[1; 8]);
    assert!(other.store_u64(memory.slice(), 8, 0x0202_0202_0202_0202));
    fence(&memory);
    assert_eq!(memory.in_flight(), 2);

    // One that has written the line back waits for what the other stored there through the cache.
    write_back(&memory, 1);
    fence(&memory);
    assert_eq!(images(&memory), [vec![1, 2]].into());
}

#[test]
fn of_two_cpus_the_later_store_counts() {
    let memory = Memory::new(8);
    let [first, second] = [0, 1].map(|cpu| Persist::on(memory.cpu(cpu)));

    assert!(first.store_u64(memory.slice(), 0, 1));
    assert!(second.store_u64(memory.slice(), 0, 2));
    assert_eq!(images(&memory), [vec![0], vec![1], vec![2]].into());

    // The fence of the first is for its own store alone, which does not hide the later one.
    let later = memory.crash_images(8, 0).count();
    first.fence();
    assert_eq!(images(&memory), [vec![1], vec![2]].into());
    assert!(memory.crash_images(8, 0).count() < later);

    second.fence();
    assert_eq!(images(&memory), [vec![2]].into());
    assert_eq!(memory.in_flight(), 0);
}

#[test]
fn the_fence_of_the_later_store_is_enough() {
    let memory = Memory::new(8);
    let [first, second] = [0, 1].map(|cpu| Persist::on(memory.cpu(cpu)));

    assert!(first.store_u64(memory.slice(), 0, 1));
    assert!(second.store_u64(memory.slice(), 0, 2));
    second.fence();
    assert_eq!(images(&memory), [vec![2]].into());

    // What the first had put on its way does not come back.
    first.fence();
    assert_eq!(images(&memory), [vec![2]].into());
}

#[test]
fn a_value_is_stored_at_once() {
    let memory = Memory::boot(&[9; 72]);
    let persist = Persist::on(&memory);
    let value = u64::from_le_bytes([1, 2, 3, 4, 5, 6, 7, 8]);

    assert!(persist.store_u64_cached(memory.slice(), 64, value));
    persist.fence();
    let images: BTreeSet<_> = memory.crash_images(8, 0).collect();
    let [old, new] = [[9; 8], [1, 2, 3, 4, 5, 6, 7, 8]].map(|end| [&[9; 64][..], &end].concat());
    assert_eq!(images, [old, new.clone()].into());
    assert_eq!(memory.slice().load_u64(64), Some(value));

    persist.flush(memory.slice());
    persist.fence();
    assert_eq!(memory.durable(), new);

    assert!(!persist.store_u64(memory.slice(), 68, value));
    assert!(!persist.store_u64(memory.slice(), 72, value));
    assert_eq!(memory.in_flight(), 0);
}

#[test]
fn what_was_overwritten_and_made_durable_does_not_come_back() {
    for mode in MODES {
        let memory = Memory::new(8);

        memory.write(0, &[1; 8]);
        put(&memory, mode, 0, 2);
        assert_eq!(images(&memory), [vec![0], vec![1], vec![2]].into());

        fence(&memory);
        assert_eq!(images(&memory), [vec![2]].into());
        assert_eq!(memory.in_flight(), 0);
    }
}

#[test]
fn what_was_overwritten_in_part_and_made_durable_does_not_come_back() {
    let memory = Memory::boot(&[2; 8]);

    memory.write(0, &[3; 8]);
    // SAFETY: Both have 4 bytes.
    unsafe { Persist::on(&memory).copy(memory.addr(4), [4; 4].as_ptr(), 4) };
    fence(&memory);

    let halves: BTreeSet<_> = memory.crash_images(100, 0).collect();
    let [old, new] = [[2, 2, 2, 2, 4, 4, 4, 4], [3, 3, 3, 3, 4, 4, 4, 4]];
    assert_eq!(halves, [old.to_vec(), new.to_vec()].into());
}

#[test]
fn behind_a_bus_a_fence_posts_and_a_load_of_any_cpu_pushes() {
    for mode in MODES {
        let memory = Memory::new(24).behind_bus();
        let [own, other] = [0, 1].map(|cpu| Words::on(memory.cpu(cpu)));
        let all = BTreeSet::from([vec![0, 0, 0], vec![1, 0, 0]]);

        put(&memory, mode, 0, 1);
        assert_eq!(images(&memory), all);

        // It is not out of its CPU, so that what another one does is nothing to it.
        other.fence();
        assert!(other.drain(memory.slice(), 0).is_some());
        assert_eq!(images(&memory), all);

        own.fence();
        assert_eq!(images(&memory), all);
        own.fence();
        assert_eq!(images(&memory), all);

        // Where it is read does not matter, nor what is not posted yet.
        put(&memory, mode, 1, 2);
        assert!(other.drain(memory.slice(), 16).is_some());
        assert_eq!(images(&memory), [vec![1, 0, 0], vec![1, 2, 0]].into());

        assert!(own.drain(memory.slice(), 16).is_some());
        assert_eq!(images(&memory), [vec![1, 2, 0]].into());
        assert_eq!(memory.in_flight(), 0);
    }
}

#[test]
fn behind_a_bus_a_dirty_line_is_not_posted() {
    let memory = Memory::new(16).behind_bus();
    let words = Words::on(&memory);

    memory.write(0, &[1; 8]);
    assert!(words.drain(memory.slice(), 8).is_some());
    assert_eq!(images(&memory), [vec![0, 0], vec![1, 0]].into());

    write_back(&memory, 0);
    assert!(words.drain(memory.slice(), 8).is_some());
    assert_eq!(images(&memory), [vec![1, 0]].into());
}

#[test]
fn behind_a_bus_a_plain_load_promises_nothing() {
    let memory = Memory::new(16).behind_bus();
    let words = Words::on(&memory);

    // All but the last granule are loaded plainly.
    stream(&memory, 0, 1);
    words.fence();
    let mut granule = 0_u64;
    // SAFETY: The memory has the granule, and `granule` is one.
    unsafe { (&memory).load_granules((&raw mut granule).cast(), memory.addr(0), 1) };
    assert_eq!(granule, 0x0101_0101_0101_0101);
    assert_eq!(images(&memory), [vec![0, 0], vec![1, 0]].into());
}

#[test]
#[should_panic(expected = "is not a multiple of 8")]
fn a_load_that_is_not_aligned_is_a_bug_of_the_test() {
    let memory = Memory::new(16);
    let mut granule = 0_u64;

    // SAFETY: The memory has these bytes, and `granule` has as many.
    unsafe { (&memory).load_granules((&raw mut granule).cast(), memory.addr(1), 1) };
}

#[test]
#[should_panic(expected = "are not in this memory")]
fn a_load_beyond_the_end_is_a_bug_of_the_test() {
    let memory = Memory::new(12);

    // SAFETY: There are bytes after those of the memory, in its last line.
    unsafe { (&memory).load_through(memory.addr(8)) };
}

#[test]
fn a_store_is_cut_at_granules() {
    let memory = Memory::new(32);

    memory.write(7, &[1; 10]);

    assert_eq!(memory.in_flight(), 3);
    assert_eq!(memory.crash_images(8, 0).count(), 8);
    assert_eq!(memory.crash_images(8, 0).collect::<BTreeSet<_>>().len(), 8);
}

#[test]
fn what_cpus_see_is_not_what_is_durable() {
    let memory = Memory::boot(b"before");

    memory.write(0, b"after");
    assert_eq!(memory.read(0, 6), b"aftere");
    assert_eq!(memory.durable(), b"before");

    // SAFETY: The byte is in the memory, which no other thread uses.
    assert_eq!(unsafe { memory.addr(1).read() }, b'f');
}

#[test]
fn after_a_boot_all_is_durable() {
    let memory = Memory::new(64);
    stream(&memory, 1, 1);

    for image in memory.crash_images(2, 0) {
        let booted = Memory::boot(&image);
        assert_eq!(booted.read(0, 64), image);
        assert_eq!(booted.crash_images(2, 0).collect::<Vec<_>>(), [image]);
    }
}

#[test]
fn too_many_images_are_sampled_with_the_extremes_in_them() {
    const GRANULES: usize = 1000;
    let memory = Memory::new(GRANULES * 8);
    for granule in 0..GRANULES {
        stream(&memory, granule, 1);
    }

    let images: Vec<_> = memory.crash_images(400, 7).collect();
    let survivors: Vec<usize> = images
        .iter()
        .map(|image| image.iter().step_by(8).filter(|&&byte| byte == 1).count())
        .collect();

    assert_eq!(images.len(), 400);
    for extreme in [0, 1, GRANULES - 1, GRANULES] {
        assert!(survivors.contains(&extreme));
    }
    assert!(survivors.iter().any(|n| (400..600).contains(n)));
    let different: BTreeSet<_> = images.iter().collect();
    assert!(different.len() > 300);

    // The same seed gives the same images, another gives others.
    assert!(memory.crash_images(400, 7).eq(images.iter().cloned()));
    assert!(!memory.crash_images(400, 8).eq(images));
}

#[test]
#[should_panic(expected = "are not in this memory")]
fn a_store_beyond_the_end_is_a_bug_of_the_test() {
    let memory = Memory::new(64);

    memory.write(60, &[0; 5]);
}
