//! The destination's engine: decide, place verified pages, compare, restore, take over.
//!
//! Not yet believed: everything, until its seal opens and it is what must come next. No vCPU runs before the
//! whole transcript has verified and the source has committed. Until then every failure removes every trace
//! here and tells the source why.

mod arrival;
mod gather;
mod lane;

use std::iter::once;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;

use self::arrival::{Arrival, cancelled};
use self::lane::Lane;
use crate::channel::{Channel, ChannelError};
use crate::code::Code;
use crate::guest::{DestinationGuest, Gpn, GuestError, GuestOffer, PageContent};
use crate::identity::Local;
use crate::identity::PeerIdentity;
use crate::page::OpenError;
use crate::preamble::Ticket;
use crate::progress::{Phase, Progress, millis};
use crate::session::{JoinError, MAX_STREAMS, OwnerKey, SessionError};
use crate::settlement::Settlement;
use crate::source::{Deadlines, Verification};
use crate::tls::{self, TlsError, Transport};
use crate::transcript::{Manifest, PageTable, StreamEnd, TranscriptError};
use crate::wire::batch::{Entries, EntryHeader, PageKind};
use crate::wire::messages::{
    Commit, Message, PathKind, Probe, ProbeAck, RoundAck, RoundEnd, Running, State, Verified,
};
use crate::wire::{FrameKind, MAX_STATE, WireError};

/// What the destination needs besides the guest.
#[derive(Debug)]
pub struct DestinationConfig {
    /// This host and whom it allows.
    pub local: Local,
    /// Deadlines.
    pub deadlines: Deadlines,
    /// The owner's secret, where there is one.
    pub owner_key: Option<OwnerKey>,
    /// Set it to cancel; honoured until the source has committed.
    pub cancel: Arc<AtomicBool>,
    /// Connections that a move may have, the first included.
    pub max_streams: u16,
    /// By what the further ones find the way to this end.
    pub ticket: Ticket,
}

impl DestinationConfig {
    /// Defaults.
    pub fn new(local: Local) -> Self {
        Self {
            local,
            deadlines: Deadlines::default(),
            owner_key: None,
            cancel: Arc::default(),
            max_streams: MAX_STREAMS,
            ticket: Ticket([0; 16]),
        }
    }
}

/// What was received.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DestinationOutcome {
    /// The guest's identity, hexadecimal.
    pub vm_id: String,
    /// Names of the source's certificate.
    pub source: Vec<String>,
    /// Direct or through a gateway.
    pub path: PathKind,
    /// Rounds, the last included.
    pub rounds: u32,
    /// Pages received, zero pages included.
    pub pages: u64,
    /// Zero pages among them.
    pub zero_pages: u64,
    /// Bytes of frames in both directions, before TLS.
    pub wire_bytes: u64,
    /// Everything.
    pub total_ms: u64,
    /// From the end of the last round to the running guest.
    pub takeover_ms: f64,
    /// Root of the manifest that both ends hold, hexadecimal.
    pub manifest_root: String,
    /// What both ends compared.
    pub verified: Verification,
    /// The epoch that this side holds.
    pub epoch: u64,
    /// Whether the source was told; if not, it will ask.
    pub source_informed: bool,
}

/// What came of a connection.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub enum Received {
    /// The guest runs here.
    Moved(Box<DestinationOutcome>),
    /// The source only wanted to know; this host would take the guest. Nothing is left here.
    Assessed,
    /// The source asked who has a guest, and was answered.
    Settled(Settlement),
}

