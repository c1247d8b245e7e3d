//! Slots of the PCI bus into which functions can be put, and taken out of again, while the guest runs: who is in them,
//! and the registers by which the guest hears of it and lets go (after QEMU's `docs/specs/acpi_pci_hotplug.rst`; a bit
//! counts slots, not devices of the bus).
//!
//! Every register value comes from the guest. It can let go only of what it was asked to: whatever else it writes
//! changes nothing.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::devices::events::{Event, Events};
use crate::devices::virtio::transport::VirtioPci;
use crate::vmm::pci::PciFunction;

/// The slots of one machine.
pub struct HotPlug {
    inner: Mutex<Inner>,
    /// The guest has let go of something.
    ejected: EventFd,
    events: Arc<Events>,
}

/// What is in a slot.
#[derive(Clone)]
pub struct Occupant {
    /// The function.
    pub function: Arc<VirtioPci>,
    /// Its interrupts, to be given back.
    pub gsis: Vec<u32>,
}

struct Inner {
    slots: Vec<Slot>,
    /// Slots in which something is new.
    up: u32,
    /// Slots whose function shall go.
    down: u32,
}

enum Slot {
    Empty,
    Present(Occupant),
    /// The guest has been asked to let go.
    Leaving(Occupant),
    /// It has, and sees nothing there any more.
    Ejected(Occupant),
}

/// Why nothing can be put into a slot, or taken out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SlotError {
    /// There is no such slot, or something is in it.
    #[error("slot {0} is not there, or not free")]
    Taken(u8),
    /// Nothing is in it.
    #[error("nothing is in slot {0}")]
    Empty(u8),
}

impl HotPlug {
    /// So many empty slots; `events` interrupts the guest.
    pub fn new(slots: u8, events: Arc<Events>) -> std::io::Result<Self> {
        let slots = (0..slots).map(|_| Slot::Empty).collect();
        Ok(Self {
            inner: Mutex::new(Inner {
                slots,
                up: 0,
                down: 0,
            }),
            ejected: EventFd::new(EFD_NONBLOCK)?,
            events,
        })
    }

    /// Puts a function into a free slot. The guest hears of it by [`HotPlug::tell`].
    pub fn insert(&self, slot: u8, occupant: Occupant) -> Result<(), SlotError> {
        match self.lock().slots.get_mut(usize::from(slot)) {
            Some(place @ Slot::Empty) => {
                *place = Slot::Present(occupant);
                Ok(())
            }
            _ => Err(SlotError::Taken(slot)),
        }
    }

    /// Says to the guest that something is in this slot. Superfluous news does no harm.
    pub fn tell(&self, slot: u8) {
        self.lock().up |= bit(slot);
        self.events.raise(Event::Slots);
    }

    /// Asks the guest to let go; as often as one likes.
    pub fn ask_back(&self, slot: u8) -> Result<(), SlotError> {
        {
            let mut inner = self.lock();
            inner.replace(slot, |state| match state {
                Slot::Present(occupant) | Slot::Leaving(occupant) => Slot::Leaving(occupant),
                other => other,
            });
            if !matches!(inner.at(slot), Some(Slot::Leaving(_) | Slot::Ejected(_))) {
                return Err(SlotError::Empty(slot));
            }
            inner.down |= bit(slot);
        }
        self.events.raise(Event::Slots);
        Ok(())
    }

    /// The guest may keep what it was asked for, if it has not let go yet; whether that is so.
    pub fn keep(&self, slot: u8) -> bool {
        let mut inner = self.lock();
        inner.down &= !bit(slot);
        inner.replace(slot, |state| match state {
            Slot::Leaving(occupant) => Slot::Present(occupant),
            other => other,
        });
        matches!(inner.at(slot), Some(Slot::Present(_)))
    }

    /// Whether the guest has been asked for something that it still has.
    pub fn is_asking(&self) -> bool {
        let inner = self.lock();
        let asking = |slot: &Slot| matches!(slot, Slot::Leaving(_) | Slot::Ejected(_));
        inner.slots.iter().any(asking)
    }

