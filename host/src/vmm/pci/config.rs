//! A type-0 configuration space: bytes, which of them the guest may write, capabilities, one fixed BAR.

/// Configuration space of one function.
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    capability_end: usize,
    last_capability: usize,
    bar: Option<Bar>,
}

/// Memory BAR 0. Its address is the VMM's and stays; the guest may ask for its size.
#[derive(Clone, Copy)]
struct Bar {
    address: u32,
    size: u32,
    sizing: bool,
}

/// What a function is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor and device.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Class, subclass, programming interface: 24 bits.
    pub class: u32,
    /// Revision.
    pub revision: u8,
    /// Subsystem vendor and id.
    pub subsystem: (u16, u16),
}

impl ConfigSpace {
    /// A function without BAR or capability.
    pub fn new(identity: Identity) -> Self {
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            capability_end: FIRST_CAPABILITY,
            last_capability: 0,
            bar: None,
        };
        space.set(VENDOR, &identity.vendor.to_le_bytes());
        space.set(DEVICE, &identity.device.to_le_bytes());
        space.set(
            REVISION,
            &((identity.class << 8) | u32::from(identity.revision)).to_le_bytes(),
        );
        space.set(SUBSYSTEM_VENDOR, &identity.subsystem.0.to_le_bytes());
        space.set(SUBSYSTEM_ID, &identity.subsystem.1.to_le_bytes());
        space.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        space.allow(INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Gives it memory BAR 0: 32 bit, `size` a power of two.
    pub fn set_bar(&mut self, address: u32, size: u32) {
        self.bar = Some(Bar {
            address,
            size,
            sizing: false,
        });
    }

    /// Gives it memory BAR 0 that is the guest's to place: 32 bit, `size` a power of two, at no address yet.
    pub fn set_movable_bar(&mut self, size: u32) {
        self.bar = None;
        self.allow(BAR0, &(!(size - 1)).to_le_bytes());
    }

    /// Where a movable BAR is, while the function answers there.
    pub fn placed_bar(&self) -> Option<u64> {
        let mut register = [0; 4];
        self.read(BAR0, &mut register);
        let base = u32::from_le_bytes(register);
        let answers = self.byte(COMMAND) & COMMAND_MEMORY != 0;
        (answers && base != 0).then_some(base.into())
    }

    /// Appends a capability: `body` is what follows id and next pointer, `writable` says which of its bits
    /// the guest may write. Returns its offset, or nothing if there is no room.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Option<usize> {
        let at = self.capability_end;
        let end = (at + 2 + body.len()).next_multiple_of(4);
        if end > SIZE {
            return None;
        }
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.allow(at + 2, writable);
        let link = if self.last_capability == 0 {
            CAPABILITIES
        } else {
            self.last_capability + 1
        };
        self.set(link, &[u8::try_from(at).ok()?]);
        self.set(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        self.last_capability = at;
        self.capability_end = end;
        Some(at)
    }

    /// Reads; beyond the end are ones.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = self.byte(offset + index);
        }
    }

    /// Writes what may be written.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        if let Some(bar) = &mut self.bar
            && offset == BAR0
            && data.len() == 4
        {
            bar.sizing = data.iter().all(|byte| *byte == 0xff);
            return;
        }
        for (index, byte) in data.iter().enumerate() {
            let at = offset + index;
            if let (Some(slot), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *slot = (*slot & !mask) | (byte & mask);
            }
        }
    }

    /// The bytes the guest may have written, to be saved.
    pub fn save(&self) -> Vec<u8> {
        self.bytes.to_vec()
    }

    /// Puts back what [`ConfigSpace::save`] gave, only where the guest may write.
    pub fn restore(&mut self, saved: &[u8]) {
        for ((slot, mask), byte) in self.bytes.iter_mut().zip(&self.writable).zip(saved) {
            *slot = (*slot & !mask) | (byte & mask);
        }
    }

    fn byte(&self, at: usize) -> u8 {
        if let (Some(bar), Some(index)) =
            (&self.bar, at.checked_sub(BAR0).filter(|index| *index < 4))
        {
            let value = if bar.sizing {
                !(bar.size - 1)
            } else {
                bar.address
            };
            return value.to_le_bytes().get(index).copied().unwrap_or(0xff);
        }
        self.bytes.get(at).copied().unwrap_or(0xff)
    }

    /// Sets bytes that the guest sees.
    pub fn set(&mut self, offset: usize, bytes: &[u8]) {
        for (slot, byte) in self.bytes.iter_mut().skip(offset).zip(bytes) {
            *slot = *byte;
        }
    }

    /// Lets the guest write the bits of `mask`.
    pub fn allow(&mut self, offset: usize, mask: &[u8]) {
        for (slot, byte) in self.writable.iter_mut().skip(offset).zip(mask) {
            *slot = *byte;
        }
    }
}

