//! A machine's first memory and registers, loaded and measured.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::{Machine, MachineError};
use crate::confidential::launch::SpecialPage;
use crate::machine::plan::FirmwarePlan;
use crate::vmm::boot::{BootError, BootImage, Start, firmware, measured};
use crate::vmm::protocol::{LaunchBinding, Measurement};
use crate::vmm::vcpu::entry::{Entry, enter_linux_32, enter_long_mode, enter_pvh, wait_at_reset};
use crate::vmm::vcpu::{VcpuError, cpuid};

impl Machine {
    /// Reads kernel and initramfs, places the first memory and the first registers, and has them measured piece by
    /// piece where a technology does. Of a SEV or SEV-ES guest the measurement comes back.
    pub fn launch(&mut self, binding: &LaunchBinding) -> Result<Option<Measurement>, MachineError> {
        let BootImage { pieces, start } = match self.plan.firmware {
            Some(firmware) => self.load_firmware(firmware)?,
            None => self.assemble()?,
        };
        if let Some(protection) = &mut self.protection {
            protection.launch_start(binding)?;
        }
        for piece in pieces {
            self.memory.write(piece.gpa, &piece.bytes)?;
            if let Some(protection) = &mut self.protection {
                protection.launch_update(piece.gpa, piece.bytes.len() as u64)?;
            }
        }
        self.load_registers(start)?;
        self.measure()
    }

    fn assemble(&mut self) -> Result<BootImage, MachineError> {
        let kernel = self.kernel.take().ok_or(MachineError::NoImage("kernel"))?;
        let kernel = read_image(&kernel)?;
        let initrd = match self.initrd.take() {
            Some(file) => read_image(&file)?,
            None => Vec::new(),
        };
        Ok(BootImage::assemble(&self.plan, &kernel, &initrd)?)
    }

    /// Puts the firmware into its place, which is no RAM.
    fn load_firmware(&mut self, firmware: FirmwarePlan) -> Result<BootImage, MachineError> {
        let image = self
            .firmware
            .take()
            .ok_or(MachineError::NoImage("firmware"))?;
        let rom = firmware::rom(&read_image(&image)?, firmware.rom_bytes)?;
        self.memory.load_rom(&rom)?;
        Ok(BootImage {
            pieces: firmware::pieces(&self.plan),
            start: Start::Reset,
        })
    }

    fn load_registers(&self, start: Start) -> Result<(), MachineError> {
        let (first, others) = self
            .vcpus
            .split_first()
            .ok_or(MachineError::Vcpu(VcpuError::Gone))?;
        match start {
            // KVM's own state of a new vCPU is reset.
            Start::Reset => {}
            Start::Pvh(entry) => first.call(move |fd| enter_pvh(fd, entry))??,
            Start::Linux if self.sharing.is_some() => first.call(enter_linux_32)??,
            Start::Linux => first.call(|fd| enter_long_mode(fd, Entry::LINUX))??,
        }
        if self.plan.technology.measures_registers() {
            for vcpu in others {
                vcpu.call(wait_at_reset)??;
            }
        }
        Ok(())
    }

    /// What is measured behind the pieces of memory.
    fn measure(&mut self) -> Result<Option<Measurement>, MachineError> {
        let Some(protection) = &mut self.protection else {
            return Ok(None);
        };
        for (gpa, page) in measured::special_pages(self.plan.technology) {
            if *page == SpecialPage::Cpuid {
                let leaves = cpuid::for_vcpu(
                    self.context.supported(),
                    &self.plan.cpu,
                    0,
                    self.plan.vcpus,
                    false,
                );
                self.memory.write(*gpa, &measured::cpuid_page(&leaves))?;
            }
            protection.launch_special(*gpa, *page)?;
        }
        if self.plan.technology.measures_registers() {
            protection.launch_vcpus(&measured::vcpu_states(&self.plan))?;
        }
        Ok(protection.launch_measure()?)
    }
}

/// Reads an image from its start, whatever the descriptor's position.
fn read_image(file: &File) -> Result<Vec<u8>, MachineError> {
    let size = file.metadata()?.len();
    if size > MAX_IMAGE {
        return Err(MachineError::Boot(BootError::Kernel(
            "or initramfs is larger than 1 GiB",
        )));
    }
    let mut bytes = vec![0u8; usize::try_from(size).unwrap_or(0)];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

const MAX_IMAGE: u64 = 1 << 30;
