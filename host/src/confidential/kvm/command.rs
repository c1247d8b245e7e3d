//! One `KVM_MEMORY_ENCRYPT_OP`: which command takes which structure, and what may be tried again.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use kvm_bindings::{
    kvm_enc_region, kvm_sev_attestation_report, kvm_sev_cmd, kvm_sev_guest_status, kvm_sev_init,
    kvm_sev_launch_measure, kvm_sev_launch_secret, kvm_sev_launch_start,
    kvm_sev_launch_update_data, kvm_sev_receive_start, kvm_sev_receive_update_data,
    kvm_sev_send_start, kvm_sev_send_update_data, kvm_sev_snp_launch_finish,
    kvm_sev_snp_launch_start, kvm_sev_snp_launch_update, sev_cmd_id,
};
use kvm_ioctls::VmFd;
use nix::errno::Errno;

use super::code::FirmwareCode;
use super::error::SevError;

/// The two ioctls of a virtual machine that SEV needs.
pub trait SevVm: Send {
    /// `KVM_MEMORY_ENCRYPT_OP`.
    fn command(&mut self, command: &mut kvm_sev_cmd) -> Result<(), Errno>;
    /// `KVM_MEMORY_ENCRYPT_REG_REGION`: pins the memory until the virtual machine goes.
    fn register(&mut self, region: &kvm_enc_region) -> Result<(), Errno>;
}

impl SevVm for Arc<VmFd> {
    fn command(&mut self, command: &mut kvm_sev_cmd) -> Result<(), Errno> {
        self.encrypt_op_sev(command)
            .map_err(|e| Errno::from_raw(e.errno()))
    }

    fn register(&mut self, region: &kvm_enc_region) -> Result<(), Errno> {
        self.register_enc_memory_region(region)
            .map_err(|e| Errno::from_raw(e.errno()))
    }
}

/// A command of `enum sev_cmd_id`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Command {
    id: sev_cmd_id,
    name: &'static str,
    again: Again,
}

/// Whether a command that was put off (EAGAIN) or interrupted (EINTR) may be given once more as it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Again {
    /// The firmware has not seen it: the kernel puts it off before it asks, it asks once and in whole, or (SNP
    /// pages) it says in the structure how far it came, and fails only where it took nothing.
    Yes,
    /// The kernel asks the firmware several times for one ioctl; a part may be measured already, and twice
    /// measured is another digest.
    No,
}

/// A structure of KVM and the one command that takes it.
///
/// # Safety
///
/// The kernel reads and writes `size_of::<Self>()` bytes for [`Parameters::COMMAND`].
#[expect(
    unsafe_code,
    reason = "the ioctl takes its structure's address as a number"
)]
pub(super) unsafe trait Parameters {
    /// The command.
    const COMMAND: Command;
}

macro_rules! parameters {
    ($($type:ty => $id:ident, $name:literal, $again:ident;)*) => {$(
        // SAFETY: `arch/x86/kvm/svm/sev.c` copies this structure for this command; `layout` compares sizes.
        #[expect(unsafe_code, reason = "the promise of `Parameters`")]
        unsafe impl Parameters for $type {
            const COMMAND: Command = Command {
                id: kvm_bindings::$id,
                name: $name,
                again: Again::$again,
            };
        }
    )*};
}

