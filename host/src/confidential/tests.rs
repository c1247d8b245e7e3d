//! The psp role in a thread, driven as agent and VMMs drive it.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::LazyLock;
use std::time::Duration;

use casemate_attest::legacy::{
    ApiVersion, GuestPolicy, LegacyChain, MeasureBlob, OwnerSession as Owner, TrustAnchors,
};
use casemate_attest::measure::LaunchDigest;
use casemate_attest::processor::Identity;
use casemate_crypto_migrate::guest::PAGE_SIZE;

use super::control::ProcessorLink;
use super::launch::GuestProtection;
use super::processor_role;
use super::protocol::{GuestOutcome, GuestRequest, LAUNCH_CHUNK, PlatformOrder};
use super::shared::{Access, MemoryRun, SharedMemory, sealed_memfd};
use super::{GuestMemoryView, open};
use crate::ipc::{Channel, IpcError};
use crate::machine::plan::{MachinePlan, Technology};
use crate::role::FilterOnly;
use crate::sandbox::seccomp::ThreadKind;
use crate::vmm::protocol::{EXCHANGE_SIZE, LaunchBinding, OwnerSession, PACKET_STRIDE, RoleError};

const PAGE: u64 = PAGE_SIZE as u64;
const PAGES: u64 = 64;
const POLICY: u32 = 1;

/// Identities, made once: RSA keys take a while.
pub(crate) static SITE_A: LazyLock<Vec<u8>> =
    LazyLock::new(|| Identity::generate().unwrap().to_bytes().to_vec());
pub(crate) static SITE_B: LazyLock<Vec<u8>> =
    LazyLock::new(|| Identity::generate().unwrap().to_bytes().to_vec());

pub(crate) fn root(identity: &[u8]) -> [u8; 32] {
    Identity::from_bytes(identity).unwrap().root_fingerprint()
}

/// A psp in a thread.
pub(crate) fn psp(identity: &[u8], peers: &[[u8; 32]]) -> ProcessorLink {
    let (agent, role) = Channel::pair().unwrap();
    std::thread::spawn(move || processor_role::run(role, Box::new(FilterOnly(ThreadKind::Psp))));
    let link = ProcessorLink::new(agent);
    link.initialise(identity, None, peers).unwrap();
    link
}

pub(crate) fn plan(technology: Technology) -> MachinePlan {
    MachinePlan {
        name: "toy".into(),
        vm_id: [7; 16],
        vcpus: 1,
        cpu: Default::default(),
        memory_bytes: PAGES * PAGE,
        firmware: None,
        cmdline: String::new(),
        technology,
        disks: vec![],
        nets: vec![],
        vsock_cid: None,
        small: Default::default(),
        hotplug: Default::default(),
    }
}

pub(crate) const EMULATED: Technology = Technology::Sev {
    emulated: true,
    policy: POLICY,
};

/// A toy guest: memory, exchange memory, protection.
struct Toy {
    memory: SharedMemory,
    exchange: SharedMemory,
    protection: GuestProtection,
}

impl Toy {
    fn new(psp: &ProcessorLink) -> Self {
        Self::sized(psp, PAGES * PAGE)
    }

    fn sized(psp: &ProcessorLink, length: u64) -> Self {
        let (memory, exchange) = (sealed_memfd(length), sealed_memfd(EXCHANGE_SIZE as u64));
        let view = GuestMemoryView {
            file: memory.as_fd(),
            runs: &[(0, length)],
        };
        let channel = psp.connect(false).unwrap().channel;
        let protection = open(&plan(EMULATED), view, exchange.as_fd(), Some(channel));
        Self {
            memory: map(&memory, length),
            exchange: map(&exchange, EXCHANGE_SIZE as u64),
            protection: protection.unwrap().unwrap(),
        }
    }

