//! What the emulated platform makes, read by somebody else's code: the `sev` crate.
//!
//! Its cryptography for legacy SEV needs OpenSSL, so only formats are compared here; signatures
//! and sessions are checked against real certificates and known values in the unit tests.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use casemate_attest::legacy::{ApiVersion, GuestPolicy, PolicyFlag};
use common::{SITE_A, processor};
use sev::certs::sev::{ca, sev as platform};
use sev::parser::{Decoder, Encoder};

#[test]
fn the_sev_crate_reads_the_emulated_chain_as_we_do() {
    let processor = processor(&SITE_A, &[]);
    let chain = processor.pdh_cert_export().unwrap();
    for (ours, usage) in [
        (&chain.pdh, platform::Usage::PDH),
        (&chain.pek, platform::Usage::PEK),
        (&chain.oca, platform::Usage::OCA),
        (&chain.cek, platform::Usage::CEK),
    ] {
        let theirs = platform::Certificate::decode(&mut ours.as_bytes(), ()).unwrap();
        assert!(theirs == usage);
        let mut raw = Vec::new();
        theirs.encode(&mut raw, ()).unwrap();
        assert_eq!(raw, ours.as_bytes());
    }
    for (ours, usage) in [(&chain.ark, ca::Usage::ARK), (&chain.ask, ca::Usage::ASK)] {
        let theirs = ca::Certificate::decode(&mut ours.as_bytes(), ()).unwrap();
        assert!(theirs == usage);
        let mut raw = Vec::new();
        theirs.encode(&mut raw, ()).unwrap();
        assert_eq!(raw, ours.as_bytes());
    }
}

#[test]
fn policy_bits_mean_the_same() {
    use sev::launch::sev::PolicyFlags;
    for (ours, theirs) in [
        (PolicyFlag::NoDebug, PolicyFlags::NO_DEBUG),
        (PolicyFlag::NoKeySharing, PolicyFlags::NO_KEY_SHARING),
        (PolicyFlag::EncryptedState, PolicyFlags::ENCRYPTED_STATE),
        (PolicyFlag::NoSend, PolicyFlags::NO_SEND),
        (PolicyFlag::Domain, PolicyFlags::DOMAIN),
        (PolicyFlag::Sev, PolicyFlags::SEV),
    ] {
        let raw = GuestPolicy::new(&[ours], ApiVersion::new(0, 0)).raw();
        assert_eq!(raw, u32::from(theirs.bits()), "{ours:?}");
    }
}
