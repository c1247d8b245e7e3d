//! `KVM_MEMORY_ENCRYPT_OP`: initialisation and launch, with the checks of Linux 6.12 in its order.

use casemate_attest::legacy::{GuestPolicy, PacketHeader, SessionBlob, SevCertificate};
use casemate_attest::processor::FirmwareError;
use kvm_bindings as kvm;
use nix::errno::Errno;

use super::fields::Fields;
use super::vm::Vm;
use super::{Kernel, Outcome, Refusal, is_device};
use crate::memory::{Caller, PAGE};

/// One command on its way.
pub(super) struct Op {
    pub(super) caller: Caller,
    /// Address of the command's structure.
    pub(super) data: u64,
    /// The descriptor of `/dev/sev` that the command names.
    pub(super) device: u64,
}

impl Kernel {
    /// `sev_mem_enc_ioctl`.
    pub(super) fn encrypt_op(&mut self, vm: &mut Vm, caller: Caller, argument: u64) -> Outcome {
        if argument == 0 {
            return Ok(());
        }
        let mut command = Fields::read(caller, argument, 24)?;
        let (id, op) = (
            command.u32(0),
            Op {
                caller,
                data: command.u64(8),
                device: u64::from(command.u32(20)),
            },
        );
        let Some(name) = name(id) else {
            self.note(&format!("KVM_SEV command {id}"), &Err(Errno::EINVAL.into()));
            return Err(Errno::EINVAL.into());
        };
        if !command.is_zero(4, 4) || !command.is_zero(16, 4) {
            self.complain(name, "padding or error of struct kvm_sev_cmd is not zero");
        }
        let mut detail = String::new();
        let outcome = self
            .script
            .kernel(name)
            .map_err(Refusal::from)
            .and_then(|()| self.dispatch(vm, id, &op, &mut detail));
        self.note(&format!("KVM_SEV_{name}{detail}"), &outcome);
        command.set(
            16,
            &outcome.map_or_else(Refusal::code, |()| 0).to_le_bytes(),
        );
        command.write_back()?;
        outcome
    }

    fn dispatch(&mut self, vm: &mut Vm, id: u32, op: &Op, detail: &mut String) -> Outcome {
        let snp = vm.active && vm.vm_type == kvm::KVM_X86_SNP_VM;
        match id {
            // An SNP guest has commands of its own only.
            _ if snp && id < kvm::sev_cmd_id_KVM_SEV_SNP_LAUNCH_START => Err(Errno::EPERM.into()),
            kvm::sev_cmd_id_KVM_SEV_SNP_LAUNCH_UPDATE if !snp => Err(Errno::EINVAL.into()),
            _ if !snp && id >= kvm::sev_cmd_id_KVM_SEV_SNP_LAUNCH_START => {
                Err(Errno::ENOTTY.into())
            }
            kvm::sev_cmd_id_KVM_SEV_SNP_LAUNCH_START => self.snp_start(vm, op),
            kvm::sev_cmd_id_KVM_SEV_SNP_LAUNCH_UPDATE => self.snp_update(vm, op, detail),
            kvm::sev_cmd_id_KVM_SEV_SNP_LAUNCH_FINISH => self.snp_finish(vm, op, detail),
            kvm::sev_cmd_id_KVM_SEV_INIT => self.init(vm, false),
            kvm::sev_cmd_id_KVM_SEV_ES_INIT => self.init(vm, true),
            kvm::sev_cmd_id_KVM_SEV_INIT2 => self.init2(vm, op),
            // Everything below asks for an initialised guest first.
            kvm::sev_cmd_id_KVM_SEV_RECEIVE_UPDATE_DATA if !vm.active => Err(Errno::EINVAL.into()),
            _ if !vm.active => Err(Errno::ENOTTY.into()),
            kvm::sev_cmd_id_KVM_SEV_LAUNCH_START => self.launch_start(vm, op),
            kvm::sev_cmd_id_KVM_SEV_LAUNCH_UPDATE_DATA => self.update_data(vm, op, detail),
            kvm::sev_cmd_id_KVM_SEV_LAUNCH_UPDATE_VMSA => self.update_vmsa(vm, op, detail),
            kvm::sev_cmd_id_KVM_SEV_LAUNCH_MEASURE => self.measure(vm, op),
            kvm::sev_cmd_id_KVM_SEV_LAUNCH_SECRET => self.secret(vm, op, detail),
            kvm::sev_cmd_id_KVM_SEV_LAUNCH_FINISH => self.plain(vm, op, "LAUNCH_FINISH"),
            kvm::sev_cmd_id_KVM_SEV_GUEST_STATUS => self.guest_status(vm, op),
            kvm::sev_cmd_id_KVM_SEV_GET_ATTESTATION_REPORT => self.report(vm, op),
            kvm::sev_cmd_id_KVM_SEV_SEND_START => self.send_start(vm, op),
            kvm::sev_cmd_id_KVM_SEV_SEND_UPDATE_DATA => self.send_update(vm, op),
            kvm::sev_cmd_id_KVM_SEV_SEND_FINISH => self.plain(vm, op, "SEND_FINISH"),
            kvm::sev_cmd_id_KVM_SEV_SEND_CANCEL => self.plain(vm, op, "SEND_CANCEL"),
            kvm::sev_cmd_id_KVM_SEV_RECEIVE_START => self.receive_start(vm, op),
            kvm::sev_cmd_id_KVM_SEV_RECEIVE_UPDATE_DATA => self.receive_update(vm, op),
            kvm::sev_cmd_id_KVM_SEV_RECEIVE_FINISH => self.plain(vm, op, "RECEIVE_FINISH"),
            _ => Err(Errno::EINVAL.into()),
        }
    }

