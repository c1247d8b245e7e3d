//! Who an emulated platform is: a root of its own that says so, and the keys below it.
//!
//! The root's and the ASK's private keys sign once and are forgotten: what an installation
//! keeps cannot make a second chip under the same root. The chip's own key (CEK) stays, as in a
//! real one: it endorses every new PEK.

use crate::legacy::ca::{self, CaCertificate, CaError, KeySize};
use crate::legacy::certificate::{
    Algorithm, CERTIFICATE_LEN, CertificateBuilder, CertificateError, SevCertificate, Usage,
};
use crate::legacy::chain::{
    ChainError, EMULATED_ARK_ID, LegacyChain, PLATFORM_CERTS_LEN, TrustAnchors,
};
use crate::legacy::policy::ApiVersion;
use p384::SecretKey;
use rand_core::OsRng;
use rsa::pss::BlindedSigningKey;
use rsa::signature::{RandomizedSigner, SignatureEncoding};
use rsa::traits::PublicKeyParts;
use rsa::{RsaPrivateKey, RsaPublicKey};
use sha2::Sha256;
use zeroize::Zeroizing;

/// An emulated platform's certificates and the private keys it goes on using.
pub struct Identity {
    chain: LegacyChain,
    owned: bool,
    cek: SecretKey,
    pek: SecretKey,
    pdh: SecretKey,
}

/// An owner's certificate authority (OCA), shared by the platforms of one owner, so that guests
/// with the policy bit DOMAIN can move among them.
pub struct OwnerAuthority {
    certificate: SevCertificate,
    key: SecretKey,
}

