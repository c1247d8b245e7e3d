//! What the agent and a mover say to each other.
//!
//! The mover holds the session keys and reads what the peer sends; the agent believes it nothing about policy
//! or identity: the host's key, the decision to admit, and the record of who owns the guest stay in the agent.

use serde::{Deserialize, Serialize};

use casemate_crypto_migrate::guest::GuestOffer;
use casemate_crypto_migrate::identity::PeerIdentity;
use casemate_crypto_migrate::preamble::Ticket;
use casemate_crypto_migrate::session::SessionFacts;
use casemate_crypto_migrate::settlement::Settlement;
use casemate_crypto_migrate::transcript::StreamCount;

use crate::sandbox::report::{ProbeReport, SandboxReport};
use crate::vmm::protocol::RoleError;

/// Agent to mover.
#[derive(Debug, Serialize, Deserialize)]
pub enum MoverCommand {
    /// Moves a guest away. Descriptors beside it: the VMM's mover channel, the connected socket, then the images of the
    /// disks that move along, in their order, for reading.
    Source(Box<SourceStart>),
    /// Finds out whether and how a guest could move away, and moves nothing. Descriptors as for [`MoverCommand::Source`].
    Assess(Box<SourceStart>),
    /// Asks the peer who has a guest whose commit it did not answer. Descriptor beside it: the connected socket.
    Settle(Box<SettleStart>),
    /// Takes a guest in. Descriptor beside it: the accepted socket.
    Destination(Box<DestinationStart>),
    /// Writes a guest to a sealed file. Descriptors beside it: the VMM's mover channel, the empty file.
    Snapshot(Box<SnapshotStart>),
    /// Makes a guest from a sealed file. Descriptor beside it: the file, for reading.
    Restore(RestoreStart),
    /// The answer to the oldest [`MoverRequestToAgent`] without one.
    Answer(Result<AgentAnswer, RoleError>),
    /// Give up, if it is not too late; honoured between batches.
    Cancel,
    /// Pause the guest and switch now, whatever is left to send.
    Proceed,
    /// Keep within this many bytes a second; 0 lifts the limit.
    Bandwidth(u64),
    /// Destination: a further connection named this move's ticket. Descriptor beside it: the accepted socket, its preamble
    /// read.
    Further,
    /// State of the sandbox.
    SandboxReport,
    /// Tries from inside what must be refused.
    SandboxProbe,
}

/// Mover to agent.
#[derive(Debug, Serialize, Deserialize)]
pub enum MoverMessage {
    /// Wants an answer before it goes on.
    Request(MoverRequestToAgent),
    /// Something happened.
    Event(MoverEvent),
    /// State of the sandbox.
    SandboxReport(Result<SandboxReport, RoleError>),
    /// Result of the probe.
    SandboxProbe(Result<ProbeReport, RoleError>),
}

/// What the mover may not do itself.
#[derive(Debug, Serialize, Deserialize)]
pub enum MoverRequestToAgent {
    /// Sign with the host's key. The agent signs only TLS 1.3 CertificateVerify inputs and session transcripts.
    Sign {
        /// What to sign.
        #[serde(with = "serde_bytes")]
        message: Vec<u8>,
    },
    /// May the move go on over the session that both ends agreed on? No page has travelled.
    Session(Box<SessionText>),
    /// Destination: may this guest come in, from this peer?
    Admit {
        /// The offer, parsed and bounded.
        offer: Box<GuestOffer>,
        /// The verified peer.
        peer: PeerName,
    },
    /// A step of ownership, to be durable before the answer.
    Record(OwnershipStep),
    /// Source: a further connection to the peer, its preamble written.
    Dial {
        /// As the peer named it.
        ticket: Ticket,
    },
    /// Destination: the peer asks who has the guest that it had under the question's epoch.
    Settle {
        /// As it was signed.
        question: Box<GuestOffer>,
        /// Who asks.
        peer: PeerName,
    },
    /// Snapshot: the guest stands still; what shall be kept of its description, and how its disks are now?
    DescribeSnapshot,
    /// Restore: the secret of the snapshot that the file claims to be.
    SnapshotKey(SnapshotClaim),
    /// Restore: may this guest, whose description has opened, run here?
    AdmitSnapshot {
        /// As the agent wrote it.
        #[serde(with = "serde_bytes")]
        description: Vec<u8>,
    },
}

