//! The records that a host makes, each with what it must say. One place, so that what is searched for is what was written.

use super::record::{Entry, Outcome};

/// What was started.
#[derive(Clone, Debug)]
pub struct Start<'a> {
    /// The host.
    pub host: &'a str,
    /// Version of the software.
    pub version: &'a str,
    /// SHA-256 of the running program, hex.
    pub binary: &'a str,
    /// Digest of the policy in force.
    pub policy: &'a str,
    /// What holds the host's roles, one item a mechanism (`landlock-abi=7`, `seccomp=enforcing`, …).
    pub sandbox: Vec<String>,
}

/// A migration, as far as it is known.
#[derive(Clone, Debug, Default)]
pub struct Migration<'a> {
    /// The other host's name in the policy.
    pub peer: &'a str,
    /// TLS cipher suite.
    pub suite: Option<&'a str>,
    /// Key agreement group.
    pub group: Option<&'a str>,
    /// SHA-256 of the TLS exporter that binds the session, hex. Never the exporter itself.
    pub exporter_sha256: Option<&'a str>,
    /// Root of the whole transcript's manifest, hex.
    pub manifest_root: Option<&'a str>,
    /// Pause of the guest in microseconds.
    pub downtime_us: Option<u64>,
}

impl Entry {
    /// The agent began: action `start`.
    pub fn started(start: Start<'_>) -> Self {
        Self::new("agent", "start", start.host, Outcome::Done)
            .with("version", start.version)
            .with("binary_sha256", start.binary)
            .with("policy", start.policy)
            .with("sandbox", start.sandbox)
    }

    /// A policy was put in force: action `policy-load`. `version` counts up; 0 for documents that have none.
    pub fn policy_loaded(actor: &str, file: &str, digest: &str, version: u64) -> Self {
        Self::new(actor, "policy-load", file, Outcome::Done)
            .with("digest", digest)
            .with("version", version)
    }

    /// A guest was launched: action `launch`. `inputs` are names and SHA-256 (hex) of what was measured.
    pub fn launched(actor: &str, guest: &str, measurement: &str, inputs: &[(&str, &str)]) -> Self {
        let entry =
            Self::new(actor, "launch", guest, Outcome::Done).with("measurement", measurement);
        inputs.iter().fold(entry, |entry, (name, digest)| {
            entry.with(&format!("input.{name}"), *digest)
        })
    }

    /// Something that had been allowed did not come about; `code` and `reason` say why.
    pub fn failed(actor: &str, action: &str, object: &str, code: &str, reason: &str) -> Self {
        let reason: String = reason.chars().take(MAX_REASON).collect();
        Self::new(actor, action, object, Outcome::Failed)
            .code(code)
            .with("reason", reason)
    }

    /// Evidence was judged: action `attestation`. `evidence` is the raw report, base64; `accepted` is the verdict.
    pub fn attested(
        verifier: &str,
        subject: &str,
        evidence: &str,
        accepted: bool,
        code: &str,
    ) -> Self {
        let outcome = if accepted {
            Outcome::Allowed
        } else {
            Outcome::Refused
        };
        Self::new(verifier, "attestation", subject, outcome)
            .code(code)
            .with("evidence", evidence)
    }

    /// A secret went to a guest that had proven itself: action `secret-release`. Its name, never its value.
    pub fn secret_released(actor: &str, guest: &str, secret: &str) -> Self {
        Self::new(actor, "secret-release", guest, Outcome::Done).with("secret", secret)
    }

    /// A migration reached a phase: action `migration-phase`.
    pub fn migration_phase(guest: &str, phase: &str, migration: &Migration<'_>) -> Self {
        Self::new("mover", "migration-phase", guest, Outcome::Done)
            .with("phase", phase)
            .migration(migration)
    }

    /// A replica's checkpoint is complete at the other site: action `replication-checkpoint`.
    pub fn replicated(guest: &str, peer: &str, checkpoint: u64, root: &str) -> Self {
        Self::new("agent", "replication-checkpoint", guest, Outcome::Done)
            .with("peer", peer)
            .with("checkpoint", checkpoint)
            .with("manifest_root", root)
    }

