// SPDX-License-Identifier: GPL-2.0-only

//! Flushes that share a request: each cell of the table of transitions; all interleavings of a few
//! threads, of a host that makes durable only what was written when it began, and of what interrupts
//! them; and long sequences at random. The same checks find what is wrong in copies that have a fault.

use pmem_core::flush::{
    Arrival,
    Batch,
    Rounds, //
};
use proptest::prelude::*;
use std::{
    collections::HashSet,
    fmt::Debug,
    hash::Hash, //
};

// The table of transitions.

/// Flushes in the order in which they came.
#[derive(Debug, Default, PartialEq, Eq)]
struct Line(Vec<u8>);

impl Batch for Line {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn append(&mut self, mut later: Self) {
        self.0.append(&mut later.0);
    }
}

fn text(line: &Line) -> String {
    let words: Vec<_> = line.0.iter().map(|flush| format!(" {flush}")).collect();
    words.concat()
}

const CALLS: [fn(&mut Rounds<Line>) -> String; 5] = [
    |rounds| match rounds.arrive(Line(vec![8, 9])) {
        Arrival::Send => "send".into(),
        Arrival::Wait => "wait".into(),
        Arrival::Fail(line) => format!("fail{}", text(&line)),
    },
    |rounds| {
        let (done, send) = rounds.answered();
        format!("done{}{}", text(&done), if send { ", send" } else { "" })
    },
    |rounds| format!("fail{}", text(&rounds.fail())),
    |rounds| {
        rounds.pause();
        "-".into()
    },
    |rounds| if rounds.resume() { "send" } else { "-" }.into(),
];

/// A state, how to come to it, and what each of [`CALLS`] returns in it with the state after that.
type Cells = (&'static str, fn(&mut Rounds<Line>), [&'static str; 5]);

const TABLE: [Cells; 7] = [
    (
        "idle",
        |_| {},
        [
            "send: in flight 8 9",
            "done: idle",
            "fail: broken",
            "-: paused",
            "-: idle",
        ],
    ),
    (
        "in flight 1 2",
        |rounds| arrive(rounds, &[&[1, 2]]),
        [
            "wait: in flight 1 2, wait 8 9",
            "done 1 2: idle",
            "fail 1 2: broken",
            "-: paused, wait 1 2",
            "-: in flight 1 2",
        ],
    ),
    (
        "in flight 1, wait 2 3 4",
        |rounds| arrive(rounds, &[&[1], &[2], &[3, 4]]),
        [
            "wait: in flight 1, wait 2 3 4 8 9",
            "done 1, send: in flight 2 3 4",
            "fail 1 2 3 4: broken",
            "-: paused, wait 1 2 3 4",
            "-: in flight 1, wait 2 3 4",
        ],
    ),
    (
        "paused",
        |rounds| rounds.pause(),
        [
            "wait: paused, wait 8 9",
            "done: paused",
            "fail: broken",
            "-: paused",
            "-: idle",
        ],
    ),
    (
        "paused, wait 1 2 3",
        |rounds| {
            arrive(rounds, &[&[1], &[2]]);
            rounds.pause();
            arrive(rounds, &[&[3]]);
        },
        [
            "wait: paused, wait 1 2 3 8 9",
            "done: paused, wait 1 2 3",
            "fail 1 2 3: broken",
            "-: paused, wait 1 2 3",
            "send: in flight 1 2 3",
        ],
    ),
    (
        "broken",
        |rounds| assert_eq!(rounds.fail(), Line(vec![])),
        [
            "fail 8 9: broken",
            "done: broken",
            "fail: broken",
            "-: broken",
            "-: idle",
        ],
    ),
    (
        // Of those that failed, none is there any more.
        "broken",
        |rounds| {
            arrive(rounds, &[&[1], &[2]]);
            assert_eq!(rounds.fail(), Line(vec![1, 2]));
            rounds.pause();
        },
        [
            "fail 8 9: broken",
            "done: broken",
            "fail: broken",
            "-: broken",
            "-: idle",
        ],
    ),
];

