//! What the migration engine needs of a guest, at either end.
//!
//! The engine moves pages and an opaque machine state; it knows nothing of KVM or of the firmware. The
//! host's mover implements these traits over its channel to the VMM. Calls are made from one thread, in
//! the order of the methods.

use crate::pages::PageSet;
use crate::session::SessionFacts;
use crate::settlement::Settlement;

/// Size of a guest page, in bytes.
pub const PAGE_SIZE: usize = 4096;
/// Pages that travel under one seal at most (64 KiB): larger ones gain nothing, smaller ones cost a tag and a header
/// each.
pub const EXTENT_PAGES: usize = 16;
/// Size of the header of a firmware packet (SEV API, `SEND_UPDATE_DATA`), in bytes.
pub const PACKET_HEADER_SIZE: usize = 52;

/// A guest page number: guest physical address / 4096.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct Gpn(pub u64);

/// A run of guest pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PageRange {
    /// First page.
    pub start: Gpn,
    /// Number of pages, at least one.
    pub count: u64,
}

/// How the newest version of pages travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageContent<'a> {
    /// All bytes of the page are zero.
    Zero,
    /// 1 to [`EXTENT_PAGES`] pages that follow one another, in clear (sealed by the stream).
    Data(&'a [u8]),
    /// A packet of the secure processor: `PACKET_HEADER_SIZE` bytes of header and `PAGE_SIZE` of ciphertext.
    Firmware {
        /// The packet's header, as the firmware wrote it.
        header: &'a [u8],
        /// The page, encrypted under the transport key.
        ciphertext: &'a [u8],
    },
}

impl PageContent<'_> {
    /// How many pages this is.
    pub fn pages(&self) -> usize {
        match self {
            Self::Data(data) => data.len() / PAGE_SIZE,
            Self::Zero | Self::Firmware { .. } => 1,
        }
    }
}

/// A failure of the guest's side; the text names the object and the remedy.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct GuestError(pub String);

/// The running guest at the source.
pub trait SourceGuest {
    /// Memory that may hold pages, ascending, without overlap.
    fn memory(&self) -> Vec<PageRange>;
    /// Both ends have agreed, and no page has travelled: asks local policy about the session.
    fn agreed(&mut self, session: &SessionFacts) -> Result<(), Refusal>;
    /// Takes the peer's platform evidence (opaque here; the PDH chain for SEV, empty for a plain guest),
    /// verifies it, and opens the firmware's send context. Returns the blob for [`DestinationGuest::begin`].
    fn begin(&mut self, peer_evidence: &[u8]) -> Result<Vec<u8>, GuestError>;
    /// An assessment: verifies the peer's platform evidence as [`SourceGuest::begin`] does, and opens nothing.
    fn judge(&mut self, peer_evidence: &[u8]) -> Result<(), Refusal>;
    /// Turns dirty tracking on and returns the pages that hold anything at all (never-touched pages are
    /// zero at both ends and do not travel).
    fn start_tracking(&mut self) -> Result<PageSet, GuestError>;
    /// Pages written since tracking started or since the last call.
    fn take_dirty(&mut self) -> Result<PageSet, GuestError>;
    /// Reads pages (ascending, at most [`SourceGuest::batch_pages`]) and passes each on once, neighbours together
    /// where they travel in clear; `Gpn` is the first page of the content.
    fn read_pages(
        &mut self,
        pages: &[Gpn],
        emit: &mut dyn FnMut(Gpn, PageContent<'_>),
    ) -> Result<(), GuestError>;
    /// How many pages one [`SourceGuest::read_pages`] may ask for.
    fn batch_pages(&self) -> usize;
    /// Takes so much of their time from the vCPUs, in percent, 0 to 99: it writes less while its pages are sent. Ends with
    /// [`SourceGuest::pause`] and [`SourceGuest::resume`].
    fn throttle(&mut self, percent: u8) -> Result<(), GuestError>;
    /// The engine waits on purpose: a chance to hear the operator.
    fn attend(&mut self);
    /// Stops vCPUs and devices; from here on nothing changes memory.
    fn pause(&mut self) -> Result<(), GuestError>;
    /// The machine's state after the last page was read (devices, vCPUs, firmware end of stream).
    fn state(&mut self) -> Result<Vec<u8>, GuestError>;
    /// [`ContentDigest`](crate::transcript::ContentDigest) of these pages of the paused guest, read anew.
    fn content_digest(&mut self, pages: &PageSet) -> Result<[u8; 32], GuestError>;
    /// Gives up what only one side may hold (disk locks). After this the guest runs here again only by
    /// [`SourceGuest::resume`].
    fn release(&mut self) -> Result<(), GuestError>;
    /// Migration failed or was cancelled before the commit: tracking off, firmware context cancelled,
    /// disk locks taken again, guest running as if nothing had been tried.
    fn resume(&mut self) -> Result<(), GuestError>;
    /// The destination has confirmed that it runs the guest: destroy it here.
    fn destroy(&mut self) -> Result<(), GuestError>;
}

/// What the offer says of the guest, already parsed and bounded.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct GuestOffer {
    /// The guest's identity, the same on every host.
    pub vm_id: [u8; 16],
    /// The guest's name, 1 to 64 characters of `[a-z0-9-]`.
    pub name: String,
    /// The ownership epoch the source holds; the destination will hold `epoch + 1`.
    pub epoch: u64,
    /// Memory that may hold pages.
    pub memory: Vec<PageRange>,
    /// Description of the machine's shape (opaque here; at most 64 KiB; the host parses it once).
    #[serde(with = "serde_bytes")]
    pub description: Vec<u8>,
}

