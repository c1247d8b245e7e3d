//! Every structure and number of SEV that crosses into the kernel, compared with Linux 6.12.
//!
//! The table `layout-linux-6.12.txt` is what [`probe`]'s program printed when compiled against Debian's
//! linux-libc-dev 6.12.95-1~bpo12+1. Where this machine has headers as new (`/usr/include`, or the directory in
//! `CASEMATE_KERNEL_HEADERS`), the program is compiled and run once more. The test prints which it used.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::structs::{
    BLOB_MAX, SevIssue, SevUserGetId2, SevUserPdhCertExport, SevUserPekCertImport, SevUserPekCsr,
    SevUserSnpConfig, SevUserSnpStatus, SevUserSnpVlekLoad, SevUserStatus, VLEK_WRAPPED, command,
};
use kvm_bindings as kvm;

/// A structure: its name in C, its size here, its fields and their offsets here.
struct Layout(&'static str, usize, Vec<(&'static str, usize)>);

macro_rules! layouts {
    ($($c:literal = $rust:ty { $($field:ident $(as $c_field:literal)?),* };)*) => {
        vec![$(Layout($c, size_of::<$rust>(), vec![$(
            (layouts!(@name $field $($c_field)?), std::mem::offset_of!($rust, $field))
        ),*])),*]
    };
    (@name $field:ident) => { stringify!($field) };
    (@name $field:ident $c_field:literal) => { $c_field };
}

#[rustfmt::skip]
fn layouts() -> Vec<Layout> {
    layouts! {
        "sev_issue_cmd" = SevIssue { cmd, data, error };
        "sev_user_data_status" = SevUserStatus { api_major, api_minor, state, flags, build, guest_count };
        "sev_user_data_pek_csr" = SevUserPekCsr { address, length };
        "sev_user_data_pek_cert_import" = SevUserPekCertImport { pek_cert_address, pek_cert_len, oca_cert_address, oca_cert_len };
        "sev_user_data_pdh_cert_export" = SevUserPdhCertExport { pdh_cert_address, pdh_cert_len, cert_chain_address, cert_chain_len };
        "sev_user_data_get_id2" = SevUserGetId2 { address, length };
        "sev_user_data_snp_status" = SevUserSnpStatus { api_major, api_minor, state, build_id, guest_count, current_tcb_version, reported_tcb_version };
        "sev_user_data_snp_config" = SevUserSnpConfig { reported_tcb, rsvd1 };
        "sev_user_data_snp_vlek_load" = SevUserSnpVlekLoad { len, vlek_wrapped_version, rsvd, vlek_wrapped_address };
        "sev_user_data_snp_wrapped_vlek_hashstick" = [u8; VLEK_WRAPPED] {};
        "kvm_sev_cmd" = kvm::kvm_sev_cmd { id, pad0, data, error, sev_fd };
        "kvm_sev_init" = kvm::kvm_sev_init { vmsa_features, flags, ghcb_version, pad1, pad2 };
        "kvm_sev_launch_start" = kvm::kvm_sev_launch_start { handle, policy, dh_uaddr, dh_len, pad0, session_uaddr, session_len, pad1 };
        "kvm_sev_launch_update_data" = kvm::kvm_sev_launch_update_data { uaddr, len, pad0 };
        "kvm_sev_launch_secret" = kvm::kvm_sev_launch_secret { hdr_uaddr, hdr_len, pad0, guest_uaddr, guest_len, pad1, trans_uaddr, trans_len, pad2 };
        "kvm_sev_launch_measure" = kvm::kvm_sev_launch_measure { uaddr, len, pad0 };
        "kvm_sev_guest_status" = kvm::kvm_sev_guest_status { handle, policy, state };
        "kvm_sev_attestation_report" = kvm::kvm_sev_attestation_report { mnonce, uaddr, len, pad0 };
        "kvm_sev_send_start" = kvm::kvm_sev_send_start { policy, pad0, pdh_cert_uaddr, pdh_cert_len, pad1, plat_certs_uaddr, plat_certs_len, pad2, amd_certs_uaddr, amd_certs_len, pad3, session_uaddr, session_len, pad4 };
        "kvm_sev_send_update_data" = kvm::kvm_sev_send_update_data { hdr_uaddr, hdr_len, pad0, guest_uaddr, guest_len, pad1, trans_uaddr, trans_len, pad2 };
        "kvm_sev_receive_start" = kvm::kvm_sev_receive_start { handle, policy, pdh_uaddr, pdh_len, pad0, session_uaddr, session_len, pad1 };
        "kvm_sev_receive_update_data" = kvm::kvm_sev_receive_update_data { hdr_uaddr, hdr_len, pad0, guest_uaddr, guest_len, pad1, trans_uaddr, trans_len, pad2 };
        "kvm_sev_snp_launch_start" = kvm::kvm_sev_snp_launch_start { policy, gosvw, flags, pad0, pad1 };
        "kvm_sev_snp_launch_update" = kvm::kvm_sev_snp_launch_update { gfn_start, uaddr, len, type_ as "type", pad0, flags, pad1, pad2 };
        "kvm_sev_snp_launch_finish" = kvm::kvm_sev_snp_launch_finish { id_block_uaddr, id_auth_uaddr, id_block_en, auth_key_en, vcek_disabled, host_data, pad0, flags, pad1 };
        "kvm_enc_region" = kvm::kvm_enc_region { addr, size };
        "kvm_userspace_memory_region2" = kvm::kvm_userspace_memory_region2 { slot, flags, guest_phys_addr, memory_size, userspace_addr, guest_memfd_offset, guest_memfd, pad1, pad2 };
        "kvm_create_guest_memfd" = kvm::kvm_create_guest_memfd { size, flags, reserved };
        "kvm_memory_attributes" = kvm::kvm_memory_attributes { address, size, attributes, flags };
    }
}

