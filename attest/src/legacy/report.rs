//! The attestation report of SEV and SEV-ES: 208 bytes, signed by the platform's PEK. Publication
//! 55766, ATTESTATION.
//!
//! | Offset | Size | Field |
//! | --- | --- | --- |
//! | 0x00 | 16 | nonce, chosen by whoever asked the host |
//! | 0x10 | 32 | launch digest |
//! | 0x30 | 4 | guest policy |
//! | 0x34 | 4 | usage of the signing key: PEK |
//! | 0x38 | 4 | signature algorithm |
//! | 0x3c | 4 | reserved |
//! | 0x40 | 144 | R, S: 72 bytes each, little-endian |
//!
//! The signature covers the first 52 bytes. A parsed report is a claim and nothing more; and a
//! verified one shows what was loaded, not that the guest is the one at the other end of any
//! connection: it is the host that asks for it, and it holds no data of the guest's own.

use super::certificate::{self, Algorithm, COORDINATE_LEN, SevCertificate, Usage};
use super::policy::{GuestPolicy, PolicyError};
use crate::bytes;
use crate::measure::LaunchDigest;
use p384::SecretKey;

/// The length of a report.
pub const SEV_REPORT_LEN: usize = 208;

/// A report whose signature has not been checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SevReport {
    raw: [u8; SEV_REPORT_LEN],
    policy: GuestPolicy,
    algorithm: Algorithm,
}

/// Why bytes are no report, or one does not bear the signature it should.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SevReportError {
    /// Too short or too long.
    #[error(
        "an SEV report has {SEV_REPORT_LEN} bytes, this one has {0} (an SNP report, of 1184, is \
         another thing)"
    )]
    Length(usize),
    /// The policy has reserved bits.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// Not the PEK's.
    #[error("the report is said to be signed by key usage {0:#x}, not by the PEK (0x1002)")]
    Usage(u32),
    /// Not ECDSA.
    #[error("the report's signature algorithm {0:#x} is not ECDSA")]
    Algorithm(u32),
    /// The reserved field is set.
    #[error("the report's reserved field is {0:#x} instead of zero")]
    Reserved(u32),
    /// The key that is to check it is no PEK, or signs with another algorithm.
    #[error("a {0:?} certificate of this algorithm does not sign reports of this one")]
    WrongKey(Usage),
    /// The signature is wrong.
    #[error("the PEK's signature on the report is not valid")]
    BadSignature,
}

impl SevReport {
    /// Reads exactly one report.
    pub fn parse(raw: &[u8]) -> Result<Self, SevReportError> {
        let length = SevReportError::Length(raw.len());
        let raw: [u8; SEV_REPORT_LEN] = raw.try_into().map_err(|_| length.clone())?;
        let field = |at| bytes::le32(&raw, at).ok_or(length.clone());
        let policy = GuestPolicy::from_raw(field(POLICY_AT)?)?;
        let usage = field(USAGE_AT)?;
        if usage != Usage::Pek.raw() {
            return Err(SevReportError::Usage(usage));
        }
        let algorithm = field(ALGORITHM_AT)?;
        let algorithm = match Algorithm::from_raw(algorithm) {
            Some(known @ (Algorithm::EcdsaSha256 | Algorithm::EcdsaSha384)) => known,
            _ => return Err(SevReportError::Algorithm(algorithm)),
        };
        match field(RESERVED_AT)? {
            0 => {}
            other => return Err(SevReportError::Reserved(other)),
        }
        Ok(Self {
            raw,
            policy,
            algorithm,
        })
    }

    /// The bytes as received.
    pub const fn as_bytes(&self) -> &[u8; SEV_REPORT_LEN] {
        &self.raw
    }

    /// The nonce.
    pub fn mnonce(&self) -> [u8; 16] {
        bytes::array(&self.raw, 0).unwrap_or_default()
    }

    /// The launch digest.
    pub fn digest(&self) -> LaunchDigest {
        LaunchDigest::new(bytes::array(&self.raw, DIGEST_AT).unwrap_or_default())
    }

    /// The guest policy.
    pub const fn policy(&self) -> GuestPolicy {
        self.policy
    }

    /// Checks that `pek` signed this report. Whose key that is, is for
    /// [`LegacyChain::verify`](super::LegacyChain::verify) to say.
    pub fn verify_signed_by(&self, pek: &SevCertificate) -> Result<(), SevReportError> {
        if pek.usage() != Usage::Pek || pek.algorithm() != self.algorithm {
            return Err(SevReportError::WrongKey(pek.usage()));
        }
        let (signed, signature) = (self.raw.get(..SIGNED_LEN), self.raw.get(SIGNATURE_AT..));
        match signed.zip(signature) {
            Some((signed, signature)) if pek.verifies(signed, signature) => Ok(()),
            _ => Err(SevReportError::BadSignature),
        }
    }

    /// What firmware does for ATTESTATION. `None` where the key cannot sign.
    pub(crate) fn sign(
        pek: &SecretKey,
        mnonce: &[u8; 16],
        digest: &LaunchDigest,
        policy: GuestPolicy,
    ) -> Option<Self> {
        let algorithm = Algorithm::EcdsaSha256;
        let mut raw = Vec::with_capacity(SEV_REPORT_LEN);
        raw.extend(mnonce);
        raw.extend(digest.as_bytes());
        raw.extend(policy.to_le_bytes());
        let signature = certificate::ecdsa_sign(pek, &raw)?;
        raw.extend(Usage::Pek.raw().to_le_bytes());
        raw.extend(algorithm.raw().to_le_bytes());
        raw.extend([0; 4]);
        raw.extend(signature);
        Some(Self {
            raw: raw.try_into().ok()?,
            policy,
            algorithm,
        })
    }
}

