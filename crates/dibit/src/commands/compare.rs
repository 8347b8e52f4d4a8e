use super::schemes::{attach_one, calibrated_schemes};
use super::{
    announce, begin_windows, evaluation_progress, go_on, interrupt_flag, prepare_report, schemes, window_begin,
};
use crate::args::CompareArgs;
use crate::device::on_device;
use crate::output::{STDOUT, bar, bytes, check_writable, note, table, write_complete};
use crate::{Outcome, retrieval, source, text};
use anyhow::{Context, Result, bail};
use dibit_cache::{CalibratedScheme, PAGE_TOKENS, Scheme};
use dibit_device::{Device, Measure, Train};
use dibit_engine::{EngineError, Options, Prefill};
use dibit_eval::ruler::{Haystack, Sample, SampleOptions, Task};
use dibit_eval::{
    Choices, Comparison, ComparisonRow, PerplexityOptions, attention_times, perplexity, report, sample, study,
};
use dibit_model::{Pretrained, windows};
use dibit_runner::Models;
use std::collections::BTreeSet;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Contexts whose bits are shown beside those of the one that is run.
const LONGER: [usize; 3] = [8192, 32768, 131_072];

/// Tokens of the text that the pictures of keys and values look at.
const STUDIED: usize = 1024;

/// Tasks whose answers show a damaged cache: words and numbers in essays, ids, distractors, several questions.
const TASKS: [Task; 4] = [Task::NiahSingle2, Task::NiahSingle3, Task::NiahMultikey1, Task::NiahMultiquery];

pub fn run(args: &CompareArgs) -> Result<Outcome> {
    let named: Vec<String> = args.schemes.iter().filter(|name| name.trim() != "all").cloned().collect();
    schemes(&named)?;
    match args.samples {
        0 => args.prefill.check_without("--samples 0")?,
        _ => args.prefill.check()?,
    }
    let text = text::read(&args.text)?;
    let haystack = args.haystack.haystack.as_deref().map(retrieval::haystack).transpose()?;
    let page = args.report.as_deref().map(prepare_report).transpose()?;
    for path in [&args.json, &args.csv].into_iter().flatten() {
        check_writable(path)?;
    }
    on_device!(&args.run.open_device()?, |device| run_on(device, args, &named, &text, haystack, page))
}

fn run_on<D: Train + Measure + 'static>(
    device: &Arc<D>,
    args: &CompareArgs,
    named: &[String],
    text: &str,
    haystack: Option<Haystack>,
    page: Option<PathBuf>,
) -> Result<Outcome> {
    let mut pretrained = source::load(device, &args.run.model)?;
    begin_windows(&args.window, &mut pretrained);
    let pretrained = Arc::new(pretrained);
    let schemes = match named.len() == args.schemes.len() {
        true => calibrated_schemes(named, &args.calibration.calibration, &pretrained)?,
        false => built_in(named, &args.calibration.calibration, &pretrained)?,
    };
    let schemes = CalibratedScheme::with_reference(&schemes)?;
    schemes.iter().try_for_each(|scheme| announce(scheme, &pretrained.config))?;
    let interrupted = interrupt_flag(true)?;
    let begin = window_begin(&pretrained, pretrained.window_bos);
    let ids = pretrained.tokenizer.encode(text, false)?;
    let prompts = prompts(args, &pretrained, haystack)?;
    let Some(mut comparison) = measure(args, device, &pretrained, &schemes, &ids, &interrupted)? else {
        return Ok(stopped());
    };
    if comparison.windows < args.windows as usize {
        tracing::warn!("the text fills {} windows, fewer than the {} asked for", comparison.windows, args.windows);
    }
    comparison.text = args.text.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let studied = page.as_ref().map(|_| look(device, &pretrained, &schemes, &ids, args.context)).transpose()?;
    if !prompts.is_empty() && !retrieve(args, device, &pretrained, &schemes, &prompts, &interrupted, &mut comparison)? {
        return Ok(stopped());
    }
    write!(std::io::stdout(), "{}", render(&comparison, &begin)).context(STDOUT)?;
    if let Some(path) = &args.json {
        let value = serde_json::json!({
            "comparison": comparison,
            "study": studied,
            "windows": begin,
            "retrieval_prefill": (!prompts.is_empty()).then(|| args.prefill.on(&device.budget()).to_string()),
        });
        write_complete(path, serde_json::to_string(&value)?.as_bytes())?;
    }
    if let Some(path) = &args.csv {
        write_complete(path, comparison.csv().as_bytes())?;
    }
    if let (Some(path), Some(studied)) = (page, studied) {
        write_complete(&path, report::html(&comparison, &studied).as_bytes())?;
        note(&format!("report: {}", path.display()));
    }
    Ok(Outcome::Done)
}

fn stopped() -> Outcome {
    note("interrupted: no figures are shown or written");
    Outcome::Interrupted
}

