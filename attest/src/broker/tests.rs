//! The whole flow without a transport: what is released, and everything that is not.

use super::evidence::GuestEvidence;
use super::protocol::{MAX_ATTESTATION_LEN, report_data};
use super::*;
use crate::report::{REPORT_LEN, Report};
use crate::verify::Check;
use kbs_types::{HashAlgorithm, Tee};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use zeroize::Zeroizing;

const SECRET: &[u8] = b"the disk's key";
const PATH: &str = "default/key/disk";
const GOOD: u8 = 0x11;

/// Judges by the launch digest alone: the resource's own, or for a session any that is known.
/// What signatures prove is for the verifier's own tests.
struct ByDigest {
    owners: HashMap<String, u8>,
    unchecked: Mutex<Option<&'static str>>,
    emulated: bool,
}

impl Appraiser for ByDigest {
    fn appraise(
        &self,
        scope: Scope<'_>,
        evidence: &GuestEvidence,
        report_data: &[u8; 64],
        _: SystemTime,
    ) -> Option<Verdict> {
        let digest = evidence.report.measurement();
        let good = match scope {
            Scope::Session => self.owners.values().any(|byte| digest == [*byte; 48]),
            Scope::Resource(path) => digest == [*self.owners.get(path.as_str())?; 48],
        };
        let bound = evidence.report.report_data() == *report_data;
        let mut checks = Vec::new();
        for (name, holds) in [(MEASUREMENT_CHECK, good), (REPORT_DATA_CHECK, bound)] {
            checks.push(if Some(name) == *self.unchecked.lock().unwrap() {
                Check::not_checked(name, "nothing", "something")
            } else if holds {
                Check::accepted(name, "this", "this")
            } else {
                Check::rejected(name, "this", "that", "MEASUREMENT_MISMATCH")
            });
        }
        Some(Verdict::of(checks, &[], self.emulated))
    }
}

struct Memory {
    secrets: HashMap<String, Vec<u8>>,
    broken: bool,
}

impl ResourceStore for Memory {
    fn get(&self, path: &ResourcePath) -> Result<Option<Zeroizing<Vec<u8>>>, StoreError> {
        if self.broken {
            return Err(StoreError("disk on fire".into()));
        }
        let secret = self.secrets.get(path.as_str()).cloned();
        Ok(secret.map(Zeroizing::new))
    }
}

#[derive(Default)]
struct Kept {
    decisions: Mutex<Vec<Decision>>,
    full: Mutex<bool>,
}

impl DecisionLog for Kept {
    fn record(&self, decision: &Decision) -> Result<(), NotRecorded> {
        if *self.full.lock().unwrap() {
            return Err(NotRecorded("disk full".into()));
        }
        self.decisions.lock().unwrap().push(decision.clone());
        Ok(())
    }
}

#[derive(Default)]
struct Hands(AtomicU64);

impl Clock for Hands {
    fn monotonic(&self) -> Duration {
        Duration::from_secs(self.0.load(Ordering::SeqCst))
    }

    fn wall(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000) + self.monotonic()
    }
}

struct World {
    broker: Broker,
    parts: Parts,
    log: Arc<Kept>,
    clock: Arc<Hands>,
    judge: Arc<ByDigest>,
}

impl World {
    fn new() -> Self {
        Self::with(false, false)
    }

    fn with(emulated: bool, broken: bool) -> Self {
        let owners = [
            (PATH, GOOD),
            ("other/key/disk", 0x22),
            ("default/key/none", GOOD),
        ];
        let owners = owners.map(|(path, byte)| (path.to_owned(), byte));
        let judge = Arc::new(ByDigest {
            owners: owners.into(),
            unchecked: Mutex::default(),
            emulated,
        });
        let secrets = [PATH, "other/key/disk", "unruled/key/disk"]
            .map(|path| (path.to_owned(), SECRET.to_vec()));
        let log = Arc::new(Kept::default());
        let clock = Arc::new(Hands::default());
        let parts = Parts {
            appraiser: judge.clone(),
            store: Arc::new(Memory {
                secrets: secrets.into(),
                broken,
            }),
            tokens: Arc::new(EphemeralIssuer::generate().unwrap()),
            log: log.clone(),
            clock: clock.clone(),
        };
        let broker = Broker::new(parts.clone(), Limits::default(), Epoch::durable(1));
        Self {
            broker,
            parts,
            log,
            clock,
            judge,
        }
    }

