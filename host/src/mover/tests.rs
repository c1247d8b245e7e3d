//! Both ends of a move in one process: two movers, two agents, two VMMs that answer as the real one does.

use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use casemate_crypto_migrate::dev_ca::{DevCa, HostMaterial};
use casemate_crypto_migrate::guest::{
    DestinationGuest, Gpn, GuestOffer, PAGE_SIZE, PageContent, PageRange,
};
use casemate_crypto_migrate::identity::{HostSigner, LocalSigner};
use casemate_crypto_migrate::preamble::Ticket;

use super::agent_link::AgentLink;
use super::destination::DestinationMachine;
use super::protocol::*;
use crate::confidential::control::ProcessorLink;
use crate::confidential::launch::GuestProtection;
use crate::confidential::protocol::PlatformEvidence;
use crate::confidential::shared::{Access, SharedMemory, sealed_memfd};
use crate::confidential::tests::{EMULATED, SITE_A, SITE_B, plan, psp, root};
use crate::confidential::{GuestMemoryView, open};
use crate::ipc::{Channel, IpcError};
use crate::machine::plan::{MachinePlan, Technology};
use crate::role::FilterOnly;
use crate::sandbox::seccomp::ThreadKind;
use crate::vmm::protocol::{EXCHANGE_SIZE, LaunchBinding, MoverReply, MoverRequest, RoleError};

const PAGE: u64 = PAGE_SIZE as u64;
const PAGES: u64 = 600;
const STATE: &[u8] = b"state of the devices and vCPUs";
/// The page the guest goes on writing while it is copied.
const BUSY: u64 = 5;

/// A VMM as the mover sees it.
struct ToyVmm {
    channel: Channel,
    plan: MachinePlan,
    memory: OwnedFd,
    exchange: OwnedFd,
    view: SharedMemory,
    packets: SharedMemory,
    protection: Option<GuestProtection>,
    writes: u64,
    log: Log,
}

type Log = Arc<Mutex<Vec<String>>>;

/// What a test keeps of a VMM.
struct Seen {
    memory: SharedMemory,
    log: Log,
    end: Channel,
}

impl ToyVmm {
    fn start(technology: Technology, processor: Option<&ProcessorLink>, running: bool) -> Seen {
        let (memory, exchange) = (
            sealed_memfd(PAGES * PAGE),
            sealed_memfd(EXCHANGE_SIZE as u64),
        );
        let map = |fd: &OwnedFd, length| {
            SharedMemory::map(fd.as_fd(), length, Access::ReadWrite).unwrap()
        };
        let view = GuestMemoryView {
            file: memory.as_fd(),
            runs: &[(0, PAGES * PAGE)],
        };
        let plan = MachinePlan {
            memory_bytes: PAGES * PAGE,
            ..plan(technology)
        };
        let link = processor.map(|psp| psp.connect(false).unwrap().channel);
        let mut protection = open(&plan, view, exchange.as_fd(), link).unwrap();
        if running {
            fill(&map(&memory, PAGES * PAGE));
            if let Some(protection) = &mut protection {
                protection.launch_start(&LaunchBinding::default()).unwrap();
                protection.launch_update(0, PAGE).unwrap();
                protection.launch_measure().unwrap();
                protection.launch_finish().unwrap();
            }
        }
        let (vmm, end) = Channel::pair().unwrap();
        let log = Log::default();
        let seen = Seen {
            memory: map(&memory, PAGES * PAGE),
            log: log.clone(),
            end,
        };
        let toy = Self {
            view: map(&memory, PAGES * PAGE),
            packets: map(&exchange, EXCHANGE_SIZE as u64),
            channel: vmm,
            plan,
            memory,
            exchange,
            protection,
            writes: 0,
            log,
        };
        std::thread::spawn(move || toy.serve());
        seen
    }

