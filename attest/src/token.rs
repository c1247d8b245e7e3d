//! Attestation results that others read: an EAR, the EAT Attestation Result of the IETF's RATS
//! group, as a signed JWT (JWS compact form, EdDSA or ES384).
//!
//! Claim names are those of profile `tag:github.com,2023:veraison/ear`, which is what is deployed
//! and what draft-ietf-rats-ear defined up to -02; from -03 on the draft writes `ear_status` for
//! `ear.status` and so on. Trust tiers and the vector are AR4SI's (draft-ietf-rats-ar4si). There is
//! one submodule, `cpu0`, and in it one extension, `casemate.verdict`: the verdict in short.
//!
//! An accepted verdict over an emulated platform is never `affirming`: its `hardware` claim is a
//! warning, and `casemate.verdict` says `emulated: true`. Nor is one whose launch digest nobody
//! asked about: without a claim on `executables` the status is `none`.

mod jws;

pub use jws::{EarKey, EarVerifier};

use crate::verify::{CheckResult, Nonce, Outcome, OwnerPolicy, Verdict};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The longest token that is read, in bytes.
pub const MAX_TOKEN_LEN: usize = 64 << 10;

/// The claims of an EAR.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ear {
    /// [`PROFILE`].
    pub eat_profile: String,
    /// When it was issued, in seconds since 1970.
    pub iat: u64,
    /// From when on it must not be accepted.
    pub exp: u64,
    /// Who appraised.
    #[serde(rename = "ear.verifier-id")]
    pub verifier_id: VerifierId,
    /// The tier of the whole.
    #[serde(rename = "ear.status")]
    pub status: Tier,
    /// The relying party's nonce, base64url.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eat_nonce: Option<String>,
    /// What was appraised; here only `cpu0`.
    pub submods: BTreeMap<String, Appraisal>,
}

/// Who appraised.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifierId {
    /// Who made the verifier.
    pub developer: String,
    /// Which build.
    pub build: String,
}

/// One appraisal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Appraisal {
    /// Its tier: never better than the worst of the vector.
    #[serde(rename = "ear.status")]
    pub status: Tier,
    /// What it rests on.
    #[serde(rename = "ear.trustworthiness-vector")]
    pub vector: TrustVector,
    /// The policy: `sha384:` and its file's digest, and each emulated root that was added to it.
    #[serde(rename = "ear.appraisal-policy-id")]
    pub policy_id: String,
    /// The verdict in short.
    #[serde(rename = "casemate.verdict")]
    pub verdict: VerdictSummary,
}

/// AR4SI's trust tiers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// Nothing is asserted.
    None,
    /// Trustworthy.
    Affirming,
    /// Something is amiss.
    Warning,
    /// Not to be trusted.
    Contraindicated,
}

/// AR4SI's trustworthiness vector, as far as SNP evidence says something; 0 is no claim, 2 to 31
/// affirms, 32 to 95 warns, 96 and above contraindicates.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct TrustVector {
    /// Which chip, with whose key.
    #[serde(default)]
    pub instance_identity: i8,
    /// Guest policy, platform, privilege level.
    #[serde(default)]
    pub configuration: i8,
    /// The launch digest.
    #[serde(default)]
    pub executables: i8,
    /// Genuineness and patch levels.
    #[serde(default)]
    pub hardware: i8,
    /// Whether guest memory is hidden from the host.
    #[serde(default)]
    pub runtime_opaque: i8,
}

/// A verdict in short.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerdictSummary {
    /// The outcome.
    pub overall: Outcome,
    /// Whether the platform is a software secure processor.
    pub emulated: bool,
    /// SHA-384 of the policy file, hex.
    pub policy_sha384: String,
    /// The checks that passed.
    pub accepted: Vec<String>,
    /// The codes of those that did not, by check.
    pub failed: BTreeMap<String, String>,
    /// The checks that nobody asked for.
    pub not_checked: Vec<String>,
}

