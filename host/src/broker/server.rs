//! The broker's HTTP side: HTTP/1.1 over TCP (with or without TLS) and vsock.
//!
//! Nothing that arrives is believed or waited for without end: heads and bodies are bounded, each has a deadline,
//! connections and requests in work are counted, and what is judged or read blocks no other connection.

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use casemate_attest::broker::protocol::{
    MAX_ATTESTATION_LEN, MAX_REQUEST_LEN, PATH_PREFIX, SESSION_COOKIE,
};
use casemate_attest::broker::{Broker, Refusal};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Body, Bytes, Incoming};
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, COOKIE, HeaderMap, HeaderValue, SET_COOKIE};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener};

use super::config::{LimitsConfig, Listen};

/// A broker that listens, and answers as soon as it is [run](Self::run).
pub struct Server {
    shared: Arc<Shared>,
    tcp: Vec<TcpListener>,
    vsock: Vec<VsockListener>,
    tls: Option<TlsAcceptor>,
}

struct Shared {
    broker: Arc<Broker>,
    limits: LimitsConfig,
    /// Connections at once.
    connections: Arc<Semaphore>,
    /// Requests that are judged at once.
    work: Arc<Semaphore>,
    /// Whether cookies travel over TLS only.
    secure: bool,
}

/// An address that cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("broker cannot listen on {0}: {1}")]
pub struct ListenError(String, std::io::Error);

impl Server {
    /// Listens on every address. Must be called within a tokio runtime.
    pub async fn bind(
        broker: Arc<Broker>,
        listen: &[Listen],
        tls: Option<Arc<rustls::ServerConfig>>,
        limits: LimitsConfig,
    ) -> Result<Self, ListenError> {
        let (mut tcp, mut vsock) = (Vec::new(), Vec::new());
        for address in listen {
            match address {
                Listen::Tcp(address) => tcp.push(
                    TcpListener::bind(address)
                        .await
                        .map_err(|e| ListenError(format!("tcp:{address}"), e))?,
                ),
                Listen::Vsock(port) => vsock.push(
                    VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, *port))
                        .map_err(|e| ListenError(format!("vsock:{port}"), e))?,
                ),
            }
        }
        if tls.is_none() {
            tracing::warn!(
                "plain HTTP: the secrets are encrypted all the same, but who the broker is, is not proved to guests"
            );
        }
        let shared = Shared {
            broker,
            limits,
            connections: Arc::new(Semaphore::new(limits.connections)),
            work: Arc::new(Semaphore::new(WORKERS)),
            secure: tls.is_some(),
        };
        Ok(Self {
            shared: Arc::new(shared),
            tcp,
            vsock,
            tls: tls.map(TlsAcceptor::from),
        })
    }

    /// The TCP addresses, with the ports that were really given.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        let addresses = self.tcp.iter().map(TcpListener::local_addr);
        addresses.filter_map(Result::ok).collect()
    }

    /// Answers until `shutdown`, then lets what is under way end, for at most five seconds.
    pub async fn run(self, shutdown: impl Future<Output = ()>) {
        let (end, ending) = watch::channel(false);
        let mut tasks = JoinSet::new();
        for listener in self.tcp {
            let (shared, tls) = (self.shared.clone(), self.tls.clone());
            tasks.spawn(accept_tcp(listener, shared, tls, ending.clone()));
        }
        for listener in self.vsock {
            tasks.spawn(accept_vsock(listener, self.shared.clone(), ending.clone()));
        }
        shutdown.await;
        // Fails only where no task is left to be told.
        let _ = end.send(true);
        let all = self.shared.limits.connections;
        let all = u32::try_from(all).unwrap_or(u32::MAX);
        let idle = self.shared.connections.acquire_many(all);
        if timeout(SHUTDOWN, idle).await.is_err() {
            tracing::warn!("connections are cut off at the end");
        }
        tasks.shutdown().await;
    }
}

async fn accept_tcp(
    listener: TcpListener,
    shared: Arc<Shared>,
    tls: Option<TlsAcceptor>,
    mut ending: watch::Receiver<bool>,
) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = ending.changed() => return,
        };
        match accepted {
            Ok((stream, _)) => {
                // Small answers, each waited for.
                let _ = stream.set_nodelay(true);
                begin(stream, &shared, tls.clone(), &ending);
            }
            Err(error) => recover(&error).await,
        }
    }
}

