//! What the agent counts, in Prometheus' text format. Every label's values are known beforehand: no guest, person or
//! peer can make a new one.

use std::collections::BTreeMap;
use std::fmt::{Display, Write as _};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use casemate_policy::Code;

use crate::agent::Agent;
use crate::agent::api::{Answer, Failure, GuestInfo};
use crate::agent::vmm_process::lock;
use crate::vmm::protocol::MachineState;

/// Counters since the agent's start.
#[derive(Default)]
pub struct Metrics {
    requests: Mutex<BTreeMap<(&'static str, &'static str), u64>>,
    refusals: Mutex<BTreeMap<&'static str, u64>>,
    moves: Mutex<Moves>,
    arrivals: [AtomicU64; 2],
    turned_away: AtomicU64,
    connections: [AtomicU64; 2],
    unfed: AtomicU64,
}

#[derive(Clone, Default)]
struct Moves {
    bytes: u64,
    downtime_s: f64,
    /// Downtimes up to each of [`BUCKETS`], and all.
    buckets: [u64; BUCKETS.len()],
    count: u64,
}

impl Metrics {
    /// A request came to its end.
    pub fn ended(&self, operation: &'static str, result: Result<&Answer, &Failure>) {
        let outcome = match result {
            Ok(_) => "done",
            Err(failure) => match refusal_of(failure) {
                Some(code) => {
                    *lock(&self.refusals).entry(code).or_default() += 1;
                    "refused"
                }
                None => "failed",
            },
        };
        let mut requests = lock(&self.requests);
        *requests.entry((operation, outcome)).or_default() += 1;
        drop(requests);
        if let Ok(Answer::Migrated { outcome }) = result {
            lock(&self.moves).add(outcome);
        }
    }

    /// A guest arrived, or did not.
    pub fn arrived(&self, well: bool) {
        count(&self.arrivals, well);
    }

    /// A connection to the port where guests arrive was closed before it was worth a process.
    pub fn turned_away(&self) {
        self.turned_away.fetch_add(1, Ordering::Relaxed);
    }

    /// A guest did not feed its watchdog.
    pub fn unfed(&self) {
        self.unfed.fetch_add(1, Ordering::Relaxed);
    }

    /// A client was let in, over TLS or by the socket.
    pub fn connected(&self, remote: bool) {
        count(&self.connections, remote);
    }
}

impl Moves {
    fn add(&mut self, report: &serde_json::Value) {
        let number = |key: &str| report.get(key).and_then(serde_json::Value::as_f64);
        let seconds = number("downtime_ms").unwrap_or_default() / 1000.0;
        let bytes = report.get("bytes").and_then(serde_json::Value::as_u64);
        self.bytes = self.bytes.saturating_add(bytes.unwrap_or_default());
        self.downtime_s += seconds;
        self.count += 1;
        for (bucket, limit) in self.buckets.iter_mut().zip(BUCKETS) {
            *bucket += u64::from(seconds <= limit);
        }
    }
}

impl Agent {
    /// `GET /metrics`.
    pub(super) fn metrics_text(&self) -> Result<Answer, Failure> {
        let Answer::Guests { guests } = self.list()? else {
            return Err(Failure::new("INTERNAL", "a list of something else"));
        };
        let (records, bytes) = self.evidence.size();
        let mut page = Page::default();
        page.one("casemate_build_info", "gauge", "The agent that answers.");
        page.row("{version=\"", env!("CARGO_PKG_VERSION"), "\"}", 1);
        page.guests(&guests);
        page.one(
            "casemate_tasks_running",
            "gauge",
            "Long requests under way.",
        );
        page.plain(self.tasks.running());
        page.one(
            "casemate_ledger_records_total",
            "counter",
            "Records of the ledger since its beginning.",
        );
        page.plain(records);
        page.one(
            "casemate_ledger_file_bytes",
            "gauge",
            "Size of the ledger's file that is written to.",
        );
        page.plain(bytes);
        page.counters(&self.metrics);
        page.moves(&lock(&self.metrics.moves).clone());
        Ok(Answer::Metrics { text: page.text })
    }
}

#[derive(Default)]
struct Page {
    text: String,
    name: &'static str,
}

