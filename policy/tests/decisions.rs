//! Decisions under documents with owners and people: what each key refuses, and with which code.

mod support;

use casemate_policy::action::{Action, PlatformCommand};
use casemate_policy::claims::{
    Actor, Firmware, Inquiry, Product, SandboxLevel, SessionClaims, Tcb,
};
use casemate_policy::document::guest::ReplicaSeal;
use casemate_policy::{Code, Fingerprint, HostPolicy, Identity, Technology, decide};

use support::*;

/// The code that `policy` answers after `change` of a question that it allows.
fn code(policy: &HostPolicy, inquiry: &Inquiry, change: impl FnOnce(&mut Inquiry)) -> Code {
    let before = decide(policy, inquiry);
    assert!(
        before.allowed,
        "{:?}",
        before.refusals().collect::<Vec<_>>()
    );
    let mut changed = inquiry.clone();
    change(&mut changed);
    decide(policy, &changed).code
}

#[test]
fn evidence_must_satisfy_every_rule_of_the_owner() {
    let policy = parse(&format!("{BASE}{OWNER}"));
    let good = attested();
    let attest = |emulated, verified| Action::Attest {
        technology: Technology::SevSnp,
        emulated,
        verified,
    };
    let check = |wanted: Code, change: &dyn Fn(&mut Inquiry)| {
        assert_eq!(code(&policy, &good, change), wanted);
    };
    check(Code::GuestUnlisted, &|i| i.object = "else".into());
    check(Code::GuestUnlisted, &|i| i.object = "ban".into());
    let other = "b".repeat(96);
    check(Code::LaunchNotAllowed, &|i| {
        i.guest.launch_digest = Some(other.parse().unwrap())
    });
    check(Code::ClaimMissing, &|i| i.guest.launch_digest = None);
    check(Code::TcbTooOld, &|i| {
        i.guest.tcb.as_mut().unwrap().microcode = 199
    });
    check(Code::TcbTooOld, &|i| i.guest.product = Some(Product::Genoa));
    check(Code::ClaimMissing, &|i| i.guest.tcb = None);
    check(Code::ClaimMissing, &|i| i.guest.product = None);
    check(Code::GuestPolicyNotAllowed, &|i| {
        i.guest.policy_bits = Some(0x70000)
    });
    check(Code::GuestPolicyNotAllowed, &|i| {
        i.guest.policy_bits = Some(0x20000)
    });
    check(Code::ClaimMissing, &|i| i.guest.policy_bits = None);
    check(Code::VmplNotAllowed, &|i| i.guest.vmpl = Some(2));
    check(Code::ClaimMissing, &|i| i.guest.vmpl = None);
    check(Code::EvidenceStale, &|i| {
        i.guest.nonce_matches = Some(false)
    });
    check(Code::ClaimMissing, &|i| i.guest.nonce_matches = None);
    check(Code::EvidenceStale, &|i| i.guest.evidence_age_s = Some(301));
    check(Code::ClaimMissing, &|i| i.guest.evidence_age_s = None);
    check(Code::NotProven, &|i| i.action = attest(false, false));
    check(Code::EmulatedNotAllowed, &|i| i.action = attest(true, true));
}

#[test]
fn a_signer_vouches_for_a_launch_that_is_not_listed() {
    let policy = parse(&format!("{BASE}{OWNER}"));
    let mut inquiry = attested();
    inquiry.guest.launch_digest = Some("b".repeat(96).parse().unwrap());
    assert_eq!(decide(&policy, &inquiry).code, Code::LaunchNotAllowed);
    let signer = format!("ed25519:{}", "c".repeat(64)).parse().unwrap();
    inquiry.guest.launch_signers = vec![signer];
    assert_eq!(decide(&policy, &inquiry).code, Code::Allowed);
    let other = format!("id-key:{}", "c".repeat(96)).parse().unwrap();
    inquiry.guest.launch_signers = vec![other];
    assert_eq!(decide(&policy, &inquiry).code, Code::LaunchNotAllowed);
}

#[test]
fn a_plain_guest_has_no_launch_digest() {
    let policy = parse(&format!("{BASE}{}", OWNER.replace("technologies", "#")));
    let mut inquiry = attested();
    inquiry.action = launch(Technology::None, 0);
    let broken: Vec<_> = decide(&policy, &inquiry)
        .refusals()
        .map(|r| (r.rule, r.code))
        .collect();
    assert!(
        broken.contains(&("guest.launch", Code::ClaimMissing)),
        "{broken:?}"
    );
}

