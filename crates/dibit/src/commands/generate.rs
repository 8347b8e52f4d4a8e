use super::schemes;
use super::{announce, cache_line, interrupt_flag, model_line, sampling};
use crate::args::GenerateArgs;
use crate::device::on_device;
use crate::output::{STDOUT, TextStream, bytes, note};
use crate::{Outcome, memory, source};
use anyhow::{Context, Result, bail};
use dibit_device::Device;
use dibit_engine::{Completion, Engine, EngineError, FinishReason, MemoryPlan, Options, Request, Sampling};
use dibit_model::Pretrained;
use serde_json::{Value, json};
use std::io::{IsTerminal, Read, Write};
use std::ops::ControlFlow;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

pub fn run(args: &GenerateArgs) -> Result<Outcome> {
    let prompts = prompts(args)?;
    schemes::check(&args.cache)?;
    on_device!(&args.run.open_device()?, |device| run_on(device, args, &prompts))
}

fn run_on<D: Device>(device: &D, args: &GenerateArgs, prompts: &[String]) -> Result<Outcome> {
    let mut pretrained = source::load(device, &args.run.model)?;
    let scheme = schemes::chosen(&args.cache, &pretrained)?;
    let sampling = sampling(&args.sampling, &pretrained.generation_config)?;
    sampling.validate()?;
    let requests = requests(args, &pretrained, prompts, sampling)?;
    let options = Options {
        context: context(args, &pretrained, &requests),
        sequences: requests.len().min(usize::from(args.parallel)),
        prefill_chunk: args.cache.prefill_chunk.map(|n| n as usize),
    };
    let mut engine = Engine::new(device, &mut pretrained, &scheme, options)?;
    let pretrained = engine.pretrained();
    for request in &requests {
        engine.check(request, 0)?;
    }
    announce(&scheme, &pretrained.config)?;

    let interrupted = interrupt_flag(true)?;
    let start = Instant::now();
    let completions = if args.json || args.prompts.is_some() {
        engine.generate(&requests, |_, _| match interrupted.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        })?
    } else {
        let mut stream = TextStream::new(&interrupted);
        // Where this fails, the first piece of the answer finds out.
        let _ = stream.push(&prompts[0]);
        let completions = engine.generate(&requests, |_, text| stream.push(text))?;
        stream.finish()?;
        completions
    };

    let elapsed = start.elapsed();
    let mut stdout = std::io::stdout().lock();
    if args.json {
        let all: Vec<Value> =
            prompts.iter().zip(&completions).map(|(p, c)| to_json(p, c, pretrained, &scheme.name, sampling)).collect();
        let value = if args.prompts.is_some() { Value::Array(all) } else { all.into_iter().next().unwrap_or_default() };
        writeln!(stdout, "{}", serde_json::to_string_pretty(&value)?).context(STDOUT)?;
    } else if args.prompts.is_some() {
        for (index, (prompt, completion)) in prompts.iter().zip(&completions).enumerate() {
            writeln!(stdout, "[{}] {prompt}{}\n", index + 1, completion.text).context(STDOUT)?;
        }
    }
    summary(pretrained, &device.describe(), &scheme.name, engine.plan(), options, sampling, &completions, elapsed);
    let cancelled = completions.iter().any(|c| c.finish == FinishReason::Cancelled);
    Ok(if cancelled { Outcome::Interrupted } else { Outcome::Done })
}

fn prompts(args: &GenerateArgs) -> Result<Vec<String>> {
    let prompts = if let Some(path) = &args.prompts {
        let text = std::fs::read(path).with_context(|| format!("cannot read the prompts {}", path.display()))?;
        let text = String::from_utf8(text)
            .with_context(|| format!("{} is not UTF-8 text; convert it first", path.display()))?;
        let prompts: Vec<String> = text.lines().filter(|line| !line.trim().is_empty()).map(str::to_owned).collect();
        if prompts.is_empty() {
            bail!("{} holds no prompts; write one a line", path.display());
        }
        prompts
    } else if let Some(prompt) = &args.prompt {
        vec![prompt.clone()]
    } else {
        if std::io::stdin().is_terminal() {
            bail!("there is no prompt; give one as an argument or on stdin");
        }
        let mut bytes = Vec::new();
        std::io::stdin().read_to_end(&mut bytes).context("cannot read the prompt from stdin")?;
        let prompt = String::from_utf8(bytes).context("the prompt on stdin is not UTF-8 text; convert it first")?;
        // The line's end belongs to `echo`, not to the prompt.
        vec![prompt.strip_suffix('\n').map(str::to_owned).unwrap_or(prompt)]
    };
    if prompts.iter().any(String::is_empty) {
        return Err(EngineError::EmptyPrompt.into());
    }
    Ok(prompts)
}

