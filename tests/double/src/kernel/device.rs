//! `/dev/sev`, with the checks of Linux 6.12's `sev_ioctl` in its order.

use casemate_attest::processor::FirmwareError;
use casemate_attest::processor::snp::{SnpConfig, SnpProcessor};
use casemate_attest::tcb::RawTcb;
use nix::errno::Errno;

use super::fields::Fields;
use super::launch::{BLOB_MAX, CERTIFICATE, blob};
use super::{Kernel, Outcome, Refusal};
use crate::memory::Caller;

impl Kernel {
    /// `sev_ioctl`.
    pub(super) fn device_ioctl(
        &mut self,
        caller: Caller,
        descriptor: u64,
        argument: u64,
    ) -> Outcome {
        let mut issue = Fields::read(caller, argument, 16)?;
        let (number, data) = (issue.u32(0), issue.u64(4));
        let Some(name) = name(number) else {
            self.note(
                &format!("/dev/sev command {number}"),
                &Err(Errno::EINVAL.into()),
            );
            return Err(Errno::EINVAL.into());
        };
        let writable = caller.writable(descriptor);
        let outcome = self
            .script
            .kernel(name)
            .map_err(Refusal::from)
            .and_then(|()| self.device_command(number, caller, data, writable));
        self.note(&format!("/dev/sev {name}"), &outcome);
        issue.set(
            12,
            &outcome.map_or_else(Refusal::code, |()| 0).to_le_bytes(),
        );
        issue.write_back()?;
        outcome
    }

    fn device_command(
        &mut self,
        number: u32,
        caller: Caller,
        data: u64,
        writable: bool,
    ) -> Outcome {
        let name = name(number).unwrap_or_default();
        let changes = matches!(number, 0 | 2 | 3 | 4 | 6 | 11 | 12);
        match number {
            9..=12 => self.snp_command(number, caller, data, writable),
            _ if changes && !writable => Err(Errno::EPERM.into()),
            1 => self.platform_status(caller, data),
            5 => self.pdh_cert_export(caller, data),
            3 => {
                let csr = Fields::read(caller, data, 12)?;
                if csr.u64(0) != 0 && csr.u32(8) > BLOB_MAX {
                    return Err(Errno::EFAULT.into());
                }
                self.unsupported(name)
            }
            6 => {
                let import = Fields::read(caller, data, 24)?;
                let pek = blob(caller, import.u64(0), import.u32(8))?;
                let oca = blob(caller, import.u64(12), import.u32(20))?;
                if pek.len() != CERTIFICATE || oca.len() != CERTIFICATE {
                    self.complain(name, "a certificate has not the length of one");
                }
                self.unsupported(name)
            }
            8 => {
                Fields::read(caller, data, 12)?;
                self.unsupported(name)
            }
            _ => self.unsupported(name),
        }
    }

    /// `sev_ioctl_do_platform_status`.
    fn platform_status(&mut self, caller: Caller, data: u64) -> Outcome {
        let status = self.firmware("PLATFORM_STATUS", |processor| Ok(processor.status()))?;
        let flags = u32::from(status.owned) | u32::from(status.config_es) << 8;
        let mut bytes = vec![status.api.major, status.api.minor, status.state as u8];
        bytes.extend_from_slice(&flags.to_le_bytes());
        bytes.push(status.build);
        bytes.extend_from_slice(&status.guest_count.to_le_bytes());
        Ok(caller.write(data, &bytes)?)
    }

    /// `sev_ioctl_do_pdh_export`.
    fn pdh_cert_export(&mut self, caller: Caller, data: u64) -> Outcome {
        let mut export = Fields::read(caller, data, 24)?;
        let (pdh, pdh_length) = (export.u64(0), export.u32(8));
        let (chain, chain_length) = (export.u64(12), export.u32(20));
        let query = pdh == 0 || pdh_length == 0 || chain == 0;
        if !query && (pdh_length > BLOB_MAX || chain_length > BLOB_MAX) {
            return Err(Errno::EFAULT.into());
        }
        let (one, three) = (CERTIFICATE as u32, 3 * CERTIFICATE as u32);
        let exported = self.firmware("PDH_CERT_EXPORT", |processor| {
            let certificates = processor.pdh_cert_export()?;
            if query || pdh_length < one || chain_length < three {
                return Err(FirmwareError::InvalidLength { needed: three });
            }
            let pdh = certificates.pdh.as_bytes().to_vec();
            Ok((pdh, certificates.platform_certs()))
        });
        // The lengths come back whatever the firmware says.
        if exported != Err(Refusal::Firmware(INVALID_PLATFORM_STATE)) {
            export.set(8, &one.to_le_bytes());
            export.set(20, &three.to_le_bytes());
        }
        export.write_back()?;
        let certificates = exported?;
        caller.write(pdh, &certificates.0)?;
        Ok(caller.write(chain, &certificates.1)?)
    }

