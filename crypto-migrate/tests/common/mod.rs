//! A site with certificates, a toy guest for either end, and runners for direct and gateway paths.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use casemate_crypto_migrate::Provider;
use casemate_crypto_migrate::destination::{
    self, DestinationConfig, DestinationError, DestinationOutcome,
};
use casemate_crypto_migrate::dev_ca::{DevCa, HostMaterial};
use casemate_crypto_migrate::gateway::{Action, Direction, Gateway, GatewayError, GatewayReport};
use casemate_crypto_migrate::guest::*;
use casemate_crypto_migrate::identity::Local;
use casemate_crypto_migrate::identity::{AllowList, AllowedPeer, Path, PeerIdentity, TrustAnchors};
use casemate_crypto_migrate::pages::PageSet;
use casemate_crypto_migrate::precopy::Limits;
use casemate_crypto_migrate::progress::Progress;
use casemate_crypto_migrate::session::SessionFacts;
use casemate_crypto_migrate::settlement::Settlement;
use casemate_crypto_migrate::source::{self, Deadlines, SourceConfig, SourceError, SourceOutcome};
use casemate_crypto_migrate::transcript::ContentDigest;
use casemate_crypto_migrate::wire::Frame;

pub const MARKER: &[u8] = b"PLAINTEXT-OF-THE-GUEST";
pub const PAGES: u64 = 700;

pub struct Site {
    pub ca: DevCa,
    pub a: HostMaterial,
    pub b: HostMaterial,
    pub gateway: HostMaterial,
}

impl Site {
    pub fn new() -> Self {
        let ca = DevCa::new("test").unwrap();
        let issue = |san: &str| ca.issue(san).unwrap();
        Self {
            a: issue("site-a.test"),
            b: issue("site-b.test"),
            gateway: issue("gateway.test"),
            ca,
        }
    }

    pub fn local(&self, own: &HostMaterial, allow: Vec<AllowedPeer>) -> Local {
        let identity = own.identity().unwrap();
        let anchors = TrustAnchors::from_pem(self.ca.certificate_pem()).unwrap();
        Local {
            identity,
            anchors,
            allow: AllowList::new(allow),
            provider: Provider::default(),
        }
    }

    pub fn via(&self) -> Path {
        Path::Gateway(self.gateway.pinned().unwrap())
    }

    pub fn source(&self, path: Path) -> SourceConfig {
        let mut config = SourceConfig::new(
            self.local(&self.a, vec![peer("site-b", &self.b, path)]),
            "site-b",
        );
        config.deadlines = deadlines();
        // The toy is tiny: without this, one round would do.
        config.limits = Limits {
            downtime: Duration::ZERO,
            max_rounds: 4,
            patience: 10,
            ..Limits::default()
        };
        config
    }

    pub fn destination(&self, path: Path) -> DestinationConfig {
        let mut config =
            DestinationConfig::new(self.local(&self.b, vec![peer("site-a", &self.a, path)]));
        config.deadlines = deadlines();
        config
    }

    pub fn relay(&self) -> Gateway {
        let allow = vec![
            peer("site-a", &self.a, Path::Direct),
            peer("site-b", &self.b, Path::Direct),
        ];
        Gateway::new(self.local(&self.gateway, allow), Duration::from_secs(5))
    }
}

pub fn peer(name: &str, host: &HostMaterial, path: Path) -> AllowedPeer {
    AllowedPeer {
        name: name.into(),
        identity: host.pinned().unwrap(),
        path,
    }
}

pub fn deadlines() -> Deadlines {
    let time = Duration::from_secs(5);
    Deadlines {
        connect: time,
        agree: time,
        frame: time,
        finish: time,
    }
}

pub fn fail(what: &'static str) -> GuestError {
    GuestError(format!("injected at {what}"))
}

