//! The host policy before each acceptance and each release, and the broker's own ledger behind every decision.
//!
//! The owner's policies judge evidence; the host policy, the same signed document as an agent's, may only refuse what they
//! accept. Here the rules of `[[guest]]` about TCB, VMPL, nonce and age of evidence meet verified claims.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use casemate_attest::broker::{
    Appraiser, Decision, DecisionLog, GuestEvidence, MEASUREMENT_CHECK, NotRecorded,
    REPORT_DATA_CHECK, Refusal, Scope, Step,
};
use casemate_attest::product::Product as AttestedProduct;
use casemate_attest::report::Report;
use casemate_attest::verify::{Check, CheckResult, Verdict};
use casemate_policy::claims::{GuestClaims, Product, Tcb};
use casemate_policy::ledger::{Entry, Outcome};
use casemate_policy::mark::{Candidate, MarkStore};
use casemate_policy::{Action, Actor, HostPolicy, Inquiry, Technology, Timestamp, decide, history};
use ring::digest::{SHA256, digest};

use super::BrokerError;
use super::acts::Acts;
use super::config::BrokerConfig;
use crate::agent::authority::PolicyText;
use crate::agent::evidence::Evidence;

/// What the broker answers to besides the owner: the host policy and its ledger.
pub struct Government {
    policy: HostPolicy,
    ledger: Evidence,
    acts: Acts,
    name: String,
}

impl Government {
    /// Admits the policy (signatures, validity, never older than before) and opens the ledger in the state folder.
    pub fn open(config: &BrokerConfig, now: SystemTime) -> Result<Self, BrokerError> {
        let refused = |e: &dyn std::fmt::Display| BrokerError::Governed(e.to_string());
        let ledger = Evidence::open(&config.state_dir, &config.name).map_err(|e| refused(&e))?;
        let text = PolicyText::read(&config.policy).map_err(|e| refused(&e))?;
        let store = MarkStore::new(&config.state_dir.join("policy.mark"));
        let mark = store.read().map_err(|e| refused(&e))?;
        let candidate: Candidate<'_> = text.candidate();
        let admitted = candidate
            .admit(
                config.policy_trust.as_ref(),
                mark.as_ref(),
                Timestamp::of(now),
            )
            .map_err(|e| refused(&e))?;
        store.raise(&admitted.mark).map_err(|e| refused(&e))?;
        let policy = admitted.policy;
        ledger
            .record_start(&config.name, &policy.digest().to_string())
            .map_err(|e| refused(&e))?;
        Ok(Self {
            policy,
            ledger,
            acts: Acts::of(&config.state_dir),
            name: config.name.clone(),
        })
    }

    /// What owners did to the store comes before what it led to.
    fn record(&self, entry: Entry) -> Result<(), NotRecorded> {
        self.acts
            .take(&self.name, |act| self.ledger.record(act))
            .and_then(|()| self.ledger.record(entry))
            .map_err(|e| NotRecorded(e.to_string()))
    }
}

impl DecisionLog for Government {
    fn record(&self, decision: &Decision) -> Result<(), NotRecorded> {
        // Whoever has no open session could fill the disk with refusals; the log has them.
        if decision
            .code
            .is_some_and(|code| SESSIONLESS.contains(&code))
            || (decision.step == Step::Auth && !decision.granted)
        {
            return Ok(());
        }
        let session = decision.session.as_deref().unwrap_or("unknown");
        let code = decision.code.unwrap_or_default();
        let entry = match (decision.step, decision.granted) {
            (Step::Auth, _) => Entry::called(&self.name, "auth", session, Outcome::Allowed),
            (Step::Release, true) => Entry::secret_released(
                &self.name,
                session,
                decision.resource.as_deref().unwrap_or_default(),
            ),
            (step, granted) => {
                let (action, outcome) = match (step, granted) {
                    (Step::Attest, true) => ("attest", Outcome::Allowed),
                    (Step::Attest, false) => ("attest", Outcome::Refused),
                    _ => ("release-secret", Outcome::Refused),
                };
                Entry::new(&self.name, action, session, outcome).code(code)
            }
        };
        let entry = match &decision.resource {
            Some(resource) => entry.with("resource", resource.as_str()),
            None => entry,
        };
        let entry = match &decision.measurement {
            Some(measurement) => entry.with("launch_digest", measurement.as_str()),
            None => entry,
        };
        let failed: Vec<String> = decision
            .verdict
            .iter()
            .flat_map(Verdict::failures)
            .map(|check| check.code.clone().unwrap_or_else(|| check.name.clone()))
            .collect();
        self.record(entry.with("failed", failed).emulated(decision.emulated))
    }
}

/// The owner's judge, over whom the host policy stands.
pub struct Governed {
    owner: Arc<dyn Appraiser>,
    government: Arc<Government>,
    /// When evidence was first accepted, newest last.
    accepted: Mutex<VecDeque<([u8; 32], SystemTime)>>,
    remember: usize,
}

impl Governed {
    /// Over the owner's judge; `sessions` may be open at a time.
    pub fn new(owner: Arc<dyn Appraiser>, government: Arc<Government>, sessions: usize) -> Self {
        Self {
            owner,
            government,
            accepted: Mutex::new(VecDeque::new()),
            remember: sessions,
        }
    }

    /// How old the evidence is, in seconds; that of a session is new.
    fn age(&self, scope: Scope<'_>, report: &Report, now: SystemTime) -> Option<u64> {
        let key: [u8; 32] = digest(&SHA256, report.as_bytes())
            .as_ref()
            .try_into()
            .ok()?;
        let mut accepted = self.accepted.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(scope, Scope::Session) {
            if accepted.len() >= self.remember {
                accepted.pop_front();
            }
            accepted.push_back((key, now));
            return Some(0);
        }
        let (_, since) = accepted.iter().rev().find(|(known, _)| *known == key)?;
        now.duration_since(*since).ok().map(|age| age.as_secs())
    }

