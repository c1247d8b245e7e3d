//! A round over several connections: a thread for each receives and opens, this thread places.
//!
//! Not believed: that a connection ends its round where the others do, until all have; that a page comes on one of them
//! alone, until the table has seen it. The next round is read from none of them before this one has ended on all.

use std::iter::once;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::lane::Lane;
use super::{DestinationError, Receiver as Move, on, place, unexpected, wire};
use crate::channel::ChannelError;
use crate::guest::{PACKET_HEADER_SIZE, PageContent};
use crate::page::OpenError;
use crate::progress::Phase;
use crate::tls::{TlsError, Transport};
use crate::wire::batch::{COUNT_SIZE, ENTRY_HEADER_SIZE, Entries, EntryHeader, PageKind};
use crate::wire::messages::{Message, RoundEnd};
use crate::wire::{FrameKind, WireError};

impl<T: Transport> Move<'_, T> {
    /// Receives a round from all connections; its end, as all of them name it.
    pub(super) fn gather_round(&mut self) -> Result<RoundEnd, DestinationError> {
        let pulse = Pulse::new(self.config.deadlines.frame);
        let lanes = 1 + self.further.len();
        let (out, parcels) = sync_channel(lanes);
        let (guest, table) = (&mut *self.guest, &mut self.table);
        let (pages, zero_pages) = (&mut self.round_pages, &mut self.zero_pages);
        let spare = Mutex::new(Vec::new());
        let ends = std::thread::scope(|scope| {
            let mut threads = Vec::with_capacity(lanes);
            for lane in once(&mut self.first).chain(&mut self.further) {
                let (pulse, spare, out) = (&pulse, &spare, out.clone());
                threads.push(scope.spawn(move || {
                    let end = work(lane, pulse, spare, &out);
                    end.map_err(|error| pulse.fail(error)).ok()
                }));
            }
            drop(out);
            for parcel in parcels {
                if !pulse.failed() {
                    let placed = parcel.pages().try_for_each(|(header, content)| {
                        table.record(&header)?;
                        place(&header, content, guest, pages, zero_pages)
                    });
                    placed.unwrap_or_else(|error| pulse.fail(error));
                }
                lock(&spare).push(parcel.buffer);
            }
            let ends = threads.into_iter().filter_map(|thread| thread.join().ok());
            ends.flatten().collect::<Vec<_>>()
        });
        if let Some(error) = pulse.failure() {
            return Err(self.better_cause(error));
        }
        agreed(&ends, lanes)
    }

    /// A connection that broke off: what the source says of it is the better cause.
    fn better_cause(&mut self, error: DestinationError) -> DestinationError {
        match error {
            DestinationError::Stream {
                phase,
                error: ChannelError::Tls(TlsError::Truncated | TlsError::Io(_)),
            } => match self.first.channel.last_words() {
                Some(error) => DestinationError::Stream { phase, error },
                None => on(phase)(TlsError::Truncated.into()),
            },
            error => error,
        }
    }
}

/// All connections have ended, the same round, and either each or none the last one.
fn agreed(ends: &[RoundEnd], lanes: usize) -> Result<RoundEnd, DestinationError> {
    let refused = wire(Phase::Rounds);
    let differ = || {
        refused(WireError::Malformed(
            "connections that end different rounds",
        ))
    };
    let first = ends.first().ok_or_else(differ)?;
    let same = |end: &RoundEnd| (end.round, end.last) == (first.round, first.last);
    if ends.len() != lanes || !ends.iter().all(same) {
        return Err(differ());
    }
    Ok(RoundEnd {
        pages: ends.iter().map(|end| end.pages).sum(),
        ..*first
    })
}

