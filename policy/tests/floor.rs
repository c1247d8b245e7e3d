//! What no file can loosen, tried with the loosest files; what a file may not say; and any text at all.

mod support;

use casemate_policy::action::{Action, ActionKind};
use casemate_policy::claims::{Actor, Inquiry};
use casemate_policy::document::guest::ReplicaSeal;
use casemate_policy::document::people::Role;
use casemate_policy::{Code, HostPolicy, PolicyError, Technology, decide};
use proptest::prelude::*;

use support::*;

/// The loosest that a file can be, with owners and people who allow everything.
fn loosest() -> HostPolicy {
    let base = BASE.replace("[limits]", "allow_emulated = true\n[limits]");
    parse(&format!(
        "{base}[[guest]]\nowner = 'all'\nnames = ['*']\nmigration = ['live', 'relaunch']\nreplicas = 'sealed'\n\
         [[person]]\nname = 'o'\nrole = 'operator'\nuid = 0\n\
         [[person]]\nname = 's'\nrole = 'security-officer'\nuid = 1\n"
    ))
}

fn refused(actor: u32, action: Action) -> Code {
    let mut inquiry = ask(Actor::Local { uid: actor }, "vm", action);
    inquiry.guest = attested().guest;
    let decision = decide(&loosest(), &inquiry);
    assert!(!decision.allowed);
    assert!(
        decision
            .refusals()
            .any(|reason| reason.rule.starts_with("floor."))
    );
    decision.code
}

#[test]
fn nothing_loosens_the_floor() {
    use Technology::{None, Sev, SevEs, SevSnp};
    // Debugging, and guest policies that are none.
    assert_eq!(refused(0, launch(Sev, 0)), Code::DebugAllowed);
    assert_eq!(refused(0, launch(SevEs, 4)), Code::DebugAllowed);
    assert_eq!(refused(0, launch(SevSnp, 0xa0000)), Code::DebugAllowed);
    assert_eq!(
        refused(0, launch(SevSnp, 0x10000)),
        Code::GuestPolicyMismatch
    );
    assert_eq!(refused(0, launch(Sev, 5)), Code::GuestPolicyMismatch);
    assert_eq!(refused(0, launch(None, 1)), Code::GuestPolicyMismatch);
    // Moving what Linux cannot move: there and here, emulated or not, with the alternative.
    for technology in [SevEs, SevSnp] {
        for emulated in [false, true] {
            let out = Action::MigrateOut {
                technology,
                emulated,
                peer_name: "near".into(),
            };
            let Action::MigrateIn { peer, tls, .. } = arrival() else {
                panic!("an arrival")
            };
            let arriving = Action::MigrateIn {
                technology,
                emulated,
                peer,
                tls,
                vcpus: 1,
                memory_mib: 64,
                disks: vec![],
                nets: vec![],
            };
            for action in [out, arriving] {
                assert_eq!(refused(0, action.clone()), Code::TechnologyCannotMigrate);
                let inquiry = ask(Actor::Local { uid: 0 }, "vm", action);
                let decision = decide(&loosest(), &inquiry);
                assert!(decision.refusals().any(|r| r.remedy.contains("relaunch")));
            }
        }
    }
    // Two of one confidential guest.
    for technology in [Sev, SevEs, SevSnp] {
        let copy = Action::Clone {
            technology,
            emulated: technology == SevEs,
            vcpus: 1,
            memory_mib: 64,
        };
        assert_eq!(refused(0, copy), Code::TechnologyCannotClone);
    }
    // Secrets and attestations without proof.
    let release = |technology, measurement_matches| Action::ReleaseSecret {
        technology,
        emulated: false,
        measurement_matches,
    };
    assert_eq!(refused(0, release(SevSnp, false)), Code::NotProven);
    assert_eq!(refused(0, release(None, true)), Code::NotProven);
    let inject = Action::InjectSecret {
        technology: None,
        emulated: false,
    };
    assert_eq!(refused(0, inject), Code::NotProven);
    let attest = Action::Attest {
        technology: SevSnp,
        emulated: false,
        verified: false,
    };
    assert_eq!(refused(0, attest), Code::NotProven);
    // Policies: fewer signatures than the host wants, and the way back.
    let load = |version, in_force, same, signers| Action::PolicyLoad {
        version,
        in_force,
        same,
        signers,
        threshold: 2,
    };
    assert_eq!(refused(1, load(8, 7, false, 1)), Code::PolicyUnsigned);
    assert_eq!(refused(1, load(6, 7, false, 2)), Code::PolicyOlder);
    assert_eq!(refused(1, load(7, 7, false, 2)), Code::PolicyOlder);
    let good = ask(Actor::Local { uid: 1 }, "p", load(7, 7, true, 2));
    assert!(decide(&loosest(), &good).allowed);
}