    fn open(&self) -> Opened {
        let body = Request::message().to_string();
        self.broker.auth(body.as_bytes()).unwrap()
    }

    fn attest(&self, opened: &Opened, body: &Value) -> Result<Accepted, Refusal> {
        let body = body.to_string();
        self.broker.attest(Some(&opened.session), body.as_bytes())
    }

    /// A session of a guest with this launch digest.
    fn attested(&self, guest: &GuestKey, digest: u8) -> Opened {
        let opened = self.open();
        let body = attestation(&opened.challenge.nonce, guest, digest);
        self.attest(&opened, &body).unwrap();
        opened
    }

    fn resource(&self, opened: &Opened, path: &str) -> Result<Released, Refusal> {
        self.broker.resource(Some(&opened.session), path)
    }
}

fn raw_report(report_data: &[u8; 64], digest: u8) -> Vec<u8> {
    let mut raw = vec![0; REPORT_LEN];
    raw[0] = 2;
    raw[0x34] = 1;
    raw[0x50..0x90].copy_from_slice(report_data);
    raw[0x90..0xc0].fill(digest);
    Report::parse(&raw).unwrap();
    raw
}

fn attestation(nonce: &str, guest: &GuestKey, digest: u8) -> Value {
    let bound = report_data(nonce, &guest.public(), Some(""));
    let evidence = GuestEvidence::message(&raw_report(&bound, digest), &[]);
    Attestation::message(nonce, &guest.public(), &evidence)
}

#[test]
fn a_secret_reaches_the_guest_that_proved_itself() {
    let world = World::new();
    let guest = GuestKey::generate();
    let opened = world.attested(&guest, GOOD);
    for _ in 0..2 {
        let released = world.resource(&opened, PATH).unwrap();
        assert_eq!(guest.open(&released.jwe).unwrap().as_slice(), SECRET);
        assert!(!released.emulated);
    }
    let decisions = world.log.decisions.lock().unwrap();
    let steps: Vec<_> = decisions.iter().map(|d| (d.step, d.granted)).collect();
    let granted = [Step::Auth, Step::Attest, Step::Release, Step::Release];
    assert_eq!(steps, granted.map(|step| (step, true)));
    assert_eq!(decisions[2].resource.as_deref(), Some(PATH));
    assert_eq!(decisions[2].measurement, Some("11".repeat(48)));
    assert!(decisions[2].verdict.as_ref().unwrap().accepted());
    assert!(!format!("{decisions:?}").contains(&opened.session));
}

#[test]
fn a_refused_guest_has_no_session_any_more() {
    let world = World::new();
    let guest = GuestKey::generate();
    let opened = world.open();
    let body = attestation(&opened.challenge.nonce, &guest, 0x33);
    let refused = world.attest(&opened, &body).unwrap_err();
    assert_eq!(refused, Refusal::NotAccepted("MEASUREMENT_MISMATCH".into()));
    let good = attestation(&opened.challenge.nonce, &guest, GOOD);
    assert_eq!(
        world.attest(&opened, &good).unwrap_err(),
        Refusal::NoSession
    );
    assert_eq!(
        world.resource(&opened, PATH).unwrap_err(),
        Refusal::NoSession
    );
    let decisions = world.log.decisions.lock().unwrap();
    assert_eq!(decisions[1].code, Some("EVIDENCE_NOT_ACCEPTED"));
    assert!(!decisions[1].verdict.as_ref().unwrap().accepted());
}

#[test]
fn evidence_for_another_nonce_is_refused() {
    let world = World::new();
    let guest = GuestKey::generate();
    let (first, second) = (world.open(), world.open());
    let body = attestation(&first.challenge.nonce, &guest, GOOD);
    assert_eq!(
        world.attest(&second, &body).unwrap_err(),
        Refusal::NonceMismatch
    );
    // A message that names the right nonce over a report for another.
    let third = world.open();
    let mut body = attestation(&first.challenge.nonce, &guest, GOOD);
    body["runtime-data"]["nonce"] = json!(third.challenge.nonce);
    assert_eq!(
        world.attest(&third, &body).unwrap_err(),
        Refusal::ReportDataMismatch
    );
}

