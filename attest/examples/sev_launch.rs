//! A whole SEV launch, seen from both sides: an owner who trusts nothing but a root key, and a
//! host with an (emulated) secure processor.
//!
//! ```text
//! cargo run --release -p casemate-attest --example sev_launch
//! ```

use casemate_attest::legacy::{ApiVersion, GuestPolicy, OwnerSession, PolicyFlag, TrustAnchors};
use casemate_attest::measure::{LaunchDigest, LaunchDigester};
use casemate_attest::processor::{Identity, ProcessorConfig, SecureProcessor};
use casemate_attest::verify::{
    Component, PlatformEvidence, SevLaunchEvidence, SevLaunchExpected, verify_sev_launch,
};
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    // The host: a platform that is made once per installation, and the guest it will load.
    let identity = Identity::generate()?;
    let root = identity.root_fingerprint();
    let mut processor = SecureProcessor::new(identity, ProcessorConfig::default());
    processor.init()?;
    let (kernel, initrd) = (vec![0x4b; 8192], vec![0x49; 4096]);

    // The owner: verify the platform, then open a session with it. The emulated root counts
    // only because it is named here.
    let trust = TrustAnchors::amd().with_emulated_root(root)?;
    let platform = processor.pdh_cert_export()?.verify(&trust)?;
    let policy = GuestPolicy::new(&[PolicyFlag::NoDebug], ApiVersion::new(1, 51));
    let (public, session) = OwnerSession::create(&platform, policy)?;
    println!(
        "platform verified, root {:?}, emulated: {}",
        platform.root(),
        platform.emulated()
    );

    // The host: start the guest with the owner's session, load it, measure it.
    let handle = processor.launch_start(policy, Some((&public.dh_cert, &public.session)))?;
    processor.activate(handle, 1)?;
    let guest = processor.guest(handle)?;
    guest.launch_update_data(&kernel)?;
    guest.launch_update_data(&initrd)?;
    let measurement = guest.launch_measure()?;
    let status = processor.status();

    // The owner: what the description leads to, against what the platform measured.
    let mut digester = LaunchDigester::new();
    digester.update(&kernel);
    digester.update(&initrd);
    let component = |name: &str, bytes: &[u8]| Component {
        name: name.to_owned(),
        digest: LaunchDigest::of(bytes),
    };
    let expected = SevLaunchExpected {
        digest: digester.finish(),
        components: vec![component("kernel", &kernel), component("initrd", &initrd)],
        policy,
        min_api: ApiVersion::new(1, 51),
        allow_emulated: true,
    };
    let evidence = SevLaunchEvidence {
        platform: PlatformEvidence::Verified(&platform),
        measurement,
        api: status.api,
        build: status.build,
        policy,
        claimed_components: Vec::new(),
    };
    let verdict = verify_sev_launch(&evidence, &expected, &session);
    for check in &verdict.checks {
        println!("{:<20} {:?}: {}", check.name, check.result, check.found);
    }
    if !verdict.accepted() {
        return Err("the launch was not accepted; no secret is released".into());
    }

    // The owner releases a secret for this launch; the host can only pass it on.
    let secret = session.seal_secret(&measurement, b"disk key, 32 bytes, padded......")?;
    let mut memory = [0; 32];
    let guest = processor.guest(handle)?;
    guest.launch_secret(&secret.header, &secret.ciphertext, &mut memory)?;
    guest.launch_finish()?;
    println!("the guest holds {:?}", String::from_utf8_lossy(&memory));
    println!("guest {:?}", guest.status()?);
    Ok(())
}
