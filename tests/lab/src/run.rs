//! Runs one program in a fresh lab: cargo's and nextest's target runner.

use std::{
    env,
    fs::{self, File},
    io::{self, Write},
    path::{Component, Path, PathBuf},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use tempfile::TempDir;

use crate::{
    backend::{self, Backend, DEFAULT_TIMEOUT},
    boot_disk,
    error::{Error, OnFile, Result},
    machine::{Machine, Parts, SYSTEM_SIZE},
    paths::{Paths, make_dir},
    payload::{Payload, make_blank},
    prepare::prepare,
    proto::{Exit, Kind, Run},
    say,
    tools::Tools,
};

/// What to run, and what to take along.
pub struct Request {
    /// Program and arguments.
    pub args: Vec<String>,
    /// Further files, `source` or `source=destination`.
    pub payload: Vec<String>,
    /// Where the files that the program leaves in `$LAB_OUT` shall go.
    pub out: Option<PathBuf>,
    /// After this time the lab is switched off.
    pub timeout: Duration,
    /// Variables set besides those passed through.
    pub extra_env: Vec<(String, String)>,
    /// Debian's disk, where it was made: the lab has it as [`SYSTEM_DISK`].
    pub debian: Option<PathBuf>,
    /// How often a program that failed in a lab gets another one.
    pub retries: u32,
}

impl Request {
    /// For these arguments, with what the environment says and what is built.
    pub fn new(paths: &Paths, args: Vec<String>) -> Result<Self> {
        let timeout = match env::var("LAB_TIMEOUT") {
            Ok(text) => Duration::from_secs(text.parse().map_err(|_| bad_timeout(&text))?),
            Err(_) => DEFAULT_TIMEOUT,
        };
        let named = env::var("LAB_PAYLOAD").unwrap_or_default();
        let payload = named
            .split(':')
            .filter(|path| !path.is_empty())
            .map(str::to_owned)
            .collect();
        let built = built(paths).into_iter().filter(|(_, path)| path.exists());
        let extra_env = built
            .map(|(name, path)| (name.to_owned(), path.display().to_string()))
            .collect();
        Ok(Self {
            args,
            payload,
            out: None,
            timeout,
            extra_env,
            debian: Some(paths.debian_disk()).filter(|disk| disk.exists()),
            retries: 0,
        })
    }
}

/// Run it where the machine allows, and return its exit status.
pub fn run(paths: &Paths, request: &Request) -> Result<i32> {
    let lists_only = request.args.iter().skip(1).any(|arg| arg == "--list");
    match Backend::choose()? {
        Backend::Off => Err(backend::replace(&request.args)),
        _ if lists_only => Err(backend::replace(&request.args)),
        Backend::Native => backend::run_native(request),
        Backend::Lab => run_until_it_holds(paths, request),
    }
}

/// QEMU's emulation of nested virtualisation is not perfect: on a busy machine it now and then panics the lab's kernel,
/// or faults or hangs the guest inside. A program that fails in a lab may begin anew in a fresh one; every attempt and
/// its end is said. What really is broken fails every time.
fn run_until_it_holds(paths: &Paths, request: &Request) -> Result<i32> {
    let mut attempt = 1;
    loop {
        let outcome = run_in_lab(paths, request);
        let (what, limit) = match &outcome {
            Err(error @ Error::Machine { .. }) => {
                (error.to_string(), BROKEN_LABS.max(request.retries))
            }
            Err(error @ Error::Timeout(_)) => (error.to_string(), request.retries),
            Ok(code) if *code != 0 => (format!("the program failed ({code})"), request.retries),
            Ok(_) if attempt > 1 => {
                say(&format!(
                    "held in attempt {attempt}; the attempts before it did not"
                ));
                return outcome;
            }
            _ => return outcome,
        };
        if attempt > limit {
            return outcome;
        }
        attempt += 1;
        say(&format!(
            "{what}; attempt {attempt} of {}, in a fresh lab",
            limit + 1
        ));
    }
}

fn run_in_lab(paths: &Paths, request: &Request) -> Result<i32> {
    let snapshot = prepare(paths, false)?;
    let tools = Tools::at(&paths.tools());
    let payload = payload(request)?;
    let scratch = scratch(paths)?;
    let (disk, console) = (scratch.path().join("disk"), scratch.path().join("console"));
    let system = match &request.debian {
        Some(disk) => disk.clone(),
        None => {
            let blank = scratch.path().join("system");
            make_blank(&blank, SYSTEM_SIZE)?;
            blank
        }
    };
    payload.write(&tools, scratch.path(), &disk)?;
    let order = order(request, payload.places())?;
    let deadline = Instant::now() + request.timeout;
    let (kernel, initrd) = (snapshot.kernel(), snapshot.initrd());
    let parts = Parts {
        kernel: &kernel,
        initrd: &initrd,
        disk: &disk,
        system: &system,
        console: &console,
    };
    let mut machine = Machine::restore(&tools, &parts, &snapshot.state())?;
    // QEMU has everything open: from here on even SIGKILL leaves no file behind.
    drop(scratch);
    machine.send(Kind::Run, &order)?;
    let exit = Stream {
        request,
        deadline,
        file: None,
    }
    .follow(&machine)?;
    match exit {
        Exit::Code(code) => Ok(code),
        Exit::Signal(signal) => {
            say(&format!("the program was ended by signal {signal}"));
            Ok(128 + signal)
        }
        Exit::NotStarted(why) => Err(Error::Machine {
            what: format!("could not start the program: {why}"),
            console: String::new(),
        }),
    }
}

/// What comes out of a running lab, on its way to where it belongs.
struct Stream<'a> {
    request: &'a Request,
    deadline: Instant,
    file: Option<(PathBuf, File)>,
}