#[test]
fn a_nonce_serves_once_and_the_key_stays() {
    let world = World::new();
    let (guest, thief) = (GuestKey::generate(), GuestKey::generate());
    let opened = world.open();
    let body = attestation(&opened.challenge.nonce, &guest, GOOD);
    world.attest(&opened, &body).unwrap();
    assert_eq!(
        world.attest(&opened, &body).unwrap_err(),
        Refusal::NonceUsed
    );
    let swapped = attestation(&opened.challenge.nonce, &thief, GOOD);
    assert_eq!(
        world.attest(&opened, &swapped).unwrap_err(),
        Refusal::NonceUsed
    );
    let released = world.resource(&opened, PATH).unwrap();
    assert_eq!(guest.open(&released.jwe).unwrap().as_slice(), SECRET);
    assert!(thief.open(&released.jwe).is_err());
}

/// Sends the same attestation once more while the first is being judged.
struct Twice {
    judge: Arc<ByDigest>,
    again: Mutex<Option<(Arc<Broker>, String, String)>>,
    seen: Mutex<Option<Refusal>>,
}

impl Appraiser for Twice {
    fn appraise(
        &self,
        scope: Scope<'_>,
        evidence: &GuestEvidence,
        report_data: &[u8; 64],
        now: SystemTime,
    ) -> Option<Verdict> {
        let again = self.again.lock().unwrap().take();
        if let Some((broker, session, body)) = again {
            *self.seen.lock().unwrap() = broker.attest(Some(&session), body.as_bytes()).err();
        }
        self.judge.appraise(scope, evidence, report_data, now)
    }
}

#[test]
fn a_nonce_serves_once_even_while_it_is_being_judged() {
    let world = World::new();
    let twice = Arc::new(Twice {
        judge: world.judge.clone(),
        again: Mutex::default(),
        seen: Mutex::default(),
    });
    let mut parts = world.parts.clone();
    parts.appraiser = twice.clone();
    let broker = Arc::new(Broker::new(parts, Limits::default(), Epoch::durable(1)));
    let opened = broker
        .auth(Request::message().to_string().as_bytes())
        .unwrap();
    let session = opened.session.clone();
    let body = attestation(&opened.challenge.nonce, &GuestKey::generate(), GOOD).to_string();
    *twice.again.lock().unwrap() = Some((broker.clone(), session.clone(), body.clone()));
    broker.attest(Some(&session), body.as_bytes()).unwrap();
    assert_eq!(*twice.seen.lock().unwrap(), Some(Refusal::NonceUsed));
    assert!(broker.resource(Some(&session), PATH).is_ok());
}

#[test]
fn a_key_that_the_report_does_not_bind_is_refused() {
    let world = World::new();
    let opened = world.open();
    let mut body = attestation(&opened.challenge.nonce, &GuestKey::generate(), GOOD);
    body["runtime-data"]["tee-pubkey"] = json!(GuestKey::generate().public());
    assert_eq!(
        world.attest(&opened, &body).unwrap_err(),
        Refusal::ReportDataMismatch
    );
    // Nor does it help a judge who looks elsewhere.
    *world.judge.unchecked.lock().unwrap() = Some(REPORT_DATA_CHECK);
    let opened = world.open();
    let body = attestation(&opened.challenge.nonce, &GuestKey::generate(), GOOD);
    let refused = world.attest(&opened, &body).unwrap_err();
    assert_eq!(
        refused,
        Refusal::NotAccepted("report_data was not checked".into())
    );
}

