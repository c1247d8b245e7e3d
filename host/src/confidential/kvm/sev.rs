//! A SEV or SEV-ES guest of KVM.
//!
//! Packets come from the exchange memory, whose other side writes when it likes: they are copied before the
//! firmware reads.

use std::os::fd::{BorrowedFd, OwnedFd};

use casemate_attest::measure::snp::SnpLaunchDigest;
use casemate_crypto_migrate::guest::PAGE_SIZE;
use kvm_bindings::{
    kvm_enc_region, kvm_sev_attestation_report, kvm_sev_guest_status, kvm_sev_init,
    kvm_sev_launch_measure, kvm_sev_launch_secret, kvm_sev_launch_start,
    kvm_sev_launch_update_data, kvm_sev_receive_start, kvm_sev_receive_update_data,
    kvm_sev_send_start, kvm_sev_send_update_data,
};

use super::code::FirmwareCode;
use super::command::{Command, Commands, SevVm};
use super::device::{SevDevice, address, address_mut, cut};
use super::error::SevError;
use super::structs::{BLOB_MAX, MEASURE, SESSION};
use super::vm::{GuestKind, Initialise};
use crate::confidential::launch::{Firmware, SendStarted, VmsaPage, check_arrival};
use crate::confidential::protocol::PlatformEvidence;
use crate::confidential::shared::{Access, Exchange, GuestMemory, HEADER, MemoryLayout, Packet};
use crate::vmm::protocol::{LaunchBinding, Measurement, OwnerSession, RoleError};

/// What a VMM hands in for a real SEV or SEV-ES guest.
pub struct RealSev<V: SevVm> {
    /// The virtual machine of [`create_vm`](super::create_vm), without vCPUs yet: KVM refuses INIT after the first.
    pub vm: V,
    /// How that machine becomes a SEV one.
    pub initialise: Initialise,
    /// `/dev/sev`.
    pub device: OwnedFd,
    /// ASK ‖ ARK of this processor, as AMD publishes them.
    pub amd: Vec<u8>,
}

/// A SEV or SEV-ES guest of KVM. The kernel deactivates and decommissions it when the virtual machine goes.
pub struct KvmSev<V: SevVm> {
    commands: Commands<V>,
    device: SevDevice,
    amd: Vec<u8>,
    policy: u32,
    kind: GuestKind,
    memory: GuestMemory,
    exchange: Exchange,
}

/// GUEST_STATUS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestStatus {
    /// The firmware's name for the guest.
    pub handle: u32,
    /// Its policy.
    pub policy: u32,
    /// UNINIT 0, LUPDATE 1, LSECRET 2, RUNNING 3, SUPDATE 4, RUPDATE 5, SENT 6.
    pub state: u32,
}

impl<V: SevVm> KvmSev<V> {
    /// Makes the virtual machine a SEV (or, by its policy, SEV-ES) one and pins its memory.
    pub fn attach(
        real: RealSev<V>,
        policy: u32,
        memory: BorrowedFd<'_>,
        layout: MemoryLayout,
        exchange: BorrowedFd<'_>,
    ) -> Result<Self, SevError> {
        let device = SevDevice::from(real.device);
        let mut sev = Self {
            commands: Commands::new(real.vm, device.descriptor()),
            device,
            amd: real.amd,
            policy,
            kind: GuestKind::of_policy(policy),
            memory: GuestMemory::map(memory, layout, Access::ReadWrite)?,
            exchange: Exchange::map(exchange)?,
        };
        sev.initialise(real.initialise)?;
        for run in sev.memory.layout().runs().to_vec() {
            let region = kvm_enc_region {
                addr: sev.memory.host_address(run.gpa, run.length)?,
                size: run.length,
            };
            sev.commands.register(&region)?;
        }
        Ok(sev)
    }

    /// GUEST_STATUS.
    pub fn guest_status(&mut self) -> Result<GuestStatus, SevError> {
        let mut status = kvm_sev_guest_status::default();
        self.commands.give(&mut status)?;
        Ok(GuestStatus {
            handle: status.handle,
            policy: status.policy,
            state: status.state,
        })
    }

