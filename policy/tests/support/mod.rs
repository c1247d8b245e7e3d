//! Documents and questions that several tests ask.
#![allow(dead_code, reason = "each test takes what it needs")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use casemate_policy::action::Action;
use casemate_policy::claims::{Actor, Inquiry, Product, Tcb};
use casemate_policy::{Fingerprint, HostPolicy, Identity, Technology};

/// Everything open, as far as a file can.
pub const BASE: &str = r#"
[host]
name = "site-a"
site = "fra-1"
[technologies]
allowed = ["none", "sev", "sev-es", "sev-snp"]
[limits]
max_vcpus = 64
max_memory_mib = 65536
[migration]
outgoing = true
incoming = true
[[peer]]
name = "near"
site = "fra-2"
san = "near.test"
spki = "sha256:0101010101010101010101010101010101010101010101010101010101010101"
path = "direct"
[[peer]]
name = "far"
san = "far.test"
spki = "sha256:0202020202020202020202020202020202020202020202020202020202020202"
path = "gateway"
gateway = { san = "gw.test", spki = "sha256:0303030303030303030303030303030303030303030303030303030303030303" }
"#;

/// An owner who demands evidence.
pub const OWNER: &str = r#"
[[guest]]
owner = "bank"
names = ["bank-*", "vault"]
technologies = ["sev-snp"]
launch_digests = ["aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"]
launch_signers = ["ed25519:cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"]
required_policy_bits = 0x10000
forbidden_policy_bits = 0x40000
max_vmpl = 1
nonce = true
max_evidence_age_s = 300
sites = ["fra-1"]
[guest.tcb.milan]
boot_loader = 4
snp = 22
microcode = 200
"#;

/// An operator for two things, a viewer, two security officers, an auditor, another operator.
pub const PEOPLE: &str = r#"
[people]
two_person = ["policy-load", "evidence-key-rotate", "failover-forced"]
[[person]]
name = "alice"
role = "operator"
uid = 1000
guests = ["bank-*"]
actions = ["launch", "stop"]
[[person]]
name = "bob"
role = "viewer"
uid = 1001
[[person]]
name = "officer"
role = "security-officer"
uid = 1002
spki = "sha256:0303030303030303030303030303030303030303030303030303030303030303"
[[person]]
name = "second"
role = "security-officer"
uid = 1003
spki = "sha256:0707070707070707070707070707070707070707070707070707070707070707"
[[person]]
name = "carol"
role = "auditor"
san = "carol.test"
spki = "sha256:0909090909090909090909090909090909090909090909090909090909090909"
[[person]]
name = "erin"
role = "operator"
san = "erin.test"
"#;

pub fn parse(text: &str) -> HostPolicy {
    HostPolicy::parse("test", text).unwrap()
}

pub fn ask(actor: Actor, object: &str, action: Action) -> Inquiry {
    let clock = "2026-06-01T00:00:00Z".parse().unwrap();
    Inquiry::new(actor, object, action, clock)
}

pub fn operator() -> Actor {
    Actor::Local { uid: 0 }
}

pub fn certificate(san: &str, key: u8) -> Actor {
    Actor::Certificate {
        san: san.parse().unwrap(),
        spki: Fingerprint::from_bytes([key; 32]),
    }
}

pub fn launch(technology: Technology, policy_bits: u64) -> Action {
    Action::Launch {
        technology,
        emulated: false,
        vcpus: 1,
        memory_mib: 64,
        policy_bits,
    }
}

pub fn leaving(peer: &str) -> Inquiry {
    let action = Action::MigrateOut {
        technology: Technology::Sev,
        emulated: false,
        peer_name: peer.to_owned(),
    };
    ask(operator(), "bank-1", action)
}

pub fn arrival() -> Action {
    let near = Identity {
        san: "near.test".parse().unwrap(),
        spki: Fingerprint::from_bytes([1; 32]),
    };
    Action::MigrateIn {
        peer: near.clone(),
        tls: near,
        technology: Technology::Sev,
        emulated: false,
        vcpus: 1,
        memory_mib: 64,
        disks: Vec::new(),
        nets: Vec::new(),
    }
}

/// Evidence that satisfies [`OWNER`].
pub fn attested() -> Inquiry {
    let action = Action::Attest {
        technology: Technology::SevSnp,
        emulated: false,
        verified: true,
    };
    let mut inquiry = ask(operator(), "bank-1", action);
    inquiry.guest.launch_digest = Some("a".repeat(96).parse().unwrap());
    inquiry.guest.product = Some(Product::Milan);
    inquiry.guest.tcb = Some(Tcb {
        boot_loader: 4,
        tee: 0,
        snp: 22,
        microcode: 200,
        fmc: None,
    });
    inquiry.guest.policy_bits = Some(0x30000);
    inquiry.guest.vmpl = Some(1);
    inquiry.guest.nonce_matches = Some(true);
    inquiry.guest.evidence_age_s = Some(300);
    inquiry
}
