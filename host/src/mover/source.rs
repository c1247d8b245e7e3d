//! The guest at the source, as the migration engine sees it: pages out of shared memory or out of the firmware.

use std::sync::Arc;

use casemate_crypto_migrate::guest::{
    EXTENT_PAGES, Gpn, GuestError, PAGE_SIZE, PageContent, PageRange, Refusal, SourceGuest,
};
use casemate_crypto_migrate::pages::PageSet;
use casemate_crypto_migrate::session::SessionFacts;
use casemate_crypto_migrate::transcript::ContentDigest;
use ring::digest::{SHA256, digest};

use crate::confidential::protocol::PlatformEvidence;
use crate::confidential::shared::GuestMemory;
use crate::machine::plan::Technology;
use crate::mover::agent_link::AgentLink;
use crate::mover::disks::{Disks, OfferedDisk, is_disk, range_of};
use crate::mover::evidence::{SendContext, encode, verify_target};
use crate::mover::protocol::{MoverEvent, OwnershipStep};
use crate::mover::vmm_link::{VmmLink, guest_error, unexpected};
use crate::vmm::protocol::{EXCHANGE_PAGES, MoverReply, MoverRequest, RoleError};

/// A running guest that is about to leave. The agent is polled between batches; the engine watches the flag.
pub struct SourceMachine {
    vmm: VmmLink,
    agent: Arc<AgentLink>,
    emulated_roots: Vec<[u8; 32]>,
    disks: Disks,
    released: bool,
}

impl SourceMachine {
    /// Over an attached VMM. `emulated_roots` are the software platforms that policy accepts as targets.
    pub fn new(
        vmm: VmmLink,
        agent: Arc<AgentLink>,
        emulated_roots: Vec<[u8; 32]>,
        disks: Disks,
    ) -> Self {
        Self {
            vmm,
            agent,
            emulated_roots,
            disks,
            released: false,
        }
    }

    /// Verifies the target platform and has that recorded, whatever comes of it.
    fn verified_target(
        &self,
        peer_evidence: &[u8],
        emulated: bool,
    ) -> Result<PlatformEvidence, RoleError> {
        let evidence_sha256 = hex::encode(digest(&SHA256, peer_evidence));
        let target = match verify_target(peer_evidence, &self.emulated_roots, emulated) {
            Ok(target) => target,
            Err(error) => {
                let code = error.code.clone();
                self.agent.tell(MoverEvent::TargetRefused {
                    code,
                    evidence_sha256,
                });
                return Err(error);
            }
        };
        self.agent.tell(MoverEvent::TargetVerified {
            emulated: target.emulated,
            pdh: hex::encode(target.pdh),
            evidence_sha256,
        });
        Ok(target.evidence)
    }

    /// What the peer's evidence comes to; `None` for a plain guest, of which none is wanted.
    fn target(&self, peer_evidence: &[u8]) -> Result<Option<PlatformEvidence>, RoleError> {
        match self.vmm.plan().technology {
            Technology::Sev { emulated, .. } => {
                self.verified_target(peer_evidence, emulated).map(Some)
            }
            Technology::SevEs { .. } | Technology::SevSnp { .. } => Err(RoleError::new(
                "TECHNOLOGY_CANNOT_MIGRATE",
                "no Linux kernel moves SEV-ES or SEV-SNP guests; launch the guest anew at the other site",
            )),
            Technology::None if peer_evidence.is_empty() => Ok(None),
            Technology::None => Err(RoleError::new(
                "EVIDENCE_MALFORMED",
                "platform evidence came for a plain guest",
            )),
        }
    }

    fn open_send(&mut self, target: PlatformEvidence) -> Result<Vec<u8>, RoleError> {
        let request = MoverRequest::SendStart {
            target_pdh: target.pdh,
            platform: target.platform,
            amd: target.amd,
        };
        match self.vmm.call(&request)? {
            MoverReply::SendStarted {
                policy,
                source_pdh,
                session,
            } => encode(&SendContext {
                policy,
                source_pdh,
                session,
            }),
            _ => Err(unexpected()),
        }
    }

