use super::schemes::{self, Chosen, Found};
use super::{announce, cache_line, interrupt_flag, model_line, sampling};
use crate::args::{GenerateArgs, LoadFormat};
use crate::device::on_device;
use crate::output::{STDOUT, TextStream, bytes, note};
use crate::{Outcome, memory, source, text};
use anyhow::{Context, Result, bail};
use dibit_cache::Usage;
use dibit_device::Train;
use dibit_engine::{Completion, Engine, EngineError, FinishReason, Options, Prefill, Request, Sampling, TokenLogprob};
use dibit_model::{Message, Pretrained, Tokenizer};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{IsTerminal, Read, Write};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

pub fn run(args: &GenerateArgs) -> Result<Outcome> {
    let prompts = prompts(args)?;
    schemes::check(&args.cache)?;
    args.cache.prefill.check()?;
    on_device!(&args.run.open_device()?, |device| run_on(device, args, &prompts))
}

fn run_on<D: Train + 'static>(device: &Arc<D>, args: &GenerateArgs, prompts: &[String]) -> Result<Outcome> {
    let mut pretrained = source::load(device, &args.run.model)?;
    let sampling = sampling(&args.sampling, &pretrained.generation_config, args.samples > 1)?;
    sampling.validate(pretrained.config.vocab_size)?;
    let requests = requests(args, &pretrained, prompts, &sampling)?;
    let options = Options {
        context: context(args, &pretrained, &requests),
        sequences: requests.len().min(usize::from(args.parallel)),
        prefill: args.cache.prefill.on(&device.budget()),
    };
    options.check(&pretrained.config)?;
    pretrained.set_context(options.context);
    let pretrained = Arc::new(pretrained);
    let interrupted = interrupt_flag(true)?;
    let made_up = args.run.model.load_format == LoadFormat::Dummy;
    let chosen = schemes::chosen(device, &args.cache, &pretrained, made_up, &interrupted)?;
    let mut engine = Engine::new(device, pretrained.clone(), &chosen.scheme, options)?;
    for request in &requests {
        engine.check(request, 0)?;
    }
    announce(&chosen.scheme, &pretrained.config)?;

    let start = Instant::now();
    let many = args.prompts.is_some() || requests.len() > 1;
    let completions = if args.json || many {
        engine.generate(&requests, |_, _| match interrupted.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        })?
    } else {
        let mut stream = TextStream::new(&interrupted);
        if !args.chat {
            // Where this fails, the first piece of the answer finds out.
            let _ = stream.push(&prompts[0]);
        }
        let completions = engine.generate(&requests, |_, text| stream.push(text))?;
        stream.finish()?;
        completions
    };

    let elapsed = start.elapsed();
    let mut stdout = std::io::stdout().lock();
    if args.json {
        let texts = each_prompt(args, prompts).zip(&requests).zip(&completions);
        let all: Vec<Value> =
            texts.map(|((p, request), c)| to_json(p, request, c, &pretrained, &chosen, options.prefill)).collect();
        let value = if many { Value::Array(all) } else { all.into_iter().next().unwrap_or_default() };
        writeln!(stdout, "{}", serde_json::to_string_pretty(&value)?).context(STDOUT)?;
    } else if many {
        for (index, (prompt, completion)) in each_prompt(args, prompts).zip(&completions).enumerate() {
            let separator = if args.chat { "\n" } else { "" };
            writeln!(stdout, "[{}] {prompt}{separator}{}\n", index + 1, completion.text).context(STDOUT)?;
        }
    }
    let cache = cache_line(&chosen, &used(&completions), &engine);
    summary(&pretrained, &device.describe(), &cache, options, &sampling, &completions, elapsed);
    let cancelled = completions.iter().any(|c| c.finish == FinishReason::Cancelled);
    Ok(if cancelled { Outcome::Interrupted } else { Outcome::Done })
}

