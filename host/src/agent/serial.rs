//! The serial console of a guest, between its VMM and those who look at it or type at it.
//!
//! What the guest writes goes to a file and to whoever is connected; what they type goes into a pipe that its VMM reads.
//! A connection is made by `console-open`, which the policy decides: each has a Unix socket of its own, which belongs
//! to who asked, is there for some seconds and takes one connection.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use casemate_policy::claims::Actor;
use casemate_policy::ledger::{Entry, Outcome};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::agent::Agent;
use crate::agent::api::{Answer, Failure};
use crate::agent::authority::Caller;
use crate::agent::launch::random_id;
use crate::agent::vmm_process::lock;

/// The console of one guest.
pub struct SerialConsole {
    inner: Mutex<Inner>,
    /// What its VMM reads; never waits.
    input: File,
}

#[derive(Default)]
struct Inner {
    /// The last bytes that the guest has written.
    recent: VecDeque<u8>,
    watchers: Vec<(u64, UnixStream)>,
    next: u64,
    /// Sockets that wait for their connection.
    waiting: usize,
    /// Its VMM has ended.
    ended: bool,
}

/// The VMM's ends.
pub struct VmmEnds {
    /// What the guest writes.
    pub output: OwnedFd,
    /// What is typed.
    pub input: OwnedFd,
}

