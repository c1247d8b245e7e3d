//! An EMULATED SNP guest's own channel to the software secure processor: guest messages under the
//! VMPCK of its secrets page, over vsock in the place of the GHCB.
//!
//! Linux would do this in `drivers/virt/coco/sev-guest`, but it sees no SNP here: nothing is
//! encrypted. Casemate's VMM names the two pages on the kernel command line
//! (`casemate.snp=0xSECRETS,0xCPUID`); the message count is where Linux has it, in the secrets
//! page's OS area.
//!
//! The sequence number is AES-GCM's nonce, so that no two different requests may ever have the
//! same. The count rises before a request goes out, and the request is kept until its reply has
//! been taken. After a failure the very same bytes go out again: the firmware answers them now, or
//! refuses them because it did before; only then is there a next request. Linux wipes the key
//! instead, and the guest is mute from then on. What the host answers is believed when it opens
//! under the key.

mod journal;
mod secrets_page;

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use casemate_attest::evidence::table;
use casemate_attest::processor::FirmwareError;
use casemate_attest::processor::snp::request_frame::{
    FrameError, GUEST_REQUEST_PORT, ReplyFrame, RequestFrame, RequestKind, RequestStatus,
};
use casemate_attest::processor::snp::{GuestChannel, KeySelect, MessageError, MessageType};
use casemate_attest::report::REPORT_LEN;

use self::journal::Journal;
use self::secrets_page::SecretsPage;
use super::live::certificates;
use super::{GuestReport, ReportSource, SourceError, bound};
use crate::endpoint::Endpoint;

/// The guest's channel to an emulated processor. What comes from it proves nothing about hardware.
pub struct GuestMessages {
    places: Places,
    vmpl: u32,
}

/// Where everything is.
pub struct Places {
    /// The kernel command line.
    pub command_line: PathBuf,
    /// Physical memory, byte by byte.
    pub memory: PathBuf,
    /// Keeps other processes out, and the request whose reply has not been taken.
    pub journal: PathBuf,
    /// Connects to the host's port for guest requests.
    pub host: Box<dyn Fn() -> io::Result<Box<dyn Stream>>>,
    /// How long another process, and a busy host, are waited for.
    pub patience: Duration,
}

/// A connection.
pub trait Stream: Read + Write {}

impl<T: Read + Write> Stream for T {}

/// Why an emulated guest has no report.
#[derive(Debug, thiserror::Error)]
pub enum MessagesError {
    /// Not such a guest.
    #[error(
        "{0} has no `casemate.snp=0xGPA,0xGPA`: this is no SNP guest that Casemate emulates; use \
         --source auto"
    )]
    NotEmulated(PathBuf),
    /// A word that the VMM does not write.
    #[error(
        "`{0}` on the kernel command line does not name two different pages above 1 MiB; leave \
         that word to the VMM, which writes it last"
    )]
    Word(String),
    /// A file cannot be used.
    #[error("{path} cannot be {doing}: {error}; {remedy}")]
    File {
        /// What was tried.
        doing: &'static str,
        /// With which file.
        path: PathBuf,
        /// What came of it.
        #[source]
        error: io::Error,
        /// What may help.
        remedy: &'static str,
    },
    /// No firmware has written there.
    #[error(
        "there is no secrets page at {0:#x}: its VMPCK is zero; this kernel was not started by \
         Casemate's VMM, or something has wiped the page"
    )]
    NoKey(u64),
    /// Another process is in the midst of an exchange.
    #[error("another process holds {0}; try again when it has its report")]
    Busy(PathBuf),
    /// Nobody answers.
    #[error(
        "vsock port {GUEST_REQUEST_PORT:#x} of the host gives no connection: {0}; the guest needs \
         its vsock device (modprobe vmw_vsock_virtio_transport)"
    )]
    Connect(#[source] io::Error),
    /// The connection failed, or what came over it.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The host or its firmware refused.
    #[error(
        "the host refused the guest request: firmware status {:#x}, VMM status {:#x}; ask again, \
         or see the host's log", .0.firmware_error(), .0.vmm_error()
    )]
    Refused(RequestStatus),
    /// Guest and firmware do not agree on the count.
    #[error(
        "the firmware refused sequence number {0}: something else has used the guest's VMPCK, or \
         the host answered falsely before; the guest has to be launched anew"
    )]
    OutOfStep(u64),
    /// The 32-bit count of the secrets page is used up.
    #[error("the message count in the secrets page is used up; the guest has to be launched anew")]
    Exhausted,
    /// The reply is none, or a refusal.
    #[error(transparent)]
    Message(#[from] MessageError),
}

impl GuestMessages {
    /// This guest's, for privilege level `vmpl`, or 0.
    pub fn system(vmpl: Option<u8>) -> Self {
        Self::at(Places::system(), vmpl)
    }

    /// The same elsewhere.
    pub fn at(places: Places, vmpl: Option<u8>) -> Self {
        Self {
            places,
            vmpl: vmpl.unwrap_or_default().into(),
        }
    }

    /// Whether the kernel command line names an emulated guest's pages, well or badly.
    pub fn is_named(&self) -> bool {
        !matches!(
            SecretsPage::address(&self.places.command_line),
            Err(MessagesError::NotEmulated(_) | MessagesError::File { .. })
        )
    }