fn prompts(args: &GenerateArgs) -> Result<Vec<String>> {
    args.conversation.check(args.chat)?;
    if args.samples > 1 && args.sampling.temperature == Some(0.0) {
        bail!(
            "--samples {} of greedy decoding are as many times the same text; give a --temperature above 0",
            args.samples
        );
    }
    let prompts = if let Some(path) = &args.prompts {
        let text = text::read_named("prompts", path)?;
        let prompts: Vec<String> = text.lines().filter(|line| !line.trim().is_empty()).map(str::to_owned).collect();
        if prompts.is_empty() {
            bail!("{} holds no prompts; write one a line", path.display());
        }
        prompts
    } else if let Some(path) = &args.prompt_file {
        vec![without_last_line_end(text::read_named("prompt", path)?)]
    } else if let Some(prompt) = &args.prompt {
        vec![prompt.clone()]
    } else {
        if std::io::stdin().is_terminal() {
            bail!("there is no prompt; give one as an argument or on stdin");
        }
        let mut bytes = Vec::new();
        std::io::stdin().read_to_end(&mut bytes).context("cannot read the prompt from stdin")?;
        vec![without_last_line_end(text::decode(bytes, "the prompt on stdin")?)]
    };
    if prompts.iter().any(String::is_empty) {
        return Err(EngineError::EmptyPrompt.into());
    }
    Ok(prompts)
}

/// The line's end belongs to `echo` or an editor, not to the prompt.
fn without_last_line_end(text: String) -> String {
    text.strip_suffix('\n').map(str::to_owned).unwrap_or(text)
}

/// Each prompt, as often as it is continued.
fn each_prompt<'a>(args: &GenerateArgs, prompts: &'a [String]) -> impl Iterator<Item = &'a String> {
    let samples = usize::from(args.samples);
    prompts.iter().flat_map(move |prompt| std::iter::repeat_n(prompt, samples))
}

fn requests(
    args: &GenerateArgs,
    pretrained: &Pretrained,
    prompts: &[String],
    sampling: &Sampling,
) -> Result<Vec<Request>> {
    let format = args.chat.then(|| args.conversation.format(pretrained)).transpose()?;
    let encode = |prompt: &String| -> Result<Vec<u32>> {
        let Some(format) = &format else { return Ok(pretrained.tokenizer.encode(prompt, true)?) };
        let message = |role: &str, content: &String| Message { role: role.to_owned(), content: content.clone() };
        let system = args.system.iter().map(|content| message("system", content));
        let messages: Vec<Message> = system.chain([message("user", prompt)]).collect();
        let text = format.render(&pretrained.tokenizer, &messages, true)?;
        Ok(pretrained.tokenizer.encode_rendered(&text)?)
    };
    let prompts: Vec<Vec<u32>> = prompts.iter().map(encode).collect::<Result<_>>()?;
    let requests = prompts.into_iter().flat_map(|prompt| std::iter::repeat_n(prompt, usize::from(args.samples)));
    let request = |(prompt, stream)| Request {
        prompt,
        history: Vec::new(),
        max_tokens: args.max_tokens,
        sampling: sampling.clone(),
        stream,
        stop: args.stop.clone(),
        logprobs: args.logprobs.map(usize::from),
    };
    Ok(requests.zip(0u64..).map(request).collect())
}

/// The context that was asked for, or what the longest request takes, as far as the model goes.
fn context(args: &GenerateArgs, pretrained: &Pretrained, requests: &[Request]) -> usize {
    let longest = requests.iter().map(|r| r.prompt.len().saturating_add(r.max_tokens)).max().unwrap_or(1);
    let limit = pretrained.config.max_position_embeddings;
    args.cache.context.map_or(longest.clamp(1, limit), |context| context as usize)
}

