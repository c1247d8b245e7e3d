//! Gets QEMU and the kernels, and boots the lab once to the snapshot that every run starts from.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use ring::digest;
use serde::{Deserialize, Serialize};

use crate::{
    apt::Apt,
    cpio::Archive,
    error::{Error, OnFile, Result},
    kernel::KernelPackage,
    machine::{self, DISK_SIZE, Machine, Parts, SYSTEM_SIZE},
    mend::mend,
    paths::{Paths, make_dir, read, write_whole},
    payload::make_blank,
    say,
    tools::Tools,
};

/// A booted lab, ready to be continued any number of times.
pub struct Snapshot {
    dir: PathBuf,
}

impl Snapshot {
    /// Uncompressed kernel.
    pub fn kernel(&self) -> PathBuf {
        self.dir.join("vmlinux")
    }

    /// Initramfs.
    pub fn initrd(&self) -> PathBuf {
        self.dir.join("initrd")
    }

    /// Saved machine state.
    pub fn state(&self) -> PathBuf {
        self.dir.join("state")
    }
}

/// Make sure that packages and snapshot are there; says what it does when there is something to do.
pub fn prepare(paths: &Paths, update: bool) -> Result<Snapshot> {
    if !update && let Some(snapshot) = find(paths)? {
        return Ok(snapshot);
    }
    let lock = lock(paths)?;
    let inventory = match Inventory::load(paths) {
        Some(inventory) if !update => inventory,
        _ => install(paths)?,
    };
    mend(&Tools::at(&paths.tools()).qemu_program())?;
    let snapshot = match find(paths)? {
        Some(snapshot) => snapshot,
        None => make_snapshot(paths, &inventory)?,
    };
    drop(lock);
    Ok(snapshot)
}

/// Make sure that the packages are there, without the snapshot.
pub fn prepare_packages(paths: &Paths) -> Result<()> {
    if Inventory::load(paths).is_none() {
        let _lock = lock(paths)?;
        if Inventory::load(paths).is_none() {
            install(paths)?;
        }
    }
    Ok(())
}

/// Unpack `packages`, and what of their dependencies this machine lacks, into `to`.
pub fn fetch_packages(paths: &Paths, packages: &[String], to: &Path) -> Result<()> {
    let _lock = lock(paths)?;
    say(&format!(
        "fetching {} into {}",
        packages.join(", "),
        to.display()
    ));
    let apt = Apt::open(paths)?;
    let names: Vec<&str> = packages.iter().map(String::as_str).collect();
    unpack(&apt, &apt.with_missing_dependencies(&names)?, to)
}

/// Unpacks one package of another release of Debian below `to`, without anything that it depends on.
pub fn fetch_from_release(paths: &Paths, release: &str, package: &str, to: &Path) -> Result<()> {
    let _lock = lock(paths)?;
    say(&format!(
        "fetching {package} of {release} into {}",
        to.display()
    ));
    unpack(&Apt::of_release(paths, release)?, &[package.to_owned()], to)
}

/// Where the guest's kernel package is unpacked.
pub fn guest_package(paths: &Paths) -> PathBuf {
    paths.root.join("kernel-guest")
}

/// What is installed; written last, so it vouches for the rest.
#[derive(Serialize, Deserialize, PartialEq, Eq)]
struct Inventory {
    format: u32,
    qemu: String,
    lab_kernel: String,
    guest_kernel: String,
}

impl Inventory {
    fn load(paths: &Paths) -> Option<Self> {
        let bytes = fs::read(Self::path(paths)).ok()?;
        serde_json::from_slice(&bytes)
            .ok()
            .filter(|inventory: &Self| inventory.format == FORMAT)
    }

    fn path(paths: &Paths) -> PathBuf {
        paths.root.join("inventory.json")
    }
}

fn lock(paths: &Paths) -> Result<File> {
    let path = paths.root.join("lock");
    let file = File::create(&path).on("create", &path)?;
    if file.try_lock().is_err() {
        say("another process prepares the lab: waiting for it");
        file.lock().on("lock", &path)?;
    }
    Ok(file)
}

