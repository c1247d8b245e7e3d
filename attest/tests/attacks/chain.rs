//! Certificates that are not what they say.

use super::*;
use casemate_attest::chain::Intermediate;
use casemate_attest::processor::snp::forge::{DAY, Signer, ago, ahead, ia5, integer};
use casemate_attest::verify::CheckResult;
use x509_cert::Certificate;
use x509_cert::der::{Decode as _, Encode as _};

/// Every name of AMD's Milan chain, the product name and the extensions, by keys of the host's
/// own; the report is well signed.
fn made_up(authority: &Authority) -> Evidence {
    let (ark, ask) = (amd_name("ARK-Milan"), amd_name("SEV-Milan"));
    let root = authority.intermediate(Signer::Ark, |spec| {
        spec.subject.clone_from(&ark);
        spec.issuer.clone_from(&ark);
    });
    let above = authority.intermediate(Signer::Ask, |spec| {
        spec.subject.clone_from(&ask);
        spec.issuer.clone_from(&ark);
    });
    let chip = chip(Product::Milan);
    let mut spec = LeafSpec::vcek(Product::Milan, forge::tcb(Product::Milan), &chip);
    spec = spec.with_extension("2", ia5("Milan-B0"));
    spec.certificate.issuer = ask;
    spec.certificate.subject = amd_name("SEV-VCEK");
    let key = authority.leaf(&spec);
    let fields = fields(Product::Milan, ReportVersion::V3, VCEK);
    Evidence {
        report: key.sign_report(&fields).unwrap().to_vec(),
        leaf: key.certificate().to_vec(),
        certificates: vec![above, root],
        crl: None,
    }
}

/// RFC 4514: read from the end.
fn amd_name(common_name: &str) -> String {
    format!("CN={common_name},O=Advanced Micro Devices,ST=CA,L=Santa Clara,C=US,OU=Engineering")
}

#[test]
fn a_made_up_chain_with_amds_exact_names_and_extensions() {
    let genuine = hardware("milan-v2-b", "milan");
    assert!(genuine.verdict(&OwnerPolicy::default(), None).accepted());
    let forged = made_up(Authority::other());
    let name = |der: &[u8]| Certificate::from_der(der).unwrap().tbs_certificate.subject;
    let amd = Intermediate::amd(Product::Milan, VCEK).unwrap();
    assert_eq!(
        name(&forged.certificates[0]).to_der(),
        name(amd.as_der()).to_der()
    );
    let chains = [
        (forged.certificates.clone(), "INTERMEDIATE_SIGNATURE"),
        // The made-up root left out, as a verifier with a root of its own would not miss it.
        (
            vec![forged.certificates[0].clone()],
            "INTERMEDIATE_SIGNATURE",
        ),
        // Nothing: AMD's own intermediate, which did not sign the leaf.
        (Vec::new(), "LEAF_SIGNATURE"),
    ];
    for (certificates, code) in chains {
        let mut forged = forged.clone();
        forged.certificates = certificates;
        let verdict = forged.verdict(&OwnerPolicy::default(), None);
        assert_eq!(
            codes(&verdict),
            ["CHAIN_UNVERIFIED", "CHAIN_UNVERIFIED", code]
        );
        assert_eq!(verdict.overall, Outcome::Rejected);
        assert!(!verdict.emulated);
        let signature = check(&verdict, "report_signature");
        assert_eq!(signature.result, CheckResult::Accepted);
    }
}

/// Even an owner who was talked into naming it does not trust an emulated root that does not call
/// itself one.
#[test]
fn an_emulated_root_that_calls_itself_ark_milan() {
    milan(|_| {}).accepted("");
    let authority = Authority::shared();
    // Of another organization than AMD, so that only the common name is wrong.
    let (emulated, amds) = ("ARK-EMULATED", "ARK-Milan");
    let root = authority.intermediate(Signer::Ark, |spec| {
        spec.subject = spec.subject.replace(emulated, amds);
        spec.issuer.clone_from(&spec.subject);
    });
    let ask = authority.intermediate(Signer::Ask, |spec| {
        spec.issuer = spec.issuer.replace(emulated, amds);
    });
    let mut renamed = milan(|_| {});
    renamed.certificates = vec![ask, root];
    for forged in [made_up(authority), renamed] {
        let root = ring::digest::digest(&ring::digest::SHA256, &forged.certificates[1]);
        let named = format!(
            "allow_emulated = true\nemulated_roots = [\"sha256:{}\"]",
            hex::encode(root)
        );
        let named = OwnerPolicy::parse(named.as_bytes()).unwrap();
        let verdict = forged.verdict(&named, None);
        assert_eq!(verdict.overall, Outcome::Rejected);
        assert_eq!(
            check(&verdict, "certificate_chain").code.as_deref(),
            Some("ROOT_NOT_MARKED_EMULATED")
        );
    }
}