    fn serve(mut self) {
        while let Ok(received) = self.channel.recv::<MoverRequest>(None) {
            let name = format!("{:?}", received.body);
            let name = name.split([' ', '{']).next().unwrap().to_owned();
            self.log.lock().unwrap().push(name);
            if matches!(received.body, MoverRequest::Attach) {
                let reply: Result<_, RoleError> = Ok(MoverReply::Attached {
                    fault_bases: Vec::new(),
                    plan: Box::new(self.plan.clone()),
                    memory: vec![(0, PAGES * PAGE)],
                });
                let handles = [self.memory.as_fd(), self.exchange.as_fd()];
                self.channel.send_with(&reply, &handles).unwrap();
            } else {
                let reply = self.answer(received.body);
                self.channel.send(&reply).unwrap();
            }
        }
        self.log.lock().unwrap().push("gone".into());
    }

    fn answer(&mut self, request: MoverRequest) -> Result<MoverReply, RoleError> {
        let gpas = |pages: Vec<u64>| pages.iter().map(|page| page * PAGE).collect::<Vec<_>>();
        match request {
            MoverRequest::StartTracking => {
                let bytes = contents(&self.view);
                let pages = bytes
                    .chunks(PAGE_SIZE)
                    .map(|page| page.iter().any(|b| *b != 0));
                return Ok(self.bitmap(pages.collect()));
            }
            MoverRequest::TakeDirty => {
                self.writes += 1;
                let busy = self.writes < 3;
                if busy {
                    self.view
                        .write(BUSY * PAGE, &[self.writes as u8; 64])
                        .unwrap();
                }
                return Ok(self.bitmap((0..PAGES).map(|page| busy && page == BUSY).collect()));
            }
            MoverRequest::SaveState => {
                if let Some(protection) = &mut self.protection {
                    protection.send_finish()?;
                }
                self.packets.write(0, STATE).unwrap();
                return Ok(MoverReply::State {
                    length: STATE.len() as u64,
                });
            }
            MoverRequest::RestoreState { length } => {
                if let Some(protection) = &mut self.protection {
                    protection.receive_finish()?;
                }
                let mut state = vec![0; length as usize];
                self.packets.read(0, &mut state).unwrap();
                assert_eq!(state, STATE);
            }
            MoverRequest::Resume => {
                if let Some(protection) = &mut self.protection {
                    // Nothing to cancel where the move failed before SEND_START.
                    let _ = protection.send_cancel();
                }
            }
            MoverRequest::SendStart {
                target_pdh,
                platform,
                amd,
            } => {
                let protection = self.protection.as_mut().unwrap();
                let (policy, source_pdh, session) = protection.send_start(&PlatformEvidence {
                    pdh: target_pdh,
                    platform,
                    amd,
                })?;
                return Ok(MoverReply::SendStarted {
                    policy,
                    source_pdh,
                    session,
                });
            }
            MoverRequest::PlatformEvidence => {
                let PlatformEvidence { pdh, platform, amd } =
                    self.protection.as_mut().unwrap().evidence()?;
                return Ok(MoverReply::Evidence { pdh, platform, amd });
            }
            MoverRequest::ReceiveStart {
                policy,
                source_pdh,
                session,
            } => {
                let protection = self.protection.as_mut().unwrap();
                protection.receive_start(policy, &source_pdh, &session)?;
            }
            MoverRequest::SendPages { pages } => {
                self.protection.as_mut().unwrap().send_pages(&gpas(pages))?;
            }
            MoverRequest::ReceivePages { pages } => {
                let protection = self.protection.as_mut().unwrap();
                protection.receive_pages(&gpas(pages))?;
            }
            _ => {}
        }
        Ok(MoverReply::Done)
    }

    fn bitmap(&self, pages: Vec<bool>) -> MoverReply {
        let mut bytes = vec![0u8; pages.len().div_ceil(64) * 8];
        for (page, _) in pages.iter().enumerate().filter(|(_, set)| **set) {
            bytes[page / 8] |= 1 << (page % 8);
        }
        self.packets.write(0, &bytes).unwrap();
        MoverReply::Bitmap {
            bits: pages.len() as u64,
        }
    }
}

