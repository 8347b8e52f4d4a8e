//! Retrieval accuracy: prompts of RULER for a model, and its answers.

use anyhow::{Context, Result, bail};
use dibit_device::Device;
use dibit_engine::{Engine, FinishReason, Request, Sampling};
use dibit_eval::ruler::{Haystack, Sample, SampleOptions, Task, score};
use dibit_model::{ChatTemplate, Message, ModelError, Pretrained};
use std::ops::ControlFlow;
use std::path::Path;
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
    let bytes = std::fs::read(path).with_context(|| format!("cannot read the haystack {name}"))?;
    let text =
        String::from_utf8(bytes).with_context(|| format!("the haystack {name} is not UTF-8 text; convert it first"))?;
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

/// Makes the prompts of some tasks for a model, in their order. With `chat` the question is a turn of the user, and
/// the answer's beginning one of the assistant.
pub fn samples(
    pretrained: &Pretrained,
    tasks: &[Task],
    options: SampleOptions,
    haystack: &Haystack,
    chat: bool,
) -> Result<Vec<Sample>> {
    let template = if chat { pretrained.chat_template()? } else { None };
    if chat && template.is_none() {
        bail!("{} has no chat template; leave --chat out", pretrained.name);
    }
    let encode = |input: &str, prefix: &str| encode(pretrained, template.as_ref(), input, prefix);
    let mut all = Vec::new();
    for &task in tasks {
        all.extend(dibit_eval::ruler::samples(task, options, haystack, encode)?);
    }
    Ok(all)
}

fn encode(
    pretrained: &Pretrained,
    template: Option<&ChatTemplate>,
    input: &str,
    prefix: &str,
) -> Result<Vec<u32>, ModelError> {
    let Some(template) = template else { return pretrained.tokenizer.encode(&format!("{input}{prefix}"), true) };
    let message = Message { role: "user".to_owned(), content: input.to_owned() };
    pretrained.tokenizer.encode(&(template.render(&[message], true)? + prefix), false)
}

/// Answers prompts by greedy decoding, several at once where the engine has room. `progress` gets the number of
/// prompts that have begun and says whether to go on; where it does not, there are no answers.
pub fn run<D: Device>(
    engine: &mut Engine<'_, D>,
    samples: &[Sample],
    mut progress: impl FnMut(usize) -> ControlFlow<()>,
) -> Result<Option<Vec<Answer>>> {
    let request = |sample: &Sample| Request {
        prompt: sample.prompt.clone(),
        history: Vec::new(),
        max_tokens: sample.task.max_new_tokens(),
        sampling: Sampling::GREEDY,
        stop: Vec::new(),
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