fn to_json(
    prompt: &str,
    request: &Request,
    completion: &Completion,
    pretrained: &Pretrained,
    chosen: &Chosen,
    prefill: Prefill,
) -> Value {
    let (usage, sampling) = (&completion.usage, &request.sampling);
    let mut json = json!({
        "model": pretrained.name,
        "prompt": prompt,
        "text": completion.text,
        "tokens": completion.tokens,
        "finish_reason": completion.finish.name(),
        "prompt_tokens": completion.prompt_tokens,
        "prefill": prefill.to_string(),
        "generated_tokens": completion.tokens.len(),
        "sampling": {
            "temperature": shortest(sampling.temperature),
            "top_p": shortest(sampling.top_p),
            "top_k": sampling.top_k,
            "min_p": shortest(sampling.min_p),
            "repetition_penalty": shortest(sampling.repetition_penalty),
            "presence_penalty": shortest(sampling.presence_penalty),
            "frequency_penalty": shortest(sampling.frequency_penalty),
            "dry_multiplier": shortest(sampling.dry.multiplier),
            "dry_base": shortest(sampling.dry.base),
            "dry_allowed_length": sampling.dry.allowed_length,
            "dry_sequence_breakers": sampling.dry.breakers,
            "logit_bias": sampling.logit_bias.iter().map(|(id, bias)| (id.to_string(), shortest(*bias))).collect::<BTreeMap<_, _>>(),
            "seed": sampling.seed,
            "stream": request.stream,
        },
        "timings": {
            "prefill_seconds": completion.timings.prefill.as_secs_f64(),
            "decode_seconds": completion.timings.decode.as_secs_f64(),
            "prefill_tokens_per_second": completion.prefill_rate(),
            "decode_tokens_per_second": completion.decode_rate(),
        },
        "cache": {
            "scheme": chosen.scheme.name,
            "calibration": chosen.calibration.as_ref().map(Found::to_json),
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
    });
    if request.logprobs.is_some() {
        json["logprobs"] = completion.logprobs.iter().map(|own| logprob_json(own, &pretrained.tokenizer)).collect();
    }
    json
}

/// A token with its log-probability and the most likely ones with theirs.
fn logprob_json(own: &TokenLogprob, tokenizer: &Tokenizer) -> Value {
    let entry = |id: u32, logprob: f32| json!({"id": id, "token": tokenizer.token(id), "logprob": shortest(logprob)});
    let mut json = entry(own.id, own.logprob);
    json["top_logprobs"] = own.top.iter().map(|(id, logprob)| entry(*id, *logprob)).collect();
    json
}

/// What all sequences took in the cache at their ends.
fn used(completions: &[Completion]) -> Usage {
    completions.iter().map(|c| c.usage).reduce(|a, b| a + b).unwrap_or_default()
}

/// The number as it is written, without the digits that widening adds.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or_else(|_| f64::from(value))
}

#[allow(clippy::too_many_arguments)]
fn summary(
    pretrained: &Pretrained,
    device: &str,
    cache: &str,
    options: Options,
    sampling: &Sampling,
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
    let chosen = describe(sampling);
    let weights = bytes(pretrained.weights.num_bytes());
    let peak = memory::peak().map_or(String::new(), |peak| format!(", at most {} resident", bytes(peak)));
    let (tokens, planned) = (used(completions).tokens, options.context);
    let context = match completions {
        [_] => format!("{tokens} of {planned} tokens"),
        all => format!(
            "{tokens} tokens in {} sequences; {} at once of {planned} tokens each",
            all.len(),
            options.sequences
        ),
    };
    note(&format!(
        "
model    {}
speed    {} prompt + {} generated tokens; {rates}
sampling {chosen}
context  {context}, prompts read in {}
cache    {cache}
memory   {weights} of weights{peak}",
        model_line(pretrained, device),
        total(|c| c.prompt_tokens),
        total(|c| c.tokens.len()),
        options.prefill,
    ));
}

/// How tokens were chosen, in words; what does nothing is left out.
fn describe(sampling: &Sampling) -> String {
    let mut parts = if sampling.temperature == 0.0 {
        vec![format!("greedy, repetition penalty {}", sampling.repetition_penalty)]
    } else {
        vec![format!(
            "temperature {}, top-p {}, top-k {}, min-p {}, repetition penalty {}, seed {}",
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
            sampling.min_p,
            sampling.repetition_penalty,
            sampling.seed
        )]
    };
    for (name, value) in [
        ("presence penalty", sampling.presence_penalty),
        ("frequency penalty", sampling.frequency_penalty),
        ("DRY", sampling.dry.multiplier),
    ] {
        if value != 0.0 {
            parts.push(format!("{name} {value}"));
        }
    }
    match sampling.logit_bias.len() {
        0 => {}
        1 => parts.push("a bias on 1 token".to_owned()),
        count => parts.push(format!("biases on {count} tokens")),
    }
    parts.join(", ")
}
