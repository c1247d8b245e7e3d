//! The emulated platform's certificates, lists and reports before the library's own judge of
//! chains.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use casemate_attest::chain::{
    self, ChainError, Crl, CrlMode, Intermediate, Leaf, Revocation, SnpTrust, VerifiedLeaf,
};
use casemate_attest::processor::snp::EndorsementKey;
use casemate_attest::processor::snp::forge::{self, Authority, LeafSpec, PssForm, Signer};
use casemate_attest::product::Product;
use casemate_attest::report::{Report, ReportVersion, SigningKey};
use std::time::SystemTime;

fn trust(authority: &Authority) -> SnpTrust {
    let named = [authority.identity().root_fingerprint()];
    SnpTrust::amd()
        .with_emulated_root(authority.ark(), &named)
        .unwrap()
}

fn judge(
    authority: &Authority,
    trust: &SnpTrust,
    leaf: &EndorsementKey,
    crl: &[u8],
) -> Result<VerifiedLeaf, ChainError> {
    let intermediate = match leaf.kind() {
        SigningKey::Vcek => authority.ask(),
        SigningKey::Vlek => authority.asvk(),
    };
    let now = SystemTime::now();
    let issuer = trust.trust_intermediate(&Intermediate::parse(intermediate)?, now)?;
    let crl = Crl::parse(crl).unwrap();
    let revocation = Revocation {
        mode: CrlMode::Required,
        crl: Some(&crl),
        max_age: None,
    };
    let leaf = Leaf::parse(leaf.certificate()).unwrap();
    chain::verify(&leaf, &issuer, &revocation, now)
}

#[test]
fn every_leaf_and_its_reports_are_good_under_the_named_root() {
    let authority = Authority::shared();
    let identity = authority.identity();
    let trust = trust(authority);
    for product in Product::ALL {
        let tcb = forge::tcb(product);
        let hwid = &identity.chip_id(product).unwrap()[..product.hwid_len()];
        let mut old_form = LeafSpec::vcek(product, tcb, hwid);
        old_form.certificate.pss = PssForm::ExplicitTrailer;
        for key in [
            identity.vcek(product, tcb).unwrap(),
            identity.vlek(product, tcb, "CN=cloud.example").unwrap(),
            authority.leaf(&old_form),
        ] {
            let crl = &identity.certificates().crl;
            let leaf = judge(authority, &trust, &key, crl).unwrap();
            assert!(leaf.emulated());
            assert_eq!((leaf.product(), leaf.kind()), (product, key.kind()));
            assert_eq!(leaf.tcb(), tcb);
            let vcek = key.kind() == SigningKey::Vcek;
            assert_eq!(leaf.hwid(), vcek.then_some(hwid));
            assert_eq!(leaf.csp_id(), (!vcek).then_some("CN=cloud.example"));
            let version = ReportVersion::V5;
            let fields = forge::report_fields(identity, product, version, key.kind(), tcb);
            let report = Report::parse(&key.sign_report(&fields).unwrap()).unwrap();
            let signature = report.signature().unwrap();
            assert!(leaf.verify_signature(report.signed_bytes(), &signature));
        }
    }
}

#[test]
fn a_root_that_nobody_named_and_a_revoked_issuer_count_for_nothing() {
    let authority = Authority::shared();
    let vcek = authority
        .identity()
        .vcek(Product::Genoa, forge::tcb(Product::Genoa))
        .unwrap();
    let crl = &authority.identity().certificates().crl;
    assert!(judge(authority, &SnpTrust::amd(), &vcek, crl).is_err());
    assert!(judge(authority, &trust(Authority::other()), &vcek, crl).is_err());
    let trust = trust(authority);
    for (signer, good) in [(Signer::Ask, false), (Signer::Asvk, true)] {
        let crl = authority.crl(|crl| crl.revoked = vec![signer.serial()]);
        assert_eq!(judge(authority, &trust, &vcek, &crl).is_ok(), good);
    }
}
