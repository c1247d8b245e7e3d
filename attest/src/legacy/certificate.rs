//! The 2084-byte SEV certificate: CEK, OCA, PEK, PDH, and the owner's Diffie-Hellman key.
//!
//! A parsed certificate is well-formed, nothing more: whose key it is, is known only after
//! [`LegacyChain::verify`](super::LegacyChain::verify).

use crate::bytes;
use p384::ecdsa::signature::hazmat::{PrehashSigner, PrehashVerifier};
use p384::elliptic_curve::sec1::ToEncodedPoint;
use p384::{EncodedPoint, FieldBytes, PublicKey, SecretKey};
use ring::digest;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

/// Whose key a certificate holds, or who signed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Usage {
    /// AMD root key.
    Ark,
    /// AMD SEV signing key.
    Ask,
    /// Owner certificate authority.
    Oca,
    /// Platform endorsement key.
    Pek,
    /// Platform Diffie-Hellman key.
    Pdh,
    /// Chip endorsement key.
    Cek,
}

/// What a key or a signature is made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// RSASSA-PSS with SHA-256.
    RsaSha256,
    /// ECDSA over P-384 with SHA-256; what all known PEKs use.
    EcdsaSha256,
    /// ECDH over P-384, KDF on SHA-256.
    EcdhSha256,
    /// RSASSA-PSS with SHA-384.
    RsaSha384,
    /// ECDSA over P-384 with SHA-384.
    EcdsaSha384,
    /// ECDH over P-384, KDF on SHA-384.
    EcdhSha384,
}

/// One of a certificate's two signatures, as received.
#[derive(Debug, Clone, Copy)]
pub struct Signature<'a> {
    /// The role of the key that is said to have made it.
    pub usage: Usage,
    /// How it is said to be made.
    pub algorithm: Algorithm,
    /// 512 bytes, little-endian, zero-filled.
    pub bytes: &'a [u8],
}

/// A well-formed SEV certificate whose signatures have not been checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "ByteBuf", into = "ByteBuf")]
pub struct SevCertificate {
    raw: Vec<u8>,
    usage: Usage,
    algorithm: Algorithm,
    key: PublicKey,
}

/// Why bytes are no SEV certificate, or one does not bear the signature it should.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    /// Too short or too long.
    #[error("an SEV certificate has {CERTIFICATE_LEN} bytes, this one has {0}")]
    Length(usize),
    /// An unknown format version.
    #[error("SEV certificate version {0} is unknown; only version 1 is")]
    Version(u32),
    /// A usage value that names no key of a platform.
    #[error("SEV certificate usage {0:#x} names no platform or owner key")]
    Usage(u32),
    /// A key algorithm that such certificates do not use.
    #[error("SEV certificate key algorithm {0:#x} is not ECDSA or ECDH")]
    Algorithm(u32),
    /// The public key is not a P-384 point.
    #[error("the {0:?} certificate's public key is not a point on P-384")]
    PublicKey(Usage),
    /// The signature that should be there is not.
    #[error("the {subject:?} certificate has no {signer:?} signature of a fitting algorithm")]
    Unsigned {
        /// Whose certificate it is.
        subject: Usage,
        /// Who should have signed it.
        signer: Usage,
    },
    /// A signature is there, and wrong.
    #[error("the {signer:?} signature on the {subject:?} certificate is not valid")]
    BadSignature {
        /// Whose certificate it is.
        subject: Usage,
        /// Who is said to have signed it.
        signer: Usage,
    },
}

