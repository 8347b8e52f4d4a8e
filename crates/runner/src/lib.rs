//! A model with its cache and its workspace, which runs one pass at a time.
#![forbid(unsafe_code)]

mod exact;
mod models;
mod runner;

pub use exact::ExactPass;
pub use models::Models;
pub use runner::{Capacity, Outputs, Runner};
