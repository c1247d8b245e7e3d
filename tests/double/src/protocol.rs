//! What a test asks of the child under the double, over its standard input and output.

use std::io::{self, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// One request.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Ask {
    /// Makes the virtual machine and its memory, and makes it a SEV one by the host's own code.
    Attach {
        /// Guest policy.
        policy: u32,
        /// Pages of memory.
        pages: u64,
        /// ASK ‖ ARK of the platform, which a VMM has from the agent.
        amd: Vec<u8>,
        /// What the child does wrong, if it shall.
        wrong: Option<Wrong>,
    },
    /// Launches a SEV guest of one empty page, and asks for its attestation report.
    Report {
        /// The asker's nonce.
        mnonce: [u8; 16],
    },
    /// Launches such a guest, and takes SEND_START and SEND_FINISH straight to the firmware.
    SendFinish {
        /// Whom to.
        target: Certificates,
    },
    /// Makes an SNP guest's machine and memory.
    SnpAttach {
        /// Pages of memory.
        pages: u64,
    },
    /// A step of an SNP guest's life.
    Snp(SnpStep),
    /// Opens `/dev/sev` only.
    Open,
    /// Opens it for reading only, as no code of the host does.
    OpenReadOnly,
    /// Adds the vCPU, in real mode at [`START`].
    AddVcpu,
    /// Writes guest memory as a loader does.
    Write {
        /// Where.
        gpa: u64,
        /// What.
        #[serde(with = "serde_bytes")]
        bytes: Vec<u8>,
    },
    /// Reads guest memory.
    Read {
        /// Where.
        gpa: u64,
        /// How much.
        length: u64,
    },
    /// A step of [`GuestProtection`](casemate::confidential::launch::GuestProtection).
    Step(Step),
    /// Runs the guest for so many bytes of output; port 0x3f8.
    Run {
        /// Bytes.
        outputs: u32,
    },
    /// Where guest memory lies in the child.
    HostAddress {
        /// Which.
        gpa: u64,
    },
    /// `KVM_MEMORY_ENCRYPT_OP` past the code under test: what the double itself makes of it.
    Raw {
        /// Command.
        id: u32,
        /// Padding of `struct kvm_sev_cmd`.
        pad0: u32,
        /// The descriptor it names.
        sev_fd: u32,
        /// The command's structure; none if empty.
        data: Vec<u8>,
    },
    /// General and special registers, to be carried to another machine.
    SaveRegisters,
    /// Registers from another machine.
    RestoreRegisters {
        /// What [`Ask::SaveRegisters`] gave.
        #[serde(with = "serde_bytes")]
        bytes: Vec<u8>,
    },
    /// A command of `/dev/sev`.
    Device(Device),
    /// Ends the virtual machine.
    Close,
}

/// Steps of launch and migration.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "named as in `GuestProtection`")]
pub enum Step {
    LaunchStart {
        session: Option<(Vec<u8>, Vec<u8>)>,
    },
    LaunchUpdate {
        gpa: u64,
        length: u64,
    },
    LaunchMeasure,
    LaunchSecret {
        header: Vec<u8>,
        ciphertext: Vec<u8>,
        gpa: u64,
    },
    LaunchFinish,
    Evidence,
    SendStart {
        target: Certificates,
    },
    SendPages {
        gpas: Vec<u64>,
    },
    SendFinish,
    SendCancel,
    ReceiveStart {
        policy: u32,
        pdh: Vec<u8>,
        session: Vec<u8>,
    },
    ReceivePages {
        gpas: Vec<u64>,
        #[serde(with = "serde_bytes")]
        packets: Vec<u8>,
    },
    ReceiveFinish,
    Decommission,
}

/// Steps of an SNP guest's life.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "named as in the host's `kvm` module")]
pub enum SnpStep {
    Start {
        policy: u64,
        gosvw: [u8; 16],
    },
    /// `page`: normal 0, zero 1, unmeasured 2, secrets 3, CPUID 4.
    Update {
        gpa: u64,
        #[serde(with = "serde_bytes")]
        content: Vec<u8>,
        page: u8,
    },
    Finish {
        id: Option<(Vec<u8>, Vec<u8>, bool)>,
        host_data: [u8; 32],
        vcek_disabled: bool,
    },
    /// As an exit for `KVM_HC_MAP_GPA_RANGE` brings it.
    Hypercall {
        number: u64,
        arguments: [u64; 6],
    },
    /// As an exit for `KVM_EXIT_MEMORY_FAULT` brings it.
    MemoryFault {
        flags: u64,
        gpa: u64,
        size: u64,
    },
    /// Numbers of the private pages, as little-endian words.
    PrivatePages,
}

/// What a child may do wrong before it makes its machine a SEV one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Wrong {
    /// A vCPU is there already.
    VcpuFirst,
    /// `/dev/null` instead of `/dev/sev`.
    OtherDevice,
    /// May lock one page only, and without the capability that lifts the bound.
    NoLockedMemory,
}

/// Commands of `/dev/sev`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "named as in `SevDevice`")]
pub enum Device {
    Status,
    Export,
    PekCsr,
    PekCertImport { pek: Vec<u8>, oca: Vec<u8> },
    PekGen,
    PdhGen,
    FactoryReset,
    ChipId,
    SnpStatus,
    SnpSetConfig { tcb: u64, id: bool, key: bool },
    SnpCommit,
    SnpVlekLoad { wrapped: Vec<u8> },
}

/// PDH, then PEK ‖ OCA ‖ CEK, then ASK ‖ ARK.
pub type Certificates = (Vec<u8>, Vec<u8>, Vec<u8>);

/// The child's answer; a refusal as stable code and text.
pub type Outcome = Result<Answer, (String, String)>;

/// What came of a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// Nothing more to say.
    Done,
    /// Bytes: memory, packets, output, registers, a request.
    Bytes(#[serde(with = "serde_bytes")] Vec<u8>),
    /// The measurement: blob, API and build, policy.
    Measured {
        /// Measure and nonce.
        blob: Vec<u8>,
        /// API major, minor, build.
        api: (u8, u8, u8),
        /// Policy.
        policy: u32,
    },
    /// The platform's certificates.
    Certificates(Certificates),
    /// Policy, PDH, session.
    Sending(u32, Vec<u8>, Vec<u8>),
    /// In words.
    Text(String),
}

/// Where the vCPU starts.
pub const START: u64 = 0x1000;

/// Writes one message.
pub fn write_frame<T: Serialize>(to: &mut impl Write, message: &T) -> io::Result<()> {
    let bytes = postcard::to_stdvec(message).map_err(io::Error::other)?;
    let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
    to.write_all(&length.to_le_bytes())?;
    to.write_all(&bytes)
}

/// Reads one message.
pub fn read_frame<T: DeserializeOwned>(from: &mut impl Read) -> io::Result<T> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let mut bytes = vec![0; u32::from_le_bytes(length) as usize];
    from.read_exact(&mut bytes)?;
    postcard::from_bytes(&bytes).map_err(io::Error::other)
}
