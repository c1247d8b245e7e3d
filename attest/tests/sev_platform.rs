//! Ownership of an emulated SEV platform: state by state, error by error, and its signatures
//! against openssl.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod common;

use casemate_attest::legacy::certificate::{CERTIFICATE_LEN, SevCertificate, Usage};
use casemate_attest::legacy::{PolicyFlag, SevReport};
use casemate_attest::processor::{
    FirmwareError, Identity, OwnerAuthority, PlatformState, ProcessorConfig, SecureProcessor,
};
use common::{SITE_A, SITE_B, owner, policy, processor, running, verified};
use std::process::Command;

/// The owner's whole way: request, signature, import.
fn take(platform: &mut SecureProcessor, owner: &OwnerAuthority) {
    let request = platform.pek_csr().unwrap();
    let signed = owner.sign_pek(&request).unwrap();
    let oca = owner.certificate().as_bytes();
    platform.pek_cert_import(signed.as_bytes(), oca).unwrap();
}

#[test]
fn an_owner_takes_a_platform_and_the_chain_says_so() {
    let mut platform = processor(&SITE_A, &[]);
    let before = verified(&platform).certificates().clone();
    assert!(!platform.status().owned);
    let authority = OwnerAuthority::generate().unwrap();
    take(&mut platform, &authority);
    assert!(platform.status().owned);
    let after = verified(&platform);
    assert_eq!(after.oca(), authority.certificate());
    // The key stays, its certificate and the PDH are new; chip and root are what they were.
    assert_eq!(after.pek().public_key(), before.pek.public_key());
    assert_ne!(after.pek(), &before.pek);
    assert_ne!(after.pdh().public_key(), before.pdh.public_key());
    assert_eq!(after.cek(), &before.cek);
    assert_eq!(after.certificates().ark, before.ark);

    // It survives a restart, and a guest launched for the new chain is reported under it.
    let kept = platform.identity_bytes();
    let mut again = processor(&kept, &[]);
    assert!(again.status().owned);
    assert_eq!(verified(&again), after);
    let guest = running(&mut again, policy(&[]));
    let report = again.attestation_report(guest, &[1; 16]).unwrap();
    let report = SevReport::parse(report.as_bytes()).unwrap();
    report.verify_signed_by(after.pek()).unwrap();
}

#[test]
fn a_request_is_the_pek_without_a_signature() {
    let platform = processor(&SITE_A, &[]);
    let request = platform.pek_csr().unwrap();
    let pek = platform.pdh_cert_export().unwrap().pek.clone();
    assert_eq!(request.as_bytes()[..1044], pek.as_bytes()[..1044]);
    // `sev-tool`'s `validate_pek_csr`: both usages 0x1000, both algorithms 0.
    for at in [1044, 1564] {
        let label = &request.as_bytes()[at..at + 8];
        assert_eq!(label, [0x00, 0x10, 0, 0, 0, 0, 0, 0]);
        assert!(request.as_bytes()[at + 8..at + 520].iter().all(|b| *b == 0));
    }
}

