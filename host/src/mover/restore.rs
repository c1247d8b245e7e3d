//! Makes a guest from a sealed file: at once, or page by page as it asks for them.
//!
//! The file is not believed: its header is parsed within bounds, then the agent is asked for the secret, and nothing of
//! the file reaches a machine before its seal has opened.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use casemate_crypto_migrate::guest::PAGE_SIZE;
use casemate_crypto_migrate::vault::Reader;
use zeroize::Zeroizing;

use crate::confidential::shared::Access;
use crate::ipc::Channel;
use crate::mover::agent_link::AgentLink;
use crate::mover::pager::Pager;
use crate::mover::protocol::{
    AgentAnswer, GuestHere, MoveOutcome, MoveReport, MoverEvent, MoverRequestToAgent,
    OwnershipStep, RestoreStart, SnapshotClaim,
};
use crate::mover::snapshot::secret;
use crate::mover::vmm_link::VmmLink;
use crate::vmm::protocol::{EXCHANGE_SIZE, MoverRequest, RoleError};

/// Restores a guest. Descriptor: the file.
pub fn run(agent: &Arc<AgentLink>, start: RestoreStart, handles: Vec<OwnedFd>) -> MoveOutcome {
    match restore(agent, start, handles) {
        Ok(report) => MoveOutcome::Moved(report),
        Err(error) => MoveOutcome::Failed {
            code: error.code,
            reason: error.text,
            guest: GuestHere::Absent,
        },
    }
}

fn restore(
    agent: &Arc<AgentLink>,
    start: RestoreStart,
    handles: Vec<OwnedFd>,
) -> Result<MoveReport, RoleError> {
    let begun = Instant::now();
    let [file] = <[OwnedFd; 1]>::try_from(handles)
        .map_err(|_| RoleError::new("ROLE_PROTOCOL", "one descriptor was due"))?;
    let file = File::from(file);
    let secret = ask_secret(agent, &file)?;
    let snapshot = Reader::open(&file, &secret)?;
    let mut vmm = admitted(agent, &snapshot, start)?;
    let state = snapshot.state();
    if state.len() > EXCHANGE_SIZE {
        return Err(RoleError::new(
            "STATE_TOO_LARGE",
            "machine state of the snapshot",
        ));
    }
    vmm.exchange.write(state)?;
    let length = state.len() as u64;
    if start.on_demand {
        on_demand(agent, &snapshot, &mut vmm, length, begun)?;
    } else {
        fill(&snapshot, &vmm)?;
        set_going(agent, &vmm, length, begun)?;
    }
    let header = snapshot.header();
    Ok(MoveReport {
        pages: header.pages,
        zero_pages: header.pages - header.data_pages,
        bytes: header.data_pages * PAGE_SIZE as u64,
        total_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
        ..MoveReport::default()
    })
}

fn ask_secret(agent: &AgentLink, file: &File) -> Result<Zeroizing<[u8; 32]>, RoleError> {
    let header = Reader::claim(file)?;
    let claim = SnapshotClaim {
        snapshot_id: header.snapshot_id,
        vm_id: header.vm_id,
        generation: header.generation,
    };
    match agent.ask(MoverRequestToAgent::SnapshotKey(claim))?.0 {
        AgentAnswer::SnapshotKey { secret: bytes } => secret(&Zeroizing::new(bytes)),
        _ => Err(RoleError::new("ROLE_PROTOCOL", "the agent gave no key")),
    }
}

