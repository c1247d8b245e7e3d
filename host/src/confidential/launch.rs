//! The launch as a typestate, and the guard that lets no backend leave the order of the SEV API.
//!
//! `Started → Updating → Measured → Finished`: each step consumes the one before, so a launch of which a step
//! failed is gone and cannot be continued. [`GuestProtection`] drives it for the VMM over any [`Firmware`].
//! A SEV-SNP guest goes the same way, but has no measurement to hand out and takes no secret: its reports prove it.

use std::time::Instant;

use casemate_attest::measure::snp::SnpLaunchDigest;

use crate::confidential::protocol::PlatformEvidence;
use crate::vmm::protocol::{EXCHANGE_PAGES, LaunchBinding, Measurement, RoleError};

/// A page of registers as the firmware measures it (VMSA).
pub type VmsaPage = [u8; 4096];

/// Pages of a SEV-SNP launch that the firmware has a hand in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum SpecialPage {
    /// Zeroed by the firmware.
    Zero,
    /// Filled by the firmware.
    Secrets,
    /// Checked by the firmware; its bytes are in guest memory already.
    Cpuid,
}

/// Policy, source PDH, session.
pub type SendStarted = (u32, Vec<u8>, Vec<u8>);

/// What a secure processor does for one guest; the order is the business of [`GuestProtection`].
pub trait Firmware: Send {
    /// LAUNCH_START.
    fn launch_start(&mut self, binding: &LaunchBinding) -> Result<(), RoleError>;
    /// LAUNCH_UPDATE_DATA over guest memory that already holds the bytes.
    fn launch_update(&mut self, gpa: u64, length: u64) -> Result<(), RoleError>;
    /// SNP_LAUNCH_UPDATE of a page that is not measured by its content.
    fn launch_special(&mut self, _gpa: u64, _page: SpecialPage) -> Result<(), RoleError> {
        Err(RoleError::new(
            "LAUNCH_STATE",
            "only SEV-SNP guests have secrets and CPUID pages",
        ))
    }
    /// The first registers of each vCPU, in their order, where the technology measures them: LAUNCH_UPDATE_VMSA, or
    /// part of SNP_LAUNCH_FINISH. KVM makes these pages of its own vCPUs; the software processor is given them.
    fn launch_vcpus(&mut self, vmsas: &[VmsaPage]) -> Result<(), RoleError>;
    /// LAUNCH_MEASURE; none for SEV-SNP. `elapsed_us` is filled in by the guard.
    fn launch_measure(&mut self) -> Result<Option<Measurement>, RoleError>;
    /// LAUNCH_SECRET.
    fn launch_secret(
        &mut self,
        header: &[u8],
        ciphertext: &[u8],
        gpa: u64,
    ) -> Result<(), RoleError>;
    /// LAUNCH_FINISH; the launch digest where the firmware tells it (AMD's SNP firmware shows it in reports only).
    fn launch_finish(&mut self) -> Result<Option<SnpLaunchDigest>, RoleError>;
    /// SEND_START.
    fn send_start(&mut self, target: &PlatformEvidence) -> Result<SendStarted, RoleError>;
    /// SEND_UPDATE_DATA a page.
    fn send_pages(&mut self, gpas: &[u64]) -> Result<(), RoleError>;
    /// SEND_FINISH.
    fn send_finish(&mut self) -> Result<(), RoleError>;
    /// SEND_CANCEL.
    fn send_cancel(&mut self) -> Result<(), RoleError>;
    /// The platform's certificates.
    fn evidence(&mut self) -> Result<PlatformEvidence, RoleError>;
    /// RECEIVE_START.
    fn receive_start(
        &mut self,
        policy: u32,
        source_pdh: &[u8],
        session: &[u8],
    ) -> Result<(), RoleError>;
    /// RECEIVE_UPDATE_DATA a page.
    fn receive_pages(&mut self, gpas: &[u64]) -> Result<(), RoleError>;
    /// RECEIVE_FINISH.
    fn receive_finish(&mut self) -> Result<(), RoleError>;
    /// DECOMMISSION.
    fn decommission(&mut self);
}

