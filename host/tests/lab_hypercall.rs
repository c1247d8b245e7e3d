//! A guest tells which pages it shares: `KVM_HC_MAP_GPA_RANGE` and `MSR_KVM_MIGRATION_CONTROL` through KVM and a vCPU
//! thread. Where KVM runs by kvm_pvm a guest that makes a hypercall spins for ever, so it runs in the lab.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

use std::fs::File;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use casemate::confidential::kvm::GuestKind;
use casemate::vmm::bus::{GuestBus, StopNotice};
use casemate::vmm::kvm::Vm;
use casemate::vmm::memory::GuestMemory;
use casemate::vmm::page_sharing::PageSharing;
use casemate::vmm::vcpu::Vcpu;
use kvm_bindings::kvm_regs;

#[test]
fn a_guests_hypercalls_and_msr_reach_the_map_and_bad_ones_come_back_as_einval() {
    let memory = Arc::new(GuestMemory::with_size(64 * 4096).unwrap());
    memory.write(START, &guest()).unwrap();
    memory.take_device_writes();
    let kvm = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .unwrap();
    // Without SEV in this kernel it is a machine of the default type, with the exits of an encrypted one.
    let vm = Vm::new(kvm.into(), Arc::clone(&memory), Some(GuestKind::Sev)).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    let mut special = vcpu.get_sregs().unwrap();
    (special.cs.base, special.cs.selector) = (0, 0);
    vcpu.set_sregs(&special).unwrap();
    let registers = kvm_regs {
        rip: START,
        rflags: 2,
        ..kvm_regs::default()
    };
    vcpu.set_regs(&registers).unwrap();
    let sharing = Arc::new(PageSharing::new(Arc::clone(&memory)));
    let (said, results) = channel();
    let bus = Arc::new(Heard {
        sharing: Arc::clone(&sharing),
        said: Mutex::new(said),
    });
    let stop = Arc::new(StopNotice::new().unwrap());
    let vcpu = Vcpu::spawn(0, vcpu, bus, Arc::clone(&stop), |_| Ok(())).unwrap();
    vcpu.run().unwrap();
    let heard: Vec<u32> = (0..CALLS.len())
        .map(|_| results.recv_timeout(PATIENCE).unwrap())
        .collect();
    let expected: Vec<u32> = CALLS.iter().map(|call| call.2).collect();
    assert_eq!(heard, expected, "{:?}", stop.reason());
    // wrmsr of 1, then rdmsr.
    assert_eq!(results.recv_timeout(PATIENCE).unwrap(), 1);
    let error = sharing.check_movable().unwrap_err();
    assert_eq!(error.code, "PAGES_SHARED");
    assert!(error.text.contains("3 pages"), "{error}");
    // 5 to 8 were shared and 6 taken back.
    assert_eq!(memory.take_device_writes(), [0b1_1110_0000]);
    assert_eq!(stop.reason(), None, "the VMM goes on");
    vcpu.pause().unwrap().wait().unwrap();
}

/// Address, pages and what comes back, of each call; attributes 0 are shared, bit 4 is private.
const CALLS: &[([u32; 3], &str, u32)] = &[
    ([5 * 4096, 4, 0], "shared", 0),
    ([6 * 4096, 1, 1 << 4], "private again", 0),
    ([5 * 4096, 1, 1 << 5], "no such attribute", EINVAL),
    ([63 * 4096, 2, 0], "outside", EINVAL),
    ([1, 1, 0], "not a page (KVM itself)", EINVAL),
];

struct Heard {
    sharing: Arc<PageSharing>,
    said: Mutex<Sender<u32>>,
}

impl GuestBus for Heard {
    fn port_read(&self, _: u16, _: &mut [u8]) {}
    fn port_write(&self, port: u16, data: &[u8]) {
        assert_eq!(port, PORT);
        let value = u32::from_le_bytes(data.try_into().unwrap());
        self.said.lock().unwrap().send(value).unwrap();
    }
    fn memory_read(&self, _: u64, _: &mut [u8]) {}
    fn memory_write(&self, _: u64, _: &[u8]) {}
    fn hypercall(&self, number: u64, arguments: &[u64; 6]) -> u64 {
        self.sharing.hypercall(number, arguments)
    }
    fn read_msr(&self, index: u32) -> Option<u64> {
        self.sharing.read_msr(index)
    }
    fn write_msr(&self, index: u32, value: u64) -> bool {
        self.sharing.write_msr(index, value)
    }
}

/// Real mode; every result goes out of a port.
fn guest() -> Vec<u8> {
    let load =
        |register: u8, value: u32| [&[0x66, 0xb8 + register], &value.to_le_bytes()[..]].concat();
    let out = [&load(EDX, u32::from(PORT))[..], &[0x66, 0xef]].concat(); // out dx, eax
    let mut code = Vec::new();
    for ([gpa, pages, attributes], ..) in CALLS {
        code.extend(load(EAX, 12));
        code.extend(load(EBX, *gpa));
        code.extend(load(ECX, *pages));
        code.extend(load(EDX, *attributes));
        code.extend([0x0f, 0x01, 0xd9]); // vmmcall
        code.extend(&out);
    }
    code.extend(load(EAX, 1));
    code.extend(load(ECX, 0x4b56_4d08));
    code.extend(load(EDX, 0));
    code.extend([0x0f, 0x30]); // wrmsr
    code.extend(load(EAX, 0));
    code.extend([0x0f, 0x32]); // rdmsr
    code.extend(&out);
    code.extend([0xeb, 0xfe]); // and no end
    code
}

const START: u64 = 0x1000;
const PORT: u16 = 0x80;
const EINVAL: u32 = (-22i32).cast_unsigned();
const EAX: u8 = 0;
const ECX: u8 = 1;
const EDX: u8 = 2;
const EBX: u8 = 3;
const PATIENCE: Duration = Duration::from_secs(30);
