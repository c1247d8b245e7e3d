//! The product's VMM, jailed and filtered, sends a guest of the "real" secure processor to another such VMM on another
//! machine: SEND and RECEIVE of every page through the mover's own requests. Needs root and `/dev/kvm`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests end where they fail"
)]

mod common;
#[path = "product/kernel.rs"]
mod kernel;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use casemate::machine::plan::{MachinePlan, Technology};
use casemate::vmm::protocol::{
    EXCHANGE_PAGES, LaunchBinding, MachineState, MoverReply, MoverRequest, PACKET_STRIDE, VmmReply,
    VmmRequest,
};
use casemate_double::relay::{Order, Outcome, Report};
use casemate_double::{Config, Double, Fault};
use common::{SEV, SITE_A, SITE_B, amd, root, site_a};
use kernel::{kernel, kernel_that_does_not_tell};

#[test]
fn a_running_guest_moves_between_two_jailed_vmms_and_counts_on() {
    let (mut source, mut target) = hosts();
    source.launch(kernel());
    source.counts_to(3);
    target.prepare(None);
    target.done(VmmRequest::Incoming { copy: false });
    source.attach();
    target.attach();
    open(&mut source, &mut target);
    let mut pages = source.bitmap(MoverRequest::StartTracking);
    // The double pins nothing: of memory that was never touched there is nothing to send.
    assert!(pages.len() > WINDOW, "{}", pages.len());
    let (first, mut sent) = (pages.len(), 0);
    for round in 0..3 {
        sent += pages.len();
        copy(&mut source, &mut target, &pages);
        if round == 1 {
            source.moved(MoverRequest::Pause);
        }
        pages = source.bitmap(MoverRequest::TakeDirty);
    }
    assert!(pages.is_empty(), "it stands");
    assert!(sent > first + WINDOW / 2, "it ran on while it was sent");
    let last = source.counted();
    hand_over(&mut source, &mut target);
    // What the source's count would have been next is the target's first.
    target.says_next(last);
    source.end();
    target.end();
    assert_eq!(source.double.guests(), 0);
    let log = source.double.log();
    let finish = log.iter().position(|call| call == "KVM_SEV_SEND_FINISH");
    let gone = log.iter().position(|call| call == "close vm: DECOMMISSION");
    assert!(finish.unwrap() < gone.unwrap(), "{log:?}");
    source.finish();
    target.finish();
}

#[test]
fn a_guest_that_does_not_tell_what_it_shares_is_not_sent_and_runs_on() {
    let (mut source, mut target) = hosts();
    source.launch(kernel_that_does_not_tell());
    source.counts_to(3);
    target.prepare(None);
    target.done(VmmRequest::Incoming { copy: false });
    source.attach();
    target.attach();
    let before = source.double.log().len();
    let request = target.send_start();
    let refused = source.order(Order::Mover(request));
    assert_eq!(refused.unwrap_err().code, "PAGES_UNKNOWN");
    assert_eq!(source.double.log()[before..], [] as [&str; 0]);
    let last = source.counted();
    source.counts_to(last / 256 + 3);
    source.end();
    target.end();
    source.finish();
    target.finish();
}

#[test]
fn a_move_that_the_target_cannot_take_leaves_the_guest_running() {
    let (mut source, mut target) = hosts();
    source.launch(kernel());
    source.counts_to(3);
    target.prepare(None);
    target.done(VmmRequest::Incoming { copy: false });
    source.attach();
    target.attach();
    open(&mut source, &mut target);
    let pages = source.bitmap(MoverRequest::StartTracking);
    target
        .double
        .fail_later("RECEIVE_UPDATE_DATA", 5, 1, Fault::Firmware(0x13));
    source.moved(MoverRequest::SendPages {
        pages: pages[..16].to_vec(),
    });
    let packets = source.exchange(16 * PACKET_STRIDE as u64);
    target.wrote(packets);
    let refused = target.order(Order::Mover(MoverRequest::ReceivePages {
        pages: pages[..16].to_vec(),
    }));
    assert_eq!(refused.unwrap_err().code, "HWSEV_RET_PLATFORM");
    let after = target.order(Order::Mover(MoverRequest::RestoreState { length: 64 }));
    assert_eq!(after.unwrap_err().code, "LAUNCH_STATE");
    source.moved(MoverRequest::Pause);
    source.moved(MoverRequest::Resume);
    let last = source.counted();
    source.counts_to(last / 256 + 3);
    assert!(
        source
            .double
            .log()
            .contains(&"KVM_SEV_SEND_CANCEL".to_owned())
    );
    source.end();
    target.end();
    source.finish();
    target.finish();
}