#[test]
fn each_wrong_import_has_its_own_code_and_changes_nothing() {
    let mut platform = processor(&SITE_A, &[]);
    let kept = platform.identity_bytes();
    let (ours, other) = (
        OwnerAuthority::generate().unwrap(),
        OwnerAuthority::generate().unwrap(),
    );
    let request = platform.pek_csr().unwrap();
    let pek = ours.sign_pek(&request).unwrap().as_bytes().to_vec();
    let oca = ours.certificate().as_bytes().to_vec();
    let foreign = processor(&SITE_B, &[]).pek_csr().unwrap();
    let foreign = ours.sign_pek(&foreign).unwrap().as_bytes().to_vec();
    let flipped = |raw: &[u8], at: usize| {
        let mut raw = raw.to_vec();
        raw[at] ^= 1;
        raw
    };
    let needed = CERTIFICATE_LEN as u32;
    let cases = [
        (
            "a short PEK",
            pek[..2083].to_vec(),
            oca.clone(),
            FirmwareError::InvalidLength { needed },
        ),
        (
            "a long OCA",
            pek.clone(),
            [oca.as_slice(), &[0]].concat(),
            FirmwareError::InvalidLength { needed },
        ),
        (
            "places swapped",
            oca.clone(),
            pek.clone(),
            FirmwareError::InvalidCertificate,
        ),
        (
            "another platform's PEK",
            foreign,
            oca.clone(),
            FirmwareError::InvalidCertificate,
        ),
        (
            "another API in the PEK",
            flipped(&pek, 5),
            oca.clone(),
            FirmwareError::InvalidCertificate,
        ),
        (
            "an unknown version",
            flipped(&pek, 0),
            oca.clone(),
            FirmwareError::InvalidCertificate,
        ),
        (
            "another owner's OCA",
            pek.clone(),
            other.certificate().as_bytes().to_vec(),
            FirmwareError::BadSignature,
        ),
        (
            "an unsigned PEK",
            request.as_bytes().to_vec(),
            oca.clone(),
            FirmwareError::BadSignature,
        ),
        (
            "a damaged signature",
            flipped(&pek, 1060),
            oca.clone(),
            FirmwareError::BadSignature,
        ),
        (
            "an OCA that does not sign itself",
            pek.clone(),
            flipped(&oca, 1060),
            FirmwareError::BadSignature,
        ),
    ];
    for (name, pek, oca, code) in cases {
        assert_eq!(platform.pek_cert_import(&pek, &oca), Err(code), "{name}");
        assert_eq!(platform.identity_bytes(), kept, "{name}");
    }
    platform.pek_cert_import(&pek, &oca).unwrap();
    // What an owner has, another has to be given.
    let kept = platform.identity_bytes();
    let again = platform.pek_cert_import(&pek, &oca);
    assert_eq!(again, Err(FirmwareError::AlreadyOwned));
    assert_eq!(platform.identity_bytes(), kept);
}

#[test]
fn the_domain_bit_keeps_a_guest_with_one_owner() {
    let authority = OwnerAuthority::generate().unwrap();
    let mut from = processor(&SITE_A, &[SITE_B.as_slice()]);
    let mut to = processor(&SITE_B, &[SITE_A.as_slice()]);
    let chain = |platform: &SecureProcessor| platform.pdh_cert_export().unwrap().clone();
    take(&mut from, &authority);
    let handle = running(&mut from, policy(&[PolicyFlag::Domain]));

    // A platform that owns itself, then one of another owner, then one of the same.
    let refused = Err(FirmwareError::PolicyFailure);
    assert_eq!(from.send_start(handle, &chain(&to)), refused);
    take(&mut to, &OwnerAuthority::generate().unwrap());
    assert_eq!(from.send_start(handle, &chain(&to)), refused);
    to.pek_gen().unwrap();
    take(&mut to, &authority);
    let sent = from.send_start(handle, &chain(&to)).unwrap();
    let sender = chain(&from).pdh;
    let received = to.receive_start(sent.policy, &sender, &sent.session);
    assert!(received.is_ok());

    // The chain from before the domain is no way round: its PEK has another owner.
    from.guest(handle).unwrap().send_cancel().unwrap();
    let before = chain(&processor(&SITE_B, &[]));
    assert_eq!(from.send_start(handle, &before), refused);
}

