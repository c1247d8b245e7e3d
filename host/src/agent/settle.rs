//! A commit that was not answered: the peer is asked who has the guest, and its answer decides. Silence never does.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use casemate_crypto_migrate::guest::GuestOffer;
use casemate_crypto_migrate::settlement::Settlement;
use casemate_policy::ledger::{Entry, Outcome};

use crate::agent::Agent;
use crate::agent::api::moves::Settled;
use crate::agent::api::{Answer, Failure};
use crate::agent::authority::Caller;
use crate::agent::guest::Guest;
use crate::agent::move_records::MoveRecords;
use crate::agent::mover_process::MoverProcess;
use crate::agent::outgoing::connect;
use crate::agent::record::{Ownership, OwnershipState};
use crate::agent::transfer::{peer_entry, provider_name, role_error};
use crate::agent::vmm_process::lock;
use crate::mover::protocol::{
    AgentAnswer, MoveOutcome, MoverCommand, MoverRequestToAgent, PeerName, SettleStart,
};
use crate::vmm::protocol::VmmRequest;

/// A guest whose commit was not answered, as its record has it.
struct Doubt {
    name: String,
    vm_id: [u8; 16],
    /// The epoch that this host held.
    held: u64,
    peer: String,
    /// Its paused machine; none if that ended with its agent.
    guest: Option<Arc<Guest>>,
}

impl Agent {
    /// `casemate settle`: asks once.
    pub(super) fn settle(&self, caller: &Caller, name: &str) -> Result<Answer, Failure> {
        self.settle_once(caller, name).map(Answer::Settled)
    }

    /// Right after a move whose commit was not answered: asks a few times, as the way may be broken for a moment only.
    pub(super) fn settle_soon(&self, caller: &Caller, name: &str) -> Result<Settled, Failure> {
        let mut answer = self.settle_once(caller, name);
        for wait in SOON {
            if answer.is_ok() {
                break;
            }
            std::thread::sleep(wait);
            answer = self.settle_once(caller, name);
        }
        answer
    }

    /// Asks about every guest in doubt; those that cannot be settled now are asked about again.
    pub(super) fn settle_all(&self) {
        let names = match self.records.names() {
            Ok(names) => names,
            Err(error) => return tracing::error!(%error, "the ownership records cannot be listed"),
        };
        for name in names {
            match self.settle_once(&Caller::agent(), &name) {
                Ok(settled) => tracing::info!(name, ?settled, "settled"),
                Err(failure) if failure.code == NOT_IN_DOUBT => {}
                Err(failure) => tracing::warn!(code = failure.code, "{}", failure.error),
            }
        }
    }

    fn settle_once(&self, caller: &Caller, name: &str) -> Result<Settled, Failure> {
        let doubt = self.doubt(name)?;
        let records = MoveRecords::leaving(self, name, &doubt.peer, doubt.emulated());
        let answer = self.ask_peer(&doubt, &records).inspect_err(|failure| {
            let entry = doubt.entry(caller, Outcome::Failed).code(&failure.code);
            let entry = entry.with("reason", failure.error.as_str());
            if let Err(unrecorded) = self.evidence.record(records.outcome(entry, None)) {
                tracing::error!(code = unrecorded.code, "{}", unrecorded.error);
            }
        })?;
        let entry = doubt.entry(caller, Outcome::Done);
        let entry = entry
            .with("answer", word(answer))
            .with("epoch", doubt.held + 1);
        self.evidence.record(records.outcome(entry, None))?;
        self.act_on(&doubt, answer).inspect_err(|failure| {
            self.record_undone(caller.name(), "settle-out", name, failure);
        })
    }

    fn doubt(&self, name: &str) -> Result<Doubt, Failure> {
        let record = self.ownership(name)?;
        let settled = || {
            let text =
                format!("{name} is not in doubt: no commit of this host waits for its answer");
            Failure::new(NOT_IN_DOUBT, text)
        };
        let record = record
            .filter(|record| record.state == OwnershipState::HandingOver)
            .ok_or_else(settled)?;
        let guest = lock(&self.guests).get(name).cloned();
        if guest
            .as_ref()
            .is_some_and(|guest| lock(&guest.mover).is_some())
        {
            return Err(settled());
        }
        let unreadable = || Failure::new("RECORD", format!("the record of {name} is incomplete"));
        let mut vm_id = [0; 16];
        hex::decode_to_slice(&record.vm_id, &mut vm_id).map_err(|_| unreadable())?;
        Ok(Doubt {
            name: name.to_owned(),
            vm_id,
            held: record.epoch.checked_sub(1).ok_or_else(unreadable)?,
            peer: record.peer.ok_or_else(unreadable)?,
            guest,
        })
    }

