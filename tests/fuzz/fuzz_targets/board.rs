//! The board that firmware runs on, under a hostile guest: ports, registers of its bridges, and requests to `fw_cfg` by
//! DMA from memory that the fuzzer writes, with a move to a fresh board in between. Beside it the slots for hot-plug, whose
//! host attaches and detaches while the guest does what it likes with their registers.
//!
//! Each operation is a byte and what it needs. Nothing may fall, what firmware is told stays what it was, memory that a
//! request does not name stays too, and the moved board says what the one before it said. The guest sees in each slot what
//! its host has put there until it lets go of it, and can let go of nothing that it was not asked for.
#![no_main]

use std::sync::Arc;

use casemate::devices::events::Events;
use casemate::devices::virtio::GuestRam;
use casemate::devices::virtio::rng::Rng;
use casemate::devices::virtio::transport::{Placement, VirtioPci};
use casemate::machine::plan::devices::{Rate, RngPlan};
use casemate::vmm::boot::firmware::TABLES;
use casemate::vmm::chipset::Chipset;
use casemate::vmm::chipset::cmos::Cmos;
use casemate::vmm::chipset::fw_cfg::{FIRST_FILE, FwCfg, FwCfgItems};
use casemate::vmm::hotplug::{HotPlug, Occupant};
use casemate::vmm::irq::{MsiMessage, MsiRouter};
use casemate::vmm::pci::msix::Msix;
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

fuzz_target!(|bytes: &[u8]| {
    let mut program = Program(bytes);
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), RAM)]).expect("memory");
    ram.write_slice(&MARK, GuestAddress(MARK_AT))
        .expect("a mark");
    let mut board = board(&ram);
    let mut slots = Slots::new(&ram);
    for _ in 0..OPERATIONS_MAX {
        let Some(operation) = program.byte() else {
            break;
        };
        match operation % 8 {
            0 => port_read(&board, &mut program),
            1 => port_write(&board, &mut program),
            2 => register(&board, &mut program),
            3 => request(&board, &ram, &mut program),
            4 => {
                let at = u64::from(program.word()) % (MARK_AT - 4);
                let value = program.wide().to_le_bytes();
                ram.write_slice(&value, GuestAddress(at)).expect("memory");
            }
            5 => slots.host(&mut program),
            6 => slots.guest(&mut program),
            _ => board = moved(&board, &ram),
        }
    }
    still_says(&board);
    slots.check();
    let mut mark = [0; MARK.len()];
    ram.read_slice(&mut mark, GuestAddress(MARK_AT))
        .expect("memory");
    assert_eq!(mark, MARK);
});

fn board(ram: &GuestRam) -> Chipset {
    let mut items = FwCfgItems::new(4);
    items.set_file(TABLES, vec![0; 8]);
    items.set_file("etc/file", CONTENT.to_vec());
    let fw_cfg = FwCfg::new(items, ram.clone());
    Chipset::new(Cmos::new(RAM as u64, 0), fw_cfg, |ecam| {
        ecam.to_le_bytes().to_vec()
    })
}

/// The slots, and what is known of each.
struct Slots {
    real: HotPlug,
    known: [Known; SLOTS],
    function: Arc<VirtioPci>,
}

#[derive(Clone, Copy, PartialEq)]
enum Known {
    Empty,
    Present,
    Asked,
    LetGo,
}

impl Slots {
    fn new(ram: &GuestRam) -> Self {
        let events = Arc::new(Events::new(event()));
        let per_second = 1000;
        let bytes = Rate {
            per_second,
            burst: per_second,
        };
        let device = Rng::new(RngPlan { bytes }).expect("a source");
        let msix = Arc::new(Msix::new(
            vec![(24, event()), (25, event())],
            Arc::new(Nowhere),
        ));
        let place = Placement {
            bar: 0,
            ram: ram.clone(),
            wake: event(),
            access_platform: false,
        };
        let function = VirtioPci::new(Box::new(device), msix, place).expect("a function");
        Self {
            real: HotPlug::new(SLOTS as u8, events).expect("slots"),
            known: [Known::Empty; SLOTS],
            function: Arc::new(function),
        }
    }

    fn host(&mut self, program: &mut Program<'_>) {
        let byte = program.byte().unwrap_or(0);
        let slot = byte % (SLOTS as u8 + 1);
        let known = self.known.get_mut(usize::from(slot));
        match (byte >> 4) % 4 {
            0 => {
                let occupant = Occupant {
                    function: Arc::clone(&self.function),
                    gsis: vec![],
                };
                let put = self.real.insert(slot, occupant).is_ok();
                let free = known.as_deref() == Some(&Known::Empty);
                assert_eq!(put, free);
                if let (true, Some(known)) = (put, known) {
                    *known = Known::Present;
                    self.real.tell(slot);
                }
            }
            1 => {
                let asked = self.real.ask_back(slot).is_ok();
                assert_eq!(asked, known.as_deref().is_some_and(|k| *k != Known::Empty));
                if let Some(known @ Known::Present) = known {
                    *known = Known::Asked;
                }
            }
            2 => {
                let kept = self.real.keep(slot);
                if let Some(known @ Known::Asked) = known {
                    *known = Known::Present;
                }
                let present = self.known.get(usize::from(slot)) == Some(&Known::Present);
                assert_eq!(kept, present);
            }
            _ => {
                let gone = self.real.take_ejected();
                let let_go = self.known.iter_mut().filter(|k| **k == Known::LetGo);
                assert_eq!(let_go.map(|k| *k = Known::Empty).count(), gone.len());
            }
        }
        self.check();
    }

