use std::path::Path;

use super::super::MAX_DOCUMENT;
use super::*;
use crate::types::Technology;

const GOOD: &str = r#"[host]
name = "site-a"

[technologies]
allowed = ["none", "sev"]
allow_emulated = true

[sandbox]
landlock_min_abi = 2

[limits]
max_vcpus = 4
max_memory_mib = 2048

[migration]
outgoing = true
incoming = true
downtime_limit_ms = 300
trusted_emulated_roots = ["sha256:1111111111111111111111111111111111111111111111111111111111111111"]

[[peer]]
name = "site-b"
san = "site-b.casemate.test"
spki = "sha256:2222222222222222222222222222222222222222222222222222222222222222"
path = "gateway"
gateway = { san = "gw.casemate.test", spki = "sha256:3333333333333333333333333333333333333333333333333333333333333333" }

[[incoming_disk]]
id = "data"
path = "/var/lib/casemate/data.img"

[[incoming_net]]
id = "net0"
bridge = "br0"
"#;

fn refused(text: &str) -> (usize, String, String) {
    match HostPolicy::parse("p.toml", text) {
        Err(PolicyError::Invalid {
            file,
            line,
            key,
            problem,
        }) => {
            assert_eq!(file, "p.toml");
            (line, key, problem)
        }
        other => panic!("expected a refusal, got {other:?}"),
    }
}

#[test]
fn a_whole_policy_parses() {
    let policy = HostPolicy::parse("p.toml", GOOD).unwrap();
    assert_eq!(policy.host.name, "site-a");
    assert!(
        policy.technologies.allowed.contains(&Technology::Sev)
            && policy.technologies.allow_emulated
    );
    assert_eq!(policy.migration.downtime_limit_ms.get(), 300);
    let peer = policy.peer_named("site-b").unwrap();
    assert_eq!(policy.peer_with(&peer.identity), Some(peer));
    assert_eq!(peer.tls_identity().san.as_str(), "gw.casemate.test");
    let mut stolen_name = peer.identity.clone();
    stolen_name.spki = peer.tls_identity().spki;
    assert_eq!(policy.peer_with(&stolen_name), None);
    assert_eq!(
        policy.incoming_disk("data").unwrap().path,
        Path::new("/var/lib/casemate/data.img")
    );
    assert_eq!(policy.digest(), Fingerprint::of(GOOD.as_bytes()));
}

#[test]
fn defaults_are_the_closed_ones() {
    let text =
        "[host]\nname='h'\n[technologies]\nallowed=[]\n[limits]\nmax_vcpus=1\nmax_memory_mib=1\n";
    let policy = HostPolicy::parse("p.toml", text).unwrap();
    assert!(
        !policy.technologies.allow_emulated
            && !policy.migration.outgoing
            && !policy.migration.incoming
    );
    assert_eq!(
        (
            policy.sandbox.landlock_min_abi.get(),
            policy.migration.downtime_limit_ms.get()
        ),
        (1, 500)
    );
}

#[test]
fn errors_name_line_key_and_remedy() {
    let cases = [
        (
            "outgoing = true",
            "outgoign = true",
            16,
            "migration.outgoign",
            "expected one of",
        ),
        (
            "max_vcpus = 4",
            "max_vcpus = 0",
            12,
            "limits.max_vcpus",
            "nonzero",
        ),
        (
            "max_vcpus = 4",
            "max_vcpus = \"4\"",
            12,
            "limits.max_vcpus",
            "expected",
        ),
        (
            "[\"none\", \"sev\"]",
            "[\"none\",\n \"tdx\"]",
            6,
            "technologies.allowed",
            "`sev-snp`",
        ),
        (
            "path = \"/var",
            "path = \"var",
            30,
            "incoming_disk.path",
            "absolute path",
        ),
        (
            "data.img",
            "../x",
            30,
            "incoming_disk.path",
            "absolute path",
        ),
        (
            "sha256:1111",
            "sha256:111",
            19,
            "migration.trusted_emulated_roots",
            "64 lower-case hex",
        ),
        (
            "site-b.casemate.test",
            "*.casemate.test",
            23,
            "peer.san",
            "lower-case labels",
        ),
        (
            "bridge = \"br0\"",
            "bridge = \"a-bridge-with-a-long-name\"",
            34,
            "incoming_net.bridge",
            "15",
        ),
        ("name = \"site-a\"", "", 1, "host", "missing field `name`"),
    ];
    for (from, to, line, key, remedy) in cases {
        let found = refused(&GOOD.replacen(from, to, 1));
        assert_eq!(
            (found.0, found.1.as_str()),
            (line, key),
            "{from} -> {to}: {}",
            found.2
        );
        assert!(found.2.contains(remedy), "{from} -> {to}: {}", found.2);
    }
}

#[test]
fn gateway_is_there_exactly_when_the_path_says_so() {
    let gateway_line = GOOD.lines().find(|l| l.starts_with("gateway")).unwrap();
    let (line, key, problem) = refused(&GOOD.replace(gateway_line, ""));
    assert_eq!((line, key.as_str()), (21, "peer"));
    assert!(problem.contains("add gateway"), "{problem}");
    assert!(
        refused(&GOOD.replace("\"gateway\"", "\"direct\""))
            .2
            .contains("remove `gateway`")
    );
    assert!(
        refused(&GOOD.replace("3333", "2222"))
            .2
            .contains("its own gateway")
    );
}

#[test]
fn repeated_entries_are_refused() {
    let peer = &GOOD[GOOD.find("[[peer]]").unwrap()..GOOD.find("[[incoming_disk]]").unwrap()];
    assert!(
        refused(&format!(
            "{GOOD}{}",
            peer.replace("\"site-b\"", "\"site-c\"")
        ))
        .2
        .contains("repeats")
    );
    assert!(
        refused(&format!("{GOOD}[[incoming_disk]]\nid='data'\npath='/x'\n"))
            .2
            .contains("repeats")
    );
    assert!(
        refused(&format!("{GOOD}[[incoming_net]]\nid='net0'\nbridge='b'\n"))
            .2
            .contains("twice")
    );
}

#[test]
fn missing_and_huge_files_are_refused() {
    let missing = HostPolicy::load(Path::new("/nonexistent/policy.toml"))
        .unwrap_err()
        .to_string();
    assert!(missing.contains("/nonexistent/policy.toml"), "{missing}");
    let huge = "#".repeat(MAX_DOCUMENT as usize + 1);
    assert!(matches!(
        HostPolicy::parse("p", &huge),
        Err(PolicyError::TooLarge { .. })
    ));
}
