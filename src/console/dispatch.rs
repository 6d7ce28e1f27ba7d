//! From statements to answers: what the console answers by itself, what the operator carries out, and what an error
//! means outside of the process (SQLSTATE, word for JSON, exit status).

use super::{
    Answer, CommandError, Operator,
    command::{Command, Statement, Topic, help},
};

/// Carries out one statement.
pub(super) async fn carry_out(operator: &dyn Operator, statement: Statement, who: &str) -> Result<Answer, CommandError> {
    match statement {
        Statement::Empty => Ok(Answer::default()),
        Statement::ClientSetting(_) => Ok(Answer { tag: "SET".into(), ..Answer::default() }),
        Statement::Command(Command::Show(Topic::Help)) => Ok(help()),
        Statement::Command(command) => operator.execute(command, who).await,
    }
}

impl CommandError {
    /// What psql and drivers see.
    pub fn sqlstate(&self) -> &'static str {
        match self {
            CommandError::Syntax(_) => "42601",
            CommandError::Unknown(_) => "42704",
            CommandError::Refused(_) => "55000",
            CommandError::Failed(_) => "58000",
        }
    }

    /// What scripts see in JSON.
    pub fn kind(&self) -> &'static str {
        match self {
            CommandError::Syntax(_) => "syntax",
            CommandError::Unknown(_) => "unknown",
            CommandError::Refused(_) => "refused",
            CommandError::Failed(_) => "failed",
        }
    }

    /// Exit status of `understudy ctl`.
    pub fn exit_code(&self) -> i32 {
        exit_code_of(self.sqlstate())
    }
}

/// Exit status of `understudy ctl` for an error with this SQLSTATE.
pub(super) fn exit_code_of(sqlstate: &str) -> i32 {
    match sqlstate {
        "42601" | "42704" => 2,
        "55000" => 1,
        _ => 3,
    }
}
