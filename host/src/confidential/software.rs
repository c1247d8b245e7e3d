//! The software secure processor as a VMM uses it: a client of the `psp` role for one guest.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use crate::confidential::launch::{Firmware, check_arrival};
use crate::confidential::protocol::{
    GuestOutcome, GuestReply, GuestRequest, LAUNCH_CHUNK, PlatformEvidence,
};
use crate::confidential::shared::MemoryLayout;
use crate::ipc::Channel;
use crate::vmm::protocol::{Measurement, OwnerSession, RoleError};

/// A guest of the `psp` role.
pub struct SoftwareFirmware {
    channel: Channel,
    policy: u32,
}

impl SoftwareFirmware {
    /// Attaches the guest's memory and the exchange memory.
    pub fn attach(
        channel: Channel,
        policy: u32,
        memory: BorrowedFd<'_>,
        layout: &MemoryLayout,
        exchange: BorrowedFd<'_>,
    ) -> Result<Self, RoleError> {
        let firmware = Self { channel, policy };
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
    fn launch_start(&mut self, session: Option<&OwnerSession>) -> Result<(), RoleError> {
        self.done(&GuestRequest::LaunchStart {
            policy: self.policy,
            session: session.cloned(),
        })
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

    fn launch_measure(&mut self) -> Result<Measurement, RoleError> {
        match self.call(&GuestRequest::LaunchMeasure)? {
            GuestReply::Measured { blob, api, policy } => Ok(Measurement {
                blob,
                api,
                policy,
                elapsed_us: 0,
            }),
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

    fn launch_finish(&mut self) -> Result<(), RoleError> {
        self.done(&GuestRequest::LaunchFinish)
    }

    fn send_start(
        &mut self,
        target: &PlatformEvidence,
    ) -> Result<(u32, Vec<u8>, Vec<u8>), RoleError> {
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
        check_arrival(policy, self.policy)?;
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
