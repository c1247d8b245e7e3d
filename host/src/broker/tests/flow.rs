//! Who gets the secret, and everybody who does not.

use casemate_agent::client::ClientError;
use casemate_attest::broker::protocol::{Attestation, report_data};
use casemate_attest::broker::{FlattenedJwe, GuestEvidence, GuestKey, Step};
use casemate_attest::processor::snp::forge::{CrlSpec, DAY, Signer, ago};

use super::*;

/// An attestation of `guest` for `nonce`, with the report bound to `bound`.
fn attestation(nonce: &str, guest: &GuestKey, bound: (&str, &GuestKey)) -> Value {
    attestation_of(nonce, guest, bound, &mut Emulated::default())
}

fn attestation_of(
    nonce: &str,
    guest: &GuestKey,
    (bound_nonce, bound_key): (&str, &GuestKey),
    source: &mut Emulated,
) -> Value {
    let bound = report_data(bound_nonce, &bound_key.public(), Some(""));
    let report = source.report(&bound).unwrap();
    let evidence = GuestEvidence::message(&report.report, &report.certificates);
    Attestation::message(nonce, &guest.public(), &evidence)
}

fn code(result: Result<impl std::fmt::Debug, ClientError>) -> (u16, String) {
    match result.unwrap_err() {
        ClientError::Refused { status, code, .. } | ClientError::Busy { status, code, .. } => {
            (status, code)
        }
        other => panic!("{other}"),
    }
}

#[test]
fn an_accepted_guest_gets_its_secret() {
    let case = Case::new();
    let running = case.start();
    for (product, key) in [
        (Product::Milan, SigningKey::Vcek),
        (Product::Genoa, SigningKey::Vlek),
        (Product::Turin, SigningKey::Vcek),
    ] {
        let mut source = Emulated {
            product,
            key,
            ..Emulated::default()
        };
        let mut client = running.client();
        assert!(client.attest(&mut source).unwrap().emulated);
        let secret = client.resource(&path(DISK)).unwrap();
        assert_eq!(secret.as_slice(), SECRET);
    }
    let decisions = running.log.0.lock().unwrap();
    assert_eq!(decisions.len(), 9);
    assert!(decisions.iter().all(|decision| decision.granted));
    let release = decisions.last().unwrap();
    assert_eq!(release.step, Step::Release);
    assert!(release.emulated && release.verdict.as_ref().unwrap().accepted());
}

#[test]
fn answers_say_emulated_and_are_not_kept() {
    let case = Case::new();
    let running = case.start();
    let guest = GuestKey::generate();
    let (session, nonce) = running.open();
    let reply = running.attest(&session, &attestation(&nonce, &guest, (&nonce, &guest)));
    assert_eq!(reply.status, 200);
    assert!(
        reply.head.contains("casemate-emulated: true"),
        "{}",
        reply.head
    );
    assert!(
        reply
            .head
            .contains("httponly; samesite=strict; max-age=300")
    );
    let reply = running.resource(&session, DISK);
    assert!(reply.head.contains("casemate-emulated: true"));
    assert!(reply.head.contains("cache-control: no-store"));
    let jwe: FlattenedJwe = serde_json::from_slice(&reply.body).unwrap();
    assert_eq!(guest.open(&jwe).unwrap().as_slice(), SECRET);
}

#[test]
fn another_launch_gets_what_its_own_policy_allows() {
    let case = Case::new();
    let running = case.start();
    let mut client = running.client();
    let mut source = Emulated {
        measurement: 0x0e,
        ..Emulated::default()
    };
    client.attest(&mut source).unwrap();
    assert_eq!(client.resource(&path(OTHER)).unwrap().as_slice(), SECRET);
    let denied = code(client.resource(&path(DISK)));
    assert_eq!(denied, (403, "POLICY_DENIED".into()));
    let denied = code(client.resource(&path("default/key/unruled")));
    assert_eq!(denied, (403, "NO_POLICY".into()));
    client.attest(&mut Emulated::default()).unwrap();
    let denied = code(client.resource(&path("default/key/none")));
    assert_eq!(denied, (404, "NO_RESOURCE".into()));
}

