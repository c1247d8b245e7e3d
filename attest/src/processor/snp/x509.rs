//! X.509 certificates and revocation lists in the shape of AMD's: RSASSA-PSS with SHA-384, in
//! either of the two encodings that AMD uses.

use super::SnpIdentityError;
use p384::SecretKey;
use p384::pkcs8::EncodePublicKey as _;
use rand_core::OsRng;
use ring::digest::{SHA256, digest};
use rsa::pkcs8::{DecodePrivateKey as _, EncodePrivateKey as _};
use rsa::pss::BlindedSigningKey;
use rsa::signature::{RandomizedSigner as _, SignatureEncoding as _};
use rsa::{RsaPrivateKey, RsaPublicKey};
use sha2::Sha384;
use std::str::FromStr as _;
use std::time::{Duration, SystemTime};
use x509_cert::certificate::{Certificate, TbsCertificate, Version};
use x509_cert::crl::{CertificateList, RevokedCert, TbsCertList};
use x509_cert::der::asn1::{BitString, GeneralizedTime, ObjectIdentifier, OctetString, UtcTime};
use x509_cert::der::{Any, Decode as _, Encode};
use x509_cert::ext::Extension;
use x509_cert::ext::pkix::{
    AuthorityKeyIdentifier, BasicConstraints, CrlNumber, KeyUsage, KeyUsages, SubjectKeyIdentifier,
};
use x509_cert::name::Name;
use x509_cert::serial_number::SerialNumber;
use x509_cert::spki::{AlgorithmIdentifierOwned, SubjectPublicKeyInfoOwned};
use x509_cert::time::{Time, Validity};
use zeroize::Zeroizing;

/// How the algorithm identifier of a PSS signature is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PssForm {
    /// 70 bytes, with the default trailer field spelled out: AMD's ARKs, ASKs and older leaves.
    ExplicitTrailer,
    /// 65 bytes, without it: AMD's newer leaves.
    Short,
}

/// The bits of the CA keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CaKeySize {
    /// Made in a moment; for tests.
    Rsa2048,
    /// As AMD's; takes seconds to make.
    Rsa4096,
}

/// What a certificate says, whether or not it makes sense.
#[derive(Debug, Clone)]
pub struct CertificateSpec {
    /// Big-endian, without a sign.
    pub serial: Vec<u8>,
    /// A name as in RFC 4514: the last part first.
    pub issuer: String,
    /// A name as in RFC 4514.
    pub subject: String,
    /// The first moment of its validity; whole seconds.
    pub not_before: SystemTime,
    /// The last moment of its validity; whole seconds.
    pub not_after: SystemTime,
    /// In this order, even twice.
    pub extensions: Vec<ExtensionSpec>,
    /// The encoding of the algorithm identifier.
    pub pss: PssForm,
}

/// One extension.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExtensionSpec {
    /// Its object identifier in dotted form.
    pub oid: String,
    /// Whether who does not know it must refuse the certificate.
    pub critical: bool,
    /// What stands in its octet string.
    pub value: Vec<u8>,
}

/// What a revocation list says.
#[derive(Debug, Clone)]
pub struct CrlSpec {
    /// A name as in RFC 4514.
    pub issuer: String,
    /// Its running number.
    pub number: u64,
    /// When it was made.
    pub this_update: SystemTime,
    /// When the next one is due.
    pub next_update: Option<SystemTime>,
    /// The serial numbers of the revoked certificates, big-endian.
    pub revoked: Vec<Vec<u8>>,
    /// The encoding of the algorithm identifier.
    pub pss: PssForm,
}

/// An RSA key of the emulated CA.
pub(super) struct CaKey(BlindedSigningKey<Sha384>);

impl CaKeySize {
    const fn bits(self) -> usize {
        match self {
            Self::Rsa2048 => 2048,
            Self::Rsa4096 => 4096,
        }
    }
}

impl CaKey {
    pub(super) fn generate(size: CaKeySize) -> Result<Self, SnpIdentityError> {
        let key = RsaPrivateKey::new(&mut OsRng, size.bits())?;
        Ok(Self(BlindedSigningKey::new(key)))
    }

