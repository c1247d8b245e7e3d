//! A qcow2 image that somebody made, under the disk: the fuzzer's bytes are laid over an image with data, a compressed
//! cluster and empty ones, then a guest reads, writes, discards and flushes all over it. Requests may fail; nothing may
//! fall, and no request may take more memory than its bound.
//!
//! A byte says whether the disk is read-only; then each patch is three bytes of place, one of length, and its bytes.
#![no_main]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use casemate::devices::virtio::block::Block;
use casemate::devices::virtio::{Activation, GuestRam, Interrupt, VirtioDevice};
use casemate::machine::plan::DiskFormat;
use libfuzzer_sys::fuzz_target;
use nix::sys::memfd::{MFdFlags, memfd_create};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

fuzz_target!(|bytes: &[u8]| {
    let Some((first, mut rest)) = bytes.split_first() else {
        return;
    };
    let file = image();
    while let [a, b, c, length, more @ ..] = rest {
        let at = u64::from(u32::from_le_bytes([*a, *b, *c, 0])) % (IMAGE + 4096);
        let (patch, more) = more.split_at(usize::from(*length).min(more.len()));
        file.write_all_at(patch, at).expect("space");
        rest = more;
    }
    for _ in 0..2 {
        let read_only = first & 1 == 1;
        let file = file.try_clone().expect("a file");
        let Ok(block) = Block::open(file, DiskFormat::Qcow2, "disk", read_only) else {
            return;
        };
        use_it(block);
    }
});

fn use_it(mut block: Block) {
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), 0x10_0000)]).expect("memory");
    let mut queue = Queue::new(64).expect("a power of two");
    queue.set_desc_table_address(Some(0x1000), Some(0));
    queue.set_avail_ring_address(Some(0x2000), Some(0));
    queue.set_used_ring_address(Some(0x3000), Some(0));
    queue.set_ready(true);
    block.activate(Activation {
        ram: ram.clone(),
        queues: vec![queue],
        interrupt: Arc::new(Deaf),
        features: u64::MAX,
    });
    if block.acquire().is_err() {
        return;
    }
    let mut next = 0;
    for (kind, sector, length, flags) in WORK {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(u64::to_le_bytes(if kind > 4 { 0 } else { sector }));
        ram.write_slice(&header, GuestAddress(0x4000))
            .expect("in memory");
        let mut range = sector.to_le_bytes().to_vec();
        range.extend((length / 512).to_le_bytes());
        range.extend([0; 4]);
        let data: u64 = if kind > 4 { 0x5000 } else { 0x2_0000 };
        ram.write_slice(&range, GuestAddress(data))
            .expect("in memory");
        let length = if kind > 4 { 16 } else { length };
        for (n, (address, length, flags, next)) in [
            (0x4000u64, 16u32, 1u16, 1u16),
            (data, length, 1 | flags, 2),
            (0x6000, 1, 2, 0),
        ]
        .into_iter()
        .enumerate()
        {
            let at = 0x1000 + 16 * n as u64;
            ram.write_obj(address, GuestAddress(at)).expect("in memory");
            ram.write_obj(length, GuestAddress(at + 8))
                .expect("in memory");
            ram.write_obj(flags, GuestAddress(at + 12))
                .expect("in memory");
            ram.write_obj(next, GuestAddress(at + 14))
                .expect("in memory");
        }
        next += 1;
        ram.write_obj(next as u16, GuestAddress(0x2002))
            .expect("in memory");
        block.queue_event(0);
    }
    let _ = block.release();
}

struct Deaf;

impl Interrupt for Deaf {
    fn queue(&self, _index: u16) {}
    fn config(&self) {}
}

/// Version 3, clusters of 64 KiB, 1 MiB: the first is there, the second packed, the third kept for zeros, no others.
fn image() -> File {
    let file = File::from(memfd_create(c"image", MFdFlags::empty()).expect("a file"));
    file.set_len(IMAGE).expect("space");
    let set = |at: u64, bytes: &[u8]| file.write_all_at(bytes, at).expect("space");
    set(0, b"QFI\xfb\0\0\0\x03");
    set(20, &16u32.to_be_bytes());
    set(24, &(1u64 << 20).to_be_bytes());
    set(36, &1u32.to_be_bytes());
    set(40, &0x3_0000u64.to_be_bytes());
    set(48, &0x1_0000u64.to_be_bytes());
    set(56, &1u32.to_be_bytes());
    set(96, &4u32.to_be_bytes());
    set(100, &104u32.to_be_bytes());
    set(0x1_0000, &0x2_0000u64.to_be_bytes());
    (0..8).for_each(|n| set(0x2_0000 + n * 2, &[0, 1]));
    set(0x3_0000, &(1u64 << 63 | 0x4_0000).to_be_bytes());
    set(0x4_0000, &(1u64 << 63 | 0x5_0000).to_be_bytes());
    set(0x4_0008, &(1u64 << 62 | 0x6_0000).to_be_bytes());
    set(0x4_0010, &(1u64 << 63 | 0x7_0000 | 1).to_be_bytes());
    set(0x5_0000, &[0xa5; 4096]);
    set(0x6_0000, PACKED);
    file
}

/// Kind, sector, bytes, flags of the data descriptor.
const WORK: [(u32, u64, u32, u16); 12] = [
    (0, 0, 0x4_0000, 2),
    (0, 1000, 0x8000, 2),
    (1, 100, 0x8000, 0),
    (1, 200, 0x2_0000, 0),
    (13, 64, 0x1_8000, 0),
    (4, 0, 512, 2),
    (11, 0, 0x4_0000, 0),
    (1, 1500, 0x1000, 0),
    (0, 1400, 0x1_0000, 2),
    (4, 0, 512, 2),
    (1, 300, 0x400, 0),
    (0, 0, 0x8_0000, 2),
];
const IMAGE: u64 = 0x8_0000;
/// 64 KiB of `Z`, deflated.
const PACKED: &[u8] = &[
    237, 193, 129, 0, 0, 0, 0, 128, 32, 207, 253, 65, 22, 169, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 106,
];
