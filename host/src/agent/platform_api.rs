//! The part of the agent's API that concerns the secure processor.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which secure processor is meant.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum ProcessorKind {
    /// AMD's, behind /dev/sev.
    Amd,
    /// The software one.
    Emulated,
}

/// What the platform's operator orders.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "order", rename_all = "kebab-case", deny_unknown_fields)]
pub enum PlatformOrderText {
    /// GET_ID.
    Id,
    /// PEK_CSR.
    Csr,
    /// PEK_CERT_IMPORT.
    Import {
        /// The request, signed by the owner; base64 of 2084 bytes.
        pek: String,
        /// The owner's certificate, likewise.
        oca: String,
    },
    /// PEK_GEN.
    PekGen,
    /// PDH_GEN.
    PdhGen,
    /// FACTORY_RESET.
    FactoryReset,
    /// SNP_CONFIG.
    SnpConfig {
        /// TCB version that reports show: hex of eight bytes as they stand in a report; none for the committed one.
        reported_tcb: Option<String>,
        /// Reports do not show the chip's id.
        mask_chip_id: bool,
        /// Reports are not signed with the chip's key.
        mask_chip_key: bool,
    },
    /// SNP_COMMIT.
    SnpCommit,
    /// SNP_VLEK_LOAD.
    SnpVlekLoad {
        /// The wrapped hash stick, base64 of 432 bytes.
        wrapped: String,
    },
}

/// The secure processor.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct PlatformInfo {
    /// Whether it is the software one.
    pub emulated: bool,
    /// API major.
    pub api_major: u8,
    /// API minor.
    pub api_minor: u8,
    /// Firmware build.
    pub build: u8,
    /// `uninit`, `init` or `working`.
    pub state: String,
    /// Whether an outside owner has signed the platform.
    pub owned: bool,
    /// SHA-256 of the owner certificate's signed part, hex; of an owned platform.
    pub owner_sha256: Option<String>,
    /// Whether SEV-ES is initialised.
    pub sev_es: bool,
    /// SEV and SEV-ES guests that the firmware holds.
    pub guests: u32,
    /// PDH certificate, base64.
    pub pdh: String,
    /// PEK, OCA, CEK, base64.
    pub platform: String,
    /// ASK, ARK, base64; empty where they are not known.
    pub amd: String,
    /// SHA-256 of the root's public key, hex: what a policy names as trusted emulated root. Empty where it is not
    /// known.
    pub root_sha256: String,
    /// SEV-SNP, where there is one.
    pub snp: Option<SnpInfo>,
}

/// SEV-SNP of the secure processor.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct SnpInfo {
    /// `milan`, `genoa` or `turin`, where it is known.
    pub product: Option<String>,
    /// API major.
    pub api_major: u8,
    /// API minor.
    pub api_minor: u8,
    /// Firmware build.
    pub build: u32,
    /// TCB version that runs.
    pub current_tcb: TcbInfo,
    /// TCB version that reports show.
    pub reported_tcb: TcbInfo,
    /// Reports do not show the chip's id.
    pub mask_chip_id: bool,
    /// Reports are not signed with the chip's key.
    pub mask_chip_key: bool,
    /// A VLEK is loaded.
    pub vlek_loaded: bool,
    /// SNP guests that the firmware holds.
    pub guests: u32,
}

/// A TCB version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TcbInfo {
    /// Eight bytes as they stand in a report, hex.
    pub raw: String,
    /// The same by component, where the product is known.
    #[schemars(with = "Option<serde_json::Map<String, serde_json::Value>>")]
    pub parts: Option<casemate_attest::tcb::TcbVersion>,
}

/// What SNP reports are signed under, base64 of DER.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct SnpCertificatesText {
    /// Whether the software processor made them.
    pub emulated: bool,
    /// The root; none where the host has no such certificates and AMD's key service does.
    pub ark: Option<String>,
    /// The issuer of VCEKs.
    pub ask: Option<String>,
    /// The chip's key for the reported TCB version.
    pub vcek: Option<String>,
}

/// What an order gave.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct OrderedBytes {
    /// `csr` or `id`.
    pub what: String,
    /// Base64.
    pub bytes: String,
    /// Whether the software processor gave it.
    pub emulated: bool,
}
