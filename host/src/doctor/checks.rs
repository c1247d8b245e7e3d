//! The single checks of `casemate doctor`.

use std::fs::{self, OpenOptions};
use std::io::ErrorKind;
use std::path::Path;

use kvm_ioctls::{Cap, Kvm};
use nix::errno::Errno;

use super::cpu::cpu;
use super::{Check, Status};
use crate::sandbox::jail::DEFAULT_LANDLOCK_MIN;
use crate::sandbox::{cgroup_hierarchy, landlock_abi};

pub(super) fn kvm() -> Check {
    let name = "kvm";
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        let check = Check::ok(name, format!("/dev/kvm: {error}"), "no guest can run here");
        let remedy = match error.kind() {
            ErrorKind::NotFound => {
                "load the module (`modprobe kvm_amd` or `modprobe kvm_intel`); if that fails, switch SVM/VT-x on in the firmware, or nested virtualisation in the hypervisor beneath"
            }
            ErrorKind::PermissionDenied => {
                "run as root, or join the group: `usermod -aG kvm $USER`, then log in again"
            }
            _ => "see `dmesg | grep -i kvm`",
        };
        return check.but(Status::Missing, remedy).required();
    }
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            return Check::ok(name, format!("/dev/kvm: {error}"), "no guest can run here")
                .but(Status::Missing, "see `dmesg | grep -i kvm`")
                .required();
        }
    };
    let version = kvm.get_api_version();
    let lacking: Vec<&str> = NEEDED
        .iter()
        .filter(|(cap, _)| !kvm.check_extension(*cap))
        .map(|(_, name)| *name)
        .collect();
    let found = format!(
        "/dev/kvm, API {version}, up to {} vCPUs",
        kvm.get_max_vcpus()
    );
    if version != KVM_API {
        return Check::ok(
            name,
            found,
            "no guest can run here: the API must be version 12",
        )
        .but(Status::Missing, "use a kernel of this century")
        .required();
    }
    if lacking.is_empty() {
        Check::ok(
            name,
            found,
            "guests run; dirty logging, irqfd and state transfer are there",
        )
        .required()
    } else {
        Check::ok(
            name,
            format!("{found}, without {}", lacking.join(", ")),
            "guests cannot run or move: needed capabilities of KVM are not there",
        )
        .but(
            Status::Missing,
            "use a kernel from 5.10 on with in-kernel interrupt controllers",
        )
        .required()
    }
}

/// Whether KVM here is one that boots Linux.
pub(super) fn hypervisor() -> Check {
    let (name, cpu) = ("virtualisation", cpu());
    let beneath = if cpu.virtual_machine {
        ", itself in a virtual machine"
    } else {
        ""
    };
    if Path::new("/sys/module/kvm_pvm").exists() && !cpu.svm && !cpu.vmx {
        return Check::ok(
            name,
            format!("kvm_pvm without svm or vmx{beneath}"),
            "small freestanding guests run; a Linux guest does not boot on this KVM",
        )
        .but(
            Status::Missing,
            "use a machine with AMD SVM (or Intel VT-x), or the emulated lab: `cargo lab`",
        )
        .required();
    }
    let feature = match (cpu.svm, cpu.vmx) {
        (true, _) => "AMD SVM",
        (_, true) => "Intel VT-x",
        _ => {
            return Check::ok(name, format!("neither svm nor vmx{beneath}"), "no Linux guest can run here")
                .but(
                    Status::Missing,
                    "switch SVM/VT-x on in the firmware, or nested virtualisation in the hypervisor beneath",
                ).required();
        }
    };
    let check = Check::ok(name, format!("{feature}{beneath}"), "Linux guests run");
    if cpu.virtual_machine {
        let mut check = check.but(Status::Degraded, "use bare metal for production");
        check.meaning =
            "Linux guests run, nested: slower, and the hypervisor beneath sees everything"
                .to_owned();
        return check;
    }
    check
}

pub(super) fn sev() -> Check {
    let (name, cpu) = ("sev", cpu());
    let parameter = |p: &str| {
        let value = fs::read_to_string(format!("/sys/module/kvm_amd/parameters/{p}"));
        value.is_ok_and(|v| matches!(v.trim(), "Y" | "1"))
    };
    let emulated = "confidential guests run *emulated* only: same API, formats and checks, but their memory is in clear";
    if !cpu.sev {
        return Check::ok(name, "the processor has no SEV (CPUID 8000001F)", emulated).but(
            Status::Degraded,
            "use an AMD EPYC host; emulation needs `allow_emulated = true` in the policy",
        );
    }
    let device = OpenOptions::new().read(true).write(true).open("/dev/sev");
    let technologies: Vec<String> = [
        ("SEV", cpu.sev, parameter("sev")),
        ("SEV-ES", cpu.sev_es, parameter("sev_es")),
        ("SEV-SNP", cpu.sev_snp, parameter("sev_snp")),
    ]
    .iter()
    .map(|(name, cpu, kvm)| match (cpu, kvm) {
        (true, true) => (*name).to_owned(),
        (true, false) => format!("{name} (processor yes, kvm_amd no)"),
        _ => format!("no {name}"),
    })
    .collect();
    let found = format!(
        "{}; {} encrypted guests",
        technologies.join(", "),
        cpu.encrypted_guests
    );
    match device {
        Ok(_) if parameter("sev") => Check::ok(name, format!("{found}; /dev/sev"), "confidential guests run with the secure processor"),
        Ok(_) => Check::ok(name, found, emulated).but(
            Status::Degraded,
            "load kvm_amd with sev=1 sev_es=1 sev_snp=1, and switch SEV on in the firmware (SMEE, minimum SEV ASID)",
        ),
        Err(error) => Check::ok(name, format!("{found}; /dev/sev: {error}"), emulated).but(
            Status::Degraded,
            "load the `ccp` module, give access to /dev/sev, and switch the secure processor on in the firmware",
        ),
    }
}

