//! The session an owner (or a sending platform) opens with a platform's PDH: key derivation, the
//! 128-byte session blob, and the owner's own half.
//!
//! A received blob is believed only after both its MACs; the key of whoever sent it is not
//! authenticated by it.

use super::certificate::{CertificateBuilder, SevCertificate, Usage};
use super::chain::VerifiedChain;
use super::measure::{self, MeasureBlob};
use super::packet::{PacketError, TransportKeys, equal, random};
use super::policy::{ApiVersion, GuestPolicy};
use super::secret::{SecretError, SecretPacket};
use crate::bytes;
use crate::measure::LaunchDigest;
use aes::Aes128;
use aes::cipher::{KeyIvInit, StreamCipher};
use p384::{PublicKey, SecretKey};
use rand_core::OsRng;
use ring::hmac;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use zeroize::Zeroizing;

/// The 128-byte session blob: transport keys wrapped for one PDH, and the guest's policy bound
/// to them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "ByteBuf", into = "ByteBuf")]
pub struct SessionBlob {
    nonce: [u8; 16],
    wrap_tk: [u8; 32],
    wrap_iv: [u8; 16],
    wrap_mac: [u8; 32],
    policy_mac: [u8; 32],
}

/// What the owner hands to the host: nothing in it is secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaunchSession {
    /// The policy the guest must be started with.
    pub policy: GuestPolicy,
    /// The owner's one-time Diffie-Hellman key.
    pub dh_cert: SevCertificate,
    /// The transport keys, wrapped for the platform.
    pub session: SessionBlob,
}

/// The owner's secret half of a session, wiped when dropped.
///
/// It remembers for which platform it was opened, so that another platform's evidence cannot be
/// passed off with it.
pub struct OwnerSession {
    policy: GuestPolicy,
    platform: [u8; 32],
    keys: TransportKeys,
}

/// Why a session cannot be opened or read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// A blob of another length.
    #[error("a session blob has {SESSION_LEN} bytes, this one has {0}")]
    Length(usize),
    /// The wrapped keys do not belong to this pair of Diffie-Hellman keys.
    #[error("the session's key MAC does not fit: changed, or made for another platform's PDH")]
    BadWrapMac,
    /// The policy is not the one the session was made for.
    #[error("the session was made for another guest policy")]
    BadPolicyMac,
    /// Bytes that are no kept owner session.
    #[error("not a kept owner session: {0}")]
    NotKept(&'static str),
    /// No randomness for keys.
    #[error("the operating system gave no randomness for the session's keys")]
    Random,
}

impl OwnerSession {
    /// Opens a session with a verified platform: what to send to its host, and what to keep.
    pub fn create(
        platform: &VerifiedChain,
        policy: GuestPolicy,
    ) -> Result<(LaunchSession, Self), SessionError> {
        let keys = TransportKeys::random()?;
        let own = SecretKey::random(&mut OsRng);
        let pdh = platform.pdh();
        let session = SessionBlob::wrap(&own, pdh.public_key(), &keys, policy)?;
        let dh_cert = CertificateBuilder::new(Usage::Pdh, own.public_key(), pdh.api()).finish();
        let public = LaunchSession {
            policy,
            dh_cert,
            session,
        };
        let platform = pdh.fingerprint();
        Ok((
            public,
            Self {
                policy,
                platform,
                keys,
            },
        ))
    }

    /// The policy the session was made for.
    pub fn policy(&self) -> GuestPolicy {
        self.policy
    }

    /// Fingerprint of the PDH the session was made for.
    pub fn platform(&self) -> [u8; 32] {
        self.platform
    }

    /// The measure the platform has to return for `digest`.
    pub fn expected_measure(
        &self,
        digest: &LaunchDigest,
        api: ApiVersion,
        build: u8,
        mnonce: &[u8; 16],
    ) -> [u8; 32] {
        measure::launch_measure(
            &self.keys.integrity(),
            api,
            build,
            self.policy,
            digest,
            mnonce,
        )
    }

    /// Whether `found` is what the platform has to return for `digest`, in constant time.
    pub fn measure_fits(
        &self,
        digest: &LaunchDigest,
        api: ApiVersion,
        build: u8,
        found: &MeasureBlob,
    ) -> bool {
        let expected = self.expected_measure(digest, api, build, &found.mnonce);
        equal(&expected, &found.measure)
    }