/// The first sends a request, if nothing came before, and the others wait.
fn arrive(rounds: &mut Rounds<Line>, lines: &[&[u8]]) {
    for line in lines {
        let expected = if rounds.is_idle() && rounds.sent() == 0 {
            Arrival::Send
        } else {
            Arrival::Wait
        };
        assert_eq!(rounds.arrive(Line(line.to_vec())), expected);
    }
}

/// The state that `make` makes, by what it does next.
fn state(make: &dyn Fn() -> Rounds<Line>) -> String {
    let arrives = make().arrive(Line(vec![0]));
    let (in_flight, _) = make().answered();
    let all = make().fail();
    let idle = all.is_empty();
    assert_eq!(make().is_idle(), idle);
    assert!(all.0.starts_with(&in_flight.0));
    let waiting = match text(&Line(all.0[in_flight.0.len()..].to_vec())) {
        none if none.is_empty() => none,
        waiting => format!(", wait{waiting}"),
    };

    match arrives {
        Arrival::Send if idle => "idle".into(),
        Arrival::Wait if in_flight.is_empty() => format!("paused{waiting}"),
        Arrival::Wait => format!("in flight{}{waiting}", text(&in_flight)),
        Arrival::Fail(line) if idle && line == Line(vec![0]) => "broken".into(),
        Arrival::Send | Arrival::Fail(_) => panic!("{arrives:?}, and {all:?} wait"),
    }
}

#[test]
fn each_cell_of_the_table() {
    for (from, come, cells) in TABLE {
        let start = || {
            let mut rounds = Rounds::new();
            come(&mut rounds);
            rounds
        };
        assert_eq!(state(&start), from);

        for (call, cell) in CALLS.iter().zip(cells) {
            let mut rounds = start();
            let before = rounds.sent();
            let did = call(&mut rounds);
            let sends = rounds.sent() - before;
            let after = state(&|| {
                let mut rounds = start();
                call(&mut rounds);
                rounds
            });

            assert_eq!(format!("{did}: {after}"), cell, "from {from:?}");
            assert_eq!(sends, u64::from(did.ends_with("send")), "from {from:?}");
        }
    }
}

#[test]
fn any_number_that_arrive_meanwhile_cost_one_request() {
    for count in 1..=200 {
        let mut rounds = Rounds::new();
        assert_eq!(rounds.arrive(Line(vec![0])), Arrival::Send);
        for flush in 1..=count {
            assert_eq!(rounds.arrive(Line(vec![flush])), Arrival::Wait);
        }
        assert_eq!(rounds.answered(), (Line(vec![0]), true));
        assert_eq!(rounds.answered(), (Line((1..=count).collect()), false));
        assert_eq!(rounds.sent(), 2);
        assert!(rounds.is_idle());
    }
}

// What is checked: the module's machine, and copies of it with a fault.

/// Threads by their number's bit: those that flush. Each has one flush at a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Threads(u8);

impl Threads {
    fn one(thread: usize) -> Self {
        Self(1 << thread)
    }

    fn has(self, others: Self) -> bool {
        self.0 & others.0 == others.0
    }

    fn each(self) -> impl Iterator<Item = usize> {
        (0..8).filter(move |thread| self.0 & (1 << thread) != 0)
    }
}

impl Batch for Threads {
    fn is_empty(&self) -> bool {
        self.0 == 0
    }

    fn append(&mut self, later: Self) {
        self.0 |= later.0;
    }
}

trait Group: Clone {
    fn sent(&self) -> u64;
    fn is_idle(&self) -> bool;
    fn arrive(&mut self, flushes: Threads) -> Arrival<Threads>;
    fn answered(&mut self) -> (Threads, bool);
    fn fail(&mut self) -> Threads;
    fn pause(&mut self);
    fn resume(&mut self) -> bool;

    /// What it does next tells its states apart.
    fn key(&self) -> (u8, Threads, Threads) {
        let arrives = match self.clone().arrive(Threads::one(7)) {
            Arrival::Send => 0,
            Arrival::Wait => 1,
            Arrival::Fail(_) => 2,
        };
        (arrives, self.clone().answered().0, self.clone().fail())
    }
}

