//! Every command: those that reach a host are refused to a stranger by its policy and leave a record; all others stand
//! here with what they touch instead.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use std::collections::BTreeSet;

use support::{Host, POLICY, SEV_WITH_SECRET};

/// Commands that ask the agent, with arguments that bring them so far.
const ASKING: [&str; 56] = [
    "cancel vm",
    "evidence retain --keep-from 1",
    "evidence rotate",
    "list",
    "metrics",
    "migrate vm --to there",
    "migrate-set vm --bandwidth 3",
    "nmi vm",
    "owner release vm --description host/vm.toml --session session --platform platform --secret secret",
    "pause vm",
    "platform csr --out out.csr",
    "platform export --out out",
    "platform factory-reset --yes",
    "platform id",
    "platform import --oca oca/oca.cert --pek pek.cert",
    "platform pdh-gen",
    "platform pek-gen --yes",
    "platform show",
    "platform snp commit --yes",
    "platform snp config",
    "platform snp vlek-load secret",
    "policy approve 1",
    "policy load policy.toml",
    "proceed vm",
    "restore file",
    "resume vm",
    "run host/vm.toml",
    "sandbox probe vm",
    "sandbox report vm",
    "settle vm",
    "snapshot vm file",
    "status vm",
    "stop vm",
    "task cancel 1",
    "task follow 1",
    "task list",
    "task show 1",
    "vm clone file vm",
    "vm attach vm --net card",
    "vm console vm",
    "vm create host/vm.toml",
    "vm definitions",
    "vm delete vm",
    "vm detach vm --net card",
    "vm list",
    "vm pause vm",
    "vm resize vm --disk data",
    "vm restore file",
    "vm resume vm",
    "vm show vm",
    "vm snapshot vm file",
    "vm snapshot-erase 00",
    "vm start vm",
    "vm stats vm",
    "vm stop vm",
    "vm upgrade vm",
];

/// Commands that ask no agent, and what they touch. What changes something on a host is none of them but a broker's
/// store, whose changes the broker records (`broker::tests::governed`).
const ALONE: [(&str, &str); 40] = [
    ("agent", "is the agent"),
    ("attest certificate", "files"),
    ("attest fetch", "AMD's key service, files"),
    ("attest get", "the processor of the guest that it runs in"),
    ("attest id-block check", "files"),
    ("attest id-block digest", "files"),
    ("attest id-block key", "files"),
    ("attest id-block make", "files"),
    ("attest measure", "files"),
    ("attest platform", "files"),
    ("attest reference check", "files"),
    ("attest reference key", "files"),
    ("attest reference make", "files"),
    ("attest reference sign", "files"),
    ("attest report", "files"),
    ("attest verify", "files"),
    ("bench migrate", "memory of its own"),
    (
        "broker",
        "is the broker, under a host policy and with a ledger",
    ),
    ("broker list", "a broker's store, reading"),
    ("broker put", "a broker's store"),
    ("broker remove", "a broker's store"),
    ("completion", "nothing"),
    ("doctor", "this machine, reading"),
    ("evidence checkpoint", "files"),
    (
        "evidence cosign",
        "files beside a ledger, which verify by themselves",
    ),
    ("evidence export", "files"),
    ("evidence query", "files"),
    ("evidence report", "files"),
    ("evidence tail", "files"),
    ("evidence verify", "files"),
    (
        "guest-names",
        "the agent's list, which is empty where its policy refuses it",
    ),
    (
        "internal",
        "is a role that an agent started, on the channel it was given",
    ),
    ("man", "nothing"),
    ("openapi", "nothing"),
    ("owner measure", "files"),
    ("owner session", "files"),
    ("platform oca new", "files"),
    ("platform oca sign", "files"),
    ("vm schema", "nothing"),
    ("vm validate", "files"),
];

/// The tools of policies, which decide nothing until an agent loads them.
const POLICIES: [&str; 6] = [
    "policy check",
    "policy diff",
    "policy explain",
    "policy keygen",
    "policy sign",
    "policy test",
];

#[test]
fn no_command_goes_around_the_policy() {
    let commands: BTreeSet<String> = casemate::cli::commands().into_iter().collect();
    let alone = ALONE.iter().map(|(command, _)| *command).chain(POLICIES);
    let mut unknown = commands.clone();
    for command in alone {
        assert!(unknown.remove(command), "there is no `{command}`");
    }
    let host = closed_host();
    for line in ASKING {
        let command = commands.iter().filter(|c| is_of(line, c));
        let command = command.max_by_key(|c| c.len()).unwrap();
        assert!(unknown.remove(command), "`{command}` stands here twice");
        let before = host.records().len();
        let arguments: Vec<&str> = line.split(' ').collect();
        host.run(&arguments).refused(3, &["POLICY_PERSON_UNKNOWN"]);
        let records = host.records();
        assert_eq!(records.len(), before + 1, "{line}");
        let last = records.last().unwrap();
        assert_eq!(
            (&last["outcome"], &last["code"], &last["actor"]),
            (&"refused".into(), &"person-unknown".into(), &"uid 0".into()),
            "{line}"
        );
    }
    assert!(unknown.is_empty(), "say where these belong: {unknown:?}");
}

/// A host with all that the commands want to read, whose policy knows somebody else only.
fn closed_host() -> Host {
    let mut host = Host::with_policy("walk", POLICY);
    host.start();
    let description = host.describe("host", "vm", SEV_WITH_SECRET);
    let root = host.export_platform();
    host.owner_session(&description, &root, "session");
    host.write("secret", "a secret");
    let sign = "platform oca sign --csr csr --oca oca --out pek.cert";
    for line in ["platform csr --out csr", "platform oca new --out oca", sign] {
        let arguments: Vec<&str> = line.split(' ').collect();
        host.run(&arguments).expect(0);
    }
    let people = "[[person]]\nname = 'olga'\nrole = 'operator'\nuid = 4242\n";
    host.write("next.toml", format!("version = 1\n{POLICY}{people}"));
    host.run(&["policy", "load", "next.toml"]).expect(0);
    host
}

fn is_of(line: &str, command: &str) -> bool {
    let rest = line.strip_prefix(command);
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(' '))
}
