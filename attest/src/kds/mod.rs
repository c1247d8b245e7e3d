//! AMD's key service (KDS): the certificates and revocation lists that verification needs, from the
//! service, from a cache folder, or from a bundle that was carried here.
//!
//! | From | What is believed of it |
//! | --- | --- |
//! | [`Client`]: the service, or a mirror | nothing |
//! | [`Cache`]: a folder | nothing |
//! | [`Bundle`]: a file from another machine | nothing |
//!
//! [`Source`] is the one way in: whatever the origin, an answer is bounded, taken apart
//! ([`parse_chain`], [`parse_leaf`], [`parse_crl`]), verified against the roots in
//! [`SnpTrust`](crate::chain::SnpTrust) and compared with what was asked for, before it is used and
//! before it is kept. A cached file is verified anew at each reading.
//!
//! Addresses and formats follow AMD publication 57230, "Versioned Chip Endorsement Key (VCEK)
//! Certificate and KDS Interface Specification".

mod bundle;
mod cache;
mod client;
mod deadline;
mod error;
mod pem;
mod request;
mod response;
mod source;

pub use bundle::{Bundle, BundleError, MAX_BUNDLE_LEN};
pub use cache::{Cache, CacheError};
pub use client::{Client, ClientError, Limits, Pace, SystemPace};
pub use error::{KdsError, Lack};
pub use request::{BaseUrl, Request, RequestError, VcekId, product_of};
pub use response::{ChainBody, ResponseError, parse_chain, parse_crl, parse_leaf};
pub use source::{Collateral, Item, Origin, Source};

use std::time::Duration;

/// What happens while something is obtained, for people who wait.
#[derive(Debug)]
pub enum Event<'a> {
    /// The service is asked.
    Asking {
        /// The whole address.
        url: &'a str,
        /// Which attempt, from 1.
        attempt: u32,
    },
    /// The client waits before it asks again.
    Waiting {
        /// Why.
        reason: &'a ClientError,
        /// How long.
        wait: Duration,
    },
    /// A cached file did not verify; the service is asked instead.
    Refused(&'a KdsError),
}

/// Who is told.
pub type Progress<'a> = dyn Fn(&Event<'_>) + Sync + 'a;
