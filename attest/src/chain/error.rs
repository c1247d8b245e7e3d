//! Why a chain is not believed, each reason with a code that does not change.

use super::crl::{CrlError, CrlOutcome};
use super::extensions::ExtensionError;
use super::leaf::LeafError;
use super::x509::CertificateError;
use crate::product::Product;
use crate::report::SigningKey;
use std::fmt;

/// A certificate's place in the chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// ARK.
    Root,
    /// ASK or ASVK.
    Intermediate,
    /// VCEK or VLEK.
    Leaf,
}

/// Why a chain is not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// The root is neither one of AMD's nor an emulated one that was named.
    #[error(
        "{0} is not one of AMD's three pinned roots; if it is the emulated root of a machine of \
         yours, name its fingerprint"
    )]
    RootNotPinned(String),
    /// A root was named as emulated but is not made like one.
    #[error(
        "the root named as emulated does not call itself ARK-EMULATED of NOT AMD; it is not \
         accepted"
    )]
    NotMarkedEmulated,
    /// One of AMD's roots was named as emulated.
    #[error("this is AMD's {0} root and cannot be trusted as an emulated one; leave it out")]
    EmulatedIsAmd(Product),
    /// A root or intermediate is not well formed.
    #[error("the {0}: {1}")]
    Certificate(Link, #[source] CertificateError),
    /// The leaf is not well formed.
    #[error(transparent)]
    Leaf(#[from] LeafError),
    /// The signature is not its issuer's.
    #[error("the {0} is not signed by the certificate above it; it was forged or damaged")]
    Signature(Link),
    /// The clock is past the last date.
    #[error("the {0} has expired; fetch a new one, or verify at an earlier time")]
    Expired(Link),
    /// The clock is before the first date.
    #[error("the {0} is not valid yet; check the clock")]
    NotYetValid(Link),
    /// A name is not the one its place asks for.
    #[error("the {link} calls itself or its issuer `{found}` where `{expected}` should be")]
    Name {
        /// Whose name.
        link: Link,
        /// What the place asks for.
        expected: String,
        /// What is there.
        found: String,
    },
    /// An ASK over a VLEK, or an ASVK over a VCEK.
    #[error("a {leaf:?} leaf was given with the intermediate for {intermediate:?} leaves")]
    WrongIntermediate {
        /// The leaf's kind.
        leaf: SigningKey,
        /// The kind of leaf that the intermediate signs.
        intermediate: SigningKey,
    },
    /// The leaf is for another product than its chain.
    #[error("the leaf is for {leaf}, its chain for {chain}; fetch the chain for {leaf}")]
    ProductMismatch {
        /// The leaf's.
        leaf: Product,
        /// The intermediate's.
        chain: Product,
    },
    /// The leaf is marked as emulated and its root is not, or the other way round.
    #[error("the leaf's marks of emulation do not fit its root")]
    EmulationMismatch,
    /// Not allowed to sign what is below it.
    #[error("the {0} is not a certificate authority that may sign the certificate below it")]
    NotAuthority(Link),
    /// The leaf is a certificate authority.
    #[error("the leaf is marked as a certificate authority")]
    LeafIsAuthority,
    /// An extension that must be understood is not.
    #[error("the {0} has a critical extension that is not known here")]
    CriticalExtension(Link),
    /// The intermediate has an extended key usage, which no SNP certificate has.
    #[error("the intermediate is restricted to other uses by an extended key usage")]
    KeyPurpose,
    /// rustls-webpki refused the path for a reason that has no code of its own.
    #[error("path validation refused the leaf: {0}")]
    Path(String),
    /// The revocation list is absent where it is required, or says no, or cannot be relied on.
    #[error("revocation: {0}")]
    Revocation(CrlOutcome),
    /// The revocation list is not well formed.
    #[error(transparent)]
    Crl(#[from] CrlError),
}

impl ChainError {
    /// A stable name for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::RootNotPinned(_) => "ROOT_NOT_PINNED",
            Self::NotMarkedEmulated => "ROOT_NOT_MARKED_EMULATED",
            Self::EmulatedIsAmd(_) => "ROOT_IS_AMD",
            Self::Certificate(_, error) => error.code(),
            Self::Leaf(error) => error.code(),
            Self::Signature(link) => {
                link.pick("ROOT_SIGNATURE", "INTERMEDIATE_SIGNATURE", "LEAF_SIGNATURE")
            }
            Self::Expired(link) => {
                link.pick("ROOT_EXPIRED", "INTERMEDIATE_EXPIRED", "LEAF_EXPIRED")
            }
            Self::NotYetValid(link) => link.pick(
                "ROOT_NOT_YET_VALID",
                "INTERMEDIATE_NOT_YET_VALID",
                "LEAF_NOT_YET_VALID",
            ),
            Self::Name { .. } => "CHAIN_NAME",
            Self::WrongIntermediate { .. } => "WRONG_INTERMEDIATE",
            Self::ProductMismatch { .. } => "PRODUCT_MISMATCH",
            Self::EmulationMismatch => "EMULATION_MISMATCH",
            Self::NotAuthority(_) => "NOT_AUTHORITY",
            Self::LeafIsAuthority => "LEAF_IS_AUTHORITY",
            Self::CriticalExtension(_) => "CRITICAL_EXTENSION",
            Self::KeyPurpose => "KEY_PURPOSE",
            Self::Path(_) => "CHAIN_PATH",
            Self::Revocation(outcome) => outcome.code(),
            Self::Crl(error) => error.code(),
        }
    }
}

impl CertificateError {
    /// A stable name for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::TooLarge(_) => "CERTIFICATE_TOO_LARGE",
            Self::Pem { .. } => "CERTIFICATE_PEM",
            Self::Malformed => "CERTIFICATE_MALFORMED",
            Self::Version => "CERTIFICATE_VERSION",
            Self::Algorithm => "CERTIFICATE_ALGORITHM",
            Self::Name => "CERTIFICATE_NAME",
            Self::Dates => "CERTIFICATE_DATES",
            Self::Duplicate(_) => "EXTENSION_DUPLICATE",
        }
    }
}

impl LeafError {
    /// A stable name for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Certificate(error) => error.code(),
            Self::Extension(error) => error.code(),
            Self::Key => "LEAF_KEY",
            Self::Name { .. } => "LEAF_NAME",
            Self::KeyUsage => "LEAF_KEY_USAGE",
            Self::KeyPurpose => "KEY_PURPOSE",
        }
    }
}

impl ExtensionError {
    /// A stable name for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Missing(_) => "EXTENSION_MISSING",
            Self::Unexpected(..) => "EXTENSION_UNEXPECTED",
            Self::Encoding(..) => "EXTENSION_ENCODING",
            Self::Negative(_) => "EXTENSION_NEGATIVE",
            Self::Range(_) => "EXTENSION_RANGE",
            Self::Layout(_) => "EXTENSION_LAYOUT",
            Self::Length { .. } => "EXTENSION_LENGTH",
            Self::Product(_) => "EXTENSION_PRODUCT",
        }
    }
}

impl Link {
    const fn pick(
        self,
        root: &'static str,
        intermediate: &'static str,
        leaf: &'static str,
    ) -> &'static str {
        match self {
            Self::Root => root,
            Self::Intermediate => intermediate,
            Self::Leaf => leaf,
        }
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.pick("root", "intermediate", "leaf"))
    }
}