#[test]
fn emulated_is_refused_unless_allowed_and_named() {
    let case = Case::new();
    let other = Emulated {
        authority: Authority::other(),
        ..Emulated::default()
    };
    let (mut shared, mut unnamed) = (Emulated::default(), other);
    let running = case.start();
    let refused = code(running.client().attest(&mut unnamed));
    assert_eq!(refused, (401, "EVIDENCE_NOT_ACCEPTED".into()));
    running.stop();
    case.write("any.toml", "");
    let running = case.start();
    let refused = code(running.client().attest(&mut shared));
    assert_eq!(refused, (401, "EVIDENCE_NOT_ACCEPTED".into()));
    let decisions = running.log.0.lock().unwrap();
    let verdict = decisions.last().unwrap().verdict.as_ref().unwrap();
    assert!(!verdict.accepted());
}

#[test]
fn a_report_that_nobody_signed_is_refused() {
    let case = Case::new();
    let running = case.start();
    let guest = GuestKey::generate();
    let (session, nonce) = running.open();
    let bound = report_data(&nonce, &guest.public(), Some(""));
    let mut report = Emulated::default().report(&bound).unwrap();
    report.report[0x90] ^= 1;
    let evidence = GuestEvidence::message(&report.report, &report.certificates);
    let body = Attestation::message(&nonce, &guest.public(), &evidence);
    let reply = running.attest(&session, &body);
    assert_eq!(
        (reply.status, reply.code()),
        (401, "EVIDENCE_NOT_ACCEPTED".into())
    );
    let detail = reply.json()["detail"].as_str().unwrap().to_owned();
    assert!(detail.contains("REPORT_SIGNATURE"), "{detail}");
}

#[test]
fn the_owners_own_certificates_stand_in_for_the_guests() {
    let case = Case::new();
    let running = case.start();
    let mut bare = Emulated {
        chain: false,
        ..Emulated::default()
    };
    let refused = code(running.client().attest(&mut bare));
    assert_eq!(refused, (401, "EVIDENCE_NOT_ACCEPTED".into()));
    running.stop();
    let authority = Authority::shared();
    let identity = authority.identity();
    let vcek = identity.vcek(Product::Milan, tcb(Product::Milan)).unwrap();
    for (file, bytes) in [
        ("vcek.der", vcek.certificate()),
        ("ask.der", authority.ask()),
        ("ark.der", authority.ark()),
    ] {
        std::fs::write(case.folder.path().join(file), bytes).unwrap();
    }
    case.configure("[certificates]\nleaves = [\"vcek.der\"]\nchain = [\"ask.der\", \"ark.der\"]\n");
    let running = case.start();
    let mut client = running.client();
    client.attest(&mut bare).unwrap();
    assert_eq!(client.resource(&path(DISK)).unwrap().as_slice(), SECRET);
}

/// The older list still holds, and comes first and last.
#[test]
fn a_newer_list_that_revokes_is_not_outdone_by_an_older_one() {
    let case = Case::new();
    let authority = Authority::shared();
    let list = |file: &str, change: fn(&mut CrlSpec)| {
        std::fs::write(case.folder.path().join(file), authority.crl(change)).unwrap();
    };
    list("older.crl", |spec| spec.this_update = ago(2 * DAY));
    list("newer.crl", |spec| spec.revoked.push(Signer::Ask.serial()));
    std::fs::write(
        case.folder.path().join("other.crl"),
        Authority::other().crl(|_| {}),
    )
    .unwrap();
    for (crls, accepted) in [
        ("\"older.crl\", \"other.crl\"", true),
        ("\"other.crl\", \"older.crl\"", true),
        ("\"older.crl\", \"newer.crl\"", false),
        ("\"newer.crl\", \"older.crl\"", false),
    ] {
        case.configure(&format!("[certificates]\ncrls = [{crls}]\n"));
        let running = case.start();
        let attested = running.client().attest(&mut Emulated::default());
        if accepted {
            attested.unwrap();
        } else {
            let refused = code(attested);
            assert_eq!(refused, (401, "EVIDENCE_NOT_ACCEPTED".into()), "{crls}");
        }
        running.stop();
    }
}

