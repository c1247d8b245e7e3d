//! A terminal joined to a guest's serial console: `casemate run --console` and `casemate vm console --interactive` on a
//! pseudo-terminal, against the real agent and a guest that echoes; and what a shell completes. Needs root and `/dev/kvm`.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::process::Child;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, Termios, tcgetattr};
use nix::unistd::Pid;
use support::{Host, small_image, until};

#[test]
fn a_guest_in_the_foreground_echoes_what_is_typed_and_its_end_is_the_status() {
    let mut host = Host::new("console");
    host.start();
    let path = describe(&host);
    for (end, status) in [("q", 0), ("r", 1)] {
        let mut terminal = Terminal::start(&host, &["run", &path, "--console"]);
        // More than its receiver holds.
        let line = "0123456789".repeat(20);
        terminal.types(&format!("{line}\r"));
        terminal.hears(&line);
        terminal.types(end);
        assert_eq!(terminal.ends(), Some(status), "{end}");
        assert!(host.listed("vm").is_none(), "it ends with its guest");
    }
}

#[test]
fn who_leaves_or_is_told_to_go_leaves_the_guest_and_the_terminal_as_they_were() {
    let mut host = Host::new("console-leave");
    host.start();
    let path = describe(&host);
    let mut terminal = Terminal::start(&host, &["run", &path, "--console"]);
    terminal.types("hello");
    terminal.hears("hello");
    terminal.types("not this\u{1d}nor that");
    assert_eq!(terminal.ends(), Some(0));
    assert_eq!(host.listed("vm").unwrap()["state"], "running");

    let join = ["vm", "console", "vm", "--interactive"];
    for (signal, status) in [(Signal::SIGTERM, 143), (Signal::SIGHUP, 129)] {
        let mut terminal = Terminal::start(&host, &join);
        // What was last is shown to who comes later; what was typed behind Ctrl-] was not.
        terminal.hears("hellonot this");
        assert!(!terminal.heard.contains("nor that"), "{}", terminal.heard);
        // A key that ends processes elsewhere is the guest's here.
        terminal.types("\u{3}x");
        terminal.hears("\u{3}x");
        terminal.signal(signal);
        assert_eq!(terminal.ends(), Some(status));
    }
    assert_eq!(host.listed("vm").unwrap()["state"], "running");
    let left = || {
        let folder = host.path("state/guests/vm");
        std::fs::read_dir(folder)
            .unwrap()
            .filter(|entry| {
                entry
                    .as_ref()
                    .unwrap()
                    .file_name()
                    .to_string_lossy()
                    .starts_with("serial-")
            })
            .count()
    };
    until("no socket is left behind", || left() == 0);
    // Two see the same, and a guest that is ended ends both.
    let (mut one, mut two) = (Terminal::start(&host, &join), Terminal::start(&host, &join));
    one.types("both");
    one.hears("both");
    two.hears("both");
    host.run(&["vm", "stop", "vm", "--force"]).expect(0);
    assert_eq!((one.ends(), two.ends()), (Some(1), Some(1)));
    let opened = host.records();
    let opened = opened
        .iter()
        .filter(|r| r["action"] == "console" && r["outcome"] == "done");
    assert_eq!(opened.count(), 5);
}

/// A command on a pseudo-terminal.
struct Terminal {
    child: Child,
    keys: File,
    slave: File,
    before: Termios,
    heard: String,
}

impl Terminal {
    fn start(host: &Host, args: &[&str]) -> Self {
        let pair = openpty(None, None).unwrap();
        let slave = File::from(pair.slave);
        let before = tcgetattr(&slave).unwrap();
        assert!(
            before
                .local_flags
                .contains(LocalFlags::ICANON | LocalFlags::ECHO)
        );
        let mut command = host.command(args);
        command
            .stdin(slave.try_clone().unwrap())
            .stdout(slave.try_clone().unwrap())
            .stderr(slave.try_clone().unwrap());
        let child = command.spawn().unwrap();
        let terminal = Self {
            child,
            keys: File::from(pair.master),
            slave,
            before,
            heard: String::new(),
        };
        until("the terminal is raw", || {
            let now = tcgetattr(&terminal.slave).unwrap();
            !now.local_flags
                .intersects(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG)
        });
        terminal
    }

    fn types(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
    }

