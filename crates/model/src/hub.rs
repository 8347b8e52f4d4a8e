//! Models of the Hugging Face hub, through its local cache.

use crate::ModelError;
use crate::files::{
    CHAT_TEMPLATE, CONFIG, GENERATION_CONFIG, SINGLE_WEIGHTS, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS_INDEX, shard_names,
};
use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use std::path::PathBuf;

/// Files that are taken where they exist.
const OPTIONAL: [&str; 4] = [GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE];

/// Splits `org/name[@revision]`.
fn parse(id: &str) -> (String, String) {
    match id.split_once('@') {
        Some((name, revision)) => (name.to_owned(), revision.to_owned()),
        None => (id.to_owned(), "main".to_owned()),
    }
}

fn offline() -> bool {
    std::env::var("HF_HUB_OFFLINE").is_ok_and(|value| !matches!(value.as_str(), "" | "0" | "false" | "False"))
}

/// The local directory of `org/name[@revision]`, downloaded where it is not in the cache yet. Honours `HF_HOME`,
/// `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE`; `progress` shows bars on stderr. Without `weights`, only what describes
/// the model is downloaded.
///
/// # Errors
/// [`ModelError::Hub`] with the cause: offline and not cached, no network, no access, no such model.
pub fn download(id: &str, weights: bool, progress: bool) -> Result<PathBuf, ModelError> {
    let (name, revision) = parse(id);
    let failed = |reason: String| ModelError::Hub { model: id.to_owned(), reason };
    let repo = Repo::with_revision(name, RepoType::Model, revision);
    let cache = Cache::from_env();
    if offline() {
        return cached(&cache.repo(repo), weights).ok_or_else(|| {
            failed("HF_HUB_OFFLINE is set and the model is not in the local cache; unset it to download".into())
        });
    }
    let mut builder = ApiBuilder::from_env().with_progress(progress);
    if let Some(token) = std::env::var("HF_TOKEN").ok().filter(|token| !token.is_empty()) {
        builder = builder.with_token(Some(token));
    }
    let api = builder.build().map_err(|error| failed(explain(&error)))?.repo(repo.clone());
    match fetch(&api, weights) {
        Ok(directory) => Ok(directory),
        // A machine without a network still runs what it has.
        Err(reason) => match cached(&cache.repo(repo), weights) {
            Some(directory) => {
                tracing::warn!("{reason}; using the copy in the local cache");
                Ok(directory)
            }
            None => Err(failed(reason)),
        },
    }
}

/// The directory of a complete copy in the cache.
fn cached(repo: &CacheRepo, weights: bool) -> Option<PathBuf> {
    let config = repo.get(CONFIG)?;
    if weights {
        repo.get(SINGLE_WEIGHTS).or_else(|| repo.get(WEIGHTS_INDEX))?;
    }
    Some(config.parent()?.to_owned())
}

/// The directory of the downloaded files, or why there is none.
fn fetch(api: &ApiRepo, weights: bool) -> Result<PathBuf, String> {
    let get = |name: &str| api.get(name).map_err(|error| explain(&error));
    let info = api.info().map_err(|error| explain(&error))?;
    let has = |name: &str| info.siblings.iter().any(|file| file.rfilename == name);
    let with = |end: &str| info.siblings.iter().map(|file| &file.rfilename).find(|name| name.ends_with(end));
    if let (Some(gguf), None) = (with(".gguf"), with(".safetensors")) {
        return Err(format!(
            "its weights are GGUF, which dibit does not download: fetch one file, such as {gguf}, and give its path"
        ));
    }
    let config = get(CONFIG)?;
    for name in OPTIONAL.into_iter().filter(|name| has(name)) {
        get(name)?;
    }
    if weights && has(WEIGHTS_INDEX) && !has(SINGLE_WEIGHTS) {
        let index = std::fs::read(get(WEIGHTS_INDEX)?).map_err(|error| error.to_string())?;
        // A malformed index is reported when the directory is opened.
        let json = serde_json::from_slice(&index).unwrap_or_default();
        for name in shard_names(&json).unwrap_or_default() {
            get(name)?;
        }
    } else if weights {
        get(SINGLE_WEIGHTS)?;
    }
    Ok(config.parent().map(PathBuf::from).unwrap_or_default())
}

fn explain(error: &ApiError) -> String {
    let text = error.to_string();
    let status =
        |code: &str| text.contains(&format!("status: {code}")) || text.contains(&format!("status code {code}"));
    if status("401") || status("403") {
        return format!("access is denied; accept the model's licence on the hub and set HF_TOKEN ({text})");
    }
    if status("404") {
        return format!("there is no such model, revision or file with safetensors weights ({text})");
    }
    format!("{text}; check the network, or give a local directory")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_revision_follows_an_at_sign() {
        assert_eq!(parse("org/name"), ("org/name".into(), "main".into()));
        assert_eq!(parse("org/name@refs/pr/1"), ("org/name".into(), "refs/pr/1".into()));
    }
}
