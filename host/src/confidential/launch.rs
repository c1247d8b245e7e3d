//! The launch as a typestate, and the guard that lets no backend leave the order of the SEV API.
//!
//! `Started → Updating → Measured → Finished`: each step consumes the one before, so a launch of which a step
//! failed is gone and cannot be continued. [`Guarded`] drives it for the VMM over any [`Firmware`].

use std::time::Instant;

use crate::confidential::protocol::PlatformEvidence;
use crate::vmm::confidential_hook::GuestProtection;
use crate::vmm::protocol::{EXCHANGE_PAGES, Measurement, OwnerSession, RoleError};

/// What a secure processor does for one guest; the order is the business of [`Guarded`].
pub trait Firmware: Send {
    /// LAUNCH_START.
    fn launch_start(&mut self, session: Option<&OwnerSession>) -> Result<(), RoleError>;
    /// LAUNCH_UPDATE_DATA.
    fn launch_update(&mut self, gpa: u64, length: u64) -> Result<(), RoleError>;
    /// LAUNCH_MEASURE; `elapsed_us` is filled in by the guard.
    fn launch_measure(&mut self) -> Result<Measurement, RoleError>;
    /// LAUNCH_SECRET.
    fn launch_secret(
        &mut self,
        header: &[u8],
        ciphertext: &[u8],
        gpa: u64,
    ) -> Result<(), RoleError>;
    /// LAUNCH_FINISH.
    fn launch_finish(&mut self) -> Result<(), RoleError>;
    /// SEND_START: policy, source PDH, session.
    fn send_start(
        &mut self,
        target: &PlatformEvidence,
    ) -> Result<(u32, Vec<u8>, Vec<u8>), RoleError>;
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
    pub fn start<F: Firmware + ?Sized>(
        firmware: &mut F,
        session: Option<&OwnerSession>,
    ) -> Result<Self, RoleError> {
        let since = Instant::now();
        firmware.launch_start(session)?;
        Ok(Self { since })
    }

    /// The first LAUNCH_UPDATE_DATA.
    pub fn update<F: Firmware + ?Sized>(
        self,
        firmware: &mut F,
        gpa: u64,
        length: u64,
    ) -> Result<Updating, RoleError> {
        firmware.launch_update(gpa, length)?;
        Ok(Updating { since: self.since })
    }
}

impl Updating {
    /// One more LAUNCH_UPDATE_DATA.
    pub fn update<F: Firmware + ?Sized>(
        self,
        firmware: &mut F,
        gpa: u64,
        length: u64,
    ) -> Result<Self, RoleError> {
        firmware.launch_update(gpa, length)?;
        Ok(self)
    }

    /// LAUNCH_MEASURE.
    pub fn measure<F: Firmware + ?Sized>(
        self,
        firmware: &mut F,
    ) -> Result<(Measured, Measurement), RoleError> {
        let mut measurement = firmware.launch_measure()?;
        measurement.elapsed_us = u64::try_from(self.since.elapsed().as_micros()).unwrap_or(0);
        Ok((Measured, measurement))
    }
}

impl Measured {
    /// LAUNCH_SECRET.
    pub fn secret<F: Firmware + ?Sized>(
        self,
        firmware: &mut F,
        header: &[u8],
        ciphertext: &[u8],
        gpa: u64,
    ) -> Result<Self, RoleError> {
        firmware.launch_secret(header, ciphertext, gpa)?;
        Ok(self)
    }

    /// LAUNCH_FINISH.
    pub fn finish<F: Firmware + ?Sized>(self, firmware: &mut F) -> Result<Finished, RoleError> {
        firmware.launch_finish()?;
        Ok(Finished)
    }
}

/// A guest's protection: a firmware, and where the guest is in its life.
pub struct Guarded<F: Firmware> {
    firmware: F,
    phase: Phase,
}

impl<F: Firmware> Guarded<F> {
    /// A guest that the firmware knows nothing of yet.
    pub fn new(firmware: F) -> Self {
        Self {
            firmware,
            phase: Phase::Blank,
        }
    }

    /// Takes the phase out; unless the call puts one back, the guest has failed for good.
    fn take(&mut self) -> Phase {
        std::mem::replace(&mut self.phase, Phase::Failed)
    }

    /// Refuses a call out of order. Nothing was done, so the guest stays where it is.
    fn refuse<T>(&mut self, phase: Phase, call: &'static str) -> Result<T, RoleError> {
        let error = RoleError {
            code: "LAUNCH_STATE".to_owned(),
            text: format!("{call} refused: the guest is {}", phase.name()),
        };
        self.phase = phase;
        Err(error)
    }
}