/// The running guest; it dirties pages whenever the engine looks.
pub struct ToySource {
    pub memory: BTreeMap<u64, Vec<u8>>,
    pub dirty: BTreeSet<u64>,
    pub firmware: bool,
    pub running: bool,
    pub destroyed: bool,
    pub released: bool,
    pub steps: u64,
    pub fail_at: Option<&'static str>,
    pub session: Option<SessionFacts>,
    pub refuse_session: bool,
    /// What the engine asked for.
    pub throttles: Vec<u8>,
}

impl ToySource {
    pub fn new() -> Self {
        let mut memory = BTreeMap::new();
        for page in (0..PAGES).chain(10_000..10_000 + PAGES) {
            memory.insert(page, content(page, 0));
        }
        let dirty = BTreeSet::new();
        Self {
            memory,
            dirty,
            firmware: true,
            running: true,
            destroyed: false,
            released: false,
            steps: 0,
            fail_at: None,
            session: None,
            refuse_session: false,
            throttles: Vec::new(),
        }
    }

    pub fn offer(&self, epoch: u64) -> GuestOffer {
        GuestOffer {
            vm_id: *b"the-guest's-uuid",
            name: "toy-1".into(),
            epoch,
            memory: self.memory(),
            description: b"description".to_vec(),
        }
    }

    fn check(&self, what: &'static str) -> Result<(), GuestError> {
        if self.fail_at == Some(what) {
            Err(fail(what))
        } else {
            Ok(())
        }
    }
}

/// A third of the pages is zero; page 5 becomes zero and page 6 stops being zero later.
fn content(page: u64, version: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGE_SIZE];
    if !(page + version).is_multiple_of(3) {
        let text = [MARKER, &page.to_le_bytes(), &version.to_le_bytes()].concat();
        bytes[100..100 + text.len()].copy_from_slice(&text);
    }
    bytes
}

impl ToySource {
    fn set<'a>(&self, pages: impl IntoIterator<Item = &'a u64>) -> PageSet {
        let mut set = PageSet::empty(&SourceGuest::memory(self));
        for page in pages {
            set.insert(Gpn(*page)).unwrap();
        }
        set
    }
}

