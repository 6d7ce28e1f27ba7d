//! What the integration tests share: real PostgreSQL servers.
#![allow(unused_imports)]

pub use understudy::demo::servers::{Options, Server, ServerError, Shutdown, find_client, find_programs, free_port};