/// What one connection does in a round.
fn work<T: Transport>(
    lane: &mut Lane<'_, T>,
    pulse: &Pulse,
    spare: &Mutex<Vec<Vec<u8>>>,
    out: &SyncSender<Parcel>,
) -> Result<RoundEnd, DestinationError> {
    loop {
        let given_up = &|| pulse.failed() || pulse.silent();
        let far = Instant::now() + FAR;
        let received = lane.channel.receive_until(far, Some(given_up));
        let (kind, payload) = received.map_err(|error| match error {
            ChannelError::Tls(TlsError::Cancelled) if pulse.silent() => {
                on(Phase::Rounds)(TlsError::Timeout.into())
            }
            error => on(Phase::Rounds)(error),
        })?;
        pulse.beat();
        match kind {
            FrameKind::PageBatch => {
                let length = payload.len();
                let next = lock(spare).pop().unwrap_or_default();
                let mut buffer = lane.channel.swap_inbox(next);
                let headers = open(lane, buffer.get_mut(..length).unwrap_or_default())?;
                // Nobody takes it after a failure.
                let _ = out.send(Parcel { buffer, headers });
            }
            FrameKind::RoundEnd => {
                let end = RoundEnd::decode(payload).map_err(wire(Phase::Rounds))?;
                return lane.check_end(end).map(|()| end);
            }
            got => return Err(unexpected(Phase::Rounds, got, "PageBatch or RoundEnd")),
        }
    }
}

/// Opens every seal of a batch, where it lies.
fn open<T: Transport>(
    lane: &mut Lane<'_, T>,
    payload: &mut [u8],
) -> Result<Vec<EntryHeader>, DestinationError> {
    let mut entries = Entries::parse(payload).map_err(OpenError::from)?;
    let mut headers = Vec::new();
    while let Some(page) = lane.open_next(&mut entries)? {
        headers.push(page.header);
    }
    Ok(headers)
}

/// A batch whose seals have opened.
struct Parcel {
    buffer: Vec<u8>,
    headers: Vec<EntryHeader>,
}

impl Parcel {
    /// The pages, and what they hold.
    fn pages(&self) -> impl Iterator<Item = (EntryHeader, PageContent<'_>)> {
        let mut rest = self.buffer.get(COUNT_SIZE..).unwrap_or_default();
        self.headers.iter().map(move |header| {
            let body = rest.get(ENTRY_HEADER_SIZE..).unwrap_or_default();
            let (body, after) = body
                .split_at_checked(header.body_length())
                .unwrap_or_default();
            rest = after.get(crate::crypto::TAG_SIZE..).unwrap_or_default();
            let content = match header.kind {
                PageKind::Zero => PageContent::Zero,
                PageKind::Data => PageContent::Data(body),
                PageKind::Firmware => {
                    let (header, ciphertext) = body
                        .split_at_checked(PACKET_HEADER_SIZE)
                        .unwrap_or_default();
                    PageContent::Firmware { header, ciphertext }
                }
            };
            (*header, content)
        })
    }
}

/// What the threads of a round know of one another. Only whole frames count: a connection that dribbles is as silent as one
/// that has stopped, but as long as others come along nobody is late.
struct Pulse {
    limit: Duration,
    last: Mutex<Instant>,
    failed: AtomicBool,
    /// The first one.
    failure: Mutex<Option<DestinationError>>,
}

impl Pulse {
    fn new(limit: Duration) -> Self {
        Self {
            limit,
            last: Mutex::new(Instant::now()),
            failed: AtomicBool::new(false),
            failure: Mutex::new(None),
        }
    }

    fn beat(&self) {
        *lock(&self.last) = Instant::now();
    }

    fn silent(&self) -> bool {
        lock(&self.last).elapsed() > self.limit
    }

    fn fail(&self, error: DestinationError) {
        lock(&self.failure).get_or_insert(error);
        self.failed.store(true, Ordering::Release);
    }

    fn failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    fn failure(self) -> Option<DestinationError> {
        let failure = self.failure.into_inner();
        failure.unwrap_or_else(PoisonError::into_inner)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The silence of all connections together is what ends a wait.
const FAR: Duration = Duration::from_secs(24 * 60 * 60);