    fn fill(&self) -> Vec<u8> {
        let bytes: Vec<u8> = (0..self.memory.len())
            .map(|i| ((i * 31) >> 5) as u8)
            .collect();
        self.memory.write(0, &bytes).unwrap();
        bytes
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.memory.len() as usize];
        self.memory.read(0, &mut bytes).unwrap();
        bytes
    }

    fn launch(&mut self) {
        self.protection
            .launch_start(&LaunchBinding::default())
            .unwrap();
        self.protection.launch_update(0, PAGES * PAGE).unwrap();
        self.protection.launch_measure().unwrap();
        self.protection.launch_finish().unwrap();
    }
}

/// A launch that is bound to its owner's session.
fn bound(session: &OwnerSession) -> LaunchBinding {
    LaunchBinding {
        session: Some(session.clone()),
        ..LaunchBinding::default()
    }
}

fn map(fd: &OwnedFd, length: u64) -> SharedMemory {
    SharedMemory::map(fd.as_fd(), length, Access::ReadWrite).unwrap()
}

fn code<T>(result: Result<T, RoleError>) -> String {
    result.err().expect("it should be refused").code
}

/// An owner's session with a psp of site A.
fn owner(psp: &ProcessorLink) -> (OwnerSession, Owner) {
    let evidence = psp.evidence().unwrap();
    let chain = LegacyChain::parse(&evidence.pdh, &evidence.platform, &evidence.amd).unwrap();
    let trust = TrustAnchors::amd()
        .with_emulated_root(root(&SITE_A))
        .unwrap();
    let verified = chain.verify(&trust).unwrap();
    let policy = GuestPolicy::try_from(POLICY).unwrap();
    let (public, owner) = Owner::create(&verified, policy).unwrap();
    let session = OwnerSession {
        certificate: public.dh_cert.as_bytes().to_vec(),
        blob: public.session.to_bytes(),
    };
    (session, owner)
}

#[test]
fn a_run_longer_than_one_message_is_measured_whole_and_in_order() {
    let psp = psp(&SITE_A, &[]);
    let (session, owner) = owner(&psp);
    let mut toy = Toy::sized(&psp, 2 * LAUNCH_CHUNK + PAGE);
    let loaded = toy.fill();
    toy.protection.launch_start(&bound(&session)).unwrap();
    let length = toy.memory.len();
    toy.protection.launch_update(0, length).unwrap();
    let measured = toy.protection.launch_measure().unwrap().unwrap();
    let blob = MeasureBlob::from_bytes(&measured.blob).unwrap();
    let api = ApiVersion::new(measured.api.0, measured.api.1);
    assert!(owner.measure_fits(&LaunchDigest::of(&loaded), api, measured.api.2, &blob));
}

#[test]
fn a_launch_measures_what_was_loaded_and_takes_only_its_owners_secret() {
    let psp = psp(&SITE_A, &[]);
    let (session, owner) = owner(&psp);
    let mut toy = Toy::new(&psp);
    let loaded = toy.fill();
    toy.protection.launch_start(&bound(&session)).unwrap();
    toy.protection.launch_update(2 * PAGE, 5 * PAGE).unwrap();
    toy.protection.launch_update(0, PAGE).unwrap();
    let measured = toy.protection.launch_measure().unwrap().unwrap();

    let (a, b) = ((2 * PAGE) as usize, (7 * PAGE) as usize);
    let digest = LaunchDigest::of(&[&loaded[a..b], &loaded[..PAGE_SIZE]].concat());
    let blob = MeasureBlob::from_bytes(&measured.blob).unwrap();
    let api = ApiVersion::new(measured.api.0, measured.api.1);
    assert_eq!(measured.policy, POLICY);
    assert!(owner.measure_fits(&digest, api, measured.api.2, &blob));
    let other = LaunchDigest::of(&loaded);
    assert!(!owner.measure_fits(&other, api, measured.api.2, &blob));

    let secret = [0x5a; 64];
    let packet = owner.seal_secret(&blob, &secret).unwrap();
    let header = packet.header.to_bytes();
    let at = 9 * PAGE;
    toy.protection
        .launch_secret(&header, &packet.ciphertext, at)
        .unwrap();
    toy.protection.launch_finish().unwrap();
    let at = at as usize;
    assert_eq!(toy.bytes()[at..at + 64], secret);
    assert_eq!(toy.bytes()[at + 64..], loaded[at + 64..]);
}

