//! A host under the double: the agent's files, its processes, its command line, and a small guest.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use casemate_attest::processor::Identity;
use casemate_double::{Config, Double};
use serde_json::Value;
use tempfile::TempDir;

use crate::common::{SITE_A, root};
use crate::kernel::kernel;

/// One host of site A whose policy forbids emulated processors.
pub struct Site {
    folder: TempDir,
    double: Option<Double>,
}

impl Site {
    /// Starts the agent on the double's machine.
    pub fn start(config: &Config) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let id = std::process::id() % 100_000;
        let mut site = Self {
            folder: tempfile::tempdir().unwrap(),
            double: None,
        };
        // Users that neither another test of this program nor another program's tests have.
        let uid_base = 3_600_000_000 + id * 4096 + number * 256;
        site.write(
            "agent.toml",
            format!(
                "name = \"double-{id}-{number}\"\nstate_dir = \"state\"\nsocket = \"agent.sock\"\n\
                 policy = \"policy.toml\"\nuid_base = {uid_base}\n"
            ),
        );
        site.write("policy.toml", POLICY);
        let chain = Identity::from_bytes(&SITE_A).unwrap().chain().clone();
        site.write("platform/pdh.cert", chain.pdh.as_bytes());
        site.write("platform/platform.cert", chain.platform_certs());
        site.write("platform/amd.cert", chain.amd_certs());
        let log = fs::File::create(site.path("agent.log")).unwrap();
        let mut agent = casemate();
        agent
            .arg("agent")
            .arg("--config")
            .arg(site.path("agent.toml"))
            .stdout(Stdio::null())
            .stderr(log);
        site.double = Some(Double::run(agent, config).unwrap());
        let socket = site.path("agent.sock");
        site.until("the agent answers", |_| {
            UnixStream::connect(&socket).is_ok()
        });
        site
    }

    pub fn double(&self) -> &Double {
        self.double.as_ref().unwrap()
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join(file)
    }

    pub fn write(&self, file: &str, bytes: impl AsRef<[u8]>) {
        let path = self.path(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    /// The host's description of the guest, and the owner's copy of it; returns the path of the former.
    pub fn describe(&self, technology: &str, secret: bool) -> String {
        let text = format!(
            "name = \"vault\"\nvcpus = 2\nmemory = \"64 MiB\"\n[boot]\nkernel = \"vmlinuz\"\ninitrd = \"initrd\"\n\
             cmdline = \"console=ttyS0\"\n[confidential]\ntechnology = \"{technology}\"\n{}",
            if secret { "secret = true\n" } else { "" }
        );
        for folder in ["host", "owner"] {
            self.write(&format!("{folder}/vmlinuz"), kernel());
            self.write(&format!("{folder}/initrd"), [0xa5; 5000]);
            self.write(&format!("{folder}/vm.toml"), &text);
        }
        "host/vm.toml".into()
    }

    /// The owner's session with the platform.
    pub fn owner_session(&self, description: &str) {
        let root = self.root();
        let ran = self.output(&[
            "owner",
            "session",
            "--platform",
            "platform",
            "--description",
            description,
            "--allow-emulated",
            &root,
            "--out",
            "session",
        ]);
        assert!(ran.status.success(), "{ran:?}");
    }

    /// What comes of the owner's comparison; the secret goes along if it fits.
    pub fn release(&self, description: &str) -> Value {
        self.write("secret", SECRET);
        let root = self.root();
        let ran = self.output(&[
            "--json",
            "owner",
            "release",
            "vault",
            "--description",
            description,
            "--session",
            "session",
            "--platform",
            "platform",
            "--secret",
            "secret",
            "--allow-emulated",
            &root,
        ]);
        let text = String::from_utf8_lossy(&ran.stdout);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {ran:?}"))
    }

    /// Runs a command that must succeed.
    pub fn run(&self, args: &[&str]) -> String {
        let ran = self.output(args);
        assert!(ran.status.success(), "{args:?}: {ran:?}\n{}", self.log());
        String::from_utf8(ran.stdout).unwrap()
    }

    pub fn json(&self, args: &[&str]) -> Value {
        let mut all = vec!["--json"];
        all.extend(args);
        serde_json::from_str(&self.run(&all)).unwrap()
    }

    /// Runs a command that must fail; what it says.
    pub fn refused(&self, args: &[&str]) -> String {
        let ran = self.output(args);
        assert!(!ran.status.success(), "{args:?}: {ran:?}");
        String::from_utf8(ran.stderr).unwrap()
    }

    pub fn listed(&self) -> Vec<Value> {
        self.json(&["list"])["guests"].as_array().unwrap().clone()
    }

    pub fn guest(&self) -> Value {
        let guests = self.listed();
        assert_eq!(guests.len(), 1, "{guests:?}");
        guests[0].clone()
    }

    /// The guest's output so far.
    pub fn console(&self) -> String {
        let path = self.path("state/guests/vault/console.log");
        fs::read_to_string(path).unwrap_or_default()
    }

    /// Waits until the guest has said these lines first.
    pub fn says(&self, lines: &[&str]) {
        let wanted = lines.join("\n") + "\n";
        self.until("the guest says enough", |site| {
            site.console().len() >= wanted.len()
        });
        let console = self.console();
        assert!(console.starts_with(&wanted), "{console:?}\n{}", self.log());
    }

    /// Every thread of the VMM has its filter, and what must be refused is refused.
    pub fn sandbox_holds(&self) {
        let report = self.json(&["sandbox", "report", "vault"]);
        let text = report.to_string();
        for filter in ["vmm-control", "vmm-vcpu", "vmm-device"] {
            assert!(text.contains(filter), "{filter}: {report}");
        }
        let probe = self.json(&["sandbox", "probe", "vault"]);
        let attempts: Vec<&Value> = probe["reports"]
            .as_array()
            .unwrap()
            .iter()
            .flat_map(|report| report["attempts"].as_array().unwrap())
            .collect();
        assert!(!attempts.is_empty(), "{probe}");
        assert!(attempts.iter().all(|a| a["refused"] == true), "{probe}");
    }

    #[track_caller]
    pub fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let begun = Instant::now();
        while !holds(self) {
            assert!(
                begun.elapsed() < PATIENCE,
                "not within {PATIENCE:?}: {what}\n{}\n{:#?}",
                self.log(),
                self.double().log()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.path("agent.log")).unwrap_or_default()
    }

    /// Ends the agent; the kernel was used as it should be.
    pub fn finish(mut self) {
        let double = self.double.take().unwrap();
        double.terminate();
        double
            .finish()
            .unwrap_or_else(|error| panic!("{error}\n{}", self.log()));
    }

    fn root(&self) -> String {
        let root = root(&SITE_A);
        let digits = root.iter().map(|byte| format!("{byte:02x}"));
        format!("sha256:{}", digits.collect::<String>())
    }

    fn output(&self, args: &[&str]) -> Output {
        let mut command = casemate();
        command
            .current_dir(self.folder.path())
            .arg("--agent")
            .arg(self.path("agent.sock"))
            .args(args);
        command.output().unwrap()
    }
}

fn casemate() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_double-casemate"));
    command
        .env_remove("CASEMATE_AGENT")
        .env_remove("CASEMATE_LOG")
        .stdin(Stdio::null());
    command
}

/// What the owner gives the guest.
pub const SECRET: &str = "the owner's secret";

/// No emulated processor, and none of the technologies forbidden.
const POLICY: &str = "[host]
name = \"here\"
[technologies]
allowed = [\"sev\", \"sev-es\", \"sev-snp\"]
allow_emulated = false
[limits]
max_vcpus = 2
max_memory_mib = 256
";
const PATIENCE: Duration = Duration::from_secs(60);
