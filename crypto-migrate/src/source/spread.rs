//! A round over several connections: this thread reads the guest, a thread for each connection seals and sends.
//!
//! What was read waits in chunks, each a batch, for whichever connection has room: a slow one takes less and holds up nobody
//! but its own chunk. There are two chunks a connection; when all are under way the guest is not read on. The round ends on
//! every connection, behind its own last batch, and the next one begins only when the destination has acknowledged the end
//! of all of them: no page can be overtaken by its own older version.

use std::iter::once;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::lane::Lane;
use super::stream::{BATCH_TARGET, POLL_EVERY, REPORT_EVERY, Stream, Totals, ZeroRun, at, on};
use super::{SourceConfig, SourceError};
use crate::channel::STREAM;
use crate::control::Pacer;
use crate::guest::{Gpn, GuestError, PageContent, SourceGuest};
use crate::pages::PageSet;
use crate::precopy::Estimator;
use crate::progress::{Phase, Progress, millis};
use crate::tls::Transport;
use crate::transcript::PageTable;
use crate::wire::batch::{ENTRY_HEADER_SIZE, MAX_ENTRIES, PageKind};

impl<T: Transport> Stream<'_, T> {
    /// Sends pages over all connections and ends the round on each; how many, and those that it did not because the
    /// operator wants to switch now.
    pub(super) fn spread_pages(
        &mut self,
        phase: Phase,
        pages: &PageSet,
        estimator: &Estimator,
    ) -> Result<(u64, Vec<Gpn>), SourceError> {
        let mut event = self.event(phase, estimator);
        event.pages_total = pages.len();
        let desk = Desk::default();
        let (full, waiting) = channel();
        let (empty, free) = channel();
        let waiting = Mutex::new(waiting);
        for _ in 0..CHUNKS_PER_LANE * (1 + self.further.len()) {
            give(&empty, Chunk::default());
        }
        let round = self.round;
        let mut next = pages.iter();
        let sent = std::thread::scope(|scope| {
            for lane in once(&mut self.first).chain(&mut self.further) {
                let (desk, waiting, empty) = (&desk, &waiting, empty.clone());
                scope.spawn(move || {
                    if let Err(error) = work(lane, round, phase, desk, waiting, &empty) {
                        desk.fail(error);
                    }
                });
            }
            let reader = Reader {
                guest: self.guest,
                table: &mut self.table,
                totals: &mut self.totals,
                pacer: &mut self.pacer,
                progress: self.progress,
                config: self.config,
                started: self.started,
                desk: &desk,
                free,
                full,
                round,
                phase,
                zero: ZeroRun::default(),
                chunk: Chunk::default(),
            };
            // It drops its end of the queue: the connections end the round when nothing waits any more.
            let read = reader.read(&mut next, event);
            read.map_err(|error| desk.fail(error)).unwrap_or_default()
        });
        match desk.failure() {
            Some(error) => Err(error),
            None => Ok((sent, next.collect())),
        }
    }
}

/// What one connection does in a round.
fn work<T: Transport>(
    lane: &mut Lane<'_, T>,
    round: u32,
    phase: Phase,
    desk: &Desk,
    waiting: &Mutex<Receiver<Chunk>>,
    empty: &Sender<Chunk>,
) -> Result<(), SourceError> {
    let mut polled = Instant::now();
    while !desk.failed() {
        // Only the first connection is answered on.
        if lane.channel.stream() == Some(STREAM) && polled.elapsed() >= POLL_EVERY {
            polled = Instant::now();
            lane.channel.check_abort().map_err(on(phase))?;
        }
        let next = lock(waiting).recv_timeout(POLL_EVERY);
        let mut chunk = match next {
            Ok(chunk) => chunk,
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) if desk.failed() => break,
            Err(RecvTimeoutError::Disconnected) => {
                return lane.end_round(round, phase).map_err(on(phase));
            }
        };
        let bytes = lane.queued();
        chunk.each(|(page, count), content| lane.seal(round, page, count, content).map(drop))?;
        lane.send_batch().map_err(on(phase))?;
        let bytes = lane.queued().saturating_sub(bytes);
        desk.sent.fetch_add(bytes, Ordering::Relaxed);
        chunk.clear();
        give(empty, chunk);
    }
    Ok(())
}

