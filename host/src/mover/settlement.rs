//! A question to the peer: who has a guest whose commit it did not answer? And its answer, where this host is asked.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use casemate_crypto_migrate::guest::{GuestOffer, Refusal};
use casemate_crypto_migrate::identity::PeerIdentity;
use casemate_crypto_migrate::settlement::{Settlement, question, settle};
use casemate_crypto_migrate::source::SourceConfig;

use crate::mover::agent_link::AgentLink;
use crate::mover::engine::{WatchedSocket, failed, local, take, translate};
use crate::mover::protocol::{
    AgentAnswer, GuestHere, MoveOutcome, MoverEvent, MoverRequestToAgent, PeerName, SettleStart,
};
use crate::vmm::protocol::RoleError;

/// Asks the peer. Descriptor: the connected socket.
pub fn run(agent: &Arc<AgentLink>, start: &SettleStart, handles: Vec<OwnedFd>) -> MoveOutcome {
    let (config, socket) = match prepare(agent, start, handles) {
        Ok(prepared) => prepared,
        Err(error) => return failed(error, GuestHere::InDoubt),
    };
    let question = question(start.vm_id, &start.name, start.epoch);
    let mut progress = |event| agent.tell(MoverEvent::Progress(translate(event)));
    let agreed = &mut |session: &_| agent.agreed(session);
    match settle(socket, &config, &question, agreed, &mut progress) {
        Ok(settlement) => MoveOutcome::Settled(settlement),
        Err(error) => failed(RoleError::new(error.code(), &error), GuestHere::InDoubt),
    }
}

fn prepare(
    agent: &Arc<AgentLink>,
    start: &SettleStart,
    handles: Vec<OwnedFd>,
) -> Result<(SourceConfig, WatchedSocket), RoleError> {
    let [socket] = take(handles)?;
    let peers = std::slice::from_ref(&start.peer);
    let local = local(agent, &start.credentials, peers, start.provider.as_deref())?;
    let mut config = SourceConfig::new(local, &start.peer.name);
    config.cancel = agent.cancel_flag();
    Ok((config, WatchedSocket::new(socket, agent.clone())))
}

/// Passes a peer's question on to the agent, which alone knows.
pub fn answer(
    agent: &AgentLink,
    question: &GuestOffer,
    peer: &PeerIdentity,
) -> Result<Settlement, Refusal> {
    let request = MoverRequestToAgent::Settle {
        question: Box::new(question.clone()),
        peer: PeerName::of(peer),
    };
    let refusal = |code: String, reason: String| Err(Refusal { code, reason });
    match agent.ask(request) {
        Ok((AgentAnswer::Settled(settlement), _)) => Ok(settlement),
        Ok((AgentAnswer::Refused { code, reason }, _)) => refusal(code, reason),
        Ok(_) => refusal("ROLE_PROTOCOL".into(), "the agent did not answer".into()),
        Err(error) => refusal(error.code, error.text),
    }
}
