//! The slots of the PCI root into which devices can be put while the guest runs, as ACPI describes them (section 6.3):
//! the registers are those of [`HotPlug`](crate::vmm::hotplug::HotPlug), after QEMU's `docs/specs/acpi_pci_hotplug.rst`.

use acpi_tables::Aml;
use acpi_tables::aml::{
    And, Device, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, Local,
    Method, Name, Notify, OpRegion, OpRegionSpace, Path, Scope, Store, ZERO,
};

use crate::machine::plan::MachinePlan;
use crate::vmm::layout::{HOTPLUG, HOTPLUG_SIZE};

/// Which devices of the bus are slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slots {
    /// The first one's device number.
    pub first: u8,
    /// How many there are, one behind the other.
    pub count: u8,
}

impl Slots {
    /// A machine that has none.
    pub const NONE: Self = Self { first: 0, count: 0 };

    /// Those of a plan.
    pub fn of(plan: &MachinePlan) -> Self {
        Self {
            first: plan.first_slot(),
            count: plan.hotplug.slots,
        }
    }
}

/// The registers, a device for each slot, and the method that tells the guest what has happened to which.
pub(super) fn slots(slots: Slots, sink: &mut Vec<u8>) {
    if slots.count == 0 {
        return;
    }
    let (port, size) = (HOTPLUG, HOTPLUG_SIZE);
    let region = OpRegion::new(Path::new("HPRG"), OpRegionSpace::SystemIO, &port, &size);
    let field = Field::new(
        Path::new("HPRG"),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        [*b"UPSL", *b"DNSL", *b"EJSL"]
            .map(|name| FieldEntry::Named(name, 32))
            .to_vec(),
    );
    let mut body: Vec<u8> = Vec::new();
    region.to_aml_bytes(&mut body);
    field.to_aml_bytes(&mut body);
    for slot in 0..slots.count {
        device(slot, slots.first.saturating_add(slot), &mut body);
    }
    scan(slots.count, &mut body);
    Scope::new(Path::new("\\_SB_.PCI0"), vec![&Raw(body)]).to_aml_bytes(sink);
}

fn device(slot: u8, number: u8, sink: &mut Vec<u8>) {
    let address = u32::from(number) << 16;
    let bit = 1u32 << slot;
    let register = Path::new("EJSL");
    let eject = Store::new(&register, &bit);
    Device::new(
        Path::new(&name(slot)),
        vec![
            &Name::new(Path::new("_ADR"), &address),
            &Name::new(Path::new("_SUN"), &number),
            &Method::new(Path::new("_EJ0"), 1, true, vec![&eject]),
        ],
    )
    .to_aml_bytes(sink);
}

/// Reads, and by that forgets, what has happened, and notifies each slot that it concerns.
fn scan(count: u8, sink: &mut Vec<u8>) {
    let (up, down) = (Path::new("UPSL"), Path::new("DNSL"));
    let (store_up, store_down) = (Store::new(&Local(0), &up), Store::new(&Local(1), &down));
    let mut steps = Vec::new();
    store_up.to_aml_bytes(&mut steps);
    store_down.to_aml_bytes(&mut steps);
    for slot in 0..count {
        let (bit, device) = (1u32 << slot, Path::new(&name(slot)));
        for (local, what) in [(Local(0), DEVICE_CHECK), (Local(1), EJECT_REQUEST)] {
            let concerns = And::new(&ZERO, &local, &bit);
            let notify = Notify::new(&device, &what);
            If::new(&concerns, vec![&notify]).to_aml_bytes(&mut steps);
        }
    }
    Method::new(Path::new("SCAN"), 0, true, vec![&Raw(steps)]).to_aml_bytes(sink);
}

/// Bytes that are AML already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        self.0.iter().for_each(|byte| sink.byte(*byte));
    }
}

fn name(slot: u8) -> String {
    format!("HP{slot:02X}")
}

/// The method that looks at the registers.
pub(super) const SCAN: &str = "\\_SB_.PCI0.SCAN";
/// Section 5.6.6: "Device Check", "Eject Request".
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;
