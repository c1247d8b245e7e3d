//! AMD's own secure processor, as Linux shows it: `/dev/sev`.
//!
//! **Not yet met silicon.** The ioctls run against the kernel double (`tests/double`) only.

use std::arch::x86_64::__cpuid;
use std::path::Path;

use casemate_attest::legacy::builtin::parse_amd_certs;
use casemate_attest::legacy::certificate::{CERTIFICATE_LEN, SevCertificate, Usage};
use casemate_attest::legacy::{CaCertificate, Generation};
use nix::errno::Errno;

use crate::agent::api::Failure;
use crate::agent::config::AgentConfig;
use crate::agent::processor::OperatedProcessor;
use crate::confidential::kvm::{SevDevice, SevError, SnpConfig, VLEK_WRAPPED};
use crate::confidential::protocol::{
    PlatformEvidence, PlatformOrder, PlatformStatus, SnpCertificates, SnpStatus,
};
use crate::vmm::protocol::RoleError;

/// `/dev/sev`, open, and what AMD publishes about it.
pub struct AmdProcessor {
    device: SevDevice,
    /// ASK ‖ ARK, from the configuration.
    amd: Option<Vec<u8>>,
    /// The chip's certificate with AMD's signature, from the configuration.
    chip: Option<SevCertificate>,
}

impl AmdProcessor {
    /// Opens `/dev/sev` and asks for its status.
    pub fn open(config: &AgentConfig) -> Result<Self, Failure> {
        let device = SevDevice::open().map_err(refused)?;
        device.status().map_err(refused)?;
        let amd = config.amd_certificates.as_deref().map(amd_certificates);
        let chip = config.chip_certificate.as_deref().map(chip_certificate);
        Ok(Self {
            device,
            amd: amd.transpose()?,
            chip: chip.transpose()?,
        })
    }
}

impl OperatedProcessor for AmdProcessor {
    fn emulated(&self) -> bool {
        false
    }

    fn status(&self) -> Result<PlatformStatus, Failure> {
        let status = self.device.status().map_err(refused)?;
        Ok(PlatformStatus {
            api: status.api,
            state: status.state,
            owned: status.owned,
            es: status.es,
            guests: status.guests,
            emulated: false,
        })
    }

    fn certificates(&self) -> Result<PlatformEvidence, Failure> {
        let exported = self.device.pdh_cert_export().map_err(refused)?;
        let (platform, chip) = with_chip(exported.chain, self.chip.as_ref())?;
        let generation = || Generation::that_signed(&chip).or_else(this_generation);
        let amd = match &self.amd {
            Some(certificates) => certificates.clone(),
            None => generation().map(Generation::amd_certs).unwrap_or_default(),
        };
        Ok(PlatformEvidence {
            pdh: exported.pdh,
            platform,
            amd,
        })
    }

    fn snp_status(&self) -> Result<Option<SnpStatus>, Failure> {
        let status = match self.device.snp_status() {
            // What Linux 6.12 says where SNP is not initialised.
            Err(SevError::Kernel {
                errno: Errno::EINVAL,
                ..
            }) => return Ok(None),
            status => status.map_err(refused)?,
        };
        if !status.initialised {
            return Ok(None);
        }
        let product = this_generation().map(|generation| generation.to_string().to_lowercase());
        Ok(Some(SnpStatus {
            api: status.api,
            build: status.build,
            initialised: status.initialised,
            current_tcb: status.current_tcb.to_le_bytes(),
            reported_tcb: status.reported_tcb.to_le_bytes(),
            mask_chip_id: status.masks_chip_id,
            mask_chip_key: status.masks_chip_key,
            vlek_loaded: status.vlek,
            guests: status.guests,
            product,
        }))
    }

    fn snp_certificates(&self) -> Result<Option<SnpCertificates>, Failure> {
        // No host has the VCEK: AMD's key service has.
        Ok(None)
    }

    fn order(&self, order: &PlatformOrder) -> Result<Option<Vec<u8>>, Failure> {
        let device = &self.device;
        match order {
            PlatformOrder::ChipId => return device.chip_id().map(Some).map_err(refused),
            PlatformOrder::PekCsr => return device.pek_csr().map(Some).map_err(refused),
            PlatformOrder::PekCertImport { pek, oca } => device.pek_cert_import(pek, oca),
            PlatformOrder::PekGen => device.pek_gen(),
            PlatformOrder::PdhGen => device.pdh_gen(),
            PlatformOrder::FactoryReset => device.factory_reset(),
            PlatformOrder::SnpConfig(config) => device.snp_set_config(SnpConfig {
                reported_tcb: u64::from_le_bytes(config.reported_tcb),
                mask_chip_id: config.mask_chip_id,
                mask_chip_key: config.mask_chip_key,
            }),
            PlatformOrder::SnpCommit => device.snp_commit(),
            PlatformOrder::SnpVlekLoad { wrapped } => {
                let wrapped =
                    <&[u8; VLEK_WRAPPED]>::try_from(wrapped.as_slice()).map_err(|_| {
                        let text = format!(
                            "a wrapped VLEK hash stick has {VLEK_WRAPPED} bytes, this one {}",
                            wrapped.len()
                        );
                        Failure::new("INVALID_LEN", text)
                    })?;
                device.snp_vlek_load(wrapped)
            }
        }
        .map_err(refused)?;
        Ok(None)
    }
}