#[test]
fn the_ask_of_one_product_renamed_for_another() {
    let genuine = hardware("milan-v2-b", "milan");
    // AMD's own ASK for Genoa, every `Genoa` in it now `Milan`.
    let mut renamed = Intermediate::amd(Product::Genoa, VCEK)
        .unwrap()
        .as_der()
        .to_vec();
    while let Some(at) = renamed.windows(5).position(|text| text == b"Genoa") {
        renamed[at..at + 5].copy_from_slice(b"Milan");
    }
    let mut attack = genuine.clone();
    attack.certificates[0] = renamed;
    let verdict = attack.verdict(&OwnerPolicy::default(), None);
    assert_eq!(
        codes(&verdict),
        [
            "CHAIN_UNVERIFIED",
            "CHAIN_UNVERIFIED",
            "INTERMEDIATE_SIGNATURE"
        ]
    );
    // Another installation's ASK under this one's root: same names, another root's signature.
    let mut attack = milan(|_| {});
    attack.accepted("");
    attack.certificates = vec![
        Authority::shared().ark().to_vec(),
        Authority::other().ask().to_vec(),
    ];
    attack.refused(
        "",
        &[
            "CHAIN_UNVERIFIED",
            "CHAIN_UNVERIFIED",
            "INTERMEDIATE_SIGNATURE",
        ],
    );
}

/// The ASK's key was stolen, and makes an authority of its own, with the ASK's name.
#[test]
fn an_authority_below_the_ask() {
    let authority = Authority::shared();
    let genuine = milan(|_| {});
    genuine.accepted("");
    let public = Certificate::from_der(Authority::other().ask()).unwrap();
    let public = public.tbs_certificate.subject_public_key_info;
    let mut below = None;
    // The specification of a good ASK, issued by the ASK.
    authority.intermediate(Signer::Ask, |spec| below = Some(spec.clone()));
    let mut below = below.unwrap();
    below.issuer.clone_from(&below.subject);
    let below = authority.certificate(Signer::Ask, &below, &public.to_der().unwrap());
    let chip = chip(Product::Milan);
    let spec = LeafSpec::vcek(Product::Milan, forge::tcb(Product::Milan), &chip);
    let key = Authority::other().leaf(&spec);
    let mut attack = genuine;
    attack.report = key
        .sign_report(&fields(Product::Milan, ReportVersion::V5, VCEK))
        .unwrap()
        .to_vec();
    attack.leaf = key.certificate().to_vec();
    attack.certificates.push(below);
    // The ASK proper did not sign the leaf; what did counts for nothing.
    attack.refused(
        "",
        &["CHAIN_UNVERIFIED", "CHAIN_UNVERIFIED", "LEAF_SIGNATURE"],
    );
}

#[test]
fn another_chips_leaf_behind_a_report_that_hides_its_chip() {
    let mut attack = milan(|fields| fields.chip_id = [0; 64]);
    attack.accepted("");
    let other = milan_leaf(|leaf| leaf.with_extension("4", vec![0x55; 64]));
    attack.leaf = other.leaf;
    attack.refused("", &["REPORT_SIGNATURE_INVALID"]);
}

#[test]
fn a_vlek_issued_by_the_ask_and_a_vcek_issued_by_the_asvk() {
    milan_vlek(|leaf| leaf).accepted("");
    milan(|_| {}).accepted("");
    let expected = ["CHAIN_UNVERIFIED", "CHAIN_UNVERIFIED", "WRONG_INTERMEDIATE"];
    let mut by_ask = milan_vlek(|mut leaf| {
        leaf.signer = Signer::Ask;
        leaf.certificate.issuer = leaf
            .certificate
            .issuer
            .replace("SEV-VLEK-EMULATED", "SEV-EMULATED");
        leaf
    });
    by_ask.certificates = vec![
        Authority::shared().ark().to_vec(),
        Authority::shared().ask().to_vec(),
    ];
    by_ask.refused("", &expected);
    let mut by_asvk = milan_leaf(|mut leaf| {
        leaf.signer = Signer::Asvk;
        leaf.certificate.issuer = leaf
            .certificate
            .issuer
            .replace("SEV-EMULATED", "SEV-VLEK-EMULATED");
        leaf
    });
    by_asvk.certificates.remove(1);
    by_asvk.refused("", &expected);
}

/// A provider's key for all its chips passes for one chip's, or the other way round.
#[test]
fn a_leaf_that_is_a_vlek_and_a_vcek() {
    milan_vlek(|leaf| leaf).accepted("");
    let chip = chip(Product::Milan).to_vec();
    let both = milan_vlek(|leaf| leaf.with_extension("4", chip));
    unreadable(&both, "EXTENSION_UNEXPECTED");
    let called = milan_vlek(|mut leaf| {
        leaf.certificate.subject = leaf.certificate.subject.replace("SEV-VLEK", "SEV-VCEK");
        leaf
    });
    unreadable(&called, "LEAF_NAME");
}

