//! Moving a guest away.

use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use casemate_policy::Action;
use casemate_policy::ledger::{Entry, Outcome};

use crate::agent::Agent;
use crate::agent::api::{Answer, Failure};
use crate::agent::authority::Caller;
use crate::agent::guest::Guest;
use crate::agent::move_records::MoveRecords;
use crate::agent::mover_process::MoverProcess;
use crate::agent::record::{Ownership, OwnershipState};
use crate::agent::transfer::{peer_entry, provider_name, role_error};
use crate::agent::vmm_process::lock;
use crate::mover::protocol::{
    AgentAnswer, GuestHere, MoveLimits, MoveOutcome, MoverCommand, MoverEvent, MoverRequestToAgent,
    OwnershipStep, SourceStart,
};
use crate::vmm::protocol::{RoleError, VmmRequest};

/// A guest on its way out.
#[derive(Clone, Copy)]
struct Leaving<'a> {
    guest: &'a Guest,
    to: &'a str,
    caller: &'a Caller,
    records: &'a MoveRecords<'a>,
}

impl Agent {
    /// `casemate migrate`.
    pub(super) fn migrate(
        &self,
        caller: &Caller,
        name: &str,
        to: &str,
        downtime_limit_ms: Option<u32>,
        progress: &mut dyn FnMut(serde_json::Value),
    ) -> Result<Answer, Failure> {
        let guest = self.guest(name)?;
        let emulated = guest.plan.technology.emulated();
        let technology = guest.plan.technology.in_policy();
        let action = Action::MigrateOut {
            technology,
            emulated,
            peer_name: to.to_owned(),
        };
        self.decide(caller, name, &action)?;
        if lock(&guest.measurement).is_some() {
            return Err(Failure::new(
                "NOT_RUNNING",
                format!("{name} waits for its owner's secret; it cannot move yet"),
            ));
        }
        let started = self
            .source_start(&guest, to, downtime_limit_ms)
            .and_then(|start| Ok((start, connect(to, self.config.peers.get(to).copied())?)))
            .and_then(|(start, socket)| {
                let command = MoverCommand::Source(Box::new(start));
                self.start_mover(&guest, &command, socket.as_fd())
            });
        let mover = started.inspect_err(|failure| {
            self.record_undone(caller.name(), "migrate-out", name, failure);
        })?;
        let records = MoveRecords::leaving(self, name, to, emulated);
        let leaving = Leaving {
            guest: &guest,
            to,
            caller,
            records: &records,
        };
        let outcome = mover.serve(
            &mut |request| self.serve_source(&leaving, request),
            &mut |event| {
                if let Err(failure) = records.see(event) {
                    tracing::error!(code = failure.code, "{}", failure.error);
                    // Too late is too late: the outcome will say what became of the guest.
                    let _ = mover.cancel();
                }
                progress(event_json(event));
            },
        );
        *lock(&guest.mover) = None;
        self.conclude(&leaving, outcome)
    }

    /// Cancels a migration under way.
    pub(super) fn cancel(&self, name: &str) -> Result<Answer, Failure> {
        let guest = self.guest(name)?;
        let mover = lock(&guest.mover).clone();
        mover
            .ok_or_else(|| Failure::new("NOT_MOVING", format!("{name} is not being moved")))?
            .cancel()?;
        Ok(Answer::Done)
    }

    fn source_start(
        &self,
        guest: &Guest,
        to: &str,
        downtime: Option<u32>,
    ) -> Result<SourceStart, Failure> {
        let unknown = || {
            Failure::new(
                "POLICY_PEER_UNKNOWN",
                format!("the policy names no peer {to:?}"),
            )
        };
        let policy = self.policy();
        let peer = policy.peer_named(to).ok_or_else(unknown)?;
        let description = postcard::to_stdvec(&guest.plan_now())
            .map_err(|e| Failure::new("INTERNAL", e.to_string()))?;
        let limit = downtime.unwrap_or(policy.migration.downtime_limit_ms.get());
        Ok(SourceStart {
            credentials: self.credentials()?.credentials.clone(),
            peer: peer_entry(peer),
            name: guest.plan.name.clone(),
            vm_id: guest.plan.vm_id,
            epoch: *lock(&guest.epoch),
            description,
            emulated_roots: self.emulated_roots(),
            provider: provider_name(&policy),
            limits: MoveLimits {
                downtime_ms: limit.into(),
                ..MoveLimits::default()
            },
        })
    }

    /// Starts a mover for a guest here, joined to its VMM; beside the channel it gets `target`, where the guest goes. One
    /// at a time: what a guest is may not change while it is being written.
    pub(super) fn start_mover(
        &self,
        guest: &Guest,
        command: &MoverCommand,
        target: BorrowedFd<'_>,
    ) -> Result<Arc<MoverProcess>, Failure> {
        let mut slot = lock(&guest.mover);
        if slot.is_some() {
            return Err(Failure::new(
                "ALREADY_MOVING",
                format!("{} is being moved or snapshot already", guest.plan.name),
            ));
        }
        let mover = Arc::new(self.spawn_mover(guest.plan.mapped_bytes())?);
        let vmm = guest.vmm.attach_mover()?;
        mover.start(command, &[vmm.as_fd(), target])?;
        *slot = Some(Arc::clone(&mover));
        Ok(mover)
    }

