//! One HTTP/1.1 exchange over any stream: a request out, a bounded answer in, and the connection
//! is over. The broker is not trusted: head, body, chunks and header count all have a bound.

use std::io::{self, Read, Write};

/// A request.
pub struct Outgoing<'a> {
    /// `GET` or `POST`.
    pub method: &'a str,
    /// From the slash on; no blanks or control characters.
    pub path: &'a str,
    /// The `Host` header.
    pub host: &'a str,
    /// The `Cookie` header.
    pub cookie: Option<&'a str>,
    /// JSON.
    pub body: &'a [u8],
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// Names in lower case.
    headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// The connection broke or its time was over.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// Not HTTP/1, or more than is read.
    #[error("the answer is no HTTP/1.1 answer: {0}")]
    Malformed(&'static str),
}

impl Answer {
    /// The first header of this name (in lower case).
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut all = self.headers.iter();
        all.find(|(found, _)| found == name)
            .map(|(_, value)| value.as_str())
    }
}

/// Sends a request and reads the whole answer.
pub fn exchange(
    stream: &mut (impl Read + Write),
    request: &Outgoing<'_>,
) -> Result<Answer, HttpError> {
    let Outgoing {
        method,
        path,
        host,
        cookie,
        body,
    } = request;
    let cookie = cookie.map_or(String::new(), |cookie| format!("Cookie: {cookie}\r\n"));
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nAccept: application/json\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n{cookie}\r\n",
        body.len(),
    );
    // A refusal may come before the body has been taken: then the answer still counts.
    let sent = stream
        .write_all(head.as_bytes())
        .and_then(|()| stream.write_all(body));
    match (read_answer(stream), sent) {
        (Ok(answer), _) => Ok(answer),
        (Err(_), Err(error)) => Err(error.into()),
        (Err(error), Ok(())) => Err(error),
    }
}

fn read_answer(stream: &mut impl Read) -> Result<Answer, HttpError> {
    let mut bytes = Vec::new();
    let head = loop {
        if let Some(head) = parse_head(&bytes)? {
            break head;
        }
        if bytes.len() >= MAX_HEAD_LEN {
            return Err(HttpError::Malformed("its head is too long"));
        }
        if more(stream, &mut bytes)? == 0 {
            return Err(HttpError::Malformed("it ends within its head"));
        }
    };
    let rest = bytes.split_off(head.len.min(bytes.len()));
    let mut answer = Answer {
        status: head.status,
        headers: head.headers,
        body: Vec::new(),
    };
    let chunked = answer
        .header("transfer-encoding")
        .map(|coding| coding.eq_ignore_ascii_case("chunked"));
    let length = answer.header("content-length").map(str::parse::<usize>);
    answer.body = match (chunked, length) {
        (Some(true), None) => chunks(stream, rest)?,
        (Some(_), _) => return Err(HttpError::Malformed("its transfer coding is not known")),
        (None, Some(Ok(length))) => sized(stream, rest, length)?,
        (None, Some(Err(_))) => return Err(HttpError::Malformed("its length is no number")),
        (None, None) => to_end(stream, rest)?,
    };
    Ok(answer)
}

struct Head {
    len: usize,
    status: u16,
    headers: Vec<(String, String)>,
}

fn parse_head(bytes: &[u8]) -> Result<Option<Head>, HttpError> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let parsed = response
        .parse(bytes)
        .map_err(|_| HttpError::Malformed("its head"))?;
    let httparse::Status::Complete(len) = parsed else {
        return Ok(None);
    };
    let headers = response.headers.iter().map(|header| {
        let value = String::from_utf8_lossy(header.value).into_owned();
        (header.name.to_ascii_lowercase(), value)
    });
    Ok(Some(Head {
        len,
        status: response.code.unwrap_or_default(),
        headers: headers.collect(),
    }))
}

fn sized(stream: &mut impl Read, mut body: Vec<u8>, length: usize) -> Result<Vec<u8>, HttpError> {
    if length > MAX_BODY_LEN {
        return Err(HttpError::Malformed("its body is too long"));
    }
    while body.len() < length {
        if more(stream, &mut body)? == 0 {
            return Err(HttpError::Malformed("it ends within its body"));
        }
    }
    body.truncate(length);
    Ok(body)
}

fn to_end(stream: &mut impl Read, mut body: Vec<u8>) -> Result<Vec<u8>, HttpError> {
    loop {
        if body.len() > MAX_BODY_LEN {
            return Err(HttpError::Malformed("its body is too long"));
        }
        if more(stream, &mut body)? == 0 {
            return Ok(body);
        }
    }
}