    /// Seals `secret` for the guest whose launch gave `measure`; check the measure first.
    pub fn seal_secret(
        &self,
        measure: &MeasureBlob,
        secret: &[u8],
    ) -> Result<SecretPacket, SecretError> {
        SecretPacket::build(&self.keys, &measure.measure, secret)
    }

    /// The session as bytes, for a file that only the owner can read. Secret.
    pub fn to_bytes(&self) -> Zeroizing<Vec<u8>> {
        let mut raw = Zeroizing::new(Vec::with_capacity(KEPT_LEN));
        raw.extend(KEPT_MAGIC);
        raw.extend(self.policy.to_le_bytes());
        raw.extend(self.platform);
        raw.extend(self.keys.tek);
        raw.extend(self.keys.tik);
        raw
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote.
    pub fn from_bytes(raw: &[u8]) -> Result<Self, SessionError> {
        let cut = SessionError::NotKept("wrong length");
        if raw.len() != KEPT_LEN {
            return Err(cut);
        }
        if bytes::array::<8>(raw, 0).ok_or(cut)? != KEPT_MAGIC {
            return Err(SessionError::NotKept("another format or version"));
        }
        let policy = bytes::le32(raw, 8).ok_or(cut)?;
        Ok(Self {
            policy: GuestPolicy::from_raw(policy)
                .map_err(|_| SessionError::NotKept("its policy has reserved bits"))?,
            platform: bytes::array(raw, 12).ok_or(cut)?,
            keys: TransportKeys {
                tek: bytes::array(raw, 44).ok_or(cut)?,
                tik: bytes::array(raw, 60).ok_or(cut)?,
            },
        })
    }
}

impl SessionBlob {
    /// Parses exactly [`SESSION_LEN`] bytes.
    pub fn parse(raw: &[u8]) -> Result<Self, SessionError> {
        let wrong = SessionError::Length(raw.len());
        if raw.len() != SESSION_LEN {
            return Err(wrong);
        }
        Ok(Self {
            nonce: bytes::array(raw, 0).ok_or(wrong)?,
            wrap_tk: bytes::array(raw, 16).ok_or(wrong)?,
            wrap_iv: bytes::array(raw, 48).ok_or(wrong)?,
            wrap_mac: bytes::array(raw, 64).ok_or(wrong)?,
            policy_mac: bytes::array(raw, 96).ok_or(wrong)?,
        })
    }

    /// The 128 bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let Self {
            nonce,
            wrap_tk,
            wrap_iv,
            wrap_mac,
            policy_mac,
        } = self;
        [&nonce[..], wrap_tk, wrap_iv, wrap_mac, policy_mac].concat()
    }

    /// Wraps `keys` for the holder of `peer`, with fresh nonce and IV.
    pub(crate) fn wrap(
        own: &SecretKey,
        peer: &PublicKey,
        keys: &TransportKeys,
        policy: GuestPolicy,
    ) -> Result<Self, SessionError> {
        let (mut nonce, mut iv) = ([0; 16], [0; 16]);
        random(&mut nonce)?;
        random(&mut iv)?;
        let shared = agree(own, peer);
        Ok(Self::wrap_with(&shared, nonce, iv, keys, policy))
    }

    /// Checks both MACs and unwraps the keys that the holder of `peer` wrapped for `own`.
    pub(crate) fn unwrap(
        &self,
        own: &SecretKey,
        peer: &PublicKey,
        policy: GuestPolicy,
    ) -> Result<TransportKeys, SessionError> {
        let wrap = WrapKeys::derive(&agree(own, peer), &self.nonce);
        let mac = hmac::sign(&wrap.integrity(), &self.wrap_tk);
        if !equal(mac.as_ref(), &self.wrap_mac) {
            return Err(SessionError::BadWrapMac);
        }
        let mut plain = Zeroizing::new(self.wrap_tk);
        wrap.crypt(&self.wrap_iv, &mut plain);
        let cut = SessionError::BadWrapMac;
        let keys = TransportKeys {
            tek: bytes::array(&*plain, 0).ok_or(cut)?,
            tik: bytes::array(&*plain, 16).ok_or(cut)?,
        };
        let mac = hmac::sign(&keys.integrity(), &policy.to_le_bytes());
        if !equal(mac.as_ref(), &self.policy_mac) {
            return Err(SessionError::BadPolicyMac);
        }
        Ok(keys)
    }

    fn wrap_with(
        shared: &[u8],
        nonce: [u8; 16],
        wrap_iv: [u8; 16],
        keys: &TransportKeys,
        policy: GuestPolicy,
    ) -> Self {
        let wrap = WrapKeys::derive(shared, &nonce);
        let mut wrap_tk = [0; 32];
        for (to, from) in wrap_tk.iter_mut().zip(keys.tek.iter().chain(&keys.tik)) {
            *to = *from;
        }
        wrap.crypt(&wrap_iv, &mut wrap_tk);
        let (mut wrap_mac, mut policy_mac) = ([0; 32], [0; 32]);
        wrap_mac.copy_from_slice(hmac::sign(&wrap.integrity(), &wrap_tk).as_ref());
        let mac = hmac::sign(&keys.integrity(), &policy.to_le_bytes());
        policy_mac.copy_from_slice(mac.as_ref());
        Self {
            nonce,
            wrap_tk,
            wrap_iv,
            wrap_mac,
            policy_mac,
        }
    }
}

