//! The TCP service on port 7000: each line comes back with the counter, `<line> <counter>`.

use std::net::{Ipv4Addr, TcpListener};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::console::say;
use crate::lines::{Slots, serve};
use crate::state::State;
use crate::supervise;

pub(crate) fn spawn(state: &Arc<State>) {
    let listener = match TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)) {
        Ok(listener) => listener,
        Err(error) => return say!("tcp port {PORT} not served: {error}"),
    };
    let state = Arc::clone(state);
    let slots = Slots::new(MAX_CONNECTIONS);
    supervise::spawn("tcp", move || {
        loop {
            let Ok((connection, _)) = listener.accept() else {
                thread::sleep(Duration::from_millis(100));
                continue;
            };
            let Some(slot) = slots.take() else { continue };
            let state = Arc::clone(&state);
            supervise::spawn("tcp-connection", move || {
                let _slot = &slot;
                let _ = connection.set_nodelay(true);
                let _ = connection.set_read_timeout(Some(IDLE));
                // The end of a connection, however it comes, is no news.
                let _ = serve(&connection, |line| {
                    format!("{line} {}", state.counter.get())
                });
            });
        }
    });
}

const PORT: u16 = 7000;
const MAX_CONNECTIONS: usize = 16;
const IDLE: Duration = Duration::from_secs(600);
