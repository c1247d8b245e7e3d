//! What the agent and the mover may ask of a VMM process, and what it answers.
//!
//! One request, one reply, in order, on each channel. Events come only on the agent's channel, between replies.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::machine::plan::devices::{DeviceChange, DeviceName, DeviceStatus};
use crate::machine::plan::{Attachment, MachinePlan};

/// What each descriptor beside [`VmmRequest::Prepare`] is; same order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HandleKind {
    /// `/dev/kvm`.
    Kvm,
    /// Where the serial console's output goes (append only file or pipe).
    Console,
    /// What is typed at the serial console (a pipe); without it nobody types.
    ConsoleInput,
    /// Kernel image, a bzImage or an ELF file; only for a launch.
    Kernel,
    /// Initramfs; only for a launch.
    Initrd,
    /// Firmware image, in place of kernel and initramfs; only for a launch.
    Firmware,
    /// Disk `n` of the plan.
    Disk(u8),
    /// A queue of the tap of card `n` of the plan, with `IFF_VNET_HDR`; one for each of the card's pairs, in order.
    Tap {
        /// Which card.
        card: u8,
        /// Which of its pairs of queues.
        pair: u8,
    },
    /// Listening Unix stream socket of the vsock device (host to guest, `CONNECT <port>\n`).
    VsockListener,
    /// Listening Unix stream socket of the virtio console.
    ConsoleListener,
    /// Channel to the software secure processor.
    Processor,
    /// `/dev/sev`, for reading: guests' commands and the platform's status and certificates.
    SevDevice,
    /// One end of a `SOCK_SEQPACKET` pair whose other end the software secure processor has: an SNP guest's requests
    /// go there, a packet each, and the replies come back (`casemate_attest::processor::snp::request_frame`).
    GuestMessages,
    /// `/dev/userfaultfd`, for a guest that is to run before its memory is there.
    Userfault,
    /// ASK ‖ ARK of the processor behind `/dev/sev`, as AMD publishes them.
    AmdCertificates,
    /// The guest's memory, which another VMM of this host has had until now.
    Memory,
    /// That VMM's exchange memory.
    Exchange,
}

/// Agent to VMM.
#[derive(Debug, Serialize, Deserialize)]
pub enum VmmRequest {
    /// First message, before the sandbox closes: the plan, and everything the process may ever use.
    Prepare {
        /// What to build.
        plan: Box<MachinePlan>,
        /// What the descriptors are.
        handles: Vec<HandleKind>,
    },
    /// Boots from the kernel and initramfs handed in. For a confidential guest up to the measurement.
    Launch {
        /// What binds the launch to the guest's owner.
        binding: Box<LaunchBinding>,
    },
    /// Waits for a mover to fill the machine.
    Incoming {
        /// With what was another guest's, whose addresses it does not take over.
        copy: bool,
    },
    /// Injects the owner's secret packet (state measured).
    InjectSecret {
        /// Packet header, 52 bytes.
        #[serde(with = "serde_bytes")]
        header: Vec<u8>,
        /// Ciphertext, at most one page.
        #[serde(with = "serde_bytes")]
        ciphertext: Vec<u8>,
    },
    /// Finishes the launch and starts the vCPUs.
    Run,
    /// Stops vCPUs and devices.
    Pause,
    /// Goes on after a pause.
    Resume,
    /// A non-maskable interrupt to each vCPU.
    InjectNmi,
    /// One descriptor beside it: the channel to a mover. At most one mover at a time; it is gone when its end closes.
    AttachMover,
    /// Asks the guest to shut itself down.
    PowerButton,
    /// Gives a plain guest another VM generation id: it is a copy, or went back in time. Before it runs.
    NewGeneration {
        /// 16 random bytes.
        id: [u8; 16],
    },
    /// What the machine is doing.
    Status,
    /// Changes a device, whether the guest runs or stands; or asks only what it says of itself.
    Device {
        /// Which.
        device: DeviceName,
        /// How.
        change: Option<DeviceChange>,
    },
    /// One descriptor beside it, an image or a tap: puts a device into a free slot, and tells the guest.
    Attach {
        /// What it is.
        attachment: Attachment,
    },
    /// Asks the guest to let go of a device that was attached. It is gone when [`VmmRequest::Device`] says so.
    AskBack {
        /// Which.
        device: DeviceName,
    },
    /// The guest keeps it after all. Fails if it has let go of it.
    Keep {
        /// Which.
        device: DeviceName,
    },
    /// Tries from inside what must be refused.
    SandboxProbe,
    /// State of the sandbox, thread by thread.
    SandboxReport,
    /// Ends the process.
    Shutdown,
    /// Another VMM of this host is to take the guest over: lends it memory and exchange memory. The guest runs on;
    /// until [`VmmRequest::KeepOn`] nothing of the machine is changed.
    HandOver,
    /// After [`VmmRequest::HandOver`]: stops the guest; its state lies in the exchange memory then.
    Yield,
    /// The guest stays with this VMM after all, and goes on as it was.
    KeepOn,
    /// The VMM that takes over, prepared with the other's memory: puts the state in. Nothing runs yet, and nothing of the
    /// guest is changed: the other one can still go on.
    TakeOver {
        /// Length of the state in the exchange memory, in bytes, at most [`MAX_STATE`].
        length: u64,
    },
    /// After [`VmmRequest::TakeOver`]: the guest is this VMM's from here on.
    GoOn {
        /// Whether it runs; one that stood still goes on standing still.
        run: bool,
    },
}

