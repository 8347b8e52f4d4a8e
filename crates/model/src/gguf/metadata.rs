use super::header::{Content, TensorInfo};
use crate::ModelError;
use candle_core::quantized::gguf_file::Value;

/// The metadata of a file, by key and type.
pub(super) struct Metadata<'a> {
    content: &'a Content,
    name: &'a str,
}

impl<'a> Metadata<'a> {
    pub fn new(content: &'a Content, name: &'a str) -> Self {
        Metadata { content, name }
    }

    pub fn malformed(&self, reason: String) -> ModelError {
        ModelError::Malformed { path: self.name.to_owned(), reason }
    }

    /// The error for a value that must be there.
    pub fn missing(&self, key: &str) -> ModelError {
        self.malformed(format!("its metadata has no '{key}'; it is incomplete, convert the model again"))
    }

    /// A value of one type, if it is there.
    fn get<T>(&self, key: &str, kind: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>, ModelError> {
        let Some(value) = self.content.metadata.get(key) else { return Ok(None) };
        let wrong = || {
            let found = value.value_type();
            self.malformed(format!("'{key}' of its metadata is {found:?}, not {kind}; convert the model again"))
        };
        read(value).map(Some).ok_or_else(wrong)
    }

    /// A whole number, or the one that a list of equal numbers repeats for each layer.
    pub fn number(&self, key: &str) -> Result<Option<usize>, ModelError> {
        match self.content.metadata.get(key) {
            Some(Value::Array(_)) => self.same(key, &self.numbers(key)?.unwrap_or_default()).map(Some),
            _ => self.get(key, "a whole number", whole),
        }
    }

    /// A number, or the one that a list of equal numbers repeats for each layer.
    pub fn float(&self, key: &str) -> Result<Option<f64>, ModelError> {
        match self.content.metadata.get(key) {
            Some(Value::Array(_)) => {
                let floats: Option<Vec<f64>> =
                    self.get(key, "a list of numbers", |v| v.to_vec().ok()?.iter().map(float).collect())?;
                self.same(key, &floats.unwrap_or_default()).map(Some)
            }
            _ => self.get(key, "a number", float),
        }
    }

    /// A token id; -1, also as an unsigned number, is none.
    pub fn id(&self, key: &str) -> Result<Option<usize>, ModelError> {
        match self.content.metadata.get(key) {
            Some(Value::I32(-1) | Value::I64(-1) | Value::U32(u32::MAX)) => Ok(None),
            _ => self.number(key),
        }
    }

    /// The number that is said for every layer.
    fn same<T: PartialEq + Copy + std::fmt::Display>(&self, key: &str, values: &[T]) -> Result<T, ModelError> {
        const SHOWN: usize = 8;
        let Some(&first) = values.first() else {
            return Err(self.malformed(format!("'{key}' of its metadata is an empty list; convert the model again")));
        };
        if values.iter().all(|value| *value == first) {
            return Ok(first);
        }
        let shown: Vec<String> = values.iter().take(SHOWN).map(T::to_string).collect();
        let more = if values.len() > SHOWN { ", …" } else { "" };
        Err(ModelError::Unsupported {
            what: format!("'{key}' of {}, which differs from layer to layer", shown.join(", ") + more),
            supported: "models whose layers are all alike".into(),
        })
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>, ModelError> {
        self.get(key, "true or false", |value| value.to_bool().ok())
    }

    /// A list of flags, or of numbers that are 0 for false; `None` where it is no list.
    pub fn flags(&self, key: &str) -> Result<Option<Vec<bool>>, ModelError> {
        if !matches!(self.content.metadata.get(key), Some(Value::Array(_))) {
            return Ok(None);
        }
        let flag = |value: &Value| value.to_bool().ok().or_else(|| whole(value).map(|number| number != 0));
        self.get(key, "a list of true and false", |value| value.to_vec().ok()?.iter().map(flag).collect())
    }

    pub fn text(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        self.get(key, "a text", text)
    }

    pub fn texts(&self, key: &str) -> Result<Option<Vec<&'a str>>, ModelError> {
        self.get(key, "a list of texts", |value| value.to_vec().ok()?.iter().map(text).collect())
    }

    pub fn numbers(&self, key: &str) -> Result<Option<Vec<usize>>, ModelError> {
        self.get(key, "a list of whole numbers", |value| value.to_vec().ok()?.iter().map(whole).collect())
    }

    pub fn floats(&self, key: &str) -> Result<Option<Vec<f32>>, ModelError> {
        self.get(key, "a list of numbers", |value| value.to_vec().ok()?.iter().map(|v| v.to_f32().ok()).collect())
    }

    pub fn tensor(&self, name: &str) -> Option<&'a TensorInfo> {
        self.content.tensor_infos.get(name)
    }

    /// Where the bytes of a tensor begin.
    pub fn place(&self, tensor: &TensorInfo) -> usize {
        self.content.tensor_data_offset.saturating_add(tensor.offset) as usize
    }
}

fn text(value: &Value) -> Option<&str> {
    match value {
        Value::String(text) => Some(text),
        _ => None,
    }
}

fn float(value: &Value) -> Option<f64> {
    match value {
        Value::F32(value) => Some(f64::from(*value)),
        Value::F64(value) => Some(*value),
        other => whole(other).map(|value| value as f64),
    }
}

/// A whole number that is not negative.
pub(super) fn whole(value: &Value) -> Option<usize> {
    match *value {
        Value::U8(value) => Some(value.into()),
        Value::U16(value) => Some(value.into()),
        Value::U32(value) => value.try_into().ok(),
        Value::U64(value) => value.try_into().ok(),
        Value::I8(value) => value.try_into().ok(),
        Value::I16(value) => value.try_into().ok(),
        Value::I32(value) => value.try_into().ok(),
        Value::I64(value) => value.try_into().ok(),
        _ => None,
    }
}