    fn guest(&mut self, program: &mut Program<'_>) {
        let (offset, length) = (
            u16::from(program.byte().unwrap_or(0) % 16),
            program.length(),
        );
        let value = program.wide();
        if value & 1 == 0 {
            let mut data = [0xff; 4];
            self.real
                .read(offset, data.get_mut(..length).expect("a length"));
            return self.check();
        }
        let bytes = value.to_le_bytes();
        self.real
            .write(offset, bytes.get(..length).expect("a length"));
        if (offset, length) == (8, 4) {
            for (slot, known) in self.known.iter_mut().enumerate() {
                if *known == Known::Asked && value >> slot & 1 == 1 {
                    *known = Known::LetGo;
                }
            }
        }
        self.check();
    }

    fn check(&self) {
        for (slot, known) in self.known.iter().enumerate() {
            let seen = matches!(known, Known::Present | Known::Asked);
            assert_eq!(self.real.function(slot).is_some(), seen);
        }
        let asking = self
            .known
            .iter()
            .any(|k| matches!(k, Known::Asked | Known::LetGo));
        assert_eq!(self.real.is_asking(), asking);
    }
}

struct Nowhere;

impl MsiRouter for Nowhere {
    fn route(&self, _gsi: u32, _message: MsiMessage) {}
}

fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).expect("an event")
}

fn moved(from: &Chipset, ram: &GuestRam) -> Chipset {
    let to = board(ram);
    to.restore(from.save()).expect("a board's own state");
    assert_eq!(from.ecam(), to.ecam());
    to
}

/// Bytes of a file, by port, whatever was selected before.
fn still_says(board: &Chipset) {
    board.port_write(FW_CFG, &(FIRST_FILE + 1).to_le_bytes());
    let mut content = [0; CONTENT.len()];
    assert!(board.port_read(FW_CFG + 1, &mut content));
    assert_eq!(&content, CONTENT);
}

fn port_read(board: &Chipset, program: &mut Program<'_>) {
    let mut data = [0; 4];
    let length = program.length();
    if let Some(data) = data.get_mut(..length) {
        board.port_read(program.port(), data);
    }
}

fn port_write(board: &Chipset, program: &mut Program<'_>) {
    let (length, port) = (program.length(), program.port());
    let value = program.wide().to_le_bytes();
    // The mark is only safe from requests that this program did not make.
    let dma = port == FW_CFG + 8 && length == 4;
    if !dma {
        board.port_write(port, value.get(..length).unwrap_or(&value));
    }
}

fn register(board: &Chipset, program: &mut Program<'_>) {
    let [bridge, lpc] = board.functions();
    let (_, function) = if program.byte().is_some_and(|b| b & 1 == 1) {
        bridge
    } else {
        lpc
    };
    let offset = usize::from(program.word()) % 0x1010;
    let value = program.wide().to_le_bytes();
    let length = program.length();
    function.config_write(offset, value.get(..length).unwrap_or(&value));
    let mut data = [0; 4];
    function.config_read(offset, &mut data);
}

/// A request to the device, to memory in front of the mark or to no memory at all.
fn request(board: &Chipset, ram: &GuestRam, program: &mut Program<'_>) {
    let control = u32::from(program.word()) << 16 | u32::from(program.byte().unwrap_or(0));
    let mut length = program.wide();
    let mut to = u64::from(program.wide()) << 32 | u64::from(program.wide());
    if program.byte().is_some_and(|b| b & 3 != 0) {
        length %= 0x400;
        to %= MARK_AT - 0x400;
    } else if to < RAM as u64 {
        to += RAM as u64;
    }
    let mut bytes = control.to_be_bytes().to_vec();
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(&to.to_be_bytes());
    let at = program.word() % 0x8000;
    ram.write_slice(&bytes, GuestAddress(at.into()))
        .expect("memory");
    board.port_write(FW_CFG + 4, &0u32.to_be_bytes());
    board.port_write(FW_CFG + 8, &u32::from(at).to_be_bytes());
    let mut answer = [0; 4];
    ram.read_slice(&mut answer, GuestAddress(at.into()))
        .expect("memory");
}

/// What is left of the fuzzer's bytes.
struct Program<'a>(&'a [u8]);

impl Program<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn word(&mut self) -> u16 {
        u16::from_le_bytes([self.byte().unwrap_or(0), self.byte().unwrap_or(0)])
    }

    fn wide(&mut self) -> u32 {
        u32::from(self.word()) | u32::from(self.word()) << 16
    }

    fn length(&mut self) -> usize {
        [1, 2, 4, 3][usize::from(self.byte().unwrap_or(0) & 3)]
    }

    /// Mostly one of the board's.
    fn port(&mut self) -> u16 {
        let byte = self.byte().unwrap_or(0);
        match byte >> 5 {
            0 => 0x70 + u16::from(byte & 1),
            1 => 0x600 + u16::from(byte & 0xf),
            2..6 => FW_CFG + u16::from(byte & 0xf),
            _ => self.word(),
        }
    }
}

const FW_CFG: u16 = 0x510;
const RAM: usize = 0x1_0000;
const SLOTS: usize = 8;
/// In front of the end, where no request that is in memory reaches.
const MARK_AT: u64 = RAM as u64 - 0x100;
const MARK: [u8; 16] = [0x5a; 16];
const CONTENT: &[u8; 11] = b"what it was";
const OPERATIONS_MAX: usize = 300;