/// Every third page stays zero.
fn fill(memory: &SharedMemory) {
    for page in (0..PAGES).filter(|page| page % 3 != 2) {
        let bytes: Vec<u8> = (0..PAGE).map(|i| (i * 7 + page * 13) as u8 | 1).collect();
        memory.write(page * PAGE, &bytes).unwrap();
    }
}

fn contents(memory: &SharedMemory) -> Vec<u8> {
    let mut bytes = vec![0; (PAGES * PAGE) as usize];
    memory.read(0, &mut bytes).unwrap();
    bytes
}

/// An agent: signs, records, decides; hands every event out.
struct ToyAgent {
    channel: Channel,
    signer: LocalSigner,
    /// The VMM of an admitted guest, or why it is refused; `None` never answers.
    admission: Option<Result<Channel, Refused>>,
    events: Sender<MoverEvent>,
    steps: Arc<Mutex<Vec<OwnershipStep>>>,
}

struct Refused;

/// What a test keeps of an agent and its mover.
struct Side {
    channel: Arc<Channel>,
    events: Receiver<MoverEvent>,
    steps: Arc<Mutex<Vec<OwnershipStep>>>,
    mover: JoinHandle<Result<(), RoleError>>,
}

impl Side {
    fn start(
        host: &HostMaterial,
        command: &MoverCommand,
        handles: &[OwnedFd],
        admission: Option<Result<Channel, Refused>>,
    ) -> Self {
        let (agent, role) = Channel::pair().unwrap();
        let mover =
            std::thread::spawn(move || super::run(role, Box::new(FilterOnly(ThreadKind::Mover))));
        let borrowed: Vec<_> = handles.iter().map(AsFd::as_fd).collect();
        agent.send_with(command, &borrowed).unwrap();
        let (events, received) = channel();
        let steps = Arc::default();
        let toy = ToyAgent {
            channel: Channel::from_fd(agent.as_fd().try_clone_to_owned().unwrap()),
            signer: LocalSigner::from_pem(&host.key_pem).unwrap(),
            admission,
            events,
            steps: Arc::clone(&steps),
        };
        std::thread::spawn(move || toy.serve());
        Self {
            channel: Arc::new(agent),
            events: received,
            steps,
            mover,
        }
    }

    /// All events up to the outcome.
    fn finish(self) -> (Vec<MoverEvent>, MoveOutcome, Vec<OwnershipStep>) {
        let mut events = Vec::new();
        loop {
            match self.events.recv_timeout(Duration::from_secs(40)).unwrap() {
                MoverEvent::Outcome(outcome) => {
                    self.mover.join().unwrap().unwrap();
                    let steps = self.steps.lock().unwrap().clone();
                    return (events, outcome, steps);
                }
                event => events.push(event),
            }
        }
    }
}

impl ToyAgent {
    fn serve(mut self) {
        loop {
            let message = match self.channel.recv::<MoverMessage>(None) {
                Ok(received) => received.body,
                Err(IpcError::Closed) => return,
                Err(error) => panic!("{error}"),
            };
            match message {
                MoverMessage::Event(event) => drop(self.events.send(event)),
                MoverMessage::Request(request) => self.answer(request),
                other => panic!("{other:?}"),
            }
        }
    }