impl SevCertificate {
    /// Parses exactly [`CERTIFICATE_LEN`] bytes.
    pub fn parse(raw: &[u8]) -> Result<Self, CertificateError> {
        let truncated = CertificateError::Length(raw.len());
        if raw.len() != CERTIFICATE_LEN {
            return Err(truncated);
        }
        let field = |offset| bytes::le32(raw, offset).ok_or(CertificateError::Length(raw.len()));
        let version = field(0)?;
        if version != 1 {
            return Err(CertificateError::Version(version));
        }
        let usage = field(USAGE_AT)?;
        let usage = match Usage::from_raw(usage) {
            Some(Usage::Ark | Usage::Ask) | None => return Err(CertificateError::Usage(usage)),
            Some(usage) => usage,
        };
        let algorithm = field(ALGORITHM_AT)?;
        let algorithm = match Algorithm::from_raw(algorithm) {
            Some(Algorithm::RsaSha256 | Algorithm::RsaSha384) | None => {
                return Err(CertificateError::Algorithm(algorithm));
            }
            Some(algorithm) => algorithm,
        };
        let key = public_key(raw).ok_or(CertificateError::PublicKey(usage))?;
        Ok(Self {
            raw: raw.to_vec(),
            usage,
            algorithm,
            key,
        })
    }

    /// The bytes as received, [`CERTIFICATE_LEN`] of them.
    pub fn as_bytes(&self) -> &[u8] {
        &self.raw
    }

    /// Whose key this is.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// The firmware API version that made the certificate.
    pub fn api(&self) -> super::ApiVersion {
        let [major, minor] = bytes::array(&self.raw, API_AT).unwrap_or_default();
        super::ApiVersion { major, minor }
    }

    /// The public key, a point on P-384.
    pub fn public_key(&self) -> &PublicKey {
        &self.key
    }

    /// SHA-256 of the signed part: names the key and its role, whoever signs it.
    pub fn fingerprint(&self) -> [u8; 32] {
        sha256(self.body())
    }

    /// The signature by the key of role `signer`, in whichever of the two places it is.
    pub fn signature_by(&self, signer: Usage) -> Option<Signature<'_>> {
        SIGNATURES_AT
            .into_iter()
            .filter_map(|at| self.signature_at(at))
            .find(|signature| signature.usage == signer)
    }

    /// Checks that `issuer`'s key signed this certificate.
    pub fn verify_signed_by(&self, issuer: &Self) -> Result<(), CertificateError> {
        let (subject, signer) = (self.usage, issuer.usage);
        let signature = self
            .signature_by(signer)
            .filter(|signature| signature.algorithm == issuer.algorithm)
            .ok_or(CertificateError::Unsigned { subject, signer })?;
        if signature.algorithm.digest(&[]).is_none() {
            return Err(CertificateError::Unsigned { subject, signer });
        }
        if issuer.verifies(self.body(), signature.bytes) {
            Ok(())
        } else {
            Err(CertificateError::BadSignature { subject, signer })
        }
    }

    /// What this key signs with.
    pub(crate) fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// Whether `signature`, R then S of [`COORDINATE_LEN`] bytes, is this key's over `message`.
    pub(crate) fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        let digest = self.algorithm.digest(message);
        digest
            .zip(ecdsa_signature(signature))
            .is_some_and(|(digest, signature)| {
                p384::ecdsa::VerifyingKey::from(self.key)
                    .verify_prehash(digest.as_ref(), &signature)
                    .is_ok()
            })
    }

    /// The part that signatures cover.
    pub(crate) fn body(&self) -> &[u8] {
        self.raw.get(..BODY_LEN).unwrap_or_default()
    }

    fn signature_at(&self, at: usize) -> Option<Signature<'_>> {
        Some(Signature {
            usage: Usage::from_raw(bytes::le32(&self.raw, at)?)?,
            algorithm: Algorithm::from_raw(bytes::le32(&self.raw, at.checked_add(4)?)?)?,
            bytes: self
                .raw
                .get(at.checked_add(8)?..at.checked_add(SIGNATURE_LEN)?)?,
        })
    }
}

impl TryFrom<ByteBuf> for SevCertificate {
    type Error = CertificateError;

    fn try_from(raw: ByteBuf) -> Result<Self, Self::Error> {
        Self::parse(&raw)
    }
}

impl From<SevCertificate> for ByteBuf {
    fn from(certificate: SevCertificate) -> Self {
        Self::from(certificate.raw)
    }
}

