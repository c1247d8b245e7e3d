//! What the agent and the VMMs may ask of the `psp` role, and what it answers: one request, one reply, in order.
//!
//! A VMM's end may belong to a guest that broke out: a guest's channel names no handle, so it cannot name
//! another guest's, and every address it names is checked against the memory it attached.

use serde::{Deserialize, Serialize};

use crate::confidential::launch::SpecialPage;
use crate::confidential::shared::MemoryRun;
use crate::vmm::protocol::{OwnerSession, RoleError, SnpBinding};

/// Agent to psp, on the control channel.
#[derive(Debug, Serialize, Deserialize)]
pub enum ProcessorControl {
    /// Makes a new platform with a new emulated root; its identity comes back, to be stored like a key.
    Generate,
    /// Makes the new emulated root of an SNP platform; its identity comes back likewise.
    GenerateSnp,
    /// Becomes the platform of identities that [`ProcessorControl::Generate`] and `GenerateSnp` gave.
    Initialise {
        /// The identity, opaque to the agent.
        #[serde(with = "serde_bytes")]
        identity: Vec<u8>,
        /// The SNP identity, if SNP guests are to be had.
        snp: Option<serde_bytes::ByteBuf>,
        /// SHA-256 of the other emulated roots that guests may be sent to, from policy.
        peer_roots: Vec<[u8; 32]>,
    },
    /// Descriptors beside it, non-blocking: the psp's end of a VMM's channel; for a SEV-SNP guest also the psp's end of
    /// the socket on which the guest's messages come.
    Connect,
    /// What PLATFORM_STATUS says.
    Status,
    /// The certificates of the platform.
    Evidence,
    /// What SNP_PLATFORM_STATUS says, if there is SNP.
    SnpStatus,
    /// The certificates below which SNP reports are signed.
    SnpCertificates,
    /// A command of the platform's operator.
    Order(PlatformOrder),
    /// Becomes again what it was, where what an order changed could not be kept. The same chip's identity only.
    Restore {
        /// The identity that is kept.
        #[serde(with = "serde_bytes")]
        identity: Vec<u8>,
    },
    /// State of the sandbox.
    SandboxReport,
    /// Tries from inside what must be refused.
    SandboxProbe,
}

/// What a platform's operator may ask of a secure processor, AMD's or the software one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PlatformOrder {
    /// GET_ID: 64 bytes a socket.
    ChipId,
    /// PEK_CSR: 2084 bytes.
    PekCsr,
    /// PEK_CERT_IMPORT.
    PekCertImport {
        /// The request, signed by the owner.
        #[serde(with = "serde_bytes")]
        pek: Vec<u8>,
        /// The owner's certificate.
        #[serde(with = "serde_bytes")]
        oca: Vec<u8>,
    },
    /// PEK_GEN.
    PekGen,
    /// PDH_GEN.
    PdhGen,
    /// FACTORY_RESET.
    FactoryReset,
    /// SNP_CONFIG.
    SnpConfig(SnpConfig),
    /// SNP_COMMIT.
    SnpCommit,
    /// SNP_VLEK_LOAD.
    SnpVlekLoad {
        /// The wrapped hash stick, 432 bytes.
        #[serde(with = "serde_bytes")]
        wrapped: Vec<u8>,
    },
}

/// What SNP_CONFIG sets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnpConfig {
    /// TCB version that reports show, eight bytes as they stand in a report; all zero for the committed one.
    pub reported_tcb: [u8; 8],
    /// Reports do not show the chip's id.
    pub mask_chip_id: bool,
    /// Reports are not signed with the chip's key.
    pub mask_chip_key: bool,
}

/// psp to agent.
pub type ControlOutcome = Result<ControlReply, RoleError>;

