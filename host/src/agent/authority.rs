//! Who may ask what of this host: the policy in force, how another comes into force, and what waits for a second person.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use casemate_policy::document::MAX_DOCUMENT;
use casemate_policy::ledger::Entry;
use casemate_policy::mark::{AdmitError, Admitted, Candidate, HighWater, MarkStore, ReadPolicy};
use casemate_policy::sign::{MAX_SIGNATURES_LEN, SignerKey, Trust};
use casemate_policy::{ActionKind, Actor, DnsName, Fingerprint, HostPolicy, Inquiry, Timestamp};

use crate::agent::api::Failure;
use crate::agent::config::AgentConfig;
use crate::agent::evidence::Evidence;
use crate::agent::vmm_process::lock;

/// Who asks, as the kernel or TLS said, and under which name records have it.
#[derive(Clone, Debug)]
pub struct Caller {
    actor: Actor,
    name: String,
}

impl Caller {
    /// A user of this machine. Without people in the policy, whoever the socket lets in is its operator.
    pub fn local(uid: u32, policy: &HostPolicy) -> Self {
        let actor = Actor::Local { uid };
        let name = match policy.people() {
            None => "operator".to_owned(),
            Some(people) => people
                .find(&actor)
                .map_or_else(|| format!("uid {uid}"), |person| person.name.clone()),
        };
        Self { actor, name }
    }

    /// Whoever holds the key of a client certificate, as TLS verified it. Without people in the policy it is nobody's.
    pub fn certificate(san: DnsName, spki: Fingerprint, policy: &HostPolicy) -> Self {
        let name = san.to_string();
        let actor = Actor::Certificate { san, spki };
        let known = policy.people().and_then(|people| people.find(&actor));
        let name = known.map_or(name, |person| person.name.clone());
        Self { actor, name }
    }

    /// The host itself, for a peer whose identity the action carries.
    pub fn peer(name: &str) -> Self {
        Self {
            actor: Actor::Host,
            name: name.to_owned(),
        }
    }

    /// The host itself, on its own account.
    pub fn agent() -> Self {
        Self::peer("agent")
    }

    /// The name in records.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Who it is.
    pub fn actor(&self) -> &Actor {
        &self.actor
    }
}

/// The policy in force, and all it takes to replace it.
pub struct Authority {
    trust: Option<Trust>,
    mark: MarkStore,
    /// Every policy that was in force, by its digest: old decisions are explained by them, and a start after a crash
    /// finds the newest here.
    archive: PathBuf,
    in_force: Mutex<Arc<HostPolicy>>,
    /// One policy is put in force at a time.
    loading: Mutex<()>,
    waiting: Mutex<BTreeMap<String, Waiting>>,
}

/// A policy file with its signatures, as they were read.
pub struct PolicyText {
    file: String,
    text: String,
    signatures: Option<Vec<u8>>,
}

/// A policy that may be put in force, with its text.
pub struct Ready {
    admitted: Admitted,
    text: PolicyText,
    /// Whether another was in force before, or none.
    changed: bool,
}

struct Waiting {
    kind: ActionKind,
    object: String,
    asked_by: Actor,
    approvals: Vec<Actor>,
    until: Instant,
}

impl Authority {
    /// Reads the configured policy, and checks signatures, validity and that no newer one was in force. If a newer one
    /// was loaded since, that is the one.
    pub fn open(config: &AgentConfig) -> Result<(Self, Ready), Failure> {
        let archive = config.state_dir.join("policies");
        fs::create_dir_all(&archive)
            .map_err(|e| Failure::new("STATE", format!("{}: {e}", archive.display())))?;
        let store = MarkStore::new(&config.state_dir.join("policy.mark"));
        let mark = store.read().map_err(refused)?;
        let trust = config.policy_trust.clone();
        let admit = |text: PolicyText| text.admit(trust.as_ref(), mark.as_ref());
        let configured = PolicyText::read(&config.policy)?;
        let ready = match (admit(configured), &mark) {
            (Ok(ready), _) => ready,
            (Err(AdmitError::Older { found, .. }), Some(mark)) => {
                tracing::warn!(
                    found,
                    in_force = mark.version,
                    "the configured policy is older than the one that was loaded since; that one stays in force"
                );
                let path = archived(&archive, mark.digest);
                admit(PolicyText::read(&path)?).map_err(refused)?
            }
            (Err(error), _) => return Err(refused(error)),
        };
        let authority = Self {
            trust,
            mark: store,
            archive,
            in_force: Mutex::new(Arc::new(ready.admitted.policy.clone())),
            loading: Mutex::new(()),
            waiting: Mutex::new(BTreeMap::new()),
        };
        Ok((authority, ready))
    }

