//! AMD's revocation lists: which intermediates no longer count.
//!
//! The root signs the list, so it can only speak of what the root signed: ASK and ASVK. Leaves
//! all have serial number 0 and cannot be told apart by it. A list is optional evidence from an
//! untrusted cache or network, so its absence is an outcome of its own and never reads as good.

use super::der::{INTEGER, Signed, content};
use super::error::ChainError;
use super::leaf::Leaf;
use super::trust::{Root, SnpRoot, SnpTrust, TrustedIntermediate};
use super::x509::{MAX_EXTENSIONS, Serial, der_or_pem, duplicate, sha256, system_time};
use std::collections::HashMap;
use std::fmt;
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};
use x509_parser::oid_registry::{
    OID_X509_EXT_AUTHORITY_KEY_IDENTIFIER, OID_X509_EXT_CRL_NUMBER,
    OID_X509_EXT_DELTA_CRL_INDICATOR, OID_X509_EXT_ISSUER_DISTRIBUTION_POINT,
};
use x509_parser::prelude::{
    CertificateRevocationList, FromDer, ParsedExtension, X509Extension, X509Version,
};

/// The longest list that is read, in bytes.
pub const MAX_CRL_LEN: usize = 1 << 20;

/// A well-formed revocation list. Whose signature it bears is found out at its first use and
/// remembered, so keep it for many leaves.
///
/// Nothing in a list says whether the key service served it for VCEKs or for VLEKs; both are the
/// root's. Fetch it from the distribution point of the leaf's own kind.
#[derive(Debug, Clone)]
pub struct Crl {
    der: Vec<u8>,
    body: Vec<u8>,
    signature: Vec<u8>,
    issuer: Vec<u8>,
    sha256: [u8; 32],
    this_update: SystemTime,
    next_update: SystemTime,
    number: Option<String>,
    revoked: HashMap<Serial, SystemTime>,
    /// The root whose signature was found good, by its fingerprint.
    signed_by: OnceLock<[u8; 32]>,
}

/// Why bytes are no revocation list that can be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CrlError {
    /// More bytes than are read.
    #[error("a revocation list of {0} bytes is refused; at most {MAX_CRL_LEN} are read")]
    TooLarge(usize),
    /// Cut short, no list, or bytes behind its end.
    #[error("this is no DER- or PEM-encoded X.509 revocation list; fetch it again")]
    Malformed,
    /// Signed with something else than AMD's RSASSA-PSS with SHA-384.
    #[error("the revocation list is not signed with RSASSA-PSS, SHA-384 and a salt of 48 bytes")]
    Algorithm,
    /// No date by which there is a newer one, or one before 1970.
    #[error("the revocation list does not say until when it holds")]
    Dates,
    /// Only a part of what is revoked, or something else that is not understood.
    #[error("the revocation list is not a complete list for its issuer: {0}")]
    Unsupported(&'static str),
}

/// What a caller asks of revocation.
#[derive(Debug, Clone, Copy, Default)]
pub struct Revocation<'a> {
    /// Whether it can do without a list.
    pub mode: CrlMode,
    /// The list, if there is one. It is checked in either mode.
    pub crl: Option<&'a Crl>,
    /// How old a list may be, counted from its thisUpdate, although it still holds.
    pub max_age: Option<Duration>,
}

/// Whether a caller can do without a revocation list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CrlMode {
    /// Only [`CrlOutcome::Good`] will do.
    #[default]
    Required,
    /// [`CrlOutcome::Absent`] will do as well; a list that is there has to be good. Whoever
    /// carries the evidence can leave the list out.
    IfPresent,
}

/// What a revocation list, or its absence, says of a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CrlOutcome {
    /// Signed by the root, fresh, and it names none of the certificates.
    Good {
        /// When it was made.
        this_update: SystemTime,
        /// Until when it holds.
        next_update: SystemTime,
        /// Its CRL number, decimal.
        number: Option<String>,
        /// Whether the leaf could be looked up: not with the serial number 0, which all of AMD's
        /// leaves have.
        leaf_looked_up: bool,
    },
    /// There is none.
    Absent,
    /// It names a certificate of the path.
    Revoked {
        /// Which: `root`, `intermediate` or `leaf`.
        link: super::Link,
        /// Its serial number.
        serial: Serial,
        /// Since when.
        since: SystemTime,
    },
    /// A newer one is due since then.
    Stale(SystemTime),
    /// It still holds, but was made longer ago than the caller accepts.
    TooOld(SystemTime),
    /// Its thisUpdate is still to come.
    NotYetValid(SystemTime),
    /// It is another root's, or the root may not sign lists.
    WrongIssuer,
    /// It names the root as its issuer, and is not signed by it.
    BadSignature,
}

