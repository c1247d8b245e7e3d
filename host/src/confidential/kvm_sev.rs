//! AMD's secure processor for a plain SEV guest: KVM's encryption commands, and `/dev/sev` for what belongs to
//! the platform.
//!
//! **Not yet met silicon.** No machine with an AMD secure processor was at hand: layouts and the order of
//! commands are tested here against a double, the commands themselves against nothing. The VMM does not boot
//! real SEV guests yet (encrypted page tables, shared pages), so nothing opens this but a VMM that can.
//!
//! All numbers are Linux's `include/uapi/linux/psp-sev.h` and `arch/x86/include/uapi/asm/kvm.h`. Packets come
//! from the exchange memory, whose other side writes when it likes: they are copied before the firmware reads.
#![expect(
    unsafe_code,
    reason = "the ioctl of /dev/sev takes addresses as numbers"
)]

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use casemate_crypto_migrate::guest::PAGE_SIZE;
use kvm_bindings::{
    kvm_enc_region, kvm_sev_cmd, kvm_sev_guest_status, kvm_sev_init, kvm_sev_launch_measure,
    kvm_sev_launch_secret, kvm_sev_launch_start, kvm_sev_launch_update_data, kvm_sev_receive_start,
    kvm_sev_receive_update_data, kvm_sev_send_start, kvm_sev_send_update_data, sev_cmd_id,
    sev_cmd_id_KVM_SEV_GUEST_STATUS, sev_cmd_id_KVM_SEV_INIT, sev_cmd_id_KVM_SEV_INIT2,
    sev_cmd_id_KVM_SEV_LAUNCH_FINISH, sev_cmd_id_KVM_SEV_LAUNCH_MEASURE,
    sev_cmd_id_KVM_SEV_LAUNCH_SECRET, sev_cmd_id_KVM_SEV_LAUNCH_START,
    sev_cmd_id_KVM_SEV_LAUNCH_UPDATE_DATA, sev_cmd_id_KVM_SEV_RECEIVE_FINISH,
    sev_cmd_id_KVM_SEV_RECEIVE_START, sev_cmd_id_KVM_SEV_RECEIVE_UPDATE_DATA,
    sev_cmd_id_KVM_SEV_SEND_CANCEL, sev_cmd_id_KVM_SEV_SEND_FINISH, sev_cmd_id_KVM_SEV_SEND_START,
    sev_cmd_id_KVM_SEV_SEND_UPDATE_DATA,
};
use kvm_ioctls::VmFd;
use nix::errno::Errno;

use crate::confidential::launch::Firmware;
use crate::confidential::protocol::PlatformEvidence;
use crate::confidential::shared::{Access, Exchange, GuestMemory, HEADER, MemoryLayout, Packet};
use crate::vmm::protocol::{Measurement, OwnerSession, RoleError};

/// The two ioctls of a virtual machine that SEV needs.
pub trait SevVm: Send {
    /// `KVM_MEMORY_ENCRYPT_OP`.
    fn command(&mut self, command: &mut kvm_sev_cmd) -> Result<(), Errno>;
    /// `KVM_MEMORY_ENCRYPT_REG_REGION`: pins the memory.
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

/// What a VMM hands in for a real SEV guest.
pub struct RealSev<V: SevVm> {
    /// The virtual machine, without memory or vCPUs used yet.
    pub vm: V,
    /// `/dev/sev`.
    pub device: OwnedFd,
    /// ASK ‖ ARK of this processor, as AMD publishes them.
    pub amd: Vec<u8>,
}

/// A SEV guest of KVM.
pub struct KvmSev<V: SevVm> {
    vm: V,
    device: File,
    amd: Vec<u8>,
    policy: u32,
    memory: GuestMemory,
    exchange: Exchange,
}

impl<V: SevVm> KvmSev<V> {
    /// Makes the virtual machine a SEV one and pins its memory.
    pub fn attach(
        real: RealSev<V>,
        policy: u32,
        memory: BorrowedFd<'_>,
        layout: MemoryLayout,
        exchange: BorrowedFd<'_>,
    ) -> Result<Self, RoleError> {
        let mut sev = Self {
            vm: real.vm,
            device: File::from(real.device),
            amd: real.amd,
            policy,
            memory: GuestMemory::map(memory, layout, Access::ReadWrite)?,
            exchange: Exchange::map(exchange)?,
        };
        sev.initialise()?;
        for run in sev.memory.layout().runs().to_vec() {
            let region = kvm_enc_region {
                addr: sev.memory.host_address(run.gpa, run.length)?,
                size: run.length,
            };
            sev.vm
                .register(&region)
                .map_err(|e| refused("KVM_MEMORY_ENCRYPT_REG_REGION", e, 0))?;
        }
        Ok(sev)
    }

