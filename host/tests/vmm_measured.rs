//! Measured direct boot on the real `/dev/kvm`, with the software processor: a small firmware with the tables of a public
//! OVMF build finds what it is to boot, and the hashes that were measured, each where OVMF looks for them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests end where they fail"
)]

mod vmm_support;

use std::os::fd::OwnedFd;
use std::path::Path;

use casemate::confidential::control::ProcessorLink;
use casemate::confidential::processor_role;
use casemate::ipc::Channel;
use casemate::machine::plan::{FirmwarePlan, MachinePlan, Technology};
use casemate::role::Cell;

use casemate::sandbox::report::{ProbeReport, SandboxReport};
use casemate::vmm::protocol::{HandleKind, MoverRequest, RoleError, VmmReply, VmmRequest};
use casemate_attest::measure::guest::{self, Firmware, GuestDescription};
use casemate_attest::measure::kernel_hashes::{FileHash, KernelHashes};
use casemate_attest::measure::ovmf::Ovmf;
use casemate_attest::measure::vcpu::CpuSignature;
use casemate_attest::measure::vmsa::{Profile, SevFeatures};
use casemate_attest::processor::Identity;
use casemate_attest::processor::snp::{CaKeySize, SnpIdentity};
use vmm_support::{Lines, Vmm, image_file, kvm, plan};

#[test]
fn the_processor_measures_what_anybody_computes_and_the_firmware_finds_it() {
    let lines = Lines::new();
    let (mut vmm, _processor) = prepare(&lines, firmware());
    launch(&mut vmm);
    let VmmReply::Started {
        digest: Some(digest),
        ..
    } = vmm.ask(VmmRequest::Run).unwrap()
    else {
        panic!("no digest");
    };
    assert_eq!(digest, computed());
    // The first letter of what is to be booted, then that of the table of hashes at its place.
    let said = lines.next(vmm_support::DEADLINE).expect("a line").1;
    assert_eq!(said.as_bytes()[0], KERNEL[0]);
    assert_eq!(said.as_bytes()[1], b'6', "the table's GUID at 0x810c00");

    let mover = vmm.mover();
    let target = MoverRequest::SendStart {
        target_pdh: Vec::new(),
        platform: Vec::new(),
        amd: Vec::new(),
    };
    let error = mover.ask(target).unwrap_err();
    assert_eq!(error.code, "FIRMWARE_STAYS", "{error}");
}

#[test]
fn what_the_firmware_would_not_check_is_not_launched() {
    let lines = Lines::new();
    let (mut vmm, _processor) = prepare(&lines, vec![0xf4; 2 << 20]);
    let binding = Box::default();
    let error = vmm.ask(VmmRequest::Launch { binding }).unwrap_err();
    assert_eq!(error.code, "BAD_IMAGE", "{error}");
    assert!(error.text.contains("firmware"), "{error}");
}

#[test]
fn a_real_processor_gets_no_firmware() {
    let lines = Lines::new();
    for technology in [
        Technology::Sev {
            emulated: false,
            policy: 1,
        },
        Technology::SevSnp {
            emulated: false,
            policy: 0x3_0000,
        },
    ] {
        let plan = MachinePlan {
            technology,
            ..measured_plan()
        };
        let refused = Vmm::prepare(&plan, handles(&lines, KERNEL, firmware()));
        let error = refused.err().expect("it is refused");
        assert_eq!(error.code, "BAD_PLAN", "{error}");
        assert!(error.text.contains("AMD's own processor"), "{error}");
    }
}

/// A VMM, and the processor, which serves as long as its link is there.
fn prepare(lines: &Lines, firmware: Vec<u8>) -> (Vmm, ProcessorLink) {
    let mut given = handles(lines, KERNEL, firmware);
    let processor = processor();
    let link = processor.connect(true).unwrap();
    given.push((HandleKind::Processor, link.channel.into_fd()));
    (Vmm::prepare(&measured_plan(), given).unwrap(), processor)
}

fn launch(vmm: &mut Vmm) {
    let binding = Box::default();
    vmm.ask(VmmRequest::Launch { binding }).unwrap();
}

fn measured_plan() -> MachinePlan {
    MachinePlan {
        firmware: FirmwarePlan::for_image(2 << 20),
        technology: Technology::SevSnp {
            emulated: true,
            policy: 0x3_0000,
        },
        ..plan(2, 64 << 20, LINE)
    }
}

