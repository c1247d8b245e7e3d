//! SEND and RECEIVE between emulated platforms that have nothing but each other's root.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod common;

use casemate_attest::legacy::{GuestPolicy, LegacyChain, PacketHeader, PolicyFlag, SessionBlob};
use casemate_attest::processor::{
    FirmwareError, GuestHandle, GuestState, Identity, OwnerAuthority, SecureProcessor,
};
use common::{SITE_A, SITE_B, owner, policy, processor, running};

fn chain(processor: &SecureProcessor) -> LegacyChain {
    processor.pdh_cert_export().unwrap().clone()
}

/// SEND_START at `from`, RECEIVE_START and ACTIVATE at `to`.
fn connect(
    from: &mut SecureProcessor,
    handle: GuestHandle,
    to: &mut SecureProcessor,
) -> GuestHandle {
    let offer = from.send_start(handle, &chain(to)).unwrap();
    let received = to
        .receive_start(offer.policy, &chain(from).pdh, &offer.session)
        .unwrap();
    to.activate(received, 3).unwrap();
    received
}

#[test]
fn a_guest_moves_there_and_back_again() {
    let mut a = processor(&SITE_A, &[&SITE_B]);
    let mut b = processor(&SITE_B, &[&SITE_A]);
    let policy = policy(&[PolicyFlag::Sev]);
    let mut handle = running(&mut a, policy);
    let pages: Vec<Vec<u8>> = (0..16u8).map(|i| vec![i; 4096]).collect();
    for _ in 0..2 {
        let there = connect(&mut a, handle, &mut b);
        let (from, to) = (a.guest(handle).unwrap(), b.guest(there).unwrap());
        for page in &pages {
            let (header, ciphertext) = from.send_update_data(page).unwrap();
            assert_ne!(&ciphertext, page);
            let header = PacketHeader::from_bytes(&header.to_bytes()).unwrap();
            let mut memory = vec![0xaa; 4096];
            to.receive_update_data(&header, &ciphertext, &mut memory)
                .unwrap();
            assert_eq!(&memory, page);
        }
        from.send_finish().unwrap();
        to.receive_finish().unwrap();
        let status = to.status().unwrap();
        assert_eq!((status.state, status.policy), (GuestState::Running, policy));
        a.decommission(handle).unwrap();
        (a, b, handle) = (b, a, there);
    }
    assert_eq!(b.status().guest_count, 0);
}

#[test]
fn packets_are_refused_when_changed_and_memory_stays_as_it_was() {
    let mut a = processor(&SITE_A, &[&SITE_B]);
    let mut b = processor(&SITE_B, &[]);
    let handle = running(&mut a, policy(&[]));
    let there = connect(&mut a, handle, &mut b);
    let (header, ciphertext) = a
        .guest(handle)
        .unwrap()
        .send_update_data(&[9; 4096])
        .unwrap();
    let to = b.guest(there).unwrap();
    let mut memory = vec![0xaa; 4096];

    let mut flipped = ciphertext.clone();
    flipped[4095] ^= 1;
    let bad = Err(FirmwareError::BadMeasurement);
    assert_eq!(to.receive_update_data(&header, &flipped, &mut memory), bad);
    for change in [
        |header: &mut PacketHeader| header.iv[15] ^= 1,
        |header: &mut PacketHeader| header.mac[0] ^= 1,
    ] {
        let mut header = header;
        change(&mut header);
        assert_eq!(
            to.receive_update_data(&header, &ciphertext, &mut memory),
            bad
        );
    }
    let truncated = to.receive_update_data(&header, &ciphertext[..4080], &mut memory[..4080]);
    assert_eq!(truncated, bad);
    let mut compressed = header;
    compressed.flags = 1;
    let refused = to.receive_update_data(&compressed, &ciphertext, &mut memory);
    assert_eq!(refused, Err(FirmwareError::Unsupported));
    let refused = to.receive_update_data(&header, &ciphertext, &mut memory[..16]);
    assert_eq!(refused, Err(FirmwareError::InvalidLength { needed: 4096 }));
    let refused = to.receive_update_data(&header, &[0; 8192], &mut [0; 8192]);
    assert_eq!(refused, Err(FirmwareError::InvalidLength { needed: 4096 }));
    assert_eq!(memory, [0xaa; 4096]);
    to.receive_update_data(&header, &ciphertext, &mut memory)
        .unwrap();
    assert_eq!(memory, [9; 4096]);

    let from = a.guest(handle).unwrap();
    let mut out = [0; 4096];
    for (page, needed) in [(&[][..], 16), (&[0; 4112][..], 4096), (&[0; 100][..], 112)] {
        let refused = from.send_update_data_into(page, &mut out);
        assert_eq!(refused, Err(FirmwareError::InvalidLength { needed }));
    }
    let refused = from.send_update_data_into(&[0; 4096], &mut out[..4080]);
    assert_eq!(refused, Err(FirmwareError::InvalidLength { needed: 4096 }));
}

