//! What clients are told at the end of their log-in, without a server where it is known; and making a connection's settings
//! a client's.

use super::{Parameters, Pool, PoolError, Server, Settings, Taken, literal, lock};
use crate::wire::backend::ErrorFields;
use bytes::Bytes;
use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

/// Different settings remembered per pool; those that nobody has any more are forgotten then.
const SETTINGS_MAX: usize = 1_000;

/// Shared by everyone who has the same settings.
#[derive(Debug, Default)]
pub(super) struct Welcomes {
    interned: HashSet<Arc<Settings>>,
    known: HashMap<Arc<Settings>, (i64, Arc<Parameters>)>,
}

/// Of a client that may come in.
#[derive(Clone, Debug)]
pub struct Welcome {
    /// As it asked for at its start-up.
    pub settings: Arc<Settings>,
    /// As a server reports them under these settings.
    pub parameters: Arc<Parameters>,
}

impl Welcomes {
    /// The owner has changed: it may report something else.
    pub fn forget(&mut self) {
        self.known.clear();
    }
}

impl Pool {
    /// The one value for equal settings: who has the same is told by comparing two pointers.
    pub fn intern(&self, settings: Settings) -> Arc<Settings> {
        let mut welcomes = lock(&self.welcomes);
        if let Some(known) = welcomes.interned.get(&settings) {
            return known.clone();
        }
        if welcomes.interned.len() >= SETTINGS_MAX {
            welcomes.known.clear();
            welcomes.interned.retain(|settings| Arc::strong_count(settings) > 1);
        }
        let settings = Arc::new(settings);
        welcomes.interned.insert(settings.clone());
        settings
    }

    /// What a client with these settings is told. The first one with them waits for a server, which tells whether they are
    /// settings at all; the others do not.
    ///
    /// # Errors
    /// [`PoolError`]
    pub async fn welcome(self: &Arc<Self>, settings: Settings) -> Result<Welcome, PoolError> {
        let settings = self.intern(settings);
        let epoch = self.database.epoch();
        if let Some((known, parameters)) = lock(&self.welcomes).known.get(&settings)
            && *known == epoch
        {
            return Ok(Welcome { settings, parameters: parameters.clone() });
        }
        let server = match self.take(&settings) {
            Taken::Now(server) => *server,
            Taken::Queued(mut waiting) => {
                let timeout = self.database.pool.load().queue_timeout;
                match tokio::time::timeout(timeout, waiting.server()).await {
                    Ok(server) => server?,
                    Err(_) => return Err(self.timed_out()),
                }
            }
        };
        let mut server = server.here().map_err(|_| PoolError::Broken)?;
        match bring(&mut server, &settings).await {
            Ok(()) => {}
            Err(Some(body)) => {
                self.close(server);
                let ErrorFields { code, message, .. } = ErrorFields::parse(&body);
                return Err(PoolError::Setting { code, message });
            }
            Err(None) => return Err(PoolError::Broken),
        }
        let parameters = Arc::new(server.parameters.clone());
        lock(&self.welcomes).known.insert(settings.clone(), (server.epoch, parameters.clone()));
        self.put(server);
        Ok(Welcome { settings, parameters })
    }
}

/// Makes a connection's settings those of a client. Outside of a transaction.
///
/// # Errors
/// The body of the server's error; `None`: the connection is broken. Either way it is of no more use.
pub async fn bring(server: &mut Server, wanted: &Arc<Settings>) -> Result<(), Option<Bytes>> {
    let Some(has) = server.pooled.as_ref().map(|pooled| pooled.settings.clone()) else { return Ok(()) };
    let text = has.text_to(wanted);
    if !text.is_empty() {
        // the text is UTF-8, and must arrive as that
        let encoding = server.parameters.get(b"client_encoding");
        let other = wanted.needs_utf8() && encoding.is_some_and(|encoding| &encoding[..] != b"UTF8");
        if other {
            server.run("SET client_encoding = 'UTF8'").await?;
        }
        server.run(&text).await?;
        if other {
            // the text does not name it where both sides have the same
            let back = match wanted.get("client_encoding") {
                Some(encoding) => format!("SET client_encoding = {}", literal(encoding)),
                None => "RESET client_encoding".to_owned(),
            };
            server.run(&back).await?;
        }
    }
    if let Some(pooled) = &mut server.pooled {
        pooled.settings = wanted.clone();
    }
    Ok(())
}
