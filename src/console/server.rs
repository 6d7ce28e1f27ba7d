//! The psql console: one connection to the database name `understudy`, served by pgwire.
//!
//! Deliberately absent: TLS (the front door has done it), transactions, parameters. The simple protocol gives typed
//! columns; the extended protocol gives text columns, because a driver asks for the columns before the command has run
//! (see `extended.rs`).

use super::{
    Answer, CommandError, Operator,
    auth::{Admitted, admit},
    command::{Statement, parse, split},
    dispatch::carry_out,
    extended::Extended,
};
use crate::{
    auth::Ended,
    config::ConsoleUser,
    net::{ClientTls, Peer, Stream},
    wire::backend::put_error,
};
use async_trait::async_trait;
use bytes::BytesMut;
use futures_util::{Sink, SinkExt, stream};
use pgwire::{
    api::{
        ClientInfo, ClientPortalStore, METADATA_USER, PgWireConnectionState, PgWireServerHandlers, Type,
        auth::StartupHandler,
        query::{ExtendedQueryHandler, SimpleQueryHandler, send_execution_response, send_query_response, send_ready_for_query},
        results::{DataRowEncoder, FieldFormat, FieldInfo, QueryResponse, Response, Tag},
        store::PortalStore,
    },
    error::{ErrorInfo, PgWireError, PgWireResult},
    messages::{
        PgWireBackendMessage,
        response::{EmptyQueryResponse, NoticeResponse, TransactionStatus},
        simplequery::Query,
    },
};
use serde_json::Value;
use std::{fmt::Debug, sync::Arc};
use tokio::{
    io::{self, AsyncWriteExt, copy},
    net::UnixStream,
};

/// Serves one console connection until the client leaves. `first`: what it has sent so far, from its start-up packet on;
/// requests for encryption before that have been answered. `user`: who may log in, and with which password; `None`: anybody, from
/// this machine only.
pub async fn serve(
    mut stream: Stream,
    mut first: BytesMut,
    peer: Peer,
    tls: Option<ClientTls>,
    operator: Arc<dyn Operator>,
    user: Option<ConsoleUser>,
) {
    match admit(&mut stream, &mut first, peer, tls.as_ref(), user.as_ref()).await {
        Ok(()) => {}
        Err(Ended::Gone) => return,
        Err(Ended::Denied(denial)) => {
            let mut said = BytesMut::new();
            put_error(&mut said, "FATAL", denial.code, &denial.message, denial.hint);
            let _ = stream.write_all(&said).await;
            let _ = stream.shutdown().await;
            return;
        }
    }
    let handlers = Handlers { simple: Arc::new(Simple { operator: operator.clone() }), extended: Arc::new(Extended::new(operator)) };
    // pgwire takes sockets only: ours is one end of a pair, whatever the client's stream runs over
    let (ours, theirs) = match UnixStream::pair() {
        Ok(pair) => pair,
        Err(error) => return tracing::warn!(%error, "no sockets for a console connection"),
    };
    let (mut client_reads, mut client_writes) = io::split(stream);
    let (mut reads, mut writes) = ours.into_split();
    let console = async {
        if let Err(error) = pgwire::tokio::process_socket_unix(theirs, handlers).await {
            tracing::debug!(%peer, %error, "console connection ended");
        }
    };
    let questions = async {
        if writes.write_all(&first).await.is_ok() {
            let _ = copy(&mut client_reads, &mut writes).await;
        }
        let _ = writes.shutdown().await;
    };
    let answers = async {
        let _ = copy(&mut reads, &mut client_writes).await;
        let _ = client_writes.shutdown().await;
    };
    tokio::select! {
        // whoever asks no more still gets its answers; a console that has said goodbye waits for no more questions
        ((), ()) = async { tokio::join!(console, answers) } => {}
        () = async { questions.await; std::future::pending().await } => {}
    }
}

struct Handlers {
    simple: Arc<Simple>,
    extended: Arc<Extended>,
}

impl PgWireServerHandlers for Handlers {
    fn simple_query_handler(&self) -> Arc<impl SimpleQueryHandler> {
        self.simple.clone()
    }

    fn extended_query_handler(&self) -> Arc<impl ExtendedQueryHandler> {
        self.extended.clone()
    }

    fn startup_handler(&self) -> Arc<impl StartupHandler> {
        Arc::new(Admitted)
    }
}

/// The simple query protocol. All statements of a message are parsed before the first is carried out, as PostgreSQL does.
struct Simple {
    operator: Arc<dyn Operator>,
}

#[async_trait]
impl SimpleQueryHandler for Simple {
    async fn on_query<C>(&self, client: &mut C, query: Query) -> PgWireResult<()>
    where
        C: ClientInfo + ClientPortalStore + Sink<PgWireBackendMessage> + Unpin + Send + Sync,
        C::PortalStore: PortalStore,
        C::Error: Debug,
        PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
    {
        if !matches!(client.state(), PgWireConnectionState::ReadyForQuery) {
            return Err(PgWireError::NotReadyForQuery);
        }
        let statements = statements(&query.query).map_err(to_wire)?;
        client.set_state(PgWireConnectionState::QueryInProgress);
        if statements.is_empty() {
            client.feed(PgWireBackendMessage::EmptyQueryResponse(EmptyQueryResponse::new())).await?;
        }
        let who = who(client);
        for statement in statements {
            let answer = carry_out(&*self.operator, statement, &who).await.map_err(to_wire)?;
            send_notices(client, &answer.notices).await?;
            if answer.columns.is_empty() {
                send_execution_response(client, Tag::new(&answer.tag)).await?;
            } else {
                send_query_response(client, typed_table(answer)?, true).await?;
            }
        }
        client.set_state(PgWireConnectionState::ReadyForQuery);
        send_ready_for_query(client, TransactionStatus::Idle).await
    }

