//! The model and the text that are part of the program.

use crate::text::{self, Document};
use anyhow::Result;
use dibit_device::Bytes;
use dibit_model::{ModelFiles, WeightFile};
use std::borrow::Cow;
use std::sync::Arc;

/// Aligned so that the weights can be used where they lie.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

static WEIGHTS: &Aligned<[u8]> = &Aligned(*include_bytes!("../../../models/tiny/model.safetensors"));

/// Its name in summaries.
pub const NAME: &str = "tiny (bundled)";

/// Its calibrations, by the names of their files.
pub const CALIBRATIONS: [(&str, &[u8]); 2] = [
    ("the bundled dibit.safetensors", include_bytes!("../../../models/tiny/calibration/dibit.safetensors")),
    ("the bundled kvlinc.safetensors", include_bytes!("../../../models/tiny/calibration/kvlinc.safetensors")),
];

/// The text that models are calibrated on where the user gives none; its README.md has its sources and licences.
pub fn calibration_text() -> Result<Vec<Document>> {
    text::entries(include_str!("../text/calibration.jsonl"), "the bundled text")
}

/// The bundled model's files.
pub fn files() -> ModelFiles {
    let weights: &'static [u8] = &WEIGHTS.0;
    let bytes: Bytes = Arc::new(weights);
    ModelFiles {
        origin: NAME.to_owned(),
        config: Cow::Borrowed(include_str!("../../../models/tiny/config.json")),
        generation_config: Some(Cow::Borrowed(include_str!("../../../models/tiny/generation_config.json"))),
        tokenizer: Some(Cow::Borrowed(include_bytes!("../../../models/tiny/tokenizer.json"))),
        tokenizer_config: Some(Cow::Borrowed(include_str!("../../../models/tiny/tokenizer_config.json"))),
        chat_template: None,
        weights: vec![WeightFile { name: "the bundled weights".to_owned(), bytes }],
    }
}
