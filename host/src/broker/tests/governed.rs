//! The host policy over the owner's, and the broker's ledger: no route passes without both.

use casemate_agent::client::ClientError;
use casemate_policy::history::Recorded;
use casemate_policy::ledger::{Detail, Outcome, Record, VerifyingKey, verify};

use super::*;

/// A broker under this host policy.
fn governed(policy: &str) -> Case {
    let case = Case::new();
    case.write("host.toml", policy);
    case
}

fn records(case: &Case) -> Vec<Record> {
    let state = case.folder.path().join("state");
    let key = std::fs::read_to_string(state.join("ledger.pub")).unwrap();
    let key: VerifyingKey = key.trim().parse().unwrap();
    assert_eq!(key.name(), "broker-1/casemate");
    let verified = verify(&state.join("ledger"), &key).unwrap();
    verified.records().to_vec()
}

fn of<'a>(records: &'a [Record], action: &str) -> Vec<&'a Record> {
    records.iter().filter(|r| r.action == action).collect()
}

fn refused(result: Result<impl std::fmt::Debug, ClientError>) -> String {
    match result.unwrap_err() {
        ClientError::Refused { code, .. } => code,
        other => panic!("{other}"),
    }
}

/// Each route of the protocol, in its order; what each leaves is all that an auditor needs.
#[test]
fn every_route_is_decided_by_the_policy_and_recorded() {
    let owner = format!(
        "{HOST_POLICY}[[guest]]\nowner = \"bank\"\nnames = [\"session\", \"{DISK}\"]\nlaunch_digests = [\"{}\"]\nmax_vmpl = 0\n\
         nonce = true\nmax_evidence_age_s = 60\n[guest.tcb.milan]\nboot_loader = 1\nsnp = 1\nmicrocode = 1\n",
        hex::encode([MEASUREMENT; 48])
    );
    let case = governed(&owner);
    let running = case.start();
    let (started, policy) = (
        records(&case),
        casemate_policy::HostPolicy::parse("p", &owner).unwrap(),
    );
    assert_eq!(of(&started, "start").len(), 1);
    let digest = Detail::Text(policy.digest().to_string());
    assert_eq!(started[0].detail["policy"], digest);
    let mut client = running.client();
    assert!(client.attest(&mut Emulated::default()).unwrap().emulated);
    assert_eq!(client.resource(&path(DISK)).unwrap().as_slice(), SECRET);
    let all = records(&case);
    assert_eq!(of(&all, "call").len(), 1, "POST /auth");
    // POST /attest: the decision, the raw report, the answer; GET /resource: the decision, the release.
    for (action, outcomes) in [
        ("attest", vec![Outcome::Allowed, Outcome::Allowed]),
        ("attestation", vec![Outcome::Allowed]),
        ("release-secret", vec![Outcome::Allowed]),
        ("secret-release", vec![Outcome::Done]),
    ] {
        let found: Vec<Outcome> = of(&all, action).iter().map(|r| r.outcome).collect();
        assert_eq!(found, outcomes, "{action}");
        assert!(of(&all, action).iter().all(|r| r.emulated), "{action}");
    }
    let Detail::Text(raw) = &of(&all, "attestation")[0].detail["evidence"] else {
        panic!("no evidence");
    };
    assert_eq!(raw.len(), 1184usize.div_ceil(3) * 4);
    let release = of(&all, "secret-release")[0];
    assert_eq!(release.detail["secret"], Detail::Text(DISK.to_owned()));
    let text = std::fs::read_to_string(case.folder.path().join("state/ledger")).unwrap();
    assert!(!text.contains(std::str::from_utf8(SECRET).unwrap()));
    // Each decision can be made again from its record.
    for action in ["attest", "release-secret"] {
        let recorded = Recorded::of(of(&all, action)[0]).unwrap();
        assert!(recorded.explain(|_| Some(policy.clone())).unwrap().agrees);
    }
}