/// A control request that succeeded.
#[derive(Debug, Serialize, Deserialize)]
pub enum ControlReply {
    /// Nothing more to say.
    Done,
    /// The new identity: secret, mode 0600.
    Generated {
        /// Opaque.
        #[serde(with = "serde_bytes")]
        identity: Vec<u8>,
    },
    /// PLATFORM_STATUS.
    Status(PlatformStatus),
    /// The platform's certificates.
    Evidence(PlatformEvidence),
    /// SNP_PLATFORM_STATUS; none without SNP.
    SnpStatus(Option<SnpStatus>),
    /// The certificates of SNP reports.
    SnpCertificates(SnpCertificates),
    /// What an order gives: a request to sign, an id.
    Bytes {
        /// As the firmware has it.
        #[serde(with = "serde_bytes")]
        bytes: Vec<u8>,
    },
    /// An order changed the identity: secret, to be kept in place of the old one.
    Changed {
        /// Opaque.
        #[serde(with = "serde_bytes")]
        identity: Vec<u8>,
    },
    /// State of the sandbox.
    Report(crate::sandbox::report::SandboxReport),
    /// Result of the probe.
    Probe(crate::sandbox::report::ProbeReport),
}

/// PLATFORM_STATUS.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlatformStatus {
    /// API major, API minor, build.
    pub api: (u8, u8, u8),
    /// UNINIT 0, INIT 1, WORKING 2.
    pub state: u8,
    /// An outside owner has signed the platform.
    pub owned: bool,
    /// SEV-ES is initialised.
    pub es: bool,
    /// Guests known to the firmware.
    pub guests: u32,
    /// True of the psp role, false of AMD's processor.
    pub emulated: bool,
}

/// SNP_PLATFORM_STATUS.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnpStatus {
    /// API major, API minor.
    pub api: (u8, u8),
    /// Build.
    pub build: u32,
    /// Whether SNP is initialised.
    pub initialised: bool,
    /// TCB version that runs, eight bytes as they stand in a report.
    pub current_tcb: [u8; 8],
    /// TCB version that reports show.
    pub reported_tcb: [u8; 8],
    /// Reports do not show the chip's id.
    pub mask_chip_id: bool,
    /// Reports are not signed with the chip's key.
    pub mask_chip_key: bool,
    /// A VLEK is loaded.
    pub vlek_loaded: bool,
    /// SNP guests known to the firmware.
    pub guests: u32,
    /// `milan`, `genoa` or `turin`, where it is known: the order of a TCB version's bytes depends on it.
    pub product: Option<String>,
}

/// What SNP reports are signed under, DER.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnpCertificates {
    /// The root.
    #[serde(with = "serde_bytes")]
    pub ark: Vec<u8>,
    /// The issuer of VCEKs.
    #[serde(with = "serde_bytes")]
    pub ask: Vec<u8>,
    /// The chip's key for the reported TCB version.
    #[serde(with = "serde_bytes")]
    pub vcek: Vec<u8>,
}

/// The certificates that prove a platform to a peer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlatformEvidence {
    /// PDH, 2084 bytes.
    #[serde(with = "serde_bytes")]
    pub pdh: Vec<u8>,
    /// PEK ‖ OCA ‖ CEK, 6252 bytes.
    #[serde(with = "serde_bytes")]
    pub platform: Vec<u8>,
    /// ASK ‖ ARK, AMD's or the emulated ones.
    #[serde(with = "serde_bytes")]
    pub amd: Vec<u8>,
}

