//! Descriptions that a host keeps, so that their guests can be started by name; and what a running guest takes and says.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use casemate_policy::ActionKind;
use casemate_policy::ledger::{Entry, Outcome};
use serde::{Deserialize, Serialize};

use crate::agent::api::{Answer, DefinitionInfo, Failure, SessionText, StatsInfo};
use crate::agent::authority::Caller;
use crate::agent::evidence::replace_secret;
use crate::agent::launch::description_text;
use crate::agent::vmm_process::lock;
use crate::agent::{Agent, files};
use crate::machine::plan::is_name;
use crate::machine::spec::MachineSpec;
use crate::vmm::protocol::MachineState;

/// A description as it was when it was handed in.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Definition {
    description: PathBuf,
    text: String,
}

impl Agent {
    /// `casemate vm create`.
    pub(super) fn create(&self, caller: &Caller, description: &Path) -> Result<Answer, Failure> {
        let wrong = |e: &dyn std::fmt::Display| Failure::new("DESCRIPTION", e.to_string());
        if !description.is_absolute() {
            return Err(wrong(&"want an absolute path"));
        }
        let text = description_text(description)?;
        let spec = MachineSpec::parse(description, &text).map_err(|e| wrong(&e))?;
        let files = files::in_words(spec.files());
        self.may_ask(caller, ActionKind::Launch, Some(&spec.name), files)?;
        let folder = self.definitions_folder();
        fs::create_dir_all(&folder).map_err(|e| unusable(&folder, &e))?;
        if self.kept()?.len() >= MAX_KEPT {
            let text = format!("{MAX_KEPT} descriptions are kept already; delete some");
            return Err(Failure::new("BUSY", text));
        }
        let path = self.definition_path(&spec.name);
        let definition = Definition {
            description: description.to_owned(),
            text,
        };
        let bytes = serde_json::to_vec(&definition).map_err(|e| wrong(&e))?;
        let entry = Entry::new(caller.name(), "create", &spec.name, Outcome::Done);
        self.evidence.record(entry)?;
        replace_secret(&path, &bytes).map_err(|e| unusable(&path, &e))?;
        Ok(Answer::Definition(self.info_of(spec.name, definition)))
    }

    /// `casemate vm definitions`.
    pub(super) fn definitions(&self) -> Result<Answer, Failure> {
        let mut definitions = Vec::new();
        for name in self.kept()? {
            let definition = self.definition(&name)?;
            definitions.push(self.info_of(name, definition));
        }
        Ok(Answer::Definitions { definitions })
    }

    /// `casemate vm start`.
    pub(super) fn start_defined(
        &self,
        caller: &Caller,
        name: &str,
        session: Option<SessionText>,
    ) -> Result<Answer, Failure> {
        let Definition { description, text } = self.definition(name)?;
        let spec = MachineSpec::parse(&description, &text)
            .map_err(|e| Failure::new("DESCRIPTION", e.to_string()))?;
        self.launch_described(caller, &spec, session)
    }

    /// `casemate vm delete`.
    pub(super) fn delete(&self, caller: &Caller, name: &str) -> Result<Answer, Failure> {
        self.definition(name)?;
        if lock(&self.guests).contains_key(name) || lock(&self.starting).contains(name) {
            let text = format!("{name} is on this host; stop it first");
            return Err(Failure::new("NAME_TAKEN", text));
        }
        let path = self.definition_path(name);
        let entry = Entry::new(caller.name(), "delete", name, Outcome::Done);
        self.evidence.record(entry)?;
        fs::remove_file(&path).map_err(|e| unusable(&path, &e))?;
        Ok(Answer::Done)
    }

