//! SEV-SNP and SEV-ES guests, emulated: a Linux guest gets its report, its owner verifies it, and neither guest moves.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use casemate_attest::processor::snp::{CaKeySize, SnpIdentity};
use casemate_crypto_migrate::dev_ca::DevCa;
use casemate_e2e::answers::GuestInfo;
use casemate_e2e::cleanup::Cleanup;
use casemate_e2e::guest_watch::{GuestWatch, ask};
use casemate_e2e::network::{Network, SITE_A};
use casemate_e2e::owner::{Owner, text};
use casemate_e2e::site::{Said, Site, SiteSpec};
use casemate_e2e::world::{BOOT, DIRECT, Product};
use common::*;
use serde::Deserialize;

#[test]
fn a_guest_proves_itself_to_its_owner_and_a_policy_without_emulation_refuses_it() {
    let lone = Lone::new("report", 240_000);
    let description = lone.describe("proof", "technology = \"sev-snp\"", 20);
    let id = lone.id_block(&description);
    let section = format!(
        "technology = \"sev-snp\"\nhost_data = \"{HOST_DATA}\"\nid_block = \"{}\"\nid_auth = \"{}\"",
        id.join("id-block.bin").display(),
        id.join("id-auth.bin").display()
    );
    let description = lone.describe("proof", &section, 20);
    let info = lone.run(&description);
    assert_eq!((info.technology.as_str(), info.emulated), ("sev-snp", true));
    let mut watch = GuestWatch::new(&info.console);
    watch
        .wait("the guest's `ready`", BOOT, |w| w.ready)
        .unwrap();

    for nonce in ["11".repeat(64), "22".repeat(64)] {
        let report = lone.report(&info, &nonce);
        let accepted = lone.verify(&report, &nonce, true);
        assert_eq!(accepted.status, 0, "{accepted:?}");
        assert!(
            accepted.stdout.contains("\"emulated\":true"),
            "{accepted:?}"
        );
        let refused = lone.verify(&report, &nonce, false);
        assert_eq!(refused.status, 1, "{refused:?}");
        assert!(
            refused.stdout.contains("EMULATED_NOT_ALLOWED"),
            "{refused:?}"
        );
        let stale = lone.verify(&report, &"33".repeat(64), true);
        assert_eq!(stale.status, 1, "{stale:?}");
    }
    lone.does_not_move("proof");
    watch.wait_ticks(5, BOOT).unwrap();
    assert_eq!(watch.problems, Vec::<String>::new());
    lone.end();
}

#[test]
fn a_sev_es_guest_gets_its_secret_and_auto_is_the_strongest_that_there_is() {
    let lone = Lone::new("registers", 250_000);
    let owner = Owner::new(&lone.folder.join("owner")).unwrap();
    let section = "technology = \"sev-es\"\nsecret = true";
    let description = lone.describe("registers", section, 21);
    let session = owner
        .session(&lone.site, "registers", &description)
        .unwrap();
    // The description may name the owner's session itself.
    let bound = format!(
        "{section}\nowner_session = \"{}\"",
        session.for_host.display()
    );
    let description = lone.describe("registers", &bound, 21);
    let info = lone.run(&description);
    assert_eq!(info.technology, "sev-es");
    let (status, release) = owner
        .release(&lone.site, &session, "registers", &description)
        .unwrap();
    assert_eq!(
        (status, release.released),
        (0, true),
        "{:?}",
        release.verdict.failed()
    );
    let mut watch = GuestWatch::new(&info.console);
    watch
        .wait("the guest's `ready`", BOOT, |w| w.ready)
        .unwrap();
    assert_eq!(watch.secret_sha256, Some(owner.secret_sha256()));
    lone.does_not_move("registers");
    lone.site.done(&["stop", "registers"]).unwrap();

    let description = lone.describe("any", "technology = \"auto\"", 22);
    assert_eq!(lone.run(&description).technology, "sev-snp");
    let said = lone
        .site
        .casemate(&["owner", "measure", text(&description).unwrap()]);
    assert!(
        said.unwrap().stderr.contains("name one"),
        "one measurement to expect"
    );
    lone.end();
}

/// One host with a SEV-SNP identity, and a folder for its owner's files.
struct Lone {
    site: Site,
    identity: SnpIdentity,
    folder: PathBuf,
    product: Product,
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
    fn new(name: &'static str, uid_base: u32) -> Self {
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

    fn describe(&self, name: &str, section: &str, cid: u32) -> PathBuf {
        let text = format!(
            "name = \"{name}\"\nvcpus = 2\nmemory = \"256 MiB\"\n\n[boot]\nkernel = \"{}\"\ninitrd = \"{}\"\n\
             cmdline = \"console=ttyS0 quiet panic=-1 reboot=k casemate.dirty_mib=8\"\n\n[confidential]\n{section}\n\n\
             [vsock]\ncid = {cid}\n",
            self.product.kernel.display(),
            self.product.initrd.display()
        );
        let path = self.folder.join(format!("{name}.toml"));
        fs::write(&path, text).unwrap();
        path
    }

    fn run(&self, description: &Path) -> GuestInfo {
        self.site.ask(&["run", text(description).unwrap()]).unwrap()
    }

    fn measured(&self, description: &Path) -> String {
        let words = ["owner", "measure", text(description).unwrap()];
        self.site.ask::<Measured>(&words).unwrap().launch_digest
    }

    /// The owner signs what shall be launched.
    fn id_block(&self, description: &Path) -> PathBuf {
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

    fn report(&self, info: &GuestInfo, nonce: &str) -> PathBuf {
        let answer: Reported =
            ask(info.vsock.as_ref().unwrap(), &format!("report {nonce}")).unwrap();
        assert!(answer.ok, "{:?}", answer.error);
        assert!(answer.said.unwrap().to_lowercase().contains("emulated"));
        let path = self.folder.join("report.hex");
        fs::write(&path, answer.report.unwrap()).unwrap();
        path
    }

    fn verify(&self, report: &Path, nonce: &str, allow: bool) -> Said {
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
    fn does_not_move(&self, guest: &str) {
        let said = self
            .site
            .casemate(&["migrate", guest, "--to", "anywhere"])
            .unwrap();
        assert_eq!(said.code(), "POLICY_TECHNOLOGY_CANNOT_MIGRATE", "{said:?}");
        assert!(said.stderr.contains("relaunch"), "{said:?}");
        let info: GuestInfo = self.site.ask(&["status", guest]).unwrap();
        assert_eq!(info.state, "running");
    }

    fn end(mut self) {
        self.site.stop().unwrap();
        self.cleanup.end();
    }
}

const HOST_DATA: &str = "5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a";
