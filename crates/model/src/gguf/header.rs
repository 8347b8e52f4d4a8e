//! The header of a GGUF file: its metadata, and where its tensors lie. Sizes and counts are those of the file, whatever it
//! claims, and what dibit does not do is said by name.

use super::types::{self, SUPPORTED_TYPES};
use super::{MAGIC, config, metadata};
use crate::checkpoint::Format;
use crate::{ModelError, impostor};
use candle_core::quantized::gguf_file::Value;
use std::collections::HashMap;

/// Entries of all lists of a header together; the largest vocabularies need a third of it.
const MOST_ENTRIES: u64 = 1 << 22;

/// Dimensions of a tensor.
const MOST_DIMENSIONS: u32 = 4;

/// Where tensors begin, unless the metadata says otherwise: at multiples of so many bytes.
const ALIGNMENT: usize = 32;

/// The type of lists.
const ARRAY: u32 = 9;

/// What a header says.
pub(crate) struct Content {
    /// Values by key.
    pub metadata: HashMap<String, Value>,
    /// Tensors by name.
    pub tensor_infos: HashMap<String, TensorInfo>,
    /// Where the bytes of tensors begin.
    pub tensor_data_offset: u64,
}

/// Where a tensor lies.
pub(crate) struct TensorInfo {
    /// How its numbers are stored.
    pub format: Format,
    /// Its dimensions, that of neighbours last.
    pub shape: Vec<usize>,
    /// Its first byte behind [`Content::tensor_data_offset`].
    pub offset: u64,
}

struct Walk<'a> {
    rest: &'a [u8],
    name: &'a str,
    entries: u64,
}

/// Reads a header; `name` names the file in errors.
///
/// # Errors
/// [`ModelError::Malformed`], [`ModelError::Unsupported`], and [`ModelError::Impostor`] for another kind of file.
pub(crate) fn read(bytes: &[u8], name: &str) -> Result<Content, ModelError> {
    if let Some(error) = impostor::find(name, bytes).filter(|_| !bytes.starts_with(MAGIC)) {
        return Err(error);
    }
    let mut walk = Walk { rest: bytes, name, entries: 0 };
    if walk.take(4)? != MAGIC {
        return Err(walk.malformed("it does not begin with 'GGUF'; it is damaged or no GGUF file".into()));
    }
    let version = walk.u32()?;
    if !matches!(version, 2 | 3) {
        let order = if matches!(version.swap_bytes(), 1..=3) { ", big-endian" } else { "" };
        return Err(walk.unsupported(
            format!("GGUF version {}{order}", if order.is_empty() { version } else { version.swap_bytes() }),
            "versions 2 and 3, little-endian; convert the model again with a current llama.cpp",
        ));
    }
    let (tensors, values) = (walk.u64()?, walk.u64()?);
    walk.count(tensors)?;
    walk.count(values)?;
    let mut metadata = HashMap::new();
    for _ in 0..values {
        let key = walk.text()?;
        let kind = walk.u32()?;
        let value = walk.value(kind)?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(walk.malformed(format!("its metadata has '{key}' twice; it is damaged")));
        }
    }
    let alignment = walk.alignment(metadata.get("general.alignment"))?;
    walk.one_file(metadata.get("split.count"))?;
    if let Some(Value::String(architecture)) = metadata.get("general.architecture") {
        config::architecture(architecture, 0)?;
    }
    let mut tensor_infos = HashMap::new();
    for _ in 0..tensors {
        let tensor = walk.text()?;
        let info = walk.tensor(&tensor)?;
        if tensor_infos.insert(tensor.clone(), info).is_some() {
            return Err(walk.malformed(format!("it has a tensor '{tensor}' twice; it is damaged")));
        }
    }
    let end = bytes.len() - walk.rest.len();
    Ok(Content { metadata, tensor_infos, tensor_data_offset: end.next_multiple_of(alignment) as u64 })
}

impl<'a> Walk<'a> {
    fn malformed(&self, reason: String) -> ModelError {
        ModelError::Malformed { path: self.name.to_owned(), reason }
    }

    fn unsupported(&self, what: String, supported: &str) -> ModelError {
        ModelError::Unsupported { what: format!("{}: {what}", self.name), supported: supported.to_owned() }
    }

