//! Debian as `cargo lab debian-disk` makes it, and what its own programs say of its devices.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use casemate_e2e::answers::GuestInfo;
use casemate_e2e::guest_watch::{GuestWatch, ask};
use casemate_e2e::site::Site;
use serde::Deserialize;
use serde::de::DeserializeOwned;

/// A Debian that is up.
pub struct Debian {
    pub watch: GuestWatch,
    vsock: PathBuf,
    console: PathBuf,
}

impl Debian {
    /// Waits until systemd has started the tests' unit, and what it needs.
    pub fn up(site: &Site, info: &GuestInfo) -> Self {
        let begun = Instant::now();
        let mut debian = Self {
            watch: GuestWatch::new(&info.console),
            vsock: info.vsock.clone().unwrap(),
            console: info.console.clone(),
        };
        debian.watch.update().unwrap();
        while !debian.watch.ready {
            let state = site
                .ask::<GuestInfo>(&["status", &info.name])
                .unwrap()
                .state;
            assert!(
                state == "running" && begun.elapsed() < UP,
                "systemd has not started our unit; the guest is {state}"
            );
            std::thread::sleep(Duration::from_secs(1));
            debian.watch.update().unwrap();
        }
        // socat has been started; it listens a moment later.
        while let Err(error) = ask::<serde_json::Value>(&debian.vsock, "there system") {
            assert!(begun.elapsed() < UP, "no answer through vsock: {error}");
            std::thread::sleep(Duration::from_millis(200));
        }
        eprintln!("Debian is up after {:.1} s", begun.elapsed().as_secs_f64());
        debian
    }

    /// A request to the guest's `casemate-device`, which must succeed there.
    pub fn asked<T: DeserializeOwned>(&self, request: &str) -> T {
        let begun = Instant::now();
        let answer: serde_json::Value = ask(&self.vsock, request).unwrap();
        let seconds = begun.elapsed().as_secs_f64();
        eprintln!("{request}: {answer} ({seconds:.1} s)");
        assert_eq!(answer["ok"], true, "{request}: {answer}");
        serde_json::from_value(answer).unwrap()
    }

    /// Asks until it holds.
    pub fn until<T: DeserializeOwned>(&self, request: &str, holds: impl Fn(&T) -> bool) -> T {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let answer = self.asked(request);
            if holds(&answer) {
                return answer;
            }
            assert!(Instant::now() < deadline, "{request} does not come true");
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// The system as it came up: nothing failed in it. It may still be starting what nobody waits for.
    pub fn system(&self) -> System {
        let system: System = self.asked("system");
        assert_eq!(
            (system.version.as_str(), system.init.as_str()),
            ("12", "systemd")
        );
        assert_eq!(system.root, "ext4 debian");
        assert_eq!(system.failed, "");
        system
    }

    /// What the console has shown so far.
    pub fn said(&self) -> String {
        let bytes = fs::read(&self.console).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Drop for Debian {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let said = self.said();
            let lines: Vec<_> = said.lines().collect();
            let last = lines.get(lines.len().saturating_sub(60)..);
            eprintln!(
                "Debian's console ends:\n{}",
                last.unwrap_or_default().join("\n")
            );
        }
    }
}

/// A published example with this guest's files in it: each name must be there, once.
pub fn described(example: &str, replaced: &[(&str, &str)], more: &str, to: &Path) {
    let mut text = example.to_owned();
    for (name, with) in replaced {
        assert_eq!(text.matches(name).count(), 1, "{name} in {text}");
        text = text.replace(name, with);
    }
    fs::write(to, text + more).unwrap();
}

/// `system`
#[derive(Debug, Deserialize)]
pub struct System {
    version: String,
    pub release: String,
    pub loader: String,
    root: String,
    init: String,
    failed: String,
    pub cmdline: String,
}

/// `disk SERIAL`
#[derive(Debug, Deserialize)]
pub struct Disk {
    pub size: u64,
    pub read_only: u8,
    pub flushes: u64,
    pub discards: u64,
    pub zeroes_max: u64,
    pub sha256: String,
}

/// `size SERIAL`
#[derive(Debug, Deserialize)]
pub struct Size {
    pub size: u64,
}

/// `there SERIAL`
#[derive(Debug, Deserialize)]
pub struct There {
    pub there: bool,
}

/// `files SERIAL`
#[derive(Debug, Deserialize)]
pub struct Files {
    pub trimmed: u64,
}

/// `rom SERIAL`
#[derive(Debug, Deserialize)]
pub struct Rom {
    pub read_only: u8,
    pub refused: bool,
    pub sha256: String,
}

/// `card MAC ADDRESS NEIGHBOUR`
#[derive(Debug, Deserialize)]
pub struct Card {
    pub driver: String,
    pub answered: u32,
}

/// `rng`
#[derive(Debug, Deserialize)]
pub struct Rng {
    pub source: String,
    pub bytes: String,
}

/// `balloon`
#[derive(Debug, Deserialize)]
pub struct Balloon {
    pub inflated: u64,
    pub deflated: u64,
}

/// `interrupts`: by device and driver.
#[derive(Debug, Deserialize)]
pub struct Interrupts {
    pub of: BTreeMap<String, u64>,
}

/// `watchdog`
#[derive(Debug, Deserialize)]
pub struct Watchdog {
    pub identity: String,
    pub state: String,
}

/// Where nothing is told but that it went well.
#[derive(Debug, Deserialize)]
pub struct Done {}

/// Firmware, boot loader, kernel and systemd; the lab is slow.
const UP: Duration = Duration::from_secs(240);
