use super::*;
use crate::measure::guest::Technology;
use crate::measure::id_block::IdKeyDigest;
use crate::measure::snp::SnpLaunchDigest;
use crate::measure::vcpu::{CpuSignature, VcpuCount};
use crate::measure::vmsa::{Profile, SevFeatures};
use proptest::prelude::*;
use std::time::Duration;

fn at(text: &str) -> Timestamp {
    Timestamp::try_from(text.to_owned()).unwrap()
}

fn digest(byte: u8) -> GuestDigest {
    GuestDigest::Snp(SnpLaunchDigest::new([byte; 48]))
}

fn guest(name: &str) -> ReferenceGuest {
    let file = FileReference {
        sha256: Hash256([1; 32]),
        size: 4096,
    };
    ReferenceGuest {
        name: name.to_owned(),
        technology: Technology::Snp,
        id_key_digest: Some(IdKeyDigest::new([2; 48])),
        author_key_digest: None,
        inputs: Inputs {
            vmsa_profile: Profile::Qemu,
            guest_features: Some(SevFeatures::SNP_ACTIVE),
            cmdline_sha256: Some(Hash256([3; 32])),
            firmware: file,
            kernel: Some(file),
            initrd: None,
        },
        launch: [1, 2]
            .map(|count| Launch {
                digest: digest(count),
                vcpus: VcpuCount::try_from(u16::from(count)).ok(),
                vcpu_type: Some("EPYC-Milan".to_owned()),
                vcpu_signature: Some(CpuSignature(0xa0_0f11)),
            })
            .to_vec(),
    }
}

fn document() -> ReferenceDocument {
    let (from, to) = (at("2026-01-01T00:00:00Z"), at("2027-01-01T00:00:00Z"));
    ReferenceDocument::new(from, to, vec![guest("web"), guest("db")]).unwrap()
}

fn key() -> SigningKey {
    SigningKey::read(&SigningKey::generate().unwrap()).unwrap()
}

fn signed(bytes: &[u8], keys: &[&SigningKey]) -> Signatures {
    let mut signatures = Signatures::default();
    for key in keys {
        signatures.add(key.sign(bytes)).unwrap();
    }
    signatures
}

fn mid_2026() -> SystemTime {
    at("2026-06-01T00:00:00Z").time()
}

#[test]
fn what_enough_owners_signed_is_believed_and_found() {
    let (a, b) = (key(), key());
    let text = document().to_toml().unwrap();
    let signatures = signed(text.as_bytes(), &[&a, &b]);
    let file = signatures.to_toml().unwrap();
    assert_eq!(Signatures::parse(file.as_bytes()), Ok(signatures.clone()));
    let trusted = [a.public(), b.public()];
    let values =
        ReferenceValues::open(text.as_bytes(), &signatures, &trusted, 2, mid_2026()).unwrap();
    assert_eq!(*values.document(), document());
    assert_eq!(values.signers(), trusted);
    assert!(values.guest("web").is_some() && values.guest("x").is_none());
    let found: Vec<_> = values
        .find(digest(2))
        .map(|(guest, launch)| (guest.name.as_str(), launch.vcpus.unwrap().get()))
        .collect();
    assert_eq!(found, [("web", 2), ("db", 2)]);
    assert_eq!(values.find(digest(9)).count(), 0);
}

#[test]
fn each_byte_counts() {
    let a = key();
    let text = document().to_toml().unwrap().into_bytes();
    let signatures = signed(&text, &[&a]);
    let mut changed = text.clone();
    // A comment changes nothing but the bytes.
    changed.extend(b"# \n");
    for bytes in [&changed[..], &text[..text.len() - 1], b""] {
        let refused = ReferenceValues::open(bytes, &signatures, &[a.public()], 1, mid_2026());
        assert!(matches!(refused, Err(ReferenceError::BadSignature(k)) if k == a.public()));
    }
}

