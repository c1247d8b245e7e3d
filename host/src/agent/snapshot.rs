//! Snapshots of a guest: the agent opens the file, decides and makes the key; a mover seals.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use casemate_policy::Action;
use casemate_policy::ledger::{Entry, Outcome};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::agent::api::{Answer, Failure};
use crate::agent::authority::Caller;
use crate::agent::guest::{Guest, Local};
use crate::agent::snapshot_keys::{KeyError, SnapshotKeys, SnapshotOf};
use crate::agent::transfer::role_error;
use crate::agent::vmm_process::lock;
use crate::agent::{Agent, files};
use crate::machine::plan::{MachinePlan, Technology};
use crate::machine::saved::{Format, FormatError};
use crate::mover::protocol::{
    AgentAnswer, MoveOutcome, MoverCommand, MoverRequestToAgent, SnapshotStart,
};
use crate::vmm::protocol::{RoleError, VmmRequest};

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
    /// Whether it is a template: cloned as often as one likes, never restored itself.
    #[serde(default)]
    pub template: bool,
}

/// How a snapshot is wanted.
#[derive(Clone, Copy)]
pub(super) struct SnapshotWish<'a> {
    pub(super) file: &'a Path,
    pub(super) stop: bool,
    pub(super) template: bool,
}

/// What a snapshot keeps for the agent that restores it.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Description {
    pub(super) plan: MachinePlan,
    pub(super) epoch: u64,
    pub(super) local: Local,
    pub(super) disks: Vec<DiskMark>,
    pub(super) template: bool,
}

/// A snapshot's description. Version 1 had neither tag nor number, and knew no templates (2); the plan in it changed (3).
const DESCRIPTION: Format = Format {
    name: "snapshot's description",
    tag: *b"CSMT-SDN",
    version: 3,
    max: 256 << 10,
};

/// How a disk's image was when the guest stood still, everything written.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct DiskMark {
    pub(super) size: u64,
    pub(super) modified: (i64, i64),
}