/// What the threads of a round know of one another.
#[derive(Default)]
struct Desk {
    /// Bytes of frames.
    sent: AtomicU64,
    failed: AtomicBool,
    /// The first one.
    failure: Mutex<Option<SourceError>>,
}

impl Desk {
    fn fail(&self, error: SourceError) {
        lock(&self.failure).get_or_insert(error);
        self.failed.store(true, Ordering::Release);
    }

    fn failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    fn failure(self) -> Option<SourceError> {
        let failure = self.failure.into_inner();
        failure.unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads the guest into chunks.
struct Reader<'a> {
    guest: &'a mut dyn SourceGuest,
    table: &'a mut PageTable,
    totals: &'a mut Totals,
    pacer: &'a mut Pacer,
    progress: &'a mut dyn FnMut(Progress),
    config: &'a SourceConfig,
    started: Instant,
    desk: &'a Desk,
    free: Receiver<Chunk>,
    full: Sender<Chunk>,
    round: u32,
    phase: Phase,
    zero: ZeroRun,
    chunk: Chunk,
}

impl Reader<'_> {
    /// How many pages it read; stops where the operator wants to switch, or a connection has failed.
    fn read(
        mut self,
        next: &mut impl Iterator<Item = Gpn>,
        mut event: Progress,
    ) -> Result<u64, SourceError> {
        let step = self.guest.batch_pages().clamp(1, MAX_ENTRIES / 2);
        let (mut sent, mut wanted) = (0, Vec::with_capacity(step));
        let (mut reported, bytes) = (Instant::now(), event.bytes);
        while !self.desk.failed() && !self.shall_switch() {
            wanted.clear();
            wanted.extend(next.by_ref().take(step));
            if wanted.is_empty() {
                break;
            }
            self.config.check_given_up(self.started)?;
            self.read_some(&wanted)?;
            sent += wanted.len() as u64;
            if self.chunk.is_full(step) {
                self.hand_over()?;
            }
            if reported.elapsed() >= REPORT_EVERY {
                reported = Instant::now();
                event.bytes = bytes + self.desk.sent.load(Ordering::Relaxed);
                event.pages = sent;
                event.zero_pages = self.totals.zero_pages;
                event.elapsed_ms = millis(self.started.elapsed());
                (self.progress)(event.clone());
            }
        }
        if let Some(run) = self.zero.take() {
            put(
                self.table,
                &mut self.chunk,
                self.round,
                run,
                PageContent::Zero,
            )?;
        }
        self.hand_over()?;
        Ok(sent)
    }

    fn shall_switch(&self) -> bool {
        self.phase == Phase::Rounds && self.config.controls.shall_proceed()
    }

    /// Hands the chunk over and takes an empty one, as soon as there is one; keeps within the bandwidth.
    fn hand_over(&mut self) -> Result<(), SourceError> {
        let chunk = std::mem::take(&mut self.chunk);
        if chunk.pieces.is_empty() {
            return Ok(());
        }
        let bytes = chunk.wire_bytes();
        give(&self.full, chunk);
        let Self {
            config,
            started,
            phase,
            desk,
            guest,
            ..
        } = self;
        if *phase == Phase::Rounds {
            self.pacer.pace(bytes, &config.controls, || {
                guest.attend();
                let goes_on = !desk.failed() && !config.controls.shall_proceed();
                goes_on && config.check_given_up(*started).is_ok()
            });
        }
        while !desk.failed() {
            match self.free.recv_timeout(POLL_EVERY) {
                Ok(chunk) => {
                    self.chunk = chunk;
                    break;
                }
                Err(_) => config.check_given_up(*started)?,
            }
        }
        Ok(())
    }

