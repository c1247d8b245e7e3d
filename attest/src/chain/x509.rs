//! What every certificate has: an encoding, names, dates, a serial number. Bytes come from hosts,
//! files and the network; all of it is bounded and copied out once.

use super::pss;
use ring::digest::{SHA256, digest};
use rustls_pki_types::UnixTime;
use rustls_pki_types::pem::{PemObject, SectionKind};
use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use x509_parser::asn1_rs::{Any, Tag};
use x509_parser::prelude::{ASN1Time, FromDer, X509Certificate, X509Extension, X509Version};
use x509_parser::x509::{AlgorithmIdentifier, X509Name};

/// The longest certificate that is read, in bytes, PEM or DER. AMD's are below 2,400.
pub const MAX_CERTIFICATE_LEN: usize = 8 << 10;

/// The longest text that [`split_pem`] reads.
const MAX_PEM_LEN: usize = 64 << 10;

/// Why bytes are no certificate that could stand in a chain.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    /// More bytes than any certificate of AMD's has.
    #[error("{0} bytes are no SNP certificate; at most {MAX_CERTIFICATE_LEN} are read")]
    TooLarge(usize),
    /// PEM text that is not one certificate and nothing else.
    #[error("the PEM text holds something else than {expected}; cut it down to that")]
    Pem {
        /// What may be in it.
        expected: &'static str,
    },
    /// The DER is cut short, does not fit together, or has bytes behind its end.
    #[error("this is no DER-encoded X.509 certificate; fetch it again")]
    Malformed,
    /// Not version 3.
    #[error("the certificate is not of X.509 version 3")]
    Version,
    /// Signed with something else than AMD's RSASSA-PSS with SHA-384, or two algorithms named.
    #[error("the certificate is not signed with RSASSA-PSS, SHA-384 and a salt of 48 bytes")]
    Algorithm,
    /// A name has no or more than one common name or organization.
    #[error("the certificate's subject should have one common name and one organization")]
    Name,
    /// A date before 1970 or one that ends before it begins.
    #[error("the certificate's dates make no period of validity")]
    Dates,
    /// The same extension twice.
    #[error("the certificate carries extension {0} twice")]
    Duplicate(String),
}

/// A serial number, without leading zeros.
///
/// AMD gives every VCEK and VLEK the serial number 0.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Serial(Vec<u8>);

/// From when to when a certificate is valid, both ends included, in whole seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// The first second.
    pub not_before: SystemTime,
    /// The last second.
    pub not_after: SystemTime,
}

/// On which side of a [`Validity`] a clock is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outside {
    Before,
    After,
}

/// The certificates of a PEM text, as DER and in their order: the key service answers a request
/// for a chain with ASK ‖ ARK. At most four; anything between them but white space is refused.
pub fn split_pem(text: &[u8]) -> Result<Vec<Vec<u8>>, CertificateError> {
    if text.len() > MAX_PEM_LEN {
        return Err(CertificateError::TooLarge(text.len()));
    }
    const REFUSED: CertificateError = CertificateError::Pem {
        expected: "one to four certificates",
    };
    let mut rest = text.trim_ascii();
    let mut found = Vec::new();
    while !rest.is_empty() {
        let end = rest
            .windows(PEM_END.len())
            .position(|window| window == PEM_END)
            .and_then(|at| at.checked_add(PEM_END.len()))
            .ok_or(REFUSED)?;
        let (one, more) = rest.split_at_checked(end).ok_or(REFUSED)?;
        found.push(one_pem(one, CERTIFICATE).ok_or(REFUSED)?);
        rest = more.trim_ascii_start();
    }
    match found.len() {
        1..=4 => Ok(found),
        _ => Err(REFUSED),
    }
}

impl Serial {
    pub(super) fn new(raw: &[u8]) -> Self {
        let zeros = raw.iter().take_while(|byte| **byte == 0).count();
        Self(raw.get(zeros..).unwrap_or_default().to_vec())
    }

