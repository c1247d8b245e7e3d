//! Memory that never changes, as the guest of the migration engine.

use casemate_crypto_migrate::guest::{
    Admission, DestinationGuest, Gpn, GuestError, GuestOffer, PAGE_SIZE, PageContent, PageRange,
    Refusal, SourceGuest,
};
use casemate_crypto_migrate::identity::PeerIdentity;
use casemate_crypto_migrate::pages::PageSet;
use casemate_crypto_migrate::session::SessionFacts;
use casemate_crypto_migrate::settlement::Settlement;

use super::memory::BenchMemory;
use crate::confidential::shared::{GuestMemory, SharedError};
use crate::mover::disks::Disks;
use crate::mover::source::{content_digest, read_clear};
use crate::vmm::protocol::EXCHANGE_PAGES;

/// A guest at the source.
pub struct Leaving<'a>(pub &'a BenchMemory);

/// The same at the destination.
pub struct Arriving<'a>(pub &'a BenchMemory);

impl SourceGuest for Leaving<'_> {
    fn agreed(&mut self, _: &SessionFacts) -> Result<(), Refusal> {
        // No policy: both ends are this program's own.
        Ok(())
    }

    fn memory(&self) -> Vec<PageRange> {
        self.0.ranges()
    }
    fn begin(&mut self, _: &[u8]) -> Result<Vec<u8>, GuestError> {
        Ok(Vec::new())
    }
    fn start_tracking(&mut self) -> Result<PageSet, GuestError> {
        Ok(PageSet::all(&self.0.ranges()))
    }
    fn take_dirty(&mut self) -> Result<PageSet, GuestError> {
        Ok(PageSet::empty(&self.0.ranges()))
    }
    fn read_pages(
        &mut self,
        pages: &[Gpn],
        emit: &mut dyn FnMut(Gpn, PageContent<'_>),
    ) -> Result<(), GuestError> {
        read_clear(&self.0.guest, pages, emit).map_err(|e| GuestError(e.to_string()))
    }
    fn batch_pages(&self) -> usize {
        EXCHANGE_PAGES
    }
    fn pause(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
    fn state(&mut self) -> Result<Vec<u8>, GuestError> {
        Ok(vec![0; STATE_SIZE])
    }
    fn judge(&mut self, _: &[u8]) -> Result<(), Refusal> {
        Ok(())
    }
    fn throttle(&mut self, _: u8) -> Result<(), GuestError> {
        Ok(())
    }
    fn attend(&mut self) {}
    fn content_digest(&mut self, pages: &PageSet) -> Result<[u8; 32], GuestError> {
        digest_of(&self.0.guest, pages)
    }
    fn release(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
    fn resume(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
    fn destroy(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
}

impl DestinationGuest for Arriving<'_> {
    fn agreed(&mut self, _: &SessionFacts) -> Result<(), Refusal> {
        // No policy: both ends are this program's own.
        Ok(())
    }

    fn admit(&mut self, offer: &GuestOffer, _: &PeerIdentity) -> Result<Admission, Refusal> {
        if offer.memory == self.0.ranges() {
            return Ok(Admission {
                evidence: Vec::new(),
            });
        }
        Err(Refusal {
            code: "OFFER_MISMATCH".to_owned(),
            reason: "another size of memory".to_owned(),
        })
    }
    fn settle(&mut self, _: &GuestOffer, _: &PeerIdentity) -> Result<Settlement, Refusal> {
        Ok(Settlement::Never)
    }
    fn begin(&mut self, _: &[u8]) -> Result<(), GuestError> {
        Ok(())
    }
    fn write_pages(&mut self, page: Gpn, content: PageContent<'_>) -> Result<(), GuestError> {
        let at = page.0.saturating_mul(PAGE_SIZE as u64);
        let failed = |e: SharedError| GuestError(e.to_string());
        match content {
            PageContent::Data(bytes) => self.0.guest.write(at, bytes).map_err(failed),
            PageContent::Zero => self.0.guest.write(at, &[0; PAGE_SIZE]).map_err(failed),
            PageContent::Firmware { .. } => Err(GuestError("a packet for plain memory".to_owned())),
        }
    }
    fn flush(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
    fn restore(&mut self, _: &[u8]) -> Result<(), GuestError> {
        Ok(())
    }
    fn content_digest(&mut self, pages: &PageSet) -> Result<[u8; 32], GuestError> {
        digest_of(&self.0.guest, pages)
    }
    fn activate(&mut self, _: u64) -> Result<u32, GuestError> {
        Ok(0)
    }
    fn abandon(&mut self) {}
}

fn digest_of(memory: &GuestMemory, pages: &PageSet) -> Result<[u8; 32], GuestError> {
    content_digest(memory, &Disks::default(), pages).map_err(|e| GuestError(e.to_string()))
}

/// About what two vCPUs and four devices save.
const STATE_SIZE: usize = 32 * 1024;
