// SPDX-License-Identifier: GPL-2.0-only

//! The plugin's side, without QEMU.

use crate::{Accesses, Counted, Kind, Reply, Request, Shape};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Counts the accesses to the range that it is told to watch.
#[derive(Debug, Default)]
pub struct Watcher {
    /// The range once more, for a look at it without the lock: nearly all accesses of a guest are elsewhere. Empty
    /// while nothing is watched.
    start: AtomicU64,
    end: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    start: u64,
    /// Beyond the last byte.
    end: u64,
    counts: BTreeMap<(Shape, u64), u64>,
    lost: u64,
}

impl Watcher {
    /// Watches nothing yet.
    pub const fn new() -> Self {
        Self {
            start: AtomicU64::new(0),
            end: AtomicU64::new(0),
            state: Mutex::new(State {
                start: 0,
                end: 0,
                counts: BTreeMap::new(),
                lost: 0,
            }),
        }
    }

    /// Whether [`Watcher::note`] may have anything to count. A machine boots faster while it has not.
    pub fn is_watching(&self) -> bool {
        self.end.load(Ordering::Relaxed) != 0
    }

    /// Counts an access by the instruction at `pc` if it is to the range, be it with one byte only. `size` is in bytes,
    /// a power of two; `address` is the physical one, or `None` if that cannot be told.
    pub fn note(&self, kind: Kind, address: Option<u64>, size: u64, pc: u64) {
        let Some(address) = address else {
            self.state().lost += 1;
            return;
        };
        let last = address.saturating_add(size.saturating_sub(1));
        let (start, end) = (&self.start, &self.end);
        if last < start.load(Ordering::Relaxed) || address >= end.load(Ordering::Relaxed) {
            return;
        }
        let mut state = self.state();
        // Which range it is may just have changed.
        if last < state.start || address >= state.end {
            return;
        }
        let shape = Shape {
            kind,
            size,
            aligned: address & size.wrapping_sub(1) == 0,
        };
        *state.counts.entry((shape, pc)).or_default() += 1;
    }

