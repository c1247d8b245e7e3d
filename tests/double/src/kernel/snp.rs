//! SNP: launch by the software processor, guest_memfd, memory slots of two sides, attributes.
//!
//! The real machine is one of the default type and knows only the slot's mapped side. What the firmware takes
//! into a private page is therefore written there as well, so that the guest finds it.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::OwnedFd;

use casemate_attest::measure::snp::PageType;
use casemate_attest::processor::FirmwareError;
use casemate_attest::processor::snp::{
    IdBlockParameters, LaunchPage, PageBytes, SnpGuestHandle, SnpLaunchFinish, SnpLaunchStart,
    SnpProcessor,
};
use casemate_attest::report::SnpPolicy;
use kvm_bindings as kvm;
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::fields::Fields;
use super::launch::{Op, blob, vmsa};
use super::vm::Vm;
use super::{Kernel, Outcome, Refusal, Reply, end};
use crate::memory::{Caller, PAGE};

/// What a machine has besides, if it is an SNP one.
#[derive(Debug, Default)]
pub(super) struct SnpVm {
    pub(super) handle: Option<SnpGuestHandle>,
    slots: Vec<Slot>,
    /// Pages that attributes say are private.
    private: BTreeSet<u64>,
    /// Pages that the firmware has taken.
    assigned: BTreeSet<u64>,
}

/// Guest page, pages, mapped side.
#[derive(Clone, Copy, Debug)]
struct Slot {
    page: u64,
    pages: u64,
    address: u64,
}

impl Kernel {
    /// The memory ioctls of an SNP machine; others are the real kernel's.
    pub(super) fn create_guest_memfd(&mut self, caller: Caller, argument: u64) -> Reply {
        let name = "KVM_CREATE_GUEST_MEMFD";
        let made = self
            .script
            .kernel(name)
            .and_then(|()| Fields::read(caller, argument, 64))
            .and_then(|parameters| {
                let size = parameters.u64(0);
                // Flags are none that an SNP machine has, and a file is of whole pages.
                if parameters.u64(8) != 0 || size == 0 || !size.is_multiple_of(PAGE) {
                    return Err(Errno::EINVAL);
                }
                if !parameters.is_zero(16, 48) {
                    self.complain(name, "reserved fields are not zero");
                }
                let file = memfd_create(GUEST_MEMFD, MFdFlags::MFD_CLOEXEC)?;
                nix::unistd::ftruncate(&file, i64::try_from(size).map_err(|_| Errno::EINVAL)?)?;
                Ok((file, size))
            });
        let outcome = made.as_ref().map(drop).map_err(|errno| (*errno).into());
        let pages = made.as_ref().map_or(0, |made| made.1 / PAGE);
        self.note(&format!("{name} pages={pages}"), &outcome);
        match made {
            Ok((file, _)) => Reply::Inject(OwnedFd::from(File::from(file))),
            Err(errno) => Reply::End(Err(errno)),
        }
    }

    /// `KVM_SET_USER_MEMORY_REGION2` with a guest_memfd: checked, then given to the real kernel without it.
    pub(super) fn set_region(&mut self, vm: &mut Vm, caller: Caller, argument: u64) -> Reply {
        let outcome = self.region(vm, caller, argument);
        let slot = vm.snp.slots.last().map_or(0, |slot| slot.pages);
        let what = format!("KVM_SET_USER_MEMORY_REGION2 guest_memfd pages={slot}");
        self.note(&what, &outcome);
        match outcome {
            Ok(()) => Reply::Pass,
            Err(_) => end(outcome),
        }
    }