    /// `sev_guest_init`: on a machine of the default type only.
    fn init(&mut self, vm: &mut Vm, es: bool) -> Outcome {
        if vm.vm_type != kvm::KVM_X86_DEFAULT_VM {
            return Err(Errno::EINVAL.into());
        }
        self.activate(vm, es)
    }

    /// `sev_guest_init2`: on a machine of a SEV type only.
    fn init2(&mut self, vm: &mut Vm, op: &Op) -> Outcome {
        if vm.vm_type == kvm::KVM_X86_DEFAULT_VM || vm.active {
            return Err(Errno::EINVAL.into());
        }
        let data = Fields::read(op.caller, op.data, 48)?;
        let es = vm.vm_type != kvm::KVM_X86_SEV_VM;
        // Flags; VMSA features, of which this kernel has none; GHCB protocol 2 at most, and none for SEV.
        if data.u32(8) != 0 || data.u64(0) != 0 || data.u16(12) > 2 || (!es && data.u16(12) != 0) {
            return Err(Errno::EINVAL.into());
        }
        if !data.is_zero(14, 34) {
            self.complain("INIT2", "padding of struct kvm_sev_init is not zero");
        }
        self.activate(vm, es)
    }

    /// `__sev_guest_init`.
    fn activate(&mut self, vm: &mut Vm, es: bool) -> Outcome {
        if vm.vcpus > 0 || vm.active {
            return Err(Errno::EINVAL.into());
        }
        let used: Vec<u32> = self.vms.values().map(|other| other.asid).collect();
        let free = (1..=self.parts.asids).find(|asid| !used.contains(asid));
        let asid = free.ok_or(Errno::EBUSY)?;
        // The firmware initialises the platform, if nobody has.
        self.firmware("INIT", |_| Ok(()))?;
        (vm.active, vm.es, vm.asid) = (true, es, asid);
        Ok(())
    }

    /// `sev_launch_start`.
    fn launch_start(&mut self, vm: &mut Vm, op: &Op) -> Outcome {
        let mut start = Fields::read(op.caller, op.data, 40)?;
        let (dh, session) = (start.u64(8), start.u64(24));
        let dh = (dh != 0).then(|| blob(op.caller, dh, start.u32(16)));
        let session = (session != 0).then(|| blob(op.caller, session, start.u32(32)));
        let (dh, session) = (dh.transpose()?, session.transpose()?);
        if !start.is_zero(20, 4) || !start.is_zero(36, 4) {
            self.complain("LAUNCH_START", "padding is not zero");
        }
        if vm.handle.is_some() {
            self.complain("LAUNCH_START", "the machine has its guest already");
        }
        self.require_device(op.caller, op.device)?;
        let (shared, policy, asid) = (start.u32(0), start.u32(4), vm.asid);
        let handle = self.firmware("LAUNCH_START", |processor| {
            // Sharing another guest's key is not emulated.
            if shared != 0 {
                return Err(FirmwareError::InvalidGuest);
            }
            let policy = parse_policy(policy)?;
            let owner = match (&dh, &session) {
                (Some(dh), Some(session)) => Some((certificate(dh)?, parse_session(session)?)),
                (None, None) => None,
                _ => return Err(FirmwareError::InvalidParam),
            };
            processor.launch_start(policy, owner.as_ref().map(|(dh, session)| (dh, session)))
        })?;
        self.bind(vm, op, handle, asid)?;
        start.set(0, &handle.0.to_le_bytes());
        Ok(start.write_back()?)
    }

