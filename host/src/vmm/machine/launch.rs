//! A machine's first memory and registers, loaded and measured.

use super::{Machine, MachineError};
use crate::confidential::launch::SpecialPage;
use crate::machine::plan::FirmwarePlan;
use crate::vmm::boot::{BootImage, Component, Image, Part, Start, firmware, measured};
use crate::vmm::protocol::{LaunchBinding, Measurement};
use crate::vmm::vcpu::entry::{Entry, enter_linux_32, enter_long_mode, enter_pvh, wait_at_reset};
use crate::vmm::vcpu::{VcpuError, cpuid};

impl Machine {
    /// Reads kernel and initramfs, places the first memory and the first registers, and has them measured piece by
    /// piece where a technology does. Of a SEV or SEV-ES guest the measurement comes back.
    pub fn launch(&mut self, binding: &LaunchBinding) -> Result<Option<Measurement>, MachineError> {
        let start = match self.plan.firmware {
            Some(firmware) => {
                self.load_firmware(firmware)?;
                Start::Reset
            }
            None => self.load_kernel(binding)?,
        };
        self.load_registers(start)?;
        self.measure()
    }

    fn load_kernel(&mut self, binding: &LaunchBinding) -> Result<Start, MachineError> {
        let kernel = self.kernel.take().ok_or(MachineError::NoImage("kernel"))?;
        let initrd = self.initrd.take();
        let initrd = match &initrd {
            Some(file) => Image::of(file)?,
            None => Image::Bytes(&[]),
        };
        let BootImage {
            pieces,
            parts,
            start,
        } = BootImage::assemble(&self.plan, Image::of(&kernel)?, initrd)?;
        if let Some(protection) = &mut self.protection {
            protection.launch_start(binding)?;
        }
        self.place(&pieces)?;
        for part in parts {
            self.load(&part)?;
        }
        Ok(start)
    }

    /// Puts the firmware into its place, which is no RAM. Only a plain guest has one.
    fn load_firmware(&mut self, firmware: FirmwarePlan) -> Result<(), MachineError> {
        let image = self
            .firmware
            .take()
            .ok_or(MachineError::NoImage("firmware"))?;
        let image = Image::of(&image)?.whole()?;
        let rom = firmware::rom(&image, firmware.rom_bytes)?;
        self.memory.load_rom(&rom)?;
        self.place(&firmware::pieces(&self.plan))
    }

    fn place(&mut self, pieces: &[Component]) -> Result<(), MachineError> {
        for piece in pieces {
            self.memory.write(piece.gpa, &piece.bytes)?;
            if let Some(protection) = &mut self.protection {
                protection.launch_update(piece.gpa, piece.bytes.len() as u64)?;
            }
        }
        Ok(())
    }

    /// From the page cache to guest memory, with no copy between.
    fn load(&self, part: &Part<'_>) -> Result<(), MachineError> {
        match part.image {
            Image::File(file, _) => {
                let range = (part.offset, part.length);
                Ok(self.memory.write_from(part.gpa, file, range)?)
            }
            Image::Bytes(_) => {
                let bytes = part.image.read(part.offset, part.length)?;
                Ok(self.memory.write(part.gpa, &bytes.unwrap_or_default())?)
            }
        }
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
