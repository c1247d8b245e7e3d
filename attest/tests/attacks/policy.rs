//! What the owner asked for, and how a host would get around it.

use super::*;
use casemate_attest::report::SnpPolicy;

const MINIMUM: &str = "boot_loader = 4, snp = 23";

fn minimum(which: &str) -> String {
    format!("[tcb.milan]\n{which} = {{ {MINIMUM} }}")
}

/// Boot loader 5 and SNP 1 are more than 4 and 23 to whoever compares them as a tuple. The leaf is
/// the one of that firmware: nothing but the comparison stands in the way.
#[test]
fn a_downgrade_that_a_lexicographic_comparison_lets_through() {
    let tcb = |boot_loader, snp| TcbVersion {
        boot_loader,
        snp,
        ..forge::tcb(Product::Milan)
    };
    let evidence = |tcb: TcbVersion| {
        let chip = chip(Product::Milan);
        evidence_of(
            Product::Milan,
            ReportVersion::V5,
            |_| LeafSpec::vcek(Product::Milan, tcb, &chip),
            |fields| {
                let raw = tcb.to_raw(Product::Milan).unwrap();
                fields.reported_tcb = raw;
                fields.committed_tcb = raw;
                fields.current_tcb = raw;
                fields.launch_tcb = raw;
            },
        )
    };
    evidence(tcb(5, 23)).accepted(&minimum("reported"));
    evidence(tcb(5, 1)).accepted("");
    evidence(tcb(5, 1)).refused(&minimum("reported"), &["TCB_REPORTED_TOO_OLD"]);
    evidence(tcb(3, 24)).refused(&minimum("reported"), &["TCB_REPORTED_TOO_OLD"]);
}

/// The reported TCB is what the key is derived from; what was launched under, and what the
/// platform can be taken back to, are other matters.
#[test]
fn a_good_reported_tcb_over_older_firmware() {
    let good = milan(|_| {});
    good.accepted(&minimum("launch"));
    let older = RawTcb([4, 1, 0, 0, 0, 0, 22, 219]);
    let launched = milan(|fields| fields.launch_tcb = older);
    launched.accepted(&minimum("reported"));
    launched.refused(&minimum("launch"), &["TCB_LAUNCH_TOO_OLD"]);
    // Firmware never says so; were it so, the floor refuses it without a policy.
    let committed = milan(|fields| fields.committed_tcb = older);
    committed.refused("", &["PROVISIONAL_FIRMWARE", "REPORTED_ABOVE_COMMITTED"]);
    committed.refused(
        &minimum("committed"),
        &[
            "PROVISIONAL_FIRMWARE",
            "REPORTED_ABOVE_COMMITTED",
            "TCB_COMMITTED_TOO_OLD",
        ],
    );
}

/// The owner gave levels for Milan; the host has an old Genoa.
#[test]
fn another_product_than_the_one_with_a_minimum() {
    for which in ["reported", "committed", "current", "launch"] {
        let policy = minimum(which);
        milan(|_| {}).accepted(&policy);
        for product in [Product::Genoa, Product::Turin] {
            let attack = evidence_of(product, ReportVersion::V5, |leaf| leaf, |_| {});
            attack.accepted("");
            attack.refused(&policy, &["TCB_PRODUCT_UNLISTED"]);
            // Named, and nothing asked of it.
            attack.accepted(&format!("{policy}\n[tcb.{product}]"));
        }
    }
}

#[test]
fn a_debug_guest_and_a_policy_file_that_allows_it() {
    milan(|_| {}).accepted("");
    let attack = milan(|fields| fields.policy = SnpPolicy(0x3_0000 | 1 << 19));
    for text in [
        "allow_debug = true",
        "[guest_policy]\nallow = [\"debug\"]",
        "[guest_policy]\nrequire = [\"debug\"]",
        "debug = \"allow\"",
        "[floor]\ndebug_forbidden = false",
    ] {
        assert!(OwnerPolicy::parse(text.as_bytes()).is_err(), "{text}");
    }
    attack.refused("", &["DEBUG_ALLOWED"]);
    attack.refused("[guest_policy]\nforbid = []", &["DEBUG_ALLOWED"]);
}

#[test]
fn a_policy_file_that_lets_the_host_ask() {
    for text in [
        "vmpl = [4294967295]",
        "vmpl = [4]",
        "vmpl = [-1]",
        "vmpl = 0",
    ] {
        assert!(OwnerPolicy::parse(text.as_bytes()).is_err(), "{text}");
    }
    assert!(OwnerPolicy::parse(b"vmpl = [0, 3]").is_ok());
}

