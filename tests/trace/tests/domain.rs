// SPDX-License-Identifier: GPL-2.0-only

//! The persistence model, against what it says of itself, and against a second one that is naive and slow.

use pmem_trace::domain::{Domain, Patch, Rules, Unusable};
use pmem_trace::record::{Bytes, Event, Fence, How, Lost, WriteBack, LINE};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::ops::Range;

const START: u64 = 0x1_0000_0000;
const SIZE: u64 = 2 * LINE;
const RELAXED: Rules = Rules { strict: false };
const STRICT: Rules = Rules { strict: true };

type Image = Vec<u8>;

fn store(at: u64, bytes: &[u8]) -> Event {
    Event::Store {
        cpu: 0,
        address: START + at,
        bytes: Bytes::new(bytes).unwrap(),
        how: How::Cached,
    }
}

fn stream(at: u64, bytes: &[u8]) -> Event {
    Event::Store {
        cpu: 0,
        address: START + at,
        bytes: Bytes::new(bytes).unwrap(),
        how: How::NonTemporal,
    }
}

fn write_back(at: u64) -> Event {
    Event::WriteBack {
        cpu: 0,
        line: START + at,
        how: WriteBack::Clwb,
    }
}

fn fence(kind: Fence) -> Event {
    Event::Fence { cpu: 0, kind }
}

const SFENCE: Event = Event::Fence {
    cpu: 0,
    kind: Fence::Sfence,
};

fn on(cpu: u32, event: Event) -> Event {
    match event {
        Event::Store {
            address,
            bytes,
            how,
            ..
        } => Event::Store {
            cpu,
            address,
            bytes,
            how,
        },
        Event::WriteBack { line, how, .. } => Event::WriteBack { cpu, line, how },
        Event::Fence { kind, .. } => Event::Fence { cpu, kind },
        Event::Mark { value, .. } => Event::Mark { cpu, value },
        Event::Lost { what, address, .. } => Event::Lost { cpu, what, address },
    }
}

fn domain(rules: Rules, events: &[Event]) -> Domain {
    let mut domain = Domain::new(START..START + SIZE, rules);
    for event in events {
        domain.apply(event).unwrap();
    }
    domain
}

fn patch(image: &mut [u8], patches: &[Patch]) {
    for patch in patches {
        patch.apply(image, START);
    }
}

/// The images of all states, in their order.
fn images(domain: &Domain, bound: usize, seed: u64) -> Vec<Image> {
    let mut durable = vec![0; SIZE as usize];
    patch(&mut durable, &domain.durable());
    let image = |patches: &[Patch]| {
        let mut image = durable.clone();
        patch(&mut image, patches);
        image
    };
    domain
        .states(bound, seed)
        .map(|state| image(&state.patches))
        .collect()
}

/// What `len` bytes at `at` can be after a power failure.
fn outcomes(rules: Rules, events: &[Event], at: usize, len: usize) -> Vec<Vec<u8>> {
    let domain = domain(rules, events);
    assert!(domain.states(1 << 20, 0).is_all());
    let images = images(&domain, 1 << 20, 0);
    let outcomes = images.iter().map(|image| image[at..at + len].to_vec());
    outcomes.collect::<BTreeSet<_>>().into_iter().collect()
}

#[test]
fn a_store_is_durable_after_a_write_back_and_a_fence() {
    let new = store(3, b"n");
    let is_durable: &[&[Event]] = &[
        &[new, write_back(0), SFENCE],
        &[new, write_back(0), fence(Fence::Mfence)],
        &[new, write_back(0), fence(Fence::Locked)],
        &[new, write_back(0), write_back(0), SFENCE],
        &[new, write_back(0), write_back(64), SFENCE, SFENCE],
        &[SFENCE, new, on(1, write_back(0)), on(1, SFENCE)],
        &[stream(3, b"n"), SFENCE],
        &[stream(3, b"n"), fence(Fence::Serializing)],
    ];
    let may_be_lost: &[&[Event]] = &[
        &[new],
        &[new, write_back(0)],
        &[new, SFENCE],
        &[write_back(0), new, SFENCE],
        &[new, SFENCE, write_back(0)],
        &[new, write_back(64), SFENCE],
        &[new, write_back(0), fence(Fence::Serializing)],
        &[new, write_back(0), on(1, SFENCE)],
        &[new, on(1, write_back(0)), SFENCE],
        &[stream(3, b"n")],
        &[stream(3, b"n"), write_back(0)],
        &[stream(3, b"n"), on(1, SFENCE)],
        &[SFENCE, stream(3, b"n")],
    ];
    let (old, new): (&[u8], &[u8]) = (&[0], b"n");
    for events in is_durable {
        assert_eq!(outcomes(RELAXED, events, 3, 1), [new], "{events:?}");
    }
    for events in may_be_lost {
        assert_eq!(outcomes(RELAXED, events, 3, 1), [old, new], "{events:?}");
    }
}

