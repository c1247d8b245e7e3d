//! The X.509 side of SNP attestation: from AMD's root key down to the key that signs reports.
//!
//! ```text
//! ARK ─┬─▶ ASK ───▶ VCEK   one chip's key
//!      └─▶ ASVK ──▶ VLEK   one cloud provider's key
//! ```
//!
//! Nothing that is parsed here is believed: a [`Leaf`], an [`Intermediate`] and a [`Crl`] are
//! well-formed and no more. [`SnpTrust`] makes a [`TrustedIntermediate`] of an intermediate, and
//! [`verify`] is the only source of a [`VerifiedLeaf`]. Both can be kept: an intermediate for as
//! many leaves as there are, a verified leaf for [`VerifiedLeaf::recheck`].
//!
//! | Checked | of the root | of the intermediate | of the leaf |
//! | --- | --- | --- | --- |
//! | authenticity | pinned whole, byte for byte | signature, here | signature, rustls-webpki |
//! | algorithm identifier | – | one of AMD's two, here | the same, rustls-webpki |
//! | names | pinned | exact, here | exact, here; issuer = subject, both |
//! | dates at the caller's clock | here | here | here, and rustls-webpki |
//! | CA, path length, key usage | here | here | not a CA, rustls-webpki; key usage, here |
//! | critical extensions | – | only known ones, here | only known ones, rustls-webpki |
//! | extended key usage | – | must be absent, here | must be absent, rustls-webpki |
//! | product, kind of key | by its fingerprint | by its name | by extensions and name, here |
//! | revocation | CRL, here | CRL, here | CRL, as far as it can be: [`CrlOutcome::Good`] |
//!
//! rustls-webpki treats its trust anchor as given and looks neither at its dates nor at its
//! extensions. So the path is walked in two steps, each of which checks its issuer in full first;
//! this also lets an intermediate's check be kept.
//!
//! Format: AMD publication 57230, "Versioned Chip Endorsement Key (VCEK) Certificate and KDS
//! Interface Specification".

mod crl;
mod error;
mod extensions;
mod leaf;
mod pss;
mod trust;
mod verified;
mod x509;

pub use crl::{Crl, CrlError, CrlMode, CrlOutcome, MAX_CRL_LEN, Revocation};
pub use error::{ChainError, Link};
pub use extensions::{AmdExtension, ExtensionError};
pub use leaf::{Leaf, LeafError};
pub use trust::{Intermediate, SnpRoot, SnpTrust, TrustedIntermediate};
pub use verified::{VerifiedLeaf, verify};
pub use x509::{CertificateError, MAX_CERTIFICATE_LEN, Serial, Validity, split_pem};

/// The common name of every emulated root.
pub const EMULATED_ROOT_NAME: &str = "ARK-EMULATED";
/// The common name of the intermediate over emulated VCEKs.
pub const EMULATED_ASK_NAME: &str = "SEV-EMULATED";
/// The common name of the intermediate over emulated VLEKs.
pub const EMULATED_ASVK_NAME: &str = "SEV-VLEK-EMULATED";
/// The organization in every emulated root, intermediate and leaf.
pub const EMULATED_ORGANIZATION: &str = "NOT AMD";
/// What the product name of every emulated leaf ends with: `Milan-EMULATED`.
pub const EMULATED_PRODUCT_SUFFIX: &str = "-EMULATED";
/// The organization in AMD's certificates.
pub const AMD_ORGANIZATION: &str = "Advanced Micro Devices";
/// The common name of every VCEK.
pub const VCEK_NAME: &str = "SEV-VCEK";
/// The common name of every VLEK.
pub const VLEK_NAME: &str = "SEV-VLEK";

#[cfg(test)]
mod tests;