#[test]
fn a_restart_forgets_every_challenge_and_repeats_none() {
    let world = World::new();
    let guest = GuestKey::generate();
    let waiting = world.open();
    let attested = world.attested(&guest, GOOD);
    let broker = Broker::new(world.parts.clone(), Limits::default(), Epoch::durable(2));
    let body = attestation(&waiting.challenge.nonce, &guest, GOOD).to_string();
    let replayed = broker.attest(Some(&waiting.session), body.as_bytes());
    assert_eq!(replayed.unwrap_err(), Refusal::NoSession);
    let replayed = broker.resource(Some(&attested.session), PATH);
    assert_eq!(replayed.unwrap_err(), Refusal::NoSession);
    // A new session of the new start does not take the old evidence either.
    let fresh = broker
        .auth(Request::message().to_string().as_bytes())
        .unwrap();
    let replayed = broker.attest(Some(&fresh.session), body.as_bytes());
    assert_eq!(replayed.unwrap_err(), Refusal::NonceMismatch);
    // Even where randomness repeats itself, epoch and counter keep nonces apart.
    use base64::Engine;
    let head = |nonce: &str| {
        let bytes = base64::engine::general_purpose::STANDARD.decode(nonce);
        bytes.unwrap()[..16].to_vec()
    };
    let heads = [&waiting, &attested, &fresh].map(|opened| head(&opened.challenge.nonce));
    assert_eq!(heads[0], [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1]);
    assert_eq!(heads[1], [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2]);
    assert_eq!(heads[2], [0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 1]);
}

#[test]
fn sessions_end() {
    let world = World::new();
    let guest = GuestKey::generate();
    let waiting = world.open();
    let attested = world.attested(&guest, GOOD);
    world.clock.0.store(60, Ordering::SeqCst);
    let body = attestation(&waiting.challenge.nonce, &guest, GOOD);
    assert_eq!(
        world.attest(&waiting, &body).unwrap_err(),
        Refusal::SessionExpired
    );
    assert!(world.resource(&attested, PATH).is_ok());
    world.clock.0.store(300, Ordering::SeqCst);
    assert_eq!(
        world.resource(&attested, PATH).unwrap_err(),
        Refusal::SessionExpired
    );
    assert_eq!(
        world.resource(&attested, PATH).unwrap_err(),
        Refusal::NoSession
    );
}

#[test]
fn a_thousand_sessions_and_no_more() {
    let world = World::new();
    for _ in 0..1000 {
        world.open();
    }
    let body = Request::message().to_string();
    let refused = world.broker.auth(body.as_bytes()).unwrap_err();
    assert_eq!(refused, Refusal::TooManySessions);
    assert_eq!(world.broker.open_sessions(), 1000);
    world.clock.0.store(60, Ordering::SeqCst);
    world.open();
    assert_eq!(world.broker.open_sessions(), 1);
}

#[test]
fn each_resource_has_its_own_policy() {
    let world = World::new();
    let guest = GuestKey::generate();
    let opened = world.attested(&guest, 0x22);
    let denied = |path: &str| world.resource(&opened, path).unwrap_err().code();
    assert!(world.resource(&opened, "other/key/disk").is_ok());
    assert_eq!(denied(PATH), "POLICY_DENIED");
    assert_eq!(denied("default/key/none"), "POLICY_DENIED");
    assert_eq!(denied("unruled/key/disk"), "NO_POLICY");
    assert_eq!(denied("../key/disk"), "BAD_RESOURCE_PATH");
    let owner = world.attested(&guest, GOOD);
    let none = world.resource(&owner, "default/key/none");
    assert_eq!(none.unwrap_err(), Refusal::NotFound);
}

#[test]
fn a_resource_takes_a_measurement_that_was_checked() {
    let world = World::new();
    let opened = world.attested(&GuestKey::generate(), GOOD);
    *world.judge.unchecked.lock().unwrap() = Some(MEASUREMENT_CHECK);
    let refused = world.resource(&opened, PATH).unwrap_err();
    assert_eq!(
        refused,
        Refusal::PolicyDenied("measurement was not checked".into())
    );
    *world.judge.unchecked.lock().unwrap() = Some(REPORT_DATA_CHECK);
    let refused = world.resource(&opened, PATH).unwrap_err();
    assert_eq!(
        refused,
        Refusal::PolicyDenied("report_data was not checked".into())
    );
}

