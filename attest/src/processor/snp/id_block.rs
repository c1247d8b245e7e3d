//! ID block and ID authentication, as LAUNCH_FINISH checks them: the guest's owner signs what is
//! to be launched, and an author may sign the owner's key. Publication 56860, "ID Block" and "ID
//! Authentication Information Structure".
//!
//! [`measure::id_block`](crate::measure::id_block) makes these blocks for owners. What firmware
//! makes of them is written apart from it, so that each tests the other.

use super::super::FirmwareError;
use crate::bytes;
use crate::measure::id_block::{ID_AUTH_LEN, ID_BLOCK_LEN};
use crate::report::SnpPolicy;
use ring::digest::{SHA384, digest};
use ring::signature::{ECDSA_P384_SHA384_FIXED, UnparsedPublicKey};

/// What a checked ID block gives to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct GuestIdentity {
    pub(super) family_id: [u8; 16],
    pub(super) image_id: [u8; 16],
    pub(super) guest_svn: u32,
    pub(super) id_key_digest: [u8; 48],
    pub(super) author_key_digest: [u8; 48],
    pub(super) has_author_key: bool,
}

impl GuestIdentity {
    /// A guest without an ID block.
    pub(super) const NONE: Self = Self {
        family_id: [0; 16],
        image_id: [0; 16],
        guest_svn: 0,
        id_key_digest: [0; 48],
        author_key_digest: [0; 48],
        has_author_key: false,
    };

    /// Checks form, signatures, launch digest and policy, in this order.
    pub(super) fn check(
        block: &[u8; ID_BLOCK_LEN],
        auth: &[u8; ID_AUTH_LEN],
        author_key_en: bool,
        digest: &[u8; 48],
        policy: SnpPolicy,
    ) -> Result<Self, FirmwareError> {
        let field = |at| bytes::le32(block, at).ok_or(FirmwareError::InvalidParam);
        if field(VERSION_AT)? != ID_BLOCK_VERSION {
            return Err(FirmwareError::InvalidParam);
        }
        let id_key = Key::of(auth, ID_ALGORITHM_AT, ID_KEY_AT)?;
        id_key.verify(block, auth, ID_SIGNATURE_AT)?;
        let author_key_digest = match author_key_en {
            true => {
                let author = Key::of(auth, AUTHOR_ALGORITHM_AT, AUTHOR_KEY_AT)?;
                author.verify(&id_key.raw, auth, KEY_SIGNATURE_AT)?;
                author.digest()
            }
            false => [0; 48],
        };
        if bytes::array(block, 0) != Some(*digest) {
            return Err(FirmwareError::BadMeasurement);
        }
        let wanted = bytes::array(block, POLICY_AT).map(u64::from_le_bytes);
        if wanted != Some(policy.0) {
            return Err(FirmwareError::PolicyFailure);
        }
        Ok(Self {
            family_id: bytes::array(block, 0x30).unwrap_or_default(),
            image_id: bytes::array(block, 0x40).unwrap_or_default(),
            guest_svn: field(GUEST_SVN_AT)?,
            id_key_digest: id_key.digest(),
            author_key_digest,
            has_author_key: author_key_en,
        })
    }
}

/// A public key as it stands in the authentication information: curve, x, y, little-endian.
struct Key {
    raw: [u8; KEY_LEN],
    /// `04 ‖ x ‖ y`, big-endian.
    point: Vec<u8>,
}

impl Key {
    fn of(auth: &[u8; ID_AUTH_LEN], algorithm: usize, at: usize) -> Result<Self, FirmwareError> {
        let raw: [u8; KEY_LEN] = bytes::array(auth, at).ok_or(FirmwareError::InvalidParam)?;
        let known = bytes::le32(auth, algorithm) == Some(ECDSA_P384_SHA384)
            && bytes::le32(&raw, 0) == Some(CURVE_P384);
        if !known {
            return Err(FirmwareError::InvalidParam);
        }
        let mut point = vec![0x04];
        for at in [4, 4 + NUMBER_LEN] {
            point.extend(number(&raw, at).ok_or(FirmwareError::BadSignature)?);
        }
        Ok(Self { raw, point })
    }

    fn verify(
        &self,
        message: &[u8],
        auth: &[u8; ID_AUTH_LEN],
        at: usize,
    ) -> Result<(), FirmwareError> {
        let halves = [at, at + NUMBER_LEN].map(|at| number(auth, at));
        let [Some(r), Some(s)] = halves else {
            return Err(FirmwareError::BadSignature);
        };
        UnparsedPublicKey::new(&ECDSA_P384_SHA384_FIXED, &self.point)
            .verify(message, &[r, s].concat())
            .map_err(|_| FirmwareError::BadSignature)
    }

    fn digest(&self) -> [u8; 48] {
        let mut bytes = [0; 48];
        bytes.copy_from_slice(digest(&SHA384, &self.raw).as_ref());
        bytes
    }
}

/// A 384-bit number in a little-endian field of 72 bytes, turned round; `None` if it is larger.
fn number(raw: &[u8], at: usize) -> Option<[u8; 48]> {
    let low: [u8; 48] = bytes::array(raw, at)?;
    let high: [u8; NUMBER_LEN - 48] = bytes::array(raw, at.checked_add(48)?)?;
    let fits = high.iter().all(|byte| *byte == 0);
    let mut turned = low;
    turned.reverse();
    fits.then_some(turned)
}

const VERSION_AT: usize = 0x50;
const GUEST_SVN_AT: usize = 0x54;
const POLICY_AT: usize = 0x58;
const ID_BLOCK_VERSION: u32 = 1;
const ID_ALGORITHM_AT: usize = 0x00;
const AUTHOR_ALGORITHM_AT: usize = 0x04;
const ID_SIGNATURE_AT: usize = 0x40;
const ID_KEY_AT: usize = 0x240;
const KEY_SIGNATURE_AT: usize = 0x680;
const AUTHOR_KEY_AT: usize = 0x880;
const KEY_LEN: usize = 0x404;
const NUMBER_LEN: usize = 72;
const ECDSA_P384_SHA384: u32 = 1;
const CURVE_P384: u32 = 2;
