//! What the secure processor's status codes mean, and what helps.

use std::fmt;

/// A status code of the secure processor, as `struct kvm_sev_cmd` and `struct sev_issue_cmd` carry it.
///
/// Numbers and names: Linux's `include/uapi/linux/psp-sev.h` (6.12); meanings: AMD publications 55766 (SEV) and
/// 56860 (SEV-SNP), chapter "status codes".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirmwareCode(pub u32);

impl FirmwareCode {
    /// The kernel's own: the secure processor was never asked.
    pub const NOT_CALLED: Self = Self(u32::MAX);
    /// A buffer is too short; the length that is needed comes back.
    pub const INVALID_LEN: Self = Self(0x04);
    /// A parameter is not valid; of a CPUID page: the firmware has put the right values in it.
    pub const INVALID_PARAM: Self = Self(0x16);

    /// Stable name, as the specification has it; `UNKNOWN_FIRMWARE_CODE` for a number nobody documents.
    pub fn name(self) -> &'static str {
        self.entry().map_or("UNKNOWN_FIRMWARE_CODE", |e| e.1)
    }

    /// What it means, in words.
    pub fn meaning(self) -> &'static str {
        self.entry()
            .map_or("a code that no published specification names", |e| e.2)
    }

    /// What helps.
    pub fn remedy(self) -> &'static str {
        self.entry().map_or(
            "update casemate, and look the number up in the release notes of the platform's firmware",
            |e| e.3,
        )
    }

    /// Every code that is documented, in ascending order.
    pub fn all() -> impl Iterator<Item = Self> {
        CODES.iter().map(|entry| Self(entry.0))
    }

    fn entry(self) -> Option<&'static Entry> {
        CODES.iter().find(|entry| entry.0 == self.0)
    }
}

impl fmt::Display for FirmwareCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, meaning, remedy) = (self.name(), self.meaning(), self.remedy());
        write!(f, "{name} ({:#x}): {meaning}; {remedy}", self.0)
    }
}