#[test]
fn an_emulated_processor_counts_only_where_the_host_says_so() {
    let owners = "[[guest]]\nowner = 'all'\nnames = ['*']\nmigration = ['live', 'relaunch']\nreplicas = 'sealed'\n";
    let closed = parse(&format!("{BASE}{owners}"));
    let (technology, emulated) = (Technology::Sev, true);
    let all = [
        Action::Launch {
            technology,
            emulated,
            vcpus: 1,
            memory_mib: 1,
            policy_bits: 1,
        },
        Action::MigrateOut {
            technology,
            emulated,
            peer_name: "near".into(),
        },
        Action::ReleaseSecret {
            technology,
            emulated,
            measurement_matches: true,
        },
        Action::InjectSecret {
            technology,
            emulated,
        },
        Action::Attest {
            technology,
            emulated,
            verified: true,
        },
        Action::Replicate {
            technology,
            emulated,
            peer_name: "near".into(),
            seal: ReplicaSeal::Sealed,
        },
        Action::Failover {
            technology,
            emulated,
            forced: false,
        },
    ];
    for action in all {
        let name = action.name();
        let decision = decide(&closed, &ask(operator(), "vm", action));
        assert_eq!(decision.code, Code::EmulatedNotAllowed, "{name}");
    }
}

/// What a role may do is in no file: viewers and auditors change nothing, who runs guests changes no rules, and no
/// person arrives from a peer.
#[test]
fn roles_are_fixed() {
    for kind in ActionKind::ALL {
        assert!(!Role::Viewer.may(*kind) || kind.reads(), "{kind:?}");
        let harmless = kind.reads() || *kind == ActionKind::SandboxProbe;
        assert!(!Role::Auditor.may(*kind) || harmless, "{kind:?}");
        let both = Role::Operator.may(*kind) && Role::SecurityOfficer.may(*kind);
        assert!(
            !both || harmless || *kind == ActionKind::Approve,
            "{kind:?}"
        );
        let somebody = Role::ALL.iter().any(|role| role.may(*kind));
        let hosts = [ActionKind::MigrateIn, ActionKind::MigrateSession];
        assert_eq!(somebody, !hosts.contains(kind), "{kind:?}");
    }
}

/// Each a way to say what the floor forbids, or what makes no sense.
const NONSENSE: &[(&str, &str)] = &[
    ("[floor]\ndebug = true\n", "unknown field `floor`"),
    (
        "[[guest]]\nowner = 'o'\nnames = ['*']\nallow_debug = true\n",
        "unknown field `allow_debug`",
    ),
    (
        "[[guest]]\nowner = 'o'\nnames = ['*']\nallow_emulated = true\n",
        "unknown field",
    ),
    (
        "[[guest]]\nowner = 'o'\nnames = ['*']\ntechnologies = ['sev-snp']\nrequired_policy_bits = 0x80000\n",
        "debugged",
    ),
    (
        "[[guest]]\nowner = 'o'\nnames = ['*']\ntechnologies = ['sev']\nforbidden_policy_bits = 1\n",
        "debugged",
    ),
    (
        "[[guest]]\nowner = 'o'\nnames = ['*']\ntechnologies = ['sev-es', 'sev-snp']\nmigration = ['live']\n",
        "relaunch",
    ),
    (
        "[[guest]]\nowner = 'o'\nnames = ['*']\nrequired_policy_bits = 3\nforbidden_policy_bits = 2\n",
        "0x2",
    ),
    ("[[guest]]\nowner = 'o'\nnames = []\n", "name no guest"),
    ("[[guest]]\nowner = 'o'\nnames = ['a*b']\n", "pattern"),
    (
        "[[guest]]\nowner = 'o'\nnames = ['a', 'a*']\n[[guest]]\nowner = 'o'\nnames = ['a']\n",
        "already",
    ),
    (
        "[[guest]]\nowner = 'o'\nnames = ['*']\nmax_vmpl = 4\n",
        "0 to 3",
    ),
    (
        "[[guest]]\nowner = 'o'\nnames = ['*']\n[guest.tcb.milan]\nfmc = 1\n",
        "only turin",
    ),
    (
        "[[guest]]\nowner = 'o'\nnames = ['*']\n[guest.tcb.rome]\nsnp = 1\n",
        "unknown variant",
    ),
    (
        "[[guest]]\nowner = 'o'\nnames = ['*']\npeers = ['nobody']\n",
        "nobody",
    ),
    (
        "[[guest]]\nowner = 'o'\nnames = ['*']\nlaunch_digests = ['abc']\n",
        "96",
    ),
    (
        "[[guest]]\nowner = 'o'\nnames = ['*']\nreplicas = 'clear'\n",
        "unknown variant",
    ),
    (
        "[[person]]\nname = 'p'\nrole = 'root'\nuid = 0\n",
        "unknown variant",
    ),
    ("[[person]]\nname = 'p'\nrole = 'viewer'\n", "who `p` is"),
    (
        "[[person]]\nname = 'p'\nrole = 'viewer'\nuid = 1\nactions = ['launch']\n",
        "may not launch",
    ),
    (
        "[[person]]\nname = 'p'\nrole = 'operator'\nuid = 1\nactions = ['policy-load']\n",
        "may not policy-load",
    ),
    (
        "[[person]]\nname = 'p'\nrole = 'viewer'\nuid = 1\n[[person]]\nname = 'q'\nrole = 'operator'\nuid = 1\n",
        "repeats",
    ),
    (
        "[[person]]\nname = 'p'\nrole = 'viewer'\nsan = 'a.b'\n[[person]]\nname = 'q'\nrole = 'operator'\nsan = 'a.b'\n",
        "repeats",
    ),
    (
        "[people]\ntwo_person = ['policy-load']\n[[person]]\nname = 'p'\nrole = 'security-officer'\nuid = 1\n",
        "second",
    ),
    ("[people]\ntwo_person = ['everything']\n", "unknown variant"),
    ("[people]\nroles = []\n", "unknown field"),
    (
        "[[firmware]]\ntechnology = 'sev'\nmajor = 1\nminor = 1\n[[firmware]]\ntechnology = 'sev'\nmajor = 0\nminor = 1\n",
        "twice",
    ),
    ("[limits]\nmax_vcpus = 1\nmax_memory_mib = 1\n", "duplicate"),
];