    fn read_packets(
        &self,
        pages: &[Gpn],
        emit: &mut dyn FnMut(Gpn, PageContent<'_>),
    ) -> Result<(), RoleError> {
        for batch in pages.chunks(EXCHANGE_PAGES) {
            self.vmm.done(&MoverRequest::SendPages {
                pages: batch.iter().map(|page| page.0).collect(),
            })?;
            for (slot, &page) in batch.iter().enumerate() {
                let packet = self.vmm.exchange.packet(slot)?;
                emit(
                    page,
                    PageContent::Firmware {
                        header: &packet.header,
                        ciphertext: &packet.data,
                    },
                );
            }
        }
        Ok(())
    }
}

impl SourceMachine {
    /// Pages of memory, and the blocks of each disk that `request` asks for.
    fn with_disks(
        &self,
        memory: PageSet,
        request: fn(u8) -> MoverRequest,
    ) -> Result<PageSet, RoleError> {
        if self.disks.ranges().next().is_none() {
            return Ok(memory);
        }
        let mut all = PageSet::empty(&SourceGuest::memory(self));
        for page in memory.iter() {
            all.insert(page);
        }
        for OfferedDisk { disk, pages } in self.disks.offered() {
            let start = range_of(disk, pages).start.0;
            let blocks = self.vmm.disk_bitmap(&request(disk), pages)?;
            for block in blocks {
                all.insert(Gpn(start + block));
            }
        }
        Ok(all)
    }
}

impl SourceGuest for SourceMachine {
    fn memory(&self) -> Vec<PageRange> {
        let mut all = self.vmm.ranges();
        all.extend(self.disks.ranges());
        all
    }

    fn agreed(&mut self, session: &SessionFacts) -> Result<(), Refusal> {
        self.agent.agreed(session)
    }

    fn begin(&mut self, peer_evidence: &[u8]) -> Result<Vec<u8>, GuestError> {
        match self.target(peer_evidence).map_err(guest_error)? {
            Some(target) => self.open_send(target).map_err(guest_error),
            None => Ok(Vec::new()),
        }
    }

    fn judge(&mut self, peer_evidence: &[u8]) -> Result<(), Refusal> {
        self.target(peer_evidence)
            .map(drop)
            .map_err(|error| Refusal {
                code: error.code,
                reason: error.text,
            })
    }

    fn start_tracking(&mut self) -> Result<PageSet, GuestError> {
        self.agent.poll();
        self.vmm
            .bitmap(&MoverRequest::StartTracking)
            .and_then(|memory| self.with_disks(memory, MoverRequest::TrackDisk))
            .map_err(guest_error)
    }

    fn take_dirty(&mut self) -> Result<PageSet, GuestError> {
        self.agent.poll();
        self.vmm
            .bitmap(&MoverRequest::TakeDirty)
            .and_then(|memory| self.with_disks(memory, MoverRequest::TakeDisk))
            .map_err(guest_error)
    }