/// Number, name, meaning, remedy.
type Entry = (u32, &'static str, &'static str, &'static str);

const CODES: &[Entry] = &[
    (
        0x01,
        "INVALID_PLATFORM_STATE",
        "the platform is not in the state for this command",
        "see `casemate doctor`; the platform must be initialised, and for PEK and ownership commands hold no guest",
    ),
    (
        0x02,
        "INVALID_GUEST_STATE",
        "the guest is not in the state for this command",
        "launch it anew; a launch or migration that failed cannot be continued",
    ),
    (
        0x03,
        "INVALID_CONFIG",
        "the platform's configuration does not allow it",
        "check SMEE, SEV and SEV-ES ASIDs and SNP in the BIOS settings",
    ),
    (
        0x04,
        "INVALID_LEN",
        "a buffer has not the length that the command asks",
        "check that certificates, session and packet are whole; they have fixed lengths",
    ),
    (
        0x05,
        "ALREADY_OWNED",
        "the platform has an outside owner already",
        "the present owner must give it up (a factory reset of SEV) before another imports its certificates",
    ),
    (
        0x06,
        "INVALID_CERTIFICATE",
        "a certificate is malformed, misplaced, or ends at an untrusted root",
        "fetch the platform's chain and AMD's certificates again, for the right processor",
    ),
    (
        0x07,
        "POLICY_FAILURE",
        "the guest's policy forbids this on this platform",
        "the owner must launch with another policy, or the platform's firmware must be updated to the API it asks",
    ),
    (
        0x08,
        "INACTIVE",
        "the guest has no ASID",
        "launch it anew; KVM activates a guest when it starts",
    ),
    (
        0x09,
        "INVALID_ADDRESS",
        "a physical address is not valid for the command",
        "report it: the kernel chooses these addresses; update the kernel",
    ),
    (
        0x0a,
        "BAD_SIGNATURE",
        "a signature does not verify",
        "check which key signed it, and that certificate or ID block arrived unchanged",
    ),
    (
        0x0b,
        "BAD_MEASUREMENT",
        "a MAC or measurement does not fit: what was brought in was changed, or made for another guest or platform",
        "make session, secret or ID block anew for this platform's present certificates and this image",
    ),
    (
        0x0c,
        "ASID_OWNED",
        "another guest holds this ASID",
        "try again; if it stays, reload kvm_amd when no guest runs",
    ),
    (
        0x0d,
        "INVALID_ASID",
        "the ASID is not one for this kind of guest",
        "give SEV-ES and SNP guests more ASIDs in the BIOS settings (minimum SEV ASID)",
    ),
    (
        0x0e,
        "WBINVD_REQUIRED",
        "caches must be written back before an ASID is used again",
        "try again; the kernel does this when it recycles ASIDs",
    ),
    (
        0x0f,
        "DFFLUSH_REQUIRED",
        "the data fabric must be flushed before an ASID is used again",
        "try again; the kernel does this when it recycles ASIDs",
    ),
    (
        0x10,
        "INVALID_GUEST",
        "no guest has this handle",
        "launch it anew; it was never started, or is decommissioned",
    ),
    (
        0x11,
        "INVALID_COMMAND",
        "this firmware does not know the command",
        "update the platform's firmware",
    ),
    (0x12, "ACTIVE", "the guest is active", "end the guest first"),
    (
        0x13,
        "HWSEV_RET_PLATFORM",
        "a hardware fault that concerns the platform, without harm to memory",
        "try the command again; if it stays, restart the host",
    ),
    (
        0x14,
        "HWSEV_RET_UNSAFE",
        "a hardware fault; memory may be affected",
        "take this host out of use and restart it before another confidential guest runs on it",
    ),
    (
        0x15,
        "UNSUPPORTED",
        "this platform does not support what was asked",
        "`casemate doctor` lists what it supports; update firmware or choose another technology",
    ),
    (
        0x16,
        "INVALID_PARAM",
        "a parameter is not valid",
        "compare policy and parameters with what `casemate doctor` says of this platform",
    ),
    (
        0x17,
        "RESOURCE_LIMIT",
        "the firmware has no room for another guest or command",
        "end a confidential guest on this host, or place this one elsewhere",
    ),
    (
        0x18,
        "SECURE_DATA_INVALID",
        "what the firmware keeps in flash is damaged, or another part's",
        "a factory reset of SEV makes it anew; the platform's identity changes with it",
    ),
    (
        0x19,
        "INVALID_PAGE_SIZE",
        "a page has another size in the RMP",
        "report it: the kernel sets the RMP; update the kernel",
    ),
    (
        0x1a,
        "INVALID_PAGE_STATE",
        "a page is in another state in the RMP",
        "report it: the kernel sets the RMP; update the kernel",
    ),
    (
        0x1b,
        "INVALID_MDATA_ENTRY",
        "the metadata entry of a swapped page does not fit",
        "report it: nothing here swaps guest pages through the firmware",
    ),
    (
        0x1c,
        "INVALID_PAGE_OWNER",
        "a page belongs to another guest in the RMP",
        "report it: the kernel sets the RMP; update the kernel",
    ),
    (
        0x1d,
        "AEAD_OFLOW",
        "a message counter or key has no use left",
        "launch the guest anew: its message keys are used up",
    ),
    (
        0x1f,
        "EXIT_RING_BUFFER",
        "the firmware has left ring buffer mode",
        "report it: nothing here uses the ring buffer; update the kernel",
    ),
    (
        0x20,
        "RMP_INIT_REQUIRED",
        "the RMP must be initialised first",
        "enable SNP memory (RMP table) in the BIOS settings and restart",
    ),
    (
        0x21,
        "BAD_SVN",
        "a firmware image or key has a lower security version than the committed one",
        "use the newest; what is committed cannot be taken back",
    ),
    (
        0x22,
        "BAD_VERSION",
        "a firmware image has a lower version than the committed one",
        "use the newest; what is committed cannot be taken back",
    ),
    (
        0x23,
        "SHUTDOWN_REQUIRED",
        "the firmware must be shut down first",
        "end all confidential guests, reload kvm_amd and ccp, then try again",
    ),
    (
        0x24,
        "UPDATE_FAILED",
        "a firmware update was not taken",
        "update through the BIOS, and restart",
    ),
    (
        0x25,
        "RESTORE_REQUIRED",
        "the firmware must be restored after a failed update",
        "restart the host",
    ),
    (
        0x26,
        "RMP_INITIALIZATION_FAILED",
        "the RMP could not be initialised",
        "check the SNP memory coverage in the BIOS settings and restart",
    ),
    (
        0x27,
        "INVALID_KEY",
        "a key is not valid, or is not there",
        "load the VLEK again, or let reports be signed by the VCEK",
    ),
    (
        u32::MAX,
        "NO_FW_CALL",
        "the kernel could not ask the secure processor at all",
        "see the kernel's log for ccp and kvm_amd; the processor may be dead until the host restarts",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;
    use casemate_attest::processor::FirmwareError;

    #[test]
    fn every_code_of_the_header_has_its_own_name_and_remedy() {
        let documented: Vec<u32> = (1..=0x1d).chain(0x1f..=0x27).chain([u32::MAX]).collect();
        let known: Vec<u32> = FirmwareCode::all().map(|code| code.0).collect();
        assert_eq!(known, documented);
        let mut names: Vec<&str> = FirmwareCode::all().map(FirmwareCode::name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), known.len());
        assert_eq!(FirmwareCode(0x1e).name(), "UNKNOWN_FIRMWARE_CODE");
        assert!(FirmwareCode(0x1e).to_string().contains("0x1e"));
    }

    #[test]
    fn real_and_software_processor_call_a_refusal_the_same() {
        for error in [
            FirmwareError::InvalidPlatformState,
            FirmwareError::InvalidGuestState,
            FirmwareError::InvalidLength { needed: 1 },
            FirmwareError::AlreadyOwned,
            FirmwareError::InvalidCertificate,
            FirmwareError::PolicyFailure,
            FirmwareError::Inactive,
            FirmwareError::BadSignature,
            FirmwareError::BadMeasurement,
            FirmwareError::AsidOwned,
            FirmwareError::InvalidAsid,
            FirmwareError::InvalidGuest,
            FirmwareError::Active,
            FirmwareError::HardwarePlatform,
            FirmwareError::Unsupported,
            FirmwareError::InvalidParam,
            FirmwareError::ResourceLimit,
        ] {
            assert_eq!(FirmwareCode(error.code()).name(), error.name());
        }
    }
}
