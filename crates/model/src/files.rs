//! The files of a model: of a directory, of a GGUF file, or part of the program.

use crate::{ModelError, gguf, impostor};
use dibit_device::Bytes;
use memmap2::Mmap;
use serde_json::Value;
use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What marks the directory of a LoRA adapter.
const ADAPTER_CONFIG: &str = "adapter_config.json";

/// Names of a model's files; only the configuration must be there.
pub(crate) const GENERATION_CONFIG: &str = "generation_config.json";
pub(crate) const TOKENIZER: &str = "tokenizer.json";
pub(crate) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
pub(crate) const CHAT_TEMPLATE: &str = "chat_template.jinja";
pub(crate) const CONFIG: &str = "config.json";
pub(crate) const SINGLE_WEIGHTS: &str = "model.safetensors";
pub(crate) const WEIGHTS_INDEX: &str = "model.safetensors.index.json";

/// One safetensors or GGUF file.
#[derive(Clone)]
pub struct WeightFile {
    /// Its name, for errors.
    pub name: String,
    /// Its bytes.
    pub bytes: Bytes,
}

/// What a model consists of. Texts are as they lie on disk, or say what the metadata of a GGUF file does.
#[derive(Clone)]
pub struct ModelFiles {
    /// Directory, hub id or name, for errors and summaries.
    pub origin: String,
    /// `config.json`.
    pub config: Cow<'static, str>,
    /// `generation_config.json`.
    pub generation_config: Option<Cow<'static, str>>,
    /// `tokenizer.json`.
    pub tokenizer: Option<Cow<'static, [u8]>>,
    /// `tokenizer_config.json`.
    pub tokenizer_config: Option<Cow<'static, str>>,
    /// `chat_template.jinja`.
    pub chat_template: Option<Cow<'static, str>>,
    /// The weights; none where they are to be made up.
    pub weights: Vec<WeightFile>,
}

impl ModelFiles {
    /// Whether there is a GGUF file at `path`: a file, not a directory, of that ending or with those first bytes.
    pub fn is_gguf(path: &Path) -> bool {
        let by_name = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
        let by_bytes = || {
            let mut start = [0; gguf::MAGIC.len()];
            File::open(path).and_then(|mut file| file.read_exact(&mut start)).is_ok() && gguf::is_gguf(&start)
        };
        path.is_file() && (by_name || by_bytes())
    }

    /// Reads a directory as `save_pretrained` writes it. Weights are mapped.
    ///
    /// # Errors
    /// [`ModelError::NotFound`] where the directory, `config.json` or the weights are missing,
    /// [`ModelError::Read`] where a file cannot be read, [`ModelError::Malformed`] for a broken index,
    /// [`ModelError::Impostor`] where something else lies in place of a file.
    pub fn open(directory: &Path) -> Result<Self, ModelError> {
        let mut files = Self::without_weights(directory)?;
        for path in weight_paths(directory)? {
            let bytes: Bytes = Arc::new(map(&path)?);
            files.weights.push(WeightFile { name: path.display().to_string(), bytes });
        }
        Ok(files)
    }

    /// Reads a directory, or a `config.json` with what lies beside it, without weights: they are made up.
    ///
    /// # Errors
    /// As [`ModelFiles::open`], weights excepted.
    pub fn without_weights(path: &Path) -> Result<Self, ModelError> {
        let (directory, config) = if path.is_file() {
            (path.parent().unwrap_or(Path::new(".")), path.to_owned())
        } else {
            (path, path.join(CONFIG))
        };
        let origin = path.display().to_string();
        let not_found = |reason: &str| ModelError::NotFound { path: origin.clone(), reason: reason.to_owned() };
        if !directory.as_os_str().is_empty() && !exists(directory)? {
            return Err(not_found("the directory does not exist"));
        }
        if !exists(&config)? {
            if exists(&directory.join(ADAPTER_CONFIG))? {
                return Err(not_found(
                    "it is a LoRA adapter and no model; merge it into its base model first (peft's merge_and_unload, then \
                     save_pretrained)",
                ));
            }
            let reason = "there is no config.json; give the directory of a Hugging Face checkpoint".to_owned();
            return Err(not_found(&only_gguf(directory).unwrap_or(reason)));
        }
        let text = |name: &str| optional(&directory.join(name));
        Ok(ModelFiles {
            config: utf8(&config, read(&config)?)?.into(),
            generation_config: generation_config(directory)?,
            tokenizer: match directory.join(TOKENIZER) {
                path if exists(&path)? => Some(read(&path)?.into()),
                _ => None,
            },
            tokenizer_config: text(TOKENIZER_CONFIG)?,
            chat_template: text(CHAT_TEMPLATE)?,
            weights: Vec::new(),
            origin,
        })
    }
}

