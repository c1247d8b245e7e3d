//! What a guest starts in: a kernel, or firmware that finds a boot loader on a disk.

use std::ops::Range;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
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
    /// UEFI firmware of a confidential guest, which checks and starts a kernel that it gets from the VMM.
    Measured(FirmwareSpec, KernelFiles),
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
            Self::Measured(firmware, files) => {
                vec![&firmware.image, &files.kernel, &files.initrd]
            }
        }
    }

    /// The kernel, where there is one.
    pub fn kernel(&self) -> Option<&KernelFiles> {
        match self {
            Self::Kernel(files) | Self::Measured(_, files) => Some(files),
            Self::Firmware(_) => None,
        }
    }

    /// Bytes that the VMM keeps to hand them to firmware: kernel and initramfs of a measured boot.
    pub fn held_bytes(&self) -> u64 {
        let Self::Measured(_, files) = self else {
            return 0;
        };
        let length = |path: &Path| std::fs::metadata(path).map_or(0, |meta| meta.len());
        length(&files.kernel).saturating_add(length(&files.initrd))
    }

    /// The firmware, where there is one.
    pub fn firmware(&self) -> Option<&FirmwareSpec> {
        match self {
            Self::Kernel(_) => None,
            Self::Firmware(firmware) | Self::Measured(firmware, _) => Some(firmware),
        }
    }
}

/// Firmware, or a kernel with its initramfs and command line; both in a confidential guest, for a measured boot.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Boot {
    /// UEFI firmware, which starts the boot loader of a disk, or of a confidential guest a kernel whose hash is measured.
    #[schemars(with = "Option<String>")]
    firmware: Option<Spanned<PathBuf>>,
    /// A bzImage or, of a plain guest, an ELF file with a PVH entry.
    #[schemars(with = "Option<String>")]
    kernel: Option<Spanned<PathBuf>>,
    /// Initramfs.
    #[schemars(with = "Option<String>")]
    initrd: Option<Spanned<PathBuf>>,
    /// Kernel command line.
    #[schemars(with = "Option<String>")]
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
            } if plain => Ok((BootSpec::Firmware(self.firmware(image)?), String::new())),
            Boot {
                firmware: Some(image),
                ..
            } if plain => {
                let problem = "`boot.firmware` takes kernel, initrd and command line from the disk's boot loader; \
                               leave `kernel`, `initrd` and `cmdline` out";
                Err(self.at(image.span(), problem.to_owned()))
            }
            Boot {
                firmware: Some(image),
                kernel: Some(kernel),
                initrd: Some(initrd),
                cmdline: Some(cmdline),
            } => {
                let (files, cmdline) = self.kernel(kernel, initrd, cmdline)?;
                Ok((BootSpec::Measured(self.firmware(image)?, files), cmdline))
            }
            Boot {
                firmware: Some(image),
                ..
            } => {
                let problem = "`boot.firmware` of a confidential guest starts what it can check: give `kernel`, `initrd` \
                               and `cmdline` too";
                Err(self.at(image.span(), problem.to_owned()))
            }
            Boot {
                firmware: None,
                kernel: Some(kernel),
                initrd: Some(initrd),
                cmdline: Some(cmdline),
            } => {
                let (files, cmdline) = self.kernel(kernel, initrd, cmdline)?;
                Ok((BootSpec::Kernel(files), cmdline))
            }
            Boot { .. } => Err(self.incomplete(at)),
        }
    }

    fn kernel(
        &self,
        kernel: Spanned<PathBuf>,
        initrd: Spanned<PathBuf>,
        cmdline: Spanned<String>,
    ) -> Result<(KernelFiles, String), SpecError> {
        let files = KernelFiles {
            kernel: self.file("boot.kernel", kernel)?,
            initrd: self.file("boot.initrd", initrd)?,
        };
        Ok((files, self.cmdline(cmdline)?))
    }

    fn firmware(&self, image: Spanned<PathBuf>) -> Result<FirmwareSpec, SpecError> {
        let span = image.span();
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
        Ok(FirmwareSpec { image, plan })
    }

    fn incomplete(&self, at: Range<usize>) -> SpecError {
        let problem = "`boot` wants either `firmware`, or `kernel`, `initrd` and `cmdline`";
        self.at(at, problem.to_owned())
    }
}
