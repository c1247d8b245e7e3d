//! The software secure processor as a VMM uses it: a client of the `psp` role for one guest.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use casemate_attest::measure::snp::SnpLaunchDigest;

use crate::confidential::launch::{Firmware, SendStarted, SpecialPage, VmsaPage, check_arrival};
use crate::confidential::protocol::{
    GuestOutcome, GuestReply, GuestRequest, LAUNCH_CHUNK, PlatformEvidence,
};
use crate::confidential::shared::MemoryLayout;
use crate::ipc::Channel;
use crate::machine::plan::Technology;
use crate::vmm::protocol::{LaunchBinding, Measurement, RoleError, SnpBinding};

/// A guest of the `psp` role.
pub struct SoftwareFirmware {
    channel: Channel,
    kind: Kind,
}

/// Which half of the processor serves, under which policy.
enum Kind {
    Sev { policy: u32 },
    Snp { policy: u64, binding: SnpBinding },
}

impl SoftwareFirmware {
    /// Attaches the guest's memory and the exchange memory.
    pub fn attach(
        channel: Channel,
        technology: Technology,
        memory: BorrowedFd<'_>,
        layout: &MemoryLayout,
        exchange: BorrowedFd<'_>,
    ) -> Result<Self, RoleError> {
        let kind = match technology {
            Technology::Sev { policy, .. } | Technology::SevEs { policy, .. } => {
                Kind::Sev { policy }
            }
            Technology::SevSnp { policy, .. } => Kind::Snp {
                policy,
                binding: SnpBinding::default(),
            },
            Technology::None => {
                return Err(RoleError::new(
                    "BAD_PLAN",
                    "a plain guest has no secure processor",
                ));
            }
        };
        let firmware = Self { channel, kind };
        let request = GuestRequest::Attach {
            runs: layout.runs().to_vec(),
        };
        firmware.channel.send_with(&request, &[memory, exchange])?;
        firmware.reply()?;
        Ok(firmware)
    }

    fn call(&self, request: &GuestRequest) -> GuestOutcome {
        self.channel.send(request)?;
        self.reply()
    }

    fn reply(&self) -> GuestOutcome {
        self.channel
            .recv::<GuestOutcome>(Some(PROCESSOR_DEADLINE))?
            .body
    }

    fn done(&self, request: &GuestRequest) -> Result<(), RoleError> {
        match self.call(request)? {
            GuestReply::Done => Ok(()),
            _ => Err(unexpected()),
        }
    }
}

impl Firmware for SoftwareFirmware {
    fn launch_start(&mut self, launch: &LaunchBinding) -> Result<(), RoleError> {
        let request = match &mut self.kind {
            Kind::Sev { policy } => GuestRequest::LaunchStart {
                policy: *policy,
                session: launch.session.clone(),
            },
            Kind::Snp { policy, binding } => {
                *binding = launch.snp.clone();
                GuestRequest::SnpStart { policy: *policy }
            }
        };
        self.done(&request)
    }

    fn launch_update(&mut self, gpa: u64, length: u64) -> Result<(), RoleError> {
        let end = gpa
            .checked_add(length)
            .ok_or_else(|| RoleError::new("BAD_REQUEST", "a run to measure wraps around"))?;
        let mut at = gpa;
        while at < end {
            let length = (end - at).min(LAUNCH_CHUNK);
            self.done(&GuestRequest::LaunchUpdate { gpa: at, length })?;
            at += length;
        }
        Ok(())
    }

    fn launch_special(&mut self, gpa: u64, page: SpecialPage) -> Result<(), RoleError> {
        self.done(&GuestRequest::SnpPage { gpa, page })
    }

    fn launch_vcpus(&mut self, vmsas: &[VmsaPage]) -> Result<(), RoleError> {
        for page in vmsas {
            let page = page.to_vec();
            self.done(&GuestRequest::LaunchVmsa { page })?;
        }
        Ok(())
    }

