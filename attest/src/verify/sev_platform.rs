//! The verdict over a platform's SEV certificates, signature by signature, as far as they go.
//!
//! Unlike [`LegacyChain::verify`], which stops at the first fault, this says of each signature
//! whether it holds, and takes incomplete sets: AMD publishes ARK and ASK alone. What is missing
//! cannot be verified and is never accepted.

use super::sev::{EMULATED, PlatformEvidence};
use super::sev_report::{REPORT_CHECKS, SevReportEvidence, SevReportExpected, report_checks};
use super::verdict::{Check, Verdict};
use crate::legacy::ca::{CaCertificate, CaError};
use crate::legacy::certificate::{CertificateError, SevCertificate, Usage};
use crate::legacy::chain::{
    ChainError, EMULATED_ARK_ID, LegacyChain, Root, TrustAnchors, VerifiedChain,
};
use crate::legacy::report::SevReport;

/// What there is in a certificate's place.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Place<T> {
    /// Nothing.
    #[default]
    Missing,
    /// Bytes that are no such certificate, and why.
    Malformed(String),
    /// A well-formed certificate.
    There(T),
}

/// A platform's certificates as they were found. Nothing is believed yet.
#[derive(Debug, Clone, Default)]
pub struct SevPlatform {
    /// AMD's root key.
    pub ark: Place<CaCertificate>,
    /// AMD's signing key.
    pub ask: Place<CaCertificate>,
    /// The chip.
    pub cek: Place<SevCertificate>,
    /// The platform's owner.
    pub oca: Place<SevCertificate>,
    /// The platform's signing key.
    pub pek: Place<SevCertificate>,
    /// The key that sessions are agreed with.
    pub pdh: Place<SevCertificate>,
}

/// Judges a platform's certificates, and a report of one of its guests where there is one.
///
/// An emulated root counts where `trust` names it, unless the report's expectation forbids it.
pub fn verify_sev_platform(
    platform: &SevPlatform,
    trust: &TrustAnchors,
    report: Option<(&SevReport, &SevReportExpected)>,
) -> Verdict {
    let chain = platform.verified(trust);
    let evidence = match &chain {
        Some(Ok(chain)) => PlatformEvidence::Verified(chain),
        Some(Err(error)) => PlatformEvidence::Failed(error),
        None => PlatformEvidence::Missing,
    };
    let root = platform.root(trust);
    let allowed = report.is_none_or(|(_, expected)| expected.allow_emulated);
    let mut checks = vec![
        check_root(platform, root.as_ref()),
        check_kind(root.as_ref(), allowed),
    ];
    checks.extend(platform.signature_checks());
    let mut required = REQUIRED.to_vec();
    if let Some((report, expected)) = report {
        let platform = evidence;
        checks.extend(report_checks(
            &SevReportEvidence { platform, report },
            expected,
        ));
        required.extend(REPORT_CHECKS);
    }
    Verdict::of(checks, &required, platform.says_emulated())
}

impl<T> Place<T> {
    /// What parsing a file that is there led to.
    pub fn parsed<E: std::fmt::Display>(result: Result<T, E>) -> Self {
        match result {
            Ok(certificate) => Self::There(certificate),
            Err(error) => Self::Malformed(error.to_string()),
        }
    }

    fn get(&self) -> Option<&T> {
        match self {
            Self::There(certificate) => Some(certificate),
            _ => None,
        }
    }
}

impl SevPlatform {
    /// From what firmware exports and a host hands on: PDH, PEK ‖ OCA ‖ CEK, ASK ‖ ARK.
    pub fn exported(pdh: &[u8], platform: &[u8], amd: &[u8]) -> Result<Self, ChainError> {
        LegacyChain::parse(pdh, platform, amd).map(Self::from)
    }

    /// The whole chain as [`LegacyChain::verify`] judges it; `None` where it is not whole.
    fn verified(&self, trust: &TrustAnchors) -> Option<Result<VerifiedChain, ChainError>> {
        let chain = LegacyChain {
            ark: self.ark.get()?.clone(),
            ask: self.ask.get()?.clone(),
            cek: self.cek.get()?.clone(),
            oca: self.oca.get()?.clone(),
            pek: self.pek.get()?.clone(),
            pdh: self.pdh.get()?.clone(),
        };
        Some(chain.verify(trust))
    }

    fn root(&self, trust: &TrustAnchors) -> Option<Result<Root, ChainError>> {
        self.ark.get().map(|ark| trust.recognise(ark))
    }

    /// A root that calls itself emulated is never anything better, trusted or not.
    fn says_emulated(&self) -> bool {
        self.ark
            .get()
            .is_some_and(|ark| ark.key_id() == EMULATED_ARK_ID)
    }

    fn signature_checks(&self) -> Vec<Check> {
        let ca = |name, subject: &Place<_>, signer: &Place<_>, usages| {
            check_signature(name, subject, signer, usages, |subject, signer| {
                CaCertificate::verify_signed_by(subject, signer).map_err(Fault::from)
            })
        };
        let sev = |name, subject: &Place<_>, signer: &Place<_>, usages| {
            check_signature(name, subject, signer, usages, |subject, signer| {
                SevCertificate::verify_signed_by(subject, signer).map_err(Fault::from)
            })
        };
        let cek_by_ask = |cek: &SevCertificate, ask: &CaCertificate| {
            ask.verify_endorsement(cek).map_err(Fault::from)
        };
        use Usage::{Ark, Ask, Cek, Oca, Pdh, Pek};
        vec![
            ca(ARK_SELF, &self.ark, &self.ark, (Ark, Ark)),
            ca(ASK_BY_ARK, &self.ask, &self.ark, (Ask, Ark)),
            check_signature(CEK_BY_ASK, &self.cek, &self.ask, (Cek, Ask), cek_by_ask),
            sev(OCA_SELF, &self.oca, &self.oca, (Oca, Oca)),
            sev(PEK_BY_OCA, &self.pek, &self.oca, (Pek, Oca)),
            sev(PEK_BY_CEK, &self.pek, &self.cek, (Pek, Cek)),
            sev(PDH_BY_PEK, &self.pdh, &self.pek, (Pdh, Pek)),
        ]
    }
}

