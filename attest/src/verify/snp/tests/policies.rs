//! What an owner can ask for, over reports from real hardware: met, and not met.

use super::*;
use crate::reference::{Signatures, SigningKey};

const LAUNCH: &str = "d9912ba396ce409c2947841d93a5076b6839b898c22b4aae05edb3b2b058a99927f8cf9a4f86\
                      17ee695deb14795496c8";

#[test]
fn what_a_policy_asks_for_is_held_against_the_report() {
    let zeros = |bytes: usize| "00".repeat(bytes);
    let ones = |bytes: usize| "01".repeat(bytes);
    for (id, good, bad, code) in [
        (
            "genoa-v5",
            format!("measurements = [\"{}\", \"{LAUNCH}\"]", ones(48)),
            format!("measurements = [\"{}\"]", ones(48)),
            "MEASUREMENT_NOT_ALLOWED",
        ),
        (
            "genoa-v5",
            format!("[launch]\nhost_data = [\"{}\"]", zeros(32)),
            format!("[launch]\nhost_data = [\"{}\"]", ones(32)),
            "HOST_DATA_NOT_ALLOWED",
        ),
        (
            "genoa-v3",
            "[launch]\nfamily_ids = [\"01232000000000000000000000000000\"]".to_owned(),
            "[launch]\nfamily_ids = []".to_owned(),
            "FAMILY_ID_NOT_ALLOWED",
        ),
        (
            "genoa-v3",
            "[launch]\nimage_ids = [\"02000000000000000000000000000000\"]".to_owned(),
            format!("[launch]\nimage_ids = [\"{}\"]", zeros(16)),
            "IMAGE_ID_NOT_ALLOWED",
        ),
        (
            "genoa-v3",
            "[launch]\nmin_guest_svn = 65547".to_owned(),
            "[launch]\nmin_guest_svn = 65548".to_owned(),
            "GUEST_SVN_TOO_LOW",
        ),
        (
            "genoa-v3",
            "[launch]\nrequire_id_key = true\nid_key_digests = [\"942fd93ebde6ea7a96efadeafc60f1c6\
             b3d10e703b1dafd7555b92f7f3d32d0e006767648cba5b102af3d65756af4177\"]"
                .to_owned(),
            format!("[launch]\nid_key_digests = [\"{}\"]", ones(48)),
            "ID_KEY_NOT_ALLOWED",
        ),
        (
            "genoa-v3",
            "[launch]\nrequire_id_key = true".to_owned(),
            format!("[launch]\nid_key_digests = [\"{}\"]", zeros(48)),
            "ID_KEY_NOT_ALLOWED",
        ),
        (
            "genoa-v5",
            "[launch]\nrequire_id_key = false".to_owned(),
            "[launch]\nrequire_id_key = true".to_owned(),
            "ID_KEY_MISSING",
        ),
        (
            "genoa-v5",
            String::new(),
            // A zero digest stands for no ID block, and cannot be listed into being one.
            format!("[launch]\nid_key_digests = [\"{}\"]", zeros(48)),
            "ID_KEY_MISSING",
        ),
        (
            "genoa-v5",
            "[firmware]\nmin_current = \"1.55.49\"".to_owned(),
            "[firmware]\nmin_current = \"1.55.50\"".to_owned(),
            "FIRMWARE_CURRENT_TOO_OLD",
        ),
        (
            "genoa-v5",
            "[firmware]\nmin_committed = \"1.54.200\"".to_owned(),
            "[firmware]\nmin_committed = \"1.56.0\"".to_owned(),
            "FIRMWARE_COMMITTED_TOO_OLD",
        ),
        (
            "genoa-v3",
            "[guest_policy]\nmin_abi = \"0.31\"".to_owned(),
            "[guest_policy]\nmin_abi = \"0.32\"".to_owned(),
            "GUEST_POLICY_ABI_TOO_LOW",
        ),
        (
            "milan-v2-b",
            "min_report_version = 2".to_owned(),
            "min_report_version = 3".to_owned(),
            "REPORT_VERSION_TOO_OLD",
        ),
        (
            "milan-v2-b",
            "[tcb.milan]\ncurrent = { snp = 8, microcode = 115 }".to_owned(),
            "[tcb.milan]\ncurrent = { snp = 8, microcode = 116 }".to_owned(),
            "TCB_CURRENT_TOO_OLD",
        ),
    ] {
        let given = vector(id);
        let verdict = given.verdict(&Against::policy(&good));
        assert!(verdict.accepted(), "{good}: {verdict:?}");
        let verdict = given.verdict(&Against::policy(&bad));
        assert_eq!(codes(&verdict), [code], "{bad}");
        assert_eq!(verdict.overall, Outcome::Rejected);
    }
}

#[test]
fn an_empty_list_allows_nothing() {
    for (list, code) in [
        ("measurements = []", "MEASUREMENT_NOT_ALLOWED"),
        ("reference_signers = []", "MEASUREMENT_NOT_ALLOWED"),
        ("vmpl = []", "VMPL_NOT_ALLOWED"),
        ("products = []", "PRODUCT_NOT_ALLOWED"),
        ("signing_keys = []", "SIGNING_KEY_NOT_ALLOWED"),
        ("csp_ids = []", "CSP_ID_NOT_ALLOWED"),
        ("chip_ids = []", "CHIP_ID_NOT_ALLOWED"),
        ("[launch]\nhost_data = []", "HOST_DATA_NOT_ALLOWED"),
        ("[launch]\nid_key_digests = []", "ID_KEY_NOT_ALLOWED"),
        ("[launch]\nauthor_key_digests = []", "AUTHOR_KEY_MISSING"),
    ] {
        assert_eq!(vector("genoa-v3").codes(&Against::policy(list)), [code]);
    }
}