/// A machine that waits for what the snapshot holds.
fn admitted(
    agent: &AgentLink,
    snapshot: &Reader<'_, File>,
    start: RestoreStart,
) -> Result<VmmLink, RoleError> {
    let request = MoverRequestToAgent::AdmitSnapshot {
        description: snapshot.description().to_vec(),
    };
    let (answer, handles) = agent.ask(request)?;
    let AgentAnswer::Admitted = answer else {
        return Err(RoleError::new("ROLE_PROTOCOL", "the agent did not decide"));
    };
    let [channel] = <[_; 1]>::try_from(handles)
        .map_err(|_| RoleError::new("ROLE_PROTOCOL", "admitted without a VMM"))?;
    // On demand nothing may be written by a mapping: the guest would see half a page.
    let access = if start.on_demand {
        Access::ReadOnly
    } else {
        Access::ReadWrite
    };
    let vmm = VmmLink::attach(Channel::from_fd(channel), access)?;
    let header = snapshot.header();
    let same = vmm.plan().vm_id == header.vm_id;
    if same == start.copy || vmm.memory.layout().length() != header.pages * PAGE_SIZE as u64 {
        return Err(RoleError::new(
            "SNAPSHOT_MISMATCH",
            "the machine that was built is not the snapshot's",
        ));
    }
    Ok(vmm)
}

/// All pages; those that the snapshot does not have are zero in fresh memory.
fn fill(snapshot: &Reader<'_, File>, vmm: &VmmLink) -> Result<(), RoleError> {
    let mut slice = vec![0u8; SLICE_PAGES as usize * PAGE_SIZE];
    for (first, count) in snapshot.runs() {
        let mut page = first;
        while page < first + count {
            let pages = SLICE_PAGES.min(first + count - page);
            let bytes = slice
                .get_mut(..pages as usize * PAGE_SIZE)
                .unwrap_or_default();
            snapshot.read(page, bytes)?;
            for (page, bytes) in (page..).zip(bytes.chunks_exact(PAGE_SIZE)) {
                vmm.memory.write(vmm.address_of(page)?, bytes)?;
            }
            page += pages;
        }
    }
    Ok(())
}

/// The guest runs while its pages come. A page that cannot be opened is its end: it never sees another one.
fn on_demand(
    agent: &Arc<AgentLink>,
    snapshot: &Reader<'_, File>,
    vmm: &mut VmmLink,
    length: u64,
    begun: Instant,
) -> Result<(), RoleError> {
    let faults = vmm.faults.take().ok_or_else(|| {
        RoleError::new("ROLE_PROTOCOL", "the VMM has no way to wait for its pages")
    })?;
    let pager = Pager::new(faults, snapshot);
    let running = AtomicBool::new(false);
    std::thread::scope(|threads| {
        let pages = threads.spawn(|| {
            // The agent is listened to meanwhile: it may cancel, or ask for the state of the cell.
            let served = pager.serve(&running, || {
                agent.poll();
                agent.cancelled()
            });
            if let Err(error) = &served {
                // At once: a vCPU waits for the page, and the VMM with it.
                agent.tell(MoverEvent::PageLost {
                    code: error.code.clone(),
                });
            }
            served
        });
        let gone = set_going(agent, vmm, length, begun);
        // Whether it runs or not, the pager shall come to its end.
        running.store(true, Ordering::Release);
        if gone.is_err() {
            agent.give_up();
        }
        let served = pages
            .join()
            .unwrap_or_else(|_| Err(RoleError::new("INTERNAL", "the pager failed")));
        // What the pager says is the cause, what the VMM says its consequence.
        match (served, gone) {
            (Err(error), Ok(())) => Err(error),
            (Err(error), Err(_)) if error.code != "CANCELLED" => Err(error),
            (_, gone) => gone,
        }
    })
}

fn set_going(
    agent: &AgentLink,
    vmm: &VmmLink,
    length: u64,
    begun: Instant,
) -> Result<(), RoleError> {
    vmm.done(&MoverRequest::RestoreState { length })?;
    // The agent knows which epoch follows.
    agent.record(OwnershipStep::Activating { epoch: 0 })?;
    vmm.done(&MoverRequest::Activate)?;
    agent.tell(MoverEvent::Running {
        after_us: u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX),
    });
    Ok(())
}

const SLICE_PAGES: u64 = 64;
