//! The source's engine: offer, copy in rounds, pause, prove, give up, destroy.
//!
//! Phases are those of [`Phase`]. Until the commit is sent, every failure ends with the guest running here
//! as if nothing had been tried. From the first byte of the commit on, only the destination's word counts:
//! `Running` (destroy here), an authenticated abort (the destination holds nothing: resume here), or silence:
//! [`SourceError::InDoubt`], and the host must ask the destination who owns the guest ([`settle`](crate::settlement::settle)).

mod assess;
mod lane;
mod spread;
mod stream;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;

pub use self::assess::{Assessment, assess};
use self::lane::Lane;
use self::stream::{EndOfStream, Stream, Totals, at, on};
use crate::channel::{Channel, ChannelError};
use crate::code::Code;
use crate::control::{Controls, Pacer};
use crate::crypto::KeyChain;
use crate::guest::{GuestError, GuestOffer, Refusal, SourceGuest};
use crate::identity::Local;
use crate::page::{Binding, PageError};
use crate::preamble::Ticket;
use crate::precopy::{Convergence, Limits};
use crate::progress::{Phase, Progress};
use crate::session::{
    self, JoinError, OwnerKey, Session, SessionError, SessionFacts, Times, Wanted,
};
use crate::tls::{self, TlsError, Transport};
use crate::transcript::{Manifest, PageTable, StreamCount, TranscriptError};
use crate::wire::FrameKind;
use crate::wire::messages::{Begin, PathKind, Purpose};

/// How long each wait may last, at either end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadlines {
    /// TLS handshake.
    pub connect: Duration,
    /// Each answer of the agreement; the destination builds the machine meanwhile.
    pub agree: Duration,
    /// Sending one frame, or waiting for the next one of a running stream.
    pub frame: Duration,
    /// Each answer after the last page: verification, restore, activation.
    pub finish: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self {
            connect: seconds(10),
            agree: seconds(30),
            frame: seconds(20),
            finish: seconds(30),
        }
    }
}

/// What the source needs besides the guest.
#[derive(Debug)]
pub struct SourceConfig {
    /// This host and whom it allows.
    pub local: Local,
    /// The destination's name in the allow-list.
    pub peer: String,
    /// Convergence.
    pub limits: Limits,
    /// Deadlines.
    pub deadlines: Deadlines,
    /// The owner's secret, where there is one.
    pub owner_key: Option<OwnerKey>,
    /// Set it to cancel; honoured between batches and while waiting, until the commit.
    pub cancel: Arc<AtomicBool>,
    /// What the operator may change meanwhile.
    pub controls: Arc<Controls>,
    /// Whether both ends read all memory anew, the guest paused, and compare it, besides the seals.
    pub read_back: bool,
    /// Connections to ask for, the first included, 1 to [`MAX_STREAMS`](session::MAX_STREAMS); the destination may grant fewer.
    pub streams: u16,
}

impl SourceConfig {
    /// Defaults for a migration to `peer`.
    pub fn new(local: Local, peer: &str) -> Self {
        Self {
            local,
            peer: peer.to_owned(),
            limits: Limits::default(),
            deadlines: Deadlines::default(),
            owner_key: None,
            cancel: Arc::default(),
            controls: Arc::default(),
            read_back: false,
            streams: 1,
        }
    }

    /// Whether the move is cancelled or has lasted too long.
    fn check_given_up(&self, started: Instant) -> Result<(), SourceError> {
        let late = self.limits.total.filter(|limit| started.elapsed() > *limit);
        match late {
            Some(limit) => Err(SourceError::TimeLimit(limit)),
            None if self.cancel.load(Ordering::Relaxed) => Err(SourceError::Cancelled),
            None => Ok(()),
        }
    }
}

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SourceOutcome {
    /// Rounds, the last included.
    pub rounds: u32,
    /// Pages sent, zero pages included.
    pub pages: u64,
    /// Zero pages among them.
    pub zero_pages: u64,
    /// Firmware packets among them.
    pub firmware_pages: u64,
    /// Bytes of frames in both directions, before TLS.
    pub wire_bytes: u64,
    /// From the pause to the destination's `Running`.
    pub downtime_ms: f64,
    /// The forecast when the guest was paused.
    pub estimated_downtime_ms: f64,
    /// Everything.
    pub total_ms: u64,
    /// Bytes per second over all rounds.
    pub throughput: f64,
    /// How far the outcome was from that forecast, in milliseconds; negative if it went faster.
    pub forecast_error_ms: f64,
    /// Why the guest was paused when it was.
    pub convergence: Convergence,
    /// How far its vCPUs were throttled at last, in percent.
    pub throttle_percent: u8,
    /// What both ends compared.
    pub verified: Verification,
    /// TLS cipher suite.
    pub tls_suite: String,
    /// Direct or through a gateway.
    pub path: PathKind,
    /// Root of the manifest that both ends hold, hexadecimal.
    pub manifest_root: String,
    /// The epoch that the destination holds.
    pub epoch: u64,
}