    fn answer(&mut self, request: MoverRequestToAgent) {
        let mut handle = None;
        let answer = match request {
            MoverRequestToAgent::Sign { message } => {
                assert!(may_sign(&message));
                AgentAnswer::Signed {
                    signature: self.signer.sign(&message).unwrap(),
                }
            }
            MoverRequestToAgent::Session(session) => {
                assert_eq!(session.path, "direct");
                AgentAnswer::Admitted
            }
            MoverRequestToAgent::Admit { offer, peer } => {
                assert_eq!(peer.san, ["a.test"]);
                assert_eq!((offer.epoch, &offer.description[..]), (5, &b"shape"[..]));
                match self.admission.take() {
                    None => return,
                    Some(Err(Refused)) => AgentAnswer::Refused {
                        code: "POLICY_REFUSED".into(),
                        reason: "not on this site".into(),
                    },
                    Some(Ok(vmm)) => {
                        handle = Some(vmm);
                        AgentAnswer::Admitted
                    }
                }
            }
            MoverRequestToAgent::Record(step) => {
                self.steps.lock().unwrap().push(step);
                AgentAnswer::Recorded
            }
            other => panic!("{other:?}"),
        };
        let handles: Vec<_> = handle.iter().map(AsFd::as_fd).collect();
        self.channel
            .send_with(&MoverCommand::Answer(Ok(answer)), &handles)
            .unwrap();
    }
}

/// Two sites under one authority.
struct Sites {
    ca: DevCa,
    a: HostMaterial,
    b: HostMaterial,
}

impl Sites {
    fn new() -> Self {
        let ca = DevCa::new("test").unwrap();
        let (a, b) = (ca.issue("a.test").unwrap(), ca.issue("b.test").unwrap());
        Self { ca, a, b }
    }

    fn credentials(&self, host: &HostMaterial) -> Credentials {
        Credentials {
            chain_pem: host.certificate_pem.clone(),
            authority_pem: self.ca.certificate_pem().to_owned(),
        }
    }

    fn source(&self, emulated_roots: Vec<[u8; 32]>) -> MoverCommand {
        MoverCommand::Source(Box::new(SourceStart {
            credentials: self.credentials(&self.a),
            peer: entry("site-b", &self.b),
            name: "toy".into(),
            vm_id: [7; 16],
            epoch: 5,
            description: b"shape".to_vec(),
            emulated_roots,
            disks: Vec::new(),
            provider: None,
            limits: MoveLimits::default(),
        }))
    }

    fn destination(&self) -> MoverCommand {
        MoverCommand::Destination(Box::new(DestinationStart {
            credentials: self.credentials(&self.b),
            peers: vec![entry("site-a", &self.a)],
            ticket: Ticket([9; 16]),
            provider: None,
            limits: MoveLimits::default(),
        }))
    }

    /// Starts a move from `source` to whatever the destination's agent admits.
    fn begin(
        &self,
        source: &Seen,
        emulated_roots: Vec<[u8; 32]>,
        admission: Option<Result<Channel, Refused>>,
    ) -> (Side, Side) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (far, _) = listener.accept().unwrap();
        let vmm = source.end.as_fd().try_clone_to_owned().unwrap();
        let handles = [vmm, near.into()];
        let away = Side::start(&self.a, &self.source(emulated_roots), &handles, None);
        let incoming = Side::start(&self.b, &self.destination(), &[far.into()], admission);
        (away, incoming)
    }
}

fn entry(name: &str, host: &HostMaterial) -> PeerEntry {
    let pinned = host.pinned().unwrap();
    PeerEntry {
        name: name.into(),
        identity: PinnedName {
            san: pinned.san,
            spki_sha256: pinned.spki_sha256,
        },
        gateway: None,
    }
}

fn moved(outcome: MoveOutcome) -> MoveReport {
    match outcome {
        MoveOutcome::Moved(report) => report,
        failed => panic!("{failed:?}"),
    }
}

fn failed(outcome: MoveOutcome) -> (String, String, GuestHere) {
    match outcome {
        MoveOutcome::Failed {
            code,
            reason,
            guest,
        } => (code, reason, guest),
        moved => panic!("{moved:?}"),
    }
}

fn admitted(vmm: &Seen) -> Option<Result<Channel, Refused>> {
    let end = vmm.end.as_fd().try_clone_to_owned().unwrap();
    Some(Ok(Channel::from_fd(end)))
}

