//! A walk over the header of a GGUF file before anything is allocated for it: sizes and counts are those of the file,
//! and what dibit does not do is said by name.

use super::{MAGIC, SUPPORTED_TYPES, config};
use crate::ModelError;

/// Entries of all lists of a header together; the largest vocabularies need a third of it.
const MOST_ENTRIES: u64 = 1 << 22;

/// Dimensions of a tensor.
const MOST_DIMENSIONS: u32 = 4;

/// Types of values.
const STRING: u32 = 8;
const ARRAY: u32 = 9;

struct Walk<'a> {
    rest: &'a [u8],
    name: &'a str,
    entries: u64,
}

/// Checks a header; `name` names the file in errors.
///
/// # Errors
/// [`ModelError::Malformed`] and [`ModelError::Unsupported`].
pub(super) fn check(bytes: &[u8], name: &str) -> Result<(), ModelError> {
    let mut walk = Walk { rest: bytes, name, entries: 0 };
    if walk.take(4)? != MAGIC {
        return Err(walk.malformed("it does not begin with 'GGUF'; it is damaged or no GGUF file".into()));
    }
    let version = walk.u32()?;
    if !matches!(version, 2 | 3) {
        let order = if matches!(version.swap_bytes(), 1..=3) { ", big-endian" } else { "" };
        return walk.unsupported(
            format!("GGUF version {}{order}", if order.is_empty() { version } else { version.swap_bytes() }),
            "versions 2 and 3, little-endian; convert the model again with a current llama.cpp",
        );
    }
    let (tensors, values) = (walk.u64()?, walk.u64()?);
    walk.count(tensors)?;
    walk.count(values)?;
    let mut architecture = None;
    for _ in 0..values {
        let key = walk.string()?;
        let kind = walk.u32()?;
        let value = walk.value(kind)?;
        match key {
            b"general.architecture" if kind == STRING => architecture = Some(value),
            b"general.alignment" => walk.alignment(value)?,
            b"split.count" => walk.one_file(value)?,
            _ => {}
        }
    }
    if let Some(architecture) = architecture {
        config::architecture(&String::from_utf8_lossy(architecture))?;
    }
    for _ in 0..tensors {
        walk.tensor()?;
    }
    Ok(())
}

impl<'a> Walk<'a> {
    fn malformed(&self, reason: String) -> ModelError {
        ModelError::Malformed { path: self.name.to_owned(), reason }
    }

    fn unsupported(&self, what: String, supported: &str) -> Result<(), ModelError> {
        Err(ModelError::Unsupported { what: format!("{}: {what}", self.name), supported: supported.to_owned() })
    }

    fn take(&mut self, len: u64) -> Result<&'a [u8], ModelError> {
        let split = usize::try_from(len).ok().and_then(|len| self.rest.split_at_checked(len));
        let (taken, rest) = split.ok_or_else(|| {
            self.malformed("it ends within its header; it is cut short or damaged, download it again".into())
        })?;
        self.rest = rest;
        Ok(taken)
    }

    fn u32(&mut self) -> Result<u32, ModelError> {
        Ok(u32::from_le_bytes(self.take(4)?.try_into().expect("4 bytes")))
    }

    fn u64(&mut self) -> Result<u64, ModelError> {
        Ok(u64::from_le_bytes(self.take(8)?.try_into().expect("8 bytes")))
    }

    fn string(&mut self) -> Result<&'a [u8], ModelError> {
        let len = self.u64()?;
        self.take(len)
    }

    /// Counts entries that the reader will hold in memory.
    fn count(&mut self, entries: u64) -> Result<(), ModelError> {
        self.entries = self.entries.saturating_add(entries);
        if self.entries > MOST_ENTRIES {
            return Err(self.malformed("its header claims more entries than any model has; it is damaged".into()));
        }
        Ok(())
    }

    /// The bytes of a value; those of a list are none.
    fn value(&mut self, kind: u32) -> Result<&'a [u8], ModelError> {
        match kind {
            0 | 1 | 7 => self.take(1),
            2 | 3 => self.take(2),
            4..=6 => self.take(4),
            10..=12 => self.take(8),
            STRING => self.string(),
            ARRAY => {
                let (kind, len) = (self.u32()?, self.u64()?);
                if kind == ARRAY {
                    return Err(self.malformed("its metadata has lists of lists; it is damaged".into()));
                }
                self.count(len)?;
                for _ in 0..len {
                    self.value(kind)?;
                }
                Ok(&[])
            }
            other => Err(self.malformed(format!("its metadata has a value of the unknown type {other}"))),
        }
    }

    fn alignment(&self, value: &[u8]) -> Result<(), ModelError> {
        let alignment = value.try_into().map(u32::from_le_bytes).unwrap_or(0);
        if !alignment.is_power_of_two() || alignment > 1 << 16 {
            return Err(self.malformed("general.alignment is not a power of two; it is damaged".into()));
        }
        Ok(())
    }

    fn one_file(&self, value: &[u8]) -> Result<(), ModelError> {
        let count = value.iter().rev().fold(0u64, |count, byte| count << 8 | u64::from(*byte));
        if count > 1 {
            return self.unsupported(
                format!("a model in {count} files"),
                "one file; join them with `llama-gguf-split --merge FIRST-FILE OUTPUT`",
            );
        }
        Ok(())
    }

    fn tensor(&mut self) -> Result<(), ModelError> {
        let tensor = String::from_utf8_lossy(self.string()?);
        let dimensions = self.u32()?;
        if dimensions > MOST_DIMENSIONS {
            return Err(self.malformed(format!("tensor '{tensor}' has {dimensions} dimensions; it is damaged")));
        }
        self.take(8 * u64::from(dimensions))?;
        let (kind, _offset) = (self.u32()?, self.u64()?);
        if !matches!(kind, 0 | 1 | 2 | 6 | 7 | 8 | 12 | 13 | 14 | 30) {
            return self.unsupported(
                format!("tensor '{tensor}' of type {}", type_name(kind)),
                &format!("{SUPPORTED_TYPES}; get the model in one of these, or make it with llama-quantize"),
            );
        }
        Ok(())
    }
}

/// The names of types that are not supported.
fn type_name(kind: u32) -> String {
    let name = match kind {
        3 => "Q4_1",
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        other => return format!("{other}"),
    };
    name.to_owned()
}
