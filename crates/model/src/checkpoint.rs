//! Tensors of safetensors files.

use crate::{ModelError, WeightFile};
use dibit_device::{Bytes, DType, Tensor};
use safetensors::SafeTensors;
use safetensors::tensor::SafeTensorError;
use std::collections::HashMap;

/// Bytes of the header's length, before the header.
const LENGTH_BYTES: usize = 8;

struct Entry {
    bytes: Bytes,
    file: String,
    offset: usize,
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
}

/// All tensors of a checkpoint, by name.
pub struct Checkpoint {
    entries: HashMap<String, Entry>,
}

impl Checkpoint {
    /// Reads the headers of these files.
    ///
    /// # Errors
    /// [`ModelError::Malformed`] for files that are no safetensors files or are cut short.
    pub fn open(files: &[WeightFile]) -> Result<Self, ModelError> {
        let mut entries = HashMap::new();
        for file in files {
            let (header, metadata) = SafeTensors::read_metadata(&file.bytes)
                .map_err(|error| ModelError::Malformed { path: file.name.clone(), reason: explain(&error) })?;
            for (name, info) in metadata.tensors() {
                let entry = Entry {
                    bytes: file.bytes.clone(),
                    file: file.name.clone(),
                    offset: LENGTH_BYTES + header + info.data_offsets.0,
                    dtype: info.dtype,
                    shape: info.shape.clone(),
                };
                entries.insert(name, entry);
            }
        }
        Ok(Checkpoint { entries })
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// The tensor `name` of shape `[rows, cols]`, or `[cols]` where `rows` is 1. `None` where there is none.
    ///
    /// # Errors
    /// [`ModelError::Shape`] and, for a dtype that is not f32, f16 or bf16, [`ModelError::Unsupported`].
    pub fn tensor(&self, name: &str, rows: usize, cols: usize) -> Result<Option<Tensor>, ModelError> {
        let Some(entry) = self.entries.get(name) else { return Ok(None) };
        let matches = entry.shape == [rows, cols] || (rows == 1 && entry.shape == [cols]);
        if !matches {
            let expected = if rows == 1 { vec![cols] } else { vec![rows, cols] };
            return Err(ModelError::Shape { name: name.to_owned(), found: entry.shape.clone(), expected });
        }
        let dtype = match entry.dtype {
            safetensors::Dtype::F32 => DType::F32,
            safetensors::Dtype::F16 => DType::F16,
            safetensors::Dtype::BF16 => DType::Bf16,
            other => {
                return Err(ModelError::Unsupported {
                    what: format!("tensor '{name}' of dtype {other:?}"),
                    supported: "F32, F16, BF16".into(),
                });
            }
        };
        Tensor::from_bytes(&entry.bytes, entry.offset, dtype, rows, cols)
            .map(Some)
            .map_err(|error| ModelError::Malformed { path: entry.file.clone(), reason: format!("'{name}': {error}") })
    }
}

fn explain(error: &SafeTensorError) -> String {
    match error {
        SafeTensorError::HeaderTooSmall => "it is shorter than a safetensors header".to_owned(),
        SafeTensorError::InvalidHeaderLength | SafeTensorError::HeaderTooLarge => {
            "its header claims to be longer than the file; it is cut short or no safetensors file".to_owned()
        }
        SafeTensorError::MetadataIncompleteBuffer => {
            "the file is cut short, or longer than its header says; download it again".to_owned()
        }
        other => format!("{other}; it is damaged or no safetensors file"),
    }
}