/// What binds a launch to the guest's owner and to the host's own choice.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct LaunchBinding {
    /// SEV and SEV-ES: the owner's session, for a guest that will get a secret.
    pub session: Option<OwnerSession>,
    /// SEV-SNP: what LAUNCH_FINISH is given.
    pub snp: SnpBinding,
}

/// What SNP_LAUNCH_FINISH is given.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct SnpBinding {
    /// Shown in every report.
    pub host_data: [u8; 32],
    /// What should have been launched, with its signatures.
    pub id: Option<SnpId>,
    /// Reports may not be signed with the VCEK.
    pub vcek_disabled: bool,
}

/// An ID block and its authentication.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SnpId {
    /// 96 bytes.
    #[serde(with = "serde_bytes")]
    pub block: Vec<u8>,
    /// 4096 bytes.
    #[serde(with = "serde_bytes")]
    pub auth: Vec<u8>,
    /// Whether the author key is checked and reported.
    pub author_key: bool,
}

/// The owner's half of a SEV session.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OwnerSession {
    /// The owner's Diffie-Hellman certificate, 2084 bytes.
    #[serde(with = "serde_bytes")]
    pub certificate: Vec<u8>,
    /// Session blob, 128 bytes.
    #[serde(with = "serde_bytes")]
    pub blob: Vec<u8>,
}

/// VMM to agent.
#[derive(Debug, Serialize, Deserialize)]
pub enum VmmMessage {
    /// The answer to the oldest request without one.
    Reply(Result<VmmReply, RoleError>),
    /// Something happened.
    Event(VmmEvent),
}

/// A request that succeeded.
#[derive(Debug, Serialize, Deserialize)]
pub enum VmmReply {
    /// Nothing more to say.
    Done,
    /// Built.
    Prepared {
        /// Frequency of the vCPUs' TSC in kHz.
        tsc_khz: u32,
    },
    /// Loaded; of a SEV or SEV-ES guest the measurement. SEV-SNP guests prove themselves by reports.
    Launched(Option<Measurement>),
    /// The vCPUs run for the first time.
    Started {
        /// SEV-SNP launch digest in hex, where the firmware tells it.
        digest: Option<String>,
        /// CPU time that the process has taken from its start to here, microseconds.
        cpu_us: u64,
    },
    /// What the machine is doing.
    Status(MachineStatus),
    /// What the device says of itself.
    Device(DeviceStatus),
    /// Result of a probe, thread by thread.
    Probe(crate::sandbox::report::ProbeReport),
    /// State of the sandbox.
    Report(crate::sandbox::report::SandboxReport),
    /// Two descriptors beside it: guest memory, exchange memory.
    HandedOver,
    /// The guest stands still, its state is in the exchange memory.
    Yielded {
        /// Length of the state in bytes.
        length: u64,
        /// Whether it ran until now.
        ran: bool,
    },
}

/// A request that failed.
#[derive(Clone, Debug, Serialize, Deserialize, thiserror::Error)]
#[error("{code}: {text}")]
pub struct RoleError {
    /// Stable code.
    pub code: String,
    /// For people: object and remedy.
    pub text: String,
}

/// What LAUNCH_MEASURE gave.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Measurement {
    /// Measure 32 bytes, nonce 16 bytes.
    #[serde(with = "serde_bytes")]
    pub blob: Vec<u8>,
    /// API major, API minor, build, as PLATFORM_STATUS says.
    pub api: (u8, u8, u8),
    /// Guest policy the firmware holds.
    pub policy: u32,
    /// Time from `Launch` to the measurement, microseconds.
    pub elapsed_us: u64,
}

