//! Snapshot and restore of a guest: the agent opens the file, decides and derives the secret; a mover seals and opens.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use casemate_policy::Action;
use casemate_policy::ledger::{Entry, Outcome};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::agent::api::{Answer, Failure};
use crate::agent::authority::Caller;
use crate::agent::decision::Facts;
use crate::agent::guest::{Guest, Local, Resources};
use crate::agent::record::{Ownership, OwnershipState};
use crate::agent::snapshot_keys::SnapshotKeys;
use crate::agent::transfer::role_error;
use crate::agent::vmm_process::lock;
use crate::agent::{Agent, Reserved, files};
use crate::ipc::Channel;
use crate::machine::plan::{MachinePlan, Technology, is_name};
use crate::mover::protocol::{
    AgentAnswer, MoveOutcome, MoverCommand, MoverEvent, MoverRequestToAgent, OwnershipStep,
    RestoreStart, SnapshotClaim, SnapshotStart,
};
use crate::sandbox::jail::CpuShare;
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

/// A snapshot that was written.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct SnapshotInfo {
    /// The file.
    pub file: PathBuf,
    /// Its id, hex.
    pub snapshot_id: String,
    /// The guest's identity, hex.
    pub vm_id: String,
    /// Rises with each snapshot of the guest.
    pub generation: u64,
    /// Pages of guest memory.
    pub pages: u64,
    /// Those of them that are zero, and not in the file.
    pub zero_pages: u64,
    /// For how long the guest stood still, in milliseconds; until now if it was stopped.
    pub pause_ms: f64,
    /// Whether it was ended.
    pub stopped: bool,
}

/// How a restore is wanted.
pub(super) struct Wanted {
    pub(super) name: Option<String>,
    pub(super) memory: MemoryMode,
    pub(super) allow_older: bool,
    pub(super) allow_changed_disks: bool,
}

/// What a snapshot keeps for the agent that restores it.
#[derive(Serialize, Deserialize)]
struct Description {
    plan: MachinePlan,
    epoch: u64,
    local: Local,
    disks: Vec<DiskMark>,
}

/// How a disk's image was when the guest stood still, everything written.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct DiskMark {
    size: u64,
    modified: (i64, i64),
}

impl DiskMark {
    fn of(path: &Path) -> std::io::Result<Self> {
        let file = files::open(path, false)?;
        file.sync_all()?;
        let found = file.metadata()?;
        Ok(Self {
            size: found.len(),
            modified: (found.mtime(), found.mtime_nsec()),
        })
    }
}

impl Agent {
    /// `casemate snapshot`.
    pub(super) fn snapshot(
        &self,
        caller: &Caller,
        name: &str,
        file: &Path,
        stop: bool,
    ) -> Result<Answer, Failure> {
        let guest = self.guest(name)?;
        self.may_snapshot(&guest)?;
        let written = self.take_snapshot(&guest, file, stop);
        if written.is_err() {
            // What is not whole is nothing; the file is ours, it was made here.
            if let Err(failure) = &written
                && failure.code != "SNAPSHOT_EXISTS"
            {
                let _ = std::fs::remove_file(file);
            }
        }
        let outcome = written.as_ref().map_or(Outcome::Failed, |_| Outcome::Done);
        let mut entry = Entry::new(caller.name(), "snapshot", name, outcome);
        match &written {
            Ok(info) => {
                entry = entry
                    .with("snapshot", info.snapshot_id.as_str())
                    .with("generation", info.generation);
            }
            Err(failure) => entry = entry.code(&failure.code),
        }
        self.evidence.record(entry)?;
        let info = written?;
        if stop {
            self.stop(caller, name)?;
        }
        Ok(Answer::Snapshotted(info))
    }

    fn may_snapshot(&self, guest: &Guest) -> Result<(), Failure> {
        let name = &guest.plan.name;
        if guest.plan.technology != Technology::None {
            return Err(Failure::new(
                "TECHNOLOGY_CANNOT_SNAPSHOT",
                format!(
                    "{name} is a {} guest: its memory and registers are its owner's, and no firmware gives them to a file; \
                     snapshot its disks, and launch it anew",
                    guest.plan.technology.name()
                ),
            ));
        }
        self.must_own(name)
    }

