//! Tensors of safetensors and GGUF files.

use crate::gguf::{self, Packed, SUPPORTED_TYPES};
use crate::mixture::mixture;
use crate::{ModelError, WeightFile, impostor, unread_tensors};
use dibit_device::{Arithmetic, BlockType, Bytes, DType, Tensor};
use safetensors::SafeTensors;
use safetensors::tensor::SafeTensorError;
use std::collections::{BTreeSet, HashMap};
use std::ops::Range;

/// Bytes of the header's length, before the header.
const LENGTH_BYTES: usize = 8;

/// The name of bytes in safetensors files.
const BYTES: &str = "U8";

/// Tensors in which MXFP4 lies apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mxfp4Part {
    /// Two to a byte.
    Codes,
    /// One for each group.
    Exponents,
}

/// How the numbers of a tensor are stored.
#[derive(Debug, Clone)]
pub(crate) enum Format {
    Numbers(DType),
    Blocks(BlockType),
    /// Blocks that are widened when they are loaded.
    Packed(Packed),
    /// The name of what dibit does not read.
    Other(String),
}

impl Format {
    pub fn name(&self) -> &str {
        match self {
            Format::Numbers(dtype) => dtype.name(),
            Format::Blocks(kind) => kind.name(),
            Format::Packed(kind) => kind.name(),
            Format::Other(name) => name,
        }
    }

    /// Bytes of a matrix; `None` where it cannot be stored like this, or dibit does not know.
    fn bytes(&self, rows: usize, cols: usize) -> Option<usize> {
        match self {
            Format::Numbers(dtype) => rows.checked_mul(cols)?.checked_mul(dtype.size()),
            Format::Blocks(kind) => (cols / kind.numbers()).checked_mul(kind.bytes())?.checked_mul(rows),
            Format::Packed(kind) => kind.bytes(rows, cols),
            Format::Other(_) => None,
        }
    }
}

#[derive(Clone)]
struct Entry {
    bytes: Bytes,
    file: String,
    offset: usize,
    format: Format,
    shape: Vec<usize>,
    /// Heads whose rows lie in pairs, to be put in halves.
    pairs: Option<usize>,
}

/// All tensors of a checkpoint, by name.
pub struct Checkpoint {
    /// By the names of the file.
    entries: HashMap<String, Entry>,
    /// What a GGUF file calls its architecture.
    gguf: Option<String>,
}

impl Checkpoint {
    /// Reads the headers of these files.
    ///
    /// # Errors
    /// [`ModelError::Malformed`] for files that are no safetensors or GGUF files or are cut short,
    /// [`ModelError::Unsupported`] for GGUF files of a kind that dibit does not read.
    pub fn open(files: &[WeightFile]) -> Result<Self, ModelError> {
        let mut checkpoint = Checkpoint { entries: HashMap::new(), gguf: None };
        for file in files {
            if gguf::is_gguf(&file.bytes) {
                checkpoint.add_gguf(file)?;
            } else {
                checkpoint.add_safetensors(file)?;
            }
        }
        checkpoint.tell_widened();
        Ok(checkpoint)
    }

    /// Says what is widened, and how much memory that takes.
    fn tell_widened(&self) {
        let kinds: BTreeSet<&str> = self.widened().map(|(kind, _)| kind.name()).collect();
        if !kinds.is_empty() {
            let kinds = Vec::from_iter(kinds).join(", ");
            let bytes: usize = self.widened().map(|(kind, numbers)| numbers * kind.dtype().size()).sum();
            let megabytes = bytes.div_ceil(1_000_000);
            tracing::info!("{kinds}: no kernel multiplies these; they take {megabytes} MB widened to 16 bits");
        }
    }

    fn add_safetensors(&mut self, file: &WeightFile) -> Result<(), ModelError> {
        let (header, metadata) = SafeTensors::read_metadata(&file.bytes).map_err(|error| {
            // Only now: a header may begin as an archive does.
            let malformed = || ModelError::Malformed { path: file.name.clone(), reason: explain(&error) };
            impostor::find(&file.name, &file.bytes).unwrap_or_else(malformed)
        })?;
        for (name, info) in metadata.tensors() {
            let entry = Entry {
                bytes: file.bytes.clone(),
                file: file.name.clone(),
                offset: LENGTH_BYTES + header + info.data_offsets.0,
                format: match info.dtype {
                    safetensors::Dtype::F32 => Format::Numbers(DType::F32),
                    safetensors::Dtype::F16 => Format::Numbers(DType::F16),
                    safetensors::Dtype::BF16 => Format::Numbers(DType::Bf16),
                    other => Format::Other(format!("{other:?}")),
                },
                shape: info.shape.clone(),
                pairs: None,
            };
            self.entries.insert(name, entry);
        }
        Ok(())
    }

