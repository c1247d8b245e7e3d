//! Evidence and expectation in, a verdict with every check's result out.

mod sev;
mod sev_platform;
mod sev_report;
mod verdict;

pub use sev::{
    Component, PlatformEvidence, SevLaunchEvidence, SevLaunchExpected, verify_sev_launch,
};
pub use sev_platform::{Place, SevPlatform, verify_sev_platform};
pub use sev_report::{SevReportEvidence, SevReportExpected, verify_sev_report};
pub use verdict::{Check, CheckResult, Outcome, Verdict};