    fn take_snapshot(
        &self,
        guest: &Arc<Guest>,
        path: &Path,
        stop: bool,
    ) -> Result<SnapshotInfo, Failure> {
        let keys = SnapshotKeys::at(&self.config.state_dir);
        let vm_id = guest.plan.vm_id;
        let file = new_file(path)?;
        let snapshot_id = super::launch::random_id()?;
        let generation = keys.newest(&vm_id).map_err(keys_failed)? + 1;
        keys.advance(&vm_id, generation).map_err(keys_failed)?;
        let start = SnapshotStart {
            snapshot_id,
            generation,
            secret: keys
                .secret(&snapshot_id, &vm_id)
                .map_err(keys_failed)?
                .to_vec(),
            stop,
        };
        let command = MoverCommand::Snapshot(Box::new(start));
        let mover = self.start_mover(guest, &command, &[file.as_fd()])?;
        let outcome = mover.serve(
            &mut |request| match request {
                MoverRequestToAgent::DescribeSnapshot => Ok((describe(guest)?, Vec::new())),
                _ => Err(role_error(
                    "ROLE_PROTOCOL",
                    "a snapshot asks for nothing else",
                )),
            },
            &mut |_| {},
        );
        *lock(&guest.mover) = None;
        let report = match outcome {
            Some(MoveOutcome::Moved(report)) => report,
            Some(MoveOutcome::Failed { code, reason, .. }) => {
                return Err(Failure {
                    code,
                    error: format!("no snapshot of {}: {reason}", guest.plan.name),
                });
            }
            Some(MoveOutcome::Assessed(_)) => {
                let text = "a mover assessed what it was to write";
                return Err(Failure::new("ROLE_PROTOCOL", text));
            }
            None => return Err(Failure::new("MOVER_DIED", "the mover process died")),
        };
        let durable = file.sync_all().and_then(|()| sync_folder(path));
        if let Err(error) = durable {
            if stop {
                // It was to end with a snapshot, and there is none.
                guest.vmm.call(&VmmRequest::Resume, &[])?;
            }
            return Err(file_failed(path, &error));
        }
        Ok(SnapshotInfo {
            file: path.to_owned(),
            snapshot_id: hex::encode(snapshot_id),
            vm_id: hex::encode(vm_id),
            generation,
            pages: report.pages,
            zero_pages: report.zero_pages,
            pause_ms: report.downtime_ms,
            stopped: stop,
        })
    }