#[test]
fn signatures_are_for_this_kind_of_document_only() {
    use ring::signature::Ed25519KeyPair;
    let der = SigningKey::generate().unwrap();
    let a = SigningKey::read(&der).unwrap();
    let text = document().to_toml().unwrap().into_bytes();
    let raw = Ed25519KeyPair::from_pkcs8(&der).unwrap().sign(&text);
    let file = format!(
        "version = 1\n[[signature]]\nkey = \"{}\"\nsignature = \"{}\"\n",
        a.public(),
        hex::encode(raw.as_ref())
    );
    let signatures = Signatures::parse(file.as_bytes()).unwrap();
    let refused = ReferenceValues::open(&text, &signatures, &[a.public()], 1, mid_2026());
    assert!(matches!(refused, Err(ReferenceError::BadSignature(_))));
}

#[test]
fn strangers_and_repetitions_do_not_count() {
    let (a, b, stranger) = (key(), key(), key());
    let text = document().to_toml().unwrap().into_bytes();
    let open = |signatures: &Signatures, trusted: &[SignerKey], threshold| {
        ReferenceValues::open(&text, signatures, trusted, threshold, mid_2026())
    };
    let too_few = |result: Result<_, ReferenceError>, wanted| matches!(result, Err(ReferenceError::TooFewSigners { found, .. }) if found == wanted);
    let both = [a.public(), b.public()];
    assert!(too_few(open(&signed(&text, &[&a, &stranger]), &both, 2), 1));
    assert!(too_few(open(&signed(&text, &[&stranger]), &both, 1), 0));
    assert!(too_few(open(&Signatures::default(), &both, 1), 0));
    // The same signature twice in a file that was put together by hand.
    let once = signed(&text, &[&a]).to_toml().unwrap();
    let entry = once.split_once("\n").unwrap().1;
    let twice = Signatures::parse(format!("{once}\n{entry}").as_bytes()).unwrap();
    assert_eq!(twice.iter().count(), 2);
    assert!(too_few(open(&twice, &both, 2), 1));
    // A stranger's bad signature is nobody's business, a signer's is.
    let other = signed(b"other", &[&stranger]);
    let mut mixed = signed(&text, &[&a]);
    mixed.add(*other.iter().next().unwrap()).unwrap();
    assert!(open(&mixed, &both, 1).is_ok());
    mixed.add(b.sign(b"other")).unwrap();
    let refused = open(&mixed, &both, 1);
    assert!(matches!(refused, Err(ReferenceError::BadSignature(k)) if k == b.public()));
}

#[test]
fn a_threshold_means_something() {
    let a = key();
    let text = document().to_toml().unwrap().into_bytes();
    let signatures = signed(&text, &[&a]);
    let twice = [a.public(), a.public()];
    for (trusted, threshold) in [(&twice[..], 0), (&twice, 2), (&[], 1), (&[], 0)] {
        let refused = ReferenceValues::open(&text, &signatures, trusted, threshold, mid_2026());
        assert!(matches!(refused, Err(ReferenceError::Threshold { .. })));
    }
}

#[test]
fn values_hold_for_their_time() {
    let a = key();
    let text = document().to_toml().unwrap().into_bytes();
    let signatures = signed(&text, &[&a]);
    let open = |now| ReferenceValues::open(&text, &signatures, &[a.public()], 1, now);
    let (from, to) = (document().not_before.time(), document().expires.time());
    let second = Duration::from_secs(1);
    assert!(open(from).is_ok() && open(to - second).is_ok());
    assert!(matches!(
        open(from - second),
        Err(ReferenceError::NotYetValid(_))
    ));
    assert!(matches!(open(to), Err(ReferenceError::Expired(_))));
    assert!(matches!(
        open(SystemTime::UNIX_EPOCH),
        Err(ReferenceError::NotYetValid(_))
    ));
}