#[derive(Clone, Copy)]
enum Call {
    Arrive(Threads),
    Answered,
    Fail,
    Pause,
    Resume,
}

/// The module's own. It is copied by the same calls on a new one.
#[derive(Default)]
struct Real {
    rounds: Rounds<Threads>,
    calls: Vec<Call>,
}

impl Clone for Real {
    fn clone(&self) -> Self {
        let mut copy = Self::default();
        for &call in &self.calls {
            match call {
                Call::Arrive(flushes) => drop(copy.arrive(flushes)),
                Call::Answered => drop(copy.answered()),
                Call::Fail => drop(copy.fail()),
                Call::Pause => copy.pause(),
                Call::Resume => drop(copy.resume()),
            }
        }
        copy
    }
}

impl Group for Real {
    fn sent(&self) -> u64 {
        self.rounds.sent()
    }

    fn is_idle(&self) -> bool {
        self.rounds.is_idle()
    }

    fn arrive(&mut self, flushes: Threads) -> Arrival<Threads> {
        self.calls.push(Call::Arrive(flushes));
        self.rounds.arrive(flushes)
    }

    fn answered(&mut self) -> (Threads, bool) {
        self.calls.push(Call::Answered);
        self.rounds.answered()
    }

    fn fail(&mut self) -> Threads {
        self.calls.push(Call::Fail);
        self.rounds.fail()
    }

    fn pause(&mut self) {
        self.calls.push(Call::Pause);
        self.rounds.pause();
    }

    fn resume(&mut self) -> bool {
        self.calls.push(Call::Resume);
        self.rounds.resume()
    }
}

/// What can be wrong with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// Who arrives while a request is at the host has its answer, too.
    Joins,
    /// Who arrives sends a request, whether there is one at the host or not.
    SendsAtOnce,
    /// The answer is for those who wait for the next request, too.
    AnswersAll,
    /// Nobody sends the next request.
    ForgetsNext,
    /// An answer to a request that is not there any more counts.
    TakesLateAnswers,
    /// Those in flight are forgotten with the request.
    PauseForgets,
    /// Those in flight wait on for the request that was forgotten.
    PauseKeeps,
    /// Nobody sends a request for those who waited meanwhile.
    ResumeForgets,
    /// Those who wait for the next request are not told.
    FailForgets,
    /// Those who have failed are there on.
    FailKeeps,
    /// Who comes after the failure waits.
    BrokenWaits,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Idle,
    InFlight,
    Paused,
    Broken,
}

/// Another one, whose fault is known.
#[derive(Clone)]
struct Faulty {
    fault: Fault,
    state: State,
    in_flight: Threads,
    waiting: Threads,
    sent: u64,
}

impl Faulty {
    fn new(fault: Fault) -> Self {
        Self {
            fault,
            state: State::Idle,
            in_flight: Threads(0),
            waiting: Threads(0),
            sent: 0,
        }
    }

    fn has(&self, fault: Fault) -> bool {
        self.fault == fault
    }

    fn next(&mut self) -> bool {
        self.state = State::Idle;
        if self.waiting.is_empty() {
            return false;
        }
        self.in_flight.append(std::mem::take(&mut self.waiting));
        self.state = State::InFlight;
        self.sent += 1;
        true
    }
}

impl Group for Faulty {
    fn sent(&self) -> u64 {
        self.sent
    }

    fn is_idle(&self) -> bool {
        self.in_flight.is_empty() && self.waiting.is_empty()
    }

    fn arrive(&mut self, flushes: Threads) -> Arrival<Threads> {
        match self.state {
            State::Broken if !self.has(Fault::BrokenWaits) => return Arrival::Fail(flushes),
            State::InFlight if self.has(Fault::Joins) => {
                self.in_flight.append(flushes);
                return Arrival::Wait;
            }
            _ => self.waiting.append(flushes),
        }
        let sends = self.state == State::Idle
            || self.state == State::InFlight && self.has(Fault::SendsAtOnce);
        if sends && self.next() {
            Arrival::Send
        } else {
            Arrival::Wait
        }
    }

