//! The AMD CA certificate: the root key (ARK) and the SEV signing key (ASK).
//!
//! A parsed certificate is well-formed, nothing more. A root that verifies against itself proves
//! nothing either; [`TrustAnchors`](super::TrustAnchors) decides which root counts.

use super::certificate::{Algorithm, Usage, sha256};
use super::{CertificateError, SevCertificate};
use crate::bytes;
use ring::signature::{
    RSA_PSS_2048_8192_SHA256, RSA_PSS_2048_8192_SHA384, RsaParameters, RsaPublicKeyComponents,
};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

/// A well-formed AMD CA certificate whose signature has not been checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "ByteBuf", into = "ByteBuf")]
pub struct CaCertificate {
    raw: Vec<u8>,
    usage: Usage,
    size: KeySize,
}

/// The two sizes AMD uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeySize {
    /// 2048 bits, PSS with SHA-256: Naples (and the emulated root).
    Rsa2048,
    /// 4096 bits, PSS with SHA-384: Rome and later.
    Rsa4096,
}

/// Why bytes are no AMD CA certificate, or one does not bear the signature it should.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CaError {
    /// Fewer or more bytes than its own header says; a root without its signature is one case.
    #[error("an AMD CA certificate of this key size has {expected} bytes, this one has {found}")]
    Length {
        /// What the header asks for.
        expected: usize,
        /// What there is.
        found: usize,
    },
    /// An unknown format version.
    #[error("AMD CA certificate version {0} is unknown; only version 1 is")]
    Version(u32),
    /// Neither ARK nor ASK.
    #[error("AMD CA certificate usage {0:#x} is neither ARK nor ASK")]
    Usage(u32),
    /// A key size AMD does not use.
    #[error("AMD CA key of {modulus} bits with a {exponent}-bit exponent; 2048 and 4096 are known")]
    KeySize {
        /// Bits of the modulus.
        modulus: u32,
        /// Bits of the exponent's field.
        exponent: u32,
    },
    /// The issuer's id is not the one the certificate names.
    #[error("the {subject:?} certificate names another issuer than this {signer:?}")]
    Issuer {
        /// Whose certificate it is.
        subject: Usage,
        /// Who should have issued it.
        signer: Usage,
    },
    /// The signature is wrong.
    #[error("the {signer:?} signature on the {subject:?} certificate is not valid")]
    BadSignature {
        /// Whose certificate it is.
        subject: Usage,
        /// Who is said to have signed it.
        signer: Usage,
    },
}

impl CaCertificate {
    /// Parses exactly one certificate.
    pub fn parse(raw: &[u8]) -> Result<Self, CaError> {
        let (certificate, rest) = Self::parse_first(raw)?;
        if !rest.is_empty() {
            return Err(CaError::Length {
                expected: certificate.raw.len(),
                found: raw.len(),
            });
        }
        Ok(certificate)
    }

    /// Parses the first certificate of several and returns the rest.
    pub fn parse_first(raw: &[u8]) -> Result<(Self, &[u8]), CaError> {
        let too_short = |expected| CaError::Length {
            expected,
            found: raw.len(),
        };
        let field = |at| bytes::le32(raw, at).ok_or(too_short(HEADER_LEN));
        let version = field(0)?;
        if version != 1 {
            return Err(CaError::Version(version));
        }
        let usage = field(USAGE_AT)?;
        let usage = match Usage::from_raw(usage) {
            Some(usage @ (Usage::Ark | Usage::Ask)) => usage,
            _ => return Err(CaError::Usage(usage)),
        };
        let (exponent, modulus) = (field(EXPONENT_BITS_AT)?, field(MODULUS_BITS_AT)?);
        let size = match (exponent, modulus) {
            (2048, 2048) => KeySize::Rsa2048,
            (4096, 4096) => KeySize::Rsa4096,
            _ => return Err(CaError::KeySize { modulus, exponent }),
        };
        let (own, rest) = raw
            .split_at_checked(size.certificate_len())
            .ok_or(too_short(size.certificate_len()))?;
        let raw = own.to_vec();
        Ok((Self { raw, usage, size }, rest))
    }

    /// The bytes as received.
    pub fn as_bytes(&self) -> &[u8] {
        &self.raw
    }