pub(super) fn landlock() -> Check {
    let (name, abi) = ("landlock", landlock_abi());
    let found = format!("ABI {abi}");
    if abi < DEFAULT_LANDLOCK_MIN {
        return Check::ok(
            name,
            found,
            format!("roles refuse to start: the minimum is ABI {DEFAULT_LANDLOCK_MIN}"),
        )
        .but(
            Status::Missing,
            "use a kernel from 6.1 on, booted with `lsm=landlock,…`",
        )
        .required();
    }
    let lacking: Vec<&str> = [
        (4, "TCP"),
        (5, "device ioctls"),
        (6, "abstract sockets and signals"),
    ]
    .iter()
    .filter(|(since, _)| abi < *since)
    .map(|(_, what)| *what)
    .collect();
    if lacking.is_empty() {
        return Check::ok(
            name,
            found,
            "files, TCP, device ioctls, abstract sockets and signals are denied beneath seccomp",
        )
        .required();
    }
    let meaning = format!(
        "not denied by Landlock here: {}; namespaces and seccomp still refuse them",
        lacking.join(", ")
    );
    Check::ok(name, found, meaning)
        .but(
            Status::Degraded,
            "use a kernel from 6.12 on (Debian 12: bookworm-backports)",
        )
        .required()
}

pub(super) fn seccomp() -> Check {
    let actions = fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail").unwrap_or_default();
    let has = |action: &str| actions.split_whitespace().any(|a| a == action);
    if has("kill_process") && has("errno") && has("allow") {
        let meaning =
            "every thread of a role gets its own filter; what is not on its list kills the process";
        return Check::ok("seccomp", format!("filters: {}", actions.trim()), meaning).required();
    }
    Check::ok("seccomp", "no filters", "roles refuse to start")
        .but(Status::Missing, "use a kernel with CONFIG_SECCOMP_FILTER=y")
        .required()
}

pub(super) fn privilege() -> Check {
    let uid = nix::unistd::geteuid();
    if uid.is_root() {
        return Check::ok("privilege", "root", "the agent can build jails").required();
    }
    Check::ok(
        "privilege",
        format!("uid {uid}"),
        "jails cannot be built: namespaces, own uids and cgroups need root",
    )
    .but(
        Status::Missing,
        "run as root: `sudo casemate …`; every privilege is dropped in the roles",
    )
    .required()
}

pub(super) fn namespaces() -> Check {
    let lacking: Vec<&str> = ["mnt", "pid", "net", "ipc", "uts", "cgroup"]
        .into_iter()
        .filter(|ns| !Path::new("/proc/self/ns").join(ns).exists())
        .collect();
    if lacking.is_empty() {
        return Check::ok(
            "namespaces",
            "mnt, pid, net, ipc, uts, cgroup",
            "each role gets its own",
        )
        .required();
    }
    Check::ok(
        "namespaces",
        format!("without {}", lacking.join(", ")),
        "roles refuse to start",
    )
    .but(
        Status::Missing,
        "mount /proc; use a kernel with all namespaces configured",
    )
    .required()
}

pub(super) fn cgroup() -> Check {
    let name = "cgroup";
    let Some(root) = cgroup_hierarchy() else {
        return Check::ok(name, "no v2 hierarchy", "memory and tasks of roles are bounded by rlimits only")
            .but(Status::Degraded, "mount it: `mount -t cgroup2 none /sys/fs/cgroup`, or boot with systemd.unified_cgroup_hierarchy=1");
    };
    let controllers = fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
    let lacking: Vec<&str> = ["memory", "pids", "cpu"]
        .into_iter()
        .filter(|wanted| !controllers.split_whitespace().any(|c| c == *wanted))
        .collect();
    let found = format!("v2 at {}: {}", root.display(), controllers.trim());
    if lacking.is_empty() {
        return Check::ok(name, found, "memory and tasks of each role are limited");
    }
    let meaning = format!(
        "no limit by cgroup on {} (v1 holds these controllers); rlimits still bound tasks",
        lacking.join(", ")
    );
    Check::ok(name, found, meaning).but(
        Status::Degraded,
        "boot with systemd.unified_cgroup_hierarchy=1 cgroup_no_v1=all",
    )
}