    /// ATTESTATION_REPORT: what was launched, signed by the PEK, with a nonce of the asker. 208 bytes in the API
    /// of today; the firmware is asked for the length first.
    pub fn attestation_report(&mut self, mnonce: [u8; 16]) -> Result<Vec<u8>, SevError> {
        let mut query = kvm_sev_attestation_report::default();
        match self.commands.give(&mut query) {
            // The firmware refuses a length of 0, and says which is right.
            Err(SevError::Firmware { code, .. }) if code == FirmwareCode::INVALID_LEN => {}
            Err(error) => return Err(error),
            Ok(()) => {
                return Err(SevError::Answer {
                    command: "ATTESTATION_REPORT",
                    what: "a report of no length",
                });
            }
        }
        let length = usize::try_from(query.len)
            .ok()
            .filter(|length| (1..=BLOB_MAX).contains(length))
            .ok_or(SevError::Answer {
                command: "ATTESTATION_REPORT",
                what: "a length that the kernel does not copy",
            })?;
        let mut report = vec![0u8; length];
        let mut request = kvm_sev_attestation_report {
            mnonce,
            ..kvm_sev_attestation_report::default()
        };
        (request.uaddr, request.len) = address_mut(&mut report)?;
        self.commands.give(&mut request)?;
        cut(&mut report, request.len, "ATTESTATION_REPORT")?;
        Ok(report)
    }

    /// LAUNCH_UPDATE_VMSA: measures and encrypts the registers of every vCPU as they are now, in order.
    fn measure_registers(&mut self) -> Result<(), SevError> {
        self.commands.give_plain(Command::LAUNCH_UPDATE_VMSA)
    }

    fn initialise(&mut self, initialise: Initialise) -> Result<(), SevError> {
        match (initialise, self.kind) {
            // No VMSA features, and for SEV-ES the newest GHCB protocol that the kernel has.
            (Initialise::Typed, _) => self.commands.give(&mut kvm_sev_init::default()),
            (Initialise::Older, GuestKind::Sev) => self.commands.give_plain(Command::INIT),
            (Initialise::Older, GuestKind::SevEs | GuestKind::Snp) => {
                self.commands.give_plain(Command::ES_INIT)
            }
        }
    }

    fn require_movable(&self) -> Result<(), SevError> {
        match self.kind {
            GuestKind::Sev => Ok(()),
            GuestKind::SevEs | GuestKind::Snp => Err(SevError::Unsupported(
                "no Linux kernel can send or receive the registers of a SEV-ES guest; launch it anew at the other \
                 host and let its owner release the key there, or describe it with technology `sev`",
            )),
        }
    }

    fn page(&self, gpa: u64) -> Result<u64, SevError> {
        Ok(self.memory.host_address(gpa, PAGE_SIZE as u64)?)
    }

    fn start(&mut self, session: Option<&OwnerSession>) -> Result<(), SevError> {
        let mut start = kvm_sev_launch_start {
            policy: self.policy,
            ..kvm_sev_launch_start::default()
        };
        if let Some(session) = session {
            (start.dh_uaddr, start.dh_len) = address(&session.certificate)?;
            (start.session_uaddr, start.session_len) = address(&session.blob)?;
        }
        self.commands.give(&mut start)
    }

    fn update(&mut self, gpa: u64, length: u64) -> Result<(), SevError> {
        let mut update = kvm_sev_launch_update_data {
            uaddr: self.memory.host_address(gpa, length)?,
            len: u32::try_from(length)
                .map_err(|_| SevError::Request("a run to measure is 4 GiB at most".into()))?,
            ..kvm_sev_launch_update_data::default()
        };
        self.commands.give(&mut update)
    }

    fn measure(&mut self) -> Result<Measurement, SevError> {
        let mut blob = vec![0u8; MEASURE];
        let mut measure = kvm_sev_launch_measure::default();
        (measure.uaddr, measure.len) = address_mut(&mut blob)?;
        self.commands.give(&mut measure)?;
        cut(&mut blob, measure.len, "LAUNCH_MEASURE")?;
        let policy = self.guest_status()?.policy;
        Ok(Measurement {
            blob,
            api: self.device.status()?.api,
            policy,
            elapsed_us: 0,
        })
    }

    fn secret(&mut self, header: &[u8], ciphertext: &[u8], gpa: u64) -> Result<(), SevError> {
        let mut secret = kvm_sev_launch_secret::default();
        (secret.hdr_uaddr, secret.hdr_len) = address(header)?;
        (secret.trans_uaddr, secret.trans_len) = address(ciphertext)?;
        secret.guest_uaddr = self.memory.host_address(gpa, ciphertext.len() as u64)?;
        secret.guest_len = secret.trans_len;
        self.commands.give(&mut secret)
    }