#[test]
fn strictly_only_fences_are_fences() {
    for kind in [Fence::Locked, Fence::Serializing] {
        for events in [
            [store(0, b"n"), write_back(0), fence(kind)],
            [stream(0, b"n"), fence(kind), fence(kind)],
        ] {
            assert_eq!(outcomes(STRICT, &events, 0, 1).len(), 2, "{events:?}");
        }
    }
    for kind in [Fence::Sfence, Fence::Mfence] {
        for events in [
            [store(0, b"n"), write_back(0), fence(kind)],
            [stream(0, b"n"), fence(kind), fence(kind)],
        ] {
            assert_eq!(outcomes(STRICT, &events, 0, 1), [b"n"], "{events:?}");
        }
    }
}

/// A serializing instruction takes the stores that it is for, and leaves the others to the next fence.
#[test]
fn what_one_fence_leaves_another_one_takes() {
    let mut events = vec![
        store(0, b"c"),
        stream(8, b"n"),
        write_back(0),
        fence(Fence::Serializing),
    ];
    assert_eq!(outcomes(RELAXED, &events, 0, 1).len(), 2);
    assert_eq!(outcomes(RELAXED, &events, 8, 1), [b"n"]);
    events.push(SFENCE);
    assert_eq!(outcomes(RELAXED, &events, 0, 1), [b"c"]);
}

/// What is stored after a write-back is not written back.
#[test]
fn a_write_back_is_of_the_past() {
    let events = [store(0, b"1"), write_back(0), store(0, b"2"), SFENCE];
    assert_eq!(outcomes(RELAXED, &events, 0, 1), [b"1", b"2"]);
}

#[test]
fn a_line_has_a_prefix_of_its_cached_stores() {
    let events = [store(8, b"1"), store(0, b"2"), store(8, b"3")];
    let line = |first: u8, second: u8| {
        let mut line = [0; 9];
        (line[0], line[8]) = (first, second);
        line.to_vec()
    };
    assert_eq!(
        outcomes(RELAXED, &events, 0, 9),
        [
            line(0, 0),
            line(0, b'1'),
            line(b'2', b'1'),
            line(b'2', b'3')
        ]
    );
    // Of two lines each is by itself.
    let events = [store(0, b"1"), store(64, b"2")];
    assert_eq!(outcomes(RELAXED, &events, 0, 65).len(), 4);
}

#[test]
fn non_temporal_stores_have_no_order_but_in_a_granule() {
    let events = [stream(0, b"1"), stream(8, b"2")];
    assert_eq!(outcomes(RELAXED, &events, 0, 9).len(), 4);
    let events = [stream(0, b"11"), stream(1, b"2")];
    assert_eq!(
        outcomes(RELAXED, &events, 0, 2),
        [b"\0\0".as_slice(), b"11", b"12"]
    );
    // Nor with cached ones of the line.
    let events = [store(0, b"1"), stream(8, b"2")];
    assert_eq!(outcomes(RELAXED, &events, 0, 9).len(), 4);
}

/// A store of up to 8 bytes that is aligned is there or not; others may be torn at multiples of 8.
#[test]
fn stores_are_torn_between_granules() {
    assert_eq!(outcomes(RELAXED, &[store(8, b"12345678")], 8, 8).len(), 2);
    let torn = [b"\0\0\0\0\0\0\0\0".as_slice(), b"1234\0\0\0\0", b"12345678"];
    assert_eq!(outcomes(RELAXED, &[store(4, b"12345678")], 4, 8), torn);
    assert_eq!(outcomes(RELAXED, &[stream(4, b"12345678")], 4, 8).len(), 4);
    // From one line to the next there is no order.
    assert_eq!(outcomes(RELAXED, &[store(60, b"12345678")], 60, 8).len(), 4);
}

