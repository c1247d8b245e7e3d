//! Who an emulated SNP platform is: a root, two intermediates, and one chip's secret.
//!
//! The names say what it is: `CN=ARK-EMULATED, O=NOT AMD` above `SEV-EMULATED` (ASK, issues
//! VCEKs) and `SEV-VLEK-EMULATED` (ASVK, issues VLEKs). One root serves all personalities; which
//! product a leaf speaks for stands in its product name: `Milan-EMULATED`.
//!
//! A real chip derives its VCEK, and AMD's key service issues the certificate. Here both live in
//! one place: VCEKs follow from a kept secret and the TCB version (see [`key`](super::key)), and
//! the ASK's and ASVK's private keys are kept beside it to certify them. Whoever reads this state
//! can sign anything for this one installation, which the secret alone would allow already. The
//! root's key signs the intermediates and an empty revocation list once, and is forgotten: an
//! emulated installation revokes nothing, it is made anew.

use super::key::{self, EndorsementKey};
use super::x509::{CaKey, CaKeySize, CertificateSpec, CrlSpec, ExtensionSpec, PssForm};
use super::x509::{ca_extensions, p384_public_der};
use crate::product::Product;
use crate::report::SigningKey;
use crate::tcb::TcbVersion;
use rand_core::{OsRng, RngCore as _};
use ring::digest::{SHA256, digest};
use std::time::{Duration, SystemTime};
use x509_cert::Certificate;
use x509_cert::der::asn1::Ia5StringRef;
use x509_cert::der::{self, Decode as _, Encode as _};
use zeroize::Zeroizing;

/// An emulated SNP platform's certificates and the secrets it goes on using.
pub struct SnpIdentity {
    certificates: SnpCertificates,
    ask: CaKey,
    asvk: CaKey,
    secret: Zeroizing<[u8; SECRET_LEN]>,
}

/// What an emulated installation publishes in the place of AMD's key service. All DER.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnpCertificates {
    /// The root, signed by itself.
    pub ark: Vec<u8>,
    /// The issuer of VCEKs.
    pub ask: Vec<u8>,
    /// The issuer of VLEKs.
    pub asvk: Vec<u8>,
    /// The root's revocation list; empty, and valid as long as the root.
    pub crl: Vec<u8>,
}