    fn launch_measure(&mut self) -> Result<Option<Measurement>, RoleError> {
        if let Kind::Snp { .. } = self.kind {
            return Ok(None);
        }
        match self.call(&GuestRequest::LaunchMeasure)? {
            GuestReply::Measured { blob, api, policy } => Ok(Some(Measurement {
                blob,
                api,
                policy,
                elapsed_us: 0,
            })),
            _ => Err(unexpected()),
        }
    }

    fn launch_secret(
        &mut self,
        header: &[u8],
        ciphertext: &[u8],
        gpa: u64,
    ) -> Result<(), RoleError> {
        self.done(&GuestRequest::LaunchSecret {
            header: header.to_vec(),
            ciphertext: ciphertext.to_vec(),
            gpa,
        })
    }

    fn launch_finish(&mut self) -> Result<Option<SnpLaunchDigest>, RoleError> {
        let Kind::Snp { binding, .. } = &self.kind else {
            return self.done(&GuestRequest::LaunchFinish).map(|()| None);
        };
        let binding = binding.clone();
        match self.call(&GuestRequest::SnpFinish { binding })? {
            GuestReply::SnpLaunched { digest } => {
                let digest = digest.try_into().map_err(|_| unexpected())?;
                Ok(Some(SnpLaunchDigest::new(digest)))
            }
            _ => Err(unexpected()),
        }
    }

    fn send_start(&mut self, target: &PlatformEvidence) -> Result<SendStarted, RoleError> {
        let target = target.clone();
        match self.call(&GuestRequest::SendStart { target })? {
            GuestReply::SendStarted {
                policy,
                source_pdh,
                session,
            } => Ok((policy, source_pdh, session)),
            _ => Err(unexpected()),
        }
    }

    fn send_pages(&mut self, gpas: &[u64]) -> Result<(), RoleError> {
        self.done(&GuestRequest::SendPages {
            gpas: gpas.to_vec(),
        })
    }

    fn send_finish(&mut self) -> Result<(), RoleError> {
        self.done(&GuestRequest::SendFinish)
    }

    fn send_cancel(&mut self) -> Result<(), RoleError> {
        self.done(&GuestRequest::SendCancel)
    }

    fn evidence(&mut self) -> Result<PlatformEvidence, RoleError> {
        match self.call(&GuestRequest::Evidence)? {
            GuestReply::Evidence(evidence) => Ok(evidence),
            _ => Err(unexpected()),
        }
    }

    fn receive_start(
        &mut self,
        policy: u32,
        source_pdh: &[u8],
        session: &[u8],
    ) -> Result<(), RoleError> {
        match self.kind {
            Kind::Sev { policy: described } => check_arrival(policy, described)?,
            Kind::Snp { .. } => {
                return Err(RoleError::new(
                    "UNSUPPORTED",
                    "SEV-SNP guests cannot be moved; launch the guest anew here and let its owner release the key",
                ));
            }
        }
        self.done(&GuestRequest::ReceiveStart {
            policy,
            source_pdh: source_pdh.to_vec(),
            session: session.to_vec(),
        })
    }

    fn receive_pages(&mut self, gpas: &[u64]) -> Result<(), RoleError> {
        self.done(&GuestRequest::ReceivePages {
            gpas: gpas.to_vec(),
        })
    }

    fn receive_finish(&mut self) -> Result<(), RoleError> {
        self.done(&GuestRequest::ReceiveFinish)
    }

    fn decommission(&mut self) {
        // If it cannot be told, the closing channel says the same.
        let _ = self.done(&GuestRequest::Decommission);
    }
}

fn unexpected() -> RoleError {
    RoleError::new("ROLE_PROTOCOL", "the psp's reply has no place here")
}

/// How long the psp may take for one request; it serves all guests of the host in turn.
const PROCESSOR_DEADLINE: Duration = Duration::from_secs(30);
