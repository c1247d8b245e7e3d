//! How each request is asked for over HTTP: one line an operation, for the agent, its clients and the published
//! description alike.
//!
//! What stands in braces is a field of the request, taken from the path. The other fields are the query of a `GET`, and
//! a JSON object in the body of anything else.

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use serde_json::{Map, Value};

use super::{Failure, MAX_MESSAGE, Request};

/// How one operation is asked for, and what it answers.
#[derive(Debug, PartialEq, Eq)]
pub struct Route {
    /// The request's name.
    pub operation: &'static str,
    /// `GET` looks, `POST` does, `DELETE` ends.
    pub method: &'static str,
    /// The path; fields in braces.
    pub path: &'static str,
    /// The kind of the answer.
    pub answers: &'static str,
    /// How it is answered.
    pub manner: Manner,
}

/// How an operation is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// At once.
    Now,
    /// By a task; its last line is the answer.
    Task,
    /// By the lines of a task, one JSON object each.
    Lines,
    /// By text.
    Text,
}

/// Every operation.
pub const ROUTES: &[Route] = &[
    get("list", "/v1/guests", "guests"),
    task("run", "/v1/guests", "guest"),
    get("definitions", "/v1/definitions", "definitions"),
    post("create", "/v1/definitions", "definition"),
    task("start", "/v1/definitions/{name}/start", "guest"),
    delete("delete", "/v1/definitions/{name}", "done"),
    get("status", "/v1/guests/{name}", "guest"),
    post("stop", "/v1/guests/{name}/stop", "done"),
    task("shutdown", "/v1/guests/{name}/shutdown", "done"),
    post("device", "/v1/guests/{name}/device", "device"),
    post("attach", "/v1/guests/{name}/attach", "guest"),
    task("detach", "/v1/guests/{name}/detach", "guest"),
    post("pause", "/v1/guests/{name}/pause", "guest"),
    post("resume", "/v1/guests/{name}/resume", "guest"),
    post("nmi", "/v1/guests/{name}/nmi", "guest"),
    task("upgrade", "/v1/guests/{name}/upgrade", "upgraded"),
    task("snapshot", "/v1/guests/{name}/snapshot", "snapshotted"),
    task("restore", "/v1/restore", "guest"),
    task("clone", "/v1/clone", "guest"),
    delete("snapshot-erase", "/v1/snapshots/{id}", "done"),
    get(
        "measurement",
        "/v1/guests/{name}/measurement",
        "measurement",
    ),
    get("stats", "/v1/guests/{name}/stats", "stats"),
    get("console", "/v1/guests/{name}/console", "console"),
    post(
        "console-open",
        "/v1/guests/{name}/console",
        "console-opened",
    ),
    post("inject-secret", "/v1/guests/{name}/secret", "guest"),
    task("migrate", "/v1/guests/{name}/migrate", "migrated"),
    task("assess", "/v1/guests/{name}/assess", "assessed"),
    task("settle", "/v1/guests/{name}/settle", "settled"),
    post("proceed", "/v1/guests/{name}/proceed", "done"),
    post("migrate-set", "/v1/guests/{name}/migration", "done"),
    post("cancel", "/v1/guests/{name}/cancel", "done"),
    get("sandbox-report", "/v1/guests/{name}/sandbox", "sandbox"),
    post("sandbox-probe", "/v1/guests/{name}/sandbox/probe", "probe"),
    get("platform", "/v1/platform", "platform"),
    get(
        "snp-certificates",
        "/v1/platform/snp-certificates",
        "snp-certificates",
    ),
    post("platform-order", "/v1/platform/order", "ordered"),
    post("policy-load", "/v1/policy", "policy"),
    post("approve", "/v1/approvals/{id}", "done"),
    post("evidence-rotate", "/v1/evidence/key", "evidence-key"),
    post(
        "evidence-retain",
        "/v1/evidence/retention",
        "evidence-retained",
    ),
    get("tasks", "/v1/tasks", "tasks"),
    get("task", "/v1/tasks/{id}", "task"),
    Route {
        operation: "task-events",
        method: "GET",
        path: "/v1/tasks/{id}/events",
        answers: "task",
        manner: Manner::Lines,
    },
    delete("task-cancel", "/v1/tasks/{id}", "task"),
    Route {
        operation: "metrics",
        method: "GET",
        path: "/metrics",
        answers: "metrics",
        manner: Manner::Text,
    },
];

