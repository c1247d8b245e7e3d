//! Emulated platforms that sign whatever they are given: one wrong thing at a time.

use super::*;
use crate::processor::snp::ReportFields;
use crate::processor::snp::forge::{self, Authority, DAY, LeafSpec, Signer, ago, ahead};
use crate::product::Product;
use crate::report::{PlatformInfo, ReportVersion, SigningKey, SnpPolicy};
use crate::tcb::RawTcb;
use crate::verify::policy::Fingerprint;

const VCEK: SigningKey = SigningKey::Vcek;
const VLEK: SigningKey = SigningKey::Vlek;
const V5: ReportVersion = ReportVersion::V5;

/// A good report of an emulated platform, changed, and then signed.
fn signed(
    product: Product,
    version: ReportVersion,
    key: SigningKey,
    change: impl FnOnce(&mut ReportFields),
) -> Given {
    let identity = Authority::shared().identity();
    let tcb = forge::tcb(product);
    let mut fields = forge::report_fields(identity, product, version, key, tcb);
    let leaf = match key {
        VCEK => identity.vcek(product, tcb).unwrap(),
        VLEK => identity.vlek(product, tcb, "provider").unwrap(),
    };
    change(&mut fields);
    Given {
        report: leaf.sign_report(&fields).unwrap().to_vec(),
        leaf: leaf.certificate().to_vec(),
        certificates: chain(),
        crl: None,
    }
}

fn turin(change: impl FnOnce(&mut ReportFields)) -> Given {
    signed(Product::Turin, V5, VCEK, change)
}

fn chain() -> Vec<Vec<u8>> {
    let authority = Authority::shared();
    [authority.ark(), authority.ask(), authority.asvk()]
        .map(<[u8]>::to_vec)
        .to_vec()
}

fn root() -> Fingerprint {
    Fingerprint(Authority::shared().identity().root_fingerprint())
}

/// A policy that allows the emulated platform, and says `text` besides.
fn allowing(text: &str) -> Against {
    let text = format!(
        "allow_emulated = true\nemulated_roots = [\"{}\"]\n{text}",
        root()
    );
    now(Against::policy(&text))
}

fn now(mut against: Against) -> Against {
    against.clock = SystemTime::now();
    against
}

#[test]
fn every_product_version_and_key_is_accepted_and_called_emulated() {
    use ReportVersion::{V2, V3, V4};
    for product in Product::ALL {
        for version in [V2, V3, V4, V5] {
            for key in [VCEK, VLEK] {
                let given = signed(product, version, key, |_| {});
                let verdict = given.verdict(&allowing(""));
                assert!(verdict.accepted(), "{product} {version} {key}: {verdict:?}");
                assert!(verdict.emulated);
                assert!(check(&verdict, "emulated").found.contains("emulated"));
            }
        }
    }
}

#[test]
fn an_emulated_platform_counts_only_where_it_is_named_and_allowed() {
    let given = turin(|_| {});
    let unnamed = given.verdict(&now(Against::default()));
    assert_eq!(unnamed.overall, Outcome::Rejected);
    assert_eq!(
        check(&unnamed, "certificate_chain").code.as_deref(),
        Some("ROOT_NOT_PINNED")
    );
    let named = Against::policy(&format!("emulated_roots = [\"{}\"]", root()));
    let verdict = given.verdict(&now(named));
    assert_eq!(codes(&verdict), ["EMULATED_NOT_ALLOWED"]);
    assert!(verdict.emulated);
    let added = Against::owner(OwnerPolicy::default().with_emulated_root(root()));
    assert_eq!(given.codes(&now(added)), ["EMULATED_NOT_ALLOWED"]);
    let allowed = Against::owner(OwnerPolicy::allowing_emulated(root()));
    assert!(given.verdict(&now(allowed)).accepted());
    // Allowed, but another root is named.
    let other = Fingerprint(Authority::other().identity().root_fingerprint());
    let other = Against::owner(OwnerPolicy::allowing_emulated(other));
    assert_eq!(given.verdict(&now(other)).overall, Outcome::Rejected);
    // AMD's real reports are accepted all the same.
    assert!(vector("genoa-v5").verdict(&allowing("")).accepted());
}

/// A change of a report's fields.
type Change = fn(&mut ReportFields);

