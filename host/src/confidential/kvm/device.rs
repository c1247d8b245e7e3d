//! `/dev/sev`: what concerns the platform and not one guest.
#![expect(
    unsafe_code,
    reason = "the ioctl of /dev/sev takes addresses as numbers"
)]

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

use super::code::FirmwareCode;
use super::command::repeated_on_device;
use super::error::SevError;
use super::structs::{
    BLOB_MAX, CERTIFICATE, SevIssue, SevUserGetId2, SevUserPdhCertExport, SevUserPekCertImport,
    SevUserPekCsr, SevUserSnpConfig, SevUserSnpStatus, SevUserSnpVlekLoad, SevUserStatus,
    VLEK_WRAPPED, command,
};

/// The open device.
#[derive(Debug)]
pub struct SevDevice {
    file: File,
}

/// PLATFORM_STATUS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceStatus {
    /// API major, API minor, build.
    pub api: (u8, u8, u8),
    /// UNINIT 0, INIT 1, WORKING 2.
    pub state: u8,
    /// An outside owner has signed the platform.
    pub owned: bool,
    /// SEV-ES is initialised.
    pub es: bool,
    /// SEV and SEV-ES guests that the firmware holds.
    pub guests: u32,
}

/// SNP_PLATFORM_STATUS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnpStatus {
    /// API major, API minor.
    pub api: (u8, u8),
    /// Build.
    pub build: u32,
    /// SNP is initialised.
    pub initialised: bool,
    /// The RMP is initialised.
    pub rmp: bool,
    /// Reports do not carry the chip's id.
    pub masks_chip_id: bool,
    /// Reports are not signed.
    pub masks_chip_key: bool,
    /// A VLEK is loaded; reports are signed with it.
    pub vlek: bool,
    /// SNP guests that the firmware holds.
    pub guests: u32,
    /// TCB that runs; its bytes mean what the processor's product says.
    pub current_tcb: u64,
    /// TCB that reports are signed for.
    pub reported_tcb: u64,
}

/// SNP_SET_CONFIG.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SnpConfig {
    /// TCB that reports are to be signed for; 0 leaves it at the committed one.
    pub reported_tcb: u64,
    /// Reports shall not carry the chip's id.
    pub mask_chip_id: bool,
    /// Reports shall not be signed.
    pub mask_chip_key: bool,
}

/// Certificates as PDH_CERT_EXPORT gives them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlatformCertificates {
    /// PDH, 2084 bytes.
    pub pdh: Vec<u8>,
    /// PEK ‖ OCA ‖ CEK, 6252 bytes.
    pub chain: Vec<u8>,
}

impl SevDevice {
    /// Opens `/dev/sev` for reading and writing.
    pub fn open() -> Result<Self, SevError> {
        let file = OpenOptions::new().read(true).write(true).open(PATH);
        file.map(|file| Self { file })
            .map_err(|error| SevError::Kernel {
                command: "open /dev/sev",
                errno: error
                    .raw_os_error()
                    .map_or(Errno::UnknownErrno, Errno::from_raw),
            })
    }

    /// PLATFORM_STATUS.
    pub fn status(&self) -> Result<DeviceStatus, SevError> {
        let mut status = SevUserStatus::default();
        self.give("PLATFORM_STATUS", command::PLATFORM_STATUS, &mut status)?;
        let flags = status.flags;
        Ok(DeviceStatus {
            api: (status.api_major, status.api_minor, status.build),
            state: status.state,
            owned: flags & 1 != 0,
            es: flags & CONFIG_ES != 0,
            guests: status.guest_count,
        })
    }

    /// PDH_CERT_EXPORT. Initialises the platform where nobody has yet.
    pub fn pdh_cert_export(&self) -> Result<PlatformCertificates, SevError> {
        let (mut pdh, mut chain) = (vec![0u8; CERTIFICATE], vec![0u8; 3 * CERTIFICATE]);
        let mut export = SevUserPdhCertExport::default();
        (export.pdh_cert_address, export.pdh_cert_len) = address_mut(&mut pdh)?;
        (export.cert_chain_address, export.cert_chain_len) = address_mut(&mut chain)?;
        let name = "PDH_CERT_EXPORT";
        self.give(name, command::PDH_CERT_EXPORT, &mut export)?;
        cut(&mut pdh, export.pdh_cert_len, name)?;
        cut(&mut chain, export.cert_chain_len, name)?;
        Ok(PlatformCertificates { pdh, chain })
    }

