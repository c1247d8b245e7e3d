//! A host: its files, its agent inside its network namespace, and the commands given there.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use casemate_crypto_migrate::dev_ca::HostMaterial;
use casemate_crypto_migrate::identity::Pinned;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::answers::MoveReport;
use crate::cleanup::Cleanup;
use crate::error::{E2eError, OnFile, Result, io};
use crate::network::{BRIDGE, Namespace};
use crate::sys::tie;

/// What a site is made of.
pub struct SiteSpec<'a> {
    /// Name of the host.
    pub name: &'static str,
    /// Where it lives.
    pub namespace: &'a Arc<Namespace>,
    /// Where it accepts migrations.
    pub listen: Option<SocketAddr>,
    /// Its certificate and key.
    pub material: &'a HostMaterial,
    /// The site authority, PEM.
    pub authority: &'a str,
    /// The emulated platform it is; makes its own if there is none.
    pub platform: Option<&'a [u8]>,
    /// Its SEV-SNP identity; SEV-SNP guests are allowed only where there is one.
    pub snp: Option<&'a [u8]>,
    /// Emulated roots it trusts as targets, `sha256:…`.
    pub trusted_roots: &'a [String],
    /// Whom it may exchange guests with.
    pub peers: Vec<PeerSpec>,
    /// The disk `data` of arriving guests.
    pub disk: Option<&'a Path>,
    /// First user id of its roles.
    pub uid_base: u32,
}

/// One peer of a site's policy.
pub struct PeerSpec {
    /// Its name there.
    pub name: &'static str,
    /// Its certificate.
    pub identity: Pinned,
    /// The gateway on the way, if the policy names one.
    pub gateway: Option<Pinned>,
    /// Where it is reached.
    pub address: Option<SocketAddr>,
}

/// A running host.
pub struct Site {
    name: &'static str,
    folder: PathBuf,
    casemate: PathBuf,
    namespace: Arc<Namespace>,
    cleanup: Cleanup,
    agent: Option<Child>,
}

/// What a command said.
#[derive(Clone, Debug)]
pub struct Said {
    /// Exit status; -1 for a signal.
    pub status: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Said {
    /// The stable code at the end of an error, `[CODE]`; empty if there is none.
    pub fn code(&self) -> &str {
        let last = self
            .stderr
            .trim_end()
            .rsplit_once('[')
            .map(|(_, rest)| rest.trim_end_matches(']'));
        last.filter(|code| code.bytes().all(|b| b.is_ascii_uppercase() || b == b'_'))
            .unwrap_or_default()
    }
}

/// How a migration ended.
#[derive(Clone, Debug)]
pub enum Moved {
    /// The guest runs there.
    Yes(MoveReport),
    /// It did not move.
    No(Said),
}

impl Moved {
    /// The report, or what the command said as an error.
    pub fn report(self) -> Result<MoveReport> {
        match self {
            Moved::Yes(report) => Ok(report),
            Moved::No(said) => Err(E2eError::Command {
                command: "migrate".into(),
                status: said.status,
                said: tail(&said.stderr),
            }),
        }
    }

    /// The code of a refusal; `MOVED` if it moved.
    pub fn code(&self) -> &str {
        match self {
            Moved::Yes(_) => "MOVED",
            Moved::No(said) => said.code(),
        }
    }
}

impl Site {
    /// Writes the site's files below `folder`, and starts its agent without waiting for it.
    pub fn start(
        spec: &SiteSpec<'_>,
        casemate: &Path,
        folder: &Path,
        cleanup: &Cleanup,
    ) -> Result<Self> {
        let folder = folder.join(spec.name);
        write_files(spec, &folder)?;
        let mut site = Self {
            name: spec.name,
            folder,
            casemate: casemate.to_owned(),
            namespace: Arc::clone(spec.namespace),
            cleanup: cleanup.clone(),
            agent: None,
        };
        site.start_agent()?;
        Ok(site)
    }