    fn ask_peer(&self, doubt: &Doubt, records: &MoveRecords<'_>) -> Result<Settlement, Failure> {
        let policy = self.policy();
        let peer = policy.peer_named(&doubt.peer).ok_or_else(|| {
            let text = format!("the policy names no peer {:?} any more", doubt.peer);
            Failure::new("POLICY_PEER_UNKNOWN", text)
        })?;
        let socket = connect(&doubt.peer, self.config.peers.get(&doubt.peer).copied())?;
        let start = SettleStart {
            credentials: self.credentials()?.credentials.clone(),
            peer: peer_entry(peer),
            provider: provider_name(&policy),
            name: doubt.name.clone(),
            vm_id: doubt.vm_id,
            epoch: doubt.held,
        };
        let mover = Arc::new(self.spawn_mover(0)?);
        let _busy = doubt.occupy(&mover)?;
        mover.start(&MoverCommand::Settle(Box::new(start)), &[socket.as_fd()])?;
        drop(socket);
        let outcome = mover.serve(
            &mut |request| match request {
                MoverRequestToAgent::Session(session) => {
                    records.agreed(*session);
                    Ok((AgentAnswer::Admitted, Vec::new()))
                }
                MoverRequestToAgent::Sign { message } => {
                    Ok((self.host_sign(&message)?, Vec::new()))
                }
                _ => Err(role_error("ROLE_PROTOCOL", "a question changes nothing")),
            },
            &mut |_| {},
        );
        match outcome {
            Some(MoveOutcome::Settled(answer)) => Ok(answer),
            Some(MoveOutcome::Failed { code, reason, .. }) => Err(Failure {
                error: format!(
                    "{} could not be asked who has {}: {reason}",
                    doubt.peer, doubt.name
                ),
                code,
            }),
            Some(_) => Err(Failure::new(
                "ROLE_PROTOCOL",
                "a mover moved what it was to ask about",
            )),
            None => Err(Failure::new("MOVER_DIED", "the mover process died")),
        }
    }

    /// The record is written first, so that a crash in between leaves nothing to two.
    fn act_on(&self, doubt: &Doubt, answer: Settlement) -> Result<Settled, Failure> {
        let Doubt {
            name, held, guest, ..
        } = doubt;
        let (state, epoch) = match (answer, guest) {
            (Settlement::Held, _) => (OwnershipState::HandedOver, held + 1),
            (Settlement::Never, Some(_)) => (OwnershipState::Owner, *held),
            // Not there, and here it ended with its agent.
            (Settlement::Never, None) => (OwnershipState::Ended, *held),
        };
        let record = Ownership {
            vm_id: hex::encode(doubt.vm_id),
            epoch,
            state,
            peer: (answer == Settlement::Held).then(|| doubt.peer.clone()),
        };
        self.record_ownership(name, &record)?;
        match (answer, guest) {
            (Settlement::Held, _) => {
                // Its machine ends with the last who holds it.
                drop(lock(&self.guests).remove(name));
            }
            (Settlement::Never, Some(guest)) => {
                guest.vmm.call(&VmmRequest::Resume, &[])?;
            }
            (Settlement::Never, None) => {}
        }
        Ok(Settled {
            name: name.clone(),
            peer: doubt.peer.clone(),
            peer_has_it: answer == Settlement::Held,
            runs_here: answer == Settlement::Never && guest.is_some(),
            epoch,
        })
    }

    /// At the other side: a peer asks what became of its commit. A move that is still under way is ended first.
    pub(super) fn answer_question(
        &self,
        question: &GuestOffer,
        peer: &PeerName,
        records: &MoveRecords<'_>,
    ) -> Result<Settlement, Failure> {
        let identity = self.peer_identity(peer)?;
        let policy = self.policy();
        let known = policy.peer_with(&identity);
        let asker = known.map_or_else(|| identity.to_string(), |peer| peer.name.clone());
        records.is(&question.name, &asker, false);
        let name = &question.name;
        self.arrivals.end_for(name, &asker)?;
        let record = self.ownership(name)?;
        let answer = judge(record.as_ref(), question);
        let entry = |outcome| {
            let entry = Entry::new(&asker, "settle-in", name, outcome);
            entry.with("epoch", question.epoch.saturating_add(1))
        };
        let entry = match &answer {
            Ok(answer) => entry(Outcome::Done).with("answer", word(*answer)),
            Err(failure) => entry(Outcome::Failed).code(&failure.code),
        };
        self.evidence.record(records.outcome(entry, None))?;
        answer
    }
}

