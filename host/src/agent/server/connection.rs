//! One client's connection: HTTP/1.1, one request after the other.
//!
//! Nothing that arrives is believed or waited for without end: heads and bodies are bounded, each has a deadline, and
//! who asks is what the kernel or TLS said, held against the policy in force at each request.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use casemate_policy::{Actor, DnsName, Fingerprint};
use http_body_util::{BodyExt as _, Either, Full, Limited};
use hyper::body::{Body, Bytes, Frame, Incoming};
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue, LOCATION, ORIGIN};
use hyper::service::service_fn;
use hyper::{Method, Request as HttpRequest, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::unistd::geteuid;
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;

use super::patient::Patient;
use crate::agent::Agent;
use crate::agent::api::problem::{PROBLEM, Problem};
use crate::agent::api::routes::{Manner, OPENAPI_PATH, Route, too_long};
use crate::agent::api::{Answer, Failure, MAX_MESSAGE, Request, TaskInfo, openapi};
use crate::agent::authority::{Caller, other_users};
use crate::agent::tasks::Reader;

/// Who is at the other end, as the kernel or TLS said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Who {
    /// A user of this machine.
    User(u32),
    /// The holder of a client certificate that the authority for people has signed.
    Certificate {
        /// Its names (DNS).
        names: Vec<String>,
        /// SHA-256 of its public key info.
        spki: Fingerprint,
    },
}

/// What all connections share.
pub struct Shared {
    /// Who answers.
    pub agent: Arc<Agent>,
    /// Requests in work at a time; one whose client went away stays in work.
    pub work: Arc<Semaphore>,
}

type Reply = Response<Either<Full<Bytes>, Lines>>;

/// Serves a client until it hangs up, is too slow, or says nothing more.
pub async fn serve<S>(stream: S, who: Who, shared: Arc<Shared>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(|request| {
        let (shared, who) = (Arc::clone(&shared), who.clone());
        async move {
            let reply = answer(request, &who, &shared).await;
            Ok::<_, Infallible>(reply.unwrap_or_else(problem))
        }
    });
    let stream = TokioIo::new(Patient::new(stream, DEADLINE));
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(DEADLINE)
        .max_buf_size(MAX_HEAD)
        .max_headers(MAX_HEADERS)
        // A client that hangs up may have asked before: what has arrived is done.
        .half_close(true)
        .serve_connection(stream, service);
    if let Err(error) = connection.await {
        tracing::debug!(%error, "an API client went away");
    }
}