impl<F: Firmware> GuestProtection for Guarded<F> {
    fn launch_start(&mut self, session: Option<&OwnerSession>) -> Result<(), RoleError> {
        match self.take() {
            Phase::Blank => {
                self.phase = Phase::Started(Started::start(&mut self.firmware, session)?);
                Ok(())
            }
            other => self.refuse(other, "LAUNCH_START"),
        }
    }

    fn launch_update(&mut self, gpa: u64, length: u64) -> Result<(), RoleError> {
        self.phase = Phase::Updating(match self.take() {
            Phase::Started(launch) => launch.update(&mut self.firmware, gpa, length)?,
            Phase::Updating(launch) => launch.update(&mut self.firmware, gpa, length)?,
            other => return self.refuse(other, "LAUNCH_UPDATE_DATA"),
        });
        Ok(())
    }

    fn launch_measure(&mut self) -> Result<Measurement, RoleError> {
        match self.take() {
            Phase::Updating(launch) => {
                let (measured, measurement) = launch.measure(&mut self.firmware)?;
                self.phase = Phase::Measured(measured);
                Ok(measurement)
            }
            other => self.refuse(other, "LAUNCH_MEASURE"),
        }
    }

    fn launch_secret(
        &mut self,
        header: &[u8],
        ciphertext: &[u8],
        gpa: u64,
    ) -> Result<(), RoleError> {
        match self.take() {
            Phase::Measured(launch) => {
                let launch = launch.secret(&mut self.firmware, header, ciphertext, gpa)?;
                self.phase = Phase::Measured(launch);
                Ok(())
            }
            other => self.refuse(other, "LAUNCH_SECRET"),
        }
    }

    fn launch_finish(&mut self) -> Result<(), RoleError> {
        match self.take() {
            Phase::Measured(launch) => {
                self.phase = Phase::Running(launch.finish(&mut self.firmware)?);
                Ok(())
            }
            other => self.refuse(other, "LAUNCH_FINISH"),
        }
    }

    fn send_start(
        &mut self,
        target_pdh: &[u8],
        platform: &[u8],
        amd: &[u8],
    ) -> Result<(u32, Vec<u8>, Vec<u8>), RoleError> {
        match self.take() {
            Phase::Running(running) => {
                let target = PlatformEvidence {
                    pdh: target_pdh.to_vec(),
                    platform: platform.to_vec(),
                    amd: amd.to_vec(),
                };
                // A target that the firmware refuses does not harm the guest: it runs on.
                let opened = self.firmware.send_start(&target);
                self.phase = match opened {
                    Ok(_) => Phase::Sending(running),
                    Err(_) => Phase::Running(running),
                };
                opened
            }
            other => self.refuse(other, "SEND_START"),
        }
    }

