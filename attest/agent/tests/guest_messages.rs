//! An emulated guest's own channel, against the real software secure processor: `/dev/mem` and
//! `/proc/cmdline` are files, the host is a Unix socket, and it may do to each exchange what a
//! host can.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that cannot go on ends"
)]

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use casemate_agent::source::{
    GuestMessages, GuestReport, MessagesError, Places, ReportSource, SourceError,
};
use casemate_attest::broker::evidence::CertificateKind;
use casemate_attest::measure::snp::PageType;
use casemate_attest::processor::snp::forge::{Authority, tcb};
use casemate_attest::processor::snp::request_frame::{
    FrameError, ReplyFrame, RequestFrame, RequestKind, RequestStatus,
};
use casemate_attest::processor::snp::{
    FirmwareLevel, GuestChannel, KeySelect, LaunchPage, MessageError, Personality, SnpGuestHandle,
    SnpLaunchFinish, SnpLaunchStart, SnpProcessor,
};
use casemate_attest::product::Product;
use casemate_attest::report::{Report, SnpPolicy};
use casemate_attest::verify::{Expectation, Nonce, OwnerPolicy, SnpEvidence, verify_snp};

const PRODUCT: Product = Product::Genoa;
const SECRETS_GPA: u64 = 0xff_e000;

