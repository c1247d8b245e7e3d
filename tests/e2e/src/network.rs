//! Two sites, a world outside and a relay, each in a network namespace of its own, joined by bridges and veth pairs.
//!
//! ```text
//!  outside ──┐                                   guest (tap) ┐
//!            br0 of site-a ═══ veth ═══ br0 of site-b ───────┘
//!  relay  ───┘
//! ```
//!
//! Nothing has a name outside this process: namespaces live as long as a descriptor or a process holds them, and
//! links die with their namespace.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread;

use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, setns, unshare};
use rtnetlink::{Handle, LinkBridge, LinkUnspec, LinkVeth, new_connection};

use crate::error::{E2eError, Result};

/// One network namespace.
#[derive(Debug)]
pub struct Namespace {
    name: &'static str,
    handle: File,
}

impl Namespace {
    /// A new, empty one; `lo` is up.
    pub fn new(name: &'static str) -> Result<Self> {
        let made = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            File::open("/proc/thread-self/ns/net")
        });
        let handle = joined(made.join())
            .and_then(|r| r)
            .map_err(|e| failed(&format!("make namespace {name}"), &e))?;
        let namespace = Self { name, handle };
        namespace.netlink("set lo up", async |netlink| {
            netlink
                .link()
                .set(LinkUnspec::new_with_index(LOOPBACK).up().build())
                .execute()
                .await
        })?;
        Ok(namespace)
    }

    /// The one that the calling thread is in.
    pub fn of_this_thread() -> Result<Self> {
        let handle = File::open("/proc/thread-self/ns/net")
            .map_err(|e| failed("open the own namespace", &e))?;
        Ok(Self {
            name: "own",
            handle,
        })
    }

    /// Its name in this process.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The descriptor that holds it.
    pub fn handle(&self) -> &File {
        &self.handle
    }

    /// Runs `work` inside, on a thread of its own.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let inside = || -> std::io::Result<T> {
            setns(&self.handle, CloneFlags::CLONE_NEWNET)?;
            Ok(work())
        };
        let result = thread::scope(|scope| joined(scope.spawn(inside).join())).and_then(|r| r);
        result.map_err(|e| failed(&format!("enter namespace {}", self.name), &e))
    }

    /// Moves the calling thread inside, for good.
    pub fn enter(&self) -> Result<()> {
        setns(&self.handle, CloneFlags::CLONE_NEWNET)
            .map_err(|e| failed(&format!("enter namespace {}", self.name), &e))
    }

    /// Names of the interfaces in it.
    pub fn interfaces(&self) -> Result<Vec<String>> {
        let text = self
            .run(|| std::fs::read_to_string("/proc/thread-self/net/dev"))?
            .map_err(|e| failed("list interfaces", &e))?;
        Ok(text
            .lines()
            .filter_map(|line| line.split_once(':'))
            .map(|(name, _)| name.trim().to_owned())
            .collect())
    }

    fn netlink(
        &self,
        step: &str,
        work: impl AsyncFnOnce(Handle) -> std::result::Result<(), rtnetlink::Error> + Send,
    ) -> Result<()> {
        let inside = || -> std::result::Result<(), String> {
            let text = |e: std::io::Error| e.to_string();
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(text)?;
            runtime.block_on(async {
                let (connection, handle, _) = new_connection().map_err(text)?;
                tokio::spawn(connection);
                work(handle).await.map_err(|e| e.to_string())
            })
        };
        self.run(inside)?
            .map_err(|e| failed(&format!("{step} in {}", self.name), &e))
    }

    /// A bridge with an address of its own: otherwise it takes the lowest of its ports, and a tap that comes or goes
    /// changes it under everybody's neighbour tables.
    fn add_bridge(&self, name: &'static str, mac: [u8; 6]) -> Result<()> {
        self.netlink("add a bridge", async move |netlink| {
            netlink
                .link()
                .add(LinkBridge::new(name).address(mac.to_vec()).up().build())
                .execute()
                .await
        })
    }

    /// A veth pair: `near` here, `far` in the other namespace.
    fn add_veth(&self, near: &'static str, other: &Namespace, far: &'static str) -> Result<()> {
        let target = other.handle.as_raw_fd();
        self.netlink("add a veth pair", async move |netlink| {
            netlink
                .link()
                .add(LinkVeth::new(near, far).build())
                .execute()
                .await?;
            netlink
                .link()
                .set(
                    LinkUnspec::new_with_index(index(far))
                        .setns_by_fd(target)
                        .build(),
                )
                .execute()
                .await
        })
    }

    fn set_up(&self, link: &'static str, bridge: Option<&'static str>) -> Result<()> {
        self.netlink("set a link up", async move |netlink| {
            let mut message = LinkUnspec::new_with_index(index(link)).up();
            if let Some(bridge) = bridge {
                message = message.controller(index(bridge));
            }
            netlink.link().set(message.build()).execute().await
        })
    }

    fn add_address(&self, link: &'static str, address: Ipv4Addr) -> Result<()> {
        self.netlink("add an address", async move |netlink| {
            netlink
                .address()
                .add(index(link), IpAddr::V4(address), PREFIX)
                .execute()
                .await
        })
    }
}

