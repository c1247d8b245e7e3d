//! The emulated SNP root's certificates and reports, checked by other people's code.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

use casemate_attest::processor::snp::forge::{self, Authority, LeafSpec, PssForm, Signer};
use casemate_attest::processor::snp::{CaKeySize, EndorsementKey, SnpIdentity};
use casemate_attest::product::Product;
use casemate_attest::report::{Report, ReportVersion, SigningKey};
use sev::certs::snp::{Certificate, Chain, Verifiable, ca};
use sev::firmware::guest::AttestationReport;
use sev::parser::ByteParser;
use std::fs;
use std::path::Path;
use std::process::Command;

const VERSIONS: [ReportVersion; 4] = [
    ReportVersion::V2,
    ReportVersion::V3,
    ReportVersion::V4,
    ReportVersion::V5,
];

fn leaf(identity: &SnpIdentity, product: Product, kind: SigningKey) -> EndorsementKey {
    let tcb = forge::tcb(product);
    match kind {
        SigningKey::Vcek => identity.vcek(product, tcb).unwrap(),
        SigningKey::Vlek => identity.vlek(product, tcb, "CN=cloud.example").unwrap(),
    }
}

fn chain(authority: &Authority, leaf: &EndorsementKey) -> Chain {
    let intermediate = match leaf.kind() {
        SigningKey::Vcek => authority.ask(),
        SigningKey::Vlek => authority.asvk(),
    };
    Chain {
        ca: ca::Chain {
            ark: Certificate::from_der(authority.ark()).unwrap(),
            ask: Certificate::from_der(intermediate).unwrap(),
        },
        vek: Certificate::from_der(leaf.certificate()).unwrap(),
    }
}

#[test]
fn the_sev_crate_accepts_reports_of_every_version_product_and_key() {
    let authority = Authority::shared();
    let identity = authority.identity();
    for product in Product::ALL {
        for kind in [SigningKey::Vcek, SigningKey::Vlek] {
            let leaf = leaf(identity, product, kind);
            let chain = chain(authority, &leaf);
            for version in VERSIONS {
                let tcb = forge::tcb(product);
                let fields = forge::report_fields(identity, product, version, kind, tcb);
                let mut raw = leaf.sign_report(&fields).unwrap();
                let ours = Report::parse(&raw).unwrap();
                assert_eq!(ours.version(), version);
                // The crate does not read a V2 report without a chip id.
                if version == ReportVersion::V2 && kind == SigningKey::Vlek {
                    continue;
                }
                let report = AttestationReport::from_bytes(&raw).unwrap();
                (&chain, &report).verify().unwrap();
                raw[0x90] ^= 1;
                let report = AttestationReport::from_bytes(&raw).unwrap();
                assert!((&chain, &report).verify().is_err());
            }
        }
    }
}

#[test]
fn a_vlek_is_not_the_asks_and_another_root_is_another_root() {
    let authority = Authority::shared();
    let vlek = leaf(authority.identity(), Product::Genoa, SigningKey::Vlek);
    let mut wrong = chain(authority, &vlek);
    wrong.verify().unwrap();
    wrong.ca.ask = Certificate::from_der(authority.ask()).unwrap();
    assert!(wrong.verify().is_err());
    let mut stranger = chain(authority, &vlek);
    stranger.ca.ark = Certificate::from_der(Authority::other().ark()).unwrap();
    assert!(stranger.verify().is_err());
}

#[test]
fn a_tcb_version_has_one_key_and_another_has_another() {
    let identity = Authority::shared().identity();
    let key = |product, microcode| {
        let mut tcb = forge::tcb(product);
        tcb.microcode = microcode;
        let vcek = identity.vcek(product, tcb).unwrap();
        let certificate = Certificate::from_der(vcek.certificate()).unwrap();
        certificate.public_key_sec1().to_vec()
    };
    assert_eq!(key(Product::Milan, 9), key(Product::Milan, 9));
    assert_ne!(key(Product::Milan, 9), key(Product::Milan, 10));
    assert_ne!(key(Product::Milan, 9), key(Product::Genoa, 9));
}

