//! From `--model` to a loaded model.

use crate::args::{LoadFormat, ModelArgs};
use crate::output::bytes;
use crate::{bundled, memory};
use anyhow::{Result, bail};
use dibit_device::{DType, Device};
use dibit_model::{ModelConfig, ModelFiles, Pretrained, WeightSource};
use std::path::{Path, PathBuf};

/// Seed of dummy weights; a constant, so that everyone measures the same.
const DUMMY_SEED: u64 = 0;

/// What describes the model that the arguments name, and its weights where they lie on this machine.
pub fn describe(args: &ModelArgs) -> Result<ModelFiles> {
    let Some(model) = &args.model else { return Ok(bundled::files()) };
    let local = local(model, args.load_format)?;
    let files = match (&local, args.load_format) {
        (Some(file), LoadFormat::Auto) if is_gguf(file) => ModelFiles::open_gguf(file)?,
        (Some(directory), LoadFormat::Auto) => ModelFiles::open(directory)?,
        (Some(path), LoadFormat::Dummy) => ModelFiles::without_weights(path)?,
        (None, _) => ModelFiles::without_weights(&download(model, false)?)?,
    };
    Ok(ModelFiles { origin: model.clone(), ..files })
}

/// Loads a model with its weights, for a device.
pub fn load<D: Device>(device: &D, args: &ModelArgs) -> Result<Pretrained> {
    let mut files = describe(args)?;
    let source = match args.load_format {
        LoadFormat::Auto => WeightSource::Checkpoint,
        // A device with memory of its own copies what it gets.
        LoadFormat::Dummy => WeightSource::Dummy { seed: DUMMY_SEED, pooled: device.memory().is_some() },
    };
    // What is not supported is said before anything large is downloaded or made up.
    let config = config(&files)?;
    if source == WeightSource::Checkpoint && files.weights.is_empty() {
        let directory = download(&files.origin, true)?;
        files = ModelFiles { origin: files.origin, ..ModelFiles::open(&directory)? };
    }
    if matches!(source, WeightSource::Dummy { pooled: false, .. }) {
        let needed = config.num_parameters() * args.dtype.dtype().or(config.dtype).unwrap_or(DType::Bf16).size();
        let available = memory::available();
        if needed > available {
            bail!("dummy weights of this shape take {}, and {} of memory are free", bytes(needed), bytes(available));
        }
    }
    let pretrained = Pretrained::load(&files, source, args.dtype.dtype())?;
    if args.load_format == LoadFormat::Dummy {
        tracing::info!("dummy weights: the text means nothing");
    }
    if pretrained.tokenizer_is_stand_in {
        tracing::info!(
            "there is no tokenizer: bytes of the prompt are its tokens, and generated tokens are shown as numbers"
        );
    }
    Ok(pretrained)
}

/// The configuration alone.
pub fn config(files: &ModelFiles) -> Result<ModelConfig> {
    Ok(ModelConfig::parse(&files.config, &format!("config.json of {}", files.origin))?)
}

/// Whether this names a GGUF file; a directory may have such a name too.
fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) && !path.is_dir()
}

/// The directory or file that `model` names on this machine; `None` for a hub id.
fn local(model: &str, format: LoadFormat) -> Result<Option<PathBuf>> {
    let path = Path::new(model);
    if is_gguf(path) && format == LoadFormat::Dummy {
        bail!("{model} is a GGUF file; --load-format dummy takes a config.json");
    }
    if is_gguf(path) && !path.exists() {
        bail!("no model at {model}: the file does not exist");
    }
    if path.is_file() && format == LoadFormat::Auto && !is_gguf(path) {
        bail!(
            "{model} is a file; --model takes the directory of a Hugging Face checkpoint, a .gguf file, or a config.json \
             with --load-format dummy"
        );
    }
    if path.exists() {
        return Ok(Some(path.to_owned()));
    }
    if !is_hub_id(model) {
        bail!("no model at {model}: the directory does not exist, and a hub id has the form org/name[@revision]");
    }
    Ok(None)
}

#[cfg(feature = "hub")]
fn download(id: &str, weights: bool) -> Result<PathBuf> {
    use std::io::IsTerminal;
    Ok(dibit_model::download(id, weights, std::io::stderr().is_terminal())?)
}

#[cfg(not(feature = "hub"))]
fn download(id: &str, _weights: bool) -> Result<PathBuf> {
    bail!("{id} is not a directory, and this build has no hub support (feature `hub`)");
}

/// `org/name[@revision]`, and no path.
fn is_hub_id(model: &str) -> bool {
    let name = model.split('@').next().unwrap_or_default();
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    name.split('/').count() == 2 && name.split('/').all(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_ids_are_told_from_paths() {
        for id in ["Qwen/Qwen3-0.6B", "meta-llama/Llama-3.1-8B@main", "a/b@refs/pr/1"] {
            assert!(is_hub_id(id), "{id}");
        }
        for path in ["./model", "../x", "/abs/path", "models/tiny/x", "model", "a/", "", "~/x"] {
            assert!(!is_hub_id(path), "{path}");
        }
    }
}
