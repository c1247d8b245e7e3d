//! The guest that is being built at the destination, as the migration engine sees it.
//!
//! The engine has opened every page's seal before it calls; what the page is *for* is still checked here: a
//! clear page never goes into a SEV guest, a packet never into a plain one, and nothing outside the memory.

use std::sync::Arc;

use casemate_crypto_migrate::guest::{
    Admission, DestinationGuest, Gpn, GuestError, GuestOffer, PACKET_HEADER_SIZE, PAGE_SIZE,
    PageContent, Refusal,
};
use casemate_crypto_migrate::identity::PeerIdentity;
use casemate_crypto_migrate::pages::PageSet;
use casemate_crypto_migrate::session::SessionFacts;
use casemate_crypto_migrate::settlement::Settlement;

use crate::confidential::protocol::PlatformEvidence;
use crate::confidential::shared::Access;
use crate::ipc::Channel;
use crate::mover::agent_link::AgentLink;
use crate::mover::disks::{self, Disks};
use crate::mover::evidence::{SendContext, decode, encode};
use crate::mover::protocol::{AgentAnswer, MoverRequestToAgent, OwnershipStep, PeerName};
use crate::mover::settlement;
use crate::mover::source::{address, content_digest, no_read_back};
use crate::mover::vmm_link::{VmmLink, guest_error, unexpected};
use crate::vmm::protocol::{EXCHANGE_PAGES, EXCHANGE_SIZE, MoverReply, MoverRequest, RoleError};

/// A guest that is about to arrive.
pub struct DestinationMachine {
    agent: Arc<AgentLink>,
    machine: Option<Machine>,
}

/// What exists once the agent has admitted the guest.
struct Machine {
    vmm: VmmLink,
    disks: Disks,
    /// Pages of packets in the exchange memory, in slot order.
    batch: Vec<u64>,
    /// One bit a page: whether a clear page was ever written (fresh memory is zero).
    written: Vec<u64>,
}

impl DestinationMachine {
    /// Nothing exists yet; the agent decides at the offer.
    pub fn new(agent: Arc<AgentLink>) -> Self {
        Self {
            agent,
            machine: None,
        }
    }

    fn build(&mut self, offer: &GuestOffer, peer: &PeerIdentity) -> Result<Admission, RoleError> {
        let request = MoverRequestToAgent::Admit {
            offer: Box::new(offer.clone()),
            peer: PeerName::of(peer),
        };
        let (memory, offered) = disks::split(&offer.memory)?;
        let (answer, mut handles) = self.agent.ask(request)?;
        match answer {
            AgentAnswer::Admitted => {}
            AgentAnswer::Refused { code, reason } => return Err(RoleError::new(&code, reason)),
            _ => return Err(RoleError::new("ROLE_PROTOCOL", "the agent did not decide")),
        }
        let images = handles.split_off(handles.len().min(1));
        let disks = Disks::new(offered, images)?;
        let [channel] = <[_; 1]>::try_from(handles)
            .map_err(|_| RoleError::new("ROLE_PROTOCOL", "admitted without a VMM"))?;
        let vmm = VmmLink::attach(Channel::from_fd(channel), Access::ReadWrite)?;
        if vmm.ranges() != memory || vmm.plan().vm_id != offer.vm_id {
            return Err(RoleError::new(
                "OFFER_MISMATCH",
                "the machine that was built is not the one that was offered",
            ));
        }
        let evidence = if vmm.confidential() {
            platform_evidence(&vmm)?
        } else {
            Vec::new()
        };
        let words = vmm.memory.layout().length() / PAGE_SIZE as u64 / 64 + 1;
        self.machine = Some(Machine {
            vmm,
            disks,
            batch: Vec::new(),
            written: vec![0; usize::try_from(words).unwrap_or(0)],
        });
        Ok(Admission { evidence })
    }

    fn admitted(&mut self) -> Result<&mut Machine, GuestError> {
        self.machine.as_mut().ok_or_else(|| {
            guest_error(RoleError::new(
                "ROLE_PROTOCOL",
                "no guest has been admitted",
            ))
        })
    }
}

impl DestinationGuest for DestinationMachine {
    fn agreed(&mut self, session: &SessionFacts) -> Result<(), Refusal> {
        self.agent.agreed(session)
    }

    fn admit(&mut self, offer: &GuestOffer, peer: &PeerIdentity) -> Result<Admission, Refusal> {
        self.build(offer, peer).map_err(|error| Refusal {
            code: error.code,
            reason: error.text,
        })
    }

    fn settle(
        &mut self,
        question: &GuestOffer,
        peer: &PeerIdentity,
    ) -> Result<Settlement, Refusal> {
        settlement::answer(&self.agent, question, peer)
    }

    fn begin(&mut self, start: &[u8]) -> Result<(), GuestError> {
        let machine = self.admitted()?;
        machine.begin(start).map_err(guest_error)
    }

    fn write_pages(&mut self, start: Gpn, content: PageContent<'_>) -> Result<(), GuestError> {
        let machine = self.admitted()?;
        machine.write(start, content).map_err(guest_error)
    }

    fn flush(&mut self) -> Result<(), GuestError> {
        let machine = self.admitted()?;
        machine.flush().map_err(guest_error)?;
        machine.disks.sync().map_err(guest_error)
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), GuestError> {
        let machine = self.admitted()?;
        machine.restore(state).map_err(guest_error)
    }

