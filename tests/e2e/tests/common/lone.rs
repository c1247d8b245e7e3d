//! One host with a processor of its own, whose guests prove themselves to their owners.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use casemate_attest::processor::snp::{CaKeySize, SnpIdentity};
use casemate_attest::report::Report;
use casemate_crypto_migrate::dev_ca::DevCa;
use casemate_e2e::answers::GuestInfo;
use casemate_e2e::cleanup::Cleanup;
use casemate_e2e::guest_watch::ask;
use casemate_e2e::network::{Network, SITE_A};
use casemate_e2e::owner::text;
use casemate_e2e::site::{Said, Site, SiteSpec};
use casemate_e2e::world::{DIRECT, Product};
use serde::Deserialize;

use super::{folder, product};

/// The host, its SEV-SNP identity, and a folder for its owner's files.
pub struct Lone {
    pub site: Site,
    identity: SnpIdentity,
    pub folder: PathBuf,
    pub product: Product,
    cleanup: Cleanup,
    _network: Network,
}

#[derive(Deserialize)]
struct Measured {
    launch_digest: String,
}

#[derive(Deserialize)]
struct Reported {
    ok: bool,
    report: Option<String>,
    said: Option<String>,
    error: Option<String>,
}

impl Lone {
    pub fn new(name: &'static str, uid_base: u32) -> Self {
        let (product, folder, cleanup) = (product(), folder(name), Cleanup::new());
        cleanup.folder(&folder).unwrap();
        let network = Network::build().unwrap();
        let ca = DevCa::new("test").unwrap();
        // Smaller keys than AMD's: an emulated machine takes minutes to make those.
        let identity = SnpIdentity::generate_with(CaKeySize::Rsa2048).unwrap();
        let spec = SiteSpec {
            name,
            namespace: &network.site_a,
            listen: Some(SocketAddr::from((SITE_A, DIRECT))),
            material: &ca.issue(&format!("{name}.casemate.test")).unwrap(),
            authority: ca.certificate_pem(),
            platform: None,
            snp: Some(&identity.to_bytes().unwrap()),
            trusted_roots: &[],
            peers: Vec::new(),
            disk: None,
            uid_base,
        };
        let mut site = Site::start(&spec, &product.casemate, &folder, &cleanup).unwrap();
        site.wait_ready().unwrap();
        Self {
            site,
            identity,
            folder,
            product,
            cleanup,
            _network: network,
        }
    }

    pub fn describe(&self, name: &str, section: &str, cid: u32) -> PathBuf {
        self.describe_boot(name, &format!("cmdline = \"{CMDLINE}\""), section, cid)
    }

    /// `boot` is the command line, and firmware if there shall be any.
    pub fn describe_boot(&self, name: &str, boot: &str, section: &str, cid: u32) -> PathBuf {
        let text = format!(
            "name = \"{name}\"\nvcpus = 2\nmemory = \"256 MiB\"\n\n[boot]\nkernel = \"{}\"\ninitrd = \"{}\"\n\
             {boot}\n\n[confidential]\n{section}\n\n[vsock]\ncid = {cid}\n",
            self.product.kernel.display(),
            self.product.initrd.display()
        );
        let path = self.folder.join(format!("{name}.toml"));
        fs::write(&path, text).unwrap();
        path
    }

    pub fn run(&self, description: &Path) -> GuestInfo {
        self.site.ask(&["run", text(description).unwrap()]).unwrap()
    }

    pub fn measured(&self, description: &Path) -> String {
        let words = ["owner", "measure", text(description).unwrap()];
        self.site.ask::<Measured>(&words).unwrap().launch_digest
    }

    /// The owner signs what shall be launched.
    pub fn id_block(&self, description: &Path) -> PathBuf {
        let folder = self.folder.join("id");
        let key = self.folder.join("id.key");
        let done = |words: &[&str]| drop(self.site.done(words).unwrap());
        done(&["attest", "id-block", "key", "--out", text(&key).unwrap()]);
        let digest = self.measured(description);
        done(&[
            "attest",
            "id-block",
            "make",
            "--digest",
            &digest,
            "--id-key",
            text(&key).unwrap(),
            "--policy",
            "0x30000",
            "--out",
            text(&folder).unwrap(),
        ]);
        folder
    }

    pub fn report(&self, info: &GuestInfo, nonce: &str) -> PathBuf {
        let answer: Reported =
            ask(info.vsock.as_ref().unwrap(), &format!("report {nonce}")).unwrap();
        assert!(answer.ok, "{:?}", answer.error);
        assert!(answer.said.unwrap().to_lowercase().contains("emulated"));
        let path = self.folder.join("report.hex");
        fs::write(&path, answer.report.unwrap()).unwrap();
        path
    }

    /// The guest's report shows the expected digest, and its owner accepts it.
    pub fn proves(&self, info: &GuestInfo, nonce: &str, expected: &str) {
        let report = self.report(info, nonce);
        let raw = hex::decode(fs::read_to_string(&report).unwrap()).unwrap();
        let shown = Report::parse(&raw).unwrap().measurement();
        assert_eq!(hex::encode(shown), expected);
        let accepted = self.verify(&report, nonce, true);
        assert_eq!(accepted.status, 0, "{accepted:?}");
    }

    pub fn verify(&self, report: &Path, nonce: &str, allow: bool) -> Said {
        let root = format!("sha256:{}", hex::encode(self.identity.root_fingerprint()));
        let chain = self.folder.join("platform");
        let words = ["platform", "export", "--out", text(&chain).unwrap()];
        self.site.done(&words).unwrap();
        let description = self.folder.join("proof.toml");
        let policy = self.folder.join("owner.toml");
        let rules = format!(
            "{}emulated_roots = [\"{root}\"]\nmeasurements = [\"{}\"]\n\n[launch]\nhost_data = [\"{HOST_DATA}\"]\n\
             require_id_key = true\n",
            if allow { "allow_emulated = true\n" } else { "" },
            self.measured(&description)
        );
        fs::write(&policy, rules).unwrap();
        let (leaf, chain_text) = (chain.join("vcek.pem"), text(&chain).unwrap());
        let words = [
            "attest",
            "verify",
            "--report",
            text(report).unwrap(),
            "--leaf",
            text(&leaf).unwrap(),
            "--chain",
            chain_text,
            "--policy",
            text(&policy).unwrap(),
            "--nonce",
            nonce,
            "--allow-emulated",
            &root,
        ];
        self.site.casemate(&words).unwrap()
    }

    /// Refused before anything starts, with the reason and what to do instead.
    pub fn does_not_move(&self, guest: &str) {
        let said = self
            .site
            .casemate(&["migrate", guest, "--to", "anywhere"])
            .unwrap();
        assert_eq!(said.code(), "POLICY_TECHNOLOGY_CANNOT_MIGRATE", "{said:?}");
        assert!(said.stderr.contains("relaunch"), "{said:?}");
        let info: GuestInfo = self.site.ask(&["status", guest]).unwrap();
        assert_eq!(info.state, "running");
    }

    pub fn end(mut self) {
        self.site.stop().unwrap();
        self.cleanup.end();
    }
}

/// What every guest of these hosts is told.
pub const CMDLINE: &str = "console=ttyS0 quiet panic=-1 reboot=k casemate.dirty_mib=8";
/// What their reports show.
pub const HOST_DATA: &str = "5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a";
