//! Everything the demo and the lab tests happen in: two sites, their certificates, a relay, an owner, a guest.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use casemate_attest::processor::Identity;
use casemate_crypto_migrate::Provider;
use casemate_crypto_migrate::dev_ca::{DevCa, HostMaterial};
use casemate_crypto_migrate::identity::Local;
use casemate_crypto_migrate::identity::{
    AllowList, AllowedPeer, Path as PeerPath, Pinned, TrustAnchors,
};

use crate::answers::GuestInfo;
use crate::cleanup::{Cleanup, Traces};
use crate::error::{E2eError, OnFile, Result};
use crate::guest_watch::GuestWatch;
use crate::network::{BRIDGE, GUEST, Network, RELAY, SITE_A, SITE_B};
use crate::owner::{Owner, Session, text};
use crate::relay::Relay;
use crate::site::{PeerSpec, Site, SiteSpec};

/// What is demonstrated and tested.
#[derive(Clone, Debug)]
pub struct Product {
    /// The `casemate` program.
    pub casemate: PathBuf,
    /// The guest's kernel, a bzImage.
    pub kernel: PathBuf,
    /// The guest's initramfs.
    pub initrd: PathBuf,
}

impl Product {
    /// From the environment: what the lab runner ships, or `CASEMATE_BIN`, `CASEMATE_KERNEL`, `CASEMATE_INITRD`.
    pub fn from_env() -> Result<Self> {
        let find = |own: &str, shipped: &str| {
            let value = std::env::var_os(own).or_else(|| std::env::var_os(shipped));
            let missing = || {
                E2eError::Answer(format!(
                    "neither {own} nor {shipped} is set; run this through `cargo verify`"
                ))
            };
            value.map(PathBuf::from).ok_or_else(missing)
        };
        Ok(Self {
            casemate: find("CASEMATE_BIN", "LAB_CASEMATE")?,
            kernel: find("CASEMATE_KERNEL", "LAB_GUEST_KERNEL")?,
            initrd: find("CASEMATE_INITRD", "LAB_GUEST_INITRD")?,
        })
    }
}

/// The world. Fields are dropped in this order: agents before the network they live in.
pub struct World {
    /// First host.
    pub site_a: Site,
    /// Second host.
    pub site_b: Site,
    /// The second host's agent for guests that come through the gateway.
    pub site_b_gw: Option<Site>,
    /// On the direct path, where no relay may be.
    pub intruder: Option<Relay>,
    /// On the path on which the policies name it.
    pub gateway: Option<Relay>,
    /// The relay's certificate, and whom it knows.
    pub relay_local: Local,
    /// The guest's owner.
    pub owner: Owner,
    /// Namespaces.
    pub network: Network,
    /// What is under test.
    pub product: Product,
    /// All files.
    pub folder: PathBuf,
    /// What was there before.
    pub before: Traces,
    cleanup: Cleanup,
}

/// How much of a world is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// The two sites.
    Direct,
    /// And the relay, with the second agent that expects it.
    WithGateway,
    /// The two sites, each with a place of its own for disks that come with their guests: no storage is shared.
    OwnDisks,
}

/// A host of the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    /// site-a
    A,
    /// site-b
    B,
    /// site-b, through the gateway
    BGw,
}