/// Builds a certificate: the software secure processor's, or an owner's one-time DH key.
pub(crate) struct CertificateBuilder {
    body: Vec<u8>,
    signatures: Vec<u8>,
    usage: Usage,
    key: PublicKey,
}

impl CertificateBuilder {
    /// An unsigned certificate of `key`; PDH keys agree, all others sign.
    pub(crate) fn new(usage: Usage, key: PublicKey, api: super::ApiVersion) -> Self {
        let mut body = Vec::with_capacity(CERTIFICATE_LEN);
        body.extend(1u32.to_le_bytes());
        body.extend([api.major, api.minor, 0, 0]);
        body.extend(usage.raw().to_le_bytes());
        body.extend(key_algorithm(usage).raw().to_le_bytes());
        body.extend(CURVE_P384.to_le_bytes());
        let point = key.to_encoded_point(false);
        for coordinate in [point.x(), point.y()].into_iter().flatten() {
            bytes::push_reversed(&mut body, coordinate, COORDINATE_LEN);
        }
        body.resize(BODY_LEN, 0);
        Self {
            body,
            signatures: Vec::new(),
            usage,
            key,
        }
    }

    /// What is to be signed.
    pub(crate) fn body(&self) -> &[u8] {
        &self.body
    }

    /// Adds an ECDSA signature by the key of role `signer`.
    pub(crate) fn sign(self, signer: Usage, key: &SecretKey) -> Result<Self, CertificateError> {
        let failed = CertificateError::BadSignature {
            subject: self.usage,
            signer,
        };
        let signature = ecdsa_sign(key, &self.body).ok_or(failed)?;
        Ok(self.add_signature(signer, Algorithm::EcdsaSha256, &signature))
    }

    /// Adds a ready-made little-endian signature.
    pub(crate) fn add_signature(mut self, signer: Usage, how: Algorithm, bytes: &[u8]) -> Self {
        let end = self.signatures.len().saturating_add(SIGNATURE_LEN);
        self.signatures.extend(signer.raw().to_le_bytes());
        self.signatures.extend(how.raw().to_le_bytes());
        self.signatures.extend(bytes);
        self.signatures.resize(end, 0);
        self
    }

    /// The finished certificate; places without a signature say so.
    pub(crate) fn finish(self) -> SevCertificate {
        let mut raw = self.body;
        raw.extend(self.signatures);
        while raw.len() < CERTIFICATE_LEN {
            let end = raw.len().saturating_add(SIGNATURE_LEN);
            raw.extend(USAGE_NONE.to_le_bytes());
            raw.resize(end, 0);
        }
        raw.truncate(CERTIFICATE_LEN);
        SevCertificate {
            raw,
            usage: self.usage,
            algorithm: key_algorithm(self.usage),
            key: self.key,
        }
    }
}

impl Usage {
    /// The value in the certificate.
    pub const fn raw(self) -> u32 {
        match self {
            Self::Ark => 0x0,
            Self::Ask => 0x13,
            Self::Oca => 0x1001,
            Self::Pek => 0x1002,
            Self::Pdh => 0x1003,
            Self::Cek => 0x1004,
        }
    }

    pub(crate) fn from_raw(raw: u32) -> Option<Self> {
        [
            Self::Ark,
            Self::Ask,
            Self::Oca,
            Self::Pek,
            Self::Pdh,
            Self::Cek,
        ]
        .into_iter()
        .find(|usage| usage.raw() == raw)
    }
}

impl Algorithm {
    /// The value in the certificate.
    pub const fn raw(self) -> u32 {
        match self {
            Self::RsaSha256 => 0x001,
            Self::EcdsaSha256 => 0x002,
            Self::EcdhSha256 => 0x003,
            Self::RsaSha384 => 0x101,
            Self::EcdsaSha384 => 0x102,
            Self::EcdhSha384 => 0x103,
        }
    }