    /// Does what the host asks for.
    pub fn answer(&self, request: Request) -> Reply {
        match request {
            Request::Watch { start, size } => {
                let end = match start.checked_add(size) {
                    Some(end) if size > 0 => end,
                    _ => {
                        return Reply::Refused(format!(
                            "{size} bytes from {start:#x} on are no range"
                        ))
                    }
                };
                let mut state = self.state();
                *state = State {
                    start,
                    end,
                    ..State::default()
                };
                self.start.store(start, Ordering::Relaxed);
                self.end.store(end, Ordering::Relaxed);
                Reply::Done
            }
            Request::Report => {
                let state = self.state();
                let counted = state.counts.iter();
                Reply::Accesses(Accesses {
                    counted: counted
                        .map(|(&(shape, pc), &count)| Counted { shape, pc, count })
                        .collect(),
                    lost: state.lost,
                })
            }
            other => Reply::Refused(format!("{other:?} is not for a counter")),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ask, serve, socket};
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::thread;

    const START: u64 = 0xfe00_0000;
    const SIZE: u64 = 0x1000;
    const PC: u64 = 0xffff_ffff_c000_0000;

    fn watching() -> Watcher {
        let watcher = Watcher::new();
        let request = Request::Watch {
            start: START,
            size: SIZE,
        };
        assert_eq!(watcher.answer(request), Reply::Done);
        watcher
    }

    fn report(watcher: &Watcher) -> Accesses {
        match watcher.answer(Request::Report) {
            Reply::Accesses(accesses) => accesses,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn accesses_count_if_a_byte_is_in_the_range() {
        let end = START + SIZE;
        let cases = [
            (START, 8, true),
            (START - 1, 1, false),
            (START - 8, 8, false),
            (START - 7, 8, true),
            (end - 1, 1, true),
            (end - 1, 8, true),
            (end, 1, false),
            (0, 1, false),
            (u64::MAX, 1, false),
            (u64::MAX, 16, false),
        ];
        for (address, size, counts) in cases {
            let watcher = watching();
            watcher.note(Kind::Load, Some(address), size, PC);
            let seen = report(&watcher).counted.len();
            assert_eq!(seen, usize::from(counts), "{size} bytes at {address:#x}");
        }
    }

    #[test]
    fn what_differs_is_counted_apart() {
        let watcher = watching();
        for (kind, address, size, pc, times) in [
            (Kind::Store, START, 8, PC, 3),
            (Kind::Store, START + 8, 8, PC, 2),
            (Kind::Store, START + 4, 8, PC, 7),
            (Kind::Store, START + 8, 8, PC + 4, 11),
            (Kind::Store, START + 4, 4, PC, 13),
            (Kind::Load, START, 8, PC, 17),
        ] {
            for _ in 0..times {
                watcher.note(kind, Some(address), size, pc);
            }
        }
        watcher.note(Kind::Load, None, 8, PC);
        let counted = |shape, pc, count| Counted { shape, pc, count };
        let accesses = Accesses {
            counted: vec![
                counted(Shape::aligned(Kind::Load, 8), PC, 17),
                counted(Shape::aligned(Kind::Store, 4), PC, 13),
                counted(Shape::misaligned(Kind::Store, 8), PC, 7),
                counted(Shape::aligned(Kind::Store, 8), PC, 5),
                counted(Shape::aligned(Kind::Store, 8), PC + 4, 11),
            ],
            lost: 1,
        };
        assert_eq!(report(&watcher), accesses);
        // A report forgets nothing, the next range all.
        assert_eq!(report(&watcher), accesses);
        watcher.answer(Request::Watch {
            start: 0,
            size: SIZE,
        });
        watcher.note(Kind::Load, Some(START), 8, PC);
        assert_eq!(report(&watcher), Accesses::default());
    }

    #[test]
    fn nothing_is_counted_before_it_is_asked_for() {
        let watcher = Watcher::new();
        assert!(!watcher.is_watching());
        watcher.note(Kind::Load, Some(0), 8, PC);
        assert_eq!(report(&watcher), Accesses::default());
        assert!(watching().is_watching());
    }

    #[test]
    fn what_is_no_range_is_refused_and_changes_nothing() {
        for (start, size) in [(START, 0), (u64::MAX, 1), (2, u64::MAX)] {
            let watcher = watching();
            watcher.note(Kind::Load, Some(START), 8, PC);
            let before = report(&watcher);
            let Reply::Refused(why) = watcher.answer(Request::Watch { start, size }) else {
                panic!("{size} bytes from {start:#x} on were watched");
            };
            assert!(why.contains(&format!("{start:#x}")), "{why}");
            assert_eq!(report(&watcher), before);
        }
    }

    /// CPUs that access the range at once lose nothing.
    #[test]
    fn threads_count_together() {
        let watcher = watching();
        thread::scope(|scope| {
            for cpu in 0..4 {
                let watcher = &watcher;
                scope.spawn(move || {
                    for n in 0..1000 {
                        watcher.note(Kind::Store, Some(START + 8 * n % SIZE), 8, PC);
                        watcher.note(Kind::Load, Some(START + cpu), 1, PC + cpu);
                    }
                });
            }
        });
        let shapes = report(&watcher).shapes();
        assert_eq!(shapes[&Shape::aligned(Kind::Store, 8)], 4000);
        assert_eq!(shapes[&Shape::aligned(Kind::Load, 1)], 4000);
    }

    #[test]
    fn the_socket_answers_each_connection() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let watcher: &Watcher = Box::leak(Box::default());
        // It ends with the tests.
        thread::spawn(move || serve(&listener, |request| watcher.answer(request)));

        let request = Request::Watch {
            start: START,
            size: SIZE,
        };
        assert_eq!(ask(&path, request).unwrap(), Reply::Done);
        // Who asks nothing, or nonsense, does not keep the next one from an answer.
        drop(UnixStream::connect(&path).unwrap());
        let mut nonsense = UnixStream::connect(&path).unwrap();
        socket::send(&mut nonsense, &"nonsense").unwrap();
        let mut reply = String::new();
        BufReader::new(nonsense).read_line(&mut reply).unwrap();
        assert!(reply.contains("nonsense"), "{reply}");

        watcher.note(Kind::Load, Some(START + 2), 4, PC);
        let Reply::Accesses(accesses) = ask(&path, Request::Report).unwrap() else {
            panic!("no accesses");
        };
        assert_eq!(accesses, report(watcher));
        assert_eq!(accesses.counted.len(), 1);
    }
}