/// What the host does to one exchange.
#[derive(Clone, Copy, PartialEq)]
enum Host {
    Serves,
    /// Hangs up before the firmware has the request.
    LosesRequest,
    /// Hangs up when the firmware has answered.
    LosesReply,
    /// Changes the byte at this offset of the reply's page.
    Changes(usize),
    /// Refuses without asking the firmware.
    Says(RequestStatus),
    /// Answers without asking the firmware.
    Forges,
    /// Sends this in the place of a certificate table.
    Certificates(&'static [u8]),
}

struct Machine {
    folder: tempfile::TempDir,
    plan: Arc<Mutex<VecDeque<Host>>>,
    seen: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Machine {
    /// A launched guest and its host, which does this to the first exchanges and then serves.
    fn new(plan: &[Host]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let line = format!("console=ttyS0 casemate.snp={SECRETS_GPA:#x},0xffd000\n");
        fs::write(folder.path().join("cmdline"), line).unwrap();
        let machine = Self {
            folder,
            plan: Arc::new(Mutex::new(plan.iter().copied().collect())),
            seen: Arc::default(),
        };
        machine.launch();
        machine
    }

    /// (Re)launches: a new secrets page, a new host.
    fn launch(&self) {
        let (mut processor, handle, secrets) = launched();
        let memory = File::create(self.path("mem")).unwrap();
        memory.write_all_at(&secrets, SECRETS_GPA).unwrap();
        let _ = fs::remove_file(self.path("host"));
        let listener = UnixListener::bind(self.path("host")).unwrap();
        let (plan, seen) = (Arc::clone(&self.plan), Arc::clone(&self.seen));
        std::thread::spawn(move || {
            for mut stream in listener.incoming().map_while(Result::ok) {
                while let Ok(request) = RequestFrame::read_from(&mut stream) {
                    assert_eq!(request.kind(), RequestKind::Extended);
                    seen.lock().unwrap().push(request.page().to_vec());
                    let host = plan.lock().unwrap().pop_front().unwrap_or(Host::Serves);
                    let Some(reply) = serve(&mut processor, handle, &request, host) else {
                        break;
                    };
                    let _gone = reply.write_to(&mut stream);
                }
            }
        });
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn report(&self, nonce: u8) -> Result<GuestReport, MessagesError> {
        report(self.folder.path(), nonce, None).map_err(|error| match error {
            SourceError::Messages(error) => error,
            other => panic!("{other}"),
        })
    }

    /// A good report, marked as what it is.
    #[track_caller]
    fn reports(&self, nonce: u8) {
        let given = self.report(nonce).unwrap();
        let report = Report::parse(&given.report).unwrap();
        assert_eq!(report.report_data(), [nonce; 64]);
        assert!(given.emulated);
    }

    fn count(&self) -> u32 {
        let mut count = [0; 4];
        let memory = File::open(self.path("mem")).unwrap();
        memory
            .read_exact_at(&mut count, SECRETS_GPA + 0xa0)
            .unwrap();
        u32::from_le_bytes(count)
    }

    fn journal(&self) -> Vec<u8> {
        fs::read(self.path("run/journal")).unwrap()
    }

    /// How often each sequence number came, after checking that none came with two messages.
    #[track_caller]
    fn sequence_numbers(&self) -> Vec<(u64, usize)> {
        let mut numbers: BTreeMap<u64, Vec<Vec<u8>>> = BTreeMap::new();
        for page in self.seen.lock().unwrap().iter() {
            let number = u64::from_le_bytes(page[0x20..0x28].try_into().unwrap());
            numbers.entry(number).or_default().push(page.clone());
        }
        for (number, pages) in &numbers {
            let same = pages.iter().all(|page| page == &pages[0]);
            assert!(same, "sequence number {number} was used for two messages");
        }
        numbers.iter().map(|(n, pages)| (*n, pages.len())).collect()
    }
}

fn report(folder: &Path, nonce: u8, vmpl: Option<u8>) -> Result<GuestReport, SourceError> {
    let host = folder.join("host");
    let places = Places {
        command_line: folder.join("cmdline"),
        memory: folder.join("mem"),
        journal: folder.join("run/journal"),
        host: Box::new(move || Ok(Box::new(UnixStream::connect(&host)?))),
        patience: Duration::from_secs(20),
    };
    GuestMessages::at(places, vmpl).report(&[nonce; 64])
}

fn serve(
    processor: &mut SnpProcessor,
    handle: SnpGuestHandle,
    request: &RequestFrame,
    host: Host,
) -> Option<ReplyFrame> {
    match host {
        Host::LosesRequest => return None,
        Host::Says(status) => return Some(ReplyFrame::refused(status)),
        Host::Forges => return Some(ReplyFrame::answered(&[7; 4096], vec![]).unwrap()),
        _ => {}
    }
    let mut answer = match processor.guest_request(handle, request.page()) {
        Ok(answer) => answer,
        Err(error) => {
            let status = RequestStatus::firmware(error.code());
            return Some(ReplyFrame::refused(status));
        }
    };
    let table = match host {
        Host::LosesReply => return None,
        Host::Changes(at) => {
            answer[at] ^= 1;
            Vec::new()
        }
        Host::Certificates(table) => table.to_vec(),
        _ => Authority::shared().host_certificates(PRODUCT),
    };
    Some(ReplyFrame::answered(&answer, table).unwrap())
}

fn launched() -> (SnpProcessor, SnpGuestHandle, [u8; 4096]) {
    let mut personality = Personality::genoa();
    personality.firmware = FirmwareLevel {
        tcb: tcb(PRODUCT),
        ..personality.firmware
    };
    let identity = Authority::shared().identity_again();
    let mut processor = SnpProcessor::new(identity, personality).unwrap();
    processor.init().unwrap();
    let handle = processor.gctx_create().unwrap();
    let start = SnpLaunchStart {
        policy: SnpPolicy(0x3_0000),
        desired_tsc_khz: 0,
        gosvw: [0; 16],
    };
    processor.launch_start(handle, start).unwrap();
    processor.activate(handle, 1).unwrap();
    let mut secrets = [0; 4096];
    let page = LaunchPage::new(PageType::Secrets, SECRETS_GPA);
    let guest = processor.guest(handle).unwrap();
    guest.launch_update(page, &mut secrets).unwrap();
    let finish = SnpLaunchFinish {
        id: None,
        host_data: [0; 32],
        vcek_disabled: false,
    };
    processor.launch_finish(handle, &finish).unwrap();
    (processor, handle, secrets)
}

#[test]
fn a_guest_gets_evidence_that_verifies_where_emulated_is_allowed_and_only_there() {
    let machine = Machine::new(&[]);
    let given = machine.report(0xc0).unwrap();
    assert!(given.emulated);
    let certificate = |kind| {
        let mut all = given.certificates.iter();
        all.find(|one| one.kind == kind).unwrap().bytes.clone()
    };
    let leaf = certificate(CertificateKind::Vcek);
    let chain = [CertificateKind::Ask, CertificateKind::Ark].map(certificate);
    let evidence = SnpEvidence {
        report: &given.report,
        leaf: &leaf,
        certificates: &chain,
        crl: None,
    };
    let nonce = Nonce::new(&[0xc0; 64]).unwrap();
    let expectation = Expectation {
        nonce: Some(&nonce),
        references: &[],
        clock: SystemTime::now(),
    };
    let digest = hex::encode(Report::parse(&given.report).unwrap().measurement());
    let policy = format!("measurements = [\"{digest}\"]\n");
    let root = hex::encode(Authority::shared().identity().root_fingerprint());
    let allowed = format!("allow_emulated = true\nemulated_roots = [\"sha256:{root}\"]\n{policy}");
    for (policy, accepted) in [(&allowed, true), (&policy, false)] {
        let policy = OwnerPolicy::parse(policy.as_bytes()).unwrap();
        let verdict = verify_snp(&evidence, &policy, &expectation);
        assert_eq!(verdict.accepted(), accepted, "{verdict:#?}");
    }
    assert_eq!(machine.count(), 2);
    assert!(machine.journal().is_empty());
    let mode = fs::metadata(machine.path("run/journal"))
        .unwrap()
        .permissions();
    assert_eq!(mode.mode() & 0o777, 0o600);
}

#[test]
fn the_count_goes_on_from_process_to_process() {
    let machine = Machine::new(&[]);
    machine.reports(1);
    for nonce in [2, 3] {
        let status = child(&machine, nonce).status().unwrap();
        assert!(status.success());
    }
    machine.reports(4);
    assert_eq!(machine.count(), 8);
    let each_once = [(1, 1), (3, 1), (5, 1), (7, 1)];
    assert_eq!(machine.sequence_numbers(), each_once);
}

#[test]
fn processes_at_once_take_turns() {
    let machine = Machine::new(&[Host::Says(RequestStatus::BUSY)]);
    let children: Vec<_> = (1..=6)
        .map(|nonce| child(&machine, nonce).spawn().unwrap())
        .collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    assert_eq!(machine.count(), 12);
    let numbers = machine.sequence_numbers();
    let expected = [(1, 2), (3, 1), (5, 1), (7, 1), (9, 1), (11, 1)];
    assert_eq!(numbers, expected);
}

/// This program again, as one more process of the guest: [`in_another_process`].
fn child(machine: &Machine, nonce: u8) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "in_another_process", "--quiet"])
        .stdout(Stdio::null())
        .env("GUEST_MESSAGES_FOLDER", machine.folder.path())
        .env("GUEST_MESSAGES_NONCE", nonce.to_string());
    command
}

