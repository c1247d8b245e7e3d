//! Secrets on their way to a guest: flattened JWE (RFC 7516, 7.2.2), AES-256-GCM, its content key
//! wrapped by ECDH-ES+A256KW (RFC 7518, 4.6) or RSA-OAEP-256 (4.3).
//!
//! The protected header is the additional data, so nobody can swap the algorithm. Members stand in
//! the order `alg`, `enc`, `epk {crv, kty, x, y}`: guests write the header anew before they check.

use super::key::{Curve, ECDH_ES_A256KW, RSA_OAEP_256, TeePublicKey, WrappingKey, coordinates};
use aes_kw::KekAes256;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use p384::ecdh::diffie_hellman;
use p384::elliptic_curve::sec1::ToEncodedPoint;
use rand_core::OsRng;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::agreement::{self, EphemeralPrivateKey};
use ring::digest::{self, SHA256};
use ring::rand::{SecureRandom, SystemRandom};
use rsa::Oaep;
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, Zeroizing};

/// The longest secret that is released.
pub const MAX_SECRET_LEN: usize = 256 * 1024;

/// An encrypted secret, as sent. Every member is base64url without padding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlattenedJwe {
    /// The protected header.
    pub protected: String,
    /// The wrapped content key.
    pub encrypted_key: String,
    /// The 96-bit initialisation vector.
    pub iv: String,
    /// The encrypted secret.
    pub ciphertext: String,
    /// The 128-bit authentication tag.
    pub tag: String,
}

/// Why a secret was not encrypted or not decrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum JweError {
    /// The operating system gave no randomness, or the key no longer fits.
    #[error("the secret could not be encrypted to the guest's key")]
    Seal,
    /// A message that is not of this form.
    #[error("this is no JWE with ECDH-ES+A256KW on P-384 and A256GCM")]
    Form,
    /// Encrypted to another key, or changed on the way.
    #[error("the secret does not decrypt: it is for another key, or was changed on the way")]
    Open,
}

/// A guest's own ephemeral key, P-384. It never leaves the process that made it.
pub struct GuestKey(p384::SecretKey);

impl FlattenedJwe {
    /// Encrypts `secret` to `key`.
    pub fn seal(secret: &[u8], key: &WrappingKey) -> Result<Self, JweError> {
        let random = SystemRandom::new();
        let mut content_key = Zeroizing::new([0; KEY_LEN]);
        let mut iv = [0; NONCE_LEN];
        random
            .fill(content_key.as_mut())
            .and_then(|()| random.fill(&mut iv))
            .map_err(|_| JweError::Seal)?;
        let (header, encrypted_key) = wrap(&content_key, key, &random)?;
        let protected = URL_SAFE_NO_PAD.encode(header);
        let mut text = Zeroizing::new(secret.to_vec());
        let tag = gcm(&content_key)?
            .seal_in_place_separate_tag(
                Nonce::assume_unique_for_key(iv),
                Aad::from(protected.as_bytes()),
                &mut text,
            )
            .map_err(|_| JweError::Seal)?;
        Ok(Self {
            protected,
            encrypted_key: URL_SAFE_NO_PAD.encode(encrypted_key),
            iv: URL_SAFE_NO_PAD.encode(iv),
            ciphertext: URL_SAFE_NO_PAD.encode(text.as_slice()),
            tag: URL_SAFE_NO_PAD.encode(tag),
        })
    }
}

impl GuestKey {
    /// A new key.
    pub fn generate() -> Self {
        Self(p384::SecretKey::random(&mut OsRng))
    }

    /// The public half, to be bound in report_data.
    pub fn public(&self) -> TeePublicKey {
        let point = self.0.public_key().to_encoded_point(false);
        let (x, y) = coordinates(Curve::P384, point.as_bytes()).unwrap_or_default();
        TeePublicKey::Ec {
            crv: Curve::P384.name().to_owned(),
            alg: ECDH_ES_A256KW.to_owned(),
            x,
            y,
        }
    }

