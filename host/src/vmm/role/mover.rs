//! What a mover asks, at the source and at the destination.

use std::os::fd::BorrowedFd;

use super::super::layout::PAGE_SIZE;
use super::super::protocol::{
    EXCHANGE_PAGES, MAX_STATE, MachineState, MoverReply, MoverRequest, RoleError,
};
use super::{Control, Move, not_confidential, wrong_state};
use crate::confidential::launch::GuestProtection;
use crate::confidential::protocol::PlatformEvidence;
use crate::ipc::{Channel, IpcError};
use crate::userfault::Faults;
use crate::vmm::kvm::KvmError;
use crate::vmm::machine::MachineError;

impl Control {
    /// Answers one request; an error means that the mover is gone.
    pub(super) fn answer_mover(
        &mut self,
        request: MoverRequest,
        channel: &Channel,
    ) -> Result<(), IpcError> {
        if matches!(request, MoverRequest::Attach) {
            return self.attach(channel);
        }
        channel.send(&self.mover_request(request))
    }

    /// The mover's end has closed. Before the locks were given up the guest runs on here, as if nothing
    /// had been tried; afterwards only the agent may decide who owns it.
    pub(super) fn mover_gone(&mut self) {
        if self.state == MachineState::Incoming || self.moving.released {
            return;
        }
        let run = self.moving.paused_running && self.state == MachineState::Paused;
        let ended = self.end_move().and_then(|()| {
            if run {
                self.machine.run()?;
                self.state = MachineState::Running;
            }
            Ok(())
        });
        if let Err(e) = ended {
            tracing::error!("machine cannot go on after its mover went: {e}");
        }
    }

    /// Back to a machine that is not moving: firmware context cancelled, locks on, tracking off.
    pub(super) fn end_move(&mut self) -> Result<(), RoleError> {
        let moving = self.moving;
        if moving.sending {
            self.machine
                .protection()
                .ok_or_else(not_confidential)?
                .send_cancel()?;
            self.moving.sending = false;
        }
        if moving.released {
            self.machine.acquire()?;
            self.moving.released = false;
        }
        if moving.tracking {
            self.machine
                .vm()
                .stop_dirty_log()
                .map_err(MachineError::from)?;
        }
        self.machine.forget_disk_writes();
        self.moving = Move::default();
        Ok(())
    }

    fn attach(&self, channel: &Channel) -> Result<(), IpcError> {
        let memory = if self.state == MachineState::Incoming {
            Ok(self.machine.memory().file())
        } else {
            self.machine.memory().file_for_reader()
        };
        match memory {
            Ok(memory) => {
                let incoming = self.state == MachineState::Incoming;
                let faults = self.machine.faults().filter(|_| incoming);
                let reply = MoverReply::Attached {
                    plan: Box::new(self.machine.plan().clone()),
                    memory: self.machine.memory().runs(),
                    fault_bases: faults.map(Faults::ranges).map_or_else(Vec::new, |ranges| {
                        ranges.iter().map(|range| range.base).collect()
                    }),
                };
                let mut handles: Vec<BorrowedFd<'_>> = vec![memory, self.machine.exchange().file()];
                handles.extend(faults.map(Faults::fd));
                channel.send_with(&Ok::<_, RoleError>(reply), &handles)
            }
            Err(e) => channel.send(&Err::<MoverReply, _>(RoleError::from(MachineError::from(
                e,
            )))),
        }
    }