    fn hears(&mut self, text: &str) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !self.heard.contains(text) {
            assert!(
                Instant::now() < deadline,
                "{text:?} is not in {:?}",
                self.heard
            );
            self.listen();
        }
    }

    /// What there is, for some milliseconds.
    fn listen(&mut self) {
        let mut fds = [PollFd::new(self.keys.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::from(50u8)).unwrap() > 0 {
            let mut bytes = [0; 4096];
            let count = self.keys.read(&mut bytes).unwrap_or(0);
            self.heard
                .push_str(&String::from_utf8_lossy(&bytes[..count]));
        }
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).unwrap();
        kill(Pid::from_raw(pid), signal).unwrap();
    }

    /// The exit status; the terminal is as it was.
    fn ends(&mut self) -> Option<i32> {
        let deadline = Instant::now() + Duration::from_secs(30);
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(
                Instant::now() < deadline,
                "it does not end: {:?}",
                self.heard
            );
            self.listen();
        };
        let now = tcgetattr(&self.slave).unwrap();
        assert_eq!(now, self.before, "the terminal is not as it was");
        status.code()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn describe(host: &Host) -> String {
    let description = host.describe("vm", "vm", "");
    let mut image = small_image();
    image.resize(1024 + 0x200 + 4096, 0);
    image[1024 + 0x200..][..ECHO.len()].copy_from_slice(ECHO);
    host.write("vm/vmlinuz", image);
    description
}

/// Echoes every byte; `q` switches off, `r` resets.
/// ```text
/// again:  mov edx, 0x3fd ; in al, dx ; test al, 1 ; jz again ; mov edx, 0x3f8 ; in al, dx
///         cmp al, 'q' ; je off ; cmp al, 'r' ; je reset ; out dx, al ; jmp again
/// off:    mov edx, 0x600 ; mov al, 0x34 ; out dx, al ; jmp $
/// reset:  mov edx, 0x64 ; mov al, 0xfe ; out dx, al ; jmp $
/// ```
const ECHO: &[u8] = &[
    0xba, 0xfd, 0x03, 0x00, 0x00, 0xec, 0xa8, 0x01, 0x74, 0xf6, 0xba, 0xf8, 0x03, 0x00, 0x00, 0xec,
    0x3c, 0x71, 0x74, 0x07, 0x3c, 0x72, 0x74, 0x0d, 0xee, 0xeb, 0xe5, 0xba, 0x00, 0x06, 0x00, 0x00,
    0xb0, 0x34, 0xee, 0xeb, 0xfe, 0xba, 0x64, 0x00, 0x00, 0x00, 0xb0, 0xfe, 0xee, 0xeb, 0xfe,
];

#[test]
fn bash_completes_the_names_of_guests_and_does_not_wait_for_an_agent_that_is_silent() {
    let mut host = Host::new("completion");
    host.start();
    for name in ["vault", "value", "other"] {
        let path = host.describe(name, name, "");
        host.run(&["run", &path]).expect(0);
    }
    let script = host.write(
        "casemate.bash",
        host.run(&["completion", "bash"]).expect(0).out,
    );
    let complete = |socket: &std::path::Path, words: &str| {
        let program = env!("CARGO_BIN_EXE_casemate");
        let line = format!(
            "source {script:?}; COMP_WORDS=({program} {words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); \
             _casemate_guests {program} \"${{COMP_WORDS[COMP_CWORD]}}\" \"${{COMP_WORDS[COMP_CWORD-1]}}\"; \
             echo \"${{COMPREPLY[@]}}\""
        );
        let output = std::process::Command::new("bash")
            .args(["--norc", "-c", &line])
            .env("CASEMATE_AGENT", socket)
            .output()
            .unwrap();
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    };
    assert_eq!(complete(&host.socket, "vm show va"), "value vault");
    assert_eq!(complete(&host.socket, "status o"), "other");
    assert_eq!(complete(&host.socket, "vm detach ''"), "other value vault");
    assert!(complete(&host.socket, "vm sh").contains("show"));
    assert!(!complete(&host.socket, "vm start va").contains("vault"));
    let nobody = host.path("nobody.sock");
    assert_eq!(complete(&nobody, "vm show va"), "");
    // Somebody listens and never answers.
    let silent = host.path("silent.sock");
    let _listener = std::os::unix::net::UnixListener::bind(&silent).unwrap();
    let begun = Instant::now();
    assert_eq!(complete(&silent, "vm show va"), "");
    assert!(begun.elapsed() < Duration::from_secs(5));
}
