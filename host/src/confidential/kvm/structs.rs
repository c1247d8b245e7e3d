//! The structures of `/dev/sev`, and where every field of all structures of SEV lies in Linux 6.12.
//!
//! KVM's own come from `kvm-bindings`; these are `include/uapi/linux/psp-sev.h`, which no crate has right and
//! whole. `layout` compares sizes, offsets and numbers of both with a table that a C program printed, and with
//! the machine's own headers, compiled, where they are new enough.

/// `struct sev_issue_cmd`, the parameter of `SEV_ISSUE_CMD`.
#[repr(C, packed)]
#[derive(Clone, Copy, Debug, Default)]
pub struct SevIssue {
    /// [`command`] number.
    pub cmd: u32,
    /// Address of the command's own structure.
    pub data: u64,
    /// Out: the firmware's code.
    pub error: u32,
}

/// `struct sev_user_data_status`.
#[repr(C, packed)]
#[derive(Clone, Copy, Debug, Default)]
pub struct SevUserStatus {
    /// API major.
    pub api_major: u8,
    /// API minor.
    pub api_minor: u8,
    /// UNINIT 0, INIT 1, WORKING 2.
    pub state: u8,
    /// Bit 0: owned; bit 8: SEV-ES initialised.
    pub flags: u32,
    /// Build.
    pub build: u8,
    /// Guests the firmware holds.
    pub guest_count: u32,
}

/// `struct sev_user_data_pek_csr`.
#[repr(C, packed)]
#[derive(Clone, Copy, Debug, Default)]
pub struct SevUserPekCsr {
    /// Out buffer.
    pub address: u64,
    /// Its length; out: what is needed.
    pub length: u32,
}

/// `struct sev_user_data_pek_cert_import`.
#[repr(C, packed)]
#[derive(Clone, Copy, Debug, Default)]
pub struct SevUserPekCertImport {
    /// PEK certificate, signed by the owner.
    pub pek_cert_address: u64,
    /// Its length.
    pub pek_cert_len: u32,
    /// The owner's certificate.
    pub oca_cert_address: u64,
    /// Its length.
    pub oca_cert_len: u32,
}

/// `struct sev_user_data_pdh_cert_export`.
#[repr(C, packed)]
#[derive(Clone, Copy, Debug, Default)]
pub struct SevUserPdhCertExport {
    /// Out buffer for the PDH.
    pub pdh_cert_address: u64,
    /// Its length; out: what is needed.
    pub pdh_cert_len: u32,
    /// Out buffer for PEK ‖ OCA ‖ CEK.
    pub cert_chain_address: u64,
    /// Its length; out: what is needed.
    pub cert_chain_len: u32,
}

/// `struct sev_user_data_get_id2`.
#[repr(C, packed)]
#[derive(Clone, Copy, Debug, Default)]
pub struct SevUserGetId2 {
    /// Out buffer.
    pub address: u64,
    /// Its length; out: what is needed.
    pub length: u32,
}

/// `struct sev_user_data_snp_status`; the two bit fields as whole integers.
#[repr(C, packed)]
#[derive(Clone, Copy, Debug, Default)]
pub struct SevUserSnpStatus {
    /// API major.
    pub api_major: u8,
    /// API minor.
    pub api_minor: u8,
    /// UNINIT 0, INIT 1.
    pub state: u8,
    /// Bit 0: the RMP is initialised.
    pub rmp: u8,
    /// Build.
    pub build_id: u32,
    /// Bit 0: chip id masked, 1: chip key masked, 2: VLEK loaded.
    pub flags: u32,
    /// Guests the firmware holds.
    pub guest_count: u32,
    /// TCB that runs.
    pub current_tcb_version: u64,
    /// TCB that reports are signed for.
    pub reported_tcb_version: u64,
}

/// `struct sev_user_data_snp_config`; the bit field as a whole integer.
#[repr(C, packed)]
#[derive(Clone, Copy, Debug)]
pub struct SevUserSnpConfig {
    /// TCB that reports are to be signed for; 0: the committed one.
    pub reported_tcb: u64,
    /// Bit 0: mask the chip id, 1: mask the chip key.
    pub flags: u32,
    /// Zero.
    pub rsvd1: [u8; 52],
}

/// `struct sev_user_data_snp_vlek_load`.
#[repr(C, packed)]
#[derive(Clone, Copy, Debug, Default)]
pub struct SevUserSnpVlekLoad {
    /// Length of this structure.
    pub len: u32,
    /// Zero.
    pub vlek_wrapped_version: u8,
    /// Zero.
    pub rsvd: [u8; 3],
    /// The wrapped hashstick, [`VLEK_WRAPPED`] bytes.
    pub vlek_wrapped_address: u64,
}

/// Command numbers of `SEV_ISSUE_CMD`, named as in the header.
pub mod command {
    pub const FACTORY_RESET: u32 = 0;
    pub const PLATFORM_STATUS: u32 = 1;
    pub const PEK_GEN: u32 = 2;
    pub const PEK_CSR: u32 = 3;
    pub const PDH_GEN: u32 = 4;
    pub const PDH_CERT_EXPORT: u32 = 5;
    pub const PEK_CERT_IMPORT: u32 = 6;
    pub const GET_ID2: u32 = 8;
    pub const SNP_PLATFORM_STATUS: u32 = 9;
    pub const SNP_COMMIT: u32 = 10;
    pub const SNP_SET_CONFIG: u32 = 11;
    pub const SNP_VLEK_LOAD: u32 = 12;
}

/// Bytes of the wrapped VLEK hashstick of AMD's key service.
pub const VLEK_WRAPPED: usize = 432;
/// Bytes of a SEV certificate.
pub const CERTIFICATE: usize = 2084;
/// Bytes of a session blob.
pub const SESSION: usize = 128;
/// Bytes of LAUNCH_MEASURE's blob.
pub const MEASURE: usize = 48;
/// Most that Linux copies for one certificate, session or report (`SEV_FW_BLOB_MAX_SIZE`).
pub const BLOB_MAX: usize = 0x4000;