fn of_owner(lines: &str) -> HostPolicy {
    parse(&format!(
        "{BASE}[[guest]]\nowner = 'o'\nnames = ['bank-*']\n{lines}\n"
    ))
}

#[test]
fn empty_lists_allow_nothing() {
    assert!(decide(&of_owner(""), &attested()).allowed);
    for (line, wanted) in [
        ("launch_digests = []", Code::LaunchNotAllowed),
        ("launch_signers = []", Code::LaunchNotAllowed),
        ("technologies = []", Code::TechnologyNotAllowed),
        ("sites = []", Code::SiteNotAllowed),
    ] {
        assert_eq!(decide(&of_owner(line), &attested()).code, wanted, "{line}");
    }
    let nobody = parse(&format!("guest = []\n{BASE}"));
    assert_eq!(decide(&nobody, &attested()).code, Code::GuestUnlisted);
    let none = parse(&format!("person = []\n{BASE}"));
    assert_eq!(decide(&none, &attested()).code, Code::PersonUnknown);
    let peers = of_owner("migration = ['live']\npeers = []");
    assert_eq!(decide(&peers, &leaving("near")).code, Code::PeerNotAllowed);
}

#[test]
fn guests_move_as_their_owner_says() {
    let leave = |lines: &str, peer: &str| decide(&of_owner(lines), &leaving(peer)).code;
    assert_eq!(leave("migration = ['live']", "near"), Code::Allowed);
    assert_eq!(leave("", "near"), Code::MoveNotAllowed);
    assert_eq!(
        leave("migration = ['relaunch']", "near"),
        Code::MoveNotAllowed
    );
    let live = |line: &str, peer: &str| leave(&format!("migration = ['live']\n{line}"), peer);
    assert_eq!(live("sites = ['fra-2']", "near"), Code::Allowed);
    assert_eq!(live("sites = ['fra-1']", "near"), Code::SiteNotAllowed);
    assert_eq!(live("sites = ['fra-2']", "far"), Code::ClaimMissing);
    assert_eq!(live("peers = ['near']", "far"), Code::PeerNotAllowed);
    assert_eq!(live("direct_only = true", "near"), Code::Allowed);
    assert_eq!(live("direct_only = true", "far"), Code::MoveNotAllowed);
    assert_eq!(live("", "nobody"), Code::PeerUnknown);

    let failover = |lines: &str| {
        let action = Action::Failover {
            technology: Technology::SevSnp,
            emulated: false,
            forced: false,
        };
        decide(&of_owner(lines), &ask(operator(), "bank-1", action)).code
    };
    assert_eq!(failover("migration = ['relaunch']"), Code::Allowed);
    assert_eq!(failover("migration = ['live']"), Code::MoveNotAllowed);
}

#[test]
fn replicas_are_kept_as_their_owner_says() {
    let replica = |lines: &str, seal| {
        let action = Action::Replicate {
            technology: Technology::Sev,
            emulated: false,
            peer_name: "near".into(),
            seal,
        };
        decide(&of_owner(lines), &ask(Actor::Host, "bank-1", action)).code
    };
    let (sealed, by_owner) = (ReplicaSeal::Sealed, ReplicaSeal::OwnerSealed);
    assert_eq!(replica("", by_owner), Code::ReplicaNotAllowed);
    assert_eq!(
        replica("replicas = 'owner-sealed'", sealed),
        Code::ReplicaNotAllowed
    );
    assert_eq!(
        replica("replicas = 'owner-sealed'", by_owner),
        Code::Allowed
    );
    assert_eq!(replica("replicas = 'sealed'", by_owner), Code::Allowed);
    let elsewhere = "replicas = 'sealed'\nsites = ['fra-1']";
    assert_eq!(replica(elsewhere, sealed), Code::SiteNotAllowed);
}