/// A step in who owns the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum OwnershipStep {
    /// Source: about to give the guest up; from here on only an answer of the destination, or a resume, decides.
    Releasing,
    /// Source: the guest runs here again after a failure.
    Resumed,
    /// Source: the destination runs the guest; destroy it here.
    Departed,
    /// Destination: about to run the guest as owner of this epoch.
    Activating {
        /// The new epoch.
        epoch: u64,
    },
}

/// The agent's answer.
#[derive(Debug, Serialize, Deserialize)]
pub enum AgentAnswer {
    /// The signature.
    Signed {
        /// ECDSA P-256 with SHA-256, ASN.1.
        #[serde(with = "serde_bytes")]
        signature: Vec<u8>,
    },
    /// Come in. Descriptors beside it: the new VMM's mover channel, then the images of the disks that the offer brings, in
    /// their order, new and empty.
    Admitted,
    /// Not here.
    Refused {
        /// Stable code.
        code: String,
        /// For people.
        reason: String,
    },
    /// Durable.
    Recorded,
    /// Descriptor beside it: the connected socket.
    Dialed,
    /// Who has the guest; for the peer.
    Settled(Settlement),
    /// What a snapshot keeps of the guest's description.
    Description {
        /// For the agent that restores it.
        #[serde(with = "serde_bytes")]
        description: Vec<u8>,
    },
    /// The secret of one snapshot.
    SnapshotKey {
        /// 32 bytes.
        #[serde(with = "serde_bytes")]
        secret: Vec<u8>,
    },
}

/// What a file says of itself before any seal has opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotClaim {
    /// Its id.
    pub snapshot_id: [u8; 16],
    /// The guest's identity.
    pub vm_id: [u8; 16],
    /// Its generation.
    pub generation: u64,
}

/// Start of a snapshot.
#[derive(Serialize, Deserialize)]
pub struct SnapshotStart {
    /// Its id.
    pub snapshot_id: [u8; 16],
    /// Its generation.
    pub generation: u64,
    /// Its secret, 32 bytes; good for it alone.
    #[serde(with = "serde_bytes")]
    pub secret: Vec<u8>,
    /// Whether the guest stays stopped afterwards.
    pub stop: bool,
}

impl std::fmt::Debug for SnapshotStart {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SnapshotStart").finish_non_exhaustive()
    }
}

/// Start of a restore.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct RestoreStart {
    /// Whether the guest runs before its pages are there.
    pub on_demand: bool,
    /// Whether it becomes another guest than the one that the snapshot was taken of.
    pub copy: bool,
}

/// A verified peer, as the agent knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerName {
    /// Subject alternative names.
    pub san: Vec<String>,
    /// SHA-256 of the public key info.
    pub spki_sha256: [u8; 32],
}

impl PeerName {
    /// Of a verified identity.
    pub fn of(peer: &PeerIdentity) -> Self {
        Self {
            san: peer.san.clone(),
            spki_sha256: peer.spki_sha256,
        }
    }
}

/// An agreed session, as the mover saw it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionText {
    /// Who signed the agreement.
    pub peer: PeerName,
    /// Who terminates the TLS.
    pub tls: PeerName,
    /// `direct` or `gateway`.
    pub path: String,
    /// TLS cipher suite.
    pub suite: String,
    /// Key agreement group.
    pub group: String,
    /// Hash of the TLS exporter.
    pub exporter_sha256: [u8; 32],
    /// Who does the bulk cryptography at this end.
    pub provider: String,
}

impl SessionText {
    /// In the engine's words.
    pub fn of(facts: &SessionFacts) -> Self {
        Self {
            peer: PeerName::of(&facts.peer),
            tls: PeerName::of(&facts.tls_peer),
            path: format!("{:?}", facts.path).to_lowercase(),
            suite: facts.suite.clone(),
            group: facts.group.clone(),
            exporter_sha256: facts.exporter_sha256,
            provider: facts.provider.to_string(),
        }
    }
}

/// The host's certificates and whom it trusts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// Own chain, leaf first, PEM.
    pub chain_pem: String,
    /// The site authority's certificates, PEM.
    pub authority_pem: String,
}

/// One peer that policy allows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerEntry {
    /// Name in the policy.
    pub name: String,
    /// Certificate's name and key.
    pub identity: PinnedName,
    /// The gateway that terminates the TLS; `None` means that the peer does so itself.
    pub gateway: Option<PinnedName>,
}

/// A certificate name and the SHA-256 of its public key info.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PinnedName {
    /// Subject alternative name.
    pub san: String,
    /// SHA-256 of the public key info.
    pub spki_sha256: [u8; 32],
}

