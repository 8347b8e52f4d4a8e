//! Requests: planning memory, batching sequences, sampling tokens and holding conversations.
#![forbid(unsafe_code)]

mod active;
mod chat;
mod drive;
mod engine;
mod error;
mod logprobs;
mod output;
mod penalties;
mod plan;
mod request;
mod sampler;
mod sampling;
mod scheduler;
mod stop;

pub use chat::{Chat, ChatOptions};
pub use dibit_runner::Prefill;
pub use engine::Engine;
pub use error::EngineError;
pub use plan::{MemoryPlan, Options};
pub use request::{Completion, Event, FinishReason, Request, RequestId, SequenceId, Timings, TokenLogprob};
pub use sampler::Sampler;
pub use sampling::{Dry, Sampling};
pub use stop::StopFilter;
