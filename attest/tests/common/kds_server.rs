//! A key service on 127.0.0.1 that answers as it is told, also as none should.
#![allow(
    dead_code,
    reason = "each test program compiles this for itself and uses its part"
)]

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// An answer.
#[derive(Clone)]
pub enum Answer {
    /// 200 with this body.
    Body(Vec<u8>),
    /// A status with headers and a short page.
    Status(u16, Vec<(&'static str, String)>),
    /// 200, but the body ends before its announced length.
    Truncated(Vec<u8>),
    /// 200 with a body, in chunks, that does not end.
    Endless,
    /// 200 with a body that comes a byte at a time and never whole.
    Drip,
    /// A header that comes a byte at a time and does not end.
    DripHead,
}

/// The running service; ends when dropped.
pub struct KdsServer {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
    ended: Arc<AtomicBool>,
    listener: Option<JoinHandle<()>>,
}

impl KdsServer {
    /// Answers with what `answer` makes of the path and of how many were asked before.
    pub fn start(answer: impl Fn(&str, usize) -> Answer + Send + Sync + 'static) -> Self {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let ended = Arc::new(AtomicBool::new(false));
        let (paths, end) = (Arc::clone(&asked), Arc::clone(&ended));
        let answer = Arc::new(answer);
        let listener = std::thread::spawn(move || {
            let mut threads = Vec::new();
            for stream in socket.incoming() {
                if end.load(Ordering::SeqCst) {
                    break;
                }
                let (Ok(stream), paths) = (stream, Arc::clone(&paths)) else {
                    continue;
                };
                let (answer, end) = (Arc::clone(&answer), Arc::clone(&end));
                threads.push(std::thread::spawn(move || {
                    serve(stream, &paths, &*answer, &end)
                }));
            }
            for thread in threads {
                let _ = thread.join();
            }
        });
        Self {
            address,
            asked,
            ended,
            listener: Some(listener),
        }
    }

    /// `http://127.0.0.1:PORT`.
    pub fn base(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The paths that were asked for, in order.
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

impl Drop for KdsServer {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        if let Some(listener) = self.listener.take() {
            let _ = listener.join();
        }
    }
}

fn serve(
    mut stream: TcpStream,
    paths: &Mutex<Vec<String>>,
    answer: &(impl Fn(&str, usize) -> Answer + ?Sized),
    end: &AtomicBool,
) {
    let Some(path) = request_path(&stream) else {
        return;
    };
    let before = {
        let mut paths = paths.lock().unwrap();
        paths.push(path.clone());
        paths.len() - 1
    };
    // A client that hangs up is what some of these answers are for.
    let _ = send(&mut stream, &answer(&path, before), end);
}

fn request_path(stream: &TcpStream) -> Option<String> {
    stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .ok()?;
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next()?.ok()?;
    while !lines.next()?.ok()?.is_empty() {}
    let path = first.strip_prefix("GET ")?.strip_suffix(" HTTP/1.1")?;
    Some(path.to_owned())
}

fn send(stream: &mut TcpStream, answer: &Answer, end: &AtomicBool) -> std::io::Result<()> {
    match answer {
        Answer::Body(body) => {
            head(stream, 200, &[], Some(body.len()))?;
            stream.write_all(body)
        }
        Answer::Status(status, headers) => {
            let page = b"<html><body>a page</body></html>";
            head(stream, *status, headers, Some(page.len()))?;
            stream.write_all(page)
        }
        Answer::Truncated(body) => {
            head(stream, 200, &[], Some(body.len()))?;
            stream.write_all(&body[..body.len() / 2])
        }
        Answer::Endless => {
            head(
                stream,
                200,
                &[("Transfer-Encoding", "chunked".to_owned())],
                None,
            )?;
            while !end.load(Ordering::SeqCst) {
                stream.write_all(b"1000\r\n")?;
                stream.write_all(&[b'0'; 0x1000])?;
                stream.write_all(b"\r\n")?;
            }
            Ok(())
        }
        Answer::Drip => {
            head(stream, 200, &[], Some(4000))?;
            drip(stream, end)
        }
        Answer::DripHead => {
            stream.write_all(b"HTTP/1.1 200 OK\r\nX-Long: ")?;
            drip(stream, end)
        }
    }
}

/// Fewer bytes than any bound, each in good time, and far too long altogether.
fn drip(stream: &mut TcpStream, end: &AtomicBool) -> std::io::Result<()> {
    for _ in 0..2000 {
        if end.load(Ordering::SeqCst) {
            break;
        }
        stream.write_all(b"0")?;
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn head(
    stream: &mut TcpStream,
    status: u16,
    headers: &[(&str, String)],
    len: Option<usize>,
) -> std::io::Result<()> {
    let mut text = format!("HTTP/1.1 {status} Told\r\nConnection: close\r\n");
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    if let Some(len) = len {
        text.push_str(&format!("Content-Length: {len}\r\n"));
    }
    stream.write_all((text + "\r\n").as_bytes())
}