#[test]
fn marks_order_nothing() {
    let mark = Event::Mark { cpu: 0, value: 7 };
    let events = [store(0, b"1"), write_back(0), mark];
    assert_eq!(outcomes(RELAXED, &events, 0, 1).len(), 2);
}

#[test]
fn what_is_beyond_the_range_is_left_out() {
    let mut domain = Domain::new(START + 4..START + 12, RELAXED);
    domain.apply(&stream(0, &[1; 16])).unwrap();
    domain.apply(&SFENCE).unwrap();
    let whole = Patch {
        address: START + 4,
        bytes: vec![1; 8],
    };
    assert_eq!(domain.durable(), std::slice::from_ref(&whole));
    // So does a patch to a smaller image.
    let mut image = [0; 4];
    whole.apply(&mut image, START + 6);
    assert_eq!(image, [1; 4]);
    whole.apply(&mut image, START + 20);
    let mut image = [0; 4];
    whole.apply(&mut image, START + 2);
    assert_eq!(image, [0, 0, 1, 1]);
}

#[test]
fn what_becomes_durable_is_given_once() {
    let mut domain = Domain::new(START..START + SIZE, RELAXED);
    let mut image = vec![0; SIZE as usize];
    for n in 1..=9 {
        for event in [stream(8 * (n % 3), &[n as u8; 8]), SFENCE] {
            domain.apply(&event).unwrap();
        }
        if n % 2 == 0 {
            let fresh = domain.take_durable();
            assert!(!fresh.is_empty());
            patch(&mut image, &fresh);
            assert_eq!(domain.take_durable(), []);
        }
    }
    patch(&mut image, &domain.take_durable());
    let mut whole = vec![0; SIZE as usize];
    patch(&mut whole, &domain.durable());
    assert_eq!(image, whole);
    assert_eq!(whole[..24], [[9; 8], [7; 8], [8; 8]].concat());
}

#[test]
fn a_log_with_a_loss_is_refused() {
    let mut domain = Domain::new(START..START + SIZE, RELAXED);
    let lost = Event::Lost {
        cpu: 0,
        what: Lost::Store,
        address: 0xffff_c900_0000_1234,
    };
    let error = domain.apply(&lost).unwrap_err();
    assert_eq!(error, Unusable::Lost(lost));
    let cpu = domain.apply(&on(64, SFENCE)).unwrap_err();
    assert_eq!(cpu, Unusable::Cpu(64));
    assert!(cpu.to_string().contains("64"), "{cpu}");
    domain.apply(&on(63, SFENCE)).unwrap();
}

#[test]
fn nothing_pending_is_one_state() {
    let domain = domain(RELAXED, &[stream(0, b"1"), SFENCE]);
    assert_eq!(domain.pending().count(), 0);
    let states: Vec<_> = domain.states(0, 0).collect();
    assert_eq!(states.len(), 1);
    assert_eq!(states[0].patches, []);
}

/// Many lines, of which all are there but one, or none but one: what a missing write-back does.
#[test]
fn some_of_many_states_are_near_the_first_and_the_last() {
    const LINES: u64 = 256;
    let mut domain = Domain::new(START..START + LINES * LINE, STRICT);
    for line in 0..LINES {
        domain.apply(&store(line * LINE, &[1])).unwrap();
    }
    assert_eq!(domain.pending().count() as u64, LINES);
    let lines = |seed| -> Vec<usize> {
        let states = domain.states(100, seed);
        assert!(!states.is_all());
        let counts = states.map(|state| state.patches.len());
        counts.collect()
    };
    let counts = lines(1);
    assert_eq!(counts.len(), 100);
    assert_eq!((counts[0], counts[99]), (0, LINES as usize));
    let between = |from, to| counts.iter().filter(|&&n| n >= from && n <= to).count();
    assert!(between(1, 4) >= 5, "{counts:?}");
    assert!(between(252, 255) >= 5, "{counts:?}");
    assert!(between(96, 160) >= 20, "{counts:?}");
    assert_eq!(counts, lines(1));
    assert_ne!(counts, lines(2));
}

