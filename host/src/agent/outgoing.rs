//! Moving a guest away.

use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use casemate_crypto_migrate::preamble::Ticket;
use casemate_crypto_migrate::session::MAX_STREAMS;
use casemate_policy::Action;
use casemate_policy::ledger::{Entry, Outcome};

use crate::agent::Agent;
use crate::agent::api::{Answer, Failure};
use crate::agent::authority::Caller;
use crate::agent::guest::Guest;
use crate::agent::move_records::MoveRecords;
use crate::agent::mover_process::MoverProcess;
use crate::agent::moving_disks;
use crate::agent::plug;
use crate::agent::record::{Ownership, OwnershipState};
use crate::agent::transfer::{peer_entry, provider_name, role_error};
use crate::agent::vmm_process::lock;
use crate::machine::plan::Technology;
use crate::machine::saved;
use crate::mover::protocol::{
    AgentAnswer, GuestHere, MoveLimits, MoveOutcome, MoverCommand, MoverEvent, MoverRequestToAgent,
    OwnershipStep, SourceStart,
};
use crate::vmm::protocol::{MachineState, RoleError};

/// What is asked of a move.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Wish<'a> {
    /// A peer of the policy.
    pub to: &'a str,
    /// Only to know what it would be like.
    pub assess: bool,
    /// Longest pause in milliseconds; the policy's if absent.
    pub downtime_limit_ms: Option<u32>,
    /// Longest time for the whole, in seconds.
    pub time_limit_s: Option<u32>,
    /// MiB a second that the rounds may send.
    pub bandwidth_mib: Option<u32>,
    /// Whether the guest may not be throttled.
    pub unthrottled: bool,
    /// Whether both ends read all memory anew and compare it.
    pub read_back: bool,
    /// Connections to ask for; one if absent.
    pub streams: Option<u16>,
    /// Disks that move along.
    pub copy_disks: &'a [String],
}

/// A guest on its way out.
pub(super) struct Departure<'a> {
    pub guest: Arc<Guest>,
    to: &'a str,
    action: &'static str,
    caller: &'a Caller,
    pub records: MoveRecords<'a>,
    mover: Arc<MoverProcess>,
    /// Further connections that its mover has been given.
    dialed: AtomicU16,
    /// The longest pause that is asked for.
    pub downtime_limit_ms: u64,
}

impl Departure<'_> {
    /// A record about it.
    pub fn entry(&self, outcome: Outcome) -> Entry {
        let plan = &self.guest.plan;
        Entry::new(self.caller.name(), self.action, &plan.name, outcome)
            .emulated(plan.technology.emulated())
    }
}

impl Agent {
    /// `casemate migrate`.
    pub(super) fn migrate(
        &self,
        caller: &Caller,
        name: &str,
        wish: &Wish<'_>,
        progress: &mut dyn FnMut(serde_json::Value),
    ) -> Result<Answer, Failure> {
        let departure = self.departure(caller, name, wish)?;
        let outcome = self.depart(&departure, &mut |event| progress(event_json(event)))?;
        self.conclude(&departure, outcome)
    }

