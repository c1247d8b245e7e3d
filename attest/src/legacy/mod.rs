//! SEV before SNP: certificates, chains, sessions, the launch measure and secret packets, in
//! the binary formats of AMD publication 55766.
//!
//! Nothing that arrives here is believed: each parser takes exactly the bytes its format has
//! room for and keeps them as they came, so that signatures are checked over what was received
//! and never over a re-encoding of it.

pub mod builtin;
pub mod ca;
pub mod certificate;
pub mod chain;
pub mod measure;
pub mod packet;
pub mod policy;
pub mod report;
pub mod secret;
pub mod session;

pub use ca::{CaCertificate, CaError};
pub use certificate::{CertificateError, SevCertificate};
pub use chain::{ChainError, Generation, LegacyChain, TrustAnchors, VerifiedChain};
pub use measure::MeasureBlob;
pub use packet::PacketHeader;
pub use policy::{ApiVersion, GuestPolicy, PolicyFlag};
pub use report::{SevReport, SevReportError};
pub use secret::SecretPacket;
pub use session::{LaunchSession, OwnerSession, SessionBlob};