impl Page {
    fn one(&mut self, name: &'static str, kind: &str, help: &str) {
        self.name = name;
        // Writing to a string does not fail.
        let _ = write!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn plain(&mut self, value: impl Display) {
        let _ = writeln!(self.text, "{} {value}", self.name);
    }

    fn row(&mut self, before: &str, label: &str, after: &str, value: impl Display) {
        let _ = writeln!(self.text, "{}{before}{label}{after} {value}", self.name);
    }

    fn guests(&mut self, guests: &[GuestInfo]) {
        let mut found: BTreeMap<(&str, &str, bool), u64> = BTreeMap::new();
        for guest in guests {
            let technology = guest.technology.as_str();
            let key = (state_name(guest.state), technology, guest.emulated);
            *found.entry(key).or_default() += 1;
        }
        self.one("casemate_guests", "gauge", "Guests on this host.");
        for ((state, technology, emulated), count) in found {
            let labels = format!("{state}\",technology=\"{technology}\",emulated=\"{emulated}");
            self.row("{state=\"", &labels, "\"}", count);
        }
    }

    fn counters(&mut self, metrics: &Metrics) {
        self.one(
            "casemate_requests_total",
            "counter",
            "Requests by operation and outcome; launches are `run`.",
        );
        for ((operation, outcome), count) in lock(&metrics.requests).iter() {
            let labels = format!("{operation}\",outcome=\"{outcome}");
            self.row("{operation=\"", &labels, "\"}", count);
        }
        self.one(
            "casemate_policy_refusals_total",
            "counter",
            "What the policy refused, by the first broken rule's code.",
        );
        for (code, count) in lock(&metrics.refusals).iter() {
            self.row("{code=\"", code, "\"}", count);
        }
        self.one(
            "casemate_arrivals_total",
            "counter",
            "Migrations to this host, by outcome.",
        );
        self.pair("outcome", ["failed", "done"], &metrics.arrivals);
        self.one(
            "casemate_arrivals_turned_away_total",
            "counter",
            "Connections to the port where guests arrive that said nothing, or were too many of one address.",
        );
        self.plain(metrics.turned_away.load(Ordering::Relaxed));
        self.one(
            "casemate_api_connections_total",
            "counter",
            "Clients that were let in, by the way they came.",
        );
        self.pair("transport", ["unix", "tls"], &metrics.connections);
        self.one(
            "casemate_watchdog_expirations_total",
            "counter",
            "How often a guest did not feed its watchdog.",
        );
        self.plain(metrics.unfed.load(Ordering::Relaxed));
    }

    fn pair(&mut self, label: &str, values: [&str; 2], counts: &[AtomicU64; 2]) {
        for (value, count) in values.iter().zip(counts) {
            let before = format!("{{{label}=\"");
            self.row(&before, value, "\"}", count.load(Ordering::Relaxed));
        }
    }

    fn moves(&mut self, moves: &Moves) {
        self.one(
            "casemate_migration_bytes_total",
            "counter",
            "Bytes that migrations from this host sent, before TLS.",
        );
        self.plain(moves.bytes);
        self.one(
            "casemate_migration_downtime_seconds",
            "histogram",
            "Pause of guests that moved from this host.",
        );
        for (count, limit) in moves.buckets.iter().zip(BUCKETS) {
            self.row("_bucket{le=\"", &limit.to_string(), "\"}", count);
        }
        self.row("_bucket{le=\"", "+Inf", "\"}", moves.count);
        self.row("_sum", "", "", moves.downtime_s);
        self.row("_count", "", "", moves.count);
    }
}

/// The policy's code, if it refused; a code that others made up is none.
fn refusal_of(failure: &Failure) -> Option<&'static str> {
    let code = failure.code.strip_prefix("POLICY_")?;
    let code = code.to_lowercase().replace('_', "-");
    let known = Code::ALL.iter().map(|known| known.as_str());
    known.into_iter().find(|known| *known == code)
}

fn state_name(state: MachineState) -> &'static str {
    match state {
        MachineState::Prepared => "prepared",
        MachineState::Measured => "measured",
        MachineState::Running => "running",
        MachineState::Paused => "paused",
        MachineState::Incoming => "incoming",
        MachineState::Stopped => "stopped",
        MachineState::Lost => "lost",
    }
}

fn count(pair: &[AtomicU64; 2], second: bool) {
    let [first, other] = pair;
    let counter = if second { other } else { first };
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Upper ends of the histogram of downtimes, in seconds.
const BUCKETS: [f64; 8] = [0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_policy_s_own_codes_become_labels() {
        let metrics = Metrics::default();
        for code in ["POLICY_PERSON_UNKNOWN", "POLICY_MADE_UP", "NO_SUCH_GUEST"] {
            metrics.ended("stop", Err(&Failure::new(code, "")));
        }
        let refusals = lock(&metrics.refusals).clone();
        assert_eq!(refusals, BTreeMap::from([("person-unknown", 1)]));
        let requests = lock(&metrics.requests).clone();
        let want = [(("stop", "failed"), 2), (("stop", "refused"), 1)];
        assert_eq!(requests, BTreeMap::from(want));
    }

    #[test]
    fn downtimes_fall_into_every_bucket_above_them() {
        let mut moves = Moves::default();
        moves.add(&serde_json::json!({"bytes": 100, "downtime_ms": 150.0}));
        moves.add(&serde_json::json!({"bytes": 1, "downtime_ms": 9000.0}));
        let mut page = Page::default();
        page.moves(&moves);
        for line in [
            "casemate_migration_bytes_total 101",
            "casemate_migration_downtime_seconds_bucket{le=\"0.1\"} 0",
            "casemate_migration_downtime_seconds_bucket{le=\"0.2\"} 1",
            "casemate_migration_downtime_seconds_bucket{le=\"5\"} 1",
            "casemate_migration_downtime_seconds_bucket{le=\"+Inf\"} 2",
            "casemate_migration_downtime_seconds_sum 9.15",
            "casemate_migration_downtime_seconds_count 2",
        ] {
            assert!(page.text.lines().any(|found| found == line), "{line}");
        }
    }
}
