//! SEV-ES and SEV-SNP guests of the psp role, from description to report.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use casemate_attest::evidence::table;
use casemate_attest::measure::snp::SnpLaunchDigest;
use casemate_attest::measure::{LaunchDigest, guest::GuestDigest};
use casemate_attest::processor::FirmwareError;
use casemate_attest::processor::snp::forge::Authority;
use casemate_attest::processor::snp::request_frame::{
    ReplyFrame, RequestFrame, RequestKind, RequestStatus,
};
use casemate_attest::processor::snp::{GuestChannel, KeySelect};
use casemate_attest::report::Report;
use nix::sys::socket::{MsgFlags, recv, send};

use super::control::ProcessorLink;
use super::launch::{GuestProtection, SpecialPage};
use super::shared::{Access, SharedMemory, sealed_memfd};
use super::tests::{SITE_A, plan};
use super::{GuestMemoryView, open, processor_role};
use crate::ipc::Channel;
use crate::machine::plan::{MachinePlan, Technology};
use crate::role::FilterOnly;
use crate::sandbox::seccomp::ThreadKind;
use crate::vmm::boot::{Component, measured};
use crate::vmm::layout::{SNP_CPUID, SNP_SECRETS};
use crate::vmm::protocol::{EXCHANGE_SIZE, LaunchBinding, RoleError, SnpBinding, SnpId};

const MEMORY: u64 = 32 << 20;
const POLICY: u64 = 0x3_0000;
const HOST_DATA: [u8; 32] = [0x5a; 32];

/// A psp that has a SEV-SNP identity too.
fn psp() -> ProcessorLink {
    let (agent, role) = Channel::pair().unwrap();
    std::thread::spawn(move || processor_role::run(role, Box::new(FilterOnly(ThreadKind::Psp))));
    let link = ProcessorLink::new(agent);
    let snp = Authority::shared().identity_again().to_bytes().unwrap();
    link.initialise(&SITE_A, Some(&snp), &[]).unwrap();
    link
}

struct Guest {
    plan: MachinePlan,
    memory: SharedMemory,
    protection: GuestProtection,
    messages: Option<OwnedFd>,
    pieces: Vec<Component>,
}

impl Guest {
    fn new(psp: &ProcessorLink, technology: Technology) -> Self {
        let plan = MachinePlan {
            vcpus: 3,
            cpu: Default::default(),
            memory_bytes: MEMORY,
            ..plan(technology)
        };
        let (file, exchange) = (sealed_memfd(MEMORY), sealed_memfd(EXCHANGE_SIZE as u64));
        let view = GuestMemoryView {
            file: file.as_fd(),
            runs: &[(0, MEMORY)],
        };
        let link = psp.connect(true).unwrap();
        let protection = open(&plan, view, exchange.as_fd(), Some(link.channel));
        let piece = |gpa: u64, fill: u8, pages: usize| Component {
            name: "piece",
            gpa,
            bytes: vec![fill; pages * 4096],
        };
        Self {
            plan,
            memory: SharedMemory::map(file.as_fd(), MEMORY, Access::ReadWrite).unwrap(),
            protection: protection.unwrap().unwrap(),
            messages: link.messages,
            pieces: vec![piece(0x7000, 1, 1), piece(0x100_0000, 2, 1500)],
        }
    }

    fn snp(psp: &ProcessorLink) -> Self {
        let emulated = true;
        Self::new(
            psp,
            Technology::SevSnp {
                emulated,
                policy: POLICY,
            },
        )
    }

    /// All of a launch but its end.
    fn load(&mut self, binding: &LaunchBinding) {
        self.protection.launch_start(binding).unwrap();
        for piece in &self.pieces {
            self.memory.write(piece.gpa, &piece.bytes).unwrap();
            let length = piece.bytes.len() as u64;
            self.protection.launch_update(piece.gpa, length).unwrap();
        }
        for (gpa, page) in measured::special_pages(self.plan.technology) {
            self.protection.launch_special(*gpa, *page).unwrap();
        }
        let registers = measured::vcpu_states(&self.plan);
        self.protection.launch_vcpus(&registers).unwrap();
    }

    /// The digest that the owner computes from the description.
    fn expected(&self) -> GuestDigest {
        measured::launch_digest(&self.plan, &self.pieces).unwrap()
    }

    fn secrets(&self) -> [u8; 4096] {
        let mut page = [0; 4096];
        self.memory.read(SNP_SECRETS, &mut page).unwrap();
        page
    }