    fn mover_request(&mut self, request: MoverRequest) -> Result<MoverReply, RoleError> {
        match request {
            MoverRequest::Attach => Err(wrong_state("attached already")),
            MoverRequest::SendStart {
                target_pdh,
                platform,
                amd,
            } => self.send_start(&PlatformEvidence {
                pdh: target_pdh,
                platform,
                amd,
            }),
            MoverRequest::PlatformEvidence => {
                let PlatformEvidence { pdh, platform, amd } = self.protection()?.evidence()?;
                Ok(MoverReply::Evidence { pdh, platform, amd })
            }
            MoverRequest::ReceiveStart {
                policy,
                source_pdh,
                session,
            } => {
                self.expect(&[MachineState::Incoming], "RECEIVE_START")?;
                self.protection()?
                    .receive_start(policy, &source_pdh, &session)?;
                self.moving.receiving = true;
                Ok(MoverReply::Done)
            }
            MoverRequest::StartTracking => self.start_tracking(),
            MoverRequest::TakeDirty => self.take_dirty(),
            MoverRequest::TrackDisk(disk) => {
                self.expect(SOURCE, "copying a disk")?;
                self.put_disk_bitmap(&self.machine.track_disk(disk)?)
            }
            MoverRequest::TakeDisk(disk) => {
                self.expect(SOURCE, "copying a disk")?;
                self.put_disk_bitmap(&self.machine.take_disk_writes(disk)?)
            }
            MoverRequest::Populated => {
                self.expect(&[MachineState::Paused], "listing memory")?;
                let populated = self.machine.memory().populated();
                self.put_bitmap(&populated.map_err(MachineError::from)?)
            }
            MoverRequest::SendPages { pages } => {
                self.expect(SOURCE, "SEND_UPDATE_DATA")?;
                let gpas = self.gpas(&pages)?;
                self.protection()?.send_pages(&gpas)?;
                Ok(MoverReply::Done)
            }
            MoverRequest::ReceivePages { pages } => {
                self.expect(&[MachineState::Incoming], "RECEIVE_UPDATE_DATA")?;
                if self.moving.restored {
                    return Err(wrong_state("the state is restored; no page may follow"));
                }
                let gpas = self.gpas(&pages)?;
                self.protection()?.receive_pages(&gpas)?;
                Ok(MoverReply::Done)
            }
            MoverRequest::Throttle { percent } => self.throttle(percent),
            MoverRequest::Pause => self.pause_for_move(),
            MoverRequest::SaveState => self.save_state(),
            MoverRequest::Release => {
                self.expect(&[MachineState::Paused], "releasing")?;
                self.moving.released = true;
                self.machine.release()?;
                Ok(MoverReply::Done)
            }
            MoverRequest::Resume => {
                self.expect(SOURCE, "resuming")?;
                let run = self.moving.paused_running && self.state == MachineState::Paused;
                self.end_move()?;
                if run {
                    self.machine.run()?;
                    self.state = MachineState::Running;
                }
                Ok(MoverReply::Done)
            }
            MoverRequest::RestoreState { length } => self.restore_state(length),
            MoverRequest::Activate => self.activate(),
        }
    }

    fn send_start(&mut self, target: &PlatformEvidence) -> Result<MoverReply, RoleError> {
        self.expect(SOURCE, "SEND_START")?;
        self.machine.check_movable()?;
        let (policy, source_pdh, session) = self.protection()?.send_start(target)?;
        self.moving.sending = true;
        Ok(MoverReply::SendStarted {
            policy,
            source_pdh,
            session,
        })
    }

    /// Logging starts before the populated pages are listed: a page that is touched in between is in one
    /// of the two.
    fn start_tracking(&mut self) -> Result<MoverReply, RoleError> {
        self.expect(SOURCE, "dirty tracking")?;
        self.machine
            .vm()
            .start_dirty_log()
            .map_err(MachineError::from)?;
        self.moving.tracking = true;
        let populated = self
            .machine
            .memory()
            .populated()
            .map_err(MachineError::from)?;
        self.put_bitmap(&populated)
    }

    fn take_dirty(&mut self) -> Result<MoverReply, RoleError> {
        self.expect(SOURCE, "reading the dirty log")?;
        if !self.moving.tracking {
            return Err(wrong_state(
                "dirty tracking is off; StartTracking comes first",
            ));
        }
        let dirty = self.machine.vm().take_dirty().map_err(MachineError::from)?;
        self.put_bitmap(&dirty)
    }