    fn region(&mut self, vm: &mut Vm, caller: Caller, argument: u64) -> Outcome {
        self.script.kernel("KVM_SET_USER_MEMORY_REGION2")?;
        let mut region = Fields::read(caller, argument, 160)?;
        let (gpa, size, address) = (region.u64(8), region.u64(16), region.u64(24));
        let (offset, file) = (region.u64(32), u64::from(region.u32(40)));
        let whole = |value: u64| value.is_multiple_of(PAGE);
        if region.u32(4) != kvm::KVM_MEM_GUEST_MEMFD
            || size == 0
            || ![gpa, size, address, offset].into_iter().all(whole)
            || offset.checked_add(size).is_none()
            || gpa.checked_add(size).is_none()
        {
            return Err(Errno::EINVAL.into());
        }
        let name = caller.descriptor(file).unwrap_or_default();
        if !name.starts_with(&format!("/memfd:{GUEST_MEMFD}")) {
            return Err(Errno::EBADF.into());
        }
        let length = std::fs::metadata(format!("/proc/{}/fd/{file}", caller.pid));
        if length.map_or(0, |file| file.len()) < offset + size {
            return Err(Errno::EINVAL.into());
        }
        if !region.is_zero(44, 116) {
            self.complain("KVM_SET_USER_MEMORY_REGION2", "padding is not zero");
        }
        vm.snp.slots.push(Slot {
            page: gpa / PAGE,
            pages: size / PAGE,
            address,
        });
        // The real machine: a slot with one side.
        region.set(4, &0u32.to_le_bytes());
        region.set(32, &[0; 12]);
        Ok(region.write_back()?)
    }

    /// `KVM_SET_MEMORY_ATTRIBUTES`.
    pub(super) fn set_attributes(&mut self, vm: &mut Vm, caller: Caller, argument: u64) -> Outcome {
        let name = "KVM_SET_MEMORY_ATTRIBUTES";
        let mut detail = String::new();
        let mut act = || -> Outcome {
            self.script.kernel(name)?;
            let wish = Fields::read(caller, argument, 32)?;
            let (gpa, size, attributes) = (wish.u64(0), wish.u64(8), wish.u64(16));
            let private = attributes == u64::from(kvm::KVM_MEMORY_ATTRIBUTE_PRIVATE);
            if wish.u64(24) != 0
                || !(private || attributes == 0)
                || size == 0
                || !gpa.is_multiple_of(PAGE)
                || !size.is_multiple_of(PAGE)
                || gpa.checked_add(size).is_none()
            {
                return Err(Errno::EINVAL.into());
            }
            for page in gpa / PAGE..(gpa + size) / PAGE {
                if private {
                    vm.snp.private.insert(page);
                } else {
                    vm.snp.private.remove(&page);
                    vm.snp.assigned.remove(&page);
                }
            }
            let side = if private { "private" } else { "shared" };
            detail = format!(" {side} pages={}", size / PAGE);
            Ok(())
        };
        let outcome = act();
        self.note(&format!("{name}{detail}"), &outcome);
        outcome
    }

    /// `snp_launch_start`.
    pub(super) fn snp_start(&mut self, vm: &mut Vm, op: &Op) -> Outcome {
        let start = Fields::read(op.caller, op.data, 64)?;
        let policy = start.u64(0);
        if vm.snp.handle.is_some()
            || start.u16(24) != 0
            || policy & !POLICY_VALID != 0
            // Linux 6.12 asks for the bit that must be one and for SMT, and does not take SINGLE_SOCKET.
            || policy & POLICY_MUST != POLICY_MUST
            || policy & POLICY_SINGLE_SOCKET != 0
        {
            return Err(Errno::EINVAL.into());
        }
        if !start.is_zero(26, 38) {
            self.complain("SNP_LAUNCH_START", "padding is not zero");
        }
        self.require_device(op.caller, op.device)?;
        let parameters = SnpLaunchStart {
            policy: SnpPolicy(policy),
            desired_tsc_khz: 0,
            gosvw: start.bytes(8),
        };
        // Linux makes ENOTTY of every failure here, and keeps the firmware's code.
        let created = self.snp_firmware("SNP_GCTX_CREATE", SnpProcessor::gctx_create);
        let handle = created.map_err(|refusal| match refusal {
            Refusal::Firmware(code) => Refusal::NoContext(code),
            other => other,
        })?;
        let asid = vm.asid;
        let started = self
            .snp_firmware("SNP_LAUNCH_START", |snp| {
                snp.launch_start(handle, parameters)
            })
            .and_then(|()| self.snp_firmware("SNP_ACTIVATE", |snp| snp.activate(handle, asid)));
        if started.is_err() {
            self.snp_decommission(handle);
        }
        started?;
        (vm.snp.handle, vm.device) = (Some(handle), op.device);
        Ok(())
    }

