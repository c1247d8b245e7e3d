//! Policies that name signers instead of launch digests.

use casemate_attest::reference::{ReferenceDocument, Signatures, SigningKey};

use super::*;

const POLICY_FILE: &str = "disk.toml";

fn signer() -> SigningKey {
    SigningKey::read(&SigningKey::generate().unwrap()).unwrap()
}

/// A case whose disk policy trusts `trusted`, and whose broker reads what `signed` says of the guest.
fn case(trusted: Option<&SigningKey>, signed: &SigningKey, measurement: u8) -> Case {
    let case = Case::new();
    let root = hex::encode(Authority::shared().identity().root_fingerprint());
    let signers = trusted.map_or(String::new(), |key| {
        format!("reference_signers = [\"{}\"]\n", key.public())
    });
    let emulated = format!("allow_emulated = true\nemulated_roots = [\"sha256:{root}\"]\n");
    case.write(POLICY_FILE, &format!("{emulated}{signers}"));
    let document = document(measurement);
    let mut signatures = Signatures::default();
    signatures.add(signed.sign(document.as_bytes())).unwrap();
    case.write("values.toml", &document);
    case.write("values.toml.sig", &signatures.to_toml().unwrap());
    let kept = case.folder.path().join("broker.toml");
    let kept = std::fs::read_to_string(kept).unwrap();
    case.write(
        "broker.toml",
        &format!("references = [\"values.toml\"]\n{kept}"),
    );
    case
}

fn document(measurement: u8) -> String {
    let text = format!(
        "version = 1\nnot_before = \"2020-01-01T00:00:00Z\"\nexpires = \"2099-01-01T00:00:00Z\"\n\
         [[guest]]\nname = \"g\"\ntechnology = \"snp\"\n\
         inputs = {{ vmsa_profile = \"qemu\", guest_features = \"0x1\", firmware = {{ sha256 = \"{}\", size = 1 }} }}\n\
         launch = [{{ digest = \"{}\", vcpus = 1, vcpu_signature = \"0xa10f10\" }}]\n",
        "00".repeat(32),
        hex::encode([measurement; 48])
    );
    ReferenceDocument::parse(text.as_bytes()).unwrap();
    text
}

fn refused(case: &Case) -> String {
    let mut config = case.config();
    let opened = open_with(&mut config, Arc::<Hands>::default(), Arc::<Kept>::default());
    opened.err().unwrap().to_string()
}

#[test]
fn what_the_policys_signer_signed_is_released_and_nothing_else() {
    let key = signer();
    for (measurement, released) in [(MEASUREMENT, true), (0x0e, false)] {
        let case = case(Some(&key), &key, measurement);
        let running = case.start();
        let mut client = running.client();
        client.attest(&mut Emulated::default()).unwrap();
        let answer = client.resource(&DISK.parse().unwrap());
        let answer = answer.map(|secret| *secret == SECRET);
        assert_eq!(
            answer.as_ref().is_ok_and(|same| *same),
            released,
            "{answer:?}"
        );
    }
}

#[test]
fn reference_values_that_count_for_nobody_start_no_broker() {
    let (key, other) = (signer(), signer());
    let text = refused(&case(Some(&key), &other, MEASUREMENT));
    assert!(text.contains("values.toml: 0 trusted signers"), "{text}");
    let text = refused(&case(None, &other, MEASUREMENT));
    assert!(text.contains("`reference_signers`"), "{text}");
    let changed = case(Some(&key), &key, MEASUREMENT);
    changed.write("values.toml", &document(0x0e));
    let text = refused(&changed);
    assert!(text.contains("is not of this document"), "{text}");
    let gone = case(Some(&key), &key, MEASUREMENT);
    std::fs::remove_file(gone.folder.path().join("values.toml.sig")).unwrap();
    let text = refused(&gone);
    assert!(text.contains("values.toml.sig is not there"), "{text}");
}
