//! Taking a guest in: a connection is handed to a mover before a byte of it is read; this agent only decides.

use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use casemate_crypto_migrate::guest::GuestOffer;
use casemate_policy::ledger::{Entry, Outcome};
use casemate_policy::{Action, Fingerprint, Identity};

use crate::agent::api::Failure;
use crate::agent::arrivals::UnderWay;
use crate::agent::authority::Caller;
use crate::agent::decision::Facts;
use crate::agent::guest::{Guest, Resources, TapChoice};
use crate::agent::move_records::MoveRecords;
use crate::agent::mover_process::MoverProcess;
use crate::agent::moving_disks::NewImages;
use crate::agent::record::{Ownership, OwnershipState};
use crate::agent::roles::{ROLE_OVERHEAD, VmmShare};
use crate::agent::transfer::{peer_entries, provider_name, role_error};
use crate::agent::vmm_process::lock;
use crate::agent::{Agent, files, room};
use crate::ipc::Channel;
use crate::machine::plan::MachinePlan;
use crate::machine::saved;
use crate::mover::disks;
use crate::mover::protocol::{
    AgentAnswer, DestinationStart, MoveLimits, MoveOutcome, MoverCommand, MoverRequestToAgent,
    OwnershipStep, PeerName,
};
use crate::vmm::protocol::{MachineState, RoleError, VmmRequest};

/// A guest on its way in.
struct Arrival<'a> {
    guest: Option<Arc<Guest>>,
    mover: Arc<MoverProcess>,
    /// Once it is known which guest comes.
    under_way: Option<UnderWay<'a>>,
    /// Its name in the policy; until it has proven one, unknown.
    peer: String,
    epoch: u64,
    /// Of the disks that it brings.
    images: NewImages,
}

impl Agent {
    /// Serves one connection from its first byte to the end of the move.
    pub(super) fn receive(&self, stream: TcpStream) -> Result<(), Failure> {
        let unusable = |e: std::io::Error| Failure::new("PEER_UNREACHABLE", e.to_string());
        let address = stream.peer_addr().map_err(unusable)?.to_string();
        stream
            .set_nonblocking(false)
            .and_then(|()| stream.set_nodelay(true))
            .map_err(unusable)?;
        let mover = self.spawn_mover(self.policy().limits.max_memory_mib.get() << 20)?;
        let mover = Arc::new(mover);
        let route = self.routes.open(&mover)?;
        let start = DestinationStart {
            credentials: self.credentials()?.credentials.clone(),
            peers: peer_entries(&self.policy()),
            ticket: route.ticket(),
            provider: provider_name(&self.policy()),
            limits: MoveLimits::default(),
        };
        let socket = OwnedFd::from(stream);
        mover.start(
            &MoverCommand::Destination(Box::new(start)),
            &[socket.as_fd()],
        )?;
        drop(socket);
        let mut arrival = Arrival {
            guest: None,
            mover: Arc::clone(&mover),
            under_way: None,
            peer: "unknown".to_owned(),
            epoch: 0,
            images: NewImages::default(),
        };
        let records = MoveRecords::arriving(self);
        let outcome = mover.serve(
            &mut |request| self.serve_arrival(&mut arrival, &records, request),
            &mut |event| {
                if let Err(failure) = records.see(event) {
                    tracing::error!(code = failure.code, "{}", failure.error);
                    // Too late is too late: the outcome will say what became of the guest.
                    let _ = mover.cancel();
                }
            },
        );
        drop(route);
        let name = arrival
            .guest
            .as_ref()
            .map_or_else(|| "unknown".to_owned(), |g| g.plan.name.clone());
        let emulated = arrival
            .guest
            .as_ref()
            .is_some_and(|g| g.plan.technology.emulated());
        let entry = |outcome| {
            let entry = Entry::new(&arrival.peer, "migrate-in", &name, outcome);
            entry.emulated(emulated).with("address", address.as_str())
        };
        match outcome {
            Some(MoveOutcome::Moved(report)) => {
                let done = entry(Outcome::Done).with("epoch", arrival.epoch);
                // It is this host's whether or not that can be written down.
                arrival.images.keep();
                if let Some(guest) = arrival.guest {
                    lock(&self.guests).insert(name.clone(), guest);
                }
                self.evidence
                    .record_all(records.kept(), records.outcome(done, Some(&report)))
            }
            Some(MoveOutcome::Assessed(_)) => {
                let entry = Entry::new(&arrival.peer, "assess-in", &name, Outcome::Done);
                let entry = entry.emulated(emulated).with("address", address.as_str());
                self.evidence
                    .record_all(records.kept(), records.outcome(entry, None))?;
                // A mover that says so after it had a guest recorded as this host's has lied.
                self.give_back(&arrival)
            }
            // Recorded with the answer; and as above.
            Some(MoveOutcome::Settled(_)) => self.give_back(&arrival),
            Some(MoveOutcome::Failed { code, reason, .. }) => {
                let failed = entry(Outcome::Failed)
                    .code(&code)
                    .with("reason", reason.as_str());
                self.evidence
                    .record_all(records.kept(), records.outcome(failed, None))?;
                // Should it have been recorded as this host's already: its activation failed, and the source was told.
                self.give_back(&arrival)?;
                Err(Failure {
                    code,
                    error: reason,
                })
            }
            None => {
                let failed = entry(Outcome::Failed).code("MOVER_DIED");
                self.evidence
                    .record_all(records.kept(), records.outcome(failed, None))?;
                self.settle_arrival(arrival)?;
                Err(Failure::new("MOVER_DIED", "the mover process died"))
            }
        }
    }