#[test]
fn in_another_process() {
    let variable = |name| std::env::var(name).ok();
    let given = variable("GUEST_MESSAGES_FOLDER").zip(variable("GUEST_MESSAGES_NONCE"));
    let Some((folder, nonce)) = given else {
        return;
    };
    let nonce = nonce.parse().unwrap();
    let given = report(Path::new(&folder), nonce, None).unwrap();
    let report = Report::parse(&given.report).unwrap();
    assert_eq!(report.report_data(), [nonce; 64]);
}

/// Each way to lose an exchange, and the next report in spite of it.
#[test]
fn a_failed_exchange_uses_no_nonce_twice_and_is_got_over() {
    let refused = Host::Says(RequestStatus::firmware(0x17));
    for failure in [
        Host::LosesRequest,
        Host::LosesReply,
        Host::Changes(0x00),
        Host::Changes(0x20),
        Host::Changes(0x36),
        Host::Changes(0x60),
        Host::Changes(0x100),
        Host::Forges,
        refused,
    ] {
        // What never reached the firmware may fail twice in a row. What did is refused then.
        let reached = matches!(failure, Host::LosesReply | Host::Changes(_));
        for times in 1..=if reached { 1 } else { 2 } {
            let machine = Machine::new(&vec![failure; times]);
            for _ in 0..times {
                let error = machine.report(1).unwrap_err();
                let expected = match failure {
                    Host::Changes(_) | Host::Forges => matches!(
                        error,
                        MessagesError::Message(MessageError::NotTheReply) | MessagesError::Frame(_)
                    ),
                    Host::Says(said) => {
                        matches!(error, MessagesError::Refused(status) if status == said)
                    }
                    _ => matches!(error, MessagesError::Frame(FrameError::Io(_))),
                };
                assert!(expected, "{error}");
                assert_eq!(machine.count(), 2);
                assert_eq!(machine.journal().len(), 192);
            }
            // Other report data, so that a nonce used twice would show.
            machine.reports(2);
            machine.reports(3);
            assert_eq!(machine.count(), 6);
            assert!(machine.journal().is_empty());
            let numbers = machine.sequence_numbers();
            assert_eq!(numbers, [(1, times + 1), (3, 1), (5, 1)]);
        }
    }
}

#[test]
fn a_process_that_ends_before_it_sends_loses_nothing() {
    // It kept its request; it may have raised the count, or not, or have ended while it wrote.
    for raised in [false, true] {
        for cut in [192, 191, 0] {
            let machine = Machine::new(&[]);
            machine.reports(1);
            let mut secrets = [0; 4096];
            let mut options = File::options();
            let memory = options.read(true).write(true).open(machine.path("mem"));
            let memory = memory.unwrap();
            memory.read_exact_at(&mut secrets, SECRETS_GPA).unwrap();
            let mut channel = GuestChannel::new(&secrets, 0).unwrap();
            channel.start_at(2);
            let request = channel.report_request(&[9; 64], 0, KeySelect::Any);
            fs::write(machine.path("run/journal"), &request.unwrap()[..cut]).unwrap();
            if raised {
                memory.write_all_at(&[4], SECRETS_GPA + 0xa0).unwrap();
            }
            if raised && cut < 192 {
                // No order of events leads here but a lost journal: nothing is used twice.
                let error = machine.report(2).unwrap_err();
                assert!(matches!(error, MessagesError::OutOfStep(5)), "{error}");
            } else {
                machine.reports(2);
                machine.reports(3);
            }
            machine.sequence_numbers();
        }
    }
}

