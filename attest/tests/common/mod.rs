//! Two emulated platforms with a root each, made once per test binary.
#![allow(dead_code, reason = "each test binary uses its own part")]

use casemate_attest::legacy::{
    ApiVersion, GuestPolicy, LaunchSession, OwnerSession, PolicyFlag, TrustAnchors, VerifiedChain,
};
use casemate_attest::processor::{GuestHandle, Identity, ProcessorConfig, SecureProcessor};
use std::sync::LazyLock;
use zeroize::Zeroizing;

pub static SITE_A: LazyLock<Zeroizing<Vec<u8>>> =
    LazyLock::new(|| Identity::generate().unwrap().to_bytes());
pub static SITE_B: LazyLock<Zeroizing<Vec<u8>>> =
    LazyLock::new(|| Identity::generate().unwrap().to_bytes());

/// A platform that may send to the platforms of `peers`.
pub fn processor(identity: &[u8], peers: &[&[u8]]) -> SecureProcessor {
    let peers = peers.iter().fold(TrustAnchors::amd(), |trust, peer| {
        let root = Identity::from_bytes(peer).unwrap().root_fingerprint();
        trust.with_emulated_root(root).unwrap()
    });
    let config = ProcessorConfig {
        max_guests: 4,
        peers,
    };
    let mut processor = SecureProcessor::new(Identity::from_bytes(identity).unwrap(), config);
    processor.init().unwrap();
    processor
}

pub fn policy(flags: &[PolicyFlag]) -> GuestPolicy {
    let flags = [flags, &[PolicyFlag::NoDebug]].concat();
    GuestPolicy::new(&flags, ApiVersion::new(1, 51))
}

pub fn verified(processor: &SecureProcessor) -> VerifiedChain {
    let chain = processor.pdh_cert_export().unwrap();
    let trust = TrustAnchors::amd()
        .with_emulated_root(chain.ark.fingerprint())
        .unwrap();
    chain.verify(&trust).unwrap()
}

pub fn owner(processor: &SecureProcessor, policy: GuestPolicy) -> (LaunchSession, OwnerSession) {
    OwnerSession::create(&verified(processor), policy).unwrap()
}

/// A running guest on ASID 1.
pub fn running(processor: &mut SecureProcessor, policy: GuestPolicy) -> GuestHandle {
    let (public, _) = owner(processor, policy);
    let session = Some((&public.dh_cert, &public.session));
    let handle = processor.launch_start(policy, session).unwrap();
    processor.activate(handle, 1).unwrap();
    let guest = processor.guest(handle).unwrap();
    guest.launch_update_data(&[1; 4096]).unwrap();
    guest.launch_measure().unwrap();
    guest.launch_finish().unwrap();
    handle
}