impl Crl {
    /// Reads exactly one list, DER or PEM, of at most [`MAX_CRL_LEN`] bytes.
    pub fn parse(bytes: &[u8]) -> Result<Self, CrlError> {
        if bytes.len() > MAX_CRL_LEN {
            return Err(CrlError::TooLarge(bytes.len()));
        }
        let der = der_or_pem(bytes, "X509 CRL").ok_or(CrlError::Malformed)?;
        let Ok(([], list)) = CertificateRevocationList::from_der(&der) else {
            return Err(CrlError::Malformed);
        };
        let signed = Signed::parse(&der).ok_or(CrlError::Malformed)?;
        if !signed.amd_pss {
            return Err(CrlError::Algorithm);
        }
        if list.version() != Some(X509Version::V2) {
            return Err(CrlError::Unsupported("it is not of version 2"));
        }
        let number = read_extensions(list.extensions())?;
        let this_update = system_time(list.last_update()).ok_or(CrlError::Dates)?;
        let next_update = list
            .next_update()
            .and_then(system_time)
            .filter(|next| *next >= this_update)
            .ok_or(CrlError::Dates)?;
        Ok(Self {
            body: signed.body.to_vec(),
            signature: signed.signature.to_vec(),
            issuer: list.issuer().as_raw().to_vec(),
            sha256: sha256(&der),
            der: der.to_vec(),
            this_update,
            next_update,
            number,
            revoked: read_entries(&list)?,
            signed_by: OnceLock::new(),
        })
    }

    /// The list as it came, DER.
    pub fn as_der(&self) -> &[u8] {
        &self.der
    }

    /// SHA-256 of the DER.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.sha256
    }

    /// When it says that it was made.
    pub fn this_update(&self) -> SystemTime {
        self.this_update
    }

    /// Until when it says that it holds.
    pub fn next_update(&self) -> SystemTime {
        self.next_update
    }

    /// The CRL number that it claims, decimal.
    pub fn number(&self) -> Option<&str> {
        self.number.as_deref()
    }

    /// Whether one of these roots signed it; for whoever stores lists before there is a leaf.
    pub fn is_signed_under(&self, trust: &SnpTrust) -> bool {
        let mut roots = trust.roots().iter();
        roots.any(|root| self.check_issuer(root).is_ok())
    }

    /// Which of these roots signed it: a list of another product's root is no list for this one.
    pub fn signer(&self, trust: &SnpTrust) -> Option<SnpRoot> {
        let mut roots = trust.roots().iter();
        roots
            .find(|root| self.check_issuer(root).is_ok())
            .map(|root| root.id)
    }

    fn check_issuer(&self, root: &Root) -> Result<(), CrlOutcome> {
        if self.issuer != root.outline.subject || !root.signs_lists() {
            return Err(CrlOutcome::WrongIssuer);
        }
        if self.signed_by.get() == Some(&root.outline.sha256) {
            return Ok(());
        }
        if !root.verify(&self.body, &self.signature) {
            return Err(CrlOutcome::BadSignature);
        }
        // A second root with the same key would only be verified anew each time.
        let _ = self.signed_by.set(root.outline.sha256);
        Ok(())
    }

    fn check_age(&self, max_age: Option<Duration>, clock: SystemTime) -> Result<(), CrlOutcome> {
        let Ok(age) = clock.duration_since(self.this_update) else {
            return Err(CrlOutcome::NotYetValid(self.this_update));
        };
        if clock > self.next_update {
            return Err(CrlOutcome::Stale(self.next_update));
        }
        if max_age.is_some_and(|max| age > max) {
            return Err(CrlOutcome::TooOld(self.this_update));
        }
        Ok(())
    }

    fn check_serials(&self, leaf: &Leaf, issuer: &TrustedIntermediate) -> Result<(), CrlOutcome> {
        use super::Link;
        let serials = [
            (Link::Root, issuer.root_serial()),
            (Link::Intermediate, issuer.serial()),
            (Link::Leaf, leaf.serial()),
        ];
        for (link, serial) in serials {
            // An entry for 0 would be the root's word on something else than these leaves.
            let looked_up = link != Link::Leaf || !serial.is_zero();
            if let Some(since) = self.revoked.get(serial).filter(|_| looked_up) {
                return Err(CrlOutcome::Revoked {
                    link,
                    serial: serial.clone(),
                    since: *since,
                });
            }
        }
        Ok(())
    }
}

impl Revocation<'_> {
    /// What the list says of this path; never fails, and never takes absence for good.
    pub fn outcome(
        &self,
        leaf: &Leaf,
        issuer: &TrustedIntermediate,
        clock: SystemTime,
    ) -> CrlOutcome {
        let Some(crl) = self.crl else {
            return CrlOutcome::Absent;
        };
        let checked = crl
            .check_issuer(issuer.trusted_root())
            .and_then(|()| crl.check_serials(leaf, issuer))
            .and_then(|()| crl.check_age(self.max_age, clock));
        match checked {
            Ok(()) => CrlOutcome::Good {
                this_update: crl.this_update,
                next_update: crl.next_update,
                number: crl.number.clone(),
                leaf_looked_up: !leaf.serial().is_zero(),
            },
            Err(outcome) => outcome,
        }
    }

    pub(super) fn check(
        &self,
        leaf: &Leaf,
        issuer: &TrustedIntermediate,
        clock: SystemTime,
    ) -> Result<CrlOutcome, ChainError> {
        match (self.outcome(leaf, issuer, clock), self.mode) {
            (good @ CrlOutcome::Good { .. }, _) => Ok(good),
            (CrlOutcome::Absent, CrlMode::IfPresent) => Ok(CrlOutcome::Absent),
            (outcome, _) => Err(ChainError::Revocation(outcome)),
        }
    }
}

