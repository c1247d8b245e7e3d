//! No request passes without the policy, and none that is refused or changes something without a record.

use std::path::PathBuf;

use casemate_policy::ledger::{Detail, Record, VerifyingKey, verify};
use casemate_policy::sign::{Signatures, SigningKey};
use ring::rand::SystemRandom;
use ring::signature::Ed25519KeyPair;

use super::*;
use crate::agent::config::AgentConfig;
use crate::agent::platform_api::PlatformOrderText;
use crate::agent::server::Who;

pub(super) const POLICY: &str = "[host]\nname = 'h'\n[technologies]\nallowed = ['none', 'sev']\n[limits]\nmax_vcpus = 1\nmax_memory_mib = 64\n";
const PEOPLE: &str = "[people]\ntwo_person = ['policy-load']\n\
    [[person]]\nname = 'olga'\nrole = 'operator'\nuid = 1000\n\
    [[person]]\nname = 'vera'\nrole = 'viewer'\nuid = 1001\n\
    [[person]]\nname = 'sam'\nrole = 'security-officer'\nuid = 1002\n\
    [[person]]\nname = 'sue'\nrole = 'security-officer'\nuid = 1003\n";

pub(super) struct Host {
    folder: tempfile::TempDir,
    agent: Option<Agent>,
}

impl Host {
    /// An agent without roles: nothing here is emulated, so it starts no process.
    pub(super) fn new(policy: &str, trust: &str) -> Self {
        let mut host = Self {
            folder: tempfile::tempdir().unwrap(),
            agent: None,
        };
        std::fs::write(host.path("policy.toml"), policy).unwrap();
        let name = host.folder.path().file_name().unwrap().to_str().unwrap();
        let name = name.trim_start_matches('.');
        let config = format!(
            "name = '{name}'\nstate_dir = 'state'\nsocket = 's'\npolicy = 'policy.toml'\n{trust}"
        );
        std::fs::write(host.path("agent.toml"), config).unwrap();
        std::fs::write(host.path("s"), "").unwrap();
        host.start().unwrap();
        host
    }

    fn start(&mut self) -> Result<(), Failure> {
        self.agent = None;
        let config = AgentConfig::load(&self.path("agent.toml")).unwrap();
        self.agent = Some(Agent::start(config)?);
        Ok(())
    }

