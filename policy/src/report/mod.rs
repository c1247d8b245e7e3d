//! What the records show for each control of known frameworks, and what they do not.
//!
//! The mapping is data (`controls.toml`). A report states observations; whether a control is met is for an assessor to say.

mod html;
mod oscal;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use html::html;
pub use oscal::oscal;

use crate::ledger::{Outcome, Record};

/// Where the records come from, as far as it has been verified.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Source {
    /// The log.
    pub origin: String,
    /// The size of the tree in the newest checkpoint.
    pub size: u64,
    /// Its root, hex.
    pub root: String,
    /// The newest key, C2SP verifier key.
    pub key: String,
    /// Whether the reader had that key, or one before it, from elsewhere.
    pub key_trusted: bool,
    /// When the report is made, RFC 3339.
    pub time: String,
}

/// Records set beside controls.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Where they come from; set when they have verified.
    pub source: Option<Source>,
    /// All of them.
    pub all: Observed,
    /// The policies that were in force.
    pub policies: Vec<crate::bundle::PolicySeen>,
    /// The frameworks.
    pub frameworks: Vec<Framework>,
}

impl Report {
    /// A report over no records.
    pub fn new() -> Result<Self, ReportError> {
        let mapping: Mapping = toml::from_str(CONTROLS)?;
        Ok(Self {
            source: None,
            all: Observed::default(),
            policies: Vec::new(),
            frameworks: mapping.framework,
        })
    }

    /// Takes one more record into account.
    pub fn add(&mut self, record: &Record) {
        self.all.add(record);
        self.policies
            .extend(crate::bundle::PolicySeen::in_record(record));
        let controls = self.frameworks.iter_mut().flat_map(|f| &mut f.control);
        for control in controls.filter(|control| control.speaks(record)) {
            control.observed.add(record);
        }
    }
}

/// A framework and those of its controls for which there can be records.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Framework {
    /// A token.
    pub id: String,
    /// Its name.
    pub title: String,
    /// The controls.
    pub control: Vec<Control>,
}

/// A control, and what was observed for it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Control {
    /// A token, unique in all frameworks.
    pub id: String,
    /// Its name in the framework.
    pub title: String,
    /// The actions whose records speak for it.
    pub actions: Vec<String>,
    /// What these records show.
    pub shows: String,
    /// What they do not.
    pub not_covered: String,
    /// What there was.
    #[serde(skip_deserializing)]
    pub observed: Observed,
}

impl Control {
    fn speaks(&self, record: &Record) -> bool {
        self.actions.iter().any(|action| match action.as_str() {
            "*" => true,
            "?refused" => record.outcome == Outcome::Refused,
            "?failed" => record.outcome == Outcome::Failed,
            action => action == record.action,
        })
    }
}

/// Records in numbers, with some of them by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Observed {
    /// How many.
    pub records: u64,
    /// Of these, how many were refused.
    pub refused: u64,
    /// Of these, how many failed.
    pub failed: u64,
    /// Of these, how many involved an emulated technology.
    pub emulated: u64,
    /// How many of each action.
    pub actions: BTreeMap<String, u64>,
    /// Time of the first.
    pub since: Option<String>,
    /// Time of the last.
    pub until: Option<String>,
    /// Places of the first few.
    pub first: Vec<u64>,
    /// Place of the last.
    pub last: Option<u64>,
}

impl Observed {
    fn add(&mut self, record: &Record) {
        self.records += 1;
        self.refused += u64::from(record.outcome == Outcome::Refused);
        self.failed += u64::from(record.outcome == Outcome::Failed);
        self.emulated += u64::from(record.emulated);
        *self.actions.entry(record.action.clone()).or_default() += 1;
        self.since.get_or_insert_with(|| record.time.clone());
        self.until = Some(record.time.clone());
        if self.first.len() < NAMED {
            self.first.push(record.seq);
        }
        self.last = Some(record.seq);
    }

    /// In one sentence.
    pub fn sentence(&self) -> String {
        let (Some(since), Some(until)) = (&self.since, &self.until) else {
            return "Nothing was observed.".to_owned();
        };
        let actions: Vec<String> = self
            .actions
            .iter()
            .map(|(a, n)| format!("{n} {a}"))
            .collect();
        format!(
            "{} records from {since} to {until} ({}); {} refused, {} failed, {} emulated.",
            self.records,
            actions.join(", "),
            self.refused,
            self.failed,
            self.emulated
        )
    }
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReportError {
    /// The built-in mapping cannot be read.
    #[error("the control mapping is damaged: {0}")]
    Mapping(#[from] toml::de::Error),
    /// The records have not verified yet.
    #[error("a report is made from records that have verified; verify them first")]
    Unverified,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Mapping {
    framework: Vec<Framework>,
}

const CONTROLS: &str = include_str!("controls.toml");
/// How many records an observation names.
const NAMED: usize = 20;
/// What every report says.
const DISCLAIMER: &str = "This is evidence of what a host recorded. It is no statement that the host, or anybody, \
    complies with a framework; that is for an assessor to say.";

#[cfg(test)]
mod tests;