/// State of the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineStatus {
    /// Where it is in its life.
    pub state: MachineState,
    /// Whether device models saw a guest break the rules of a queue.
    pub device_faults: u64,
    /// Why the guest stopped itself, if it has.
    pub stopped: Option<String>,
    /// Who does the requests of each disk.
    pub disks: Vec<DiskService>,
}

/// Who does a disk's requests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskService {
    /// The disk.
    pub id: String,
    /// `io_uring`, or `threads` and, where io_uring was wanted, why not.
    pub by: String,
}

/// Where a machine is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MachineState {
    /// Built, nothing loaded.
    Prepared,
    /// Loaded and measured; a secret may be injected.
    Measured,
    /// vCPUs run.
    Running,
    /// vCPUs and devices stopped.
    Paused,
    /// A mover fills it.
    Incoming,
    /// The guest switched itself off.
    Stopped,
    /// The VMM has ended or does not answer, so the agent says; it can only be stopped.
    Lost,
}

/// What the agent hears unasked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmmEvent {
    /// The guest switched itself off or reset.
    GuestStopped {
        /// Why: `shutdown`, `reset`, `panic`, `triple-fault`, or the KVM exit's name.
        reason: String,
    },
    /// The guest's watchdog was not fed. If its action is to stop, that follows.
    Watchdog,
}

/// Mover to VMM. Bulk data is in the exchange memory of [`MoverReply::Attached`].
#[derive(Debug, Serialize, Deserialize)]
pub enum MoverRequest {
    /// First message. The reply carries guest memory (read-only at the source) and the exchange memory.
    Attach,
    /// SEV source: opens the send context for a target whose chain the mover has verified.
    SendStart {
        /// Target PDH certificate, 2084 bytes.
        #[serde(with = "serde_bytes")]
        target_pdh: Vec<u8>,
        /// Platform certificates PEK, OCA, CEK, 6252 bytes.
        #[serde(with = "serde_bytes")]
        platform: Vec<u8>,
        /// AMD certificates ASK, ARK.
        #[serde(with = "serde_bytes")]
        amd: Vec<u8>,
    },
    /// SEV destination: the evidence a source needs (PDH with its chain).
    PlatformEvidence,
    /// SEV destination: opens the receive context.
    ReceiveStart {
        /// Guest policy.
        policy: u32,
        /// The source's PDH certificate, 2084 bytes.
        #[serde(with = "serde_bytes")]
        source_pdh: Vec<u8>,
        /// Session blob, 128 bytes.
        #[serde(with = "serde_bytes")]
        session: Vec<u8>,
    },
    /// Dirty tracking on; bitmap of all pages that hold anything to the exchange memory.
    StartTracking,
    /// Bitmap of pages written since, to the exchange memory (vCPUs' and devices' writes).
    TakeDirty,
    /// Source: notes from now on which blocks of disk `n` of the plan are written; bitmap of all blocks of 4 KiB that hold
    /// anything to the exchange memory.
    TrackDisk(u8),
    /// Source: bitmap of the blocks of a tracked disk that were written since, to the exchange memory.
    TakeDisk(u8),
    /// SEV source: packets of these pages to the exchange memory, [`PACKET_STRIDE`] bytes each, in order.
    SendPages {
        /// Page numbers, at most [`EXCHANGE_PAGES`].
        pages: Vec<u64>,
    },
    /// SEV destination: packets of these pages lie in the exchange memory.
    ReceivePages {
        /// Page numbers, at most [`EXCHANGE_PAGES`].
        pages: Vec<u64>,
    },
    /// Bitmap of all pages that hold anything to the exchange memory; the machine is paused.
    Populated,
    /// Source: takes so much of their time from the vCPUs; until the guest is paused or resumed, or the mover goes.
    Throttle {
        /// In percent, 0 to [`MAX_THROTTLE`].
        percent: u8,
    },
    /// Stops vCPUs and devices.
    Pause,
    /// SEND_FINISH for a SEV guest, then the state of devices and vCPUs to the exchange memory.
    SaveState,
    /// Disk locks off, taps quiet.
    Release,
    /// Failed or cancelled: SEND_CANCEL, locks on, tracking off, running again.
    Resume,
    /// RECEIVE_FINISH for a SEV guest, then the state from the first `length` bytes of the exchange memory.
    RestoreState {
        /// Length in bytes, at most [`MAX_STATE`].
        length: u64,
    },
    /// Locks on, vCPUs run, addresses announced.
    Activate,
}