impl DiskMark {
    pub(super) fn of(path: &Path) -> std::io::Result<Self> {
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
        wish: SnapshotWish<'_>,
    ) -> Result<Answer, Failure> {
        let guest = self.guest(name)?;
        self.may_snapshot(&guest, wish)?;
        let SnapshotWish { file, stop, .. } = wish;
        let written = self.take_snapshot(&guest, wish);
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
                    .with("generation", info.generation)
                    .with("template", info.template);
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

    /// `casemate vm snapshot-erase`.
    pub(super) fn erase_snapshot(&self, caller: &Caller, id: &str) -> Result<Answer, Failure> {
        let mut snapshot_id = [0u8; 16];
        hex::decode_to_slice(id, &mut snapshot_id).map_err(|_| {
            let text = format!(
                "{id:?} is no snapshot's id; `casemate snapshot` printed one of 32 hex digits"
            );
            Failure::new("SNAPSHOT_ID", text)
        })?;
        let keys = self.snapshot_keys();
        let name = keys.name(&snapshot_id).map_err(keys_failed)?;
        self.decide(caller, &name, &Action::SnapshotErase)?;
        let erased = keys.erase(&snapshot_id).map_err(keys_failed);
        let outcome = erased.as_ref().map_or(Outcome::Failed, |()| Outcome::Done);
        let mut entry = Entry::new(caller.name(), "snapshot-erase", &name, outcome);
        entry = entry.with("snapshot", hex::encode(snapshot_id));
        if let Err(failure) = &erased {
            entry = entry.code(&failure.code);
        }
        self.evidence.record(entry)?;
        erased.map(|()| Answer::Done)
    }

    /// The keys of this host's snapshots.
    pub(super) fn snapshot_keys(&self) -> SnapshotKeys {
        SnapshotKeys::at(&self.config.state_dir, self.config.snapshots.as_ref())
    }

    fn may_snapshot(&self, guest: &Guest, wish: SnapshotWish<'_>) -> Result<(), Failure> {
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
        if wish.template && !wish.stop && guest.plan.disks.iter().any(|disk| !disk.read_only) {
            return Err(Failure::new(
                "TEMPLATE_DISKS",
                format!("{name} would write to the disks of its template; make that with --stop"),
            ));
        }
        self.must_own(name)
    }

    fn take_snapshot(
        &self,
        guest: &Arc<Guest>,
        wish: SnapshotWish<'_>,
    ) -> Result<SnapshotInfo, Failure> {
        let file = new_file(wish.file)?;
        let snapshot_id = super::launch::random_id()?;
        let written = self.write_snapshot(guest, wish, snapshot_id, &file);
        if written.is_err() {
            // The key of nothing.
            let _ = self.snapshot_keys().erase(&snapshot_id);
        }
        written
    }

    fn write_snapshot(
        &self,
        guest: &Arc<Guest>,
        wish: SnapshotWish<'_>,
        snapshot_id: [u8; 16],
        file: &File,
    ) -> Result<SnapshotInfo, Failure> {
        let SnapshotWish {
            file: path,
            stop,
            template,
        } = wish;
        let keys = self.snapshot_keys();
        let vm_id = guest.plan.vm_id;
        let of = SnapshotOf {
            snapshot_id: &snapshot_id,
            vm_id: &vm_id,
        };
        let secret = keys.make(of, &guest.plan.name).map_err(keys_failed)?;
        let generation = keys.newest(&vm_id).map_err(keys_failed)? + 1;
        keys.advance(&vm_id, generation).map_err(keys_failed)?;
        let start = SnapshotStart {
            snapshot_id,
            generation,
            secret: secret.to_vec(),
            stop,
        };
        let command = MoverCommand::Snapshot(Box::new(start));
        let mover = self.start_mover(guest, &command, &[file.as_fd()])?;
        let outcome = mover.serve(
            &mut |request| match request {
                MoverRequestToAgent::DescribeSnapshot => {
                    Ok((describe(guest, template)?, Vec::new()))
                }
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
            Some(MoveOutcome::Assessed(_) | MoveOutcome::Settled(_)) => {
                let text = "a mover did not write what it was to";
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
            template,
        })
    }
}

fn describe(guest: &Guest, template: bool) -> Result<AgentAnswer, RoleError> {
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
        template,
        local,
    };
    let description = DESCRIPTION
        .encode(&description)
        .map_err(|e| role_error("INTERNAL", e.to_string()))?;
    Ok(AgentAnswer::Description { description })
}

/// Opened by its seal, so this host wrote it; perhaps another version of it did.
pub(super) fn parse(bytes: &[u8]) -> Result<Description, Failure> {
    let refuse =
        |text: String| Failure::new("DESCRIPTION", format!("the snapshot's description {text}"));
    let kept: Description = DESCRIPTION.decode(bytes).map_err(|e| match e {
        // Before the tag there were no versions.
        FormatError::Version { .. } | FormatError::Tag(_) => Failure::new(
            "STATE_VERSION",
            format!(
                "{e}: another version of casemate took the snapshot, which alone can restore it"
            ),
        ),
        e => Failure::new("DESCRIPTION", e.to_string()),
    })?;
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

fn new_file(path: &Path) -> Result<File, Failure> {
    let file = files::create(path);
    file.map_err(|e| match e.kind() {
        std::io::ErrorKind::AlreadyExists => Failure::new(
            "SNAPSHOT_EXISTS",
            format!("{} exists; name another file", path.display()),
        ),
        _ => file_failed(path, &e),
    })
}

pub(super) fn existing_file(path: &Path) -> Result<File, Failure> {
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

pub(super) fn keys_failed(error: KeyError) -> Failure {
    Failure::new(error.code(), error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::guest::TapChoice;
    use crate::machine::saved;

    #[test]
    fn a_description_is_as_its_golden_file_has_it() {
        let plan = std::fs::read(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/golden/machine-plan-3.bin"
        ));
        let plan = MachinePlan {
            technology: Technology::None,
            ..saved::decode_plan(&plan.unwrap()).unwrap()
        };
        let description = Description {
            plan,
            epoch: 3,
            local: Local {
                disks: vec!["/srv/data.raw".into()],
                taps: vec![TapChoice {
                    tap: "tap0".into(),
                    bridge: Some("br0".into()),
                }],
            },
            disks: vec![DiskMark {
                size: 1 << 30,
                modified: (1_700_000_000, 5),
            }],
            template: true,
        };
        let bytes = DESCRIPTION.encode(&description).unwrap();
        let golden = saved::golden("snapshot-description-3.bin", &bytes);
        assert!(parse(&golden).unwrap() == description);
        assert!(
            bytes == golden,
            "a change of a description is a new version"
        );
        for other in [&bytes[8..], &[&bytes[..8], &[1, 0], &bytes[10..]].concat()] {
            assert_eq!(parse(other).unwrap_err().code, "STATE_VERSION");
        }
        let fewer = Description {
            disks: vec![],
            ..description
        };
        let fewer = DESCRIPTION.encode(&fewer).unwrap();
        assert_eq!(parse(&fewer).unwrap_err().code, "DESCRIPTION");
    }
}