fn install(paths: &Paths) -> Result<Inventory> {
    let started = Instant::now();
    for stale in [Inventory::path(paths), paths.snapshots(), paths.cache()] {
        remove(&stale)?;
    }
    say("reading the Debian package lists (privately; the machine's own sources stay as they are)");
    let apt = Apt::open(paths)?;
    let lab_kernel = apt.newest_kernel("6.12")?;
    let guest_kernel = apt.kernel_of("linux-image-cloud-amd64")?;
    let tools = apt.with_missing_dependencies(&Tools::PACKAGES)?;
    say(&format!(
        "fetching and unpacking QEMU and {} packages it needs into {}",
        tools.len() - 1,
        paths.root.display()
    ));
    unpack(&apt, &tools, &paths.tools())?;
    let qemu = Tools::at(&paths.tools()).qemu_version()?;
    say(&format!(
        "fetching and unpacking the lab's kernel, {lab_kernel}"
    ));
    unpack(&apt, std::slice::from_ref(&lab_kernel), &lab_package(paths))?;
    say(&format!(
        "fetching and unpacking the guest's kernel, {guest_kernel}"
    ));
    unpack(
        &apt,
        std::slice::from_ref(&guest_kernel),
        &guest_package(paths),
    )?;
    let inventory = Inventory {
        format: FORMAT,
        qemu,
        lab_kernel,
        guest_kernel,
    };
    let text = serde_json::to_vec_pretty(&inventory)
        .map_err(|error| Error::Packages(error.to_string()))?;
    write_whole(&Inventory::path(paths), &text)?;
    say(&format!(
        "QEMU {} and both kernels are there, after {:.1} s",
        inventory.qemu,
        started.elapsed().as_secs_f64()
    ));
    Ok(inventory)
}

fn unpack(apt: &Apt, packages: &[String], to: &Path) -> Result<()> {
    let part = to.with_extension("part");
    remove(&part)?;
    make_dir(&part)?;
    apt.fetch(packages, &part)?;
    remove(to)?;
    fs::rename(&part, to).on("create", to)
}

/// The snapshot for this very binary, kernel and machine, when it was made before.
fn find(paths: &Paths) -> Result<Option<Snapshot>> {
    let dir = paths.snapshots().join(key(paths)?);
    // The directory gets its name last, when everything is in it.
    if !dir.exists() {
        return Ok(None);
    }
    // Marks it as used, for `prune`; a read-only target directory is no reason to fail.
    let _ = File::open(&dir).and_then(|dir| dir.set_modified(SystemTime::now()));
    Ok(Some(Snapshot { dir }))
}

fn key(paths: &Paths) -> Result<String> {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(machine::description().as_bytes());
    context.update(MODULES.join(",").as_bytes());
    context.update(&fs::read(Inventory::path(paths)).unwrap_or_default());
    context.update(&read(&paths.lab)?);
    Ok(hex::encode(context.finish()).chars().take(16).collect())
}

fn make_snapshot(paths: &Paths, inventory: &Inventory) -> Result<Snapshot> {
    say(&format!(
        "booting the lab once ({}, QEMU {}), for a snapshot to start from",
        inventory.lab_kernel, inventory.qemu
    ));
    let started = Instant::now();
    let tools = Tools::at(&paths.tools());
    make_dir(&paths.snapshots())?;
    prune(&paths.snapshots())?;
    let key = key(paths)?;
    let part = Snapshot {
        dir: paths.snapshots().join("part"),
    };
    remove(&part.dir)?;
    make_dir(&part.dir)?;
    let package = KernelPackage::open(&lab_package(paths))?;
    let vmlinux = package.vmlinux(&tools)?;
    fs::write(part.kernel(), vmlinux).on("write", &part.kernel())?;
    fs::write(part.initrd(), initramfs(paths, &package, &tools)?).on("write", &part.initrd())?;
    for attempts_left in (0..BOOT_ATTEMPTS).rev() {
        match boot_and_save(&tools, &part) {
            Err(Error::Machine { what, .. }) if attempts_left > 0 => {
                say(&format!("the lab {what}; once more"))
            }
            Err(error) => return Err(error),
            Ok(()) => break,
        }
    }
    let snapshot = Snapshot {
        dir: paths.snapshots().join(key),
    };
    fs::rename(&part.dir, &snapshot.dir).on("create", &snapshot.dir)?;
    say(&format!(
        "the snapshot is there, after {:.1} s",
        started.elapsed().as_secs_f64()
    ));
    Ok(snapshot)
}

