//! The product itself under the double: `casemate agent` and the jailed VMM that it starts, all filters on, launch a
//! guest of the "real" secure processor, and its owner proves it and brings the secret. Needs root and `/dev/kvm`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests end where they fail"
)]

mod common;
#[path = "product/kernel.rs"]
mod kernel;
mod product;

use casemate::confidential::kvm::FirmwareCode;
use casemate_double::Fault;
use common::{golden, site_a, snp_machine};
use kernel::kernel;
use nix::errno::Errno;
use product::{SECRET, Site};

#[test]
fn a_real_sev_guest_is_launched_proved_given_its_secret_and_runs_in_its_jail() {
    let site = Site::start(&site_a());
    let description = site.describe("sev", true);
    site.owner_session(&description);
    site.json(&["run", &description, "--owner-session", "session"]);
    let guest = site.guest();
    assert_eq!(
        (&guest["state"], &guest["technology"], &guest["emulated"]),
        (&"measured".into(), &"sev".into(), &false.into())
    );
    assert_eq!(site.double().guests(), 1);
    assert!(site.console().is_empty(), "no instruction before the owner");

    // An owner who described another kernel keeps the secret.
    let mut other = kernel();
    *other.last_mut().unwrap() ^= 1;
    site.write("owner/vmlinuz", other);
    let refused = site.release("owner/vm.toml");
    assert_eq!(refused["released"], false);
    assert_eq!(site.guest()["state"], "measured");

    site.write("owner/vmlinuz", kernel());
    let released = site.release("owner/vm.toml");
    assert_eq!(released["released"], true, "{released}");
    // The secret; then that the guest was heard (1) and where its CPUID has the C-bit (51, a '3'); then its count.
    site.says(&[SECRET, "13", "aaaaabaa", "aaaaacaa"]);
    site.sandbox_holds();
    site.run(&["stop", "vault"]);
    site.until("the guest is decommissioned", |site| {
        site.double().guests() == 0
    });
    golden("product-sev-launch.txt", &site.double().log());
    site.finish();
}

#[test]
fn an_older_kernel_launches_it_too() {
    let mut config = site_a();
    config.vm_types = 0;
    let site = Site::start(&config);
    let description = site.describe("sev", false);
    site.json(&["run", &description]);
    site.says(&["", "13", "aaaaabaa"]);
    site.finish();
}

#[test]
fn what_the_firmware_or_the_kernel_refuses_is_said_by_run_and_nothing_is_left() {
    let site = Site::start(&site_a());
    let description = site.describe("sev", false);
    let policy = FirmwareCode(7);
    for (command, fault, words) in [
        (
            "KVM_CREATE_VM",
            Fault::Kernel(Errno::EBUSY),
            ["SEV_NO_ASID", "end a confidential guest"],
        ),
        ("INIT", Fault::Firmware(7), [policy.name(), policy.remedy()]),
        (
            "KVM_MEMORY_ENCRYPT_REG_REGION",
            Fault::Kernel(Errno::ENOMEM),
            ["SEV_MEMORY_LOCK", "RLIMIT_MEMLOCK"],
        ),
        (
            "LAUNCH_START",
            Fault::Firmware(7),
            [policy.name(), policy.remedy()],
        ),
        (
            "LAUNCH_UPDATE_DATA",
            Fault::Firmware(7),
            [policy.name(), policy.remedy()],
        ),
        (
            "LAUNCH_MEASURE",
            Fault::Kernel(Errno::ETIMEDOUT),
            ["SEV_DEAD", "restart the host"],
        ),
        (
            "PLATFORM_STATUS",
            Fault::Firmware(7),
            [policy.name(), policy.remedy()],
        ),
        (
            "LAUNCH_FINISH",
            Fault::Firmware(7),
            [policy.name(), policy.remedy()],
        ),
    ] {
        site.double().fail(command, 1, fault);
        let said = site.refused(&["run", &description]);
        for word in words {
            assert!(said.contains(word), "{command}: {word} is not in {said}");
        }
        site.until("nothing is left", |site| site.double().guests() == 0);
        assert!(site.listed().is_empty(), "{command}");
    }
    site.json(&["run", &description]);
    site.finish();
}

#[test]
fn a_real_sev_es_or_snp_guest_is_refused_before_anything_starts() {
    let site = Site::start(&snp_machine());
    for technology in ["sev-es", "sev-snp"] {
        let description = site.describe(technology, false);
        let before = site.double().log().len();
        let said = site.refused(&["run", &description]);
        for word in ["FIRMWARE_NEEDED", "technology = \"sev\""] {
            assert!(said.contains(word), "{technology}: {said}");
        }
        let asked = &site.double().log()[before..];
        let only_looks = asked.iter().all(|call| call.starts_with("open /dev/sev"));
        assert!(only_looks, "{asked:?}");
        assert!(site.listed().is_empty());
    }
    site.finish();
}

#[test]
fn without_a_processor_a_policy_against_emulation_is_told_so() {
    let mut config = site_a();
    config.device = false;
    let site = Site::start(&config);
    let description = site.describe("sev", false);
    let said = site.refused(&["run", &description]);
    assert!(said.contains("POLICY_"), "{said}");
    assert!(site.listed().is_empty());
    site.finish();
}