    fn exchange(
        &self,
        report_data: &[u8; 64],
    ) -> Result<([u8; REPORT_LEN], Vec<u8>), MessagesError> {
        let gpa = SecretsPage::address(&self.places.command_line)?;
        let page = SecretsPage::open(&self.places.memory, gpa)?;
        let journal = Journal::lock(&self.places.journal, self.places.patience)?;
        // Without a host nothing has to be sealed.
        let host = (self.places.host)().map_err(MessagesError::Connect)?;
        let (secrets, count) = page.read()?;
        let mut exchange = Exchange {
            channel: GuestChannel::new(&secrets, VMPCK)?,
            page,
            count,
            journal,
            host,
            ends: Instant::now() + self.places.patience,
        };
        exchange.settle()?;
        exchange.report(report_data, self.vmpl)
    }
}

impl ReportSource for GuestMessages {
    fn report(&mut self, report_data: &[u8; 64]) -> Result<GuestReport, SourceError> {
        let (report, table) = self.exchange(report_data)?;
        let table = table::parse(&table).map_err(|e| SourceError::Certificates(e.to_string()))?;
        Ok(GuestReport {
            report: bound(&report, report_data)?,
            certificates: certificates(&table),
            emulated: true,
        })
    }
}

impl Places {
    /// In a guest.
    pub fn system() -> Self {
        Self {
            command_line: Path::new("/proc/cmdline").to_owned(),
            memory: Path::new("/dev/mem").to_owned(),
            journal: Path::new("/run/casemate-agent.guest-messages").to_owned(),
            host: Box::new(|| {
                let host = Endpoint::Vsock(HOST_CID, GUEST_REQUEST_PORT).connect(PATIENCE)?;
                Ok(Box::new(host))
            }),
            patience: PATIENCE,
        }
    }
}

/// One process's turn with the channel.
struct Exchange {
    page: SecretsPage,
    /// As it stands in the page: how many messages went back and forth, or may have.
    count: u32,
    journal: Journal,
    channel: GuestChannel,
    host: Box<dyn Stream>,
    ends: Instant,
}

impl Exchange {
    /// Ends what an earlier exchange began.
    fn settle(&mut self) -> Result<(), MessagesError> {
        let request = self.journal.pending()?;
        let sequence_number = self.channel.sequence_number(&request);
        let count = u64::from(self.count);
        // The count had risen, or its process ended before that. All else was never sent under
        // this key, or is long over.
        let last = |number: &u64| number + 1 == count || *number == count + 1;
        let pending = sequence_number.filter(last);
        let Some(number) = pending else {
            return self.journal.clear();
        };
        self.rise(number)?;
        let reply = self.send(&request)?;
        match reply.status() {
            RequestStatus::OK => {
                self.channel.start_at(number - 1);
                self.channel
                    .reply(MessageType::ReportResponse, reply.page())?;
            }
            // Its turn was before: that reply was lost.
            NOT_IN_STEP => {}
            status => return Err(MessagesError::Refused(status)),
        }
        self.journal.clear()
    }

    /// A new request, and its reply.
    fn report(
        &mut self,
        report_data: &[u8; 64],
        vmpl: u32,
    ) -> Result<([u8; REPORT_LEN], Vec<u8>), MessagesError> {
        self.channel.start_at(self.count.into());
        let number = u64::from(self.count) + 1;
        let request = self
            .channel
            .report_request(report_data, vmpl, KeySelect::Any)?;
        self.journal.keep(&request)?;
        self.rise(number)?;
        let reply = self.send(&request)?;
        match reply.status() {
            RequestStatus::OK => {}
            NOT_IN_STEP => return Err(MessagesError::OutOfStep(number)),
            status => return Err(MessagesError::Refused(status)),
        }
        let report = self.channel.report(reply.page());
        if matches!(report, Ok(_) | Err(MessageError::Status(_))) {
            self.journal.clear()?;
        }
        Ok((report?, reply.certificates().to_vec()))
    }

    /// Counts the request with this number, and its reply, before it goes out.
    fn rise(&mut self, sequence_number: u64) -> Result<(), MessagesError> {
        let count = u32::try_from(sequence_number + 1).map_err(|_| MessagesError::Exhausted)?;
        self.page.set_count(count)?;
        self.count = count;
        Ok(())
    }

    /// Sends a request, the very same again while the host is busy.
    fn send(&mut self, request: &[u8]) -> Result<ReplyFrame, FrameError> {
        let frame = RequestFrame::new(RequestKind::Extended, request)?;
        loop {
            frame.write_to(&mut self.host)?;
            let reply = ReplyFrame::read_from(&mut self.host)?;
            if reply.status() != RequestStatus::BUSY || Instant::now() >= self.ends {
                return Ok(reply);
            }
            std::thread::sleep(PAUSE);
        }
    }
}

/// How the firmware refuses a sequence number that is not the next.
const NOT_IN_STEP: RequestStatus = RequestStatus::firmware(FirmwareError::InvalidParam.code());
/// The key of VMPL 0, where a kernel without an SVSM is.
const VMPCK: u8 = 0;
const HOST_CID: u32 = 2;
const PATIENCE: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(50);
