// SPDX-License-Identifier: GPL-2.0-only

//! Flushes of a device whose writes only the host can make durable.
//!
//! Nobody who submits a bio waits. A bio with PREFLUSH waits in a list for the host's answer, and then
//! is done, or has data, which a worker writes. A bio with FUA is written first, and then waits. Those
//! in the list share the host's answers, see [`flush`](crate::pmem_core::flush), where it says why that
//! is right.

use super::PmemDevice;
use crate::{
    kapi::{
        bio::{
            Bio,
            List,
            Status, //
        },
        compat::{
            new_spinlock_irq,
            SpinLockIrq, //
        },
        workqueue::ReclaimQueue, //
    },
    pmem_core::flush::{
        Arrival,
        Batch,
        Rounds, //
    },
};
use core::mem;
use kernel::{
    new_condvar,
    prelude::*,
    sync::{
        Arc,
        CondVar, //
    },
    time::{
        delay::fsleep,
        Delta,
        Instant,
        Monotonic, //
    },
    workqueue::WorkItem, //
};

/// The way to the host.
pub(crate) trait Host: Send + Sync {
    /// Sends a request to make all durable that is in the range, while no other one is at the host;
    /// [`PmemDevice::answered`] is called some time later. Runs with interrupts off.
    ///
    /// # Errors
    ///
    /// It was not sent, and no other one will be.
    fn send(&self) -> Result;
}

impl Batch for List {
    fn is_empty(&self) -> bool {
        self.is_empty()
    }

    fn append(&mut self, later: Self) {
        self.append(later);
    }
}

/// The bios that wait, and for what.
#[pin_data]
pub(super) struct Flushes {
    host: Arc<dyn Host>,
    /// Writes the data of bios.
    queue: ReclaimQueue,
    #[pin]
    state: SpinLockIrq<State>,
    /// No bio waits any more.
    #[pin]
    idle: CondVar,
}

struct State {
    rounds: Rounds<List>,
    /// Bios that arrive while the host is not to be asked anything new.
    held: Option<List>,
    /// Bios whose PREFLUSH is done, and whose data is to be written.
    ready: List,
    /// How many bios have begun to wait and are not completed.
    waiting: u64,
}

impl Flushes {
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(super) fn new(host: Arc<dyn Host>) -> Result<Pin<KBox<Self>>> {
        let queue = ReclaimQueue::new(c"pmem_flush")?;
        KBox::pin_init(
            pin_init!(Flushes {
                host,
                queue,
                state <- new_spinlock_irq!(State {
                    rounds: Rounds::new(),
                    held: None,
                    ready: List::default(),
                    waiting: 0,
                }),
                idle <- new_condvar!(),
            }),
            GFP_KERNEL,
        )
    }

    /// Lets `bio` wait for the host. `new` says that it did not wait before.
    pub(super) fn arrive(&self, bio: Bio, new: bool) {
        let mut state = self.state.lock();
        state.waiting = state.waiting.wrapping_add(new.into());
        if let Some(held) = &mut state.held {
            return held.append(bio.into());
        }
        let failed = match state.rounds.arrive(bio.into()) {
            Arrival::Send => self.send(&mut state),
            Arrival::Wait => return,
            Arrival::Fail(failed) => failed,
        };
        drop(state);
        self.end(failed, Status::IOERR);
    }

    /// Sends a request, or returns all bios, which have failed.
    fn send(&self, state: &mut State) -> List {
        match self.host.send() {
            Ok(()) => List::default(),
            Err(_) => state.rounds.fail(),
        }
    }

    /// Completes `bios`, which have waited.
    fn end(&self, mut bios: List, status: Status) {
        let mut count: u64 = 0;
        while let Some(bio) = bios.pop() {
            bio.end(status);
            count = count.wrapping_add(1);
        }
        if count == 0 {
            return;
        }
        let mut state = self.state.lock();
        state.waiting = state.waiting.wrapping_sub(count);
        if state.waiting == 0 {
            self.idle.notify_all();
        }
    }

    /// How many requests were sent.
    pub(super) fn sent(&self) -> u64 {
        self.state.lock().rounds.sent()
    }
}

