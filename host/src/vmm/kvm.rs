//! One virtual machine of KVM: memslot, dirty log, in-kernel interrupt controllers and clock.
#![expect(
    unsafe_code,
    reason = "KVM ioctls that take addresses, and a descriptor handed in"
)]

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CLOCK_TSC_STABLE, KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY,
    KVM_PIT_SPEAKER_DUMMY, KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1,
    kvm_clock_data, kvm_enable_cap, kvm_irqchip, kvm_pit_config, kvm_pit_state2,
    kvm_reinject_control, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::layout::{KVM_IDENTITY_MAP, KVM_TSS, PAGE_SIZE};
use super::memory::GuestMemory;
use super::page_sharing::PageSharing;
use crate::confidential::kvm::{GuestKind, Initialise, SevError, create_vm};

/// A virtual machine with full in-kernel interrupt controllers, its memory, and the log of its writes.
pub struct Vm {
    kvm: Kvm,
    fd: Arc<VmFd>,
    encrypted: Option<Initialise>,
    memory: Arc<GuestMemory>,
    manual_protect: bool,
}

impl Vm {
    /// Makes the machine from an open `/dev/kvm`; `kind` is what AMD's own processor is to make of it, `None` where
    /// it has no part.
    pub fn new(
        kvm: OwnedFd,
        memory: Arc<GuestMemory>,
        kind: Option<GuestKind>,
    ) -> Result<Self, KvmError> {
        // SAFETY: the descriptor is owned and given up here; if it is not /dev/kvm the ioctls fail.
        let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
        let version = kvm.get_api_version();
        if version != KVM_API_VERSION {
            return Err(KvmError::Version(version));
        }
        for (cap, name) in REQUIRED {
            if !kvm.check_extension(*cap) {
                return Err(KvmError::Missing(name));
            }
        }
        let (fd, encrypted) = match kind {
            None => {
                let fd = retry_interrupted(|| kvm.create_vm()).map_err(during("KVM_CREATE_VM"))?;
                (fd, None)
            }
            Some(kind) => {
                let (fd, initialise) = create_vm(&kvm, kind)?;
                PageSharing::listen(&fd)?;
                (fd, Some(initialise))
            }
        };
        fd.set_identity_map_address(KVM_IDENTITY_MAP)
            .map_err(during("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.set_tss_address(KVM_TSS)
            .map_err(during("KVM_SET_TSS_ADDR"))?;
        fd.create_irq_chip().map_err(during("KVM_CREATE_IRQCHIP"))?;
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        fd.create_pit2(pit).map_err(during("KVM_CREATE_PIT2"))?;
        discard_lost_ticks(&fd)?;
        let manual_protect = enable_manual_protect(&fd);
        let vm = Self {
            kvm,
            fd: Arc::new(fd),
            encrypted,
            memory,
            manual_protect,
        };
        vm.set_memslots(0)?;
        Ok(vm)
    }

    /// `/dev/kvm`.
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// The machine's descriptor, for interrupts and ioeventfds.
    pub fn fd(&self) -> &Arc<VmFd> {
        &self.fd
    }

    /// How AMD's own processor is to take the machine over; `None` if it has no part.
    pub fn encrypted(&self) -> Option<Initialise> {
        self.encrypted
    }

    /// Whether a vCPU's TSC can run at another frequency than the host's.
    pub fn scales_tsc(&self) -> bool {
        self.kvm.check_extension(Cap::TscControl)
    }

    /// Makes vCPU `id`.
    pub fn create_vcpu(&self, id: u8) -> Result<VcpuFd, KvmError> {
        self.fd
            .create_vcpu(u64::from(id))
            .map_err(during("KVM_CREATE_VCPU"))
    }

    /// Starts logging writes anew: what was written before is forgotten, what is written from now is seen.
    pub fn start_dirty_log(&self) -> Result<(), KvmError> {
        self.set_memslots(0)?;
        self.set_memslots(KVM_MEM_LOG_DIRTY_PAGES)?;
        self.memory.take_device_writes();
        Ok(())
    }

    /// Stops logging.
    pub fn stop_dirty_log(&self) -> Result<(), KvmError> {
        self.set_memslots(0)
    }

    /// Pages written since the last call by vCPUs, by KVM itself and by device models, one bit a page; the
    /// pages are protected again before this returns, so what is read afterwards is logged if it changes.
    pub fn take_dirty(&self) -> Result<Vec<u64>, KvmError> {
        let mut log = Vec::new();
        for (slot, (_, length, _)) in (0u32..).zip(self.memory.slots()) {
            let size = usize::try_from(length).unwrap_or(usize::MAX);
            let mut part = self
                .fd
                .get_dirty_log(slot, size)
                .map_err(during("KVM_GET_DIRTY_LOG"))?;
            if self.manual_protect {
                self.clear_dirty_log(slot, length, &mut part)?;
            }
            log.extend(part);
        }
        for (word, device) in log.iter_mut().zip(self.memory.take_device_writes()) {
            *word |= device;
        }
        Ok(log)
    }

    /// Interrupt controllers, timer and clock, to be saved while no vCPU runs.
    pub fn save(&self) -> Result<VmStateV1, KvmError> {
        let mut chips = Vec::with_capacity(CHIPS.len());
        for chip_id in CHIPS {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            self.fd
                .get_irqchip(&mut chip)
                .map_err(during("KVM_GET_IRQCHIP"))?;
            chips.push(chip);
        }
        let pit = self.fd.get_pit2().map_err(during("KVM_GET_PIT2"))?;
        let mut clock = self.fd.get_clock().map_err(during("KVM_GET_CLOCK"))?;
        // The guest's clock goes on where it stopped; flags of the source's host mean nothing elsewhere.
        clock.flags &= !(KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC);
        Ok(VmStateV1 { chips, pit, clock })
    }

    /// Puts back what [`Vm::save`] gave, before any vCPU runs.
    pub fn restore(&self, state: &VmStateV1) -> Result<(), KvmError> {
        let ids: Vec<u32> = state.chips.iter().map(|chip| chip.chip_id).collect();
        if ids != CHIPS {
            return Err(KvmError::State("interrupt controllers"));
        }
        for chip in &state.chips {
            self.fd
                .set_irqchip(chip)
                .map_err(during("KVM_SET_IRQCHIP"))?;
        }
        self.fd
            .set_pit2(&state.pit)
            .map_err(during("KVM_SET_PIT2"))?;
        let clock = kvm_clock_data {
            clock: state.clock.clock,
            ..Default::default()
        };
        self.fd.set_clock(&clock).map_err(during("KVM_SET_CLOCK"))
    }

    fn set_memslots(&self, flags: u32) -> Result<(), KvmError> {
        for (slot, (gpa, length, address)) in (0u32..).zip(self.memory.slots()) {
            let rom = self.memory.is_rom(slot as usize);
            let region = kvm_userspace_memory_region {
                slot,
                flags: flags | if rom { KVM_MEM_READONLY } else { 0 },
                guest_phys_addr: gpa,
                memory_size: length,
                userspace_addr: address,
            };
            // SAFETY: the range is one live mapping of exactly this size, and `self.memory` keeps it alive as
            // long as the machine.
            unsafe { self.fd.set_user_memory_region(region) }
                .map_err(during("KVM_SET_USER_MEMORY_REGION"))?;
        }
        Ok(())
    }

    fn clear_dirty_log(&self, slot: u32, length: u64, log: &mut [u64]) -> Result<(), KvmError> {
        let pages = u32::try_from(length / PAGE_SIZE).map_err(|_| KvmError::State("page count"))?;
        let request = kvm_clear_dirty_log {
            slot,
            num_pages: pages,
            first_page: 0,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                dirty_bitmap: log.as_mut_ptr().cast(),
            },
        };
        // SAFETY: the bitmap has a bit for each of `num_pages` pages (KVM made it so) and outlives the call.
        let result = unsafe { ioctl_with_ref(&*self.fd, ioctl::KVM_CLEAR_DIRTY_LOG(), &request) };
        if result < 0 {
            return Err(KvmError::Ioctl("KVM_CLEAR_DIRTY_LOG", errno::Error::last()));
        }
        Ok(())
    }
}

/// State of a machine outside its vCPUs, version 1.
#[derive(Serialize, Deserialize)]
pub struct VmStateV1 {
    chips: Vec<kvm_irqchip>,
    pit: kvm_pit_state2,
    clock: kvm_clock_data,
}

/// What KVM refused.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// Not the API this is written for.
    #[error("/dev/kvm speaks API {0}, expected 12; is the descriptor /dev/kvm?")]
    Version(i32),
    /// A capability is not there.
    #[error("KVM lacks {0}; use a newer host kernel")]
    Missing(&'static str),
    /// An ioctl failed.
    #[error("{0}: {1}")]
    Ioctl(&'static str, #[source] errno::Error),
    /// No machine for a guest of AMD's own processor.
    #[error(transparent)]
    Sev(#[from] SevError),
    /// A saved state that this machine cannot take.
    #[error("machine state: {0} not as saved by this version")]
    State(&'static str),
}

/// Names the ioctl in an error.
pub fn during(name: &'static str) -> impl Fn(errno::Error) -> KvmError {
    move |error| KvmError::Ioctl(name, error)
}

/// Ticks of the PIT that a guest misses are gone. Made up for, they come in a bunch, into a handler that is at work on
/// the last; nothing needs them: firmware reads the time from a timer, a kernel from its clock.
fn discard_lost_ticks(fd: &VmFd) -> Result<(), KvmError> {
    let control = kvm_reinject_control::default();
    // SAFETY: the kernel reads this structure and keeps nothing of it.
    let result = unsafe { ioctl_with_ref(fd, ioctl::KVM_REINJECT_CONTROL(), &control) };
    if result < 0 {
        return Err(KvmError::Ioctl(
            "KVM_REINJECT_CONTROL",
            errno::Error::last(),
        ));
    }
    Ok(())
}

fn enable_manual_protect(fd: &VmFd) -> bool {
    if fd.check_extension_raw(u64::from(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)) & 1 == 0 {
        return false;
    }
    let mut cap = kvm_enable_cap {
        cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
        ..Default::default()
    };
    cap.args[0] = 1;
    fd.enable_cap(&cap).is_ok()
}

fn retry_interrupted<T>(
    mut call: impl FnMut() -> Result<T, errno::Error>,
) -> Result<T, errno::Error> {
    loop {
        match call() {
            Err(e) if e.errno() == libc::EINTR => {}
            other => return other,
        }
    }
}

mod ioctl {
    use super::{KVMIO, kvm_clear_dirty_log};
    // `_IO`, though it takes an argument.
    vmm_sys_util::ioctl_io_nr!(KVM_REINJECT_CONTROL, KVMIO, 0x71);
    vmm_sys_util::ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
}

const KVM_API_VERSION: i32 = 12;
const KVM_CLOCK_REALTIME: u32 = 1 << 2;
const KVM_CLOCK_HOST_TSC: u32 = 1 << 3;
const CHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];
const REQUIRED: &[(Cap, &str)] = &[
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::PitState2, "KVM_CAP_PIT_STATE2"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];
