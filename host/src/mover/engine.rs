//! Runs the migration engine over a socket, a VMM and the agent, and says how it ended.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use casemate_crypto_migrate::Provider;
use casemate_crypto_migrate::destination::{
    DestinationConfig, DestinationOutcome, Received, serve_over,
};
use casemate_crypto_migrate::guest::{GuestOffer, SourceGuest};
use casemate_crypto_migrate::identity::Local;
use casemate_crypto_migrate::identity::{
    AllowList, AllowedPeer, HostIdentity, IdentityError, Path, Pinned, TrustAnchors,
};
use casemate_crypto_migrate::preamble::Ticket;
use casemate_crypto_migrate::progress::Progress;
use casemate_crypto_migrate::source::{
    Assessment, SourceConfig, SourceError, SourceOutcome, Verification, assess, migrate_over,
};
use casemate_crypto_migrate::tls::Transport;
use serde::Serialize;

use crate::confidential::shared::Access;
use crate::ipc::Channel;
use crate::mover::agent_link::{AgentLink, AgentSigner};
use crate::mover::destination::DestinationMachine;
use crate::mover::disks::{Disks, OfferedDisk};
use crate::mover::protocol::{
    AssessReport, Credentials, DestinationStart, GuestHere, MoveLimits, MoveOutcome, MoveProgress,
    MoveReport, MoveVerification, MoverEvent, PeerEntry, PinnedName, SourceStart,
};
use crate::mover::source::SourceMachine;
use crate::mover::vmm_link::VmmLink;
use crate::vmm::protocol::RoleError;

/// Moves a guest away. Descriptors: the VMM's channel, the connected socket.
pub fn run_source(
    agent: &Arc<AgentLink>,
    start: SourceStart,
    handles: Vec<OwnedFd>,
) -> MoveOutcome {
    with_source(
        agent,
        start,
        handles,
        |socket, config, offer, guest, progress| {
            let mut dial = |ticket: &Ticket| {
                let socket = agent.dial(ticket).map_err(io::Error::other)?;
                Ok(WatchedSocket::new(socket, agent.clone()))
            };
            let moved = migrate_over(socket, &mut dial, config, offer, guest, progress)?;
            Ok(MoveOutcome::Moved(source_report(moved)))
        },
    )
}

/// Finds out how a guest could move away. Descriptors as for [`run_source`].
pub fn run_assessment(
    agent: &Arc<AgentLink>,
    start: SourceStart,
    handles: Vec<OwnedFd>,
) -> MoveOutcome {
    with_source(
        agent,
        start,
        handles,
        |socket, config, offer, guest, progress| {
            let assessed = assess(socket, config, offer, guest, progress)?;
            Ok(MoveOutcome::Assessed(assess_report(assessed)))
        },
    )
}

fn with_source(
    agent: &Arc<AgentLink>,
    start: SourceStart,
    handles: Vec<OwnedFd>,
    run: impl FnOnce(
        WatchedSocket,
        &SourceConfig,
        &GuestOffer,
        &mut SourceMachine,
        &mut dyn FnMut(Progress),
    ) -> Result<MoveOutcome, SourceError>,
) -> MoveOutcome {
    let (mut machine, config, socket) = match prepare_source(agent, &start, handles) {
        Ok(prepared) => prepared,
        Err(error) => return failed(error, GuestHere::Runs),
    };
    let offer = offer_of(start, &machine);
    let mut progress = |event| agent.tell(MoverEvent::Progress(translate(event)));
    run(socket, &config, &offer, &mut machine, &mut progress).unwrap_or_else(|error| {
        let guest = guest_here(&error);
        failed(RoleError::new(error.code(), &error), guest)
    })
}

fn offer_of(start: SourceStart, machine: &SourceMachine) -> GuestOffer {
    GuestOffer {
        vm_id: start.vm_id,
        name: start.name,
        epoch: start.epoch,
        memory: machine.memory(),
        description: start.description,
    }
}

/// Takes a guest in. Descriptor: the accepted socket.
pub fn run_destination(
    agent: &Arc<AgentLink>,
    start: DestinationStart,
    handles: Vec<OwnedFd>,
) -> MoveOutcome {
    set_deadline(agent, start.limits);
    match prepare_destination(agent, &start, handles) {
        Err(error) => failed(error, GuestHere::Absent),
        Ok((config, socket)) => {
            let mut machine = DestinationMachine::new(agent.clone());
            let mut progress = |event| agent.tell(MoverEvent::Progress(translate(event)));
            let mut arrive = |wait| {
                let socket = agent.arrived(wait);
                Ok(socket.map(|socket| WatchedSocket::new(socket, agent.clone())))
            };
            match serve_over(socket, &mut arrive, &config, &mut machine, &mut progress) {
                Ok(Received::Moved(outcome)) => MoveOutcome::Moved(destination_report(*outcome)),
                Ok(Received::Settled(settlement)) => MoveOutcome::Settled(settlement),
                Ok(Received::Assessed) => MoveOutcome::Assessed(AssessReport::default()),
                Err(error) => failed(RoleError::new(error.code(), &error), GuestHere::Absent),
            }
        }
    }
}