pub(super) fn memory() -> Check {
    let (total, available) = (meminfo("MemTotal"), meminfo("MemAvailable"));
    let gib = |kib: u64| format!("{}.{} GiB", kib >> 20, ((kib % (1 << 20)) * 10) >> 20);
    let found = format!("{} of {} available", gib(available), gib(total));
    if available >= ENOUGH_KIB {
        return Check::ok("memory", found, "room for a small guest and more");
    }
    Check::ok(
        "memory",
        found,
        "a 512 MiB guest beside its destination needs 1.5 GiB",
    )
    .but(Status::Degraded, "stop something, or add memory")
}

pub(super) fn hugepages() -> Check {
    let (total, free) = (meminfo("HugePages_Total"), meminfo("HugePages_Free"));
    let shmem =
        fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled").unwrap_or_default();
    let chosen = shmem.split(['[', ']']).nth(1).unwrap_or("not available");
    let found =
        format!("{free} of {total} reserved pages free; transparent for shared memory: {chosen}");
    if free > 0 || matches!(chosen, "always" | "advise" | "within_size" | "force") {
        return Check::ok("hugepages", found, "guest memory can use huge pages");
    }
    Check::ok("hugepages", found, "guests run on 4 KiB pages: slower, otherwise the same")
        .but(Status::Degraded, "`echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled`, or reserve: `sysctl vm.nr_hugepages=512`")
}

pub(super) fn userfaultfd() -> Check {
    let meaning = "memory can arrive on demand (post-copy, fast restore)";
    let allowed =
        fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").map(|v| v.trim() == "1");
    match (allowed, Path::new("/dev/userfaultfd").exists()) {
        (Ok(_), true) => Check::ok("userfaultfd", "/dev/userfaultfd", meaning),
        (Ok(true), _) => Check::ok("userfaultfd", "system call, for everybody", meaning),
        (Ok(false), false) => Check::ok("userfaultfd", "system call, for root", meaning),
        (Err(_), device) => Check::ok(
            "userfaultfd",
            if device {
                "/dev/userfaultfd only"
            } else {
                "none"
            },
            "no memory on demand; pre-copy moves are not affected",
        )
        .but(Status::Degraded, "use a kernel with CONFIG_USERFAULTFD=y"),
    }
}

pub(super) fn tun() -> Check {
    match OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
    {
        Ok(_) => Check::ok("tun", "/dev/net/tun", "guests can have network cards"),
        Err(error) => Check::ok(
            "tun",
            format!("/dev/net/tun: {error}"),
            "guests cannot have network cards",
        )
        .but(
            Status::Missing,
            "`modprobe tun`; in a container: `mkdir -p /dev/net && mknod /dev/net/tun c 10 200`",
        ),
    }
}

pub(super) fn io_uring() -> Check {
    let disabled = fs::read_to_string("/proc/sys/kernel/io_uring_disabled");
    let symbols = fs::read_to_string("/proc/kallsyms").unwrap_or_default();
    let there = disabled.is_ok() || symbols.contains("io_uring_setup");
    let found = match &disabled {
        Ok(value) => format!("io_uring_disabled = {}", value.trim()),
        Err(_) if there => "there".to_owned(),
        Err(error) => format!(
            "not there ({})",
            Errno::from_raw(error.raw_os_error().unwrap_or(0))
        ),
    };
    let off = disabled.is_ok_and(|v| v.trim() == "2");
    if there && !off {
        return Check::ok(
            "io_uring",
            found,
            "there; disks use plain threads for now, so nothing depends on it",
        );
    }
    Check::ok(
        "io_uring",
        found,
        "disks use plain threads, as they do for now everywhere",
    )
    .but(
        Status::Degraded,
        "nothing depends on it yet; `sysctl kernel.io_uring_disabled=0` would allow it",
    )
}

/// A figure of /proc/meminfo, in KiB or pages; 0 if it is not there.
fn meminfo(key: &str) -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| *name == key)
        .and_then(|(_, value)| value.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

/// What launch, run, save and dirty logging stand on.
const NEEDED: &[(Cap, &str)] = &[
    (Cap::UserMemory, "USER_MEMORY"),
    (Cap::Irqchip, "IRQCHIP"),
    (Cap::Irqfd, "IRQFD"),
    (Cap::Ioeventfd, "IOEVENTFD"),
    (Cap::IrqRouting, "IRQ_ROUTING"),
    (Cap::SignalMsi, "SIGNAL_MSI"),
    (Cap::ImmediateExit, "IMMEDIATE_EXIT"),
    (Cap::MpState, "MP_STATE"),
    (Cap::VcpuEvents, "VCPU_EVENTS"),
    (Cap::Xsave, "XSAVE"),
    (Cap::AdjustClock, "ADJUST_CLOCK"),
];
const KVM_API: i32 = 12;
/// 1.5 GiB.
const ENOUGH_KIB: u64 = 3 << 19;
