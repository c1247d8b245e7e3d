//! The guest's half of secret release: a report bound to an ephemeral key, the CoCo key broker
//! protocol over TCP or vsock, and the secret where the guest wants it.
//!
//! The library exists for the program `casemate-agent` and for tests; it is not a stable
//! interface. Blocking throughout: a guest that waits for its disk's key has nothing else to do.
#![forbid(unsafe_code)]

pub mod client;
pub mod endpoint;
mod http;
pub mod output;
pub mod source;