impl World {
    /// Builds it below `folder`, which must not exist yet.
    pub fn build(
        product: &Product,
        folder: &Path,
        cleanup: &Cleanup,
        extent: Extent,
    ) -> Result<Self> {
        let before = Traces::survey(&product.casemate);
        cleanup.folder(folder)?;
        let network = Network::build()?;
        let disk = folder.join("data.raw");
        File::create(&disk)
            .and_then(|f| f.set_len(DISK))
            .on("create", &disk)?;
        let certificates = Certificates::issue()?;
        let platforms = Platforms::generate()?;
        let make = Maker {
            product,
            folder,
            cleanup,
            network: &network,
            disk: (extent != Extent::OwnDisks).then_some(&disk),
            certificates,
            platforms,
        };
        let gateway = extent == Extent::WithGateway;
        let mut site_a = make.site_a()?;
        let mut site_b = make.site_b()?;
        let mut site_b_gw = if gateway {
            Some(make.site_b_gw()?)
        } else {
            None
        };
        let relay_local = make.certificates.relay_local()?;
        let relay = |port, target| {
            Relay::start(
                &network.relay,
                SocketAddr::from((RELAY, port)),
                SocketAddr::from((SITE_B, target)),
                relay_local.clone(),
            )
        };
        let intruder = if gateway {
            Some(relay(DIRECT, DIRECT)?)
        } else {
            None
        };
        let through = if gateway {
            Some(relay(VIA_GATEWAY, VIA_GATEWAY)?)
        } else {
            None
        };
        for site in [&mut site_a, &mut site_b].into_iter().chain(&mut site_b_gw) {
            site.wait_ready()?;
        }
        let owner = Owner::new(&folder.join("owner"))?;
        let (product, folder, cleanup) = (product.clone(), folder.to_owned(), cleanup.clone());
        drop(make);
        Ok(Self {
            site_a,
            site_b,
            site_b_gw,
            intruder,
            gateway: through,
            relay_local,
            owner,
            network,
            product,
            folder,
            before,
            cleanup,
        })
    }

    /// One host.
    pub fn site(&self, host: Host) -> Result<&Site> {
        match host {
            Host::A => Ok(&self.site_a),
            Host::B => Ok(&self.site_b),
            Host::BGw => self
                .site_b_gw
                .as_ref()
                .ok_or_else(|| E2eError::Answer("this world has no gateway".into())),
        }
    }

    /// The relay on the gateway path.
    pub fn gateway(&self) -> Result<&Relay> {
        self.gateway
            .as_ref()
            .ok_or_else(|| E2eError::Answer("this world has no gateway".into()))
    }

    /// The relay on the direct path.
    pub fn intruder(&self) -> Result<&Relay> {
        self.intruder
            .as_ref()
            .ok_or_else(|| E2eError::Answer("this world has no relay".into()))
    }

    /// Writes the description of the guest with disk, network card and vsock.
    pub fn describe(&self, name: &str) -> Result<PathBuf> {
        let [a, b, c, d, e, f] = GUEST_MAC;
        let devices = format!(
            "\n[[disk]]\nid = \"data\"\npath = \"{}\"\n\n[[net]]\nid = \"net0\"\ntap = \"tap0\"\nbridge = \"{BRIDGE}\"\n\
             mac = \"{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}\"\nannounce = [\"{GUEST}\"]\n\n[vsock]\ncid = 10\n",
            self.folder.join("data.raw").display()
        );
        self.write_description(
            &format!("{name}.toml"),
            name,
            &self.product.kernel,
            &devices,
        )
    }

    /// Writes a description without devices, with any kernel.
    pub fn describe_bare(&self, file: &str, name: &str, kernel: &Path) -> Result<PathBuf> {
        self.write_description(file, name, kernel, "")
    }

    fn write_description(
        &self,
        file: &str,
        name: &str,
        kernel: &Path,
        devices: &str,
    ) -> Result<PathBuf> {
        let text = format!(
            "name = \"{name}\"\nvcpus = 2\nmemory = \"512 MiB\"\n\n[boot]\nkernel = \"{}\"\ninitrd = \"{}\"\n\
             cmdline = \"console=ttyS0 quiet panic=-1 reboot=k casemate.ip={GUEST}/24 casemate.dirty_mib=32 \
             casemate.dirty_pages_per_tick=16\"\n\n[confidential]\ntechnology = \"sev\"\nsecret = true\n{devices}",
            kernel.display(),
            self.product.initrd.display()
        );
        let path = self.folder.join(file);
        fs::write(&path, text).on("write", &path)?;
        Ok(path)
    }

