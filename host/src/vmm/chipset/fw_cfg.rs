//! QEMU's firmware configuration device (`docs/specs/fw_cfg.rst`): what firmware asks the VMM, by port and by DMA.
//!
//! Selector, lengths and addresses come from the guest. It reads what was put in, and nothing else; it changes nothing
//! but its own place in it.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use crate::devices::virtio::GuestRam;

/// The device of one machine.
pub struct FwCfg {
    ram: GuestRam,
    inner: Mutex<Inner>,
}

/// What firmware finds: items by number, and files, which have names and numbers from [`FIRST_FILE`].
#[derive(Debug, Default, PartialEq, Eq)]
pub struct FwCfgItems {
    items: BTreeMap<u16, Vec<u8>>,
    files: Vec<String>,
}

impl FwCfgItems {
    /// What every firmware asks first: that the device is there, with DMA, and how many processors there are.
    pub fn new(vcpus: u8) -> Self {
        let mut items = Self::default();
        items.set(SIGNATURE, b"QEMU".to_vec());
        items.set(ID, (ID_PORTS | ID_DMA).to_le_bytes().to_vec());
        items.set(CPUS, u16::from(vcpus).to_le_bytes().to_vec());
        items.set(MAX_CPUS, u16::from(vcpus).to_le_bytes().to_vec());
        items.set(DIRECTORY, 0u32.to_be_bytes().to_vec());
        items
    }

    /// Puts an item in.
    pub fn set(&mut self, key: u16, bytes: Vec<u8>) {
        self.items.insert(key, bytes);
    }

    /// Puts a file in, or another content into it; the name is cut to what the directory has room for.
    pub fn set_file(&mut self, name: &str, bytes: Vec<u8>) {
        let name: String = name.chars().take(NAME_ROOM - 1).collect();
        let index = self.files.iter().position(|have| *have == name);
        let index = index.unwrap_or_else(|| {
            self.files.push(name);
            self.files.len() - 1
        });
        self.set(FIRST_FILE + index as u16, bytes);
        let directory = self.directory();
        self.set(DIRECTORY, directory);
    }

    /// Puts a kernel in, with its initramfs and command line, each unchanged. Firmware joins a kernel's two parts, so
    /// that the whole of it may be one of them.
    pub fn set_kernel(&mut self, kernel: Vec<u8>, initrd: Vec<u8>, cmdline: &str) {
        let mut cmdline = cmdline.as_bytes().to_vec();
        cmdline.push(0);
        for (size, data, bytes) in [
            (SETUP_SIZE, SETUP_DATA, Vec::new()),
            (KERNEL_SIZE, KERNEL_DATA, kernel),
            (INITRD_SIZE, INITRD_DATA, initrd),
            (CMDLINE_SIZE, CMDLINE_DATA, cmdline),
        ] {
            // No image has 4 GiB.
            self.set(size, (bytes.len() as u32).to_le_bytes().to_vec());
            self.set(data, bytes);
        }
    }

    /// A file's content.
    pub fn file(&self, name: &str) -> Option<&[u8]> {
        let index = self.files.iter().position(|have| have == name)?;
        self.items
            .get(&(FIRST_FILE + index as u16))
            .map(Vec::as_slice)
    }

    fn directory(&self) -> Vec<u8> {
        let mut directory = (self.files.len() as u32).to_be_bytes().to_vec();
        for (name, key) in self.files.iter().zip(FIRST_FILE..) {
            let size = self.items.get(&key).map_or(0, Vec::len) as u32;
            directory.extend_from_slice(&size.to_be_bytes());
            directory.extend_from_slice(&key.to_be_bytes());
            directory.extend_from_slice(&[0; 2]);
            let mut room = [0; NAME_ROOM];
            room.iter_mut()
                .zip(name.bytes())
                .for_each(|(to, from)| *to = from);
            directory.extend_from_slice(&room);
        }
        directory
    }
}

impl FwCfg {
    /// A device with these items; DMA goes to `ram`.
    pub fn new(items: FwCfgItems, ram: GuestRam) -> Self {
        let inner = Inner {
            items,
            state: FwCfgStateV1::default(),
        };
        Self {
            ram,
            inner: Mutex::new(inner),
        }
    }

    /// Changes what is in it.
    pub fn update(&self, change: impl FnOnce(&mut FwCfgItems)) {
        change(&mut self.lock().items);
    }