#[test]
fn a_new_pek_and_a_factory_reset_end_an_owners_hold() {
    type End = fn(&mut SecureProcessor);
    let ends: [(&str, End); 2] = [
        ("PEK_GEN", |platform| platform.pek_gen().unwrap()),
        ("FACTORY_RESET", |platform| {
            assert_eq!(
                platform.factory_reset(),
                Err(FirmwareError::InvalidPlatformState)
            );
            platform.shutdown();
            platform.factory_reset().unwrap();
            assert_eq!(platform.status().state, PlatformState::Uninit);
            platform.init().unwrap();
        }),
    ];
    for (name, end) in ends {
        let mut platform = processor(&SITE_A, &[]);
        take(&mut platform, &OwnerAuthority::generate().unwrap());
        let (owned, id) = (verified(&platform), platform.get_id());
        end(&mut platform);
        assert!(!platform.status().owned, "{name}");
        let now = verified(&platform);
        for (old, new) in [
            (owned.oca(), now.oca()),
            (owned.pek(), now.pek()),
            (owned.pdh(), now.pdh()),
        ] {
            assert_ne!(old.public_key(), new.public_key(), "{name}");
        }
        assert_eq!(owned.cek(), now.cek(), "{name}");
        assert_eq!(platform.get_id(), id, "{name}");
        assert!(!processor(&platform.identity_bytes(), &[]).status().owned);
    }
}

#[test]
fn a_session_for_an_older_pdh_is_no_session() {
    let mut platform = processor(&SITE_A, &[]);
    let policy = policy(&[]);
    let (public, _) = owner(&platform, policy);
    let before = verified(&platform);
    platform.pdh_gen().unwrap();
    let after = verified(&platform);
    assert_eq!(before.pek(), after.pek());
    assert_ne!(before.pdh(), after.pdh());
    let session = Some((&public.dh_cert, &public.session));
    let refused = platform.launch_start(policy, session);
    assert_eq!(refused, Err(FirmwareError::BadMeasurement));
}

#[test]
fn with_guests_only_the_pdh_may_change() {
    let mut platform = processor(&SITE_A, &[]);
    let authority = OwnerAuthority::generate().unwrap();
    let request = platform.pek_csr().unwrap();
    let pek = authority.sign_pek(&request).unwrap();
    let handle = running(&mut platform, policy(&[]));
    assert_eq!(platform.status().state, PlatformState::Working);
    let refused = FirmwareError::InvalidPlatformState;
    let kept = platform.identity_bytes();
    let oca = authority.certificate().as_bytes();
    assert_eq!(platform.pek_cert_import(pek.as_bytes(), oca), Err(refused));
    assert_eq!(platform.pek_gen(), Err(refused));
    assert_eq!(platform.pek_csr(), Err(refused));
    assert_eq!(platform.factory_reset(), Err(refused));
    assert_eq!(platform.identity_bytes(), kept);
    platform.pdh_gen().unwrap();
    assert_ne!(platform.identity_bytes(), kept);
    // The guest does not notice.
    platform.attestation_report(handle, &[0; 16]).unwrap();
    platform.decommission(handle).unwrap();
    platform.pek_gen().unwrap();
}

#[test]
fn before_init_there_is_little_to_ask() {
    let identity = Identity::from_bytes(&SITE_A).unwrap();
    let mut platform = SecureProcessor::new(identity, ProcessorConfig::default());
    let refused = FirmwareError::InvalidPlatformState;
    assert_eq!(platform.pek_csr(), Err(refused));
    assert_eq!(platform.pek_gen(), Err(refused));
    assert_eq!(platform.pdh_gen(), Err(refused));
    assert_eq!(platform.pek_cert_import(&[], &[]), Err(refused));
    assert_eq!(platform.pdh_cert_export().err(), Some(refused));
    assert_ne!(platform.get_id(), [0; 64]);
    assert_ne!(platform.get_id(), processor(&SITE_B, &[]).get_id());
    let es = platform.with_sev_es();
    assert!(!es.status().config_es);
    let mut es = es;
    es.init().unwrap();
    assert!(es.status().config_es);
}

