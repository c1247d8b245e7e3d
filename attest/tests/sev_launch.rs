//! Owner and emulated platform, from the first certificate to the released secret.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod common;

use casemate_attest::legacy::{OwnerSession, PolicyFlag, SessionBlob};
use casemate_attest::measure::LaunchDigest;
use casemate_attest::processor::{FirmwareError, GuestState, PlatformState};
use casemate_attest::verify::{
    PlatformEvidence, SevLaunchEvidence, SevLaunchExpected, Verdict, verify_sev_launch,
};
use common::{SITE_A, SITE_B, owner, policy, processor, verified};

/// Launches `loaded` and judges it against `described`; `kept` models an owner that comes back
/// in another process.
fn launch_and_judge(loaded: &[u8], described: &[u8]) -> Verdict {
    let mut platform = processor(&SITE_A, &[]);
    let (public, session) = owner(&platform, policy(&[]));
    let kept = session.to_bytes();
    let session = OwnerSession::from_bytes(&kept).unwrap();
    let handle = platform
        .launch_start(public.policy, Some((&public.dh_cert, &public.session)))
        .unwrap();
    platform.activate(handle, 1).unwrap();
    let guest = platform.guest(handle).unwrap();
    for page in loaded.chunks(4096) {
        guest.launch_update_data(page).unwrap();
    }
    let measurement = guest.launch_measure().unwrap();
    let status = platform.status();
    let chain = verified(&platform);
    let evidence = SevLaunchEvidence {
        platform: PlatformEvidence::Verified(&chain),
        measurement,
        api: status.api,
        build: status.build,
        policy: public.policy,
        claimed_components: Vec::new(),
    };
    let expected = SevLaunchExpected {
        digest: LaunchDigest::of(described),
        components: Vec::new(),
        policy: public.policy,
        min_api: status.api,
        allow_emulated: true,
    };
    verify_sev_launch(&evidence, &expected, &session)
}

#[test]
fn the_described_guest_is_accepted_and_one_changed_byte_is_not() {
    let image: Vec<u8> = (0..64 * 1024u32).map(|i| (i / 7) as u8).collect();
    let verdict = launch_and_judge(&image, &image);
    assert!(verdict.accepted(), "{verdict:#?}");
    assert!(verdict.emulated);

    let mut changed = image.clone();
    changed[40_000] ^= 1;
    let verdict = launch_and_judge(&changed, &image);
    let failed: Vec<_> = verdict.failures().collect();
    assert!(!verdict.accepted());
    assert_eq!(failed.len(), 1);
    assert_eq!(failed[0].name, "launch_measurement");
    assert_eq!(
        failed[0].code.as_deref(),
        Some("LAUNCH_MEASUREMENT_MISMATCH")
    );
}

#[test]
fn a_secret_reaches_only_the_launch_it_was_sealed_for() {
    let mut platform = processor(&SITE_A, &[]);
    let (public, session) = owner(&platform, policy(&[]));
    let start = Some((&public.dh_cert, &public.session));
    let mut measures = Vec::new();
    let mut handles = Vec::new();
    for asid in [1, 2] {
        let handle = platform.launch_start(public.policy, start).unwrap();
        platform.activate(handle, asid).unwrap();
        let guest = platform.guest(handle).unwrap();
        guest.launch_update_data(&[7; 32]).unwrap();
        measures.push(guest.launch_measure().unwrap());
        handles.push(handle);
    }
    // The same session and memory: only the nonce keeps the two launches apart.
    assert_ne!(measures[0].measure, measures[1].measure);
    let packet = session.seal_secret(&measures[0], &[0x5e; 32]).unwrap();
    let mut memory = [0xff; 32];

    let other = platform.guest(handles[1]).unwrap();
    let refused = other.launch_secret(&packet.header, &packet.ciphertext, &mut memory);
    assert_eq!(refused, Err(FirmwareError::BadMeasurement));

    let guest = platform.guest(handles[0]).unwrap();
    let mut tampered = packet.clone();
    tampered.ciphertext[3] ^= 1;
    let refused = guest.launch_secret(&tampered.header, &tampered.ciphertext, &mut memory);
    assert_eq!(refused, Err(FirmwareError::BadMeasurement));
    let short = guest.launch_secret(&packet.header, &packet.ciphertext, &mut memory[..16]);
    assert_eq!(short, Err(FirmwareError::InvalidLength { needed: 32 }));
    assert_eq!(memory, [0xff; 32]);

    guest
        .launch_secret(&packet.header, &packet.ciphertext, &mut memory)
        .unwrap();
    assert_eq!(memory, [0x5e; 32]);
    guest.launch_finish().unwrap();
    assert_eq!(guest.status().unwrap().state, GuestState::Running);
}

#[test]
fn sessions_are_refused_when_changed_or_for_another_platform_or_policy() {
    let mut platform = processor(&SITE_A, &[]);
    let (public, _) = owner(&platform, policy(&[]));
    for at in [20, 70, 100] {
        // wrap_tk, wrap_mac, policy_mac
        let mut raw = public.session.to_bytes();
        raw[at] ^= 1;
        let changed = SessionBlob::parse(&raw).unwrap();
        let refused = platform.launch_start(public.policy, Some((&public.dh_cert, &changed)));
        assert_eq!(refused, Err(FirmwareError::BadMeasurement), "byte {at}");
    }
    let start = Some((&public.dh_cert, &public.session));
    let loosened = policy(&[PolicyFlag::NoKeySharing]);
    assert_eq!(
        platform.launch_start(loosened, start),
        Err(FirmwareError::BadMeasurement)
    );

    let mut other = processor(&SITE_B, &[]);
    assert_eq!(
        other.launch_start(public.policy, start),
        Err(FirmwareError::BadMeasurement)
    );

    let pek = platform.pdh_cert_export().unwrap().pek.clone();
    let wrong_key = platform.launch_start(public.policy, Some((&pek, &public.session)));
    assert_eq!(wrong_key, Err(FirmwareError::InvalidCertificate));
    assert_eq!(platform.status().guest_count, 0);
}