/// Every built-in scheme, and those that are named besides. Built-in ones that lack their calibration are left out, which
/// is said; one that is named is refused.
fn built_in(named: &[String], files: &[PathBuf], pretrained: &Pretrained) -> Result<Vec<CalibratedScheme>> {
    let mut all = Vec::new();
    let others = named.iter().map(|name| name.trim()).filter(|name| !Scheme::built_in().any(|known| known == *name));
    let names: Vec<&str> = Scheme::built_in().map(|name| -> &str { name }).chain(others).collect();
    for name in names {
        let mut scheme = CalibratedScheme::load(name)?;
        // Other names of the reference have its figures.
        if scheme.is_exact() && scheme.name != "fp16" && named.iter().all(|own| own.trim() != name) {
            continue;
        }
        let attached = match scheme.takes_calibration() {
            true => attach_one(&mut scheme, files, pretrained).map(drop),
            false => Ok(()),
        };
        // A scheme that has one by another way, or can do without, is not told; the latter is said when it is announced.
        let lacks = scheme.is_calibrated() && scheme.calibration.is_none();
        let attached = attached.or_else(|error| if lacks { Err(error) } else { Ok(()) });
        match attached.and_then(|()| Ok(pretrained.config.cache_layout(&scheme)?)) {
            Ok(_) => all.push(scheme),
            Err(error) if named.iter().any(|own| own.trim() == name) => return Err(error),
            Err(error) => tracing::info!("{name} is left out: {error:#}"),
        }
    }
    Ok(all)
}

/// Perplexity, bits and time of every scheme; `None` where Ctrl-C came.
fn measure<D: Device + Measure>(
    args: &CompareArgs,
    device: &Arc<D>,
    pretrained: &Pretrained,
    schemes: &[CalibratedScheme],
    ids: &[u32],
    interrupted: &AtomicBool,
) -> Result<Option<Comparison>> {
    let prefills = vec![Prefill::streaming(args.context)];
    let options = PerplexityOptions { context: args.context, windows: Some(args.windows as usize), prefills };
    let bar = bar(0);
    let figures = perplexity(device, pretrained, schemes, ids, options, evaluation_progress(&bar, interrupted))?;
    let Some(figures) = figures else { return Ok(None) };
    bar.set_message("attention");
    let times = attention_times(&**device, pretrained, schemes, args.context)?;
    bar.finish_and_clear();
    let mut rows = Vec::new();
    for ((scheme, own), time) in schemes.iter().zip(&figures.schemes).zip(times) {
        let layout = pretrained.config.cache_layout(scheme)?;
        rows.push(ComparisonRow {
            scheme: scheme.name.clone(),
            summary: scheme.summary.clone(),
            bits: own.bits,
            bits_at: LONGER
                .into_iter()
                .filter(|context| *context > args.context)
                .map(|context| (context, layout.planned_usage(context, PAGE_TOKENS).bits()))
                .collect(),
            perplexity: own.perplexity,
            kl_mean: own.kl_mean,
            kl_p999: own.kl_p999,
            top1_agreement: own.top1_agreement,
            retrieval: None,
            retrieval_at: Vec::new(),
            cache_bytes: layout.planned_bytes(args.context),
            attention_micros: Some(time.as_secs_f64() * 1e6),
            choices: Choices::new(scheme, &layout),
        });
    }
    Ok(Some(Comparison {
        model: pretrained.name.clone(),
        text: String::new(),
        context: args.context,
        windows: figures.windows,
        tokens: figures.tokens,
        retrieval_context: None,
        rows,
    }))
}

/// What quantisation does to the keys and values of the beginning of the text, and what corrections do to attention.
fn look<D: Train>(
    device: &Arc<D>,
    pretrained: &Pretrained,
    schemes: &[CalibratedScheme],
    ids: &[u32],
    context: usize,
) -> Result<study::Study> {
    let tokens = STUDIED.min(context).min(pretrained.config.max_position_embeddings);
    let Some(window) = windows(ids, pretrained.window_bos, tokens, Some(1)).pop() else {
        bail!("the text has {} tokens and the report's pictures need {tokens}; give a longer text", ids.len());
    };
    let (shape, layers) = sample(device, pretrained, &window)?;
    let corrections = study::corrections(&**device, &pretrained.config, schemes, shape, &layers)?;
    Ok(study::Study { corrections, ..study::study(shape, &layers)? })
}

/// Retrieval prompts of one length.
struct Prompts {
    context: usize,
    samples: Vec<Sample>,
}

