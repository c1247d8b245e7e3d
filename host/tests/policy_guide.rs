//! `policy/GUIDE.md`, executed: a security officer's way to an enforced policy, and an auditor's to a report.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod page;

use std::os::unix::net::UnixStream;

use page::{Stage, Told};

#[test]
fn the_guide_holds() {
    let mut stage = Stage::new("policy/GUIDE.md");
    let socket = stage.folder.path().join("agent.sock");
    stage.environment = vec![("CASEMATE_AGENT", socket.display().to_string())];
    // Two agents of one name on one machine sweep each other's control groups.
    stage.instead = vec![("vault-1", format!("vault-{}", std::process::id()))];
    let told = stage.tell(|_| UnixStream::connect(&socket).is_ok());
    let all = Told {
        executed: 15,
        shown: vec![],
    };
    assert_eq!(told, all);
}