    fn open_send(&mut self, target: &PlatformEvidence) -> Result<(u32, Vec<u8>), SevError> {
        self.require_movable()?;
        let mut session = vec![0u8; SESSION];
        let mut start = kvm_sev_send_start::default();
        (start.pdh_cert_uaddr, start.pdh_cert_len) = address(&target.pdh)?;
        (start.plat_certs_uaddr, start.plat_certs_len) = address(&target.platform)?;
        (start.amd_certs_uaddr, start.amd_certs_len) = address(&target.amd)?;
        (start.session_uaddr, start.session_len) = address_mut(&mut session)?;
        self.commands.give(&mut start)?;
        cut(&mut session, start.session_len, "SEND_START")?;
        Ok((start.policy, session))
    }

    fn send_page(&mut self, slot: usize, gpa: u64) -> Result<(), SevError> {
        let mut packet = Packet::default();
        let mut send = kvm_sev_send_update_data {
            guest_uaddr: self.page(gpa)?,
            guest_len: PAGE_SIZE as u32,
            ..kvm_sev_send_update_data::default()
        };
        (send.hdr_uaddr, send.hdr_len) = address_mut(&mut packet.header)?;
        (send.trans_uaddr, send.trans_len) = address_mut(&mut packet.data)?;
        self.commands.give(&mut send)?;
        Ok(self
            .exchange
            .put_packet(slot, &packet.header, &packet.data)?)
    }

    fn open_receive(&mut self, source_pdh: &[u8], session: &[u8]) -> Result<(), SevError> {
        self.require_movable()?;
        let mut start = kvm_sev_receive_start {
            policy: self.policy,
            ..kvm_sev_receive_start::default()
        };
        (start.pdh_uaddr, start.pdh_len) = address(source_pdh)?;
        (start.session_uaddr, start.session_len) = address(session)?;
        self.commands.give(&mut start)
    }

    fn receive_page(&mut self, slot: usize, gpa: u64) -> Result<(), SevError> {
        let packet = self.exchange.packet(slot)?;
        let mut receive = kvm_sev_receive_update_data {
            guest_uaddr: self.page(gpa)?,
            guest_len: PAGE_SIZE as u32,
            ..kvm_sev_receive_update_data::default()
        };
        (receive.hdr_uaddr, receive.hdr_len) = address(&packet.header)?;
        (receive.trans_uaddr, receive.trans_len) = address(&packet.data)?;
        self.commands.give(&mut receive)
    }
}

impl<V: SevVm> Firmware for KvmSev<V> {
    fn launch_start(&mut self, binding: &LaunchBinding) -> Result<(), RoleError> {
        Ok(self.start(binding.session.as_ref())?)
    }

    fn launch_update(&mut self, gpa: u64, length: u64) -> Result<(), RoleError> {
        Ok(self.update(gpa, length)?)
    }

    fn launch_vcpus(&mut self, _vmsas: &[VmsaPage]) -> Result<(), RoleError> {
        match self.kind {
            GuestKind::SevEs => Ok(self.measure_registers()?),
            GuestKind::Sev | GuestKind::Snp => Ok(()),
        }
    }

    fn launch_measure(&mut self) -> Result<Option<Measurement>, RoleError> {
        Ok(Some(self.measure()?))
    }

    fn launch_secret(
        &mut self,
        header: &[u8],
        ciphertext: &[u8],
        gpa: u64,
    ) -> Result<(), RoleError> {
        Ok(self.secret(header, ciphertext, gpa)?)
    }

    fn launch_finish(&mut self) -> Result<Option<SnpLaunchDigest>, RoleError> {
        self.commands.give_plain(Command::LAUNCH_FINISH)?;
        Ok(None)
    }

    fn send_start(&mut self, target: &PlatformEvidence) -> Result<SendStarted, RoleError> {
        let pdh = self.device.pdh_cert_export()?.pdh;
        let (policy, session) = self.open_send(target)?;
        Ok((policy, pdh, session))
    }

    fn send_pages(&mut self, gpas: &[u64]) -> Result<(), RoleError> {
        for (slot, &gpa) in gpas.iter().enumerate() {
            self.send_page(slot, gpa)?;
        }
        Ok(())
    }

    fn send_finish(&mut self) -> Result<(), RoleError> {
        Ok(self.commands.give_plain(Command::SEND_FINISH)?)
    }

