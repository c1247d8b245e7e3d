//! A host of its own for each test: state, socket, policy and users that no other test has, the real binary, and an
//! end that takes everything along.
#![allow(
    dead_code,
    reason = "each test program compiles this for itself and uses its part"
)]

pub mod counter;
pub mod pair;

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use casemate_crypto_migrate::dev_ca::DevCa;
use serde_json::Value;
use tempfile::TempDir;

/// One agent, and what it lives in.
pub struct Host {
    pub name: String,
    pub socket: PathBuf,
    pub listen: Option<u16>,
    uid_base: u32,
    folder: TempDir,
    agent: Option<Child>,
}

/// What a command left behind.
#[derive(Debug)]
pub struct Ran {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Host {
    /// A host whose policy allows emulated SEV and plain guests; not started.
    pub fn new(tag: &str) -> Self {
        Self::with_policy(tag, POLICY)
    }

    /// A host with another policy; not started.
    pub fn with_policy(tag: &str, policy: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        assert!(number < HOSTS, "give the test program more users");
        let id = std::process::id() % 1_000_000;
        let folder = tempfile::tempdir().unwrap();
        let host = Self {
            name: format!("{tag}-{id}-{number}"),
            socket: folder.path().join("agent.sock"),
            listen: None,
            uid_base: 400_000_000 + id * HOSTS * UIDS + number * UIDS,
            folder,
            agent: None,
        };
        host.write("policy.toml", policy);
        host.write_secret("snapshots.key", [7; 32]);
        host.configure("");
        host
    }

    /// (Re)writes the agent's configuration; `more` goes behind it.
    pub fn configure(&self, more: &str) {
        let text = format!(
            "name = {:?}\nstate_dir = \"state\"\nsocket = \"agent.sock\"\npolicy = \"policy.toml\"\nuid_base = {}\n\
             snapshots = {{ key = \"snapshots.key\" }}\n{more}",
            self.name, self.uid_base
        );
        self.write("agent.toml", text);
    }

    /// Gives the host an identity and lets it accept migrations on a free port of the loopback device.
    pub fn accept_migrations(&mut self) {
        let ca = DevCa::new("test").unwrap();
        let host = ca.issue("here.casemate.test").unwrap();
        self.write("ca.pem", ca.certificate_pem());
        self.write("host.pem", &host.certificate_pem);
        self.write("host.key", &host.key_pem);
        // Another process may take the port before the agent does; the agent then says so and the test fails loudly.
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        self.listen = Some(port);
        self.configure(&format!("listen = \"127.0.0.1:{port}\"\n{IDENTITY}"));
    }

    /// Process ids of the roles of this kind (`vmm`, `mover`).
    pub fn roles_of(&self, kind: &str) -> Vec<u32> {
        let is = |id: &u32| {
            let line = fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
            line.split(|byte| *byte == 0)
                .any(|word| word == kind.as_bytes())
        };
        self.roles().into_iter().filter(is).collect()
    }

    /// A file in the host's folder.
    pub fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join(file)
    }

    /// Writes a file in the host's folder.
    pub fn write(&self, file: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        path
    }

    /// The same, for its owner alone.
    pub fn write_secret(&self, file: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        use std::os::unix::fs::PermissionsExt;
        let path = self.write(file, bytes);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        path
    }

