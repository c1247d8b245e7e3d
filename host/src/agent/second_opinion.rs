//! A Rego policy beside the typed one (cargo feature `rego`). It may only restrict: policy/REGO.md.

use casemate_policy::{Decision, Inquiry};

use crate::agent::api::Failure;
use crate::agent::config::RegoFile;

/// What is asked after the typed policy; nothing, unless the agent's configuration names a file.
#[derive(Default)]
pub struct SecondOpinion {
    #[cfg(feature = "rego")]
    policy: Option<casemate_policy::rego::RegoPolicy>,
}

impl SecondOpinion {
    /// Reads the file that the configuration names. A program built without Rego does not start with one: what it cannot
    /// ask would otherwise be allowed.
    pub fn open(file: Option<&RegoFile>) -> Result<Self, Failure> {
        file.map_or_else(|| Ok(Self::default()), Self::read)
    }

    #[cfg(feature = "rego")]
    fn read(file: &RegoFile) -> Result<Self, Failure> {
        use casemate_policy::rego::{Dialect, RegoPolicy};

        use crate::agent::config::RegoDialect;

        let name = file.policy.display().to_string();
        let unusable = |e: &dyn std::fmt::Display| Failure::new("REGO", format!("{name}: {e}"));
        let text = std::fs::read_to_string(&file.policy).map_err(|e| unusable(&e))?;
        let dialect = match file.dialect {
            RegoDialect::Casemate => Dialect::Casemate,
            RegoDialect::Trustee => Dialect::Trustee,
        };
        let policy = RegoPolicy::parse(&name, &text, dialect)
            .map_err(|e| Failure::new("REGO", e.to_string()))?;
        tracing::info!(file = name, sha256 = %policy.digest(), "decisions are restricted by Rego");
        Ok(Self {
            policy: Some(policy),
        })
    }

    #[cfg(not(feature = "rego"))]
    fn read(file: &RegoFile) -> Result<Self, Failure> {
        let name = file.policy.display();
        Err(Failure::new(
            "REGO",
            format!(
                "{name}: this casemate was built without Rego; build it with the cargo feature `rego`, or remove [rego]"
            ),
        ))
    }

    /// The decision, and what Rego says to it.
    pub fn restrict(&self, inquiry: &Inquiry, decision: Decision) -> Decision {
        #[cfg(feature = "rego")]
        if let Some(policy) = &self.policy {
            return policy.restrict(inquiry, decision);
        }
        #[cfg(not(feature = "rego"))]
        let _ = inquiry;
        decision
    }
}