    fn ask(&self, frame: &[u8]) -> ReplyFrame {
        let socket = self.messages.as_ref().unwrap().as_raw_fd();
        send(socket, frame, MsgFlags::empty()).unwrap();
        let mut reply = vec![0; 128 << 10];
        let length = recv(socket, &mut reply, MsgFlags::empty()).unwrap();
        ReplyFrame::parse(&reply[..length]).unwrap()
    }
}

fn binding(id: Option<SnpId>) -> LaunchBinding {
    LaunchBinding {
        session: None,
        snp: SnpBinding {
            host_data: HOST_DATA,
            id,
            vcek_disabled: false,
        },
    }
}

fn launched(psp: &ProcessorLink) -> (Guest, SnpLaunchDigest) {
    let mut guest = Guest::snp(psp);
    guest.load(&binding(None));
    assert_eq!(guest.protection.launch_measure().unwrap(), None);
    let digest = guest.protection.launch_finish().unwrap().unwrap();
    (guest, digest)
}

fn code<T>(result: Result<T, RoleError>) -> String {
    result.err().expect("it should be refused").code
}

#[test]
fn a_sev_es_guests_measurement_covers_memory_and_the_registers_of_every_vcpu() {
    let psp = psp();
    let technology = Technology::SevEs {
        emulated: true,
        policy: 5,
    };
    let digest = |change: fn(&mut Guest)| {
        let mut guest = Guest::new(&psp, technology);
        change(&mut guest);
        guest.load(&LaunchBinding::default());
        let measured = guest.protection.launch_measure().unwrap().unwrap();
        guest.protection.launch_finish().unwrap();
        assert_eq!((measured.blob.len(), measured.policy), (48, 5));
        guest.expected()
    };
    let GuestDigest::Sev(expected) = digest(|_| {}) else {
        panic!("not a digest of SEV");
    };
    let memory_only = {
        let guest = Guest::new(&psp, technology);
        LaunchDigest::of(&[guest.pieces[0].bytes.as_slice(), &guest.pieces[1].bytes].concat())
    };
    assert_ne!(expected, memory_only);
    assert_ne!(
        GuestDigest::Sev(expected),
        digest(|guest| guest.plan.vcpus = 2)
    );
}

#[test]
fn an_snp_guest_has_the_digest_that_its_owner_computes_and_its_report_says_so() {
    let psp = psp();
    let (guest, digest) = launched(&psp);
    assert_eq!(GuestDigest::Snp(digest), guest.expected());

    let mut channel = GuestChannel::new(&guest.secrets(), 0).unwrap();
    let nonce = [0x77; 64];
    let message = channel.report_request(&nonce, 0, KeySelect::Any).unwrap();
    let request = RequestFrame::new(RequestKind::Extended, &message).unwrap();
    let reply = guest.ask(&request.to_bytes());
    assert_eq!(reply.status(), RequestStatus::OK);
    let raw = channel.report(reply.page()).unwrap();
    let report = Report::parse(&raw).unwrap();
    assert_eq!(&report.measurement(), digest.as_bytes());
    assert_eq!(report.report_data(), nonce);
    assert_eq!(report.host_data(), HOST_DATA);

    let kinds: Vec<String> = table::parse(reply.certificates())
        .unwrap()
        .iter()
        .map(|certificate| certificate.kind.to_string())
        .collect();
    assert_eq!(kinds, ["VCEK", "ASK", "ARK"]);
}

#[test]
fn messages_that_are_none_are_refused_and_the_good_one_behind_them_is_answered() {
    let psp = psp();
    let (guest, _) = launched(&psp);
    let mut channel = GuestChannel::new(&guest.secrets(), 0).unwrap();
    let message = channel.report_request(&[0; 64], 0, KeySelect::Any).unwrap();
    let good = RequestFrame::new(RequestKind::Plain, &message)
        .unwrap()
        .to_bytes();
    let mut spoiled = good.clone();
    spoiled[8 + 0x60] ^= 1;
    let refused = guest.ask(&spoiled).status();
    assert_eq!(
        refused,
        RequestStatus::firmware(FirmwareError::BadMeasurement.code())
    );
    for nonsense in [&good[..100], &[0xff; 4104], &[&good[..], &[0]].concat()] {
        assert_ne!(guest.ask(nonsense).status().vmm_error(), 0);
    }
    let reply = guest.ask(&good);
    channel.report(reply.page()).unwrap();
    assert!(reply.certificates().is_empty());
    // The very same once more is a replay.
    assert_ne!(guest.ask(&good).status().firmware_error(), 0);
}

