//! The agent's API over TLS: who is let in, as whom, and what the policy makes of it. Needs root.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;

use casemate_crypto_migrate::dev_ca::DevCa;
use support::{Host, POLICY, Ran, finish, http};

/// A host with people, an authority for them, and one for its own certificate.
struct Remote {
    host: Host,
    port: u16,
    people: DevCa,
}

impl Remote {
    /// `people(ca)` writes the policy's people.
    fn new(tag: &str, people: impl FnOnce(&Remote) -> String) -> Self {
        let host = Host::new(tag);
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let sites = DevCa::new("sites").unwrap();
        let own = sites.issue("localhost").unwrap();
        host.write("sites.pem", sites.certificate_pem());
        host.write("api.pem", &own.certificate_pem);
        host.write("api.key", &own.key_pem);
        let mut remote = Self {
            host,
            port,
            people: DevCa::new("people").unwrap(),
        };
        let host = &remote.host;
        host.write("people.pem", remote.people.certificate_pem());
        host.configure(&format!(
            "[api]\nlisten = \"127.0.0.1:{port}\"\ncertificate = \"api.pem\"\nkey = \"api.key\"\nclient_ca = \"people.pem\"\n"
        ));
        let text = format!("{POLICY}{}", people(&remote));
        remote.host.write("policy.toml", text);
        remote.host.start();
        remote
    }

    /// Gives somebody a certificate in files of that name; returns what a policy says of it.
    fn person(&self, name: &str) -> (String, String) {
        self.signed(&self.people, name)
    }

    fn signed(&self, ca: &DevCa, name: &str) -> (String, String) {
        let made = ca.issue(&format!("{name}.people.test")).unwrap();
        self.host
            .write(&format!("{name}.pem"), &made.certificate_pem);
        self.host.write(&format!("{name}.key"), &made.key_pem);
        let pinned = made.pinned().unwrap();
        (
            pinned.san,
            format!("sha256:{}", hex::encode(pinned.spki_sha256)),
        )
    }

    /// `casemate ARGS` as somebody, over TLS.
    fn run(&self, name: &str, args: &[&str]) -> Ran {
        self.run_at("localhost", "sites.pem", name, args)
    }

    fn run_at(&self, host: &str, ca: &str, name: &str, args: &[&str]) -> Ran {
        let mut command = support::casemate();
        command.current_dir(self.host.path(""));
        command.args(["--agent", &format!("https://{host}:{}", self.port)]);
        command.args(["--agent-ca", ca]);
        command.args(["--agent-cert", &format!("{name}.pem")]);
        command.args(["--agent-key", &format!("{name}.key")]);
        command.args(args);
        finish(command)
    }

    /// The code of the last record, and who it names.
    fn last_record(&self) -> (String, String) {
        let last = self.host.records().pop().unwrap();
        let text = |key: &str| last[key].as_str().unwrap_or_default().to_owned();
        (text("actor"), text("code"))
    }
}