parameters! {
    kvm_sev_init => sev_cmd_id_KVM_SEV_INIT2, "INIT2", Yes;
    kvm_sev_launch_start => sev_cmd_id_KVM_SEV_LAUNCH_START, "LAUNCH_START", Yes;
    kvm_sev_launch_update_data => sev_cmd_id_KVM_SEV_LAUNCH_UPDATE_DATA, "LAUNCH_UPDATE_DATA", No;
    kvm_sev_launch_measure => sev_cmd_id_KVM_SEV_LAUNCH_MEASURE, "LAUNCH_MEASURE", Yes;
    kvm_sev_launch_secret => sev_cmd_id_KVM_SEV_LAUNCH_SECRET, "LAUNCH_SECRET", Yes;
    kvm_sev_guest_status => sev_cmd_id_KVM_SEV_GUEST_STATUS, "GUEST_STATUS", Yes;
    kvm_sev_attestation_report => sev_cmd_id_KVM_SEV_GET_ATTESTATION_REPORT, "ATTESTATION_REPORT", Yes;
    kvm_sev_send_start => sev_cmd_id_KVM_SEV_SEND_START, "SEND_START", Yes;
    kvm_sev_send_update_data => sev_cmd_id_KVM_SEV_SEND_UPDATE_DATA, "SEND_UPDATE_DATA", Yes;
    kvm_sev_receive_start => sev_cmd_id_KVM_SEV_RECEIVE_START, "RECEIVE_START", Yes;
    kvm_sev_receive_update_data => sev_cmd_id_KVM_SEV_RECEIVE_UPDATE_DATA, "RECEIVE_UPDATE_DATA", Yes;
    kvm_sev_snp_launch_start => sev_cmd_id_KVM_SEV_SNP_LAUNCH_START, "SNP_LAUNCH_START", Yes;
    kvm_sev_snp_launch_update => sev_cmd_id_KVM_SEV_SNP_LAUNCH_UPDATE, "SNP_LAUNCH_UPDATE", Yes;
    kvm_sev_snp_launch_finish => sev_cmd_id_KVM_SEV_SNP_LAUNCH_FINISH, "SNP_LAUNCH_FINISH", No;
}

/// Commands without a structure.
impl Command {
    pub(super) const INIT: Self =
        Self::plain(kvm_bindings::sev_cmd_id_KVM_SEV_INIT, "INIT", Again::Yes);
    pub(super) const ES_INIT: Self = Self::plain(
        kvm_bindings::sev_cmd_id_KVM_SEV_ES_INIT,
        "ES_INIT",
        Again::Yes,
    );
    pub(super) const LAUNCH_UPDATE_VMSA: Self = Self::plain(
        kvm_bindings::sev_cmd_id_KVM_SEV_LAUNCH_UPDATE_VMSA,
        "LAUNCH_UPDATE_VMSA",
        Again::No,
    );
    pub(super) const LAUNCH_FINISH: Self = Self::plain(
        kvm_bindings::sev_cmd_id_KVM_SEV_LAUNCH_FINISH,
        "LAUNCH_FINISH",
        Again::Yes,
    );
    pub(super) const SEND_FINISH: Self = Self::plain(
        kvm_bindings::sev_cmd_id_KVM_SEV_SEND_FINISH,
        "SEND_FINISH",
        Again::Yes,
    );
    pub(super) const SEND_CANCEL: Self = Self::plain(
        kvm_bindings::sev_cmd_id_KVM_SEV_SEND_CANCEL,
        "SEND_CANCEL",
        Again::Yes,
    );
    pub(super) const RECEIVE_FINISH: Self = Self::plain(
        kvm_bindings::sev_cmd_id_KVM_SEV_RECEIVE_FINISH,
        "RECEIVE_FINISH",
        Again::Yes,
    );

    const fn plain(id: sev_cmd_id, name: &'static str, again: Again) -> Self {
        Self { id, name, again }
    }
}

/// A virtual machine and the `/dev/sev` that its commands name.
pub(super) struct Commands<V: SevVm> {
    vm: V,
    device: RawFd,
}

impl<V: SevVm> Commands<V> {
    /// `device` must stay open as long as this lives.
    pub(super) fn new(vm: V, device: RawFd) -> Self {
        Self { vm, device }
    }

    /// The virtual machine, for what is no command.
    pub(super) fn vm(&mut self) -> &mut V {
        &mut self.vm
    }

    /// A command with its structure, which has the kernel's answer afterwards.
    pub(super) fn give<P: Parameters>(&mut self, parameters: &mut P) -> Result<(), SevError> {
        self.issue(P::COMMAND, std::ptr::from_mut(parameters) as u64)
    }

    /// A command without a structure.
    pub(super) fn give_plain(&mut self, command: Command) -> Result<(), SevError> {
        self.issue(command, 0)
    }