fn prepare_source(
    agent: &Arc<AgentLink>,
    start: &SourceStart,
    mut handles: Vec<OwnedFd>,
) -> Result<(SourceMachine, SourceConfig, WatchedSocket), RoleError> {
    let images = handles.split_off(handles.len().min(2));
    let [vmm, socket] = take(handles)?;
    let offered = start.disks.iter();
    let offered = offered.map(|(disk, pages)| OfferedDisk {
        disk: *disk,
        pages: *pages,
    });
    let disks = Disks::new(offered.collect(), images)?;
    let local = local(
        agent,
        &start.credentials,
        std::slice::from_ref(&start.peer),
        start.provider.as_deref(),
    )?;
    let mut config = SourceConfig::new(local, &start.peer.name);
    if start.limits.downtime_ms > 0 {
        config.limits.downtime = Duration::from_millis(start.limits.downtime_ms);
    }
    if start.limits.max_rounds > 0 {
        config.limits.max_rounds = start.limits.max_rounds;
    }
    if start.limits.deadline_ms > 0 {
        config.limits.total = Some(Duration::from_millis(start.limits.deadline_ms));
    }
    if start.limits.unthrottled {
        config.limits.throttle = 0;
    }
    config.read_back = start.limits.read_back;
    config.streams = start.limits.streams.max(1);
    config.cancel = agent.cancel_flag();
    config.controls = agent.controls();
    config.controls.set_bandwidth(start.limits.bandwidth);
    let vmm = VmmLink::attach(Channel::from_fd(vmm), Access::ReadOnly)?;
    let machine = SourceMachine::new(vmm, agent.clone(), start.emulated_roots.clone(), disks);
    Ok((machine, config, WatchedSocket::new(socket, agent.clone())))
}

fn prepare_destination(
    agent: &Arc<AgentLink>,
    start: &DestinationStart,
    handles: Vec<OwnedFd>,
) -> Result<(DestinationConfig, WatchedSocket), RoleError> {
    let [socket] = take(handles)?;
    let mut config = DestinationConfig::new(local(
        agent,
        &start.credentials,
        &start.peers,
        start.provider.as_deref(),
    )?);
    config.cancel = agent.cancel_flag();
    config.ticket = start.ticket;
    Ok((config, WatchedSocket::new(socket, agent.clone())))
}

pub(super) fn take<const N: usize>(handles: Vec<OwnedFd>) -> Result<[OwnedFd; N], RoleError> {
    let found = handles.len();
    handles.try_into().map_err(|_| {
        RoleError::new(
            "ROLE_PROTOCOL",
            format!("{found} descriptors beside the start, {N} were due"),
        )
    })
}

pub(super) fn local(
    agent: &Arc<AgentLink>,
    credentials: &Credentials,
    peers: &[PeerEntry],
    provider: Option<&str>,
) -> Result<Local, RoleError> {
    let provider = match provider {
        None => Provider::default(),
        Some(name) => name
            .parse()
            .map_err(|e: String| RoleError::new("PROVIDER_UNAVAILABLE", e))?,
    };
    let refuse = |error: IdentityError| RoleError::new(error.code().as_str(), &error);
    let signer = Arc::new(AgentSigner(agent.clone()));
    Ok(Local {
        identity: HostIdentity::from_pem(&credentials.chain_pem, signer).map_err(refuse)?,
        anchors: TrustAnchors::from_pem(&credentials.authority_pem).map_err(refuse)?,
        allow: AllowList::new(peers.iter().map(allowed).collect()),
        provider,
    })
}

fn allowed(peer: &PeerEntry) -> AllowedPeer {
    let pinned = |name: &PinnedName| Pinned {
        san: name.san.clone(),
        spki_sha256: name.spki_sha256,
    };
    AllowedPeer {
        name: peer.name.clone(),
        identity: pinned(&peer.identity),
        path: peer
            .gateway
            .as_ref()
            .map_or(Path::Direct, |gateway| Path::Gateway(pinned(gateway))),
    }
}

fn set_deadline(agent: &AgentLink, limits: MoveLimits) {
    let whole = Duration::from_millis(limits.deadline_ms);
    if let Some(deadline) = Instant::now().checked_add(whole)
        && !whole.is_zero()
    {
        agent.set_deadline(deadline);
    }
}

fn guest_here(error: &SourceError) -> GuestHere {
    match error {
        SourceError::Resume { .. } => GuestHere::Stopped,
        SourceError::InDoubt { .. } => GuestHere::InDoubt,
        SourceError::Destroy(_) => GuestHere::Elsewhere,
        _ => GuestHere::Runs,
    }
}