/// Refuses a guest that arrives under another policy than its description says.
pub fn check_arrival(policy: u32, described: u32) -> Result<(), RoleError> {
    if policy == described {
        return Ok(());
    }
    Err(RoleError::new(
        "POLICY_FAILURE",
        format!("the guest arrives with policy {policy:#x}, its description says {described:#x}"),
    ))
}

/// LAUNCH_START has succeeded; nothing is measured yet.
#[derive(Debug)]
pub struct Started {
    since: Instant,
}

/// Something is measured.
#[derive(Debug)]
pub struct Updating {
    since: Instant,
}

/// The measurement is out; a secret may come in.
#[derive(Debug)]
pub struct Measured;

/// The guest may run.
#[derive(Debug)]
pub struct Finished;

impl Started {
    /// LAUNCH_START.
    pub fn start(firmware: &mut dyn Firmware, binding: &LaunchBinding) -> Result<Self, RoleError> {
        let since = Instant::now();
        firmware.launch_start(binding)?;
        Ok(Self { since })
    }

    /// The first LAUNCH_UPDATE_DATA.
    pub fn update(
        self,
        firmware: &mut dyn Firmware,
        gpa: u64,
        length: u64,
    ) -> Result<Updating, RoleError> {
        firmware.launch_update(gpa, length)?;
        Ok(Updating { since: self.since })
    }
}

impl Updating {
    /// One more LAUNCH_UPDATE_DATA.
    pub fn update(
        self,
        firmware: &mut dyn Firmware,
        gpa: u64,
        length: u64,
    ) -> Result<Self, RoleError> {
        firmware.launch_update(gpa, length)?;
        Ok(self)
    }

    /// A page of the firmware's own.
    pub fn special(
        self,
        firmware: &mut dyn Firmware,
        gpa: u64,
        page: SpecialPage,
    ) -> Result<Self, RoleError> {
        firmware.launch_special(gpa, page)?;
        Ok(self)
    }

    /// The vCPUs' registers.
    pub fn vcpus(self, firmware: &mut dyn Firmware, vmsas: &[VmsaPage]) -> Result<Self, RoleError> {
        firmware.launch_vcpus(vmsas)?;
        Ok(self)
    }

    /// LAUNCH_MEASURE.
    pub fn measure(
        self,
        firmware: &mut dyn Firmware,
    ) -> Result<(Measured, Option<Measurement>), RoleError> {
        let mut measurement = firmware.launch_measure()?;
        if let Some(measurement) = &mut measurement {
            measurement.elapsed_us = u64::try_from(self.since.elapsed().as_micros()).unwrap_or(0);
        }
        Ok((Measured, measurement))
    }
}

impl Measured {
    /// LAUNCH_SECRET.
    pub fn secret(
        self,
        firmware: &mut dyn Firmware,
        header: &[u8],
        ciphertext: &[u8],
        gpa: u64,
    ) -> Result<Self, RoleError> {
        firmware.launch_secret(header, ciphertext, gpa)?;
        Ok(self)
    }

    /// LAUNCH_FINISH.
    pub fn finish(
        self,
        firmware: &mut dyn Firmware,
    ) -> Result<(Finished, Option<SnpLaunchDigest>), RoleError> {
        let digest = firmware.launch_finish()?;
        Ok((Finished, digest))
    }
}

/// A guest's protection as the VMM drives it: a firmware, and where the guest is in its life. A launch step that
/// fails leaves the guest unlaunchable.
pub struct GuestProtection {
    firmware: Box<dyn Firmware>,
    phase: Phase,
}

impl GuestProtection {
    /// A guest that the firmware knows nothing of yet.
    pub fn new(firmware: impl Firmware + 'static) -> Self {
        Self {
            firmware: Box::new(firmware),
            phase: Phase::Blank,
        }
    }