/// Bounds of one move, from policy; zero means the engine's default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoveLimits {
    /// The longest pause to aim for, in milliseconds.
    pub downtime_ms: u64,
    /// Pre-copy rounds before the guest is paused in any case.
    pub max_rounds: u32,
    /// The whole move, in milliseconds; a longer one is given up unless it is committed already. Zero: none.
    pub deadline_ms: u64,
    /// Bytes a second that the rounds may send; 0 for all there is.
    pub bandwidth: u64,
    /// Whether the guest may not be throttled.
    pub unthrottled: bool,
    /// Whether both ends read all memory anew, the guest paused, and compare it.
    pub read_back: bool,
    /// Connections to ask for; 0 as 1.
    pub streams: u16,
}

/// Start of a move away.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SourceStart {
    /// Own certificates.
    pub credentials: Credentials,
    /// Where to.
    pub peer: PeerEntry,
    /// The guest's name in the offer.
    pub name: String,
    /// The guest's identity.
    pub vm_id: [u8; 16],
    /// The epoch held here.
    pub epoch: u64,
    /// The machine's description, for the destination's agent.
    #[serde(with = "serde_bytes")]
    pub description: Vec<u8>,
    /// SHA-256 of emulated roots that policy trusts as targets; empty means AMD's roots only.
    pub emulated_roots: Vec<[u8; 32]>,
    /// Disks that move along: place in the plan, and size in pages.
    pub disks: Vec<(u8, u64)>,
    /// Who does the bulk cryptography, by name; `None`: the engine's default.
    pub provider: Option<String>,
    /// Bounds.
    pub limits: MoveLimits,
}

/// Start of a question.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SettleStart {
    /// Own certificates.
    pub credentials: Credentials,
    /// Who is asked.
    pub peer: PeerEntry,
    /// Who does the bulk cryptography, by name; `None`: the engine's default.
    pub provider: Option<String>,
    /// The guest's name in the offer.
    pub name: String,
    /// The guest's identity.
    pub vm_id: [u8; 16],
    /// The epoch that this host held before the commit.
    pub epoch: u64,
}

/// Start of a move in.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DestinationStart {
    /// Own certificates.
    pub credentials: Credentials,
    /// Who may come.
    pub peers: Vec<PeerEntry>,
    /// By what the agent knows further connections of this move.
    pub ticket: Ticket,
    /// Who does the bulk cryptography, by name; `None`: the engine's default.
    pub provider: Option<String>,
    /// Bounds.
    pub limits: MoveLimits,
}

/// What happens in a move. The last one is [`MoverEvent::Outcome`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MoverEvent {
    /// The cell is closed, nothing was read from the peer yet.
    Ready,
    /// The mover's channel to the VMM stands; for a SEV guest, what the target's chain said.
    TargetVerified {
        /// Whether the target is a software secure processor.
        emulated: bool,
        /// SHA-256 of the target's PDH certificate, hexadecimal.
        pdh: String,
        /// SHA-256 of what was verified, hexadecimal.
        evidence_sha256: String,
    },
    /// The target's evidence was refused; nothing travels.
    TargetRefused {
        /// Stable code.
        code: String,
        /// SHA-256 of what was refused, hexadecimal.
        evidence_sha256: String,
    },
    /// Progress.
    Progress(MoveProgress),
    /// A restored guest runs.
    Running {
        /// Since the start, in microseconds.
        after_us: u64,
    },
    /// A page that a running guest may need cannot be had: its VMM must end.
    PageLost {
        /// Why, as a stable code.
        code: String,
    },
    /// The end.
    Outcome(MoveOutcome),
}

/// Progress of a move: the engine's words.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MoveProgress {
    /// Phase: `connect`, `agree`, `assess`, `begin`, `rounds`, `final`, `manifest`, `commit`, `running`, `done`.
    pub phase: String,
    /// Round, from 1.
    pub round: u32,
    /// Pages of the round so far.
    pub pages: u64,
    /// Pages the round has; 0 if unknown.
    pub pages_total: u64,
    /// Zero pages among them.
    pub zero_pages: u64,
    /// Bytes on the wire since the start.
    pub bytes: u64,
    /// Dirty again at the end of the round.
    pub dirty_pages: u64,
    /// Pages dirtied per second.
    pub dirty_rate: f64,
    /// Bytes per second.
    pub throughput: f64,
    /// Pause to be expected now, in milliseconds.
    pub estimated_downtime_ms: Option<f64>,
    /// How far the vCPUs are throttled, in percent.
    pub throttle_percent: u8,
    /// Since the start, in milliseconds.
    pub elapsed_ms: u64,
}

