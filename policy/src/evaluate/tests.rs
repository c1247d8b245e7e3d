use proptest::prelude::*;

use super::*;
use crate::types::Fingerprint;

fn identity(san: &str, key: u8) -> Identity {
    Identity {
        san: san.parse().unwrap(),
        spki: Fingerprint::from_bytes([key; 32]),
    }
}

fn policy(technologies: &str, migration: &str) -> HostPolicy {
    let (peer, far, gateway) = (
        Fingerprint::from_bytes([1; 32]),
        Fingerprint::from_bytes([2; 32]),
        Fingerprint::from_bytes([3; 32]),
    );
    let text = format!(
        r#"
        host = {{ name = "h" }}
        technologies = {{ {technologies} }}
        limits = {{ max_vcpus = 4, max_memory_mib = 1024 }}
        migration = {{ {migration} }}
        peer = [
          {{ name = "near", san = "near.test", spki = "{peer}", path = "direct" }},
          {{ name = "far", san = "far.test", spki = "{far}", path = "gateway", gateway = {{ san = "gw.test", spki = "{gateway}" }} }},
        ]
        incoming_disk = [{{ id = "data", path = "/d" }}]
        incoming_net = [{{ id = "net0", bridge = "br0" }}]
        "#
    );
    HostPolicy::parse("test", &text).unwrap()
}

fn open() -> HostPolicy {
    policy(
        r#"allowed = ["none", "sev", "sev-es", "sev-snp"], allow_emulated = true"#,
        "outgoing = true, incoming = true",
    )
}

fn launch(technology: Technology, policy_bits: u64) -> Action {
    Action::Launch {
        technology,
        emulated: false,
        vcpus: 2,
        memory_mib: 512,
        policy_bits,
    }
}

fn arrival(peer: Identity, tls: Identity) -> Action {
    Action::MigrateIn {
        peer,
        tls,
        technology: Technology::Sev,
        emulated: true,
        vcpus: 2,
        memory_mib: 512,
        disks: vec!["data".to_owned()],
        nets: vec!["net0".to_owned()],
    }
}

