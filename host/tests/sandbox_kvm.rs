//! A real guest on the real `/dev/kvm`, run, saved and logged from inside the VMM's cell with all filters on.
//!
//! Played like in `sandbox_cell.rs`: the test binary is started again as the role and never reaches `main`.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
#![expect(unsafe_code, reason = "KVM and a process before main")]

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd};
use std::os::unix::process::ExitStatusExt;
use std::sync::mpsc;
use std::time::Duration;

use casemate::ipc::{Channel, IpcError};
use casemate::sandbox::jail::{FIRST_UID, JailSpec, RoleProcess, Spawn};
use casemate::sandbox::seccomp::ThreadKind;
use casemate::sandbox::{Role, enter_jail, this_process};
use kvm_bindings::{
    KVM_MEM_LOG_DIRTY_PAGES, KvmIrqRouting, Msrs, kvm_irqchip, kvm_msr_entry, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, Kvm, NoDatamatch, VcpuExit, VcpuFd, VmFd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

type Outcome = Result<(), Box<dyn std::error::Error + Send + Sync>>;

#[test]
fn a_guest_runs_and_is_saved_under_all_filters() {
    let Some((child, channel)) = start("guest", 1) else {
        return;
    };
    let said: Result<Vec<u8>, IpcError> =
        channel.recv(Some(Duration::from_secs(60))).map(|m| m.body);
    match said {
        Ok(said) => assert_eq!(said, b"!"),
        Err(error) => panic!("{error}; the role: {}", child.wait().unwrap()),
    }
    drop(channel);
    assert_eq!(soon(&child).code(), Some(0));
}

#[test]
fn a_vcpu_thread_that_makes_another_machine_is_killed() {
    let Some((child, _channel)) = start("second machine", 2) else {
        return;
    };
    assert_eq!(soon(&child).signal(), Some(libc::SIGSYS));
}

fn soon(child: &RoleProcess) -> std::process::ExitStatus {
    for _ in 0..10_000 {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("the role lives on");
}

fn start(scenario: &str, n: u32) -> Option<(RoleProcess, Channel)> {
    let Ok(kvm) = OpenOptions::new().read(true).write(true).open("/dev/kvm") else {
        eprintln!("skipped: no /dev/kvm here");
        return None;
    };
    let (ours, theirs) = Channel::pair().unwrap();
    let id = std::process::id();
    let name = format!("test-kvm-{id}-{n}");
    let spec = JailSpec::new(name, FIRST_UID + 1_000_000 + id % 10_000 * 10 + n);
    let child = Spawn::new(Role::Vmm, spec)
        .arguments([] as [&str; 0])
        .variable("CASEMATE_TEST_SCENARIO", scenario)
        .start(theirs)
        .unwrap();
    ours.send_with(&1u8, &[kvm.as_fd()]).unwrap();
    Some((child, ours))
}

#[used]
#[unsafe(link_section = ".init_array")]
static CHILD: extern "C" fn() = child;

extern "C" fn child() {
    let Ok(scenario) = std::env::var("CASEMATE_TEST_SCENARIO") else {
        return;
    };
    let code = match play(&scenario) {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("{scenario}: {error}");
            77
        }
    };
    std::process::exit(code);
}

fn play(scenario: &str) -> Outcome {
    let (jailed, channel) = enter_jail(Role::Vmm)?;
    this_process::adopt(jailed);
    let mut got = channel.recv::<u8>(None)?;
    let kvm = got.handles.pop().ok_or("no handle")?;
    // SAFETY: the descriptor is ours and given up here.
    let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
    let (vm, memory) = machine(&kvm)?;
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)?)?;
    real_mode(&mut vcpu)?;
    register_signal_handler(SIGRTMIN(), kicked)?;
    let event = EventFd::new(EFD_NONBLOCK)?;
    this_process::confine_process()?;

    let (go, gone) = mpsc::channel::<()>();
    let (tell, told) = mpsc::channel::<Result<Vec<u8>, String>>();
    let second = scenario == "second machine";
    let thread = std::thread::Builder::new()
        .name("vcpu0".into())
        .spawn(move || {
            this_process::confine_thread(ThreadKind::VmmVcpu).unwrap();
            let _ = gone.recv();
            if second {
                let _ = kvm.create_vm();
            }
            let _ = tell.send(vcpu_life(&mut vcpu).map_err(|e| e.to_string()));
            // Halted or in the guest: the control thread's kick ends it.
            while !KICKED.load(std::sync::atomic::Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
            }
        })?;
    this_process::confine_thread(ThreadKind::VmmControl)?;
    go.send(())?;
    let said = told.recv()??;
    thread.kill(SIGRTMIN())?;
    thread.join().map_err(|_| "the vCPU thread panicked")?;
    control_life(&vm, &memory, &event)?;
    let report = this_process::report()?;
    let filters: Vec<_> = report.threads.iter().map(|t| t.filter.as_str()).collect();
    assert_eq!(filters, ["vmm-probe", "vmm-control"], "{:?}", report.notes);
    channel.send(&said)?;
    let closed = channel.recv::<u8>(None);
    assert!(matches!(closed, Err(IpcError::Closed)));
    Ok(())
}

static KICKED: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);

extern "C" fn kicked(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    KICKED.store(true, std::sync::atomic::Ordering::SeqCst);
}