    fn answered(&mut self) -> (Threads, bool) {
        match self.state {
            State::InFlight => {}
            State::Paused if self.has(Fault::TakesLateAnswers) => {
                return (std::mem::take(&mut self.waiting), false);
            }
            _ => return (Threads(0), false),
        }
        let mut done = std::mem::take(&mut self.in_flight);
        if self.has(Fault::AnswersAll) {
            done.append(std::mem::take(&mut self.waiting));
        }
        if self.has(Fault::ForgetsNext) {
            self.state = State::Idle;
            return (done, false);
        }
        (done, self.next())
    }

    fn fail(&mut self) -> Threads {
        self.state = State::Broken;
        let mut all = self.in_flight;
        if !self.has(Fault::FailForgets) {
            all.append(self.waiting);
        }
        if !self.has(Fault::FailKeeps) {
            self.in_flight = Threads(0);
            self.waiting = Threads(0);
        }
        all
    }

    fn pause(&mut self) {
        if self.state == State::Broken {
            return;
        }
        self.state = State::Paused;
        if !self.has(Fault::PauseKeeps) {
            let in_flight = std::mem::take(&mut self.in_flight);
            if !self.has(Fault::PauseForgets) {
                self.waiting.append(in_flight);
            }
        }
    }

    fn resume(&mut self) -> bool {
        match self.state {
            State::Idle | State::InFlight => false,
            State::Paused if self.has(Fault::ResumeForgets) => {
                self.state = State::Idle;
                false
            }
            State::Paused | State::Broken => self.next(),
        }
    }
}

// What is around it.

/// Writes are numbered as they become complete.
type Writes = u32;

/// A request that the host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Request {
    /// Who waits for it.
    of: Threads,
    /// The writes that were complete when the host began, if it has: those, and no others, are
    /// durable when it is done.
    covers: Option<Writes>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Thread {
    /// How many writes and flushes it has done.
    steps: u8,
    /// The writes that were complete when its flush arrived, if it waits for the end of one.
    waits: Option<Writes>,
}

/// How often there may be what interrupts the others.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Budget {
    pauses: u32,
    failures: u32,
    errors: u32,
    sends_that_fail: u32,
}

#[derive(Clone, Copy, Debug)]
enum Event {
    Write(usize),
    Flush(usize),
    /// The host begins the request that it has.
    Begin,
    /// The host ends it.
    Answer {
        ok: bool,
    },
    /// The host ends it; somebody takes the answer, who has no lock yet.
    See {
        ok: bool,
    },
    /// They have the lock.
    Tell,
    Pause,
    Resume,
    Fail,
}

/// When somebody who has taken an answer from the queue tells of it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Telling {
    /// Before the lock is let go.
    Locked,
    /// Some time later, but before a reset is over.
    BeforeResume,
    /// Some time later.
    Later,
}

#[derive(Clone)]
struct World<G> {
    group: G,
    threads: [Thread; THREADS],
    complete: Writes,
    durable: Writes,
    host: Option<Request>,
    /// An answer that is taken and not told yet.
    seen: Option<bool>,
    telling: Telling,
    paused: bool,
    broken: bool,
    budget: Budget,
}

const THREADS: usize = 7;

impl<G: Group> World<G> {
    fn new(group: G, budget: Budget) -> Self {
        Self {
            group,
            threads: Default::default(),
            complete: 0,
            durable: 0,
            host: None,
            seen: None,
            telling: Telling::Locked,
            paused: false,
            broken: false,
            budget,
        }
    }

    fn waiting(&self) -> Threads {
        let mut waiting = Threads(0);
        for (thread, at) in self.threads.iter().enumerate() {
            if at.waits.is_some() {
                waiting.append(Threads::one(thread));
            }
        }
        waiting
    }

    fn key(&self) -> impl Hash + Eq {
        (
            (self.threads, self.complete, self.durable),
            (self.host, self.seen, self.paused, self.broken, self.budget),
            self.group.key(),
        )
    }