#[test]
fn the_policy_decides_where_a_guest_may_go() {
    let mut a = processor(&SITE_A, &[&SITE_B]);
    let b = processor(&SITE_B, &[]);
    for flag in [PolicyFlag::NoSend, PolicyFlag::Domain] {
        let mut platform = processor(&SITE_A, &[&SITE_B]);
        let handle = running(&mut platform, policy(&[flag]));
        let refused = platform.send_start(handle, &chain(&b));
        assert_eq!(refused, Err(FirmwareError::PolicyFailure), "{flag:?}");
        let state = platform.guest(handle).unwrap().status().unwrap().state;
        assert_eq!(state, GuestState::Running);
    }
    let handle = running(&mut a, policy(&[]));
    a.send_start(handle, &chain(&b)).unwrap();
}

#[test]
fn platforms_of_one_owner_are_one_domain() {
    let owner = OwnerAuthority::generate().unwrap();
    let [a, b] = [(); 2].map(|()| Identity::generate_owned(&owner).unwrap().to_bytes());
    let mut from = processor(&a, &[&b]);
    let mut to = processor(&b, &[]);
    assert!(from.status().owned);
    let handle = running(&mut from, policy(&[PolicyFlag::Domain]));
    connect(&mut from, handle, &mut to);
}

#[test]
fn targets_without_a_trusted_whole_chain_are_refused() {
    let stranger = processor(&SITE_B, &[]);
    let mut a = processor(&SITE_A, &[]);
    let handle = running(&mut a, policy(&[]));
    let refused = a.send_start(handle, &chain(&stranger));
    assert_eq!(refused, Err(FirmwareError::InvalidCertificate));

    let mut a = processor(&SITE_A, &[&SITE_B]);
    let handle = running(&mut a, policy(&[]));
    let mut spliced = chain(&stranger);
    spliced.pdh = chain(&a).pdh;
    assert_eq!(
        a.send_start(handle, &spliced),
        Err(FirmwareError::BadSignature)
    );
    let mut misplaced = chain(&stranger);
    misplaced.pdh = misplaced.oca.clone();
    assert_eq!(
        a.send_start(handle, &misplaced),
        Err(FirmwareError::InvalidCertificate)
    );
    // A refusal leaves the guest where it was.
    a.send_start(handle, &chain(&stranger)).unwrap();
}

#[test]
fn a_session_is_for_one_target_one_sender_and_one_policy() {
    let mut a = processor(&SITE_A, &[&SITE_B]);
    let mut b = processor(&SITE_B, &[]);
    let handle = running(&mut a, policy(&[]));
    let offer = a.send_start(handle, &chain(&b)).unwrap();
    let sender = chain(&a).pdh;
    let bad = Err(FirmwareError::BadMeasurement);
    let other_policy = policy(&[PolicyFlag::NoSend]);
    assert_eq!(b.receive_start(other_policy, &sender, &offer.session), bad);
    assert_eq!(
        b.receive_start(offer.policy, &chain(&b).pdh, &offer.session),
        bad
    );
    let mut raw = offer.session.to_bytes();
    raw[0] ^= 1;
    let changed = SessionBlob::parse(&raw).unwrap();
    assert_eq!(b.receive_start(offer.policy, &sender, &changed), bad);
    b.receive_start(offer.policy, &sender, &offer.session)
        .unwrap();
}

#[test]
fn a_cancelled_guest_runs_on_and_its_old_packets_are_worthless() {
    let mut a = processor(&SITE_A, &[&SITE_B]);
    let mut b = processor(&SITE_B, &[]);
    let handle = running(&mut a, policy(&[]));
    connect(&mut a, handle, &mut b);
    let (header, ciphertext) = a
        .guest(handle)
        .unwrap()
        .send_update_data(&[1; 4096])
        .unwrap();
    let guest = a.guest(handle).unwrap();
    guest.send_cancel().unwrap();
    assert_eq!(guest.status().unwrap().state, GuestState::Running);
    let offer = a.send_start(handle, &chain(&b)).unwrap();
    let again = b
        .receive_start(offer.policy, &chain(&a).pdh, &offer.session)
        .unwrap();
    b.activate(again, 4).unwrap();
    let stale = b
        .guest(again)
        .unwrap()
        .receive_update_data(&header, &ciphertext, &mut [0; 4096]);
    assert_eq!(stale, Err(FirmwareError::BadMeasurement));
}