#[test]
fn a_forged_secret_is_refused_and_ends_the_launch() {
    let psp = psp(&SITE_A, &[]);
    let mut toy = Toy::new(&psp);
    let loaded = toy.fill();
    toy.protection
        .launch_start(&LaunchBinding::default())
        .unwrap();
    toy.protection.launch_update(0, PAGE).unwrap();
    toy.protection.launch_measure().unwrap();
    let refused = toy.protection.launch_secret(&[0; 52], &[0; 64], 0);
    assert_eq!(code(refused), "BAD_MEASUREMENT");
    assert_eq!(toy.bytes(), loaded);
    assert_eq!(code(toy.protection.launch_finish()), "LAUNCH_STATE");
}

#[test]
fn a_guest_moves_from_one_platform_to_another() {
    let (a, b) = (psp(&SITE_A, &[root(&SITE_B)]), psp(&SITE_B, &[]));
    let (mut here, mut there) = (Toy::new(&a), Toy::new(&b));
    let memory = here.fill();
    here.launch();

    let target = there.protection.evidence().unwrap();
    let (policy, source, session) = here.protection.send_start(&target).unwrap();
    there
        .protection
        .receive_start(policy, &source, &session)
        .unwrap();
    let gpas: Vec<u64> = (0..PAGES).rev().map(|page| page * PAGE).collect();
    here.protection.send_pages(&gpas).unwrap();
    let mut packets = vec![0; gpas.len() * PACKET_STRIDE];
    here.exchange.read(0, &mut packets).unwrap();
    let last = &memory[memory.len() - PAGE_SIZE..];
    assert!(!packets.windows(64).any(|window| window == &last[..64]));
    there.exchange.write(0, &packets).unwrap();
    there.protection.receive_pages(&gpas).unwrap();
    there.protection.receive_finish().unwrap();
    assert!(there.bytes() == memory, "memory differs");
    here.protection.send_finish().unwrap();
    here.protection.decommission();
    assert_eq!(a.status().unwrap().guests, 0);
    assert_eq!(b.status().unwrap().guests, 1);
}

#[test]
fn a_changed_packet_is_refused_and_the_sender_can_cancel() {
    let (a, b) = (psp(&SITE_A, &[root(&SITE_B)]), psp(&SITE_B, &[]));
    let (mut here, mut there) = (Toy::new(&a), Toy::new(&b));
    here.fill();
    here.launch();
    let target = there.protection.evidence().unwrap();
    let (policy, source, session) = here.protection.send_start(&target).unwrap();
    there
        .protection
        .receive_start(policy, &source, &session)
        .unwrap();
    here.protection.send_pages(&[0]).unwrap();
    let mut packet = vec![0; PACKET_STRIDE];
    here.exchange.read(0, &mut packet).unwrap();
    packet[64 + 100] ^= 1;
    there.exchange.write(0, &packet).unwrap();
    assert_eq!(
        code(there.protection.receive_pages(&[0])),
        "BAD_MEASUREMENT"
    );
    assert!(there.bytes().iter().all(|byte| *byte == 0));
    here.protection.send_finish().unwrap();
    here.protection.send_cancel().unwrap();
    // And once more, as if nothing had been tried.
    let target = there.protection.evidence().unwrap();
    here.protection.send_start(&target).unwrap();
}

#[test]
fn a_target_that_nobody_named_is_refused_by_the_firmware() {
    let (a, b) = (psp(&SITE_A, &[]), psp(&SITE_B, &[]));
    let (mut here, mut there) = (Toy::new(&a), Toy::new(&b));
    here.launch();
    let target = there.protection.evidence().unwrap();
    let refused = here.protection.send_start(&target);
    assert_eq!(code(refused), "INVALID_CERTIFICATE");
}