/// What the owner accepts, the host may refuse: by technology, by TCB, by level, by resource.
#[test]
fn the_host_policy_refuses_what_the_owner_accepts() {
    let section = |names: &str, more: &str| {
        format!("{HOST_POLICY}[[guest]]\nowner = \"bank\"\nnames = [{names}]\n{more}")
    };
    let everything = "\"*\"";
    for (policy, rule, attests) in [
        (
            HOST_POLICY.replace("allow_emulated = true", ""),
            "floor.emulated",
            false,
        ),
        (
            HOST_POLICY.replace("sev-snp", "sev"),
            "technologies.allowed",
            false,
        ),
        (section("\"session\"", ""), "guest", true),
        (
            section(everything, "launch_digests = []\n"),
            "guest.launch",
            false,
        ),
        (
            section(everything, "forbidden_policy_bits = 0x20000\n"),
            "guest.policy_bits",
            false,
        ),
        (
            section(everything, "[guest.tcb.milan]\nmicrocode = 255\n"),
            "guest.tcb",
            false,
        ),
        (
            section(everything, "[guest.tcb.genoa]\nsnp = 1\n"),
            "guest.tcb",
            false,
        ),
    ] {
        let case = governed(&policy);
        let running = case.start();
        let mut client = running.client();
        let attested = client.attest(&mut Emulated::default());
        if attests {
            attested.unwrap();
            assert_eq!(
                refused(client.resource(&path(DISK))),
                "POLICY_DENIED",
                "{rule}"
            );
        } else {
            assert_eq!(refused(attested), "EVIDENCE_NOT_ACCEPTED", "{rule}");
        }
        let all = records(&case);
        assert!(of(&all, "secret-release").is_empty());
        let by_policy = all.iter().find(|r| {
            matches!(r.detail.get("reasons"), Some(Detail::List(all)) if all.iter().any(|one| one.starts_with(rule)))
                && r.outcome == Outcome::Refused
        });
        assert!(by_policy.is_some(), "{rule}: {all:#?}");
        drop(running);
    }
}

/// The same document as a host's, with the same conditions: signed by enough, never older than before.
#[test]
fn a_broker_starts_with_a_policy_that_its_trust_admits_only() {
    let case = governed(&format!("version = 2\n{HOST_POLICY}"));
    drop(case.start());
    case.write("host.toml", &format!("version = 1\n{HOST_POLICY}"));
    let clock = Arc::new(Hands::default());
    let mut config = case.config();
    let failed = open_with(&mut config, clock.clone(), Arc::new(Kept::default())).err();
    assert!(failed.unwrap().to_string().contains("version"));
    case.write("host.toml", &format!("version = 3\n{HOST_POLICY}"));
    let text = std::fs::read_to_string(case.folder.path().join("broker.toml")).unwrap();
    let key = casemate_policy::sign::SigningKey::generate().unwrap();
    let key = casemate_policy::sign::SigningKey::read(&key).unwrap();
    let trust = format!(
        "policy_trust = {{ keys = [\"{}\"], threshold = 1 }}\n",
        key.public()
    );
    case.write("broker.toml", &format!("{trust}{text}"));
    let mut config = case.config();
    let failed = open_with(&mut config, clock, Arc::new(Kept::default())).err();
    assert!(failed.unwrap().to_string().contains("sign"));
}

/// Who has no session leaves nothing: the disk is not a stranger's to fill.
#[test]
fn strangers_cannot_fill_the_ledger() {
    let case = governed(HOST_POLICY);
    let running = case.start();
    let before = records(&case).len();
    for _ in 0..5 {
        assert_eq!(running.resource("nobody", DISK).code(), "NO_SESSION");
        assert_eq!(running.ask("POST", "/kbs/v0/auth", None, b"{").status, 400);
    }
    assert_eq!(records(&case).len(), before);
}

/// Who changes the store is in the ledger before anything that the change led to.
#[test]
fn what_owners_do_to_the_store_is_recorded_first() {
    let case = Case::new();
    let running = case.start();
    let mut client = running.client();
    client.attest(&mut Emulated::default()).unwrap();
    let store = crate::broker::owners_store(&mut case.config()).unwrap();
    store.put(&path(DISK), b"another").unwrap();
    assert!(!store.remove(&path("default/key/nothing")).unwrap());
    assert_eq!(*client.resource(&path(DISK)).unwrap(), *b"another");
    assert!(store.remove(&path(DISK)).unwrap());
    client.resource(&path(OTHER)).unwrap_err();
    // A note that nobody can read is an act too.
    let notes = case.folder.path().join("state/store-acts");
    case.write("state/store-acts/1.json", "{");
    assert_eq!(std::fs::read_dir(&notes).unwrap().count(), 1);
    client.attest(&mut Emulated::default()).unwrap();
    assert_eq!(std::fs::read_dir(&notes).unwrap().count(), 0);

    let all = records(&case);
    let place = |action: &str, call: &str| {
        let found = all.iter().position(|r| {
            r.action == action
                && (call.is_empty() || r.detail.get("call") == Some(&Detail::Text(call.to_owned())))
        });
        found.unwrap_or_else(|| panic!("{action} {call}: {all:#?}"))
    };
    let put = place("call", "secret-put");
    assert!(put < place("secret-release", ""));
    assert!(place("secret-release", "") < place("call", "secret-remove"));
    assert_eq!(all[put].object, DISK);
    assert_eq!(
        all[put].actor,
        format!("uid:{}", nix::unistd::getuid().as_raw())
    );
    assert_eq!(
        all[place("call", "unreadable-note")].outcome,
        Outcome::Failed
    );
    assert_eq!(
        of(&all, "call").iter().filter(|r| r.object == DISK).count(),
        2
    );
}