#[test]
fn arrivals_are_held_to_the_owners_rules_too() {
    let arrive =
        |lines: &str, name: &str| decide(&of_owner(lines), &ask(Actor::Host, name, arrival())).code;
    assert_eq!(
        arrive("migration = ['live']\nsites = ['fra-1']", "bank-1"),
        Code::Allowed
    );
    assert_eq!(arrive("migration = ['live']", "else"), Code::GuestUnlisted);
    assert_eq!(arrive("", "bank-1"), Code::MoveNotAllowed);
    assert_eq!(
        arrive("migration = ['live']\nsites = ['x']", "bank-1"),
        Code::SiteNotAllowed
    );
    assert_eq!(
        arrive("migration = ['live']\npeers = ['far']", "bank-1"),
        Code::PeerNotAllowed
    );
}

#[test]
fn the_stricter_of_two_owners_wins_and_the_decision_says_so() {
    let bank = "[[guest]]\nowner = 'bank'\nnames = ['bank-*']\nmigration = ['live']\nsites = ['fra-1', 'fra-2']\n";
    let regulator =
        "[[guest]]\nowner = 'regulator'\nnames = ['*']\nmigration = []\nsites = ['fra-1']\n";
    let decision = decide(
        &parse(&format!("{BASE}{bank}{regulator}")),
        &leaving("near"),
    );
    assert_eq!(decision.code, Code::MoveNotAllowed);
    let note = decision
        .reasons
        .iter()
        .find(|r| r.rule == "guest.stricter")
        .unwrap();
    assert!(note.allows);
    assert_eq!(note.found, "bank and regulator differ in sites, migration");
    let broken: Vec<_> = decision
        .refusals()
        .map(|r| (r.rule, r.wanted.as_str()))
        .collect();
    assert_eq!(
        broken,
        [
            ("guest.migration", "regulator: it stays where it is"),
            ("guest.sites", "regulator: one of fra-1")
        ]
    );
    // The order of the sections does not matter.
    let swapped = parse(&format!("{BASE}{regulator}{bank}"));
    assert_eq!(
        decide(&swapped, &leaving("near")).code,
        Code::MoveNotAllowed
    );
}

#[test]
fn a_host_must_be_what_the_policy_wants_of_it() {
    let policy = parse(&format!(
        "{BASE}[sandbox]\nlandlock_min_abi = 4\nlevel = 'full'\n\
         [[firmware]]\ntechnology = 'sev-snp'\nmajor = 1\nminor = 55\nbuild = 20\n"
    ));
    let firmware = |major, minor, build| {
        Some(Firmware {
            major,
            minor,
            build,
        })
    };
    let mut good = ask(operator(), "vm", launch(Technology::SevSnp, 0x30000));
    good.host.sandbox = Some(SandboxLevel::Full);
    good.host.landlock_abi = Some(4);
    good.host.firmware = firmware(1, 55, 20);
    let check = |wanted: Code, change: &dyn Fn(&mut Inquiry)| {
        assert_eq!(code(&policy, &good, change), wanted);
    };
    check(Code::Allowed, &|i| i.host.firmware = firmware(1, 56, 0));
    check(Code::FirmwareTooOld, &|i| {
        i.host.firmware = firmware(1, 55, 19)
    });
    check(Code::FirmwareTooOld, &|i| {
        i.host.firmware = firmware(1, 54, 255)
    });
    check(Code::FirmwareTooOld, &|i| {
        i.host.firmware = firmware(0, 255, 255)
    });
    check(Code::ClaimMissing, &|i| i.host.firmware = None);
    check(Code::SandboxTooWeak, &|i| {
        i.host.sandbox = Some(SandboxLevel::Partial)
    });
    check(Code::SandboxTooWeak, &|i| i.host.landlock_abi = Some(3));
    check(Code::ClaimMissing, &|i| i.host.sandbox = None);
    // Firmware is asked of the technology it serves.
    check(Code::Allowed, &|i| {
        i.host.firmware = None;
        i.action = launch(Technology::Sev, 1);
    });
}

#[test]
fn a_policy_out_of_its_time_starts_nothing_and_stops_what_runs() {
    let policy = parse(&format!(
        "not_before = '2026-01-01T00:00:00Z'\nnot_after = '2026-12-01T00:00:00Z'\n{BASE}"
    ));
    let good = ask(operator(), "vm", launch(Technology::Sev, 1));
    for (clock, wanted) in [
        ("2025-12-31T23:59:59Z", Code::PolicyNotValid),
        ("2026-01-01T00:00:00Z", Code::Allowed),
        ("2026-11-30T23:59:59Z", Code::Allowed),
        ("2026-12-01T00:00:00Z", Code::PolicyNotValid),
    ] {
        let found = code(&policy, &good, |i| i.clock = clock.parse().unwrap());
        assert_eq!(found, wanted, "{clock}");
    }
    for action in [Action::Stop, Action::Cancel, Action::List] {
        let mut late = ask(operator(), "vm", action);
        late.clock = "2027-01-01T00:00:00Z".parse().unwrap();
        assert!(decide(&policy, &late).allowed);
    }
}

