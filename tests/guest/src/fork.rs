//! What a guest sees of having been copied: its kernel's random numbers, its card's address, its context id. And how it goes
//! down in ways that no power button has.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::options::Address;
use crate::{boot, supervise, sys};

/// The guest's own address, for a card that is taken up anew.
static ADDRESS: Mutex<Option<Address>> = Mutex::new(None);

/// Remembers the address.
pub(crate) fn keep(address: Option<Address>) {
    *ADDRESS.lock().unwrap_or_else(PoisonError::into_inner) = address;
}

/// How often the kernel took new random numbers because its machine was copied, 16 bytes of them, address and context id.
pub(crate) fn answer() -> String {
    let mut random = [0; 16];
    let read = File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut random));
    let mac = fs::read_to_string("/sys/class/net/eth0/address").unwrap_or_default();
    format!(
        "{{\"ok\":{},\"reseeds\":{},\"random\":\"{}\",\"mac\":\"{}\",\"cid\":{}}}",
        read.is_ok(),
        reseeds(&kernel_log()),
        hex::encode(random),
        mac.trim(),
        sys::context_id().unwrap_or(0),
    )
}

/// Takes the card up anew: a driver reads a card's address once.
pub(crate) fn renew_card() -> String {
    let Some(device) = virtio_card() else {
        return "{\"ok\":false,\"error\":\"no virtio card\"}".to_owned();
    };
    let driver = PathBuf::from("/sys/bus/virtio/drivers/virtio_net");
    let done = fs::write(driver.join("unbind"), &device)
        .and_then(|()| fs::write(driver.join("bind"), &device));
    boot::network(*ADDRESS.lock().unwrap_or_else(PoisonError::into_inner));
    format!("{{\"ok\":{}}}", done.is_ok())
}

/// Has the kernel panic, or reset the machine, as Linux's SysRq keys do.
pub(crate) fn system_request(key: &'static str) -> String {
    supervise::spawn("sysrq", move || {
        // Leaves time for the answer to get out.
        thread::sleep(Duration::from_millis(200));
        let _ = fs::write("/proc/sysrq-trigger", key);
        thread::sleep(Duration::from_secs(3600));
    });
    "{\"ok\":true}".to_owned()
}

/// `virtio1`, as the bus has it.
fn virtio_card() -> Option<String> {
    let link = fs::read_link("/sys/class/net/eth0/device").ok()?;
    Some(link.file_name()?.to_str()?.to_owned())
}

fn reseeds(log: &str) -> usize {
    let line = "crng reseeded due to virtual machine fork";
    log.lines().filter(|l| l.ends_with(line)).count()
}

/// All that `/dev/kmsg` has now, a record a line.
fn kernel_log() -> String {
    let log = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/kmsg");
    let Ok(mut log) = log else {
        return String::new();
    };
    let mut text = String::new();
    let mut record = [0; 8192];
    // One record a call; what was overwritten meanwhile is an error of its own, and the next call goes on behind it.
    loop {
        match log.read(&mut record) {
            Ok(0) => break,
            Ok(count) => {
                let bytes = record.get(..count).unwrap_or_default();
                text.push_str(&String::from_utf8_lossy(bytes));
            }
            Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
            Err(_) => break,
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_kernels_own_word_counts() {
        let log = "5,600,1,-;random: crng reseeded due to virtual machine fork\n6,601,2,-;random: crng init done\n\
                   5,700,3,-;random: crng reseeded due to virtual machine fork\n";
        assert_eq!(reseeds(log), 2);
        assert_eq!(reseeds("6,1,2,-;crng reseeded"), 0);
    }
}