fn boot_and_save(tools: &Tools, part: &Snapshot) -> Result<()> {
    let [disk, system, console] = ["disk", "system", "console"].map(|name| part.dir.join(name));
    make_blank(&disk, DISK_SIZE)?;
    make_blank(&system, SYSTEM_SIZE)?;
    remove(&part.state())?;
    let parts = Parts {
        kernel: &part.kernel(),
        initrd: &part.initrd(),
        disk: &disk,
        system: &system,
        console: &console,
    };
    let (machine, mut qmp) = Machine::boot(tools, &parts)?;
    qmp.save(&part.state())
        .map_err(|error| machine.failed(&format!("could not be saved: {error}")))?;
    drop(machine);
    [&disk, &system, &console]
        .into_iter()
        .try_for_each(|file| remove(file))
}

fn initramfs(paths: &Paths, package: &KernelPackage, tools: &Tools) -> Result<Vec<u8>> {
    if !cfg!(target_feature = "crt-static") {
        return Err(Error::Usage(
            "the lab binary is not static: build it with this workspace's .cargo/config.toml"
                .into(),
        ));
    }
    let mut archive = Archive::default();
    archive.directory("dev");
    archive.device("dev/console", 0o600, (5, 1));
    archive.file("init", 0o755, &read(&paths.lab)?);
    add_modules(&mut archive, package, &MODULES, tools)?;
    Ok(archive.finish())
}

/// Add `/modules/<name>.ko` for all modules, and their order of loading, a file name a line, as `/modules/load`.
pub fn add_modules(
    archive: &mut Archive,
    package: &KernelPackage,
    names: &[&str],
    tools: &Tools,
) -> Result<()> {
    archive.directory("modules");
    let mut order = String::new();
    for module in package.modules(names, tools)? {
        let name = format!("{}.ko", module.name);
        archive.file(&format!("modules/{name}"), 0o644, &module.content);
        order.push_str(&name);
        order.push('\n');
    }
    archive.file("modules/load", 0o644, order.as_bytes());
    Ok(())
}

/// Every build of the lab binary leaves a snapshot; drop those not used for long.
fn prune(snapshots: &Path) -> Result<()> {
    for entry in fs::read_dir(snapshots)
        .on("list", snapshots)?
        .filter_map(std::result::Result::ok)
    {
        let age = entry
            .metadata()
            .and_then(|meta| meta.modified())
            .ok()
            .and_then(|time| time.elapsed().ok());
        if age.is_some_and(|age| age > KEEP_UNUSED) {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

/// Where the lab's own kernel is.
pub fn lab_package(paths: &Paths) -> PathBuf {
    paths.root.join("kernel-lab")
}

/// Remove a file or a tree, if it is there.
pub fn remove(path: &Path) -> Result<()> {
    let result = if path.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    };
    match result {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.on("remove", path),
    }
}

/// Raise it when the layout of the installed files changes.
const FORMAT: u32 = 1;
const BOOT_ATTEMPTS: u32 = 3;
const KEEP_UNUSED: Duration = Duration::from_secs(6 * 3600);

/// What hosts of guests use: KVM, taps, veth pairs between sites and their impairment, vsock, block devices.
const MODULES: [&str; 14] = [
    "kvm_amd",
    "virtio_blk",
    "tun",
    "veth",
    "bridge",
    "af_packet",
    "sch_netem",
    "sch_tbf",
    "vhost_net",
    "vhost_vsock",
    "vsock_loopback",
    "loop",
    "nbd",
    "overlay",
];