/// A host with at most one VMM.
struct Host {
    double: Double,
    amd: Vec<u8>,
    uid: u32,
}

impl Host {
    fn start(config: &Config, number: u32) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_double-host"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        Self {
            double: Double::run(command, config).unwrap(),
            amd: amd(&config.identity),
            uid: 3_500_000_000 + std::process::id() % 1_000_000 * 8 + number,
        }
    }

    fn order(&mut self, order: Order) -> Outcome {
        self.double
            .exchange(&order)
            .unwrap_or_else(|e| panic!("{e}"))
    }

    fn ordered(&mut self, order: Order) -> Report {
        self.order(order).unwrap_or_else(|error| panic!("{error}"))
    }

    fn done(&mut self, request: VmmRequest) {
        assert!(matches!(
            self.ordered(Order::Vmm(request)),
            Report::Vmm(VmmReply::Done)
        ));
    }

    fn prepare(&mut self, kernel: Option<Vec<u8>>) {
        let order = Order::Prepare {
            plan: Box::new(plan()),
            kernel,
            amd: self.amd.clone(),
            uid: self.uid,
        };
        assert!(matches!(
            self.ordered(order),
            Report::Vmm(VmmReply::Prepared { .. })
        ));
    }

    fn launch(&mut self, kernel: Vec<u8>) {
        self.prepare(Some(kernel));
        let binding = Box::new(LaunchBinding::default());
        let launched = self.ordered(Order::Vmm(VmmRequest::Launch { binding }));
        assert!(matches!(launched, Report::Vmm(VmmReply::Launched(Some(_)))));
        let started = self.ordered(Order::Vmm(VmmRequest::Run));
        assert!(matches!(started, Report::Vmm(VmmReply::Started { .. })));
    }

    fn attach(&mut self) {
        let attached = self.ordered(Order::AttachMover);
        assert!(matches!(
            attached,
            Report::Mover(MoverReply::Attached { .. })
        ));
    }

    fn moved(&mut self, request: MoverRequest) -> MoverReply {
        match self.ordered(Order::Mover(request)) {
            Report::Mover(reply) => reply,
            other => panic!("{other:?}"),
        }
    }

    fn exchange(&mut self, length: u64) -> Vec<u8> {
        match self.ordered(Order::ReadExchange(length)) {
            Report::Bytes(bytes) => bytes,
            other => panic!("{other:?}"),
        }
    }

    fn wrote(&mut self, bytes: Vec<u8>) {
        assert!(matches!(
            self.ordered(Order::WriteExchange(bytes)),
            Report::Done
        ));
    }

    /// What a source is to ask for a move to this host.
    fn send_start(&mut self) -> MoverRequest {
        match self.moved(MoverRequest::PlatformEvidence) {
            MoverReply::Evidence { pdh, platform, amd } => MoverRequest::SendStart {
                target_pdh: pdh,
                platform,
                amd,
            },
            other => panic!("{other:?}"),
        }
    }

    fn bitmap(&mut self, request: MoverRequest) -> Vec<u64> {
        let MoverReply::Bitmap { bits } = self.moved(request) else {
            panic!("no bitmap");
        };
        let bytes = self.exchange(bits.div_ceil(64) * 8);
        let set = |page: u64| bytes[(page / 8) as usize] >> (page % 8) & 1 == 1;
        (0..bits).filter(|page| set(*page)).collect()
    }

    /// What the guest has counted to, as its last whole line says; 0 before the first.
    fn counted(&mut self) -> u32 {
        let counts = self.counts();
        counts.last().copied().unwrap_or(0)
    }

    fn counts(&mut self) -> Vec<u32> {
        let Report::Bytes(bytes) = self.ordered(Order::Console) else {
            panic!("no output");
        };
        let text = String::from_utf8(bytes).unwrap();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().filter_map(decode).collect()
    }

    fn counts_to(&mut self, lines: u32) {
        let begun = Instant::now();
        while self.counted() < lines * 256 {
            assert!(begun.elapsed() < PATIENCE, "{:?}", self.counts());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The guest goes on here behind `last`, without gap or repeat; the line in which it was stopped may be cut.
    fn says_next(&mut self, last: u32) {
        let begun = Instant::now();
        while self.counts().len() < 5 {
            assert!(begun.elapsed() < PATIENCE, "{:?}", self.counts());
            std::thread::sleep(Duration::from_millis(10));
        }
        let counts = self.counts();
        let first = counts[0];
        assert!(
            first == last + 256 || first == last + 512,
            "{last} {counts:?}"
        );
        let steps = counts.windows(2).all(|pair| pair[1] == pair[0] + 256);
        assert!(steps, "{counts:?}");
    }

    fn end(&mut self) {
        assert!(matches!(self.ordered(Order::End), Report::Done));
    }

    fn finish(self) {
        self.double.finish().unwrap_or_else(|e| panic!("{e}"));
    }
}

/// Two hosts of two sites that trust each other.
fn hosts() -> (Host, Host) {
    let mut a = site_a();
    a.peers = vec![root(&SITE_B)];
    let mut b = Config::new(&SITE_B);
    b.peers = vec![root(&SITE_A)];
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let number = NEXT.fetch_add(2, std::sync::atomic::Ordering::Relaxed);
    (Host::start(&a, number), Host::start(&b, number + 1))
}

fn open(source: &mut Host, target: &mut Host) {
    let request = target.send_start();
    let started = source.moved(request);
    let MoverReply::SendStarted {
        policy,
        source_pdh,
        session,
    } = started
    else {
        panic!("{started:?}");
    };
    target.moved(MoverRequest::ReceiveStart {
        policy,
        source_pdh,
        session,
    });
}

fn copy(source: &mut Host, target: &mut Host, pages: &[u64]) {
    for batch in pages.chunks(EXCHANGE_PAGES) {
        let pages = batch.to_vec();
        source.moved(MoverRequest::SendPages {
            pages: pages.clone(),
        });
        let packets = source.exchange((batch.len() * PACKET_STRIDE) as u64);
        target.wrote(packets);
        target.moved(MoverRequest::ReceivePages { pages });
    }
}

fn hand_over(source: &mut Host, target: &mut Host) {
    let MoverReply::State { length } = source.moved(MoverRequest::SaveState) else {
        panic!("no state");
    };
    let state = source.exchange(length);
    target.wrote(state);
    target.moved(MoverRequest::RestoreState { length });
    source.moved(MoverRequest::Release);
    target.moved(MoverRequest::Activate);
    let Report::Vmm(VmmReply::Status(status)) = target.ordered(Order::Vmm(VmmRequest::Status))
    else {
        panic!("no status");
    };
    assert_eq!(status.state, MachineState::Running);
}

/// Eight nibbles as letters from `a`.
fn decode(line: &str) -> Option<u32> {
    (line.len() == 8).then_some(())?;
    line.bytes().try_fold(0u32, |value, byte| {
        Some((value << 4) | u32::from(byte.checked_sub(b'a').filter(|n| *n < 16)?))
    })
}

fn plan() -> MachinePlan {
    MachinePlan {
        name: "moving".into(),
        vm_id: [7; 16],
        vcpus: 1,
        cpu: Default::default(),
        memory_bytes: PAGES * 4096,
        firmware: None,
        cmdline: String::new(),
        technology: Technology::Sev {
            emulated: false,
            policy: SEV,
        },
        disks: vec![],
        nets: vec![],
        vsock_cid: None,
        small: Default::default(),
        hotplug: Default::default(),
    }
}

const PAGES: u64 = 16_384;
/// Pages that the guest writes in turn.
const WINDOW: usize = 256;
const PATIENCE: Duration = Duration::from_secs(60);