const SIZE: usize = 256;
const VENDOR: usize = 0x00;
const DEVICE: usize = 0x02;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const BAR0: usize = 0x10;
const SUBSYSTEM_VENDOR: usize = 0x2c;
const SUBSYSTEM_ID: usize = 0x2e;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const FIRST_CAPABILITY: usize = 0x40;
const STATUS_CAPABILITIES: u16 = 1 << 4;
// I/O, memory, bus master, INTx disable
const COMMAND_WRITABLE: u16 = 0x0407;
const COMMAND_MEMORY: u8 = 1 << 1;

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1041,
            class: 0x02_0000,
            revision: 1,
            subsystem: (0x1af4, 0x41),
        });
        space.set_bar(0xe000_0000, 0x8000);
        space
    }

    fn word(space: &ConfigSpace, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        space.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn identity_is_read_only() {
        let mut space = space();
        space.write(0, &[0; 4]);
        assert_eq!(word(&space, 0), 0x1041_1af4);
        assert_eq!(word(&space, 8), 0x0200_0001);
        space.write(4, &[0xff; 4]);
        assert_eq!(word(&space, 4), 0x0000_0407);
    }

    #[test]
    fn the_bar_tells_its_size_and_does_not_move() {
        let mut space = space();
        space.write(0x10, &[0xff; 4]);
        assert_eq!(word(&space, 0x10), 0xffff_8000);
        space.write(0x10, &0xd000_0000u32.to_le_bytes());
        assert_eq!(word(&space, 0x10), 0xe000_0000);
        space.write(0x14, &[0xff; 4]);
        assert_eq!(word(&space, 0x14), 0);
    }

    #[test]
    fn a_movable_bar_tells_its_size_goes_where_it_is_put_and_travels() {
        let mut space = ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1041,
            class: 0x02_0000,
            revision: 1,
            subsystem: (0x1af4, 0x41),
        });
        space.set_movable_bar(0x8000);
        assert_eq!((word(&space, 0x10), space.placed_bar()), (0, None));
        space.write(0x10, &[0xff; 4]);
        assert_eq!(word(&space, 0x10), 0xffff_8000);
        space.write(0x10, &0xfb00_8123u32.to_le_bytes());
        assert_eq!(word(&space, 0x10), 0xfb00_8000);
        assert_eq!(space.placed_bar(), None);
        space.write(0x04, &[2, 0]);
        assert_eq!(space.placed_bar(), Some(0xfb00_8000));
        let mut other = ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1041,
            class: 0x02_0000,
            revision: 1,
            subsystem: (0x1af4, 0x41),
        });
        other.set_movable_bar(0x8000);
        other.restore(&space.save());
        assert_eq!(other.placed_bar(), Some(0xfb00_8000));
        space.write(0x04, &[4, 0]);
        assert_eq!(space.placed_bar(), None);
    }

    #[test]
    fn capabilities_are_chained_until_the_room_ends() {
        let mut space = space();
        assert_eq!(space.add_capability(9, &[1, 2, 3], &[]), Some(0x40));
        assert_eq!(space.add_capability(0x11, &[0; 10], &[0, 0xc0]), Some(0x48));
        assert_eq!(word(&space, 0x34), 0x40);
        assert_eq!(word(&space, 0x40) & 0xffff, 0x4809);
        assert_eq!(word(&space, 0x04) >> 16, 0x10);
        assert_eq!(space.add_capability(9, &[0; 200], &[]), None);
    }

    #[test]
    fn reads_beyond_the_end_are_ones() {
        assert_eq!(word(&space(), 254) >> 16, 0xffff);
    }
}
