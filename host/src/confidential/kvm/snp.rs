//! An SNP guest of KVM: its launch as a typestate, and its memory, private and shared.
//!
//! `SnpInitialised → SnpLaunching → SnpRunning`: each step consumes the one before, so that a launch of which a
//! step failed is gone. Private pages live in a guest_memfd, which nobody can map; shared ones in the VMM's own
//! memory file. A page that changes sides is freed on the side it leaves.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{
    KVM_MEM_GUEST_MEMFD, KVM_MEMORY_ATTRIBUTE_PRIVATE, kvm_create_guest_memfd, kvm_enable_cap,
    kvm_memory_attributes, kvm_sev_init, kvm_sev_snp_launch_finish, kvm_sev_snp_launch_start,
    kvm_sev_snp_launch_update, kvm_userspace_memory_region2,
};
use kvm_ioctls::{Cap, VmFd};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::command::{Commands, SevVm};
use super::device::SevDevice;
use super::error::SevError;
use crate::confidential::page_map::{Conversion, KVM_HC_MAP_GPA_RANGE, PageMap, Visibility};
use crate::confidential::shared::{Access, SharedMemory};

/// What an SNP guest needs of its virtual machine beside SEV's commands.
#[expect(
    unsafe_code,
    reason = "a memory slot names memory that its caller must keep"
)]
pub trait SnpVm: SevVm {
    /// `KVM_CREATE_GUEST_MEMFD`.
    fn create_guest_memfd(&mut self, size: u64) -> Result<OwnedFd, Errno>;
    /// `KVM_SET_USER_MEMORY_REGION2`: one slot with both sides.
    ///
    /// # Safety
    ///
    /// The shared side is a mapping of the slot's length that stays while the machine can run.
    unsafe fn set_region(&mut self, region: kvm_userspace_memory_region2) -> Result<(), Errno>;
    /// `KVM_SET_MEMORY_ATTRIBUTES`.
    fn set_attributes(&mut self, attributes: kvm_memory_attributes) -> Result<(), Errno>;
    /// Lets `KVM_HC_MAP_GPA_RANGE` exit to the VMM.
    fn exit_on_conversion(&mut self) -> Result<(), Errno>;
}

#[expect(
    unsafe_code,
    reason = "a memory slot names this process's memory; a new descriptor has an owner"
)]
impl SnpVm for Arc<VmFd> {
    fn create_guest_memfd(&mut self, size: u64) -> Result<OwnedFd, Errno> {
        use std::os::fd::FromRawFd;
        let parameters = kvm_create_guest_memfd {
            size,
            ..kvm_create_guest_memfd::default()
        };
        let descriptor = VmFd::create_guest_memfd(self, parameters).map_err(errno)?;
        // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
        Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
    }

    unsafe fn set_region(&mut self, region: kvm_userspace_memory_region2) -> Result<(), Errno> {
        // SAFETY: the caller's promise.
        unsafe { self.set_user_memory_region2(region) }.map_err(errno)
    }

    fn set_attributes(&mut self, attributes: kvm_memory_attributes) -> Result<(), Errno> {
        self.set_memory_attributes(attributes).map_err(errno)
    }

    fn exit_on_conversion(&mut self) -> Result<(), Errno> {
        let capability = kvm_enable_cap {
            cap: Cap::ExitHypercall as u32,
            args: [1 << KVM_HC_MAP_GPA_RANGE, 0, 0, 0],
            ..kvm_enable_cap::default()
        };
        self.enable_cap(&capability).map_err(errno)
    }
}

/// What a VMM hands in for an SNP guest.
pub struct RealSnp<V: SnpVm> {
    /// A machine of SNP's type, without memory and vCPUs. Whoever runs it keeps the launch's types as long as it
    /// runs: they hold its memory.
    pub vm: V,
    /// `/dev/sev`.
    pub device: OwnedFd,
    /// The memory file for shared pages, sealed against shrinking.
    pub shared: OwnedFd,
    /// Its length, and the guest's memory from address 0; whole pages.
    pub length: u64,
}