    /// `in`; `offset` is from the selector port. False if the port is not this device's.
    pub fn port_read(&self, offset: u16, data: &mut [u8]) -> bool {
        match offset {
            SELECTOR => data.fill(0),
            // A string instruction reads a byte after another from the same port.
            DATA => self.lock().read_data(data),
            DMA..DMA_END => {
                let signature = DMA_SIGNATURE.iter().skip(usize::from(offset - DMA));
                data.fill(0);
                data.iter_mut()
                    .zip(signature)
                    .for_each(|(to, from)| *to = *from);
            }
            _ => return false,
        }
        true
    }

    /// `out`.
    pub fn port_write(&self, offset: u16, data: &[u8]) -> bool {
        match (offset, data) {
            (SELECTOR, [low, high]) => self.lock().select(u16::from_le_bytes([*low, *high])),
            (DMA, [a, b, c, d]) => {
                self.lock().state.dma_high = u32::from_be_bytes([*a, *b, *c, *d]);
            }
            (DMA_LOW, [a, b, c, d]) => {
                let mut inner = self.lock();
                let high = std::mem::take(&mut inner.state.dma_high);
                let low = u32::from_be_bytes([*a, *b, *c, *d]);
                inner.transfer(&self.ram, (u64::from(high) << 32) | u64::from(low));
            }
            (SELECTOR | DATA | DMA..DMA_END, _) => {}
            _ => return false,
        }
        true
    }

    /// Which item is selected and how far it is read.
    pub fn save(&self) -> FwCfgStateV1 {
        self.lock().state
    }

    /// Puts that back.
    pub fn restore(&self, saved: FwCfgStateV1) {
        self.lock().state = saved;
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The guest's place in the items, version 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FwCfgStateV1 {
    key: u16,
    offset: u64,
    dma_high: u32,
}

struct Inner {
    items: FwCfgItems,
    state: FwCfgStateV1,
}

impl Inner {
    fn select(&mut self, key: u16) {
        self.state.key = key;
        self.state.offset = 0;
    }

    /// What is left of the selected item; of one that is not there, nothing.
    fn rest(&self) -> &[u8] {
        let item = self.items.items.get(&self.state.key);
        usize::try_from(self.state.offset)
            .ok()
            .and_then(|offset| item?.get(offset..))
            .unwrap_or_default()
    }

    /// Bytes of the item, zeros behind its end.
    fn read_data(&mut self, data: &mut [u8]) {
        data.fill(0);
        let rest = self.rest();
        data.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
        self.skip(data.len() as u64);
    }

    fn skip(&mut self, length: u64) {
        self.state.offset = self.state.offset.saturating_add(length);
    }

    /// Carries out the request at `address` and says there that it is done, or that it went wrong.
    fn transfer(&mut self, ram: &GuestRam, address: u64) {
        let mut request = [0; REQUEST];
        if ram.read_slice(&mut request, GuestAddress(address)).is_err() {
            return;
        }
        let outcome = if self.carry_out(ram, &request).is_some() {
            0
        } else {
            CONTROL_ERROR
        };
        // It was read a moment ago; should it be gone, nobody waits for it.
        let _ = ram.write_slice(&outcome.to_be_bytes(), GuestAddress(address));
    }

    fn carry_out(&mut self, ram: &GuestRam, request: &[u8; REQUEST]) -> Option<()> {
        let [a, b, c, d, e, f, g, h, to @ ..] = *request;
        let control = u32::from_be_bytes([a, b, c, d]);
        let length = u32::from_be_bytes([e, f, g, h]);
        let to = GuestAddress(u64::from_be_bytes(to));
        if control & CONTROL_SELECT != 0 {
            self.select((control >> 16) as u16);
        }
        if control & CONTROL_READ != 0 {
            self.read_to(ram, to, length)
        } else if control & CONTROL_SKIP != 0 {
            self.skip(length.into());
            Some(())
        } else {
            // Nothing here is the guest's to write; to select alone is all that is left.
            (control & CONTROL_WRITE == 0).then_some(())
        }
    }