    /// The policy's answer, recorded with all it takes to give it again; a check that can only make a verdict worse.
    fn consult(
        &self,
        scope: Scope<'_>,
        evidence: &GuestEvidence,
        verdict: &Verdict,
        now: SystemTime,
    ) -> Check {
        let technology = Technology::SevSnp;
        let emulated = verdict.emulated;
        let (object, action) = match scope {
            Scope::Session => {
                let verified = verdict.accepted() && passed(verdict, REPORT_DATA_CHECK);
                let action = Action::Attest {
                    technology,
                    emulated,
                    verified,
                };
                ("session".to_owned(), action)
            }
            Scope::Resource(path) => {
                let action = Action::ReleaseSecret {
                    technology,
                    emulated,
                    measurement_matches: verdict.accepted() && passed(verdict, MEASUREMENT_CHECK),
                };
                (path.to_string(), action)
            }
        };
        let mut inquiry = Inquiry::new(Actor::Host, &object, action, Timestamp::of(now));
        inquiry.guest = claims(&evidence.report, verdict);
        inquiry.guest.evidence_age_s = self.age(scope, &evidence.report, now);
        let decision = decide(&self.government.policy, &inquiry);
        let entry = history::entry(
            &self.government.name,
            &inquiry,
            &decision,
            self.government.policy.digest(),
        );
        let wanted = "the host policy allows it";
        if self.government.record(entry.emulated(emulated)).is_err() {
            return Check::cannot_verify(POLICY_CHECK, wanted, "not recorded", "NOT_RECORDED");
        }
        if decision.allowed {
            return Check::accepted(POLICY_CHECK, wanted, "it does");
        }
        let rules: Vec<&str> = decision.refusals().map(|reason| reason.rule).collect();
        Check::rejected(
            POLICY_CHECK,
            wanted,
            rules.join(", "),
            "HOST_POLICY_REFUSED",
        )
    }

    /// The raw report and what became of it, once a session.
    fn record_evidence(&self, evidence: &GuestEvidence, verdict: &Verdict) -> Check {
        use base64::Engine as _;
        let report = base64::engine::general_purpose::STANDARD.encode(evidence.report.as_bytes());
        let first = verdict.failures().find_map(|check| check.code.as_deref());
        let subject = hex::encode(evidence.report.report_id());
        let entry = Entry::attested(
            &self.government.name,
            &subject,
            &report,
            verdict.accepted(),
            first.unwrap_or_default(),
        );
        let checks = verdict.checks.iter().map(|check| {
            let result = serde_json::to_value(check.result).unwrap_or_default();
            format!("{}: {}", check.name, result.as_str().unwrap_or_default())
        });
        let entry = entry
            .with("checks", checks.collect::<Vec<_>>())
            .emulated(verdict.emulated);
        let wanted = "the evidence is in the ledger";
        match self.government.record(entry) {
            Ok(()) => Check::accepted(RECORD_CHECK, wanted, "it is"),
            Err(error) => {
                Check::cannot_verify(RECORD_CHECK, wanted, error.to_string(), "NOT_RECORDED")
            }
        }
    }
}

impl Appraiser for Governed {
    fn appraise(
        &self,
        scope: Scope<'_>,
        evidence: &GuestEvidence,
        report_data: &[u8; 64],
        now: SystemTime,
    ) -> Option<Verdict> {
        let mut verdict = self.owner.appraise(scope, evidence, report_data, now)?;
        let check = self.consult(scope, evidence, &verdict, now);
        verdict = verdict.and(check);
        if matches!(scope, Scope::Session) {
            let check = self.record_evidence(evidence, &verdict);
            verdict = verdict.and(check);
        }
        Some(verdict)
    }
}

fn passed(verdict: &Verdict, name: &str) -> bool {
    let mut named = verdict.checks.iter().filter(|check| check.name == name);
    named.any(|check| check.result == CheckResult::Accepted)
}

/// What a report says, and only of a report that the owner's judge accepted.
fn claims(report: &Report, verdict: &Verdict) -> GuestClaims {
    if !verdict.accepted() {
        return GuestClaims::default();
    }
    let product = report.product();
    let id_key = report.id_key_digest();
    let signer = format!("id-key:{}", hex::encode(id_key));
    GuestClaims {
        launch_digest: hex::encode(report.measurement()).parse().ok(),
        launch_signers: (id_key != [0; 48])
            .then(|| signer.parse().ok())
            .flatten()
            .into_iter()
            .collect(),
        product: product.map(|product| match product {
            AttestedProduct::Milan => Product::Milan,
            AttestedProduct::Genoa => Product::Genoa,
            AttestedProduct::Turin => Product::Turin,
        }),
        tcb: product.map(|product| {
            let found = report.reported_tcb().of(product);
            Tcb {
                fmc: found.fmc,
                boot_loader: found.boot_loader,
                tee: found.tee,
                snp: found.snp,
                microcode: found.microcode,
            }
        }),
        policy_bits: Some(report.policy().0),
        vmpl: u8::try_from(report.vmpl()).ok(),
        nonce_matches: Some(passed(verdict, REPORT_DATA_CHECK)),
        evidence_age_s: None,
    }
}

/// The host policy's check in a verdict.
const POLICY_CHECK: &str = "host_policy";
const RECORD_CHECK: &str = "evidence_recorded";
/// Codes of refusals behind which no open session stands.
const SESSIONLESS: [&str; 2] = [Refusal::NoSession.code(), Refusal::SessionExpired.code()];