    /// `casemate restore`.
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
        };
        mover.start(&MoverCommand::Restore(start), &[file.as_fd()])?;
        let restoring = std::cell::RefCell::new(Restoring {
            agent: self,
            caller,
            wanted,
            begun: Instant::now(),
            guest: None,
            reserved: None,
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

    /// The secret, unless the snapshot is older than the guest's newest. What the file claims is not yet believed, but
    /// with a false claim the secret opens nothing.
    fn key(&self, claim: SnapshotClaim) -> Result<Vec<u8>, Failure> {
        let keys = SnapshotKeys::at(&self.agent.config.state_dir);
        let newest = keys.newest(&claim.vm_id).map_err(keys_failed)?;
        if claim.generation < newest && !self.wanted.allow_older {
            return Err(Failure::new(
                "SNAPSHOT_OLDER",
                format!(
                    "the snapshot is the guest's {}., its newest the {newest}.; restore that, or say --allow-older",
                    claim.generation
                ),
            ));
        }
        let secret = keys.secret(&claim.snapshot_id, &claim.vm_id);
        Ok(secret.map_err(keys_failed)?.to_vec())
    }

    fn admit(&mut self, description: &[u8]) -> Result<Channel, Failure> {
        if self.guest.is_some() {
            return Err(Failure::new("ROLE_PROTOCOL", "a restore makes one guest"));
        }
        let agent = self.agent;
        let mut kept = parse(description)?;
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
        let facts = Facts {
            files: files::in_words(kept.local.disks.iter().map(PathBuf::as_path)),
            ..Facts::default()
        };
        agent.decide_knowing(self.caller, &plan.name, &action, facts)?;
        self.reserved = Some(agent.reserve(&plan.name)?);
        if !self.wanted.allow_changed_disks {
            check_disks(&kept)?;
        }
        self.epoch = self.next_epoch(&kept)?;
        let disks: Vec<&Path> = kept.local.disks.iter().map(PathBuf::as_path).collect();
        let folder = agent.guest_folder(&plan.name);
        let mut resources = Resources::open(plan, &folder, &disks, &kept.local.taps, Vec::new())?;
        if self.wanted.memory == MemoryMode::OnDemand {
            resources = resources.with_faults()?;
        }
        let guest = resources.prepare(
            agent.spawn_vmm(plan, CpuShare::default())?,
            plan.clone(),
            self.epoch,
        )?;
        guest.vmm.call(&VmmRequest::Incoming, &[])?;
        let mover_end = guest.vmm.attach_mover()?;
        self.guest = Some(guest);
        Ok(mover_end)
    }

    /// Above every epoch that this host has seen of the guest.
    fn next_epoch(&self, kept: &Description) -> Result<u64, Failure> {
        let record =
            self.agent.records.read(&kept.plan.name).map_err(|e| {
                Failure::new("RECORD", format!("record of {}: {e}", kept.plan.name))
            })?;
        Ok(record.map_or(0, |r| r.epoch).max(kept.epoch) + 1)
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

    fn hear(&mut self, event: &MoverEvent, mover: &Arc<crate::agent::mover_process::MoverProcess>) {
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

    fn conclude(self, path: &Path, outcome: Option<MoveOutcome>) -> Result<Answer, Failure> {
        let name = self
            .guest
            .as_ref()
            .map_or_else(|| "unknown".to_owned(), |g| g.plan.name.clone());
        let file = path.display().to_string();
        let entry = |outcome| {
            Entry::new(self.caller.name(), "restore", &name, outcome).with("file", file.as_str())
        };
        if let Some(guest) = &self.guest {
            *lock(&guest.mover) = None;
        }
        let (code, reason) = match (outcome, &self.guest) {
            (Some(MoveOutcome::Moved(_)), Some(guest)) => {
                self.agent
                    .evidence
                    .record(entry(Outcome::Done).with("epoch", self.epoch))?;
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
            error: format!("{} cannot be restored: {reason}{ended}", path.display()),
            code,
        })
    }
}

fn describe(guest: &Guest) -> Result<AgentAnswer, RoleError> {
    let local = lock(&guest.local).clone();
    let marks = local.disks.iter().map(|path| {
        DiskMark::of(path).map_err(|e| {
            role_error(
                "RESOURCE",
                format!("{} cannot be written out: {e}", path.display()),
            )
        })
    });
    let description = Description {
        plan: guest.plan_now(),
        epoch: *lock(&guest.epoch),
        disks: marks.collect::<Result<_, _>>()?,
        local,
    };
    let description =
        postcard::to_stdvec(&description).map_err(|e| role_error("INTERNAL", e.to_string()))?;
    Ok(AgentAnswer::Description { description })
}

/// Opened by its seal, so this host wrote it; perhaps another version of it did.
fn parse(bytes: &[u8]) -> Result<Description, Failure> {
    let refuse =
        |text: String| Failure::new("DESCRIPTION", format!("the snapshot's description {text}"));
    let (kept, rest) = postcard::take_from_bytes::<Description>(bytes)
        .map_err(|e| refuse(format!("cannot be read: {e}")))?;
    if !rest.is_empty() {
        return Err(refuse(format!("has {} bytes behind it", rest.len())));
    }
    kept.plan.check().map_err(refuse)?;
    if kept.plan.technology != Technology::None {
        return Err(refuse("is of a confidential guest".into()));
    }
    let disks = kept.plan.disks.len();
    if kept.disks.len() != disks
        || kept.local.disks.len() != disks
        || kept.local.taps.len() != kept.plan.nets.len()
    {
        return Err(refuse("names other disks or cards than its plan".into()));
    }
    Ok(kept)
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

fn new_file(path: &Path) -> Result<File, Failure> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    file.map_err(|e| match e.kind() {
        std::io::ErrorKind::AlreadyExists => Failure::new(
            "SNAPSHOT_EXISTS",
            format!("{} exists; name another file", path.display()),
        ),
        _ => file_failed(path, &e),
    })
}

fn existing_file(path: &Path) -> Result<File, Failure> {
    files::open(path, false).map_err(|e| file_failed(path, &e))
}

fn sync_folder(path: &Path) -> std::io::Result<()> {
    match path.parent() {
        Some(folder) => File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}

fn file_failed(path: &Path, error: &std::io::Error) -> Failure {
    Failure::new("SNAPSHOT_FILE", format!("{}: {error}", path.display()))
}

fn keys_failed(error: std::io::Error) -> Failure {
    Failure::new(
        "SNAPSHOT_KEY",
        format!("the host's key for snapshots: {error}"),
    )
}
