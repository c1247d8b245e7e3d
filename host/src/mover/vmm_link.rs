//! The mover's side of a VMM: its requests, the guest's memory, the exchange memory.
//!
//! The VMM may belong to a guest that broke out: lengths and bitmaps from it are checked against the layout.

use std::os::fd::AsFd;
use std::time::Duration;

use casemate_crypto_migrate::guest::{Gpn, GuestError, PAGE_SIZE, PageRange};
use casemate_crypto_migrate::pages::PageSet;

use crate::confidential::shared::{Access, Exchange, GuestMemory, MemoryLayout};
use crate::ipc::Channel;
use crate::machine::plan::{MachinePlan, Technology};
use crate::userfault::{FaultRange, Faults};
use crate::vmm::protocol::{EXCHANGE_SIZE, MoverReply, MoverRequest, RoleError};

/// A VMM, attached.
pub struct VmmLink {
    channel: Channel,
    plan: MachinePlan,
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The exchange memory.
    pub exchange: Exchange,
    /// Faults of a guest that runs before its memory is there.
    pub faults: Option<Faults>,
}

impl VmmLink {
    /// Attaches and maps what the VMM hands over.
    pub fn attach(channel: Channel, access: Access) -> Result<Self, RoleError> {
        channel.send(&MoverRequest::Attach)?;
        let received = channel.recv::<Result<MoverReply, RoleError>>(Some(VMM_DEADLINE))?;
        let MoverReply::Attached {
            plan,
            memory,
            fault_bases,
        } = received.body?
        else {
            return Err(unexpected());
        };
        let mut handles = received.handles.into_iter();
        let (Some(guest), Some(exchange)) = (handles.next(), handles.next()) else {
            return Err(RoleError::new(
                "ROLE_PROTOCOL",
                "the VMM attached without its memory",
            ));
        };
        let layout = MemoryLayout::packed(&memory)?;
        let faults = match handles.next() {
            Some(fd) => Some(Faults::received(fd, fault_ranges(&fault_bases, &layout)?)?),
            None => None,
        };
        Ok(Self {
            memory: GuestMemory::map(guest.as_fd(), layout, access)?,
            exchange: Exchange::map(exchange.as_fd())?,
            plan: *plan,
            faults,
            channel,
        })
    }

    /// The machine, as built.
    pub fn plan(&self) -> &MachinePlan {
        &self.plan
    }

    /// Whether pages travel as packets of the secure processor.
    pub fn confidential(&self) -> bool {
        self.plan.technology != Technology::None
    }

    /// Memory that may hold pages.
    pub fn ranges(&self) -> Vec<PageRange> {
        let page = PAGE_SIZE as u64;
        let runs = self.memory.layout().runs().iter();
        runs.map(|run| PageRange {
            start: Gpn(run.gpa / page),
            count: run.length / page,
        })
        .collect()
    }

    /// One request that is answered by [`MoverReply::Done`].
    pub fn done(&self, request: &MoverRequest) -> Result<(), RoleError> {
        match self.call(request)? {
            MoverReply::Done => Ok(()),
            _ => Err(unexpected()),
        }
    }

    /// One request, one reply.
    pub fn call(&self, request: &MoverRequest) -> Result<MoverReply, RoleError> {
        self.channel.send(request)?;
        self.channel
            .recv::<Result<MoverReply, RoleError>>(Some(VMM_DEADLINE))?
            .body
    }

    /// Address of a page of the memory file, in which the runs are packed: how a snapshot counts pages.
    pub fn address_of(&self, index: u64) -> Result<u64, RoleError> {
        let offset = index.saturating_mul(PAGE_SIZE as u64);
        let runs = self.memory.layout().runs().iter();
        runs.filter_map(|run| Some((run, offset.checked_sub(run.offset)?)))
            .find(|(run, within)| *within < run.length)
            .map(|(run, within)| run.gpa + within)
            .ok_or_else(|| {
                let text = format!("no memory behind page {index} of the file");
                RoleError::new("BAD_MEMORY", text)
            })
    }