    /// `on_query` does all of it; this is for pgwire's own callers, of which there are none.
    async fn do_query<C>(&self, _client: &mut C, _query: &str) -> PgWireResult<Vec<Response>>
    where
        C: ClientInfo + ClientPortalStore + Sink<PgWireBackendMessage> + Unpin + Send + Sync,
        C::PortalStore: PortalStore,
        C::Error: Debug,
        PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
    {
        Err(to_wire(CommandError::Failed("the console answers statements as they arrive: send the command again".into())))
    }
}

/// All statements of a message, empty ones left out.
fn statements(text: &str) -> Result<Vec<Statement>, CommandError> {
    split(text)?.into_iter().map(parse).filter(|statement| *statement != Ok(Statement::Empty)).collect()
}

/// The name under which the client logged in.
pub(super) fn who<C: ClientInfo>(client: &C) -> String {
    client.metadata().get(METADATA_USER).cloned().unwrap_or_else(|| "console".into())
}

/// An error with the documented SQLSTATE.
pub(super) fn to_wire(error: CommandError) -> PgWireError {
    PgWireError::UserError(Box::new(ErrorInfo::new("ERROR".into(), error.sqlstate().into(), error.to_string())))
}

/// Sends what happened and what to do next.
pub(super) async fn send_notices<C>(client: &mut C, notices: &[String]) -> PgWireResult<()>
where
    C: Sink<PgWireBackendMessage> + Unpin + Send,
    PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
{
    for notice in notices {
        let notice: NoticeResponse = ErrorInfo::new("NOTICE".into(), "00000".into(), notice.clone()).into();
        client.feed(PgWireBackendMessage::NoticeResponse(notice)).await?;
    }
    Ok(())
}

/// Rows with the type that fits all values of a column.
fn typed_table(answer: Answer) -> PgWireResult<QueryResponse> {
    let types = (0..answer.columns.len()).map(|index| column_type(answer.rows.iter().filter_map(|row| row.get(index)))).collect();
    table(answer, types)
}

/// Rows as the wire wants them. Short rows are filled with NULL; what is too long is left out.
pub(super) fn table(answer: Answer, types: Vec<Type>) -> PgWireResult<QueryResponse> {
    let fields: Arc<Vec<FieldInfo>> = Arc::new(answer.columns.iter().zip(types).map(|(name, kind)| field(name, kind)).collect());
    let mut encoder = DataRowEncoder::new(fields.clone());
    let mut rows = Vec::with_capacity(answer.rows.len());
    for row in &answer.rows {
        for index in 0..fields.len() {
            encoder.encode_field(&text(row.get(index).unwrap_or(&Value::Null)))?;
        }
        rows.push(Ok(encoder.take_row()));
    }
    let mut response = QueryResponse::new(fields, stream::iter(rows));
    response.set_command_tag(&answer.tag);
    Ok(response)
}

/// One column, in text format.
pub(super) fn field(name: &str, kind: Type) -> FieldInfo {
    let size = match kind {
        Type::BOOL => 1,
        Type::INT8 | Type::FLOAT8 => 8,
        _ => -1,
    };
    FieldInfo::new(name.to_owned(), None, None, kind, FieldFormat::Text).with_type_size(size)
}

fn column_type<'a>(values: impl Iterator<Item = &'a Value>) -> Type {
    let mut found: Option<Type> = None;
    for value in values {
        let kind = match value {
            Value::Null => continue,
            Value::Bool(_) => Type::BOOL,
            Value::Number(number) if number.is_i64() => Type::INT8,
            Value::Number(_) => Type::FLOAT8,
            _ => return Type::TEXT,
        };
        found = match found {
            None => Some(kind),
            Some(before) if before == kind => Some(kind),
            Some(Type::INT8 | Type::FLOAT8) if kind != Type::BOOL => Some(Type::FLOAT8),
            Some(_) => return Type::TEXT,
        };
    }
    found.unwrap_or(Type::TEXT)
}

/// A value in PostgreSQL's text format; JSON for what is neither scalar nor null.
pub(super) fn text(value: &Value) -> Option<String> {
    match value {
        Value::Null => None,
        Value::Bool(value) => Some(if *value { "t" } else { "f" }.into()),
        Value::String(text) => Some(text.clone()),
        other => Some(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn columns_get_the_type_that_fits_all_values() {
        for (values, expected) in [
            (json!([1, 2, null]), Type::INT8),
            (json!([1, 2.5]), Type::FLOAT8),
            (json!([u64::MAX]), Type::FLOAT8),
            (json!([true, null, false]), Type::BOOL),
            (json!([true, 1]), Type::TEXT),
            (json!([1, true]), Type::TEXT),
            (json!(["a", 1]), Type::TEXT),
            (json!([{"a": 1}]), Type::TEXT),
            (json!([null]), Type::TEXT),
            (json!([]), Type::TEXT),
        ] {
            assert_eq!(column_type(values.as_array().unwrap().iter()), expected, "{values}");
        }
    }

    #[test]
    fn nothing_runs_when_one_statement_is_wrong() {
        assert_eq!(statements("SHOW FEED;; SHOW STATS").unwrap().len(), 2);
        assert!(statements("SHUTDOWN; SHOW FED").is_err());
        assert!(statements(" ; -- nothing").unwrap().is_empty());
    }
}