    /// Whether `event` can be next.
    fn is_enabled(&self, event: Event) -> bool {
        let begun = self.host.is_some_and(|request| request.covers.is_some());
        match event {
            Event::Write(thread) | Event::Flush(thread) => self.threads[thread].waits.is_none(),
            Event::Begin => self.host.is_some() && !begun,
            Event::Answer { ok } => {
                let now = self.telling == Telling::Locked;
                begun && now && (ok || self.budget.errors > 0)
            }
            Event::See { ok } => {
                let later = self.telling != Telling::Locked && self.seen.is_none();
                begun && later && (ok || self.budget.errors > 0)
            }
            Event::Tell => self.seen.is_some(),
            Event::Pause => !self.paused && self.budget.pauses > 0,
            Event::Resume => {
                let waits = self.telling == Telling::BeforeResume && self.seen.is_some();
                (self.paused || self.broken) && !waits
            }
            Event::Fail => self.budget.failures > 0,
        }
    }

    /// Lets `event` happen. If there is a request to be sent, `send` says whether that succeeds.
    /// Returns whether there was one.
    fn happen(&mut self, event: Event, send: bool) -> Result<bool, String> {
        let before = self.group.sent();
        let sends = match event {
            Event::Write(thread) => {
                self.threads[thread].steps += 1;
                self.complete += 1;
                false
            }
            Event::Flush(thread) => {
                self.threads[thread].steps += 1;
                self.threads[thread].waits = Some(self.complete);
                let one = Threads::one(thread);
                match self.group.arrive(one) {
                    Arrival::Send => true,
                    Arrival::Wait => false,
                    Arrival::Fail(failed) if failed == one && self.broken => {
                        self.end(failed, false)?;
                        false
                    }
                    Arrival::Fail(failed) => return Err(format!("{failed:?} fails for no reason")),
                }
            }
            Event::Begin => {
                let complete = self.complete;
                let request = self.host.as_mut().ok_or("no request")?;
                request.covers = Some(complete);
                false
            }
            Event::Answer { ok } => {
                self.see(ok)?;
                self.tell()?
            }
            Event::See { ok } => {
                self.see(ok)?;
                false
            }
            Event::Tell => self.tell()?,
            Event::Pause => {
                self.budget.pauses -= 1;
                self.paused = !self.broken;
                self.group.pause();
                false
            }
            Event::Resume => {
                // The device was reset.
                self.host = None;
                self.paused = false;
                self.broken = false;
                self.group.resume()
            }
            Event::Fail => {
                self.budget.failures -= 1;
                self.fail()?;
                false
            }
        };
        if self.group.sent() - before != u64::from(sends) {
            return Err("requests are not counted right".into());
        }
        if sends {
            self.send(send)?;
        }

        let waiting = self.waiting();
        if self.group.is_idle() != waiting.is_empty() {
            return Err(format!("{waiting:?} wait, and that is not known"));
        }
        if !waiting.is_empty() && self.host.is_none() && self.seen.is_none() && !self.paused {
            return Err(format!("{waiting:?} are left behind"));
        }
        Ok(sends)
    }

    fn send(&mut self, succeeds: bool) -> Result<(), String> {
        if self.host.is_some() {
            return Err("two requests are at the host".into());
        }
        if self.paused || self.broken {
            return Err("a request is sent to a host that does not listen".into());
        }
        if succeeds {
            self.host = Some(Request {
                of: self.waiting(),
                covers: None,
            });
        } else {
            self.budget.sends_that_fail -= 1;
            self.fail()?;
        }
        Ok(())
    }

    /// The host's answer is taken.
    fn see(&mut self, ok: bool) -> Result<(), String> {
        let request = self.host.ok_or("no request")?;
        if ok {
            self.durable = self.durable.max(request.covers.ok_or("not begun")?);
        } else {
            self.budget.errors -= 1;
        }
        self.seen = Some(ok);
        Ok(())
    }

    fn tell(&mut self) -> Result<bool, String> {
        let ok = self.seen.take().ok_or("no answer")?;
        let (done, sends) = self.group.answered();
        let of = match self.host.take() {
            // It was sent before the host was not to be listened to.
            Some(request) if !self.paused && !self.broken => request.of,
            _ => Threads(0),
        };
        self.end(done, ok)?;
        // Those who are told that all is well, and should not be, were found by what is durable.
        let right = if ok { done.has(of) } else { done == of };
        if !right {
            return Err(format!("{done:?} end with the answer to {of:?}"));
        }
        Ok(sends)
    }