    fn serve_source(
        &self,
        leaving: &Leaving<'_>,
        request: MoverRequestToAgent,
    ) -> Result<(AgentAnswer, Option<OwnedFd>), RoleError> {
        let Leaving {
            guest,
            to,
            caller,
            records,
        } = *leaving;
        let answer = match request {
            MoverRequestToAgent::Session(session) => {
                records.agreed(*session);
                match self.decide_session(caller, guest, to, records) {
                    Ok(()) => AgentAnswer::Admitted,
                    Err(Failure { code, error }) => AgentAnswer::Refused {
                        code,
                        reason: error,
                    },
                }
            }
            MoverRequestToAgent::Sign { message } => self.host_sign(&message)?,
            MoverRequestToAgent::Record(step) => self.record_departure(guest, to, step)?,
            _ => {
                return Err(role_error("ROLE_PROTOCOL", "a source admits nobody"));
            }
        };
        Ok((answer, None))
    }

    fn record_departure(
        &self,
        guest: &Guest,
        to: &str,
        step: OwnershipStep,
    ) -> Result<AgentAnswer, RoleError> {
        let epoch = *lock(&guest.epoch);
        let (state, epoch) = match step {
            OwnershipStep::Releasing => (OwnershipState::HandingOver, epoch + 1),
            OwnershipStep::Resumed => (OwnershipState::Owner, epoch),
            OwnershipStep::Departed => (OwnershipState::HandedOver, epoch + 1),
            OwnershipStep::Activating { .. } => {
                return Err(role_error("ROLE_PROTOCOL", "a source activates nothing"));
            }
        };
        let record = Ownership {
            vm_id: hex::encode(guest.plan.vm_id),
            epoch,
            state,
            peer: Some(to.to_owned()),
        };
        self.record_ownership(&guest.plan.name, &record)
            .map_err(|e| role_error(&e.code, e.error))?;
        Ok(AgentAnswer::Recorded)
    }

    fn conclude(
        &self,
        leaving: &Leaving<'_>,
        outcome: Option<MoveOutcome>,
    ) -> Result<Answer, Failure> {
        let Leaving {
            guest,
            to,
            caller,
            records,
        } = *leaving;
        let name = &guest.plan.name;
        let entry = |outcome| {
            Entry::new(caller.name(), "migrate-out", name, outcome)
                .emulated(guest.plan.technology.emulated())
        };
        match outcome.unwrap_or_else(|| self.orphaned(guest)) {
            MoveOutcome::Moved(report) => {
                let done = entry(Outcome::Done).with("epoch", report.epoch);
                self.evidence
                    .record_all(records.kept(), records.outcome(done, Some(&report)))?;
                lock(&self.guests).remove(name);
                let outcome = serde_json::to_value(&report)
                    .map_err(|e| Failure::new("INTERNAL", e.to_string()))?;
                Ok(Answer::Migrated { outcome })
            }
            MoveOutcome::Failed {
                code,
                reason,
                guest: here,
            } => {
                let failed = entry(Outcome::Failed)
                    .code(&code)
                    .with("reason", reason.as_str());
                self.evidence
                    .record_all(records.kept(), records.outcome(failed, None))?;
                if here == GuestHere::Elsewhere {
                    lock(&self.guests).remove(name);
                }
                Err(Failure {
                    code,
                    error: format!("{name} did not move to {to}: {reason}; {}", fate(here)),
                })
            }
        }
    }

    /// The mover died without a word: whether the guest may go on here depends on what the record says.
    fn orphaned(&self, guest: &Guest) -> MoveOutcome {
        let record = self.records.read(&guest.plan.name).ok().flatten();
        let here = match record.map(|r| r.state) {
            // If the guest was not stopped there is nothing to resume.
            Some(OwnershipState::Owner) => match guest.vmm.call(&VmmRequest::Resume, &[]) {
                Ok(_) => GuestHere::Runs,
                Err(_) => GuestHere::Stopped,
            },
            Some(OwnershipState::HandedOver) => GuestHere::Elsewhere,
            _ => GuestHere::InDoubt,
        };
        MoveOutcome::Failed {
            code: "MOVER_DIED".into(),
            reason: "the mover process died".into(),
            guest: here,
        }
    }
}

fn fate(here: GuestHere) -> &'static str {
    match here {
        GuestHere::Runs => "the guest runs on here",
        GuestHere::Stopped => {
            "the guest does not run here: `casemate status` says whether it is paused (then `casemate resume` it) or has stopped by itself"
        }
        GuestHere::InDoubt => {
            "the commit was sent and not answered: the guest stays stopped here until the peer has been asked"
        }
        GuestHere::Elsewhere => "yet the peer runs it",
        GuestHere::Absent => "nothing of it stayed",
    }
}

fn connect(to: &str, address: Option<SocketAddr>) -> Result<TcpStream, Failure> {
    let address = address.ok_or_else(|| {
        Failure::new(
            "PEER_ADDRESS",
            format!("no address for {to}; add it to [peers] of the agent's configuration"),
        )
    })?;
    let stream = TcpStream::connect_timeout(&address, CONNECT_DEADLINE).map_err(|e| {
        Failure::new(
            "PEER_UNREACHABLE",
            format!("{to} at {address} does not answer: {e}"),
        )
    })?;
    stream
        .set_nodelay(true)
        .map_err(|e| Failure::new("PEER_UNREACHABLE", e.to_string()))?;
    Ok(stream)
}

fn event_json(event: &MoverEvent) -> serde_json::Value {
    match event {
        MoverEvent::Progress(progress) => serde_json::to_value(progress),
        other => serde_json::to_value(other),
    }
    .unwrap_or_default()
}

const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
