//! Who is running what, proven.
//!
//! `casemate-attest` answers one question for the owner of a confidential guest: *is this the
//! guest I described, on a platform I trust, under the policy I asked for?* It speaks AMD SEV's
//! own formats and holds both ends of the conversation:
//!
//! | Module | Side | For |
//! | --- | --- | --- |
//! | [`evidence`] | owner and guest | where SNP reports come from, and the forms they are carried in |
//! | [`report`] | owner | SNP attestation reports, parsed |
//! | [`chain`] | owner | AMD's SNP roots, VCEK and VLEK certificates, revocation lists |
//! | [`kds`] | owner | AMD's key service: client, cache folder, bundles |
//! | [`legacy`] | owner and host | SEV certificates, chains, sessions, launch measure, secret packets |
//! | [`measure`] | owner | the launch digest that a description leads to |
//! | [`reference`] | owner | launch digests that an owner signed, with their inputs |
//! | [`verify`] | owner | evidence + expectation → [`verify::Verdict`], with every check's result |
//! | [`token`] | owner | a verdict as a signed attestation result (EAR) for others |
//! | [`broker`] | owner | releases secrets to guests that proved themselves |
//! | [`product`], [`tcb`] | both | which processor, which patch levels |
//! | [`processor`] | host | the software secure processor, for machines without AMD's |
//!
//! Trust starts at AMD's root keys, which are pinned in the binary. A software secure processor
//! has a root of its own that says `ARK-EMULATED` and `NOT AMD`; it counts only where the caller
//! names its fingerprint, and every verdict over it carries `emulated: true`.
//!
//! `OWNERS.md` beside this crate's sources leads an owner through all of it, with the command line: from a guest's
//! description to a released secret.
//!
//! `examples/sev_launch.rs` and `examples/snp_launch.rs` walk through whole launches.
//!
//! The formats follow AMD publications 55766, "Secure Encrypted Virtualization API", and
//! 56860, "SEV Secure Nested Paging Firmware ABI".
#![forbid(unsafe_code)]

pub mod broker;
mod bytes;
pub mod chain;
pub mod evidence;
pub mod kds;
pub mod legacy;
pub mod measure;
pub mod processor;
pub mod product;
pub mod reference;
pub mod report;
pub mod tcb;
pub mod token;
pub mod verify;
