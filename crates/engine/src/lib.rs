//! Requests: planning memory, batching sequences, sampling tokens and holding conversations.
#![forbid(unsafe_code)]

mod chat;
mod engine;
mod error;
mod plan;
mod request;
mod sampler;
mod stop;

pub use chat::Chat;
pub use engine::Engine;
pub use error::EngineError;
pub use plan::{MemoryPlan, Options};
pub use request::{Completion, FinishReason, Request, Timings};
pub use sampler::{Sampler, Sampling};
pub use stop::StopFilter;