    /// LAUNCH_START.
    pub fn launch_start(&mut self, binding: &LaunchBinding) -> Result<(), RoleError> {
        match self.take() {
            Phase::Blank => {
                self.phase = Phase::Started(Started::start(&mut *self.firmware, binding)?);
                Ok(())
            }
            other => self.refuse(other, "LAUNCH_START"),
        }
    }

    /// LAUNCH_UPDATE_DATA over guest memory that already holds the bytes, in this order.
    pub fn launch_update(&mut self, gpa: u64, length: u64) -> Result<(), RoleError> {
        self.phase = Phase::Updating(match self.take() {
            Phase::Started(launch) => launch.update(&mut *self.firmware, gpa, length)?,
            Phase::Updating(launch) => launch.update(&mut *self.firmware, gpa, length)?,
            other => return self.refuse(other, "LAUNCH_UPDATE_DATA"),
        });
        Ok(())
    }

    /// A page of the firmware's own, behind those that are measured by their content.
    pub fn launch_special(&mut self, gpa: u64, page: SpecialPage) -> Result<(), RoleError> {
        match self.take() {
            Phase::Updating(launch) => {
                self.phase = Phase::Updating(launch.special(&mut *self.firmware, gpa, page)?);
                Ok(())
            }
            other => self.refuse(other, "SNP_LAUNCH_UPDATE"),
        }
    }

    /// The first registers of each vCPU, behind all memory.
    pub fn launch_vcpus(&mut self, vmsas: &[VmsaPage]) -> Result<(), RoleError> {
        match self.take() {
            Phase::Updating(launch) => {
                self.phase = Phase::Updating(launch.vcpus(&mut *self.firmware, vmsas)?);
                Ok(())
            }
            other => self.refuse(other, "LAUNCH_UPDATE_VMSA"),
        }
    }

    /// LAUNCH_MEASURE; none for SEV-SNP.
    pub fn launch_measure(&mut self) -> Result<Option<Measurement>, RoleError> {
        match self.take() {
            Phase::Updating(launch) => {
                let (measured, measurement) = launch.measure(&mut *self.firmware)?;
                self.phase = Phase::Measured(measured);
                Ok(measurement)
            }
            other => self.refuse(other, "LAUNCH_MEASURE"),
        }
    }

    /// LAUNCH_SECRET to the secret page.
    pub fn launch_secret(
        &mut self,
        header: &[u8],
        ciphertext: &[u8],
        gpa: u64,
    ) -> Result<(), RoleError> {
        match self.take() {
            Phase::Measured(launch) => {
                let launch = launch.secret(&mut *self.firmware, header, ciphertext, gpa)?;
                self.phase = Phase::Measured(launch);
                Ok(())
            }
            other => self.refuse(other, "LAUNCH_SECRET"),
        }
    }

    /// LAUNCH_FINISH; the launch digest where the firmware tells it.
    pub fn launch_finish(&mut self) -> Result<Option<SnpLaunchDigest>, RoleError> {
        match self.take() {
            Phase::Measured(launch) => {
                let (finished, digest) = launch.finish(&mut *self.firmware)?;
                self.phase = Phase::Running(finished);
                Ok(digest)
            }
            other => self.refuse(other, "LAUNCH_FINISH"),
        }
    }

    /// SEND_START for a target whose certificates have been verified.
    pub fn send_start(&mut self, target: &PlatformEvidence) -> Result<SendStarted, RoleError> {
        match self.take() {
            Phase::Running(running) => {
                // A target that the firmware refuses does not harm the guest: it runs on.
                let opened = self.firmware.send_start(target);
                self.phase = match opened {
                    Ok(_) => Phase::Sending(running),
                    Err(_) => Phase::Running(running),
                };
                opened
            }
            other => self.refuse(other, "SEND_START"),
        }
    }