    /// `sev_bind_asid`, and what is remembered after it.
    pub(super) fn bind(
        &mut self,
        vm: &mut Vm,
        op: &Op,
        handle: casemate_attest::processor::GuestHandle,
        asid: u32,
    ) -> Outcome {
        let bound = self.firmware("ACTIVATE", |processor| processor.activate(handle, asid));
        if bound.is_err() {
            let _ = self.parts.processor.decommission(handle);
        }
        bound?;
        (vm.handle, vm.device) = (Some(handle), op.device);
        Ok(())
    }

    /// `sev_launch_update_data`.
    fn update_data(&mut self, vm: &mut Vm, op: &Op, detail: &mut String) -> Outcome {
        let update = Fields::read(op.caller, op.data, 16)?;
        let (address, length) = (update.u64(0), u64::from(update.u32(8)));
        *detail = format!(" bytes={length}");
        if !update.is_zero(12, 4) {
            self.complain("LAUNCH_UPDATE_DATA", "padding is not zero");
        }
        vm.pin_for_a_while(op.caller, address, length, true)?;
        if !vm.registered(address, length) {
            self.complain("LAUNCH_UPDATE_DATA", "memory was not registered first");
        }
        self.require_device(op.caller, vm.device)?;
        aligned(address)?;
        let bytes = op.caller.read(address, length as usize)?;
        let guest = vm.guest();
        self.firmware("LAUNCH_UPDATE_DATA", |processor| {
            processor.guest(guest)?.launch_update_data(&bytes)
        })
    }

    /// `sev_launch_update_vmsa`: one firmware command a vCPU.
    fn update_vmsa(&mut self, vm: &mut Vm, op: &Op, detail: &mut String) -> Outcome {
        if !vm.es {
            return Err(Errno::ENOTTY.into());
        }
        *detail = format!(" vcpus={}", vm.vcpus);
        if vm.vcpus == 0 {
            self.complain("LAUNCH_UPDATE_VMSA", "the machine has no vCPU yet");
        }
        let guest = vm.guest();
        for vcpu in 0..vm.vcpus {
            self.require_device(op.caller, vm.device)?;
            self.firmware("LAUNCH_UPDATE_VMSA", |processor| {
                processor.guest(guest)?.launch_update_vmsa(&vmsa(vcpu))
            })?;
        }
        Ok(())
    }

    /// `sev_launch_measure`.
    fn measure(&mut self, vm: &mut Vm, op: &Op) -> Outcome {
        let mut measure = Fields::read(op.caller, op.data, 16)?;
        let (address, length) = (measure.u64(0), measure.u32(8));
        if length > 0 && address != 0 && length > BLOB_MAX {
            return Err(Errno::EINVAL.into());
        }
        self.require_device(op.caller, vm.device)?;
        let guest = vm.guest();
        let enough = address != 0 && length >= MEASURE;
        let measured = self.firmware("LAUNCH_MEASURE", |processor| {
            let guest = processor.guest(guest)?;
            if !enough {
                return Err(FirmwareError::InvalidLength { needed: MEASURE });
            }
            guest.launch_measure()
        });
        if length == 0 && measured == Err(Refusal::Firmware(INVALID_LEN)) {
            measure.set(8, &MEASURE.to_le_bytes());
            measure.write_back()?;
        }
        let blob = measured?.to_bytes();
        op.caller.write(address, &blob)?;
        measure.set(8, &MEASURE.to_le_bytes());
        Ok(measure.write_back()?)
    }