#[test]
fn a_kept_identity_derives_the_same_keys() {
    let identity = Authority::shared().identity();
    let kept = identity.to_bytes().unwrap();
    let back = SnpIdentity::from_bytes(&kept).unwrap();
    assert_eq!(back.certificates(), identity.certificates());
    assert_eq!(back.to_bytes().unwrap(), kept);
    let public = |identity: &SnpIdentity| {
        let vcek = leaf(identity, Product::Turin, SigningKey::Vcek);
        let certificate = Certificate::from_der(vcek.certificate()).unwrap();
        certificate.public_key_sec1().to_vec()
    };
    assert_eq!(public(&back), public(identity));

    let other = Authority::other().identity().to_bytes().unwrap();
    // Where the first certificate begins; the private keys stand behind the four of them.
    let certificates = identity.certificates();
    let len: usize = [
        &certificates.ark,
        &certificates.ask,
        &certificates.asvk,
        &certificates.crl,
    ]
    .map(|part| part.len() + 4)
    .iter()
    .sum();
    let mixed = [
        &kept[..56 + len],
        &other[other.len() - (kept.len() - 56 - len)..],
    ]
    .concat();
    if mixed.len() == kept.len() {
        assert!(SnpIdentity::from_bytes(&mixed).is_err());
    }
    for cut in [0, 7, 8, 55, 58, 100, kept.len() - 1] {
        assert!(SnpIdentity::from_bytes(&kept[..cut]).is_err(), "{cut}");
    }
    assert!(SnpIdentity::from_bytes(&[kept.as_slice(), &[0]].concat()).is_err());
}

#[test]
fn the_certificates_say_what_they_are_in_amds_shape() {
    let authority = Authority::shared();
    for der in [authority.ark(), authority.ask(), authority.asvk()] {
        assert!(der.windows(12).any(|w| w == b"ARK-EMULATED"));
        assert!(der.windows(7).any(|w| w == b"NOT AMD"));
        assert_eq!(count(der, &EXPLICIT), 2);
    }
    let spec = LeafSpec::vcek(Product::Milan, forge::tcb(Product::Milan), &[7; 64]);
    let short = authority.leaf(&spec);
    assert_eq!(
        (
            count(short.certificate(), &EXPLICIT),
            count(short.certificate(), &SHORT)
        ),
        (0, 2)
    );
    let mut spec = spec;
    spec.certificate.pss = PssForm::ExplicitTrailer;
    assert_eq!(count(authority.leaf(&spec).certificate(), &EXPLICIT), 2);
    // Microcode 219 takes two bytes, and the product says what it is.
    let der = short.certificate();
    assert!(der.windows(5).any(|w| w == [0x04, 0x04, 0x02, 0x02, 0x00]));
    assert!(der.windows(14).any(|w| w == b"Milan-EMULATED"));
}