#[test]
fn a_journal_of_another_launch_is_not_used() {
    let machine = Machine::new(&[Host::LosesReply]);
    machine.report(1).unwrap_err();
    assert_eq!(machine.journal().len(), 192);
    machine.seen.lock().unwrap().clear();
    machine.launch();
    machine.reports(2);
    assert_eq!(machine.sequence_numbers(), [(1, 1)]);
    assert_eq!(machine.count(), 2);
}

#[test]
fn an_old_request_lowers_no_count() {
    let machine = Machine::new(&[Host::LosesReply]);
    machine.report(1).unwrap_err();
    let old = machine.journal();
    machine.reports(2);
    machine.reports(3);
    fs::write(machine.path("run/journal"), old).unwrap();
    machine.reports(4);
    assert_eq!(machine.count(), 8);
    assert_eq!(machine.sequence_numbers(), [(1, 2), (3, 1), (5, 1), (7, 1)]);
}

#[test]
fn a_host_that_answers_falsely_gains_no_nonce() {
    // It says of a request that it was answered before, without asking.
    let lie = Host::Says(RequestStatus::firmware(0x16));
    let machine = Machine::new(&[Host::LosesRequest, lie]);
    machine.report(1).unwrap_err();
    for (nonce, number) in [(2, 3), (3, 5), (4, 7)] {
        let error = machine.report(nonce).unwrap_err();
        assert!(
            matches!(error, MessagesError::OutOfStep(found) if found == number),
            "{error}"
        );
    }
    machine.sequence_numbers();
}

#[test]
fn a_busy_host_is_asked_again_with_the_same_bytes() {
    let busy = Host::Says(RequestStatus::BUSY);
    let machine = Machine::new(&[busy, busy]);
    machine.reports(1);
    assert_eq!(machine.sequence_numbers(), [(1, 3)]);
}

#[test]
fn nothing_is_sealed_without_a_host_or_a_key() {
    let machine = Machine::new(&[]);
    fs::remove_file(machine.path("host")).unwrap();
    let error = machine.report(1).unwrap_err();
    assert!(matches!(error, MessagesError::Connect(_)), "{error}");
    assert_eq!((machine.count(), machine.journal().len()), (0, 0));

    let machine = Machine::new(&[]);
    fs::write(machine.path("mem"), vec![0; 0x100_0000]).unwrap();
    let error = machine.report(1).unwrap_err();
    assert!(matches!(error, MessagesError::NoKey(_)), "{error}");
    fs::write(machine.path("cmdline"), "console=ttyS0").unwrap();
    let error = machine.report(1).unwrap_err();
    assert!(matches!(error, MessagesError::NotEmulated(_)), "{error}");
    assert!(machine.seen.lock().unwrap().is_empty());
}

#[test]
fn a_count_that_is_used_up_ends_the_channel() {
    let machine = Machine::new(&[]);
    let memory = File::options().write(true).open(machine.path("mem"));
    let full = (u32::MAX - 1).to_le_bytes();
    memory
        .unwrap()
        .write_all_at(&full, SECRETS_GPA + 0xa0)
        .unwrap();
    let error = machine.report(1).unwrap_err();
    assert!(matches!(error, MessagesError::Exhausted), "{error}");
    assert!(machine.seen.lock().unwrap().is_empty());
}

#[test]
fn what_the_firmware_or_the_host_answers_badly_is_told() {
    // A certificate table is the host's own; the report has been taken.
    let machine = Machine::new(&[Host::Certificates(b"no table"), Host::Certificates(b"")]);
    let refused = report(machine.folder.path(), 1, None).unwrap_err();
    assert!(matches!(refused, SourceError::Certificates(_)), "{refused}");
    let bare = machine.report(2).unwrap();
    assert!(bare.certificates.is_empty());
    // Privilege level 4 is none: the firmware answers, with a status.
    let refused = report(machine.folder.path(), 3, Some(4)).unwrap_err();
    let status = MessagesError::Message(MessageError::Status(0x16));
    assert!(
        matches!(&refused, SourceError::Messages(error) if error.to_string() == status.to_string()),
        "{refused}"
    );
    assert!(refused.to_string().contains("EMULATED"));
    let lower = report(machine.folder.path(), 4, Some(3)).unwrap();
    assert_eq!(Report::parse(&lower.report).unwrap().vmpl(), 3);
    assert_eq!(machine.sequence_numbers(), [(1, 1), (3, 1), (5, 1), (7, 1)]);
}