/// A migration that this side refused or lost; nothing is left of it here.
#[derive(Debug, thiserror::Error)]
pub enum DestinationError {
    /// TLS.
    #[error("accepting the source: {0}")]
    Connect(#[source] TlsError),
    /// The agreement.
    #[error("agreeing with the source: {0}")]
    Agree(#[source] SessionError),
    /// The further connections.
    #[error("joining the session: {0}")]
    Join(#[source] JoinError),
    /// The stream, or the source's abort.
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
    /// A page is refused.
    #[error(transparent)]
    Page(#[from] OpenError),
    /// A page outside the offered memory, or twice.
    #[error(transparent)]
    Transcript(#[from] TranscriptError),
    /// The end of a round and its pages differ.
    #[error("the end of round {round} names {named} pages, {received} were received")]
    Incomplete {
        /// The round.
        round: u32,
        /// What it named.
        named: u64,
        /// What came.
        received: u64,
    },
    /// The end of another round than the current one.
    #[error("the end of round {got} came in round {current}")]
    Round {
        /// What it named.
        got: u32,
        /// Where the stream is.
        current: u32,
    },
    /// The state is too large or its pieces do not join.
    #[error("the machine state exceeds {MAX_STATE} bytes, or its pieces do not join")]
    State,
    /// The ends do not hold the same.
    #[error("the manifest differs from what was received: ours {ours:?}, theirs {theirs:?}")]
    Manifest {
        /// What this end holds.
        ours: Box<Manifest>,
        /// What the source says.
        theirs: Box<Manifest>,
    },
    /// The commit names another epoch.
    #[error("the commit names epoch {got}, {due} was due")]
    Epoch {
        /// What it names.
        got: u64,
        /// What was due.
        due: u64,
    },
    /// The guest could not be run after the commit; the source runs it.
    #[error("the guest could not be activated: {0}; it stays with the source")]
    Activate(#[source] GuestError),
    /// Only a guest was wanted here.
    #[error("the source only asks; no guest came")]
    OnlyAsked,
    /// The operator cancelled.
    #[error("cancelled")]
    Cancelled,
}

impl DestinationError {
    /// Whether the peer gave up (and needs not be told).
    pub fn by_peer(&self) -> bool {
        match self {
            DestinationError::Agree(error) => error.by_peer(),
            DestinationError::Stream { error, .. } => error.by_peer(),
            _ => false,
        }
    }

    /// The stable code; that of the source where it gave up.
    pub fn code(&self) -> &str {
        match self {
            DestinationError::Connect(error) => error.code().as_str(),
            DestinationError::Agree(error) => error.code(),
            DestinationError::Join(error) => error.code(),
            DestinationError::Stream { error, .. } => error.code(),
            DestinationError::Guest { .. } => Code::GuestFailed.as_str(),
            DestinationError::Page(error) => error.code().as_str(),
            DestinationError::Transcript(error) => error.code().as_str(),
            DestinationError::Incomplete { .. } => Code::PageMissing.as_str(),
            DestinationError::Round { .. } => Code::RoundMismatch.as_str(),
            DestinationError::State => Code::StateTooLarge.as_str(),
            DestinationError::Manifest { .. } => Code::ManifestMismatch.as_str(),
            DestinationError::Epoch { .. } => Code::SessionMismatch.as_str(),
            DestinationError::Activate(_) => Code::ActivationFailed.as_str(),
            DestinationError::OnlyAsked => Code::OfferInvalid.as_str(),
            DestinationError::Cancelled => Code::Cancelled.as_str(),
        }
    }
}

/// Receives one guest over one connection; an assessment or a question is an error.
pub fn receive<T: Transport>(
    transport: T,
    config: &DestinationConfig,
    guest: &mut dyn DestinationGuest,
    progress: &mut dyn FnMut(Progress),
) -> Result<DestinationOutcome, DestinationError> {
    match serve(transport, config, guest, progress)? {
        Received::Moved(outcome) => Ok(*outcome),
        Received::Assessed | Received::Settled(_) => Err(DestinationError::OnlyAsked),
    }
}

/// The next further connection, its preamble read: waits so long for it, and no longer.
pub type Arrive<'a, T> = dyn FnMut(Duration) -> std::io::Result<Option<T>> + 'a;

/// Receives one guest over one connection, or says only whether it would, or whether it has. On any error the guest does not
/// run here and nothing is left.
pub fn serve<T: Transport>(
    transport: T,
    config: &DestinationConfig,
    guest: &mut dyn DestinationGuest,
    progress: &mut dyn FnMut(Progress),
) -> Result<Received, DestinationError> {
    let mut none = |_| Ok(None);
    take_in(transport, &mut none, 1, config, guest, progress)
}

/// The same over as many connections as the source asks for and the configuration allows; `arrive` gives the further ones.
pub fn serve_over<T: Transport>(
    transport: T,
    arrive: &mut Arrive<'_, T>,
    config: &DestinationConfig,
    guest: &mut dyn DestinationGuest,
    progress: &mut dyn FnMut(Progress),
) -> Result<Received, DestinationError> {
    let most = config.max_streams;
    take_in(transport, arrive, most, config, guest, progress)
}

fn take_in<T: Transport>(
    transport: T,
    arrive: &mut Arrive<'_, T>,
    max_streams: u16,
    config: &DestinationConfig,
    guest: &mut dyn DestinationGuest,
    progress: &mut dyn FnMut(Progress),
) -> Result<Received, DestinationError> {
    let started = Instant::now();
    progress(Progress::new(Phase::Connect, started));
    let tls = tls::accept(transport, &config.local, config.deadlines.connect)
        .map_err(DestinationError::Connect)?;
    let mut channel = Channel::new(tls, config.deadlines.frame, cancelled(config));
    // Closed last: what the first connection says explains why.
    let mut further = Vec::new();
    let mut arrival = Arrival {
        channel: &mut channel,
        further: &mut further,
        max_streams,
        config,
        started,
        admitted: false,
    };
    let received = arrival.run(arrive, guest, progress);
    let admitted = arrival.admitted;
    match received {
        Ok(received) => {
            if received == Received::Assessed {
                guest.abandon();
            }
            channel.close(config.deadlines.frame.min(CLOSE_TIME));
            Ok(received)
        }
        Err(error) => {
            let error = plain_cause(error);
            if admitted {
                guest.abandon(); // before the source is told: it may resume the guest at once
            }
            let agreed = !matches!(error, DestinationError::Agree(_));
            let kind = if agreed {
                FrameKind::Abort
            } else {
                FrameKind::Refuse
            };
            channel.give_up(kind, error.by_peer(), error.code(), &error.to_string());
            Err(error)
        }
    }
}

/// Phase `Assess`: a small probe and a series of large ones; then the source ends the connection, or measures on alone.
fn answer_probes<T: Transport>(
    channel: &mut Channel<T>,
    config: &DestinationConfig,
) -> Result<(), DestinationError> {
    for _ in 0..PROBE_SERIES {
        let mut bytes = 0;
        loop {
            let deadline = Instant::now() + config.deadlines.frame;
            let probe: Probe = channel
                .receive_message("Probe", deadline)
                .map_err(on(Phase::Assess))?;
            bytes += probe.bytes.len() as u64;
            if probe.last {
                break;
            }
            if bytes > MAX_PROBES || probe.bytes.is_empty() {
                return Err(wire(Phase::Assess)(WireError::Malformed(
                    "probes without end",
                )));
            }
        }
        channel
            .send(&ProbeAck { bytes })
            .map_err(on(Phase::Assess))?;
    }
    Ok(())
}

/// The running stream: phases `Rounds` to `Running`.
struct Receiver<'a, T> {
    first: Lane<'a, T>,
    further: Vec<Lane<'a, T>>,
    config: &'a DestinationConfig,
    guest: &'a mut dyn DestinationGuest,
    progress: &'a mut dyn FnMut(Progress),
    started: Instant,
    peer: PeerIdentity,
    path: PathKind,
    offer: GuestOffer,
    offer_hash: [u8; 32],
    table: PageTable,
    round_pages: u64,
    pages: u64,
    zero_pages: u64,
}

impl<T: Transport> Receiver<'_, T> {
    fn receive(mut self) -> Result<DestinationOutcome, DestinationError> {
        self.report(Phase::Rounds);
        self.receive_rounds()?;
        let last_page = Instant::now();
        self.report(Phase::Final);
        let (state, theirs) = self.receive_state()?;
        self.report(Phase::Manifest);
        let (manifest, root) = self.verify(&state, theirs)?;
        self.report(Phase::Commit);
        let epoch = self.await_commit()?;
        let announced = self
            .guest
            .activate(epoch)
            .map_err(DestinationError::Activate)?;
        // From here on this side owns the guest, whether or not the source hears of it.
        let takeover = last_page.elapsed();
        let told = self.first.channel.send(&Running { epoch, announced });
        if let Err(error) = &told {
            tracing::warn!(%error, epoch, "the guest runs here; the source could not be told and will ask");
        }
        self.report(Phase::Running);
        Ok(DestinationOutcome {
            vm_id: hex::encode(self.offer.vm_id),
            source: std::mem::take(&mut self.peer.san),
            path: self.path,
            rounds: self.first.round(),
            pages: self.pages,
            zero_pages: self.zero_pages,
            wire_bytes: self.bytes(),
            total_ms: millis(self.started.elapsed()),
            takeover_ms: takeover.as_secs_f64() * 1e3,
            manifest_root: hex::encode(root),
            verified: Verification::of(&manifest, announced),
            epoch,
            source_informed: told.is_ok(),
        })
    }

    /// Phase `Rounds`, up to the end of the last round.
    fn receive_rounds(&mut self) -> Result<(), DestinationError> {
        loop {
            self.check_cancelled()?;
            let end = match self.further.is_empty() {
                true => self.receive_round()?,
                false => self.gather_round()?,
            };
            self.end_round(end)?;
            if end.last {
                return Ok(());
            }
        }
    }

    /// A round over the only connection.
    fn receive_round(&mut self) -> Result<RoundEnd, DestinationError> {
        loop {
            self.check_cancelled()?;
            let deadline = Instant::now() + self.config.deadlines.frame;
            let Self {
                first,
                guest,
                table,
                round_pages,
                zero_pages,
                ..
            } = self;
            let received = first.channel.receive(deadline);
            match received.map_err(on(Phase::Rounds))? {
                (FrameKind::PageBatch, payload) => {
                    let length = payload.len();
                    let mut buffer = first.channel.swap_inbox(Vec::new());
                    let payload = buffer.get_mut(..length).unwrap_or_default();
                    open_and_place(first, payload, *guest, table, round_pages, zero_pages)?;
                    first.channel.swap_inbox(buffer);
                }
                (FrameKind::RoundEnd, payload) => {
                    let end = RoundEnd::decode(payload).map_err(wire(Phase::Rounds))?;
                    return first.check_end(end).map(|()| end);
                }
                (got, _) => return Err(unexpected(Phase::Rounds, got, "PageBatch or RoundEnd")),
            }
        }
    }

    /// The round has ended on every connection.
    fn end_round(&mut self, end: RoundEnd) -> Result<(), DestinationError> {
        self.guest.flush().map_err(at(Phase::Rounds))?;
        self.pages += end.pages;
        let last = end.last;
        self.report(if last { Phase::Final } else { Phase::Rounds });
        self.round_pages = 0;
        if !last {
            for lane in once(&mut self.first).chain(&mut self.further) {
                lane.next_round();
            }
            self.first
                .channel
                .send(&RoundAck {
                    round: end.round,
                    pages: end.pages,
                })
                .map_err(on(Phase::Rounds))?;
        }
        Ok(())
    }

    /// Phase `Final`: the state, then the manifest.
    fn receive_state(&mut self) -> Result<(Vec<u8>, Manifest), DestinationError> {
        let mut state: Vec<u8> = Vec::new();
        let mut total = None;
        loop {
            let deadline = Instant::now() + self.config.deadlines.finish;
            match self
                .first
                .channel
                .receive(deadline)
                .map_err(on(Phase::Final))?
            {
                (FrameKind::State, payload) => {
                    let piece = State::decode(payload).map_err(wire(Phase::Final))?;
                    let size = usize::try_from(piece.total).unwrap_or(usize::MAX);
                    let joins =
                        usize::try_from(piece.offset) == Ok(state.len()) && !piece.bytes.is_empty();
                    let fits =
                        state.len().saturating_add(piece.bytes.len()) <= size && size <= MAX_STATE;
                    if !joins || !fits || *total.get_or_insert(size) != size {
                        return Err(DestinationError::State);
                    }
                    state.extend_from_slice(&piece.bytes);
                }
                (FrameKind::Manifest, payload) => {
                    let manifest = Manifest::decode(payload).map_err(wire(Phase::Manifest))?;
                    if state.len() != total.unwrap_or(0) {
                        return Err(DestinationError::State);
                    }
                    return Ok((state, manifest));
                }
                (got, _) => return Err(unexpected(Phase::Final, got, "State or Manifest")),
            }
        }
    }

    /// Phase `Manifest`: equality first, then the state is restored, then the source is told.
    fn verify(
        &mut self,
        state: &[u8],
        theirs: Manifest,
    ) -> Result<(Manifest, [u8; 48]), DestinationError> {
        let phase = Phase::Manifest;
        let content_sha256 = match theirs.content_sha256 {
            Some(_) => Some(
                self.guest
                    .content_digest(self.table.present())
                    .map_err(at(phase))?,
            ),
            None => None,
        };
        let end = StreamEnd {
            rounds: self.first.round(),
            epoch: self.offer.epoch,
            content_sha256,
        };
        let logs = once(&self.first).chain(&self.further).map(|lane| &lane.log);
        let ours = self.table.manifest(logs, end, state, self.offer_hash);
        if ours != theirs {
            return Err(DestinationError::Manifest {
                ours: Box::new(ours),
                theirs: Box::new(theirs),
            });
        }
        self.guest.restore(state).map_err(at(phase))?;
        self.check_cancelled()?;
        let root = ours.root().map_err(wire(phase))?;
        let mut halves = root.as_chunks::<24>().0.iter().copied();
        let (root_hi, root_lo) = (
            halves.next().unwrap_or_default(),
            halves.next().unwrap_or_default(),
        );
        self.first
            .channel
            .send(&Verified { root_hi, root_lo })
            .map_err(on(phase))?;
        Ok((ours, root))
    }

    fn await_commit(&mut self) -> Result<u64, DestinationError> {
        let deadline = Instant::now() + self.config.deadlines.finish;
        let commit: Commit = self
            .first
            .channel
            .receive_message("Commit", deadline)
            .map_err(on(Phase::Commit))?;
        let due = self.offer.epoch.saturating_add(1);
        if commit.epoch != due {
            return Err(DestinationError::Epoch {
                got: commit.epoch,
                due,
            });
        }
        self.first.channel.ignore_cancel();
        Ok(due)
    }

    /// Bytes of frames in both directions, before TLS, over all connections.
    fn bytes(&self) -> u64 {
        let lanes = once(&self.first).chain(&self.further);
        lanes.map(|lane| lane.channel.bytes()).sum()
    }

    fn check_cancelled(&self) -> Result<(), DestinationError> {
        if self.config.cancel.load(Ordering::Relaxed) {
            Err(DestinationError::Cancelled)
        } else {
            Ok(())
        }
    }

    fn report(&mut self, phase: Phase) {
        let bytes = self.bytes();
        (self.progress)(Progress {
            round: self.first.round(),
            pages: self.round_pages,
            zero_pages: self.zero_pages,
            bytes,
            ..Progress::new(phase, self.started)
        });
    }
}

/// A small probe for the round trip, and those for the throughput.
const PROBE_SERIES: usize = 2;
/// More than any source of ours sends, in bytes.
const MAX_PROBES: u64 = 128 << 20;
const CLOSE_TIME: Duration = Duration::from_secs(1);

/// Opens a batch of the only connection and places its pages; stops at the first that is refused.
fn open_and_place<T: Transport>(
    first: &mut Lane<'_, T>,
    payload: &mut [u8],
    guest: &mut dyn DestinationGuest,
    table: &mut PageTable,
    round_pages: &mut u64,
    zero_pages: &mut u64,
) -> Result<(), DestinationError> {
    let mut entries = Entries::parse(payload).map_err(OpenError::from)?;
    while let Some(page) = first.open_next(&mut entries)? {
        table.record(&page.header)?;
        place(&page.header, page.content, guest, round_pages, zero_pages)?;
    }
    Ok(())
}

/// Hands verified pages to the guest.
fn place(
    header: &EntryHeader,
    content: PageContent<'_>,
    guest: &mut dyn DestinationGuest,
    round_pages: &mut u64,
    zero_pages: &mut u64,
) -> Result<(), DestinationError> {
    let count = u64::from(header.count);
    // Data says by its length how many pages it is; of zeroes there is but a count.
    let calls = match header.kind {
        PageKind::Zero => count,
        PageKind::Data | PageKind::Firmware => 1,
    };
    for step in 0..calls {
        guest
            .write_pages(Gpn(header.page + step), content)
            .map_err(at(Phase::Rounds))?;
    }
    *round_pages += count;
    if header.kind == PageKind::Zero {
        *zero_pages += count;
    }
    Ok(())
}

fn plain_cause(error: DestinationError) -> DestinationError {
    match error {
        DestinationError::Stream {
            error: ChannelError::Tls(TlsError::Cancelled),
            ..
        }
        | DestinationError::Agree(SessionError::Channel(ChannelError::Tls(TlsError::Cancelled))) => {
            DestinationError::Cancelled
        }
        error => error,
    }
}

fn unexpected(phase: Phase, got: FrameKind, wanted: &'static str) -> DestinationError {
    DestinationError::Stream {
        phase,
        error: ChannelError::Unexpected { got, wanted },
    }
}

fn at(phase: Phase) -> impl Fn(GuestError) -> DestinationError {
    move |error| DestinationError::Guest { phase, error }
}

fn on(phase: Phase) -> impl Fn(ChannelError) -> DestinationError {
    move |error| DestinationError::Stream { phase, error }
}

fn wire(phase: Phase) -> impl Fn(WireError) -> DestinationError {
    move |error| DestinationError::Stream {
        phase,
        error: error.into(),
    }
}