/// Every command in every state: what is not allowed says so and changes nothing.
#[test]
fn commands_in_the_wrong_state_are_refused() {
    use GuestState::*;
    type Run = fn(&mut SecureProcessor, GuestHandle, &LegacyChain) -> Result<(), FirmwareError>;
    const HEADER: PacketHeader = PacketHeader {
        flags: 0,
        iv: [0; 16],
        mac: [0; 32],
    };
    let commands: [(&str, &[GuestState], Run); 11] = [
        ("update_data", &[LUpdate], |p, h, _| {
            p.guest(h)?.launch_update_data(&[0; 16])
        }),
        ("measure", &[LUpdate], |p, h, _| {
            p.guest(h)?.launch_measure().map(drop)
        }),
        ("secret", &[LSecret], |p, h, _| {
            p.guest(h)?.launch_secret(&HEADER, &[0; 16], &mut [0; 16])
        }),
        ("finish", &[LSecret], |p, h, _| p.guest(h)?.launch_finish()),
        ("send_start", &[Running], |p, h, target| {
            p.send_start(h, target).map(drop)
        }),
        ("send_update", &[SUpdate], |p, h, _| {
            p.guest(h)?.send_update_data(&[0; 16]).map(drop)
        }),
        ("send_cancel", &[SUpdate], |p, h, _| {
            p.guest(h)?.send_cancel()
        }),
        ("send_finish", &[SUpdate], |p, h, _| {
            p.guest(h)?.send_finish()
        }),
        ("receive_update", &[RUpdate], |p, h, _| {
            p.guest(h)?
                .receive_update_data(&HEADER, &[0; 16], &mut [0; 16])
        }),
        ("receive_finish", &[RUpdate], |p, h, _| {
            p.guest(h)?.receive_finish()
        }),
        (
            "deactivate",
            &[LUpdate, LSecret, Running, SUpdate, RUpdate],
            |p, h, _| p.deactivate(h),
        ),
    ];
    for state in [LUpdate, LSecret, Running, SUpdate, RUpdate, Sent] {
        for (name, allowed, run) in &commands {
            let mut platform = processor(&SITE_A, &[&SITE_B]);
            let mut peer = processor(&SITE_B, &[&SITE_A]);
            let handle = guest_in(state, &mut platform, &mut peer);
            let result = run(&mut platform, handle, &chain(&peer));
            let refused = result == Err(FirmwareError::InvalidGuestState);
            assert_eq!(
                refused,
                !allowed.contains(&state),
                "{name} in {state:?}: {result:?}"
            );
            let status = platform.guest(handle).unwrap().status();
            if refused && state != Sent {
                assert_eq!(status.unwrap().state, state, "{name}");
            }
        }
    }
    let mut platform = processor(&SITE_A, &[]);
    for (name, _, run) in &commands {
        let target = chain(&platform);
        let unknown = run(&mut platform, GuestHandle(77), &target);
        assert_eq!(unknown, Err(FirmwareError::InvalidGuest), "{name}");
    }
}

/// A guest brought to `state` with real commands.
fn guest_in(
    state: GuestState,
    platform: &mut SecureProcessor,
    peer: &mut SecureProcessor,
) -> GuestHandle {
    let policy: GuestPolicy = policy(&[]);
    match state {
        GuestState::Uninit => unreachable!("has no handle"),
        GuestState::LUpdate | GuestState::LSecret => {
            let (public, _) = owner(platform, policy);
            let session = Some((&public.dh_cert, &public.session));
            let handle = platform.launch_start(policy, session).unwrap();
            platform.activate(handle, 1).unwrap();
            if state == GuestState::LSecret {
                platform.guest(handle).unwrap().launch_measure().unwrap();
            }
            handle
        }
        GuestState::Running => running(platform, policy),
        GuestState::SUpdate | GuestState::Sent => {
            let handle = running(platform, policy);
            platform.send_start(handle, &chain(peer)).unwrap();
            if state == GuestState::Sent {
                platform.guest(handle).unwrap().send_finish().unwrap();
            }
            handle
        }
        GuestState::RUpdate => {
            let there = running(peer, policy);
            connect(peer, there, platform)
        }
    }
}
