//! OVMF images: any bytes are an image or a typed refusal, and what was read can be measured within bounds.
#![no_main]

use casemate_attest::measure::guest::{Firmware, GuestDescription, Technology};
use casemate_attest::measure::kernel_hashes::{FileHash, KernelHashes};
use casemate_attest::measure::ovmf::Ovmf;
use casemate_attest::measure::vcpu::{CpuSignature, VcpuCount};
use casemate_attest::measure::vmsa::{Profile, SevFeatures};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(ovmf) = Ovmf::parse(bytes) else {
        return;
    };
    assert_eq!(ovmf.pages().as_flattened(), bytes);
    let pages: u64 = ovmf.sections().iter().map(|s| u64::from(s.len) >> 12).sum();
    // A 4 GiB section is lawful and takes a second: too long here.
    if pages > 4096 {
        return;
    }
    let firmware = Firmware::new(ovmf);
    for technology in [Technology::Sev, Technology::SevEs, Technology::Snp] {
        for kernel in [
            None,
            Some(KernelHashes::new(&FileHash::of(b""), None, None)),
        ] {
            let description = GuestDescription {
                technology,
                firmware: &firmware,
                kernel,
                vcpus: VcpuCount::ONE,
                signature: CpuSignature(0x80_0f12),
                features: SevFeatures::SNP_ACTIVE,
                profile: Profile::Qemu,
            };
            assert_eq!(description.digest(), description.digest());
        }
    }
});