    /// The private key as PKCS #8.
    pub(super) fn to_pkcs8(&self) -> Result<Zeroizing<Vec<u8>>, SnpIdentityError> {
        let document = self.0.as_ref().to_pkcs8_der()?;
        Ok(Zeroizing::new(document.as_bytes().to_vec()))
    }

    pub(super) fn from_pkcs8(der: &[u8]) -> Result<Self, SnpIdentityError> {
        Ok(Self(BlindedSigningKey::new(RsaPrivateKey::from_pkcs8_der(
            der,
        )?)))
    }

    /// The public key as SubjectPublicKeyInfo.
    pub(super) fn public_der(&self) -> Result<Vec<u8>, SnpIdentityError> {
        let key = RsaPublicKey::from(self.0.as_ref());
        Ok(key.to_public_key_der()?.into_vec())
    }

    /// A certificate for `public`, a SubjectPublicKeyInfo.
    pub(super) fn certify(
        &self,
        spec: &CertificateSpec,
        public: &[u8],
    ) -> Result<Vec<u8>, SnpIdentityError> {
        let tbs = tbs_certificate(spec, public)?;
        let encoded = tbs.to_der()?;
        let certificate = Certificate {
            tbs_certificate: tbs,
            signature_algorithm: spec.pss.identifier()?,
            signature: self.sign(&encoded)?,
        };
        Ok(certificate.to_der()?)
    }

    /// A revocation list.
    pub(super) fn revoke(&self, spec: &CrlSpec) -> Result<Vec<u8>, SnpIdentityError> {
        let this_update = time(spec.this_update)?;
        let entry = |serial: &Vec<u8>| -> Result<RevokedCert, SnpIdentityError> {
            Ok(RevokedCert {
                serial_number: SerialNumber::new(serial)?,
                revocation_date: this_update,
                crl_entry_extensions: None,
            })
        };
        let revoked: Vec<_> = spec.revoked.iter().map(entry).collect::<Result<_, _>>()?;
        let number = CrlNumber(x509_cert::der::asn1::Uint::new(&spec.number.to_be_bytes())?);
        let extensions = [
            authority_key_id(&self.public_der()?)?,
            ExtensionSpec::of("2.5.29.20", false, &number)?,
        ];
        let list = TbsCertList {
            version: Version::V2,
            signature: spec.pss.identifier()?,
            issuer: Name::from_str(&spec.issuer)?,
            this_update,
            next_update: spec.next_update.map(time).transpose()?,
            revoked_certificates: (!revoked.is_empty()).then_some(revoked),
            crl_extensions: Some(
                extensions
                    .iter()
                    .map(ExtensionSpec::encode)
                    .collect::<Result<_, _>>()?,
            ),
        };
        let encoded = list.to_der()?;
        let list = CertificateList {
            tbs_cert_list: list,
            signature_algorithm: spec.pss.identifier()?,
            signature: self.sign(&encoded)?,
        };
        Ok(list.to_der()?)
    }

    pub(super) fn sign(&self, message: &[u8]) -> Result<BitString, SnpIdentityError> {
        let signature = self.0.try_sign_with_rng(&mut OsRng, message)?;
        Ok(BitString::from_bytes(&signature.to_vec())?)
    }
}

impl PssForm {
    /// The whole AlgorithmIdentifier: 70 or 65 bytes.
    pub(super) fn identifier(self) -> Result<AlgorithmIdentifierOwned, SnpIdentityError> {
        let parameters = match self {
            Self::ExplicitTrailer => [&[0x30, 0x39], PSS_SHA384, EXPLICIT_TRAILER].concat(),
            Self::Short => [&[0x30, 0x34], PSS_SHA384].concat(),
        };
        Ok(AlgorithmIdentifierOwned {
            oid: RSASSA_PSS,
            parameters: Some(Any::from_der(&parameters)?),
        })
    }
}

impl ExtensionSpec {
    /// An extension whose value is the DER of `value`.
    pub(super) fn of(
        oid: &str,
        critical: bool,
        value: &impl Encode,
    ) -> Result<Self, SnpIdentityError> {
        Ok(Self {
            oid: oid.to_owned(),
            critical,
            value: value.to_der()?,
        })
    }

