//! What a description leads to: launch digests computed without any platform's help.

mod sev;

pub use sev::{DigestError, LaunchDigest, LaunchDigester};