    /// `casemate run` on site-a, bound to the owner's session.
    pub fn launch(&self, description: &Path, session: &Session) -> Result<GuestInfo> {
        self.site_a.ask(&[
            "run",
            text(description)?,
            "--owner-session",
            text(&session.for_host)?,
        ])
    }

    /// Launches the guest on site-a, has the owner release its secret, and waits until it works.
    pub fn running_guest(&self, name: &str) -> Result<(GuestInfo, GuestWatch)> {
        let description = self.describe(name)?;
        let session = self.owner.session(&self.site_a, name, &description)?;
        let info = self.launch(&description, &session)?;
        let (status, release) = self
            .owner
            .release(&self.site_a, &session, name, &description)?;
        if status != 0 {
            return Err(E2eError::Answer(format!(
                "the owner refused: {:?}",
                release.verdict.failed()
            )));
        }
        let mut watch = GuestWatch::new(&info.console);
        watch.wait("the guest's `ready`", BOOT, |w| w.ready)?;
        watch.wait_ticks(5, BOOT)?;
        Ok((info, watch))
    }

    /// The guest as a host shows it; after a move the destination may need a moment to say so.
    pub fn status(&self, host: Host, guest: &str) -> Result<GuestInfo> {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match self.site(host)?.ask(&["status", guest]) {
                Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(50)),
                other => return other,
            }
        }
    }

    /// Ends all agents and says what they left: processes, cgroups, links, files.
    pub fn end(mut self) -> Result<Vec<String>> {
        self.gateway = None;
        self.intruder = None;
        for site in [&mut self.site_a, &mut self.site_b]
            .into_iter()
            .chain(&mut self.site_b_gw)
        {
            site.stop()?;
        }
        let mut left = Traces::settle(&self.product.casemate, &self.before, SETTLE);
        left.extend(self.network.left_behind()?);
        self.cleanup.end();
        if self.folder.exists() {
            left.push(format!("folder {}", self.folder.display()));
        }
        Ok(left)
    }
}

/// The certificates of the site authority.
struct Certificates {
    ca: DevCa,
    site_a: HostMaterial,
    site_b: HostMaterial,
    site_b_gw: HostMaterial,
    site_b_relayed: HostMaterial,
    gateway: HostMaterial,
}

impl Certificates {
    fn issue() -> Result<Self> {
        let ca = DevCa::new("demo")?;
        Ok(Self {
            site_a: ca.issue("site-a.casemate.test")?,
            site_b: ca.issue("site-b.casemate.test")?,
            site_b_gw: ca.issue("site-b-gw.casemate.test")?,
            site_b_relayed: ca.issue("site-b-relayed.casemate.test")?,
            gateway: ca.issue("gateway.casemate.test")?,
            ca,
        })
    }

    /// The relay trusts and names both hosts: it is a member of the site in good standing.
    fn relay_local(&self) -> Result<Local> {
        let peer = |name: &str, material: &HostMaterial| -> Result<AllowedPeer> {
            Ok(AllowedPeer {
                name: name.into(),
                identity: material.pinned()?,
                path: PeerPath::Direct,
            })
        };
        let allow = AllowList::new(vec![
            peer("site-a", &self.site_a)?,
            peer("site-b", &self.site_b)?,
            peer("site-b-gw", &self.site_b_gw)?,
        ]);
        let anchors = TrustAnchors::from_pem(self.ca.certificate_pem())?;
        Ok(Local {
            identity: self.gateway.identity()?,
            anchors,
            allow,
            provider: Provider::default(),
        })
    }
}

/// Two emulated platforms; made beforehand, as each host's policy names the other's root.
struct Platforms {
    a: Identity,
    b: Identity,
}

impl Platforms {
    fn generate() -> Result<Self> {
        let failed = |e: &dyn std::fmt::Display| E2eError::Platform(e.to_string());
        let other = thread::spawn(Identity::generate);
        let a = Identity::generate().map_err(|e| failed(&e))?;
        let b = other
            .join()
            .map_err(|_| failed(&"its thread panicked"))?
            .map_err(|e| failed(&e))?;
        Ok(Self { a, b })
    }