    /// Waits until the agent answers.
    pub fn wait_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + AGENT_READY;
        loop {
            if UnixStream::connect(self.socket()).is_ok() {
                return Ok(());
            }
            let ended = self
                .agent
                .as_mut()
                .map(Child::try_wait)
                .transpose()
                .map_err(io("wait for the agent"))?
                .flatten();
            if ended.is_some() || Instant::now() > deadline {
                return Err(E2eError::TimedOut {
                    what: format!("the start of the agent of {}", self.name),
                    seconds: AGENT_READY.as_secs(),
                    more: format!("; its log ends: {}", self.log_tail()),
                });
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Name of the host.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Where its files are.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where it lives.
    pub fn namespace(&self) -> &Arc<Namespace> {
        &self.namespace
    }

    /// The agent's process id.
    pub fn agent_pid(&self) -> Option<u32> {
        self.agent.as_ref().map(Child::id)
    }

    /// The end of the agent's log, for people.
    pub fn log_tail(&self) -> String {
        tail(&fs::read_to_string(self.folder.join("agent.log")).unwrap_or_default())
    }

    /// Runs `casemate` here, whatever comes of it.
    pub fn casemate(&self, arguments: &[&str]) -> Result<Said> {
        let output = self
            .command(arguments)?
            .output()
            .map_err(io("run casemate"))?;
        Ok(Said {
            status: status_of(output.status),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Runs `casemate`, which must succeed, and reads the JSON object it prints.
    pub fn ask<T: DeserializeOwned>(&self, arguments: &[&str]) -> Result<T> {
        let said = self.done(arguments)?;
        parse(&said.stdout, arguments)
    }

    /// Runs `casemate`, which must succeed.
    pub fn done(&self, arguments: &[&str]) -> Result<Said> {
        let said = self.casemate(arguments)?;
        if said.status == 0 {
            return Ok(said);
        }
        let said_last = if said.stderr.is_empty() {
            &said.stdout
        } else {
            &said.stderr
        };
        Err(E2eError::Command {
            command: arguments.join(" "),
            status: said.status,
            said: tail(said_last),
        })
    }

    /// `casemate migrate`; `on_event` sees every progress event while it runs.
    pub fn migrate(
        &self,
        guest: &str,
        to: &str,
        on_event: &mut dyn FnMut(&Value),
    ) -> Result<Moved> {
        self.migrate_with(guest, to, &[], on_event)
    }

    /// The same with more arguments.
    pub fn migrate_with(
        &self,
        guest: &str,
        to: &str,
        more: &[&str],
        on_event: &mut dyn FnMut(&Value),
    ) -> Result<Moved> {
        let mut arguments = vec!["migrate", guest, "--to", to];
        arguments.extend(more);
        let mut command = self.command(&arguments)?;
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(io("run casemate"))?;
        let mut last = None;
        for line in child
            .stdout
            .take()
            .into_iter()
            .flat_map(|out| BufReader::new(out).lines())
        {
            let value: Value = parse(&line.map_err(io("read progress"))?, &arguments)?;
            on_event(&value);
            last = Some(value);
        }
        let mut stderr = String::new();
        if let Some(mut pipe) = child.stderr.take() {
            pipe.read_to_string(&mut stderr)
                .map_err(io("read errors"))?;
        }
        let status = status_of(child.wait().map_err(io("wait for casemate"))?);
        if status != 0 {
            return Ok(Moved::No(Said {
                status,
                stdout: String::new(),
                stderr,
            }));
        }
        let report = serde_json::from_value(last.unwrap_or_default()).map_err(|e| {
            E2eError::Answer(format!("the outcome of a migration cannot be read: {e}"))
        })?;
        Ok(Moved::Yes(report))
    }

    /// Ends the agent (SIGTERM) and waits for it.
    pub fn stop(&mut self) -> Result<()> {
        self.end_agent(Signal::SIGTERM)
    }

    /// Kills the agent without a warning and waits for it.
    pub fn kill(&mut self) -> Result<()> {
        self.end_agent(Signal::SIGKILL)
    }

    fn end_agent(&mut self, signal: Signal) -> Result<()> {
        let Some(mut child) = self.agent.take() else {
            return Ok(());
        };
        let pid = Pid::from_raw(child.id().cast_signed());
        // Ended already is just as good.
        let _ = kill(pid, signal);
        let deadline = Instant::now() + AGENT_END;
        while child
            .try_wait()
            .map_err(io("wait for the agent"))?
            .is_none()
        {
            if Instant::now() > deadline {
                let _ = child.kill();
                let _ = child.wait();
                self.cleanup.forget(child.id());
                return Err(E2eError::TimedOut {
                    what: format!("the end of the agent of {}", self.name),
                    seconds: AGENT_END.as_secs(),
                    more: "; it was killed".into(),
                });
            }
            thread::sleep(Duration::from_millis(10));
        }
        self.cleanup.forget(child.id());
        Ok(())
    }

    /// Starts the agent again, with the files that are there.
    pub fn start_agent(&mut self) -> Result<()> {
        let log_path = self.folder.join("agent.log");
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log_path)
            .on("open", &log_path)?;
        let mut command = Command::new(&self.casemate);
        command
            .arg("agent")
            .arg("--config")
            .arg(self.folder.join("agent.toml"))
            .stdin(Stdio::null());
        command
            .stdout(log.try_clone().on("share", &log_path)?)
            .stderr(log);
        tie(&mut command, self.namespace.handle()).map_err(io("start the agent"))?;
        let start = || {
            let child = command.spawn().map_err(io("start the agent"))?;
            Ok((child.id(), child))
        };
        self.agent = Some(self.cleanup.start(start)?);
        Ok(())
    }

    fn command(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = Command::new(&self.casemate);
        command
            .arg("--agent")
            .arg(self.socket())
            .arg("--json")
            .args(arguments)
            .stdin(Stdio::null());
        tie(&mut command, self.namespace.handle()).map_err(io("run casemate"))?;
        Ok(command)
    }

    fn socket(&self) -> PathBuf {
        self.folder.join("agent.sock")
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!(
                "the agent's log of {} ends:\n{}",
                self.name,
                self.log_tail()
            );
        }
        if let Err(error) = self.stop() {
            eprintln!("{error}");
        }
    }
}

/// The last lines of a text.
pub fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.trim_end().lines().collect();
    lines
        .get(lines.len().saturating_sub(TAIL)..)
        .unwrap_or_default()
        .join("\n")
}

fn write_files(spec: &SiteSpec<'_>, folder: &Path) -> Result<()> {
    let state = folder.join("state");
    fs::create_dir_all(&state).on("create", &state)?;
    let secret = |path: PathBuf, bytes: &[u8]| {
        fs::write(&path, bytes)
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o600)))
            .on("write", &path)
    };
    let plain = |file: &str, text: &str| {
        let path = folder.join(file);
        fs::write(&path, text).on("write", &path)
    };
    if let Some(platform) = spec.platform {
        secret(state.join("processor.identity"), platform)?;
    }
    if let Some(snp) = spec.snp {
        secret(state.join("processor-snp.identity"), snp)?;
    }
    secret(folder.join("host.key"), spec.material.key_pem.as_bytes())?;
    secret(folder.join("snapshots.key"), &[7; 32])?;
    plain("host.crt", &spec.material.certificate_pem)?;
    plain("ca.crt", spec.authority)?;
    plain("policy.toml", &policy(spec))?;
    plain("agent.toml", &configuration(spec))
}

