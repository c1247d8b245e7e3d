//! The key broker: whatever a guest posts, nothing is released but to a session whose report binds its nonce and its
//! key. The first byte says which message the rest is.
#![no_main]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime};

use casemate_attest::broker::evidence::GuestEvidence;
use casemate_attest::broker::protocol::{self, Attestation, ProtocolVersion};
use casemate_attest::broker::{
    Appraiser, Broker, Clock, EphemeralIssuer, Epoch, FlattenedJwe, GuestKey, Limits, LogOnly,
    MEASUREMENT_CHECK, Opened, Parts, REPORT_DATA_CHECK, Refusal, ResourcePath, ResourceStore,
    Scope, StoreError, TeePublicKey, WrappingKey,
};
use casemate_attest::verify::{Check, Verdict};
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};
use zeroize::Zeroizing;

fuzz_target!(|bytes: &[u8]| {
    let Some((message, body)) = bytes.split_first() else {
        return;
    };
    CLOCK.0.fetch_add(1000, Ordering::Relaxed);
    match message {
        b'0' => auth(body),
        b'1' => attest(body, ProtocolVersion::V0_4),
        b'2' => attest(body, ProtocolVersion::V0_3),
        b'3' => attest(body, ProtocolVersion::V0_2),
        b'4' => path(body),
        b'5' => key(body),
        b'6' => jwe(body),
        _ => {}
    }
});

fn auth(body: &[u8]) {
    let Ok(opened) = BROKER.auth(body) else {
        return;
    };
    assert!(!opened.challenge.selects_other_hash());
    assert_eq!(BROKER.open_sessions(), 1);
    // A session alone gets nothing.
    assert!(BROKER.resource(Some(&opened.session), PATH).is_err());
    assert!(BROKER.attest(Some(&opened.session), body).is_err());
}

/// As it is, a body cannot know the nonce. With the nonce and the binding put in, it may be accepted: once.
fn attest(body: &[u8], version: ProtocolVersion) {
    let opened = open(version);
    assert!(BROKER.attest(Some(&opened.session), body).is_err());
    assert!(BROKER.resource(Some(&opened.session), PATH).is_err());

    let opened = open(version);
    let Some(body) = bound(body, version, &opened.challenge.nonce) else {
        return;
    };
    match BROKER.attest(Some(&opened.session), &body) {
        Ok(accepted) => {
            assert_eq!(accepted.response.token.split('.').count(), 3);
            assert_eq!(
                BROKER.attest(Some(&opened.session), &body).unwrap_err(),
                Refusal::NonceUsed
            );
            assert!(BROKER.resource(Some(&opened.session), PATH).is_ok());
            assert!(
                BROKER
                    .resource(Some(&opened.session), "default/key/other")
                    .is_err()
            );
        }
        Err(_) => assert!(BROKER.resource(Some(&opened.session), PATH).is_err()),
    }
    // Another session's evidence.
    let other = open(version);
    assert!(BROKER.attest(Some(&other.session), &body).is_err());
}

/// The same message for this nonce, if it is one with a key and a report.
fn bound(body: &[u8], version: ProtocolVersion, nonce: &str) -> Option<Vec<u8>> {
    let parsed = Attestation::parse(body, version).ok()?;
    let evidence = GuestEvidence::parse(&parsed.evidence).ok()?;
    let sent = GuestEvidence::message(evidence.report.as_bytes(), &evidence.certificates);
    assert_eq!(GuestEvidence::parse(&sent), Ok(evidence.clone()));
    let mut report = *evidence.report.as_bytes();
    report[0x50..0x90].copy_from_slice(&parsed.report_data(nonce));
    let mut message: Value = serde_json::from_slice(body).ok()?;
    let evidence = GuestEvidence::message(&report, &evidence.certificates);
    if version == ProtocolVersion::V0_2 {
        message["tee-evidence"] = evidence;
    } else {
        message["tee-evidence"]["primary_evidence"] = evidence;
    }
    if version == ProtocolVersion::V0_4 {
        message["runtime-data"]["nonce"] = json!(nonce);
    }
    serde_json::to_vec(&message).ok()
}