async fn accept_vsock(
    listener: VsockListener,
    shared: Arc<Shared>,
    mut ending: watch::Receiver<bool>,
) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = ending.changed() => return,
        };
        match accepted {
            Ok((stream, _)) => begin(stream, &shared, None, &ending),
            Err(error) => recover(&error).await,
        }
    }
}

/// Out of descriptors, or a connection that ended before it began: neither ends the broker.
async fn recover(error: &std::io::Error) {
    tracing::warn!(%error, "a connection could not be accepted");
    tokio::time::sleep(Duration::from_millis(50)).await;
}

/// Serves a connection in a task of its own, or drops it where there are too many.
fn begin<S>(
    stream: S,
    shared: &Arc<Shared>,
    tls: Option<TlsAcceptor>,
    ending: &watch::Receiver<bool>,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let Ok(place) = shared.connections.clone().try_acquire_owned() else {
        tracing::warn!("too many connections; one is refused");
        return;
    };
    let (shared, ending) = (shared.clone(), ending.clone());
    tokio::spawn(async move {
        let patience = Duration::from_secs(shared.limits.request_s);
        match tls {
            None => serve(stream, shared, ending).await,
            Some(acceptor) => match timeout(patience, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => serve(stream, shared, ending).await,
                Ok(Err(error)) => tracing::debug!(%error, "TLS"),
                Err(_) => tracing::debug!("a TLS handshake took too long"),
            },
        }
        drop(place);
    });
}

async fn serve<S>(stream: S, shared: Arc<Shared>, mut ending: watch::Receiver<bool>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let patience = Duration::from_secs(shared.limits.request_s);
    let service = service_fn(|request| {
        let shared = shared.clone();
        async move { Ok::<_, Infallible>(answer(request, &shared).await) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(patience)
        .max_buf_size(MAX_HEAD_LEN)
        .max_headers(MAX_HEADERS)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let lifetime = tokio::time::sleep(CONNECTION_LIFETIME);
    tokio::pin!(lifetime);
    let ended = tokio::select! {
        ended = &mut connection => ended,
        () = &mut lifetime => return,
        _ = ending.changed() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "connection");
    }
}

async fn answer(request: Request<Incoming>, shared: &Arc<Shared>) -> Response<Full<Bytes>> {
    let Some(below) = request.uri().path().strip_prefix(PATH_PREFIX) else {
        return nothing(StatusCode::NOT_FOUND);
    };
    let session = session_of(request.headers());
    if let Some(path) = below.strip_prefix("/resource/") {
        if request.method() != Method::GET {
            return nothing(StatusCode::METHOD_NOT_ALLOWED);
        }
        let path = path.to_owned();
        return resource(shared, session, path).await;
    }
    let limit = match below {
        "/auth" => MAX_REQUEST_LEN,
        "/attest" => MAX_ATTESTATION_LEN,
        _ => return nothing(StatusCode::NOT_FOUND),
    };
    if request.method() != Method::POST {
        return nothing(StatusCode::METHOD_NOT_ALLOWED);
    }
    let attests = below == "/attest";
    let body = match body_of(request, limit, shared).await {
        Ok(body) => body,
        Err(refused) => return refused,
    };
    if attests {
        attest(shared, session, body).await
    } else {
        auth(shared, body).await
    }
}

async fn auth(shared: &Arc<Shared>, body: Bytes) -> Response<Full<Bytes>> {
    match work(shared, move |broker| broker.auth(&body)).await {
        Ok(opened) => {
            let mut response = json(StatusCode::OK, &opened.challenge);
            give_cookie(&mut response, shared, &opened.session, opened.lifetime);
            response
        }
        Err(refusal) => refuse(&refusal),
    }
}

async fn attest(
    shared: &Arc<Shared>,
    session: Option<String>,
    body: Bytes,
) -> Response<Full<Bytes>> {
    let name = session.clone();
    match work(shared, move |broker| {
        broker.attest(session.as_deref(), &body)
    })
    .await
    {
        Ok(accepted) => {
            let mut response = json(StatusCode::OK, &accepted.response);
            mark_emulated(&mut response, accepted.emulated);
            if let Some(name) = name {
                give_cookie(&mut response, shared, &name, accepted.lifetime);
            }
            response
        }
        Err(refusal) => refuse(&refusal),
    }
}

async fn resource(
    shared: &Arc<Shared>,
    session: Option<String>,
    path: String,
) -> Response<Full<Bytes>> {
    match work(shared, move |broker| {
        broker.resource(session.as_deref(), &path)
    })
    .await
    {
        Ok(released) => {
            let mut response = json(StatusCode::OK, &released.jwe);
            mark_emulated(&mut response, released.emulated);
            response
        }
        Err(refusal) => refuse(&refusal),
    }
}

/// Runs one step on a thread that may block, a bounded number of them at once.
async fn work<T: Send + 'static>(
    shared: &Arc<Shared>,
    step: impl FnOnce(&Broker) -> Result<T, Refusal> + Send + 'static,
) -> Result<T, Refusal> {
    let place = shared.work.clone().acquire_owned();
    let place = place.await.map_err(|_| Refusal::Internal)?;
    let broker = shared.broker.clone();
    let step = tokio::task::spawn_blocking(move || {
        let result = step(&broker);
        drop(place);
        result
    });
    step.await.unwrap_or(Err(Refusal::Internal))
}

/// The whole body, or the refusal of one that is too long or too slow.
async fn body_of(
    request: Request<Incoming>,
    limit: usize,
    shared: &Shared,
) -> Result<Bytes, Response<Full<Bytes>>> {
    let too_large = || refuse(&Refusal::TooLarge(limit));
    if request.body().size_hint().lower() > limit as u64 {
        return Err(too_large());
    }
    let patience = Duration::from_secs(shared.limits.request_s);
    match timeout(patience, Limited::new(request.into_body(), limit).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => Err(too_large()),
        Ok(Err(_)) => Err(nothing(StatusCode::BAD_REQUEST)),
        Err(_) => Err(nothing(StatusCode::REQUEST_TIMEOUT)),
    }
}

/// The session that the cookies name.
fn session_of(headers: &HeaderMap) -> Option<String> {
    let cookies = headers.get_all(COOKIE).iter();
    let pairs = cookies
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(';'));
    let mut values = pairs.filter_map(|pair| {
        let (name, value) = pair.trim().split_once('=')?;
        (name == SESSION_COOKIE).then_some(value)
    });
    let value = values.next()?;
    (value.len() <= MAX_SESSION_LEN).then(|| value.to_owned())
}

