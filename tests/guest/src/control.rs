//! The host's view into the guest, on vsock port 1024: `status`, `verify`, `report NONCE`, `devices`, `use MIB`,
//! `starve MILLISECONDS`, `block DISK`, `card NAME ADDRESS`, `fork`, `renew-card`, `panic`, `reset`, `poweroff`, one line each,
//! answered in JSON.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::console::say;
use crate::lines::{Slots, serve};
use crate::state::State;
use crate::supervise::{self, lock};
use crate::{devices, disk, fork, hotplug, memory, report, sys};

pub(crate) fn spawn(state: &Arc<State>) {
    let listener = match sys::vsock_listener(PORT) {
        Ok(listener) => listener,
        Err(error) => return say!("vsock port {PORT} not served: {error}"),
    };
    let state = Arc::clone(state);
    let slots = Slots::new(MAX_CONNECTIONS);
    supervise::spawn("vsock", move || {
        loop {
            let Ok(connection) = sys::vsock_accept(&listener) else {
                thread::sleep(Duration::from_millis(100));
                continue;
            };
            let Some(slot) = slots.take() else { continue };
            let state = Arc::clone(&state);
            supervise::spawn("vsock-connection", move || {
                let _slot = &slot;
                // The end of a connection, however it comes, is no news.
                let _ = serve(&connection, |request| answer(&state, request));
            });
        }
    });
}

fn answer(state: &Arc<State>, request: &str) -> String {
    match request {
        "status" => state.status(),
        "verify" => verify(state),
        "poweroff" => {
            power_off_soon(state);
            "{\"ok\":true}".to_owned()
        }
        "devices" => devices::answer(),
        "fork" => fork::answer(),
        "renew-card" => fork::renew_card(),
        "panic" => fork::system_request("c"),
        "reset" => fork::system_request("b"),
        _ => match request.split_once(' ') {
            Some(("report", nonce)) => report::answer(nonce.trim()),
            Some(("use", mib)) => devices::use_memory(mib.trim()),
            Some(("starve", milliseconds)) => devices::starve(milliseconds.trim()),
            Some(("block", name)) => hotplug::block(name.trim()),
            Some(("card", name)) => hotplug::card(name.trim()),
            _ => {
                "{\"ok\":false,\"error\":\"unknown request; known are status, verify, report, devices, use, starve, block, card, fork, renew-card, panic, reset, poweroff\"}"
                    .to_owned()
            }
        },
    }
}

/// Checks all memory and every written block now. It is only ok if nothing is wrong now, nothing ever was, and there was
/// memory to check.
fn verify(state: &State) -> String {
    let (pages, page_errors) = lock(&state.region)
        .as_ref()
        .map_or((0, Vec::new()), memory::Region::verify);
    let (blocks, block_errors) = lock(&state.disk)
        .as_mut()
        .map_or((0, Vec::new()), disk::Disk::verify);
    memory::report(state, &page_errors);
    disk::report(state, &block_errors);
    let (pattern_errors, disk_errors) = (state.pattern_errors.get(), state.disk_errors.get());
    let ok = pages > 0 && pattern_errors == 0 && disk_errors == 0;
    format!(
        "{{\"ok\":{ok},\"pages_checked\":{pages},\"page_errors\":{},\"blocks_checked\":{blocks},\"block_errors\":{},\
         \"pattern_errors\":{pattern_errors},\"disk_errors\":{disk_errors},\"counter\":{}}}",
        page_errors.len(),
        block_errors.len(),
        state.counter.get(),
    )
}

/// Leaves time for the answer to get out.
fn power_off_soon(state: &Arc<State>) {
    let exit = state.exit;
    supervise::spawn("poweroff", move || {
        thread::sleep(Duration::from_millis(200));
        say!("going down");
        say!("not gone down: {}", sys::go_down(exit));
    });
}

const PORT: u32 = 1024;
const MAX_CONNECTIONS: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::Exit;

    #[test]
    fn answers_are_json_with_every_key() {
        let state = Arc::new(State::new(Some("ab".to_owned()), Exit::Poweroff));
        state.counter.add(7);
        assert_eq!(
            answer(&state, "status"),
            "{\"counter\":7,\"pattern_errors\":0,\"pattern_rounds\":0,\"pages_dirtied\":0,\"disk_writes\":0,\
             \"disk_errors\":0,\"secret_sha256\":\"ab\"}"
        );
        assert!(
            State::new(None, Exit::Halt)
                .status()
                .ends_with("\"secret_sha256\":null}")
        );
        assert!(answer(&state, "rubbish").starts_with("{\"ok\":false"));
    }

    #[test]
    fn verify_is_not_ok_without_memory() {
        let state = Arc::new(State::new(None, Exit::Poweroff));
        assert!(answer(&state, "verify").starts_with("{\"ok\":false,\"pages_checked\":0,"));
    }
}
