//! Retrieval accuracy: prompts of RULER for a model, and its answers.

use crate::text;
use anyhow::{Context, Result, bail};
use dibit_cache::CalibratedScheme;
use dibit_device::Device;
use dibit_engine::{Engine, FinishReason, Options, Request, Sampling};
use dibit_eval::ruler::{Haystack, Sample, SampleOptions, Task, score};
use dibit_model::{ChatFormat, Message, ModelError, Pretrained};
use dibit_runner::Models;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use tracing::subscriber::NoSubscriber;

/// What a model answered.
pub struct Answer {
    pub prediction: String,
    /// Share of the expected strings that it contains.
    pub score: f64,
    pub generated_tokens: usize,
}

/// Reads essays from a file: a text, or the field "text" of a `.json`.
pub fn haystack(path: &Path) -> Result<Haystack> {
    let name = path.display();
    let text = text::read_named("haystack", path)?;
    let text = if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json")) {
        let mut json: serde_json::Value =
            serde_json::from_str(&text).with_context(|| format!("the haystack {name} is malformed"))?;
        match json.get_mut("text").map(serde_json::Value::take) {
            Some(serde_json::Value::String(text)) => text,
            _ => bail!("the haystack {name} has no text in a field \"text\"; add it, or give a plain text"),
        }
    } else {
        text
    };
    Haystack::essay(&text).with_context(|| name.to_string())
}

/// Makes the prompts of some tasks for a model, in their order. With a `format` the question is a turn of the user, and
/// the answer's beginning one of the assistant.
pub fn samples(
    pretrained: &Pretrained,
    tasks: &[Task],
    options: SampleOptions,
    haystack: &Haystack,
    format: Option<&ChatFormat>,
) -> Result<Vec<Sample>> {
    let encode = |input: &str, prefix: &str| encode(pretrained, format, input, prefix);
    let mut all = Vec::new();
    for &task in tasks {
        all.extend(dibit_eval::ruler::samples(task, options, haystack, encode)?);
    }
    Ok(all)
}

fn encode(
    pretrained: &Pretrained,
    format: Option<&ChatFormat>,
    input: &str,
    prefix: &str,
) -> Result<Vec<u32>, ModelError> {
    let Some(format) = format else { return pretrained.tokenizer.encode(&format!("{input}{prefix}"), true) };
    let message = Message { role: "user".to_owned(), content: input.to_owned() };
    let tokenizer = &pretrained.tokenizer;
    tokenizer.encode_rendered(&(format.render(tokenizer, &[message], true)? + prefix))
}

/// An engine for one scheme after the other.
pub fn engine<D: Device + 'static>(
    pretrained: &Arc<Pretrained>,
    models: &mut Models<D>,
    scheme: &CalibratedScheme,
    options: Options,
) -> Result<Engine> {
    let layout = pretrained.cache_layout(scheme)?;
    Ok(Engine::with_model(pretrained.clone(), models.get(&layout)?, layout, options)?)
}

/// Answers prompts by greedy decoding, several at once where the engine has room. `progress` gets the number of
/// prompts that have begun and says whether to go on; where it does not, there are no answers.
pub fn run(
    engine: &mut Engine,
    samples: &[Sample],
    mut progress: impl FnMut(usize) -> ControlFlow<()>,
) -> Result<Option<Vec<Answer>>> {
    let request = |sample: &Sample| Request {
        prompt: sample.prompt.clone(),
        history: Vec::new(),
        max_tokens: sample.task.max_new_tokens(),
        sampling: Sampling::greedy(),
        stream: 0,
        stop: Vec::new(),
        logprobs: None,
    };
    let requests: Vec<Request> = samples.iter().map(request).collect();
    let mut begun = 0;
    // The engine's notes on prefilling are for single prompts.
    let completions = tracing::subscriber::with_default(NoSubscriber::default(), || {
        engine.generate(&requests, |index, _| {
            begun = begun.max(index + 1);
            progress(begun)
        })
    })?;
    if completions.iter().any(|completion| completion.finish == FinishReason::Cancelled) {
        return Ok(None);
    }
    let answer = |(sample, completion): (&Sample, dibit_engine::Completion)| Answer {
        score: score(&completion.text, &sample.answers),
        generated_tokens: completion.tokens.len(),
        prediction: completion.text,
    };
    Ok(Some(samples.iter().zip(completions).map(answer).collect()))
}