impl SourceGuest for ToySource {
    fn agreed(&mut self, session: &SessionFacts) -> Result<(), Refusal> {
        self.session = Some(session.clone());
        match self.refuse_session {
            true => Err(Refusal {
                code: "POLICY_SESSION".into(),
                reason: "not by this suite".into(),
            }),
            false => Ok(()),
        }
    }
    fn memory(&self) -> Vec<PageRange> {
        [0, 10_000]
            .map(|start| PageRange {
                start: Gpn(start),
                count: PAGES,
            })
            .to_vec()
    }
    fn begin(&mut self, evidence: &[u8]) -> Result<Vec<u8>, GuestError> {
        assert_eq!(evidence, b"evidence");
        self.check("begin").map(|()| b"start".to_vec())
    }
    fn start_tracking(&mut self) -> Result<PageSet, GuestError> {
        self.check("start_tracking")?;
        Ok(self.set(self.memory.keys()))
    }
    fn take_dirty(&mut self) -> Result<PageSet, GuestError> {
        self.check("take_dirty")?;
        if self.running {
            self.steps += 1;
            for page in (0..PAGES).filter(|page| page % 7 == self.steps % 7) {
                self.memory.insert(page, content(page, self.steps));
                self.dirty.insert(page);
            }
        }
        let dirty = std::mem::take(&mut self.dirty);
        Ok(self.set(&dirty))
    }
    fn read_pages(
        &mut self,
        pages: &[Gpn],
        emit: &mut dyn FnMut(Gpn, PageContent<'_>),
    ) -> Result<(), GuestError> {
        self.check("read_pages")?;
        let mut pages = pages.iter().peekable();
        while let Some(page) = pages.next() {
            let bytes = &self.memory[&page.0];
            if bytes.iter().all(|b| *b == 0) {
                emit(*page, PageContent::Zero);
            } else if self.firmware && page.0 % 2 == 0 {
                let ciphertext: Vec<u8> = bytes.iter().map(|b| b ^ 0xa5).collect();
                emit(
                    *page,
                    PageContent::Firmware {
                        header: &[0x11; PACKET_HEADER_SIZE],
                        ciphertext: &ciphertext,
                    },
                );
            } else {
                // Pairs of neighbours travel together.
                let mut extent = bytes.clone();
                if let Some(next) = pages.next_if(|next| {
                    let zero = self.memory[&next.0].iter().all(|b| *b == 0);
                    next.0 == page.0 + 1 && !zero && !self.firmware
                }) {
                    extent.extend_from_slice(&self.memory[&next.0]);
                }
                emit(*page, PageContent::Data(&extent));
            }
        }
        Ok(())
    }
    fn batch_pages(&self) -> usize {
        100
    }
    fn pause(&mut self) -> Result<(), GuestError> {
        self.check("pause")?;
        self.running = false;
        Ok(())
    }
    fn state(&mut self) -> Result<Vec<u8>, GuestError> {
        assert!(!self.running);
        self.check("state")?;
        Ok([MARKER, &vec![7; 600 * 1024], &self.steps.to_le_bytes()].concat())
    }
    fn judge(&mut self, evidence: &[u8]) -> Result<(), Refusal> {
        assert_eq!(evidence, b"evidence");
        match self.fail_at {
            Some("judge") => Err(Refusal {
                code: "TARGET_REFUSED".into(),
                reason: "injected".into(),
            }),
            _ => Ok(()),
        }
    }
    fn throttle(&mut self, percent: u8) -> Result<(), GuestError> {
        self.check("throttle")?;
        self.throttles.push(percent);
        Ok(())
    }
    fn attend(&mut self) {}
    fn content_digest(&mut self, pages: &PageSet) -> Result<[u8; 32], GuestError> {
        assert!(!self.running);
        ContentDigest::over(pages, |page, into| {
            let bytes = into.chunks_exact_mut(PAGE_SIZE);
            (page.0..)
                .zip(bytes)
                .for_each(|(page, into)| into.copy_from_slice(&self.memory[&page]));
            Ok(())
        })
    }
    fn release(&mut self) -> Result<(), GuestError> {
        self.check("release")?;
        self.released = true;
        Ok(())
    }
    fn resume(&mut self) -> Result<(), GuestError> {
        assert!(!self.destroyed);
        self.running = true;
        self.released = false;
        // What was cleared for the failed attempt is dirty again for nobody: the next starts from all pages.
        Ok(())
    }
    fn destroy(&mut self) -> Result<(), GuestError> {
        assert!(!self.running && self.released);
        self.check("destroy")?;
        self.destroyed = true;
        Ok(())
    }
}

#[derive(Default)]
pub struct ToyDestination {
    pub memory: BTreeMap<u64, Vec<u8>>,
    pub admitted: bool,
    pub begun: bool,
    pub flushed: usize,
    pub state: Option<Vec<u8>>,
    pub active: Option<u64>,
    pub abandoned: bool,
    pub refuse: bool,
    pub fail_at: Option<&'static str>,
    pub session: Option<SessionFacts>,
    pub refuse_session: bool,
    /// A page that changes by itself before it is read anew.
    pub corrupt: Option<u64>,
}

impl ToyDestination {
    fn check(&self, what: &'static str) -> Result<(), GuestError> {
        if self.fail_at == Some(what) {
            Err(fail(what))
        } else {
            Ok(())
        }
    }