    /// `snp_launch_update`, at most [`Self::snp_batch`] pages at a time, as Linux stops where memory does.
    pub(super) fn snp_update(&mut self, vm: &mut Vm, op: &Op, detail: &mut String) -> Outcome {
        let handle = vm.snp.handle.ok_or(Errno::EINVAL)?;
        let mut update = Fields::read(op.caller, op.data, 64)?;
        let (first, source, length) = (update.u64(0), update.u64(8), update.u64(16));
        let page_type = page_type(update.u8(24));
        let whole = length.is_multiple_of(PAGE);
        let (Some(page_type), true, 0) = (page_type, whole, update.u16(26)) else {
            return Err(Errno::EINVAL.into());
        };
        *detail = format!(" {page_type:?} page={first:#x} pages={}", length / PAGE);
        if !update.is_zero(25, 1) || !update.is_zero(28, 36) {
            self.complain("SNP_LAUNCH_UPDATE", "padding is not zero");
        }
        if !source.is_multiple_of(PAGE) {
            self.complain("SNP_LAUNCH_UPDATE", "the source is not page aligned");
        }
        let slot = vm.snp.slot(first).ok_or(Errno::EINVAL)?;
        let left = (slot.page + slot.pages - first) * PAGE;
        let taken = length.min(left).min(self.snp_batch() * PAGE);
        for page in 0..taken / PAGE {
            let (gfn, source) = (first + page, source + page * PAGE);
            let taken = self.snp_page(vm, op, handle, gfn, source, page_type);
            if page == 0 || taken == Ok(()) {
                taken?;
                continue;
            }
            // Some pages are in: Linux says how far it came, and nothing of the failure.
            return progress(&mut update, page * PAGE, page_type);
        }
        progress(&mut update, taken, page_type)
    }

    /// `sev_gmem_post_populate` of one page.
    fn snp_page(
        &mut self,
        vm: &mut Vm,
        op: &Op,
        handle: SnpGuestHandle,
        gfn: u64,
        source: u64,
        page_type: PageType,
    ) -> Outcome {
        let slot = vm.snp.slot(gfn).ok_or(Errno::EINVAL)?;
        // Whatever keeps a page out, Linux makes EIO of it.
        if !vm.snp.private.contains(&gfn) || vm.snp.assigned.contains(&gfn) {
            return Err(Errno::EIO.into());
        }
        let mut content: PageBytes = [0; PAGE as usize];
        if page_type != PageType::Zero {
            let bytes = op
                .caller
                .read(source, content.len())
                .map_err(|_| Errno::EIO)?;
            content.copy_from_slice(&bytes);
        }
        self.require_device(op.caller, op.device)?;
        let page = LaunchPage::new(page_type, gfn * PAGE);
        let given = self.snp_firmware("SNP_LAUNCH_UPDATE", |snp| {
            snp.guest(handle)?.launch_update(page, &mut content)
        });
        if page_type == PageType::Cpuid && given == Err(Refusal::Firmware(INVALID_PARAM)) {
            op.caller.write(source, &content)?;
        }
        given?;
        vm.snp.assigned.insert(gfn);
        Ok(op
            .caller
            .write(slot.address + (gfn - slot.page) * PAGE, &content)?)
    }