    fn encode(&self) -> Result<Extension, SnpIdentityError> {
        Ok(Extension {
            extn_id: ObjectIdentifier::new(&self.oid).map_err(|_| SnpIdentityError::Name)?,
            critical: self.critical,
            extn_value: OctetString::new(self.value.clone())?,
        })
    }
}

/// The to-be-signed part, encoded.
pub(super) fn tbs_certificate(
    spec: &CertificateSpec,
    public: &[u8],
) -> Result<TbsCertificate, SnpIdentityError> {
    let extensions = spec.extensions.iter().map(ExtensionSpec::encode);
    Ok(TbsCertificate {
        version: Version::V3,
        serial_number: SerialNumber::new(&spec.serial)?,
        signature: spec.pss.identifier()?,
        issuer: Name::from_str(&spec.issuer)?,
        validity: Validity {
            not_before: time(spec.not_before)?,
            not_after: time(spec.not_after)?,
        },
        subject: Name::from_str(&spec.subject)?,
        subject_public_key_info: SubjectPublicKeyInfoOwned::from_der(public)?,
        issuer_unique_id: None,
        subject_unique_id: None,
        extensions: Some(extensions.collect::<Result<_, _>>()?),
    })
}

/// The extensions of a CA certificate, as AMD's have them; a root has no `issuer`.
pub(super) fn ca_extensions(
    public: &[u8],
    issuer: Option<&[u8]>,
) -> Result<Vec<ExtensionSpec>, SnpIdentityError> {
    let (usage, path_len_constraint) = match issuer {
        None => (KeyUsages::KeyCertSign | KeyUsages::CRLSign, None),
        Some(_) => (KeyUsages::KeyCertSign.into(), Some(0)),
    };
    let constraints = BasicConstraints {
        ca: true,
        path_len_constraint,
    };
    let key_id = SubjectKeyIdentifier(key_id(public)?);
    let mut extensions = vec![
        ExtensionSpec::of("2.5.29.15", true, &KeyUsage(usage))?,
        ExtensionSpec::of("2.5.29.14", false, &key_id)?,
        ExtensionSpec::of("2.5.29.19", true, &constraints)?,
    ];
    if let Some(issuer) = issuer {
        extensions.push(authority_key_id(issuer)?);
    }
    Ok(extensions)
}

/// A P-384 public key as SubjectPublicKeyInfo.
pub(super) fn p384_public_der(key: &SecretKey) -> Result<Vec<u8>, SnpIdentityError> {
    let encoded = key.public_key().to_public_key_der();
    Ok(encoded.map_err(|_| SnpIdentityError::Key)?.into_vec())
}

fn authority_key_id(public: &[u8]) -> Result<ExtensionSpec, SnpIdentityError> {
    let id = AuthorityKeyIdentifier {
        key_identifier: Some(key_id(public)?),
        authority_cert_issuer: None,
        authority_cert_serial_number: None,
    };
    ExtensionSpec::of("2.5.29.35", false, &id)
}

/// RFC 7093, method 1, over the whole SubjectPublicKeyInfo.
fn key_id(public: &[u8]) -> Result<OctetString, SnpIdentityError> {
    let hash = digest(&SHA256, public);
    Ok(OctetString::new(
        hash.as_ref().get(..20).unwrap_or_default(),
    )?)
}

/// RFC 5280, 4.1.2.5: two-digit years until 2049.
fn time(at: SystemTime) -> Result<Time, SnpIdentityError> {
    let since = at
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_err(|_| SnpIdentityError::Clock)?;
    let since = Duration::from_secs(since.as_secs());
    Ok(match UtcTime::from_unix_duration(since) {
        Ok(time) => time.into(),
        Err(_) => GeneralizedTime::from_unix_duration(since)?.into(),
    })
}

const RSASSA_PSS: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.10");
/// SHA-384, MGF1 with SHA-384, 48 bytes of salt.
const PSS_SHA384: &[u8] = &[
    0xa0, 0x0f, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x02, 0x05,
    0x00, 0xa1, 0x1c, 0x30, 0x1a, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x08,
    0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x02, 0x05, 0x00, 0xa2,
    0x03, 0x02, 0x01, 0x30,
];
const EXPLICIT_TRAILER: &[u8] = &[0xa3, 0x03, 0x02, 0x01, 0x01];