#[test]
fn people_do_what_their_role_lets_them() {
    let policy = parse(&format!("{BASE}{PEOPLE}"));
    let may = |actor: Actor, object: &str, action: Action| {
        decide(&policy, &ask(actor, object, action)).code
    };
    let uid = |uid| Actor::Local { uid };
    let start = || launch(Technology::Sev, 1);
    assert_eq!(may(uid(1000), "bank-1", start()), Code::Allowed);
    assert_eq!(may(uid(1000), "shop-1", start()), Code::GuestNotTheirs);
    assert_eq!(
        may(uid(1000), "bank-1", Action::Pause),
        Code::RoleNotAllowed
    );
    assert_eq!(may(uid(1001), "bank-1", start()), Code::RoleNotAllowed);
    assert_eq!(may(uid(1001), "", Action::List), Code::Allowed);
    assert_eq!(may(uid(0), "bank-1", Action::List), Code::PersonUnknown);
    assert_eq!(may(Actor::Host, "bank-1", start()), Code::PersonUnknown);
    let read = |san, key| may(certificate(san, key), "", Action::EvidenceRead);
    assert_eq!(read("carol.test", 9), Code::Allowed);
    assert_eq!(read("carol.test", 8), Code::PersonUnknown);
    assert_eq!(read("dave.test", 9), Code::PersonUnknown);
    let stop = |san, key| may(certificate(san, key), "bank-1", Action::Stop);
    assert_eq!(stop("erin.test", 1), Code::Allowed);
    // Somebody's name with somebody else's key is nobody.
    assert_eq!(stop("erin.test", 7), Code::PersonUnknown);
    let reset = Action::PlatformAdmin {
        command: PlatformCommand::Reset,
    };
    assert_eq!(may(uid(1000), "", reset.clone()), Code::RoleNotAllowed);
    assert_eq!(may(uid(1002), "", reset), Code::Allowed);
    // A peer's arrival is judged by the peers' rules.
    assert_eq!(may(Actor::Host, "bank-1", arrival()), Code::Allowed);
}

#[test]
fn what_takes_two_takes_two() {
    let policy = parse(&format!("{BASE}{PEOPLE}"));
    let uid = |uid| Actor::Local { uid };
    let load = Action::PolicyLoad {
        version: 2,
        in_force: 1,
        same: false,
        signers: 0,
        threshold: 0,
    };
    let with = |actor: Actor, action: &Action, approvals: &[Actor]| {
        let mut inquiry = ask(actor, "vm", action.clone());
        inquiry.approvals = approvals.to_vec();
        decide(&policy, &inquiry).code
    };
    assert_eq!(with(uid(1002), &load, &[]), Code::ApprovalMissing);
    // Not oneself, by another door neither; not a viewer, not an operator, not a stranger.
    let door = certificate("officer.test", 3);
    for nobody in [uid(1002), door, uid(1001), uid(1000), uid(4)] {
        assert_eq!(
            with(uid(1002), &load, std::slice::from_ref(&nobody)),
            Code::ApprovalMissing,
            "{nobody}"
        );
    }
    assert_eq!(
        with(uid(1002), &load, &[uid(1002), uid(1003)]),
        Code::Allowed
    );
    assert_eq!(with(uid(1001), &load, &[uid(1003)]), Code::RoleNotAllowed);
    let forced = |forced| Action::Failover {
        technology: Technology::Sev,
        emulated: false,
        forced,
    };
    let erin = || certificate("erin.test", 1);
    assert_eq!(with(erin(), &forced(false), &[]), Code::Allowed);
    assert_eq!(with(erin(), &forced(true), &[]), Code::ApprovalMissing);
    assert_eq!(with(erin(), &forced(true), &[uid(1002)]), Code::Allowed);
}

