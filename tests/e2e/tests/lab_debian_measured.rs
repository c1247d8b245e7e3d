//! The same Debian by measured direct boot, emulated: OVMF checks Debian's kernel, initramfs and command line against what
//! was launched, systemd comes up, and a program in it fetches a report that shows the digest that anybody computes.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::path::PathBuf;

use casemate_e2e::owner::text;
use common::debian::*;
use common::lone::{HOST_DATA, Lone};
use common::shipped;
use serde::Deserialize;

#[test]
#[ignore = "the lab's emulation ends most of these boots; by hand: cargo lab run --retries 4 PROGRAM --ignored"]
fn debian_boots_measured_and_its_report_shows_what_was_measured() {
    let lone = Lone::new("debian", 280_000);
    let description = describe(&lone, "");
    let id = lone.id_block(&description);
    let owner = format!(
        "host_data = \"{HOST_DATA}\"\nid_block = {:?}\nid_auth = {:?}\n",
        id.join("id-block.bin"),
        id.join("id-auth.bin")
    );
    let description = describe(&lone, &owner);
    let expected = lone.measured(&description);
    assert_eq!(expected, computed(&lone));

    let info = lone.run(&description);
    assert_eq!((info.technology.as_str(), info.emulated), ("sev-snp", true));
    let mut debian = Debian::up(&lone.site, &info);
    // Direct: no boot loader has been there, and OVMF adds a word of its own to the command line.
    let system = debian.system();
    assert_eq!(system.loader, "none");
    assert_eq!(system.cmdline, format!("initrd=initrd {CMDLINE}"));

    lone.proves(&info, &"45".repeat(64), &expected);

    debian.watch.update().unwrap();
    assert_eq!(debian.watch.problems, Vec::<String>::new());
    // Its power button: systemd-logind hears it, and unmounts what Debian has written to.
    let stop = ["vm", "stop", "proof", "--timeout", "120"];
    lone.site.done(&stop).unwrap();
    lone.end();
}

/// The published example, with the guest's program for reports on a disk.
fn describe(lone: &Lone, owner: &str) -> PathBuf {
    let agent = lone.folder.join("agent.raw");
    let mut program = fs::read(shipped("LAB_CASEMATE_AGENT")).unwrap();
    program.resize(program.len().next_multiple_of(512), 0);
    fs::write(&agent, program).unwrap();
    let path = lone.folder.join("proof.toml");
    let [firmware, kernel, initrd] = files();
    let disk = shipped("LAB_DEBIAN_DISK");
    let technology = format!("technology = \"sev-snp\"\n{owner}");
    let replaced = [
        ("\"measured\"", "\"proof\""),
        ("1 GiB", "512 MiB"),
        ("\"OVMF.amdsev.fd\"", &format!("{firmware:?}")),
        ("\"vmlinuz\"", &format!("{kernel:?}")),
        ("\"initrd.img\"", &format!("{initrd:?}")),
        ("\"debian.raw\"", &format!("{disk:?}")),
        ("technology = \"sev-snp\"\n", &technology),
    ];
    let more = format!("\n[[disk]]\nid = \"agent\"\npath = {agent:?}\nread_only = true\n");
    described(EXAMPLE, &replaced, &more, &path);
    path
}

#[derive(Deserialize)]
struct Computed {
    digest: String,
}

/// As the example says that it can be computed from the files.
fn computed(lone: &Lone) -> String {
    let mut asked = vec![
        "attest",
        "measure",
        "--mode",
        "snp",
        "--vcpus",
        "2",
        "--vcpu-sig",
        "0",
    ];
    let files = files();
    for (option, file) in ["--ovmf", "--kernel", "--initrd"].into_iter().zip(&files) {
        asked.extend([option, text(file).unwrap()]);
    }
    asked.extend(["--append", CMDLINE]);
    lone.site.ask::<Computed>(&asked).unwrap().digest
}

fn files() -> [PathBuf; 3] {
    [
        "LAB_FIRMWARE_AMDSEV",
        "LAB_DEBIAN_KERNEL",
        "LAB_DEBIAN_INITRD",
    ]
    .map(shipped)
}

const EXAMPLE: &str = include_str!("../../../host/examples/snp-measured.toml");
/// As the example has it.
const CMDLINE: &str =
    "console=ttyS0 root=LABEL=debian ro casemate.snp=0x80d000,0x80e000 memmap=8K$0x80d000";