    /// Pins memory that the guest will have encrypted.
    pub(super) fn register(&mut self, region: &kvm_enc_region) -> Result<(), SevError> {
        repeated("KVM_MEMORY_ENCRYPT_REG_REGION", Again::Yes, || {
            self.vm.register(region).map_err(|errno| (errno, 0))
        })
    }

    fn issue(&mut self, command: Command, data: u64) -> Result<(), SevError> {
        repeated(command.name, command.again, || {
            let mut issued = kvm_sev_cmd {
                id: command.id,
                data,
                // A descriptor is never negative while its owner is open.
                sev_fd: u32::try_from(self.device).unwrap_or(u32::MAX),
                ..kvm_sev_cmd::default()
            };
            self.vm
                .command(&mut issued)
                .map_err(|errno| (errno, issued.error))
        })
    }
}

/// Gives a command until it is done or refused, [`ATTEMPTS`] times at most where that is harmless.
fn repeated(
    name: &'static str,
    again: Again,
    mut give: impl FnMut() -> Result<(), (Errno, u32)>,
) -> Result<(), SevError> {
    let mut times = 0;
    loop {
        times += 1;
        let (errno, firmware) = match give() {
            Ok(()) => return Ok(()),
            Err(refused) => refused,
        };
        let put_off = matches!(errno, Errno::EAGAIN | Errno::EINTR) && firmware == 0;
        if put_off && again == Again::Yes && times < ATTEMPTS {
            if errno == Errno::EAGAIN {
                std::thread::sleep(PAUSE);
            }
            continue;
        }
        return Err(refusal(name, errno, firmware, put_off.then_some(times)));
    }
}

/// What a refused ioctl means; `put_off` says how often it was tried if it was only put off.
pub(super) fn refusal(
    command: &'static str,
    errno: Errno,
    firmware: u32,
    put_off: Option<u32>,
) -> SevError {
    match (firmware, put_off) {
        (0, Some(times)) => SevError::Busy {
            command,
            errno,
            times,
        },
        (0, None) => SevError::Kernel { command, errno },
        (code, _) => SevError::Firmware {
            command,
            code: FirmwareCode(code),
        },
    }
}

/// As [`Commands`] repeats, for an ioctl of `/dev/sev`: the kernel asks the firmware once for each.
pub(super) fn repeated_on_device(
    name: &'static str,
    give: impl FnMut() -> Result<(), (Errno, u32)>,
) -> Result<(), SevError> {
    repeated(name, Again::Yes, give)
}

/// How often a command is given at most.
pub const ATTEMPTS: u32 = 16;
/// Pause before a command that was put off is given again.
const PAUSE: Duration = Duration::from_millis(2);

#[cfg(test)]
mod tests {
    use super::*;

    fn tried(again: Again, mut answers: Vec<Result<(), (Errno, u32)>>) -> (u32, &'static str) {
        let mut times = 0;
        let result = repeated("TEST", again, || {
            times += 1;
            if answers.is_empty() {
                Ok(())
            } else {
                answers.remove(0)
            }
        });
        (times, result.map_or_else(|error| error.code(), |()| "done"))
    }

    #[test]
    fn what_is_put_off_is_tried_again_within_bounds() {
        let off = vec![Err((Errno::EAGAIN, 0)), Err((Errno::EINTR, 0))];
        assert_eq!(tried(Again::Yes, off), (3, "done"));
        let forever = vec![Err((Errno::EINTR, 0)); 100];
        assert_eq!(tried(Again::Yes, forever), (ATTEMPTS, "SEV_BUSY"));
    }

    #[test]
    fn what_the_firmware_may_have_seen_is_not_repeated() {
        let off = vec![Err((Errno::EINTR, 0))];
        assert_eq!(tried(Again::No, off), (1, "SEV_BUSY"));
        let seen = vec![Err((Errno::EAGAIN, 7))];
        assert_eq!(tried(Again::Yes, seen), (1, "POLICY_FAILURE"));
        let refused = vec![Err((Errno::EINVAL, 0))];
        assert_eq!(tried(Again::Yes, refused), (1, "SEV_REFUSED"));
    }
}