    /// PEK_CSR: the platform's request for its owner's signature. Needs write permission.
    pub fn pek_csr(&self) -> Result<Vec<u8>, SevError> {
        self.sized::<SevUserPekCsr>("PEK_CSR", command::PEK_CSR)
    }

    /// PEK_CERT_IMPORT: the PEK, signed by the owner, and the owner's own certificate. Needs write permission
    /// and a platform that owns itself.
    pub fn pek_cert_import(&self, pek: &[u8], oca: &[u8]) -> Result<(), SevError> {
        let mut import = SevUserPekCertImport::default();
        (import.pek_cert_address, import.pek_cert_len) = address(pek)?;
        (import.oca_cert_address, import.oca_cert_len) = address(oca)?;
        self.give("PEK_CERT_IMPORT", command::PEK_CERT_IMPORT, &mut import)
    }

    /// PEK_GEN: a new PEK, signed by the platform itself; ends an owner's hold. Needs write permission.
    pub fn pek_gen(&self) -> Result<(), SevError> {
        self.plain("PEK_GEN", command::PEK_GEN)
    }

    /// PDH_GEN: a new PDH; sessions made for the old one fail. Needs write permission.
    pub fn pdh_gen(&self) -> Result<(), SevError> {
        self.plain("PDH_GEN", command::PDH_GEN)
    }

    /// FACTORY_RESET: forgets owner, PEK and PDH; the chip's key stays. Needs write permission and no guests.
    pub fn factory_reset(&self) -> Result<(), SevError> {
        let command = "FACTORY_RESET";
        match self.plain(command, command::FACTORY_RESET) {
            // Linux's own check, and its only use of this error here.
            Err(SevError::Kernel {
                errno: Errno::EBUSY,
                ..
            }) => Err(SevError::GuestsRunning { command }),
            done => done,
        }
    }

    /// GET_ID2: the chip's identity, for the key service; 64 bytes a socket.
    pub fn chip_id(&self) -> Result<Vec<u8>, SevError> {
        self.sized::<SevUserGetId2>("GET_ID", command::GET_ID2)
    }

    /// SNP_PLATFORM_STATUS.
    pub fn snp_status(&self) -> Result<SnpStatus, SevError> {
        let mut status = SevUserSnpStatus::default();
        let number = command::SNP_PLATFORM_STATUS;
        self.give("SNP_PLATFORM_STATUS", number, &mut status)?;
        let flags = status.flags;
        Ok(SnpStatus {
            api: (status.api_major, status.api_minor),
            build: status.build_id,
            initialised: status.state != 0,
            rmp: status.rmp & 1 != 0,
            masks_chip_id: flags & 1 != 0,
            masks_chip_key: flags & 2 != 0,
            vlek: flags & 4 != 0,
            guests: status.guest_count,
            current_tcb: status.current_tcb_version,
            reported_tcb: status.reported_tcb_version,
        })
    }

    /// SNP_SET_CONFIG. Needs write permission.
    pub fn snp_set_config(&self, config: SnpConfig) -> Result<(), SevError> {
        let mut parameters = SevUserSnpConfig {
            reported_tcb: config.reported_tcb,
            flags: u32::from(config.mask_chip_id) | u32::from(config.mask_chip_key) << 1,
            rsvd1: [0; 52],
        };
        self.give("SNP_CONFIG", command::SNP_SET_CONFIG, &mut parameters)
    }

    /// SNP_COMMIT: the firmware that runs becomes the lowest that may run. Cannot be taken back.
    pub fn snp_commit(&self) -> Result<(), SevError> {
        self.plain("SNP_COMMIT", command::SNP_COMMIT)
    }

    /// SNP_VLEK_LOAD: the wrapped hashstick that AMD's key service gave a cloud provider. Needs write permission.
    pub fn snp_vlek_load(&self, wrapped: &[u8; VLEK_WRAPPED]) -> Result<(), SevError> {
        let mut load = SevUserSnpVlekLoad {
            len: size_of::<SevUserSnpVlekLoad>() as u32,
            vlek_wrapped_address: wrapped.as_ptr() as u64,
            ..SevUserSnpVlekLoad::default()
        };
        self.give("SNP_VLEK_LOAD", command::SNP_VLEK_LOAD, &mut load)
    }