/// What both ends hold and have compared with one another, before the destination ran the guest; and what was heard after.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Verification {
    /// Distinct pages.
    pub pages: u64,
    /// Digest of their seals in order: the newest version of each, at its place.
    pub seals_sha256: String,
    /// Digest of the state of devices and vCPUs.
    pub state_sha256: String,
    /// Digest of the memory as it lay at both ends, where it was read anew.
    pub content_sha256: Option<String>,
    /// Of how many network cards the destination has announced the addresses.
    pub announced: u32,
    /// What each connection carried.
    pub streams: Vec<StreamCount>,
}

impl Verification {
    pub(crate) fn of(manifest: &Manifest, announced: u32) -> Self {
        Self {
            pages: manifest.pages,
            seals_sha256: hex::encode(manifest.seals_sha256),
            state_sha256: hex::encode(manifest.state_sha256),
            content_sha256: manifest.content_sha256.map(hex::encode),
            announced,
            streams: manifest.streams.clone(),
        }
    }
}

/// A migration that did not happen, or of which the end is not known.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// TLS.
    #[error("connecting to the destination: {0}")]
    Connect(#[source] TlsError),
    /// The agreement.
    #[error("agreeing with the destination: {0}")]
    Agree(#[source] SessionError),
    /// A further connection.
    #[error("joining the session: {0}")]
    Join(#[source] JoinError),
    /// Local policy refuses the session that was agreed on.
    #[error("session refused: {0}")]
    Refused(#[source] Refusal),
    /// The stream, or the destination's abort.
    #[error("in phase {phase}: {error}")]
    Stream {
        /// Where.
        phase: Phase,
        /// Why.
        #[source]
        error: ChannelError,
    },
    /// The guest's side of this host.
    #[error("in phase {phase}, the guest's side of this host: {error}")]
    Guest {
        /// Where.
        phase: Phase,
        /// Why.
        #[source]
        error: GuestError,
    },
    /// A page could not be sealed.
    #[error(transparent)]
    Page(#[from] PageError),
    /// A page outside the offered memory, or twice.
    #[error(transparent)]
    Transcript(#[from] TranscriptError),
    /// The destination answered something else than it must.
    #[error("the destination {0}")]
    Peer(&'static str),
    /// The operator cancelled.
    #[error("cancelled; the guest runs on")]
    Cancelled,
    /// It took too long.
    #[error(
        "not moved within {0:?}; the guest runs on; allow more time, or less of it to be kept (`--downtime-limit`)"
    )]
    TimeLimit(Duration),
    /// The guest could not be resumed after a failure.
    #[error("the migration failed ({cause}) and the guest could not be resumed: {error}")]
    Resume {
        /// Why the migration failed.
        cause: Box<SourceError>,
        /// Why the guest does not run.
        #[source]
        error: GuestError,
    },
    /// The destination runs the guest, but the copy here could not be destroyed.
    #[error(
        "the destination runs the guest; its copy here could not be destroyed: {0}; remove it, never resume it"
    )]
    Destroy(#[source] GuestError),
    /// The commit was sent and not answered.
    #[error(
        "the commit of epoch {epoch} was sent and not answered ({error}); the guest stays paused: ask the destination who owns it"
    )]
    InDoubt {
        /// The epoch that the destination holds if it received the commit.
        epoch: u64,
        /// What ended the connection.
        #[source]
        error: ChannelError,
    },
}

impl SourceError {
    /// Whether the peer gave up (and needs not be told).
    pub fn by_peer(&self) -> bool {
        match self {
            SourceError::Agree(error) => error.by_peer(),
            SourceError::Stream { error, .. } => error.by_peer(),
            _ => false,
        }
    }

    /// The stable code; that of the destination where it refused.
    pub fn code(&self) -> &str {
        match self {
            SourceError::Connect(error) => error.code().as_str(),
            SourceError::Agree(error) => error.code(),
            SourceError::Join(error) => error.code(),
            SourceError::Refused(refusal) => &refusal.code,
            SourceError::Stream { error, .. } => error.code(),
            SourceError::Guest { .. } | SourceError::Destroy(_) => Code::GuestFailed.as_str(),
            SourceError::Page(error) => error.code().as_str(),
            SourceError::Transcript(error) => error.code().as_str(),
            SourceError::Peer(_) => Code::ManifestMismatch.as_str(),
            SourceError::Cancelled => Code::Cancelled.as_str(),
            SourceError::TimeLimit(_) => Code::TimeLimit.as_str(),
            SourceError::Resume { cause, .. } => cause.code(),
            SourceError::InDoubt { .. } => Code::InDoubt.as_str(),
        }
    }

    /// Whether the guest runs at the source, as before.
    pub fn guest_runs_here(&self) -> bool {
        !matches!(
            self,
            SourceError::Resume { .. } | SourceError::Destroy(_) | SourceError::InDoubt { .. }
        )
    }
}

/// Makes a further connection for a move: the preamble of this ticket is its first bytes.
pub type Dial<'a, T> = dyn FnMut(&Ticket) -> std::io::Result<T> + 'a;

/// Moves the guest over one connection. On any error for which [`SourceError::guest_runs_here`] holds, the
/// guest runs on here.
pub fn migrate<T: Transport>(
    transport: T,
    config: &SourceConfig,
    offer: &GuestOffer,
    guest: &mut dyn SourceGuest,
    progress: &mut dyn FnMut(Progress),
) -> Result<SourceOutcome, SourceError> {
    let mut none = |_: &Ticket| Err(std::io::ErrorKind::Unsupported.into());
    migrate_over(transport, &mut none, config, offer, guest, progress)
}

/// Moves the guest over as many connections as the configuration asks for and the destination grants; `dial` makes the
/// further ones. One of them that fails ends the move, as the first one would.
pub fn migrate_over<T: Transport>(
    transport: T,
    dial: &mut Dial<'_, T>,
    config: &SourceConfig,
    offer: &GuestOffer,
    guest: &mut dyn SourceGuest,
    progress: &mut dyn FnMut(Progress),
) -> Result<SourceOutcome, SourceError> {
    let started = Instant::now();
    let mut channel =
        connect(transport, config, progress, started).map_err(|error| resume(guest, error))?;
    // Closed last: what the first connection says explains why.
    let mut further = Vec::new();
    let mut move_on = Move {
        channel: &mut channel,
        further: &mut further,
        config,
        offer,
        started,
    };
    match move_on.run(dial, guest, progress) {
        Ok(outcome) => {
            channel.close(CLOSE_TIME);
            Ok(outcome)
        }
        Err(error @ (SourceError::InDoubt { .. } | SourceError::Destroy(_))) => Err(error),
        Err(error) => {
            let error = better_cause(&mut channel, error);
            let error = match (error, config.check_given_up(started)) {
                (SourceError::Cancelled, Err(cause)) => cause,
                (error, _) => error,
            };
            let error = resume(guest, error);
            Err(give_up(&mut channel, error))
        }
    }
}

pub(crate) fn connect<T: Transport>(
    transport: T,
    config: &SourceConfig,
    progress: &mut dyn FnMut(Progress),
    started: Instant,
) -> Result<Channel<T>, SourceError> {
    progress(Progress::new(Phase::Connect, started));
    let tls = tls::connect(transport, &config.local, config.deadlines.connect)
        .map_err(SourceError::Connect)?;
    let cancelled = cancelled(config, started);
    Ok(Channel::new(tls, config.deadlines.frame, cancelled))
}

fn cancelled(config: &SourceConfig, started: Instant) -> Box<dyn Fn() -> bool + Send> {
    let (cancel, limit) = (config.cancel.clone(), config.limits.total);
    let late = move || limit.is_some_and(|limit| started.elapsed() > limit);
    Box::new(move || cancel.load(Ordering::Relaxed) || late())
}

/// Tells the peer why, unless it knows.
pub(crate) fn give_up<T: Transport>(channel: &mut Channel<T>, error: SourceError) -> SourceError {
    channel.give_up(
        FrameKind::Abort,
        error.by_peer(),
        error.code(),
        &error.to_string(),
    );
    error
}

/// Offers the guest; the session that the destination accepted, and the host has been asked about.
pub(crate) fn agree<T: Transport>(
    channel: &mut Channel<T>,
    config: &SourceConfig,
    offer: &GuestOffer,
    agreed: &mut dyn FnMut(&SessionFacts) -> Result<(), Refusal>,
    purpose: Purpose,
) -> Result<Session, SourceError> {
    let wanted = Wanted {
        purpose,
        streams: config.streams,
    };
    let session = session::offer(
        channel,
        &config.local,
        &config.peer,
        config.owner_key.as_ref(),
        offer,
        wanted,
        Instant::now() + config.deadlines.agree,
    )
    .map_err(SourceError::Agree)?;
    let facts = SessionFacts::of(
        channel.tls(),
        &session.peer,
        session.path,
        config.local.provider,
    )
    .map_err(SourceError::Agree)?;
    agreed(&facts).map_err(SourceError::Refused)?;
    Ok(session)
}

/// A move that has its first connection.
struct Move<'a, T> {
    channel: &'a mut Channel<T>,
    further: &'a mut Vec<Channel<T>>,
    config: &'a SourceConfig,
    offer: &'a GuestOffer,
    started: Instant,
}

