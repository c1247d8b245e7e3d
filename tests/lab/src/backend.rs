//! Where a program runs: in the lab, or on this machine when it has real hardware virtualisation.

use std::{
    env,
    fs::{self, File},
    os::unix::process::CommandExt,
    path::Path,
    process::Command,
    time::Duration,
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::{
        prctl,
        signal::{SigSet, Signal},
    },
};

use crate::{
    command::{start_error, tied},
    error::{Error, Result},
    run::{DEBIAN_DISK, Request},
    say,
    signals::{Guarded, Parent},
    sys,
};

/// Where a program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// On this machine, in network and mount namespaces of its own.
    Native,
    /// In a nested-KVM machine under QEMU's software emulation.
    Lab,
    /// On this machine, as it is.
    Off,
}

impl Backend {
    /// By `LAB=native|tcg|off`, else by looking at the machine.
    pub fn choose() -> Result<Self> {
        match env::var("LAB").as_deref() {
            Ok("native") => Ok(Self::Native),
            Ok("tcg") => Ok(Self::Lab),
            Ok("off") => Ok(Self::Off),
            Ok("") | Err(_) => Ok(if has_hardware_kvm() {
                Self::Native
            } else {
                Self::Lab
            }),
            Ok(other) => Err(Error::Usage(format!(
                "LAB={other}: give native, tcg or off"
            ))),
        }
    }
}

/// Become the program; only an error comes back.
pub fn replace(args: &[String]) -> Error {
    let Some((program, args)) = args.split_first() else {
        return Error::Usage("no program given".into());
    };
    let mut command = Command::new(program);
    command.args(args);
    // The program shall not inherit what `signals::catch` blocks.
    let _ = SigSet::empty().thread_set_mask();
    let error = command.exec();
    start_error(&command, error)
}

/// As [`replace`], and die with the cargo that started us: it does not pass on the signal that ends it.
pub fn replace_tied(args: &[String]) -> Error {
    // Failing, it only costs the tie.
    let _ = prctl::set_pdeathsig(Signal::SIGTERM);
    replace(args)
}

/// Run in fresh network and mount namespaces on this machine.
pub fn run_native(request: &Request) -> Result<i32> {
    let Some((program, args)) = request.args.split_first() else {
        return Err(Error::Usage("no program given".into()));
    };
    isolate().map_err(|errno| {
        Error::Usage(format!(
            "cannot make namespaces ({errno}): run as root, or with LAB=tcg"
        ))
    })?;
    let mut command = tied(program, Signal::SIGKILL);
    command
        .args(args)
        .env("LAB", "off")
        .envs(request.extra_env.iter().cloned());
    if let Some(out) = &request.out {
        command.env("LAB_OUT", out);
    }
    if let Some(disk) = &request.debian {
        command.env(DEBIAN_DISK, disk);
    }
    let deadline = std::time::Instant::now() + request.timeout;
    let mut child = Guarded::start(&mut command)?;
    match child.wait_until(deadline, &Parent::now())? {
        Some(status) => Ok(crate::exit_code(status)),
        None => Err(Error::Timeout(request.timeout)),
    }
}

/// Real SVM or VMX, a usable `/dev/kvm`, and not the page-table based KVM, which boots no Linux guest.
fn has_hardware_kvm() -> bool {
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let virtualisation = flags
        .lines()
        .find(|line| line.starts_with("flags"))
        .is_some_and(has_virtualisation_flag);
    virtualisation
        && !Path::new("/sys/module/kvm_pvm").exists()
        && File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_ok()
}

fn has_virtualisation_flag(flags: &str) -> bool {
    flags
        .split_whitespace()
        .any(|flag| flag == "svm" || flag == "vmx")
}

fn isolate() -> nix::Result<()> {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)?;
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None::<&str>,
    )?;
    // sysfs shows the network devices of the namespace it was mounted in.
    if let Err(errno) = mount(
        Some("sysfs"),
        "/sys",
        Some("sysfs"),
        MsFlags::empty(),
        None::<&str>,
    ) {
        say(&format!(
            "/sys still shows the host's network devices: {errno}"
        ));
    } else {
        let _ = mount(
            Some("cgroup2"),
            "/sys/fs/cgroup",
            Some("cgroup2"),
            MsFlags::empty(),
            None::<&str>,
        );
    }
    sys::loopback_up()
}

/// How long a program may run when `LAB_TIMEOUT` says nothing.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(300);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_whole_words() {
        assert!(has_virtualisation_flag("flags\t\t: fpu vme svm lm"));
        assert!(!has_virtualisation_flag("flags\t\t: fpu svm_lock vmx_ept"));
    }
}