/// The four namespaces, joined.
#[derive(Clone, Debug)]
pub struct Network {
    /// First host.
    pub site_a: Arc<Namespace>,
    /// Second host.
    pub site_b: Arc<Namespace>,
    /// Where the guest's client sits.
    pub outside: Arc<Namespace>,
    /// The attacker, or gateway.
    pub relay: Arc<Namespace>,
}

impl Network {
    /// Builds it.
    pub fn build() -> Result<Self> {
        let make = |name| Namespace::new(name).map(Arc::new);
        let network = Self {
            site_a: make("site-a")?,
            site_b: make("site-b")?,
            outside: make("outside")?,
            relay: make("relay")?,
        };
        let Self {
            site_a,
            site_b,
            outside,
            relay,
        } = &network;
        for (site, address) in [(site_a, SITE_A), (site_b, SITE_B)] {
            let [.., number] = address.octets();
            site.add_bridge(BRIDGE, [0x02, 0, 0, 0x77, 0, number])?;
            site.add_address(BRIDGE, address)?;
        }
        site_a.add_veth("to-b", site_b, "to-a")?;
        site_a.set_up("to-b", Some(BRIDGE))?;
        site_b.set_up("to-a", Some(BRIDGE))?;
        for (other, near, address) in [(outside, "to-outside", OUTSIDE), (relay, "to-relay", RELAY)]
        {
            site_a.add_veth(near, other, "eth0")?;
            site_a.set_up(near, Some(BRIDGE))?;
            other.set_up("eth0", None)?;
            other.add_address("eth0", address)?;
        }
        Ok(network)
    }

    /// Interfaces that guests have left behind in a site's namespace.
    pub fn left_behind(&self) -> Result<Vec<String>> {
        let mut left = Vec::new();
        for site in [&self.site_a, &self.site_b] {
            let ours =
                |name: &String| ["lo", BRIDGE].contains(&name.as_str()) || name.starts_with("to-");
            left.extend(
                site.interfaces()?
                    .into_iter()
                    .filter(|n| !ours(n))
                    .map(|n| format!("{} in {}", n, site.name)),
            );
        }
        Ok(left)
    }
}

/// Index of a link in the current namespace; 0, which no link has, if there is none.
fn index(link: &str) -> u32 {
    if_nametoindex(link).unwrap_or(0)
}

fn joined<T>(result: thread::Result<T>) -> std::io::Result<T> {
    result.map_err(|_| std::io::Error::other("its thread panicked"))
}

fn failed(step: &str, reason: &dyn std::fmt::Display) -> E2eError {
    E2eError::Network {
        step: step.to_owned(),
        reason: reason.to_string(),
    }
}

/// Address of site-a.
pub const SITE_A: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// Address of site-b.
pub const SITE_B: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
/// Address of the relay.
pub const RELAY: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 3);
/// Address of the guest.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 10);
/// Address of the guest's client.
pub const OUTSIDE: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 254);
/// The bridge of a site.
pub const BRIDGE: &str = "br0";
const PREFIX: u8 = 24;
const LOOPBACK: u32 = 1;

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    use super::*;

    /// Needs root and the modules veth and bridge, as the whole crate does.
    #[test]
    fn everyone_reaches_everyone_on_the_bridges_and_nobody_else() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("not root: not tested");
            return;
        }
        let network = Network::build().unwrap();
        let listener = network
            .site_b
            .run(|| TcpListener::bind((SITE_B, 7400)))
            .unwrap()
            .unwrap();
        for from in [&network.site_a, &network.outside, &network.relay] {
            let mut client = from
                .run(|| TcpStream::connect((SITE_B, 7400)))
                .unwrap()
                .unwrap();
            let (mut server, peer) = listener.accept().unwrap();
            client.write_all(b"x").unwrap();
            let mut byte = [0];
            server.read_exact(&mut byte).unwrap();
            assert!(
                [SITE_A, OUTSIDE, RELAY]
                    .map(IpAddr::V4)
                    .contains(&peer.ip()),
                "{peer}"
            );
        }
        let stranger = Namespace::new("stranger").unwrap();
        assert!(
            stranger
                .run(|| TcpStream::connect((SITE_B, 7400)))
                .unwrap()
                .is_err()
        );
        assert_eq!(network.left_behind().unwrap(), Vec::<String>::new());
        network.site_a.add_bridge("cm-1", [2; 6]).unwrap();
        assert_eq!(network.left_behind().unwrap(), ["cm-1 in site-a"]);
    }
}