    fn roots(&self) -> [String; 2] {
        [&self.a, &self.b]
            .map(|platform| format!("sha256:{}", hex::encode(platform.root_fingerprint())))
    }
}

struct Maker<'a> {
    product: &'a Product,
    folder: &'a Path,
    cleanup: &'a Cleanup,
    network: &'a Network,
    /// The disk that the hosts share, if they do.
    disk: Option<&'a Path>,
    certificates: Certificates,
    platforms: Platforms,
}

impl Maker<'_> {
    fn site_a(&self) -> Result<Site> {
        let certificates = &self.certificates;
        let gateway = Some(certificates.gateway.pinned()?);
        let peers = vec![
            peer("site-b", &certificates.site_b, None, Some((SITE_B, DIRECT)))?,
            peer(
                "site-b-relayed",
                &certificates.site_b_relayed,
                None,
                Some((RELAY, DIRECT)),
            )?,
            peer(
                "site-b-gw",
                &certificates.site_b_gw,
                gateway,
                Some((RELAY, VIA_GATEWAY)),
            )?,
        ];
        self.start(
            "site-a",
            (SITE_A, DIRECT),
            &certificates.site_a,
            peers,
            200_000,
        )
    }

    fn site_b(&self) -> Result<Site> {
        let peers = vec![peer(
            "site-a",
            &self.certificates.site_a,
            None,
            Some((SITE_A, DIRECT)),
        )?];
        self.start(
            "site-b",
            (SITE_B, DIRECT),
            &self.certificates.site_b,
            peers,
            210_000,
        )
    }

    fn site_b_gw(&self) -> Result<Site> {
        let gateway = Some(self.certificates.gateway.pinned()?);
        let peers = vec![peer("site-a", &self.certificates.site_a, gateway, None)?];
        self.start(
            "site-b-gw",
            (SITE_B, VIA_GATEWAY),
            &self.certificates.site_b_gw,
            peers,
            220_000,
        )
    }

    fn start(
        &self,
        name: &'static str,
        listen: (Ipv4Addr, u16),
        material: &HostMaterial,
        peers: Vec<PeerSpec>,
        uid_base: u32,
    ) -> Result<Site> {
        let on_a = listen.0 == SITE_A;
        let platform = if on_a {
            &self.platforms.a
        } else {
            &self.platforms.b
        }
        .to_bytes();
        let own = self.folder.join(format!("{name}.raw"));
        let spec = SiteSpec {
            name,
            namespace: if on_a {
                &self.network.site_a
            } else {
                &self.network.site_b
            },
            listen: Some(SocketAddr::from(listen)),
            material,
            authority: self.certificates.ca.certificate_pem(),
            platform: Some(&platform),
            snp: None,
            trusted_roots: &self.platforms.roots(),
            peers,
            disk: Some(self.disk.unwrap_or(&own)),
            uid_base,
        };
        Site::start(&spec, &self.product.casemate, self.folder, self.cleanup)
    }
}

fn peer(
    name: &'static str,
    material: &HostMaterial,
    gateway: Option<Pinned>,
    address: Option<(Ipv4Addr, u16)>,
) -> Result<PeerSpec> {
    Ok(PeerSpec {
        name,
        identity: material.pinned()?,
        gateway,
        address: address.map(SocketAddr::from),
    })
}

/// The guest's card.
pub const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x77, 0x00, 0x10];
/// Longest boot, with room for a slow machine.
pub const BOOT: Duration = Duration::from_secs(60);
/// Port of the direct path.
pub const DIRECT: u16 = 7400;
/// Port of the path through the gateway.
pub const VIA_GATEWAY: u16 = 7401;
const DISK: u64 = 16 << 20;
const SETTLE: Duration = Duration::from_secs(5);