    /// `casemate vm stats`.
    pub(super) fn stats(&self, name: &str) -> Result<Answer, Failure> {
        let guest = self.guest(name)?;
        let process = PathBuf::from(format!("/proc/{}", guest.vmm.pid()));
        let read = |file: &str| {
            let path = process.join(file);
            fs::read_to_string(&path).map_err(|e| unusable(&path, &e))
        };
        let (stat, memory) = (read("stat")?, read("statm")?);
        // Behind the name, which may hold anything; field 3 of proc(5) is the first here.
        let fields: Vec<u64> = stat
            .rsplit_once(')')
            .into_iter()
            .flat_map(|(_, rest)| rest.split_whitespace().map(|f| f.parse().unwrap_or(0)))
            .collect();
        let field = |number: usize| fields.get(number - 3).copied().unwrap_or_default();
        let pages = memory
            .split_whitespace()
            .nth(1)
            .and_then(|p| p.parse().ok());
        let ticks = field(14) + field(15);
        let console = fs::metadata(&guest.console);
        Ok(Answer::Stats(StatsInfo {
            name: name.to_owned(),
            cpu_ms: ticks * 1000 / TICKS,
            resident_bytes: pages.unwrap_or(0u64) * PAGE,
            threads: u32::try_from(field(20)).unwrap_or(u32::MAX),
            console_bytes: console.map_or(0, |meta| meta.len()),
        }))
    }

    /// `casemate vm console`.
    pub(super) fn console(&self, name: &str, from: u64) -> Result<Answer, Failure> {
        let guest = self.guest(name)?;
        // Asked first: what was written before the end is in the file by then.
        let state = guest.info()?.state;
        let path = &guest.console;
        let file = File::open(path).map_err(|e| unusable(path, &e))?;
        let kept = file.metadata().map_err(|e| unusable(path, &e))?.len();
        let from = from.min(kept);
        let mut bytes = vec![0; MAX_PART];
        let count = file
            .read_at(&mut bytes, from)
            .map_err(|e| unusable(path, &e))?;
        bytes.truncate(count);
        Ok(Answer::Console {
            next: from.saturating_add(count as u64),
            bytes: STANDARD.encode(&bytes),
            ended: matches!(state, MachineState::Stopped | MachineState::Lost),
        })
    }

    fn info_of(&self, name: String, definition: Definition) -> DefinitionInfo {
        DefinitionInfo {
            present: lock(&self.guests).contains_key(&name),
            name,
            description: definition.description,
        }
    }

    /// Names of what is kept, in order.
    fn kept(&self) -> Result<Vec<String>, Failure> {
        let folder = self.definitions_folder();
        let entries = match fs::read_dir(&folder) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(|e| unusable(&folder, &e))?,
        };
        let names = entries.flatten().filter_map(|entry| {
            let name = entry.file_name();
            let name = name.to_str()?.strip_suffix(SUFFIX)?;
            is_name(name).then(|| name.to_owned())
        });
        let mut names: Vec<String> = names.collect();
        names.sort();
        Ok(names)
    }

    fn definition(&self, name: &str) -> Result<Definition, Failure> {
        let unknown = || {
            Failure::new(
                "NO_SUCH_GUEST",
                format!("no description of {name:?} is kept; see `casemate vm definitions`"),
            )
        };
        if !is_name(name) {
            return Err(unknown());
        }
        let path = self.definition_path(name);
        let bytes = match fs::read(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(unknown()),
            bytes => bytes.map_err(|e| unusable(&path, &e))?,
        };
        serde_json::from_slice(&bytes).map_err(|e| unusable(&path, &e.into()))
    }

    fn definitions_folder(&self) -> PathBuf {
        self.config.state_dir.join("definitions")
    }

    fn definition_path(&self, name: &str) -> PathBuf {
        self.definitions_folder().join(format!("{name}{SUFFIX}"))
    }
}

fn unusable(path: &Path, error: &std::io::Error) -> Failure {
    Failure::new("STATE", format!("{}: {error}", path.display()))
}

const SUFFIX: &str = ".json";
/// Most descriptions kept.
const MAX_KEPT: usize = 1024;
/// Most bytes of console output in one answer.
const MAX_PART: usize = 64 * 1024;
/// Linux reports processor time in hundredths of a second, whatever its own clock (`USER_HZ`).
const TICKS: u64 = 100;
const PAGE: u64 = 4096;