    /// The policy in force.
    pub fn policy(&self) -> Arc<HostPolicy> {
        Arc::clone(&lock(&self.in_force))
    }

    /// What loading this text asks of the policy in force, and the digest that it is about.
    pub fn proposal(
        &self,
        text: &PolicyText,
    ) -> Result<(casemate_policy::Action, Fingerprint), Failure> {
        let ReadPolicy { policy, signers } = text
            .candidate()
            .read(self.trust.as_ref())
            .map_err(refused)?;
        let now = self.policy();
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let action = casemate_policy::Action::PolicyLoad {
            version: policy.version,
            in_force: now.version,
            same: policy.digest() == now.digest(),
            signers: count(signers.len()),
            threshold: self
                .trust
                .as_ref()
                .map_or(0, |trust| count(trust.threshold())),
        };
        Ok((action, policy.digest()))
    }

    /// Holds the door while one policy replaces another.
    pub fn loading(&self) -> impl Drop + '_ {
        lock(&self.loading)
    }

    /// Checks a text against trust, clock and mark.
    pub fn admit(&self, text: PolicyText) -> Result<Ready, Failure> {
        let mark = self.mark.read().map_err(refused)?;
        text.admit(self.trust.as_ref(), mark.as_ref())
            .map_err(refused)
    }

    /// Puts a policy in force: its text is kept, the mark raised, the record written, and only then it decides.
    pub fn put_in_force(&self, evidence: &Evidence, ready: Ready) -> Result<(), Failure> {
        let mark = &ready.admitted.mark;
        ready
            .text
            .keep(&archived(&self.archive, mark.digest))
            .map_err(|e| Failure::new("STATE", format!("{}: {e}", self.archive.display())))?;
        if ready.changed {
            self.mark.raise(mark).map_err(refused)?;
            let digest = mark.digest.to_string();
            let entry = Entry::policy_loaded("agent", &ready.text.file, &digest, mark.version);
            evidence.record(ready.describe(entry))?;
        }
        *lock(&self.in_force) = Arc::new(ready.admitted.policy);
        Ok(())
    }

    /// Who agreed to this very action on this very object.
    pub fn approvals(&self, inquiry: &Inquiry) -> Vec<Actor> {
        let mut waiting = lock(&self.waiting);
        waiting.retain(|_, one| one.until > Instant::now());
        let one = waiting.get(&id_of(inquiry));
        one.filter(|one| one.asked_by == inquiry.actor)
            .map_or_else(Vec::new, |one| one.approvals.clone())
    }

    /// Remembers that an action waits for a second person; its id.
    pub fn wait_for_second(&self, inquiry: &Inquiry) -> String {
        let id = id_of(inquiry);
        let mut waiting = lock(&self.waiting);
        if waiting.len() >= MAX_WAITING {
            let oldest = waiting.iter().min_by_key(|(_, one)| one.until);
            let oldest = oldest.map(|(id, _)| id.clone());
            oldest.and_then(|id| waiting.remove(&id));
        }
        let one = Waiting {
            kind: inquiry.action.kind(),
            object: inquiry.object.clone(),
            asked_by: inquiry.actor.clone(),
            approvals: Vec::new(),
            until: Instant::now() + PATIENCE,
        };
        waiting.entry(id.clone()).or_insert(one);
        id
    }

    /// What waits under an id: its kind and object.
    pub fn waiting(&self, id: &str) -> Option<(ActionKind, String)> {
        let mut waiting = lock(&self.waiting);
        waiting.retain(|_, one| one.until > Instant::now());
        waiting.get(id).map(|one| (one.kind, one.object.clone()))
    }

    /// Adds somebody's agreement. Whether it counts is decided when the action is asked for again.
    pub fn agree(&self, id: &str, actor: &Actor) {
        if let Some(one) = lock(&self.waiting).get_mut(id)
            && !one.approvals.contains(actor)
        {
            one.approvals.push(actor.clone());
        }
    }

    /// An approval is for once.
    pub fn spend(&self, inquiry: &Inquiry) {
        lock(&self.waiting).remove(&id_of(inquiry));
    }
}