    /// Starts the agent and waits until it answers.
    pub fn start(&mut self) {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.path("agent.log"))
            .unwrap();
        self.start_with(log.into());
    }

    /// The same, with another place for its log.
    pub fn start_with(&mut self, stderr: Stdio) {
        let agent = self
            .agent_command()
            .stderr(stderr)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let agent = self.agent.insert(agent);
        let id = agent.id();
        let answers = || UnixStream::connect(&self.socket).is_ok();
        let ended = || !Path::new(&format!("/proc/{id}/exe")).exists();
        until("the agent answers", || answers() || ended());
        assert!(answers(), "the agent ended: {}", self.log());
    }

    /// Runs the agent where it is expected to end by itself.
    pub fn start_fails(&self) -> Ran {
        finish(self.agent_command())
    }

    fn agent_command(&self) -> Command {
        let mut command = casemate();
        command
            .arg("agent")
            .arg("--config")
            .arg(self.path("agent.toml"));
        command
    }

    /// The agent's log so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("agent.log")).unwrap_or_default()
    }

    /// Process id of the agent.
    pub fn pid(&self) -> u32 {
        self.agent.as_ref().unwrap().id()
    }

    /// Sends a signal and waits for the agent's end.
    pub fn end(&mut self, signal: nix::sys::signal::Signal) -> ExitStatus {
        let mut agent = self.agent.take().unwrap();
        let pid = nix::unistd::Pid::from_raw(agent.id().try_into().unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
        wait(&mut agent)
    }

    /// Runs `casemate ARGS` against this agent, in the host's folder.
    pub fn run(&self, args: &[&str]) -> Ran {
        finish(self.command(args))
    }

    /// The command that [`Host::run`] runs.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = casemate();
        command
            .current_dir(self.folder.path())
            .arg("--agent")
            .arg(&self.socket)
            .args(args);
        command
    }

    /// The same with `--json`; must succeed.
    pub fn json(&self, args: &[&str]) -> Value {
        let mut all = vec!["--json"];
        all.extend(args);
        self.run(&all).expect(0).value()
    }

    /// A running guest's row, if there is one.
    pub fn listed(&self, name: &str) -> Option<Value> {
        let list = self.json(&["list"]);
        let guests = list["guests"].as_array().unwrap();
        guests.iter().find(|g| g["name"] == name).cloned()
    }

    /// Kernel, initramfs and description of a small guest in `folder`; returns the description's path.
    pub fn describe(&self, folder: &str, name: &str, confidential: &str) -> String {
        self.write(&format!("{folder}/vmlinuz"), small_image());
        self.write(&format!("{folder}/initrd"), vec![0xa5; 9000]);
        let text = format!(
            "name = {name:?}\nvcpus = 1\nmemory = \"64 MiB\"\n[boot]\nkernel = \"vmlinuz\"\ninitrd = \"initrd\"\ncmdline = \"console=ttyS0\"\n{confidential}"
        );
        self.write(&format!("{folder}/vm.toml"), text);
        format!("{folder}/vm.toml")
    }

    /// Exports the platform's certificates to `platform`; returns the root in the words of `--allow-emulated`.
    pub fn export_platform(&self) -> String {
        self.run(&["platform", "export", "--out", "platform"])
            .expect(0);
        let shown = self.json(&["platform", "show"]);
        format!("sha256:{}", shown["root_sha256"].as_str().unwrap())
    }

    /// Makes an owner's session in `out` for the description.
    pub fn owner_session(&self, description: &str, root: &str, out: &str) {
        let args = [
            "owner",
            "session",
            "--platform",
            "platform",
            "--description",
            description,
            "--allow-emulated",
            root,
            "--out",
            out,
        ];
        self.run(&args).expect(0);
    }

    /// Everything to a guest that waits for its owner: description in `host/`, session in `session`. Returns the
    /// root.
    pub fn measured(&self, name: &str) -> String {
        let description = self.describe("host", name, SEV_WITH_SECRET);
        let root = self.export_platform();
        self.owner_session(&description, &root, "session");
        self.run(&["run", &description, "--owner-session", "session"])
            .expect(0);
        root
    }

    /// `casemate owner release` with the owner's copy of the description.
    pub fn release(&self, name: &str, description: &str, session: &str, more: &[&str]) -> Ran {
        if !self.path("secret").exists() {
            self.write("secret", "the owner's secret");
        }
        let mut args = vec![
            "owner",
            "release",
            name,
            "--description",
            description,
            "--session",
            session,
            "--platform",
            "platform",
            "--secret",
            "secret",
        ];
        args.extend(more);
        self.run(&args)
    }

    /// Process ids of this agent's roles.
    pub fn roles(&self) -> BTreeSet<u32> {
        let users = self.uid_base..self.uid_base + UIDS;
        let agent = self.agent.as_ref().map(Child::id);
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let ids = processes.filter_map(|p| p.file_name().to_str()?.parse::<u32>().ok());
        ids.filter(|id| {
            let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
            let field = |key: &str| {
                let line = status.lines().find_map(|l| l.strip_prefix(key))?;
                line.split_whitespace().next()?.parse::<u32>().ok()
            };
            field("Uid:").is_some_and(|uid| users.contains(&uid))
                || (agent.is_some() && field("PPid:") == agent)
        })
        .collect()
    }

    /// cgroups of this agent's roles.
    pub fn groups(&self) -> Vec<String> {
        let Some(root) = cgroups() else {
            return Vec::new();
        };
        let ours = format!("casemate-{}-", self.name);
        let Ok(entries) = fs::read_dir(root.join("casemate")) else {
            return Vec::new();
        };
        let names = entries
            .flatten()
            .map(|e| e.file_name().to_string_lossy().into_owned());
        names.filter(|name| name.starts_with(&ours)).collect()
    }

    /// Waits until nothing but (at most) the secure processor is left.
    pub fn quiet(&self, roles: usize) {
        until("the roles end", || self.roles().len() <= roles);
        until("the cgroups go", || self.groups().len() <= roles);
    }

    /// The ledger's records.
    pub fn records(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.path("state/ledger")).unwrap();
        let lines = text.lines().filter(|line| line.contains("\"action\""));
        let json = lines.filter_map(|line| line.find('{').and_then(|at| line.get(at..)));
        json.map(|text| serde_json::from_str(text).unwrap())
            .collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            let _ = agent.kill();
            let _ = agent.wait();
        }
        if std::thread::panicking() {
            eprintln!("log of {}:\n{}", self.name, self.log());
        } else {
            until("no role outlives its agent", || self.roles().is_empty());
        }
        if let Some(root) = cgroups() {
            for group in self.groups() {
                let _ = fs::remove_dir(root.join("casemate").join(group));
            }
        }
    }
}

