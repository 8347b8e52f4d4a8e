use thiserror::Error;

/// Why a request cannot be served.
#[derive(Debug, Error)]
pub enum EngineError {
    /// The engine was planned for nothing.
    #[error("an engine needs room for at least one sequence of one token")]
    NoRoom,
    /// There is nothing to continue.
    #[error("the prompt is empty; give at least one token")]
    EmptyPrompt,
    /// The prompt does not fit.
    #[error(
        "the prompt has {prompt} tokens and the context is {context}; shorten the prompt or plan a longer context (--context)"
    )]
    PromptTooLong {
        /// Tokens of the prompt, those already cached included.
        prompt: usize,
        /// Planned context in tokens.
        context: usize,
    },
    /// The prompt does not fit any context of the model.
    #[error(
        "the prompt has {prompt} tokens and the model supports {limit} (max_position_embeddings); shorten the prompt"
    )]
    PromptBeyondModel {
        /// Tokens of the prompt, those already cached included.
        prompt: usize,
        /// The model's limit.
        limit: usize,
    },
    /// A conversation does not fit.
    #[error("the conversation has {prompt} tokens, and the context is {context}{advice}")]
    ConversationTooLong {
        /// Tokens of the conversation with the new message.
        prompt: usize,
        /// Planned context in tokens.
        context: usize,
        /// What can be done.
        advice: &'static str,
    },
    /// The context exceeds what the model was made for.
    #[error("a context of {context} tokens exceeds the {limit} that the model supports (max_position_embeddings)")]
    ContextTooLong {
        /// Context asked for.
        context: usize,
        /// The model's limit.
        limit: usize,
    },
    /// A sampling parameter is out of range.
    #[error("{name} is {value}; it must be {range}")]
    Sampling {
        /// Name of the parameter.
        name: &'static str,
        /// Its value.
        value: f32,
        /// What it may be.
        range: &'static str,
    },
    /// A bias is for no token, or out of range.
    #[error("the bias of token {id} is {bias}; ids go up to {}, biases from -100 to 100", vocab_size - 1)]
    Bias {
        /// The token.
        id: u32,
        /// Its bias.
        bias: f32,
        /// Size of the vocabulary.
        vocab_size: usize,
    },
    /// The model computed something that is no number.
    #[error("the logits after {position} tokens are not finite; the weights are damaged, or need --dtype f32")]
    NotFinite {
        /// Tokens before the logits.
        position: usize,
    },
    /// Cells are no whole pages.
    #[error(transparent)]
    Cell(#[from] dibit_runner::CellError),
    /// A request is not there any more.
    #[error("the request is answered or cancelled already")]
    Answered,
    /// A sequence was closed.
    #[error("the sequence is not open; open one for each conversation")]
    Closed,
    /// A sequence has a request that is not answered yet.
    #[error("the sequence is busy with another request; wait for its answer, or cancel it")]
    Busy,
    /// The model has no chat template.
    #[error(
        "{0} has no chat template; give one with --chat-template, or leave --chat out (`dibit generate` continues plain text)"
    )]
    NoChatTemplate(String),
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
