//! The running stream of the source: phases `Rounds` to `Done`.

use std::iter::once;
use std::time::{Duration, Instant};

use super::lane::Lane;
use super::{SourceConfig, SourceError, SourceOutcome, Verification};
use crate::channel::ChannelError;
use crate::control::Pacer;
use crate::guest::{Gpn, GuestError, PageContent, SourceGuest};
use crate::pages::PageSet;
use crate::precopy::{Convergence, Estimator, Next, Round};
use crate::progress::{Phase, Progress, millis};
use crate::tls::Transport;
use crate::transcript::{Manifest, PageTable, StreamEnd};
use crate::wire::batch::{MAX_ENTRIES, MAX_RUN};
use crate::wire::messages::{Commit, PathKind, RoundAck, Running, State, Verified};
use crate::wire::{MAX_STATE, STATE_CHUNK, WireError};

/// The running stream: phases `Rounds` to `Done`.
pub(super) struct Stream<'a, T> {
    pub(super) first: Lane<'a, T>,
    pub(super) further: Vec<Lane<'a, T>>,
    pub(super) config: &'a SourceConfig,
    pub(super) guest: &'a mut dyn SourceGuest,
    pub(super) progress: &'a mut dyn FnMut(Progress),
    pub(super) started: Instant,
    pub(super) table: PageTable,
    pub(super) round: u32,
    pub(super) totals: Totals,
    pub(super) polled: Instant,
    pub(super) pacer: Pacer,
}

#[derive(Default)]
pub(super) struct Totals {
    pub(super) pages: u64,
    pub(super) zero_pages: u64,
    pub(super) firmware_pages: u64,
    stream_time: Duration,
}

/// What is left when the guest is about to be paused.
pub(super) struct Copied {
    left: PageSet,
    convergence: Convergence,
    estimator: Estimator,
}

pub(super) struct EndOfStream {
    pub(super) epoch: u64,
    pub(super) offer_hash: [u8; 32],
}

