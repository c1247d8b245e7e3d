//! Restore and clone of a guest from a snapshot: the agent decides, gives the secret and builds; a mover opens.

use std::cell::RefCell;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use casemate_policy::Action;
use casemate_policy::ledger::{Entry, Outcome};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::agent::api::{Answer, Failure};
use crate::agent::authority::Caller;
use crate::agent::clone::{self, Copies};
use crate::agent::decision::Facts;
use crate::agent::guest::{Guest, Resources};
use crate::agent::mover_process::MoverProcess;
use crate::agent::record::{Ownership, OwnershipState};
use crate::agent::roles::VmmShare;
use crate::agent::snapshot::{Description, DiskMark, existing_file, keys_failed, parse};
use crate::agent::snapshot_keys::SnapshotOf;
use crate::agent::transfer::role_error;
use crate::agent::vmm_process::lock;
use crate::agent::{Agent, Reserved, files};
use crate::ipc::Channel;
use crate::machine::plan::{MachinePlan, is_name};
use crate::mover::protocol::{
    AgentAnswer, MoveOutcome, MoverCommand, MoverEvent, MoverRequestToAgent, OwnershipStep,
    RestoreStart, SnapshotClaim,
};
use crate::vmm::protocol::{MachineState, RoleError, VmmRequest};

/// When the memory of a restored guest comes.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryMode {
    /// All of it before the guest runs.
    #[default]
    AtOnce,
    /// The guest runs, each page comes when it is asked for, the others meanwhile.
    OnDemand,
}

/// How a restore is wanted.
pub(super) struct Wanted {
    pub(super) name: Option<String>,
    pub(super) memory: MemoryMode,
    pub(super) allow_older: bool,
    pub(super) allow_changed_disks: bool,
    /// Another guest is made of it.
    pub(super) copy: Option<CopyWish>,
}

/// How a clone is wanted.
pub(super) struct CopyWish {
    /// Where its disks are put; beside its console if nobody says.
    pub(super) disks: Option<PathBuf>,
}

impl Wanted {
    fn action(&self) -> &'static str {
        match self.copy {
            Some(_) => "clone",
            None => "restore",
        }
    }
}

impl Agent {
    /// `casemate restore`, `casemate vm clone`.
    pub(super) fn restore(
        &self,
        caller: &Caller,
        path: &Path,
        wanted: Wanted,
        progress: &mut dyn FnMut(serde_json::Value),
    ) -> Result<Answer, Failure> {
        if let Some(name) = wanted.name.as_deref().filter(|name| !is_name(name)) {
            let text = format!("{name:?} is no name; want 1 to 64 characters of a-z, 0-9 and '-'");
            return Err(Failure::new("DESCRIPTION", text));
        }
        let file = existing_file(path)?;
        let mover = Arc::new(self.spawn_mover(self.policy().limits.max_memory_mib.get() << 20)?);
        let start = RestoreStart {
            on_demand: wanted.memory == MemoryMode::OnDemand,
            copy: wanted.copy.is_some(),
        };
        mover.start(&MoverCommand::Restore(start), &[file.as_fd()])?;
        let restoring = RefCell::new(Restoring {
            agent: self,
            caller,
            wanted,
            begun: Instant::now(),
            guest: None,
            reserved: None,
            claim: None,
            copies: Copies::default(),
            epoch: 0,
            running: false,
        });
        let outcome = mover.serve(
            &mut |request| restoring.borrow_mut().serve(request),
            &mut |event| {
                let mut restoring = restoring.borrow_mut();
                restoring.hear(event, &mover);
                progress(serde_json::to_value(event).unwrap_or_default());
            },
        );
        restoring.into_inner().conclude(path, outcome)
    }
}

/// A restore under way, in the thread of who asked for it.
struct Restoring<'a> {
    agent: &'a Agent,
    caller: &'a Caller,
    wanted: Wanted,
    begun: Instant,
    guest: Option<Arc<Guest>>,
    reserved: Option<Reserved<'a>>,
    /// What the file says it is; true once its description has opened.
    claim: Option<SnapshotClaim>,
    copies: Copies,
    epoch: u64,
    running: bool,
}