    /// Decrypts what was encrypted to this key.
    pub fn open(&self, message: &FlattenedJwe) -> Result<Zeroizing<Vec<u8>>, JweError> {
        if message.ciphertext.len() > MAX_SECRET_LEN / 3 * 4 + 4 {
            return Err(JweError::Form);
        }
        let header: Header =
            serde_json::from_slice(&decode(&message.protected)?).map_err(|_| JweError::Form)?;
        let Header { alg, enc, epk } = header;
        let epk = epk.ok_or(JweError::Form)?;
        if alg != ECDH_ES_A256KW || enc != A256GCM || epk.crv != Curve::P384.name() {
            return Err(JweError::Form);
        }
        let point = Curve::P384.point(&epk.x, &epk.y).ok_or(JweError::Form)?;
        let peer = p384::PublicKey::from_sec1_bytes(&point).map_err(|_| JweError::Form)?;
        let shared = diffie_hellman(self.0.to_nonzero_scalar(), peer.as_affine());
        let kek = derived_kek(shared.raw_secret_bytes());
        let mut content_key = Zeroizing::new([0; KEY_LEN]);
        kek.unwrap(&decode(&message.encrypted_key)?, content_key.as_mut())
            .map_err(|_| JweError::Open)?;
        let iv = decode(&message.iv)?
            .try_into()
            .map_err(|_| JweError::Form)?;
        let mut text = decode(&message.ciphertext)?;
        text.extend(decode(&message.tag)?);
        let aad = Aad::from(message.protected.as_bytes());
        let opened = gcm(&content_key)?
            .open_in_place(Nonce::assume_unique_for_key(iv), aad, &mut text)
            .map(|plain| Zeroizing::new(plain.to_vec()));
        text.zeroize();
        opened.map_err(|_| JweError::Open)
    }
}

/// The protected header and the wrapped content key.
fn wrap(
    content_key: &[u8; KEY_LEN],
    key: &WrappingKey,
    random: &SystemRandom,
) -> Result<(String, Vec<u8>), JweError> {
    match key {
        WrappingKey::Ec(curve, point) => wrap_ecdh(content_key, *curve, point, random),
        WrappingKey::Rsa(key) => {
            let wrapped = key.encrypt(&mut OsRng, Oaep::new::<sha2::Sha256>(), content_key);
            let header = Header {
                alg: RSA_OAEP_256.to_owned(),
                enc: A256GCM.to_owned(),
                epk: None,
            };
            Ok((header.text()?, wrapped.map_err(|_| JweError::Seal)?))
        }
    }
}

fn wrap_ecdh(
    content_key: &[u8; KEY_LEN],
    curve: Curve,
    point: &[u8],
    random: &SystemRandom,
) -> Result<(String, Vec<u8>), JweError> {
    let algorithm = curve.agreement();
    let ephemeral = EphemeralPrivateKey::generate(algorithm, random).map_err(|_| JweError::Seal)?;
    let public = ephemeral.compute_public_key().map_err(|_| JweError::Seal)?;
    let (x, y) = coordinates(curve, public.as_ref()).ok_or(JweError::Seal)?;
    let peer = agreement::UnparsedPublicKey::new(algorithm, point);
    let kek =
        agreement::agree_ephemeral(ephemeral, &peer, derived_kek).map_err(|_| JweError::Seal)?;
    let mut wrapped = vec![0; KEY_LEN + KEY_WRAP_OVERHEAD];
    kek.wrap(content_key, &mut wrapped)
        .map_err(|_| JweError::Seal)?;
    let header = Header {
        alg: ECDH_ES_A256KW.to_owned(),
        enc: A256GCM.to_owned(),
        epk: Some(EphemeralKey {
            crv: curve.name().to_owned(),
            kty: "EC".to_owned(),
            x,
            y,
        }),
    };
    Ok((header.text()?, wrapped))
}

fn derived_kek(shared: &[u8]) -> KekAes256 {
    let mut key = Zeroizing::new([0; KEY_LEN]);
    concat_kdf(shared, ECDH_ES_A256KW, b"", b"", key.as_mut());
    KekAes256::from(*key)
}

/// The key derivation of RFC 7518, 4.6.2, for keys of at most 32 bytes: one round of SHA-256.
fn concat_kdf(shared: &[u8], algorithm: &str, party_u: &[u8], party_v: &[u8], key: &mut [u8]) {
    let length = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes();
    let bits = u32::try_from(key.len() * 8).unwrap_or(u32::MAX);
    let mut context = digest::Context::new(&SHA256);
    context.update(&1_u32.to_be_bytes());
    context.update(shared);
    for info in [algorithm.as_bytes(), party_u, party_v] {
        context.update(&length(info));
        context.update(info);
    }
    context.update(&bits.to_be_bytes());
    for (to, from) in key.iter_mut().zip(context.finish().as_ref()) {
        *to = *from;
    }
}

fn gcm(key: &[u8; KEY_LEN]) -> Result<LessSafeKey, JweError> {
    UnboundKey::new(&AES_256_GCM, key)
        .map(LessSafeKey::new)
        .map_err(|_| JweError::Seal)
}

