//! Interrupt lines: eventfds that KVM turns into interrupts, and the routing of MSI-X messages.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::kvm::{KvmError, during};
use super::layout::FIRST_MSI_GSI;

/// Where the messages of MSI-X vectors go.
pub trait MsiRouter: Send + Sync {
    /// Interrupt `gsi` from now on is this message.
    fn route(&self, gsi: u32, message: MsiMessage);
}

/// An MSI message as the guest wrote it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiMessage {
    /// Address.
    pub address: u64,
    /// Data.
    pub data: u32,
}

/// Interrupt numbers behind the I/O APIC's pins.
struct Numbers {
    next: u32,
    /// Given back.
    free: Vec<u32>,
}

/// All interrupt routes of one machine.
pub struct Interrupts {
    vm: Arc<VmFd>,
    messages: Mutex<BTreeMap<u32, MsiMessage>>,
    numbers: Mutex<Numbers>,
}

impl Interrupts {
    /// Routes of a machine: the legacy ones, no message.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self {
            vm,
            messages: Mutex::default(),
            numbers: Mutex::new(Numbers {
                next: FIRST_MSI_GSI,
                free: Vec::new(),
            }),
        }
    }

    /// A line into the I/O APIC and the PICs.
    pub fn legacy_line(&self, gsi: u32) -> Result<EventFd, KvmError> {
        self.line(gsi)
    }

    /// A new interrupt number for a message, with its line.
    pub fn message_line(&self) -> Result<(u32, EventFd), KvmError> {
        let gsi = {
            let mut numbers = self.numbers.lock().unwrap_or_else(PoisonError::into_inner);
            let fresh = numbers.next;
            numbers.free.pop().unwrap_or_else(|| {
                numbers.next = fresh.saturating_add(1);
                fresh
            })
        };
        match self.line(gsi) {
            Ok(line) => Ok((gsi, line)),
            Err(error) => {
                self.give_back(&[gsi]);
                Err(error)
            }
        }
    }

    /// Interrupt numbers of a function that is gone; KVM lets go of their lines as they are closed.
    pub fn give_back(&self, gsis: &[u32]) {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        messages.retain(|gsi, _| !gsis.contains(gsi));
        drop(messages);
        let mut numbers = self.numbers.lock().unwrap_or_else(PoisonError::into_inner);
        numbers.free.extend_from_slice(gsis);
    }

    fn line(&self, gsi: u32) -> Result<EventFd, KvmError> {
        let event = EventFd::new(EFD_NONBLOCK).map_err(|e| KvmError::Ioctl("eventfd", e.into()))?;
        self.vm
            .register_irqfd(&event, gsi)
            .map_err(during("KVM_IRQFD"))?;
        Ok(event)
    }
}

impl MsiRouter for Interrupts {
    fn route(&self, gsi: u32, message: MsiMessage) {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        if messages.insert(gsi, message) == Some(message) {
            return;
        }
        let mut entries = legacy_routes();
        entries.extend(
            messages
                .iter()
                .map(|(gsi, message)| msi_route(*gsi, *message)),
        );
        let result = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| "too many routes".to_owned())
            .and_then(|table| self.vm.set_gsi_routing(&table).map_err(|e| e.to_string()));
        if let Err(reason) = result {
            // The guest wrote a message KVM does not take: its interrupt is lost, nobody else's.
            tracing::warn!(gsi, reason, "MSI route refused");
            messages.remove(&gsi);
        }
    }
}

fn legacy_routes() -> Vec<kvm_irq_routing_entry> {
    let mut entries = Vec::with_capacity(40);
    for gsi in 0..24u32 {
        match gsi {
            0..8 => entries.push(chip_route(gsi, KVM_IRQCHIP_PIC_MASTER, gsi)),
            8..16 => entries.push(chip_route(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8)),
            _ => {}
        }
        entries.push(chip_route(gsi, KVM_IRQCHIP_IOAPIC, gsi));
    }
    entries
}

fn chip_route(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        ..Default::default()
    };
    entry.u.irqchip.irqchip = irqchip;
    entry.u.irqchip.pin = pin;
    entry
}

fn msi_route(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    entry.u.msi.address_lo = (message.address & 0xffff_ffff) as u32;
    entry.u.msi.address_hi = (message.address >> 32) as u32;
    entry.u.msi.data = message.data;
    entry
}
