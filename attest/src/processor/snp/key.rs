//! Endorsement keys: how they are derived, and how they sign.
//!
//! Real chips stretch a fused secret with each part of the TCB version, so that another version
//! has another key and older firmware cannot make the newer one's. AMD does not publish how. Here
//! a key is HKDF-SHA-384(secret; purpose, product, TCB version), read as a P-384 scalar; a value
//! out of range is drawn again with a counter behind. Nothing keeps an older version from the
//! newer one's key: there is no older firmware, only a number.

use super::SnpIdentityError;
use super::report::ReportFields;
use crate::bytes;
use crate::report::{REPORT_LEN, SigningKey};
use p384::SecretKey;
use p384::elliptic_curve::sec1::ToEncodedPoint as _;
use ring::hkdf;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair};
use zeroize::Zeroizing;

/// A VCEK or VLEK with its certificate.
pub struct EndorsementKey {
    kind: SigningKey,
    pair: EcdsaKeyPair,
    certificate: Vec<u8>,
}

impl EndorsementKey {
    pub(super) fn new(
        kind: SigningKey,
        key: &SecretKey,
        certificate: Vec<u8>,
    ) -> Result<Self, SnpIdentityError> {
        let scalar = Zeroizing::new(key.to_bytes());
        let public = key.public_key().to_encoded_point(false);
        let pair = EcdsaKeyPair::from_private_key_and_public_key(
            &ECDSA_P384_SHA384_FIXED_SIGNING,
            scalar.as_slice(),
            public.as_bytes(),
            &SystemRandom::new(),
        );
        Ok(Self {
            kind,
            pair: pair.map_err(|_| SnpIdentityError::Key)?,
            certificate,
        })
    }

    /// VCEK or VLEK.
    pub fn kind(&self) -> SigningKey {
        self.kind
    }

    /// The certificate, DER.
    pub fn certificate(&self) -> &[u8] {
        &self.certificate
    }

    /// Signs a report. The fields are not judged, and say themselves which kind of key signs.
    pub fn sign_report(&self, fields: &ReportFields) -> Result<[u8; REPORT_LEN], SnpIdentityError> {
        self.sign_bytes(fields.to_unsigned_bytes())
    }

    /// Signs the first 0x2a0 bytes of `report`, whatever they say, and writes the signature behind.
    pub fn sign_bytes(
        &self,
        mut report: [u8; REPORT_LEN],
    ) -> Result<[u8; REPORT_LEN], SnpIdentityError> {
        let (signed, rest) = report
            .split_at_mut_checked(SIGNED_LEN)
            .ok_or(SnpIdentityError::Key)?;
        let signature = self
            .pair
            .sign(&SystemRandom::new(), signed)
            .map_err(|_| SnpIdentityError::Key)?;
        let mut encoded = Vec::with_capacity(2 * SCALAR_FIELD_LEN);
        for scalar in signature.as_ref().chunks(SCALAR_LEN) {
            bytes::push_reversed(&mut encoded, scalar, SCALAR_FIELD_LEN);
        }
        for (to, from) in rest.iter_mut().zip(encoded) {
            *to = from;
        }
        Ok(report)
    }
}

/// Fills `out` from `secret` for the purpose that `label` names; each part of the label counts
/// with its length, so that no two labels run into one another.
pub(super) fn derive(
    secret: &[u8],
    label: &[&[u8]],
    out: &mut [u8],
) -> Result<(), SnpIdentityError> {
    let lengths: Vec<[u8; 4]> = label
        .iter()
        .map(|part| u32::try_from(part.len()).unwrap_or(u32::MAX).to_le_bytes())
        .collect();
    let info: Vec<&[u8]> = lengths
        .iter()
        .zip(label)
        .flat_map(|(len, part)| [len.as_slice(), part])
        .collect();
    hkdf::Salt::new(hkdf::HKDF_SHA384, SALT)
        .extract(secret)
        .expand(&info, Len(out.len()))
        .and_then(|okm| okm.fill(out))
        .map_err(|_| SnpIdentityError::Key)
}

/// A P-384 key from `secret` for the purpose that `label` names.
pub(super) fn derive_p384(secret: &[u8], label: &[&[u8]]) -> Result<SecretKey, SnpIdentityError> {
    for counter in 0..=u8::MAX {
        let mut scalar = Zeroizing::new([0; SCALAR_LEN]);
        let counter = [counter];
        let label: Vec<&[u8]> = label.iter().copied().chain([counter.as_slice()]).collect();
        derive(secret, &label, &mut *scalar)?;
        if let Ok(key) = SecretKey::from_slice(&*scalar) {
            return Ok(key);
        }
    }
    Err(SnpIdentityError::Key)
}

struct Len(usize);

impl hkdf::KeyType for Len {
    fn len(&self) -> usize {
        self.0
    }
}

const SALT: &[u8] = b"casemate emulated secure processor";
const SIGNED_LEN: usize = 0x2a0;
const SCALAR_LEN: usize = 48;
const SCALAR_FIELD_LEN: usize = 72;
