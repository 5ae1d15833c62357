// SPDX-License-Identifier: GPL-2.0-only

//! Flushes that share a round trip to the host.
//!
//! Where only the host can make writes durable, it is asked to by a request, which takes as long as
//! its own `fsync`. No more than one is at the host. Flushes that arrive meanwhile wait, and share
//! the next one: of any number that arrive at once, none waits for more than two.
//!
//! | state    | arrives          | answered             | failed | paused       | resumed      |
//! |----------|------------------|----------------------|--------|--------------|--------------|
//! | idle     | sends, in flight | -                    | broken | paused       | -            |
//! | in flight | waits           | sends what waits, or idle | broken, all fail | paused, all wait | -   |
//! | paused   | waits            | -                    | broken, all fail | -  | sends what waits, or idle |
//! | broken   | fails            | -                    | -      | -            | idle         |
//!
//! # Why one answer is enough for many
//!
//! A flush promises that each write which was complete before the flush arrived is durable when the
//! flush is done. A write is complete when its bytes are in the memory that the host shares, where
//! other CPUs see them: that is what the fence at its end is for. [`Rounds::arrive`] runs after that.
//!
//! The request that answers a flush is sent after the flush has arrived, in one of two ways: by
//! `arrive` itself, or by a later call, with the lock held that `arrive` had. In both the writes are
//! in the host's memory before the host can see the request, and it makes durable what is there when
//! it begins. So it covers each flush that has arrived before it was sent, however many.
//!
//! It covers no other: a flush that arrives while the request is at the host may be about bytes that
//! the host has passed already. So it waits for the next one, and [`Rounds::answered`] returns only
//! those that were there when the request was sent.

/// Some of those who wait for an answer.
pub trait Batch: Default {
    /// Whether there is nobody.
    fn is_empty(&self) -> bool;

    /// Adds those of `later` at the end.
    fn append(&mut self, later: Self);
}

/// What is to be done after somebody has arrived.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub enum Arrival<B> {
    /// A request is to be sent; if that fails, [`Rounds::fail`] is to be called.
    Send,
    /// Nothing: they wait for a request that will be sent.
    Wait,
    /// These have failed.
    Fail(B),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Idle,
    InFlight,
    Paused,
    Broken,
}

/// Who waits for which request. Calls are to be serialized, by a lock that is held while a request
/// is sent as well. An answer that was taken from the queue is to be told by [`Rounds::answered`]
/// before [`Rounds::resume`]: after that it would be taken for the answer to the next request.
///
/// # Invariants
///
/// Somebody is in `in_flight` just when the state is [`State::InFlight`]. Somebody is in `waiting`
/// only if it is that or [`State::Paused`].
#[derive(Debug)]
pub struct Rounds<B> {
    state: State,
    in_flight: B,
    waiting: B,
    sent: u64,
}

impl<B: Batch> Default for Rounds<B> {
    fn default() -> Self {
        Self::new()
    }
}

impl<B: Batch> Rounds<B> {
    /// Nobody waits.
    pub fn new() -> Self {
        Self {
            state: State::Idle,
            in_flight: B::default(),
            waiting: B::default(),
            sent: 0,
        }
    }

    /// How many requests there were to send.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Whether nobody waits for an answer.
    pub fn is_idle(&self) -> bool {
        self.in_flight.is_empty() && self.waiting.is_empty()
    }

    /// Adds `flushes`, which are not none.
    pub fn arrive(&mut self, flushes: B) -> Arrival<B> {
        match self.state {
            State::Broken => return Arrival::Fail(flushes),
            State::Idle | State::InFlight | State::Paused => self.waiting.append(flushes),
        }
        if self.state == State::Idle && self.send_waiting() {
            Arrival::Send
        } else {
            Arrival::Wait
        }
    }

    /// The host has answered the request that it has. Returns those that it was sent for, and whether
    /// the next one is to be sent; if that fails, [`Rounds::fail`] is to be called.
    ///
    /// An answer to no request is nobody's.
    #[must_use]
    pub fn answered(&mut self) -> (B, bool) {
        if self.state != State::InFlight {
            return (B::default(), false);
        }
        let done = core::mem::take(&mut self.in_flight);
        self.state = State::Idle;
        (done, self.send_waiting())
    }

    /// No more answers are to be expected. Returns all that wait, who have failed, as will who comes
    /// later.
    #[must_use]
    pub fn fail(&mut self) -> B {
        self.state = State::Broken;
        self.take_all()
    }

