//! The virtio devices under a hostile guest: one of them behind its PCI function, and a program of the fuzzer's that
//! writes registers, rings, descriptors and memory, notifies, resets, and moves the device to a fresh one, in any order.
//!
//! The first byte chooses the device; then each operation is a byte and what it needs. Most addresses are near rings and
//! buffers that make sense, so that loops, overlaps, indirect tables and ends of memory are met often. Nothing may fall,
//! the disk's image keeps its length, and what the card sends is from its own address.
#![no_main]

use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::{Arc, LazyLock};

use casemate::devices::virtio::transport::{Placement, VirtioPci};
use casemate::devices::virtio::{GuestRam, VirtioDevice, balloon, block, console, net, rng, vsock};
use casemate::machine::plan::devices::{
    BalloonPlan, ConsolePlan, DeviceChange, Limits, Rate, RngPlan,
};
use casemate::vmm::irq::{MsiMessage, MsiRouter};
use casemate::vmm::pci::PciFunction;
use casemate::vmm::pci::msix::Msix;
use libfuzzer_sys::fuzz_target;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use vm_memory::{Bytes, FileOffset, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

fuzz_target!(|bytes: &[u8]| {
    let mut program = Program(bytes);
    let Some(kind) = program.byte() else { return };
    let mut rig = Rig::new(kind % KINDS);
    for _ in 0..OPERATIONS_MAX {
        let Some(operation) = program.byte() else {
            break;
        };
        rig.step(operation, &mut program);
    }
    rig.check();
});

/// What is left of the fuzzer's bytes.
struct Program<'a>(&'a [u8]);

impl Program<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn small(&mut self) -> u64 {
        self.byte().unwrap_or(0).into()
    }

    fn word(&mut self) -> u64 {
        self.small() | self.small() << 8
    }

    fn wide(&mut self) -> u64 {
        self.word() | self.word() << 16
    }

    fn whole(&mut self) -> u64 {
        self.wide() | self.wide() << 32
    }

    /// Mostly a place in guest memory, near a ring, a buffer or the end.
    fn address(&mut self) -> u64 {
        match self.small() {
            kind @ 0..=15 => ring(kind % 4) + 0x1000 * (kind / 4) + self.small(),
            16..=127 => BUFFERS + self.small() * 512,
            128..=159 => BUFFERS + self.word(),
            160..=191 => RAM - self.small(),
            192..=223 => self.wide() % RAM,
            _ => self.whole(),
        }
    }

    fn length(&mut self) -> u64 {
        match self.small() {
            short @ 0..=31 => short,
            32..=95 => 16,
            96..=159 => 512,
            160..=191 => 4096,
            192..=223 => self.word(),
            _ => self.wide(),
        }
    }
}

struct Rig {
    kind: u8,
    ram: GuestRam,
    function: VirtioPci,
    image: File,
    /// The other ends of what stands for the tap's queues.
    wires: Vec<OwnedFd>,
    queues: u64,
}

impl Rig {
    fn new(kind: u8) -> Rig {
        let memory = memory_file(RAM);
        let range = (
            GuestAddress(0),
            RAM as usize,
            Some(FileOffset::new(memory, 0)),
        );
        let ram = GuestRam::from_ranges_with_files([range]).expect("memory");
        let image = memory_file(IMAGE);
        let (taps, wires) = tap();
        let device = device(kind, &image, taps);
        let queues = device.queue_sizes().len() as u64;
        let function = function(device, &ram);
        function.acquire().expect("nobody else has it");
        Rig {
            kind,
            ram,
            function,
            image,
            wires,
            queues,
        }
    }

    fn step(&mut self, operation: u8, program: &mut Program<'_>) {
        match operation % 16 {
            0 => self.start(program),
            1..=3 => self.descriptor(program),
            4..=6 => self.offer(program),
            7 | 8 => {
                self.function.service();
                self.function.queue_event(program.small() as u16 % 8);
            }
            9 => {
                let (at, value) = (program.address(), program.whole());
                let _ = self.ram.write_obj(value, GuestAddress(at));
            }
            10 => self.registers(program),
            11 => self.request(program),
            12 => {
                let frame = [&[0; 12][..], &[0xff; 6], &[2; 6], &[8, 6, 0, 1, 8, 0, 6, 4]].concat();
                let wire = program.small() as usize % self.wires.len();
                if let Some(wire) = self.wires.get(wire) {
                    let _ = send(raw(wire), &frame, MsgFlags::MSG_DONTWAIT);
                }
                self.function.fd_event(program.small() as u32 % 4);
            }
            13 => self.change(program),
            14 => {
                self.function.bar_write(0x14, &[0]);
                self.function.service();
            }
            _ => self.go_elsewhere(),
        }
    }

