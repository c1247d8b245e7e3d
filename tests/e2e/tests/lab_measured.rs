//! Measured direct boot, emulated: OVMF checks Debian's kernel against hashes that were measured with it, and starts it.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use casemate_e2e::guest_watch::GuestWatch;
use casemate_e2e::owner::{Owner, text};
use casemate_e2e::world::BOOT;
use common::lone::{CMDLINE, HOST_DATA, Lone};
use serde::Deserialize;

#[test]
fn a_guest_that_its_firmware_started_reports_the_digest_that_anybody_computes() {
    let lone = Lone::new("measured", 260_000);
    let section = "technology = \"sev-snp\"";
    let description = lone.describe_boot("proof", &boot(SNP_WORDS), section, 23);
    let id = lone.id_block(&description);
    let section = format!(
        "{section}\nhost_data = \"{HOST_DATA}\"\nid_block = \"{}\"\nid_auth = \"{}\"",
        id.join("id-block.bin").display(),
        id.join("id-auth.bin").display()
    );
    let description = lone.describe_boot("proof", &boot(SNP_WORDS), &section, 23);
    let expected = lone.measured(&description);
    assert_eq!(expected, computed(&lone, "snp", SNP_WORDS));

    let info = lone.run(&description);
    assert_eq!((info.technology.as_str(), info.emulated), ("sev-snp", true));
    let mut watch = GuestWatch::new(&info.console);
    watch
        .wait("the guest's `ready`", BOOT, |w| w.ready)
        .unwrap();
    assert_started_by_firmware(&info.console);

    lone.proves(&info, &"44".repeat(64), &expected);
    lone.does_not_move("proof");
    watch.wait_ticks(5, BOOT).unwrap();
    assert_eq!(watch.problems, Vec::<String>::new());
    lone.end();
}

#[test]
fn sev_and_sev_es_guests_get_their_secret_where_their_firmware_has_a_place_for_it() {
    let lone = Lone::new("sealed", 270_000);
    let owner = Owner::new(&lone.folder.join("owner")).unwrap();
    for (technology, cid) in [("sev", 24), ("sev-es", 25)] {
        let section = format!("technology = \"{technology}\"\nsecret = true");
        let description = lone.describe_boot(technology, &boot(SECRET_WORDS), &section, cid);
        let expected = lone.measured(&description);
        assert_eq!(expected, computed(&lone, technology, SECRET_WORDS));
        let session = owner.session(&lone.site, technology, &description).unwrap();
        let bound = format!(
            "{section}\nowner_session = \"{}\"",
            session.for_host.display()
        );
        let description = lone.describe_boot(technology, &boot(SECRET_WORDS), &bound, cid);
        let info = lone.run(&description);
        let (status, release) = owner
            .release(&lone.site, &session, technology, &description)
            .unwrap();
        assert!(release.released, "{:?}", release.verdict.failed());
        assert_eq!(status, 0);
        let mut watch = GuestWatch::new(&info.console);
        watch
            .wait("the guest's `ready`", BOOT, |w| w.ready)
            .unwrap();
        assert_started_by_firmware(&info.console);
        assert_eq!(watch.secret_sha256, Some(owner.secret_sha256()));
        lone.site.done(&["stop", technology]).unwrap();
    }
    lone.end();
}

#[derive(Deserialize)]
struct Computed {
    digest: String,
}

/// The lines of a `[boot]` section beside kernel and initramfs.
fn boot(words: &str) -> String {
    let firmware = firmware();
    format!(
        "firmware = \"{}\"\ncmdline = \"{CMDLINE} {words}\"",
        firmware.display()
    )
}

/// The digest as `casemate attest measure` computes it from the files, for the VMM that everybody knows.
fn computed(lone: &Lone, mode: &str, words: &str) -> String {
    let (firmware, line) = (firmware(), format!("{CMDLINE} {words}"));
    let mut asked = vec!["attest", "measure", "--mode", mode];
    let files = [&firmware, &lone.product.kernel, &lone.product.initrd];
    for (option, file) in ["--ovmf", "--kernel", "--initrd"].into_iter().zip(files) {
        asked.extend([option, text(file).unwrap()]);
    }
    asked.extend(["--append", &line]);
    if mode != "sev" {
        asked.extend(["--vcpus", "2", "--vcpu-sig", "0"]);
    }
    lone.site.ask::<Computed>(&asked).unwrap().digest
}

/// OVMF adds a word to the command line that it hands to the kernel; the measured one has it not.
fn assert_started_by_firmware(console: &Path) {
    let said = fs::read_to_string(console).unwrap();
    assert!(said.contains("[2J"), "firmware clears no screen: {said}");
}

fn firmware() -> PathBuf {
    let path = std::env::var_os("LAB_FIRMWARE_AMDSEV");
    path.unwrap_or_else(|| {
        panic!("LAB_FIRMWARE_AMDSEV is not set; run this through `cargo verify`")
    })
    .into()
}

/// Where this firmware has SEV-SNP's pages, which Linux shall leave alone.
const SNP_WORDS: &str = "casemate.snp=0x80d000,0x80e000 memmap=8K$0x80d000";
/// Where it has room for a launch secret, which it tells Linux to leave alone.
const SECRET_WORDS: &str = "casemate.secret=0x810000,0xc00";