impl TryFrom<ByteBuf> for SessionBlob {
    type Error = SessionError;

    fn try_from(raw: ByteBuf) -> Result<Self, Self::Error> {
        Self::parse(&raw)
    }
}

impl From<SessionBlob> for ByteBuf {
    fn from(blob: SessionBlob) -> Self {
        Self::from(blob.to_bytes())
    }
}

impl From<PacketError> for SessionError {
    /// Keys and nonces are all that a session takes from the packet module: randomness.
    fn from(_: PacketError) -> Self {
        Self::Random
    }
}

/// KEK and KIK: what wraps the transport keys.
struct WrapKeys {
    kek: Zeroizing<[u8; 16]>,
    kik: Zeroizing<[u8; 16]>,
}

impl WrapKeys {
    fn derive(shared: &[u8], nonce: &[u8; 16]) -> Self {
        let master = kdf(shared, b"sev-master-secret", nonce);
        Self {
            kek: kdf(&*master, b"sev-kek", &[]),
            kik: kdf(&*master, b"sev-kik", &[]),
        }
    }

    fn integrity(&self) -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, &*self.kik)
    }

    fn crypt(&self, iv: &[u8; 16], data: &mut [u8; 32]) {
        let kek: &[u8; 16] = &self.kek;
        ctr::Ctr128BE::<Aes128>::new(kek.into(), iv.into()).apply_keystream(data);
    }
}

/// The x coordinate that both sides arrive at, big-endian.
fn agree(own: &SecretKey, peer: &PublicKey) -> Zeroizing<Vec<u8>> {
    let shared = p384::ecdh::diffie_hellman(own.to_nonzero_scalar(), peer.as_affine());
    Zeroizing::new(shared.raw_secret_bytes().to_vec())
}

/// NIST SP 800-108 in counter mode over HMAC-SHA256. 128 bits are asked for, so block 1 is all.
fn kdf(key: &[u8], label: &[u8], context: &[u8]) -> Zeroizing<[u8; 16]> {
    let mut mac = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, key));
    mac.update(&1u32.to_le_bytes());
    mac.update(label);
    mac.update(&[0]);
    mac.update(context);
    mac.update(&128u32.to_le_bytes());
    let block = mac.sign();
    let mut out = Zeroizing::new([0; 16]);
    for (to, from) in out.iter_mut().zip(block.as_ref()) {
        *to = *from;
    }
    out
}

/// Length of a session blob.
pub const SESSION_LEN: usize = 128;

