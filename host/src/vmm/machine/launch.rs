//! A machine's first memory and registers, loaded and measured.

use super::{Machine, MachineError};
use crate::confidential::launch::SpecialPage;
use crate::machine::plan::FirmwarePlan;
use crate::vmm::boot::measured_boot::{MeasuredBoot, Step};
use crate::vmm::boot::{BootImage, Component, Image, Part, Start, firmware, measured};
use crate::vmm::protocol::{LaunchBinding, Measurement};
use crate::vmm::vcpu::entry::{
    Entry, RESET_VECTOR, enter_linux_32, enter_long_mode, enter_pvh, start_at_reset, wait_at_reset,
};
use crate::vmm::vcpu::{VcpuError, cpuid};

impl Machine {
    /// Reads kernel and initramfs, places the first memory and the first registers, and has them measured piece by
    /// piece where a technology does. Of a SEV or SEV-ES guest the measurement comes back.
    pub fn launch(&mut self, binding: &LaunchBinding) -> Result<Option<Measurement>, MachineError> {
        let start = match self.plan.firmware {
            Some(firmware) if self.protection.is_some() => {
                return self.launch_measured(firmware, binding);
            }
            Some(firmware) => {
                self.load_firmware(firmware)?;
                Start::Reset
            }
            None => self.load_kernel(binding)?,
        };
        self.load_registers(start)?;
        self.measure()
    }

    /// Firmware, measured with the hashes of what it shall boot, which it is offered by `fw_cfg`.
    fn launch_measured(
        &mut self,
        place: FirmwarePlan,
        binding: &LaunchBinding,
    ) -> Result<Option<Measurement>, MachineError> {
        let firmware = self.firmware.take();
        let firmware = firmware.ok_or(MachineError::NoImage("firmware"))?;
        let kernel = self.kernel.take().ok_or(MachineError::NoImage("kernel"))?;
        let initrd = self.initrd.take().ok_or(MachineError::NoImage("initrd"))?;
        let image = Image::of(&firmware)?.whole()?;
        // Read once: what is hashed is what is offered.
        let kernel = Image::of(&kernel)?.whole()?.into_owned();
        let initrd = Image::of(&initrd)?.whole()?.into_owned();
        let boot = MeasuredBoot::new(&self.plan, &image, &kernel, &initrd)?;
        self.memory
            .load_rom(&firmware::rom(&image, place.rom_bytes)?)?;
        self.place_measured(&boot, binding)?;
        self.secret_area = boot.secret().map(|area| (area.gpa.into(), area.len.into()));
        self.load_measured_registers(&boot)?;
        let chipset = self.chipset.as_ref();
        let chipset = chipset.ok_or(MachineError::NoImage("firmware"))?;
        chipset.offer(kernel, initrd, &self.plan.cmdline);
        let protection = self.protection.as_mut();
        let protection = protection.ok_or(MachineError::NoImage("firmware"))?;
        if !boot.registers().is_empty() {
            protection.launch_vcpus(boot.registers())?;
        }
        Ok(protection.launch_measure()?)
    }

    fn place_measured(
        &mut self,
        boot: &MeasuredBoot,
        binding: &LaunchBinding,
    ) -> Result<(), MachineError> {
        let cpuid = self.cpuid_page();
        let Some(protection) = &mut self.protection else {
            return Ok(());
        };
        protection.launch_start(binding)?;
        for step in boot.steps() {
            match step {
                Step::Image { gpa, length } => protection.launch_update(*gpa, *length)?,
                Step::Hashes(hashes) => {
                    self.memory.write(hashes.gpa, &hashes.bytes)?;
                    protection.launch_update(hashes.gpa, hashes.bytes.len() as u64)?;
                }
                Step::Special(gpa, page) => {
                    if *page == SpecialPage::Cpuid {
                        self.memory.write(*gpa, &cpuid)?;
                    }
                    protection.launch_special(*gpa, *page)?;
                }
            }
        }
        Ok(())
    }

    fn load_measured_registers(&self, boot: &MeasuredBoot) -> Result<(), MachineError> {
        let Some(ap_eip) = boot.ap_eip() else {
            return Ok(());
        };
        for (vcpu, number) in self.vcpus.iter().zip(0u32..) {
            let eip = if number == 0 { RESET_VECTOR } else { ap_eip };
            vcpu.call(move |fd| start_at_reset(fd, eip))??;
        }
        Ok(())
    }

    /// What a SEV-SNP guest may believe of its processor.
    fn cpuid_page(&self) -> Vec<u8> {
        let leaves = cpuid::for_vcpu(
            self.context.supported(),
            &self.plan.cpu,
            0,
            self.plan.vcpus,
            false,
        );
        measured::cpuid_page(&leaves)
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

    /// Puts the firmware of a plain guest into its place, which is no RAM.
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
        let cpuid = self.cpuid_page();
        let Some(protection) = &mut self.protection else {
            return Ok(None);
        };
        for (gpa, page) in measured::special_pages(self.plan.technology) {
            if *page == SpecialPage::Cpuid {
                self.memory.write(*gpa, &cpuid)?;
            }
            protection.launch_special(*gpa, *page)?;
        }
        if self.plan.technology.measures_registers() {
            protection.launch_vcpus(&measured::vcpu_states(&self.plan))?;
        }
        Ok(protection.launch_measure()?)
    }
}
