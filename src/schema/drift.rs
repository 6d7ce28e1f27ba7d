//! x
#[derive(Debug)]
/// x
pub struct DriftRow;
