//! From a trusted intermediate to a key that reports can be checked with.

use super::crl::{CrlOutcome, Revocation};
use super::error::{ChainError, Link};
use super::leaf::Leaf;
use super::trust::{TrustedIntermediate, check_dates};
use super::x509::unix;
use super::{EMULATED_ORGANIZATION, EMULATED_PRODUCT_SUFFIX, pss};
use ring::signature::{ECDSA_P384_SHA384_FIXED, UnparsedPublicKey};
use rustls_pki_types::CertificateDer;
use std::ops::Deref;
use std::time::SystemTime;
use webpki::{EndEntityCert, Error, ExtendedKeyUsageValidator, KeyPurposeIdIter};

/// A leaf whose whole path was checked, at the clock that it was checked at. It reads as the
/// [`Leaf`] it was made of.
#[derive(Debug, Clone)]
pub struct VerifiedLeaf {
    leaf: Leaf,
    issuer: TrustedIntermediate,
    crl: CrlOutcome,
}

/// Checks a leaf under an intermediate: kind, product, names, dates of all three certificates,
/// signature, and then, last, revocation. Costs one RSA verification, and a second one for a
/// list that was not checked before.
pub fn verify(
    leaf: &Leaf,
    issuer: &TrustedIntermediate,
    revocation: &Revocation<'_>,
    clock: SystemTime,
) -> Result<VerifiedLeaf, ChainError> {
    check_place(leaf, issuer)?;
    check_all_dates(leaf, issuer, clock)?;
    check_path(leaf, issuer, clock)?;
    let crl = revocation.check(leaf, issuer, clock)?;
    Ok(VerifiedLeaf {
        leaf: leaf.clone(),
        issuer: issuer.clone(),
        crl,
    })
}

impl VerifiedLeaf {
    /// Checks again what time can change: all dates, and revocation. Signatures were checked when
    /// this was made.
    pub fn recheck(
        &self,
        revocation: &Revocation<'_>,
        clock: SystemTime,
    ) -> Result<Self, ChainError> {
        check_all_dates(&self.leaf, &self.issuer, clock)?;
        let crl = revocation.check(&self.leaf, &self.issuer, clock)?;
        Ok(Self {
            crl,
            ..self.clone()
        })
    }

    /// Whether `signature` (R ‖ S, big-endian, 48 bytes each) over `message` is this key's:
    /// ECDSA on P-384 with SHA-384.
    pub fn verify_signature(&self, message: &[u8], signature: &[u8; 96]) -> bool {
        UnparsedPublicKey::new(&ECDSA_P384_SHA384_FIXED, self.leaf.public_key())
            .verify(message, signature)
            .is_ok()
    }

    /// Whether the root is a software secure processor's, which protects nothing from its host.
    pub fn emulated(&self) -> bool {
        self.issuer.emulated()
    }

    /// The intermediate above it, and through it the root.
    pub fn issuer(&self) -> &TrustedIntermediate {
        &self.issuer
    }

    /// What is known of revocation: [`CrlOutcome::Good`], or [`CrlOutcome::Absent`] where that
    /// was allowed.
    pub fn crl(&self) -> &CrlOutcome {
        &self.crl
    }
}

impl Deref for VerifiedLeaf {
    type Target = Leaf;

    fn deref(&self) -> &Leaf {
        &self.leaf
    }
}

/// Kind, product and names.
fn check_place(leaf: &Leaf, issuer: &TrustedIntermediate) -> Result<(), ChainError> {
    if leaf.kind() != issuer.kind() {
        return Err(ChainError::WrongIntermediate {
            leaf: leaf.kind(),
            intermediate: issuer.kind(),
        });
    }
    if let Some(chain) = issuer.product().filter(|chain| *chain != leaf.product()) {
        return Err(ChainError::ProductMismatch {
            leaf: leaf.product(),
            chain,
        });
    }
    let marks = [
        leaf.product_name().ends_with(EMULATED_PRODUCT_SUFFIX),
        leaf.outline.organization == EMULATED_ORGANIZATION,
    ];
    if marks != [issuer.emulated(); 2] {
        return Err(ChainError::EmulationMismatch);
    }
    let above = issuer.outline();
    if leaf.outline.organization != above.organization {
        return Err(ChainError::Name {
            link: Link::Leaf,
            expected: above.organization.clone(),
            found: leaf.outline.organization.clone(),
        });
    }
    if leaf.outline.issuer != above.subject {
        return Err(ChainError::Name {
            link: Link::Leaf,
            expected: above.common_name.clone(),
            found: leaf.outline.issuer_name.clone(),
        });
    }
    Ok(())
}

fn check_all_dates(
    leaf: &Leaf,
    issuer: &TrustedIntermediate,
    clock: SystemTime,
) -> Result<(), ChainError> {
    issuer.check_dates(clock)?;
    check_dates(&leaf.outline, Link::Leaf, clock)
}

/// What rustls-webpki checks, with the intermediate as its trust anchor.
fn check_path(
    leaf: &Leaf,
    issuer: &TrustedIntermediate,
    clock: SystemTime,
) -> Result<(), ChainError> {
    let time = unix(clock).map_err(|_| ChainError::NotYetValid(Link::Leaf))?;
    let above = CertificateDer::from(issuer.outline().der.as_slice());
    let anchor = webpki::anchor_from_trusted_cert(&above).map_err(refused)?;
    let below = CertificateDer::from(leaf.as_der());
    EndEntityCert::try_from(&below)
        .and_then(|certificate| {
            certificate
                .verify_for_usage(
                    &pss::AMD_PSS,
                    &[anchor],
                    &[],
                    time,
                    NoKeyPurpose,
                    None,
                    None,
                )
                .map(|_| ())
        })
        .map_err(refused)
}

fn refused(error: Error) -> ChainError {
    match error {
        Error::InvalidSignatureForPublicKey => ChainError::Signature(Link::Leaf),
        Error::CertExpired { .. } => ChainError::Expired(Link::Leaf),
        Error::CertNotValidYet { .. } => ChainError::NotYetValid(Link::Leaf),
        Error::CaUsedAsEndEntity => ChainError::LeafIsAuthority,
        Error::UnsupportedCriticalExtension => ChainError::CriticalExtension(Link::Leaf),
        other => ChainError::Path(other.to_string()),
    }
}

/// No extended key usage: [`Leaf::parse`] refuses one with its own code, this is the second look.
struct NoKeyPurpose;

impl ExtendedKeyUsageValidator for NoKeyPurpose {
    fn validate(&self, purposes: KeyPurposeIdIter<'_, '_>) -> Result<(), Error> {
        match purposes.count() {
            0 => Ok(()),
            _ => Err(Error::ExtensionValueInvalid),
        }
    }
}
