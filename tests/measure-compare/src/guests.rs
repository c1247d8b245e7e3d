//! Guests to measure, generated from a seed, and our answers for them.

use crate::images::{self, Image, Random};
use casemate_attest::measure::guest::{Firmware, GuestDescription, Technology};
use casemate_attest::measure::kernel_hashes::{FileHash, KernelHashes};
use casemate_attest::measure::ovmf::Ovmf;
use casemate_attest::measure::vcpu::{CpuModel, CpuSignature, VcpuCount};
use casemate_attest::measure::vmsa::{Profile, SevFeatures};
use serde::Serialize;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// One guest, in words that both sides understand.
#[derive(Debug, Clone, Serialize)]
pub struct Guest {
    /// `sev`, `sev-es`, `snp`.
    pub mode: Technology,
    /// Firmware file.
    pub ovmf: PathBuf,
    /// Kernel file.
    pub kernel: Option<PathBuf>,
    /// Initrd file; only with a kernel.
    pub initrd: Option<PathBuf>,
    /// Command line; only with a kernel.
    pub append: Option<String>,
    /// vCPUs.
    pub vcpus: u16,
    /// CPUID leaf 1 EAX.
    pub vcpu_signature: u32,
    /// SEV features.
    pub guest_features: u64,
}

impl Guest {
    /// Our digest under the QEMU profile, or why there is none. Files are read as the command does.
    pub fn measure(&self) -> Result<String, String> {
        let hash =
            |path: &PathBuf| FileHash::read(&mut File::open(path).unwrap(), u64::MAX).unwrap();
        std::thread::scope(|scope| {
            let kernel = scope.spawn(|| self.kernel.as_ref().map(hash));
            let initrd = scope.spawn(|| self.initrd.as_ref().map(hash));
            let image = fs::read(&self.ovmf).unwrap();
            let firmware = Firmware::new(Ovmf::parse(&image).map_err(|e| e.to_string())?);
            if self.mode == Technology::Snp {
                firmware.snp_digest();
            }
            let (kernel, initrd) = (kernel.join().unwrap(), initrd.join().unwrap());
            let hashes =
                |kernel| KernelHashes::new(&kernel, initrd.as_ref(), self.append.as_deref());
            self.describe(&firmware, kernel.map(hashes))
                .digest()
                .map(|digest| digest.to_string())
                .map_err(|e| e.to_string())
        })
    }

    /// The description over a firmware and hashes at hand.
    pub fn describe<'a>(
        &self,
        firmware: &'a Firmware<'a>,
        kernel: Option<KernelHashes>,
    ) -> GuestDescription<'a> {
        GuestDescription {
            technology: self.mode,
            firmware,
            kernel,
            vcpus: VcpuCount::try_from(self.vcpus).unwrap(),
            signature: CpuSignature(self.vcpu_signature),
            features: SevFeatures(self.guest_features),
            profile: Profile::Qemu,
        }
    }
}

/// `count` guests, the same for the same seed; their files go to `folder`.
pub fn generate(seed: u64, count: usize, folder: &Path) -> Vec<Guest> {
    let mut random = Random(seed);
    let images = firmware(&mut random, folder);
    let file = |name: &str, content: Vec<u8>| {
        let path = folder.join(name);
        fs::write(&path, content).unwrap();
        path
    };
    let kernels = [
        file("kernel", random.bytes(70_001)),
        file("kernel.empty", Vec::new()),
    ];
    let initrds = [
        None,
        Some(file("initrd", random.bytes(12_345))),
        Some(file("initrd.empty", Vec::new())),
    ];
    let appends = [
        None,
        Some(String::new()),
        Some("console=ttyS0 root=/dev/vda1 ro".to_owned()),
        Some("naïve=\u{2603}".to_owned()),
    ];
    let modes = [
        Technology::Snp,
        Technology::Snp,
        Technology::SevEs,
        Technology::Sev,
    ];
    let one = |_| {
        let kernel = (random.below(2) == 0).then(|| random.one(&kernels).clone());
        let model = random.one(CpuModel::ALL).signature().0;
        let odd = random.number() as u32;
        let any = random.number();
        Guest {
            mode: *random.one(&modes),
            ovmf: random.one(&images).clone(),
            initrd: kernel.as_ref().and_then(|_| random.one(&initrds).clone()),
            append: kernel.as_ref().and_then(|_| random.one(&appends).clone()),
            kernel,
            vcpus: 1 + random.below(64) as u16,
            vcpu_signature: *random.one(&[model, model, model, odd]),
            guest_features: *random.one(&[0x1, 0x1, 0x21, 0x0, 0x3ff, any]),
        }
    };
    (0..count).map(one).collect()
}

fn firmware(random: &mut Random, folder: &Path) -> Vec<PathBuf> {
    let mut contents = Vec::new();
    for name in ["AmdSev", "OvmfX64"] {
        contents.push(images::fixture(name));
        for pages in [16, 61, 256] {
            contents.push(images::extended(name, pages, random.number()));
        }
    }
    for _ in 0..10 {
        contents.push(synthetic(random).bytes());
    }
    // No tables at all: plain SEV can still run it.
    contents.push(images::fill(8 * images::PAGE, random.number()));
    let write = |(n, content): (usize, Vec<u8>)| {
        let path = folder.join(format!("ovmf{n}"));
        fs::write(&path, content).unwrap();
        path
    };
    contents.into_iter().enumerate().map(write).collect()
}

/// Sections in any order, of any length, at any place, but each page once.
fn synthetic(random: &mut Random) -> Image {
    let mut gpa = (1 + random.below(0x1000) as u32) << 12;
    let mut sections = Vec::new();
    let mut hash_table = 0;
    let kinds = [2, 3, 0x10, 4, 1, 1, 1];
    let first = random.below(kinds.len() as u64) as usize;
    for n in 0..kinds.len() {
        let kind = kinds[(first + n) % kinds.len()];
        if kind == 0x10 && random.below(4) == 0 {
            continue;
        }
        let pages = match kind {
            1 | 4 => 1 + random.below(20) as u32,
            _ => 1,
        };
        if kind == 0x10 {
            hash_table = gpa + 16 * random.below(245) as u32;
            hash_table += u32::from(hash_table == 0);
        }
        sections.push((gpa, pages << 12, kind));
        gpa += (pages + random.below(64) as u32) << 12;
    }
    Image {
        pages: 2 + random.below(30) as usize,
        seed: random.number(),
        reset_eip: 1 + random.below(0xffff_fffe) as u32,
        hash_table,
        sections,
    }
}