impl Doubt {
    fn emulated(&self) -> bool {
        let guest = self.guest.as_ref();
        guest.is_some_and(|guest| guest.plan.technology.emulated())
    }

    fn entry(&self, caller: &Caller, outcome: Outcome) -> Entry {
        Entry::new(caller.name(), "settle-out", &self.name, outcome).emulated(self.emulated())
    }

    /// Keeps everybody else from the guest while the peer is asked.
    fn occupy(&self, mover: &Arc<MoverProcess>) -> Result<Option<Busy<'_>>, Failure> {
        let Some(guest) = &self.guest else {
            return Ok(None);
        };
        let mut slot = lock(&guest.mover);
        if slot.is_some() {
            let text = format!("{} is being asked about already", self.name);
            return Err(Failure::new("ALREADY_MOVING", text));
        }
        *slot = Some(Arc::clone(mover));
        Ok(Some(Busy(guest)))
    }
}

struct Busy<'a>(&'a Guest);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        *lock(&self.0.mover) = None;
    }
}

/// What this host's own record says of the epoch that was committed.
fn judge(record: Option<&Ownership>, question: &GuestOffer) -> Result<Settlement, Failure> {
    let Some(record) = record else {
        return Ok(Settlement::Never);
    };
    let name = &question.name;
    if record.vm_id != hex::encode(question.vm_id) {
        let text = format!("the {name} of this host is another guest");
        return Err(Failure::new("SETTLE_OTHER_GUEST", text));
    }
    let committed = question.epoch.saturating_add(1);
    match record.state {
        OwnershipState::GivenBack if record.epoch == question.epoch => Ok(Settlement::Never),
        OwnershipState::Owner
        | OwnershipState::HandingOver
        | OwnershipState::HandedOver
        | OwnershipState::Ended
            if record.epoch >= committed =>
        {
            Ok(Settlement::Held)
        }
        OwnershipState::GivenBack
        | OwnershipState::HandingOver
        | OwnershipState::HandedOver
        | OwnershipState::Ended
            if record.epoch < committed =>
        {
            Ok(Settlement::Never)
        }
        state => {
            let text = format!(
                "this host's record of {name} says {state:?} under epoch {}, which does not go with a commit of epoch \
                 {committed}; somebody must look at both records",
                record.epoch
            );
            Err(Failure::new("SETTLE_UNCLEAR", text))
        }
    }
}

fn word(answer: Settlement) -> &'static str {
    match answer {
        Settlement::Held => "held",
        Settlement::Never => "never",
    }
}

/// Code of what needs no settling.
const NOT_IN_DOUBT: &str = "NOT_IN_DOUBT";
const SOON: [Duration; 4] = [
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(4),
    Duration::from_secs(8),
];

#[cfg(test)]
mod tests {
    use casemate_crypto_migrate::settlement::question;

    use super::*;
    use crate::agent::record::OwnershipState::{Ended, GivenBack, HandedOver, HandingOver, Owner};

    #[test]
    fn the_record_answers_and_what_does_not_go_together_is_for_people() {
        let asked = question([7; 16], "vault", 4);
        let judged = |epoch, state| {
            let record = Ownership {
                vm_id: hex::encode([7; 16]),
                epoch,
                state,
                peer: None,
            };
            judge(Some(&record), &asked).map_err(|failure| failure.code)
        };
        for state in [Owner, HandingOver, HandedOver, Ended] {
            assert_eq!(judged(5, state), Ok(Settlement::Held));
            assert_eq!(judged(9, state), Ok(Settlement::Held));
        }
        assert_eq!(judged(4, GivenBack), Ok(Settlement::Never));
        for state in [GivenBack, HandingOver, HandedOver, Ended] {
            assert_eq!(judged(3, state), Ok(Settlement::Never));
        }
        assert_eq!(judged(4, Owner), Err("SETTLE_UNCLEAR".into()));
        assert_eq!(judged(5, GivenBack), Err("SETTLE_UNCLEAR".into()));
        assert_eq!(judge(None, &asked), Ok(Settlement::Never));
        let other = question([8; 16], "vault", 4);
        let record = Ownership {
            vm_id: hex::encode([7; 16]),
            epoch: 5,
            state: Owner,
            peer: None,
        };
        let code = judge(Some(&record), &other).unwrap_err().code;
        assert_eq!(code, "SETTLE_OTHER_GUEST");
    }
}