    fn take(&mut self, len: u64) -> Result<&'a [u8], ModelError> {
        let split = usize::try_from(len).ok().and_then(|len| self.rest.split_at_checked(len));
        let (taken, rest) = split.ok_or_else(|| {
            self.malformed("it ends within its header; it is cut short or damaged, download it again".into())
        })?;
        self.rest = rest;
        Ok(taken)
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], ModelError> {
        Ok(self.take(N as u64)?.try_into().expect("as many as were taken"))
    }

    fn u32(&mut self) -> Result<u32, ModelError> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> Result<u64, ModelError> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    /// A text. Some files have bytes in it that are no UTF-8, or zeros at its end.
    fn text(&mut self) -> Result<String, ModelError> {
        let len = self.u64()?;
        let text = String::from_utf8_lossy(self.take(len)?);
        let trimmed = text.trim_end_matches('\0');
        Ok(if trimmed.is_empty() { text.into_owned() } else { trimmed.to_owned() })
    }

    /// Counts entries that are held in memory.
    fn count(&mut self, entries: u64) -> Result<(), ModelError> {
        self.entries = self.entries.saturating_add(entries);
        if self.entries > MOST_ENTRIES {
            return Err(self.malformed("its header claims more entries than any model has; it is damaged".into()));
        }
        Ok(())
    }

    fn value(&mut self, kind: u32) -> Result<Value, ModelError> {
        Ok(match kind {
            0 => Value::U8(u8::from_le_bytes(self.bytes()?)),
            1 => Value::I8(i8::from_le_bytes(self.bytes()?)),
            2 => Value::U16(u16::from_le_bytes(self.bytes()?)),
            3 => Value::I16(i16::from_le_bytes(self.bytes()?)),
            4 => Value::U32(self.u32()?),
            5 => Value::I32(i32::from_le_bytes(self.bytes()?)),
            6 => Value::F32(f32::from_le_bytes(self.bytes()?)),
            7 => match self.bytes()? {
                [flag @ (0 | 1)] => Value::Bool(flag == 1),
                [other] => return Err(self.malformed(format!("its metadata has a flag of {other}; it is damaged"))),
            },
            8 => Value::String(self.text()?),
            ARRAY => {
                let (kind, len) = (self.u32()?, self.u64()?);
                if kind == ARRAY {
                    return Err(self.malformed("its metadata has lists of lists; it is damaged".into()));
                }
                self.count(len)?;
                Value::Array((0..len).map(|_| self.value(kind)).collect::<Result<_, _>>()?)
            }
            10 => Value::U64(self.u64()?),
            11 => Value::I64(i64::from_le_bytes(self.bytes()?)),
            12 => Value::F64(f64::from_le_bytes(self.bytes()?)),
            other => return Err(self.malformed(format!("its metadata has a value of the unknown type {other}"))),
        })
    }

    fn alignment(&self, value: Option<&Value>) -> Result<usize, ModelError> {
        let Some(value) = value else { return Ok(ALIGNMENT) };
        let alignment = metadata::whole(value).filter(|value| value.is_power_of_two() && *value <= 1 << 16);
        alignment.ok_or_else(|| self.malformed("general.alignment is not a power of two; it is damaged".into()))
    }

    fn one_file(&self, value: Option<&Value>) -> Result<(), ModelError> {
        match value.and_then(metadata::whole) {
            Some(count) if count > 1 => Err(self.unsupported(
                format!("a model in {count} files"),
                "one file; join them with `llama-gguf-split --merge FIRST-FILE OUTPUT`",
            )),
            _ => Ok(()),
        }
    }

    fn tensor(&mut self, name: &str) -> Result<TensorInfo, ModelError> {
        let dimensions = self.u32()?;
        if dimensions > MOST_DIMENSIONS {
            return Err(self.malformed(format!("tensor '{name}' has {dimensions} dimensions; it is damaged")));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let size = usize::try_from(self.u64()?);
            shape.push(size.map_err(|_| self.malformed(format!("tensor '{name}' is larger than any; it is damaged")))?);
        }
        shape.reverse();
        let (kind, offset) = (self.u32()?, self.u64()?);
        let format = types::format(kind).ok_or_else(|| {
            self.unsupported(
                format!("tensor '{name}' of type {}", types::name(kind)),
                &format!("{SUPPORTED_TYPES}; get the model in one of these, or make it with llama-quantize"),
            )
        })?;
        Ok(TensorInfo { format, shape, offset })
    }
}