#[test]
fn a_document_is_read_strictly() {
    let text = document().to_toml().unwrap();
    let parse = |text: &str| ReferenceDocument::parse(text.as_bytes());
    assert_eq!(parse(&text), Ok(document()));
    let digest = digest(1).to_string();
    for (from, to) in [
        ("version = 1", "version = 2"),
        ("version = 1", "version = 1\nextra = 1"),
        ("name = \"web\"", "name = \"web\"\nextra = 1"),
        ("size = 4096", "size = 4096\nextra = 1"),
        ("vcpus = 1", "vcpus = 1\nextra = 1"),
        ("vmsa_profile", "extra = 1\nvmsa_profile"),
        ("name = \"web\"", "name = \"db\""),
        ("name = \"web\"", "name = \"\""),
        ("name = \"web\"", "name = \"w b\""),
        ("\"snp\"", "\"sev\""),
        ("\"snp\"", "\"tdx\""),
        ("vcpus = 1", "vcpus = 0"),
        ("size = 4096", "size = -1"),
        (digest.as_str(), &digest[..64]),
        (digest.as_str(), &digest[..95]),
        ("2027-01-01T00:00:00Z", "2026-01-01T00:00:00Z"),
        ("2027-01-01T00:00:00Z", "2027-01-01"),
        ("2027-01-01T00:00:00Z", "2027-13-01T00:00:00Z"),
        ("\"0xa00f11\"", "\"a00f11\""),
    ] {
        let changed = text.replacen(from, to, 1);
        assert_ne!(changed, text, "{from}");
        assert!(parse(&changed).is_err(), "{to}");
    }
    let cut = format!("{}guest = []\n", text.split_once("[[guest]]").unwrap().0);
    assert!(
        matches!(parse(&cut), Err(DocumentError::Count { .. })),
        "{cut}"
    );
    let mut sev = guest("sev");
    sev.technology = Technology::Sev;
    sev.launch.truncate(1);
    sev.launch[0].digest = GuestDigest::Sev(crate::measure::LaunchDigest::new([1; 32]));
    let (from, to) = (document().not_before, document().expires);
    let refused = ReferenceDocument::new(from, to, vec![sev.clone()]);
    assert!(matches!(refused, Err(DocumentError::Technology { .. })));
    sev.id_key_digest = None;
    assert!(ReferenceDocument::new(from, to, vec![sev]).is_ok());
}

#[test]
fn moments_are_whole_seconds_that_can_be_written() {
    let end = at("9999-12-31T23:59:59Z");
    assert_eq!(Timestamp::new(end.time()), Some(end));
    assert_eq!(at("2026-01-01T00:00:00.9Z"), at("2026-01-01T00:00:00Z"));
    let second = Duration::from_secs(1);
    for outside in [end.time() + second, SystemTime::UNIX_EPOCH - second] {
        assert_eq!(Timestamp::new(outside), None);
    }
}

#[test]
fn files_have_an_end() {
    let long = vec![b'\n'; MAX_DOCUMENT_LEN + 1];
    let a = key();
    let refused = ReferenceValues::open(&long, &signed(&long, &[&a]), &[a.public()], 1, mid_2026());
    assert!(matches!(refused, Err(ReferenceError::Length(_))));
    assert!(ReferenceDocument::parse(&long).is_err());
    let long = vec![b'\n'; MAX_SIGNATURES_LEN + 1];
    assert!(matches!(
        Signatures::parse(&long),
        Err(SignatureFileError::Length(_))
    ));
    let many = "[[signature]]\nkey = \"ed25519:00\"\n"
        .replace("ed25519:00", &format!("ed25519:{}", "0".repeat(64)))
        + "signature = \"";
    let many = (many + &"0".repeat(128) + "\"\n").repeat(65);
    let refused = Signatures::parse(format!("version = 1\n{many}").as_bytes());
    assert_eq!(refused, Err(SignatureFileError::Count(65)));
}

#[test]
fn keys_have_one_form() {
    let a = key().public();
    assert_eq!(a.to_string().parse(), Ok(a));
    let digits = a.to_string().replace("ed25519:", "");
    for text in ["", "ed25519:", &digits, &format!("ed25519:{digits}0")] {
        assert!(text.parse::<SignerKey>().is_err());
    }
    assert_eq!(SigningKey::read(b"no key").err(), Some(KeyError::Private));
}

proptest! {
    #[test]
    fn any_text_is_a_document_or_a_refusal(text in ".{0,300}", place in 0usize..600) {
        let _ = ReferenceDocument::parse(text.as_bytes());
        let _ = Signatures::parse(text.as_bytes());
        let whole = document().to_toml().unwrap();
        let place = place.min(whole.len());
        let _ = ReferenceDocument::parse(format!("{}{text}{}", &whole[..place], &whole[place..]).as_bytes());
    }
}