fn path(body: &[u8]) {
    let Ok(text) = std::str::from_utf8(body) else {
        return;
    };
    assert!(BROKER.resource(None, text).is_err());
    assert!(BROKER.resource(Some(text), PATH).is_err());
    if let Ok(path) = text.parse::<ResourcePath>() {
        assert_eq!(path.as_str(), text);
        let parts: Vec<_> = text.split('/').collect();
        assert_eq!(parts.len(), 3);
        assert!(
            parts
                .iter()
                .all(|part| !part.is_empty() && !part.starts_with('.'))
        );
        assert!(!text.contains(['\\', '%', '?', '#', '\0']));
    }
}

/// A key that is found fit can be encrypted to.
fn key(body: &[u8]) {
    let Ok(key) = serde_json::from_slice::<TeePublicKey>(body) else {
        return;
    };
    let text = serde_json::to_vec(&key).unwrap();
    assert_eq!(serde_json::from_slice::<TeePublicKey>(&text).unwrap(), key);
    assert_ne!(
        protocol::report_data("1", &key, None),
        protocol::report_data("2", &key, None)
    );
    if let Ok(fit) = WrappingKey::new(&key) {
        assert!(FlattenedJwe::seal(b"secret", &fit).is_ok());
    }
}

/// Nobody has sealed anything to this process's key.
fn jwe(body: &[u8]) {
    if let Ok(message) = serde_json::from_slice::<FlattenedJwe>(body) {
        assert!(GUEST.open(&message).is_err());
    }
}

fn open(version: ProtocolVersion) -> Opened {
    let request = json!({ "version": version.as_str(), "tee": "snp", "extra-params": "" });
    BROKER.auth(request.to_string().as_bytes()).unwrap()
}

/// Accepts every report, so that only the broker's own checks stand in between.
struct Gullible;

impl Appraiser for Gullible {
    fn appraise(
        &self,
        scope: Scope<'_>,
        _: &GuestEvidence,
        _: &[u8; 64],
        _: SystemTime,
    ) -> Option<Verdict> {
        match scope {
            Scope::Resource(path) if path.as_str() != PATH => None,
            _ => {
                let checks = [REPORT_DATA_CHECK, MEASUREMENT_CHECK]
                    .map(|name| Check::accepted(name, "", ""));
                Some(Verdict::of(checks.to_vec(), &[], true))
            }
        }
    }
}

struct Everywhere;

impl ResourceStore for Everywhere {
    fn get(&self, _: &ResourcePath) -> Result<Option<Zeroizing<Vec<u8>>>, StoreError> {
        Ok(Some(Zeroizing::new(b"the disk's key".to_vec())))
    }
}

/// Each message comes long after the sessions of the one before have ended.
struct Ticks(AtomicU64);

impl Clock for Ticks {
    fn monotonic(&self) -> Duration {
        Duration::from_secs(self.0.load(Ordering::Relaxed))
    }

    fn wall(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_780_000_000)
    }
}

static CLOCK: LazyLock<Arc<Ticks>> = LazyLock::new(|| Arc::new(Ticks(AtomicU64::new(0))));
static GUEST: LazyLock<GuestKey> = LazyLock::new(GuestKey::generate);
static BROKER: LazyLock<Broker> = LazyLock::new(|| {
    let parts = Parts {
        appraiser: Arc::new(Gullible),
        store: Arc::new(Everywhere),
        tokens: Arc::new(EphemeralIssuer::generate().unwrap()),
        log: Arc::new(LogOnly),
        clock: CLOCK.clone(),
    };
    Broker::new(parts, Limits::default(), Epoch::durable(1))
});
const PATH: &str = "default/key/disk";
