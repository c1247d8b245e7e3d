//! ACPI's generic event device: something happened outside that the guest should look at. An interrupt says that, a
//! port says what, and forgets it.
//!
//! What has not been fetched is not part of the machine's state: it does not travel when the guest moves.

use std::sync::atomic::{AtomicU8, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// What can happen; its bit in the port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Event {
    /// Somebody pressed the power button: an orderly shutdown is wanted.
    PowerButton = 1,
    /// The VM generation id is another: the guest is a copy, or went back in time.
    Generation = 2,
    /// Something is in one of the slots that was not, or is to leave it.
    Slots = 4,
}

/// The device.
pub struct Events {
    happened: AtomicU8,
    line: EventFd,
}

impl Events {
    /// Nothing has happened; `line` raises the interrupt.
    pub fn new(line: EventFd) -> Self {
        Self {
            happened: AtomicU8::new(0),
            line,
        }
    }

    /// Lets the guest know.
    pub fn raise(&self, event: Event) {
        self.happened.fetch_or(event as u8, Ordering::SeqCst);
        // The counter cannot overflow by one write.
        let _ = self.line.write(1);
    }

    /// The guest asks what.
    pub fn take(&self) -> u8 {
        self.happened.swap(0, Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happened_is_told_once_and_interrupts() {
        let line = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
        let events = Events::new(line.try_clone().unwrap());
        assert!(line.read().is_err());
        events.raise(Event::PowerButton);
        events.raise(Event::Generation);
        assert_eq!(line.read().unwrap(), 2);
        assert_eq!((events.take(), events.take()), (3, 0));
    }
}