    /// ARK or ASK.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// The key's size, which also decides the hash.
    pub fn key_size(&self) -> KeySize {
        self.size
    }

    /// The key's own id.
    pub fn key_id(&self) -> [u8; 16] {
        bytes::array(&self.raw, KEY_ID_AT).unwrap_or_default()
    }

    /// The id of the key that signed it.
    pub fn certifying_id(&self) -> [u8; 16] {
        bytes::array(&self.raw, CERTIFYING_ID_AT).unwrap_or_default()
    }

    /// SHA-256 of the signed part: header, exponent and modulus. What roots are pinned by.
    pub fn fingerprint(&self) -> [u8; 32] {
        sha256(self.body())
    }

    /// Checks that `issuer`'s key signed this certificate, and that it names that key.
    pub fn verify_signed_by(&self, issuer: &Self) -> Result<(), CaError> {
        let (subject, signer) = (self.usage, issuer.usage);
        if self.certifying_id() != issuer.key_id() {
            return Err(CaError::Issuer { subject, signer });
        }
        let bad = CaError::BadSignature { subject, signer };
        // A certificate's signature field is as long as its own key; both are, in all chains.
        if self.size != issuer.size {
            return Err(bad);
        }
        let signature = self.raw.get(self.size.body_len()..).unwrap_or_default();
        issuer.verify(self.body(), signature).map_err(|_| bad)
    }

    /// Checks the ASK's signature on a chip's endorsement key.
    pub fn verify_endorsement(&self, cek: &SevCertificate) -> Result<(), CertificateError> {
        let (subject, signer) = (cek.usage(), self.usage);
        let signature = cek
            .signature_by(signer)
            .filter(|signature| signature.algorithm == self.size.algorithm())
            .ok_or(CertificateError::Unsigned { subject, signer })?;
        let value = signature
            .bytes
            .get(..self.size.key_len())
            .unwrap_or_default();
        self.verify(cek.body(), value)
            .map_err(|_| CertificateError::BadSignature { subject, signer })
    }

    /// RSASSA-PSS over `message`; the signature is little-endian, as AMD stores it.
    fn verify(&self, message: &[u8], signature: &[u8]) -> Result<(), ring::error::Unspecified> {
        let key_len = self.size.key_len();
        let numbers = self.raw.get(HEADER_LEN..).unwrap_or_default();
        let (exponent, rest) = numbers.split_at_checked(key_len).unwrap_or_default();
        let modulus = rest.get(..key_len).unwrap_or_default();
        let key = RsaPublicKeyComponents {
            n: big_endian(modulus),
            e: big_endian(exponent),
        };
        key.verify(self.size.parameters(), message, &bytes::reversed(signature))
    }

    fn body(&self) -> &[u8] {
        self.raw.get(..self.size.body_len()).unwrap_or_default()
    }
}

impl TryFrom<ByteBuf> for CaCertificate {
    type Error = CaError;

    fn try_from(raw: ByteBuf) -> Result<Self, Self::Error> {
        Self::parse(&raw)
    }
}

impl From<CaCertificate> for ByteBuf {
    fn from(certificate: CaCertificate) -> Self {
        Self::from(certificate.raw)
    }
}

impl KeySize {
    /// Length of a whole certificate with such a key.
    pub const fn certificate_len(self) -> usize {
        self.body_len() + self.key_len()
    }

    pub(crate) const fn key_len(self) -> usize {
        match self {
            Self::Rsa2048 => 256,
            Self::Rsa4096 => 512,
        }
    }

    pub(crate) const fn body_len(self) -> usize {
        HEADER_LEN + 2 * self.key_len()
    }

    const fn algorithm(self) -> Algorithm {
        match self {
            Self::Rsa2048 => Algorithm::RsaSha256,
            Self::Rsa4096 => Algorithm::RsaSha384,
        }
    }

    fn parameters(self) -> &'static RsaParameters {
        match self {
            Self::Rsa2048 => &RSA_PSS_2048_8192_SHA256,
            Self::Rsa4096 => &RSA_PSS_2048_8192_SHA384,
        }
    }
}