    pub(crate) fn from_raw(raw: u32) -> Option<Self> {
        [
            Self::RsaSha256,
            Self::EcdsaSha256,
            Self::EcdhSha256,
            Self::RsaSha384,
            Self::EcdsaSha384,
            Self::EcdhSha384,
        ]
        .into_iter()
        .find(|algorithm| algorithm.raw() == raw)
    }

    /// The hash of `message` that an ECDSA signature covers; `None` for what is not ECDSA.
    fn digest(self, message: &[u8]) -> Option<digest::Digest> {
        match self {
            Self::EcdsaSha256 => Some(digest::digest(&digest::SHA256, message)),
            Self::EcdsaSha384 => Some(digest::digest(&digest::SHA384, message)),
            _ => None,
        }
    }
}

/// SHA-256 in one call.
pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(digest::digest(&digest::SHA256, bytes).as_ref());
    out
}

fn key_algorithm(usage: Usage) -> Algorithm {
    match usage {
        Usage::Pdh => Algorithm::EcdhSha256,
        _ => Algorithm::EcdsaSha256,
    }
}

fn public_key(raw: &[u8]) -> Option<PublicKey> {
    if bytes::le32(raw, CURVE_AT)? != CURVE_P384 {
        return None;
    }
    let x = scalar(raw.get(X_AT..Y_AT)?)?;
    let y = scalar(raw.get(Y_AT..Y_AT.checked_add(COORDINATE_LEN)?)?)?;
    let point = EncodedPoint::from_affine_coordinates(&x, &y, false);
    PublicKey::from_sec1_bytes(point.as_bytes()).ok()
}

/// ECDSA with SHA-256 over `message`, as firmware stores it: R then S, little-endian.
pub(crate) fn ecdsa_sign(key: &SecretKey, message: &[u8]) -> Option<Vec<u8>> {
    let key = p384::ecdsa::SigningKey::from(key);
    let digest = digest::digest(&digest::SHA256, message);
    let value: p384::ecdsa::Signature = key.sign_prehash(digest.as_ref()).ok()?;
    let (r, s) = value.split_bytes();
    let mut bytes = Vec::with_capacity(2 * COORDINATE_LEN);
    bytes::push_reversed(&mut bytes, &r, COORDINATE_LEN);
    bytes::push_reversed(&mut bytes, &s, COORDINATE_LEN);
    Some(bytes)
}

fn ecdsa_signature(raw: &[u8]) -> Option<p384::ecdsa::Signature> {
    let r = scalar(raw.get(..COORDINATE_LEN)?)?;
    let s = scalar(raw.get(COORDINATE_LEN..COORDINATE_LEN.checked_mul(2)?)?)?;
    p384::ecdsa::Signature::from_scalars(r, s).ok()
}

/// A 72-byte little-endian field as a 48-byte big-endian number, if it fits.
fn scalar(field: &[u8]) -> Option<FieldBytes> {
    let (number, fill) = field.split_at_checked(P384_LEN)?;
    if fill.iter().any(|&byte| byte != 0) {
        return None;
    }
    FieldBytes::from_exact_iter(number.iter().rev().copied())
}

/// Length of an SEV certificate.
pub const CERTIFICATE_LEN: usize = 2084;

