//! What a launch costs by phase, what of it is the secure processor's, and how fast an emulated guest is sent and
//! received: `cargo bench -p casemate --bench launch`. Prints one JSON object; ratios compare with a baseline of the
//! same run (a plain guest, or the bare hash).
//!
//! The VMM is the product's own, without its cell; the processor is the software one, on a thread of its own.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a benchmark ends where it fails"
)]

#[path = "../tests/vmm_support/mod.rs"]
mod vmm_support;

use std::fs::File;
use std::time::{Duration, Instant};

use casemate::confidential::control::ProcessorLink;
use casemate::confidential::launch::GuestProtection;
use casemate::confidential::{GuestMemoryView, open, processor_role};
use casemate::ipc::Channel;
use casemate::machine::plan::{MachinePlan, Technology};
use casemate::role::Cell;
use casemate::sandbox::report::{ProbeReport, SandboxReport};
use casemate::vmm::memory::{ExchangeMemory, GuestMemory};
use casemate::vmm::protocol::{
    EXCHANGE_PAGES, EXCHANGE_SIZE, HandleKind, LaunchBinding, RoleError, VmmRequest,
};
use casemate_attest::processor::Identity;
use casemate_attest::processor::snp::{CaKeySize, SnpIdentity};
use ring::digest::{SHA256, SHA384, digest};
use serde_json::{Value, json};
use vmm_support::{Lines, Vmm, bzimage, image_file, kvm, plan};

fn main() {
    let [here, there] = [0, 1].map(|_| Identity::generate().unwrap());
    let roots = [here.root_fingerprint(), there.root_fingerprint()];
    let (a, b) = (psp(&here, &roots), psp(&there, &roots));
    let image = bzimage(PRINTS_AND_LOOPS, IMAGE);
    let plain = median_of(|| launch(&a, Technology::None, &image));
    let phases = [
        (
            "sev",
            Technology::Sev {
                emulated: true,
                policy: 1,
            },
        ),
        (
            "sev-es",
            Technology::SevEs {
                emulated: true,
                policy: 5,
            },
        ),
        (
            "sev-snp",
            Technology::SevSnp {
                emulated: true,
                policy: 0x3_0000,
            },
        ),
    ]
    .map(|(name, technology)| {
        let phases = median_of(|| launch(&a, technology, &image));
        (name, phases.shown(&plain))
    });
    let mut launches = json!({ "none": plain.shown(&plain) });
    for (name, shown) in phases {
        launches[name] = shown;
    }
    let report = json!({
        "emulated": true,
        "image_mib": IMAGE >> 20,
        "launch_ms": launches,
        "measuring": measuring(&a),
        "moving": moving(&a, &b),
        "model_of_a_real_processor": model(),
    });
    println!("{}", serde_json::to_string_pretty(&report).unwrap());
}

/// One launch's phases.
#[derive(Clone, Copy)]
struct Phases {
    /// Memory, virtual machine, vCPUs, threads.
    set_up: Duration,
    /// Image into memory, and measured.
    measure: Duration,
    /// LAUNCH_FINISH, and until the guest's first output has been seen.
    first_instruction: Duration,
}

impl Phases {
    fn total(&self) -> Duration {
        self.set_up + self.measure + self.first_instruction
    }

    /// What a plain guest does not need is the processor's share.
    fn shown(&self, plain: &Self) -> Value {
        let share =
            self.total().saturating_sub(plain.total()).as_secs_f64() / self.total().as_secs_f64();
        json!({
            "memory_set_up": ms(self.set_up),
            "load_and_measure": ms(self.measure),
            "finish_to_first_output": ms(self.first_instruction),
            "total": ms(self.total()),
            "share_of_the_processor": (share * 100.0).round() / 100.0,
        })
    }
}

fn median_of(mut launch: impl FnMut() -> Phases) -> Phases {
    let mut runs: Vec<Phases> = (0..RUNS).map(|_| launch()).collect();
    runs.sort_by_key(Phases::total);
    runs[RUNS / 2]
}