fn log(seen: &Seen) -> Vec<String> {
    let mut log = seen.log.lock().unwrap().clone();
    log.dedup();
    log
}

#[test]
fn a_plain_guest_moves_whole_and_each_side_records_before_it_acts() {
    let sites = Sites::new();
    let here = ToyVmm::start(Technology::None, None, true);
    let there = ToyVmm::start(Technology::None, None, false);
    let (away, incoming) = sites.begin(&here, vec![], admitted(&there));
    let (events, outcome, steps) = away.finish();
    let report = moved(outcome);
    let (_, arrived, taken) = incoming.finish();

    assert!(contents(&here.memory) == contents(&there.memory));
    assert_eq!(steps, [OwnershipStep::Releasing, OwnershipStep::Departed]);
    assert_eq!(taken, [OwnershipStep::Activating { epoch: 6 }]);
    let source = log(&here);
    let order = [
        "Attach",
        "StartTracking",
        "TakeDirty",
        "Pause",
        "TakeDirty",
        "SaveState",
        "Release",
    ];
    assert!(source.starts_with(&order.map(str::to_owned)), "{source:?}");
    let order = ["Attach", "RestoreState", "Activate"];
    assert!(log(&there).starts_with(&order.map(str::to_owned)));
    assert!(
        report.rounds >= 2 && report.pages > PAGES * 2 / 3,
        "{report:?}"
    );
    assert_eq!((report.firmware_pages, report.epoch), (0, 6));
    assert_eq!(report.manifest_root, moved(arrived).manifest_root);
    assert_eq!(events[0], MoverEvent::Ready);
    let phases: Vec<_> = events
        .iter()
        .filter_map(|event| match event {
            MoverEvent::Progress(progress) => Some(progress.phase.as_str()),
            _ => None,
        })
        .collect();
    assert_eq!(phases.first(), Some(&"connect"));
    assert_eq!(phases.last(), Some(&"done"));
}

#[test]
fn a_sev_guest_moves_through_both_secure_processors() {
    let sites = Sites::new();
    let (a, b) = (psp(&SITE_A, &[root(&SITE_B)]), psp(&SITE_B, &[]));
    let here = ToyVmm::start(EMULATED, Some(&a), true);
    let there = ToyVmm::start(EMULATED, Some(&b), false);
    let (away, incoming) = sites.begin(&here, vec![root(&SITE_B)], admitted(&there));
    let (events, outcome, _) = away.finish();
    let report = moved(outcome);
    moved(incoming.finish().1);
    assert!(contents(&here.memory) == contents(&there.memory));
    assert_eq!(report.firmware_pages, report.pages);
    assert_eq!(report.zero_pages, 0);
    assert!(
        events
            .iter()
            .any(|event| matches!(event, MoverEvent::TargetVerified { emulated: true, .. }))
    );
}

#[test]
fn a_platform_that_policy_does_not_name_gets_nothing_and_the_guest_runs_on() {
    let sites = Sites::new();
    let (a, b) = (psp(&SITE_A, &[root(&SITE_B)]), psp(&SITE_B, &[]));
    let here = ToyVmm::start(EMULATED, Some(&a), true);
    for _ in 0..2 {
        let there = ToyVmm::start(EMULATED, Some(&b), false);
        let (away, incoming) = sites.begin(&here, vec![root(&SITE_A)], admitted(&there));
        let (code, reason, guest) = failed(away.finish().1);
        assert_eq!((&code[..], guest), ("GUEST_FAILED", GuestHere::Runs));
        assert!(reason.contains("TARGET_UNTRUSTED"), "{reason}");
        assert_eq!(failed(incoming.finish().1).2, GuestHere::Absent);
        assert!(!log(&here).contains(&"SendStart".to_owned()));
        assert_eq!(log(&here).last().unwrap(), "Resume");
    }
    // The same guest, a policy that names the target: it goes.
    let there = ToyVmm::start(EMULATED, Some(&b), false);
    let (away, incoming) = sites.begin(&here, vec![root(&SITE_B)], admitted(&there));
    moved(away.finish().1);
    moved(incoming.finish().1);
    assert!(contents(&here.memory) == contents(&there.memory));
}

