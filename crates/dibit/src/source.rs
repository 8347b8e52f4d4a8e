//! From `--model` to a loaded model.

use crate::args::{LoadFormat, ModelArgs};
use crate::output::bytes;
use crate::{bundled, memory};
use anyhow::{Result, bail};
use dibit_device::{DType, Device};
use dibit_model::{ModelConfig, ModelFiles, Pretrained, WeightSource};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tracing::subscriber::NoSubscriber;

/// Seed of dummy weights; a constant, so that everyone measures the same.
const DUMMY_SEED: u64 = 0;

/// Endings of files of models; no model of the hub is called so.
const FILE_ENDINGS: [&str; 6] = ["gguf", "json", "safetensors", "bin", "pth", "pt"];

/// What describes the model that the arguments name, and its weights where they lie on this machine.
pub fn describe(args: &ModelArgs) -> Result<ModelFiles> {
    let Some(model) = &args.model else { return Ok(bundled::files()) };
    let local = local(model, args.load_format)?;
    let files = match (&local, args.load_format) {
        (Some(file), LoadFormat::Auto) if ModelFiles::is_gguf(file) => ModelFiles::open_gguf(file)?,
        (Some(directory), LoadFormat::Auto) => ModelFiles::open(directory)?,
        (Some(path), LoadFormat::Dummy) => ModelFiles::without_weights(path)?,
        (None, _) => ModelFiles::without_weights(&download(model, false)?)?,
    };
    Ok(ModelFiles { origin: model.clone(), ..files })
}

/// Loads a model with its weights, for a device.
pub fn load<D: Device>(device: &Arc<D>, args: &ModelArgs) -> Result<Pretrained> {
    let mut files = describe(args)?;
    let source = match args.load_format {
        LoadFormat::Auto => WeightSource::Checkpoint,
        // A device with memory of its own copies what it gets.
        LoadFormat::Dummy => WeightSource::Dummy { seed: DUMMY_SEED, pooled: device.memory().is_some() },
    };
    // What is not supported is said before anything large is downloaded or made up.
    // What it warns of is said when the model is loaded.
    let config = tracing::subscriber::with_default(NoSubscriber::default(), || config(&files))?;
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

/// The directory or file that `model` names on this machine; `None` for a hub id.
fn local(model: &str, format: LoadFormat) -> Result<Option<PathBuf>> {
    let path = Path::new(model);
    if !path.exists() {
        return missing(model, |folder| folder.is_dir()).map_or(Ok(None), |reason| bail!("no such file: {reason}"));
    }
    let is_gguf = ModelFiles::is_gguf(path);
    if is_gguf && format == LoadFormat::Dummy {
        bail!("{model} is a GGUF file; --load-format dummy takes a config.json");
    }
    if path.is_file() && format == LoadFormat::Auto && !is_gguf {
        bail!(
            "{model} is a file; --model takes the directory of a Hugging Face checkpoint, a GGUF file, or a config.json with \
             --load-format dummy"
        );
    }
    Ok(Some(path.to_owned()))
}

/// Why `model`, which is not on this machine, is no hub id either. `is_folder` tells whether a path is one.
fn missing(model: &str, is_folder: impl Fn(&Path) -> bool) -> Option<String> {
    if !is_hub_id(model) {
        return Some(format!("{model} does not exist, and a hub id has the form org/name[@revision]"));
    }
    // Who names a revision means the hub.
    if model.contains('@') {
        return None;
    }
    let ending = Path::new(model).extension().map(|ending| ending.to_ascii_lowercase());
    if ending.is_some_and(|ending| FILE_ENDINGS.iter().any(|known| ending == *known)) {
        return Some(format!("{model} does not exist"));
    }
    let folder = Path::new(model).parent()?;
    is_folder(folder).then(|| {
        format!(
            "{model} does not exist in the folder {}, which does; for the hub's model of this name write {model}@main",
            folder.display()
        )
    })
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

    #[test]
    fn what_looks_like_a_path_is_not_looked_for_on_the_hub() {
        let missing = |model: &str| missing(model, |folder| folder == Path::new("here"));
        for id in ["Qwen/Qwen3-0.6B", "org/name.v2", "org/name@main", "here/name@main", "here/x.gguf@main"] {
            assert_eq!(missing(id), None, "{id}");
        }
        for path in ["models/qwen.gguf", "org/config.json", "org/x.GGUF", "./x", "/x", "model", "here/more/x"] {
            assert!(missing(path).unwrap().starts_with(&format!("{path} does not exist")), "{path}");
        }
        let hint = missing("here/name").unwrap();
        assert!(hint.contains("in the folder here") && hint.ends_with("write here/name@main"), "{hint}");
    }
}
