//! Evidence and expectation in, a verdict with every check's result out.

mod floor;
pub mod policy;
mod sev;
mod snp;
mod verdict;

pub use policy::OwnerPolicy;
pub use sev::{
    Component, PlatformEvidence, SevLaunchEvidence, SevLaunchExpected, verify_sev_launch,
};
pub use snp::{Expectation, Nonce, NonceError, SnpEvidence, SnpVerifier, verify_snp};
pub use verdict::{Check, CheckResult, Outcome, Verdict};