/// Why an identity cannot be made or read.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// RSA key generation or signing failed.
    #[error("the emulated root's RSA key could not be made or used")]
    Rsa(#[from] rsa::Error),
    /// A PSS signature failed.
    #[error("the emulated root could not sign")]
    Sign(#[from] rsa::signature::Error),
    /// A certificate could not be made or read.
    #[error("a certificate of the emulated platform is not valid")]
    Certificate(#[from] CertificateError),
    /// A CA certificate could not be made or read.
    #[error("a CA certificate of the emulated platform is not valid")]
    Ca(#[from] CaError),
    /// The kept chain does not verify.
    #[error("the kept chain of the emulated platform does not verify")]
    Chain(#[from] ChainError),
    /// Not what PEK_CSR hands out.
    #[error(
        "this is no platform's signing request; take the file that `casemate platform csr` wrote"
    )]
    NotARequest,
    /// The bytes are not what was written.
    #[error("not a kept identity of an emulated platform: {0}; remove it to have a new one made")]
    NotKept(&'static str),
}

impl Identity {
    /// A new platform with a root and an owner of its own.
    pub fn generate() -> Result<Self, IdentityError> {
        Self::build(PROFILE, &OwnerAuthority::generate()?, false)
    }

    /// A new platform with a root of its own, owned by `owner`.
    pub fn generate_owned(owner: &OwnerAuthority) -> Result<Self, IdentityError> {
        Self::build(PROFILE, owner, true)
    }

    /// The platform's certificates, as its host exports them.
    pub fn chain(&self) -> &LegacyChain {
        &self.chain
    }

    /// What an owner names to trust this emulated platform.
    pub fn root_fingerprint(&self) -> [u8; 32] {
        self.chain.ark.fingerprint()
    }

    /// Whether an outside owner signed the platform.
    pub fn owned(&self) -> bool {
        self.owned
    }

    pub(crate) fn pdh_key(&self) -> &SecretKey {
        &self.pdh
    }

    pub(crate) fn pek_key(&self) -> &SecretKey {
        &self.pek
    }

    /// The identity as bytes, for a file that only the secure processor can read. Secret.
    pub fn to_bytes(&self) -> Zeroizing<Vec<u8>> {
        let mut raw = Zeroizing::new(Vec::with_capacity(KEPT_LEN));
        raw.extend(KEPT_MAGIC);
        raw.push(u8::from(self.owned));
        for key in [&self.cek, &self.pek, &self.pdh] {
            push_key(&mut raw, key);
        }
        raw.extend(self.chain.pdh.as_bytes());
        raw.extend(self.chain.platform_certs());
        raw.extend(self.chain.amd_certs());
        raw
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote, and checks that it still holds together.
    pub fn from_bytes(raw: &[u8]) -> Result<Self, IdentityError> {
        let mut parts = Parts(raw);
        match parts.take(8) {
            magic if magic == KEPT_MAGIC => {}
            magic if magic == KEPT_MAGIC_1 => {
                return Err(IdentityError::NotKept(
                    "an older version, without the chip's key",
                ));
            }
            _ => return Err(IdentityError::NotKept("another format or version")),
        }
        if raw.len() != KEPT_LEN {
            return Err(IdentityError::NotKept("wrong length"));
        }
        let owned = match parts.take(1) {
            [0] => false,
            [1] => true,
            _ => return Err(IdentityError::NotKept("unknown ownership")),
        };
        let cek = parts.key()?;
        let pek = parts.key()?;
        let pdh = parts.key()?;
        let pdh_cert = parts.take(CERTIFICATE_LEN);
        let chain = LegacyChain::parse(pdh_cert, parts.take(PLATFORM_CERTS_LEN), parts.0)?;
        let trust = TrustAnchors::amd().with_emulated_root(chain.ark.fingerprint())?;
        chain.verify(&trust)?;
        let held = [(&cek, &chain.cek), (&pek, &chain.pek), (&pdh, &chain.pdh)];
        if held
            .iter()
            .any(|(key, cert)| key.public_key() != *cert.public_key())
        {
            return Err(IdentityError::NotKept(
                "keys and certificates do not belong together",
            ));
        }
        Ok(Self {
            chain,
            owned,
            cek,
            pek,
            pdh,
        })
    }

    fn build(profile: Profile, owner: &OwnerAuthority, owned: bool) -> Result<Self, IdentityError> {
        let root = CaKey::generate()?;
        let intermediate = CaKey::generate()?;
        let ark = root.certify(&root, Usage::Ark, profile.ark_id, profile.ark_id)?;
        let ask = root.certify(&intermediate, Usage::Ask, profile.ask_id, profile.ark_id)?;

        let cek = SecretKey::random(&mut OsRng);
        let cek_cert = CertificateBuilder::new(Usage::Cek, cek.public_key(), profile.api);
        let mut signature = intermediate.sign(cek_cert.body())?;
        signature.reverse();
        let cek_cert = cek_cert.add_signature(Usage::Ask, Algorithm::RsaSha256, &signature);
        let keys = Keys::generate();
        let (pek_cert, pdh_cert) = keys.certify(&cek, owner, profile.api)?;
        let chain = LegacyChain {
            ark,
            ask,
            cek: cek_cert.finish(),
            oca: owner.certificate.clone(),
            pek: pek_cert,
            pdh: pdh_cert,
        };
        Ok(Self {
            chain,
            owned,
            cek,
            pek: keys.pek,
            pdh: keys.pdh,
        })
    }

    /// What PEK_CSR hands out: the PEK's certificate, without a signature.
    pub(super) fn signing_request(&self) -> SevCertificate {
        CertificateBuilder::new(Usage::Pek, self.pek.public_key(), API).finish()
    }

    /// Takes an owner: `pek` is the request with the owner's signature, which the caller has
    /// verified. The CEK's is added here, and the PDH is a new one.
    pub(super) fn adopt(
        &mut self,
        pek: &SevCertificate,
        oca: &SevCertificate,
    ) -> Result<(), IdentityError> {
        let (subject, signer) = (Usage::Pek, Usage::Oca);
        let by_owner = pek
            .signature_by(signer)
            .ok_or(CertificateError::Unsigned { subject, signer })?;
        let endorsed = CertificateBuilder::new(Usage::Pek, self.pek.public_key(), API)
            .add_signature(signer, by_owner.algorithm, by_owner.bytes)
            .sign(Usage::Cek, &self.cek)?
            .finish();
        self.renew_pdh()?;
        self.chain.pek = endorsed;
        self.chain.oca = oca.clone();
        self.owned = true;
        Ok(())
    }

    /// A new owner that is the platform itself, a new PEK and a new PDH.
    pub(super) fn own_itself(&mut self) -> Result<(), IdentityError> {
        let owner = OwnerAuthority::generate()?;
        let keys = Keys::generate();
        let (pek, pdh) = keys.certify(&self.cek, &owner, API)?;
        self.chain.oca = owner.certificate;
        self.chain.pek = pek;
        self.chain.pdh = pdh;
        self.pek = keys.pek;
        self.pdh = keys.pdh;
        self.owned = false;
        Ok(())
    }

    /// A new PDH under the same PEK.
    pub(super) fn renew_pdh(&mut self) -> Result<(), IdentityError> {
        let key = SecretKey::random(&mut OsRng);
        self.chain.pdh = CertificateBuilder::new(Usage::Pdh, key.public_key(), API)
            .sign(Usage::Pek, &self.pek)?
            .finish();
        self.pdh = key;
        Ok(())
    }

    /// A platform that calls itself what it should not.
    #[cfg(test)]
    pub(crate) fn generate_as(profile: Profile) -> Result<Self, IdentityError> {
        Self::build(profile, &OwnerAuthority::generate()?, false)
    }
}

impl OwnerAuthority {
    /// A new owner.
    pub fn generate() -> Result<Self, IdentityError> {
        let key = SecretKey::random(&mut OsRng);
        let certificate = CertificateBuilder::new(Usage::Oca, key.public_key(), API)
            .sign(Usage::Oca, &key)?
            .finish();
        Ok(Self { certificate, key })
    }

    /// The owner's certificate.
    pub fn certificate(&self) -> &SevCertificate {
        &self.certificate
    }

    /// Signs a platform's request (PEK_CSR): the PEK certificate that PEK_CERT_IMPORT takes. Whose
    /// request that is has to be settled before: it says nothing of its chip.
    pub fn sign_pek(&self, request: &SevCertificate) -> Result<SevCertificate, IdentityError> {
        let pek = *request.public_key();
        let builder = CertificateBuilder::new(Usage::Pek, pek, request.api());
        if request.usage() != Usage::Pek || builder.body() != request.body() {
            return Err(IdentityError::NotARequest);
        }
        Ok(builder.sign(Usage::Oca, &self.key)?.finish())
    }

    /// The owner as bytes, for a file that only the owner can read. Secret.
    pub fn to_bytes(&self) -> Zeroizing<Vec<u8>> {
        let mut raw = Zeroizing::new(Vec::with_capacity(OWNER_LEN));
        raw.extend(OWNER_MAGIC);
        push_key(&mut raw, &self.key);
        raw.extend(self.certificate.as_bytes());
        raw
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote.
    pub fn from_bytes(raw: &[u8]) -> Result<Self, IdentityError> {
        let mut parts = Parts(raw);
        if raw.len() != OWNER_LEN || parts.take(8) != OWNER_MAGIC {
            return Err(IdentityError::NotKept("no owner authority of this version"));
        }
        let key = parts.key()?;
        let certificate = SevCertificate::parse(parts.0)?;
        certificate.verify_signed_by(&certificate)?;
        if certificate.usage() != Usage::Oca || key.public_key() != *certificate.public_key() {
            return Err(IdentityError::NotKept(
                "key and certificate do not belong together",
            ));
        }
        Ok(Self { certificate, key })
    }
}

/// What the emulated certificates say of themselves.
pub(crate) struct Profile {
    pub(crate) ark_id: [u8; 16],
    pub(crate) ask_id: [u8; 16],
    pub(crate) api: ApiVersion,
}

/// The keys that a platform has beside its chip's.
struct Keys {
    pek: SecretKey,
    pdh: SecretKey,
}

impl Keys {
    fn generate() -> Self {
        let [pek, pdh] = [(); 2].map(|()| SecretKey::random(&mut OsRng));
        Self { pek, pdh }
    }

    /// The certificates of PEK and PDH.
    fn certify(
        &self,
        cek: &SecretKey,
        owner: &OwnerAuthority,
        api: ApiVersion,
    ) -> Result<(SevCertificate, SevCertificate), CertificateError> {
        let pek = CertificateBuilder::new(Usage::Pek, self.pek.public_key(), api)
            .sign(Usage::Oca, &owner.key)?
            .sign(Usage::Cek, cek)?;
        let pdh = CertificateBuilder::new(Usage::Pdh, self.pdh.public_key(), api)
            .sign(Usage::Pek, &self.pek)?;
        Ok((pek.finish(), pdh.finish()))
    }
}

/// An RSA key of the emulated CA; 2048 bits (as Naples), so that making one takes moments.
struct CaKey(BlindedSigningKey<Sha256>);

impl CaKey {
    fn generate() -> Result<Self, IdentityError> {
        Ok(Self(BlindedSigningKey::new(RsaPrivateKey::new(
            &mut OsRng, 2048,
        )?)))
    }

    fn certify(
        &self,
        subject: &Self,
        usage: Usage,
        key_id: [u8; 16],
        own_id: [u8; 16],
    ) -> Result<CaCertificate, IdentityError> {
        let key = RsaPublicKey::from(subject.0.as_ref());
        let (exponent, modulus) = (key.e().to_bytes_be(), key.n().to_bytes_be());
        let mut raw = ca::body_2048(usage, key_id, own_id, NOTE, &exponent, &modulus);
        raw.extend(self.sign(&raw)?.iter().rev());
        Ok(CaCertificate::parse(&raw)?)
    }

    /// A PSS signature, big-endian.
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, IdentityError> {
        Ok(self.0.try_sign_with_rng(&mut OsRng, message)?.to_vec())
    }
}

/// Cuts kept bytes into parts; lengths are checked before.
struct Parts<'a>(&'a [u8]);

impl<'a> Parts<'a> {
    fn take(&mut self, len: usize) -> &'a [u8] {
        let (part, rest) = self.0.split_at_checked(len).unwrap_or((self.0, &[]));
        self.0 = rest;
        part
    }

    fn key(&mut self) -> Result<SecretKey, IdentityError> {
        SecretKey::from_slice(self.take(SCALAR_LEN))
            .map_err(|_| IdentityError::NotKept("a private key is out of range"))
    }
}

fn push_key(raw: &mut Vec<u8>, key: &SecretKey) {
    raw.extend_from_slice(Zeroizing::new(key.to_bytes()).as_slice());
}

/// The firmware API that the emulated platform implements.
pub(crate) const API: ApiVersion = ApiVersion::new(1, 55);

/// Goes into the reserved field of both CA certificates, under their signatures.
const NOTE: [u8; 16] = *b"NOT AMD\0\0\0\0\0\0\0\0\0";
const PROFILE: Profile = Profile {
    ark_id: EMULATED_ARK_ID,
    ask_id: *b"ASK NOT AMD\0\0\0\0\0",
    api: API,
};
const SCALAR_LEN: usize = 48;
const KEPT_MAGIC: [u8; 8] = *b"CMSEVPI2";
const KEPT_MAGIC_1: [u8; 8] = *b"CMSEVPI1";
const KEPT_LEN: usize = 8
    + 1
    + 3 * SCALAR_LEN
    + CERTIFICATE_LEN
    + PLATFORM_CERTS_LEN
    + 2 * KeySize::Rsa2048.certificate_len();
const OWNER_MAGIC: [u8; 8] = *b"CMSEVOC1";
const OWNER_LEN: usize = 8 + SCALAR_LEN + CERTIFICATE_LEN;

#[cfg(test)]
mod tests {
    use super::super::testing;
    use super::*;

    #[test]
    fn the_root_says_what_it_is() {
        let chain = testing::identity().chain();
        assert!(chain.ark.key_id().starts_with(b"ARK-EMULATED"));
        for certificate in [&chain.ark, &chain.ask] {
            let raw = certificate.as_bytes();
            assert!(raw.windows(7).any(|window| window == b"NOT AMD"));
        }
        assert_ne!(
            testing::identity().root_fingerprint(),
            testing::other_identity().root_fingerprint()
        );
    }

    #[test]
    fn an_identity_can_be_kept() {
        let kept = testing::identity().to_bytes();
        assert_eq!(kept.len(), KEPT_LEN);
        let back = Identity::from_bytes(&kept).unwrap();
        assert_eq!(back.chain(), testing::identity().chain());
        assert_eq!(back.to_bytes(), kept);
    }

    #[test]
    fn a_damaged_identity_is_refused() {
        let kept = testing::identity().to_bytes();
        // Magic, ownership, CEK key, PEK key, PDH key, PDH certificate, CEK signature, ARK modulus.
        for at in [
            0,
            8,
            20,
            70,
            120,
            153 + 30,
            153 + 4 * 2084 - 1000,
            KEPT_LEN - 300,
        ] {
            let mut raw = kept.clone();
            raw[at] ^= 0x40;
            assert!(Identity::from_bytes(&raw).is_err(), "byte {at}");
        }
        assert!(Identity::from_bytes(&kept[1..]).is_err());
        let mut swapped = kept.clone();
        swapped[9..57].copy_from_slice(&kept[57..105]);
        assert!(matches!(
            Identity::from_bytes(&swapped),
            Err(IdentityError::NotKept(_))
        ));
        let mut older = kept.clone();
        older[7] = b'1';
        let said = Identity::from_bytes(&older).err().unwrap().to_string();
        assert!(said.contains("without the chip's key"), "{said}");
    }

    #[test]
    fn an_owner_can_be_kept() {
        let owner = OwnerAuthority::generate().unwrap();
        let kept = owner.to_bytes();
        let back = OwnerAuthority::from_bytes(&kept).unwrap();
        assert_eq!(back.certificate(), owner.certificate());
        let mut raw = kept.clone();
        raw[20] ^= 1;
        assert!(OwnerAuthority::from_bytes(&raw).is_err());
        assert!(OwnerAuthority::from_bytes(&kept[..kept.len() - 1]).is_err());
    }
}