const BODY_LEN: usize = 1044;
const SIGNATURE_LEN: usize = 520;
const SIGNATURES_AT: [usize; 2] = [BODY_LEN, BODY_LEN + SIGNATURE_LEN];
const API_AT: usize = 4;
const USAGE_AT: usize = 8;
const ALGORITHM_AT: usize = 12;
const CURVE_AT: usize = 16;
const X_AT: usize = 20;
/// Length of R, S and each coordinate as firmware stores them.
pub(crate) const COORDINATE_LEN: usize = 72;
const Y_AT: usize = X_AT + COORDINATE_LEN;
const P384_LEN: usize = 48;
const CURVE_P384: u32 = 2;
const USAGE_NONE: u32 = 0x1000;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::legacy::ApiVersion;
    use proptest::prelude::*;
    use rand_core::OsRng;

    const PEK: &[u8] = include_bytes!("../../tests/vectors/legacy/rome/pek.cert");
    const OCA: &[u8] = include_bytes!("../../tests/vectors/legacy/rome/oca.cert");
    const NAPLES_OCA: &[u8] = include_bytes!("../../tests/vectors/legacy/naples/oca.cert");

    #[test]
    fn a_real_certificate_reads_as_what_it_is() {
        let pek = SevCertificate::parse(PEK).unwrap();
        assert_eq!(pek.usage(), Usage::Pek);
        assert_eq!(pek.api(), ApiVersion::new(0, 22));
        assert!(pek.signature_by(Usage::Cek).is_some());
        assert!(pek.signature_by(Usage::Pdh).is_none());
        pek.verify_signed_by(&SevCertificate::parse(OCA).unwrap())
            .unwrap();
    }

    #[test]
    fn another_platforms_owner_did_not_sign_it() {
        let pek = SevCertificate::parse(PEK).unwrap();
        let other = SevCertificate::parse(NAPLES_OCA).unwrap();
        assert_eq!(
            pek.verify_signed_by(&other),
            Err(CertificateError::BadSignature {
                subject: Usage::Pek,
                signer: Usage::Oca
            })
        );
    }

    #[test]
    fn every_changed_field_is_noticed() {
        let oca = SevCertificate::parse(OCA).unwrap();
        for (at, name) in [
            (4, "api"),
            (6, "reserved"),
            (200, "key fill"),
            (1060, "r"),
            (1130, "s"),
        ] {
            let mut raw = PEK.to_vec();
            raw[at] ^= 1;
            let pek = SevCertificate::parse(&raw).unwrap();
            assert!(pek.verify_signed_by(&oca).is_err(), "{name}");
        }
    }

    #[test]
    fn malformed_certificates_are_named() {
        let with = |at: usize, value: u32| {
            let mut raw = PEK.to_vec();
            raw[at..at + 4].copy_from_slice(&value.to_le_bytes());
            SevCertificate::parse(&raw).unwrap_err()
        };
        assert_eq!(with(0, 2), CertificateError::Version(2));
        assert_eq!(with(8, 0), CertificateError::Usage(0));
        assert_eq!(with(8, 0x1000), CertificateError::Usage(0x1000));
        assert_eq!(with(12, 1), CertificateError::Algorithm(1));
        assert_eq!(with(16, 1), CertificateError::PublicKey(Usage::Pek));
        assert_eq!(with(20, 0), CertificateError::PublicKey(Usage::Pek));
        assert_eq!(with(20 + 48, 1), CertificateError::PublicKey(Usage::Pek));
        let short = SevCertificate::parse(&PEK[..2083]).unwrap_err();
        assert_eq!(short, CertificateError::Length(2083));
    }

    #[test]
    fn what_is_built_parses_back_and_verifies() {
        let secret = SecretKey::random(&mut OsRng);
        let oca = CertificateBuilder::new(Usage::Oca, secret.public_key(), ApiVersion::new(1, 55))
            .sign(Usage::Oca, &secret)
            .unwrap()
            .finish();
        let parsed = SevCertificate::parse(oca.as_bytes()).unwrap();
        assert_eq!(parsed, oca);
        parsed.verify_signed_by(&oca).unwrap();
        let json = serde_json::to_string(&oca).unwrap();
        assert_eq!(serde_json::from_str::<SevCertificate>(&json).unwrap(), oca);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn arbitrary_bytes_never_panic(raw in proptest::collection::vec(any::<u8>(), 0..2200)) {
            let _ = SevCertificate::parse(&raw);
        }

        #[test]
        fn changed_certificates_never_panic_and_never_verify(at in 0usize..1196, bit in 0u8..8) {
            // 0..1196 is the signed part and the OCA's signature with its two labels.
            let mut raw = PEK.to_vec();
            raw[at] ^= 1 << bit;
            let oca = SevCertificate::parse(OCA).unwrap();
            if let Ok(pek) = SevCertificate::parse(&raw) {
                prop_assert!(pek.verify_signed_by(&oca).is_err());
            }
        }
    }
}
