//! Evidence and expectation in, a verdict with every check's result out.

mod floor;
pub mod policy;
mod sev;
mod sev_platform;
mod sev_report;
mod snp;
mod verdict;

pub use policy::OwnerPolicy;
pub use sev::{
    Component, PlatformEvidence, SevLaunchEvidence, SevLaunchExpected, verify_sev_launch,
};
pub use sev_platform::{Place, SevPlatform, verify_sev_platform};
pub use sev_report::{SevReportEvidence, SevReportExpected, verify_sev_report};
pub use snp::{Expectation, Nonce, NonceError, SnpEvidence, SnpVerifier, verify_snp};
pub use verdict::{Check, CheckResult, Outcome, Verdict};