    /// The same guest, running here: for the way back.
    pub fn into_source(self) -> ToySource {
        assert!(self.active.is_some());
        let mut source = ToySource::new();
        for bytes in source.memory.values_mut() {
            bytes.fill(0);
        }
        source.memory.extend(self.memory);
        source
    }
}

impl DestinationGuest for ToyDestination {
    fn agreed(&mut self, session: &SessionFacts) -> Result<(), Refusal> {
        self.session = Some(session.clone());
        match self.refuse_session {
            true => Err(Refusal {
                code: "POLICY_SESSION".into(),
                reason: "not by this suite".into(),
            }),
            false => Ok(()),
        }
    }
    fn admit(&mut self, offer: &GuestOffer, peer: &PeerIdentity) -> Result<Admission, Refusal> {
        assert_eq!(offer.description, b"description");
        assert!(!peer.san.is_empty());
        if self.refuse {
            return Err(Refusal {
                code: "POLICY_REFUSED".into(),
                reason: "no room".into(),
            });
        }
        self.admitted = true;
        Ok(Admission {
            evidence: b"evidence".to_vec(),
        })
    }
    fn settle(&mut self, question: &GuestOffer, _: &PeerIdentity) -> Result<Settlement, Refusal> {
        assert!(question.memory.is_empty() && question.description.is_empty());
        if self.refuse {
            return Err(Refusal {
                code: "SETTLE_LATER".into(),
                reason: "it is being taken over".into(),
            });
        }
        Ok(match self.active {
            Some(epoch) if epoch == question.epoch + 1 => Settlement::Held,
            _ => Settlement::Never,
        })
    }
    fn begin(&mut self, start: &[u8]) -> Result<(), GuestError> {
        assert_eq!(start, b"start");
        self.begun = true;
        self.check("begin")
    }
    fn write_pages(&mut self, page: Gpn, content: PageContent<'_>) -> Result<(), GuestError> {
        assert!(self.begun);
        self.check("write_pages")?;
        let bytes = match content {
            PageContent::Zero => vec![0; PAGE_SIZE],
            PageContent::Data(data) => data.to_vec(),
            PageContent::Firmware { header, ciphertext } => {
                assert_eq!(header, [0x11; PACKET_HEADER_SIZE]);
                ciphertext.iter().map(|b| b ^ 0xa5).collect()
            }
        };
        let pages = (page.0..).zip(bytes.chunks_exact(PAGE_SIZE));
        self.memory
            .extend(pages.map(|(page, bytes)| (page, bytes.to_vec())));
        Ok(())
    }
    fn flush(&mut self) -> Result<(), GuestError> {
        self.flushed += 1;
        self.check("flush")
    }
    fn restore(&mut self, state: &[u8]) -> Result<(), GuestError> {
        assert!(self.flushed > 0);
        self.check("restore")?;
        self.state = Some(state.to_vec());
        Ok(())
    }
    fn content_digest(&mut self, pages: &PageSet) -> Result<[u8; 32], GuestError> {
        self.check("content_digest")?;
        if let Some(page) = self.corrupt {
            self.memory.insert(page, vec![0xbb; PAGE_SIZE]);
        }
        ContentDigest::over(pages, |page, into| {
            let bytes = into.chunks_exact_mut(PAGE_SIZE);
            (page.0..)
                .zip(bytes)
                .for_each(|(page, into)| into.copy_from_slice(&self.memory[&page]));
            Ok(())
        })
    }
    fn activate(&mut self, epoch: u64) -> Result<u32, GuestError> {
        assert!(self.state.is_some(), "never before the state");
        self.check("activate")?;
        self.active = Some(epoch);
        Ok(3)
    }
    fn abandon(&mut self) {
        assert!(self.active.is_none(), "never what runs");
        self.abandoned = true;
    }
}

/// Real TCP: what a reset destroys is part of the test.
pub fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let far = listener.accept().unwrap().0;
    near.set_nodelay(true).unwrap();
    far.set_nodelay(true).unwrap();
    (near, far)
}