fn handles(lines: &Lines, kernel: &[u8], firmware: Vec<u8>) -> Vec<(HandleKind, OwnedFd)> {
    vec![
        (HandleKind::Kvm, kvm()),
        (HandleKind::Console, lines.handle()),
        (HandleKind::Firmware, image_file(&firmware)),
        (HandleKind::Kernel, image_file(kernel)),
        (HandleKind::Initrd, image_file(INITRD)),
    ]
}

/// A psp role in a thread, that has both kinds of identity.
fn processor() -> ProcessorLink {
    let (agent, role) = Channel::pair().unwrap();
    std::thread::spawn(move || processor_role::run(role, Box::new(NoCell)));
    let link = ProcessorLink::new(agent);
    let sev = Identity::generate().unwrap().to_bytes();
    let snp = SnpIdentity::generate_with(CaKeySize::Rsa2048).unwrap();
    link.initialise(&sev, Some(&snp.to_bytes().unwrap()), &[])
        .unwrap();
    link
}

struct NoCell;

impl Cell for NoCell {
    fn close(&mut self) -> Result<(), RoleError> {
        Ok(())
    }

    fn report(&self) -> Result<SandboxReport, RoleError> {
        Err(RoleError::new("TEST", "no cell"))
    }

    fn probe(&self) -> Result<ProbeReport, RoleError> {
        Err(RoleError::new("TEST", "no cell"))
    }
}

/// By the crate that knows of no VMM.
fn computed() -> String {
    let image = firmware();
    let firmware = Firmware::new(Ovmf::parse(&image).unwrap());
    let (kernel, initrd) = (FileHash::of(KERNEL), FileHash::of(INITRD));
    let description = GuestDescription {
        technology: guest::Technology::Snp,
        firmware: &firmware,
        kernel: Some(KernelHashes::new(&kernel, Some(&initrd), Some(LINE))),
        vcpus: 2u16.try_into().unwrap(),
        signature: CpuSignature(0),
        features: SevFeatures::SNP_ACTIVE,
        profile: Profile::Qemu,
    };
    description.digest().unwrap().to_string()
}

/// 2 MiB: code in front of the last page of a public AmdSev build, whose reset vector jumps there.
fn firmware() -> Vec<u8> {
    let suffix = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../attest/tests/vectors/measurement/ovmf_AmdSev_suffix.bin");
    let suffix = std::fs::read(suffix).unwrap();
    let mut image = vec![0xf4; 2 << 20];
    let length = image.len();
    let last = length - 0x1_0000;
    image[length - suffix.len()..].copy_from_slice(&suffix);
    image[last + 0xe000..last + 0xe000 + CODE.len()].copy_from_slice(CODE);
    // A descriptor table of flat data, and what names it.
    image[last + 0xe060..last + 0xe066].copy_from_slice(&[0x0f, 0, 0x70, 0xe0, 0xff, 0xff]);
    let flat = [0xff, 0xff, 0, 0, 0, 0x93, 0xcf, 0];
    image[last + 0xe070..last + 0xe080].copy_from_slice(&[[0; 8], flat].concat());
    // jmp 0xe000
    image[length - 16..length - 13].copy_from_slice(&[0xe9, 0x0d, 0xe0]);
    image
}

const KERNEL: &[u8] = b"Kernel";
const INITRD: &[u8] = b"initramfs";
const LINE: &str = "quiet";
const CODE: &[u8] = &[
    0xba, 0x10, 0x05, // mov dx, 0x510
    0xb8, 0x11, 0x00, // mov ax, 0x11: the kernel
    0xef, // out dx, ax
    0x42, // inc dx
    0xec, // in al, dx
    0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xee, // out dx, al
    // Protected mode with flat data, to reach 0x810c00.
    0x2e, 0x66, 0x0f, 0x01, 0x16, 0x60, 0xe0, // lgdt cs:[0xe060]
    0x0f, 0x20, 0xc0, // mov eax, cr0
    0x0c, 0x01, // or al, 1
    0x0f, 0x22, 0xc0, // mov cr0, eax
    0xb8, 0x08, 0x00, // mov ax, 8
    0x8e, 0xd8, // mov ds, ax
    0x67, 0xa0, 0x00, 0x0c, 0x81, 0x00, // mov al, [0x810c00], address of 32 bits
    0x04, 0x30, // add al, '0'
    0xee, // out dx, al
    0xb0, 0x0a, // mov al, '\n'
    0xee, // out dx, al
    0xeb, 0xfe, // jmp $
];
