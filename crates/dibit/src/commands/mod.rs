//! The commands, one a file.

pub mod bench;
pub mod by_itself;
pub mod calibrate;
pub mod chat;
pub mod compare;
pub mod completions;
pub mod generate;
pub mod inspect;
pub mod perplexity;
pub mod ruler;
pub mod schemes;

use self::schemes::Chosen;
use crate::args::{SamplingArgs, Seed, WindowArgs, WindowBos};
use crate::output::{self, check_writable};
use anyhow::{Context, Result};
use dibit_cache::{CalibratedScheme, Scheme, Usage};
use dibit_engine::{Dry, Engine, Sampling};
use dibit_model::{GenerationConfig, ModelConfig, Pretrained};
use indicatif::ProgressBar;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

fn schemes(names: &[String]) -> Result<Vec<Scheme>> {
    names.iter().map(|name| Ok(Scheme::load(name.trim())?)).collect()
}

/// Says what a scheme that is about to run cannot do yet, or not on this model.
fn announce(scheme: &CalibratedScheme, config: &ModelConfig) -> Result<()> {
    let notes = scheme.plan(&config.cache_model())?.notes();
    for note in notes.into_iter().chain(scheme.warnings()).chain(scheme.notice()) {
        tracing::info!("{note}");
    }
    Ok(())
}

/// What the user says, else what the model's makers say. As with Hugging Face, a model whose makers do not ask for
/// sampling decodes greedily; who gives a sampling option, or wants `several` texts of a prompt, asks for it, too.
///
/// # Errors
/// Where the model's makers say something that cannot be understood and the user says nothing else.
fn sampling(args: &SamplingArgs, model: &GenerationConfig, several: bool) -> Result<Sampling> {
    let seeded = matches!(args.seed, Some(Seed::Given(_)));
    let asked = several || args.top_p.is_some() || args.top_k.is_some() || args.min_p.is_some() || seeded;
    let samples = asked || model.do_sample == Some(true);
    let temperature = args.temperature.or((!samples).then_some(0.0));
    let is_greedy = temperature == Some(0.0);
    let own = [
        ("do_sample", asked || args.temperature.is_some()),
        ("temperature", temperature.is_some()),
        ("top_p", is_greedy || args.top_p.is_some()),
        ("top_k", is_greedy || args.top_k.is_some()),
        ("min_p", is_greedy || args.min_p.is_some()),
        ("repetition_penalty", args.repetition_penalty.is_some()),
    ];
    let overridden: Vec<&str> = own.into_iter().filter_map(|(field, is_own)| is_own.then_some(field)).collect();
    model.check(&overridden)?;
    let clock = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::from(d.subsec_nanos()));
    Ok(Sampling {
        temperature: temperature.or(model.temperature).unwrap_or(1.0),
        top_p: args.top_p.or(model.top_p).unwrap_or(1.0),
        top_k: args.top_k.or(model.top_k).unwrap_or(0),
        min_p: args.min_p.or(model.min_p).unwrap_or(0.0),
        repetition_penalty: args.repetition_penalty.or(model.repetition_penalty).unwrap_or(1.0),
        presence_penalty: args.presence_penalty,
        frequency_penalty: args.frequency_penalty,
        dry: Dry {
            multiplier: args.dry_multiplier,
            base: args.dry_base,
            allowed_length: args.dry_allowed_length,
            breakers: match &args.dry_sequence_breaker[..] {
                [] => Dry::default().breakers,
                own => own.to_vec(),
            },
        },
        logit_bias: args.logit_bias.clone(),
        seed: match args.seed {
            Some(Seed::Given(seed)) => seed,
            _ => clock(),
        },
    })
}

/// Lets windows of a text begin as the user says.
fn begin_windows(args: &WindowArgs, pretrained: &mut Pretrained) {
    if args.window_bos == WindowBos::Auto && !pretrained.tokenizer.adds_bos() {
        pretrained.window_bos = None;
    }
}

/// What windows begin with, in words.
fn window_begin(pretrained: &Pretrained, bos: Option<u32>) -> String {
    bos.map_or_else(
        || "without BOS".to_owned(),
        |id| format!("each beginning with BOS ({})", pretrained.tokenizer.token(id).unwrap_or_else(|| id.to_string())),
    )
}

/// A flag that Ctrl-C sets from now on, instead of ending the program; with `twice_ends` the second one ends it.
fn interrupt_flag(twice_ends: bool) -> Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let seen = flag.clone();
    ctrlc::set_handler(move || {
        if seen.swap(true, Ordering::Relaxed) && twice_ends {
            std::process::exit(i32::from(crate::INTERRUPTED));
        }
    })?;
    Ok(flag)
}

/// Whether to go on: not once Ctrl-C was pressed.
fn go_on(interrupted: &AtomicBool) -> ControlFlow<()> {
    if interrupted.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
}

/// Shows on a bar how far an evaluation is, and stops it once Ctrl-C was pressed.
fn evaluation_progress<'a>(
    bar: &'a ProgressBar,
    interrupted: &'a AtomicBool,
) -> impl FnMut(dibit_eval::Progress) -> ControlFlow<()> + 'a {
    let mut steps = 0;
    move |progress| {
        bar.set_length(progress.passes as u64);
        bar.set_message(format!("window {} of {}: {}", progress.window + 1, progress.windows, progress.scheme));
        bar.set_position(steps);
        steps += 1;
        go_on(interrupted)
    }
}

/// The page that a report is written to; its directory is made.
fn prepare_report(directory: &Path) -> Result<PathBuf> {
    std::fs::create_dir_all(directory).with_context(|| format!("cannot make the directory {}", directory.display()))?;
    let page = directory.join("index.html");
    check_writable(&page)?;
    Ok(page)
}

/// The model in a line.
fn model_line(pretrained: &Pretrained, device: &str) -> String {
    let config = &pretrained.config;
    let parameters = match config.num_parameters() as f64 {
        count if count >= 1e9 => format!("{:.1} B", count / 1e9),
        count => format!("{:.1} M", count / 1e6),
    };
    format!(
        "{}: {}, {parameters} parameters, {} on {device}",
        pretrained.name,
        config.architecture.name(),
        pretrained.weights.formats()
    )
}

/// Contexts that a cache is also told for: a short one is mostly its window of 16 bit.
const LONG: [usize; 2] = [8192, 32_768];

/// The cache in a line: what it holds now, what the scheme takes at a long context, and its calibration.
fn cache_line(chosen: &Chosen, usage: &Usage, engine: &Engine) -> String {
    let (layout, prefill) = (engine.layout(), engine.options().prefill);
    let planned = |context: usize| {
        let fp16 = context * layout.shape.scalars_per_token() * size_of::<u16>();
        let scheme = layout.planned_usage(context, prefill.chunk(context)).used_bytes;
        format!("{context} tokens take {} ({} in 16 bit)", output::bytes(scheme), output::bytes(fp16))
    };
    format!(
        "{}: {} in use, {} allocated; {}{}",
        chosen.scheme.name,
        output::bytes(usage.used_bytes),
        output::bytes(usage.allocated_bytes),
        LONG.map(planned).join(", "),
        chosen.calibration.as_ref().map(|found| format!("; calibration: {found}")).unwrap_or_default()
    )
}
