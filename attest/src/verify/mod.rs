//! Evidence and expectation in, a verdict with every check's result out.

mod sev;
mod verdict;

pub use sev::{
    Component, PlatformEvidence, SevLaunchEvidence, SevLaunchExpected, verify_sev_launch,
};
pub use verdict::{Check, CheckResult, Outcome, Verdict};