    /// Decides, connects, and starts a mover.
    pub(super) fn departure<'a>(
        &'a self,
        caller: &'a Caller,
        name: &str,
        wish: &Wish<'a>,
    ) -> Result<Departure<'a>, Failure> {
        let guest = self.guest(name)?;
        let emulated = guest.plan.technology.emulated();
        let technology = guest.plan.technology.in_policy();
        let action = Action::MigrateOut {
            technology,
            emulated,
            peer_name: wish.to.to_owned(),
        };
        self.decide(caller, name, &action)?;
        if lock(&guest.measurement).is_some() {
            return Err(Failure::new(
                "NOT_RUNNING",
                format!("{name} waits for its owner's secret; it cannot move yet"),
            ));
        }
        let action = if wish.assess {
            "assess-out"
        } else {
            "migrate-out"
        };
        let started = self.source_start(&guest, wish).and_then(|(start, images)| {
            let limit = start.limits.downtime_ms;
            let socket = connect(wish.to, self.config.peers.get(wish.to).copied())?;
            let command = match wish.assess {
                true => MoverCommand::Assess(Box::new(start)),
                false => MoverCommand::Source(Box::new(start)),
            };
            let mut beside = vec![socket.as_fd()];
            beside.extend(images.iter().map(AsFd::as_fd));
            let mover = self.start_mover(&guest, &command, &beside)?;
            Ok((mover, limit))
        });
        let (mover, downtime_limit_ms) = started.inspect_err(|failure| {
            self.record_undone(caller.name(), action, name, failure);
        })?;
        Ok(Departure {
            guest,
            to: wish.to,
            action,
            caller,
            records: MoveRecords::leaving(self, name, wish.to, emulated),
            mover,
            dialed: AtomicU16::new(0),
            downtime_limit_ms,
        })
    }

    /// Serves the mover to its end.
    pub(super) fn depart(
        &self,
        departure: &Departure<'_>,
        see: &mut dyn FnMut(&MoverEvent),
    ) -> Result<MoveOutcome, Failure> {
        let outcome = departure.mover.serve(
            &mut |request| self.serve_source(departure, request),
            &mut |event| {
                if let Err(failure) = departure.records.see(event) {
                    tracing::error!(code = failure.code, "{}", failure.error);
                    // Too late is too late: the outcome will say what became of the guest.
                    let _ = departure.mover.cancel();
                }
                see(event);
            },
        );
        *lock(&departure.guest.mover) = None;
        Ok(outcome.unwrap_or_else(|| {
            departure.mover.end();
            self.orphaned(&departure.guest)
        }))
    }

    /// Cancels a migration under way.
    pub(super) fn cancel(&self, name: &str) -> Result<Answer, Failure> {
        self.mover_of(name)?.cancel()?;
        Ok(Answer::Done)
    }

    /// `casemate proceed`: switches now.
    pub(super) fn proceed(&self, caller: &Caller, name: &str) -> Result<Answer, Failure> {
        let entry = Entry::new(caller.name(), "migrate-proceed", name, Outcome::Done);
        self.order_move(name, &MoverCommand::Proceed, entry)
    }

    /// `casemate migrate-set`: changes what a move under way may take.
    pub(super) fn migrate_set(
        &self,
        caller: &Caller,
        name: &str,
        bandwidth_mib: u32,
    ) -> Result<Answer, Failure> {
        let limit = u64::from(bandwidth_mib) << 20;
        let entry = Entry::new(caller.name(), "migrate-set", name, Outcome::Done);
        let entry = entry.with("bandwidth_mib", bandwidth_mib);
        self.order_move(name, &MoverCommand::Bandwidth(limit), entry)
    }

    /// Recorded first: what is ordered may end the move at once.
    fn order_move(
        &self,
        name: &str,
        order: &MoverCommand,
        entry: Entry,
    ) -> Result<Answer, Failure> {
        let mover = self.mover_of(name)?;
        self.evidence.record(entry)?;
        mover.order(order)?;
        Ok(Answer::Done)
    }

    fn mover_of(&self, name: &str) -> Result<Arc<MoverProcess>, Failure> {
        let mover = lock(&self.guest(name)?.mover).clone();
        mover.ok_or_else(|| Failure::new("NOT_MOVING", format!("{name} is not being moved")))
    }

    fn source_start(
        &self,
        guest: &Guest,
        wish: &Wish<'_>,
    ) -> Result<(SourceStart, Vec<OwnedFd>), Failure> {
        let to = wish.to;
        if wish.read_back && guest.plan.technology != Technology::None {
            return Err(Failure::new(
                "READ_BACK_UNSUPPORTED",
                "the memory of a confidential guest reads differently on each host; move it without `--read-back`",
            ));
        }
        let unknown = || {
            Failure::new(
                "POLICY_PEER_UNKNOWN",
                format!("the policy names no peer {to:?}"),
            )
        };
        let policy = self.policy();
        let peer = policy.peer_named(to).ok_or_else(unknown)?;
        let description = description_of(guest)?;
        let limit = wish
            .downtime_limit_ms
            .unwrap_or(policy.migration.downtime_limit_ms.get());
        let moving_disks::Leaving { disks, images } = moving_disks::open(guest, wish.copy_disks)?;
        let start = SourceStart {
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
                max_rounds: 0,
                deadline_ms: u64::from(wish.time_limit_s.unwrap_or(0)) * 1000,
                bandwidth: u64::from(wish.bandwidth_mib.unwrap_or(0)) << 20,
                unthrottled: wish.unthrottled,
                read_back: wish.read_back,
                streams: streams(wish)?,
            },
            disks,
        };
        Ok((start, images))
    }

    /// Starts a mover for a guest here, joined to its VMM; beside the channel it gets these. One
    /// at a time: what a guest is may not change while it is being written.
    pub(super) fn start_mover(
        &self,
        guest: &Guest,
        command: &MoverCommand,
        beside: &[BorrowedFd<'_>],
    ) -> Result<Arc<MoverProcess>, Failure> {
        let mut slot = lock(&guest.mover);
        if slot.is_some() {
            return Err(Failure::new(
                "ALREADY_MOVING",
                format!("{} is being moved or snapshot already", guest.plan.name),
            ));
        }
        if guest.detaching.load(Ordering::SeqCst) {
            return Err(plug::detaching(&guest.plan.name));
        }
        if let MoverCommand::Source(start) | MoverCommand::Assess(start) = command
            && start.description != description_of(guest)?
        {
            return Err(Failure::new(
                "DEVICES_CHANGED",
                format!(
                    "a device of {} was changed in this moment; ask again",
                    guest.plan.name
                ),
            ));
        }
        let mover = Arc::new(self.spawn_mover(guest.plan.mapped_bytes())?);
        let vmm = guest.vmm.attach_mover()?;
        let mut handles = vec![vmm.as_fd()];
        handles.extend(beside);
        mover.start(command, &handles)?;
        *slot = Some(Arc::clone(&mover));
        Ok(mover)
    }

    fn serve_source(
        &self,
        departure: &Departure<'_>,
        request: MoverRequestToAgent,
    ) -> Result<(AgentAnswer, Vec<OwnedFd>), RoleError> {
        let Departure {
            guest,
            to,
            caller,
            records,
            ..
        } = departure;
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
            MoverRequestToAgent::Dial { ticket } => {
                let socket = self.dial(departure, &ticket);
                let socket = socket.map_err(|e| role_error(&e.code, e.error))?;
                return Ok((AgentAnswer::Dialed, vec![socket]));
            }
            _ => {
                return Err(role_error("ROLE_PROTOCOL", "a source admits nobody"));
            }
        };
        Ok((answer, Vec::new()))
    }

    /// A further connection to where the first one goes; the peer knows by the ticket whose it is.
    fn dial(&self, departure: &Departure<'_>, ticket: &Ticket) -> Result<OwnedFd, Failure> {
        if departure.dialed.fetch_add(1, Ordering::Relaxed) >= MAX_STREAMS - 1 {
            return Err(Failure::new(
                "ROLE_PROTOCOL",
                "a move has at most 16 connections",
            ));
        }
        let to = departure.to;
        let mut socket = connect(to, self.config.peers.get(to).copied())?;
        ticket
            .write(&mut socket)
            .map_err(|e| Failure::new("PEER_UNREACHABLE", e.to_string()))?;
        Ok(socket.into())
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

    fn conclude(&self, departure: &Departure<'_>, outcome: MoveOutcome) -> Result<Answer, Failure> {
        let Departure {
            guest, to, records, ..
        } = departure;
        let name = &guest.plan.name;
        match outcome {
            MoveOutcome::Moved(report) => {
                let done = departure.entry(Outcome::Done).with("epoch", report.epoch);
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
                let failed = departure
                    .entry(Outcome::Failed)
                    .code(&code)
                    .with("reason", reason.as_str());
                self.evidence
                    .record_all(records.kept(), records.outcome(failed, None))?;
                if here == GuestHere::Elsewhere {
                    lock(&self.guests).remove(name);
                }
                let settled = match here {
                    GuestHere::InDoubt => self.settle_soon(departure.caller, name).ok(),
                    _ => None,
                };
                match settled {
                    Some(settled) if settled.peer_has_it => Ok(Answer::Settled(settled)),
                    Some(_) => Err(Failure {
                        code,
                        error: format!(
                            "{name} did not move to {to}: {reason}; {to} was asked and does not have it: the guest runs on here"
                        ),
                    }),
                    None => Err(Failure {
                        code,
                        error: format!("{name} did not move to {to}: {reason}; {}", fate(here)),
                    }),
                }
            }
            MoveOutcome::Assessed(_) | MoveOutcome::Settled(_) => {
                let failure = Failure::new(
                    "ROLE_PROTOCOL",
                    "a mover only asked about what it was to move",
                );
                let failed = departure.entry(Outcome::Failed).code(&failure.code);
                self.evidence
                    .record_all(records.kept(), records.outcome(failed, None))?;
                Err(failure)
            }
        }
    }

    /// The mover died without a word: whether the guest may go on here depends on what the record says, and on whether
    /// its VMM let it.
    fn orphaned(&self, guest: &Guest) -> MoveOutcome {
        let record = self.records.read(&guest.plan.name).ok().flatten();
        let here = match record.map(|r| r.state) {
            Some(OwnershipState::Owner) if runs_on(guest) => GuestHere::Runs,
            Some(OwnershipState::Owner) => GuestHere::Stopped,
            Some(OwnershipState::HandedOver) => GuestHere::Elsewhere,
            // A VMM lets a guest run on only if it was not told to give it up, which the commit comes after.
            Some(OwnershipState::HandingOver) if runs_on(guest) => match self.own_again(guest) {
                Ok(()) => GuestHere::Runs,
                Err(_) => GuestHere::InDoubt,
            },
            _ => GuestHere::InDoubt,
        };
        MoveOutcome::Failed {
            code: "MOVER_DIED".into(),
            reason: "the mover process died".into(),
            guest: here,
        }
    }

    fn own_again(&self, guest: &Guest) -> Result<(), Failure> {
        let record = Ownership {
            vm_id: hex::encode(guest.plan.vm_id),
            epoch: *lock(&guest.epoch),
            state: OwnershipState::Owner,
            peer: None,
        };
        self.record_ownership(&guest.plan.name, &record)
    }
}