impl CrlOutcome {
    /// A stable name for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Good { .. } => "CRL_GOOD",
            Self::Absent => "CRL_ABSENT",
            Self::Revoked { .. } => "CRL_REVOKED",
            Self::Stale(_) => "CRL_STALE",
            Self::TooOld(_) => "CRL_TOO_OLD",
            Self::NotYetValid(_) => "CRL_NOT_YET_VALID",
            Self::WrongIssuer => "CRL_WRONG_ISSUER",
            Self::BadSignature => "CRL_SIGNATURE",
        }
    }
}

impl CrlError {
    /// A stable name for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::TooLarge(_) => "CRL_TOO_LARGE",
            Self::Malformed => "CRL_MALFORMED",
            Self::Algorithm => "CRL_ALGORITHM",
            Self::Dates => "CRL_DATES",
            Self::Unsupported(_) => "CRL_UNSUPPORTED",
        }
    }
}

impl fmt::Display for CrlOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let date = |time: &SystemTime| humantime::format_rfc3339_seconds(*time);
        match self {
            Self::Good { next_update, .. } => {
                write!(
                    f,
                    "not revoked by a list that holds until {}",
                    date(next_update)
                )
            }
            Self::Absent => f.write_str("there is no revocation list; fetch it"),
            Self::Revoked {
                link,
                serial,
                since,
            } => write!(
                f,
                "the {link} (serial {serial}) is revoked since {}",
                date(since)
            ),
            Self::Stale(next) => {
                write!(f, "the list held until {}; fetch a newer one", date(next))
            }
            Self::TooOld(this) => write!(
                f,
                "the list is of {}, older than is accepted; fetch a newer one",
                date(this)
            ),
            Self::NotYetValid(this) => {
                write!(
                    f,
                    "the list is of {}, still to come; check the clock",
                    date(this)
                )
            }
            Self::WrongIssuer => f.write_str("the list is not of this chain's root"),
            Self::BadSignature => f.write_str("the list is not signed by this chain's root"),
        }
    }
}

/// The CRL number; an error for whatever makes the list less than complete.
fn read_extensions(extensions: &[X509Extension<'_>]) -> Result<Option<String>, CrlError> {
    if extensions.len() > MAX_EXTENSIONS || duplicate(extensions).is_some() {
        return Err(CrlError::Malformed);
    }
    let mut number = None;
    for extension in extensions {
        if extension.oid == OID_X509_EXT_DELTA_CRL_INDICATOR {
            return Err(CrlError::Unsupported("it has only the changes to another"));
        } else if extension.oid == OID_X509_EXT_ISSUER_DISTRIBUTION_POINT {
            check_scope(extension)?;
        } else if extension.oid == OID_X509_EXT_CRL_NUMBER {
            number = Some(read_number(extension)?);
        } else if extension.critical && extension.oid != OID_X509_EXT_AUTHORITY_KEY_IDENTIFIER {
            return Err(CrlError::Unsupported("an unknown extension is critical"));
        }
    }
    Ok(number)
}

/// The list has to speak of all authorities below its issuer.
fn check_scope(extension: &X509Extension<'_>) -> Result<(), CrlError> {
    let ParsedExtension::IssuingDistributionPoint(scope) = extension.parsed_extension() else {
        return Err(CrlError::Malformed);
    };
    let narrowed = scope.only_contains_user_certs
        || scope.only_contains_attribute_certs
        || scope.only_some_reasons.is_some()
        || scope.indirect_crl;
    match narrowed {
        true => Err(CrlError::Unsupported("its scope leaves out authorities")),
        false => Ok(()),
    }
}

fn read_number(extension: &X509Extension<'_>) -> Result<String, CrlError> {
    match (
        extension.parsed_extension(),
        content(extension.value, INTEGER),
    ) {
        (ParsedExtension::CRLNumber(number), Some(bytes)) if bytes.len() <= MAX_NUMBER_LEN => {
            Ok(number.to_string())
        }
        _ => Err(CrlError::Malformed),
    }
}

fn read_entries(
    list: &CertificateRevocationList<'_>,
) -> Result<HashMap<Serial, SystemTime>, CrlError> {
    let entry = |entry: &x509_parser::prelude::RevokedCertificate<'_>| {
        // Critical entry extensions hand the entry to another issuer (RFC 5280, 5.3.3).
        if entry
            .extensions()
            .iter()
            .any(|extension| extension.critical)
        {
            return Err(CrlError::Unsupported("an entry's extension is critical"));
        }
        let since = system_time(entry.revocation_date).ok_or(CrlError::Dates)?;
        Ok((Serial::new(entry.raw_serial()), since))
    };
    list.iter_revoked_certificates().map(entry).collect()
}

/// RFC 5280, 5.2.3.
const MAX_NUMBER_LEN: usize = 21;
