//! Records in the forms that other systems read. What leaves this way can no longer be verified: the bundle is the proof.

mod otlp;
mod statement;
mod syslog;

pub use otlp::otlp;
pub use statement::{IN_TOTO, statement};
pub use syslog::syslog;

use crate::ledger::{Outcome, Record};

/// One line for people: what happened to what, and how it ended.
pub fn summary(record: &Record) -> String {
    let mut text = format!(
        "{} {} {} by {}",
        record.action,
        record.object,
        outcome(record.outcome),
        record.actor
    );
    if !record.code.is_empty() {
        text.push_str(&format!(" [{}]", record.code));
    }
    if record.emulated {
        text.push_str(" (emulated)");
    }
    text
}

/// An outcome as records spell it.
pub fn outcome(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Allowed => "allowed",
        Outcome::Refused => "refused",
        Outcome::Done => "done",
        Outcome::Failed => "failed",
    }
}

#[cfg(test)]
mod tests;