    /// Whether it is 0 and so tells nothing apart.
    pub fn is_zero(&self) -> bool {
        self.0.is_empty()
    }

    /// The number, big-endian, without leading zeros; empty for 0.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl Validity {
    /// Where `clock` is outside, and on which side.
    pub(super) fn check(&self, clock: SystemTime) -> Result<(), Outside> {
        let Ok(now) = unix(clock).map(|time| Duration::from_secs(time.as_secs())) else {
            return Err(Outside::Before);
        };
        let second = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default();
        if now < second(self.not_before) {
            return Err(Outside::Before);
        }
        if now > second(self.not_after) {
            return Err(Outside::After);
        }
        Ok(())
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_slice() {
            [] => f.write_str("0"),
            bytes => f.write_str(&hex::encode(bytes)),
        }
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Serial({self})")
    }
}

/// What every certificate says, copied out of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Outline {
    pub(super) der: Vec<u8>,
    pub(super) sha256: [u8; 32],
    pub(super) serial: Serial,
    /// As encoded: names are compared byte for byte.
    pub(super) issuer: Vec<u8>,
    /// The issuer's name, for people.
    pub(super) issuer_name: String,
    /// As encoded.
    pub(super) subject: Vec<u8>,
    pub(super) common_name: String,
    pub(super) organization: String,
    pub(super) validity: Validity,
}

impl Outline {
    /// Reads one certificate, DER or PEM, and hands its parsed form to `more`, which has the
    /// first say over what is wrong with it.
    pub(super) fn parse<T, E: From<CertificateError>>(
        bytes: &[u8],
        more: impl FnOnce(&X509Certificate<'_>) -> Result<T, E>,
    ) -> Result<(Self, T), E> {
        let der = der_of(bytes)?;
        let certificate = parse_der(&der)?;
        let outline = Self::read(&der, &certificate)?;
        let more = more(&certificate)?;
        Ok((outline, more))
    }

    fn read(der: &[u8], certificate: &X509Certificate<'_>) -> Result<Self, CertificateError> {
        if certificate.version() != X509Version::V3 {
            return Err(CertificateError::Version);
        }
        let outer = &certificate.signature_algorithm;
        if !is_amd_pss(outer) || outer != &certificate.tbs_certificate.signature {
            return Err(CertificateError::Algorithm);
        }
        if let Some(oid) = duplicate(certificate.extensions()) {
            return Err(CertificateError::Duplicate(oid));
        }
        let (common_name, organization) = names(certificate.subject())?;
        Ok(Self {
            der: der.to_vec(),
            sha256: sha256(der),
            serial: Serial::new(certificate.raw_serial()),
            issuer: certificate.issuer().as_raw().to_vec(),
            issuer_name: certificate.issuer().to_string(),
            subject: certificate.subject().as_raw().to_vec(),
            common_name,
            organization,
            validity: validity(certificate)?,
        })
    }
}

/// One certificate and nothing behind it.
pub(super) fn parse_der(der: &[u8]) -> Result<X509Certificate<'_>, CertificateError> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        _ => Err(CertificateError::Malformed),
    }
}

pub(super) fn sha256(bytes: &[u8]) -> [u8; 32] {
    let digest = digest(&SHA256, bytes);
    // SHA-256 is 32 bytes; should it ever not be, nothing equals the result.
    digest.as_ref().try_into().unwrap_or([0; 32])
}

/// The clock as webpki takes it; an error before 1970.
pub(super) fn unix(clock: SystemTime) -> Result<UnixTime, Outside> {
    clock
        .duration_since(UNIX_EPOCH)
        .map(UnixTime::since_unix_epoch)
        .map_err(|_| Outside::Before)
}