/// Where the description of all this is.
pub const OPENAPI_PATH: &str = "/v1/openapi.json";

/// A request as it goes over the wire.
#[derive(Debug, PartialEq, Eq)]
pub struct Outgoing {
    /// The method.
    pub method: &'static str,
    /// Path and query.
    pub target: String,
    /// JSON, where the method has a body.
    pub body: Option<Vec<u8>>,
}

impl Request {
    /// The operation's name.
    pub fn operation(&self) -> &'static str {
        self.taken_apart()
            .map_or("none", |(route, _)| route.operation)
    }

    /// How this request is asked for.
    pub fn outgoing(&self) -> Result<Outgoing, Failure> {
        let lost = || Failure::new("INTERNAL", "a request without a route");
        let (route, mut fields) = self.taken_apart().ok_or_else(lost)?;
        let mut target = String::new();
        for part in route.path.split('/').skip(1) {
            target.push('/');
            match field_of(part) {
                Some(field) => {
                    let value = fields.remove(field);
                    let text = value.as_ref().and_then(Value::as_str).ok_or_else(lost)?;
                    target.extend(utf8_percent_encode(text, ESCAPED));
                }
                None => target.push_str(part),
            }
        }
        fields.retain(|_, value| !value.is_null());
        if route.method == "GET" {
            for (number, (field, value)) in fields.iter().enumerate() {
                target.push(if number == 0 { '?' } else { '&' });
                target.push_str(field);
                target.push('=');
                match value.as_u64() {
                    Some(number) => target.push_str(&number.to_string()),
                    None => {
                        let text = value.as_str().ok_or_else(lost)?;
                        target.extend(utf8_percent_encode(text, ESCAPED));
                    }
                }
            }
        }
        let body = (route.method == "POST").then(|| Value::Object(fields).to_string().into_bytes());
        Ok(Outgoing {
            method: route.method,
            target,
            body,
        })
    }

    /// The route, and the fields without the operation's name.
    fn taken_apart(&self) -> Option<(&'static Route, Map<String, Value>)> {
        let Ok(Value::Object(mut fields)) = serde_json::to_value(self) else {
            return None;
        };
        let operation = fields.remove(TAG)?;
        let route = ROUTES.iter().find(|r| operation == r.operation)?;
        Some((route, fields))
    }

    /// The request behind method, path, query and body, none of which is believed.
    pub fn incoming(
        method: &str,
        path: &str,
        query: Option<&str>,
        body: &[u8],
    ) -> Result<(&'static Route, Self), Failure> {
        let (route, mut fields) = find(method, path)?;
        let mut add = |field: String, value: Value| match fields.insert(field.clone(), value) {
            None => Ok(()),
            Some(_) => Err(bad(format!("`{field}` is given twice"))),
        };
        for pair in query.into_iter().flat_map(|query| query.split('&')) {
            if route.method != "GET" {
                return Err(bad("this operation takes no query; give a JSON body"));
            }
            let (field, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = match value.parse::<u64>() {
                Ok(number) => Value::from(number),
                Err(_) => Value::String(decoded(value)?),
            };
            add(decoded(field)?, value)?;
        }
        if !body.is_empty() {
            if body.len() > MAX_MESSAGE {
                return Err(too_long());
            }
            let given: Map<String, Value> = serde_json::from_slice(body)
                .map_err(|e| bad(format!("the body is no JSON object: {e}")))?;
            if route.method == "GET" && !given.is_empty() {
                return Err(bad("this operation takes no body"));
            }
            for (field, value) in given {
                add(field, value)?;
            }
        }
        add(TAG.to_owned(), Value::String(route.operation.to_owned()))?;
        let request = serde_json::from_value(Value::Object(fields))
            .map_err(|e| bad(format!("{}: {e}", route.operation)))?;
        Ok((route, request))
    }
}

/// A body that is longer than any request.
pub fn too_long() -> Failure {
    Failure::new(
        "TOO_LARGE",
        format!("a request has at most {MAX_MESSAGE} bytes"),
    )
}

