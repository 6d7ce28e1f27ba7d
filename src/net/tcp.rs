//! What TCP is told about a connection: no waiting for more bytes, and when a silent peer counts as gone.

use crate::config::TcpConfig;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;

/// Applies the settings. What the operating system refuses is left as it is: the connection works without.
pub fn tune(socket: &TcpStream, config: &TcpConfig) {
    let _ = socket.set_nodelay(true);
    let socket = SockRef::from(socket);
    let _ = socket.set_keepalive(config.keepalive.is_some());
    if let Some(wanted) = config.keepalive {
        let mut keepalive = TcpKeepalive::new();
        if let Some(idle) = wanted.idle {
            keepalive = keepalive.with_time(idle);
        }
        if let Some(interval) = wanted.interval {
            keepalive = keepalive.with_interval(interval);
        }
        if let Some(count) = wanted.count {
            keepalive = keepalive.with_retries(count);
        }
        let _ = socket.set_tcp_keepalive(&keepalive);
    }
    let _ = socket.set_tcp_user_timeout(config.user_timeout); // `None` is the operating system's again
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Keepalive;
    use std::time::Duration;
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn the_kernel_is_told_what_is_configured() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let socket = SockRef::from(&stream);
        for config in [TcpConfig::CLIENTS, TcpConfig::SERVERS] {
            tune(&stream, &config);
            let wanted = config.keepalive.unwrap();
            assert!(socket.keepalive().unwrap() && stream.nodelay().unwrap());
            assert_eq!(Some(socket.tcp_keepalive_time().unwrap()), wanted.idle);
            assert_eq!(Some(socket.tcp_keepalive_interval().unwrap()), wanted.interval);
            assert_eq!(Some(socket.tcp_keepalive_retries().unwrap()), wanted.count);
            assert_eq!(socket.tcp_user_timeout().unwrap(), None);
        }
        let keepalive = Keepalive { idle: Some(Duration::from_secs(7)), interval: None, count: None };
        tune(&stream, &TcpConfig { keepalive: Some(keepalive), user_timeout: Some(Duration::from_millis(4_200)) });
        assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_secs(7));
        assert_eq!(socket.tcp_user_timeout().unwrap(), Some(Duration::from_millis(4_200)));
        tune(&stream, &TcpConfig { keepalive: None, user_timeout: None });
        assert_eq!((socket.keepalive().unwrap(), socket.tcp_user_timeout().unwrap()), (false, None));
    }
}
