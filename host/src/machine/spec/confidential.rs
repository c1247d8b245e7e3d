//! The `[confidential]` section: which technology, under which guest policy, bound to what.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::Spanned;

use super::{Reader, SpecError};
use crate::machine::plan::Technology;

/// What the description wants to be confidential; which processor serves (real or emulated) is the host's and its
/// policy's affair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConfidentialSpec {
    /// A plain guest.
    None,
    /// AMD SEV.
    Sev(SevSpec),
    /// AMD SEV-ES.
    SevEs(SevSpec),
    /// AMD SEV-SNP.
    SevSnp(SnpSpec),
    /// The strongest that the host offers and its policy allows, with the default guest policy.
    Auto,
}

/// A guest under SEV or SEV-ES.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SevSpec {
    /// Guest policy, 32 bit (SEV API, chapter 3).
    pub policy: u32,
    /// Whether the launch waits for the owner's secret.
    pub secret: bool,
    /// Folder with `owner.cert` and `session.bin`, made by `casemate owner session`.
    pub owner_session: Option<PathBuf>,
}

/// A guest under SEV-SNP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnpSpec {
    /// Guest policy, 64 bit (publication 56860, section 4.3).
    pub policy: u64,
    /// Shown in every report of the guest.
    pub host_data: [u8; 32],
    /// What the owner signed that shall be launched.
    pub id: Option<IdFiles>,
    /// Whether reports may not be signed with the chip's own key.
    pub vcek_disabled: bool,
}

/// An ID block and its authentication page, as `casemate attest id-block make` writes them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdFiles {
    /// 96 bytes.
    pub block: PathBuf,
    /// 4096 bytes.
    pub auth: PathBuf,
}

/// What a host has for `technology = "auto"` and for all others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Whether the software secure processor serves.
    pub emulated: bool,
    /// The strongest technology that the host offers and its policy allows.
    pub strongest: Strongest,
}

/// Confidential technologies by strength.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Strongest {
    /// AMD SEV.
    Sev,
    /// AMD SEV-ES.
    SevEs,
    /// AMD SEV-SNP.
    SevSnp,
}

impl ConfidentialSpec {
    /// Files and folders that it names.
    pub fn files(&self) -> Vec<&Path> {
        match self {
            Self::None | Self::Auto => Vec::new(),
            Self::Sev(sev) | Self::SevEs(sev) => sev.owner_session.as_deref().into_iter().collect(),
            Self::SevSnp(snp) => {
                let id = snp.id.iter();
                id.flat_map(|id| [id.block.as_path(), &id.auth]).collect()
            }
        }
    }

    /// The technology of the guest on a host with this offer. `auto` is never a plain guest.
    pub fn technology(&self, offer: Offer) -> Technology {
        let emulated = offer.emulated;
        match self {
            Self::None => Technology::None,
            Self::Sev(SevSpec { policy, .. }) => Technology::Sev {
                emulated,
                policy: *policy,
            },
            Self::SevEs(SevSpec { policy, .. }) => Technology::SevEs {
                emulated,
                policy: *policy,
            },
            Self::SevSnp(SnpSpec { policy, .. }) => Technology::SevSnp {
                emulated,
                policy: *policy,
            },
            Self::Auto => match offer.strongest {
                Strongest::Sev => Technology::Sev {
                    emulated,
                    policy: DEFAULT_SEV_POLICY,
                },
                Strongest::SevEs => Technology::SevEs {
                    emulated,
                    policy: DEFAULT_SEV_POLICY | SEV_POLICY_ES,
                },
                Strongest::SevSnp => Technology::SevSnp {
                    emulated,
                    policy: DEFAULT_SNP_POLICY,
                },
            },
        }
    }