    /// SEND_UPDATE_DATA of each page; packets go to the exchange memory, `PACKET_STRIDE` bytes each.
    pub fn send_pages(&mut self, gpas: &[u64]) -> Result<(), RoleError> {
        bounded(gpas)?;
        match self.phase {
            // A failed read leaves the context open: the mover cancels it and the guest runs on.
            Phase::Sending(_) => self.firmware.send_pages(gpas),
            _ => {
                let phase = self.take();
                self.refuse(phase, "SEND_UPDATE_DATA")
            }
        }
    }

    /// SEND_FINISH.
    pub fn send_finish(&mut self) -> Result<(), RoleError> {
        // The firmware's SEND_FINISH cannot be taken back, and the destination may still refuse the whole
        // transcript. So it is issued when the guest is decommissioned; until then a cancel is possible.
        match self.take() {
            Phase::Sending(running) => {
                self.phase = Phase::SendEnded(running);
                Ok(())
            }
            other => self.refuse(other, "SEND_FINISH"),
        }
    }

    /// SEND_CANCEL.
    pub fn send_cancel(&mut self) -> Result<(), RoleError> {
        match self.take() {
            Phase::Sending(running) | Phase::SendEnded(running) => {
                self.firmware.send_cancel()?;
                self.phase = Phase::Running(running);
                Ok(())
            }
            other => self.refuse(other, "SEND_CANCEL"),
        }
    }

    /// The platform's certificates.
    pub fn evidence(&mut self) -> Result<PlatformEvidence, RoleError> {
        self.firmware.evidence()
    }

    /// RECEIVE_START.
    pub fn receive_start(
        &mut self,
        policy: u32,
        source_pdh: &[u8],
        session: &[u8],
    ) -> Result<(), RoleError> {
        match self.take() {
            Phase::Blank => {
                self.firmware.receive_start(policy, source_pdh, session)?;
                self.phase = Phase::Receiving;
                Ok(())
            }
            other => self.refuse(other, "RECEIVE_START"),
        }
    }

    /// RECEIVE_UPDATE_DATA of each page from the exchange memory.
    pub fn receive_pages(&mut self, gpas: &[u64]) -> Result<(), RoleError> {
        bounded(gpas)?;
        match self.take() {
            Phase::Receiving => {
                self.firmware.receive_pages(gpas)?;
                self.phase = Phase::Receiving;
                Ok(())
            }
            other => self.refuse(other, "RECEIVE_UPDATE_DATA"),
        }
    }

    /// RECEIVE_FINISH.
    pub fn receive_finish(&mut self) -> Result<(), RoleError> {
        match self.take() {
            Phase::Receiving => {
                self.firmware.receive_finish()?;
                self.phase = Phase::Running(Finished);
                Ok(())
            }
            other => self.refuse(other, "RECEIVE_FINISH"),
        }
    }

    /// Ends the firmware's guest context (DEACTIVATE, DECOMMISSION); errors are logged only.
    pub fn decommission(&mut self) {
        if let Phase::SendEnded(_) = self.take() {
            // The guest lives elsewhere by now; decommissioning frees its context whatever this says.
            let _ = self.firmware.send_finish();
        }
        self.firmware.decommission();
    }

    /// Takes the phase out; unless the call puts one back, the guest has failed for good.
    fn take(&mut self) -> Phase {
        std::mem::replace(&mut self.phase, Phase::Failed)
    }

    /// Refuses a call out of order. Nothing was done, so the guest stays where it is.
    fn refuse<T>(&mut self, phase: Phase, call: &'static str) -> Result<T, RoleError> {
        let text = format!("{call} refused: the guest is {}", phase.name());
        self.phase = phase;
        Err(RoleError::new("LAUNCH_STATE", text))
    }
}

/// Where a guest is in its life.
#[derive(Debug)]
enum Phase {
    Blank,
    Started(Started),
    Updating(Updating),
    Measured(Measured),
    Running(Finished),
    Sending(Finished),
    SendEnded(Finished),
    Receiving,
    Failed,
}

