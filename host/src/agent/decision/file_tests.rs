//! No file of the host is opened for somebody but in the folders that the policy names.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use casemate_policy::ledger::Outcome;

use super::tests::{Host, POLICY};
use crate::agent::api::{Attach, DiskAttach, MemoryMode, Request};

/// A host whose guests' files lie in `guests` of its folder: one description there, and something else beside it.
fn host() -> Host {
    let mut host = Host::new(POLICY, "");
    let folder = host.path("guests").display().to_string();
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(host.path("secret"), "root:$6$").unwrap();
    host.restart_with(&format!("{POLICY}[files]\nfolders = [{folder:?}]\n"));
    for file in ["guests/vmlinuz", "guests/initrd", "vmlinuz", "initrd"] {
        std::fs::write(host.path(file), "x").unwrap();
    }
    host
}

fn describe(host: &Host, file: &str, disk: &Path) -> PathBuf {
    let text = format!(
        "name = \"vm\"\nvcpus = 1\nmemory = \"64 MiB\"\n[boot]\nkernel = \"vmlinuz\"\ninitrd = \"initrd\"\n\
         cmdline = \"\"\n[[disk]]\nid = \"data\"\npath = {disk:?}\n"
    );
    std::fs::write(host.path(file), text).unwrap();
    host.path(file)
}

fn run(description: PathBuf) -> Request {
    Request::Run {
        description,
        session: None,
    }
}

fn restore(file: PathBuf) -> Request {
    Request::Restore {
        file,
        name: None,
        memory: MemoryMode::AtOnce,
        allow_older: false,
        allow_changed_disks: false,
    }
}

#[test]
fn what_lies_elsewhere_is_refused_unread_and_recorded() {
    let host = host();
    let secret = host.path("secret");
    symlink(&secret, host.path("guests/link")).unwrap();
    let snapshot = Request::Snapshot {
        name: "vm".to_owned(),
        file: host.path("new"),
        stop: false,
        template: false,
    };
    let clone = |file, disks| Request::Clone {
        file,
        name: "other".to_owned(),
        memory: MemoryMode::AtOnce,
        disks,
        allow_changed_disks: false,
    };
    let create = Request::Create {
        description: secret.clone(),
    };
    let attach = Request::Attach {
        name: "vm".to_owned(),
        device: Attach::Disk(DiskAttach {
            id: "data".to_owned(),
            path: host.path("guests/link"),
            format: Default::default(),
            read_only: true,
            limits: Default::default(),
        }),
    };
    let climbing = run(host.path("guests/../secret"));
    let through_link = run(host.path("guests/link"));
    let nowhere = run(PathBuf::from("/no/such/folder/vm.toml"));
    for request in [
        run(secret.clone()),
        create,
        snapshot,
        attach,
        restore(secret.clone()),
        clone(secret, None),
        climbing,
        through_link,
        nowhere,
    ] {
        let shown = format!("{request:?}");
        let failure = host.ask(0, request).unwrap_err();
        assert_eq!(failure.code, "POLICY_FILE_NOT_ALLOWED", "{shown}");
        assert!(!failure.error.contains("$6$"), "{}", failure.error);
        let records = host.records();
        let last = records.last().unwrap();
        assert_eq!(
            (last.outcome, last.code.as_str()),
            (Outcome::Refused, "file-not-allowed"),
            "{shown}"
        );
    }
    assert!(!host.path("new").exists());
}

#[test]
fn nor_what_a_description_in_its_place_names() {
    let host = host();
    let (inside, outside) = (host.path("guests/disk"), host.path("secret"));
    std::fs::write(&inside, [0; 512]).unwrap();
    symlink(&outside, host.path("guests/disk-2")).unwrap();
    for disk in [outside, host.path("guests/disk-2")] {
        let description = describe(&host, "guests/vm.toml", &disk);
        assert_eq!(
            host.code(0, run(description.clone())),
            "POLICY_FILE_NOT_ALLOWED"
        );
        assert_eq!(
            host.code(0, Request::Create { description }),
            "POLICY_FILE_NOT_ALLOWED"
        );
    }
    // With all in its place it is the kernel's turn to be none.
    let description = describe(&host, "guests/vm.toml", &inside);
    let code = host.code(0, run(description.clone()));
    assert!(!code.starts_with("POLICY_"), "{code}");
    host.ask(0, Request::Create { description }).unwrap();
}