    fn fail(&mut self) -> Result<(), String> {
        self.broken = true;
        self.paused = false;
        let all = self.group.fail();
        self.end(all, false)?;
        match self.waiting() {
            Threads(0) => Ok(()),
            left => Err(format!("{left:?} wait after the failure")),
        }
    }

    fn end(&mut self, flushes: Threads, ok: bool) -> Result<(), String> {
        for thread in flushes.each() {
            let at = self.threads.get_mut(thread).ok_or("no such thread")?;
            let writes = at
                .waits
                .take()
                .ok_or_else(|| format!("the flush of thread {thread} ends twice"))?;
            if ok && writes > self.durable {
                return Err(format!(
                    "the flush of thread {thread} ends after {writes} writes, with {} durable",
                    self.durable
                ));
            }
        }
        Ok(())
    }
}

// All interleavings.

#[derive(Clone, Copy)]
enum Step {
    Write,
    Flush,
}

use Step::{
    Flush,
    Write, //
};

type Programs = &'static [&'static [Step]];

struct Search {
    programs: Programs,
    known: HashSet<u64>,
    path: Vec<Event>,
    ends: usize,
}

impl Search {
    /// Visits all states that `world` can come to, and returns how many there are, and in how many
    /// of them all is done. An error says what is wrong, and how it came to that.
    fn all<G: Group>(programs: Programs, world: World<G>) -> Result<(usize, usize), String> {
        let mut search = Self {
            programs,
            known: HashSet::new(),
            path: Vec::new(),
            ends: 0,
        };
        search
            .visit(&world)
            .map_err(|error| format!("{error}, after {:?}", search.path))?;
        Ok((search.known.len(), search.ends))
    }

    fn visit<G: Group>(&mut self, world: &World<G>) -> Result<(), String> {
        use std::hash::{
            BuildHasher,
            BuildHasherDefault,
            DefaultHasher, //
        };
        // Of a few hundred thousand hashes, two are the same by chance once in a hundred million.
        if !self
            .known
            .insert(BuildHasherDefault::<DefaultHasher>::default().hash_one(world.key()))
        {
            return Ok(());
        }

        let steps = self
            .programs
            .iter()
            .zip(world.threads)
            .enumerate()
            .filter_map(|(thread, (program, at))| {
                Some(match program.get(usize::from(at.steps))? {
                    Write => Event::Write(thread),
                    Flush => Event::Flush(thread),
                })
            });
        let others = [
            Event::Begin,
            Event::Answer { ok: true },
            Event::Answer { ok: false },
            Event::See { ok: true },
            Event::See { ok: false },
            Event::Tell,
            Event::Pause,
            Event::Resume,
            Event::Fail,
        ];
        for event in steps.chain(others) {
            if !world.is_enabled(event) {
                continue;
            }
            self.path.push(event);
            let mut next = world.clone();
            let sends = next.happen(event, true)?;
            self.visit(&next)?;
            if sends && world.budget.sends_that_fail > 0 {
                let mut next = world.clone();
                next.happen(event, false)?;
                self.visit(&next)?;
            }
            self.path.pop();
        }
        let mut threads = self.programs.iter().zip(world.threads);
        if threads.all(|(program, at)| program.len() == usize::from(at.steps))
            && world.waiting().is_empty()
        {
            self.ends += 1;
        }
        Ok(())
    }
}

/// Nothing interrupts.
const NEVER: Budget = Budget {
    pauses: 0,
    failures: 0,
    errors: 0,
    sends_that_fail: 0,
};

/// Everything that interrupts, once.
const ONCE: Budget = Budget {
    pauses: 1,
    failures: 1,
    errors: 1,
    sends_that_fail: 1,
};

/// Everything that interrupts, twice.
const TWICE: Budget = Budget {
    pauses: 2,
    failures: 2,
    errors: 2,
    sends_that_fail: 2,
};

const ONE: &[Step] = &[Write, Flush];