#[test]
fn without_people_whoever_may_open_the_socket_is_everything() {
    let policy = parse(BASE);
    for action in [
        Action::List,
        Action::Stop,
        Action::EvidenceKeyRotate,
        launch(Technology::Sev, 1),
    ] {
        assert!(decide(&policy, &ask(Actor::Local { uid: 4 }, "vm", action.clone())).allowed);
        // Whoever comes by a certificate is nobody the kernel let in.
        let remote = ask(certificate("erin.test", 5), "vm", action);
        assert_eq!(decide(&policy, &remote).code, Code::PersonUnknown);
    }
}

#[test]
fn tcb_of_turin_has_a_part_more() {
    let policy = of_owner("[guest.tcb.turin]\nfmc = 2");
    let mut inquiry = attested();
    inquiry.guest.product = Some(Product::Turin);
    for (fmc, wanted) in [
        (None, Code::TcbTooOld),
        (Some(1), Code::TcbTooOld),
        (Some(2), Code::Allowed),
    ] {
        inquiry.guest.tcb = Some(Tcb {
            fmc,
            ..Tcb::default()
        });
        assert_eq!(decide(&policy, &inquiry).code, wanted);
    }
}

/// Who is there, over whom, and by which cipher: each is looked at before a page travels, and what is not known refuses.
#[test]
fn a_session_must_be_the_one_that_the_policy_means() {
    let lists = "[migration]\nsuites = ['AES']\ngroups = ['X25519']\nprovider = 'ring'";
    let policy = parse(&BASE.replace("[migration]", lists));
    let identity = |san: &str, key| Identity {
        san: san.parse().unwrap(),
        spki: Fingerprint::from_bytes([key; 32]),
    };
    let near = identity("near.test", 1);
    let session = |peer: &Identity, tls: &Identity| SessionClaims {
        peer: peer.clone(),
        tls: tls.clone(),
        path: "direct".to_owned(),
        suite: "AES".to_owned(),
        group: "X25519".to_owned(),
        provider: "ring".to_owned(),
    };
    let leaving = |peer: &str, session| {
        let action = Action::MigrateSession {
            technology: Technology::Sev,
            emulated: false,
            peer_name: peer.to_owned(),
        };
        let mut inquiry = ask(Actor::Host, "vm", action);
        inquiry.session = session;
        inquiry
    };
    let good = leaving("near", Some(session(&near, &near)));
    let mut arriving = ask(Actor::Host, "vm", arrival());
    arriving.session = good.session.clone();
    for good in [&good, &arriving] {
        let with = |change: &dyn Fn(&mut SessionClaims)| {
            code(&policy, good, |i| change(i.session.as_mut().unwrap()))
        };
        assert_eq!(with(&|s| s.suite = "NULL".into()), Code::SessionNotAllowed);
        assert_eq!(with(&|s| s.group = "P256".into()), Code::SessionNotAllowed);
        assert_eq!(
            with(&|s| s.provider = "aws-lc".into()),
            Code::SessionNotAllowed
        );
        assert_ne!(code(&policy, good, |i| i.session = None), Code::Allowed);
    }
    // At the source, the peer that signed is the one that was named.
    let (far, gateway) = (identity("far.test", 2), identity("gw.test", 3));
    let of = |peer: &str, end: &Identity, tls: &Identity| {
        decide(&policy, &leaving(peer, Some(session(end, tls)))).code
    };
    assert_eq!(of("far", &far, &gateway), Code::Allowed);
    assert_eq!(of("near", &far, &near), Code::PeerUnknown);
    assert_eq!(of("near", &near, &gateway), Code::PeerPathMismatch);
    assert_eq!(of("far", &far, &far), Code::PeerPathMismatch);
    assert_eq!(of("nobody", &near, &near), Code::PeerUnknown);
    assert_eq!(
        decide(&policy, &leaving("near", None)).code,
        Code::PeerUnknown
    );
    // Without lists every suite of the program will do; who is there is looked at all the same.
    let open = parse(BASE);
    let any = code(&open, &good, |i| {
        i.session.as_mut().unwrap().suite = "X".into()
    });
    assert_eq!(any, Code::Allowed);
    assert_eq!(
        decide(&open, &leaving("near", None)).code,
        Code::PeerUnknown
    );
    // What was recorded is asked again with the same words.
    assert_eq!(Inquiry::from_canonical(&good.canonical()), Some(good));
}