impl<T: Transport> Stream<'_, T> {
    /// Phase `Rounds`: the guest runs.
    pub(super) fn copy_rounds(&mut self) -> Result<Copied, SourceError> {
        let mut pages = self.guest.start_tracking().map_err(at(Phase::Rounds))?;
        let mut estimator = Estimator::new(self.config.limits);
        loop {
            self.round += 1;
            let (begun, bytes) = (Instant::now(), self.bytes());
            let (sent, unsent) = self.send_round(Phase::Rounds, &pages, &estimator)?;
            let ended = Instant::now();
            self.await_ack(sent)?;
            let acknowledged_after = ended.elapsed();
            let mut dirty = self.guest.take_dirty().map_err(at(Phase::Rounds))?;
            let duration = begun.elapsed();
            self.totals.stream_time += duration;
            let bytes = self.bytes().saturating_sub(bytes);
            let throttled = estimator.throttle();
            let mut next = estimator.finish(Round {
                bytes,
                duration,
                paced: self.pacer.take_waited(),
                acknowledged_after,
                dirty_pages: dirty.len(),
            });
            dirty.merge(&unsent);
            let dirty_pages = dirty.len();
            if self.config.controls.shall_proceed() {
                next = Next::Pause(Convergence::Proceeded);
            } else if estimator.throttle() != throttled {
                let throttle = self.guest.throttle(estimator.throttle());
                throttle.map_err(at(Phase::Rounds))?;
            }
            let mut event = self.event(Phase::Rounds, &estimator);
            event.pages = sent;
            event.pages_total = sent;
            event.dirty_pages = dirty_pages;
            (self.progress)(event);
            match next {
                Next::Round => pages = dirty,
                Next::Pause(convergence) => {
                    return Ok(Copied {
                        left: dirty,
                        convergence,
                        estimator,
                    });
                }
            }
        }
    }

    /// Phases `Final` to `Done`.
    pub(super) fn finish(
        &mut self,
        copied: Copied,
        end: EndOfStream,
        path: PathKind,
    ) -> Result<SourceOutcome, SourceError> {
        let Copied {
            left,
            convergence,
            estimator,
        } = copied;
        self.check_cancelled()?;
        let paused = Instant::now();
        self.report(Phase::Final, &estimator);
        self.guest.pause().map_err(at(Phase::Final))?;
        let state = self.send_last(left, &estimator)?;
        self.totals.stream_time += paused.elapsed();

        self.report(Phase::Manifest, &estimator);
        let stream_end = StreamEnd {
            rounds: self.round,
            epoch: end.epoch,
            content_sha256: self.read_back()?,
        };
        let logs = once(&self.first).chain(&self.further).map(|lane| &lane.log);
        let manifest = self
            .table
            .manifest(logs, stream_end, &state, end.offer_hash);
        let root = self.agree_on(&manifest)?;
        self.check_cancelled()?;

        self.report(Phase::Commit, &estimator);
        self.guest.release().map_err(at(Phase::Commit))?;
        let Running { epoch, announced } = self.commit(end.epoch.saturating_add(1))?;
        let downtime = paused.elapsed();
        self.report(Phase::Running, &estimator);
        self.guest.destroy().map_err(SourceError::Destroy)?;
        self.report(Phase::Done, &estimator);
        let downtime_ms = downtime.as_secs_f64() * 1e3;
        let estimated_downtime_ms = estimator
            .estimated_downtime()
            .map_or(0.0, |d| d.as_secs_f64() * 1e3);
        let stream_seconds = self.totals.stream_time.as_secs_f64().max(1e-6);
        Ok(SourceOutcome {
            rounds: self.round,
            pages: self.totals.pages,
            zero_pages: self.totals.zero_pages,
            firmware_pages: self.totals.firmware_pages,
            wire_bytes: self.bytes(),
            downtime_ms,
            estimated_downtime_ms,
            forecast_error_ms: downtime_ms - estimated_downtime_ms,
            throttle_percent: estimator.throttle(),
            verified: Verification::of(&manifest, announced),
            total_ms: millis(self.started.elapsed()),
            throughput: self.bytes() as f64 / stream_seconds,
            convergence,
            tls_suite: self.first.channel.tls().suite(),
            path,
            manifest_root: hex::encode(root),
            epoch,
        })
    }

    /// The last round and the state; nothing is waited for in between.
    fn send_last(
        &mut self,
        mut left: PageSet,
        estimator: &Estimator,
    ) -> Result<Vec<u8>, SourceError> {
        left.merge(&self.guest.take_dirty().map_err(at(Phase::Final))?);
        self.round += 1;
        self.send_round(Phase::Final, &left, estimator)?;
        let state = self.guest.state().map_err(at(Phase::Final))?;
        let total = match u32::try_from(state.len()) {
            Ok(total) if state.len() <= MAX_STATE => total,
            _ => {
                return Err(at(Phase::Final)(GuestError(format!(
                    "machine state exceeds {MAX_STATE} bytes"
                ))));
            }
        };
        let mut offset = 0;
        for chunk in state.chunks(STATE_CHUNK) {
            let piece = State {
                total,
                offset,
                bytes: chunk.to_vec(),
            };
            self.first.channel.send(&piece).map_err(on(Phase::Final))?;
            offset = offset.saturating_add(u32::try_from(chunk.len()).unwrap_or(u32::MAX));
        }
        Ok(state)
    }

    /// Where it is asked for: what memory holds, whatever was sent of it.
    fn read_back(&mut self) -> Result<Option<[u8; 32]>, SourceError> {
        if !self.config.read_back {
            return Ok(None);
        }
        let digest = self.guest.content_digest(self.table.present());
        digest.map(Some).map_err(at(Phase::Manifest))
    }

    fn agree_on(&mut self, manifest: &Manifest) -> Result<[u8; 48], SourceError> {
        let phase = Phase::Manifest;
        let root = manifest.root().map_err(wire(phase))?;
        self.first.channel.send(manifest).map_err(on(phase))?;
        let deadline = Instant::now() + self.config.deadlines.finish;
        let verified: Verified = self
            .first
            .channel
            .receive_message("Verified", deadline)
            .map_err(on(phase))?;
        if [verified.root_hi, verified.root_lo].as_flattened() != root {
            return Err(SourceError::Peer("holds another manifest"));
        }
        Ok(root)
    }

    /// From the first byte of the commit on, this side no longer decides.
    fn commit(&mut self, epoch: u64) -> Result<Running, SourceError> {
        self.first.channel.ignore_cancel();
        let sent = self.first.channel.send(&Commit { epoch });
        let deadline = Instant::now() + self.config.deadlines.finish;
        let answer = sent.and_then(|()| {
            self.first
                .channel
                .receive_message::<Running>("Running", deadline)
        });
        match answer {
            Ok(running) if running.epoch == epoch => Ok(running),
            Ok(_) => Err(SourceError::InDoubt {
                epoch,
                error: WireError::Malformed("Running of another epoch").into(),
            }),
            // Sealed by the destination, after it has abandoned: it holds nothing and never will.
            Err(error @ ChannelError::Aborted(_)) => Err(SourceError::Stream {
                phase: Phase::Commit,
                error,
            }),
            Err(error) => Err(SourceError::InDoubt { epoch, error }),
        }
    }

    /// Sends a round's pages and ends the round on every stream; how many were sent, and those that were not because the
    /// operator wants to switch now.
    fn send_round(
        &mut self,
        phase: Phase,
        pages: &PageSet,
        estimator: &Estimator,
    ) -> Result<(u64, PageSet), SourceError> {
        let (sent, left) = match self.further.is_empty() {
            true => {
                let sent = self.send_pages(phase, pages, estimator)?;
                self.first.end_round(self.round, phase).map_err(on(phase))?;
                sent
            }
            false => self.spread_pages(phase, pages, estimator)?,
        };
        self.totals.pages += sent;
        let mut unsent = PageSet::empty(&self.guest.memory());
        left.into_iter().for_each(|page| {
            unsent.insert(page);
        });
        Ok((sent, unsent))
    }

    /// Sends pages over the only connection.
    fn send_pages(
        &mut self,
        phase: Phase,
        pages: &PageSet,
        estimator: &Estimator,
    ) -> Result<(u64, Vec<Gpn>), SourceError> {
        let step = self.guest.batch_pages().clamp(1, MAX_ENTRIES / 2);
        let mut sent = 0u64;
        let mut zero = ZeroRun::default();
        let mut reported = Instant::now();
        let (total, mut next, mut chunk) = (pages.len(), pages.iter(), Vec::with_capacity(step));
        loop {
            if phase == Phase::Rounds && self.config.controls.shall_proceed() {
                break;
            }
            chunk.clear();
            chunk.extend(next.by_ref().take(step));
            if chunk.is_empty() {
                break;
            }
            self.check_cancelled()?;
            self.poll_abort(phase)?;
            let bytes = self.first.queued();
            self.seal_chunk(phase, &chunk, &mut zero)?;
            let bytes = self.first.queued() - bytes;
            sent += chunk.len() as u64;
            // Room for another chunk and the pending run must remain.
            if self.first.batch.payload_length() >= BATCH_TARGET
                || self.first.batch.entries() + step + 1 > MAX_ENTRIES
            {
                self.first.send_batch().map_err(on(phase))?;
            }
            if phase == Phase::Rounds {
                self.keep_pace(bytes);
            }
            if reported.elapsed() >= REPORT_EVERY {
                reported = Instant::now();
                let mut event = self.event(phase, estimator);
                event.pages = sent;
                event.pages_total = total;
                (self.progress)(event);
            }
        }
        self.seal_run(&mut zero)?;
        self.first.send_batch().map_err(on(phase))?;
        Ok((sent, next.collect()))
    }

    /// Keeps within the bandwidth; the operator is heard meanwhile.
    fn keep_pace(&mut self, bytes: u64) {
        let Self {
            guest,
            config,
            pacer,
            started,
            ..
        } = self;
        pacer.pace(bytes, &config.controls, || {
            guest.attend();
            config.check_given_up(*started).is_ok() && !config.controls.shall_proceed()
        });
    }

    /// Reads a chunk and seals each page as it passes, straight into the batch.
    fn seal_chunk(
        &mut self,
        phase: Phase,
        chunk: &[Gpn],
        zero: &mut ZeroRun,
    ) -> Result<(), SourceError> {
        let Self {
            guest,
            first,
            table,
            totals,
            round,
            ..
        } = self;
        let mut failed = None;
        let mut emitted = 0;
        let mut emit = |page: Gpn, content: PageContent<'_>| {
            let count = content.pages();
            emitted += count;
            if failed.is_some() {
                return;
            }
            let sealed = match content {
                PageContent::Zero => {
                    totals.zero_pages += 1;
                    zero.extend(page).map_or(Ok(()), |run| {
                        seal(first, table, *round, run, PageContent::Zero)
                    })
                }
                content => {
                    totals.firmware_pages +=
                        u64::from(matches!(content, PageContent::Firmware { .. }));
                    let count = u32::try_from(count).unwrap_or(u32::MAX);
                    seal(first, table, *round, (page, count), content)
                }
            };
            failed = sealed.err();
        };
        guest.read_pages(chunk, &mut emit).map_err(at(phase))?;
        if let Some(error) = failed {
            return Err(error);
        }
        if emitted != chunk.len() {
            let text = format!("{} pages were asked for, {emitted} were read", chunk.len());
            return Err(at(phase)(GuestError(text)));
        }
        Ok(())
    }

    fn seal_run(&mut self, zero: &mut ZeroRun) -> Result<(), SourceError> {
        let Some(run) = zero.take() else {
            return Ok(());
        };
        seal(
            &mut self.first,
            &mut self.table,
            self.round,
            run,
            PageContent::Zero,
        )
    }

    fn await_ack(&mut self, pages: u64) -> Result<(), SourceError> {
        let deadline = Instant::now() + self.config.deadlines.frame;
        let ack: RoundAck = self
            .first
            .channel
            .receive_message("RoundAck", deadline)
            .map_err(on(Phase::Rounds))?;
        if ack
            != (RoundAck {
                round: self.round,
                pages,
            })
        {
            return Err(SourceError::Peer("acknowledged another round"));
        }
        Ok(())
    }

    fn poll_abort(&mut self, phase: Phase) -> Result<(), SourceError> {
        if self.polled.elapsed() >= POLL_EVERY {
            self.polled = Instant::now();
            self.first.channel.check_abort().map_err(on(phase))?;
        }
        Ok(())
    }

    fn check_cancelled(&self) -> Result<(), SourceError> {
        self.config.check_given_up(self.started)
    }

    /// Bytes of frames in both directions, before TLS, over all connections.
    fn bytes(&self) -> u64 {
        let lanes = once(&self.first).chain(&self.further);
        lanes.map(|lane| lane.channel.bytes()).sum()
    }

    fn report(&mut self, phase: Phase, estimator: &Estimator) {
        let event = self.event(phase, estimator);
        (self.progress)(event);
    }

    pub(super) fn event(&self, phase: Phase, estimator: &Estimator) -> Progress {
        Progress {
            round: self.round,
            zero_pages: self.totals.zero_pages,
            bytes: self.bytes(),
            dirty_rate: estimator.dirty_rate(),
            throughput: estimator.throughput(),
            estimated_downtime_ms: estimator
                .estimated_downtime()
                .map(|d| d.as_secs_f64() * 1e3),
            throttle_percent: estimator.throttle(),
            ..Progress::new(phase, self.started)
        }
    }
}