    fn content_digest(&mut self, pages: &PageSet) -> Result<[u8; 32], GuestError> {
        let machine = self.admitted()?;
        no_read_back(&machine.vmm).map_err(guest_error)?;
        machine.flush().map_err(guest_error)?;
        content_digest(&machine.vmm.memory, &machine.disks, pages).map_err(guest_error)
    }

    fn activate(&mut self, epoch: u64) -> Result<u32, GuestError> {
        self.agent
            .record(OwnershipStep::Activating { epoch })
            .map_err(guest_error)?;
        let vmm = &self.admitted()?.vmm;
        // Its answer says that the addresses have been announced too.
        vmm.done(&MoverRequest::Activate).map_err(guest_error)?;
        Ok(u32::try_from(vmm.plan().nets.len()).unwrap_or(u32::MAX))
    }

    fn abandon(&mut self) {
        // The VMM sees its mover gone; the agent ends it when it hears the outcome.
        self.machine = None;
    }
}

impl Machine {
    fn begin(&mut self, start: &[u8]) -> Result<(), RoleError> {
        if !self.vmm.confidential() {
            return match start {
                [] => Ok(()),
                _ => Err(RoleError::new(
                    "EVIDENCE_MALFORMED",
                    "a send context came for a plain guest",
                )),
            };
        }
        let SendContext {
            policy,
            source_pdh,
            session,
        } = decode(start, "send context")?;
        self.vmm.done(&MoverRequest::ReceiveStart {
            policy,
            source_pdh,
            session,
        })
    }

    fn write(&mut self, page: Gpn, content: PageContent<'_>) -> Result<(), RoleError> {
        if disks::is_disk(page) {
            return self.disks.write(page, content);
        }
        let at = address(page)?;
        let length = match content {
            PageContent::Data(bytes) => bytes.len(),
            PageContent::Zero | PageContent::Firmware { .. } => PAGE_SIZE,
        };
        let offset = self
            .vmm
            .memory
            .layout()
            .offset(at, length as u64)
            .ok_or_else(|| RoleError::new("BAD_MEMORY", format!("no memory at page {}", page.0)))?;
        match (self.vmm.confidential(), content) {
            (true, PageContent::Firmware { header, ciphertext }) => {
                self.queue(page, header, ciphertext)
            }
            (false, PageContent::Data(bytes)) if bytes.len() % PAGE_SIZE == 0 => {
                for step in (0..length).step_by(PAGE_SIZE) {
                    self.mark(offset + step as u64);
                }
                Ok(self.vmm.memory.write(at, bytes)?)
            }
            (false, PageContent::Zero) if self.is_marked(offset) => {
                Ok(self.vmm.memory.write(at, &[0; PAGE_SIZE])?)
            }
            (false, PageContent::Zero) => Ok(()),
            _ => Err(RoleError::new(
                "PAGE_KIND",
                format!(
                    "page {} travels in a way this guest's technology has not",
                    page.0
                ),
            )),
        }
    }

    fn queue(&mut self, page: Gpn, header: &[u8], ciphertext: &[u8]) -> Result<(), RoleError> {
        if header.len() != PACKET_HEADER_SIZE || ciphertext.len() != PAGE_SIZE {
            return Err(RoleError::new(
                "PAGE_KIND",
                format!("the packet of page {} has the wrong size", page.0),
            ));
        }
        if self.batch.len() >= EXCHANGE_PAGES {
            self.flush()?;
        }
        self.vmm
            .exchange
            .put_packet(self.batch.len(), header, ciphertext)?;
        self.batch.push(page.0);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), RoleError> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let pages = std::mem::take(&mut self.batch);
        self.vmm.done(&MoverRequest::ReceivePages { pages })
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), RoleError> {
        self.flush()?;
        if state.len() > EXCHANGE_SIZE {
            return Err(RoleError::new(
                "STATE_TOO_LARGE",
                format!(
                    "machine state of {} bytes, {EXCHANGE_SIZE} at most",
                    state.len()
                ),
            ));
        }
        self.vmm.exchange.write(state)?;
        self.vmm.done(&MoverRequest::RestoreState {
            length: state.len() as u64,
        })
    }

    fn mark(&mut self, offset: u64) {
        let (word, bit) = place(offset);
        if let Some(word) = self.written.get_mut(word) {
            *word |= bit;
        }
    }

    fn is_marked(&self, offset: u64) -> bool {
        let (word, bit) = place(offset);
        self.written.get(word).is_none_or(|word| word & bit != 0)
    }
}

fn platform_evidence(vmm: &VmmLink) -> Result<Vec<u8>, RoleError> {
    match vmm.call(&MoverRequest::PlatformEvidence)? {
        MoverReply::Evidence { pdh, platform, amd } => {
            encode(&PlatformEvidence { pdh, platform, amd })
        }
        _ => Err(unexpected()),
    }
}

/// Word and bit of the page at a file offset.
fn place(offset: u64) -> (usize, u64) {
    let page = offset / PAGE_SIZE as u64;
    (
        usize::try_from(page / 64).unwrap_or(usize::MAX),
        1 << (page % 64),
    )
}