    fn add_gguf(&mut self, file: &WeightFile) -> Result<(), ModelError> {
        let content = gguf::read(&file.bytes, &file.name)?;
        self.gguf = Some(gguf::name(&content, &file.name)?);
        let heads = gguf::heads(&content, &file.name)?;
        for (name, info) in content.tensor_infos {
            let pairs = heads.and_then(|(query, key_value)| match name.rsplit('.').nth(1) {
                Some("attn_q") => Some(query),
                Some("attn_k") => Some(key_value),
                _ => None,
            });
            let entry = Entry {
                bytes: file.bytes.clone(),
                file: file.name.clone(),
                offset: content.tensor_data_offset.saturating_add(info.offset) as usize,
                format: info.format,
                shape: info.shape,
                pairs,
            };
            // So that a file that is cut short is known before anything is made of it.
            if let Some([rows, cols]) = entry.matrix() {
                match entry.format {
                    Format::Packed(kind) => {
                        entry.packed(kind, &name, rows, cols)?;
                    }
                    _ => drop(entry.view(&name, rows, cols)?),
                }
            }
            self.entries.insert(name, entry);
        }
        Ok(())
    }

    /// The name that the files have for what Hugging Face calls `name`.
    pub(crate) fn file_name(&self, name: &str) -> String {
        match &self.gguf {
            Some(architecture) => gguf::file_name(name, architecture),
            None => name.to_owned(),
        }
    }

    /// Whether it is a GGUF file.
    pub(crate) fn is_gguf(&self) -> bool {
        self.gguf.is_some()
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(&self.file_name(name))
    }

    /// Whether a matrix can be multiplied into the value and output projections of a layer: see
    /// [`crate::LayerWeights::takes_fused_values`].
    pub fn takes_fused_values(&self, layer: usize) -> bool {
        ["v_proj", "qkv_proj", "o_proj"].into_iter().all(|projection| {
            let name = self.file_name(&format!("model.layers.{layer}.self_attn.{projection}.weight"));
            !matches!(self.entries.get(&name), Some(Entry { format: Format::Blocks(_), .. }))
        })
    }

    /// In what a model of these matrices computes: see [`crate::Weights::arithmetic`].
    pub fn arithmetic(&self) -> Arithmetic {
        let is_f32 = |(name, entry): (&String, &Entry)| {
            let is_matrix = entry.shape.len() >= 2 && !name.ends_with("bias");
            is_matrix && !is_router(name) && matches!(entry.format, Format::Numbers(DType::F32))
        };
        if self.entries.iter().any(is_f32) { Arithmetic::Exact } else { Arithmetic::Fast }
    }

    /// How the numbers of a tensor are stored.
    pub(crate) fn format(&self, name: &str) -> Option<&str> {
        self.entries.get(&self.file_name(name)).map(|entry| entry.format.name())
    }

    /// How the numbers of matrices are stored, by their share of the bytes: `Q4_K 81 %, Q6_K 19 %`.
    pub fn formats(&self) -> String {
        let of_widened = self.widened().map(|(kind, numbers)| (kind.name(), kind.bytes(1, numbers).unwrap_or(numbers)));
        let of_others = self.entries.iter().filter_map(|(name, entry)| {
            let is_counted = matches!(entry.format, Format::Packed(_)) || entry.part_of_mxfp4(name).is_some();
            let [rows, cols] = entry.matrix().filter(|_| !is_counted && entry.shape.len() > 1)?;
            Some((entry.format.name(), entry.format.bytes(rows, cols).unwrap_or(rows.saturating_mul(cols))))
        });
        mixture(of_widened.chain(of_others))
    }

    /// Bytes that the numbers take in memory beyond those of the files: those of blocks that are widened.
    pub fn widening_bytes(&self) -> usize {
        let of_kind = |(kind, numbers): (Packed, usize)| {
            numbers * kind.dtype().size() - kind.bytes(1, numbers).unwrap_or_default()
        };
        self.widened().map(of_kind).sum()
    }