#[test]
fn an_attestation_serves_once() {
    let case = Case::new();
    let running = case.start();
    let (guest, thief) = (GuestKey::generate(), GuestKey::generate());
    let (session, nonce) = running.open();
    let body = attestation(&nonce, &guest, (&nonce, &guest));
    assert_eq!(running.attest(&session, &body).status, 200);
    let replayed = running.attest(&session, &body);
    assert_eq!(
        (replayed.status, replayed.code()),
        (401, "NONCE_USED".into())
    );
    let swapped = attestation(&nonce, &thief, (&nonce, &thief));
    assert_eq!(running.attest(&session, &swapped).code(), "NONCE_USED");
    let reply = running.resource(&session, DISK);
    let jwe: FlattenedJwe = serde_json::from_slice(&reply.body).unwrap();
    assert_eq!(guest.open(&jwe).unwrap().as_slice(), SECRET);
    assert!(thief.open(&jwe).is_err());
    // In another session, and after a restart in the same and in a new one.
    let (second, _) = running.open();
    assert_eq!(running.attest(&second, &body).code(), "NONCE_MISMATCH");
    let (waiting, unanswered) = running.open();
    let late = attestation(&unanswered, &guest, (&unanswered, &guest));
    running.stop();
    let running = case.start();
    assert_eq!(running.attest(&session, &body).code(), "NO_SESSION");
    assert_eq!(running.attest(&waiting, &late).code(), "NO_SESSION");
    assert_eq!(running.resource(&session, DISK).code(), "NO_SESSION");
    let (fresh, fresh_nonce) = running.open();
    let mut renamed = late.clone();
    renamed["runtime-data"]["nonce"] = Value::String(fresh_nonce);
    assert_eq!(
        running.attest(&fresh, &renamed).code(),
        "REPORT_DATA_MISMATCH"
    );
    assert_eq!(read(&case.folder.path().join("state/epoch")), b"2\n");
}

#[test]
fn nonce_and_key_are_bound() {
    let case = Case::new();
    let running = case.start();
    let (guest, thief) = (GuestKey::generate(), GuestKey::generate());
    let (session, nonce) = running.open();
    let body = attestation(&nonce, &thief, (&nonce, &guest));
    assert_eq!(
        running.attest(&session, &body).code(),
        "REPORT_DATA_MISMATCH"
    );
    let (session, nonce) = running.open();
    let body = attestation(&nonce, &guest, ("another nonce", &guest));
    assert_eq!(
        running.attest(&session, &body).code(),
        "REPORT_DATA_MISMATCH"
    );
    assert_eq!(running.resource(&session, DISK).code(), "NO_SESSION");
}

#[test]
fn a_session_ends() {
    let case = Case::new();
    let running = case.start();
    let guest = GuestKey::generate();
    let (waiting, late) = running.open();
    let mut client = running.client();
    client.attest(&mut Emulated::default()).unwrap();
    running.clock.0.store(60, Ordering::SeqCst);
    let body = attestation(&late, &guest, (&late, &guest));
    assert_eq!(running.attest(&waiting, &body).code(), "SESSION_EXPIRED");
    assert!(client.resource(&path(DISK)).is_ok());
    running.clock.0.store(300, Ordering::SeqCst);
    let refused = code(client.resource(&path(DISK)));
    assert_eq!(refused, (401, "SESSION_EXPIRED".into()));
}

#[test]
fn what_an_owner_removes_is_gone_at_once() {
    let case = Case::new();
    let running = case.start();
    let mut client = running.client();
    client.attest(&mut Emulated::default()).unwrap();
    assert!(client.resource(&path(DISK)).is_ok());
    let store = open_store(&mut case.config()).unwrap();
    assert!(store.remove(&path(DISK)).unwrap());
    assert_eq!(
        code(client.resource(&path(DISK))),
        (404, "NO_RESOURCE".into())
    );
    let sealed = case.folder.path().join("secrets.sealed");
    let mut bytes = read(&sealed);
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&sealed, bytes).unwrap();
    let refused = code(client.resource(&path(OTHER)));
    assert_eq!(refused, (403, "POLICY_DENIED".into()));
    assert_eq!(
        code(client.resource(&path(DISK))),
        (503, "STORE_UNAVAILABLE".into())
    );
}

#[test]
fn a_policy_for_any_launch_starts_no_broker() {
    let case = Case::new();
    case.write("disk.toml", "allow_emulated = true\n");
    let mut config = case.config();
    let refused = open_with(&mut config, Arc::<Hands>::default(), Arc::<Kept>::default());
    let text = refused.err().unwrap().to_string();
    assert!(text.contains("names no launch"), "{text}");
}
