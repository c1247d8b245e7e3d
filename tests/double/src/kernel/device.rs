//! `/dev/sev`, with the checks of Linux 6.12's `sev_ioctl` in its order.

use casemate_attest::processor::snp::{SnpConfig, SnpProcessor};
use casemate_attest::processor::{FirmwareError, PlatformState, SecureProcessor};
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
            0 => self.factory_reset(),
            1 => self.platform_status(caller, data),
            2 => {
                self.initialise()?;
                self.firmware(name, SecureProcessor::pek_gen)
            }
            3 => self.pek_csr(caller, data),
            4 => {
                self.initialise()?;
                self.firmware(name, SecureProcessor::pdh_gen)
            }
            5 => self.pdh_cert_export(caller, data, writable),
            6 => self.pek_cert_import(caller, data),
            _ => self.get_id(caller, data),
        }
    }

    /// `__sev_platform_init_locked`, where nobody has initialised the platform yet.
    fn initialise(&mut self) -> Outcome {
        if self.parts.processor.status().state != PlatformState::Uninit {
            return Ok(());
        }
        self.firmware("INIT", SecureProcessor::init)
    }

    /// `sev_ioctl_do_reset`.
    fn factory_reset(&mut self) -> Outcome {
        match self.parts.processor.status().state {
            PlatformState::Working => return Err(Errno::EBUSY.into()),
            PlatformState::Init => self.firmware("SHUTDOWN", |processor| {
                processor.shutdown();
                Ok(())
            })?,
            PlatformState::Uninit => {}
        }
        self.firmware("FACTORY_RESET", SecureProcessor::factory_reset)
    }

    /// `sev_ioctl_do_pek_csr`.
    fn pek_csr(&mut self, caller: Caller, data: u64) -> Outcome {
        let csr = Fields::read(caller, data, 12)?;
        if csr.u64(0) != 0 && csr.u32(8) > BLOB_MAX {
            return Err(Errno::EFAULT.into());
        }
        self.initialise()?;
        self.fill("PEK_CSR", caller, csr, |processor| {
            Ok(processor.pek_csr()?.as_bytes().to_vec())
        })
    }

    /// `sev_ioctl_do_get_id2`.
    fn get_id(&mut self, caller: Caller, data: u64) -> Outcome {
        let id = Fields::read(caller, data, 12)?;
        self.fill("GET_ID", caller, id, |processor| {
            Ok(processor.get_id().to_vec())
        })
    }

    /// A command with one buffer, whose length comes back whatever the firmware says of it.
    fn fill(
        &mut self,
        name: &str,
        caller: Caller,
        mut buffer: Fields,
        give: impl FnOnce(&SecureProcessor) -> Result<Vec<u8>, FirmwareError>,
    ) -> Outcome {
        let (address, length) = (buffer.u64(0), buffer.u32(8));
        let room = if address == 0 { 0 } else { length };
        let mut needed = None;
        let filled = self.firmware(name, |processor| {
            let bytes = give(processor)?;
            let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
            needed = Some(length);
            if room < length {
                return Err(FirmwareError::InvalidLength { needed: length });
            }
            Ok(bytes)
        });
        if let Some(needed) = needed {
            buffer.set(8, &needed.to_le_bytes());
            if room != 0 && room < needed {
                self.complain(name, "Linux copies back more than this buffer holds");
            }
        }
        buffer.write_back()?;
        Ok(caller.write(address, &filled?)?)
    }

    /// `sev_ioctl_do_pek_import`.
    fn pek_cert_import(&mut self, caller: Caller, data: u64) -> Outcome {
        let import = Fields::read(caller, data, 24)?;
        let pek = blob(caller, import.u64(0), import.u32(8))?;
        let oca = blob(caller, import.u64(12), import.u32(20))?;
        self.initialise()?;
        self.firmware("PEK_CERT_IMPORT", |processor| {
            processor.pek_cert_import(&pek, &oca)
        })
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
    fn pdh_cert_export(&mut self, caller: Caller, data: u64, writable: bool) -> Outcome {
        if self.parts.processor.status().state == PlatformState::Uninit && !writable {
            return Err(Errno::EPERM.into());
        }
        self.initialise()?;
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
