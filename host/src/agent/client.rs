//! The command line's side of the API.

use std::fmt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::str::FromStr;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::SendRequest;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Request as HttpRequest, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use crate::agent::api::problem::Problem;
use crate::agent::api::routes::Outgoing;
use crate::agent::api::{Answer, Failure, Line, MAX_MESSAGE, Request};

/// An agent, and who asks it.
#[derive(Clone, Debug)]
pub struct Agent {
    /// Where it is.
    pub address: Address,
    /// Who asks, of an agent that is reached by TLS.
    pub person: Option<Certificates>,
}

/// Where an agent is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// Its Unix socket.
    Socket(PathBuf),
    /// By TLS.
    Https {
        /// Name or address, as in the agent's certificate.
        host: String,
        /// Port.
        port: u16,
    },
}

/// PEM files of somebody who asks by TLS.
#[derive(Clone, Debug)]
pub struct Certificates {
    /// Who signs agents' certificates.
    pub ca: PathBuf,
    /// The own chain, leaf first.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// Asks an agent; `progress` sees every progress event.
pub fn ask(
    agent: &Agent,
    request: &Request,
    progress: &mut dyn FnMut(&Value),
) -> Result<Answer, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| lost(&e))?;
    runtime.block_on(async {
        let mut connection = Connection::open(agent).await?;
        if let Request::TaskEvents { id } = request {
            return connection.follow(id, progress).await;
        }
        match connection.ask(request).await? {
            (StatusCode::ACCEPTED, Answer::Task(task)) => {
                connection.follow(&task.id, progress).await
            }
            (_, answer) => Ok(answer),
        }
    })
}

struct Connection {
    sender: SendRequest<Full<Bytes>>,
    host: String,
}

impl Connection {
    async fn open(agent: &Agent) -> Result<Self, Failure> {
        match &agent.address {
            Address::Socket(path) => {
                let stream = UnixStream::connect(path).await;
                let stream = stream.map_err(|e| unavailable(path, &e))?;
                Self::over(stream, "agent".to_owned()).await
            }
            Address::Https { host, port } => {
                let config = agent.person.as_ref().ok_or_else(no_person)?.config()?;
                let name = ServerName::try_from(host.clone()).map_err(|e| usage(&e))?;
                let connector = tokio_rustls::TlsConnector::from(config);
                let connect = async {
                    let stream = TcpStream::connect((host.as_str(), *port)).await?;
                    stream.set_nodelay(true)?;
                    connector.connect(name, stream).await
                };
                let late = |_| std::io::Error::from(std::io::ErrorKind::TimedOut);
                let stream = timeout(PATIENCE, connect).await.map_err(late);
                let stream = stream.and_then(|connected| connected).map_err(|e| {
                    let text = format!("the agent at https://{host}:{port} cannot be reached: {e}");
                    Failure::new("AGENT_UNAVAILABLE", text)
                })?;
                Self::over(stream, format!("{host}:{port}")).await
            }
        }
    }

    async fn over<S>(stream: S, host: String) -> Result<Self, Failure>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let stream = Insistent {
            stream,
            asked: false,
            early: None,
        };
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| lost(&e))?;
        // Its errors are those of the request that it carries.
        tokio::spawn(connection);
        Ok(Self { sender, host })
    }

    async fn ask(&mut self, request: &Request) -> Result<(StatusCode, Answer), Failure> {
        let response = self.send(request).await?;
        let (status, body) = (response.status(), whole(response).await?);
        let answer = match request {
            Request::Metrics {} => Answer::Metrics {
                text: String::from_utf8(body).map_err(|e| lost(&e))?,
            },
            _ => serde_json::from_slice(&body).map_err(|e| lost(&e))?,
        };
        Ok((status, answer))
    }

    /// A task's lines until its answer.
    async fn follow(
        &mut self,
        id: &str,
        progress: &mut dyn FnMut(&Value),
    ) -> Result<Answer, Failure> {
        let id = id.to_owned();
        let mut body = self.send(&Request::TaskEvents { id }).await?.into_body();
        let mut pending = Vec::new();
        loop {
            let frame = match body.frame().await {
                Some(frame) => frame.map_err(|e| lost(&e))?,
                None => return Err(closed()),
            };
            pending.extend_from_slice(frame.data_ref().map_or(&[], |data| data));
            while let Some(end) = pending.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = pending.drain(..=end).collect();
                match serde_json::from_slice(&line).map_err(|e| lost(&e))? {
                    Line::Progress { event } => progress(&event),
                    Line::Answer { answer } => return Ok(*answer),
                    Line::Failed(failure) => return Err(failure),
                }
            }
            if pending.len() > MAX_MESSAGE {
                return Err(lost(&"a line without an end"));
            }
        }
    }

    /// A response that is no failure.
    async fn send(&mut self, request: &Request) -> Result<Response<Incoming>, Failure> {
        let Outgoing {
            method,
            target,
            body,
        } = request.outgoing()?;
        let mut builder = HttpRequest::builder()
            .method(method)
            .uri(target)
            .header(HOST, &self.host);
        if body.is_some() {
            builder = builder.header(CONTENT_TYPE, "application/json");
        }
        let message = builder.body(Full::from(body.unwrap_or_default()));
        let message = message.map_err(|e| lost(&e))?;
        let response = match self.sender.send_request(message).await {
            Ok(response) => response,
            Err(e) if e.is_incomplete_message() || e.is_canceled() => return Err(closed()),
            Err(e) => return Err(lost(&e)),
        };
        match response.status() {
            StatusCode::OK | StatusCode::ACCEPTED => Ok(response),
            status => {
                let body = whole(response).await?;
                let problem: Problem = serde_json::from_slice(&body)
                    .map_err(|_| lost(&format!("it answered with HTTP status {status}")))?;
                Err(problem.into())
            }
        }
    }
}