#[test]
fn before_it_is_attested_a_session_gets_nothing() {
    let world = World::new();
    let opened = world.open();
    assert_eq!(
        world.resource(&opened, PATH).unwrap_err(),
        Refusal::NotAttested
    );
    assert_eq!(
        world.broker.resource(None, PATH).unwrap_err(),
        Refusal::NoSession
    );
    assert_eq!(
        world.broker.attest(None, b"{}").unwrap_err(),
        Refusal::NoSession
    );
    assert_eq!(
        world.broker.resource(Some("x"), PATH).unwrap_err(),
        Refusal::NoSession
    );
}

#[test]
fn what_cannot_be_recorded_is_not_done() {
    let world = World::new();
    let guest = GuestKey::generate();
    let (waiting, attested) = (world.open(), world.attested(&guest, GOOD));
    *world.log.full.lock().unwrap() = true;
    let body = attestation(&waiting.challenge.nonce, &guest, GOOD);
    assert_eq!(
        world.attest(&waiting, &body).unwrap_err(),
        Refusal::NotRecorded
    );
    assert_eq!(
        world.resource(&attested, PATH).unwrap_err(),
        Refusal::NotRecorded
    );
    *world.log.full.lock().unwrap() = false;
    assert_eq!(
        world.resource(&waiting, PATH).unwrap_err(),
        Refusal::NoSession
    );
    assert!(world.resource(&attested, PATH).is_ok());
}

#[test]
fn a_broken_store_says_no_more_than_that() {
    let world = World::with(true, true);
    let opened = world.attested(&GuestKey::generate(), GOOD);
    let refused = world.resource(&opened, PATH).unwrap_err();
    assert_eq!(refused, Refusal::Store);
    assert!(!refused.information().detail.contains("fire"));
}

#[test]
fn emulated_is_said_everywhere() {
    let world = World::with(true, false);
    let guest = GuestKey::generate();
    let opened = world.open();
    let body = attestation(&opened.challenge.nonce, &guest, GOOD);
    let accepted = world.attest(&opened, &body).unwrap();
    assert!(accepted.emulated);
    use base64::Engine;
    let claims = accepted.response.token.split('.').nth(1).unwrap();
    let claims = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(claims);
    let claims: Value = serde_json::from_slice(&claims.unwrap()).unwrap();
    assert_eq!(claims["emulated"], true);
    assert_eq!(claims["exp"], 1_700_000_300);
    assert_eq!(claims["tee-pubkey"], json!(guest.public()));
    assert!(world.resource(&opened, PATH).unwrap().emulated);
    let decisions = world.log.decisions.lock().unwrap();
    assert!(decisions.iter().skip(1).all(|decision| decision.emulated));
}

#[test]
fn the_token_is_signed() {
    use base64::Engine;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    use ring::signature::{ECDSA_P384_SHA384_FIXED, UnparsedPublicKey};
    let issuer = EphemeralIssuer::generate().unwrap();
    let verdict = Verdict::of(Vec::new(), &[], false);
    let token = issuer.issue(&TokenSubject {
        verdict: &verdict,
        key: &GuestKey::generate().public(),
        at: SystemTime::UNIX_EPOCH,
        lifetime: Duration::from_secs(1),
    });
    let token = token.unwrap();
    let (signed, signature) = token.rsplit_once('.').unwrap();
    let signature = URL_SAFE_NO_PAD.decode(signature).unwrap();
    let key = UnparsedPublicKey::new(&ECDSA_P384_SHA384_FIXED, issuer.public_key());
    key.verify(signed.as_bytes(), &signature).unwrap();
}