/// How a move ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum MoveOutcome {
    /// The guest runs at the destination.
    Moved(MoveReport),
    /// It could move so; nothing did. At the destination without figures.
    Assessed(AssessReport),
    /// The peer said who has it, or this host did.
    Settled(Settlement),
    /// It did not, or nobody knows.
    Failed {
        /// Stable code.
        code: String,
        /// For people.
        reason: String,
        /// What that means for the guest here.
        guest: GuestHere,
    },
}

/// What a failed move left on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuestHere {
    /// Source: it runs on, as if nothing had been tried.
    Runs,
    /// Source: it should run on and does not; its VMM failed.
    Stopped,
    /// Source: it is paused; the destination holds it or not, and must be asked. Resume nothing.
    InDoubt,
    /// Source: it runs at the destination; the copy here is left to be removed.
    Elsewhere,
    /// Destination: nothing of it may stay; end its VMM.
    Absent,
}

/// Facts of a move.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MoveReport {
    /// Rounds, the last included.
    pub rounds: u32,
    /// Pages sent or received, zero pages included.
    pub pages: u64,
    /// Zero pages among them.
    pub zero_pages: u64,
    /// Packets of the secure processor among them; 0 at the destination.
    pub firmware_pages: u64,
    /// Bytes of frames, before TLS.
    pub bytes: u64,
    /// Source: from the pause to the destination's word that it runs. Destination: from the last page to the
    /// running guest. Milliseconds.
    pub downtime_ms: f64,
    /// Source: what was forecast when the guest was paused.
    pub estimated_downtime_ms: f64,
    /// Everything, in milliseconds.
    pub total_ms: u64,
    /// Source: how far the pause was from that, in milliseconds; negative if it was shorter.
    pub forecast_error_ms: f64,
    /// Source: bytes per second.
    pub throughput: f64,
    /// Source: why the guest was paused when it was.
    pub convergence: String,
    /// Source: how far the vCPUs were throttled at last, in percent.
    pub throttle_percent: u8,
    /// What both ends hold and have compared.
    pub verified: MoveVerification,
    /// `direct` or `gateway`.
    pub path: String,
    /// TLS cipher suite, at the source.
    pub tls_suite: String,
    /// Root of the manifest that both ends hold, hexadecimal.
    pub manifest_root: String,
    /// The epoch that the destination holds.
    pub epoch: u64,
    /// Destination: whether the source was told; if not, it will ask.
    pub source_informed: bool,
}

/// What both ends of a move hold and have compared before the guest went on; digests are SHA-256, hexadecimal.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MoveVerification {
    /// Distinct pages.
    pub pages: u64,
    /// Of the seals of all pages, in their order.
    pub seals_sha256: String,
    /// Of the state of devices and vCPUs.
    pub state_sha256: String,
    /// Of the memory as it lay at both ends, where it was read anew.
    pub content_sha256: Option<String>,
    /// Of how many network cards the destination announced the addresses.
    pub announced: u32,
    /// What each connection carried, the first one's first.
    pub streams: Vec<StreamCount>,
}

/// What a move would be like.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AssessReport {
    /// Pages of the guest's memory.
    pub memory_pages: u64,
    /// Pages that hold anything.
    pub pages: u64,
    /// Distinct pages written per second.
    pub dirty_rate: f64,
    /// Bytes per second that the way carries.
    pub throughput: f64,
    /// In milliseconds.
    pub round_trip_ms: f64,
    /// Rounds to be expected, the last included.
    pub rounds: u32,
    /// Everything, in milliseconds.
    pub total_ms: f64,
    /// The pause, in milliseconds.
    pub downtime_ms: f64,
    /// Why the guest would be paused.
    pub convergence: String,
    /// How far its vCPUs would be throttled, in percent.
    pub throttle_percent: u8,
    /// `direct` or `gateway`.
    pub path: String,
    /// TLS cipher suite.
    pub tls_suite: String,
    /// Connections that the move would have.
    pub streams: u16,
}

/// Whether the host's key may sign this for a mover: a TLS 1.3 CertificateVerify input or a session
/// transcript, and nothing else.
pub fn may_sign(message: &[u8]) -> bool {
    message.starts_with(&[b' '; 64]) || message.starts_with(b"casemate-migrate/1 ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_signs_for_moves_only() {
        assert!(may_sign(&[b' '; 64]));
        assert!(may_sign(b"casemate-migrate/1 source"));
        assert!(!may_sign(&[b' '; 63]));
        assert!(!may_sign(b"a certificate"));
    }
}