#[test]
fn what_is_not_emulated_is_refused_at_the_start() {
    use casemate_attest::legacy::{ApiVersion, GuestPolicy};
    let mut platform = processor(&SITE_A, &[]);
    let es = policy(&[PolicyFlag::EncryptedState]);
    assert_eq!(
        platform.launch_start(es, None),
        Err(FirmwareError::Unsupported)
    );
    let newer = GuestPolicy::new(&[], ApiVersion::new(1, 56));
    assert_eq!(
        platform.launch_start(newer, None),
        Err(FirmwareError::PolicyFailure)
    );
}

#[test]
fn the_registers_of_a_sev_es_guest_are_measured_in_order_and_it_stays_where_it_is() {
    let mut platform = processor(&SITE_A, &[]).with_sev_es();
    assert!(platform.status().config_es);
    let plain = platform.launch_start(policy(&[]), None).unwrap();
    platform.activate(plain, 1).unwrap();
    let refused = platform
        .guest(plain)
        .unwrap()
        .launch_update_vmsa(&[0; 4096]);
    assert_eq!(refused, Err(FirmwareError::Unsupported));

    let es = policy(&[PolicyFlag::EncryptedState]);
    let (public, session) = owner(&platform, es);
    let handle = platform
        .launch_start(es, Some((&public.dh_cert, &public.session)))
        .unwrap();
    platform.activate(handle, 2).unwrap();
    let guest = platform.guest(handle).unwrap();
    guest.launch_update_data(&[1; 64]).unwrap();
    let short = guest.launch_update_vmsa(&[2; 2048]);
    assert_eq!(short, Err(FirmwareError::InvalidLength { needed: 4096 }));
    guest.launch_update_vmsa(&[2; 4096]).unwrap();
    let blob = guest.launch_measure().unwrap();
    guest.launch_finish().unwrap();
    let (api, build) = (platform.status().api, platform.status().build);
    let loaded = [&[1u8; 64][..], &[2; 4096]].concat();
    assert!(session.measure_fits(&LaunchDigest::of(&loaded), api, build, &blob));
    let swapped = [&[2u8; 4096][..], &[1; 64]].concat();
    assert!(!session.measure_fits(&LaunchDigest::of(&swapped), api, build, &blob));
    let target = platform.pdh_cert_export().unwrap().clone();
    let sent = platform.send_start(handle, &target).map(|_| ());
    assert_eq!(sent, Err(FirmwareError::Unsupported));
}

#[test]
fn handles_asids_and_room_are_watched() {
    let mut platform = processor(&SITE_A, &[]);
    assert_eq!(platform.status().state, PlatformState::Init);
    let handles: Vec<_> = (0..4)
        .map(|_| platform.launch_start(policy(&[]), None).unwrap())
        .collect();
    assert_eq!(platform.status().state, PlatformState::Working);
    assert_eq!(
        platform.launch_start(policy(&[]), None),
        Err(FirmwareError::ResourceLimit)
    );

    let inactive = platform
        .guest(handles[0])
        .unwrap()
        .launch_update_data(&[0; 16]);
    assert_eq!(inactive, Err(FirmwareError::Inactive));
    platform.activate(handles[0], 1).unwrap();
    assert_eq!(platform.activate(handles[0], 2), Err(FirmwareError::Active));
    assert_eq!(
        platform.activate(handles[1], 1),
        Err(FirmwareError::AsidOwned)
    );
    assert_eq!(
        platform.activate(handles[1], 0),
        Err(FirmwareError::InvalidAsid)
    );
    assert_eq!(
        platform.activate(handles[1], 5),
        Err(FirmwareError::InvalidAsid)
    );
    platform.deactivate(handles[0]).unwrap();
    assert_eq!(
        platform.deactivate(handles[0]),
        Err(FirmwareError::Inactive)
    );
    platform.activate(handles[1], 1).unwrap();

    let odd = platform
        .guest(handles[1])
        .unwrap()
        .launch_update_data(&[0; 17]);
    assert_eq!(odd, Err(FirmwareError::InvalidLength { needed: 32 }));

    platform.decommission(handles[3]).unwrap();
    assert_eq!(
        platform.decommission(handles[3]),
        Err(FirmwareError::InvalidGuest)
    );
    let next = platform.launch_start(policy(&[]), None).unwrap();
    assert!(handles.iter().all(|&used| used != next));

    platform.shutdown();
    assert_eq!(platform.status().state, PlatformState::Uninit);
    assert_eq!(
        platform.guest(next).err(),
        Some(FirmwareError::InvalidPlatformState)
    );
    platform.init().unwrap();
    assert_eq!(platform.init(), Err(FirmwareError::InvalidPlatformState));
    assert_eq!(
        platform.guest(next).err(),
        Some(FirmwareError::InvalidGuest)
    );
    let after = platform.launch_start(policy(&[]), None).unwrap();
    assert!(after > next);
}
