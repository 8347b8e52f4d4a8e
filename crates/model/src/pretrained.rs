use crate::stop_tokens::stop_token_ids;
use crate::{
    ChatTemplate, GenerationConfig, ModelConfig, ModelError, ModelFiles, RopeScaling, Tokenizer, TokenizerSettings,
    WeightSource, Weights,
};
use dibit_cache::{CacheLayout, CalibratedScheme};
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
    /// Ids that end a text or a turn, in rising order.
    pub stop_token_ids: Vec<u32>,
    /// The token that begins each window of a text that is measured or calibrated on: BOS, if the model has one.
    pub window_bos: Option<u32>,
}

impl Pretrained {
    /// Loads a model; `dtype` converts the weights.
    ///
    /// # Errors
    /// Every [`ModelError`] of configuration, weights, tokenizer and template.
    pub fn load(files: &ModelFiles, source: WeightSource, dtype: Option<DType>) -> Result<Self, ModelError> {
        let path = |name: &str| format!("{name} of {}", files.origin);
        let config = ModelConfig::parse(&files.config, &path("config.json"))?;
        let settings = files
            .tokenizer_config
            .as_deref()
            .map(|text| TokenizerSettings::parse(text, &path("tokenizer_config.json")))
            .transpose()?
            .unwrap_or_default();
        let tokenizer = match (&files.tokenizer, source) {
            (Some(bytes), _) => Tokenizer::with_settings(bytes, &settings, config.vocab_size, &path("tokenizer.json"))?,
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
            stop_token_ids: stop_token_ids(&config, &generation_config, &settings, &tokenizer),
            window_bos: config.bos_token_id.or_else(|| tokenizer.id(settings.bos_token.as_deref()?)),
            config,
            tokenizer,
            tokenizer_is_stand_in: files.tokenizer.is_none(),
            tokenizer_config: files.tokenizer_config.clone(),
            chat_template: files.chat_template.clone(),
            generation_config,
        })
    }

    /// Chooses what the model does for contexts of so many tokens: longrope has frequencies for short and for long ones. As
    /// loaded, it is for the longest ones.
    pub fn set_context(&mut self, tokens: usize) {
        self.config.set_context(tokens);
        if let RopeScaling::LongRope { is_long, .. } = self.config.rope.scaling {
            let which = if is_long { "long" } else { "short" };
            tracing::info!("rotary frequencies for {which} contexts, of {tokens} tokens");
        }
    }

    /// A scheme compiled for the model and its weights, with what its transforms need: see [`Weights::cache_layout`].
    ///
    /// # Errors
    /// As [`ModelConfig::cache_layout`].
    pub fn cache_layout(&self, scheme: &CalibratedScheme) -> Result<CacheLayout, ModelError> {
        Ok(self.weights.cache_layout(&self.config, scheme)?)
    }

    /// The chat template: `source`, or else the model's, if it has one. Special tokens are the model's either way.
    ///
    /// # Errors
    /// Those of [`ChatTemplate::parse`].
    pub fn chat_template(&self, source: Option<&str>) -> Result<Option<ChatTemplate>, ModelError> {
        let source = source.or(self.chat_template.as_deref());
        ChatTemplate::parse(self.tokenizer_config.as_deref(), source, &self.name)
    }
}