/// What firmware does with a page of the launch. VMSA pages are KVM's own business at the finish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnpPage {
    /// Measured with its content.
    Normal,
    /// Zeroes.
    Zero,
    /// Not measured.
    Unmeasured,
    /// Filled by the firmware.
    Secrets,
    /// Checked by the firmware.
    Cpuid,
}

/// What the owner and the host bind to a launch.
#[derive(Clone, Debug, Default)]
pub struct SnpFinish {
    /// What should have been launched, with its signatures.
    pub id: Option<SnpIdBlock>,
    /// Shown in every report.
    pub host_data: [u8; 32],
    /// Reports may not be signed with the VCEK.
    pub vcek_disabled: bool,
}

/// An ID block and its authentication.
#[derive(Clone, Debug)]
pub struct SnpIdBlock {
    /// 96 bytes.
    pub block: [u8; 96],
    /// 4096 bytes.
    pub auth: Box<[u8; 4096]>,
    /// Whether the author key is checked and reported.
    pub author_key: bool,
}

/// Memory is there and private; nothing is launched.
pub struct SnpInitialised<V: SnpVm>(Guest<V>);

/// LAUNCH_START has succeeded.
pub struct SnpLaunching<V: SnpVm>(Guest<V>);

/// The guest may run.
pub struct SnpRunning<V: SnpVm>(Guest<V>);

struct Guest<V: SnpVm> {
    commands: Commands<V>,
    /// Named by every command.
    _device: SevDevice,
    memory: SnpMemory,
}

struct SnpMemory {
    private: OwnedFd,
    shared_file: OwnedFd,
    /// The slot points here.
    shared: SharedMemory,
    map: PageMap,
}

impl<V: SnpVm> SnpInitialised<V> {
    /// INIT2, and memory of both sides, all of it private.
    pub fn attach(real: RealSnp<V>) -> Result<Self, SevError> {
        let device = SevDevice::from(real.device);
        let mut commands = Commands::new(real.vm, device.descriptor());
        commands.give(&mut kvm_sev_init::default())?;
        let shared = SharedMemory::map(real.shared.as_fd(), real.length, Access::ReadWrite)?;
        let vm = commands.vm();
        vm.exit_on_conversion()
            .map_err(kernel("KVM_CAP_EXIT_HYPERCALL"))?;
        let private = vm
            .create_guest_memfd(real.length)
            .map_err(kernel("KVM_CREATE_GUEST_MEMFD"))?;
        let memory = SnpMemory {
            map: PageMap::private(real.length),
            private,
            shared_file: real.shared,
            shared,
        };
        memory.give(vm, real.length)?;
        let all = kvm_memory_attributes {
            size: real.length,
            attributes: u64::from(KVM_MEMORY_ATTRIBUTE_PRIVATE),
            ..kvm_memory_attributes::default()
        };
        vm.set_attributes(all)
            .map_err(kernel("KVM_SET_MEMORY_ATTRIBUTES"))?;
        Ok(Self(Guest {
            commands,
            _device: device,
            memory,
        }))
    }

    /// SNP_LAUNCH_START.
    pub fn start(mut self, policy: u64, gosvw: [u8; 16]) -> Result<SnpLaunching<V>, SevError> {
        if policy & POLICY_MUST_BE_ONE == 0 {
            return Err(SevError::Request(format!(
                "SNP policy {policy:#x} lacks bit 17, which must be set"
            )));
        }
        if policy & !POLICY_OF_LINUX != 0 {
            return Err(SevError::Request(format!(
                "SNP policy {policy:#x} asks for bits that no Linux kernel takes (migration agent, CXL, AES-256-XTS, \
                 RAPL, ciphertext hiding); the owner must leave them out"
            )));
        }
        let mut start = kvm_sev_snp_launch_start {
            policy,
            gosvw,
            ..kvm_sev_snp_launch_start::default()
        };
        self.0.commands.give(&mut start)?;
        Ok(SnpLaunching(self.0))
    }
}

