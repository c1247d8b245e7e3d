//! What reaches the agent: API requests over a Unix socket, migrations over TCP.
//!
//! Whoever connects is not believed: the kernel says who it is, and only root, the agent's own user and those whom the
//! policy names as people may ask.

use std::future::Future;
use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::geteuid;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;

use crate::agent::Agent;
use crate::agent::api::{Answer, Failure, Line, MAX_LINE, Request};
use crate::agent::authority::{Caller, other_users};

/// Accepts requests and migrations until `ended` resolves.
pub async fn serve(agent: Arc<Agent>, ended: impl Future<Output = ()>) -> Result<(), Failure> {
    let api = bind_api(&agent.config.socket)?;
    agent.open_socket()?;
    let arrivals = match agent.config.listen {
        Some(address) => Some(bind_arrivals(address).await?),
        None => None,
    };
    tracing::info!(socket = %agent.config.socket.display(), listen = ?agent.config.listen, "agent ready");
    let clients = accept_clients(&agent, api);
    let guests = accept_arrivals(&agent, arrivals);
    tokio::select! {
        () = ended => {}
        () = clients => {}
        () = guests => {}
    }
    // Best effort: a socket that stays behind is replaced at the next start.
    let _ = std::fs::remove_file(&agent.config.socket);
    Ok(())
}

fn bind_api(socket: &Path) -> Result<UnixListener, Failure> {
    let failed = |e: std::io::Error| Failure::new("LISTEN", format!("{}: {e}", socket.display()));
    if let Some(folder) = socket.parent() {
        std::fs::create_dir_all(folder).map_err(failed)?;
    }
    if UnixStream::connect(socket).is_ok() {
        return Err(Failure::new(
            "LISTEN",
            format!("another agent answers at {}", socket.display()),
        ));
    }
    match std::fs::symlink_metadata(socket) {
        Ok(found) if found.file_type().is_socket() => {
            tracing::warn!(socket = %socket.display(), "replacing the socket that a killed agent left behind");
            std::fs::remove_file(socket).map_err(failed)?;
        }
        Ok(_) => {
            let text = format!(
                "{} exists and is not a socket; move it away, or name another `socket`",
                socket.display()
            );
            return Err(Failure::new("LISTEN", text));
        }
        Err(_) => {}
    }
    let listener = UnixListener::bind(socket).map_err(failed)?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}

impl Agent {
    /// Lets users whom the policy names as people reach the socket; the kernel says who they are, and others are turned
    /// away before a byte of theirs is read.
    pub(super) fn open_socket(&self) -> Result<(), Failure> {
        let socket = &self.config.socket;
        let others = other_users(&self.policy(), geteuid().as_raw());
        let mode = if others.is_empty() { 0o600 } else { 0o666 };
        std::fs::set_permissions(socket, std::fs::Permissions::from_mode(mode))
            .map_err(|e| Failure::new("LISTEN", format!("{}: {e}", socket.display())))
    }
}

async fn bind_arrivals(address: SocketAddr) -> Result<TcpListener, Failure> {
    let failed = |e: std::io::Error| {
        Failure::new(
            "LISTEN",
            format!("cannot accept migrations at {address}: {e}"),
        )
    };
    TcpListener::bind(address).await.map_err(failed)
}

/// One connection a request, each in a thread of the runtime's pool, [`MAX_CLIENTS`] at a time.
async fn accept_clients(agent: &Arc<Agent>, listener: UnixListener) {
    let places = Arc::new(Semaphore::new(MAX_CLIENTS));
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        let Some(stream) = accepted(listener.accept().await.and_then(|(s, _)| s.into_std())).await
        else {
            continue;
        };
        let agent = Arc::clone(agent);
        tokio::task::spawn_blocking(move || {
            if let Err(error) = serve_client(&agent, stream) {
                tracing::debug!(%error, "an API client went away");
            }
            drop(place);
        });
    }
}

