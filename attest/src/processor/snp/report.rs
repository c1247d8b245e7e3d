//! What the firmware writes into an attestation report. Publication 56860, ATTESTATION_REPORT.

use crate::report::{
    CpuidFms, FirmwareVersion, PlatformInfo, REPORT_LEN, ReportVersion, SigningKey, SnpPolicy,
};
use crate::tcb::RawTcb;

/// A report's fields before they are signed. Those that a version does not have stay zero.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(
    missing_docs,
    reason = "named as the accessors of `Report`, which explain them"
)]
pub struct ReportFields {
    pub version: ReportVersion,
    pub guest_svn: u32,
    pub policy: SnpPolicy,
    pub family_id: [u8; 16],
    pub image_id: [u8; 16],
    pub vmpl: u32,
    pub current_tcb: RawTcb,
    pub platform_info: PlatformInfo,
    pub has_author_key: bool,
    /// KEY_INFO bit 1, MASK_CHIP_KEY; [`Report::masks_chip_key`](crate::report::Report) reads it.
    pub masks_chip_key: bool,
    pub signing_key: SigningKey,
    /// Says that no key signs, whatever `signing_key` is: the chip key is masked.
    pub unsigned: bool,
    pub report_data: [u8; 64],
    pub measurement: [u8; 48],
    pub host_data: [u8; 32],
    pub id_key_digest: [u8; 48],
    pub author_key_digest: [u8; 48],
    pub report_id: [u8; 32],
    /// All ones without a migration agent.
    pub report_id_ma: [u8; 32],
    pub reported_tcb: RawTcb,
    /// From V3 on.
    pub cpuid: CpuidFms,
    pub chip_id: [u8; 64],
    pub committed_tcb: RawTcb,
    pub current_firmware: FirmwareVersion,
    pub committed_firmware: FirmwareVersion,
    pub launch_tcb: RawTcb,
    /// From V5 on.
    pub launch_mitigations: u64,
    /// From V5 on.
    pub current_mitigations: u64,
}

impl ReportFields {
    /// The report without a signature.
    pub fn to_unsigned_bytes(&self) -> [u8; REPORT_LEN] {
        let mut raw = [0; REPORT_LEN];
        let mut put = |at: usize, bytes: &[u8]| {
            for (to, from) in raw.iter_mut().skip(at).zip(bytes) {
                *to = *from;
            }
        };
        put(0x00, &(self.version as u32).to_le_bytes());
        put(0x04, &self.guest_svn.to_le_bytes());
        put(0x08, &self.policy.0.to_le_bytes());
        put(0x10, &self.family_id);
        put(0x20, &self.image_id);
        put(0x30, &self.vmpl.to_le_bytes());
        put(0x34, &ECDSA_P384_SHA384.to_le_bytes());
        put(0x38, &self.current_tcb.0);
        put(0x40, &self.platform_info.0.to_le_bytes());
        put(0x48, &self.key_info().to_le_bytes());
        put(0x50, &self.report_data);
        put(0x90, &self.measurement);
        put(0xc0, &self.host_data);
        put(0xe0, &self.id_key_digest);
        put(0x110, &self.author_key_digest);
        put(0x140, &self.report_id);
        put(0x160, &self.report_id_ma);
        put(0x180, &self.reported_tcb.0);
        if self.version >= ReportVersion::V3 {
            let CpuidFms {
                family,
                model,
                stepping,
            } = self.cpuid;
            put(0x188, &[family, model, stepping]);
        }
        put(0x1a0, &self.chip_id);
        put(0x1e0, &self.committed_tcb.0);
        put(0x1e8, &version_fields(self.current_firmware));
        put(0x1ec, &version_fields(self.committed_firmware));
        put(0x1f0, &self.launch_tcb.0);
        if self.version >= ReportVersion::V5 {
            put(0x1f8, &self.launch_mitigations.to_le_bytes());
            put(0x200, &self.current_mitigations.to_le_bytes());
        }
        raw
    }

    fn key_info(&self) -> u32 {
        let key = match self.signing_key {
            _ if self.unsigned => 7,
            SigningKey::Vcek => 0,
            SigningKey::Vlek => 1,
        };
        u32::from(self.has_author_key) | u32::from(self.masks_chip_key) << 1 | key << 2
    }
}

const fn version_fields(version: FirmwareVersion) -> [u8; 3] {
    [version.build, version.minor, version.major]
}

const ECDSA_P384_SHA384: u32 = 1;