/// 64 KiB of memory in a memfd, with a program that says `!`, writes one page and halts.
fn machine(kvm: &Kvm) -> Result<(VmFd, File), Box<dyn std::error::Error + Send + Sync>> {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::os::unix::fs::FileExt;
    let vm = kvm.create_vm()?;
    vm.set_tss_address(0xfffb_d000)?;
    vm.create_irq_chip()?;
    vm.create_pit2(kvm_pit_config::default())?;
    let memory = File::from(memfd_create(
        c"ram",
        MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
    )?);
    memory.set_len(SIZE)?;
    // mov [0x3000], al; mov dx, 0xe9; mov al, '!'; out dx, al; hlt
    memory.write_all_at(b"\xa2\x00\x30\xba\xe9\x00\xb0!\xee\xf4", 0x1000)?;
    // SAFETY: a fresh shared mapping, kept for the life of the process.
    let address = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            SIZE as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            memory.as_raw_fd(),
            0,
        )
    };
    assert_ne!(address, libc::MAP_FAILED);
    set_slot(&vm, address as u64)?;
    ADDRESS.store(address as u64, std::sync::atomic::Ordering::SeqCst);
    Ok((vm, memory))
}

static ADDRESS: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);

fn set_slot(vm: &VmFd, address: u64) -> Result<(), kvm_ioctls::Error> {
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: KVM_MEM_LOG_DIRTY_PAGES,
        guest_phys_addr: 0,
        memory_size: SIZE,
        userspace_addr: address,
    };
    // SAFETY: the mapping lives as long as the process.
    unsafe { vm.set_user_memory_region(region) }
}

fn real_mode(vcpu: &mut VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    regs.rip = 0x1000;
    regs.rflags = 2;
    vcpu.set_regs(&regs)
}

/// Saves, restores and runs, as a vCPU thread does.
fn vcpu_life(vcpu: &mut VcpuFd) -> Result<Vec<u8>, Box<dyn std::error::Error>> {
    vcpu.set_mp_state(vcpu.get_mp_state()?)?;
    vcpu.set_regs(&vcpu.get_regs()?)?;
    vcpu.set_sregs(&vcpu.get_sregs()?)?;
    vcpu.set_debug_regs(&vcpu.get_debug_regs()?)?;
    vcpu.set_lapic(&vcpu.get_lapic()?)?;
    vcpu.set_vcpu_events(&vcpu.get_vcpu_events()?)?;
    vcpu.set_xcrs(&vcpu.get_xcrs()?)?;
    // SAFETY: just read from the same vCPU.
    unsafe { vcpu.set_xsave(&vcpu.get_xsave()?) }?;
    vcpu.set_tsc_khz(vcpu.get_tsc_khz()?)?;
    let entry = kvm_msr_entry {
        index: 0x10, // time stamp counter
        ..Default::default()
    };
    let mut msrs = Msrs::from_entries(&[entry])?;
    assert_eq!(vcpu.get_msrs(&mut msrs)?, 1);
    assert_eq!(vcpu.set_msrs(&msrs)?, 1);
    // Before the guest has a clock the kernel says EINVAL; what matters is that the call comes back.
    let _ = vcpu.kvmclock_ctrl();
    let mut said = Vec::new();
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(0xe9, data)) => {
                said.extend_from_slice(data);
                return Ok(said);
            }
            Ok(other) => return Err(format!("{other:?}").into()),
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Saves, restores, and reads the dirty log, as the control thread does.
fn control_life(vm: &VmFd, memory: &File, event: &EventFd) -> Outcome {
    use std::os::unix::fs::FileExt;
    let log = vm.get_dirty_log(0, SIZE as usize)?;
    assert_eq!(log.first().map(|word| word >> 3 & 1), Some(1), "{log:x?}");
    for chip_id in 0..3 {
        let mut chip = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        vm.get_irqchip(&mut chip)?;
        vm.set_irqchip(&chip)?;
    }
    vm.set_pit2(&vm.get_pit2()?)?;
    let clock = vm.get_clock()?;
    vm.set_clock(&kvm_bindings::kvm_clock_data {
        clock: clock.clock,
        ..Default::default()
    })?;
    set_slot(vm, ADDRESS.load(std::sync::atomic::Ordering::SeqCst))?;
    vm.set_gsi_routing(&KvmIrqRouting::from_entries(&[])?)?;
    // Before KVM takes what is written to it.
    event.write(1)?;
    assert_eq!(event.read()?, 1);
    vm.register_irqfd(event, 5)?;
    vm.register_ioevent(event, &IoEventAddress::Pio(0x700), NoDatamatch)?;
    let mut page = [0u8; 16];
    memory.read_exact_at(&mut page, 0x1000)?;
    memory.write_all_at(&page, 0x2000)?;
    memory.sync_data()?;
    assert_eq!(memory.metadata()?.len(), SIZE);
    assert!(nix::unistd::lseek(memory, 0, nix::unistd::Whence::SeekData).is_ok());
    let again = memory.try_clone()?;
    let lock = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    nix::fcntl::fcntl(&again, nix::fcntl::FcntlArg::F_OFD_SETLK(&lock))?;
    Ok(())
}

const SIZE: u64 = 64 << 10;