/// Numbers: their names in C, and what is used here.
#[rustfmt::skip]
fn numbers() -> Vec<(&'static str, u64)> {
    let mut numbers: Vec<(&'static str, u64)> = vec![
        ("SEV_ISSUE_CMD", nix::request_code_readwrite!(b'S', 0, size_of::<SevIssue>())),
        ("KVM_MEMORY_ENCRYPT_OP", nix::request_code_readwrite!(0xae, 0xba, size_of::<u64>())),
        ("KVM_CREATE_GUEST_MEMFD", nix::request_code_readwrite!(0xae, 0xd4, size_of::<kvm::kvm_create_guest_memfd>())),
        ("KVM_SET_USER_MEMORY_REGION2", nix::request_code_write!(0xae, 0x49, size_of::<kvm::kvm_userspace_memory_region2>())),
        ("KVM_SET_MEMORY_ATTRIBUTES", nix::request_code_write!(0xae, 0xd2, size_of::<kvm::kvm_memory_attributes>())),
        ("KVM_HC_MAP_GPA_RANGE", crate::confidential::page_map::KVM_HC_MAP_GPA_RANGE),
        ("KVM_MEMORY_ENCRYPT_REG_REGION", nix::request_code_read!(0xae, 0xbb, size_of::<kvm::kvm_enc_region>())),
    ];
    for (name, number) in [
        ("SEV_FACTORY_RESET", command::FACTORY_RESET),
        ("SEV_PLATFORM_STATUS", command::PLATFORM_STATUS),
        ("SEV_PEK_GEN", command::PEK_GEN),
        ("SEV_PEK_CSR", command::PEK_CSR),
        ("SEV_PDH_GEN", command::PDH_GEN),
        ("SEV_PDH_CERT_EXPORT", command::PDH_CERT_EXPORT),
        ("SEV_PEK_CERT_IMPORT", command::PEK_CERT_IMPORT),
        ("SEV_GET_ID2", command::GET_ID2),
        ("SNP_PLATFORM_STATUS", command::SNP_PLATFORM_STATUS),
        ("SNP_COMMIT", command::SNP_COMMIT),
        ("SNP_SET_CONFIG", command::SNP_SET_CONFIG),
        ("SNP_VLEK_LOAD", command::SNP_VLEK_LOAD),
        ("KVM_SEV_INIT", kvm::sev_cmd_id_KVM_SEV_INIT),
        ("KVM_SEV_ES_INIT", kvm::sev_cmd_id_KVM_SEV_ES_INIT),
        ("KVM_SEV_LAUNCH_START", kvm::sev_cmd_id_KVM_SEV_LAUNCH_START),
        ("KVM_SEV_LAUNCH_UPDATE_DATA", kvm::sev_cmd_id_KVM_SEV_LAUNCH_UPDATE_DATA),
        ("KVM_SEV_LAUNCH_UPDATE_VMSA", kvm::sev_cmd_id_KVM_SEV_LAUNCH_UPDATE_VMSA),
        ("KVM_SEV_LAUNCH_SECRET", kvm::sev_cmd_id_KVM_SEV_LAUNCH_SECRET),
        ("KVM_SEV_LAUNCH_MEASURE", kvm::sev_cmd_id_KVM_SEV_LAUNCH_MEASURE),
        ("KVM_SEV_LAUNCH_FINISH", kvm::sev_cmd_id_KVM_SEV_LAUNCH_FINISH),
        ("KVM_SEV_SEND_START", kvm::sev_cmd_id_KVM_SEV_SEND_START),
        ("KVM_SEV_SEND_UPDATE_DATA", kvm::sev_cmd_id_KVM_SEV_SEND_UPDATE_DATA),
        ("KVM_SEV_SEND_FINISH", kvm::sev_cmd_id_KVM_SEV_SEND_FINISH),
        ("KVM_SEV_RECEIVE_START", kvm::sev_cmd_id_KVM_SEV_RECEIVE_START),
        ("KVM_SEV_RECEIVE_UPDATE_DATA", kvm::sev_cmd_id_KVM_SEV_RECEIVE_UPDATE_DATA),
        ("KVM_SEV_RECEIVE_FINISH", kvm::sev_cmd_id_KVM_SEV_RECEIVE_FINISH),
        ("KVM_SEV_GUEST_STATUS", kvm::sev_cmd_id_KVM_SEV_GUEST_STATUS),
        ("KVM_SEV_GET_ATTESTATION_REPORT", kvm::sev_cmd_id_KVM_SEV_GET_ATTESTATION_REPORT),
        ("KVM_SEV_SEND_CANCEL", kvm::sev_cmd_id_KVM_SEV_SEND_CANCEL),
        ("KVM_SEV_INIT2", kvm::sev_cmd_id_KVM_SEV_INIT2),
        ("KVM_SEV_SNP_LAUNCH_START", kvm::sev_cmd_id_KVM_SEV_SNP_LAUNCH_START),
        ("KVM_SEV_SNP_LAUNCH_UPDATE", kvm::sev_cmd_id_KVM_SEV_SNP_LAUNCH_UPDATE),
        ("KVM_SEV_SNP_LAUNCH_FINISH", kvm::sev_cmd_id_KVM_SEV_SNP_LAUNCH_FINISH),
        ("KVM_X86_SEV_VM", kvm::KVM_X86_SEV_VM),
        ("KVM_X86_SEV_ES_VM", kvm::KVM_X86_SEV_ES_VM),
        ("KVM_X86_SNP_VM", kvm::KVM_X86_SNP_VM),
        ("KVM_MEM_GUEST_MEMFD", kvm::KVM_MEM_GUEST_MEMFD),
        ("KVM_MEMORY_ATTRIBUTE_PRIVATE", kvm::KVM_MEMORY_ATTRIBUTE_PRIVATE),
        ("KVM_MEMORY_EXIT_FLAG_PRIVATE", kvm::KVM_MEMORY_EXIT_FLAG_PRIVATE),
        ("KVM_EXIT_MEMORY_FAULT", kvm::KVM_EXIT_MEMORY_FAULT),
        ("KVM_SEV_SNP_PAGE_TYPE_NORMAL", kvm::KVM_SEV_SNP_PAGE_TYPE_NORMAL),
        ("KVM_SEV_SNP_PAGE_TYPE_ZERO", kvm::KVM_SEV_SNP_PAGE_TYPE_ZERO),
        ("KVM_SEV_SNP_PAGE_TYPE_UNMEASURED", kvm::KVM_SEV_SNP_PAGE_TYPE_UNMEASURED),
        ("KVM_SEV_SNP_PAGE_TYPE_SECRETS", kvm::KVM_SEV_SNP_PAGE_TYPE_SECRETS),
        ("KVM_SEV_SNP_PAGE_TYPE_CPUID", kvm::KVM_SEV_SNP_PAGE_TYPE_CPUID),
        ("KVM_CAP_VM_TYPES", kvm::KVM_CAP_VM_TYPES),
        ("SEV_STATUS_FLAGS_CONFIG_ES", 0x100),
    ] {
        numbers.push((name, u64::from(number)));
    }
    for code in super::FirmwareCode::all() {
        numbers.push((header_name(code), u64::from(code.0)));
    }
    numbers
}

