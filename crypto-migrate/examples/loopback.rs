//! Moves a toy guest between two threads over a TCP loopback connection, and prints what was measured.
//!
//! `cargo run --release -p casemate-crypto-migrate --example loopback [MiB]`

use std::net::{TcpListener, TcpStream};

use casemate_crypto_migrate::Provider;
use casemate_crypto_migrate::destination::{self, DestinationConfig};
use casemate_crypto_migrate::dev_ca::{DevCa, HostMaterial};
use casemate_crypto_migrate::guest::{
    Admission, DestinationGuest, Gpn, GuestError, GuestOffer, PAGE_SIZE, PageContent, PageRange,
    Refusal, SourceGuest,
};
use casemate_crypto_migrate::identity::Local;
use casemate_crypto_migrate::identity::{AllowList, AllowedPeer, Path, PeerIdentity, TrustAnchors};
use casemate_crypto_migrate::pages::PageSet;
use casemate_crypto_migrate::session::SessionFacts;
use casemate_crypto_migrate::settlement::Settlement;
use casemate_crypto_migrate::source::{self, SourceConfig};
use casemate_crypto_migrate::transcript::ContentDigest;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mebibytes: usize = std::env::args()
        .nth(1)
        .map_or(Ok(64), |text| text.parse())?;

    // A site authority, two hosts, and each one's policy: whom it allows, and the way to it.
    let ca = DevCa::new("example")?;
    let (a, b) = (ca.issue("site-a.example")?, ca.issue("site-b.example")?);
    let local = |own: &HostMaterial,
                 name: &str,
                 peer: &HostMaterial|
     -> Result<Local, Box<dyn std::error::Error>> {
        let peer = AllowedPeer {
            name: name.into(),
            identity: peer.pinned()?,
            path: Path::Direct,
        };
        let anchors = TrustAnchors::from_pem(ca.certificate_pem())?;
        Ok(Local {
            identity: own.identity()?,
            anchors,
            allow: AllowList::new(vec![peer]),
            provider: Provider::default(),
        })
    };
    let source_config = SourceConfig::new(local(&a, "site-b", &b)?, "site-b");
    let destination_config = DestinationConfig::new(local(&b, "site-a", &a)?);

    let listener = TcpListener::bind("127.0.0.1:0")?;
    let transport = TcpStream::connect(listener.local_addr()?)?;
    transport.set_nodelay(true)?; // the last frames are small
    let receiver = std::thread::spawn(move || {
        let (transport, _) = listener.accept().map_err(|error| error.to_string())?;
        transport
            .set_nodelay(true)
            .map_err(|error| error.to_string())?;
        let mut guest = Copy(Vec::new());
        destination::receive(transport, &destination_config, &mut guest, &mut |_| {})
            .map(|outcome| (outcome, guest.0))
            .map_err(|error| format!("{}: {error}", error.code()))
    });

    let mut guest = Original(
        (0..mebibytes << 20)
            .map(|i| ((i * 31) >> 7) as u8)
            .collect(),
    );
    let offer = GuestOffer {
        vm_id: [1; 16],
        name: "toy".into(),
        epoch: 1,
        memory: guest.memory(),
        description: Vec::new(),
    };
    let outcome = source::migrate(
        transport,
        &source_config,
        &offer,
        &mut guest,
        &mut |event| {
            println!(
                "{:7} round {} pages {} bytes {}",
                event.phase, event.round, event.pages, event.bytes
            );
        },
    )?;
    let (received, memory) = receiver.join().map_err(|_| "the receiver panicked")??;
    assert_eq!(memory, guest.0);
    println!(
        "moved {} pages, {} of them zero, in {} ms ({:.0} MB/s), paused {:.1} ms (forecast {:.1}), manifest {}",
        outcome.pages,
        outcome.zero_pages,
        outcome.total_ms,
        outcome.throughput / 1e6,
        outcome.downtime_ms,
        outcome.estimated_downtime_ms,
        &received.manifest_root[..16],
    );
    Ok(())
}

/// A guest that never writes.
struct Original(Vec<u8>);

