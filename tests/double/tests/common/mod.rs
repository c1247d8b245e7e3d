//! Two emulated platforms, a child under the double on one of them, a tiny guest, and an owner.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::path::Path;
use std::sync::LazyLock;

use casemate_attest::legacy::{
    GuestPolicy, LegacyChain, OwnerSession, SessionBlob, SevCertificate, TrustAnchors,
};
use casemate_attest::processor::Identity;
use casemate_attest::processor::snp::{CaKeySize, Personality, SnpIdentity};
use casemate_double::protocol::{Answer, Ask, Certificates, Device, Outcome, START, Step, Wrong};
use casemate_double::{Config, Double, Snp};

/// Policies: NODBG; with ES; with NOSEND.
pub const SEV: u32 = 1;
pub const SEV_ES: u32 = 1 | 1 << 2;
pub const SEV_NOSEND: u32 = 1 | 1 << 3;
/// Memory of a guest.
pub const PAGES: u64 = 16;
/// Where the guest counts.
pub const COUNTER: u64 = 0x2000;

/// ```text
///         mov dx, 0x3f8
/// again:  inc word [0x2000] ; mov al, [0x2000] ; out dx, al ; jmp again
/// ```
pub const CODE: &[u8] = &[
    0xba, 0xf8, 0x03, 0xff, 0x06, 0x00, 0x20, 0xa0, 0x00, 0x20, 0xee, 0xeb, 0xf6,
];

pub static SITE_A: LazyLock<Vec<u8>> = LazyLock::new(|| identity("a"));
pub static SITE_B: LazyLock<Vec<u8>> = LazyLock::new(|| identity("b"));
pub static SNP: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let make = || SnpIdentity::generate_with(CaKeySize::Rsa2048).unwrap();
    kept(
        "snp",
        |bytes| SnpIdentity::from_bytes(bytes).is_ok(),
        || make().to_bytes().unwrap().to_vec(),
    )
});

/// A machine of site A that trusts nobody else.
pub fn site_a() -> Config {
    Config::new(&SITE_A)
}

/// A machine of site A with SNP, a Milan, of which Linux takes two pages of a launch at a time.
pub fn snp_machine() -> Config {
    let mut config = site_a();
    config.snp = Some(Snp {
        identity: SNP.clone(),
        personality: Personality::milan(),
        batch: 2,
    });
    config
}

pub fn root(identity: &[u8]) -> [u8; 32] {
    Identity::from_bytes(identity).unwrap().root_fingerprint()
}

pub fn amd(identity: &[u8]) -> Vec<u8> {
    Identity::from_bytes(identity).unwrap().chain().amd_certs()
}

/// A child that is a VMM.
pub struct Vmm {
    pub double: Double,
    amd: Vec<u8>,
}

impl Vmm {
    pub fn start(config: &Config) -> Self {
        let double = Double::start(env!("CARGO_BIN_EXE_double-vmm"), config)
            .unwrap_or_else(|error| panic!("{error}"));
        Self {
            double,
            amd: amd(&config.identity),
        }
    }

    pub fn ask(&mut self, ask: &Ask) -> Outcome {
        self.double
            .ask(ask)
            .unwrap_or_else(|error| panic!("{error}"))
    }

    pub fn done(&mut self, ask: &Ask) {
        assert_eq!(self.ask(ask), Ok(Answer::Done), "{ask:?}");
    }

    pub fn bytes(&mut self, ask: &Ask) -> Vec<u8> {
        match self.ask(ask) {
            Ok(Answer::Bytes(bytes)) => bytes,
            other => panic!("{ask:?}: {other:?}"),
        }
    }

    pub fn step(&mut self, step: Step) -> Outcome {
        self.ask(&Ask::Step(step))
    }

    pub fn stepped(&mut self, step: Step) {
        self.done(&Ask::Step(step));
    }

    pub fn device(&mut self, device: Device) -> Outcome {
        self.ask(&Ask::Device(device))
    }

    pub fn attach_as(&mut self, policy: u32, wrong: Option<Wrong>) -> Outcome {
        let amd = self.amd.clone();
        self.ask(&Ask::Attach {
            policy,
            pages: PAGES,
            amd,
            wrong,
        })
    }

    /// Makes the guest's machine and loads the counter.
    pub fn attach(&mut self, policy: u32) {
        assert_eq!(self.attach_as(policy, None), Ok(Answer::Done));
        self.done(&Ask::Write {
            gpa: START,
            bytes: CODE.to_vec(),
        });
    }

    pub fn evidence(&mut self) -> Certificates {
        match self.step(Step::Evidence) {
            Ok(Answer::Certificates(certificates)) => certificates,
            other => panic!("{other:?}"),
        }
    }

    pub fn read(&mut self, gpa: u64, length: u64) -> Vec<u8> {
        self.bytes(&Ask::Read { gpa, length })
    }

