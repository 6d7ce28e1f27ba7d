//! HTTP: dashboard, Prometheus metrics, health, state and commands as JSON.
//!
//! Reading is open to everybody who reaches the address. Commands are accepted from loopback peers only, with the header
//! `X-Understudy: 1` (a page on another site cannot send it without a preflight, which is never granted), and for a Host
//! that names this machine (a name that an attacker's DNS points here is refused). Where `[proxy.console]` names a user,
//! commands need that user's name and password besides (HTTP Basic); the browser asks for them by itself.
//! Sources: OWASP, "Cross-Site Request Forgery Prevention"; W3C, "Content Security Policy Level 3"; Fetch standard;
//! RFC 7617 (Basic), RFC 4648 section 4 (base64).

use super::{Answer, CommandError, Operator, auth::is_loopback, command::parse, dispatch::carry_out, lexer::STATEMENT_BYTES_MAX};
use crate::{config::ConsoleUser, monitor::metrics_text};
use axum::{
    Json, Router,
    extract::{ConnectInfo, DefaultBodyLimit, Path, State, rejection::JsonRejection},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde_json::{Value, json};
use std::{
    fmt::Write,
    future::Future,
    hash::{BuildHasher, RandomState},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tokio::{net::TcpListener, sync::watch};

/// The page, with `__NONCE__` where the Content-Security-Policy's nonce belongs.
const DASHBOARD: &str = include_str!("dashboard.html");

/// Requests that run when the shutdown begins may end within this time: longer than any page, shorter than patience.
const DRAIN: Duration = Duration::from_secs(3);

/// Serves HTTP until `shutdown` is ready; requests under way are given a few seconds.
pub async fn serve_http(listener: TcpListener, operator: Arc<dyn Operator>, shutdown: impl Future<Output = ()> + Send + 'static) {
    let address = listener.local_addr().ok().map(|address| address.ip());
    let app = router(operator, address).into_make_service_with_connect_info::<SocketAddr>();
    let (stop, mut stopped) = watch::channel(false);
    let mut stopping = stopped.clone();
    let server = axum::serve(listener, app).with_graceful_shutdown(async move {
        let _ = stopping.wait_for(|stop| *stop).await;
    });
    let drained = async {
        shutdown.await;
        stop.send_replace(true);
        let _ = stopped.wait_for(|stop| *stop).await;
        tokio::time::sleep(DRAIN).await;
    };
    tokio::select! {
        result = server => {
            if let Err(error) = result {
                tracing::error!(%error, "the HTTP listener failed");
            }
        }
        () = drained => {}
    }
}

#[derive(Clone)]
struct App {
    operator: Arc<dyn Operator>,
    address: Option<IpAddr>,
}

fn router(operator: Arc<dyn Operator>, address: Option<IpAddr>) -> Router {
    Router::new()
        .route("/", get(dashboard))
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| async { plain(StatusCode::OK, "ok\n".into()) }))
        .route("/readyz", get(ready))
        .route("/api/state", get(state))
        .route("/api/report/{shadow}", get(report))
        .route("/report/{shadow}", get(report_page))
        .route("/api/command", post(command))
        .fallback(|| async {
            plain(
                StatusCode::NOT_FOUND,
                "nothing here: /, /metrics, /healthz, /readyz, /api/state, /report/<shadow>, /api/report/<shadow>\n".into(),
            )
        })
        .layer(DefaultBodyLimit::max(STATEMENT_BYTES_MAX + 1_024))
        .with_state(App { operator, address })
}

async fn dashboard() -> Response {
    page(DASHBOARD)
}

/// The newest readiness report of a shadow, for people.
async fn report_page(State(app): State<App>, Path(shadow): Path<String>) -> Response {
    match app.operator.report(&shadow) {
        Some(report) => page(&report.page),
        None => plain(StatusCode::NOT_FOUND, NO_REPORT.into()),
    }
}

/// The same, for scripts.
async fn report(State(app): State<App>, Path(shadow): Path<String>) -> Response {
    match app.operator.report(&shadow) {
        Some(report) => (COMMON, Json(report.document)).into_response(),
        None => plain(StatusCode::NOT_FOUND, NO_REPORT.into()),
    }
}

const NO_REPORT: &str = "there is no readiness report of such a shadow: SIMULATE CUTOVER <shadow> makes one\n";

/// A page of ours, with a nonce for what is inline in it.
fn page(text: &str) -> Response {
    let mut nonce = String::with_capacity(32);
    for _ in 0..2 {
        // Keys from the operating system: a page cannot guess the nonce of another response.
        let _ = write!(nonce, "{:016x}", RandomState::new().hash_one(nonce.len()));
    }
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8".to_owned()),
        (header::CONTENT_SECURITY_POLICY, policy),
        (header::X_FRAME_OPTIONS, "DENY".to_owned()),
        (header::REFERRER_POLICY, "no-referrer".to_owned()),
    ];
    (headers, COMMON, text.replace("__NONCE__", &nonce)).into_response()
}