    fn send_cancel(&mut self) -> Result<(), RoleError> {
        Ok(self.commands.give_plain(Command::SEND_CANCEL)?)
    }

    fn evidence(&mut self) -> Result<PlatformEvidence, RoleError> {
        if self.amd.is_empty() {
            return Err(RoleError::new(
                "AMD_CERTIFICATES",
                "no source sends a guest here without AMD's certificates of this processor (ASK and ARK); name their \
                 file as `amd_certificates` in the agent's configuration",
            ));
        }
        let certificates = self.device.pdh_cert_export()?;
        Ok(PlatformEvidence {
            pdh: certificates.pdh,
            platform: certificates.chain,
            amd: self.amd.clone(),
        })
    }

    fn receive_start(
        &mut self,
        policy: u32,
        source_pdh: &[u8],
        session: &[u8],
    ) -> Result<(), RoleError> {
        check_arrival(policy, self.policy)?;
        Ok(self.open_receive(source_pdh, session)?)
    }

    fn receive_pages(&mut self, gpas: &[u64]) -> Result<(), RoleError> {
        for (slot, &gpa) in gpas.iter().enumerate() {
            self.receive_page(slot, gpa)?;
        }
        Ok(())
    }

    fn receive_finish(&mut self) -> Result<(), RoleError> {
        Ok(self.commands.give_plain(Command::RECEIVE_FINISH)?)
    }

    fn decommission(&mut self) {
        // KVM deactivates and decommissions when the virtual machine goes.
    }
}

const _: () = assert!(HEADER == 52, "the firmware's packet header");

#[cfg(test)]
#[expect(unsafe_code, reason = "the stand-in reads what the kernel would")]
mod tests {
    use super::*;
    use crate::confidential::shared::sealed_memfd;
    use crate::vmm::protocol::EXCHANGE_SIZE;
    use kvm_bindings::kvm_sev_cmd;
    use nix::errno::Errno;
    use std::os::fd::AsFd;
    use std::sync::{Arc, Mutex};

    /// Command ids and the first 72 bytes of their parameters.
    type Log = Arc<Mutex<Vec<(u32, [u64; 9])>>>;

    struct Double {
        log: Log,
        fail: Option<(u32, u32)>,
    }

    impl SevVm for Double {
        fn command(&mut self, command: &mut kvm_sev_cmd) -> Result<(), Errno> {
            let words = size(command.id) / 8;
            let mut seen = [0u64; 9];
            for (index, word) in seen.iter_mut().take(words).enumerate() {
                assert_ne!(command.data, 0, "parameters of {}", command.id);
                // SAFETY: the backend passes the structure of this command, which has `words` whole words.
                *word = unsafe { (command.data as *const u64).add(index).read_unaligned() };
            }
            self.log.lock().unwrap().push((command.id, seen));
            match self.fail {
                Some((id, error)) if id == command.id => {
                    command.error = error;
                    Err(Errno::EIO)
                }
                _ => Ok(()),
            }
        }

        fn register(&mut self, region: &kvm_enc_region) -> Result<(), Errno> {
            let mut seen = [0; 9];
            seen[..2].copy_from_slice(&[region.addr, region.size]);
            self.log.lock().unwrap().push((u32::MAX, seen));
            Ok(())
        }
    }

    fn size(id: u32) -> usize {
        match id {
            22 => 48,
            2 | 12 => 40,
            3 | 6 => 16,
            5 | 9 | 13 => 48,
            8 => 72,
            _ => 0,
        }
    }

    fn sev(fail: Option<(u32, u32)>) -> (KvmSev<Double>, Log) {
        sev_as(Initialise::Typed, 1, fail)
    }

    fn sev_as(
        initialise: Initialise,
        policy: u32,
        fail: Option<(u32, u32)>,
    ) -> (KvmSev<Double>, Log) {
        let log = Log::default();
        let (memory, exchange) = (sealed_memfd(16 * 4096), sealed_memfd(EXCHANGE_SIZE as u64));
        let real = RealSev {
            vm: Double {
                log: log.clone(),
                fail,
            },
            initialise,
            device: tempfile::tempfile().unwrap().into(),
            amd: vec![1],
        };
        let layout = MemoryLayout::packed(&[(0, 16 * 4096)]).unwrap();
        let sev = KvmSev::attach(real, policy, memory.as_fd(), layout, exchange.as_fd()).unwrap();
        (sev, log)
    }