/// PEK ‖ OCA ‖ CEK with AMD's signature on the CEK where it is known, and the CEK. Firmware exports it without.
fn with_chip(
    mut platform: Vec<u8>,
    signed: Option<&SevCertificate>,
) -> Result<(Vec<u8>, SevCertificate), Failure> {
    let wrong = |what: String| Failure::new("PLATFORM_CERTIFICATES", what);
    let place = platform.get_mut(2 * CERTIFICATE_LEN..).ok_or_else(|| {
        wrong("the secure processor exported fewer than three certificates".into())
    })?;
    let exported = SevCertificate::parse(place).map_err(|e| wrong(e.to_string()))?;
    let Some(signed) = signed else {
        return Ok((platform, exported));
    };
    if signed.public_key() != exported.public_key() {
        let text =
            "`chip_certificate` is of another chip; fetch the one for `casemate platform id`";
        return Err(wrong(text.into()));
    }
    place.copy_from_slice(signed.as_bytes());
    Ok((platform, signed.clone()))
}

fn amd_certificates(path: &Path) -> Result<Vec<u8>, Failure> {
    let (bytes, wrong) = configured(path)?;
    let checked: Result<(CaCertificate, CaCertificate), _> = parse_amd_certs(&bytes);
    checked.map_err(|e| wrong(&e))?;
    Ok(bytes)
}

fn chip_certificate(path: &Path) -> Result<SevCertificate, Failure> {
    let (bytes, wrong) = configured(path)?;
    let chip = SevCertificate::parse(&bytes).map_err(|e| wrong(&e))?;
    if chip.usage() != Usage::Cek || Generation::that_signed(&chip).is_none() {
        return Err(wrong(&"it is no chip's certificate that AMD signed"));
    }
    Ok(chip)
}

type Wrong<'a> = Box<dyn Fn(&dyn std::fmt::Display) -> Failure + 'a>;

fn configured(path: &Path) -> Result<(Vec<u8>, Wrong<'_>), Failure> {
    let wrong = move |e: &dyn std::fmt::Display| {
        let text = format!("{}: {e}", path.display());
        Failure::new("CONFIGURATION", text)
    };
    let bytes = std::fs::read(path).map_err(|e| wrong(&e))?;
    Ok((bytes, Box::new(wrong)))
}

/// The generation of the processor that this runs on.
fn this_generation() -> Option<Generation> {
    let signature = __cpuid(1).eax;
    let (family, model) = (signature >> 8 & 0xf, signature >> 4 & 0xf);
    match family {
        0xf => {
            let family = family + (signature >> 20 & 0xff);
            Generation::of_processor(family, model | (signature >> 16 & 0xf) << 4)
        }
        _ => None,
    }
}

fn refused(error: SevError) -> Failure {
    RoleError::from(error).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::confidential::tests::{SITE_A, SITE_B};
    use casemate_attest::processor::Identity;

    #[test]
    fn the_chips_signed_certificate_takes_the_exported_ones_place() {
        let chain = Identity::from_bytes(&SITE_A).unwrap().chain().clone();
        let mut exported = chain.platform_certs();
        // As firmware has it: no signature of AMD's.
        exported[2 * CERTIFICATE_LEN + 1044..].fill(0);
        let (same, chip) = with_chip(exported.clone(), None).unwrap();
        assert_eq!(same, exported);
        assert_eq!(chip.public_key(), chain.cek.public_key());
        let (whole, _) = with_chip(exported.clone(), Some(&chain.cek)).unwrap();
        assert_eq!(whole, chain.platform_certs());
        let other = Identity::from_bytes(&SITE_B).unwrap().chain().cek.clone();
        let refused = with_chip(exported, Some(&other)).unwrap_err();
        assert_eq!(refused.code, "PLATFORM_CERTIFICATES");
        assert!(with_chip(vec![0; 10], None).is_err());
    }

    #[test]
    fn configured_certificates_have_to_be_amds_or_at_least_certificates() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let code = |result: Result<(), Failure>| result.unwrap_err().code;
        assert_eq!(code(amd_certificates(&path).map(drop)), "CONFIGURATION");
        let chain = Identity::from_bytes(&SITE_A).unwrap().chain().clone();
        std::fs::write(&path, chain.cek.as_bytes()).unwrap();
        assert_eq!(code(amd_certificates(&path).map(drop)), "CONFIGURATION");
        // A chip that AMD did not sign.
        assert_eq!(code(chip_certificate(&path).map(drop)), "CONFIGURATION");
        std::fs::write(&path, Generation::Milan.amd_certs()).unwrap();
        assert!(amd_certificates(&path).is_ok());
    }
}