    /// The descriptor, as KVM's commands name it.
    pub(super) fn descriptor(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// A command that fills one buffer whose length only the firmware knows: asked for first, without a buffer, so
    /// that none is ever too short. Of a shorter one Linux 6.12 copies back more than it holds.
    fn sized<T: OneBuffer>(&self, name: &'static str, number: u32) -> Result<Vec<u8>, SevError> {
        let mut query = T::default();
        let asked = self.give(name, number, &mut query);
        let needed = query.length();
        match asked {
            Err(SevError::Firmware {
                code: FirmwareCode::INVALID_LEN,
                ..
            }) if needed != 0 => {}
            Err(error) => return Err(error),
            Ok(()) => {
                let (command, what) = (name, "data, where only their length was asked for");
                return Err(SevError::Answer { command, what });
            }
        }
        if needed as usize > BLOB_MAX {
            let (command, what) = (name, "a length beyond all certificates'");
            return Err(SevError::Answer { command, what });
        }
        let mut buffer = vec![0u8; needed as usize];
        let mut request = T::default();
        request.name(address_mut(&mut buffer)?);
        self.give(name, number, &mut request)?;
        cut(&mut buffer, request.length(), name)?;
        Ok(buffer)
    }

    fn give<T>(&self, name: &'static str, number: u32, parameters: &mut T) -> Result<(), SevError> {
        self.issue(name, number, std::ptr::from_mut(parameters) as u64)
    }

    fn plain(&self, name: &'static str, number: u32) -> Result<(), SevError> {
        self.issue(name, number, 0)
    }

    fn issue(&self, name: &'static str, number: u32, data: u64) -> Result<(), SevError> {
        repeated_on_device(name, || {
            let mut issue = SevIssue {
                cmd: number,
                data,
                error: 0,
            };
            // SAFETY: `issue` is the structure that this ioctl takes and lives through the call; `data` is the
            // address of the command's own structure, which the callers above hold, as they hold the buffers
            // named in it with their lengths.
            unsafe { ioctl::sev_issue_cmd(self.descriptor(), &raw mut issue) }
                .map(drop)
                .map_err(|errno| (errno, issue.error))
        })
    }
}

/// A command's structure that is nothing but a buffer's address and length.
trait OneBuffer: Default {
    fn name(&mut self, buffer: (u64, u32));
    fn length(&self) -> u32;
}

impl OneBuffer for SevUserPekCsr {
    fn name(&mut self, buffer: (u64, u32)) {
        (self.address, self.length) = buffer;
    }

    fn length(&self) -> u32 {
        self.length
    }
}

impl OneBuffer for SevUserGetId2 {
    fn name(&mut self, buffer: (u64, u32)) {
        (self.address, self.length) = buffer;
    }

    fn length(&self) -> u32 {
        self.length
    }
}

impl From<OwnedFd> for SevDevice {
    /// `/dev/sev`, opened by someone else.
    fn from(descriptor: OwnedFd) -> Self {
        Self {
            file: File::from(descriptor),
        }
    }
}

/// A buffer the kernel only reads, as an ioctl names it; the caller holds it through the command.
pub(super) fn address(buffer: &[u8]) -> Result<(u64, u32), SevError> {
    Ok((buffer.as_ptr() as u64, length(buffer)?))
}

/// A buffer the kernel writes, as an ioctl names it; the caller holds it through the command.
pub(super) fn address_mut(buffer: &mut [u8]) -> Result<(u64, u32), SevError> {
    let length = length(buffer)?;
    Ok((buffer.as_mut_ptr() as u64, length))
}

/// Shortens a buffer to what the firmware says it has filled.
pub(super) fn cut(
    buffer: &mut Vec<u8>,
    filled: u32,
    command: &'static str,
) -> Result<(), SevError> {
    let filled = filled as usize;
    if filled == 0 || filled > buffer.len() {
        let what = "a length that the buffer does not have";
        return Err(SevError::Answer { command, what });
    }
    buffer.truncate(filled);
    Ok(())
}

fn length(buffer: &[u8]) -> Result<u32, SevError> {
    match u32::try_from(buffer.len()) {
        Ok(length) if buffer.len() <= BLOB_MAX => Ok(length),
        _ => Err(SevError::Request(format!(
            "a certificate, session or packet of {} bytes; the kernel takes {BLOB_MAX} at most",
            buffer.len()
        ))),
    }
}

/// `SEV_ISSUE_CMD`; the macro's function has no place for documentation.
mod ioctl {
    nix::ioctl_readwrite!(sev_issue_cmd, b'S', 0x0, super::SevIssue);
}

/// The device.
pub const PATH: &str = "/dev/sev";
/// `SEV_STATUS_FLAGS_CONFIG_ES`.
const CONFIG_ES: u32 = 0x100;