fn find(method: &str, path: &str) -> Result<(&'static Route, Map<String, Value>), Failure> {
    let mut others = Vec::new();
    for route in ROUTES {
        if let Some(fields) = matched(route.path, path)? {
            if route.method == method {
                return Ok((route, fields));
            }
            others.push(route.method);
        }
    }
    if others.is_empty() {
        return Err(Failure::new(
            "NO_SUCH_PATH",
            format!("nothing is at {path:?}; GET {OPENAPI_PATH} says what there is"),
        ));
    }
    Err(Failure::new(
        "METHOD_NOT_ALLOWED",
        format!(
            "{method:?} is not for {path:?}; use {}",
            others.join(" or ")
        ),
    ))
}

/// The fields of a path that fits the pattern.
fn matched(pattern: &str, path: &str) -> Result<Option<Map<String, Value>>, Failure> {
    let mut fields = Map::new();
    let mut parts = path.split('/');
    for wanted in pattern.split('/') {
        let Some(part) = parts.next() else {
            return Ok(None);
        };
        match field_of(wanted) {
            Some(field) if !part.is_empty() => {
                fields.insert(field.to_owned(), Value::String(decoded(part)?));
            }
            _ if wanted == part => {}
            _ => return Ok(None),
        }
    }
    Ok(parts.next().is_none().then_some(fields))
}

/// `name` of `{name}`.
pub fn field_of(part: &str) -> Option<&str> {
    part.strip_prefix('{')?.strip_suffix('}')
}

fn decoded(text: &str) -> Result<String, Failure> {
    let text = percent_decode_str(text).decode_utf8();
    Ok(text
        .map_err(|_| bad("path or query is not UTF-8"))?
        .into_owned())
}

fn bad(text: impl Into<String>) -> Failure {
    Failure::new("BAD_REQUEST", text)
}

const fn get(operation: &'static str, path: &'static str, answers: &'static str) -> Route {
    Route {
        operation,
        method: "GET",
        path,
        answers,
        manner: Manner::Now,
    }
}

const fn post(operation: &'static str, path: &'static str, answers: &'static str) -> Route {
    Route {
        operation,
        method: "POST",
        path,
        answers,
        manner: Manner::Now,
    }
}

const fn delete(operation: &'static str, path: &'static str, answers: &'static str) -> Route {
    Route {
        operation,
        method: "DELETE",
        path,
        answers,
        manner: Manner::Now,
    }
}

const fn task(operation: &'static str, path: &'static str, answers: &'static str) -> Route {
    Route {
        operation,
        method: "POST",
        path,
        answers,
        manner: Manner::Task,
    }
}

/// The field by which a [`Request`] is told from others.
pub const TAG: &str = "request";