/// An agent that refuses whoever asks does not read the request: what cannot be written any more is taken for written,
/// and its answer, which is there all the same, is read; but not before something was asked.
struct Insistent<S> {
    stream: S,
    asked: bool,
    /// Who wants to read an answer to nothing.
    early: Option<Waker>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Insistent<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        if !self.asked {
            self.early = Some(cx.waker().clone());
            return Poll::Pending;
        }
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Insistent<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        self.asked = true;
        self.early.take().into_iter().for_each(Waker::wake);
        match Pin::new(&mut self.stream).poll_write(cx, bytes) {
            Poll::Ready(Err(e)) if e.kind() == std::io::ErrorKind::BrokenPipe => {
                Poll::Ready(Ok(bytes.len()))
            }
            other => other,
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Certificates {
    fn config(&self) -> Result<Arc<ClientConfig>, Failure> {
        let mut roots = RootCertStore::empty();
        for root in certificates(&self.ca)? {
            roots.add(root).map_err(|e| unusable(&self.ca, &e))?;
        }
        let key = std::fs::read(&self.key).map_err(|e| unusable(&self.key, &e))?;
        let key = PrivateKeyDer::from_pem_slice(&key).map_err(|e| unusable(&self.key, &e))?;
        let chain = certificates(&self.certificate)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .and_then(|builder| {
                let builder = builder.with_root_certificates(roots);
                builder.with_client_auth_cert(chain, key)
            })
            .map_err(|e| unusable(&self.certificate, &e))?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some(rest) = text.strip_prefix("https://") else {
            if text.starts_with("http://") {
                return Err("the agent speaks no plain HTTP; use https:// or a socket".to_owned());
            }
            return Ok(Self::Socket(text.into()));
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let wanted = || format!("{text:?} is not https://HOST:PORT");
        let (host, port) = rest.rsplit_once(':').ok_or_else(wanted)?;
        let host = match host.strip_prefix('[') {
            Some(inner) => inner.strip_suffix(']').ok_or_else(wanted)?,
            None => host,
        };
        let port = port.parse().map_err(|_| wanted())?;
        if host.is_empty() || host.contains(['/', '@', '?', '#']) {
            return Err(wanted());
        }
        Ok(Self::Https {
            host: host.to_owned(),
            port,
        })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(path) => path.display().fmt(f),
            Self::Https { host, port } => write!(f, "https://{host}:{port}"),
        }
    }
}

async fn whole(response: Response<Incoming>) -> Result<Vec<u8>, Failure> {
    let limited = http_body_util::Limited::new(response.into_body(), MAX_ANSWER);
    let body = limited.collect().await.map_err(|e| lost(&e))?;
    Ok(body.to_bytes().to_vec())
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Failure> {
    let pem = std::fs::read(path).map_err(|e| unusable(path, &e))?;
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    all.map_err(|e| unusable(path, &e))
}

fn unavailable(socket: &Path, error: &std::io::Error) -> Failure {
    let remedy = "start it with `casemate agent --config FILE`, or name its socket with --agent";
    Failure::new(
        "AGENT_UNAVAILABLE",
        format!(
            "no agent answers at {}: {error}; {remedy}",
            socket.display()
        ),
    )
}

fn no_person() -> Failure {
    usage(&"an https agent wants --agent-ca, --agent-cert and --agent-key")
}

fn usage(error: &dyn fmt::Display) -> Failure {
    Failure::new("USAGE", error.to_string())
}

fn unusable(path: &Path, error: &dyn fmt::Display) -> Failure {
    usage(&format!("{}: {error}", path.display()))
}

fn closed() -> Failure {
    Failure::new(
        "AGENT_LOST",
        "the agent closed the connection before it answered; see its log",
    )
}

fn lost(error: &dyn fmt::Display) -> Failure {
    Failure::new(
        "AGENT_LOST",
        format!("talking to the agent failed: {error}"),
    )
}

/// For connection and handshake. An answer may take as long as the work does.
const PATIENCE: Duration = Duration::from_secs(20);
/// Longest answer in bytes: a list of every guest and task.
const MAX_ANSWER: usize = 16 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_is_a_path_or_a_url() {
        let https = |host: &str, port| Address::Https {
            host: host.to_owned(),
            port,
        };
        let parsed = |text: &str| text.parse::<Address>();
        assert_eq!(
            parsed("/run/a.sock"),
            Ok(Address::Socket("/run/a.sock".into()))
        );
        assert_eq!(parsed("https://site-a:7443"), Ok(https("site-a", 7443)));
        assert_eq!(
            parsed("https://[2001:db8::1]:1/"),
            Ok(https("2001:db8::1", 1))
        );
        for wrong in [
            "http://a:1",
            "https://a",
            "https://:1",
            "https://a:b",
            "https://a:1/x",
            "https://user@a:1",
            "https://[::1:1",
        ] {
            assert!(parsed(wrong).is_err(), "{wrong}");
        }
    }
}