async fn metrics(State(app): State<App>) -> Response {
    let headers = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    (headers, COMMON, metrics_text(&app.operator.metrics())).into_response()
}

async fn ready(State(app): State<App>) -> Response {
    match app.operator.ready() {
        Ok(()) => plain(StatusCode::OK, "ready\n".into()),
        Err(reason) => plain(StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {reason}\n")),
    }
}

async fn state(State(app): State<App>) -> Response {
    (COMMON, Json(app.operator.state())).into_response()
}

/// What `/api/command` takes.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    command: String,
}

async fn command(
    State(app): State<App>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
    body: Result<Json<Request>, JsonRejection>,
) -> Response {
    if let Err(reason) = admitted(peer.ip(), &headers, app.address) {
        return (StatusCode::FORBIDDEN, COMMON, Json(json!({"error": reason, "kind": "forbidden"}))).into_response();
    }
    let user = app.operator.console_user();
    if let Some(user) = &user
        && !authenticated(&headers, user)
    {
        let reason = "commands need the user and the password of section [proxy.console] of proxy.toml";
        let challenge = [(header::WWW_AUTHENTICATE, CHALLENGE)];
        return (StatusCode::UNAUTHORIZED, COMMON, challenge, Json(json!({"error": reason, "kind": "unauthorized"}))).into_response();
    }
    let who = user.as_ref().map_or("dashboard", |user| &user.user);
    let result = match body {
        Ok(Json(request)) => run(&*app.operator, &request.command, who).await,
        Err(rejection) => Err(CommandError::Syntax(format!(
            "send {{\"command\": \"SHOW HELP\"}} with Content-Type: application/json ({})",
            rejection.body_text()
        ))),
    };
    match result {
        Ok(answer) => (COMMON, Json(answer_json(answer))).into_response(),
        Err(error) => {
            let status = match error {
                CommandError::Syntax(_) => StatusCode::BAD_REQUEST,
                CommandError::Unknown(_) => StatusCode::NOT_FOUND,
                CommandError::Refused(_) => StatusCode::CONFLICT,
                CommandError::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
            };
            (status, COMMON, Json(json!({"error": error.to_string(), "kind": error.kind()}))).into_response()
        }
    }
}

async fn run(operator: &dyn Operator, text: &str, who: &str) -> Result<Answer, CommandError> {
    carry_out(operator, parse(text)?, who).await
}

fn answer_json(answer: Answer) -> Value {
    json!({"columns": answer.columns, "rows": answer.rows, "tag": answer.tag, "notices": answer.notices})
}

/// May this request give commands? Else why not.
fn admitted(peer: IpAddr, headers: &HeaderMap, address: Option<IpAddr>) -> Result<(), &'static str> {
    if !is_loopback(peer) {
        return Err("commands over HTTP are accepted from this machine only: use psql with [proxy.console], or a tunnel");
    }
    if headers.get("x-understudy").is_none_or(|value| value.as_bytes() != b"1") {
        return Err("commands over HTTP need the header X-Understudy: 1");
    }
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    if !names_this_machine(host, address) {
        return Err("the Host header does not name this machine: open the dashboard by its address, such as 127.0.0.1");
    }
    Ok(())
}

/// Asks a browser for a name and a password.
const CHALLENGE: &str = "Basic realm=\"understudy\", charset=\"UTF-8\"";

/// Does the request carry this user's name and password?
fn authenticated(headers: &HeaderMap, user: &ConsoleUser) -> bool {
    let given = headers.get(header::AUTHORIZATION).map(|value| value.as_bytes()).unwrap_or_default();
    let Some((scheme, token)) = given.split_at_checked(6) else { return false };
    let expected = base64(format!("{}:{}", user.user, user.password.expose()).as_bytes());
    scheme.eq_ignore_ascii_case(b"Basic ") && equal(token.trim_ascii(), expected.as_bytes())
}

/// Compares in a time that depends on the length of `given` alone: how many bytes are right cannot be measured.
fn equal(given: &[u8], expected: &[u8]) -> bool {
    let mut difference = u8::from(given.len() != expected.len());
    for (byte, right) in given.iter().zip(expected.iter().chain(std::iter::repeat(&0))) {
        difference |= std::hint::black_box(byte ^ right);
    }
    difference == 0
}