    /// What a driver does, with sizes of the fuzzer's choice.
    fn start(&mut self, program: &mut Program<'_>) {
        let write = |offset: u64, value: u64, length: usize| {
            self.function
                .bar_write(offset, &value.to_le_bytes()[..length]);
        };
        write(0x14, 0, 1);
        self.function.service();
        write(0x14, 3, 1);
        let mut offered = [0; 4];
        for (select, refused) in [(0u64, program.wide()), (1, 0)] {
            write(0x00, select, 4);
            self.function.bar_read(0x04, &mut offered);
            write(0x08, select, 4);
            write(0x0c, u64::from(u32::from_le_bytes(offered)) & !refused, 4);
        }
        write(0x14, 11, 1);
        for queue in 0..self.queues {
            write(0x16, queue, 2);
            write(0x18, 1 << (program.small() % 9), 2);
            let base = match program.small() {
                0..=223 => ring(queue),
                _ => program.address(),
            };
            write(0x20, base, 8);
            write(0x28, base.wrapping_add(0x1000), 8);
            write(0x30, base.wrapping_add(0x2000), 8);
            write(0x1c, u64::from(program.small() < 240), 2);
        }
        write(0x14, 15, 1);
        self.function.service();
    }

    fn descriptor(&mut self, program: &mut Program<'_>) {
        let (queue, index) = (program.small() % self.queues, program.small() % 64);
        let table = match program.small() {
            0..=191 => ring(queue),
            _ => BUFFERS + 0x8000, // where indirect tables are
        };
        let (address, length) = (program.address(), program.length());
        let (flags, next) = (program.small() % 8, program.small());
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend((length as u32).to_le_bytes());
        bytes.extend((flags as u16).to_le_bytes());
        bytes.extend((next as u16).to_le_bytes());
        let _ = self
            .ram
            .write_slice(&bytes, GuestAddress(table + 16 * index));
    }

    /// One more chain is available, or so many.
    fn offer(&mut self, program: &mut Program<'_>) {
        let queue = program.small() % self.queues;
        let available = ring(queue) + 0x1000;
        let index: u16 = self.ram.read_obj(GuestAddress(available + 2)).unwrap_or(0);
        let (head, more) = (program.small(), program.small());
        let entry = available + 4 + 2 * u64::from(index % 64);
        let _ = self.ram.write_obj(head as u16, GuestAddress(entry));
        let more = if more < 224 { 1 } else { more as u16 };
        let _ = self
            .ram
            .write_obj(index.wrapping_add(more), GuestAddress(available + 2));
    }

    /// A header that makes sense to the device, so that what comes behind it is looked at.
    fn request(&mut self, program: &mut Program<'_>) {
        let at = GuestAddress(BUFFERS + program.small() * 512);
        let bytes: Vec<u8> = match self.kind {
            0 => [
                (program.small() as u32 % 16).to_le_bytes().as_slice(),
                &[0; 4],
                &program.small().to_le_bytes(),
            ]
            .concat(),
            1 if program.small() < 32 => vec![4, 0, program.small() as u8 % 4, 0],
            1 => [
                &[
                    program.small() as u8 % 2,
                    program.small() as u8 % 5,
                    54,
                    0,
                    100,
                    0,
                    34,
                    0,
                    16,
                    0,
                    0,
                    0,
                ][..],
                &[0xff; 6],
                &MAC,
                &[8, program.small() as u8 % 8, 0, 1, 8, 0, 6, 4, 0, 1],
                &MAC,
            ]
            .concat(),
            2 => {
                let mut header = Vec::new();
                header.extend(3u64.to_le_bytes());
                header.extend(2u64.to_le_bytes());
                header.extend((program.small() as u32).to_le_bytes());
                header.extend((1 + program.small() as u32).to_le_bytes());
                header.extend((program.length() as u32).to_le_bytes());
                header.extend(1u16.to_le_bytes());
                header.extend((program.small() as u16 % 9).to_le_bytes());
                header.extend((program.small() as u32 % 4).to_le_bytes());
                header.extend((program.wide() as u32).to_le_bytes());
                header.extend((program.wide() as u32).to_le_bytes());
                header
            }
            _ => (0..8)
                .flat_map(|_| (program.word() as u32).to_le_bytes())
                .collect(),
        };
        let _ = self.ram.write_slice(&bytes, at);
    }

    fn registers(&mut self, program: &mut Program<'_>) {
        let (kind, offset) = (program.small(), program.word() % 0x8000);
        let value = program.whole().to_le_bytes();
        let length = [1, 2, 4, 8][(kind % 4) as usize];
        let mut data = [0; 8];
        match kind / 4 % 4 {
            0 => self.function.bar_write(offset, &value[..length]),
            1 => self.function.bar_read(offset, &mut data[..length]),
            2 => self
                .function
                .config_write((offset % 260) as usize, &value[..length]),
            _ => self
                .function
                .config_read((offset % 260) as usize, &mut data[..length]),
        }
    }

