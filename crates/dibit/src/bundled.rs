//! The model that is part of the program.

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