    fn pause_for_move(&mut self) -> Result<MoverReply, RoleError> {
        self.expect(SOURCE, "a pause")?;
        self.moving.throttle = None;
        if self.state == MachineState::Running {
            self.machine.pause()?;
            self.state = MachineState::Paused;
            self.moving.paused_running = true;
        }
        Ok(MoverReply::Done)
    }

    fn save_state(&mut self) -> Result<MoverReply, RoleError> {
        self.expect(&[MachineState::Paused], "saving")?;
        if self.machine.stop_notice().reason().is_some() {
            return Err(wrong_state("the guest has switched itself off"));
        }
        // What it said since SEND_START counts too, and it says no more now.
        self.machine.check_movable()?;
        if let Some(protection) = self.machine.protection() {
            protection.send_finish()?;
        }
        let state = self.machine.save()?;
        self.machine
            .exchange()
            .put(&state)
            .map_err(MachineError::from)?;
        Ok(MoverReply::State {
            length: state.len() as u64,
        })
    }

    fn restore_state(&mut self, length: u64) -> Result<MoverReply, RoleError> {
        self.expect(&[MachineState::Incoming], "restoring")?;
        if self.moving.restored {
            return Err(wrong_state("the state is restored already"));
        }
        let length = usize::try_from(length)
            .ok()
            .filter(|length| *length <= MAX_STATE)
            .ok_or_else(|| RoleError {
                code: "BAD_STATE".into(),
                text: format!("machine state of {length} bytes is larger than {MAX_STATE}"),
            })?;
        if let Some(protection) = self.machine.protection() {
            protection.receive_finish()?;
        }
        let state = self
            .machine
            .exchange()
            .take(length)
            .map_err(MachineError::from)?;
        self.machine.restore(&state, self.moving.copy)?;
        self.moving.restored = true;
        Ok(MoverReply::Done)
    }

    fn activate(&mut self) -> Result<MoverReply, RoleError> {
        self.expect(&[MachineState::Incoming], "activating")?;
        if !self.moving.restored {
            return Err(wrong_state(
                "no state is restored; RestoreState comes first",
            ));
        }
        self.machine.acquire()?;
        self.machine.run()?;
        self.machine.announce()?;
        self.state = MachineState::Running;
        crate::sandbox::forget_program_pages();
        self.moving = Move::default();
        Ok(MoverReply::Done)
    }

    fn protection(&mut self) -> Result<&mut GuestProtection, RoleError> {
        self.machine.protection().ok_or_else(not_confidential)
    }

    /// Page numbers of a mover as addresses: few enough, and in guest memory.
    fn gpas(&self, pages: &[u64]) -> Result<Vec<u64>, RoleError> {
        let limit = self.machine.memory().pages();
        if pages.len() > EXCHANGE_PAGES || pages.iter().any(|page| *page >= limit) {
            return Err(RoleError {
                code: "BAD_PAGES".into(),
                text: format!("at most {EXCHANGE_PAGES} pages, each below {limit}"),
            });
        }
        Ok(pages.iter().map(|page| page * PAGE_SIZE).collect())
    }

    fn put_disk_bitmap(&self, words: &[u64]) -> Result<MoverReply, RoleError> {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.machine
            .exchange()
            .put(&bytes)
            .map_err(MachineError::from)?;
        Ok(MoverReply::DiskBitmap {
            words: words.len() as u64,
        })
    }

    fn put_bitmap(&self, words: &[u64]) -> Result<MoverReply, RoleError> {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.machine
            .exchange()
            .put(&bytes)
            .map_err(MachineError::from)?;
        Ok(MoverReply::Bitmap {
            bits: self.machine.memory().pages(),
        })
    }
}

impl From<KvmError> for RoleError {
    fn from(error: KvmError) -> Self {
        MachineError::from(error).into()
    }
}

const SOURCE: &[MachineState] = &[MachineState::Running, MachineState::Paused];
