//! GGUF: the files of llama.cpp. One file holds the configuration, the tokenizer, the chat template and the weights.
//!
//! What it says is put into the words of a Hugging Face checkpoint, and read on from there.

mod config;
mod header;
mod merges;
mod metadata;
mod names;
mod rows;
mod tokenizer;

use crate::files::{WeightFile, map};
use crate::{ModelConfig, ModelError, ModelFiles, impostor};
use candle_core::quantized::gguf_file::Content;
use dibit_device::Bytes;
use metadata::Metadata;
use std::io::Cursor;
use std::path::Path;
use std::sync::Arc;

pub(crate) use config::heads;
pub(crate) use names::file_name;
pub(crate) use rows::halves_from_pairs;

/// What a GGUF file begins with.
pub(crate) const MAGIC: &[u8] = b"GGUF";

/// Types of tensors that are read.
pub(crate) const SUPPORTED_TYPES: &str = "F32, F16, BF16, Q8_0, Q4_0, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K";

/// Whether these are the bytes of a GGUF file.
pub(crate) fn is_gguf(bytes: &[u8]) -> bool {
    bytes.starts_with(MAGIC)
}

/// Metadata and the places of tensors of a file; `name` names it in errors.
///
/// # Errors
/// [`ModelError::Malformed`], [`ModelError::Unsupported`], and [`ModelError::Impostor`] for another kind of file.
pub(crate) fn read(bytes: &[u8], name: &str) -> Result<Content, ModelError> {
    if let Some(error) = impostor::find(name, bytes).filter(|_| !is_gguf(bytes)) {
        return Err(error);
    }
    header::check(bytes, name)?;
    Content::read(&mut Cursor::new(bytes)).map_err(|error| {
        let text = error.to_string();
        let reason = format!("{}; download it again", text.lines().next().unwrap_or_default());
        ModelError::Malformed { path: name.to_owned(), reason }
    })
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
        let bytes: Bytes = Arc::new(map(path)?);
        let content = read(&bytes, &name)?;
        let metadata = Metadata::new(&content, &name);
        let config = config::config(&metadata, &bytes)?.to_string();
        // Here, errors can name the metadata.
        ModelConfig::parse(&config, &format!("the metadata of {name}"))?;
        Ok(ModelFiles {
            config: config.into(),
            generation_config: None,
            tokenizer: Some(tokenizer::tokenizer(&metadata)?.to_string().into_bytes().into()),
            tokenizer_config: Some(tokenizer::tokenizer_config(&metadata)?.to_string().into()),
            chat_template: None,
            weights: vec![WeightFile { name: name.clone(), bytes }],
            origin: name,
        })
    }
}
