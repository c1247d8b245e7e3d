//! The mover's side of a VMM against the real VMM role, on the machine's own `/dev/kvm`, with a real psp.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::thread::JoinHandle;
use std::time::Duration;

use casemate_crypto_migrate::guest::PAGE_SIZE;

use super::vmm_link::VmmLink;
use crate::confidential::control::ProcessorLink;
use crate::confidential::protocol::PlatformEvidence;
use crate::confidential::shared::{Access, Exchange, SharedMemory, sealed_memfd};
use crate::confidential::tests::{EMULATED, SITE_A, SITE_B, plan, psp, root};
use crate::confidential::{GuestMemoryView, open, protection};
use crate::ipc::Channel;
use crate::machine::plan::MachinePlan;
use crate::vmm::hooks::Hooks;
use crate::vmm::protocol::*;
use crate::vmm::role::VmmError;

const MEMORY: u64 = 64 << 20;
const PAGE: u64 = PAGE_SIZE as u64;

/// No confinement, no devices; the confidential technology is the real hook.
const HOOKS: Hooks = Hooks {
    confine_process: || Ok(()),
    confine_thread: |_| Ok(()),
    reopen_read_only: reopen,
    probe: || Err("no sandbox".into()),
    report: || Err("no sandbox".into()),
    devices: |_, _| Ok(vec![]),
    protection,
};

fn reopen(memory: BorrowedFd<'_>) -> Result<OwnedFd, String> {
    let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
    let file = std::fs::File::open(path).map_err(|e| e.to_string())?;
    Ok(file.into())
}

/// The VMM role in a thread.
struct Vmm {
    agent: Channel,
    thread: JoinHandle<Result<(), VmmError>>,
}

impl Vmm {
    fn start(psp: &ProcessorLink) -> Self {
        let (agent, role) = Channel::pair().unwrap();
        let thread = std::thread::spawn(move || crate::vmm::role::run(role, HOOKS));
        let vmm = Self { agent, thread };
        let kvm = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .expect("/dev/kvm must be there and open to the user");
        let (console, processor) = (
            tempfile::tempfile().unwrap(),
            psp.connect(false).unwrap().channel,
        );
        let handles = [kvm.as_fd(), console.as_fd(), processor.as_fd()];
        let prepare = VmmRequest::Prepare {
            plan: Box::new(MachinePlan {
                memory_bytes: MEMORY,
                ..plan(EMULATED)
            }),
            handles: vec![HandleKind::Kvm, HandleKind::Console, HandleKind::Processor],
        };
        vmm.done(&prepare, &handles);
        vmm
    }

    fn done(&self, request: &VmmRequest, handles: &[BorrowedFd<'_>]) {
        self.agent.send_with(request, handles).unwrap();
        let deadline = Some(Duration::from_secs(20));
        let reply = self.agent.recv::<VmmMessage>(deadline).unwrap().body;
        assert!(
            matches!(
                reply,
                VmmMessage::Reply(Ok(VmmReply::Done | VmmReply::Prepared { .. }))
            ),
            "{reply:?}"
        );
    }

    fn attach(&self) -> VmmLink {
        let (mover, vmm) = Channel::pair().unwrap();
        self.done(&VmmRequest::AttachMover, &[vmm.as_fd()]);
        VmmLink::attach(mover, Access::ReadWrite).unwrap()
    }
}

#[test]
fn a_real_vmm_takes_in_what_another_platform_sends() {
    let (a, b) = (psp(&SITE_A, &[root(&SITE_B)]), psp(&SITE_B, &[]));
    let there = Vmm::start(&b);
    there.done(&VmmRequest::Incoming { copy: false }, &[]);
    let link = there.attach();
    assert_eq!(link.memory.layout().length(), MEMORY);

    // The sender: a guest of site A's psp, without a VMM.
    let (memory, exchange) = (sealed_memfd(MEMORY), sealed_memfd(EXCHANGE_SIZE as u64));
    let view = GuestMemoryView {
        file: memory.as_fd(),
        runs: &[(0, MEMORY)],
    };
    let channel = Some(a.connect(false).unwrap().channel);
    let mut here = open(&plan(EMULATED), view, exchange.as_fd(), channel)
        .unwrap()
        .unwrap();
    let bytes = SharedMemory::map(memory.as_fd(), MEMORY, Access::ReadWrite).unwrap();
    let pages = [0, 7, MEMORY / PAGE - 1];
    for page in pages {
        bytes
            .write(page * PAGE, &[page as u8 | 1; PAGE_SIZE])
            .unwrap();
    }
    here.launch_start(&LaunchBinding::default()).unwrap();
    here.launch_update(0, PAGE).unwrap();
    here.launch_measure().unwrap();
    here.launch_finish().unwrap();

    let MoverReply::Evidence { pdh, platform, amd } =
        link.call(&MoverRequest::PlatformEvidence).unwrap()
    else {
        panic!("no evidence");
    };
    let (policy, source_pdh, session) = here
        .send_start(&PlatformEvidence { pdh, platform, amd })
        .unwrap();
    link.done(&MoverRequest::ReceiveStart {
        policy,
        source_pdh,
        session,
    })
    .unwrap();
    here.send_pages(&pages.map(|page| page * PAGE)).unwrap();
    let sent = Exchange::map(exchange.as_fd()).unwrap();
    for slot in 0..pages.len() {
        let packet = sent.packet(slot).unwrap();
        link.exchange
            .put_packet(slot, &packet.header, &packet.data)
            .unwrap();
    }
    let pages = pages.to_vec();
    link.done(&MoverRequest::ReceivePages {
        pages: pages.clone(),
    })
    .unwrap();
    for page in pages {
        let mut seen = [0; PAGE_SIZE];
        link.memory.read(page * PAGE, &mut seen).unwrap();
        assert_eq!(seen, [page as u8 | 1; PAGE_SIZE], "page {page}");
    }
    // A vCPU of it cannot run before the state is there.
    assert!(link.done(&MoverRequest::Activate).is_err());
    there.done(&VmmRequest::Shutdown, &[]);
    there.thread.join().unwrap().unwrap();
    assert_eq!(b.status().unwrap().guests, 0);
}
