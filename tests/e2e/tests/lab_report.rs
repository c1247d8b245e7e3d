//! SEV-SNP and SEV-ES guests, emulated: a Linux guest gets its report, its owner verifies it, and neither guest moves.

mod common;

use casemate_e2e::guest_watch::GuestWatch;
use casemate_e2e::owner::{Owner, text};
use casemate_e2e::world::BOOT;
use common::lone::{HOST_DATA, Lone};

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