#[test]
fn the_floor_holds_for_reports_that_are_well_signed() {
    let cases: [(&[&str], Change); 10] = [
        (&["DEBUG_ALLOWED"], |f| f.policy = SnpPolicy(0xb_0000)),
        (&["GUEST_POLICY_RESERVED_CLEAR"], |f| {
            f.policy = SnpPolicy(0x1_0000)
        }),
        (&["GUEST_POLICY_UNKNOWN_BITS"], |f| {
            f.policy = SnpPolicy(0x3_0000 | 1 << 40);
        }),
        (&["VMPL_HOST_REQUESTED", "VMPL_NOT_ALLOWED"], |f| {
            f.vmpl = u32::MAX
        }),
        (&["VMPL_NOT_ALLOWED", "VMPL_OUT_OF_RANGE"], |f| f.vmpl = 4),
        (&["PRODUCT_UNKNOWN"], |f| f.cpuid.model = 0x50),
        (&["PRODUCT_MISMATCH"], |f| {
            (f.cpuid.family, f.cpuid.model) = (0x19, 0x11);
        }),
        (&["LEAF_CHIP_MISMATCH"], |f| f.chip_id[8] = 1),
        (&["CHIP_KEY_MASKED"], |f| f.masks_chip_key = true),
        (&["SIGNING_KEY_MISMATCH"], |f| f.signing_key = VLEK),
    ];
    for (expected, change) in cases {
        let verdict = turin(change).verdict(&allowing(""));
        assert_eq!(codes(&verdict), expected, "{verdict:?}");
        assert_eq!(verdict.overall, Outcome::Rejected);
        assert_eq!(
            check(&verdict, "report_signature").result,
            CheckResult::Accepted
        );
    }
}

#[test]
fn tcb_levels_are_compared_part_by_part() {
    let parts = [0, 1, 2, 3, 7];
    for at in parts {
        let reported = turin(|f| f.reported_tcb.0[at] += 1).codes(&allowing(""));
        assert_eq!(reported, ["LEAF_TCB_MISMATCH", "REPORTED_ABOVE_COMMITTED"]);
        let below = turin(|f| f.reported_tcb.0[at] -= 1).codes(&allowing(""));
        assert_eq!(below, ["LEAF_TCB_MISMATCH"]);
        let committed = turin(|f| f.committed_tcb.0[at] += 1).codes(&allowing(""));
        assert_eq!(
            committed,
            ["COMMITTED_ABOVE_CURRENT", "PROVISIONAL_FIRMWARE"]
        );
        let current = turin(|f| f.current_tcb.0[at] += 1).codes(&allowing(""));
        assert_eq!(current, ["PROVISIONAL_FIRMWARE"]);
    }
    // The reserved bytes of the reported TCB count as well.
    assert_eq!(
        turin(|f| f.reported_tcb.0[5] = 1).codes(&allowing("")),
        ["LEAF_TCB_MISMATCH"]
    );
    let firmware = turin(|f| f.current_firmware.build += 1);
    assert_eq!(firmware.codes(&allowing("")), ["PROVISIONAL_FIRMWARE"]);
    assert!(
        firmware
            .verdict(&allowing("provisional_firmware = \"allow\""))
            .accepted()
    );
}

#[test]
fn a_lexicographic_compare_would_let_this_downgrade_through() {
    let minimum = "[tcb.milan]\nlaunch = { boot_loader = 4, snp = 23, microcode = 219 }";
    let down = |f: &mut ReportFields| f.launch_tcb = RawTcb([5, 1, 0, 0, 0, 0, 1, 1]);
    let given = signed(Product::Milan, V5, VCEK, down);
    let verdict = given.verdict(&allowing(minimum));
    assert_eq!(codes(&verdict), ["TCB_LAUNCH_TOO_OLD"]);
    let found = &check(&verdict, "tcb_launch").found;
    assert!(found.contains("snp 1 is below 23") && found.contains("microcode 1 is below 219"));
}

