// SPDX-License-Identifier: GPL-2.0-only

//! The file of a log.

use pmem_trace::record::{Bytes, Event, Fence, How, Log, Lost, WriteBack, Writer, LINE};
use proptest::prelude::*;
use std::io;

const START: u64 = 0x1_0000_0000;
const SIZE: u64 = 1 << 20;

fn written(events: &[Event]) -> Vec<u8> {
    let mut writer = Writer::new(Vec::new(), START..START + SIZE).unwrap();
    for event in events {
        writer.write(event).unwrap();
    }
    writer.end().unwrap()
}

fn read(file: &[u8]) -> io::Result<Vec<Event>> {
    Log::new(file)?.collect()
}

fn store(address: u64, bytes: &[u8], how: How) -> Event {
    Event::Store {
        cpu: 0,
        address,
        bytes: Bytes::new(bytes).unwrap(),
        how,
    }
}

/// A log that another program reads by the description.
#[test]
fn the_file_is_as_documented() {
    let events = [
        store(START, &[1, 2, 3, 4, 5, 6, 7, 8], How::NonTemporal),
        store(START + 8, &[9], How::Cached),
        store(START, &[1, 2, 3], How::Cached),
        Event::WriteBack {
            cpu: 0,
            line: START + 128,
            how: WriteBack::Clflushopt,
        },
        Event::WriteBack {
            cpu: 1,
            line: START + 192,
            how: WriteBack::Clwb,
        },
        Event::Fence {
            cpu: 1,
            kind: Fence::Locked,
        },
        Event::Mark {
            cpu: 1,
            value: 0xa5,
        },
        Event::Lost {
            cpu: 1,
            what: Lost::WriteBack,
            address: 300,
        },
    ];
    let mut file = b"PMEMLOG1".to_vec();
    file.extend(START.to_le_bytes());
    file.extend(SIZE.to_le_bytes());
    file.extend([(3 << 5) | (1 << 4) | (1 << 3), 1, 2, 3, 4, 5, 6, 7, 8]);
    file.extend([1 << 4, 9]);
    // 9 bytes back.
    file.extend([7 << 5, 3, 17, 1, 2, 3]);
    file.extend([(1 << 3) | 1, 4]);
    file.extend([5, 1, (1 << 5) | 1]);
    file.extend([(2 << 3) | 2]);
    file.extend([3, 0xa5]);
    file.extend([(1 << 3) | 4, 0xac, 0x02]);
    file.extend([7, 8]);
    assert_eq!(written(&events), file);
    assert_eq!(Log::new(&*file).unwrap().range(), START..START + SIZE);
    assert_eq!(read(&file).unwrap(), events);
}

#[test]
fn bytes_are_at_most_a_line() {
    assert_eq!(&*Bytes::new(&[7; 64]).unwrap(), [7; 64]);
    assert_eq!(Bytes::new(&[7; 65]), None);
    assert_eq!(format!("{:?}", Bytes::new(&[0x0a, 0xff]).unwrap()), "0aff");
}

/// A copy of 4 KiB by words is to take little more than its bytes.
#[test]
fn a_copy_is_compact() {
    let words = (0..512).map(|n| store(START + 8 * n, &n.to_le_bytes(), How::NonTemporal));
    let file = written(&words.collect::<Vec<_>>());
    assert!(file.len() <= 4096 + 512 + 32, "{} bytes", file.len());
}

#[test]
fn fences_that_change_nothing_are_left_out() {
    let fence = |cpu, kind| Event::Fence { cpu, kind };
    let mark = Event::Mark { cpu: 0, value: 0 };
    let (locked, sfence) = (fence(0, Fence::Locked), fence(0, Fence::Sfence));
    let other = fence(1, Fence::Locked);
    let file = written(&[
        locked, locked, sfence, locked, other, sfence, other, mark, mark, locked, locked, mark,
    ]);
    assert_eq!(
        read(&file).unwrap(),
        [locked, sfence, other, mark, mark, locked, mark]
    );
    // All of a CPU that is not known are kept.
    let far = fence(16, Fence::Sfence);
    assert_eq!(read(&written(&[far, far])).unwrap(), [far, far]);
}

/// A machine that was killed, or a disk that was full, must not pass for one that did less.
#[test]
fn a_file_that_was_cut_off_is_an_error() {
    let events = [
        store(START, &[1; 8], How::Cached),
        Event::Mark { cpu: 0, value: 1 },
        store(START + 4096, &[1; 13], How::NonTemporal),
    ];
    let file = written(&events);
    for len in 0..file.len() {
        let error = read(&file[..len]).unwrap_err();
        assert!(error.to_string().contains("cut off"), "{len}: {error}");
    }
    let error = read(&[&*file, &[0]].concat()).unwrap_err();
    assert!(error.to_string().contains("goes on"), "{error}");
}

