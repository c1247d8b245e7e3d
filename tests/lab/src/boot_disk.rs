//! Puts together what guests with firmware boot: Debian's OVMF as it is, and a disk with an EFI system partition in
//! which Debian's systemd-boot starts Debian's kernel with our initramfs.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use crate::{
    command::output,
    error::{Error, OnFile, Result},
    paths::Paths,
    prepare::{fetch_from_release, fetch_packages, remove},
    say,
    tools::Tools,
};

/// Make `disk.img`, anew if the guest's kernel or initramfs is newer; they must be there.
pub fn make(paths: &Paths) -> Result<()> {
    let folder = paths.firmware();
    let needed = [firmware(&folder), loader(&folder)];
    if !needed.iter().all(|file| file.exists()) {
        fetch_packages(paths, &PACKAGES.map(str::to_owned), &folder)?;
    }
    for other in [&AMDSEV, &TRIXIE] {
        if !other.image(paths).exists() {
            fetch_from_release(paths, other.release, other.package, &other.folder(paths))?;
        }
    }
    let disk = paths.boot_disk();
    let (kernel, initrd) = (paths.guest_kernel(), paths.guest_initrd());
    if is_newer(&disk, &kernel) && is_newer(&disk, &initrd) {
        return Ok(());
    }
    let part = disk.with_extension("part");
    remove(&part)?;
    File::create(&part)
        .and_then(|file| file.set_len(SIZE_MIB << 20))
        .on("create", &part)?;
    let maker = Maker {
        tools: Tools::at(&folder),
        disk: &part,
    };
    maker.partition()?;
    for directory in ["::/EFI", "::/EFI/BOOT", "::/loader", "::/loader/entries"] {
        maker.run("mmd", &[directory])?;
    }
    maker.add(&loader(&folder), "::/EFI/BOOT/BOOTX64.EFI")?;
    maker.add(&kernel, "::/vmlinuz")?;
    maker.add(&initrd, "::/initrd")?;
    maker.text(LOADER, "::/loader/loader.conf")?;
    maker.text(ENTRY, "::/loader/entries/debian.conf")?;
    fs::rename(&part, &disk).on("create", &disk)?;
    say(&format!("boot disk: {}", disk.display()));
    Ok(())
}

/// Debian's firmware below the folder it was unpacked to.
pub fn firmware(folder: &Path) -> PathBuf {
    folder.join("usr/share/ovmf/OVMF.fd")
}

/// Firmware of another release of Debian.
pub struct OtherFirmware {
    release: &'static str,
    package: &'static str,
    file: &'static str,
}

/// The one that checks what it boots, for confidential guests. Debian 12 and 13 have none; forky has it and moves, so
/// nothing may be known of it beforehand.
pub const AMDSEV: OtherFirmware = OtherFirmware {
    release: "forky",
    package: "ovmf-amdsev",
    file: "usr/share/ovmf/OVMF.amdsev.fd",
};
/// Debian 13's.
pub const TRIXIE: OtherFirmware = OtherFirmware {
    release: "trixie",
    package: "ovmf",
    file: "usr/share/ovmf/OVMF.fd",
};

impl OtherFirmware {
    /// Its image.
    pub fn image(&self, paths: &Paths) -> PathBuf {
        self.folder(paths).join(self.file)
    }

    fn folder(&self, paths: &Paths) -> PathBuf {
        paths.root.join(format!("firmware-{}", self.release))
    }
}

fn loader(folder: &Path) -> PathBuf {
    folder.join("usr/lib/systemd/boot/efi/systemd-bootx64.efi")
}

fn is_newer(made: &Path, from: &Path) -> bool {
    let time = |path: &Path| fs::metadata(path).and_then(|meta| meta.modified()).ok();
    time(made)
        .zip(time(from))
        .is_some_and(|(made, from)| made > from)
}

struct Maker<'a> {
    tools: Tools,
    disk: &'a Path,
}

impl Maker<'_> {
    /// A GPT with one EFI system partition, and FAT in that.
    fn partition(&self) -> Result<()> {
        let script = self.disk.with_extension("sfdisk");
        fs::write(&script, PARTITIONS).on("write", &script)?;
        let input = File::open(&script).on("read", &script)?;
        let mut sfdisk = self.tools.command("sfdisk");
        sfdisk.arg("--quiet").arg(self.disk).stdin(input);
        let status = sfdisk.status().on("start", Path::new("sfdisk"))?;
        remove(&script)?;
        if !status.success() {
            return Err(Error::Packages(format!("sfdisk failed: {status}")));
        }
        let mut mkfs = self.tools.command("mkfs.fat");
        mkfs.args(["-F", "32", "-n", "ESP", "--offset", &START.to_string()]);
        mkfs.arg(self.disk).arg(KIB.to_string());
        output(&mut mkfs).map(drop)
    }

    fn add(&self, file: &Path, to: &str) -> Result<()> {
        self.run("mcopy", &[&file.display().to_string(), to])
    }

    fn text(&self, text: &str, to: &str) -> Result<()> {
        let file = self.disk.with_extension("text");
        fs::write(&file, text).on("write", &file)?;
        self.add(&file, to)?;
        remove(&file)
    }

    /// One of the mtools, on the partition.
    fn run(&self, tool: &str, arguments: &[&str]) -> Result<()> {
        let mut command = self.tools.command("mtools");
        command.args(["-c", tool, "-i"]);
        command.arg(format!("{}@@{}", self.disk.display(), START * 512));
        command.args(arguments).env("MTOOLS_SKIP_CHECK", "1");
        output(&mut command).map(drop)
    }
}

impl Paths {
    /// Where OVMF, the boot loader and what makes disks are unpacked.
    pub fn firmware(&self) -> PathBuf {
        self.root.join("firmware")
    }

    /// The disk that firmware boots.
    pub fn boot_disk(&self) -> PathBuf {
        self.guest().join("disk.img")
    }
}

const PACKAGES: [&str; 5] = ["ovmf", "systemd-boot-efi", "dosfstools", "mtools", "fdisk"];
const SIZE_MIB: u64 = 68;
/// Sectors in front of the partition: 1 MiB.
const START: u64 = 2048;
/// What lies between 1 MiB in front and 1 MiB behind.
const KIB: u64 = (SIZE_MIB - 2) << 10;
const PARTITIONS: &str = "label: gpt\nstart=1MiB, size=66MiB, type=uefi, name=ESP\n";
const LOADER: &str = "default debian.conf\ntimeout 0\n";
const ENTRY: &str = "title Debian\nlinux /vmlinuz\ninitrd /initrd\n\
                     options console=ttyS0 panic=-1 quiet casemate.dirty_mib=8\n";