fn chunks(stream: &mut impl Read, mut rest: Vec<u8>) -> Result<Vec<u8>, HttpError> {
    let bad = || HttpError::Malformed("its chunks");
    let mut body = Vec::new();
    loop {
        let (start, size) = loop {
            match httparse::parse_chunk_size(&rest).map_err(|_| bad())? {
                httparse::Status::Complete(found) => break found,
                httparse::Status::Partial if rest.len() > MAX_CHUNK_HEAD => return Err(bad()),
                httparse::Status::Partial => {
                    if more(stream, &mut rest)? == 0 {
                        return Err(bad());
                    }
                }
            }
        };
        let size = usize::try_from(size).map_err(|_| bad())?;
        if size == 0 {
            return Ok(body);
        }
        if size > MAX_BODY_LEN - body.len() {
            return Err(HttpError::Malformed("its body is too long"));
        }
        let end = start + size;
        while rest.len() < end + 2 {
            if more(stream, &mut rest)? == 0 {
                return Err(bad());
            }
        }
        let after = rest.split_off(end);
        body.extend(rest.get(start..).unwrap_or_default());
        rest = after.strip_prefix(b"\r\n").ok_or_else(bad)?.to_vec();
    }
}

fn more(stream: &mut impl Read, bytes: &mut Vec<u8>) -> io::Result<usize> {
    let mut buffer = [0; 8 * 1024];
    loop {
        match stream.read(&mut buffer) {
            Ok(read) => {
                bytes.extend(buffer.get(..read).unwrap_or_default());
                return Ok(read);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

const MAX_HEAD_LEN: usize = 16 * 1024;
const MAX_HEADERS: usize = 64;
const MAX_BODY_LEN: usize = 2 * 1024 * 1024;
const MAX_CHUNK_HEAD: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers byte for byte, as slow as a stream can.
    struct Peer {
        answer: Vec<u8>,
        at: usize,
        sent: Vec<u8>,
    }

    impl Read for Peer {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let Some(byte) = self.answer.get(self.at) else {
                return Ok(0);
            };
            buffer[0] = *byte;
            self.at += 1;
            Ok(1)
        }
    }

    impl Write for Peer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.sent.extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn ask(answer: &[u8]) -> (Result<Answer, HttpError>, String) {
        let mut peer = Peer {
            answer: answer.to_vec(),
            at: 0,
            sent: Vec::new(),
        };
        let request = Outgoing {
            method: "POST",
            path: "/kbs/v0/auth",
            host: "h:1",
            cookie: Some("a=b"),
            body: b"{}",
        };
        let answer = exchange(&mut peer, &request);
        (answer, String::from_utf8(peer.sent).unwrap())
    }

    #[test]
    fn the_three_ways_a_body_ends() {
        for answer in [
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nSet-Cookie: k=v\r\n\r\nhello and more",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nset-cookie: k=v\r\n\r\n2\r\nhe\r\n3;x\r\nllo\r\n0\r\n\r\n",
            "HTTP/1.1 200 OK\r\nSet-Cookie: k=v\r\n\r\nhello",
        ] {
            let (read, sent) = ask(answer.as_bytes());
            let read = read.unwrap();
            assert_eq!((read.status, read.body.as_slice()), (200, &b"hello"[..]));
            assert_eq!(read.header("set-cookie"), Some("k=v"));
            assert!(sent.starts_with("POST /kbs/v0/auth HTTP/1.1\r\nHost: h:1\r\n"));
            assert!(
                sent.ends_with("Content-Length: 2\r\nCookie: a=b\r\n\r\n{}"),
                "{sent}"
            );
        }
    }

    #[test]
    fn what_is_no_answer_is_refused() {
        let long = format!("HTTP/1.1 200 OK\r\nX: {}\r\n\r\n", "x".repeat(MAX_HEAD_LEN));
        let many = format!(
            "HTTP/1.1 200 OK\r\n{}\r\n",
            "X: y\r\n".repeat(MAX_HEADERS + 1)
        );
        let endless = [
            b"HTTP/1.1 200 OK\r\n\r\n".to_vec(),
            vec![0; MAX_BODY_LEN + 1],
        ]
        .concat();
        let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
        for answer in [
            "",
            "SSH-2.0\r\n",
            "HTTP/1.1 200 OK\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx",
            "HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n1\r\nx\r\n0\r\n\r\n",
            &long,
            &many,
            &format!("{chunked}zz\r\n"),
            &format!("{chunked}5\r\nhel"),
            &format!("{chunked}2\r\nhello"),
            &format!("{chunked}ffffffff\r\n"),
            &format!("{chunked}ffffffffffffffff\r\n"),
            &format!("{chunked}1{}", "0".repeat(99)),
        ] {
            assert!(
                ask(answer.as_bytes()).0.is_err(),
                "{}",
                &answer[..answer.len().min(80)]
            );
        }
        assert!(ask(&endless).0.is_err());
    }
}