#[test]
fn extensions_that_two_parsers_would_read_differently() {
    milan_leaf(|leaf| leaf.with_extension("3.8", integer(&[0, 219]))).accepted("");
    type Change = fn(LeafSpec) -> LeafSpec;
    let attacks: [(Change, &str); 9] = [
        (
            |leaf| leaf.with_extension("3.8", integer(&[1, 219])),
            "EXTENSION_RANGE",
        ),
        (
            |leaf| leaf.with_extension("3.8", integer(&[0, 0, 219])),
            "EXTENSION_ENCODING",
        ),
        // 219 without its leading zero is -37.
        (
            |leaf| leaf.with_extension("3.8", integer(&[219])),
            "EXTENSION_NEGATIVE",
        ),
        (
            |leaf| leaf.with_extension("3.3", vec![0x02, 1, 23, 0]),
            "EXTENSION_ENCODING",
        ),
        (|leaf| leaf.without_extension("3.3"), "EXTENSION_MISSING"),
        (
            |leaf| leaf.with_second_extension("4", vec![0x55; 64]),
            "EXTENSION_DUPLICATE",
        ),
        (
            |leaf| leaf.with_extension("4", vec![0x55; 63]),
            "EXTENSION_LENGTH",
        ),
        (
            |leaf| leaf.with_extension("4", vec![0x55; 65]),
            "EXTENSION_LENGTH",
        ),
        // Turin's length on Milan.
        (
            |leaf| leaf.with_extension("4", vec![0x55; 8]),
            "EXTENSION_LENGTH",
        ),
    ];
    for (change, code) in attacks {
        unreadable(&milan_leaf(change), code);
    }
}

#[test]
fn a_leaf_of_tomorrow() {
    milan_leaf(|leaf| leaf.valid(ago(1), ahead(DAY))).accepted("");
    let attack = milan_leaf(|leaf| leaf.valid(ahead(DAY), ahead(2 * DAY)));
    attack.refused("", &["LEAF_NOT_YET_VALID"]);
}

/// The second certificate of a PEM text, or what stands behind a DER one, would be another
/// parser's first.
#[test]
fn two_certificates_in_the_place_of_the_leaf() {
    let good = milan(|_| {});
    let mut one = good.clone();
    one.leaf = pem(&good.leaf);
    one.accepted("");
    let mut two = good.clone();
    two.leaf = [pem(&good.leaf), pem(&milan_vlek(|leaf| leaf).leaf)].concat();
    unreadable(&two, "CERTIFICATE_PEM");
    let mut behind = good.clone();
    behind.leaf.extend_from_slice(&good.leaf);
    unreadable(&behind, "CERTIFICATE_MALFORMED");
    // In the place of an intermediate as well.
    let mut above = good.clone();
    above.certificates = vec![[pem(&good.certificates[1]), pem(&good.certificates[0])].concat()];
    let verdict = above.verdict(&allowing(""), None);
    assert_eq!(
        codes(&verdict),
        ["CERTIFICATE_PEM", "CHAIN_UNVERIFIED", "CHAIN_UNVERIFIED"]
    );
}

#[test]
fn the_ask_in_the_place_of_the_leaf() {
    let mut attack = milan(|_| {});
    attack.accepted("");
    attack.leaf = Authority::shared().ask().to_vec();
    let verdict = attack.verdict(&allowing(""), None);
    assert_eq!(verdict.overall, Outcome::Rejected);
    let leaf = check(&verdict, "leaf_format");
    assert_eq!(leaf.result, CheckResult::Rejected);
}

/// An emulated root signs a leaf that says it is AMD's, and AMD's organization.
#[test]
fn an_emulated_leaf_that_leaves_its_mark_out() {
    milan(|_| {}).accepted("");
    let expected = ["CHAIN_UNVERIFIED", "CHAIN_UNVERIFIED", "EMULATION_MISMATCH"];
    milan_leaf(|leaf| leaf.with_extension("2", ia5("Milan-B0"))).refused("", &expected);
    let organization = milan_leaf(|mut leaf| {
        leaf.certificate.subject = amd_name("SEV-VCEK");
        leaf
    });
    organization.refused("", &expected);
}

#[track_caller]
fn unreadable(attack: &Evidence, code: &str) {
    let verdict = attack.verdict(&allowing(""), None);
    assert_eq!(verdict.overall, Outcome::Rejected);
    assert_eq!(check(&verdict, "leaf_format").code.as_deref(), Some(code));
    assert!(codes(&verdict).contains(&"LEAF_UNREADABLE".to_owned()));
    let signature = check(&verdict, "report_signature");
    assert_eq!(signature.result, CheckResult::CannotVerify);
}

fn pem(der: &[u8]) -> Vec<u8> {
    let base64 = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, der);
    let lines: Vec<_> = base64
        .as_bytes()
        .chunks(64)
        .map(|line| std::str::from_utf8(line).unwrap())
        .collect();
    format!(
        "-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n",
        lines.join("\n")
    )
    .into_bytes()
}
