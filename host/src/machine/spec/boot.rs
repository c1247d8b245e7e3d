//! What a guest starts in: a kernel, or firmware that finds a boot loader on a disk.

use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::Spanned;

use super::{Reader, SpecError};
use crate::machine::plan::FirmwarePlan;

/// What a guest starts in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BootSpec {
    /// A kernel that the VMM loads.
    Kernel(KernelFiles),
    /// UEFI firmware, which starts the boot loader of a disk.
    Firmware(FirmwareSpec),
}

/// A kernel and what goes with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelFiles {
    /// Kernel image: a bzImage, or an ELF file with a PVH entry.
    pub kernel: PathBuf,
    /// Initramfs.
    pub initrd: PathBuf,
}

/// Firmware.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FirmwareSpec {
    /// Its image: code, or code and variables in one, ending at the reset vector.
    pub image: PathBuf,
    /// Its place.
    pub plan: FirmwarePlan,
}

impl BootSpec {
    /// All files of it.
    pub fn files(&self) -> Vec<&Path> {
        match self {
            Self::Kernel(files) => vec![&files.kernel, &files.initrd],
            Self::Firmware(firmware) => vec![&firmware.image],
        }
    }

    /// The kernel, where there is one.
    pub fn kernel(&self) -> Option<&KernelFiles> {
        match self {
            Self::Kernel(files) => Some(files),
            Self::Firmware(_) => None,
        }
    }

    /// The firmware, where there is one.
    pub fn firmware(&self) -> Option<&FirmwareSpec> {
        match self {
            Self::Kernel(_) => None,
            Self::Firmware(firmware) => Some(firmware),
        }
    }
}

/// `[boot]` as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Boot {
    firmware: Option<Spanned<PathBuf>>,
    kernel: Option<Spanned<PathBuf>>,
    initrd: Option<Spanned<PathBuf>>,
    cmdline: Option<Spanned<String>>,
}

impl Reader<'_> {
    /// What it starts in, and the kernel's command line; `plain` is whether the guest is no confidential one.
    pub(super) fn boot(
        &self,
        boot: Spanned<Boot>,
        plain: bool,
    ) -> Result<(BootSpec, String), SpecError> {
        let at = boot.span();
        let boot = boot.into_inner();
        match boot {
            Boot {
                firmware: Some(image),
                kernel: None,
                initrd: None,
                cmdline: None,
            } => Ok((self.firmware(image, plain)?, String::new())),
            Boot {
                firmware: Some(image),
                ..
            } => {
                let problem = "`boot.firmware` takes kernel, initrd and command line from the disk's boot loader; \
                               leave `kernel`, `initrd` and `cmdline` out";
                Err(self.at(image.span(), problem.to_owned()))
            }
            Boot {
                firmware: None,
                kernel: Some(kernel),
                initrd: Some(initrd),
                cmdline: Some(cmdline),
            } => {
                let files = KernelFiles {
                    kernel: self.file("boot.kernel", kernel)?,
                    initrd: self.file("boot.initrd", initrd)?,
                };
                Ok((BootSpec::Kernel(files), self.cmdline(cmdline)?))
            }
            Boot { .. } => Err(self.incomplete(at)),
        }
    }

    fn firmware(&self, image: Spanned<PathBuf>, plain: bool) -> Result<BootSpec, SpecError> {
        let span = image.span();
        if !plain {
            let problem = "`boot.firmware` is only for a guest without `confidential` in this version; \
                           boot its kernel directly";
            return Err(self.at(span, problem.to_owned()));
        }
        let image = self.file("boot.firmware", image)?;
        let length = std::fs::metadata(&image).map_or(0, |meta| meta.len());
        let plan = FirmwarePlan::for_image(length).ok_or_else(|| {
            let problem = format!(
                "`boot.firmware` names {}, of {length} bytes; want an image of at most 16 MiB, such as Debian's \
                 /usr/share/ovmf/OVMF.fd",
                image.display()
            );
            self.at(span, problem)
        })?;
        Ok(BootSpec::Firmware(FirmwareSpec { image, plan }))
    }

    fn incomplete(&self, at: Range<usize>) -> SpecError {
        let problem = "`boot` wants either `firmware`, or `kernel`, `initrd` and `cmdline`";
        self.at(at, problem.to_owned())
    }
}