    fn read_to(&mut self, ram: &GuestRam, to: GuestAddress, length: u32) -> Option<()> {
        if length > MAX_TRANSFER {
            return None;
        }
        let length = length as usize;
        let rest = self.rest();
        let have = rest.get(..length).unwrap_or(rest);
        ram.write_slice(have, to).ok()?;
        let zeros = vec![0; length - have.len()];
        let behind = to.0.checked_add(have.len() as u64)?;
        if !zeros.is_empty() {
            ram.write_slice(&zeros, GuestAddress(behind)).ok()?;
        }
        self.skip(length as u64);
        Some(())
    }
}

/// Number of the first file.
pub const FIRST_FILE: u16 = 0x20;

const SIGNATURE: u16 = 0x00;
const ID: u16 = 0x01;
const CPUS: u16 = 0x05;
const KERNEL_SIZE: u16 = 0x08;
const INITRD_SIZE: u16 = 0x0b;
const MAX_CPUS: u16 = 0x0f;
const KERNEL_DATA: u16 = 0x11;
const INITRD_DATA: u16 = 0x12;
const CMDLINE_SIZE: u16 = 0x14;
const CMDLINE_DATA: u16 = 0x15;
const SETUP_SIZE: u16 = 0x17;
const SETUP_DATA: u16 = 0x18;
const DIRECTORY: u16 = 0x19;
const ID_PORTS: u32 = 1;
const ID_DMA: u32 = 1 << 1;
const NAME_ROOM: usize = 56;
// ports, from the selector's
const SELECTOR: u16 = 0;
const DATA: u16 = 1;
const DMA: u16 = 4;
const DMA_LOW: u16 = 8;
const DMA_END: u16 = 12;
const DMA_SIGNATURE: &[u8; 8] = b"QEMU CFG";
/// `struct FWCfgDmaAccess`: control, length, address; all big-endian.
const REQUEST: usize = 16;
const CONTROL_ERROR: u32 = 1;
const CONTROL_READ: u32 = 1 << 1;
const CONTROL_SKIP: u32 = 1 << 2;
const CONTROL_SELECT: u32 = 1 << 3;
const CONTROL_WRITE: u32 = 1 << 4;
/// Most bytes of one transfer: more than firmware asks for, and no long absence of the vCPU.
const MAX_TRANSFER: u32 = 64 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_offered_whole_with_its_sizes_and_the_lines_end() {
        let mut items = FwCfgItems::new(1);
        items.set_kernel(vec![7; 300], Vec::new(), "quiet");
        let item = |key: u16| items.items.get(&key).unwrap().clone();
        assert_eq!(item(SETUP_SIZE), [0; 4]);
        assert_eq!(item(KERNEL_SIZE), [0x2c, 1, 0, 0]);
        assert_eq!(item(KERNEL_DATA), [7; 300]);
        assert_eq!((item(INITRD_SIZE), item(INITRD_DATA)), (vec![0; 4], vec![]));
        assert_eq!(item(CMDLINE_SIZE), [6, 0, 0, 0]);
        assert_eq!(item(CMDLINE_DATA), b"quiet\0");
    }