fn give_cookie(
    response: &mut Response<Full<Bytes>>,
    shared: &Shared,
    session: &str,
    lifetime: Duration,
) {
    let secure = if shared.secure { "; Secure" } else { "" };
    let seconds = lifetime.as_secs();
    let cookie = format!(
        "{SESSION_COOKIE}={session}; Path=/; HttpOnly; SameSite=Strict; Max-Age={seconds}{secure}"
    );
    if let Ok(value) = HeaderValue::from_str(&cookie) {
        response.headers_mut().insert(SET_COOKIE, value);
    }
}

fn mark_emulated(response: &mut Response<Full<Bytes>>, emulated: bool) {
    if emulated {
        let yes = HeaderValue::from_static("true");
        response.headers_mut().insert("casemate-emulated", yes);
    }
}

fn refuse(refusal: &Refusal) -> Response<Full<Bytes>> {
    let status =
        StatusCode::from_u16(refusal.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    json(status, &refusal.information())
}

fn json(status: StatusCode, body: &impl Serialize) -> Response<Full<Bytes>> {
    let Ok(text) = serde_json::to_vec(body) else {
        return nothing(StatusCode::INTERNAL_SERVER_ERROR);
    };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

fn nothing(status: StatusCode) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    *response.status_mut() = status;
    response
}

const MAX_HEAD_LEN: usize = 16 * 1024;
const MAX_HEADERS: usize = 64;
const MAX_SESSION_LEN: usize = 128;
const WORKERS: usize = 16;
const CONNECTION_LIFETIME: Duration = Duration::from_secs(120);
const SHUTDOWN: Duration = Duration::from_secs(5);