    /// Launches without an owner, up to the end.
    pub fn launch(&mut self) {
        for step in launch_steps(None) {
            assert!(self.step(step.clone()).is_ok(), "{step:?}");
        }
    }

    /// Ends the guest; nothing is left in the firmware.
    pub fn close(&mut self) {
        self.done(&Ask::Close);
        assert_eq!(self.double.guests(), 0, "{:#?}", self.double.log());
    }

    pub fn finish(self) {
        self.double
            .finish()
            .unwrap_or_else(|error| panic!("{error}"));
    }
}

/// Two machines of two sites; A may send to B.
pub fn sites() -> (Vmm, Vmm) {
    let mut a = site_a();
    a.peers = vec![root(&SITE_B)];
    let mut b = Config::new(&SITE_B);
    b.peers = vec![root(&SITE_A)];
    (Vmm::start(&a), Vmm::start(&b))
}

/// Source with a running guest, target without one.
pub fn running(policy: u32) -> (Vmm, Vmm) {
    let (mut source, mut target) = sites();
    source.attach(policy);
    source.launch();
    source.done(&Ask::AddVcpu);
    assert_eq!(source.bytes(&Ask::Run { outputs: 5 }), [1, 2, 3, 4, 5]);
    assert_eq!(target.attach_as(policy, None), Ok(Answer::Done));
    target.done(&Ask::AddVcpu);
    (source, target)
}

pub fn open_both(source: &mut Vmm, target: &mut Vmm) {
    let certificates = target.evidence();
    let sending = source.step(Step::SendStart {
        target: certificates,
    });
    let Ok(Answer::Sending(policy, pdh, session)) = sending else {
        panic!("{sending:?}");
    };
    target.stepped(Step::ReceiveStart {
        policy,
        pdh,
        session,
    });
}

pub fn all_pages() -> Vec<u64> {
    (0..PAGES).map(|page| page * 4096).collect()
}

pub fn send_pages(source: &mut Vmm) -> Vec<u8> {
    source.bytes(&Ask::Step(Step::SendPages { gpas: all_pages() }))
}

/// START, UPDATE of the code's page, MEASURE, FINISH.
pub fn launch_steps(session: Option<(Vec<u8>, Vec<u8>)>) -> [Step; 4] {
    [
        Step::LaunchStart { session },
        Step::LaunchUpdate {
            gpa: START,
            length: 4096,
        },
        Step::LaunchMeasure,
        Step::LaunchFinish,
    ]
}

/// The page that is measured.
pub fn code_page() -> Vec<u8> {
    let mut page = CODE.to_vec();
    page.resize(4096, 0);
    page
}

/// An owner's session with site A: certificate and blob for the VMM, and what the owner keeps.
pub fn owner(certificates: &Certificates, policy: u32) -> ((Vec<u8>, Vec<u8>), OwnerSession) {
    let (pdh, platform, amd) = certificates;
    let chain = LegacyChain::parse(pdh, platform, amd).unwrap();
    let trust = TrustAnchors::amd()
        .with_emulated_root(chain.ark.fingerprint())
        .unwrap();
    let verified = chain.verify(&trust).unwrap();
    let policy = GuestPolicy::try_from(policy).unwrap();
    let (public, owner) = OwnerSession::create(&verified, policy).unwrap();
    let (dh, blob): (&SevCertificate, &SessionBlob) = (&public.dh_cert, &public.session);
    ((dh.as_bytes().to_vec(), blob.to_bytes()), owner)
}

/// Compares a record of calls with its golden file; lines that begin with # are comments there.
pub fn golden(name: &str, log: &[String]) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("golden")
        .join(name);
    let text = std::fs::read_to_string(&path).unwrap_or_default();
    let expected: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    let log: Vec<&str> = log.iter().map(String::as_str).collect();
    assert_eq!(log, expected, "{}:\n{}", path.display(), log.join("\n"));
}

fn identity(name: &str) -> Vec<u8> {
    kept(
        name,
        |bytes| Identity::from_bytes(bytes).is_ok(),
        || Identity::generate().unwrap().to_bytes().to_vec(),
    )
}

/// An identity, made once for all test processes: RSA keys take a while.
fn kept(name: &str, good: fn(&[u8]) -> bool, make: impl FnOnce() -> Vec<u8>) -> Vec<u8> {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let path = dir.join(format!("double-identity-{name}"));
    let known = || std::fs::read(&path).ok().filter(|bytes| good(bytes));
    known().unwrap_or_else(|| {
        let bytes = make();
        let mut file = tempfile::NamedTempFile::new_in(dir).unwrap();
        std::io::Write::write_all(&mut file, &bytes).unwrap();
        // Whoever comes second takes what is there, unless an older format left it.
        match file.persist_noclobber(&path) {
            Ok(_) => bytes,
            Err(error) => known().unwrap_or_else(|| {
                error.file.persist(&path).unwrap();
                bytes
            }),
        }
    })
}
