//! Hosts' policies, their files of signatures, and cases: any bytes are one or a refusal; no policy lets a guest be
//! debugged, SEV-SNP move, or something emulated pass unannounced; and a signature is of one text.
#![no_main]

use casemate_policy::claims::{Actor, Inquiry};
use casemate_policy::sign::Signatures;
use casemate_policy::{Action, HostPolicy, Technology, Timestamp, cases, decide};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(signatures) = Signatures::parse(bytes) {
        let text = signatures.to_toml().unwrap();
        assert_eq!(Signatures::parse(text.as_bytes()).unwrap(), signatures);
        let both = signatures.iter().any(|s| s.is_of(bytes) && s.is_of(b""));
        assert!(!both);
    }
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let asked = cases::parse("f", text, false).or_else(|_| cases::parse("f", text, true));
    for case in asked.iter().flatten() {
        let again = Inquiry::from_canonical(&case.ask.canonical());
        assert_eq!(again.as_ref(), Some(&case.ask));
    }
    let Ok(policy) = HostPolicy::parse("f", text) else {
        return;
    };
    let ask = |action: Action| {
        let actors = [
            Actor::Host,
            Actor::Local { uid: 0 },
            Actor::Local { uid: 1000 },
        ];
        actors.into_iter().any(|actor| {
            let clock = Timestamp::from_unix(1_780_272_000);
            decide(
                &policy,
                &Inquiry::new(actor, "bank-1", action.clone(), clock),
            )
            .allowed
        })
    };
    let launch = |emulated, policy_bits| Action::Launch {
        technology: Technology::Sev,
        emulated,
        vcpus: 1,
        memory_mib: 64,
        policy_bits,
    };
    assert!(!ask(launch(false, 0)));
    assert!(!ask(launch(true, 1)) || policy.technologies.allow_emulated);
    for peer in policy.peers() {
        assert!(!ask(Action::MigrateOut {
            technology: Technology::SevSnp,
            emulated: false,
            peer_name: peer.name.clone(),
        }));
    }
});