    /// `sev_launch_secret`.
    fn secret(&mut self, vm: &mut Vm, op: &Op, detail: &mut String) -> Outcome {
        let secret = Fields::read(op.caller, op.data, 48)?;
        let (address, length) = (secret.u64(16), secret.u32(24));
        *detail = format!(" bytes={length}");
        vm.pin_for_a_while(op.caller, address, u64::from(length), true)?;
        // Linux wants physically contiguous pages; two pages of a process seldom are.
        if address % PAGE + u64::from(length) > PAGE {
            return Err(Errno::EINVAL.into());
        }
        let packet = blob(op.caller, secret.u64(32), secret.u32(40))?;
        let header = blob(op.caller, secret.u64(0), secret.u32(8))?;
        if [12, 28, 44].iter().any(|at| !secret.is_zero(*at, 4)) {
            self.complain("LAUNCH_SECRET", "padding is not zero");
        }
        self.require_device(op.caller, vm.device)?;
        let mut memory = op.caller.read(address, length as usize)?;
        let guest = vm.guest();
        self.firmware("LAUNCH_SECRET", |processor| {
            let header = PacketHeader::from_bytes(&header)?;
            let guest = processor.guest(guest)?;
            guest.launch_secret(&header, &packet, &mut memory)
        })?;
        Ok(op.caller.write(address, &memory)?)
    }

    /// Commands that name only the guest.
    fn plain(&mut self, vm: &mut Vm, op: &Op, name: &'static str) -> Outcome {
        if op.data != 0 {
            self.complain(name, "the command takes no structure");
        }
        self.require_device(op.caller, vm.device)?;
        let guest = vm.guest();
        self.firmware(name, |processor| {
            let guest = processor.guest(guest)?;
            match name {
                "LAUNCH_FINISH" => guest.launch_finish(),
                "SEND_FINISH" => guest.send_finish(),
                "SEND_CANCEL" => guest.send_cancel(),
                _ => guest.receive_finish(),
            }
        })
    }

    /// `sev_guest_status`.
    fn guest_status(&mut self, vm: &mut Vm, op: &Op) -> Outcome {
        self.require_device(op.caller, vm.device)?;
        let guest = vm.guest();
        let status = self.firmware("GUEST_STATUS", |processor| processor.guest(guest)?.status())?;
        let policy = u32::from(status.policy);
        let words = [status.handle.0, policy, status.state as u32];
        Ok(op
            .caller
            .write(op.data, &words.map(u32::to_le_bytes).concat())?)
    }

    /// `sev_get_attestation_report`.
    fn report(&mut self, vm: &mut Vm, op: &Op) -> Outcome {
        let mut request = Fields::read(op.caller, op.data, 32)?;
        let (address, length) = (request.u64(16), request.u32(24));
        if length > 0 && address != 0 && length > BLOB_MAX {
            return Err(Errno::EINVAL.into());
        }
        if !request.is_zero(28, 4) {
            self.complain("ATTESTATION_REPORT", "padding is not zero");
        }
        self.require_device(op.caller, vm.device)?;
        let guest = vm.guest();
        let enough = address != 0 && length >= REPORT;
        let mnonce = request.bytes(0);
        let report = self.firmware("ATTESTATION_REPORT", |processor| {
            processor.guest(guest)?;
            if !enough {
                return Err(FirmwareError::InvalidLength { needed: REPORT });
            }
            processor.attestation_report(guest, &mnonce)
        });
        if length == 0 && report == Err(Refusal::Firmware(INVALID_LEN)) {
            request.set(24, &REPORT.to_le_bytes());
            request.write_back()?;
        }
        op.caller.write(address, report?.as_bytes())?;
        request.set(24, &REPORT.to_le_bytes());
        Ok(request.write_back()?)
    }

    /// `sev_issue_cmd`: the descriptor must be `/dev/sev`.
    pub(super) fn require_device(&self, caller: Caller, device: u64) -> Outcome {
        if is_device(caller, device) {
            Ok(())
        } else {
            Err(Errno::EBADF.into())
        }
    }
}

/// `psp_copy_user_blob`.
pub(super) fn blob(caller: Caller, address: u64, length: u32) -> Result<Vec<u8>, Refusal> {
    if address == 0 || length == 0 || length > BLOB_MAX {
        return Err(Errno::EINVAL.into());
    }
    Ok(caller.read(address, length as usize)?)
}

pub(super) fn parse_policy(policy: u32) -> Result<GuestPolicy, FirmwareError> {
    GuestPolicy::try_from(policy).map_err(|_| FirmwareError::InvalidParam)
}