impl Stream<'_> {
    fn follow(mut self, machine: &Machine) -> Result<Exit> {
        loop {
            let Some((kind, data)) = machine.next_frame(self.deadline)? else {
                return Err(Error::Timeout(self.request.timeout));
            };
            match kind {
                Kind::Stdout => pass_on(&mut io::stdout(), &data)?,
                Kind::Stderr => pass_on(&mut io::stderr(), &data)?,
                Kind::File => self.file = self.open(&String::from_utf8_lossy(&data))?,
                Kind::FileData => {
                    if let Some((path, file)) = &mut self.file {
                        file.write_all(&data).on("write", path)?;
                    }
                }
                Kind::Started | Kind::Ready => {}
                Kind::Exit => {
                    return serde_json::from_slice(&data)
                        .map_err(|error| machine.failed(&format!("spoke rubbish: {error}")));
                }
                Kind::Run => return Err(machine.failed("spoke out of turn")),
            }
        }
    }

    /// The program under test chose the name: it may not lead out of the output directory.
    fn open(&self, name: &str) -> Result<Option<(PathBuf, File)>> {
        let Some(out) = &self.request.out else {
            return Ok(None);
        };
        if !is_plain(name) {
            return Err(Error::Usage(format!(
                "the lab offered a file with the path {name}"
            )));
        }
        let path = out.join(name);
        make_dir(path.parent().unwrap_or(out))?;
        let file = File::create(&path).on("create", &path)?;
        Ok(Some((path, file)))
    }
}

fn is_plain(name: &str) -> bool {
    !name.is_empty()
        && Path::new(name)
            .components()
            .all(|part| matches!(part, Component::Normal(_)))
}

fn pass_on(to: &mut impl Write, data: &[u8]) -> Result<()> {
    to.write_all(data)
        .and_then(|()| to.flush())
        .on("write to", Path::new("our standard output"))
}

fn payload(request: &Request) -> Result<Payload> {
    let mut payload = Payload::default();
    if let Some(program) = request.args.first() {
        payload.add(Path::new(program))?;
    }
    for (_, path) in &request.extra_env {
        payload.add(Path::new(path))?;
    }
    for entry in &request.payload {
        match entry.split_once('=') {
            Some((source, at)) => payload.add_at(Path::new(source), at.to_owned())?,
            None => payload.add(Path::new(entry))?,
        }
    }
    Ok(payload)
}