/// Retrieval prompts by ascending length, none where they are not asked for.
fn prompts(args: &CompareArgs, pretrained: &Pretrained, haystack: Option<Haystack>) -> Result<Vec<Prompts>> {
    if args.samples == 0 {
        return Ok(Vec::new());
    }
    let haystack = haystack.unwrap_or_else(|| {
        tracing::info!("without --haystack, RULER's noise sentences stand in for essays; that is easier");
        Haystack::noise()
    });
    let asked = args.retrieval_context.iter().map(|context| *context as usize);
    let lengths: BTreeSet<usize> =
        if args.retrieval_context.is_empty() { [args.context].into() } else { asked.collect() };
    let limit = pretrained.config.max_position_embeddings;
    if let Some(&context) = lengths.last().filter(|context| **context > limit && !args.retrieval_context.is_empty()) {
        return Err(EngineError::ContextTooLong { context, limit }.into());
    }
    let of_length = |context: usize| {
        let options = SampleOptions { length: context, count: args.samples as usize, seed: args.seed };
        let samples = retrieval::samples(pretrained, &TASKS, options, &haystack, None);
        Ok(Prompts { context, samples: samples.context("--samples 0 leaves retrieval out")? })
    };
    lengths.into_iter().map(of_length).collect()
}

/// Adds the retrieval accuracy of every scheme; false where Ctrl-C came.
fn retrieve<D: Device + 'static>(
    args: &CompareArgs,
    device: &Arc<D>,
    pretrained: &Arc<Pretrained>,
    schemes: &[CalibratedScheme],
    prompts: &[Prompts],
    interrupted: &AtomicBool,
    comparison: &mut Comparison,
) -> Result<bool> {
    let bar = bar(schemes.len() * prompts.iter().map(|prompts| prompts.samples.len()).sum::<usize>());
    let mut models = Models::new(device, pretrained);
    let mut done = 0;
    for (scheme, row) in schemes.iter().zip(&mut comparison.rows) {
        let longest = prompts.iter().map(|prompts| prompts.context).max().unwrap_or(args.context);
        let options = Options { context: longest, sequences: 1, prefill: args.prefill.on(&device.budget()) };
        models.keep_first();
        let mut engine = retrieval::engine(pretrained, &mut models, scheme, options)?;
        for Prompts { context, samples } in prompts {
            bar.set_message(format!("{}: retrieval at {context}", scheme.name));
            let answers = retrieval::run(&mut engine, samples, |begun| {
                bar.set_position((done + begun) as u64);
                go_on(interrupted)
            })?;
            let Some(answers) = answers else { return Ok(false) };
            done += samples.len();
            row.retrieval_at.push((*context, mean(answers.iter().map(|answer| answer.score))));
        }
        row.retrieval = Some(mean(row.retrieval_at.iter().map(|at| at.1)));
    }
    bar.finish_and_clear();
    comparison.retrieval_context = prompts.iter().map(|prompts| prompts.context).max();
    Ok(true)
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len();
    values.sum::<f64>() / count as f64
}

fn render(comparison: &Comparison, begin: &str) -> String {
    let contexts: Vec<usize> = LONGER.into_iter().filter(|context| *context > comparison.context).collect();
    let names: Vec<String> = contexts.iter().map(|context| format!("at {}k", context / 1024)).collect();
    let mut header = vec!["scheme", "bits"];
    header.extend(names.iter().map(String::as_str));
    header.extend(["perplexity", "KL mean", "KL 99.9%", "top-1"]);
    let lengths = comparison.retrieval_contexts();
    let found: Vec<String> = lengths.iter().map(|tokens| format!("retrieval at {tokens}")).collect();
    match found.len() {
        0 | 1 => header.push("retrieval"),
        _ => header.extend(found.iter().map(String::as_str)),
    }
    header.extend(["cache", "attention"]);
    let cells = |row: &&ComparisonRow| {
        let mut cells = vec![row.scheme.clone(), format!("{:.2}", row.bits)];
        cells.extend(row.bits_at.iter().map(|(_, bits)| format!("{bits:.2}")));
        cells.extend([
            format!("{:.3}", row.perplexity),
            format!("{:.5}", row.kl_mean),
            format!("{:.4}", row.kl_p999),
            format!("{:.4}", row.top1_agreement),
        ]);
        let share =
            |share: Option<f64>| share.map_or_else(|| "-".to_owned(), |share| format!("{:.1} %", 100.0 * share));
        match lengths.len() {
            0 | 1 => cells.push(share(row.retrieval)),
            _ => cells.extend(lengths.iter().map(|tokens| share(row.retrieval_at(*tokens)))),
        }
        cells.extend([
            bytes(row.cache_bytes),
            row.attention_micros.map_or_else(|| "-".to_owned(), |micros| format!("{micros:.0} us")),
        ]);
        cells
    };
    let rows: Vec<Vec<String>> = comparison.sorted().iter().map(cells).collect();
    format!(
        "{}{} tokens in {} windows of {}, {begin}; KL in nats against fp16; bits per cached scalar; attention of one decoding step, all \
         layers\n",
        table(&header, &rows),
        comparison.tokens,
        comparison.windows,
        comparison.context
    )
}