/// One connection a move, [`MAX_ARRIVALS`] at a time; not a byte of it is read here.
async fn accept_arrivals(agent: &Arc<Agent>, listener: Option<TcpListener>) {
    let Some(listener) = listener else {
        return std::future::pending().await;
    };
    let places = Arc::new(Semaphore::new(MAX_ARRIVALS));
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        let Some(stream) = accepted(listener.accept().await.and_then(|(s, _)| s.into_std())).await
        else {
            continue;
        };
        let agent = Arc::clone(agent);
        tokio::task::spawn_blocking(move || {
            if let Err(failure) = agent.receive(stream) {
                tracing::warn!(code = failure.code, "arrival refused: {}", failure.error);
            }
            drop(place);
        });
    }
}

/// A connection that was lost before it began is nobody's fault; running out of descriptors passes.
async fn accepted<T>(result: std::io::Result<T>) -> Option<T> {
    match result {
        Ok(stream) => Some(stream),
        Err(error) => {
            tracing::warn!(%error, "a connection was not accepted");
            tokio::time::sleep(ACCEPT_PAUSE).await;
            None
        }
    }
}

fn serve_client(agent: &Agent, mut stream: UnixStream) -> std::io::Result<()> {
    stream.set_nonblocking(false)?;
    let who = getsockopt(&stream, PeerCredentials)?.uid();
    let policy = agent.policy();
    let own = geteuid().as_raw();
    let last = if who == 0 || who == own || other_users(&policy, own).contains(&who) {
        answer(agent, &Caller::local(who, &policy), &mut stream)
    } else {
        Err(Failure::new(
            "NOT_PERMITTED",
            format!(
                "user {who} may not talk to this agent; use root, or add a [[person]] to its policy"
            ),
        ))
    };
    let line = match last {
        Ok(answer) => Line::Answer {
            answer: Box::new(answer),
        },
        Err(failure) => Line::Failed(failure),
    };
    write_line(&mut stream, &line)
}

fn answer(agent: &Agent, caller: &Caller, stream: &mut UnixStream) -> Result<Answer, Failure> {
    let request = read_request(stream).map_err(|e| Failure::new("BAD_REQUEST", e.to_string()))?;
    let mut lost = false;
    agent.handle(caller, request, &mut |event| {
        // A client that stopped listening does not stop the work.
        lost = lost || write_line(stream, &Line::Progress { event }).is_err();
    })
}

fn read_request(stream: &UnixStream) -> std::io::Result<Request> {
    stream.set_write_timeout(Some(REQUEST_DEADLINE))?;
    let line = read_line(stream, Instant::now() + REQUEST_DEADLINE)?;
    Ok(serde_json::from_slice(&line)?)
}

/// One line without its end, or what came before the client stopped sending. The deadline is for all of it: who sends
/// a byte now and then keeps no place for ever.
fn read_line(mut stream: &UnixStream, deadline: Instant) -> std::io::Result<Vec<u8>> {
    let late = || {
        let text = format!(
            "no whole request within {REQUEST_DEADLINE:?}; send one JSON object and a line end"
        );
        std::io::Error::new(ErrorKind::TimedOut, text)
    };
    let mut line = Vec::new();
    let mut buffer = [0u8; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(late());
        }
        stream.set_read_timeout(Some(left))?;
        let received = match stream.read(&mut buffer) {
            Ok(count) => buffer.get(..count).unwrap_or_default(),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                return Err(late());
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        let end = received.iter().position(|&byte| byte == b'\n');
        line.extend_from_slice(
            received
                .get(..end.unwrap_or(received.len()))
                .unwrap_or_default(),
        );
        if line.len() > MAX_LINE {
            let text = format!("a request has at most {MAX_LINE} bytes");
            return Err(std::io::Error::new(ErrorKind::InvalidData, text));
        }
        if end.is_some() || received.is_empty() {
            return Ok(line);
        }
    }
}

fn write_line(stream: &mut UnixStream, line: &Line) -> std::io::Result<()> {
    let mut bytes = serde_json::to_vec(line)?;
    bytes.push(b'\n');
    stream.write_all(&bytes)
}

/// Most API requests at a time.
const MAX_CLIENTS: usize = 32;
/// Most arrivals at a time.
const MAX_ARRIVALS: usize = 4;
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);
