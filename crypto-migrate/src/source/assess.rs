//! An assessment: everything up to the first page, and measurements. Nothing of the guest travels and nothing of it
//! changes; the destination builds what it would need, says so, and removes it.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::stream::{at, on};
use super::{SourceConfig, SourceError, agree, connect, give_up};
use crate::channel::Channel;
use crate::guest::{GuestOffer, SourceGuest};
use crate::precopy::{Forecast, Measured};
use crate::progress::{Phase, Progress, millis};
use crate::tls::Transport;
use crate::wire::STATE_CHUNK;
use crate::wire::messages::{PathKind, Probe, ProbeAck, Purpose};

/// What a move would be like.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Assessment {
    /// Pages of the guest's memory.
    pub memory_pages: u64,
    /// What was measured; the forecast follows from it.
    pub measured: Measured,
    /// What is to be expected.
    pub forecast: Forecast,
    /// TLS cipher suite.
    pub tls_suite: String,
    /// Direct or through a gateway.
    pub path: PathKind,
    /// Connections that the move would have; what the way carries was measured over one.
    pub streams: u16,
    /// How long it took.
    pub total_ms: u64,
}

/// Asks the destination whether it would take the guest, and measures what a move would take. The guest runs on in any
/// case.
pub fn assess<T: Transport>(
    transport: T,
    config: &SourceConfig,
    offer: &GuestOffer,
    guest: &mut dyn SourceGuest,
    progress: &mut dyn FnMut(Progress),
) -> Result<Assessment, SourceError> {
    let started = Instant::now();
    let mut channel = connect(transport, config, progress, started)
        .map_err(|error| super::resume(guest, error))?;
    let assessed = run(&mut channel, config, offer, guest, progress, started);
    let assessed = match (assessed, guest.resume()) {
        (Ok(_), Err(error)) => Err(SourceError::Guest {
            phase: Phase::Assess,
            error,
        }),
        (Err(cause), Err(error)) => Err(SourceError::Resume {
            cause: Box::new(cause),
            error,
        }),
        (assessed, Ok(())) => assessed,
    };
    match assessed {
        Ok(assessment) => {
            channel.close(super::CLOSE_TIME);
            Ok(assessment)
        }
        Err(error) => Err(give_up(&mut channel, error)),
    }
}

fn run<T: Transport>(
    channel: &mut Channel<T>,
    config: &SourceConfig,
    offer: &GuestOffer,
    guest: &mut dyn SourceGuest,
    progress: &mut dyn FnMut(Progress),
    started: Instant,
) -> Result<Assessment, SourceError> {
    progress(Progress::new(Phase::Agree, started));
    let agreed = &mut |facts: &_| guest.agreed(facts);
    let session = agree(channel, config, offer, agreed, Purpose::Assess)?;
    guest
        .judge(&session.evidence)
        .map_err(SourceError::Refused)?;
    progress(Progress::new(Phase::Assess, started));
    let (throughput, round_trip) = measure_way(channel, config)?;
    let (pages, dirty_rate) = measure_guest(config, guest, started)?;
    let measured = Measured {
        pages,
        dirty_rate,
        throughput,
        round_trip,
    };
    Ok(Assessment {
        memory_pages: offer.memory.iter().map(|range| range.count).sum(),
        measured,
        forecast: Forecast::of(&measured, config.limits, config.controls.bandwidth()),
        tls_suite: channel.tls().suite(),
        path: session.path,
        streams: session.streams,
        total_ms: millis(started.elapsed()),
    })
}

/// Bytes per second and the round trip: one small probe, then large ones for [`PROBE_TIME`] at most.
fn measure_way<T: Transport>(
    channel: &mut Channel<T>,
    config: &SourceConfig,
) -> Result<(f64, Duration), SourceError> {
    let begun = Instant::now();
    probe(channel, config, |_| false, 1)?;
    let round_trip = begun.elapsed();
    let begun = Instant::now();
    let more = |sent| sent < PROBE_BYTES && begun.elapsed() < PROBE_TIME;
    let sent = probe(channel, config, more, STATE_CHUNK)?;
    let took = begun.elapsed().saturating_sub(round_trip);
    Ok((sent as f64 / took.as_secs_f64().max(1e-6), round_trip))
}

fn probe<T: Transport>(
    channel: &mut Channel<T>,
    config: &SourceConfig,
    more: impl Fn(u64) -> bool,
    size: usize,
) -> Result<u64, SourceError> {
    let mut sent = 0;
    loop {
        sent += size as u64;
        let last = !more(sent);
        let bytes = vec![0x5a; size];
        channel
            .send(&Probe { last, bytes })
            .map_err(on(Phase::Assess))?;
        if last {
            break;
        }
    }
    let deadline = Instant::now() + config.deadlines.frame;
    let ack: ProbeAck = channel
        .receive_message("ProbeAck", deadline)
        .map_err(on(Phase::Assess))?;
    if ack.bytes != sent {
        return Err(SourceError::Peer("counted other probes"));
    }
    Ok(sent)
}

/// Pages that hold anything, and distinct pages written per second, over [`WATCH_TIME`].
fn measure_guest(
    config: &SourceConfig,
    guest: &mut dyn SourceGuest,
    started: Instant,
) -> Result<(u64, f64), SourceError> {
    let failed = || at(Phase::Assess);
    let pages = guest.start_tracking().map_err(failed())?.len();
    let begun = Instant::now();
    while begun.elapsed() < WATCH_TIME {
        std::thread::sleep(WATCH_STEP);
        guest.attend();
        config.check_given_up(started)?;
    }
    let written = guest.take_dirty().map_err(failed())?;
    Ok((pages, written.len() as f64 / begun.elapsed().as_secs_f64()))
}

const PROBE_BYTES: u64 = 64 << 20;
const PROBE_TIME: Duration = Duration::from_millis(500);
const WATCH_TIME: Duration = Duration::from_secs(1);
const WATCH_STEP: Duration = Duration::from_millis(20);
