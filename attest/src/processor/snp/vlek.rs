//! The wrapped VLEK hash stick that VLEK_LOAD takes: 432 bytes. Publication 56860,
//! SNP_VLEK_LOAD.
//!
//! ```text
//! 0x000 IV 12 | 4 reserved | 0x010 wrapped 384 | 0x190 TCB version 8 | 8 reserved | 0x1a0 tag 16
//! ```
//!
//! What AMD puts into the 384 bytes is not published. Here it is the seed of the provider's keys
//! and its id, under AES-256-GCM with a key of the chip and the TCB version as associated data.

use super::super::FirmwareError;
use super::SnpIdentityError;
use super::identity::SECRET_LEN;
use crate::bytes;
use crate::tcb::RawTcb;
use rand_core::{OsRng, RngCore as _};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use zeroize::{Zeroize, Zeroizing};

/// The length of a wrapped hash stick.
pub const WRAPPED_VLEK_LEN: usize = 432;

/// What was in it.
pub(super) struct Stick {
    pub(super) seed: Zeroizing<[u8; SECRET_LEN]>,
    pub(super) csp_id: String,
    pub(super) tcb: RawTcb,
}

pub(super) fn wrap(
    key: &[u8; 32],
    seed: &[u8; SECRET_LEN],
    csp_id: &str,
    tcb: [u8; 8],
) -> Result<[u8; WRAPPED_VLEK_LEN], SnpIdentityError> {
    let len = u8::try_from(csp_id.len()).map_err(|_| SnpIdentityError::CspId(CSP_ID_MAX))?;
    if len == 0 {
        return Err(SnpIdentityError::CspId(CSP_ID_MAX));
    }
    let mut text = Zeroizing::new([0; STICK_LEN]);
    let plain = seed.iter().chain([&len]).chain(csp_id.as_bytes());
    for (to, from) in text.iter_mut().zip(plain) {
        *to = *from;
    }
    let mut iv = [0; IV_LEN];
    OsRng
        .try_fill_bytes(&mut iv)
        .map_err(|_| SnpIdentityError::Key)?;
    let tag = cipher(key)
        .and_then(|key| {
            let nonce = Nonce::assume_unique_for_key(iv);
            key.seal_in_place_separate_tag(nonce, Aad::from(tcb), &mut *text)
        })
        .map_err(|_| SnpIdentityError::Key)?;
    let mut wrapped = [0; WRAPPED_VLEK_LEN];
    for (at, part) in [
        (0, iv.as_slice()),
        (STICK_AT, text.as_slice()),
        (TCB_AT, tcb.as_slice()),
        (TAG_AT, tag.as_ref()),
    ] {
        for (to, from) in wrapped.iter_mut().skip(at).zip(part) {
            *to = *from;
        }
    }
    Ok(wrapped)
}

pub(super) fn unwrap(key: &[u8; 32], wrapped: &[u8]) -> Result<Stick, FirmwareError> {
    let needed = WRAPPED_VLEK_LEN as u32;
    let wrapped: [u8; WRAPPED_VLEK_LEN] = wrapped
        .try_into()
        .map_err(|_| FirmwareError::InvalidLength { needed })?;
    let field = |at| bytes::array::<8>(&wrapped, at).unwrap_or_default();
    let iv: [u8; IV_LEN] = bytes::array(&wrapped, 0).unwrap_or_default();
    let sealed: [u8; STICK_LEN] = bytes::array(&wrapped, STICK_AT).unwrap_or([0; STICK_LEN]);
    let tag: [u8; 16] = bytes::array(&wrapped, TAG_AT).unwrap_or_default();
    let reserved: [u8; 4] = bytes::array(&wrapped, IV_LEN).unwrap_or_default();
    let tcb = field(TCB_AT);
    if reserved != [0; 4] || field(TCB_AT + 8) != [0; 8] {
        return Err(FirmwareError::InvalidParam);
    }
    let mut sealed = [sealed.as_slice(), &tag].concat();
    let stick = cipher(key)
        .and_then(|key| {
            let nonce = Nonce::assume_unique_for_key(iv);
            let text = key.open_in_place(nonce, Aad::from(tcb), &mut sealed)?;
            Ok(read(text, RawTcb(tcb)))
        })
        .map_err(|_| FirmwareError::BadMeasurement)?;
    sealed.zeroize();
    stick.ok_or(FirmwareError::InvalidParam)
}

fn read(text: &[u8], tcb: RawTcb) -> Option<Stick> {
    let (seed, rest) = text.split_first_chunk::<SECRET_LEN>()?;
    let (len, rest) = rest.split_first()?;
    let csp_id = rest.get(..usize::from(*len))?;
    Some(Stick {
        seed: Zeroizing::new(*seed),
        csp_id: String::from_utf8(csp_id.to_vec()).ok()?,
        tcb,
    })
}

fn cipher(key: &[u8; 32]) -> Result<LessSafeKey, ring::error::Unspecified> {
    UnboundKey::new(&AES_256_GCM, key).map(LessSafeKey::new)
}

const IV_LEN: usize = 12;
const STICK_AT: usize = 0x10;
const STICK_LEN: usize = 384;
const TCB_AT: usize = 0x190;
const TAG_AT: usize = 0x1a0;
const CSP_ID_MAX: usize = 255;
