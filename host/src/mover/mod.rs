//! The migration role: a guest's memory and a peer's socket in, the protected stream between them.
//!
//! One process a move, or a question about one, or a snapshot, or a restore. The cell closes before the first byte of the peer is read. The host's key,
//! the decision to admit and the record of who owns the guest stay with the agent.

pub mod agent_link;
pub mod destination;
pub mod disks;
pub mod engine;
pub mod evidence;
pub mod pager;
pub mod protocol;
pub mod restore;
pub mod settlement;
pub mod snapshot;
pub mod source;
pub mod vmm_link;

use std::sync::Arc;

use crate::ipc::Channel;
use crate::mover::agent_link::AgentLink;
use crate::mover::protocol::{MoverCommand, MoverEvent};
use crate::role::Cell;
use crate::sandbox::Role;
use crate::vmm::protocol::RoleError;

/// Main of the `mover` role: enters the jail, then [`run`].
pub fn main() -> Result<(), RoleError> {
    let (channel, cell) = crate::role::enter(Role::Mover)?;
    run(channel, cell)
}

/// Runs the role for one move: closes the cell, says [`MoverEvent::Ready`], waits for the start, moves, and
/// says [`MoverEvent::Outcome`] last.
pub fn run(channel: Channel, mut cell: Box<dyn Cell + Send>) -> Result<(), RoleError> {
    // Which of them serves is known only once the cell is closed.
    casemate_crypto_migrate::Provider::ALL
        .iter()
        .for_each(|provider| provider.warm_up());
    cell.close()?;
    let agent = Arc::new(AgentLink::new(channel, cell));
    agent.tell(MoverEvent::Ready);
    let outcome = match agent.start()? {
        (MoverCommand::Source(start), handles) => engine::run_source(&agent, *start, handles),
        (MoverCommand::Assess(start), handles) => engine::run_assessment(&agent, *start, handles),
        (MoverCommand::Destination(start), handles) => {
            engine::run_destination(&agent, *start, handles)
        }
        (MoverCommand::Settle(start), handles) => settlement::run(&agent, &start, handles),
        (MoverCommand::Snapshot(start), handles) => snapshot::run(&agent, *start, handles),
        (MoverCommand::Restore(start), handles) => restore::run(&agent, start, handles),
        _ => {
            return Err(RoleError::new(
                "ROLE_PROTOCOL",
                "the agent's first command starts no move",
            ));
        }
    };
    agent.tell(MoverEvent::Outcome(outcome));
    Ok(())
}

#[cfg(test)]
mod kvm_tests;
#[cfg(test)]
mod tests;
