//! A leaf certificate: the key that signs reports. Parsed, not believed; [`super::verify`] does
//! that.

use super::extensions::{ExtensionError, Identity, LeafClaims};
use super::x509::{CertificateError, Outline, Serial, Validity};
use super::{VCEK_NAME, VLEK_NAME};
use crate::product::Product;
use crate::report::SigningKey;
use crate::tcb::TcbVersion;
use x509_parser::prelude::X509Certificate;

/// A well-formed VCEK or VLEK certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leaf {
    pub(super) outline: Outline,
    claims: LeafClaims,
    public_key: [u8; POINT_LEN],
}

/// Why bytes are no VCEK or VLEK certificate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LeafError {
    /// Not a certificate of AMD's make.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    /// One of AMD's extensions is wrong.
    #[error(transparent)]
    Extension(#[from] ExtensionError),
    /// The key is not an uncompressed point on P-384.
    #[error("the leaf's key is not on P-384; reports are signed with no other curve")]
    Key,
    /// The name does not belong to the extensions.
    #[error("the leaf calls itself `{found}`, its extensions say {expected}")]
    Name {
        /// What the extensions make of it.
        expected: &'static str,
        /// Its common name.
        found: String,
    },
    /// The key usage leaves out signatures.
    #[error("the leaf's key usage does not allow signatures")]
    KeyUsage,
    /// An extended key usage, which no SNP certificate has.
    #[error("the leaf is restricted to other uses by an extended key usage")]
    KeyPurpose,
}

impl Leaf {
    /// Reads exactly one certificate, DER or PEM, of at most [`super::MAX_CERTIFICATE_LEN`] bytes.
    pub fn parse(der_or_pem: &[u8]) -> Result<Self, LeafError> {
        let (outline, (claims, public_key)) = Outline::parse(der_or_pem, |certificate| {
            check_usage(certificate)?;
            let claims = LeafClaims::read(certificate.extensions())?;
            Ok::<_, LeafError>((claims, public_key(certificate)?))
        })?;
        let leaf = Self {
            outline,
            claims,
            public_key,
        };
        leaf.check_name()?;
        Ok(leaf)
    }

    fn check_name(&self) -> Result<(), LeafError> {
        let expected = match self.kind() {
            SigningKey::Vcek => VCEK_NAME,
            SigningKey::Vlek => VLEK_NAME,
        };
        if self.outline.common_name != expected {
            return Err(LeafError::Name {
                expected,
                found: self.outline.common_name.clone(),
            });
        }
        Ok(())
    }

    /// VCEK or VLEK.
    pub fn kind(&self) -> SigningKey {
        match self.claims.identity {
            Identity::Chip(_) => SigningKey::Vcek,
            Identity::Provider(_) => SigningKey::Vlek,
        }
    }

    /// The product that the leaf claims.
    pub fn product(&self) -> Product {
        self.claims.product
    }

    /// The product's full name: `Milan-B0`.
    pub fn product_name(&self) -> &str {
        &self.claims.product_name
    }

    /// The patch levels that the key is derived from.
    pub fn tcb(&self) -> TcbVersion {
        self.claims.tcb
    }

    /// The chip, [`Product::hwid_len`] bytes; `None` in a VLEK.
    pub fn hwid(&self) -> Option<&[u8]> {
        match &self.claims.identity {
            Identity::Chip(hwid) => Some(hwid),
            Identity::Provider(_) => None,
        }
    }

    /// The cloud provider; `None` in a VCEK.
    pub fn csp_id(&self) -> Option<&str> {
        match &self.claims.identity {
            Identity::Chip(_) => None,
            Identity::Provider(csp_id) => Some(csp_id),
        }
    }

    /// The key: `04 ‖ x ‖ y`, a P-384 point.
    pub fn public_key(&self) -> &[u8; POINT_LEN] {
        &self.public_key
    }

    /// The period that it claims to be valid for.
    pub fn validity(&self) -> Validity {
        self.outline.validity
    }

    /// The serial number; AMD's leaves have 0.
    pub fn serial(&self) -> &Serial {
        &self.outline.serial
    }

    /// SHA-256 of the DER. The key service issues the same key anew, so this is no name for a key.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.outline.sha256
    }

    /// The certificate, DER.
    pub fn as_der(&self) -> &[u8] {
        &self.outline.der
    }
}

fn check_usage(certificate: &X509Certificate<'_>) -> Result<(), LeafError> {
    match certificate.extended_key_usage() {
        Ok(None) => {}
        Ok(Some(_)) => return Err(LeafError::KeyPurpose),
        Err(_) => return Err(CertificateError::Malformed.into()),
    }
    match certificate.key_usage() {
        Ok(None) => Ok(()),
        Ok(Some(usage)) if usage.value.digital_signature() => Ok(()),
        Ok(Some(_)) => Err(LeafError::KeyUsage),
        Err(_) => Err(CertificateError::Malformed.into()),
    }
}

fn public_key(certificate: &X509Certificate<'_>) -> Result<[u8; POINT_LEN], LeafError> {
    let info = certificate.public_key();
    let curve = info.algorithm.parameters.as_ref();
    let curve = curve.and_then(|any| any.as_oid().ok());
    let on_p384 = info.algorithm.algorithm.as_bytes() == EC_PUBLIC_KEY
        && curve.is_some_and(|oid| oid.as_bytes() == SECP384R1);
    let point: [u8; POINT_LEN] = info
        .subject_public_key
        .data
        .as_ref()
        .try_into()
        .map_err(|_| LeafError::Key)?;
    match point {
        [0x04, ..] if on_p384 && info.subject_public_key.unused_bits == 0 => Ok(point),
        _ => Err(LeafError::Key),
    }
}

/// An uncompressed P-384 point.
const POINT_LEN: usize = 97;
/// 1.2.840.10045.2.1.
const EC_PUBLIC_KEY: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1];
/// 1.3.132.0.34.
const SECP384R1: &[u8] = &[0x2b, 0x81, 4, 0, 0x22];