#[test]
fn requests_are_refused_by_name() {
    let world = World::new();
    let request = |version: &str, tee: &str, extra: Value| {
        let body = json!({ "version": version, "tee": tee, "extra-params": extra });
        world.broker.auth(body.to_string().as_bytes())
    };
    for version in ["0.2.0", "0.3.0", "0.4.0"] {
        let opened = request(version, "snp", json!("")).unwrap();
        assert_eq!(opened.challenge.extra_params, json!(""));
    }
    for version in ["0.1.0", "0.1.1", "0.4.1", "0.5.0", "1.0.0", "", "0.4", "x"] {
        let refused = request(version, "snp", json!("")).unwrap_err();
        assert_eq!(refused.code(), "PROTOCOL_VERSION", "{version}");
        assert_eq!(refused.status(), 401);
        let information = refused.information();
        assert_eq!(
            information.error_type,
            "urn:casemate:broker:PROTOCOL_VERSION"
        );
    }
    for tee in ["tdx", "sample", "SNP", "", "snp\u{1b}[31m"] {
        let refused = request("0.4.0", tee, json!("")).unwrap_err();
        assert_eq!(refused.code(), "UNKNOWN_TEE", "{tee}");
        assert!(!refused.to_string().contains('\u{1b}'));
    }
    let hashes = json!({ "supported-hash-algorithms": ["sha256", "SHA384"] });
    let selected = request("0.4.0", "snp", hashes).unwrap().challenge;
    assert_eq!(
        selected.extra_params,
        json!({ "selected-hash-algorithm": "sha384" })
    );
    assert!(!selected.selects_other_hash());
    let hashes = json!({ "supported-hash-algorithms": ["sha256"] });
    let refused = request("0.4.0", "snp", hashes).unwrap_err();
    assert_eq!(refused, Refusal::NoCommonHash);
    let metadata = json!({ "tee-metadata": { "primary_tee": { "tee": "tdx" } } });
    let refused = request("0.4.0", "snp", metadata).unwrap_err();
    assert_eq!(refused.code(), "UNKNOWN_TEE");
}

#[test]
fn malformed_and_oversized_bodies_are_refused_at_each_step() {
    let world = World::new();
    for body in ["", "{", "[]", "null", "{\"version\":1}", "\u{0}"] {
        let refused = world.broker.auth(body.as_bytes()).unwrap_err();
        assert_eq!(refused.code(), "MALFORMED", "{body:?}");
        let opened = world.open();
        let refused = world.broker.attest(Some(&opened.session), body.as_bytes());
        assert_eq!(refused.unwrap_err().code(), "MALFORMED", "{body:?}");
    }
    let deep = "[".repeat(100_000);
    assert_eq!(
        world.broker.auth(deep.as_bytes()).unwrap_err().code(),
        "BODY_TOO_LARGE"
    );
    let opened = world.open();
    let refused = world.broker.attest(Some(&opened.session), deep.as_bytes());
    assert_eq!(refused.unwrap_err().code(), "MALFORMED");
    let opened = world.open();
    let long = " ".repeat(MAX_ATTESTATION_LEN + 1);
    let refused = world.broker.attest(Some(&opened.session), long.as_bytes());
    assert_eq!(refused.unwrap_err().code(), "BODY_TOO_LARGE");
}

#[test]
fn what_is_malformed_inside_an_attestation_is_refused() {
    let world = World::new();
    let guest = GuestKey::generate();
    let refused = |change: &dyn Fn(&mut Value)| {
        let opened = world.open();
        let mut body = attestation(&opened.challenge.nonce, &guest, GOOD);
        change(&mut body);
        world.attest(&opened, &body).unwrap_err().code()
    };
    let key = "tee-pubkey";
    assert_eq!(
        refused(&|b| b["runtime-data"][key]["kty"] = json!("OKP")),
        "MALFORMED"
    );
    assert_eq!(
        refused(&|b| b["runtime-data"][key]["kid"] = json!("1")),
        "MALFORMED"
    );
    assert_eq!(
        refused(&|b| b["runtime-data"][key]["crv"] = json!("P-256")),
        "KEY_REFUSED"
    );
    assert_eq!(refused(&|b| b["tee-evidence"] = json!({})), "MALFORMED");
    let primary = |b: &mut Value, v: Value| b["tee-evidence"]["primary_evidence"] = v;
    assert_eq!(refused(&|b| primary(b, json!("report"))), "MALFORMED");
    assert_eq!(refused(&|b| primary(b, json!({}))), "MALFORMED");
    assert_eq!(
        refused(&|b| primary(b, json!({ "attestation_report": [1] }))),
        "MALFORMED"
    );
    let device = |b: &mut Value| {
        b["tee-evidence"]["additional_evidence"] = json!("{\"nvidia\":[]}");
    };
    assert_eq!(refused(&device), "ADDITIONAL_EVIDENCE");
}

