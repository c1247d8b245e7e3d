//! The ledger's upkeep: another key, and the end of what need not be kept. Both are decided, and both are in the log.

use casemate_policy::ledger::{Entry, Outcome};

use crate::agent::Agent;
use crate::agent::api::{Answer, Failure};
use crate::agent::authority::Caller;

impl Agent {
    /// `casemate evidence rotate`: the log goes on under a new key, which the old one has named.
    pub(super) fn rotate_evidence_key(&self, caller: &Caller) -> Result<Answer, Failure> {
        let (old, new) = self.evidence.rotate_key()?;
        let entry = Entry::new(caller.name(), "evidence-key-rotate", &new, Outcome::Done);
        self.evidence.record(entry.with("old_key", old.as_str()))?;
        Ok(Answer::EvidenceKey {
            key: new,
            old_key: old,
        })
    }

    /// `casemate evidence retain`: full files with nothing but records before `keep_from` go; their hashes stay.
    pub(super) fn retain_evidence(
        &self,
        caller: &Caller,
        keep_from: u64,
    ) -> Result<Answer, Failure> {
        let removed_to = self.evidence.retain(keep_from)?;
        let object = format!("records before {removed_to}");
        let entry = Entry::new(caller.name(), "evidence-retain", &object, Outcome::Done);
        self.evidence.record(entry.with("keep_from", keep_from))?;
        Ok(Answer::EvidenceRetained { removed_to })
    }
}