    /// The page of the memory file that an address lies in.
    pub fn index_of(&self, page: Gpn) -> Result<u64, RoleError> {
        let size = PAGE_SIZE as u64;
        let at = page.0.checked_mul(size);
        at.and_then(|at| self.memory.layout().offset(at, size))
            .map(|offset| offset / size)
            .ok_or_else(|| RoleError::new("BAD_MEMORY", format!("no memory at page {}", page.0)))
    }

    /// One request that is answered by a bitmap; the pages in it.
    pub fn bitmap(&self, request: &MoverRequest) -> Result<PageSet, RoleError> {
        let MoverReply::Bitmap { bits } = self.call(request)? else {
            return Err(unexpected());
        };
        let pages = self.memory.layout().length() / PAGE_SIZE as u64;
        if bits > pages {
            return Err(RoleError::new(
                "ROLE_PROTOCOL",
                format!("the VMM's bitmap has {bits} bits for {pages} pages"),
            ));
        }
        let bytes = self.exchange.read(bits.div_ceil(64) * 8)?;
        let (words, _) = bytes.as_chunks();
        let words = words.iter().map(|word| u64::from_le_bytes(*word));
        Ok(PageSet::from_words(&self.ranges(), words))
    }

    /// One request that is answered by a bitmap of a disk of so many blocks; the numbers of those in it.
    pub fn disk_bitmap(&self, request: &MoverRequest, blocks: u64) -> Result<Vec<u64>, RoleError> {
        let MoverReply::DiskBitmap { words } = self.call(request)? else {
            return Err(unexpected());
        };
        if words != blocks.div_ceil(64) {
            return Err(RoleError::new(
                "ROLE_PROTOCOL",
                format!("the VMM's bitmap has {words} words for {blocks} blocks"),
            ));
        }
        let bytes = self.exchange.read(words.saturating_mul(8))?;
        let (words, _) = bytes.as_chunks();
        let set = (0u64..).zip(words).flat_map(|(at, word)| {
            let word = u64::from_le_bytes(*word);
            (0..64)
                .filter(move |bit| word & (1 << bit) != 0)
                .map(move |bit| at * 64 + bit)
        });
        Ok(set.filter(|block| *block < blocks).collect())
    }

    /// One request that is answered by the machine's state.
    pub fn state(&self, request: &MoverRequest) -> Result<Vec<u8>, RoleError> {
        let MoverReply::State { length } = self.call(request)? else {
            return Err(unexpected());
        };
        if length > EXCHANGE_SIZE as u64 {
            return Err(RoleError::new(
                "ROLE_PROTOCOL",
                format!("the VMM's state of {length} bytes is larger than the exchange memory"),
            ));
        }
        Ok(self.exchange.read(length)?)
    }
}

/// Where faults come from: a range for each run of the layout, in its order.
fn fault_ranges(bases: &[u64], layout: &MemoryLayout) -> Result<Vec<FaultRange>, RoleError> {
    if bases.len() != layout.runs().len() {
        return Err(RoleError::new(
            "ROLE_PROTOCOL",
            "the VMM's faults are of other ranges than its memory",
        ));
    }
    let runs = bases.iter().zip(layout.runs());
    Ok(runs
        .map(|(base, run)| FaultRange {
            base: *base,
            length: run.length,
        })
        .collect())
}

/// A role's error as the engine takes it; the code stays in front.
pub fn guest_error(error: impl Into<RoleError>) -> GuestError {
    GuestError(error.into().to_string())
}

pub(super) fn unexpected() -> RoleError {
    RoleError::new("ROLE_PROTOCOL", "the VMM's reply has no place here")
}

/// How long the VMM may take for a reply.
const VMM_DEADLINE: Duration = Duration::from_secs(30);