fn requests(
    args: &GenerateArgs,
    pretrained: &Pretrained,
    prompts: &[String],
    sampling: Sampling,
) -> Result<Vec<Request>> {
    let request = |prompt: &String| -> Result<Request> {
        let prompt = pretrained.tokenizer.encode(prompt, true)?;
        Ok(Request { prompt, history: Vec::new(), max_tokens: args.max_tokens, sampling, stop: args.stop.clone() })
    };
    prompts.iter().map(request).collect()
}

/// The context that was asked for, or what the longest request takes, as far as the model goes.
fn context(args: &GenerateArgs, pretrained: &Pretrained, requests: &[Request]) -> usize {
    let longest = requests.iter().map(|r| r.prompt.len().saturating_add(r.max_tokens)).max().unwrap_or(1);
    let limit = pretrained.config.max_position_embeddings;
    args.cache.context.map_or(longest.clamp(1, limit), |context| context as usize)
}

fn to_json(prompt: &str, completion: &Completion, pretrained: &Pretrained, scheme: &str, sampling: Sampling) -> Value {
    let usage = &completion.usage;
    json!({
        "model": pretrained.name,
        "prompt": prompt,
        "text": completion.text,
        "tokens": completion.tokens,
        "finish_reason": completion.finish.name(),
        "prompt_tokens": completion.prompt_tokens,
        "generated_tokens": completion.tokens.len(),
        "sampling": {
            "temperature": shortest(sampling.temperature),
            "top_p": shortest(sampling.top_p),
            "top_k": sampling.top_k,
            "min_p": shortest(sampling.min_p),
            "repetition_penalty": shortest(sampling.repetition_penalty),
            "seed": sampling.seed,
        },
        "timings": {
            "prefill_seconds": completion.timings.prefill.as_secs_f64(),
            "decode_seconds": completion.timings.decode.as_secs_f64(),
            "prefill_tokens_per_second": completion.prefill_rate(),
            "decode_tokens_per_second": completion.decode_rate(),
        },
        "cache": {
            "scheme": scheme,
            "tokens": usage.tokens,
            "bits": usage.bits(),
            "allocated_bits": usage.allocated_bits(),
            "used_bytes": usage.used_bytes,
            "allocated_bytes": usage.allocated_bytes,
            "fp16_bytes": usage.fp16_bytes,
        },
        "memory": {
            "weights_bytes": pretrained.weights.num_bytes(),
            "peak_rss_bytes": memory::peak(),
        },
    })
}

/// The number as it is written, without the digits that widening adds.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or_else(|_| f64::from(value))
}

#[allow(clippy::too_many_arguments)]
fn summary(
    pretrained: &Pretrained,
    device: &str,
    scheme: &str,
    plan: &MemoryPlan,
    options: Options,
    sampling: Sampling,
    completions: &[Completion],
    elapsed: Duration,
) {
    let total = |of: fn(&Completion) -> usize| completions.iter().map(of).sum::<usize>();
    let rates = match completions {
        [one] => format!("{:.1} tokens/s prompt, {:.1} tokens/s decode", one.prefill_rate(), one.decode_rate()),
        _ => format!(
            "{:.1} generated tokens/s in all",
            total(|c| c.tokens.len()) as f64 / elapsed.as_secs_f64().max(1e-9)
        ),
    };
    let chosen = if sampling.temperature == 0.0 {
        format!("greedy, repetition penalty {}", sampling.repetition_penalty)
    } else {
        format!(
            "temperature {}, top-p {}, top-k {}, min-p {}, repetition penalty {}, seed {}",
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
            sampling.min_p,
            sampling.repetition_penalty,
            sampling.seed
        )
    };
    let weights = bytes(pretrained.weights.num_bytes());
    let peak = memory::peak().map_or(String::new(), |peak| format!(", at most {} resident", bytes(peak)));
    let usage = completions.iter().map(|c| c.usage).reduce(|a, b| a + b).unwrap_or_default();
    let (tokens, planned) = (usage.tokens, options.context);
    let context = match completions {
        [_] => format!("{tokens} of {planned} tokens"),
        all => format!(
            "{tokens} tokens in {} sequences; {} at once of {planned} tokens each",
            all.len(),
            options.sequences
        ),
    };
    let pass = if plan.pass_rows < options.context {
        format!(", prefill passes of {}", plan.pass_rows)
    } else {
        String::new()
    };
    note(&format!(
        "
model    {}
speed    {} prompt + {} generated tokens; {rates}
sampling {chosen}
context  {context}{pass}
cache    {}
memory   {weights} of weights{peak}",
        model_line(pretrained, device),
        total(|c| c.prompt_tokens),
        total(|c| c.tokens.len()),
        cache_line(scheme, &usage)
    ));
}