fn configuration(spec: &SiteSpec<'_>) -> String {
    let listen = spec
        .listen
        .map(|address| format!("listen = \"{address}\"\n"))
        .unwrap_or_default();
    let mut text = format!(
        "name = \"{}\"\nstate_dir = \"state\"\nsocket = \"agent.sock\"\npolicy = \"policy.toml\"\nuid_base = {}\n{listen}\
         snapshots = {{ key = \"snapshots.key\" }}\n\
         \n[identity]\ncertificate = \"host.crt\"\nkey = \"host.key\"\nca = \"ca.crt\"\n\n[peers]\n",
        spec.name, spec.uid_base
    );
    for peer in &spec.peers {
        text.extend(
            peer.address
                .map(|address| format!("{} = \"{address}\"\n", peer.name)),
        );
    }
    text
}

fn policy(spec: &SiteSpec<'_>) -> String {
    let roots: Vec<String> = spec
        .trusted_roots
        .iter()
        .map(|root| format!("\"{root}\""))
        .collect();
    let mut text = format!(
        "[host]\nname = \"{}\"\n\n[technologies]\nallowed = [\"none\", \"sev\", \"sev-es\"{}]\nallow_emulated = true\n\n\
         [limits]\nmax_vcpus = 4\nmax_memory_mib = 1024\n\n\
         [migration]\noutgoing = true\nincoming = true\ndowntime_limit_ms = 500\ntrusted_emulated_roots = [{}]\n",
        spec.name,
        spec.snp.map_or("", |_| ", \"sev-snp\""),
        roots.join(", ")
    );
    for peer in &spec.peers {
        let (san, spki) = (&peer.identity.san, hex::encode(peer.identity.spki_sha256));
        text += &format!(
            "\n[[peer]]\nname = \"{}\"\nsan = \"{san}\"\nspki = \"sha256:{spki}\"\n",
            peer.name
        );
        text += &match &peer.gateway {
            None => "path = \"direct\"\n".to_owned(),
            Some(gateway) => format!(
                "path = \"gateway\"\ngateway = {{ san = \"{}\", spki = \"sha256:{}\" }}\n",
                gateway.san,
                hex::encode(gateway.spki_sha256)
            ),
        };
    }
    if let Some(disk) = spec.disk {
        text += &format!(
            "\n[[incoming_disk]]\nid = \"data\"\npath = \"{}\"\n",
            disk.display()
        );
    }
    text + &format!("\n[[incoming_net]]\nid = \"net0\"\nbridge = \"{BRIDGE}\"\n")
}