impl PolicyText {
    /// Reads a policy and, if there are any, the signatures beside it.
    pub fn read(path: &Path) -> Result<Self, Failure> {
        let failed = |path: &Path, e: &dyn std::fmt::Display| {
            Failure::new(
                "POLICY",
                format!("policy {} cannot be read: {e}", path.display()),
            )
        };
        let bytes = bounded(path, MAX_DOCUMENT).map_err(|e| failed(path, &e))?;
        let signatures = beside(path);
        let signatures = match bounded(&signatures, MAX_SIGNATURES_LEN as u64) {
            Ok(bytes) => Some(bytes),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => return Err(failed(&signatures, &e)),
        };
        Ok(Self {
            file: path.display().to_string(),
            text: String::from_utf8(bytes).map_err(|e| failed(path, &e))?,
            signatures,
        })
    }

    /// As it is to be admitted.
    pub fn candidate(&self) -> Candidate<'_> {
        Candidate {
            file: &self.file,
            text: &self.text,
            signatures: self.signatures.as_deref(),
        }
    }

    fn admit(self, trust: Option<&Trust>, mark: Option<&HighWater>) -> Result<Ready, AdmitError> {
        let now = Timestamp::of(SystemTime::now());
        let admitted = self.candidate().admit(trust, mark, now)?;
        Ok(Ready {
            changed: mark != Some(&admitted.mark),
            admitted,
            text: self,
        })
    }

    /// Text and signatures are on the disk before their names are.
    fn keep(&self, path: &Path) -> std::io::Result<()> {
        if let Some(signatures) = &self.signatures {
            replace(&beside(path), signatures)?;
        }
        replace(path, self.text.as_bytes())
    }
}

impl Ready {
    /// A record that says which policy this is.
    pub fn describe(&self, entry: Entry) -> Entry {
        let signers = self
            .signers()
            .map(|key| key.to_string())
            .collect::<Vec<_>>();
        entry
            .with("policy", self.admitted.mark.digest.to_string())
            .with("policy_version", self.admitted.mark.version)
            .with("policy_signers", signers)
    }

    /// Version and digest.
    pub fn mark(&self) -> &HighWater {
        &self.admitted.mark
    }

    /// Who of the trusted signed it.
    pub fn signers(&self) -> impl Iterator<Item = &SignerKey> {
        self.admitted.signers.iter()
    }
}

/// Where a policy's signatures are unless somebody says otherwise.
pub fn beside(policy: &Path) -> PathBuf {
    let mut name = OsString::from(policy.as_os_str());
    name.push(".sig");
    PathBuf::from(name)
}

/// The users, besides root and the agent's own, whom the policy lets ask at the socket.
pub fn other_users(policy: &HostPolicy, own: u32) -> BTreeSet<u32> {
    let all = policy.people().into_iter().flat_map(|people| people.uids());
    all.filter(|uid| *uid != 0 && *uid != own).collect()
}

/// The same question has the same id, whoever agreed and whenever it is asked.
fn id_of(inquiry: &Inquiry) -> String {
    let mut bare = inquiry.clone();
    bare.approvals.clear();
    bare.clock = Timestamp::from_unix(0);
    let digest = Fingerprint::of(bare.canonical().as_bytes());
    let short = digest.as_bytes().get(..8).unwrap_or_default();
    hex::encode(short)
}

fn archived(archive: &Path, digest: Fingerprint) -> PathBuf {
    archive.join(format!("{}.toml", hex::encode(digest.as_bytes())))
}

fn bounded(path: &Path, most: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(most + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > most {
        let text = format!("longer than {most} bytes");
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, text));
    }
    Ok(bytes)
}

fn replace(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut fresh = OsString::from(path.as_os_str());
    fresh.push(".new");
    let mut file = File::create(&fresh)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&fresh, path)?;
    File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
}

fn refused(error: AdmitError) -> Failure {
    let code = match &error {
        AdmitError::Document(_) => "POLICY",
        other => other.code(),
    };
    Failure::new(code, error.to_string())
}

/// How long an action waits for its second person.
const PATIENCE: Duration = Duration::from_secs(15 * 60);
/// Actions that wait at a time.
const MAX_WAITING: usize = 64;