fn read_error(path: &Path) -> impl FnOnce(std::io::Error) -> ModelError + '_ {
    |source| ModelError::Read { path: path.display().to_string(), source }
}

/// Whether there is such a file; not being allowed to know is an error.
fn exists(path: &Path) -> Result<bool, ModelError> {
    path.try_exists().map_err(read_error(path))
}

/// The bytes of a file that is what its name says.
fn read(path: &Path) -> Result<Vec<u8>, ModelError> {
    let bytes = std::fs::read(path).map_err(read_error(path))?;
    impostor::find(&path.display().to_string(), &bytes).map_or(Ok(bytes), Err)
}

fn utf8(path: &Path, bytes: Vec<u8>) -> Result<String, ModelError> {
    String::from_utf8(bytes)
        .map_err(|error| ModelError::Malformed { path: path.display().to_string(), reason: error.to_string() })
}

fn optional(path: &Path) -> Result<Option<Cow<'static, str>>, ModelError> {
    if !exists(path)? {
        return Ok(None);
    }
    Ok(Some(utf8(path, read(path)?)?.into()))
}

/// The text of a `generation_config.json`, whatever it holds: a wrong one matters only to who samples.
fn generation_config(directory: &Path) -> Result<Option<Cow<'static, str>>, ModelError> {
    let path = directory.join(GENERATION_CONFIG);
    if !exists(&path)? {
        return Ok(None);
    }
    let bytes = std::fs::read(&path).map_err(read_error(&path))?;
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned().into()))
}

pub(crate) fn map(path: &Path) -> Result<Mmap, ModelError> {
    let file = File::open(path).map_err(read_error(path))?;
    // SAFETY: the mapping is read-only. As with every program that maps weights, whoever truncates the file
    // while it is in use ends the process; nothing short of a copy prevents that.
    unsafe { Mmap::map(&file) }.map_err(read_error(path))
}

/// What to say of a directory that has GGUF files instead of a checkpoint.
fn only_gguf(directory: &Path) -> Option<String> {
    let entries = std::fs::read_dir(directory).ok()?;
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let mut paths: Vec<_> = paths.filter(|path| path.extension().is_some_and(|x| x == "gguf")).collect();
    paths.sort();
    let names: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
    (!names.is_empty()).then(|| format!("its weights are GGUF; give the file itself: {}", names.join(", ")))
}

/// `model.safetensors`, or the shards that `model.safetensors.index.json` names.
fn weight_paths(directory: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let single = directory.join(SINGLE_WEIGHTS);
    if exists(&single)? {
        return Ok(vec![single]);
    }
    let origin = directory.display().to_string();
    let index = directory.join(WEIGHTS_INDEX);
    if !exists(&index)? {
        let has = |extension: &str| {
            std::fs::read_dir(directory).is_ok_and(|mut entries| {
                entries.any(|e| e.is_ok_and(|e| e.path().extension().is_some_and(|x| x == extension)))
            })
        };
        let reason = if let Some(reason) = only_gguf(directory) {
            reason
        } else if has("bin") || has("pth") {
            "there are only PyTorch weights; convert them to safetensors (save_pretrained writes these)".to_owned()
        } else {
            "there is neither model.safetensors nor model.safetensors.index.json".to_owned()
        };
        return Err(ModelError::NotFound { path: origin, reason });
    }
    let malformed = |reason: String| ModelError::Malformed { path: index.display().to_string(), reason };
    let json: Value = serde_json::from_slice(&read(&index)?).map_err(|error| malformed(error.to_string()))?;
    let names = shard_names(&json).ok_or_else(|| malformed("it has no weight_map".into()))?;
    let mut paths = Vec::new();
    for name in names {
        if Path::new(name).components().count() != 1 || name.starts_with("..") {
            return Err(malformed(format!("shard '{name}' is not a plain file name")));
        }
        let path = directory.join(name);
        if !exists(&path)? {
            let reason = format!("shard {name} is missing; download the checkpoint again");
            return Err(ModelError::NotFound { path: origin, reason });
        }
        paths.push(path);
    }
    Ok(paths)
}

/// The files that a `model.safetensors.index.json` names.
pub(crate) fn shard_names(index: &Value) -> Option<BTreeSet<&str>> {
    Some(index.get("weight_map")?.as_object()?.values().filter_map(Value::as_str).collect())
}
