//! Decisions of the past: how they are written down, why they came out so, and which would come out otherwise now.

use serde::Serialize;

use crate::claims::{Actor, Asking, Inquiry};
use crate::document::HostPolicy;
use crate::evaluate::{Decision, decide, may_ask};
use crate::ledger::{Detail, Entry, Outcome, Record};
use crate::types::{Fingerprint, Timestamp};

/// The record of a decision, with all that it takes to make it again: the inquiry in detail `input`, the digest of the
/// policy in detail `policy`.
pub fn entry(actor: &str, inquiry: &Inquiry, decision: &Decision, policy: Fingerprint) -> Entry {
    let emulated = inquiry.action.technology().is_some_and(|(_, e)| e);
    Entry::decided(actor, inquiry.action.name(), &inquiry.object, decision)
        .emulated(emulated)
        .with(INPUT, inquiry.canonical())
        .with(POLICY, policy.to_string())
}

/// The same of a decision on whether somebody may ask at all; that question is in detail `asked`.
pub fn entry_of_asking(
    actor: &str,
    asking: &Asking,
    decision: &Decision,
    policy: Fingerprint,
) -> Entry {
    let object = asking.object.as_deref().unwrap_or_default();
    Entry::decided(actor, asking.kind.as_str(), object, decision)
        .with(ASKED, asking.canonical())
        .with(POLICY, policy.to_string())
}

/// What was asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Question {
    /// Whether something may be done.
    Whole(Box<Inquiry>),
    /// Whether somebody may ask for it at all.
    First(Asking),
}

impl Question {
    /// The policy's answer.
    pub fn put_to(&self, policy: &HostPolicy) -> Decision {
        match self {
            Self::Whole(inquiry) => decide(policy, inquiry),
            Self::First(asking) => may_ask(policy, asking),
        }
    }

    /// Who asked.
    pub const fn actor(&self) -> &Actor {
        match self {
            Self::Whole(inquiry) => &inquiry.actor,
            Self::First(asking) => &asking.actor,
        }
    }
}

/// A decision as a record has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recorded {
    /// Its place in the log.
    pub seq: u64,
    /// When, by the wall clock.
    pub time: Timestamp,
    /// What was asked for.
    pub action: String,
    /// What it was to be done to.
    pub object: String,
    /// Whether it was allowed.
    pub allowed: bool,
    /// The code.
    pub code: String,
    /// The policy that decided.
    pub policy: Option<Fingerprint>,
    /// The question; records of older versions have none.
    pub question: Option<Question>,
}

impl Recorded {
    /// The decision in a record; none in a record of something else.
    pub fn of(record: &Record) -> Option<Self> {
        let allowed = match record.outcome {
            Outcome::Allowed => true,
            Outcome::Refused => false,
            _ => return None,
        };
        let text = |name: &str| match record.detail.get(name) {
            Some(Detail::Text(text)) => Some(text.as_str()),
            _ => None,
        };
        Some(Self {
            seq: record.seq,
            time: moment(&record.time)?,
            action: record.action.clone(),
            object: record.object.clone(),
            allowed,
            code: record.code.clone(),
            policy: text(POLICY).and_then(|digest| digest.parse().ok()),
            question: text(INPUT)
                .and_then(Inquiry::from_canonical)
                .map(|inquiry| Question::Whole(Box::new(inquiry)))
                .or_else(|| Some(Question::First(Asking::from_canonical(text(ASKED)?)?))),
        })
    }

    /// Makes the decision again, by the policy that made it; `find` knows policies by their digest.
    pub fn explain(
        &self,
        find: impl FnOnce(Fingerprint) -> Option<HostPolicy>,
    ) -> Result<Explained, Unexplained> {
        let seq = self.seq;
        let question = self.question.clone().ok_or(Unexplained::NoInput { seq })?;
        let digest = self.policy.ok_or(Unexplained::NoPolicy { seq })?;
        let policy = find(digest)
            .filter(|policy| policy.digest() == digest)
            .ok_or(Unexplained::PolicyUnknown { seq, digest })?;
        let decision = question.put_to(&policy);
        Ok(Explained {
            seq,
            policy: digest,
            agrees: decision.allowed == self.allowed && decision.code.as_str() == self.code,
            recorded: self.code.clone(),
            question,
            decision,
        })
    }
}

/// A decision made again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Explained {
    /// The record.
    pub seq: u64,
    /// The policy that decided.
    pub policy: Fingerprint,
    /// Whether it comes out as it is recorded. If not, another version of Casemate, or a Rego policy, decided then.
    pub agrees: bool,
    /// The recorded code.
    pub recorded: String,
    /// The question.
    pub question: Question,
    /// The answer, with every rule.
    pub decision: Decision,
}