/// More states than any number: those at random are still some of them.
#[test]
fn a_line_that_is_stored_to_for_ever() {
    let mut domain = Domain::new(START..START + SIZE, STRICT);
    for n in 0..8_000u64 {
        domain
            .apply(&stream(n % 16 * 8, &(n + 1).to_le_bytes()))
            .unwrap();
    }
    for n in 0..8_000u64 {
        domain
            .apply(&store(n % 8 * 8, &(n + 1).to_le_bytes()))
            .unwrap();
    }
    let images = images(&domain, 50, 3);
    assert_eq!(images.len(), 50);
    let words = |image: &[u8]| -> Vec<u64> {
        let words = image.chunks(8).map(|word| word.try_into().unwrap());
        words.map(u64::from_le_bytes).collect()
    };
    assert_eq!(words(&images[0]), [0; 16]);
    let all: Vec<u64> = (7993..=8000).chain(7993..=8000).collect();
    assert_eq!(words(&images[49]), all);
    let distinct: BTreeSet<_> = images.iter().collect();
    assert!(distinct.len() > 25, "{} distinct", distinct.len());
}

/// A piece of a store that the naive model keeps.
#[derive(Debug, Clone)]
struct Piece {
    event: usize,
    cpu: u32,
    how: How,
    address: u64,
    bytes: Vec<u8>,
}

impl Piece {
    fn line(&self) -> u64 {
        self.address / 64
    }

    /// Whether `self` must be in memory where the `later` one is.
    fn precedes(&self, later: &Self) -> bool {
        let is_ordered =
            self.line() == later.line() && self.how == How::Cached && later.how == How::Cached;
        is_ordered || self.address / 8 == later.address / 8
    }
}

/// All images that a power failure could leave, by the words of the model's description: each subset of all pieces is
/// looked at.
#[derive(Debug)]
struct Naive {
    durable: Image,
    /// How many subsets are possible.
    count: usize,
    images: BTreeSet<Image>,
}

impl Naive {
    fn new(range: &Range<u64>, rules: Rules, events: &[Event]) -> Self {
        let pieces = pieces(range, events);
        let mut certain: BTreeSet<usize> = (0..pieces.len())
            .filter(|&n| is_fenced(&pieces[n], rules, events))
            .collect();
        loop {
            let more = (0..pieces.len()).find(|n| {
                let mut later = certain.iter().filter(|&&later| later > *n);
                !certain.contains(n) && later.any(|&later| pieces[*n].precedes(&pieces[later]))
            });
            match more {
                Some(more) => certain.insert(more),
                None => break,
            };
        }
        let image = |there: &dyn Fn(usize) -> bool| {
            let mut image = vec![0; SIZE as usize];
            for (_, piece) in pieces.iter().enumerate().filter(|(n, _)| there(*n)) {
                let at = (piece.address - START) as usize;
                image[at..at + piece.bytes.len()].copy_from_slice(&piece.bytes);
            }
            image
        };
        let mut naive = Self {
            durable: image(&|n| certain.contains(&n)),
            count: 0,
            images: BTreeSet::new(),
        };
        for subset in 0..1u32 << pieces.len() {
            let there = |n: usize| subset & (1 << n) != 0;
            let is_closed = (0..pieces.len()).all(|later| {
                !there(later) || (0..later).all(|n| there(n) || !pieces[n].precedes(&pieces[later]))
            });
            if is_closed && certain.iter().all(|&n| there(n)) {
                naive.count += 1;
                naive.images.insert(image(&there));
            }
        }
        naive
    }
}

fn pieces(range: &Range<u64>, events: &[Event]) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    for (n, event) in events.iter().enumerate() {
        let &Event::Store {
            cpu,
            address,
            bytes,
            how,
        } = event
        else {
            continue;
        };
        for (address, &byte) in (address..).zip(bytes.iter()) {
            if !range.contains(&address) {
                continue;
            }
            match pieces.last_mut() {
                Some(last) if last.event == n && last.address / 8 == address / 8 => {
                    last.bytes.push(byte);
                }
                _ => pieces.push(Piece {
                    event: n,
                    cpu,
                    how,
                    address,
                    bytes: vec![byte],
                }),
            }
        }
    }
    pieces
}