    /// INIT2 where the kernel and the type of the machine have it, INIT otherwise.
    fn initialise(&mut self) -> Result<(), RoleError> {
        let mut init = kvm_sev_init::default();
        match self.issue(sev_cmd_id_KVM_SEV_INIT2, Some(&mut init)) {
            Err((Errno::EINVAL, _)) => self.command::<()>("INIT", sev_cmd_id_KVM_SEV_INIT, None),
            other => other.map_err(|(e, firmware)| refused("INIT2", e, firmware)),
        }
    }

    fn command<T>(
        &mut self,
        name: &str,
        id: sev_cmd_id,
        parameters: Option<&mut T>,
    ) -> Result<(), RoleError> {
        self.issue(id, parameters)
            .map_err(|(errno, firmware)| refused(name, errno, firmware))
    }

    fn issue<T>(&mut self, id: sev_cmd_id, parameters: Option<&mut T>) -> Result<(), (Errno, u32)> {
        let data = parameters.map_or(0, |parameters| std::ptr::from_mut(parameters) as u64);
        let descriptor = u32::try_from(self.device.as_raw_fd()).unwrap_or(u32::MAX);
        let mut command = kvm_sev_cmd {
            id,
            data,
            sev_fd: descriptor,
            ..kvm_sev_cmd::default()
        };
        self.vm
            .command(&mut command)
            .map_err(|errno| (errno, command.error))
    }

    fn page(&self, gpa: u64) -> Result<u64, RoleError> {
        Ok(self.memory.host_address(gpa, PAGE_SIZE as u64)?)
    }

    fn platform_status(&self) -> Result<SevUserStatus, RoleError> {
        let mut status = SevUserStatus::default();
        self.device_command(SEV_PLATFORM_STATUS, std::ptr::from_mut(&mut status) as u64)?;
        Ok(status)
    }

    fn device_command(&self, command: u32, data: u64) -> Result<(), RoleError> {
        let mut issue = SevIssue {
            command,
            data,
            error: 0,
        };
        // SAFETY: `issue` is the structure that this ioctl takes and lives through the call; `data` is the
        // address of the command's own structure, which the two callers hold, as they hold the buffers named
        // in it with their lengths.
        unsafe { number::sev_issue_cmd(self.device.as_raw_fd(), &raw mut issue) }
            .map(drop)
            .map_err(|errno| {
                let firmware = issue.error;
                refused(&format!("/dev/sev command {command}"), errno, firmware)
            })
    }
}

impl<V: SevVm> Firmware for KvmSev<V> {
    fn launch_start(&mut self, session: Option<&OwnerSession>) -> Result<(), RoleError> {
        let mut start = kvm_sev_launch_start {
            policy: self.policy,
            ..kvm_sev_launch_start::default()
        };
        if let Some(session) = session {
            (start.dh_uaddr, start.dh_len) = address(&session.certificate)?;
            (start.session_uaddr, start.session_len) = address(&session.blob)?;
        }
        self.command(
            "LAUNCH_START",
            sev_cmd_id_KVM_SEV_LAUNCH_START,
            Some(&mut start),
        )
    }

    fn launch_update(&mut self, gpa: u64, length: u64) -> Result<(), RoleError> {
        let mut update = kvm_sev_launch_update_data {
            uaddr: self.memory.host_address(gpa, length)?,
            len: u32::try_from(length)
                .map_err(|_| RoleError::new("BAD_REQUEST", "a run to measure is 4 GiB at most"))?,
            ..kvm_sev_launch_update_data::default()
        };
        let id = sev_cmd_id_KVM_SEV_LAUNCH_UPDATE_DATA;
        self.command("LAUNCH_UPDATE_DATA", id, Some(&mut update))
    }

