//! What reaches the agent: API requests over a Unix socket and, where it is configured, over TLS; migrations over TCP.
//!
//! Whoever connects is not believed: the kernel or TLS says who it is, and only root, the agent's own user and those
//! whom the policy names as people may ask.

mod arrivals;
mod connection;
mod patient;
mod tls;

use std::future::Future;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::unistd::geteuid;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use crate::agent::Agent;
use crate::agent::api::Failure;
use crate::agent::authority::other_users;
use crate::agent::config::ApiFiles;
pub(super) use connection::Who;
use connection::{Shared, not_permitted, serve as serve_connection};

/// Accepts requests and migrations until `ended` resolves.
pub async fn serve(agent: Arc<Agent>, ended: impl Future<Output = ()>) -> Result<(), Failure> {
    let api = bind_api(&agent.config.socket)?;
    agent.open_socket()?;
    let arrivals = match agent.config.listen {
        Some(address) => Some(bind_arrivals(address).await?),
        None => None,
    };
    let remote = match &agent.config.api {
        Some(files) => Some(bind_remote(files).await?),
        None => None,
    };
    tracing::info!(
        socket = %agent.config.socket.display(),
        listen = ?agent.config.listen,
        api = ?agent.config.api.as_ref().map(|api| api.listen),
        "agent ready"
    );
    let shared = Arc::new(Shared {
        agent: Arc::clone(&agent),
        work: Arc::new(Semaphore::new(WORKERS)),
    });
    tokio::select! {
        () = ended => {}
        () = accept_users(&shared, api) => {}
        () = accept_remote(&shared, remote) => {}
        () = arrivals::accept(&agent, arrivals) => {}
        () = settle_doubts(&agent) => {}
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

/// Users of this machine, [`MAX_USERS`] connections at a time. Strangers get a refusal and no place.
async fn accept_users(shared: &Arc<Shared>, listener: UnixListener) {
    let places = Arc::new(Semaphore::new(MAX_USERS));
    let strangers = Arc::new(Semaphore::new(MAX_STRANGERS));
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        let Some((stream, _)) = accepted(listener.accept().await).await else {
            continue;
        };
        let Ok(credentials) = stream.peer_cred() else {
            continue;
        };
        let who = Who::User(credentials.uid());
        match shared.agent.caller(&who) {
            Ok(_) => {
                let shared = Arc::clone(shared);
                tokio::spawn(async move {
                    shared.agent.metrics.connected(false);
                    serve_connection(stream, who, shared).await;
                    drop(place);
                });
            }
            Err(failure) => {
                if let Ok(seat) = Arc::clone(&strangers).try_acquire_owned() {
                    tokio::spawn(async move {
                        turn_away(stream, failure).await;
                        drop(seat);
                    });
                }
            }
        }
    }
}

/// What a stranger sends is taken off the socket, so that the refusal arrives, and not looked at.
async fn turn_away(mut stream: tokio::net::UnixStream, failure: Failure) {
    let mut unseen = [0; 4096];
    let refuse = async {
        let _ = stream.read(&mut unseen).await;
        let _ = stream.write_all(&not_permitted(failure)).await;
    };
    // Whoever waits longer has had its chance.
    let _ = timeout(STRANGERS_TIME, refuse).await;
}

/// People by certificate, [`MAX_REMOTE`] connections at a time, of which none takes a place from this machine's users.
async fn accept_remote(shared: &Arc<Shared>, listener: Option<(TcpListener, TlsAcceptor)>) {
    let Some((listener, acceptor)) = listener else {
        return std::future::pending().await;
    };
    let places = Arc::new(Semaphore::new(MAX_REMOTE));
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        let Some((stream, address)) = accepted(listener.accept().await).await else {
            continue;
        };
        let (shared, acceptor) = (Arc::clone(shared), acceptor.clone());
        tokio::spawn(async move {
            // Small answers, each waited for.
            let _ = stream.set_nodelay(true);
            match timeout(HANDSHAKE, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => {
                    if let Some(who) = tls::client_of(stream.get_ref().1) {
                        shared.agent.metrics.connected(true);
                        serve_connection(stream, who, shared).await;
                    }
                }
                Ok(Err(error)) => tracing::info!(%address, %error, "TLS of an API client"),
                Err(_) => tracing::info!(%address, "TLS of an API client took too long"),
            }
            drop(place);
        });
    }
}

async fn bind_remote(files: &ApiFiles) -> Result<(TcpListener, TlsAcceptor), Failure> {
    let config = tls::server_config(files)?;
    let address = files.listen;
    let listener = TcpListener::bind(address)
        .await
        .map_err(|e| Failure::new("LISTEN", format!("[api] {address}: {e}")))?;
    Ok((listener, TlsAcceptor::from(config)))
}

/// Guests of this host whose commit was not answered do not wait for somebody to ask.
async fn settle_doubts(agent: &Arc<Agent>) {
    loop {
        let agent = Arc::clone(agent);
        // A panic in there has been reported; the next turn comes all the same.
        let _ = tokio::task::spawn_blocking(move || agent.settle_all()).await;
        tokio::time::sleep(DOUBT_PAUSE).await;
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

/// Most connections of this machine's users at a time.
const MAX_USERS: usize = 32;
/// Most connections over TLS at a time.
const MAX_REMOTE: usize = 64;
/// How long a TLS handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Most users at a time who are told that they may not ask.
const MAX_STRANGERS: usize = 8;
const STRANGERS_TIME: Duration = Duration::from_secs(1);
/// Most requests in work at a time.
const WORKERS: usize = 32;
/// Between two questions about guests in doubt.
const DOUBT_PAUSE: Duration = Duration::from_secs(30);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
