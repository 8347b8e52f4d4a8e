//! What is asked of an engine, and what comes back.

use crate::{EngineError, Sampling};
use dibit_cache::Usage;
use std::time::Duration;

/// A request of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub(crate) u64);

/// An open sequence of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub(crate) u64);

/// What has happened to a request.
#[derive(Debug)]
pub enum Event {
    /// The request was admitted, a part of its prompt was read, or a token was generated.
    Text {
        /// The request.
        request: RequestId,
        /// Text that is certain now; may be empty.
        text: String,
    },
    /// The answer has ended.
    Done {
        /// The request.
        request: RequestId,
        /// The whole answer.
        completion: Completion,
    },
    /// The request has failed; its sequence is given back, or empty where it is an open one.
    Failed {
        /// The request.
        request: RequestId,
        /// Why.
        error: EngineError,
    },
}

impl Event {
    /// Whose it is.
    pub fn request(&self) -> RequestId {
        match self {
            Event::Text { request, .. } | Event::Done { request, .. } | Event::Failed { request, .. } => *request,
        }
    }
}

/// A prompt to be continued.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Token ids of the prompt.
    pub prompt: Vec<u32>,
    /// Token ids that the sequence already holds; only penalties look at them.
    pub history: Vec<u32>,
    /// Tokens to generate at most.
    pub max_tokens: usize,
    /// How they are chosen.
    pub sampling: Sampling,
    /// Which stream of the seed its random numbers are: requests of one seed differ by it.
    pub stream: u64,
    /// Strings that end the text, and are no part of it. One that is a special token of the vocabulary is that token.
    pub stop: Vec<String>,
    /// How many of the most likely tokens to tell beside each generated one, with their log-probabilities; `None` for no
    /// log-probabilities.
    pub logprobs: Option<usize>,
}

/// A generated token with its log-probability: the log-softmax of the model's logits, before bias, penalties and temperature.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub id: u32,
    /// Its log-probability.
    pub logprob: f32,
    /// The most likely tokens with theirs, in falling order; of equal ones, the lower id first.
    pub top: Vec<(u32, f32)>,
}

/// Why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A token that ends texts, or a stop string.
    Stop,
    /// As many tokens as were asked for.
    Length,
    /// The context is full.
    Context,
    /// The caller ended it.
    Cancelled,
}

impl FinishReason {
    /// The word for it in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Context => "context",
            FinishReason::Cancelled => "cancelled",
        }
    }
}

/// How long the parts of a request took. In a batch, a decoding step counts for each sequence in it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Timings {
    /// Reading the prompt.
    pub prefill: Duration,
    /// All tokens after the first.
    pub decode: Duration,
}

/// A continued prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// The generated text, without stop strings and special tokens.
    pub text: String,
    /// The generated ids, the one that ended the text included.
    pub tokens: Vec<u32>,
    /// One for each id, where log-probabilities were asked for.
    pub logprobs: Vec<TokenLogprob>,
    /// Why the text ended.
    pub finish: FinishReason,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// How long it took.
    pub timings: Timings,
    /// What the sequence took in the cache at the end.
    pub usage: Usage,
}

impl Completion {
    /// Prompt tokens per second.
    pub fn prefill_rate(&self) -> f64 {
        rate(self.prompt_tokens, self.timings.prefill)
    }

    /// Generated tokens per second, the first one excepted: the prefill pass yields it.
    pub fn decode_rate(&self) -> f64 {
        rate(self.tokens.len().saturating_sub(1), self.timings.decode)
    }
}

fn rate(tokens: usize, time: Duration) -> f64 {
    if tokens == 0 { 0.0 } else { tokens as f64 / time.as_secs_f64().max(1e-9) }
}