#[test]
fn emulated_evidence_for_a_policy_that_does_not_allow_it() {
    let evidence = milan(|_| {});
    evidence.accepted("");
    let root = hex::encode(Authority::shared().identity().root_fingerprint());
    let named = format!("emulated_roots = [\"sha256:{root}\"]");
    let verdict = evidence.verdict(&OwnerPolicy::parse(named.as_bytes()).unwrap(), None);
    assert_eq!(codes(&verdict), ["EMULATED_NOT_ALLOWED"]);
    assert_eq!(verdict.overall, Outcome::Rejected);
    assert!(verdict.emulated);
    // Allowed, but not named: a root that the host brings along is nobody's.
    let unnamed = OwnerPolicy::parse(b"allow_emulated = true").unwrap();
    let verdict = evidence.verdict(&unnamed, None);
    assert_eq!(
        codes(&verdict),
        ["CHAIN_UNVERIFIED", "CHAIN_UNVERIFIED", "ROOT_NOT_PINNED"]
    );
    assert!(!verdict.emulated);
}

/// A struct of the old layout puts host_data one byte too early: a policy's hash, shifted.
#[test]
fn host_data_off_by_one_byte() {
    let wanted: [u8; 32] = std::array::from_fn(|at| at as u8 + 1);
    let policy = format!("[launch]\nhost_data = [\"{}\"]", hex::encode(wanted));
    milan(|fields| fields.host_data = wanted).accepted(&policy);
    let mut early = [0; 32];
    early[..31].copy_from_slice(&wanted[1..]);
    let mut late = [0; 32];
    late[1..].copy_from_slice(&wanted[..31]);
    for shifted in [early, late, [0; 32]] {
        let attack = milan(|fields| fields.host_data = shifted);
        attack.refused(&policy, &["HOST_DATA_NOT_ALLOWED"]);
    }
}

#[test]
fn an_id_block_signed_by_another_owner() {
    let list = |key: &str, byte: u8| format!("[launch]\n{key} = [\"{}\"]", hex::encode([byte; 48]));
    let launched = |id: u8, author: u8, flag| {
        milan(move |fields| {
            fields.id_key_digest = [id; 48];
            fields.author_key_digest = [author; 48];
            fields.has_author_key = flag;
        })
    };
    let id = list("id_key_digests", 1);
    let author = list("author_key_digests", 2);
    launched(1, 2, true).accepted(&id);
    launched(1, 2, true).accepted(&author);
    launched(9, 2, true).refused(&id, &["ID_KEY_NOT_ALLOWED"]);
    // The owner's keys in each other's place.
    launched(2, 1, true).refused(&id, &["ID_KEY_NOT_ALLOWED"]);
    launched(2, 1, true).refused(&author, &["AUTHOR_KEY_NOT_ALLOWED"]);
    // No ID block at all, and an author's flag without an author.
    launched(0, 0, false).refused(&id, &["ID_KEY_MISSING"]);
    launched(1, 0, true).refused(&author, &["AUTHOR_KEY_NOT_ALLOWED"]);
    launched(1, 2, false).refused(&author, &["AUTHOR_KEY_MISSING"]);
    // A list that names the digest of nothing does not make a launch without a block good.
    launched(0, 0, false).refused(&list("id_key_digests", 0), &["ID_KEY_MISSING"]);
}

#[test]
fn a_hidden_chip_for_one_on_the_list() {
    let list = format!("chip_ids = [\"{}\"]", hex::encode(chip(Product::Milan)));
    milan(|_| {}).accepted(&list);
    // The leaf still names the chip; the report, which is what the platform says, does not.
    milan(|fields| fields.chip_id = [0; 64]).refused(&list, &["CHIP_ID_MASKED"]);
    let zero = format!("chip_ids = [\"{}\"]", hex::encode([0; 64]));
    assert!(OwnerPolicy::parse(zero.as_bytes()).is_err());
}

#[test]
fn a_providers_key_where_only_a_chips_will_do() {
    let policy = "signing_keys = [\"vcek\"]";
    milan(|_| {}).accepted(policy);
    milan_vlek(|leaf| leaf).refused(policy, &["SIGNING_KEY_NOT_ALLOWED"]);
    milan_vlek(|leaf| leaf).refused("csp_ids = [\"clou\"]", &["CSP_ID_NOT_ALLOWED"]);
    milan_vlek(|leaf| leaf).accepted("csp_ids = [\"cloud\"]");
}

#[test]
fn firmware_that_can_be_taken_back() {
    milan(|_| {}).accepted("");
    let attack = milan(|fields| fields.committed_firmware.build -= 1);
    attack.refused("", &["PROVISIONAL_FIRMWARE"]);
    attack.accepted("provisional_firmware = \"allow\"");
    attack.refused(
        "provisional_firmware = \"allow\"\n[firmware]\nmin_committed = \"1.55.21\"",
        &["FIRMWARE_COMMITTED_TOO_OLD"],
    );
}
