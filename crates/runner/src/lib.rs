//! A model with its cache and its workspace, which runs one pass at a time.
#![forbid(unsafe_code)]

mod exact;
mod executor;
mod models;
mod prefill;
mod runner;

pub use exact::ExactPass;
pub use executor::Executor;
pub use models::Models;
pub use prefill::{CellError, Prefill};
pub use runner::{Capacity, Runner, replaying};
