//! What comes between an error and its ReadyForQuery: PostgreSQL sends them apart.

use crate::{
    harness::wait_until,
    raw::{PATIENCE, Request, codes, tags},
    stage::Stage,
};
use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Notify,
};

const STALE: &[u8] = b"RevalidateCachedQuery";
const READY: &[u8] = b"Z\0\0\0\x05";

/// Passes everything on, but holds back what comes behind the error of a stale plan.
#[derive(Default)]
struct Halves {
    /// Else nothing is held back.
    on: AtomicBool,
    /// Bytes that understudy has sent on the connection that is held.
    requests: Mutex<Arc<AtomicUsize>>,
    held: AtomicUsize,
    go_on: Notify,
}

impl Halves {
    async fn pass(self: Arc<Self>, mut from: TcpStream, mut to: TcpStream) {
        let ((mut client, mut client_out), (mut server, mut server_out)) = (from.split(), to.split());
        let requests = Arc::new(AtomicUsize::new(0));
        let there = async {
            let mut bytes = [0; 4096];
            while let Ok(read @ 1..) = client.read(&mut bytes).await {
                requests.fetch_add(read, Ordering::SeqCst);
                if server_out.write_all(&bytes[..read]).await.is_err() {
                    break;
                }
            }
        };
        let back = async {
            let mut bytes = [0; 4096];
            while let Ok(read @ 1..) = server.read(&mut bytes).await {
                let mut rest = &bytes[..read];
                let find = |text: &[u8], what: &[u8]| text.windows(what.len()).position(|part| part == what);
                if self.on.load(Ordering::SeqCst) && find(rest, STALE).is_some() {
                    let end = find(rest, READY).unwrap_or(rest.len());
                    if client_out.write_all(&rest[..end]).await.is_err() {
                        break;
                    }
                    rest = &rest[end..];
                    *self.requests.lock().unwrap() = requests.clone();
                    self.held.fetch_add(1, Ordering::SeqCst);
                    self.go_on.notified().await;
                }
                if client_out.write_all(rest).await.is_err() {
                    break;
                }
            }
        };
        tokio::select! { () = there => {} () = back => {} }
    }
}

pub async fn apart() {
    let halves = Arc::new(Halves::default());
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    let stage = Stage::start_behind("halves", 15, "size = 1", "", |server| {
        let (listener, halves) = (TcpListener::from_std(listener).unwrap(), halves.clone());
        tokio::spawn(async move {
            while let Ok((from, _)) = listener.accept().await {
                let halves = halves.clone();
                tokio::spawn(async move {
                    let to = TcpStream::connect(("127.0.0.1", server)).await.unwrap();
                    let _ = (from.set_nodelay(true), to.set_nodelay(true));
                    halves.pass(from, to).await;
                });
            }
        });
        port
    })
    .await;
    let admin = stage.direct().await;
    admin.batch_execute("CREATE TABLE bent (a int); INSERT INTO bent VALUES (1); GRANT ALL ON bent TO PUBLIC").await.unwrap();
    let go = |name: &str| Request::new().bind("", name, &[], &[], &[]).describe(b'P', "").execute("", 0).sync();
    let mut raw = stage.raw().await;
    raw.send(&Request::new().parse("bent", "SELECT * FROM bent", &[]).parse("other", "SELECT 'other'", &[]).sync().0).await;
    raw.until_ready(1).await;
    for name in ["bent", "other"] {
        raw.send(&go(name).0).await;
        assert_eq!(tags(&raw.until_ready(1).await), "2TDCZ");
    }
    admin.batch_execute("ALTER TABLE bent ADD b int").await.unwrap();
    halves.on.store(true, Ordering::SeqCst);
    raw.send(&go("bent").0).await;
    wait_until("the error has come, its ReadyForQuery not", PATIENCE, || async { halves.held.load(Ordering::SeqCst) == 1 }).await;
    let requests = halves.requests.lock().unwrap().clone();
    let before = requests.load(Ordering::SeqCst);
    raw.send(&go("other").0).await;
    // it would reach the server within milliseconds; a slow machine hides the mistake and fails nobody
    for _ in 0..20 {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        assert_eq!(requests.load(Ordering::SeqCst), before, "nothing is sent behind what begins again");
    }
    halves.on.store(false, Ordering::SeqCst);
    halves.go_on.notify_one();
    let seen = raw.until_ready(2).await;
    assert_eq!(tags(&seen), "2TDCZ2TDCZ", "{:?}", codes(&seen));
    let rows: Vec<_> = seen.iter().filter(|message| message.tag == b'D').collect();
    let row = |at: usize| understudy::wire::backend::data_row(&rows[at].body).unwrap();
    assert_eq!((row(0).len(), row(1)[0]), (2, Some(&b"other"[..])));
}
