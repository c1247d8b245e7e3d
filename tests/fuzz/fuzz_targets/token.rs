//! Attestation results: no bytes verify but what the key signed, and signed claims verify only if they are those of an
//! EAR that is in force.
#![no_main]

use std::sync::LazyLock;
use std::time::{Duration, SystemTime};

use casemate_attest::token::{Ear, EarKey, EarVerifier, PROFILE, TokenError};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let now = SystemTime::UNIX_EPOCH + CLOCK;
    if let Ok(text) = std::str::from_utf8(bytes) {
        for (good, public) in SIGNED {
            let key = EarVerifier::from_public(public).unwrap();
            // What is signed is all that stands before the second dot.
            let signed = good.rsplit_once('.').unwrap().0;
            let verified = Ear::verify(text, &key, now).is_ok();
            assert!(
                !verified
                    || text
                        .rsplit_once('.')
                        .is_some_and(|(found, _)| found == signed)
            );
        }
        assert!(Ear::verify(text, &KEY.verifier(), now).is_err());
    }
    if let Ok(ear) = serde_json::from_slice::<Ear>(bytes) {
        let token = ear.sign(&KEY).unwrap();
        match Ear::verify(&token, &KEY.verifier(), now) {
            Ok(read) => {
                assert_eq!(read, ear);
                assert!(ear.eat_profile == PROFILE && ear.exp > CLOCK.as_secs());
            }
            Err(error) => {
                let refused = [
                    TokenError::Profile,
                    TokenError::NotYetValid,
                    TokenError::Expired,
                ];
                assert!(
                    refused.contains(&error) || token.len() > 64 << 10,
                    "{error}"
                );
            }
        }
    }
});

/// Made anew by each process: nothing outside can be signed with it.
static KEY: LazyLock<EarKey> =
    LazyLock::new(|| EarKey::from_pkcs8(&EarKey::generate().unwrap()).unwrap());
const CLOCK: Duration = Duration::from_secs(1_780_000_060);
const SIGNED: [(&str, &[u8]); 2] = [
    (
        include_str!("../fixtures/ed25519.token"),
        include_bytes!("../fixtures/ed25519.public"),
    ),
    (
        include_str!("../fixtures/p384.token"),
        include_bytes!("../fixtures/p384.public"),
    ),
];