pub struct Run {
    pub source: ToySource,
    pub destination: ToyDestination,
    pub left: Result<SourceOutcome, SourceError>,
    pub right: Result<DestinationOutcome, DestinationError>,
    pub gateway: Option<Result<GatewayReport, GatewayError>>,
    pub source_progress: Vec<Progress>,
}

impl Run {
    pub fn codes(&self) -> (&str, &str) {
        (
            self.left.as_ref().map_or_else(SourceError::code, |_| "OK"),
            self.right
                .as_ref()
                .map_or_else(DestinationError::code, |_| "OK"),
        )
    }

    pub fn assert_moved(&self) {
        assert_eq!(
            self.codes(),
            ("OK", "OK"),
            "{:?} {:?}",
            self.left,
            self.right
        );
        assert!(self.source.destroyed && !self.source.running);
        assert_eq!(self.destination.memory, self.source.memory);
        assert!(!self.destination.abandoned);
        let (left, right) = (self.left.as_ref().unwrap(), self.right.as_ref().unwrap());
        assert_eq!(left.manifest_root, right.manifest_root);
        assert_eq!(
            (left.pages, left.zero_pages, left.rounds),
            (right.pages, right.zero_pages, right.rounds)
        );
        assert_eq!(self.destination.active, Some(left.epoch));
    }

    /// The source's guest runs as before; nothing is left at the destination.
    pub fn assert_stayed(&self) {
        assert!(self.left.is_err() && self.right.is_err());
        assert!(
            self.left.as_ref().unwrap_err().guest_runs_here(),
            "{:?}",
            self.left
        );
        assert!(self.source.running && !self.source.destroyed && !self.source.released);
        assert!(self.destination.active.is_none());
        assert!(!self.destination.admitted || self.destination.abandoned);
    }
}

pub fn direct(
    source: &SourceConfig,
    destination: &DestinationConfig,
    from: ToySource,
    to: ToyDestination,
) -> Run {
    let (a, b) = tcp_pair();
    std::thread::scope(|scope| run(scope, source, destination, from, to, (a, b), || None))
}

pub type Hook<'a> = &'a mut (dyn FnMut(Direction, Frame) -> Action + Send);

pub fn through(
    gateway: &Gateway,
    source: &SourceConfig,
    destination: &DestinationConfig,
    from: ToySource,
    to: ToyDestination,
    hook: Hook<'_>,
) -> Run {
    let ((a, ga), (gb, b)) = (tcp_pair(), tcp_pair());
    std::thread::scope(|scope| {
        let relay = scope.spawn(move || gateway.run(ga, gb, hook));
        run(scope, source, destination, from, to, (a, b), || {
            Some(relay.join().unwrap())
        })
    })
}

fn run<'scope>(
    scope: &'scope std::thread::Scope<'scope, '_>,
    source: &'scope SourceConfig,
    destination: &'scope DestinationConfig,
    mut from: ToySource,
    mut to: ToyDestination,
    (a, b): (TcpStream, TcpStream),
    gateway: impl FnOnce() -> Option<Result<GatewayReport, GatewayError>>,
) -> Run {
    let receiver = scope.spawn(move || {
        let result = destination::receive(b, destination, &mut to, &mut |_| {});
        (result, to)
    });
    let mut source_progress = Vec::new();
    let offer = from.offer(41);
    let left = source::migrate(a, source, &offer, &mut from, &mut |event| {
        source_progress.push(event)
    });
    let (right, to) = receiver.join().unwrap();
    Run {
        source: from,
        destination: to,
        left,
        right,
        gateway: gateway(),
        source_progress,
    }
}

/// Forwards everything, keeping a copy of all that a gateway sees.
pub fn recorder(
    seen: &Arc<Mutex<Vec<u8>>>,
) -> impl FnMut(Direction, Frame) -> Action + Send + use<> {
    let seen = seen.clone();
    move |_, frame| {
        seen.lock()
            .unwrap()
            .extend_from_slice(&frame.encode().unwrap());
        frame.into()
    }
}
