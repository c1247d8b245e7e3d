//! Kernel images, bzImage and ELF: any bytes are laid out within guest memory, in order and apart, or refused.
#![no_main]

use casemate::machine::plan::{MachinePlan, Technology};
use casemate::vmm::boot::{BootImage, Part, Start};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    for (technology, memory_bytes) in [
        (Technology::None, 5 << 30),
        (
            Technology::SevSnp {
                emulated: true,
                policy: 0x3_0000,
            },
            64 << 20,
        ),
    ] {
        let plan = MachinePlan {
            name: "fuzz".into(),
            vm_id: [1; 16],
            vcpus: 64,
            cpu: Default::default(),
            memory_bytes,
            firmware: None,
            cmdline: "console=ttyS0".into(),
            technology,
            disks: vec![],
            nets: vec![],
            vsock_cid: None,
            small: Default::default(),
            hotplug: Default::default(),
        };
        let Ok(image) = BootImage::assemble(&plan, bytes, b"initramfs") else {
            continue;
        };
        assert!(image.parts.is_empty() || technology == Technology::None);
        let mut end = 0;
        for piece in &image.pieces {
            assert!(piece.gpa >= end && piece.gpa % 4096 == 0 && piece.bytes.len() % 4096 == 0);
            end = piece.gpa + piece.bytes.len() as u64;
        }
        for part in &image.parts {
            assert!(part.gpa >= end);
            assert!(part.image.read(part.offset, part.length).unwrap().is_some());
            end = part.gpa + part.length;
        }
        assert!(end <= memory_bytes.min(3 << 30));
        if let Start::Pvh(entry) = image.start {
            let entry = u64::from(entry);
            let holds = |part: &Part<'_>| (part.gpa..part.gpa + part.length).contains(&entry);
            assert!(image.parts.iter().any(holds));
        }
    }
});