    fn read_pages(
        &mut self,
        pages: &[Gpn],
        emit: &mut dyn FnMut(Gpn, PageContent<'_>),
    ) -> Result<(), GuestError> {
        self.agent.poll();
        let memory = pages.partition_point(|page| !is_disk(*page));
        let (pages, blocks) = pages.split_at_checked(memory).unwrap_or((pages, &[]));
        self.disks.read_extents(blocks, emit).map_err(guest_error)?;
        if self.vmm.confidential() {
            self.read_packets(pages, emit).map_err(guest_error)
        } else {
            read_clear(&self.vmm.memory, pages, emit).map_err(guest_error)
        }
    }

    fn batch_pages(&self) -> usize {
        EXCHANGE_PAGES
    }

    fn throttle(&mut self, percent: u8) -> Result<(), GuestError> {
        let request = MoverRequest::Throttle { percent };
        self.vmm.done(&request).map_err(guest_error)
    }

    fn attend(&mut self) {
        self.agent.poll();
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        self.vmm.done(&MoverRequest::Pause).map_err(guest_error)
    }

    fn state(&mut self) -> Result<Vec<u8>, GuestError> {
        self.vmm
            .state(&MoverRequest::SaveState)
            .map_err(guest_error)
    }

    fn content_digest(&mut self, pages: &PageSet) -> Result<[u8; 32], GuestError> {
        no_read_back(&self.vmm).map_err(guest_error)?;
        content_digest(&self.vmm.memory, &self.disks, pages).map_err(guest_error)
    }

    fn release(&mut self) -> Result<(), GuestError> {
        self.agent
            .record(OwnershipStep::Releasing)
            .map_err(guest_error)?;
        self.released = true;
        self.vmm.done(&MoverRequest::Release).map_err(guest_error)
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.vmm.done(&MoverRequest::Resume).map_err(guest_error)?;
        if std::mem::take(&mut self.released) {
            self.agent
                .record(OwnershipStep::Resumed)
                .map_err(guest_error)?;
        }
        Ok(())
    }

    fn destroy(&mut self) -> Result<(), GuestError> {
        self.agent
            .record(OwnershipStep::Departed)
            .map_err(guest_error)
    }
}

/// What these pages hold.
pub fn content_digest(
    memory: &GuestMemory,
    disks: &Disks,
    pages: &PageSet,
) -> Result<[u8; 32], RoleError> {
    ContentDigest::over(pages, |page, into| {
        if is_disk(page) {
            return disks.read(page, into);
        }
        memory.read(address(page)?, into).map_err(RoleError::from)
    })
}

/// What lies in the memory of a guest that its processor encrypts differs from host to host.
pub(super) fn no_read_back(vmm: &VmmLink) -> Result<(), RoleError> {
    if vmm.confidential() {
        return Err(RoleError::new(
            "READ_BACK_UNSUPPORTED",
            "the memory of a confidential guest reads differently on each host; move it without `--read-back`",
        ));
    }
    Ok(())
}

/// Reads pages in clear and passes them on: neighbours as one extent, pages of zeroes as such.
pub fn read_clear(
    memory: &GuestMemory,
    pages: &[Gpn],
    emit: &mut dyn FnMut(Gpn, PageContent<'_>),
) -> Result<(), RoleError> {
    let read = |first: Gpn, data: &mut [u8]| Ok(memory.read(address(first)?, data)?);
    read_extents(pages, read, emit)
}

/// Reads pages (ascending) by extents of neighbours and passes them on.
pub(super) fn read_extents(
    pages: &[Gpn],
    read: impl Fn(Gpn, &mut [u8]) -> Result<(), RoleError>,
    emit: &mut dyn FnMut(Gpn, PageContent<'_>),
) -> Result<(), RoleError> {
    let mut buffer = [0; EXTENT_PAGES * PAGE_SIZE];
    let neighbours = pages.chunk_by(|a, b| a.0.checked_add(1) == Some(b.0));
    for extent in neighbours.flat_map(|run| run.chunks(EXTENT_PAGES)) {
        let Some(&first) = extent.first() else {
            continue;
        };
        let data = buffer
            .get_mut(..extent.len() * PAGE_SIZE)
            .unwrap_or_default();
        read(first, data)?;
        emit_runs(first, data, emit);
    }
    Ok(())
}

/// Passes on the pages of an extent, those between zero pages together.
fn emit_runs(first: Gpn, data: &[u8], emit: &mut dyn FnMut(Gpn, PageContent<'_>)) {
    let (pages, _) = data.as_chunks::<PAGE_SIZE>();
    let is_zero = |page: &[u8; PAGE_SIZE]| *page == [0; PAGE_SIZE];
    let mut at = first.0;
    for run in pages.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
        let next = at + run.len() as u64;
        if run.first().is_some_and(is_zero) {
            (at..next).for_each(|page| emit(Gpn(page), PageContent::Zero));
        } else {
            emit(Gpn(at), PageContent::Data(run.as_flattened()));
        }
        at = next;
    }
}

/// Guest physical address of a page.
pub(super) fn address(page: Gpn) -> Result<u64, RoleError> {
    page.0
        .checked_mul(PAGE_SIZE as u64)
        .ok_or_else(|| RoleError::new("BAD_MEMORY", format!("page number {} is too large", page.0)))
}