    /// Takes out what the guest has let go of, slot by slot.
    pub fn take_ejected(&self) -> Vec<(u8, Occupant)> {
        // Read or not, what counts is below.
        let _ = self.ejected.read();
        let mut inner = self.lock();
        let mut gone = Vec::new();
        for (number, place) in (0u8..).zip(inner.slots.iter_mut()) {
            match std::mem::replace(place, Slot::Empty) {
                Slot::Ejected(occupant) => gone.push((number, occupant)),
                other => *place = other,
            }
        }
        gone
    }

    /// Takes out what the guest has never seen: it could not be put in whole.
    pub fn withdraw(&self, slot: u8) {
        self.lock().replace(slot, |_| Slot::Empty);
    }

    /// Becomes readable when the guest has let go of something.
    #[expect(unsafe_code, reason = "EventFd lends its descriptor as a number only")]
    pub fn event(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is the event's own and open as long as it is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.ejected.as_raw_fd()) }
    }

    /// What the guest sees in a slot.
    pub fn function(&self, slot: usize) -> Option<Arc<VirtioPci>> {
        let inner = self.lock();
        match inner.slots.get(slot) {
            Some(Slot::Present(occupant) | Slot::Leaving(occupant)) => {
                Some(Arc::clone(&occupant.function))
            }
            _ => None,
        }
    }

    /// The same, as the bus wants it.
    pub fn pci_function(&self, slot: usize) -> Option<Arc<dyn PciFunction>> {
        Some(self.function(slot)? as Arc<dyn PciFunction>)
    }

    /// Every function that the guest sees, by slot.
    pub fn functions(&self) -> Vec<(u8, Arc<VirtioPci>)> {
        let count = self.lock().slots.len();
        let all = (0..count).zip(0u8..);
        all.filter_map(|(slot, number)| Some((number, self.function(slot)?)))
            .collect()
    }

    /// Whose BAR an address is in, and where.
    pub fn placed_at(&self, address: u64) -> Option<(Arc<VirtioPci>, u64)> {
        let functions = self.functions().into_iter();
        functions
            .filter_map(|(_, function)| {
                let offset = function.in_placed_bar(address)?;
                Some((function, offset))
            })
            .next()
    }