/// Why a decision cannot be made again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unexplained {
    /// The record does not say what was asked.
    #[error(
        "record {seq} does not hold what was asked, as records of older versions do not; its reasons are all there is"
    )]
    NoInput {
        /// The record.
        seq: u64,
    },
    /// The record does not say by which policy.
    #[error("record {seq} does not say which policy decided")]
    NoPolicy {
        /// The record.
        seq: u64,
    },
    /// Nobody has that policy.
    #[error(
        "record {seq} was decided by policy {digest}, which is not among the policies given; name its file or folder"
    )]
    PolicyUnknown {
        /// The record.
        seq: u64,
        /// The policy.
        digest: Fingerprint,
    },
}

/// What another policy would have decided otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// Decisions that were compared.
    pub compared: u64,
    /// Decisions that hold no input, and were not.
    pub not_comparable: u64,
    /// The ones that come out otherwise.
    pub changed: Vec<Changed>,
}

/// A decision that comes out otherwise.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Changed {
    /// The record.
    pub seq: u64,
    /// When.
    pub time: Timestamp,
    /// What was asked for.
    pub action: String,
    /// What it was to be done to.
    pub object: String,
    /// Whether it was allowed.
    pub was_allowed: bool,
    /// The code then.
    pub was: String,
    /// The decision now.
    pub now: Decision,
}

/// Compares decisions since a moment with those of `new`: as they were recorded, or, with `old`, as that policy decides
/// them. A decision changes if its answer or its code does.
pub fn diff(
    recorded: impl IntoIterator<Item = Recorded>,
    since: Timestamp,
    old: Option<&HostPolicy>,
    new: &HostPolicy,
) -> Difference {
    let mut difference = Difference::default();
    for one in recorded.into_iter().filter(|one| one.time >= since) {
        let Some(question) = one.question else {
            difference.not_comparable += 1;
            continue;
        };
        difference.compared += 1;
        let (was_allowed, was) = match old {
            Some(old) => {
                let before = question.put_to(old);
                (before.allowed, before.code.as_str().to_owned())
            }
            None => (one.allowed, one.code),
        };
        let now = question.put_to(new);
        if now.allowed != was_allowed || now.code.as_str() != was {
            difference.changed.push(Changed {
                seq: one.seq,
                time: one.time,
                action: one.action,
                object: one.object,
                was_allowed,
                was,
                now,
            });
        }
    }
    difference
}

/// Record times have fractions of a second; decisions are compared by whole ones.
fn moment(text: &str) -> Option<Timestamp> {
    humantime::parse_rfc3339(text).ok().map(Timestamp::of)
}

