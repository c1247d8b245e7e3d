//! A VMM role in a thread, driven over its channels as the agent and the mover drive it; no sandbox.
#![allow(dead_code, reason = "each test binary and the example use a part")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests end where they fail"
)]

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use casemate::ipc::{Channel, Received};
use casemate::machine::plan::{MachinePlan, Technology};
use casemate::vmm::hooks::Hooks;
use casemate::vmm::models;
use casemate::vmm::protocol::{
    HandleKind, MoverReply, MoverRequest, RoleError, VmmEvent, VmmMessage, VmmReply, VmmRequest,
};
use casemate::vmm::role::{self, VmmError};

/// Answers come within this time or the test fails: a guest that hangs must not hang the tests.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// A VMM role.
pub struct Vmm {
    agent: Channel,
    pub events: Vec<VmmEvent>,
    thread: Option<JoinHandle<Result<(), VmmError>>>,
}

impl Vmm {
    /// Starts the role and prepares it.
    pub fn prepare(
        plan: &MachinePlan,
        handles: Vec<(HandleKind, OwnedFd)>,
    ) -> Result<Self, RoleError> {
        Self::prepare_reply(plan, handles).map(|(vmm, _)| vmm)
    }

    /// The same, with what it answered.
    pub fn prepare_reply(
        plan: &MachinePlan,
        handles: Vec<(HandleKind, OwnedFd)>,
    ) -> Result<(Self, VmmReply), RoleError> {
        Self::prepare_hooked(plan, handles, hooks())
    }

    /// The same, with other hooks.
    pub fn prepare_hooked(
        plan: &MachinePlan,
        handles: Vec<(HandleKind, OwnedFd)>,
        hooks: Hooks,
    ) -> Result<(Self, VmmReply), RoleError> {
        let (agent, other) = Channel::pair().unwrap();
        let thread = std::thread::Builder::new()
            .name("control".into())
            .spawn(move || role::run(other, hooks))
            .unwrap();
        let mut vmm = Self {
            agent,
            events: vec![],
            thread: Some(thread),
        };
        let (kinds, fds): (Vec<_>, Vec<_>) = handles.into_iter().unzip();
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let request = VmmRequest::Prepare {
            plan: Box::new(plan.clone()),
            handles: kinds,
        };
        vmm.agent.send_with(&request, &borrowed).unwrap();
        let reply = vmm.answer()?;
        Ok((vmm, reply))
    }

    /// One request, one answer.
    pub fn ask(&mut self, request: VmmRequest) -> Result<VmmReply, RoleError> {
        self.ask_with(request, &[])
    }