    /// The mover died without a word. A guest that runs is this host's; one that does not is given back, and a source
    /// that asks will be told so.
    fn settle_arrival(&self, mut arrival: Arrival<'_>) -> Result<(), Failure> {
        let running = arrival.guest.as_ref().filter(|guest| {
            arrival.epoch > 0
                && guest
                    .info()
                    .is_ok_and(|info| info.state == MachineState::Running)
        });
        match running {
            Some(guest) => {
                arrival.images.keep();
                lock(&self.guests).insert(guest.plan.name.clone(), Arc::clone(guest));
                Ok(())
            }
            None => self.give_back(&arrival),
        }
    }

    /// Ends a guest that never ran here, and the claim on it.
    fn give_back(&self, arrival: &Arrival<'_>) -> Result<(), Failure> {
        let Some(guest) = arrival.guest.as_ref().filter(|_| arrival.epoch > 0) else {
            return Ok(());
        };
        guest.vmm.kill();
        let record = Ownership {
            vm_id: hex::encode(guest.plan.vm_id),
            epoch: arrival.epoch - 1,
            state: OwnershipState::GivenBack,
            peer: Some(arrival.peer.clone()),
        };
        self.record_ownership(&guest.plan.name, &record)
    }

    fn serve_arrival<'a>(
        &'a self,
        arrival: &mut Arrival<'a>,
        records: &MoveRecords<'_>,
        request: MoverRequestToAgent,
    ) -> Result<(AgentAnswer, Vec<OwnedFd>), RoleError> {
        match request {
            // What it comes to is decided with the offer, which comes next.
            MoverRequestToAgent::Session(session) => {
                records.agreed(*session);
                Ok((AgentAnswer::Admitted, Vec::new()))
            }
            MoverRequestToAgent::Sign { message } => Ok((self.host_sign(&message)?, Vec::new())),
            MoverRequestToAgent::Admit { offer, peer } => {
                Ok(match self.admit(arrival, records, &offer, &peer) {
                    Ok(channel) => {
                        let mut handles = vec![channel.into_fd()];
                        handles.append(&mut arrival.images.files);
                        (AgentAnswer::Admitted, handles)
                    }
                    Err(failure) => (
                        AgentAnswer::Refused {
                            code: failure.code,
                            reason: failure.error,
                        },
                        Vec::new(),
                    ),
                })
            }
            MoverRequestToAgent::Settle { question, peer } => {
                let answer = match self.answer_question(&question, &peer, records) {
                    Ok(settlement) => AgentAnswer::Settled(settlement),
                    Err(failure) => AgentAnswer::Refused {
                        code: failure.code,
                        reason: failure.error,
                    },
                };
                Ok((answer, Vec::new()))
            }
            MoverRequestToAgent::Record(OwnershipStep::Activating { epoch }) => {
                self.take_over(arrival, epoch)
                    .map_err(|e| role_error(&e.code, e.error))?;
                Ok((AgentAnswer::Recorded, Vec::new()))
            }
            _ => Err(role_error(
                "ROLE_PROTOCOL",
                "a destination gives nothing away",
            )),
        }
    }

    /// Checks the offer against this host's own policy and builds the machine from this host's own resources.
    fn admit<'a>(
        &'a self,
        arrival: &mut Arrival<'a>,
        records: &MoveRecords<'_>,
        offer: &GuestOffer,
        peer: &PeerName,
    ) -> Result<Channel, Failure> {
        if arrival.guest.is_some() {
            return Err(Failure::new("ROLE_PROTOCOL", "a mover admits one guest"));
        }
        let plan = parse_description(offer)?;
        let identity = self.peer_identity(peer)?;
        let policy = self.policy();
        let known = policy.peer_with(&identity);
        arrival.peer = known.map_or_else(|| identity.to_string(), |p| p.name.clone());
        let emulated = plan.technology.emulated();
        records.is(&plan.name, &arrival.peer, emulated);
        let session = records.claims(&policy).ok_or_else(|| {
            Failure::new(
                "ROLE_PROTOCOL",
                "a mover agrees on a session before it admits",
            )
        })?;
        if session.peer != identity {
            return Err(Failure::new(
                "ROLE_PROTOCOL",
                "the offer is of another peer than the session",
            ));
        }
        let action = Action::MigrateIn {
            tls: session.tls.clone(),
            peer: identity,
            technology: plan.technology.in_policy(),
            emulated,
            vcpus: plan.vcpus.into(),
            memory_mib: plan.memory_bytes >> 20,
            disks: plan.disks.iter().map(|d| d.id.clone()).collect(),
            nets: plan.nets.iter().map(|n| n.id.clone()).collect(),
        };
        let facts = Facts {
            session: Some(session),
            ..Facts::default()
        };
        self.decide_knowing(&Caller::peer(&arrival.peer), &plan.name, &action, facts)?;
        let under_way = self
            .arrivals
            .begin(&plan.name, &arrival.peer, &arrival.mover)?;
        arrival.under_way = Some(under_way);
        self.fence(&plan.name, offer.epoch, &arrival.peer)?;
        room::check(&plan.name, plan.memory_bytes, ROLE_OVERHEAD)?;
        let (_, disks) = disks::split(&offer.memory).map_err(Failure::from)?;
        arrival.images = NewImages::make(&disks, &plan, &policy)?;
        let guest = self.build_arrival(&plan, offer.epoch)?;
        guest.vmm.call(&VmmRequest::Incoming { copy: false }, &[])?;
        let mover_end = guest.vmm.attach_mover()?;
        arrival.guest = Some(guest);
        Ok(mover_end)
    }

    fn build_arrival(&self, plan: &MachinePlan, epoch: u64) -> Result<Arc<Guest>, Failure> {
        let policy = self.policy();
        let disks: Vec<PathBuf> = plan
            .disks
            .iter()
            .filter_map(|d| policy.incoming_disk(&d.id))
            .map(|d| files::real(&d.path))
            .collect();
        let disks: Vec<&Path> = disks.iter().map(PathBuf::as_path).collect();
        let bridges = plan.nets.iter().filter_map(|n| policy.incoming_net(&n.id));
        let taps: Vec<TapChoice> = bridges
            .map(|net| TapChoice {
                tap: self.fresh_tap(),
                bridge: Some(net.bridge.clone()),
            })
            .collect();
        let processor = self.processor_for(plan)?;
        let folder = self.guest_folder(&plan.name);
        Resources::open(plan, &folder, &disks, &taps, processor)?.prepare(
            self.spawn_vmm(plan, VmmShare::default())?,
            plan.clone(),
            epoch,
        )
    }

    /// A host never takes a guest under an epoch that it has already seen. One that was being handed over when the way was
    /// lost comes back only from whom it was handed to, who by its epoch has had it.
    fn fence(&self, name: &str, offered: u64, peer: &str) -> Result<(), Failure> {
        if lock(&self.guests).contains_key(name) {
            return Err(Failure::new(
                "ALREADY_HERE",
                format!("a guest {name} runs on this host"),
            ));
        }
        let record = self.ownership(name)?;
        let in_doubt = |r: &Ownership| {
            r.state == OwnershipState::HandingOver && r.peer.as_deref() != Some(peer)
        };
        match record {
            Some(r) if r.epoch > offered || in_doubt(&r) => Err(Failure::new(
                "EPOCH_FENCED",
                format!(
                    "{name} was seen here under epoch {}; the offer holds {offered}",
                    r.epoch
                ),
            )),
            _ => Ok(()),
        }
    }

    fn take_over(&self, arrival: &mut Arrival<'_>, epoch: u64) -> Result<(), Failure> {
        let nothing = || Failure::new("ROLE_PROTOCOL", "nothing was admitted");
        let guest = arrival.guest.as_ref().ok_or_else(nothing)?;
        let under_way = arrival.under_way.as_ref().ok_or_else(nothing)?;
        let mut held = lock(&guest.epoch);
        if epoch != *held + 1 {
            return Err(Failure::new(
                "EPOCH_FENCED",
                format!("epoch {epoch} does not follow the offer's {held}"),
            ));
        }
        let record = Ownership {
            vm_id: hex::encode(guest.plan.vm_id),
            epoch,
            state: OwnershipState::Owner,
            peer: Some(arrival.peer.clone()),
        };
        under_way.take_over(|| self.record_ownership(&guest.plan.name, &record))?;
        *held = epoch;
        arrival.epoch = epoch;
        Ok(())
    }

    pub(super) fn peer_identity(&self, peer: &PeerName) -> Result<Identity, Failure> {
        let spki = Fingerprint::from_bytes(peer.spki_sha256);
        let policy = self.policy();
        let by_policy = policy.peers().iter().map(|p| &p.identity);
        let known = by_policy
            .into_iter()
            .find(|i| i.spki == spki && peer.san.iter().any(|s| s == i.san.as_str()));
        known.cloned().ok_or_else(|| {
            Failure::new(
                "POLICY_PEER_UNKNOWN",
                "no peer of the policy has this name and key",
            )
        })
    }
}

/// The peer's description: bounded by the wire, parsed once here, nothing behind it.
fn parse_description(offer: &GuestOffer) -> Result<MachinePlan, Failure> {
    let refuse =
        |text: String| Failure::new("DESCRIPTION", format!("the offer's description {text}"));
    let plan = saved::decode_plan(&offer.description).map_err(|e| {
        let code = if e.is_version() {
            "STATE_VERSION"
        } else {
            "DESCRIPTION"
        };
        Failure::new(code, format!("the offer's description: {e}"))
    })?;
    plan.check().map_err(refuse)?;
    if plan.name != offer.name || plan.vm_id != offer.vm_id {
        return Err(refuse("names another guest than the offer".into()));
    }
    Ok(plan)
}