    /// `snp_launch_finish`: every vCPU's registers, then the firmware's own finish.
    pub(super) fn snp_finish(&mut self, vm: &mut Vm, op: &Op, detail: &mut String) -> Outcome {
        let handle = vm.snp.handle.ok_or(Errno::EINVAL)?;
        let finish = Fields::read(op.caller, op.data, 88)?;
        if finish.u16(54) != 0 {
            return Err(Errno::EINVAL.into());
        }
        if !finish.is_zero(51, 3) || !finish.is_zero(56, 32) {
            self.complain("SNP_LAUNCH_FINISH", "padding is not zero");
        }
        *detail = format!(" vcpus={}", vm.vcpus);
        for vcpu in 0..vm.vcpus {
            self.require_device(op.caller, op.device)?;
            let mut content: PageBytes = [0; PAGE as usize];
            content.copy_from_slice(&vmsa(vcpu));
            let page = LaunchPage::new(PageType::Vmsa, VMSA_GPA);
            self.snp_firmware("SNP_LAUNCH_UPDATE_VMSA", |snp| {
                snp.guest(handle)?.launch_update(page, &mut content)
            })?;
        }
        let id = if finish.u8(16) == 0 {
            None
        } else {
            let block = blob(op.caller, finish.u64(0), 96)?;
            let auth = blob(op.caller, finish.u64(8), 4096)?;
            Some((array::<96>(&block), array::<4096>(&auth)))
        };
        self.require_device(op.caller, vm.device)?;
        let parameters = SnpLaunchFinish {
            id: id.as_ref().map(|(block, auth)| IdBlockParameters {
                block,
                auth,
                author_key_en: finish.u8(17) != 0,
            }),
            host_data: finish.bytes(19),
            vcek_disabled: finish.u8(18) != 0,
        };
        self.snp_firmware("SNP_LAUNCH_FINISH", |snp| {
            snp.launch_finish(handle, &parameters).map(drop)
        })
    }

    pub(super) fn snp_decommission(&mut self, handle: SnpGuestHandle) {
        if let Some(snp) = &mut self.parts.snp {
            let _ = snp.processor.decommission(handle);
        }
    }

    /// The SNP firmware's turn at a command, after the kernel's own checks.
    pub(super) fn snp_firmware<T>(
        &mut self,
        command: &str,
        act: impl FnOnce(&mut SnpProcessor) -> Result<T, FirmwareError>,
    ) -> Result<T, Refusal> {
        self.script.firmware(command).map_err(Refusal::Firmware)?;
        let snp = self.parts.snp.as_mut().ok_or(Errno::ENODEV)?;
        Ok(act(&mut snp.processor)?)
    }

    fn snp_batch(&self) -> u64 {
        self.parts.snp.as_ref().map_or(1, |snp| snp.batch)
    }
}

impl SnpVm {
    fn slot(&self, page: u64) -> Option<Slot> {
        let holds = |slot: &&Slot| slot.page <= page && page < slot.page + slot.pages;
        self.slots.iter().find(holds).copied()
    }
}

/// How far an update came.
fn progress(update: &mut Fields, taken: u64, page_type: PageType) -> Outcome {
    update.set(0, &(update.u64(0) + taken / PAGE).to_le_bytes());
    update.set(16, &(update.u64(16) - taken).to_le_bytes());
    if page_type != PageType::Zero {
        update.set(8, &(update.u64(8) + taken).to_le_bytes());
    }
    Ok(update.write_back()?)
}

fn page_type(number: u8) -> Option<PageType> {
    Some(match u32::from(number) {
        kvm::KVM_SEV_SNP_PAGE_TYPE_NORMAL => PageType::Normal,
        kvm::KVM_SEV_SNP_PAGE_TYPE_ZERO => PageType::Zero,
        kvm::KVM_SEV_SNP_PAGE_TYPE_UNMEASURED => PageType::Unmeasured,
        kvm::KVM_SEV_SNP_PAGE_TYPE_SECRETS => PageType::Secrets,
        kvm::KVM_SEV_SNP_PAGE_TYPE_CPUID => PageType::Cpuid,
        _ => return None,
    })
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().unwrap_or([0; N])
}

/// Name of the file that stands for a guest_memfd.
const GUEST_MEMFD: &str = "casemate-double-guest-memfd";
/// `SNP_POLICY_MASK_VALID`.
const POLICY_VALID: u64 = 0x1b_ffff;
const POLICY_MUST: u64 = 1 << 17 | 1 << 16;
const POLICY_SINGLE_SOCKET: u64 = 1 << 20;
/// `INITIAL_VMSA_GPA`.
const VMSA_GPA: u64 = 0xffff_ffff_f000;
const INVALID_PARAM: u32 = 0x16;
