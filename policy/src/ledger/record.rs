//! One record, and its one spelling in bytes.

use std::collections::BTreeMap;
use std::time::SystemTime;
use std::{fmt, io};

use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

/// What happened, as it stands in the log.
///
/// The fields are declared in alphabetical order, because that is the order in which canonical JSON has them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// What was done or asked for: `launch`, `migrate-out`, …
    pub action: String,
    /// Who did or asked: `agent`, `owner`, a peer's name, …
    pub actor: String,
    /// The stable code of the result; may be empty.
    pub code: String,
    /// Everything else, by name.
    pub detail: BTreeMap<String, Detail>,
    /// Whether an emulated technology was involved.
    pub emulated: bool,
    /// `CLOCK_MONOTONIC` in nanoseconds.
    pub monotonic_ns: u64,
    /// What it was done to: a VM, a peer, a file.
    pub object: String,
    /// How it ended.
    pub outcome: Outcome,
    /// Its place in the log, from 0; equal to the index of its leaf.
    pub seq: u64,
    /// Wall time, RFC 3339, UTC.
    pub time: String,
}

impl Record {
    /// The record as canonical JSON: keys sorted, no spaces, integers in full. These bytes are the leaf.
    pub fn canonical(&self) -> String {
        serde_json::to_string(self).unwrap_or_default() // strings, integers and maps of them: cannot fail
    }

    /// Reads what [`Record::canonical`] wrote, and nothing else.
    pub fn from_canonical(text: &str) -> Option<Self> {
        let record: Self = serde_json::from_str(text).ok()?;
        let mut expected = Expected(text.as_bytes());
        serde_json::to_writer(&mut expected, &record).ok()?;
        expected.0.is_empty().then_some(record)
    }
}

/// Takes only the bytes that it expects, so that a spelling is compared without being kept.
struct Expected<'a>(&'a [u8]);

impl io::Write for Expected<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 = self
            .0
            .strip_prefix(bytes)
            .ok_or(io::ErrorKind::InvalidData)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How an action ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Outcome {
    /// It was asked for and allowed.
    Allowed,
    /// It was asked for and refused.
    Refused,
    /// It was done.
    Done,
    /// It was tried and failed.
    Failed,
}

/// A value in a record's detail.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Detail {
    /// Yes or no.
    Flag(bool),
    /// A count, a size, a time.
    Number(u64),
    /// A name, a digest in hex.
    Text(String),
    /// Several texts, such as the reasons of a decision.
    List(Vec<String>),
}

impl<'de> Deserialize<'de> for Detail {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyDetail)
    }
}

/// Reads a detail by its kind, which JSON shows (what serde derives would try all kinds in turn).
struct AnyDetail;