#[test]
fn launches() {
    let policy = policy(r#"allowed = ["none", "sev"]"#, "");
    assert!(evaluate(&policy, &launch(Technology::Sev, 1)).allowed);
    assert!(evaluate(&policy, &launch(Technology::None, 0)).allowed);
    let cases = [
        (launch(Technology::Sev, 0), Code::DebugAllowed),
        (launch(Technology::Sev, 5), Code::GuestPolicyMismatch),
        (
            launch(Technology::Sev, 1 << 32 | 1),
            Code::GuestPolicyMismatch,
        ),
        (launch(Technology::None, 1), Code::GuestPolicyMismatch),
        (launch(Technology::SevEs, 5), Code::TechnologyNotAllowed),
        (
            launch(Technology::SevSnp, 1 << 17 | 1 << 19),
            Code::DebugAllowed,
        ),
        (
            launch(Technology::SevSnp, 1 << 17),
            Code::TechnologyNotAllowed,
        ),
    ];
    for (action, code) in cases {
        assert_eq!(evaluate(&policy, &action).code, code, "{action:?}");
    }
    for (vcpus, memory_mib, code) in [
        (5, 512, Code::TooManyVcpus),
        (0, 512, Code::TooManyVcpus),
        (1, 1025, Code::TooMuchMemory),
        (1, 0, Code::TooMuchMemory),
    ] {
        let action = Action::Launch {
            technology: Technology::Sev,
            emulated: false,
            vcpus,
            memory_mib,
            policy_bits: 1,
        };
        assert_eq!(evaluate(&policy, &action).code, code);
        let copy = Action::Clone {
            technology: Technology::None,
            emulated: false,
            vcpus,
            memory_mib,
        };
        let found = evaluate(&policy, &copy);
        assert!(found.refusals().any(|r| r.code == code), "{found:?}");
    }
}

#[test]
fn a_refusal_tells_every_broken_rule_and_the_alternative() {
    let policy = policy(r#"allowed = ["sev"]"#, "");
    let action = Action::MigrateOut {
        technology: Technology::SevSnp,
        emulated: true,
        peer_name: "nobody".to_owned(),
    };
    let decision = evaluate(&policy, &action);
    let rules: Vec<_> = decision.refusals().map(|reason| reason.rule).collect();
    assert_eq!(
        rules,
        [
            "floor.emulated",
            "floor.movable",
            "technologies.allowed",
            "migration.outgoing",
            "peer"
        ]
    );
    assert!(
        decision
            .refusals()
            .any(|reason| reason.remedy.contains("relaunch"))
    );
}

#[test]
fn arrivals_need_the_right_peer_on_the_right_path() {
    let (near, far, gateway) = (
        identity("near.test", 1),
        identity("far.test", 2),
        identity("gw.test", 3),
    );
    let cases = [
        (&near, &near, Code::Allowed),
        (&far, &gateway, Code::Allowed),
        (&near, &gateway, Code::PeerPathMismatch),
        (&far, &far, Code::PeerPathMismatch),
        (&gateway, &gateway, Code::PeerUnknown),
        (&identity("near.test", 2), &near, Code::PeerUnknown),
        (&identity("far.test", 1), &near, Code::PeerUnknown),
    ];
    for (peer, tls, code) in cases {
        assert_eq!(
            evaluate(&open(), &arrival(peer.clone(), tls.clone())).code,
            code,
            "{peer} by {tls}"
        );
    }
}

#[test]
fn arrivals_get_only_local_resources() {
    let ask = |want_disks: &[&str], want_nets: &[&str]| {
        let mut action = arrival(identity("near.test", 1), identity("near.test", 1));
        if let Action::MigrateIn { disks, nets, .. } = &mut action {
            *disks = want_disks.iter().map(ToString::to_string).collect();
            *nets = want_nets.iter().map(ToString::to_string).collect();
        }
        evaluate(&open(), &action).code
    };
    assert_eq!(ask(&["data"], &["net0"]), Code::Allowed);
    assert_eq!(ask(&["/etc/passwd"], &[]), Code::DiskNotAllowed);
    assert_eq!(ask(&["data", "data"], &[]), Code::DiskNotAllowed);
    assert_eq!(ask(&[], &["net1"]), Code::NetNotAllowed);
}

#[test]
fn secrets_need_proof() {
    let ask = |technology, measurement_matches| {
        evaluate(
            &open(),
            &Action::ReleaseSecret {
                technology,
                emulated: true,
                measurement_matches,
            },
        )
        .code
    };
    assert_eq!(ask(Technology::Sev, true), Code::Allowed);
    assert_eq!(ask(Technology::Sev, false), Code::NotProven);
    assert_eq!(ask(Technology::None, true), Code::NotProven);
}

#[test]
fn codes_are_written_alike_everywhere() {
    for code in [
        Code::Allowed,
        Code::TechnologyCannotMigrate,
        Code::PeerPathMismatch,
        Code::TooManyVcpus,
    ] {
        assert_eq!(
            serde_json::to_string(&code).unwrap(),
            format!("\"{}\"", code.as_str())
        );
    }
}

fn any_technology() -> impl Strategy<Value = Technology> {
    prop_oneof![
        Just(Technology::None),
        Just(Technology::Sev),
        Just(Technology::SevEs),
        Just(Technology::SevSnp)
    ]
}

proptest! {
    /// However open the file: no debuggable guest, nothing emulated unannounced, no SEV-ES or SNP on the move.
    #[test]
    fn the_floor_holds(technology in any_technology(), emulated: bool, bits: u64, out: bool) {
        let open = open();
        let closed = policy(r#"allowed = ["none", "sev", "sev-es", "sev-snp"]"#, "outgoing = true, incoming = true");
        let launch = Action::Launch { technology, emulated, vcpus: 1, memory_mib: 1, policy_bits: bits };
        let decision = evaluate(&open, &launch);
        let debuggable = match technology {
            Technology::None => false,
            Technology::Sev | Technology::SevEs => bits % 2 == 0,
            Technology::SevSnp => (bits >> 19) % 2 == 1,
        };
        prop_assert!(!(decision.allowed && debuggable));
        prop_assert!(!(emulated && evaluate(&closed, &launch).allowed));
        let moved = if out {
            Action::MigrateOut { technology, emulated, peer_name: "near".to_owned() }
        } else {
            let Action::MigrateIn { peer, tls, vcpus, memory_mib, disks, nets, .. } =
                arrival(identity("near.test", 1), identity("near.test", 1)) else { unreachable!() };
            Action::MigrateIn { peer, tls, technology, emulated, vcpus, memory_mib, disks, nets }
        };
        let movable = matches!(technology, Technology::None | Technology::Sev);
        prop_assert_eq!(evaluate(&open, &moved).allowed, movable);
        prop_assert!(!(emulated && evaluate(&closed, &moved).allowed));
    }

    /// A decision is allowed exactly when no reason refuses, and its code says so.
    #[test]
    fn decisions_are_consistent(technology in any_technology(), emulated: bool, vcpus in 0u16..8, memory_mib in 0u64..2048, bits in 0u64..8) {
        let policy = policy(r#"allowed = ["sev"]"#, "");
        let decision = evaluate(&policy, &Action::Launch { technology, emulated, vcpus, memory_mib, policy_bits: bits });
        prop_assert_eq!(decision.allowed, decision.reasons.iter().all(|reason| reason.allows));
        prop_assert_eq!(decision.allowed, decision.code == Code::Allowed);
    }
}

#[test]
fn files_lie_in_the_folders_that_are_named() {
    let rule = |folders: &str, files: &[&str]| {
        let text = format!(
            "host = {{ name = 'h' }}\ntechnologies = {{ allowed = ['none'] }}\n\
             limits = {{ max_vcpus = 1, max_memory_mib = 1 }}\nfiles = {{ {folders} }}\n"
        );
        let policy = HostPolicy::parse("p", &text).unwrap();
        let files: Vec<String> = files.iter().map(|file| (*file).to_owned()).collect();
        let clock = Timestamp::from_unix(0);
        let mut inquiry = Inquiry::new(Actor::Host, "vm", Action::Snapshot, clock);
        inquiry.files.clone_from(&files);
        let asking = Asking {
            actor: Actor::Host,
            kind: ActionKind::Launch,
            object: None,
            files,
        };
        let (whole, first) = (decide(&policy, &inquiry), may_ask(&policy, &asking));
        assert_eq!(whole.code, first.code);
        whole.code
    };
    let folders = "folders = ['/srv/guests', '/var/lib/images']";
    for good in [
        &["/srv/guests/a.toml", "/var/lib/images/deep/er/disk.raw"][..],
        &[],
    ] {
        assert_eq!(rule(folders, good), Code::Allowed, "{good:?}");
    }
    for bad in [
        &["/etc/shadow"][..],
        &["/srv/guests/a.toml", "/etc/shadow"],
        &["/srv/guests/../../etc/shadow"],
        &["/srv/guests-2/disk"],
        &["/srv/guests"],
        &["srv/guests/disk"],
        &[""],
    ] {
        assert_eq!(rule(folders, bad), Code::FileNotAllowed, "{bad:?}");
    }
    // No rule; and an empty list allows nothing.
    assert_eq!(rule("", &["/etc/shadow"]), Code::Allowed);
    assert_eq!(rule("folders = []", &["/srv/x"]), Code::FileNotAllowed);
}