#[test]
fn openssl_accepts_chains_lists_and_reports() {
    let Ok(version) = Command::new("openssl").arg("version").output() else {
        println!("skipped: there is no openssl program on this machine");
        return;
    };
    println!("{}", String::from_utf8_lossy(&version.stdout).trim());
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let authority = Authority::shared();
    let identity = authority.identity();
    let vcek = leaf(identity, Product::Genoa, SigningKey::Vcek);
    let vlek = leaf(identity, Product::Turin, SigningKey::Vlek);
    let crl = &identity.certificates().crl;
    let revoking = authority.crl(|crl| crl.revoked = vec![Signer::Ask.serial()]);
    for (name, kind, der) in [
        ("ark", "x509", authority.ark()),
        ("ask", "x509", authority.ask()),
        ("asvk", "x509", authority.asvk()),
        ("vcek", "x509", vcek.certificate()),
        ("vlek", "x509", vlek.certificate()),
        ("crl", "crl", crl),
        ("revoking", "crl", &revoking),
    ] {
        fs::write(at(name), der).unwrap();
        let (from, to) = (at(name), at(&format!("{name}.pem")));
        run(
            Command::new("openssl")
                .arg(kind)
                .args(["-inform", "DER", "-in"])
                .arg(from)
                .arg("-out")
                .arg(to),
            true,
        );
    }
    let plain = |intermediate: &str, leaf: &str, good: bool| {
        let mut command = Command::new("openssl");
        command.args(["verify", "-CAfile"]).arg(at("ark.pem"));
        run(
            command
                .arg("-untrusted")
                .arg(at(intermediate))
                .arg(at(leaf)),
            good,
        );
    };
    plain("ask.pem", "vcek.pem", true);
    plain("asvk.pem", "vlek.pem", true);
    plain("ask.pem", "vlek.pem", false);
    let checked = |list: &str, good: bool| {
        let mut command = Command::new("openssl");
        command
            .args(["verify", "-crl_check", "-CAfile"])
            .arg(at("ark.pem"));
        run(
            command.arg("-CRLfile").arg(at(list)).arg(at("ask.pem")),
            good,
        );
    };
    checked("crl.pem", true);
    checked("revoking.pem", false);
    report_by_openssl(dir.path(), identity, &vcek);
}

/// `openssl dgst` over the signed bytes, with the leaf's key.
fn report_by_openssl(dir: &Path, identity: &SnpIdentity, vcek: &EndorsementKey) {
    let product = Product::Genoa;
    let fields = forge::report_fields(
        identity,
        product,
        ReportVersion::V5,
        SigningKey::Vcek,
        forge::tcb(product),
    );
    let report = Report::parse(&vcek.sign_report(&fields).unwrap()).unwrap();
    let signature = report.signature().unwrap();
    let mut der = Vec::new();
    for half in signature.chunks(48) {
        let mut number = vec![0];
        number.extend(half.iter().skip_while(|byte| **byte == 0));
        if number[1] < 0x80 {
            number.remove(0);
        }
        der.extend([2, u8::try_from(number.len()).unwrap()]);
        der.extend(number);
    }
    let der = [&[0x30, u8::try_from(der.len()).unwrap()], der.as_slice()].concat();
    fs::write(dir.join("signature"), der).unwrap();
    run(
        Command::new("openssl")
            .args(["x509", "-pubkey", "-noout", "-in"])
            .arg(dir.join("vcek.pem"))
            .arg("-out")
            .arg(dir.join("key.pem")),
        true,
    );
    for good in [true, false] {
        let mut signed = report.signed_bytes().to_vec();
        signed[0x50] ^= u8::from(!good);
        fs::write(dir.join("signed"), signed).unwrap();
        let mut command = Command::new("openssl");
        command
            .args(["dgst", "-sha384", "-verify"])
            .arg(dir.join("key.pem"));
        command.arg("-signature").arg(dir.join("signature"));
        run(command.arg(dir.join("signed")), good);
    }
}

#[test]
fn an_installation_has_keys_of_amds_size() {
    let identity = SnpIdentity::generate_with(CaKeySize::Rsa4096).unwrap();
    assert!(identity.certificates().ask.len() > 1200);
}

fn run(command: &mut Command, good: bool) {
    let output = command.output().unwrap();
    assert_eq!(
        output.status.success(),
        good,
        "{command:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

fn count(der: &[u8], pattern: &[u8]) -> usize {
    der.windows(pattern.len()).filter(|w| *w == pattern).count()
}

/// How AMD's two algorithm identifiers begin and end.
const EXPLICIT: [u8; 15] = [
    0x30, 0x46, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x0a, 0x30, 0x39,
];
const SHORT: [u8; 15] = [
    0x30, 0x41, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x0a, 0x30, 0x34,
];