/// What needs no escape in a path or query (RFC 3986, 2.3).
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::agent::decision::tests::every_request;

    #[test]
    fn every_request_has_one_route_and_comes_back_the_same() {
        let mut seen = BTreeSet::new();
        for request in every_request() {
            let out = request.outgoing().unwrap();
            let (path, query) = match out.target.split_once('?') {
                Some((path, query)) => (path, Some(query)),
                None => (out.target.as_str(), None),
            };
            let body = out.body.as_deref().unwrap_or_default();
            let (route, back) = Request::incoming(out.method, path, query, body).unwrap();
            assert_eq!(format!("{back:?}"), format!("{request:?}"));
            assert!(seen.insert(route.operation), "{}", route.operation);
        }
        assert_eq!(seen.len(), ROUTES.len());
        let paths: BTreeSet<_> = ROUTES.iter().map(|r| (r.method, r.path)).collect();
        assert_eq!(paths.len(), ROUTES.len());
    }

    proptest::proptest! {
        /// Whatever is sent, it is refused or it is a request that can be sent just so again.
        #[test]
        fn nothing_that_is_sent_is_taken_for_another_request(
            method in proptest::sample::select(vec!["GET", "POST", "DELETE", "PUT", "get"]),
            parts in proptest::collection::vec("[a-z0-9%/.-]{0,6}|v1|guests|tasks|stop|events|definitions|platform", 0..6),
            query in proptest::option::of("[a-z0-9=&%]{0,20}|processor=amd|from=[0-9]{1,21}"),
            body in "[{}\\[\\]\":,a-z0-9]{0,40}|\\{\"description\":\"[a-z/]{0,9}\"\\}",
        ) {
            let path = format!("/{}", parts.join("/"));
            let first = Request::incoming(method, &path, query.as_deref(), body.as_bytes());
            if let Ok((route, request)) = first {
                let out = request.outgoing().unwrap();
                let (path, query) = out.target.split_once('?').unwrap_or((&out.target, ""));
                let query = (!query.is_empty()).then_some(query);
                let body = out.body.as_deref().unwrap_or_default();
                let (again, back) = Request::incoming(out.method, path, query, body).unwrap();
                assert_eq!(format!("{back:?}"), format!("{request:?}"));
                assert_eq!((again.operation, route.method), (route.operation, method));
            }
        }
    }

    #[test]
    fn names_that_need_escapes_survive() {
        let name = "a/b c?d=é&%2f".to_owned();
        let out = Request::Stop { name: name.clone() }.outgoing().unwrap();
        let body = out.body.unwrap();
        let (_, back) = Request::incoming("POST", &out.target, None, &body).unwrap();
        assert!(matches!(back, Request::Stop { name: found } if found == name));
    }

    #[test]
    fn what_no_route_takes_is_refused() {
        let code = |method: &str, path: &str, query: Option<&str>, body: &str| {
            let refused = Request::incoming(method, path, query, body.as_bytes());
            refused.map_or_else(|f| f.code, |(route, _)| route.operation.to_owned())
        };
        assert_eq!(code("GET", "/v1/guests", None, ""), "list");
        assert_eq!(
            code("GET", "/v1/platform", Some("processor=amd"), ""),
            "platform"
        );
        for (method, path, query, body, want) in [
            ("GET", "/", None, "", "NO_SUCH_PATH"),
            ("GET", "", None, "", "NO_SUCH_PATH"),
            ("GET", "/v2/guests", None, "", "NO_SUCH_PATH"),
            ("GET", "/v1/guests/", None, "", "NO_SUCH_PATH"),
            ("GET", "/v1/guests/a/b", None, "", "NO_SUCH_PATH"),
            ("PUT", "/v1/guests", None, "", "METHOD_NOT_ALLOWED"),
            ("get", "/v1/guests", None, "", "METHOD_NOT_ALLOWED"),
            ("GET", "/v1/guests", Some("a=b"), "", "BAD_REQUEST"),
            ("GET", "/v1/guests", Some(""), "", "BAD_REQUEST"),
            ("GET", "/v1/guests", None, "{\"a\":1}", "BAD_REQUEST"),
            ("GET", "/v1/guests/%ff", None, "", "BAD_REQUEST"),
            ("GET", "/v1/guests/a", Some("name=b"), "", "BAD_REQUEST"),
            (
                "GET",
                "/v1/platform",
                Some("processor=vax"),
                "",
                "BAD_REQUEST",
            ),
            (
                "POST",
                "/v1/guests/a/stop",
                None,
                "{\"name\":\"b\"}",
                "BAD_REQUEST",
            ),
            (
                "POST",
                "/v1/guests/a/stop",
                None,
                "{\"request\":\"list\"}",
                "BAD_REQUEST",
            ),
            (
                "POST",
                "/v1/guests/a/stop",
                None,
                "{\"more\":1}",
                "BAD_REQUEST",
            ),
            ("POST", "/v1/guests/a/stop", Some("x=y"), "", "BAD_REQUEST"),
            ("POST", "/v1/guests/a/stop", None, "[]", "BAD_REQUEST"),
            ("POST", "/v1/guests/a/stop", None, "{}{}", "BAD_REQUEST"),
            ("POST", "/v1/guests/a/stop", None, "null", "BAD_REQUEST"),
            ("POST", "/v1/guests", None, "{}", "BAD_REQUEST"),
            (
                "POST",
                "/v1/guests",
                None,
                "{\"description\":1}",
                "BAD_REQUEST",
            ),
        ] {
            assert_eq!(
                code(method, path, query, body),
                want,
                "{method} {path} {query:?} {body}"
            );
        }
        let long = format!("{{\"description\":\"{}\"}}", "x".repeat(MAX_MESSAGE));
        assert_eq!(code("POST", "/v1/guests", None, &long), "TOO_LARGE");
        let deep = "[".repeat(100_000);
        assert_eq!(
            code("POST", "/v1/guests", None, &format!("{{\"a\":{deep}")),
            "BAD_REQUEST"
        );
    }
}
