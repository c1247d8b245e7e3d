//! SEV-SNP in the software secure processor. **Emulated: it protects nothing from its host.**

#[cfg(any(test, feature = "testing"))]
#[doc(hidden)]
pub mod forge;
mod identity;
mod key;
mod report;
mod x509;

pub use identity::{SnpCertificates, SnpIdentity, SnpIdentityError};
pub use key::EndorsementKey;
pub use report::ReportFields;
pub use x509::CaKeySize;