    /// Tensors of blocks that are widened, and how many numbers each holds. All lie within their files.
    fn widened(&self) -> impl Iterator<Item = (Packed, usize)> {
        self.entries.iter().filter_map(|(name, entry)| match (&entry.format, entry.part_of_mxfp4(name)) {
            (Format::Packed(kind), _) => entry.matrix().map(|[rows, cols]| (*kind, rows * cols)),
            (_, Some(Mxfp4Part::Codes)) => Some((Packed::Mxfp4, 2 * entry.shape.iter().product::<usize>())),
            _ => None,
        })
    }

    /// The tensor `name`, as Hugging Face calls it, of shape `[rows, cols]`, or `[cols]` where `rows` is 1. `None` where
    /// there is none. In GGUF files of Llama models rows of query and key projections are put back in order.
    ///
    /// # Errors
    /// [`ModelError::Shape`], [`ModelError::Malformed`] where the file lacks the numbers and, for a storage type that dibit
    /// does not read, [`ModelError::Unsupported`].
    pub fn tensor(&self, name: &str, rows: usize, cols: usize) -> Result<Option<Tensor>, ModelError> {
        let expert = gguf::expert(name).filter(|_| self.is_gguf());
        let name = self.file_name(name);
        let Some(entry) = self.entries.get(&name) else { return Ok(None) };
        if let Some((expert, _)) = expert {
            if !matches!(entry.shape[..], [experts, a, b] if expert < experts && [a, b] == [rows, cols]) {
                let expected = vec![expert + 1, rows, cols];
                return Err(ModelError::Shape { name, found: entry.shape.clone(), expected });
            }
            return entry.part(expert, rows, cols).view(&name, rows, cols).map(Some);
        }
        // Matrices of experts lie in one tensor.
        let stacked = matches!(entry.shape[..], [a, b, c] if a.checked_mul(b) == Some(rows) && c == cols);
        let matches = stacked || entry.shape == [rows, cols] || (rows == 1 && entry.shape == [cols]);
        if !matches {
            let expected = if rows == 1 { vec![cols] } else { vec![rows, cols] };
            return Err(ModelError::Shape { name, found: entry.shape.clone(), expected });
        }
        let tensor = entry.view(&name, rows, cols)?;
        Ok(Some(match entry.pairs {
            None => tensor,
            Some(heads) => in_halves(&tensor, heads).ok_or_else(|| ModelError::Malformed {
                path: entry.file.clone(),
                reason: format!("'{name}' has no even number of rows for each of {heads} heads"),
            })?,
        }))
    }

    /// The bytes of a tensor of bytes, if there is one of this name.
    ///
    /// # Errors
    /// [`ModelError::Malformed`] where there are not so many.
    pub(crate) fn bytes(&self, name: &str, len: usize) -> Result<Option<Vec<u8>>, ModelError> {
        let name = self.file_name(name);
        let Some(entry) = self.entries.get(&name) else { return Ok(None) };
        let found = entry.shape.iter().try_fold(1usize, |len, n| len.checked_mul(*n));
        let range = entry.offset.checked_add(len).map(|end| entry.offset..end);
        let bytes = range.filter(|_| found == Some(len)).and_then(|range| entry.bytes.get(range));
        match (&entry.format, bytes) {
            (Format::Other(kind), Some(bytes)) if kind == BYTES => Ok(Some(bytes.to_vec())),
            _ => Err(ModelError::Malformed {
                path: entry.file.clone(),
                reason: format!("'{name}' of {} {:?} is no {len} bytes", entry.format.name(), entry.shape),
            }),
        }
    }

    /// The names of all tensors, as the file has them.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Whether two tensors have the same bytes; false where one is missing.
    pub(crate) fn same_bytes(&self, first: &str, second: &str) -> bool {
        let bytes = |name: &str| {
            let entry = self.entries.get(&self.file_name(name))?;
            let Format::Numbers(dtype) = entry.format else { return None };
            let len = entry.shape.iter().try_fold(dtype.size(), |len, n| len.checked_mul(*n))?;
            Some((dtype, &entry.shape, entry.bytes.get(entry.offset..entry.offset.checked_add(len)?)?))
        };
        bytes(first).is_some_and(|first| Some(first) == bytes(second))
    }

    /// The error for a tensor that is missing.
    pub(crate) fn missing(&self, name: &str, architecture: &'static str) -> ModelError {
        let name = self.file_name(name);
        let explained = unread_tensors::explain_missing(self.names(), &name);
        explained.unwrap_or(ModelError::MissingTensor { name, architecture })
    }
}