/// Why there is no token, or why one is not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// A nonce shorter than EAT's 8 bytes.
    #[error("an EAT nonce has 8 to 64 bytes, this one has {0}; ask with a longer one")]
    NonceTooShort(usize),
    /// Not a signing key of a kind that is used here.
    #[error("this is no PKCS#8 key, DER or PEM, for Ed25519 or P-384: {0}")]
    Key(&'static str),
    /// ring refused to sign.
    #[error("the token could not be signed")]
    Signing,
    /// Not a compact JWS of bounded length, or not the claims of an EAR.
    #[error("this is no EAR token: {0}")]
    Malformed(&'static str),
    /// An algorithm that the key does not stand for.
    #[error("the token names another signature algorithm than {0}, the key's")]
    Algorithm(&'static str),
    /// The signature does not fit.
    #[error("the token's signature is not valid under this key")]
    Signature,
    /// Another profile.
    #[error("the token's profile is not {PROFILE}")]
    Profile,
    /// Issued after the clock.
    #[error("the token is issued in the future; check the clocks")]
    NotYetValid,
    /// Not valid any more.
    #[error("the token has expired; attest again")]
    Expired,
}

impl Ear {
    /// The result of `verdict`, valid from `now` on for `lifetime`.
    pub fn of(
        verdict: &Verdict,
        policy: &OwnerPolicy,
        nonce: Option<&Nonce>,
        now: SystemTime,
        lifetime: Duration,
    ) -> Result<Self, TokenError> {
        let eat_nonce = nonce.map(eat_nonce).transpose()?;
        let appraisal = Appraisal::of(verdict, policy);
        let iat = seconds(now);
        Ok(Self {
            eat_profile: PROFILE.to_owned(),
            iat,
            exp: iat.saturating_add(lifetime.as_secs()),
            verifier_id: VerifierId {
                developer: "casemate".to_owned(),
                build: concat!("casemate-attest ", env!("CARGO_PKG_VERSION")).to_owned(),
            },
            status: appraisal.status,
            eat_nonce,
            submods: BTreeMap::from([(SUBMODULE.to_owned(), appraisal)]),
        })
    }

    /// The token.
    pub fn sign(&self, key: &EarKey) -> Result<String, TokenError> {
        let claims = serde_json::to_vec(self).map_err(|_| TokenError::Signing)?;
        key.sign(&claims)
    }

    /// Reads a token and believes it if `key` signed it and `now` is within its dates, give or
    /// take a minute for `iat`.
    pub fn verify(token: &str, key: &EarVerifier, now: SystemTime) -> Result<Self, TokenError> {
        let claims = key.verify(token)?;
        let ear: Self = serde_json::from_slice(&claims)
            .map_err(|_| TokenError::Malformed("its claims are not those of an EAR"))?;
        if ear.eat_profile != PROFILE {
            return Err(TokenError::Profile);
        }
        let now = seconds(now);
        if ear.iat > now.saturating_add(CLOCK_SKEW) {
            return Err(TokenError::NotYetValid);
        }
        if ear.exp <= now {
            return Err(TokenError::Expired);
        }
        Ok(ear)
    }

    /// The one appraisal of a token made here.
    pub fn appraisal(&self) -> Option<&Appraisal> {
        self.submods.get(SUBMODULE)
    }
}

impl Appraisal {
    fn of(verdict: &Verdict, policy: &OwnerPolicy) -> Self {
        let vector = TrustVector::of(verdict);
        Self {
            status: vector.tier().at_most(verdict.overall),
            vector,
            policy_id: policy.ids().join(" "),
            verdict: VerdictSummary::of(verdict, policy),
        }
    }
}

impl TrustVector {
    fn of(verdict: &Verdict) -> Self {
        let failed = |names: &[&str]| {
            let mut failures = verdict.failures();
            failures.any(|check| names.contains(&check.name.as_str()))
        };
        let passed = |name: &str| {
            let holds = |check: &crate::verify::Check| {
                check.name == name && check.result == CheckResult::Accepted
            };
            verdict.checks.iter().any(holds)
        };
        if failed(&CRYPTOGRAPHIC) || !passed("report_signature") || !passed("certificate_chain") {
            return Self {
                instance_identity: CRYPTO_FAILED,
                configuration: CRYPTO_FAILED,
                executables: CRYPTO_FAILED,
                hardware: CRYPTO_FAILED,
                runtime_opaque: CRYPTO_FAILED,
            };
        }
        let debug = failed(&["debug_forbidden"]);
        Self {
            instance_identity: if failed(&INSTANCE) {
                UNRECOGNIZED_INSTANCE
            } else {
                AFFIRMED
            },
            configuration: if debug {
                UNSUPPORTABLE_CONFIG
            } else if failed(&CONFIGURATION) {
                UNSAFE
            } else {
                AFFIRMED
            },
            executables: if failed(&["measurement"]) {
                UNRECOGNIZED_EXECUTABLES
            } else if passed("measurement") {
                APPROVED_BOOT
            } else {
                NO_CLAIM
            },
            hardware: if failed(&["product", "product_allowed"]) {
                UNRECOGNIZED_HARDWARE
            } else if verdict.emulated || failed(&HARDWARE) {
                UNSAFE
            } else {
                AFFIRMED
            },
            runtime_opaque: if debug {
                VISIBLE_RUNTIME
            } else if verdict.emulated {
                NO_CLAIM
            } else {
                AFFIRMED
            },
        }
    }

    /// The tier of the worst claim; never affirming without a claim on what runs.
    pub fn tier(&self) -> Tier {
        let claims = [
            self.instance_identity,
            self.configuration,
            self.executables,
            self.hardware,
            self.runtime_opaque,
        ];
        match claims.into_iter().max().unwrap_or(NO_CLAIM) {
            96.. => Tier::Contraindicated,
            32..=95 => Tier::Warning,
            2..=31 if self.executables != NO_CLAIM => Tier::Affirming,
            _ => Tier::None,
        }
    }
}

impl Tier {
    /// The tier that an outcome leaves of this one.
    fn at_most(self, overall: Outcome) -> Self {
        match (overall, self) {
            (Outcome::Rejected, _) => Self::Contraindicated,
            (Outcome::CannotVerify, Self::Affirming) => Self::None,
            (_, tier) => tier,
        }
    }
}

impl VerdictSummary {
    fn of(verdict: &Verdict, policy: &OwnerPolicy) -> Self {
        let names = |result: CheckResult| {
            let found = verdict.checks.iter().filter(|check| check.result == result);
            found.map(|check| check.name.clone()).collect()
        };
        let failed = verdict
            .failures()
            .map(|check| (check.name.clone(), check.code.clone().unwrap_or_default()));
        Self {
            overall: verdict.overall,
            emulated: verdict.emulated,
            policy_sha384: hex::encode(policy.digest()),
            accepted: names(CheckResult::Accepted),
            failed: failed.collect(),
            not_checked: names(CheckResult::NotChecked),
        }
    }
}

fn eat_nonce(nonce: &Nonce) -> Result<String, TokenError> {
    let bytes = nonce.as_bytes();
    if bytes.len() < MIN_EAT_NONCE {
        return Err(TokenError::NonceTooShort(bytes.len()));
    }
    Ok(URL_SAFE_NO_PAD.encode(bytes))
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// The EAT profile of these tokens.
pub const PROFILE: &str = "tag:github.com,2023:veraison/ear";
/// The name of the one submodule, as other verifiers of confidential guests call it.
pub const SUBMODULE: &str = "cpu0";

const MIN_EAT_NONCE: usize = 8;
/// Seconds by which two clocks may differ.
const CLOCK_SKEW: u64 = 60;

const NO_CLAIM: i8 = 0;
const AFFIRMED: i8 = 2;
const APPROVED_BOOT: i8 = 3;
const UNSAFE: i8 = 32;
const UNRECOGNIZED_EXECUTABLES: i8 = 33;
const UNSUPPORTABLE_CONFIG: i8 = 96;
const VISIBLE_RUNTIME: i8 = 96;
const UNRECOGNIZED_INSTANCE: i8 = 97;
const UNRECOGNIZED_HARDWARE: i8 = 97;
/// Every claim, where the evidence's cryptography failed.
const CRYPTO_FAILED: i8 = 99;

/// Without these, nothing that the report says is known.
const CRYPTOGRAPHIC: [&str; 9] = [
    "report_format",
    "leaf_format",
    "certificate_chain",
    "report_signature",
    "signing_key",
    "leaf_tcb",
    "leaf_chip",
    "chip_key_mask",
    "revocation",
];
const INSTANCE: [&str; 5] = [
    "certificate_dates",
    "chip_id",
    "csp_id",
    "signing_key_allowed",
    "report_data",
];
const CONFIGURATION: [&str; 13] = [
    "guest_policy_reserved",
    "guest_policy_bits",
    "guest_policy_abi",
    "platform_bits",
    "vmpl_range",
    "vmpl",
    "migration_agent",
    "host_data",
    "family_id",
    "image_id",
    "guest_svn",
    "id_key",
    "author_key",
];
const HARDWARE: [&str; 11] = [
    "tcb_order",
    "tcb_reported",
    "tcb_committed",
    "tcb_current",
    "tcb_launch",
    "firmware_current",
    "firmware_committed",
    "provisional_firmware",
    "mitigations_launch",
    "mitigations_current",
    "report_version",
];

#[cfg(test)]
mod tests;