impl Restoring<'_> {
    fn serve(
        &mut self,
        request: MoverRequestToAgent,
    ) -> Result<(AgentAnswer, Vec<OwnedFd>), RoleError> {
        let refused = |failure: Failure| role_error(&failure.code, failure.error);
        match request {
            MoverRequestToAgent::SnapshotKey(claim) => {
                let secret = self.key(claim).map_err(refused)?;
                Ok((AgentAnswer::SnapshotKey { secret }, Vec::new()))
            }
            MoverRequestToAgent::AdmitSnapshot { description } => {
                let channel = self.admit(&description).map_err(refused)?;
                Ok((AgentAnswer::Admitted, vec![channel.into_fd()]))
            }
            MoverRequestToAgent::Record(OwnershipStep::Activating { .. }) => {
                self.take_over().map_err(refused)?;
                Ok((AgentAnswer::Recorded, Vec::new()))
            }
            _ => Err(role_error(
                "ROLE_PROTOCOL",
                "a restore asks for nothing else",
            )),
        }
    }

    /// The secret, unless the snapshot is older than the guest's newest: a guest does not go back in time unasked. A clone
    /// is no guest of before. What the file claims is not yet believed, but with a false claim the secret opens nothing.
    fn key(&mut self, claim: SnapshotClaim) -> Result<Vec<u8>, Failure> {
        let keys = self.agent.snapshot_keys();
        let newest = keys.newest(&claim.vm_id).map_err(keys_failed)?;
        let back = claim.generation < newest && self.wanted.copy.is_none();
        if back && !self.wanted.allow_older {
            return Err(Failure::new(
                "SNAPSHOT_OLDER",
                format!(
                    "the snapshot is the guest's {}., its newest the {newest}.; restore that, or say --allow-older",
                    claim.generation
                ),
            ));
        }
        let secret = keys.secret(SnapshotOf {
            snapshot_id: &claim.snapshot_id,
            vm_id: &claim.vm_id,
        });
        self.claim = Some(claim);
        Ok(secret.map_err(keys_failed)?.to_vec())
    }

    fn admit(&mut self, description: &[u8]) -> Result<Channel, Failure> {
        if self.guest.is_some() {
            return Err(Failure::new("ROLE_PROTOCOL", "a restore makes one guest"));
        }
        let mut kept = parse(description)?;
        match &self.wanted.copy {
            Some(_) => self.admit_copy(&mut kept)?,
            None => self.admit_itself(&mut kept)?,
        }
        self.build(&kept)
    }

    /// The guest that the snapshot was taken of goes on.
    fn admit_itself(&mut self, kept: &mut Description) -> Result<(), Failure> {
        let agent = self.agent;
        if kept.template {
            return Err(Failure::new(
                "SNAPSHOT_IS_TEMPLATE",
                "the snapshot is a template: it is cloned, and never goes on itself; `casemate vm clone` makes a guest of it",
            ));
        }
        if let Some(name) = &self.wanted.name {
            kept.plan.name.clone_from(name);
        }
        let plan = &kept.plan;
        let twin = lock(&agent.guests)
            .values()
            .any(|guest| guest.plan.vm_id == plan.vm_id);
        if twin {
            return Err(Failure::new(
                "ALREADY_HERE",
                format!(
                    "the guest that {} was taken of runs on this host; stop it first",
                    plan.name
                ),
            ));
        }
        let action = Action::Launch {
            technology: plan.technology.in_policy(),
            emulated: false,
            vcpus: plan.vcpus.into(),
            memory_mib: plan.memory_bytes >> 20,
            policy_bits: 0,
        };
        self.decide(&plan.name, &action, kept, &[])?;
        self.reserved = Some(agent.reserve(&plan.name)?);
        if !self.wanted.allow_changed_disks {
            check_disks(kept)?;
        }
        self.epoch = self.next_epoch(&plan.name, kept.epoch)?;
        Ok(())
    }

    /// Another guest is made of it, with disks, cards and identity of its own.
    fn admit_copy(&mut self, kept: &mut Description) -> Result<(), Failure> {
        let agent = self.agent;
        let missing = || Failure::new("DESCRIPTION", "a clone needs a name");
        let name = self.wanted.name.clone().ok_or_else(missing)?;
        let taken: Vec<u32> = lock(&agent.guests)
            .values()
            .filter_map(|guest| guest.plan.vsock_cid)
            .collect();
        clone::identity(&mut kept.plan, &name, &taken)?;
        let plan = &kept.plan;
        let action = Action::Clone {
            technology: plan.technology.in_policy(),
            emulated: plan.technology.emulated(),
            vcpus: plan.vcpus.into(),
            memory_mib: plan.memory_bytes >> 20,
        };
        let chosen = self
            .wanted
            .copy
            .as_ref()
            .and_then(|copy| copy.disks.clone());
        let made = chosen.as_deref().map(|folder| clone::targets(folder, plan));
        self.decide(&name, &action, kept, &made.unwrap_or_default())?;
        self.reserved = Some(agent.reserve(&name)?);
        if !self.wanted.allow_changed_disks {
            check_disks(kept)?;
        }
        let folder = chosen.map_or_else(|| agent.disk_folder(&name), Ok)?;
        let mut local = kept.local.clone();
        self.copies.make(plan, &mut local, &folder)?;
        if !self.wanted.allow_changed_disks {
            // Nor have they changed until the copies were made.
            check_disks(kept)?;
        }
        for tap in &mut local.taps {
            tap.tap = agent.fresh_tap();
        }
        kept.local = local;
        self.epoch = self.next_epoch(&name, 0)?;
        Ok(())
    }

    /// Asks the policy, about the files of the guest too.
    fn decide(
        &self,
        name: &str,
        action: &Action,
        kept: &Description,
        made: &[PathBuf],
    ) -> Result<(), Failure> {
        let disks = kept.local.disks.iter().chain(made);
        let facts = Facts {
            files: files::in_words(disks.map(PathBuf::as_path)),
            ..Facts::default()
        };
        self.agent.decide_knowing(self.caller, name, action, facts)
    }

    /// A machine that waits for its memory and state.
    fn build(&mut self, kept: &Description) -> Result<Channel, Failure> {
        let (agent, plan) = (self.agent, &kept.plan);
        let disks: Vec<&Path> = kept.local.disks.iter().map(PathBuf::as_path).collect();
        let folder = agent.guest_folder(&plan.name);
        let mut resources = Resources::open(plan, &folder, &disks, &kept.local.taps, Vec::new())?;
        if self.wanted.memory == MemoryMode::OnDemand {
            resources = resources.with_faults()?;
        }
        let guest = resources.prepare(
            agent.spawn_vmm(plan, VmmShare::default())?,
            plan.clone(),
            self.epoch,
        )?;
        let copy = self.wanted.copy.is_some();
        guest.vmm.call(&VmmRequest::Incoming { copy }, &[])?;
        let mover_end = guest.vmm.attach_mover()?;
        self.guest = Some(guest);
        Ok(mover_end)
    }

    /// Above every epoch that this host has seen of the guest, and the one that it had.
    fn next_epoch(&self, name: &str, had: u64) -> Result<u64, Failure> {
        let record = self.agent.ownership(name)?;
        Ok(record.map_or(0, |r| r.epoch).max(had) + 1)
    }

    /// Ownership is on the disk before the first instruction.
    fn take_over(&self) -> Result<(), Failure> {
        let guest = self
            .guest
            .as_ref()
            .ok_or_else(|| Failure::new("ROLE_PROTOCOL", "nothing was admitted"))?;
        // It went back in time: it must not use its random numbers again.
        let id = super::launch::random_id()?;
        guest.vmm.call(&VmmRequest::NewGeneration { id }, &[])?;
        self.record(guest, OwnershipState::Owner)
    }

    fn record(&self, guest: &Guest, state: OwnershipState) -> Result<(), Failure> {
        let record = Ownership {
            vm_id: hex::encode(guest.plan.vm_id),
            epoch: self.epoch,
            state,
            peer: None,
        };
        self.agent.record_ownership(&guest.plan.name, &record)
    }

    fn hear(&mut self, event: &MoverEvent, mover: &Arc<MoverProcess>) {
        let Some(guest) = &self.guest else { return };
        match event {
            MoverEvent::Running { .. } => {
                self.running = true;
                let us = u64::try_from(self.begun.elapsed().as_micros()).unwrap_or(u64::MAX);
                *lock(&guest.launch_us) = Some(us);
                *lock(&guest.mover) = Some(Arc::clone(mover));
                lock(&self.agent.guests).insert(guest.plan.name.clone(), Arc::clone(guest));
            }
            // A vCPU may wait for that page: it shall not go on without it.
            MoverEvent::PageLost { code } => {
                tracing::error!(code, "{}: a page of its snapshot is lost", guest.plan.name);
                guest.vmm.kill();
            }
            _ => {}
        }
    }

    fn conclude(mut self, path: &Path, outcome: Option<MoveOutcome>) -> Result<Answer, Failure> {
        let name = self.guest.as_ref().map(|g| g.plan.name.clone());
        let name = name.or_else(|| self.wanted.name.clone());
        let name = name.unwrap_or_else(|| "unknown".to_owned());
        let file = path.display().to_string();
        let (caller, action) = (self.caller.name(), self.wanted.action());
        let entry =
            |outcome| Entry::new(caller, action, &name, outcome).with("file", file.as_str());
        if let Some(guest) = &self.guest {
            *lock(&guest.mover) = None;
        }
        let (code, reason) = match (outcome, &self.guest) {
            (Some(MoveOutcome::Moved(_)), Some(guest)) => {
                self.copies.keep();
                let done = self.facts(guest, entry(Outcome::Done));
                self.agent.evidence.record(done)?;
                return Ok(Answer::Guest(guest.info_in(MachineState::Running)));
            }
            (Some(MoveOutcome::Failed { code, reason, .. }), _) => (code, reason),
            _ => ("MOVER_DIED".to_owned(), "the mover process died".to_owned()),
        };
        let ended = match &self.guest {
            None => "",
            Some(guest) => {
                guest.vmm.kill();
                lock(&self.agent.guests).remove(&guest.plan.name);
                self.record(guest, OwnershipState::Ended)?;
                if self.running {
                    "; the guest ran already and was ended"
                } else {
                    ""
                }
            }
        };
        self.agent.evidence.record(
            entry(Outcome::Failed)
                .code(&code)
                .with("reason", reason.as_str()),
        )?;
        Err(Failure {
            error: format!("{} cannot be {action}d: {reason}{ended}", path.display()),
            code,
        })
    }
}