pub(super) fn certificate(bytes: &[u8]) -> Result<SevCertificate, FirmwareError> {
    if bytes.len() != CERTIFICATE {
        let needed = CERTIFICATE as u32;
        return Err(FirmwareError::InvalidLength { needed });
    }
    SevCertificate::parse(bytes).map_err(|_| FirmwareError::InvalidCertificate)
}

pub(super) fn parse_session(bytes: &[u8]) -> Result<SessionBlob, FirmwareError> {
    Ok(SessionBlob::parse(bytes)?)
}

/// The firmware works on whole cipher blocks.
pub(super) fn aligned(address: u64) -> Outcome {
    if address.is_multiple_of(16) {
        Ok(())
    } else {
        Err(Refusal::Firmware(INVALID_ADDRESS))
    }
}

/// The save area that is measured for a vCPU: the double's own page, for Linux's is made of the vCPU's registers.
pub fn vmsa(vcpu: u32) -> Vec<u8> {
    let mut page = b"save area of the kernel double, vCPU ".to_vec();
    page.extend_from_slice(&vcpu.to_le_bytes());
    page.resize(4096, 0);
    page
}

/// Names of the commands, as the specification has them.
fn name(id: u32) -> Option<&'static str> {
    Some(match id {
        kvm::sev_cmd_id_KVM_SEV_INIT => "INIT",
        kvm::sev_cmd_id_KVM_SEV_ES_INIT => "ES_INIT",
        kvm::sev_cmd_id_KVM_SEV_LAUNCH_START => "LAUNCH_START",
        kvm::sev_cmd_id_KVM_SEV_LAUNCH_UPDATE_DATA => "LAUNCH_UPDATE_DATA",
        kvm::sev_cmd_id_KVM_SEV_LAUNCH_UPDATE_VMSA => "LAUNCH_UPDATE_VMSA",
        kvm::sev_cmd_id_KVM_SEV_LAUNCH_SECRET => "LAUNCH_SECRET",
        kvm::sev_cmd_id_KVM_SEV_LAUNCH_MEASURE => "LAUNCH_MEASURE",
        kvm::sev_cmd_id_KVM_SEV_LAUNCH_FINISH => "LAUNCH_FINISH",
        kvm::sev_cmd_id_KVM_SEV_SEND_START => "SEND_START",
        kvm::sev_cmd_id_KVM_SEV_SEND_UPDATE_DATA => "SEND_UPDATE_DATA",
        kvm::sev_cmd_id_KVM_SEV_SEND_FINISH => "SEND_FINISH",
        kvm::sev_cmd_id_KVM_SEV_RECEIVE_START => "RECEIVE_START",
        kvm::sev_cmd_id_KVM_SEV_RECEIVE_UPDATE_DATA => "RECEIVE_UPDATE_DATA",
        kvm::sev_cmd_id_KVM_SEV_RECEIVE_FINISH => "RECEIVE_FINISH",
        kvm::sev_cmd_id_KVM_SEV_GUEST_STATUS => "GUEST_STATUS",
        kvm::sev_cmd_id_KVM_SEV_GET_ATTESTATION_REPORT => "ATTESTATION_REPORT",
        kvm::sev_cmd_id_KVM_SEV_SEND_CANCEL => "SEND_CANCEL",
        kvm::sev_cmd_id_KVM_SEV_INIT2 => "INIT2",
        kvm::sev_cmd_id_KVM_SEV_SNP_LAUNCH_START => "SNP_LAUNCH_START",
        kvm::sev_cmd_id_KVM_SEV_SNP_LAUNCH_UPDATE => "SNP_LAUNCH_UPDATE",
        kvm::sev_cmd_id_KVM_SEV_SNP_LAUNCH_FINISH => "SNP_LAUNCH_FINISH",
        _ => return None,
    })
}

/// `SEV_FW_BLOB_MAX_SIZE`.
pub(super) const BLOB_MAX: u32 = 0x4000;
/// Bytes of a SEV certificate.
pub(super) const CERTIFICATE: usize = 2084;
/// Bytes of an attestation report.
const REPORT: u32 = 208;
/// Measure and nonce.
const MEASURE: u32 = 48;
const INVALID_LEN: u32 = 0x04;
const INVALID_ADDRESS: u32 = 0x09;