/// The header's own names of the firmware's codes; one carries its spelling mistake.
fn header_name(code: super::FirmwareCode) -> &'static str {
    let name = format!("SEV_RET_{}", code.name());
    let name = if name == "SEV_RET_INVALID_CONFIG" {
        "SEV_RET_INAVLID_CONFIG".to_owned()
    } else {
        name
    };
    name.leak()
}

/// What the C program prints, from the Rust side.
fn table() -> String {
    let mut out = String::new();
    for Layout(name, size, fields) in layouts() {
        writeln!(out, "{name} {size}").unwrap();
        for (field, offset) in fields {
            writeln!(out, "{name}.{field} {offset}").unwrap();
        }
    }
    for (name, number) in numbers() {
        writeln!(out, "{name} {number}").unwrap();
    }
    out
}

/// The C program. It takes names from here and everything else from the headers.
fn probe() -> String {
    let mut out = String::from(
        "#include <stdio.h>\n#include <stddef.h>\n#include <linux/kvm.h>\n#include <linux/psp-sev.h>\n#include <linux/kvm_para.h>\nint main(void) {\n",
    );
    for Layout(name, _, fields) in layouts() {
        writeln!(out, "printf(\"{name} %zu\\n\", sizeof(struct {name}));").unwrap();
        for (field, _) in fields {
            writeln!(
                out,
                "printf(\"{name}.{field} %zu\\n\", offsetof(struct {name}, {field}));"
            )
            .unwrap();
        }
    }
    for (name, _) in numbers() {
        writeln!(out, "printf(\"{name} %u\\n\", (unsigned)({name}));").unwrap();
    }
    out + "return 0; }\n"
}