    /// The same host under another policy.
    pub(super) fn restart_with(&mut self, policy: &str) {
        std::fs::write(self.path("policy.toml"), policy).unwrap();
        self.start().unwrap();
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(super) fn ask(&self, uid: u32, request: Request) -> Result<Answer, Failure> {
        let agent = self.agent.as_ref().unwrap();
        let caller = Caller::local(uid, &agent.policy());
        agent.handle(&caller, request, &mut |_| {})
    }

    pub(super) fn code(&self, uid: u32, request: Request) -> String {
        match self.ask(uid, request) {
            Ok(_) => "ok".to_owned(),
            Err(failure) => failure.code,
        }
    }

    fn load(&self, uid: u32, file: &str) -> Result<Answer, Failure> {
        let policy = self.path(file);
        self.ask(uid, Request::PolicyLoad { policy })
    }

    pub(super) fn records(&self) -> Vec<Record> {
        let text = std::fs::read_to_string(self.path("state/ledger.pub")).unwrap();
        let key: VerifyingKey = text.trim().parse().unwrap();
        let verified = verify(&self.path("state/ledger"), &key).unwrap();
        verified.records().to_vec()
    }
}

fn name() -> String {
    "vm".to_owned()
}

/// One of each. The match makes a request that is missing here an error of the compiler.
pub fn every_request() -> Vec<Request> {
    let all = vec![
        Request::Run {
            description: PathBuf::from("/etc/shadow"),
            session: None,
        },
        Request::List {},
        Request::Status { name: name() },
        Request::Stop { name: name() },
        Request::Pause { name: name() },
        Request::Resume { name: name() },
        Request::Measurement { name: name() },
        Request::InjectSecret {
            name: name(),
            header: String::new(),
            ciphertext: String::new(),
        },
        Request::Migrate {
            name: name(),
            to: name(),
            downtime_limit_ms: None,
            time_limit_s: None,
            bandwidth_mib: None,
            unthrottled: false,
            read_back: false,
            streams: None,
            copy_disks: vec![name()],
        },
        Request::Cancel { name: name() },
        Request::Platform { processor: None },
        Request::SnpCertificates { processor: None },
        Request::PlatformOrder {
            processor: None,
            order: PlatformOrderText::PdhGen,
        },
        Request::SandboxProbe { name: name() },
        Request::SandboxReport { name: name() },
        Request::PolicyLoad {
            policy: PathBuf::from("/etc/shadow"),
        },
        Request::Approve { id: name() },
        Request::Nmi { name: name() },
        Request::Snapshot {
            name: name(),
            file: PathBuf::from("/etc/shadow"),
            stop: false,
            template: false,
        },
        Request::Restore {
            file: PathBuf::from("/etc/shadow"),
            name: None,
            memory: crate::agent::api::MemoryMode::AtOnce,
            allow_older: false,
            allow_changed_disks: false,
        },
        Request::Tasks {},
        Request::Task { id: name() },
        Request::TaskEvents { id: name() },
        Request::TaskCancel { id: name() },
        Request::Metrics {},
        Request::EvidenceRotate {},
        Request::EvidenceRetain { keep_from: 3 },
        Request::Create {
            description: PathBuf::from("/etc/shadow"),
        },
        Request::Definitions {},
        Request::Start {
            name: name(),
            session: None,
        },
        Request::Delete { name: name() },
        Request::Stats { name: name() },
        Request::Console {
            name: name(),
            from: 7,
        },
        Request::Assess {
            name: name(),
            to: name(),
            downtime_limit_ms: None,
            bandwidth_mib: None,
            unthrottled: false,
            streams: None,
            copy_disks: vec![name()],
        },
        Request::Proceed { name: name() },
        Request::MigrateSet {
            name: name(),
            bandwidth_mib: 3,
        },
        Request::Shutdown {
            name: name(),
            timeout_s: Some(3),
            force: true,
        },
        Request::Device {
            name: name(),
            device: crate::agent::api::DeviceName::Disk("data".into()),
            change: Some(crate::agent::api::DeviceChange::Resized),
        },
        Request::Settle { name: name() },
        Request::Clone {
            file: PathBuf::from("/etc/shadow"),
            name: name(),
            memory: crate::agent::api::MemoryMode::AtOnce,
            disks: Some(PathBuf::from("/etc")),
            allow_changed_disks: false,
        },
        Request::SnapshotErase {
            id: "00".repeat(16),
        },
        Request::Attach {
            name: name(),
            device: crate::agent::api::Attach::Disk(crate::agent::api::DiskAttach {
                id: "data".into(),
                path: PathBuf::from("/etc/shadow"),
                format: Default::default(),
                read_only: true,
                limits: Default::default(),
            }),
        },
        Request::Detach {
            name: name(),
            device: crate::agent::api::DeviceName::Disk("data".into()),
            timeout_s: Some(3),
        },
        Request::ConsoleOpen { name: name() },
        Request::Upgrade { name: name() },
    ];
    let mut kinds: Vec<usize> = all.iter().map(kind).collect();
    kinds.dedup();
    assert_eq!(kinds, (0..=LAST).collect::<Vec<_>>());
    all
}

const LAST: usize = 44;

fn kind(request: &Request) -> usize {
    match request {
        Request::Run { .. } => 0,
        Request::List {} => 1,
        Request::Status { .. } => 2,
        Request::Stop { .. } => 3,
        Request::Pause { .. } => 4,
        Request::Resume { .. } => 5,
        Request::Measurement { .. } => 6,
        Request::InjectSecret { .. } => 7,
        Request::Migrate { .. } => 8,
        Request::Cancel { .. } => 9,
        Request::Platform { .. } => 10,
        Request::SnpCertificates { .. } => 11,
        Request::PlatformOrder { .. } => 12,
        Request::SandboxProbe { .. } => 13,
        Request::SandboxReport { .. } => 14,
        Request::PolicyLoad { .. } => 15,
        Request::Approve { .. } => 16,
        Request::Nmi { .. } => 17,
        Request::Snapshot { .. } => 18,
        Request::Restore { .. } => 19,
        Request::Tasks {} => 20,
        Request::Task { .. } => 21,
        Request::TaskEvents { .. } => 22,
        Request::TaskCancel { .. } => 23,
        Request::Metrics {} => 24,
        Request::EvidenceRotate {} => 25,
        Request::EvidenceRetain { .. } => 26,
        Request::Create { .. } => 27,
        Request::Definitions {} => 28,
        Request::Start { .. } => 29,
        Request::Delete { .. } => 30,
        Request::Stats { .. } => 31,
        Request::Console { .. } => 32,
        Request::Assess { .. } => 33,
        Request::Proceed { .. } => 34,
        Request::MigrateSet { .. } => 35,
        Request::Shutdown { .. } => 36,
        Request::Device { .. } => 37,
        Request::Settle { .. } => 38,
        Request::Clone { .. } => 39,
        Request::SnapshotErase { .. } => 40,
        Request::Attach { .. } => 41,
        Request::Detach { .. } => 42,
        Request::ConsoleOpen { .. } => 43,
        Request::Upgrade { .. } => LAST,
    }
}

#[test]
fn every_request_of_a_stranger_is_refused_by_policy_and_recorded() {
    let host = Host::new(&format!("{POLICY}{PEOPLE}"), "");
    for request in every_request() {
        let before = host.records().len();
        let shown = format!("{request:?}");
        let failure = host.ask(4444, request).unwrap_err();
        assert_eq!(failure.code, "POLICY_PERSON_UNKNOWN", "{shown}");
        assert!(!failure.error.contains("shadow"), "{}", failure.error);
        let records = host.records();
        assert_eq!(records.len(), before + 1, "{shown}");
        let last = records.last().unwrap();
        assert_eq!(
            (last.outcome, last.code.as_str(), last.actor.as_str()),
            (Outcome::Refused, "person-unknown", "uid 4444"),
            "{shown}"
        );
        let digest = host.agent.as_ref().unwrap().policy().digest().to_string();
        assert_eq!(last.detail.get("policy"), Some(&Detail::Text(digest)));
    }
}

#[test]
fn every_request_that_changes_something_is_refused_to_a_viewer_and_recorded_for_others() {
    let host = Host::new(&format!("{POLICY}{PEOPLE}"), "");
    for request in every_request() {
        let shown = format!("{request:?}");
        let reads = match request.asked() {
            Asked::Whole(action, _) => action.kind().reads(),
            Asked::First(kind, _) => kind.reads(),
        };
        let before = host.records().len();
        let found = host.code(1001, request);
        assert_eq!(
            found == "POLICY_ROLE_NOT_ALLOWED",
            !reads,
            "{shown}: {found}"
        );
        assert_eq!(host.records().len() > before, !reads, "{shown}");
    }
    // What an operator may do is decided, recorded with all it takes to decide again, and then finds no guest.
    for action in [
        "stop",
        "pause",
        "resume",
        "cancel",
        "sandbox-probe",
        "upgrade",
    ] {
        let request = every_request()
            .into_iter()
            .find(|r| matches!(r.asked(), Asked::Whole(a, _) if a.name() == action));
        assert_eq!(host.code(1000, request.unwrap()), "NO_SUCH_GUEST");
        let records = host.records();
        let [.., last, undone] = records.as_slice() else {
            panic!("{action} left no two records");
        };
        assert_eq!(
            (undone.action.as_str(), undone.outcome, undone.code.as_str()),
            (action, Outcome::Failed, "NO_SUCH_GUEST")
        );
        assert_eq!(
            (last.action.as_str(), last.actor.as_str()),
            (action, "olga")
        );
        assert_eq!(last.outcome, Outcome::Allowed);
        let recorded = history::Recorded::of(last).unwrap();
        let policy = host.agent.as_ref().unwrap().policy();
        let explained = recorded.explain(|_| Some((*policy).clone())).unwrap();
        assert!(explained.agrees, "{explained:?}");
    }
}

#[test]
fn without_people_the_socket_s_users_are_operators_as_before() {
    let host = Host::new(POLICY, "");
    assert_eq!(host.code(0, Request::List {}), "ok");
    assert_eq!(
        host.code(0, Request::Stop { name: name() }),
        "NO_SUCH_GUEST"
    );
    assert_eq!(host.records().last().unwrap().actor, "operator");
    // What was allowed and could not begin is a record too.
    let away = Request::Migrate {
        name: name(),
        to: name(),
        downtime_limit_ms: None,
        time_limit_s: None,
        bandwidth_mib: None,
        unthrottled: false,
        read_back: false,
        streams: None,
        copy_disks: Vec::new(),
    };
    assert_eq!(host.code(0, away), "NO_SUCH_GUEST");
    std::fs::write(host.path("next.toml"), format!("version = 1\n{POLICY}")).unwrap();
    host.load(0, "next.toml").unwrap();
}

#[test]
fn a_certificate_is_one_person_or_nobody() {
    let key = |digit: &str| format!("sha256:{}", digit.repeat(64)).parse().unwrap();
    let who = |names: &[&str], spki| Who::Certificate {
        names: names.iter().map(|name| (*name).to_owned()).collect(),
        spki,
    };
    let host = Host::new(POLICY, "");
    let agent = host.agent.as_ref().unwrap();
    let alone = agent.caller(&who(&["a.test"], key("1")));
    assert_eq!(alone.unwrap_err().code, "NOT_PERMITTED");
    let people = "[[person]]\nname = 'ann'\nrole = 'operator'\nsan = 'a.test'\n\
        [[person]]\nname = 'bob'\nrole = 'operator'\nsan = 'b.test'\nspki = 'sha256:2222222222222222222222222222222222222222222222222222222222222222'\n";
    let host = Host::new(&format!("{POLICY}{people}"), "");
    let agent = host.agent.as_ref().unwrap();
    let name = |names: &[&str], digit| match agent.caller(&who(names, key(digit))) {
        Ok(caller) => caller.name().to_owned(),
        Err(failure) => failure.code,
    };
    assert_eq!(name(&["a.test"], "1"), "ann");
    assert_eq!(name(&["x.test", "a.test"], "1"), "ann");
    assert_eq!(name(&["b.test"], "2"), "bob");
    // Bob's name alone, and two persons' names, are nobody's; a name that is none is none.
    assert_eq!(name(&["b.test"], "1"), "b.test");
    assert_eq!(name(&["a.test", "b.test"], "2"), "NOT_PERMITTED");
    assert_eq!(name(&[], "2"), "NOT_PERMITTED");
    assert_eq!(name(&["A.test", "https://a.test"], "1"), "NOT_PERMITTED");
}

#[test]
fn a_policy_is_loaded_by_two_and_the_first_alone_is_told_how() {
    let mut host = Host::new(&format!("version = 5\n{POLICY}{PEOPLE}"), "");
    let next = format!("version = 6\n{POLICY}{PEOPLE}").replace("max_vcpus = 1", "max_vcpus = 2");
    std::fs::write(host.path("next.toml"), &next).unwrap();
    assert_eq!(
        host.load(1000, "next.toml").unwrap_err().code,
        "POLICY_ROLE_NOT_ALLOWED"
    );
    let alone = host.load(1002, "next.toml").unwrap_err();
    assert_eq!(alone.code, "POLICY_APPROVAL_MISSING");
    let id = alone.error.rsplit("approve ").next().unwrap();
    let id = id.split('`').next().unwrap().to_owned();
    let approve = |uid| host.code(uid, Request::Approve { id: id.clone() });
    // Not by oneself, nor by somebody who may not.
    assert_eq!(approve(1002), "ok");
    assert_eq!(approve(1001), "POLICY_ROLE_NOT_ALLOWED");
    assert_eq!(approve(1000), "ok");
    assert_eq!(
        host.load(1002, "next.toml").unwrap_err().code,
        "POLICY_APPROVAL_MISSING"
    );
    assert_eq!(approve(1003), "ok");
    // What was agreed to is this text, asked by this person.
    let other = next.replace("max_vcpus = 2", "max_vcpus = 9");
    std::fs::write(host.path("other.toml"), other).unwrap();
    assert_eq!(
        host.load(1002, "other.toml").unwrap_err().code,
        "POLICY_APPROVAL_MISSING"
    );
    host.load(1002, "next.toml").unwrap();
    let limits = |host: &Host| host.agent.as_ref().unwrap().policy().limits.max_vcpus.get();
    assert_eq!(limits(&host), 2);
    // And once.
    assert_eq!(
        host.load(1002, "next.toml").unwrap_err().code,
        "POLICY_APPROVAL_MISSING"
    );
    // Back is no way, by loading or by starting again with the old file.
    std::fs::write(
        host.path("old.toml"),
        format!("version = 5\n{POLICY}{PEOPLE}"),
    )
    .unwrap();
    assert_eq!(
        host.load(1002, "old.toml").unwrap_err().code,
        "POLICY_OLDER_VERSION"
    );
    host.start().unwrap();
    assert_eq!(limits(&host), 2);
    let loads = host.records();
    let loads = loads
        .iter()
        .filter(|r| r.action == "policy-load" && r.outcome == Outcome::Done);
    assert_eq!(loads.count(), 2);
}

#[test]
fn a_host_that_demands_signatures_starts_and_loads_with_nothing_else() {
    let keys = [(); 2].map(|()| SigningKey::read(&SigningKey::generate().unwrap()).unwrap());
    let mut host = Host::new(POLICY, "");
    let sign = |host: &Host, file: &str, text: &str, count: usize| {
        let mut all = Signatures::default();
        for key in keys.iter().take(count) {
            all.add(key.sign(text.as_bytes())).unwrap();
        }
        std::fs::write(host.path(file), text).unwrap();
        let name = format!("{file}.sig");
        std::fs::write(host.path(&name), all.to_toml().unwrap()).unwrap();
    };
    let config = std::fs::read_to_string(host.path("agent.toml")).unwrap();
    let named: Vec<String> = keys.iter().map(|k| format!("'{}'", k.public())).collect();
    let trust = format!(
        "policy_trust = {{ keys = [{}], threshold = 2 }}\n",
        named.join(", ")
    );
    std::fs::write(host.path("agent.toml"), format!("{config}{trust}")).unwrap();
    assert_eq!(host.start().unwrap_err().code, "UNDER_THRESHOLD");
    let first = format!("version = 1\n{POLICY}");
    sign(&host, "policy.toml", &first, 1);
    assert_eq!(host.start().unwrap_err().code, "UNDER_THRESHOLD");
    sign(&host, "policy.toml", &first, 2);
    std::fs::write(host.path("policy.toml"), format!("{first}# more\n")).unwrap();
    assert_eq!(host.start().unwrap_err().code, "SIGNATURES_INVALID");
    sign(&host, "policy.toml", &first, 2);
    host.start().unwrap();
    let second = format!("version = 2\n{POLICY}");
    sign(&host, "next.toml", &second, 1);
    assert_eq!(
        host.load(0, "next.toml").unwrap_err().code,
        "POLICY_UNSIGNED"
    );
    sign(&host, "next.toml", &second, 2);
    host.load(0, "next.toml").unwrap();
    assert_eq!(host.agent.as_ref().unwrap().policy().version, 2);
    // Not valid now: decided, and then not admitted.
    let late = format!("version = 3\nnot_after = '2020-01-01T00:00:00Z'\n{POLICY}");
    sign(&host, "late.toml", &late, 2);
    assert_eq!(host.load(0, "late.toml").unwrap_err().code, "NOT_VALID_NOW");
    assert_eq!(host.agent.as_ref().unwrap().policy().version, 2);
    // Started again with the older file: what was loaded stays in force. Without trust: nothing does.
    host.start().unwrap();
    assert_eq!(host.agent.as_ref().unwrap().policy().version, 2);
    std::fs::write(host.path("agent.toml"), config).unwrap();
    assert_eq!(host.start().unwrap_err().code, "TRUST_GONE");
    // Nor with a mark that somebody damaged.
    std::fs::write(host.path("state/policy.mark"), "{}").unwrap();
    assert_eq!(host.start().unwrap_err().code, "MARK_UNUSABLE");
}

/// By two, where the policy says so; whoever holds the first key and an early checkpoint verifies what comes after.
#[test]
fn the_ledger_changes_its_key_and_forgets_and_old_checkpoints_keep_their_worth() {
    let people = PEOPLE.replace("['policy-load']", "['evidence-key-rotate']");
    let mut host = Host::new(&format!("{POLICY}{people}"), "");
    let key = |host: &Host| -> VerifyingKey {
        let text = std::fs::read_to_string(host.path("state/ledger.pub")).unwrap();
        text.trim().parse().unwrap()
    };
    let first = key(&host);
    let audited = |host: &Host, held: &[String]| {
        let trusted = std::slice::from_ref(&first);
        casemate_policy::ledger::audit(&host.path("state/ledger"), trusted, held, &mut |_, _| {})
    };
    let held = vec![audited(&host, &[]).unwrap().last_note.unwrap()];
    assert_eq!(
        host.code(1000, Request::EvidenceRotate {}),
        "POLICY_ROLE_NOT_ALLOWED"
    );
    let alone = host.ask(1002, Request::EvidenceRotate {}).unwrap_err();
    assert_eq!(alone.code, "POLICY_APPROVAL_MISSING");
    let id = alone.error.rsplit("approve ").next().unwrap();
    let id = id.split('`').next().unwrap().to_owned();
    host.ask(1003, Request::Approve { id }).unwrap();
    host.ask(1002, Request::EvidenceRotate {}).unwrap();
    let second = key(&host);
    assert_ne!(first, second);
    assert!(!host.path("state/ledger.key.next").exists());
    let now = audited(&host, &held).unwrap();
    assert_eq!(now.keys, [first.clone(), second.clone()]);
    // The agent goes on under the new key; so it does if it was killed before its key files had changed.
    host.start().unwrap();
    let (state, next) = (
        host.path("state/ledger.key"),
        host.path("state/ledger.key.next"),
    );
    host.agent = None;
    std::fs::copy(&state, &next).unwrap();
    let other = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
    std::fs::write(&state, other.as_ref()).unwrap();
    host.start().unwrap();
    assert_eq!(key(&host), second);
    assert!(!next.exists());
    // Retention: what is gone is gone, and the past is still the same past.
    let kept = Request::EvidenceRetain { keep_from: 4 };
    assert_eq!(host.code(1001, kept.clone()), "POLICY_ROLE_NOT_ALLOWED");
    assert!(matches!(
        host.ask(1002, kept).unwrap(),
        Answer::EvidenceRetained { removed_to: 0 }
    ));
    let all = audited(&host, &held).unwrap().frontier.size();
    let Answer::EvidenceRetained { removed_to } = host
        .ask(1002, Request::EvidenceRetain { keep_from: all + 1 })
        .unwrap()
    else {
        panic!("another answer");
    };
    assert!(removed_to > 4);
    let left = audited(&host, &held).unwrap();
    assert_eq!(left.base.size(), removed_to);
    assert!(left.frontier.size() > all);
    assert_eq!(left.rotations.len(), 1);
}

#[test]
fn rego_restricts_every_decision_and_a_program_without_it_does_not_start() {
    let mut host = Host::new(POLICY, "");
    let config = std::fs::read_to_string(host.path("agent.toml")).unwrap();
    let config = format!("{config}\n[rego]\npolicy = 'second.rego'\n");
    std::fs::write(host.path("agent.toml"), config).unwrap();
    let rego = "package casemate\nimport rego.v1\nallow if input.action.name == \"list\"\n";
    std::fs::write(host.path("second.rego"), rego).unwrap();
    std::fs::write(host.path("s"), "").unwrap();
    if cfg!(not(feature = "rego")) {
        assert_eq!(host.start().unwrap_err().code, "REGO");
        return;
    }
    host.start().unwrap();
    assert_eq!(host.code(0, Request::List {}), "ok");
    let stop = Request::Stop {
        name: "vault".into(),
    };
    assert_eq!(host.code(0, stop), "POLICY_REGO_REFUSED");
    let last = host.records().pop().unwrap();
    assert_eq!(last.outcome, Outcome::Refused);
    std::fs::write(host.path("second.rego"), "package casemate\nallow if {").unwrap();
    assert_eq!(host.start().unwrap_err().code, "REGO");
}