    fn launch_measure(&mut self) -> Result<Measurement, RoleError> {
        let mut blob = vec![0u8; MEASURE];
        let mut measure = kvm_sev_launch_measure::default();
        (measure.uaddr, measure.len) = address_mut(&mut blob)?;
        let id = sev_cmd_id_KVM_SEV_LAUNCH_MEASURE;
        self.command("LAUNCH_MEASURE", id, Some(&mut measure))?;
        let mut guest = kvm_sev_guest_status::default();
        let id = sev_cmd_id_KVM_SEV_GUEST_STATUS;
        self.command("GUEST_STATUS", id, Some(&mut guest))?;
        let status = self.platform_status()?;
        Ok(Measurement {
            blob,
            api: (status.api_major, status.api_minor, status.build),
            policy: guest.policy,
            elapsed_us: 0,
        })
    }

    fn launch_secret(
        &mut self,
        header: &[u8],
        ciphertext: &[u8],
        gpa: u64,
    ) -> Result<(), RoleError> {
        let mut secret = kvm_sev_launch_secret::default();
        (secret.hdr_uaddr, secret.hdr_len) = address(header)?;
        (secret.trans_uaddr, secret.trans_len) = address(ciphertext)?;
        secret.guest_uaddr = self.memory.host_address(gpa, ciphertext.len() as u64)?;
        secret.guest_len = secret.trans_len;
        let id = sev_cmd_id_KVM_SEV_LAUNCH_SECRET;
        self.command("LAUNCH_SECRET", id, Some(&mut secret))
    }

    fn launch_finish(&mut self) -> Result<(), RoleError> {
        self.command::<()>("LAUNCH_FINISH", sev_cmd_id_KVM_SEV_LAUNCH_FINISH, None)
    }

    fn send_start(
        &mut self,
        target: &PlatformEvidence,
    ) -> Result<(u32, Vec<u8>, Vec<u8>), RoleError> {
        let mut session = vec![0u8; SESSION];
        let mut start = kvm_sev_send_start::default();
        (start.pdh_cert_uaddr, start.pdh_cert_len) = address(&target.pdh)?;
        (start.plat_certs_uaddr, start.plat_certs_len) = address(&target.platform)?;
        (start.amd_certs_uaddr, start.amd_certs_len) = address(&target.amd)?;
        (start.session_uaddr, start.session_len) = address_mut(&mut session)?;
        let id = sev_cmd_id_KVM_SEV_SEND_START;
        self.command("SEND_START", id, Some(&mut start))?;
        Ok((start.policy, self.evidence()?.pdh, session))
    }

    fn send_pages(&mut self, gpas: &[u64]) -> Result<(), RoleError> {
        for (slot, &gpa) in gpas.iter().enumerate() {
            let mut packet = Packet::default();
            let mut send = kvm_sev_send_update_data {
                guest_uaddr: self.page(gpa)?,
                guest_len: PAGE_SIZE as u32,
                ..kvm_sev_send_update_data::default()
            };
            (send.hdr_uaddr, send.hdr_len) = address_mut(&mut packet.header)?;
            (send.trans_uaddr, send.trans_len) = address_mut(&mut packet.data)?;
            let id = sev_cmd_id_KVM_SEV_SEND_UPDATE_DATA;
            self.command("SEND_UPDATE_DATA", id, Some(&mut send))?;
            self.exchange
                .put_packet(slot, &packet.header, &packet.data)?;
        }
        Ok(())
    }

    fn send_finish(&mut self) -> Result<(), RoleError> {
        self.command::<()>("SEND_FINISH", sev_cmd_id_KVM_SEV_SEND_FINISH, None)
    }

    fn send_cancel(&mut self) -> Result<(), RoleError> {
        self.command::<()>("SEND_CANCEL", sev_cmd_id_KVM_SEV_SEND_CANCEL, None)
    }

    fn evidence(&mut self) -> Result<PlatformEvidence, RoleError> {
        let mut pdh = vec![0u8; CERTIFICATE];
        let mut platform = vec![0u8; 3 * CERTIFICATE];
        let mut export = SevUserPdhExport::default();
        (export.pdh, export.pdh_length) = address_mut(&mut pdh)?;
        (export.chain, export.chain_length) = address_mut(&mut platform)?;
        self.device_command(SEV_PDH_CERT_EXPORT, std::ptr::from_mut(&mut export) as u64)?;
        Ok(PlatformEvidence {
            pdh,
            platform,
            amd: self.amd.clone(),
        })
    }

