//! Two hosts that name each other as peers, and the way between them, which may be slow, be cut, or fall silent.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use casemate_crypto_migrate::dev_ca::{DevCa, HostMaterial};
use serde_json::Value;

use super::{Host, IDENTITY, Ran};

/// Two hosts. What leaves one for the other goes over a [`Way`].
pub struct Pair {
    pub a: Host,
    pub b: Host,
    /// From `a` to `b`.
    pub there: Way,
    /// From `b` to `a`.
    pub back: Way,
}

impl Pair {
    /// Both run. `more` goes behind either policy.
    pub fn new(tag: &str, more: [&str; 2]) -> Self {
        let ca = DevCa::new("test").unwrap();
        let [x, y] = ["a.casemate.test", "b.casemate.test"].map(|san| ca.issue(san).unwrap());
        let [port_a, port_b] = [free_port(), free_port()];
        let (there, back) = (Way::to(port_b), Way::to(port_a));
        let host = |letter: &str, own: &HostMaterial, peer: (&str, &HostMaterial), more: &str| {
            let host = Host::with_policy(
                &format!("{tag}-{letter}"),
                &policy(letter, peer.0, peer.1, more),
            );
            host.write("ca.pem", ca.certificate_pem());
            host.write("host.pem", &own.certificate_pem);
            host.write("host.key", &own.key_pem);
            host
        };
        let mut a = host("a", &x, ("b", &y), more[0]);
        let mut b = host("b", &y, ("a", &x), more[1]);
        for (host, port, peer, way) in [(&mut a, port_a, "b", &there), (&mut b, port_b, "a", &back)]
        {
            host.listen = Some(port);
            host.configure(&format!(
                "listen = \"127.0.0.1:{port}\"\n{IDENTITY}[peers]\n{peer} = \"127.0.0.1:{}\"\n",
                way.port
            ));
            host.start();
        }
        Self { a, b, there, back }
    }
}

fn free_port() -> u16 {
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    free.local_addr().unwrap().port()
}

fn policy(name: &str, peer: &str, material: &HostMaterial, more: &str) -> String {
    let pinned = material.pinned().unwrap();
    let spki = hex::encode(pinned.spki_sha256);
    let san = pinned.san;
    format!(
        "[host]\nname = {name:?}\n[technologies]\nallowed = [\"none\", \"sev\"]\nallow_emulated = true\n\
         [limits]\nmax_vcpus = 2\nmax_memory_mib = 65536\n[migration]\noutgoing = true\nincoming = true\n\
         [[peer]]\nname = {peer:?}\nsan = {san:?}\nspki = \"sha256:{spki}\"\npath = \"direct\"\n{more}"
    )
}

/// A way to one port that passes bytes on.
pub struct Way {
    pub port: u16,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    /// What comes back is held for so long, in milliseconds.
    delay: AtomicU64,
    silent: AtomicBool,
    last_answer: AtomicBool,
    closed: AtomicBool,
    connections: AtomicUsize,
    open: Mutex<Vec<TcpStream>>,
}

impl Way {
    fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let state = Arc::<State>::default();
        let way = Self {
            port: listener.local_addr().unwrap().port(),
            state: Arc::clone(&state),
        };
        std::thread::spawn(move || {
            for near in listener.incoming().flatten() {
                if state.closed.load(Ordering::SeqCst) {
                    continue;
                }
                let Ok(far) = TcpStream::connect(("127.0.0.1", port)) else {
                    continue;
                };
                state.connections.fetch_add(1, Ordering::SeqCst);
                for one in [&near, &far] {
                    one.set_nodelay(true).unwrap();
                    state.open.lock().unwrap().push(one.try_clone().unwrap());
                }
                let ends = (near.try_clone().unwrap(), far.try_clone().unwrap());
                let (out, back) = (Arc::clone(&state), Arc::clone(&state));
                let deaf = Arc::<AtomicBool>::default();
                let deafened = Arc::clone(&deaf);
                std::thread::spawn(move || {
                    pass(ends.0, ends.1, &out, |_| deaf.load(Ordering::SeqCst))
                });
                std::thread::spawn(move || {
                    pass(far, near, &back, |state| {
                        let delay = state.delay.load(Ordering::SeqCst);
                        std::thread::sleep(Duration::from_millis(delay));
                        if state.last_answer.swap(false, Ordering::SeqCst) {
                            deafened.store(true, Ordering::SeqCst);
                        }
                        false
                    });
                });
            }
        });
        way
    }

    /// What comes back from now on takes so long.
    pub fn slow(&self, delay: Duration) {
        let delay = u64::try_from(delay.as_millis()).unwrap();
        self.state.delay.store(delay, Ordering::SeqCst);
    }

    /// Not a byte passes any more, and nobody is told.
    pub fn silence(&self) {
        self.state.silent.store(true, Ordering::SeqCst);
    }

    /// The next answer passes; of what is sent on that connection afterwards, nothing does.
    pub fn lose_what_follows_the_next_answer(&self) {
        self.state.last_answer.store(true, Ordering::SeqCst);
    }

    /// Ends every connection and takes no other.
    pub fn cut(&self) {
        self.state.closed.store(true, Ordering::SeqCst);
        for one in self.state.open.lock().unwrap().drain(..) {
            let _ = one.shutdown(Shutdown::Both);
        }
    }

    /// As it was.
    pub fn mend(&self) {
        self.slow(Duration::ZERO);
        self.state.silent.store(false, Ordering::SeqCst);
        self.state.closed.store(false, Ordering::SeqCst);
    }
}

/// `swallow` sees every piece before it goes on.
fn pass(mut from: TcpStream, mut to: TcpStream, state: &State, swallow: impl Fn(&State) -> bool) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if swallow(state) {
            continue;
        }
        while state.silent.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(20));
        }
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

impl Host {
    /// Runs `casemate --json migrate ...`; every event is shown to `see` as it comes.
    pub fn migrate(&self, args: &[&str], mut see: impl FnMut(&Value)) -> Ran {
        let mut command = self.command(&["--json", "migrate"]);
        command.args(args);
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut out = String::new();
        for line in BufReader::new(child.stdout.take().unwrap()).lines() {
            out = line.unwrap();
            see(&serde_json::from_str(&out).unwrap());
        }
        let mut err = String::new();
        child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut err)
            .unwrap();
        let code = child.wait().unwrap().code();
        Ran { code, out, err }
    }

    /// The record of who owns a guest.
    pub fn ownership(&self, name: &str) -> Value {
        let record = self.path(&format!("state/ownership/{name}.json"));
        serde_json::from_slice(&std::fs::read(record).unwrap()).unwrap()
    }

    /// Whether the guest runs here.
    pub fn runs(&self, name: &str) -> bool {
        self.listed(name)
            .is_some_and(|guest| guest["state"] == "running")
    }
}