/// Reference values for one digest, signed by `signers`, in force in November 2026.
fn reference(digest: &str, more: &str, signers: &[&SigningKey]) -> ReferenceValues {
    let hash = "00".repeat(32);
    let text = format!(
        "version = 1\nnot_before = \"2026-11-01T00:00:00Z\"\nexpires = \"2026-12-01T00:00:00Z\"\n\
         [[guest]]\nname = \"vault\"\ntechnology = \"snp\"\n{more}\n\
         [guest.inputs]\nvmsa_profile = \"qemu\"\nguest_features = \"0x1\"\n\
         firmware = {{ sha256 = \"{hash}\", size = 4096 }}\n\
         [[guest.launch]]\ndigest = \"{digest}\"\nvcpus = 1\nvcpu_signature = \"0xa00f11\"\n"
    );
    let mut signatures = Signatures::default();
    for signer in signers {
        signatures.add(signer.sign(text.as_bytes())).unwrap();
    }
    let keys: Vec<_> = signers.iter().map(|key| key.public()).collect();
    let clock = at("2026-11-22T00:00:00Z");
    ReferenceValues::open(text.as_bytes(), &signatures, &keys, keys.len(), clock).unwrap()
}

#[test]
fn reference_values_count_only_from_signers_that_the_policy_names() {
    let given = vector("genoa-v5");
    let judge = |policy: &str, references: &[&ReferenceValues]| {
        let mut against = Against::policy(policy);
        against.references = references.iter().map(|values| (*values).clone()).collect();
        given.codes(&against).join(" ")
    };
    let key = || SigningKey::read(&SigningKey::generate().unwrap()).unwrap();
    let (one, two, stranger) = (key(), key(), key());
    let refused = "MEASUREMENT_NOT_ALLOWED";
    let other_digest = "01".repeat(48);
    let right = reference(LAUNCH, "", &[&one]);
    let both = reference(LAUNCH, "", &[&one, &two]);
    let strange = reference(LAUNCH, "", &[&stranger]);
    let wrong = reference(&other_digest, "", &[&one]);
    let named = format!(
        "reference_signers = [\"{}\", \"{}\"]",
        one.public(),
        two.public()
    );
    let twice = format!("{named}\nreference_threshold = 2");
    let list = format!("measurements = [\"{other_digest}\"]");
    let listed = format!("measurements = [\"{LAUNCH}\"]");
    for (policy, references, expected) in [
        (named.as_str(), &[&wrong, &right][..], ""),
        (&named, &[&wrong], refused),
        (&named, &[], refused),
        (&named, &[&strange], refused),
        (&twice, &[&right], refused),
        (&twice, &[&both], ""),
        // A list without signers is not widened by a reference value, nor is a policy that says
        // nothing met by one.
        (&list, &[&right], refused),
        ("", &[&right], refused),
        (&format!("{named}\n{list}"), &[&right], ""),
        (&format!("{named}\n{listed}"), &[&wrong], ""),
    ] {
        assert_eq!(judge(policy, references), expected, "{policy}");
    }
    let key_digest = format!("id_key_digest = \"{other_digest}\"");
    let with_key = reference(LAUNCH, &key_digest, &[&one]);
    assert_eq!(judge(&named, &[&with_key]), "REFERENCE_KEY_MISMATCH");
    let mut late = Against::policy(&named);
    late.references = vec![right];
    late.clock = at("2026-12-01T00:00:00Z");
    assert_eq!(given.codes(&late), [refused]);
}

#[test]
fn no_policy_file_loosens_the_floor() {
    // Each of these is refused, or changes nothing.
    let debug = vector("milan-v2-debug");
    let expired = vector("milan-v3-vlek");
    let mut forged = vector("genoa-v5");
    forged.report[0x90] ^= 1;
    for policy in [
        "allow_debug = true",
        "[guest_policy]\nrequire = [\"debug\"]",
        "[guest_policy]\nallow = [\"debug\"]",
        "allow_emulated = true",
        "emulated_roots = [\"sha256:1f084161a44bb6d93778a904877d4819cafa5d05ef4193b2ded9dd9c73dd3f6a\"]\nallow_emulated = true",
        "vmpl = [4294967295]",
        "vmpl = [4]",
        "products = [\"venice\"]",
        "min_report_version = 0",
        "min_report_version = 1",
        "min_report_version = 6",
        "roots = [\"sha256:00\"]",
        "signing_keys = [\"none\"]",
        "signature = \"ignore\"",
        "ignore_dates = true",
        "clock = \"2025-01-01T00:00:00Z\"",
        "[crl]\nmode = \"ignore\"",
        "[crl]\nmode = \"off\"",
        "[tcb.milan]\nreported = {}",
        "migration_agent = \"ignore\"",
    ] {
        let Ok(policy) = OwnerPolicy::parse(policy.as_bytes()) else {
            continue;
        };
        for (given, code) in [
            (&debug, "DEBUG_ALLOWED"),
            (&expired, "LEAF_EXPIRED"),
            (&forged, "REPORT_SIGNATURE_INVALID"),
        ] {
            let codes = given.codes(&Against::owner(policy.clone()));
            assert!(codes.contains(&code.to_owned()), "{codes:?}");
        }
    }
}