#[test]
fn people_are_known_by_name_and_key_and_do_what_their_role_may() {
    let remote = Remote::new("people", |remote| {
        let (olga, olga_key) = remote.person("olga");
        let (vera, _) = remote.person("vera");
        let (_, sam_key) = remote.person("sam");
        remote.person("nobody");
        format!(
            "[[person]]\nname = 'olga'\nrole = 'operator'\nsan = '{olga}'\nspki = '{olga_key}'\n\
             [[person]]\nname = 'vera'\nrole = 'viewer'\nsan = '{vera}'\n\
             [[person]]\nname = 'sam'\nrole = 'security-officer'\nspki = '{sam_key}'\n"
        )
    });
    let path = remote.host.describe("vm", "vault", support::SEV);
    for name in ["olga", "vera", "sam"] {
        remote.run(name, &["list"]).expect(0);
    }
    // A launch with its task's events, over TLS.
    let ran = remote.run("olga", &["--json", "run", &path]).expect(0);
    assert_eq!(ran.value()["name"], "vault");
    for name in ["vera", "sam"] {
        remote
            .run(name, &["stop", "vault"])
            .refused(3, &["POLICY_ROLE_NOT_ALLOWED"]);
        assert_eq!(
            remote.last_record(),
            (name.to_owned(), "role-not-allowed".to_owned())
        );
    }
    remote
        .run("nobody", &["list"])
        .refused(3, &["POLICY_PERSON_UNKNOWN"]);
    assert_eq!(remote.last_record().1, "person-unknown");
    // With people in the policy root is nobody either, unless it is named.
    remote
        .host
        .run(&["list"])
        .refused(3, &["POLICY_PERSON_UNKNOWN"]);
    // Olga's name with another key is not Olga.
    remote.person("olga");
    remote
        .run("olga", &["stop", "vault"])
        .refused(3, &["POLICY_PERSON_UNKNOWN"]);
    let metrics = remote.run("vera", &["metrics"]).expect(0).out;
    let refused = "casemate_policy_refusals_total{code=\"role-not-allowed\"} 2";
    assert!(metrics.contains(refused), "{metrics}");
    assert!(!metrics.contains("transport=\"tls\"} 0"), "{metrics}");
}

#[test]
fn without_people_in_the_policy_no_certificate_may_ask() {
    let remote = Remote::new("nopeople", |remote| {
        remote.person("olga");
        String::new()
    });
    remote
        .run("olga", &["list"])
        .refused(1, &["NOT_PERMITTED", "[[person]]"]);
    remote.host.json(&["list"]);
}

#[test]
fn who_shows_no_certificate_of_the_people_s_authority_does_not_even_ask() {
    let remote = Remote::new("outside", |remote| {
        let (olga, _) = remote.person("olga");
        format!("[[person]]\nname = 'olga'\nrole = 'operator'\nsan = '{olga}'\n")
    });
    remote.run("olga", &["list"]).expect(0);
    // The same name by another authority; the client's own doubts of the agent; no certificate at all.
    let other = DevCa::new("others").unwrap();
    remote.signed(&other, "olga");
    let refused = remote.run("olga", &["list"]);
    assert!(
        refused.code != Some(0) && refused.err.contains("AGENT_"),
        "{refused:?}"
    );
    remote.host.write("others.pem", other.certificate_pem());
    remote.person("olga");
    let doubt = ["AGENT_UNAVAILABLE", "certificate"];
    remote
        .run_at("localhost", "others.pem", "olga", &["list"])
        .refused(69, &doubt);
    remote
        .run_at("127.0.0.1", "sites.pem", "olga", &["list"])
        .refused(69, &doubt);
    let mut bare = support::casemate();
    bare.args([
        "--agent",
        &format!("https://localhost:{}", remote.port),
        "list",
    ]);
    finish(bare).refused(64, &["--agent-cert"]);
    // Not a byte of HTTP is answered outside TLS.
    let mut stream = TcpStream::connect(("localhost", remote.port)).unwrap();
    stream
        .write_all(&http("GET", "/v1/openapi.json", ""))
        .unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    // Silence takes no place from this machine's users, and none for ever from others.
    let silent: Vec<TcpStream> = (0..70)
        .map(|_| TcpStream::connect(("localhost", remote.port)).unwrap())
        .collect();
    remote
        .host
        .run(&["list"])
        .refused(3, &["POLICY_PERSON_UNKNOWN"]);
    remote.run("olga", &["list"]).expect(0);
    drop(silent);
}

#[test]
fn an_agent_with_unusable_certificates_does_not_start() {
    let mut remote = Remote::new("unusable", |_| String::new());
    remote.host.end(nix::sys::signal::Signal::SIGTERM);
    for file in ["api.pem", "api.key", "people.pem"] {
        let kept = std::fs::read(remote.host.path(file)).unwrap();
        remote.host.write(file, "rubbish");
        remote.host.start_fails().refused(1, &["LISTEN", file]);
        remote.host.write(file, kept);
    }
    remote.host.start();
}
