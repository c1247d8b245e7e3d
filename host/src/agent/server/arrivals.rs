//! The port where guests arrive: who gets as far as a mover, and how many at a time.
//!
//! Nobody here has proven anything. Until a connection has said its first bytes it costs a descriptor and a timer, and one
//! that says nothing never costs more. What an address may have under way is bounded, so that one that floods the port takes
//! no other's place.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr, TcpStream};
use std::sync::{Arc, Weak};

use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use super::accepted;
use crate::agent::Agent;
use crate::agent::further::{self, Opened};

/// Moves, [`MAX_SERVED`] at a time. Of a connection's bytes only those are read that say whether it is a further one of a
/// move under way, and of which; a first one is handed on as it came.
pub(super) async fn accept(agent: &Arc<Agent>, listener: Option<TcpListener>) {
    let Some(listener) = listener else {
        return std::future::pending().await;
    };
    let served = Arc::new(Semaphore::new(MAX_SERVED));
    let pending = Arc::new(Semaphore::new(MAX_PENDING));
    let mut crowd = Crowd::default();
    while let Ok(place) = Arc::clone(&pending).acquire_owned().await {
        let Some((stream, address)) = accepted(listener.accept().await).await else {
            continue;
        };
        let seats = crowd.seats_of(address.ip());
        let Ok(seat) = Arc::clone(&seats.pending).try_acquire_owned() else {
            // Not a line for each: the log would be the flood's next victim.
            tracing::debug!(%address, "a connection was closed: its address has too many already");
            agent.metrics.turned_away();
            continue;
        };
        let (agent, served) = (Arc::clone(agent), Arc::clone(&served));
        tokio::spawn(async move {
            match further::open(stream).await {
                Ok(Opened::First(stream)) => {
                    let turns = (
                        Arc::clone(&seats.served).acquire_owned().await,
                        served.acquire_owned().await,
                    );
                    drop((place, seat));
                    let (Ok(own), Ok(turn)) = turns else {
                        return;
                    };
                    tokio::task::spawn_blocking(move || {
                        receive(&agent, stream);
                        // Its address is known as long as it has a turn.
                        drop((own, turn, seats));
                    });
                }
                Ok(Opened::Further(ticket, stream)) => {
                    drop((place, seat));
                    tokio::task::spawn_blocking(move || {
                        if let Err(failure) = agent.routes.hand_over(&ticket, &stream) {
                            let code = failure.code;
                            tracing::warn!(code, "a connection was refused: {}", failure.error);
                        }
                    });
                }
                Err(error) => {
                    tracing::info!(%address, %error, "a connection was closed");
                    agent.metrics.turned_away();
                }
            }
        });
    }
}

fn receive(agent: &Agent, stream: TcpStream) {
    let received = agent.receive(stream);
    agent.metrics.arrived(received.is_ok());
    if let Err(failure) = received {
        tracing::warn!(code = failure.code, "arrival refused: {}", failure.error);
    }
}

/// The addresses that have anything under way.
#[derive(Default)]
struct Crowd(HashMap<IpAddr, Weak<Seats>>);

struct Seats {
    /// For connections that have not been handed on.
    pending: Arc<Semaphore>,
    /// For moves.
    served: Arc<Semaphore>,
}

impl Crowd {
    fn seats_of(&mut self, address: IpAddr) -> Arc<Seats> {
        if self.0.len() > MAX_PENDING + MAX_SERVED {
            self.0.retain(|_, seats| seats.strong_count() > 0);
        }
        let known = self.0.entry(household(address)).or_default();
        known.upgrade().unwrap_or_else(|| {
            let seats = Arc::new(Seats {
                pending: Arc::new(Semaphore::new(PENDING_OF_ONE)),
                served: Arc::new(Semaphore::new(SERVED_OF_ONE)),
            });
            *known = Arc::downgrade(&seats);
            seats
        })
    }
}

/// Of IPv6 the network of 64 bits, in which whoever has one address has them all.
fn household(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64)),
        v4 => v4,
    }
}

/// Most moves that arrive at a time, and most of them from one address.
const MAX_SERVED: usize = 8;
const SERVED_OF_ONE: usize = 4;
/// Most connections that were not handed on yet, and most of them from one address.
const MAX_PENDING: usize = 256;
const PENDING_OF_ONE: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_its_own_seats_and_they_are_there_as_long_as_it_is() {
        let mut crowd = Crowd::default();
        let mut of = |text: &str| crowd.seats_of(text.parse().unwrap());
        let one = of("192.0.2.1");
        assert!(Arc::ptr_eq(&one, &of("::ffff:192.0.2.1")));
        assert!(!Arc::ptr_eq(&one, &of("192.0.2.2")));
        let six = of("2001:db8::1");
        assert!(Arc::ptr_eq(&six, &of("2001:db8::ffff:1")));
        assert!(!Arc::ptr_eq(&six, &of("2001:db8:0:1::1")));
        for n in 0..u16::MAX {
            let _ = of(&format!("2001:db8:0:{n:x}::1"));
        }
        assert!(Arc::ptr_eq(&one, &of("192.0.2.1")), "who is here is known");
        assert!(crowd.0.len() <= MAX_PENDING + MAX_SERVED + 1);
    }
}