impl<T: Transport> Move<'_, T> {
    fn run(
        &mut self,
        dial: &mut Dial<'_, T>,
        guest: &mut dyn SourceGuest,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<SourceOutcome, SourceError> {
        let (config, offer, started) = (self.config, self.offer, self.started);
        progress(Progress::new(Phase::Agree, started));
        let agreed = &mut |facts: &_| guest.agreed(facts);
        let session = agree(self.channel, config, offer, agreed, Purpose::Move)?;
        let keys = self.join(dial, &session).map_err(SourceError::Join)?;
        progress(Progress::new(Phase::Begin, started));
        let start = guest.begin(&session.evidence).map_err(at(Phase::Begin))?;
        let first = &mut *self.channel;
        first.send(&Begin { start }).map_err(on(Phase::Begin))?;
        let further = self.further.iter_mut().zip(keys);
        let further = further.map(|(channel, (keys, binding))| Lane::new(channel, keys, binding));
        let mut stream = Stream {
            further: further.collect(),
            first: Lane::new(first, session.page_keys, session.binding),
            config,
            guest,
            progress,
            started,
            table: PageTable::new(&offer.memory)?,
            round: 0,
            totals: Totals::default(),
            polled: started,
            pacer: Pacer::default(),
        };
        let copied = stream.copy_rounds()?;
        let end = EndOfStream {
            epoch: offer.epoch,
            offer_hash: session.offer_hash,
        };
        stream.finish(copied, end, session.path)
    }

    /// Every further connection that was granted.
    fn join(
        &mut self,
        dial: &mut Dial<'_, T>,
        session: &Session,
    ) -> Result<Vec<(KeyChain, Binding)>, JoinError> {
        let times = Times {
            connect: self.config.deadlines.connect,
            frame: self.config.deadlines.frame,
            agree: self.config.deadlines.agree,
        };
        let mut keys = Vec::new();
        for stream in 1..session.streams {
            let transport = dial(&session.ticket).map_err(JoinError::Dial)?;
            let joined = session::join(
                transport,
                &self.config.local,
                &session.membership,
                stream,
                times,
                cancelled(self.config, self.started),
            )?;
            self.further.push(joined.channel);
            keys.push((joined.page_keys, joined.binding));
        }
        Ok(keys)
    }
}