/// What tests of guests need, by the variable that names it inside.
fn built(paths: &Paths) -> [(&'static str, PathBuf); 14] {
    [
        ("LAB_CASEMATE", paths.release.join("casemate")),
        ("LAB_CASEMATE_GUEST", paths.release.join("casemate-guest")),
        ("LAB_CASEMATE_AGENT", paths.release.join("casemate-agent")),
        ("LAB_DEBIAN_KERNEL", paths.debian_kernel()),
        ("LAB_DEBIAN_INITRD", paths.debian_initrd()),
        ("LAB_GUEST_KERNEL", paths.guest_kernel()),
        ("LAB_GUEST_VMLINUX", paths.guest_vmlinux()),
        ("LAB_GUEST_INITRD", paths.guest_initrd()),
        ("LAB_GUEST_NEWER_KERNEL", paths.newer_kernel()),
        ("LAB_GUEST_NEWER_INITRD", paths.newer_initrd()),
        ("LAB_FIRMWARE", boot_disk::firmware(&paths.firmware())),
        ("LAB_FIRMWARE_AMDSEV", boot_disk::AMDSEV.image(paths)),
        ("LAB_FIRMWARE_TRIXIE", boot_disk::TRIXIE.image(paths)),
        ("LAB_BOOT_DISK", paths.boot_disk()),
    ]
}

fn order(request: &Request, files: Vec<String>) -> Result<Vec<u8>> {
    let mut args = request.args.clone();
    if let Some(program) = args.first_mut() {
        let absolute = std::path::absolute(&*program).on("find", Path::new(program))?;
        *program = absolute.display().to_string();
    }
    let mut env: Vec<(String, String)> = env::vars()
        .filter(|(name, _)| is_passed_through(name))
        .collect();
    env.extend(FIXED_ENV.map(|(name, value)| (name.to_owned(), value.to_owned())));
    env.extend(request.extra_env.iter().cloned());
    if request.debian.is_some() {
        env.push((DEBIAN_DISK.to_owned(), SYSTEM_DISK.to_owned()));
    }
    let out = request.out.is_some().then(|| INNER_OUT.to_owned());
    env.extend(out.clone().map(|out| ("LAB_OUT".to_owned(), out)));
    let cwd = env::current_dir()
        .on("find", Path::new("the working directory"))?
        .display()
        .to_string();
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let clock = (now.as_secs().cast_signed(), i64::from(now.subsec_nanos()));
    let kernel_log = env::var_os("LAB_DMESG").is_some();
    serde_json::to_vec(&Run {
        args,
        env,
        cwd,
        clock,
        files,
        out,
        kernel_log,
    })
    .map_err(|error| Error::Usage(error.to_string()))
}

/// Only what cargo, its test runners and this project set: nothing else of the host is the lab's business.
fn is_passed_through(name: &str) -> bool {
    let secret = ["TOKEN", "SECRET", "PASSWORD", "REGISTR"]
        .iter()
        .any(|part| name.contains(part));
    !secret
        && ["CARGO_", "RUST_", "NEXTEST", "CASEMATE_"]
            .iter()
            .any(|prefix| name.starts_with(prefix))
}

/// A directory for one run; those of processes that no longer live are removed.
fn scratch(paths: &Paths) -> Result<TempDir> {
    let runs = paths.runs();
    make_dir(&runs)?;
    for entry in fs::read_dir(&runs)
        .on("list", &runs)?
        .filter_map(std::result::Result::ok)
    {
        let name = entry.file_name();
        let owner = name
            .to_str()
            .and_then(|name| name.split_once('-'))
            .map(|(pid, _)| Path::new("/proc").join(pid));
        if owner.is_none_or(|owner| !owner.exists()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    tempfile::Builder::new()
        .prefix(&format!("{}-", std::process::id()))
        .tempdir_in(&runs)
        .on("create a directory in", &runs)
}

fn bad_timeout(text: &str) -> Error {
    Error::Usage(format!("LAB_TIMEOUT={text}: give whole seconds"))
}

const INNER_OUT: &str = "/out";
/// Where the lab has Debian's disk, to write to as well: the machine's second disk.
const SYSTEM_DISK: &str = "/dev/vdb";
/// Tells programs where it is.
pub const DEBIAN_DISK: &str = "LAB_DEBIAN_DISK";

/// `LAB=off`: a lab inside the lab would only be slow.
const FIXED_ENV: [(&str, &str); 5] = [
    ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
    ("HOME", "/root"),
    ("TMPDIR", "/tmp"),
    ("LAB", "off"),
    ("LAB_INSIDE", "tcg"),
];

/// How often a program gets another lab because its lab broke under it.
const BROKEN_LABS: u32 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_names_stay_below_the_directory() {
        assert!(is_plain("a/b.txt"));
        assert!(
            !is_plain("../b")
                && !is_plain("/etc/passwd")
                && !is_plain("a/../../b")
                && !is_plain("")
        );
    }

    #[test]
    fn tokens_stay_outside() {
        assert!(is_passed_through("CARGO_MANIFEST_DIR") && is_passed_through("RUST_BACKTRACE"));
        assert!(
            !is_passed_through("CARGO_REGISTRY_TOKEN")
                && !is_passed_through("CARGO_REGISTRIES_X_INDEX")
        );
        assert!(!is_passed_through("HOME") && !is_passed_through("AWS_PROFILE"));
    }
}