impl SourceGuest for Original {
    fn agreed(&mut self, session: &SessionFacts) -> Result<(), Refusal> {
        println!("agreed: {}, {}", session.suite, session.group);
        Ok(())
    }
    fn memory(&self) -> Vec<PageRange> {
        vec![PageRange {
            start: Gpn(0),
            count: (self.0.len() / PAGE_SIZE) as u64,
        }]
    }
    fn begin(&mut self, _: &[u8]) -> Result<Vec<u8>, GuestError> {
        Ok(Vec::new())
    }
    fn start_tracking(&mut self) -> Result<PageSet, GuestError> {
        Ok(PageSet::all(&self.memory()))
    }
    fn take_dirty(&mut self) -> Result<PageSet, GuestError> {
        Ok(PageSet::empty(&self.memory()))
    }
    fn read_pages(
        &mut self,
        pages: &[Gpn],
        emit: &mut dyn FnMut(Gpn, PageContent<'_>),
    ) -> Result<(), GuestError> {
        for page in pages {
            let start = page.0 as usize * PAGE_SIZE;
            let bytes = self
                .0
                .get(start..start + PAGE_SIZE)
                .ok_or_else(|| GuestError("no such page".into()))?;
            let zero = bytes.iter().all(|byte| *byte == 0);
            emit(
                *page,
                if zero {
                    PageContent::Zero
                } else {
                    PageContent::Data(bytes)
                },
            );
        }
        Ok(())
    }
    fn batch_pages(&self) -> usize {
        128
    }
    fn pause(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
    fn state(&mut self) -> Result<Vec<u8>, GuestError> {
        Ok(b"registers".to_vec())
    }
    fn judge(&mut self, _: &[u8]) -> Result<(), Refusal> {
        Ok(())
    }
    fn throttle(&mut self, _: u8) -> Result<(), GuestError> {
        Ok(())
    }
    fn attend(&mut self) {}
    fn content_digest(&mut self, pages: &PageSet) -> Result<[u8; 32], GuestError> {
        digest(&self.0, pages)
    }
    fn release(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
    fn resume(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
    fn destroy(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
}

/// What arrives.
struct Copy(Vec<u8>);

impl DestinationGuest for Copy {
    fn agreed(&mut self, _: &SessionFacts) -> Result<(), Refusal> {
        Ok(())
    }
    fn admit(&mut self, offer: &GuestOffer, peer: &PeerIdentity) -> Result<Admission, Refusal> {
        println!("offer of {} from {:?}", offer.name, peer.san);
        let pages: u64 = offer.memory.iter().map(|range| range.count).sum();
        self.0 = vec![0; pages as usize * PAGE_SIZE];
        Ok(Admission {
            evidence: Vec::new(),
        })
    }
    fn settle(&mut self, _: &GuestOffer, _: &PeerIdentity) -> Result<Settlement, Refusal> {
        Ok(Settlement::Never)
    }
    fn begin(&mut self, _: &[u8]) -> Result<(), GuestError> {
        Ok(())
    }
    fn write_pages(&mut self, page: Gpn, content: PageContent<'_>) -> Result<(), GuestError> {
        let start = page.0 as usize * PAGE_SIZE;
        let length = match content {
            PageContent::Data(data) => data.len(),
            _ => PAGE_SIZE,
        };
        let place = self
            .0
            .get_mut(start..start + length)
            .ok_or_else(|| GuestError("no such page".into()))?;
        match content {
            PageContent::Zero => place.fill(0),
            PageContent::Data(data) => place.copy_from_slice(data),
            PageContent::Firmware { .. } => {
                return Err(GuestError("a plain guest has no firmware packets".into()));
            }
        }
        Ok(())
    }
    fn flush(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
    fn restore(&mut self, _: &[u8]) -> Result<(), GuestError> {
        Ok(())
    }
    fn content_digest(&mut self, pages: &PageSet) -> Result<[u8; 32], GuestError> {
        digest(&self.0, pages)
    }
    fn activate(&mut self, epoch: u64) -> Result<u32, GuestError> {
        println!("running here, epoch {epoch}");
        Ok(0)
    }
    fn abandon(&mut self) {
        self.0.clear();
    }
}

fn digest(memory: &[u8], pages: &PageSet) -> Result<[u8; 32], GuestError> {
    ContentDigest::over(pages, |page, into| {
        let start = page.0 as usize * PAGE_SIZE;
        let bytes = memory.get(start..start + into.len());
        into.copy_from_slice(bytes.ok_or_else(|| GuestError("no such page".into()))?);
        Ok(())
    })
}
