//! MSI-X of one function: table, pending bits, enable and mask; each vector an eventfd into KVM.

use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::vmm::irq::{MsiMessage, MsiRouter};

/// The vectors of one function.
pub struct Msix {
    state: Mutex<MsixStateV1>,
    lines: Vec<(u32, EventFd)>,
    router: Arc<dyn MsiRouter>,
}

impl Msix {
    /// One vector per line; all masked, the function disabled.
    pub fn new(lines: Vec<(u32, EventFd)>, router: Arc<dyn MsiRouter>) -> Self {
        let state = Mutex::new(MsixStateV1::power_on(lines.len()));
        Self {
            state,
            lines,
            router,
        }
    }

    /// Number of vectors.
    pub fn vectors(&self) -> u16 {
        self.lines.len() as u16
    }

    /// Message control as the capability shows it.
    pub fn control(&self) -> u16 {
        let state = self.lock();
        (self.vectors().saturating_sub(1))
            | if state.enabled { CONTROL_ENABLE } else { 0 }
            | if state.masked { CONTROL_MASK } else { 0 }
    }

    /// Sets message control.
    pub fn set_control(&self, control: u16) {
        let mut state = self.lock();
        state.enabled = control & CONTROL_ENABLE != 0;
        state.masked = control & CONTROL_MASK != 0;
        for vector in 0..self.lines.len() {
            self.deliver_if_pending(&mut state, vector);
        }
    }

    /// Raises a vector: to KVM, or into the pending bits while it is masked.
    pub fn trigger(&self, vector: u16) {
        let mut state = self.lock();
        let vector = usize::from(vector);
        if let Some(entry) = state.entries.get_mut(vector) {
            entry.pending = true;
            self.deliver_if_pending(&mut state, vector);
        }
    }

    /// Reads the table.
    pub fn read_table(&self, offset: usize, data: &mut [u8]) {
        let state = self.lock();
        for (index, byte) in data.iter_mut().enumerate() {
            let at = offset + index;
            *byte = state
                .entries
                .get(at / ENTRY_SIZE)
                .and_then(|entry| entry.words().get((at % ENTRY_SIZE) / 4).copied())
                .and_then(|word| word.to_le_bytes().get(at % 4).copied())
                .unwrap_or(0xff);
        }
    }