fn launch(psp: &ProcessorLink, technology: Technology, image: &[u8]) -> Phases {
    let lines = Lines::new();
    let plan = MachinePlan {
        technology,
        ..plan(1, MEMORY, "")
    };
    let mut handles = vec![
        (HandleKind::Kvm, kvm()),
        (HandleKind::Console, lines.handle()),
        (HandleKind::Kernel, image_file(image)),
    ];
    if technology != Technology::None {
        let link = psp.connect(false).unwrap();
        handles.push((HandleKind::Processor, link.channel.into_fd()));
    }
    let begun = Instant::now();
    let mut vmm = Vmm::prepare(&plan, handles).unwrap();
    let prepared = Instant::now();
    let binding = Box::new(LaunchBinding::default());
    vmm.ask(VmmRequest::Launch { binding }).unwrap();
    let measured = Instant::now();
    vmm.ask(VmmRequest::Run).unwrap();
    let (seen, _) = lines
        .next(Duration::from_secs(30))
        .expect("the guest speaks");
    Phases {
        set_up: prepared - begun,
        measure: measured - prepared,
        first_instruction: seen.saturating_duration_since(measured),
    }
}

/// Pages that the software processor measures a second, and what the bare hash does with them.
fn measuring(psp: &ProcessorLink) -> Value {
    let rate = |technology| {
        let mut guest = Guest::new(psp, technology);
        guest
            .protection
            .launch_start(&LaunchBinding::default())
            .unwrap();
        pages_a_second(MEASURED, || {
            guest.protection.launch_update(0, MEASURED).unwrap()
        })
    };
    let sev = rate(Technology::Sev {
        emulated: true,
        policy: 1,
    });
    let snp = rate(Technology::SevSnp {
        emulated: true,
        policy: 0x3_0000,
    });
    let bytes = vec![0x5a; MEASURED as usize];
    let sha256 = pages_a_second(MEASURED, || {
        std::hint::black_box(digest(&SHA256, &bytes));
    });
    let sha384 = pages_a_second(MEASURED, || {
        for page in bytes.chunks(PAGE) {
            std::hint::black_box(digest(&SHA384, page));
        }
    });
    json!({
        "sev_pages_per_s": sev.round(), "bare_sha256_pages_per_s": sha256.round(), "sev_ratio": ratio(sev, sha256),
        "snp_pages_per_s": snp.round(), "bare_sha384_pages_per_s": sha384.round(), "snp_ratio": ratio(snp, sha384),
    })
}

/// SEND_UPDATE_DATA and RECEIVE_UPDATE_DATA, pages a second, each side for itself.
fn moving(a: &ProcessorLink, b: &ProcessorLink) -> Value {
    let technology = Technology::Sev {
        emulated: true,
        policy: 1,
    };
    let (mut source, mut target) = (Guest::new(a, technology), Guest::new(b, technology));
    source
        .protection
        .launch_start(&LaunchBinding::default())
        .unwrap();
    source.protection.launch_update(0, PAGE as u64).unwrap();
    source.protection.launch_measure().unwrap();
    source.protection.launch_finish().unwrap();
    let evidence = target.protection.evidence().unwrap();
    let (policy, pdh, session) = source.protection.send_start(&evidence).unwrap();
    target
        .protection
        .receive_start(policy, &pdh, &session)
        .unwrap();
    let (mut sending, mut receiving) = (Duration::ZERO, Duration::ZERO);
    let pages: Vec<u64> = (0..MEASURED / PAGE as u64)
        .map(|page| page * PAGE as u64)
        .collect();
    for batch in pages.chunks(EXCHANGE_PAGES) {
        let begun = Instant::now();
        source.protection.send_pages(batch).unwrap();
        sending += begun.elapsed();
        std::io::copy(
            &mut std::io::Read::take(at_start(&source.exchange), EXCHANGE_SIZE as u64),
            &mut at_start(&target.exchange),
        )
        .unwrap();
        let begun = Instant::now();
        target.protection.receive_pages(batch).unwrap();
        receiving += begun.elapsed();
    }
    let rate = |took: Duration| (pages.len() as f64 / took.as_secs_f64()).round();
    json!({ "send_pages_per_s": rate(sending), "receive_pages_per_s": rate(receiving) })
}