/// A directory of headers that knows SEV-SNP, and why it is taken.
fn headers() -> Option<PathBuf> {
    let given = std::env::var_os("CASEMATE_KERNEL_HEADERS").map(PathBuf::from);
    let usual = Path::new("/usr/include").to_owned();
    given.or(Some(usual)).filter(|dir| {
        std::fs::read_to_string(dir.join("linux/psp-sev.h"))
            .is_ok_and(|text| text.contains("SEV_RET_INVALID_KEY"))
    })
}

fn compiled_and_run(headers: &Path) -> Result<String, String> {
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let (source, program) = (dir.path().join("probe.c"), dir.path().join("probe"));
    std::fs::write(&source, probe()).map_err(|e| e.to_string())?;
    let compiled = Command::new("cc")
        .arg("-isystem")
        .arg(headers)
        .arg("-isystem")
        .arg(headers.join("x86_64-linux-gnu"))
        .args([&source, Path::new("-o"), &program])
        .output()
        .map_err(|e| format!("cc: {e}"))?;
    if !compiled.status.success() {
        return Err(String::from_utf8_lossy(&compiled.stderr).into_owned());
    }
    let ran = Command::new(&program).output().map_err(|e| e.to_string())?;
    String::from_utf8(ran.stdout).map_err(|e| e.to_string())
}

#[test]
fn structures_and_numbers_are_those_of_linux_6_12() {
    let ours = table();
    assert_eq!(ours, COMMITTED, "the committed table of 6.12.95");
    const { assert!(BLOB_MAX >= 3 * super::structs::CERTIFICATE) };
    match headers() {
        Some(dir) => {
            let theirs = compiled_and_run(&dir).unwrap();
            assert_eq!(ours, theirs, "headers in {}", dir.display());
            println!(
                "compared with the committed table and with the headers in {}",
                dir.display()
            );
        }
        None => println!(
            "compared with the committed table only: no psp-sev.h as new as 6.12 in /usr/include or \
             $CASEMATE_KERNEL_HEADERS"
        ),
    }
}

const COMMITTED: &str = include_str!("layout-linux-6.12.txt");