impl<'de> Visitor<'de> for AnyDetail {
    type Value = Detail;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a flag, a count, a text or a list of texts")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Detail, E> {
        Ok(Detail::Flag(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Detail, E> {
        Ok(Detail::Number(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Detail, E> {
        Ok(Detail::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Detail, A::Error> {
        let mut texts = Vec::new();
        while let Some(text) = list.next_element()? {
            texts.push(text);
        }
        Ok(Detail::List(texts))
    }
}

impl From<bool> for Detail {
    fn from(value: bool) -> Self {
        Self::Flag(value)
    }
}
impl From<u64> for Detail {
    fn from(value: u64) -> Self {
        Self::Number(value)
    }
}
impl From<u32> for Detail {
    fn from(value: u32) -> Self {
        Self::Number(value.into())
    }
}
impl From<&str> for Detail {
    fn from(value: &str) -> Self {
        Self::Text(value.to_owned())
    }
}
impl From<String> for Detail {
    fn from(value: String) -> Self {
        Self::Text(value)
    }
}
impl From<Vec<String>> for Detail {
    fn from(value: Vec<String>) -> Self {
        Self::List(value)
    }
}

/// A record before the ledger gives it its place and time.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub struct Entry {
    action: String,
    actor: String,
    code: String,
    detail: BTreeMap<String, Detail>,
    emulated: bool,
    object: String,
    outcome: Outcome,
}

impl Entry {
    /// Who did what to what, and how it ended.
    pub fn new(actor: &str, action: &str, object: &str, outcome: Outcome) -> Self {
        Self {
            action: action.to_owned(),
            actor: actor.to_owned(),
            code: String::new(),
            detail: BTreeMap::new(),
            emulated: false,
            object: object.to_owned(),
            outcome,
        }
    }

    /// A decision: outcome and code from it, the refusing rules (or, if allowed, every rule) in detail `reasons`.
    pub fn decided(actor: &str, action: &str, object: &str, decision: &crate::Decision) -> Self {
        let outcome = if decision.allowed {
            Outcome::Allowed
        } else {
            Outcome::Refused
        };
        let reasons: Vec<String> = decision
            .reasons
            .iter()
            .filter(|reason| decision.allowed || !reason.allows)
            .map(|reason| {
                format!(
                    "{}: wanted {}; found {}",
                    reason.rule, reason.wanted, reason.found
                )
            })
            .collect();
        Self::new(actor, action, object, outcome)
            .code(decision.code.as_str())
            .with("reasons", reasons)
    }

    /// With the stable code of the result.
    pub fn code(mut self, code: &str) -> Self {
        code.clone_into(&mut self.code);
        self
    }

    /// Marked as involving (or not) an emulated technology.
    pub fn emulated(mut self, emulated: bool) -> Self {
        self.emulated = emulated;
        self
    }

    /// With one more detail.
    pub fn with(mut self, name: &str, value: impl Into<Detail>) -> Self {
        self.detail.insert(name.to_owned(), value.into());
        self
    }

    pub(crate) fn stamped(self, seq: u64, stamp: Stamp) -> Record {
        Record {
            action: self.action,
            actor: self.actor,
            code: self.code,
            detail: self.detail,
            emulated: self.emulated,
            monotonic_ns: stamp.monotonic_ns,
            object: self.object,
            outcome: self.outcome,
            seq,
            time: humantime::format_rfc3339_nanos(stamp.wall).to_string(),
        }
    }
}

/// When, on both clocks.
#[derive(Clone, Copy, Debug)]
pub struct Stamp {
    /// Wall time.
    pub wall: SystemTime,
    /// `CLOCK_MONOTONIC` in nanoseconds: comparable between processes of one boot.
    pub monotonic_ns: u64,
}

/// Where records get their time from.
pub trait Clock: Send {
    /// The time now.
    fn now(&self) -> Stamp;
}

/// The machine's clocks.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Stamp {
        // The clock always exists on Linux; 0 would be visible in the record.
        let monotonic = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
            .map(std::time::Duration::from);
        let monotonic_ns =
            monotonic.map_or(0, |time| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
        Stamp {
            wall: SystemTime::now(),
            monotonic_ns,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_record_has_one_spelling() {
        let entry = Entry::new("a", "b", "c", Outcome::Failed)
            .code("x")
            .emulated(true);
        let record = entry
            .with("z", true)
            .with("list", vec!["ä\n".to_owned()])
            .with("m", "1")
            .stamped(3, SystemClock.now());
        let text = record.canonical();
        assert_eq!(Record::from_canonical(&text), Some(record));
        let reordered = serde_json::from_str::<serde_json::Value>(&text).unwrap();
        assert_eq!(reordered.to_string(), text, "keys are sorted");
        assert_eq!(Record::from_canonical(&text.replacen(':', ": ", 1)), None);
        assert_eq!(
            Record::from_canonical(&text.replacen("\"code\"", "\"coda\"", 1)),
            None
        );
        assert!(!text.contains('\n'));
        for other in ["-1", "1.5", "null", "{}", "[1]", "[[]]"] {
            let changed = text.replacen("true}", &format!("{other}}}"), 1);
            assert_ne!(changed, text);
            assert_eq!(Record::from_canonical(&changed), None, "{other}");
        }
        assert_eq!(Record::from_canonical(&text[..text.len() - 1]), None);
        assert_eq!(Record::from_canonical(&format!("{text} ")), None);
    }

    #[test]
    fn the_system_clocks_run() {
        let (first, second) = (SystemClock.now(), SystemClock.now());
        assert!(first.monotonic_ns > 0 && second.monotonic_ns >= first.monotonic_ns);
    }
}