    fn receive_start(
        &mut self,
        policy: u32,
        source_pdh: &[u8],
        session: &[u8],
    ) -> Result<(), RoleError> {
        if policy != self.policy {
            return Err(RoleError::new(
                "POLICY_FAILURE",
                format!(
                    "the guest arrives with policy {policy:#x}, its description says {:#x}",
                    self.policy
                ),
            ));
        }
        let mut start = kvm_sev_receive_start {
            policy,
            ..kvm_sev_receive_start::default()
        };
        (start.pdh_uaddr, start.pdh_len) = address(source_pdh)?;
        (start.session_uaddr, start.session_len) = address(session)?;
        let id = sev_cmd_id_KVM_SEV_RECEIVE_START;
        self.command("RECEIVE_START", id, Some(&mut start))
    }

    fn receive_pages(&mut self, gpas: &[u64]) -> Result<(), RoleError> {
        for (slot, &gpa) in gpas.iter().enumerate() {
            let packet = self.exchange.packet(slot)?;
            let mut receive = kvm_sev_receive_update_data {
                guest_uaddr: self.page(gpa)?,
                guest_len: PAGE_SIZE as u32,
                ..kvm_sev_receive_update_data::default()
            };
            (receive.hdr_uaddr, receive.hdr_len) = address(&packet.header)?;
            (receive.trans_uaddr, receive.trans_len) = address(&packet.data)?;
            let id = sev_cmd_id_KVM_SEV_RECEIVE_UPDATE_DATA;
            self.command("RECEIVE_UPDATE_DATA", id, Some(&mut receive))?;
        }
        Ok(())
    }

    fn receive_finish(&mut self) -> Result<(), RoleError> {
        self.command::<()>("RECEIVE_FINISH", sev_cmd_id_KVM_SEV_RECEIVE_FINISH, None)
    }

    fn decommission(&mut self) {
        // KVM deactivates and decommissions when the virtual machine goes.
    }
}

/// A buffer the kernel only reads, as an ioctl names it; the caller holds it through the command.
fn address(buffer: &[u8]) -> Result<(u64, u32), RoleError> {
    Ok((buffer.as_ptr() as u64, length(buffer)?))
}

/// A buffer the kernel writes, as an ioctl names it; the caller holds it through the command.
fn address_mut(buffer: &mut [u8]) -> Result<(u64, u32), RoleError> {
    let length = length(buffer)?;
    Ok((buffer.as_mut_ptr() as u64, length))
}

fn length(buffer: &[u8]) -> Result<u32, RoleError> {
    u32::try_from(buffer.len()).map_err(|_| RoleError::new("BAD_REQUEST", "a buffer is too long"))
}

fn refused(what: &str, errno: Errno, firmware: u32) -> RoleError {
    let text = match firmware {
        0 => format!("{what} refused by the kernel: {errno}"),
        code => format!("{what} refused by the secure processor with code {code:#x} ({errno})"),
    };
    RoleError::new("SEV_REFUSED", text)
}

/// `struct sev_issue_cmd`.
#[repr(C, packed)]
struct SevIssue {
    command: u32,
    data: u64,
    error: u32,
}

/// `struct sev_user_data_status`.
#[repr(C, packed)]
#[derive(Default)]
struct SevUserStatus {
    api_major: u8,
    api_minor: u8,
    state: u8,
    flags: u32,
    build: u8,
    guest_count: u32,
}

/// `struct sev_user_data_pdh_cert_export`.
#[repr(C, packed)]
#[derive(Default)]
struct SevUserPdhExport {
    pdh: u64,
    pdh_length: u32,
    chain: u64,
    chain_length: u32,
}

/// `SEV_ISSUE_CMD`; the macro's function has no place for documentation.
mod number {
    nix::ioctl_readwrite!(sev_issue_cmd, b'S', 0x0, super::SevIssue);
}

const SEV_PLATFORM_STATUS: u32 = 1;
const SEV_PDH_CERT_EXPORT: u32 = 5;
const CERTIFICATE: usize = 2084;
const SESSION: usize = 128;
const MEASURE: usize = 48;
const _: () = assert!(HEADER == 52, "the firmware's packet header");

#[cfg(test)]
mod tests {
    use super::*;
    use crate::confidential::shared::sealed_memfd;
    use crate::vmm::protocol::EXCHANGE_SIZE;
    use std::mem::{offset_of, size_of};
    use std::os::fd::AsFd;
    use std::sync::Mutex;

    /// Command ids and the first 72 bytes of their parameters.
    type Log = Arc<Mutex<Vec<(u32, [u64; 9])>>>;

