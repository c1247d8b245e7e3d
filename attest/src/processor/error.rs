//! The firmware's status codes, with what they mean and what helps.

use crate::legacy::ca::CaError;
use crate::legacy::certificate::CertificateError;
use crate::legacy::chain::ChainError;
use crate::legacy::packet::PacketError;
use crate::legacy::secret::{SECRET_MAX, SecretError};
use crate::legacy::session::SessionError;
use serde::{Deserialize, Serialize};

/// Why the firmware refused a command. Numbers as in AMD publication 55766, chapter 6,
/// and 56860, "Status Codes".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum FirmwareError {
    /// INVALID_PLATFORM_STATE
    #[error(
        "the platform is not in the state for this command; initialise it, or where it holds \
         confidential guests end them first"
    )]
    InvalidPlatformState,
    /// INVALID_GUEST_STATE
    #[error("the guest is not in the state for this command; ask GUEST_STATUS for its state")]
    InvalidGuestState,
    /// INVALID_LEN
    #[error("a length does not fit; {needed} bytes are needed")]
    InvalidLength {
        /// What would fit.
        needed: u32,
    },
    /// ALREADY_OWNED
    #[error("the platform has an owner already; a new PEK or a factory reset ends that")]
    AlreadyOwned,
    /// INVALID_CERTIFICATE
    #[error(
        "a certificate is malformed, misplaced, or ends at an untrusted root; check the target's \
         chain, and for an emulated target name its root as a trusted peer"
    )]
    InvalidCertificate,
    /// POLICY_FAILURE
    #[error(
        "the guest's policy forbids this, or asks for what this platform has not (NOSEND, DOMAIN, \
         SMT, a newer firmware API, another policy in its ID block); only the owner can change \
         the policy, with a new launch"
    )]
    PolicyFailure,
    /// INACTIVE
    #[error("the guest has no ASID; ACTIVATE it first")]
    Inactive,
    /// INVALID_ADDRESS
    #[error("an address is not one of a page of the guest; give a multiple of 4096 below 2^52")]
    InvalidAddress,
    /// BAD_SIGNATURE
    #[error(
        "a signature does not verify: of a certificate, fetch the chain again; of an ID block, \
         sign it again"
    )]
    BadSignature,
    /// BAD_MEASUREMENT
    #[error(
        "a MAC or a digest does not fit: the session, secret, page or message was changed, or \
         made for another guest, policy or platform"
    )]
    BadMeasurement,
    /// ASID_OWNED
    #[error("another guest holds this ASID; choose a free one")]
    AsidOwned,
    /// INVALID_ASID
    #[error("there is no such ASID; use 1 to the platform's highest")]
    InvalidAsid,
    /// INVALID_GUEST
    #[error("no guest has this handle; it was never started, or is decommissioned")]
    InvalidGuest,
    /// ACTIVE
    #[error("the guest is active already; DEACTIVATE it first")]
    Active,
    /// HWSEV_RET_PLATFORM
    #[error("the platform failed, for lack of randomness; the command may be tried again")]
    HardwarePlatform,
    /// UNSUPPORTED
    #[error(
        "not supported here: the emulated platform runs plain SEV guests (no SEV-ES) and takes \
         uncompressed packets"
    )]
    Unsupported,
    /// INVALID_PARAM
    #[error("a parameter is not valid; see the command's documentation")]
    InvalidParam,
    /// RESOURCE_LIMIT
    #[error("the platform holds as many guests as it may; decommission one, or raise the limit")]
    ResourceLimit,
    /// AEAD_OFLOW
    #[error("the guest's message counter is used up; no more messages under this key")]
    AeadOverflow,
    /// BAD_SVN
    #[error("a patch level is below the committed one; firmware cannot go back behind it")]
    BadSvn,
    /// BAD_VERSION
    #[error("the firmware version is below the committed one; firmware cannot go back behind it")]
    BadVersion,
    /// INVALID_KEY
    #[error("the key that is asked for is not to be had: disabled, masked, or not loaded")]
    InvalidKey,
}

impl FirmwareError {
    /// The firmware's number for it.
    pub const fn code(self) -> u32 {
        match self {
            Self::InvalidPlatformState => 0x01,
            Self::InvalidGuestState => 0x02,
            Self::InvalidLength { .. } => 0x04,
            Self::AlreadyOwned => 0x05,
            Self::InvalidCertificate => 0x06,
            Self::PolicyFailure => 0x07,
            Self::Inactive => 0x08,
            Self::InvalidAddress => 0x09,
            Self::BadSignature => 0x0a,
            Self::BadMeasurement => 0x0b,
            Self::AsidOwned => 0x0c,
            Self::InvalidAsid => 0x0d,
            Self::InvalidGuest => 0x10,
            Self::Active => 0x12,
            Self::HardwarePlatform => 0x13,
            Self::Unsupported => 0x15,
            Self::InvalidParam => 0x16,
            Self::ResourceLimit => 0x17,
            Self::AeadOverflow => 0x1d,
            Self::BadSvn => 0x21,
            Self::BadVersion => 0x22,
            Self::InvalidKey => 0x27,
        }
    }

