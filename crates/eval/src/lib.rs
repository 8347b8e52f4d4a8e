//! What a cache scheme costs: in accuracy, and in time.
#![forbid(unsafe_code)]

pub mod bench;
mod choices;
mod comparison;
mod made_up;
mod perplexity;
mod random_cache;
pub mod report;
pub mod ruler;
mod sample;
pub mod study;
mod timing;

pub use choices::{Choices, LinearChoice};
pub use comparison::{Comparison, ComparisonRow, csv_field};
pub use perplexity::{Perplexity, PerplexityOptions, Progress, SchemeResult, perplexity};
pub use sample::sample;
pub use timing::attention_times;

use thiserror::Error;

/// Why an evaluation cannot run.
#[derive(Debug, Error)]
pub enum EvalError {
    /// The text does not fill a window.
    #[error("the text has {tokens} tokens and a window needs {needed}; give a longer text or a shorter --context")]
    TextTooShort {
        /// Tokens of the text.
        tokens: usize,
        /// Tokens of a window.
        needed: usize,
    },
    /// The window is too short or too long.
    #[error("a context of {context} tokens cannot be evaluated; it must be between 2 and the model's {limit}")]
    Context {
        /// Tokens asked for.
        context: usize,
        /// The model's `max_position_embeddings`.
        limit: usize,
    },
    /// The model computed something that is no number.
    #[error("the logits of scheme {scheme} are not finite; the weights are damaged, or need --dtype f32")]
    NotFinite {
        /// Name of the scheme.
        scheme: String,
    },
    /// The model failed.
    #[error(transparent)]
    Model(#[from] dibit_model::ModelError),
    /// The cache failed.
    #[error(transparent)]
    Cache(#[from] dibit_cache::CacheError),
    /// The scheme does not suit the model.
    #[error(transparent)]
    Scheme(#[from] dibit_cache::SchemeError),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] dibit_device::DeviceError),
}