fn decode(text: &str) -> Result<Vec<u8>, JweError> {
    URL_SAFE_NO_PAD.decode(text).map_err(|_| JweError::Form)
}

#[derive(Serialize, Deserialize)]
struct Header {
    alg: String,
    enc: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    epk: Option<EphemeralKey>,
}

impl Header {
    fn text(&self) -> Result<String, JweError> {
        serde_json::to_string(self).map_err(|_| JweError::Seal)
    }
}

#[derive(Serialize, Deserialize)]
struct EphemeralKey {
    crv: String,
    kty: String,
    x: String,
    y: String,
}

const A256GCM: &str = "A256GCM";
const KEY_LEN: usize = 32;
const KEY_WRAP_OVERHEAD: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::KeyError;
    use p384::elliptic_curve::sec1::FromEncodedPoint;
    use rsa::traits::PublicKeyParts;
    use rsa::{RsaPrivateKey, RsaPublicKey};
    use std::sync::OnceLock;

    fn rsa_key() -> &'static RsaPrivateKey {
        static KEY: OnceLock<RsaPrivateKey> = OnceLock::new();
        KEY.get_or_init(|| RsaPrivateKey::new(&mut OsRng, 2048).unwrap())
    }

    fn rsa_jwk(alg: &str, key: &RsaPublicKey) -> TeePublicKey {
        TeePublicKey::Rsa {
            alg: alg.into(),
            n: URL_SAFE_NO_PAD.encode(key.n().to_bytes_be()),
            e: URL_SAFE_NO_PAD.encode(key.e().to_bytes_be()),
        }
    }

    #[test]
    fn the_key_derivation_is_rfc_7518_appendix_c() {
        let shared = [
            158, 86, 217, 29, 129, 113, 53, 211, 114, 131, 66, 131, 191, 132, 38, 156, 251, 49,
            110, 163, 218, 128, 106, 72, 246, 218, 167, 121, 140, 254, 144, 196,
        ];
        let mut key = [0; 16];
        concat_kdf(&shared, "A128GCM", b"Alice", b"Bob", &mut key);
        assert_eq!(URL_SAFE_NO_PAD.encode(key), "VqqN6vgjbSBcIijNcacQGg");
    }

    #[test]
    fn key_wrap_is_rfc_3394_4_6() {
        let key: Vec<u8> = (0..32).collect();
        let data = hex::decode("00112233445566778899AABBCCDDEEFF000102030405060708090A0B0C0D0E0F");
        let kek = KekAes256::try_from(key.as_slice()).unwrap();
        let mut wrapped = [0; 40];
        kek.wrap(&data.unwrap(), &mut wrapped).unwrap();
        let expected =
            "28c9f404c4b810f4cbccb35cfb87f8263f5786e2d80ed326cbc7f0e71a99f43bfb988b9b7a02dd21";
        assert_eq!(hex::encode(wrapped), expected);
    }

    #[test]
    fn a_secret_opens_with_its_key_and_unchanged_only() {
        let guest = GuestKey::generate();
        let key = WrappingKey::new(&guest.public()).unwrap();
        let sealed = FlattenedJwe::seal(b"disk key", &key).unwrap();
        assert_eq!(guest.open(&sealed).unwrap().as_slice(), b"disk key");
        assert_eq!(
            GuestKey::generate().open(&sealed).unwrap_err(),
            JweError::Open
        );
        let other = FlattenedJwe::seal(b"disk key", &key).unwrap();
        assert_ne!(sealed.ciphertext, other.ciphertext);
        let changes: [fn(&mut FlattenedJwe, &FlattenedJwe); 6] = [
            |jwe, other| jwe.protected.clone_from(&other.protected),
            |jwe, other| jwe.encrypted_key.clone_from(&other.encrypted_key),
            |jwe, other| jwe.iv.clone_from(&other.iv),
            |jwe, other| jwe.ciphertext.clone_from(&other.ciphertext),
            |jwe, other| jwe.tag.clone_from(&other.tag),
            |jwe, _| {
                // The same header in other words: it is authenticated as it stands.
                let text = String::from_utf8(URL_SAFE_NO_PAD.decode(&jwe.protected).unwrap());
                jwe.protected = URL_SAFE_NO_PAD.encode(text.unwrap().replacen(':', ": ", 1));
            },
        ];
        for change in changes {
            let mut changed = sealed.clone();
            change(&mut changed, &other);
            assert!(guest.open(&changed).is_err());
        }
    }

    #[test]
    fn another_implementation_opens_what_is_sealed_to_p256() {
        let secret = p256::SecretKey::random(&mut OsRng);
        let point = secret.public_key().to_encoded_point(false);
        let (x, y) = coordinates(Curve::P256, point.as_bytes()).unwrap();
        let key = TeePublicKey::Ec {
            crv: "P-256".into(),
            alg: ECDH_ES_A256KW.into(),
            x,
            y,
        };
        let sealed = FlattenedJwe::seal(b"secret", &WrappingKey::new(&key).unwrap()).unwrap();
        let header: Header = serde_json::from_slice(&decode(&sealed.protected).unwrap()).unwrap();
        let epk = header.epk.unwrap();
        let point = p256::EncodedPoint::from_affine_coordinates(
            decode(&epk.x).unwrap().as_slice().into(),
            decode(&epk.y).unwrap().as_slice().into(),
            false,
        );
        let peer = p256::PublicKey::from_encoded_point(&point).unwrap();
        let shared = diffie_hellman(secret.to_nonzero_scalar(), peer.as_affine());
        let mut content_key = [0; KEY_LEN];
        derived_kek(shared.raw_secret_bytes())
            .unwrap(&decode(&sealed.encrypted_key).unwrap(), &mut content_key)
            .unwrap();
        assert_eq!(opened_with(&content_key, &sealed), b"secret");
    }

    #[test]
    fn rsa_oaep_opens_with_the_private_key() {
        let key = rsa_jwk(RSA_OAEP_256, rsa_key().as_ref());
        let sealed = FlattenedJwe::seal(b"secret", &WrappingKey::new(&key).unwrap()).unwrap();
        let wrapped = decode(&sealed.encrypted_key).unwrap();
        let content_key = rsa_key().decrypt(Oaep::new::<sha2::Sha256>(), &wrapped);
        let content_key = content_key.unwrap().try_into().unwrap();
        assert_eq!(opened_with(&content_key, &sealed), b"secret");
    }

    fn opened_with(content_key: &[u8; KEY_LEN], sealed: &FlattenedJwe) -> Vec<u8> {
        let mut text = decode(&sealed.ciphertext).unwrap();
        text.extend(decode(&sealed.tag).unwrap());
        let iv = decode(&sealed.iv).unwrap().try_into().unwrap();
        let aad = Aad::from(sealed.protected.as_bytes());
        let nonce = Nonce::assume_unique_for_key(iv);
        let opened = gcm(content_key).unwrap();
        opened
            .open_in_place(nonce, aad, &mut text)
            .unwrap()
            .to_vec()
    }

    #[test]
    fn unfit_keys_are_refused_by_name() {
        let refused = |key: &TeePublicKey| WrappingKey::new(key).unwrap_err();
        let rsa = rsa_key().as_ref();
        assert_eq!(refused(&rsa_jwk("RSA1_5", rsa)), KeyError::Pkcs1Padding);
        assert_eq!(refused(&rsa_jwk("RSA-OAEP", rsa)), KeyError::Algorithm);
        assert_eq!(refused(&rsa_jwk(ECDH_ES_A256KW, rsa)), KeyError::Algorithm);
        let short = RsaPrivateKey::new(&mut OsRng, 1024).unwrap();
        assert_eq!(
            refused(&rsa_jwk(RSA_OAEP_256, short.as_ref())),
            KeyError::Rsa
        );
        let TeePublicKey::Ec { x, y, .. } = GuestKey::generate().public() else {
            panic!("not an EC key")
        };
        let ec = |crv: &str, alg: &str, x: &str, y: &str| TeePublicKey::Ec {
            crv: crv.into(),
            alg: alg.into(),
            x: x.into(),
            y: y.into(),
        };
        let kw = ECDH_ES_A256KW;
        assert!(WrappingKey::new(&ec("P-384", kw, &x, &y)).is_ok());
        assert_eq!(
            refused(&ec("P-384", "ECDH-ES", &x, &y)),
            KeyError::Algorithm
        );
        assert_eq!(refused(&ec("P-521", kw, &x, &y)), KeyError::Curve);
        for (crv, x, y) in [
            ("P-256", &x, &y),
            ("P-384", &y, &x),
            ("P-384", &String::new(), &y),
            ("P-384", &format!("{x}AAAA"), &y),
            ("P-384", &"A".repeat(64), &"A".repeat(64)),
        ] {
            assert_eq!(
                refused(&ec(crv, kw, x, y)),
                KeyError::Point,
                "{crv} {x} {y}"
            );
        }
    }
}
