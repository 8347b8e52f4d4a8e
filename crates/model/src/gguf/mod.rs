//! GGUF: the files of llama.cpp. One file holds the configuration, the tokenizer, the chat template and the weights.
//!
//! What it says is put into the words of a Hugging Face checkpoint, and read on from there.

mod config;
mod families;
mod header;
mod merges;
mod metadata;
mod names;
mod pre_tokenizer;
mod rope;
mod rows;
mod tokenizer;
mod types;
mod widen;

use crate::files::{WeightFile, map};
use crate::{ModelConfig, ModelError, ModelFiles};
use dibit_device::Bytes;
use metadata::Metadata;
use std::path::Path;
use std::sync::Arc;

pub(crate) use config::{heads, name};
pub(crate) use header::read;
pub(crate) use names::{expert, file_name};
pub(crate) use rope::TENSORS as ROPE_TENSORS;
pub(crate) use rows::halves_from_pairs;
pub(crate) use types::SUPPORTED_TYPES;
pub(crate) use widen::Packed;

/// What a GGUF file begins with.
pub(crate) const MAGIC: &[u8] = b"GGUF";

/// Whether these are the bytes of a GGUF file.
pub(crate) fn is_gguf(bytes: &[u8]) -> bool {
    bytes.starts_with(MAGIC)
}

impl ModelFiles {
    /// Reads a GGUF file. Weights are mapped.
    ///
    /// # Errors
    /// [`ModelError::NotFound`] and [`ModelError::Read`] where there is no file or it cannot be read,
    /// [`ModelError::Malformed`] where it is damaged, [`ModelError::Unsupported`] for what dibit does not do.
    pub fn open_gguf(path: &Path) -> Result<Self, ModelError> {
        let name = path.display().to_string();
        if !path.exists() {
            return Err(ModelError::NotFound { path: name, reason: "the file does not exist".into() });
        }
        Self::from_gguf(Arc::new(map(path)?), &name)
    }

    /// The model in the bytes of a GGUF file; `name` names it in errors.
    ///
    /// # Errors
    /// [`ModelError::Malformed`] where they are damaged, [`ModelError::Unsupported`] for what dibit does not do.
    pub fn from_gguf(bytes: Bytes, name: &str) -> Result<Self, ModelError> {
        let content = read(&bytes, name)?;
        let metadata = Metadata::new(&content, name);
        let config = config::config(&metadata, &bytes)?.to_string();
        // Here, errors can name the metadata; what it warns of is said when the model is loaded.
        tracing::subscriber::with_default(tracing::subscriber::NoSubscriber::default(), || {
            ModelConfig::parse(&config, &format!("the metadata of {name}"))
        })?;
        Ok(ModelFiles {
            config: config.into(),
            generation_config: None,
            tokenizer: Some(tokenizer::tokenizer(&metadata)?.to_string().into_bytes().into()),
            tokenizer_config: Some(tokenizer::tokenizer_config(&metadata)?.to_string().into()),
            chat_template: None,
            weights: vec![WeightFile { name: name.to_owned(), bytes }],
            origin: name.to_owned(),
        })
    }
}
