//! The fields of an SNP report as JSON: the same for a report that is shown and for one that is verified.

use casemate_attest::product::Product;
use casemate_attest::report::{CpuidFms, FirmwareVersion, Report};
use casemate_attest::tcb::{RawTcb, TcbVersion};
use serde::Serialize;

/// A report's fields. What they say is proven only where the verdict accepts them.
#[derive(Debug, Serialize)]
pub struct ReportView {
    version: u32,
    product: Option<Product>,
    cpuid: Option<String>,
    signing_key: String,
    author_key: bool,
    chip_key_masked: bool,
    migration_agent: bool,
    guest_svn: u32,
    guest_policy: String,
    family_id: String,
    image_id: String,
    vmpl: u32,
    platform_info: String,
    report_data: String,
    measurement: String,
    host_data: String,
    id_key_digest: String,
    author_key_digest: String,
    report_id: String,
    report_id_ma: String,
    chip_id: String,
    reported_tcb: TcbView,
    committed_tcb: TcbView,
    current_tcb: TcbView,
    launch_tcb: TcbView,
    current_firmware: String,
    committed_firmware: String,
    launch_mitigations: Option<u64>,
    current_mitigations: Option<u64>,
}

/// A TCB version: its parts where the product is known, and always its bytes.
#[derive(Debug, Serialize)]
struct TcbView {
    raw: String,
    #[serde(flatten)]
    parts: Option<TcbVersion>,
}

impl ReportView {
    /// The view of `report`; `product` is the leaf's, which older reports do not name themselves.
    pub fn of(report: &Report, product: Option<Product>) -> Self {
        let product = product.or_else(|| report.product());
        let tcb = |raw: RawTcb| TcbView {
            raw: hex::encode(raw.0),
            parts: product.map(|product| raw.of(product)),
        };
        Self {
            version: report.version() as u32,
            product,
            cpuid: report.cpuid().map(cpuid),
            signing_key: report.signing_key().to_string().to_lowercase(),
            author_key: report.has_author_key(),
            chip_key_masked: report.masks_chip_key(),
            migration_agent: report.has_migration_agent(),
            guest_svn: report.guest_svn(),
            guest_policy: format!("{:#x}", report.policy().0),
            family_id: hex::encode(report.family_id()),
            image_id: hex::encode(report.image_id()),
            vmpl: report.vmpl(),
            platform_info: format!("{:#x}", report.platform_info().0),
            report_data: hex::encode(report.report_data()),
            measurement: hex::encode(report.measurement()),
            host_data: hex::encode(report.host_data()),
            id_key_digest: hex::encode(report.id_key_digest()),
            author_key_digest: hex::encode(report.author_key_digest()),
            report_id: hex::encode(report.report_id()),
            report_id_ma: hex::encode(report.report_id_ma()),
            chip_id: hex::encode(report.chip_id()),
            reported_tcb: tcb(report.reported_tcb()),
            committed_tcb: tcb(report.committed_tcb()),
            current_tcb: tcb(report.current_tcb()),
            launch_tcb: tcb(report.launch_tcb()),
            current_firmware: firmware(report.current_firmware()),
            committed_firmware: firmware(report.committed_firmware()),
            launch_mitigations: report.launch_mitigations(),
            current_mitigations: report.current_mitigations(),
        }
    }
}

/// As policy files write it.
fn firmware(version: FirmwareVersion) -> String {
    let FirmwareVersion {
        major,
        minor,
        build,
    } = version;
    format!("{major}.{minor}.{build}")
}

fn cpuid(cpuid: CpuidFms) -> String {
    hex::encode([cpuid.family, cpuid.model, cpuid.stepping])
}
