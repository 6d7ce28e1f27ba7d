//! The [`Operator`] of the console: each command to its function.

use super::Controller;
use crate::{
    config::ConsoleUser,
    console::{Answer, CommandError, Metric, Operator, Report, command::Command, state::State},
};
use async_trait::async_trait;
use std::sync::Arc;

/// What the console holds.
pub struct Handle(pub Arc<Controller>);

#[async_trait]
impl Operator for Handle {
    async fn execute(&self, command: Command, who: &str) -> Result<Answer, CommandError> {
        let (controller, who) = (self.0.clone(), who.to_owned());
        // A console that goes away must not leave a cutover half done: the work belongs to the process, not to the asker.
        let work = tokio::spawn(async move { controller.execute(command, &who).await });
        work.await.unwrap_or_else(|error| Err(CommandError::Failed(format!("the command broke inside understudy: {error}; see its log"))))
    }

    fn state(&self) -> State {
        self.0.state()
    }

    fn metrics(&self) -> Vec<Metric> {
        self.0.metrics()
    }

    fn ready(&self) -> Result<(), String> {
        if self.0.door.is_closing() {
            return Err("shutting down".into());
        }
        Ok(())
    }

    fn report(&self, shadow: &str) -> Option<Report> {
        self.0.report(shadow)
    }

    fn console_user(&self) -> Option<ConsoleUser> {
        self.0.config.load().proxy.console.clone()
    }
}