    /// The SNP commands.
    fn snp_command(&mut self, number: u32, caller: Caller, data: u64, writable: bool) -> Outcome {
        let name = name(number).unwrap_or_default();
        if number == 9 {
            return self.snp_status(caller, data);
        }
        // SNP is not initialised, or there is no structure.
        if self.snp().is_none() || (number != 10 && data == 0) {
            return Err(Errno::EINVAL.into());
        }
        if number != 10 && !writable {
            return Err(Errno::EPERM.into());
        }
        match number {
            11 => {
                let config = Fields::read(caller, data, 64)?;
                if !config.is_zero(12, 52) || config.u32(8) & !3 != 0 {
                    self.complain(name, "reserved fields are not zero");
                }
                let config = SnpConfig {
                    reported_tcb: RawTcb(config.bytes(0)),
                    mask_chip_id: config.u32(8) & 1 != 0,
                    mask_chip_key: config.u32(8) & 2 != 0,
                };
                self.snp_firmware(name, |snp| snp.configure(&config))
            }
            12 => {
                let load = Fields::read(caller, data, 16)?;
                if load.u32(0) != 16 || load.u8(4) != 0 {
                    return Err(Errno::EINVAL.into());
                }
                if load.bytes::<3>(5) != [0; 3] {
                    self.complain(name, "reserved fields are not zero");
                }
                let wrapped = blob(caller, load.u64(8), VLEK_WRAPPED)?;
                self.snp_firmware(name, |snp| snp.vlek_load(&wrapped))
            }
            _ => self.snp_firmware(name, SnpProcessor::commit),
        }
    }

    fn snp_status(&mut self, caller: Caller, data: u64) -> Outcome {
        if data == 0 {
            return Err(Errno::EINVAL.into());
        }
        if self.snp().is_none() {
            self.script
                .firmware("SNP_PLATFORM_STATUS")
                .map_err(Refusal::Firmware)?;
            return Ok(caller.write(data, &[0; 32])?);
        }
        let status = self.snp_firmware("SNP_PLATFORM_STATUS", |snp| Ok(snp.status()))?;
        let flags = u32::from(status.mask_chip_id)
            | u32::from(status.mask_chip_key) << 1
            | u32::from(status.vlek_loaded) << 2;
        let firmware = status.firmware;
        let mut bytes = vec![firmware.major, firmware.minor, status.state as u8, 1];
        bytes.extend_from_slice(&u32::from(firmware.build).to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
        bytes.extend_from_slice(&status.guest_count.to_le_bytes());
        bytes.extend_from_slice(&status.current_tcb.0);
        bytes.extend_from_slice(&status.reported_tcb.0);
        Ok(caller.write(data, &bytes)?)
    }

    /// What the software processor has not.
    fn unsupported(&mut self, name: &str) -> Outcome {
        self.firmware(name, |_| Err(FirmwareError::Unsupported))
    }
}

fn name(number: u32) -> Option<&'static str> {
    Some(match number {
        0 => "FACTORY_RESET",
        1 => "PLATFORM_STATUS",
        2 => "PEK_GEN",
        3 => "PEK_CSR",
        4 => "PDH_GEN",
        5 => "PDH_CERT_EXPORT",
        6 => "PEK_CERT_IMPORT",
        8 => "GET_ID",
        9 => "SNP_PLATFORM_STATUS",
        10 => "SNP_COMMIT",
        11 => "SNP_CONFIG",
        12 => "SNP_VLEK_LOAD",
        _ => return None,
    })
}

const VLEK_WRAPPED: u32 = 432;
const INVALID_PLATFORM_STATE: u32 = 1;
