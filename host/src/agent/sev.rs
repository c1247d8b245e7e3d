//! AMD's own secure processor as the agent hands it to a VMM: `/dev/sev`, and what AMD says of it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

use crate::agent::api::Failure;
use crate::confidential::kvm::{DEVICE_PATH, GuestKind, real_kind};
use crate::machine::plan::{FIRMWARE_OF_REAL, MachinePlan};
use crate::vmm::protocol::HandleKind;

/// Whether this host has one that can be asked.
pub fn present() -> bool {
    File::open(DEVICE_PATH).is_ok()
}

/// What the VMM of a guest of this processor gets; nothing for another guest. `certificates` is the file of ASK ‖ ARK.
///
/// The device is open for reading: that is enough for a guest's commands, and no command that changes the platform is
/// taken from it (`sev_ioctl` of Linux).
pub fn handles(
    plan: &MachinePlan,
    certificates: Option<&Path>,
) -> Result<Vec<(HandleKind, OwnedFd)>, Failure> {
    if real_kind(plan.technology).is_none() {
        return Ok(Vec::new());
    }
    let device = File::open(DEVICE_PATH).map_err(|e| {
        Failure::new(
            "NO_PROCESSOR",
            format!("{DEVICE_PATH} cannot be opened: {e}; see `casemate doctor`"),
        )
    })?;
    let mut handles = vec![(HandleKind::SevDevice, device.into())];
    if let Some(path) = certificates {
        let file = File::open(path).map_err(|e| {
            Failure::new(
                "AMD_CERTIFICATES",
                format!("{} cannot be read: {e}", path.display()),
            )
        })?;
        handles.push((HandleKind::AmdCertificates, file.into()));
    }
    Ok(handles)
}

/// Bytes that the VMM may lock: all of the guest's memory stays pinned, and what is being measured is pinned once more.
pub fn locked_memory(plan: &MachinePlan) -> u64 {
    match real_kind(plan.technology) {
        Some(_) => plan.memory_bytes.saturating_mul(2),
        None => 0,
    }
}

/// Refuses what Linux cannot start by itself on this processor, and the firmware that it needs there.
pub fn check_boot(plan: &MachinePlan) -> Result<(), Failure> {
    let kind = real_kind(plan.technology);
    if kind.is_some() && plan.firmware.is_some() {
        let text = format!(
            "{} cannot be started: it has {FIRMWARE_OF_REAL}; run it on a host whose policy allows the emulated processor",
            plan.name
        );
        return Err(Failure::new("FIRMWARE_UNSUPPORTED", text));
    }
    match kind {
        None | Some(GuestKind::Sev) => Ok(()),
        Some(GuestKind::SevEs | GuestKind::Snp) => Err(Failure::new(
            "FIRMWARE_NEEDED",
            format!(
                "{} cannot be started as {} on a real processor: Linux needs a firmware there, to start the other vCPUs \
                 and to accept its memory, and this version boots kernels directly; describe it with \
                 `technology = \"sev\"`, or run it on a host whose policy allows the emulated processor",
                plan.name,
                plan.technology.name()
            ),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::plan::{FirmwarePlan, Technology};

    #[test]
    fn a_real_processor_starts_sev_guests_without_firmware_and_no_others() {
        let code = |technology, firmware| {
            let plan = MachinePlan {
                technology,
                firmware,
                ..crate::vmm::boot::tests::plan()
            };
            check_boot(&plan).err().map(|failure| failure.code)
        };
        let (emulated, firmware) = (false, FirmwarePlan::for_image(1));
        let sev = Technology::Sev {
            emulated,
            policy: 1,
        };
        let es = Technology::SevEs {
            emulated,
            policy: 5,
        };
        let snp = Technology::SevSnp {
            emulated,
            policy: 0x3_0000,
        };
        assert_eq!(code(sev, None), None);
        for technology in [es, snp] {
            let needed = code(technology, None);
            assert_eq!(needed.as_deref(), Some("FIRMWARE_NEEDED"));
        }
        for technology in [sev, es, snp] {
            let refused = code(technology, firmware);
            assert_eq!(refused.as_deref(), Some("FIRMWARE_UNSUPPORTED"));
        }
    }
}