impl<V: SnpVm> SnpLaunching<V> {
    /// SNP_LAUNCH_UPDATE of whole pages from `gpa` on, with this content.
    ///
    /// A CPUID page that the firmware corrects is refused with the page as it should be.
    pub fn update(mut self, gpa: u64, content: &[u8], page: SnpPage) -> Result<Self, SnpRefused> {
        let mut pages = Pages::of(content)
            .ok_or_else(|| SevError::Request("a launch is one of whole pages".into()))?;
        let length = content.len() as u64;
        self.0
            .memory
            .shared
            .host_address(gpa, length)
            .map_err(SevError::from)?;
        let given = self.0.update(gpa, &mut pages, page);
        match given {
            Ok(()) => Ok(self),
            Err(error) if page == SnpPage::Cpuid && is_invalid_parameter(&error) => {
                Err(SnpRefused::Cpuid {
                    corrected: std::mem::take(&mut pages).into_bytes(),
                    error,
                })
            }
            Err(error) => Err(error.into()),
        }
    }

    /// SNP_LAUNCH_FINISH: KVM measures the registers of every vCPU first, then the firmware checks the ID block.
    pub fn finish(mut self, finish: &SnpFinish) -> Result<SnpRunning<V>, SevError> {
        let mut parameters = kvm_sev_snp_launch_finish {
            host_data: finish.host_data,
            vcek_disabled: u8::from(finish.vcek_disabled),
            ..kvm_sev_snp_launch_finish::default()
        };
        if let Some(id) = &finish.id {
            parameters.id_block_uaddr = id.block.as_ptr() as u64;
            parameters.id_auth_uaddr = id.auth.as_ptr() as u64;
            parameters.id_block_en = 1;
            parameters.auth_key_en = u8::from(id.author_key);
        }
        self.0.commands.give(&mut parameters)?;
        Ok(SnpRunning(self.0))
    }
}

impl<V: SnpVm> SnpRunning<V> {
    /// Carries out a guest's wish: the pages change sides, and the side they leave gives its memory back.
    pub fn convert(&mut self, wish: Conversion) -> Result<(), SevError> {
        let Guest {
            commands, memory, ..
        } = &mut self.0;
        let outside = |error: crate::confidential::page_map::ConversionError| {
            SevError::Request(error.to_string())
        };
        memory.map.check(wish).map_err(outside)?;
        let private = wish.to == Visibility::Private;
        let attributes = kvm_memory_attributes {
            address: wish.gpa,
            size: wish.length,
            attributes: u64::from(KVM_MEMORY_ATTRIBUTE_PRIVATE) * u64::from(private),
            flags: 0,
        };
        let vm = commands.vm();
        vm.set_attributes(attributes)
            .map_err(kernel("KVM_SET_MEMORY_ATTRIBUTES"))?;
        let left = if private {
            memory.shared_file.as_fd()
        } else {
            memory.private.as_fd()
        };
        punch(left, wish)?;
        memory.map.convert(wish).map_err(outside)
    }

    /// Which page is which.
    pub fn pages(&self) -> &PageMap {
        &self.0.memory.map
    }
}

impl<V: SnpVm> Guest<V> {
    /// KVM takes as many pages as it can at a time and says where it stopped.
    fn update(&mut self, gpa: u64, pages: &mut Pages, page: SnpPage) -> Result<(), SevError> {
        let mut update = kvm_sev_snp_launch_update {
            gfn_start: gpa / PAGE,
            uaddr: pages.0.as_mut_ptr() as u64,
            len: (pages.0.len() as u64) * PAGE,
            type_: page.number(),
            ..kvm_sev_snp_launch_update::default()
        };
        while update.len > 0 {
            let before = update.len;
            self.commands.give(&mut update)?;
            if update.len >= before {
                return Err(SevError::Answer {
                    command: "SNP_LAUNCH_UPDATE",
                    what: "no page was taken",
                });
            }
        }
        Ok(())
    }
}