impl Entry {
    /// Rows and columns. A vector is one row; the matrices of experts, which lie one behind the other, are one.
    fn matrix(&self) -> Option<[usize; 2]> {
        match self.shape[..] {
            [cols] => Some([1, cols]),
            [rows, cols] => Some([rows, cols]),
            [experts, rows, cols] => Some([experts.saturating_mul(rows), cols]),
            _ => None,
        }
    }

    /// What a tensor of bytes is of experts in MXFP4 (gpt-oss).
    fn part_of_mxfp4(&self, name: &str) -> Option<Mxfp4Part> {
        let is_bytes = matches!(&self.format, Format::Other(kind) if kind == BYTES);
        let parts = [("_blocks", Mxfp4Part::Codes), ("_scales", Mxfp4Part::Exponents)];
        let own = parts.into_iter().find(|(end, _)| is_bytes && name.contains(".experts.") && name.ends_with(end));
        own.map(|(_, part)| part)
    }

    /// Matrix number `index` of those that lie one behind the other. Where that is beyond all numbers, so is its place.
    fn part(&self, index: usize, rows: usize, cols: usize) -> Entry {
        let before = self.format.bytes(rows, cols).and_then(|bytes| bytes.checked_mul(index));
        let offset = before.and_then(|before| self.offset.checked_add(before)).unwrap_or(usize::MAX);
        Entry { offset, shape: vec![rows, cols], ..self.clone() }
    }

    /// The tensor as it lies in the file, or widened.
    fn view(&self, name: &str, rows: usize, cols: usize) -> Result<Tensor, ModelError> {
        let tensor = match &self.format {
            Format::Numbers(dtype) => Tensor::from_bytes(&self.bytes, self.offset, *dtype, rows, cols),
            Format::Blocks(kind) => Tensor::from_quantized(&self.bytes, self.offset, *kind, rows, cols),
            Format::Packed(kind) => {
                let range = self.packed(*kind, name, rows, cols)?;
                let tensor = kind.widen(&self.bytes[range.clone()], rows, cols);
                self.bytes.release(range);
                return Ok(tensor);
            }
            Format::Other(found) => {
                return Err(ModelError::Unsupported {
                    what: format!("tensor '{name}' of dtype {found}"),
                    supported: SUPPORTED_TYPES.into(),
                });
            }
        };
        tensor.map_err(|error| self.damaged(name, &error.to_string()))
    }

    /// Where packed blocks lie.
    fn packed(&self, kind: Packed, name: &str, rows: usize, cols: usize) -> Result<Range<usize>, ModelError> {
        let end = kind.bytes(rows, cols).and_then(|bytes| self.offset.checked_add(bytes));
        match end {
            Some(end) if end <= self.bytes.len() => Ok(self.offset..end),
            _ => {
                let available = self.bytes.len().saturating_sub(self.offset);
                let kind = kind.name();
                Err(self.damaged(name, &format!("{available} bytes cannot hold a {rows} x {cols} tensor of {kind}")))
            }
        }
    }

    fn damaged(&self, name: &str, reason: &str) -> ModelError {
        ModelError::Malformed {
            path: self.file.clone(),
            reason: format!("'{name}': {reason}; the file is cut short or damaged, download it again"),
        }
    }
}

/// Whether a tensor is what chooses experts: small, and in 32 bit in files whose other matrices are not.
fn is_router(name: &str) -> bool {
    ["ffn_gate_inp.", "mlp.gate.", "mlp.router.", "block_sparse_moe.gate."].into_iter().any(|part| name.contains(part))
}

/// A projection, or its bias, whose rows lie in pairs, with the rows of each head in halves. `None` where there are no
/// such rows.
fn in_halves(tensor: &Tensor, heads: usize) -> Option<Tensor> {
    let rows = if tensor.rows() == 1 { tensor.cols() } else { tensor.rows() };
    if !heads.checked_mul(2).is_some_and(|halves| rows.is_multiple_of(halves)) {
        return None;
    }
    let source = gguf::halves_from_pairs(rows, heads);
    let ordered = if tensor.rows() == 1 {
        let values = tensor.to_f32();
        let values = (0..rows).map(|row| values[source(row)]).collect();
        Tensor::from_f32(values, tensor.dtype(), 1, rows)
    } else {
        tensor.reorder_rows(source)
    };
    tensor.release();
    Some(ordered)
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