    /// Copies pages into the chunk.
    fn read_some(&mut self, wanted: &[Gpn]) -> Result<(), SourceError> {
        let Self {
            guest,
            table,
            totals,
            zero,
            chunk,
            round,
            phase,
            ..
        } = self;
        let (mut failed, mut emitted) = (None, 0);
        let mut emit = |page: Gpn, content: PageContent<'_>| {
            let count = content.pages();
            emitted += count;
            if failed.is_some() {
                return;
            }
            let run = match content {
                PageContent::Zero => {
                    totals.zero_pages += 1;
                    zero.extend(page)
                }
                content => {
                    let firmware = matches!(content, PageContent::Firmware { .. });
                    totals.firmware_pages += u64::from(firmware);
                    Some((page, u32::try_from(count).unwrap_or(u32::MAX)))
                }
            };
            let put = run.map(|run| put(table, chunk, *round, run, content));
            failed = put.and_then(Result::err);
        };
        guest.read_pages(wanted, &mut emit).map_err(at(*phase))?;
        match failed {
            Some(error) => Err(error),
            None if emitted != wanted.len() => {
                let text = format!("{} pages were asked for, {emitted} were read", wanted.len());
                Err(at(*phase)(GuestError(text)))
            }
            None => Ok(()),
        }
    }
}

/// Records pages as sent in this round, and puts them into a chunk.
fn put(
    table: &mut PageTable,
    chunk: &mut Chunk,
    round: u32,
    run: (Gpn, u32),
    content: PageContent<'_>,
) -> Result<(), SourceError> {
    let (Gpn(page), count) = run;
    Ok(table
        .record_run(page, count, round)
        .map(|()| chunk.push(run, content))?)
}

/// Pages as they were read: of one batch.
#[derive(Default)]
struct Chunk {
    bytes: Vec<u8>,
    pieces: Vec<Piece>,
}

struct Piece {
    run: (Gpn, u32),
    kind: PageKind,
    /// Of its bytes, and of a packet's header before them.
    length: usize,
    header: usize,
}

impl Chunk {
    fn push(&mut self, run: (Gpn, u32), content: PageContent<'_>) {
        let (kind, header, body): (_, &[u8], &[u8]) = match content {
            PageContent::Zero => (PageKind::Zero, &[], &[]),
            PageContent::Data(data) => (PageKind::Data, &[], data),
            PageContent::Firmware { header, ciphertext } => {
                (PageKind::Firmware, header, ciphertext)
            }
        };
        self.bytes.extend_from_slice(header);
        self.bytes.extend_from_slice(body);
        self.pieces.push(Piece {
            run,
            kind,
            length: body.len(),
            header: header.len(),
        });
    }

    /// Whether another `step` pages and the pending run may not fit into its batch.
    fn is_full(&self, step: usize) -> bool {
        self.bytes.len() >= BATCH_TARGET || self.pieces.len() + step + 1 > MAX_ENTRIES
    }

    /// About what it is on the wire.
    fn wire_bytes(&self) -> u64 {
        (self.bytes.len() + self.pieces.len() * (ENTRY_HEADER_SIZE + crate::crypto::TAG_SIZE))
            as u64
    }

    fn each(
        &mut self,
        mut seal: impl FnMut((Gpn, u32), PageContent<'_>) -> Result<(), SourceError>,
    ) -> Result<(), SourceError> {
        let mut rest = self.bytes.as_slice();
        for piece in &self.pieces {
            let (header, after) = rest.split_at_checked(piece.header).unwrap_or_default();
            let (body, after) = after.split_at_checked(piece.length).unwrap_or_default();
            rest = after;
            seal(
                piece.run,
                match piece.kind {
                    PageKind::Zero => PageContent::Zero,
                    PageKind::Data => PageContent::Data(body),
                    PageKind::Firmware => PageContent::Firmware {
                        header,
                        ciphertext: body,
                    },
                },
            )?;
        }
        Ok(())
    }

    fn clear(&mut self) {
        self.bytes.clear();
        self.pieces.clear();
    }
}

/// To whoever takes it; nobody does after a failure.
fn give(to: &Sender<Chunk>, chunk: Chunk) {
    let _ = to.send(chunk);
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

const CHUNKS_PER_LANE: usize = 2;