#[test]
fn minima_hold_for_each_tcb_version_and_part_of_turin() {
    for which in ["reported", "committed", "current", "launch"] {
        for (part, level) in [
            ("fmc", 1),
            ("boot_loader", 4),
            ("tee", 1),
            ("snp", 23),
            ("microcode", 219),
        ] {
            let policy = |level| format!("[tcb.turin]\n{which} = {{ {part} = {level} }}");
            let given = turin(|_| {});
            assert!(given.verdict(&allowing(&policy(level))).accepted());
            let code = format!("TCB_{}_TOO_OLD", which.to_uppercase());
            assert_eq!(given.codes(&allowing(&policy(level + 1))), [code]);
        }
    }
    // Another product's minima are not Turin's, and Turin has to be there.
    let other = "[tcb.genoa]\nreported = { microcode = 255 }";
    assert_eq!(
        turin(|_| {}).codes(&allowing(other)),
        ["TCB_PRODUCT_UNLISTED"]
    );
    let both = format!("{other}\n[tcb.turin]");
    assert!(turin(|_| {}).verdict(&allowing(&both)).accepted());
}

#[test]
fn hidden_chips_are_nobodys_on_the_list() {
    let chip = Authority::shared()
        .identity()
        .chip_id(Product::Turin)
        .unwrap();
    let list = format!("chip_ids = [\"{}\"]", hex::encode(chip));
    let shown = turin(|_| {});
    let hidden = turin(|f| f.chip_id = [0; 64]);
    let vlek = signed(Product::Turin, V5, VLEK, |_| {});
    for (given, policy, expected) in [
        (&shown, list.as_str(), ""),
        (&shown, "masked_chip_id = \"refuse\"", ""),
        (&shown, "chip_ids = []", "CHIP_ID_NOT_ALLOWED"),
        (&hidden, "", ""),
        (&hidden, &list, "CHIP_ID_MASKED"),
        (&hidden, "masked_chip_id = \"refuse\"", "CHIP_ID_MASKED"),
        (&vlek, "", ""),
        (&vlek, &list, "CHIP_ID_MASKED"),
    ] {
        let codes = given.codes(&allowing(policy));
        assert_eq!(codes.join(" "), expected, "{policy}");
    }
    // A VLEK may sign where the chip's key is masked.
    let masked = signed(Product::Turin, V5, VLEK, |f| f.masks_chip_key = true);
    assert!(masked.verdict(&allowing("")).accepted());
}

#[test]
fn migration_agents_and_author_keys_are_seen() {
    let agent = turin(|f| f.report_id_ma = [7; 32]);
    assert_eq!(agent.codes(&allowing("")), ["MIGRATION_AGENT_BOUND"]);
    assert!(
        agent
            .verdict(&allowing("migration_agent = \"allow\""))
            .accepted()
    );
    let author = |flag| {
        turin(move |f| {
            f.has_author_key = flag;
            f.author_key_digest = [9; 48];
        })
    };
    let list = |byte: &str| format!("[launch]\nauthor_key_digests = [\"{}\"]", byte.repeat(48));
    assert!(author(true).verdict(&allowing(&list("09"))).accepted());
    assert_eq!(
        author(true).codes(&allowing(&list("08"))),
        ["AUTHOR_KEY_NOT_ALLOWED"]
    );
    assert_eq!(
        author(false).codes(&allowing(&list("09"))),
        ["AUTHOR_KEY_MISSING"]
    );
}

#[test]
fn mitigations_are_masks_and_older_reports_have_none() {
    for (key, code) in [
        ("launch", "MITIGATIONS_LAUNCH_MISSING"),
        ("current", "MITIGATIONS_CURRENT_MISSING"),
    ] {
        let policy = |mask: u64| format!("[mitigations]\n{key} = {mask}");
        assert!(turin(|_| {}).verdict(&allowing(&policy(0x9))).accepted());
        assert_eq!(turin(|_| {}).codes(&allowing(&policy(0x4))), [code]);
        let old = signed(Product::Turin, ReportVersion::V4, VCEK, |_| {});
        assert_eq!(
            old.codes(&allowing(&policy(0x1))),
            ["MITIGATIONS_UNREPORTED"]
        );
    }
}

#[test]
fn providers_and_kinds_of_keys_can_be_listed() {
    let vlek = signed(Product::Genoa, V5, VLEK, |_| {});
    let vcek = signed(Product::Genoa, V5, VCEK, |_| {});
    for (given, policy, expected) in [
        (&vlek, "csp_ids = [\"provider\"]", ""),
        (&vlek, "csp_ids = [\"other\"]", "CSP_ID_NOT_ALLOWED"),
        (&vcek, "csp_ids = [\"provider\"]", "CSP_ID_NOT_ALLOWED"),
        (&vlek, "signing_keys = [\"vlek\"]", ""),
        (
            &vlek,
            "signing_keys = [\"vcek\"]",
            "SIGNING_KEY_NOT_ALLOWED",
        ),
        (&vcek, "signing_keys = []", "SIGNING_KEY_NOT_ALLOWED"),
        (&vcek, "products = [\"genoa\", \"turin\"]", ""),
        (&vcek, "products = [\"turin\"]", "PRODUCT_NOT_ALLOWED"),
        (&vcek, "min_report_version = 5", ""),
        (&vcek, "vmpl = [1, 2]", "VMPL_NOT_ALLOWED"),
    ] {
        assert_eq!(
            given.codes(&allowing(policy)).join(" "),
            expected,
            "{policy}"
        );
    }
}