impl Restoring<'_> {
    /// What of a guest that runs now is worth a record: of a clone, what makes it another one.
    fn facts(&self, guest: &Guest, entry: Entry) -> Entry {
        let mut entry = entry.with("epoch", self.epoch);
        if let Some(claim) = &self.claim {
            entry = entry
                .with("snapshot", hex::encode(claim.snapshot_id))
                .with("generation", claim.generation);
            if self.wanted.copy.is_some() {
                entry = entry.with("of", hex::encode(claim.vm_id));
            }
        }
        if self.wanted.copy.is_some() {
            let plan: &MachinePlan = &guest.plan;
            let cards = plan
                .nets
                .iter()
                .map(|net| format!("{}: {}", net.id, hex::encode(net.mac)));
            let disks = self
                .copies
                .paths()
                .iter()
                .map(|path| path.display().to_string());
            entry = entry
                .with("vm_id", hex::encode(plan.vm_id))
                .with("cards", cards.collect::<Vec<_>>())
                .with("disks", disks.collect::<Vec<_>>());
        }
        entry
    }
}

impl Agent {
    /// Where a clone's disks are put if nobody says.
    fn disk_folder(&self, name: &str) -> Result<PathBuf, Failure> {
        let folder = self.guest_folder(name);
        std::fs::create_dir_all(&folder)
            .map_err(|e| Failure::new("RESOURCE", format!("{}: {e}", folder.display())))?;
        Ok(files::real(&folder))
    }
}

fn check_disks(kept: &Description) -> Result<(), Failure> {
    for (path, mark) in kept.local.disks.iter().zip(&kept.disks) {
        let now = DiskMark::of(path).map_err(|e| {
            Failure::new(
                "RESOURCE",
                format!("{} cannot be used: {e}", path.display()),
            )
        })?;
        if now != *mark {
            return Err(Failure::new(
                "SNAPSHOT_DISK_CHANGED",
                format!(
                    "{} is not as the snapshot knows it (then {} bytes, written at {}; now {} bytes, written at {}); put \
                     back the copy made while the guest stood still (cp --preserve=timestamps), or say \
                     --allow-changed-disks",
                    path.display(),
                    mark.size,
                    mark.modified.0,
                    now.size,
                    now.modified.0
                ),
            ));
        }
    }
    Ok(())
}