    /// Whether the launch waits for the owner's secret.
    pub fn secret(&self) -> bool {
        matches!(self, Self::Sev(sev) | Self::SevEs(sev) if sev.secret)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Confidential {
    technology: Spanned<String>,
    policy: Option<Spanned<u64>>,
    secret: Option<Spanned<bool>>,
    owner_session: Option<Spanned<PathBuf>>,
    host_data: Option<Spanned<String>>,
    id_block: Option<Spanned<PathBuf>>,
    id_auth: Option<Spanned<PathBuf>>,
    vcek_disabled: Option<Spanned<bool>>,
}

impl Reader<'_> {
    pub(super) fn confidential(&self, value: Confidential) -> Result<ConfidentialSpec, SpecError> {
        let technology = value.technology.get_ref().as_str();
        let sev_keys = matches!(technology, "sev" | "sev-es");
        let snp_keys = technology == "sev-snp";
        let keys = [
            ("policy", span(&value.policy), sev_keys || snp_keys),
            ("secret", span(&value.secret), sev_keys),
            ("owner_session", span(&value.owner_session), sev_keys),
            ("host_data", span(&value.host_data), snp_keys),
            ("id_block", span(&value.id_block), snp_keys),
            ("id_auth", span(&value.id_auth), snp_keys),
            ("vcek_disabled", span(&value.vcek_disabled), snp_keys),
        ];
        let stray = keys.into_iter().find_map(|(key, at, fits)| match at {
            Some(at) if !fits => Some((key, at)),
            _ => None,
        });
        match (technology, stray) {
            ("none" | "sev" | "sev-es" | "sev-snp" | "auto", Some((key, at))) => {
                let problem = format!(
                    "`confidential.{key}` means nothing under technology {technology:?}; remove it"
                );
                Err(self.at(at, problem))
            }
            ("none", None) => Ok(ConfidentialSpec::None),
            ("auto", None) => Ok(ConfidentialSpec::Auto),
            ("sev", None) => self.sev(value, 0).map(ConfidentialSpec::Sev),
            ("sev-es", None) => self.sev(value, SEV_POLICY_ES).map(ConfidentialSpec::SevEs),
            ("sev-snp", None) => self.snp(value).map(ConfidentialSpec::SevSnp),
            (other, _) => {
                let problem = format!(
                    "`confidential.technology` is {other:?}; want \"none\", \"sev\", \"sev-es\", \"sev-snp\" or \"auto\""
                );
                Err(self.at(value.technology.span(), problem))
            }
        }
    }

    /// `es` is the policy's bit 2 as the technology wants it.
    fn sev(&self, value: Confidential, es: u32) -> Result<SevSpec, SpecError> {
        let policy = match value.policy {
            None => DEFAULT_SEV_POLICY | es,
            Some(given) => self.sev_policy(&given, es)?,
        };
        let owner_session = value
            .owner_session
            .map(|folder| self.folder("confidential.owner_session", folder))
            .transpose()?;
        Ok(SevSpec {
            policy,
            secret: value.secret.is_some_and(Spanned::into_inner),
            owner_session,
        })
    }

    fn sev_policy(&self, given: &Spanned<u64>, es: u32) -> Result<u32, SpecError> {
        let raw = *given.get_ref();
        let problem = match u32::try_from(raw) {
            Err(_) => "has more than 32 bits; those of SEV have not",
            Ok(policy) if policy & SEV_POLICY_NODBG == 0 => {
                "lets the host debug the guest; set bit 0 (NODBG)"
            }
            Ok(policy) if policy & SEV_POLICY_ES != es => {
                "does not agree with the technology in bit 2 (ES): set it for \"sev-es\", clear it for \"sev\""
            }
            Ok(policy) => return Ok(policy),
        };
        Err(self.at(
            given.span(),
            format!("`confidential.policy` is {raw:#x}, which {problem}"),
        ))
    }

    fn snp(&self, value: Confidential) -> Result<SnpSpec, SpecError> {
        let policy = match value.policy {
            None => DEFAULT_SNP_POLICY,
            Some(given) => self.snp_policy(&given)?,
        };
        let host_data = match value.host_data {
            None => [0; 32],
            Some(given) => self.host_data(&given)?,
        };
        let id = match (value.id_block, value.id_auth) {
            (None, None) => None,
            (Some(block), Some(auth)) => Some(IdFiles {
                block: self.file("confidential.id_block", block)?,
                auth: self.file("confidential.id_auth", auth)?,
            }),
            (block, auth) => {
                let at = span(&block).or(span(&auth)).unwrap_or_default();
                let problem = "`confidential.id_block` and `confidential.id_auth` go together; `casemate attest id-block make` writes both";
                return Err(self.at(at, problem.to_owned()));
            }
        };
        Ok(SnpSpec {
            policy,
            host_data,
            id,
            vcek_disabled: value.vcek_disabled.is_some_and(Spanned::into_inner),
        })
    }

    fn snp_policy(&self, given: &Spanned<u64>) -> Result<u64, SpecError> {
        let policy = *given.get_ref();
        let problem = if policy & SNP_POLICY_DEBUG != 0 {
            "lets the host debug the guest; clear bit 19 (DEBUG)"
        } else if policy & SNP_POLICY_ONE == 0 {
            "lacks bit 17, which must be set"
        } else {
            return Ok(policy);
        };
        Err(self.at(
            given.span(),
            format!("`confidential.policy` is {policy:#x}, which {problem}"),
        ))
    }

    fn host_data(&self, given: &Spanned<String>) -> Result<[u8; 32], SpecError> {
        hex::decode(given.get_ref())
            .ok()
            .and_then(|bytes| bytes.try_into().ok())
            .ok_or_else(|| {
                let problem = "`confidential.host_data` wants 64 hex digits (32 bytes)";
                self.at(given.span(), problem.to_owned())
            })
    }
}

fn span<T>(value: &Option<Spanned<T>>) -> Option<std::ops::Range<usize>> {
    value.as_ref().map(Spanned::span)
}

/// Guest policy bit 0: the host may not debug (SEV API, chapter 3).
const SEV_POLICY_NODBG: u32 = 1;
/// Guest policy bit 2: SEV-ES.
const SEV_POLICY_ES: u32 = 1 << 2;
/// NODBG, NOKS (no key sharing), SEV (only to SEV platforms).
const DEFAULT_SEV_POLICY: u32 = 0x23;
/// Guest policy bit 17, reserved, one (publication 56860, section 4.3).
const SNP_POLICY_ONE: u64 = 1 << 17;
/// Guest policy bit 19: the host may debug.
const SNP_POLICY_DEBUG: u64 = 1 << 19;
/// Bit 17, and SMT allowed: KVM asks for both.
const DEFAULT_SNP_POLICY: u64 = SNP_POLICY_ONE | 1 << 16;