/// Encodes with padding. Encoding what is expected, rather than decoding what was sent, leaves nothing to go wrong.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let bits = chunk.iter().zip([16, 8, 0]).fold(0, |bits, (byte, shift)| bits | (u32::from(*byte) << shift));
        for (at, shift) in [18, 12, 6, 0].into_iter().enumerate() {
            let digit = ALPHABET.get(((bits >> shift) & 63) as usize).filter(|_| at <= chunk.len());
            text.push(digit.map_or('=', |digit| char::from(*digit)));
        }
    }
    text
}

/// `localhost`, a loopback address or the address that we listen on; with or without a port.
fn names_this_machine(host: &str, address: Option<IpAddr>) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    if name.eq_ignore_ascii_case("localhost") {
        return true;
    }
    let Ok(named) = name.parse::<IpAddr>() else { return false };
    is_loopback(named) || address.is_some_and(|address| address.to_canonical() == named.to_canonical() && !address.is_unspecified())
}

/// Figures age within a second, and a browser must not guess content types.
const COMMON: [(header::HeaderName, &str); 2] = [(header::CACHE_CONTROL, "no-store"), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")];

fn plain(status: StatusCode, text: String) -> Response {
    (status, COMMON, text).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts() {
        let listen: Option<IpAddr> = Some("10.1.2.3".parse().unwrap());
        for (host, address, expected) in [
            ("localhost", None, true),
            ("LocalHost:6480", None, true),
            ("127.0.0.1:6480", None, true),
            ("127.0.0.1", None, true),
            ("[::1]:6480", None, true),
            ("[::1]", None, true),
            ("10.1.2.3:6480", listen, true),
            ("10.1.2.4:6480", listen, false),
            ("0.0.0.0:6480", Some("0.0.0.0".parse().unwrap()), false),
            ("evil.example", None, false),
            ("localhost.evil.example", None, false),
            ("127.0.0.1.evil.example:6480", None, false),
            ("", None, false),
            ("[", None, false),
            (":6480", None, false),
        ] {
            assert_eq!(names_this_machine(host, address), expected, "{host}");
        }
    }

    #[test]
    fn only_this_machine_gives_commands() {
        let headers = |host: &str, mark: Option<&str>| {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, host.parse().unwrap());
            if let Some(mark) = mark {
                headers.insert("x-understudy", mark.parse().unwrap());
            }
            headers
        };
        let local: IpAddr = "127.0.0.1".parse().unwrap();
        assert!(admitted(local, &headers("localhost:1", Some("1")), None).is_ok());
        for (peer, headers, part) in [
            ("10.0.0.1", headers("localhost", Some("1")), "this machine only"),
            ("127.0.0.1", headers("localhost", None), "X-Understudy"),
            ("127.0.0.1", headers("localhost", Some("0")), "X-Understudy"),
            ("127.0.0.1", headers("evil.example", Some("1")), "Host"),
        ] {
            assert!(admitted(peer.parse().unwrap(), &headers, None).unwrap_err().contains(part), "{part}");
        }
    }

    #[test]
    fn only_the_configured_user_is_authenticated() {
        let user = ConsoleUser { user: "operator".into(), password: crate::config::Secret::new("s3cret: ü") };
        for (given, expected) in [
            (Some(format!("Basic {}", base64("operator:s3cret: ü".as_bytes()))), true),
            (Some(format!("basic  {} ", base64("operator:s3cret: ü".as_bytes()))), true),
            (Some(format!("Basic {}", base64(b"operator:s3cret"))), false),
            (Some(format!("Basic {}", base64("operator:s3cret: ü!".as_bytes()))), false),
            (Some(format!("Basic {}", base64("Operator:s3cret: ü".as_bytes()))), false),
            (Some("Basic operator:s3cret: ".into()), false),
            (Some("Bearer x".into()), false),
            (Some("Basic".into()), false),
            (Some(String::new()), false),
            (None, false),
        ] {
            let mut headers = HeaderMap::new();
            if let Some(given) = &given {
                headers.insert(header::AUTHORIZATION, given.parse().unwrap());
            }
            assert_eq!(authenticated(&headers, &user), expected, "{given:?}");
        }
    }

    #[test]
    fn base64_as_in_rfc_4648_section_10() {
        for (plain, encoded) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg=="), ("fooba", "Zm9vYmE="), ("foobar", "Zm9vYmFy")]
        {
            assert_eq!(base64(plain.as_bytes()), encoded);
        }
    }

    #[test]
    fn the_page_asks_nobody_else() {
        assert!(DASHBOARD.contains("__NONCE__"));
        for outside in ["http://", "https://", "src=\"//", "@import", "innerHTML", "insertAdjacentHTML", "document.write", "eval("] {
            let found = DASHBOARD.replace("http://www.w3.org/2000/svg", "").contains(outside);
            assert!(!found, "{outside}");
        }
    }
}