impl SnpMemory {
    #[expect(unsafe_code, reason = "a memory slot names this process's memory")]
    fn give<V: SnpVm>(&self, vm: &mut V, length: u64) -> Result<(), SevError> {
        let slot = self.slot(length)?;
        // SAFETY: the mapping is this memory's own and of that length; `RealSnp` says who keeps it.
        unsafe { vm.set_region(slot) }.map_err(kernel("KVM_SET_USER_MEMORY_REGION2"))
    }

    fn slot(&self, length: u64) -> Result<kvm_userspace_memory_region2, SevError> {
        use std::os::fd::AsRawFd;
        Ok(kvm_userspace_memory_region2 {
            flags: KVM_MEM_GUEST_MEMFD,
            memory_size: length,
            userspace_addr: self.shared.host_address(0, length)?,
            guest_memfd: self.private.as_raw_fd().cast_unsigned(),
            ..kvm_userspace_memory_region2::default()
        })
    }
}

impl SnpPage {
    fn number(self) -> u8 {
        let number = match self {
            Self::Normal => kvm_bindings::KVM_SEV_SNP_PAGE_TYPE_NORMAL,
            Self::Zero => kvm_bindings::KVM_SEV_SNP_PAGE_TYPE_ZERO,
            Self::Unmeasured => kvm_bindings::KVM_SEV_SNP_PAGE_TYPE_UNMEASURED,
            Self::Secrets => kvm_bindings::KVM_SEV_SNP_PAGE_TYPE_SECRETS,
            Self::Cpuid => kvm_bindings::KVM_SEV_SNP_PAGE_TYPE_CPUID,
        };
        number as u8
    }
}

/// Why a page is not in the guest.
#[derive(Debug, thiserror::Error)]
pub enum SnpRefused {
    /// The firmware would let no guest have these CPUID values; what it would is in `corrected`.
    #[error(
        "the CPUID page is refused: {error}; compare with the page that the firmware gave back"
    )]
    Cpuid {
        /// The page as the firmware wants it.
        corrected: Vec<u8>,
        /// Its refusal.
        error: SevError,
    },
    /// Anything else.
    #[error(transparent)]
    Other(#[from] SevError),
}

/// Page-aligned copies: newer kernels take no other source, and the firmware writes into a CPUID page's.
#[derive(Default)]
struct Pages(Vec<Page>);

#[derive(Clone, Copy)]
#[repr(C, align(4096))]
struct Page([u8; PAGE as usize]);

impl Pages {
    fn of(content: &[u8]) -> Option<Self> {
        let (pages, rest) = content.as_chunks::<{ PAGE as usize }>();
        let whole = rest.is_empty() && !pages.is_empty();
        whole.then(|| Self(pages.iter().map(|page| Page(*page)).collect()))
    }

    fn into_bytes(self) -> Vec<u8> {
        self.0.iter().flat_map(|page| page.0).collect()
    }
}

/// Gives the memory behind pages back to the host.
fn punch(file: BorrowedFd<'_>, wish: Conversion) -> Result<(), SevError> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let (Ok(at), Ok(length)) = (i64::try_from(wish.gpa), i64::try_from(wish.length)) else {
        return Err(SevError::Request(
            "a conversion beyond the end of files".into(),
        ));
    };
    fallocate(file, flags, at, length).map_err(kernel("FALLOC_FL_PUNCH_HOLE"))
}

fn is_invalid_parameter(error: &SevError) -> bool {
    use super::code::FirmwareCode;
    matches!(error, SevError::Firmware { code, .. } if *code == FirmwareCode::INVALID_PARAM)
}

fn kernel(command: &'static str) -> impl FnOnce(Errno) -> SevError {
    move |errno| SevError::Kernel { command, errno }
}

fn errno(error: kvm_ioctls::Error) -> Errno {
    Errno::from_raw(error.errno())
}

const PAGE: u64 = 4096;
/// The reserved policy bit that must be one.
const POLICY_MUST_BE_ONE: u64 = 1 << 17;
/// ABI minor and major, SMT, bit 17, DEBUG, SINGLE_SOCKET: `SNP_POLICY_MASK_VALID` of Linux 6.12 and later.
const POLICY_OF_LINUX: u64 = 0x1b_ffff;