/// The answer to somebody who may not ask at all: nothing of the request is looked at.
pub fn not_permitted(failure: Failure) -> Vec<u8> {
    let body = serde_json::to_vec(&Problem::from(failure)).unwrap_or_default();
    let head = format!(
        "HTTP/1.1 403 Forbidden\r\ncontent-type: {PROBLEM}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    [head.into_bytes(), body].concat()
}

impl Agent {
    /// Whom the policy in force knows as this client.
    pub(in crate::agent) fn caller(&self, who: &Who) -> Result<Caller, Failure> {
        let policy = self.policy();
        match who {
            Who::User(uid) => {
                let own = geteuid().as_raw();
                let known = *uid == 0 || *uid == own || other_users(&policy, own).contains(uid);
                if !known {
                    return Err(Failure::new(
                        "NOT_PERMITTED",
                        format!(
                            "user {uid} may not talk to this agent; use root, or add a [[person]] to its policy"
                        ),
                    ));
                }
                Ok(Caller::local(*uid, &policy))
            }
            Who::Certificate { names, spki } => {
                let Some(people) = policy.people() else {
                    return Err(Failure::new(
                        "NOT_PERMITTED",
                        "the policy names no people, so no client certificate may ask; add a [[person]] with its `san` and `spki`",
                    ));
                };
                let names: Vec<DnsName> = names.iter().filter_map(|n| n.parse().ok()).collect();
                let known = |san: &&DnsName| {
                    let san = (*san).clone();
                    people
                        .find(&Actor::Certificate { san, spki: *spki })
                        .is_some()
                };
                let mut named = names.iter().filter(known);
                let san = match (named.next(), named.next(), names.first()) {
                    (Some(one), None, _) => one,
                    // The policy's own refusal, with its record.
                    (None, _, Some(first)) => first,
                    (Some(_), Some(_), _) => {
                        return Err(Failure::new(
                            "NOT_PERMITTED",
                            "more than one name of the client certificate is a person's; use a certificate for one",
                        ));
                    }
                    (None, _, None) => {
                        return Err(Failure::new(
                            "NOT_PERMITTED",
                            "the client certificate has no DNS name in lower case; use one that has",
                        ));
                    }
                };
                Ok(Caller::certificate(san.clone(), *spki, &policy))
            }
        }
    }
}

async fn answer(
    request: HttpRequest<Incoming>,
    who: &Who,
    shared: &Arc<Shared>,
) -> Result<Reply, Failure> {
    let caller = shared.agent.caller(who)?;
    if request.headers().contains_key(ORIGIN) {
        return Err(Failure::new(
            "NOT_PERMITTED",
            "a web page's requests are not answered; use a client that sends no Origin",
        ));
    }
    let (head, body) = request.into_parts();
    if head.method == Method::GET && head.uri.path() == OPENAPI_PATH {
        return Ok(json(StatusCode::OK, &openapi::document()));
    }
    let body = body_of(body).await?;
    let is_json = |value: &HeaderValue| value.as_bytes().starts_with(JSON.as_bytes());
    if !body.is_empty() && !head.headers.get(CONTENT_TYPE).is_some_and(is_json) {
        return Err(Failure::new("MEDIA_TYPE", format!("a body is {JSON}")));
    }
    let (method, uri) = (head.method.as_str(), &head.uri);
    let (route, request) = Request::incoming(method, uri.path(), uri.query(), &body)?;
    match route.manner {
        Manner::Task => accept(route, request, caller, shared).await,
        Manner::Lines => match ask(request, caller, shared).await? {
            Answer::Task(task) => {
                let task = shared.agent.tasks.find(&task.id)?;
                Ok(lines(task.read()))
            }
            other => Ok(json(StatusCode::OK, &other)),
        },
        Manner::Text => match ask(request, caller, shared).await? {
            Answer::Metrics { text } => Ok(whole(StatusCode::OK, METRICS, text.into_bytes())),
            other => Ok(json(StatusCode::OK, &other)),
        },
        Manner::Now => Ok(json(StatusCode::OK, &ask(request, caller, shared).await?)),
    }
}

/// A request that takes long: decided as far as it can be at once, and done in a task. What has arrived whole is done,
/// also if the client hangs up meanwhile and nobody waits for this answer.
async fn accept(
    route: &'static Route,
    request: Request,
    caller: Caller,
    shared: &Arc<Shared>,
) -> Result<Reply, Failure> {
    let shared = Arc::clone(shared);
    let begun = tokio::spawn(async move { begin(route, request, caller, &shared).await });
    let info = begun.await.unwrap_or_else(|_| Err(ending()))?;
    let location = format!("/v1/tasks/{}", info.id);
    let mut reply = json(StatusCode::ACCEPTED, &Answer::Task(info));
    if let Ok(location) = HeaderValue::from_str(&location) {
        reply.headers_mut().insert(LOCATION, location);
    }
    Ok(reply)
}

async fn begin(
    route: &'static Route,
    request: Request,
    caller: Caller,
    shared: &Arc<Shared>,
) -> Result<TaskInfo, Failure> {
    let agent = Arc::clone(&shared.agent);
    let gated = work(shared, move || {
        let guest = request.guest().map(str::to_owned);
        let gated = agent.gate_counted(&caller, request)?;
        Ok((caller, guest, gated))
    });
    let (caller, guest, gated) = gated.await?;
    let task = shared
        .agent
        .tasks
        .begin(route.operation, &caller, guest.as_deref())?;
    let info = task.info();
    let agent = Arc::clone(&shared.agent);
    tokio::task::spawn_blocking(move || {
        let end = agent.perform(&caller, gated, &mut |event| task.say(event));
        task.end(end);
    });
    Ok(info)
}

async fn ask(request: Request, caller: Caller, shared: &Arc<Shared>) -> Result<Answer, Failure> {
    let agent = Arc::clone(&shared.agent);
    work(shared, move || agent.handle(&caller, request, &mut |_| {})).await
}

/// Runs one step on a thread that may block, a bounded number of them at once.
async fn work<T: Send + 'static>(
    shared: &Arc<Shared>,
    step: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    let place = Arc::clone(&shared.work).acquire_owned().await;
    let place = place.map_err(|_| ending())?;
    let step = tokio::task::spawn_blocking(move || {
        let result = step();
        drop(place);
        result
    });
    step.await.unwrap_or_else(|_| Err(ending()))
}

