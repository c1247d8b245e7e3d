//! RSASSA-PSS with SHA-384, as AMD writes it down.
//!
//! AMD encodes the same algorithm in two ways, with the default trailer field spelled out (all
//! roots and intermediates, older leaves) and without it. rustls-webpki compares encodings byte
//! for byte and knows neither.

use ring::signature::{RSA_PSS_2048_8192_SHA384, UnparsedPublicKey};
use rustls_pki_types::{
    AlgorithmIdentifier, InvalidSignature, SignatureVerificationAlgorithm, alg_id,
};

/// Both encodings, for rustls-webpki.
pub(super) static AMD_PSS: [&dyn SignatureVerificationAlgorithm; 2] =
    [&Pss(EXPLICIT_TRAILER), &Pss(DEFAULT_TRAILER)];

/// Either: they differ in their identifier alone.
pub(super) static PSS: &dyn SignatureVerificationAlgorithm = &Pss(DEFAULT_TRAILER);

/// Whether this is the content of an AlgorithmIdentifier for PSS with SHA-384, MGF1 with SHA-384
/// and a salt of 48 bytes.
pub(super) fn is_amd_pss(identifier: &[u8]) -> bool {
    identifier == EXPLICIT_TRAILER || identifier == DEFAULT_TRAILER
}

#[derive(Debug)]
struct Pss(&'static [u8]);

impl SignatureVerificationAlgorithm for Pss {
    fn verify_signature(
        &self,
        public_key: &[u8],
        message: &[u8],
        signature: &[u8],
    ) -> Result<(), InvalidSignature> {
        UnparsedPublicKey::new(&RSA_PSS_2048_8192_SHA384, public_key)
            .verify(message, signature)
            .map_err(|_| InvalidSignature)
    }

    fn public_key_alg_id(&self) -> AlgorithmIdentifier {
        alg_id::RSA_ENCRYPTION
    }

    fn signature_alg_id(&self) -> AlgorithmIdentifier {
        AlgorithmIdentifier::from_slice(self.0)
    }
}

/// id-RSASSA-PSS { [0] SHA-384, [1] MGF1 { SHA-384 }, [2] salt 48, [3] trailer 1 }, 70 bytes.
pub(super) const EXPLICIT_TRAILER: &[u8] = b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x0a\x30\x39\
    \xa0\x0f\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x02\x05\x00\
    \xa1\x1c\x30\x1a\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x08\
    \x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x02\x05\x00\
    \xa2\x03\x02\x01\x30\xa3\x03\x02\x01\x01";
/// The same without [3], 65 bytes.
pub(super) const DEFAULT_TRAILER: &[u8] = b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x0a\x30\x34\
    \xa0\x0f\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x02\x05\x00\
    \xa1\x1c\x30\x1a\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x08\
    \x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x02\x05\x00\
    \xa2\x03\x02\x01\x30";