#[test]
fn nonsense_is_refused_with_its_line_and_remedy() {
    let lines = BASE.lines().count();
    for (text, words) in NONSENSE {
        match HostPolicy::parse("p", &format!("{BASE}{text}")) {
            Err(PolicyError::Invalid { line, problem, .. }) => {
                assert!(problem.contains(words), "{text}: {problem}");
                assert!(line > lines, "{text}: line {line}");
            }
            other => panic!("{text}: {other:?}"),
        }
    }
    for (head, words) in [
        ("version = -1\n", "invalid"),
        ("version = 1\nversion = 1\n", "duplicate"),
        ("not_after = 'soon'\n", "2026-01-01"),
        (
            "not_before = '2026-01-02T00:00:00Z'\nnot_after = '2026-01-02T00:00:00Z'\n",
            "begins",
        ),
        ("threshold = 0\n", "unknown field"),
    ] {
        let problem = HostPolicy::parse("p", &format!("{head}{BASE}"))
            .unwrap_err()
            .to_string();
        assert!(problem.contains(words), "{head}: {problem}");
    }
}

fn pieces() -> impl Strategy<Value = String> {
    let whole = format!("version = 3\n{BASE}{OWNER}{PEOPLE}");
    let lines: Vec<String> = whole.lines().map(str::to_owned).collect();
    prop::collection::vec(
        prop_oneof![
            8 => prop::sample::select(lines),
            1 => "[ -~]{0,40}",
            1 => Just("[[guest]]".to_owned()),
        ],
        0..40,
    )
    .prop_map(|lines| lines.join("\n"))
}

proptest! {
    /// Any text is a policy or a refusal that names a line of it, and the same text is always the same policy.
    #[test]
    fn any_text_is_a_policy_or_a_refusal(text in prop_oneof![pieces(), ".{0,200}"]) {
        match HostPolicy::parse("p", &text) {
            Ok(policy) => prop_assert_eq!(HostPolicy::parse("p", &text).unwrap(), policy),
            Err(PolicyError::Invalid { line, .. }) => {
                prop_assert!(line >= 1 && line <= text.matches('\n').count() + 1);
            }
            Err(other) => prop_assert!(false, "{other}"),
        }
    }

    /// One line more or less of a good document never opens the floor.
    #[test]
    fn a_changed_document_holds_the_floor(drop in 0usize..90, copy in 0usize..90, bits: u64) {
        let whole = format!("{BASE}{OWNER}{PEOPLE}");
        let mut lines: Vec<&str> = whole.lines().collect();
        let copied = lines.get(copy).copied().unwrap_or("");
        if drop < lines.len() {
            lines.remove(drop);
        }
        lines.push(copied);
        if let Ok(policy) = HostPolicy::parse("p", &lines.join("\n")) {
            for uid in [0, 1000, 1001, 1002] {
                let mut inquiry: Inquiry = attested();
                inquiry.actor = Actor::Local { uid };
                inquiry.action = launch(Technology::SevSnp, bits | 1 << 19);
                prop_assert!(!decide(&policy, &inquiry).allowed);
            }
        }
    }

    /// A decision is a function of what it is given, and an inquiry survives the ledger.
    #[test]
    fn a_decision_can_be_made_again(uid in 0u32..3, vmpl: Option<u8>, age: Option<u64>, clock in 0u64..4_000_000_000) {
        let policy = parse(&format!("{BASE}{OWNER}"));
        let mut inquiry = attested();
        inquiry.actor = Actor::Local { uid };
        inquiry.clock = casemate_policy::Timestamp::from_unix(clock);
        inquiry.guest.vmpl = vmpl;
        inquiry.guest.evidence_age_s = age;
        let again = Inquiry::from_canonical(&inquiry.canonical()).unwrap();
        let decision = decide(&policy, &inquiry);
        prop_assert_eq!(&decision, &decide(&policy, &again));
        prop_assert_eq!(decision.allowed, decision.code == Code::Allowed);
        prop_assert_eq!(decision.allowed, decision.reasons.iter().all(|reason| reason.allows));
    }
}
