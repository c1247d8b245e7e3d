//! What a move would be like: both ends decide and build as for a move, and nothing moves.

use casemate_policy::ledger::Outcome;

use crate::agent::Agent;
use crate::agent::api::moves::{MovePlan, PlanCheck};
use crate::agent::api::{Answer, Failure};
use crate::agent::authority::Caller;
use crate::agent::outgoing::{Departure, Wish, fate};
use crate::mover::protocol::{AssessReport, MoveOutcome, MoverEvent};

impl Agent {
    /// `casemate migrate --dry-run`.
    pub(super) fn assess(
        &self,
        caller: &Caller,
        name: &str,
        wish: &Wish<'_>,
        progress: &mut dyn FnMut(serde_json::Value),
    ) -> Result<Answer, Failure> {
        let departure = self.departure(caller, name, wish)?;
        let mut target = None;
        let outcome = self.depart(&departure, &mut |event| {
            if let MoverEvent::TargetVerified { emulated, pdh, .. } = event {
                target = Some((*emulated, pdh.clone()));
            }
            progress(super::outgoing::event_json(event));
        })?;
        let records = &departure.records;
        let (outcome, result) = match outcome {
            MoveOutcome::Assessed(report) => {
                let done = departure.entry(Outcome::Done);
                let plan = plan_of(&departure, wish, &report, target);
                (done, Ok(Answer::Assessed(plan)))
            }
            MoveOutcome::Failed {
                code,
                reason,
                guest,
            } => {
                let failed = departure.entry(Outcome::Failed).code(&code);
                let failed = failed.with("reason", reason.as_str());
                let error = format!(
                    "{name} could not move to {}: {reason}; {}",
                    wish.to,
                    fate(guest)
                );
                (failed, Err(Failure { code, error }))
            }
            MoveOutcome::Moved(_) | MoveOutcome::Settled(_) => {
                let text = "a mover did not assess what it was to";
                let failed = departure.entry(Outcome::Failed).code("ROLE_PROTOCOL");
                (failed, Err(Failure::new("ROLE_PROTOCOL", text)))
            }
        };
        self.evidence
            .record_all(records.kept(), records.outcome(outcome, None))?;
        result
    }
}

fn plan_of(
    departure: &Departure<'_>,
    wish: &Wish<'_>,
    report: &AssessReport,
    target: Option<(bool, String)>,
) -> MovePlan {
    let plan = &departure.guest.plan_now();
    let check = |check: &str, found: String| PlanCheck {
        check: check.to_owned(),
        found,
    };
    let mut checks = vec![
        check("policy here", "allows the move and the session".to_owned()),
        check(
            "peer",
            format!(
                "{} proved its identity, {}, {}",
                wish.to, report.path, report.tls_suite
            ),
        ),
        check(
            "policy there",
            "allows this guest from this host".to_owned(),
        ),
        check(
            "processor there",
            format!("gives what the guest was given ({})", plan.cpu.model.name()),
        ),
        check(
            "memory there",
            format!("has room for {} MiB", plan.memory_bytes >> 20),
        ),
        check(
            "devices there",
            format!(
                "{} disks opened, {} network cards made",
                plan.disks.len(),
                plan.nets.len()
            ),
        ),
    ];
    if let Some((emulated, pdh)) = target {
        let kind = if emulated { "emulated, NOT AMD" } else { "AMD" };
        checks.push(check(
            "platform there",
            format!("verified ({kind}), PDH sha256:{pdh}"),
        ));
    }
    let kib = |pages: f64| (pages * 4.0) as u64;
    MovePlan {
        name: plan.name.clone(),
        to: wish.to.to_owned(),
        checks,
        memory_mib: plan.memory_bytes >> 20,
        populated_kib: report.pages * 4,
        dirty_kib_per_s: kib(report.dirty_rate),
        throughput_kib_per_s: (report.throughput / 1024.0) as u64,
        round_trip_ms: report.round_trip_ms,
        rounds: report.rounds,
        total_ms: report.total_ms,
        downtime_ms: report.downtime_ms,
        downtime_limit_ms: departure.downtime_limit_ms,
        streams: report.streams,
        convergence: report.convergence.clone(),
        throttle_percent: report.throttle_percent,
    }
}