fn parse<T: DeserializeOwned>(text: &str, arguments: &[&str]) -> Result<T> {
    serde_json::from_str(text).map_err(|e| {
        E2eError::Answer(format!(
            "`casemate {}` printed what cannot be read ({e}): {}",
            arguments.join(" "),
            tail(text)
        ))
    })
}

fn status_of(status: ExitStatus) -> i32 {
    status
        .code()
        .unwrap_or_else(|| -status.signal().unwrap_or(1))
}

const AGENT_READY: Duration = Duration::from_secs(60);
const AGENT_END: Duration = Duration::from_secs(15);
const TAIL: usize = 8;

#[cfg(test)]
mod tests {
    use casemate_crypto_migrate::dev_ca::DevCa;
    use casemate_policy::HostPolicy;

    use super::*;

    #[test]
    fn the_policy_is_one_that_the_product_reads() {
        let ca = DevCa::new("test").unwrap();
        let (own, peer) = (ca.issue("a.test").unwrap(), ca.issue("b.test").unwrap());
        let namespace = Arc::new(Namespace::of_this_thread().unwrap());
        let roots = [format!("sha256:{}", "11".repeat(32))];
        let entry = |name, identity: &HostMaterial, gateway| PeerSpec {
            name,
            identity: identity.pinned().unwrap(),
            gateway,
            address: Some("10.77.0.2:7400".parse().unwrap()),
        };
        let gateway = ca.issue("gw.test").unwrap();
        let spec = SiteSpec {
            name: "site-a",
            namespace: &namespace,
            listen: Some("10.77.0.1:7400".parse().unwrap()),
            material: &own,
            authority: ca.certificate_pem(),
            platform: None,
            snp: None,
            trusted_roots: &roots,
            peers: vec![
                entry("b", &peer, None),
                entry("c", &gateway, Some(own.pinned().unwrap())),
            ],
            disk: Some(Path::new("/disk")),
            uid_base: 1,
        };
        let read = HostPolicy::parse("policy.toml", &policy(&spec)).unwrap();
        assert_eq!(read.peers().len(), 2);
        assert_eq!(read.incoming_disk("data").unwrap().path, Path::new("/disk"));
        let agent: toml::Table = configuration(&spec).parse().unwrap();
        assert_eq!(agent["peers"]["b"].as_str(), Some("10.77.0.2:7400"));
    }

    #[test]
    fn a_code_is_the_last_bracket_of_an_error() {
        let said = |stderr: &str| Said {
            status: 1,
            stdout: String::new(),
            stderr: stderr.into(),
        };
        assert_eq!(
            said("casemate: a [b] refused [PAGE_REPLAYED]\n").code(),
            "PAGE_REPLAYED"
        );
        assert_eq!(said("casemate: a [b]\n").code(), "");
        assert_eq!(said("").code(), "");
    }
}
