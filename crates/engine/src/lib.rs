//! Requests: planning memory, batching sequences, sampling tokens and holding conversations.
#![forbid(unsafe_code)]

mod chat;
mod engine;
mod error;
mod logprobs;
mod penalties;
mod plan;
mod request;
mod sampler;
mod sampling;
mod stop;

pub use chat::{Chat, ChatOptions};
pub use engine::Engine;
pub use error::EngineError;
pub use plan::{MemoryPlan, Options};
pub use request::{Completion, FinishReason, Request, Timings, TokenLogprob};
pub use sampler::Sampler;
pub use sampling::{Dry, Sampling};
pub use stop::StopFilter;