/// Why an SNP identity cannot be made or read.
#[derive(Debug, thiserror::Error)]
pub enum SnpIdentityError {
    /// RSA key generation failed.
    #[error("the emulated root's RSA key could not be made")]
    Rsa(#[from] rsa::Error),
    /// A PSS signature failed.
    #[error("the emulated root could not sign")]
    Sign(#[from] rsa::signature::Error),
    /// A certificate could not be encoded or read.
    #[error("a certificate of the emulated platform could not be encoded or read")]
    Der(#[from] der::Error),
    /// A kept RSA key could not be encoded or read.
    #[error("an RSA key of the emulated platform could not be encoded or read")]
    Pkcs8(#[from] rsa::pkcs8::Error),
    /// A public key could not be encoded.
    #[error("a public key of the emulated platform could not be encoded")]
    Spki(#[from] rsa::pkcs8::spki::Error),
    /// An object identifier is malformed.
    #[error("an extension's object identifier is not valid")]
    Name,
    /// An endorsement key could not be derived or used.
    #[error("an endorsement key of the emulated platform could not be derived or used")]
    Key,
    /// The clock says that it is before 1970, or beyond what a certificate can say.
    #[error("the clock is beyond what a certificate can say; set it")]
    Clock,
    /// The TCB version has parts that the product has not, or lacks one.
    #[error("TCB `{tcb}` is none of {product}: an FMC level is Turin's, and Turin's only")]
    Tcb {
        /// What was asked for.
        tcb: TcbVersion,
        /// For what.
        product: Product,
    },
    /// The bytes are not what was written.
    #[error("not a kept SNP identity: {0}; remove it to have a new one made")]
    NotKept(&'static str),
}

impl SnpIdentity {
    /// A new installation with 4096-bit keys, as AMD's: takes some seconds.
    pub fn generate() -> Result<Self, SnpIdentityError> {
        Self::generate_with(CaKeySize::Rsa4096)
    }

    /// A new installation with CA keys of this size.
    pub fn generate_with(size: CaKeySize) -> Result<Self, SnpIdentityError> {
        let (identity, _forgotten) = Self::build(size, SystemTime::now())?;
        Ok(identity)
    }

    /// The certificates above every leaf, and the revocation list.
    pub fn certificates(&self) -> &SnpCertificates {
        &self.certificates
    }

    /// SHA-256 of the root certificate: what an owner names to trust this emulated platform.
    pub fn root_fingerprint(&self) -> [u8; 32] {
        let mut fingerprint = [0; 32];
        fingerprint.copy_from_slice(digest(&SHA256, &self.certificates.ark).as_ref());
        fingerprint
    }

    /// The chip's identity under the personality `product`: 64 bytes, on Turin 8 and zeros behind.
    pub fn chip_id(&self, product: Product) -> Result<[u8; 64], SnpIdentityError> {
        let mut id = [0; 64];
        let used = id.get_mut(..product.hwid_len()).unwrap_or_default();
        key::derive(&*self.secret, &[b"chip id", name(product)], used)?;
        Ok(id)
    }

    /// The chip's VCEK for `tcb`, with a new certificate of seven years; the key is always the
    /// same for the same product and version.
    pub fn vcek(
        &self,
        product: Product,
        tcb: TcbVersion,
    ) -> Result<EndorsementKey, SnpIdentityError> {
        let raw = raw_tcb(product, tcb)?;
        let key = key::derive_p384(&*self.secret, &[b"VCEK", name(product), &raw])?;
        let chip_id = self.chip_id(product)?;
        let mut extensions = tcb_extensions(product, tcb)?;
        extensions.push(ExtensionSpec {
            oid: oid("4"),
            critical: false,
            value: chip_id
                .get(..product.hwid_len())
                .unwrap_or_default()
                .to_vec(),
        });
        let spec = leaf_spec(SigningKey::Vcek, SystemTime::now(), extensions);
        let certificate = self.ask.certify(&spec, &p384_public_der(&key)?)?;
        EndorsementKey::new(SigningKey::Vcek, &key, certificate)
    }

    /// The VLEK of the cloud provider `csp_id` for `tcb`, with a new certificate of one year.
    pub fn vlek(
        &self,
        product: Product,
        tcb: TcbVersion,
        csp_id: &str,
    ) -> Result<EndorsementKey, SnpIdentityError> {
        let raw = raw_tcb(product, tcb)?;
        let label = [b"VLEK".as_slice(), name(product), &raw, csp_id.as_bytes()];
        let key = key::derive_p384(&*self.secret, &label)?;
        let mut extensions = tcb_extensions(product, tcb)?;
        extensions.push(ExtensionSpec::of(
            &oid("5"),
            false,
            &Ia5StringRef::new(csp_id)?,
        )?);
        let spec = leaf_spec(SigningKey::Vlek, SystemTime::now(), extensions);
        let certificate = self.asvk.certify(&spec, &p384_public_der(&key)?)?;
        EndorsementKey::new(SigningKey::Vlek, &key, certificate)
    }

    /// The identity as bytes, for a file that only the secure processor can read. Secret.
    pub fn to_bytes(&self) -> Result<Zeroizing<Vec<u8>>, SnpIdentityError> {
        let SnpCertificates {
            ark,
            ask,
            asvk,
            crl,
        } = &self.certificates;
        let (ask_key, asvk_key) = (self.ask.to_pkcs8()?, self.asvk.to_pkcs8()?);
        let parts: [&[u8]; 6] = [ark, ask, asvk, crl, &ask_key, &asvk_key];
        // All of it at once: a buffer that grows leaves copies behind.
        let len =
            KEPT_MAGIC.len() + SECRET_LEN + parts.iter().map(|part| 4 + part.len()).sum::<usize>();
        let mut raw = Zeroizing::new(Vec::with_capacity(len));
        raw.extend(KEPT_MAGIC);
        raw.extend(&*self.secret);
        for part in parts {
            raw.extend(u32::try_from(part.len()).unwrap_or(u32::MAX).to_le_bytes());
            raw.extend(part);
        }
        Ok(raw)
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote, and checks that keys and certificates
    /// belong together.
    pub fn from_bytes(raw: &[u8]) -> Result<Self, SnpIdentityError> {
        let rest = raw
            .strip_prefix(&KEPT_MAGIC)
            .ok_or(SnpIdentityError::NotKept("another format or version"))?;
        let cut = SnpIdentityError::NotKept("it is cut off");
        let (secret, mut rest) = rest.split_first_chunk::<SECRET_LEN>().ok_or(cut)?;
        let mut part = || -> Result<&[u8], SnpIdentityError> {
            let cut = || SnpIdentityError::NotKept("it is cut off");
            let (len, behind) = rest.split_first_chunk::<4>().ok_or_else(cut)?;
            let len = u32::from_le_bytes(*len) as usize;
            let (part, behind) = behind.split_at_checked(len).ok_or_else(cut)?;
            rest = behind;
            Ok(part)
        };
        let certificates = SnpCertificates {
            ark: part()?.to_vec(),
            ask: part()?.to_vec(),
            asvk: part()?.to_vec(),
            crl: part()?.to_vec(),
        };
        let ask = CaKey::from_pkcs8(part()?)?;
        let asvk = CaKey::from_pkcs8(part()?)?;
        if !rest.is_empty() {
            return Err(SnpIdentityError::NotKept("bytes follow it"));
        }
        for (certificate, key) in [(&certificates.ask, &ask), (&certificates.asvk, &asvk)] {
            let certificate = Certificate::from_der(certificate)?;
            let certified = certificate.tbs_certificate.subject_public_key_info;
            if certified.to_der()? != key.public_der()? {
                return Err(SnpIdentityError::NotKept(
                    "keys and certificates do not belong together",
                ));
            }
        }
        Ok(Self {
            certificates,
            ask,
            asvk,
            secret: Zeroizing::new(*secret),
        })
    }

    /// An identity, and its root's key, which all but tests forget.
    pub(super) fn build(
        size: CaKeySize,
        now: SystemTime,
    ) -> Result<(Self, CaKey), SnpIdentityError> {
        let [ark, ask, asvk] = [(); 3].map(|()| CaKey::generate(size));
        let (ark, ask, asvk) = (ark?, ask?, asvk?);
        let root_public = ark.public_der()?;
        let certify = |subject: &str, serial: u32, key: Option<&CaKey>| {
            let public = key.unwrap_or(&ark).public_der()?;
            let issuer = key.map(|_| root_public.as_slice());
            let spec = CertificateSpec {
                serial: serial.to_be_bytes().to_vec(),
                issuer: full_name(ARK_NAME),
                subject: full_name(subject),
                not_before: now.checked_sub(SKEW).unwrap_or(now),
                not_after: later(now, CA_YEARS)?,
                extensions: ca_extensions(&public, issuer)?,
                pss: PssForm::ExplicitTrailer,
            };
            ark.certify(&spec, &public)
        };
        let crl = CrlSpec {
            issuer: full_name(ARK_NAME),
            number: 1,
            this_update: now.checked_sub(SKEW).unwrap_or(now),
            next_update: Some(later(now, CA_YEARS)?),
            revoked: Vec::new(),
            pss: PssForm::ExplicitTrailer,
        };
        let certificates = SnpCertificates {
            ark: certify(ARK_NAME, ARK_SERIAL, None)?,
            ask: certify(ASK_NAME, ASK_SERIAL, Some(&ask))?,
            asvk: certify(ASVK_NAME, ASVK_SERIAL, Some(&asvk))?,
            crl: ark.revoke(&crl)?,
        };
        let mut secret = Zeroizing::new([0; SECRET_LEN]);
        OsRng
            .try_fill_bytes(&mut *secret)
            .map_err(|_| SnpIdentityError::Key)?;
        let identity = Self {
            certificates,
            ask,
            asvk,
            secret,
        };
        Ok((identity, ark))
    }

    #[cfg(any(test, feature = "testing"))]
    pub(super) fn intermediates(&self) -> (&CaKey, &CaKey) {
        (&self.ask, &self.asvk)
    }
}

/// A leaf as this installation issues it.
pub(super) fn leaf_spec(
    kind: SigningKey,
    now: SystemTime,
    extensions: Vec<ExtensionSpec>,
) -> CertificateSpec {
    let (issuer, subject, years) = match kind {
        SigningKey::Vcek => (ASK_NAME, "SEV-VCEK", VCEK_YEARS),
        SigningKey::Vlek => (ASVK_NAME, "SEV-VLEK", VLEK_YEARS),
    };
    CertificateSpec {
        // All of AMD's leaves have the serial number 0.
        serial: vec![0],
        issuer: full_name(issuer),
        subject: full_name(subject),
        not_before: now.checked_sub(SKEW).unwrap_or(now),
        not_after: later(now, years).unwrap_or(now),
        extensions,
        pss: PssForm::Short,
    }
}

/// Structure version, product name and patch levels, in AMD's order.
pub(super) fn tcb_extensions(
    product: Product,
    tcb: TcbVersion,
) -> Result<Vec<ExtensionSpec>, SnpIdentityError> {
    let number = |at: &str, level: u8| ExtensionSpec::of(&oid(at), false, &level);
    let TcbVersion {
        fmc,
        boot_loader,
        tee,
        snp,
        microcode,
    } = tcb;
    let product_name = product_name(product);
    let product_name = Ia5StringRef::new(&product_name)?;
    let structure = u8::from(product == Product::Turin);
    let mut extensions = vec![
        number("1", structure)?,
        ExtensionSpec::of(&oid("2"), false, &product_name)?,
    ];
    let levels: &[(&str, u8)] = match fmc {
        Some(fmc) => &[
            ("3.9", fmc),
            ("3.1", boot_loader),
            ("3.2", tee),
            ("3.3", snp),
            ("3.5", 0),
            ("3.6", 0),
            ("3.7", 0),
            ("3.8", microcode),
        ],
        None => &[
            ("3.1", boot_loader),
            ("3.2", tee),
            ("3.4", 0),
            ("3.5", 0),
            ("3.6", 0),
            ("3.7", 0),
            ("3.3", snp),
            ("3.8", microcode),
        ],
    };
    for (at, level) in levels {
        extensions.push(number(at, *level)?);
    }
    Ok(extensions)
}

/// The product name in an emulated leaf: `Genoa-EMULATED`.
pub(super) fn product_name(product: Product) -> String {
    format!("{}-EMULATED", product.kds_name())
}

/// An object identifier below AMD's arc for SEV.
pub(super) fn oid(below: &str) -> String {
    format!("1.3.6.1.4.1.3704.1.{below}")
}

/// RFC 4514: read from the end.
pub(super) fn full_name(common_name: &str) -> String {
    format!("CN={common_name},O=NOT AMD,OU=Casemate emulated SEV-SNP")
}

fn raw_tcb(product: Product, tcb: TcbVersion) -> Result<[u8; 8], SnpIdentityError> {
    let raw = tcb.to_raw(product);
    Ok(raw.ok_or(SnpIdentityError::Tcb { tcb, product })?.0)
}

fn name(product: Product) -> &'static [u8] {
    product.kds_name().as_bytes()
}

fn later(now: SystemTime, years: u64) -> Result<SystemTime, SnpIdentityError> {
    now.checked_add(YEAR.saturating_mul(u32::try_from(years).unwrap_or(u32::MAX)))
        .ok_or(SnpIdentityError::Clock)
}

pub(super) const ARK_NAME: &str = "ARK-EMULATED";
pub(super) const ASK_NAME: &str = "SEV-EMULATED";
pub(super) const ASVK_NAME: &str = "SEV-VLEK-EMULATED";
pub(super) const ARK_SERIAL: u32 = 0x0e_0000;
pub(super) const ASK_SERIAL: u32 = 0x0e_0002;
pub(super) const ASVK_SERIAL: u32 = 0x0e_0101;
const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
/// Forgives a verifier whose clock is a day behind.
const SKEW: Duration = Duration::from_secs(24 * 3600);
const CA_YEARS: u64 = 25;
const VCEK_YEARS: u64 = 7;
const VLEK_YEARS: u64 = 1;
const SECRET_LEN: usize = 48;
const KEPT_MAGIC: [u8; 8] = *b"CMSNPID1";