#[test]
fn nonsense_is_an_error() {
    let begin = &written(&[])[..24];
    const CONTINUES: u8 = 1 << 4;
    for (what, bytes) in [
        ("a store beyond the range", &[1 << 4, 1, 0, 1][..]),
        ("a store beyond the range", &[0, 0xff, 0xff, 0xff, 0x7f, 1]),
        ("a store's length", &[(7 << 5) | (1 << 4), 65]),
        ("a store's length", &[(7 << 5) | (1 << 4), 0]),
        ("a line beyond the range", &[1, 1]),
        ("an unknown write-back", &[(3 << 3) | 1]),
        ("an unknown fence", &[(4 << 3) | 2]),
        ("an unknown loss", &[(2 << 3) | 4]),
        ("a CPU's number", &[5, 0xff, 0xff, 0xff, 0xff, 0x1f]),
        (
            "more than 64 bits",
            &[4, 255, 255, 255, 255, 255, 255, 255, 255, 255, 2],
        ),
        ("events are missing", &[7, 1]),
        ("an unknown event", &[6]),
    ] {
        // The first would be in the range, were it not for what comes before.
        let events: &[u8] = match bytes {
            [CONTINUES, ..] => &[0, 0xfe, 0xff, 0x7f, 9, 1 << 4, 9],
            bytes => bytes,
        };
        let error = read(&[begin, events].concat()).unwrap_err();
        assert!(error.to_string().contains(what), "{bytes:?}: {error}");
    }
    assert!(read(b"PMEMLOG0................").is_err());
    let endless = [b"PMEMLOG1".as_slice(), &[0xff; 16]].concat();
    assert!(read(&endless).is_err());
}

/// After an error nothing comes, so that a loop ends.
#[test]
fn an_error_is_the_last() {
    let file = written(&[Event::Mark { cpu: 0, value: 1 }]);
    let mut log = Log::new(&file[..file.len() - 1]).unwrap();
    assert!(log.next().unwrap().is_ok());
    assert!(log.next().unwrap().is_err());
    assert!(log.next().is_none());
}

#[test]
fn a_log_is_opened_by_its_path() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let error = Log::open(&path).unwrap_err();
    assert!(error.to_string().contains("log"), "{error}");
    let mark = Event::Mark { cpu: 0, value: 1 };
    std::fs::write(&path, written(&[mark])).unwrap();
    let events: io::Result<Vec<Event>> = Log::open(&path).unwrap().collect();
    assert_eq!(events.unwrap(), [mark]);
}

fn an_event() -> impl Strategy<Value = Event> {
    let cpu = 0..20u32;
    let how = prop_oneof![Just(How::Cached), Just(How::NonTemporal)];
    prop_oneof![
        (
            cpu.clone(),
            0..SIZE - 64,
            prop::collection::vec(any::<u8>(), 1..=64),
            how
        )
            .prop_map(|(cpu, at, bytes, how)| Event::Store {
                cpu,
                address: START + at,
                bytes: Bytes::new(&bytes).unwrap(),
                how
            }),
        (cpu.clone(), 0..SIZE / LINE, 0..3).prop_map(|(cpu, line, how)| Event::WriteBack {
            cpu,
            line: START + line * LINE,
            how: [WriteBack::Clwb, WriteBack::Clflushopt, WriteBack::Clflush][how as usize],
        }),
        (cpu.clone(), 0..4).prop_map(|(cpu, kind)| Event::Fence {
            cpu,
            kind: [
                Fence::Sfence,
                Fence::Mfence,
                Fence::Locked,
                Fence::Serializing
            ][kind as usize],
        }),
        (cpu.clone(), any::<u8>()).prop_map(|(cpu, value)| Event::Mark { cpu, value }),
        (cpu, any::<u64>(), any::<bool>()).prop_map(|(cpu, address, store)| Event::Lost {
            cpu,
            what: match store {
                true => Lost::Store,
                false => Lost::WriteBack,
            },
            address
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_written_is_read(events in prop::collection::vec(an_event(), 0..100)) {
        let is_fence = |event: &Event| matches!(event, Event::Fence { .. });
        let mut expected: Vec<Event> = Vec::new();
        for event in &events {
            let since = expected.iter().rev().take_while(|event| is_fence(event));
            let mut known = since.filter(|fence| fence.cpu() < 16);
            if !(is_fence(event) && known.any(|fence| fence == event)) {
                expected.push(*event);
            }
        }
        prop_assert_eq!(read(&written(&events)).unwrap(), expected);
    }

    /// No file makes the reader fail otherwise than by an error.
    #[test]
    fn any_bytes_end(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let file = [&written(&[])[..24], &bytes].concat();
        let _ = read(&file);
    }
}