pub(super) fn failed(error: RoleError, guest: GuestHere) -> MoveOutcome {
    MoveOutcome::Failed {
        code: error.code,
        reason: error.text,
        guest,
    }
}

pub(super) fn translate(progress: Progress) -> MoveProgress {
    MoveProgress {
        phase: progress.phase.as_str().to_owned(),
        round: progress.round,
        pages: progress.pages,
        pages_total: progress.pages_total,
        zero_pages: progress.zero_pages,
        bytes: progress.bytes,
        dirty_pages: progress.dirty_pages,
        dirty_rate: progress.dirty_rate,
        throughput: progress.throughput,
        estimated_downtime_ms: progress.estimated_downtime_ms,
        throttle_percent: progress.throttle_percent,
        elapsed_ms: progress.elapsed_ms,
    }
}

fn source_report(outcome: SourceOutcome) -> MoveReport {
    MoveReport {
        rounds: outcome.rounds,
        pages: outcome.pages,
        zero_pages: outcome.zero_pages,
        firmware_pages: outcome.firmware_pages,
        bytes: outcome.wire_bytes,
        downtime_ms: outcome.downtime_ms,
        estimated_downtime_ms: outcome.estimated_downtime_ms,
        forecast_error_ms: outcome.forecast_error_ms,
        throttle_percent: outcome.throttle_percent,
        verified: verification(outcome.verified),
        total_ms: outcome.total_ms,
        throughput: outcome.throughput,
        convergence: word(&outcome.convergence),
        path: word(&outcome.path),
        tls_suite: outcome.tls_suite,
        manifest_root: outcome.manifest_root,
        epoch: outcome.epoch,
        source_informed: true,
    }
}

fn destination_report(outcome: DestinationOutcome) -> MoveReport {
    MoveReport {
        rounds: outcome.rounds,
        pages: outcome.pages,
        zero_pages: outcome.zero_pages,
        bytes: outcome.wire_bytes,
        downtime_ms: outcome.takeover_ms,
        total_ms: outcome.total_ms,
        path: word(&outcome.path),
        verified: verification(outcome.verified),
        manifest_root: outcome.manifest_root,
        epoch: outcome.epoch,
        source_informed: outcome.source_informed,
        ..MoveReport::default()
    }
}

fn verification(verified: Verification) -> MoveVerification {
    MoveVerification {
        pages: verified.pages,
        seals_sha256: verified.seals_sha256,
        state_sha256: verified.state_sha256,
        content_sha256: verified.content_sha256,
        announced: verified.announced,
        streams: verified.streams,
    }
}

fn assess_report(assessment: Assessment) -> AssessReport {
    let (measured, forecast) = (assessment.measured, assessment.forecast);
    AssessReport {
        memory_pages: assessment.memory_pages,
        pages: measured.pages,
        dirty_rate: measured.dirty_rate,
        throughput: measured.throughput,
        round_trip_ms: measured.round_trip.as_secs_f64() * 1e3,
        rounds: forecast.rounds,
        total_ms: forecast.total_ms,
        downtime_ms: forecast.downtime_ms,
        convergence: word(&forecast.convergence),
        throttle_percent: forecast.throttle_percent,
        path: word(&assessment.path),
        tls_suite: assessment.tls_suite,
        streams: assessment.streams,
    }
}

/// The engine's own word for a value.
fn word(value: &impl Serialize) -> String {
    let value = serde_json::to_value(value).unwrap_or_default();
    value.as_str().unwrap_or_default().to_lowercase()
}

/// The peer's socket. While the engine waits for the peer, the agent is listened to.
pub(super) struct WatchedSocket {
    stream: TcpStream,
    agent: Arc<AgentLink>,
}

impl WatchedSocket {
    pub(super) fn new(socket: OwnedFd, agent: Arc<AgentLink>) -> Self {
        let stream = TcpStream::from(socket);
        // The engine writes whole frames; where this is refused (no TCP), it is not needed.
        let _ = stream.set_nodelay(true);
        Self { stream, agent }
    }
}

impl Read for WatchedSocket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let result = self.stream.read(buffer);
        if let Err(error) = &result
            && matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
        {
            self.agent.poll();
        }
        result
    }
}

impl Write for WatchedSocket {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.stream.write(buffer)
    }

    fn write_vectored(&mut self, buffers: &[io::IoSlice<'_>]) -> io::Result<usize> {
        self.stream.write_vectored(buffers)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

impl Transport for WatchedSocket {
    fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.stream.set_read_timeout(timeout)
    }

    fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.stream.set_write_timeout(timeout)
    }

    fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        self.stream.set_nonblocking(nonblocking)
    }

    fn close(&self) -> io::Result<()> {
        self.stream.shutdown(std::net::Shutdown::Both)
    }
}