const INPUT: &str = "input";
const ASKED: &str = "asked";
const POLICY: &str = "policy";

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::action::{Action, ActionKind};
    use crate::claims::Actor;
    use crate::ledger::{Ledger, Signer, VerifyingKey, verify};
    use crate::types::Technology;

    fn policy(vcpus: u16) -> HostPolicy {
        let text = format!(
            "host = {{ name = 'h' }}\ntechnologies = {{ allowed = ['sev'] }}\n\
             limits = {{ max_vcpus = {vcpus}, max_memory_mib = 64 }}\n"
        );
        HostPolicy::parse("p", &text).unwrap()
    }

    fn launch(vcpus: u16) -> Inquiry {
        let action = Action::Launch {
            technology: Technology::Sev,
            emulated: false,
            vcpus,
            memory_mib: 64,
            policy_bits: 1,
        };
        let actor = Actor::Local { uid: 0 };
        Inquiry::new(actor, "vm", action, "2026-06-01T00:00:00Z".parse().unwrap())
    }

    /// Decisions for 1 to 4 vCPUs under a limit of 2, a record of another kind, and one without input: by way of a file.
    fn log() -> Vec<Record> {
        let mut ledger = scratch();
        let policy = policy(2);
        for vcpus in 1..=4 {
            let inquiry = launch(vcpus);
            let decision = decide(&policy, &inquiry);
            let entry = entry("operator", &inquiry, &decision, policy.digest());
            ledger.append(entry).unwrap();
        }
        ledger
            .append(Entry::new("a", "start", "h", Outcome::Done))
            .unwrap();
        let decision = decide(&policy, &launch(9));
        ledger
            .append(Entry::decided("a", "launch", "vm", &decision))
            .unwrap();
        ledger.verified()
    }

    struct Scratch {
        folder: tempfile::TempDir,
        public: VerifyingKey,
        ledger: Ledger,
    }

    fn scratch() -> Scratch {
        let folder = tempfile::tempdir().unwrap();
        let random = ring::rand::SystemRandom::new();
        let key = ring::signature::Ed25519KeyPair::generate_pkcs8(&random).unwrap();
        let signer = Signer::from_pkcs8("h", key.as_ref()).unwrap();
        let public = signer.verifying_key();
        let ledger = Ledger::open(&folder.path().join("ledger"), signer).unwrap();
        Scratch {
            folder,
            public,
            ledger,
        }
    }

    impl Scratch {
        fn append(&mut self, entry: Entry) -> Result<(), crate::ledger::LedgerError> {
            self.ledger.append(entry).map(|_| ())
        }

        /// What an auditor reads.
        fn verified(mut self) -> Vec<Record> {
            self.ledger.checkpoint().unwrap();
            drop(self.ledger);
            let path = self.folder.path().join("ledger");
            verify(&path, &self.public).unwrap().records().to_vec()
        }
    }

    #[test]
    fn a_decision_is_explained_by_the_policy_that_made_it() {
        let recorded: Vec<_> = log().iter().filter_map(Recorded::of).collect();
        assert_eq!(recorded.len(), 5);
        let codes: Vec<_> = recorded.iter().map(|r| r.code.as_str()).collect();
        assert_eq!(
            codes[..4],
            ["allowed", "allowed", "too-many-vcpus", "too-many-vcpus"]
        );
        let known: BTreeMap<_, _> = [policy(2), policy(9)].map(|p| (p.digest(), p)).into();
        let explained = recorded[2].explain(|d| known.get(&d).cloned()).unwrap();
        assert!(explained.agrees);
        let broken = explained.decision.refusals().next().unwrap();
        assert_eq!(
            (broken.rule, broken.wanted.as_str(), broken.found.as_str()),
            ("limits.max_vcpus", "1 to 2 vCPUs", "3")
        );
        // Not by another, not without input, and not silently if it comes out otherwise.
        let digest = policy(2).digest();
        assert_eq!(
            recorded[2].explain(|_| Some(policy(9))),
            Err(Unexplained::PolicyUnknown { seq: 2, digest })
        );
        assert_eq!(
            recorded[4].explain(|_| Some(policy(2))),
            Err(Unexplained::NoInput { seq: 5 })
        );
        let mut forged = recorded[2].clone();
        forged.code = "allowed".to_owned();
        forged.allowed = true;
        assert!(!forged.explain(|_| Some(policy(2))).unwrap().agrees);
    }

    #[test]
    fn who_was_not_heard_is_explained_and_compared_too() {
        let people = |uid: u32| {
            let text = format!(
                "host = {{ name = 'h' }}\ntechnologies = {{ allowed = ['sev'] }}\n\
                 limits = {{ max_vcpus = 2, max_memory_mib = 64 }}\n\
                 person = [{{ name = 'olga', role = 'operator', uid = {uid} }}]\n"
            );
            HostPolicy::parse("p", &text).unwrap()
        };
        let (then, now) = (people(7), people(8));
        let asking = Asking {
            actor: Actor::Local { uid: 8 },
            kind: ActionKind::Launch,
            object: None,
            files: Vec::new(),
        };
        let decision = may_ask(&then, &asking);
        let entry = entry_of_asking("uid 8", &asking, &decision, then.digest());
        let mut ledger = scratch();
        ledger.append(entry).unwrap();
        let records = ledger.verified();
        let recorded = Recorded::of(&records[0]).unwrap();
        assert_eq!(recorded.question, Some(Question::First(asking)));
        let explained = recorded.explain(|_| Some(then.clone())).unwrap();
        assert!(explained.agrees && !explained.decision.allowed);
        let changed = diff([recorded], Timestamp::from_unix(0), None, &now).changed;
        assert!(changed[0].now.allowed && !changed[0].was_allowed);
    }

    #[test]
    fn a_diff_shows_what_comes_out_otherwise() {
        let all = || log().iter().filter_map(Recorded::of).collect::<Vec<_>>();
        let ever = Timestamp::from_unix(0);
        let none = diff(all(), ever, None, &policy(2));
        assert_eq!(
            (none.compared, none.not_comparable, none.changed.len()),
            (4, 1, 0)
        );
        let wider = diff(all(), ever, None, &policy(3));
        let changed: Vec<_> = wider
            .changed
            .iter()
            .map(|c| (c.seq, c.was.as_str(), c.now.allowed))
            .collect();
        assert_eq!(changed, [(2, "too-many-vcpus", true)]);
        let narrower = diff(all(), ever, None, &policy(1));
        assert_eq!(
            narrower.changed.iter().map(|c| c.seq).collect::<Vec<_>>(),
            [1]
        );
        // Against another policy than the one that was in force.
        let between = diff(all(), ever, Some(&policy(4)), &policy(3));
        assert_eq!(
            between.changed.iter().map(|c| c.seq).collect::<Vec<_>>(),
            [3]
        );
        let later = Timestamp::from_unix(u64::MAX);
        assert_eq!(diff(all(), later, None, &policy(1)), Difference::default());
    }
}