#[test]
fn a_refusal_of_the_destinations_agent_reaches_the_source_by_its_code() {
    let sites = Sites::new();
    let here = ToyVmm::start(Technology::None, None, true);
    let (away, incoming) = sites.begin(&here, vec![], Some(Err(Refused)));
    let (code, reason, guest) = failed(away.finish().1);
    assert_eq!((&code[..], guest), ("POLICY_REFUSED", GuestHere::Runs));
    assert!(reason.contains("not on this site"), "{reason}");
    assert_eq!(failed(incoming.finish().1).0, "POLICY_REFUSED");
    assert_eq!(log(&here), ["Attach", "Resume"]);
}

#[test]
fn a_machine_of_another_shape_than_the_offer_is_refused() {
    let sites = Sites::new();
    let here = ToyVmm::start(Technology::None, None, true);
    let (a, b) = (psp(&SITE_A, &[]), psp(&SITE_B, &[]));
    let there = ToyVmm::start(EMULATED, Some(&b), false);
    drop(a);
    // A plain guest into a SEV machine: the blob of the wrong kind, and nothing is written.
    let (away, incoming) = sites.begin(&here, vec![], admitted(&there));
    assert_eq!(failed(away.finish().1).2, GuestHere::Runs);
    failed(incoming.finish().1);
    assert!(contents(&there.memory).iter().all(|byte| *byte == 0));
}

#[test]
fn a_cancel_is_heard_while_the_peer_is_waited_for() {
    let sites = Sites::new();
    let here = ToyVmm::start(Technology::None, None, true);
    // The destination's agent never decides.
    let (away, incoming) = sites.begin(&here, vec![], None);
    std::thread::sleep(Duration::from_millis(400));
    let begun = Instant::now();
    away.channel.send(&MoverCommand::Cancel).unwrap();
    let (code, _, guest) = failed(away.finish().1);
    assert_eq!((&code[..], guest), ("CANCELLED", GuestHere::Runs));
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert_eq!(log(&here).last().unwrap(), "Resume");
    drop(incoming);
}

#[test]
fn a_mover_whose_agent_has_ended_lets_the_guest_run_on() {
    let (agent, role) = Channel::pair().unwrap();
    let link = AgentLink::new(role, Box::new(FilterOnly(ThreadKind::Mover)));
    link.poll();
    let flag = link.cancel_flag();
    assert!(!flag.load(std::sync::atomic::Ordering::Relaxed));
    drop(agent);
    link.poll();
    assert!(flag.load(std::sync::atomic::Ordering::Relaxed));
}

#[test]
fn a_provider_that_the_program_lacks_moves_nothing() {
    let sites = Sites::new();
    let MoverCommand::Destination(mut start) = sites.destination() else {
        panic!("not a destination");
    };
    start.provider = Some("openssl".into());
    let (_near, far) = UnixStream::pair().unwrap();
    let command = MoverCommand::Destination(start);
    let side = Side::start(&sites.b, &command, &[far.into()], None);
    let (code, reason, guest) = failed(side.finish().1);
    assert_eq!(
        (code.as_str(), guest),
        ("PROVIDER_UNAVAILABLE", GuestHere::Absent)
    );
    assert!(reason.contains("openssl") && reason.contains("ring"));
}

#[test]
fn a_deadline_that_is_over_cancels() {
    let (_agent, role) = Channel::pair().unwrap();
    let link = AgentLink::new(role, Box::new(FilterOnly(ThreadKind::Mover)));
    link.set_deadline(Instant::now());
    link.poll();
    assert!(
        link.cancel_flag()
            .load(std::sync::atomic::Ordering::Relaxed)
    );
}

