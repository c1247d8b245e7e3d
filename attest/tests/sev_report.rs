//! A running guest's attestation report, from the software secure processor to the verdict.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use casemate_attest::legacy::{PolicyFlag, SevReport};
use casemate_attest::measure::LaunchDigest;
use casemate_attest::processor::{FirmwareError, GuestHandle};
use casemate_attest::verify::{
    Outcome, PlatformEvidence, SevReportEvidence, SevReportExpected, verify_sev_report,
};
use common::{SITE_A, SITE_B, owner, policy, processor, running, verified};

#[test]
fn a_running_guest_is_reported_as_it_was_launched() {
    let mut site = processor(&SITE_A, &[]);
    let guest_policy = policy(&[PolicyFlag::NoSend]);
    let handle = running(&mut site, guest_policy);
    let report = site.attestation_report(handle, &[0x5a; 16]).unwrap();
    // Over the wire and back.
    let report = SevReport::parse(report.as_bytes()).unwrap();
    let chain = verified(&site);
    let evidence = SevReportEvidence {
        platform: PlatformEvidence::Verified(&chain),
        report: &report,
    };
    let mut expected = SevReportExpected {
        nonce: [0x5a; 16],
        digest: LaunchDigest::of(&[1; 4096]),
        policy: Some(guest_policy),
        allow_emulated: true,
    };
    let verdict = verify_sev_report(&evidence, &expected);
    assert_eq!(verdict.overall, Outcome::Accepted, "{verdict:?}");
    assert!(verdict.emulated);

    // The next nonce asks for the next report.
    expected.nonce = [0x5b; 16];
    let verdict = verify_sev_report(&evidence, &expected);
    assert_eq!(verdict.overall, Outcome::Rejected);
}

#[test]
fn only_a_running_guest_that_was_launched_here_is_reported() {
    let mut site = processor(&SITE_A, &[]);
    let policy = policy(&[]);
    let (public, _) = owner(&site, policy);
    let session = Some((&public.dh_cert, &public.session));
    let handle = site.launch_start(policy, session).unwrap();
    site.activate(handle, 1).unwrap();
    let refused = Err(FirmwareError::InvalidGuestState);
    let nonce = [0; 16];
    assert_eq!(site.attestation_report(handle, &nonce), refused);
    let guest = site.guest(handle).unwrap();
    guest.launch_update_data(&[1; 4096]).unwrap();
    guest.launch_measure().unwrap();
    assert_eq!(site.attestation_report(handle, &nonce), refused);
    site.guest(handle).unwrap().launch_finish().unwrap();
    assert!(site.attestation_report(handle, &nonce).is_ok());
    assert_eq!(
        site.attestation_report(GuestHandle(99), &nonce),
        Err(FirmwareError::InvalidGuest)
    );
}

/// What another platform measured does not travel, so nothing is signed of it.
#[test]
fn a_guest_that_was_received_has_no_report() {
    let mut from = processor(&SITE_A, &[SITE_B.as_slice()]);
    let mut to = processor(&SITE_B, &[SITE_A.as_slice()]);
    let policy = policy(&[]);
    let handle = running(&mut from, policy);
    let target = to.pdh_cert_export().unwrap().clone();
    let sent = from.send_start(handle, &target).unwrap();
    assert_eq!(
        from.attestation_report(handle, &[0; 16]),
        Err(FirmwareError::InvalidGuestState)
    );
    let sender = &from.pdh_cert_export().unwrap().pdh;
    let received = to.receive_start(policy, sender, &sent.session).unwrap();
    to.activate(received, 1).unwrap();
    to.guest(received).unwrap().receive_finish().unwrap();
    assert_eq!(
        to.attestation_report(received, &[0; 16]),
        Err(FirmwareError::InvalidGuestState)
    );
}