    fn device() -> FwCfg {
        let mut items = FwCfgItems::new(3);
        items.set_file("etc/one", b"first".to_vec());
        items.set_file("etc/two", vec![7; 9000]);
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 128 << 20)]).unwrap();
        FwCfg::new(items, ram)
    }

    fn select(device: &FwCfg, key: u16) {
        assert!(device.port_write(SELECTOR, &key.to_le_bytes()));
    }

    fn bytes<const N: usize>(device: &FwCfg) -> [u8; N] {
        let mut data = [0xee; N];
        assert!(device.port_read(DATA, &mut data));
        data
    }

    /// A request at 0x100 for 0x1000; what became of its control word.
    fn dma(device: &FwCfg, control: u32, length: u32, to: u64) -> u32 {
        let mut request = control.to_be_bytes().to_vec();
        request.extend_from_slice(&length.to_be_bytes());
        request.extend_from_slice(&to.to_be_bytes());
        device
            .ram
            .write_slice(&request, GuestAddress(0x100))
            .unwrap();
        assert!(device.port_write(DMA, &0u32.to_be_bytes()));
        assert!(device.port_write(DMA_LOW, &0x100u32.to_be_bytes()));
        let mut control = [0; 4];
        device
            .ram
            .read_slice(&mut control, GuestAddress(0x100))
            .unwrap();
        u32::from_be_bytes(control)
    }

    fn memory(device: &FwCfg, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        device.ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    #[test]
    fn by_port_items_are_read_to_their_end_and_zeros_behind_it() {
        let device = device();
        select(&device, SIGNATURE);
        assert_eq!(bytes(&device), *b"QEMU\0\0");
        select(&device, ID);
        assert_eq!(bytes(&device), [3, 0, 0, 0]);
        select(&device, CPUS);
        assert_eq!(bytes(&device), [3, 0]);
        select(&device, 0x4242);
        assert_eq!(bytes(&device), [0; 4]);
        select(&device, FIRST_FILE);
        assert_eq!((bytes(&device), bytes(&device)), (*b"fi", *b"rst\0"));
        let mut word = [1; 2];
        assert!(device.port_read(SELECTOR, &mut word));
        assert_eq!(word, [0; 2]);
    }

    #[test]
    fn the_directory_names_each_file_with_its_size_and_number() {
        let device = device();
        device.update(|items| items.set_file("etc/one", b"changed".to_vec()));
        select(&device, DIRECTORY);
        assert_eq!(bytes(&device), 2u32.to_be_bytes());
        for (name, size, key) in [("etc/one", 7u32, 0x20u16), ("etc/two", 9000, 0x21)] {
            assert_eq!(bytes(&device), size.to_be_bytes());
            assert_eq!(bytes(&device), key.to_be_bytes());
            assert_eq!(bytes(&device), [0; 2]);
            let room: [u8; NAME_ROOM] = bytes(&device);
            assert!(room.starts_with(name.as_bytes()) && room[name.len()..] == [0; 49]);
        }
    }

    #[test]
    fn the_dma_register_says_what_it_is() {
        let device = device();
        let mut signature = [0; 8];
        let (high, low) = signature.split_at_mut(4);
        assert!(device.port_read(DMA, high) && device.port_read(DMA_LOW, low));
        assert_eq!(&signature, b"QEMU CFG");
        let (mut two, mut none) = ([0; 2], [9; 1]);
        assert!(device.port_read(DMA_LOW + 2, &mut two));
        assert_eq!(&two, b"FG");
        for outside in [2, 3, DMA_END] {
            assert!(!device.port_read(outside, &mut none) && !device.port_write(outside, &none));
        }
    }

    #[test]
    fn dma_selects_skips_and_reads_with_zeros_behind_the_end() {
        let device = device();
        device
            .ram
            .write_slice(&[0xee; 64], GuestAddress(0x1000))
            .unwrap();
        let select_read = (u32::from(FIRST_FILE) << 16) | CONTROL_SELECT | CONTROL_READ;
        assert_eq!(dma(&device, select_read, 3, 0x1000), 0);
        assert_eq!(memory(&device, 0x1000, 4), *b"fir\xee");
        assert_eq!(dma(&device, CONTROL_READ, 6, 0x1000), 0);
        assert_eq!(memory(&device, 0x1000, 7), *b"st\0\0\0\0\xee");
        let select_skip = (u32::from(FIRST_FILE) << 16) | CONTROL_SELECT | CONTROL_SKIP;
        assert_eq!(dma(&device, select_skip, 2, 0), 0);
        assert_eq!(bytes(&device), *b"rst");
        assert_eq!(
            dma(&device, (u32::from(ID) << 16) | CONTROL_SELECT, 0, 0),
            0
        );
        assert_eq!(bytes(&device), [3]);
    }

    #[test]
    fn what_the_guest_may_not_do_is_an_error_and_changes_nothing() {
        let device = device();
        let two = (u32::from(FIRST_FILE + 1) << 16) | CONTROL_SELECT;
        for (control, length, to) in [
            (two | CONTROL_WRITE, 4, 0x1000),
            (two | CONTROL_READ, MAX_TRANSFER + 1, 0x1000),
            (two | CONTROL_READ, 4, 128 << 20),
            (two | CONTROL_READ, 0x1000, (128 << 20) - 0xfff),
            (two | CONTROL_READ, 9001, u64::MAX - 8999),
        ] {
            assert_eq!(dma(&device, control, length, to), CONTROL_ERROR);
            assert_eq!(bytes(&device), [7], "the place in the item stays");
        }
        // A request that lies nowhere is none.
        assert!(device.port_write(DMA, &u32::MAX.to_be_bytes()));
        assert!(device.port_write(DMA_LOW, &u32::MAX.to_be_bytes()));
    }

    #[test]
    fn the_place_in_an_item_travels() {
        let (from, to) = (device(), device());
        select(&from, FIRST_FILE);
        assert_eq!(bytes(&from), *b"fi");
        to.restore(from.save());
        assert_eq!(bytes(&to), *b"rst");
        to.restore(FwCfgStateV1 {
            key: FIRST_FILE,
            offset: u64::MAX,
            dma_high: 0,
        });
        assert_eq!(bytes(&to), [0; 3]);
        assert_eq!(to.save().offset, u64::MAX);
    }
}