impl From<LegacyChain> for SevPlatform {
    fn from(chain: LegacyChain) -> Self {
        Self {
            ark: Place::There(chain.ark),
            ask: Place::There(chain.ask),
            cek: Place::There(chain.cek),
            oca: Place::There(chain.oca),
            pek: Place::There(chain.pek),
            pdh: Place::There(chain.pdh),
        }
    }
}

/// Both kinds of certificate say whose key they hold.
trait HasUsage {
    fn key_usage(&self) -> Usage;
}

impl HasUsage for CaCertificate {
    fn key_usage(&self) -> Usage {
        self.usage()
    }
}

impl HasUsage for SevCertificate {
    fn key_usage(&self) -> Usage {
        self.usage()
    }
}

struct Fault(String);

impl From<CaError> for Fault {
    fn from(error: CaError) -> Self {
        Self(error.to_string())
    }
}

impl From<CertificateError> for Fault {
    fn from(error: CertificateError) -> Self {
        Self(error.to_string())
    }
}

fn check_root(platform: &SevPlatform, root: Option<&Result<Root, ChainError>>) -> Check {
    let expected = "one of AMD's pinned roots, or a named emulated root";
    match root {
        Some(Ok(root)) => Check::accepted(PLATFORM_ROOT, expected, format!("{root:?}")),
        Some(Err(error)) => Check::rejected(
            PLATFORM_ROOT,
            expected,
            error.to_string(),
            "PLATFORM_ROOT_UNTRUSTED",
        ),
        None => match &platform.ark {
            Place::Malformed(why) => {
                Check::rejected(PLATFORM_ROOT, expected, why, "CERTIFICATE_MALFORMED")
            }
            _ => Check::cannot_verify(PLATFORM_ROOT, expected, "no ARK", "CERTIFICATE_MISSING"),
        },
    }
}

fn check_kind(root: Option<&Result<Root, ChainError>>, allowed: bool) -> Check {
    let expected = "AMD's secure processor, or a software one whose root is named";
    match root {
        Some(Ok(Root::Amd(_))) => Check::accepted(EMULATED, expected, "AMD's secure processor"),
        Some(Ok(Root::Emulated)) if allowed => Check::accepted(EMULATED, expected, SOFTWARE),
        Some(Ok(Root::Emulated)) => {
            Check::rejected(EMULATED, expected, SOFTWARE, "EMULATED_NOT_ALLOWED")
        }
        _ => Check::cannot_verify(EMULATED, expected, "no trusted root", "PLATFORM_UNKNOWN"),
    }
}

fn check_signature<S: HasUsage, I: HasUsage>(
    name: &str,
    subject: &Place<S>,
    issuer: &Place<I>,
    (subject_usage, issuer_usage): (Usage, Usage),
    verify: impl Fn(&S, &I) -> Result<(), Fault>,
) -> Check {
    let expected = format!("{subject_usage:?} signed by {issuer_usage:?}");
    let subject = match in_place(name, &expected, subject, subject_usage) {
        Ok(certificate) => certificate,
        Err(check) => return check,
    };
    let issuer = match in_place(name, &expected, issuer, issuer_usage) {
        Ok(certificate) => certificate,
        Err(check) => return check,
    };
    match verify(subject, issuer) {
        Ok(()) => Check::accepted(name, &expected, "the signature holds"),
        Err(Fault(why)) => Check::rejected(name, &expected, why, "CERTIFICATE_SIGNATURE_INVALID"),
    }
}

fn in_place<'a, T: HasUsage>(
    name: &str,
    expected: &str,
    place: &'a Place<T>,
    usage: Usage,
) -> Result<&'a T, Check> {
    match place {
        Place::There(found) if found.key_usage() == usage => Ok(found),
        Place::There(found) => Err(Check::rejected(
            name,
            expected,
            format!(
                "a {:?} certificate is in the {usage:?}'s place",
                found.key_usage()
            ),
            "CERTIFICATE_MISPLACED",
        )),
        Place::Malformed(why) => Err(Check::rejected(
            name,
            expected,
            format!("{usage:?}: {why}"),
            "CERTIFICATE_MALFORMED",
        )),
        Place::Missing => Err(Check::cannot_verify(
            name,
            expected,
            format!("there is no {usage:?} certificate"),
            "CERTIFICATE_MISSING",
        )),
    }
}

const SOFTWARE: &str = "a software secure processor: emulated, NOT AMD";
const PLATFORM_ROOT: &str = "platform_root";
const ARK_SELF: &str = "ark_signed_by_ark";
const ASK_BY_ARK: &str = "ask_signed_by_ark";
const CEK_BY_ASK: &str = "cek_signed_by_ask";
const OCA_SELF: &str = "oca_signed_by_oca";
const PEK_BY_OCA: &str = "pek_signed_by_oca";
const PEK_BY_CEK: &str = "pek_signed_by_cek";
const PDH_BY_PEK: &str = "pdh_signed_by_pek";
const REQUIRED: [&str; 9] = [
    PLATFORM_ROOT,
    EMULATED,
    ARK_SELF,
    ASK_BY_ARK,
    CEK_BY_ASK,
    OCA_SELF,
    PEK_BY_OCA,
    PEK_BY_CEK,
    PDH_BY_PEK,
];

#[cfg(test)]
mod tests;