/// Whether a fence has waited for the piece itself.
fn is_fenced(piece: &Piece, rules: Rules, events: &[Event]) -> bool {
    let fenced_after = |begun: usize, by: u32| {
        events[begun..].iter().any(|event| match *event {
            Event::Fence { cpu, kind } if cpu == by => match kind {
                Fence::Sfence | Fence::Mfence => true,
                Fence::Locked => !rules.strict,
                Fence::Serializing => !rules.strict && piece.how == How::NonTemporal,
            },
            _ => false,
        })
    };
    match piece.how {
        How::NonTemporal => fenced_after(piece.event, piece.cpu),
        How::Cached => (piece.event..events.len()).any(|n| match events[n] {
            Event::WriteBack { cpu, line, .. } if line / 64 == piece.line() => fenced_after(n, cpu),
            _ => false,
        }),
    }
}

fn an_event() -> impl Strategy<Value = Event> {
    let a_store = (0..SIZE, 1..=16usize, any::<u8>(), any::<bool>()).prop_map(
        |(at, len, first, is_cached)| {
            let len = len.min((SIZE - at) as usize);
            let bytes: Vec<u8> = (0..len as u8).map(|n| first.wrapping_add(n)).collect();
            match is_cached {
                true => store(at, &bytes),
                false => stream(at, &bytes),
            }
        },
    );
    // Few places, so that stores meet.
    let a_meeting = (0..6u64, any::<[u8; 4]>(), any::<bool>()).prop_map(
        |(at, bytes, is_cached)| match is_cached {
            true => store(4 * at, &bytes),
            false => stream(4 * at, &bytes),
        },
    );
    let a_write_back = (0..2u64).prop_map(|line| write_back(line * LINE));
    let a_fence = prop_oneof![
        4 => Just(Fence::Sfence),
        1 => Just(Fence::Mfence),
        1 => Just(Fence::Locked),
        1 => Just(Fence::Serializing),
    ]
    .prop_map(fence);
    let event = prop_oneof![2 => a_store, 4 => a_meeting, 2 => a_write_back, 2 => a_fence];
    (0..2u32, event).prop_map(|(cpu, event)| on(cpu, event))
}

/// Events with at most so many pieces that all subsets can be looked at.
fn some_events() -> impl Strategy<Value = Vec<Event>> {
    prop::collection::vec(an_event(), 1..16).prop_map(|mut events| {
        while pieces(&(START..START + SIZE), &events).len() > 10 {
            events.pop();
        }
        events
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    /// All states are those of the naive model, each once, and those at random are some of them.
    #[test]
    fn a_naive_model_agrees(
        events in some_events(),
        strict in any::<bool>(),
        seed in any::<u64>(),
        (from, to) in (0..16u64, SIZE - 16..=SIZE),
    ) {
        let rules = Rules { strict };
        let range = START + from..START + to;
        let naive = Naive::new(&range, rules, &events);
        let mut domain = Domain::new(range, rules);
        for event in &events {
            domain.apply(event).unwrap();
        }
        let mut durable = vec![0; SIZE as usize];
        patch(&mut durable, &domain.durable());
        prop_assert_eq!(&durable, &naive.durable);

        let all = images(&domain, usize::MAX, seed);
        prop_assert_eq!(all.len(), naive.count);
        let distinct: BTreeSet<Image> = all.iter().cloned().collect();
        prop_assert_eq!(&distinct, &naive.images);

        let mut last = vec![0; SIZE as usize];
        for piece in pieces(&domain.range(), &events) {
            let at = (piece.address - START) as usize;
            last[at..at + piece.bytes.len()].copy_from_slice(&piece.bytes);
        }
        for bound in [2, 5, naive.count - 1] {
            let some = images(&domain, bound, seed);
            prop_assert!(some.len() <= bound.max(2));
            prop_assert_eq!(some.first(), Some(&durable));
            prop_assert_eq!(some.last(), Some(&last));
            for image in &some {
                prop_assert!(naive.images.contains(image), "{:?}", image);
            }
        }
    }

    /// What is durable stays durable, and is in each state.
    #[test]
    fn what_is_durable_is_in_each_state(events in some_events(), seed in any::<u64>()) {
        let domain = domain(RELAXED, &events);
        let pending: BTreeSet<u64> = domain.pending().collect();
        for state in domain.states(20, seed) {
            for patch in state.patches {
                for address in (patch.address..).take(patch.bytes.len()) {
                    prop_assert!(pending.contains(&(address / LINE * LINE)));
                }
            }
        }
    }
}