const KEPT_MAGIC: [u8; 8] = *b"CMSEVOS1";
const KEPT_LEN: usize = 76;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::legacy::{PolicyFlag, TrustAnchors};
    use crate::processor::testing;
    use proptest::prelude::*;

    /// The values of the `sev` crate's own session test: everything zero.
    #[test]
    fn zero_input_gives_the_known_session() {
        let shared = [0; 16];
        let master = kdf(&shared, b"sev-master-secret", &[0; 16]);
        assert_eq!(hex::encode(*master), "ab4d269fcc62bedb4511d56c386ce706");
        let keys = TransportKeys {
            tek: [0; 16],
            tik: [0; 16],
        };
        let policy = GuestPolicy::from_raw(0).unwrap();
        let blob = SessionBlob::wrap_with(&shared, [0; 16], [0; 16], &keys, policy);
        assert_eq!(
            hex::encode(blob.wrap_tk),
            "2137bc7f9bb8bd7c3e55a576a15d3454b3856b8ba27afadf46dcfee9f02c02c4"
        );
        assert_eq!(
            hex::encode(blob.wrap_mac),
            "3176c0752738bd9d5e86689534020f528c088f16238826b000b327dee6aeed7d"
        );
        assert_eq!(
            hex::encode(blob.policy_mac),
            "aa7855e13839dd767cd5da7c1ff5036540c9264b7a803029315e55375287b4af"
        );
    }

    #[test]
    fn both_ends_agree_and_nobody_else() {
        let [owner, platform, other] = [(); 3].map(|()| SecretKey::random(&mut OsRng));
        let keys = TransportKeys::random().unwrap();
        let policy = GuestPolicy::new(&[PolicyFlag::NoDebug], ApiVersion::new(1, 0));
        let blob = SessionBlob::wrap(&owner, &platform.public_key(), &keys, policy).unwrap();
        let blob = SessionBlob::parse(&blob.to_bytes()).unwrap();

        let got = blob.unwrap(&platform, &owner.public_key(), policy).unwrap();
        assert_eq!((got.tek, got.tik), (keys.tek, keys.tik));
        let refused = |own: &SecretKey, peer: &SecretKey, policy| {
            blob.unwrap(own, &peer.public_key(), policy).err()
        };
        assert_eq!(
            refused(&other, &owner, policy),
            Some(SessionError::BadWrapMac)
        );
        assert_eq!(
            refused(&platform, &other, policy),
            Some(SessionError::BadWrapMac)
        );
        let debug = GuestPolicy::new(&[], ApiVersion::new(1, 0));
        assert_eq!(
            refused(&platform, &owner, debug),
            Some(SessionError::BadPolicyMac)
        );
    }

    #[test]
    fn every_byte_of_a_blob_counts() {
        let [owner, platform] = [(); 2].map(|()| SecretKey::random(&mut OsRng));
        let keys = TransportKeys::random().unwrap();
        let policy = GuestPolicy::from_raw(1).unwrap();
        let raw = SessionBlob::wrap(&owner, &platform.public_key(), &keys, policy)
            .unwrap()
            .to_bytes();
        for at in (0..SESSION_LEN).step_by(8) {
            let mut changed = raw.clone();
            changed[at] ^= 1;
            let blob = SessionBlob::parse(&changed).unwrap();
            assert!(
                blob.unwrap(&platform, &owner.public_key(), policy).is_err(),
                "byte {at}"
            );
        }
        assert_eq!(
            SessionBlob::parse(&raw[1..]),
            Err(SessionError::Length(127))
        );
    }

    #[test]
    fn an_owner_session_can_be_kept() {
        let identity = testing::identity();
        let trust = TrustAnchors::amd()
            .with_emulated_root(identity.root_fingerprint())
            .unwrap();
        let chain = identity.chain().verify(&trust).unwrap();
        let policy = GuestPolicy::new(&[PolicyFlag::NoDebug], ApiVersion::new(1, 0));
        let (_, session) = OwnerSession::create(&chain, policy).unwrap();
        let kept = session.to_bytes();
        let back = OwnerSession::from_bytes(&kept).unwrap();
        assert_eq!(back.to_bytes(), kept);
        assert_eq!(back.platform(), chain.pdh().fingerprint());
        assert!(OwnerSession::from_bytes(&kept[..75]).is_err());
        let mut other = kept.clone();
        other[7] = b'2';
        assert!(OwnerSession::from_bytes(&other).is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(raw in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = SessionBlob::parse(&raw);
            let _ = OwnerSession::from_bytes(&raw);
        }
    }
}
