//! JSON Web Signatures in compact form (RFC 7515), as much of them as an EAR takes: one signature,
//! one key, one algorithm for each kind of key.

use super::{MAX_TOKEN_LEN, TokenError};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::digest::{SHA256, digest};
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P384_SHA384_FIXED, ECDSA_P384_SHA384_FIXED_SIGNING, ED25519, EcdsaKeyPair,
    Ed25519KeyPair, KeyPair as _, UnparsedPublicKey,
};
use rustls_pki_types::PrivatePkcs8KeyDer;
use rustls_pki_types::pem::PemObject as _;
use serde::{Deserialize, Serialize};
use std::fmt;

/// A key that signs tokens.
pub struct EarKey(Pair);

enum Pair {
    Ed25519(Ed25519KeyPair),
    P384(Box<EcdsaKeyPair>),
}

/// The public half: what a relying party has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EarVerifier {
    algorithm: Algorithm,
    public: Vec<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Algorithm {
    EdDsa,
    Es384,
}

#[derive(Serialize, Deserialize)]
struct Header {
    alg: String,
    typ: String,
    kid: String,
    /// RFC 7515: what is critical and not understood must be refused. Nothing is understood.
    #[serde(default, skip_serializing)]
    crit: Option<serde_json::Value>,
}

impl EarKey {
    /// Reads a PKCS#8 private key, DER or PEM, for Ed25519 or P-384. `openssl genpkey` makes both.
    pub fn from_pkcs8(der_or_pem: &[u8]) -> Result<Self, TokenError> {
        let der = if der_or_pem.trim_ascii_start().starts_with(b"-----BEGIN") {
            PrivatePkcs8KeyDer::from_pem_slice(der_or_pem)
                .map_err(|_| TokenError::Key("the PEM text holds no PRIVATE KEY"))?
        } else {
            PrivatePkcs8KeyDer::from(der_or_pem)
        };
        let der = der.secret_pkcs8_der();
        if let Ok(pair) = Ed25519KeyPair::from_pkcs8_maybe_unchecked(der) {
            return Ok(Self(Pair::Ed25519(pair)));
        }
        EcdsaKeyPair::from_pkcs8(&ECDSA_P384_SHA384_FIXED_SIGNING, der, &SystemRandom::new())
            .map(|pair| Self(Pair::P384(Box::new(pair))))
            .map_err(|_| TokenError::Key("another format or another kind of key"))
    }

    /// A new Ed25519 key, PKCS#8 DER.
    pub fn generate() -> Result<zeroize::Zeroizing<Vec<u8>>, TokenError> {
        let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new())
            .map_err(|_| TokenError::Signing)?;
        Ok(zeroize::Zeroizing::new(document.as_ref().to_vec()))
    }

    /// Its public half.
    pub fn verifier(&self) -> EarVerifier {
        let (algorithm, public) = match &self.0 {
            Pair::Ed25519(pair) => (Algorithm::EdDsa, pair.public_key().as_ref()),
            Pair::P384(pair) => (Algorithm::Es384, pair.public_key().as_ref()),
        };
        EarVerifier {
            algorithm,
            public: public.to_vec(),
        }
    }

    /// `header.claims.signature`
    pub(super) fn sign(&self, claims: &[u8]) -> Result<String, TokenError> {
        let verifier = self.verifier();
        let header = Header {
            alg: verifier.algorithm.name().to_owned(),
            typ: "JWT".to_owned(),
            kid: verifier.key_id(),
            crit: None,
        };
        let header = serde_json::to_vec(&header).map_err(|_| TokenError::Signing)?;
        let mut token = URL_SAFE_NO_PAD.encode(header);
        token.push('.');
        token.push_str(&URL_SAFE_NO_PAD.encode(claims));
        let signature = match &self.0 {
            Pair::Ed25519(pair) => pair.sign(token.as_bytes()).as_ref().to_vec(),
            Pair::P384(pair) => pair
                .sign(&SystemRandom::new(), token.as_bytes())
                .map_err(|_| TokenError::Signing)?
                .as_ref()
                .to_vec(),
        };
        token.push('.');
        token.push_str(&URL_SAFE_NO_PAD.encode(signature));
        Ok(token)
    }
}

impl EarVerifier {
    /// From raw public key bytes: 32 for Ed25519, an uncompressed point of 97 for P-384.
    pub fn from_public(public: &[u8]) -> Result<Self, TokenError> {
        let algorithm = match public {
            [0x04, rest @ ..] if rest.len() == 96 => Algorithm::Es384,
            other if other.len() == 32 => Algorithm::EdDsa,
            _ => return Err(TokenError::Key("neither 32 bytes nor a P-384 point")),
        };
        Ok(Self {
            algorithm,
            public: public.to_vec(),
        })
    }

    /// The raw public key, as [`from_public`](Self::from_public) takes it.
    pub fn public(&self) -> &[u8] {
        &self.public
    }

    /// `sha256:` of the raw public key; the token's `kid`.
    pub fn key_id(&self) -> String {
        format!("sha256:{}", hex::encode(digest(&SHA256, &self.public)))
    }

    /// The claims of a token that this key signed.
    pub(super) fn verify(&self, token: &str) -> Result<Vec<u8>, TokenError> {
        if token.len() > MAX_TOKEN_LEN {
            return Err(TokenError::Malformed("it is too long"));
        }
        let parts: Vec<_> = token.split('.').collect();
        let [header, claims, signature] = parts.as_slice() else {
            return Err(TokenError::Malformed("it has not three parts"));
        };
        let decode = |part: &str| {
            URL_SAFE_NO_PAD
                .decode(part)
                .map_err(|_| TokenError::Malformed("a part is not base64url"))
        };
        let parsed: Header = serde_json::from_slice(&decode(header)?)
            .map_err(|_| TokenError::Malformed("its header cannot be read"))?;
        if parsed.crit.is_some() {
            return Err(TokenError::Malformed("its header has critical extensions"));
        }
        // The key says which algorithm, never the token.
        if parsed.alg != self.algorithm.name() {
            return Err(TokenError::Algorithm(self.algorithm.name()));
        }
        let signed = token
            .get(..header.len() + 1 + claims.len())
            .unwrap_or_default();
        let signature = decode(signature)?;
        let verified = match self.algorithm {
            Algorithm::EdDsa => {
                UnparsedPublicKey::new(&ED25519, &self.public).verify(signed.as_bytes(), &signature)
            }
            Algorithm::Es384 => UnparsedPublicKey::new(&ECDSA_P384_SHA384_FIXED, &self.public)
                .verify(signed.as_bytes(), &signature),
        };
        verified.map_err(|_| TokenError::Signature)?;
        decode(claims)
    }
}

impl Algorithm {
    const fn name(self) -> &'static str {
        match self {
            Self::EdDsa => "EdDSA",
            Self::Es384 => "ES384",
        }
    }
}

impl fmt::Debug for EarKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EarKey({})", self.verifier().key_id())
    }
}