#[test]
fn questions_about_the_cell_are_answered_before_the_start() {
    let (agent, role) = Channel::pair().unwrap();
    let mover =
        std::thread::spawn(move || super::run(role, Box::new(FilterOnly(ThreadKind::Mover))));
    let next = || {
        let message = agent.recv::<MoverMessage>(Some(Duration::from_secs(5)));
        message.unwrap().body
    };
    assert!(matches!(next(), MoverMessage::Event(MoverEvent::Ready)));
    agent.send(&MoverCommand::SandboxProbe).unwrap();
    assert!(matches!(next(), MoverMessage::SandboxProbe(Err(error)) if error.code == "TEST"));
    agent.send(&MoverCommand::SandboxReport).unwrap();
    assert!(matches!(next(), MoverMessage::SandboxReport(Err(_))));
    agent.send(&MoverCommand::Cancel).unwrap();
    assert_eq!(mover.join().unwrap().unwrap_err().code, "CANCELLED");
}

/// A destination machine of its own, with an agent that admits.
fn destination(sites: &Sites, vmm: &Seen) -> DestinationMachine {
    let (agent, role) = Channel::pair().unwrap();
    let end = vmm.end.as_fd().try_clone_to_owned().unwrap();
    std::thread::spawn(move || {
        agent.recv::<MoverMessage>(None).unwrap();
        let answer = MoverCommand::Answer(Ok(AgentAnswer::Admitted));
        agent.send_with(&answer, &[end.as_fd()]).unwrap();
        // Stays until the other end is gone: a closed agent is a cancel.
        let _ = agent.recv::<MoverMessage>(None);
    });
    let link = Arc::new(AgentLink::new(
        role,
        Box::new(FilterOnly(ThreadKind::Mover)),
    ));
    let mut machine = DestinationMachine::new(link);
    let peer = sites.a.identity().unwrap();
    let offer = GuestOffer {
        vm_id: [7; 16],
        name: "toy".into(),
        epoch: 5,
        memory: vec![PageRange {
            start: Gpn(0),
            count: PAGES,
        }],
        description: vec![],
    };
    machine.admit(&offer, peer.as_peer()).unwrap();
    machine
}

#[test]
fn pages_go_only_where_and_how_they_may() {
    let sites = Sites::new();
    let plain = ToyVmm::start(Technology::None, None, false);
    let mut machine = destination(&sites, &plain);
    let page = [7u8; PAGE_SIZE];
    let packet = PageContent::Firmware {
        header: &[0; 52],
        ciphertext: &page,
    };
    assert!(machine.write_pages(Gpn(1), packet).is_err());
    assert!(
        machine
            .write_pages(Gpn(PAGES), PageContent::Data(&page))
            .is_err()
    );
    assert!(
        machine
            .write_pages(Gpn(u64::MAX), PageContent::Zero)
            .is_err()
    );
    assert!(
        machine
            .write_pages(Gpn(1), PageContent::Data(&page[1..]))
            .is_err()
    );
    assert!(contents(&plain.memory).iter().all(|byte| *byte == 0));
    machine
        .write_pages(Gpn(1), PageContent::Data(&page))
        .unwrap();
    let at = PAGE_SIZE;
    assert_eq!(contents(&plain.memory)[at..at + PAGE_SIZE], page);
    machine.write_pages(Gpn(1), PageContent::Zero).unwrap();
    assert!(contents(&plain.memory).iter().all(|byte| *byte == 0));

    let b = psp(&SITE_B, &[]);
    let sealed = ToyVmm::start(EMULATED, Some(&b), false);
    let mut machine = destination(&sites, &sealed);
    assert!(
        machine
            .write_pages(Gpn(1), PageContent::Data(&page))
            .is_err()
    );
    assert!(machine.write_pages(Gpn(1), PageContent::Zero).is_err());
    assert!(machine.begin(b"rubbish").is_err());
    machine.write_pages(Gpn(1), packet).unwrap();
    assert!(machine.flush().is_err(), "no receive context");
}