/// The signed part of a 2048-bit certificate of our own; numbers are big-endian.
pub(crate) fn body_2048(
    usage: Usage,
    key_id: [u8; 16],
    certifying_id: [u8; 16],
    note: [u8; 16],
    exponent: &[u8],
    modulus: &[u8],
) -> Vec<u8> {
    let size = KeySize::Rsa2048;
    let mut body = Vec::with_capacity(size.certificate_len());
    body.extend(1u32.to_le_bytes());
    body.extend(key_id);
    body.extend(certifying_id);
    body.extend(usage.raw().to_le_bytes());
    body.extend(note);
    body.extend(2048u32.to_le_bytes());
    body.extend(2048u32.to_le_bytes());
    bytes::push_reversed(&mut body, exponent, size.key_len());
    bytes::push_reversed(&mut body, modulus, size.key_len());
    body
}

/// A little-endian number as ring wants it: big-endian, without leading zeros.
fn big_endian(number: &[u8]) -> Vec<u8> {
    number
        .iter()
        .rev()
        .copied()
        .skip_while(|&byte| byte == 0)
        .collect()
}

const HEADER_LEN: usize = 64;
const KEY_ID_AT: usize = 4;
const CERTIFYING_ID_AT: usize = 20;
const USAGE_AT: usize = 36;
const EXPONENT_BITS_AT: usize = 56;
const MODULUS_BITS_AT: usize = 60;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ARK: &[u8] = include_bytes!("../../tests/vectors/legacy/naples/ark.cert");
    const ASK: &[u8] = include_bytes!("../../tests/vectors/legacy/naples/ask.cert");
    const UNSIGNED_ARK: &[u8] = include_bytes!("../../tests/vectors/legacy/naples/ark.cert.bad");
    const ROME_ARK: &[u8] = include_bytes!("../../tests/vectors/legacy/rome/ark.cert");

    #[test]
    fn naples_verifies() {
        let ark = CaCertificate::parse(ARK).unwrap();
        let ask = CaCertificate::parse(ASK).unwrap();
        assert_eq!((ark.usage(), ask.usage()), (Usage::Ark, Usage::Ask));
        ark.verify_signed_by(&ark).unwrap();
        ask.verify_signed_by(&ark).unwrap();
    }

    #[test]
    fn a_root_without_its_signature_is_too_short() {
        assert_eq!(
            CaCertificate::parse(UNSIGNED_ARK),
            Err(CaError::Length {
                expected: 832,
                found: 576
            })
        );
    }

    #[test]
    fn another_generations_root_did_not_issue_it() {
        let ask = CaCertificate::parse(ASK).unwrap();
        let rome = CaCertificate::parse(ROME_ARK).unwrap();
        assert!(matches!(
            ask.verify_signed_by(&rome),
            Err(CaError::Issuer { .. })
        ));
    }

    #[test]
    fn several_certificates_part_at_their_lengths() {
        let both = [ASK, ARK].concat();
        let (ask, rest) = CaCertificate::parse_first(&both).unwrap();
        assert_eq!(ask.as_bytes(), ASK);
        assert_eq!(rest, ARK);
        assert!(matches!(
            CaCertificate::parse(&both),
            Err(CaError::Length { .. })
        ));
    }

    #[test]
    fn malformed_certificates_are_named() {
        let with = |at: usize, value: u32| {
            let mut raw = ARK.to_vec();
            raw[at..at + 4].copy_from_slice(&value.to_le_bytes());
            CaCertificate::parse(&raw).unwrap_err()
        };
        assert_eq!(with(0, 9), CaError::Version(9));
        assert_eq!(with(36, 0x1004), CaError::Usage(0x1004));
        assert!(matches!(with(60, u32::MAX), CaError::KeySize { .. }));
        assert!(matches!(with(56, 0), CaError::KeySize { .. }));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn arbitrary_bytes_never_panic(raw in proptest::collection::vec(any::<u8>(), 0..1700)) {
            let _ = CaCertificate::parse(&raw);
        }

        #[test]
        fn a_changed_certificate_never_verifies(at in 0usize..832, bit in 0u8..8) {
            let mut raw = ASK.to_vec();
            raw[at] ^= 1 << bit;
            if let Ok(ask) = CaCertificate::parse(&raw) {
                let ark = CaCertificate::parse(ARK).unwrap();
                prop_assert!(ask.verify_signed_by(&ark).is_err());
            }
        }
    }
}