impl SerialConsole {
    /// A console whose output is kept in `file` until [`CONSOLE_LIMIT`]: a guest that prints without end fills no disk, and
    /// a VMM never waits for one.
    pub fn new(file: File) -> std::io::Result<(Arc<Self>, VmmEnds)> {
        let (output, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        let (reader, input) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        fcntl(&input, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let console = Arc::new(Self {
            inner: Mutex::default(),
            input: input.into(),
        });
        let copied = Arc::clone(&console);
        let copy = move || copied.copy(File::from(output), file);
        std::thread::Builder::new()
            .name("console".into())
            .spawn(copy)?;
        let ends = VmmEnds {
            output: writer,
            input: reader,
        };
        Ok((console, ends))
    }

    fn copy(&self, mut from: File, mut to: File) {
        let mut room = CONSOLE_LIMIT;
        let mut buffer = [0u8; 4096];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            let Some(bytes) = buffer.get(..count) else {
                break;
            };
            let keep = bytes.get(..count.min(room)).unwrap_or_default();
            room -= keep.len();
            if let Err(error) = to.write_all(keep) {
                tracing::warn!(%error, "console output is lost from here on");
                room = 0;
            }
            lock(&self.inner).show(bytes);
        }
        let mut inner = lock(&self.inner);
        inner.ended = true;
        for (_, watcher) in inner.watchers.drain(..) {
            let _ = watcher.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Waits for one connection at a socket of its own, on a thread of its own, and serves it to its end.
    fn open(self: &Arc<Self>, listener: UnixListener, path: PathBuf) -> std::io::Result<()> {
        let console = Arc::clone(self);
        std::thread::Builder::new()
            .name("console-session".into())
            .spawn(move || {
                let connection = connected(&listener);
                // Gone already is just as good.
                let _ = std::fs::remove_file(&path);
                drop(listener);
                lock(&console.inner).waiting -= 1;
                if let Some(connection) = connection {
                    console.serve(connection);
                }
            })?;
        Ok(())
    }

    fn serve(&self, mut connection: UnixStream) {
        let Some(id) = self.join(&connection) else {
            return;
        };
        let mut typed = [0u8; 1024];
        while let Ok(count @ 1..) = read_some(&mut connection, &mut typed) {
            let typed = typed.get(..count).unwrap_or_default();
            if !self.type_in(typed, &connection) {
                break;
            }
        }
        lock(&self.inner)
            .watchers
            .retain(|(watcher, _)| *watcher != id);
    }

    /// Shows what was written last, then all that comes.
    fn join(&self, connection: &UnixStream) -> Option<u64> {
        connection.set_nonblocking(true).ok()?;
        let mut watcher = connection.try_clone().ok()?;
        let mut inner = lock(&self.inner);
        if inner.ended {
            return None;
        }
        let recent: Vec<u8> = inner.recent.iter().copied().collect();
        watcher.write_all(&recent).ok()?;
        let id = inner.next;
        inner.next += 1;
        inner.watchers.push((id, watcher));
        Some(id)
    }

    /// Into the guest's receiver, as fast as the guest takes it; false when nobody types or nobody takes any more.
    fn type_in(&self, mut typed: &[u8], connection: &UnixStream) -> bool {
        while !typed.is_empty() {
            match (&self.input).write(typed) {
                Ok(count) => typed = typed.get(count..).unwrap_or_default(),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    let mut fds = [
                        PollFd::new(self.input.as_fd(), PollFlags::POLLOUT),
                        // Only whether it hangs up.
                        PollFd::new(connection.as_fd(), PollFlags::empty()),
                    ];
                    let polled = poll(&mut fds, PollTimeout::NONE);
                    let [_, hung_up] = fds;
                    if polled.is_err() || hung_up.any().unwrap_or(true) {
                        return false;
                    }
                }
                Err(_) => return false,
            }
        }
        true
    }
}

impl Inner {
    /// A watcher that does not read loses bytes, and nobody waits for it.
    fn show(&mut self, bytes: &[u8]) {
        self.recent.extend(bytes);
        let over = self.recent.len().saturating_sub(RECENT);
        self.recent.drain(..over);
        self.watchers
            .retain_mut(|(_, watcher)| match watcher.write(bytes) {
                Ok(_) => true,
                Err(e) => e.kind() == ErrorKind::WouldBlock,
            });
    }
}

impl Agent {
    /// `casemate vm console --interactive`.
    pub(super) fn console_open(&self, caller: &Caller, name: &str) -> Result<Answer, Failure> {
        let Actor::Local { uid } = caller.actor() else {
            let text = "a serial console is typed at on its own host only; `casemate vm console` shows it from afar";
            return Err(Failure::new("NOT_LOCAL", text));
        };
        let guest = self.guest(name)?;
        {
            let mut inner = lock(&guest.serial.inner);
            if inner.waiting + inner.watchers.len() >= MAX_SESSIONS {
                let text = format!("{MAX_SESSIONS} consoles of {name} are open; close one first");
                return Err(Failure::new("CONSOLE_BUSY", text));
            }
            inner.waiting += 1;
        }
        let path = self
            .guest_folder(name)
            .join(format!("serial-{}.sock", hex::encode(random_id()?)));
        let opened = listen(&path, *uid)
            .and_then(|listener| guest.serial.open(listener, path.clone()))
            .map_err(|e| Failure::new("RESOURCE", format!("{}: {e}", path.display())));
        if let Err(failure) = opened {
            lock(&guest.serial.inner).waiting -= 1;
            return Err(failure);
        }
        let entry = Entry::new(caller.name(), "console", name, Outcome::Done);
        self.evidence
            .record(entry.emulated(guest.plan.technology.emulated()))?;
        Ok(Answer::ConsoleOpened { socket: path })
    }
}

fn listen(path: &Path, uid: u32) -> std::io::Result<UnixListener> {
    let listener = UnixListener::bind(path)?;
    let owned = std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .and_then(|()| chown(path, Some(uid), None));
    if let Err(error) = owned {
        let _ = std::fs::remove_file(path);
        return Err(error);
    }
    Ok(listener)
}

fn connected(listener: &UnixListener) -> Option<UnixStream> {
    match readable(listener.as_fd(), PollTimeout::from(PATIENCE_MS)) {
        true => Some(listener.accept().ok()?.0),
        false => None,
    }
}

fn read_some(connection: &mut UnixStream, to: &mut [u8]) -> std::io::Result<usize> {
    loop {
        match connection.read(to) {
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                readable(connection.as_fd(), PollTimeout::NONE);
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

fn readable(fd: BorrowedFd<'_>, timeout: PollTimeout) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    poll(&mut fds, timeout).is_ok_and(|count| count > 0)
}

/// How long a socket waits for its connection, in milliseconds.
const PATIENCE_MS: u16 = 10_000;
/// Most connections to one console.
const MAX_SESSIONS: usize = 4;
/// Bytes that are shown to who comes later.
const RECENT: usize = 16 << 10;
/// Most console output kept of one guest on one host, in bytes.
const CONSOLE_LIMIT: usize = 64 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn session(console: &Arc<SerialConsole>, folder: &Path, name: &str) -> UnixStream {
        let path = folder.join(name);
        let uid = nix::unistd::getuid().as_raw();
        let listener = listen(&path, uid).unwrap();
        lock(&console.inner).waiting += 1;
        console.open(listener, path.clone()).unwrap();
        let stream = UnixStream::connect(&path).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        stream
    }

    fn heard(stream: &mut UnixStream, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn who_comes_later_sees_what_was_last_and_both_type() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("log");
        let (console, ends) = SerialConsole::new(File::create(&file).unwrap()).unwrap();
        let (mut output, mut input) = (File::from(ends.output), File::from(ends.input));
        output.write_all(b"login: ").unwrap();
        let mut first = session(&console, folder.path(), "a");
        assert_eq!(heard(&mut first, 7), b"login: ");
        let mut second = session(&console, folder.path(), "b");
        assert_eq!(heard(&mut second, 7), b"login: ");
        output.write_all(b"who?").unwrap();
        assert_eq!(heard(&mut first, 4), b"who?");
        assert_eq!(heard(&mut second, 4), b"who?");
        let mut typed = [0; 2];
        first.write_all(b"me").unwrap();
        input.read_exact(&mut typed).unwrap();
        assert_eq!(&typed, b"me");
        drop(first);
        second.write_all(b"we").unwrap();
        input.read_exact(&mut typed).unwrap();
        assert_eq!(&typed, b"we");
        // The guest's end is everybody's.
        drop(output);
        assert_eq!(second.read(&mut typed).unwrap(), 0);
        assert_eq!(std::fs::read(&file).unwrap(), b"login: who?");
    }

    #[test]
    fn a_guest_that_reads_nothing_holds_up_nobody_who_hangs_up() {
        let folder = tempfile::tempdir().unwrap();
        let (console, _ends) = SerialConsole::new(tempfile::tempfile().unwrap()).unwrap();
        let mut stream = session(&console, folder.path(), "a");
        stream.set_nonblocking(true).unwrap();
        let begun = std::time::Instant::now();
        while stream.write(&[b'x'; 4096]).is_ok() || begun.elapsed() < Duration::from_millis(300) {}
        drop(stream);
        let gone = (0..400).any(|_| {
            std::thread::sleep(Duration::from_millis(5));
            lock(&console.inner).watchers.is_empty()
        });
        assert!(gone, "the session waits for ever");
    }
}
