//! The power button: pressed, the guest shuts itself down.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::console::say;
use crate::options::Exit;
use crate::{supervise, sys};

/// Waits for the button, wherever there is an input device.
pub(crate) fn spawn() {
    let Ok(devices) = std::fs::read_dir("/dev/input") else {
        return;
    };
    let paths = devices.filter_map(|entry| Some(entry.ok()?.path()));
    for path in paths.filter(|path| path.to_string_lossy().contains("/event")) {
        supervise::spawn("power", move || watch(&path));
    }
}

fn watch(path: &Path) {
    let Ok(mut device) = File::open(path) else {
        return;
    };
    let mut event = [0; EVENT];
    while device.read_exact(&mut event).is_ok() {
        if is_press(&event) {
            say!("power button");
            let error = sys::go_down(Exit::Poweroff);
            say!("still here: {error}");
        }
    }
}

/// `struct input_event`: two words of time, type, code, value.
fn is_press(event: &[u8; EVENT]) -> bool {
    event.get(16..) == Some(&[EV_KEY, 0, KEY_POWER, 0, 1, 0, 0, 0])
}

const EVENT: usize = 24;
const EV_KEY: u8 = 1;
const KEY_POWER: u8 = 116;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_press_is_told_from_a_release_and_other_keys() {
        let mut event = [0; EVENT];
        event[16..].copy_from_slice(&[1, 0, 116, 0, 1, 0, 0, 0]);
        assert!(is_press(&event));
        for (at, value) in [(16, 2), (18, 30), (20, 0)] {
            let mut other = event;
            other[at] = value;
            assert!(!is_press(&other));
        }
    }
}