#[test]
fn older_versions_bind_as_they_did() {
    let world = World::new();
    let guest = GuestKey::generate();
    for (version, additional) in [("0.2.0", None), ("0.3.0", Some("{}"))] {
        let request = json!({ "version": version, "tee": "snp", "extra-params": "" });
        let opened = world.broker.auth(request.to_string().as_bytes()).unwrap();
        let bound = report_data(&opened.challenge.nonce, &guest.public(), additional);
        let primary = GuestEvidence::message(&raw_report(&bound, GOOD), &[]);
        let evidence = match additional {
            None => primary,
            Some(text) => json!({ "primary_evidence": primary, "additional_evidence": text }),
        };
        let body = json!({ "tee-pubkey": guest.public(), "tee-evidence": evidence });
        world.attest(&opened, &body).unwrap();
        let released = world.resource(&opened, PATH).unwrap();
        assert_eq!(guest.open(&released.jwe).unwrap().as_slice(), SECRET);
    }
}

// The types that guest components use read what is sent, and write what is read.
#[test]
fn kbs_types_speaks_the_same() {
    let world = World::new();
    let request = kbs_types::Request {
        version: "0.4.0".into(),
        tee: Tee::Snp,
        extra_params: json!({ "supported-hash-algorithms": HashAlgorithm::list_all() }),
    };
    let opened = world
        .broker
        .auth(&serde_json::to_vec(&request).unwrap())
        .unwrap();
    let challenge = serde_json::to_string(&opened.challenge).unwrap();
    let challenge: kbs_types::Challenge = serde_json::from_str(&challenge).unwrap();
    let guest = GuestKey::generate();
    let key = serde_json::to_value(guest.public()).unwrap();
    let runtime_data = kbs_types::RuntimeData {
        nonce: challenge.nonce.clone(),
        tee_pubkey: serde_json::from_value(key).unwrap(),
    };
    // As the client of the guest components hashes it: sorted names, no blanks.
    let text = format!(
        "{{\"additional-evidence\":\"\",\"nonce\":\"{}\",\"tee-pubkey\":{}}}",
        challenge.nonce,
        sorted(&serde_json::to_value(&runtime_data.tee_pubkey).unwrap()),
    );
    let mut bound = HashAlgorithm::Sha384.digest(text.as_bytes());
    bound.resize(64, 0);
    let report = raw_report(&bound.try_into().unwrap(), GOOD);
    let attestation = kbs_types::Attestation {
        init_data: None,
        runtime_data,
        tee_evidence: kbs_types::CompositeEvidence {
            primary_evidence: json!({ "attestation_report": report, "cert_chain": null }),
            additional_evidence: String::new(),
        },
    };
    let body = serde_json::to_vec(&attestation).unwrap();
    world.broker.attest(Some(&opened.session), &body).unwrap();
    let released = world.resource(&opened, PATH).unwrap();
    let sent = serde_json::to_string(&released.jwe).unwrap();
    let response: kbs_types::Response = serde_json::from_str(&sent).unwrap();
    // The client authenticates the header as it writes it, not as it came.
    let aad = response.protected.generate_aad().unwrap();
    assert_eq!(aad, released.jwe.protected.as_bytes());
    let again: FlattenedJwe =
        serde_json::from_value(serde_json::to_value(&response).unwrap()).unwrap();
    assert_eq!(again, released.jwe);
    assert_eq!(guest.open(&again).unwrap().as_slice(), SECRET);
    let error = serde_json::to_string(&Refusal::NoSession.information()).unwrap();
    let error: kbs_types::ErrorInformation = serde_json::from_str(&error).unwrap();
    assert_eq!(error.error_type, "urn:casemate:broker:NO_SESSION");
}

fn sorted(object: &Value) -> String {
    let members: std::collections::BTreeMap<_, _> = object.as_object().unwrap().iter().collect();
    serde_json::to_string(&members).unwrap()
}
