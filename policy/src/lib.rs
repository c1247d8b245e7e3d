//! What is allowed, and what happened.
//!
//! Parts, usable without the rest of Casemate:
//!
//! - [`document`]: the host's policy, a typed TOML file. Errors name the file, the line, the key and what would be right.
//! - [`evaluate`](mod@evaluate): a pure function from policy and [`Action`] to a [`Decision`] with a reason for every
//!   rule it looked at; [`floor`] holds the rules that no file can loosen.
//! - [`ledger`]: an append-only Merkle log of what was decided and done, with signed checkpoints that anyone holding the
//!   public key can verify offline; [`bundle`] hands it, or a part of it, to an auditor, [`export`]
//!   gives its records to other systems, and [`report`] sets them beside the controls of known frameworks.
//!
//! ```
//! use casemate_policy::{Action, HostPolicy, Technology, evaluate};
//!
//! let policy = HostPolicy::parse("policy.toml", r#"
//!     [host]
//!     name = "site-a"
//!     [technologies]
//!     allowed = ["sev"]
//!     [limits]
//!     max_vcpus = 4
//!     max_memory_mib = 2048
//! "#)?;
//! let launch = Action::Launch { technology: Technology::Sev, emulated: true, vcpus: 2, memory_mib: 512, policy_bits: 1 };
//! let decision = evaluate(&policy, &launch);
//! assert!(!decision.allowed); // emulated, and the file does not say `allow_emulated = true`
//! assert_eq!(decision.code.as_str(), "emulated-not-allowed");
//! # Ok::<(), casemate_policy::PolicyError>(())
//! ```
//!
//! `examples/decide.rs` goes the whole way: a policy, a decision, a record, a checkpoint, and its verification.

#![forbid(unsafe_code)]

pub mod action;
pub mod bundle;
pub mod cases;
pub mod claims;
pub mod document;
pub mod evaluate;
pub mod export;
pub mod floor;
pub mod history;
pub mod ledger;
pub mod mark;
#[cfg(feature = "rego")]
pub mod rego;
pub mod report;
pub mod sign;
mod types;

pub use action::{Action, ActionKind};
pub use claims::{Actor, Inquiry};
pub use document::{CryptoProvider, HostPolicy, PolicyError};
pub use evaluate::{Code, Decision, Reason, decide, evaluate, may_ask};
pub use ledger::{Ledger, LedgerError};
pub use types::{
    DnsName, Fingerprint, Identity, LaunchDigest, LaunchSigner, Technology, Timestamp, TypeError,
};