#[test]
fn a_policy_other_than_the_description_says_is_refused() {
    let psp = psp(&SITE_A, &[]);
    let mut toy = Toy::new(&psp);
    let refused = toy.protection.receive_start(POLICY + 2, &[], &[]);
    assert_eq!(code(refused), "POLICY_FAILURE");
}

#[test]
fn a_closed_end_decommissions_the_guest() {
    let psp = psp(&SITE_A, &[]);
    let mut toy = Toy::new(&psp);
    toy.launch();
    let other = Toy::new(&psp);
    assert_eq!(psp.status().unwrap().guests, 1);
    drop(toy);
    for _ in 0..200 {
        if psp.status().unwrap().guests == 0 {
            drop(other);
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("the guest is still there");
}

/// A VMM that was broken into and speaks for itself.
struct Rogue(Channel);

impl Rogue {
    fn call(&self, request: &GuestRequest) -> String {
        self.0.send(request).unwrap();
        self.reply()
    }

    fn reply(&self) -> String {
        let received = self.0.recv::<GuestOutcome>(Some(Duration::from_secs(5)));
        match received.unwrap().body {
            Ok(_) => "ok".to_owned(),
            Err(error) => error.code,
        }
    }

    fn attach(&self, memory: u64, runs: Vec<MemoryRun>) -> String {
        let (memory, exchange) = (sealed_memfd(memory), sealed_memfd(EXCHANGE_SIZE as u64));
        let request = GuestRequest::Attach { runs };
        self.0
            .send_with(&request, &[memory.as_fd(), exchange.as_fd()])
            .unwrap();
        self.reply()
    }
}

fn whole(length: u64) -> Vec<MemoryRun> {
    vec![MemoryRun {
        gpa: 0,
        length,
        offset: 0,
    }]
}

#[test]
fn a_rogue_vmm_reaches_no_guest_but_its_own_and_no_byte_outside_its_memory() {
    let psp = psp(&SITE_A, &[]);
    let mut toy = Toy::new(&psp);
    toy.launch();
    let rogue = Rogue(psp.connect(false).unwrap().channel);
    // There is a guest, another's; this channel has none, and nothing in a request could name that one.
    for request in [
        GuestRequest::LaunchMeasure,
        GuestRequest::LaunchFinish,
        GuestRequest::SendCancel,
        GuestRequest::SendFinish,
        GuestRequest::ReceiveFinish,
    ] {
        assert_eq!(rogue.call(&request), "INVALID_GUEST", "{request:?}");
    }
    assert_eq!(rogue.call(&GuestRequest::Decommission), "ok");
    assert_eq!(psp.status().unwrap().guests, 1);
    let start = |policy| GuestRequest::LaunchStart {
        policy,
        session: None,
    };
    assert_eq!(rogue.call(&start(0)), "BAD_REQUEST", "no memory yet");
    assert_eq!(rogue.attach(PAGE, whole(2 * PAGE)), "BAD_MEMORY");
    assert_eq!(rogue.attach(PAGE, whole(PAGE)), "ok");
    assert_eq!(rogue.attach(PAGE, whole(PAGE)), "BAD_REQUEST", "twice");
    let snp = GuestRequest::SnpStart { policy: 0x3_0000 };
    assert_eq!(rogue.call(&snp), "SNP_NOT_ENABLED");
    assert_eq!(rogue.call(&start(1 << 8)), "POLICY_FAILURE", "reserved");
    assert_eq!(rogue.call(&start(0)), "ok");
    assert_eq!(rogue.call(&start(0)), "BAD_REQUEST", "a second guest");
    for (gpa, length, expected) in [
        (0, PAGE + 16, "BAD_MEMORY"),
        (u64::MAX - 15, 32, "BAD_MEMORY"),
        (0, u64::MAX, "BAD_REQUEST"),
        (0, 0, "INVALID_LEN"),
        (0, PAGE, "ok"),
    ] {
        let request = GuestRequest::LaunchUpdate { gpa, length };
        assert_eq!(rogue.call(&request), expected, "{gpa:#x} {length:#x}");
    }
    assert_eq!(psp.status().unwrap().guests, 2);
}

#[test]
fn a_message_that_is_none_ends_the_client_and_nobody_else() {
    let psp = psp(&SITE_A, &[]);
    let mut toy = Toy::new(&psp);
    let rogue = Rogue(psp.connect(false).unwrap().channel);
    rogue.0.send(&(200u8, [0xffu8; 20])).unwrap();
    assert_eq!(rogue.reply(), "BAD_REQUEST");
    let end = rogue.0.recv::<GuestOutcome>(Some(Duration::from_secs(5)));
    assert!(matches!(end.unwrap_err(), IpcError::Closed));
    toy.launch();
    assert_eq!(psp.status().unwrap().guests, 1);
}

#[test]
fn a_client_that_reads_no_reply_holds_up_nobody() {
    let psp = psp(&SITE_A, &[]);
    let rogue = psp.connect(false).unwrap().channel;
    let sender = std::thread::spawn(move || {
        // Until the psp gives it up; a channel holds some hundred messages.
        while rogue.send(&GuestRequest::Evidence).is_ok() {}
    });
    let mut toy = Toy::new(&psp);
    toy.launch();
    sender.join().unwrap();
    assert_eq!(psp.status().unwrap().guests, 1);
}

#[test]
fn a_platform_needs_its_identity_first_and_takes_one_only() {
    let (agent, role) = Channel::pair().unwrap();
    std::thread::spawn(move || processor_role::run(role, Box::new(FilterOnly(ThreadKind::Psp))));
    let link = ProcessorLink::new(agent);
    assert_eq!(code(link.connect(false)), "PLATFORM_STATE");
    assert_eq!(code(link.status()), "PLATFORM_STATE");
    assert_eq!(
        code(link.initialise(b"rubbish", None, &[])),
        "PLATFORM_IDENTITY"
    );
    let identity = link.generate().unwrap();
    link.initialise(&identity, None, &[]).unwrap();
    assert_eq!(code(link.initialise(&SITE_A, None, &[])), "PLATFORM_STATE");
    assert!(link.status().unwrap().emulated);
    assert_eq!(code(link.sandbox_report()), "TEST");
}

#[test]
fn a_plain_guest_has_no_protection_and_a_real_one_is_refused_by_name() {
    let (memory, exchange) = (sealed_memfd(PAGE), sealed_memfd(EXCHANGE_SIZE as u64));
    let view = GuestMemoryView {
        file: memory.as_fd(),
        runs: &[(0, PAGE)],
    };
    let none = open(&plan(Technology::None), view, exchange.as_fd(), None).unwrap();
    assert!(none.is_none());
    let without = open(&plan(EMULATED), view, exchange.as_fd(), None);
    assert_eq!(code(without.map(|_| ())), "NO_PROCESSOR");
}

#[test]
fn while_a_guest_lives_its_platform_keeps_owner_and_pek() {
    let psp = psp(&SITE_A, &[]);
    let mut toy = Toy::new(&psp);
    toy.launch();
    let before = psp.evidence().unwrap();
    for order in [
        PlatformOrder::FactoryReset,
        PlatformOrder::PekGen,
        PlatformOrder::PekCsr,
    ] {
        assert_eq!(code(psp.order(&order)), "INVALID_PLATFORM_STATE");
    }
    assert_eq!(psp.evidence().unwrap(), before);
    assert_eq!(psp.status().unwrap().guests, 1);
    psp.order(&PlatformOrder::PdhGen).unwrap();
    let after = psp.evidence().unwrap();
    assert_ne!(after.pdh, before.pdh);
    assert_eq!(after.platform, before.platform);
    toy.protection.decommission();
    psp.order(&PlatformOrder::FactoryReset).unwrap();
    assert_ne!(psp.evidence().unwrap().platform, before.platform);
}