    /// Writes the table: aligned 4 or 8 bytes, as the specification demands; anything else is ignored.
    pub fn write_table(&self, offset: usize, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len()) {
            return;
        }
        let mut state = self.lock();
        let vector = offset / ENTRY_SIZE;
        let Some(entry) = state.entries.get_mut(vector) else {
            return;
        };
        let (words, _) = data.as_chunks::<4>();
        for (index, word) in words.iter().enumerate() {
            entry.set_word((offset % ENTRY_SIZE) / 4 + index, u32::from_le_bytes(*word));
        }
        let entry = *entry;
        if !entry.masked {
            self.route(vector, entry);
        }
        self.deliver_if_pending(&mut state, vector);
    }

    /// Reads the pending bits.
    pub fn read_pending(&self, offset: usize, data: &mut [u8]) {
        let state = self.lock();
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = (0..8)
                .filter(|bit| {
                    state
                        .entries
                        .get((offset + index) * 8 + bit)
                        .is_some_and(|e| e.pending)
                })
                .fold(0, |byte, bit| byte | (1 << bit));
        }
    }

    /// State to be saved.
    pub fn save(&self) -> MsixStateV1 {
        self.lock().clone()
    }

    /// Puts back a state; the number of vectors must be this function's.
    pub fn restore(&self, saved: MsixStateV1) -> bool {
        if saved.entries.len() != self.lines.len() {
            return false;
        }
        let mut state = self.lock();
        *state = saved;
        for (vector, entry) in state.entries.clone().into_iter().enumerate() {
            if !entry.masked {
                self.route(vector, entry);
            }
        }
        true
    }

    fn route(&self, vector: usize, entry: Entry) {
        if let Some((gsi, _)) = self.lines.get(vector) {
            self.router.route(*gsi, entry.message());
        }
    }

    fn deliver_if_pending(&self, state: &mut MsixStateV1, vector: usize) {
        let open = state.enabled && !state.masked;
        if let (Some(entry), Some((_, line))) =
            (state.entries.get_mut(vector), self.lines.get(vector))
            && open
            && entry.pending
            && !entry.masked
        {
            entry.pending = false;
            // The counter is consumed by KVM at once and cannot overflow.
            let _ = line.write(1);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, MsixStateV1> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// MSI-X state of one function, version 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixStateV1 {
    entries: Vec<Entry>,
    enabled: bool,
    masked: bool,
}

impl MsixStateV1 {
    fn power_on(vectors: usize) -> Self {
        let entry = Entry {
            address: 0,
            data: 0,
            masked: true,
            pending: false,
        };
        Self {
            entries: vec![entry; vectors],
            enabled: false,
            masked: false,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    address: u64,
    data: u32,
    masked: bool,
    pending: bool,
}

impl Entry {
    fn words(&self) -> [u32; 4] {
        [
            (self.address & 0xffff_ffff) as u32,
            (self.address >> 32) as u32,
            self.data,
            u32::from(self.masked),
        ]
    }

    fn set_word(&mut self, index: usize, word: u32) {
        match index {
            0 => self.address = (self.address & !0xffff_ffff) | u64::from(word & !3),
            1 => self.address = (self.address & 0xffff_ffff) | (u64::from(word) << 32),
            2 => self.data = word,
            _ => self.masked = word & 1 != 0,
        }
    }

    fn message(&self) -> MsiMessage {
        MsiMessage {
            address: self.address,
            data: self.data,
        }
    }
}

const ENTRY_SIZE: usize = 16;
const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_MASK: u16 = 1 << 14;

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    #[derive(Default)]
    pub(crate) struct Routes(pub Mutex<Vec<(u32, MsiMessage)>>);

    impl MsiRouter for Routes {
        fn route(&self, gsi: u32, message: MsiMessage) {
            self.0.lock().unwrap().push((gsi, message));
        }
    }

    fn msix() -> (Msix, Arc<Routes>, Vec<EventFd>) {
        let routes = Arc::new(Routes::default());
        let events: Vec<EventFd> = (0..2)
            .map(|_| EventFd::new(EFD_NONBLOCK).unwrap())
            .collect();
        let lines = events
            .iter()
            .enumerate()
            .map(|(n, e)| (24 + n as u32, e.try_clone().unwrap()))
            .collect();
        (Msix::new(lines, routes.clone()), routes, events)
    }

    fn unmask(msix: &Msix, vector: usize) {
        msix.write_table(vector * 16, &0xfee0_1000u64.to_le_bytes());
        msix.write_table(vector * 16 + 8, &0x41u32.to_le_bytes());
        msix.write_table(vector * 16 + 12, &0u32.to_le_bytes());
    }

    #[test]
    fn an_open_vector_reaches_its_line_with_its_message() {
        let (msix, routes, events) = msix();
        unmask(&msix, 1);
        msix.set_control(CONTROL_ENABLE);
        msix.trigger(1);
        assert_eq!(events[1].read().unwrap(), 1);
        let message = MsiMessage {
            address: 0xfee0_1000,
            data: 0x41,
        };
        assert_eq!(routes.0.lock().unwrap().last(), Some(&(25, message)));
    }

    #[test]
    fn a_masked_vector_is_pending_until_it_is_unmasked() {
        let (msix, _, events) = msix();
        msix.set_control(CONTROL_ENABLE);
        msix.trigger(0);
        assert!(events[0].read().is_err());
        let mut pending = [0; 8];
        msix.read_pending(0, &mut pending);
        assert_eq!(pending[0], 1);
        unmask(&msix, 0);
        assert_eq!(events[0].read().unwrap(), 1);
        msix.set_control(CONTROL_ENABLE | CONTROL_MASK);
        msix.trigger(0);
        assert!(events[0].read().is_err());
        msix.set_control(CONTROL_ENABLE);
        assert_eq!(events[0].read().unwrap(), 1);
    }

    #[test]
    fn a_state_goes_round_and_another_functions_is_refused() {
        let (msix, _, _) = msix();
        unmask(&msix, 0);
        msix.trigger(1);
        let saved = msix.save();
        let (other, routes, _) = self::msix();
        assert!(other.restore(saved.clone()));
        assert_eq!(other.save(), saved);
        assert_eq!(routes.0.lock().unwrap().len(), 1);
        assert!(!other.restore(MsixStateV1::power_on(3)));
    }

    #[test]
    fn odd_accesses_do_nothing() {
        let (msix, _, _) = msix();
        let before = msix.save();
        msix.write_table(1, &[1; 4]);
        msix.write_table(0, &[1; 2]);
        msix.write_table(4, &[1; 8]);
        msix.write_table(1 << 20, &[1; 4]);
        msix.trigger(99);
        assert_eq!(msix.save(), before);
        let mut byte = [0];
        msix.read_table(usize::MAX / 2, &mut byte);
        assert_eq!(byte, [0xff]);
    }
}