/// What the provider of such a device calls. For other devices, this does nothing.
#[cfg_attr(
    not(CONFIG_VIRTIO),
    expect(dead_code, reason = "such a device is on the virtio bus")
)]
impl PmemDevice {
    /// The host has answered the request that it had: it has made all durable, or it has not. Can be
    /// called with interrupts off.
    pub(crate) fn answered(this: &Arc<Self>, durable: bool) {
        let Some(flushes) = &this.flushes else {
            return;
        };
        let mut state = flushes.state.lock();
        let (mut answered, send) = state.rounds.answered();
        let failed = if send {
            flushes.send(&mut state)
        } else {
            List::default()
        };
        let mut done = List::default();
        let mut ready = false;
        if durable {
            while let Some(mut bio) = answered.pop() {
                if bio.is_preflush() && bio.size() != 0 {
                    bio.clear_preflush();
                    state.ready.append(bio.into());
                    ready = true;
                } else {
                    done.append(bio.into());
                }
            }
        }
        drop(state);
        if ready {
            // If it is enqueued already, it has yet to look.
            let _ = flushes.queue.enqueue(this.clone());
        }
        flushes.end(done, Status::OK);
        flushes.end(answered, Status::IOERR);
        flushes.end(failed, Status::IOERR);
    }

    /// No more answers will come: all that wait fail, as does who comes later, until
    /// [`PmemDevice::resume_flushes`].
    pub(crate) fn fail_flushes(&self) {
        if let Some(flushes) = &self.flushes {
            let mut state = flushes.state.lock();
            let mut failed = state.rounds.fail();
            failed.append(state.held.take().unwrap_or_default());
            drop(state);
            flushes.end(failed, Status::IOERR);
        }
    }

    /// The host is about to forget the request that it has: it is given some time to answer, and then
    /// all wait until [`PmemDevice::resume_flushes`].
    pub(crate) fn pause_flushes(&self) {
        const PATIENCE: Delta = Delta::from_secs(10);
        const PAUSE: Delta = Delta::from_millis(1);

        if let Some(flushes) = &self.flushes {
            // Who waits already is answered by two requests at most.
            flushes.state.lock().held.get_or_insert_default();
            let began = Instant::<Monotonic>::now();
            while !flushes.state.lock().rounds.is_idle() && began.elapsed() < PATIENCE {
                fsleep(PAUSE);
            }
            flushes.state.lock().rounds.pause();
        }
    }

    /// The host can be asked again.
    pub(crate) fn resume_flushes(&self) {
        if let Some(flushes) = &self.flushes {
            let mut state = flushes.state.lock();
            let mut send = false;
            let mut failed = state.held.take().unwrap_or_default();
            // Before and after: with those who wait already, or when it is not broken any more.
            for resumes in [true, false] {
                if !failed.is_empty() {
                    match state.rounds.arrive(mem::take(&mut failed)) {
                        Arrival::Send => send = true,
                        Arrival::Wait => {}
                        Arrival::Fail(refused) => failed = refused,
                    }
                }
                send |= resumes && state.rounds.resume();
            }
            if send {
                failed.append(flushes.send(&mut state));
            }
            drop(state);
            flushes.end(failed, Status::IOERR);
        }
    }

    /// The number of the request that the host has, if it has one.
    pub(crate) fn in_flight(&self) -> Option<u64> {
        let state = self.flushes.as_ref()?.state.lock();
        (!state.rounds.is_idle()).then(|| state.rounds.sent())
    }

    /// Waits until no bio waits, after the last one was submitted.
    pub(crate) fn drain_flushes(&self) {
        if let Some(flushes) = &self.flushes {
            let mut state = flushes.state.lock();
            while state.waiting != 0 {
                flushes.idle.wait(&mut state);
            }
            drop(state);
            flushes.queue.flush();
        }
    }
}

/// Writes the data of the bios that are ready for it.
impl WorkItem for PmemDevice {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        let Some(flushes) = &this.flushes else {
            return;
        };
        loop {
            // The lock is not held any more when the bio is served.
            let next = flushes.state.lock().ready.pop();
            let Some(bio) = next else {
                return;
            };
            match this.account_and_serve(&bio) {
                Ok(()) if bio.is_fua() => flushes.arrive(bio, false),
                Ok(()) => flushes.end(bio.into(), Status::OK),
                Err(status) => flushes.end(bio.into(), status),
            }
        }
    }
}