/// VMM to psp. The psp knows the guest by the channel.
#[derive(Debug, Serialize, Deserialize)]
pub enum GuestRequest {
    /// First message. Descriptors beside it: guest memory, exchange memory.
    Attach {
        /// Where guest memory lies in its file.
        runs: Vec<MemoryRun>,
    },
    /// LAUNCH_START.
    LaunchStart {
        /// Guest policy.
        policy: u32,
        /// The owner's certificate and session.
        session: Option<OwnerSession>,
    },
    /// LAUNCH_UPDATE_DATA over a run of whole pages, at most [`LAUNCH_CHUNK`] bytes.
    LaunchUpdate {
        /// Start.
        gpa: u64,
        /// Length in bytes.
        length: u64,
    },
    /// LAUNCH_MEASURE.
    LaunchMeasure,
    /// LAUNCH_SECRET.
    LaunchSecret {
        /// Packet header, 52 bytes.
        #[serde(with = "serde_bytes")]
        header: Vec<u8>,
        /// At most one page.
        #[serde(with = "serde_bytes")]
        ciphertext: Vec<u8>,
        /// Where to.
        gpa: u64,
    },
    /// LAUNCH_FINISH.
    LaunchFinish,
    /// SEND_START.
    SendStart {
        /// Whom to.
        target: PlatformEvidence,
    },
    /// SEND_UPDATE_DATA, one command a page, packets to the exchange memory in this order.
    SendPages {
        /// Page addresses, at most `EXCHANGE_PAGES`.
        gpas: Vec<u64>,
    },
    /// SEND_FINISH.
    SendFinish,
    /// SEND_CANCEL.
    SendCancel,
    /// PDH_CERT_EXPORT and the roots.
    Evidence,
    /// RECEIVE_START.
    ReceiveStart {
        /// Guest policy.
        policy: u32,
        /// The source's PDH, 2084 bytes.
        #[serde(with = "serde_bytes")]
        source_pdh: Vec<u8>,
        /// Session, 128 bytes.
        #[serde(with = "serde_bytes")]
        session: Vec<u8>,
    },
    /// RECEIVE_UPDATE_DATA, one command a page, packets from the exchange memory in this order.
    ReceivePages {
        /// Page addresses, at most `EXCHANGE_PAGES`.
        gpas: Vec<u64>,
    },
    /// RECEIVE_FINISH.
    ReceiveFinish,
    /// DECOMMISSION.
    Decommission,
    /// SNP_LAUNCH_START; what was measured by LAUNCH_UPDATE_DATA is then measured by SNP_LAUNCH_UPDATE.
    SnpStart {
        /// Guest policy, 64 bit.
        policy: u64,
    },
    /// SNP_LAUNCH_UPDATE of a page that is not measured by its content.
    SnpPage {
        /// Where.
        gpa: u64,
        /// Which.
        page: SpecialPage,
    },
    /// LAUNCH_UPDATE_VMSA, or what KVM gives to SNP_LAUNCH_UPDATE of a vCPU; one vCPU.
    LaunchVmsa {
        /// 4096 bytes.
        #[serde(with = "serde_bytes")]
        page: Vec<u8>,
    },
    /// SNP_LAUNCH_FINISH.
    SnpFinish {
        /// What is bound to the launch.
        binding: SnpBinding,
    },
}

/// psp to VMM.
pub type GuestOutcome = Result<GuestReply, RoleError>;

/// A guest request that succeeded.
#[derive(Debug, Serialize, Deserialize)]
pub enum GuestReply {
    /// Nothing more to say.
    Done,
    /// What was measured.
    Measured {
        /// Measure 32 bytes, nonce 16 bytes.
        #[serde(with = "serde_bytes")]
        blob: Vec<u8>,
        /// API major, API minor, build.
        api: (u8, u8, u8),
        /// Policy that the firmware holds.
        policy: u32,
    },
    /// The send context.
    SendStarted {
        /// Guest policy.
        policy: u32,
        /// PDH of this platform.
        #[serde(with = "serde_bytes")]
        source_pdh: Vec<u8>,
        /// Session, 128 bytes.
        #[serde(with = "serde_bytes")]
        session: Vec<u8>,
    },
    /// The platform's certificates.
    Evidence(PlatformEvidence),
    /// The launch digest of a SEV-SNP guest, 48 bytes.
    SnpLaunched {
        /// As its reports will show it.
        #[serde(with = "serde_bytes")]
        digest: Vec<u8>,
    },
}

/// Most bytes in one LAUNCH_UPDATE message, so that one guest's launch does not hold up the others for long.
pub const LAUNCH_CHUNK: u64 = 4 << 20;
