// SPDX-License-Identifier: GPL-2.0-only

//! Flushes that share a request, as threads with a lock: in each order in which loom lets them run,
//! and with each value that the memory model lets them read, the host sees what was written before
//! a flush when it begins the request that answers it.

use loom::{
    model::Builder,
    sync::{
        atomic::{
            AtomicBool,
            Ordering, //
        },
        mpsc::{
            channel,
            Receiver,
            Sender, //
        },
        Mutex, //
    },
    thread, //
};
use pmem_core::flush::{
    Arrival,
    Batch,
    Rounds, //
};
use std::sync::Arc;

/// The most threads that write and flush, once each.
const SUBMITTERS: usize = 3;

/// Who has flushed.
#[derive(Debug, Default)]
struct Flushes(Vec<usize>);

impl Batch for Flushes {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn append(&mut self, mut later: Self) {
        self.0.append(&mut later.0);
    }
}

/// What a device does wrong.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    /// Flushes arrive before their write is complete.
    ArrivesEarly,
    /// An answer ends those that have arrived since the request was sent, too.
    EndsLater,
}

/// What the host makes durable by a request: for each thread, whether its write was there.
type Durable = [bool; SUBMITTERS];

struct Device {
    fault: Fault,
    /// The memory that the host shares.
    written: [AtomicBool; SUBMITTERS],
    state: Mutex<State>,
}

struct State {
    rounds: Rounds<Flushes>,
    /// To the host; `None` is the last.
    requests: Sender<Option<()>>,
    /// What was durable when a thread's flush ended.
    ended: Vec<Option<Durable>>,
}

impl Device {
    fn write(&self, thread: usize) {
        self.written[thread].store(true, Ordering::Relaxed);
    }

    fn flush(&self, thread: usize) {
        let mut state = self.state.lock().unwrap();
        match state.rounds.arrive(Flushes(vec![thread])) {
            Arrival::Send => state.requests.send(Some(())).unwrap(),
            Arrival::Wait => {}
            Arrival::Fail(flushes) => panic!("{flushes:?} fail"),
        }
    }

    fn submit(&self, thread: usize) {
        if self.fault == Fault::ArrivesEarly {
            self.flush(thread);
            self.write(thread);
        } else {
            self.write(thread);
            self.flush(thread);
        }
    }

    /// The host, which takes what it finds when it begins.
    fn host(&self, requests: &Receiver<Option<()>>, answers: &Sender<Durable>) {
        while let Some(()) = requests.recv().unwrap() {
            let found = std::array::from_fn(|thread| self.written[thread].load(Ordering::Relaxed));
            answers.send(found).unwrap();
        }
    }

    /// Takes answers until all flushes have ended.
    fn interrupts(&self, answers: &Receiver<Durable>) {
        loop {
            let durable = answers.recv().unwrap();
            let mut state = self.state.lock().unwrap();
            let (mut done, mut sends) = state.rounds.answered();
            if sends && self.fault == Fault::EndsLater {
                let (later, more) = state.rounds.answered();
                done.append(later);
                sends = more;
            }
            for thread in done.0 {
                let before = state.ended[thread].replace(durable);
                assert_eq!(before, None, "the flush of thread {thread} ends twice");
            }
            if sends {
                state.requests.send(Some(())).unwrap();
            } else if state.ended.iter().all(Option::is_some) {
                state.requests.send(None).unwrap();
                return;
            }
        }
    }
}

/// Lets `count` threads run in all ways, or in those in which no more than `preemptions` of them are
/// preempted, and says whether there were some in which they shared a request, and some in which not.
fn run(fault: Fault, count: usize, preemptions: Option<usize>) -> (bool, bool) {
    let found = Arc::new(std::sync::Mutex::new((false, false)));
    let result = found.clone();
    let mut builder = Builder::new();
    builder.preemption_bound = preemptions;
    builder.check(move || {
        let (requests, to_host) = channel();
        let (from_host, answers) = channel();
        let device = Arc::new(Device {
            fault,
            written: [false; SUBMITTERS].map(AtomicBool::new),
            state: Mutex::new(State {
                rounds: Rounds::new(),
                requests,
                ended: vec![None; count],
            }),
        });

        let mut threads = vec![thread::spawn({
            let device = device.clone();
            move || device.host(&to_host, &from_host)
        })];
        threads.extend((0..count).map(|thread| {
            let device = device.clone();
            thread::spawn(move || device.submit(thread))
        }));
        device.interrupts(&answers);
        for thread in threads {
            thread.join().unwrap();
        }

        let state = device.state.lock().unwrap();
        for (thread, durable) in state.ended.iter().enumerate() {
            let durable = durable.expect("no answer");
            assert!(
                durable[thread],
                "the write of thread {thread} is not durable"
            );
        }
        assert!(state.rounds.is_idle());
        let shared = state.rounds.sent() < count as u64;
        let mut found = found.lock().unwrap();
        found.0 |= shared;
        found.1 |= !shared;
    });
    let result = *result.lock().unwrap();
    result
}

#[test]
fn the_host_sees_what_was_written_before_a_flush() {
    // The first has a request of its own: nobody is there whose request it could share.
    assert_eq!(run(Fault::None, 2, None), (false, true));
    assert_eq!(run(Fault::None, 3, Some(1)), (true, true));
}

#[test]
#[should_panic(expected = "is not durable")]
fn a_flush_before_its_write_is_found() {
    run(Fault::ArrivesEarly, 2, None);
}

#[test]
#[should_panic(expected = "is not durable")]
fn an_answer_for_a_later_flush_is_found() {
    run(Fault::EndsLater, 2, None);
}