#[test]
fn platform_bits_can_be_required_and_forbidden() {
    let given = turin(|f| f.platform_info = PlatformInfo(0x21));
    for (policy, expected) in [
        ("[platform]\nrequire = [\"alias_check_complete\"]", ""),
        (
            "[platform]\nrequire = [\"tsme_enabled\"]",
            "PLATFORM_BIT_MISSING",
        ),
        (
            "[platform]\nforbid = [\"smt_enabled\"]",
            "PLATFORM_BIT_FORBIDDEN",
        ),
        (
            "[guest_policy]\nrequire = [\"smt\"]\nforbid = [\"migrate_ma\"]",
            "",
        ),
        (
            "[guest_policy]\nrequire = [\"single_socket\"]",
            "GUEST_POLICY_BIT_MISSING",
        ),
        (
            "[guest_policy]\nforbid = [\"smt\"]",
            "GUEST_POLICY_BIT_FORBIDDEN",
        ),
    ] {
        assert_eq!(
            given.codes(&allowing(policy)).join(" "),
            expected,
            "{policy}"
        );
    }
}

#[test]
fn revocation_lists_are_checked_whenever_they_are_there() {
    let authority = Authority::shared();
    let list = |given: &Given, crl: Vec<u8>, policy: &str| {
        let mut given = given.clone();
        given.crl = Some(crl);
        given.verdict(&allowing(policy))
    };
    let given = turin(|_| {});
    let good = list(&given, authority.crl(|_| {}), "[crl]\nmode = \"required\"");
    assert!(good.accepted(), "{good:?}");
    assert_eq!(check(&good, "revocation").result, CheckResult::Accepted);
    let missing = given.verdict(&allowing("[crl]\nmode = \"required\""));
    assert_eq!(missing.overall, Outcome::CannotVerify);
    assert_eq!(codes(&missing), ["CRL_MISSING"]);
    let revoking = authority.crl(|spec| spec.revoked.push(Signer::Ask.serial()));
    let stale = authority.crl(|spec| {
        spec.this_update = ago(60 * DAY);
        spec.next_update = Some(ago(30 * DAY));
    });
    let old = authority.crl(|spec| spec.this_update = ago(9 * DAY));
    for (crl, policy, code) in [
        (revoking, "", "CRL_REVOKED"),
        (stale, "", "CRL_STALE"),
        (old.clone(), "[crl]\nmax_age_days = 8", "CRL_TOO_OLD"),
        (authority.crl_by(Signer::Ask, |_| {}), "", "CRL_SIGNATURE"),
        (Authority::other().crl(|_| {}), "", "CRL_SIGNATURE"),
        (
            authority.crl(|spec| spec.this_update = ahead(DAY)),
            "",
            "CRL_NOT_YET_VALID",
        ),
        (b"no list".to_vec(), "", "CRL_MALFORMED"),
    ] {
        let verdict = list(&given, crl, policy);
        assert_eq!(codes(&verdict), [code]);
        assert_eq!(verdict.overall, Outcome::Rejected);
    }
    assert!(list(&given, old, "[crl]\nmax_age_days = 10").accepted());
}