impl Ran {
    /// Checks the exit status.
    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{self:#?}");
        self
    }

    /// Checks the exit status and that the error says all these words.
    #[track_caller]
    pub fn refused(self, code: i32, words: &[&str]) -> Self {
        let ran = self.expect(code);
        for word in words {
            assert!(ran.err.contains(word), "{word:?} is missing: {ran:#?}");
        }
        ran
    }

    /// The output as JSON.
    #[track_caller]
    pub fn value(&self) -> Value {
        serde_json::from_str(&self.out).unwrap()
    }
}

/// The binary under test, with nothing of this program's environment that could change what it does.
pub fn casemate() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_casemate"));
    command
        .env_remove("CASEMATE_AGENT")
        .env_remove("CASEMATE_LOG")
        .stdin(Stdio::null());
    command
}

/// Runs a command to its end.
pub fn finish(mut command: Command) -> Ran {
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
    let (done, ended) = std::sync::mpsc::channel::<()>();
    let watch = std::thread::spawn(move || {
        if ended.recv_timeout(PATIENCE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
    });
    let output = child.wait_with_output().unwrap();
    drop(done);
    watch.join().unwrap();
    output.into()
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// Waits for a child's end, and kills one that does not end.
pub fn wait(child: &mut Child) -> ExitStatus {
    let begun = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if begun.elapsed() > PATIENCE {
            let _ = child.kill();
            let _ = child.wait();
            panic!("process {} did not end within {PATIENCE:?}", child.id());
        }
        std::thread::sleep(STEP);
    }
}

/// Where cgroup v2 is mounted.
fn cgroups() -> Option<PathBuf> {
    let places = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(PathBuf::from);
    places
        .into_iter()
        .find(|path| path.join("cgroup.controllers").exists())
}

/// Polls until something holds.
#[track_caller]
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(
            begun.elapsed() < PATIENCE,
            "not within {PATIENCE:?}: {what}"
        );
        std::thread::sleep(STEP);
    }
}