/// The destination's answer to an offer that its policy allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admission {
    /// The platform evidence for [`SourceGuest::begin`].
    pub evidence: Vec<u8>,
}

/// Why the destination's policy refuses an offer, or a question.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {reason}")]
pub struct Refusal {
    /// Stable code, for example `POLICY_REFUSED`.
    pub code: String,
    /// For people.
    pub reason: String,
}

/// The guest that is being built at the destination.
pub trait DestinationGuest {
    /// The peer has proven who it is: asks local policy about the session.
    fn agreed(&mut self, session: &SessionFacts) -> Result<(), Refusal>;
    /// Checks the offer against local policy and, if allowed, builds the machine (memory, devices, no vCPU running).
    fn admit(
        &mut self,
        offer: &GuestOffer,
        peer: &crate::identity::PeerIdentity,
    ) -> Result<Admission, Refusal>;
    /// A source whose commit was not answered asks who has the guest that it had under the question's epoch; instead of
    /// [`DestinationGuest::admit`], and nothing follows. [`Settlement::Never`] is a promise: whatever of that move is still
    /// under way here has been ended for good.
    fn settle(
        &mut self,
        question: &GuestOffer,
        peer: &crate::identity::PeerIdentity,
    ) -> Result<Settlement, Refusal>;
    /// Opens the firmware's receive context with the blob of [`SourceGuest::begin`].
    fn begin(&mut self, start: &[u8]) -> Result<(), GuestError>;
    /// Places pages whose seal has been verified, from `start` on: one, or as many as the data holds. The engine
    /// calls [`DestinationGuest::flush`] before it believes the pages placed.
    fn write_pages(&mut self, start: Gpn, content: PageContent<'_>) -> Result<(), GuestError>;
    /// Completes all pages handed over so far.
    fn flush(&mut self) -> Result<(), GuestError>;
    /// [`ContentDigest`](crate::transcript::ContentDigest) of these pages as they lie here, read anew.
    fn content_digest(&mut self, pages: &PageSet) -> Result<[u8; 32], GuestError>;
    /// Restores the machine's state; called only after the whole transcript has verified. vCPUs stay stopped.
    fn restore(&mut self, state: &[u8]) -> Result<(), GuestError>;
    /// The source has committed: take the disk locks, record the epoch durably, run the vCPUs, announce the addresses.
    /// Returns of how many network cards the addresses were announced.
    fn activate(&mut self, epoch: u64) -> Result<u32, GuestError>;
    /// The migration ended without a commit: remove every trace.
    fn abandon(&mut self);
}