    /// The host is about to forget the request that it has. All wait, whoever comes later too, until
    /// [`Rounds::resume`].
    pub fn pause(&mut self) {
        if self.state != State::Broken {
            self.waiting = self.take_all();
            self.state = State::Paused;
        }
    }

    /// The host can be asked again, after [`Rounds::pause`] or [`Rounds::fail`], and has forgotten what
    /// it was asked before. Returns whether a request is to be sent; if that fails, [`Rounds::fail`] is
    /// to be called.
    #[must_use]
    pub fn resume(&mut self) -> bool {
        match self.state {
            State::Idle | State::InFlight => false,
            State::Paused | State::Broken => {
                self.state = State::Idle;
                self.send_waiting()
            }
        }
    }

    /// Those who wait are in flight from now on, if there are some. The state was idle.
    fn send_waiting(&mut self) -> bool {
        if self.waiting.is_empty() {
            return false;
        }
        self.in_flight = core::mem::take(&mut self.waiting);
        self.state = State::InFlight;
        self.sent = self.sent.wrapping_add(1);
        true
    }

    fn take_all(&mut self) -> B {
        let mut all = core::mem::take(&mut self.in_flight);
        all.append(core::mem::take(&mut self.waiting));
        all
    }
}

#[cfg_attr(CONFIG_RUST, kernel::macros::kunit_tests(pmem_flush))]
#[cfg(any(test, CONFIG_KUNIT = "y"))]
mod tests {
    use super::*;

    /// Flushes, each a bit.
    #[derive(Debug, Default, PartialEq, Eq)]
    struct Bits(u32);

    impl Batch for Bits {
        fn is_empty(&self) -> bool {
            self.0 == 0
        }

        fn append(&mut self, later: Self) {
            assert_eq!(self.0 & later.0, 0);
            self.0 |= later.0;
        }
    }

    #[test]
    fn who_arrives_meanwhile_shares_the_next() {
        let mut rounds = Rounds::new();
        assert!(rounds.arrive(Bits(1)) == Arrival::Send);
        for bit in 1..32 {
            assert!(rounds.arrive(Bits(1 << bit)) == Arrival::Wait);
        }
        // Only the one that was there when the request was sent.
        assert!(rounds.answered() == (Bits(1), true));
        assert!(rounds.arrive(Bits(1)) == Arrival::Wait);
        assert!(rounds.answered() == (Bits(!1), true));
        assert!(rounds.answered() == (Bits(1), false));
        assert_eq!(rounds.sent(), 3);
        assert!(rounds.is_idle());
    }

    #[test]
    fn an_answer_to_nothing_is_nobodys() {
        let mut rounds: Rounds<Bits> = Rounds::new();
        assert!(rounds.answered() == (Bits(0), false));
        rounds.pause();
        assert!(rounds.arrive(Bits(1)) == Arrival::Wait);
        assert!(rounds.answered() == (Bits(0), false));
        assert!(rounds.fail() == Bits(1));
        assert!(rounds.answered() == (Bits(0), false));
    }

    #[test]
    fn a_pause_loses_nobody() {
        let mut rounds = Rounds::new();
        assert!(rounds.arrive(Bits(1)) == Arrival::Send);
        assert!(rounds.arrive(Bits(2)) == Arrival::Wait);
        rounds.pause();
        assert!(rounds.arrive(Bits(4)) == Arrival::Wait);
        assert!(rounds.resume());
        assert!(rounds.arrive(Bits(8)) == Arrival::Wait);
        assert!(rounds.answered() == (Bits(7), true));
        assert!(rounds.answered() == (Bits(8), false));
        // Nobody waits.
        rounds.pause();
        assert!(!rounds.resume());
        assert!(!rounds.resume());
    }

    #[test]
    fn all_fail_once() {
        let mut rounds = Rounds::new();
        assert!(rounds.arrive(Bits(1)) == Arrival::Send);
        assert!(rounds.arrive(Bits(2)) == Arrival::Wait);
        assert!(rounds.fail() == Bits(3));
        assert!(rounds.fail() == Bits(0));
        assert!(rounds.arrive(Bits(4)) == Arrival::Fail(Bits(4)));
        // Until it is good again.
        rounds.pause();
        assert!(rounds.arrive(Bits(4)) == Arrival::Fail(Bits(4)));
        assert!(!rounds.resume());
        assert!(rounds.arrive(Bits(4)) == Arrival::Send);
        assert!(rounds.answered() == (Bits(4), false));
    }
}