    fn change(&mut self, program: &mut Program<'_>) {
        let rate = Some(Rate {
            per_second: 1 + program.wide(),
            burst: 1 + program.wide(),
        });
        let change = match program.small() % 5 {
            0 => DeviceChange::Limits(Limits {
                bytes: rate,
                operations: rate,
            }),
            1 => DeviceChange::Limits(Limits::default()),
            2 => DeviceChange::Balloon(program.wide()),
            3 => DeviceChange::Terminal(ConsolePlan::default()),
            _ => DeviceChange::Resized,
        };
        let _ = self.function.change(&change);
    }

    /// The device is saved, and goes on as another.
    fn go_elsewhere(&mut self) {
        self.function.release().expect("given up");
        let state = self.function.save();
        let (taps, wires) = tap();
        let fresh = function(device(self.kind, &self.image, taps), &self.ram);
        // A guest whose rings are nonsense need not arrive; then it stays.
        if fresh.restore(state).is_ok() {
            self.check();
            self.function = fresh;
            self.wires = wires;
            self.function.rouse();
        }
        self.function.acquire().expect("free again");
    }

    fn check(&self) {
        let length = self.image.metadata().expect("a file").len();
        assert_eq!(length, IMAGE, "the image's length");
        let mut frame = vec![0; 70_000];
        for wire in &self.wires {
            while let Ok(count @ 1..) = recv(raw(wire), &mut frame, MsgFlags::MSG_DONTWAIT) {
                assert!(
                    count >= 26 && frame[18..24] == MAC,
                    "a frame of somebody else's"
                );
            }
        }
        let _ = self.function.faults();
    }
}

/// Two queues of a tap, and their other ends.
fn tap() -> (Vec<OwnedFd>, Vec<OwnedFd>) {
    let pair = |_| {
        socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        )
        .expect("sockets")
    };
    (0..2).map(pair).unzip()
}

fn device(kind: u8, image: &File, taps: Vec<OwnedFd>) -> Box<dyn VirtioDevice> {
    let rate = Rate {
        per_second: 1 << 30,
        burst: 1 << 30,
    };
    match kind {
        0 => Box::new(
            block::Block::new(image.try_clone().expect("a file"), "disk", false).expect("a disk"),
        ),
        1 => Box::new(net::Net::over(taps, MAC, vec![Ipv4Addr::LOCALHOST]).expect("a card")),
        2 => Box::new(vsock::Vsock::new(3, listener()).expect("vsock")),
        3 => Box::new(rng::Rng::new(RngPlan { bytes: rate }).expect("a source")),
        4 => {
            let plan = BalloonPlan {
                free_page_reporting: true,
                deflate_on_oom: true,
            };
            Box::new(balloon::Balloon::new(plan, RAM))
        }
        _ => Box::new(
            console::VirtioConsole::new(listener(), ConsolePlan::default()).expect("a console"),
        ),
    }
}

fn function(device: Box<dyn VirtioDevice>, ram: &GuestRam) -> VirtioPci {
    let vectors = device.queue_sizes().len() as u32 + 1;
    let lines = (0..vectors).map(|n| (24 + n, event())).collect();
    let msix = Arc::new(Msix::new(lines, Arc::new(Nowhere)));
    let place = Placement {
        bar: 0xe000_0000,
        ram: ram.clone(),
        wake: event(),
        access_platform: true,
    };
    VirtioPci::new(device, msix, place).expect("a function")
}

struct Nowhere;

impl MsiRouter for Nowhere {
    fn route(&self, _gsi: u32, _message: MsiMessage) {}
}

fn memory_file(size: u64) -> File {
    let file = File::from(memfd_create(c"fuzz", MFdFlags::empty()).expect("a file"));
    file.set_len(size).expect("space");
    file
}

fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).expect("an event")
}

fn listener() -> UnixListener {
    LISTENER.try_clone().expect("a socket")
}

fn raw(fd: &OwnedFd) -> i32 {
    use std::os::fd::AsRawFd;
    fd.as_fd().as_raw_fd()
}

/// Nobody comes to it.
static LISTENER: LazyLock<UnixListener> = LazyLock::new(|| {
    let path = std::env::temp_dir().join(format!("fuzz-queues-{}", std::process::id()));
    let listener = UnixListener::bind(&path).expect("a socket");
    let _ = std::fs::remove_file(path);
    listener
});

/// The rings of a queue: descriptors, available, used, a page each.
fn ring(queue: u64) -> u64 {
    0x1_0000 + 0x4000 * queue
}

const KINDS: u8 = 6;
const RAM: u64 = 0x4_0000;
const BUFFERS: u64 = 0x2_4000;
const IMAGE: u64 = 0x1_0000;
const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
const OPERATIONS_MAX: usize = 200;