    fn send_pages(&mut self, gpas: &[u64]) -> Result<(), RoleError> {
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

    fn send_finish(&mut self) -> Result<(), RoleError> {
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

    fn send_cancel(&mut self) -> Result<(), RoleError> {
        match self.take() {
            Phase::Sending(running) | Phase::SendEnded(running) => {
                self.firmware.send_cancel()?;
                self.phase = Phase::Running(running);
                Ok(())
            }
            other => self.refuse(other, "SEND_CANCEL"),
        }
    }

    fn evidence(&mut self) -> Result<(Vec<u8>, Vec<u8>, Vec<u8>), RoleError> {
        let evidence = self.firmware.evidence()?;
        Ok((evidence.pdh, evidence.platform, evidence.amd))
    }

    fn receive_start(
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

    fn receive_pages(&mut self, gpas: &[u64]) -> Result<(), RoleError> {
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

    fn receive_finish(&mut self) -> Result<(), RoleError> {
        match self.take() {
            Phase::Receiving => {
                self.firmware.receive_finish()?;
                self.phase = Phase::Running(Finished);
                Ok(())
            }
            other => self.refuse(other, "RECEIVE_FINISH"),
        }
    }

    fn decommission(&mut self) {
        if let Phase::SendEnded(_) = self.take() {
            // The guest lives elsewhere by now; decommissioning frees its context whatever this says.
            let _ = self.firmware.send_finish();
        }
        self.firmware.decommission();
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

    /// A firmware that says yes until it is told to fail.
    #[derive(Default)]
    struct Willing {
        fail: bool,
        calls: Vec<&'static str>,
    }

    impl Willing {
        fn note(&mut self, call: &'static str) -> Result<(), RoleError> {
            self.calls.push(call);
            if self.fail {
                return Err(RoleError {
                    code: "TEST".into(),
                    text: call.into(),
                });
            }
            Ok(())
        }
    }

    impl Firmware for Willing {
        fn launch_start(&mut self, _: Option<&OwnerSession>) -> Result<(), RoleError> {
            self.note("start")
        }
        fn launch_update(&mut self, _: u64, _: u64) -> Result<(), RoleError> {
            self.note("update")
        }
        fn launch_measure(&mut self) -> Result<Measurement, RoleError> {
            self.note("measure")?;
            Ok(Measurement {
                blob: vec![0; 48],
                api: (0, 24, 0),
                policy: 0,
                elapsed_us: 0,
            })
        }
        fn launch_secret(&mut self, _: &[u8], _: &[u8], _: u64) -> Result<(), RoleError> {
            self.note("secret")
        }
        fn launch_finish(&mut self) -> Result<(), RoleError> {
            self.note("finish")
        }
        fn send_start(
            &mut self,
            _: &PlatformEvidence,
        ) -> Result<(u32, Vec<u8>, Vec<u8>), RoleError> {
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
            Ok(PlatformEvidence {
                pdh: vec![],
                platform: vec![],
                amd: vec![],
            })
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
            self.calls.push("decommission");
        }
    }

    fn code<T>(result: Result<T, RoleError>) -> String {
        result.err().unwrap().code
    }

    #[test]
    fn the_order_is_kept_and_a_wrong_call_reaches_no_firmware() {
        let mut guest = Guarded::new(Willing::default());
        assert_eq!(code(guest.launch_measure()), "LAUNCH_STATE");
        guest.launch_start(None).unwrap();
        assert_eq!(code(guest.launch_measure()), "LAUNCH_STATE");
        assert_eq!(code(guest.launch_finish()), "LAUNCH_STATE");
        guest.launch_update(0, 4096).unwrap();
        guest.launch_measure().unwrap();
        assert_eq!(code(guest.launch_update(0, 4096)), "LAUNCH_STATE");
        guest.launch_secret(&[], &[], 0).unwrap();
        guest.launch_finish().unwrap();
        assert_eq!(code(guest.launch_secret(&[], &[], 0)), "LAUNCH_STATE");
        assert_eq!(code(guest.receive_start(0, &[], &[])), "LAUNCH_STATE");
        assert_eq!(
            guest.firmware.calls,
            ["start", "update", "measure", "secret", "finish"]
        );
    }

    #[test]
    fn a_failed_launch_cannot_be_continued() {
        let mut guest = Guarded::new(Willing::default());
        guest.launch_start(None).unwrap();
        guest.firmware.fail = true;
        assert_eq!(code(guest.launch_update(0, 4096)), "TEST");
        guest.firmware.fail = false;
        assert_eq!(code(guest.launch_update(0, 4096)), "LAUNCH_STATE");
        assert_eq!(code(guest.launch_start(None)), "LAUNCH_STATE");
    }

    #[test]
    fn a_send_can_be_cancelled_until_the_guest_is_decommissioned() {
        let mut guest = Guarded::new(Willing::default());
        guest.launch_start(None).unwrap();
        guest.launch_update(0, 4096).unwrap();
        guest.launch_measure().unwrap();
        guest.launch_finish().unwrap();
        guest.firmware.fail = true;
        assert_eq!(code(guest.send_start(&[], &[], &[])), "TEST");
        guest.firmware.fail = false;
        guest.send_start(&[], &[], &[]).unwrap();
        guest.send_cancel().unwrap();
        guest.send_start(&[], &[], &[]).unwrap();
        let too_many = vec![0; EXCHANGE_PAGES + 1];
        assert_eq!(code(guest.send_pages(&too_many)), "BAD_REQUEST");
        guest.send_finish().unwrap();
        assert_eq!(code(guest.send_pages(&[0])), "LAUNCH_STATE");
        guest.send_cancel().unwrap();
        guest.send_start(&[], &[], &[]).unwrap();
        guest.send_finish().unwrap();
        assert!(!guest.firmware.calls.contains(&"send_finish"));
        guest.decommission();
        assert_eq!(
            guest
                .firmware
                .calls
                .iter()
                .rev()
                .take(2)
                .collect::<Vec<_>>(),
            [&"decommission", &"send_finish"]
        );
        assert_eq!(code(guest.send_cancel()), "LAUNCH_STATE");
        assert_eq!(code(guest.send_start(&[], &[], &[])), "LAUNCH_STATE");
    }
}