fn ending() -> Failure {
    Failure::new("AGENT_ENDING", "this agent is ending; start it again")
}

/// The whole body, or the refusal of one that is too long or too slow.
async fn body_of(body: Incoming) -> Result<Bytes, Failure> {
    if body.size_hint().lower() > MAX_MESSAGE as u64 {
        return Err(too_long());
    }
    match timeout(DEADLINE, Limited::new(body, MAX_MESSAGE).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => Err(too_long()),
        Ok(Err(error)) => Err(Failure::new("BAD_REQUEST", format!("the body: {error}"))),
        Err(_) => Err(Failure::new(
            "REQUEST_TIMEOUT",
            format!("no whole request within {DEADLINE:?}"),
        )),
    }
}

/// The lines of a task as a body: the next is taken when the last was sent.
struct Lines(mpsc::Receiver<Bytes>);

impl Body for Lines {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0
            .poll_recv(cx)
            .map(|next| next.map(|bytes| Ok(Frame::data(bytes))))
    }
}

fn lines(mut reader: Reader) -> Reply {
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            let line = tokio::select! {
                line = reader.next() => line,
                () = sender.closed() => return,
            };
            let Some(Ok(mut bytes)) = line.map(|line| serde_json::to_vec(&line)) else {
                return;
            };
            bytes.push(b'\n');
            if sender.send(bytes.into()).await.is_err() {
                return;
            }
        }
    });
    with_headers(StatusCode::OK, LINES, Either::Right(Lines(receiver)))
}

fn problem(failure: Failure) -> Reply {
    let (status, problem) = (failure.status(), Problem::from(failure));
    whole(
        status,
        PROBLEM,
        serde_json::to_vec(&problem).unwrap_or_default(),
    )
}

fn json(status: StatusCode, body: &impl Serialize) -> Reply {
    match serde_json::to_vec(body) {
        Ok(bytes) => whole(status, JSON, bytes),
        Err(e) => problem(Failure::new("INTERNAL", e.to_string())),
    }
}

fn whole(status: StatusCode, kind: &'static str, bytes: Vec<u8>) -> Reply {
    with_headers(status, kind, Either::Left(Full::new(bytes.into())))
}

fn with_headers(status: StatusCode, kind: &'static str, body: Either<Full<Bytes>, Lines>) -> Reply {
    let mut reply = Response::new(body);
    *reply.status_mut() = status;
    let headers = reply.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    reply
}

const JSON: &str = "application/json";
/// One JSON object a line.
const LINES: &str = "application/x-ndjson";
const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";
/// For the head of a request, for its body, and for room to write an answer.
const DEADLINE: Duration = Duration::from_secs(10);
const MAX_HEAD: usize = 16 * 1024;
const MAX_HEADERS: usize = 64;
