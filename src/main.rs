//! The `understudy` program.

fn main() {}