#[test]
fn a_guest_that_is_not_launched_yet_gets_no_report() {
    let psp = psp();
    let mut guest = Guest::snp(&psp);
    guest.load(&binding(None));
    let channel = GuestChannel::new(&guest.secrets(), 0).unwrap();
    let message = channel.report_request(&[0; 64], 0, KeySelect::Any).unwrap();
    let request = RequestFrame::new(RequestKind::Plain, &message).unwrap();
    let refused = guest.ask(&request.to_bytes()).status();
    assert_eq!(
        refused.firmware_error(),
        FirmwareError::InvalidGuestState.code()
    );
}

#[test]
fn an_id_block_for_another_guest_stops_the_launch() {
    use casemate_attest::measure::id_block::{IdAuth, IdBlock, IdSigningKey};
    use casemate_attest::report::SnpPolicy;
    let psp = psp();
    let expected = Guest::snp(&psp).expected();
    let GuestDigest::Snp(right) = expected else {
        panic!("not a digest of SNP");
    };
    let key = IdSigningKey::from_pkcs8(&IdSigningKey::generate().unwrap()).unwrap();
    for (digest, outcome) in [
        (right, None),
        (SnpLaunchDigest::new([1; 48]), Some("BAD_MEASUREMENT")),
    ] {
        let block = IdBlock {
            launch_digest: digest,
            family_id: [1; 16],
            image_id: [2; 16],
            guest_svn: 3,
            policy: SnpPolicy(POLICY),
        };
        let auth = IdAuth::sign(&block, &key, None).unwrap();
        let id = SnpId {
            block: block.to_bytes().to_vec(),
            auth: auth.as_bytes().to_vec(),
            author_key: false,
        };
        let mut guest = Guest::snp(&psp);
        guest.load(&binding(Some(id)));
        guest.protection.launch_measure().unwrap();
        let finished = guest.protection.launch_finish();
        assert_eq!(finished.err().map(|e| e.code).as_deref(), outcome);
    }
}

#[test]
fn an_snp_guest_takes_no_secret_and_does_not_move() {
    let psp = psp();
    let (mut guest, _) = launched(&psp);
    let evidence = guest.protection.evidence().unwrap();
    assert_eq!(code(guest.protection.send_start(&evidence)), "UNSUPPORTED");
    let mut other = Guest::snp(&psp);
    assert_eq!(
        code(other.protection.receive_start(1, &[], &[])),
        "UNSUPPORTED"
    );
    let mut waiting = Guest::snp(&psp);
    waiting.load(&binding(None));
    waiting.protection.launch_measure().unwrap();
    let secret = waiting.protection.launch_secret(&[0; 52], &[0; 16], 0x7000);
    assert_eq!(code(secret), "UNSUPPORTED");
}

#[test]
fn a_psp_without_an_snp_identity_says_how_to_get_one() {
    let psp = super::tests::psp(&SITE_A, &[]);
    let mut guest = Guest::snp(&psp);
    let error = guest.protection.launch_start(&binding(None)).unwrap_err();
    assert_eq!(error.code, "SNP_NOT_ENABLED");
    assert!(error.text.contains("sev-snp"), "{error}");
}

#[test]
fn a_cpuid_page_with_forbidden_features_reaches_the_guest_corrected() {
    let psp = psp();
    let mut guest = Guest::snp(&psp);
    guest.protection.launch_start(&binding(None)).unwrap();
    guest.protection.launch_update(0x7000, 4096).unwrap();
    let leaf = kvm_bindings::kvm_cpuid_entry2 {
        function: 1,
        eax: 0xa0_0f11,
        ecx: 1 << 24 | 1 << 31,
        ..Default::default()
    };
    let page = measured::cpuid_page(&[leaf]);
    guest.memory.write(SNP_CPUID, &page).unwrap();
    let special = guest
        .protection
        .launch_special(SNP_CPUID, SpecialPage::Cpuid);
    special.unwrap();
    let mut taken = vec![0; 4096];
    guest.memory.read(SNP_CPUID, &mut taken).unwrap();
    let ecx = u32::from_le_bytes(taken[16 + 32..][..4].try_into().unwrap());
    assert_eq!(ecx, 1 << 31, "the TSC deadline timer is taken out");
}
