use crate::{ChatTemplate, GenerationConfig, ModelConfig, ModelError, ModelFiles, Tokenizer, WeightSource, Weights};
use dibit_device::DType;
use std::borrow::Cow;

/// A model with everything that belongs to it, loaded and checked.
pub struct Pretrained {
    /// Directory, hub id or name.
    pub name: String,
    /// `config.json`.
    pub config: ModelConfig,
    /// The weights on the host.
    pub weights: Weights,
    /// The tokenizer; for made-up weights without one, a stand-in that takes bytes.
    pub tokenizer: Tokenizer,
    /// Whether the tokenizer is the stand-in.
    pub tokenizer_is_stand_in: bool,
    /// `tokenizer_config.json`, if there is one.
    tokenizer_config: Option<Cow<'static, str>>,
    /// `chat_template.jinja`, if there is one.
    chat_template: Option<Cow<'static, str>>,
    /// Sampling defaults.
    pub generation_config: GenerationConfig,
}

impl Pretrained {
    /// Loads a model; `dtype` converts the weights.
    ///
    /// # Errors
    /// Every [`ModelError`] of configuration, weights, tokenizer and template.
    pub fn load(files: &ModelFiles, source: WeightSource, dtype: Option<DType>) -> Result<Self, ModelError> {
        let path = |name: &str| format!("{name} of {}", files.origin);
        let config = ModelConfig::parse(&files.config, &path("config.json"))?;
        let tokenizer = match (&files.tokenizer, source) {
            (Some(bytes), _) => Tokenizer::parse(bytes, config.vocab_size, &path("tokenizer.json"))?,
            (None, WeightSource::Dummy { .. }) => Tokenizer::bytes(config.vocab_size),
            (None, WeightSource::Checkpoint) => {
                return Err(ModelError::NotFound {
                    path: files.origin.clone(),
                    reason: "there is no tokenizer.json; save the model's fast tokenizer beside its weights".into(),
                });
            }
        };
        let generation_config = files
            .generation_config
            .as_deref()
            .map(|text| GenerationConfig::parse(text, &path("generation_config.json")))
            .unwrap_or_default();
        Ok(Pretrained {
            name: files.origin.clone(),
            weights: Weights::load(files, &config, source, dtype)?,
            config,
            tokenizer,
            tokenizer_is_stand_in: files.tokenizer.is_none(),
            tokenizer_config: files.tokenizer_config.clone(),
            chat_template: files.chat_template.clone(),
            generation_config,
        })
    }

    /// The chat template, if the model has one.
    ///
    /// # Errors
    /// Those of [`ChatTemplate::parse`].
    pub fn chat_template(&self) -> Result<Option<ChatTemplate>, ModelError> {
        ChatTemplate::parse(self.tokenizer_config.as_deref(), self.chat_template.as_deref(), &self.name)
    }

    /// Tokens that end a text: those of `generation_config.json`, or else of `config.json`.
    pub fn eos_token_ids(&self) -> &[u32] {
        let own = &self.generation_config.eos_token_ids;
        if own.is_empty() { &self.config.eos_token_ids } else { own }
    }
}
