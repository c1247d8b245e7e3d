//! Which records somebody wants to see.

use super::record::{Outcome, Record};

/// Conditions that all must hold; one that is not given holds for every record.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Not before this time.
    pub since: Option<String>,
    /// Before this time.
    pub until: Option<String>,
    /// Who did or asked.
    pub actor: Option<String>,
    /// What was done.
    pub action: Option<String>,
    /// What it was done to.
    pub object: Option<String>,
    /// How it ended.
    pub outcome: Option<Outcome>,
    /// With which code.
    pub code: Option<String>,
    /// Whether an emulated technology was involved.
    pub emulated: Option<bool>,
}

impl Filter {
    /// Whether nothing is asked for, so that every record matches.
    pub fn is_empty(&self) -> bool {
        let Self {
            since,
            until,
            actor,
            action,
            object,
            outcome,
            code,
            emulated,
        } = self;
        let texts = [since, until, actor, action, object, code];
        texts.iter().all(|text| text.is_none()) && outcome.is_none() && emulated.is_none()
    }

    /// Whether a record is wanted.
    pub fn matches(&self, record: &Record) -> bool {
        let is = |wanted: &Option<String>, found: &str| wanted.as_ref().is_none_or(|w| w == found);
        // Times in records have one spelling, which sorts as time does.
        self.since
            .as_ref()
            .is_none_or(|since| record.time >= *since)
            && self.until.as_ref().is_none_or(|until| record.time < *until)
            && is(&self.actor, &record.actor)
            && is(&self.action, &record.action)
            && is(&self.object, &record.object)
            && is(&self.code, &record.code)
            && self.outcome.is_none_or(|outcome| outcome == record.outcome)
            && self
                .emulated
                .is_none_or(|emulated| emulated == record.emulated)
    }

    /// A time (RFC 3339, also without zone or time of day) as records spell it; nothing if it is none.
    pub fn time(text: &str) -> Option<String> {
        let text = if text.len() == 10 {
            format!("{text}T00:00:00Z")
        } else {
            text.to_owned()
        };
        let time = humantime::parse_rfc3339_weak(&text).ok()?;
        Some(humantime::format_rfc3339_nanos(time).to_string())
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;
    use crate::ledger::{Entry, Stamp};

    #[test]
    fn every_condition_counts() {
        let stamp = Stamp {
            wall: UNIX_EPOCH + Duration::from_secs(86_400),
            monotonic_ns: 0,
        };
        let entry = Entry::new("operator", "launch", "vault", Outcome::Done).code("x");
        let record = entry.stamped(0, stamp);
        assert!(Filter::default().is_empty() && Filter::default().matches(&record));
        let text = |text: &str| Some(text.to_owned());
        type Set = fn(&mut Filter, Option<String>);
        let sets: [(Set, &str, &str); 6] = [
            (|f, t| f.actor = t, "operator", "owner"),
            (|f, t| f.action = t, "launch", "stop"),
            (|f, t| f.object = t, "vault", "bank"),
            (|f, t| f.code = t, "x", "y"),
            (
                |f, t| f.since = t.and_then(|t| Filter::time(&t)),
                "1970-01-02",
                "1970-01-02 00:00:01",
            ),
            (
                |f, t| f.until = t.and_then(|t| Filter::time(&t)),
                "1970-01-02T00:00:01Z",
                "1970-01-02",
            ),
        ];
        for (set, good, bad) in sets {
            let mut filter = Filter::default();
            set(&mut filter, text(good));
            assert!(!filter.is_empty() && filter.matches(&record), "{good}");
            set(&mut filter, text(bad));
            assert!(!filter.matches(&record), "{bad}");
        }
        for (outcome, emulated) in [(Some(Outcome::Failed), None), (None, Some(true))] {
            let filter = Filter {
                outcome,
                emulated,
                ..Filter::default()
            };
            assert!(!filter.is_empty() && !filter.matches(&record));
        }
        assert_eq!(Filter::time("yesterday"), None);
    }
}