/// Whether the guest of a mover that has ended runs, as soon as its VMM has noticed.
fn runs_on(guest: &Guest) -> bool {
    (0..NOTICE_TRIES).any(|number| {
        if number > 0 {
            std::thread::sleep(NOTICE_STEP);
        }
        guest
            .info()
            .is_ok_and(|info| info.state == MachineState::Running)
    })
}

/// What a failure means for the guest.
pub(super) fn fate(here: GuestHere) -> &'static str {
    match here {
        GuestHere::Runs => "the guest runs on here",
        GuestHere::Stopped => {
            "the guest does not run here: `casemate status` says whether it is paused (then `casemate resume` it) or has stopped by itself"
        }
        GuestHere::InDoubt => {
            "the commit was sent and not answered: the guest stays stopped here until the peer has been asked, which this host does every half minute; `casemate settle` does it now"
        }
        GuestHere::Elsewhere => "yet the peer runs it",
        GuestHere::Absent => "nothing of it stayed",
    }
}

/// How many connections are asked for.
fn streams(wish: &Wish<'_>) -> Result<u16, Failure> {
    match wish.streams.unwrap_or(1) {
        streams if (1..=MAX_STREAMS).contains(&streams) => Ok(streams),
        streams => Err(Failure::new(
            "STREAMS",
            format!("{streams} connections; a move has 1 to {MAX_STREAMS}"),
        )),
    }
}

/// What a peer is told of the guest.
fn description_of(guest: &Guest) -> Result<Vec<u8>, Failure> {
    saved::encode_plan(&guest.plan_now()).map_err(|e| Failure::new("INTERNAL", e.to_string()))
}

pub(super) fn connect(to: &str, address: Option<SocketAddr>) -> Result<TcpStream, Failure> {
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

/// An event, for whoever follows the task.
pub(super) fn event_json(event: &MoverEvent) -> serde_json::Value {
    match event {
        MoverEvent::Progress(progress) => serde_json::to_value(progress),
        other => serde_json::to_value(other),
    }
    .unwrap_or_default()
}

/// How long a VMM has to notice that its mover is gone: at the next turn of its loop.
const NOTICE_TRIES: u32 = 25;
const NOTICE_STEP: Duration = Duration::from_millis(20);
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