/// VMM to mover.
#[derive(Debug, Serialize, Deserialize)]
pub enum MoverReply {
    /// Nothing more to say.
    Done,
    /// Handles: guest memory, exchange memory, perhaps faults.
    Attached {
        /// The machine, as built.
        plan: Box<MachinePlan>,
        /// Guest physical start and length of each run of memory; file offsets follow the same order, packed.
        memory: Vec<(u64, u64)>,
        /// If the guest shall run before its memory is there: where each run begins in the VMM. A third handle comes
        /// then, by which its faults are served.
        fault_bases: Vec<u64>,
    },
    /// The send context is open.
    SendStarted {
        /// Guest policy.
        policy: u32,
        /// This platform's PDH certificate, 2084 bytes.
        #[serde(with = "serde_bytes")]
        source_pdh: Vec<u8>,
        /// Session blob, 128 bytes.
        #[serde(with = "serde_bytes")]
        session: Vec<u8>,
    },
    /// PDH, then PEK ‖ OCA ‖ CEK, then ASK ‖ ARK.
    Evidence {
        /// PDH certificate.
        #[serde(with = "serde_bytes")]
        pdh: Vec<u8>,
        /// Platform certificates.
        #[serde(with = "serde_bytes")]
        platform: Vec<u8>,
        /// AMD certificates (or the emulated ones).
        #[serde(with = "serde_bytes")]
        amd: Vec<u8>,
    },
    /// A bitmap of a disk's blocks lies in the exchange memory, little-endian u64 words.
    DiskBitmap {
        /// Number of words.
        words: u64,
    },
    /// A bitmap of `bits` bits, page number = index over the packed memory, lies in the exchange memory, little-endian u64 words.
    Bitmap {
        /// Number of bits.
        bits: u64,
    },
    /// The state lies in the exchange memory.
    State {
        /// Length in bytes.
        length: u64,
    },
}

/// Number of what agent and VMM say to each other, the cell's description included. Raised with each change of it, of a
/// plan, or of what they contain: an agent starts no VMM of another number.
pub const VMM_PROTOCOL: u16 = 1;
/// vCPUs that do not run at all never come to their pause.
pub const MAX_THROTTLE: u8 = 99;
/// Most pages in one exchange.
pub const EXCHANGE_PAGES: usize = 256;
/// A packet in the exchange memory: 52 bytes of header padded to 64, then the 4096 bytes of ciphertext.
pub const PACKET_STRIDE: usize = 64 + 4096;
/// Size of the exchange memory in bytes.
pub const EXCHANGE_SIZE: usize = 4 << 20;
/// Largest machine state in bytes.
pub const MAX_STATE: usize = EXCHANGE_SIZE;

#[cfg(test)]
mod tests {
    use super::*;

    /// What an agent may say to a VMM of another program. Whoever adds a request puts it behind the others; whoever moves
    /// one, or changes what it holds, raises [`VMM_PROTOCOL`].
    #[test]
    fn requests_are_numbered_as_in_protocol_1() {
        assert_eq!(VMM_PROTOCOL, 1);
        let first = |request: &VmmRequest| postcard::to_stdvec(request).unwrap();
        let said = [
            (VmmRequest::Run, vec![4]),
            (VmmRequest::Pause, vec![5]),
            (VmmRequest::Resume, vec![6]),
            (VmmRequest::AttachMover, vec![8]),
            (VmmRequest::Status, vec![11]),
            (VmmRequest::SandboxProbe, vec![16]),
            (VmmRequest::SandboxReport, vec![17]),
            (VmmRequest::Shutdown, vec![18]),
            (VmmRequest::HandOver, vec![19]),
            (VmmRequest::Yield, vec![20]),
            (VmmRequest::KeepOn, vec![21]),
            (VmmRequest::TakeOver { length: 300 }, vec![22, 0xac, 2]),
            (VmmRequest::GoOn { run: true }, vec![23, 1]),
        ];
        for (request, bytes) in said {
            assert_eq!(first(&request), bytes, "{request:?}");
        }
        for (kind, number) in [
            (HandleKind::Kvm, 0),
            (HandleKind::ConsoleListener, 9),
            (HandleKind::Memory, 15),
            (HandleKind::Exchange, 16),
        ] {
            assert_eq!(postcard::to_stdvec(&kind).unwrap(), [number], "{kind:?}");
        }
        let yielded = VmmReply::Yielded {
            length: 1,
            ran: true,
        };
        let bytes = postcard::to_stdvec(&VmmMessage::Reply(Ok(yielded))).unwrap();
        assert_eq!(bytes, [0, 0, 9, 1, 1]);
    }
}