const PROGRAMS: [(Programs, Budget); 5] = [
    (&[ONE; 4], NEVER),
    (
        &[
            &[Write, Flush, Write, Flush],
            &[Write, Flush, Write, Flush],
            &[Write, Flush],
        ],
        NEVER,
    ),
    (&[&[Write, Flush, Flush], &[Write, Flush]], TWICE),
    (
        &[&[Write, Flush, Write, Flush], &[Write, Flush, Flush]],
        ONCE,
    ),
    (
        &[&[Write, Flush, Flush], &[Write, Flush], &[Write, Flush]],
        ONCE,
    ),
];

#[test]
fn all_interleavings() {
    for (programs, budget) in PROGRAMS {
        let (states, ends) = Search::all(programs, World::new(Real::default(), budget)).unwrap();
        // A search that has stopped early has found nothing.
        assert!(states > 1000 && ends > 0);
    }
}

/// What is wrong with `group`, unless nothing is.
fn wrong<G: Group>(group: &G, telling: Telling) -> Option<String> {
    PROGRAMS.iter().find_map(|&(programs, budget)| {
        let world = World {
            telling,
            ..World::new(group.clone(), budget)
        };
        Search::all(programs, world).err()
    })
}

#[test]
fn faults_are_found() {
    for (fault, expected) in [
        (Fault::None, None),
        (Fault::Joins, Some(" durable, after")),
        (Fault::SendsAtOnce, Some("two requests")),
        (Fault::AnswersAll, Some(" durable, after")),
        (Fault::ForgetsNext, Some("left behind")),
        (Fault::TakesLateAnswers, Some("end with the answer to")),
        (Fault::PauseForgets, Some("that is not known")),
        (Fault::PauseKeeps, Some("left behind")),
        (Fault::ResumeForgets, Some("left behind")),
        (Fault::FailForgets, Some("wait after the failure")),
        (Fault::FailKeeps, Some("that is not known")),
        (Fault::BrokenWaits, Some("left behind")),
    ] {
        let found = wrong(&Faulty::new(fault), Telling::Locked);
        match (expected, found) {
            (None, None) => {}
            (Some(expected), Some(found)) if found.contains(expected) => {}
            (_, found) => panic!("{fault:?}: {found:?}"),
        }
    }
}

/// An answer may be taken without the lock, and be told later, if a reset waits for that. If not, it
/// may be told of another request.
#[test]
fn an_answer_is_told_before_a_reset_is_over() {
    let wrong = |telling| wrong(&Real::default(), telling);
    assert_eq!(wrong(Telling::BeforeResume), None);
    assert!(wrong(Telling::Later).is_some_and(|found| found.contains("Resume")));
}

// Long sequences.

fn event() -> impl Strategy<Value = Event> {
    let thread = 0..THREADS;
    prop_oneof![
        30 => thread.clone().prop_map(Event::Write),
        60 => thread.prop_map(Event::Flush),
        30 => Just(Event::Begin),
        30 => Just(Event::Answer { ok: true }),
        2 => Just(Event::Answer { ok: false }),
        2 => Just(Event::Pause),
        4 => Just(Event::Resume),
        1 => Just(Event::Fail),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: ProptestConfig::default().cases / 4,
        ..ProptestConfig::default()
    })]

    #[test]
    fn long_sequences(
        events in prop::collection::vec((event(), prop::bool::weighted(0.95)), 0..1000)
    ) {
        let often = u32::MAX;
        let budget = Budget {
            pauses: often,
            failures: often,
            errors: often,
            sends_that_fail: often,
        };
        let mut world = World::new(Real::default(), budget);
        for (event, send) in events {
            if world.is_enabled(event) {
                world.happen(event, send).map_err(TestCaseError::fail)?;
            }
        }

        // Nobody waits for more than two answers.
        for event in [
            Event::Resume,
            Event::Begin,
            Event::Answer { ok: true },
            Event::Begin,
            Event::Answer { ok: true },
        ] {
            if world.is_enabled(event) {
                world.happen(event, true).map_err(TestCaseError::fail)?;
            }
        }
        prop_assert!(world.waiting().is_empty());
    }
}
