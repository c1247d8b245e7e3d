//! Writes a guest to a sealed file: memory by read-only mapping, state from its VMM, one secret from the agent.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use casemate_crypto_migrate::guest::PAGE_SIZE;
use casemate_crypto_migrate::vault::{Facts, VaultError, Writer};
use zeroize::{Zeroize, Zeroizing};

use crate::confidential::shared::Access;
use crate::ipc::Channel;
use crate::mover::agent_link::AgentLink;
use crate::mover::protocol::{
    AgentAnswer, GuestHere, MoveOutcome, MoveReport, MoverRequestToAgent, SnapshotStart,
};
use crate::mover::vmm_link::VmmLink;
use crate::vmm::protocol::{MoverRequest, RoleError};

/// Takes a snapshot. Descriptors: the VMM's channel, the empty file.
pub fn run(agent: &Arc<AgentLink>, start: SnapshotStart, handles: Vec<OwnedFd>) -> MoveOutcome {
    match take(agent, start, handles) {
        Ok(report) => MoveOutcome::Moved(report),
        Err((error, guest)) => MoveOutcome::Failed {
            code: error.code,
            reason: error.text,
            guest,
        },
    }
}

fn take(
    agent: &Arc<AgentLink>,
    mut start: SnapshotStart,
    handles: Vec<OwnedFd>,
) -> Result<MoveReport, (RoleError, GuestHere)> {
    let untouched = |error: RoleError| (error, GuestHere::Runs);
    let [vmm, file] = <[OwnedFd; 2]>::try_from(handles)
        .map_err(|_| untouched(RoleError::new("ROLE_PROTOCOL", "two descriptors were due")))?;
    let file = File::from(file);
    let vmm = VmmLink::attach(Channel::from_fd(vmm), Access::ReadOnly).map_err(untouched)?;
    if vmm.confidential() {
        return Err(untouched(RoleError::new(
            "TECHNOLOGY_CANNOT_SNAPSHOT",
            "the guest is confidential",
        )));
    }
    let begun = Instant::now();
    let sealed = vmm
        .done(&MoverRequest::Pause)
        .and_then(|()| seal(agent, &start, &vmm, &file));
    start.secret.zeroize();
    match sealed {
        Ok(report) if start.stop => {
            // Its locks off: nothing starts it again but the agent.
            vmm.done(&MoverRequest::Release).map_err(untouched)?;
            Ok(timed(report, begun))
        }
        Ok(report) => match vmm.done(&MoverRequest::Resume) {
            Ok(()) => Ok(timed(report, begun)),
            Err(error) => Err((error, GuestHere::Stopped)),
        },
        Err(error) => match vmm.done(&MoverRequest::Resume) {
            Ok(()) => Err((error, GuestHere::Runs)),
            Err(_) => Err((error, GuestHere::Stopped)),
        },
    }
}

fn seal(
    agent: &Arc<AgentLink>,
    start: &SnapshotStart,
    vmm: &VmmLink,
    file: &File,
) -> Result<MoveReport, RoleError> {
    let state = vmm.state(&MoverRequest::SaveState)?;
    let AgentAnswer::Description { description } =
        agent.ask(MoverRequestToAgent::DescribeSnapshot)?.0
    else {
        return Err(RoleError::new(
            "ROLE_PROTOCOL",
            "the agent did not describe the guest",
        ));
    };
    let secret = secret(&start.secret)?;
    let facts = Facts {
        snapshot_id: start.snapshot_id,
        vm_id: vmm.plan().vm_id,
        generation: start.generation,
        pages: vmm.memory.layout().length() / PAGE_SIZE as u64,
    };
    let mut writer = Writer::new(file, &secret, facts)?;
    let mut page_bytes = [0u8; PAGE_SIZE];
    for (number, page) in vmm.bitmap(&MoverRequest::Populated)?.iter().enumerate() {
        if number.is_multiple_of(POLL_PAGES) {
            agent.poll();
            if agent.cancelled() {
                return Err(RoleError::new("CANCELLED", "the snapshot was given up"));
            }
        }
        let index = vmm.index_of(page)?;
        vmm.memory.read(vmm.address_of(index)?, &mut page_bytes)?;
        writer.page(index, &page_bytes)?;
    }
    let header = writer.finish(&description, &state)?;
    Ok(MoveReport {
        pages: header.pages,
        zero_pages: header.pages - header.data_pages,
        bytes: header.data_pages * PAGE_SIZE as u64,
        ..MoveReport::default()
    })
}

fn timed(report: MoveReport, begun: Instant) -> MoveReport {
    let elapsed = begun.elapsed();
    MoveReport {
        downtime_ms: elapsed.as_secs_f64() * 1000.0,
        total_ms: u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
        ..report
    }
}

/// A secret as it comes over the channel.
pub(super) fn secret(bytes: &[u8]) -> Result<Zeroizing<[u8; 32]>, RoleError> {
    let secret = <[u8; 32]>::try_from(bytes);
    secret
        .map(Zeroizing::new)
        .map_err(|_| RoleError::new("ROLE_PROTOCOL", "a secret has 32 bytes"))
}

impl From<VaultError> for RoleError {
    fn from(error: VaultError) -> Self {
        Self::new(error.code(), error)
    }
}

/// The agent is listened to after so many pages.
const POLL_PAGES: usize = 1024;