pub(crate) const CLOSE_TIME: Duration = Duration::from_secs(1);

/// A write that failed because the peer has closed: what it said before that is the better cause.
fn better_cause<T: Transport>(channel: &mut Channel<T>, error: SourceError) -> SourceError {
    match error {
        SourceError::Stream {
            phase,
            error: ChannelError::Tls(TlsError::Truncated | TlsError::Io(_)),
        } => match channel.last_words() {
            Some(error) => SourceError::Stream { phase, error },
            None => SourceError::Stream {
                phase,
                error: TlsError::Truncated.into(),
            },
        },
        SourceError::Join(
            JoinError::Channel(ChannelError::Tls(TlsError::Cancelled))
            | JoinError::Connect(TlsError::Cancelled),
        ) => SourceError::Cancelled,
        SourceError::Join(
            error @ (JoinError::Channel(ChannelError::Tls(_)) | JoinError::Connect(_)),
        ) => match channel.last_words() {
            Some(error) => on(Phase::Agree)(error),
            None => SourceError::Join(error),
        },
        SourceError::Stream {
            error: ChannelError::Tls(TlsError::Cancelled),
            ..
        } => SourceError::Cancelled,
        SourceError::Agree(SessionError::Channel(ChannelError::Tls(TlsError::Cancelled))) => {
            SourceError::Cancelled
        }
        error => error,
    }
}

fn resume(guest: &mut dyn SourceGuest, cause: SourceError) -> SourceError {
    match guest.resume() {
        Ok(()) => cause,
        Err(error) => SourceError::Resume {
            cause: Box::new(cause),
            error,
        },
    }
}