#[test]
fn made_up_chains_with_the_right_names_are_refused() {
    let policy = allowing("");
    // Another installation's root, whose names are all the same.
    let other = Authority::other();
    let tcb = forge::tcb(Product::Turin);
    let leaf = other.identity().vcek(Product::Turin, tcb).unwrap();
    let fields = forge::report_fields(other.identity(), Product::Turin, V5, VCEK, tcb);
    let forged = Given {
        report: leaf.sign_report(&fields).unwrap().to_vec(),
        leaf: leaf.certificate().to_vec(),
        certificates: [other.ark(), other.ask()].map(<[u8]>::to_vec).to_vec(),
        crl: None,
    };
    let verdict = forged.verdict(&policy);
    assert_eq!(verdict.overall, Outcome::Rejected);
    assert_ne!(
        check(&verdict, "certificate_chain").result,
        CheckResult::Accepted
    );
    // The named root beside it does not help.
    let mut mixed = forged.clone();
    mixed.certificates.push(Authority::shared().ark().to_vec());
    let verdict = mixed.verdict(&policy);
    assert_ne!(
        check(&verdict, "certificate_chain").result,
        CheckResult::Accepted
    );
    assert_eq!(verdict.overall, Outcome::Rejected);
}

#[test]
fn an_expired_intermediate_is_told_from_a_forged_one() {
    let authority = Authority::shared();
    let expired = authority.intermediate(Signer::Ask, |spec| spec.not_after = ago(1));
    let mut given = turin(|_| {});
    given.certificates = vec![authority.ark().to_vec(), expired];
    // The leaf begins a day ago, when the intermediate was in force.
    assert_eq!(given.codes(&allowing("")), ["INTERMEDIATE_EXPIRED"]);
    let weak = authority.intermediate(Signer::Ask, |spec| spec.extensions.clear());
    given.certificates = vec![authority.ark().to_vec(), weak];
    let verdict = given.verdict(&allowing(""));
    assert_eq!(
        check(&verdict, "certificate_chain").code.as_deref(),
        Some("NOT_AUTHORITY")
    );
}

#[test]
fn a_verifier_that_has_seen_a_chain_goes_on_checking_its_dates() {
    let given = turin(|_| {});
    let against = allowing("");
    let verifier = SnpVerifier::new(against.policy.clone());
    let judge = |given: &Given, clock| {
        let expectation = Expectation {
            nonce: None,
            references: &[],
            clock,
        };
        verifier.verify(&given.evidence(), &expectation)
    };
    assert!(judge(&given, SystemTime::now()).accepted());
    assert_eq!(
        codes(&judge(&given, ahead(8 * 366 * DAY))),
        ["LEAF_EXPIRED"]
    );
    assert!(judge(&given, SystemTime::now()).accepted());
    // What was learnt from one evidence is no help for another.
    let mut bare = given.clone();
    bare.certificates = vec![Authority::other().ask().to_vec()];
    assert_eq!(judge(&bare, SystemTime::now()).overall, Outcome::Rejected);
    assert!(judge(&vector("genoa-v5"), at("2026-11-22T00:00:00Z")).accepted());
}

#[test]
fn leaves_with_wrong_extensions_are_refused() {
    let authority = Authority::shared();
    let identity = authority.identity();
    let tcb = forge::tcb(Product::Turin);
    let chip = identity.chip_id(Product::Turin).unwrap();
    let fields = forge::report_fields(identity, Product::Turin, V5, VCEK, tcb);
    let good = LeafSpec::vcek(Product::Turin, tcb, &chip[..8]);
    let other_tcb = crate::tcb::TcbVersion {
        microcode: 1,
        ..tcb
    };
    for (spec, code) in [
        (good.clone(), ""),
        (
            LeafSpec::vcek(Product::Turin, other_tcb, &chip[..8]),
            "LEAF_TCB_MISMATCH",
        ),
        (
            LeafSpec::vcek(Product::Turin, tcb, &[7; 8]),
            "LEAF_CHIP_MISMATCH",
        ),
        (good.clone().without_extension("4"), "EXTENSION_MISSING"),
        (
            good.clone().with_extension("3.8", forge::integer(&[0xff])),
            "EXTENSION_NEGATIVE",
        ),
        (
            good.clone()
                .with_second_extension("3.8", forge::integer(&[1])),
            "EXTENSION_DUPLICATE",
        ),
        (good.valid(ago(9 * DAY), ago(DAY)), "LEAF_EXPIRED"),
    ] {
        let key = authority.leaf(&spec);
        let given = Given {
            report: key.sign_report(&fields).unwrap().to_vec(),
            leaf: key.certificate().to_vec(),
            certificates: chain(),
            crl: None,
        };
        let codes = given.codes(&allowing(""));
        match code {
            "" => assert!(codes.is_empty(), "{codes:?}"),
            code => assert!(codes.contains(&code.to_owned()), "{code}: {codes:?}"),
        }
    }
}