    struct Double {
        log: Log,
        old_kernel: bool,
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
            if self.old_kernel && command.id == 22 {
                return Err(Errno::EINVAL);
            }
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

    fn sev(old_kernel: bool, fail: Option<(u32, u32)>) -> (KvmSev<Double>, Log) {
        let log = Log::default();
        let (memory, exchange) = (sealed_memfd(16 * 4096), sealed_memfd(EXCHANGE_SIZE as u64));
        let real = RealSev {
            vm: Double {
                log: log.clone(),
                old_kernel,
                fail,
            },
            device: tempfile::tempfile().unwrap().into(),
            amd: vec![],
        };
        let layout = MemoryLayout::packed(&[(0, 16 * 4096)]).unwrap();
        let sev = KvmSev::attach(real, 1, memory.as_fd(), layout, exchange.as_fd()).unwrap();
        (sev, log)
    }

    fn ids(log: &Log) -> Vec<u32> {
        log.lock().unwrap().iter().map(|(id, _)| *id).collect()
    }

    #[test]
    fn structures_have_the_kernels_layout() {
        assert_eq!(size_of::<SevIssue>(), 16);
        assert_eq!(offset_of!(SevIssue, data), 4);
        assert_eq!(offset_of!(SevIssue, error), 12);
        assert_eq!(size_of::<SevUserStatus>(), 12);
        assert_eq!(offset_of!(SevUserStatus, flags), 3);
        assert_eq!(offset_of!(SevUserStatus, build), 7);
        assert_eq!(offset_of!(SevUserStatus, guest_count), 8);
        assert_eq!(size_of::<SevUserPdhExport>(), 24);
        assert_eq!(offset_of!(SevUserPdhExport, chain), 12);
        assert_eq!(offset_of!(SevUserPdhExport, chain_length), 20);
        assert_eq!(size_of::<kvm_sev_cmd>(), 24);
        assert_eq!(size_of::<kvm_sev_init>(), size(22));
        assert_eq!(size_of::<kvm_sev_launch_start>(), size(2));
        assert_eq!(size_of::<kvm_sev_receive_start>(), size(12));
        assert_eq!(size_of::<kvm_sev_launch_update_data>(), size(3));
        assert_eq!(size_of::<kvm_sev_launch_measure>(), size(6));
        assert_eq!(size_of::<kvm_sev_launch_secret>(), size(5));
        assert_eq!(size_of::<kvm_sev_send_start>(), size(8));
        assert_eq!(size_of::<kvm_sev_send_update_data>(), size(9));
        assert_eq!(size_of::<kvm_sev_receive_update_data>(), size(13));
        assert_eq!(size_of::<kvm_sev_guest_status>(), 12);
        assert_eq!(size_of::<kvm_enc_region>(), 16);
    }

    #[test]
    fn an_older_kernel_is_initialised_the_older_way_and_memory_is_pinned() {
        assert_eq!(ids(&sev(false, None).1), [22, u32::MAX]);
        let (sev, log) = sev(true, None);
        assert_eq!(ids(&log), [22, 0, u32::MAX]);
        let region = log.lock().unwrap()[2].1;
        let host = sev.memory.host_address(0, 4096).unwrap();
        assert_eq!(region[..2], [host, 16 * 4096]);
    }

    #[test]
    fn commands_name_the_memory_and_the_lengths_of_the_format() {
        let (mut sev, log) = sev(false, None);
        let session = OwnerSession {
            certificate: vec![0; CERTIFICATE],
            blob: vec![0; SESSION],
        };
        let host = sev.memory.host_address(0, 4096).unwrap();
        sev.launch_start(Some(&session)).unwrap();
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
        let (mut sev, _) = sev(false, Some((2, 7)));
        let error = sev.launch_start(None).unwrap_err();
        assert!(
            error.text.contains("LAUNCH_START") && error.text.contains("0x7"),
            "{error}"
        );
        // The stand-in for /dev/sev is a plain file: its ioctl fails, and that is said.
        let error = sev.evidence().unwrap_err();
        assert!(error.text.contains("/dev/sev"), "{error}");
        assert!(
            sev.launch_update(15 * 4096, 8192).is_err(),
            "outside memory"
        );
        assert_eq!(
            sev.receive_start(3, &[], &[]).unwrap_err().code,
            "POLICY_FAILURE"
        );
    }
}
