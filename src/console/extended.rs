//! The extended query protocol, for drivers that use it for everything. Parameters are refused. All columns are text,
//! whose binary and text formats are the same.
//!
//! A driver asks for the columns before the command runs. SHOW is therefore run for the question as well, because it
//! changes nothing; any other command answers with one column, `answer`, and runs only once, when it is executed.

use super::{
    Answer, CommandError, Operator,
    command::{Command, Statement, parse},
    dispatch::carry_out,
    server::{field, send_notices, table, text, to_wire, who},
};
use async_trait::async_trait;
use futures_util::Sink;
use pgwire::{
    api::{
        ClientInfo, ClientPortalStore, Type,
        portal::{Format, Portal},
        query::ExtendedQueryHandler,
        results::{DescribePortalResponse, DescribeResponse, DescribeStatementResponse, FieldInfo, Response, Tag},
        stmt::{QueryParser, StoredStatement},
        store::PortalStore,
    },
    error::{ErrorInfo, PgWireError, PgWireResult},
    messages::PgWireBackendMessage,
};
use std::{
    fmt::Debug,
    sync::{Arc, Mutex, PoisonError},
};

pub(super) struct Extended {
    operator: Arc<dyn Operator>,
}

impl Extended {
    pub(super) fn new(operator: Arc<dyn Operator>) -> Self {
        Extended { operator }
    }

    /// The columns that executing the statement will give; none: only a tag.
    async fn columns(&self, prepared: &Prepared, who: &str) -> PgWireResult<Vec<FieldInfo>> {
        let columns = match &prepared.statement {
            Statement::Command(Command::Show(_)) => {
                carry_out(&*self.operator, prepared.statement.clone(), who).await.map_err(to_wire)?.columns
            }
            Statement::Command(_) => vec!["answer".to_owned()],
            Statement::Empty | Statement::ClientSetting(_) => Vec::new(),
        };
        let fields = columns.iter().map(|name| field(name, Type::TEXT)).collect();
        *prepared.described.lock().unwrap_or_else(PoisonError::into_inner) = Some(columns);
        Ok(fields)
    }
}

/// A parsed statement, and the columns that the driver was told.
pub(super) struct Prepared {
    statement: Statement,
    described: Mutex<Option<Vec<String>>>,
}

pub(super) struct Parser;

#[async_trait]
impl QueryParser for Parser {
    type Statement = Arc<Prepared>;

    async fn parse_sql<C>(&self, _client: &C, sql: &str, types: &[Option<Type>]) -> PgWireResult<Option<Arc<Prepared>>>
    where
        C: ClientInfo + Unpin + Send + Sync,
    {
        if !types.is_empty() {
            return Err(no_parameters());
        }
        match parse(sql).map_err(to_wire)? {
            Statement::Empty => Ok(None),
            statement => Ok(Some(Arc::new(Prepared { statement, described: Mutex::new(None) }))),
        }
    }

    fn get_parameter_types(&self, _statement: &Arc<Prepared>) -> PgWireResult<Vec<Type>> {
        Ok(Vec::new())
    }

    fn get_result_schema(&self, _statement: &Arc<Prepared>, _format: Option<&Format>) -> PgWireResult<Vec<FieldInfo>> {
        Ok(Vec::new())
    }
}

#[async_trait]
impl ExtendedQueryHandler for Extended {
    type Statement = Arc<Prepared>;
    type QueryParser = Parser;

    fn query_parser(&self) -> Arc<Parser> {
        Arc::new(Parser)
    }

    async fn do_describe_statement<C>(
        &self,
        client: &mut C,
        target: &StoredStatement<Self::Statement>,
    ) -> PgWireResult<DescribeStatementResponse>
    where
        C: ClientInfo + ClientPortalStore + Sink<PgWireBackendMessage> + Unpin + Send + Sync,
        C::PortalStore: PortalStore<Statement = Self::Statement>,
        C::Error: Debug,
        PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
    {
        Ok(DescribeStatementResponse::new(Vec::new(), self.columns(&target.statement, &who(client)).await?))
    }

    async fn do_describe_portal<C>(&self, client: &mut C, target: &Portal<Self::Statement>) -> PgWireResult<DescribePortalResponse>
    where
        C: ClientInfo + ClientPortalStore + Sink<PgWireBackendMessage> + Unpin + Send + Sync,
        C::PortalStore: PortalStore<Statement = Self::Statement>,
        C::Error: Debug,
        PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
    {
        let columns = self.columns(&target.statement.statement, &who(client)).await?;
        Ok(if columns.is_empty() { DescribePortalResponse::no_data() } else { DescribePortalResponse::new(columns) })
    }

    async fn do_query<C>(&self, client: &mut C, portal: &Portal<Self::Statement>, _max_rows: usize) -> PgWireResult<Response>
    where
        C: ClientInfo + ClientPortalStore + Sink<PgWireBackendMessage> + Unpin + Send + Sync,
        C::PortalStore: PortalStore<Statement = Self::Statement>,
        C::Error: Debug,
        PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
    {
        if portal.parameter_len() > 0 {
            return Err(no_parameters());
        }
        let prepared = &portal.statement.statement;
        let answer = carry_out(&*self.operator, prepared.statement.clone(), &who(client)).await.map_err(to_wire)?;
        send_notices(client, &answer.notices).await?;
        let answer = match &prepared.statement {
            Statement::Command(Command::Show(_)) => answer,
            Statement::Command(_) => one_column(&answer),
            Statement::Empty | Statement::ClientSetting(_) => return Ok(Response::Execution(Tag::new(&answer.tag))),
        };
        let described = prepared.described.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if described.is_some_and(|described| described != answer.columns) {
            return Err(to_wire(CommandError::Refused("the columns of the answer have changed: prepare the command again".into())));
        }
        let types = vec![Type::TEXT; answer.columns.len()];
        Ok(Response::Query(table(answer, types)?))
    }
}

/// `column=value, column=value` per row.
fn one_column(answer: &Answer) -> Answer {
    let line = |row: &Vec<serde_json::Value>| {
        let parts = answer.columns.iter().zip(row).map(|(name, value)| format!("{name}={}", text(value).unwrap_or_else(|| "null".into())));
        vec![parts.collect::<Vec<_>>().join(", ").into()]
    };
    Answer { columns: vec!["answer".into()], rows: answer.rows.iter().map(line).collect(), tag: answer.tag.clone(), notices: Vec::new() }
}

fn no_parameters() -> PgWireError {
    PgWireError::UserError(Box::new(ErrorInfo::new(
        "ERROR".into(),
        "0A000".into(),
        "the console takes no parameters: write names and values into the command".into(),
    )))
}
