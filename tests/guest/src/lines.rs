//! One request line, one answer line, over anything that reads and writes.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Answers each line of a connection until its end. Lines longer than [`MAX_LINE`] bytes end it.
pub(crate) fn serve<C>(connection: &C, mut answer: impl FnMut(&str) -> String) -> io::Result<()>
where
    for<'c> &'c C: Read + Write,
{
    let mut reader = BufReader::with_capacity(MAX_LINE, connection);
    let mut line = Vec::new();
    loop {
        line.clear();
        (&mut reader)
            .take(MAX_LINE as u64)
            .read_until(b'\n', &mut line)?;
        let Some(request) = line.strip_suffix(b"\n") else {
            return Ok(());
        };
        let mut reply = answer(String::from_utf8_lossy(request).trim_end_matches('\r'));
        reply.push('\n');
        let mut writer = connection;
        writer.write_all(reply.as_bytes())?;
    }
}

/// A bound on how many connections are served at once.
pub(crate) struct Slots {
    used: Arc<AtomicUsize>,
    limit: usize,
}

impl Slots {
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            used: Arc::default(),
            limit,
        }
    }

    /// A slot, until it is dropped; nothing if all are taken.
    pub(crate) fn take(&self) -> Option<Slot> {
        let taken = self.used.fetch_add(1, Ordering::Relaxed);
        let slot = Slot(Arc::clone(&self.used));
        (taken < self.limit).then_some(slot)
    }
}

/// One taken slot.
pub(crate) struct Slot(Arc<AtomicUsize>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

const MAX_LINE: usize = 1024;

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::thread;

    use super::*;

    fn talk(requests: &[u8]) -> String {
        let (near, far) = UnixStream::pair().unwrap();
        let server = thread::spawn(move || serve(&far, |line| format!("<{line}>")));
        (&near).write_all(requests).unwrap();
        near.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answers = String::new();
        (&near).read_to_string(&mut answers).unwrap();
        server.join().unwrap().unwrap();
        answers
    }

    #[test]
    fn each_line_is_answered() {
        assert_eq!(talk(b"a\nb c\r\n\nrest"), "<a>\n<b c>\n<>\n");
    }

    #[test]
    fn endless_lines_end_the_connection() {
        assert_eq!(talk(&[b'x'; 1024]), "");
        let fits = [&[b'x'; 1023][..], b"\n"].concat();
        assert_eq!(talk(&fits).len(), 1026);
    }

    #[test]
    fn slots_are_bounded_and_come_back() {
        let slots = Slots::new(2);
        let first = slots.take().unwrap();
        let _second = slots.take().unwrap();
        assert!(slots.take().is_none());
        drop(first);
        assert!(slots.take().is_some());
    }
}
