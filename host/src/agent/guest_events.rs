//! What a VMM says unasked, kept: in the log and the ledger, and of a watchdog in the metrics.

use std::sync::Arc;

use casemate_policy::ledger::{Entry, Outcome};

use crate::agent::evidence::Evidence;
use crate::agent::metrics::Metrics;
use crate::machine::plan::MachinePlan;
use crate::machine::plan::devices::WatchdogAction;
use crate::vmm::protocol::VmmEvent;

/// One VMM's.
pub struct GuestEvents {
    name: String,
    emulated: bool,
    action: &'static str,
    evidence: Arc<Evidence>,
    metrics: Arc<Metrics>,
    /// Its watchdog has been recorded: a guest that starves it over and over fills no ledger.
    recorded: bool,
}

impl GuestEvents {
    /// Of a guest that is about to start.
    pub fn of(plan: &MachinePlan, evidence: &Arc<Evidence>, metrics: &Arc<Metrics>) -> Self {
        let action = match plan.small.watchdog.map(|watchdog| watchdog.action) {
            None => "none",
            Some(WatchdogAction::Stop) => "stop",
            Some(WatchdogAction::Report) => "report",
            Some(WatchdogAction::Pause) => "pause",
        };
        Self {
            name: plan.name.clone(),
            emulated: plan.technology.emulated(),
            action,
            evidence: Arc::clone(evidence),
            metrics: Arc::clone(metrics),
            recorded: false,
        }
    }

    /// Hears one; `None` is the VMM's end.
    pub fn hear(&mut self, event: Option<VmmEvent>) {
        let guest = &self.name;
        match &event {
            Some(event) => tracing::info!(guest, ?event, "guest"),
            None => tracing::info!(guest, "VMM ended"),
        }
        match event {
            Some(VmmEvent::Watchdog) => {
                self.metrics.unfed();
                if !std::mem::replace(&mut self.recorded, true) {
                    self.record(self.entry("guest-watchdog").with("action", self.action));
                }
            }
            Some(VmmEvent::GuestStopped { reason }) => {
                self.record(self.entry("guest-stopped").with("reason", reason.as_str()));
            }
            None => {}
        }
    }

    fn entry(&self, action: &str) -> Entry {
        Entry::new("guest", action, &self.name, Outcome::Done).emulated(self.emulated)
    }

    fn record(&self, entry: Entry) {
        if let Err(failure) = self.evidence.record(entry) {
            tracing::error!(code = failure.code, "{}", failure.error);
        }
    }
}