/// A date of a certificate or list; `None` before 1970.
pub(super) fn system_time(time: ASN1Time) -> Option<SystemTime> {
    let seconds = u64::try_from(time.timestamp()).ok()?;
    UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

/// Whether the algorithm is one of AMD's two encodings of PSS.
pub(super) fn is_amd_pss(algorithm: &AlgorithmIdentifier<'_>) -> bool {
    let parameters = algorithm.parameters.as_ref();
    let Some(parameters) = parameters.filter(|any| any.tag() == Tag::Sequence) else {
        return false;
    };
    let Ok(len) = u8::try_from(parameters.data.len()) else {
        return false;
    };
    let oid = algorithm.algorithm.as_bytes();
    let mut identifier = vec![0x06, u8::try_from(oid.len()).unwrap_or_default()];
    identifier.extend_from_slice(oid);
    identifier.extend([0x30, len]);
    identifier.extend_from_slice(parameters.data);
    pss::is_amd_pss(&identifier)
}

/// The first extension that stands in the list twice.
pub(super) fn duplicate(extensions: &[X509Extension<'_>]) -> Option<String> {
    let mut rest = extensions;
    while let Some((first, others)) = rest.split_first() {
        if others.iter().any(|other| other.oid == first.oid) {
            return Some(first.oid.to_id_string());
        }
        rest = others;
    }
    None
}

fn der_of(bytes: &[u8]) -> Result<Vec<u8>, CertificateError> {
    if bytes.len() > MAX_CERTIFICATE_LEN {
        return Err(CertificateError::TooLarge(bytes.len()));
    }
    let text = bytes.trim_ascii();
    der_or_pem(bytes, CERTIFICATE).ok_or(match text.starts_with(b"-----") {
        true => CertificateError::Pem {
            expected: "one certificate",
        },
        false => CertificateError::Malformed,
    })
}

/// The DER of bytes that are DER already, or of a text that is exactly one PEM block with this
/// label.
pub(super) fn der_or_pem(bytes: &[u8], label: &str) -> Option<Vec<u8>> {
    if bytes.first() == Some(&DER_SEQUENCE) {
        return Some(bytes.to_vec());
    }
    one_pem(bytes.trim_ascii(), label)
}

/// The DER of a text that is one PEM block.
fn one_pem(text: &[u8], label: &str) -> Option<Vec<u8>> {
    let body = text
        .strip_prefix(format!("-----BEGIN {label}-----").as_bytes())?
        .strip_suffix(format!("-----END {label}-----").as_bytes())?;
    if body.contains(&b'-') {
        return None;
    }
    let (_, der) = <(SectionKind, Vec<u8>)>::from_pem_slice(text).ok()?;
    Some(der)
}

fn names(name: &X509Name<'_>) -> Result<(String, String), CertificateError> {
    let mut common = name.iter_common_name().map(|value| value.as_str());
    let mut organization = name.iter_organization().map(|value| value.as_str());
    match (
        common.next(),
        common.next(),
        organization.next(),
        organization.next(),
    ) {
        (Some(Ok(common)), None, Some(Ok(organization)), None) => {
            Ok((common.to_owned(), organization.to_owned()))
        }
        _ => Err(CertificateError::Name),
    }
}

fn validity(certificate: &X509Certificate<'_>) -> Result<Validity, CertificateError> {
    let dates = certificate.validity();
    let not_before = system_time(dates.not_before).ok_or(CertificateError::Dates)?;
    let not_after = system_time(dates.not_after).ok_or(CertificateError::Dates)?;
    if not_after < not_before {
        return Err(CertificateError::Dates);
    }
    Ok(Validity {
        not_before,
        not_after,
    })
}

/// The content of a DER value of type `tag` that fills `bytes`, up to 255 bytes long.
pub(super) fn der_content(bytes: &[u8], tag: Tag) -> Option<&[u8]> {
    match Any::from_der(bytes) {
        Ok(([], any)) if any.tag() == tag && !any.header.is_constructed() => Some(any.data),
        _ => None,
    }
}

const DER_SEQUENCE: u8 = 0x30;
const CERTIFICATE: &str = "CERTIFICATE";
const PEM_END: &[u8] = b"-----END CERTIFICATE-----";