#[test]
fn an_identity_that_could_not_be_kept_is_gone_back_from() {
    let mut platform = processor(&SITE_A, &[]);
    let before = verified(&platform);
    platform.pek_gen().unwrap();
    let kept = Identity::from_bytes(&SITE_A).unwrap();
    platform.restore_identity(kept).unwrap();
    assert_eq!(verified(&platform), before);
    let other = Identity::from_bytes(&SITE_B).unwrap();
    assert!(platform.restore_identity(other).is_err());
    assert_eq!(verified(&platform), before);
}

#[test]
fn an_owner_signs_requests_and_nothing_else() {
    let authority = OwnerAuthority::generate().unwrap();
    let chain = processor(&SITE_A, &[]).pdh_cert_export().unwrap().clone();
    for other in [&chain.pdh, &chain.oca, &chain.cek] {
        assert!(authority.sign_pek(other).is_err(), "{:?}", other.usage());
    }
    // Something in the fill of the key field.
    let mut raw = processor(&SITE_A, &[])
        .pek_csr()
        .unwrap()
        .as_bytes()
        .to_vec();
    raw[300] = 1;
    let odd = SevCertificate::parse(&raw).unwrap();
    assert_eq!(odd.usage(), Usage::Pek);
    assert!(authority.sign_pek(&odd).is_err());
}

/// OpenSSL finds what firmware would find: ECDSA over P-384 with SHA-256 on the first 1044 bytes.
#[test]
fn openssl_verifies_the_owners_and_the_chips_signature() {
    let mut platform = processor(&SITE_A, &[]);
    let authority = OwnerAuthority::generate().unwrap();
    take(&mut platform, &authority);
    let chain = platform.pdh_cert_export().unwrap();
    let by = |signer: &SevCertificate, subject: &SevCertificate| {
        let signature = subject.signature_by(signer.usage()).unwrap();
        openssl_verifies(signer, &subject.as_bytes()[..1044], signature.bytes)
    };
    assert!(by(authority.certificate(), &chain.pek));
    assert!(by(&chain.oca, &chain.oca));
    assert!(by(&chain.cek, &chain.pek));
    assert!(by(&chain.pek, &chain.pdh));
    // It can also say no.
    let signature = chain.pek.signature_by(Usage::Oca).unwrap();
    let mut changed = chain.pek.as_bytes()[..1044].to_vec();
    changed[40] ^= 1;
    assert!(!openssl_verifies(&chain.oca, &changed, signature.bytes));
}

fn openssl_verifies(signer: &SevCertificate, message: &[u8], signature: &[u8]) -> bool {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let big_endian = |field: &[u8]| field[..48].iter().rev().copied().collect::<Vec<u8>>();
    // SubjectPublicKeyInfo of an uncompressed P-384 point.
    let mut key = hex::decode("3076301006072a8648ce3d020106052b8104002203620004").unwrap();
    key.extend(big_endian(&signer.as_bytes()[20..]));
    key.extend(big_endian(&signer.as_bytes()[92..]));
    let integer = |bytes: Vec<u8>| {
        let skip = bytes.iter().take_while(|byte| **byte == 0).count();
        let mut value = bytes[skip..].to_vec();
        if value[0] & 0x80 != 0 {
            value.insert(0, 0);
        }
        [vec![2, value.len() as u8], value].concat()
    };
    let scalars = [&signature[..72], &signature[72..144]].map(|s| integer(big_endian(s)));
    let body = scalars.concat();
    let der = [vec![0x30, body.len() as u8], body].concat();
    std::fs::write(path("key"), key).unwrap();
    std::fs::write(path("message"), message).unwrap();
    std::fs::write(path("signature"), der).unwrap();
    let output = Command::new("openssl")
        .args(["dgst", "-sha256", "-keyform", "DER", "-verify"])
        .arg(path("key"))
        .arg("-signature")
        .arg(path("signature"))
        .arg(path("message"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let known = said.contains("Verified OK") || said.contains("erification failure");
    assert!(known, "{said}{}", String::from_utf8_lossy(&output.stderr));
    output.status.success()
}