    /// The firmware's name for it, as stable as the number.
    pub const fn name(self) -> &'static str {
        match self {
            Self::InvalidPlatformState => "INVALID_PLATFORM_STATE",
            Self::InvalidGuestState => "INVALID_GUEST_STATE",
            Self::InvalidLength { .. } => "INVALID_LEN",
            Self::AlreadyOwned => "ALREADY_OWNED",
            Self::InvalidCertificate => "INVALID_CERTIFICATE",
            Self::PolicyFailure => "POLICY_FAILURE",
            Self::Inactive => "INACTIVE",
            Self::InvalidAddress => "INVALID_ADDRESS",
            Self::BadSignature => "BAD_SIGNATURE",
            Self::BadMeasurement => "BAD_MEASUREMENT",
            Self::AsidOwned => "ASID_OWNED",
            Self::InvalidAsid => "INVALID_ASID",
            Self::InvalidGuest => "INVALID_GUEST",
            Self::Active => "ACTIVE",
            Self::HardwarePlatform => "HWSEV_RET_PLATFORM",
            Self::Unsupported => "UNSUPPORTED",
            Self::InvalidParam => "INVALID_PARAM",
            Self::ResourceLimit => "RESOURCE_LIMIT",
            Self::AeadOverflow => "AEAD_OFLOW",
            Self::BadSvn => "BAD_SVN",
            Self::BadVersion => "BAD_VERSION",
            Self::InvalidKey => "INVALID_KEY",
        }
    }
}

impl From<PacketError> for FirmwareError {
    fn from(error: PacketError) -> Self {
        match error {
            PacketError::HeaderLength(_) => Self::InvalidLength {
                needed: crate::legacy::packet::PACKET_HEADER_LEN as u32,
            },
            PacketError::Flags(_) => Self::Unsupported,
            PacketError::Length { packet, .. } => Self::InvalidLength {
                needed: u32::try_from(packet).unwrap_or(u32::MAX),
            },
            PacketError::BadMac => Self::BadMeasurement,
            PacketError::Random => Self::HardwarePlatform,
        }
    }
}

impl From<SecretError> for FirmwareError {
    fn from(error: SecretError) -> Self {
        match error {
            SecretError::Length(found) => Self::InvalidLength {
                // The next whole block, if there is one that is taken.
                needed: found.next_multiple_of(16).clamp(16, SECRET_MAX) as u32,
            },
            SecretError::Packet(error) => error.into(),
        }
    }
}

impl From<SessionError> for FirmwareError {
    fn from(error: SessionError) -> Self {
        match error {
            SessionError::Length(_) => Self::InvalidLength {
                needed: crate::legacy::session::SESSION_LEN as u32,
            },
            SessionError::BadWrapMac | SessionError::BadPolicyMac => Self::BadMeasurement,
            SessionError::NotKept(_) => Self::InvalidParam,
            SessionError::Random => Self::HardwarePlatform,
        }
    }
}

impl From<CertificateError> for FirmwareError {
    fn from(error: CertificateError) -> Self {
        match error {
            CertificateError::Length(_) => Self::InvalidLength {
                needed: crate::legacy::certificate::CERTIFICATE_LEN as u32,
            },
            CertificateError::BadSignature { .. } | CertificateError::Unsigned { .. } => {
                Self::BadSignature
            }
            _ => Self::InvalidCertificate,
        }
    }
}

impl From<ChainError> for FirmwareError {
    fn from(error: ChainError) -> Self {
        match error {
            ChainError::Certificate(
                CertificateError::BadSignature { .. } | CertificateError::Unsigned { .. },
            )
            | ChainError::Ca(CaError::BadSignature { .. }) => Self::BadSignature,
            _ => Self::InvalidCertificate,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_cross_processes_and_speak_plainly() {
        let error = FirmwareError::InvalidLength { needed: 4096 };
        let json = serde_json::to_string(&error).unwrap();
        assert_eq!(serde_json::from_str::<FirmwareError>(&json).unwrap(), error);
        assert_eq!(
            error.to_string(),
            "a length does not fit; 4096 bytes are needed"
        );
        assert_eq!(FirmwareError::BadMeasurement.code(), 0x0b);
        assert_eq!(
            serde_json::to_string(&FirmwareError::BadMeasurement).unwrap(),
            "\"BAD_MEASUREMENT\""
        );
    }
}