impl Phase {
    fn name(&self) -> &'static str {
        match self {
            Self::Blank => "not launched",
            Self::Started(_) => "started, with nothing measured yet",
            Self::Updating(_) => "being measured",
            Self::Measured(_) => "measured",
            Self::Running(_) => "launched",
            Self::Sending(_) => "being sent",
            Self::SendEnded(_) => "sent, with nothing more to send",
            Self::Receiving => "being received",
            Self::Failed => "failed or decommissioned; launch it anew",
        }
    }
}

fn bounded(gpas: &[u64]) -> Result<(), RoleError> {
    if gpas.len() > EXCHANGE_PAGES {
        return Err(RoleError {
            code: "BAD_REQUEST".to_owned(),
            text: format!(
                "{} pages in one exchange, {EXCHANGE_PAGES} at most",
                gpas.len()
            ),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    const NONE: LaunchBinding = LaunchBinding {
        session: None,
        snp: crate::vmm::protocol::SnpBinding {
            host_data: [0; 32],
            id: None,
            vcek_disabled: false,
        },
    };

    /// A firmware that says yes until it is told to fail; its clones are the same firmware.
    #[derive(Clone, Default)]
    struct Willing(Arc<Mutex<(bool, Vec<&'static str>)>>);

    impl Willing {
        fn fail(&self, fail: bool) {
            self.0.lock().unwrap().0 = fail;
        }

        fn calls(&self) -> Vec<&'static str> {
            self.0.lock().unwrap().1.clone()
        }

        fn note(&mut self, call: &'static str) -> Result<(), RoleError> {
            let mut state = self.0.lock().unwrap();
            state.1.push(call);
            if state.0 {
                return Err(RoleError {
                    code: "TEST".into(),
                    text: call.into(),
                });
            }
            Ok(())
        }
    }

    impl Firmware for Willing {
        fn launch_start(&mut self, _: &LaunchBinding) -> Result<(), RoleError> {
            self.note("start")
        }
        fn launch_update(&mut self, _: u64, _: u64) -> Result<(), RoleError> {
            self.note("update")
        }
        fn launch_special(&mut self, _: u64, _: SpecialPage) -> Result<(), RoleError> {
            self.note("special")
        }
        fn launch_vcpus(&mut self, _: &[VmsaPage]) -> Result<(), RoleError> {
            self.note("vcpus")
        }
        fn launch_measure(&mut self) -> Result<Option<Measurement>, RoleError> {
            self.note("measure").map(|()| None)
        }
        fn launch_secret(&mut self, _: &[u8], _: &[u8], _: u64) -> Result<(), RoleError> {
            self.note("secret")
        }
        fn launch_finish(&mut self) -> Result<Option<SnpLaunchDigest>, RoleError> {
            self.note("finish").map(|()| None)
        }
        fn send_start(&mut self, _: &PlatformEvidence) -> Result<SendStarted, RoleError> {
            self.note("send_start")?;
            Ok((0, vec![], vec![]))
        }
        fn send_pages(&mut self, _: &[u64]) -> Result<(), RoleError> {
            self.note("send_pages")
        }
        fn send_finish(&mut self) -> Result<(), RoleError> {
            self.note("send_finish")
        }
        fn send_cancel(&mut self) -> Result<(), RoleError> {
            self.note("send_cancel")
        }
        fn evidence(&mut self) -> Result<PlatformEvidence, RoleError> {
            Ok(target())
        }
        fn receive_start(&mut self, _: u32, _: &[u8], _: &[u8]) -> Result<(), RoleError> {
            self.note("receive_start")
        }
        fn receive_pages(&mut self, _: &[u64]) -> Result<(), RoleError> {
            self.note("receive_pages")
        }
        fn receive_finish(&mut self) -> Result<(), RoleError> {
            self.note("receive_finish")
        }
        fn decommission(&mut self) {
            let _ = self.note("decommission");
        }
    }

    fn target() -> PlatformEvidence {
        PlatformEvidence {
            pdh: vec![],
            platform: vec![],
            amd: vec![],
        }
    }

    fn code<T>(result: Result<T, RoleError>) -> String {
        result.err().unwrap().code
    }

    #[test]
    fn the_order_is_kept_and_a_wrong_call_reaches_no_firmware() {
        let firmware = Willing::default();
        let mut guest = GuestProtection::new(firmware.clone());
        assert_eq!(code(guest.launch_measure()), "LAUNCH_STATE");
        guest.launch_start(&NONE).unwrap();
        assert_eq!(code(guest.launch_measure()), "LAUNCH_STATE");
        assert_eq!(code(guest.launch_finish()), "LAUNCH_STATE");
        let special = |guest: &mut GuestProtection| guest.launch_special(0, SpecialPage::Cpuid);
        assert_eq!(code(special(&mut guest)), "LAUNCH_STATE");
        guest.launch_update(0, 4096).unwrap();
        special(&mut guest).unwrap();
        guest.launch_vcpus(&[]).unwrap();
        guest.launch_measure().unwrap();
        assert_eq!(code(guest.launch_update(0, 4096)), "LAUNCH_STATE");
        assert_eq!(code(special(&mut guest)), "LAUNCH_STATE");
        assert_eq!(code(guest.launch_vcpus(&[])), "LAUNCH_STATE");
        guest.launch_secret(&[], &[], 0).unwrap();
        guest.launch_finish().unwrap();
        assert_eq!(code(guest.launch_secret(&[], &[], 0)), "LAUNCH_STATE");
        assert_eq!(code(guest.receive_start(0, &[], &[])), "LAUNCH_STATE");
        assert_eq!(
            firmware.calls(),
            [
                "start", "update", "special", "vcpus", "measure", "secret", "finish"
            ]
        );
    }

    #[test]
    fn a_failed_launch_cannot_be_continued() {
        let firmware = Willing::default();
        let mut guest = GuestProtection::new(firmware.clone());
        guest.launch_start(&NONE).unwrap();
        firmware.fail(true);
        assert_eq!(code(guest.launch_update(0, 4096)), "TEST");
        firmware.fail(false);
        assert_eq!(code(guest.launch_update(0, 4096)), "LAUNCH_STATE");
        assert_eq!(code(guest.launch_start(&NONE)), "LAUNCH_STATE");
    }

    #[test]
    fn a_send_can_be_cancelled_until_the_guest_is_decommissioned() {
        let firmware = Willing::default();
        let mut guest = GuestProtection::new(firmware.clone());
        guest.launch_start(&NONE).unwrap();
        guest.launch_update(0, 4096).unwrap();
        guest.launch_measure().unwrap();
        guest.launch_finish().unwrap();
        firmware.fail(true);
        assert_eq!(code(guest.send_start(&target())), "TEST");
        firmware.fail(false);
        guest.send_start(&target()).unwrap();
        guest.send_cancel().unwrap();
        guest.send_start(&target()).unwrap();
        let too_many = vec![0; EXCHANGE_PAGES + 1];
        assert_eq!(code(guest.send_pages(&too_many)), "BAD_REQUEST");
        guest.send_finish().unwrap();
        assert_eq!(code(guest.send_pages(&[0])), "LAUNCH_STATE");
        guest.send_cancel().unwrap();
        guest.send_start(&target()).unwrap();
        guest.send_finish().unwrap();
        assert!(!firmware.calls().contains(&"send_finish"));
        guest.decommission();
        assert_eq!(
            firmware.calls().iter().rev().take(2).collect::<Vec<_>>(),
            [&"decommission", &"send_finish"]
        );
        assert_eq!(code(guest.send_cancel()), "LAUNCH_STATE");
        assert_eq!(code(guest.send_start(&target())), "LAUNCH_STATE");
    }
}