/// Zero pages that follow one another become one entry.
#[derive(Default)]
pub(super) struct ZeroRun(Option<(Gpn, u32)>);

impl ZeroRun {
    /// Adds a page; returns the run that it does not continue.
    pub(super) fn extend(&mut self, page: Gpn) -> Option<(Gpn, u32)> {
        match &mut self.0 {
            Some((start, count))
                if start.0.checked_add(u64::from(*count)) == Some(page.0) && *count < MAX_RUN =>
            {
                *count += 1;
                None
            }
            other => other.replace((page, 1)),
        }
    }

    pub(super) fn take(&mut self) -> Option<(Gpn, u32)> {
        self.0.take()
    }
}

pub(super) const BATCH_TARGET: usize = 256 * 1024;
pub(super) const REPORT_EVERY: Duration = Duration::from_millis(500);
pub(super) const POLL_EVERY: Duration = Duration::from_millis(20);

fn seal<T: Transport>(
    first: &mut Lane<'_, T>,
    table: &mut PageTable,
    round: u32,
    (page, count): (Gpn, u32),
    content: PageContent<'_>,
) -> Result<(), SourceError> {
    let header = first.seal(round, page, count, content)?;
    Ok(table.record(&header)?)
}

pub(super) fn at(phase: Phase) -> impl Fn(GuestError) -> SourceError {
    move |error| SourceError::Guest { phase, error }
}

pub(super) fn on(phase: Phase) -> impl Fn(ChannelError) -> SourceError {
    move |error| SourceError::Stream { phase, error }
}

fn wire(phase: Phase) -> impl Fn(WireError) -> SourceError {
    move |error| SourceError::Stream {
        phase,
        error: error.into(),
    }
}