/// A guest without a VMM: memory, exchange memory, protection.
struct Guest {
    protection: GuestProtection,
    exchange: ExchangeMemory,
}

impl Guest {
    fn new(psp: &ProcessorLink, technology: Technology) -> Self {
        let memory = GuestMemory::new(MEASURED).unwrap();
        // Pages that nobody has touched yet would be made while they are measured.
        for chunk in (0..MEASURED).step_by(PAGE) {
            memory.write(chunk, &[0x5a; PAGE]).unwrap();
        }
        let exchange = ExchangeMemory::new().unwrap();
        let plan = MachinePlan {
            technology,
            ..plan(1, MEASURED, "")
        };
        let view = GuestMemoryView {
            file: memory.file(),
            runs: &[(0, MEASURED)],
        };
        let link = psp.connect(false).unwrap();
        let protection = open(&plan, view, exchange.file(), Some(link.channel));
        Self {
            protection: protection.unwrap().unwrap(),
            exchange,
        }
    }
}

/// Published figures, not ours: there was no such processor at hand. The secure processor takes launch pages one
/// by one, at about 4 MB/s in the SEVeriFast paper (ASPLOS 2024, 1 MiB of firmware in some 0.26 s); OpenVMM's pull
/// request 4321 reports 9.3 s for a SEV-SNP image of 13.1 MB on KVM, which bounds a page's cost from above.
fn model() -> Value {
    let pages = (IMAGE / PAGE) as f64;
    let (fast, slow) = (4096.0 / 4.0e6, 9.32 / (13_119_466.0 / 4096.0));
    json!({
        "ms_per_page": [fast * 1e3, slow * 1e3],
        "adds_s_for_this_image": [(pages * fast).round(), (pages * slow).round()],
        "sources": ["SEVeriFast, ASPLOS 2024", "microsoft/openvmm pull request 4321"],
    })
}

fn psp(identity: &Identity, roots: &[[u8; 32]]) -> ProcessorLink {
    let (agent, role) = Channel::pair().unwrap();
    std::thread::spawn(move || processor_role::run(role, Box::new(Open)));
    let link = ProcessorLink::new(agent);
    let snp = SnpIdentity::generate_with(CaKeySize::Rsa2048).unwrap();
    link.initialise(&identity.to_bytes(), Some(&snp.to_bytes().unwrap()), roots)
        .unwrap();
    link
}

/// No cell: what is measured is the work, not the jail's set-up.
struct Open;

impl Cell for Open {
    fn close(&mut self) -> Result<(), RoleError> {
        Ok(())
    }
    fn report(&self) -> Result<SandboxReport, RoleError> {
        Err(RoleError::new("BENCHMARK", "no cell"))
    }
    fn probe(&self) -> Result<ProbeReport, RoleError> {
        Err(RoleError::new("BENCHMARK", "no cell"))
    }
}

fn at_start(memory: &ExchangeMemory) -> File {
    use std::io::Seek;
    let mut file = File::from(memory.file().try_clone_to_owned().unwrap());
    file.rewind().unwrap();
    file
}

fn pages_a_second(bytes: u64, work: impl FnOnce()) -> f64 {
    let begun = Instant::now();
    work();
    (bytes / PAGE as u64) as f64 / begun.elapsed().as_secs_f64()
}

fn ratio(ours: f64, baseline: f64) -> f64 {
    (ours / baseline * 100.0).round() / 100.0
}

fn ms(took: Duration) -> f64 {
    (took.as_secs_f64() * 1e5).round() / 100.0
}

/// `mov edx, 0x3f8 ; mov al, '!' ; out dx, al ; mov al, 10 ; out dx, al ; jmp $`
const PRINTS_AND_LOOPS: &[u8] = &[
    0xba, 0xf8, 0x03, 0, 0, 0xb0, b'!', 0xee, 0xb0, 10, 0xee, 0xeb, 0xfe,
];
const RUNS: usize = 5;
const IMAGE: usize = 64 << 20;
const MEMORY: u64 = 256 << 20;
const MEASURED: u64 = 128 << 20;
const PAGE: usize = 4096;