    fn ids(log: &Log) -> Vec<u32> {
        log.lock().unwrap().iter().map(|(id, _)| *id).collect()
    }

    #[test]
    fn an_older_kernel_is_initialised_the_older_way_and_memory_is_pinned() {
        assert_eq!(ids(&sev(None).1), [22, u32::MAX]);
        assert_eq!(ids(&sev_as(Initialise::Typed, 5, None).1), [22, u32::MAX]);
        let older = sev_as(Initialise::Older, 5, None).1;
        assert_eq!(ids(&older), [1, u32::MAX], "SEV-ES");
        let (sev, log) = sev_as(Initialise::Older, 1, None);
        assert_eq!(ids(&log), [0, u32::MAX]);
        let region = log.lock().unwrap()[1].1;
        let host = sev.memory.host_address(0, 4096).unwrap();
        assert_eq!(region[..2], [host, 16 * 4096]);
    }

    #[test]
    fn commands_name_the_memory_and_the_lengths_of_the_format() {
        let (mut sev, log) = sev(None);
        let session = OwnerSession {
            certificate: vec![0; 2084],
            blob: vec![0; SESSION],
        };
        let host = sev.memory.host_address(0, 4096).unwrap();
        let binding = LaunchBinding {
            session: Some(session),
            ..LaunchBinding::default()
        };
        sev.launch_start(&binding).unwrap();
        sev.launch_update(4096, 8192).unwrap();
        sev.launch_secret(&[0; HEADER], &[0; 64], 3 * 4096).unwrap();
        sev.launch_finish().unwrap();
        sev.send_pages(&[5 * 4096, 0]).unwrap();
        sev.send_cancel().unwrap();
        assert_eq!(ids(&log)[2..], [2, 3, 5, 7, 9, 9, 21]);
        let log = log.lock().unwrap();
        let start = log[2].1;
        assert_eq!(start[0] >> 32, 1, "policy behind the handle");
        assert_eq!((start[2], start[4]), (2084, 128));
        assert_eq!(log[3].1[..2], [host + 4096, 8192]);
        let secret = log[4].1;
        assert_eq!((secret[1], secret[5]), (52, 64));
        assert_eq!(secret[2..4], [host + 3 * 4096, 64]);
        let send = log[6].1;
        assert_eq!((send[1], send[3], send[5]), (52, 4096, 4096));
        assert_eq!((send[2], log[7].1[2]), (host + 5 * 4096, host));
    }

    #[test]
    fn a_refusal_names_the_command_and_the_firmwares_code() {
        let (mut sev, _) = sev(Some((2, 7)));
        let error = sev.launch_start(&LaunchBinding::default()).unwrap_err();
        assert!(
            error.text.contains("LAUNCH_START") && error.text.contains("0x7"),
            "{error}"
        );
        // The stand-in for /dev/sev is a plain file: its ioctl fails, and that is said.
        let error = sev.evidence().unwrap_err();
        assert!(error.text.contains("PDH_CERT_EXPORT"), "{error}");
        // Without AMD's certificates no source would believe them.
        let amd = std::mem::take(&mut sev.amd);
        let error = sev.evidence().unwrap_err();
        assert_eq!(error.code, "AMD_CERTIFICATES");
        assert!(error.text.contains("`amd_certificates`"), "{error}");
        sev.amd = amd;
        assert!(
            sev.launch_update(15 * 4096, 8192).is_err(),
            "outside memory"
        );
        assert_eq!(
            sev.receive_start(3, &[], &[]).unwrap_err().code,
            "POLICY_FAILURE"
        );
    }

    #[test]
    fn the_registers_of_a_sev_es_guest_are_measured_and_it_does_not_move() {
        let (mut sev, log) = sev_as(Initialise::Typed, 5, None);
        sev.launch_vcpus(&[]).unwrap();
        // The stand-in for /dev/sev is no device, so the status behind the measurement fails.
        assert!(sev.launch_measure().is_err());
        assert_eq!(ids(&log)[2..], [4, 6, 16]);
        let error = sev.receive_start(5, &[0], &[0]).unwrap_err();
        assert_eq!(error.code, "SEV_NOT_SUPPORTED");
        assert!(error.text.contains("launch it anew"), "{error}");
        assert_eq!(ids(&log).len(), 5, "the firmware is not asked");
    }
}