/// A bzImage whose kernel halts: the header of Documentation/arch/x86/boot.rst, one setup sector, 4 KiB of code.
pub fn small_image() -> Vec<u8> {
    let mut image = vec![0u8; 1024 + 4096];
    let mut set = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    set(0x1f1, &[1]); // setup_sects
    set(0x1fe, &[0x55, 0xaa]); // boot_flag
    set(0x201, &[0x6a]); // jump: the header ends at 0x26c
    set(0x202, b"HdrS");
    set(0x206, &0x020fu16.to_le_bytes()); // version
    set(0x211, &[1]); // loadflags: LOADED_HIGH
    set(0x22c, &0x7fff_ffffu32.to_le_bytes()); // initrd_addr_max
    set(0x230, &0x20_0000u32.to_le_bytes()); // kernel_alignment
    set(0x234, &[1]); // relocatable_kernel
    set(0x236, &1u16.to_le_bytes()); // xloadflags: XLF_KERNEL_64
    set(0x238, &2047u32.to_le_bytes()); // cmdline_size
    set(0x258, &0x100_0000u64.to_le_bytes()); // pref_address
    set(0x260, &0x200_0000u32.to_le_bytes()); // init_size
    set(1024 + 0x200, &[0xfa, 0xf4, 0xeb, 0xfd]); // startup_64: cli; hlt; jmp to the hlt
    image
}

/// Emulated and plain guests of up to 256 MiB.
pub const POLICY: &str = "[host]
name = \"here\"
[technologies]
allowed = [\"none\", \"sev\"]
allow_emulated = true
[limits]
max_vcpus = 2
max_memory_mib = 256
[migration]
outgoing = true
incoming = true
[[peer]]
name = \"there\"
san = \"there.casemate.test\"
spki = \"sha256:2222222222222222222222222222222222222222222222222222222222222222\"
path = \"direct\"
";

/// Goes behind a description: the launch waits for its owner.
pub const SEV_WITH_SECRET: &str = "[confidential]\ntechnology = \"sev\"\nsecret = true\n";
/// The same without a secret.
pub const SEV: &str = "[confidential]\ntechnology = \"sev\"\n";

/// Goes behind a configuration, before `[peers]`.
pub const IDENTITY: &str =
    "[identity]\ncertificate = \"host.pem\"\nkey = \"host.key\"\nca = \"ca.pem\"\n";

/// One request at the socket; status and JSON of the answer.
pub fn ask(host: &Host, method: &str, target: &str, body: &str) -> (u16, Value) {
    let mut stream = connected(host);
    offer(&mut stream, &http(method, target, body));
    let (status, text) = heard(&mut stream).unwrap();
    (status, serde_json::from_str(&text).unwrap())
}

/// A connection to the agent.
pub fn connected(host: &Host) -> UnixStream {
    let stream = UnixStream::connect(&host.socket).unwrap();
    let patience = Some(Duration::from_secs(100));
    stream.set_read_timeout(patience).unwrap();
    stream
}

/// One HTTP/1.1 request with a JSON body, as bytes.
pub fn http(method: &str, target: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!(
        "{method} {target} HTTP/1.1\r\nhost: agent\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\
         connection: close\r\n\r\n{body}"
    )
    .into_bytes()
}

/// Status and body of an HTTP answer; nothing if there is none.
pub fn heard(stream: &mut impl std::io::Read) -> Option<(u16, String)> {
    let mut text = Vec::new();
    // A connection that is reset behind its answer has answered.
    let _ = stream.read_to_end(&mut text);
    let text = String::from_utf8(text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    Some((status, body.to_owned()))
}

/// Writes, and does not mind if the other side has hung up.
pub fn offer(stream: &mut impl Write, bytes: &[u8]) {
    let _ = stream.write_all(bytes);
}

/// How long anything may take on a slow and loaded machine.
const PATIENCE: Duration = Duration::from_secs(120);
const STEP: Duration = Duration::from_millis(20);
/// Most hosts of one test program, and users of each.
const HOSTS: u32 = 24;
const UIDS: u32 = 256;