    /// The guest reads at `offset` of the registers. What it is told of, it is told once.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        // Only whole registers: a byte of one would make it forget the others.
        if data.len() != REGISTER {
            return;
        }
        let mut inner = self.lock();
        let value = match offset {
            UP => std::mem::take(&mut inner.up),
            DOWN => std::mem::take(&mut inner.down),
            _ => 0,
        };
        data.copy_from_slice(&value.to_le_bytes());
    }

    /// The guest writes: to the eject register, which slots it has let go of.
    pub fn write(&self, offset: u16, data: &[u8]) {
        let (EJECT, Ok(value)) = (offset, <[u8; REGISTER]>::try_from(data)) else {
            return;
        };
        let value = u32::from_le_bytes(value);
        let mut inner = self.lock();
        let mut gone = 0;
        for slot in (0..MAX).filter(|slot| value & bit(*slot) != 0) {
            inner.replace(slot, |state| match state {
                Slot::Leaving(occupant) => {
                    gone |= bit(slot);
                    Slot::Ejected(occupant)
                }
                other => other,
            });
        }
        inner.down &= !gone;
        drop(inner);
        if gone != 0 {
            // The counter cannot overflow by one write.
            let _ = self.ejected.write(1);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn at(&self, slot: u8) -> Option<&Slot> {
        self.slots.get(usize::from(slot))
    }

    fn replace(&mut self, slot: u8, with: impl FnOnce(Slot) -> Slot) {
        if let Some(place) = self.slots.get_mut(usize::from(slot)) {
            *place = with(std::mem::replace(place, Slot::Empty));
        }
    }
}

fn bit(slot: u8) -> u32 {
    1u32.checked_shl(slot.into()).unwrap_or(0)
}

const UP: u16 = 0;
const DOWN: u16 = 4;
const EJECT: u16 = 8;
const REGISTER: usize = 4;
const MAX: u8 = 32;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::transport::tests::any_function;

    fn occupant() -> Occupant {
        Occupant {
            function: any_function(),
            gsis: vec![],
        }
    }

    fn slots(count: u8) -> (HotPlug, Arc<Events>) {
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let events = Arc::new(Events::new(line));
        (HotPlug::new(count, Arc::clone(&events)).unwrap(), events)
    }

    fn register(slots: &HotPlug, offset: u16) -> u32 {
        let mut data = [0xff; 4];
        slots.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn what_is_put_in_is_told_once_and_leaves_only_when_it_was_asked_back() {
        let (slots, events) = slots(4);
        slots.insert(2, occupant()).unwrap();
        assert_eq!(slots.insert(2, occupant()), Err(SlotError::Taken(2)));
        assert_eq!(slots.insert(4, occupant()), Err(SlotError::Taken(4)));
        slots.tell(2);
        assert_eq!(events.take(), Event::Slots as u8);
        assert_eq!((register(&slots, UP), register(&slots, UP)), (4, 0));
        // Nobody has asked for it.
        slots.write(EJECT, &u32::MAX.to_le_bytes());
        assert!(slots.take_ejected().is_empty() && slots.function(2).is_some());
        assert_eq!(slots.ask_back(1), Err(SlotError::Empty(1)));
        slots.ask_back(2).unwrap();
        assert!(slots.is_asking());
        assert_eq!((register(&slots, DOWN), register(&slots, DOWN)), (4, 0));
        // Another slot than was asked for.
        slots.write(EJECT, &0b1011u32.to_le_bytes());
        assert!(slots.take_ejected().is_empty());
        slots.write(EJECT, &4u32.to_le_bytes());
        assert!(slots.function(2).is_none(), "the guest sees it still");
        assert_eq!(slots.event_count(), 1);
        let gone: Vec<u8> = slots.take_ejected().iter().map(|(slot, _)| *slot).collect();
        assert_eq!((gone, slots.is_asking()), (vec![2], false));
        slots.insert(2, occupant()).unwrap();
    }

    #[test]
    fn what_may_be_kept_is_not_let_go_and_what_is_gone_cannot_be_kept() {
        let (slots, _) = slots(1);
        slots.insert(0, occupant()).unwrap();
        slots.ask_back(0).unwrap();
        assert!(slots.keep(0));
        assert_eq!(register(&slots, DOWN), 0);
        slots.write(EJECT, &1u32.to_le_bytes());
        assert!(slots.take_ejected().is_empty());
        slots.ask_back(0).unwrap();
        slots.write(EJECT, &1u32.to_le_bytes());
        assert!(!slots.keep(0));
        assert_eq!(slots.take_ejected().len(), 1);
    }

    #[test]
    fn accesses_of_other_widths_and_places_do_nothing() {
        let (slots, _) = slots(8);
        slots.insert(0, occupant()).unwrap();
        slots.tell(0);
        slots.ask_back(0).unwrap();
        for length in [0usize, 1, 2, 3, 5, 8] {
            let mut data = vec![0xff; length];
            for offset in [UP, 1, DOWN, EJECT, 11, u16::MAX] {
                slots.read(offset, &mut data);
                assert!(data.iter().all(|byte| *byte == 0));
                slots.write(offset, &vec![1; length]);
            }
        }
        for offset in [UP, DOWN, 12, 16, u16::MAX] {
            slots.write(offset, &[1, 0, 0, 0]);
        }
        assert!(slots.take_ejected().is_empty());
        assert_eq!((register(&slots, UP), register(&slots, DOWN)), (1, 1));
        assert_eq!(register(&slots, EJECT), 0);
    }

    impl HotPlug {
        fn event_count(&self) -> u64 {
            let count = self.ejected.read().unwrap_or(0);
            if count > 0 {
                self.ejected.write(count).unwrap();
            }
            count
        }
    }
}