impl SevReportError {
    /// The stable code.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Length(_) => "SEV_REPORT_LENGTH",
            Self::Policy(_) => "SEV_REPORT_POLICY_RESERVED",
            Self::Usage(_) => "SEV_REPORT_NOT_BY_PEK",
            Self::Algorithm(_) => "SEV_REPORT_ALGORITHM_UNKNOWN",
            Self::Reserved(_) => "SEV_REPORT_RESERVED",
            Self::WrongKey(_) | Self::BadSignature => "SEV_REPORT_SIGNATURE_INVALID",
        }
    }
}

const DIGEST_AT: usize = 0x10;
const POLICY_AT: usize = 0x30;
const SIGNED_LEN: usize = 0x34;
const USAGE_AT: usize = 0x34;
const ALGORITHM_AT: usize = 0x38;
const RESERVED_AT: usize = 0x3c;
const SIGNATURE_AT: usize = 0x40;
const _: () = assert!(SIGNATURE_AT + 2 * COORDINATE_LEN == SEV_REPORT_LEN);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::legacy::{ApiVersion, PolicyFlag};
    use crate::processor::testing;
    use proptest::prelude::*;

    fn report() -> SevReport {
        SevReport::sign(
            testing::identity().pek_key(),
            &[7; 16],
            &LaunchDigest::of(b"kernel"),
            GuestPolicy::new(&[PolicyFlag::NoDebug], ApiVersion::new(1, 55)),
        )
        .unwrap()
    }

    #[test]
    fn a_report_reads_as_what_was_signed() {
        let report = report();
        let read = SevReport::parse(report.as_bytes()).unwrap();
        assert_eq!(read, report);
        assert_eq!(read.mnonce(), [7; 16]);
        assert_eq!(read.digest(), LaunchDigest::of(b"kernel"));
        assert!(read.policy().has(PolicyFlag::NoDebug));
        read.verify_signed_by(&testing::identity().chain().pek)
            .unwrap();
    }

    /// Offsets as the `sev` crate declares them.
    #[test]
    fn the_layout_is_the_specifications() {
        let report = report();
        let raw = report.as_bytes();
        assert_eq!(raw[..16], [7; 16]);
        assert_eq!(&raw[16..48], LaunchDigest::of(b"kernel").as_bytes());
        assert_eq!(raw[48..52], [1, 0, 1, 55]);
        assert_eq!(raw[52..64], [0x02, 0x10, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        // The numbers have 48 of 72 bytes each.
        assert!(raw[64 + 48..136].iter().all(|byte| *byte == 0));
        assert!(raw[136 + 48..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn every_bit_of_the_report_counts() {
        let pek = &testing::identity().chain().pek;
        let good = *report().as_bytes();
        for at in 0..SEV_REPORT_LEN {
            for bit in [0x01, 0x80] {
                let mut raw = good;
                raw[at] ^= bit;
                let verified = SevReport::parse(&raw).and_then(|r| r.verify_signed_by(pek));
                assert!(verified.is_err(), "byte {at}, bit {bit:#x}");
            }
        }
    }

    #[test]
    fn another_platforms_pek_and_other_keys_do_not_verify_it() {
        let chain = testing::identity().chain();
        let other = &testing::other_identity().chain().pek;
        assert_eq!(
            report().verify_signed_by(other),
            Err(SevReportError::BadSignature)
        );
        for key in [&chain.cek, &chain.oca, &chain.pdh] {
            assert_eq!(
                report().verify_signed_by(key),
                Err(SevReportError::WrongKey(key.usage()))
            );
        }
    }

    #[test]
    fn a_zero_signature_is_none() {
        let pek = &testing::identity().chain().pek;
        for half in [64..136, 136..208, 64..208] {
            let mut raw = *report().as_bytes();
            raw[half].fill(0);
            let read = SevReport::parse(&raw).unwrap();
            assert_eq!(
                read.verify_signed_by(pek),
                Err(SevReportError::BadSignature)
            );
        }
    }

    #[test]
    fn malformed_reports_are_named() {
        let with = |at: usize, value: u32| {
            let mut raw = *report().as_bytes();
            raw[at..at + 4].copy_from_slice(&value.to_le_bytes());
            SevReport::parse(&raw).map(drop)
        };
        assert_eq!(with(0x34, 0x1004), Err(SevReportError::Usage(0x1004)));
        assert_eq!(with(0x38, 1), Err(SevReportError::Algorithm(1)));
        assert_eq!(with(0x38, 9), Err(SevReportError::Algorithm(9)));
        assert_eq!(with(0x3c, 1), Err(SevReportError::Reserved(1)));
        assert!(matches!(with(0x30, 0x40), Err(SevReportError::Policy(_))));
        for len in [0, 207, 209, 1184] {
            assert_eq!(
                SevReport::parse(&vec![0; len]),
                Err(SevReportError::Length(len))
            );
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken_or_refused(raw in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = SevReport::parse(&raw);
        }
    }
}