    /// The same, with descriptors beside it.
    pub fn ask_with(
        &mut self,
        request: VmmRequest,
        handles: &[BorrowedFd<'_>],
    ) -> Result<VmmReply, RoleError> {
        self.agent.send_with(&request, handles).unwrap();
        self.answer()
    }

    /// Waits for an event.
    pub fn event(&mut self, limit: Duration) -> Option<VmmEvent> {
        if self.events.is_empty() {
            match self.agent.recv::<VmmMessage>(Some(limit)).ok()?.body {
                VmmMessage::Event(event) => self.events.push(event),
                VmmMessage::Reply(reply) => panic!("an answer without question: {reply:?}"),
            }
        }
        Some(self.events.remove(0))
    }

    /// Attaches a mover and says hello for it.
    pub fn mover(&mut self) -> Mover {
        let (here, there) = Channel::pair().unwrap();
        self.agent
            .send_with(&VmmRequest::AttachMover, &[there.as_fd()])
            .unwrap();
        self.answer().unwrap();
        here.send(&MoverRequest::Attach).unwrap();
        let reply: Received<Result<MoverReply, RoleError>> = here.recv(Some(DEADLINE)).unwrap();
        let MoverReply::Attached { memory, .. } = reply.body.unwrap() else {
            panic!("not attached");
        };
        let mut files = reply.handles.into_iter().map(File::from);
        Mover {
            channel: here,
            memory: files.next().unwrap(),
            exchange: files.next().unwrap(),
            pages: memory.iter().map(|run| run.1).sum::<u64>() / 4096,
        }
    }

    fn answer(&mut self) -> Result<VmmReply, RoleError> {
        loop {
            match self.agent.recv::<VmmMessage>(Some(DEADLINE)).unwrap().body {
                VmmMessage::Reply(answer) => return answer,
                VmmMessage::Event(event) => self.events.push(event),
            }
        }
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.agent.send(&VmmRequest::Shutdown);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The mover's end of a VMM.
pub struct Mover {
    channel: Channel,
    pub memory: File,
    pub exchange: File,
    pub pages: u64,
}

impl Mover {
    pub fn ask(&self, request: MoverRequest) -> Result<MoverReply, RoleError> {
        self.channel.send(&request).unwrap();
        self.channel
            .recv::<Result<MoverReply, RoleError>>(Some(DEADLINE))
            .unwrap()
            .body
    }

    /// Asks over and over until the VMM does not listen any more.
    pub fn ask_without_reading(&self, request: MoverRequest, most: u32) {
        for _ in 0..most {
            if self.channel.send(&request).is_err() {
                return;
            }
        }
        panic!("the VMM still listens");
    }

    /// Page numbers of the bitmap that `request` answers with.
    pub fn bitmap(&self, request: MoverRequest) -> Vec<u64> {
        let MoverReply::Bitmap { bits } = self.ask(request).unwrap() else {
            panic!("no bitmap");
        };
        assert_eq!(bits, self.pages);
        let mut bytes = vec![0u8; (bits as usize).div_ceil(64) * 8];
        self.exchange.read_exact_at(&mut bytes, 0).unwrap();
        let bit = |page: u64| bytes[(page / 8) as usize] >> (page % 8) & 1 == 1;
        (0..bits).filter(|page| bit(*page)).collect()
    }

    pub fn page(&self, page: u64) -> [u8; 4096] {
        let mut bytes = [0; 4096];
        self.memory.read_exact_at(&mut bytes, page * 4096).unwrap();
        bytes
    }
}

/// Figures of one move.
#[derive(Debug, Default)]
pub struct Moved {
    pub rounds: u32,
    pub pages: usize,
    pub state_bytes: u64,
    pub downtime: Duration,
}

/// Moves a running plain guest from one VMM to another, pre-copy, all in clear and in this process.
pub fn migrate(source: &mut Vmm, target: &mut Vmm) -> Moved {
    let (from, to) = (source.mover(), target.mover());
    let mut moved = Moved::default();
    let copy = |pages: &[u64]| {
        for page in pages {
            to.memory
                .write_all_at(&from.page(*page), page * 4096)
                .unwrap();
        }
    };
    let mut pages = from.bitmap(MoverRequest::StartTracking);
    for _ in 0..5 {
        copy(&pages);
        moved.rounds += 1;
        moved.pages += pages.len();
        pages = from.bitmap(MoverRequest::TakeDirty);
        if pages.len() < 512 {
            break;
        }
    }
    let start = Instant::now();
    copy(&pages);
    from.ask(MoverRequest::Pause).unwrap();
    pages = from.bitmap(MoverRequest::TakeDirty);
    moved.pages += pages.len();
    copy(&pages);
    let MoverReply::State { length } = from.ask(MoverRequest::SaveState).unwrap() else {
        panic!("no state");
    };
    let mut state = vec![0u8; length as usize];
    from.exchange.read_exact_at(&mut state, 0).unwrap();
    to.exchange.write_all_at(&state, 0).unwrap();
    to.ask(MoverRequest::RestoreState { length }).unwrap();
    from.ask(MoverRequest::Release).unwrap();
    to.ask(MoverRequest::Activate).unwrap();
    moved.downtime = start.elapsed();
    moved.state_bytes = length;
    moved
}

/// Console output of one or several VMMs in a row, line by line with the time each came.
pub struct Lines {
    receiver: Receiver<(Instant, String)>,
    writer: OwnedFd,
}

impl Lines {
    pub fn new() -> Self {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let (sender, receiver) = channel();
        std::thread::spawn(move || {
            let mut reader = BufReader::new(File::from(reader));
            let mut line = Vec::new();
            while reader.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                if sender.send((Instant::now(), text)).is_err() {
                    return;
                }
                line.clear();
            }
        });
        Self { receiver, writer }
    }

    pub fn handle(&self) -> OwnedFd {
        self.writer.try_clone().unwrap()
    }

    pub fn next(&self, limit: Duration) -> Option<(Instant, String)> {
        self.receiver.recv_timeout(limit).ok()
    }
}

pub fn kvm() -> OwnedFd {
    File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .expect("these tests need /dev/kvm")
        .into()
}

pub fn plan(vcpus: u8, memory_bytes: u64, cmdline: &str) -> MachinePlan {
    MachinePlan {
        name: "test".into(),
        vm_id: [7; 16],
        vcpus,
        cpu: Default::default(),
        memory_bytes,
        firmware: None,
        cmdline: cmdline.into(),
        technology: Technology::None,
        disks: vec![],
        nets: vec![],
        vsock_cid: None,
        small: Default::default(),
        hotplug: Default::default(),
    }
}

/// A bzImage with `code` as its kernel, of at least `length` bytes.
pub fn bzimage(code: &[u8], length: usize) -> Vec<u8> {
    let mut image = vec![0u8; 1024 + 0x200];
    let mut set = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    set(0x1f1, &[1]);
    set(0x1fe, &[0x55, 0xaa]);
    set(0x201, &[0x6a]);
    set(0x202, b"HdrS");
    set(0x206, &0x020fu16.to_le_bytes());
    set(0x211, &[1]);
    set(0x22c, &0x7fff_ffffu32.to_le_bytes());
    set(0x230, &0x20_0000u32.to_le_bytes());
    set(0x234, &[1]);
    set(0x236, &1u16.to_le_bytes());
    set(0x238, &2047u32.to_le_bytes());
    set(0x258, &0x100_0000u64.to_le_bytes());
    set(0x260, &(length.max(0x10_0000) as u32).to_le_bytes());
    image.extend_from_slice(code);
    image.resize(image.len().max(length), 0xa5);
    image
}

/// A file that holds `bytes`.
pub fn image_file(bytes: &[u8]) -> OwnedFd {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file.into()
}

/// Everything a sandbox would do, left out.
pub fn hooks() -> Hooks {
    Hooks {
        confine_process: || Ok(()),
        confine_thread: |_| Ok(()),
        reopen_read_only: |file| {
            use std::os::fd::AsRawFd;
            File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
                .map(OwnedFd::from)
                .map_err(|e| e.to_string())
        },
        probe: || Err("no sandbox in this test".into()),
        report: || Err("no sandbox in this test".into()),
        devices: models::from_plan,
        protection: casemate::confidential::protection,
    }
}