    /// A replica was made the guest: action `failover`. `forced` if the other site could not agree.
    pub fn failover(actor: &str, guest: &str, epoch: u64, forced: bool) -> Self {
        Self::new(actor, "failover", guest, Outcome::Done)
            .with("epoch", epoch)
            .with("forced", forced)
    }

    /// Somebody called the agent: action `call`. `call` names the operation.
    pub fn called(actor: &str, call: &str, object: &str, outcome: Outcome) -> Self {
        Self::new(actor, "call", object, outcome).with("call", call)
    }

    /// With what is known of a migration.
    pub fn migration(self, migration: &Migration<'_>) -> Self {
        let texts = [
            ("suite", migration.suite),
            ("group", migration.group),
            ("exporter_sha256", migration.exporter_sha256),
            ("manifest_root", migration.manifest_root),
        ];
        let entry = self.with("peer", migration.peer);
        let entry = texts
            .into_iter()
            .filter_map(|(name, value)| Some((name, value?)))
            .fold(entry, |entry, (name, value)| entry.with(name, value));
        match migration.downtime_us {
            Some(downtime) => entry.with("downtime_us", downtime),
            None => entry,
        }
    }
}

/// The longest reason that is kept, in characters.
const MAX_REASON: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::PolicySeen;
    use crate::export::statement;
    use crate::ledger::{Clock as _, Detail, Record, SystemClock};
    use crate::report::Report;

    fn record(entry: Entry) -> Record {
        entry.stamped(0, SystemClock.now())
    }

    /// Every kind of record is known to the report, and those that others look into are found by them.
    #[test]
    fn what_is_written_is_what_is_looked_for() {
        let start = Start {
            host: "site-a",
            version: "1",
            binary: "00",
            policy: "sha256:00",
            sandbox: vec!["landlock-abi=7".to_owned()],
        };
        let migration = Migration {
            peer: "site-b",
            downtime_us: Some(7),
            ..Migration::default()
        };
        let entries = [
            Entry::started(start),
            Entry::policy_loaded("agent", "policy.toml", "sha256:01", 3),
            Entry::launched(
                "operator",
                "vault",
                &"ab".repeat(48),
                &[("kernel", &"cd".repeat(32))],
            ),
            Entry::attested("broker", "vault", "AA==", false, "tcb"),
            Entry::secret_released("broker", "vault", "disk-key"),
            Entry::migration_phase("vault", "offer", &migration),
            Entry::replicated("vault", "site-b", 4, "00"),
            Entry::failover("operator", "vault", 5, true),
        ];
        let records: Vec<Record> = entries.into_iter().map(record).collect();
        let seen: Vec<_> = records.iter().filter_map(PolicySeen::in_record).collect();
        assert_eq!((seen.len(), seen[1].digest.as_str()), (2, "sha256:01"));
        assert_eq!(records.iter().filter_map(|r| statement(r, "x")).count(), 1);
        assert_eq!(records[5].detail["downtime_us"], Detail::Number(7));
        for one in &records {
            let mut report = Report::new().unwrap();
            let before: Vec<String> = named(&report);
            report.add(one);
            assert!(
                named(&report).len() > before.len(),
                "{} speaks for no control",
                one.action
            );
        }
    }

    /// Controls that something was observed for by the record's own action, not by being any record.
    fn named(report: &Report) -> Vec<String> {
        let controls = report.frameworks.iter().flat_map(|f| &f.control);
        let special =
            controls.filter(|c| c.observed.records > 0 && !c.actions.contains(&"*".to_owned()));
        special.map(|control| control.id.clone()).collect()
    }

    #[test]
    fn a_long_reason_is_cut() {
        let failed = record(Entry::failed(
            "operator",
            "launch",
            "vault",
            "X",
            &"ä".repeat(100_000),
        ));
        assert_eq!(failed.outcome, Outcome::Failed);
        assert!(failed.canonical().len() < 10_000);
    }
}
